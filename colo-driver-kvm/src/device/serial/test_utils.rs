//! A port with its console and its interrupt line watched.

use std::sync::{Arc, Mutex};

use super::Serial;
use crate::device::{BusDevice, Irq, Sink};

pub(super) const DATA: u64 = 0;
pub(super) const IER: u64 = 1;
pub(super) const IIR: u64 = 2;
pub(super) const MCR: u64 = 4;
pub(super) const LSR: u64 = 5;

pub(super) struct Port {
    pub(super) serial: Serial,
    printed: Arc<Mutex<Vec<u8>>>,
}

impl Port {
    pub(super) fn new() -> Self {
        let printed = Arc::new(Mutex::new(Vec::new()));
        let out = printed.clone();
        let sink = Sink::callback(move |bytes| out.lock().unwrap().extend_from_slice(bytes));
        Self {
            serial: Serial::new("serial0", Irq::new().unwrap(), sink),
            printed,
        }
    }

    pub(super) fn read(&mut self, offset: u64) -> u8 {
        let mut data = [0xff];
        self.serial.read(offset, &mut data);
        data[0]
    }

    pub(super) fn write(&mut self, offset: u64, byte: u8) {
        self.serial.write(offset, &[byte]);
    }

    pub(super) fn printed(&self) -> Vec<u8> {
        self.printed.lock().unwrap().clone()
    }

    pub(super) fn interrupted(&self) -> bool {
        self.serial.irq().fd().read().is_ok()
    }
}
