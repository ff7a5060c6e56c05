//! The VMM's end: what the loop wants of the machine, carried out on the thread that owns it.

use std::{
    fmt,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender},
    },
};

use colo_driver_kvm::capture::{Checkpoint, Pages, Passes, Vm, commit};
use colo_proto::{
    id::{Epoch, PageRuns},
    machine::{Captured, GuestDone, GuestOp},
    ram::PageSet,
};

use super::card::{Port, drain};
use crate::{Wake, guest::Happened};

/// Buffers of one checkpoint, shared with the loop, which points the kernel at them.
pub(super) type Kept = Arc<Mutex<Checkpoint>>;

/// Operations for the VMM's thread, one by one. That thread waits for
/// [`descriptor`](Self::descriptor) beside whatever else it waits for, and calls
/// [`serve`](Self::serve).
pub struct Orders<P> {
    pub(super) pages: P,
    pub(super) port: Arc<dyn Port>,
    pub(super) outgoing: Kept,
    pub(super) incoming: Kept,
    pub(super) inbox: Receiver<GuestOp>,
    pub(super) bell: Arc<OwnedFd>,
    pub(super) outbox: Sender<Happened>,
    pub(super) woken: Receiver<Wake>,
    pub(super) wake: Option<Wake>,
    /// Stamp of the frames that are said now.
    pub(super) stamp: Epoch,
    /// The log was read at least once.
    pub(super) tracking: bool,
}

impl<P: Pages> Orders<P> {
    /// Readable when there is something to [`serve`](Self::serve).
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Carries out what the loop has asked for. `false` when the loop has ended and asks for nothing
    /// any more.
    pub fn serve<V: Vm>(&mut self, vm: &mut V) -> bool {
        drain(&self.bell);
        loop {
            match self.inbox.try_recv() {
                Ok(op) => {
                    let kind = op.kind();
                    let done = self
                        .run(vm, op)
                        .unwrap_or_else(|why| GuestDone::Failed { op: kind, why });
                    self.tell(Happened::Done(done));
                    self.wake();
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => return true,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn tell(&self, happened: Happened) {
        // The loop has ended: so will this thread.
        let _gone = self.outbox.send(happened);
    }

    fn wake(&mut self) {
        if self.wake.is_none() {
            self.wake = self.woken.try_recv().ok();
        }
        self.wake.iter().for_each(Wake::wake);
    }

    fn run<V: Vm>(&mut self, vm: &mut V, op: GuestOp) -> Result<GuestDone, String> {
        let done = op.done();
        match op {
            GuestOp::Pause => vm.pause().map_err(text)?,
            GuestOp::Resume => vm.resume().map_err(text)?,
            GuestOp::Harvest => {
                let kept = Arc::clone(&self.outgoing);
                let mut kept = lock(&kept);
                kept.harvest(vm).map_err(text)?;
                self.tracking = true;
                self.tell_dirty(&kept.dirty);
            }
            GuestOp::Capture {
                epoch,
                also,
                resume,
            } => return self.capture(vm, epoch, &also, resume),
            GuestOp::CheckState(_) => vm.check(&lock(&self.incoming).state).map_err(text)?,
            GuestOp::CommitRam { runs, .. } => {
                vm.pause().map_err(text)?;
                let mut kept = lock(&self.incoming);
                commit(&kept.staging, &self.pages, &runs).map_err(text)?;
                kept.staging.clear();
            }
            GuestOp::LoadState { epoch, inputs } => {
                vm.pause().map_err(text)?;
                vm.load(&lock(&self.incoming).state).map_err(text)?;
                self.port.replace(epoch, inputs);
                self.stamp = epoch;
                if !self.tracking {
                    // From here on every page that this side writes is known; all others are the
                    // primary's.
                    lock(&self.outgoing).harvest(vm).map_err(text)?;
                    self.tracking = true;
                }
            }
            GuestOp::Replication(op) => vm.replicate(op).map_err(text)?,
            other => return Err(format!("{other:?} is not known here")),
        }
        Ok(done)
    }

    fn capture<V: Vm>(
        &mut self,
        vm: &mut V,
        epoch: Epoch,
        also: &PageRuns,
        resume: bool,
    ) -> Result<GuestDone, String> {
        let kept = Arc::clone(&self.outgoing);
        let mut kept = lock(&kept);
        self.tracking = true;
        let (port, mut inputs) = (&self.port, 0);
        let captured = kept.capture(vm, &self.pages, also, resume, Passes::Two, &mut || {
            inputs = port.cut(epoch);
        });
        let captured = captured.map_err(|error| {
            // What the guest says now is said before any capture that the loop hears of.
            self.port.cut(self.stamp);
            error.to_string()
        })?;
        self.stamp = epoch;
        self.tell_dirty(&kept.dirty);
        Ok(GuestDone::Captured(Captured {
            epoch,
            state_len: captured.state_len,
            inputs,
            pause: captured.times.pause,
            live: captured.times.pass1,
        }))
    }

    fn tell_dirty(&self, set: &PageSet) {
        for (slot, _) in set.slots() {
            if let Some(words) = set.words(slot) {
                self.tell(Happened::Dirty(slot, words.to_vec()));
            }
        }
    }
}

impl<P> fmt::Debug for Orders<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Orders")
            .field("stamp", &self.stamp)
            .finish_non_exhaustive()
    }
}

pub(super) fn lock<T: ?Sized>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}
