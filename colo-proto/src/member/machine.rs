//! The machine: inputs, outputs, timers. The rows of the transition table are in `owner`,
//! `partner`, `fenced` and `startup`.

use alloc::{collections::VecDeque, vec, vec::Vec};
use core::time::Duration;

#[cfg(feature = "mutations")]
use super::Mutation;
use super::{
    BootId, Claim, Control, Datagram, Flags, Health, Kind, Local, MemberConfig, MemberEvent,
    MemberOutput, MemberState, NodeId, PathId, Permit, PersistId, Record, RequestId, Verdict,
    ask::Inquiry,
    journal::Journal,
    mutation::broken,
    phase::{Idle, Phase},
    witness::Witness,
};
use crate::{
    id::{Epoch, Generation},
    time::Instant,
};

/// Outputs kept for a driver that does not drain; beyond it datagrams and events are dropped,
/// which the protocol allows, and nothing else is.
const OUTPUT_SOFT_LIMIT: usize = 128;

/// One node's half of the ownership protocol, as a machine without I/O. It belongs to the node and
/// moves along when a secondary becomes a primary.
///
/// The contract with the driver:
/// * `now` never goes back and counts through suspend;
/// * after every `handle_*`, drain [`poll_output`](Self::poll_output) and act in order;
/// * hand over every datagram that has arrived before calling
///   [`handle_timeout`](Self::handle_timeout), and call that at
///   [`poll_timeout`](Self::poll_timeout): silence is only silence if we listened;
/// * check [`Permit::allows`] for every frame as it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    pub(super) config: MemberConfig,
    pub(super) me: NodeId,
    pub(super) boot: BootId,
    pub(super) phase: Phase,
    /// The generation this node acts in.
    pub(super) generation: Generation,
    pub(super) journal: Journal,
    pub(super) gate: Instant,
    /// The permit as last handed out.
    told: Option<Permit>,
    pub(super) inquiry: Option<Inquiry>,
    pub(super) witness: Witness,
    pub(super) peer: Peer,
    paths: Vec<PathView>,
    pub(super) epoch: Epoch,
    pub(super) health: Health,
    progress: Option<(u32, Instant)>,
    hanging: bool,
    checkpoint: bool,
    seq: u64,
    entropy: u64,
    last_call: Instant,
    next_round: Instant,
    outputs: VecDeque<MemberOutput>,
    counters: MemberCounters,
    /// When this process started, and whether its operator wants it to serve.
    pub(super) started: Instant,
    pub(super) create: bool,
    /// What was last said of a VM that nobody serves.
    pub(super) nobody: Option<(NodeId, Generation)>,
    /// The instance of the peer that was found to have other settings.
    differs: Option<BootId>,
    #[cfg(feature = "mutations")]
    pub(super) mutation: Option<Mutation>,
}

/// What the peer last said.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(super) struct Peer {
    /// The instance last heard, live or not: what we address.
    last: BootId,
    /// The instance that is known to have heard this instance of us. Everything below is from it:
    /// a late datagram of a dead instance is not taken for news.
    boot: Option<BootId>,
    pub(super) generation: Generation,
    pub(super) flags: Flags,
    pub(super) health: Health,
    pub(super) state: Option<MemberState>,
    pub(super) heard: Instant,
    seq: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct PathView {
    heard: Instant,
    streak: u8,
    up: bool,
}

/// Plain counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct MemberCounters {
    /// Datagrams that were not decoded, or not for this VM or path.
    pub bad_datagrams: u64,
    /// Datagrams accepted.
    pub datagrams: u64,
    /// Own stalls.
    pub stalls: u64,
    /// Outputs dropped because the driver did not drain.
    pub dropped_outputs: u64,
}

/// Receptions in a row after which a path counts as up again (T_up).
const STREAK: u8 = 5;

impl Member {
    /// Starts a process. `record` is what the last one persisted; `boot` and `entropy` are random
    /// and new. The driver holds an exclusive lock on the record.
    #[must_use]
    pub fn start(
        config: MemberConfig,
        me: NodeId,
        boot: BootId,
        record: Option<Record>,
        entropy: u64,
        now: Instant,
    ) -> Self {
        let fresh = Record {
            vm: config.vm,
            node: me,
            peer: config.peer,
            arbiter: config.arbiter_id,
            ..Record::default()
        };
        let path = PathView {
            heard: now,
            streak: 0,
            up: true,
        };
        let mut member = Self {
            paths: vec![path; usize::from(config.paths)],
            config,
            me,
            boot,
            phase: Phase::Idle(Idle::default()),
            generation: Generation(0),
            journal: Journal::new(fresh, now),
            gate: Instant::ZERO,
            told: None,
            inquiry: None,
            witness: Witness::new(now),
            peer: Peer {
                heard: now,
                ..Peer::default()
            },
            epoch: Epoch(0),
            health: Health::Ok,
            progress: None,
            hanging: false,
            checkpoint: false,
            seq: 0,
            entropy,
            last_call: now,
            next_round: now,
            outputs: VecDeque::new(),
            counters: MemberCounters::default(),
            started: now,
            create: false,
            nobody: None,
            differs: None,
            #[cfg(feature = "mutations")]
            mutation: None,
        };
        match record {
            Some(old) if (old.vm, old.node) == (member.journal.record.vm, me) => {
                member.journal.record = Record {
                    peer: member.journal.record.peer,
                    arbiter: member.journal.record.arbiter,
                    ..old
                };
                member.generation = old.generation;
            }
            Some(_) => member.event(MemberEvent::RecordForeign),
            None => {}
        }
        member.resume_from_record(now);
        member
    }

    /// Seeds a bug. For tests of the tests.
    #[cfg(feature = "mutations")]
    #[must_use]
    pub const fn with_mutation(mut self, mutation: Option<Mutation>) -> Self {
        self.mutation = mutation;
        self
    }

    /// The time of [`poll_timeout`](Self::poll_timeout) has come. Early calls do no harm.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.begin(now);
        if now >= self.next_round {
            self.send_round(now);
            self.next_round = now + self.config.interval;
        }
        self.watch_paths(now);
        self.watch_progress(now);
        self.pump_inquiry(now);
        self.watch_record(now);
        self.watch_arbiter(now);
        self.owner_timeout(now);
        self.partner_timeout(now);
        self.fenced_timeout(now);
        self.idle_timeout(now);
        self.finish(now);
    }

    /// A datagram arrived. Whatever it holds, this is never an error: bad ones are counted.
    pub fn handle_datagram(&mut self, now: Instant, path: PathId, bytes: &[u8]) {
        self.begin(now);
        match Datagram::decode(self.config.key, self.config.peer, bytes) {
            Ok(d)
                if d.vm == self.config.vm
                    && d.path == path
                    && path.0 < self.config.paths
                    && d.boot != self.boot =>
            {
                self.counters.datagrams += 1;
                self.note_path(path, now);
                self.note_peer(&d, now);
                match d.kind {
                    kind if kind.promises() && d.settings != self.config.promise() => {
                        self.settings_differ(&d);
                    }
                    Kind::Heartbeat => self.heartbeat(now, &d),
                    Kind::Ack => self.acknowledged(now, &d),
                    Kind::Control(control) => self.control(now, control, &d),
                }
            }
            _ => self.counters.bad_datagrams += 1,
        }
        self.finish(now);
    }

    /// The arbiter answered, or did not.
    pub fn handle_arbiter(&mut self, now: Instant, request: RequestId, verdict: Verdict) {
        self.begin(now);
        self.answered(now, request, verdict);
        self.finish(now);
    }

    /// Fencing was tried. `ok` must be true only if the peer is off and stays off until its own
    /// start-up rules ran (assumption A6).
    pub fn handle_fence(&mut self, now: Instant, ok: bool) {
        self.begin(now);
        self.fenced_peer(now, ok);
        self.finish(now);
    }

    /// Write `id`, and with it every earlier one, is durable.
    pub fn handle_persisted(&mut self, now: Instant, id: PersistId) {
        self.begin(now);
        self.journal.done(now, id);
        self.pump_inquiry(now);
        self.open_if_durable(now);
        self.speak_if_durable(now, id);
        self.finish(now);
    }

    /// The local machine or the operator reports something.
    pub fn handle_local(&mut self, now: Instant, local: Local) {
        self.begin(now);
        match local {
            Local::Health(health) => self.health = health,
            Local::Progress(n) => {
                if self.progress.is_none_or(|(old, _)| old != n) {
                    self.progress = Some((n, now));
                    self.hanging = false;
                }
            }
            Local::CheckpointRunning(running) => {
                self.checkpoint = running;
                self.progress = self.progress.map(|(n, _)| (n, now));
            }
            Local::Applied(epoch) => self.epoch = epoch,
            Local::ReplicaReady {
                boot,
                epoch,
                evidence_clean,
            } => self.replica_ready(now, boot, epoch, evidence_clean),
            Local::Synced { from, epoch } => self.synced(from, epoch),
            Local::ReplicaLost => self.replica_lost(now),
            Local::ReplicationDead => self.replication_dead(),
            Local::Settled => self.settled(now),
            Local::Operator(command) => self.operator(now, command),
        }
        self.finish(now);
    }

    /// The next thing to do, oldest first.
    pub fn poll_output(&mut self) -> Option<MemberOutput> {
        self.outputs.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) next. At most one interval away.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let lease_end = (self.told.is_some() && self.gate != Instant::END).then_some(self.gate);
        [
            Some(self.next_round),
            lease_end,
            self.inquiry_deadline(),
            self.owner_deadline(),
            self.partner_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The permit to let frames out at `now`; `None` means the gate is shut.
    #[must_use]
    pub fn permit(&self, now: Instant) -> Option<Permit> {
        let permit = Permit {
            generation: self.generation,
            until: self.gate,
        };
        if broken!(self, PermitUnchecked) && self.gate > Instant::ZERO {
            return Some(Permit {
                until: Instant::END,
                ..permit
            });
        }
        permit.allows(now).then_some(permit)
    }

    /// Whether this node owns the VM and nobody else can, until it shares ownership itself. Not
    /// before the record says so durably: until then only an old lease is there.
    #[must_use]
    pub const fn is_alone(&self) -> bool {
        matches!(&self.phase, Phase::Solo(solo) if solo.opening.is_none())
    }

    /// Whether the partner has accepted the dual-start, so that it would take over.
    #[must_use]
    pub const fn is_paired(&self) -> bool {
        matches!(&self.phase, Phase::Dual(pair) if pair.starting.is_none())
    }

    /// The state, by the numbers of the specification.
    #[must_use]
    pub const fn state(&self) -> MemberState {
        self.phase.state()
    }

    /// The generation this node acts in.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// This process instance.
    #[must_use]
    pub const fn boot(&self) -> BootId {
        self.boot
    }

    /// The record as last handed out for persisting.
    #[must_use]
    pub const fn record(&self) -> &Record {
        &self.journal.record
    }

    /// The counters.
    #[must_use]
    pub const fn counters(&self) -> MemberCounters {
        self.counters
    }

    /// The settings.
    #[must_use]
    pub const fn config(&self) -> &MemberConfig {
        &self.config
    }

    // ---- what every call does first and last ------------------------------------------------

    /// The stall rule: who was not running cannot conclude anything from silence. Observation
    /// windows restart; the gate is never extended.
    fn begin(&mut self, now: Instant) {
        let gap = now.since(self.last_call);
        self.last_call = self.last_call.max(now);
        if gap <= self.config.stall {
            return;
        }
        self.counters.stalls += 1;
        self.event(MemberEvent::Stalled(gap));
        match &mut self.phase {
            Phase::Secondary(w) => w.last_heartbeat = now,
            Phase::Dual(p) | Phase::PrimaryArbitrating(p) => p.last_ack = now,
            _ => {}
        }
        for path in &mut self.paths {
            path.heard = now;
        }
        self.witness.excuse(now - self.probe_period());
    }

    fn finish(&mut self, now: Instant) {
        self.tell_gate(now);
    }

    /// Tells the driver about the gate if it changed.
    pub(super) fn tell_gate(&mut self, now: Instant) {
        let permit = self.permit(now);
        if permit != self.told {
            self.told = permit;
            self.push(MemberOutput::Gate(permit));
        }
    }

    // ---- outputs ------------------------------------------------------------------------------

    pub(super) fn push(&mut self, output: MemberOutput) {
        let optional = matches!(output, MemberOutput::Send { .. } | MemberOutput::Event(_));
        if optional && self.outputs.len() >= OUTPUT_SOFT_LIMIT {
            self.counters.dropped_outputs += 1;
            return;
        }
        self.outputs.push_back(output);
    }

    pub(super) fn event(&mut self, event: MemberEvent) {
        self.push(MemberOutput::Event(event));
    }

    /// Enters a state. Questions of the state left are moot: every caller has learnt a generation
    /// that answers them, or asks its own right after.
    pub(super) fn enter(&mut self, phase: Phase) {
        let from = self.state();
        self.phase = phase;
        self.inquiry = None;
        self.event(MemberEvent::State {
            from,
            to: self.state(),
            generation: self.generation,
        });
    }

    /// Shuts the gate, before anything else that follows in the same call.
    pub(super) fn shut(&mut self) {
        self.gate = Instant::ZERO;
        if self.told.take().is_some() {
            self.push(MemberOutput::Gate(None));
        }
    }

    pub(super) fn persist(&mut self, claim: Claim) -> PersistId {
        let generation = self.generation;
        let (id, record) = self.journal.write(self.last_call, claim, generation);
        self.push(MemberOutput::Persist { id, record });
        id
    }

    /// Writes the record once more, to see whether it can be written.
    pub(super) fn persist_again(&mut self) -> PersistId {
        let (id, record) = self.journal.again(self.last_call);
        self.push(MemberOutput::Persist { id, record });
        id
    }

    /// The last write; what waits for it waits for all that was handed out.
    pub(super) const fn last_write(&self) -> PersistId {
        self.journal.last()
    }

    pub(super) fn is_durable(&self, id: PersistId) -> bool {
        self.journal.is_durable(id)
    }

    fn watch_record(&mut self, now: Instant) {
        let period = self.probe_period();
        if self.journal.probes(now, period) {
            self.persist_again();
        }
    }

    /// The next random number (SplitMix64 over the entropy given at the start).
    pub(super) fn random(&mut self) -> u64 {
        self.entropy = self.entropy.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.entropy;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    // ---- datagrams ------------------------------------------------------------------------------

    /// What goes out every interval: a heartbeat of an owner under leases, and the control of the
    /// state.
    fn send_round(&mut self, now: Instant) {
        let lease = self.config.lease;
        if matches!(self.phase, Phase::Dual(_) | Phase::PrimaryArbitrating(_)) {
            self.seq += 1;
            let seq = self.seq;
            let mut acked = 0;
            if let Phase::Dual(p) | Phase::PrimaryArbitrating(p) = &mut self.phase {
                p.lease.sent(seq, now, lease);
                acked = p.lease.acked;
            }
            self.send(now, Kind::Heartbeat, seq, acked);
        }
        self.send_control(now);
        self.say_prepare(now);
    }

    /// The control of the state, if its write is durable (O5).
    pub(super) fn send_control(&mut self, now: Instant) {
        let Some((control, after)) = self.phase.repeated() else {
            return;
        };
        if self.is_durable(after) || broken!(self, SpeakBeforeDurable) {
            self.say(now, control);
        }
    }

    pub(super) fn say(&mut self, now: Instant, control: Control) {
        self.say_about(now, control, 0);
    }

    pub(super) fn say_about(&mut self, now: Instant, control: Control, what: u64) {
        self.seq += 1;
        self.send(now, Kind::Control(control), self.seq, what);
    }

    /// Sends on every path.
    pub(super) fn send(&mut self, now: Instant, kind: Kind, seq: u64, ack: u64) {
        let mut datagram = Datagram {
            kind,
            path: PathId(0),
            flags: self.flags(now),
            vm: self.config.vm,
            generation: self.generation,
            seq,
            ack,
            boot: self.boot,
            peer_boot: match self.phase.paired() {
                BootId(0) => self.peer.last,
                paired => paired,
            },
            epoch: self.epoch,
            progress: self.progress.map_or(0, |(n, _)| n),
            state: self.state(),
            health: self.health,
            settings: self.config.promise(),
            mark: self.witness.mine,
        };
        for path in 0..self.config.paths {
            datagram.path = PathId(path);
            let bytes = datagram.encode(self.config.key, self.me);
            self.push(MemberOutput::Send {
                path: PathId(path),
                bytes,
            });
        }
    }

    pub(super) fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    fn flags(&self, now: Instant) -> Flags {
        let capable = match &self.phase {
            Phase::Secondary(_) => self.health != Health::Fatal && !self.hanging,
            Phase::SecondaryArbitrating(b) => b.capable,
            Phase::Fenced(f) => f.intact && f.yielding.is_none(),
            _ => false,
        };
        let flag = |bit, set| if set { bit } else { 0 };
        Flags(
            flag(Flags::CAPABLE, capable)
                | flag(Flags::GATE_OPEN, self.permit(now).is_some())
                | flag(Flags::CHECKPOINT, self.checkpoint)
                | flag(Flags::LINK_GOOD, self.health == Health::Ok)
                | self.readiness(now),
        )
    }

    /// A peer of other settings is not paired with: what its words promise is not what is relied
    /// upon here. What gives something up is believed from anybody.
    fn settings_differ(&mut self, d: &Datagram) {
        if self.differs != Some(d.boot) {
            self.differs = Some(d.boot);
            self.event(MemberEvent::SettingsDiffer);
        }
    }

    fn note_peer(&mut self, d: &Datagram, now: Instant) {
        self.peer.last = d.boot;
        if !self.is_addressed(d) || (self.peer.boot == Some(d.boot) && d.seq < self.peer.seq) {
            return;
        }
        if self.peer.boot != Some(d.boot) {
            self.witness.forget_peer();
        }
        self.witness.peer_left(now, d.mark);
        self.peer.boot = Some(d.boot);
        self.peer.health = d.health;
        self.peer.seq = d.seq;
        self.peer.generation = d.generation;
        self.peer.flags = d.flags;
        self.peer.state = Some(d.state);
        self.peer.heard = now;
    }

    /// Whether the sender has heard this instance of us: then it lived after we started.
    pub(super) fn is_addressed(&self, d: &Datagram) -> bool {
        d.peer_boot == self.boot
    }

    // ---- watching -------------------------------------------------------------------------------

    fn note_path(&mut self, path: PathId, now: Instant) {
        let Some(view) = self.paths.get_mut(usize::from(path.0)) else {
            return;
        };
        view.heard = now;
        view.streak = view.streak.saturating_add(1);
        if !view.up && view.streak >= STREAK {
            view.up = true;
            self.event(MemberEvent::PathUp(path));
        }
    }

    fn watch_paths(&mut self, now: Instant) {
        for n in 0..self.config.paths {
            let Some(view) = self.paths.get_mut(usize::from(n)) else {
                return;
            };
            if now.since(view.heard) >= self.config.primary_silence {
                view.streak = 0;
                if core::mem::take(&mut view.up) {
                    self.event(MemberEvent::PathDown(PathId(n)));
                }
            }
        }
    }

    fn watch_progress(&mut self, now: Instant) {
        let limit = if self.checkpoint {
            self.config.hang_in_checkpoint
        } else {
            self.config.hang
        };
        let stuck = self
            .progress
            .is_some_and(|(_, since)| now.since(since) >= limit);
        if stuck && !core::mem::replace(&mut self.hanging, true) {
            self.event(MemberEvent::Hang);
        }
    }

    /// A hang that was acted upon is over until the next one.
    pub(super) fn forgive_hang(&mut self, now: Instant) {
        self.hanging = false;
        self.progress = self.progress.map(|(n, _)| (n, now));
    }

    pub(super) const fn is_hanging(&self) -> bool {
        self.hanging
    }

    /// How much longer than usual this node waits before it arbitrates (H_pen).
    pub(super) fn penalty(&self) -> Duration {
        if self.health == Health::Ok {
            Duration::ZERO
        } else {
            self.config.penalty
        }
    }
}
