//! The section of a serial port: ten registers and the receive FIFO.

use vm_superio::SerialState;

use super::Serial;
use crate::device::codec::{Decoder, Encoder};
use crate::device::{LoadError, Persist};

const VERSION: u16 = 1;
/// vm-superio's receive FIFO.
const FIFO: usize = 64;

impl Persist for Serial {
    fn section(&self) -> &str {
        &self.section
    }

    fn version(&self) -> u16 {
        VERSION
    }

    fn quiesce(&mut self) {
        self.quiesced = true;
        self.irq().hold();
    }

    fn save(&self, out: &mut Vec<u8>) {
        let state = self.uart.state();
        let mut encoder = Encoder::new(&self.section, VERSION, out);
        encoder.u8(state.baud_divisor_low);
        encoder.u8(state.baud_divisor_high);
        encoder.u8(state.interrupt_enable);
        encoder.u8(state.interrupt_identification);
        encoder.u8(state.line_control);
        encoder.u8(state.line_status);
        encoder.u8(state.modem_control);
        encoder.u8(state.modem_status);
        encoder.u8(state.scratch);
        // At most FIFO bytes, so it fits.
        encoder.u8(state.in_buffer.len() as u8);
        encoder.raw(&state.in_buffer);
        encoder.seal();
    }

    fn check(&self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        decode(&self.section, version, bytes).map(drop)
    }

    fn load(&mut self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        let state = decode(&self.section, version, bytes)?;
        self.set_state(&state);
        Ok(())
    }

    fn resume(&mut self) {
        if !self.quiesced {
            return;
        }
        self.quiesced = false;
        self.irq().release();
        self.reassert();
        self.refill();
    }
}

impl Serial {
    fn set_state(&mut self, state: &SerialState) {
        let uart = vm_superio::Serial::from_state(
            state,
            self.irq().clone(),
            self.uart.events().clone(),
            self.sink().clone(),
        );
        // It refuses only a longer FIFO, which `decode` has refused, and an interrupt that cannot be raised.
        if let Ok(uart) = uart {
            self.uart = uart;
        }
        self.irq().forget();
    }
}

fn decode(section: &str, version: u16, bytes: &[u8]) -> Result<SerialState, LoadError> {
    let mut decoder = Decoder::open(section, VERSION, version, bytes)?;
    let mut state = SerialState {
        baud_divisor_low: decoder.u8("baud divisor low")?,
        baud_divisor_high: decoder.u8("baud divisor high")?,
        interrupt_enable: decoder.u8("interrupt enable")?,
        interrupt_identification: decoder.u8("interrupt identification")?,
        line_control: decoder.u8("line control")?,
        line_status: decoder.u8("line status")?,
        modem_control: decoder.u8("modem control")?,
        modem_status: decoder.u8("modem status")?,
        scratch: decoder.u8("scratch")?,
        in_buffer: Vec::new(),
    };
    let len = usize::from(decoder.u8("fifo length")?);
    if len > FIFO {
        return Err(decoder.invalid("fifo length", len as u64, "at most 64"));
    }
    state.in_buffer = decoder.raw("fifo", len)?.into();
    decoder.end()?;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::super::test_utils::{DATA, IER, Port};
    use super::*;
    use crate::device::test_utils::{assert_refuses_damage, saved};

    fn used() -> Port {
        let mut port = Port::new();
        port.write(IER, 3);
        port.serial.input(b"typed");
        port.write(7, 0x5a);
        port
    }

    #[test]
    fn a_port_comes_back_as_it_was() {
        let mut port = used();
        port.serial.quiesce();
        let bytes = saved(&port.serial);
        let mut other = Port::new();
        other.serial.quiesce();
        other.serial.load(1, &bytes).unwrap();
        assert_eq!(saved(&other.serial), bytes);
        other.serial.resume();
        assert_eq!(other.read(7), 0x5a);
        let typed: Vec<u8> = (0..5).map(|_| other.read(DATA)).collect();
        assert_eq!(typed, b"typed");
    }

    #[test]
    fn an_interrupt_nobody_answered_is_raised_on_resume_and_not_before() {
        let mut port = used();
        assert!(port.interrupted());
        port.serial.quiesce();
        let bytes = saved(&port.serial);
        let mut other = Port::new();
        other.serial.quiesce();
        other.serial.load(1, &bytes).unwrap();
        assert!(!other.interrupted());
        other.serial.resume();
        assert!(other.interrupted());
    }

    #[test]
    fn input_while_quiesced_waits_for_resume() {
        let mut port = Port::new();
        port.write(IER, 1);
        port.serial.quiesce();
        let before = saved(&port.serial);
        port.serial.input(b"k");
        assert_eq!(saved(&port.serial), before);
        assert!(!port.interrupted());
        port.serial.resume();
        assert!(port.interrupted());
        assert_eq!(port.read(DATA), b'k');
    }

    #[test]
    fn damage_is_refused_and_changes_nothing() {
        let mut port = used();
        port.serial.quiesce();
        let bytes = saved(&port.serial);
        assert_refuses_damage(&mut Port::new().serial, &bytes);
    }

    #[test]
    fn a_fifo_longer_than_the_hardware_is_refused() {
        let mut bytes = vec![];
        let mut encoder = Encoder::new("serial0", 1, &mut bytes);
        encoder.raw(&[0; 9]);
        encoder.u8(65);
        encoder.raw(&[0; 65]);
        encoder.seal();
        let error = Port::new().serial.load(1, &bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            "section serial0: fifo length is 0x41, expected at most 64"
        );
    }
}
