//! The output side against hostile frames: views and edits, the comparator against arrays of bytes,
//! the translator there and back.

use alloc::{collections::BTreeSet, vec, vec::Vec};
use bytes::Bytes;
use core::time::Duration;

use super::Program;
use crate::{
    id::Epoch,
    output::{
        flow::{Difference, Flows, Limits, Report},
        packet::{Edit, FlowKey, Heading, View, sample::Sample},
        translate::{Shift, Tcp, Translator},
    },
    time::Instant,
};

/// Any bytes as a frame: every place of a view is inside, and a shift there and back changes nothing
/// but, perhaps, which of its two zeros a checksum is.
pub fn packets(data: &[u8]) {
    let mut program = Program(data);
    let header = [0, 10, 12, 20][usize::from(program.byte() % 4)];
    let heading = heading(&mut program);
    let shift = Shift {
        seq: u32::from(program.byte()) << 24 | 1,
        stamp: u32::from(program.byte()),
    };
    let frame = Bytes::copy_from_slice(program.0);
    if let Ok(view) = View::new(&frame, header, heading) {
        assert!(view.transport <= view.end && view.end <= frame.len());
        assert!(frame.get(view.payload()).is_some());
        let mut copy = frame.to_vec();
        let mut edit = Edit::new(&mut copy, &view);
        let at = usize::from(program.byte());
        if let Some(before) = edit.get(at) {
            assert!(edit.set(at, before));
        }
        assert_eq!(copy.len(), frame.len());
    }
    let Some(tcp) = Tcp::find(&frame, header, heading) else {
        return;
    };
    let back = Shift {
        seq: shift.seq.wrapping_neg(),
        stamp: shift.stamp.wrapping_neg(),
    };
    let there = shift.apply(&tcp, heading, frame.clone());
    assert_eq!(there.len(), frame.len());
    let again = back.apply(&tcp, heading, there);
    let differ = again.iter().zip(&frame).filter(|(a, b)| a != b).count();
    assert!(differ <= 2, "more than a checksum changed");
}

/// Two guests that say the same streams and datagrams, cut, repeated and interleaved as the program
/// says, with one byte wrong if it says so; between them any bytes.
pub fn flows(data: &[u8]) {
    const STREAM: usize = 512;
    /// Of a frame that says nothing of the stream.
    const ANYWHERE: usize = usize::MAX;
    let mut program = Program(data);
    let wrong = usize::from(program.byte()) * 2;
    let isns = [
        u32::from(program.byte()) << 24,
        u32::MAX - u32::from(program.byte()),
    ];
    let limits = Limits {
        bytes: 64 << 10,
        header: 0,
        soonest: Duration::from_millis(10),
        latest: Duration::from_millis(100),
    };
    let mut flows = Flows::new(limits, 1);
    flows.commit(Instant::ZERO, Epoch(1));
    let truth: Vec<u8> = (0..STREAM).map(|n| (n * 7 + n / 256) as u8).collect();
    let mut lie = truth.clone();
    let wrong = (wrong < STREAM).then(|| {
        lie[wrong] ^= 1;
        wrong
    });
    let said = [&truth, &lie];
    // How far each side has said its stream, and where each of our frames ends.
    let (mut upto, mut ends, mut open) = ([0usize; 2], vec![], BTreeSet::new());
    let mut full = false;
    for side in [0, 1] {
        let sample = Sample {
            flags: 2,
            ..Sample::PLAIN
        };
        let frame = Bytes::from(sample.tcp(isns[side], b""));
        if side == 0 {
            open.insert(0);
            ends.push(0);
            assert!(flows.ours(Instant::ZERO, 0, &frame).is_some());
        } else {
            flows.theirs(Instant::ZERO, Epoch(1), &frame);
        }
    }
    while let Some(what) = program.next() {
        let (side, kind) = (usize::from(what & 1), what >> 1 & 7);
        let (frame, end) = match kind {
            0 => {
                let mut frame = vec![2; 12];
                frame.extend([0x88, 0xb5]);
                frame.extend(program.take(9));
                (Bytes::from(frame), ANYWHERE)
            }
            1 => (Bytes::from(Sample::PLAIN.udp(&[what])), ANYWHERE),
            _ => {
                let (back, ahead) = (program.byte() % 32, program.byte());
                let from = upto[side].saturating_sub(usize::from(back));
                let to = (upto[side] + usize::from(ahead)).min(STREAM);
                upto[side] = to;
                let seq = isns[side].wrapping_add(1 + from as u32);
                let bytes = said[side].get(from..to).unwrap_or_default();
                // What says nothing leaves wherever it is.
                let end = if bytes.is_empty() { ANYWHERE } else { to };
                (Bytes::from(Sample::PLAIN.tcp(seq, bytes)), end)
            }
        };
        if side == 0 {
            let tag = ends.len() as u64;
            open.insert(tag);
            ends.push(end);
            flows.ours(Instant::ZERO, tag, &frame);
        } else {
            flows.theirs(Instant::ZERO, Epoch(1), &frame);
        }
        while let Some(tag) = flows.agreed() {
            assert!(open.remove(&tag), "released twice, or never said");
            let end = ends[tag as usize];
            let right = end == ANYWHERE || wrong.is_none_or(|wrong| end <= wrong);
            assert!(right, "a wrong byte left");
        }
        while let Some(parted) = flows.parted() {
            full |= parted.cause == Difference::Overflow;
            let stream = parted.flow.protocol == 6;
            assert!(!stream || full || wrong.is_some(), "{parted:?}");
        }
        assert!(flows.held() <= limits.bytes + 4096);
    }
    if wrong.is_none() && !full && upto == [STREAM; 2] {
        for (tag, end) in ends.iter().enumerate() {
            let waits = *end != ANYWHERE && open.contains(&(tag as u64));
            assert!(!waits, "byte {end} was said by both");
        }
    }
}

/// Any schedule of a translator: its calls end, and what it hands out is as long as what it was given.
pub fn translator(data: &[u8]) {
    let mut program = Program(data);
    let mut translator = Translator::new(0, 1);
    let (mut index, mut epoch) = (0, 0);
    while let Some(what) = program.next() {
        index += 1;
        let now = Instant::ZERO + Duration::from_secs(index);
        let [port, seq, flags] = [program.byte(), program.byte(), program.byte()];
        let sample = Sample {
            ports: [80, u16::from(port % 8)],
            flags: flags & 7,
            ack: (flags & 8 == 0).then_some(u32::from(seq)),
            from_guest: what & 1 == 0,
            ..Sample::PLAIN
        };
        match what >> 1 & 7 {
            0 | 1 => {
                let frame = Bytes::from(sample.tcp(u32::from(seq), b"x"));
                let len = frame.len();
                let out = if sample.from_guest {
                    Some(translator.from_guest(now, frame))
                } else {
                    translator.to_guest(now, index, frame)
                };
                assert!(out.is_none_or(|out| out.len() == len));
            }
            2 => {
                let frame = Bytes::copy_from_slice(program.take(90));
                let _out = translator.from_guest(now, frame);
            }
            3 => {
                let mut bytes = [0; Report::BYTES];
                let said = program.take(Report::BYTES);
                bytes[..said.len()].copy_from_slice(said);
                let mut report = Report::from_bytes(Epoch(epoch + u64::from(flags % 2)), &bytes);
                let key = View::new(&sample.tcp(0, b""), 0, heading(&mut program));
                report.flow = key.map_or(FlowKey::OPAQUE, |view| view.key);
                translator.report(now, report);
            }
            4 => {
                epoch += 1;
                translator.commit(now, Epoch(epoch));
            }
            5 => translator.take_over(),
            6 => {
                let lasting: Vec<_> = translator.lasting().collect();
                for lasting in lasting {
                    translator.inherit(now, lasting);
                }
            }
            _ => while translator.poll_ready().is_some() {},
        }
        assert!(translator.len() <= 64);
    }
}

fn heading(program: &mut Program<'_>) -> Heading {
    if program.byte() & 1 == 0 {
        Heading::FromGuest
    } else {
        Heading::ToGuest
    }
}
