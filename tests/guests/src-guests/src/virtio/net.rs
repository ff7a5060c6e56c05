//! A network card for smoltcp: frames are read and built in place, in the buffers of the queues.

use alloc::vec;
use alloc::vec::Vec;
use core::slice;

use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet};

use super::queue::{Queue, WRITE};
use super::{F_ANY_LAYOUT, Transport, Trouble};
use crate::cmdline::CommandLine;

const KIND: u32 = 1;
const F_MAC: u64 = 1 << 5;
/// The card computes checksums of what is sent.
const F_CSUM: u64 = 1 << 0;
/// Checksums of what is received may be left out, by those who never put it on a wire.
const F_GUEST_CSUM: u64 = 1 << 1;
/// So may its segmentation.
const F_GUEST_TSO: u64 = 1 << 7 | 1 << 8;
const RX: u32 = 0;
const TX: u32 = 1;
const QUEUE_SIZE: u16 = 128;
/// Header and the longest frame (1,514 bytes) with room to spare.
const BUFFER: usize = 2048;
/// The same for frames whose segmentation was left out; fewer will do.
const LARGE_BUFFER: usize = 65_568;
const LARGE_QUEUE_SIZE: u16 = 16;
/// Where a TCP checksum is in the TCP header.
const TCP_CHECKSUM: usize = 16;

/// The card.
#[derive(Debug)]
pub struct Net {
    transport: Transport,
    mac: [u8; 6],
    rx: Side,
    tx: Side,
    free: Vec<u16>,
    features: u64,
}

/// A queue and one buffer per descriptor.
#[derive(Debug)]
struct Side {
    queue: Queue,
    buffers: &'static mut [u8],
    /// Bytes of one buffer.
    each: usize,
    header: usize,
    /// The card finishes checksums.
    finishes: bool,
}

impl Net {
    /// Finds and starts the first network card.
    ///
    /// # Errors
    /// If there is none, or it cannot be driven.
    pub fn find(cmdline: &CommandLine) -> Result<Self, Trouble> {
        let transport = Transport::find(cmdline, KIND)?;
        let features = transport.begin(F_MAC | F_ANY_LAYOUT | F_CSUM | F_GUEST_CSUM | F_GUEST_TSO)?;
        if transport.legacy() && features & F_ANY_LAYOUT == 0 {
            // Without it the header needs a descriptor of its own.
            return Err(Trouble::Features);
        }
        // The number of merged buffers is part of the header of a modern device only.
        let header = if transport.legacy() { 10 } else { 12 };
        let (size, each) = if features & F_GUEST_TSO == 0 {
            (QUEUE_SIZE, BUFFER)
        } else {
            (LARGE_QUEUE_SIZE, LARGE_BUFFER)
        };
        let mut rx = Side::new(&transport, RX, size, each, header)?;
        let mut tx = Side::new(&transport, TX, QUEUE_SIZE, BUFFER, header)?;
        tx.finishes = features & F_CSUM != 0;
        tx.queue.without_interrupts();
        for index in 0..rx.queue.size() {
            rx.offer(index, each, WRITE);
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
            features,
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
    fn new(
        transport: &Transport,
        index: u32,
        size: u16,
        each: usize,
        header: usize,
    ) -> Result<Self, Trouble> {
        let queue = transport.queue(index, size)?;
        let buffers = vec![0; usize::from(queue.size()) * each].leak();
        Ok(Self {
            queue,
            buffers,
            each,
            header,
            finishes: false,
        })
    }

    fn buffer(&mut self, index: u16) -> &mut [u8] {
        &mut self.buffers[usize::from(index) * self.each..][..self.each]
    }

    fn offer(&mut self, index: u16, length: usize, flags: u16) {
        let address = self.buffer(index).as_ptr().addr() as u64;
        self.queue
            .describe(index, address, length as u32, flags, None);
        self.queue.offer(index);
    }

    /// The bytes after the header of a buffer that the device has given back.
    fn frame(&mut self, index: u16, length: usize) -> &mut [u8] {
        let length = length.min(self.each - self.header);
        let header = self.header;
        let start = self.buffer(index).as_mut_ptr().wrapping_add(header);
        // SAFETY: inside the buffer. Built anew from the address each time, because the device
        // wrote there behind the compiler's back.
        unsafe { slice::from_raw_parts_mut(start, length) }
    }

    /// The header of a frame to send: nothing, or where to put a checksum.
    fn head(&mut self, index: u16, length: usize) {
        let start = if self.finishes {
            begin_checksum(self.frame(index, length))
        } else {
            None
        };
        let header = self.header;
        let head = &mut self.buffer(index)[..header];
        head.fill(0);
        if let Some(start) = start {
            head[0] = 1;
            head[6..8].copy_from_slice(&(start as u16).to_le_bytes());
            head[8..10].copy_from_slice(&(TCP_CHECKSUM as u16).to_le_bytes());
        }
    }
}

/// Puts the sum of the pseudo header where the TCP checksum goes, for the card to add the rest.
/// Returns where it has to begin, or `None` if this is no TCP over IPv4.
fn begin_checksum(bytes: &mut [u8]) -> Option<usize> {
    let mut frame = EthernetFrame::new_checked(bytes).ok()?;
    if frame.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let mut packet = Ipv4Packet::new_checked(frame.payload_mut()).ok()?;
    if packet.next_header() != IpProtocol::Tcp {
        return None;
    }
    let header = usize::from(packet.header_len());
    let length = packet.total_len() - u16::from(packet.header_len());
    let addresses = [packet.src_addr(), packet.dst_addr()].map(|address| address.to_bits());
    let sum = addresses
        .iter()
        .map(|bits| (bits >> 16) + (bits & 0xFFFF))
        .sum::<u32>()
        + u32::from(u8::from(IpProtocol::Tcp))
        + u32::from(length);
    // Six words at most: two folds are enough.
    let sum = (sum & 0xFFFF) + (sum >> 16);
    let sum = (sum & 0xFFFF) + (sum >> 16);
    let at = packet.payload_mut().get_mut(TCP_CHECKSUM..TCP_CHECKSUM + 2)?;
    at.copy_from_slice(&(sum as u16).to_be_bytes());
    Some(EthernetFrame::<&[u8]>::header_len() + header)
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
        capabilities.checksum.tcp = match (
            self.features & F_CSUM == 0,
            self.features & F_GUEST_CSUM == 0,
        ) {
            (true, true) => Checksum::Both,
            (true, false) => Checksum::Tx,
            (false, true) => Checksum::Rx,
            (false, false) => Checksum::None,
        };
        capabilities
    }
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        let result = read(self.side.frame(self.index, self.length));
        self.side.offer(self.index, self.side.each, WRITE);
        result
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, build: F) -> R {
        let index = self.free.pop().unwrap_or(0) % self.side.queue.size();
        let result = build(self.side.frame(index, length));
        self.side.head(index, length);
        self.side.offer(index, self.side.header + length, 0);
        result
    }
}
