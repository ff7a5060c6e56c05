//! Pages written round-robin, each checked against the only contents it can have.

use core::slice;

use crate::stats::{self, Word};
use crate::{Boot, pattern, println};

/// Where the working set begins: above image and heap, on any machine.
pub const BASE: u64 = 0x200_0000;
const PAGE: u64 = 4096;
/// Lines about corrupt pages before the guest only counts them.
const LINES: u64 = 32;

/// The pages and what was done to them.
#[derive(Debug)]
pub struct WorkingSet {
    pages: u64,
    /// Writes since the first fill. Page `i` was the target of every write `n` with
    /// `n % pages == i`, so this one number says what every page must hold.
    written: u64,
    verified: u64,
    errors: u64,
}

impl WorkingSet {
    /// Takes `wanted` pages, or as many as fit into memory, and gives each its first contents.
    #[must_use]
    pub fn new(boot: &Boot, wanted: u64) -> Self {
        let end = boot.memory_end.unwrap_or(BASE + 4096 * PAGE);
        let pages = wanted.clamp(1, (end.saturating_sub(BASE) / PAGE).max(1));
        if pages < wanted {
            println!("guest: ws={wanted} does not fit into memory, using {pages}");
        }
        for index in 0..pages {
            pattern::fill(page(index), pattern::seed(index, 1));
        }
        Self {
            pages,
            written: 0,
            verified: 0,
            errors: 0,
        }
    }

    /// Writes the next `count` pages.
    pub fn write(&mut self, count: u64) {
        for _ in 0..count {
            let index = self.written % self.pages;
            let generation = 2 + self.written / self.pages;
            pattern::fill(page(index), pattern::seed(index, generation));
            self.written += 1;
            stats::set(Word::Written, self.written);
        }
    }

    /// Checks the next `count` pages, counts and reports what is wrong.
    pub fn verify(&mut self, count: u64) {
        for _ in 0..count {
            let index = self.verified % self.pages;
            let generation = 1 + (self.written + self.pages - 1 - index) / self.pages;
            let seed = pattern::seed(index, generation);
            let difference = pattern::first_difference(page(index), seed);
            self.verified += 1;
            stats::set(Word::Verified, self.verified);
            if let Some((word, want, got)) = difference {
                self.errors += 1;
                stats::set(Word::Errors, self.errors);
                if self.errors <= LINES {
                    println!(
                        "guest: CORRUPT page={index} word={word} generation={generation} \
                         want={want:#018x} got={got:#018x}"
                    );
                }
            }
        }
    }

    /// How many pages there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages written since the first fill.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Pages checked.
    #[must_use]
    pub fn verified(&self) -> u64 {
        self.verified
    }

    /// Checks that failed.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.errors
    }
}

/// The words of a page of the working set.
fn page(index: u64) -> &'static mut [u64] {
    let address = (BASE + index * PAGE) as *mut u64;
    // SAFETY: the working set is memory that nothing else names; each borrow ends in the same
    // statement.
    unsafe { slice::from_raw_parts_mut(address, 512) }
}
