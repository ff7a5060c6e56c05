//! What survives a crash: a node's own record, and the arbiter's register.
//!
//! [`Register::cast`] is the whole arbiter as a pure function; a witness process, a file under a
//! lock and the tests all call it. Both types have a byte form of fixed size with a checksum, so
//! that a torn write is told from a record.

use super::{NodeId, RequestId, VmId, mac};
use crate::id::Generation;

/// Who may own the VM in a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// The owner serves under leases from its partner; either of the two may ask for the next
    /// generation.
    Dual,
    /// The owner serves alone and only it may ask for the next generation.
    Solo,
}

/// The arbiter's register, one per VM. Generation 0 is a register never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Register {
    /// Grows by one with every grant.
    pub generation: Generation,
    /// Dual or solo.
    pub mode: Option<Mode>,
    /// The owner.
    pub owner: NodeId,
    /// The other node of a dual generation; zero in a solo one.
    pub partner: NodeId,
    /// The request that wrote this.
    pub request: RequestId,
    /// The last read, which leaves its number here: whoever finds it sees the same register as the
    /// reader, and the reader has seen that it can be written.
    pub mark: RequestId,
}

/// A request for the next generation: compare-and-swap, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ballot {
    /// Names the request over all repetitions.
    pub request: RequestId,
    /// Who asks.
    pub caller: NodeId,
    /// The generation that must be current.
    pub expect: Generation,
    /// The mode asked for.
    pub mode: Mode,
    /// The owner asked for: the caller, or the peer to hand the VM back.
    pub owner: NodeId,
    /// The partner in dual mode, else zero.
    pub partner: NodeId,
    /// An operator vouches that the owner is off: the caller need not be entitled.
    pub force: bool,
}

/// The arbiter's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// The ballot is the current register.
    Granted(Register),
    /// Somebody else's is.
    Denied(Register),
    /// Answer to [`ReadRegister`](super::MemberOutput::ReadRegister).
    Read(Register),
    /// No answer. The ballot may yet have been, or yet be, applied.
    Unreachable,
}

impl Register {
    /// Applies a ballot: granted iff the generation is the expected one and the caller is the
    /// owner or the dual partner, or if this very request wrote the register.
    pub fn cast(&mut self, ballot: &Ballot) -> Verdict {
        if self.generation != Generation(0) && self.request == ballot.request {
            return Verdict::Granted(*self);
        }
        let entitled = ballot.force
            || self.generation == Generation(0)
            || self.owner == ballot.caller
            || (self.mode == Some(Mode::Dual) && self.partner == ballot.caller);
        if self.generation != ballot.expect || !entitled {
            return Verdict::Denied(*self);
        }
        *self = Self {
            mark: self.mark,
            ..ballot.outcome()
        };
        Verdict::Granted(*self)
    }

    /// Answers a read, and leaves its number in the register for the next one to find. An arbiter
    /// writes the register durably before it answers, as after a ballot: what it cannot write, it
    /// could not grant.
    pub const fn read(&mut self, request: RequestId) -> Verdict {
        let found = *self;
        self.mark = request;
        Verdict::Read(found)
    }

    /// Whether `node` owns the VM alone.
    #[must_use]
    pub fn is_solo_of(&self, node: NodeId) -> bool {
        self.mode == Some(Mode::Solo) && self.owner == node
    }

    /// Bytes of an encoded register.
    pub const SIZE: usize = 64;

    /// The byte form.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        let mut w = Writer(&mut out);
        w.u32(REGISTER_MAGIC).u32(1);
        w.u64(self.generation.0).u64(mode_code(self.mode));
        w.u64(self.owner.0).u64(self.partner.0).u64(self.request.0);
        w.u64(self.mark.0);
        seal(&mut out);
        out
    }

    /// Reads the byte form.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = open(bytes, Self::SIZE, REGISTER_MAGIC)?;
        Ok(Self {
            generation: Generation(r.u64()),
            mode: mode_of(r.u64())?,
            owner: NodeId(r.u64()),
            partner: NodeId(r.u64()),
            request: RequestId(r.u64()),
            mark: RequestId(r.u64()),
        })
    }
}

impl Ballot {
    /// The register after this ballot was granted.
    #[must_use]
    pub const fn outcome(&self) -> Register {
        Register {
            generation: self.expect.next(),
            mode: Some(self.mode),
            owner: self.owner,
            partner: self.partner,
            request: self.request,
            mark: RequestId(0),
        }
    }
}

/// What a node was when it last spoke for itself. Decides what a restart may conclude.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PriorRole {
    /// Owner under leases: everything it let out, the partner has.
    DualOwner,
    /// Partner of an owner.
    DualPartner,
    /// Owner alone: what it let out, nobody else has.
    Solo,
}

/// What a node has claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Claim {
    /// Nothing yet.
    #[default]
    None,
    /// Owner of a dual generation.
    DualOwner,
    /// Partner in a dual generation.
    DualPartner,
    /// A ballot may have been cast and its answer is not known.
    Arbitrating {
        /// The ballot, to be repeated exactly.
        ballot: Ballot,
        /// What the node was when it cast it.
        from: PriorRole,
    },
    /// Granted, gate not opened yet.
    Granted,
    /// Owner alone.
    Solo,
    /// Gave the VM away: never again opens its gate under this generation.
    Yielded,
    /// Gave its claim away: never asks for the generation after this one.
    Abstained,
    /// The state here is old.
    Stale,
    /// The state here is being loaded.
    Syncing,
}

/// A node's persisted record (spec ownership 6). The driver writes it durably and holds
/// an exclusive lock on it for as long as the process runs (assumption A5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Record {
    /// The VM.
    pub vm: VmId,
    /// This node.
    pub node: NodeId,
    /// The other node.
    pub peer: NodeId,
    /// The arbiter that was used.
    pub arbiter: u64,
    /// The generation `claim` is about.
    pub generation: Generation,
    /// The claim.
    pub claim: Claim,
    /// The highest generation abstained from.
    pub abstained: Generation,
    /// The highest generation ever seen in the arbiter's register. An arbiter that shows less was
    /// restored from an old backup.
    pub seen: Generation,
}

/// Bytes that are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Wrong length.
    #[error("record has {got} bytes, expected {expected}")]
    Length {
        /// Length found.
        got: usize,
        /// Length of this kind of record.
        expected: usize,
    },
    /// Not this kind of record, or another version of it.
    #[error("record starts with {got:#x}, expected {expected:#x} version 1")]
    Magic {
        /// First word found.
        got: u32,
        /// First word of this kind of record.
        expected: u32,
    },
    /// Torn or damaged.
    #[error("record checksum is {got:#x}, expected {expected:#x}; restore it or re-seed the pair")]
    Checksum {
        /// Checksum stored.
        got: u64,
        /// Checksum computed.
        expected: u64,
    },
    /// A field holds a value that this version does not know.
    #[error("record field {field} holds {got}, which this version does not know")]
    Value {
        /// The field.
        field: &'static str,
        /// The value.
        got: u64,
    },
}

impl Record {
    /// Bytes of an encoded record.
    pub const SIZE: usize = 160;

    /// The byte form.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        let mut w = Writer(&mut out);
        w.u32(RECORD_MAGIC).u32(1).bytes(&self.vm.0);
        w.u64(self.node.0).u64(self.peer.0).u64(self.arbiter);
        w.u64(self.generation.0)
            .u64(self.abstained.0)
            .u64(self.seen.0);
        w.u64(match self.claim {
            Claim::None => 0,
            Claim::DualOwner => 1,
            Claim::DualPartner => 2,
            Claim::Arbitrating { .. } => 3,
            Claim::Granted => 4,
            Claim::Solo => 5,
            Claim::Yielded => 6,
            Claim::Abstained => 7,
            Claim::Stale => 8,
            Claim::Syncing => 9,
        });
        if let Claim::Arbitrating { ballot, from } = self.claim {
            w.u64(match from {
                PriorRole::DualOwner => 0,
                PriorRole::DualPartner => 1,
                PriorRole::Solo => 2,
            });
            w.u64(ballot.request.0).u64(ballot.caller.0);
            w.u64(ballot.expect.0).u64(mode_code(Some(ballot.mode)));
            w.u64(ballot.owner.0).u64(ballot.partner.0);
            w.u64(u64::from(ballot.force));
        }
        seal(&mut out);
        out
    }

    /// Reads the byte form.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = open(bytes, Self::SIZE, RECORD_MAGIC)?;
        let vm = VmId(r.array());
        let (node, peer, arbiter) = (NodeId(r.u64()), NodeId(r.u64()), r.u64());
        let generation = Generation(r.u64());
        let (abstained, seen) = (Generation(r.u64()), Generation(r.u64()));
        let claim = match r.u64() {
            0 => Claim::None,
            1 => Claim::DualOwner,
            2 => Claim::DualPartner,
            3 => {
                let from = match r.u64() {
                    0 => PriorRole::DualOwner,
                    1 => PriorRole::DualPartner,
                    2 => PriorRole::Solo,
                    got => {
                        return Err(RecordError::Value {
                            field: "footing",
                            got,
                        });
                    }
                };
                let (request, caller) = (RequestId(r.u64()), NodeId(r.u64()));
                let expect = Generation(r.u64());
                let mode = mode_of(r.u64())?.ok_or(RecordError::Value {
                    field: "mode",
                    got: 0,
                })?;
                let ballot = Ballot {
                    request,
                    caller,
                    expect,
                    mode,
                    owner: NodeId(r.u64()),
                    partner: NodeId(r.u64()),
                    force: r.u64() != 0,
                };
                Claim::Arbitrating { ballot, from }
            }
            4 => Claim::Granted,
            5 => Claim::Solo,
            6 => Claim::Yielded,
            7 => Claim::Abstained,
            8 => Claim::Stale,
            9 => Claim::Syncing,
            got => {
                return Err(RecordError::Value {
                    field: "claim",
                    got,
                });
            }
        };
        Ok(Self {
            vm,
            node,
            peer,
            arbiter,
            generation,
            claim,
            abstained,
            seen,
        })
    }
}

const RECORD_MAGIC: u32 = 0x5243_4c43;
const REGISTER_MAGIC: u32 = 0x4752_4c43;

fn mode_code(mode: Option<Mode>) -> u64 {
    match mode {
        None => 0,
        Some(Mode::Dual) => 1,
        Some(Mode::Solo) => 2,
    }
}

fn mode_of(code: u64) -> Result<Option<Mode>, RecordError> {
    match code {
        0 => Ok(None),
        1 => Ok(Some(Mode::Dual)),
        2 => Ok(Some(Mode::Solo)),
        got => Err(RecordError::Value { field: "mode", got }),
    }
}

fn seal(out: &mut [u8]) {
    let (body, tail) = out.split_at_mut(out.len().saturating_sub(8));
    Writer(tail).u64(mac::checksum(body));
}

fn open(bytes: &[u8], expected: usize, magic: u32) -> Result<Reader<'_>, RecordError> {
    if bytes.len() != expected {
        return Err(RecordError::Length {
            got: bytes.len(),
            expected,
        });
    }
    let mut r = Reader(bytes);
    let got = r.u32();
    if got != magic || r.u32() != 1 {
        return Err(RecordError::Magic {
            got,
            expected: magic,
        });
    }
    let (body, tail) = bytes.split_at(expected - 8);
    let (got, expected) = (Reader(tail).u64(), mac::checksum(body));
    if got != expected {
        return Err(RecordError::Checksum { got, expected });
    }
    Ok(r)
}

/// Little-endian fields one after the other. The sizes of the buffers are constants above, chosen
/// to fit; what would not fit is cut, never a panic.
struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let (head, tail) = core::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = tail;
        self
    }

    fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }

    fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }
}

/// The counterpart of [`Writer`]; reads zeros past the end.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let Some((head, tail)) = self.0.split_first_chunk::<N>() else {
            return [0; N];
        };
        self.0 = tail;
        *head
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);

    fn ballot(caller: NodeId, expect: u64, mode: Mode, request: u64) -> Ballot {
        Ballot {
            request: RequestId(request),
            caller,
            expect: Generation(expect),
            mode,
            owner: caller,
            partner: if mode == Mode::Dual { B } else { NodeId(0) },
            force: false,
        }
    }

    #[test]
    fn a_generation_is_granted_once() {
        let mut register = Register::default();
        let dual = ballot(A, 0, Mode::Dual, 7);
        assert_eq!(register.cast(&dual), Verdict::Granted(dual.outcome()));
        let mine = ballot(A, 1, Mode::Solo, 8);
        let theirs = ballot(B, 1, Mode::Solo, 9);
        assert_eq!(register.cast(&theirs), Verdict::Granted(theirs.outcome()));
        assert_eq!(register.cast(&mine), Verdict::Denied(theirs.outcome()));
        assert_eq!(
            register.cast(&theirs),
            Verdict::Granted(theirs.outcome()),
            "repeated"
        );
        assert_eq!(register.generation, Generation(2));
    }

    #[test]
    fn only_the_owner_changes_a_solo_register_and_may_name_the_peer() {
        let mut register = Register::default();
        register.cast(&ballot(A, 0, Mode::Solo, 1));
        assert!(matches!(
            register.cast(&ballot(B, 1, Mode::Solo, 2)),
            Verdict::Denied(_)
        ));
        let back = Ballot {
            owner: B,
            ..ballot(A, 1, Mode::Solo, 3)
        };
        assert!(matches!(register.cast(&back), Verdict::Granted(_)));
        assert!(register.is_solo_of(B));
    }

    #[test]
    fn an_operator_may_take_the_register_from_an_owner_that_is_off_and_once() {
        let mut register = Register::default();
        register.cast(&ballot(A, 0, Mode::Solo, 1));
        let forced = Ballot {
            force: true,
            ..ballot(B, 1, Mode::Solo, 2)
        };
        assert!(matches!(register.cast(&forced), Verdict::Granted(_)));
        assert!(register.is_solo_of(B));
        let late = Ballot {
            force: true,
            ..ballot(A, 1, Mode::Solo, 3)
        };
        assert!(matches!(register.cast(&late), Verdict::Denied(_)));
    }

    #[test]
    fn both_byte_forms_read_back_and_damage_is_found() {
        let record = Record {
            vm: VmId([3; 16]),
            node: A,
            peer: B,
            arbiter: 5,
            generation: Generation(9),
            claim: Claim::Arbitrating {
                ballot: ballot(A, 9, Mode::Dual, 77),
                from: PriorRole::Solo,
            },
            abstained: Generation(4),
            seen: Generation(8),
        };
        let bytes = record.encode();
        assert_eq!(Record::decode(&bytes), Ok(record));
        let register = ballot(A, 9, Mode::Dual, 77).outcome();
        assert_eq!(Register::decode(&register.encode()), Ok(register));
        for at in 0..Record::SIZE {
            let mut torn = bytes;
            torn[at] ^= 1;
            assert!(Record::decode(&torn).is_err(), "byte {at}");
        }
        assert!(matches!(
            Record::decode(&bytes[..100]),
            Err(RecordError::Length { got: 100, .. })
        ));
    }
}
