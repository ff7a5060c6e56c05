//! The guest's disk goes along: its blocks are part of every checkpoint, and a survivor's disk is
//! the one its guest believes in. The guest checks each block it reads against what it wrote.

use std::{fs, path::Path, thread, time::Duration};

use colod::{
    config::Disk,
    demo::{Host, Stage},
};

use crate::common::*;

/// The newest second that the guest on this host reports, if every block was right so far.
fn second(console: &Path) -> Option<u64> {
    let said = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    assert!(!said.contains("bad block"), "{said}");
    // The last line may still be on its way.
    let (whole, _) = said.rsplit_once('\n')?;
    let line = whole.lines().rev().find(|l| l.starts_with("disk: t="))?;
    assert!(line.contains("errors=0"), "{line}");
    let digits = line.strip_prefix("disk: t=")?.split(' ').next()?;
    digits.parse().ok()
}

/// Waits until the guest reports a later second there: the console is a file, so it is looked at.
fn works_on(console: &Path, after: u64) -> u64 {
    let until = std::time::Instant::now() + PATIENCE;
    loop {
        if let Some(now) = second(console).filter(|now| *now > after) {
            return now;
        }
        assert!(
            std::time::Instant::now() < until,
            "{} is silent after second {after}",
            console.display()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn survives_both_hosts_in_turn() {
    let Some(_alone) = alone() else { return };
    let files = tempfile::tempdir().unwrap();
    let (kernel, image) = (files.path().join("disk.elf"), files.path().join("disk.img"));
    fs::write(&kernel, colo_guests::DISK).unwrap();
    fs::write(&image, vec![0; 4 << 20]).unwrap();
    let mut settings = settings();
    settings.vm.kernel = kernel;
    settings.vm.cmdline = "blocks=512".into();
    settings.disk = Some(Disk {
        path: image,
        readonly: false,
    });
    let mut stage = Stage::new(colod(), settings).unwrap();
    let console =
        |stage: &Stage, host: Host| stage.directory().join(host.name()).join("serial.log");

    let mut alpha = stage.start(Host::A, "primary").unwrap();
    let mut beta = stage.start(Host::B, "secondary").unwrap();
    expect(&alpha, "PROTECTED", 0);
    let seen = works_on(&console(&stage, Host::A), 1);
    let events = beta.events().len();
    alpha.kill().unwrap();
    expect(&beta, "PROMOTED", events);
    let seen = works_on(&console(&stage, Host::B), seen);

    // The first host's disk is old now; it is synchronised like its memory.
    let events = beta.events().len();
    let alpha = stage.start(Host::A, "secondary").unwrap();
    expect(&beta, "PROTECTED", events);
    let events = alpha.events().len();
    beta.kill().unwrap();
    expect(&alpha, "PROMOTED", events);
    works_on(&console(&stage, Host::A), seen + 1);
}
