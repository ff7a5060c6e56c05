//! Frames out, frames in.

use bytes::{Bytes, BytesMut};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE,
};

use super::device::{MOST_BYTES, MOST_WAITING, MOST_WAITING_BYTES, Net, RX, TX, VNET_HEADER};
use crate::device::virtio::{Queues, Virtio};

/// What became of a frame for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RxOutcome {
    /// It is in guest RAM.
    Delivered,
    /// It waits for a receive buffer, in order.
    Queued,
    /// It is gone, as on a full wire.
    Dropped,
}

impl Virtio<Net> {
    /// Takes up to `budget` frames out of the transmit ring, each into `sink` with the current epoch. Returns how many
    /// requests were taken; if some may be left, [`wake_fd`](Self::wake_fd) is readable again.
    ///
    /// A frame is in the ring (guest RAM) until it is taken: one that is there when the guest stops is part of the
    /// checkpoint and comes out after it, under the next epoch, here or on the other host.
    pub fn poll_tx(&mut self, budget: usize, sink: &mut dyn FnMut(u64, Bytes)) -> usize {
        self.drain_wake();
        self.device.deliver_backlog(&mut self.queues);
        let (taken, more) = self.device.transmit(&mut self.queues, budget, sink);
        if more {
            self.wake();
        }
        taken
    }

    /// Brings a frame to the guest. `index` is its number in the input log: call this in the order of the log, each
    /// frame once.
    ///
    /// Without a receive buffer, or while quiesced, the frame waits in a backlog of 1,024 frames or 4 MiB; what does
    /// not fit is dropped.
    pub fn rx(&mut self, index: u64, frame: &[u8]) -> RxOutcome {
        let Self { device, queues, .. } = self;
        device.deliver_backlog(queues);
        device.newest = index;
        let outcome = device.receive(queues, index, frame);
        match outcome {
            RxOutcome::Delivered => queues.signal(RX),
            RxOutcome::Queued => device.metrics.rx_queued += 1,
            RxOutcome::Dropped => device.metrics.rx_dropped += 1,
        }
        if device.backlog.is_empty() {
            device.consumed = index;
        }
        outcome
    }

    /// The newest input of which it holds that it and all before it were delivered to the guest or dropped. It is in
    /// the section: after a checkpoint is loaded, on either host, the guest knows exactly the inputs up to here.
    ///
    /// What waits in the backlog is not in the section. A card that keeps running keeps it. A card that
    /// [loads](crate::device::Persist::load) a checkpoint drops it, as the guest it was meant for is gone; the core
    /// brings every input after this index again, so nothing is lost and nothing comes twice.
    #[must_use]
    pub fn consumed_inputs(&self) -> u64 {
        self.device.consumed
    }

    /// The epoch of what is sent from now on; call while quiesced, when a checkpoint is cut.
    pub fn set_epoch(&mut self, epoch: u64) {
        self.device.epoch = epoch;
    }
}

impl Net {
    fn transmit(
        &mut self,
        queues: &mut Queues,
        budget: usize,
        sink: &mut dyn FnMut(u64, Bytes),
    ) -> (usize, bool) {
        let mut taken = 0;
        queues.disarm(TX);
        while taken < budget && queues.pop(TX, &mut self.chain) {
            taken += 1;
            match self.frame(queues).filter(|_| self.link_up) {
                Some(frame) => {
                    self.metrics.tx += 1;
                    self.metrics.tx_bytes += (frame.len() - self.config.offloads.header()) as u64;
                    sink(self.epoch, frame);
                }
                None => self.metrics.tx_dropped += 1,
            }
            queues.complete(TX, &self.chain, 0);
        }
        if taken > 0 {
            queues.signal(TX);
        }
        // Out of budget, notifications stay off: the loop comes back by itself. It also does when a request came in
        // between: looping here would let a guest that never stops hold the lock for good.
        let more = queues.is_live() && (taken >= budget || queues.arm(TX));
        (taken, more)
    }

    /// The frame in the chain, with its header if the loop's side has one.
    fn frame(&self, queues: &Queues) -> Option<Bytes> {
        let len = self.chain.readable.len();
        if len <= VNET_HEADER || len > MOST_BYTES {
            return None;
        }
        let skip = VNET_HEADER - self.config.offloads.header();
        let mut frame = BytesMut::zeroed(len - skip);
        self.chain
            .readable
            .read(queues.ram(), skip, &mut frame)
            .ok()?;
        Some(frame.freeze())
    }

    /// Delivers, keeps or drops one frame; the caller signals and counts.
    fn receive(&mut self, queues: &mut Queues, index: u64, frame: &[u8]) -> RxOutcome {
        let header = self.config.offloads.header();
        if !self.link_up || !queues.has_driver() || !self.deliverable(queues, frame) {
            return RxOutcome::Dropped;
        }
        if self.backlog.is_empty()
            && let Some(outcome) = self.deliver(queues, frame)
        {
            return outcome;
        }
        let bytes = self.backlog_bytes + frame.len();
        if self.backlog.len() >= MOST_WAITING || bytes > MOST_WAITING_BYTES {
            return RxOutcome::Dropped;
        }
        debug_assert!(frame.len() > header);
        self.backlog_bytes = bytes;
        self.backlog
            .push_back((index, Bytes::copy_from_slice(frame)));
        RxOutcome::Queued
    }

    /// Whether the frame is one, and asks nothing of the guest that it did not agree to.
    fn deliverable(&self, queues: &Queues, frame: &[u8]) -> bool {
        let header = self.config.offloads.header();
        if frame.len() <= header || frame.len() - header + VNET_HEADER > MOST_BYTES {
            return false;
        }
        let &[flags, gso, ..] = frame else {
            return false;
        };
        header == 0
            || (u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0
                || queues.agreed(VIRTIO_NET_F_GUEST_CSUM))
                && (u32::from(gso) == VIRTIO_NET_HDR_GSO_NONE
                    || queues.agreed(VIRTIO_NET_F_GUEST_TSO4)
                        && queues.agreed(VIRTIO_NET_F_GUEST_TSO6))
    }

    /// Puts the frame into the next receive buffer; `None` if there is none. A buffer too short for the frame stays
    /// for the next one.
    fn deliver(&mut self, queues: &mut Queues, frame: &[u8]) -> Option<RxOutcome> {
        if !self.pop_rx(queues) {
            return None;
        }
        let (from, frame) = frame.split_at_checked(self.config.offloads.header())?;
        let mut header = [0; VNET_HEADER];
        header
            .iter_mut()
            .zip(from)
            .for_each(|(to, from)| *to = *from);
        // One buffer a frame: merged receive buffers are not offered.
        header[10..].copy_from_slice(&1u16.to_le_bytes());
        let len = VNET_HEADER + frame.len();
        let buffer = &self.chain.writable;
        if buffer.len() < len {
            queues.unpop(RX);
            return Some(RxOutcome::Dropped);
        }
        let written = buffer
            .write(queues.ram(), 0, &header)
            .and_then(|()| buffer.write(queues.ram(), VNET_HEADER, frame));
        if written.is_err() {
            // Buffers outside RAM: the guest loses the frame and gets the buffer back empty.
            queues.complete(RX, &self.chain, 0);
            queues.signal(RX);
            return Some(RxOutcome::Dropped);
        }
        queues.complete(RX, &self.chain, len);
        self.metrics.rx += 1;
        self.metrics.rx_bytes += frame.len() as u64;
        Some(RxOutcome::Delivered)
    }

    /// Takes a receive buffer. When there is none, asks the guest to tell of the next; otherwise it need not.
    fn pop_rx(&mut self, queues: &mut Queues) -> bool {
        if queues.pop(RX, &mut self.chain) {
            return true;
        }
        if queues.arm(RX) && queues.pop(RX, &mut self.chain) {
            queues.disarm(RX);
            return true;
        }
        false
    }

    /// Delivers what waits, as far as there are buffers.
    pub(super) fn deliver_backlog(&mut self, queues: &mut Queues) {
        let mut delivered = false;
        // Bounded: each turn takes one frame out, and nothing puts one in.
        while let Some((index, frame)) = self.backlog.front().cloned() {
            match self.deliver(queues, &frame) {
                None => break,
                Some(RxOutcome::Dropped) => self.metrics.rx_dropped += 1,
                Some(_) => delivered = true,
            }
            self.backlog.pop_front();
            self.backlog_bytes -= frame.len();
            self.consumed = index;
        }
        if self.backlog.is_empty() {
            self.consumed = self.newest;
        }
        if delivered {
            queues.signal(RX);
        }
    }
}
