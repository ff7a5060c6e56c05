//! The run loop of one vCPU, and the rendezvous with the VM's owner.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::exits::{self, After};
use super::{Shared, Vcpu, VcpuEvent};
use crate::device::{Bus, PowerLine, PowerRequest};
use crate::sys;

/// What the owner wants of every vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Pause = 0,
    Run = 1,
    Exit = 2,
}

/// Where the owner and the vCPU threads meet.
#[derive(Debug, Default)]
pub(super) struct Rendezvous {
    want: AtomicU32,
    /// The processor from which the owner gave its last command.
    owner_at: AtomicI32,
    parked: AtomicUsize,
    running: AtomicUsize,
    /// Threads whose guest is at its end and that wait for the pause of the others.
    ended: AtomicUsize,
    owner: Mutex<()>,
    owner_wake: Condvar,
    vcpus: Mutex<()>,
    vcpus_wake: Condvar,
}

impl Rendezvous {
    fn want(&self) -> Command {
        match self.want.load(Ordering::SeqCst) {
            0 => Command::Pause,
            1 => Command::Run,
            _ => Command::Exit,
        }
    }

    pub(super) fn command(&self, command: Command) {
        self.owner_at.store(sys::processor(), Ordering::SeqCst);
        self.want.store(command as u32, Ordering::SeqCst);
        if self.ended.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
    }

    /// Wakes parked threads to look at the command.
    pub(super) fn wake(&self) {
        // Taking the lock orders the store before the sleeper's last look.
        drop(self.vcpus.lock());
        self.vcpus_wake.notify_all();
    }

    pub(super) fn start(&self) {
        self.running.store(0, Ordering::SeqCst);
        self.parked.store(0, Ordering::SeqCst);
        self.command(Command::Run);
        self.wake();
    }

    pub(super) fn await_parked(&self, count: usize, watch: Duration) {
        self.await_count(&self.parked, count, watch);
    }

    pub(super) fn await_running(&self, count: usize, watch: Duration) {
        self.await_count(&self.running, count, watch);
    }

    fn await_count(&self, counter: &AtomicUsize, count: usize, watch: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < watch {
            if counter.load(Ordering::SeqCst) >= count {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        while counter.load(Ordering::SeqCst) < count {
            guard = self
                .owner_wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn arrive(&self, counter: &AtomicUsize) {
        counter.fetch_add(1, Ordering::SeqCst);
        drop(self.owner.lock());
        self.owner_wake.notify_all();
    }

    /// Parks until the owner wants something else than a pause. With `watch` it looks out for that
    /// for as long before it sleeps; but not on the owner's processor, where it would only be in the
    /// way (a halted vCPU is often woken there).
    fn park(&self, watch: Duration) -> Command {
        self.arrive(&self.parked);
        let begin = Instant::now();
        let elsewhere = sys::processor() != self.owner_at.load(Ordering::SeqCst);
        while elsewhere && begin.elapsed() < watch {
            let want = self.want();
            if want != Command::Pause {
                return want;
            }
            std::hint::spin_loop();
        }
        self.wait_while(Command::Pause)
    }

    fn wait_while(&self, command: Command) -> Command {
        let mut guard = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let want = self.want();
            if want != command {
                return want;
            }
            guard = self
                .vcpus_wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What one vCPU thread works with.
pub(super) struct VcpuThread {
    pub(super) id: usize,
    pub(super) vcpu: Arc<Vcpu>,
    pub(super) shared: Arc<Shared>,
    pub(super) ports: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    /// Where a triple fault is told: it is state, and may be found by the other host.
    pub(super) power: PowerLine,
    /// How long it looks out for the resume before it sleeps.
    pub(super) watch: Duration,
}

impl VcpuThread {
    pub(super) fn run(self) {
        let meet = &self.shared.rendezvous;
        while meet.park(self.watch) == Command::Run {
            let mut fd = self.vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
            // Before the look at the command: a pause that comes later sets it again.
            self.vcpu.run.set_immediate_exit(false);
            meet.arrive(&meet.running);
            let fatal = self.enter(&mut fd);
            self.drain(&mut fd);
            drop(fd);
            if let Some(event) = fatal {
                tracing::warn!(vcpu = self.id, ?event, "vCPU stopped");
                if matches!(event, VcpuEvent::Shutdown { .. }) {
                    self.power.ask(PowerRequest::Crash);
                }
                self.shared.report(event);
                // It counts as running until the owner pauses the others.
                self.await_pause();
            }
        }
    }

    /// Runs the guest until the owner wants something else or the guest is at its end.
    fn enter(&self, fd: &mut VcpuFd) -> Option<VcpuEvent> {
        while self.shared.rendezvous.want() == Command::Run {
            match exits::step(self, fd) {
                After::Again => {}
                After::Interrupted => self.vcpu.run.set_immediate_exit(false),
                After::RingFull => {
                    if let Some(event) = self.relieve() {
                        return Some(event);
                    }
                }
                After::Ended(event) => return Some(event),
            }
        }
        None
    }

    /// A port or MMIO access is finished by the next `KVM_RUN`: until then the registers are those
    /// before it. Entering with `immediate_exit` finishes it and nothing more.
    fn drain(&self, fd: &mut VcpuFd) {
        self.vcpu.run.set_immediate_exit(true);
        while matches!(exits::step(self, fd), After::Again) {}
    }

    /// Empties this vCPU's full ring.
    fn relieve(&self) -> Option<VcpuEvent> {
        let result = self.shared.rings.as_ref()?.relieve(self.id);
        let error = result.err()?;
        Some(VcpuEvent::Failed {
            vcpu: self.id,
            why: format!("KVM_RESET_DIRTY_RINGS: {error}"),
        })
    }

    fn await_pause(&self) {
        let meet = &self.shared.rendezvous;
        meet.ended.fetch_add(1, Ordering::SeqCst);
        meet.wait_while(Command::Run);
        meet.ended.fetch_sub(1, Ordering::SeqCst);
    }
}
