//! One host under any sequence of inputs.

use alloc::{vec, vec::Vec};
use core::{num::NonZeroUsize, time::Duration};

use bytes::{Bytes, BytesMut};

use super::{
    Program,
    pair::{CHANNELS, KEY, Setup, VM, bounded, command},
    toy::Toy,
};
use crate::{
    command::CommandId,
    id::{Channel, Epoch},
    machine::{Demand, GuestDone, Input, Machine as _, Output},
    member::{
        BootId, DATAGRAM_SIZE, Datagram, Flags, Health, Kind as Beat, MAX_PATHS, Member,
        MemberState, NodeId, PathId, Register, RequestId, Verdict,
    },
    node::Start,
    testing::{Effect, Host, Pair},
    time::Instant,
    wire::{HEAD_LEN, Head, Kind},
};

/// More steps than this say nothing new.
const STEPS_MOST: u64 = 512;

/// A host whose peer, arbiter, disk and clock do whatever the program says.
struct Lonely {
    now: Instant,
    host: Host<Toy>,
    register: Register,
    /// The forged peer's heartbeats are numbered.
    seq: u64,
}

/// Runs a program against one host: whatever peer, guest, arbiter, clock and operator do, right
/// calls are never misuse, every poll ends, and what waits for a peer stays bounded.
pub fn machine(data: &[u8]) {
    let mut program = Program(data);
    let how = program.byte();
    let start = if how & 8 == 0 {
        Start::Primary
    } else {
        Start::Secondary
    };
    let nobody = Pair::new(CHANNELS, Instant::from_millis(1));
    let mut lonely = Lonely {
        now: nobody.now(),
        host: Setup(how).host(0, start, 0, &nobody),
        register: Register::default(),
        seq: 0,
    };
    lonely.host.guest.lawless = true;
    for step in 0..STEPS_MOST {
        let Some(operation) = program.next() else {
            break;
        };
        lonely.step(step, operation, &mut program);
        while let Some(said) = lonely.host.poll_said() {
            if let Output::ToWorld { permit, .. } = said {
                assert!(
                    permit.allows(lonely.now),
                    "a frame under a permit that is over"
                );
            }
        }
        bounded(&lonely.host);
    }
    let _ = (lonely.host.node().stats(), lonely.host.node().status());
}

impl Lonely {
    fn input(&mut self, input: Input<'_>) {
        if let Err(misuse) = self.host.input(self.now, input) {
            panic!("a right call was misuse: {misuse}");
        }
    }

    fn step(&mut self, step: u64, operation: u8, program: &mut Program<'_>) {
        let channel = CHANNELS[usize::from(operation >> 5) % 3];
        match operation & 15 {
            0 => self.input(Input::Up(channel)),
            1 => self.input(Input::Down(channel)),
            2 => self.receive(channel, |len| filled(program, len)),
            3 | 4 => {
                let head = self.head(program);
                self.receive(channel, |len| {
                    if len == HEAD_LEN {
                        head
                    } else {
                        filled(program, len)
                    }
                });
            }
            5 => self.transmit(),
            6 => self.operate(program.byte(), false),
            7 => self.operate(0, program.byte() & 7 == 0),
            8 => {
                let deadline = self.host.node().poll_timeout();
                let at = deadline.map_or(self.now, |d| d.at.max(self.now));
                if at != Instant::END {
                    self.now = at;
                    self.input(Input::Timeout);
                }
            }
            9 => {
                let time = u64::from(program.byte()) << (operation >> 5);
                self.now = self.now + Duration::from_millis(time);
                self.input(Input::Timeout);
            }
            10 => self.datagram(operation >> 5, program),
            11 => self.arbiter(program.byte()),
            12 => {
                let command = command(program.byte());
                self.input(Input::Command(CommandId(step), command));
            }
            13 => self.wrong(program.byte()),
            14 => self.other(program.byte()),
            _ => {
                if let Some(Output::Persist(id, _)) = self.host.take(Effect::Disk) {
                    self.input(Input::Persisted(id));
                }
            }
        }
    }

    /// Answers what a channel demands with bytes that `give` provides.
    fn receive(&mut self, channel: Channel, give: impl FnOnce(usize) -> Vec<u8>) {
        match self.host.demand(channel) {
            Demand::Pause => {}
            Demand::Frame(len) => {
                let frame = BytesMut::from(&give(len.get())[..]);
                self.input(Input::Frame(channel, frame));
            }
            Demand::Read { place: None, then } => self.input(Input::Bytes(channel, &give(then))),
            Demand::Read {
                place: Some(sink), ..
            } => {
                // Contents stay as they were: no machine looks at them.
                let len = usize::try_from(sink.bytes()).ok();
                if let Some(len) = len.and_then(NonZeroUsize::new) {
                    self.input(Input::Placed(channel, len));
                }
            }
        }
    }

    fn transmit(&mut self) {
        for channel in CHANNELS {
            loop {
                match self.host.transmit(self.now, channel, 64 << 10) {
                    Ok(Some(message)) => assert!(!message.is_empty(), "an empty message"),
                    Ok(None) => break,
                    Err(misuse) => panic!("a right call was misuse: {misuse}"),
                }
            }
        }
    }

    fn operate(&mut self, dirty: u8, fails: bool) {
        self.host.guest.dirty |= u64::from(dirty);
        self.host.guest.fails = fails;
        if let Err(misuse) = self.host.operate(self.now) {
            panic!("a right call was misuse: {misuse}");
        }
    }

    /// A heartbeat: rubbish, one of the peer's, or one of the peer's with a damaged byte.
    fn datagram(&mut self, how: u8, program: &mut Program<'_>) {
        let path = PathId(program.byte() % MAX_PATHS);
        if how == 0 {
            let bytes = program.take(DATAGRAM_SIZE).to_vec();
            return self.input(Input::Datagram(path, &bytes));
        }
        let mut bytes = self.beat(path, program).encode(KEY, NodeId(2));
        if how == 1 {
            let at = usize::from(program.byte()) % DATAGRAM_SIZE;
            bytes[at] ^= program.byte().max(1);
            let before = self.host.node().clone();
            self.input(Input::Datagram(path, &bytes));
            let same = |member: Option<&Member>| member.map(|m| (m.state(), *m.record()));
            assert_eq!(
                same(self.host.node().member()),
                same(before.member()),
                "a damaged heartbeat was believed"
            );
            return;
        }
        self.input(Input::Datagram(path, &bytes));
    }

    /// What a peer could say: mostly near to the truth.
    fn beat(&mut self, path: PathId, program: &mut Program<'_>) -> Datagram {
        let (kind, near, say) = (program.byte(), program.byte(), program.byte());
        let member = self.host.node().member();
        let mut generation = member.map(Member::generation).unwrap_or_default();
        generation.0 = (generation.0 + u64::from(near & 3)).saturating_sub(1);
        self.seq += u64::from(near >> 2 & 3);
        Datagram {
            kind: match kind % 10 {
                0 => Beat::Heartbeat,
                1 => Beat::Ack,
                code => Beat::Control(crate::member::Control::ALL[usize::from(code) - 2]),
            },
            path,
            flags: Flags(say),
            vm: VM,
            generation,
            seq: self.seq,
            ack: self.seq.saturating_sub(u64::from(near >> 4 & 1)),
            boot: BootId(2000 + u64::from(near >> 5 & 1)),
            peer_boot: if near >> 6 & 1 == 0 {
                member.map(Member::boot).unwrap_or_default()
            } else {
                BootId(u64::from(say))
            },
            epoch: Epoch(self.host.node().status().epoch.0 + u64::from(near >> 7)),
            progress: u32::from(say),
            state: MemberState::ALL[usize::from(kind >> 4) % MemberState::ALL.len()],
            health: match say & 15 {
                0 => Health::Degraded,
                1 => Health::Fatal,
                _ => Health::Ok,
            },
            settings: member.map_or(0, |m| m.config().promise()) ^ u64::from(near == 0xff),
            mark: RequestId(u64::from(say)),
        }
    }

    /// A head that decodes, often of the generation that the host expects.
    fn head(&self, program: &mut Program<'_>) -> Vec<u8> {
        let kind = Kind::from_u8(program.byte() % 32).unwrap_or(Kind::Pages);
        let mut generation = self
            .host
            .node()
            .member()
            .map(Member::generation)
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

    fn arbiter(&mut self, how: u8) {
        let (id, verdict) = match self.host.take(Effect::Arbiter) {
            Some(Output::AskArbiter(ballot)) => (ballot.request, self.register.cast(&ballot)),
            Some(Output::ReadArbiter(id)) => (id, self.register.read(id)),
            _ => return,
        };
        let verdict = if how & 7 == 7 {
            Verdict::Unreachable
        } else {
            verdict
        };
        self.input(Input::Arbiter(id, verdict));
    }

    /// A call that no driver may make: refused, and nothing changes.
    fn wrong(&mut self, how: u8) {
        let busy = self
            .host
            .asked()
            .any(|o| Effect::of(o) == Some(Effect::Guest));
        let before = self.host.node().clone();
        let answer = match how & 1 {
            0 if !busy => self
                .host
                .input(self.now, Input::Guest(GuestDone::Harvested)),
            _ => self.host.input(self.now, Input::Up(Channel::Ram(9))),
        };
        assert!(answer.is_err(), "a wrong call was taken");
        assert!(*self.host.node() == before, "misuse changed the state");
    }

    fn other(&mut self, how: u8) {
        let frame = Bytes::from(vec![how; 60]);
        match how & 7 {
            0 | 1 => self.input(Input::FromWorld(frame)),
            2 => self.input(Input::Health(Health::default())),
            3 => self.input(Input::Progress(u32::from(how))),
            4 if self.host.take(Effect::Power).is_some() => {
                self.input(Input::Fenced(how & 8 == 0));
            }
            _ if self.host.guest.running => {
                let epoch = self.host.guest.epoch;
                self.input(Input::FromGuest { epoch, frame });
            }
            _ => {}
        }
    }
}

fn filled(program: &mut Program<'_>, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let given = program.take(len.min(64));
    bytes[..given.len()].copy_from_slice(given);
    bytes
}
