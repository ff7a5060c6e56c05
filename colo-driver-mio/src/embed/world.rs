//! Where frames come from and go to, and who says where the VM lives.

use std::os::fd::RawFd;

use bytes::Bytes;
use colo_proto::{id::PageRuns, machine::Notify};

/// The outside, as the card of one VM sees it: a tap, a switch. Called by the loop; nothing waits.
pub trait World: Send {
    /// Readable when there is something to [`receive`](Self::receive); asked for once.
    fn descriptor(&self) -> Option<RawFd>;

    /// The next frame from outside. `None` when there is none now: it must have been read up to
    /// `WouldBlock` then.
    fn receive(&mut self) -> Option<Bytes>;

    /// Sends, or drops as a full wire does. The permit was checked: send it now or never.
    fn send(&mut self, frame: &[u8]);

    /// Says once where the VM lives now: gratuitous ARP and the like. It is called five times
    /// within 0.8 s after a takeover, for switches and clients that miss the first, each time under a
    /// permit.
    fn announce(&mut self);

    /// Pages are about to be received into `runs` of the guest's slots: a disk makes room for them,
    /// since a map of a file without room says only that the address is bad.
    ///
    /// # Errors
    /// There is no room, in words that name the place.
    fn make_room(&mut self, runs: &PageRuns) -> Result<(), String> {
        let _ = runs;
        Ok(())
    }

    /// Whose guest this is now, and what comparers want to know.
    fn notify(&mut self, notify: Notify) {
        let _ = notify;
    }

    /// The guest rang its card, or another state was loaded: what the guest's driver agreed to may
    /// have changed.
    fn card_rang(&mut self) {}
}
