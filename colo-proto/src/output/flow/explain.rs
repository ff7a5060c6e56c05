//! Why two outputs differ, said so that somebody can act on it.

use alloc::collections::BTreeMap;
use bytes::Bytes;
use core::fmt;

use crate::{id::Epoch, output::packet::FlowKey};

/// Most bytes shown of each side.
pub const EXCERPT: usize = 48;
/// How many of them are before the first that differs.
const BEFORE: usize = 16;

/// Two outputs that differ.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Divergence {
    /// Since which checkpoint.
    pub epoch: Epoch,
    /// The conversation.
    pub flow: FlowKey,
    /// Bytes of the stream before the difference since the flow was first compared; of a datagram,
    /// bytes of it.
    pub offset: u64,
    /// What this guest said around there.
    pub ours: Bytes,
    /// What the other said.
    pub theirs: Bytes,
    /// The likely cause.
    pub cause: Difference,
}

/// The likely cause of a [`Divergence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Difference {
    /// Connections were opened with other options (segment size, window scale, timestamps).
    Options,
    /// A segment was sent again with other contents.
    Resent,
    /// One side ended the stream where the other went on.
    End,
    /// One side opened the connection anew before the other had said everything.
    Reopened,
    /// Digits differ among bytes that agree: most likely a time or a counter.
    Time,
    /// Most bytes differ: random or encrypted contents.
    Random,
    /// Bytes differ.
    Payload,
    /// The same datagrams came in another order, or not at all.
    Order,
    /// The other guest has said nothing to it for too long.
    Unanswered,
    /// One side said so much more than the other that the bound was reached.
    Overflow,
}

impl Difference {
    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Options => "options of the handshake",
            Self::Resent => "sent again with other contents",
            Self::End => "end of the stream",
            Self::Reopened => "opened anew",
            Self::Time => "a time or a counter",
            Self::Random => "random or encrypted contents",
            Self::Payload => "contents",
            Self::Order => "order",
            Self::Unanswered => "no answer from the other guest",
            Self::Overflow => "too much of one side",
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Two byte strings that begin to differ at `at`: what is shown of them, and why they differ.
pub(super) fn explain(ours: &[u8], theirs: &[u8], at: usize) -> (Bytes, Bytes, Difference) {
    let cut = |bytes: &[u8]| {
        let from = at.saturating_sub(BEFORE).min(bytes.len());
        let to = (from + EXCERPT).min(bytes.len());
        Bytes::copy_from_slice(bytes.get(from..to).unwrap_or_default())
    };
    (cut(ours), cut(theirs), cause(ours, theirs, at))
}

/// Where the two begin to differ.
pub(super) fn first_difference(ours: &[u8], theirs: &[u8]) -> usize {
    let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b);
    same.count()
}

fn cause(ours: &[u8], theirs: &[u8], at: usize) -> Difference {
    let rest = || {
        let ours = ours.get(at..).unwrap_or_default().iter();
        ours.zip(theirs.get(at..).unwrap_or_default()).take(64)
    };
    let (all, differ) = (rest().count(), rest().filter(|(a, b)| a != b).count());
    let digits = rest()
        .filter(|(a, b)| a != b)
        .all(|(a, b)| a.is_ascii_digit() && b.is_ascii_digit());
    match () {
        () if all > 0 && digits => Difference::Time,
        () if differ >= 8 && differ * 10 >= all * 8 => Difference::Random,
        () => Difference::Payload,
    }
}

/// Divergences so far, by cause. The last of each flow is kept with the flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Totals(BTreeMap<Difference, u64>);

impl Totals {
    pub(super) const fn new() -> Self {
        Self(BTreeMap::new())
    }

    pub(super) fn add(&mut self, cause: Difference) {
        *self.0.entry(cause).or_default() += 1;
    }

    /// Each cause that has occurred, and how often.
    pub fn iter(&self) -> impl Iterator<Item = (Difference, u64)> {
        self.0.iter().map(|(cause, count)| (*cause, *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likely_causes_are_told_apart() {
        let ours = b"HTTP/1.1 200 OK\r\nDate: Mon, 30 Nov 2026 23:59:58 GMT\r\n";
        let theirs = b"HTTP/1.1 200 OK\r\nDate: Mon, 30 Nov 2026 23:59:59 GMT\r\n";
        let at = first_difference(ours, theirs);
        let (a, b, cause) = explain(ours, theirs, at);
        assert_eq!(cause, Difference::Time);
        assert_eq!(&a[..], &ours[at - BEFORE..]);
        assert_eq!(&b[..], &theirs[at - BEFORE..]);
        let noise = |seed: u8| [0u8; 64].map(|_| seed);
        let (a, _, cause) = explain(&noise(0x55), &noise(0xaa), 0);
        assert_eq!((cause, a.len()), (Difference::Random, EXCERPT));
        assert_eq!(explain(b"colour", b"coloor", 4).2, Difference::Payload);
    }
}
