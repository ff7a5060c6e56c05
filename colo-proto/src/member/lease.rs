//! The owner's side of a lease: which rounds were sent when, and until when the gate may be open.

use alloc::collections::VecDeque;
use core::time::Duration;

use crate::time::Instant;

/// Rounds in flight. Everything older than the lease is forgotten, so the length is bounded by
/// lease ÷ interval, which the configuration bounds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(super) struct Lease {
    sent: VecDeque<(u64, Instant)>,
    /// Highest own number known to be acknowledged.
    pub(super) acked: u64,
}

impl Lease {
    /// Notes that round `seq` leaves now.
    pub(super) fn sent(&mut self, seq: u64, now: Instant, lease: Duration) {
        while self.sent.front().is_some_and(|&(_, at)| at + lease <= now) {
            self.sent.pop_front();
        }
        self.sent.push_back((seq, now));
    }

    /// An acknowledgement of `seq` arrived: until when the gate may be open by it. `None` if the
    /// round was never sent, or so long ago that it proves nothing.
    pub(super) fn acknowledge(
        &mut self,
        seq: u64,
        now: Instant,
        lease: Duration,
    ) -> Option<Instant> {
        let &(_, at) = self.sent.iter().find(|&&(s, _)| s == seq)?;
        if at + lease <= now {
            return None;
        }
        self.acked = self.acked.max(seq);
        Some(at + lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const L: Duration = Duration::from_millis(100);

    fn at(ms: u64) -> Instant {
        Instant::from_millis(ms)
    }

    #[test]
    fn the_lease_counts_from_sending_not_from_hearing() {
        let mut lease = Lease::default();
        lease.sent(1, at(0), L);
        lease.sent(2, at(40), L);
        assert_eq!(lease.acknowledge(1, at(99), L), Some(at(100)));
        assert_eq!(lease.acknowledge(1, at(100), L), None, "too late");
        assert_eq!(lease.acknowledge(2, at(100), L), Some(at(140)));
        assert_eq!(lease.acknowledge(3, at(100), L), None, "never sent");
        assert_eq!(lease.acked, 2);
    }

    #[test]
    fn old_rounds_are_forgotten() {
        let mut lease = Lease::default();
        for seq in 0..1000 {
            lease.sent(seq, at(seq * 10), L);
        }
        assert_eq!(lease.sent.len(), 10);
    }
}
