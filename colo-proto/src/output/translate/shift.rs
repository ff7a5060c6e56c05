//! Numbers of one connection moved by a constant, wherever a frame carries them.

use bytes::{Bytes, BytesMut};

use crate::output::packet::{Content, Edit, FlowKey, Fragment, Heading, Segment, View};

/// How far a guest's numbers are ahead of those that the world knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shift {
    /// Sequence numbers.
    pub seq: u32,
    /// Timestamps.
    pub stamp: u32,
}

impl Shift {
    /// Nothing is moved.
    pub const NONE: Self = Self { seq: 0, stamp: 0 };

    /// The frame as the other side of the translation knows it.
    #[must_use]
    pub fn apply(self, tcp: &Tcp, heading: Heading, frame: Bytes) -> Bytes {
        if self == Self::NONE {
            return frame;
        }
        // A frame that nobody else holds is changed where it is.
        let mut frame = frame
            .try_into_mut()
            .unwrap_or_else(|shared| BytesMut::from(&shared[..]));
        let mut edit = Edit::new(&mut frame, &tcp.view);
        match (tcp.quoted, heading) {
            (Some(at), Heading::FromGuest) => {
                // What the client sent, whose acknowledgement was translated on its way here.
                edit.add(at + 8, self.seq.wrapping_neg());
            }
            (Some(at), Heading::ToGuest) => {
                edit.add(at + 4, self.seq);
            }
            (None, Heading::FromGuest) => {
                edit.add(4, self.seq.wrapping_neg());
                if let Some(stamp) = tcp.segment.and_then(|s| s.options.timestamp) {
                    edit.add(stamp.at, self.stamp.wrapping_neg());
                }
            }
            (None, Heading::ToGuest) => self.acknowledge(tcp, &mut edit),
        }
        frame.freeze()
    }

    fn acknowledge(self, tcp: &Tcp, edit: &mut Edit<'_>) {
        let Some(segment) = tcp.segment.filter(|segment| segment.ack.is_some()) else {
            return;
        };
        edit.add(8, self.seq);
        if let Some((at, blocks)) = segment.options.sack {
            for edge in 0..blocks * 2 {
                edit.add(at + edge * 4, self.seq);
            }
        }
        if let Some(stamp) = segment.options.timestamp {
            edit.add(stamp.at + 4, self.stamp);
        }
    }
}

/// What of a frame belongs to a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// The connection.
    pub flow: FlowKey,
    /// Its segment; `None` in an ICMP error that quotes one.
    pub segment: Option<Segment>,
    view: View,
    /// Where the quoted TCP header is, from the beginning of the ICMP message.
    quoted: Option<usize>,
}

impl Tcp {
    /// Finds a segment, also in the first fragment of one and quoted in an ICMP error.
    #[must_use]
    pub fn find(frame: &[u8], header: usize, heading: Heading) -> Option<Self> {
        let view = View::new(frame, header, heading).ok()?;
        match view.content {
            Content::Tcp(segment) => Some(Self {
                flow: view.key,
                segment: Some(segment),
                view,
                quoted: None,
            }),
            Content::Fragment(Fragment { offset: 0, .. }) if view.key.protocol == 6 => {
                let body = frame.get(view.transport..view.end)?;
                let whole = View::of_whole(view.key, body, heading).ok()?;
                let Content::Tcp(segment) = whole.content else {
                    return None;
                };
                Some(Self {
                    flow: whole.key,
                    segment: Some(segment),
                    view: View {
                        content: whole.content,
                        ..view
                    },
                    quoted: None,
                })
            }
            Content::Icmp { kind } => Self::quoted(frame, view, kind, heading),
            _ => None,
        }
    }

    /// An error about a segment that went the other way. What is quoted is cut off, so that its
    /// lengths mean nothing.
    fn quoted(frame: &[u8], view: View, kind: u8, heading: Heading) -> Option<Self> {
        const HEAD: usize = 8;
        let body = frame.get(view.transport..view.end)?;
        let quote = body.get(HEAD..)?;
        let (at, ends) = match (view.key.protocol, kind) {
            (1, 3 | 4 | 5 | 11 | 12) => {
                let words = usize::from(quote.first()? & 0x0f);
                let header = quote.get(..words * 4)?;
                if words < 5 || header.get(9) != Some(&6) || be(header, 6, 2)? & 0x1fff != 0 {
                    return None;
                }
                let mapped = |at| Some(0xffff_0000_0000 | be(header, at, 4)?);
                (words * 4, [mapped(12)?, mapped(16)?])
            }
            (58, 1..=4) => {
                // Behind extension headers nothing is looked for.
                if quote.get(6) != Some(&6) {
                    return None;
                }
                (40, [be(quote, 8, 16)?, be(quote, 24, 16)?])
            }
            _ => return None,
        };
        let port = |n| u16::try_from(be(quote, at + n, 2)?).ok();
        let (from, to) = (port(0)?, port(2)?);
        let [source, destination] = ends;
        // The quoted segment went against the direction of the error.
        let (ours, theirs, our_port, their_port) = match heading {
            Heading::ToGuest => (source, destination, from, to),
            Heading::FromGuest => (destination, source, to, from),
        };
        Some(Self {
            flow: FlowKey {
                their_port,
                our_port,
                protocol: 6,
                vlans: view.key.vlans,
                theirs,
                ours,
            },
            segment: None,
            view,
            quoted: Some(HEAD + at),
        })
    }
}

/// Up to 16 bytes as a number.
fn be(bytes: &[u8], at: usize, len: usize) -> Option<u128> {
    let bytes = bytes.get(at..at + len)?.iter();
    Some(bytes.fold(0, |value, byte| value << 8 | u128::from(*byte)))
}
