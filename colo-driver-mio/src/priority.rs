//! The priority of the loop's thread: heartbeats must leave and be answered however busy the
//! host's processors are (spec ownership 13.1).

/// How the loop competes for a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Priority {
    /// Before everything that is not real-time (`SCHED_RR`). For hosts with a processor to spare:
    /// a loop that moves bulk data at this priority takes its processor from vCPUs altogether.
    RealTime,
    /// Weighs about nine times as much as a vCPU thread (nice −10), which is enough to be woken
    /// at once.
    #[default]
    High,
    /// As everything else. For tests.
    Normal,
}

/// Raises this thread's priority as far as the system allows, and says so when that is less than
/// asked for.
pub(crate) fn raise(to: Priority) {
    match to {
        Priority::RealTime => {
            if let Err(error) = real_time() {
                tracing::warn!(%error, "no real-time priority (CAP_SYS_NICE); trying nice");
                high();
            }
        }
        Priority::High => high(),
        Priority::Normal => {}
    }
}

fn high() {
    let thread = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(thread), -10) {
        tracing::warn!(
            %error,
            "the loop runs at ordinary priority (CAP_SYS_NICE): under load heartbeats may be late"
        );
    }
}

fn real_time() -> std::io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: plain numbers in, nothing out; 0 is the calling thread.
    let set = unsafe {
        libc::sched_setscheduler(
            0,
            libc::SCHED_RR | libc::SCHED_RESET_ON_FORK,
            &raw const param,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}
