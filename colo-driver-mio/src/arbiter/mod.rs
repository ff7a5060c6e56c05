//! Who says which host owns the VM, as the loop reaches it.
//!
//! * [`mod@file`]: a register on storage that both hosts see
//! * [`none`]: nobody; for demonstrations
//!
//! An arbiter may be slow or gone: asking never waits, and no answer in time is
//! [`Verdict::Unreachable`]. The machine repeats a question under the same id.

pub mod file;
pub mod none;

use colo_proto::{
    member::{Ballot, RequestId, Verdict},
    time::Instant,
};

use crate::Wake;

/// A register with compare-and-swap (spec ownership A1).
pub trait Arbiter: Send {
    /// Called once, before anything else.
    ///
    /// # Errors
    /// When its thread or connection cannot be made.
    fn attach(&mut self, wake: Wake) -> std::io::Result<()>;

    /// Puts a ballot to the register.
    fn cast(&mut self, now: Instant, ballot: Ballot);

    /// Reads the register.
    fn read(&mut self, now: Instant, request: RequestId);

    /// The next answer, without waiting.
    fn poll(&mut self, now: Instant) -> Option<(RequestId, Verdict)>;

    /// When [`poll`](Self::poll) will have something to say even if nobody answers.
    fn deadline(&self) -> Option<Instant>;
}
