//! What goes wrong, and what operators ask for.

use std::time::Duration;

use colo_proto::{
    command::Command,
    id::{Channel, Role},
    machine::GuestOpKind,
    member::Health,
    status::Mode,
};

use crate::{
    connection::Piece,
    world::{Due, Micros, What, World},
};

/// Operations that may fail.
pub const OPERATIONS: [GuestOpKind; 8] = [
    GuestOpKind::Pause,
    GuestOpKind::Resume,
    GuestOpKind::Harvest,
    GuestOpKind::Capture,
    GuestOpKind::CheckState,
    GuestOpKind::CommitRam,
    GuestOpKind::Replication,
    GuestOpKind::LoadState,
];

/// Everything that an operator can ask.
pub const COMMANDS: [Command; 17] = [
    Command::CheckpointNow,
    Command::LostHeartbeat,
    Command::FailOver,
    Command::Detach,
    Command::Attach,
    Command::CheckpointDelay(Duration::from_millis(50)),
    Command::SetMode(Mode::Lockstep),
    Command::SetMode(Mode::Standby),
    Command::Stop,
    Command::Continue,
    replicate(true, Role::Primary, None),
    replicate(true, Role::Secondary, None),
    replicate(true, Role::Primary, Some(true)),
    replicate(false, Role::Primary, None),
    replicate(false, Role::Secondary, Some(true)),
    Command::XenDoCheckpoint,
    Command::Shutdown,
];

const fn replicate(enable: bool, role: Role, failover: Option<bool>) -> Command {
    Command::XenSetReplication {
        enable,
        role,
        failover,
    }
}

impl World {
    pub(crate) fn fault(&mut self, kind: &'static str, i: usize) {
        self.tell(|| format!("fault: {kind} at host {i}"));
        *self.counts.faults.entry(kind).or_default() += 1;
    }

    /// Power off.
    pub fn kill(&mut self, i: usize) {
        self.fault("kill", i);
        if let Some(p) = self.hosts[i].process.take() {
            self.hosts[i].platter = p.guest.disk.base;
        }
        self.asked.retain(|_, at| *at != i);
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

    /// What the host sends does not arrive; what is sent to it does.
    pub fn cut(&mut self, i: usize) {
        self.fault("cut one way", i);
        self.hosts[i].cut = true;
    }

    /// Neither hears the other.
    pub fn cut_both(&mut self) {
        self.fault("cut both ways", 0);
        self.hosts[0].cut = true;
        self.hosts[1].cut = true;
    }

    /// The host's datagrams do not arrive; its connections work.
    pub fn mute(&mut self, i: usize) {
        self.fault("datagrams lost", i);
        self.hosts[i].mute = true;
    }

    /// The arbiter cannot be reached.
    pub fn lose_arbiter(&mut self, i: usize) {
        self.fault("no arbiter", i);
        self.hosts[i].arbiter = false;
    }

    /// The arbiter takes its time: a ballot may be counted long after it was cast.
    pub fn slow_arbiter(&mut self, i: usize, millis: u64) {
        self.fault("slow arbiter", i);
        self.hosts[i].arbiter_slow = millis * 1000;
    }

    /// For a while, what the host sends on a channel takes longer: acknowledgements are late, and
    /// other channels overtake this one.
    pub fn delay(&mut self, i: usize, channel: Channel, by: u64, millis: u64) {
        self.fault("channel delayed", i);
        let until = self.t + millis * 1000;
        self.lags.insert((i, channel), (until, by * 1000));
    }

    pub(crate) fn lag(&self, i: usize, channel: Channel) -> Micros {
        let lag = self.lags.get(&(i, channel));
        lag.map_or(0, |(until, by)| if *until > self.t { *by } else { 0 })
    }

    /// For a while, the host's kernel takes nothing for a channel.
    pub fn fill(&mut self, i: usize, channel: Channel, millis: u64) {
        self.fault("back-pressure", i);
        self.full.insert((i, channel), self.t + millis * 1000);
        self.after(millis * 1000, Due::Pump);
    }

    /// Bytes that nobody sent arrive on a channel.
    pub fn malform(&mut self, i: usize, channel: Channel) {
        let kind = match channel {
            Channel::Control => "malformed Control",
            Channel::Net => "malformed Net",
            _ => "malformed Ram",
        };
        self.fault(kind, i);
        self.noisy = true;
        let noise: Vec<u8> = (0..32).map(|_| self.next().to_le_bytes()[0]).collect();
        if let Some(conn) = self.conns.get_mut(&channel) {
            conn.rx[i].push_back(Piece::Bytes(noise.into()));
        }
        self.pump();
    }

    /// The next operation of this kind fails.
    pub fn fail(&mut self, i: usize, kind: GuestOpKind) {
        let name = match kind {
            GuestOpKind::Pause => "pause fails",
            GuestOpKind::Resume => "resume fails",
            GuestOpKind::Harvest => "harvest fails",
            GuestOpKind::Capture => "capture fails",
            GuestOpKind::CheckState => "check of a state fails",
            GuestOpKind::CommitRam => "commit of RAM fails",
            GuestOpKind::Replication => "replication fails",
            GuestOpKind::LoadState => "load of a state fails",
        };
        self.fault(name, i);
        self.hosts[i].fail = Some(kind);
    }

    /// Everything that was cut works again.
    pub fn heal(&mut self) {
        for host in &mut self.hosts {
            host.cut = false;
            host.mute = false;
            host.arbiter = true;
            host.arbiter_slow = 0;
        }
        self.slow = 300;
        self.tell(|| "healed".to_owned());
        self.pump();
    }

    /// An operator wants something.
    pub fn command(&mut self, i: usize, command: Command) {
        self.soon(i, 0, What::Command(command));
    }

    /// An operator undoes a command, or what made a guest stop.
    pub(crate) fn undo(&mut self, i: usize, after: Micros) {
        for what in [
            What::Health(Health::Ok),
            What::Command(Command::Continue),
            What::Command(Command::Attach),
        ] {
            self.soon(i, after, what);
        }
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        let n = self.below(all.len() as u64);
        all[usize::try_from(n).unwrap_or(0)]
    }

    /// One fault by chance.
    pub fn misfortune(&mut self) {
        let i = usize::from(self.below(2) == 1);
        let channel = self.one_of(&[Channel::Control, Channel::Net, Channel::Ram(0)]);
        let millis = 1 + self.below(3_000);
        match self.below(20) {
            0 => {
                self.kill(i);
                self.restart_in(i, 100 + millis);
            }
            1 => self.freeze(i, millis),
            2 => self.cut(i),
            3 => self.cut_both(),
            4 => {
                self.fault("connection lost", i);
                self.lose(channel);
            }
            5 => self.lose_arbiter(i),
            6 => {
                self.fault("slow", i);
                self.slow = 20_000;
            }
            7 => self.malform(i, channel),
            8 | 9 => {
                let kind = self.one_of(&OPERATIONS);
                self.fail(i, kind);
                self.undo(i, millis * 1000);
            }
            10 => {
                let channel = self.one_of(&[channel, Channel::Disk]);
                let by = 1 + self.below(700);
                self.delay(i, channel, by, millis);
            }
            11 => self.fill(i, channel, millis),
            12 => {
                let by = self.below(2_000);
                self.slow_arbiter(i, by);
            }
            13 => self.mute(i),
            14 => self.leap_of_an_owner(i, millis),
            15 => self.burst(),
            _ => {
                self.fault("command", i);
                let command = self.one_of(&COMMANDS);
                self.command(i, command);
                self.undo(i, millis * 1000);
                return;
            }
        }
        self.after(millis * 1000, Due::Heal);
    }
}
