//! The hosts' clocks: they begin anywhere, run a little fast or slow, and may leap ahead.

use colo_proto::{id::Role, machine::Machine, time::Instant};

use crate::world::{Micros, World};

/// How much a clock may err: what the members are configured to bear, in millionths.
const DRIFT: u64 = 1000;
const MILLION: u64 = 1_000_000;

/// A clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// What it shows when the world begins, in nanoseconds.
    base: u64,
    /// Millionths of a second that it shows for each true second.
    rate: u64,
}

impl Clock {
    /// A clock with an error that `chance` decides.
    pub(crate) const fn new(base: u64, chance: u64) -> Self {
        let rate = MILLION - DRIFT + chance % (2 * DRIFT + 1);
        Self { base, rate }
    }

    pub(crate) const fn shows(&self, t: Micros) -> Instant {
        Instant::from_nanos(
            self.base + t * 1000 / MILLION * self.rate + t * 1000 % MILLION * self.rate / MILLION,
        )
    }

    /// When it shows this, or more.
    fn when(&self, at: Instant) -> Micros {
        let nanos = at.as_nanos().saturating_sub(self.base);
        let mut t = nanos / self.rate * 1000 + nanos % self.rate * 1000 / self.rate;
        while self.shows(t) < at {
            t += 1;
        }
        t
    }
}

impl World {
    pub(crate) const fn clock(&self, i: usize) -> Instant {
        self.hosts[i].clock.shows(self.t)
    }

    /// When the host's deadline is due.
    pub(crate) fn timer(&self, i: usize) -> Option<Micros> {
        let host = &self.hosts[i];
        let at = host.process.as_ref()?.node.poll_timeout()?.at;
        if at == Instant::END {
            return None;
        }
        Some(host.clock.when(at).max(host.frozen).max(self.t))
    }

    /// The host's clock leaps ahead.
    pub fn leap(&mut self, i: usize, millis: u64) {
        self.fault("clock leaps", i);
        self.hosts[i].clock.base += millis * 1_000_000;
    }

    /// The clock of an owner leaps ahead: its lease ends early. A partner's must not (spec ownership
    /// 4), at any moment: the end of the owner's lease is counted on it. One that stands
    /// still and goes on late is a `freeze`.
    pub(crate) fn leap_of_an_owner(&mut self, i: usize, millis: u64) {
        if self.role(i) == Some(Role::Primary) {
            self.leap(i, millis);
        }
    }
}
