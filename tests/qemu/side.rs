//! `colod standby` in a thread, and what it says.

use std::{
    ffi::OsString,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use clap::Parser;
use colod::qemu::{
    Stop,
    standby::{self, Event, Outcome, StandbyArgs, StandbyError},
};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    args: StandbyArgs,
}

pub(crate) struct Side {
    stop: Arc<Stop>,
    events: Receiver<Event>,
    thread: Option<JoinHandle<Result<Outcome, StandbyError>>>,
    pub(crate) uri: String,
}

impl Side {
    /// One that listens.
    pub(crate) fn start(arguments: Vec<OsString>) -> Self {
        let mut side = Self::from_state(arguments);
        let Event::Listening { address } = side.next() else {
            panic!("expected to listen first");
        };
        side.uri = address;
        side
    }

    /// One that resumes what is on disk.
    pub(crate) fn from_state(arguments: Vec<OsString>) -> Self {
        let args = Line::try_parse_from(arguments).unwrap().args;
        let stop = Arc::new(Stop::new().unwrap());
        let (tell, events) = channel();
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            standby::run(&args, &asked, &mut |event| {
                // A test that failed does not listen any more.
                let _ = tell.send(event);
            })
        });
        Self {
            stop,
            events,
            thread: Some(thread),
            uri: String::new(),
        }
    }

    pub(crate) fn next(&self) -> Event {
        self.events.recv_timeout(PATIENCE).unwrap()
    }

    /// The next event that is no checkpoint, and the newest checkpoint before it.
    pub(crate) fn after_checkpoints(&self) -> (Event, Option<u64>) {
        let mut newest = None;
        loop {
            match self.next() {
                Event::Whole { epoch, .. } => newest = Some(epoch),
                Event::Protected { .. } => {}
                other => return (other, newest),
            }
        }
    }

    /// What a signal does.
    pub(crate) fn stop(&self) {
        self.stop.ask();
    }

    pub(crate) fn join(self) -> Outcome {
        self.end().unwrap()
    }

    pub(crate) fn end(mut self) -> Result<Outcome, StandbyError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.stop.ask();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
