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

use mio::{Interest, Poll, Token, Waker, unix::SourceFd};

use super::{http::HttpFault, kernel, stack::Worker};
use colo_driver_mio::frame_socket::FrameSocket;

use crate::config::Mac;

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

    /// Waits for the first answer whose first byte came after `since` (nanoseconds as [`super::now`] counts).
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
