//! Waking the loop from another thread.

use std::{fmt, sync::Arc};

use mio::{Registry, Token, Waker};

/// Makes the loop take another turn. Cheap to clone, callable from any thread; wake-ups that come
/// together are one.
#[derive(Clone)]
pub struct Wake(Arc<Waker>);

impl Wake {
    /// A handle that makes `token` ready in the poll of `registry`.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn new(registry: &Registry, token: Token) -> std::io::Result<Self> {
        Ok(Self(Arc::new(Waker::new(registry, token)?)))
    }

    /// Wakes the loop.
    pub fn wake(&self) {
        if let Err(error) = self.0.wake() {
            // Can only fail when the loop is gone; whoever wakes it finds out by other means.
            tracing::debug!(%error, "the loop could not be woken");
        }
    }
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wake")
    }
}
