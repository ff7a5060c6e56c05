//! Which pages, never what is in them.
//!
//! * [`PageSet`]: dirty pages in KVM's own word layout.
//! * [`PageSet::take_runs`]: bits to runs to chunks.
//! * [`Cache`]: the secondary's bookkeeping of a coming epoch: what arrived, what to commit, what
//!   to abandon.

mod cache;
mod runs;
mod set;

pub use cache::{Cache, CacheMode};
pub use set::PageSet;
