//! Each version's link is known by itself, and what mixes versions is refused by name.

use colo_proto::qemu::{Expectation, Fault, Feature, Generation, Limits, Reader, Within, Writer};

use crate::link::*;

fn sent_by(link: &Link) -> Option<Generation> {
    let bytes = link.bytes();
    let mut reader = Reader::new(Limits::default(), Expectation::default());
    let mut input = &bytes[..];
    while reader.skip_pages(&mut input).unwrap().is_some() {}
    reader.finish().unwrap();
    reader.generation()
}

fn mixed(link: Link, change: impl FnOnce(&mut Link)) -> Refused {
    let mut link = link;
    change(&mut link);
    Refused(read(&link.bytes(), &Expectation::default()).unwrap_err())
}

#[test]
fn a_link_is_known_by_what_it_sends() {
    assert_eq!(sent_by(&Link::good()), Some(Generation::Qemu72));
    assert_eq!(sent_by(&Link::of_10_0()), Some(Generation::Qemu100));
    assert_eq!(sent_by(&Link::of_11_1()), Some(Generation::Qemu111));
    assert_eq!(sent_by(&Link::with_multifd()), Some(Generation::Qemu111));
}

/// 11.1 with a machine type up to 9.2; 10.0 with one speaks as 7.2.
#[test]
fn without_switchover_start_the_opening_tells() {
    let old = Link {
        end: Link::good().end,
        ..Link::of_11_1()
    };
    assert_eq!(sent_by(&old), Some(Generation::Qemu111));
}

#[test]
fn each_links_small_items_are_written_as_they_were_read() {
    for link in [
        Link::good(),
        Link::of_10_0(),
        Link::of_11_1(),
        Link::with_multifd(),
    ] {
        let bytes = link.bytes();
        let mut reader = Reader::new(Limits::default(), Expectation::default());
        let (mut writer, mut out, mut input) = (Writer::new(), vec![], &bytes[..]);
        while let Some(item) = reader.skip_pages(&mut input).unwrap() {
            writer.write(&item, &mut out).unwrap();
            if matches!(&item, colo_proto::qemu::Item::Page(page) if !page.zero) {
                let from = reader.offset() as usize;
                out.extend_from_slice(&bytes[from..from + 4096]);
            }
        }
        assert_eq!(out, bytes);
    }
}

#[test]
fn openings_of_two_versions_do_not_mix() {
    let c = Within::Command;
    let (open, ping, colo) = (command(1, &[]), command(2, &[0; 4]), command(8, &[]));
    let opening = |commands: &[&Vec<u8>]| {
        let all: Vec<u8> = commands.iter().flat_map(|c| c.iter().copied()).collect();
        mixed(Link::good(), |l| l.command = all)
    };
    opening(&[&colo, &open]).with(c, "command", Fault::Mixture);
    opening(&[&colo, &ping]).with(c, "command", Fault::Mixture);
    opening(&[&ping]).with(c, "command", Fault::Mixture);
    opening(&[&colo, &switchover()]).with(c, "command", Fault::Mixture);
    opening(&[&open, &switchover()]).with(c, "command", Fault::Mixture);
    opening(&[&open, &open]).with(c, "command", Fault::Repeated);
    // QEMU below 11 with the capability return-path: its READY would be lost.
    let return_path = Fault::Unsupported(Feature::ReturnPath);
    opening(&[&open, &ping, &colo]).with(c, "command", return_path);
    opening(&[&open]).with(c, "section type", Fault::Missing);
    opening(&[&command(1, &[0])]).with(c, "command length", Fault::Malformed);
    opening(&[&open, &command(2, &[])]).with(c, "command length", Fault::Malformed);
}

#[test]
fn the_announcement_of_the_end_stands_where_its_version_puts_it() {
    let live = Within::Live;
    // 10.0 without it in a checkpoint, 7.2 and 11.1 with it.
    mixed(Link::of_10_0(), |l| l.live = Link::good().live).with(
        live,
        "section type",
        Fault::Mixture,
    );
    mixed(Link::good(), |l| l.live = Link::of_10_0().live).with(
        live,
        "section type",
        Fault::Mixture,
    );
    mixed(Link::of_11_1(), |l| l.live = Link::of_10_0().live).with(
        live,
        "section type",
        Fault::Mixture,
    );
    let twice = |part: &[u8]| [switchover(), part.to_vec()].concat();
    mixed(Link::of_10_0(), |l| l.live = twice(&l.live)).with(live, "command", Fault::Repeated);
    mixed(Link::of_10_0(), |l| l.end = twice(&l.end)).with(
        Within::Command,
        "command",
        Fault::Repeated,
    );
    // Nothing but the end may follow it.
    mixed(Link::of_10_0(), |l| l.part = twice(&l.part)).with(
        Within::Ram,
        "section type",
        Fault::OutOfPlace,
    );
    mixed(Link::of_10_0(), |l| l.live = command(11, &[0])).with(
        live,
        "command length",
        Fault::Malformed,
    );
    for number in [1, 2, 3, 8] {
        let length = if number == 2 { 4 } else { 0 };
        let fault = if number == 3 {
            Fault::Unknown
        } else {
            Fault::OutOfPlace
        };
        let other = command(number, &vec![0; length]);
        mixed(Link::of_11_1(), |l| l.live = other).with(live, "command", fault);
    }
}

/// The fuzzer starts from each version's link and from a channel. `COLO_BLESS=1` writes them anew.
#[test]
fn the_fuzz_seeds_are_the_small_links() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/qemu_stream");
    for (name, bytes) in [
        ("small-10.0", Link::of_10_0().bytes()),
        ("small-11.1", Link::of_11_1().bytes()),
        ("small-multifd", Link::with_multifd().bytes()),
        ("channel", crate::multifd::channels()[0].clone()),
    ] {
        let path = format!("{corpus}/{name}");
        if std::env::var_os("COLO_BLESS").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == bytes, "COLO_BLESS=1");
    }
}
