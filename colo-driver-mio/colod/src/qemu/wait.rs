//! Waiting for a descriptor, a deadline and Ctrl-C at once.

use std::{
    io::{self, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Instant as StdInstant,
};

use colo_proto::time::Instant;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// Asks a running command to end, from a signal handler or another thread.
#[derive(Debug)]
pub struct Stop {
    asked: UnixStream,
    ask: UnixStream,
}

impl Stop {
    /// Nobody has asked yet.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        let (asked, ask) = UnixStream::pair()?;
        ask.set_nonblocking(true)?;
        Ok(Self { asked, ask })
    }

    /// Asks. Asking twice is the same.
    pub fn ask(&self) {
        // A full pipe means that it was asked long ago.
        let _ = (&self.ask).write(&[1]);
    }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    Ready,
    Deadline,
    Stop,
}

/// The clock of the machines: monotonic, from the command's start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock(StdInstant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(StdInstant::now())
    }

    pub(super) fn now(&self) -> Instant {
        let nanos = self.0.elapsed().as_nanos();
        Instant::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Waits until `fd` can be read (or written), the deadline passes or `stop` is asked. What is
    /// there already wins over a deadline that passed while this side was busy.
    pub(super) fn wait(
        &self,
        fd: BorrowedFd<'_>,
        write: bool,
        deadline: Option<Instant>,
        stop: &Stop,
    ) -> io::Result<Woken> {
        let events = if write { PollFlags::OUT } else { PollFlags::IN };
        let own = PollFd::from_borrowed_fd(fd, events);
        let asked = PollFd::from_borrowed_fd(stop.asked.as_fd(), PollFlags::IN);
        self.poll(&mut [asked, own], deadline)
    }

    /// Waits until one of `fds` can be read, as [`wait`](Self::wait) does.
    pub(super) fn wait_any<'a>(
        &self,
        fds: impl Iterator<Item = BorrowedFd<'a>>,
        deadline: Option<Instant>,
        stop: &'a Stop,
    ) -> io::Result<Woken> {
        let read = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let asked = std::iter::once(stop.asked.as_fd());
        let mut all: Vec<_> = asked.chain(fds).map(read).collect();
        self.poll(&mut all, deadline)
    }

    /// The first of `fds` is the one that asks to stop.
    fn poll(&self, fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<Woken> {
        loop {
            let left = deadline.map(|deadline| deadline.since(self.now()));
            // A timeout too long for the kernel is none.
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(fds, timeout.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            }
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            if ready.next() == Some(true) {
                return Ok(Woken::Stop);
            }
            if ready.any(|ready| ready) {
                return Ok(Woken::Ready);
            }
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Woken::Deadline);
            }
        }
    }

    /// Waits until `until`; whether `stop` was asked before.
    pub(super) fn pause(&self, until: Instant, stop: &Stop) -> io::Result<bool> {
        let woken = self.wait(stop.asked.as_fd(), false, Some(until), stop)?;
        Ok(woken == Woken::Stop)
    }
}
