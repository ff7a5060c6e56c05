//! What only the VMM can do.

use std::fmt;

use colo_proto::machine::ReplicationOp;
use colo_proto::ram::PageSet;

/// A virtual machine, as checkpoints need it. All calls come from one thread, the VMM's own.
///
/// The slots of a [`PageSet`] are those of the VMM's [`Pages`](super::Pages).
pub trait Vm {
    /// Why a call failed, for a person.
    type Error: fmt::Debug + fmt::Display;

    /// Stops the vCPUs, then the devices, and flushes disks. When it returns nothing writes guest
    /// memory and no frame leaves the card, until [`resume`](Self::resume). Doing it again is
    /// harmless.
    ///
    /// # Errors
    /// When it cannot be stopped.
    fn pause(&mut self) -> Result<(), Self::Error>;

    /// Runs: from the state that was loaded, from where it was paused, or from its boot, the first
    /// time. Devices look into their queues again: notifications may be lost at a stop.
    ///
    /// # Errors
    /// When it cannot run.
    fn resume(&mut self) -> Result<(), Self::Error>;

    /// Whether it runs.
    fn running(&self) -> bool;

    /// Joins every page written since the last call into `dirty`: by vCPUs and by devices. The
    /// first call gives every page, because nobody knows what was written before; logging is
    /// switched on there at the latest. Pages are read *after* this call, so that a write in
    /// between is found the next time.
    ///
    /// # Errors
    /// When the log cannot be read.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), Self::Error>;

    /// Appends all state but the slots to `state`; it is paused. It may still write guest memory.
    ///
    /// # Errors
    /// When it cannot be read.
    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), Self::Error>;

    /// Whether [`load`](Self::load) would take this state. Changes nothing.
    ///
    /// # Errors
    /// What is wrong with it.
    fn check(&mut self, state: &[u8]) -> Result<(), Self::Error>;

    /// Makes the machine what `state` says. Memory is in place and the machine is paused; it may
    /// have run, and may have been loaded before. The next [`resume`](Self::resume) runs it.
    ///
    /// # Errors
    /// When it could not be loaded; the machine is a mixture then and is not resumed.
    fn load(&mut self, state: &[u8]) -> Result<(), Self::Error>;

    /// What the pair does, for disks that are replicated. When the end of protection
    /// ([`ReplicationOp::Stop`]) returns, what was written to them is durable: the guest that goes on
    /// here has been told so at the other host.
    ///
    /// # Errors
    /// A disk failed.
    fn replicate(&mut self, op: ReplicationOp) -> Result<(), Self::Error> {
        let _ = op;
        Ok(())
    }
}
