//! A small learning switch in user space. Each port is a Unix socket; an address lives where it
//! last spoke. It writes down every time an address moves, which is how a test knows that only one
//! VM was heard.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};

use colo_driver_mio::frame_socket::{FRAME_MOST, FrameListener, FrameSocket, Received};

use crate::config::Mac;

const LISTENER: Token = Token(usize::MAX);
const STOP: Token = Token(usize::MAX - 1);
const PORTS_MOST: usize = 64;
/// Frames of one port before the next gets its turn.
const TURN: usize = 64;
/// Moves that are remembered; more are counted by their newest only.
const SIGHTINGS_MOST: usize = 65_536;
const HEADER: usize = 14;

/// An address was heard from another port than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// When, in nanoseconds since the host started.
    pub at: u64,
    /// Which address.
    pub mac: Mac,
    /// Process behind the port.
    pub pid: u32,
}

/// A running switch; it ends when this is dropped.
#[derive(Debug)]
pub struct Switch {
    sightings: Arc<Mutex<Vec<Sighting>>>,
    waker: Waker,
    thread: Option<thread::JoinHandle<()>>,
}

impl Switch {
    /// Listens for cables at `path`.
    ///
    /// # Errors
    /// The path is in use or cannot be written.
    pub fn start(path: &Path) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), STOP)?;
        let listener = FrameListener::bind(path)?;
        poll.registry().register(
            &mut SourceFd(&listener.as_fd().as_raw_fd()),
            LISTENER,
            Interest::READABLE,
        )?;
        let sightings = Arc::new(Mutex::new(Vec::new()));
        let mut fabric = Fabric {
            poll,
            listener,
            ports: BTreeMap::new(),
            next: 0,
            homes: BTreeMap::new(),
            sightings: Arc::clone(&sightings),
        };
        let thread = thread::Builder::new()
            .name("switch".into())
            .spawn(move || {
                if let Err(error) = fabric.run() {
                    tracing::error!(%error, "the switch stopped");
                }
            })?;
        Ok(Self {
            sightings,
            waker,
            thread: Some(thread),
        })
    }

    /// Every move of every address so far, oldest first.
    #[must_use]
    pub fn sightings(&self) -> Vec<Sighting> {
        self.sightings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Processes that spoke for `mac`, in order, each as often as it took the address over.
    #[must_use]
    pub fn speakers(&self, mac: Mac) -> Vec<u32> {
        self.sightings()
            .into_iter()
            .filter(|sighting| sighting.mac == mac)
            .map(|sighting| sighting.pid)
            .collect()
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ended = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

struct Port {
    socket: FrameSocket,
    pid: u32,
    /// Whether it may have frames that its turn did not reach.
    ready: bool,
}

struct Fabric {
    poll: Poll,
    listener: FrameListener,
    ports: BTreeMap<usize, Port>,
    next: usize,
    homes: BTreeMap<[u8; 6], usize>,
    sightings: Arc<Mutex<Vec<Sighting>>>,
}

impl Fabric {
    fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(64);
        let mut buffer = vec![0; FRAME_MOST];
        loop {
            let waiting = self.ports.values().any(|port| port.ready);
            let timeout = waiting.then_some(std::time::Duration::ZERO);
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                match event.token() {
                    STOP => return Ok(()),
                    LISTENER => self.plug_in()?,
                    Token(id) => {
                        if let Some(port) = self.ports.get_mut(&id) {
                            port.ready = true;
                        }
                    }
                }
            }
            let ready: Vec<usize> = self
                .ports
                .iter()
                .filter(|(_, port)| port.ready)
                .map(|(&id, _)| id)
                .collect();
            for id in ready {
                self.turn(id, &mut buffer);
            }
        }
    }

    fn plug_in(&mut self) -> io::Result<()> {
        while let Some(socket) = self.listener.accept()? {
            if self.ports.len() == PORTS_MOST {
                tracing::warn!("switch: all {PORTS_MOST} ports are taken, a cable was refused");
                continue;
            }
            let id = self.next;
            self.next += 1;
            self.poll.registry().register(
                &mut SourceFd(&socket.as_fd().as_raw_fd()),
                Token(id),
                Interest::READABLE,
            )?;
            let pid = socket.peer_pid().unwrap_or(0);
            let port = Port {
                socket,
                pid,
                ready: true,
            };
            self.ports.insert(id, port);
        }
        Ok(())
    }

    fn turn(&mut self, id: usize, buffer: &mut [u8]) {
        for _ in 0..TURN {
            let Some(port) = self.ports.get_mut(&id) else {
                return;
            };
            match port.socket.recv(buffer) {
                Ok(Received::Frame(len)) => {
                    if let Some(frame) = buffer.get(..len) {
                        self.forward(id, frame);
                    }
                }
                Ok(Received::Nothing) => {
                    port.ready = false;
                    return;
                }
                Ok(Received::Closed) | Err(_) => return self.unplug(id),
            }
        }
    }

    fn unplug(&mut self, id: usize) {
        self.ports.remove(&id);
        self.homes.retain(|_, home| *home != id);
    }

    fn forward(&mut self, from: usize, frame: &[u8]) {
        let Some((to, source)) = addresses(frame) else {
            return;
        };
        self.learn(from, source);
        match self.homes.get(&to) {
            Some(home) if *home == from => {}
            Some(home) => {
                if let Some(port) = self.ports.get(home) {
                    // A port that is full or gone drops; it is unplugged when it is read.
                    let _dropped = port.socket.send(frame);
                }
            }
            None => {
                for (id, port) in &self.ports {
                    if *id != from {
                        let _dropped = port.socket.send(frame);
                    }
                }
            }
        }
    }

    fn learn(&mut self, from: usize, source: [u8; 6]) {
        if source[0] & 1 != 0 || self.homes.insert(source, from) == Some(from) {
            return;
        }
        let pid = self.ports.get(&from).map_or(0, |port| port.pid);
        let mut sightings = self
            .sightings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if sightings.len() < SIGHTINGS_MOST {
            sightings.push(Sighting {
                at: super::now(),
                mac: Mac(source),
                pid,
            });
        }
    }
}

fn addresses(frame: &[u8]) -> Option<([u8; 6], [u8; 6])> {
    let (head, _) = frame.split_at_checked(HEADER)?;
    let (to, rest) = head.split_first_chunk()?;
    Some((*to, *rest.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const B: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn frame(to: [u8; 6], from: [u8; 6], tag: u8) -> Vec<u8> {
        [&to[..], &from, &[0x88, 0xb5, tag]].concat()
    }

    /// The tag of the next frame; a second of silence fails the test.
    fn next(socket: &FrameSocket) -> u8 {
        let mut buffer = vec![0; FRAME_MOST];
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            match socket.recv(&mut buffer).unwrap() {
                Received::Frame(len) => return buffer[len - 1],
                _ => thread::yield_now(),
            }
        }
        panic!("no frame came")
    }

    #[test]
    fn an_address_lives_where_it_last_spoke() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let switch = Switch::start(&path).unwrap();
        let [one, two, three] = [(); 3].map(|()| FrameSocket::connect(&path).unwrap());
        // Unknown: everybody hears it. Each hearing also proves that its port is plugged in.
        one.send(&frame([0xff; 6], A, 1)).unwrap();
        assert_eq!((next(&two), next(&three)), (1, 1));
        // Known: only its home does.
        two.send(&frame(A, B, 2)).unwrap();
        assert_eq!(next(&one), 2);
        // It moves to another port and is heard there.
        three.send(&frame(B, A, 3)).unwrap();
        assert_eq!(next(&two), 3);
        two.send(&frame(A, B, 4)).unwrap();
        assert_eq!(next(&three), 4);
        let mut buffer = [0; 64];
        assert_eq!(one.recv(&mut buffer).unwrap(), Received::Nothing);
        assert_eq!(switch.speakers(Mac(A)).len(), 2);
        assert_eq!(switch.speakers(Mac(B)), [std::process::id()]);
    }

    #[test]
    fn rubbish_and_short_frames_harm_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _switch = Switch::start(&path).unwrap();
        let [one, two] = [(); 2].map(|()| FrameSocket::connect(&path).unwrap());
        one.send(&[1]).unwrap();
        one.send(&[0xff; 13]).unwrap();
        one.send(&frame([0xff; 6], A, 9)).unwrap();
        assert_eq!(next(&two), 9);
        drop(one);
        let three = FrameSocket::connect(&path).unwrap();
        three.send(&frame([0xff; 6], A, 7)).unwrap();
        assert_eq!(next(&two), 7);
    }
}
