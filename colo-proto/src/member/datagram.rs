//! The heartbeat datagram: 112 bytes, little-endian, authenticated (spec ownership 6).
//!
//! ```text
//!  0 magic  4 version  5 type  6 path  7 flags  8 vm id          24 generation
//! 32 seq   40 ack     48 boot of the sender     56 boot of the peer it is paired with
//! 64 epoch 72 progress 76 state 77 health 78 control code        80 settings
//! 88 mark  96 code over bytes 0 to 95
//! ```
//!
//! The code also covers the sender's [`NodeId`], so that a datagram cannot be reflected.

use super::{
    BootId, NodeId, PathId, RequestId, VmId,
    mac::{self, MacKey, same},
};
use crate::id::{Epoch, Generation};

/// Bytes of a datagram.
pub const DATAGRAM_SIZE: usize = 112;

const MAGIC: u32 = 0x3142_4843;
const VERSION: u8 = 3;
const MAC_AT: usize = 96;

/// What a datagram is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// "I am here": asks for an acknowledgement.
    Heartbeat,
    /// "I heard `ack`": renews the owner's lease.
    Ack,
    /// One of the controls.
    Control(Control),
}

impl Kind {
    /// Whether the receiver relies on the settings of the sender: these found or renew a pair.
    #[must_use]
    pub const fn promises(self) -> bool {
        matches!(
            self,
            Self::Heartbeat
                | Self::Ack
                | Self::Control(Control::Hello | Control::DualStart | Control::DualAck)
        )
    }
}

/// Control codes. Every one may be repeated without harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Control {
    /// An idle node wants to be synchronised, or tells that it is there.
    Hello,
    /// The owner starts a dual generation with the receiver.
    DualStart,
    /// The partner accepted it.
    DualAck,
    /// The owner gave this generation away.
    Yield,
    /// The partner gave its claim on the next generation away.
    Abstain,
    /// The owner asks the partner to abstain.
    DropRequest,
    /// The sender owns the VM alone.
    SoloNotice,
    /// The sender asks the arbiter.
    Arbitrating,
    /// The owner wants to yield: write record and arbiter afresh, for the question in `ack`.
    Prepare,
    /// The partner did.
    Prepared,
}

impl Control {
    /// Every code, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Hello,
        Self::DualStart,
        Self::DualAck,
        Self::Yield,
        Self::Abstain,
        Self::DropRequest,
        Self::SoloNotice,
        Self::Arbitrating,
        Self::Prepare,
        Self::Prepared,
    ];
}

/// Bits of the flags byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Flags(pub u8);

impl Flags {
    /// Could take over.
    pub const CAPABLE: u8 = 1;
    /// Gate open.
    pub const GATE_OPEN: u8 = 2;
    /// A checkpoint is running.
    pub const CHECKPOINT: u8 = 4;
    /// The link to the world is good.
    pub const LINK_GOOD: u8 = 8;
    /// The arbiter answers, and can be written.
    pub const ARBITER: u8 = 16;
    /// The record can be written.
    pub const RECORD: u8 = 32;
    /// The arbiter is the one that the peer sees.
    pub const SHARED: u8 = 64;

    /// Whether all bits of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u8) -> bool {
        self.0 & bits == bits
    }
}

/// How well a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub enum Health {
    /// Well.
    #[default]
    Ok,
    /// Works, but another node would serve better: outside link down, disk errors.
    Degraded,
    /// Must not serve.
    Fatal,
}

/// State of a [`Member`](super::Member), by the numbers of spec ownership 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum MemberState {
    /// 0: just started, or nothing to do.
    #[default]
    Idle,
    /// 1: loading the owner's state.
    Syncing,
    /// 2: partner of an owner, ready to take over.
    Secondary,
    /// 3: owner under leases.
    PrimaryDual,
    /// 4: owner alone.
    PrimarySolo,
    /// 5: owner under a lease that runs out, asking to be owner alone.
    PrimaryArbitrating,
    /// 6: partner that no longer acknowledges, asking to be owner.
    SecondaryArbitrating,
    /// 7: granted, waiting for the old lease to end and the checkpoint in hand to settle.
    TakeoverWait,
    /// 8: not the owner; the VM is paused.
    Fenced,
}

impl MemberState {
    /// Every state, by number.
    pub const ALL: [Self; 9] = [
        Self::Idle,
        Self::Syncing,
        Self::Secondary,
        Self::PrimaryDual,
        Self::PrimarySolo,
        Self::PrimaryArbitrating,
        Self::SecondaryArbitrating,
        Self::TakeoverWait,
        Self::Fenced,
    ];
}

/// A decoded datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Datagram {
    /// What it is for.
    pub kind: Kind,
    /// The path it was sent on.
    pub path: PathId,
    /// The flags.
    pub flags: Flags,
    /// The VM.
    pub vm: VmId,
    /// The sender's generation.
    pub generation: Generation,
    /// Grows with every round of the sender; the copies on all paths share it.
    pub seq: u64,
    /// Ack: the number acknowledged; prepare and prepared: the question. Otherwise the highest own number known to be acknowledged.
    pub ack: u64,
    /// The sender's process instance.
    pub boot: BootId,
    /// The peer's process instance that the sender is paired with.
    pub peer_boot: BootId,
    /// Last epoch committed or applied.
    pub epoch: Epoch,
    /// Progress of the sender's main loop.
    pub progress: u32,
    /// The sender's state.
    pub state: MemberState,
    /// The sender's health.
    pub health: Health,
    /// Digest of the settings that must be the same on both nodes.
    pub settings: u64,
    /// The number that the sender last left in the arbiter's register.
    pub mark: RequestId,
}

/// Why a datagram was dropped. Counted; never an error, since anyone can send bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DatagramError {
    /// Wrong length.
    #[error("heartbeat has {got} bytes, expected 112")]
    Length {
        /// Length found.
        got: usize,
    },
    /// The code does not fit key, bytes and sender.
    #[error("heartbeat code does not verify; both hosts need the same key and node names")]
    Code,
    /// Another protocol or version.
    #[error("heartbeat starts with {magic:#x} version {version}, expected 0x31424843 version 3")]
    Version {
        /// First word found.
        magic: u32,
        /// Version found.
        version: u8,
    },
    /// A field holds a value that this version does not know.
    #[error("heartbeat field {field} holds {got}, which this version does not know")]
    Value {
        /// The field.
        field: &'static str,
        /// The value.
        got: u16,
    },
}

impl Datagram {
    /// The byte form, with the code for `sender`.
    #[must_use]
    pub fn encode(&self, key: MacKey, sender: NodeId) -> [u8; DATAGRAM_SIZE] {
        let mut out = [0; DATAGRAM_SIZE];
        let (kind, control) = match self.kind {
            Kind::Heartbeat => (1, 0),
            Kind::Ack => (2, 0),
            Kind::Control(control) => (3, control_code(control)),
        };
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = VERSION;
        out[5] = kind;
        out[6] = self.path.0;
        out[7] = self.flags.0;
        out[8..24].copy_from_slice(&self.vm.0);
        let words = [
            self.generation.0,
            self.seq,
            self.ack,
            self.boot.0,
            self.peer_boot.0,
            self.epoch.0,
        ];
        for (place, word) in out[24..72].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        out[72..76].copy_from_slice(&self.progress.to_le_bytes());
        out[76] = state_code(self.state);
        out[77] = self.health as u8;
        out[78..80].copy_from_slice(&control.to_le_bytes());
        out[80..88].copy_from_slice(&self.settings.to_le_bytes());
        out[88..96].copy_from_slice(&self.mark.0.to_le_bytes());
        let code = code(key, sender, &out);
        out[MAC_AT..].copy_from_slice(&code);
        out
    }

    /// Reads the byte form and checks the code for `sender`, before anything else is looked at.
    ///
    /// # Errors
    /// Why the datagram must be dropped.
    pub fn decode(key: MacKey, sender: NodeId, bytes: &[u8]) -> Result<Self, DatagramError> {
        let Ok(b) = <&[u8; DATAGRAM_SIZE]>::try_from(bytes) else {
            return Err(DatagramError::Length { got: bytes.len() });
        };
        if !same(&code(key, sender, b), &array(b, MAC_AT)) {
            return Err(DatagramError::Code);
        }
        let magic = u32::from_le_bytes(array(b, 0));
        if (magic, b[4]) != (MAGIC, VERSION) {
            return Err(DatagramError::Version {
                magic,
                version: b[4],
            });
        }
        let unknown = |field, got| DatagramError::Value { field, got };
        let word = |at| u64::from_le_bytes(array(b, at));
        Ok(Self {
            kind: match b[5] {
                1 => Kind::Heartbeat,
                2 => Kind::Ack,
                3 => Kind::Control(control_of(u16::from_le_bytes(array(b, 78)))?),
                got => return Err(unknown("type", got.into())),
            },
            path: PathId(b[6]),
            flags: Flags(b[7]),
            vm: VmId(array(b, 8)),
            generation: Generation(word(24)),
            seq: word(32),
            ack: word(40),
            boot: BootId(word(48)),
            peer_boot: BootId(word(56)),
            epoch: Epoch(word(64)),
            progress: u32::from_le_bytes(array(b, 72)),
            state: state_of(b[76])?,
            health: match b[77] {
                0 => Health::Ok,
                1 => Health::Degraded,
                2 => Health::Fatal,
                got => return Err(unknown("health", got.into())),
            },
            settings: word(80),
            mark: RequestId(word(88)),
        })
    }
}

fn code(key: MacKey, sender: NodeId, bytes: &[u8; DATAGRAM_SIZE]) -> [u8; 16] {
    let mut text = [0; MAC_AT + 8];
    text[..MAC_AT].copy_from_slice(&bytes[..MAC_AT]);
    text[MAC_AT..].copy_from_slice(&sender.0.to_le_bytes());
    mac::code(key, &text)
}

/// `N` bytes at `at`; every caller's `at` is a constant of the layout, inside the 112 bytes.
fn array<const N: usize>(bytes: &[u8; DATAGRAM_SIZE], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn control_code(control: Control) -> u16 {
    control as u16 + 1
}

fn control_of(code: u16) -> Result<Control, DatagramError> {
    Control::ALL
        .into_iter()
        .find(|&c| control_code(c) == code)
        .ok_or(DatagramError::Value {
            field: "control code",
            got: code,
        })
}

const fn state_code(state: MemberState) -> u8 {
    state as u8
}

fn state_of(code: u8) -> Result<MemberState, DatagramError> {
    MemberState::ALL
        .get(usize::from(code))
        .copied()
        .ok_or_else(|| DatagramError::Value {
            field: "state",
            got: code.into(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: MacKey = MacKey([9; 16]);

    fn datagram(kind: Kind, state: MemberState) -> Datagram {
        Datagram {
            kind,
            path: PathId(1),
            flags: Flags(Flags::CAPABLE | Flags::ARBITER),
            vm: VmId([4; 16]),
            generation: Generation(5),
            seq: 6,
            ack: 7,
            boot: BootId(8),
            peer_boot: BootId(9),
            epoch: Epoch(10),
            progress: 11,
            state,
            health: Health::Degraded,
            settings: 12,
            mark: RequestId(13),
        }
    }

    #[test]
    fn every_kind_and_state_reads_back() {
        let kinds = [Kind::Heartbeat, Kind::Ack]
            .into_iter()
            .chain(Control::ALL.map(Kind::Control));
        for kind in kinds {
            for state in MemberState::ALL {
                let sent = datagram(kind, state);
                let bytes = sent.encode(KEY, NodeId(1));
                assert_eq!(Datagram::decode(KEY, NodeId(1), &bytes), Ok(sent));
            }
        }
    }

    #[test]
    fn changed_reflected_and_foreign_datagrams_are_dropped() {
        let bytes = datagram(Kind::Ack, MemberState::Secondary).encode(KEY, NodeId(1));
        for at in 0..DATAGRAM_SIZE {
            let mut changed = bytes;
            changed[at] ^= 0x10;
            let got = Datagram::decode(KEY, NodeId(1), &changed);
            assert_eq!(got, Err(DatagramError::Code), "byte {at}");
        }
        let reflected = Datagram::decode(KEY, NodeId(2), &bytes);
        assert_eq!(reflected, Err(DatagramError::Code));
        let foreign = Datagram::decode(MacKey([1; 16]), NodeId(1), &bytes);
        assert_eq!(foreign, Err(DatagramError::Code));
        let short = Datagram::decode(KEY, NodeId(1), &bytes[1..]);
        assert_eq!(short, Err(DatagramError::Length { got: 111 }));
    }

    #[test]
    fn values_of_a_later_version_are_dropped_not_guessed() {
        let mut bytes = datagram(Kind::Ack, MemberState::Secondary).encode(KEY, NodeId(1));
        bytes[76] = 9;
        let mac = code(KEY, NodeId(1), &bytes);
        bytes[MAC_AT..].copy_from_slice(&mac);
        assert_eq!(
            Datagram::decode(KEY, NodeId(1), &bytes),
            Err(DatagramError::Value {
                field: "state",
                got: 9
            })
        );
    }
}
