//! MSI-X: messages that the guest programs, each with an irqfd of its own.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::codec::{Decoder, Encoder};
use crate::device::{Irq, LoadError};

/// No message is assigned.
pub(crate) const NO_VECTOR: u16 = 0xffff;
/// Most messages of one function.
pub(crate) const MOST_VECTORS: usize = 64;

/// Bytes of a table entry: address, data, control.
pub(crate) const ENTRY: u64 = 16;
const CONTROL_MASKED: u32 = 1;

/// Message control: the function's messages are held back, and: it uses messages at all.
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;
/// What the guest may write of the message control.
pub(crate) const CONTROL_BITS: u16 = FUNCTION_MASK | ENABLE;

/// What a message line sends when it is raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Message {
    /// Where the message is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Tells the interrupt controller which message each line sends.
pub trait MessageRoutes: Send + Sync + fmt::Debug {
    /// From now on each line (named by its GSI) sends its message.
    fn route(&self, messages: &[(u32, Message)]);
}

/// A line that the interrupt controller turns into a message.
#[derive(Debug, Clone)]
pub struct MessageLine {
    /// Its number.
    pub gsi: u32,
    /// The irqfd.
    pub irq: Irq,
}

/// The messages of one function; clones are the same.
#[derive(Debug, Clone)]
pub struct Msix(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    lines: Vec<MessageLine>,
    routes: Arc<dyn MessageRoutes>,
    state: Mutex<State>,
}

#[derive(Debug, Clone)]
pub(crate) struct State {
    control: u16,
    entries: Vec<Entry>,
    /// Message of the configuration, then of each ring.
    config: u16,
    rings: Vec<u16>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    message: Message,
    masked: bool,
    pending: bool,
    /// What the line sends now.
    routed: Option<Message>,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            message: Message::default(),
            masked: true,
            pending: false,
            routed: None,
        }
    }
}

impl Msix {
    /// Messages for a device with `rings` rings, one on each of `lines` (64 at most are used).
    #[must_use]
    pub fn new(rings: usize, mut lines: Vec<MessageLine>, routes: Arc<dyn MessageRoutes>) -> Self {
        lines.truncate(MOST_VECTORS);
        let state = Mutex::new(State {
            control: 0,
            entries: vec![Entry::default(); lines.len()],
            config: NO_VECTOR,
            rings: vec![NO_VECTOR; rings],
        });
        Self(Arc::new(Shared {
            lines,
            routes,
            state,
        }))
    }

    /// How many messages there are.
    #[must_use]
    pub fn vectors(&self) -> usize {
        self.0.lines.len()
    }

    /// The lines, in the order of the table.
    #[must_use]
    pub fn lines(&self) -> &[MessageLine] {
        &self.0.lines
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- What the guest programs ------------------------------------------------------------------

    pub(crate) fn set_control(&self, control: u16) {
        let mut state = self.state();
        state.control = control & CONTROL_BITS;
        self.update(&mut state);
    }

    /// Reads the table; an access that is not one or two aligned words reads as all ones.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        if !(offset.is_multiple_of(4) && matches!(data.len(), 4 | 8)) {
            return;
        }
        for (word, at) in data.chunks_exact_mut(4).zip((offset..).step_by(4)) {
            if let Some(value) = state.word(at) {
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    pub(crate) fn write_table(&self, offset: u64, data: &[u8]) {
        if !(offset.is_multiple_of(4) && matches!(data.len(), 4 | 8)) {
            return;
        }
        let mut state = self.state();
        for (word, at) in data.chunks_exact(4).zip((offset..).step_by(4)) {
            if let Ok(word) = word.try_into() {
                state.set_word(at, u32::from_le_bytes(word));
            }
        }
        self.update(&mut state);
    }

    /// The bits of messages that wait behind a mask.
    pub(crate) fn pending(&self) -> u64 {
        let state = self.state();
        let bits = state.entries.iter().enumerate();
        bits.fold(0, |all, (n, entry)| all | u64::from(entry.pending) << n)
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.state().config
    }

    /// A message that does not exist is none, which the driver reads back.
    pub(crate) fn assign_config(&self, vector: u16) {
        self.state().config = self.existing(vector);
    }

    pub(crate) fn ring_vector(&self, ring: usize) -> u16 {
        self.state().rings.get(ring).copied().unwrap_or(NO_VECTOR)
    }

    pub(crate) fn assign_ring(&self, ring: usize, vector: u16) {
        if let Some(of_ring) = self.state().rings.get_mut(ring) {
            *of_ring = self.existing(vector);
        }
    }

    /// As a reset of the device does.
    pub(crate) fn unassign(&self) {
        let mut state = self.state();
        state.config = NO_VECTOR;
        state.rings.fill(NO_VECTOR);
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    // --- What the device raises -------------------------------------------------------------------

    pub(crate) fn raise_ring(&self, ring: usize) {
        let mut state = self.state();
        let vector = state.rings.get(ring).copied().unwrap_or(NO_VECTOR);
        self.raise(&mut state, vector);
    }

    pub(crate) fn raise_config(&self) {
        let mut state = self.state();
        let vector = state.config;
        self.raise(&mut state, vector);
    }

    /// Every message that is assigned, once.
    pub(crate) fn raise_assigned(&self) {
        let mut state = self.state();
        let rings = state.rings.iter().copied();
        let mut assigned: Vec<u16> = rings.chain([state.config]).collect();
        assigned.sort_unstable();
        assigned.dedup();
        for vector in assigned {
            self.raise(&mut state, vector);
        }
    }

    fn raise(&self, state: &mut State, vector: u16) {
        let at = usize::from(vector);
        let held_back = state.control & FUNCTION_MASK != 0;
        let (Some(entry), Some(line)) = (state.entries.get_mut(at), self.0.lines.get(at)) else {
            return;
        };
        if state.control & ENABLE == 0 {
            return;
        }
        if held_back || entry.masked {
            entry.pending = true;
        } else {
            line.irq.raise();
        }
    }

    /// Tells the interrupt controller what changed, and sends what is no longer held back.
    fn update(&self, state: &mut State) {
        if state.control & CONTROL_BITS != ENABLE {
            return;
        }
        let mut fresh = Vec::new();
        let mut ready = Vec::new();
        for (entry, line) in state.entries.iter_mut().zip(&self.0.lines) {
            if entry.masked {
                continue;
            }
            if entry.routed != Some(entry.message) {
                entry.routed = Some(entry.message);
                fresh.push((line.gsi, entry.message));
            }
            if std::mem::take(&mut entry.pending) {
                ready.push(&line.irq);
            }
        }
        if !fresh.is_empty() {
            self.0.routes.route(&fresh);
        }
        for irq in ready {
            irq.raise();
        }
    }

    // --- Life cycle -------------------------------------------------------------------------------

    pub(crate) fn hold(&self) {
        self.0.lines.iter().for_each(|line| line.irq.hold());
    }

    pub(crate) fn forget(&self) {
        self.0.lines.iter().for_each(|line| line.irq.forget());
    }

    pub(crate) fn release(&self) {
        self.0.lines.iter().for_each(|line| line.irq.release());
    }

    pub(crate) fn save(&self, encoder: &mut Encoder<'_>) {
        let state = self.state();
        // 64 at most, as are rings.
        encoder.u8(state.entries.len() as u8);
        for entry in &state.entries {
            encoder.u64(entry.message.address);
            encoder.u32(entry.message.data);
            encoder.bool(entry.masked);
            encoder.bool(entry.pending);
        }
        encoder.u16(state.config);
        encoder.u8(state.rings.len() as u8);
        for vector in &state.rings {
            encoder.u16(*vector);
        }
    }

    /// `control` is the message control among the function's registers.
    pub(crate) fn decode(
        &self,
        control: u16,
        decoder: &mut Decoder<'_>,
    ) -> Result<State, LoadError> {
        let mut state = self.state().clone();
        state.control = control & CONTROL_BITS;
        let vectors = decoder.u8("messages")?;
        decoder.same("messages", vectors.into(), state.entries.len() as u64)?;
        for entry in &mut state.entries {
            entry.message = Message {
                address: decoder.u64("message address")?,
                data: decoder.u32("message data")?,
            };
            entry.masked = decoder.bool("message mask")?;
            entry.pending = decoder.bool("message pending")?;
        }
        let known = |decoder: &mut Decoder<'_>, field| {
            let vector = decoder.u16(field)?;
            if self.existing(vector) != vector {
                return Err(decoder.invalid(field, vector.into(), "a message there is, or none"));
            }
            Ok(vector)
        };
        state.config = known(decoder, "message of the configuration")?;
        let rings = decoder.u8("rings")?;
        decoder.same("rings", rings.into(), state.rings.len() as u64)?;
        for vector in &mut state.rings {
            *vector = known(decoder, "message of a ring")?;
        }
        Ok(state)
    }

    pub(crate) fn apply(&self, new: State) {
        let mut state = self.state();
        *state = new;
        self.update(&mut state);
    }
}

impl State {
    fn word(&self, at: u64) -> Option<u32> {
        let entry = self.entries.get(usize::try_from(at / ENTRY).ok()?)?;
        match at % ENTRY {
            0 => Some(entry.message.address as u32),
            4 => Some((entry.message.address >> 32) as u32),
            8 => Some(entry.message.data),
            _ => Some(u32::from(entry.masked)),
        }
    }

    fn set_word(&mut self, at: u64, value: u32) {
        let index = usize::try_from(at / ENTRY).unwrap_or(usize::MAX);
        let Some(entry) = self.entries.get_mut(index) else {
            return;
        };
        let address = &mut entry.message.address;
        match at % ENTRY {
            0 => *address = *address >> 32 << 32 | u64::from(value),
            4 => *address = u64::from(value) << 32 | *address & u64::from(u32::MAX),
            8 => entry.message.data = value,
            _ => entry.masked = value & CONTROL_MASKED != 0,
        }
    }
}

#[cfg(test)]
pub(crate) mod test_utils {
    use super::*;

    /// Remembers what was routed.
    #[derive(Debug, Default)]
    pub(crate) struct Routed(pub(crate) Mutex<Vec<(u32, Message)>>);

    impl MessageRoutes for Routed {
        fn route(&self, messages: &[(u32, Message)]) {
            self.0.lock().unwrap().extend_from_slice(messages);
        }
    }

    /// Messages for `rings` rings whose irqfds nobody reads but the test.
    pub(crate) fn messages(rings: usize) -> (Msix, Arc<Routed>) {
        let routes = Arc::new(Routed::default());
        let lines = (0..=rings)
            .map(|n| MessageLine {
                gsi: 32 + n as u32,
                irq: Irq::new().unwrap(),
            })
            .collect();
        (Msix::new(rings, lines, routes.clone()), routes)
    }

    /// Whether a message was sent since the last call.
    pub(crate) fn sent(msix: &Msix, vector: usize) -> bool {
        msix.lines()[vector].irq.fd().read().is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::test_utils::*;
    use super::*;

    fn program(msix: &Msix, vector: u64, address: u64, data: u32) {
        msix.write_table(vector * ENTRY, &address.to_le_bytes());
        msix.write_table(vector * ENTRY + 8, &data.to_le_bytes());
        msix.write_table(vector * ENTRY + 12, &[0; 4]);
    }

    #[test]
    fn a_message_goes_where_the_guest_says() {
        let (msix, routed) = messages(2);
        msix.set_control(ENABLE);
        program(&msix, 1, 0xfee0_0000, 0x41);
        let message = Message {
            address: 0xfee0_0000,
            data: 0x41,
        };
        assert_eq!(*routed.0.lock().unwrap(), [(33, message)]);
        msix.assign_ring(0, 1);
        msix.raise_ring(0);
        assert!(sent(&msix, 1));
        msix.raise_ring(1);
        msix.raise_ring(7);
        assert!(
            (0..3).all(|vector| !sent(&msix, vector)),
            "nothing assigned"
        );
    }

    #[test]
    fn nothing_is_routed_twice() {
        let (msix, routed) = messages(2);
        msix.set_control(ENABLE);
        program(&msix, 0, 1, 2);
        program(&msix, 0, 1, 2);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.set_control(ENABLE);
        assert_eq!(routed.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_masked_message_waits_and_is_sent_once() {
        let (msix, _) = messages(1);
        msix.assign_config(0);
        msix.raise_config();
        msix.set_control(ENABLE);
        assert_eq!(msix.pending(), 0, "no messages in use: nothing waits");
        msix.raise_config();
        msix.raise_config();
        assert_eq!(msix.pending(), 1);
        assert!(!sent(&msix, 0));
        program(&msix, 0, 1, 2);
        assert!(sent(&msix, 0));
        assert!(!sent(&msix, 0));
        assert_eq!(msix.pending(), 0);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.raise_config();
        assert_eq!(msix.pending(), 1);
        msix.set_control(ENABLE);
        assert!(sent(&msix, 0));
    }

    #[test]
    fn a_message_that_does_not_exist_is_none() {
        let (msix, _) = messages(1);
        for vector in [2, 3, 0x7fff, NO_VECTOR] {
            msix.assign_config(vector);
            msix.assign_ring(0, vector);
            assert_eq!(msix.config_vector(), NO_VECTOR);
            assert_eq!(msix.ring_vector(0), NO_VECTOR);
        }
        msix.assign_ring(1, 0);
        assert_eq!(msix.ring_vector(1), NO_VECTOR);
    }

    #[test]
    fn the_table_has_words_and_an_end() {
        let (msix, _) = messages(1);
        let read = |offset, len| {
            let mut data = vec![0xff; len];
            msix.read_table(offset, &mut data);
            data
        };
        assert_eq!(read(12, 4), [1, 0, 0, 0], "masked after reset");
        msix.write_table(0, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(read(0, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(read(4, 4), [5, 6, 7, 8]);
        for (offset, len) in [(32, 4), (u64::MAX - 3, 4), (0, 2), (2, 4), (0, 1)] {
            msix.write_table(offset, &vec![9; len]);
            assert_eq!(read(offset, len), vec![0xff; len]);
        }
        assert_eq!(read(0, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
