//! The transition table, row by row: two machines, an arbiter and a clock, moved by hand.

use alloc::{vec, vec::Vec};
use core::time::Duration;

use super::*;
use crate::{
    id::{Epoch, Generation},
    time::Instant,
};

mod protected;
mod startup;

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const KEY: MacKey = MacKey([5; 16]);
const VM: VmId = VmId([6; 16]);

/// One node and what it has been told to do.
struct Node {
    id: NodeId,
    member: Member,
    /// Datagrams to deliver to the peer.
    sent: Vec<(PathId, Datagram)>,
    /// Everything else that was put out, in order, since the last look.
    log: Vec<MemberOutput>,
    /// Questions not answered yet.
    ballots: Vec<Ballot>,
    reads: Vec<RequestId>,
    writes: Vec<PersistId>,
    /// Whether writes become durable at once.
    disk: bool,
}

struct Pair {
    now: Instant,
    a: Node,
    b: Node,
    register: Register,
    /// Another register, which b is shown.
    copy: Option<Register>,
    /// Whether b reaches the arbiter.
    b_asks: bool,
    /// Whether the arbiter answers at once.
    arbiter: bool,
    /// Whether datagrams pass, from a and from b.
    links: (bool, bool),
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn config(peer: NodeId) -> MemberConfig {
    MemberConfig::new(VM, peer, KEY).paths(1).check().unwrap()
}

impl Node {
    fn new(
        id: NodeId,
        boot: u64,
        record: Option<Record>,
        config: MemberConfig,
        now: Instant,
    ) -> Self {
        Self {
            id,
            member: Member::start(config, id, BootId(boot), record, boot * 77, now),
            sent: vec![],
            log: vec![],
            ballots: vec![],
            reads: vec![],
            writes: vec![],
            disk: true,
        }
    }

    /// Drains the machine.
    fn drain(&mut self) {
        while let Some(output) = self.member.poll_output() {
            match output {
                MemberOutput::Send { path, bytes } => {
                    let datagram = Datagram::decode(KEY, self.id, &bytes).unwrap();
                    self.sent.push((path, datagram));
                    continue;
                }
                MemberOutput::Cas(ballot) => self.ballots.push(ballot),
                MemberOutput::ReadRegister { request } => self.reads.push(request),
                MemberOutput::Persist { id, .. } => self.writes.push(id),
                _ => {}
            }
            self.log.push(output);
        }
    }

    /// Makes the writes durable, as far as the disk works.
    fn flush(&mut self, now: Instant) {
        self.drain();
        while self.disk && !self.writes.is_empty() {
            let id = self.writes.remove(0);
            self.member.handle_persisted(now, id);
            self.drain();
        }
    }

    fn local(&mut self, now: Instant, local: Local) {
        self.member.handle_local(now, local);
        self.flush(now);
    }

    fn did(&self, wanted: &MemberOutput) -> bool {
        self.log.contains(wanted)
    }

    fn events(&self) -> Vec<MemberEvent> {
        self.log
            .iter()
            .filter_map(|o| match o {
                MemberOutput::Event(e) => Some(*e),
                _ => None,
            })
            .collect()
    }
}

impl Pair {
    fn with(arbitrate: impl Fn(MemberConfig) -> MemberConfig) -> Self {
        let now = Instant::from_millis(1000);
        Self {
            now,
            a: Node::new(A, 1, None, arbitrate(config(B)), now),
            b: Node::new(B, 2, None, arbitrate(config(A)), now),
            register: Register::default(),
            copy: None,
            b_asks: true,
            arbiter: true,
            links: (true, true),
        }
    }

    /// A pair in dual mode at epoch 7: a is the primary.
    fn dual_with(arbitrate: impl Fn(MemberConfig) -> MemberConfig) -> Self {
        let mut pair = Self::with(arbitrate);
        pair.a.local(pair.now, Local::Operator(Command::Create));
        pair.run(ms(200));
        if pair.b.member.state() == MemberState::Idle {
            pair.b.local(pair.now, Local::Operator(Command::Join));
        }
        pair.run(ms(300));
        assert_eq!(
            pair.states(),
            (MemberState::PrimarySolo, MemberState::Syncing)
        );
        let boot = BootId(2);
        assert!(pair.a.did(&MemberOutput::StartSync { peer: boot }));
        pair.sync(Epoch(7));
        pair.run(ms(500));
        assert_eq!(
            pair.states(),
            (MemberState::PrimaryDual, MemberState::Secondary)
        );
        pair.a.log.clear();
        pair.b.log.clear();
        pair
    }

    fn dual() -> Self {
        Self::dual_with(|c| c)
    }

    /// The replica of `epoch` is whole and clean on b.
    fn sync(&mut self, epoch: Epoch) {
        let now = self.now;
        let (from, boot) = (self.a.member.boot, self.b.member.boot);
        self.b.local(now, Local::Synced { from, epoch });
        self.a.local(
            now,
            Local::ReplicaReady {
                boot,
                epoch,
                evidence_clean: true,
            },
        );
    }

    fn states(&self) -> (MemberState, MemberState) {
        (self.a.member.state(), self.b.member.state())
    }

    /// Runs the clock, delivering everything at once, as far as links and arbiter work.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.settle();
            let next = [&self.a, &self.b]
                .iter()
                .filter_map(|n| n.member.poll_timeout())
                .min()
                .unwrap();
            if next > end {
                self.now = end;
                return;
            }
            self.now = self.now.max(next);
            for node in [&mut self.a, &mut self.b] {
                node.member.handle_timeout(self.now);
            }
            self.check();
        }
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            let now = self.now;
            self.a.flush(now);
            self.b.flush(now);
            let from_a = core::mem::take(&mut self.a.sent);
            let from_b = core::mem::take(&mut self.b.sent);
            for (path, d) in from_a.into_iter().filter(|_| self.links.0) {
                self.b.member.handle_datagram(now, path, &d.encode(KEY, A));
            }
            for (path, d) in from_b.into_iter().filter(|_| self.links.1) {
                self.a.member.handle_datagram(now, path, &d.encode(KEY, B));
            }
            for node in [&mut self.a, &mut self.b] {
                if !self.arbiter || node.id == B && !self.b_asks {
                    continue;
                }
                let register = match &mut self.copy {
                    Some(copy) if node.id == B => copy,
                    _ => &mut self.register,
                };
                for ballot in core::mem::take(&mut node.ballots) {
                    let verdict = register.cast(&ballot);
                    node.member.handle_arbiter(now, ballot.request, verdict);
                }
                for request in core::mem::take(&mut node.reads) {
                    let verdict = register.read(request);
                    node.member.handle_arbiter(now, request, verdict);
                }
            }
        }
        self.check();
    }

    /// Property S.
    fn check(&self) {
        let open = |n: &Node| n.member.permit(self.now).is_some();
        assert!(
            !(open(&self.a) && open(&self.b)),
            "two gates at {}",
            self.now
        );
    }
}

#[test]
fn a_pair_forms_and_the_secondary_survives_the_primary() {
    let mut pair = Pair::dual();
    assert_eq!(pair.register.generation, Generation(2));
    pair.links = (false, false);
    pair.a
        .member
        .handle_local(pair.now, Local::Health(Health::Degraded));
    pair.run(ms(1300));
    assert_eq!(pair.b.member.state(), MemberState::TakeoverWait);
    assert!(!pair.b.events().contains(&MemberEvent::ArbiterSilent));
    pair.b.local(pair.now, Local::Settled);
    assert_eq!(pair.b.member.state(), MemberState::PrimarySolo);
    let until = Instant::END;
    let generation = Generation(3);
    assert_eq!(
        pair.b.member.permit(pair.now),
        Some(Permit { generation, until })
    );
}

/// An acknowledgement as b would send it for a's last heartbeat, but for what `change` does.
fn acknowledgement(pair: &Pair, change: impl Fn(&mut Datagram)) -> [u8; DATAGRAM_SIZE] {
    let heartbeat = pair
        .a
        .sent
        .iter()
        .rev()
        .find(|(_, d)| d.kind == Kind::Heartbeat)
        .unwrap()
        .1;
    let mut ack = Datagram {
        kind: Kind::Ack,
        ack: heartbeat.seq,
        seq: u64::MAX,
        boot: pair.b.member.boot(),
        peer_boot: pair.a.member.boot(),
        state: MemberState::Secondary,
        ..heartbeat
    };
    change(&mut ack);
    ack.encode(KEY, B)
}

/// A dual pair, one heartbeat sent and not delivered, and the lease as it stands.
fn one_heartbeat_out() -> (Pair, Option<Permit>) {
    let mut pair = Pair::dual();
    pair.now = pair.a.member.poll_timeout().unwrap();
    pair.a.member.handle_timeout(pair.now);
    pair.a.flush(pair.now);
    let permit = pair.a.member.permit(pair.now);
    (pair, permit)
}

#[test]
fn only_an_acknowledgement_of_this_pair_and_generation_extends_the_lease() {
    type Change = fn(&mut Datagram);
    let changes: [(&str, Change); 5] = [
        ("another generation", |d| d.generation.0 -= 1),
        ("another instance of the partner", |d| d.boot.0 += 1),
        ("for another instance of us", |d| d.peer_boot.0 += 1),
        ("never sent", |d| d.ack += 100),
        ("another VM", |d| d.vm = VmId([9; 16])),
    ];
    for (what, change) in changes {
        let (mut pair, before) = one_heartbeat_out();
        let bytes = acknowledgement(&pair, change);
        pair.a.member.handle_datagram(pair.now, PathId(0), &bytes);
        assert_eq!(pair.a.member.permit(pair.now), before, "{what}");
    }
    let (mut pair, before) = one_heartbeat_out();
    let bytes = acknowledgement(&pair, |_| {});
    pair.a.member.handle_datagram(pair.now, PathId(0), &bytes);
    let until = pair.now + ms(600);
    assert_eq!(pair.a.member.permit(pair.now).unwrap().until, until);
    assert!(until > before.unwrap().until);
}

#[cfg(feature = "mutations")]
#[test]
fn the_test_above_sees_the_rules_broken() {
    type Change = fn(&mut Datagram);
    let seeded: [(Mutation, Change); 2] = [
        (Mutation::AnyGeneration, |d| d.generation.0 -= 1),
        (Mutation::AnyBoot, |d| d.boot.0 += 1),
    ];
    for (mutation, change) in seeded {
        let (mut pair, before) = one_heartbeat_out();
        pair.a.member = pair.a.member.clone().with_mutation(Some(mutation));
        let bytes = acknowledgement(&pair, change);
        pair.a.member.handle_datagram(pair.now, PathId(0), &bytes);
        assert_ne!(pair.a.member.permit(pair.now), before, "{mutation:?}");
    }
}

#[test]
fn a_stall_restarts_the_windows_and_never_extends_the_gate() {
    let mut pair = Pair::dual();
    let until = pair.a.member.permit(pair.now).unwrap().until;
    pair.now = pair.now + ms(5000);
    pair.a.member.handle_timeout(pair.now);
    pair.b.member.handle_timeout(pair.now);
    assert_eq!(pair.a.member.permit(pair.now), None);
    assert!(until < pair.now);
    assert_eq!(
        pair.states(),
        (MemberState::PrimaryDual, MemberState::Secondary)
    );
}

#[test]
fn while_asking_the_secondary_does_not_acknowledge_and_the_primary_gets_its_pair_back() {
    let mut pair = Pair::dual();
    pair.arbiter = false;
    pair.b.local(pair.now, Local::Operator(Command::FailOver));
    pair.run(ms(1500));
    assert_eq!(
        pair.states(),
        (
            MemberState::PrimaryArbitrating,
            MemberState::SecondaryArbitrating
        )
    );
    assert_eq!(pair.a.member.permit(pair.now), None, "the lease ran out");
    // The primary's ballot comes first, and it asks to be alone.
    pair.arbiter = true;
    pair.run(ms(3000));
    assert_eq!(pair.a.member.state(), MemberState::PrimarySolo);
    assert_eq!(pair.b.member.state(), MemberState::Syncing);
}

#[test]
fn back_before_the_verdict_means_a_new_dual_generation() {
    let mut pair = Pair::dual();
    pair.arbiter = false;
    pair.links = (true, false);
    pair.run(ms(900));
    assert_eq!(pair.a.member.state(), MemberState::PrimaryArbitrating);
    pair.links = (true, true);
    pair.run(ms(300));
    assert!(pair.a.member.permit(pair.now).is_some(), "leased meanwhile");
    // The first ballot, for sole ownership, was lost; the second is for the pair.
    pair.a.ballots.retain(|ballot| ballot.mode == Mode::Dual);
    pair.arbiter = true;
    pair.run(ms(2000));
    assert_eq!(
        pair.states(),
        (MemberState::PrimaryDual, MemberState::Secondary)
    );
    assert_eq!(pair.a.member.generation(), Generation(3));
    assert_eq!(pair.b.member.generation(), Generation(3));
}

#[test]
fn an_owner_told_that_its_partner_is_lost_does_not_take_it_back_before_the_verdict() {
    let mut pair = Pair::dual();
    pair.arbiter = false;
    pair.a.local(pair.now, Local::Operator(Command::FailOver));
    // Heartbeats are acknowledged all the while.
    pair.run(ms(300));
    assert!(pair.a.ballots.iter().all(|b| b.mode == Mode::Solo));
    pair.arbiter = true;
    pair.run(ms(2000));
    assert_eq!(pair.a.member.state(), MemberState::PrimarySolo);
}

#[test]
fn nothing_is_promised_or_asked_before_the_disk_has_it() {
    let mut pair = Pair::dual();
    pair.b.disk = false;
    pair.b.local(pair.now, Local::ReplicaLost);
    let said = |node: &Node, control| {
        let kind = Kind::Control(control);
        node.sent.iter().any(|(_, d)| d.kind == kind)
    };
    assert!(!said(&pair.b, Control::Abstain), "O5");
    pair.b.disk = true;
    pair.b.flush(pair.now);
    assert!(said(&pair.b, Control::Abstain));

    let mut pair = Pair::dual();
    pair.b.disk = false;
    pair.b.local(pair.now, Local::Operator(Command::FailOver));
    assert!(pair.b.ballots.is_empty(), "O7");
    pair.b.disk = true;
    pair.b.flush(pair.now);
    assert_eq!(pair.b.ballots.len(), 1);
}

#[test]
fn a_yield_shuts_the_gate_first() {
    let mut pair = Pair::dual();
    pair.a.local(pair.now, Local::Operator(Command::Yield));
    pair.run(ms(0));
    let at = |wanted: &dyn Fn(&MemberOutput) -> bool| pair.a.log.iter().position(wanted);
    let shut = at(&|o| *o == MemberOutput::Gate(None)).unwrap();
    let persist = at(
        &|o| matches!(o, MemberOutput::Persist { record, .. } if record.claim == Claim::Yielded),
    )
    .unwrap();
    assert!(shut < persist);
    pair.settle();
    assert_eq!(pair.b.member.state(), MemberState::TakeoverWait);
    pair.b.local(pair.now, Local::Settled);
    assert_eq!(pair.b.member.state(), MemberState::PrimarySolo, "no wait");
}

#[test]
fn held_output_is_flushed_only_under_the_unlimited_gate() {
    let mut pair = Pair::dual();
    pair.b.local(pair.now, Local::ReplicaLost);
    pair.settle();
    let at = |wanted: &MemberOutput| pair.a.log.iter().position(|o| o == wanted).unwrap();
    let open = Permit {
        generation: Generation(3),
        until: Instant::END,
    };
    assert!(open.is_sole());
    assert!(at(&MemberOutput::Gate(Some(open))) < at(&MemberOutput::DropReplication));
}

#[test]
fn a_dual_start_at_another_epoch_is_refused() {
    let mut pair = Pair::with(|c| c);
    pair.a.local(pair.now, Local::Operator(Command::Create));
    pair.run(ms(500));
    pair.sync(Epoch(7));
    // A late state message slips in before the dual-start.
    let from = pair.a.member.boot();
    pair.b.local(
        pair.now,
        Local::Synced {
            from,
            epoch: Epoch(6),
        },
    );
    pair.run(ms(300));
    assert_eq!(pair.b.member.state(), MemberState::Syncing);
    assert!(pair.b.events().contains(&MemberEvent::DualStartRefused {
        generation: Generation(2),
        epoch: Epoch(7)
    }));
}

#[test]
fn a_driver_that_never_drains_costs_bounded_memory() {
    let mut pair = Pair::dual();
    for _ in 0..10_000 {
        pair.now = pair.now + ms(100);
        pair.a.member.handle_timeout(pair.now);
    }
    let mut kept = 0;
    while pair.a.member.poll_output().is_some() {
        kept += 1;
    }
    assert!(kept < 200, "{kept}");
    assert!(pair.a.member.counters().dropped_outputs > 0);
}

#[test]
fn hosts_whose_arbiter_does_not_know_of_the_pair_say_so_before_they_need_it() {
    let mut pair = Pair::dual();
    pair.run(ms(6000));
    let went_back = |node: &Node| {
        let events = node.events();
        events
            .iter()
            .any(|event| matches!(event, MemberEvent::ArbiterWentBack { .. }))
    };
    assert!(!went_back(&pair.a) && !went_back(&pair.b));
    // The file is gone, and another begins: the first.
    pair.register = Register::default();
    pair.run(ms(6000));
    assert!(went_back(&pair.a) && went_back(&pair.b));
    pair.run(ms(6000));
    assert!(pair.b.events().contains(&MemberEvent::ArbiterSilent));
}
