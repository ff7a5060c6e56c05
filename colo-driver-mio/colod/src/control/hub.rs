//! Events from the loop to whoever listens.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use serde_json::{Value, json};

/// Events that wait for one listener; then the oldest are lost.
const WAITING_MOST: usize = 4_096;

/// Past events that are kept for listeners who ask for them.
const HISTORY_MOST: usize = 1_024;

/// Hands every event to every listener. Never waits for one.
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    queues: Vec<Weak<Queue>>,
    history: VecDeque<Value>,
}

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
        let mut shared = self.lock();
        if shared.history.len() == HISTORY_MOST {
            shared.history.pop_front();
        }
        shared.history.push_back(event.clone());
        shared.each(|waiting| waiting.push(event.clone()));
    }

    /// No events will follow: listeners end when they have read what waits.
    pub fn end(&self) {
        self.lock().each(|waiting| waiting.ended = true);
    }

    /// Listens from now on, or to what is kept of the past too.
    #[must_use]
    pub fn listen(&self, history: bool) -> Listener {
        let queue = Arc::new(Queue::default());
        let mut shared = self.lock();
        if history {
            queue.lock().events.clone_from(&shared.history);
        }
        shared.queues.push(Arc::downgrade(&queue));
        Listener(queue)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn each(&mut self, act: impl Fn(&mut Waiting)) {
        self.queues.retain(|queue| {
            queue.upgrade().is_some_and(|queue| {
                act(&mut queue.lock());
                queue.changed.notify_all();
                true
            })
        });
    }
}

impl Waiting {
    fn push(&mut self, event: Value) {
        if self.events.len() == WAITING_MOST {
            self.events.pop_front();
            self.lost += 1;
        }
        self.events.push_back(event);
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
        let listener = hub.listen(false);
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
    }

    #[test]
    fn the_past_is_told_to_whoever_asks_for_it() {
        let hub = Hub::default();
        for n in 0..HISTORY_MOST + 2 {
            hub.publish(&json!(n));
        }
        assert_eq!(hub.listen(false).next(Duration::ZERO), Heard::Nothing);
        let listener = hub.listen(true);
        hub.publish(&json!("now"));
        for n in 2..HISTORY_MOST + 2 {
            assert_eq!(listener.next(Duration::ZERO), Heard::Event(json!(n)));
        }
        assert_eq!(listener.next(Duration::ZERO), Heard::Event(json!("now")));
    }
}
