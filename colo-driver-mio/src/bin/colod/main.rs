//! `colod`: two hosts, one VM.
//!
//! | file | holds |
//! |---|---|
//! | `cli.rs` | the command line and its help |
//! | `logging.rs` | where logs go |
//! | `signals.rs` | Ctrl-C and TERM |
//! | `qemu.rs` | `colod inspect`, `standby`, `feed`: beside an unmodified QEMU |
//! | `ctl.rs` | `colod ctl`: talks to a running daemon |
//! | `demo/` | `colod demo`: the main job on one machine |

mod cli;
mod ctl;
mod demo;
mod logging;
mod qemu;
mod signals;

use std::process::ExitCode;

use clap::Parser as _;
use colo_driver_mio::config::{Config, Purpose};

use cli::{Cli, Command};

/// An error as a person reads it: one line that says what, where and what to do.
type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Check(args) => check(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Inspect(args) => qemu::inspect(&args),
        Command::Standby(args) => qemu::standby(&args),
        Command::Feed(args) => qemu::feed(&args),
        other => Err(format!("{other:?}: not yet").into()),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("colod: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// `colod check`.
fn check(args: &cli::ConfigArgs) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.config, Purpose::Check)?;
    let pair = match &config.pair {
        Some(pair) => format!("node {} of pair {}", pair.node, pair.id),
        None => "no pair, so only `colod run` can use it".into(),
    };
    println!(
        "{}: good: {} with {} vCPU, {} of memory; {pair}",
        args.config.display(),
        config.vm.name,
        config.vm.vcpus,
        config.vm.memory
    );
    Ok(ExitCode::SUCCESS)
}
