//! What an operator's command means: one table of command and role, and who waits for what.
//!
//! | command | on a primary | on a secondary | answered |
//! |---|---|---|---|
//! | `CheckpointNow` | if armed | refused | when that checkpoint is complete |
//! | `LostHeartbeat` | in a pair, or severed | with a replica, in a pair | when this host owns the VM alone |
//! | `FailOver` | if armed and running | refused | when the other host owns the VM |
//! | `Detach`, `Shutdown` | unless it is yielding the VM | always | at once, or when nobody else can own the VM |
//! | `Attach` | always | always | at once |
//! | `Override` | always | always | when this host owns the VM alone |
//! | `CheckpointDelay`, `SetMode`, `Continue` | always | refused | at once |
//! | `Stop` | always | refused | when the guest is stopped |
//! | `XenSetReplication` | always | always | when the guest side has done it |
//! | `XenDoCheckpoint` | always | refused | when the guest side has done it |
//!
//! [`order`] is the table; a role carries out the [`Act`] that it yields and knows no command.
//! [`Waiters`] are the commands that were begun and are not answered yet.

use alloc::vec::Vec;
use core::time::Duration;

use crate::{
    command::{Command, CommandId, Refusal},
    id::{Epoch, Role},
    machine::ReplicationOp,
    member::MemberState,
    protection::Protection,
    status::Mode,
    time::Instant,
};

/// How this host stands, as far as commands go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) role: Role,
    /// What is between the guest here and a failure; of a secondary, nothing.
    pub(crate) protection: Protection,
    /// Of a secondary: there is a replica, or half of one.
    pub(crate) replica: bool,
    /// The pair was whole, and is not known to be over.
    pub(crate) paired: bool,
    /// A failover was asked for or is under way.
    pub(crate) failing_over: bool,
    /// A command waits for the other host to own the VM.
    pub(crate) handing_over: bool,
    /// An operator has stopped the guest.
    pub(crate) stopped: bool,
    /// Who owns the VM is told, not negotiated.
    pub(crate) told: bool,
    pub(crate) member: MemberState,
    /// The first checkpoint that holds what the guest has done until now.
    pub(crate) next: Epoch,
}

/// What is to be done about a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Refuse(Refusal),
    /// Done at once.
    Do(Act),
    /// Begun now, and answered when this has come.
    Begin(Act, Until),
    /// The guest side does it, and its answer is the answer.
    Replicate(ReplicationOp),
}

/// What a role does for an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Take a checkpoint.
    Checkpoint,
    /// Treat the peer as lost; in a pair that is a failover, and said to be one.
    FailOver {
        in_pair: bool,
    },
    /// Give the VM to the secondary.
    HandOver,
    /// Leave the peer, and take or seek none until [`Attach`](Self::Attach).
    Leave(Why),
    /// Settle with the member that nobody else owns the VM, and take no peer then.
    Detach(Why),
    Attach,
    /// Serve whatever the arbiter says.
    Override,
    Delay(Duration),
    Mode(Mode),
    Stop,
    Continue,
}

/// Why the peer is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Detached,
    /// The VM or this host's part in it ends in good order.
    Ends,
}

/// What answers a waiting command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Until {
    /// A checkpoint is complete: of this epoch or a later one.
    Checkpoint(Epoch),
    /// This host owns the VM alone.
    Alone,
    /// This host owns the VM alone, and takes no peer from then on.
    Left,
    /// The peer owns the VM.
    HandedOver,
    /// The guest is stopped.
    Stopped,
}

/// The table.
pub(crate) fn order(command: Command, at: &Standing) -> Order {
    use Order::{Begin, Do, Refuse};
    let primary = at.role == Role::Primary;
    let armed = at.protection == Protection::Armed;
    match command {
        Command::CheckpointNow if primary && armed => {
            Begin(Act::Checkpoint, Until::Checkpoint(at.next))
        }
        Command::CheckpointNow if primary => Refuse(Refusal::NotProtected),

        // Lost before it was protection, and perhaps whole all the same.
        Command::LostHeartbeat if !at.paired && at.protection == Protection::Severed => {
            Begin(Act::FailOver { in_pair: false }, Until::Alone)
        }
        Command::LostHeartbeat if !at.paired => Refuse(Refusal::NotProtected),
        Command::LostHeartbeat if !primary && !at.replica => Refuse(Refusal::NoReplica),
        Command::LostHeartbeat if at.failing_over => Refuse(Refusal::FailoverInProgress),
        Command::LostHeartbeat => Begin(Act::FailOver { in_pair: true }, Until::Alone),

        Command::FailOver if primary && !armed => Refuse(Refusal::NotProtected),
        Command::FailOver if primary && at.handing_over => Refuse(Refusal::InProgress),
        // The other host would run it.
        Command::FailOver if primary && at.stopped => Refuse(Refusal::Stopped),
        // QEMU's dialect has no word for it.
        Command::FailOver if primary && at.told => Refuse(Refusal::Ownership(at.member)),
        Command::FailOver if primary => Begin(Act::HandOver, Until::HandedOver),

        Command::Detach => leave(at, Why::Detached),
        Command::Shutdown => leave(at, Why::Ends),
        Command::Attach => Do(Act::Attach),
        Command::Override => Begin(Act::Override, Until::Alone),

        Command::CheckpointDelay(delay) if primary => {
            let bounds = Duration::from_millis(1)..=Duration::from_secs(3600);
            if bounds.contains(&delay) {
                return Do(Act::Delay(delay));
            }
            Refuse(Refusal::Range {
                key: "x-checkpoint-delay",
                expected: "1 ms to 1 h",
            })
        }
        Command::SetMode(mode) if primary => Do(Act::Mode(mode)),
        Command::Stop if primary => Begin(Act::Stop, Until::Stopped),
        Command::Continue if primary => Do(Act::Continue),

        Command::XenSetReplication {
            enable: true,
            failover: Some(_),
            ..
        } => Refuse(Refusal::FailoverOnlyForStop),
        Command::XenSetReplication {
            enable: true, role, ..
        } => Order::Replicate(ReplicationOp::Start(role)),
        Command::XenSetReplication { failover, .. } => Order::Replicate(ReplicationOp::Stop {
            failover: failover.unwrap_or(false),
        }),
        Command::XenDoCheckpoint if primary => Order::Replicate(ReplicationOp::Checkpoint),

        Command::CheckpointNow
        | Command::FailOver
        | Command::CheckpointDelay(_)
        | Command::SetMode(_)
        | Command::Stop
        | Command::Continue
        | Command::XenDoCheckpoint => Refuse(Refusal::WrongRole("primary")),
    }
}

/// A pair in which the other host may own the VM is left only when that is settled.
const fn leave(at: &Standing, why: Why) -> Order {
    match (at.role, at.protection) {
        (Role::Secondary, _) | (Role::Primary, Protection::None) => Order::Do(Act::Leave(why)),
        (Role::Primary, Protection::Syncing) => Order::Begin(Act::Leave(why), Until::Alone),
        // Nothing is said to the peer about what the member would refuse.
        (Role::Primary, _) => match at.member {
            MemberState::PrimaryDual
            | MemberState::PrimaryArbitrating
            | MemberState::PrimarySolo => Order::Begin(Act::Detach(why), Until::Left),
            other => Order::Refuse(Refusal::Ownership(other)),
        },
    }
}

/// Most commands in progress at once; more are refused.
pub(crate) const WAITING_MOST: usize = 64;

/// Commands that were begun and are not answered yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct Waiters(Vec<Waiting>);

/// A command that is being carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Waiting {
    id: CommandId,
    until: Until,
    /// When whoever waits is told that it has not happened.
    limit: Instant,
}

impl Waiters {
    /// Remembers a command. False if too many wait already: it must not be begun.
    pub(crate) fn wait(&mut self, id: CommandId, until: Until, limit: Instant) -> bool {
        let room = self.0.len() < WAITING_MOST;
        if room {
            self.0.push(Waiting { id, until, limit });
        }
        room
    }

    /// Takes the first command for which this has come.
    pub(crate) fn take(&mut self, come: impl Fn(Until) -> bool) -> Option<CommandId> {
        let at = self.0.iter().position(|waiting| come(waiting.until))?;
        Some(self.0.remove(at).id)
    }

    /// Takes the first command that has waited for too long.
    pub(crate) fn overdue(&mut self, now: Instant) -> Option<CommandId> {
        let at = self.0.iter().position(|waiting| now >= waiting.limit)?;
        Some(self.0.remove(at).id)
    }

    pub(crate) fn any(&self, is: impl Fn(Until) -> bool) -> bool {
        self.0.iter().any(|waiting| is(waiting.until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: Standing = Standing {
        role: Role::Primary,
        protection: Protection::Armed,
        replica: false,
        paired: true,
        failing_over: false,
        handing_over: false,
        stopped: false,
        told: false,
        member: MemberState::PrimaryDual,
        next: Epoch(8),
    };
    const SECONDARY: Standing = Standing {
        role: Role::Secondary,
        protection: Protection::None,
        replica: true,
        member: MemberState::Secondary,
        ..PRIMARY
    };

    #[test]
    fn what_only_a_primary_can_do_is_refused_by_a_secondary_and_begun_by_a_primary() {
        let lockstep = Mode::Lockstep;
        for (command, here) in [
            (
                Command::CheckpointNow,
                Order::Begin(Act::Checkpoint, Until::Checkpoint(Epoch(8))),
            ),
            (
                Command::FailOver,
                Order::Begin(Act::HandOver, Until::HandedOver),
            ),
            (Command::Stop, Order::Begin(Act::Stop, Until::Stopped)),
            (Command::Continue, Order::Do(Act::Continue)),
            (Command::SetMode(lockstep), Order::Do(Act::Mode(lockstep))),
            (
                Command::CheckpointDelay(Duration::from_millis(1)),
                Order::Do(Act::Delay(Duration::from_millis(1))),
            ),
            (
                Command::XenDoCheckpoint,
                Order::Replicate(ReplicationOp::Checkpoint),
            ),
        ] {
            assert_eq!(order(command, &PRIMARY), here, "{command:?}");
            let there = Order::Refuse(Refusal::WrongRole("primary"));
            assert_eq!(order(command, &SECONDARY), there, "{command:?}");
        }
    }

    #[test]
    fn a_pair_that_may_be_shared_is_left_only_when_ownership_is_settled() {
        for (protection, expected) in [
            (Protection::None, Order::Do(Act::Leave(Why::Detached))),
            (
                Protection::Syncing,
                Order::Begin(Act::Leave(Why::Detached), Until::Alone),
            ),
            (
                Protection::Arming(Instant::ZERO),
                Order::Begin(Act::Detach(Why::Detached), Until::Left),
            ),
            (
                Protection::Severed,
                Order::Begin(Act::Detach(Why::Detached), Until::Left),
            ),
        ] {
            let at = Standing {
                protection,
                ..PRIMARY
            };
            assert_eq!(order(Command::Detach, &at), expected);
        }
        let left = Order::Do(Act::Leave(Why::Ends));
        assert_eq!(order(Command::Shutdown, &SECONDARY), left);
    }

    #[test]
    fn a_host_that_is_handing_the_vm_over_does_not_leave_its_peer() {
        let at = Standing {
            member: MemberState::Fenced,
            ..PRIMARY
        };
        let refused = Order::Refuse(Refusal::Ownership(MemberState::Fenced));
        assert_eq!(order(Command::Detach, &at), refused);
        assert_eq!(order(Command::Shutdown, &at), refused);
    }

    #[test]
    fn a_lost_heartbeat_needs_something_that_was_lost() {
        let order = |at| order(Command::LostHeartbeat, &at);
        let alone = Standing {
            protection: Protection::None,
            paired: false,
            ..PRIMARY
        };
        assert_eq!(order(alone), Order::Refuse(Refusal::NotProtected));
        let severed = Standing {
            protection: Protection::Severed,
            ..alone
        };
        let goes_on = Order::Begin(Act::FailOver { in_pair: false }, Until::Alone);
        assert_eq!(order(severed), goes_on);
        let empty = Standing {
            replica: false,
            ..SECONDARY
        };
        assert_eq!(order(empty), Order::Refuse(Refusal::NoReplica));
        let twice = Standing {
            failing_over: true,
            ..SECONDARY
        };
        assert_eq!(order(twice), Order::Refuse(Refusal::FailoverInProgress));
    }

    #[test]
    fn a_planned_switch_needs_a_running_guest_and_a_member_to_settle_it() {
        let order = |at| order(Command::FailOver, &at);
        let stopped = Standing {
            stopped: true,
            ..PRIMARY
        };
        assert_eq!(order(stopped), Order::Refuse(Refusal::Stopped));
        let told = Standing {
            told: true,
            ..PRIMARY
        };
        let refused = Refusal::Ownership(MemberState::PrimaryDual);
        assert_eq!(order(told), Order::Refuse(refused));
        let again = Standing {
            handing_over: true,
            ..PRIMARY
        };
        assert_eq!(order(again), Order::Refuse(Refusal::InProgress));
    }

    #[test]
    fn commands_in_progress_are_bounded_and_answered_in_order() {
        let mut waiters = Waiters::default();
        for id in 0..WAITING_MOST as u64 {
            assert!(waiters.wait(CommandId(id), Until::Alone, Instant::END));
        }
        assert!(!waiters.wait(CommandId(99), Until::Alone, Instant::END));
        assert_eq!(waiters.take(|u| u == Until::Stopped), None);
        assert_eq!(waiters.take(|u| u == Until::Alone), Some(CommandId(0)));
        assert_eq!(waiters.take(|u| u == Until::Alone), Some(CommandId(1)));
    }
}
