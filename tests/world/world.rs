//! The loop of the world: what happens next, and to whom.

use std::{collections::BTreeMap, num::NonZeroUsize};

use bytes::Bytes;
use colo_proto::{
    command::{Command, CommandId},
    event::Event,
    id::{Channel, Epoch, Role},
    machine::{GuestOpKind, Input, Machine},
    member::{Ballot, BootId, Health, PathId, PersistId, Record, Register, RequestId, Verdict},
    node::Start,
    status::Mode,
};

use crate::{
    clock::Clock,
    connection::{Conn, Piece},
    disk::{BLOCKS, Forward},
    guest::mix,
    host::Host,
    setup::{Counts, Setup},
};

/// Microseconds of real time.
pub type Micros = u64;

#[derive(Clone)]
pub(crate) enum What {
    Wake,
    Up(Channel, u64),
    Down(Channel, u64),
    Refused(Channel),
    Arrive(Channel, u64, Vec<Piece>),
    Sent(Channel, u64, NonZeroUsize),
    Datagram(PathId, Vec<u8>),
    FromGuest(Epoch, Bytes),
    FromWorld(Bytes),
    Op,
    Verdict(RequestId, Verdict),
    Durable(PersistId, Record),
    Fenced,
    Command(Command),
    Health(Health),
    Disk(Forward),
}

#[derive(Clone)]
pub(crate) enum Due {
    Host(usize, BootId, What),
    Dial(usize, BootId, Channel),
    Asked(usize, BootId, RequestId, Option<Ballot>),
    Restart(usize),
    Client,
    Heal,
    Pump,
}

/// The world.
#[derive(Clone)]
pub struct World {
    /// Now.
    pub t: Micros,
    pub(crate) seed: u64,
    pub(crate) queue: BTreeMap<(Micros, u64), Due>,
    pub(crate) order: u64,
    pub(crate) hosts: [Host; 2],
    pub(crate) conns: BTreeMap<Channel, Conn>,
    pub(crate) conn_ids: u64,
    pub(crate) register: Register,
    pub(crate) setup: Setup,
    /// Each history's predecessor and length.
    pub(crate) parents: BTreeMap<u64, (u64, u64)>,
    pub(crate) shown: (u64, u64),
    pub(crate) clients: u64,
    pub(crate) commands: u64,
    /// Commands that were not answered yet.
    pub(crate) asked: BTreeMap<CommandId, usize>,
    pub(crate) slow: u64,
    /// How much longer than usual bytes of a host take on a channel, until when.
    pub(crate) lags: BTreeMap<(usize, Channel), (Micros, Micros)>,
    /// Until when a host's kernel takes nothing for a channel.
    pub(crate) full: BTreeMap<(usize, Channel), Micros>,
    /// Whether bytes were made up: a host may call its honest peer faulty then.
    pub(crate) noisy: bool,
    pub(crate) replications: u64,
    /// Since when the clock stands still, and how much has happened since.
    pub(crate) standing: (Micros, u64),
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
        let host = |base, chance| Host {
            process: None,
            record: None,
            boots: 0,
            clock: Clock::new(base, chance),
            frozen: 0,
            platter: [0; BLOCKS],
            last_forward: 0,
            last_write: 0,
            fail: None,
            arbiter: true,
            arbiter_slow: 0,
            mute: false,
            cut: false,
        };
        let mut world = Self {
            t: 0,
            seed,
            queue: BTreeMap::new(),
            order: 0,
            hosts: [
                host(1_000_000_000, mix(seed, 1)),
                host(77_000_000_000, mix(seed, 2)),
            ],
            conns: BTreeMap::new(),
            conn_ids: 0,
            register: Register::default(),
            setup,
            parents: BTreeMap::new(),
            shown: (0, 1),
            clients: 0,
            commands: 0,
            asked: BTreeMap::new(),
            slow: 300,
            lags: BTreeMap::new(),
            full: BTreeMap::new(),
            noisy: false,
            replications: 0,
            standing: (0, 0),
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

    pub(crate) fn next(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.seed, 7)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub(crate) fn after(&mut self, micros: Micros, due: Due) {
        self.order += 1;
        self.queue.insert((self.t + micros, self.order), due);
    }

    pub(crate) fn soon(&mut self, i: usize, micros: Micros, what: What) {
        if let Some(boot) = self.boot(i) {
            self.after(micros, Due::Host(i, boot, what));
        }
    }

    pub(crate) fn boot(&self, i: usize) -> Option<BootId> {
        Some(self.hosts[i].process.as_ref()?.boot)
    }

    pub(crate) fn tell(&mut self, what: impl FnOnce() -> String) {
        if self.telling {
            self.story.push(format!("{:>10} {}", self.t, what()));
        }
    }

    pub(crate) fn violate(&mut self, what: String) {
        self.tell(|| format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    // ---- what a test does ------------------------------------------------------------------

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

    /// The mode of a host that is on.
    #[must_use]
    pub fn mode(&self, i: usize) -> Option<Mode> {
        Some(self.hosts[i].process.as_ref()?.node.status().mode)
    }

    /// The newest epoch of a host that is on.
    #[must_use]
    pub fn epoch(&self, i: usize) -> Option<Epoch> {
        Some(self.hosts[i].process.as_ref()?.node.status().epoch)
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

    // ---- what happens ----------------------------------------------------------------------

    /// The next thing that happens, not after `end`.
    pub(crate) fn step(&mut self, end: Micros) -> bool {
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
        self.rests();
        if let Some(i) = who {
            self.feed(i, Input::Timeout);
        } else if let Some((key, due)) = self.queue.pop_first() {
            self.happen(key, due);
        }
        self.pump();
        self.check();
        self.violation.is_none()
    }

    pub(crate) fn happen(&mut self, key: (Micros, u64), due: Due) {
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
                        None => self.register.read(request),
                    }
                } else {
                    Verdict::Unreachable
                };
                // An answer may be lost on its way, too.
                let lost = !self.hosts[i].arbiter || self.below(40) == 0;
                let verdict = if lost { Verdict::Unreachable } else { verdict };
                let delay = self.slow * 4 + self.below(self.slow) + self.hosts[i].arbiter_slow;
                self.after(delay, Due::Host(i, boot, What::Verdict(request, verdict)));
            }
            Due::Restart(i) => self.start(i, Start::Secondary),
            Due::Heal => self.heal(),
            Due::Client => self.client(),
            // The step ends with it.
            Due::Pump => {}
        }
    }

    pub(crate) fn at_host(&mut self, i: usize, what: What) {
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
                let id = CommandId(self.commands);
                if self.hosts[i].process.is_some() {
                    self.asked.insert(id, i);
                }
                self.feed(i, Input::Command(id, command));
            }
            What::Health(health) => self.feed(i, Input::Health(health)),
            What::Disk(forward) => self.disk_arrives(i, forward),
        }
    }

    pub(crate) fn feed(&mut self, i: usize, input: Input<'_>) {
        let now = self.clock(i);
        let Some(p) = &mut self.hosts[i].process else {
            return;
        };
        if let Err(misuse) = p.node.handle_input(now, input) {
            self.violate(format!("misuse at host {i}: {misuse}"));
        }
        self.drain(i);
    }
}
