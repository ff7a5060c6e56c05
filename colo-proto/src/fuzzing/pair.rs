//! Two hosts wired to each other; the program decides what is delivered, lost, cut and when. After
//! every step the laws of `tests/world` are checked against a reference: what a client saw so far.

use alloc::{collections::BTreeMap, vec};
use bytes::Bytes;
use core::time::Duration;

use super::{
    Program,
    toy::{PAGES, SLOT, Toy, mix},
};
use crate::{
    command::{Command, CommandId},
    config::Config,
    error::Misuse,
    event::Event,
    id::Channel,
    machine::{Input, Machine as _, Output},
    member::{BootId, MacKey, Member, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    ram::CacheMode,
    status::{Mode, ResumePolicy},
    testing::{Effect, Host, Pair},
    time::Instant,
};

pub(super) const CHANNELS: [Channel; 3] = [Channel::Control, Channel::Ram(0), Channel::Net];
pub(super) const KEY: MacKey = MacKey([7; 16]);
pub(super) const VM: VmId = VmId([7; 16]);
const HOLD_BYTES: usize = 64 << 10;

/// How both hosts are set up, from one byte.
#[derive(Clone, Copy)]
pub(super) struct Setup(pub(super) u8);

impl Setup {
    fn config(self, id: u64) -> Config {
        let flag = |bit: u8| self.0 >> bit & 1 == 1;
        let config = Config::builder(
            NodeId(id),
            MemberConfig::fast(VM, NodeId(3 - id), KEY)
                .hang(Duration::from_millis(300))
                .hang_in_checkpoint(Duration::from_millis(400)),
            &[(SLOT, PAGES as u64)],
        )
        .longest(Duration::from_millis(20))
        .compare_timeout(Duration::from_millis(20))
        .stall(Duration::from_millis(500))
        .hold_bytes(HOLD_BYTES)
        .mode(if flag(0) {
            Mode::Lockstep
        } else {
            Mode::Standby
        })
        .resume(if flag(1) {
            ResumePolicy::AfterLoad
        } else {
            ResumePolicy::AfterCapture
        })
        .cache(if flag(2) {
            CacheMode::Full
        } else {
            CacheMode::Union
        })
        .build();
        match config {
            Ok(config) => config,
            Err(error) => panic!("the fuzzers' configuration is wrong: {error}"),
        }
    }

    /// Host 0 or 1, in its `boots`th life.
    pub(super) fn host(self, at: usize, start: Start, boots: u64, pair: &Pair<Toy>) -> Host<Toy> {
        let id = at as u64 + 1;
        let (record, boot) = (pair.record(at), BootId(id * 1000 + boots));
        let node = Node::new(self.config(id), start, boot, record, boot.0, pair.now());
        Host::new(node, Toy::new(start == Start::Primary))
    }
}

/// The schedule and the reference.
#[derive(Clone)]
struct World {
    setup: Setup,
    pair: Pair<Toy>,
    /// Each history's predecessor and number.
    parents: BTreeMap<u64, (u64, u64)>,
    /// The newest number and history that a client saw.
    shown: (u64, u64),
    protected: bool,
    clients: u64,
    commands: u64,
    boots: u64,
}

/// Runs a schedule: right calls are never misuse; a client never sees what contradicts what it saw;
/// no guest runs a mixture of two epochs; two hosts never may let output leave at once; queues stay
/// under their bounds; whoever is silent has a timer.
pub fn pair_schedule(data: &[u8]) {
    let mut program = Program(data);
    let how = program.byte();
    let mut world = World::new(Setup(how));
    let mut right = Ok(());
    if how & 8 != 0 {
        right = world.protect();
    }
    for _ in 0..256 {
        let Some(step) = program.next() else { break };
        right = right.and_then(|()| world.step(step, &mut program));
        if let Err(misuse) = &right {
            panic!("a right call was misuse: {misuse}");
        }
        world.check();
    }
}

impl World {
    fn new(setup: Setup) -> Self {
        let mut pair = Pair::new(CHANNELS, Instant::from_millis(1));
        for (at, start) in [Start::Primary, Start::Secondary].into_iter().enumerate() {
            let host = setup.host(at, start, 0, &pair);
            pair.start(at, host);
        }
        Self {
            setup,
            pair,
            parents: BTreeMap::new(),
            shown: (0, 1),
            protected: false,
            clients: 0,
            commands: 0,
            boots: 0,
        }
    }

    /// A good start: most programs would not get this far by themselves.
    fn protect(&mut self) -> Result<(), Misuse> {
        for _ in 0..1_000 {
            if self.protected {
                break;
            }
            self.run(1)?;
        }
        assert!(
            self.protected,
            "an undisturbed pair does not come into step"
        );
        Ok(())
    }

    /// Milliseconds in which all that is asked for happens at once.
    fn run(&mut self, millis: usize) -> Result<(), Misuse> {
        for _ in 0..millis {
            self.pair.pass(Duration::from_millis(1));
            self.pair.wake(0)?;
            self.pair.wake(1)?;
            self.settle()?;
        }
        Ok(())
    }

    /// Everything happens that can happen now. Checked in between: at the end, an owner that booted
    /// alone may be one of a pair again.
    fn settle(&mut self) -> Result<(), Misuse> {
        while self.pair.step(0)? | self.pair.step(1)? {
            self.check();
        }
        Ok(())
    }

    fn step(&mut self, step: u8, program: &mut Program<'_>) -> Result<(), Misuse> {
        let (at, high) = (usize::from(step >> 4) & 1, usize::from(step >> 5));
        let channel = CHANNELS[high % 3];
        let pair = &mut self.pair;
        match step & 15 {
            0 => self.settle()?,
            1 => self.run(high + 1)?,
            2 => {
                pair.step(at)?;
            }
            3 => {
                pair.effect(at, Effect::ALL[high % Effect::ALL.len()])?;
            }
            4 => {
                pair.send(at, channel, if high > 3 { 4096 } else { 1 << 20 })?;
            }
            5 => {
                pair.receive(at, channel)?;
            }
            6 => pair.cut(channel)?,
            7 => match pair.host_mut(at) {
                Some(host) if high < 4 => host.guest.fails = high == 0,
                Some(host) if high < 6 => host.guest.salt = u64::from(program.byte()),
                Some(host) => {
                    host.take(Effect::Datagram);
                }
                None => {}
            },
            8 => {
                self.commands += 1;
                let command = command(program.byte());
                pair.input(at, Input::Command(CommandId(self.commands), command))?;
            }
            9 | 10 => {
                self.clients += 1;
                let frame = Bytes::from(vec![self.clients as u8; 14 + high * 8]);
                for at in 0..2 {
                    pair.input(at, Input::FromWorld(frame.clone()))?;
                }
            }
            11 => {
                if let Some(host) = pair.host_mut(at) {
                    host.guest
                        .scribble(high, mix(self.clients, u64::from(step)));
                }
                pair.listen(at)?;
            }
            12 => pair.reaches_arbiter[at] = high > 1,
            13 if high == 0 => pair.kill(at)?,
            13 if pair.host(at).is_none() => {
                self.boots += 1;
                let host = self.setup.host(at, Start::Secondary, self.boots, pair);
                pair.start(at, host);
            }
            13 | 14 => {
                pair.pass(Duration::from_micros(300 << high));
                pair.wake(at)?;
            }
            _ => {
                pair.pass(Duration::from_micros(300 << high));
                pair.wake(0)?;
                pair.wake(1)?;
            }
        }
        Ok(())
    }

    fn check(&mut self) {
        for at in 0..2 {
            let Some(host) = self.pair.host_mut(at) else {
                continue;
            };
            for (before, state) in host.guest.steps.drain(..) {
                self.parents.insert(state.history, (before, state.ticks));
            }
            if core::mem::take(&mut host.guest.booted) {
                // A sole owner that lost power: what RAM held is gone for all.
                let owner = NodeId(at as u64 + 1);
                assert!(
                    self.pair.register.is_solo_of(owner),
                    "boots what is another's"
                );
                self.shown = (0, 1);
            }
        }
        while let Some((at, report)) = self.pair.report() {
            match report {
                Output::ToWorld { frame, .. } => self.leaves(at, &frame),
                Output::Event(Event::Protected { .. }) => self.protected = true,
                _ => {}
            }
        }
        let now = self.pair.now();
        let mut permits = 0;
        for host in (0..2).filter_map(|at| self.pair.host(at)) {
            let node = host.node();
            let permit = node.member().and_then(|m: &Member| m.permit(now));
            permits += u32::from(permit.is_some_and(|permit| permit.allows(now)));
            assert!(node.poll_timeout().is_some(), "waits for ever");
            bounded(host);
        }
        assert!(permits < 2, "two permits at once");
    }

    /// A frame leaves: its history contains all that was shown, or is part of it.
    fn leaves(&mut self, at: usize, frame: &[u8]) {
        let word = |at| frame.get(at..at + 8).and_then(|b| b.try_into().ok());
        let (Some(ticks), Some(history)) = (word(14), word(22)) else {
            panic!("a frame that no guest said");
        };
        let this = (u64::from_le_bytes(ticks), u64::from_le_bytes(history));
        let (old, new) = if this.0 < self.shown.0 {
            (this, self.shown)
        } else {
            (self.shown, this)
        };
        let mut back = new;
        while back.0 > old.0 {
            match self.parents.get(&back.1) {
                Some(&(before, _)) => back = (back.0 - 1, before),
                None => break,
            }
        }
        assert_eq!(back.1, old.1, "host {at} contradicts what a client saw");
        self.shown = new;
    }
}

/// What is queued for a peer that does not read.
pub(super) fn bounded(host: &Host<Toy>) {
    for channel in CHANNELS {
        let queued = host.node().queued(channel);
        assert!(
            queued <= 2 * HOLD_BYTES,
            "{queued} bytes wait on {channel:?}"
        );
    }
}

pub(super) fn command(which: u8) -> Command {
    match which % 12 {
        0 => Command::CheckpointNow,
        1 => Command::LostHeartbeat,
        2 => Command::FailOver,
        3 => Command::Detach,
        4 => Command::Attach,
        5 => Command::CheckpointDelay(Duration::from_millis(u64::from(which))),
        6 => Command::SetMode(Mode::Standby),
        7 => Command::SetMode(Mode::Lockstep),
        8 => Command::Stop,
        9 => Command::Continue,
        10 => Command::XenDoCheckpoint,
        _ => Command::Shutdown,
    }
}
