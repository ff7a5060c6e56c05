//! The port: eight registers for the guest, a line of input for the host.

use std::collections::VecDeque;

use super::metrics::{Events, SerialMetrics};
use crate::device::{BusDevice, Irq, Sink};

/// Input kept for a guest that does not read, beyond its 64-byte FIFO.
const MOST_WAITING: usize = 4096;

/// Interrupt-enable bits: received data, transmitter empty.
const IER_RECEIVED: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
/// Interrupt-identification bits of vm-superio: transmitter empty, received data.
const IIR_EMPTY: u8 = 1 << 1;
const IIR_RECEIVED: u8 = 1 << 2;

/// A 16550 serial port. Put it on the port bus with [`LEN`](Self::LEN) addresses (COM1 is at 0x3f8, interrupt 4).
#[derive(Debug)]
pub struct Serial {
    pub(super) section: String,
    pub(super) uart: vm_superio::Serial<Irq, Events, Sink>,
    pub(super) quiesced: bool,
    waiting: VecDeque<u8>,
    dropped: u64,
}

impl Serial {
    /// Ports the device takes.
    pub const LEN: u64 = 8;

    /// A port after reset. `section` names its state (`"serial0"`).
    #[must_use]
    pub fn new(section: &str, irq: Irq, sink: Sink) -> Self {
        Self {
            section: section.into(),
            uart: vm_superio::Serial::with_events(irq, Events::default(), sink),
            quiesced: false,
            waiting: VecDeque::new(),
            dropped: 0,
        }
    }

    /// Types `bytes` at the console. Returns how many were taken; the rest is dropped, since a guest that leaves
    /// 4 KiB unread is not listening.
    ///
    /// What waits outside the FIFO is this host's and not in the checkpoint.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(MOST_WAITING - self.waiting.len());
        let (head, rest) = bytes.split_at(taken);
        self.waiting.extend(head);
        self.dropped += u64::try_from(rest.len()).unwrap_or(u64::MAX);
        self.refill();
        taken
    }

    /// Where output goes; mute it here.
    #[must_use]
    pub fn sink(&self) -> &Sink {
        self.uart.writer()
    }

    /// The interrupt line, to register as an irqfd.
    #[must_use]
    pub fn irq(&self) -> &Irq {
        self.uart.interrupt_evt()
    }

    /// Counters.
    #[must_use]
    pub fn metrics(&self) -> SerialMetrics {
        self.uart.events().read(self.dropped)
    }

    /// Moves waiting input into the FIFO as far as there is room.
    pub(super) fn refill(&mut self) {
        let room = self.uart.fifo_capacity();
        if self.quiesced || room == 0 || self.waiting.is_empty() {
            return;
        }
        let (front, _) = self.waiting.as_slices();
        let front = front.get(..room.min(front.len())).unwrap_or(front);
        // Fails only if the interrupt cannot be raised, and ours always can. In loopback mode it takes nothing.
        if let Ok(taken) = self.uart.enqueue_raw_bytes(front) {
            self.waiting.drain(..taken);
        }
    }

    /// Raises the interrupt again for what is enabled and was not looked at.
    pub(super) fn reassert(&self) {
        let state = self.uart.state();
        let received = state.interrupt_enable & IER_RECEIVED != 0
            && (state.interrupt_identification & IIR_RECEIVED != 0 || !state.in_buffer.is_empty());
        let empty = state.interrupt_enable & IER_EMPTY != 0
            && state.interrupt_identification & IIR_EMPTY != 0;
        if received || empty {
            self.irq().raise();
        }
    }
}

/// Registers are one byte wide; wider accesses are ignored.
impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.uart.read(offset);
            self.refill();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            // A byte the sink refused is counted; the guest cannot be told.
            let _lost = self.uart.write(offset, *byte);
            self.refill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_utils::{DATA, IER, IIR, LSR, MCR, Port};
    use super::*;

    #[test]
    fn the_guest_prints_byte_by_byte() {
        let mut port = Port::new();
        for byte in *b"hello" {
            port.write(DATA, byte);
        }
        assert_eq!(port.printed(), b"hello");
        assert_eq!(port.serial.metrics().out, 5);
    }

    #[test]
    fn a_muted_port_prints_nothing_and_does_not_stall() {
        let mut port = Port::new();
        port.serial.sink().set_muted(true);
        port.write(DATA, b'x');
        assert_eq!(port.printed(), b"");
        assert_eq!(port.read(LSR) & 0x60, 0x60, "ready for the next byte");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let mut port = Port::new();
        port.write(IER, 1);
        let typed: Vec<u8> = (0..200).collect();
        assert_eq!(port.serial.input(&typed), 200);
        assert!(port.interrupted());
        let mut got = vec![];
        while port.read(LSR) & 1 != 0 {
            got.push(port.read(DATA));
        }
        assert_eq!(got, typed);
    }

    #[test]
    fn input_has_a_bound() {
        let mut port = Port::new();
        let taken = port.serial.input(&[b'a'; 10_000]);
        assert_eq!(taken, MOST_WAITING);
        assert_eq!(port.serial.metrics().dropped, 10_000 - 4096);
    }

    #[test]
    fn loopback_takes_no_input_from_outside() {
        let mut port = Port::new();
        port.write(MCR, 0x10);
        port.serial.input(b"x");
        port.write(DATA, b'y');
        assert_eq!(port.read(DATA), b'y');
        assert_eq!(port.printed(), b"");
        port.write(MCR, 0);
        assert_eq!(port.read(DATA), b'x', "it waited");
    }

    #[test]
    fn wide_accesses_are_ignored() {
        let mut port = Port::new();
        let mut data = [0xff; 4];
        port.serial.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        port.serial.write(0, b"ab");
        port.serial.write(u64::MAX, b"a");
        assert_eq!(port.printed(), b"");
    }

    #[test]
    fn enabling_the_interrupt_with_data_there_raises_it() {
        let mut port = Port::new();
        port.serial.input(b"k");
        assert!(!port.interrupted());
        port.write(IER, 1);
        assert!(port.interrupted());
        assert_eq!(port.read(IIR) & 0x0f & IIR_RECEIVED, IIR_RECEIVED);
    }
}
