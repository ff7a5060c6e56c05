//! What the demo tells: a line per thing that happened, for a person or for a machine.

use std::{io::IsTerminal as _, time::Duration};

use crate::demo::now;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::cli::say::{Mute, say};

/// Writes the story as it happens.
#[derive(Debug)]
pub(super) struct Timeline {
    zero: u64,
    json: bool,
    bar: Option<ProgressBar>,
}

impl Timeline {
    /// Time zero is now.
    pub(super) fn new(json: bool) -> Self {
        Self {
            zero: now(),
            json,
            bar: None,
        }
    }

    /// Something happened at `at` (nanoseconds since the host started): `what` is its name for machines, `text`
    /// its sentence for people.
    pub(super) fn tell(
        &self,
        at: u64,
        who: &str,
        what: &str,
        text: &str,
        data: Value,
    ) -> Result<(), Mute> {
        let since = at.saturating_sub(self.zero);
        if self.json {
            let mut line = Map::new();
            line.insert("t_ms".into(), json!(millis(since)));
            line.insert("who".into(), json!(who));
            line.insert("what".into(), json!(what));
            if let Value::Object(data) = data {
                line.extend(data);
            }
            return say(Value::Object(line));
        }
        let seconds = Duration::from_nanos(since).as_secs_f64();
        let line = format!("{seconds:9.3} s  {who:<7} {text}");
        match &self.bar {
            Some(bar) => bar.suspend(|| say(line)),
            None => say(line),
        }
    }

    /// Shows that something takes a while, where a person watches.
    pub(super) fn busy(&mut self, message: &str) {
        self.idle();
        if self.json || !std::io::stderr().is_terminal() {
            return;
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("            {spinner} {msg}") {
            bar.set_style(style);
        }
        bar.set_message(message.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        self.bar = Some(bar);
    }

    /// Changes what is shown.
    pub(super) fn note(&self, message: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(message);
        }
    }

    /// Nothing takes a while any more.
    pub(super) fn idle(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// Nanoseconds as milliseconds with three places.
pub(super) fn millis(nanos: u64) -> f64 {
    (nanos / 1_000) as f64 / 1_000.0
}

/// The value below which `percent` of the sorted values lie.
pub(super) fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few_and_no_values() {
        assert_eq!(percentile(&[], 50), 0);
        assert_eq!(percentile(&[7], 99), 7);
        let hundred: Vec<u64> = (1..=100).collect();
        assert_eq!(percentile(&hundred, 50), 51);
        assert_eq!(percentile(&hundred, 99), 100);
    }
}
