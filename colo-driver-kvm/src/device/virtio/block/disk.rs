//! A disk image and the pages of it that were written: to a checkpoint, a disk is one more slot of memory.
//!
//! Shared between the device and the VM. A live pass may take the marks and read pages while the guest writes: a
//! write marks after the bytes are in the file, so a page read too early is marked again (as in
//! [`OwnLog`]).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{FileOffset, MmapRegion};

use crate::dirty::OwnLog;
use crate::memory::PAGE_SIZE;

/// Bytes of a sector, the unit of a request.
pub(super) const SECTOR: u64 = 512;
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// It cannot be opened, or its length cannot be read.
    #[error("disk image {path} cannot be opened; check that it exists and may be read and written")]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is empty or ends within a sector.
    #[error("disk image {path} has {len} bytes, expected a multiple of 512, and not 0")]
    Length {
        /// The image.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
}

/// A raw disk image.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    len: u64,
    read_only: bool,
    dirty: OwnLog,
    failed: AtomicBool,
    /// Something may have been written since the last flush began.
    unflushed: AtomicBool,
    map: Option<MmapRegion<OwnLog>>,
}

impl Disk {
    /// Opens an image: a file or a block device.
    ///
    /// # Errors
    ///
    /// [`DiskError`] with the path.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let open = |source| DiskError::Open {
            path: path.into(),
            source,
        };
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(open)?;
        let len = (&file).seek(SeekFrom::End(0)).map_err(open)?;
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(DiskError::Length {
                path: path.into(),
                len,
            });
        }
        let whole = usize::try_from(len).ok().filter(|len| len % PAGE_SIZE == 0);
        let map = match whole {
            Some(len) if !read_only => {
                let shared = FileOffset::new(file.try_clone().map_err(open)?, 0);
                // A device that cannot be mapped can still be a disk; only a pair needs the map.
                MmapRegion::from_file(shared, len).ok()
            }
            _ => None,
        };
        Ok(Self {
            map,
            file,
            path: path.into(),
            len,
            read_only,
            dirty: OwnLog::with_len(usize::try_from(len).unwrap_or(usize::MAX)),
            failed: AtomicBool::new(false),
            // Whoever had the image before may have left it so.
            unflushed: AtomicBool::new(!read_only),
        })
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an empty image is refused")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Pages of 4 KiB, the last one perhaps cut by the end of the image.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.len.div_ceil(PAGE_SIZE as u64)
    }

    /// The image as memory shared with its file; none if it is read-only or ends within a page.
    ///
    /// Touch it only through system calls that are given its addresses: where the file has no room
    /// they fail, while a load or store of our own would be a signal.
    #[must_use]
    pub fn map(&self) -> Option<&MmapRegion<OwnLog>> {
        self.map.as_ref()
    }

    /// Whether the guest may only read.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether any access ever failed. The guest was told at that request; for replication it means that this copy
    /// can no longer be trusted to equal the other (spec checkpoint 10).
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Lets the image count as sound again: all of it is about to be replaced.
    pub fn forget_failure(&self) {
        self.failed.store(false, Ordering::Release);
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the marks of pages the guest wrote into `into` (OR; 64 pages a word, page 0 in bit 0) and forgets them.
    /// Read the pages after this call.
    pub fn take_dirty(&self, into: &mut [u64]) {
        self.dirty.take(into);
    }

    /// Copies whole pages out, for a capture. Behind the end of the image they are zero.
    ///
    /// # Errors
    ///
    /// The read failed, which is remembered ([`has_failed`](Self::has_failed)).
    pub fn read_pages(&self, first: u64, into: &mut [u8]) -> io::Result<()> {
        let (at, inside) = self.inside(first, into.len());
        let (inside, behind) = into.split_at_mut(inside);
        behind.fill(0);
        self.note(self.file.read_exact_at(inside, at))
    }

    /// Copies whole pages in, for a commit: what came from the other side is not marked. What lies behind the end of
    /// the image is left out.
    ///
    /// # Errors
    ///
    /// The write failed, which is remembered ([`has_failed`](Self::has_failed)).
    pub fn write_pages(&self, first: u64, from: &[u8]) -> io::Result<()> {
        let (at, inside) = self.inside(first, from.len());
        let inside = from.get(..inside).unwrap_or(from);
        self.unflushed.store(true, Ordering::Release);
        self.note(self.file.write_all_at(inside, at))
    }

    /// Makes sure that whole pages can be written through the [`map`](Self::map): where the file has no room, a write
    /// through it says only that the address is bad.
    ///
    /// # Errors
    ///
    /// There is no room, with the image's path.
    pub fn make_room(&self, first: u64, pages: u32) -> io::Result<()> {
        let (at, len) = self.inside(first, pages as usize * PAGE_SIZE);
        let made = rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, at, len as u64);
        match made.map_err(io::Error::from) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                let at = self.path.display();
                let what = format!("disk image {at}: {error}");
                Err(io::Error::new(error.kind(), what))
            }
            // A file system or device that makes no room in advance shows that when it is written.
            _ => Ok(()),
        }
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    ///
    /// The flush failed, which is remembered ([`has_failed`](Self::has_failed)).
    pub fn flush(&self) -> io::Result<()> {
        // Before the flush: what is written while it runs may be in it or not.
        self.unflushed.store(false, Ordering::Release);
        let flushed = self.note(self.file.sync_data());
        if flushed.is_err() {
            self.unflushed.store(true, Ordering::Release);
        }
        flushed
    }

    /// Whether anything may have been written that no flush has made durable.
    #[must_use]
    pub fn has_unflushed(&self) -> bool {
        self.unflushed.load(Ordering::Acquire)
    }

    /// Whether a request lies inside.
    pub(super) fn contains(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len)
    }

    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.note(self.file.read_exact_at(into, at))
    }

    pub(super) fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let written = self.note(self.file.write_all_at(from, at));
        // Also after an error: some of it may have been written.
        self.mark(at, from.len() as u64);
        written
    }

    /// Lets go of a range; its contents are then anything, here zero or what they were.
    pub(super) fn discard(&self, at: u64, len: u64) {
        // A refusal leaves the contents, which is allowed; a failure may come in the middle.
        let _left_as_it_was = self.punch(FallocateFlags::PUNCH_HOLE, at, len);
    }

    pub(super) fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        if self.punch(how, at, len).is_ok() {
            return Ok(());
        }
        // The file system cannot; then byte by byte.
        let end = at + len;
        for at in (at..end).step_by(ZEROES.len()) {
            let most = usize::try_from(end - at).unwrap_or(usize::MAX);
            self.write(at, ZEROES.get(..most).unwrap_or(&ZEROES))?;
        }
        Ok(())
    }

    fn punch(&self, how: FallocateFlags, at: u64, len: u64) -> rustix::io::Result<()> {
        let how = how | FallocateFlags::KEEP_SIZE;
        let punched = rustix::fs::fallocate(&self.file, how, at, len);
        // Also after an error: some of it may have been let go of.
        self.mark(at, len);
        punched
    }

    fn mark(&self, at: u64, len: u64) {
        self.unflushed.store(true, Ordering::Release);
        if let (Ok(at), Ok(len)) = (usize::try_from(at), usize::try_from(len)) {
            self.dirty.mark_dirty(at, len);
        }
    }

    /// Where page `first` begins, and how many of `len` bytes from there are inside.
    fn inside(&self, first: u64, len: usize) -> (u64, usize) {
        let at = first.saturating_mul(PAGE_SIZE as u64);
        let left = self.len.saturating_sub(at);
        (at, usize::try_from(left).map_or(len, |left| left.min(len)))
    }

    fn note(&self, result: io::Result<()>) -> io::Result<()> {
        if let Err(error) = &result
            && !self.failed.swap(true, Ordering::AcqRel)
        {
            let path = self.path.display();
            tracing::error!(%path, %error, "disk image failed; it can no longer be a copy of another");
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(len: u64) -> (tempfile::NamedTempFile, Disk) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        let disk = Disk::open(file.path(), false).unwrap();
        (file, disk)
    }

    fn dirty(disk: &Disk) -> Vec<u64> {
        let mut words = vec![0; usize::try_from(disk.pages().div_ceil(64)).unwrap()];
        disk.take_dirty(&mut words);
        words
    }

    #[test]
    fn only_the_guest_s_writes_are_marked() {
        let (_file, disk) = image(100 * 4096);
        disk.write(4095, b"ab").unwrap();
        disk.write(64 * 4096, b"c").unwrap();
        disk.write_pages(7, &[1; 4096]).unwrap();
        disk.read_pages(0, &mut [0; 8192]).unwrap();
        assert_eq!(dirty(&disk), [0b11, 0b1]);
        assert_eq!(dirty(&disk), [0, 0]);
    }

    #[test]
    fn a_last_page_cut_by_the_end_is_zero_behind_it_and_not_extended() {
        let (file, disk) = image(4096 + 512);
        assert_eq!(disk.pages(), 2);
        disk.write_pages(1, &[7; 4096]).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096 + 512);
        let mut page = [9; 4096];
        disk.read_pages(1, &mut page).unwrap();
        assert_eq!(page[..512], [7; 512]);
        assert_eq!(page[512..], [0; 3584]);
        disk.read_pages(u64::MAX, &mut page).unwrap();
        assert_eq!(page, [0; 4096]);
        assert!(!disk.has_failed());
    }

    #[test]
    fn zeroes_and_holes_read_as_zero_and_are_marked() {
        let (_file, disk) = image(64 * 4096);
        for unmap in [false, true] {
            disk.write_pages(0, &[5; 64 * 4096]).unwrap();
            disk.write_zeroes(512, 200 << 10, unmap).unwrap();
            let mut all = vec![0; 64 * 4096];
            disk.read_pages(0, &mut all).unwrap();
            assert!(all[..512].iter().all(|&b| b == 5));
            assert!(all[512..512 + (200 << 10)].iter().all(|&b| b == 0));
            assert!(all[512 + (200 << 10)..].iter().all(|&b| b == 5));
            assert_eq!(dirty(&disk), [(1 << 51) - 1]);
        }
        disk.discard(0, 8192);
        assert_eq!(dirty(&disk), [0b11]);
    }

    #[test]
    fn what_failed_in_the_middle_counts_as_written() {
        let (file, _disk) = image(64 * 4096);
        // The file is open for reading only, so that every change of it fails.
        let disk = Disk::open(file.path(), true).unwrap();
        disk.discard(0, 8192);
        assert_eq!(dirty(&disk), [0b11]);
        disk.write_zeroes(8192, 4096 * 40, false).unwrap_err();
        assert_eq!(dirty(&disk), [((1 << 40) - 1) << 2]);
    }

    #[test]
    fn a_flush_makes_durable_what_either_side_wrote() {
        let (_file, disk) = image(2 * 4096);
        assert!(disk.has_unflushed(), "nobody knows who had it before");
        disk.flush().unwrap();
        assert!(!disk.has_unflushed());
        disk.write_pages(0, &[1; 4096]).unwrap();
        assert!(disk.has_unflushed());
        disk.flush().unwrap();
        disk.write(0, b"guest").unwrap();
        assert!(disk.has_unflushed());
    }

    #[test]
    fn an_image_without_room_is_named() {
        let small = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "none"])
            .arg(small.path())
            .output();
        if !mounted.is_ok_and(|mounted| mounted.status.success()) {
            println!("SKIPPED: needs root, to mount a small file system");
            return;
        }
        let path = small.path().join("disk.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let disk = Disk::open(&path, false).unwrap();
        disk.make_room(0, 4).unwrap();
        let error = disk.make_room(4, 252).unwrap_err().to_string();
        drop(disk);
        let unmounted = std::process::Command::new("umount")
            .arg(small.path())
            .status();
        assert!(unmounted.unwrap().success());
        assert!(
            error.starts_with(&format!("disk image {}: ", path.display())),
            "{error}"
        );
    }

    #[test]
    fn a_failure_is_remembered() {
        let (file, disk) = image(2 * 4096);
        file.as_file().set_len(4096).unwrap();
        disk.read_pages(0, &mut [0; 4096]).unwrap();
        assert!(!disk.has_failed());
        assert!(disk.read_pages(1, &mut [0; 4096]).is_err());
        assert!(disk.has_failed());
    }

    #[test]
    fn what_cannot_be_a_disk_is_refused_with_its_path() {
        let missing = Disk::open(Path::new("/nonexistent/disk.img"), false).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "disk image /nonexistent/disk.img cannot be opened; check that it exists and may be read and written"
        );
        for len in [0, 700] {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(len).unwrap();
            let error = Disk::open(file.path(), true).unwrap_err();
            assert!(matches!(error, DiskError::Length { len: got, .. } if got == len));
        }
    }
}
