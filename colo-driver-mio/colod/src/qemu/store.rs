//! The newest whole checkpoint on disk, replaced atomically.
//!
//! ```text
//! DIR/ram-7       a migration stream up to an open RAM part; every checkpoint appends its pages
//! DIR/tail-7-42   what closes it at checkpoint 42: end of RAM, device sections, description
//! DIR/newest      {"ram":"ram-7","length":…,"tail":"tail-7-42","epoch":42}
//! ```
//!
//! `ram` up to `length`, then `tail`, is what `-incoming` loads: in a migration a page may come
//! twice and the later one holds. `newest` is replaced by a rename, so whatever dies when, it names
//! a whole checkpoint.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use colo_proto::{
    id::PAGE_SIZE,
    qemu::{Item, Writer, session::State},
};
use serde::{Deserialize, Serialize};

use super::{
    image::{Image, PAGE, Staging},
    takeover,
};

const NEWEST: &str = "newest";

/// What `newest` says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Newest {
    ram: String,
    length: u64,
    tail: String,
    pub(super) epoch: u64,
}

/// Keeps checkpoints in a directory.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    /// Whether to wait for the disk at every checkpoint.
    sync: bool,
    /// Number of the next RAM file: above all that are there.
    next: u64,
    log: Option<Log>,
}

/// The RAM file that grows.
#[derive(Debug)]
struct Log {
    number: u64,
    file: File,
    length: u64,
    /// Length up to which it may grow before it is written anew.
    most: u64,
    writer: Writer,
}

impl Store {
    pub(super) fn open(dir: &Path, sync: bool) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut next = 0;
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|n| n.strip_prefix("ram-"));
            if let Some(number) = number.and_then(|n| n.parse::<u64>().ok()) {
                next = next.max(number.saturating_add(1));
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            sync,
            next,
            log: None,
        })
    }

    /// Keeps `state`: `image` is already committed, `changed` are the pages of this checkpoint.
    pub(super) fn keep(
        &mut self,
        state: &State,
        image: &Image,
        changed: &Staging,
    ) -> io::Result<()> {
        let mut log = match self.log.take() {
            Some(log) if state.epoch.0 > 0 && log.length < log.most => log,
            _ => self.begin(state, image)?,
        };
        if state.epoch.0 > 0 {
            log.append(image, changed)?;
        }
        let kept = self.close(&mut log, state);
        // After an error the file's end is unknown: the next checkpoint writes it anew.
        self.log = kept.is_ok().then_some(log);
        kept
    }

    /// A RAM file with every page of the image.
    fn begin(&mut self, state: &State, image: &Image) -> io::Result<Log> {
        let number = self.next;
        self.next += 1;
        let file = File::create(self.dir.join(format!("ram-{number}")))?;
        let whole = takeover::write(state, image, &file)?;
        let length = whole.saturating_sub(takeover::tail(state).len() as u64);
        file.set_len(length)?;
        let mut file = file;
        io::Seek::seek(&mut file, io::SeekFrom::Start(length))?;
        let mut writer = Writer::new();
        let start = Item::RamStart {
            id: state.ram,
            table: image.table().clone(),
            multifd: false,
        };
        // The writer learns the blocks' names; the start itself is in the file already.
        writer
            .write(&start, &mut Vec::new())
            .map_err(io::Error::other)?;
        Ok(Log {
            number,
            file,
            length,
            most: image.table().bytes().saturating_mul(2).max(64 << 20),
            writer,
        })
    }

    fn close(&self, log: &mut Log, state: &State) -> io::Result<()> {
        let ram = format!("ram-{}", log.number);
        let tail = format!("tail-{}-{}", log.number, state.epoch);
        let mut file = File::create(self.dir.join(&tail))?;
        file.write_all(&takeover::tail(state))?;
        let newest = Newest {
            ram,
            length: log.length,
            tail,
            epoch: state.epoch.0,
        };
        let partial = self.dir.join("newest.partial");
        let mut pointer = File::create(&partial)?;
        serde_json::to_writer(&pointer, &newest)?;
        pointer.write_all(b"\n")?;
        if self.sync {
            log.file.sync_data()?;
            file.sync_data()?;
            pointer.sync_data()?;
        }
        fs::rename(partial, self.dir.join(NEWEST))?;
        if self.sync {
            File::open(&self.dir)?.sync_all()?;
        }
        self.forget_all_but(&newest)
    }

    /// Removes what `newest` does not name any more.
    fn forget_all_but(&self, newest: &Newest) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let ours = name.starts_with("ram-") || name.starts_with("tail-");
            if ours && name != newest.ram && name != newest.tail {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Log {
    fn append(&mut self, image: &Image, changed: &Staging) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 18, &self.file);
        let (mut head, mut block) = (Vec::with_capacity(300), None);
        for record in changed.records() {
            let mut record = *record;
            record.named = block != Some(record.slot);
            block = Some(record.slot);
            head.clear();
            self.writer
                .write(&Item::Page(record), &mut head)
                .map_err(io::Error::other)?;
            out.write_all(&head)?;
            self.length += head.len() as u64;
            if !record.zero {
                out.write_all(image.page(record.run()))?;
                self.length += PAGE_SIZE;
            }
        }
        out.flush()
    }
}

/// The newest checkpoint of a directory, as the stream that `-incoming` loads.
pub(super) fn newest(dir: &Path) -> io::Result<(Newest, impl Read)> {
    let text = fs::read(dir.join(NEWEST))?;
    let newest: Newest = serde_json::from_slice(&text)?;
    let plain = |name: &str| !name.contains('/');
    if !plain(&newest.ram) || !plain(&newest.tail) {
        return Err(io::Error::other(
            "`newest` names a file outside its directory, expected plain names",
        ));
    }
    let ram = File::open(dir.join(&newest.ram))?;
    if ram.metadata()?.len() < newest.length {
        let message = format!("{} is shorter than `newest` says", newest.ram);
        return Err(io::Error::other(message));
    }
    let tail = File::open(dir.join(&newest.tail))?;
    let stream = ram.take(newest.length).chain(tail);
    Ok((newest, io::BufReader::with_capacity(64 * PAGE, stream)))
}
