//! A client that works over one TCP connection and believes nothing: every byte of every answer
//! is checked, and the guest's counter must count this client's requests, one by one, whatever
//! happens to the hosts.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp,
    time::Instant,
    wire::{EthernetAddress, HardwareAddress, IpCidr},
};

use super::{
    http::{Answer, Asked, HttpFault},
    kernel, now,
};
use crate::{
    config::Mac,
    frame_socket::{FRAME_MOST, FrameSocket, Received},
};

/// The client's TCP stack never repeats before a second has passed; Linux's waits 200 ms. Its
/// clock runs this much faster, so that it is as patient as a client in the field.
const HASTE: u64 = 5;
const BUFFER: usize = 64 << 10;
const ETHERNET_MTU: usize = 1514;
const FRAMES: Token = Token(0);
const WAKE: Token = Token(1);

/// Who the client is and what it does.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Hardware address of the client.
    pub mac: Mac,
    /// Its address, in a network of 24 bits.
    pub address: Ipv4Addr,
    /// Address of the guest.
    pub guest: Ipv4Addr,
    /// Port of the guest's server.
    pub port: u16,
    /// Pause between an answer and the next request.
    pub pause: Duration,
    /// Whether to ask for the counter only: for measuring latency.
    pub counter_only: bool,
}

/// One good answer. Times are nanoseconds since the host started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// When the request was handed to the stack.
    pub asked: u64,
    /// When the first byte of the answer came.
    pub first_byte: u64,
    /// When the answer was whole.
    pub whole: u64,
    /// Bytes of its body.
    pub bytes: usize,
    /// The counter, if that was asked for.
    pub counter: Option<u64>,
}

/// What must never happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The connection ended.
    #[error("the connection was reset or closed after {answers} answers")]
    Reset {
        /// Good answers before it.
        answers: u64,
    },
    /// A byte is wrong.
    #[error("answer {number}: {fault}")]
    Wrong {
        /// Number of the answer, from 1.
        number: u64,
        /// What is wrong.
        fault: HttpFault,
    },
    /// The counter did not count.
    #[error("answer {number}: the counter is {got}, expected {expected}")]
    Counter {
        /// Number of the answer, from 1.
        number: u64,
        /// What came.
        got: u64,
        /// What was due.
        expected: u64,
    },
    /// More came than was asked for.
    #[error("{bytes} bytes came after answer {number} that nobody asked for")]
    Unasked {
        /// Number of the last answer.
        number: u64,
        /// How many.
        bytes: usize,
    },
    /// The client itself failed.
    #[error("the client: {0}")]
    Client(String),
}

/// What a client saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// When the connection was established.
    pub connected: Option<u64>,
    /// Good answers, oldest first.
    pub answers: Vec<Answered>,
    /// The first thing that must never happen; the client ends with it.
    pub fault: Option<Fault>,
    /// Whether a request still waits for its answer.
    pub waiting: bool,
}

/// A working client; it ends when this is dropped.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    /// For a client with a stack of its own; the kernel's looks by itself.
    waker: Option<Waker>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) report: Report,
    /// No new requests.
    pub(super) finish: bool,
    /// The thread has ended or must.
    pub(super) end: bool,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// A good answer came.
    pub(super) fn answered(&self, answered: Answered) {
        let mut state = self.lock();
        state.report.answers.push(answered);
        state.report.waiting = false;
        self.changed.notify_all();
    }

    fn ended(&self, how: Result<(), Fault>) {
        let mut state = self.lock();
        if let Err(fault) = how {
            state.report.fault.get_or_insert(fault);
        }
        state.end = true;
        self.changed.notify_all();
    }
}

impl Client {
    /// Plugs a client into the switch at `path`; it connects to the guest as soon as one answers.
    ///
    /// # Errors
    /// There is no switch, or no descriptor or thread is left.
    pub fn start(path: &Path, plan: Plan) -> io::Result<Self> {
        let socket = FrameSocket::connect(path)?;
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        poll.registry().register(
            &mut SourceFd(&socket.as_fd().as_raw_fd()),
            FRAMES,
            Interest::READABLE,
        )?;
        let shared = Arc::new(Shared::default());
        let worker = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("client".into())
            .spawn(move || {
                let ended = Worker::new(plan, socket, poll, &worker).run();
                worker.ended(ended);
            })?;
        Ok(Self {
            shared,
            waker: Some(waker),
            thread: Some(thread),
        })
    }

    /// A client on the kernel's own TCP stack, in the network namespace whose file this is.
    ///
    /// # Errors
    /// There is no such file, or no thread is left.
    pub fn start_in(namespace: &Path, plan: Plan) -> io::Result<Self> {
        let namespace = std::fs::File::open(namespace)?;
        let shared = Arc::new(Shared::default());
        let worker = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("client".into())
            .spawn(move || {
                let ended = kernel::work(&namespace, &plan, &worker);
                worker.ended(ended);
            })?;
        Ok(Self {
            shared,
            waker: None,
            thread: Some(thread),
        })
    }

    /// What it has seen so far.
    #[must_use]
    pub fn report(&self) -> Report {
        self.shared.lock().report.clone()
    }

    /// What went wrong, if anything did.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        self.shared.lock().report.fault.clone()
    }

    /// Good answers so far and the newest counter, without copying the whole report.
    #[must_use]
    pub fn progress(&self) -> (usize, Option<u64>) {
        let state = self.shared.lock();
        let answers = &state.report.answers;
        (
            answers.len(),
            answers.iter().rev().find_map(|answer| answer.counter),
        )
    }

    /// Waits for the first answer whose first byte came after `since` (nanoseconds as [`now`](super::now) gives them).
    #[must_use]
    pub fn answer_after(&self, since: u64, patience: Duration) -> Option<Answered> {
        let find = |state: &State| {
            let answers = &state.report.answers;
            let at = answers.partition_point(|answer| answer.first_byte <= since);
            answers.get(at).copied()
        };
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), patience, |state| {
                find(state).is_none() && !state.end
            })
            .unwrap_or_else(PoisonError::into_inner);
        find(&state)
    }

    /// Asks nothing more, waits for the last answer, and ends.
    #[must_use]
    pub fn finish(mut self, patience: Duration) -> Report {
        self.shared.lock().finish = true;
        self.wake();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), patience, |state| {
                state.report.waiting && !state.end
            })
            .unwrap_or_else(PoisonError::into_inner);
        let report = state.report.clone();
        drop(state);
        self.stop();
        report
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            let _ended = waker.wake();
        }
    }

    fn stop(&mut self) {
        self.shared.lock().end = true;
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A request on its way.
struct Pending {
    asked: Asked,
    at: u64,
    /// What the stack has not taken yet.
    unsent: Vec<u8>,
    first_byte: Option<u64>,
    answer: Answer,
}

struct Worker<'a> {
    plan: Plan,
    poll: Poll,
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    shared: &'a Shared,
    pending: Option<Pending>,
    next_at: u64,
    number: u64,
    /// What the next counter must be, known after the first.
    due: Option<u64>,
    connected: bool,
    random: u64,
}

impl<'a> Worker<'a> {
    fn new(plan: Plan, socket: FrameSocket, poll: Poll, shared: &'a Shared) -> Self {
        let mut cable = Cable::new(socket);
        let random = now() | 1;
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(plan.mac.0)));
        config.random_seed = random;
        let mut interface = Interface::new(config, &mut cable, clock());
        interface.update_ip_addrs(|addresses| {
            // An empty list has room for one.
            let _full = addresses.push(IpCidr::new(plan.address.into(), 24));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; BUFFER]),
            tcp::SocketBuffer::new(vec![0; BUFFER]),
        );
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let handle = sockets.add(socket);
        Self {
            plan,
            poll,
            cable,
            interface,
            sockets,
            handle,
            shared,
            pending: None,
            next_at: 0,
            number: 0,
            due: None,
            connected: false,
            random,
        }
    }

    fn run(&mut self) -> Result<(), Fault> {
        let failed = |error: io::Error| Fault::Client(error.to_string());
        let mut events = Events::with_capacity(4);
        loop {
            if self.shared.lock().end {
                return Ok(());
            }
            self.interface
                .poll(clock(), &mut self.cable, &mut self.sockets);
            if self.work()? {
                // What was just written goes out before anything is waited for.
                continue;
            }
            let wait = self.wait();
            match self.poll.poll(&mut events, Some(wait)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(failed(error));
                }
                _ => {}
            }
        }
    }

    fn wait(&mut self) -> Duration {
        let stack = self
            .interface
            .poll_delay(clock(), &self.sockets)
            .map_or(1_000_000, |delay| delay.total_micros() / HASTE);
        let request = if self.pending.is_none() && self.connected {
            self.next_at.saturating_sub(now()) / 1_000
        } else {
            1_000_000
        };
        Duration::from_micros(stack.min(request).min(1_000_000))
    }

    /// Moves the conversation on; true if there is something to transmit at once.
    fn work(&mut self) -> Result<bool, Fault> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if !self.connected {
            match socket.state() {
                tcp::State::Established => {
                    self.connected = true;
                    self.shared.lock().report.connected = Some(now());
                }
                tcp::State::Closed => {
                    // Nobody was there, or refused: the guest may still be starting.
                    let port = 49_152 + (self.random() % 16_384) as u16;
                    let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
                    socket
                        .connect(
                            self.interface.context(),
                            (self.plan.guest, self.plan.port),
                            port,
                        )
                        .map_err(|error| Fault::Client(format!("connect: {error:?}")))?;
                    return Ok(true);
                }
                _ => return Ok(false),
            }
        }
        if self.pending.is_none() && now() >= self.next_at && !self.shared.lock().finish {
            self.ask();
        }
        let wrote = self.write()?;
        self.read()?;
        Ok(wrote)
    }

    fn ask(&mut self) {
        let asked = Asked::any(self.plan.counter_only, &mut || self.random());
        let unsent = asked.encode(&self.plan.guest.to_string());
        self.shared.lock().report.waiting = true;
        self.pending = Some(Pending {
            asked,
            at: now(),
            unsent,
            first_byte: None,
            answer: Answer::default(),
        });
    }

    fn write(&mut self) -> Result<bool, Fault> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if !socket.may_send() {
            return Err(Fault::Reset {
                answers: self.number,
            });
        }
        let Some(pending) = self.pending.as_mut().filter(|p| !p.unsent.is_empty()) else {
            return Ok(false);
        };
        let taken = socket.send_slice(&pending.unsent).unwrap_or(0);
        pending.unsent.drain(..taken);
        Ok(taken > 0)
    }

    fn read(&mut self) -> Result<(), Fault> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        while socket.can_recv() {
            let Some(pending) = &mut self.pending else {
                return Err(Fault::Unasked {
                    number: self.number,
                    bytes: socket.recv_queue(),
                });
            };
            pending.first_byte.get_or_insert_with(now);
            let taken = socket
                .recv(|bytes| match pending.answer.push(bytes) {
                    Ok(taken) => (taken, Ok(())),
                    Err(fault) => (bytes.len(), Err(fault)),
                })
                .unwrap_or(Ok(()));
            taken.map_err(|fault| Fault::Wrong {
                number: self.number + 1,
                fault,
            })?;
            if let Some(body) = pending.answer.body() {
                self.number += 1;
                let number = self.number;
                pending
                    .asked
                    .judge(&pending.answer)
                    .map_err(|fault| Fault::Wrong { number, fault })?;
                let counter = pending.answer.counter;
                let answered = Answered {
                    asked: pending.at,
                    first_byte: pending.first_byte.unwrap_or(pending.at),
                    whole: now(),
                    bytes: body.len(),
                    counter,
                };
                count(&mut self.due, counter, number)?;
                self.pending = None;
                self.next_at = answered.whole + self.plan.pause.as_nanos() as u64;
                self.shared.answered(answered);
            }
        }
        Ok(())
    }

    fn random(&mut self) -> u64 {
        xorshift(&mut self.random)
    }
}

/// Variety, not secrecy.
pub(super) fn xorshift(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 8
}

/// Every request counts one, and nobody else asks: the counter is known in advance.
pub(super) fn count(due: &mut Option<u64>, counter: Option<u64>, number: u64) -> Result<(), Fault> {
    if let (Some(expected), Some(got)) = (*due, counter)
        && got != expected
    {
        return Err(Fault::Counter {
            number,
            got,
            expected,
        });
    }
    *due = counter.or(*due).map(|this| this + 1);
    Ok(())
}

pub(super) fn clock() -> Instant {
    Instant::from_micros((now() / 1_000 * HASTE) as i64)
}

/// The cable as smoltcp sees it.
pub(super) struct Cable {
    socket: FrameSocket,
    buffer: Vec<u8>,
}

impl Cable {
    pub(super) fn new(socket: FrameSocket) -> Self {
        Self {
            socket,
            buffer: vec![0; FRAME_MOST],
        }
    }
}

impl Device for Cable {
    type RxToken<'a> = Arrived<'a>;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived<'_>, Leaving<'_>)> {
        let Ok(Received::Frame(len)) = self.socket.recv(&mut self.buffer) else {
            return None;
        };
        let frame = self.buffer.get(..len)?;
        Some((Arrived(frame), Leaving(&self.socket)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Leaving<'_>> {
        Some(Leaving(&self.socket))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_MTU;
        capabilities
    }
}

pub(super) struct Arrived<'a>(&'a [u8]);

impl RxToken for Arrived<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

pub(super) struct Leaving<'a>(&'a FrameSocket);

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let done = f(&mut frame);
        // Full or gone: TCP repeats it.
        let _dropped = self.0.send(&frame);
        done
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Switch, fake_server::FakeServer};
    use super::*;

    fn plan() -> Plan {
        Plan {
            mac: Mac([2, 0, 0, 0, 0, 9]),
            address: Ipv4Addr::new(10, 0, 2, 9),
            guest: FakeServer::ADDRESS,
            port: 80,
            pause: Duration::ZERO,
            counter_only: false,
        }
    }

    fn work_with(lie: impl Fn(u64) -> u64 + Send + 'static, answers: usize) -> Report {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _switch = Switch::start(&path).unwrap();
        let client = Client::start(&path, plan()).unwrap();
        let _server = FakeServer::start(&path, lie);
        let mut since = 0;
        for _ in 0..answers {
            match client.answer_after(since, Duration::from_secs(30)) {
                Some(answer) => since = answer.first_byte,
                None => break,
            }
        }
        client.finish(Duration::from_secs(30))
    }

    #[test]
    fn an_honest_server_leaves_no_fault() {
        let report = work_with(|count| count, 200);
        assert_eq!(report.fault, None);
        assert!(report.answers.len() >= 200 && !report.waiting);
        assert!(report.answers.iter().any(|answer| answer.bytes > 2_000));
    }

    #[test]
    fn a_server_that_forgets_is_caught() {
        let report = work_with(|count| if count > 50 { count - 10 } else { count }, 200);
        assert!(
            matches!(report.fault, Some(Fault::Counter { .. })),
            "{:?}",
            report.fault
        );
    }

    #[test]
    fn the_counter_must_count_every_request() {
        let mut due = None;
        count(&mut due, None, 1).unwrap();
        count(&mut due, Some(40), 2).unwrap();
        count(&mut due, None, 3).unwrap();
        count(&mut due, Some(42), 4).unwrap();
        for got in [42, 41, 44] {
            let error = count(&mut due.clone(), Some(got), 5).unwrap_err();
            assert_eq!(
                error,
                Fault::Counter {
                    number: 5,
                    got,
                    expected: 43
                }
            );
        }
    }
}
