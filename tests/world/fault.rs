//! What goes wrong, and what operators ask for.

use std::time::Duration;

use colo_proto::{command::Command, id::Channel, machine::GuestOpKind, status::Mode};

use crate::{
    connection::Piece,
    world::{Due, What, World},
};

impl World {
    pub(crate) fn fault(&mut self, kind: &'static str, i: usize) {
        self.tell(|| format!("fault: {kind} at host {i}"));
        *self.counts.faults.entry(kind).or_default() += 1;
    }

    /// Power off.
    pub fn kill(&mut self, i: usize) {
        self.fault("kill", i);
        self.hosts[i].process = None;
        self.lose_all();
    }

    /// Starts the host in a while.
    pub fn restart_in(&mut self, i: usize, millis: u64) {
        self.after(millis * 1000, Due::Restart(i));
    }

    /// Nothing runs on the host for a while; its clock goes on. A host that is frozen already does
    /// not thaw earlier: what waits for it would be overtaken.
    pub fn freeze(&mut self, i: usize, millis: u64) {
        self.fault("freeze", i);
        let thaw = self.t + millis * 1000;
        self.hosts[i].frozen = self.hosts[i].frozen.max(thaw);
    }

    /// What the host sends does not arrive.
    pub fn cut(&mut self, i: usize) {
        self.fault("cut", i);
        self.hosts[i].cut = true;
    }

    /// The arbiter cannot be reached.
    pub fn lose_arbiter(&mut self, i: usize) {
        self.fault("no arbiter", i);
        self.hosts[i].arbiter = false;
    }

    /// Everything that was cut works again.
    pub fn heal(&mut self) {
        for host in &mut self.hosts {
            host.cut = false;
            host.arbiter = true;
        }
        self.slow = 300;
        self.tell(|| "healed".to_owned());
        self.pump();
    }

    /// An operator wants something.
    pub fn command(&mut self, i: usize, command: Command) {
        self.soon(i, 0, What::Command(command));
    }

    /// One fault by chance.
    pub fn misfortune(&mut self) {
        let i = usize::from(self.below(2) == 1);
        let channels = [Channel::Control, Channel::Net, Channel::Ram(0)];
        let channel = channels[usize::try_from(self.below(3)).unwrap_or(0)];
        let heal = 1000 * (1 + self.below(3_000));
        match self.below(12) {
            0 => {
                self.kill(i);
                let later = 100 + self.below(3_000);
                self.restart_in(i, later);
            }
            1 => {
                let millis = 1 + self.below(2_500);
                self.freeze(i, millis);
            }
            2 => self.cut(i),
            3 => {
                self.cut(0);
                self.cut(1);
            }
            4 => {
                self.fault("connection lost", i);
                self.lose(channel);
            }
            5 => self.lose_arbiter(i),
            6 => {
                self.fault("slow", i);
                self.slow = 20_000;
            }
            7 => {
                self.fault("malformed", i);
                let noise: Vec<u8> = (0..32).map(|_| self.next().to_le_bytes()[0]).collect();
                if let Some(conn) = self.conns.get_mut(&channel) {
                    conn.rx[i].push_back(Piece::Bytes(noise.into()));
                }
                self.pump();
            }
            8 => {
                self.fault("guest operation fails", i);
                let kinds = [
                    GuestOpKind::Capture,
                    GuestOpKind::CheckState,
                    GuestOpKind::CommitRam,
                    GuestOpKind::LoadState,
                    GuestOpKind::Harvest,
                ];
                let kind = kinds[usize::try_from(self.below(5)).unwrap_or(0)];
                self.hosts[i].fail = Some(kind);
            }
            _ => {
                self.fault("command", i);
                let command = match self.below(9) {
                    0 => Command::FailOver,
                    1 => Command::LostHeartbeat,
                    2 => Command::Detach,
                    3 => Command::SetMode(Mode::Lockstep),
                    4 => Command::SetMode(Mode::Standby),
                    5 => Command::Stop,
                    6 => Command::XenDoCheckpoint,
                    7 => Command::CheckpointDelay(Duration::from_millis(50)),
                    _ => Command::CheckpointNow,
                };
                self.command(i, command);
                if command == Command::Stop {
                    self.soon(i, heal, What::Command(Command::Continue));
                }
                if command == Command::Detach {
                    self.soon(i, heal, What::Command(Command::Attach));
                }
                return;
            }
        }
        self.after(heal, Due::Heal);
    }
}
