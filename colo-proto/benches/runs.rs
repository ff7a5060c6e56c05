//! What a checkpoint of a 4 GiB guest costs before a page is touched: 128 KiB of dirty bitmap
//! joined and turned into runs, and heads written and read. Promise: bitmap to runs at 1 % dirty
//! under 60 µs. `cargo bench -p colo-proto --bench runs`
#![allow(
    missing_docs,
    reason = "criterion's macros generate undocumented functions"
)]

use std::hint::black_box;

use bytes::BytesMut;
use colo_proto::{
    id::{Channel, Generation, PageRuns, Slot},
    ram::PageSet,
    wire::{BATCH_PAGES, BATCH_RUNS, HEAD_LEN, Head, Kind},
};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

const PAGES: u64 = 1 << 20;
const WORDS: usize = PAGES as usize / 64;

/// 1 % of the pages, in runs of `run` pages at even distances.
fn words(run: u64) -> Vec<u64> {
    let mut words = vec![0; WORDS];
    for page in (0..PAGES).filter(|page| page % (100 * run) < run) {
        words[page as usize / 64] |= 1 << (page % 64);
    }
    words
}

/// 1 % of the pages, each by chance.
fn scattered() -> Vec<u64> {
    let mut words = vec![0; WORDS];
    let mut state = 1_u64;
    for page in 0..PAGES {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        if state >> 33 < (1 << 31) / 100 {
            words[page as usize / 64] |= 1 << (page % 64);
        }
    }
    words
}

fn runs(c: &mut Criterion) {
    let mut group = c.benchmark_group("runs");
    let logs = [1, 8, 64].map(|run| (format!("in runs of {run}"), words(run)));
    for (how, log) in logs.into_iter().chain([("by chance".into(), scattered())]) {
        let mut dirty = PageSet::new(&[(Slot(0), PAGES)]);
        dirty.merge(Slot(0), &log);
        let mut batch = PageRuns::new();
        group.bench_function(format!("4 GiB, 1 % dirty {how}"), |b| {
            b.iter_batched_ref(
                || dirty.clone(),
                |set| {
                    let mut pages = 0;
                    loop {
                        set.take_runs_into(BATCH_PAGES, BATCH_RUNS, &mut batch);
                        if batch.is_empty() {
                            return pages;
                        }
                        pages += black_box(&batch).pages();
                    }
                },
                BatchSize::SmallInput,
            );
        });
        let mut set = PageSet::new(&[(Slot(0), PAGES)]);
        group.bench_function(format!("merge of 128 KiB {how}"), |b| {
            b.iter(|| set.merge(Slot(0), black_box(&log)));
        });
    }
    group.finish();
}

fn head(c: &mut Criterion) {
    let head = Head::new(Kind::Pages, Generation(3), 9);
    let mut out = BytesMut::with_capacity(HEAD_LEN);
    c.bench_function("head/encode", |b| {
        b.iter(|| {
            out.clear();
            black_box(&head).put(&mut out);
        });
    });
    let mut bytes = [0; HEAD_LEN];
    bytes.copy_from_slice(&head.with_body(&[]));
    c.bench_function("head/decode", |b| {
        b.iter(|| Head::decode(Channel::Ram(0), black_box(&bytes)));
    });
}

criterion_group!(benches, runs, head);
criterion_main!(benches);
