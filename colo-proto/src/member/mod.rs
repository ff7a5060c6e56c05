//! Who owns the VM: failure detection and split-brain prevention (spec ownership).
//!
//! Liveness is not ownership. A [`Member`] tells by heartbeats whether the other node is there,
//! but it opens the gate to the world only under a [`Permit`]: a lease that the other node
//! renews, or a generation that the arbiter granted. Where neither is to be had the gate is shut.
//!
//! ```text
//!            hello / sync                 silence T_s, yield
//!  0 Idle ──▶ 1 Syncing ──dual-start──▶ 2 Secondary ─────▶ 6 SecondaryArbitrating
//!    │            ▲  ▲ abstain ◀───────────┘                   │ granted     │ denied
//!    │            │  └───────── solo-notice ──────────┐        ▼             ▼
//!    │ cold boot  │                                 8 Fenced ◀───── 7 TakeoverWait
//!    ▼            │        yield, denied              ▲  │               │ lease over, settled
//!  4 PrimarySolo ◀┼───────────────────────────────────┼──┴───────────────┘
//!    │ ▲  dual granted    silence T_p                 │
//!    ▼ └── granted, abstain ──┐                       │
//!  3 PrimaryDual ─────▶ 5 PrimaryArbitrating ─────────┘
//! ```
//!
//! * `machine`: [`Member`], its inputs, outputs and timers. The drain contract stands there.
//! * `phase`: what each state knows.
//! * `owner`, `partner`, `fenced`, `startup`: the rows of the transition table, by who acts.
//! * `ask`: ballots and fencing, repeated until answered.
//! * `journal`, `witness`, `readiness`: record and arbiter, tried before they are needed.
//! * `lease`: how long acknowledgements keep the gate open.
//! * `datagram`, `mac`: the wire. `record`: what survives a crash, and the arbiter as a function.
//! * `config`, `name`: settings and names.

mod ask;
mod config;
mod datagram;
mod event;
mod fenced;
mod handover;
mod journal;
mod lease;
mod mac;
mod machine;
mod mutation;
mod name;
mod owner;
mod partner;
mod phase;
mod readiness;
mod record;
mod startup;
#[cfg(test)]
mod tests;
mod witness;

pub use config::{Arbitration, ConfigError, MAX_PATHS, MemberConfig, Setting, WitnessLoss};
pub use datagram::{
    Control, DATAGRAM_SIZE, Datagram, DatagramError, Flags, Health, Kind, MemberState,
};
pub use event::{Command, Critical, Local, MemberEvent, MemberOutput, Permit};
pub use mac::MacKey;
pub(crate) use mac::{code, same};
pub use machine::{Member, MemberCounters};
#[cfg(feature = "mutations")]
pub use mutation::Mutation;
pub use name::{BootId, NodeId, PathId, PersistId, RequestId, VmId};
pub use readiness::{Unprotected, Unready};
pub use record::{Ballot, Claim, Mode, PriorRole, Record, RecordError, Register, Verdict};
