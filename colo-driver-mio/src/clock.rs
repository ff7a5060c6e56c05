//! The clock and the one timer.
//!
//! `CLOCK_BOOTTIME` never goes back and counts through suspend, which leases need (spec ownership
//! A2). The timer is a timerfd on the same clock: mio's own timeout is rounded up to a whole
//! millisecond, and a lease that ends during a suspend must fire when the host wakes.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use colo_proto::time::Instant;
use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// Nanoseconds since the host started, suspend included.
#[must_use]
pub fn now() -> Instant {
    let t = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(t.tv_nsec).unwrap_or(0);
    Instant::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

/// A timer that makes the loop's poll return.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: OwnedFd,
    armed: Option<Instant>,
}

impl Timer {
    pub(crate) fn new(registry: &Registry, token: Token) -> io::Result<Self> {
        let fd = timerfd_create(
            TimerfdClockId::Boottime,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        registry.register(&mut SourceFd(&fd.as_raw_fd()), token, Interest::READABLE)?;
        Ok(Self { fd, armed: None })
    }

    /// Fires at `at`, once; at once if that has passed. `None` disarms. Costs nothing when
    /// nothing changes.
    pub(crate) fn arm(&mut self, at: Option<Instant>) -> io::Result<()> {
        if self.armed == at {
            return Ok(());
        }
        // Zero would disarm: the earliest deadline is the first nanosecond.
        let nanos = at.map_or(0, |at| at.as_nanos().max(1));
        let value = Timespec {
            tv_sec: i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(nanos % 1_000_000_000).unwrap_or(0),
        };
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: value,
        };
        timerfd_settime(&self.fd, TimerfdTimerFlags::ABSTIME, &once)?;
        self.armed = at;
        Ok(())
    }

    /// To be called when the timer's token was ready: the next [`arm`](Self::arm) arms anew.
    pub(crate) fn fired(&mut self) {
        self.armed = None;
        // Re-arming resets the count of expirations, so nothing has to be read.
    }
}

#[cfg(test)]
mod tests {
    use core::time::Duration;

    use mio::{Events, Poll};

    use super::*;

    #[test]
    fn a_deadline_wakes_the_poll_and_not_before() {
        let mut poll = Poll::new().unwrap();
        let mut timer = Timer::new(poll.registry(), Token(0)).unwrap();
        let mut events = Events::with_capacity(4);
        for _ in 0..3 {
            let at = now() + Duration::from_millis(2);
            timer.arm(Some(at)).unwrap();
            poll.poll(&mut events, None).unwrap();
            assert!(now() >= at);
            timer.fired();
        }
        timer.arm(Some(Instant::ZERO)).unwrap();
        poll.poll(&mut events, None).unwrap();
        assert!(!events.is_empty(), "a deadline in the past fires at once");
    }
}
