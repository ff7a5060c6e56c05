//! One host of the pair, whatever its role: a [`Primary`] or a [`Secondary`], and the change from
//! one to the other. A driver that holds a `Node` needs no `if` about roles.

use crate::{
    base::Base,
    config::Config,
    error::Misuse,
    id::Channel,
    machine::{Deadline, Demand, Input, Machine, Output, Transmit},
    member::{BootId, Command, Local, Member, MemberState, Record},
    ownership::External,
    primary::Primary,
    secondary::Secondary,
    stats::Stats,
    status::Status,
    time::Instant,
};

/// How this process is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Start {
    /// This host has the VM: it boots it and serves, unless the record or the arbiter know of
    /// another owner, whom it names then.
    Primary,
    /// This host joins whoever has the VM. If nobody has, and the register names it as the last
    /// owner, it boots the VM where its settings let it do so by itself.
    Secondary,
}

/// A host. Starts as a secondary without a replica; ownership makes it a primary, and losing
/// ownership makes it a secondary again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node(Role);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Role {
    Primary(alloc::boxed::Box<Primary>),
    Secondary(alloc::boxed::Box<Secondary>),
    /// Only while one becomes the other.
    Between,
}

impl Node {
    /// A host at the start of its process. `record` is what an earlier process persisted; `boot`
    /// and `entropy` are random and new.
    #[must_use]
    pub fn new(
        config: Config,
        start: Start,
        boot: BootId,
        record: Option<Record>,
        entropy: u64,
        now: Instant,
    ) -> Self {
        // The operator's word is as good as leave to boot without one.
        let own = config.member.clone();
        let may_boot = own.boots_by_itself() || start == Start::Primary;
        let member = Member::start(
            own.autostart(may_boot),
            config.node,
            boot,
            record,
            entropy,
            now,
        );
        let base = Base::new(config, boot, member, now);
        let mut secondary = Secondary::first(base);
        let promised = secondary.base.member.state() != MemberState::Idle;
        let wants = match start {
            Start::Primary => Some(Command::Create),
            // A host that has something to give back or to give up does that first.
            Start::Secondary => (!promised).then_some(Command::Join),
        };
        if let Some(command) = wants {
            secondary.base.local(Local::Operator(command));
        }
        secondary.start();
        let mut node = Self(Role::Secondary(alloc::boxed::Box::new(secondary)));
        node.change();
        node
    }

    /// A host that is told who owns the VM, as QEMU's are: no heartbeat, no lease, no arbiter, no
    /// record. It takes over, or goes on alone, when its operator says
    /// [`LostHeartbeat`](crate::command::Command::LostHeartbeat). Safe as long as only one of the
    /// two is told so: a primary whose secondary is gone lets nothing out until then.
    ///
    /// For a cluster manager that fences by itself, and for models of the epoch protocol alone.
    #[must_use]
    pub fn told(config: Config, start: Start, boot: BootId, now: Instant) -> Self {
        Self(match start {
            Start::Primary => {
                let base = Base::new(config, boot, External::owner(), now);
                Role::Primary(alloc::boxed::Box::new(Primary::first(base)))
            }
            Start::Secondary => {
                let base = Base::new(config, boot, External::partner(), now);
                let mut secondary = Secondary::first(base);
                secondary.start();
                Role::Secondary(alloc::boxed::Box::new(secondary))
            }
        })
    }

    /// The primary, if this host is one.
    #[must_use]
    pub const fn primary(&self) -> Option<&Primary> {
        match &self.0 {
            Role::Primary(p) => Some(p),
            _ => None,
        }
    }

    /// The secondary, if this host is one.
    #[must_use]
    pub const fn secondary(&self) -> Option<&Secondary> {
        match &self.0 {
            Role::Secondary(s) => Some(s),
            _ => None,
        }
    }

    /// The member, for tests and status.
    #[must_use]
    pub fn member(&self) -> Option<&Member> {
        self.base()?.member.member()
    }

    /// Every channel of the pair, Control first.
    pub fn channels(&self) -> impl Iterator<Item = Channel> + use<> {
        self.base()
            .map(|base| base.config.channels())
            .into_iter()
            .flatten()
    }

    /// Bytes that wait to be sent on a channel.
    #[must_use]
    pub fn queued(&self, channel: Channel) -> usize {
        self.base().map_or(0, |base| base.link.queued(channel))
    }

    fn base(&self) -> Option<&Base> {
        match &self.0 {
            Role::Primary(p) => Some(&p.base),
            Role::Secondary(s) => Some(&s.base),
            Role::Between => None,
        }
    }

    fn machine(&self) -> Option<&dyn Machine> {
        match &self.0 {
            Role::Primary(p) => Some(&**p),
            Role::Secondary(s) => Some(&**s),
            Role::Between => None,
        }
    }

    fn machine_mut(&mut self) -> Option<&mut dyn Machine> {
        match &mut self.0 {
            Role::Primary(p) => Some(&mut **p),
            Role::Secondary(s) => Some(&mut **s),
            Role::Between => None,
        }
    }

    /// Becomes what ownership makes of this host.
    fn change(&mut self) {
        self.0 = match core::mem::replace(&mut self.0, Role::Between) {
            Role::Secondary(secondary) => match secondary.promoted {
                None => Role::Secondary(secondary),
                Some(how) => {
                    let (base, outlet) = secondary.ended(how);
                    let mut primary = alloc::boxed::Box::new(Primary::new(base, outlet));
                    primary.start();
                    Role::Primary(primary)
                }
            },
            Role::Primary(primary) if primary.demoted => {
                let (base, outlet) = primary.ended();
                let mut secondary = alloc::boxed::Box::new(Secondary::new(base, outlet));
                secondary.start();
                Role::Secondary(secondary)
            }
            same => same,
        };
    }
}

impl Machine for Node {
    fn channels(&self) -> alloc::vec::Vec<Channel> {
        Self::channels(self).collect()
    }

    fn handle_input(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        if let Some(machine) = self.machine_mut() {
            machine.handle_input(now, input)?;
        }
        self.change();
        Ok(())
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.machine_mut()?.poll_output()
    }

    fn poll_transmit(&mut self, channel: Channel, budget: usize) -> Option<Transmit> {
        self.machine_mut()?.poll_transmit(channel, budget)
    }

    fn poll_demand(&mut self, channel: Channel) -> Demand {
        self.machine_mut()
            .map_or(Demand::Pause, |machine| machine.poll_demand(channel))
    }

    fn poll_timeout(&self) -> Option<Deadline> {
        self.machine()?.poll_timeout()
    }

    fn stats(&self) -> Stats {
        self.machine().map(Machine::stats).unwrap_or_default()
    }

    fn status(&self) -> Status {
        self.machine().map(Machine::status).unwrap_or_default()
    }
}
