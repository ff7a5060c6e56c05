//! The power block of ACPI: power-off, the power button, and the events that come with an interrupt.
//!
//! ```text
//!   0x600 PM1 status   u16   bit 8: the power button was pressed (write 1 to clear)
//!   0x602 PM1 enable   u16
//!   0x604 PM1 control  u16   bit 0: ACPI mode, always; bits 10..13: sleep type; bit 13: sleep now
//!   0x606 GPE status   u8    bit 5: the generation id changed (write 1 to clear)
//!   0x607 GPE enable   u8
//! ```
//!
//! There is no timer and no way out of ACPI mode. The interrupt is edge-triggered (the MADT says so).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::codec::{Decoder, Encoder};
use super::{BusDevice, Irq, LoadError, Persist};

const VERSION: u16 = 1;
const SECTION: &str = "power";

/// PM1: the power button.
const BUTTON: u16 = 1 << 8;
/// PM1: what a guest may enable. The global lock (bit 5) and the clock's alarm (bit 10) never fire, but a kernel
/// complains that it cannot enable them.
const ENABLE: u16 = BUTTON | 1 << 5 | 1 << 10;
/// PM1 control: ACPI mode.
const ACPI: u16 = 1 << 0;
const SLEEP: u16 = 1 << 13;
const SLEEP_TYPE: u16 = 10;

/// What the guest asked for, or what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Switch off.
    Off,
    /// A vCPU gave up (triple fault): the guest crashed, or resets itself the hard way.
    Crash,
}

/// "The guest asked"; clones share it.
///
/// Guest state: it is saved and loaded with the power block, and stays until somebody [takes](Self::take) it.
#[derive(Debug, Clone)]
pub struct PowerLine(Arc<Line>);

#[derive(Debug)]
struct Line {
    asked: AtomicU8,
    owner: EventFd,
}

impl PowerLine {
    fn new(owner: EventFd) -> Self {
        Self(Arc::new(Line {
            asked: AtomicU8::new(0),
            owner,
        }))
    }

    /// What was asked and nobody took yet; it is taken.
    #[must_use]
    pub fn take(&self) -> Option<PowerRequest> {
        decoded(self.0.asked.swap(0, Ordering::AcqRel))
    }

    pub(crate) fn ask(&self, request: PowerRequest) {
        self.set(Some(request));
        self.tell();
    }

    fn set(&self, request: Option<PowerRequest>) {
        self.0.asked.store(encoded(request), Ordering::Release);
    }

    fn tell(&self) {
        // Fails only when the counter is full: then the owner has been told.
        let _full = self.0.owner.write(1);
    }
}

const fn encoded(request: Option<PowerRequest>) -> u8 {
    match request {
        None => 0,
        Some(PowerRequest::Off) => 1,
        Some(PowerRequest::Crash) => 2,
    }
}

const fn decoded(code: u8) -> Option<PowerRequest> {
    match code {
        1 => Some(PowerRequest::Off),
        2 => Some(PowerRequest::Crash),
        _ => None,
    }
}

/// The power block.
#[derive(Debug)]
pub struct Power {
    line: PowerLine,
    irq: Irq,
    registers: Registers,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u8,
    gpe_enable: u8,
}

impl Power {
    /// First port.
    pub const BASE: u16 = 0x600;
    /// Ports.
    pub const LEN: u16 = 8;
    /// PM1 status and enable.
    pub const EVENTS: u16 = Self::BASE;
    /// PM1 control.
    pub const CONTROL: u16 = Self::BASE + 4;
    /// General-purpose events: status and enable.
    pub const GPE: u16 = Self::BASE + 6;
    /// Interrupt line.
    pub const LINE: u32 = 9;
    /// The event of a changed generation id.
    pub const GENERATION_EVENT: u8 = 5;
    /// Sleep type of S5.
    pub const OFF: u8 = 5;

    /// A block that nobody has touched. `owner` becomes readable when the guest asks for something.
    #[must_use]
    pub fn new(irq: Irq, owner: EventFd) -> Self {
        Self {
            line: PowerLine::new(owner),
            irq,
            registers: Registers::default(),
        }
    }

    /// What the guest asks for.
    #[must_use]
    pub fn line(&self) -> &PowerLine {
        &self.line
    }

    /// Presses the power button. Whether the guest listens to it.
    pub fn press(&mut self) -> bool {
        self.registers.status |= BUTTON;
        self.interrupt();
        self.registers.enable & BUTTON != 0
    }

    /// Says that the generation id is another one.
    pub(crate) fn generation_changed(&mut self) {
        self.registers.gpe_status |= 1 << Self::GENERATION_EVENT;
        self.interrupt();
    }

    fn interrupt(&self) {
        let Registers {
            status,
            enable,
            gpe_status,
            gpe_enable,
            ..
        } = self.registers;
        if status & enable != 0 || gpe_status & gpe_enable != 0 {
            self.irq.raise();
        }
    }

    fn set(&mut self, offset: u64, byte: u8) {
        let registers = &mut self.registers;
        match offset {
            0 => registers.status &= !u16::from(byte),
            1 => registers.status &= !(u16::from(byte) << 8),
            2 => replace(&mut registers.enable, 0, byte),
            3 => replace(&mut registers.enable, 8, byte),
            4 => replace(&mut registers.control, 0, byte),
            5 => replace(&mut registers.control, 8, byte & !((SLEEP >> 8) as u8)),
            6 => registers.gpe_status &= !byte,
            7 => registers.gpe_enable = byte & 1 << Self::GENERATION_EVENT,
            _ => {}
        }
        registers.enable &= ENABLE;
        let sleep = offset == 5 && u16::from(byte) << 8 & SLEEP != 0;
        if sleep && registers.control >> SLEEP_TYPE & 7 == u16::from(Self::OFF) {
            self.line.ask(PowerRequest::Off);
        }
        if matches!(offset, 2 | 3 | 7) {
            // What was pending when it was enabled.
            self.interrupt();
        }
    }

    fn byte(&self, offset: u64) -> u8 {
        let registers = &self.registers;
        let [s0, s1] = registers.status.to_le_bytes();
        let [e0, e1] = registers.enable.to_le_bytes();
        let [c0, c1] = (registers.control | ACPI).to_le_bytes();
        let all = [
            s0,
            s1,
            e0,
            e1,
            c0,
            c1,
            registers.gpe_status,
            registers.gpe_enable,
        ];
        usize::try_from(offset)
            .ok()
            .and_then(|at| all.get(at).copied())
            .unwrap_or(0)
    }

    fn decode(version: u16, bytes: &[u8]) -> Result<(Registers, Option<PowerRequest>), LoadError> {
        let mut decoder = Decoder::open(SECTION, VERSION, version, bytes)?;
        let registers = Registers {
            status: decoder.u16("PM1 status")?,
            enable: decoder.u16("PM1 enable")?,
            control: decoder.u16("PM1 control")?,
            gpe_status: decoder.u8("GPE status")?,
            gpe_enable: decoder.u8("GPE enable")?,
        };
        let events = 1 << Self::GENERATION_EVENT;
        for (field, value, most) in [
            ("PM1 status", registers.status, BUTTON),
            ("PM1 enable", registers.enable, ENABLE),
            ("GPE status", registers.gpe_status.into(), events),
            ("GPE enable", registers.gpe_enable.into(), events),
        ] {
            if value & !most != 0 {
                return Err(decoder.invalid(field, value.into(), "bits of known events only"));
            }
        }
        let asked = decoder.u8("request")?;
        if asked > 2 {
            return Err(decoder.invalid("request", asked.into(), "0 to 2"));
        }
        decoder.end()?;
        Ok((registers, decoded(asked)))
    }
}

fn replace(word: &mut u16, shift: u32, byte: u8) {
    *word = *word & !(0xff << shift) | u16::from(byte) << shift;
}

/// Accesses of any width, byte by byte.
impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.byte(at);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            self.set(at, *byte);
        }
    }
}

impl Persist for Power {
    fn section(&self) -> &str {
        SECTION
    }

    fn version(&self) -> u16 {
        VERSION
    }

    fn quiesce(&mut self) {
        self.irq.hold();
    }

    fn save(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(SECTION, VERSION, out);
        encoder.u16(self.registers.status);
        encoder.u16(self.registers.enable);
        encoder.u16(self.registers.control);
        encoder.u8(self.registers.gpe_status);
        encoder.u8(self.registers.gpe_enable);
        encoder.u8(self.line.0.asked.load(Ordering::Acquire));
        encoder.seal();
    }

    fn check(&self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        Self::decode(version, bytes).map(drop)
    }

    fn load(&mut self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        let (registers, asked) = Self::decode(version, bytes)?;
        self.registers = registers;
        self.line.set(asked);
        self.irq.forget();
        Ok(())
    }

    /// What was asked or pending is asked and raised again: its interrupt may have been on its way.
    fn resume(&mut self) {
        self.irq.release();
        self.interrupt();
        if self.line.0.asked.load(Ordering::Acquire) != 0 {
            self.line.tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_utils::{assert_refuses_damage, saved};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn power() -> (Power, EventFd) {
        let owner = EventFd::new(EFD_NONBLOCK).unwrap();
        let irq = Irq::new().unwrap();
        (Power::new(irq, owner.try_clone().unwrap()), owner)
    }

    fn read(power: &mut Power, offset: u64) -> u16 {
        let mut word = [0; 2];
        power.read(offset, &mut word);
        u16::from_le_bytes(word)
    }

    fn raised(power: &Power) -> bool {
        power.irq.fd().read().is_ok()
    }

    #[test]
    fn only_the_sleep_type_of_s5_switches_off() {
        let (mut power, owner) = power();
        for word in [0x1400u16, 0x3000, 0x2000] {
            power.write(4, &word.to_le_bytes());
            assert_eq!(power.line().take(), None, "{word:#x}");
        }
        assert!(owner.read().is_err());
        power.write(4, &0x3401u16.to_le_bytes());
        assert!(owner.read().is_ok(), "the owner is told");
        assert_eq!(power.line().take(), Some(PowerRequest::Off));
        assert_eq!(power.line().take(), None);
        assert_eq!(read(&mut power, 4), 0x1401, "the sleep bit reads as zero");
    }

    #[test]
    fn the_button_interrupts_a_guest_that_listens_until_it_is_acknowledged() {
        let (mut power, _) = power();
        assert!(!power.press(), "nobody listens");
        assert!(!raised(&power));
        power.write(2, &0x100u16.to_le_bytes());
        assert!(raised(&power), "pressed before it was enabled");
        assert_eq!(read(&mut power, 0), 0x100);
        power.write(0, &0x100u16.to_le_bytes());
        assert_eq!(read(&mut power, 0), 0);
        assert!(power.press());
        assert!(raised(&power));
        // What Linux enables at its start, and reads back.
        power.write(2, &0x0520u16.to_le_bytes());
        assert_eq!(read(&mut power, 2), 0x520);
    }

    #[test]
    fn a_pressed_button_and_a_request_are_in_the_checkpoint() {
        let (mut power, _) = power();
        power.write(2, &0x120u16.to_le_bytes());
        power.write(4, &0x3400u16.to_le_bytes());
        power.press();
        let bytes = saved(&power);
        let (mut other, owner) = self::power();
        other.quiesce();
        assert_refuses_damage(&mut other, &bytes);
        other.load(1, &bytes).unwrap();
        assert!(
            owner.read().is_err() && !raised(&other),
            "not before it runs"
        );
        other.resume();
        assert!(raised(&other));
        assert!(owner.read().is_ok());
        assert_eq!(other.line().take(), Some(PowerRequest::Off));
    }

    #[test]
    fn a_reset_forgets_what_the_guest_set() {
        let (mut power, _) = power();
        power.write(0, &[0, 0, 0x20, 1, 0, 0x34]);
        power.press();
        power.reset(&saved(&self::power().0));
        assert_eq!(saved(&power), saved(&self::power().0));
    }

    #[test]
    fn a_changed_generation_is_an_event_of_its_own() {
        let (mut power, _) = power();
        power.write(7, &[0xff]);
        power.generation_changed();
        assert!(raised(&power));
        assert_eq!(read(&mut power, 6), 0x2020);
        power.write(6, &[0x20]);
        assert_eq!(read(&mut power, 6), 0x2000);
    }
}
