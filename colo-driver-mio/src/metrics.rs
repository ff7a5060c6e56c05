//! What the loop counts about itself, plain data.

use core::time::Duration;
use std::collections::BTreeMap;

use colo_proto::{id::Channel, machine::TimerKind, stats::Stats, status::Status, time::Instant};

/// Counters of one loop since it began.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LoopStats {
    /// Turns taken.
    pub turns: u64,
    /// Inputs given to the machine.
    pub inputs: u64,
    /// Deadlines that were met, by what they were for: a spinning timer stands out.
    pub timers: BTreeMap<TimerKind, u64>,
    /// Turns that ended with work left because a channel's budget was used up.
    pub exhausted: u64,
    /// The longest turn, without the waiting: what a heartbeat may have had to wait for.
    pub longest_turn: Duration,
    /// Heartbeat datagrams received and sent.
    pub datagrams: (u64, u64),
    /// Per channel: bytes received, bytes sent.
    pub bytes: BTreeMap<Channel, (u64, u64)>,
    /// Callers and attempts that came to nothing.
    pub refused: u64,
}

/// Everything an operator can look at, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// When.
    pub at: Instant,
    /// The machine's status.
    pub status: Status,
    /// The machine's counters.
    pub stats: Stats,
    /// The loop's counters.
    pub driver: LoopStats,
    /// Channels that are up.
    pub channels: Vec<Channel>,
}
