//! KVM's dirty bitmap with manual protection: read, then protect again exactly what was read.

use std::io;
use std::os::fd::BorrowedFd;

use colo_proto::id::Slot;

use super::kvm_slot;
use crate::sys;

/// Words between two dirty ones that are still cleared with them: an ioctl costs about as much as
/// scanning this many.
const GAP: usize = 64;

/// Overwrites `words` with the slot's dirty pages and protects those again.
pub(super) fn collect(
    vm: BorrowedFd<'_>,
    slot: Slot,
    pages: u64,
    words: &mut [u64],
) -> io::Result<()> {
    sys::dirty_log(vm, kvm_slot(slot), words)?;
    let mut rest = 0;
    while let Some((first, end)) = cluster(words, rest) {
        let from = first as u64 * 64;
        let upto = (end as u64 * 64).min(pages);
        let count =
            u32::try_from(upto - from).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let part = words.get(first..end).unwrap_or_default();
        sys::clear_dirty_log(vm, kvm_slot(slot), from, count, part)?;
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
    fn a_cluster_is_bounded() {
        let words = vec![1; 3000];
        assert_eq!(cluster(&words, 0), Some((0, 1024)));
        assert_eq!(cluster(&words, 2048), Some((2048, 3000)));
    }
}
