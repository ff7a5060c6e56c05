//! Time from the time-stamp counter, wake-ups from the local APIC's timer.

use crate::cpu::{self, in8, out8, tsc};
use crate::interrupts;

const PIT_HZ: u64 = 1_193_182;
/// About 20 ms of the PIT.
const WINDOW: u16 = 24_000;
/// The timer is never set for longer: its counter has 32 bits.
const LONGEST_MS: u64 = 1_000;

/// A calibrated clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    tsc_khz: u64,
    timer_khz: u64,
    start: u64,
}

impl Clock {
    /// Measures the time-stamp counter (unless its rate is given) and the APIC timer against the
    /// PIT.
    #[must_use]
    pub fn calibrate(tsc_khz: Option<u64>) -> Self {
        interrupts::timer_set(u32::MAX);
        // Channel 0, one-shot: its count is read back, its interrupt is masked.
        out8(0x43, 0x30);
        out8(0x40, 0xFF);
        out8(0x40, 0xFF);
        let begin = (pit_count(), tsc(), interrupts::timer_left());
        let mut end = begin;
        // The bound keeps a machine without a PIT from hanging: it falls back to guesses.
        for _ in 0..1_000_000 {
            end = (pit_count(), tsc(), interrupts::timer_left());
            if begin.0.wrapping_sub(end.0) >= WINDOW {
                break;
            }
        }
        interrupts::timer_set(0);
        let ticks = u64::from(begin.0.wrapping_sub(end.0)).max(1);
        let khz = |count: u64| (count * PIT_HZ / ticks / 1_000).clamp(1_000, 100_000_000);
        Self {
            tsc_khz: tsc_khz
                .filter(|&khz| khz > 0)
                .unwrap_or_else(|| khz(end.1 - begin.1)),
            timer_khz: khz((begin.2 - end.2).into()),
            start: tsc(),
        }
    }

    /// The rate of the time-stamp counter.
    #[must_use]
    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    /// The rate of the APIC timer.
    #[must_use]
    pub fn timer_khz(&self) -> u64 {
        self.timer_khz
    }

    /// Microseconds since the guest started.
    #[must_use]
    pub fn micros(&self) -> u64 {
        let ticks = tsc().saturating_sub(self.start);
        ticks / self.tsc_khz * 1_000 + ticks % self.tsc_khz * 1_000 / self.tsc_khz
    }

    /// Halts until an interrupt comes or `deadline` (in [`Clock::micros`]) passes; returns at once
    /// if it has, or if an interrupt came since the last call returned. May return early for no
    /// reason: look at the devices and call again.
    pub fn halt_until(&self, deadline: Option<u64>) {
        let left = deadline.map(|at| at.saturating_sub(self.micros()));
        if left != Some(0) {
            let longest = LONGEST_MS * self.timer_khz;
            let count = left.map_or(longest, |us| us.saturating_mul(self.timer_khz) / 1_000);
            interrupts::timer_set(count.clamp(1, longest).min(u32::MAX.into()) as u32);
            cpu::halt();
        }
        interrupts::clear_wake();
    }

    /// Sleeps, through any number of interrupts, until `deadline`.
    pub fn sleep_until(&self, deadline: u64) {
        while self.micros() < deadline {
            self.halt_until(Some(deadline));
        }
    }
}

fn pit_count() -> u16 {
    out8(0x43, 0);
    let low = in8(0x40);
    u16::from_le_bytes([low, in8(0x40)])
}
