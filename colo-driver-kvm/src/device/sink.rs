//! Where a console's output goes, and the switch that keeps a secondary silent.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Output of a serial port or a console; clones share destination and switch.
///
/// A secondary runs the same guest as the primary, so what it prints is printed already: its sinks are
/// [muted](Self::set_muted) until it takes over. Muted output is counted and dropped, not kept: nothing of it may
/// appear later.
#[derive(Clone)]
pub struct Sink(Arc<Inner>);

struct Inner {
    out: Mutex<Box<dyn Write + Send>>,
    muted: AtomicBool,
    silenced: AtomicU64,
}

impl Sink {
    /// This process's standard output. Guest output blocks while its reader does.
    #[must_use]
    pub fn stdout() -> Self {
        Self::writer(io::stdout())
    }

    /// A file, appended to, created if it is not there.
    ///
    /// # Errors
    ///
    /// The file cannot be opened for appending.
    pub fn file(path: &Path) -> io::Result<Self> {
        let file = File::options().append(true).create(true).open(path)?;
        Ok(Self::writer(file))
    }

    /// A call for each piece of output, made from vCPU threads under the device's lock: it must not wait for either.
    #[must_use]
    pub fn callback(call: impl FnMut(&[u8]) + Send + 'static) -> Self {
        Self::writer(Callback(call))
    }

    /// Any other writer, under the conditions of [`callback`](Self::callback).
    #[must_use]
    pub fn writer(out: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Inner {
            out: Mutex::new(Box::new(out)),
            muted: AtomicBool::new(false),
            silenced: AtomicU64::new(0),
        }))
    }

    /// Nowhere.
    #[must_use]
    pub fn null() -> Self {
        Self::writer(io::sink())
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
    use std::sync::mpsc;

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
        Sink::file(&path).unwrap().write_all(b"one").unwrap();
        Sink::file(&path).unwrap().write_all(b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"onetwo");
        assert!(Sink::file(dir.path()).is_err());
    }
}
