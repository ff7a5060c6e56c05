//! The guest behind the loop: a KVM machine.
//!
//! The loop never waits for it. A worker thread owns the machine and does what takes long (copying
//! pages, stopping and starting vCPUs, loading state); frames are moved on the loop itself, through
//! the card's eventfd and the back end's descriptor.
//!
//! | file | holds |
//! |---|---|
//! | `build.rs` | from a configuration to a machine with its devices |
//! | `worker.rs` | the thread that owns the machine |
//! | `guest.rs` | [`KvmGuest`]: what the loop calls |
//! | `announcer.rs` | says where the VM lives after a takeover |
//! | `backend.rs` | where the card's frames go |

mod announcer;
mod backend;
mod build;
mod guest;
#[cfg(test)]
mod tests;
mod worker;

pub(crate) use build::build;
pub(crate) use guest::KvmGuest;
pub(crate) use worker::{Ended, Order, Orders};
