//! What a secondary in lockstep has said since the checkpoint and the world may not have heard.
//! If it takes over from its own run, it says it again.

use alloc::collections::VecDeque;
use bytes::Bytes;

use super::weight;

/// The secondary's own output since the checkpoint, minus what the primary has let out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shadow {
    frames: VecDeque<Bytes>,
    /// Number of the first frame in the queue, counted from the checkpoint.
    first: u64,
    bytes: usize,
    most_bytes: usize,
}

impl Shadow {
    pub(crate) const fn new(most_bytes: usize) -> Self {
        Self {
            frames: VecDeque::new(),
            first: 0,
            bytes: 0,
            most_bytes,
        }
    }

    /// Keeps a frame; at the bound the oldest give way. False if any did.
    pub(crate) fn push(&mut self, frame: Bytes) -> bool {
        self.bytes += weight(&frame);
        self.frames.push_back(frame);
        let before = self.first;
        while self.bytes > self.most_bytes {
            self.drop_first();
        }
        before == self.first
    }

    /// The primary has let the first `count` frames since the checkpoint out.
    pub(crate) fn released(&mut self, count: u64) {
        while self.first < count && !self.frames.is_empty() {
            self.drop_first();
        }
    }

    /// A checkpoint was loaded: what was said before never happened.
    pub(crate) fn commit(&mut self) {
        *self = Self::new(self.most_bytes);
    }

    /// Takes the frames to be said again.
    pub(crate) fn take(&mut self) -> VecDeque<Bytes> {
        let frames = core::mem::take(&mut self.frames);
        self.commit();
        frames
    }

    fn drop_first(&mut self) {
        if let Some(frame) = self.frames.pop_front() {
            self.bytes -= weight(&frame);
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::FRAME_COST, *};

    #[test]
    fn what_the_world_has_heard_is_not_said_again() {
        let mut shadow = Shadow::new(3 * (FRAME_COST + 1));
        for text in ["a", "b", "c"] {
            assert!(shadow.push(Bytes::from_static(text.as_bytes())));
        }
        shadow.released(2);
        assert_eq!(shadow.take(), ["c"]);
        assert!(shadow.push(Bytes::from_static(&[0; 200])));
        assert!(
            !shadow.push(Bytes::from_static(b"5")),
            "the oldest gave way"
        );
        assert_eq!(shadow.take(), ["5"]);
    }
}
