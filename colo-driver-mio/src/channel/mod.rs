//! One channel: a joined connection with what is in flight in both directions.
//!
//! * [`connect`]: listen, dial, back-off; [`hand`]: the join handshake
//! * [`stream`]: TCP and Unix sockets and their options
//! * [`send`], [`recv`]: messages and demands in flight, the only `unsafe` of the loop
//! * this file: the set of channels that are up, and the ones that linger after a hang-up
//!
//! Readiness is edge-triggered: it is reported once, so a channel remembers that it was readable
//! or writable until the kernel says `WouldBlock`. A channel whose demand is a pause stays
//! readable for when the pause ends.

pub(crate) mod connect;
mod hand;
pub(crate) mod recv;
pub(crate) mod send;
pub(crate) mod stream;

use core::{mem::MaybeUninit, time::Duration};
use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use colo_proto::{id::Channel, member::BootId, time::Instant};
use mio::{Registry, Token};
use socket2::SockRef;

use recv::Receiving;
use send::Sending;
use stream::Stream;

/// How long a connection that was hung up may take to send its last bytes.
const LINGER: Duration = Duration::from_secs(1);

/// A joined connection.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) token: Token,
    pub(crate) stream: Stream,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The peer may have closed, as an event said: a short read does not mean "no more". True at
    /// first, because the event may have come during the handshake.
    pub(crate) ended: bool,
    pub(crate) sending: Sending,
    pub(crate) receiving: Receiving,
    /// When it was joined.
    pub(crate) since: Instant,
}

impl Link {
    /// Reads once into the demand; `None` when the socket is empty.
    pub(crate) fn read(&mut self) -> io::Result<Option<usize>> {
        let wanted = self.receiving.wanted();
        match self.receiving.read(&self.stream) {
            Ok(got) => {
                // A short read has emptied the socket: what comes later makes a new edge.
                self.readable = got == wanted || self.ended;
                Ok(Some(got))
            }
            Err(e) => self.blocked(e, |link| {
                link.readable = false;
                link.ended = false;
            }),
        }
    }

    /// Whether the connection has ended with nothing left to read. A channel that is paused is not
    /// read, so it has to be asked.
    pub(crate) fn is_over(&self) -> bool {
        if !self.ended {
            return false;
        }
        match SockRef::from(&self.stream).peek(&mut [MaybeUninit::uninit()]) {
            Ok(bytes) => bytes == 0,
            Err(e) => !matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ),
        }
    }

    /// Writes once from what is in flight; `None` when the socket is full.
    pub(crate) fn write(&mut self) -> io::Result<Option<usize>> {
        match self.sending.write(&self.stream) {
            Ok(sent) => Ok(Some(sent)),
            Err(e) => self.blocked(e, |link| link.writable = false),
        }
    }

    fn blocked(
        &mut self,
        error: io::Error,
        note: impl FnOnce(&mut Self),
    ) -> io::Result<Option<usize>> {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                note(self);
                Ok(None)
            }
            // Ready as before; tried again in the same turn.
            io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        }
    }
}

/// The channels that are up.
#[derive(Debug, Default)]
pub(crate) struct Links {
    up: BTreeMap<Channel, Link>,
    /// The process at the other end of all of them.
    peer: Option<BootId>,
    lingering: Vec<Linger>,
}

#[derive(Debug)]
struct Linger {
    token: Token,
    stream: Stream,
    sending: Sending,
    until: Instant,
}

impl Links {
    pub(crate) fn get(&mut self, channel: Channel) -> Option<&mut Link> {
        self.up.get_mut(&channel)
    }

    pub(crate) fn channels(&self) -> impl Iterator<Item = Channel> {
        self.up.keys().copied()
    }

    /// The process that the channels lead to, while any is up.
    pub(crate) const fn peer(&self) -> Option<BootId> {
        self.peer
    }

    pub(crate) fn attach(&mut self, channel: Channel, peer: BootId, link: Link) {
        self.peer = Some(peer);
        self.up.insert(channel, link);
    }

    /// Drops a channel that broke.
    pub(crate) fn detach(&mut self, channel: Channel) -> Option<Link> {
        let link = self.up.remove(&channel);
        if self.up.is_empty() {
            self.peer = None;
        }
        link
    }

    /// Closes a channel after what is in flight is sent. What lies in the guest's memory cannot
    /// be: the machine may change it from now on, so such a connection is cut.
    pub(crate) fn hang_up(&mut self, channel: Channel, now: Instant) -> Option<Link> {
        let mut link = self.detach(channel)?;
        let small = matches!(channel, Channel::Control | Channel::Net);
        if small && link.sending.is_own() {
            let mut linger = Linger {
                token: link.token,
                sending: std::mem::take(&mut link.sending),
                stream: link.stream,
                until: now + LINGER,
            };
            if linger.advance() {
                self.lingering.push(linger);
            }
            return None;
        }
        Some(link)
    }

    /// Says farewell on the channels whose last bytes matter; `true` when the peer has had them.
    /// To be called until then.
    pub(crate) fn finish(&mut self, now: Instant) -> bool {
        for channel in [Channel::Control, Channel::Net] {
            if self
                .up
                .get(&channel)
                .is_some_and(|link| link.sending.is_empty())
            {
                self.hang_up(channel, now);
            }
        }
        let left = |channel| self.up.contains_key(&channel);
        self.lingering.is_empty() && !left(Channel::Control) && !left(Channel::Net)
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.lingering.iter().map(|l| l.until).min()
    }

    /// Drops what lingers for too long.
    pub(crate) fn expire(&mut self, now: Instant) {
        self.lingering.retain(|l| l.until > now);
    }

    /// Notes an event; `false` when the token is none of ours.
    pub(crate) fn ready(&mut self, event: &mio::event::Event) -> bool {
        if let Some(link) = self.up.values_mut().find(|l| l.token == event.token()) {
            link.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
            link.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
            link.ended |= event.is_read_closed() || event.is_error();
            return true;
        }
        let Some(at) = self.lingering.iter().position(|l| l.token == event.token()) else {
            return false;
        };
        if !self.lingering[at].advance() {
            self.lingering.swap_remove(at);
        }
        true
    }

    /// Forgets everything; used when the loop ends.
    pub(crate) fn clear(&mut self, registry: &Registry) {
        for link in self.up.values_mut() {
            let _gone_anyway = registry.deregister(&mut link.stream);
        }
        self.up.clear();
        self.peer = None;
    }
}

impl Linger {
    /// Sends what is left, then reads until the peer has closed too: closing with unread bytes
    /// would make the kernel reset the connection and destroy what was just sent. `false` when
    /// there is nothing more to do.
    fn advance(&mut self) -> bool {
        while !self.sending.is_empty() {
            match self.sending.write(&self.stream) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
        self.stream.finish();
        let mut waste = [0; 4096];
        // Bounded, so that a peer that talks on cannot hold the loop.
        for _ in 0..64 {
            match self.stream.read(&mut waste) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
        false
    }
}
