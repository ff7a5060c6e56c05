//! A machine in a file: the sections of a checkpoint and every page that is not zero.
//!
//! ```text
//!   "colosnap" | format: u16 | length of state: u64 | CRC-32C of these: u32
//!   state (its sections have their own CRCs)
//!   extent*: slot: u16 | first page: u64 | pages: u32 (1..=256) | CRC-32C of these and the bytes: u32 | bytes
//!   end:     0xffff: u16 | pages in all: u64 | 0: u32 | CRC-32C of these: u32
//! ```
//!
//! All little-endian. Disks are slots and are in the file too: a machine whose disk went on without
//! it is no machine. The file appears under its name when it is whole and on the disk, not before.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use colo_proto::id::{PageRun, Slot};
use colo_proto::ram::PageSet;

use crate::capture::{Span, for_each_run};
use crate::memory::{Memory, MemoryError, PAGE_SIZE};
use crate::state::{ApplyError, StateError};
use crate::vm::{LoadStateError, Vm, VmError};

const MAGIC: &[u8; 8] = b"colosnap";
const FORMAT: u16 = 1;
const HEAD: usize = 22;
const EXTENT: usize = 18;
/// Longest state: a bound on what a damaged length can make us allocate.
const MOST_STATE: u64 = 64 << 20;
/// Most pages of an extent.
const MOST_PAGES: u32 = 256;
/// Slot number of the end mark.
const END: u16 = u16::MAX;

/// Why a snapshot was not written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The file system refused.
    #[error("{}: {what}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Not a file that may be replaced.
    #[error("{} is {what}: only a regular file is replaced; give another name", path.display())]
    NotAFile {
        /// What is at that name.
        path: PathBuf,
        /// Its kind.
        what: &'static str,
    },
    /// Another kind of file.
    #[error("{} is not a snapshot: it begins with {got:02x?}, expected \"colosnap\"", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        got: Vec<u8>,
    },
    /// Written by a later release.
    #[error("{}: snapshot format {got} is newer than {FORMAT}, the newest known here; update this host", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        got: u16,
    },
    /// Cut or changed.
    #[error("{} is damaged at byte {at}: {what}; use another copy", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        at: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// A good snapshot of another machine, or damage within a section.
    #[error("{}: {source}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: StateError,
    },
    /// This machine could not be read.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Memory could not be read or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel refused a checked state: the machine must not run.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

impl Vm {
    /// Writes the machine to `path`. It is paused and stays so. Only a regular file is replaced: a
    /// device, a socket or a symbolic link (whose target would stay as it was) is refused.
    ///
    /// # Errors
    ///
    /// [`SnapshotError`]; an older file of that name is untouched then.
    pub fn save(&mut self, path: &Path) -> Result<(), SnapshotError> {
        replaceable(path)?;
        let mut state = Vec::new();
        self.save_state(&mut state)?;
        let temporary = beside(path);
        let at = |what| {
            move |source| SnapshotError::File {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let written = File::create(&temporary)
            .map_err(at("create"))
            .and_then(|file| {
                let mut out = BufWriter::with_capacity(1 << 20, file);
                write_all(&self.memory, &state, &mut out, path)?;
                let file = out.into_inner().map_err(|e| at("write")(e.into_error()))?;
                file.sync_all().map_err(at("write to the disk"))
            })
            .and_then(|()| fs::rename(&temporary, path).map_err(at("rename into place")))
            .and_then(|()| sync_directory(path).map_err(at("write the directory to the disk")));
        if written.is_err() {
            // What is left of it is of no use; if it cannot be removed either, so be it.
            let _left = fs::remove_file(&temporary);
        }
        written
    }

    /// Makes the machine what the file says. The whole file is read and checked before anything is
    /// touched; the machine is paused then, and stays so.
    ///
    /// # Errors
    ///
    /// [`SnapshotError`]; but for `Memory` and `Apply`, and a disk that changes between the two
    /// readings, the machine is as it was and runs on if it ran.
    pub fn restore(&mut self, path: &Path) -> Result<(), SnapshotError> {
        let mut buffer = Vec::new();
        let mut file = Reader::open(path)?;
        let state = file.state()?;
        self.check_state(&state)
            .map_err(|source| SnapshotError::State {
                path: path.to_owned(),
                source,
            })?;
        let begin = file.at;
        while let Some(run) = file.extent(&mut buffer)? {
            if self.memory.slot_of(&run).is_err() {
                return Err(file.damaged("an extent lies outside of this machine's memory"));
            }
        }

        self.pause();
        file.rewind(begin)?;
        let mut written = PageSet::new(&self.memory.shape());
        for slot in self.memory.slots() {
            slot.discard();
        }
        while let Some(run) = file.extent(&mut buffer)? {
            let slot = self.memory.slot_of(&run)?;
            slot.write(run.first, Span::of(&mut buffer))?;
            written.insert(run);
        }
        zero_disks(&self.memory, &written)?;
        // None of that is in a log.
        let mut all = written;
        all.fill();
        self.dirty.owe(&all);
        self.load_state(&state).map_err(|error| match error {
            LoadStateError::Refused(source) => SnapshotError::State {
                path: path.to_owned(),
                source,
            },
            LoadStateError::Failed(error) => SnapshotError::Apply(error),
        })?;
        // The guest was here before.
        Ok(self.next_generation()?)
    }
}

/// Renaming replaces whatever has the name, devices and sockets too.
fn replaceable(path: &Path) -> Result<(), SnapshotError> {
    let what = match fs::symlink_metadata(path).map(|meta| meta.file_type()) {
        Ok(kind) if kind.is_symlink() => "a symbolic link",
        Ok(kind) if kind.is_dir() => "a directory",
        Ok(kind) if !kind.is_file() => "a device, socket or pipe",
        // What else is wrong with the name is told by the creation beside it.
        _ => return Ok(()),
    };
    Err(SnapshotError::NotAFile {
        path: path.to_owned(),
        what,
    })
}

fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.part", std::process::id()));
    path.with_file_name(name)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    File::open(parent.unwrap_or_else(|| Path::new(".")))?.sync_all()
}

fn write_all(
    memory: &Memory,
    state: &[u8],
    out: &mut impl Write,
    path: &Path,
) -> Result<(), SnapshotError> {
    let mut put = |bytes: &[u8]| {
        out.write_all(bytes).map_err(|source| SnapshotError::File {
            path: path.to_owned(),
            what: "write",
            source,
        })
    };
    let mut head = MAGIC.to_vec();
    head.extend_from_slice(&FORMAT.to_le_bytes());
    head.extend_from_slice(&(state.len() as u64).to_le_bytes());
    head.extend_from_slice(&crc32c::crc32c(&head).to_le_bytes());
    put(&head)?;
    put(state)?;

    let mut pages = 0;
    let mut buffer = vec![0; MOST_PAGES as usize * PAGE_SIZE];
    for slot in memory.slots() {
        let mut first = 0;
        while first < slot.pages {
            let count = u32::try_from(slot.pages - first).map_or(MOST_PAGES, |n| n.min(MOST_PAGES));
            let bytes = buffer
                .get_mut(..count as usize * PAGE_SIZE)
                .unwrap_or_default();
            slot.read(first, Span::of(bytes))?;
            let mut used = [0u64; MOST_PAGES as usize / 64];
            for (n, page) in bytes.chunks(PAGE_SIZE).enumerate() {
                if let (false, Some(word)) = (is_zero(page), used.get_mut(n / 64)) {
                    *word |= 1 << (n % 64);
                }
            }
            for_each_run(&used, |at, count| {
                let begin = usize::try_from(at).unwrap_or(0) * PAGE_SIZE;
                let content = bytes
                    .get(begin..begin + count as usize * PAGE_SIZE)
                    .unwrap_or_default();
                put(&extent_head(slot.slot.0, first + at, count, content))?;
                pages += u64::from(count);
                put(content)
            })?;
            first += u64::from(count);
        }
    }
    put(&extent_head(END, pages, 0, &[]))
}

fn extent_head(slot: u16, first: u64, pages: u32, content: &[u8]) -> [u8; EXTENT] {
    let mut head = [0; EXTENT];
    let fields = slot
        .to_le_bytes()
        .into_iter()
        .chain(first.to_le_bytes())
        .chain(pages.to_le_bytes());
    for (to, from) in head.iter_mut().zip(fields) {
        *to = from;
    }
    let (fields, sum) = head.split_at_mut(EXTENT - 4);
    let crc = crc32c::crc32c_append(crc32c::crc32c(fields), content);
    sum.copy_from_slice(&crc.to_le_bytes());
    head
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && rest.iter().all(|b| *b == 0)
}

/// Pages of disks that the file does not have are zero. (RAM was discarded, which is zero.)
fn zero_disks(memory: &Memory, written: &PageSet) -> Result<(), MemoryError> {
    let mut page = vec![0; PAGE_SIZE];
    for slot in memory.slots().iter().filter(|s| s.is_store()) {
        let words = written.words(slot.slot).unwrap_or_default();
        for first in 0..slot.pages {
            let word = usize::try_from(first / 64).ok().and_then(|n| words.get(n));
            if word.is_some_and(|w| w >> (first % 64) & 1 == 1) {
                continue;
            }
            slot.read(first, Span::of(&mut page))?;
            if !is_zero(&page) {
                page.fill(0);
                slot.write(first, Span::of(&mut page))?;
            }
        }
    }
    Ok(())
}

struct Reader<'a> {
    path: &'a Path,
    file: BufReader<File>,
    at: u64,
    state_len: u64,
    pages: u64,
    last: Option<(u16, u64)>,
}

impl<'a> Reader<'a> {
    fn open(path: &'a Path) -> Result<Self, SnapshotError> {
        let file = File::open(path).map_err(|source| SnapshotError::File {
            path: path.to_owned(),
            what: "open",
            source,
        })?;
        let mut reader = Self {
            path,
            file: BufReader::with_capacity(1 << 20, file),
            at: 0,
            state_len: 0,
            pages: 0,
            last: None,
        };
        let mut head = [0; HEAD];
        let mut got = 0;
        // A file shorter than a head is more likely foreign than cut: look at what there is.
        while let Some(rest) = head.get_mut(got..).filter(|rest| !rest.is_empty()) {
            let n = reader
                .file
                .read(rest)
                .map_err(|source| reader.failed(source))?;
            if n == 0 {
                break;
            }
            got += n;
        }
        if !head.starts_with(MAGIC) {
            return Err(SnapshotError::Foreign {
                path: path.to_owned(),
                got: head.get(..got.min(8)).unwrap_or_default().into(),
            });
        }
        let (fields, sum) = head.split_at(HEAD - 4);
        let mut fields_at = fields.iter().skip(MAGIC.len()).copied();
        let mut next = |n: usize| {
            (0..n).fold(0u64, |v, i| {
                v | u64::from(fields_at.next().unwrap_or(0)) << (8 * i)
            })
        };
        let format = u16::try_from(next(2)).unwrap_or(u16::MAX);
        reader.state_len = next(8);
        if got < HEAD || crc32c::crc32c(fields).to_le_bytes() != sum {
            return Err(reader.damaged("its head is cut or its checksum wrong"));
        }
        if format > FORMAT {
            return Err(SnapshotError::Newer {
                path: path.to_owned(),
                got: format,
            });
        }
        if reader.state_len > MOST_STATE {
            return Err(reader.damaged("its state claims to be longer than 64 MiB"));
        }
        reader.at = HEAD as u64;
        Ok(reader)
    }

    fn state(&mut self) -> Result<Vec<u8>, SnapshotError> {
        let mut state = vec![0; usize::try_from(self.state_len).unwrap_or(0)];
        self.fill(&mut state)?;
        Ok(state)
    }

    /// Goes back to the first extent.
    fn rewind(&mut self, to: u64) -> Result<(), SnapshotError> {
        self.file
            .seek(io::SeekFrom::Start(to))
            .map_err(|source| self.failed(source))?;
        (self.at, self.pages, self.last) = (to, 0, None);
        Ok(())
    }

    /// The next extent, checked, with its bytes in `buffer`; `None` after the end mark.
    fn extent(&mut self, buffer: &mut Vec<u8>) -> Result<Option<PageRun>, SnapshotError> {
        let mut head = [0; EXTENT];
        self.fill(&mut head)?;
        let mut all = head.iter().copied();
        let mut next = |n: usize| {
            (0..n).fold(0u64, |v, i| {
                v | u64::from(all.next().unwrap_or(0)) << (8 * i)
            })
        };
        let slot = u16::try_from(next(2)).unwrap_or(END);
        let first = next(8);
        let pages = u32::try_from(next(4)).unwrap_or(u32::MAX);
        if pages > MOST_PAGES {
            return Err(self.damaged("an extent claims more than 256 pages"));
        }
        buffer.resize(pages as usize * PAGE_SIZE, 0);
        self.fill(buffer)?;
        if head != extent_head(slot, first, pages, buffer) {
            return Err(self.damaged("the checksum of an extent is wrong"));
        }
        let Some(count) = NonZeroU32::new(pages) else {
            if slot != END || first != self.pages {
                return Err(self.damaged("the number of pages does not agree with the end mark"));
            }
            let mut more = [0];
            let more = self.file.read(&mut more).map_err(|e| self.failed(e))?;
            if more > 0 {
                return Err(self.damaged("bytes follow the end mark"));
            }
            return Ok(None);
        };
        if self.last.is_some_and(|last| last > (slot, first)) {
            return Err(self.damaged("extents are not in order"));
        }
        let run = PageRun {
            slot: Slot(slot),
            first,
            pages: count,
        };
        self.last = Some((slot, run.end()));
        self.pages += u64::from(pages);
        Ok(Some(run))
    }

    fn fill(&mut self, into: &mut [u8]) -> Result<(), SnapshotError> {
        match self.file.read_exact(into) {
            Ok(()) => {
                self.at += into.len() as u64;
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.damaged("the file ends early"))
            }
            Err(e) => Err(self.failed(e)),
        }
    }

    fn damaged(&self, what: &'static str) -> SnapshotError {
        SnapshotError::Damaged {
            path: self.path.to_owned(),
            at: self.at,
            what,
        }
    }

    fn failed(&self, source: io::Error) -> SnapshotError {
        SnapshotError::File {
            path: self.path.to_owned(),
            what: "read",
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    #[test]
    fn only_a_regular_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("old.snap"), b"old").unwrap();
        symlink(at("old.snap"), at("link")).unwrap();
        let _socket = UnixListener::bind(at("c.sock")).unwrap();
        fs::create_dir(at("dir")).unwrap();
        replaceable(&at("old.snap")).unwrap();
        replaceable(&at("new.snap")).unwrap();
        for (path, what) in [
            (at("c.sock"), "c.sock is a device, socket or pipe"),
            (at("link"), "link is a symbolic link"),
            (at("dir"), "dir is a directory"),
            ("/dev/null".into(), "/dev/null is a device, socket or pipe"),
        ] {
            let error = replaceable(&path).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
