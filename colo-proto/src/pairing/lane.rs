//! One channel: what it is reading, and what waits to be sent on it.
//!
//! A [`Lane`] turns demanded bytes into [`Item`]s and knows no phase of any protocol; the roles
//! decide what an item means and where contents go.

use alloc::collections::VecDeque;
use bytes::{Bytes, BytesMut};
use core::num::NonZeroUsize;

use crate::{
    error::{DecodeError, Misuse, PeerFault},
    id::{Channel, PAGE_SIZE},
    machine::{Body, Demand, Sink, Transmit},
    output::FRAME_COST,
    wire::{BATCH_PAGES, BATCH_RUNS, HEAD_LEN, Head, Kind, RUN_LEN},
};

/// What arrived.
#[derive(Debug)]
pub(crate) enum Item {
    /// A head and its small body (a table, for [`Kind::Pages`]).
    Message(Head, Bytes),
    /// A head whose contents follow in place; answered by [`Link::place`](super::link::Link::place).
    Contents(Head),
    /// The contents of the head are in place.
    Placed(Head),
    /// A frame.
    Frame(Head, Bytes),
}

impl Item {
    /// The head that it came with.
    pub(crate) const fn head(&self) -> &Head {
        match self {
            Self::Message(head, _)
            | Self::Contents(head)
            | Self::Placed(head)
            | Self::Frame(head, _) => head,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Reading {
    Head,
    Body(Head),
    /// A place is being decided; the role has not answered yet.
    Undecided(Head),
    Place(Head, Sink),
    Frame(Head),
}

/// One channel of a pairing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Lane {
    pub(super) channel: Channel,
    pub(super) up: bool,
    reading: Reading,
    queue: VecDeque<Bytes>,
    pub(super) queued: usize,
    outstanding: u64,
}

impl Lane {
    pub(super) const fn new(channel: Channel) -> Self {
        Self {
            channel,
            up: false,
            reading: Reading::Head,
            queue: VecDeque::new(),
            queued: 0,
            outstanding: 0,
        }
    }

    /// The channel is connected, or gone: it begins with a head.
    pub(super) fn reset(&mut self, up: bool) {
        *self = Self {
            up,
            ..Self::new(self.channel)
        };
    }

    /// What waits, with what holding it takes: what counts against a bound on memory.
    pub(super) fn held(&self) -> usize {
        self.queued + self.queue.len() * FRAME_COST
    }

    pub(super) fn send(&mut self, message: Bytes) {
        self.queued += message.len();
        self.queue.push_back(message);
    }

    /// Hands out queued messages, several small ones at once.
    pub(super) fn poll(&mut self, budget: usize) -> Option<Transmit> {
        let first = self.queue.pop_front()?;
        let mut total = first.len();
        let head = match self.queue.front() {
            Some(next) if total + next.len() <= budget.min(16 << 10) => {
                let mut joined = BytesMut::from(first.as_ref());
                while let Some(next) = self.queue.front() {
                    if total + next.len() > budget.min(16 << 10) {
                        break;
                    }
                    total += next.len();
                    joined.extend_from_slice(next);
                    self.queue.pop_front();
                }
                joined.freeze()
            }
            _ => first,
        };
        self.queued = self.queued.saturating_sub(total);
        Some(Transmit {
            head,
            body: Body::Empty,
        })
    }

    pub(super) fn demand(&self) -> Demand {
        if !self.up {
            return Demand::Pause;
        }
        match &self.reading {
            Reading::Head => Demand::Read {
                place: None,
                then: HEAD_LEN,
            },
            Reading::Body(head) => Demand::Read {
                place: None,
                then: small_len(head),
            },
            Reading::Undecided(_) => Demand::Pause,
            Reading::Place(_, sink) => Demand::Read {
                place: Some(sink.clone()),
                then: HEAD_LEN,
            },
            Reading::Frame(head) => {
                NonZeroUsize::new(head.len as usize).map_or(Demand::Pause, Demand::Frame)
            }
        }
    }

    /// The small bytes that were demanded. `Ok(Ok(None))`: more is needed first.
    pub(super) fn bytes(
        &mut self,
        bytes: &[u8],
    ) -> Result<Result<Option<Item>, PeerFault>, Misuse> {
        let channel = self.channel;
        if !self.up {
            return Err(undemanded(channel, "bytes", "pause"));
        }
        let expected = match &self.reading {
            Reading::Head => HEAD_LEN,
            Reading::Body(head) => small_len(head),
            Reading::Place(..) => return Err(undemanded(channel, "bytes", "contents first")),
            Reading::Undecided(_) | Reading::Frame(_) => {
                return Err(undemanded(channel, "bytes", "another answer"));
            }
        };
        if bytes.len() != expected {
            return Err(Misuse::WrongLength {
                channel,
                got: bytes.len() as u64,
                expected: expected as u64,
            });
        }
        if let Reading::Body(head) = self.reading {
            self.reading = if head.kind == Kind::Pages {
                Reading::Undecided(head)
            } else {
                Reading::Head
            };
            return Ok(Ok(Some(Item::Message(head, Bytes::copy_from_slice(bytes)))));
        }
        let mut array = [0; HEAD_LEN];
        array.copy_from_slice(bytes);
        let head = match Head::decode(channel, &array).and_then(|h| check_counts(&h).map(|()| h)) {
            Ok(head) => head,
            Err(error) => return Ok(Err(PeerFault::Decode { channel, error })),
        };
        let item = match head.kind {
            Kind::Pages => {
                self.reading = Reading::Body(head);
                None
            }
            Kind::VmstateSize => {
                self.reading = Reading::Undecided(head);
                Some(Item::Contents(head))
            }
            Kind::Input | Kind::Output => {
                self.reading = Reading::Frame(head);
                None
            }
            _ if head.len == 0 => Some(Item::Message(head, Bytes::new())),
            _ => {
                self.reading = Reading::Body(head);
                None
            }
        };
        Ok(Ok(item))
    }

    /// Answers [`Item::Contents`] and the table of [`Kind::Pages`]: where the contents go.
    pub(super) fn place(&mut self, sink: Sink) {
        if let Reading::Undecided(head) = self.reading {
            self.reading = Reading::Place(head, sink);
        }
    }

    /// Answers [`Item::Contents`] of length 0.
    pub(super) fn nothing_to_place(&mut self) {
        self.reading = Reading::Head;
    }

    /// Whether contents are on their way into place, or about to be.
    pub(super) fn placing(&self) -> bool {
        match &self.reading {
            Reading::Head | Reading::Frame(_) => false,
            Reading::Body(head) => head.kind == Kind::Pages,
            Reading::Undecided(_) | Reading::Place(..) => true,
        }
    }

    /// Notes what was handed out.
    pub(super) fn handed_out(&mut self, transmit: &Transmit) {
        self.outstanding += transmit.len();
    }

    /// Whether everything was handed out and taken by the kernel.
    pub(super) const fn is_flushed(&self) -> bool {
        self.queued == 0 && self.outstanding == 0
    }

    /// The kernel took bytes. A channel that went down may still report; that is no misuse.
    pub(super) fn sent(&mut self, n: NonZeroUsize) -> Result<(), Misuse> {
        if !self.up {
            return Ok(());
        }
        let n = n.get() as u64;
        if n > self.outstanding {
            return Err(Misuse::SentTooMuch {
                channel: self.channel,
                got: n,
                outstanding: self.outstanding,
            });
        }
        self.outstanding -= n;
        Ok(())
    }

    pub(super) fn placed(&mut self, n: NonZeroUsize) -> Result<Item, Misuse> {
        let channel = self.channel;
        let (head, sink) = match (&self.reading, self.up) {
            (Reading::Place(head, sink), true) => (*head, sink),
            _ => return Err(undemanded(channel, "placed contents", "another answer")),
        };
        let expected = sink.bytes();
        if n.get() as u64 != expected {
            return Err(Misuse::WrongLength {
                channel,
                got: n.get() as u64,
                expected,
            });
        }
        self.reading = Reading::Head;
        Ok(Item::Placed(head))
    }

    pub(super) fn frame(&mut self, frame: BytesMut) -> Result<Item, Misuse> {
        let channel = self.channel;
        let head = match (&self.reading, self.up) {
            (Reading::Frame(head), true) => *head,
            _ => return Err(undemanded(channel, "a frame", "another answer")),
        };
        if frame.len() != head.len as usize {
            return Err(Misuse::WrongLength {
                channel,
                got: frame.len() as u64,
                expected: u64::from(head.len),
            });
        }
        self.reading = Reading::Head;
        Ok(Item::Frame(head, frame.freeze()))
    }
}

/// Small bytes after a head: the table of a PAGES, else the body.
fn small_len(head: &Head) -> usize {
    match head.kind {
        Kind::Pages => head.count as usize * RUN_LEN,
        _ => head.len as usize,
    }
}

/// What a head must satisfy by itself, before anything is demanded because of it.
fn check_counts(head: &Head) -> Result<(), DecodeError> {
    let bad = |field, got: u32, expected| {
        Err(DecodeError::BadField {
            message: head.kind.name(),
            field,
            got: u64::from(got),
            expected,
        })
    };
    match head.kind {
        Kind::Pages if head.count == 0 || head.count as usize > BATCH_RUNS => {
            bad("count", head.count, "1 to 512 runs")
        }
        Kind::Pages if head.arg == 0 || head.arg > BATCH_PAGES => {
            bad("arg", head.arg, "1 to 1024 pages")
        }
        Kind::Pages
            if u64::from(head.len)
                != u64::from(head.count) * RUN_LEN as u64 + u64::from(head.arg) * PAGE_SIZE =>
        {
            bad("length", head.len, "16 bytes a run and 4096 a page")
        }
        Kind::Input | Kind::Output if head.len == 0 => bad("length", 0, "a frame"),
        Kind::OwnDirty if !head.len.is_multiple_of(16) || head.len == 0 => {
            bad("length", head.len, "16 bytes a run")
        }
        _ => Ok(()),
    }
}

const fn undemanded(channel: Channel, got: &'static str, demanded: &'static str) -> Misuse {
    Misuse::Undemanded {
        channel,
        got,
        demanded,
    }
}
