//! Multifd channels: their pages belong between the marks of the main stream, whatever the order
//! in which the connections are read; what does not fit is refused.

use colo_proto::{
    qemu::{
        Expectation, Fault, Feature, Limits, Message, Within,
        session::{Action, Lost, Patience, Standby},
    },
    time::Instant,
};

use crate::link::*;

const NOW: Instant = Instant::ZERO;

fn init(channel: u8) -> Vec<u8> {
    let mut out = b"\x11\x22\x33\x44\0\0\0\x01".to_vec();
    out.extend([0; 16]);
    out.push(channel);
    out.resize(64, 0);
    out
}

/// A packet of pages of `block` that are full of `fill`, and zero pages.
fn packet(number: u64, block: &str, normal: &[u64], zero: &[u64], fill: u8) -> Vec<u8> {
    let mut out = b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\0".to_vec();
    for n in [128, normal.len(), normal.len() * 4096] {
        out.extend((n as u32).to_be_bytes());
    }
    out.extend(number.to_be_bytes());
    out.extend((zero.len() as u32).to_be_bytes());
    out.resize(64, 0);
    out.extend(block.as_bytes());
    out.resize(320, 0);
    for offset in normal.iter().chain(zero) {
        out.extend(offset.to_be_bytes());
    }
    out.resize(1344, 0);
    out.extend(vec![fill; 4096 * normal.len()]);
    out
}

fn mark(number: u64) -> Vec<u8> {
    let mut out = packet(number, "", &[], &[], 0);
    out[11] = 1;
    out[12..16].fill(0);
    out
}

/// Two channels beside [`Link::with_multifd`]: five marks each.
pub(crate) fn channels() -> [Vec<u8>; 2] {
    let first = [
        init(0),
        mark(0),
        packet(2, "a", &[0], &[0x1000], 1),
        mark(4),
        mark(6),
        // The checkpoint.
        mark(8),
        packet(10, "a", &[0x1000], &[], 3),
        mark(12),
    ];
    let second = [
        init(1),
        mark(1),
        packet(3, "b", &[0], &[], 2),
        mark(5),
        mark(7),
        mark(9),
        packet(11, "b", &[], &[0], 0),
        mark(13),
    ];
    [first.concat(), second.concat()]
}

/// What a link brought: pages in their order, and which states were whole.
#[derive(Debug, Default, PartialEq, Eq)]
struct Taken {
    pages: Vec<(u16, u64, Option<u8>)>,
    whole: usize,
    sent: Vec<Message>,
}

/// Feeds the three connections in turn, `piece` bytes at most each time, beginning with `first`.
fn run(main: &[u8], channels: &[Vec<u8>], piece: usize, first: usize) -> Result<Taken, Lost> {
    let patience = Patience::default();
    let mut standby = Standby::new(NOW, Limits::default(), Expectation::default(), patience);
    let mut taken = Taken::default();
    let mut connections: Vec<&[u8]> = vec![main];
    for channel in channels {
        standby.open_channel(NOW)?;
        connections.push(channel);
    }
    loop {
        let mut idle = true;
        for turn in 0..connections.len() {
            let which = (turn + first) % connections.len();
            let n = feed(&mut standby, which, connections[which], piece, &mut taken)?;
            connections[which] = &connections[which][n..];
            idle &= n == 0;
        }
        if idle {
            return Ok(taken);
        }
    }
}

fn feed(
    standby: &mut Standby,
    which: usize,
    bytes: &[u8],
    piece: usize,
    taken: &mut Taken,
) -> Result<usize, Lost> {
    let mut input = &bytes[..bytes.len().min(piece)];
    let offered = input.len();
    loop {
        let demand = match which.checked_sub(1) {
            None => standby.demand(),
            Some(channel) => standby.channel_demand(channel),
        };
        if let Some(place) = demand.place {
            if input.is_empty() {
                return Ok(offered);
            }
            let n = input.len().min(4096 - place.skip);
            let last = taken.pages.iter_mut().rev();
            let page = (place.page.slot.0, place.page.first);
            let mut last = last.filter(|p| (p.0, p.1) == page);
            last.next().unwrap().2 = Some(input[0]);
            match which.checked_sub(1) {
                None => standby.handle_placed(NOW, n).unwrap(),
                Some(channel) => standby.handle_channel_placed(NOW, channel, n).unwrap(),
            }
            input = &input[n..];
            continue;
        }
        let action = match which.checked_sub(1) {
            None => standby.handle_bytes(NOW, &mut input)?,
            Some(channel) => standby.handle_channel_bytes(NOW, channel, &mut input)?,
        };
        match action {
            Some(Action::Page(page)) => taken.pages.push((page.slot.0, page.page, None)),
            Some(Action::Whole(_)) => taken.whole += 1,
            Some(Action::Send(messages)) => taken.sent.extend(messages),
            Some(_) => {}
            None => {
                let demand = match which.checked_sub(1) {
                    None => standby.demand(),
                    Some(channel) => standby.channel_demand(channel),
                };
                if demand.place.is_none() {
                    return Ok(offered - input.len());
                }
            }
        }
    }
}

fn good() -> Vec<u8> {
    Link::with_multifd().bytes()
}

/// Whatever connection is read first and however the bytes are cut: a page that a later interval
/// sends again comes after the earlier one, and nothing of the checkpoint before its request.
#[test]
fn pages_on_channels_belong_between_the_marks() {
    for piece in [1, 7, 1343, 1 << 20] {
        for first in 0..3 {
            let taken = run(&good(), &channels(), piece, first).unwrap();
            let (mut migration, mut live) = (taken.pages[..3].to_vec(), taken.pages[3..].to_vec());
            migration.sort_unstable();
            live.sort_unstable();
            assert_eq!(migration, [(0, 0, Some(1)), (0, 1, None), (1, 0, Some(2))]);
            assert_eq!(live, [(0, 1, Some(3)), (1, 0, None)]);
            assert_eq!(taken.whole, 2);
            let numbers: Vec<u32> = taken.sent.iter().map(Message::number).collect();
            assert_eq!(numbers, [0x0002_0004, 0x0001_0004, 0, 2, 5, 6]);
        }
    }
}

/// Without one of its channels nothing becomes whole, wherever the others have come to.
#[test]
fn a_channel_that_has_not_come_is_waited_for() {
    let [first, second] = channels();
    for only in [&[][..], &[first], &[second]] {
        let taken = run(&good(), only, 1 << 20, 0).unwrap();
        assert_eq!(taken.whole, 0, "{} channels", only.len());
        assert!(taken.pages.len() <= 2);
    }
}

#[test]
fn a_checkpoint_without_the_last_bytes_of_a_channel_is_not_whole() {
    let [first, mut second] = channels();
    second.truncate(second.len() - 1);
    let taken = run(&good(), &[first, second], 1 << 20, 0).unwrap();
    assert_eq!(taken.whole, 1);
}

#[track_caller]
fn refused(main: &[u8], channels: &[Vec<u8>], field: &str, fault: Fault) {
    for piece in [1, 1 << 20] {
        let lost = run(main, channels, piece, 1).unwrap_err();
        let Lost::Faulty(error) = lost else {
            panic!("{lost}");
        };
        assert_eq!((error.field, error.fault), (field, fault), "{error}");
    }
}

#[test]
fn what_is_no_channel_packet_is_refused() {
    let [first, second] = channels();
    let start = [init(0), mark(0)].concat();
    let with = |bad: Vec<u8>| [[start.clone(), bad].concat(), second.clone()];
    let damaged = |at: usize, byte: u8| {
        let mut bad = packet(2, "a", &[0], &[0x1000], 1);
        bad[at] = byte;
        with(bad)
    };
    refused(&good(), &damaged(0, 0), "magic", Fault::Mismatch);
    refused(&good(), &damaged(7, 2), "version", Fault::Unknown);
    let compressed = Fault::Unsupported(Feature::MultifdCompression);
    refused(&good(), &damaged(11, 2), "packet flags", compressed);
    refused(&good(), &damaged(11, 1), "pages", Fault::OutOfPlace);
    refused(&good(), &damaged(14, 1), "room for pages", Fault::OverLimit);
    refused(&good(), &damaged(19, 129), "normal pages", Fault::OverLimit);
    refused(&good(), &damaged(19, 2), "bytes of pages", Fault::Mismatch);
    refused(&good(), &damaged(35, 128), "zero pages", Fault::OverLimit);
    refused(&good(), &damaged(64, b'x'), "block name", Fault::Unknown);
    refused(&good(), &damaged(327, 1), "page offset", Fault::OverLimit);
    refused(
        &good(),
        &damaged(326, 0x20),
        "page offset",
        Fault::OverLimit,
    );
    let same = [first.clone(), [init(0), second[64..].to_vec()].concat()];
    refused(&good(), &same, "channel", Fault::Repeated);
    let again = [
        start.clone(),
        packet(1, "a", &[], &[0], 0),
        mark(0),
        mark(0),
    ]
    .concat();
    refused(&good(), &[again, second], "packet number", Fault::Repeated);
}

/// The main stream and the channels together bring each page of a checkpoint once.
#[test]
fn a_page_twice_in_a_checkpoint_is_refused() {
    let [first, second] = channels();
    let at = second.len() - mark(0).len() - 1344;
    let mut twice = second[..at].to_vec();
    twice.extend(packet(11, "a", &[], &[0x1000], 0));
    twice.extend(mark(13));
    refused(&good(), &[first, twice], "page offset", Fault::Repeated);
}

/// QEMU below 8.1 and machine types below it: the main stream has no marks.
#[test]
fn channels_beside_a_main_stream_without_marks_are_refused_by_name() {
    let multifd = Fault::Unsupported(Feature::Multifd);
    let main = Link::of_11_1().bytes();
    refused(&main, &channels(), "record flags", multifd);
    // A channel that comes later than the block table.
    let patience = Patience::default();
    let mut late = Standby::new(NOW, Limits::default(), Expectation::default(), patience);
    let link = Link::of_11_1();
    let opening = [link.header, link.config, link.command, link.start].concat();
    feed(&mut late, 0, &opening, 1 << 20, &mut Taken::default()).unwrap();
    let Err(Lost::Faulty(error)) = late.open_channel(NOW) else {
        panic!("it was taken");
    };
    assert_eq!((error.within, error.fault), (Within::RamStart, multifd));
    // Marks that the start did not announce.
    let mut unannounced = Link::of_11_1();
    unannounced.part = section(2, 2, &[word(FLUSH)]);
    refused(&unannounced.bytes(), &[], "record flags", multifd);
}

/// Pages of the last interval would belong to no section.
#[test]
fn the_last_ram_section_ends_with_a_mark() {
    let mut link = Link::with_multifd();
    link.live = [
        section(3, 2, &[word(FLUSH), page(0, ZERO, Some("a"))]),
        vec![0],
    ]
    .concat();
    refused(&link.bytes(), &channels(), "record flags", Fault::Missing);
}
