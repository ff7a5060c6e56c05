//! The client of both guests, and the oracle of what it may see.
//!
//! Every frame that leaves shows a history; it must contain every history that was ever shown.

use bytes::Bytes;

use crate::host::HOLD_BYTES;
use crate::world::{Due, What, World};

impl World {
    /// A client says something; every host that listens hears it.
    pub(crate) fn client(&mut self) {
        self.ask(22);
        for i in 0..2 {
            // Something of its own that no client sees.
            let noise = self.next();
            if let Some(p) = &mut self.hosts[i].process
                && p.guest.running
            {
                p.guest
                    .store(usize::try_from(noise % 31).unwrap_or(0), noise);
            }
        }
        let pause = 500 + self.below(15_000);
        self.after(pause, Due::Client);
    }

    /// A client says more than a host may hold.
    pub fn burst(&mut self) {
        self.fault("burst of a client", 0);
        for _ in 0..2 * HOLD_BYTES / 1000 {
            self.ask(1000);
        }
    }

    /// A frame of this many bytes for every host that listens.
    fn ask(&mut self, len: usize) {
        self.clients += 1;
        let mut frame = vec![0; 12];
        frame.extend([0x88, 0xb5]);
        frame.extend(self.clients.to_le_bytes());
        frame.resize(len, 0);
        let frame = Bytes::from(frame);
        for i in 0..2 {
            self.soon(i, 10, What::FromWorld(frame.clone()));
        }
    }

    /// A frame leaves: does its history contain all that was shown?
    pub(crate) fn leaves(&mut self, i: usize, frame: &Bytes) {
        let word = |at| frame.get(at..at + 8).and_then(|b| b.try_into().ok());
        let (Some(ticks), Some(history)) = (word(14), word(22)) else {
            return;
        };
        let this = (u64::from_le_bytes(ticks), u64::from_le_bytes(history));
        let (old, new) = if this.0 < self.shown.0 {
            (this, self.shown)
        } else {
            (self.shown, this)
        };
        let mut at = (new.1, new.0);
        while at.1 > old.0 {
            match self.parents.get(&at.0) {
                Some((before, _)) => at = (*before, at.1 - 1),
                None => break,
            }
        }
        if at.0 != old.1 {
            let shown = self.shown;
            self.violate(format!(
                "output commit: host {i} shows {this:x?}, which contradicts {shown:x?}"
            ));
        }
        self.shown = new;
        self.counts.released += 1;
    }
}
