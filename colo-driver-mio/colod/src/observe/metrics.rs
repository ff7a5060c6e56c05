//! Prometheus metrics. Names and meanings: `docs/monitoring.md`.

use std::sync::atomic::AtomicU64;

use colo_driver_mio::{handle::What, metrics::Snapshot};
use colo_proto::{
    event::{Event, PeerLost},
    id::Role,
};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::cli::report::{cause, channel, mode_name};

type Seconds = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByCause {
    cause: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByPhase {
    phase: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByChannel {
    channel: String,
    direction: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct About {
    vm: String,
    role: &'static str,
    mode: &'static str,
    version: &'static str,
}

/// What is counted.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    up: Gauge,
    about: Family<About, Gauge>,
    protected: Gauge,
    generation: Gauge,
    epoch: Gauge,
    replica_valid: Gauge,
    stopped: Gauge,
    interval: Seconds,
    resident: Gauge,
    longest_turn: Seconds,
    pause: Histogram,
    phases: Family<ByPhase, Histogram>,
    checkpoints: Family<ByCause, Counter>,
    pages: Counter,
    aborted: Counter,
    released: Counter,
    matched: Counter,
    dropped: Counter,
    diverged: Counter,
    inputs: Counter,
    sync_pages: Counter,
    state_bytes: Counter,
    takeovers: Counter,
    lost: Family<ByCause, Counter>,
    refused: Counter,
    bytes: Family<ByChannel, Counter>,
}

/// From 50 µs to 3.3 s, each bound twice the one before.
fn times() -> Histogram {
    Histogram::new(std::iter::successors(Some(50e-6_f64), |at| Some(at * 2.0)).take(17))
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("colo");
        let r = &mut registry;
        macro_rules! metric {
            ($name:literal, $help:literal) => {
                metric!($name, $help, Default::default())
            };
            ($name:literal, $help:literal, $value:expr) => {{
                let metric = $value;
                r.register($name, $help, Clone::clone(&metric));
                metric
            }};
            ($name:literal, $help:literal, $value:expr, $unit:expr) => {{
                let metric = $value;
                r.register_with_unit($name, $help, $unit, Clone::clone(&metric));
                metric
            }};
        }
        Self {
            up: metric!("up", "Whether the daemon's loop answers"),
            about: metric!(
                "info",
                "The VM, this host's role and mode, the daemon's version"
            ),
            protected: metric!(
                "protected",
                "Whether a failure of either host would be survived"
            ),
            generation: metric!("generation", "Number of the current ownership of the VM"),
            epoch: metric!("epoch", "Number of the last complete checkpoint"),
            replica_valid: metric!("replica_valid", "Whether the replica here could take over"),
            stopped: metric!("guest_stopped", "Whether an operator has stopped the guest"),
            interval: metric!(
                "checkpoint_interval_longest",
                "Longest time between two checkpoints",
                Seconds::default(),
                Unit::Seconds
            ),
            resident: metric!(
                "daemon_memory_resident",
                "Resident memory of the daemon, guest RAM included",
                Gauge::default(),
                Unit::Bytes
            ),
            longest_turn: metric!(
                "loop_turn_longest",
                "Longest turn of the loop: what a heartbeat may have waited for",
                Seconds::default(),
                Unit::Seconds
            ),
            pause: metric!(
                "pause",
                "Time that the guest stood still for a checkpoint",
                times(),
                Unit::Seconds
            ),
            phases: metric!(
                "checkpoint_phase",
                "Time of each phase of a checkpoint",
                Family::new_with_constructor(times as fn() -> Histogram),
                Unit::Seconds
            ),
            checkpoints: metric!("checkpoints", "Complete checkpoints, by cause"),
            pages: metric!("checkpoint_pages", "Pages in complete checkpoints"),
            aborted: metric!("checkpoints_aborted", "Checkpoints given up"),
            released: metric!(
                "frames_released",
                "Frames of the guest that left for the world"
            ),
            matched: metric!(
                "frames_matched",
                "Frames that left because both guests said the same"
            ),
            dropped: metric!("frames_dropped", "Frames dropped at a bound or a shut gate"),
            diverged: metric!("divergences", "Outputs in which the two guests differed"),
            inputs: metric!("frames_from_world", "Frames of clients"),
            sync_pages: metric!(
                "synchronisation_pages",
                "Pages sent in synchronisation rounds"
            ),
            state_bytes: metric!(
                "device_state",
                "Device state sent or received",
                Counter::default(),
                Unit::Bytes
            ),
            takeovers: metric!("takeovers", "Times that this host took over"),
            lost: metric!("peer_lost", "Ends of a pairing, by cause"),
            refused: metric!("refusals", "Callers and attempts that came to nothing"),
            bytes: metric!(
                "channel",
                "Bytes that crossed a channel",
                Family::<ByChannel, Counter>::default(),
                Unit::Bytes
            ),
            registry,
        }
    }

    pub(super) fn heard(&self, what: &What) {
        let What::Machine(event) = what else { return };
        match event {
            Event::Checkpointed {
                why, pages, times, ..
            } => {
                let by = ByCause { cause: cause(*why) };
                self.checkpoints.get_or_create(&by).inc();
                self.pages.inc_by(*pages);
                self.pause.observe(times.pause.as_secs_f64());
                for (phase, time) in [
                    ("reply", times.reply),
                    ("live", times.live),
                    ("pause", times.pause),
                    ("send", times.send),
                    ("received", times.received),
                    ("loaded", times.loaded),
                ] {
                    let by = ByPhase { phase };
                    self.phases.get_or_create(&by).observe(time.as_secs_f64());
                }
            }
            Event::Promoted { .. } => {
                self.takeovers.inc();
            }
            Event::PeerLeft(why) => {
                let by = ByCause {
                    cause: lost(why).to_owned(),
                };
                self.lost.get_or_create(&by).inc();
            }
            _ => {}
        }
    }

    /// The text that Prometheus reads. Without a snapshot the loop did not answer, and `colo_up`
    /// is 0.
    pub(super) fn text(&self, vm: &str, snapshot: Option<&Snapshot>) -> String {
        self.up.set(i64::from(snapshot.is_some()));
        if let Some(snapshot) = snapshot {
            self.take(vm, snapshot);
        }
        if let Some(bytes) = resident() {
            self.resident.set(bytes);
        }
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            // Writing to a string does not fail; a reader that gets nothing reports the target down.
            text.clear();
        }
        text
    }

    fn take(&self, vm: &str, snapshot: &Snapshot) {
        let Snapshot {
            status,
            stats,
            driver,
            ..
        } = snapshot;
        self.about.clear();
        self.about
            .get_or_create(&About {
                vm: vm.to_owned(),
                role: match status.role {
                    Role::Primary => "primary",
                    Role::Secondary => "secondary",
                },
                mode: mode_name(status.mode),
                version: env!("CARGO_PKG_VERSION"),
            })
            .set(1);
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.protected.set(i64::from(status.protected));
        self.generation.set(whole(status.generation.0));
        self.epoch.set(whole(status.epoch.0));
        self.replica_valid.set(i64::from(status.replica_valid));
        self.stopped.set(i64::from(status.stopped));
        self.interval.set(status.checkpoint_delay.as_secs_f64());
        self.longest_turn.set(driver.longest_turn.as_secs_f64());
        for (counter, now) in [
            (&self.aborted, stats.aborted),
            (&self.released, stats.released),
            (&self.matched, stats.matched),
            (&self.dropped, stats.dropped),
            (&self.diverged, stats.diverged),
            (&self.inputs, stats.inputs),
            (&self.sync_pages, stats.sync_pages),
            (&self.state_bytes, stats.state_bytes),
            (&self.refused, driver.refused),
        ] {
            reach(counter, now);
        }
        for (of, (received, sent)) in &driver.bytes {
            for (direction, now) in [("received", *received), ("sent", *sent)] {
                let by = ByChannel {
                    channel: channel(*of),
                    direction,
                };
                reach(&self.bytes.get_or_create(&by), now);
            }
        }
    }
}

/// Moves a counter on to what the loop has counted. A loop that counts anew never moves it back.
fn reach(counter: &Counter, now: u64) {
    counter.inc_by(now.saturating_sub(counter.get()));
}

fn lost(why: &PeerLost) -> &'static str {
    match why {
        PeerLost::Silent => "silent",
        PeerLost::HungUp(_) => "connection ended",
        PeerLost::Faulty(_) => "broke the protocol",
        PeerLost::Unfit => "does not fit",
        PeerLost::Goodbye => "orderly end",
        PeerLost::Told(_) => "left",
        PeerLost::Asked => "operator",
        PeerLost::NotOwner => "arbiter",
        PeerLost::Local(_) => "own guest failed",
        PeerLost::TooSlow(_) => "too slow",
        _ => "other",
    }
}

/// Resident memory of this process in bytes.
fn resident() -> Option<i64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: i64 = statm.split(' ').nth(1)?.parse().ok()?;
    let size = i64::try_from(rustix::param::page_size()).ok()?;
    pages.checked_mul(size)
}
