//! A small good link, the same one with a fault, and how it was refused.

use colo_proto::qemu::{Expectation, Fault, Item, Limits, Reader, StreamError, Within};

pub(crate) const PAGE: u64 = 0x08;
pub(crate) const ZERO: u64 = 0x02;
pub(crate) const CONTINUE: u64 = 0x20;
pub(crate) const EOS: u64 = 0x10;

/// A small good link in its parts: blocks `a` (two pages) and `b` (one), devices `cpu` and `rtc`,
/// one checkpoint.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) header: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) command: Vec<u8>,
    pub(crate) start: Vec<u8>,
    pub(crate) part: Vec<u8>,
    pub(crate) end: Vec<u8>,
    pub(crate) devices: Vec<u8>,
    pub(crate) description: Vec<u8>,
    pub(crate) request: Vec<u8>,
    pub(crate) send: Vec<u8>,
    pub(crate) live: Vec<u8>,
    pub(crate) size: Option<u64>,
    pub(crate) blob: Vec<u8>,
}

impl Link {
    pub(crate) fn good() -> Self {
        Self {
            header: b"QEVM\0\0\0\x03".to_vec(),
            config: config(b"pc"),
            command: command(8, &[]),
            start: start(4, &[("a", 0x2000), ("b", 0x1000)]),
            part: section(2, 2, &[page(0, PAGE, Some("a")), page(0x1000, ZERO, None)]),
            end: section(3, 2, &[]),
            devices: devices(),
            description: description(4, 2),
            request: message(1),
            send: message(3),
            live: [section(3, 2, &[page(0x1000, PAGE, None)]), vec![0]].concat(),
            size: None,
            blob: devices(),
        }
    }

    /// The same link as QEMU 10.0 sends it.
    pub(crate) fn of_10_0() -> Self {
        let good = Self::good();
        Self {
            end: [switchover(), good.end].concat(),
            live: [switchover(), good.live].concat(),
            ..good
        }
    }

    /// The same link as QEMU 11.1 sends it.
    pub(crate) fn of_11_1() -> Self {
        let good = Self::good();
        Self {
            command: [command(1, &[]), command(2, &[0, 0, 0, 7])].concat(),
            end: [switchover(), good.end].concat(),
            ..good
        }
    }

    /// That one with its pages on multifd channels.
    pub(crate) fn with_multifd() -> Self {
        let mut link = Self::of_11_1();
        let table_end = link.start.len() - 13;
        link.start.splice(table_end..table_end, FLUSH.to_be_bytes());
        link.part = section(2, 2, &[word(FLUSH)]);
        link.end = [switchover(), section(3, 2, &[word(FLUSH)])].concat();
        link.live = [section(3, 2, &[word(FLUSH), word(FLUSH)]), vec![0]].concat();
        link
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let size = self.size.unwrap_or(self.blob.len() as u64);
        [
            &self.header,
            &self.config,
            &self.command,
            &self.start,
            &self.part,
            &self.end,
            &self.devices,
            &self.description,
            &self.request,
            &self.send,
            &self.live,
            &message(4),
            &size.to_be_bytes().to_vec(),
            &self.blob,
        ]
        .map(|part| &part[..])
        .concat()
    }
}

pub(crate) const FLUSH: u64 = 0x200;

pub(crate) fn switchover() -> Vec<u8> {
    command(11, &[])
}

pub(crate) fn config(machine: &[u8]) -> Vec<u8> {
    [&[7][..], &(machine.len() as u32).to_be_bytes(), machine].concat()
}

pub(crate) fn subsection(name: &str, body: &[u8]) -> Vec<u8> {
    [&[5][..], &str8(name), &1u32.to_be_bytes(), body].concat()
}

pub(crate) fn command(number: u16, data: &[u8]) -> Vec<u8> {
    let n = data.len() as u16;
    [&[8][..], &number.to_be_bytes(), &n.to_be_bytes(), data].concat()
}

pub(crate) fn str8(name: &str) -> Vec<u8> {
    [&[name.len() as u8], name.as_bytes()].concat()
}

pub(crate) fn start(version: u32, blocks: &[(&str, u64)]) -> Vec<u8> {
    let total: u64 = blocks.iter().map(|(_, n)| n).sum();
    let mut out = [
        &[1, 0, 0, 0, 2, 3][..],
        b"ram\0\0\0\0",
        &version.to_be_bytes(),
    ]
    .concat();
    out.extend((total | 4).to_be_bytes());
    for (name, n) in blocks {
        out.extend([str8(name), n.to_be_bytes().to_vec()].concat());
    }
    out.extend(EOS.to_be_bytes());
    out.extend(b"\x7e\0\0\0\x02");
    out
}

pub(crate) fn section(kind: u8, id: u32, records: &[Vec<u8>]) -> Vec<u8> {
    let id = id.to_be_bytes();
    [
        &[kind][..],
        &id,
        &records.concat(),
        &EOS.to_be_bytes(),
        &[0x7E],
        &id,
    ]
    .concat()
}

pub(crate) fn page(offset: u64, kind: u64, block: Option<&str>) -> Vec<u8> {
    let flags = if block.is_some() {
        kind
    } else {
        kind | CONTINUE
    };
    let mut out = (offset | flags).to_be_bytes().to_vec();
    out.extend(block.map(str8).unwrap_or_default());
    match kind {
        ZERO => out.push(0),
        PAGE => out.extend([0xAB; 4096]),
        _ => {}
    }
    out
}

pub(crate) fn word(word: u64) -> Vec<u8> {
    word.to_be_bytes().to_vec()
}

pub(crate) fn device(id: u8, name: &str, version: u8, payload: &[u8]) -> Vec<u8> {
    let head = [&[4, 0, 0, 0, id][..], &str8(name), &[0; 7], &[version]].concat();
    [&head[..], payload, &[0x7E, 0, 0, 0, id]].concat()
}

pub(crate) fn devices() -> Vec<u8> {
    [
        device(5, "cpu", 1, b"regs"),
        device(7, "rtc", 2, b"ti"),
        vec![0],
    ]
    .concat()
}

pub(crate) fn description(cpu: u32, rtc: u32) -> Vec<u8> {
    let json = format!(
        r#"{{"page_size": 4096, "devices": [
        {{"name": "cpu", "instance_id": 0, "vmsd_name": "cpu", "version": 1,
          "fields": [{{"name": "regs", "type": "buffer", "size": {cpu}}}]}},
        {{"name": "rtc", "instance_id": 0, "size": {rtc},
          "fields": [{{"name": "data", "size": {rtc}, "type": "buffer"}}]}}]}}"#
    );
    [
        &[6][..],
        &(json.len() as u32).to_be_bytes(),
        json.as_bytes(),
    ]
    .concat()
}

pub(crate) fn message(number: u32) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

/// Reads a stream to its end, in one piece and byte by byte: both must end alike.
pub(crate) fn read(bytes: &[u8], expect: &Expectation) -> Result<Vec<Item>, StreamError> {
    let run = |piece: usize| {
        let mut reader = Reader::new(Limits::default(), expect.clone());
        let mut items = vec![];
        for piece in bytes.chunks(piece) {
            let mut input = piece;
            while let Some(item) = reader.skip_pages(&mut input)? {
                items.push(item);
            }
        }
        reader.finish().map(|()| items)
    };
    let (whole, bytewise) = (run(bytes.len().max(1)), run(1));
    assert_eq!(whole, bytewise);
    whole
}

pub(crate) struct Refused(pub(crate) StreamError);

#[track_caller]
pub(crate) fn refused(change: impl FnOnce(&mut Link)) -> Refused {
    refused_by(&Expectation::default(), change)
}

#[track_caller]
pub(crate) fn refused_by(expect: &Expectation, change: impl FnOnce(&mut Link)) -> Refused {
    let mut link = Link::good();
    change(&mut link);
    Refused(read(&link.bytes(), expect).unwrap_err())
}

impl Refused {
    /// Checks where in the stream, which field and what kind of fault.
    #[track_caller]
    pub(crate) fn with(self, within: Within, field: &str, fault: Fault) -> Self {
        let e = &self.0;
        assert_eq!((e.within, e.field, e.fault), (within, field, fault), "{e}");
        self
    }

    #[track_caller]
    pub(crate) fn at(self, offset: usize) -> Self {
        assert_eq!(self.0.offset, offset as u64, "{}", self.0);
        self
    }
}
