//! The secondary's role without a VM: takes whole checkpoints, answers at once.

use alloc::{boxed::Box, collections::VecDeque, sync::Arc, vec, vec::Vec};
use core::time::Duration;

use bytes::Bytes;
use thiserror::Error;

use super::{
    super::{
        config::Configuration,
        device::Devices,
        error::{Fault, Flaw, StreamError, Within},
        generation::{Command as Sent, Generation},
        item::{BlockTable, Item, PageRecord, SectionId},
        limits::{Expectation, Limits},
        message::Message,
        reader::{Demand, Overrun, Reader},
    },
    channels::Channels,
    machine::{self, Batch, Translated as _, never},
};
use crate::{
    command::{Command, CommandId},
    error::{ConfigError, PeerFault},
    event::Event,
    id::{Channel, Epoch, PAGE_SIZE},
    machine::{GuestOp, Input, Machine as _, Output},
    secondary::Secondary,
    time::Instant,
    wire::{Head, Kind},
};

/// How long the primary may be silent before it counts as lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Inside the migration or a checkpoint, where bytes must flow. Default 5 s.
    pub within: Duration,
    /// Between checkpoints, where QEMU sends nothing at all: more than its longest checkpoint
    /// delay, or `None` to rely on the connection's keep-alive alone. Default `None`.
    pub between: Option<Duration>,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            within: Duration::from_secs(5),
            between: None,
        }
    }
}

/// What the link is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// The initial migration comes in; there is nothing to resume yet.
    Migrating,
    /// A whole state is held, the primary's guest runs.
    Idle,
    /// The primary was told that this side stands still.
    Stopped,
    /// A checkpoint comes in.
    Receiving,
}

/// A whole state: with the RAM image of the same moment it can be resumed.
#[derive(Clone, Debug)]
pub struct State {
    /// Which: 0 is the initial migration, then the checkpoints.
    pub epoch: Epoch,
    /// The machine.
    pub configuration: Arc<Configuration>,
    /// Number of the RAM section.
    pub ram: SectionId,
    /// The RAM blocks.
    pub table: Arc<BlockTable>,
    /// The device sections.
    pub devices: Devices,
    /// The description of the devices.
    pub description: Bytes,
}

/// What is to be done, in order.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Action {
    /// Set memory aside for these blocks, all zero.
    Prepare(Arc<BlockTable>),
    /// A page of the coming state. If it is not zero its bytes are demanded next. It must not
    /// touch what [`Whole`](Self::Whole) announced before.
    Page(PageRecord),
    /// All pages since the last one and this device state together are the newest state: keep it.
    /// It is committed from now on, whatever happens to the link.
    Whole(State),
    /// Send these, in one write.
    Send(Vec<Message>),
}

/// The link is over. What was announced as whole is still whole.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Lost {
    /// The migration is whole and the primary never asked for a checkpoint: it ended as a plain
    /// migration, or died before.
    #[error("the primary closed the link and COLO never began: it asked for no checkpoint")]
    NeverBegan,
    /// The primary closed the connection, or died.
    #[error("the primary closed the link ({0})")]
    Closed(StreamError),
    /// Between checkpoints.
    #[error("the primary closed the link between checkpoints")]
    ClosedIdle,
    /// The primary was silent.
    #[error("the primary was silent for {silence:?} in phase {phase:?}")]
    Silent {
        /// For how long.
        silence: Duration,
        /// When.
        phase: Phase,
    },
    /// The primary sent what it must not.
    #[error(transparent)]
    Faulty(#[from] StreamError),
    /// The primary's machine is more than this side can keep.
    #[error("the primary's machine cannot be kept: {0}")]
    Unfit(#[from] ConfigError),
    /// The stream is valid and the machine behind it does not agree: a fault of this side.
    #[error("the secondary's machine refuses what the stream allows: {0}")]
    OutOfStep(PeerFault),
}

/// The secondary's role without a VM. See the [module](super) for its phases.
#[derive(Clone, Debug)]
pub struct Standby {
    reader: Reader,
    patience: Patience,
    phase: Phase,
    heard: Instant,
    /// Largest device state.
    most_state: u64,
    /// From the block table on.
    secondary: Option<Box<Secondary>>,
    channels: Channels,
    /// Whether a checkpoint was ever asked for.
    began: bool,
    coming: Coming,
    batch: Batch,
    next: Epoch,
    actions: VecDeque<Action>,
}

/// What has come of the next state, and what stays the same in all of them.
#[derive(Clone, Debug, Default)]
struct Coming {
    configuration: Option<Arc<Configuration>>,
    ram: Option<(SectionId, Arc<BlockTable>)>,
    devices: Option<Devices>,
    description: Bytes,
}

impl Standby {
    /// A link that was just accepted.
    #[must_use]
    pub fn new(now: Instant, limits: Limits, expect: Expectation, patience: Patience) -> Self {
        Self {
            most_state: limits.devices,
            reader: Reader::new(limits, expect),
            patience,
            phase: Phase::Migrating,
            heard: now,
            secondary: None,
            channels: Channels::default(),
            began: false,
            coming: Coming::default(),
            batch: Batch::default(),
            next: Epoch(0),
            actions: VecDeque::new(),
        }
    }

    /// What the next bytes are for.
    #[must_use]
    pub fn demand(&self) -> Demand {
        if self.channels.waiting() {
            return Demand {
                place: None,
                then: 0,
            };
        }
        self.reader.demand()
    }

    /// Which version of QEMU sends; certain once the migration's RAM is over.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        self.reader.generation()
    }

    /// Whether a checkpoint was ever asked for. Until then the primary may have meant a plain
    /// migration.
    #[must_use]
    pub const fn began(&self) -> bool {
        self.began
    }

    /// How many multifd channels there are.
    #[must_use]
    pub const fn channels(&self) -> usize {
        self.channels.len()
    }

    /// Another connection of this primary, which began with [`Channel::SIGN`]. Gives back its
    /// number for the calls below.
    ///
    /// [`Channel::SIGN`]: super::super::Channel::SIGN
    ///
    /// # Errors
    /// If the main stream does not say which pages of it belong where.
    pub fn open_channel(&mut self, now: Instant) -> Result<usize, Lost> {
        self.heard = now;
        Ok(self.channels.open()?)
    }

    /// What the next bytes of a channel are for. Nothing is demanded while it is ahead of the
    /// others.
    #[must_use]
    pub fn channel_demand(&self, channel: usize) -> Demand {
        self.channels.demand(channel, self.reader.in_ram())
    }

    /// [`handle_bytes`](Self::handle_bytes) of a channel. The main stream may be able to go on
    /// afterwards.
    ///
    /// # Errors
    /// As there.
    pub fn handle_channel_bytes(
        &mut self,
        now: Instant,
        channel: usize,
        input: &mut &[u8],
    ) -> Result<Option<Action>, Lost> {
        if !input.is_empty() {
            self.heard = now;
        }
        let in_ram = self.reader.in_ram();
        let Some(page) = self.channels.take(channel, in_ram, input)? else {
            return Ok(None);
        };
        if !self.reader.claim(page.run()) {
            let flaw = Flaw::new(
                0,
                "page offset",
                Fault::Repeated,
                page.page.saturating_mul(PAGE_SIZE),
                "each page once in a checkpoint",
            );
            return Err(flaw.within(Within::Channel, 0).into());
        }
        self.page(now, page).map(Some)
    }

    /// [`handle_placed`](Self::handle_placed) of a channel.
    ///
    /// # Errors
    /// As there.
    pub fn handle_channel_placed(
        &mut self,
        now: Instant,
        channel: usize,
        n: usize,
    ) -> Result<(), Overrun> {
        self.heard = now;
        self.channels.placed(channel, n)
    }

    /// What the link is doing.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// Bytes taken, page bytes included.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.reader.offset()
    }

    /// Takes small bytes up to the next action; `None` if they do not suffice, page bytes are due or
    /// multifd channels come first: then bytes may be left. Call it until then, with an empty input
    /// too.
    ///
    /// # Errors
    /// The primary's fault: close the link, keep the newest whole state.
    pub fn handle_bytes(
        &mut self,
        now: Instant,
        input: &mut &[u8],
    ) -> Result<Option<Action>, Lost> {
        if !input.is_empty() {
            self.heard = now;
        }
        loop {
            if let Some(action) = self.actions.pop_front() {
                return Ok(Some(action));
            }
            if self.channels.waiting() {
                return Ok(None);
            }
            let Some(item) = self.reader.handle_bytes(input)? else {
                return Ok(None);
            };
            if let Some(page) = self.item(now, item)? {
                return Ok(Some(page));
            }
        }
    }

    /// Tells that `n` bytes of the demanded page were placed.
    ///
    /// # Errors
    /// If that is more than were due.
    pub fn handle_placed(&mut self, now: Instant, n: usize) -> Result<(), Overrun> {
        self.heard = now;
        self.reader.handle_placed(n)
    }

    /// When the primary counts as lost if nothing comes until then.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let patience = match self.phase {
            Phase::Idle => self.patience.between?,
            Phase::Migrating | Phase::Stopped | Phase::Receiving => self.patience.within,
        };
        Some(self.heard + patience)
    }

    /// The deadline may have passed.
    ///
    /// # Errors
    /// If it has: the primary is lost. If the stream as it stands explains the silence (a
    /// description that does not fit), that is the reason.
    pub fn handle_timeout(&self, now: Instant) -> Result<(), Lost> {
        match self.poll_timeout() {
            Some(deadline) if now >= deadline => match self.reader.finish() {
                Err(fault) if fault.fault != Fault::Truncated => Err(Lost::Faulty(fault)),
                _ => Err(Lost::Silent {
                    silence: now.since(self.heard),
                    phase: self.phase,
                }),
            },
            _ => Ok(()),
        }
    }

    /// The connection is closed or broken.
    #[must_use]
    pub fn handle_closed(&self) -> Lost {
        match self.reader.finish() {
            Ok(()) if !self.began => Lost::NeverBegan,
            Ok(()) => Lost::ClosedIdle,
            Err(cut) => Lost::Closed(cut),
        }
    }

    /// `x-colo-lost-heartbeat`: the link is over, this side is to be the VM. Gives back the epoch
    /// that it goes on from; `None` if it holds no whole state, or if the primary was lost by its
    /// own fault: it is alive, and to take over would make two of one guest.
    pub fn take_over(mut self, now: Instant, lost: &Lost) -> Option<Epoch> {
        if matches!(lost, Lost::Faulty(_) | Lost::Unfit(_) | Lost::OutOfStep(_)) {
            return None;
        }
        let mut secondary = self.secondary.take()?;
        never(secondary.handle_input(now, Input::Down(Channel::Control)));
        self.drain(now, &mut secondary).ok()?;
        let command = Input::Command(CommandId(0), Command::LostHeartbeat);
        never(secondary.handle_input(now, command));
        core::iter::from_fn(|| secondary.poll_output()).find_map(|output| match output {
            Output::Event(Event::Promoted { epoch, .. }) => Some(epoch),
            _ => None,
        })
    }

    // ---- the translation ------------------------------------------------------------------------

    /// Says to the machine what an item means. A page is handed out at once.
    fn item(&mut self, now: Instant, item: Item) -> Result<Option<Action>, Lost> {
        match item {
            Item::Configuration(configuration) => self.coming.configuration = Some(configuration),
            Item::RamStart { id, table, multifd } => {
                self.channels.start(&table, multifd)?;
                self.secondary = Some(machine::secondary(&table, self.most_state, now)?);
                self.coming.ram = Some((id, Arc::clone(&table)));
                return Ok(Some(Action::Prepare(table)));
            }
            Item::Page(page) => return self.page(now, page).map(Some),
            Item::Flush => self.channels.flush()?,
            Item::Command(Sent::Ping(value)) => {
                let pong = vec![Message::Pong(value)];
                self.actions.push_back(Action::Send(pong));
            }
            Item::Devices(devices) => self.coming.devices = Some(devices),
            Item::Description(description) => {
                self.coming.description = description;
                self.migrated(now)?;
            }
            Item::Message(Message::CheckpointRequest) => {
                self.phase = Phase::Stopped;
                self.began = true;
                let epoch = self.next;
                self.tell(now, |s| s.tell(now, Kind::CheckpointRequest, epoch.0))?;
            }
            Item::Message(Message::VmstateSend) => self.phase = Phase::Receiving,
            Item::Blob(devices) => {
                self.coming.devices = Some(devices);
                self.whole(now)?;
            }
            Item::Header
            | Item::Command(_)
            | Item::RamPart(_)
            | Item::RamEnd(_)
            | Item::SectionClosed(_)
            | Item::LiveOver
            | Item::Message(_) => {}
        }
        Ok(None)
    }

    fn page(&mut self, now: Instant, page: PageRecord) -> Result<Action, Lost> {
        if !self.batch.push(page.run()) {
            self.tell_pages(now)?;
            self.batch.push(page.run());
        }
        Ok(Action::Page(page))
    }

    /// The initial migration is over: what QEMU sends without asking was the only live round, and
    /// the first checkpoint is its device state alone.
    fn migrated(&mut self, now: Instant) -> Result<(), Lost> {
        self.tell_pages(now)?;
        let (pages, epoch) = (self.batch.ended(), self.next);
        self.tell(now, |s| s.tell_lane_end(now, pages, true, epoch))?;
        self.tell(now, |s| s.tell(now, Kind::CheckpointRequest, epoch.0))?;
        self.whole(now)
    }

    /// The last byte of a state is here.
    fn whole(&mut self, now: Instant) -> Result<(), Lost> {
        self.tell_pages(now)?;
        let (pages, epoch) = (self.batch.ended(), self.next);
        let length = self.coming.devices.as_ref().map_or(0, |d| d.bytes().len());
        self.tell(now, |s| {
            s.tell_send(now, pages, epoch);
            s.tell_lane_end(now, pages, false, epoch);
            s.tell_state(now, length, epoch);
        })
    }

    fn tell_pages(&mut self, now: Instant) -> Result<(), Lost> {
        let (live, epoch) = (self.phase == Phase::Migrating, self.next);
        match self.batch.take() {
            Some(runs) => self.tell(now, |s| s.tell_pages(now, &runs, live, epoch)),
            None => Ok(()),
        }
    }

    fn tell(&mut self, now: Instant, say: impl FnOnce(&mut Secondary)) -> Result<(), Lost> {
        let Some(mut secondary) = self.secondary.take() else {
            return Ok(());
        };
        say(&mut secondary);
        let drained = self.drain(now, &mut secondary);
        self.secondary = Some(secondary);
        drained
    }

    /// Carries out what the machine wants. Without a VM an operation on the guest is done as soon
    /// as it is asked for; to load the state is to keep it.
    fn drain(&mut self, now: Instant, secondary: &mut Secondary) -> Result<(), Lost> {
        while let Some(output) = secondary.poll_output() {
            if let Some(fault) = machine::fault(&output) {
                return Err(Lost::OutOfStep(fault.clone()));
            }
            let Output::Guest(op) = output else { continue };
            if matches!(op, GuestOp::LoadState { .. }) {
                self.keep();
            }
            never(secondary.handle_input(now, Input::Guest(op.done())));
        }
        let said = secondary.transmitted().into_iter();
        let mut replies: Vec<Message> = said.filter_map(|head| reply(&head)).collect();
        if self.reader.return_path() && replies.contains(&Message::CheckpointReady) {
            // QEMU 11 hears of READY only if the migration's return path has ended well.
            replies.insert(0, Message::ReturnPathOver(0));
        }
        if !replies.is_empty() {
            self.actions.push_back(Action::Send(replies));
        }
        Ok(())
    }

    fn keep(&mut self) {
        let coming = &mut self.coming;
        if let (Some(configuration), Some((ram, table)), Some(devices)) = (
            coming.configuration.clone(),
            coming.ram.clone(),
            coming.devices.take(),
        ) {
            self.actions.push_back(Action::Whole(State {
                epoch: self.next,
                configuration,
                ram,
                table,
                devices,
                description: coming.description.clone(),
            }));
            self.next = self.next.next();
            self.phase = Phase::Idle;
        }
    }
}

/// A message of the machine in QEMU's words. Of the first checkpoint QEMU wants only the end.
fn reply(head: &Head) -> Option<Message> {
    let first = head.number == 0;
    Some(match head.kind {
        Kind::CheckpointReady => Message::CheckpointReady,
        Kind::CheckpointReply if !first => Message::CheckpointReply,
        Kind::VmstateReceived if !first => Message::VmstateReceived,
        Kind::VmstateLoaded => Message::VmstateLoaded,
        _ => return None,
    })
}

impl Message {
    /// Several messages as they stand on the wire.
    #[must_use]
    pub fn encode_all(messages: &[Self]) -> Vec<u8> {
        messages.iter().flat_map(Self::encode).collect()
    }
}
