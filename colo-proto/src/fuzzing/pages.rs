//! Page sets against a set of numbers.

use alloc::collections::BTreeSet;
use core::num::NonZeroU32;

use super::Program;
use crate::{
    id::{PageRun, PageRuns, Slot},
    ram::{Cache, CacheMode, PageSet},
};

const SLOTS: &[(Slot, u64)] = &[(Slot(0), 200), (Slot(3), 65)];

type Reference = BTreeSet<(u16, u64)>;

/// Runs operations on a set, a cache and their references.
pub fn page_sets(data: &[u8]) {
    let mut program = Program(data);
    let mode = if program.byte() & 1 == 0 {
        CacheMode::Union
    } else {
        CacheMode::Full
    };
    let (mut set, mut expect) = (PageSet::new(SLOTS), Reference::new());
    let mut cache = Cache::new(mode, SLOTS);
    let (mut received, mut own) = (Reference::new(), Reference::new());
    while let Some(operation) = program.next() {
        let run = run(&mut program);
        let pages = || (run.first..run.end()).map(|page| (run.slot.0, page));
        let within = SLOTS.iter().any(|s| s.0 == run.slot && run.end() <= s.1);
        match operation % 9 {
            0 => {
                assert_eq!(set.insert(run), within);
                expect.extend(pages().filter(|_| within));
            }
            1 => {
                assert_eq!(set.remove(run), within);
                pages().filter(|_| within).for_each(|page| {
                    expect.remove(&page);
                });
            }
            2 => {
                let words = words(&mut program);
                assert_eq!(set.merge(run.slot, &words), known(run.slot));
                expect.extend(bits(run.slot, &words));
            }
            3 => {
                let (most, runs) = (u32::from(program.byte()), usize::from(program.byte() % 9));
                let taken = set.take_runs(most, runs);
                assert!(taken.pages() <= u64::from(most) && taken.as_slice().len() <= runs);
                for page in numbers(&taken) {
                    assert_eq!(expect.pop_first(), Some(page), "the lowest first");
                }
                assert!(!taken.is_empty() || most == 0 || runs == 0 || expect.is_empty());
            }
            4 => {
                let any = pages().any(|page| expect.contains(&page));
                assert_eq!(set.intersects(run), within.then_some(any));
            }
            5 => {
                assert_eq!(cache.receive(run), within);
                received.extend(pages().filter(|_| within));
            }
            6 => {
                let words = words(&mut program);
                assert_eq!(cache.own_dirty(run.slot, &words), known(run.slot));
                own.extend(bits(run.slot, &words));
            }
            7 => {
                cache.abandon();
                received.clear();
            }
            _ => {
                let covered = mode == CacheMode::Full || own.is_subset(&received);
                assert_eq!(cache.covers_own(), covered);
                if mode == CacheMode::Full {
                    received.extend(&own);
                }
                let commit: Reference = numbers(&cache.commit()).collect();
                assert_eq!(commit, received);
                own.clear();
                received.clear();
            }
        }
        assert_eq!(set.count(), expect.len() as u64);
        assert_eq!(set.is_empty(), expect.is_empty());
        assert_eq!(cache.received(), received.len() as u64);
        assert_eq!(cache.own().count(), own.len() as u64);
    }
}

fn run(program: &mut Program<'_>) -> PageRun {
    let (slot, first, pages) = (program.byte(), program.byte(), program.byte());
    PageRun {
        slot: Slot(u16::from(slot % 4)),
        first: if first == 255 {
            u64::MAX - 300
        } else {
            u64::from(first)
        },
        pages: NonZeroU32::MIN.saturating_add(u32::from(pages)),
    }
}

fn words(program: &mut Program<'_>) -> [u64; 4] {
    core::array::from_fn(|_| u64::from(program.byte()).wrapping_mul(0x8040_2010_0804_0201))
}

fn size(slot: Slot) -> u64 {
    SLOTS.iter().find(|s| s.0 == slot).map_or(0, |s| s.1)
}

fn known(slot: Slot) -> bool {
    size(slot) > 0
}

fn bits(slot: Slot, words: &[u64; 4]) -> impl Iterator<Item = (u16, u64)> {
    (0..size(slot).min(256))
        .filter(|&page| words[page as usize / 64] >> (page % 64) & 1 == 1)
        .map(move |page| (slot.0, page))
}

fn numbers(runs: &PageRuns) -> impl Iterator<Item = (u16, u64)> {
    runs.iter()
        .flat_map(|run| (run.first..run.end()).map(|page| (run.slot.0, page)))
}
