//! Recordings of real pairs of QEMU 7.2, 10.0 and 11.1 decode to the last byte and encode to the
//! same bytes, however they are cut.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{io::Read, path::Path, sync::OnceLock};

use colo_proto::{
    id::PAGE_SIZE,
    qemu::{
        Block, Expectation, Generation, Item, Limits, Message, Reader, Replies, Resume, Segment,
        Within, Writer,
    },
};

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A recording: its name, who sent it, its checkpoints and the size of its RAM.
struct Recording {
    name: &'static str,
    sent_by: Generation,
    checkpoints: usize,
    memory: u64,
}

const RECORDINGS: [Recording; 3] = [
    Recording {
        name: "qemu72-pc-1vcpu",
        sent_by: Generation::Qemu72,
        checkpoints: 11,
        memory: 80 << 20,
    },
    Recording {
        name: "qemu1013-pc",
        sent_by: Generation::Qemu100,
        checkpoints: 16,
        memory: 64 << 20,
    },
    Recording {
        name: "qemu111-pc",
        sent_by: Generation::Qemu111,
        checkpoints: 16,
        memory: 64 << 20,
    },
];

impl Recording {
    fn bytes(&self) -> Vec<u8> {
        let packed = fixture(&format!("{}.p2s.xz", self.name));
        let mut bytes = Vec::new();
        xz2::read::XzDecoder::new(&packed[..])
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    }
}

/// The one of QEMU 7.2.
fn recording() -> &'static [u8] {
    static RECORDING: OnceLock<Vec<u8>> = OnceLock::new();
    RECORDING.get_or_init(|| RECORDINGS[0].bytes())
}

fn reader() -> Reader {
    Reader::new(Limits::default(), Expectation::default())
}

/// Feeds `data` in pieces that end at `cuts` and at the end; encodes every item again.
fn reencode(data: &[u8], cuts: impl Iterator<Item = usize>) -> (Vec<Item>, Vec<u8>) {
    let (items, out, _) = decode(data, cuts);
    (items, out)
}

fn decode(
    data: &[u8],
    cuts: impl Iterator<Item = usize>,
) -> (Vec<Item>, Vec<u8>, Option<Generation>) {
    let (mut reader, mut writer) = (reader(), Writer::new());
    let (mut items, mut out, mut at) = (vec![], Vec::with_capacity(data.len()), 0);
    for cut in cuts.chain([data.len()]) {
        let mut input = &data[at..cut];
        while let Some(item) = reader.skip_pages(&mut input).unwrap() {
            writer.write(&item, &mut out).unwrap();
            if matches!(&item, Item::Page(page) if !page.zero) {
                let from = reader.offset() as usize;
                out.extend_from_slice(&data[from..from + PAGE_SIZE as usize]);
            }
            items.push(item);
        }
        assert_eq!(reader.offset(), cut as u64);
        at = cut;
    }
    reader
        .finish()
        .unwrap_or_else(|cut| assert_eq!(cut.within, Within::Message, "{cut}"));
    (items, out, reader.generation())
}

/// Up to the last whole message: the primary was killed after it.
#[test]
fn every_generation_decodes_to_the_last_byte_and_encodes_to_the_same_bytes() {
    for recording in &RECORDINGS {
        let (data, name) = (recording.bytes(), recording.name);
        let (items, out, sent_by) = decode(&data, std::iter::empty());
        assert!(out == data, "{name}: {} of {}", out.len(), data.len());
        assert_eq!(sent_by, Some(recording.sent_by));
        let blobs = items.iter().filter(|i| matches!(i, Item::Blob(_))).count();
        assert_eq!(blobs, recording.checkpoints, "{name}");
        let Some(Item::RamStart { table, multifd, .. }) =
            items.iter().find(|i| matches!(i, Item::RamStart { .. }))
        else {
            panic!("{name}: no block table");
        };
        let names: Vec<&str> = table
            .blocks()
            .iter()
            .map(|b: &Block| b.name.as_str())
            .collect();
        assert_eq!(names[0], "pc.ram");
        assert_eq!(table.blocks()[0].bytes, recording.memory);
        assert!(!multifd);
    }
}

#[test]
fn decodes_the_same_when_cut_at_every_thousandth_byte_and_one_byte_at_a_time() {
    for recording in &RECORDINGS {
        let data = recording.bytes();
        let whole = reencode(&data, std::iter::empty());
        let (items, out) = reencode(&data, (1000..data.len()).step_by(1000));
        assert!(out == data && items == whole.0, "{}", recording.name);
        // Byte by byte up to the first checkpoint's end: the rest repeats it.
        let first = first_checkpoint(&data);
        let (items, out) = reencode(&data[..first], 1..first);
        assert!(out == data[..first] && whole.0.starts_with(&items));
    }
}

/// Where the first checkpoint ends.
fn first_checkpoint(data: &[u8]) -> usize {
    let (mut reader, mut input) = (reader(), data);
    while !matches!(reader.skip_pages(&mut input).unwrap(), Some(Item::Blob(_))) {}
    usize::try_from(reader.offset()).unwrap()
}

/// The pull style: exactly what is demanded is read, page bytes go past the reader.
#[test]
fn demands_are_exact_and_never_ask_for_page_bytes() {
    let data = recording();
    let mut reader = reader();
    let (mut at, mut small, mut placed) = (0usize, 0usize, 0usize);
    loop {
        let demand = reader.demand();
        if let Some(place) = demand.place {
            let n = (PAGE_SIZE as usize - place.skip).min(data.len() - at);
            reader.handle_placed(n).unwrap();
            (at, placed) = (at + n, placed + n);
        }
        let upto = data.len().min(at + demand.then);
        let mut input = &data[at..upto];
        while reader.handle_bytes(&mut input).unwrap().is_some() {}
        small += upto - at - input.len();
        at = upto - input.len();
        if at == data.len() {
            break;
        }
    }
    assert_eq!(small + placed, data.len());
    assert_eq!(placed % PAGE_SIZE as usize, 0);
    assert!(small < data.len() / 50, "{small} small bytes");
}

#[test]
fn every_prefix_of_a_recording_ends_in_a_named_place() {
    let data = recording();
    let mut reader = reader();
    let mut at = 0;
    for cut in (0..data.len()).step_by(9973) {
        let mut input = &data[at..cut];
        while reader.skip_pages(&mut input).unwrap().is_some() {}
        at = cut;
        if let Err(cut_error) = reader.finish() {
            assert_eq!(cut_error.offset, cut as u64);
        }
    }
}

/// What the return path owes in QEMU 11, READY, and three replies to each checkpoint.
#[test]
fn the_secondarys_side_of_every_recording_is_read_and_written_again() {
    for recording in &RECORDINGS {
        let data = fixture(&format!("{}.s2p", recording.name));
        let (mut replies, mut input, mut got) = (Replies::new(), &data[..], vec![]);
        for item in decode(&recording.bytes(), std::iter::empty()).0 {
            if let Item::Command(command) = item {
                replies.expect(command);
            }
        }
        while let Some(reply) = replies.read(&mut input).unwrap() {
            got.extend(reply.encode());
        }
        replies.finish().unwrap();
        assert_eq!(got, data, "{}", recording.name);
        assert_eq!(replies.due(), Message::CheckpointReply);
    }
}

/// Spec resume: a held checkpoint is a migration stream with every page once.
#[test]
fn a_checkpoint_turns_into_a_stream_that_decodes_to_the_same_state() {
    let data = recording();
    let (items, _) = reencode(data, std::iter::empty());
    let (mut config, mut ram, mut blob, mut json) = (None, None, None, None);
    for item in &items {
        match item {
            Item::Configuration(c) => config = Some(c.clone()),
            Item::RamStart { id, table, .. } => ram = Some((*id, table.clone())),
            Item::Blob(b) => blob = Some(b.clone()),
            Item::Description(d) => json = Some(d.clone()),
            _ => {}
        }
    }
    let ((id, table), blob, config) = (ram.unwrap(), blob.unwrap(), config.unwrap());
    let mut resume = Resume::new(&config, id, table.clone(), &blob, json.as_ref());
    let (mut stream, mut asked) = (vec![], 0u64);
    while let Some(segment) = resume.poll(|run| {
        asked += 1;
        run.first.is_multiple_of(2)
    }) {
        match segment {
            Segment::Bytes(bytes) => stream.extend_from_slice(&bytes),
            Segment::Page(run) => {
                assert!(!run.first.is_multiple_of(2));
                stream.extend(std::iter::repeat_n(run.first as u8, PAGE_SIZE as usize));
            }
            _ => unreachable!("no other segment"),
        }
    }
    assert_eq!(asked, table.bytes() / PAGE_SIZE);
    // An ordinary migration has no command 8: the COLO reader says so and stops there.
    let (mut plain, mut input) = (reader(), &stream[..]);
    let error = loop {
        if let Err(error) = plain.skip_pages(&mut input) {
            break error;
        }
    };
    assert!(error.to_string().contains("command 8"), "{error}");
    // With it put back, the stream decodes, and every page stands in it once.
    let start = 8 + 5 + config.machine.as_str().len();
    stream.splice(start..start, *b"\x08\0\x08\0\0");
    let (mut reader, mut input, mut pages) = (reader(), &stream[..], 0u64);
    while let Some(item) = reader.skip_pages(&mut input).unwrap() {
        pages += u64::from(matches!(item, Item::Page(_)));
    }
    assert_eq!(pages, table.bytes() / PAGE_SIZE);
}

/// The fuzz seed is the recording with few pages: two in the migration and in each of two
/// checkpoints. `COLO_BLESS=1` writes it anew.
#[test]
fn the_fuzz_seed_is_the_recording_with_few_pages() {
    let data = recording();
    let (mut reader, mut writer) = (reader(), Writer::new());
    let (mut seed, mut pages, mut blobs, mut input) = (vec![], 0, 0, data);
    while let Some(item) = reader.skip_pages(&mut input).unwrap() {
        match &item {
            Item::RamPart(_) | Item::RamEnd(_) => pages = 0,
            // The first record of a section names its block, if any does.
            Item::Page(_) if pages == 2 => continue,
            Item::Page(page) => {
                pages += 1;
                writer.write(&item, &mut seed).unwrap();
                if !page.zero {
                    let from = reader.offset() as usize;
                    seed.extend_from_slice(&data[from..from + PAGE_SIZE as usize]);
                }
                continue;
            }
            _ => {}
        }
        writer.write(&item, &mut seed).unwrap();
        blobs += usize::from(matches!(item, Item::Blob(_)));
        if blobs == 2 {
            break;
        }
    }
    let (items, again) = reencode(&seed, std::iter::empty());
    assert!(again == seed && matches!(items.last(), Some(Item::Blob(_))));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/qemu_stream/recording");
    if std::env::var_os("COLO_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &seed).unwrap();
    }
    assert!(
        std::fs::read(&path).unwrap() == seed,
        "run with COLO_BLESS=1"
    );
}
