//! Ownership, model-checked on the real [`Member`]: every interleaving of time, messages, losses,
//! verdicts, disk writes and crashes up to a bound.
//!
//! One tick of the model is one heartbeat interval, on both nodes at once; clock drift and
//! duplicates are the business of the random schedules. The model starts from a pair in dual mode
//! with node 0 as the primary. A message may be delivered in any order for so many
//! ticks, and is lost if it was not. A write may be lost by a crash until the end of its tick.
//!
//! What the world saw is a number that grows with every output; a VM's state is the number that it
//! contains. Every node that may lets something out at every tick.
//!
//! The bounded run takes seconds. The long run is
//! `COLO_MODEL_STATES=5000000 cargo test --release -p colo-tests --test model claim -- --nocapture`.

mod systems;

use std::time::Duration;

use colo_proto::{
    id::Epoch,
    member::{
        Ballot, BootId, Command, Control, Datagram, Kind, Local, MacKey, Member, MemberConfig,
        MemberOutput, MemberState, Mutation, NodeId, PathId, PersistId, Record, Register,
        RequestId, Verdict, VmId,
    },
    time::Instant,
};
use stateright::{Model, Property};

const KEY: MacKey = MacKey([0; 16]);
/// Milliseconds per tick.
const TICK: u64 = 10;
fn config(peer: u64) -> MemberConfig {
    let ticks = |n: u64| Duration::from_millis(n * TICK);
    MemberConfig::new(VmId([0; 16]), NodeId(peer), KEY)
        .paths(1)
        .interval(ticks(1))
        .rtt_max(Duration::ZERO)
        .lease(ticks(3))
        .drift_ppm(0)
        .margin(Duration::ZERO)
        .primary_silence(ticks(4))
        .secondary_silence(ticks(6))
        .arbiter_typical(ticks(1))
        .arbiter_attempt(ticks(2))
        .stall(ticks(1000))
        .witness_silence(ticks(100_000))
        .check()
        .unwrap()
}

/// A system to explore: how long, and how much may go wrong.
#[derive(Clone)]
struct Claim {
    mutation: Option<Mutation>,
    ticks: u64,
    /// Ticks that a message may travel.
    age: u64,
    crashes: u8,
    /// How often the operator says "the peer is lost", to either node, true or not.
    failovers: u8,
    cuts: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Host {
    /// `None` while crashed.
    member: Option<Member>,
    /// What is durable.
    record: Option<Record>,
    writes: Vec<(PersistId, Record)>,
    /// What the VM in memory contains.
    vm: Option<u8>,
    /// What the VM on the disk contains.
    disk: u8,
    running: bool,
    settling: bool,
    /// The instance of the peer to synchronise, and whether output is held for it.
    syncing: Option<BootId>,
    holding: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Datagram(usize, Vec<u8>),
    Asked(usize, BootId, RequestId, Option<Ballot>),
    Answer(usize, BootId, RequestId, Verdict),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    hosts: [Host; 2],
    tick: u64,
    /// In flight, sorted, with the tick of sending.
    net: Vec<(u64, Message)>,
    register: Register,
    released: u8,
    cut: bool,
    /// Somebody let something out of a state that does not contain all that was let out before.
    forgot: bool,
    takeovers: u8,
    crashes: u8,
    failovers: u8,
    cuts: u8,
    boots: u64,
    age: u64,
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    Tick,
    Deliver(usize),
    Cut(bool),
    Durable(usize),
    Settled(usize),
    Crash(usize),
    Restart(usize),
    Resynced(usize),
    FailOver(usize),
}

impl Claim {
    /// A pair in dual mode, everything delivered.
    fn start(&self) -> World {
        let host = || Host {
            member: None,
            record: None,
            writes: Vec::new(),
            vm: None,
            disk: 0,
            running: false,
            settling: false,
            syncing: None,
            holding: false,
        };
        let mut world = World {
            hosts: [host(), host()],
            tick: 0,
            net: Vec::new(),
            register: Register::default(),
            released: 0,
            cut: false,
            forgot: false,
            takeovers: 0,
            crashes: self.crashes,
            failovers: self.failovers,
            cuts: self.cuts,
            boots: 0,
            age: self.age,
        };
        world.boot(0, self.mutation);
        world.boot(1, self.mutation);
        world.local(0, Local::Operator(Command::Create));
        for _ in 0..30 {
            world.everything();
            if world.can_resync(0) {
                world.resync(0);
            }
            world.everything();
            if world.state(1) == Some(MemberState::Secondary) && world.is_open(0) {
                break;
            }
            world.tick();
        }
        world.everything();
        assert_eq!(world.state(0), Some(MemberState::PrimaryDual));
        assert_eq!(world.state(1), Some(MemberState::Secondary));
        world
    }
}

impl World {
    fn now(&self) -> Instant {
        Instant::from_millis(1000 + self.tick * TICK)
    }

    fn state(&self, node: usize) -> Option<MemberState> {
        self.hosts[node].member.as_ref().map(Member::state)
    }

    fn is_open(&self, node: usize) -> bool {
        let member = self.hosts[node].member.as_ref();
        member.is_some_and(|m| m.permit(self.now()).is_some())
    }

    fn instance(&self, node: usize) -> Option<BootId> {
        self.hosts[node].member.as_ref().map(Member::boot)
    }

    fn boot(&mut self, node: usize, mutation: Option<Mutation>) {
        self.boots += 1;
        let config = config(2 - node as u64);
        let me = NodeId(node as u64 + 1);
        let boot = BootId(self.boots);
        let record = self.hosts[node].record;
        let member = Member::start(config, me, boot, record, self.boots, self.now());
        self.hosts[node].member = Some(member.with_mutation(mutation));
        self.drain(node);
    }

    fn with(&mut self, node: usize, f: impl FnOnce(&mut Member, Instant)) {
        let now = self.now();
        if let Some(member) = &mut self.hosts[node].member {
            f(member, now);
            self.drain(node);
        }
    }

    fn local(&mut self, node: usize, local: Local) {
        self.with(node, |m, now| m.handle_local(now, local));
    }

    fn tick(&mut self) {
        for node in 0..2 {
            self.emit(node);
        }
        self.tick += 1;
        let (tick, age) = (self.tick, self.age);
        self.net.retain(|(at, _)| at + age >= tick);
        for node in 0..2 {
            self.with(node, |m, now| m.handle_timeout(now));
        }
    }

    /// Lets something out, if the gate is open and, under a lease, the partner has it too.
    fn emit(&mut self, node: usize) {
        let now = self.now();
        let [a, b] = &mut self.hosts;
        let (host, peer) = if node == 0 { (a, b) } else { (b, a) };
        let Some(member) = &host.member else { return };
        let (Some(permit), Some(contains)) = (member.permit(now), host.vm) else {
            return;
        };
        if !host.running || host.holding {
            return;
        }
        if !permit.is_sole() {
            let evidence = peer.member.as_ref().is_some_and(|m| {
                m.generation() == permit.generation
                    && matches!(
                        m.state(),
                        MemberState::Secondary | MemberState::SecondaryArbitrating
                    )
            });
            if self.cut || !evidence || peer.vm != Some(contains) {
                return;
            }
        }
        if contains != self.released {
            self.forgot = true;
            return;
        }
        self.released += 1;
        (host.vm, host.disk) = (Some(self.released), self.released);
        if !permit.is_sole() {
            (peer.vm, peer.disk) = (Some(self.released), self.released);
        }
    }

    fn can_resync(&self, node: usize) -> bool {
        let host = &self.hosts[node];
        let sole = host
            .member
            .as_ref()
            .and_then(|m| m.permit(self.now()))
            .is_some_and(|p| p.is_sole());
        sole && !self.cut
            && !host.holding
            && host.syncing.is_some()
            && host.syncing == self.instance(1 - node)
            && self.state(1 - node) == Some(MemberState::Syncing)
    }

    /// The owner's state is whole on the peer, and its output held from here on.
    fn resync(&mut self, node: usize) {
        let (from, boot) = (self.instance(node), self.instance(1 - node));
        let (Some(from), Some(boot)) = (from, boot) else {
            return;
        };
        let (vm, disk) = (self.hosts[node].vm, self.hosts[node].disk);
        self.hosts[node].holding = true;
        let epoch = Epoch(self.tick);
        let peer = &mut self.hosts[1 - node];
        (peer.vm, peer.disk, peer.running) = (vm, disk, false);
        self.local(1 - node, Local::Synced { from, epoch });
        let ready = Local::ReplicaReady {
            boot,
            epoch,
            evidence_clean: true,
        };
        self.local(node, ready);
    }

    fn durable(&mut self, node: usize) {
        let host = &mut self.hosts[node];
        if let Some((id, record)) = host.writes.pop() {
            host.writes.clear();
            host.record = Some(record);
            self.with(node, |m, now| m.handle_persisted(now, id));
        }
    }

    fn deliver(&mut self, index: usize) {
        let (_, message) = self.net.remove(index);
        match message {
            Message::Datagram(to, bytes) => {
                self.with(to, |m, now| m.handle_datagram(now, PathId(0), &bytes));
            }
            Message::Asked(node, boot, request, ballot) => {
                let verdict = match ballot {
                    Some(ballot) => self.register.cast(&ballot),
                    None => Verdict::Read(self.register),
                };
                self.post(Message::Answer(node, boot, request, verdict));
            }
            Message::Answer(node, boot, request, verdict) => {
                if self.instance(node) == Some(boot) {
                    self.with(node, |m, now| m.handle_arbiter(now, request, verdict));
                }
            }
        }
    }

    fn post(&mut self, message: Message) {
        let entry = (self.tick, message);
        if let Err(at) = self.net.binary_search(&entry) {
            self.net.insert(at, entry);
        }
    }

    /// Delivers and writes everything there is.
    fn everything(&mut self) {
        for _ in 0..50 {
            self.durable(0);
            self.durable(1);
            if self.net.is_empty() {
                return;
            }
            self.deliver(0);
        }
    }

    fn drain(&mut self, node: usize) {
        loop {
            let host = &mut self.hosts[node];
            let Some(member) = &mut host.member else {
                return;
            };
            let boot = member.boot();
            let Some(output) = member.poll_output() else {
                return;
            };
            match output {
                MemberOutput::Send { bytes, .. } if !self.cut && matters(node, &bytes) => {
                    self.post(Message::Datagram(1 - node, bytes.to_vec()));
                }
                MemberOutput::Cas(ballot) => {
                    self.post(Message::Asked(node, boot, ballot.request, Some(ballot)));
                }
                MemberOutput::ReadRegister { request } => {
                    self.post(Message::Asked(node, boot, request, None));
                }
                MemberOutput::Persist { id, record } => host.writes.push((id, record)),
                MemberOutput::PauseVm => host.running = false,
                MemberOutput::ResumeVm => host.running = true,
                MemberOutput::Settle => host.settling = true,
                MemberOutput::StartTakeover { .. } => self.takeovers += 1,
                MemberOutput::StartSync { peer } => host.syncing = Some(peer),
                MemberOutput::DiscardVm => (host.vm, host.running) = (None, false),
                MemberOutput::ColdBoot { .. } => {
                    (host.vm, host.running) = (Some(host.disk), true);
                }
                MemberOutput::Event(_) if member.state() == MemberState::PrimaryDual => {
                    host.holding = false;
                }
                _ => {}
            }
        }
    }
}

/// Controls that only say "I am still here" would swell the state and change nothing.
fn matters(sender: usize, bytes: &[u8]) -> bool {
    let sender = NodeId(sender as u64 + 1);
    Datagram::decode(KEY, sender, bytes)
        .is_ok_and(|d| d.kind != Kind::Control(Control::Arbitrating))
}

impl Model for Claim {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.start()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.hosts.iter().all(|h| h.writes.is_empty()) {
            actions.push(Action::Tick);
        }
        actions.extend((0..world.net.len()).map(Action::Deliver));
        if world.cuts > 0 || world.cut {
            actions.push(Action::Cut(!world.cut));
        }
        for node in 0..2 {
            let host = &world.hosts[node];
            if host.member.is_none() {
                actions.push(Action::Restart(node));
                continue;
            }
            if !host.writes.is_empty() {
                actions.push(Action::Durable(node));
            }
            if host.settling {
                actions.push(Action::Settled(node));
            }
            if world.crashes > 0 {
                actions.push(Action::Crash(node));
            }
            if world.can_resync(node) {
                actions.push(Action::Resynced(node));
            }
            let paired = matches!(
                world.state(node),
                Some(MemberState::Secondary | MemberState::PrimaryDual)
            );
            if world.failovers > 0 && paired {
                actions.push(Action::FailOver(node));
            }
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Tick => world.tick(),
            Action::Deliver(index) => world.deliver(index),
            Action::Cut(cut) => {
                world.cut = cut;
                if cut {
                    world.cuts -= 1;
                    world.net.retain(|m| !matches!(m.1, Message::Datagram(..)));
                }
            }
            Action::Durable(node) => world.durable(node),
            Action::Settled(node) => {
                world.hosts[node].settling = false;
                world.local(node, Local::Settled);
            }
            Action::Crash(node) => {
                world.crashes -= 1;
                let host = &mut world.hosts[node];
                host.member = None;
                host.writes.clear();
                (host.vm, host.running, host.holding) = (None, false, false);
                (host.settling, host.syncing) = (false, None);
            }
            Action::Restart(node) => world.boot(node, self.mutation),
            Action::Resynced(node) => world.resync(node),
            Action::FailOver(node) => {
                world.failovers -= 1;
                world.local(node, Local::Operator(Command::FailOver));
            }
        }
        (world != *last).then_some(world)
    }

    fn within_boundary(&self, world: &World) -> bool {
        world.tick <= START + self.ticks
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let taken_over = |_: &Self, w: &World| w.takeovers > 0 && w.is_open(1);
        vec![
            Property::always(ONE_GATE, |_, w: &World| !(w.is_open(0) && w.is_open(1))),
            Property::always(NOTHING_FORGOTTEN, |_, w: &World| !w.forgot),
            Property::sometimes("takeover", taken_over),
            Property::sometimes("the primary goes on alone", |_, w: &World| {
                w.state(0) == Some(MemberState::PrimarySolo) && w.is_open(0)
            }),
            Property::sometimes("a pair again", |_, w: &World| {
                w.register.generation.0 >= 4
                    && (0..2).any(|n| {
                        w.state(n) == Some(MemberState::PrimaryDual)
                            && w.state(1 - n) == Some(MemberState::Secondary)
                            && w.is_open(n)
                    })
            }),
            Property::sometimes("nobody", |_, w: &World| !w.is_open(0) && !w.is_open(1)),
        ]
    }
}

const ONE_GATE: &str = "at most one gate is open";
const NOTHING_FORGOTTEN: &str = "nothing let out is forgotten";

/// The tick at which the pair is in dual mode, with everything delivered.
const START: u64 = 1;
