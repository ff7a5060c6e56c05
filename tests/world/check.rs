//! What must hold after every step.

use colo_proto::machine::Machine;

use crate::world::World;

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
            if p.node.poll_timeout().is_none() {
                self.violate(format!("host {i} waits for ever"));
            }
        }
        if permits > 1 {
            self.violate("two owners".to_owned());
        }
    }
}
