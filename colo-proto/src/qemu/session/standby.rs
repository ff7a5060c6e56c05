//! The secondary's role without a VM: takes whole checkpoints, answers at once.

use alloc::{sync::Arc, vec::Vec};
use core::time::Duration;

use bytes::Bytes;
use thiserror::Error;

use super::super::{
    config::Configuration,
    device::Devices,
    error::StreamError,
    item::{BlockTable, Item, PageRecord, SectionId},
    limits::{Expectation, Limits},
    message::Message,
    reader::{Demand, Overrun, Reader},
};
use crate::{id::Epoch, time::Instant};

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
    Send(&'static [Message]),
}

/// The link is over. What was announced as whole is still whole.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Lost {
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
}

/// The secondary's role without a VM. See the [module](super) for its phases.
#[derive(Clone, Debug)]
pub struct Standby {
    reader: Reader,
    patience: Patience,
    phase: Phase,
    heard: Instant,
    coming: Coming,
    next: Epoch,
    queued: Option<Action>,
}

/// What the initial migration has brought so far.
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
            reader: Reader::new(limits, expect),
            patience,
            phase: Phase::Migrating,
            heard: now,
            coming: Coming::default(),
            next: Epoch(0),
            queued: None,
        }
    }

    /// What the next bytes are for.
    #[must_use]
    pub fn demand(&self) -> Demand {
        self.reader.demand()
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

    /// Takes small bytes up to the next action; `None` if they do not suffice or page bytes are
    /// due. Call it until then, with an empty input too.
    ///
    /// # Errors
    /// The primary's fault: close the link, keep the newest whole state.
    pub fn handle_bytes(
        &mut self,
        now: Instant,
        input: &mut &[u8],
    ) -> Result<Option<Action>, Lost> {
        if self.queued.is_some() {
            return Ok(self.queued.take());
        }
        if !input.is_empty() {
            self.heard = now;
        }
        while let Some(item) = self.reader.handle_bytes(input)? {
            if let Some(action) = self.turn(item) {
                return Ok(Some(action));
            }
        }
        Ok(None)
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
                Err(fault) if fault.fault != super::super::error::Fault::Truncated => {
                    Err(Lost::Faulty(fault))
                }
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
            Ok(()) => Lost::ClosedIdle,
            Err(cut) => Lost::Closed(cut),
        }
    }

    fn turn(&mut self, item: Item) -> Option<Action> {
        match item {
            Item::Configuration(configuration) => {
                self.coming.configuration = Some(configuration);
                None
            }
            Item::RamStart { id, table } => {
                self.coming.ram = Some((id, Arc::clone(&table)));
                Some(Action::Prepare(table))
            }
            Item::Page(page) => Some(Action::Page(page)),
            Item::Devices(devices) => {
                self.coming.devices = Some(devices);
                None
            }
            Item::Description(description) => {
                self.coming.description = description;
                let devices = self.coming.devices.take()?;
                self.whole(devices, &[Message::CheckpointReady])
            }
            Item::Message(Message::CheckpointRequest) => {
                self.phase = Phase::Stopped;
                Some(Action::Send(&[Message::CheckpointReply]))
            }
            Item::Message(Message::VmstateSend) => {
                self.phase = Phase::Receiving;
                None
            }
            Item::Blob(devices) => {
                self.whole(devices, &[Message::VmstateReceived, Message::VmstateLoaded])
            }
            Item::Header
            | Item::EnableColo
            | Item::RamPart(_)
            | Item::RamEnd(_)
            | Item::SectionClosed(_)
            | Item::LiveOver
            | Item::Message(_) => None,
        }
    }

    fn whole(&mut self, devices: Devices, replies: &'static [Message]) -> Option<Action> {
        let (ram, table) = self.coming.ram.clone()?;
        let state = State {
            epoch: self.next,
            configuration: self.coming.configuration.clone()?,
            ram,
            table,
            devices,
            description: self.coming.description.clone(),
        };
        self.next = self.next.next();
        self.phase = Phase::Idle;
        self.queued = Some(Action::Send(replies));
        Some(Action::Whole(state))
    }
}

impl Message {
    /// Several messages as they stand on the wire.
    #[must_use]
    pub fn encode_all(messages: &[Self]) -> Vec<u8> {
        messages.iter().flat_map(Self::encode).collect()
    }
}
