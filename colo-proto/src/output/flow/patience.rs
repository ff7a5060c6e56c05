//! How long a frame may wait for the other guest to say the same.

use core::time::Duration;

use crate::time::Instant;

/// How fast the other guest has followed in one flow: as RFC 6298 estimates a round trip.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Latency {
    /// Smoothed, and how far from it; microseconds. `None` before the first.
    micros: Option<(u64, u64)>,
}

impl Latency {
    pub(super) fn took(&mut self, waited: Duration) {
        let now = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX / 16);
        let now = now.min(u64::MAX / 16);
        self.micros = Some(match self.micros {
            None => (now, now / 2),
            Some((smooth, var)) => ((7 * smooth + now) / 8, (3 * var + smooth.abs_diff(now)) / 4),
        });
    }

    /// Four times the smoothed latency, more where it varies; within the bounds.
    pub(super) fn patience(&self, soonest: Duration, latest: Duration) -> Duration {
        let Some((smooth, var)) = self.micros else {
            return latest;
        };
        let wanted = smooth.saturating_add(4 * var).max(4 * smooth);
        Duration::from_micros(wanted).clamp(soonest.min(latest), latest)
    }

    /// When a frame that came at `since` has waited too long.
    pub(super) fn due(&self, since: Instant, soonest: Duration, latest: Duration) -> Instant {
        since + self.patience(soonest, latest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_follows_the_other_guest_within_its_bounds() {
        let ms = Duration::from_millis;
        let mut latency = Latency::default();
        let patience = |l: &Latency| l.patience(ms(10), ms(100));
        assert_eq!(patience(&latency), ms(100), "nothing is known");
        for _ in 0..50 {
            latency.took(Duration::from_micros(200));
        }
        assert_eq!(patience(&latency), ms(10));
        for _ in 0..50 {
            latency.took(ms(8));
        }
        assert!((ms(31)..ms(50)).contains(&patience(&latency)));
        latency.took(ms(60_000));
        assert_eq!(patience(&latency), ms(100));
    }
}
