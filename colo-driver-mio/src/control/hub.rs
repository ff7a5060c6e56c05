//! Events from the loop to whoever listens.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use serde_json::{Value, json};

/// Events that wait for one listener; then the oldest are lost.
const WAITING_MOST: usize = 4_096;

/// Hands every event to every listener. Never waits for one.
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Mutex<Vec<Weak<Queue>>>>);

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Value>,
    lost: u64,
    ended: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hub {
    /// Tells everybody.
    pub fn publish(&self, event: &Value) {
        self.each(|waiting| {
            if waiting.events.len() == WAITING_MOST {
                waiting.events.pop_front();
                waiting.lost += 1;
            }
            waiting.events.push_back(event.clone());
        });
    }

    /// No events will follow: listeners end when they have read what waits.
    pub fn end(&self) {
        self.each(|waiting| waiting.ended = true);
    }

    /// Whether anybody listens; an event that nobody hears need not be made.
    #[must_use]
    pub fn heard(&self) -> bool {
        self.lock().iter().any(|queue| queue.strong_count() > 0)
    }

    /// Listens from now on.
    #[must_use]
    pub fn listen(&self) -> Listener {
        let queue = Arc::new(Queue::default());
        self.lock().push(Arc::downgrade(&queue));
        Listener(queue)
    }

    fn each(&self, act: impl Fn(&mut Waiting)) {
        self.lock().retain(|queue| {
            queue.upgrade().is_some_and(|queue| {
                act(&mut queue.lock());
                queue.changed.notify_all();
                true
            })
        });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Queue>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One who listens.
#[derive(Debug)]
pub struct Listener(Arc<Queue>);

/// What a listener got.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Heard {
    Event(Value),
    Nothing,
    Ended,
}

impl Listener {
    /// The next event, waiting at most `patience`.
    pub(super) fn next(&self, patience: Duration) -> Heard {
        let (mut waiting, _) = self
            .0
            .changed
            .wait_timeout_while(self.0.lock(), patience, |waiting| {
                waiting.events.is_empty() && waiting.lost == 0 && !waiting.ended
            })
            .unwrap_or_else(PoisonError::into_inner);
        if waiting.lost > 0 {
            let lost = std::mem::take(&mut waiting.lost);
            return Heard::Event(json!({ "event": "EVENTS_LOST", "data": { "lost": lost } }));
        }
        match waiting.events.pop_front() {
            Some(event) => Heard::Event(event),
            None if waiting.ended => Heard::Ended,
            None => Heard::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_listener_loses_the_oldest_and_is_told() {
        let hub = Hub::default();
        assert!(!hub.heard());
        let listener = hub.listen();
        for n in 0..WAITING_MOST + 3 {
            hub.publish(&json!(n));
        }
        let lost = json!({ "event": "EVENTS_LOST", "data": { "lost": 3 } });
        assert_eq!(listener.next(Duration::ZERO), Heard::Event(lost));
        assert_eq!(listener.next(Duration::ZERO), Heard::Event(json!(3)));
        hub.end();
        for _ in 4..WAITING_MOST + 3 {
            assert!(matches!(listener.next(Duration::ZERO), Heard::Event(_)));
        }
        assert_eq!(listener.next(Duration::ZERO), Heard::Ended);
        drop(listener);
        hub.publish(&json!(0));
        assert!(!hub.heard());
    }
}
