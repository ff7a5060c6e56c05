//! A console (virtio 1.2 section 5.3) with a single port: a ring of lines out, a ring of empty buffers for input.

use std::collections::VecDeque;
use std::io::Write as _;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::backend::Saved;
use super::chain::Chain;
use super::{Backend, ConfigSpace, Queues, Virtio};
use crate::device::codec::{Decoder, Encoder};
use crate::device::{LoadError, Sink};
use crate::memory::GuestRam;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE: u16 = 64;
/// Most bytes printed for one request; the rest of it is dropped.
const MOST_BYTES: usize = 64 << 10;
/// Input kept for a guest that does not read.
const MOST_WAITING: usize = 4096;

/// A virtio console; [`Virtio<Console>`] is the device.
#[derive(Debug)]
pub struct Console {
    sink: Sink,
    chain: Chain,
    waiting: VecDeque<u8>,
    printed: u64,
    dropped: u64,
}

impl Console {
    /// A console that prints to `sink`.
    #[must_use]
    pub fn new(sink: Sink) -> Self {
        Self {
            sink,
            chain: Chain::default(),
            waiting: VecDeque::new(),
            printed: 0,
            dropped: 0,
        }
    }

    /// Where output goes; mute it here.
    #[must_use]
    pub fn sink(&self) -> &Sink {
        &self.sink
    }

    /// Bytes the guest printed since creation, muted ones included.
    #[must_use]
    pub fn printed(&self) -> u64 {
        self.printed
    }

    /// Bytes dropped in either direction since creation.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn print(&mut self, ram: &GuestRam, chain: &Chain) {
        let len = chain.readable.len();
        let end = len.min(MOST_BYTES);
        self.dropped += (len - end) as u64;
        let mut piece = [0; 1024];
        let mut at = 0;
        while at < end {
            let most = piece.len().min(end - at);
            let piece = piece.get_mut(..most).unwrap_or_default();
            let read = chain.readable.read(ram, at, piece);
            if read.is_err() || self.sink.write_all(piece).is_err() {
                self.dropped += (end - at) as u64;
                return;
            }
            self.printed += piece.len() as u64;
            at += piece.len();
        }
        // A sink that cannot flush has lost nothing it could give back.
        let _lost = self.sink.flush();
    }

    fn type_in(&mut self, queues: &mut Queues) {
        let mut typed = false;
        // Bounded: each turn takes a byte at least, or stops.
        while !self.waiting.is_empty() {
            let found = queues.pop(RX, &mut self.chain)
                || queues.arm(RX) && queues.pop(RX, &mut self.chain);
            if !found {
                break;
            }
            let (front, _) = self.waiting.as_slices();
            let room = self.chain.writable.len();
            let front = front.get(..room).unwrap_or(front);
            let written = match self.chain.writable.write(queues.ram(), 0, front) {
                Ok(()) => front.len(),
                Err(_) => 0,
            };
            // A buffer outside RAM, or without room, costs a byte: so the loop ends.
            self.waiting.drain(..written.max(1));
            self.dropped += u64::from(written == 0);
            queues.complete(RX, &self.chain, written);
            typed = true;
        }
        if typed {
            queues.signal(RX);
        }
    }
}

impl Virtio<Console> {
    /// Types `bytes` at the console. Returns how many were taken; the rest is dropped, since a guest that leaves
    /// 4 KiB unread is not listening. What waits for buffers is this host's and not in the checkpoint.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(MOST_WAITING - self.device.waiting.len());
        let (head, rest) = bytes.split_at(taken);
        self.device.waiting.extend(head);
        self.device.dropped += rest.len() as u64;
        self.device.type_in(&mut self.queues);
        taken
    }
}

impl Backend for Console {
    const ID: u32 = VIRTIO_ID_CONSOLE;

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE, QUEUE]
    }

    /// Size, ports and emergency write belong to features that are not offered.
    fn config(&self) -> ConfigSpace {
        ConfigSpace::new()
    }

    fn serve(&mut self, queues: &mut Queues) -> bool {
        self.type_in(queues);
        let mut chain = std::mem::take(&mut self.chain);
        let left = queues.serve(TX, &mut chain, QUEUE.into(), |ram, chain| {
            self.print(ram, chain);
            0
        });
        self.chain = chain;
        left
    }
}

/// Nothing of its own: requests are in the rings.
impl Saved for Console {
    type State = ();

    fn save(&self, _: &mut Encoder<'_>) {}

    fn decode(&self, _: &mut Decoder<'_>) -> Result<(), LoadError> {
        Ok(())
    }

    fn apply(&mut self, (): ()) {}
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::test_utils::*;
    use super::*;
    use crate::device::Persist as _;
    use crate::device::test_utils::{assert_refuses_damage, saved};

    fn up() -> (Driver<Console>, Arc<Mutex<Vec<u8>>>) {
        let printed = Arc::new(Mutex::new(Vec::new()));
        let out = printed.clone();
        let sink = Sink::callback(move |bytes| out.lock().unwrap().extend_from_slice(bytes));
        (Driver::up(Console::new(sink), 0), printed)
    }

    #[test]
    fn what_the_guest_prints_comes_out_in_order() {
        let (mut driver, printed) = up();
        driver.put(BUFFERS, b"hello world");
        driver.post(TX, &[Buf::Out(BUFFERS, 6), Buf::Out(BUFFERS + 6, 5)]);
        driver.notify(TX);
        assert_eq!(driver.completed(TX), Some((0, 0)));
        assert_eq!(&*printed.lock().unwrap(), b"hello world");
    }

    #[test]
    fn a_secondary_is_silent() {
        let (mut driver, printed) = up();
        driver.mmio.device().sink().set_muted(true);
        driver.post(TX, &[Buf::Out(BUFFERS, 6)]);
        driver.notify(TX);
        assert!(driver.completed(TX).is_some());
        assert_eq!(*printed.lock().unwrap(), b"");
    }

    #[test]
    fn input_waits_for_buffers_and_fills_them_in_order() {
        let (mut driver, _) = up();
        assert_eq!(driver.mmio.input(b"abcdef"), 6);
        driver.post(RX, &[Buf::In(BUFFERS, 4)]);
        driver.post(RX, &[Buf::In(BUFFERS + 4, 4)]);
        driver.notify(RX);
        assert_eq!(driver.completed(RX), Some((0, 4)));
        assert_eq!(driver.completed(RX), Some((1, 2)));
        assert_eq!(driver.bytes(BUFFERS, 6), b"abcdef");
        assert!(driver.interrupted());
    }

    #[test]
    fn wrong_buffers_and_too_much_input_are_bounded() {
        let (mut driver, printed) = up();
        assert_eq!(driver.mmio.input(&[b'x'; 5000]), 4096);
        for _ in 0..5 {
            driver.post(RX, &[Buf::In(RAM, 4)]);
            driver.post(RX, &[Buf::Out(BUFFERS, 4)]);
        }
        driver.post(TX, &[Buf::Out(BUFFERS, u32::MAX)]);
        driver.post(TX, &[Buf::Out(RAM - 2, 4)]);
        driver.notify(RX);
        for _ in 0..10 {
            assert!(matches!(driver.completed(RX), Some((_, 0))));
        }
        assert!(driver.completed(TX).is_some());
        assert!(driver.completed(TX).is_some());
        assert_eq!(printed.lock().unwrap().len(), 64 << 10);
    }

    #[test]
    fn a_checkpoint_carries_the_rings() {
        let (mut one, first) = up();
        let (mut two, second) = up();
        one.put(BUFFERS, b"line");
        one.post(TX, &[Buf::Out(BUFFERS, 4)]);
        one.post(RX, &[Buf::In(BUFFERS, 4)]);
        two.mmio.device().sink().set_muted(true);
        one.checkpoint_into(&mut two);
        assert_eq!(*first.lock().unwrap(), b"line");
        assert_eq!(*second.lock().unwrap(), b"");
        assert_eq!(two.completed(TX), Some((0, 0)));
        two.mmio.input(b"ok");
        assert_eq!(two.completed(RX), Some((0, 2)));
        let bytes = saved(&one.mmio);
        two.mmio.quiesce();
        assert_refuses_damage(&mut two.mmio, &bytes);
    }
}
