//! Flushing on a thread of its own: storage may take seconds, and neither a vCPU nor whoever wants the device's lock
//! waits for it.
//!
//! A flush that runs has no place in the device's state: its request stays in the ring until it can be answered, so a
//! machine that is captured or reset meanwhile finds it there, and flushes again.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;

use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;

/// The flushes of one device, one at a time.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    wake: Option<EventFd>,
    thread: Option<Sender<Sender<io::Result<()>>>>,
    running: Option<Receiver<io::Result<()>>>,
}

impl Flusher {
    /// `wake` is written when a flush has ended.
    pub(super) fn connect(&mut self, wake: EventFd) {
        self.wake = Some(wake);
    }

    /// Begins a flush, or says how the one that was begun has ended; `None` while it runs.
    pub(super) fn poll(&mut self, disk: &Arc<Disk>) -> Option<io::Result<()>> {
        let Some(running) = &self.running else {
            return self.begin(disk).err().map(Err);
        };
        let ended = match running.try_recv() {
            Ok(ended) => ended,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err(io::Error::other("the flushing thread is gone")),
        };
        self.running = None;
        Some(ended)
    }

    /// Forgets the flush that runs: the request it was for is not there any more. What it makes durable does not
    /// answer a later request, before which more was written.
    pub(super) fn forget(&mut self) {
        self.running = None;
    }

    fn begin(&mut self, disk: &Arc<Disk>) -> io::Result<()> {
        let (outbox, ended) = channel();
        let thread = match &self.thread {
            Some(thread) => thread,
            None => self.thread.insert(self.spawn(disk)?),
        };
        let gone = |_| io::Error::other("the flushing thread is gone");
        thread.send(outbox).map_err(gone)?;
        self.running = Some(ended);
        Ok(())
    }

    fn spawn(&self, disk: &Arc<Disk>) -> io::Result<Sender<Sender<io::Result<()>>>> {
        let (asked, inbox) = channel::<Sender<io::Result<()>>>();
        let disk = Arc::clone(disk);
        let wake = self.wake.as_ref().map(EventFd::try_clone).transpose()?;
        thread::Builder::new().name("flush".into()).spawn(move || {
            for outbox in inbox {
                // Whoever asked may have been reset.
                let _forgotten = outbox.send(disk.flush());
                if let Some(wake) = &wake {
                    // An error is a full counter: readable as well.
                    let _full = wake.write(1);
                }
            }
        })?;
        Ok(asked)
    }
}
