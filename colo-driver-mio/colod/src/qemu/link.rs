//! One link to a QEMU primary: bytes in, pages to memory, replies out.

use std::{
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    time::Duration,
};

use colo_proto::{
    id::Epoch,
    qemu::{
        Demand, Expectation, Generation, Limits, Message, PageRecord,
        session::{Action, Lost, Patience, Phase, Standby, State},
    },
    time::Instant,
};

use super::{
    address::Stream,
    image::{Image, PAGE, Staging},
    lobby::{Lobby, Visitor},
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

/// What the link tells while it lasts.
#[derive(Debug)]
pub(super) enum Told<'a> {
    /// A state is whole.
    Kept(Kept<'a>),
    /// The first checkpoint was asked for.
    Began {
        /// By which version's rules.
        generation: Option<Generation>,
        /// How many multifd channels there are.
        channels: usize,
    },
}

/// What the link is told once.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) limits: Limits,
    pub(super) expect: Expectation,
    pub(super) patience: Patience,
}

/// One connection of the link, and what was read of it and could not be taken yet.
#[derive(Debug)]
struct Pipe {
    stream: Stream,
    left: Vec<u8>,
    /// Whether more may come.
    open: bool,
    /// Where the bytes of its page go in the staging area.
    staged: usize,
}

impl Pipe {
    fn new(visitor: Visitor) -> Self {
        Self {
            stream: visitor.stream,
            left: visitor.first,
            open: true,
            staged: 0,
        }
    }
}

pub(super) struct Link<'a> {
    /// The main stream, then the multifd channels.
    pipes: Vec<Pipe>,
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
    /// Whether it was told that COLO has begun.
    began: bool,
}

impl<'a> Link<'a> {
    pub(super) fn new(primary: Visitor, terms: Terms, clock: Clock, stop: &'a Stop) -> Self {
        Self {
            pipes: vec![Pipe::new(primary)],
            clock,
            stop,
            standby: Standby::new(clock.now(), terms.limits, terms.expect, terms.patience),
            coming: None,
            staging: Staging::default(),
            standing: None,
            whole: None,
            held: None,
            began: false,
        }
    }

    /// Serves the link to its end. `told` hears of each checkpoint after it is answered and
    /// committed. Gives back what this link brought, if it ever was whole.
    pub(super) fn serve(
        mut self,
        lobby: &mut Lobby,
        mut told: impl FnMut(Told<'_>) -> io::Result<()>,
    ) -> io::Result<(End, Option<Held>)> {
        let mut buffer = vec![0; READ];
        // How long the newest bytes kept this side: a primary that waits for it is not silent.
        let mut busy = Duration::ZERO;
        let lost = loop {
            let arrived = self.clock.now();
            let moved = self.turn(lobby, &mut buffer, arrived, &mut told);
            match moved {
                Ok(true) => busy = self.clock.now().since(arrived),
                Ok(false) => {}
                Err(Broken::Lost(lost)) => break lost,
                Err(Broken::Reply(e)) => {
                    tracing::info!("the link to the primary broke: {e}");
                    break self.standby.handle_closed();
                }
                Err(Broken::Memory(e)) => return Ok((End::Refused(e), self.held)),
                Err(Broken::Own(e)) => return Err(e),
            }
            let again = (0..self.pipes.len()).any(|which| {
                self.wants(which) && self.pipes.get(which).is_some_and(|p| !p.left.is_empty())
            });
            let deadline = if again {
                Some(arrived)
            } else {
                self.standby.poll_timeout().map(|at| at + busy)
            };
            match self.wait(lobby, deadline)? {
                Woken::Stop => return Ok((End::Stopped, self.held)),
                Woken::Deadline if again => {}
                Woken::Deadline => {
                    if let Err(lost) = self.standby.handle_timeout(self.clock.now()) {
                        break lost;
                    }
                }
                Woken::Ready => {}
            }
        };
        let owner = self.standby.take_over(self.clock.now(), &lost);
        Ok((End::Lost(lost, owner), self.held))
    }

    /// Waits for the connections that the stream goes on with. Channels are made in the migration
    /// only.
    fn wait(&self, lobby: &Lobby, deadline: Option<Instant>) -> io::Result<Woken> {
        for pipe in &self.pipes {
            // A connection that is broken says so at the next read.
            let _ = pipe.stream.acknowledge_at_once();
        }
        let wanted = (0..self.pipes.len()).filter(|&which| self.wants(which));
        let wanted = wanted.filter_map(|which| self.pipes.get(which));
        let wanted = wanted.map(|pipe| pipe.stream.as_fd());
        let visitors = (self.standby.phase() == Phase::Migrating).then(|| lobby.fds());
        let all = wanted.chain(visitors.into_iter().flatten());
        self.clock.wait_any(all, deadline, self.stop)
    }

    fn demand(&self, which: usize) -> Demand {
        match which.checked_sub(1) {
            None => self.standby.demand(),
            Some(channel) => self.standby.channel_demand(channel),
        }
    }

    /// Whether bytes of a connection can be taken now.
    fn wants(&self, which: usize) -> bool {
        let demand = self.demand(which);
        let open = self.pipes.get(which).is_some_and(|pipe| pipe.open);
        open && (demand.place.is_some() || demand.then > 0)
    }

    /// Reads what is there, of every connection that is wanted. Whether anything was.
    fn turn(
        &mut self,
        lobby: &mut Lobby,
        buffer: &mut [u8],
        arrived: Instant,
        told: &mut impl FnMut(Told<'_>) -> io::Result<()>,
    ) -> Result<bool, Broken> {
        if self.standby.phase() == Phase::Migrating {
            lobby.look(arrived).map_err(Broken::Own)?;
            while let Some(channel) = lobby.channel() {
                self.standby.open_channel(arrived)?;
                self.pipes.push(Pipe::new(channel));
            }
        }
        let mut moved = false;
        for which in 0..self.pipes.len() {
            if !self.wants(which) {
                continue;
            }
            let Some(pipe) = self.pipes.get_mut(which) else {
                continue;
            };
            let left = std::mem::take(&mut pipe.left);
            let bytes = if left.is_empty() {
                match (&pipe.stream).read(buffer) {
                    Ok(0) => {
                        pipe.open = false;
                        moved = true;
                        continue;
                    }
                    Ok(n) => buffer.get(..n).unwrap_or_default(),
                    Err(e) if retry(&e) => continue,
                    Err(e) => {
                        tracing::info!("a connection of the link broke: {e}");
                        pipe.open = false;
                        moved = true;
                        continue;
                    }
                }
            } else {
                &left[..]
            };
            let length = bytes.len();
            let rest = self.take(which, bytes, arrived, told)?;
            moved |= rest < length;
            let rest = bytes.get(length - rest..).unwrap_or_default().to_vec();
            if let Some(pipe) = self.pipes.get_mut(which) {
                pipe.left = rest;
            }
        }
        // A channel's end counts once it is missed: the main stream may have a whole checkpoint.
        let main = self.pipes.first().is_some_and(|pipe| pipe.open);
        let missed = |which: usize| {
            let demand = self.demand(which);
            demand.place.is_some() || demand.then > 0
        };
        let channel_missed = (1..self.pipes.len())
            .any(|which| self.pipes.get(which).is_some_and(|p| !p.open) && missed(which));
        if !main || (channel_missed && self.standby.demand().then == 0) {
            return Err(Broken::Lost(self.standby.handle_closed()));
        }
        Ok(moved)
    }

    /// Takes bytes of a connection; gives back how many have to wait.
    fn take(
        &mut self,
        which: usize,
        mut input: &[u8],
        arrived: Instant,
        told: &mut impl FnMut(Told<'_>) -> io::Result<()>,
    ) -> Result<usize, Broken> {
        loop {
            while let Some(place) = self.demand(which).place {
                if input.is_empty() {
                    return Ok(0);
                }
                let n = input.len().min(PAGE - place.skip);
                let (now, rest) = input.split_at(n);
                let staged = self.pipes.get(which).map_or(0, |pipe| pipe.staged);
                let page = match (self.standby.phase(), &mut self.coming) {
                    (Phase::Migrating, Some(image)) => image.page_mut(place.page),
                    _ => self.staging.page_mut(staged),
                };
                if let Some(into) = page.get_mut(place.skip..place.skip + n) {
                    into.copy_from_slice(now);
                }
                let placed = match which.checked_sub(1) {
                    None => self.standby.handle_placed(arrived, n),
                    Some(channel) => self.standby.handle_channel_placed(arrived, channel, n),
                };
                placed.map_err(|e| Broken::Own(io::Error::other(e)))?;
                input = rest;
            }
            let taken = match which.checked_sub(1) {
                None => self.standby.handle_bytes(arrived, &mut input)?,
                Some(channel) => self
                    .standby
                    .handle_channel_bytes(arrived, channel, &mut input)?,
            };
            if self.standby.phase() == Phase::Receiving {
                self.standing.get_or_insert(arrived);
            }
            match taken {
                Some(action) => self.act(which, action, arrived, told)?,
                None if self.demand(which).place.is_none() => return Ok(input.len()),
                None => {}
            }
        }
    }

    fn act(
        &mut self,
        which: usize,
        action: Action,
        arrived: Instant,
        told: &mut impl FnMut(Told<'_>) -> io::Result<()>,
    ) -> Result<(), Broken> {
        match action {
            Action::Prepare(table) => {
                self.coming = Some(Image::new(&table).map_err(Broken::Memory)?);
            }
            Action::Page(record) => self.page(which, record),
            Action::Whole(state) => self.whole = Some(state),
            Action::Send(messages) => {
                let sent = self.send(&Message::encode_all(&messages));
                let answered = self.clock.now().since(arrived);
                if let Some(state) = self.whole.take() {
                    let standing = self.standing.take();
                    let came = standing.map_or(Duration::ZERO, |since| arrived.since(since));
                    // The primary's guest runs again; what is whole is committed meanwhile, also
                    // if the reply was not taken.
                    self.commit(state, came, answered, told)
                        .map_err(Broken::Own)?;
                }
                sent?;
                if self.standby.began() && !self.began {
                    self.began = true;
                    let began = Told::Began {
                        generation: self.standby.generation(),
                        channels: self.standby.channels(),
                    };
                    told(began).map_err(Broken::Own)?;
                }
            }
            other => return Err(Broken::Own(io::Error::other(format!("unknown {other:?}")))),
        }
        Ok(())
    }

    fn page(&mut self, which: usize, record: PageRecord) {
        match (self.standby.phase(), &mut self.coming) {
            (Phase::Migrating, Some(image)) if record.zero => image.zero(record.run()),
            (Phase::Migrating, _) => {}
            _ => {
                let staged = self.staging.push(record);
                if let Some(pipe) = self.pipes.get_mut(which) {
                    pipe.staged = staged;
                }
            }
        }
    }

    fn commit(
        &mut self,
        state: State,
        came: Duration,
        answered: Duration,
        told: &mut impl FnMut(Told<'_>) -> io::Result<()>,
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
            told(Told::Kept(Kept {
                held,
                changed,
                came,
                answered,
                offset: self.standby.offset(),
            }))?;
        }
        self.staging.clear();
        Ok(())
    }

    /// Writes a few bytes; they fit any socket whose peer reads.
    fn send(&mut self, mut bytes: &[u8]) -> Result<(), Broken> {
        let Some(main) = self.pipes.first() else {
            return Ok(());
        };
        while !bytes.is_empty() {
            match (&main.stream).write(bytes) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let deadline = self.standby.poll_timeout();
                    let woken = self
                        .clock
                        .wait(main.stream.as_fd(), true, deadline, self.stop)
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
