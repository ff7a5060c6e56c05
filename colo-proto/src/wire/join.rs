//! The first bytes of every connection: which channel it is, and proof that both ends know the
//! pair's key.
//!
//! ```text
//!   dialler (secondary)                                  acceptor (primary)
//!        │ ◀── challenge: magic, version, nonce ─────────────── │  32 bytes
//!        │ ─── join: channel, VM, boot, nonce, code ──────────▶ │  72 bytes
//!        │ ◀── answer: joined or why not, boot, code ────────── │  32 bytes
//! ```
//!
//! All numbers are little-endian. The dialler's code covers the challenge and the join, the
//! acceptor's covers those and the answer, each under a label of its own: a code can be neither
//! repeated on another connection nor reflected. After `joined` the channel's own protocol begins
//! with the dialler's next byte.
//!
//! This authenticates the ends when a connection is made; it does not protect the bytes that
//! follow. Replication belongs on a network that only the two hosts share.
//!
//! Nonces come from the driver; they must not repeat.

use crate::{
    id::Channel,
    member::{BootId, MacKey, VmId, code as mac, same},
};

/// Version of the native protocol. Both ends must speak the same.
pub const VERSION: u16 = 2;

/// Bytes of a challenge.
pub const CHALLENGE_LEN: usize = 32;
/// Bytes of a join.
pub const JOIN_LEN: usize = 72;
/// Bytes of an answer.
pub const ANSWER_LEN: usize = 32;

const MAGIC: [u8; 4] = *b"COLJ";
const CODE_LEN: usize = 16;

/// A value that is never used twice.
pub type Nonce = [u8; 24];

/// Who this end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The VM that the pair protects.
    pub vm: VmId,
    /// This start of this process.
    pub boot: BootId,
    /// The pair's key.
    pub key: MacKey,
}

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The primary already has a secondary.
    #[error("the primary already has a secondary")]
    Busy,
    /// The code is wrong.
    #[error("the hosts do not have the same key")]
    BadKey,
    /// The other host protects another VM.
    #[error("the other host protects another VM")]
    OtherVm,
    /// The versions differ.
    #[error("the other host speaks another version of the protocol")]
    Version,
    /// The host that was called is not the primary now. Said on both.
    #[error("the host that was called is not the primary now")]
    NotPrimary,
    /// The channel is not configured on the other host.
    #[error("the other host has no such channel; both need the same number of RAM lanes")]
    NoSuchChannel,
    /// The dialler reached itself.
    #[error("the peer's address leads back to this process")]
    Itself,
    /// A reason that this version does not know.
    #[error("refused with code {0}")]
    Other(u8),
}

impl Refusal {
    const fn code(self) -> u8 {
        match self {
            Self::Busy => 1,
            Self::BadKey => 2,
            Self::OtherVm => 3,
            Self::Version => 4,
            Self::NotPrimary => 5,
            Self::NoSuchChannel => 6,
            Self::Itself => 7,
            Self::Other(code) => code,
        }
    }

    const fn from_code(code: u8) -> Self {
        match code {
            1 => Self::Busy,
            2 => Self::BadKey,
            3 => Self::OtherVm,
            4 => Self::Version,
            5 => Self::NotPrimary,
            6 => Self::NoSuchChannel,
            7 => Self::Itself,
            other => Self::Other(other),
        }
    }
}

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// Whatever is there does not speak this protocol.
    #[error("the other end is not colo: it began with {got:02x?}, expected {MAGIC:02x?}")]
    NotColo {
        /// Its first bytes.
        got: [u8; 4],
    },
    /// The other end speaks another version.
    #[error("the other end speaks version {theirs} of the protocol, this one {VERSION}")]
    Version {
        /// The other end's.
        theirs: u16,
    },
    /// This end refused.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The other end refused. Believed without proof: the worst a liar reaches is a retry.
    #[error("refused by the other host: {0}")]
    RefusedByPeer(Refusal),
    /// The answer's code is wrong: the other end does not know the key.
    #[error("the other end could not prove that it knows the key")]
    Unproven,
}

/// What a dialler asked for, proven to know the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// The channel.
    pub channel: Channel,
    /// The dialler's process.
    pub boot: BootId,
}

/// The accepting end of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Acceptor {
    me: Identity,
    challenge: [u8; CHALLENGE_LEN],
}

impl Acceptor {
    /// An end for one connection.
    #[must_use]
    pub fn new(me: Identity, nonce: &Nonce) -> Self {
        let mut challenge = [0; CHALLENGE_LEN];
        Writer::new(&mut challenge)
            .put(&MAGIC)
            .put(&VERSION.to_le_bytes())
            .put(&[0; 2])
            .put(nonce);
        Self { me, challenge }
    }

    /// To be sent first.
    #[must_use]
    pub const fn challenge(&self) -> &[u8; CHALLENGE_LEN] {
        &self.challenge
    }

    /// Judges a join. The caller decides whether there is room for the request and answers with
    /// [`answer`](Self::answer) in either case, except to [`JoinError::NotColo`].
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn judge(&self, join: &[u8; JOIN_LEN]) -> Result<Request, JoinError> {
        let mut fields = Reader(join);
        let magic = fields.take();
        if magic != MAGIC {
            return Err(JoinError::NotColo { got: magic });
        }
        let theirs = u16::from_le_bytes(fields.take());
        if theirs != VERSION {
            return Err(JoinError::Version { theirs });
        }
        let channel: [u8; 2] = fields.take();
        let vm = VmId(fields.take());
        let boot = BootId(u64::from_le_bytes(fields.take()));
        let _nonce: Nonce = fields.take();
        let code: [u8; CODE_LEN] = fields.take();
        if vm != self.me.vm {
            return Err(JoinError::Refused(Refusal::OtherVm));
        }
        if !same(&code, &join_code(self.me.key, &self.challenge, join)) {
            return Err(JoinError::Refused(Refusal::BadKey));
        }
        if boot == self.me.boot {
            return Err(JoinError::Refused(Refusal::Itself));
        }
        let channel = decode_channel(channel).ok_or(JoinError::Refused(Refusal::NoSuchChannel))?;
        Ok(Request { channel, boot })
    }

    /// The answer to a join.
    #[must_use]
    pub fn answer(
        &self,
        join: &[u8; JOIN_LEN],
        verdict: Result<(), JoinError>,
    ) -> [u8; ANSWER_LEN] {
        let verdict = match verdict {
            Ok(()) => 0,
            Err(JoinError::Refused(why) | JoinError::RefusedByPeer(why)) => why.code(),
            Err(JoinError::Version { .. } | JoinError::NotColo { .. }) => Refusal::Version.code(),
            Err(JoinError::Unproven) => Refusal::BadKey.code(),
        };
        let mut answer = [0; ANSWER_LEN];
        Writer::new(&mut answer)
            .put(&MAGIC)
            .put(&VERSION.to_le_bytes())
            .put(&[verdict, 0])
            .put(&self.me.boot.0.to_le_bytes());
        let code = answer_code(self.me.key, &self.challenge, join, &answer);
        Writer::new(&mut answer[ANSWER_LEN - CODE_LEN..]).put(&code);
        answer
    }
}

/// The dialling end of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Dialler {
    me: Identity,
    challenge: [u8; CHALLENGE_LEN],
    join: [u8; JOIN_LEN],
}

impl Dialler {
    /// Takes the acceptor's challenge; what is to be sent then is [`join`](Self::join).
    ///
    /// # Errors
    /// When the other end does not speak this protocol, or another version of it.
    pub fn new(
        me: Identity,
        channel: Channel,
        nonce: &Nonce,
        challenge: &[u8; CHALLENGE_LEN],
    ) -> Result<Self, JoinError> {
        let mut fields = Reader(challenge);
        let magic = fields.take();
        if magic != MAGIC {
            return Err(JoinError::NotColo { got: magic });
        }
        let theirs = u16::from_le_bytes(fields.take());
        if theirs != VERSION {
            return Err(JoinError::Version { theirs });
        }
        let mut join = [0; JOIN_LEN];
        Writer::new(&mut join)
            .put(&MAGIC)
            .put(&VERSION.to_le_bytes())
            .put(&encode_channel(channel))
            .put(&me.vm.0)
            .put(&me.boot.0.to_le_bytes())
            .put(nonce);
        let code = join_code(me.key, challenge, &join);
        Writer::new(&mut join[JOIN_LEN - CODE_LEN..]).put(&code);
        Ok(Self {
            me,
            challenge: *challenge,
            join,
        })
    }

    /// To be sent.
    #[must_use]
    pub const fn join(&self) -> &[u8; JOIN_LEN] {
        &self.join
    }

    /// Judges the answer; yields the acceptor's process.
    ///
    /// # Errors
    /// When the other end refused or does not know the key.
    pub fn joined(&self, answer: &[u8; ANSWER_LEN]) -> Result<BootId, JoinError> {
        let mut fields = Reader(answer);
        let magic = fields.take();
        if magic != MAGIC {
            return Err(JoinError::NotColo { got: magic });
        }
        let _version: [u8; 2] = fields.take();
        let [verdict, _] = fields.take();
        let boot = BootId(u64::from_le_bytes(fields.take()));
        let code: [u8; CODE_LEN] = fields.take();
        if verdict != 0 {
            return Err(JoinError::RefusedByPeer(Refusal::from_code(verdict)));
        }
        if !same(
            &code,
            &answer_code(self.me.key, &self.challenge, &self.join, answer),
        ) {
            return Err(JoinError::Unproven);
        }
        Ok(boot)
    }
}

const fn encode_channel(channel: Channel) -> [u8; 2] {
    match channel {
        Channel::Control => [0, 0],
        Channel::Ram(lane) => [1, lane],
        Channel::Net => [2, 0],
        Channel::Disk => [3, 0],
    }
}

const fn decode_channel(bytes: [u8; 2]) -> Option<Channel> {
    match bytes {
        [0, 0] => Some(Channel::Control),
        [1, lane] => Some(Channel::Ram(lane)),
        [2, 0] => Some(Channel::Net),
        [3, 0] => Some(Channel::Disk),
        _ => None,
    }
}

fn join_code(
    key: MacKey,
    challenge: &[u8; CHALLENGE_LEN],
    join: &[u8; JOIN_LEN],
) -> [u8; CODE_LEN] {
    let mut text = [0; 8 + CHALLENGE_LEN + JOIN_LEN - CODE_LEN];
    Writer::new(&mut text)
        .put(b"colojoin")
        .put(challenge)
        .put(&join[..JOIN_LEN - CODE_LEN]);
    mac(key, &text)
}

fn answer_code(
    key: MacKey,
    challenge: &[u8; CHALLENGE_LEN],
    join: &[u8; JOIN_LEN],
    answer: &[u8; ANSWER_LEN],
) -> [u8; CODE_LEN] {
    let mut text = [0; 8 + CHALLENGE_LEN + JOIN_LEN + ANSWER_LEN - CODE_LEN];
    Writer::new(&mut text)
        .put(b"coloansw")
        .put(challenge)
        .put(join)
        .put(&answer[..ANSWER_LEN - CODE_LEN]);
    mac(key, &text)
}

/// Puts fields one after the other into a buffer made for them.
struct Writer<'a> {
    to: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    const fn new(to: &'a mut [u8]) -> Self {
        Self { to, at: 0 }
    }

    fn put(&mut self, field: &[u8]) -> &mut Self {
        let end = self.at + field.len();
        self.to[self.at..end].copy_from_slice(field);
        self.at = end;
        self
    }
}

/// Takes fixed fields off a message whose type says that they are there.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        if let Some((head, rest)) = self.0.split_at_checked(N) {
            field.copy_from_slice(head);
            self.0 = rest;
        }
        field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: MacKey = MacKey([7; 16]);
    const VM: VmId = VmId([1; 16]);

    fn end(boot: u64) -> Identity {
        Identity {
            vm: VM,
            boot: BootId(boot),
            key: KEY,
        }
    }

    fn dial(me: Identity, acceptor: &Acceptor) -> Dialler {
        Dialler::new(me, Channel::Ram(3), &[5; 24], acceptor.challenge()).unwrap()
    }

    #[test]
    fn ends_that_share_a_key_learn_each_other_and_the_channel() {
        let acceptor = Acceptor::new(end(1), &[9; 24]);
        let dialler = dial(end(2), &acceptor);
        let request = acceptor.judge(dialler.join()).unwrap();
        assert_eq!(request.channel, Channel::Ram(3));
        assert_eq!(request.boot, BootId(2));
        let answer = acceptor.answer(dialler.join(), Ok(()));
        assert_eq!(dialler.joined(&answer), Ok(BootId(1)));
    }

    #[test]
    fn a_join_is_good_for_its_own_challenge_only() {
        let first = Acceptor::new(end(1), &[9; 24]);
        let replayed = *dial(end(2), &first).join();
        let second = Acceptor::new(end(1), &[10; 24]);
        assert_eq!(
            second.judge(&replayed),
            Err(JoinError::Refused(Refusal::BadKey))
        );
    }

    #[test]
    fn each_misfit_has_its_reason() {
        let acceptor = Acceptor::new(end(1), &[9; 24]);
        let other_key = Identity {
            key: MacKey([8; 16]),
            ..end(2)
        };
        let other_vm = Identity {
            vm: VmId([2; 16]),
            ..end(2)
        };
        for (me, why) in [
            (other_key, Refusal::BadKey),
            (other_vm, Refusal::OtherVm),
            (end(1), Refusal::Itself),
        ] {
            let dialler = dial(me, &acceptor);
            let verdict = acceptor.judge(dialler.join());
            assert_eq!(verdict, Err(JoinError::Refused(why)));
            let answer = acceptor.answer(dialler.join(), verdict.map(|_| ()));
            assert_eq!(dialler.joined(&answer), Err(JoinError::RefusedByPeer(why)));
        }
    }

    #[test]
    fn an_acceptor_without_the_key_is_found_out() {
        let impostor = Acceptor::new(
            Identity {
                key: MacKey([8; 16]),
                ..end(1)
            },
            &[9; 24],
        );
        let dialler = dial(end(2), &impostor);
        let answer = impostor.answer(dialler.join(), Ok(()));
        assert_eq!(dialler.joined(&answer), Err(JoinError::Unproven));
    }

    #[test]
    fn every_flipped_bit_of_a_join_is_noticed() {
        let acceptor = Acceptor::new(end(1), &[9; 24]);
        let good = *dial(end(2), &acceptor).join();
        for bit in 0..JOIN_LEN * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            acceptor.judge(&bad).unwrap_err();
        }
    }

    #[test]
    fn strangers_and_other_versions_are_told_apart() {
        let acceptor = Acceptor::new(end(1), &[9; 24]);
        let mut join = *dial(end(2), &acceptor).join();
        join[4] = 9;
        assert_eq!(acceptor.judge(&join), Err(JoinError::Version { theirs: 9 }));
        let mut http = [0; CHALLENGE_LEN];
        http[..4].copy_from_slice(b"HTTP");
        let met = Dialler::new(end(2), Channel::Control, &[5; 24], &http).unwrap_err();
        assert_eq!(met, JoinError::NotColo { got: *b"HTTP" });
    }
}
