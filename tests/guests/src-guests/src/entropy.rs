//! Numbers that no other machine draws: the time-stamp counter, stirred.

use crate::cpu::tsc;
use crate::pattern;

/// A generator. Every draw mixes in the moment it is made.
#[derive(Debug)]
pub struct Entropy {
    state: u64,
}

impl Entropy {
    /// Starts from the time-stamp counter and whatever else tells this machine from others.
    #[must_use]
    pub fn new(salt: u64) -> Self {
        let mut entropy = Self { state: salt };
        // The low bits of the counter vary from access to access of a device.
        for _ in 0..8 {
            let _ = crate::cpu::in8(0x40);
            let _ = entropy.draw();
        }
        entropy
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.state = pattern::seed(self.state, tsc());
        self.state
    }
}
