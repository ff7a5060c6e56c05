//! One split ring: what the guest programmed, and virtio-queue's cursor once it is ready.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes as _, GuestAddress, GuestMemory, Permissions};

use super::chain::Chain;
use crate::memory::GuestRam;

/// A ring of at most `max` entries.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) max: u16,
    /// As written; checked when the guest says that the ring is ready.
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// `Some` while the ring is ready.
    queue: Option<Queue>,
}

/// Where the device stands in a ready ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cursor {
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

/// What a look into the available ring found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Popped {
    Nothing,
    Good,
    /// A loop, or a link outside RAM: its head is known, its buffers are not to be used.
    Malformed,
}

impl Ring {
    pub(super) fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            descriptors: 0,
            available: 0,
            used: 0,
            queue: None,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max);
    }

    pub(super) fn is_ready(&self) -> bool {
        self.queue.is_some()
    }

    /// Starts the ring at `cursor`. Leaves it as it is when the guest programmed it wrongly: a size that is no power
    /// of two or too long, an address that is not aligned or not in RAM.
    pub(super) fn start(&mut self, ram: &GuestRam, cursor: Cursor, event_idx: bool) -> bool {
        let size = usize::from(self.size);
        let parts = [
            (self.descriptors, 16 * size),
            (self.available, 6 + 2 * size),
            (self.used, 6 + 8 * size),
        ];
        let inside = parts
            .iter()
            .all(|&(at, len)| ram.check_range(GuestAddress(at), len, Permissions::ReadWrite));
        // virtio-queue takes a ring at address 0 for one that was never set up.
        if !inside || self.available == 0 {
            return false;
        }
        self.queue = Queue::try_from(QueueState {
            max_size: self.max,
            next_avail: cursor.next_available,
            next_used: cursor.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
        .ok();
        self.is_ready()
    }

    pub(super) fn stop(&mut self) {
        self.queue = None;
    }

    pub(super) fn set_event_idx(&mut self, enabled: bool) {
        if let Some(queue) = &mut self.queue {
            queue.set_event_idx(enabled);
        }
    }

    pub(super) fn cursor(&self) -> Cursor {
        Cursor {
            next_available: self.queue.as_ref().map_or(0, QueueT::next_avail),
            next_used: self.queue.as_ref().map_or(0, QueueT::next_used),
        }
    }

    /// Takes the next request. An error means that the ring itself makes no sense.
    pub(super) fn pop(&mut self, ram: &GuestRam, chain: &mut Chain) -> Result<Popped, Error> {
        let Some(queue) = &mut self.queue else {
            return Ok(Popped::Nothing);
        };
        let Some(found) = queue.iter(ram)?.next() else {
            return Ok(Popped::Nothing);
        };
        let whole = chain.fill(found);
        if chain.head() >= queue.size() {
            // `add_used` would find it too, and log it: a line for every reset the guest can do.
            return Err(Error::InvalidDescriptorIndex);
        }
        Ok(if whole {
            Popped::Good
        } else {
            Popped::Malformed
        })
    }

    /// Gives back the request popped last.
    pub(super) fn unpop(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.go_to_previous_position();
        }
    }

    pub(super) fn complete(
        &mut self,
        ram: &GuestRam,
        head: u16,
        written: u32,
    ) -> Result<(), Error> {
        match &mut self.queue {
            Some(queue) => queue.add_used(ram, head, written),
            None => Ok(()),
        }
    }

    /// Whether the guest wants an interrupt for what was completed since the last call.
    pub(super) fn wants_interrupt(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        let Some(queue) = &mut self.queue else {
            return Ok(false);
        };
        if !queue.needs_notification(ram)? {
            return Ok(false);
        }
        if queue.event_idx_enabled() {
            return Ok(true);
        }
        // virtio-queue does not look at this flag.
        let flags: u16 = ram
            .load(GuestAddress(self.available), Ordering::Relaxed)
            .map_err(Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks to be notified of the next request. Returns whether one is there already.
    pub(super) fn arm(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        match &mut self.queue {
            Some(queue) => queue.enable_notification(ram),
            None => Ok(false),
        }
    }

    /// Says that notifications are not needed for now.
    pub(super) fn disarm(&mut self, ram: &GuestRam) -> Result<(), Error> {
        match &mut self.queue {
            Some(queue) => queue.disable_notification(ram),
            None => Ok(()),
        }
    }
}
