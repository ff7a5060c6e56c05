//! How a world is set up, and what is counted in it.

use std::collections::BTreeMap;

use colo_proto::{
    Bug,
    ram::CacheMode,
    status::{Mode, ResumePolicy},
};

/// How a world is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Mode to begin in.
    pub mode: Mode,
    /// When the primary runs on.
    pub resume: ResumePolicy,
    /// The secondary's memory rule.
    pub cache: CacheMode,
    /// RAM channels.
    pub lanes: u8,
    /// Percent of client frames that make the guests differ.
    pub diverge: u64,
    /// The seeded bug of both hosts.
    pub bug: Option<Bug>,
}

impl Setup {
    /// One of the sixteen, by number.
    #[must_use]
    pub const fn numbered(n: u64) -> Self {
        Self {
            mode: if n & 1 == 0 {
                Mode::Lockstep
            } else {
                Mode::Standby
            },
            resume: if n & 2 == 0 {
                ResumePolicy::AfterCapture
            } else {
                ResumePolicy::AfterLoad
            },
            cache: if n & 4 == 0 {
                CacheMode::Union
            } else {
                CacheMode::Full
            },
            lanes: if n & 8 == 0 { 1 } else { 2 },
            diverge: if n & 16 == 0 { 0 } else { 20 },
            bug: None,
        }
    }
}

/// What happened, in numbers.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Events of the world.
    pub steps: u64,
    /// Checkpoints that a primary saw through.
    pub epochs: u64,
    /// Promotions of a secondary.
    pub takeovers: u64,
    /// Sole owners that booted anew after a loss of power.
    pub cold_boots: u64,
    /// Frames that left.
    pub released: u64,
    /// Times that protection began.
    pub protected: u64,
    /// Faults, by kind.
    pub faults: BTreeMap<&'static str, u64>,
}
