//! When a checkpoint is wanted (spec checkpoint 5), on a monotonic clock.

use core::time::Duration;

use crate::{config::Adaptive, event::Cause, status::Mode, time::Instant};

/// Requests, coalesced, with a longest and a shortest interval.
///
/// A request is met by any capture that begins after it, so requests raised while a transaction is
/// still before its capture are absorbed by it, and any number raised after the capture cause
/// exactly one more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pace {
    longest: Duration,
    shortest: Duration,
    adaptive: Option<Adaptive>,
    wanted: Option<Cause>,
    /// Start of the last transaction.
    started: Instant,
    /// Checkpoints in a row for this reason: disagreement in lockstep, any in standby.
    streak: u32,
}

impl Pace {
    pub(crate) const fn new(
        longest: Duration,
        shortest: Duration,
        adaptive: Option<Adaptive>,
        now: Instant,
    ) -> Self {
        Self {
            longest,
            shortest,
            adaptive,
            wanted: None,
            started: now,
            streak: 0,
        }
    }

    /// Asks for a checkpoint. The first reason is the one reported.
    pub(crate) fn want(&mut self, cause: Cause) {
        self.wanted.get_or_insert(cause);
    }

    pub(crate) const fn longest(&self) -> Duration {
        self.longest
    }

    /// A new longest interval; the running one is measured anew from its start.
    pub(crate) fn set_longest(&mut self, longest: Duration) {
        self.longest = longest;
        self.shortest = self.shortest.min(longest);
    }

    /// When the next transaction should begin.
    pub(crate) fn due(&self) -> Instant {
        let wait = if self.wanted.is_some() {
            self.shortest
        } else {
            self.longest
        };
        self.started + wait
    }

    /// A transaction begins now; says why.
    ///
    /// A timer that fires a little late does not push all later ones: the longest interval is
    /// counted from when it was due.
    pub(crate) fn begin(&mut self, now: Instant) -> Cause {
        let due = self.due();
        let on_time = self.wanted.is_none() && now >= due && now.since(due) < self.longest / 2;
        self.started = if on_time { due } else { now };
        self.wanted.unwrap_or(Cause::Longest)
    }

    /// The state is captured: everything asked for so far is met.
    pub(crate) fn captured(&mut self) {
        self.wanted = None;
    }

    /// A transaction ended well; answers the mode to use from the next one on.
    pub(crate) fn ended(&mut self, mode: Mode, cause: Cause) -> Mode {
        let Some(adaptive) = self.adaptive else {
            return mode;
        };
        let disagreed = matches!(cause, Cause::Diverged | Cause::Unanswered);
        self.streak = match mode {
            Mode::Lockstep if !disagreed => 0,
            _ => self.streak.saturating_add(1),
        };
        let (after, other) = match mode {
            Mode::Lockstep => (adaptive.to_standby_after, Mode::Standby),
            Mode::Standby => (adaptive.to_lockstep_after, Mode::Lockstep),
        };
        if self.streak < after {
            return mode;
        }
        self.streak = 0;
        other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_millis(100);
    const SHORT: Duration = Duration::from_millis(10);

    fn at(ms: u64) -> Instant {
        Instant::from_millis(ms)
    }

    #[test]
    fn requests_coalesce_and_keep_their_distance() {
        let mut pace = Pace::new(LONG, SHORT, None, at(0));
        assert_eq!(pace.due(), at(100));
        pace.want(Cause::Diverged);
        pace.want(Cause::Asked);
        assert_eq!(pace.due(), at(10), "the shortest interval holds");
        assert_eq!(pace.begin(at(10)), Cause::Diverged);
        pace.want(Cause::Full);
        pace.captured();
        assert_eq!(pace.due(), at(110), "asked before the capture: absorbed");
        pace.want(Cause::Full);
        pace.want(Cause::Full);
        assert_eq!(pace.due(), at(20), "asked after it: exactly one more");
        pace.begin(at(25));
        pace.captured();
        assert_eq!(pace.due(), at(125));
    }

    #[test]
    fn a_late_timer_does_not_push_the_next_one() {
        let mut pace = Pace::new(LONG, SHORT, None, at(0));
        pace.begin(at(103));
        assert_eq!(pace.due(), at(200));
        pace.begin(at(290));
        assert_eq!(pace.due(), at(390), "too late to catch up");
    }

    #[test]
    fn a_pair_that_never_agrees_stands_by_for_a_while() {
        let adaptive = Adaptive {
            to_standby_after: 2,
            to_lockstep_after: 3,
        };
        let mut pace = Pace::new(LONG, SHORT, Some(adaptive), at(0));
        assert_eq!(pace.ended(Mode::Lockstep, Cause::Diverged), Mode::Lockstep);
        assert_eq!(pace.ended(Mode::Lockstep, Cause::Longest), Mode::Lockstep);
        assert_eq!(pace.ended(Mode::Lockstep, Cause::Diverged), Mode::Lockstep);
        assert_eq!(pace.ended(Mode::Lockstep, Cause::Unanswered), Mode::Standby);
        for _ in 0..2 {
            assert_eq!(pace.ended(Mode::Standby, Cause::Longest), Mode::Standby);
        }
        assert_eq!(pace.ended(Mode::Standby, Cause::Longest), Mode::Lockstep);
    }
}
