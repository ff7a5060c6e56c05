//! The files that a configuration names: what can be seen of them before anything starts.

use std::{
    fs::{self, File, Metadata},
    os::unix::fs::FileTypeExt as _,
    path::Path,
};

use super::check::{Wrong, wrong};

/// What kind of file this is, in words.
pub(super) fn kind(meta: &Metadata) -> &'static str {
    let kind = meta.file_type();
    if kind.is_file() {
        "a file"
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// A file that can be read to its end.
pub(super) fn readable(key: &'static str, path: &Path) -> Result<(), Wrong> {
    opens(key, path, Metadata::is_file)
}

/// A file, or a disk of the host.
pub(super) fn readable_or_disk(key: &'static str, path: &Path) -> Result<(), Wrong> {
    opens(key, path, |meta| {
        meta.is_file() || meta.file_type().is_block_device()
    })
}

/// The kind comes before the opening, which waits where it is a pipe.
fn opens(key: &'static str, path: &Path, good: impl Fn(&Metadata) -> bool) -> Result<(), Wrong> {
    let at = path.display();
    match fs::metadata(path) {
        Ok(meta) if !good(&meta) => wrong(
            key,
            format!("is {at}, which is {}, expected a file", kind(&meta)),
        ),
        meta => match meta.and_then(|_| File::open(path)) {
            Ok(_) => Ok(()),
            Err(error) => wrong(key, format!("cannot be read: {at}: {error}")),
        },
    }
}

#[cfg(test)]
pub(super) fn make_fifo(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}
