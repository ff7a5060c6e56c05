//! The seven COLO messages (spec checkpoint 2): be32, no length, no header.

use super::error::{Fault, Feature, Flaw, Got, StreamError, Within};

/// A COLO message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Message {
    /// Secondary: the initial state is loaded.
    CheckpointReady,
    /// Primary: wants a checkpoint.
    CheckpointRequest,
    /// Secondary: its guest is stopped.
    CheckpointReply,
    /// Primary: its guest is stopped, the live part follows.
    VmstateSend,
    /// Primary: the live part is over, this many bytes of device state follow.
    VmstateSize(u64),
    /// Secondary: the checkpoint is whole here. The commit point.
    VmstateReceived,
    /// Secondary: the checkpoint is applied.
    VmstateLoaded,
}

impl Message {
    /// Its number.
    #[must_use]
    pub const fn number(&self) -> u32 {
        match self {
            Self::CheckpointReady => 0,
            Self::CheckpointRequest => 1,
            Self::CheckpointReply => 2,
            Self::VmstateSend => 3,
            Self::VmstateSize(_) => 4,
            Self::VmstateReceived => 5,
            Self::VmstateLoaded => 6,
        }
    }

    /// Its name in QEMU's terms.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        name(self.number())
    }
}

/// The name of a message's number.
pub(super) const fn name(number: u32) -> &'static str {
    match number {
        0 => "CHECKPOINT_READY",
        1 => "CHECKPOINT_REQUEST",
        2 => "CHECKPOINT_REPLY",
        3 => "VMSTATE_SEND",
        4 => "VMSTATE_SIZE",
        5 => "VMSTATE_RECEIVED",
        6 => "VMSTATE_LOADED",
        _ => "no message",
    }
}

/// Refuses a number that is not the one message legal now.
pub(super) fn only(number: u32, expected: u32) -> Result<(), Flaw> {
    if number == expected {
        return Ok(());
    }
    let (fault, got): (_, Got) = match number {
        0..=6 => (Fault::OutOfPlace, name(number).into()),
        _ => (Fault::Unknown, number.into()),
    };
    Err(Flaw::new(0, "message", fault, got, name(expected)))
}

/// Reads the secondary's side of a link: READY once, then REPLY, RECEIVED and LOADED in turn.
#[derive(Clone, Debug, Default)]
pub struct Replies {
    partial: [u8; 4],
    have: usize,
    read: u64,
    /// How many replies came.
    count: u64,
}

impl Replies {
    /// A reader at the start of the link.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The reply that is due next.
    #[must_use]
    pub const fn due(&self) -> Message {
        match self.count {
            0 => Message::CheckpointReady,
            n => match n % 3 {
                1 => Message::CheckpointReply,
                2 => Message::VmstateReceived,
                _ => Message::VmstateLoaded,
            },
        }
    }

    /// How many bytes make the next reply whole.
    #[must_use]
    pub const fn wanted(&self) -> usize {
        4 - self.have
    }

    /// Takes bytes off `input` until a reply is whole; `None` if they do not suffice.
    ///
    /// # Errors
    /// Any message but the one that is due; bytes that look like QEMU's return path are refused
    /// by that name.
    pub fn read(&mut self, input: &mut &[u8]) -> Result<Option<Message>, StreamError> {
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            if let Some(slot) = self.partial.get_mut(self.have) {
                *slot = byte;
            }
            self.have += 1;
            self.read += 1;
            if self.have == 4 {
                self.have = 0;
                let number = u32::from_be_bytes(self.partial);
                let due = self.due();
                only(number, due.number())
                    .map_err(|flaw| self.named(flaw).within(Within::Replies, self.read - 4))?;
                self.count += 1;
                return Ok(Some(due));
            }
        }
        Ok(None)
    }

    /// # Errors
    /// Says so if the link ended inside a reply.
    pub fn finish(&self) -> Result<(), StreamError> {
        if self.have == 0 {
            return Ok(());
        }
        Err(Flaw::new(
            0,
            "message",
            Fault::Truncated,
            Got::EndAfter(self.have as u64),
            "4 bytes",
        )
        .within(Within::Replies, self.read))
    }

    /// Return-path messages are be16 type, be16 length: types 1 to 6 in the upper half.
    fn named(&self, flaw: Flaw) -> Flaw {
        match u16::from_be_bytes([self.partial[0], self.partial[1]]) {
            1..=6 => Flaw {
                fault: Fault::Unsupported(Feature::ReturnPath),
                ..flaw
            },
            _ => flaw,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_come_in_turn_at_any_split() {
        let bytes = [0u8, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 2];
        let mut replies = Replies::new();
        let mut got = alloc::vec![];
        for byte in bytes {
            got.extend(replies.read(&mut &[byte][..]).unwrap());
        }
        let numbers: alloc::vec::Vec<_> = got.iter().map(Message::number).collect();
        assert_eq!(numbers, [0, 2, 5, 6, 2]);
        replies.finish().unwrap();
    }

    #[test]
    fn a_reply_out_of_turn_is_refused_by_name() {
        let err = Replies::new().read(&mut &[0, 0, 0, 5][..]).unwrap_err();
        assert_eq!(
            alloc::format!("{err}"),
            "byte 0, reply, message: not legal here: got VMSTATE_RECEIVED, \
             expected CHECKPOINT_READY"
        );
        let err = Replies::new().read(&mut &[0, 2, 0, 4][..]).unwrap_err();
        assert_eq!(err.fault, Fault::Unsupported(Feature::ReturnPath));
    }
}
