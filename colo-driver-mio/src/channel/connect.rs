//! Listening, dialling and the join handshake: how a socket becomes a channel.
//!
//! The machine says when a channel is to be dialled; this file adds the pace (a failed attempt
//! makes the next one wait, longer each time, with jitter, so that two hosts do not knock in step)
//! and the proof of identity ([`colo_proto::wire::join`]). A handshake has a deadline, and
//! unknown callers are few at a time, so that strangers can hold neither descriptors nor the loop.

use core::time::Duration;
use std::{
    collections::{BTreeMap, VecDeque},
    io,
};

use colo_proto::{
    id::Channel,
    member::BootId,
    time::Instant,
    wire::join::{Acceptor, Identity, Nonce, Refusal, Request},
};
use mio::{Interest, Registry, Token};
use rustix::rand::{GetRandomFlags, getrandom};

use super::{
    hand::{ConnectError, Hand, Phase, Step},
    stream::{Listener, Stream},
};
use crate::Endpoint;

/// From the first packet to the answer.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// First and longest pause after a failed attempt.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// A connection that lasted this long was a good one: the next attempt waits the shortest time.
const LASTED: Duration = Duration::from_secs(1);
/// Most callers in a handshake.
const CALLERS_MOST: usize = 32;

/// What came of connecting.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// A channel is joined.
    Joined {
        channel: Channel,
        peer: BootId,
        token: Token,
        stream: Stream,
    },
    /// A channel that was dialled is not.
    Failed(Channel, ConnectError),
    /// A caller was sent away.
    Turned(ConnectError),
}

/// Makes channels.
#[derive(Debug)]
pub(crate) struct Connector {
    registry: Registry,
    me: Identity,
    channels: Vec<Channel>,
    listener: Option<Listener>,
    listening: Token,
    peer: Option<Endpoint>,
    dials: BTreeMap<Channel, Dial>,
    hands: Vec<Hand>,
    outcomes: VecDeque<Outcome>,
    next_token: usize,
}

/// The pace of one channel's attempts.
#[derive(Debug)]
struct Dial {
    /// When to connect, if it was asked for and is not being done.
    due: Option<Instant>,
    not_before: Instant,
    wait: Duration,
}

impl Connector {
    pub(crate) fn new(
        registry: &Registry,
        me: Identity,
        channels: Vec<Channel>,
        peer: Option<Endpoint>,
        listening: Token,
        first_token: usize,
    ) -> io::Result<Self> {
        Ok(Self {
            registry: registry.try_clone()?,
            me,
            channels,
            listener: None,
            listening,
            peer,
            dials: BTreeMap::new(),
            hands: Vec::new(),
            outcomes: VecDeque::new(),
            next_token: first_token,
        })
    }

    pub(crate) fn listen(&mut self, at: &Endpoint) -> io::Result<()> {
        self.listener = Some(Listener::bind(at, &self.registry, self.listening)?);
        Ok(())
    }

    /// Where this host listens.
    pub(crate) fn local(&self) -> Option<Endpoint> {
        self.listener.as_ref().and_then(Listener::local)
    }

    /// Connects a channel as soon as its pace allows.
    pub(crate) fn dial(&mut self, channel: Channel, now: Instant) {
        let dial = self.dials.entry(channel).or_insert(Dial {
            due: None,
            not_before: Instant::ZERO,
            wait: BACK_OFF.0,
        });
        dial.due = Some(dial.not_before.max(now));
    }

    /// Gives up an attempt that the machine no longer wants.
    pub(crate) fn forget(&mut self, channel: Channel) {
        if let Some(dial) = self.dials.get_mut(&channel) {
            dial.due = None;
        }
        self.hands.retain(|hand| hand.dialled() != Some(channel));
    }

    /// A channel ended that stood since `since`: the pace of the next attempt follows from that.
    pub(crate) fn ended(&mut self, channel: Channel, since: Instant, now: Instant) {
        if now.since(since) >= LASTED
            && let Some(dial) = self.dials.get_mut(&channel)
        {
            dial.wait = BACK_OFF.0;
            dial.not_before = Instant::ZERO;
        } else {
            self.slow_down(channel, now);
        }
    }

    pub(crate) fn poll(&mut self) -> Option<Outcome> {
        self.outcomes.pop_front()
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        let dials = self.dials.values().filter_map(|dial| dial.due);
        let hands = self.hands.iter().map(|hand| hand.until);
        dials.chain(hands).min()
    }

    /// Begins what is due and ends what is overdue.
    pub(crate) fn expire(&mut self, now: Instant) {
        let due: Vec<_> = self
            .dials
            .iter_mut()
            .filter(|(_, dial)| dial.due.is_some_and(|due| due <= now))
            .map(|(channel, dial)| {
                dial.due = None;
                *channel
            })
            .collect();
        for channel in due {
            if let Err(error) = self.connect(channel, now) {
                self.fail(channel, error, now);
            }
        }
        while let Some(at) = self.hands.iter().position(|hand| hand.until <= now) {
            let hand = self.hands.swap_remove(at);
            let error = ConnectError::Silent {
                at: hand.at.clone(),
                waited: HANDSHAKE,
            };
            self.end(&hand, error, now);
        }
    }

    /// Notes an event. `admit` says whether there is room for a caller that has proven itself.
    /// `false` when the token is none of ours.
    pub(crate) fn ready(
        &mut self,
        token: Token,
        now: Instant,
        admit: impl Fn(&Request) -> Result<(), Refusal>,
    ) -> bool {
        if token == self.listening {
            self.accept(now);
            return true;
        }
        let Some(at) = self.hands.iter().position(|hand| hand.token == token) else {
            return false;
        };
        // Somebody may have been told "joined" who is not attached yet: that place is taken.
        let promised = self.promised();
        let admit = |caller: &Request| match promised {
            Some(boot) if boot != caller.boot => Err(Refusal::Busy),
            _ => admit(caller),
        };
        let step = self.hands[at].step(self.me, &self.channels, &admit);
        match step {
            Step::Wait => {}
            Step::Joined(channel, peer) => {
                let hand = self.hands.swap_remove(at);
                self.outcomes.push_back(Outcome::Joined {
                    channel,
                    peer,
                    token: hand.token,
                    stream: hand.stream,
                });
            }
            Step::Failed(error) => {
                let hand = self.hands.swap_remove(at);
                self.end(&hand, error, now);
            }
        }
        true
    }

    /// The process that was told that it joined, and of which the loop does not know yet.
    fn promised(&self) -> Option<BootId> {
        let told = self.outcomes.iter().find_map(|outcome| match outcome {
            Outcome::Joined { peer, .. } => Some(*peer),
            _ => None,
        });
        told.or_else(|| self.hands.iter().find_map(Hand::accepted))
    }

    fn connect(&mut self, channel: Channel, now: Instant) -> Result<(), ConnectError> {
        let peer = self.peer.clone().ok_or(ConnectError::NoPeer)?;
        let io = |source| ConnectError::Io {
            at: peer.to_string(),
            source,
        };
        let stream = Stream::dial(&peer).map_err(io)?;
        self.begin(stream, peer.to_string(), Phase::Connecting(channel), now)
            .map_err(io)
    }

    fn accept(&mut self, now: Instant) {
        loop {
            let Some(listener) = &self.listener else {
                return;
            };
            match listener.accept() {
                Ok(stream) => {
                    if self.hands.len() >= CALLERS_MOST {
                        // The oldest is the likeliest to be a stranger that says nothing.
                        if let Some(at) = self.hands.iter().position(|h| h.dialled().is_none()) {
                            self.hands.remove(at);
                        }
                    }
                    let acceptor = Box::new(Acceptor::new(self.me, &nonce()));
                    let out = acceptor.challenge().to_vec();
                    let at = stream.caller();
                    let begun = self.begin(stream, at, Phase::AwaitJoin(acceptor), now);
                    match (begun, self.hands.last_mut()) {
                        (Ok(()), Some(hand)) => hand.out = out,
                        (Err(error), _) => tracing::warn!(%error, "a caller was lost"),
                        (Ok(()), None) => {}
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Out of descriptors: the caller stays in the backlog for the next event.
                    tracing::warn!(%error, "callers cannot be accepted");
                    return;
                }
            }
        }
    }

    fn begin(
        &mut self,
        mut stream: Stream,
        at: String,
        phase: Phase,
        now: Instant,
    ) -> io::Result<()> {
        stream.set_handshake_options()?;
        let token = Token(self.next_token);
        self.next_token += 1;
        self.registry
            .register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        self.hands.push(Hand {
            token,
            stream,
            at,
            until: now + HANDSHAKE,
            phase,
            out: Vec::new(),
            got: Vec::new(),
        });
        Ok(())
    }

    /// A handshake ended badly.
    fn end(&mut self, hand: &Hand, error: ConnectError, now: Instant) {
        match hand.dialled() {
            Some(channel) => self.fail(channel, error, now),
            None => self.outcomes.push_back(Outcome::Turned(error)),
        }
    }

    fn fail(&mut self, channel: Channel, error: ConnectError, now: Instant) {
        self.slow_down(channel, now);
        self.outcomes.push_back(Outcome::Failed(channel, error));
    }

    fn slow_down(&mut self, channel: Channel, now: Instant) {
        if let Some(dial) = self.dials.get_mut(&channel) {
            // Between three quarters and five quarters of the wait.
            let [dice] = random();
            let jitter = dial.wait.mul_f64(0.75 + f64::from(dice) / 512.0);
            dial.not_before = now + jitter;
            dial.wait = (dial.wait * 2).min(BACK_OFF.1);
        }
    }
}

pub(super) fn nonce() -> Nonce {
    random()
}

/// Random bytes. The kernel gives up to 256 of them without fail once it is seeded, and waits for
/// that where it is not.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    while getrandom(&mut bytes[..], GetRandomFlags::empty()).is_err() {}
    bytes
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpStream,
    };

    use colo_proto::{
        member::{MacKey, VmId},
        wire::join::{ANSWER_LEN, CHALLENGE_LEN, Dialler, JoinError},
    };

    use super::*;

    const LISTENING: Token = Token(1);

    fn end(boot: u64) -> Identity {
        Identity {
            vm: VmId([1; 16]),
            boot: BootId(boot),
            key: MacKey([7; 16]),
        }
    }

    #[test]
    fn of_two_callers_in_one_turn_one_is_told_that_it_joined() {
        let mut poll = mio::Poll::new().unwrap();
        let channels = vec![Channel::Control];
        let mut connector =
            Connector::new(poll.registry(), end(1), channels, None, LISTENING, 64).unwrap();
        connector.listen(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Some(Endpoint::Tcp(at)) = connector.local() else {
            panic!("listens on TCP");
        };
        let admit = |_: &Request| Ok(());
        let mut events = mio::Events::with_capacity(8);
        let mut callers = [2, 3].map(|boot| (boot, TcpStream::connect(at).unwrap()));
        while connector.hands.len() < 2 {
            poll.poll(&mut events, None).unwrap();
            connector.ready(LISTENING, Instant::ZERO, admit);
        }
        let tokens: Vec<_> = connector.hands.iter().map(|hand| hand.token).collect();
        for &token in &tokens {
            connector.ready(token, Instant::ZERO, admit);
        }
        let diallers = callers.each_mut().map(|(boot, stream)| {
            let mut challenge = [0; CHALLENGE_LEN];
            stream.read_exact(&mut challenge).unwrap();
            let me = end(*boot);
            let dialler = Dialler::new(me, Channel::Control, &nonce(), &challenge).unwrap();
            stream.write_all(dialler.join()).unwrap();
            dialler
        });
        // Both joins are here before the first is looked at; nothing is attached in between.
        let mut answered = 0;
        while answered < 2 {
            poll.poll(&mut events, None).unwrap();
            for &token in &tokens {
                connector.ready(token, Instant::ZERO, admit);
            }
            answered = connector.outcomes.len();
        }
        let mut verdicts = callers
            .iter_mut()
            .zip(&diallers)
            .map(|((_, stream), dialler)| {
                let mut answer = [0; ANSWER_LEN];
                stream.read_exact(&mut answer).unwrap();
                dialler.joined(&answer)
            });
        let mut verdicts = [verdicts.next().unwrap(), verdicts.next().unwrap()];
        verdicts.sort_by_key(Result::is_err);
        assert_eq!(
            verdicts,
            [Ok(BootId(1)), Err(JoinError::RefusedByPeer(Refusal::Busy))]
        );
    }
}
