//! The transition table, row by row: two machines, an arbiter and a clock, moved by hand.

use alloc::{vec, vec::Vec};
use core::time::Duration;

use super::*;
use crate::{
    id::{Epoch, Generation},
    time::Instant,
};

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
                if !self.arbiter {
                    continue;
                }
                for ballot in core::mem::take(&mut node.ballots) {
                    let verdict = self.register.cast(&ballot);
                    node.member.handle_arbiter(now, ballot.request, verdict);
                }
                for request in core::mem::take(&mut node.reads) {
                    let verdict = Verdict::Read(self.register);
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
