//! The event loop that drives [`colo_proto`] over sockets.
//!
//! **What it is.** One thread, one loop: it moves bytes and makes calls. Sockets, timers, files
//! and the guest are on one side, a [`Machine`](colo_proto::machine::Machine) that decides
//! everything is on the other. A decision in this crate is a bug.
//!
//! **What it is not.** It knows no VM: whatever runs the guest is behind the [`Guest`] trait, and
//! a [fake](guest::fake) stands in for it in tests.
//!
//! One turn of the loop:
//!
//! ```text
//!        ┌──────────────────────────── wait (epoll) ◀───────────────────────────────┐
//!        ▼                                                                          │
//!   timer ─▶ heartbeats ─▶ what other threads finished ─▶ guest ─▶ channels ─▶ arm the timer
//!     │          │          (guest, arbiter, record,        │         │
//!     │          │           operators)                     │      Control, Net, Disk, Ram…
//!     ▼          ▼                 ▼                        ▼         ▼ each within its budget
//!   ══════════════ Machine::handle_input, then every Machine::poll_output ══════════════════
//! ```
//!
//! * Heartbeats come before channels and a channel has a budget per turn: a full RAM
//!   lane never delays a heartbeat by more than one turn.
//! * A message is one `writev` of its head and the guest's pages; what is received goes with one
//!   `readv` where it belongs, plus the next small bytes. Page bytes are never copied here.
//! * Whatever may take long (copying pages, loading state, a file system that hangs) runs on
//!   another thread and reports through a [`Wake`].
//! * The secondary dials, the primary listens; every connection proves that it knows the pair's
//!   key before the machine hears of it ([`colo_proto::wire::join`]).
//!
//! Reading order: [`driver`], [`guest`], then `channel`.

pub mod arbiter;
mod budget;
mod channel;
pub mod clock;
pub mod driver;
pub mod embed;
mod endpoint;
pub mod frame_socket;
pub mod guest;
pub mod handle;
pub mod heartbeat;
pub mod metrics;
mod pool;
pub mod priority;
pub mod record;
#[cfg(feature = "testing")]
pub mod testing;
mod wake;

pub use channel::stream::remove_stale;
pub use driver::{Driver, DriverConfig, DriverError};
pub use endpoint::Endpoint;
pub use guest::Guest;
pub use handle::ControlHandle;
pub use mio;
pub use wake::Wake;
