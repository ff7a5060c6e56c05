//! The primary's side of first contact: it is dialled, and takes who says hello in time and fits.

use alloc::{format, string::String, vec, vec::Vec};
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

/// Who may come, and who has come and not said hello.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Accept {
    /// A peer that connected and has not said hello since then.
    greeting: Option<Instant>,
    /// An operator wants no peer.
    detached: bool,
    handshake: Duration,
}

/// A peer that is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// It does not fit: everything that it is told.
    Differs(Vec<String>),
    /// It said nothing that could be understood, of which it is told the same.
    Faulty(PeerFault, String),
}

impl Accept {
    pub(crate) const fn new(config: &Config) -> Self {
        Self {
            greeting: None,
            detached: false,
            handshake: config.handshake,
        }
    }

    /// Whether an operator wants no peer.
    pub(crate) const fn set_detached(&mut self, detached: bool) {
        self.detached = detached;
    }

    /// A peer is connected.
    pub(crate) const fn connected(&mut self, now: Instant) {
        self.greeting = Some(now);
    }

    /// It is gone.
    pub(crate) const fn forget_peer(&mut self) {
        self.greeting = None;
    }

    /// Whether a peer has taken too long to say hello.
    pub(crate) fn late(&self, now: Instant) -> Option<PeerLost> {
        let since = self.greeting?;
        (now.since(since) >= self.handshake).then_some(PeerLost::TooSlow(self.handshake))
    }

    /// HELLO: said once by a peer that connected. `None` if it was not expected. `settled` says
    /// whether it is certain here that nobody else owns the VM.
    pub(crate) fn hello(
        &mut self,
        ours: &Hello,
        body: &[u8],
        settled: bool,
    ) -> Option<Result<Hello, Unfit>> {
        self.greeting.take()?;
        let theirs = match Hello::decode(Kind::Hello.name(), body) {
            Ok(theirs) => theirs,
            Err(error) => {
                let channel = Channel::Control;
                let why = format!("{error}");
                return Some(Err(Unfit::Faulty(
                    PeerFault::Decode { channel, error },
                    why,
                )));
            }
        };
        let mut reasons = ours.differences(&theirs);
        if self.detached {
            reasons.push("an operator detached the pair here; attach it first".into());
        }
        if !settled {
            reasons.push("ownership is not settled here yet; try again".into());
        }
        Some(if reasons.is_empty() {
            Ok(theirs)
        } else {
            Err(Unfit::Differs(reasons))
        })
    }

    pub(crate) fn deadline(&self) -> Option<Deadline> {
        self.greeting.map(|since| Deadline {
            at: since + self.handshake,
            why: TimerKind::Handshake,
        })
    }
}

impl Unfit {
    /// What the peer is told.
    pub(crate) fn reasons(&self) -> Vec<String> {
        match self {
            Self::Differs(reasons) => reasons.clone(),
            Self::Faulty(_, why) => vec![why.clone()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::Slot,
        member::{MacKey, MemberConfig, NodeId, VmId},
        status::Mode,
    };

    #[test]
    fn a_hello_is_said_once_by_a_peer_that_connected() {
        let config = |id| {
            let member = MemberConfig::new(VmId([7; 16]), NodeId(3 - id), MacKey([7; 16]));
            let config = Config::builder(NodeId(id), member, &[(Slot(0), 16)]);
            config.build().unwrap()
        };
        let (peer, config) = (config(2), config(1));
        let ours = config.hello(1, Mode::Standby);
        let body = peer.hello(2, Mode::Standby).encode();
        let mut accept = Accept::new(&config);
        assert_eq!(accept.hello(&ours, &body, true), None, "nobody connected");
        accept.connected(Instant::ZERO);
        assert!(matches!(accept.hello(&ours, &body, true), Some(Ok(_))));
        assert_eq!(accept.hello(&ours, &body, true), None, "a second one");
        accept.connected(Instant::ZERO);
        let unsettled = accept.hello(&ours, &body, false);
        assert!(matches!(unsettled, Some(Err(Unfit::Differs(_)))));
    }
}
