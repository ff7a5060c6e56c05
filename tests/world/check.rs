//! What must hold after every step.

use colo_proto::{
    command::CommandId,
    id::{Channel, Epoch},
    machine::Machine,
    wire::{HEAD_LEN, Head, Kind},
};

use crate::{host::HOLD_BYTES, world::World};

/// Events of one microsecond; two hosts with full queues stay far below.
const MOST_AT_ONCE: u64 = 10_000;

impl World {
    /// No machine keeps a core busy: a deadline that was handled lies in the future.
    pub(crate) fn rests(&mut self) {
        if self.standing.0 != self.t {
            self.standing = (self.t, 0);
        }
        self.standing.1 += 1;
        if self.standing.1 > MOST_AT_ONCE {
            let why =
                [0, 1].map(|i| Some(self.hosts[i].process.as_ref()?.node.poll_timeout()?.why));
            self.violate(format!("time stands still; deadlines {why:?}"));
        }
    }

    pub(crate) fn check(&mut self) {
        let mut permits = 0;
        for i in 0..2 {
            let now = self.clock(i);
            let Some(p) = &self.hosts[i].process else {
                continue;
            };
            permits += u32::from(p.node.member().is_some_and(|m| m.permit(now).is_some()));
            let silent = p.node.poll_timeout().is_none();
            let over = p
                .node
                .channels()
                .find(|channel| p.node.queued(*channel) > 2 * HOLD_BYTES);
            if silent {
                self.violate(format!("host {i} waits for ever"));
            }
            if let Some(channel) = over {
                self.violate(format!("host {i} queues too much for {channel:?}"));
            }
        }
        if permits > 1 {
            self.violate("two owners".to_owned());
        }
    }

    /// What a host says on Control: no checkpoint is acknowledged before it was found whole, and
    /// none is called loaded before it is.
    pub(crate) fn says(&mut self, i: usize, mut messages: &[u8]) {
        while let Some((head, rest)) = messages.split_first_chunk::<HEAD_LEN>() {
            let Ok(head) = Head::decode(Channel::Control, head) else {
                return;
            };
            let Some(p) = &self.hosts[i].process else {
                return;
            };
            let epoch = Epoch(head.number);
            let so = match head.kind {
                Kind::VmstateReceived => p.guest.checked == Some(epoch),
                Kind::VmstateLoaded | Kind::CheckpointReady => {
                    p.guest.whole && p.guest.epoch >= epoch
                }
                _ => true,
            };
            if !so {
                self.violate(format!("host {i} says {:?} {epoch} too early", head.kind));
            }
            messages = rest.get(head.len as usize..).unwrap_or_default();
        }
    }

    /// Ends what goes wrong, and waits until every command has its answer and somebody serves.
    pub fn recovers(&mut self, millis: u64) {
        self.heal();
        // A guest that could not be resumed is not tried again before an operator says so.
        for i in 0..2 {
            self.hosts[i].fail = None;
            self.undo(i, 1_000);
        }
        self.run(2);
        if !self.until(millis, |world| world.asked.is_empty()) {
            self.violate(format!("nobody answers {:?}", self.asked));
        }
        // A host that lost its memory while the other was of no use leaves nothing to go on with but
        // the disks, and those boot by an operator's word only (spec ownership 11).
        let lost = self.counts.faults.contains_key("kill");
        if !lost && !self.until(millis, |world| world.serves(0) || world.serves(1)) {
            self.violate("nobody serves".to_owned());
        }
    }

    pub(crate) fn answered(&mut self, i: usize, id: CommandId) {
        if self.asked.remove(&id) != Some(i) {
            self.violate(format!("host {i} answers {id:?}, which nobody waits for"));
        }
    }
}
