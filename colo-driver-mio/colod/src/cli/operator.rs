//! The commands of the control socket, carried out by the loop.

use std::time::Duration;

use colo_driver_mio::{ControlHandle, handle::AskError, metrics::Snapshot};

use crate::control::{Operator, Refused, Request};
use colo_proto::{
    command::{Answer, Command},
    id::Role,
    status::Mode,
};
use serde_json::{Value, json};

use crate::cli::progress::Synchronisation;
use crate::cli::report::{colo_mode, exit_reason, micros, mode_name};
use crate::cli::run::press;
use crate::kvm::Orders;
use crate::observe::Source;

/// A command that takes longer is still carried out; the caller is told to look at the status.
const PATIENCE: Duration = Duration::from_secs(55);

/// Every command, for the suggestion when one is misspelt.
const KNOWN: [&str; 21] = [
    "status",
    "query-colo-status",
    "query-xen-replication-status",
    "x-colo-lost-heartbeat",
    "migrate-set-parameters",
    "xen-set-replication",
    "xen-colo-do-checkpoint",
    "checkpoint",
    "failover",
    "detach",
    "attach",
    "override",
    "set-mode",
    "stop",
    "cont",
    "save",
    "system_powerdown",
    "quit",
    "events",
    "qmp_capabilities",
    "query-commands",
];

/// What an operator must know before an override.
const OVERRIDE: &str = "override serves from this host without asking anyone. If the other host \
    serves, or served last, two VMs answer the world or what it was told is lost. Power the other \
    host off, then say the-other-host-is-off (colod ctl override --the-other-host-is-off)";

/// Carries commands out.
#[derive(Clone)]
pub(crate) struct LoopOperator {
    name: String,
    handle: ControlHandle,
    sync: Synchronisation,
    orders: Orders,
}

impl LoopOperator {
    pub(crate) const fn new(
        name: String,
        handle: ControlHandle,
        sync: Synchronisation,
        orders: Orders,
    ) -> Self {
        Self {
            name,
            handle,
            sync,
            orders,
        }
    }

    fn command(&self, command: Command) -> Result<Value, Refused> {
        match self.handle.command(command, PATIENCE).map_err(late)? {
            Answer::Done => Ok(json!({})),
            Answer::Refused(refusal) => Err(Refused::because(refusal.to_string())),
        }
    }

    fn status(&self) -> Result<Value, Refused> {
        let snapshot = self.handle.snapshot().map_err(late)?;
        let progress = self.sync.progress(snapshot.stats.sync_pages);
        let mut status = status(&self.name, &snapshot);
        if let Some(progress) = progress {
            status["synchronisation"] = progress.json();
        }
        Ok(status)
    }

    fn query_colo_status(&self) -> Result<Value, Refused> {
        let status = self.handle.snapshot().map_err(late)?.status;
        Ok(json!({
            "mode": colo_mode(status.colo_mode),
            "last-mode": colo_mode(status.last_mode),
            "reason": exit_reason(status.reason),
        }))
    }

    fn power_down(&self) -> Result<Value, Refused> {
        if self.handle.snapshot().map_err(late)?.status.role == Role::Secondary {
            return Err(Refused::because(
                "only the primary can do this: the guest is the VM there",
            ));
        }
        press(&self.orders)
    }

    fn quit(&self) -> Result<Value, Refused> {
        let answer = self.command(Command::Shutdown);
        self.handle.stop();
        answer
    }
}

impl Operator for LoopOperator {
    fn execute(&self, request: &Request) -> Result<Value, Refused> {
        match request.execute.as_str() {
            "status" => self.status(),
            "query-colo-status" => self.query_colo_status(),
            "query-xen-replication-status" => Ok(json!({ "error": false })),
            "qmp_capabilities" => Ok(json!({})),
            "query-commands" => Ok(KNOWN.iter().map(|name| json!({ "name": name })).collect()),
            "quit" => self.quit(),
            "system_powerdown" => self.power_down(),
            "save" => Err(Refused::because(
                "only a VM without protection (colod run) is saved to a file; a pair keeps its state on the other host",
            )),
            _ => self.command(command(request)?),
        }
    }
}

impl Source for LoopOperator {
    fn snapshot(&self) -> Result<Snapshot, String> {
        self.handle.snapshot().map_err(|error| error.to_string())
    }

    fn status(&self) -> Result<Value, String> {
        Self::status(self).map_err(|refused| refused.desc)
    }
}

/// The loop's command for a request.
fn command(request: &Request) -> Result<Command, Refused> {
    Ok(match request.execute.as_str() {
        "checkpoint" => Command::CheckpointNow,
        "x-colo-lost-heartbeat" => Command::LostHeartbeat,
        "failover" => Command::FailOver,
        "detach" => Command::Detach,
        "attach" => Command::Attach,
        "override" => {
            if request.arguments.get("the-other-host-is-off") != Some(&Value::Bool(true)) {
                return Err(Refused::because(OVERRIDE));
            }
            Command::Override
        }
        "stop" => Command::Stop,
        "cont" => Command::Continue,
        "migrate-set-parameters" => Command::CheckpointDelay(checkpoint_delay(request)?),
        "set-mode" => Command::SetMode(match text(request, "mode")? {
            "standby" => Mode::Standby,
            "lockstep" => Mode::Lockstep,
            other => {
                return Err(Refused::because(format!(
                    "mode is {other:?}, expected standby or lockstep"
                )));
            }
        }),
        "xen-set-replication" => Command::XenSetReplication {
            enable: flag(request, "enable")?,
            role: if flag(request, "primary")? {
                Role::Primary
            } else {
                Role::Secondary
            },
            failover: request
                .arguments
                .contains_key("failover")
                .then(|| flag(request, "failover"))
                .transpose()?,
        },
        "xen-colo-do-checkpoint" => Command::XenDoCheckpoint,
        other => return Err(Refused::unknown(other, &KNOWN)),
    })
}

fn checkpoint_delay(request: &Request) -> Result<Duration, Refused> {
    let known = ["x-checkpoint-delay"];
    if let Some(other) = request
        .arguments
        .keys()
        .find(|key| !known.contains(&key.as_str()))
    {
        return Err(Refused::because(format!(
            "parameter {other:?} is not known, only x-checkpoint-delay is"
        )));
    }
    request
        .arguments
        .get("x-checkpoint-delay")
        .and_then(Value::as_u64)
        .map(Duration::from_millis)
        .ok_or_else(|| Refused::because("x-checkpoint-delay: expected a number of milliseconds"))
}

fn text<'a>(request: &'a Request, key: &str) -> Result<&'a str, Refused> {
    request
        .arguments
        .get(key)
        .and_then(Value::as_str)
        .ok_or_else(|| Refused::because(format!("{}: expected {key:?}, a text", request.execute)))
}

fn flag(request: &Request, key: &str) -> Result<bool, Refused> {
    request
        .arguments
        .get(key)
        .and_then(Value::as_bool)
        .ok_or_else(|| {
            Refused::because(format!(
                "{}: expected {key:?}, true or false",
                request.execute
            ))
        })
}

fn late(error: AskError) -> Refused {
    Refused::because(error.to_string())
}

/// Everything an operator wants to know.
fn status(name: &str, snapshot: &Snapshot) -> Value {
    let Snapshot { status, stats, .. } = snapshot;
    let role = match status.role {
        Role::Primary => "primary",
        Role::Secondary => "secondary",
    };
    json!({
        "vm": name,
        "role": role,
        "protected": status.protected,
        "unprotected-reason": status.unprotected.map(|why| why.to_string()),
        "mode": mode_name(status.mode),
        "phase": status.phase,
        "epoch": status.epoch.0,
        "generation": status.generation.0,
        "member": format!("{:?}", status.member),
        "stopped": status.stopped,
        "replica-valid": status.replica_valid,
        "checkpoint-delay-ms": micros(status.checkpoint_delay) / 1_000,
        "checkpoints": stats.checkpoints,
        "aborted": stats.aborted,
        "pages": stats.pages,
        "sync-pages": stats.sync_pages,
        "released": stats.released,
        "dropped": stats.dropped,
        "inputs": stats.inputs,
        "last-pause-us": micros(stats.last.pause),
        "longest-pause-us": micros(stats.longest_pause),
        "last-checkpoint-us": micros(stats.last.total()),
        "loop-turns": snapshot.driver.turns,
        "loop-longest-turn-us": micros(snapshot.driver.longest_turn),
        "colo": {
            "mode": colo_mode(status.colo_mode),
            "last-mode": colo_mode(status.last_mode),
            "reason": exit_reason(status.reason),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(line: Value) -> Request {
        serde_json::from_value(line).unwrap()
    }

    #[test]
    fn qemus_commands_become_the_loops() {
        let delay = json!({
            "execute": "migrate-set-parameters",
            "arguments": { "x-checkpoint-delay": 20 },
        });
        let expected = Command::CheckpointDelay(Duration::from_millis(20));
        assert_eq!(command(&request(delay)), Ok(expected));
        let stop = json!({
            "execute": "xen-set-replication",
            "arguments": { "enable": false, "primary": true, "failover": true },
        });
        let expected = Command::XenSetReplication {
            enable: false,
            role: Role::Primary,
            failover: Some(true),
        };
        assert_eq!(command(&request(stop)), Ok(expected));
    }

    #[test]
    fn what_is_not_understood_is_refused_with_what_was_expected() {
        for (line, expected) in [
            (
                json!({ "execute": "migrate-set-parameters" }),
                "milliseconds",
            ),
            (
                json!({ "execute": "migrate-set-parameters", "arguments": { "max-bandwidth": 1 } }),
                "only x-checkpoint-delay",
            ),
            (
                json!({ "execute": "set-mode", "arguments": { "mode": "fast" } }),
                "standby or lockstep",
            ),
            (
                json!({ "execute": "xen-set-replication", "arguments": { "enable": 1 } }),
                "true or false",
            ),
            (json!({ "execute": "statsu" }), "did you mean status?"),
        ] {
            let refused = command(&request(line)).unwrap_err();
            assert!(refused.desc.contains(expected), "{}", refused.desc);
        }
    }
}
