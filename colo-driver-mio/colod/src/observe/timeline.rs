//! The last checkpoints and events, for the page.

use std::collections::VecDeque;

use colo_driver_mio::handle::What;
use colo_proto::event::Event;
use serde_json::{Value, json};

/// Checkpoints that are kept: a minute at ten a second.
const CHECKPOINTS_MOST: usize = 600;
/// Other events that are kept.
const EVENTS_MOST: usize = 200;

/// Bounded histories. Checkpoints have one of their own, so that they do not push out what
/// happens rarely.
#[derive(Debug, Default)]
pub(super) struct Timeline {
    checkpoints: VecDeque<Value>,
    events: VecDeque<Value>,
}

impl Timeline {
    pub(super) fn heard(&mut self, what: &What, event: &Value) {
        let (kept, most) = match what {
            What::Machine(Event::Checkpointed { .. }) => (&mut self.checkpoints, CHECKPOINTS_MOST),
            _ => (&mut self.events, EVENTS_MOST),
        };
        if kept.len() == most {
            kept.pop_front();
        }
        kept.push_back(event.clone());
    }

    pub(super) fn json(&self) -> Value {
        json!({ "checkpoints": self.checkpoints, "events": self.events })
    }
}

#[cfg(test)]
mod tests {
    use colo_proto::id::Channel;

    use super::*;

    #[test]
    fn histories_are_bounded_and_keep_the_newest() {
        let mut timeline = Timeline::default();
        for n in 0..EVENTS_MOST + 3 {
            timeline.heard(&What::Up(Channel::Control), &json!(n));
        }
        let told = timeline.json();
        assert_eq!(told["events"].as_array().unwrap().len(), EVENTS_MOST);
        assert_eq!(told["events"][0], json!(3));
        assert_eq!(told["checkpoints"], json!([]));
    }
}
