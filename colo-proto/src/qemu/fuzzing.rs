//! Bodies of the fuzz targets. They panic where a law is broken.

use alloc::{sync::Arc, vec::Vec};

use super::{
    Block, BlockTable, Channel, ChannelItem, Demand, Expectation, Item, Limits, Message, Name,
    Reader, Resume, StreamError, Writer,
    session::{Action, Lost, Patience, Standby},
};
use crate::{id::PAGE_SIZE, time::Instant};

/// Limits small enough that a fuzzer reaches them.
fn limits() -> Limits {
    Limits {
        ram: 256 << 20,
        blocks: 16,
        machine: 64,
        description: 256 << 10,
        devices: 512 << 10,
    }
}

/// A decoding: the items, the bytes they encode to, how far the reader came, how it ended.
#[derive(Debug, PartialEq, Eq)]
struct Decoded {
    items: Vec<Item>,
    encoded: Vec<u8>,
    offset: u64,
    end: Result<(), StreamError>,
}

#[expect(
    clippy::expect_used,
    reason = "a fuzz body says what is broken by a panic"
)]
/// Decodes `data`, given in pieces of `piece` bytes, with page bytes skipped.
fn decode(data: &[u8], piece: usize) -> Decoded {
    let mut reader = Reader::new(limits(), Expectation::default());
    let mut writer = Writer::new();
    let (mut items, mut encoded, mut at) = (Vec::new(), Vec::new(), 0usize);
    let mut end = Ok(());
    'stream: while at < data.len() {
        // What is left untaken is offered again, with the next piece.
        let upto = data.len().min(at.saturating_add(piece.max(1)));
        let mut input = &data[at..upto];
        loop {
            let before = reader.offset();
            match reader.skip_pages(&mut input) {
                Ok(Some(item)) => {
                    writer
                        .write(&item, &mut encoded)
                        .expect("a reader's items are in order");
                    if let Item::Page(page) = &item
                        && !page.zero
                    {
                        let from = usize::try_from(reader.offset()).expect("within the data");
                        let upto = data.len().min(from + PAGE_SIZE as usize);
                        encoded.extend_from_slice(&data[from..upto]);
                    }
                    items.push(item);
                }
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(reader.demand().then, 0, "a dead reader wants nothing");
                    end = Err(error);
                    break 'stream;
                }
            }
            assert!(reader.offset() >= before);
        }
        assert!(
            input.is_empty(),
            "the reader stopped although it had no item"
        );
        assert_eq!(reader.offset(), upto as u64);
        at = upto;
    }
    if end.is_ok() {
        end = reader.finish();
    }
    Decoded {
        items,
        encoded,
        offset: reader.offset(),
        end,
    }
}

/// Any bytes: no panic, the same items at any split, and what was understood encodes to what was
/// read.
pub fn stream(data: &[u8]) {
    let whole = decode(data, data.len());
    assert!(
        data.starts_with(&whole.encoded),
        "what was understood does not encode to what was read"
    );
    let piece = data.first().map_or(1, |&b| usize::from(b) + 1);
    let pieces = decode(data, piece);
    assert_eq!(whole.items, pieces.items);
    assert_eq!(whole.encoded, pieces.encoded);
    assert_eq!(whole.end.is_ok(), pieces.end.is_ok());
    resume(&whole.items);
    standby(data, &whole.items);
    let (items, end) = channel(data, data.len());
    let pieces = channel(data, piece);
    assert_eq!((items, end.is_ok()), (pieces.0, pieces.1.is_ok()));
}

/// Decodes `data` as a multifd channel, given in pieces of `piece` bytes.
fn channel(data: &[u8], piece: usize) -> (Vec<ChannelItem>, Result<(), StreamError>) {
    let block = |name: &[u8], bytes| {
        Some(Block {
            name: Name::new(name)?,
            bytes,
        })
    };
    let blocks = [block(b"a", 0x2000), block(b"b", 0x1000)];
    let table = Arc::new(BlockTable(blocks.into_iter().flatten().collect()));
    let mut channel = Channel::new();
    channel.set_table(&table);
    let mut items = Vec::new();
    for mut input in data.chunks(piece.max(1)) {
        loop {
            if let Some(place) = channel.demand().place {
                let n = input.len().min(PAGE_SIZE as usize - place.skip);
                if channel.handle_placed(n).is_err() || n == 0 {
                    break;
                }
                input = input.get(n..).unwrap_or_default();
                continue;
            }
            match channel.handle_bytes(&mut input) {
                Ok(Some(item)) => items.push(item),
                Ok(None) if channel.demand().place.is_none() => break,
                Ok(None) => {}
                Err(error) => return (items, Err(error)),
            }
        }
    }
    for item in &items {
        if let ChannelItem::Page(page) = item {
            assert!(
                table
                    .block(page.slot)
                    .is_some_and(|b| page.page < b.pages())
            );
        }
    }
    (items, Ok(()))
}

/// The machine behind the dialect agrees with every item: it keeps each state that is whole, and
/// answers each request.
fn standby(data: &[u8], items: &[Item]) {
    let count = |wanted: fn(&Item) -> bool| items.iter().filter(|item| wanted(item)).count();
    let states = count(|item| matches!(item, Item::Description(_) | Item::Blob(_)));
    let requests = count(|item| matches!(item, Item::Message(Message::CheckpointRequest)));
    let mut standby = Standby::new(
        Instant::ZERO,
        limits(),
        Expectation::default(),
        Patience::default(),
    );
    let (mut kept, mut answered, mut input) = (0, 0, data);
    let lost = loop {
        while let Some(place) = standby.demand().place {
            let n = input.len().min(PAGE_SIZE as usize - place.skip);
            if standby.handle_placed(Instant::ZERO, n).is_err() || n == 0 {
                break;
            }
            input = input.get(n..).unwrap_or_default();
        }
        match standby.handle_bytes(Instant::ZERO, &mut input) {
            Ok(Some(Action::Whole(state))) => {
                assert_eq!(state.epoch.0, kept, "no epoch is left out");
                kept += 1;
            }
            Ok(Some(Action::Send(replies))) => {
                let reply = replies.contains(&Message::CheckpointReply);
                answered += usize::from(reply);
            }
            Ok(Some(_)) => {}
            // It waits for multifd channels, and nobody brings any.
            Ok(None) if standby.demand() == NOTHING => return,
            Ok(None) if input.is_empty() => break standby.handle_closed(),
            Ok(None) => {}
            Err(lost) => break lost,
        }
    };
    assert!(
        !matches!(lost, Lost::OutOfStep(_) | Lost::Unfit(_)),
        "{lost}"
    );
    assert_eq!((kept, answered), (states as u64, requests));
    let alive = matches!(lost, Lost::Faulty(_));
    let owner = standby.take_over(Instant::ZERO, &lost);
    assert_eq!(
        owner.map(|epoch| epoch.0),
        (!alive).then(|| kept.checked_sub(1)).flatten()
    );
}

const NOTHING: Demand = Demand {
    place: None,
    then: 0,
};

/// Whatever state was accepted turns into a stream that is accepted again.
fn resume(items: &[Item]) {
    let (mut config, mut ram, mut devices, mut description) = (None, None, None, None);
    for item in items {
        match item {
            Item::Configuration(c) => config = Some(c),
            Item::RamStart { id, table, .. } => ram = Some((*id, table)),
            Item::Devices(d) | Item::Blob(d) => devices = Some(d),
            Item::Description(json) => description = Some(json),
            _ => {}
        }
    }
    let (Some(config), Some((id, table)), Some(devices)) = (config, ram, devices) else {
        return;
    };
    if table.bytes() > 1 << 20 {
        return;
    }
    let mut plan = Resume::new(config, id, table.clone(), devices, description);
    let mut pages = 0;
    while plan
        .poll(|_| {
            pages += 1;
            true
        })
        .is_some()
    {}
    assert_eq!(pages * PAGE_SIZE, table.bytes());
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn seeds() -> Vec<Vec<u8>> {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/qemu_stream");
        let files = std::fs::read_dir(corpus).unwrap();
        files
            .map(|file| std::fs::read(file.unwrap().path()).unwrap())
            .collect()
    }

    #[test]
    fn every_seed_keeps_the_laws() {
        let seeds = seeds();
        assert!(!seeds.is_empty());
        for seed in &seeds {
            stream(seed);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// A real stream with a few bytes changed, and cut.
        #[test]
        fn damaged_seeds_keep_the_laws(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            for mut data in seeds() {
                for (at, byte) in &changes {
                    let at = at.index(data.len());
                    data[at] = *byte;
                }
                data.truncate(cut.index(data.len()) + 1);
                stream(&data);
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_after_a_good_start(
            tail in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut data = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x08\0\x08\0\0\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\
                \0\0\0\0\0\0\x10\x04\x01a\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02".to_vec();
            data.extend(tail);
            stream(&data);
        }

        #[test]
        fn any_bytes(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            stream(&data);
        }
    }
}
