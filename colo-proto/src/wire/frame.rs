//! The 32-byte head, its kinds and their limits.

use bytes::{BufMut, Bytes, BytesMut};
use nom::{
    IResult, Parser,
    number::complete::{le_u8, le_u16, le_u32, le_u64},
};

use crate::{
    error::DecodeError,
    id::{Channel, Generation},
};

/// Bytes of a head.
pub const HEAD_LEN: usize = 32;
/// First two bytes of every head.
pub const MAGIC: u16 = 0xC010;
/// Most small bytes that are ever asked for at once, and so the longest control message.
pub const BODY_MOST: usize = 64 * 1024;
/// Longest network frame: a 64 KiB offloaded segment with its headers.
pub const FRAME_MOST: usize = 65_562;
/// [`Head::flags`]: belongs to a live synchronisation round, not to an epoch.
pub const FLAG_LIVE: u8 = 1;
/// [`Kind::Input`] flag: the frame before it was not mirrored; the secondary's log starts anew.
pub const FLAG_FIRST: u8 = 2;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $wire:literal, $class:ident, $limit:expr;)*) => {
        /// What a message is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $value,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The kind with this number.
            #[must_use]
            pub const fn from_u8(value: u8) -> Option<Self> {
                match value { $($value => Some(Self::$name),)* _ => None }
            }

            /// Its name in diagrams and errors.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $wire,)* }
            }

            /// The longest body it may announce.
            #[must_use]
            #[expect(trivial_numeric_casts, reason = "limits are written in several types")]
            pub const fn limit(self) -> u64 {
                match self { $(Self::$name => $limit as u64,)* }
            }

            const fn class(self) -> Class {
                match self { $(Self::$name => Class::$class,)* }
            }
        }
    };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Control,
    Ram,
    Net,
}

kinds! {
    /// The secondary introduces itself.
    Hello = 1, "HELLO", Control, BODY_MOST;
    /// The primary takes it, and introduces itself.
    Welcome = 2, "WELCOME", Control, BODY_MOST;
    /// The primary (or, after WELCOME, the secondary) does not take it: every reason.
    Refuse = 3, "REFUSE", Control, BODY_MOST;
    /// The VM ended in good order; do not take over.
    Goodbye = 4, "GOODBYE", Control, 0;
    /// This side leaves the pairing, and why.
    Leave = 5, "LEAVE", Control, 1024;
    /// S→P: the first state is loaded.
    CheckpointReady = 16, "CHECKPOINT_READY", Control, 0;
    /// P→S: wants a checkpoint; its guest still runs.
    CheckpointRequest = 17, "CHECKPOINT_REQUEST", Control, 0;
    /// P→S, before its first VMSTATE_SEND: connections whose numbers are translated from earlier
    /// takeovers on.
    Lasting = 25, "LASTING_CONNECTIONS", Control, BODY_MOST;
    /// S→P: its guest is stopped and its disks are quiet.
    CheckpointReply = 18, "CHECKPOINT_REPLY", Control, 0;
    /// P→S: the state is captured and follows.
    VmstateSend = 19, "VMSTATE_SEND", Control, 16;
    /// P→S: the device state, this many bytes, follows in place.
    VmstateSize = 20, "VMSTATE_SIZE", Control, u32::MAX;
    /// S→P: everything arrived and is valid. The commit point.
    VmstateReceived = 21, "VMSTATE_RECEIVED", Control, 0;
    /// S→P: the state is applied.
    VmstateLoaded = 22, "VMSTATE_LOADED", Control, 0;
    /// S→P, before its reply: pages that the secondary wrote itself and needs sent.
    OwnDirty = 23, "OWN_DIRTY", Control, BODY_MOST;
    /// S→P: a live round has arrived on every lane.
    RoundDone = 24, "ROUND_DONE", Control, 0;
    /// P→S: a table of runs, then their pages.
    Pages = 32, "PAGES", Ram, super::BATCH_RUNS * 16 + super::BATCH_PAGES as usize * 4096;
    /// P→S: this lane carries no more of the epoch or round.
    LaneEnd = 33, "LANE_END", Ram, 0;
    /// P→S: a client's frame.
    Input = 48, "INPUT", Net, FRAME_MOST;
    /// S→P: a frame of the secondary's guest.
    Output = 49, "OUTPUT", Net, FRAME_MOST;
    /// S→P: client frames are stored up to this index, and so many CONNECTIONs.
    InputAck = 50, "INPUT_ACK", Net, 0;
    /// P→S: this many of the secondary's first frames since the checkpoint need not be said again.
    Released = 51, "RELEASED", Net, 0;
    /// P→S: numbers that the primary's guest chose for a connection, before they leave.
    Connection = 52, "CONNECTION", Net, crate::output::flow::Report::BYTES;
}

impl Kind {
    /// Whether it may travel on `channel`.
    #[must_use]
    pub const fn belongs_on(self, channel: Channel) -> bool {
        matches!(
            (self.class(), channel),
            (Class::Control, Channel::Control)
                | (Class::Ram, Channel::Ram(_))
                | (Class::Net, Channel::Net)
        )
    }
}

/// The first 32 bytes of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Head {
    /// What it is.
    pub kind: Kind,
    /// [`FLAG_LIVE`] or 0; unknown bits are kept and ignored.
    pub flags: u8,
    /// Bytes that follow.
    pub len: u32,
    /// The ownership this pairing belongs to; 0 before it is known.
    pub generation: Generation,
    /// Epoch, round or index, by kind.
    pub number: u64,
    /// Runs or pages, by kind.
    pub count: u32,
    /// By kind.
    pub arg: u32,
}

impl Head {
    /// A head with nothing but its kind, generation and number.
    #[must_use]
    pub const fn new(kind: Kind, generation: Generation, number: u64) -> Self {
        Self {
            kind,
            flags: 0,
            len: 0,
            generation,
            number,
            count: 0,
            arg: 0,
        }
    }

    /// Appends the 32 bytes.
    pub fn put(&self, out: &mut BytesMut) {
        out.put_u16_le(MAGIC);
        out.put_u8(self.kind as u8);
        out.put_u8(self.flags);
        out.put_u32_le(self.len);
        out.put_u64_le(self.generation.0);
        out.put_u64_le(self.number);
        out.put_u32_le(self.count);
        out.put_u32_le(self.arg);
    }

    /// Head and body as one buffer; `len` is set from the body, which is within the limit of
    /// every kind that has a small one.
    #[must_use]
    pub fn with_body(mut self, body: &[u8]) -> Bytes {
        self.len = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut out = BytesMut::with_capacity(HEAD_LEN + body.len());
        self.put(&mut out);
        out.put_slice(body);
        out.freeze()
    }

    /// Reads a head that came on `channel`.
    ///
    /// # Errors
    /// [`DecodeError`] for a wrong magic, an unknown kind, a kind that does not belong here, or a
    /// body over the kind's limit.
    pub fn decode(channel: Channel, bytes: &[u8; HEAD_LEN]) -> Result<Self, DecodeError> {
        let parsed: IResult<&[u8], _> =
            (le_u16, le_u8, le_u8, le_u32, le_u64, le_u64, le_u32, le_u32).parse(bytes.as_slice());
        let Ok((_, (magic, kind, flags, len, generation, number, count, arg))) = parsed else {
            // The array is exactly as long as the fields.
            return Err(DecodeError::BadLength {
                message: "head",
                field: "arg",
                len: HEAD_LEN as u64,
            });
        };
        if magic != MAGIC {
            return Err(DecodeError::Magic {
                got: magic,
                expected: MAGIC,
            });
        }
        let kind = Kind::from_u8(kind).ok_or(DecodeError::UnknownKind(kind))?;
        if !kind.belongs_on(channel) {
            return Err(DecodeError::WrongChannel(kind.name()));
        }
        if u64::from(len) > kind.limit() {
            return Err(DecodeError::TooLong {
                message: kind.name(),
                len: u64::from(len),
                limit: kind.limit(),
            });
        }
        Ok(Self {
            kind,
            flags,
            len,
            generation: Generation(generation),
            number,
            count,
            arg,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_32_bytes_decode_or_say_why(bytes in any::<[u8; 32]>()) {
            for channel in [Channel::Control, Channel::Ram(0), Channel::Net, Channel::Disk] {
                let _decoded = Head::decode(channel, &bytes);
            }
        }

        #[test]
        fn heads_come_back_as_written(
            kind in proptest::sample::select(Kind::ALL),
            flags: u8, generation: u64, number: u64, count: u32, arg: u32,
        ) {
            let head = Head { kind, flags, len: 0, generation: Generation(generation), number, count, arg };
            let bytes = head.with_body(&[]);
            let channel = [Channel::Control, Channel::Ram(3), Channel::Net]
                .into_iter().find(|c| kind.belongs_on(*c)).unwrap();
            let array: [u8; HEAD_LEN] = bytes.as_ref().try_into().unwrap();
            prop_assert_eq!(Head::decode(channel, &array).unwrap(), head);
        }
    }

    #[test]
    fn every_kind_has_one_place_and_a_limit() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_u8(*kind as u8), Some(*kind));
            let places = [
                Channel::Control,
                Channel::Ram(0),
                Channel::Net,
                Channel::Disk,
            ];
            assert_eq!(places.iter().filter(|c| kind.belongs_on(**c)).count(), 1);
        }
        let mut long = [0; HEAD_LEN];
        let mut head = Head::new(Kind::Leave, Generation(1), 0);
        head.len = 1025;
        let mut out = BytesMut::new();
        head.put(&mut out);
        long.copy_from_slice(&out);
        assert_eq!(
            alloc::format!("{}", Head::decode(Channel::Control, &long).unwrap_err()),
            "LEAVE: body of 1025 bytes, limit 1024"
        );
    }
}
