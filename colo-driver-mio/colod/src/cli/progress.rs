//! How far a synchronisation is: share, rate and remaining time of its round.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use colo_driver_mio::handle::What;
use colo_proto::event::Event;
use serde_json::{Value, json};

const PAGE: f64 = 4096.0;
const MIB: f64 = 1_048_576.0;

/// What the reports say of a round, and what the counters said when it began.
#[derive(Clone, Copy, Debug)]
struct Round {
    number: u32,
    pages: u64,
    began: Instant,
    /// Pages that earlier rounds and synchronisations had sent.
    before: u64,
}

/// Where a round stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Progress {
    round: u32,
    pages: u64,
    sent: u64,
    spent: Duration,
}

/// Shared by the thread that hears reports and whoever asks for the status.
#[derive(Clone, Debug, Default)]
pub(crate) struct Synchronisation(Arc<Mutex<Option<Round>>>);

impl Synchronisation {
    /// Takes note of a report; `sent` is the count of all pages sent so far.
    pub(crate) fn heard(&self, what: &What, sent: impl FnOnce() -> Option<u64>) {
        let What::Machine(event) = what else { return };
        match event {
            Event::Synchronising {
                round,
                pages,
                sent: 0,
            } => {
                // The loop may have begun to send before it is asked: the bar starts a little late.
                *self.round() = sent().map(|before| Round {
                    number: *round,
                    pages: *pages,
                    began: Instant::now(),
                    before,
                });
            }
            Event::Synchronising { .. } | Event::PeerLeft(_) | Event::Protected { .. } => {
                *self.round() = None;
            }
            _ => {}
        }
    }

    /// Whether a round is under way.
    pub(crate) fn runs(&self) -> bool {
        self.round().is_some()
    }

    /// Where the round stands when `sent` pages have been sent in all; none if there is no round.
    pub(crate) fn progress(&self, sent: u64) -> Option<Progress> {
        let round = (*self.round())?;
        Some(Progress {
            round: round.number,
            pages: round.pages,
            sent: sent.saturating_sub(round.before).min(round.pages),
            spent: round.began.elapsed(),
        })
    }

    fn round(&self) -> MutexGuard<'_, Option<Round>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    fn bytes_per_second(&self) -> f64 {
        self.sent as f64 * PAGE / self.spent.as_secs_f64().max(1e-3)
    }

    /// None before anything was sent: nobody can know.
    fn left(&self) -> Option<f64> {
        let rest = self.pages.saturating_sub(self.sent) as f64 * PAGE;
        (self.sent > 0).then(|| rest / self.bytes_per_second())
    }

    /// A line for a person.
    pub(crate) fn line(&self) -> String {
        let percent = (self.sent * 100).checked_div(self.pages).unwrap_or(100);
        let size = self.pages as f64 * PAGE / MIB;
        let rate = self.bytes_per_second() / MIB;
        let left = self
            .left()
            .map_or_else(String::new, |left| format!(", {left:.0} s left"));
        let round = self.round;
        format!("synchronising: round {round}, {percent} % of {size:.0} MiB, {rate:.0} MiB/s{left}")
    }

    /// The same for a machine.
    pub(crate) fn json(&self) -> Value {
        json!({
            "round": self.round,
            "pages": self.pages,
            "sent": self.sent,
            "bytes-per-second": self.bytes_per_second() as u64,
            "seconds-left": self.left().map(tenths),
        })
    }
}

/// More places than this would say that it is known.
fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(sync: &Synchronisation, event: Event, sent: u64) {
        sync.heard(&What::Machine(event), || Some(sent));
    }

    fn round(round: u32, pages: u64, sent: u64) -> Event {
        Event::Synchronising { round, pages, sent }
    }

    #[test]
    fn a_round_tells_share_rate_and_remaining_time() {
        let progress = Progress {
            round: 0,
            pages: 262_144,
            sent: 65_536,
            spent: Duration::from_secs(2),
        };
        assert_eq!(
            progress.line(),
            "synchronising: round 0, 25 % of 1024 MiB, 128 MiB/s, 6 s left"
        );
        assert_eq!(progress.json()["seconds-left"], 6.0);
        let odd = Progress {
            sent: 65_537,
            spent: Duration::from_nanos(334_700_000),
            ..progress
        };
        assert_eq!(odd.json()["seconds-left"], 1.0);
        let nothing = Progress {
            sent: 0,
            ..progress
        };
        assert_eq!(
            nothing.line(),
            "synchronising: round 0, 0 % of 1024 MiB, 0 MiB/s"
        );
    }

    #[test]
    fn each_round_counts_from_its_own_beginning() {
        let sync = Synchronisation::default();
        assert_eq!(sync.progress(5), None);
        heard(&sync, round(0, 1000, 0), 500);
        assert_eq!(
            sync.progress(900).map(|p| (p.round, p.sent)),
            Some((0, 400))
        );
        heard(&sync, round(0, 1000, 1000), 1500);
        assert!(!sync.runs());
        heard(&sync, round(1, 10, 0), 1500);
        assert_eq!(sync.progress(1503).map(|p| (p.round, p.sent)), Some((1, 3)));
        heard(
            &sync,
            Event::PeerLeft(colo_proto::event::PeerLost::Goodbye),
            1503,
        );
        assert!(!sync.runs());
    }
}
