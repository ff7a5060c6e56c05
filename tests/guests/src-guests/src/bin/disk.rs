//! Writes and reads back a region of a disk, and knows what every block must hold.
//!
//! A block begins with its index, its generation and a checksum of the rest, so that the disk can
//! be judged without the guest, too; what follows is a pattern of index and generation.
#![no_std]
#![no_main]

use guest::clock::Clock;
use guest::stats::{self, Word};
use guest::virtio::blk::{Blk, Op};
use guest::{Boot, cpu, pattern, println};

guest::entry!(main);

/// How far behind its schedule the guest may be and still catch up, in microseconds.
const CATCH_UP: u64 = 100_000;
/// Lines about bad blocks before the guest only counts them.
const LINES: u64 = 32;

struct Disk {
    blk: Blk,
    clock: Clock,
    /// Size of the region.
    blocks: u64,
    /// Writes since the first fill, round-robin: this says which generation every block has.
    written: u64,
    verified: u64,
    flushed: u64,
    errors: u64,
}

fn main(boot: &'static Boot) -> ! {
    let clock = boot.clock;
    let number = |key, default| boot.cmdline.number(key).unwrap_or(default);
    let writes = number("writes", 8);
    let reads = number("reads", 8);
    let period = number("period_us", 10_000).max(1);
    let flush_every = number("flush_every", 16);
    let quiet = number("quiet", 0) != 0;

    let blk = match Blk::find(&boot.cmdline) {
        Ok(blk) if blk.blocks() > 0 => blk,
        Ok(_) => {
            println!("disk: the disk is smaller than a block of 4096 bytes");
            cpu::stop();
        }
        Err(trouble) => {
            println!("disk: no virtio disk: {trouble:?}");
            cpu::stop();
        }
    };
    let blocks = number("blocks", 1024).clamp(1, blk.blocks());
    let mut disk = Disk {
        blk,
        clock,
        blocks,
        written: 0,
        verified: 0,
        flushed: 0,
        errors: 0,
    };
    disk.first_fill();
    stats::begin(b"DISK");
    println!(
        "disk: ready blocks={blocks} of={} writes={writes} reads={reads} period_us={period} \
         device={}",
        disk.blk.blocks(),
        disk.blk.transport()
    );

    let mut iterations: u64 = 0;
    let mut next = clock.micros();
    let mut next_line = next + 1_000_000;
    loop {
        disk.write(writes);
        disk.verify(reads);
        iterations += 1;
        if flush_every > 0 && iterations.is_multiple_of(flush_every) {
            disk.flush();
        }
        let now = clock.micros();
        stats::set(Word::Progress, iterations);
        stats::set(Word::Micros, now);
        if now >= next_line {
            if !quiet {
                println!(
                    "disk: t={} iterations={iterations} written={} verified={} flushed={} \
                     errors={}",
                    now / 1_000_000,
                    disk.written,
                    disk.verified,
                    disk.flushed,
                    disk.errors
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

impl Disk {
    /// Gives every block its generation 1.
    fn first_fill(&mut self) {
        let mut from = 0;
        while from < self.blocks {
            let batch = (self.blocks - from).min(self.blk.slots().into());
            self.write_batch(batch, |i| (from + i, 1));
            from += batch;
        }
    }

    fn write(&mut self, count: u64) {
        // A batch never names a block twice: the device may take its requests in any order.
        let most = self.blocks.min(self.blk.slots().into());
        let mut left = count;
        while left > 0 {
            let batch = left.min(most);
            let (written, blocks) = (self.written, self.blocks);
            self.write_batch(batch, |i| {
                ((written + i) % blocks, 2 + (written + i) / blocks)
            });
            self.written += batch;
            stats::set(Word::Written, self.written);
            left -= batch;
        }
    }

    fn verify(&mut self, count: u64) {
        let mut left = count;
        while left > 0 {
            let batch = left.min(self.blk.slots().into());
            for (slot, i) in (0..).zip(0..batch) {
                // What was read is told from what was there: the slot may hold the right block.
                self.blk.data(slot).fill(0);
                self.blk
                    .submit(slot, Op::Read, (self.verified + i) % self.blocks);
            }
            self.finish(batch);
            for (slot, i) in (0..).zip(0..batch) {
                self.check(slot, (self.verified + i) % self.blocks);
            }
            self.verified += batch;
            stats::set(Word::Verified, self.verified);
            left -= batch;
        }
    }

    fn flush(&mut self) {
        if self.blk.can_flush() {
            self.blk.submit(0, Op::Flush, 0);
            self.finish(1);
            self.flushed += 1;
        }
    }

    /// Writes `count` blocks, each with the index and generation that `what` says.
    fn write_batch(&mut self, count: u64, what: impl Fn(u64) -> (u64, u64)) {
        for (slot, i) in (0..).zip(0..count) {
            let (block, generation) = what(i);
            let data = self.blk.data(slot);
            pattern::fill(data, pattern::seed(block, generation));
            data[0] = block;
            data[1] = generation;
            data[2] = checksum(data);
            self.blk.submit(slot, Op::Write, block);
        }
        self.finish(count);
    }

    /// Sends what was submitted and halts until it is done.
    fn finish(&mut self, count: u64) {
        self.blk.kick();
        let mut done = 0;
        while done < count {
            while let Some((slot, good)) = self.blk.complete() {
                done += 1;
                if !good {
                    self.error();
                    if self.errors <= LINES {
                        println!("disk: IO ERROR in slot {slot}");
                    }
                }
            }
            if done < count {
                self.clock.halt_until(None);
                self.blk.acknowledge();
            }
        }
    }

    fn check(&mut self, slot: u16, block: u64) {
        let generation = 1 + (self.written + self.blocks - 1 - block) / self.blocks;
        let data = self.blk.data(slot);
        let head = (data[0], data[1], data[2]);
        let good = head == (block, generation, checksum(data)) && {
            // Words 0 to 2 lie over the pattern; put them back to compare the whole block.
            let seed = pattern::seed(block, generation);
            pattern::fill(&mut data[..3], seed);
            pattern::first_difference(data, seed).is_none()
        };
        if !good {
            self.error();
            if self.errors <= LINES {
                println!(
                    "disk: CORRUPT block={block} generation={generation} got block={} \
                     generation={} checksum={:#018x}",
                    head.0, head.1, head.2
                );
            }
        }
    }

    fn error(&mut self) {
        self.errors += 1;
        stats::set(Word::Errors, self.errors);
    }
}

/// Of a block's words without the third, where it is kept.
fn checksum(data: &[u64]) -> u64 {
    (0..)
        .zip(data)
        .filter(|&(i, _)| i != 2)
        .fold(0, |sum: u64, (_, &word)| sum.rotate_left(7) ^ word)
}
