//! The epoch protocol, model-checked on the real `Primary` and `Secondary`: every interleaving of
//! deliveries, guest operations, guest steps, checkpoints, cuts, crashes and an operator's failover
//! up to a bound.
//!
//! Who owns the VM is told (`Node::told`): agreeing upon it is the business of `claim`. The
//! operator tells one host, whatever the other one is doing; a primary that was not told must keep
//! its output to itself from the moment its secondary may have been.
//!
//! What a machine has to send is on its way at once; it arrives in pieces: a head, a table,
//! contents, each of them a step. So a checkpoint may be cut within a message, too.
//!
//! The bounded run takes seconds. The long run is
//! `COLO_MODEL_STATES=2500000 cargo test --release -p colo-tests --test model epoch -- --nocapture
//! --include-ignored`.

mod systems;

use std::time::Duration;

use bytes::Bytes;
use colo_proto::{
    Bug,
    command::{Command, CommandId},
    config::Config,
    error::{Misuse, PeerFault},
    event::{Event, PeerLost},
    id::{Channel, Epoch, Role, Slot},
    machine::{GuestOp, Input, Machine as _, Output},
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    ram::CacheMode,
    status::{FailoverStatus, Mode, ResumePolicy},
    testing::{Effect, Host, Pair},
    time::Instant,
};
use stateright::{Model, Property};

use crate::guest::{History, PAGES, Vm};

const WHOLE: &str = "a guest is of one epoch, never between";
const COMMIT: &str = "what was let out is of one history, which the survivor has";
const LOADED: &str = "nothing is acknowledged before it is so";
const HONEST: &str = "an honest peer is not called faulty";
const AWAKE: &str = "every wait has a deadline";
const RIGHT: &str = "what the guest and the network report is never misuse";
const LAWS: [&str; 6] = [WHOLE, COMMIT, LOADED, HONEST, AWAKE, RIGHT];

const ROLLED_BACK: &str = "takes over before a checkpoint is whole";
const WHILE_APPLIED: &str = "takes over while a checkpoint is applied";
const BEFORE_KNOWN: &str = "takes over when it is applied and the primary does not know";
const ALONE: &str = "the primary goes on alone";
const PROTECTED: &str = "both are protected";
const COVERED: &str = "output leaves because a checkpoint covers it";
const AGREED: &str = "output leaves because both guests said it";

/// A system to explore.
#[derive(Clone, Copy)]
struct Epochs {
    mode: Mode,
    resume: ResumePolicy,
    cache: CacheMode,
    /// Whether it begins before the hosts have met.
    fresh: bool,
    bug: Option<Bug>,
    budget: Budget,
}

/// How much may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Budget {
    inputs: u8,
    checkpoints: u8,
    /// Guest steps that go another way than the other guest's.
    whims: u8,
    cuts: u8,
    crashes: u8,
    /// How often time passes up to the next deadline.
    waits: u8,
    /// How often an operator may stop and continue the primary's guest.
    stops: u8,
    /// How often it may ask for the other mode.
    switches: u8,
    /// How often it may give any other order, to either host.
    orders: u8,
    failovers: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    pair: Pair<Vm>,
    budget: Budget,
    /// The longest history that the world has seen.
    released: History,
    /// Newest epoch that the primary holds for complete.
    complete: Epoch,
    stopped: bool,
    /// A checkpoint was asked for.
    requested: bool,
    /// Where the secondary took over.
    promoted: Option<Epoch>,
    seen: Seen,
    broken: Option<&'static str>,
}

/// What has happened, for the *sometimes* properties.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Seen {
    relaunched: bool,
    alone: bool,
    agreed: bool,
    covered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Client,
    Step(usize, u16),
    Report(usize),
    Operate(usize),
    Receive(usize, Channel),
    Checkpoint,
    Stop,
    Continue,
    Switch(Mode),
    Order(usize, Command),
    Cut(Channel),
    Crash(usize),
    FailOver(usize),
    Wait,
}

/// All commands but those that have a budget of their own.
const ORDERS: [Command; 9] = [
    Command::FailOver,
    Command::Detach,
    Command::Attach,
    Command::CheckpointDelay(Duration::from_secs(1)),
    replicate(true, Role::Primary, None),
    replicate(true, Role::Secondary, None),
    replicate(false, Role::Primary, Some(true)),
    Command::XenDoCheckpoint,
    Command::Shutdown,
];

const fn replicate(enable: bool, role: Role, failover: Option<bool>) -> Command {
    Command::XenSetReplication {
        enable,
        role,
        failover,
    }
}

const CHANNELS: [Channel; 3] = [Channel::Control, Channel::Ram(0), Channel::Net];

impl Epochs {
    fn config(&self, node: u64) -> Config {
        let member = MemberConfig::new(VmId([0; 16]), NodeId(3 - node), MacKey([0; 16]));
        Config::builder(NodeId(node), member, &[(Slot(0), PAGES as u64)])
            .mode(self.mode)
            .resume(self.resume)
            .cache(self.cache)
            .longest(Duration::from_secs(3600))
            .shortest(Duration::ZERO)
            .compare_timeout(Duration::from_secs(60))
            .build()
            .unwrap()
            .with_bug(self.bug)
    }

    /// A pair that has just become protected, or has not met.
    fn start(&self) -> World {
        let now = Instant::from_millis(1000);
        let mut pair = Pair::new(CHANNELS, now);
        for (at, start) in [Start::Primary, Start::Secondary].into_iter().enumerate() {
            let boot = BootId(at as u64 + 1);
            let node = Node::told(self.config(boot.0), start, boot, now);
            pair.start(at, Host::new(node, Vm::new(at == 0)));
        }
        if !self.fresh {
            pair.settle().unwrap();
        }
        let mut world = World {
            pair,
            budget: self.budget,
            released: History::START,
            complete: Epoch(0),
            stopped: false,
            requested: false,
            promoted: None,
            seen: Seen::default(),
            broken: None,
        };
        world.follow();
        world
    }
}

impl World {
    fn vm(&self, at: usize) -> Option<&Vm> {
        self.pair.host(at).map(|host| &host.guest)
    }

    fn status(&self, at: usize) -> Option<colo_proto::status::Status> {
        Some(self.pair.host(at)?.node().status())
    }

    /// Where clients' frames go: to the primary, and after a takeover to the secondary.
    fn serving(&self) -> Option<usize> {
        let at = usize::from(self.promoted.is_some());
        self.pair.host(at).map(|_| at)
    }

    /// A call of a driver that does its work.
    fn call<T: Default>(&mut self, call: impl FnOnce(&mut Pair<Vm>) -> Result<T, Misuse>) -> T {
        call(&mut self.pair).unwrap_or_else(|_| {
            self.broken = Some(RIGHT);
            T::default()
        })
    }

    fn command(&mut self, at: usize, command: Command) {
        let input = Input::Command(CommandId(0), command);
        self.call(|pair| pair.input(at, input));
    }

    /// Puts on its way what the hosts have to send, does what only the network answers, and looks
    /// at what was said.
    fn follow(&mut self) {
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for at in 0..2 {
                moved |= self.call(|pair| pair.effect(at, Effect::Connection));
                for channel in CHANNELS {
                    // A page at a time.
                    moved |= self.call(|pair| pair.send(at, channel, 4096));
                }
            }
        }
        self.listen();
    }

    fn listen(&mut self) {
        while let Some((at, said)) = self.pair.report() {
            match said {
                Output::ToWorld { frame, .. } => self.let_out(&frame),
                Output::Event(Event::Checkpointed { epoch, .. }) => {
                    self.complete = epoch;
                    // A secondary that is off has taken the truth with it.
                    if self.vm(1).is_some_and(|vm| vm.loaded < epoch) {
                        self.broken = Some(LOADED);
                    }
                }
                Output::Event(Event::Promoted { epoch, .. }) => {
                    self.promoted = Some(epoch);
                    let vm = self.vm(at).map(|vm| (vm.history, vm.loaded));
                    let Some((history, loaded)) = vm else {
                        continue;
                    };
                    if loaded != epoch || epoch < self.complete {
                        self.broken = Some(WHOLE);
                    }
                    // In lockstep what is missing is still to be consumed again.
                    let standby = self.status(at).is_some_and(|s| s.mode == Mode::Standby);
                    if standby && !self.released.led_to(history) {
                        self.broken = Some(COMMIT);
                    }
                }
                Output::Event(Event::PeerLeft(PeerLost::Faulty(fault))) => {
                    let stalled = matches!(fault, PeerFault::Stalled { .. });
                    if !stalled {
                        self.broken = Some(HONEST);
                    }
                }
                Output::Event(Event::Failover(FailoverStatus::Relaunch)) => {
                    self.seen.relaunched = true;
                }
                Output::Event(Event::Unprotected(_)) => self.seen.alone = true,
                _ => {}
            }
        }
        for at in 0..2 {
            if self.vm(at).is_some_and(|vm| vm.broken.is_some()) {
                self.broken = Some(WHOLE);
            }
            if self.waits(at) && self.deadline(at).is_none() {
                self.broken = Some(AWAKE);
            }
        }
    }

    fn let_out(&mut self, frame: &Bytes) {
        let history = History(u16::from_be_bytes([frame[0], frame[1]]));
        if self.released.led_to(history) {
            self.released = history;
        } else if !history.led_to(self.released) {
            self.broken = Some(COMMIT);
        }
        // Protected and serving: either both guests said it, or a checkpoint has it.
        if self.status(0).is_some_and(|s| s.protected) && self.promoted.is_none() {
            let matched = self
                .pair
                .host(0)
                .map_or(0, |host| host.node().stats().matched);
            self.seen.agreed |= matched > 0;
            self.seen.covered |= matched == 0;
        }
    }

    /// Whether a host is in the middle of something that only its peer or its guest can end.
    fn waits(&self, at: usize) -> bool {
        const RESTS: [&str; 5] = [
            "alone",
            "running",
            "empty",
            "shadowing",
            "settling ownership",
        ];
        self.status(at).is_some_and(|s| !RESTS.contains(&s.phase))
    }

    fn deadline(&self, at: usize) -> Option<Instant> {
        self.pair.host(at)?.node().poll_timeout().map(|d| d.at)
    }

    /// Nothing moves until the first of those that wait has waited too long.
    fn wait(&mut self) {
        let waits = [0, 1].into_iter().filter(|&at| self.waits(at));
        if let Some(next) = waits.filter_map(|at| self.deadline(at)).min() {
            self.pair.pass(next.since(self.pair.now()));
            self.call(|pair| pair.wake(0));
            self.call(|pair| pair.wake(1));
        }
    }
}

impl Model for Epochs {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.start()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.broken.is_some() {
            // What comes after explains nothing.
            return;
        }
        let budget = &world.budget;
        let primary = world.pair.host(0).is_some();
        for at in 0..2 {
            let Some(host) = world.pair.host(at) else {
                continue;
            };
            if host
                .asked()
                .any(|asked| Effect::of(asked) == Some(Effect::Guest))
            {
                actions.push(Action::Operate(at));
            }
            if host.guest.can_step() {
                actions.push(Action::Step(at, 0));
                if budget.whims > 0 && at == 1 {
                    actions.push(Action::Step(at, 1));
                }
            }
            if host.guest.has_said() {
                actions.push(Action::Report(at));
            }
            actions.extend(CHANNELS.map(|channel| Action::Receive(at, channel)));
            if budget.crashes > 0 {
                actions.push(Action::Crash(at));
            }
            if budget.failovers > 0 {
                actions.push(Action::FailOver(at));
            }
            if budget.orders > 0 {
                actions.extend(ORDERS.map(|order| Action::Order(at, order)));
            }
        }
        if budget.inputs > 0 && world.serving().is_some() {
            actions.push(Action::Client);
        }
        if budget.checkpoints > 0 && primary && world.promoted.is_none() {
            actions.push(Action::Checkpoint);
        }
        if budget.stops > 0 && primary {
            actions.push(Action::Stop);
        }
        if world.stopped && primary {
            actions.push(Action::Continue);
        }
        if budget.switches > 0 && primary {
            actions.extend([Mode::Standby, Mode::Lockstep].map(Action::Switch));
        }
        if budget.cuts > 0 {
            actions.extend(CHANNELS.map(Action::Cut));
        }
        if budget.waits > 0 && [0, 1].iter().any(|&at| world.waits(at)) {
            actions.push(Action::Wait);
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Client => {
                let at = world.serving()?;
                let input = Input::FromWorld(Bytes::from_static(&[0]));
                world.call(|pair| pair.input(at, input));
                world.budget.inputs -= 1;
            }
            Action::Step(at, bit) => {
                world.pair.host_mut(at)?.guest.step(bit);
                world.budget.whims -= u8::from(bit == 1);
            }
            Action::Report(at) => {
                world.call(|pair| pair.listen(at));
            }
            Action::Operate(at) => {
                world.call(|pair| pair.effect(at, Effect::Guest));
            }
            Action::Receive(at, channel) => {
                if !world.call(|pair| pair.receive(at, channel)) {
                    return None;
                }
            }
            Action::Checkpoint => {
                world.command(0, Command::CheckpointNow);
                world.budget.checkpoints -= 1;
                world.requested = true;
            }
            Action::Stop | Action::Continue => {
                world.stopped = action == Action::Stop;
                let command = if world.stopped {
                    world.budget.stops -= 1;
                    Command::Stop
                } else {
                    Command::Continue
                };
                world.command(0, command);
            }
            Action::Switch(mode) => {
                world.command(0, Command::SetMode(mode));
                world.budget.switches -= 1;
            }
            Action::Order(at, command) => {
                world.command(at, command);
                world.budget.orders -= 1;
            }
            Action::Cut(channel) => {
                world.call(|pair| pair.cut(channel));
                world.budget.cuts -= 1;
            }
            Action::Crash(at) => {
                world.call(|pair| pair.kill(at));
                world.budget.crashes -= 1;
            }
            Action::FailOver(at) => {
                world.command(at, Command::LostHeartbeat);
                world.budget.failovers -= 1;
            }
            Action::Wait => {
                world.wait();
                world.budget.waits -= 1;
            }
        }
        world.follow();
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(WHOLE, |_, w: &World| w.broken != Some(WHOLE)),
            Property::always(COMMIT, |_, w: &World| w.broken != Some(COMMIT)),
            Property::always(LOADED, |_, w: &World| w.broken != Some(LOADED)),
            Property::always(HONEST, |_, w: &World| w.broken != Some(HONEST)),
            Property::always(AWAKE, |_, w: &World| w.broken != Some(AWAKE)),
            Property::always(RIGHT, |_, w: &World| w.broken != Some(RIGHT)),
            Property::sometimes(ROLLED_BACK, |_, w: &World| {
                w.promoted == Some(Epoch(1)) && w.requested
            }),
            Property::sometimes(WHILE_APPLIED, |_, w: &World| {
                w.seen.relaunched && w.promoted == Some(Epoch(2))
            }),
            Property::sometimes(BEFORE_KNOWN, |_, w: &World| {
                !w.seen.relaunched && w.promoted == Some(Epoch(2)) && w.complete == Epoch(1)
            }),
            Property::sometimes(ALONE, |_, w: &World| w.seen.alone),
            Property::sometimes(PROTECTED, |_, w: &World| {
                [0, 1]
                    .iter()
                    .all(|&at| w.status(at).is_some_and(|s| s.protected))
            }),
            Property::sometimes(COVERED, |_, w: &World| w.seen.covered),
            Property::sometimes(AGREED, |_, w: &World| w.seen.agreed),
        ]
    }
}
