//! Who connected, before it has said what it is: a primary, a multifd channel of one, or nobody.
//!
//! A connection that says nothing keeps nobody waiting: it is looked at beside all others and is
//! closed after a while.

use std::{
    io::{self, Read as _},
    os::fd::{AsFd as _, BorrowedFd},
    time::Duration,
};

use colo_proto::{qemu::Channel, time::Instant};

use super::address::{Address, Listener, Stream};

/// Most connections that have not been taken yet; more than a primary has channels.
const MOST: usize = 300;
const SIGN: usize = Channel::SIGN.len();

/// A connection and the bytes that were read of it.
#[derive(Debug)]
pub(super) struct Visitor {
    pub(super) stream: Stream,
    pub(super) first: Vec<u8>,
}

#[derive(Debug)]
struct Guest {
    visitor: Visitor,
    since: Instant,
    /// It will say no more.
    closed: bool,
}

impl Guest {
    fn is_known(&self) -> bool {
        self.closed || self.visitor.first.len() == SIGN
    }

    fn is_channel(&self) -> bool {
        self.visitor.first == Channel::SIGN
    }
}

#[derive(Debug)]
pub(super) struct Lobby {
    listener: Listener,
    guests: Vec<Guest>,
    patience: Duration,
}

impl Lobby {
    pub(super) const fn new(listener: Listener, patience: Duration) -> Self {
        Self {
            listener,
            guests: Vec::new(),
            patience,
        }
    }

    pub(super) fn address(&self) -> io::Result<Address> {
        self.listener.address()
    }

    /// What to wait for.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let silent = self.guests.iter().filter(|guest| !guest.is_known());
        let silent = silent.map(|guest| guest.visitor.stream.as_fd());
        std::iter::once(self.listener.as_fd()).chain(silent)
    }

    /// When the next silent one is to go.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let silent = self.guests.iter().filter(|guest| !guest.is_known());
        silent.map(|guest| guest.since + self.patience).min()
    }

    /// Lets in who waits, hears what they say, and closes those that have been silent too long.
    pub(super) fn look(&mut self, now: Instant) -> io::Result<()> {
        while let Some(stream) = self.listener.accept()? {
            if self.guests.len() == MOST {
                self.guests.remove(0);
            }
            self.guests.push(Guest {
                visitor: Visitor {
                    stream,
                    first: Vec::new(),
                },
                since: now,
                closed: false,
            });
        }
        for guest in &mut self.guests {
            hear(guest);
        }
        let patience = self.patience;
        self.guests.retain(|guest| {
            let stays = (guest.is_known() && !guest.is_channel()) || now < guest.since + patience;
            if !stays {
                tracing::info!("a connection that was of no use is closed");
            }
            stays
        });
        Ok(())
    }

    /// The next that is to be taken for a primary; what it is not, its link will say.
    pub(super) fn primary(&mut self) -> Option<Visitor> {
        self.take(|guest| guest.is_known() && !guest.is_channel())
    }

    /// The next multifd channel.
    pub(super) fn channel(&mut self) -> Option<Visitor> {
        self.take(Guest::is_channel)
    }

    /// The link is over, and its channels with it.
    pub(super) fn forget_channels(&mut self) {
        self.guests.retain(|guest| !guest.is_channel());
    }

    fn take(&mut self, wanted: impl Fn(&Guest) -> bool) -> Option<Visitor> {
        let at = self.guests.iter().position(wanted)?;
        Some(self.guests.remove(at).visitor)
    }
}

fn hear(guest: &mut Guest) {
    while !guest.is_known() {
        let mut bytes = [0; SIGN];
        let left = SIGN - guest.visitor.first.len();
        let read = (&guest.visitor.stream).read(bytes.get_mut(..left).unwrap_or_default());
        match read {
            Ok(0) => guest.closed = true,
            Ok(n) => guest.visitor.first.extend(bytes.iter().take(n)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(_) => guest.closed = true,
        }
    }
}
