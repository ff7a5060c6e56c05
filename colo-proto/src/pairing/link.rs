//! The byte side of a pairing: which channels are up, what each is reading, what waits to be sent.
//!
//! A [`Link`] turns demanded bytes into [`Item`]s and knows no phase of any protocol; the roles
//! decide what an item means and where contents go.

use alloc::{collections::VecDeque, vec::Vec};
use bytes::{Bytes, BytesMut};
use core::num::NonZeroUsize;

use crate::{
    config::Config,
    error::{DecodeError, Misuse, PeerFault},
    id::Channel,
    machine::{Body, Demand, Sink, Transmit},
    output::FRAME_COST,
    wire::{HEAD_LEN, Head, Kind},
};

/// What arrived.
#[derive(Debug)]
pub(crate) enum Item {
    /// A head and its small body (a table, for [`Kind::Pages`]).
    Message(Head, Bytes),
    /// A head whose contents follow in place; answered by [`Link::place`].
    Contents(Head),
    /// The contents of the head are in place.
    Placed(Head),
    /// A frame.
    Frame(Head, Bytes),
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

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Lane {
    channel: Channel,
    up: bool,
    reading: Reading,
    queue: VecDeque<Bytes>,
    queued: usize,
    outstanding: u64,
}

/// The channels of one pairing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    lanes: Vec<Lane>,
}

impl Link {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            lanes: config
                .channels()
                .map(|channel| Lane {
                    channel,
                    up: false,
                    reading: Reading::Head,
                    queue: VecDeque::new(),
                    queued: 0,
                    outstanding: 0,
                })
                .collect(),
        }
    }

    fn lane(&self, channel: Channel) -> Option<&Lane> {
        self.lanes.iter().find(|l| l.channel == channel)
    }

    fn lane_mut(&mut self, channel: Channel) -> Result<&mut Lane, Misuse> {
        self.lanes
            .iter_mut()
            .find(|l| l.channel == channel)
            .ok_or(Misuse::UnknownChannel(channel))
    }

    pub(crate) fn is_up(&self, channel: Channel) -> bool {
        self.lane(channel).is_some_and(|l| l.up)
    }

    pub(crate) fn all_up(&self) -> bool {
        self.lanes.iter().all(|l| l.up)
    }

    pub(crate) fn any_up(&self) -> bool {
        self.lanes.iter().any(|l| l.up)
    }

    /// Every channel that is up.
    pub(crate) fn up_channels(&self) -> Vec<Channel> {
        self.lanes
            .iter()
            .filter(|l| l.up)
            .map(|l| l.channel)
            .collect()
    }

    /// A channel is connected: it begins with a head.
    pub(crate) fn up(&mut self, channel: Channel) -> Result<(), Misuse> {
        let lane = self.lane_mut(channel)?;
        lane.reset();
        lane.up = true;
        Ok(())
    }

    /// Every channel is connected: one link of another wire carries them all.
    pub(crate) fn up_all(&mut self) {
        for lane in &mut self.lanes {
            lane.reset();
            lane.up = true;
        }
    }

    /// A channel is gone.
    pub(crate) fn down(&mut self, channel: Channel) -> Result<(), Misuse> {
        let lane = self.lane_mut(channel)?;
        lane.up = false;
        lane.reset();
        Ok(())
    }

    /// Queues a message; dropped if the channel is down (its end is being reported).
    pub(crate) fn send(&mut self, channel: Channel, message: Bytes) {
        if let Some(lane) = self.lanes.iter_mut().find(|l| l.channel == channel && l.up) {
            lane.queued += message.len();
            lane.queue.push_back(message);
        }
    }

    /// Bytes queued on a channel and not handed out.
    pub(crate) fn queued(&self, channel: Channel) -> usize {
        self.lane(channel).map_or(0, |l| l.queued)
    }

    /// The same with what holding them takes: what counts against a bound on memory.
    pub(crate) fn held(&self, channel: Channel) -> usize {
        self.lane(channel)
            .map_or(0, |l| l.queued + l.queue.len() * FRAME_COST)
    }

    /// Hands out queued messages, several small ones at once.
    pub(crate) fn poll_queued(&mut self, channel: Channel, budget: usize) -> Option<Transmit> {
        let lane = self
            .lanes
            .iter_mut()
            .find(|l| l.channel == channel && l.up)?;
        let first = lane.queue.pop_front()?;
        let mut total = first.len();
        let head = match lane.queue.front() {
            Some(next) if total + next.len() <= budget.min(16 << 10) => {
                let mut joined = BytesMut::from(first.as_ref());
                while let Some(next) = lane.queue.front() {
                    if total + next.len() > budget.min(16 << 10) {
                        break;
                    }
                    total += next.len();
                    joined.extend_from_slice(next);
                    lane.queue.pop_front();
                }
                joined.freeze()
            }
            _ => first,
        };
        lane.queued = lane.queued.saturating_sub(total);
        Some(Transmit {
            head,
            body: Body::Empty,
        })
    }

    /// Notes what was handed out.
    pub(crate) fn handed_out(&mut self, channel: Channel, transmit: &Transmit) {
        if let Ok(lane) = self.lane_mut(channel) {
            lane.outstanding += transmit.len();
        }
    }

    /// The kernel took bytes. A channel that went down may still report; that is no misuse.
    pub(crate) fn sent(&mut self, channel: Channel, n: NonZeroUsize) -> Result<(), Misuse> {
        let lane = self.lane_mut(channel)?;
        if !lane.up {
            return Ok(());
        }
        let n = n.get() as u64;
        if n > lane.outstanding {
            return Err(Misuse::SentTooMuch {
                channel,
                got: n,
                outstanding: lane.outstanding,
            });
        }
        lane.outstanding -= n;
        Ok(())
    }

    /// Whether everything for the channel was handed out and taken by the kernel.
    pub(crate) fn is_flushed(&self, channel: Channel) -> bool {
        self.lane(channel)
            .is_none_or(|l| l.queued == 0 && l.outstanding == 0)
    }

    pub(crate) fn demand(&self, channel: Channel) -> Demand {
        let Some(lane) = self.lane(channel).filter(|l| l.up) else {
            return Demand::Pause;
        };
        match &lane.reading {
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
    pub(crate) fn bytes(
        &mut self,
        channel: Channel,
        bytes: &[u8],
    ) -> Result<Result<Option<Item>, PeerFault>, Misuse> {
        let lane = self.lane_mut(channel)?;
        if !lane.up {
            return Err(undemanded(channel, "bytes", "pause"));
        }
        let expected = match &lane.reading {
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
        if let Reading::Body(head) = lane.reading {
            lane.reading = if head.kind == Kind::Pages {
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
                lane.reading = Reading::Body(head);
                None
            }
            Kind::VmstateSize => {
                lane.reading = Reading::Undecided(head);
                Some(Item::Contents(head))
            }
            Kind::Input | Kind::Output => {
                lane.reading = Reading::Frame(head);
                None
            }
            _ if head.len == 0 => Some(Item::Message(head, Bytes::new())),
            _ => {
                lane.reading = Reading::Body(head);
                None
            }
        };
        Ok(Ok(item))
    }

    /// Answers [`Item::Contents`] and the table of [`Kind::Pages`]: where the contents go.
    pub(crate) fn place(&mut self, channel: Channel, sink: Sink) {
        if let Ok(lane) = self.lane_mut(channel)
            && let Reading::Undecided(head) = lane.reading
        {
            lane.reading = Reading::Place(head, sink);
        }
    }

    /// Whether contents are on their way into place, or about to be.
    pub(crate) fn placing(&self) -> bool {
        self.lanes.iter().any(|lane| match &lane.reading {
            Reading::Head | Reading::Frame(_) => false,
            Reading::Body(head) => head.kind == Kind::Pages,
            Reading::Undecided(_) | Reading::Place(..) => true,
        })
    }

    /// Answers [`Item::Contents`] of length 0.
    pub(crate) fn nothing_to_place(&mut self, channel: Channel) {
        if let Ok(lane) = self.lane_mut(channel) {
            lane.reading = Reading::Head;
        }
    }

    pub(crate) fn placed(&mut self, channel: Channel, n: NonZeroUsize) -> Result<Item, Misuse> {
        let lane = self.lane_mut(channel)?;
        let (head, sink) = match (&lane.reading, lane.up) {
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
        lane.reading = Reading::Head;
        Ok(Item::Placed(head))
    }

    pub(crate) fn frame(&mut self, channel: Channel, frame: BytesMut) -> Result<Item, Misuse> {
        let lane = self.lane_mut(channel)?;
        let head = match (&lane.reading, lane.up) {
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
        lane.reading = Reading::Head;
        Ok(Item::Frame(head, frame.freeze()))
    }
}

impl Lane {
    fn reset(&mut self) {
        self.reading = Reading::Head;
        self.queue.clear();
        self.queued = 0;
        self.outstanding = 0;
    }
}

/// Small bytes after a head: the table of a PAGES, else the body.
fn small_len(head: &Head) -> usize {
    match head.kind {
        Kind::Pages => head.count as usize * crate::wire::RUN_LEN,
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
        Kind::Pages if head.count == 0 || head.count as usize > crate::wire::BATCH_RUNS => {
            bad("count", head.count, "1 to 512 runs")
        }
        Kind::Pages if head.arg == 0 || head.arg > crate::wire::BATCH_PAGES => {
            bad("arg", head.arg, "1 to 1024 pages")
        }
        Kind::Pages
            if u64::from(head.len)
                != u64::from(head.count) * crate::wire::RUN_LEN as u64
                    + u64::from(head.arg) * crate::id::PAGE_SIZE =>
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
