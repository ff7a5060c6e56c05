//! What the loop reports, for logs and for the control socket: one name and the same fields in
//! both.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use colo_driver_mio::handle::{Report, What};
use colo_proto::{
    event::{Cause, Event, PeerLost},
    id::Channel,
    member::{Critical, MemberEvent, MemberState},
    status::{ColoMode, ExitReason, Mode},
};
use serde_json::{Value, json};

/// How urgent a report is for a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

/// A report in words.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Told {
    /// Its name: QEMU's where QEMU has one.
    pub(crate) name: &'static str,
    /// How urgent.
    pub(crate) level: Level,
    /// Its fields.
    pub(crate) data: Value,
}

impl Told {
    fn new(name: &'static str, level: Level, data: Value) -> Self {
        Self { name, level, data }
    }

    /// The line of the control socket.
    pub(crate) fn event(&self, report: &Report) -> Value {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        json!({
            "event": self.name,
            "data": self.data,
            "at": report.at.as_nanos(),
            "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        })
    }

    /// The line of the log.
    pub(crate) fn log(&self) {
        let (name, data) = (self.name, &self.data);
        match self.level {
            Level::Trace => tracing::trace!("{name} {data}"),
            Level::Debug => tracing::debug!("{name} {data}"),
            Level::Info => tracing::info!("{name} {data}"),
            Level::Warn => tracing::warn!("{name} {data}"),
            Level::Error => tracing::error!("{name} {data}"),
        }
    }
}

/// What was said last of attempts to connect, by name. They go on for as long as it takes, and a
/// person wants to read once why none succeeds.
#[derive(Debug, Default)]
pub(crate) struct Attempts(BTreeMap<&'static str, Value>);

impl Attempts {
    /// Makes news of an attempt that failed in another way than the one before, and of no other.
    pub(crate) fn weigh(&mut self, told: &mut Told) {
        match told.name {
            "NOT_CONNECTED" | "CALLER_REFUSED" | "PEER_REFUSED" | "PEER_LEFT" => {
                let before = self.0.insert(told.name, told.data.clone());
                told.level = if before.as_ref() == Some(&told.data) {
                    Level::Debug
                } else {
                    Level::Warn
                };
            }
            "PEER_ACCEPTED" => self.0.clear(),
            _ => {}
        }
    }
}

/// Puts a report into words.
pub(crate) fn tell(what: &What) -> Told {
    use Level::{Debug, Error, Info, Warn};
    match what {
        What::Machine(event) => tell_event(event),
        What::Up(of) => Told::new("CHANNEL_UP", Debug, json!({ "channel": channel(*of) })),
        What::Down(of, why) => Told::new(
            "CHANNEL_DOWN",
            Info,
            json!({ "channel": channel(*of), "why": why }),
        ),
        What::NotConnected(of, why) => Told::new(
            "NOT_CONNECTED",
            Debug,
            json!({ "channel": channel(*of), "why": why }),
        ),
        What::CallerRefused(why) => Told::new("CALLER_REFUSED", Warn, json!({ "why": why })),
        What::RecordNotWritten(why) => {
            Told::new("RECORD_NOT_WRITTEN", Error, json!({ "why": why }))
        }
        other => Told::new("REPORT", Info, json!({ "what": word(other) })),
    }
}

fn tell_event(event: &Event) -> Told {
    use Level::{Debug, Error, Info, Trace, Warn};
    match event {
        Event::PeerAccepted { boot } => Told::new(
            "PEER_ACCEPTED",
            Info,
            json!({ "boot": format!("{boot:016x}") }),
        ),
        Event::PeerRefused { reasons } => {
            Told::new("PEER_REFUSED", Warn, json!({ "reasons": reasons }))
        }
        Event::Synchronising { round, pages, sent } => Told::new(
            "SYNCHRONISING",
            Info,
            json!({ "round": round, "pages": pages, "sent": sent }),
        ),
        Event::NotConverging { pages, most } => Told::new(
            "NOT_CONVERGING",
            Warn,
            json!({ "pages": pages, "most": most }),
        ),
        Event::Protected { mode, epoch } => Told::new(
            "PROTECTED",
            Info,
            json!({ "mode": mode_name(*mode), "epoch": epoch.0 }),
        ),
        Event::AtRisk(Some(why)) => Told::new("AT_RISK", Warn, json!({ "why": why.to_string() })),
        Event::AtRisk(None) => Told::new("RISK_OVER", Info, json!({})),
        Event::GuestHangs(op) => Told::new("GUEST_HANGS", Error, json!({ "operation": word(op) })),
        Event::Checkpointed {
            epoch,
            why,
            pages,
            times,
        } => Told::new(
            "CHECKPOINTED",
            Trace,
            json!({
                "epoch": epoch.0,
                "why": cause(*why),
                "pages": pages,
                "pause_us": micros(times.pause),
                "reply_us": micros(times.reply),
                "live_us": micros(times.live),
                "send_us": micros(times.send),
                "received_us": micros(times.received),
                "loaded_us": micros(times.loaded),
            }),
        ),
        Event::ModeChanged(mode) => {
            Told::new("MODE_CHANGED", Info, json!({ "mode": mode_name(*mode) }))
        }
        Event::PeerLeft(why) => Told::new("PEER_LEFT", Warn, json!({ "why": left(why) })),
        Event::Unprotected(generation) => {
            Told::new("UNPROTECTED", Warn, json!({ "generation": generation.0 }))
        }
        Event::Promoted { generation, epoch } => Told::new(
            "PROMOTED",
            Warn,
            json!({ "generation": generation.0, "epoch": epoch.0 }),
        ),
        Event::Fenced(generation) => {
            Told::new("FENCED", Error, json!({ "generation": generation.0 }))
        }
        Event::ColoExit(exit) => Told::new(
            "COLO_EXIT",
            Warn,
            json!({ "mode": colo_mode(exit.mode), "reason": exit_reason(exit.reason) }),
        ),
        Event::Failover(status) => Told::new("FAILOVER", Info, json!({ "status": word(status) })),
        Event::GuestFailed { op, why } => Told::new(
            "GUEST_FAILED",
            Error,
            json!({ "operation": word(op), "why": why }),
        ),
        Event::Parted(parted) => Told::new(
            "DIVERGED",
            Info,
            json!({
                "flow": parted.flow.to_string(),
                "cause": parted.cause.name(),
                "epoch": parted.epoch.0,
                "offset": parted.offset,
                "ours": parted.ours.escape_ascii().to_string(),
                "theirs": parted.theirs.escape_ascii().to_string(),
            }),
        ),
        Event::QueueFull(queue) => Told::new("QUEUE_FULL", Debug, json!({ "queue": word(queue) })),
        Event::Member(event) => tell_member(event),
        other => Told::new("EVENT", Info, json!({ "what": word(other) })),
    }
}

fn tell_member(event: &MemberEvent) -> Told {
    use Level::{Error, Info, Warn};
    let warn = |name, data| Told::new(name, Warn, data);
    match event {
        MemberEvent::State {
            from,
            to,
            generation,
        } => {
            let silent = matches!(
                to,
                MemberState::SecondaryArbitrating | MemberState::PrimaryArbitrating
            );
            let name = if silent { "SUSPECTED" } else { "MEMBER" };
            Told::new(
                name,
                if silent { Warn } else { Info },
                json!({ "from": word(from), "to": word(to), "generation": generation.0 }),
            )
        }
        MemberEvent::Critical(critical) => {
            let (what, generation) = match critical {
                Critical::UnsafeTakeover => ("took over without asking an arbiter", None),
                Critical::OverrideUsed => ("the operator's override was used", None),
                Critical::OwnershipLost { generation } => {
                    ("the other host owns the VM", Some(generation))
                }
                Critical::SplitBrain { generation } => {
                    ("both hosts say that they own the VM", Some(generation))
                }
            };
            let mut data = json!({ "what": what });
            if let Some(generation) = generation {
                data["generation"] = json!(generation.0);
            }
            Told::new("CRITICAL", Error, data)
        }
        MemberEvent::Stalled(time) => warn("STALLED", json!({ "ms": millis(*time) })),
        MemberEvent::PathDown(path) => warn("PATH_DOWN", json!({ "path": path.0 })),
        MemberEvent::PathUp(path) => Told::new("PATH_UP", Info, json!({ "path": path.0 })),
        MemberEvent::NotHeard => warn("NOT_HEARD", json!({})),
        MemberEvent::ArbiterSilent => warn("ARBITER_SILENT", json!({})),
        MemberEvent::ArbiterWentBack { got, known } => warn(
            "ARBITER_WENT_BACK",
            json!({ "generation": got.0, "known": known.0 }),
        ),
        MemberEvent::DualStartRefused { generation, epoch } => warn(
            "DUAL_START_REFUSED",
            json!({ "generation": generation.0, "epoch": epoch.0 }),
        ),
        MemberEvent::ReplicaNotClean(epoch) => {
            warn("REPLICA_NOT_CLEAN", json!({ "epoch": epoch.0 }))
        }
        MemberEvent::Hang => warn("HANG", json!({})),
        MemberEvent::SettingsDiffer => warn(
            "SETTINGS_DIFFER",
            json!({ "what": "member or arbiter settings; the host that is refused says which" }),
        ),
        MemberEvent::WaitingForOperator => warn(
            "WAITING_FOR_OPERATOR",
            json!({ "what": "the VM was never served; start one host as primary" }),
        ),
        MemberEvent::NobodyServes { last, generation } => warn(
            "NOBODY_SERVES",
            json!({
                "last": last.0,
                "generation": generation.0,
                "what": format!(
                    "node {last} served last, in generation {generation}: start it as primary \
                     (or with pair.autostart = true). If it is lost: colod ctl override on the \
                     other host, which may forget what node {last} told the world",
                    last = last.0,
                    generation = generation.0
                ),
            }),
        ),
        MemberEvent::NotHandedOver(why) => {
            warn("NOT_HANDED_OVER", json!({ "why": why.to_string() }))
        }
        MemberEvent::RecordForeign => warn("RECORD_FOREIGN", json!({})),
        MemberEvent::Refused { command, state } => warn(
            "COMMAND_REFUSED",
            json!({ "command": word(command), "member": word(state) }),
        ),
        other => warn("MEMBER_EVENT", json!({ "what": word(other) })),
    }
}

/// Why the peer is gone, in words.
fn left(why: &PeerLost) -> String {
    match why {
        PeerLost::Silent => "it was silent".into(),
        PeerLost::HungUp(of) => format!("its {} connection ended", channel(*of)),
        PeerLost::Faulty(fault) => format!("it broke the protocol: {fault}"),
        PeerLost::Unfit => "it does not fit".into(),
        PeerLost::Goodbye => "the VM ended in good order".into(),
        PeerLost::Told(said) => format!("it left: {said}"),
        PeerLost::Asked => "an operator asked".into(),
        PeerLost::NotOwner => "the arbiter gave the VM to the other host".into(),
        PeerLost::Local(op) => format!("the guest here failed to {op:?}"),
        PeerLost::TooSlow(waited) => format!("too slow: waited {} ms", millis(*waited)),
        other => word(other),
    }
}

/// QEMU's name of a mode.
pub(crate) const fn colo_mode(mode: ColoMode) -> &'static str {
    match mode {
        ColoMode::None => "none",
        ColoMode::Primary => "primary",
        ColoMode::Secondary => "secondary",
    }
}

/// QEMU's name of a reason.
pub(crate) const fn exit_reason(reason: ExitReason) -> &'static str {
    match reason {
        ExitReason::None => "none",
        ExitReason::Request => "request",
        ExitReason::Error => "error",
        ExitReason::Processing => "processing",
    }
}

/// Name of a mode.
pub(crate) const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Lockstep => "lockstep",
        Mode::Standby => "standby",
    }
}

pub(crate) fn cause(cause: Cause) -> String {
    word(&cause).to_lowercase()
}

/// A channel in words.
pub(crate) fn channel(channel: Channel) -> String {
    match channel {
        Channel::Ram(lane) => format!("Ram {lane}"),
        other => word(&other),
    }
}

pub(crate) fn word(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}")
}

/// Whole milliseconds.
fn millis(time: Duration) -> u64 {
    micros(time) / 1_000
}

/// Whole microseconds.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_proto::{
        id::{Epoch, Generation},
        member::PathId,
        status::ColoExit,
        time::Instant,
    };

    #[test]
    fn qemus_event_has_qemus_fields() {
        let what = What::Machine(Event::ColoExit(ColoExit {
            mode: ColoMode::Secondary,
            reason: ExitReason::Request,
        }));
        let told = tell(&what);
        let report = Report {
            at: Instant::from_millis(5),
            what,
        };
        let event = told.event(&report);
        assert_eq!(event["event"], "COLO_EXIT");
        assert_eq!(
            event["data"],
            json!({ "mode": "secondary", "reason": "request" })
        );
        assert_eq!(event["at"], 5_000_000);
        assert!(event["timestamp"]["seconds"].is_u64());
    }

    #[test]
    fn why_nobody_is_connected_is_said_once_until_the_reason_changes() {
        let mut attempts = Attempts::default();
        let mut level = |why: &str| {
            let mut told = tell(&What::NotConnected(Channel::Control, why.into()));
            attempts.weigh(&mut told);
            told.level
        };
        assert_eq!(level("nobody listens"), Level::Warn);
        assert_eq!(level("nobody listens"), Level::Debug);
        assert_eq!(level("it already has a secondary"), Level::Warn);
        assert_eq!(level("nobody listens"), Level::Warn);
    }

    #[test]
    fn a_peer_that_is_refused_again_and_again_is_told_of_once() {
        let mut attempts = Attempts::default();
        let mut level = |what: &What| {
            let mut told = tell(what);
            attempts.weigh(&mut told);
            told.level
        };
        let stranger = What::CallerRefused("caller 10.0.0.2: refused".into());
        let refused = What::Machine(Event::PeerRefused {
            reasons: vec!["vcpus is 1 here and 2 there".into()],
        });
        let left = What::Machine(Event::PeerLeft(PeerLost::Unfit));
        let round = [&stranger, &refused, &left];
        assert_eq!(round.map(&mut level), [Level::Warn; 3]);
        assert_eq!(round.map(&mut level), [Level::Debug; 3]);
        let silent = What::Machine(Event::PeerLeft(PeerLost::Silent));
        assert_eq!(level(&silent), Level::Warn);
        // A peer that was taken is missed anew, whatever it is that it leaves for.
        level(&What::Machine(Event::PeerAccepted { boot: 1 }));
        assert_eq!(level(&silent), Level::Warn);
    }

    #[test]
    fn what_a_member_says_has_names_and_numbers() {
        let told = |event| {
            let Told { name, data, .. } = tell(&What::Machine(Event::Member(event)));
            format!("{name} {data}")
        };
        for (event, expected) in [
            (MemberEvent::PathDown(PathId(1)), r#"PATH_DOWN {"path":1}"#),
            (
                MemberEvent::Stalled(Duration::from_nanos(3_253_186_980)),
                r#"STALLED {"ms":3253}"#,
            ),
            (
                MemberEvent::ArbiterWentBack {
                    got: Generation(3),
                    known: Generation(5),
                },
                r#"ARBITER_WENT_BACK {"generation":3,"known":5}"#,
            ),
            (
                MemberEvent::Critical(Critical::SplitBrain {
                    generation: Generation(4),
                }),
                r#"CRITICAL {"generation":4,"what":"both hosts say that they own the VM"}"#,
            ),
        ] {
            assert_eq!(told(event), expected);
        }
        let slow = PeerLost::TooSlow(Duration::from_micros(1_500_700));
        assert_eq!(left(&slow), "too slow: waited 1500 ms");
        let hung_up = PeerLost::HungUp(Channel::Ram(2));
        assert_eq!(left(&hung_up), "its Ram 2 connection ended");
    }

    #[test]
    fn a_checkpoint_is_for_whoever_asks_and_protection_for_everybody() {
        let protected = tell(&What::Machine(Event::Protected {
            mode: Mode::Standby,
            epoch: Epoch(1),
        }));
        assert_eq!(protected.level, Level::Info);
        assert_eq!(protected.data, json!({ "mode": "standby", "epoch": 1 }));
    }
}
