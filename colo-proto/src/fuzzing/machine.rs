//! One host under any sequence of inputs.

use alloc::{vec, vec::Vec};
use core::time::Duration;

use bytes::{Bytes, BytesMut};

use super::{
    Program,
    host::{CHANNELS, Host},
};
use crate::{
    command::{Command, CommandId},
    id::Channel,
    machine::{GuestDone, Input, Machine as _},
    member::{Health, MAX_PATHS, PathId, Register, Verdict},
    node::Start,
    status::Mode,
    time::Instant,
    wire::{HEAD_LEN, Head, Kind},
};

/// Runs a program against one host: whatever peer, guest, arbiter, clock and operator do, right
/// calls are never misuse, every poll ends, and what waits for a peer stays bounded.
pub fn machine(data: &[u8]) {
    let mut program = Program(data);
    let how = program.byte();
    let start = if how & 1 == 0 {
        Start::Primary
    } else {
        Start::Secondary
    };
    let mode = if how & 2 == 0 {
        Mode::Standby
    } else {
        Mode::Lockstep
    };
    let mut now = Instant::from_millis(1);
    let mut host = Host::new(1, start, mode, now);
    let mut register = Register::default();
    let mut steps = 0;
    while let Some(operation) = program.next() {
        steps += 1;
        if steps > 512 {
            return;
        }
        let channel = CHANNELS[usize::from(operation >> 5) % 3];
        match operation & 15 {
            0 => host.input(now, Input::Up(channel)),
            1 => host.input(now, Input::Down(channel)),
            2 => {
                host.receive(now, channel, |len| Some(filled(&mut program, len)));
            }
            3 | 4 => {
                let head = head(&mut program, &host);
                host.receive(now, channel, |len| {
                    (len == HEAD_LEN)
                        .then_some(head)
                        .or_else(|| Some(filled(&mut program, len)))
                });
            }
            5 => {
                for channel in CHANNELS {
                    host.transmit(now, channel);
                }
            }
            6 => host.finish(now, u64::from(program.byte()), false),
            7 => host.finish(now, 0, program.byte() & 7 == 0),
            8 => {
                let deadline = host.node.poll_timeout();
                now = deadline.map_or(now, |d| d.at.max(now));
                if now == Instant::END {
                    return;
                }
                host.input(now, Input::Timeout);
            }
            9 => {
                now = now + Duration::from_millis(u64::from(program.byte()) << (operation >> 5));
                host.input(now, Input::Timeout);
            }
            10 => {
                let path = PathId(program.byte() % MAX_PATHS);
                let bytes = program.take(80).to_vec();
                host.input(now, Input::Datagram(path, &bytes));
            }
            11 => arbiter(&mut host, now, &mut register, program.byte()),
            12 => {
                let command = command(program.byte());
                host.input(now, Input::Command(CommandId(steps), command));
            }
            13 => wrong(&mut host, now, program.byte()),
            14 => other(&mut host, now, program.byte()),
            _ => {
                if let Some(id) = host.persists.pop_front() {
                    host.input(now, Input::Persisted(id));
                }
            }
        }
    }
    let _ = (host.node.stats(), host.node.status());
}

fn filled(program: &mut Program<'_>, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let given = program.take(len.min(64));
    bytes[..given.len()].copy_from_slice(given);
    bytes
}

/// A head that decodes, often of the generation that the host expects.
fn head(program: &mut Program<'_>, host: &Host) -> Vec<u8> {
    let kind = Kind::from_u8(program.byte() % 32).unwrap_or(Kind::Pages);
    let mut generation = host
        .node
        .member()
        .map(crate::member::Member::generation)
        .unwrap_or_default();
    generation.0 = generation.0.wrapping_add(u64::from(program.byte() & 1));
    let mut head = Head::new(kind, generation, u64::from(program.byte() & 7));
    head.len = u32::from(program.byte());
    head.count = u32::from(program.byte() & 3);
    head.arg = u32::from(program.byte() & 3);
    if kind == Kind::Pages {
        head.len = head.count * 16 + head.arg * 4096;
    }
    let mut bytes = BytesMut::new();
    head.put(&mut bytes);
    bytes.to_vec()
}

fn arbiter(host: &mut Host, now: Instant, register: &mut Register, how: u8) {
    let (id, verdict) = if let Some(ballot) = host.ballots.pop_front() {
        (ballot.request, register.cast(&ballot))
    } else if let Some(id) = host.reads.pop_front() {
        (id, Verdict::Read(*register))
    } else {
        return;
    };
    let verdict = if how & 7 == 7 {
        Verdict::Unreachable
    } else {
        verdict
    };
    host.input(now, Input::Arbiter(id, verdict));
}

fn command(which: u8) -> Command {
    match which % 10 {
        0 => Command::CheckpointNow,
        1 => Command::LostHeartbeat,
        2 => Command::FailOver,
        3 => Command::Detach,
        4 => Command::Attach,
        5 => Command::CheckpointDelay(Duration::from_millis(u64::from(which))),
        6 => Command::SetMode(if which & 16 == 0 {
            Mode::Standby
        } else {
            Mode::Lockstep
        }),
        7 => Command::Stop,
        8 => Command::Continue,
        _ => Command::XenDoCheckpoint,
    }
}

/// A call that no driver may make: refused, and nothing changes.
fn wrong(host: &mut Host, now: Instant, how: u8) {
    let before = host.node.clone();
    let answer = match how & 1 {
        0 if host.op.is_none() => host
            .node
            .handle_input(now, Input::Guest(GuestDone::Harvested)),
        _ => host.node.handle_input(now, Input::Up(Channel::Ram(9))),
    };
    assert!(answer.is_err(), "a wrong call was taken");
    assert!(host.node == before, "misuse changed the state");
}

fn other(host: &mut Host, now: Instant, how: u8) {
    let frame = Bytes::from(vec![how; 60]);
    match how & 7 {
        0 | 1 => host.input(now, Input::FromWorld(frame)),
        2 => host.input(now, Input::Health(Health::default())),
        3 => host.input(now, Input::Progress(u32::from(how))),
        4 if host.fences > 0 => {
            host.fences -= 1;
            host.input(now, Input::Fenced(how & 8 == 0));
        }
        _ if host.running => {
            let epoch = host.epoch;
            host.input(now, Input::FromGuest { epoch, frame });
        }
        _ => {}
    }
}
