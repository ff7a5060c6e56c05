//! Where a console's output goes, and the switch that keeps a secondary silent.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Most output that waits for a reader.
const MOST_WAITING: usize = 1 << 20;

/// Output of a serial port or a console; clones share destination and switch.
///
/// A secondary runs the same guest as the primary, so what it prints is printed already: its sinks are
/// [muted](Self::set_muted) until it takes over. Muted output is counted and dropped, not kept: nothing of it may
/// appear later.
#[derive(Clone)]
pub struct Sink(Arc<Inner>);

struct Inner {
    out: Mutex<Box<dyn Write + Send>>,
    queue: Option<Arc<Queue>>,
    muted: AtomicBool,
    silenced: AtomicU64,
}

impl Sink {
    /// This process's standard output, [queued](Self::queued).
    ///
    /// # Errors
    ///
    /// No thread.
    pub fn stdout() -> io::Result<Self> {
        Self::queued(io::stdout())
    }

    /// A file, appended to, created if it is not there, and [queued](Self::queued) for.
    ///
    /// # Errors
    ///
    /// The file cannot be opened for appending, or no thread.
    pub fn file(path: &Path) -> io::Result<Self> {
        Self::queued(File::options().append(true).create(true).open(path)?)
    }

    /// Any writer, on a thread of its own: the guest never waits for it. At most 1 MiB waits; what comes on top is
    /// refused, which the device counts.
    ///
    /// # Errors
    ///
    /// No thread.
    pub fn queued(out: impl Write + Send + 'static) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let writing = queue.clone();
        thread::Builder::new()
            .name("console".into())
            .spawn(move || writing.run(out))?;
        Ok(Self::new(Queued(queue.clone()), Some(queue)))
    }

    /// A call for each piece of output, made from vCPU threads under the device's lock: it must not wait for either.
    #[must_use]
    pub fn callback(call: impl FnMut(&[u8]) + Send + 'static) -> Self {
        Self::writer(Callback(call))
    }

    /// Any other writer, under the conditions of [`callback`](Self::callback).
    #[must_use]
    pub fn writer(out: impl Write + Send + 'static) -> Self {
        Self::new(out, None)
    }

    fn new(out: impl Write + Send + 'static, queue: Option<Arc<Queue>>) -> Self {
        Self(Arc::new(Inner {
            out: Mutex::new(Box::new(out)),
            queue,
            muted: AtomicBool::new(false),
            silenced: AtomicU64::new(0),
        }))
    }

    /// Nowhere.
    #[must_use]
    pub fn null() -> Self {
        Self::writer(io::sink())
    }

    /// Waits until what was printed has been written, but not longer than `patience`. Returns whether it has been.
    #[must_use]
    pub fn drain(&self, patience: Duration) -> bool {
        let queue = self.0.queue.as_ref();
        queue.is_none_or(|queue| queue.drain(patience))
    }

    /// Drops output from now on, or lets it through.
    pub fn set_muted(&self, muted: bool) {
        self.0.muted.store(muted, Ordering::Release);
    }

    /// Whether output is dropped.
    #[must_use]
    pub fn is_muted(&self) -> bool {
        self.0.muted.load(Ordering::Acquire)
    }

    /// Bytes dropped because of muting, since creation.
    #[must_use]
    pub fn silenced(&self) -> u64 {
        self.0.silenced.load(Ordering::Relaxed)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_muted() {
            let count = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            self.0.silenced.fetch_add(count, Ordering::Relaxed);
            return Ok(bytes.len());
        }
        self.0
            .out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.is_muted() {
            return Ok(());
        }
        self.0
            .out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .flush()
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sink")
            .field("muted", &self.is_muted())
            .field("silenced", &self.silenced())
            .finish_non_exhaustive()
    }
}

/// Output between the guest and a thread that writes it.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// The thread has taken bytes and not written them yet.
    writing: bool,
    ended: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut out: impl Write) {
        let (mut bytes, mut told) = (Vec::new(), false);
        loop {
            let mut waiting = self
                .changed
                .wait_while(self.lock(), |waiting| {
                    waiting.bytes.is_empty() && !waiting.ended
                })
                .unwrap_or_else(PoisonError::into_inner);
            if waiting.bytes.is_empty() {
                return;
            }
            std::mem::swap(&mut waiting.bytes, &mut bytes);
            waiting.writing = true;
            drop(waiting);
            let written = out.write_all(&bytes).and_then(|()| out.flush());
            bytes.clear();
            if let Err(error) = written
                && !std::mem::replace(&mut told, true)
            {
                tracing::warn!(%error, "output of the guest's console is lost");
            }
            self.lock().writing = false;
            self.changed.notify_all();
        }
    }

    fn drain(&self, patience: Duration) -> bool {
        let (_drained, late) = self
            .changed
            .wait_timeout_while(self.lock(), patience, |waiting| {
                waiting.writing || !waiting.bytes.is_empty()
            })
            .unwrap_or_else(PoisonError::into_inner);
        !late.timed_out()
    }
}

/// The guest's end of a queue.
struct Queued(Arc<Queue>);

impl Write for Queued {
    /// All of `bytes` or nothing.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut waiting = self.0.lock();
        if waiting.bytes.len() + bytes.len() > MOST_WAITING {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        waiting.bytes.extend_from_slice(bytes);
        self.0.changed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

struct Callback<F>(F);

impl<F: FnMut(&[u8])> Write for Callback<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.0)(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::sync::mpsc;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn what_is_written_while_muted_never_comes_out() {
        let (tx, rx) = mpsc::channel();
        let sink = Sink::callback(move |bytes| tx.send(bytes.to_vec()).unwrap());
        let mut out = sink.clone();
        out.write_all(b"a").unwrap();
        sink.set_muted(true);
        out.write_all(b"bcd").unwrap();
        out.flush().unwrap();
        sink.set_muted(false);
        out.write_all(b"e").unwrap();
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), [b"a", b"e"]);
        assert_eq!(sink.silenced(), 3);
    }

    #[test]
    fn a_file_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        for text in [b"one", b"two"] {
            let mut sink = Sink::file(&path).unwrap();
            sink.write_all(text).unwrap();
            assert!(sink.drain(PATIENCE));
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"onetwo");
        assert!(Sink::file(dir.path()).is_err());
    }

    #[test]
    fn a_reader_that_stalls_costs_the_guest_output_and_no_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, 0o600.into(), 0).unwrap();
        // For writing too: so neither end waits for the other to be opened.
        let mut reader = File::options().read(true).write(true).open(&path).unwrap();
        let mut sink = Sink::file(&path).unwrap();
        let piece = [b'x'; 1024];
        let taken = (0..4096)
            .take_while(|_| sink.write_all(&piece).is_ok())
            .count();
        assert!(taken >= MOST_WAITING / piece.len(), "{taken}");
        assert!(!sink.drain(Duration::ZERO));
        // It reads again: all that was taken comes, and what is printed from now on.
        let mut got = vec![0; taken * piece.len()];
        reader.read_exact(&mut got).unwrap();
        assert!(sink.drain(PATIENCE));
        sink.write_all(b"y").unwrap();
        drop(sink);
        reader.read_exact(&mut got[..1]).unwrap();
        assert_eq!(got[0], b'y');
    }
}
