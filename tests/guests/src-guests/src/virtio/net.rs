//! A network card for smoltcp: frames are read and built in place, in the buffers of the queues.

use alloc::vec;
use alloc::vec::Vec;
use core::slice;

use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use super::queue::{Queue, WRITE};
use super::{F_ANY_LAYOUT, Transport, Trouble};
use crate::cmdline::CommandLine;

const KIND: u32 = 1;
const F_MAC: u64 = 1 << 5;
const RX: u32 = 0;
const TX: u32 = 1;
const QUEUE_SIZE: u16 = 128;
/// Header and the longest frame (1,514 bytes) with room to spare.
const BUFFER: usize = 2048;

/// The card.
#[derive(Debug)]
pub struct Net {
    transport: Transport,
    mac: [u8; 6],
    rx: Side,
    tx: Side,
    free: Vec<u16>,
}

/// A queue and one buffer per descriptor.
#[derive(Debug)]
struct Side {
    queue: Queue,
    buffers: &'static mut [[u8; BUFFER]],
    header: usize,
}

impl Net {
    /// Finds and starts the first network card.
    ///
    /// # Errors
    /// If there is none, or it cannot be driven.
    pub fn find(cmdline: &CommandLine) -> Result<Self, Trouble> {
        let transport = Transport::find(cmdline, KIND)?;
        let features = transport.begin(F_MAC | F_ANY_LAYOUT)?;
        if transport.legacy && features & F_ANY_LAYOUT == 0 {
            // Without it the header needs a descriptor of its own.
            return Err(Trouble::Features);
        }
        // The number of merged buffers is part of the header of a modern device only.
        let header = if transport.legacy { 10 } else { 12 };
        let mut rx = Side::new(&transport, RX, header)?;
        let mut tx = Side::new(&transport, TX, header)?;
        tx.queue.without_interrupts();
        for index in 0..rx.queue.size() {
            rx.offer(index, BUFFER, WRITE);
        }
        rx.queue.publish();
        transport.ready();
        transport.notify(RX);
        let mut mac = [0x02, 0, 0, 0, 0, 1];
        if features & F_MAC != 0 {
            for (offset, byte) in (0..).zip(&mut mac) {
                *byte = transport.config8(offset);
            }
        }
        let free = (0..tx.queue.size()).collect();
        Ok(Self {
            transport,
            mac,
            rx,
            tx,
            free,
        })
    }

    /// The card's address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Where the card is.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Lowers the card's interrupt.
    pub fn acknowledge(&self) {
        self.transport.acknowledge();
    }

    /// Shows the card what was built and what was consumed since the last call.
    pub fn flush(&mut self) {
        if self.tx.queue.publish() {
            self.transport.notify(TX);
        }
        if self.rx.queue.publish() {
            self.transport.notify(RX);
        }
    }

    /// Whether a frame could be built right now.
    pub fn can_transmit(&mut self) -> bool {
        while let Some((head, _)) = self.tx.queue.take_used() {
            self.free.push(head);
        }
        !self.free.is_empty()
    }

    /// Sends one frame built elsewhere, padded to the least length of Ethernet.
    pub fn send(&mut self, frame: &[u8]) {
        if let Some(token) = phy::Device::transmit(self, Instant::ZERO) {
            phy::TxToken::consume(token, frame.len().max(60), |buffer| {
                buffer.fill(0);
                buffer[..frame.len()].copy_from_slice(frame);
            });
        }
        self.flush();
    }
}

impl Side {
    fn new(transport: &Transport, index: u32, header: usize) -> Result<Self, Trouble> {
        let queue = transport.queue(index, QUEUE_SIZE)?;
        let buffers = vec![[0; BUFFER]; queue.size().into()].leak();
        Ok(Self {
            queue,
            buffers,
            header,
        })
    }

    fn offer(&mut self, index: u16, length: usize, flags: u16) {
        let address = self.buffers[usize::from(index)].as_ptr().addr() as u64;
        self.queue
            .describe(index, address, length as u32, flags, None);
        self.queue.offer(index);
    }

    /// The bytes after the header of a buffer that the device has given back.
    fn frame(&mut self, index: u16, length: usize) -> &mut [u8] {
        let start = self.buffers[usize::from(index)]
            .as_mut_ptr()
            .wrapping_add(self.header);
        let length = length.min(BUFFER - self.header);
        // SAFETY: inside the buffer. Built anew from the address each time, because the device
        // wrote there behind the compiler's back.
        unsafe { slice::from_raw_parts_mut(start, length) }
    }
}

/// A received frame.
#[derive(Debug)]
pub struct RxToken<'a> {
    side: &'a mut Side,
    index: u16,
    length: usize,
}

/// Leave to build a frame.
#[derive(Debug)]
pub struct TxToken<'a> {
    side: &'a mut Side,
    free: &'a mut Vec<u16>,
}

impl phy::Device for Net {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        if !self.can_transmit() {
            return None;
        }
        let (index, length) = self.rx.queue.take_used()?;
        let index = index % self.rx.queue.size();
        let length = (length as usize).saturating_sub(self.rx.header);
        Some((
            RxToken {
                side: &mut self.rx,
                index,
                length,
            },
            TxToken {
                side: &mut self.tx,
                free: &mut self.free,
            },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        self.can_transmit().then_some(TxToken {
            side: &mut self.tx,
            free: &mut self.free,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        let result = read(self.side.frame(self.index, self.length));
        self.side.offer(self.index, BUFFER, WRITE);
        result
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, build: F) -> R {
        let index = self.free.pop().unwrap_or(0) % self.side.queue.size();
        let result = build(self.side.frame(index, length));
        let header = self.side.header;
        self.side.buffers[usize::from(index)][..header].fill(0);
        self.side.offer(index, header + length, 0);
        result
    }
}
