//! Connections: bytes and pages in order on each channel, and no order between channels.

use std::{collections::VecDeque, num::NonZeroUsize};

use bytes::{Bytes, BytesMut};
use colo_proto::{
    id::{Channel, Role},
    machine::{Body, Demand, Input, Machine, Sink},
    member::BootId,
};

use crate::{
    guest::{PAGES, bits},
    world::{Due, Micros, What, World},
};

#[derive(Clone)]
pub(crate) enum Piece {
    Bytes(Bytes),
    Page(u64),
}

#[derive(Clone)]
pub(crate) struct Conn {
    pub(crate) id: u64,
    /// Which boots it joins.
    pub(crate) boots: [BootId; 2],
    /// Arrived at each host and not read.
    pub(crate) rx: [VecDeque<Piece>; 2],
    /// Which ends are open.
    pub(crate) open: [bool; 2],
    /// When the last bytes toward each host arrive.
    pub(crate) last: [Micros; 2],
    /// Handed out by each host and not taken by its kernel.
    pub(crate) outstanding: [u64; 2],
}

impl World {
    pub(crate) fn dialled(&mut self, i: usize, boot: BootId, channel: Channel) {
        if self.boot(i) != Some(boot) {
            return;
        }
        let busy = self.conns.values().any(|conn| {
            conn.open[1 - i] && Some(conn.boots[1 - i]) == self.boot(1 - i) && conn.boots[i] != boot
        });
        let cut = self.hosts[0].cut || self.hosts[1].cut || self.hosts[1 - i].frozen > self.t;
        let peer = self
            .boot(1 - i)
            .filter(|_| self.role(1 - i) == Some(Role::Primary));
        let Some(peer) = peer.filter(|_| !cut && !busy) else {
            self.soon(i, 500, What::Refused(channel));
            return;
        };
        self.lose(channel);
        self.conn_ids += 1;
        let id = self.conn_ids;
        let mut boots = [boot; 2];
        boots[1 - i] = peer;
        self.flush_downs(channel);
        self.conns.insert(
            channel,
            Conn {
                id,
                boots,
                rx: [VecDeque::new(), VecDeque::new()],
                open: [true; 2],
                last: [self.t; 2],
                outstanding: [0; 2],
            },
        );
        // Nothing moves before both are told.
        for host in [1 - i, i] {
            self.at_host(host, What::Up(channel, id));
        }
    }

    /// Tells ends of an old connection before a new one takes its place.
    pub(crate) fn flush_downs(&mut self, channel: Channel) {
        for i in 0..2 {
            let old = self.conns.get(&channel);
            if let Some(id) = old
                .filter(|c| c.open[i] && Some(c.boots[i]) == self.boot(i))
                .map(|c| c.id)
            {
                self.at_host(i, What::Down(channel, id));
            }
        }
    }

    pub(crate) fn lose(&mut self, channel: Channel) {
        let Some(conn) = self.conns.get(&channel) else {
            return;
        };
        let (id, boots) = (conn.id, conn.boots);
        for (i, boot) in boots.into_iter().enumerate() {
            let delay = self.below(2_000);
            self.after(delay, Due::Host(i, boot, What::Down(channel, id)));
        }
    }

    pub(crate) fn lose_all(&mut self) {
        let channels: Vec<Channel> = self.conns.keys().copied().collect();
        for channel in channels {
            self.lose(channel);
        }
    }

    /// Moves what can be moved.
    pub(crate) fn pump(&mut self) {
        let channels: Vec<Channel> = self.conns.keys().copied().collect();
        for i in 0..2 {
            if self.hosts[i].frozen > self.t {
                continue;
            }
            for &channel in &channels {
                while self.read(i, channel) {}
            }
            for &channel in &channels {
                while self.write(i, channel) {}
            }
        }
    }

    pub(crate) fn write(&mut self, i: usize, channel: Channel) -> bool {
        let delay = 50 + self.below(self.slow);
        let lag = self.lag(i, channel);
        if self
            .full
            .get(&(i, channel))
            .is_some_and(|until| *until > self.t)
        {
            return false;
        }
        let host = &mut self.hosts[i];
        let (Some(p), Some(conn)) = (&mut host.process, self.conns.get_mut(&channel)) else {
            return false;
        };
        if host.cut || !conn.open[i] || conn.boots[i] != p.boot || conn.outstanding[i] > 0 {
            return false;
        }
        let Some(transmit) = p.node.poll_transmit(channel, 64 << 10) else {
            return false;
        };
        let len = transmit.len();
        let said = transmit.head.clone();
        let mut pieces = vec![Piece::Bytes(transmit.head)];
        match transmit.body {
            Body::Bytes(bytes) => pieces.push(Piece::Bytes(bytes)),
            Body::Live(runs) => pieces.extend(contents(&p.guest.ram, bits(&runs))),
            Body::Staged(runs) => pieces.extend(contents(&p.guest.staging, bits(&runs))),
            Body::State(range) => {
                let at = |n| usize::try_from(n).unwrap_or(0);
                let state = &p.guest.state_out[at(range.start)..at(range.end)];
                pieces.push(Piece::Bytes(Bytes::copy_from_slice(state)));
            }
            _ => {}
        }
        conn.outstanding[i] = len;
        let at = conn.last[1 - i].max(self.t + delay + lag);
        conn.last[1 - i] = at;
        let (id, peer) = (conn.id, conn.boots[1 - i]);
        let arrive = What::Arrive(channel, id, pieces);
        self.after(at - self.t, Due::Host(1 - i, peer, arrive));
        // The kernel takes it in two parts.
        let first = usize::try_from(len / 3).unwrap_or(0);
        let rest = usize::try_from(len).unwrap_or(0) - first;
        for n in [first, rest].into_iter().filter_map(NonZeroUsize::new) {
            self.soon(i, delay / 2, What::Sent(channel, id, n));
        }
        if channel == Channel::Control {
            self.says(i, &said);
        }
        true
    }

    pub(crate) fn read(&mut self, i: usize, channel: Channel) -> bool {
        let (Some(p), Some(conn)) = (&mut self.hosts[i].process, self.conns.get_mut(&channel))
        else {
            return false;
        };
        if !conn.open[i] || conn.boots[i] != p.boot {
            return false;
        }
        let rx = &mut conn.rx[i];
        match p.node.poll_demand(channel) {
            Demand::Frame(n) => {
                let Some(bytes) = take(rx, n.get()) else {
                    return false;
                };
                self.feed(i, Input::Frame(channel, BytesMut::from(&bytes[..])));
            }
            Demand::Read { place: None, then } => {
                let Some(bytes) = take(rx, then) else {
                    return false;
                };
                self.feed(i, Input::Bytes(channel, &bytes));
            }
            Demand::Read {
                place: Some(sink), ..
            } => {
                let placed = match &sink {
                    Sink::Guest(runs) => {
                        p.guest.whole = false;
                        p.guest.blank = false;
                        place(rx, &mut p.guest.ram, bits(runs))
                    }
                    Sink::Cache(runs) => place(rx, &mut p.guest.cache, bits(runs)),
                    Sink::State(range) => {
                        let at = |n| usize::try_from(n).unwrap_or(0);
                        let Some(bytes) = take(rx, at(range.end - range.start)) else {
                            return false;
                        };
                        p.guest.state_in.resize(at(range.end), 0);
                        p.guest.state_in[at(range.start)..].copy_from_slice(&bytes);
                        bytes.len()
                    }
                    _ => 0,
                };
                let Some(n) = NonZeroUsize::new(placed) else {
                    return false;
                };
                self.feed(i, Input::Placed(channel, n));
            }
            _ => return false,
        }
        true
    }
}

fn contents(memory: &[u64; PAGES], wanted: u64) -> impl Iterator<Item = Piece> {
    (0..PAGES)
        .filter(move |page| wanted & (1 << page) != 0)
        .map(|page| Piece::Page(memory[page]))
}

fn take(rx: &mut VecDeque<Piece>, n: usize) -> Option<Vec<u8>> {
    let mut there = 0;
    for piece in &*rx {
        there += match piece {
            Piece::Bytes(bytes) => bytes.len(),
            Piece::Page(_) => 4096,
        };
    }
    if there < n {
        return None;
    }
    let mut all = Vec::with_capacity(n);
    while all.len() < n {
        match rx.pop_front()? {
            Piece::Bytes(mut bytes) => {
                let some = bytes.split_to(bytes.len().min(n - all.len()));
                all.extend_from_slice(&some);
                if !bytes.is_empty() {
                    rx.push_front(Piece::Bytes(bytes));
                }
            }
            // Only after noise: a page where small bytes were due.
            Piece::Page(_) => all.resize(n.min(all.len() + 4096), 0xee),
        }
    }
    Some(all)
}

fn place(rx: &mut VecDeque<Piece>, memory: &mut [u64; PAGES], wanted: u64) -> usize {
    let count = wanted.count_ones() as usize;
    while matches!(rx.front(), Some(Piece::Bytes(bytes)) if bytes.is_empty()) {
        rx.pop_front();
    }
    let ready = rx
        .iter()
        .take(count)
        .all(|piece| matches!(piece, Piece::Page(_)));
    if rx.len() < count || !ready {
        return 0;
    }
    for page in (0..PAGES).filter(|page| wanted & (1 << page) != 0) {
        if let Some(Piece::Page(word)) = rx.pop_front() {
            memory[page] = word;
        }
    }
    count * 4096
}
