//! What comparing costs. Promise: 2 million pairs a second of 64-byte datagrams and 10 Gbit/s of
//! full TCP segments on one core, and the same cost a packet from 1 to 10,000 flows.
//! `cargo bench -p colo-proto --bench flows`
#![allow(
    missing_docs,
    reason = "criterion's macros generate undocumented functions"
)]

use std::{hint::black_box, time::Duration};

use bytes::Bytes;
use colo_proto::{
    id::Epoch,
    output::flow::{Flows, Limits},
    time::Instant,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const LIMITS: Limits = Limits {
    bytes: 64 << 20,
    header: 0,
    soonest: Duration::from_millis(10),
    latest: Duration::from_millis(100),
};

fn ip(protocol: u8, client: u32, body: &[u8]) -> Bytes {
    let mut frame = vec![2; 12];
    let len = 20 + body.len() as u16;
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend(len.to_be_bytes());
    frame.extend([0, 1, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 7]);
    frame.extend((0x0a00_0000 + client).to_be_bytes());
    frame.extend(body);
    frame.into()
}

/// 64 bytes with the check sequence that a wire adds.
fn datagram(client: u32) -> Bytes {
    let mut body = vec![0, 53, 0x20, 0, 0, 26, 0, 0];
    body.extend([7; 18]);
    ip(17, client, &body)
}

fn segment(client: u32, seq: u32, payload: &[u8]) -> Bytes {
    let mut body = vec![0, 80, 0x20, 0];
    body.extend(seq.to_be_bytes());
    body.extend([0, 0, 0, 1, 0x80, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    body.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1]);
    body.extend(payload);
    ip(6, client, &body)
}

fn datagrams(c: &mut Criterion) {
    let mut group = c.benchmark_group("datagrams of 64 bytes");
    group.throughput(Throughput::Elements(1));
    for flows in [1, 100, 10_000] {
        let frames: Vec<_> = (0..flows).map(|n| (datagram(n), datagram(n))).collect();
        let mut comparator = Flows::new(LIMITS, 7);
        comparator.commit(Instant::ZERO, Epoch(1));
        let mut next = frames.iter().cycle();
        let mut tag = 0;
        group.bench_function(format!("pairs, {flows} flows"), |b| {
            b.iter(|| {
                let Some((ours, theirs)) = next.next() else {
                    return;
                };
                tag += 1;
                comparator.ours(Instant::ZERO, tag, ours);
                comparator.theirs(Instant::ZERO, Epoch(1), theirs);
                assert_eq!(black_box(comparator.agreed()), Some(tag));
            });
        });
    }
    group.finish();
}

fn segments(c: &mut Criterion) {
    let mut group = c.benchmark_group("TCP segments");
    for (len, flows) in [(1448, 1u32), (1448, 10_000), (64_000, 1)] {
        group.throughput(Throughput::BytesDecimal(len as u64));
        let payload = vec![7; len];
        let mut comparator = Flows::new(LIMITS, 7);
        comparator.commit(Instant::ZERO, Epoch(1));
        // Of each flow two frames that take turns; the numbers go on in them.
        let mut frames: Vec<[Vec<u8>; 2]> = (0..flows)
            .map(|n| [(); 2].map(|()| segment(n, 0, &payload).to_vec()))
            .collect();
        let (mut tag, mut seq) = (0, 0u32);
        group.bench_function(format!("{len} bytes, {flows} flows"), |b| {
            b.iter(|| {
                let at = tag as usize % frames.len();
                tag += 1;
                for frame in &mut frames[at] {
                    frame[38..42].copy_from_slice(&seq.to_be_bytes());
                }
                let [ours, theirs] = &mut frames[at];
                // Lent without a copy, and taken back.
                let (a, b) = (
                    Bytes::from(std::mem::take(ours)),
                    Bytes::from(std::mem::take(theirs)),
                );
                comparator.ours(Instant::ZERO, tag, &a);
                comparator.theirs(Instant::ZERO, Epoch(1), &b);
                assert_eq!(black_box(comparator.agreed()), Some(tag));
                (*ours, *theirs) = (a.into(), b.into());
                if at + 1 == flows as usize {
                    seq = seq.wrapping_add(len as u32);
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, datagrams, segments);
criterion_main!(benches);
