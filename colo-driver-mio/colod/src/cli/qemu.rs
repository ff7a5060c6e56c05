//! `colod inspect`, `colod standby`, `colod feed`: beside an unmodified QEMU.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    config::{Log, LogFormat},
    qemu::{
        Stop,
        feed::{self, FeedArgs},
        inspect::{self, InspectArgs},
        standby::{self, Outcome, StandbyArgs},
    },
};
use serde::Serialize;

use crate::{
    cli::Failure,
    cli::logging,
    cli::say::complain,
    cli::signals::{INTERRUPTED, Interrupt},
};

pub(crate) fn inspect(args: &InspectArgs) -> Result<ExitCode, Failure> {
    let report = inspect::inspect(args)?;
    match inspect::print(&report, args.json, &mut io::stdout().lock()) {
        // Whoever reads it has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed?,
    }
    Ok(match report.fault {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    })
}

pub(crate) fn standby(args: &StandbyArgs) -> Result<ExitCode, Failure> {
    let (stop, _interrupt) = interruptible()?;
    let mut shown = None;
    let outcome = standby::run(args, &stop, &mut |event| {
        // A person wants to see that it lives, not twenty lines a second.
        let checkpoint = matches!(event, standby::Event::Whole { epoch: 1.., .. });
        let soon = |at: Instant| at.elapsed() < Duration::from_secs(1);
        if checkpoint && !args.json && shown.is_some_and(soon) {
            return;
        }
        if checkpoint {
            shown = Some(Instant::now());
        }
        say(args.json, &event, || standby_line(&event));
    })?;
    Ok(match outcome {
        Outcome::Resumed(_, Some(status)) if !status.success() => {
            complain(format_args!(
                "colod: the command given by --resume-with ended with {status}"
            ));
            ExitCode::FAILURE
        }
        Outcome::Resumed(..) => ExitCode::SUCCESS,
        _ => ExitCode::from(INTERRUPTED),
    })
}

pub(crate) fn feed(args: &FeedArgs) -> Result<ExitCode, Failure> {
    let (stop, interrupt) = interruptible()?;
    let fed = feed::run(args, &stop, &mut |event| {
        say(args.json, &event, || feed_line(&event));
    });
    match fed {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(feed::FeedError::Stopped) if interrupt.asked() => Ok(ExitCode::from(INTERRUPTED)),
        Err(error) => Err(error.into()),
    }
}

/// Logs to standard error; ends in good order at Ctrl-C.
fn interruptible() -> Result<(Arc<Stop>, Interrupt), Failure> {
    logging::start(&Log {
        level: "info".into(),
        format: LogFormat::Text,
        file: None,
    })?;
    let stop = Arc::new(Stop::new()?);
    let ask = Arc::clone(&stop);
    let interrupt = Interrupt::start(move || ask.ask())?;
    Ok((stop, interrupt))
}

/// Prints an event. Nobody listening is no reason to drop a checkpoint.
fn say(json: bool, event: &impl Serialize, line: impl FnOnce() -> String) {
    let line = if json {
        serde_json::to_string(event).unwrap_or_default()
    } else {
        line()
    };
    let _ = writeln!(io::stdout().lock(), "{line}");
}

fn standby_line(event: &standby::Event) -> String {
    use standby::Event;
    match event {
        Event::Listening { address } => format!("listening on {address}"),
        Event::Connected => "a primary connected".into(),
        Event::Whole {
            epoch: 0, devices, ..
        } => {
            format!(
                "the migration is whole ({devices} bytes of device state); COLO has not begun: no \
                 checkpoint was asked for"
            )
        }
        Event::Whole {
            epoch,
            pages,
            devices,
            came_us,
            answered_us,
            ..
        } => format!(
            "checkpoint {epoch}: {pages} pages, {devices} bytes of device state, came in \
             {came_us} \u{b5}s, answered after {answered_us} \u{b5}s"
        ),
        Event::Lost {
            reason,
            epoch,
            resumes,
        } => match (epoch, resumes) {
            (Some(epoch), true) => format!("{reason}; resuming checkpoint {epoch}"),
            (Some(epoch), false) => format!(
                "{reason}; checkpoint {epoch} is not resumed: the primary is alive or ended in good \
                 order; waiting for it to start anew"
            ),
            (None, _) => format!("{reason}; nothing of it was whole, waiting for another try"),
        },
        Event::Protected { qemu, channels: 0 } => format!("protected, by the rules of {qemu}"),
        Event::Protected { qemu, channels } => {
            format!("protected, by the rules of {qemu}, with {channels} multifd channels")
        }
        Event::NoMonitor { reason } => {
            format!("the primary's monitor cannot be asked: {reason}")
        }
        Event::NotFenced { reason } => format!("{reason}; nothing is resumed yet"),
        Event::Written { bytes, after_us } => {
            format!("wrote {bytes} bytes, {after_us} \u{b5}s after the loss")
        }
        Event::NotWritten { reason } => reason.clone(),
        Event::Piped { bytes, after_us } => {
            format!("the command took {bytes} bytes, {after_us} \u{b5}s after the loss")
        }
    }
}

fn feed_line(event: &feed::Event) -> String {
    use feed::Event;
    match event {
        Event::Ready { bytes } => format!("the secondary is ready after {bytes} bytes"),
        Event::Loaded {
            epoch,
            bytes,
            took_us,
        } => format!("checkpoint {epoch} is loaded after {bytes} bytes, it took {took_us} \u{b5}s"),
    }
}
