//! The multifd channels of a link: how far each has come, and whether the main stream may go on.

use alloc::{sync::Arc, vec::Vec};

use super::super::{
    channel::{Channel, ChannelItem},
    error::{Expected, Fault, Feature, Flaw, StreamError, Within},
    item::{BlockTable, PageRecord},
    reader::{Demand, Overrun},
};

/// Most channels: their numbers are bytes.
const MOST: usize = 256;

/// The channels of one link.
#[derive(Clone, Debug, Default)]
pub(super) struct Channels {
    all: Vec<One>,
    table: Option<Arc<BlockTable>>,
    /// Whether the main stream uses channels; not known before its block table.
    used: Option<bool>,
    /// Flush records that came on the main stream.
    flushes: u64,
    /// Whether the main stream waits until every channel has come to the mark of the last one.
    waiting: bool,
}

#[derive(Clone, Debug, Default)]
struct One {
    reader: Channel,
    number: Option<u8>,
    marks: u64,
    packets: u64,
    /// The greatest number of a packet.
    newest: u64,
}

const NOTHING: Demand = Demand {
    place: None,
    then: 0,
};

impl Channels {
    /// A connection that began with the sign of a channel. Gives back its place.
    pub(super) fn open(&mut self) -> Result<usize, StreamError> {
        if self.used == Some(false) {
            return Err(unmarked());
        }
        if self.all.len() == MOST {
            let flaw = Flaw::new(
                0,
                "number of channels",
                Fault::OverLimit,
                MOST + 1,
                Expected::AtMost(MOST as u64),
            );
            return Err(flaw.within(Within::Channel, 0));
        }
        let mut one = One::default();
        if let Some(table) = &self.table {
            one.reader.set_table(table);
        }
        self.all.push(one);
        Ok(self.all.len() - 1)
    }

    /// The main stream's block table came, and says whether there are channels.
    pub(super) fn start(
        &mut self,
        table: &Arc<BlockTable>,
        multifd: bool,
    ) -> Result<(), StreamError> {
        self.used = Some(multifd);
        if !multifd {
            return if self.all.is_empty() {
                Ok(())
            } else {
                Err(unmarked())
            };
        }
        for one in &mut self.all {
            one.reader.set_table(table);
        }
        self.table = Some(Arc::clone(table));
        self.flush()
    }

    /// The main stream waits for the next mark of every channel.
    pub(super) fn flush(&mut self) -> Result<(), StreamError> {
        self.flushes += 1;
        self.waiting = true;
        self.settle()
    }

    /// Whether the main stream has to wait.
    pub(super) const fn waiting(&self) -> bool {
        self.waiting
    }

    pub(super) const fn len(&self) -> usize {
        self.all.len()
    }

    /// What the next bytes of a channel are for; `in_ram` says whether it may carry pages now.
    pub(super) fn demand(&self, at: usize, in_ram: bool) -> Demand {
        match self.all.get(at) {
            Some(one) if one.number.is_none() || (in_ram && self.may_go_on(one)) => {
                one.reader.demand()
            }
            _ => NOTHING,
        }
    }

    /// What lies behind a mark comes after all that lies before it on the other channels.
    fn may_go_on(&self, one: &One) -> bool {
        one.marks <= self.flushes - u64::from(self.waiting)
    }

    /// Takes bytes of a channel up to its next page.
    pub(super) fn take(
        &mut self,
        at: usize,
        in_ram: bool,
        input: &mut &[u8],
    ) -> Result<Option<PageRecord>, StreamError> {
        while let Some(one) = self.all.get(at) {
            if one.number.is_some() && !(in_ram && self.may_go_on(one)) {
                break;
            }
            let Some(one) = self.all.get_mut(at) else {
                break;
            };
            match one.reader.handle_bytes(input)? {
                None => break,
                Some(ChannelItem::Page(page)) => return Ok(Some(page)),
                Some(ChannelItem::Packet(number)) => one.counted(number)?,
                Some(ChannelItem::Sync(number)) => {
                    one.counted(number)?;
                    one.marks += 1;
                    self.settle()?;
                }
                Some(ChannelItem::Open(number)) => {
                    one.number = Some(number);
                    self.numbered(at, number)?;
                }
            }
        }
        Ok(None)
    }

    pub(super) fn placed(&mut self, at: usize, n: usize) -> Result<(), Overrun> {
        match self.all.get_mut(at) {
            Some(one) => one.reader.handle_placed(n),
            None => Err(Overrun { placed: n, due: 0 }),
        }
    }

    fn numbered(&self, at: usize, number: u8) -> Result<(), StreamError> {
        let mut others = self.all.iter().enumerate().filter(|(i, _)| *i != at);
        if others.any(|(_, one)| one.number == Some(number)) {
            let got = u32::from(number);
            let flaw = Flaw::new(24, "channel", Fault::Repeated, got, "each channel once");
            return Err(flaw.within(Within::Channel, 0));
        }
        Ok(())
    }

    /// Lets the main stream go on if every channel has come to the mark. A channel that has not
    /// connected yet is missed by the numbers of its packets.
    fn settle(&mut self) -> Result<(), StreamError> {
        let there = |one: &One| one.number.is_some() && one.marks >= self.flushes;
        if !self.waiting || self.all.is_empty() || !self.all.iter().all(there) {
            return Ok(());
        }
        let packets: u64 = self.all.iter().map(|one| one.packets).sum();
        let newest = self.all.iter().map(|one| one.newest).max().unwrap_or(0);
        let announced = newest.saturating_add(1);
        if packets > announced {
            let flaw = Flaw::new(
                24,
                "packet number",
                Fault::Repeated,
                packets,
                Expected::AtMost(announced),
            );
            return Err(flaw.within(Within::Channel, 0));
        }
        self.waiting = packets < announced;
        Ok(())
    }
}

impl One {
    /// Numbers grow on each channel.
    fn counted(&mut self, number: u64) -> Result<(), StreamError> {
        if self.packets > 0 && number <= self.newest {
            let expected = Expected::Text(alloc::format!("more than {}", self.newest).into());
            let flaw = Flaw::new(24, "packet number", Fault::Repeated, number, expected);
            return Err(flaw.within(Within::Channel, 0));
        }
        self.packets += 1;
        self.newest = number;
        Ok(())
    }
}

/// Channels without marks in the main stream: nothing says which pages belong to which section.
#[cold]
fn unmarked() -> StreamError {
    Flaw::new(
        0,
        "record flags",
        Fault::Unsupported(Feature::Multifd),
        "multifd channels and a main stream that does not wait for them",
        "a primary from QEMU 11.1 on, with a machine type from 8.1 on",
    )
    .within(Within::RamStart, 0)
}
