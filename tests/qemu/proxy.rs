//! A link that is cut behind a given byte.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    thread::JoinHandle,
};

/// Passes one connection on to `to` and closes both sides after `most` bytes of its first
/// direction.
pub(crate) struct Proxy {
    pub(crate) uri: String,
    thread: JoinHandle<u64>,
}

impl Proxy {
    pub(crate) fn start(to: &str, most: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let to = to.trim_start_matches("tcp:").to_owned();
        let thread = std::thread::spawn(move || {
            let (from, _) = listener.accept().unwrap();
            let onward = TcpStream::connect(to).unwrap();
            from.set_nodelay(true).unwrap();
            onward.set_nodelay(true).unwrap();
            let back = (onward.try_clone().unwrap(), from.try_clone().unwrap());
            let back = std::thread::spawn(move || copy(&back.0, &back.1, u64::MAX));
            let passed = copy(&from, &onward, most);
            let _ = onward.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
            back.join().unwrap();
            passed
        });
        Self { uri, thread }
    }

    /// How many bytes came through.
    pub(crate) fn join(self) -> u64 {
        self.thread.join().unwrap()
    }
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, most: u64) -> u64 {
    let (mut buffer, mut passed) = (vec![0; 1 << 16], 0);
    while passed < most {
        let n = (most - passed).min(buffer.len() as u64) as usize;
        match from.read(&mut buffer[..n]) {
            Ok(n @ 1..) if to.write_all(&buffer[..n]).is_ok() => passed += n as u64,
            _ => break,
        }
    }
    passed
}
