//! Hosts, connections, arbiter, faults, and what is checked after every step.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use colo_proto::{
    command::{Command, CommandId},
    config::{Config, PassThrough},
    event::Event,
    id::{Channel, Role, Slot},
    machine::{
        Body, Captured, Demand, GuestDone, GuestOp, GuestOpKind, Input, Machine, Output, Sink,
    },
    member::{
        Ballot, BootId, MacKey, MemberConfig, NodeId, PathId, PersistId, Record, Register,
        RequestId, Verdict, VmId,
    },
    node::{Node, Start},
    ram::CacheMode,
    status::{Mode, ResumePolicy},
    time::Instant,
};

use crate::guest::{Guest, PAGES, bits, mix};

/// Microseconds of real time.
pub type Micros = u64;

/// How a world is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Mode to begin in.
    pub mode: Mode,
    /// When the primary runs on.
    pub resume: ResumePolicy,
    /// The secondary's memory rule.
    pub cache: CacheMode,
    /// RAM channels.
    pub lanes: u8,
    /// Percent of client frames that make the guests differ.
    pub diverge: u64,
}

impl Setup {
    /// One of the sixteen, by number.
    #[must_use]
    pub const fn numbered(n: u64) -> Self {
        Self {
            mode: if n & 1 == 0 {
                Mode::Lockstep
            } else {
                Mode::Standby
            },
            resume: if n & 2 == 0 {
                ResumePolicy::AfterCapture
            } else {
                ResumePolicy::AfterLoad
            },
            cache: if n & 4 == 0 {
                CacheMode::Union
            } else {
                CacheMode::Full
            },
            lanes: if n & 8 == 0 { 1 } else { 2 },
            diverge: if n & 16 == 0 { 0 } else { 20 },
        }
    }
}

/// What happened, in numbers.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Events of the world.
    pub steps: u64,
    /// Checkpoints that a primary saw through.
    pub epochs: u64,
    /// Promotions of a secondary.
    pub takeovers: u64,
    /// Sole owners that booted anew after a loss of power.
    pub cold_boots: u64,
    /// Returns to an older VM after the sole owner of a newer one lost power: a second fault.
    pub rollbacks: u64,
    /// Frames that left.
    pub released: u64,
    /// Times that protection began.
    pub protected: u64,
    /// Faults, by kind.
    pub faults: BTreeMap<&'static str, u64>,
}

enum Piece {
    Bytes(Bytes),
    Page(u64),
}

struct Conn {
    id: u64,
    /// Which boots it joins.
    boots: [BootId; 2],
    /// Arrived at each host and not read.
    rx: [VecDeque<Piece>; 2],
    /// Which ends are open.
    open: [bool; 2],
    /// When the last bytes toward each host arrive.
    last: [Micros; 2],
    /// Handed out by each host and not taken by its kernel.
    outstanding: [u64; 2],
}

struct Process {
    node: Node,
    boot: BootId,
    guest: Guest,
    /// When its last report of a frame is due; they do not overtake each other.
    last_frame: Micros,
    promoted: bool,
}

/// One host.
pub struct Host {
    process: Option<Process>,
    record: Option<Record>,
    boots: u64,
    base: u64,
    frozen: Micros,
    /// The next operation that fails.
    pub fail: Option<GuestOpKind>,
    arbiter: bool,
    /// Whether what it sends arrives.
    cut: bool,
}

enum What {
    Wake,
    Up(Channel, u64),
    Down(Channel, u64),
    Refused(Channel),
    Arrive(Channel, u64, Vec<Piece>),
    Sent(Channel, u64, NonZeroUsize),
    Datagram(PathId, Vec<u8>),
    FromGuest(colo_proto::id::Epoch, Bytes),
    FromWorld(Bytes),
    Op,
    Verdict(RequestId, Verdict),
    Durable(PersistId, Record),
    Fenced,
    Command(Command),
}

enum Due {
    Host(usize, BootId, What),
    Dial(usize, BootId, Channel),
    Asked(usize, BootId, RequestId, Option<Ballot>),
    Restart(usize),
    Client,
    Heal,
}

/// The world.
pub struct World {
    /// Now.
    pub t: Micros,
    seed: u64,
    queue: BTreeMap<(Micros, u64), Due>,
    order: u64,
    hosts: [Host; 2],
    conns: BTreeMap<Channel, Conn>,
    conn_ids: u64,
    register: Register,
    setup: Setup,
    /// Each history's predecessor and length.
    parents: BTreeMap<u64, (u64, u64)>,
    shown: (u64, u64),
    clients: u64,
    sole_lost: bool,
    commands: u64,
    slow: u64,
    /// What happened, in numbers.
    pub counts: Counts,
    /// The first thing that must not happen.
    pub violation: Option<String>,
    /// What happened, in words.
    pub story: Vec<String>,
    /// Whether the story is told.
    pub telling: bool,
    /// Events since they were last forgotten: host and event.
    pub events: Vec<(usize, Event)>,
}

impl World {
    /// Both hosts on; host 0 owns the VM.
    #[must_use]
    pub fn new(seed: u64, setup: Setup) -> Self {
        let host = |base| Host {
            process: None,
            record: None,
            boots: 0,
            base,
            frozen: 0,
            fail: None,
            arbiter: true,
            cut: false,
        };
        let mut world = Self {
            t: 0,
            seed,
            queue: BTreeMap::new(),
            order: 0,
            hosts: [host(1_000_000_000), host(77_000_000_000)],
            conns: BTreeMap::new(),
            conn_ids: 0,
            register: Register::default(),
            setup,
            parents: BTreeMap::new(),
            shown: (0, 1),
            clients: 0,
            sole_lost: false,
            commands: 0,
            slow: 300,
            counts: Counts::default(),
            violation: None,
            story: Vec::new(),
            telling: false,
            events: Vec::new(),
        };
        world.start(0, Start::Primary);
        world.start(1, Start::Secondary);
        world.after(5_000, Due::Client);
        world
    }

    fn next(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.seed, 7)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    fn after(&mut self, micros: Micros, due: Due) {
        self.order += 1;
        self.queue.insert((self.t + micros, self.order), due);
    }

    fn soon(&mut self, i: usize, micros: Micros, what: What) {
        if let Some(boot) = self.boot(i) {
            self.after(micros, Due::Host(i, boot, what));
        }
    }

    fn boot(&self, i: usize) -> Option<BootId> {
        Some(self.hosts[i].process.as_ref()?.boot)
    }

    fn clock(&self, i: usize) -> Instant {
        Instant::from_nanos(self.hosts[i].base + self.t * 1000)
    }

    fn tell(&mut self, what: impl FnOnce() -> String) {
        if self.telling {
            self.story.push(format!("{:>10} {}", self.t, what()));
        }
    }

    fn violate(&mut self, what: String) {
        self.tell(|| format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    fn fault(&mut self, kind: &'static str, i: usize) {
        self.tell(|| format!("fault: {kind} at host {i}"));
        *self.counts.faults.entry(kind).or_default() += 1;
    }

    // ---- what a test does ------------------------------------------------------------------

    /// Starts a host that is off.
    pub fn start(&mut self, i: usize, start: Start) {
        if self.hosts[i].process.is_some() {
            return;
        }
        let entropy = self.next();
        let now = self.clock(i);
        let host = &mut self.hosts[i];
        host.boots += 1;
        let boot = BootId(1000 * (i as u64 + 1) + host.boots);
        let member = MemberConfig::new(VmId([1; 16]), NodeId(2 - i as u64), MacKey([2; 16]));
        let setup = self.setup;
        let config = Config::builder(NodeId(i as u64 + 1), member, &[(Slot(0), PAGES as u64)])
            .lanes(setup.lanes)
            .cache(setup.cache)
            .mode(setup.mode)
            .resume(setup.resume)
            .longest(Duration::from_millis(40))
            .compare_timeout(Duration::from_millis(20))
            .stall(Duration::from_secs(2))
            .pass(PassThrough::default())
            .build()
            .expect("a good configuration");
        let node = Node::new(config, start, boot, host.record, entropy, now);
        let guest = Guest::new(start == Start::Primary);
        host.process = Some(Process {
            node,
            boot,
            guest,
            last_frame: 0,
            promoted: false,
        });
        self.tell(|| format!("host {i} starts as {boot:?}"));
        self.drain(i);
        self.soon(i, 0, What::Wake);
    }

    /// Power off.
    pub fn kill(&mut self, i: usize) {
        self.fault("kill", i);
        // Nobody can have what only a sole owner had; what its peer says later is counted apart.
        self.sole_lost |= self.register.is_solo_of(NodeId(i as u64 + 1));
        self.hosts[i].process = None;
        self.lose_all();
    }

    /// Starts the host in a while.
    pub fn restart_in(&mut self, i: usize, millis: u64) {
        self.after(millis * 1000, Due::Restart(i));
    }

    /// Nothing runs on the host for a while; its clock goes on.
    pub fn freeze(&mut self, i: usize, millis: u64) {
        self.fault("freeze", i);
        self.hosts[i].frozen = self.t + millis * 1000;
    }

    /// What the host sends does not arrive.
    pub fn cut(&mut self, i: usize) {
        self.fault("cut", i);
        self.hosts[i].cut = true;
    }

    /// The arbiter cannot be reached.
    pub fn lose_arbiter(&mut self, i: usize) {
        self.fault("no arbiter", i);
        self.hosts[i].arbiter = false;
    }

    /// Everything that was cut works again.
    pub fn heal(&mut self) {
        for host in &mut self.hosts {
            host.cut = false;
            host.arbiter = true;
        }
        self.slow = 300;
        self.tell(|| "healed".to_owned());
        self.pump();
    }

    /// An operator wants something.
    pub fn command(&mut self, i: usize, command: Command) {
        self.soon(i, 0, What::Command(command));
    }

    /// The role of a host that is on.
    #[must_use]
    pub fn role(&self, i: usize) -> Option<Role> {
        Some(self.hosts[i].process.as_ref()?.node.status().role)
    }

    /// Whether the host's guest runs and its output may leave.
    #[must_use]
    pub fn serves(&self, i: usize) -> bool {
        let now = self.clock(i);
        self.hosts[i].process.as_ref().is_some_and(|p| {
            p.guest.running && p.node.member().is_some_and(|m| m.permit(now).is_some())
        })
    }

    /// Frames that left so far.
    #[must_use]
    pub const fn released(&self) -> u64 {
        self.counts.released
    }

    /// Runs until something is true; `false` if it does not become true in time.
    pub fn until(&mut self, millis: u64, is: impl Fn(&Self) -> bool) -> bool {
        let end = self.t + millis * 1000;
        while self.violation.is_none() && !is(self) {
            if self.t >= end || !self.step(end) {
                return false;
            }
        }
        self.violation.is_none()
    }

    /// Runs for a while.
    pub fn run(&mut self, millis: u64) {
        self.until(millis, |_| false);
    }

    /// Runs until an event.
    pub fn event(&mut self, millis: u64, wanted: impl Fn(usize, &Event) -> bool) -> bool {
        self.until(millis, |w| w.events.iter().any(|(i, e)| wanted(*i, e)))
    }

    /// Runs until the guest operation is handed out on a host.
    pub fn op(&mut self, millis: u64, i: usize, kind: GuestOpKind) -> bool {
        self.until(millis, |w| {
            let process = w.hosts[i].process.as_ref();
            process.is_some_and(|p| p.guest.busy.as_ref().is_some_and(|op| op.kind() == kind))
        })
    }

    /// One fault by chance.
    pub fn misfortune(&mut self) {
        let i = usize::from(self.below(2) == 1);
        let channels = [Channel::Control, Channel::Net, Channel::Ram(0)];
        let channel = channels[usize::try_from(self.below(3)).unwrap_or(0)];
        let heal = 1000 * (1 + self.below(3_000));
        match self.below(12) {
            0 => {
                self.kill(i);
                let later = 100 + self.below(3_000);
                self.restart_in(i, later);
            }
            1 => {
                let millis = 1 + self.below(2_500);
                self.freeze(i, millis);
            }
            2 => self.cut(i),
            3 => {
                self.cut(0);
                self.cut(1);
            }
            4 => {
                self.fault("connection lost", i);
                self.lose(channel);
            }
            5 => self.lose_arbiter(i),
            6 => {
                self.fault("slow", i);
                self.slow = 20_000;
            }
            7 => {
                self.fault("malformed", i);
                let noise: Vec<u8> = (0..32).map(|_| self.next().to_le_bytes()[0]).collect();
                if let Some(conn) = self.conns.get_mut(&channel) {
                    conn.rx[i].push_back(Piece::Bytes(noise.into()));
                }
                self.pump();
            }
            8 => {
                self.fault("guest operation fails", i);
                let kinds = [
                    GuestOpKind::Capture,
                    GuestOpKind::CheckState,
                    GuestOpKind::CommitRam,
                    GuestOpKind::LoadState,
                    GuestOpKind::Harvest,
                ];
                let kind = kinds[usize::try_from(self.below(5)).unwrap_or(0)];
                self.hosts[i].fail = Some(kind);
            }
            _ => {
                self.fault("command", i);
                let command = match self.below(9) {
                    0 => Command::FailOver,
                    1 => Command::LostHeartbeat,
                    2 => Command::Detach,
                    3 => Command::SetMode(Mode::Lockstep),
                    4 => Command::SetMode(Mode::Standby),
                    5 => Command::Stop,
                    6 => Command::XenDoCheckpoint,
                    7 => Command::CheckpointDelay(Duration::from_millis(50)),
                    _ => Command::CheckpointNow,
                };
                self.command(i, command);
                if command == Command::Stop {
                    self.soon(i, heal, What::Command(Command::Continue));
                }
                if command == Command::Detach {
                    self.soon(i, heal, What::Command(Command::Attach));
                }
                return;
            }
        }
        self.after(heal, Due::Heal);
    }

    // ---- what happens ----------------------------------------------------------------------

    /// The next thing that happens, not after `end`.
    fn step(&mut self, end: Micros) -> bool {
        self.counts.steps += 1;
        let mut next: Option<(Micros, Option<usize>)> =
            self.queue.keys().next().map(|key| (key.0, None));
        for i in 0..2 {
            if let Some(at) = self.timer(i)
                && next.is_none_or(|n| at < n.0)
            {
                next = Some((at, Some(i)));
            }
        }
        let Some((at, who)) = next.filter(|n| n.0 <= end) else {
            self.t = end;
            return true;
        };
        self.t = self.t.max(at);
        if let Some(i) = who {
            self.feed(i, Input::Timeout);
        } else if let Some((key, due)) = self.queue.pop_first() {
            self.happen(key, due);
        }
        self.pump();
        self.check();
        self.violation.is_none()
    }

    fn timer(&self, i: usize) -> Option<Micros> {
        let host = &self.hosts[i];
        let at = host.process.as_ref()?.node.poll_timeout()?.at.as_nanos();
        if at == u64::MAX {
            return None;
        }
        let at = at.saturating_sub(host.base).div_ceil(1000);
        Some(at.max(host.frozen).max(self.t))
    }

    fn happen(&mut self, key: (Micros, u64), due: Due) {
        match due {
            Due::Host(i, boot, what) if self.boot(i) == Some(boot) => {
                if self.hosts[i].frozen > self.t {
                    let key = (self.hosts[i].frozen, key.1);
                    self.queue.insert(key, Due::Host(i, boot, what));
                } else {
                    self.at_host(i, what);
                }
            }
            Due::Host(..) => {}
            Due::Dial(i, boot, channel) => self.dialled(i, boot, channel),
            Due::Asked(i, boot, request, ballot) => {
                let verdict = if self.hosts[i].arbiter {
                    match ballot {
                        Some(ballot) => self.register.cast(&ballot),
                        None => Verdict::Read(self.register),
                    }
                } else {
                    Verdict::Unreachable
                };
                // An answer may be lost on its way, too.
                let lost = !self.hosts[i].arbiter || self.below(40) == 0;
                let verdict = if lost { Verdict::Unreachable } else { verdict };
                let delay = self.slow * 4 + self.below(self.slow);
                self.after(delay, Due::Host(i, boot, What::Verdict(request, verdict)));
            }
            Due::Restart(i) => self.start(i, Start::Secondary),
            Due::Heal => self.heal(),
            Due::Client => {
                self.clients += 1;
                let mut frame = vec![0; 12];
                frame.extend([0x88, 0xb5]);
                frame.extend(self.clients.to_le_bytes());
                let frame = Bytes::from(frame);
                for i in 0..2 {
                    self.soon(i, 10, What::FromWorld(frame.clone()));
                    // Something of its own that no client sees.
                    let noise = self.next();
                    if let Some(p) = &mut self.hosts[i].process
                        && p.guest.running
                    {
                        p.guest
                            .store(usize::try_from(noise % 31).unwrap_or(0), noise);
                    }
                }
                let pause = 500 + self.below(15_000);
                self.after(pause, Due::Client);
            }
        }
    }

    fn at_host(&mut self, i: usize, what: What) {
        let is = |conns: &BTreeMap<Channel, Conn>, c: &Channel, id| {
            conns
                .get(c)
                .is_some_and(|conn| conn.id == id && conn.open[i])
        };
        match what {
            What::Wake => self.feed(i, Input::Timeout),
            What::Up(c, id) if is(&self.conns, &c, id) => self.feed(i, Input::Up(c)),
            What::Down(c, id) => {
                if is(&self.conns, &c, id) {
                    if let Some(conn) = self.conns.get_mut(&c) {
                        conn.open[i] = false;
                    }
                    self.feed(i, Input::Down(c));
                }
            }
            What::Refused(c) => self.feed(i, Input::Down(c)),
            What::Arrive(c, id, pieces) => {
                if let Some(conn) = self.conns.get_mut(&c).filter(|conn| conn.id == id) {
                    conn.rx[i].extend(pieces);
                }
            }
            What::Sent(c, id, n) if is(&self.conns, &c, id) => {
                if let Some(conn) = self.conns.get_mut(&c) {
                    conn.outstanding[i] -= n.get() as u64;
                }
                self.feed(i, Input::Sent(c, n));
            }
            What::Up(..) | What::Sent(..) => {}
            What::Datagram(path, bytes) => self.feed(i, Input::Datagram(path, &bytes)),
            What::FromGuest(epoch, frame) => self.feed(i, Input::FromGuest { epoch, frame }),
            What::FromWorld(frame) => {
                // Switches show a client's frames to whoever announced itself; the other ignores.
                self.feed(i, Input::FromWorld(frame));
            }
            What::Op => self.operate(i),
            What::Verdict(request, verdict) => self.feed(i, Input::Arbiter(request, verdict)),
            What::Durable(id, record) => {
                self.hosts[i].record = Some(record);
                self.feed(i, Input::Persisted(id));
            }
            What::Fenced => self.feed(i, Input::Fenced(false)),
            What::Command(command) => {
                self.commands += 1;
                self.tell(|| format!("host {i} is told {command:?}"));
                self.feed(i, Input::Command(CommandId(self.commands), command));
            }
        }
    }

    fn feed(&mut self, i: usize, input: Input<'_>) {
        let now = self.clock(i);
        let Some(p) = &mut self.hosts[i].process else {
            return;
        };
        if let Err(misuse) = p.node.handle_input(now, input) {
            self.violate(format!("misuse at host {i}: {misuse}"));
        }
        self.drain(i);
    }

    fn drain(&mut self, i: usize) {
        while let Some(output) = self.hosts[i]
            .process
            .as_mut()
            .and_then(|p| p.node.poll_output())
        {
            self.execute(i, output);
        }
        self.answer(i);
    }

    fn execute(&mut self, i: usize, output: Output) {
        let Some(boot) = self.boot(i) else { return };
        let jitter = self.below(200);
        match output {
            Output::Guest(op) => {
                self.tell(|| format!("host {i} guest {op:?}"));
                let Some(p) = &mut self.hosts[i].process else {
                    return;
                };
                if p.guest.busy.replace(op).is_some() {
                    self.violate(format!("two operations at once at host {i}"));
                }
                self.soon(i, 20 + jitter * 4, What::Op);
            }
            Output::ToGuest { index, frame } => {
                if let Some(p) = &mut self.hosts[i].process {
                    p.guest.card.push_back((index, frame));
                }
            }
            Output::ToWorld { frame, permit } => {
                if permit.allows(self.clock(i)) {
                    self.leaves(i, &frame);
                }
            }
            Output::Dial(c) => self.after(100 + jitter, Due::Dial(i, boot, c)),
            Output::HangUp(c) => {
                if let Some(conn) = self.conns.get_mut(&c)
                    && conn.boots[i] == boot
                {
                    conn.open[i] = false;
                    let (id, last) = (conn.id, conn.last[1 - i]);
                    let delay = last.saturating_sub(self.t) + 100;
                    self.soon(1 - i, delay, What::Down(c, id));
                }
            }
            Output::Datagram(path, bytes) => {
                if !self.hosts[i].cut && self.below(50) != 0 {
                    self.soon(1 - i, 100 + jitter, What::Datagram(path, bytes.to_vec()));
                }
            }
            Output::AskArbiter(ballot) => {
                let delay = self.slow * 2;
                self.after(delay, Due::Asked(i, boot, ballot.request, Some(ballot)));
            }
            Output::ReadArbiter(request) => {
                let delay = self.slow * 2;
                self.after(delay, Due::Asked(i, boot, request, None));
            }
            Output::Fence(_) => self.soon(i, 1000, What::Fenced),
            Output::Persist(id, record) => self.soon(i, 500 + jitter, What::Durable(id, record)),
            Output::Event(event) => {
                self.tell(|| format!("host {i} {event:?}"));
                match &event {
                    Event::Checkpointed { .. } => self.counts.epochs += 1,
                    Event::Promoted { .. } => self.counts.takeovers += 1,
                    Event::Protected { .. } => self.counts.protected += 1,
                    _ => {}
                }
                if let Some(p) = &mut self.hosts[i].process {
                    p.promoted |= matches!(event, Event::Promoted { .. });
                }
                self.events.push((i, event));
            }
            _ => {}
        }
    }

    /// The guest works off what it was given.
    fn answer(&mut self, i: usize) {
        loop {
            let salt = self.next();
            let diverges = self.setup.diverge > salt % 100;
            let Some(p) = &mut self.hosts[i].process else {
                return;
            };
            let epoch = p.guest.epoch;
            let Some((before, after, frame)) = p.guest.step(if diverges { salt } else { 0 }) else {
                return;
            };
            let at = p.last_frame.max(self.t + salt % 300);
            p.last_frame = at;
            let ticks = p.guest.ticks;
            self.parents.insert(after, (before, ticks));
            self.soon(i, at - self.t, What::FromGuest(epoch, frame));
        }
    }

    /// A frame leaves: does its history contain all that was shown?
    fn leaves(&mut self, i: usize, frame: &Bytes) {
        let word = |at| frame.get(at..at + 8).and_then(|b| b.try_into().ok());
        let (Some(ticks), Some(history)) = (word(14), word(22)) else {
            return;
        };
        let this = (u64::from_le_bytes(ticks), u64::from_le_bytes(history));
        let (old, new) = if this.0 < self.shown.0 {
            (this, self.shown)
        } else {
            (self.shown, this)
        };
        let mut at = (new.1, new.0);
        while at.1 > old.0 {
            match self.parents.get(&at.0) {
                Some((before, _)) => at = (*before, at.1 - 1),
                None => break,
            }
        }
        if at.0 != old.1 && self.sole_lost {
            self.sole_lost = false;
            self.counts.rollbacks += 1;
            self.shown = this;
            return;
        }
        if at.0 != old.1 {
            let shown = self.shown;
            self.violate(format!(
                "output commit: host {i} shows {this:x?}, which contradicts {shown:x?}"
            ));
        }
        self.shown = new;
        self.counts.released += 1;
    }

    fn operate(&mut self, i: usize) {
        let Some(p) = &mut self.hosts[i].process else {
            return;
        };
        let Some(op) = p.guest.busy.take() else {
            return;
        };
        let kind = op.kind();
        if self.hosts[i].fail.take_if(|fail| *fail == kind).is_some() {
            let guest = &mut p.guest;
            guest.whole &= !matches!(kind, GuestOpKind::CommitRam | GuestOpKind::LoadState);
            if let GuestOp::Capture { resume, .. } = op {
                guest.running = resume;
            }
            let failed = GuestDone::Failed {
                op: kind,
                why: "told to fail".to_owned(),
            };
            self.feed(i, Input::Guest(failed));
            return;
        }
        let guest = &mut p.guest;
        let mut wrong = None;
        let mut dirty = None;
        let done = match op {
            GuestOp::Pause => {
                guest.running = false;
                GuestDone::Paused
            }
            GuestOp::Resume => {
                if guest.blank && self.register.is_solo_of(NodeId(i as u64 + 1)) {
                    // A sole owner that lost power boots again; what RAM held is gone for all.
                    *guest = Guest::new(false);
                    guest.dirty = (1 << PAGES) - 1;
                    (guest.whole, guest.blank) = (true, false);
                    self.shown = (0, 1);
                    self.counts.cold_boots += 1;
                }
                if !guest.whole {
                    wrong = Some("a guest runs that is a mixture of two epochs");
                }
                guest.running = true;
                GuestDone::Resumed
            }
            GuestOp::Harvest => {
                dirty = Some(std::mem::take(&mut guest.dirty));
                GuestDone::Harvested
            }
            GuestOp::Capture {
                epoch,
                also,
                resume,
            } => {
                guest.capture(&also);
                dirty = Some(std::mem::take(&mut guest.dirty));
                guest.epoch = epoch;
                guest.running = resume;
                GuestDone::Captured(Captured {
                    epoch,
                    state_len: guest.state_out.len() as u64,
                    inputs: guest.consumed,
                    pause: Duration::from_micros(50),
                    live: Duration::ZERO,
                })
            }
            GuestOp::CheckState(epoch) => {
                if guest.state_is_good() {
                    GuestDone::StateChecked(epoch)
                } else {
                    GuestDone::Failed {
                        op: kind,
                        why: "not a state".to_owned(),
                    }
                }
            }
            GuestOp::CommitRam { epoch, runs } => {
                if guest.running {
                    wrong = Some("RAM is committed under a running guest");
                }
                guest.commit(&runs);
                GuestDone::RamCommitted(epoch)
            }
            GuestOp::Replication(op) => GuestDone::Replication(op),
            GuestOp::LoadState { epoch, inputs } => {
                if !guest.load(epoch, inputs) {
                    wrong = Some("RAM after a commit is not what it was at the capture");
                }
                GuestDone::StateLoaded(epoch)
            }
            _ => return,
        };
        if let Some(wrong) = wrong {
            self.violate(format!("host {i}: {wrong}"));
        }
        if let Some(dirty) = dirty {
            self.feed(i, Input::Dirty(Slot(0), &[dirty]));
        }
        self.feed(i, Input::Guest(done));
    }

    // ---- connections -----------------------------------------------------------------------

    fn dialled(&mut self, i: usize, boot: BootId, channel: Channel) {
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
    fn flush_downs(&mut self, channel: Channel) {
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

    fn lose(&mut self, channel: Channel) {
        let Some(conn) = self.conns.get(&channel) else {
            return;
        };
        let (id, boots) = (conn.id, conn.boots);
        for (i, boot) in boots.into_iter().enumerate() {
            let delay = self.below(2_000);
            self.after(delay, Due::Host(i, boot, What::Down(channel, id)));
        }
    }

    fn lose_all(&mut self) {
        let channels: Vec<Channel> = self.conns.keys().copied().collect();
        for channel in channels {
            self.lose(channel);
        }
    }

    /// Moves what can be moved.
    fn pump(&mut self) {
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

    fn write(&mut self, i: usize, channel: Channel) -> bool {
        let delay = 50 + self.below(self.slow);
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
        let at = conn.last[1 - i].max(self.t + delay);
        conn.last[1 - i] = at;
        let (id, peer) = (conn.id, conn.boots[1 - i]);
        let arrive = What::Arrive(channel, id, pieces);
        self.after(at - self.t, Due::Host(1 - i, peer, arrive));
        if let Some(n) = usize::try_from(len).ok().and_then(NonZeroUsize::new) {
            self.soon(i, delay / 2, What::Sent(channel, id, n));
        }
        true
    }

    fn read(&mut self, i: usize, channel: Channel) -> bool {
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

    // ---- what must hold ---------------------------------------------------------------------

    fn check(&mut self) {
        let mut permits = 0;
        for i in 0..2 {
            let now = self.clock(i);
            let Some(p) = &self.hosts[i].process else {
                continue;
            };
            permits += u32::from(p.node.member().is_some_and(|m| m.permit(now).is_some()));
            if p.node.poll_timeout().is_none() {
                self.violate(format!("host {i} waits for ever"));
            }
        }
        if permits > 1 {
            self.violate("two owners".to_owned());
        }
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
