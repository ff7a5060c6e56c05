//! A toy guest: 32 pages of one word each, a small disk, and a program that answers client frames
//! with a hash of everything it has ever consumed and read.

use std::collections::VecDeque;

use bytes::Bytes;
use colo_proto::{
    id::{Epoch, PageRuns},
    machine::GuestOp,
};

use crate::{disk::Disk, world::Micros};

/// Pages of a toy guest.
pub const PAGES: usize = 32;
const MAGIC: u64 = 0x746f_795f_6775_6573;
/// Words of a device state.
const WORDS: usize = 8;

/// The contents that the world's driver carries for one host.
#[derive(Clone, Debug)]
pub struct Guest {
    pub(crate) ram: [u64; PAGES],
    pub(crate) dirty: u64,
    pub(crate) cache: [u64; PAGES],
    pub(crate) staging: [u64; PAGES],
    pub(crate) state_out: Vec<u8>,
    pub(crate) state_in: Vec<u8>,
    pub(crate) running: bool,
    pub(crate) epoch: Epoch,
    /// Client frames consumed, over all epochs.
    pub(crate) ticks: u64,
    /// Hash over the whole history; names the state.
    pub(crate) history: u64,
    pub(crate) disk: Disk,
    /// The newest checkpoint that was found whole.
    pub(crate) checked: Option<Epoch>,
    /// Until when a check waits for what the disk needs.
    pub(crate) patience: Micros,
    pub(crate) consumed: u64,
    pub(crate) card: VecDeque<(u64, Bytes)>,
    /// RAM, disk and devices are of one moment.
    pub(crate) whole: bool,
    /// Nothing was ever put into it: it can only boot.
    pub(crate) blank: bool,
    pub(crate) busy: Option<GuestOp>,
}

/// Mixes two numbers.
pub(crate) const fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Guest {
    pub(crate) fn new(running: bool) -> Self {
        Self {
            ram: [0; PAGES],
            dirty: if running { (1 << PAGES) - 1 } else { 0 },
            cache: [0; PAGES],
            staging: [0; PAGES],
            state_out: Vec::new(),
            state_in: vec![0; WORDS * 8],
            running,
            epoch: Epoch(0),
            ticks: 0,
            history: 1,
            disk: Disk::default(),
            checked: None,
            patience: 0,
            consumed: 0,
            card: VecDeque::new(),
            whole: running,
            blank: !running,
            busy: None,
        }
    }

    pub(crate) fn store(&mut self, page: usize, value: u64) {
        self.ram[page % PAGES] = value;
        self.dirty |= 1 << (page % PAGES);
    }

    /// Consumes one client frame; yields the history before and after.
    pub(crate) fn step(&mut self, salt: u64) -> Option<(u64, u64, Bytes)> {
        if !self.running {
            return None;
        }
        let (index, frame) = self.card.pop_front()?;
        let said = frame.iter().fold(0, |hash, b| mix(hash, u64::from(*b)));
        let before = self.history;
        self.consumed = index;
        self.ticks += 1;
        let block = usize::try_from(before % 8).unwrap_or(0);
        self.history = mix(mix(mix(before, said), salt), self.disk.read(block));
        self.disk.write(block, self.history);
        let (ticks, history) = (self.ticks, self.history);
        self.store(usize::try_from(history % 31).unwrap_or(0), history);
        self.store(31, ticks);
        let mut reply = vec![0; 12];
        reply.extend([0x88, 0xb5]);
        reply.extend(ticks.to_le_bytes());
        reply.extend(history.to_le_bytes());
        // As long as what it answers.
        reply.resize(frame.len().max(reply.len()), 0);
        Some((before, history, reply.into()))
    }

    fn sum(&self) -> u64 {
        self.ram.iter().fold(0, |sum, word| mix(sum, *word))
    }

    pub(crate) fn capture(&mut self, also: &PageRuns) {
        // What is neither dirty nor asked for is not in the staging area; sending it would show.
        self.staging = [0xdead; PAGES];
        let wanted = self.dirty | bits(also);
        for page in 0..PAGES {
            if wanted & (1 << page) != 0 {
                self.staging[page] = self.ram[page];
            }
        }
        let (replication, writes) = (self.disk.replication(), self.disk.writes);
        let mut words = vec![
            MAGIC,
            self.ticks,
            self.history,
            self.disk.sum(),
            self.sum(),
            replication,
            writes,
        ];
        words.push(words.iter().fold(0, |sum, word| mix(sum, *word)));
        self.state_out = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    }

    fn words(&self) -> Vec<u64> {
        let (words, _) = self.state_in.as_chunks::<8>();
        words.iter().map(|word| u64::from_le_bytes(*word)).collect()
    }

    pub(crate) fn state_is_good(&self) -> bool {
        let words = self.words();
        words.len() == WORDS
            && words[0] == MAGIC
            && words[..7].iter().fold(0, |sum, word| mix(sum, *word)) == words[7]
    }

    /// The replication that the arrived state belongs to, and how many of its writes.
    pub(crate) fn needs(&self) -> (u64, u64) {
        match self.words()[..] {
            [.., replication, writes, _] => (replication, writes),
            _ => (0, 0),
        }
    }

    pub(crate) fn commit(&mut self, runs: &PageRuns) {
        let wanted = bits(runs);
        for page in 0..PAGES {
            if wanted & (1 << page) != 0 {
                self.ram[page] = self.cache[page];
            }
        }
        self.dirty &= !wanted;
        self.whole = false;
        self.blank = false;
    }

    /// Loads the state; says what is not as it was at the capture.
    pub(crate) fn load(&mut self, epoch: Epoch, inputs: u64) -> Option<&'static str> {
        let words = self.words();
        (self.ticks, self.history) = (words[1], words[2]);
        self.consumed = inputs;
        self.epoch = epoch;
        self.card.clear();
        self.whole = true;
        if self.sum() != words[4] {
            return Some("RAM after a commit is not what it was at the capture");
        }
        (self.disk.sum() != words[3]).then_some("the disk is not what it was at the capture")
    }
}

/// The pages of runs, as bits.
pub(crate) fn bits(runs: &PageRuns) -> u64 {
    runs.iter()
        .flat_map(|run| run.first..run.end())
        .fold(0, |bits, page| bits | 1 << (page % PAGES as u64))
}
