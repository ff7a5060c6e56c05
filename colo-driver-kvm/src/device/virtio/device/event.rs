//! Who is woken when: the guest notifies, and something serves.

use vmm_sys_util::eventfd::EventFd;

use super::Virtio;
use crate::device::virtio::Backend;

impl<D: Backend> Virtio<D> {
    /// Readable when the loop should call [`serve`](Self::serve), or for a network card
    /// [`poll_tx`](Virtio::poll_tx): requests are waiting, or were when the device was resumed.
    ///
    /// As an ioeventfd at [`MMIO_NOTIFY`](Self::MMIO_NOTIFY) it takes the place of the exit for every device type. Without, a
    /// device other than a network card serves in the exit, but it must be watched all the same: a request that
    /// another vCPU adds while the ring is left comes without a notification, and is served from here.
    #[must_use]
    pub fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Serves what waits in the rings, after [`wake_fd`](Self::wake_fd) became readable.
    pub fn serve(&mut self) {
        self.drain_wake();
        self.serve_in_place();
    }

    /// The guest notified, or may have.
    pub(in super::super) fn kick(&mut self) {
        if !self.queues.is_live() {
            return;
        }
        self.serve_in_place();
        if D::POLLED {
            self.wake();
        }
    }

    pub(in super::super) fn drain_wake(&self) {
        // An error is an empty counter.
        let _empty = self.wake.read();
    }

    pub(in super::super) fn wake(&self) {
        // An error is a full counter: readable as well.
        let _full = self.wake.write(1);
    }

    fn serve_in_place(&mut self) {
        if self.queues.is_live() && self.device.serve(&mut self.queues) {
            self.wake();
        }
    }
}
