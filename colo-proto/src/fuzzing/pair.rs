//! Two hosts wired to each other; the program decides what is delivered, lost, cut and when.

use alloc::{collections::VecDeque, vec, vec::Vec};
use core::time::Duration;

use super::{
    Program,
    host::{CHANNELS, Host},
};
use crate::{
    command::{Command, CommandId},
    machine::{Body, Input, Transmit},
    member::{Member, Register, Verdict},
    node::Start,
    status::Mode,
    time::Instant,
};

struct Pair {
    now: Instant,
    hosts: [Host; 2],
    /// Bytes on the way to each host.
    wires: [[VecDeque<u8>; 3]; 2],
    connected: [bool; 3],
    register: Register,
    commands: u64,
}

/// Runs a schedule: right calls are never misuse, and two hosts never may let output leave at once.
pub fn pair_schedule(data: &[u8]) {
    let mut program = Program(data);
    let mode = if program.byte() & 1 == 0 {
        Mode::Standby
    } else {
        Mode::Lockstep
    };
    let now = Instant::from_millis(1);
    let mut pair = Pair {
        now,
        hosts: [
            Host::new(1, Start::Primary, mode, now),
            Host::new(2, Start::Secondary, mode, now),
        ],
        wires: Default::default(),
        connected: [false; 3],
        register: Register::default(),
        commands: 0,
    };
    let mut steps = 0;
    while let Some(step) = program.next() {
        steps += 1;
        if steps > 256 {
            return;
        }
        pair.step(step);
        pair.one_owner();
    }
}

impl Pair {
    fn step(&mut self, step: u8) {
        let (me, at) = (usize::from(step >> 4) & 1, usize::from(step >> 5) % 3);
        let now = self.now;
        match step & 15 {
            // Mostly the world goes on as it should.
            0..=4 => {
                for _ in 0..=step & 3 {
                    self.turn(0, true);
                    self.turn(1, true);
                }
            }
            5 => self.turn(me, false),
            6 => self.cut(at),
            7 => self.hosts[me].datagrams.clear(),
            8 => {
                self.hosts[me].finish(now, 1, step >> 5 == 0);
            }
            9 => {
                self.commands += 1;
                let command = match step >> 5 {
                    0 => Command::LostHeartbeat,
                    1 => Command::FailOver,
                    2 => Command::Stop,
                    3 => Command::Continue,
                    4 => Command::Detach,
                    5 => Command::Attach,
                    _ => Command::CheckpointNow,
                };
                self.hosts[me].input(now, Input::Command(CommandId(self.commands), command));
            }
            10 if self.hosts[me].running => {
                let epoch = self.hosts[me].epoch;
                let frame = bytes::Bytes::from(vec![step; 60]);
                self.hosts[me].input(now, Input::FromGuest { epoch, frame });
            }
            11 => {
                if let Some(ballot) = self.hosts[me].ballots.pop_front() {
                    let verdict = Verdict::Unreachable;
                    self.hosts[me].input(now, Input::Arbiter(ballot.request, verdict));
                }
            }
            low => {
                self.now = now + Duration::from_millis(u64::from(step >> 4) << (low & 3));
                for host in &mut self.hosts {
                    host.input(self.now, Input::Timeout);
                }
            }
        }
    }

    /// Everything that one host asked of the world happens.
    fn turn(&mut self, me: usize, heard: bool) {
        let (now, peer) = (self.now, 1 - me);
        if let Some(id) = self.hosts[me].persists.pop_front() {
            self.hosts[me].input(now, Input::Persisted(id));
        }
        if let Some(ballot) = self.hosts[me].ballots.pop_front() {
            let verdict = self.register.cast(&ballot);
            self.hosts[me].input(now, Input::Arbiter(ballot.request, verdict));
        }
        if let Some(id) = self.hosts[me].reads.pop_front() {
            let verdict = Verdict::Read(self.register);
            self.hosts[me].input(now, Input::Arbiter(id, verdict));
        }
        self.hosts[me].finish(now, 3, false);
        while let Some(channel) = self.hosts[me].dials.pop_front() {
            let Some(at) = CHANNELS.iter().position(|&c| c == channel) else {
                continue;
            };
            self.cut(at);
            self.connected[at] = true;
            self.hosts[peer].input(now, Input::Up(channel));
            self.hosts[me].input(now, Input::Up(channel));
        }
        for (at, &channel) in CHANNELS.iter().enumerate() {
            let messages = self.hosts[me].transmit(now, channel);
            if self.connected[at] {
                self.wires[peer][at].extend(messages.iter().flat_map(bytes));
            }
        }
        while let Some(channel) = self.hosts[me].hang_ups.pop_front() {
            if let Some(at) = CHANNELS.iter().position(|&c| c == channel) {
                self.connected[at] = false;
                self.wires[me][at].clear();
                self.hosts[peer].input(now, Input::Down(channel));
            }
        }
        if heard {
            while let Some((path, bytes)) = self.hosts[me].datagrams.pop_front() {
                self.hosts[peer].input(now, Input::Datagram(path, &bytes));
            }
        }
        for (at, &channel) in CHANNELS.iter().enumerate() {
            let wire = &mut self.wires[me][at];
            let host = &mut self.hosts[me];
            for _ in 0..64 {
                let more = host.receive(now, channel, |len| {
                    (wire.len() >= len).then(|| wire.drain(..len).collect())
                });
                if !more {
                    break;
                }
            }
        }
    }

    fn cut(&mut self, at: usize) {
        if core::mem::take(&mut self.connected[at]) {
            for me in 0..2 {
                self.wires[me][at].clear();
                self.hosts[me].input(self.now, Input::Down(CHANNELS[at]));
            }
        }
    }

    fn one_owner(&self) {
        let permits = |host: &Host| {
            let permit = host.node.member().and_then(|m: &Member| m.permit(self.now));
            permit.is_some_and(|permit| permit.allows(self.now))
        };
        assert!(!self.hosts.iter().all(permits), "two permits at once");
    }
}

/// What travels: contents are zeros, since no machine sees them.
fn bytes(message: &Transmit) -> Vec<u8> {
    let mut bytes = message.head.to_vec();
    if let Body::Bytes(body) = &message.body {
        bytes.extend_from_slice(body);
    }
    bytes.resize(usize::try_from(message.len()).unwrap_or(0), 0);
    bytes
}
