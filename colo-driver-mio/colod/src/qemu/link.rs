//! One link to a QEMU primary: bytes in, pages to memory, replies out.

use std::{
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    time::Duration,
};

use colo_proto::{
    id::Epoch,
    qemu::{
        Expectation, Limits, Message, PageRecord,
        session::{Action, Lost, Patience, Phase, Standby, State},
    },
    time::Instant,
};

use super::{
    address::Stream,
    image::{Image, PAGE, Staging},
    wait::{Clock, Stop, Woken},
};

/// Read at once; small enough that its pages are still in the cache when they are copied on.
const READ: usize = 256 << 10;

/// The newest whole state and its RAM.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) state: State,
    pub(super) image: Image,
}

/// How a link ended.
#[derive(Debug)]
pub(super) enum End {
    /// Why, and the epoch that this side is the VM from now, if it is.
    Lost(Lost, Option<Epoch>),
    /// No memory for what it announces.
    Refused(io::Error),
    Stopped,
}

/// A checkpoint that is whole, answered and committed.
#[derive(Debug)]
pub(super) struct Kept<'a> {
    pub(super) held: &'a Held,
    /// Its pages; empty for the initial migration.
    pub(super) changed: &'a Staging,
    /// From VMSTATE_SEND, when the primary stands, to the arrival of its last byte.
    pub(super) came: Duration,
    /// From the arrival of its last byte to the reply being on its way.
    pub(super) answered: Duration,
    /// Bytes of the link so far.
    pub(super) offset: u64,
}

/// What the link is told once.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) limits: Limits,
    pub(super) expect: Expectation,
    pub(super) patience: Patience,
}

pub(super) struct Link<'a> {
    stream: Stream,
    clock: Clock,
    stop: &'a Stop,
    standby: Standby,
    /// RAM of the initial migration, until it is whole.
    coming: Option<Image>,
    staging: Staging,
    /// When VMSTATE_SEND came.
    standing: Option<Instant>,
    whole: Option<State>,
    held: Option<Held>,
}

impl<'a> Link<'a> {
    pub(super) fn new(stream: Stream, terms: Terms, clock: Clock, stop: &'a Stop) -> Self {
        Self {
            stream,
            clock,
            stop,
            standby: Standby::new(clock.now(), terms.limits, terms.expect, terms.patience),
            coming: None,
            staging: Staging::default(),
            standing: None,
            whole: None,
            held: None,
        }
    }

    /// Serves the link to its end. `kept` is called after each checkpoint is answered and
    /// committed. Gives back what this link brought, if it ever was whole.
    pub(super) fn serve(
        mut self,
        mut kept: impl FnMut(Kept<'_>) -> io::Result<()>,
    ) -> io::Result<(End, Option<Held>)> {
        let mut buffer = vec![0; READ];
        // How long the newest bytes kept this side: a primary that waits for it is not silent.
        let mut busy = Duration::ZERO;
        let lost = loop {
            // A connection that is broken says so at the next read.
            let _ = self.stream.acknowledge_at_once();
            let deadline = self.standby.poll_timeout().map(|at| at + busy);
            match self
                .clock
                .wait(self.stream.as_fd(), false, deadline, self.stop)?
            {
                Woken::Stop => return Ok((End::Stopped, self.held)),
                Woken::Deadline => {
                    if let Err(lost) = self.standby.handle_timeout(self.clock.now()) {
                        break lost;
                    }
                    continue;
                }
                Woken::Ready => {}
            }
            let read = match (&self.stream).read(&mut buffer) {
                Ok(0) => break self.standby.handle_closed(),
                Ok(n) => buffer.get(..n).unwrap_or_default(),
                Err(e) if retry(&e) => continue,
                Err(e) => {
                    tracing::info!("the link to the primary broke: {e}");
                    break self.standby.handle_closed();
                }
            };
            let arrived = self.clock.now();
            match self.take(read, arrived, &mut kept) {
                Ok(()) => busy = self.clock.now().since(arrived),
                Err(Broken::Lost(lost)) => break lost,
                Err(Broken::Reply(e)) => {
                    tracing::info!("the primary did not take a reply: {e}");
                    break self.standby.handle_closed();
                }
                Err(Broken::Memory(e)) => return Ok((End::Refused(e), self.held)),
                Err(Broken::Own(e)) => return Err(e),
            }
        };
        let owner = self.standby.take_over(self.clock.now(), &lost);
        Ok((End::Lost(lost, owner), self.held))
    }

    fn take(
        &mut self,
        mut input: &[u8],
        arrived: Instant,
        kept: &mut impl FnMut(Kept<'_>) -> io::Result<()>,
    ) -> Result<(), Broken> {
        loop {
            while let Some(place) = self.standby.demand().place {
                if input.is_empty() {
                    return Ok(());
                }
                let n = input.len().min(PAGE - place.skip);
                let (now, rest) = input.split_at(n);
                let page = match (self.standby.phase(), &mut self.coming) {
                    (Phase::Migrating, Some(image)) => image.page_mut(place.page),
                    _ => self.staging.last_mut(),
                };
                if let Some(into) = page.get_mut(place.skip..place.skip + n) {
                    into.copy_from_slice(now);
                }
                self.standby
                    .handle_placed(arrived, n)
                    .map_err(|e| Broken::Own(io::Error::other(e)))?;
                input = rest;
            }
            let taken = self.standby.handle_bytes(arrived, &mut input)?;
            if self.standby.phase() == Phase::Receiving {
                self.standing.get_or_insert(arrived);
            }
            match taken {
                Some(action) => self.act(action, arrived, kept)?,
                None if input.is_empty() && self.standby.demand().place.is_none() => return Ok(()),
                None => {}
            }
        }
    }

    fn act(
        &mut self,
        action: Action,
        arrived: Instant,
        kept: &mut impl FnMut(Kept<'_>) -> io::Result<()>,
    ) -> Result<(), Broken> {
        match action {
            Action::Prepare(table) => {
                self.coming = Some(Image::new(&table).map_err(Broken::Memory)?);
            }
            Action::Page(record) => self.page(record),
            Action::Whole(state) => self.whole = Some(state),
            Action::Send(messages) => {
                let sent = self.send(&Message::encode_all(&messages));
                let answered = self.clock.now().since(arrived);
                if let Some(state) = self.whole.take() {
                    let standing = self.standing.take();
                    let came = standing.map_or(Duration::ZERO, |since| arrived.since(since));
                    // The primary's guest runs again; what is whole is committed meanwhile, also
                    // if the reply was not taken.
                    self.commit(state, came, answered, kept)
                        .map_err(Broken::Own)?;
                }
                sent?;
            }
            other => return Err(Broken::Own(io::Error::other(format!("unknown {other:?}")))),
        }
        Ok(())
    }

    fn page(&mut self, record: PageRecord) {
        match (self.standby.phase(), &mut self.coming) {
            (Phase::Migrating, Some(image)) if record.zero => image.zero(record.run()),
            (Phase::Migrating, _) => {}
            _ => self.staging.push(record),
        }
    }

    fn commit(
        &mut self,
        state: State,
        came: Duration,
        answered: Duration,
        kept: &mut impl FnMut(Kept<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let changed = match (self.coming.take(), &mut self.held) {
            (Some(image), held) => {
                *held = Some(Held { state, image });
                &self.staging
            }
            (None, Some(held)) => {
                held.state = state;
                self.staging.commit(&mut held.image);
                &self.staging
            }
            (None, None) => return Err(io::Error::other("a checkpoint without a migration")),
        };
        if let Some(held) = &self.held {
            kept(Kept {
                held,
                changed,
                came,
                answered,
                offset: self.standby.offset(),
            })?;
        }
        self.staging.clear();
        Ok(())
    }

    /// Writes a few bytes; they fit any socket whose peer reads.
    fn send(&mut self, mut bytes: &[u8]) -> Result<(), Broken> {
        while !bytes.is_empty() {
            match (&self.stream).write(bytes) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let deadline = self.standby.poll_timeout();
                    let woken = self
                        .clock
                        .wait(self.stream.as_fd(), true, deadline, self.stop)
                        .map_err(Broken::Own)?;
                    if woken != Woken::Ready {
                        return Err(Broken::Reply(io::ErrorKind::TimedOut.into()));
                    }
                }
                Err(e) if retry(&e) => {}
                Err(e) => return Err(Broken::Reply(e)),
            }
        }
        Ok(())
    }
}

/// Why bytes could not be taken.
enum Broken {
    Lost(Lost),
    /// The reply could not be sent: the primary is gone.
    Reply(io::Error),
    /// The system refuses the memory that the primary announces.
    Memory(io::Error),
    /// This side's own failure.
    Own(io::Error),
}

impl From<Lost> for Broken {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

fn retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
