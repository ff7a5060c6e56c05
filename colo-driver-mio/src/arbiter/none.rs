//! No arbiter: every host is told that it won. For demonstrations.

use std::collections::VecDeque;

use colo_proto::{
    member::{Ballot, Register, RequestId, Verdict},
    time::Instant,
};

use super::Arbiter;
use crate::Wake;

/// Grants whatever is asked for.
///
/// With a cut network **both hosts win and both serve the world**. It says so when it starts and
/// at every grant.
#[derive(Debug, Default)]
pub struct NoArbiter {
    last: Register,
    answers: VecDeque<(RequestId, Verdict)>,
    wake: Option<Wake>,
}

impl NoArbiter {
    /// An arbiter that grants everything.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn answer(&mut self, request: RequestId, verdict: Verdict) {
        self.answers.push_back((request, verdict));
        if let Some(wake) = &self.wake {
            wake.wake();
        }
    }
}

impl Arbiter for NoArbiter {
    fn attach(&mut self, wake: Wake) -> std::io::Result<()> {
        tracing::warn!(
            "NO ARBITER: if the hosts lose sight of each other, both will serve. Configure \
             `arbiter.kind = \"file\"` for anything but a demonstration"
        );
        self.wake = Some(wake);
        Ok(())
    }

    fn cast(&mut self, _now: Instant, ballot: Ballot) {
        self.last = ballot.outcome();
        tracing::warn!(
            generation = self.last.generation.0,
            "NO ARBITER: ownership granted to ourselves without asking anyone"
        );
        self.answer(ballot.request, Verdict::Granted(self.last));
    }

    fn read(&mut self, _now: Instant, request: RequestId) {
        self.answer(request, Verdict::Read(self.last));
    }

    fn poll(&mut self, _now: Instant) -> Option<(RequestId, Verdict)> {
        self.answers.pop_front()
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}
