//! A plain TCP copy: one thread writes memory, another reads into memory, nothing else.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::Instant,
};

/// Bytes a call, as the loop's lanes use.
const CALL: usize = 256 * 1024;

/// Copies `total` bytes over loopback out of and into `memory` bytes; yields GB/s.
pub(crate) fn copy(total: usize, memory: usize) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut to = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut from = listener.accept().unwrap().0;
    // Filled, so that neither side's pages are first touched while the clock runs.
    let source = vec![1u8; memory];
    let mut memory = vec![2u8; memory];
    let reader = thread::spawn(move || {
        let mut left = total;
        let mut at = 0;
        while left > 0 {
            let end = (at + CALL).min(memory.len());
            let got = from.read(&mut memory[at..end]).unwrap();
            left -= got;
            at = (at + got) % memory.len();
        }
    });
    let begun = Instant::now();
    let mut left = total;
    for piece in source.chunks_exact(CALL).cycle() {
        let piece = &piece[..left.min(CALL)];
        if piece.is_empty() {
            break;
        }
        to.write_all(piece).unwrap();
        left -= piece.len();
    }
    reader.join().unwrap();
    total as f64 / begun.elapsed().as_secs_f64() / 1e9
}
