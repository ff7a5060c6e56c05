//! Checkpoints of our own machine: [`crate::capture`] over its slots and its log.

use colo_proto::id::PageRuns;
use colo_proto::ram::PageSet;

use crate::capture::{self, MemoryError, Staging, StagingError};
pub use crate::capture::{CaptureTimes, Captured, Checkpoint, Passes};
use crate::state::StateError;
use crate::vm::{LoadStateError, Vm, VmError};

/// Why a call on the machine failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// Writes are not logged, so nobody knows what to copy.
    #[error("dirty tracking is off: call start_tracking first")]
    NotTracking,
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A state that it will not take.
    #[error(transparent)]
    Refused(#[from] StateError),
    /// A state that it did not take.
    #[error(transparent)]
    Load(#[from] LoadStateError),
}

/// Why a capture of the machine failed.
pub type CaptureError = capture::CaptureError<MachineError>;

impl capture::Vm for Vm {
    type Error = MachineError;

    fn pause(&mut self) -> Result<(), MachineError> {
        Self::pause(self);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(Self::resume(self)?)
    }

    fn running(&self) -> bool {
        Self::running(self)
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), MachineError> {
        if !self.dirty.tracking() {
            return Err(MachineError::NotTracking);
        }
        Ok(Self::harvest(self, dirty)?)
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        Ok(self.save_state(state)?)
    }

    fn check(&mut self, state: &[u8]) -> Result<(), MachineError> {
        Ok(self.check_state(state)?)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        Ok(self.load_state(state)?)
    }
}

impl Vm {
    /// Buffers for checkpoints of this machine that stage at most `limit` pages.
    ///
    /// # Errors
    ///
    /// No address space.
    pub fn checkpoint(&self, limit: u32) -> Result<Checkpoint, MemoryError> {
        Checkpoint::new(&self.memory.shape(), limit)
    }

    /// [`Checkpoint::capture`] of this machine; what a failure owes is owed by the machine, whatever
    /// buffers the next capture uses.
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
            return Err(CaptureError::Vm(MachineError::NotTracking));
        }
        let memory = self.memory.clone();
        let captured = into.capture(self, &memory, also, resume, passes, at_stop);
        if captured.is_err() {
            self.dirty.owe(into.owed());
            into.owed().clear();
        }
        captured
    }

    /// Copies pages aside while the guest runs or stands, for a disk's pages in the first
    /// synchronisation (RAM can be sent from where it is).
    ///
    /// # Errors
    ///
    /// Over the staging area's bound, or pages outside their slot.
    pub fn stage(&self, staging: &mut Staging, runs: &PageRuns) -> Result<(), StagingError> {
        for run in runs {
            staging.stage(&self.memory, *run)?;
        }
        Ok(())
    }

    /// [`capture::commit`] into this machine, which is paused first.
    ///
    /// # Errors
    ///
    /// A page that is not staged or not in its slot. All are looked for before the first is copied;
    /// only a disk's file can still refuse in the middle.
    pub fn commit_ram(&mut self, staging: &Staging, runs: &PageRuns) -> Result<(), StagingError> {
        self.pause();
        capture::commit(staging, &self.memory, runs)
    }
}
