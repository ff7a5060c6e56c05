//! The translator as a specification, and there and back.

use alloc::{vec, vec::Vec};
use proptest::prelude::*;

use super::*;
use crate::output::packet::{Content, View, sample::Sample};

const NOW: Instant = Instant::ZERO;
const SYN: u8 = flag::SYN;

fn stamps(value: u32, echo: u32) -> Vec<u8> {
    let mut out = vec![8, 10];
    out.extend(value.to_be_bytes());
    out.extend(echo.to_be_bytes());
    out
}

fn guest(seq: u32, flags: u8, stamp: u32) -> Bytes {
    let sample = Sample {
        flags,
        ..Sample::PLAIN
    };
    sample.tcp_with(seq, &stamps(stamp, 1), b"").into()
}

fn client(ack: u32, sack: Option<(u32, u32)>, echo: u32) -> Bytes {
    let sample = Sample {
        from_guest: false,
        ack: Some(ack),
        ..Sample::PLAIN
    };
    let mut options = stamps(2, echo);
    if let Some((from, to)) = sack {
        options.extend([5, 10]);
        options.extend(from.to_be_bytes());
        options.extend(to.to_be_bytes());
    }
    sample.tcp_with(9, &options, b"x").into()
}

fn report(opened: u32, isn: u32, stamp: u32) -> Report {
    let view = View::new(&guest(0, 0, 0), 0, Heading::FromGuest).unwrap();
    Report {
        flow: view.key,
        epoch: Epoch(1),
        opened,
        isn: Some(isn),
        stamp: Some(stamp),
        clock: Some(stamp + 1000),
    }
}

fn segment(frame: &[u8], heading: Heading) -> Segment {
    let view = View::new(frame, 0, heading).unwrap();
    let Content::Tcp(segment) = view.content else {
        panic!("{view:?}");
    };
    assert!(is_right(frame, &view), "the checksum");
    segment
}

/// Whether the TCP checksum is right: pseudo-header and body sum up to all ones.
fn is_right(frame: &[u8], view: &View) -> bool {
    let ip = view.transport - 20;
    let pseudo = [
        &frame[ip + 12..ip + 20],
        &[0, 6],
        &u16::try_from(view.end - view.transport)
            .unwrap()
            .to_be_bytes(),
    ]
    .concat();
    let sum = |bytes: &[u8]| {
        let word = |p: &[u8]| u32::from(u16::from_be_bytes([p[0], p.get(1).copied().unwrap_or(0)]));
        bytes.chunks(2).map(word).sum::<u32>()
    };
    let mut sum = sum(&pseudo) + sum(&frame[view.transport..view.end]);
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum == 0xffff
}

fn shadow() -> Translator {
    let mut translator = Translator::new(0, 1);
    translator.commit(NOW, Epoch(1));
    translator
}

/// Both guests have opened the connection: 1000 and 5000, clocks 100 and 700.
fn live() -> Translator {
    let mut translator = shadow();
    translator.report(NOW, report(1, 1000, 100));
    let said = translator.from_guest(NOW, guest(5000, SYN, 700));
    assert_eq!(
        segment(&said, Heading::FromGuest).seq,
        5000,
        "compared as it is"
    );
    translator
}

#[test]
fn what_clients_acknowledge_is_translated_for_the_guest_that_shadows() {
    let mut translator = live();
    let frame = client(1001, Some((1005, 1009)), 100);
    let frame = translator.to_guest(NOW, 1, frame).unwrap();
    let heard = segment(&frame, Heading::ToGuest);
    assert_eq!((heard.seq, heard.ack), (9, Some(5001)));
    assert_eq!(heard.options.timestamp.unwrap().echo, 700);
    let edit = View::new(&frame, 0, Heading::ToGuest).unwrap();
    let mut copy = frame.to_vec();
    let edges = crate::output::packet::Edit::new(&mut copy, &edit);
    let (at, _) = heard.options.sack.unwrap();
    assert_eq!((edges.get(at), edges.get(at + 4)), (Some(5005), Some(5009)));
}

#[test]
fn acknowledgements_wait_until_the_guest_here_has_spoken() {
    let mut translator = shadow();
    translator.report(NOW, report(1, 1000, 100));
    assert_eq!(translator.to_guest(NOW, 1, client(1001, None, 100)), None);
    assert_eq!(translator.to_guest(NOW, 2, client(1001, None, 100)), None);
    assert_eq!(translator.poll_ready(), None);
    let _said = translator.from_guest(NOW, guest(5000, SYN, 700));
    for index in 1..3 {
        let (given, frame) = translator.poll_ready().unwrap();
        assert_eq!(given, index, "in order");
        assert_eq!(segment(&frame, Heading::ToGuest).ack, Some(5001));
    }
    assert!(
        translator
            .to_guest(NOW, 3, client(1001, None, 100))
            .is_some()
    );
}

#[test]
fn after_a_takeover_the_world_goes_on_with_the_numbers_it_knows() {
    let mut translator = live();
    translator.take_over();
    let said = translator.from_guest(NOW, guest(5001, 0, 701));
    let said = segment(&said, Heading::FromGuest);
    assert_eq!(said.seq, 1001);
    let stamp = said.options.timestamp.unwrap().value;
    assert!(
        stamp > 1100,
        "{stamp}: no clock that has left is passed again"
    );
    let later = translator.from_guest(NOW, guest(5001, 0, 711));
    let later = segment(&later, Heading::FromGuest)
        .options
        .timestamp
        .unwrap();
    assert_eq!(later.value, stamp + 10);
    let frame = translator
        .to_guest(NOW, 1, client(1009, None, stamp))
        .unwrap();
    let heard = segment(&frame, Heading::ToGuest);
    assert_eq!(heard.ack, Some(5009));
    assert_eq!(heard.options.timestamp.unwrap().echo, 701);
}

#[test]
fn a_second_takeover_keeps_what_the_first_one_set() {
    let mut first = live();
    first.take_over();
    let _said = first.from_guest(NOW, guest(5001, 0, 701));
    let mut second = shadow();
    for lasting in first.lasting() {
        second.inherit(NOW, lasting);
    }
    second.commit(NOW, Epoch(2));
    let frame = second.to_guest(NOW, 1, client(5002, None, 0)).unwrap();
    assert_eq!(
        segment(&frame, Heading::ToGuest).ack,
        Some(5002),
        "both guests are alike"
    );
    second.take_over();
    let said = second.from_guest(NOW, guest(5002, 0, 800));
    assert_eq!(segment(&said, Heading::FromGuest).seq, 1002);
    // The tuple is used again: nothing is known of the new connection.
    let said = second.from_guest(NOW, guest(77, SYN, 900));
    assert_eq!(segment(&said, Heading::FromGuest).seq, 77);
    assert!(second.is_empty());
}

#[test]
fn a_checkpoint_makes_the_numbers_equal_and_repetitions_change_nothing() {
    let mut translator = live();
    translator.report(NOW, report(1, 1000, 100));
    let _again = translator.from_guest(NOW, guest(5000, SYN, 705));
    let frame = translator.to_guest(NOW, 1, client(1001, None, 0)).unwrap();
    assert_eq!(segment(&frame, Heading::ToGuest).ack, Some(5001));
    translator.commit(NOW, Epoch(2));
    let frame = translator.to_guest(NOW, 1, client(1001, None, 0)).unwrap();
    assert_eq!(segment(&frame, Heading::ToGuest).ack, Some(1001));
}

#[test]
fn reports_of_a_checkpoint_that_is_being_loaded_wait_for_it() {
    let mut translator = shadow();
    let mut early = report(1, 1000, 100);
    early.epoch = Epoch(2);
    translator.report(NOW, early);
    assert!(translator.to_guest(NOW, 1, client(1001, None, 0)).is_some());
    translator.commit(NOW, Epoch(2));
    assert_eq!(translator.to_guest(NOW, 1, client(1001, None, 0)), None);
}

#[test]
fn guests_that_open_a_tuple_twice_are_paired_by_count() {
    let mut translator = shadow();
    let _first = translator.from_guest(NOW, guest(5000, SYN, 1));
    let _second = translator.from_guest(NOW, guest(6000, SYN, 1));
    translator.report(NOW, report(1, 1000, 1));
    let frame = translator.to_guest(NOW, 1, client(1001, None, 0)).unwrap();
    assert_eq!(
        segment(&frame, Heading::ToGuest).ack,
        Some(1001),
        "not the one that is open"
    );
    translator.report(NOW, report(2, 2000, 1));
    let frame = translator.to_guest(NOW, 1, client(2001, None, 0)).unwrap();
    assert_eq!(segment(&frame, Heading::ToGuest).ack, Some(6001));
}

#[test]
fn a_connection_that_nobody_heard_of_keeps_its_own_numbers() {
    let mut translator = shadow();
    let _said = translator.from_guest(NOW, guest(5000, SYN, 700));
    translator.take_over();
    let said = translator.from_guest(NOW, guest(5000, SYN, 701));
    assert_eq!(segment(&said, Heading::FromGuest).seq, 5000);
    assert!(translator.is_empty());
}

#[test]
fn one_that_the_other_guest_opened_is_opened_here_after_the_takeover() {
    let mut translator = shadow();
    translator.report(NOW, report(1, 1000, 100));
    translator.take_over();
    assert_eq!(translator.to_guest(NOW, 1, client(1001, None, 0)), None);
    let said = translator.from_guest(NOW, guest(5000, SYN, 700));
    assert_eq!(segment(&said, Heading::FromGuest).seq, 1000);
    let (_, frame) = translator.poll_ready().unwrap();
    assert_eq!(segment(&frame, Heading::ToGuest).ack, Some(5001));
}

#[test]
fn errors_about_segments_quote_the_numbers_that_their_reader_knows() {
    let mut translator = live();
    let view = View::new(&guest(0, 0, 0), 0, Heading::FromGuest).unwrap();
    for (heading, quoted, at) in [
        // A router could not forward what the world knows as 1001.
        (Heading::ToGuest, guest(1001, 0, 0), 4),
        // The guest could not use what the client sent, which acknowledged 5001 here.
        (Heading::FromGuest, client(5001, None, 0), 8),
    ] {
        if heading == Heading::FromGuest {
            translator.take_over();
        }
        let mut body = vec![3, 4, 0, 0, 0, 0, 5, 0];
        body.extend(&quoted[14..14 + 40]);
        let sample = Sample {
            protocol: 1,
            from_guest: heading == Heading::FromGuest,
            ..Sample::PLAIN
        };
        let mut frame = sample.ip(body, None);
        // The checksum of an ICMP message covers no pseudo-header.
        let message = view.transport;
        let sum = frame[message..].chunks(2).fold(0u32, |sum, pair| {
            sum + u32::from(u16::from_be_bytes([pair[0], pair[1]]))
        });
        let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[message + 2..message + 4].copy_from_slice(&folded.to_be_bytes());
        let frame = match heading {
            Heading::ToGuest => translator.to_guest(NOW, 1, frame.into()).unwrap(),
            Heading::FromGuest => translator.from_guest(NOW, frame.into()),
        };
        let number = &frame[message + 8 + 20 + at..][..4];
        let expected: u32 = if heading == Heading::ToGuest {
            5001
        } else {
            1001
        };
        assert_eq!(number, expected.to_be_bytes(), "{heading:?}");
        let sum = frame[message..].chunks(2).fold(0u32, |sum, pair| {
            sum + u32::from(u16::from_be_bytes([pair[0], pair[1]]))
        });
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "{heading:?}");
    }
}

proptest! {
    /// Whatever the frame and the shift: there and back is where it was, byte for byte, and
    /// nothing but numbers and checksum changes on the way.
    #[test]
    fn there_and_back_is_the_same_frame(
        which in 0usize..12, seq: u32, stamp: u32, ack: Option<u32>, flags in 0u8..8,
        numbers: [u32; 4], payload in prop::collection::vec(any::<u8>(), 0..50), from_guest: bool,
    ) {
        let sample = Sample { ack, flags, from_guest, ..Sample::every().nth(which).unwrap() };
        let mut options = stamps(numbers[0], numbers[1]);
        options.extend([1, 5, 10]);
        options.extend(numbers[2].to_be_bytes());
        options.extend(numbers[3].to_be_bytes());
        let heading = if from_guest { Heading::FromGuest } else { Heading::ToGuest };
        let frame = Bytes::from(sample.tcp_with(numbers[3], &options, &payload));
        let tcp = Tcp::find(&frame, 0, heading).unwrap();
        let shift = Shift { seq, stamp };
        let back = Shift { seq: seq.wrapping_neg(), stamp: stamp.wrapping_neg() };
        let there = shift.apply(&tcp, heading, frame.clone());
        prop_assert_eq!(there.len(), frame.len());
        let again = back.apply(&tcp, heading, there);
        // One's complement has two zeros: the checksum may come back as the other one.
        let at = View::new(&frame, 0, heading).unwrap().transport + 16;
        prop_assert_eq!(&again[..at], &frame[..at]);
        prop_assert_eq!(&again[at + 2..], &frame[at + 2..]);
        let sums = [&again, &frame].map(|f| u16::from_be_bytes([f[at], f[at + 1]]));
        prop_assert!(sums[0] == sums[1] || sums.iter().all(|s| [0, 0xffff].contains(s)));
    }

    /// Any calls in any order: no panic, and no more connections than there were.
    #[test]
    fn any_schedule_ends_well(
        steps in prop::collection::vec((0u8..7, any::<u8>(), any::<u8>()), 0..200),
    ) {
        let mut translator = shadow();
        let (mut index, mut epoch) = (0, 1);
        for (what, a, b) in steps {
            let (a, b) = (u32::from(a % 4), u32::from(b));
            index += 1;
            match what {
                0 => { let _said = translator.from_guest(NOW, guest(b, SYN, a)); }
                1 => { let _said = translator.from_guest(NOW, guest(b, a as u8, a)); }
                2 => { let _given = translator.to_guest(NOW, index, client(b, Some((a, b)), a)); }
                3 => {
                    let mut report = report(a, b, a);
                    report.epoch = Epoch(epoch + u64::from(b % 2));
                    translator.report(NOW, report);
                }
                4 if b % 4 == 0 => { epoch += 1; translator.commit(NOW, Epoch(epoch)); }
                5 if b % 8 == 0 => translator.take_over(),
                _ => while translator.poll_ready().is_some() {},
            }
            prop_assert!(translator.len() <= 1);
        }
    }
}
