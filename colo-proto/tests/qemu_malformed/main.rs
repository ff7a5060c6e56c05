//! Every malformed input of spec qemu 12 is refused, with where, what, got and expected.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use colo_proto::qemu::{Expectation, Fault, Feature, Item, Name, Within};

mod generations;
mod link;
mod multifd;

use link::*;

#[test]
fn the_good_link_is_accepted() {
    let items = read(&Link::good().bytes(), &Expectation::default()).unwrap();
    assert!(matches!(items.last(), Some(Item::Blob(blob)) if blob.sections().len() == 2));
}

#[test]
fn row_1_header_configuration_and_versions() {
    use Fault::{Mismatch, Missing, Unknown};
    refused(|l| l.header[0] = b'X')
        .with(Within::Header, "magic", Mismatch)
        .at(0);
    for version in [2, 4] {
        refused(|l| l.header[7] = version)
            .with(Within::Header, "version", Unknown)
            .at(4);
    }
    refused(|l| l.config.clear())
        .with(Within::Configuration, "section type", Missing)
        .at(8);
    refused(|l| l.start = start(5, &[("a", 0x3000)])).with(
        Within::RamStart,
        "section version",
        Unknown,
    );
}

#[test]
fn row_2_messages_out_of_turn_or_unknown() {
    let m = Within::Message;
    refused(|l| l.request = message(3)).with(m, "message", Fault::OutOfPlace);
    refused(|l| l.send = message(1)).with(m, "message", Fault::OutOfPlace);
    refused(|l| l.request = message(7)).with(m, "message", Fault::Unknown);
    refused(|l| l.send = message(u32::MAX)).with(m, "message", Fault::Unknown);
}

#[test]
fn row_3_sections_out_of_place() {
    let out = Fault::OutOfPlace;
    refused(|l| l.live[0] = 2).with(Within::Live, "section type", out);
    refused(|l| l.live[0] = 4).with(Within::Live, "section type", out);
    refused(|l| l.live = vec![0]).with(Within::Live, "section type", out);
    refused(|l| l.part[0] = 4).with(Within::Ram, "section type", out);
    refused(|l| l.end.clear()).with(Within::Ram, "section type", out);
    refused(|l| l.blob = section(3, 2, &[])).with(Within::Blob, "section type", out);
    refused(|l| l.devices[0] = 2).with(Within::Devices, "section type", out);
    refused(|l| l.part = start(4, &[("a", 0x3000)])).with(
        Within::Ram,
        "section type",
        Fault::Repeated,
    );
}

#[test]
fn row_4_unknown_section_ids() {
    refused(|l| l.part[4] = 0).with(Within::Ram, "section id", Fault::Unknown);
    refused(|l| l.live[4] = 5).with(Within::Live, "section id", Fault::Unknown);
    refused(|l| l.blob[4] = 6).with(Within::Blob, "section id", Fault::Unknown);
    refused(|l| l.blob[4] = 0).with(Within::Blob, "section id", Fault::Unknown);
}

#[test]
fn row_5_ids_used_twice() {
    let twice = |l: &mut Link| {
        l.devices = [
            device(5, "cpu", 1, b"regs"),
            device(5, "rtc", 2, b"ti"),
            vec![0],
        ]
        .concat();
    };
    refused(twice).with(Within::Devices, "section id", Fault::Repeated);
    let rams = |l: &mut Link| {
        l.devices = [
            device(2, "cpu", 1, b"regs"),
            device(7, "rtc", 2, b"ti"),
            vec![0],
        ]
        .concat();
    };
    refused(rams).with(Within::Devices, "section id", Fault::Repeated);
    let again = |l: &mut Link| {
        let cpu = device(5, "cpu", 1, b"regs");
        l.blob = [&cpu[..], &cpu, &device(7, "rtc", 2, b"ti"), &[0]].concat();
    };
    refused(again).with(Within::Blob, "section id", Fault::Repeated);
    let renamed = |l: &mut Link| {
        l.blob = [
            device(5, "cpx", 1, b"regs"),
            device(7, "rtc", 2, b"ti"),
            vec![0],
        ]
        .concat();
    };
    refused(renamed).with(
        Within::Blob,
        "section name, instance and version",
        Fault::Mismatch,
    );
}

#[test]
fn row_6_footers() {
    let n = Link::good().part.len();
    refused(|l| l.part[n - 5] = 0).with(Within::Ram, "footer", Fault::Missing);
    refused(|l| l.part[n - 1] = 9).with(Within::Ram, "footer id", Fault::Mismatch);
    let n = Link::good().live.len() - 1;
    refused(|l| l.live[n - 1] = 9).with(Within::Live, "footer id", Fault::Mismatch);
    let n = devices().len();
    let rtc = Within::Device(colo_proto::qemu::SectionId(7));
    refused(|l| l.blob[n - 2] = 9).with(rtc, "footer", Fault::Missing);
    refused(|l| l.devices[n - 2] = 9).with(rtc, "footer", Fault::Missing);
}

#[test]
fn row_7_record_flags() {
    for (flags, fault) in [
        (0x001, Fault::Unsupported(Feature::FullRam)),
        (0x080, Fault::Unsupported(Feature::Rdma)),
        (0x200, Fault::Unsupported(Feature::Multifd)),
        (0x400, Fault::Unknown),
        (0x000, Fault::Malformed),
        (0x020, Fault::Malformed),
        (PAGE | ZERO, Fault::Malformed),
        (PAGE | EOS, Fault::Malformed),
    ] {
        refused(|l| l.part = section(2, 2, &[word(flags)])).with(
            Within::Ram,
            "record flags",
            fault,
        );
        refused(|l| l.live = section(3, 2, &[word(flags)])).with(
            Within::Live,
            "record flags",
            fault,
        );
    }
}

#[test]
fn row_8_end_of_section_with_an_offset_or_continue() {
    refused(|l| l.live = section(3, 2, &[word(0x1000 | EOS)])).with(
        Within::Live,
        "record offset",
        Fault::Malformed,
    );
    refused(|l| l.live = section(3, 2, &[word(EOS | CONTINUE)])).with(
        Within::Live,
        "record flags",
        Fault::Malformed,
    );
}

#[test]
fn row_9_block_table() {
    let s = Within::RamStart;
    for within in [Within::Ram, Within::Live] {
        let table = section(3, 2, &[word(0x3000 | 4)]);
        refused(|l| match within {
            Within::Ram => l.part = [&[2], &table[1..]].concat(),
            _ => l.live = table,
        })
        .with(within, "record flags", Fault::OutOfPlace);
    }
    let total = 17; // where the announced total stands in the start section
    let sum =
        |l: &mut Link, n: u64| l.start[total..total + 8].copy_from_slice(&(n | 4).to_be_bytes());
    refused(|l| sum(l, 0x1000)).with(s, "block length", Fault::OverLimit);
    refused(|l| sum(l, 0x2000)).with(s, "end of the block table", Fault::OutOfPlace);
    // More announced than listed: the end of records is no name.
    refused(|l| sum(l, 0x4000)).with(s, "block name", Fault::Malformed);
    refused(|l| sum(l, 1 << 40)).with(s, "size of all blocks", Fault::OverLimit);
    refused(|l| l.start = start(4, &[("a", 0x2000), ("a", 0x1000)])).with(
        s,
        "block name",
        Fault::Repeated,
    );
    refused(|l| l.start = start(4, &[("a", 0x2000), ("\n", 0x1000)])).with(
        s,
        "block name",
        Fault::Malformed,
    );
    refused(|l| l.start = start(4, &[("a", 0x2000), ("b", 0), ("c", 0x1000)])).with(
        s,
        "block length",
        Fault::Malformed,
    );
    refused(|l| l.start = start(4, &[("a", 0x1800), ("b", 0x1800)])).with(
        s,
        "block length",
        Fault::Malformed,
    );
    let mut own = Expectation::default();
    let good = read(&Link::good().bytes(), &own).unwrap();
    own.blocks = good.iter().find_map(|item| match item {
        Item::RamStart { table, .. } => Some(table.clone()),
        _ => None,
    });
    read(&Link::good().bytes(), &own).unwrap();
    for (blocks, field, fault) in [
        (
            &[("a", 0x2000), ("x", 0x1000)][..],
            "block name",
            Fault::Mismatch,
        ),
        (
            &[("a", 0x1000), ("b", 0x2000)],
            "block length",
            Fault::Mismatch,
        ),
        (&[("a", 0x2000)], "number of blocks", Fault::Mismatch),
        (
            &[("a", 0x2000), ("b", 0x1000), ("c", 0x1000)],
            "block name",
            Fault::Unknown,
        ),
    ] {
        refused_by(&own, |l| l.start = start(4, blocks)).with(s, field, fault);
    }
}

#[test]
fn row_10_unknown_block_and_offset_outside() {
    refused(|l| l.live = section(3, 2, &[page(0, PAGE, Some("c"))])).with(
        Within::Live,
        "block name",
        Fault::Unknown,
    );
    let live = Link::good();
    let before = live.bytes().len() - live.blob.len() - 12 - live.live.len();
    refused(|l| l.live = section(3, 2, &[page(0x2000, PAGE, None)]))
        .with(Within::Live, "record offset", Fault::OverLimit)
        .at(before + 5);
    refused(|l| l.live = section(3, 2, &[page(0x1000, ZERO, Some("b"))]))
        .with(Within::Live, "record offset", Fault::OverLimit)
        .at(before + 5);
}

#[test]
fn row_11_continue_before_any_block() {
    refused(|l| l.part = section(2, 2, &[page(0, PAGE, None)])).with(
        Within::Ram,
        "record flags",
        Fault::OutOfPlace,
    );
}

#[test]
fn row_12_fill_byte() {
    let mut zero = page(0, ZERO, None);
    *zero.last_mut().unwrap() = 1;
    refused(|l| l.live = section(3, 2, &[zero])).with(Within::Live, "fill byte", Fault::Malformed);
}

#[test]
fn rows_13_and_14_xbzrle_and_compressed_pages() {
    for (flags, feature) in [(0x040, Feature::Xbzrle), (0x100, Feature::Compress)] {
        for flags in [flags, flags | CONTINUE] {
            refused(|l| l.live = section(3, 2, &[word(flags)])).with(
                Within::Live,
                "record flags",
                Fault::Unsupported(feature),
            );
        }
    }
}

#[test]
fn row_15_a_page_twice_in_one_checkpoint_but_not_in_two_rounds_of_the_migration() {
    let twice = [page(0, ZERO, None), page(0, PAGE, None)];
    refused(|l| l.live = section(3, 2, &twice)).with(
        Within::Live,
        "record offset",
        Fault::Repeated,
    );
    let mut link = Link::good();
    link.part = section(2, 2, &[page(0, PAGE, Some("a")), page(0, ZERO, None)]);
    read(&link.bytes(), &Expectation::default()).unwrap();
}

#[test]
fn row_16_commands() {
    let c = Within::Command;
    for (number, data, fault) in [
        (0, 0, Fault::Unknown),
        (3, 0, Fault::Unsupported(Feature::DirtyBitmaps)),
        (3, 16, Fault::Unsupported(Feature::Postcopy)),
        (4, 0, Fault::Unsupported(Feature::Postcopy)),
        (7, 4, Fault::Unsupported(Feature::Packaged)),
        (9, 0, Fault::Unsupported(Feature::Postcopy)),
        (12, 0, Fault::Unknown),
    ] {
        refused(|l| l.command = command(number, &vec![0; data])).with(c, "command", fault);
    }
    refused(|l| l.command = command(8, &[0])).with(c, "command length", Fault::Malformed);
    refused(|l| l.part = command(8, &[])).with(c, "command", Fault::OutOfPlace);
    refused(|l| l.live = command(8, &[])).with(Within::Live, "command", Fault::OutOfPlace);
}

#[test]
fn row_17_size_over_the_bound() {
    refused(|l| l.size = Some(64 << 30)).with(Within::Message, "size", Fault::OverLimit);
    refused(|l| l.size = Some(u64::MAX)).with(Within::Message, "size", Fault::OverLimit);
}

#[test]
fn row_18_blob_empty_or_cut() {
    refused(|l| l.size = Some(0)).with(Within::Message, "size", Fault::Malformed);
    let n = devices().len() as u64;
    refused(|l| l.size = Some(n + 1)).with(Within::Blob, "blob", Fault::Truncated);
    refused(|l| l.size = Some(n - 1)).with(Within::Blob, "section type", Fault::Truncated);
}

#[test]
fn row_19_bytes_after_the_end_mark() {
    let n = devices().len();
    refused(|l| l.blob.push(0)).with(Within::Blob, "end of the blob", Fault::OutOfPlace);
    let before = Link::good().bytes().len() - n;
    refused(|l| l.blob.extend(*b"\0more"))
        .with(Within::Blob, "end of the blob", Fault::OutOfPlace)
        .at(before + n);
}

#[test]
fn row_20_devices_missing_from_the_blob_unless_optional() {
    refused(|l| l.blob = vec![0]).with(Within::Blob, "section", Fault::Missing);
    let without_rtc = [device(5, "cpu", 1, b"regs"), vec![0]].concat();
    let without_cpu = [device(7, "rtc", 2, b"ti"), vec![0]].concat();
    refused(|l| l.blob.clone_from(&without_rtc)).with(Within::Blob, "section", Fault::Missing);
    refused(|l| l.blob.clone_from(&without_cpu)).with(Within::Blob, "section", Fault::Missing);
    let mut expect = Expectation::default();
    expect.optional_devices.push(Name::new(b"rtc").unwrap());
    let mut link = Link::good();
    link.blob = without_rtc;
    read(&link.bytes(), &expect).unwrap();
    refused_by(&expect, |l| l.blob = without_cpu).with(Within::Blob, "section", Fault::Missing);
}

#[test]
fn row_21_unknown_device_instance_or_version() {
    let swap = |id, name, version| {
        move |l: &mut Link| {
            l.blob = [
                device(5, "cpu", 1, b"regs"),
                device(id, name, version, b"ti"),
                vec![0],
            ]
            .concat();
        }
    };
    refused(swap(8, "hpet", 1)).with(Within::Blob, "section id", Fault::Unknown);
    for (id, name, version) in [(7, "hpet", 2), (7, "rtc", 3)] {
        refused(swap(id, name, version)).with(
            Within::Blob,
            "section name, instance and version",
            Fault::Mismatch,
        );
    }
}

#[test]
fn row_22_live_part_without_end_mark() {
    refused(|l| l.live.truncate(l.live.len() - 1)).with(Within::Message, "message", Fault::Unknown);
    refused(|l| *l.live.last_mut().unwrap() = 4).with(Within::Live, "end mark", Fault::Missing);
}

#[test]
fn row_23_every_cut_is_an_error_at_once() {
    let bytes = Link::good().bytes();
    let between = bytes.len() - {
        let l = Link::good();
        l.blob.len() + 12 + l.live.len() + 8
    };
    for cut in 0..bytes.len() {
        match read(&bytes[..cut], &Expectation::default()) {
            Ok(_) => assert_eq!(cut, between, "a stream may end between checkpoints only"),
            Err(error) => {
                assert_eq!((error.fault, error.offset), (Fault::Truncated, cut as u64));
            }
        }
    }
}

#[test]
fn row_24_configuration() {
    use Fault::{Malformed, Mismatch, OverLimit, Repeated, Unknown, Unsupported};
    let c = Within::Configuration;
    let expect = Expectation {
        machine: Name::new(b"pc-i440fx-7.2"),
        ..Expectation::default()
    };
    for name in [&b"pc"[..], b"pc-i440fx-7.2x"] {
        refused_by(&expect, |l| l.config = config(name)).with(c, "machine name", Mismatch);
    }
    refused(|l| l.config = config(b"")).with(c, "machine name length", OverLimit);
    refused(|l| l.config = config(&[b'x'; 256])).with(c, "machine name length", OverLimit);
    refused(|l| l.config = config(b"p\0")).with(c, "machine name", Malformed);
    let bits = subsection("configuration/target-page-bits", &13u32.to_be_bytes());
    refused(|l| l.config.extend(bits)).with(c, "target page bits", Mismatch);
    let other = subsection("configuration/other", &[]);
    refused(|l| l.config.extend(other)).with(c, "subsection name", Unknown);
    let uuid = subsection("configuration/uuid", &[1; 16]);
    refused(|l| l.config.extend([&uuid[..], &uuid].concat())).with(c, "subsection name", Repeated);
    let own = Expectation {
        uuid: Some([2; 16]),
        ..Expectation::default()
    };
    refused_by(&own, |l| l.config.extend(&uuid)).with(c, "uuid", Mismatch);
    for (name, fault) in [
        ("x-ignore-shared", Unsupported(Feature::IgnoreShared)),
        ("multifd", Unsupported(Feature::Multifd)),
        ("something", Unknown),
    ] {
        let body = [&1u32.to_be_bytes()[..], &str8(name)].concat();
        let list = subsection("configuration/capabilities", &body);
        refused(|l| l.config.extend(list)).with(c, "capability", fault);
    }
    let mut link = Link::good();
    link.config.extend(subsection(
        "configuration/target-page-bits",
        &12u32.to_be_bytes(),
    ));
    link.config
        .extend(subsection("configuration/capabilities", &[0; 4]));
    link.config.extend(uuid);
    read(&link.bytes(), &Expectation::default()).unwrap();
}

#[test]
fn rows_25_and_27_command_8_exactly_once() {
    let c = Within::Command;
    refused(|l| l.command.clear()).with(c, "section type", Fault::Missing);
    refused(|l| l.command.extend(command(8, &[]))).with(c, "command", Fault::Repeated);
}

#[test]
fn row_26_description_missing_cut_or_wrong() {
    let rtc = Within::Device(colo_proto::qemu::SectionId(7));
    let cpu = Within::Device(colo_proto::qemu::SectionId(5));
    // A live sender goes silent behind its description: what was wrong with it is the error.
    let until_description = |l: &mut Link| {
        l.request.clear();
        l.send.clear();
        l.live.clear();
        l.size = Some(0);
        l.blob.clear();
    };
    refused(|l| {
        until_description(l);
        l.description.clear();
    })
    .with(
        Within::Devices,
        "device sections and description",
        Fault::Truncated,
    );
    refused(|l| l.description = description(5, 2)).with(cpu, "footer", Fault::Missing);
    refused(|l| l.description = description(4, 1)).with(rtc, "footer", Fault::Missing);
    refused(|l| l.description[20] = b'"').with(
        Within::Description,
        "description",
        Fault::Malformed,
    );
    refused(|l| l.description[1] = 0x7F).with(Within::Description, "length", Fault::OverLimit);
    let more = |l: &mut Link| {
        let end = l.devices.len() - 1;
        l.devices.splice(end..end, device(9, "hpet", 1, b""));
    };
    refused(more).with(Within::Devices, "section", Fault::Mismatch);
}

#[test]
fn block_migration_and_bitmaps_are_refused_by_name() {
    for (name, feature) in [
        ("block", Feature::BlockMigration),
        ("dirty-bitmap", Feature::DirtyBitmaps),
    ] {
        let start = [&[1, 0, 0, 0, 2][..], &str8(name), &[0; 4], &[0, 0, 0, 1]].concat();
        refused(|l| l.start = start).with(
            Within::RamStart,
            "section name",
            Fault::Unsupported(feature),
        );
    }
}

#[test]
fn a_refusal_names_offset_section_field_got_and_expected() {
    let error = refused(|l| l.live = section(3, 2, &[word(0x140)])).0;
    assert_eq!(
        error.to_string(),
        format!(
            "byte {}, live part of a checkpoint, record flags: xbzrle cannot be spoken, switch it \
             off at the sender: got 320 (0x140), expected zero, page, end of section, and continue \
             with the first two",
            error.offset
        )
    );
}

proptest::proptest! {
    /// Any damage: no panic, and the same verdict in one piece and byte by byte.
    #[test]
    fn damage_anywhere_is_judged_alike_at_any_split(
        damage in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<u8>(), 0u8..3), 1..4),
    ) {
        let mut bytes = Link::good().bytes();
        for (at, byte, kind) in damage {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.drain(at..(at + usize::from(byte)).min(bytes.len() - 1).max(at))),
            }
        }
        let _ = read(&bytes, &Expectation::default());
    }
}
