//! The only way out. A frame that was released still needs a permit, and carries it: the driver
//! checks it once more at the write.

use alloc::collections::VecDeque;
use bytes::Bytes;

use super::weight;

use crate::{machine::Output, member::Permit};

/// Released frames waiting for a permit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Gate {
    frames: VecDeque<Bytes>,
    bytes: usize,
    most_bytes: usize,
}

impl Gate {
    pub(crate) const fn new(most_bytes: usize) -> Self {
        Self {
            frames: VecDeque::new(),
            bytes: 0,
            most_bytes,
        }
    }

    /// Takes a released frame. False if the gate has been shut for so long that the bound is
    /// reached: the frame is lost, as on any wire, and transports repeat it.
    #[must_use]
    pub(crate) fn push(&mut self, frame: Bytes) -> bool {
        if self.bytes + weight(&frame) > self.most_bytes {
            return false;
        }
        self.bytes += weight(&frame);
        self.frames.push_back(frame);
        true
    }

    /// The next frame, if there is a permit now.
    pub(crate) fn poll(&mut self, permit: Option<Permit>) -> Option<Output> {
        let permit = permit?;
        let frame = self.frames.pop_front()?;
        self.bytes -= weight(&frame);
        Some(Output::ToWorld { frame, permit })
    }

    /// Ownership was lost: nothing of this may ever leave.
    pub(crate) fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }
}
