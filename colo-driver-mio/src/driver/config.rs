//! What a driver is made of, and what can go wrong.

use core::time::Duration;
use std::io;

use colo_proto::{error::Misuse, wire::join::Identity};

use crate::{Endpoint, heartbeat::PathConfig, priority::Priority};

/// Addresses and limits of one host.
#[derive(Clone, Debug)]
pub struct DriverConfig {
    /// The VM, this process and the pair's key.
    pub identity: Identity,
    /// Where to listen; a host that listens nowhere can never be a primary with a secondary.
    pub listen: Option<Endpoint>,
    /// Where the peer listens; needed to be a secondary.
    pub peer: Option<Endpoint>,
    /// Ways for heartbeats, as many as in the machine's configuration; two or more on separate
    /// cables.
    pub paths: Vec<PathConfig>,
    /// How long the kernel lets the control channel's bytes go unacknowledged before it declares
    /// the connection dead. Near the silence after which the machine acts, so that both agree.
    /// Default 1.2 s.
    pub silence: Duration,
    /// Bytes of socket buffers. Default: TCP's grow by themselves; Unix sockets of RAM lanes get
    /// 4 MiB.
    pub buffer: Option<usize>,
    /// How the loop's thread competes for a processor.
    pub priority: Priority,
}

impl DriverConfig {
    /// A host that knows no address yet.
    #[must_use]
    pub const fn new(identity: Identity) -> Self {
        Self {
            identity,
            listen: None,
            peer: None,
            paths: Vec::new(),
            silence: Duration::from_millis(1200),
            buffer: None,
            priority: Priority::High,
        }
    }
}

/// Why a driver cannot be made, or had to end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// Somebody else has the address.
    #[error("{at} ({what}) is in use by another process; end that one or configure another")]
    InUse {
        /// What it is for.
        what: &'static str,
        /// The address.
        at: Endpoint,
    },
    /// The address cannot be bound.
    #[error("{at} ({what}) cannot be bound: {source}")]
    Bind {
        /// What it is for.
        what: &'static str,
        /// The address.
        at: Endpoint,
        /// Why.
        source: io::Error,
    },
    /// A descriptor or thread cannot be made.
    #[error("{what} could not be set up: {source}")]
    Setup {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Waiting failed.
    #[error("the loop cannot wait any more: {source}")]
    Poll {
        /// Why.
        source: io::Error,
    },
    /// The loop broke the machine's contract: a bug here or in the guest's side.
    #[error("a bug in the driver: {0}")]
    Misuse(#[from] Misuse),
}

impl DriverError {
    pub(crate) fn bind(what: &'static str, at: &Endpoint, source: io::Error) -> Self {
        let at = at.clone();
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::InUse { what, at },
            _ => Self::Bind { what, at, source },
        }
    }
}
