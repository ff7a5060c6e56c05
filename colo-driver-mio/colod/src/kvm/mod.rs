//! The guest behind the loop: a KVM machine, embedded as any VMM's is ([`colo_driver_mio::embed`]).
//!
//! | file | holds |
//! |---|---|
//! | `build.rs` | from a configuration to a machine with its devices |
//! | `worker.rs` | the thread that owns the machine: seven calls, and the operator's orders |
//! | `outside.rs` | the card's port, the world, what is said after a takeover |
//! | `backend.rs` | where the card's frames go |

mod backend;
mod build;
mod outside;
#[cfg(test)]
mod tests;
mod worker;

use std::thread;

use colo_driver_kvm::memory::Memory;
use colo_driver_mio::embed::{EmbeddedGuest, embed};
use colo_proto::ram::PageSet;

pub(crate) use build::{Built, build};
use outside::Outside;
pub(crate) use worker::{Ended, Order, Orders};

use crate::{cli::Failure, config::Config};

/// Bytes of guest RAM made resident by one call.
const POPULATED_AT_ONCE: usize = 4 << 20;

/// A KVM machine behind the loop.
pub(crate) type KvmGuest = EmbeddedGuest<Memory, Outside>;

/// Prepares a machine for the loop, and a way to its thread. `on_end` is told on that thread when the
/// guest will not go on, and `None` when another state has been loaded in its place.
pub(crate) fn guest(
    config: &Config,
    built: Built,
    on_end: impl FnMut(Option<Ended>) + Send + 'static,
) -> Result<(KvmGuest, Orders), Failure> {
    let port = worker::port(built.card.as_ref());
    let outside = Outside::open(config, &built)?;
    let (guest, orders) = embed(built.vm.memory().clone(), port, outside)?;
    let orders = worker::start(built, orders, on_end)?;
    Ok((guest, orders))
}

/// Makes all of guest RAM resident, in the background: a secondary will receive every page, and a
/// page that is there already is received at twice the speed.
pub(crate) fn populate(memory: &Memory) -> Result<(), Failure> {
    let mut slots = memory.shape();
    slots.retain(|(slot, _)| *slot < build::DISK);
    let mut all = PageSet::new(&slots);
    all.fill();
    let (memory, runs) = (memory.clone(), all.take_runs(u32::MAX, usize::MAX));
    thread::Builder::new()
        .name("populate".into())
        .spawn(move || {
            let mut pieces = Vec::new();
            if memory.iovecs(&runs, &mut pieces).is_err() {
                return;
            }
            for piece in pieces {
                // In steps: the kernel holds the address space for as long as a step takes, and
                // nobody else can start a thread or map a page meanwhile.
                for at in (0..piece.iov_len).step_by(POPULATED_AT_ONCE) {
                    let len = POPULATED_AT_ONCE.min(piece.iov_len - at);
                    let start = piece.iov_base.wrapping_byte_add(at);
                    // SAFETY: guest RAM, mapped for as long as `memory` is; populating changes
                    // no byte of it. Advice: a kernel that refuses costs speed only.
                    unsafe { libc::madvise(start, len, libc::MADV_POPULATE_WRITE) };
                }
            }
        })?;
    Ok(())
}
