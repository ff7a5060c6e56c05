//! Decoding a recording that lies in memory, page bytes skipped. Promise: at least 4 GB/s.
#![allow(
    missing_docs,
    reason = "criterion's macros generate undocumented functions"
)]
#![expect(
    clippy::expect_used,
    reason = "a bench without its fixture has nothing to measure"
)]

use std::{hint::black_box, io::Read, path::Path};

use colo_proto::qemu::{Expectation, Limits, Reader};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn recording() -> Vec<u8> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/qemu72-pc-1vcpu.p2s.xz");
    let packed = std::fs::read(path).expect("the fixture is in the repository");
    let mut bytes = Vec::new();
    xz2::read::XzDecoder::new(&packed[..])
        .read_to_end(&mut bytes)
        .expect("the fixture is whole");
    bytes
}

fn decode(c: &mut Criterion) {
    let data = recording();
    let mut group = c.benchmark_group("qemu_decode");
    group.throughput(Throughput::Bytes(data.len() as u64));
    group.bench_function("recording", |b| {
        b.iter(|| {
            let mut reader = Reader::new(Limits::default(), Expectation::default());
            let mut input = black_box(&data[..]);
            let mut items = 0u64;
            while let Ok(Some(item)) = reader.skip_pages(&mut input) {
                black_box(item);
                items += 1;
            }
            assert!(input.is_empty());
            items
        });
    });
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
