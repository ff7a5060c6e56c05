//! Received pages into the machine.

use colo_proto::id::PageRuns;

use super::{Pages, Staging, StagingError};

/// Copies received pages from `staging` into a machine, which is paused. They are not marked dirty
/// by this.
///
/// # Errors
/// A page that is not staged or not in its slot. All are looked for before the first is copied;
/// only a disk's file can still refuse in the middle.
pub fn commit(staging: &Staging, pages: &impl Pages, runs: &PageRuns) -> Result<(), StagingError> {
    for run in runs {
        pages.within(run)?;
        staging.spans(*run, |_, _| Ok(()))?;
    }
    for run in runs {
        staging.spans(*run, |first, span| Ok(pages.write(run.slot, first, span)?))?;
    }
    Ok(())
}
