//! The disk as its driver sees it.

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use tempfile::NamedTempFile;

use super::super::test_utils::*;
use super::*;
use crate::device::test_utils::{assert_refuses_damage, saved};
use crate::device::{LoadError, Persist as _};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const SECTORS: u64 = 2048;
const STATUS: u64 = BUFFERS - 0x100;
const HEADER: u64 = BUFFERS - 0x200;

struct Machine {
    driver: Driver<Block>,
    file: NamedTempFile,
}

impl Machine {
    fn new() -> Self {
        Self::with(SECTORS, false)
    }

    fn with(sectors: u64, read_only: bool) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(sectors * 512).unwrap();
        let disk = Disk::open(file.path(), read_only).unwrap();
        let driver = Driver::up(Block::new(Arc::new(disk), "colo-disk"), 0);
        Self { driver, file }
    }

    /// One request with its data in `bufs`. Returns status and bytes written.
    fn request(&mut self, kind: u32, sector: u64, bufs: &[Buf]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.put(HEADER, &header);
        self.driver.put(STATUS, &[0xee]);
        let all = [&[Buf::Out(HEADER, 16)], bufs, &[Buf::In(STATUS, 1)]].concat();
        self.driver.post(0, &all);
        self.driver.notify(0);
        if kind == FLUSH {
            self.await_flush();
        }
        let (_, written) = self.driver.completed(0).unwrap();
        (self.driver.bytes(STATUS, 1)[0], written)
    }

    /// Waits until the device wants to be served, and serves it.
    fn await_flush(&mut self) {
        let fd = self.driver.mmio.wake_fd().as_raw_fd();
        // SAFETY: the device keeps its descriptor open, and it is not served meanwhile.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        self.driver.mmio.serve();
    }

    fn post_flush(&mut self) {
        let header = [&FLUSH.to_le_bytes()[..], &[0; 12]].concat();
        self.driver.put(HEADER, &header);
        self.driver.put(STATUS, &[0xee]);
        self.driver
            .post(0, &[Buf::Out(HEADER, 16), Buf::In(STATUS, 1)]);
        self.driver.notify(0);
    }

    fn trim(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = vec![];
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.driver.put(BUFFERS, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.request(kind, 0, &[Buf::Out(BUFFERS, len)]).0
    }

    fn disk(&self) -> &Disk {
        self.driver.mmio.device().disk()
    }
}

#[test]
fn what_is_written_is_read_back_whatever_the_buffers() {
    let mut machine = Machine::new();
    let data: Vec<u8> = (0..2048u32).map(|i| (i * 7) as u8).collect();
    machine.driver.put(BUFFERS, &data);
    let out = [Buf::Out(BUFFERS, 100), Buf::Out(BUFFERS + 100, 1948)];
    assert_eq!(machine.request(OUT, 5, &out), (OK, 1));
    assert_eq!(
        std::fs::read(machine.file.path()).unwrap()[2560..4608],
        data
    );
    let at = BUFFERS + 0x10000;
    let into = [Buf::In(at, 1), Buf::In(at + 1, 2047)];
    assert_eq!(machine.request(IN, 5, &into), (OK, 2049));
    assert_eq!(machine.driver.bytes(at, 2048), data);
    let metrics = machine.driver.mmio.device().metrics();
    assert_eq!((metrics.reads, metrics.writes), (1, 1));
    assert_eq!((metrics.read_bytes, metrics.written_bytes), (2048, 2048));
}

#[test]
fn transfers_longer_than_the_bounce_buffer_are_whole() {
    let mut machine = Machine::new();
    let data: Vec<u8> = (0..200u32 << 10).map(|i| (i / 3) as u8).collect();
    machine.driver.put(BUFFERS, &data);
    let len = 200 << 10;
    machine.request(OUT, 0, &[Buf::Out(BUFFERS, len)]);
    machine.driver.put(BUFFERS, &vec![0; len as usize]);
    assert_eq!(
        machine.request(IN, 0, &[Buf::In(BUFFERS, len)]),
        (OK, len + 1)
    );
    assert!(machine.driver.bytes(BUFFERS, len as usize) == data);
}

#[test]
fn the_configuration_space_says_how_large_and_how_much_at_once() {
    let mut machine = Machine::new();
    let mut config = [0; 60];
    crate::device::BusDevice::read(&mut machine.driver.mmio, 0x100, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!([word(8), word(12)], [128 << 10, 126]);
    assert_eq!([word(36), word(40), word(44)], [1 << 21, 16, 1]);
    assert_eq!([word(48), word(52)], [32 << 10, 1]);
    assert_eq!(config[56], 1);
}

#[test]
fn flush_and_identity_are_answered() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(
        machine.request(GET_ID, 0, &[Buf::In(BUFFERS, 20)]),
        (OK, 21)
    );
    assert_eq!(&machine.driver.bytes(BUFFERS, 10), b"colo-disk\0");
}

#[test]
fn a_notification_does_not_wait_for_a_flush_and_what_comes_behind_it_does() {
    let mut machine = Machine::new();
    machine.post_flush();
    assert_eq!(machine.driver.completed(0), None, "on another thread");
    let identity = STATUS - 0x40;
    let header = [&GET_ID.to_le_bytes()[..], &[0; 12]].concat();
    machine.driver.put(identity, &header);
    let get_id = [Buf::Out(identity, 16), Buf::In(BUFFERS, 21)];
    machine.driver.post(0, &get_id);
    machine.await_flush();
    assert_eq!(machine.driver.completed(0), Some((0, 1)));
    assert_eq!(machine.driver.bytes(STATUS, 1), [OK]);
    assert!(machine.driver.completed(0).is_some(), "the one behind it");
    assert_eq!(machine.driver.mmio.device().metrics().flushes, 1);
    assert!(!machine.disk().has_unflushed());
}

#[test]
fn a_flush_at_the_stop_is_done_after_it_on_both_sides() {
    let mut one = Machine::new();
    let mut two = Machine::new();
    one.post_flush();
    one.driver.checkpoint_into(&mut two.driver);
    for machine in [&mut one, &mut two] {
        machine.await_flush();
        assert_eq!(machine.driver.completed(0), Some((0, 1)));
        assert!(!machine.disk().has_unflushed());
    }
}

#[test]
fn a_flush_from_before_a_reset_answers_no_request_after_it() {
    let mut machine = Machine::new();
    machine.post_flush();
    machine.driver.initialise(0);
    machine.disk().write_pages(0, &[1; 4096]).unwrap();
    machine.post_flush();
    while machine.driver.completed(0).is_none() {
        machine.await_flush();
    }
    assert!(!machine.disk().has_unflushed(), "written after the first");
}

#[test]
fn requests_that_make_no_sense_are_refused_and_touch_nothing() {
    let mut machine = Machine::new();
    let out = |len| [Buf::Out(BUFFERS, len)];
    for (kind, sector, len) in [
        (OUT, SECTORS, 512),
        (OUT, SECTORS - 1, 1024),
        (OUT, u64::MAX, 512),
        (OUT, u64::MAX / 512, 512),
        (OUT, 0, 511),
        (OUT, 0, 0xffff_0000),
        (IN, SECTORS + 1, 0),
    ] {
        let (status, _) = machine.request(kind, sector, &out(len));
        assert_eq!(status, IOERR, "{kind} at {sector} of {len}");
    }
    for kind in [2, 3, 14, 15, u32::MAX] {
        assert_eq!(machine.request(kind, 0, &[]).0, UNSUPP);
    }
    let into = [Buf::In(RAM - 16, 512)];
    assert_eq!(machine.request(IN, 0, &into), (IOERR, 0));
    let mut words = [0; 4];
    machine.disk().take_dirty(&mut words);
    assert_eq!(words, [0; 4]);
    assert!(
        !machine.disk().has_failed(),
        "the guest's fault, not the disk's"
    );
}

#[test]
fn requests_without_header_or_status_are_completed() {
    let mut machine = Machine::new();
    machine.driver.post(0, &[Buf::Out(HEADER, 16)]);
    machine
        .driver
        .post(0, &[Buf::Out(HEADER, 15), Buf::In(STATUS, 1)]);
    machine.driver.post(0, &[Buf::In(STATUS, 1)]);
    machine.driver.notify(0);
    assert_eq!(machine.driver.completed(0), Some((0, 0)));
    for _ in 0..2 {
        assert!(machine.driver.completed(0).is_some());
        assert_eq!(machine.driver.bytes(STATUS, 1), [IOERR]);
    }
}

#[test]
fn ranges_are_zeroed_or_let_go_within_limits() {
    let mut machine = Machine::new();
    machine.disk().write_pages(0, &[9; 1 << 20]).unwrap();
    assert_eq!(machine.trim(ZEROES, &[(1, 2, 0)]), OK);
    assert_eq!(machine.trim(ZEROES, &[(4, 1, 1)]), OK);
    let mut page = [0; 4096];
    machine.disk().read_pages(0, &mut page).unwrap();
    for (sector, bytes) in page.chunks(512).enumerate() {
        let expected = if [1, 2, 4].contains(&sector) { 0 } else { 9 };
        assert_eq!(bytes, [expected; 512], "sector {sector}");
    }
    assert_eq!(machine.trim(DISCARD, &[(0, 8, 0), (16, 8, 0)]), OK);
    for (kind, ranges, status) in [
        (ZEROES, &[(SECTORS, 1, 0)][..], IOERR),
        (ZEROES, &[(0, 40_000, 0)], IOERR),
        (ZEROES, &[(0, 1, 0), (1, 1, 0)], IOERR),
        (ZEROES, &[(0, 1, 2)], UNSUPP),
        (DISCARD, &[(0, 1, 1)], UNSUPP),
        (DISCARD, &[], IOERR),
        (DISCARD, &[(0, 1, 0); 17], IOERR),
        (DISCARD, &[(u64::MAX, u32::MAX, 0)], IOERR),
    ] {
        assert_eq!(machine.trim(kind, ranges), status, "{kind} {ranges:?}");
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut machine = Machine::with(8, true);
    assert_eq!(machine.request(OUT, 0, &[Buf::Out(BUFFERS, 512)]).0, IOERR);
    assert_eq!(machine.trim(ZEROES, &[(0, 1, 0)]), UNSUPP);
    assert_eq!(machine.request(IN, 0, &[Buf::In(BUFFERS, 512)]).0, OK);
    assert_eq!(
        machine.driver.features() & (1 << 5 | 1 << 13 | 1 << 14),
        1 << 5
    );
}

#[test]
fn a_failing_image_is_an_error_to_the_guest_and_remembered() {
    let mut machine = Machine::new();
    machine.file.as_file().set_len(512).unwrap();
    assert_eq!(machine.request(IN, 8, &[Buf::In(BUFFERS, 512)]), (IOERR, 0));
    assert!(machine.disk().has_failed());
}

#[test]
fn a_request_at_the_stop_is_done_after_it_on_both_sides() {
    let mut one = Machine::new();
    let mut two = Machine::new();
    one.driver
        .put(HEADER, &[&[1, 0, 0, 0][..], &[0; 12]].concat());
    one.driver.put(BUFFERS, &[3; 512]);
    let bufs = [
        Buf::Out(HEADER, 16),
        Buf::Out(BUFFERS, 512),
        Buf::In(STATUS, 1),
    ];
    one.driver.post(0, &bufs);
    one.driver.checkpoint_into(&mut two.driver);
    for machine in [&mut one, &mut two] {
        assert_eq!(machine.driver.completed(0), Some((0, 1)));
        assert!(machine.driver.interrupted());
        assert_eq!(std::fs::read(machine.file.path()).unwrap()[..512], [3; 512]);
    }
}

#[test]
fn another_capacity_is_another_machine_and_damage_is_refused() {
    let one = Machine::new();
    let bytes = saved(&one.driver.mmio);
    let error = Machine::with(8, false)
        .driver
        .mmio
        .load(1, &bytes)
        .unwrap_err();
    assert!(matches!(
        error,
        LoadError::Shape {
            field: "sectors",
            got: SECTORS,
            here: 8,
            ..
        }
    ));
    assert_refuses_damage(&mut Machine::new().driver.mmio, &bytes);
}
