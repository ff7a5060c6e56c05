//! Counters and phase times, plain data.

use core::time::Duration;

/// Where the time of one checkpoint went, as the primary saw it. Phases follow each other; the
/// guest was stopped for `pause` only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct CheckpointTimes {
    /// From the decision to the secondary's reply.
    pub reply: Duration,
    /// First pass over the dirty pages, guest running.
    pub live: Duration,
    /// The guest was stopped.
    pub pause: Duration,
    /// From the captured state to its last byte handed to the sockets.
    pub send: Duration,
    /// From the last byte to `VMSTATE_RECEIVED`.
    pub received: Duration,
    /// From `VMSTATE_RECEIVED` to `VMSTATE_LOADED`.
    pub loaded: Duration,
}

impl CheckpointTimes {
    /// From the decision to the end.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.reply + self.live + self.pause + self.send + self.received + self.loaded
    }
}

/// Counters since the machine was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Stats {
    /// Complete checkpoints.
    pub checkpoints: u64,
    /// Checkpoints given up before they were complete.
    pub aborted: u64,
    /// Pages sent (primary) or committed (secondary) in checkpoints.
    pub pages: u64,
    /// Pages sent in synchronisation rounds.
    pub sync_pages: u64,
    /// Bytes of device state sent or received.
    pub state_bytes: u64,
    /// Frames released to the world.
    pub released: u64,
    /// Of those, released because both guests said the same.
    pub matched: u64,
    /// Frames dropped at a bound or at a shut gate.
    pub dropped: u64,
    /// Divergences seen.
    pub diverged: u64,
    /// Client frames logged.
    pub inputs: u64,
    /// Times of the last complete checkpoint.
    pub last: CheckpointTimes,
    /// Longest pause so far.
    pub longest_pause: Duration,
}
