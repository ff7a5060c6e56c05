//! The machines behind the dialect: how they are set up, and how a translation speaks with them.
//!
//! A translation sits where the native wire's [`Link`](crate::pairing::Link) sits otherwise: it makes
//! of QEMU's stream the items that the native frames would have made, and of the machine's
//! messages those of QEMU. What QEMU does not say (an end of a round, the number of pages to come)
//! it says for it; what QEMU does not understand it keeps to itself.

use alloc::{boxed::Box, vec::Vec};
use bytes::{Bytes, BytesMut};
use core::{num::NonZeroUsize, time::Duration};

use crate::{
    base::Base,
    config::Config,
    error::{ConfigError, Misuse, PeerFault},
    event::{Event, PeerLost},
    id::{Channel, Epoch, PAGE_SIZE, PageRun, PageRuns},
    machine::{Input, Machine, Output, Transmit},
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    ownership::External,
    pairing::Item,
    primary::Primary,
    ram::CacheMode,
    roles::Conduct as _,
    secondary::Secondary,
    status::ResumePolicy,
    time::Instant,
    wire::{
        BATCH_PAGES, BATCH_RUNS, FLAG_LIVE, HEAD_LEN, Head, Kind, RUN_LEN, VmstateSend, encode_runs,
    },
};

use super::super::item::BlockTable;

/// The only RAM lane there is.
pub(super) const RAM: Channel = Channel::Ram(0);
/// The process at the other end, which has no name.
const PEER: BootId = BootId(1);
/// The translations watch the link themselves: a machine sees bytes only when they make an item.
const STALL: Duration = Duration::from_secs(600);

fn base(table: &BlockTable, state: u64, told: External, now: Instant) -> Result<Base, ConfigError> {
    // No member acts on this: who owns the VM is told.
    let member = MemberConfig::new(VmId([0; 16]), NodeId(2), MacKey([0; 16]));
    let config = Config::builder(NodeId(1), member, &table.slots())
        .cache(CacheMode::Full)
        .resume(ResumePolicy::AfterLoad)
        .longest(Duration::from_secs(3600))
        .shortest(Duration::ZERO)
        .state_bytes(state.clamp(4096, 1 << 30))
        .stall(STALL)
        .build()?;
    Ok(Base::new(config, BootId(0), told, now))
}

/// The secondary of a primary with these RAM blocks.
pub(super) fn secondary(
    table: &BlockTable,
    state: u64,
    now: Instant,
) -> Result<Box<Secondary>, ConfigError> {
    let base = base(table, state, External::partner(), now)?;
    Ok(Box::new(Secondary::accepted(base, PEER)))
}

/// The primary of a VM with these RAM blocks.
pub(super) fn primary(
    table: &BlockTable,
    state: u64,
    now: Instant,
) -> Result<Box<Primary>, ConfigError> {
    let base = base(table, state, External::owner(), now)?;
    Ok(Box::new(Primary::accepted(base, PEER)))
}

/// What the two roles have in common for a translation.
pub(super) trait Translated: Machine {
    fn base(&self) -> &Base;

    fn handle(&mut self, now: Instant, channel: Channel, item: Item);

    /// A message without a body.
    fn tell(&mut self, now: Instant, kind: Kind, number: u64) {
        self.tell_head(now, Channel::Control, self.base().link.head(kind, number));
    }

    fn tell_head(&mut self, now: Instant, channel: Channel, head: Head) {
        self.handle(now, channel, Item::Message(head, Bytes::new()));
    }

    /// Pages that are in place; `live` says whether they belong to round 0 or to `epoch`.
    fn tell_pages(&mut self, now: Instant, runs: &PageRuns, live: bool, epoch: Epoch) {
        let mut head = self
            .base()
            .link
            .head(Kind::Pages, if live { 0 } else { epoch.0 });
        head.flags = if live { FLAG_LIVE } else { 0 };
        head.count = u32::try_from(runs.as_slice().len()).unwrap_or(u32::MAX);
        head.arg = u32::try_from(runs.pages()).unwrap_or(u32::MAX);
        let mut table = BytesMut::with_capacity(runs.as_slice().len() * RUN_LEN);
        encode_runs(runs, &mut table);
        head.len = u32::try_from(table.len() as u64 + runs.pages() * PAGE_SIZE).unwrap_or(u32::MAX);
        self.handle(now, RAM, Item::Message(head, table.freeze()));
        self.handle(now, RAM, Item::Placed(head));
    }

    fn tell_lane_end(&mut self, now: Instant, pages: u32, live: bool, epoch: Epoch) {
        let mut head = self
            .base()
            .link
            .head(Kind::LaneEnd, if live { 0 } else { epoch.0 });
        head.flags = if live { FLAG_LIVE } else { 0 };
        head.count = pages;
        self.tell_head(now, RAM, head);
    }

    /// VMSTATE_SEND with the number of pages, which QEMU does not announce.
    fn tell_send(&mut self, now: Instant, pages: u32, epoch: Epoch) {
        let head = self.base().link.head(Kind::VmstateSend, epoch.0);
        let send = VmstateSend {
            inputs: 0,
            pages: u64::from(pages),
        };
        let body = Bytes::copy_from_slice(&send.encode());
        self.handle(now, Channel::Control, Item::Message(head, body));
    }

    /// Device state of this length, which the reader has taken and validated.
    fn tell_state(&mut self, now: Instant, length: usize, epoch: Epoch) {
        let mut head = self.base().link.head(Kind::VmstateSize, epoch.0);
        head.len = u32::try_from(length).unwrap_or(u32::MAX);
        self.handle(now, Channel::Control, Item::Contents(head));
        self.handle(now, Channel::Control, Item::Placed(head));
    }

    /// The heads of all that the machine has to send, reported as sent.
    fn transmitted(&mut self) -> Vec<Head> {
        let mut heads = Vec::new();
        let now = self.base().now;
        for channel in [Channel::Control, RAM] {
            while let Some(transmit) = self.poll_transmit(channel, usize::MAX) {
                heads.extend(heads_of(channel, &transmit));
                let length = usize::try_from(transmit.len()).unwrap_or(usize::MAX);
                if let Some(n) = NonZeroUsize::new(length) {
                    let sent = self.handle_input(now, Input::Sent(channel, n));
                    debug_assert_eq!(sent, Ok(()), "what was handed out is sent");
                }
            }
        }
        heads
    }
}

impl Translated for Secondary {
    fn base(&self) -> &Base {
        &self.base
    }

    fn handle(&mut self, now: Instant, channel: Channel, item: Item) {
        self.base.now = self.base.now.max(now);
        self.arrived(channel, item);
        self.start();
    }
}

impl Translated for Primary {
    fn base(&self) -> &Base {
        &self.base
    }

    fn handle(&mut self, now: Instant, channel: Channel, item: Item) {
        self.base.now = self.base.now.max(now);
        self.arrived(channel, item);
        self.start();
    }
}

/// The heads in a transmission: several small messages, or one with contents behind it.
fn heads_of(channel: Channel, transmit: &Transmit) -> Vec<Head> {
    let (mut heads, mut bytes) = (Vec::new(), &transmit.head[..]);
    while let Some((head, rest)) = bytes.split_first_chunk::<HEAD_LEN>() {
        let Ok(head) = Head::decode(channel, head) else {
            break;
        };
        let small = usize::try_from(head.len).unwrap_or(usize::MAX);
        bytes = rest.get(small..).unwrap_or_default();
        heads.push(head);
    }
    heads
}

/// The fault that ended the pairing in this output, if there was one.
pub(super) fn fault(output: &Output) -> Option<&PeerFault> {
    match output {
        Output::Event(Event::PeerLeft(PeerLost::Faulty(fault))) => Some(fault),
        _ => None,
    }
}

/// Pages that were not told to the machine yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Batch {
    runs: PageRuns,
    /// Pages in `runs`.
    held: u32,
    /// All pages since [`ended`](Self::ended), told or not.
    pages: u32,
}

impl Batch {
    /// Adds a page. False if what is here must be told first.
    pub(super) fn push(&mut self, page: PageRun) -> bool {
        if self.held == BATCH_PAGES
            || self.runs.as_slice().len() == BATCH_RUNS
            || self.runs.push(page).is_err()
        {
            return false;
        }
        self.held += 1;
        self.pages = self.pages.saturating_add(1);
        true
    }

    /// What is to be told.
    pub(super) fn take(&mut self) -> Option<PageRuns> {
        self.held = 0;
        let runs = core::mem::take(&mut self.runs);
        (!runs.is_empty()).then_some(runs)
    }

    /// How many pages there were; the next one is the first again.
    pub(super) const fn ended(&mut self) -> u32 {
        core::mem::replace(&mut self.pages, 0)
    }
}

/// Keeps a driver's mistake from passing unseen in a debug build: a translation makes none.
pub(super) fn never(result: Result<(), Misuse>) {
    debug_assert_eq!(result, Ok(()), "a translation keeps the machine's contract");
}
