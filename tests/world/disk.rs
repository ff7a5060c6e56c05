//! A disk of eight numbers, and its replication by a redo log (what the primary's guest writes is
//! kept beside the secondary's disk until the checkpoint that it belongs to).
//!
//! The core's hooks say when an interval begins and ends. What a driver has to add is seen here: the
//! device state names the writes that belong to it, and a checkpoint is whole only when those have
//! arrived, too.

use std::collections::VecDeque;

use colo_proto::{
    id::{Channel, Role},
    machine::ReplicationOp,
};

use crate::{
    guest::mix,
    world::{Due, Micros, What, World},
};

/// Blocks of a disk.
pub(crate) const BLOCKS: usize = 8;

/// One write: its number since the replication began, block, contents.
pub(crate) type Write = (u64, usize, u64);

/// What travels between two disks.
#[derive(Clone, Debug)]
pub(crate) enum Forward {
    /// The whole disk, when the replication with this number begins.
    Whole(u64, [u64; BLOCKS]),
    /// A write of that replication.
    Write(u64, Write),
}

impl Forward {
    /// Replication and number of the write: what follows has a larger one.
    const fn key(&self) -> (u64, u64) {
        match self {
            Self::Whole(replication, _) => (*replication, 0),
            Self::Write(replication, write) => (*replication, write.0),
        }
    }
}

/// What a disk does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nothing but reading and writing.
    #[default]
    Plain,
    /// Forwards what is written, under this number.
    Primary(u64),
    /// Keeps what its guest writes apart.
    Secondary,
}

/// A disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    /// What lies on the platter; it survives the host.
    pub(crate) base: [u64; BLOCKS],
    pub(crate) stage: Stage,
    /// Writes of the guest here since the last checkpoint.
    own: [Option<u64>; BLOCKS],
    /// Writes since the replication began, and those that are still to be forwarded.
    pub(crate) writes: u64,
    out: VecDeque<Write>,
    /// What has arrived and belongs to no checkpoint that was applied.
    log: VecDeque<Forward>,
    /// The newest that has arrived, and that was applied.
    arrived: (u64, u64),
    applied: (u64, u64),
}

impl Disk {
    pub(crate) fn read(&self, block: usize) -> u64 {
        self.own[block].unwrap_or(self.base[block])
    }

    pub(crate) fn write(&mut self, block: usize, value: u64) {
        match self.stage {
            Stage::Plain => self.base[block] = value,
            Stage::Primary(_) => {
                self.base[block] = value;
                self.writes += 1;
                self.out.push_back((self.writes, block, value));
            }
            Stage::Secondary => self.own[block] = Some(value),
        }
    }

    pub(crate) fn sum(&self) -> u64 {
        (0..BLOCKS).fold(0, |sum, block| mix(sum, self.read(block)))
    }

    /// The replication that a capture belongs to; 0 if there is none.
    pub(crate) const fn replication(&self) -> u64 {
        match self.stage {
            Stage::Primary(number) => number,
            _ => 0,
        }
    }

    fn arrives(&mut self, forward: Forward) {
        let key = forward.key();
        let (replication, write) = self.arrived;
        if key == (replication, write + 1) || key.0 > replication && key.1 == 0 {
            self.arrived = key;
            self.log.push_back(forward);
        }
    }

    /// Whether all that a checkpoint needs has arrived.
    pub(crate) fn has(&self, needs: (u64, u64)) -> bool {
        self.applied == needs || self.log.iter().any(|forward| forward.key() == needs)
    }

    /// A hook; `state` is what the checkpoint in hand needs.
    pub(crate) fn hook(&mut self, op: ReplicationOp, number: u64, state: (u64, u64)) {
        match op {
            ReplicationOp::Start(Role::Primary) => {
                self.stage = Stage::Primary(number);
                (self.writes, self.out) = (0, VecDeque::new());
            }
            ReplicationOp::Start(Role::Secondary) if self.stage != Stage::Secondary => {
                self.stage = Stage::Secondary;
                self.own = [None; BLOCKS];
            }
            ReplicationOp::Checkpoint if self.stage == Stage::Secondary => {
                while self.log.front().is_some_and(|next| next.key() <= state) {
                    match self.log.pop_front() {
                        Some(Forward::Whole(_, disk)) => self.base = disk,
                        Some(Forward::Write(_, (_, block, value))) => self.base[block] = value,
                        None => {}
                    }
                }
                (self.applied, self.own) = (state, [None; BLOCKS]);
            }
            ReplicationOp::Stop { failover } => {
                for (block, own) in std::mem::take(&mut self.own).into_iter().enumerate() {
                    if let Some(value) = own.filter(|_| failover) {
                        self.base[block] = value;
                    }
                }
                // What was kept is gone; what follows of the same replication is of no use without.
                self.log.clear();
                self.arrived.1 = u64::MAX - 1;
                self.stage = Stage::Plain;
            }
            _ => {}
        }
    }
}

impl World {
    /// A hook of the core or of an operator; false if it cannot be done.
    pub(crate) fn hook(&mut self, i: usize, op: ReplicationOp) -> bool {
        self.replications += 1;
        let number = self.replications;
        let primary = self.role(i) == Some(Role::Primary);
        let Some(p) = &mut self.hosts[i].process else {
            return false;
        };
        let needs = p.guest.needs();
        match op {
            // An operator's, in the wrong role.
            ReplicationOp::Start(role) if primary != (role == Role::Primary) => return true,
            // An operator has stopped it.
            ReplicationOp::Checkpoint if !primary && p.guest.disk.stage != Stage::Secondary => {
                return false;
            }
            _ => {}
        }
        p.guest.disk.hook(op, number, needs);
        if p.guest.disk.stage == Stage::Primary(number) {
            let whole = Forward::Whole(number, p.guest.disk.base);
            self.forward(i, whole);
        }
        true
    }

    /// What the guest wrote goes to the other host.
    pub(crate) fn forward_writes(&mut self, i: usize) {
        while let Some(p) = &mut self.hosts[i].process {
            let number = p.guest.disk.replication();
            let Some(write) = p.guest.disk.out.pop_front() else {
                return;
            };
            self.forward(i, Forward::Write(number, write));
        }
    }

    /// In order, or not at all: where one is lost, the number of the next one does not follow.
    fn forward(&mut self, i: usize, forward: Forward) {
        let lag = self.lag(i, Channel::Disk);
        let at: Micros = self.hosts[i]
            .last_forward
            .max(self.t + 50 + lag + self.below(300));
        self.hosts[i].last_forward = at;
        let Some(peer) = self.boot(1 - i).filter(|_| !self.hosts[i].cut) else {
            return;
        };
        self.after(at - self.t, Due::Host(1 - i, peer, What::Disk(forward)));
    }

    pub(crate) fn disk_arrives(&mut self, i: usize, forward: Forward) {
        if let Some(p) = &mut self.hosts[i].process {
            p.guest.disk.arrives(forward);
        }
    }
}
