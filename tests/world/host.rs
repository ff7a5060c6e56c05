//! One host: its process, what outlives it, and how it carries out what its machine wants.

use std::time::Duration;

use colo_proto::{
    config::{Config, PassThrough},
    error::PeerFault,
    event::{Event, PeerLost},
    id::Slot,
    machine::{GuestOp, GuestOpKind, Machine, Output},
    member::{BootId, MacKey, MemberConfig, NodeId, Record, VmId},
    node::{Node, Start},
};

use crate::{
    clock::Clock,
    disk::{BLOCKS, Stage},
    guest::{Guest, PAGES},
    world::{Due, Micros, What, World},
};

/// Most bytes that a host holds back, and that wait for the other host.
pub(crate) const HOLD_BYTES: usize = 64 << 10;

#[derive(Clone)]
pub(crate) struct Process {
    pub(crate) node: Node,
    pub(crate) boot: BootId,
    pub(crate) guest: Guest,
    /// When its last report of a frame is due; they do not overtake each other.
    pub(crate) last_frame: Micros,
    pub(crate) promoted: bool,
}

/// One host.
#[derive(Clone)]
pub struct Host {
    pub(crate) process: Option<Process>,
    pub(crate) record: Option<Record>,
    pub(crate) boots: u64,
    pub(crate) clock: Clock,
    pub(crate) frozen: Micros,
    /// What lies on its disk while it is off.
    pub(crate) platter: [u64; BLOCKS],
    /// When its last write reaches the other host.
    pub(crate) last_forward: Micros,
    /// When its last record is durable; they do not overtake each other.
    pub(crate) last_write: Micros,
    /// The next operation that fails.
    pub fail: Option<GuestOpKind>,
    pub(crate) arbiter: bool,
    /// How much longer than usual the arbiter takes, each way.
    pub(crate) arbiter_slow: Micros,
    /// Its datagrams do not arrive.
    pub(crate) mute: bool,
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
        let member = MemberConfig::new(VmId([1; 16]), NodeId(2 - i as u64), MacKey([2; 16]))
            .hang(Duration::from_millis(1_300))
            .hang_in_checkpoint(Duration::from_millis(1_500));
        let setup = self.setup;
        let config = Config::builder(NodeId(i as u64 + 1), member, &[(Slot(0), PAGES as u64)])
            .lanes(setup.lanes)
            .cache(setup.cache)
            .mode(setup.mode)
            .resume(setup.resume)
            .longest(Duration::from_millis(40))
            .hold_bytes(HOLD_BYTES)
            .compare_timeout(Duration::from_millis(20))
            .stall(Duration::from_secs(2))
            .pass(PassThrough::default())
            .build()
            .expect("a good configuration")
            .with_bug(setup.bug);
        let node = Node::new(config, start, boot, host.record, entropy, now);
        let mut guest = Guest::new(start == Start::Primary);
        guest.disk.base = host.platter;
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
                let replica = p.guest.disk.stage == Stage::Secondary;
                let untold = op == GuestOp::Resume && p.node.primary().is_some() && replica;
                let busy = p.guest.busy.replace(op).is_some();
                if busy {
                    self.violate(format!("two operations at once at host {i}"));
                }
                if untold {
                    self.violate(format!("host {i} runs on a disk that was not told"));
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
                let lost = self.hosts[i].cut || self.hosts[i].mute;
                if !lost && self.below(50) != 0 {
                    self.soon(1 - i, 100 + jitter, What::Datagram(path, bytes.to_vec()));
                }
            }
            Output::AskArbiter(ballot) => {
                let delay = self.slow * 2 + self.hosts[i].arbiter_slow;
                self.after(delay, Due::Asked(i, boot, ballot.request, Some(ballot)));
            }
            Output::ReadArbiter(request) => {
                let delay = self.slow * 2 + self.hosts[i].arbiter_slow;
                self.after(delay, Due::Asked(i, boot, request, None));
            }
            Output::Fence(_) => self.soon(i, 1000, What::Fenced),
            Output::Persist(id, record) => {
                let at = self.hosts[i].last_write.max(self.t + 500 + jitter);
                self.hosts[i].last_write = at;
                self.soon(i, at - self.t, What::Durable(id, record));
            }
            Output::Answer(id, answer) => {
                self.tell(|| format!("host {i} answers {id:?}: {answer:?}"));
                self.answered(i, id);
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
                    && !self.noisy
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
