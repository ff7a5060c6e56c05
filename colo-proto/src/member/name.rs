//! Who is who: nodes, process instances, paths, requests.

use core::fmt;

macro_rules! name {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:x})", stringify!($name), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

name! {
    /// A host of the pair, for good: survives restarts. Zero names nobody.
    NodeId(u64)
}
name! {
    /// One start of a process: random, new every time. What holds in memory is lost with it.
    BootId(u64)
}
name! {
    /// A network path between the hosts, numbered from 0.
    PathId(u8)
}
name! {
    /// A question to the arbiter. Random, so that a repeated request is known again.
    RequestId(u64)
}
name! {
    /// A write of the [`Record`](super::Record); grows by one with each.
    PersistId(u64)
}

/// The VM that the pair protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VmId(pub [u8; 16]);
