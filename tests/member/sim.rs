//! Two hosts, an arbiter and a network in virtual time, driving the real [`Member`].
//!
//! What the world saw is one number: `released`. Every output raises it, and a VM's state is the
//! number it contains. Property R is then one comparison at every output: whoever lets something
//! out must contain everything that was ever let out. Property S is counted after every event.

use std::collections::BTreeMap;

use colo_proto::{
    id::Epoch,
    member::{
        Ballot, BootId, Claim, Command, Control, Critical, Datagram, Health, Kind, Local, MacKey,
        Member, MemberConfig, MemberEvent, MemberOutput, MemberState, Mutation, NodeId, PathId,
        PersistId, PriorRole, Record, Register, RequestId, Verdict, VmId,
    },
    time::Instant,
};

pub(crate) const VM: VmId = VmId([1; 16]);
pub(crate) const KEY: MacKey = MacKey([2; 16]);
pub(crate) const PATHS: usize = 2;

/// Microseconds of real time.
type Micros = u64;

/// SplitMix64: the only source of chance.
pub(crate) struct Chance(pub u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub(crate) fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }
}

/// The network, as it is now.
pub(crate) struct Net {
    pub(crate) loss: u64,
    pub(crate) dup: u64,
    /// Percent of datagrams that take up to five seconds.
    pub(crate) late: u64,
    pub(crate) delay: Micros,
    /// `blocked[from][path]`.
    pub(crate) blocked: [[bool; PATHS]; 2],
    pub(crate) replication: bool,
    /// Whether host i reaches the arbiter, and hears it.
    pub(crate) ask: [bool; 2],
    pub(crate) hear: [bool; 2],
    pub(crate) arbiter_delay: Micros,
}

pub(crate) struct Host {
    ppm: i64,
    base: u64,
    pub(crate) process: Option<Process>,
    pub(crate) record: Option<Record>,
    /// What the VM on this host's disk contains.
    disk: u64,
    boots: u64,
    stalled_until: Micros,
}

pub(crate) struct Process {
    pub(crate) member: Member,
    pub(crate) boot: BootId,
    /// What the VM or replica in memory contains.
    pub(crate) vm: Option<u64>,
    running: bool,
    writes: Vec<(PersistId, Record)>,
    hold: Option<Hold>,
    epoch: u64,
    pub(crate) events: Vec<MemberEvent>,
    pub(crate) announced: u32,
}

/// An owner that holds its output until a replica of this state is ready and the pair is dual.
#[derive(Clone, Copy)]
struct Hold {
    peer: BootId,
    epoch: u64,
    contains: u64,
    since: Micros,
    acked: bool,
}

#[derive(Clone)]
enum Event {
    Wake(usize, BootId),
    Datagram(usize, PathId, Vec<u8>),
    Asked(usize, BootId, RequestId, Option<Ballot>),
    Answer(usize, BootId, RequestId, Verdict),
    Durable(usize, BootId, PersistId),
    Settled(usize, BootId),
    State(usize, BootId, u64, u64),
    StateAck(usize, BootId, BootId, u64),
    Resend(usize, BootId),
    Restart(usize),
    Tick,
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) events: u64,
    pub(crate) outputs: u64,
    pub(crate) takeovers: u64,
    pub(crate) solo: u64,
    pub(crate) dual: u64,
    pub(crate) resumed: u64,
    pub(crate) cold_boots: u64,
    pub(crate) crashes: u64,
    pub(crate) stalls: u64,
}

pub(crate) struct Sim {
    pub(crate) t: Micros,
    pub(crate) chance: Chance,
    queue: BTreeMap<(Micros, u64), Event>,
    order: u64,
    pub(crate) hosts: [Host; 2],
    pub(crate) register: Register,
    pub(crate) net: Net,
    pub(crate) released: u64,
    last_release: Micros,
    /// The longest time between two outputs since [`Sim::mark`].
    pub(crate) gap: Micros,
    pub(crate) counts: Counts,
    /// The first violation, if any.
    pub(crate) violation: Option<String>,
    pub(crate) story: Vec<String>,
    pub(crate) telling: bool,
    config: fn(MemberConfig) -> MemberConfig,
    mutation: Option<Mutation>,
    pub(crate) fence_ok: Option<bool>,
    tick: Micros,
    holding: Micros,
}

impl Sim {
    pub(crate) fn new(
        seed: u64,
        config: fn(MemberConfig) -> MemberConfig,
        mutation: Option<Mutation>,
    ) -> Self {
        let host = |base| Host {
            ppm: 0,
            base,
            process: None,
            record: None,
            disk: 0,
            boots: 0,
            stalled_until: 0,
        };
        Self {
            t: 0,
            chance: Chance(seed),
            queue: BTreeMap::new(),
            order: 0,
            hosts: [host(1_000_000), host(77_000_000)],
            register: Register::default(),
            net: Net {
                loss: 0,
                dup: 0,
                late: 0,
                delay: 200,
                blocked: [[false; PATHS]; 2],
                replication: true,
                ask: [true; 2],
                hear: [true; 2],
                arbiter_delay: 2_000,
            },
            released: 0,
            last_release: 0,
            gap: 0,
            counts: Counts::default(),
            violation: None,
            story: Vec::new(),
            telling: false,
            config,
            mutation,
            fence_ok: None,
            tick: 5_000,
            holding: 1_500_000,
        }
    }

    /// Clock rate errors, in parts per million.
    pub(crate) fn clocks(&mut self, ppm: [i64; 2]) {
        for (host, ppm) in self.hosts.iter_mut().zip(ppm) {
            host.ppm = ppm;
        }
    }

    /// How often output is tried, in microseconds.
    pub(crate) fn tick_every(&mut self, tick: Micros) {
        self.tick = tick;
    }

    /// Starts both hosts and waits for dual mode: host 0 is the primary.
    pub(crate) fn pair(&mut self) {
        self.start(0);
        self.start(1);
        self.after(self.tick, Event::Tick);
        self.local(0, Local::Operator(Command::Create));
        self.run_for(300);
        if self.state(1) == Some(MemberState::Idle) {
            self.local(1, Local::Operator(Command::Join));
        }
        self.run_for(2_000);
        if self.violation.is_none() {
            assert_eq!(
                self.state(0),
                Some(MemberState::PrimaryDual),
                "{:#?}",
                self.story
            );
            assert_eq!(self.state(1), Some(MemberState::Secondary));
        }
        self.mark();
    }

    /// Forgets the gap and the events so far.
    pub(crate) fn mark(&mut self) {
        self.gap = 0;
        self.last_release = self.t;
        for host in &mut self.hosts {
            if let Some(p) = &mut host.process {
                p.events.clear();
            }
        }
    }

    pub(crate) fn state(&self, node: usize) -> Option<MemberState> {
        Some(self.hosts[node].process.as_ref()?.member.state())
    }

    pub(crate) fn is_open(&self, node: usize) -> bool {
        let now = self.clock(node);
        self.hosts[node]
            .process
            .as_ref()
            .is_some_and(|p| p.member.permit(now).is_some())
    }

    pub(crate) fn saw(&self, node: usize, wanted: impl Fn(&MemberEvent) -> bool) -> bool {
        self.hosts[node]
            .process
            .as_ref()
            .is_some_and(|p| p.events.iter().any(wanted))
    }

    /// The gap in milliseconds, including the one that lasts.
    pub(crate) fn gap_ms(&self) -> u64 {
        self.gap.max(self.t - self.last_release) / 1000
    }

    // ---- faults ---------------------------------------------------------------------------------

    pub(crate) fn crash(&mut self, node: usize) {
        self.tell(|| format!("host {node} crashes"));
        self.counts.crashes += 1;
        self.hosts[node].process = None;
    }

    pub(crate) fn start(&mut self, node: usize) {
        if self.hosts[node].process.is_some() {
            return;
        }
        let entropy = self.chance.next();
        let now = self.clock(node);
        let (config, mutation) = (self.config, self.mutation);
        let host = &mut self.hosts[node];
        host.boots += 1;
        let boot = BootId(1000 * (node as u64 + 1) + host.boots);
        let peer = NodeId(2 - node as u64);
        let config = config(MemberConfig::new(VM, peer, KEY)).check().unwrap();
        let me = NodeId(node as u64 + 1);
        let member =
            Member::start(config, me, boot, host.record, entropy, now).with_mutation(mutation);
        host.process = Some(Process {
            member,
            boot,
            vm: None,
            running: false,
            writes: Vec::new(),
            hold: None,
            epoch: 10 * host.boots,
            events: Vec::new(),
            announced: 0,
        });
        self.tell(|| format!("host {node} starts as {boot:?}"));
        self.drain(node);
    }

    pub(crate) fn restart_in(&mut self, node: usize, millis: u64) {
        self.after(millis * 1000, Event::Restart(node));
    }

    pub(crate) fn stall(&mut self, node: usize, millis: u64) {
        self.tell(|| format!("host {node} stalls for {millis} ms"));
        self.counts.stalls += 1;
        self.hosts[node].stalled_until = self.t + millis * 1000;
    }

    pub(crate) fn cut(&mut self, from: usize, blocked: bool) {
        self.net.blocked[from] = [blocked; PATHS];
    }

    pub(crate) fn cut_both(&mut self, blocked: bool) {
        self.cut(0, blocked);
        self.cut(1, blocked);
        self.net.replication = !blocked;
    }

    pub(crate) fn arbiter(&mut self, node: usize, reachable: bool) {
        self.net.ask[node] = reachable;
        self.net.hear[node] = reachable;
    }

    pub(crate) fn local(&mut self, node: usize, local: Local) {
        self.with(node, |p, now| p.member.handle_local(now, local));
    }

    pub(crate) fn health(&mut self, node: usize, health: Health) {
        self.local(node, Local::Health(health));
    }

    // ---- the loop -------------------------------------------------------------------------------

    pub(crate) fn run_for(&mut self, millis: u64) {
        let end = self.t + millis * 1000;
        while let Some((&(at, order), _)) = self.queue.first_key_value() {
            if at > end || self.violation.is_some() {
                break;
            }
            self.t = at;
            if let Some(event) = self.queue.remove(&(at, order)) {
                self.counts.events += 1;
                self.happen(event);
            }
            self.emit();
            self.check();
        }
        self.t = self.t.max(end);
    }

    fn after(&mut self, delay: Micros, event: Event) {
        self.order += 1;
        self.queue.insert((self.t + delay, self.order), event);
    }

    fn clock(&self, node: usize) -> Instant {
        let host = &self.hosts[node];
        let t = self.t as i64;
        let local = t + t * host.ppm / 1_000_000;
        Instant::from_nanos((host.base as i64 + local) as u64 * 1000)
    }

    /// When, in real time, the clock of `node` shows `at`.
    fn real(&self, node: usize, at: Instant) -> Micros {
        let host = &self.hosts[node];
        let local = (at.as_nanos() / 1000).saturating_sub(host.base) as i128;
        (local * 1_000_000 / (1_000_000 + host.ppm as i128)) as u64 + 1
    }

    fn tell(&mut self, line: impl FnOnce() -> String) {
        if self.telling {
            let line = format!("{:>9.3} {}", self.t as f64 / 1000.0, line());
            self.story.push(line);
        }
    }

    fn violate(&mut self, what: String) {
        if self.violation.is_none() {
            self.tell(|| format!("VIOLATION {what}"));
            self.violation = Some(what);
        }
    }

    fn with(&mut self, node: usize, f: impl FnOnce(&mut Process, Instant)) {
        let now = self.clock(node);
        if let Some(p) = &mut self.hosts[node].process {
            f(p, now);
            self.drain(node);
        }
    }

    fn is_instance(&self, node: usize, boot: BootId) -> bool {
        self.hosts[node]
            .process
            .as_ref()
            .is_some_and(|p| p.boot == boot)
    }

    /// A stalled process does nothing; what was meant for it waits, messages before timers.
    fn deferred(&mut self, node: usize, event: &Event) -> bool {
        let until = self.hosts[node].stalled_until;
        if until <= self.t {
            return false;
        }
        let timer = u64::from(matches!(event, Event::Wake(..)));
        self.after(until - self.t + timer, event.clone());
        true
    }

    fn happen(&mut self, event: Event) {
        let target = match &event {
            Event::Wake(n, _)
            | Event::Datagram(n, ..)
            | Event::Answer(n, ..)
            | Event::Durable(n, ..)
            | Event::Settled(n, _)
            | Event::State(n, ..)
            | Event::StateAck(n, ..)
            | Event::Resend(n, _) => Some(*n),
            Event::Asked(..) | Event::Restart(_) | Event::Tick => None,
        };
        if target.is_some_and(|n| self.deferred(n, &event)) {
            return;
        }
        match event {
            Event::Tick => self.after(self.tick, Event::Tick),
            Event::Restart(node) => self.start(node),
            Event::Wake(node, boot) => {
                let now = self.clock(node);
                let due = self.hosts[node]
                    .process
                    .as_ref()
                    .and_then(|p| p.member.poll_timeout())
                    .is_some_and(|at| at <= now);
                if due && self.is_instance(node, boot) {
                    self.with(node, |p, now| p.member.handle_timeout(now));
                }
            }
            Event::Datagram(to, path, bytes) => {
                self.with(to, |p, now| p.member.handle_datagram(now, path, &bytes));
            }
            Event::Asked(node, boot, request, ballot) => {
                let verdict = match ballot {
                    Some(ballot) => self.register.cast(&ballot),
                    None => self.register.read(request),
                };
                let register = self.register;
                self.tell(|| format!("arbiter to {node}: {ballot:?} {register:?}"));
                if self.net.hear[node] {
                    let delay = self.arbiter_delay();
                    self.after(delay, Event::Answer(node, boot, request, verdict));
                }
            }
            Event::Answer(node, boot, request, verdict) => {
                if self.is_instance(node, boot) {
                    self.with(node, |p, now| {
                        p.member.handle_arbiter(now, request, verdict);
                    });
                }
            }
            Event::Durable(node, boot, id) => {
                if self.is_instance(node, boot) {
                    self.write(node, id);
                    self.with(node, |p, now| p.member.handle_persisted(now, id));
                }
            }
            Event::Settled(node, boot) => {
                if self.is_instance(node, boot) {
                    self.local(node, Local::Settled);
                }
            }
            Event::State(to, from, epoch, contains) => self.apply(to, from, epoch, contains),
            Event::StateAck(to, boot, peer, epoch) => {
                if self.is_instance(to, boot) {
                    self.state_acked(to, peer, epoch);
                }
            }
            Event::Resend(node, boot) => {
                if self.is_instance(node, boot) {
                    self.send_state(node);
                }
            }
        }
    }

    fn arbiter_delay(&mut self) -> Micros {
        let delay = self.net.arbiter_delay;
        delay / 2 + self.chance.below(delay)
    }

    fn write(&mut self, node: usize, id: PersistId) {
        let host = &mut self.hosts[node];
        let Some(p) = &mut host.process else { return };
        while p.writes.first().is_some_and(|w| w.0 <= id) {
            host.record = Some(p.writes.remove(0).1);
        }
    }

    // ---- the VM ---------------------------------------------------------------------------------

    fn send_state(&mut self, node: usize) {
        let (t, holding) = (self.t, self.holding);
        let Some(p) = &mut self.hosts[node].process else {
            return;
        };
        let Some(hold) = p.hold else { return };
        let (boot, solo) = (p.boot, p.member.state() == MemberState::PrimarySolo);
        if !solo || t - hold.since > holding {
            // No decision for too long: go on without a replica.
            p.hold = None;
            if solo {
                self.local(node, Local::ReplicaLost);
            }
            return;
        }
        if !hold.acked {
            self.post(Event::State(1 - node, boot, hold.epoch, hold.contains));
        }
        self.after(200_000, Event::Resend(node, boot));
    }

    /// Replication messages travel on a network as bad as the heartbeats'.
    fn post(&mut self, event: Event) {
        if !self.net.replication || self.chance.percent(self.net.loss) {
            return;
        }
        if self.chance.percent(self.net.dup) {
            let delay = self.chance.below(3_000_000);
            self.after(delay, event.clone());
        }
        let delay = self.delay();
        self.after(delay, event);
    }

    fn delay(&mut self) -> Micros {
        if self.chance.percent(self.net.late) {
            self.chance.below(5_000_000)
        } else {
            self.net.delay / 2 + self.chance.below(self.net.delay)
        }
    }

    fn apply(&mut self, to: usize, from: BootId, epoch: u64, contains: u64) {
        let host = &mut self.hosts[to];
        let Some(p) = &mut host.process else { return };
        if p.member.state() != MemberState::Syncing {
            return;
        }
        p.vm = Some(contains);
        p.running = false;
        host.disk = contains;
        let me = p.boot;
        self.tell(|| format!("host {to} applies epoch {epoch} with {contains}"));
        let epoch_id = Epoch(epoch);
        self.local(
            to,
            Local::Synced {
                from,
                epoch: epoch_id,
            },
        );
        self.post(Event::StateAck(1 - to, from, me, epoch));
    }

    fn state_acked(&mut self, node: usize, peer: BootId, epoch: u64) {
        let Some(p) = &mut self.hosts[node].process else {
            return;
        };
        let Some(hold) = &mut p.hold else { return };
        if hold.peer != peer || hold.epoch != epoch || hold.acked {
            return;
        }
        hold.acked = true;
        let evidence_clean = p.vm == Some(hold.contains);
        let ready = Local::ReplicaReady {
            boot: peer,
            epoch: Epoch(epoch),
            evidence_clean,
        };
        self.local(node, ready);
    }

    /// Whoever may, lets something out.
    fn emit(&mut self) {
        for node in 0..2 {
            let awake = self.hosts[node].stalled_until <= self.t;
            let Some(p) = &self.hosts[node].process else {
                continue;
            };
            if !awake || !p.running || p.hold.is_some() || !self.is_open(node) {
                continue;
            }
            let Some(contains) = p.vm else { continue };
            let generation = p.member.generation();
            let sole = p
                .member
                .permit(self.clock(node))
                .is_some_and(|permit| permit.is_sole());
            match p.member.state() {
                MemberState::PrimarySolo if sole => self.release(node, contains),
                // Under a lease: only what the partner knows.
                MemberState::PrimaryDual | MemberState::PrimaryArbitrating => {
                    let other = &self.hosts[1 - node];
                    let evidence = self.net.replication
                        && other.stalled_until <= self.t
                        && other.process.as_ref().is_some_and(|q| {
                            matches!(
                                q.member.state(),
                                MemberState::Secondary | MemberState::SecondaryArbitrating
                            ) && q.member.generation() == generation
                                && q.vm.is_some()
                        });
                    if !evidence {
                        continue;
                    }
                    let other = &mut self.hosts[1 - node];
                    let Some(q) = &mut other.process else {
                        continue;
                    };
                    if q.vm != Some(contains) {
                        // Diverged: nothing is released until a checkpoint some time later.
                        if self.chance.percent(2) {
                            q.vm = Some(contains);
                            other.disk = contains;
                        }
                        continue;
                    }
                    self.release(node, contains);
                    let other = &mut self.hosts[1 - node];
                    if let Some(q) = &mut other.process {
                        q.vm = Some(self.released);
                        other.disk = self.released;
                    }
                }
                _ => {}
            }
        }
    }

    fn release(&mut self, node: usize, contains: u64) {
        if contains != self.released {
            let released = self.released;
            self.violate(format!(
                "R: host {node} lets output out of a state with {contains}, the world saw {released}"
            ));
            return;
        }
        self.counts.outputs += 1;
        self.released += 1;
        self.gap = self.gap.max(self.t - self.last_release);
        self.last_release = self.t;
        let host = &mut self.hosts[node];
        host.disk = self.released;
        if let Some(p) = &mut host.process {
            p.vm = Some(self.released);
        }
    }

    fn check(&mut self) {
        if self.is_open(0) && self.is_open(1) {
            let states = (self.state(0), self.state(1));
            self.violate(format!("S: both gates are open in {states:?}"));
        }
    }

    /// O5: what a control promises is in the durable record.
    fn check_promise(&mut self, node: usize, bytes: &[u8]) {
        let sender = NodeId(node as u64 + 1);
        let Ok(d) = Datagram::decode(KEY, sender, bytes) else {
            self.violate(format!("host {node} sends a datagram that cannot be read"));
            return;
        };
        let needed = match d.kind {
            Kind::Control(Control::Abstain) => Claim::Abstained,
            Kind::Control(Control::Yield) => Claim::Yielded,
            Kind::Control(Control::DualStart) => Claim::DualOwner,
            Kind::Control(Control::DualAck) => Claim::DualPartner,
            _ => return,
        };
        let record = self.hosts[node].record.unwrap_or_default();
        // An owner that already asks for the next generation still is the owner of this one.
        let claim = match record.claim {
            Claim::Arbitrating {
                from: PriorRole::DualOwner,
                ..
            } => Claim::DualOwner,
            claim => claim,
        };
        if (claim, record.generation) != (needed, d.generation) {
            self.violate(format!("O5: host {node} says {:?} on {record:?}", d.kind));
        }
    }

    /// O7: a ballot is in the durable record, or tells of an ownership that is.
    fn check_intention(&mut self, node: usize, ballot: &Ballot) {
        let record = self.hosts[node].record.unwrap_or_default();
        let known = match record.claim {
            Claim::Arbitrating { ballot: b, .. } => b == *ballot,
            Claim::Solo => record.generation == ballot.expect.next(),
            _ => false,
        };
        if !known {
            self.violate(format!("O7: host {node} casts {ballot:?} on {record:?}"));
        }
    }

    // ---- outputs --------------------------------------------------------------------------------

    fn drain(&mut self, node: usize) {
        loop {
            let Some(p) = &mut self.hosts[node].process else {
                return;
            };
            let boot = p.boot;
            let Some(output) = p.member.poll_output() else {
                break;
            };
            self.execute(node, boot, output);
        }
        let Some(p) = &self.hosts[node].process else {
            return;
        };
        let (boot, next) = (p.boot, p.member.poll_timeout());
        if let Some(at) = next {
            let at = self.real(node, at).max(self.t + 1);
            self.order += 1;
            self.queue.insert((at, self.order), Event::Wake(node, boot));
        }
    }

    fn execute(&mut self, node: usize, boot: BootId, output: MemberOutput) {
        let quiet = matches!(
            output,
            MemberOutput::Send { .. }
                | MemberOutput::Gate(Some(_))
                | MemberOutput::ReadRegister { .. }
        );
        if !quiet {
            self.tell(|| format!("{node}: {output:?}"));
        }
        let t = self.t;
        let disk = self.hosts[node].disk;
        let Some(p) = &mut self.hosts[node].process else {
            return;
        };
        match output {
            MemberOutput::Send { path, bytes } => {
                self.check_promise(node, &bytes);
                self.transmit(node, path, &bytes);
            }
            MemberOutput::Cas(ballot) => {
                self.check_intention(node, &ballot);
                self.ask(node, boot, ballot.request, Some(ballot));
            }
            MemberOutput::ReadRegister { request } => self.ask(node, boot, request, None),
            MemberOutput::Fence { .. } => {
                let ok = self.fence_ok;
                if let Some(ok) = ok {
                    if ok {
                        self.crash(1 - node);
                    }
                    self.with(node, |p, now| p.member.handle_fence(now, ok));
                }
            }
            MemberOutput::Persist { id, record } => {
                p.writes.push((id, record));
                let slow = self.chance.percent(5);
                let delay = if slow { 300_000 } else { 2_000 };
                let delay = 100 + self.chance.below(delay);
                self.after(delay, Event::Durable(node, boot, id));
            }
            MemberOutput::PauseVm => p.running = false,
            MemberOutput::ResumeVm => p.running = true,
            MemberOutput::Settle => {
                let delay = self.chance.below(50_000);
                self.after(delay, Event::Settled(node, boot));
            }
            MemberOutput::StartTakeover { .. } => self.counts.takeovers += 1,
            MemberOutput::StartSync { peer } => {
                p.epoch += 1;
                if let Some(contains) = p.vm {
                    p.hold = Some(Hold {
                        peer,
                        epoch: p.epoch,
                        contains,
                        since: t,
                        acked: false,
                    });
                    self.send_state(node);
                }
            }
            MemberOutput::DiscardVm => {
                p.vm = None;
                p.running = false;
            }
            MemberOutput::ColdBoot { .. } => {
                p.vm = Some(disk);
                p.running = true;
                self.counts.cold_boots += 1;
            }
            MemberOutput::Announce => p.announced += 1,
            MemberOutput::Event(event) => {
                p.events.push(event);
                self.note(node, event);
            }
            _ => {}
        }
    }

    fn note(&mut self, node: usize, event: MemberEvent) {
        match event {
            MemberEvent::State { from, to, .. } => match (from, to) {
                (_, MemberState::PrimarySolo) => self.counts.solo += 1,
                (MemberState::PrimarySolo, MemberState::PrimaryDual) => {
                    self.counts.dual += 1;
                    if let Some(p) = &mut self.hosts[node].process {
                        p.hold = None;
                    }
                }
                (MemberState::PrimaryArbitrating, MemberState::PrimaryDual) => {
                    self.counts.resumed += 1;
                }
                _ => {}
            },
            MemberEvent::Critical(Critical::OwnershipLost { .. }) => {
                self.violate(format!(
                    "critical: host {node} lost an ownership it had used"
                ));
            }
            _ => {}
        }
    }

    fn transmit(&mut self, node: usize, path: PathId, bytes: &[u8]) {
        let blocked = self.net.blocked[node][usize::from(path.0)];
        if blocked || self.chance.percent(self.net.loss) {
            return;
        }
        let event = Event::Datagram(1 - node, path, bytes.to_vec());
        if self.chance.percent(self.net.dup) {
            let delay = self.chance.below(3_000_000);
            self.after(delay, event.clone());
        }
        let delay = self.delay();
        self.after(delay, event);
    }

    fn ask(&mut self, node: usize, boot: BootId, request: RequestId, ballot: Option<Ballot>) {
        if self.net.ask[node] {
            let delay = self.arbiter_delay();
            self.after(delay, Event::Asked(node, boot, request, ballot));
        }
    }
}
