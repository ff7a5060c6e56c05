//! Where frames come from and go to, and who says where the VM lives.

use std::{
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use colo_proto::{id::PageRuns, machine::Notify};

use crate::Wake;

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
    /// within 0.8 s after a takeover, for switches and clients that miss the first.
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

/// Pauses before the second and later rounds.
const ROUNDS: [u64; 4] = [50, 150, 250, 350];

/// Whether another round of announcements is due.
///
/// Only a host that owns the VM alone announces. It does until its next capture, which is the first
/// step towards sharing ownership, or until it is told to pause: so no announcement is ever made
/// under a lease, which might have ended unseen.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    /// Whether rounds may be said: the loop's own word, whatever the thread still does.
    active: bool,
    due: Arc<AtomicBool>,
    /// Number of the takeover; rounds of an older one are void.
    takeover: Arc<AtomicU32>,
}

impl Rounds {
    /// The first round is due at once; a thread that ends by itself asks for the others.
    pub(super) fn begin(&mut self, wake: Option<&Wake>) {
        let this = self.takeover.fetch_add(1, Ordering::AcqRel) + 1;
        self.active = true;
        self.due.store(true, Ordering::Release);
        let Some(wake) = wake.cloned() else { return };
        let (due, takeover) = (Arc::clone(&self.due), Arc::clone(&self.takeover));
        let rounds = thread::Builder::new()
            .name("announce".into())
            .spawn(move || {
                for pause in ROUNDS {
                    thread::sleep(Duration::from_millis(pause));
                    if takeover.load(Ordering::Acquire) != this {
                        return;
                    }
                    due.store(true, Ordering::Release);
                    wake.wake();
                }
            });
        if let Err(error) = rounds {
            tracing::warn!(%error, "the address is announced once only");
        }
    }

    /// No further rounds.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.active) {
            self.takeover.fetch_add(1, Ordering::AcqRel);
        }
    }

    pub(super) fn is_due(&self) -> bool {
        self.active && self.due.swap(false, Ordering::AcqRel)
    }
}
