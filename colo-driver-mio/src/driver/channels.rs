//! Moving bytes: every channel, the most urgent first, each within its budget.

use core::num::NonZeroUsize;

use colo_proto::{
    id::Channel,
    machine::{Input, Machine},
    member::BootId,
};
use mio::Token;

use super::{Driver, DriverError};
use crate::{
    Guest,
    budget::{self, Budget},
    channel::{Link, recv::Received, stream::Stream},
    clock,
    handle::What,
};

const ENDED: &str = "the peer closed the connection";

/// Order in which channels are served.
fn urgency(channel: Channel) -> (u8, u8) {
    match channel {
        Channel::Control => (0, 0),
        Channel::Net => (1, 0),
        Channel::Disk => (2, 0),
        Channel::Ram(lane) => (3, lane),
    }
}

impl<M: Machine, G: Guest> Driver<M, G> {
    /// A joined connection becomes a channel.
    pub(super) fn attach(
        &mut self,
        channel: Channel,
        peer: BootId,
        token: Token,
        stream: Stream,
    ) -> Result<(), DriverError> {
        if self.links.peer().is_some_and(|known| known != peer) {
            // Somebody else came first while this one was in its handshake.
            self.report(What::NotConnected(channel, "another peer is up".to_owned()));
            if self.links.get(channel).is_some() {
                // The channel that is up is the known peer's, and stays.
                return Ok(());
            }
            return self.feed(Input::Down(channel));
        }
        if let Err(error) = stream.set_channel_options(channel, self.silence, self.buffer) {
            tracing::warn!(?channel, %error, "socket options could not be set");
        }
        if self.links.get(channel).is_some() {
            // The same process calls again: what was there is dead, though nobody said so.
            self.lose(channel, "replaced by a new connection")?;
        }
        let link = Link {
            token,
            stream,
            readable: true,
            writable: true,
            ended: true,
            sending: Default::default(),
            receiving: Default::default(),
            since: clock::now(),
        };
        self.links.attach(channel, peer, link);
        self.report(What::Up(channel));
        self.feed(Input::Up(channel))
    }

    /// The machine closes a channel.
    pub(super) fn hang_up(&mut self, channel: Channel) {
        let now = clock::now();
        self.connector.forget(channel);
        if let Some(link) = self.links.get(channel) {
            self.connector.ended(channel, link.since, now);
            self.links.hang_up(channel, now);
        }
    }

    /// A channel broke.
    fn lose(&mut self, channel: Channel, why: &str) -> Result<(), DriverError> {
        let Some(link) = self.links.detach(channel) else {
            return Ok(());
        };
        tracing::debug!(?channel, why, "channel down");
        self.connector.ended(channel, link.since, clock::now());
        self.report(What::Down(channel, why.to_owned()));
        self.feed(Input::Down(channel))
    }

    /// One pass over all channels.
    pub(super) fn channels(&mut self) -> Result<(), DriverError> {
        let before = self.stats.inputs;
        let mut channels: Vec<_> = self.links.channels().collect();
        channels.sort_by_key(|&channel| urgency(channel));
        for &channel in &channels {
            self.receive(channel)?;
        }
        for &channel in &channels {
            self.send(channel)?;
        }
        // What was moved may have given other channels something to do.
        self.more |= self.stats.inputs != before;
        Ok(())
    }

    fn receive(&mut self, channel: Channel) -> Result<(), DriverError> {
        let mut budget = Budget::of(channel);
        while let Some(link) = self.links.get(channel).filter(|link| link.readable) {
            if link.receiving.is_idle() {
                let demand = self.machine.poll_demand(channel);
                match link
                    .receiving
                    .begin(&demand, &mut self.guest, &mut self.pool)
                {
                    Ok(true) => {}
                    // A pause: the link stays readable for when it ends.
                    Ok(false) if !link.is_over() => return Ok(()),
                    Ok(false) => return self.lose(channel, ENDED),
                    Err(error) => return self.lose(channel, &error.to_string()),
                }
            }
            let got = match link.read() {
                Ok(Some(0)) => return self.lose(channel, ENDED),
                Ok(Some(got)) => got,
                Ok(None) => continue,
                Err(error) => return self.lose(channel, &error.to_string()),
            };
            self.stats.bytes.entry(channel).or_default().0 += got as u64;
            self.deliver(channel)?;
            if !budget.spend(got) {
                self.exhausted();
                return Ok(());
            }
        }
        Ok(())
    }

    /// Hands over what has been received whole.
    fn deliver(&mut self, channel: Channel) -> Result<(), DriverError> {
        while let Some(link) = self.links.get(channel) {
            let token = link.token;
            match link.receiving.take() {
                None => return Ok(()),
                Some(Received::Placed(len)) => self.feed(Input::Placed(channel, len))?,
                Some(Received::Frame(frame)) => self.feed(Input::Frame(channel, frame))?,
                Some(Received::Bytes(small)) => {
                    self.feed(Input::Bytes(channel, &small))?;
                    if let Some(link) = self.links.get(channel) {
                        link.receiving.give_back(small);
                    }
                }
            }
            if self
                .links
                .get(channel)
                .is_none_or(|link| link.token != token)
            {
                // Hung up by what it brought.
                return Ok(());
            }
        }
        Ok(())
    }

    fn send(&mut self, channel: Channel) -> Result<(), DriverError> {
        let mut budget = Budget::of(channel);
        while let Some(link) = self.links.get(channel).filter(|link| link.writable) {
            if link.sending.is_empty() {
                let chunk = budget::chunk(channel);
                while link.sending.has_room() && link.sending.left() < chunk as u64 {
                    let left = chunk - usize::try_from(link.sending.left()).unwrap_or(chunk);
                    let Some(transmit) = self.machine.poll_transmit(channel, left) else {
                        break;
                    };
                    if let Err(error) = link.sending.push(transmit, &mut self.guest) {
                        return self.lose(channel, &error.to_string());
                    }
                }
                if link.sending.is_empty() {
                    return Ok(());
                }
            }
            let sent = match link.write() {
                Ok(Some(sent)) => sent,
                Ok(None) => continue,
                Err(error) => return self.lose(channel, &error.to_string()),
            };
            self.stats.bytes.entry(channel).or_default().1 += sent as u64;
            if let Some(sent) = NonZeroUsize::new(sent) {
                self.feed(Input::Sent(channel, sent))?;
            }
            if !budget.spend(sent) {
                self.exhausted();
                return Ok(());
            }
        }
        Ok(())
    }

    fn exhausted(&mut self) {
        self.stats.exhausted += 1;
        self.more = true;
    }
}
