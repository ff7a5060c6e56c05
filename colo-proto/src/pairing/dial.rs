//! The secondary's side of first contact: it seeks the primary, says hello and waits for the
//! welcome.

use alloc::{format, string::String, vec::Vec};
use core::time::Duration;

use crate::{
    config::Config,
    error::PeerFault,
    event::PeerLost,
    id::Channel,
    machine::{Deadline, TimerKind},
    time::Instant,
    wire::{Hello, Kind},
};

/// Whether and when the primary is dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Dial {
    dialling: Dialling,
    /// How long the next attempt waits, if this one fails as the last ones did.
    pause: Duration,
    /// An operator wants no primary.
    detached: bool,
    redial: Duration,
    handshake: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Dialling {
    /// At this time, if wanted.
    At(Instant),
    /// A connection is being made, or the hello is on its way.
    Connecting(Instant),
    /// The primary took us.
    Accepted,
}

impl Dial {
    pub(crate) const fn new(config: &Config, now: Instant) -> Self {
        Self {
            dialling: Dialling::At(now),
            pause: config.redial,
            detached: false,
            redial: config.redial,
            handshake: config.handshake,
        }
    }

    /// Whether an operator wants no primary.
    pub(crate) const fn set_detached(&mut self, detached: bool) {
        self.detached = detached;
    }

    pub(crate) const fn is_detached(&self) -> bool {
        self.detached
    }

    /// Whether the time to dial has come. It counts as begun.
    pub(crate) fn begins(&mut self, now: Instant) -> bool {
        let begins = matches!(self.dialling, Dialling::At(at) if now >= at);
        if begins {
            self.dialling = Dialling::Connecting(now);
        }
        begins
    }

    /// Whether the primary is dialled and has not answered.
    pub(crate) const fn connecting(&self) -> bool {
        matches!(self.dialling, Dialling::Connecting(_))
    }

    /// Whether the primary took us.
    pub(crate) const fn accepted(&self) -> bool {
        matches!(self.dialling, Dialling::Accepted)
    }

    /// Whether the answer has taken too long.
    pub(crate) fn late(&self, now: Instant) -> Option<PeerLost> {
        let Dialling::Connecting(since) = self.dialling else {
            return None;
        };
        (now.since(since) >= self.handshake).then_some(PeerLost::TooSlow(self.handshake))
    }

    /// WELCOME: the primary takes us; the reasons if it does not fit. `None` if it was not expected.
    pub(crate) fn welcome(
        &self,
        ours: &Hello,
        body: &[u8],
    ) -> Option<Result<Result<Hello, Vec<String>>, PeerFault>> {
        if !self.connecting() {
            return None;
        }
        let theirs = match Hello::decode(Kind::Welcome.name(), body) {
            Ok(theirs) => theirs,
            Err(error) => {
                let channel = Channel::Control;
                return Some(Err(PeerFault::Decode { channel, error }));
            }
        };
        let mut reasons = ours.differences(&theirs);
        if theirs.lanes != ours.lanes {
            let (here, there) = (ours.lanes, theirs.lanes);
            reasons.push(format!("{here} RAM lanes here and {there} there"));
        }
        Some(Ok(if reasons.is_empty() {
            Ok(theirs)
        } else {
            Err(reasons)
        }))
    }

    /// The primary took us: nothing is dialled until it is lost.
    pub(crate) const fn accept(&mut self) {
        self.dialling = Dialling::Accepted;
    }

    /// The pair is whole: the next attempt does not wait long.
    pub(crate) const fn worked(&mut self) {
        self.pause = self.redial;
    }

    /// When to dial again: soon after a broken connection; later and later while the two do not fit
    /// or the state cannot be loaded, since each attempt may send all memory and hold output.
    pub(crate) fn again(&mut self, now: Instant, unfit: bool) {
        self.pause = if unfit {
            (self.pause * 2).min(self.redial * 16)
        } else {
            self.redial
        };
        self.dialling = Dialling::At(now + self.pause);
    }

    /// When it is time to dial, if `may_dial` says so, or when the answer is late.
    pub(crate) fn deadline(&self, may_dial: bool) -> Option<Deadline> {
        let at = match self.dialling {
            Dialling::At(at) if may_dial => at,
            Dialling::Connecting(since) => since + self.handshake,
            _ => return None,
        };
        Some(Deadline {
            at,
            why: TimerKind::Handshake,
        })
    }
}
