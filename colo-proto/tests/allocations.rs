//! Memory that the steady state asks for, and the sizes of what is handed over at every step.
#![expect(clippy::unwrap_used, reason = "all of this is a test")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    mem::{self, size_of},
    num::NonZeroU32,
    time::Duration,
};

use bytes::BytesMut;
use colo_proto::{
    command::{Command, CommandId},
    config::Config,
    event::Event,
    id::{Generation, PageRun, PageRuns, Slot},
    machine::{Body, Captured, GuestDone, GuestOp, Input, Machine as _, Output, Sink},
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    ram::{CacheMode, PageSet},
    status::Mode,
    testing::{Guest, Host, Pair},
    time::Instant,
    wire::{BATCH_PAGES, BATCH_RUNS, HEAD_LEN, Head, Kind, RUN_LEN, encode_runs},
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

fn set(runs: &[(u64, u32)]) -> PageSet {
    let mut set = PageSet::new(&[(Slot(0), 1 << 20)]);
    for &(first, pages) in runs {
        let pages = NonZeroU32::new(pages).unwrap();
        assert!(set.insert(PageRun {
            slot: Slot(0),
            first,
            pages
        }));
    }
    set
}

/// One batch as a primary builds it: runs out of the set, then head and table in one buffer.
fn batch(set: &mut PageSet) -> BytesMut {
    let runs = set.take_runs(BATCH_PAGES, BATCH_RUNS);
    let mut out = BytesMut::with_capacity(HEAD_LEN + runs.as_slice().len() * RUN_LEN);
    Head::new(Kind::Pages, Generation(1), 1).put(&mut out);
    encode_runs(&runs, &mut out);
    out
}

#[test]
fn a_batch_costs_the_same_however_many_pages_it_has() {
    let (mut small, mut large) = (set(&[(70, 64)]), set(&[(70, 1024)]));
    let few = calls(|| drop(batch(&mut small)));
    let many = calls(|| drop(batch(&mut large)));
    assert!(small.is_empty() && large.is_empty());
    assert!(few > 0, "the counter counts");
    assert_eq!(few, many);
}

#[test]
fn batches_cost_in_proportion_to_their_number() {
    let mut one = set(&[(0, 1024)]);
    let mut many = set(&[(0, 64 * 1024)]);
    let once = calls(|| drop(batch(&mut one)));
    let all = calls(|| {
        while !many.is_empty() {
            drop(batch(&mut many));
        }
    });
    assert_eq!(all, 64 * once);
}

#[test]
fn a_kept_buffer_and_a_dirty_log_cost_nothing() {
    let words = vec![0x0001_0001_0001_0001; 1 << 14];
    let mut set = set(&[]);
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

/// A guest without contents: nothing that it does asks for memory, but its dirty log.
#[derive(Default)]
struct Empty {
    dirty: Vec<u64>,
}

impl Guest for Empty {
    type Contents = ();

    fn operate(&mut self, op: GuestOp) -> GuestDone {
        match op {
            GuestOp::Capture { epoch, .. } => GuestDone::Captured(Captured::new(epoch, 64)),
            other => other.done(),
        }
    }

    fn dirty(&mut self) -> Vec<(Slot, Vec<u64>)> {
        let none = vec![0; SIZE as usize / 64];
        vec![(Slot(0), mem::replace(&mut self.dirty, none))]
    }

    fn read(&mut self, _: &Body) {}

    fn write(&mut self, _: &Sink, (): ()) {}
}

const SIZE: u64 = 1 << 20;

fn protected(mode: Mode, cache: CacheMode) -> Pair<Empty> {
    let host = |id: u64, start| {
        let member = MemberConfig::new(VmId([7; 16]), NodeId(3 - id), MacKey([7; 16]));
        let config = Config::builder(NodeId(id), member, &[(Slot(0), SIZE)])
            .longest(Duration::from_secs(3600))
            .mode(mode)
            .cache(cache)
            .build()
            .unwrap();
        let node = Node::new(config, start, BootId(id), None, id, Instant::ZERO);
        Host::new(node, Empty::default())
    };
    let first = host(1, Start::Primary);
    let mut pair = Pair::new(first.node().channels(), Instant::ZERO);
    pair.start(0, first);
    pair.start(1, host(2, Start::Secondary));
    pair.run(Duration::from_secs(2)).unwrap();
    assert!(pair.host(0).unwrap().node().status().protected);
    pair
}

/// Allocations of both machines, and of what drives them, in a checkpoint of `pages` pages, each a
/// run of its own if `apart`.
fn checkpoint(pair: &mut Pair<Empty>, pages: usize, apart: bool) -> u64 {
    // Nothing else is to happen meanwhile, and the next checkpoint may be taken.
    pair.run(Duration::from_millis(100)).unwrap();
    for host in 0..2 {
        let dirty = &mut pair.host_mut(host).unwrap().guest.dirty;
        *dirty = vec![0; SIZE as usize / 64];
        let stride = if apart { 2 } else { 1 };
        for page in (0..pages).map(|page| page * stride) {
            dirty[page / 64] |= 1 << (page % 64);
        }
    }
    while pair.report().is_some() {}
    let calls = calls(|| {
        let asked = Input::Command(CommandId(1), Command::CheckpointNow);
        pair.input(0, asked).unwrap();
        pair.settle().unwrap();
    });
    let mut sent = None;
    while let Some((_, report)) = pair.report() {
        if let Output::Event(Event::Checkpointed { pages, .. }) = report {
            sent = Some(pages);
        }
    }
    assert_eq!(sent, Some(pages as u64));
    calls
}

#[test]
fn a_checkpoint_costs_the_same_however_many_pages_it_has() {
    for mode in [Mode::Standby, Mode::Lockstep] {
        for cache in [CacheMode::Union, CacheMode::Full] {
            let mut pair = protected(mode, cache);
            // Queues have their size after this.
            checkpoint(&mut pair, 1024, false);
            let few = checkpoint(&mut pair, 64, false);
            let many = checkpoint(&mut pair, 1024, false);
            assert_eq!(few, many, "{mode:?}, {cache:?}");
            let few = checkpoint(&mut pair, 8, true);
            let many = checkpoint(&mut pair, 512, true);
            println!("{mode:?}, {cache:?}: {few} and {many}");
            assert_eq!(few, many, "{mode:?}, {cache:?}");
        }
    }
}

// Inputs and outputs are moved at every step and events among them: two cache lines at most, one for
// an input (120, 128 and 64 bytes today). What grows past that belongs in a box.
const _: () = assert!(size_of::<Event>() <= 128);
const _: () = assert!(size_of::<Output>() <= 128);
const _: () = assert!(size_of::<Input<'_>>() <= 64);
