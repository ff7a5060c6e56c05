//! `colod ctl`: one question to a running daemon, answered for a person or for a machine.

use std::{process::ExitCode, time::Duration};

use crate::{config::Span, control::Client};
use serde_json::{Value, json};

use crate::{
    cli::Failure,
    cli::args::{Ask, CtlArgs, SaveArgs, Setting},
    cli::say::say,
};

/// A checkpoint over a slow link takes a while; a daemon that says nothing for this long hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// The state of a large VM on a slow disk.
const SAVE_PATIENCE: Duration = Duration::from_secs(3600);

/// Asks and prints.
pub(crate) fn run(args: &CtlArgs) -> Result<ExitCode, Failure> {
    let mut client = Client::connect(&args.socket)?;
    let (command, arguments) = request(&args.ask)?;
    if command == "events" {
        // More follows than one answer, also when it was asked for raw.
        let json = args.json || matches!(args.ask, Ask::Raw { .. });
        return events(client, &arguments, json);
    }
    alive(&mut client, PATIENCE)?;
    let answer = client.execute(&command, arguments)?;
    match (args.json, &args.ask) {
        (true, _) => say(answer)?,
        (false, Ask::Status) => say(status(&answer))?,
        (false, Ask::Raw { .. }) => say(format_args!("{answer:#}"))?,
        (false, _) => say("done")?,
    }
    Ok(ExitCode::SUCCESS)
}

/// `colod save`.
pub(crate) fn save(args: &SaveArgs) -> Result<ExitCode, Failure> {
    let file = std::path::absolute(&args.file)?;
    let mut client = Client::connect(&args.socket)?;
    alive(&mut client, SAVE_PATIENCE)?;
    client.execute("save", json!({ "file": file }))?;
    say(format_args!("{}: saved; the VM runs on", file.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Asks for what every daemon has at hand, so that one that is stopped is found out at once, and
/// then has the patience for what may take a while.
fn alive(client: &mut Client, then: Duration) -> Result<(), Failure> {
    client.execute("query-colo-status", json!({}))?;
    Ok(client.patience(then)?)
}

/// The command of the socket, and its arguments.
fn request(ask: &Ask) -> Result<(String, Value), Failure> {
    let (command, arguments) = match ask {
        Ask::Status => ("status", json!({})),
        Ask::Checkpoint => ("checkpoint", json!({})),
        Ask::Failover => ("failover", json!({})),
        Ask::LostHeartbeat => ("x-colo-lost-heartbeat", json!({})),
        Ask::Set { key, value } => match key {
            Setting::CheckpointDelay => {
                let span: Span = value.parse()?;
                let ms = u64::try_from(span.0.as_millis())?;
                (
                    "migrate-set-parameters",
                    json!({ "x-checkpoint-delay": ms }),
                )
            }
            Setting::Mode => ("set-mode", json!({ "mode": value })),
        },
        Ask::Detach => ("detach", json!({})),
        Ask::Attach => ("attach", json!({})),
        Ask::Override {
            the_other_host_is_off,
        } => (
            "override",
            json!({ "the-other-host-is-off": the_other_host_is_off }),
        ),
        Ask::Stop => ("stop", json!({})),
        Ask::Cont => ("cont", json!({})),
        Ask::Powerdown => ("system_powerdown", json!({})),
        Ask::Quit => ("quit", json!({})),
        Ask::Raw { command, arguments } => {
            let arguments: Value = serde_json::from_str(arguments)
                .map_err(|error| format!("arguments {arguments:?}: {error}"))?;
            return Ok((command.clone(), arguments));
        }
        Ask::Events { history } => ("events", json!({ "history": history })),
    };
    Ok((command.to_owned(), arguments))
}

fn events(client: Client, arguments: &Value, as_json: bool) -> Result<ExitCode, Failure> {
    for event in client.events(arguments["history"] == true)? {
        let event = event?;
        if as_json {
            say(event)?;
        } else {
            say(event_line(&event))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An event in a line: its name, then its data as `key=value`.
fn event_line(event: &Value) -> String {
    let mut line = plain(&event["event"]);
    if let Some(data) = event["data"].as_object() {
        for (key, value) in data {
            line += &format!(" {key}={}", plain(value));
        }
    }
    line
}

/// The status as a small table.
fn status(status: &Value) -> String {
    let Some(fields) = status.as_object() else {
        return plain(status);
    };
    let width = fields.keys().map(String::len).max().unwrap_or_default();
    let lines: Vec<String> = fields
        .iter()
        .map(|(key, value)| format!("{key:width$}  {}", plain(value)))
        .collect();
    lines.join("\n")
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| format!("{key} {}", plain(value)))
            .collect::<Vec<_>>()
            .join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_becomes_qemus_command() {
        let ask = Ask::Set {
            key: Setting::CheckpointDelay,
            value: "50ms".into(),
        };
        let (command, arguments) = request(&ask).unwrap();
        assert_eq!(command, "migrate-set-parameters");
        assert_eq!(arguments, json!({ "x-checkpoint-delay": 50 }));
    }

    #[test]
    fn an_event_is_a_line() {
        let event = json!({ "event": "COLO_EXIT", "data": { "mode": "primary" }, "timestamp": {} });
        assert_eq!(event_line(&event), "COLO_EXIT mode=primary");
    }

    #[test]
    fn a_status_is_a_table() {
        let text = status(&json!({ "role": "primary", "epoch": 3 }));
        assert!(text.lines().any(|line| line == "role   primary"), "{text}");
    }
}
