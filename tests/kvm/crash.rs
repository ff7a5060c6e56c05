//! A guest that cannot go on: the daemon says why and ends as a failure, so that whoever watches it
//! starts it again.

use std::fs;

use colod::demo::{Host, Stage};

use crate::common::*;

const TEXT: usize = 20_000;
const LOAD: u32 = 0x10_0000;

/// A multiboot kernel that prints `TEXT` letters and then runs where nothing is, which KVM cannot
/// emulate.
fn kernel() -> Vec<u8> {
    let magic = 0x1bad_b002_u32;
    let (flags, entry) = (0x10000, LOAD + 32);
    let sum = 0_u32.wrapping_sub(magic + flags);
    let words = [magic, flags, sum, LOAD, LOAD, 0, 0, entry];
    let mut image: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    image.push(0xbe); // mov esi, text
    image.extend((LOAD + 0x1000).to_le_bytes());
    image.push(0xb9); // mov ecx, length
    image.extend((TEXT as u32).to_le_bytes());
    image.extend([0xfc, 0xf3, 0x6e]); // cld; rep outsb
    image.extend([0xb8, 0, 0, 0, 0xe0]); // mov eax, 0xe0000000
    image.extend([0xff, 0xe0]); // jmp eax
    image.resize(0x1000, 0);
    image.extend([b'x'; TEXT]);
    image
}

#[test]
fn ends_the_daemon_with_status_one_and_all_that_was_printed() {
    let Some(_alone) = alone() else { return };
    let files = tempfile::tempdir().unwrap();
    let mut settings = settings();
    settings.vm.kernel = files.path().join("kernel");
    fs::write(&settings.vm.kernel, kernel()).unwrap();
    for command in ["run", "primary"] {
        let mut stage = Stage::new(colod(), settings.clone()).unwrap();
        let mut daemon = stage.start(Host::A, command).unwrap();
        let status = daemon.wait_end(PATIENCE).unwrap();
        let log = daemon.log();
        assert_eq!(status.code(), Some(1), "{command}: {log}");
        let last = log.lines().last().unwrap();
        assert!(last.contains("the guest cannot go on"), "{log}");
        assert!(!log.contains("the peer takes over"), "there is none: {log}");
        let console = stage.directory().join("alpha").join("serial.log");
        assert_eq!(fs::read(console).unwrap(), [b'x'; TEXT], "{command}");
    }
}
