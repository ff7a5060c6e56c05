//! Standing beside an unmodified QEMU: `colod inspect`, `colod standby`, `colod feed`.
//!
//! | file | holds |
//! |---|---|
//! | `inspect.rs` | what is in a captured stream |
//! | `standby.rs` | the secondary without a VM: accept, keep, take over |
//! | `lobby.rs` | who connected, before it has said what it is |
//! | `link.rs` | one link to a QEMU primary, with its multifd channels |
//! | `image.rs` | the RAM image, and the pages of the coming checkpoint |
//! | `region.rs` | memory that the system may refuse |
//! | `store.rs` | the newest checkpoint on disk |
//! | `takeover.rs` | a checkpoint as a migration stream, into a command or a file |
//! | `monitor.rs` | what is asked of the primary before it is taken over from, and the fence |
//! | `status.rs` | the file that says how it stands |
//! | `feed.rs` | the primary's role: replays a captured stream |
//! | `address.rs` | where QEMU is: `HOST:PORT` or `unix:PATH` |
//! | `wait.rs` | waiting for a descriptor, a deadline and Ctrl-C at once |
//! | `capture.rs` | captured streams, plain or xz |
//!
//! The protocol is [`colo_proto::qemu`]; what QEMU's dialect cannot promise is in docs/qemu.md.

mod address;
mod capture;
pub mod feed;
mod image;
pub mod inspect;
mod link;
mod lobby;
mod monitor;
mod region;
pub mod standby;
mod status;
mod store;
mod takeover;
mod wait;

pub use address::{Address, AddressError};
pub use wait::Stop;
