//! Where logs go and how they look.

use std::{
    fs::{File, OpenOptions},
    io::{self, IsTerminal as _, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use crate::config::{Log, LogFormat};
use tracing_subscriber::{Layer, Registry, layer::SubscriberExt as _};

use crate::cli::Failure;

/// Sets logging up as the configuration says; `RUST_LOG` has the last word on levels.
pub(crate) fn start(log: &Log) -> Result<(), Failure> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(directives) => Log::parse(&directives).map_err(|why| format!("RUST_LOG {why}"))?,
        Err(_) => log.filter().map_err(|why| format!("log.level {why}"))?,
    };
    let lines = tracing_subscriber::fmt::layer().with_target(true);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match (&log.file, log.format) {
        (None, LogFormat::Text) => {
            let colours = io::stderr().is_terminal();
            lines.with_ansi(colours).with_writer(io::stderr).boxed()
        }
        (None, LogFormat::Json) => lines.json().with_writer(io::stderr).boxed(),
        (Some(path), format) => {
            let file = LogFile::open(path)
                .map_err(|error| format!("log.file {}: {error}", path.display()))?;
            let _once = FILE.set(file.clone());
            // A full disk makes writes fail; the layer drops those lines and the VM runs on.
            let lines = lines.with_ansi(false).with_writer(move || file.clone());
            match format {
                LogFormat::Text => lines.boxed(),
                LogFormat::Json => lines.json().boxed(),
            }
        }
    };
    tracing::subscriber::set_global_default(Registry::default().with(layer.with_filter(filter)))?;
    Ok(())
}

/// The log file of this process, if it has one.
static FILE: OnceLock<LogFile> = OnceLock::new();

/// Opens the log file anew, under the name that it was configured with: a rotation has given that
/// name to another file.
pub(crate) fn reopen() {
    let Some(file) = FILE.get() else {
        return tracing::info!("HUP: there is no log.file to open anew");
    };
    match file.reopen() {
        Ok(()) => tracing::info!("HUP: the log goes on here"),
        Err(error) => {
            let path = file.path.display();
            tracing::error!(%path, %error, "HUP: log.file cannot be opened anew; the log stays where it was");
        }
    }
}

/// A file that can be exchanged while others write to it.
#[derive(Clone, Debug)]
struct LogFile {
    path: PathBuf,
    file: Arc<Mutex<File>>,
}

impl LogFile {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(Mutex::new(append_to(path)?)),
        })
    }

    fn reopen(&self) -> io::Result<()> {
        let file = append_to(&self.path)?;
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = file;
        Ok(())
    }
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotated_log_goes_on_under_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogFile::open(&path).unwrap();
        log.write_all(b"before\n").unwrap();
        std::fs::rename(&path, dir.path().join("log.1")).unwrap();
        log.write_all(b"between\n").unwrap();
        log.reopen().unwrap();
        log.write_all(b"after\n").unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("log.1"), "before\nbetween\n");
        assert_eq!(read("log"), "after\n");
    }
}
