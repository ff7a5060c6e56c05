//! The reset command, remembered in a flag whose owner is told.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::{I8042Device, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::device::codec::{Decoder, Encoder};
use crate::device::{BusDevice, LoadError, Persist};

const VERSION: u16 = 1;

/// "The guest asked for a reset"; clones share the flag.
///
/// Guest state: it is saved and loaded with the controller, and stays up until somebody [takes](Self::take) it.
#[derive(Debug, Clone)]
pub struct ResetLine(Arc<Line>);

#[derive(Debug)]
struct Line {
    up: AtomicBool,
    owner: EventFd,
}

impl ResetLine {
    /// Whether the guest asked and nobody answered yet.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.0.up.load(Ordering::Acquire)
    }

    /// As [`is_up`](Self::is_up), and takes the line down.
    #[must_use]
    pub fn take(&self) -> bool {
        self.0.up.swap(false, Ordering::AcqRel)
    }

    fn set(&self, up: bool) {
        self.0.up.store(up, Ordering::Release);
    }

    fn tell(&self) {
        // Fails only when the counter is full: then the owner has been told.
        let _full = self.0.owner.write(1);
    }
}

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.set(true);
        self.tell();
        Ok(())
    }
}

/// The controller. Put it on the port bus at [`BASE`](Self::BASE) with [`LEN`](Self::LEN) addresses.
#[derive(Debug)]
pub struct I8042 {
    section: String,
    controller: I8042Device<ResetLine>,
}

impl I8042 {
    /// Its place on a PC.
    pub const BASE: u64 = 0x60;
    /// Ports it takes; the last is the command port.
    pub const LEN: u64 = 5;
    /// The command port.
    pub const COMMAND: u16 = 0x64;
    /// The command that resets the machine.
    pub const RESET: u8 = 0xfe;

    /// A controller whose reset line is down. `section` names its state (`"i8042"`). `owner` becomes readable when
    /// the line goes up: a clone of [`Vm::event_fd`](crate::vm::Vm::event_fd) does.
    #[must_use]
    pub fn new(section: &str, owner: EventFd) -> Self {
        let line = ResetLine(Arc::new(Line {
            up: AtomicBool::new(false),
            owner,
        }));
        Self {
            section: section.into(),
            controller: I8042Device::new(line),
        }
    }

    /// The reset line.
    #[must_use]
    pub fn reset_line(&self) -> &ResetLine {
        self.controller.reset_evt()
    }

    fn decode(&self, version: u16, bytes: &[u8]) -> Result<bool, LoadError> {
        let mut decoder = Decoder::open(&self.section, VERSION, version, bytes)?;
        let up = decoder.bool("reset asked")?;
        decoder.end()?;
        Ok(up)
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.controller.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            let Ok(()) = self.controller.write(offset, *byte);
        }
    }
}

/// No interrupt, no guest memory: nothing to stop.
impl Persist for I8042 {
    fn section(&self) -> &str {
        &self.section
    }

    fn version(&self) -> u16 {
        VERSION
    }

    fn quiesce(&mut self) {}

    fn save(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(&self.section, VERSION, out);
        encoder.bool(self.reset_line().is_up());
        encoder.seal();
    }

    fn check(&self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        self.decode(version, bytes).map(drop)
    }

    fn load(&mut self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        let up = self.decode(version, bytes)?;
        self.reset_line().set(up);
        Ok(())
    }

    /// The guest that runs from here on has asked already.
    fn resume(&mut self) {
        if self.reset_line().is_up() {
            self.reset_line().tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_utils::{assert_refuses_damage, saved};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn controller() -> (I8042, EventFd) {
        let owner = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = I8042::new("i8042", owner.try_clone().unwrap());
        (device, owner)
    }

    #[test]
    fn only_the_reset_command_on_the_command_port_asks_for_a_reset() {
        let (mut device, owner) = controller();
        let line = device.reset_line().clone();
        for (offset, data) in [
            (0, &[0xfe][..]),
            (4, &[0xff]),
            (4, &[0xfe, 0]),
            (260, &[0xfe]),
        ] {
            device.write(offset, data);
            assert!(!line.is_up(), "{offset} {data:?}");
        }
        assert!(owner.read().is_err());
        device.write(4, &[0xfe]);
        assert!(owner.read().is_ok(), "the owner is told");
        assert!(line.take());
        assert!(!line.take());
    }

    #[test]
    fn the_guest_may_wait_for_an_empty_input_buffer() {
        let mut status = [0xff];
        controller().0.read(4, &mut status);
        assert_eq!(status, [0]);
    }

    #[test]
    fn a_reset_in_the_checkpoint_is_asked_again_on_the_other_side() {
        let (mut device, _) = controller();
        device.write(4, &[0xfe]);
        let bytes = saved(&device);
        let (mut other, owner) = controller();
        assert_refuses_damage(&mut other, &bytes);
        other.load(1, &bytes).unwrap();
        assert!(owner.read().is_err(), "not before the guest runs");
        other.resume();
        assert!(owner.read().is_ok());
        assert!(other.reset_line().take());
        other.load(1, &saved(&controller().0)).unwrap();
        assert!(!other.reset_line().is_up());
    }
}
