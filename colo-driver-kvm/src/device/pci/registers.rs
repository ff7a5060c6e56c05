//! The configuration space of one function: 256 bytes, of which the guest may change some bits.

use crate::device::LoadError;
use crate::device::codec::{Decoder, Encoder};

/// Bytes of a configuration space (a conventional function has no more).
pub(crate) const LEN: usize = 256;

pub(crate) const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
pub(crate) const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
/// The line is a note that firmware leaves for itself.
const INTERRUPT_LINE: usize = 0x3c;
/// First byte behind the standard header.
const FIRST_CAPABILITY: usize = 0x40;

/// Command: memory is decoded.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
/// Command bits that a function without I/O ports and without an interrupt pin has: memory, bus master, interrupt
/// disable.
const COMMAND_BITS: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    /// Class, subclass, programming interface.
    pub(crate) class: [u8; 3],
    pub(crate) subsystem: u16,
}

/// Registers with the bits the guest may write.
#[derive(Debug, Clone)]
pub(crate) struct Registers {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Where the next capability goes, and the pointer that is to point at it.
    next: usize,
    link: usize,
}

impl Registers {
    pub(crate) fn new(identity: Identity) -> Self {
        let mut registers = Self {
            bytes: [0; LEN],
            writable: [0; LEN],
            next: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        registers.set(0x00, &identity.vendor.to_le_bytes());
        registers.set(0x02, &identity.device.to_le_bytes());
        let [class, subclass, interface] = identity.class;
        // Revision 1: a modern virtio device (virtio 1.2 section 4.1.2.1).
        registers.set(0x08, &[1, interface, subclass, class]);
        registers.set(0x2c, &identity.vendor.to_le_bytes());
        registers.set(0x2e, &identity.subsystem.to_le_bytes());
        registers.allow(COMMAND, &COMMAND_BITS.to_le_bytes());
        registers.allow(0x0c, &[0xff, 0xff]);
        registers.allow(INTERRUPT_LINE, &[0xff]);
        registers
    }

    /// Sets bytes, whether the guest could or not.
    pub(crate) fn set(&mut self, at: usize, bytes: &[u8]) {
        let to = self.bytes.iter_mut().skip(at);
        to.zip(bytes).for_each(|(to, from)| *to = *from);
    }

    /// Lets the guest write these bits.
    pub(crate) fn allow(&mut self, at: usize, bits: &[u8]) {
        let to = self.writable.iter_mut().skip(at);
        to.zip(bits).for_each(|(to, from)| *to |= *from);
    }

    /// Appends a capability and returns where it is. `body` is what follows id and link.
    pub(crate) fn capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        debug_assert!(at + 2 + body.len() <= LEN, "capabilities fit");
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.set(self.link, &[at as u8]);
        let status = self.half(STATUS) | STATUS_CAPABILITIES;
        self.set(STATUS, &status.to_le_bytes());
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Makes BAR 0 one of memory, `len` bytes (a power of two) at `base`.
    pub(crate) fn memory_bar(&mut self, base: u32, len: u32) {
        self.set(BAR0, &base.to_le_bytes());
        self.allow(BAR0, &(!(len - 1)).to_le_bytes());
    }

    pub(crate) fn half(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn word(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// What lies behind the last register reads as zero.
    pub(crate) fn read(&self, at: usize, data: &mut [u8]) {
        let from = self.bytes.iter().skip(at).chain(std::iter::repeat(&0));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    pub(crate) fn write(&mut self, at: usize, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in registers.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    pub(crate) fn save(&self, encoder: &mut Encoder<'_>) {
        encoder.raw(&self.bytes);
    }

    /// The registers as saved by a function of the same making.
    pub(crate) fn decode(&self, decoder: &mut Decoder<'_>) -> Result<Self, LoadError> {
        let saved = decoder.raw("configuration registers", LEN)?;
        let mut registers = self.clone();
        registers.write(0, saved);
        for (saved, here) in saved.chunks_exact(4).zip(registers.bytes.chunks_exact(4)) {
            let word = |bytes: &[u8]| {
                bytes
                    .iter()
                    .rev()
                    .fold(0, |all, &b| all << 8 | u64::from(b))
            };
            decoder.same(
                "a read-only configuration register",
                word(saved),
                word(here),
            )?;
        }
        Ok(registers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        let mut registers = Registers::new(Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: [2, 0, 0],
            subsystem: 0x1041,
        });
        registers.memory_bar(0xe000_8000, 0x8000);
        registers
    }

    #[test]
    fn only_writable_bits_change() {
        let mut registers = registers();
        registers.write(0, &[0xff; LEN]);
        assert_eq!(registers.word(0), 0x1041_1af4);
        assert_eq!(registers.half(COMMAND), COMMAND_BITS);
        assert_eq!(registers.word(BAR0), 0xffff_8000, "the size of the BAR");
        assert_eq!(registers.word(BAR0 + 4), 0);
        registers.write(LEN - 1, &[1, 2, 3, 4]);
        registers.write(usize::MAX, &[1]);
        assert_eq!(registers.word(LEN), 0);
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut registers = registers();
        let first = registers.capability(9, &[0; 14]);
        let second = registers.capability(0x11, &[0; 10]);
        assert_eq!((first, second), (0x40, 0x50));
        assert_eq!(registers.half(STATUS), STATUS_CAPABILITIES);
        assert_eq!(registers.half(CAPABILITIES) & 0xff, 0x40);
        assert_eq!(registers.half(first), 0x5009);
        assert_eq!(registers.half(second), 0x0011);
    }

    #[test]
    fn another_function_is_refused() {
        let save = |registers: &Registers| {
            let mut out = Vec::new();
            let mut encoder = Encoder::new("pci1", 1, &mut out);
            registers.save(&mut encoder);
            encoder.seal();
            out
        };
        let load = |here: &Registers, bytes: &[u8]| {
            here.decode(&mut Decoder::open("pci1", 1, 1, bytes).unwrap())
        };
        let mut one = registers();
        one.write(BAR0, &0xe100_0000u32.to_le_bytes());
        let two = load(&registers(), &save(&one)).unwrap();
        assert_eq!(two.word(BAR0), 0xe100_0000);
        let mut other = registers();
        other.set(2, &[0x42]);
        let error = load(&other, &save(&one)).unwrap_err().to_string();
        assert_eq!(
            error,
            "section pci1: a read-only configuration register is 0x10411af4 there and 0x10421af4 \
             here; give both the same device options"
        );
    }
}
