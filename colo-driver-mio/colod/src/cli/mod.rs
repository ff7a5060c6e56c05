//! The command line of `colod`.
//!
//! | file | holds |
//! |---|---|
//! | `args.rs` | the command line and its help |
//! | `logging.rs` | where logs go |
//! | `signals.rs` | Ctrl-C and TERM |
//! | `daemon.rs` | `colod primary`, `colod secondary` |
//! | `fate.rs` | what becomes of a daemon when its guest will not go on |
//! | `run.rs` | `colod run`, `colod restore`: a VM without protection |
//! | `operator.rs`, `report.rs` | what the control socket does and says |
//! | `qemu.rs` | `colod inspect`, `standby`, `feed`: beside an unmodified QEMU |
//! | `say.rs` | standard output and standard error |
//! | `ctl.rs` | `colod ctl`: talks to a running daemon |
//! | `demo/` | `colod demo`: the main job on one machine |

mod args;
mod control;
mod ctl;
mod daemon;
mod demo;
mod fate;
mod logging;
mod operator;
mod progress;
mod qemu;
pub(crate) mod report;
mod run;
mod say;
mod signals;

use std::process::ExitCode;

use crate::config::{Config, Purpose};
use clap::Parser as _;
use colo_proto::node::Start;

use args::{Cli, Command};

/// An error as a person reads it: one line that says what, where and what to do.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs the command that the program was called with, and says with what status to exit.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Check(args) => check(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Inspect(args) => qemu::inspect(&args),
        Command::Standby(args) => qemu::standby(&args),
        Command::Feed(args) => qemu::feed(&args),
        Command::Run(args) => run::run(&args, None),
        Command::Restore(args) => run::run(&args.daemon, Some(&args.file)),
        Command::Primary(args) => daemon::run(&args, Start::Primary),
        Command::Secondary(args) => daemon::run(&args, Start::Secondary),
        Command::Save(args) => ctl::save(&args),
    };
    match done {
        Ok(code) => code,
        Err(failure) => say::give_up(&failure),
    }
}

/// `colod check`.
fn check(args: &args::ConfigArgs) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.config, Purpose::Check)?;
    for warning in config.warnings() {
        say::complain(format_args!("colod: warning: {warning}"));
    }
    daemon::rehearse(&config)?;
    let pair = match &config.pair {
        Some(pair) => format!("node {} of pair {}", pair.node, pair.id),
        None => "no pair, so only `colod run` can use it".into(),
    };
    say::say(format_args!(
        "{}: good: {} with {} vCPU, {} of memory; {pair}",
        args.config.display(),
        config.vm.name,
        config.vm.vcpus,
        config.vm.memory
    ))?;
    Ok(ExitCode::SUCCESS)
}
