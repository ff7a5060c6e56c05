//! Memory that the steady state asks for, and the sizes of what is handed over at every step.
#![expect(clippy::unwrap_used, reason = "all of this is a test")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    mem::size_of,
    time::Duration,
};

use colo_proto::{
    command::{Command, CommandId},
    config::Config,
    event::Event,
    id::{PageRuns, Slot},
    machine::{Body, GuestDone, GuestOp, Input, Machine as _, Output, Sink},
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    ram::{CacheMode, PageSet},
    testing::{Guest, Host, Pair},
    time::Instant,
    wire::{BATCH_PAGES, BATCH_RUNS},
};

std::thread_local! {
    /// Calls of this thread's tests alone.
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: hands every call on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`, which is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: `at` came from `System` with this layout; the caller vouches for `size`.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls(work: impl FnOnce()) -> u64 {
    let before = CALLS.get();
    work();
    CALLS.get() - before
}

/// 4,096 pages that nobody looks into.
#[derive(Clone, Default)]
struct Pages {
    dirty: Vec<u64>,
}

const PAGES: u64 = 4096;

impl Guest for Pages {
    type Contents = ();

    fn operate(&mut self, op: GuestOp) -> GuestDone {
        op.done()
    }

    fn dirty(&mut self) -> Vec<(Slot, Vec<u64>)> {
        vec![(Slot(0), std::mem::take(&mut self.dirty))]
    }

    fn read(&mut self, _: &Body) {}

    fn write(&mut self, _: &Sink, (): ()) {}
}

/// A pair in step.
fn pair(cache: CacheMode) -> Pair<Pages> {
    let host = |id, start| {
        let member = MemberConfig::new(VmId([7; 16]), NodeId(3 - id), MacKey([7; 16]));
        let config = Config::builder(NodeId(id), member, &[(Slot(0), PAGES)])
            .cache(cache)
            .longest(Duration::from_secs(3600))
            .build()
            .unwrap();
        let node = Node::new(config, start, BootId(id), None, id, Instant::ZERO);
        Host::new(node, Pages::default())
    };
    let primary = host(1, Start::Primary);
    let mut pair = Pair::new(primary.node().channels(), Instant::ZERO);
    pair.start(0, primary);
    pair.start(1, host(2, Start::Secondary));
    while !pair.host(0).unwrap().node().status().protected {
        pair.run(Duration::from_millis(1)).unwrap();
    }
    pair
}

/// A checkpoint of the pages of `words`, on both hosts: how many pages it had, and how often it
/// asked for memory, test harness included.
fn checkpoint(pair: &mut Pair<Pages>, words: &[u64]) -> (u64, u64) {
    while pair.report().is_some() {}
    pair.host_mut(0).unwrap().guest.dirty = words.to_vec();
    let allocations = calls(|| {
        let now = Input::Command(CommandId(1), Command::CheckpointNow);
        pair.input(0, now).unwrap();
        pair.run(Duration::from_millis(10)).unwrap();
    });
    let mut pages = 0;
    while let Some((_, said)) = pair.report() {
        if let Output::Event(Event::Checkpointed { pages: n, .. }) = said {
            pages += n;
        }
    }
    (pages, allocations)
}

#[test]
fn a_checkpoint_costs_the_same_however_many_pages_it_has() {
    let run = |pages: usize| vec![u64::MAX; pages / 64];
    // Two pages, two not, and so on.
    let scattered = |pages: usize| vec![0x3333_3333_3333_3333; pages / 32];
    for cache in [CacheMode::Union, CacheMode::Full] {
        let mut steady = pair(cache);
        for words in [run(1024), scattered(1024)] {
            checkpoint(&mut steady, &words);
        }
        for (few, many) in [(run(64), run(1024)), (scattered(64), scattered(1024))] {
            let (pages, few) = checkpoint(&mut steady.clone(), &few);
            assert_eq!(pages, 64);
            let (pages, many) = checkpoint(&mut steady.clone(), &many);
            assert_eq!(pages, 1024);
            assert!(few > 0, "the counter counts");
            assert_eq!(few, many, "{cache:?}");
        }
    }
}

#[test]
fn a_kept_buffer_and_a_dirty_log_cost_nothing() {
    let words = vec![0x0001_0001_0001_0001; 1 << 14];
    let mut set = PageSet::new(&[(Slot(0), 1 << 20)]);
    set.merge(Slot(0), &words);
    let mut runs = PageRuns::new();
    set.take_runs_into(BATCH_PAGES, BATCH_RUNS, &mut runs);
    let again = calls(|| {
        for _ in 0..10 {
            set.merge(Slot(0), &words);
            while !set.is_empty() {
                set.take_runs_into(BATCH_PAGES, BATCH_RUNS, &mut runs);
            }
        }
    });
    assert_eq!(again, 0);
}

// Inputs and outputs are moved at every step and events among them: two cache lines at most, one for
// an input (120, 128 and 64 bytes today). What grows past that belongs in a box.
const _: () = assert!(size_of::<Event>() <= 128);
const _: () = assert!(size_of::<Output>() <= 128);
const _: () = assert!(size_of::<Input<'_>>() <= 64);
