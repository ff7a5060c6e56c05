//! KVM's dirty bitmap with manual protection: read, then protect again exactly what was read.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use colo_proto::id::Slot;
use colo_proto::ram::PageSet;

use super::sys;

/// Words between two dirty ones that are still cleared with them: an ioctl costs about as much as
/// scanning this many.
const GAP: usize = 64;

/// KVM's bitmap log of one VM: which pages its processors wrote.
///
/// Before the first memory slot is set, [`enable`](Self::enable) it; slots are logged when they are
/// set with `KVM_MEM_LOG_DIRTY_PAGES`, and every page counts as dirty once. What a device of the
/// VMM writes through its own mapping is not in it: join [`TakeMarks`](super::TakeMarks).
#[derive(Debug)]
pub struct KvmLog {
    vm: OwnedFd,
    slots: Vec<(Slot, u64)>,
    /// One slot's words at a time; as long as the largest slot.
    scratch: Vec<u64>,
}

impl KvmLog {
    /// Turns on what [`collect`](Self::collect) needs (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
    ///
    /// # Errors
    /// The kernel is older than 5.7.
    pub fn enable(vm: &impl AsRawFd) -> io::Result<()> {
        sys::enable_manual_protect(duplicate(vm)?.as_fd())
    }

    /// The log of the VM with this descriptor, over slots of these sizes in pages, which have the
    /// same numbers in KVM.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(vm: &impl AsRawFd, slots: &[(Slot, u64)]) -> io::Result<Self> {
        let longest = slots.iter().map(|(_, pages)| pages.div_ceil(64)).max();
        Ok(Self {
            vm: duplicate(vm)?,
            slots: slots.to_vec(),
            scratch: vec![0; usize::try_from(longest.unwrap_or(0)).unwrap_or(0)],
        })
    }

    /// Joins every page dirtied since the last call into `into` and protects it again. `join` may
    /// add marks to the words of each slot: pages that others wrote. No allocation.
    ///
    /// # Errors
    /// KVM refused: the slot is not logged, or [`enable`](Self::enable) was not called. `into` then
    /// holds every page that may have been protected again: no log has those any more.
    pub fn collect(
        &mut self,
        into: &mut PageSet,
        mut join: impl FnMut(Slot, &mut [u64]),
    ) -> io::Result<()> {
        for &(slot, pages) in &self.slots {
            let len = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
            let Some(words) = self.scratch.get_mut(..len) else {
                continue;
            };
            sys::dirty_log(self.vm.as_fd(), kvm_slot(slot), words)?;
            join(slot, words);
            take((slot, pages), words, into, |from, count, part| {
                sys::clear_dirty_log(self.vm.as_fd(), kvm_slot(slot), from, count, part)
            })?;
        }
        Ok(())
    }
}

/// A VM descriptor of our own, so that the log can be read without borrowing the VM.
pub(crate) fn duplicate(fd: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open for as long as `fd` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    fd.try_clone_to_owned()
}

fn kvm_slot(slot: Slot) -> u32 {
    u32::from(slot.0)
}

/// Joins the dirty pages of a slot into `into` and protects them again by `clear`, a stretch at a time.
fn take(
    (slot, pages): (Slot, u64),
    words: &[u64],
    into: &mut PageSet,
    mut clear: impl FnMut(u64, u32, &[u64]) -> io::Result<()>,
) -> io::Result<()> {
    // All before the first: where a clear fails, those before it have cleared theirs.
    into.merge(slot, words);
    let mut rest = 0;
    while let Some((first, end)) = cluster(words, rest) {
        let from = first as u64 * 64;
        let upto = (end as u64 * 64).min(pages);
        let count =
            u32::try_from(upto - from).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        clear(from, count, words.get(first..end).unwrap_or_default())?;
        rest = end;
    }
    Ok(())
}

/// The next stretch of words from `from` on without a long gap: so that a large, mostly clean
/// memory costs what is dirty.
fn cluster(words: &[u64], from: usize) -> Option<(usize, usize)> {
    /// A clear holds KVM's lock over memory; this many pages at a time let page faults through.
    const MOST: usize = 1024;

    let rest = words.get(from..)?;
    let first = from + rest.iter().position(|&w| w != 0)?;
    let mut end = first + 1;
    for (at, &word) in words.iter().enumerate().skip(first + 1) {
        if at - first >= MOST || at - end >= GAP {
            break;
        }
        if word != 0 {
            end = at + 1;
        }
    }
    Some((first, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_span_short_gaps_and_break_at_long_ones() {
        let mut words = vec![0; 5000];
        assert_eq!(cluster(&words, 0), None);
        for at in [3, 40, 300, 4999] {
            words[at] = 1;
        }
        assert_eq!(cluster(&words, 0), Some((3, 41)));
        assert_eq!(cluster(&words, 41), Some((300, 301)));
        assert_eq!(cluster(&words, 301), Some((4999, 5000)));
        assert_eq!(cluster(&words, 5000), None);
    }

    #[test]
    fn pages_that_were_cleared_before_an_error_are_not_lost() {
        let slot = Slot(3);
        let mut words = vec![0; 5000];
        for at in [3, 300, 4999] {
            words[at] = 1;
        }
        let mut into = PageSet::new(&[(slot, 5000 * 64)]);
        let mut cleared = 0;
        let failed = take((slot, 5000 * 64), &words, &mut into, |_, _, part| {
            cleared += part.iter().map(|word| word.count_ones()).sum::<u32>();
            let second = cleared > 1;
            second
                .then_some(())
                .map_or(Ok(()), |()| Err(io::ErrorKind::Other.into()))
        });
        failed.unwrap_err();
        assert_eq!(
            cleared, 2,
            "the first is protected again, the second failed"
        );
        assert_eq!(into.count(), 3);
    }

    #[test]
    fn a_cluster_is_bounded() {
        let words = vec![1; 3000];
        assert_eq!(cluster(&words, 0), Some((0, 1024)));
        assert_eq!(cluster(&words, 2048), Some((2048, 3000)));
    }
}
