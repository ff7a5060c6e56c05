//! Every guest boots in an unmodified QEMU, on both machine types, and does its work there.

mod qemu;

use qemu::Qemu;

const MACHINES: [&str; 2] = ["pc", "microvm"];

#[test]
fn dirty_writes_and_verifies() {
    for machine in MACHINES {
        let Some(mut qemu) = Qemu::boot(
            machine,
            colo_guests::DIRTY,
            "pages=64 period_us=10000 ws=1024",
            &[],
        ) else {
            return;
        };
        let ready = qemu.line_with("dirty: ready");
        assert!(
            ready.contains("pages=64 period_us=10000 ws=1024 verify=64"),
            "{ready}"
        );
        let line = qemu.line_with("dirty: t=2 ");
        assert!(line.ends_with("errors=0"), "{line}");
        assert!(value(&line, "written") > 0, "{line}");
        assert!(value(&line, "verified") > 0, "{line}");
    }
}

#[test]
fn dirty_uses_what_fits_of_a_working_set() {
    let Some(mut qemu) = Qemu::boot("microvm", colo_guests::DIRTY, "ws=1000000", &[]) else {
        return;
    };
    let ready = qemu.line_with("dirty: ready");
    assert!(value(&ready, "ws") <= 96 << 8, "{ready}");
    qemu.line_with("dirty: ws=1000000 does not fit");
    qemu.line_with("errors=0");
}

#[test]
fn a_loader_without_multiboot_finds_the_pvh_entry() {
    let mut image = colo_guests::DIRTY.to_vec();
    let magic = 0x1BAD_B002_u32.to_le_bytes();
    let header = image.windows(4).position(|window| window == magic).unwrap();
    image[header] ^= 0xFF;
    // Only `pc`: the firmware of `microvm` passes no command line to a PVH kernel.
    let Some(mut qemu) = Qemu::boot("pc", &image, "pages=3 ws=7", &[]) else {
        return;
    };
    qemu.line_with("dirty: ready pages=3 period_us=10000 ws=7");
}

/// The number after `key=` in a line of words.
fn value(line: &str, key: &str) -> u64 {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
        .unwrap_or_else(|| panic!("no {key}= in {line:?}"))
}
