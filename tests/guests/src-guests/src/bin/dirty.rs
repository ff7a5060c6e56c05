//! Dirties `pages` pages every `period_us` microseconds, round-robin over `ws` pages, and checks
//! all the while that every page is what it was last written to be.
#![no_std]
#![no_main]

use guest::stats::{self, Word};
use guest::working_set::WorkingSet;
use guest::{Boot, println};

guest::entry!(main);

/// How far behind its schedule the guest may be and still catch up, in microseconds.
const CATCH_UP: u64 = 100_000;

fn main(boot: &'static Boot) -> ! {
    let clock = boot.clock;
    let number = |key, default| boot.cmdline.number(key).unwrap_or(default);
    let pages = number("pages", 256);
    let period = number("period_us", 10_000).max(1);
    let checks = number("verify", pages.max(16));
    let quiet = number("quiet", 0) != 0;

    let mut set = WorkingSet::new(boot, number("ws", 4096));
    println!(
        "dirty: ready pages={pages} period_us={period} ws={} verify={checks} tsc_khz={} \
         timer_khz={}",
        set.pages(),
        clock.tsc_khz(),
        clock.timer_khz()
    );
    stats::begin(b"DIRT");

    let mut iterations: u64 = 0;
    let mut next = clock.micros();
    let mut next_line = next + 1_000_000;
    loop {
        set.write(pages);
        set.verify(checks);
        iterations += 1;
        let now = clock.micros();
        stats::set(Word::Progress, iterations);
        stats::set(Word::Micros, now);
        if now >= next_line {
            if !quiet {
                println!(
                    "dirty: t={} iterations={iterations} written={} verified={} errors={}",
                    now / 1_000_000,
                    set.written(),
                    set.verified(),
                    set.errors()
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
