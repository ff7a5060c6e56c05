//! A QEMU process with a guest in it, and its serial console.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

const BINARY: &str = "qemu-system-x86_64";
/// Long enough for a busy machine; a guest that hangs fails the test instead of blocking it.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Qemu {
    process: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    _image: TempDir,
}

impl Qemu {
    /// Boots `image` with 128 MiB and one processor; none if this host cannot.
    pub(crate) fn boot(
        machine: &str,
        image: &[u8],
        cmdline: &str,
        devices: &[&str],
    ) -> Option<Self> {
        if !Path::new("/dev/kvm").exists() {
            return skip("kvm", "no /dev/kvm");
        }
        if Command::new(BINARY).arg("--version").output().is_err() {
            return skip("qemu", "no qemu-system-x86_64");
        }
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("guest.elf");
        std::fs::File::create(&kernel)
            .unwrap()
            .write_all(image)
            .unwrap();
        let mut process = Command::new(BINARY)
            .args([
                "-M",
                machine,
                "-accel",
                "kvm",
                "-cpu",
                "qemu64,-kvmclock",
                "-m",
                "128",
            ])
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-serial",
                "stdio",
                "-no-reboot",
            ])
            .arg("-kernel")
            .arg(&kernel)
            .args(["-append", cmdline])
            .args(devices)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = process.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { return };
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Some(Self {
            process,
            lines,
            seen: Vec::new(),
            _image: directory,
        })
    }

    /// Waits for a line that contains `text` and returns it.
    pub(crate) fn line_with(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    for bad in ["CORRUPT", "PANIC", "FAULT"] {
                        assert!(!line.contains(bad), "{line}");
                    }
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!(
                        "no line with {text:?} in {PATIENCE:?}, only {:#?}",
                        self.seen
                    )
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!(
                        "qemu ended before a line with {text:?}, after {:#?}",
                        self.seen
                    )
                }
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn skip<T>(what: &str, reason: &str) -> Option<T> {
    let required = std::env::var("COLO_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|name| name == what),
        "{what} is required: {reason}"
    );
    println!("SKIPPED: {reason}");
    None
}
