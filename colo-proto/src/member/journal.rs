//! What this node has promised, and how much of it is durable.
//!
//! A record that can no longer be written is noticed before it is needed: the same record is
//! written again every now and then, and a write that takes too long makes this node unready.

use core::time::Duration;

use super::{Claim, PersistId, Record};
use crate::{id::Generation, time::Instant};

/// The record and its writes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Journal {
    /// The record as last handed out, and what has been seen since.
    pub(super) record: Record,
    written: PersistId,
    durable: PersistId,
    /// Since when a write is under way.
    since: Option<Instant>,
    /// When the record is written again if nothing else is.
    next: Instant,
}

impl Journal {
    pub(super) const fn new(record: Record, now: Instant) -> Self {
        Self {
            record,
            written: PersistId(0),
            durable: PersistId(0),
            since: None,
            next: now,
        }
    }

    /// A write of the record with this claim: its name, and what is to be written.
    pub(super) fn write(
        &mut self,
        now: Instant,
        claim: Claim,
        generation: Generation,
    ) -> (PersistId, Record) {
        self.record.claim = claim;
        self.record.generation = generation;
        self.again(now)
    }

    /// A write of the record as it is.
    pub(super) fn again(&mut self, now: Instant) -> (PersistId, Record) {
        self.written = PersistId(self.written.0.saturating_add(1));
        self.since.get_or_insert(now);
        (self.written, self.record)
    }

    /// Whether it is time to write the record again, only to see whether it can be written.
    pub(super) fn probes(&mut self, now: Instant, period: Duration) -> bool {
        let due = now >= self.next && self.since.is_none() && self.record.claim != Claim::None;
        if due {
            self.next = now + period;
        }
        due
    }

    /// Write `id`, and with it every earlier one, is durable.
    pub(super) fn done(&mut self, now: Instant, id: PersistId) {
        if id <= self.durable {
            return;
        }
        self.durable = id.min(self.written);
        // Writes take effect in order: one that ended shows that the next one moves.
        self.since = (self.durable < self.written).then_some(now);
    }

    /// The last write; what waits for it waits for all that was handed out.
    pub(super) const fn last(&self) -> PersistId {
        self.written
    }

    pub(super) fn is_durable(&self, id: PersistId) -> bool {
        self.durable >= id
    }

    /// Whether writes end in time.
    pub(super) fn is_well(&self, now: Instant, limit: Duration) -> bool {
        self.since.is_none_or(|since| now.since(since) < limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_millis(100);

    #[test]
    fn a_record_that_is_not_written_in_time_is_noticed_by_a_write_that_nobody_needed() {
        let at = Instant::from_millis;
        let record = Record {
            claim: Claim::Solo,
            ..Record::default()
        };
        let mut journal = Journal::new(record, at(0));
        assert!(journal.probes(at(0), PERIOD));
        let (first, _) = journal.again(at(0));
        assert!(!journal.probes(at(500), PERIOD), "one is under way");
        assert!(journal.is_well(at(99), PERIOD));
        assert!(!journal.is_well(at(100), PERIOD));
        journal.done(at(120), first);
        assert!(journal.is_well(at(120), PERIOD), "it was only slow");
        assert!(journal.is_durable(first));
    }

    #[test]
    fn a_write_that_ends_gives_the_next_one_its_own_time() {
        let at = Instant::from_millis;
        let mut journal = Journal::new(Record::default(), at(0));
        let (first, _) = journal.write(at(0), Claim::Solo, Generation(1));
        let (second, _) = journal.write(at(50), Claim::Solo, Generation(2));
        journal.done(at(90), first);
        assert!(journal.is_well(at(150), PERIOD));
        assert!(!journal.is_durable(second));
        journal.done(at(160), second);
        assert!(journal.is_durable(second));
    }
}
