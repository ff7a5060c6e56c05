//! Which pages changed: KVM's log joined with our own writes, in one place.

mod own;

pub use own::OwnLog;
