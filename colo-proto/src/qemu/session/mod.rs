//! Both roles towards an unmodified QEMU: [`Secondary`](crate::secondary::Secondary) and
//! [`Primary`](crate::primary::Primary), spoken to in QEMU's dialect.
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
//! [`Standby`] translates the stream for a `Secondary`: every epoch, commit point and reply is that
//! machine's. [`Feeder`] is the other side: a `Primary` whose guest is a recording; it says after
//! which item which replies are owed.

mod channels;
mod feeder;
mod machine;
mod standby;

pub use feeder::{FeedError, Feeder};
pub use standby::{Action, Lost, Patience, Phase, Standby, State};
