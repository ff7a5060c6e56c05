//! An interrupt line: an eventfd that the VM registers as an irqfd.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An edge-triggered interrupt line.
///
/// While held (between quiesce and resume) nothing reaches the irqchip, whose state may be loaded after the device's;
/// what was raised meanwhile is remembered and raised on release.
#[derive(Debug, Clone)]
pub struct Irq(Arc<Line>);

#[derive(Debug)]
struct Line {
    fd: EventFd,
    held: AtomicBool,
    raised: AtomicBool,
}

impl Irq {
    /// A line with a fresh, non-blocking eventfd.
    ///
    /// # Errors
    ///
    /// Out of descriptors.
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Line {
            fd,
            held: AtomicBool::new(false),
            raised: AtomicBool::new(false),
        })))
    }

    /// The eventfd to register as an irqfd.
    #[must_use]
    pub fn fd(&self) -> &EventFd {
        &self.0.fd
    }

    /// Raises the interrupt, or remembers it while held.
    pub fn raise(&self) {
        if self.0.held.load(Ordering::Acquire) {
            self.0.raised.store(true, Ordering::Release);
            return;
        }
        // Fails only when the counter is full: then an interrupt is already on its way.
        let _full = self.0.fd.write(1);
    }

    pub(crate) fn hold(&self) {
        self.0.held.store(true, Ordering::Release);
    }

    /// Forgets what was raised while held: a load replaced the state that raised it.
    pub(crate) fn forget(&self) {
        self.0.raised.store(false, Ordering::Release);
    }

    pub(crate) fn release(&self) {
        self.0.held.store(false, Ordering::Release);
        if self.0.raised.swap(false, Ordering::AcqRel) {
            self.raise();
        }
    }
}

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.raise();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_interrupt_is_raised_on_release_once() {
        let irq = Irq::new().unwrap();
        irq.hold();
        irq.raise();
        irq.raise();
        assert!(irq.fd().read().is_err(), "nothing while held");
        irq.release();
        assert_eq!(irq.fd().read().unwrap(), 1);
        irq.release();
        assert!(irq.fd().read().is_err());
    }

    #[test]
    fn a_forgotten_interrupt_is_not_raised() {
        let irq = Irq::new().unwrap();
        irq.hold();
        irq.raise();
        irq.forget();
        irq.release();
        assert!(irq.fd().read().is_err());
    }
}
