//! What must hold after every step.

use colo_proto::machine::Machine;

use crate::world::World;

impl World {
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
