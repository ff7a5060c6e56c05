//! The loop: wait, take what happened, hand it to the machine, do what the machine says.
//!
//! * this file: the loop and one turn of it
//! * [`config`](self): what a driver is made of, and what can go wrong
//! * `outputs`: doing what the machine says
//! * `channels`: moving bytes within budgets
//!
//! There is no `if` about roles here: the same loop drives a primary, a secondary, and one that
//! becomes the other.

mod channels;
mod config;
mod fence;
mod outputs;

use core::time::Duration;
use std::{
    collections::BTreeMap,
    sync::mpsc::{Receiver, Sender, SyncSender},
};

use colo_proto::{
    command::{Answer, CommandId},
    id::Role,
    machine::{Input, Machine},
    member::{DATAGRAM_SIZE, PathId},
    time::Instant,
    wire::join::{Refusal, Request},
};
use mio::{Events, Poll, Token};

pub use config::{DriverConfig, DriverError};
pub use fence::Fencer;

use crate::{
    ControlHandle, Endpoint, Guest, Wake,
    arbiter::Arbiter,
    channel::{
        Links,
        connect::{Connector, Outcome},
    },
    clock::{self, Timer},
    guest::{Ready, Tokens},
    handle::{Ask, Report, What},
    heartbeat::{self, HeartbeatSockets},
    metrics::{LoopStats, Snapshot},
    pool::Pool,
    priority::{self, Priority},
    record::{RecordStore, Written},
};

const TIMER: Token = Token(0);
const WAKER: Token = Token(1);
const LISTENER: Token = Token(2);
const PATHS: usize = 8;
const CONNECTIONS: usize = 64;

/// Things of the guest that are taken in one turn.
const GUEST_TURN: usize = 512;
/// How long the last bytes may take when the loop ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// A machine, a guest, and the loop that joins them to the outside.
pub struct Driver<M, G> {
    machine: M,
    guest: G,
    poll: Poll,
    timer: Timer,
    connector: Connector,
    links: Links,
    heartbeats: HeartbeatSockets,
    arbiter: Box<dyn Arbiter>,
    record: RecordStore,
    pool: Pool,
    handle: ControlHandle,
    inbox: Receiver<Ask>,
    answers: BTreeMap<CommandId, Sender<Answer>>,
    last_command: u64,
    subscribers: Vec<SyncSender<Report>>,
    /// Powers the peer off, and says whether it could.
    fence: fence::Fence,
    stats: LoopStats,
    priority: Priority,
    silence: Duration,
    buffer: Option<usize>,
    /// There is work that no event will announce.
    more: bool,
    stopping: Option<Instant>,
}

impl<M: Machine, G: Guest> Driver<M, G> {
    /// Binds every address and registers everything. Nothing happens before
    /// [`run`](Self::run).
    ///
    /// # Errors
    /// When an address cannot be bound, or the kernel has no descriptor left.
    pub fn new(
        config: DriverConfig,
        machine: M,
        mut guest: G,
        mut arbiter: Box<dyn Arbiter>,
        mut record: RecordStore,
    ) -> Result<Self, DriverError> {
        let setup = |what| move |source| DriverError::Setup { what, source };
        let poll = Poll::new().map_err(setup("epoll"))?;
        let registry = poll.registry();
        let timer = Timer::new(registry, TIMER).map_err(setup("timerfd"))?;
        let wake = Wake::new(registry, WAKER).map_err(setup("eventfd"))?;
        let mut connector = Connector::new(
            registry,
            config.identity,
            machine.channels(),
            config.peer.clone(),
            LISTENER,
            CONNECTIONS,
        )
        .map_err(setup("epoll"))?;
        if let Some(at) = &config.listen {
            connector
                .listen(at)
                .map_err(|source| DriverError::bind("channels", at, source))?;
        }
        let heartbeats = HeartbeatSockets::bind(&config.paths, registry, PATHS)
            .map_err(|(at, source)| DriverError::bind("heartbeats", &at, source))?;
        arbiter
            .attach(wake.clone())
            .map_err(setup("the arbiter's thread"))?;
        record
            .attach(wake.clone())
            .map_err(setup("the record's thread"))?;
        guest
            .attach(registry, Tokens::GUEST, wake.clone())
            .map_err(setup("the guest's descriptors"))?;
        let (handle, inbox) = ControlHandle::new(wake);
        Ok(Self {
            machine,
            guest,
            timer,
            connector,
            links: Links::default(),
            heartbeats,
            arbiter,
            record,
            pool: Pool::default(),
            handle,
            inbox,
            answers: BTreeMap::new(),
            last_command: 0,
            subscribers: Vec::new(),
            fence: fence::Fence::default(),
            stats: LoopStats::default(),
            priority: config.priority,
            silence: config.silence,
            buffer: config.buffer,
            more: true,
            stopping: None,
            poll,
        })
    }

    /// Requests to power the peer off go to `fencer`, which is told the delay, may take as long as
    /// it takes (it is called on a thread of its own) and says whether the peer is certainly off.
    /// Without one, every such request is answered "no".
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn fence_with(&mut self, fencer: Fencer) -> Result<(), DriverError> {
        let wake = self.handle.wake();
        self.fence = fence::Fence::start(fencer, wake).map_err(|source| DriverError::Setup {
            what: "the fencer's thread",
            source,
        })?;
        Ok(())
    }

    /// A handle for other threads.
    #[must_use]
    pub fn control(&self) -> ControlHandle {
        self.handle.clone()
    }

    /// Where this host listens; tells the port where the system was to pick one.
    #[must_use]
    pub fn local(&self) -> Option<Endpoint> {
        self.connector.local()
    }

    /// Where the heartbeat paths are bound.
    #[must_use]
    pub fn local_paths(&self) -> Vec<Option<Endpoint>> {
        self.heartbeats.local()
    }

    /// Runs until [`ControlHandle::stop`], on this thread, whose priority it raises. Gives the
    /// guest back: what becomes of it is the caller's business.
    ///
    /// # Errors
    /// When the machine says that this loop broke its contract, or epoll fails. Both mean that
    /// nothing can be relied on any more: the process should end, and the peer takes over.
    pub fn run(mut self) -> Result<G, DriverError> {
        priority::raise(self.priority);
        let mut events = Events::with_capacity(256);
        // A machine that was just made may have things to say already.
        self.drain();
        self.feed(Input::Timeout)?;
        while !self.is_over() {
            self.turn(&mut events)?;
        }
        self.links.clear(self.poll.registry());
        Ok(self.guest)
    }

    /// One turn. Heartbeats come before channels; channels have budgets.
    fn turn(&mut self, events: &mut Events) -> Result<(), DriverError> {
        self.timer
            .arm(self.deadline())
            .map_err(|source| DriverError::Poll { source })?;
        let wait = std::mem::take(&mut self.more).then_some(Duration::ZERO);
        if let Err(source) = self.poll.poll(events, wait)
            && source.kind() != std::io::ErrorKind::Interrupted
        {
            return Err(DriverError::Poll { source });
        }
        let begun = clock::now();
        self.stats.turns += 1;
        self.note(events, begun);
        self.heartbeats()?;
        self.deadlines(begun)?;
        self.other_threads()?;
        self.guest_side()?;
        self.connections()?;
        self.channels()?;
        self.stats.longest_turn = self.stats.longest_turn.max(clock::now().since(begun));
        Ok(())
    }

    /// Gives the machine one input and does everything it says. Never nested: what doing it
    /// produces is found in the next turn.
    fn feed(&mut self, input: Input<'_>) -> Result<(), DriverError> {
        self.stats.inputs += 1;
        self.machine.handle_input(clock::now(), input)?;
        self.drain();
        Ok(())
    }

    fn drain(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            self.execute(output);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        [
            self.machine.poll_timeout().map(|deadline| deadline.at),
            self.connector.deadline(),
            self.links.deadline(),
            self.arbiter.deadline(),
            self.stopping,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Remembers what became ready.
    fn note(&mut self, events: &Events, now: Instant) {
        for event in events {
            match event.token() {
                TIMER => self.timer.fired(),
                WAKER => {}
                token => {
                    if let Some(index) = Tokens::GUEST.index(token) {
                        let ready = Ready {
                            readable: event.is_readable() || event.is_read_closed(),
                            writable: event.is_writable(),
                        };
                        self.guest.ready(index, ready);
                    } else if token.0 < CONNECTIONS && token != LISTENER {
                        self.heartbeats.ready(token);
                    } else if !self.links.ready(event) {
                        let (role, peer) = (self.machine.status().role, self.links.peer());
                        self.connector
                            .ready(token, now, |caller| admit(role, peer, caller));
                    }
                }
            }
        }
    }

    fn heartbeats(&mut self) -> Result<(), DriverError> {
        let mut buffer = [0; heartbeat::BUFFER];
        self.heartbeats.begin_turn();
        while let Some((path, bytes)) = self.heartbeats.receive(&mut buffer) {
            self.stats.datagrams.0 += 1;
            self.feed(Input::Datagram(path, bytes))?;
        }
        self.more |= self.heartbeats.end_turn();
        Ok(())
    }

    fn send_heartbeat(&mut self, path: PathId, bytes: &[u8; DATAGRAM_SIZE]) {
        self.stats.datagrams.1 += 1;
        self.heartbeats.send(path, bytes);
    }

    fn deadlines(&mut self, now: Instant) -> Result<(), DriverError> {
        // A heartbeat that came in time counts, also where this loop came late to read it.
        if let Some(deadline) = self.machine.poll_timeout()
            && deadline.at <= now
            && !self.heartbeats.defers_timeouts()
        {
            *self.stats.timers.entry(deadline.why).or_default() += 1;
            self.feed(Input::Timeout)?;
        }
        self.connector.expire(now);
        self.links.expire(now);
        Ok(())
    }

    /// What other threads finished or want.
    fn other_threads(&mut self) -> Result<(), DriverError> {
        while let Some((request, verdict)) = self.arbiter.poll(clock::now()) {
            self.feed(Input::Arbiter(request, verdict))?;
        }
        while let Some(written) = self.record.poll() {
            match written {
                Written::Done(id) => self.feed(Input::Persisted(id))?,
                Written::Refused(why) => self.report(What::RecordNotWritten(why)),
            }
        }
        while let Some(fenced) = self.fence.poll() {
            self.feed(Input::Fenced(fenced))?;
        }
        while let Ok(ask) = self.inbox.try_recv() {
            match ask {
                Ask::Command(command, answer) => {
                    self.last_command += 1;
                    let id = CommandId(self.last_command);
                    self.answers.insert(id, answer);
                    self.feed(Input::Command(id, command))?;
                }
                Ask::Snapshot(answer) => {
                    // Whoever asked may have stopped waiting.
                    let _gone = answer.send(self.snapshot());
                }
                Ask::Subscribe(reports) => self.subscribers.push(reports),
                Ask::Stop => {
                    let until = clock::now() + FAREWELL;
                    self.stopping.get_or_insert(until);
                }
            }
        }
        Ok(())
    }

    fn guest_side(&mut self) -> Result<(), DriverError> {
        for _ in 0..GUEST_TURN {
            let Some(happened) = self.guest.poll() else {
                return Ok(());
            };
            self.feed(happened.as_input())?;
        }
        self.more = true;
        Ok(())
    }

    fn connections(&mut self) -> Result<(), DriverError> {
        while let Some(outcome) = self.connector.poll() {
            match outcome {
                Outcome::Joined {
                    channel,
                    peer,
                    token,
                    stream,
                } => self.attach(channel, peer, token, stream)?,
                Outcome::Failed(channel, error) => {
                    self.stats.refused += 1;
                    tracing::debug!(?channel, %error, "not connected");
                    self.report(What::NotConnected(channel, error.to_string()));
                    self.feed(Input::Down(channel))?;
                }
                Outcome::Turned(error) => {
                    self.stats.refused += 1;
                    tracing::debug!(%error, "caller sent away");
                    self.report(What::CallerRefused(error.to_string()));
                }
            }
        }
        Ok(())
    }

    fn report(&mut self, what: What) {
        let report = Report {
            at: clock::now(),
            what,
        };
        self.subscribers
            .retain(|subscriber| subscriber.try_send(report.clone()).is_ok());
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            at: clock::now(),
            status: self.machine.status(),
            stats: self.machine.stats(),
            driver: self.stats.clone(),
            channels: self.links.channels().collect(),
        }
    }

    /// Whether the loop was stopped and has nothing more to send.
    fn is_over(&mut self) -> bool {
        let Some(until) = self.stopping else {
            return false;
        };
        let now = clock::now();
        now >= until || self.links.finish(now)
    }
}

/// Whether there is room for a caller that has proven to know the key.
fn admit(
    role: Role,
    peer: Option<colo_proto::member::BootId>,
    caller: &Request,
) -> Result<(), Refusal> {
    if role != Role::Primary {
        return Err(Refusal::NotPrimary);
    }
    match peer {
        Some(peer) if peer != caller.boot => Err(Refusal::Busy),
        _ => Ok(()),
    }
}

impl<M, G> std::fmt::Debug for Driver<M, G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver")
            .field("links", &self.links)
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}
