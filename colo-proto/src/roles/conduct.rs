//! What conducting means in either role: every input goes to whom it concerns, and then everything
//! that became possible happens.
//!
//! A role says what is its own; what is the same in both stands here once.

use bytes::Bytes;

use crate::{
    base::Base,
    command::{Answer, Command, CommandId},
    error::{Misuse, PeerFault},
    event::{Event, PeerLost},
    id::{Channel, Epoch, Slot},
    machine::{GuestDone, GuestOpKind, Input, Notify, ReplicationOp},
    member::MemberOutput,
    operator::{self, Act, Order, Standing},
    pairing::Item,
    time::Instant,
    wire::{Kind, decode_reasons},
};

/// One role.
pub(crate) trait Conduct {
    fn base(&self) -> &Base;
    fn base_mut(&mut self) -> &mut Base;

    /// A channel is connected.
    fn channel_up(&mut self, channel: Channel) -> Result<(), Misuse>;
    /// A channel is gone, or could not be connected.
    fn channel_down(&mut self, channel: Channel, was_up: bool);
    /// First contact, which is made before the two have agreed on anything.
    fn contact(&mut self, item: &Item) -> Option<Result<(), PeerFault>>;
    /// What the peer says under the ownership that this pairing began with.
    fn item(&mut self, channel: Channel, item: Item) -> Result<(), PeerFault>;
    /// The guest here said something after capture `since`.
    fn frame_from_guest(&mut self, since: Epoch, frame: Bytes) -> Result<(), Misuse>;
    /// A client said something.
    fn frame_from_world(&mut self, frame: Bytes);
    /// The guest side says what was written, for this operation.
    fn dirty(&mut self, asked: GuestOpKind, slot: Slot, words: &[u64]);
    /// The guest side ended something that no operator asked for.
    fn guest_done(&mut self, done: GuestDone);
    /// The member wants something of this role.
    fn member_output(&mut self, output: MemberOutput);
    /// How this host stands, for an operator's command.
    fn standing(&self) -> Standing;
    /// Does what an operator wants.
    fn act(&mut self, act: Act);
    /// One step that needs no further input. False if there is none.
    fn advance(&mut self) -> bool;
    /// Whether this host has another role now.
    fn is_over(&self) -> bool;
    /// The peer is of no use any more; `said` is what it is told.
    fn lose_peer(&mut self, why: PeerLost, said: Option<&str>);

    fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        debug_assert!(
            self.base().drained(),
            "drain poll_output before the next input"
        );
        let Some(input) = self.base_mut().handle_common(now, input)? else {
            return Ok(());
        };
        match input {
            Input::Up(channel) => self.channel_up(channel)?,
            Input::Down(channel) => {
                let was_up = self.base().link.is_up(channel);
                self.base_mut().link.down(channel)?;
                self.channel_down(channel, was_up);
            }
            Input::Bytes(channel, bytes) => match self.base_mut().link.bytes(channel, bytes)? {
                Ok(None) => {}
                Ok(Some(item)) => self.arrived(channel, item),
                Err(fault) => self.fault(fault),
            },
            Input::Placed(channel, n) => {
                let item = self.base_mut().link.placed(channel, n)?;
                self.arrived(channel, item);
            }
            Input::Frame(channel, frame) => {
                let item = self.base_mut().link.frame(channel, frame)?;
                self.arrived(channel, item);
            }
            Input::FromGuest { epoch, frame } => self.frame_from_guest(epoch, frame)?,
            Input::FromWorld(frame) => self.frame_from_world(frame),
            Input::Dirty(slot, words) => {
                self.base().check_slot(slot)?;
                match self.base().guest_ops.busy() {
                    Some(asked @ (GuestOpKind::Harvest | GuestOpKind::Capture)) => {
                        self.dirty(asked, slot, words);
                    }
                    busy => {
                        return Err(Misuse::UnexpectedDone {
                            got: "dirty words",
                            expected: busy.map_or("nothing", GuestOpKind::name),
                        });
                    }
                }
            }
            Input::Guest(done) => {
                let now = self.base().now;
                match self.base_mut().guest_ops.done(now, &done)? {
                    Some(id) => self.base_mut().operated(id, done),
                    None => {
                        self.base_mut().link.progressed(now);
                        self.guest_done(done);
                    }
                }
                self.base_mut().answer_stopped();
            }
            Input::Command(id, command) => self.command(id, command),
            _ => {}
        }
        Ok(())
    }

    /// Lets everything that became possible happen: member decisions, then phases, then timers.
    /// False if this host has another role now.
    fn settle(&mut self) -> bool {
        loop {
            while let Some(output) = self.base_mut().member.poll_output() {
                if let Some(output) = self.base_mut().member_output(output) {
                    self.member_output(output);
                }
                if self.is_over() {
                    return false;
                }
            }
            if !self.advance() {
                return true;
            }
        }
    }

    /// Something of the peer is here.
    fn arrived(&mut self, channel: Channel, item: Item) {
        let now = self.base().now;
        self.base_mut().link.moved(now, channel);
        if let Item::Message(head, body) = &item
            && let Kind::Leave | Kind::Refuse = head.kind
        {
            let reasons = decode_reasons(body);
            if head.kind == Kind::Leave {
                let said = reasons.into_iter().next().unwrap_or_default();
                return self.lose_peer(PeerLost::Told(said), None);
            }
            self.base_mut().event(Event::PeerRefused { reasons });
            return self.lose_peer(PeerLost::Unfit, None);
        }
        let result = match self.contact(&item) {
            Some(result) => result,
            None => self
                .base()
                .link
                .check_generation(item.head())
                .and_then(|()| self.item(channel, item)),
        };
        if let Err(fault) = result {
            self.fault(fault);
        }
    }

    fn fault(&mut self, fault: PeerFault) {
        let said = alloc::format!("{fault}");
        self.lose_peer(PeerLost::Faulty(fault), Some(&said));
    }

    fn command(&mut self, id: CommandId, command: Command) {
        match operator::order(command, &self.standing()) {
            Order::Refuse(why) => self.base_mut().refuse(id, why),
            Order::Do(act) => {
                self.act(act);
                self.base_mut().answer(id, Answer::Done);
            }
            Order::Begin(act, until) => {
                if self.base_mut().wait(id, until) {
                    self.act(act);
                }
            }
            Order::Replicate(op) => {
                self.base_mut().replicate(id, op);
                if op == ReplicationOp::Checkpoint {
                    let epoch = self.base().epoch;
                    self.base_mut().notify(Notify::FilterCheckpoint(epoch));
                }
            }
        }
    }
}
