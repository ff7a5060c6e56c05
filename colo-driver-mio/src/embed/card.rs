//! The guest's network card, seen from its wire.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use colo_proto::id::Epoch;
use rustix::event::{EventfdFlags, eventfd};

/// Frames that wait on one side of the card, and their bytes; more are dropped, as on a full wire.
const MOST_WAITING: usize = 1024;
const MOST_WAITING_BYTES: usize = 4 << 20;

/// What this library needs of a network card. [`Card`] has it; a card that stamps its frames itself
/// implements it.
///
/// All but [`cut`](Self::cut) and [`replace`](Self::replace) are called by the loop, those two by
/// the VMM's thread while the machine stands still.
pub trait Port: Send + Sync {
    /// Readable when the guest has said something.
    fn descriptor(&self) -> Option<RawFd>;

    /// Hands out frames that the guest has said, in order, each with the epoch of the last
    /// [`cut`](Self::cut) or [`replace`](Self::replace) before it was said. What is left makes the
    /// descriptor readable again.
    fn said(&self, each: &mut dyn FnMut(Epoch, Bytes));

    /// Brings a client's frame to the guest. Indices grow by one. What it drops for want of room
    /// counts as consumed.
    fn bring(&self, index: u64, frame: Bytes);

    /// A capture: frames are stamped with `epoch` from here on. Returns the index of the last frame
    /// that the saved state has consumed.
    fn cut(&self, epoch: Epoch) -> u64;

    /// A state was loaded that has consumed the frames up to `inputs`; what is queued on either side
    /// belonged to the guest before it and is dropped.
    fn replace(&self, epoch: Epoch, inputs: u64);
}

/// A card's other end, ready made: the VMM's device calls [`say`](Self::say) with what the guest
/// sends and [`hear`](Self::hear) for what it receives. Neither is called while the machine is
/// paused.
#[derive(Debug)]
pub struct Card {
    said: OwnedFd,
    heard: OwnedFd,
    queues: Mutex<Queues>,
}

#[derive(Debug, Default)]
struct Queues {
    epoch: Epoch,
    out: Queue<Epoch>,
    back: Queue<u64>,
    /// Everything up to here was heard or dropped.
    consumed: u64,
    /// The newest frame brought.
    newest: u64,
}

#[derive(Debug)]
struct Queue<T> {
    frames: VecDeque<(T, Bytes)>,
    bytes: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            frames: VecDeque::new(),
            bytes: 0,
        }
    }
}

impl<T> Queue<T> {
    fn push(&mut self, mark: T, frame: Bytes) -> bool {
        let bytes = self.bytes + frame.len();
        let room = self.frames.len() < MOST_WAITING && bytes <= MOST_WAITING_BYTES;
        if room {
            self.bytes = bytes;
            self.frames.push_back((mark, frame));
        }
        room
    }

    fn pop(&mut self) -> Option<(T, Bytes)> {
        let (mark, frame) = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some((mark, frame))
    }
}

impl Card {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            said: bell()?,
            heard: bell()?,
            queues: Mutex::default(),
        })
    }

    /// The guest said this; it is stamped here. Call it when the frame is taken from the guest's
    /// queue. `false` if it was dropped because 1,024 frames or 4 MiB wait.
    pub fn say(&self, frame: Bytes) -> bool {
        let mut queues = self.lock();
        let epoch = queues.epoch;
        let taken = queues.out.push(epoch, frame);
        drop(queues);
        ring(&self.said);
        taken
    }

    /// The next frame for the guest. It counts as consumed from here on, so call it when the guest
    /// has room. After `None` [`heard`](Self::heard) becomes readable with the next one.
    pub fn hear(&self) -> Option<Bytes> {
        let mut queues = self.lock();
        let Some((index, frame)) = queues.back.pop() else {
            drain(&self.heard);
            return None;
        };
        queues.consumed = if queues.back.frames.is_empty() {
            queues.newest
        } else {
            index
        };
        Some(frame)
    }

    /// Readable when there is something to [`hear`](Self::hear).
    #[must_use]
    pub fn heard(&self) -> RawFd {
        self.heard.as_raw_fd()
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port for Card {
    fn descriptor(&self) -> Option<RawFd> {
        Some(self.said.as_raw_fd())
    }

    fn said(&self, each: &mut dyn FnMut(Epoch, Bytes)) {
        drain(&self.said);
        let out = std::mem::take(&mut self.lock().out);
        for (epoch, frame) in out.frames {
            each(epoch, frame);
        }
    }

    fn bring(&self, index: u64, frame: Bytes) {
        let mut queues = self.lock();
        queues.newest = index;
        let taken = queues.back.push(index, frame);
        if !taken && queues.back.frames.is_empty() {
            queues.consumed = index;
        }
        drop(queues);
        ring(&self.heard);
    }

    fn cut(&self, epoch: Epoch) -> u64 {
        let mut queues = self.lock();
        queues.epoch = epoch;
        queues.consumed
    }

    fn replace(&self, epoch: Epoch, inputs: u64) {
        *self.lock() = Queues {
            epoch,
            consumed: inputs,
            newest: inputs,
            ..Queues::default()
        };
    }
}

/// A guest without a network.
#[derive(Debug, Default)]
pub struct NoCard;

impl Port for NoCard {
    fn descriptor(&self) -> Option<RawFd> {
        None
    }

    fn said(&self, _: &mut dyn FnMut(Epoch, Bytes)) {}

    fn bring(&self, _: u64, _: Bytes) {}

    fn cut(&self, _: Epoch) -> u64 {
        0
    }

    fn replace(&self, _: Epoch, _: u64) {}
}

pub(super) fn bell() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)
}

pub(super) fn ring(bell: &OwnedFd) {
    // Full means rung.
    let _full = rustix::io::write(bell, &1u64.to_ne_bytes());
}

pub(super) fn drain(bell: &OwnedFd) {
    // Empty means drained.
    let _empty = rustix::io::read(bell, &mut [0; 8]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(len: usize) -> Bytes {
        vec![0; len].into()
    }

    #[test]
    fn the_cut_is_what_was_heard() {
        let card = Card::new().unwrap();
        for index in 1..=3 {
            card.bring(index, frame(1));
        }
        assert_eq!(card.cut(Epoch(1)), 0);
        card.hear().unwrap();
        assert_eq!(card.cut(Epoch(2)), 1);
        while card.hear().is_some() {}
        assert_eq!(card.cut(Epoch(3)), 3);
    }

    #[test]
    fn what_is_dropped_for_want_of_room_is_consumed_with_what_came_before_it() {
        let card = Card::new().unwrap();
        card.bring(1, frame(MOST_WAITING_BYTES));
        card.bring(2, frame(1));
        assert_eq!(card.cut(Epoch(1)), 0);
        card.hear().unwrap();
        assert_eq!(card.cut(Epoch(1)), 2);
        card.bring(3, frame(MOST_WAITING_BYTES + 1));
        assert_eq!(card.cut(Epoch(1)), 3);
    }

    #[test]
    fn frames_carry_the_epoch_they_were_said_in() {
        let card = Card::new().unwrap();
        card.say(frame(1));
        card.cut(Epoch(1));
        card.say(frame(1));
        let mut said = Vec::new();
        card.said(&mut |epoch, _| said.push(epoch));
        assert_eq!(said, [Epoch(0), Epoch(1)]);
    }

    #[test]
    fn a_replaced_guest_leaves_nothing_behind() {
        let card = Card::new().unwrap();
        card.say(frame(1));
        card.bring(1, frame(1));
        card.replace(Epoch(4), 7);
        card.said(&mut |_, _| panic!("it is gone"));
        assert_eq!(card.hear(), None);
        assert_eq!(card.cut(Epoch(5)), 7);
    }
}
