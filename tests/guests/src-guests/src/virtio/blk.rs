//! A disk: several requests of one 4 KiB block at a time, each in a slot of its own.

use alloc::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use core::ptr;
use core::slice;

use super::queue::{Queue, WRITE};
use super::{Transport, Trouble};
use crate::cmdline::CommandLine;

const KIND: u32 = 2;
const F_FLUSH: u64 = 1 << 9;
const QUEUE_SIZE: u16 = 64;
const SECTORS_PER_BLOCK: u64 = 8;

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Op {
    /// Fills the slot's block from the disk.
    Read = 0,
    /// Writes the slot's block to the disk.
    Write = 1,
    /// Makes what was written durable.
    Flush = 4,
}

/// The disk.
#[derive(Debug)]
pub struct Blk {
    transport: Transport,
    queue: Queue,
    blocks: u64,
    can_flush: bool,
    slots: *mut Slot,
}

/// Memory the device sees.
#[repr(C, align(4096))]
struct Slot {
    data: [u64; BLOCK / 8],
    header: Header,
    status: u8,
}

#[repr(C)]
struct Header {
    op: u32,
    reserved: u32,
    sector: u64,
}

impl Blk {
    /// Finds and starts the first disk.
    ///
    /// # Errors
    /// If there is none, or it cannot be driven.
    pub fn find(cmdline: &CommandLine) -> Result<Self, Trouble> {
        let transport = Transport::find(cmdline, KIND)?;
        let features = transport.begin(F_FLUSH)?;
        let queue = transport.queue(0, QUEUE_SIZE)?;
        transport.ready();
        let sectors = u64::from(transport.config32(0)) | u64::from(transport.config32(4)) << 32;
        let count = usize::from(queue.size() / 3);
        let layout = Layout::array::<Slot>(count).map_err(|_| Trouble::Queue(0))?;
        if count == 0 {
            return Err(Trouble::Queue(0));
        }
        // SAFETY: there is at least one slot, and a slot is not empty.
        let slots = unsafe { alloc_zeroed(layout) };
        if slots.is_null() {
            handle_alloc_error(layout);
        }
        Ok(Self {
            transport,
            queue,
            blocks: sectors / SECTORS_PER_BLOCK,
            can_flush: features & F_FLUSH != 0,
            slots: slots.cast(),
        })
    }

    /// Where the disk is.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// How many blocks it has.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether it knows [`Op::Flush`].
    #[must_use]
    pub fn can_flush(&self) -> bool {
        self.can_flush
    }

    /// How many requests can be under way.
    #[must_use]
    pub fn slots(&self) -> u16 {
        self.queue.size() / 3
    }

    /// The block of a slot that has no request under way.
    pub fn data(&mut self, slot: u16) -> &mut [u64] {
        let data = self.slot(slot).cast();
        // SAFETY: inside the slot. Built anew from the address each time, because the device wrote
        // there behind the compiler's back.
        unsafe { slice::from_raw_parts_mut(data, BLOCK / 8) }
    }

    /// Prepares a request; the device sees it after [`Self::kick`].
    pub fn submit(&mut self, slot: u16, op: Op, block: u64) {
        let place = self.slot(slot);
        let sector = if op == Op::Flush {
            0
        } else {
            block * SECTORS_PER_BLOCK
        };
        let header = Header {
            op: op as u32,
            reserved: 0,
            sector,
        };
        // SAFETY: the slot is ours until the request is offered.
        let (data, header, status) = unsafe {
            ptr::write_volatile(&raw mut (*place).header, header);
            ptr::write_volatile(&raw mut (*place).status, 0xFF);
            (
                &raw const (*place).data,
                &raw const (*place).header,
                &raw const (*place).status,
            )
        };
        let first = 3 * slot;
        let after_header = if op == Op::Flush {
            first + 2
        } else {
            first + 1
        };
        self.queue
            .describe(first, header.addr() as u64, 16, 0, Some(after_header));
        let flags = if op == Op::Read { WRITE } else { 0 };
        self.queue.describe(
            first + 1,
            data.addr() as u64,
            BLOCK as u32,
            flags,
            Some(first + 2),
        );
        self.queue
            .describe(first + 2, status.addr() as u64, 1, WRITE, None);
        self.queue.offer(first);
    }

    /// Shows the device what was submitted.
    pub fn kick(&mut self) {
        if self.queue.publish() {
            self.transport.notify(0);
        }
    }

    /// Lowers the disk's interrupt.
    pub fn acknowledge(&self) {
        self.transport.acknowledge();
    }

    /// A request that is done: its slot, and whether it went well.
    pub fn complete(&mut self) -> Option<(u16, bool)> {
        let (head, _) = self.queue.take_used()?;
        let slot = (head / 3).min(self.slots() - 1);
        // SAFETY: the device has written the status of a request it gave back.
        let status = unsafe { ptr::read_volatile(&raw const (*self.slot(slot)).status) };
        Some((slot, status == 0))
    }

    fn slot(&self, index: u16) -> *mut Slot {
        self.slots.wrapping_add((index % self.slots()).into())
    }
}
