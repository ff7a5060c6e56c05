//! Whether a flow is worth comparing.
//!
//! A flow that diverged in three compared epochs, with none between them in which it agreed, is held
//! to the next checkpoint without being compared: for 4 epochs in which it speaks, then 8, and so
//! on up to 4,096, with one trial between them. An epoch in which it agrees makes good one in which
//! it diverged.
//!
//! **Bound.** Say a divergence costs *d* (a checkpoint of its own) and a held epoch *h* ≤ *d* (its
//! output waits for the checkpoint that comes anyway). Then a flow that always agrees, always
//! diverges, or changes from one to the other once, costs at most twice what the better of "always
//! compare" and "always hold" costs, and a constant: 3 + log₂(*d*/*h*) + 2 divergences.
//!
//! *Always diverges, n epochs*: every epoch costs *h* or is one of 3 + *k* trials, where 4·(2ᵏ − 1) < *n*.
//! Always holding costs *nh*. *k* trials cost *kd* ≤ *nh* once 2ᵏ ≥ *k*·*d*/4*h*; the fewer before are the
//! constant. *Changes to agreeing*: it is held for at most twice as long as it has diverged, at *h* ≤ *d*
//! an epoch, and always comparing paid *d* for each of those.

const FAILURES: u8 = 3;
const FIRST_HOLD: u16 = 4;
const LONGEST_HOLD: u16 = 4096;

/// What one flow has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct FlowPace {
    failures: u8,
    /// Epochs still to be held.
    left: u16,
    /// How long it was held last.
    length: u16,
}

/// How a flow ended an epoch in which it spoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Both guests said the same.
    Agreed,
    /// They did not.
    Diverged,
    /// Neither is known.
    Open,
}

impl FlowPace {
    pub(crate) const fn compares(self) -> bool {
        self.left == 0
    }

    /// An epoch ends in which the flow spoke.
    pub(crate) fn ended(&mut self, how: Ended) {
        if self.left > 0 {
            self.left -= 1;
            return;
        }
        match how {
            Ended::Open => {}
            Ended::Agreed => {
                self.failures = self.failures.saturating_sub(1);
                if self.failures == 0 {
                    self.length = 0;
                }
            }
            Ended::Diverged => {
                self.failures = (self.failures + 1).min(FAILURES);
                if self.failures == FAILURES {
                    self.length = (self.length * 2).clamp(FIRST_HOLD, LONGEST_HOLD);
                    self.left = self.length;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_costs_at_most_twice_the_better_fixed_choice_and_a_constant(
            first in any::<bool>(), before in 0u32..3000, after in 0u32..3000,
            ratio in 1u32..=64,
        ) {
            let (h, d) = (1, ratio);
            let (mut pace, mut cost, mut compare) = (FlowPace::default(), 0, 0);
            for n in 0..before + after {
                let agrees = first == (n < before);
                compare += if agrees { 0 } else { d };
                let (held, how) = match (pace.compares(), agrees) {
                    (false, _) => (h, Ended::Open),
                    (true, true) => (0, Ended::Agreed),
                    (true, false) => (d, Ended::Diverged),
                };
                cost += held;
                pace.ended(how);
            }
            let best = compare.min(h * (before + after));
            let constant = d * (5 + ratio.ilog2());
            prop_assert!(cost <= 2 * best + constant, "{cost} against {best}, d/h = {ratio}");
        }
    }

    #[test]
    fn trials_come_at_growing_distance_and_one_that_agrees_ends_them() {
        let mut pace = FlowPace::default();
        let mut trials = alloc::vec::Vec::new();
        for n in 0..100 {
            if pace.compares() {
                trials.push(n);
            }
            pace.ended(Ended::Diverged);
        }
        assert_eq!(trials, [0, 1, 2, 7, 16, 33, 66]);
        while !pace.compares() {
            pace.ended(Ended::Open);
        }
        for _ in 0..9 {
            pace.ended(Ended::Agreed);
            assert!(pace.compares());
        }
    }
}
