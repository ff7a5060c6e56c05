//! What the daemon shows to other programs and to people with a browser.
//!
//! ```text
//! loop ── reports ──▶ Observer ──▶ metrics (Prometheus text)
//!                        │    └──▶ timeline (the last checkpoints and events)
//!                        └── broadcast ──▶ web: /metrics /healthz /readyz / /api/… /events
//! ```
//!
//! The web server has a thread of its own with a runtime of its own and bounds of its own: it can
//! be slow, full or attacked without the loop noticing.

mod metrics;
mod timeline;
mod web;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use colo_driver_mio::{handle::What, metrics::Snapshot};
use serde_json::Value;
use tokio::sync::broadcast;

pub(crate) use web::{Source, serve};

use metrics::Metrics;
use timeline::Timeline;

/// Events that one reader of the stream may be behind before it is told that it lost some.
const BEHIND_MOST: usize = 512;

/// Takes note of what the loop reports. Cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub(crate) struct Observer {
    state: Arc<Mutex<State>>,
    stream: broadcast::Sender<Arc<str>>,
}

#[derive(Debug)]
struct State {
    metrics: Metrics,
    timeline: Timeline,
}

impl Observer {
    pub(crate) fn new() -> Self {
        let state = State {
            metrics: Metrics::new(),
            timeline: Timeline::default(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            stream: broadcast::Sender::new(BEHIND_MOST),
        }
    }

    /// Takes note of a report; `event` is what the control socket says of it.
    pub(crate) fn heard(&self, what: &What, event: &Value) {
        let mut state = self.lock();
        state.metrics.heard(what);
        state.timeline.heard(what, event);
        drop(state);
        if self.stream.receiver_count() > 0 {
            // Nobody listens any more: nobody is told.
            let _readers = self.stream.send(event.to_string().into());
        }
    }

    /// The metrics, with what the daemon says of itself now.
    fn text(&self, vm: &str, snapshot: Option<&Snapshot>) -> String {
        self.lock().metrics.text(vm, snapshot)
    }

    /// The timeline.
    fn timeline(&self) -> Value {
        self.lock().timeline.json()
    }

    fn subscribe(&self) -> broadcast::Receiver<Arc<str>> {
        self.stream.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
