//! The machine at one instant, copied aside while it hardly stops.
//!
//! ```text
//!   guest runs                          │ stopped                             │ guest runs
//!   ────────────────────────────────────┼─────────────────────────────────────┼──────────
//!   pass 1: take the log, protect       │ pause vCPUs, then devices           │
//!   again, copy to staging; once more   │ state of all that is not memory     │
//!   while that shrinks the rest         │ pass 2: take the log, copy what was │
//!                                       │ dirtied since                       │
//!                                       │ `at_stop`                           │ send from staging
//! ```
//!
//! The stop then hardly depends on how much was dirtied since the last checkpoint, only on how much
//! the guest dirties during one short copy. The state comes before the log is taken the last time, because
//! reading it may write guest memory (KVM and devices flush what they cached). What a page went through, with numbers, is in
//! `docs/memory-path.md`.

use std::time::{Duration, Instant};

use colo_proto::id::{PageRun, PageRuns, Slot};
use colo_proto::ram::PageSet;

use super::{MemoryError, Pages, Staging, StagingError, Vm, for_each_run};

/// How dirty pages are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Passes {
    /// Not at all: the VM stays stopped and its pages are sent from RAM. Needs no staging, for an
    /// epoch that is larger than the staging area and for peers that want it so.
    None,
    /// All while stopped.
    One,
    /// Most while the guest runs, the rest while stopped.
    #[default]
    Two,
}

/// Where the time of a capture went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CaptureTimes {
    /// Copying while the guest ran.
    pub pass1: Duration,
    /// From the decision to stop until no vCPU runs and no device has a transfer in flight.
    pub kick: Duration,
    /// Taking the log while stopped.
    pub collect: Duration,
    /// Copying while stopped.
    pub copy: Duration,
    /// State of everything that is not memory, and `at_stop`.
    pub save: Duration,
    /// From there until all vCPUs are about to enter the guest; zero if it was not resumed.
    pub resume: Duration,
    /// From the decision to stop until all run again (or until the capture was whole).
    pub pause: Duration,
}

/// What a capture took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Captured {
    /// Bytes of state.
    pub state_len: u64,
    /// Page copies made while the guest ran.
    pub live_pages: u32,
    /// Pages copied while it was stopped.
    pub stopped_pages: u32,
    /// Where the time went.
    pub times: CaptureTimes,
}

/// Why a capture failed. The machine runs on if it ran (and was to be resumed), and what was dirty
/// is owed: it is part of the next one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError<E> {
    /// `Passes::None` and `resume` contradict each other.
    #[error("without a copy the guest must stay stopped until its pages are sent: resume later")]
    NoCopy,
    /// The dirty pages do not fit, or cannot be read.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A call of the VMM failed.
    #[error("{0}")]
    Vm(E),
}

/// The kept buffers of one checkpoint, on either side: staged pages, the set of them, the state.
#[derive(Debug)]
pub struct Checkpoint {
    /// Contents of pages.
    pub staging: Staging,
    /// On the primary: which pages make up the epoch, or what [`harvest`](Self::harvest) found.
    pub dirty: PageSet,
    /// The state.
    pub state: Vec<u8>,
    /// What was harvested and not copied yet.
    fresh: PageSet,
    /// Harvested and not delivered: a capture failed.
    owed: PageSet,
}

/// A live round that took fewer pages than this is the last: the stop takes no longer.
const FEW: u32 = 64;
/// Most live rounds: a guest that writes faster than we copy must be stopped some time.
const ROUNDS: u32 = 4;

impl Checkpoint {
    /// Buffers for checkpoints of slots of these sizes in pages, that stage at most `limit` pages.
    ///
    /// # Errors
    ///
    /// No address space.
    pub fn new(shape: &[(Slot, u64)], limit: u32) -> Result<Self, MemoryError> {
        Ok(Self {
            staging: Staging::new(shape, limit)?,
            dirty: PageSet::new(shape),
            state: Vec::with_capacity(64 << 10),
            fresh: PageSet::new(shape),
            owed: PageSet::new(shape),
        })
    }

    /// Every page written since the last harvest or capture is in [`dirty`](Self::dirty) afterwards.
    ///
    /// # Errors
    ///
    /// What the log said; nothing is lost.
    pub fn harvest<V: Vm>(&mut self, vm: &mut V) -> Result<(), V::Error> {
        self.dirty.clear();
        let harvested = vm.harvest(&mut self.owed);
        if harvested.is_ok() {
            std::mem::swap(&mut self.dirty, &mut self.owed);
        }
        harvested
    }

    /// What a failed capture owes, for a VM that keeps such pages itself.
    pub fn owed(&mut self) -> &mut PageSet {
        &mut self.owed
    }

    /// Captures the machine into these buffers, which are emptied first.
    ///
    /// `also` are pages to be copied though they are not dirty here: those that the other side
    /// wrote. `at_stop` is called while everything stands still and all is copied. With `resume`
    /// the guest runs on at once, otherwise it stays stopped. A machine that was paused before is
    /// captured as it is, and stays so unless `resume`.
    ///
    /// Nothing is allocated between the stop and the resume once the buffers have grown to their
    /// size.
    ///
    /// # Errors
    ///
    /// [`CaptureError`]; nothing is lost then: the pages are part of the next harvest or capture.
    pub fn capture<V: Vm>(
        &mut self,
        vm: &mut V,
        pages: &impl Pages,
        also: &PageRuns,
        resume: bool,
        passes: Passes,
        at_stop: &mut dyn FnMut(),
    ) -> Result<Captured, CaptureError<V::Error>> {
        if passes == Passes::None && resume {
            return Err(CaptureError::NoCopy);
        }
        self.staging.clear();
        self.dirty.clear();
        self.fresh.clear();
        std::mem::swap(&mut self.fresh, &mut self.owed);
        for run in also {
            self.fresh.insert(*run);
        }
        let was_running = vm.running();
        let result = self.run(vm, pages, resume, passes, at_stop);
        if result.is_err() {
            self.owed.union(&self.dirty);
            self.owed.union(&self.fresh);
            if resume && was_running && !vm.running() {
                vm.resume().map_err(CaptureError::Vm)?;
            }
        }
        result
    }

    fn run<V: Vm>(
        &mut self,
        vm: &mut V,
        pages: &impl Pages,
        resume: bool,
        passes: Passes,
        at_stop: &mut dyn FnMut(),
    ) -> Result<Captured, CaptureError<V::Error>> {
        let mut captured = Captured::default();
        let begin = Instant::now();
        if passes == Passes::Two && vm.running() {
            captured.live_pages = self.live_pass(vm, pages)?;
        }
        self.staging.prepare();

        let stop = Instant::now();
        vm.pause().map_err(CaptureError::Vm)?;
        let paused = Instant::now();
        self.state.clear();
        vm.save(&mut self.state).map_err(CaptureError::Vm)?;
        let saved = Instant::now();
        vm.harvest(&mut self.fresh).map_err(CaptureError::Vm)?;
        let collected = Instant::now();
        if passes != Passes::None {
            captured.stopped_pages = stage(pages, &self.fresh, &mut self.staging)?;
        }
        at_stop();
        let copied = Instant::now();
        if resume {
            vm.resume().map_err(CaptureError::Vm)?;
        }
        let end = Instant::now();

        self.dirty.union(&self.fresh);
        captured.state_len = self.state.len() as u64;
        captured.times = CaptureTimes {
            pass1: stop - begin,
            kick: paused - stop,
            save: saved - paused,
            collect: collected - saved,
            copy: copied - collected,
            resume: end - copied,
            pause: end - stop,
        };
        Ok(captured)
    }

    /// Copies what is dirty while the guest runs, until little is left or it does not get less.
    fn live_pass<V: Vm>(
        &mut self,
        vm: &mut V,
        pages: &impl Pages,
    ) -> Result<u32, CaptureError<V::Error>> {
        let mut all = 0;
        let mut before = u32::MAX;
        for _ in 0..ROUNDS {
            vm.harvest(&mut self.fresh).map_err(CaptureError::Vm)?;
            let round = stage(pages, &self.fresh, &mut self.staging)?;
            self.dirty.union(&self.fresh);
            self.fresh.clear();
            all += round;
            if round <= FEW || round > before / 2 {
                break;
            }
            before = round;
            // The frames that the next round or the stop will need.
            self.staging.prepare();
        }
        Ok(all)
    }
}

/// Copies every page of `set` to `staging`. Returns how many.
fn stage(pages: &impl Pages, set: &PageSet, staging: &mut Staging) -> Result<u32, StagingError> {
    let mut count = 0u32;
    for (slot, _) in set.slots() {
        let words = set.words(slot).unwrap_or_default();
        for_each_run(words, |first, run| {
            count = count.saturating_add(run);
            let Some(run) = std::num::NonZeroU32::new(run) else {
                return Ok(());
            };
            let run = PageRun {
                slot,
                first,
                pages: run,
            };
            staging.stage(pages, run)
        })?;
    }
    Ok(count)
}
