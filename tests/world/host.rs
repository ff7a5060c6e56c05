//! One host: its process, what outlives it, and how it carries out what its machine wants.

use std::time::Duration;

use colo_proto::{
    config::{Config, PassThrough},
    error::PeerFault,
    event::{Event, PeerLost},
    id::Slot,
    machine::{GuestOpKind, Machine, Output},
    member::{BootId, MacKey, MemberConfig, NodeId, Record, VmId},
    node::{Node, Start},
};

use crate::{
    guest::{Guest, PAGES},
    world::{Due, Micros, What, World},
};

pub(crate) struct Process {
    pub(crate) node: Node,
    pub(crate) boot: BootId,
    pub(crate) guest: Guest,
    /// When its last report of a frame is due; they do not overtake each other.
    pub(crate) last_frame: Micros,
    pub(crate) promoted: bool,
}

/// One host.
pub struct Host {
    pub(crate) process: Option<Process>,
    pub(crate) record: Option<Record>,
    pub(crate) boots: u64,
    pub(crate) base: u64,
    pub(crate) frozen: Micros,
    /// When its last record is durable; they do not overtake each other.
    pub(crate) last_write: Micros,
    /// The next operation that fails.
    pub fail: Option<GuestOpKind>,
    pub(crate) arbiter: bool,
    /// Whether what it sends arrives.
    pub(crate) cut: bool,
}

impl World {
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
            .expect("a good configuration")
            .with_bug(setup.bug);
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

    pub(crate) fn drain(&mut self, i: usize) {
        while let Some(output) = self.hosts[i]
            .process
            .as_mut()
            .and_then(|p| p.node.poll_output())
        {
            self.execute(i, output);
        }
        self.answer(i);
    }

    pub(crate) fn execute(&mut self, i: usize, output: Output) {
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
            Output::Persist(id, record) => {
                let at = self.hosts[i].last_write.max(self.t + 500 + jitter);
                self.hosts[i].last_write = at;
                self.soon(i, at - self.t, What::Durable(id, record));
            }
            Output::Event(event) => {
                self.tell(|| format!("host {i} {event:?}"));
                match &event {
                    Event::Checkpointed { .. } => self.counts.epochs += 1,
                    Event::Promoted { .. } => self.counts.takeovers += 1,
                    Event::Protected { .. } => self.counts.protected += 1,
                    _ => {}
                }
                if let Event::PeerLeft(PeerLost::Faulty(
                    fault @ (PeerFault::OutOfPhase { .. } | PeerFault::Field { .. }),
                )) = &event
                    && !self.counts.faults.contains_key("malformed")
                {
                    self.violate(format!("host {i} calls an honest peer faulty: {fault:?}"));
                }
                if let Some(p) = &mut self.hosts[i].process {
                    p.promoted |= matches!(event, Event::Promoted { .. });
                }
                self.events.push((i, event));
            }
            _ => {}
        }
    }
}
