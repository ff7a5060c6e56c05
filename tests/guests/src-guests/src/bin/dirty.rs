//! Dirties `pages` pages every `period_us` microseconds, round-robin over `ws` pages, and checks
//! all the while that every page is what it was last written to be.
#![no_std]
#![no_main]

use core::slice;

use guest::stats::{self, Word};
use guest::{Boot, pattern, println};

guest::entry!(main);

/// Where the working set begins: above the image, on any machine.
const BASE: u64 = 0x200_0000;
const PAGE: u64 = 4096;
/// How far behind its schedule the guest may be and still catch up, in microseconds.
const CATCH_UP: u64 = 100_000;

struct WorkingSet {
    pages: u64,
    /// Writes since the first fill; page `i` was the target of every write `n` with
    /// `n % pages == i`, so this one number says what every page must hold.
    written: u64,
    verified: u64,
    errors: u64,
}

fn main(boot: &'static Boot) -> ! {
    let clock = boot.clock;
    let number = |key, default| boot.cmdline.number(key).unwrap_or(default);
    let per_period = number("pages", 256);
    let period = number("period_us", 10_000).max(1);
    let checks = number("verify", per_period.max(16));
    let quiet = number("quiet", 0) != 0;
    let fitting = boot
        .memory_end
        .unwrap_or(BASE + 4096 * PAGE)
        .saturating_sub(BASE)
        / PAGE;
    let wanted = number("ws", 4096).max(1);
    let ws = wanted.min(fitting.max(1));
    println!(
        "dirty: ready pages={per_period} period_us={period} ws={ws} verify={checks} tsc_khz={} \
         timer_khz={}",
        clock.tsc_khz(),
        clock.timer_khz()
    );
    if ws < wanted {
        println!("dirty: ws={wanted} does not fit into memory, using {ws}");
    }

    let mut set = WorkingSet {
        pages: ws,
        written: 0,
        verified: 0,
        errors: 0,
    };
    set.first_fill();
    stats::begin(b"DIRT");

    let mut iterations: u64 = 0;
    let mut next = clock.micros();
    let mut next_line = next + 1_000_000;
    loop {
        for _ in 0..per_period {
            set.write_one();
        }
        for _ in 0..checks {
            set.verify_one();
        }
        iterations += 1;
        let now = clock.micros();
        stats::set(Word::Progress, iterations);
        stats::set(Word::Micros, now);
        if now >= next_line {
            if !quiet {
                println!(
                    "dirty: t={} iterations={iterations} written={} verified={} errors={}",
                    now / 1_000_000,
                    set.written,
                    set.verified,
                    set.errors
                );
            }
            next_line = now - now % 1_000_000 + 1_000_000;
        }
        next += period;
        // A moment's delay is made up for, a long pause or a clock that jumped is not.
        if now > next + CATCH_UP.max(period) || next > now + 2 * period {
            next = now + period;
        }
        clock.sleep_until(next);
    }
}

impl WorkingSet {
    /// Gives every page its generation 1.
    fn first_fill(&mut self) {
        for index in 0..self.pages {
            pattern::fill(page(index), pattern::seed(index, 1));
        }
    }

    fn write_one(&mut self) {
        let index = self.written % self.pages;
        let generation = 2 + self.written / self.pages;
        pattern::fill(page(index), pattern::seed(index, generation));
        self.written += 1;
        stats::set(Word::Written, self.written);
    }

    /// How often page `index` was written, the first fill included.
    fn generation(&self, index: u64) -> u64 {
        1 + (self.written + self.pages - 1 - index) / self.pages
    }

    fn verify_one(&mut self) {
        let index = self.verified % self.pages;
        let generation = self.generation(index);
        let difference = pattern::first_difference(page(index), pattern::seed(index, generation));
        self.verified += 1;
        stats::set(Word::Verified, self.verified);
        if let Some((word, want, got)) = difference {
            self.errors += 1;
            stats::set(Word::Errors, self.errors);
            if self.errors <= 32 {
                println!(
                    "dirty: CORRUPT page={index} word={word} generation={generation} \
                     want={want:#018x} got={got:#018x}"
                );
            }
        }
    }
}

/// The words of a page of the working set.
fn page(index: u64) -> &'static mut [u64] {
    let address = (BASE + index * PAGE) as *mut u64;
    // SAFETY: the working set is memory that nothing else names; each borrow ends in the same
    // statement.
    unsafe { slice::from_raw_parts_mut(address, 512) }
}
