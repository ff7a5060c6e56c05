//! Fault tolerance for a VMM, in seven calls on its own thread.
//!
//! The VMM brings its calls ([`Vm`]), its memory ([`Pages`], for most a [`Ram`]), a network card
//! whose two hooks are [`Card::say`] and [`Card::hear`], and the outside ([`World`]). This module
//! does the rest: stamps on frames, the cut of client frames, the order of reports, permits, staging
//! in two passes, state buffers, threads. [`Host`] makes configuration, identity, heartbeat paths
//! and record from one description.
//!
//! ```text
//!   the VMM's thread                         the loop's thread
//!   ─────────────────                        ─────────────────
//!   wait for Orders::descriptor()   ◀─bell──  EmbeddedGuest::start(op)
//!   Orders::serve(&mut vm)          ─report─▶ EmbeddedGuest::poll
//!     pause resume running                    staged pages, RAM and state to the sockets
//!     harvest save check load                 and back, by readv and writev
//!   device: Card::say  ─────frames──────────▶ held until they may leave ──▶ World::send
//!   device: Card::hear ◀────frames──────────  counted, mirrored ◀── World::receive
//! ```
//!
//! What the calls promise each other is on one page, `docs/embedding.md`; a whole VMM that does it
//! is `tests/embedded` in the repository. The conformance kit is `testing`, behind
//! the feature of that name.

mod card;
mod guest;
mod host;
mod orders;
mod world;

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, mpsc::channel},
};

pub use card::{Card, NoCard, Port};
use colo_driver_kvm::capture::Checkpoint;
pub use colo_driver_kvm::capture::{MemoryError, Pages, Ram, Vm};
use colo_proto::id::Epoch;
pub use guest::EmbeddedGuest;
pub use host::{Host, HostError};
pub use orders::Orders;
pub use world::World;

/// Why a VM cannot be embedded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbedError {
    /// No address space for a second copy of its pages.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No descriptor is left.
    #[error("no descriptor for a bell: {0}")]
    Bell(#[from] io::Error),
}

/// A guest for the loop, and the orders that the VMM's thread serves. Both hosts call it the same
/// way. Address space is taken for two more copies of all pages, memory as it is used.
///
/// # Errors
/// [`EmbedError`].
pub fn embed<P, W>(
    pages: P,
    port: Arc<dyn Port>,
    world: W,
) -> Result<(EmbeddedGuest<P, W>, Orders<P>), EmbedError>
where
    P: Pages + Clone,
    W: World,
{
    let shape = pages.shape();
    let all: u64 = shape.iter().map(|slot| slot.1).sum();
    let limit = u32::try_from(all).unwrap_or(u32::MAX);
    let outgoing = Arc::new(Mutex::new(Checkpoint::new(&shape, limit)?));
    let mut coming = Checkpoint::new(&shape, limit)?;
    coming.state = Vec::with_capacity(guest::STATE_MOST);
    let incoming = Arc::new(Mutex::new(coming));
    let bell = Arc::new(card::bell()?);
    let (ordering, inbox) = channel();
    let (outbox, happened) = channel();
    let (waking, woken) = channel();
    let orders = Orders {
        pages: pages.clone(),
        port: Arc::clone(&port),
        outgoing: Arc::clone(&outgoing),
        incoming: Arc::clone(&incoming),
        inbox,
        bell: Arc::clone(&bell),
        outbox,
        woken,
        wake: None,
        stamp: Epoch(0),
        tracking: false,
    };
    let guest = EmbeddedGuest {
        pages,
        port,
        world,
        outgoing,
        incoming,
        orders: ordering,
        bell,
        happened,
        woken: waking,
        iovecs: guest::Scratch::default(),
        out: VecDeque::new(),
        told: Epoch(0),
        card_ready: true,
        world_ready: true,
    };
    Ok((guest, orders))
}

/// A [`Card`] for both ends: the device's hooks and, as a [`Port`], [`embed`].
///
/// # Errors
/// No descriptor is left.
pub fn card() -> io::Result<Arc<Card>> {
    Card::new().map(Arc::new)
}
