//! One join handshake, from either end: a socket, a phase, and what is half sent or half read.

use std::io::{self, Read, Write};

use core::time::Duration;

use colo_proto::{
    id::Channel,
    member::BootId,
    time::Instant,
    wire::join::{
        ANSWER_LEN, Acceptor, CHALLENGE_LEN, Dialler, Identity, JOIN_LEN, JoinError, Refusal,
        Request,
    },
};
use mio::Token;

use super::{connect::nonce, stream::Stream};

/// Why a channel could not be connected, or why a caller was sent away.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// No address to dial.
    #[error("no address of the peer is configured")]
    NoPeer,
    /// The network said no.
    #[error("{at}: {source}")]
    Io {
        /// The address.
        at: String,
        /// What the network said.
        source: io::Error,
    },
    /// Nobody answered in time.
    #[error("{at}: no answer for {waited:?}")]
    Silent {
        /// The address.
        at: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The connection ended in the handshake.
    #[error("{at}: the connection ended in the handshake")]
    Ended {
        /// The address.
        at: String,
    },
    /// The handshake failed.
    #[error("{at}: {source}")]
    Join {
        /// The address.
        at: String,
        /// Why.
        source: JoinError,
    },
}

/// One handshake.
#[derive(Debug)]
pub(super) struct Hand {
    pub(super) token: Token,
    pub(super) stream: Stream,
    pub(super) at: String,
    pub(super) until: Instant,
    pub(super) phase: Phase,
    pub(super) out: Vec<u8>,
    pub(super) got: Vec<u8>,
}

#[derive(Debug)]
pub(super) enum Phase {
    /// Dialler: the network is still connecting.
    Connecting(Channel),
    AwaitChallenge(Channel),
    AwaitAnswer(Channel, Box<Dialler>),
    /// Acceptor.
    AwaitJoin(Box<Acceptor>),
    /// Acceptor: refused; what is left of the answer is being sent.
    Refusing(JoinError),
    /// Acceptor: what is left of the answer is being sent.
    Accepting(Request),
}

/// What one step of a handshake yields.
pub(super) enum Step {
    Wait,
    Joined(Channel, BootId),
    Failed(ConnectError),
}

impl Hand {
    /// The channel, where this end dialled.
    pub(super) const fn dialled(&self) -> Option<Channel> {
        match &self.phase {
            Phase::Connecting(channel)
            | Phase::AwaitChallenge(channel)
            | Phase::AwaitAnswer(channel, _) => Some(*channel),
            Phase::AwaitJoin(_) | Phase::Refusing(_) | Phase::Accepting(_) => None,
        }
    }

    /// The caller that is being told that it joined.
    pub(super) const fn accepted(&self) -> Option<BootId> {
        match &self.phase {
            Phase::Accepting(request) => Some(request.boot),
            _ => None,
        }
    }

    /// Goes on as far as the socket allows.
    pub(super) fn step(
        &mut self,
        me: Identity,
        channels: &[Channel],
        admit: &impl Fn(&Request) -> Result<(), Refusal>,
    ) -> Step {
        match self.try_step(me, channels, admit) {
            Ok(step) => step,
            // A reset is how the kernel closes for a caller that left without reading.
            Err(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::ConnectionReset
                        | io::ErrorKind::BrokenPipe
                ) =>
            {
                Step::Failed(ConnectError::Ended {
                    at: self.at.clone(),
                })
            }
            Err(source) => Step::Failed(ConnectError::Io {
                at: self.at.clone(),
                source,
            }),
        }
    }

    fn try_step(
        &mut self,
        me: Identity,
        channels: &[Channel],
        admit: &impl Fn(&Request) -> Result<(), Refusal>,
    ) -> io::Result<Step> {
        loop {
            if let Phase::Connecting(channel) = self.phase {
                if !self.stream.connected()? {
                    return Ok(Step::Wait);
                }
                self.phase = Phase::AwaitChallenge(channel);
            }
            if !self.flush()? {
                return Ok(Step::Wait);
            }
            match &self.phase {
                Phase::Connecting(_) => {}
                Phase::Refusing(why) => return Ok(self.failed(*why)),
                Phase::Accepting(request) => {
                    return Ok(Step::Joined(request.channel, request.boot));
                }
                Phase::AwaitChallenge(channel) => {
                    let channel = *channel;
                    let Some(challenge) = self.fill::<CHALLENGE_LEN>()? else {
                        return Ok(Step::Wait);
                    };
                    match Dialler::new(me, channel, &nonce(), &challenge) {
                        Ok(dialler) => {
                            self.out = dialler.join().to_vec();
                            self.phase = Phase::AwaitAnswer(channel, Box::new(dialler));
                        }
                        Err(why) => return Ok(self.failed(why)),
                    }
                }
                Phase::AwaitAnswer(channel, dialler) => {
                    let (channel, dialler) = (*channel, dialler.clone());
                    let Some(answer) = self.fill::<ANSWER_LEN>()? else {
                        return Ok(Step::Wait);
                    };
                    return Ok(match dialler.joined(&answer) {
                        Ok(peer) => Step::Joined(channel, peer),
                        Err(why) => self.failed(why),
                    });
                }
                Phase::AwaitJoin(acceptor) => {
                    let acceptor = acceptor.clone();
                    let Some(join) = self.fill::<JOIN_LEN>()? else {
                        return Ok(Step::Wait);
                    };
                    let verdict = acceptor.judge(&join).and_then(|request| {
                        let known = channels.contains(&request.channel);
                        known
                            .then_some(())
                            .ok_or(Refusal::NoSuchChannel)
                            .and_then(|()| admit(&request))
                            .map_err(JoinError::Refused)?;
                        Ok(request)
                    });
                    if let Err(why @ JoinError::NotColo { .. }) = verdict {
                        return Ok(self.failed(why));
                    }
                    self.out = acceptor.answer(&join, verdict.map(|_| ())).to_vec();
                    self.phase = match verdict {
                        Ok(request) => Phase::Accepting(request),
                        Err(why) => Phase::Refusing(why),
                    };
                }
            }
        }
    }

    fn failed(&self, source: JoinError) -> Step {
        Step::Failed(ConnectError::Join {
            at: self.at.clone(),
            source,
        })
    }

    /// Sends what is waiting; `false` when the socket is full.
    fn flush(&mut self) -> io::Result<bool> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(sent) => drop(self.out.drain(..sent)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Reads up to `N` bytes in all, never more: what follows belongs to the channel.
    fn fill<const N: usize>(&mut self) -> io::Result<Option<[u8; N]>> {
        let mut into = [0; N];
        while self.got.len() < N {
            let missing = N - self.got.len();
            match self.stream.read(&mut into[..missing]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => self.got.extend_from_slice(&into[..got]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        into.copy_from_slice(&self.got);
        self.got.clear();
        Ok(Some(into))
    }
}
