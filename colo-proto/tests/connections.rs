//! Connections over a pair in lockstep whose guests choose other initial sequence numbers, as Linux
//! guests do: opened between checkpoints, across the death of the primary, and of the next one.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use colo_proto::{
    config::Config,
    event::Event,
    id::{Epoch, Slot},
    machine::{Body, Captured, GuestDone, GuestOp, Input, Machine as _, Output, Sink},
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    output::packet::{Content, Heading, Segment, View, flag},
    status::Mode,
    testing::{Guest, Host, Pair},
    time::Instant,
};

const GUEST: [u8; 4] = [192, 0, 2, 7];
const CLIENT: [u8; 4] = [198, 51, 100, 1];

/// One connection of the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Connection {
    port: u16,
    una: u32,
    next: u32,
    expects: u32,
}

/// What a checkpoint carries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    connections: Vec<Connection>,
    opened: u32,
    heard: u64,
}

/// A server that answers each request with the request twice, and resets what it does not know.
#[derive(Default)]
struct Server {
    /// Chosen by each VM for itself.
    random: u32,
    running: bool,
    epoch: Epoch,
    state: State,
    captured: State,
    coming: State,
    card: VecDeque<(u64, Bytes)>,
    said: VecDeque<(Epoch, Bytes)>,
}

impl Server {
    fn serve(&mut self) {
        while self.running
            && let Some((index, frame)) = self.card.pop_front()
        {
            self.state.heard = index;
            let (port, segment, payload) = read(&frame, Heading::ToGuest);
            let of = |c: &Connection| c.port == port;
            let at = self.state.connections.iter().position(of);
            if segment.has(flag::SYN) {
                self.state.connections.retain(|c| !of(c));
                self.state.opened += 1;
                let isn = self.random.wrapping_mul(self.state.opened);
                let next = isn.wrapping_add(1);
                let expects = segment.seq.wrapping_add(1);
                self.state.connections.push(Connection {
                    port,
                    una: next,
                    next,
                    expects,
                });
                self.say(port, isn, Some(expects), flag::SYN, b"");
                continue;
            }
            let ack = segment.ack.unwrap();
            let known = at.map(|at| self.state.connections[at]);
            let Some(mut c) =
                known.filter(|c| ack.wrapping_sub(c.una) <= c.next.wrapping_sub(c.una))
            else {
                self.say(port, ack, None, flag::RST, b"");
                continue;
            };
            c.una = ack;
            if segment.seq == c.expects && !payload.is_empty() {
                c.expects = c.expects.wrapping_add(payload.len() as u32);
                let answer = [&payload[..], &payload[..]].concat();
                // Each VM cuts it elsewhere.
                let cut = self.random as usize % answer.len();
                for part in [&answer[..cut], &answer[cut..]] {
                    self.say(port, c.next, Some(c.expects), 0, part);
                    c.next = c.next.wrapping_add(part.len() as u32);
                }
            }
            self.state.connections[at.unwrap()] = c;
        }
    }

    fn say(&mut self, port: u16, seq: u32, ack: Option<u32>, flags: u8, payload: &[u8]) {
        let frame = segment([GUEST, CLIENT], [80, port], seq, ack, flags, payload);
        self.said.push_back((self.epoch, frame));
    }
}

impl Guest for Server {
    type Contents = State;

    fn operate(&mut self, op: GuestOp) -> GuestDone {
        match &op {
            GuestOp::Pause => self.running = false,
            GuestOp::Resume => self.running = true,
            GuestOp::Capture { epoch, resume, .. } => {
                (self.epoch, self.running) = (*epoch, *resume);
                self.captured = self.state.clone();
                let mut captured = Captured::new(*epoch, 8);
                captured.inputs = self.state.heard;
                self.serve();
                return GuestDone::Captured(captured);
            }
            GuestOp::LoadState { epoch, .. } => {
                self.epoch = *epoch;
                self.state = self.coming.clone();
                self.card.clear();
            }
            _ => {}
        }
        self.serve();
        op.done()
    }

    fn dirty(&mut self) -> Vec<(Slot, Vec<u64>)> {
        vec![(Slot(0), vec![1])]
    }

    fn read(&mut self, body: &Body) -> State {
        match body {
            Body::State(_) => self.captured.clone(),
            _ => State::default(),
        }
    }

    fn write(&mut self, sink: &Sink, contents: State) {
        if matches!(sink, Sink::State(_)) {
            self.coming = contents;
        }
    }

    fn hear(&mut self, index: u64, frame: Bytes) {
        self.card.push_back((index, frame));
        self.serve();
    }

    fn say(&mut self) -> Option<(Epoch, Bytes)> {
        self.said.pop_front()
    }
}

fn segment(
    [from, to]: [[u8; 4]; 2],
    ports: [u16; 2],
    seq: u32,
    ack: Option<u32>,
    flags: u8,
    payload: &[u8],
) -> Bytes {
    let mut frame = vec![2; 12];
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend((40 + payload.len() as u16).to_be_bytes());
    frame.extend([0, 1, 0, 0, 64, 6, 0, 0]);
    frame.extend(from.into_iter().chain(to));
    frame.extend(ports.into_iter().flat_map(u16::to_be_bytes));
    frame.extend(seq.to_be_bytes());
    frame.extend(ack.unwrap_or(0).to_be_bytes());
    let flags = flags | if ack.is_some() { flag::ACK } else { 0 };
    frame.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend(payload);
    frame.into()
}

/// The client's port, the segment and its payload.
fn read(frame: &Bytes, heading: Heading) -> (u16, Segment, Bytes) {
    let view = View::new(frame, 0, heading).unwrap();
    let Content::Tcp(segment) = view.content else {
        panic!("{view:?}");
    };
    (view.key.their_port, segment, frame.slice(view.payload()))
}

/// A client that sends a request and waits for the whole answer, with patience.
#[derive(Debug)]
struct Client {
    port: u16,
    seq: u32,
    /// The next of the server's numbers.
    ack: Option<u32>,
    answer: Vec<u8>,
}

struct Scene {
    pair: Pair<Server>,
    checkpoints: u32,
    parted: u32,
}

impl Scene {
    fn protected() -> Self {
        let now = Instant::from_millis(1);
        let mut pair = Pair::new(config(1).channels(), now);
        pair.start(0, host(1, Start::Primary, 1, now));
        pair.start(1, host(2, Start::Secondary, 2, now));
        let mut scene = Self {
            pair,
            checkpoints: 0,
            parted: 0,
        };
        scene.protect();
        scene
    }

    fn protect(&mut self) {
        for _ in 0..10_000 {
            let is = |at| self.pair.host(at).unwrap().node().status().protected;
            if is(0) && is(1) {
                (self.checkpoints, self.parted) = (0, 0);
                return;
            }
            self.tick(&mut []);
        }
        panic!("not protected");
    }

    fn kill(&mut self, at: usize) {
        self.pair.kill(at).unwrap();
    }

    /// One millisecond.
    fn tick(&mut self, clients: &mut [Client]) {
        self.pair.run(Duration::from_millis(1)).unwrap();
        while let Some((_, output)) = self.pair.report() {
            match output {
                Output::ToWorld { frame, .. } => {
                    let (port, segment, payload) = read(&frame, Heading::FromGuest);
                    for client in clients.iter_mut().filter(|c| c.port == port) {
                        client.hears(&segment, &payload);
                    }
                }
                Output::Event(Event::Checkpointed { .. }) => self.checkpoints += 1,
                Output::Event(Event::Parted(parted)) => {
                    self.parted += 1;
                    eprintln!("{parted:?}");
                }
                _ => {}
            }
        }
    }

    fn send(&mut self, frame: &Bytes) {
        for at in 0..2 {
            if self.pair.host(at).is_some() {
                self.pair
                    .input(at, Input::FromWorld(frame.clone()))
                    .unwrap();
            }
        }
    }

    fn open(&mut self, port: u16) -> Client {
        let mut client = Client {
            port,
            seq: 7000,
            ack: None,
            answer: vec![],
        };
        for n in 0..20_000 {
            if n % 200 == 0 {
                let syn = segment([CLIENT, GUEST], [port, 80], 6999, None, flag::SYN, b"");
                self.send(&syn);
            }
            self.tick(core::slice::from_mut(&mut client));
            if client.ack.is_some() {
                return client;
            }
        }
        panic!("no answer to a SYN");
    }

    /// How long the answer took, in milliseconds.
    fn request(&mut self, client: &mut Client, text: &[u8]) -> u32 {
        client.answer.clear();
        let seq = client.seq;
        client.seq = seq.wrapping_add(text.len() as u32);
        for n in 0..20_000 {
            if n % 200 == 0 {
                let ports = [client.port, 80];
                self.send(&segment([CLIENT, GUEST], ports, seq, client.ack, 0, text));
            }
            self.tick(core::slice::from_mut(client));
            if client.answer.len() == text.len() * 2 {
                assert_eq!(client.answer, [text, text].concat());
                return n;
            }
        }
        panic!("no answer: {client:?}");
    }
}

impl Client {
    fn hears(&mut self, segment: &Segment, payload: &[u8]) {
        assert!(!segment.has(flag::RST), "reset: {self:?}");
        if segment.has(flag::SYN) {
            self.ack.get_or_insert_with(|| segment.seq.wrapping_add(1));
            return;
        }
        if Some(segment.seq) == self.ack {
            self.answer.extend(payload);
            self.ack = Some(segment.seq.wrapping_add(payload.len() as u32));
        }
    }
}

fn config(id: u64) -> Config {
    let member = MemberConfig::new(VmId([7; 16]), NodeId(3 - id), MacKey([7; 16]));
    Config::builder(NodeId(id), member, &[(Slot(0), 16)])
        .mode(Mode::Lockstep)
        .longest(Duration::from_secs(3600))
        .build()
        .unwrap()
}

fn host(id: u64, start: Start, boot: u64, now: Instant) -> Host<Server> {
    let guest = Server {
        random: 0x9e37_79b9_u32.wrapping_mul(boot as u32),
        ..Server::default()
    };
    let node = Node::new(config(id), start, BootId(boot), None, boot, now);
    Host::new(node, guest)
}

#[test]
fn a_connection_for_each_request_needs_no_checkpoint() {
    let mut scene = Scene::protected();
    for port in 1000..1200 {
        let mut client = scene.open(port);
        let waited = scene.request(&mut client, b"a request of some length");
        assert!(waited < 100, "{waited} ms: it was not sent again");
    }
    assert_eq!((scene.checkpoints, scene.parted), (0, 0));
}

#[test]
fn open_connections_survive_one_takeover_and_the_next() {
    let mut scene = Scene::protected();
    let mut clients: Vec<Client> = (2000..2010).map(|port| scene.open(port)).collect();
    for client in &mut clients {
        scene.request(client, b"before");
    }
    assert_eq!((scene.checkpoints, scene.parted), (0, 0));
    scene.kill(0);
    for client in &mut clients {
        scene.request(client, b"after the first takeover");
    }
    // A third host, with numbers of its own.
    let now = scene.pair.now();
    scene.pair.start(0, host(1, Start::Secondary, 3, now));
    scene.protect();
    clients.extend((3000..3005).map(|port| scene.open(port)));
    for client in &mut clients {
        scene.request(client, b"protected again");
    }
    assert_eq!((scene.checkpoints, scene.parted), (0, 0));
    scene.kill(1);
    for client in &mut clients {
        scene.request(client, b"after the second takeover");
    }
}

#[test]
fn a_kill_in_the_middle_of_anything_loses_no_byte() {
    for moment in 0..12 {
        let mut scene = Scene::protected();
        let mut client = scene.open(4000);
        let seq = client.seq;
        let text = b"said while a host dies";
        // The request reaches the pair, which is killed at its `moment`-th step with it.
        let frame = segment([CLIENT, GUEST], [4000, 80], seq, client.ack, 0, text);
        scene.pair.input(0, Input::FromWorld(frame)).unwrap();
        for n in 0..moment {
            scene.pair.step(n % 2).unwrap();
        }
        scene.kill(0);
        scene.request(&mut client, text);
        scene.request(&mut client, b"and on");
    }
}
