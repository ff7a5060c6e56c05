//! The seven COLO messages (spec checkpoint 2): be32, no length, no header. Before the first of them
//! QEMU 11 wants two messages of the migration's return path: be16 type, be16 length, be32 value.

use super::{
    error::{Expected, Fault, Feature, Flaw, Got, StreamError, Within},
    generation::Command,
};

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
    /// Secondary, on the return path: the number of the ping.
    Pong(u32),
    /// Secondary, on the return path: the migration is loaded (0) or failed; nothing more comes on
    /// it.
    ReturnPathOver(u32),
}

impl Message {
    /// Its number, or the type and length of a return-path message.
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
            // Type and length, read as one number.
            Self::Pong(_) => PONG,
            Self::ReturnPathOver(_) => OVER,
        }
    }

    /// Its name in QEMU's terms.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        name(self.number())
    }
}

const OVER: u32 = 0x0001_0004;
const PONG: u32 = 0x0002_0004;

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
        PONG => "the return path's pong",
        OVER => "the return path's end",
        _ => "no message",
    }
}

/// Refuses a number that is not the one message legal now.
pub(super) fn only(number: u32, expected: u32) -> Result<(), Flaw> {
    if number == expected {
        return Ok(());
    }
    let (fault, got): (_, Got) = match number {
        0..=6 | PONG | OVER => (Fault::OutOfPlace, name(number).into()),
        _ => (Fault::Unknown, number.into()),
    };
    Err(Flaw::new(0, "message", fault, got, name(expected)))
}

/// Reads the secondary's side of a link: what the return path owes, READY once, then REPLY,
/// RECEIVED and LOADED in turn.
#[derive(Clone, Debug, Default)]
pub struct Replies {
    partial: [u8; 8],
    have: usize,
    read: u64,
    /// How many replies came, not counting the return path's.
    count: u64,
    /// The number of a ping that was not sent back yet.
    pong: Option<u32>,
    /// Whether the end of the return path is owed.
    over: bool,
    /// Whether it ever was.
    return_path: bool,
}

impl Replies {
    /// A reader at the start of the link.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note of a command that was sent: it may want an answer.
    pub const fn expect(&mut self, command: Command) {
        match command {
            Command::OpenReturnPath => (self.over, self.return_path) = (true, true),
            Command::Ping(value) => self.pong = Some(value),
            Command::EnableColo | Command::SwitchoverStart => {}
        }
    }

    /// The reply that is due next.
    #[must_use]
    pub const fn due(&self) -> Message {
        if let Some(value) = self.pong {
            return Message::Pong(value);
        }
        if self.over {
            return Message::ReturnPathOver(0);
        }
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
        match self.due() {
            Message::Pong(_) | Message::ReturnPathOver(_) => 8 - self.have,
            _ => 4 - self.have,
        }
    }

    /// Takes bytes off `input` until a reply is whole; `None` if they do not suffice.
    ///
    /// # Errors
    /// Any message but the one that is due; bytes that look like QEMU's return path are refused
    /// by that name if it was never opened.
    pub fn read(&mut self, input: &mut &[u8]) -> Result<Option<Message>, StreamError> {
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            if let Some(slot) = self.partial.get_mut(self.have) {
                *slot = byte;
            }
            self.have += 1;
            self.read += 1;
            let due = self.due();
            if self.have == 4 {
                let number = self.word(0);
                only(number, due.number())
                    .map_err(|flaw| self.named(flaw).within(Within::Replies, self.read - 4))?;
            }
            if self.wanted() == 0 {
                self.have = 0;
                self.taken(due)?;
                return Ok(Some(due));
            }
        }
        Ok(None)
    }

    fn taken(&mut self, due: Message) -> Result<(), StreamError> {
        let (field, expected) = match due {
            Message::Pong(value) => {
                self.pong = None;
                ("pong", value)
            }
            Message::ReturnPathOver(value) => {
                self.over = false;
                ("result of the load", value)
            }
            _ => {
                self.count += 1;
                return Ok(());
            }
        };
        let got = self.word(4);
        if got == expected {
            return Ok(());
        }
        let flaw = Flaw::new(0, field, Fault::Mismatch, got, expected);
        Err(flaw.within(Within::Replies, self.read - 4))
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.partial.get(at..).and_then(<[u8]>::first_chunk);
        word.map_or(0, |word| u32::from_be_bytes(*word))
    }

    /// # Errors
    /// Says so if the link ended inside a reply.
    pub fn finish(&self) -> Result<(), StreamError> {
        if self.have == 0 {
            return Ok(());
        }
        let whole = self.have + self.wanted();
        let expected = Expected::Text(alloc::format!("{whole} bytes").into());
        let got = Got::EndAfter(self.have as u64);
        let flaw = Flaw::new(0, "message", Fault::Truncated, got, expected);
        Err(flaw.within(Within::Replies, self.read))
    }

    /// Return-path messages are be16 type, be16 length: types 1 to 6 in the upper half.
    fn named(&self, flaw: Flaw) -> Flaw {
        match self.word(0) >> 16 {
            1..=6 if !self.return_path => Flaw {
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

    #[test]
    fn a_return_path_that_was_opened_owes_a_pong_and_its_end_before_ready() {
        let mut replies = Replies::new();
        replies.expect(Command::OpenReturnPath);
        replies.expect(Command::Ping(7));
        let bytes = [0u8, 2, 0, 4, 0, 0, 0, 7, 0, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut got = alloc::vec![];
        for byte in bytes {
            got.extend(replies.clone().read(&mut &[byte][..]).unwrap());
            replies.read(&mut &[byte][..]).unwrap();
        }
        assert_eq!(
            got,
            [
                Message::Pong(7),
                Message::ReturnPathOver(0),
                Message::CheckpointReady
            ]
        );
        assert_eq!(replies.due(), Message::CheckpointReply);

        // Another number, a failed load, and READY before its turn.
        for (bytes, fault) in [
            (&[0u8, 2, 0, 4, 0, 0, 0, 8][..], Fault::Mismatch),
            (
                &[0, 2, 0, 4, 0, 0, 0, 7, 0, 1, 0, 4, 0, 0, 0, 1],
                Fault::Mismatch,
            ),
            (&[0, 0, 0, 0], Fault::OutOfPlace),
        ] {
            let mut replies = Replies::new();
            replies.expect(Command::OpenReturnPath);
            replies.expect(Command::Ping(7));
            let mut input = bytes;
            let refused = loop {
                match replies.read(&mut input) {
                    Ok(reply) => assert!(reply.is_some(), "{bytes:?}"),
                    Err(refused) => break refused,
                }
            };
            assert_eq!(refused.fault, fault, "{bytes:?}");
        }
    }
}
