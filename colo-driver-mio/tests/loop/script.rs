//! A machine that does what the test tells it and remembers what it was told.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use colo_driver_mio::{
    ControlHandle, Driver, DriverConfig, DriverError, Endpoint,
    arbiter::{Arbiter, none::NoArbiter},
    guest::fake::{FakeGuest, FakeHandle},
    handle::{Report, What},
    heartbeat::PathConfig,
    priority::Priority,
    record::RecordStore,
};
use colo_proto::{
    command::Answer,
    error::Misuse,
    id::{Channel, Epoch, Generation, Role},
    machine::{Body, Deadline, Demand, GuestDone, Input, Machine, Output, TimerKind, Transmit},
    member::{BootId, MacKey, MemberState, RequestId, Verdict, VmId},
    stats::Stats,
    status::{ColoMode, ExitReason, FailoverStatus, Mode, Status},
    time::Instant,
    wire::join::Identity,
};

/// Longer than anything here takes; a wait that is not met is a failure, not a measurement.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// An input, without what a test does not look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Up(Channel),
    Down(Channel),
    Bytes(Channel, Vec<u8>),
    Frame(Channel, Vec<u8>),
    Placed(Channel, usize),
    Datagram(Vec<u8>),
    Command,
    Guest(GuestDone),
    Dirty(u64),
    FromGuest(Epoch, Vec<u8>),
    Persisted(u64),
    Arbiter(RequestId, Verdict),
    Fenced(bool),
    Timeout,
}

#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) outputs: VecDeque<Output>,
    pub(crate) transmits: BTreeMap<Channel, VecDeque<Transmit>>,
    pub(crate) demands: BTreeMap<Channel, VecDeque<Demand>>,
    /// Handed out for RAM lane 0 again and again.
    pub(crate) flood: Option<Transmit>,
    /// Demanded of RAM lane 0 again and again.
    pub(crate) soak: Option<Demand>,
    /// Dial again whatever goes down.
    pub(crate) redial: bool,
    pub(crate) misuse: bool,
    /// A timeout that is due until it has been handled.
    pub(crate) due: Option<Instant>,
    pub(crate) began: bool,
    pub(crate) seen: Vec<Seen>,
    pub(crate) sent: BTreeMap<Channel, u64>,
    pub(crate) inputs: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Script {
    role: Role,
    all: Arc<(Mutex<Plan>, Condvar)>,
}

impl Script {
    pub(crate) fn new(role: Role) -> Self {
        Self {
            role,
            all: Arc::default(),
        }
    }

    pub(crate) fn plan(&self) -> MutexGuard<'_, Plan> {
        self.all.0.lock().unwrap()
    }

    pub(crate) fn wait(&self, what: &str, is: impl Fn(&Plan) -> bool) {
        let (plan, timeout) = self
            .all
            .1
            .wait_timeout_while(self.plan(), PATIENCE, |plan| !is(plan))
            .unwrap();
        assert!(!timeout.timed_out(), "never saw {what}: {:?}", plan.seen);
    }

    pub(crate) fn wait_for(&self, seen: &Seen) {
        self.wait(&format!("{seen:?}"), |plan| plan.seen.contains(seen));
    }
}

impl Machine for Script {
    fn channels(&self) -> Vec<Channel> {
        vec![Channel::Control, Channel::Net, Channel::Ram(0)]
    }

    fn handle_input(&mut self, _now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        let mut plan = self.plan();
        plan.inputs += 1;
        let seen = match input {
            Input::Timeout if plan.due.is_some() => {
                // The first comes at the start of the loop, whatever is due.
                if !std::mem::replace(&mut plan.began, true) {
                    return Ok(());
                }
                plan.due = None;
                Seen::Timeout
            }
            Input::Up(channel) => Seen::Up(channel),
            Input::Down(channel) => {
                if plan.redial {
                    plan.outputs.push_back(Output::Dial(channel));
                }
                Seen::Down(channel)
            }
            Input::Bytes(channel, bytes) => Seen::Bytes(channel, bytes.to_vec()),
            Input::Frame(channel, frame) => Seen::Frame(channel, frame.to_vec()),
            Input::Placed(channel, len) => Seen::Placed(channel, len.get()),
            Input::Datagram(_, bytes) => Seen::Datagram(bytes.to_vec()),
            Input::Command(id, _) => {
                plan.outputs.push_back(Output::Answer(id, Answer::Done));
                Seen::Command
            }
            Input::Guest(done) => Seen::Guest(done),
            Input::Dirty(_, words) => {
                Seen::Dirty(words.iter().map(|w| u64::from(w.count_ones())).sum())
            }
            Input::FromGuest { epoch, frame } => Seen::FromGuest(epoch, frame.to_vec()),
            Input::Persisted(id) => Seen::Persisted(id.0),
            Input::Arbiter(request, verdict) => Seen::Arbiter(request, verdict),
            Input::Fenced(done) => Seen::Fenced(done),
            Input::Sent(channel, bytes) => {
                *plan.sent.entry(channel).or_default() += bytes.get() as u64;
                self.all.1.notify_all();
                return Ok(());
            }
            _ => return Ok(()),
        };
        let flooded = plan.soak.is_some()
            && matches!(
                seen,
                Seen::Placed(Channel::Ram(_), _) | Seen::Bytes(Channel::Ram(_), _)
            );
        if !flooded {
            plan.seen.push(seen);
        }
        self.all.1.notify_all();
        if plan.misuse {
            return Err(Misuse::UnknownChannel(Channel::Control));
        }
        Ok(())
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.plan().outputs.pop_front()
    }

    fn poll_transmit(&mut self, channel: Channel, _budget: usize) -> Option<Transmit> {
        let mut plan = self.plan();
        if channel == Channel::Ram(0)
            && let Some(flood) = &plan.flood
        {
            return Some(flood.clone());
        }
        plan.transmits.get_mut(&channel)?.pop_front()
    }

    fn poll_demand(&mut self, channel: Channel) -> Demand {
        let mut plan = self.plan();
        if channel == Channel::Ram(0)
            && let Some(soak) = &plan.soak
        {
            return soak.clone();
        }
        // The loop asks once for each demand, so it may be taken off at once.
        plan.demands
            .get_mut(&channel)
            .and_then(VecDeque::pop_front)
            .unwrap_or(Demand::Pause)
    }

    fn poll_timeout(&self) -> Option<Deadline> {
        let at = self.plan().due?;
        Some(Deadline {
            at,
            why: TimerKind::Handshake,
        })
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }

    fn status(&self) -> Status {
        Status {
            role: self.role,
            unprotected: None,
            protected: false,
            colo_mode: ColoMode::None,
            last_mode: ColoMode::None,
            reason: ExitReason::None,
            failover: FailoverStatus::None,
            mode: Mode::Standby,
            phase: "scripted",
            epoch: Epoch(0),
            generation: Generation(0),
            member: MemberState::Idle,
            checkpoint_delay: Duration::ZERO,
            stopped: false,
            replica_valid: false,
        }
    }
}

/// One driver on its thread.
pub(crate) struct Host {
    pub(crate) script: Script,
    pub(crate) guest: FakeHandle,
    pub(crate) control: ControlHandle,
    pub(crate) at: Option<Endpoint>,
    pub(crate) paths: Vec<Endpoint>,
    thread: Option<std::thread::JoinHandle<Result<FakeGuest, DriverError>>>,
}

pub(crate) const PAGES: usize = 256;

pub(crate) fn config(boot: u64) -> DriverConfig {
    let mut config = DriverConfig::new(Identity {
        vm: VmId([7; 16]),
        boot: BootId(boot),
        key: MacKey([3; 16]),
    });
    config.priority = Priority::Normal;
    config
}

/// A config that listens on a port the system picks.
pub(crate) fn listening(boot: u64) -> DriverConfig {
    let mut config = config(boot);
    config.listen = Some("127.0.0.1:0".parse().unwrap());
    config
}

pub(crate) fn dialling(boot: u64, peer: &Host) -> DriverConfig {
    let mut config = config(boot);
    config.peer = peer.at.clone();
    config
}

pub(crate) fn path_to(peer: &Endpoint) -> PathConfig {
    PathConfig {
        local: "127.0.0.1:0".parse().unwrap(),
        peer: peer.clone(),
    }
}

impl Host {
    pub(crate) fn start(role: Role, config: DriverConfig) -> Self {
        Self::start_with(role, config, |_| {})
    }

    pub(crate) fn start_with(
        role: Role,
        config: DriverConfig,
        prepare: impl FnOnce(&mut Plan),
    ) -> Self {
        let arbiter = Box::new(NoArbiter::new());
        Self::start_on(role, config, arbiter, RecordStore::in_memory(), prepare)
    }

    pub(crate) fn start_on(
        role: Role,
        config: DriverConfig,
        arbiter: Box<dyn Arbiter>,
        record: RecordStore,
        prepare: impl FnOnce(&mut Plan),
    ) -> Self {
        let script = Script::new(role);
        prepare(&mut script.plan());
        Self::start_after(script, config, arbiter, record, |_| {})
    }

    /// Starts the loop after `first` was done with the addresses of its heartbeat paths.
    pub(crate) fn start_after(
        script: Script,
        config: DriverConfig,
        arbiter: Box<dyn Arbiter>,
        record: RecordStore,
        first: impl FnOnce(&[Option<Endpoint>]),
    ) -> Self {
        let (guest, handle) = FakeGuest::new(PAGES);
        let driver = Driver::new(config, script.clone(), guest, arbiter, record).unwrap();
        first(&driver.local_paths());
        Self {
            script,
            guest: handle,
            control: driver.control(),
            at: driver.local(),
            paths: driver.local_paths().into_iter().flatten().collect(),
            thread: Some(std::thread::spawn(move || driver.run())),
        }
    }

    /// Changes the plan and makes the loop look at it.
    pub(crate) fn tell(&self, change: impl FnOnce(&mut Plan)) {
        change(&mut self.script.plan());
        // An input makes the loop drain outputs; it also leads to a pass over the channels.
        let answered = self
            .control
            .command(colo_proto::command::Command::CheckpointNow, PATIENCE);
        assert_eq!(answered.unwrap(), Answer::Done);
    }

    pub(crate) fn stop(mut self) -> Result<FakeGuest, DriverError> {
        self.control.stop();
        self.thread.take().unwrap().join().unwrap()
    }

    pub(crate) fn ended(mut self) -> Result<FakeGuest, DriverError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.control.stop();
        if let Some(thread) = self.thread.take()
            && let Err(failed) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(failed);
        }
    }
}

/// Two hosts with `channels` up between them.
pub(crate) fn pair(
    primary: DriverConfig,
    secondary: impl FnOnce(&Host) -> DriverConfig,
    channels: &[Channel],
) -> (Host, Host) {
    let primary = Host::start(Role::Primary, primary);
    let config = secondary(&primary);
    let secondary = Host::start_with(Role::Secondary, config, |plan| {
        plan.outputs
            .extend(channels.iter().copied().map(Output::Dial));
    });
    for &channel in channels {
        primary.script.wait_for(&Seen::Up(channel));
        secondary.script.wait_for(&Seen::Up(channel));
    }
    (primary, secondary)
}

pub(crate) fn message(bytes: &[u8]) -> Transmit {
    Transmit {
        head: bytes::Bytes::copy_from_slice(bytes),
        body: Body::Empty,
    }
}

pub(crate) fn small(len: usize) -> Demand {
    Demand::Read {
        place: None,
        then: len,
    }
}

/// The next report that `is` says yes to.
pub(crate) fn report(
    reports: &std::sync::mpsc::Receiver<Report>,
    is: impl Fn(&What) -> bool,
) -> What {
    loop {
        let report = reports.recv_timeout(PATIENCE).expect("no such report");
        if is(&report.what) {
            return report.what;
        }
    }
}
