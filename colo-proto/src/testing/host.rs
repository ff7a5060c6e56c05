//! A node and the guest behind it.

use alloc::{collections::VecDeque, vec::Vec};
use bytes::Bytes;
use core::num::NonZeroUsize;

use crate::{
    error::Misuse,
    id::{Channel, Epoch, Slot},
    machine::{Body, GuestDone, GuestOp, Input, Machine as _, Output, Sink, Transmit},
    node::Node,
    time::Instant,
};

/// What a test needs of a guest.
pub trait Guest {
    /// Contents of pages and device state on their way to the other host. Bytes in a real VMM; a
    /// test may carry whatever stands for them, since no machine looks at contents.
    type Contents;

    /// Carries out one operation.
    fn operate(&mut self, op: GuestOp) -> GuestDone;
    /// The dirty log: asked for at the end of a harvest and of a capture, empty afterwards.
    fn dirty(&mut self) -> Vec<(Slot, Vec<u64>)>;
    /// What is sent for a body.
    fn read(&mut self, body: &Body) -> Self::Contents;
    /// Contents arrived, and belong there.
    fn write(&mut self, sink: &Sink, contents: Self::Contents);
    /// A client's frame for the guest.
    fn hear(&mut self, index: u64, frame: Bytes) {
        let _ = (index, frame);
    }
    /// A frame of the guest, with the epoch it was said after.
    fn say(&mut self) -> Option<(Epoch, Bytes)> {
        None
    }
}

/// What a host asks for and has to be answered, by who answers it. Errands of one kind are done in
/// the order in which they were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The guest: [`Output::Guest`].
    Guest,
    /// The arbiter: [`Output::AskArbiter`], [`Output::ReadArbiter`].
    Arbiter,
    /// The local disk: [`Output::Persist`].
    Disk,
    /// The power switch: [`Output::Fence`].
    Power,
    /// The network: [`Output::Dial`], [`Output::HangUp`].
    Connection,
    /// The network again: [`Output::Datagram`].
    Datagram,
}

impl Effect {
    /// Every kind.
    pub const ALL: [Self; 6] = [
        Self::Guest,
        Self::Arbiter,
        Self::Disk,
        Self::Power,
        Self::Connection,
        Self::Datagram,
    ];

    /// The kind of an output; `None` for those that nobody answers.
    #[must_use]
    pub const fn of(output: &Output) -> Option<Self> {
        Some(match output {
            Output::Guest(_) => Self::Guest,
            Output::AskArbiter(_) | Output::ReadArbiter(_) => Self::Arbiter,
            Output::Persist(..) => Self::Disk,
            Output::Fence(_) => Self::Power,
            Output::Dial(_) | Output::HangUp(_) => Self::Connection,
            Output::Datagram(..) => Self::Datagram,
            _ => return None,
        })
    }
}

/// A node and its guest, driven as the [drain contract](crate::machine#the-drain-contract) says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host<G> {
    /// The guest.
    pub guest: G,
    node: Node,
    asked: VecDeque<Output>,
    said: VecDeque<Output>,
}

impl<G: Guest> Host<G> {
    /// A host whose node was just made.
    #[must_use]
    pub fn new(node: Node, guest: G) -> Self {
        let mut host = Self {
            guest,
            node,
            asked: VecDeque::new(),
            said: VecDeque::new(),
        };
        host.drain();
        host
    }

    /// The node.
    #[must_use]
    pub const fn node(&self) -> &Node {
        &self.node
    }

    /// What was asked for and has not been done, oldest first.
    pub fn asked(&self) -> impl Iterator<Item = &Output> {
        self.asked.iter()
    }

    /// Takes the oldest effect of a kind: it is the caller's now, to do or to lose.
    pub fn take(&mut self, effect: Effect) -> Option<Output> {
        let mut all = self.asked.iter();
        let at = all.position(|asked| Effect::of(asked) == Some(effect))?;
        self.asked.remove(at)
    }

    /// The next of what is only told: frames for the world, events, answers, notifications.
    pub fn poll_said(&mut self) -> Option<Output> {
        self.said.pop_front()
    }

    /// One input, and the drain that follows it.
    ///
    /// # Errors
    /// The call was wrong.
    pub fn input(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        self.node.handle_input(now, input)?;
        self.drain();
        Ok(())
    }

    /// The guest does what it was told to; false if there was nothing.
    ///
    /// # Errors
    /// The guest reported what is not so.
    pub fn operate(&mut self, now: Instant) -> Result<bool, Misuse> {
        let Some(Output::Guest(op)) = self.take(Effect::Guest) else {
            return Ok(false);
        };
        let logs = matches!(op, GuestOp::Harvest | GuestOp::Capture { .. });
        let done = self.guest.operate(op);
        if logs && !matches!(done, GuestDone::Failed { .. }) {
            for (slot, words) in self.guest.dirty() {
                self.input(now, Input::Dirty(slot, &words))?;
            }
        }
        self.input(now, Input::Guest(done))?;
        Ok(true)
    }

    /// Reports one frame that the guest said; false if it said nothing.
    ///
    /// # Errors
    /// The guest names an epoch that has not begun.
    pub fn listen(&mut self, now: Instant) -> Result<bool, Misuse> {
        let Some((epoch, frame)) = self.guest.say() else {
            return Ok(false);
        };
        self.input(now, Input::FromGuest { epoch, frame })?;
        Ok(true)
    }

    /// The next message for a channel, which the kernel takes at once.
    ///
    /// # Errors
    /// None of a right machine.
    pub fn transmit(
        &mut self,
        now: Instant,
        channel: Channel,
        budget: usize,
    ) -> Result<Option<Transmit>, Misuse> {
        let Some(message) = self.node.poll_transmit(channel, budget) else {
            return Ok(None);
        };
        let len = usize::try_from(message.len()).ok();
        if let Some(len) = len.and_then(NonZeroUsize::new) {
            self.input(now, Input::Sent(channel, len))?;
        }
        Ok(Some(message))
    }

    /// What the next bytes of a channel are for.
    pub fn demand(&mut self, channel: Channel) -> crate::machine::Demand {
        self.node.poll_demand(channel)
    }

    fn drain(&mut self) {
        while let Some(output) = self.node.poll_output() {
            match output {
                Output::ToGuest { index, frame } => self.guest.hear(index, frame),
                output if Effect::of(&output).is_some() => self.asked.push_back(output),
                output => self.said.push_back(output),
            }
        }
    }
}
