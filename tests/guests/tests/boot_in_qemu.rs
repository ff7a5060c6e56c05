//! Every guest boots in an unmodified QEMU, on both machine types, and does its work there.

#![expect(clippy::unwrap_used, reason = "a test's own set-up may fail the test")]

mod qemu;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

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
    qemu.line_with("ws=1000000 does not fit");
    let ready = qemu.line_with("dirty: ready");
    assert!(value(&ready, "ws") <= 96 << 8, "{ready}");
    qemu.line_with("errors=0");
}

#[test]
fn a_loader_without_multiboot_finds_the_pvh_entry() {
    let image = colo_guests::without_multiboot(colo_guests::DIRTY);
    // Only `pc`: the firmware of `microvm` passes no command line to a PVH kernel.
    let Some(mut qemu) = Qemu::boot("pc", &image, "pages=3 ws=7", &[]) else {
        return;
    };
    qemu.line_with("dirty: ready pages=3 period_us=10000 ws=7");
}

/// `pc` has no virtio-mmio: the guests that need a device there boot and say so.
#[test]
fn a_guest_without_its_device_says_so() {
    for (image, cmdline, says) in [
        (
            colo_guests::SERVER,
            "ip=10.0.2.15/24 gw=10.0.2.2",
            "server: no virtio network card",
        ),
        (colo_guests::DISK, "", "disk: no virtio disk"),
    ] {
        let Some(mut qemu) = Qemu::boot("pc", image, cmdline, &[]) else {
            return;
        };
        qemu.line_with(says);
    }
}

/// The firmware of `pc` enters the real-mode code, with a command line and a ramdisk.
#[test]
fn a_bzimage_starts_in_real_mode() {
    let image = colo_guests::bzimage(colo_guests::DIRTY);
    let ramdisk = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(ramdisk.path(), [3; 1000]).unwrap();
    let devices = ["-initrd", ramdisk.path().to_str().unwrap()];
    let Some(mut qemu) = Qemu::boot("pc", &image, "pages=3 ws=7", &devices) else {
        return;
    };
    qemu.line_with("guest: ramdisk of 1000 bytes, sum 3000");
    qemu.line_with("dirty: ready pages=3 period_us=10000 ws=7");
}

#[test]
fn server_answers_over_both_register_layouts() {
    for legacy in ["on", "off"] {
        let Some((qemu, port)) = boot_server(legacy, "") else {
            return;
        };
        let mut client = Client::connect(port);
        assert_eq!(client.request("GET /counter HTTP/1.1\r\n\r\n"), b"1\n");
        assert_eq!(
            client.request("GET / HTTP/1.1\r\nHost: guest\r\n\r\n"),
            b"2\n"
        );
        assert_eq!(
            client.request("POST /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"),
            b"hello"
        );
        let bytes = client.request("GET /bytes/300000 HTTP/1.1\r\n\r\n");
        assert_eq!(bytes.len(), 300_000);
        assert!(
            (0..)
                .zip(&bytes)
                .all(|(i, &byte)| byte == colo_guests::server_byte(i))
        );
        // SHA-256 of 32 zero bytes, as any other implementation has it.
        assert_eq!(
            client.request("GET /sha256 HTTP/1.1\r\n\r\n"),
            b"66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925\n"
        );
        assert_eq!(client.request("GET /selfcheck HTTP/1.1\r\n\r\n"), b"off\n");
        drop(qemu);
    }
}

#[test]
fn server_answers_pipelined_requests_in_order() {
    let Some((_qemu, port)) = boot_server("off", "") else {
        return;
    };
    let mut client = Client::connect(port);
    client.send("GET /counter HTTP/1.1\r\n\r\n".repeat(200).as_bytes());
    for want in 1..=200 {
        assert_eq!(client.response(), format!("{want}\n").as_bytes());
    }
}

#[test]
fn server_talks_to_many_at_once_and_again_after_they_left() {
    let Some((_qemu, port)) = boot_server("off", "pages=16 ws=256") else {
        return;
    };
    for _ in 0..4 {
        let mut clients = Vec::new();
        for _ in 0..32 {
            // One by one until answered: QEMU's forwarded port has a backlog of one.
            let mut client = Client::connect(port);
            client.request("GET / HTTP/1.1\r\n\r\n");
            client.send(b"POST /echo HTTP/1.1\r\nContent-Length: 4\r\n\r\n");
            clients.push(client);
        }
        for client in &mut clients {
            client.send(b"body");
        }
        for client in &mut clients {
            assert_eq!(client.response(), b"body");
        }
    }
    let check = Client::connect(port).request("GET /selfcheck HTTP/1.1\r\n\r\n");
    let check = String::from_utf8(check).unwrap();
    assert!(
        value(&check, "verified") > 0 && value(&check, "errors") == 0,
        "{check}"
    );
}

#[test]
fn servers_of_two_boots_draw_different_numbers() {
    let draw = || {
        let (_qemu, port) = boot_server("off", "")?;
        Some(Client::connect(port).request("GET /random HTTP/1.1\r\n\r\n"))
    };
    let (Some(one), Some(other)) = (draw(), draw()) else {
        return;
    };
    assert_eq!(one.len(), 33);
    assert_ne!(one, other);
}

#[test]
fn disk_writes_and_verifies_and_leaves_blocks_that_others_can_judge() {
    for legacy in ["on", "off"] {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let devices = [
            "-global",
            &format!("virtio-mmio.force-legacy={legacy}"),
            "-drive",
            &format!("if=none,id=disk,format=raw,file={}", image.path().display()),
            "-device",
            "virtio-blk-device,drive=disk",
        ];
        let Some(mut qemu) = Qemu::boot("microvm", colo_guests::DISK, "blocks=200", &devices)
        else {
            return;
        };
        qemu.line_with("disk: ready blocks=200 of=256");
        let line = qemu.line_with("disk: t=2 ");
        assert!(line.ends_with("errors=0"), "{line}");
        for key in ["written", "verified", "flushed"] {
            assert!(value(&line, key) > 0, "{line}");
        }
        drop(qemu);

        let bytes = std::fs::read(image.path()).unwrap();
        let written = value(&line, "written");
        for (index, block) in (0..200).zip(bytes.chunks(4096)) {
            let words: Vec<_> = block
                .chunks(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                .collect();
            let sum = words
                .iter()
                .enumerate()
                .filter(|word| word.0 != 2)
                .fold(0_u64, |sum, word| sum.rotate_left(7) ^ word.1);
            assert_eq!((words[0], words[2]), (index, sum));
            assert!(
                words[1] > written / 200,
                "block {index} is of generation {}",
                words[1]
            );
        }
    }
}

/// A server behind a forwarded port of this host.
fn boot_server(legacy: &str, cmdline: &str) -> Option<(Qemu, u16)> {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let cmdline = format!("ip=10.0.2.15/24 gw=10.0.2.2 {cmdline}");
    let devices = [
        "-global",
        &format!("virtio-mmio.force-legacy={legacy}"),
        "-netdev",
        &format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:80"),
        "-device",
        "virtio-net-device,netdev=net,mac=52:54:00:c0:10:01",
    ];
    let mut qemu = Qemu::boot("microvm", colo_guests::SERVER, &cmdline, &devices)?;
    let ready = qemu.line_with("server: ready ip=10.0.2.15/24 gw=10.0.2.2");
    assert!(ready.contains("mac=52-54-00-c0-10-01"), "{ready}");
    Some((qemu, port))
}

/// A connection to the server, with as much HTTP as its answers need.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        // A guest that hangs fails the test instead of blocking it.
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    fn request(&mut self, text: &str) -> Vec<u8> {
        self.send(text.as_bytes());
        self.response()
    }

    fn response(&mut self) -> Vec<u8> {
        let mut length = 0;
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).unwrap();
            let line = line.trim_end();
            if let Some(number) = line.strip_prefix("Content-Length: ") {
                length = number.parse().unwrap();
            }
            if line.starts_with("HTTP/1.1") {
                assert_eq!(line, "HTTP/1.1 200 OK");
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).unwrap();
        body
    }
}

/// The number after `key=` in a line of words.
fn value(line: &str, key: &str) -> u64 {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
        .unwrap_or_else(|| panic!("no {key}= in {line:?}"))
}
