//! Fairness: how much one channel may move in one turn of the loop.
//!
//! A turn looks at timers and heartbeats first, then at every channel. What bounds the delay of a
//! heartbeat is therefore the work of one turn, and that is the sum of these budgets: a full RAM
//! lane takes its share and is continued in the next turn, which begins without sleeping.

use colo_proto::id::Channel;

/// Bytes that are asked of the machine at a time for a RAM lane: large enough that the cost of a
/// system call does not count.
const BULK_CHUNK: usize = 512 * 1024;
/// The same for the others, whose messages are small.
const SMALL_CHUNK: usize = 64 * 1024;

/// What is left for one channel, one direction, in one turn.
#[derive(Debug)]
pub(crate) struct Budget {
    bytes: usize,
    calls: u32,
}

impl Budget {
    pub(crate) const fn of(channel: Channel) -> Self {
        match channel {
            Channel::Ram(_) | Channel::Disk => Self {
                bytes: BULK_CHUNK,
                calls: 32,
            },
            Channel::Control | Channel::Net => Self {
                bytes: 8 * SMALL_CHUNK,
                calls: 256,
            },
        }
    }

    /// Accounts for a system call; `false` when the channel's turn is over.
    pub(crate) const fn spend(&mut self, bytes: usize) -> bool {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.calls = self.calls.saturating_sub(1);
        self.bytes > 0 && self.calls > 0
    }
}

/// How much to ask the machine for at a time.
pub(crate) const fn chunk(channel: Channel) -> usize {
    match channel {
        Channel::Ram(_) | Channel::Disk => BULK_CHUNK,
        Channel::Control | Channel::Net => SMALL_CHUNK,
    }
}
