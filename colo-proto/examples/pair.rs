//! Two hosts in one process tell the story of a failover. `cargo run -p colo-proto --example pair`
//!
//! The guest counts: each step writes one of its 16 pages and says the number to a client. The
//! primary is killed; whoever goes on must not have forgotten a number that the client saw. Time
//! is a number, wires are queues, the arbiter is a variable: no clock, no socket, no VM.
#![expect(clippy::unwrap_used, reason = "a story that cannot go on ends")]

use std::{collections::VecDeque, num::NonZeroUsize, time::Duration};

use bytes::{Bytes, BytesMut};
use colo_proto::{
    config::Config,
    event::Event,
    id::{Channel, Epoch, PageRuns, Slot},
    machine::{
        Body, Captured, Demand, GuestDone, GuestOp, Input, Machine as _, Output, Sink, Transmit,
    },
    member::{
        BootId, DATAGRAM_SIZE, MacKey, MemberConfig, NodeId, PathId, Register, Verdict, VmId,
    },
    node::{Node, Start},
    time::Instant,
    wire::{HEAD_LEN, Head},
};

const PAGES: usize = 16;
const PAGE: usize = 4096;
const CHANNELS: [Channel; 3] = [Channel::Control, Channel::Ram(0), Channel::Net];

/// What waits to be told to a node.
enum Next {
    Input(Input<'static>),
    Dirty(u64),
    Datagram(PathId, [u8; DATAGRAM_SIZE]),
}

struct Host {
    name: &'static str,
    node: Node,
    next: VecDeque<Next>,
    /// Bytes on the way to this host, a queue for each channel.
    wires: [VecDeque<u8>; 3],
    ram: Vec<u8>,
    staging: Vec<u8>,
    cache: Vec<u8>,
    state_in: [u8; 8],
    state_out: [u8; 8],
    dirty: u64,
    running: bool,
    epoch: Epoch,
    counter: u64,
}

struct World {
    now: u64,
    hosts: [Option<Host>; 2],
    arbiter: Register,
    /// The last number that the client saw.
    seen: u64,
}

fn host(id: u64, start: Start, name: &'static str) -> Host {
    let member = MemberConfig::new(VmId([7; 16]), NodeId(3 - id), MacKey([7; 16]));
    let config = Config::builder(NodeId(id), member, &[(Slot(0), PAGES as u64)])
        .longest(Duration::from_millis(20))
        .build()
        .unwrap();
    Host {
        name,
        node: Node::new(config, start, BootId(id), None, id, Instant::from_millis(1)),
        next: VecDeque::new(),
        wires: Default::default(),
        ram: vec![0; PAGES * PAGE],
        staging: vec![0; PAGES * PAGE],
        cache: vec![0; PAGES * PAGE],
        state_in: [0; 8],
        state_out: [0; 8],
        dirty: 0,
        running: false,
        epoch: Epoch(0),
        counter: 0,
    }
}

/// Calls with the bytes of every page in turn.
fn pages(runs: &PageRuns, mut f: impl FnMut(std::ops::Range<usize>)) {
    for page in runs.iter().flat_map(|run| run.first..run.end()) {
        let at = page as usize * PAGE;
        f(at..at + PAGE);
    }
}

impl Host {
    fn done(&mut self, done: GuestDone) {
        self.next.push_back(Next::Input(Input::Guest(done)));
    }

    /// The guest runs for a moment.
    fn count(&mut self) {
        if self.running {
            self.counter += 1;
            let page = self.counter as usize % PAGES;
            self.ram[page * PAGE..][..8].copy_from_slice(&self.counter.to_le_bytes());
            self.dirty |= 1 << page;
            let mut frame = vec![0x88; 60]; // an Ethernet type of nobody's
            frame[14..22].copy_from_slice(&self.counter.to_le_bytes());
            self.next.push_back(Next::Input(Input::FromGuest {
                epoch: self.epoch,
                frame: frame.into(),
            }));
        }
    }

    fn guest(&mut self, op: GuestOp) {
        match op {
            GuestOp::Pause => {
                self.running = false;
                self.done(GuestDone::Paused);
            }
            GuestOp::Resume => {
                self.running = true;
                self.done(GuestDone::Resumed);
            }
            GuestOp::Harvest => {
                let dirty = std::mem::take(&mut self.dirty);
                self.next.push_back(Next::Dirty(dirty));
                self.done(GuestDone::Harvested);
            }
            GuestOp::Capture { epoch, resume, .. } => {
                let dirty = std::mem::take(&mut self.dirty);
                self.staging.copy_from_slice(&self.ram);
                self.state_out = self.counter.to_le_bytes();
                (self.running, self.epoch) = (resume, epoch);
                self.next.push_back(Next::Dirty(dirty));
                self.done(GuestDone::Captured(Captured {
                    epoch,
                    state_len: 8,
                    inputs: 0,
                    pause: Duration::ZERO,
                    live: Duration::ZERO,
                }));
            }
            GuestOp::CheckState(epoch) => self.done(GuestDone::StateChecked(epoch)),
            GuestOp::CommitRam { epoch, runs } => {
                pages(&runs, |at| {
                    self.ram[at.clone()].copy_from_slice(&self.cache[at]);
                });
                self.done(GuestDone::RamCommitted(epoch));
            }
            GuestOp::Replication(op) => self.done(GuestDone::Replication(op)),
            GuestOp::LoadState { epoch, .. } => {
                (self.counter, self.epoch) = (u64::from_le_bytes(self.state_in), epoch);
                self.done(GuestDone::StateLoaded(epoch));
            }
            _ => {}
        }
    }

    /// What travels for a message; page bytes come from the guest, never from the machine.
    fn bytes(&self, message: &Transmit) -> Vec<u8> {
        let mut out = message.head.to_vec();
        match &message.body {
            Body::Live(runs) => pages(runs, |at| out.extend_from_slice(&self.ram[at])),
            Body::Staged(runs) => pages(runs, |at| out.extend_from_slice(&self.staging[at])),
            Body::State(at) => {
                out.extend_from_slice(&self.state_out[at.start as usize..at.end as usize]);
            }
            Body::Bytes(bytes) => out.extend_from_slice(bytes),
            _ => {}
        }
        out
    }

    fn place(&mut self, sink: &Sink, bytes: &[u8]) {
        let mut from = bytes.chunks(PAGE);
        match sink {
            Sink::Guest(runs) => pages(runs, |at| {
                self.ram[at].copy_from_slice(from.next().unwrap());
            }),
            Sink::Cache(runs) => pages(runs, |at| {
                self.cache[at].copy_from_slice(from.next().unwrap());
            }),
            Sink::State(at) => {
                self.state_in[at.start as usize..at.end as usize].copy_from_slice(bytes);
            }
            _ => {}
        }
    }

    /// Takes what the machine wants from the wire, if it is all there.
    fn receive(&mut self, at: usize, now: Instant) -> bool {
        let (channel, wire) = (CHANNELS[at], &mut self.wires[at]);
        match self.node.poll_demand(channel) {
            Demand::Frame(len) if wire.len() >= len.get() => {
                let frame: Vec<u8> = wire.drain(..len.get()).collect();
                let frame = BytesMut::from(&frame[..]);
                let input = Input::Frame(channel, frame);
                self.node.handle_input(now, input).unwrap();
            }
            // What is placed is reported as soon as it is there, whatever follows it.
            Demand::Read {
                place: Some(sink),
                then: _,
            } => {
                let len = match &sink {
                    Sink::Guest(runs) | Sink::Cache(runs) => runs.bytes() as usize,
                    Sink::State(at) => (at.end - at.start) as usize,
                    _ => 0,
                };
                let Some(n) = NonZeroUsize::new(len).filter(|n| wire.len() >= n.get()) else {
                    return false;
                };
                let bytes: Vec<u8> = wire.drain(..len).collect();
                self.place(&sink, &bytes);
                let input = Input::Placed(channel, n);
                self.node.handle_input(now, input).unwrap();
            }
            Demand::Read { place: None, then } if then > 0 && wire.len() >= then => {
                let bytes: Vec<u8> = wire.drain(..then).collect();
                let input = Input::Bytes(channel, &bytes);
                self.node.handle_input(now, input).unwrap();
            }
            _ => return false,
        }
        true
    }
}

impl World {
    fn say(&self, host: usize, what: impl std::fmt::Display) {
        let name = self.hosts[host].as_ref().map_or("", |h| h.name);
        println!("{:>6} ms  {name:<9} {what}", self.now);
    }

    /// Everything a machine hands out, done.
    fn outputs(&mut self, me: usize) {
        while let Some(output) = self.hosts[me].as_mut().and_then(|h| h.node.poll_output()) {
            let [a, b] = &mut self.hosts;
            let (host, peer) = if me == 0 { (a, b) } else { (b, a) };
            let host = host.as_mut().unwrap();
            let mut tell = |input| host.next.push_back(Next::Input(input));
            match output {
                Output::Guest(op) => host.guest(op),
                Output::ToWorld { frame, permit }
                    if permit.allows(Instant::from_millis(self.now)) =>
                {
                    self.client(me, &frame);
                }
                Output::Dial(channel) => match peer {
                    Some(peer) => {
                        peer.next.push_back(Next::Input(Input::Up(channel)));
                        tell(Input::Up(channel));
                    }
                    None => tell(Input::Down(channel)),
                },
                Output::HangUp(channel) => {
                    if let Some(peer) = peer {
                        peer.next.push_back(Next::Input(Input::Down(channel)));
                    }
                }
                Output::Datagram(path, bytes) => {
                    if let Some(peer) = peer {
                        peer.next.push_back(Next::Datagram(path, bytes));
                    }
                }
                Output::AskArbiter(ballot) => {
                    tell(Input::Arbiter(ballot.request, self.arbiter.cast(&ballot)));
                }
                Output::ReadArbiter(request) => {
                    tell(Input::Arbiter(request, Verdict::Read(self.arbiter)));
                }
                Output::Fence(_) => tell(Input::Fenced(false)),
                Output::Persist(id, _) => tell(Input::Persisted(id)),
                Output::Event(Event::Member(_)) => {}
                Output::Event(event) => self.say(me, format_args!("* {event:?}")),
                Output::Announce => self.say(me, "tells the network where the VM lives now"),
                _ => {}
            }
        }
    }

    /// The client reads a number. It must never hear one twice.
    fn client(&mut self, from: usize, frame: &Bytes) {
        let number = u64::from_le_bytes(frame[14..22].try_into().unwrap());
        self.say(from, format_args!("the client sees {number}"));
        assert_eq!(number, self.seen + 1, "nothing seen is forgotten");
        self.seen = number;
    }

    /// One round over a host: inputs, messages out, messages in. False if nothing moved.
    fn turn(&mut self, me: usize) -> bool {
        let now = Instant::from_millis(self.now);
        let Some(host) = &mut self.hosts[me] else {
            return false;
        };
        if let Some(next) = host.next.pop_front() {
            match next {
                Next::Dirty(word) => host.node.handle_input(now, Input::Dirty(Slot(0), &[word])),
                Next::Datagram(path, ref bytes) => {
                    host.node.handle_input(now, Input::Datagram(path, bytes))
                }
                Next::Input(input) => host.node.handle_input(now, input),
            }
            .unwrap();
            self.outputs(me);
            return true;
        }
        let mut moved = false;
        for (at, channel) in CHANNELS.into_iter().enumerate() {
            while let Some(message) = {
                let host = self.hosts[me].as_mut().unwrap();
                host.node.poll_transmit(channel, 1 << 20)
            } {
                moved = true;
                let host = self.hosts[me].as_mut().unwrap();
                let bytes = host.bytes(&message);
                let sent = Input::Sent(channel, NonZeroUsize::new(bytes.len()).unwrap());
                host.next.push_back(Next::Input(sent));
                let head: &[u8; HEAD_LEN] = bytes.first_chunk().unwrap();
                if let Ok(head) = Head::decode(channel, head) {
                    let (kind, n) = (head.kind.name(), head.number);
                    self.say(me, format_args!("{kind} {n}, {} bytes", bytes.len()));
                }
                if let Some(peer) = &mut self.hosts[1 - me] {
                    peer.wires[at].extend(bytes);
                }
            }
            while self.hosts[me].as_mut().is_some_and(|h| h.receive(at, now)) {
                moved = true;
                self.outputs(me);
            }
        }
        moved
    }

    /// A millisecond passes; every fifth, the guests count.
    fn tick(&mut self) {
        self.now += 1;
        for host in self.hosts.iter_mut().flatten() {
            host.next.push_back(Next::Input(Input::Timeout));
            if self.now.is_multiple_of(5) {
                host.count();
            }
        }
        while self.turn(0) | self.turn(1) {}
    }

    fn until(&mut self, what: &str, is: impl Fn(&Self) -> bool) {
        println!("-- until {what}");
        for _ in 0..60_000 {
            if is(self) {
                return;
            }
            self.tick();
        }
        panic!("never: {what}");
    }
}

fn main() {
    let mut world = World {
        now: 1,
        hosts: [
            Some(host(1, Start::Primary, "primary")),
            Some(host(2, Start::Secondary, "secondary")),
        ],
        arbiter: Register::default(),
        seen: 0,
    };
    world.outputs(0);
    world.outputs(1);
    world.until("the pair is in step", |w| {
        w.hosts[0]
            .as_ref()
            .is_some_and(|h| h.node.status().protected)
    });
    let seen = world.seen;
    world.until("the client saw ten more", |w| w.seen >= seen + 10);
    world.until("it has counted on, unseen", |w| {
        w.hosts[0].as_ref().is_some_and(|h| h.counter > w.seen + 1)
    });
    let last = world.hosts[0].take().map_or(0, |h| h.counter);
    println!(
        "-- the primary is killed; it had counted to {last}, the client saw {}",
        world.seen
    );
    let seen = world.seen;
    world.until("the survivor serves", |w| w.seen >= seen + 3);
    let survivor = world.hosts[1].as_ref().unwrap();
    for (page, bytes) in survivor.ram.chunks(PAGE).enumerate() {
        let number = u64::from_le_bytes(*bytes.first_chunk().unwrap());
        assert_eq!(number as usize % PAGES, page);
        assert!(
            number + PAGES as u64 > survivor.counter,
            "every page is of now"
        );
    }
    println!(
        "-- the survivor counts {}; nothing the client saw was lost",
        survivor.counter
    );
}
