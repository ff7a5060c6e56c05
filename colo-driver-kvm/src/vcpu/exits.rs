//! One entry into the guest and what its exit means.

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::VcpuEvent;
use super::thread::VcpuThread;
use crate::sys::EXIT_DIRTY_RING_FULL;

/// What the run loop does next.
pub(super) enum After {
    /// Enter again.
    Again,
    /// A signal or `immediate_exit` brought it out; no access is in flight.
    Interrupted,
    /// The dirty ring must be emptied first.
    RingFull,
    /// The guest cannot go on.
    Ended(VcpuEvent),
}

/// Enters the guest once and serves the exit.
pub(super) fn step(thread: &VcpuThread, fd: &mut VcpuFd) -> After {
    let vcpu = thread.id;
    let failed = |why: String| After::Ended(VcpuEvent::Failed { vcpu, why });
    match fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            // A string instruction brings several accesses at once, all to the same port.
            for one in data.chunks_mut(thread.vcpu.run.io_size()) {
                thread.ports.read(port.into(), one);
            }
            After::Again
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            for one in data.chunks(thread.vcpu.run.io_size()) {
                thread.ports.write(port.into(), one);
            }
            After::Again
        }
        Ok(VcpuExit::MmioRead(addr, data)) => {
            thread.mmio.read(addr, data);
            After::Again
        }
        Ok(VcpuExit::MmioWrite(addr, data)) => {
            thread.mmio.write(addr, data);
            After::Again
        }
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => After::Again,
        Ok(VcpuExit::Unsupported(EXIT_DIRTY_RING_FULL)) => After::RingFull,
        Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => {
            After::Ended(VcpuEvent::Shutdown { vcpu })
        }
        Ok(VcpuExit::InternalError) => {
            let suberror = thread.vcpu.run.internal_suberror();
            let rip = fd.get_regs().map_or(0, |regs| regs.rip);
            failed(match suberror {
                1 => format!("KVM cannot emulate the instruction at {rip:#x}"),
                other => format!("KVM internal error {other} at {rip:#x}"),
            })
        }
        Ok(other) => failed(format!("unexpected exit {other:?}")),
        Err(error) => match error.errno() {
            libc::EINTR => After::Interrupted,
            libc::EAGAIN => After::Again,
            _ => failed(format!("KVM_RUN: {error}")),
        },
    }
}
