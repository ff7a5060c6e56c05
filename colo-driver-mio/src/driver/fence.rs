//! Powering the peer off, which takes seconds and is not the loop's to wait for.

use std::{
    io,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::Duration,
};

use crate::Wake;

/// Powers the peer off after a delay; whether it is certainly off now.
pub type Fencer = Box<dyn FnMut(Duration) -> bool + Send>;

/// Requests and their answers. The default is a host that cannot: it says so at once.
#[derive(Debug, Default)]
pub(super) struct Fence {
    thread: Option<(Sender<Duration>, Receiver<bool>)>,
    /// Requests that nobody takes.
    refused: u32,
}

impl Fence {
    pub(super) fn start(mut fencer: Fencer, wake: Wake) -> io::Result<Self> {
        let (requests, inbox) = channel();
        let (outbox, answers) = channel();
        thread::Builder::new()
            .name("colo-fence".to_owned())
            .spawn(move || {
                while let Ok(delay) = inbox.recv() {
                    if outbox.send(fencer(delay)).is_err() {
                        return;
                    }
                    wake.wake();
                }
            })?;
        Ok(Self {
            thread: Some((requests, answers)),
            refused: 0,
        })
    }

    /// Asks; whether the answer comes in the next turn without anybody waking the loop.
    pub(super) fn ask(&mut self, delay: Duration) -> bool {
        let taken = self
            .thread
            .as_ref()
            .is_some_and(|(requests, _)| requests.send(delay).is_ok());
        if !taken {
            self.refused += 1;
        }
        !taken
    }

    pub(super) fn poll(&mut self) -> Option<bool> {
        if self.refused > 0 {
            self.refused -= 1;
            return Some(false);
        }
        self.thread.as_ref()?.1.try_recv().ok()
    }
}
