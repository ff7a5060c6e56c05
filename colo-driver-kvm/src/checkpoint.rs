//! Capture: the machine at one instant, copied aside while it hardly stops. Commit: the other way.
//!
//! ```text
//!   guest runs                          │ stopped                             │ guest runs
//!   ────────────────────────────────────┼─────────────────────────────────────┼──────────
//!   pass 1: take the log, protect       │ kick, join                          │
//!   again, copy to staging; once more   │ quiesce devices                     │
//!   while that shrinks the rest         │ pass 2: take the log, copy what was │
//!                                       │ dirtied since                       │
//!                                       │ state of time, chips, vCPUs,devices │
//!                                       │ `at_stop`                           │ send from staging
//! ```
//!
//! The stop then hardly depends on how much was dirtied since the last checkpoint, only on how much
//! the guest dirties during one short copy. What a page went through, with numbers, is in
//! `docs/memory-path.md`.

use std::time::{Duration, Instant};

use colo_proto::id::{PageRun, PageRuns};
use colo_proto::ram::PageSet;

use crate::memory::iov::for_each_run;
use crate::memory::{Memory, MemoryError, Staging, StagingError};
use crate::vm::{Vm, VmError};

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
/// still is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// Writes are not logged, so nobody knows what to copy.
    #[error("dirty tracking is off: call start_tracking first")]
    NotTracking,
    /// `Passes::None` and `resume` contradict each other.
    #[error("without a copy the guest must stay stopped until its pages are sent: resume later")]
    NoCopy,
    /// The dirty pages do not fit, or cannot be read.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// The state could not be read.
    #[error(transparent)]
    Vm(#[from] VmError),
}

/// The kept buffers of one checkpoint, on either side: staged pages, the set of them, the state.
#[derive(Debug)]
pub struct Checkpoint {
    /// Contents of pages.
    pub staging: Staging,
    /// On the primary: which pages make up the epoch.
    pub dirty: PageSet,
    /// The state sections.
    pub state: Vec<u8>,
}

/// A live round that took fewer pages than this is the last: the stop takes no longer.
const FEW: u32 = 64;
/// Most live rounds: a guest that writes faster than we copy must be stopped some time.
const ROUNDS: u32 = 4;

impl Vm {
    /// Buffers for checkpoints of this machine that stage at most `limit` pages.
    ///
    /// # Errors
    ///
    /// No address space.
    pub fn checkpoint(&self, limit: u32) -> Result<Checkpoint, MemoryError> {
        let shape = self.memory.shape();
        Ok(Checkpoint {
            staging: Staging::new(&shape, limit)?,
            dirty: PageSet::new(&shape),
            state: Vec::with_capacity(64 << 10),
        })
    }

    /// Captures the machine into `into`, which is emptied first.
    ///
    /// `also` are pages to be copied though they are not dirty here: those that the other side
    /// wrote. `at_stop` is called while everything stands still and the state is complete. With
    /// `resume` the guest runs on at once, otherwise it stays stopped. A machine that was paused
    /// before is captured as it is, and stays so unless `resume`.
    ///
    /// Nothing is allocated between the stop and the resume once the buffers have grown to their size.
    ///
    /// # Errors
    ///
    /// [`CaptureError`]; nothing is lost then: the pages are part of the next harvest or capture.
    pub fn capture(
        &mut self,
        into: &mut Checkpoint,
        also: &PageRuns,
        resume: bool,
        passes: Passes,
        at_stop: &mut dyn FnMut(),
    ) -> Result<Captured, CaptureError> {
        if !self.dirty.tracking() {
            return Err(CaptureError::NotTracking);
        }
        if passes == Passes::None && resume {
            return Err(CaptureError::NoCopy);
        }
        into.staging.clear();
        into.dirty.clear();
        self.scratch.clear();
        for run in also {
            self.scratch.insert(*run);
        }
        let was_running = self.running();
        let result = self.capture_into(into, resume, passes, at_stop);
        if result.is_err() {
            self.dirty.owe(&into.dirty);
            self.dirty.owe(&self.scratch);
            if resume && was_running {
                self.resume()?;
            }
        }
        result
    }

    fn capture_into(
        &mut self,
        into: &mut Checkpoint,
        resume: bool,
        passes: Passes,
        at_stop: &mut dyn FnMut(),
    ) -> Result<Captured, CaptureError> {
        let mut captured = Captured::default();
        let begin = Instant::now();
        if passes == Passes::Two && self.running() {
            captured.live_pages = self.live_pass(into)?;
        }
        into.staging.prepare();

        let stop = Instant::now();
        self.pause();
        let paused = Instant::now();
        self.dirty
            .collect(&self.memory, &mut self.scratch)
            .map_err(|source| VmError::System {
                what: "collect dirty pages",
                source,
            })?;
        let collected = Instant::now();
        if passes != Passes::None {
            captured.stopped_pages = stage(&self.memory, &self.scratch, &mut into.staging)?;
        }
        let copied = Instant::now();
        self.save_state(&mut into.state)?;
        at_stop();
        let saved = Instant::now();
        if resume {
            self.resume()?;
        }
        let end = Instant::now();

        into.dirty.union(&self.scratch);
        captured.state_len = into.state.len() as u64;
        captured.times = CaptureTimes {
            pass1: stop - begin,
            kick: paused - stop,
            collect: collected - paused,
            copy: copied - collected,
            save: saved - copied,
            resume: end - saved,
            pause: end - stop,
        };
        Ok(captured)
    }

    /// Copies what is dirty while the guest runs, until little is left or it does not get less.
    fn live_pass(&mut self, into: &mut Checkpoint) -> Result<u32, CaptureError> {
        let mut all = 0;
        let mut before = u32::MAX;
        for _ in 0..ROUNDS {
            self.dirty
                .collect(&self.memory, &mut self.scratch)
                .map_err(|source| VmError::System {
                    what: "collect dirty pages",
                    source,
                })?;
            let round = stage(&self.memory, &self.scratch, &mut into.staging)?;
            into.dirty.union(&self.scratch);
            self.scratch.clear();
            all += round;
            if round <= FEW || round > before / 2 {
                break;
            }
            before = round;
            // The frames that the next round or the stop will need.
            into.staging.prepare();
        }
        Ok(all)
    }

    /// Copies pages aside while the guest runs or stands, for a disk's pages in the first
    /// synchronisation (RAM can be sent from where it is).
    ///
    /// # Errors
    ///
    /// Over the staging area's bound, or pages outside their slot.
    pub fn stage(&self, staging: &mut Staging, runs: &PageRuns) -> Result<(), StagingError> {
        for run in runs {
            stage_run(&self.memory, *run, staging)?;
        }
        Ok(())
    }

    /// Copies received pages from `staging` into the machine, which is paused first. They do not
    /// count as dirty here.
    ///
    /// # Errors
    ///
    /// A page that is not staged or not in its slot. All are looked for before the first is copied;
    /// only a disk's file can still refuse in the middle.
    pub fn commit_ram(&mut self, staging: &Staging, runs: &PageRuns) -> Result<(), StagingError> {
        self.pause();
        for run in runs {
            self.memory.slot_of(run)?;
            staging.spans(*run, |_, _| Ok(()))?;
        }
        for run in runs {
            let slot = self.memory.slot_of(run)?;
            staging.spans(*run, |first, span| Ok(slot.write(first, span)?))?;
        }
        Ok(())
    }
}

/// Copies every page of `set` to `staging`. Returns how many.
fn stage(memory: &Memory, set: &PageSet, staging: &mut Staging) -> Result<u32, StagingError> {
    let mut count = 0u32;
    for slot in memory.slots() {
        let words = set.words(slot.slot).unwrap_or_default();
        for_each_run(words, |first, pages| {
            count = count.saturating_add(pages);
            let Some(pages) = std::num::NonZeroU32::new(pages) else {
                return Ok(());
            };
            let run = PageRun {
                slot: slot.slot,
                first,
                pages,
            };
            staging.claim(run, |first, span| Ok(slot.read(first, span)?))
        })?;
    }
    Ok(count)
}

fn stage_run(memory: &Memory, run: PageRun, staging: &mut Staging) -> Result<(), StagingError> {
    let slot = memory.slot_of(&run)?;
    staging.claim(run, |first, span| Ok(slot.read(first, span)?))
}
