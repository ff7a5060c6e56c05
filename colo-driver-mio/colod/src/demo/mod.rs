//! What stands around a pair in `colod demo` and in the tests on real processes: the network and
//! the client, both outliving either daemon, and both judges.
//!
//! | file | holds |
//! |---|---|
//! | `switch.rs` | [`Switch`]: a learning switch between Unix sockets, which remembers who spoke for which address |
//! | `client.rs` | [`Client`]: a TCP stack of its own that works with the guest's server and checks every byte |
//! | `stage.rs` | [`Stage`]: two hosts on one machine, their configurations and the daemons on them |
//! | `daemon.rs` | [`Daemon`]: one daemon as a process, with everything it reports |
//! | `wires.rs` | [`Wires`]: a bridge and taps in a network namespace, instead of the switch |
//! | `stack.rs` | the client on a TCP stack of its own |
//! | `kernel.rs` | the same client on the kernel's TCP stack |
//! | `http.rs` | requests, incremental answers, what a good answer is |

mod client;
mod daemon;
#[cfg(test)]
mod fake_server;
mod http;
mod kernel;
mod stack;
mod stage;
mod switch;
mod wires;

pub use client::{Answered, Client, Fault, Plan, Report};
pub use daemon::Daemon;
pub use http::{Asked, HttpFault};
pub use stage::{Host, Settings, Site, Stage};
pub use switch::{Sighting, Switch};
pub use wires::Wires;

/// Nanoseconds since the host started, the same for all of its processes.
#[must_use]
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // The clock starts at zero and lasts five centuries.
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
