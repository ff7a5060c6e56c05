//! Both roles of the dialect towards an unmodified QEMU, as phases.
//!
//! ```text
//!  QEMU primary                     Standby (no VM behind it)
//!     migration stream ───────────▶  Migrating
//!     ◀──────────────── READY        Idle: epoch 0 is whole
//!     REQUEST ────────────────────▶
//!     ◀──────────────── REPLY        Stopped
//!     SEND, live part, SIZE, blob ▶  Receiving … validated
//!     ◀───── RECEIVED, LOADED        Idle: the next epoch is whole
//! ```
//!
//! [`Feeder`] is the other side: it says after which item which replies are owed.

mod feeder;
mod standby;

pub use feeder::{FeedError, Feeder};
pub use standby::{Action, Lost, Patience, Phase, Standby, State};
