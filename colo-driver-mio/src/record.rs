//! What this host remembers about ownership, on stable storage (spec ownership A5, 6).
//!
//! A write goes to a spare file, which is synced and exchanged with the record, and the directory is
//! synced: after a crash either the old record is there or the new one. The spare has the record's
//! size and is there before it is needed, so that a disk that fills up later keeps nobody from
//! saying who owns the VM. The directory is locked for as long as the
//! process lives, so that a second instance cannot run on the same record.

use core::time::Duration;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use colo_proto::member::{PersistId, Record, RecordError as BadRecord};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use crate::Wake;

/// Between attempts to write while the file system refuses.
const RETRY: Duration = Duration::from_millis(500);

/// Why a record cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Another process has it.
    #[error("{path}: another colod runs on this state directory")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The record is damaged. Deciding without it could wake a VM twice.
    #[error("{path}: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: BadRecord,
    },
}

/// The record of this host.
#[derive(Debug)]
pub struct RecordStore {
    place: Place,
    writes: Option<Sender<(PersistId, Record)>>,
    done: Option<Receiver<Written>>,
}

enum Place {
    Directory {
        dir: PathBuf,
        /// Held, not read.
        _lock: File,
    },
    Memory(Vec<PersistId>),
    /// Somebody else's storage, until its thread starts.
    Custom(Option<Keeper>),
}

/// Puts a record ([`Record::encode`]) on stable storage: when it returns, a crash leaves this record
/// or a newer one.
pub type Keeper = Box<dyn FnMut(&[u8]) -> io::Result<()> + Send>;

/// What the writer reports.
#[derive(Debug)]
pub(crate) enum Written {
    Done(PersistId),
    Refused(String),
}

impl RecordStore {
    /// Opens and locks the state directory, making it if need be, and reads the record if there
    /// is one.
    ///
    /// # Errors
    /// When another process has it, or it cannot be read. A damaged record is never ignored.
    pub fn open(dir: &Path) -> Result<(Self, Option<Record>), RecordError> {
        let wrong = |path: &Path| {
            let path = path.to_owned();
            move |source| RecordError::Io { path, source }
        };
        make_directory(dir).map_err(wrong(dir))?;
        let path = dir.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(wrong(&path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(RecordError::Locked { path }),
            Err(e) => return Err(wrong(&path)(e.into())),
        }
        let path = dir.join(FILE);
        let record = match fs::read(&path) {
            Ok(bytes) => Some(
                Record::decode(&bytes).map_err(|source| RecordError::Damaged { path, source })?,
            ),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(wrong(&path)(e)),
        };
        let spare = beside(&dir.join(FILE), "spare");
        if !spare.exists() {
            make_spare(&spare, Record::SIZE).map_err(wrong(&spare))?;
        }
        let place = Place::Directory {
            dir: dir.to_owned(),
            _lock: lock,
        };
        Ok((Self::at(place), record))
    }

    /// A record that is forgotten with the process. For tests and demonstrations: a host that
    /// restarts does not know what it was.
    #[must_use]
    pub const fn in_memory() -> Self {
        Self::at(Place::Memory(Vec::new()))
    }

    /// A record on storage of the caller's, called on a thread of its own and again while it
    /// refuses. What an earlier process kept there is read with [`Record::decode`] and given to the
    /// machine; damage is not ignored, and no second process may write there.
    #[must_use]
    pub fn custom(keeper: Keeper) -> Self {
        Self::at(Place::Custom(Some(keeper)))
    }

    const fn at(place: Place) -> Self {
        Self {
            place,
            writes: None,
            done: None,
        }
    }

    /// Starts the writer.
    pub(crate) fn attach(&mut self, wake: Wake) -> io::Result<()> {
        let (what, mut keeper): (_, Keeper) = match &mut self.place {
            Place::Memory(_) => return Ok(()),
            Place::Directory { dir, .. } => {
                let path = dir.join(FILE);
                let what = path.display().to_string();
                (what, Box::new(move |bytes| write_durably(&path, bytes)))
            }
            Place::Custom(keeper) => match keeper.take() {
                Some(keeper) => ("the record".to_owned(), keeper),
                None => return Ok(()),
            },
        };
        let (writes, inbox) = channel();
        let (outbox, done) = channel();
        thread::Builder::new()
            .name("colo-record".to_owned())
            .spawn(move || keep(&what, &mut keeper, &inbox, &outbox, &wake))?;
        self.writes = Some(writes);
        self.done = Some(done);
        Ok(())
    }

    /// Begins a write. Writes take effect in order.
    pub(crate) fn persist(&mut self, id: PersistId, record: Record) {
        match (&mut self.place, &self.writes) {
            (Place::Memory(done), _) => done.push(id),
            (Place::Directory { .. } | Place::Custom(_), Some(writes)) => {
                if writes.send((id, record)).is_err() {
                    tracing::error!("the record's writer is gone; ownership stands still");
                }
            }
            (Place::Directory { .. } | Place::Custom(_), None) => {}
        }
    }

    /// What became durable.
    pub(crate) fn poll(&mut self) -> Option<Written> {
        if let Place::Memory(done) = &mut self.place {
            return (!done.is_empty()).then(|| Written::Done(done.remove(0)));
        }
        self.done.as_ref()?.try_recv().ok()
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory { dir, .. } => f.debug_tuple("Directory").field(dir).finish(),
            Self::Memory(done) => f.debug_tuple("Memory").field(done).finish(),
            Self::Custom(_) => f.write_str("Custom"),
        }
    }
}

/// The name of the file in the state directory.
pub const FILE: &str = "record";

/// The writer's thread: a file system that hangs stops it and not the loop.
fn keep(
    what: &str,
    keeper: &mut Keeper,
    inbox: &Receiver<(PersistId, Record)>,
    outbox: &Sender<Written>,
    wake: &Wake,
) {
    while let Ok((id, record)) = inbox.recv() {
        let mut refused = false;
        while let Err(error) = keeper(&record.encode()) {
            if !refused {
                refused = true;
                let why = format!("{what}: {error}");
                tracing::error!(%why, "the record cannot be written; trying again");
                let _loop_gone = outbox.send(Written::Refused(why));
                wake.wake();
            }
            thread::sleep(RETRY);
        }
        if outbox.send(Written::Done(id)).is_err() {
            return;
        }
        wake.wake();
    }
}

/// Replaces `path` by `bytes` so that a crash leaves the one or the other: a spare of the same size
/// beside it is written, synced, and exchanged with it.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let spare = beside(path, "spare");
    // In place: a file system that is full has the blocks of the spare all the same.
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&spare)?;
    file.write_all(bytes)?;
    file.set_len(bytes.len() as u64)?;
    file.sync_all()?;
    drop(file);
    let exchanged = renameat_with(CWD, &spare, CWD, path, RenameFlags::EXCHANGE);
    if exchanged.is_err() {
        // There is nothing to exchange it with yet, or the file system cannot.
        fs::rename(&spare, path)?;
    }
    sync_name(path)?;
    if exchanged.is_err() {
        // What was to be durable is; whether the next write has room is seen by the next write.
        let _no_room = make_spare(&spare, bytes.len());
    }
    Ok(())
}

/// The file that goes with `path`: its whole name and an ending. Replacing an ending instead would
/// make one file of two where `path` has that ending already.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

/// Makes a directory, and durable that it is there: what is synced in it later would be lost with
/// its name.
fn make_directory(dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = dir
        .ancestors()
        .take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists())
        .collect();
    fs::create_dir_all(dir)?;
    missing.into_iter().rev().try_for_each(sync_name)
}

/// A file of the right size for the next write, made while there is room.
fn make_spare(spare: &Path, len: usize) -> io::Result<()> {
    let mut file = File::create(spare)?;
    file.write_all(&vec![0; len])?;
    file.sync_all()?;
    sync_name(spare)
}

/// Makes it durable which file `path` names.
pub(crate) fn sync_name(path: &Path) -> io::Result<()> {
    // A path of one word has a parent, and that is empty.
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    File::open(dir.unwrap_or_else(|| Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use colo_proto::id::Generation;

    use super::*;

    fn record(generation: u64) -> Record {
        Record {
            generation: Generation(generation),
            ..Record::default()
        }
    }

    #[test]
    fn what_was_written_last_is_read_back_and_leaves_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        for generation in 1..4 {
            write_durably(&path, &record(generation).encode()).unwrap();
        }
        let (_store, read) = RecordStore::open(dir.path()).unwrap();
        assert_eq!(read, Some(record(3)));
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["lock", FILE, "record.spare"]);
    }

    #[test]
    fn a_write_takes_no_room_that_it_had_not_before() {
        use std::os::unix::fs::MetadataExt as _;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let (_store, _) = RecordStore::open(dir.path()).unwrap();
        write_durably(&path, &record(1).encode()).unwrap();
        let spare = beside(&path, "spare");
        let files = || [&path, &spare].map(|path| fs::metadata(path).unwrap().ino());
        let [a, b] = files();
        for generation in 2..5 {
            write_durably(&path, &record(generation).encode()).unwrap();
            let expected = if generation % 2 == 0 { [b, a] } else { [a, b] };
            assert_eq!(files(), expected, "the two files change places");
            assert_eq!(fs::metadata(&spare).unwrap().len(), Record::SIZE as u64);
        }
    }

    #[test]
    fn a_state_directory_is_made_with_the_directories_above_it() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        make_directory(&deep).unwrap();
        assert!(deep.is_dir());
        make_directory(&deep).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        make_directory(&file.join("below")).unwrap_err();
    }

    #[test]
    fn a_file_in_the_working_directory_has_a_name_to_sync() {
        sync_name(Path::new(FILE)).unwrap();
        sync_name(Path::new("/file")).unwrap();
        sync_name(Path::new("not/there")).unwrap_err();
    }

    #[test]
    fn a_second_instance_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (first, _) = RecordStore::open(dir.path()).unwrap();
        let error = RecordStore::open(dir.path()).unwrap_err();
        assert!(matches!(error, RecordError::Locked { .. }), "{error}");
        drop(first);
        RecordStore::open(dir.path()).unwrap();
    }

    #[test]
    fn a_damaged_record_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), b"half").unwrap();
        let error = RecordStore::open(dir.path()).unwrap_err();
        assert!(matches!(error, RecordError::Damaged { .. }), "{error}");
    }
}
