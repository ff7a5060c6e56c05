//! A driver that calls as the contract says, whatever happens.

use alloc::{collections::VecDeque, vec, vec::Vec};
use core::{num::NonZeroUsize, time::Duration};

use crate::{
    config::Config,
    id::{Channel, Epoch, Slot},
    machine::{Captured, Demand, GuestDone, GuestOp, Input, Machine as _, Output, Transmit},
    member::{
        Ballot, BootId, DATAGRAM_SIZE, MacKey, MemberConfig, NodeId, PathId, PersistId, RequestId,
        VmId,
    },
    node::{Node, Start},
    status::Mode,
    time::Instant,
};

pub(super) const CHANNELS: [Channel; 3] = [Channel::Control, Channel::Ram(0), Channel::Net];
pub(super) const PAGES: u64 = 16;
/// More outputs to one input than this is a loop that does not end.
const OUTPUTS_MOST: usize = 4096;

/// What a host asked of the world and has not been answered.
pub(super) struct Host {
    pub(super) node: Node,
    pub(super) op: Option<GuestOp>,
    pub(super) running: bool,
    pub(super) epoch: Epoch,
    pub(super) ballots: VecDeque<Ballot>,
    pub(super) reads: VecDeque<RequestId>,
    pub(super) persists: VecDeque<PersistId>,
    pub(super) fences: usize,
    pub(super) dials: VecDeque<Channel>,
    pub(super) hang_ups: VecDeque<Channel>,
    pub(super) datagrams: VecDeque<(PathId, [u8; DATAGRAM_SIZE])>,
}

impl Host {
    pub(super) fn new(id: u64, start: Start, mode: Mode, now: Instant) -> Self {
        let member = MemberConfig::fast(VmId([7; 16]), NodeId(3 - id), MacKey([7; 16]));
        let config = Config::builder(NodeId(id), member, &[(Slot(0), PAGES)])
            .longest(Duration::from_millis(20))
            .hold_bytes(64 << 10)
            .mode(mode)
            .build();
        let Ok(config) = config else {
            panic!("the fuzzers' configuration is a good one")
        };
        let mut host = Self {
            node: Node::new(config, start, BootId(id), None, id, now),
            op: None,
            running: false,
            epoch: Epoch(0),
            ballots: VecDeque::new(),
            reads: VecDeque::new(),
            persists: VecDeque::new(),
            fences: 0,
            dials: VecDeque::new(),
            hang_ups: VecDeque::new(),
            datagrams: VecDeque::new(),
        };
        host.drain(now);
        host
    }

    /// A right call, and the drain that follows it.
    pub(super) fn input(&mut self, now: Instant, input: Input<'_>) {
        if let Err(misuse) = self.node.handle_input(now, input) {
            panic!("a right call was misuse: {misuse}");
        }
        self.drain(now);
    }

    pub(super) fn drain(&mut self, now: Instant) {
        let mut outputs = 0;
        while let Some(output) = self.node.poll_output() {
            outputs += 1;
            assert!(outputs < OUTPUTS_MOST, "outputs without end");
            match output {
                Output::Guest(op) => {
                    assert!(self.op.is_none(), "two guest operations at a time");
                    self.op = Some(op);
                }
                Output::ToWorld { permit, .. } => {
                    assert!(permit.allows(now), "output under a permit that is over");
                }
                Output::AskArbiter(ballot) => self.ballots.push_back(ballot),
                Output::ReadArbiter(id) => self.reads.push_back(id),
                Output::Persist(id, _) => self.persists.push_back(id),
                Output::Fence(_) => self.fences += 1,
                Output::Dial(channel) => self.dials.push_back(channel),
                Output::HangUp(channel) => self.hang_ups.push_back(channel),
                Output::Datagram(path, bytes) => self.datagrams.push_back((path, bytes)),
                _ => {}
            }
        }
        self.datagrams.truncate(64);
        let _ = self.node.poll_timeout();
    }

    /// Everything that waits for a channel, taken by the kernel at once.
    pub(super) fn transmit(&mut self, now: Instant, channel: Channel) -> Vec<Transmit> {
        let mut all = vec![];
        while let Some(message) = self.node.poll_transmit(channel, 64 << 10) {
            assert!(all.len() < OUTPUTS_MOST, "messages without end");
            let len = usize::try_from(message.len())
                .ok()
                .and_then(NonZeroUsize::new);
            let Some(len) = len else {
                panic!("an empty message")
            };
            all.push(message);
            self.input(now, Input::Sent(channel, len));
        }
        all
    }

    /// The guest does what it was told, or fails.
    pub(super) fn finish(&mut self, now: Instant, dirty: u64, fails: bool) {
        let Some(op) = self.op.take() else { return };
        if fails {
            let (op, why) = (op.kind(), "fuzz".into());
            self.input(now, Input::Guest(GuestDone::Failed { op, why }));
            return;
        }
        let done = match op {
            GuestOp::Pause => {
                self.running = false;
                GuestDone::Paused
            }
            GuestOp::Resume => {
                self.running = true;
                GuestDone::Resumed
            }
            GuestOp::Harvest => {
                self.input(now, Input::Dirty(Slot(0), &[dirty]));
                GuestDone::Harvested
            }
            GuestOp::Capture { epoch, resume, .. } => {
                self.input(now, Input::Dirty(Slot(0), &[dirty]));
                (self.running, self.epoch) = (resume, epoch);
                GuestDone::Captured(Captured {
                    epoch,
                    state_len: 8 + dirty % 64,
                    inputs: 0,
                    pause: Duration::ZERO,
                    live: Duration::ZERO,
                })
            }
            GuestOp::CheckState(epoch) => GuestDone::StateChecked(epoch),
            GuestOp::CommitRam { epoch, .. } => GuestDone::RamCommitted(epoch),
            GuestOp::Replication(op) => GuestDone::Replication(op),
            GuestOp::LoadState { epoch, .. } => {
                self.epoch = epoch;
                GuestDone::StateLoaded(epoch)
            }
        };
        self.input(now, Input::Guest(done));
    }

    /// Answers what a channel demands with bytes that `give` provides; false if it has not got
    /// that many.
    pub(super) fn receive(
        &mut self,
        now: Instant,
        channel: Channel,
        give: impl FnOnce(usize) -> Option<Vec<u8>>,
    ) -> bool {
        match self.node.poll_demand(channel) {
            Demand::Pause => false,
            Demand::Frame(len) => give(len.get()).is_some_and(|bytes| {
                let frame = bytes::BytesMut::from(&bytes[..]);
                self.input(now, Input::Frame(channel, frame));
                true
            }),
            Demand::Read { place: None, then } => give(then).is_some_and(|bytes| {
                self.input(now, Input::Bytes(channel, &bytes));
                true
            }),
            Demand::Read {
                place: Some(sink), ..
            } => {
                use crate::machine::Sink;
                let len = match sink {
                    Sink::Guest(runs) | Sink::Cache(runs) => {
                        assert!(runs.iter().all(|r| r.slot == Slot(0) && r.end() <= PAGES));
                        runs.bytes()
                    }
                    Sink::State(range) => range.end - range.start,
                };
                let len = usize::try_from(len).ok().and_then(NonZeroUsize::new);
                len.is_some_and(|len| {
                    give(len.get()).is_some_and(|_| {
                        self.input(now, Input::Placed(channel, len));
                        true
                    })
                })
            }
        }
    }
}
