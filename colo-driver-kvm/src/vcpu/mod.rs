//! Virtual processors: a thread each, stopped and started together.
//!
//! ```text
//!   owner of the VM                               each vCPU thread
//!   ───────────────                               ────────────────
//!   want := pause                                 in KVM_RUN, or handling an exit
//!   immediate_exit := 1, signal        ──────▶    KVM_RUN returns EINTR
//!   wait until all are parked                     finishes a pending I/O, releases its descriptor
//!                                      ◀──────    parked += 1
//!   may use every vCPU descriptor                 waits
//!   want := run, wake                  ──────▶    immediate_exit := 0, takes its descriptor
//!   wait until all are running         ◀──────    running += 1, KVM_RUN
//! ```
//!
//! Commands and answers are words in one shared block, not messages in a queue: a stop allocates
//! nothing and costs one wake-up a side.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | `Vcpus`: all of them, pause and resume |
//! | `thread.rs` | the run loop |
//! | `exits.rs` | what an exit means: ports, MMIO, the end |
//! | `state.rs` | save and load, with the reason for each step's place |

mod exits;
pub(crate) mod state;
mod thread;

use std::io;
use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::capture::Rings;
use crate::device::{Bus, PowerLine};
use crate::sys::{self, RunPage};
pub use state::VcpuStateError;
use thread::{Command, Rendezvous, VcpuThread};

/// Something a vCPU did that the VM's owner must act on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuEvent {
    /// The guest shut down or crashed so hard that the processor gave up (triple fault).
    Shutdown {
        /// The vCPU.
        vcpu: usize,
    },
    /// KVM could not go on: an instruction it cannot emulate, or a failed entry.
    Failed {
        /// The vCPU.
        vcpu: usize,
        /// What KVM said.
        why: String,
    },
}

/// A vCPU descriptor. Its thread holds the lock while it runs; while parked anyone may.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: Mutex<VcpuFd>,
    run: RunPage,
}

/// All vCPUs of a VM.
#[derive(Debug)]
pub(crate) struct Vcpus {
    vcpus: Vec<Arc<Vcpu>>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
    running: bool,
    watch: Duration,
}

/// What vCPU threads and the owner share.
#[derive(Debug)]
pub(crate) struct Shared {
    rendezvous: Rendezvous,
    events: Mutex<Vec<VcpuEvent>>,
    event: EventFd,
    rings: Option<Arc<Rings>>,
}

impl Shared {
    fn report(&self, event: VcpuEvent) {
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
        // Fails only when the counter is full: then the owner has been told.
        let _full = self.event.write(1);
    }
}

/// How long a parked vCPU looks out for its resume before it sleeps: a little longer than the stop of a
/// checkpoint. A thread that sleeps must be scheduled again, which takes a few µs on a quiet host and
/// up to a tick (4 ms) on a busy one; one that looks out keeps its processor.
const LOOK_OUT: Duration = Duration::from_micros(300);

/// How long the owner watches for the vCPUs before it sleeps. A kick takes 20 to 100 µs, about
/// what a sleep and a wake-up cost on top.
const WATCH: Duration = Duration::from_micros(200);
/// The same where the owner has no processor of its own: a vCPU may be waiting for this one.
const SHORT_WATCH: Duration = Duration::from_micros(30);

/// Whether so many busy vCPUs leave a processor to their owner.
fn leave_a_processor(vcpus: usize) -> bool {
    vcpus < std::thread::available_parallelism().map_or(1, NonZero::get)
}

impl Vcpus {
    pub(crate) fn new(
        fds: Vec<VcpuFd>,
        run_size: usize,
        rings: Option<Arc<Rings>>,
    ) -> io::Result<Self> {
        sys::install_kick_handler()?;
        let mut vcpus = Vec::new();
        for fd in fds {
            let run = RunPage::new(&fd, run_size)?;
            vcpus.push(Arc::new(Vcpu {
                fd: Mutex::new(fd),
                run,
            }));
        }
        let shared = Arc::new(Shared {
            rendezvous: Rendezvous::default(),
            events: Mutex::new(Vec::new()),
            event: EventFd::new(EFD_NONBLOCK)?,
            rings,
        });
        let watch = if leave_a_processor(vcpus.len()) {
            WATCH
        } else {
            SHORT_WATCH
        };
        Ok(Self {
            vcpus,
            threads: Vec::new(),
            shared,
            running: false,
            watch,
        })
    }

    /// Starts the threads, parked.
    pub(crate) fn spawn(
        &mut self,
        ports: &Arc<Bus>,
        mmio: &Arc<Bus>,
        power: &PowerLine,
    ) -> io::Result<()> {
        // Only where that leaves a processor to the owner, which they wait for.
        let watch = if leave_a_processor(self.vcpus.len()) {
            LOOK_OUT
        } else {
            Duration::ZERO
        };
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            let thread = VcpuThread {
                id,
                vcpu: vcpu.clone(),
                shared: self.shared.clone(),
                ports: ports.clone(),
                mmio: mmio.clone(),
                power: power.clone(),
                watch,
            };
            let handle = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || thread.run())?;
            self.threads.push(handle);
        }
        self.shared
            .rendezvous
            .await_parked(self.threads.len(), self.watch);
        Ok(())
    }

    pub(crate) fn spawned(&self) -> bool {
        !self.threads.is_empty()
    }

    pub(crate) fn running(&self) -> bool {
        self.running
    }

    pub(crate) fn len(&self) -> usize {
        self.vcpus.len()
    }

    /// Stops all vCPUs. When it returns none is in the guest and none has an access in flight.
    pub(crate) fn pause(&mut self) {
        if !self.running {
            return;
        }
        self.command(Command::Pause);
        self.shared
            .rendezvous
            .await_parked(self.threads.len(), self.watch);
        self.running = false;
    }

    /// Tells a guest with kvmclock that it stood still, so that its watchdogs do not bark. Call while paused.
    pub(crate) fn excuse(&self) {
        for id in 0..self.len() {
            if let Some(fd) = self.fd(id) {
                // A guest without kvmclock says EINVAL.
                let _without = fd.kvmclock_ctrl();
            }
        }
    }

    /// Lets all vCPUs run. When it returns each is about to enter the guest.
    pub(crate) fn resume(&mut self) {
        if self.running || self.threads.is_empty() {
            return;
        }
        self.shared.rendezvous.start();
        self.shared
            .rendezvous
            .await_running(self.threads.len(), self.watch);
        self.running = true;
    }

    /// Tells all threads, wherever they are.
    fn command(&self, command: Command) {
        self.shared.rendezvous.command(command);
        for (vcpu, thread) in self.vcpus.iter().zip(&self.threads) {
            vcpu.run.set_immediate_exit(true);
            sys::kick(thread);
        }
    }

    /// Becomes readable when [`take_events`](Self::take_events) has something.
    pub(crate) fn event_fd(&self) -> &EventFd {
        &self.shared.event
    }

    pub(crate) fn take_events(&self) -> Vec<VcpuEvent> {
        let _none = self.shared.event.read();
        std::mem::take(
            &mut *self
                .shared
                .events
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// The descriptor of one vCPU; waits while it runs, so only to be called when parked.
    pub(crate) fn fd(&self, id: usize) -> Option<MutexGuard<'_, VcpuFd>> {
        let vcpu = self.vcpus.get(id)?;
        Some(vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.command(Command::Exit);
        self.shared.rendezvous.wake();
        for thread in self.threads.drain(..) {
            // A panicked vCPU thread has printed its message; there is nothing left to stop.
            let _panicked = thread.join();
        }
    }
}
