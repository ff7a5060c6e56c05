//! Two hosts and what lies between them.

use alloc::{collections::VecDeque, vec::Vec};
use bytes::{Bytes, BytesMut};
use core::{num::NonZeroUsize, time::Duration};

use super::host::{Effect, Guest, Host};
use crate::{
    error::Misuse,
    id::Channel,
    machine::{Body, Demand, Input, Output},
    member::{Ballot, Record, Register, Verdict},
    time::Instant,
};

/// As much as one batch of pages.
const SEND_BUDGET: usize = 4 << 20;

/// A piece of what is on its way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Piece<C> {
    Bytes(Bytes),
    Contents(NonZeroUsize, C),
}

/// One channel. What was sent before an end was closed still arrives; only then is the other end
/// told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Line<C> {
    channel: Channel,
    open: [bool; 2],
    towards: [VecDeque<Piece<C>>; 2],
}

/// Two hosts, 0 and 1, the channels between them, the arbiter, and time.
///
/// Every method that gives a host something to do answers whether there was anything. A host that
/// is off does nothing.
///
/// # Errors
/// Of all methods: the [`Misuse`] that the guest, or the caller's input, committed.
///
/// # Panics
/// If a machine is wrong: it demands something else than the other one sent, or lets a frame out
/// under a permit that is over.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pair<G: Guest> {
    now: Instant,
    hosts: [Option<Host<G>>; 2],
    records: [Option<Record>; 2],
    lines: Vec<Line<G::Contents>>,
    reports: VecDeque<(usize, Output)>,
    /// What the arbiter holds.
    pub register: Register,
    /// Whether each host reaches the arbiter.
    pub reaches_arbiter: [bool; 2],
}

impl<G: Guest> Pair<G> {
    /// Two hosts that are off, joined by these channels: those of
    /// [`Config::channels`](crate::config::Config::channels).
    #[must_use]
    pub fn new(channels: impl IntoIterator<Item = Channel>, now: Instant) -> Self {
        let line = |channel| Line {
            channel,
            open: [false; 2],
            towards: [VecDeque::new(), VecDeque::new()],
        };
        Self {
            now,
            hosts: [None, None],
            records: [None, None],
            lines: channels.into_iter().map(line).collect(),
            reports: VecDeque::new(),
            register: Register::default(),
            reaches_arbiter: [true; 2],
        }
    }

    /// Now.
    #[must_use]
    pub const fn now(&self) -> Instant {
        self.now
    }

    /// A host, if it is on.
    #[must_use]
    pub const fn host(&self, at: usize) -> Option<&Host<G>> {
        self.hosts[at].as_ref()
    }

    /// A host, to change its guest or to take effects away from it.
    pub const fn host_mut(&mut self, at: usize) -> Option<&mut Host<G>> {
        self.hosts[at].as_mut()
    }

    /// What a host persisted last; it outlives the host.
    #[must_use]
    pub const fn record(&self, at: usize) -> Option<Record> {
        self.records[at]
    }

    /// What a host said that needs no answer, in order: frames for the world, events, answers.
    pub fn report(&mut self) -> Option<(usize, Output)> {
        self.reports.pop_front()
    }

    /// Power on.
    pub fn start(&mut self, at: usize, host: Host<G>) {
        self.hosts[at] = Some(host);
        self.collect(at);
    }

    /// Power off: the other host sees every channel end.
    pub fn kill(&mut self, at: usize) -> Result<(), Misuse> {
        self.hosts[at] = None;
        let channels: Vec<_> = self.lines.iter().map(|line| line.channel).collect();
        channels.into_iter().try_for_each(|c| self.cut(c))
    }

    /// One input to one host.
    pub fn input(&mut self, at: usize, input: Input<'_>) -> Result<bool, Misuse> {
        let now = self.now;
        self.with(at, |host| host.input(now, input).map(|()| true))
    }

    /// Lets time pass; nobody notices before [`wake`](Self::wake).
    pub fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    /// Tells a host what time it is.
    pub fn wake(&mut self, at: usize) -> Result<bool, Misuse> {
        self.input(at, Input::Timeout)
    }

    /// Lets time pass in steps of a millisecond; all that is asked for happens at once.
    pub fn run(&mut self, time: Duration) -> Result<(), Misuse> {
        for _ in 0..time.as_millis() {
            self.pass(Duration::from_millis(1));
            self.wake(0)?;
            self.wake(1)?;
            self.settle()?;
        }
        Ok(())
    }

    /// Everything happens that can happen without time passing.
    pub fn settle(&mut self) -> Result<(), Misuse> {
        while self.step(0)? | self.step(1)? {}
        Ok(())
    }

    /// One of everything for a host: effects, its guest's frames, its channels.
    pub fn step(&mut self, at: usize) -> Result<bool, Misuse> {
        let mut moved = self.listen(at)?;
        for effect in Effect::ALL {
            moved |= self.effect(at, effect)?;
        }
        for line in 0..self.lines.len() {
            let channel = self.lines[line].channel;
            moved |= self.send(at, channel, SEND_BUDGET)?;
            moved |= self.receive(at, channel)?;
        }
        Ok(moved)
    }

    /// The oldest effect of a kind is done.
    pub fn effect(&mut self, at: usize, effect: Effect) -> Result<bool, Misuse> {
        let now = self.now;
        if effect == Effect::Guest {
            return self.with(at, |host| host.operate(now));
        }
        let Some(asked) = self.host_mut(at).and_then(|host| host.take(effect)) else {
            return Ok(false);
        };
        let reaches = self.reaches_arbiter[at];
        match asked {
            Output::AskArbiter(ballot) if reaches => {
                let verdict = self.register.cast(&ballot);
                self.input(at, Input::Arbiter(ballot.request, verdict))?;
            }
            Output::ReadArbiter(request) if reaches => {
                let verdict = self.register.read(request);
                self.input(at, Input::Arbiter(request, verdict))?;
            }
            Output::AskArbiter(Ballot { request, .. }) | Output::ReadArbiter(request) => {
                self.input(at, Input::Arbiter(request, Verdict::Unreachable))?;
            }
            Output::Persist(id, record) => {
                self.records[at] = Some(record);
                self.input(at, Input::Persisted(id))?;
            }
            Output::Fence(_) => {
                self.input(at, Input::Fenced(false))?;
            }
            Output::Dial(channel) => self.connect(at, channel)?,
            Output::HangUp(channel) => self.hang_up(at, channel),
            Output::Datagram(path, bytes) => {
                self.input(1 - at, Input::Datagram(path, &bytes))?;
            }
            _ => {}
        }
        Ok(true)
    }

    /// A frame that the guest said is reported.
    pub fn listen(&mut self, at: usize) -> Result<bool, Misuse> {
        let now = self.now;
        self.with(at, |host| host.listen(now))
    }

    /// The next message for a channel, of about `budget` bytes, is put on its way.
    pub fn send(&mut self, at: usize, channel: Channel, budget: usize) -> Result<bool, Misuse> {
        let now = self.now;
        let mut pieces = Vec::new();
        let sent = self.with(at, |host| {
            let Some(message) = host.transmit(now, channel, budget)? else {
                return Ok(false);
            };
            let body = message.len() - message.head.len() as u64;
            let body = usize::try_from(body).ok().and_then(NonZeroUsize::new);
            pieces.push(Piece::Bytes(message.head));
            match (message.body, body) {
                (Body::Bytes(bytes), _) => pieces.push(Piece::Bytes(bytes)),
                (body, Some(len)) => pieces.push(Piece::Contents(len, host.guest.read(&body))),
                (_, None) => {}
            }
            Ok(true)
        })?;
        let line = self.line(channel).filter(|line| line.open == [true; 2]);
        if let Some(line) = line {
            line.towards[1 - at].extend(pieces);
        }
        Ok(sent)
    }

    /// A host gets what it demands of a channel, if that has arrived; or learns that the channel
    /// has ended.
    pub fn receive(&mut self, at: usize, channel: Channel) -> Result<bool, Misuse> {
        let now = self.now;
        let line = self.lines.iter_mut().find(|line| line.channel == channel);
        let (Some(line), Some(host)) = (line, &mut self.hosts[at]) else {
            return Ok(false);
        };
        let arrived = &mut line.towards[at];
        let received = match host.demand(channel) {
            Demand::Frame(n) => match take(arrived, n.get()) {
                Some(frame) => host.input(now, Input::Frame(channel, frame)).map(|()| true),
                None => Ok(false),
            },
            Demand::Read { place: None, then } => match take(arrived, then) {
                Some(bytes) => host
                    .input(now, Input::Bytes(channel, &bytes))
                    .map(|()| true),
                None => Ok(false),
            },
            Demand::Read {
                place: Some(sink), ..
            } => match arrived.pop_front() {
                Some(Piece::Contents(len, contents)) => {
                    assert_eq!(len.get() as u64, sink.bytes(), "contents of another length");
                    host.guest.write(&sink, contents);
                    host.input(now, Input::Placed(channel, len)).map(|()| true)
                }
                Some(Piece::Bytes(_)) => panic!("contents were demanded, bytes were sent"),
                None => Ok(false),
            },
            Demand::Pause => Ok(false),
        }?;
        self.collect(at);
        Ok(received || self.notice_end(at, channel)?)
    }

    /// Ends a channel; what was on its way is lost.
    pub fn cut(&mut self, channel: Channel) -> Result<(), Misuse> {
        let Some(line) = self.line(channel) else {
            return Ok(());
        };
        let open = core::mem::take(&mut line.open);
        line.towards.iter_mut().for_each(VecDeque::clear);
        for (at, open) in open.into_iter().enumerate() {
            if open {
                self.input(at, Input::Down(channel))?;
            }
        }
        Ok(())
    }

    fn line(&mut self, channel: Channel) -> Option<&mut Line<G::Contents>> {
        self.lines.iter_mut().find(|line| line.channel == channel)
    }

    fn with(
        &mut self,
        at: usize,
        act: impl FnOnce(&mut Host<G>) -> Result<bool, Misuse>,
    ) -> Result<bool, Misuse> {
        let moved = self.host_mut(at).map_or(Ok(false), act)?;
        self.collect(at);
        Ok(moved)
    }

    fn collect(&mut self, at: usize) {
        while let Some(said) = self.host_mut(at).and_then(Host::poll_said) {
            if let Output::ToWorld { permit, .. } = &said {
                assert!(
                    permit.allows(self.now),
                    "a frame under a permit that is over"
                );
            }
            self.reports.push_back((at, said));
        }
    }

    fn connect(&mut self, at: usize, channel: Channel) -> Result<(), Misuse> {
        self.cut(channel)?;
        let answers = self.hosts[1 - at].is_some();
        if let Some(line) = self.line(channel).filter(|_| answers) {
            line.open = [true; 2];
            // Nothing moves before both are told.
            self.input(1 - at, Input::Up(channel))?;
            self.input(at, Input::Up(channel))?;
        } else {
            self.input(at, Input::Down(channel))?;
        }
        Ok(())
    }

    fn hang_up(&mut self, at: usize, channel: Channel) {
        if let Some(line) = self.line(channel) {
            line.open[at] = false;
            line.towards[at].clear();
        }
    }

    /// The other host closed the channel, and all that it sent before was read.
    fn notice_end(&mut self, at: usize, channel: Channel) -> Result<bool, Misuse> {
        let line = self.line(channel);
        match line.filter(|line| line.open[at] && !line.open[1 - at]) {
            Some(_) => self.cut(channel).map(|()| true),
            None => Ok(false),
        }
    }
}

/// Takes `n` bytes, if so many have arrived.
fn take<C>(arrived: &mut VecDeque<Piece<C>>, n: usize) -> Option<BytesMut> {
    let mut there = 0;
    for piece in &*arrived {
        match piece {
            Piece::Bytes(bytes) => there += bytes.len(),
            Piece::Contents(..) => break,
        }
    }
    if n == 0 || there < n {
        return None;
    }
    let mut taken = BytesMut::with_capacity(n);
    while let (1.., Some(Piece::Bytes(bytes))) = (n - taken.len(), arrived.front_mut()) {
        let some = bytes.split_to(bytes.len().min(n - taken.len()));
        taken.extend_from_slice(&some);
        if bytes.is_empty() {
            arrived.pop_front();
        }
    }
    Some(taken)
}
