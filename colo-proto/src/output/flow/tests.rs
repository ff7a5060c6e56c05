//! The comparator as a specification, and against arrays of bytes.

use alloc::{vec, vec::Vec};
use proptest::prelude::*;

use super::*;
use crate::output::packet::sample::Sample;

const LIMITS: Limits = Limits {
    bytes: 4 << 20,
    header: 0,
    soonest: Duration::from_millis(10),
    latest: Duration::from_millis(100),
};
const SYN: u8 = flag::SYN;
const FIN: u8 = flag::FIN;
const RST: u8 = flag::RST;

/// A comparator, and what each side says to it.
struct Pair {
    flows: Flows,
    now: Instant,
    tags: u64,
}

impl Pair {
    fn new() -> Self {
        let mut flows = Flows::new(LIMITS, 7);
        flows.commit(Instant::ZERO, Epoch(1));
        Self {
            flows,
            now: Instant::ZERO,
            tags: 0,
        }
    }

    fn ours(&mut self, frame: Vec<u8>) -> u64 {
        self.tags += 1;
        let _report = self.flows.ours(self.now, self.tags, &frame.into());
        self.tags
    }

    fn theirs(&mut self, frame: Vec<u8>) {
        self.flows
            .theirs(self.now, self.flows.epoch(), &frame.into());
    }

    fn released(&mut self) -> Vec<u64> {
        core::iter::from_fn(|| self.flows.agreed()).collect()
    }

    fn cause(&mut self) -> Option<Difference> {
        self.flows.parted().map(|d| d.cause)
    }
}

fn segment(seq: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let sample = Sample {
        flags,
        ..Sample::PLAIN
    };
    sample.tcp(seq, payload)
}

#[test]
fn streams_agree_however_they_are_cut_and_numbered() {
    let mut pair = Pair::new();
    let syn = pair.ours(segment(1000, SYN, b""));
    assert_eq!(pair.released(), []);
    pair.theirs(segment(5000, SYN, b""));
    assert_eq!(pair.released(), [syn]);
    let all = pair.ours(segment(1001, 0, b"hello world"));
    pair.theirs(segment(5001, 0, b"hello"));
    assert_eq!(pair.released(), []);
    assert_eq!(pair.flows.accounted(), 2);
    pair.theirs(segment(5006, FIN, b" world"));
    assert_eq!(pair.released(), [all]);
    let fin = pair.ours(segment(1012, FIN, b""));
    assert_eq!(pair.released(), [fin]);
    assert_eq!(pair.cause(), None);
    assert_eq!(pair.flows.accounted(), 3);
}

#[test]
fn what_says_nothing_new_does_not_wait() {
    let mut pair = Pair::new();
    let ack = pair.ours(segment(1000, 0, b""));
    assert_eq!(
        pair.released(),
        [ack],
        "no word of the other guest is needed"
    );
    let data = pair.ours(segment(1000, 0, b"abc"));
    let behind = pair.ours(segment(1003, 0, b""));
    assert_eq!(pair.released(), [behind]);
    pair.theirs(segment(1000, 0, b"abc"));
    assert_eq!(pair.released(), [data]);
    let again = pair.ours(segment(1000, 0, b"abc"));
    assert_eq!(pair.released(), [again]);
}

#[test]
fn overlapping_repetitions_are_no_difference() {
    let mut pair = Pair::new();
    pair.ours(segment(1000, 0, &[1; 100]));
    pair.theirs(segment(1000, 0, &[1; 100]));
    let p = pair.ours(segment(1050, 0, &[1; 100]));
    pair.theirs(segment(1100, 0, &[1; 50]));
    let q = pair.ours(segment(1150, 0, &[1; 50]));
    pair.theirs(segment(1050, 0, &[1; 150]));
    assert_eq!(pair.released(), [1, p, q]);
    assert_eq!(pair.cause(), None);
}

#[test]
fn a_connection_that_parts_leaves_its_neighbours_alone() {
    let mut pair = Pair::new();
    pair.ours(segment(1000, 0, b"one"));
    pair.theirs(segment(1000, 0, b"two"));
    let parted = pair.flows.parted().unwrap();
    assert_eq!((parted.offset, parted.cause), (0, Difference::Payload));
    assert_eq!(
        (&parted.ours[..], &parted.theirs[..]),
        (&b"one"[..], &b"two"[..])
    );
    pair.ours(segment(1003, 0, b"more"));
    pair.theirs(segment(1003, 0, b"more"));
    assert_eq!(pair.cause(), None, "said once");
    let mut other = Sample::PLAIN;
    other.ports = [80, 4001];
    let tag = pair.ours(other.tcp(9, b"same"));
    pair.theirs(other.tcp(9, b"same"));
    assert_eq!(pair.released(), [tag]);
    // A checkpoint makes both one again.
    pair.flows.commit(pair.now, Epoch(2));
    let tag = pair.ours(segment(1007, 0, b"three"));
    pair.theirs(segment(1007, 0, b"three"));
    assert_eq!(pair.released(), [tag]);
}

#[test]
fn a_flow_that_is_held_is_not_forgotten_and_then_compared_within_an_interval() {
    let mut pair = Pair::new();
    pair.flows = Flows::new(
        Limits {
            bytes: 8 * FLOW,
            ..LIMITS
        },
        7,
    );
    // It parts until it is no longer compared.
    for epoch in 1.. {
        pair.flows.commit(pair.now, Epoch(epoch));
        pair.ours(Sample::PLAIN.udp(b"a"));
        if pair.flows.held() == pair.flows.len() * FLOW {
            break;
        }
        for _ in 0..16 {
            pair.theirs(Sample::PLAIN.udp(b"b"));
        }
        while pair.flows.parted().is_some() {}
    }
    // Now its first datagram of the interval is held. Others need the room.
    let mut other = Sample::PLAIN;
    for port in 1..20 {
        other.ports = [53, port];
        pair.ours(other.udp(b"x"));
        pair.theirs(other.udp(b"x"));
    }
    while pair.flows.agreed().is_some() {}
    pair.ours(Sample::PLAIN.udp(b"c"));
    pair.theirs(Sample::PLAIN.udp(b"c"));
    assert_eq!(pair.released(), [], "the one before it has not left");
}

#[test]
fn ends_resets_and_handshakes_must_be_said_by_both() {
    let mut pair = Pair::new();
    pair.ours(segment(1000, FIN, b"x"));
    pair.theirs(segment(1000, 0, b"x"));
    assert_eq!(pair.released(), []);
    pair.theirs(segment(1001, 0, b"more"));
    assert_eq!(pair.cause(), Some(Difference::End));

    let mut pair = Pair::new();
    let reset = pair.ours(segment(1000, RST, b""));
    assert_eq!(pair.released(), []);
    pair.theirs(segment(1000, RST, b""));
    assert_eq!(pair.released(), [reset]);

    let mut pair = Pair::new();
    let syn = |options: &[u8]| {
        let sample = Sample {
            flags: SYN,
            ..Sample::PLAIN
        };
        sample.tcp_with(7, options, b"")
    };
    pair.ours(syn(&[2, 4, 5, 0xb4]));
    pair.theirs(syn(&[2, 4, 5, 0xb0]));
    assert_eq!(pair.cause(), Some(Difference::Options));
}

#[test]
fn a_tuple_used_again_is_another_connection() {
    let mut pair = Pair::new();
    for (p, s) in [(1000, 5000), (90_000, 77)] {
        pair.ours(segment(p, SYN, b""));
        pair.theirs(segment(s, SYN, b""));
        pair.ours(segment(p + 1, FIN, b"bytes"));
        pair.theirs(segment(s + 1, FIN, b"bytes"));
        assert_eq!(pair.released().len(), 2);
    }
    pair.ours(segment(500, SYN, b""));
    pair.theirs(segment(500, SYN, b""));
    pair.ours(segment(501, 0, b"ZZZ"));
    pair.theirs(segment(501, 0, b"YYY"));
    assert_eq!(pair.released().len(), 1);
    assert!(pair.cause().is_some());
}

#[test]
fn datagrams_agree_within_a_window_and_leave_in_order() {
    let mut pair = Pair::new();
    let udp = |text: &[u8]| Sample::PLAIN.udp(text);
    let one = pair.ours(udp(b"1"));
    let two = pair.ours(udp(b"2"));
    pair.theirs(udp(b"2"));
    assert_eq!(pair.released(), []);
    pair.theirs(udp(b"1"));
    assert_eq!(pair.released(), [one, two]);
    pair.ours(udp(b"3"));
    for n in 0..16u8 {
        assert_eq!(pair.cause(), None);
        pair.theirs(udp(&[n]));
    }
    assert_eq!(pair.cause(), Some(Difference::Payload));
}

#[test]
fn a_frame_that_waits_too_long_parts_its_flow() {
    let mut pair = Pair::new();
    pair.ours(segment(1000, 0, b"alone"));
    let due = pair.flows.poll_timeout().unwrap();
    assert_eq!(due, Instant::ZERO + LIMITS.latest);
    pair.flows.handle_timeout(due);
    assert_eq!(pair.cause(), Some(Difference::Unanswered));
    assert_eq!(pair.flows.poll_timeout(), None);
}

#[test]
fn frames_that_are_no_ip_are_compared_whole_and_in_order() {
    let mut pair = Pair::new();
    let frame = |n| vec![n; 20];
    pair.ours(frame(1));
    pair.theirs(frame(1));
    pair.ours(frame(2));
    assert_eq!(pair.released(), [1]);
    pair.theirs(frame(3));
    assert!(pair.cause().is_some());
}

#[test]
fn numbers_and_clocks_are_reported_before_they_may_leave() {
    let mut flows = Flows::new(LIMITS, 7);
    flows.commit(Instant::ZERO, Epoch(3));
    let stamped = |flags, seq, stamp: u32| {
        let [a, b, c, d] = stamp.to_be_bytes();
        let sample = Sample {
            flags,
            ..Sample::PLAIN
        };
        Bytes::from(sample.tcp_with(seq, &[8, 10, a, b, c, d, 0, 0, 0, 0], b""))
    };
    let report = flows
        .ours(Instant::ZERO, 1, &stamped(SYN, 1000, 50))
        .unwrap();
    assert_eq!(
        (report.isn, report.stamp, report.opened),
        (Some(1000), Some(50), 1)
    );
    let clock = report.clock.unwrap();
    assert_eq!(
        flows.ours(Instant::ZERO, 2, &stamped(SYN, 1000, 51)),
        None,
        "again"
    );
    assert_eq!(flows.ours(Instant::ZERO, 3, &stamped(0, 1001, clock)), None);
    let report = flows
        .ours(Instant::ZERO, 4, &stamped(0, 1001, clock + 1))
        .unwrap();
    assert_eq!(
        (report.isn, report.clock),
        (None, Some(clock + 1 + CLOCK_AHEAD))
    );
}

#[test]
fn a_flow_that_never_agrees_is_held_without_being_compared() {
    let mut pair = Pair::new();
    let mut causes = 0;
    for epoch in 2..30 {
        let seq = 1000 + 4 * epoch as u32;
        pair.ours(segment(seq, 0, b"this"));
        pair.theirs(segment(seq, 0, b"that"));
        causes += u32::from(pair.cause().is_some());
        pair.flows.commit(pair.now, Epoch(epoch));
    }
    assert_eq!(causes, 5, "three, and a trial after 4 and after 8 epochs");
}

/// One side's segments for a stream: cut, repeated and shuffled a little.
fn segments(stream: &[u8], isn: u32, cuts: &[(u8, u8)]) -> Vec<(u32, u8, Vec<u8>)> {
    let mut out = vec![(isn, SYN, vec![])];
    let (mut at, mut cuts) = (0, cuts.iter().cycle());
    while at < stream.len() {
        let (len, back) = cuts.next().copied().unwrap_or((9, 0));
        let from = at - usize::from(back % 8).min(at);
        let to = (at + 1 + usize::from(len % 40)).min(stream.len());
        let flags = if to == stream.len() { FIN } else { 0 };
        let seq = isn.wrapping_add(1 + from as u32);
        out.push((seq, flags, stream[from..to].to_vec()));
        at = to;
    }
    out
}

proptest! {
    /// Equal streams never part and everything is released, whatever the cuts, the repetitions,
    /// the numbers and the interleaving; where one byte differs, nothing after it is.
    #[test]
    fn equal_streams_agree_and_nothing_after_a_difference_leaves(
        stream in prop::collection::vec(any::<u8>(), 1..300),
        flip in prop::option::of(0usize..300),
        isns: [u32; 2],
        cuts in prop::collection::vec(any::<(u8, u8)>(), 1..20),
        others in prop::collection::vec(any::<(u8, u8)>(), 1..20),
        mut order in prop::collection::vec(any::<bool>(), 0..200),
        swaps in prop::collection::vec(any::<bool>(), 0..60),
    ) {
        let flip = flip.filter(|at| *at < stream.len());
        let mut changed = stream.clone();
        if let Some(at) = flip {
            changed[at] ^= 1;
        }
        let mut ours = segments(&stream, isns[0], &cuts);
        let mut theirs = segments(&changed, isns[1], &others);
        for (n, swap) in swaps.iter().enumerate() {
            let side = if n % 2 == 0 { &mut ours } else { &mut theirs };
            if *swap && n + 2 < side.len() {
                side.swap(n + 1, n + 2);
            }
        }
        let mut pair = Pair::new();
        let mut ends = Vec::new();
        let (mut ours, mut theirs) = (ours.into_iter(), theirs.into_iter());
        let mut released = Vec::new();
        loop {
            let next = order.pop().unwrap_or(true);
            let said = match if next { ours.next() } else { None } {
                Some((seq, flags, payload)) => {
                    let end = seq.wrapping_sub(isns[0]).wrapping_sub(1) as usize + payload.len();
                    ends.push(if flags == SYN { 0 } else { end });
                    pair.ours(segment(seq, flags, &payload));
                    true
                }
                None => match theirs.next() {
                    Some((seq, flags, payload)) => {
                        pair.theirs(segment(seq, flags, &payload));
                        true
                    }
                    None => false,
                },
            };
            released.extend(pair.released());
            if !said && ours.len() == 0 && theirs.len() == 0 {
                break;
            }
        }
        match flip {
            None => {
                prop_assert_eq!(pair.cause(), None);
                prop_assert_eq!(released.len(), ends.len());
                prop_assert_eq!(pair.flows.accounted(), pair.flows.heard);
                prop_assert_eq!(pair.flows.held(), FLOW);
            }
            Some(at) => {
                prop_assert!(pair.cause().is_some());
                for tag in released {
                    prop_assert!(ends[tag as usize - 1] <= at, "a wrong byte left");
                }
            }
        }
    }

    /// Any frames: no panic, no growth past the budget, and nothing is released twice or unsaid.
    #[test]
    fn any_frames_keep_to_the_budget(
        steps in prop::collection::vec((any::<bool>(), any::<[u8; 6]>(), 0usize..3000), 0..300),
    ) {
        let mut flows = Flows::new(Limits { bytes: 64 << 10, ..LIMITS }, 3);
        flows.commit(Instant::ZERO, Epoch(1));
        let (mut tag, mut epoch) = (0, 1);
        let mut open = BTreeSet::new();
        for (ours, [port, seq, flags, kind, fill, other], len) in steps {
            let sample = Sample {
                ports: [80, u16::from(port % 64)],
                flags: flags & 7,
                ..Sample::PLAIN
            };
            let payload = vec![fill % 2; len];
            let mut frame = match kind % 5 {
                0 => sample.udp(&payload),
                1 => vec![fill; len],
                2 => sample.fragment(&payload[..len / 8 * 8], u16::from(seq), u16::from(other % 4), fill % 2 == 0),
                _ => sample.tcp(u32::from(seq).wrapping_sub(40) << (other % 30), &payload),
            };
            if kind == 255 {
                frame.truncate(usize::from(other));
            }
            if ours {
                tag += 1;
                open.insert(tag);
                flows.ours(Instant::ZERO, tag, &frame.into());
            } else {
                flows.theirs(Instant::ZERO, Epoch(epoch), &frame.into());
            }
            while let Some(agreed) = flows.agreed() {
                prop_assert!(open.remove(&agreed));
            }
            prop_assert!(flows.held() <= (64 << 10) + 2 * 64 * 3100, "{}", flows.held());
            if other == 0 {
                epoch += 1;
                flows.commit(Instant::ZERO, Epoch(epoch));
                open.clear();
            }
            if fill == 0 {
                flows.handle_timeout(Instant::ZERO + LIMITS.latest);
            }
        }
    }
}
