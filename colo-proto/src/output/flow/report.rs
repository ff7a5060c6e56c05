//! What the other host must know of a connection before a segment of it may leave: else, after a
//! takeover, its guest could not be translated.

use super::{CLOCK_AHEAD, after, flag, stream::Stream};
use crate::{
    id::Epoch,
    output::packet::{FlowKey, Segment},
};

/// Numbers that this host's guest chose, or the bound of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Report {
    /// The conversation.
    pub flow: FlowKey,
    /// Since which checkpoint.
    pub epoch: Epoch,
    /// How often the guest has opened it since the checkpoint, this time included.
    pub opened: u32,
    /// Its initial sequence number, if it was opened just now.
    pub isn: Option<u32>,
    /// The timestamp that it opened it with.
    pub stamp: Option<u32>,
    /// No timestamp that leaves without another report is after this.
    pub clock: Option<u32>,
}

impl Report {
    /// Bytes of a report: the epoch travels in the head.
    pub const BYTES: usize = FlowKey::BYTES + 17;

    /// What of a segment has to be reported, if anything. Called before the segment is taken.
    pub(super) fn new(
        flow: FlowKey,
        epoch: Epoch,
        stream: &Stream,
        clock: &mut Option<u32>,
        segment: &Segment,
    ) -> Option<Self> {
        let opens = segment.has(flag::SYN) && stream.ours.isn != Some(segment.seq);
        let stamp = segment.options.timestamp.map(|stamp| stamp.value);
        if opens {
            *clock = None;
        }
        let ahead = stamp.filter(|stamp| clock.is_none_or(|known| after(*stamp, known)));
        if let Some(stamp) = ahead {
            *clock = Some(stamp.wrapping_add(CLOCK_AHEAD));
        }
        if !opens && ahead.is_none() {
            return None;
        }
        Some(Self {
            flow,
            epoch,
            opened: stream.ours.opened.wrapping_add(u32::from(opens)),
            isn: opens.then_some(segment.seq),
            stamp: stamp.filter(|_| opens),
            clock: ahead.and(*clock),
        })
    }

    /// The report as bytes, without its epoch.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        let options = [self.isn, self.stamp, self.clock];
        let known = options.iter().zip([1u8, 2, 4]);
        let flags = known.fold(0, |flags, (option, bit)| {
            flags | if option.is_some() { bit } else { 0 }
        });
        let numbers = options.map(Option::unwrap_or_default);
        let fields = self
            .flow
            .to_bytes()
            .into_iter()
            .chain([flags])
            .chain(self.opened.to_le_bytes())
            .chain(numbers.into_iter().flat_map(u32::to_le_bytes));
        out.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        out
    }

    /// The report that these bytes are. Unknown flags are ignored.
    #[must_use]
    pub fn from_bytes(epoch: Epoch, bytes: &[u8; Self::BYTES]) -> Self {
        let (key, rest) = bytes.split_at(FlowKey::BYTES);
        let mut flow = [0; FlowKey::BYTES];
        flow.copy_from_slice(key);
        let (flags, numbers) = rest.split_at(1);
        let flags = flags.first().copied().unwrap_or(0);
        let mut words = numbers.chunks(4).map(|word| {
            word.iter()
                .rev()
                .fold(0u32, |value, byte| value << 8 | u32::from(*byte))
        });
        let mut next = || words.next().unwrap_or(0);
        let opened = next();
        let mut option = |bit| Some(next()).filter(|_| flags & bit != 0);
        Self {
            flow: FlowKey::from_bytes(&flow),
            epoch,
            opened,
            isn: option(1),
            stamp: option(2),
            clock: option(4),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_report_comes_back_from_its_bytes(
            key: [u8; FlowKey::BYTES], opened: u32,
            isn: Option<u32>, stamp: Option<u32>, clock: Option<u32>,
        ) {
            let flow = FlowKey::from_bytes(&key);
            let report = Report { flow, epoch: Epoch(7), opened, isn, stamp, clock };
            prop_assert_eq!(Report::from_bytes(Epoch(7), &report.to_bytes()), report);
        }
    }
}
