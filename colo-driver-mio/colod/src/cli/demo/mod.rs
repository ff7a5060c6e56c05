//! `colod demo`: the main job on one machine, as a story.
//!
//! | file | holds |
//! |---|---|
//! | `story.rs` | what is done, step by step |
//! | `timeline.rs` | how it is told |

mod story;
mod timeline;

use std::process::ExitCode;

use crate::{cli::Failure, cli::args::DemoArgs, cli::say::complain, cli::signals};

/// Runs the demo.
pub(crate) fn run(args: &DemoArgs) -> Result<ExitCode, Failure> {
    let interrupt = signals::Interrupt::start(|| {})?;
    match story::tell(args, &interrupt) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        Err(_) if interrupt.asked() => {
            complain("colod: interrupted; both daemons were ended");
            Ok(ExitCode::from(signals::INTERRUPTED))
        }
        Err(failure) => Err(failure),
    }
}
