//! The reset command, remembered in a flag that the VM looks at after every exit.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::{I8042Device, Trigger};

use crate::device::codec::{Decoder, Encoder};
use crate::device::{BusDevice, LoadError, Persist};

const VERSION: u16 = 1;

/// "The guest asked for a reset"; clones share the flag.
///
/// Guest state: it is saved and loaded with the controller, and stays up until somebody [takes](Self::take) it.
#[derive(Debug, Clone, Default)]
pub struct ResetLine(Arc<AtomicBool>);

impl ResetLine {
    /// Whether the guest asked and nobody answered yet.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// As [`is_up`](Self::is_up), and takes the line down.
    #[must_use]
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }

    fn set(&self, up: bool) {
        self.0.store(up, Ordering::Release);
    }
}

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.set(true);
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

    /// A controller whose reset line is down. `section` names its state (`"i8042"`).
    #[must_use]
    pub fn new(section: &str) -> Self {
        Self {
            section: section.into(),
            controller: I8042Device::new(ResetLine::default()),
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

/// No interrupt, no guest memory: nothing to stop or to wake.
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

    fn resume(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_utils::{assert_refuses_damage, saved};

    #[test]
    fn only_the_reset_command_on_the_command_port_asks_for_a_reset() {
        let mut device = I8042::new("i8042");
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
        device.write(4, &[0xfe]);
        assert!(line.take());
        assert!(!line.take());
    }

    #[test]
    fn the_guest_may_wait_for_an_empty_input_buffer() {
        let mut status = [0xff];
        I8042::new("i8042").read(4, &mut status);
        assert_eq!(status, [0]);
    }

    #[test]
    fn a_reset_in_the_checkpoint_is_asked_again_on_the_other_side() {
        let mut device = I8042::new("i8042");
        device.write(4, &[0xfe]);
        let bytes = saved(&device);
        let mut other = I8042::new("i8042");
        assert_refuses_damage(&mut other, &bytes);
        other.load(1, &bytes).unwrap();
        assert!(other.reset_line().take());
        other.load(1, &saved(&I8042::new("i8042"))).unwrap();
        assert!(!other.reset_line().is_up());
    }
}
