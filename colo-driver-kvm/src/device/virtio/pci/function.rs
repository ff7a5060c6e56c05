//! A virtio device as a PCI function.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET};

use super::super::{Backend, Interrupts, Virtio};
use super::common::{self, COMMON, COMMON_LEN, DEVICE, DEVICE_LEN, ISR, NOTIFY, NOTIFY_LEN};
use crate::device::codec::{Decoder, Encoder};
use crate::device::pci::registers::{BAR0, COMMAND, COMMAND_MEMORY, Identity, Registers};
use crate::device::pci::{CONTROL_BITS, ENTRY, Function, MOST_VECTORS, Msix};
use crate::device::{BusDevice, LoadError, Persist};

const VERSION: u16 = 1;
const VENDOR: u16 = 0x1af4;
/// Device numbers of modern devices begin here.
const DEVICE_BASE: u32 = 0x1040;

const TABLE: u64 = 0x4000;
const TABLE_LEN: u64 = MOST_VECTORS as u64 * ENTRY;
const PENDING: u64 = 0x5000;
const PENDING_LEN: u64 = 8;
const BAR_LEN: u64 = 0x8000;

// Capabilities: vendor specific and MSI-X; kinds of the former (virtio 1.2 section 4.1.4).
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// Fields of the capability that is a window into the BAR, from its start.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LEN: usize = 12;
const WINDOW_DATA: usize = 16;

/// The PCI transport in front of a [`Virtio`] that was made with an [`Msix`].
///
/// Its section holds configuration registers and messages; the device has one of its own.
#[derive(Debug)]
pub struct VirtioPci<D> {
    section: String,
    device: Arc<Mutex<Virtio<D>>>,
    messages: Msix,
    registers: Registers,
    /// Where the capability for messages is.
    control: usize,
    /// Where the window into the BAR is.
    window: usize,
}

impl<D: Backend> VirtioPci<D> {
    /// Where in the BAR a notification is written, for an ioeventfd (any value).
    pub const NOTIFY: u64 = NOTIFY;

    /// A function for `device`; `section` names its own state (`"pci1"`). `None` if the device was made with an
    /// interrupt line, which a function here does not have.
    #[must_use]
    pub fn new(section: &str, device: Arc<Mutex<Virtio<D>>>) -> Option<Self> {
        let messages = match lock(&device).interrupts() {
            Interrupts::Messages(messages) => messages.clone(),
            Interrupts::Line(_) => return None,
        };
        let number = (DEVICE_BASE + D::ID) as u16;
        let class = match D::ID {
            VIRTIO_ID_NET => [0x02, 0x00, 0],
            VIRTIO_ID_BLOCK => [0x01, 0x80, 0],
            VIRTIO_ID_CONSOLE => [0x07, 0x80, 0],
            _ => [0xff, 0x00, 0],
        };
        let mut registers = Registers::new(Identity {
            vendor: VENDOR,
            device: number,
            class,
            subsystem: number,
        });
        registers.memory_bar(0, BAR_LEN as u32);
        for (kind, offset, len) in [
            (CFG_COMMON, COMMON, COMMON_LEN),
            (CFG_ISR, ISR, 1),
            (CFG_DEVICE, DEVICE, DEVICE_LEN),
        ] {
            registers.capability(CAP_VENDOR, &capability(kind, offset, len, &[]));
        }
        // The multiplier is 0: there is one place for all rings.
        registers.capability(
            CAP_VENDOR,
            &capability(CFG_NOTIFY, NOTIFY, NOTIFY_LEN, &[0; 4]),
        );
        let window = registers.capability(CAP_VENDOR, &capability(CFG_PCI, 0, 0, &[0; 4]));
        registers.allow(window + WINDOW_BAR, &[0xff]);
        registers.allow(window + WINDOW_OFFSET, &[0xff; 8]);
        let last = (messages.vectors().max(1) - 1) as u16;
        let mut body = last.to_le_bytes().to_vec();
        body.extend((TABLE as u32).to_le_bytes());
        body.extend((PENDING as u32).to_le_bytes());
        let control = registers.capability(CAP_MSIX, &body) + 2;
        registers.allow(control, &CONTROL_BITS.to_le_bytes());
        Some(Self {
            section: section.into(),
            device,
            messages,
            registers,
            control,
            window,
        })
    }

    /// What the window shows: where in the BAR, and how many bytes.
    fn through_window(&self) -> Option<(u64, usize)> {
        let offset = self.registers.word(self.window + WINDOW_OFFSET);
        let len = self.registers.word(self.window + WINDOW_LEN);
        let bar = self.registers.word(self.window + WINDOW_BAR) & 0xff;
        let fits = matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len)
            && u64::from(offset) + u64::from(len) <= BAR_LEN;
        (bar == 0 && fits).then_some((offset.into(), len as usize))
    }

    fn is_window(&self, at: usize) -> bool {
        at == self.window + WINDOW_DATA
    }
}

/// Body of a capability that says where in BAR 0 a part is.
fn capability(kind: u8, offset: u64, len: u64, more: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(more);
    body
}

/// The BAR.
impl<D: Backend> BusDevice for VirtioPci<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let len = data.len();
        if let Some(at) = within(offset, len, COMMON, COMMON_LEN) {
            let device = lock(&self.device);
            if let Some(value) = common::read(&device, &self.messages, at, len) {
                fill(data, &value.to_le_bytes());
            }
        } else if within(offset, len, ISR, 1).is_some() {
            let mut device = lock(&self.device);
            let status = std::mem::take(&mut device.queues.interrupt_status);
            fill(data, &status.to_le_bytes());
        } else if let Some(at) = within(offset, len, DEVICE, DEVICE_LEN) {
            lock(&self.device).device.config().read(at, data);
        } else if let Some(at) = within(offset, len, TABLE, TABLE_LEN) {
            self.messages.read_table(at, data);
        } else if let Some(at) = within(offset, len, PENDING, PENDING_LEN) {
            let bits = self.messages.pending().to_le_bytes();
            fill(data, bits.get(at as usize..).unwrap_or_default());
        }
    }

    /// No configuration space here has a field the driver may write.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let len = data.len();
        if let Some(at) = within(offset, len, COMMON, COMMON_LEN) {
            let mut value = [0; 4];
            if len <= value.len() {
                fill(&mut value, data);
                let value = u32::from_le_bytes(value);
                common::write(&mut lock(&self.device), &self.messages, at, len, value);
            }
        } else if within(offset, len, NOTIFY, NOTIFY_LEN).is_some() {
            lock(&self.device).kick();
        } else if let Some(at) = within(offset, len, TABLE, TABLE_LEN) {
            self.messages.write_table(at, data);
        }
    }
}

impl<D: Backend> Function for VirtioPci<D>
where
    Self: Persist,
{
    fn read_config(&mut self, at: usize, data: &mut [u8]) {
        self.registers.read(at, data);
        if self.is_window(at)
            && let Some((offset, len)) = self.through_window()
        {
            let mut word = [0xff; 4];
            if let Some(word) = word.get_mut(..len) {
                BusDevice::read(self, offset, word);
            }
            fill(data, &word);
        }
    }

    fn write_config(&mut self, at: usize, data: &[u8]) {
        self.registers.write(at, data);
        self.messages.set_control(self.registers.half(self.control));
        if self.is_window(at)
            && let Some((offset, len)) = self.through_window()
            && let Some(data) = data.get(..len)
        {
            BusDevice::write(self, offset, data);
        }
    }

    fn place(&mut self, base: u64) {
        self.registers.write(BAR0, &(base as u32).to_le_bytes());
    }

    fn bar_len(&self) -> u64 {
        BAR_LEN
    }

    fn memory(&self) -> Option<Range<u64>> {
        let base = u64::from(self.registers.word(BAR0));
        let decodes = self.registers.half(COMMAND) & COMMAND_MEMORY != 0;
        (decodes && base != 0).then(|| base..base + BAR_LEN)
    }
}

impl<D: Backend> Persist for VirtioPci<D> {
    fn section(&self) -> &str {
        &self.section
    }

    fn version(&self) -> u16 {
        VERSION
    }

    /// The device holds the messages back.
    fn quiesce(&mut self) {}

    fn save(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(&self.section, VERSION, out);
        self.registers.save(&mut encoder);
        self.messages.save(&mut encoder);
        encoder.seal();
    }

    fn check(&self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        self.decode(version, bytes).map(drop)
    }

    fn load(&mut self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        let (registers, messages) = self.decode(version, bytes)?;
        self.registers = registers;
        self.messages.apply(messages);
        Ok(())
    }

    fn resume(&mut self) {}
}

impl<D: Backend> VirtioPci<D> {
    fn decode(
        &self,
        version: u16,
        bytes: &[u8],
    ) -> Result<(Registers, crate::device::pci::MsixState), LoadError> {
        let mut decoder = Decoder::open(&self.section, VERSION, version, bytes)?;
        let registers = self.registers.decode(&mut decoder)?;
        let control = registers.half(self.control);
        let messages = self.messages.decode(control, &mut decoder)?;
        decoder.end()?;
        Ok((registers, messages))
    }
}

fn lock<D>(device: &Mutex<Virtio<D>>) -> MutexGuard<'_, Virtio<D>> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where in a part an access is that lies in it wholly.
fn within(offset: u64, len: usize, part: u64, part_len: u64) -> Option<u64> {
    let at = offset.checked_sub(part)?;
    (at.checked_add(len as u64)? <= part_len).then_some(at)
}

fn fill(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}
