//! Changes in place that keep the checksum right (RFC 1624, equation 3).
//!
//! A checksum that is still to be filled in covers the pseudo-header only. The card adds the rest
//! as it finds it, so a change of the rest leaves the field as it is.

use super::view::View;

/// Writes into one transport header.
#[derive(Debug)]
pub struct Edit<'a> {
    /// From the beginning of the transport header.
    bytes: &'a mut [u8],
    /// Where the checksum is, if it is to be kept right.
    checksum: Option<usize>,
}

impl<'a> Edit<'a> {
    /// Edits the transport header that `view` found in `frame`.
    #[must_use]
    pub fn new(frame: &'a mut [u8], view: &View) -> Self {
        let checksum = view.checksum().filter(|_| !view.partial);
        let bytes = frame.get_mut(view.transport..view.end).unwrap_or_default();
        Self { bytes, checksum }
    }

    /// The 32 bits at this place.
    #[must_use]
    pub fn get(&self, at: usize) -> Option<u32> {
        match self.bytes.get(at..at.checked_add(4)?)? {
            [a, b, c, d] => Some(u32::from_be_bytes([*a, *b, *c, *d])),
            _ => None,
        }
    }

    /// Writes 32 bits, wherever they stand. False if the place is outside.
    pub fn set(&mut self, at: usize, value: u32) -> bool {
        let words = at & !1..(at.saturating_add(5) & !1).min(self.bytes.len());
        let before = sum(self.bytes.get(words.clone()).unwrap_or_default());
        let Some(place) = self.bytes.get_mut(at..at.saturating_add(4)) else {
            return false;
        };
        place.copy_from_slice(&value.to_be_bytes());
        let after = sum(self.bytes.get(words).unwrap_or_default());
        self.replace(before, after);
        true
    }

    /// Adds to the 32 bits at this place, modulo 2^32.
    pub fn add(&mut self, at: usize, delta: u32) -> bool {
        match self.get(at) {
            Some(value) => self.set(at, value.wrapping_add(delta)),
            None => false,
        }
    }

    fn replace(&mut self, before: u32, after: u32) {
        let Some(at) = self.checksum else {
            return;
        };
        if let Some([high, low]) = self.bytes.get_mut(at..at + 2) {
            let old = u16::from_be_bytes([*high, *low]);
            let new = !fold(u32::from(!old) + u32::from(!fold(before)) + u32::from(fold(after)));
            [*high, *low] = new.to_be_bytes();
        }
    }
}

/// The one's complement sum of the bytes, not folded; an odd one at the end is the high byte.
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
            [high] => u32::from(*high) << 8,
            _ => 0,
        })
        .sum()
}

const fn fold(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Folded above: it fits.
    sum as u16
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};
    use proptest::prelude::*;

    use super::{
        super::{Content, Heading, View, sample::Sample},
        *,
    };

    /// The checksum computed from nothing, as a receiver would.
    fn right(frame: &[u8], view: &View, sample: &Sample) -> bool {
        let body = &frame[view.transport..view.end];
        let pseudo = sample.pseudo_header(body.len());
        fold(sum(&pseudo) + sum(body)) == 0xffff
    }

    /// What a card does with a frame whose checksum is to be filled in.
    fn fill_in(frame: &mut [u8], view: &View) {
        let at = view.transport + 16;
        let full = !fold(sum(&frame[view.transport..view.end]));
        frame[at..at + 2].copy_from_slice(&full.to_be_bytes());
    }

    proptest! {
        #[test]
        fn every_edit_keeps_the_checksum_right(
            which in 0usize..6, at in 0usize..12, value: u32, delta: u32,
            payload in prop::collection::vec(any::<u8>(), 0..40),
            partial: bool,
        ) {
            let sample = Sample::every().nth(which).unwrap();
            let mut frame = vec![0; 12];
            frame.extend(sample.tcp(value, &payload));
            let whole = View::new(&frame, 12, Heading::FromGuest).unwrap();
            prop_assert!(right(&frame, &whole, &sample), "the sample itself");
            let mut view = whole;
            if partial {
                let start = u16::try_from(whole.transport - 12).unwrap();
                frame[0] = 1;
                frame[6..8].copy_from_slice(&start.to_le_bytes());
                let len = whole.end - whole.transport;
                let seed = fold(sum(&sample.pseudo_header(len)));
                let field = whole.transport + 16;
                frame[field..field + 2].copy_from_slice(&seed.to_be_bytes());
                view = View::new(&frame, 12, Heading::FromGuest).unwrap();
                prop_assert!(view.partial);
            }
            // Sequence, acknowledgement, and any place in the options, even or odd.
            let place = [4, 8, 20 + at][at % 3];
            let mut edit = Edit::new(&mut frame, &view);
            let old = edit.get(place).unwrap_or(0);
            if edit.add(place, delta) {
                prop_assert_eq!(edit.get(place), Some(old.wrapping_add(delta)));
            }
            if partial {
                fill_in(&mut frame, &view);
            }
            prop_assert!(right(&frame, &view, &sample));
        }
    }

    #[test]
    fn an_uncut_segment_of_64_kib_is_edited_like_any_other() {
        let sample = Sample::every().next().unwrap();
        let payload: Vec<u8> = (0..65_000u32).map(|i| i as u8).collect();
        let mut frame = sample.tcp(u32::MAX - 5, &payload);
        let view = View::new(&frame, 0, Heading::FromGuest).unwrap();
        assert!(matches!(view.content, Content::Tcp(_)));
        assert!(Edit::new(&mut frame, &view).add(4, 10));
        assert!(right(&frame, &view, &sample));
        assert!(!Edit::new(&mut frame, &view).set(usize::MAX, 1), "outside");
    }
}
