//! What `colod` prints. Whoever reads may stop reading, and a disk may be full: neither is a panic.

use std::{
    fmt::Display,
    io::{self, Write as _},
    process::ExitCode,
};

use crate::cli::Failure;

/// What a shell says of a program that wrote to a pipe nobody reads: 128 and SIGPIPE.
const NOBODY_READS: u8 = 141;

/// Standard output takes nothing more.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
pub(crate) struct Mute(#[from] io::Error);

/// Prints a line, now.
pub(crate) fn say(line: impl Display) -> Result<(), Mute> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// Prints a line for people, on standard error; if that is closed too, nobody wants to know.
pub(crate) fn complain(line: impl Display) {
    let _closed = writeln!(io::stderr().lock(), "{line}");
}

/// Says why a command failed, unless its reader just left.
pub(crate) fn give_up(failure: &Failure) -> ExitCode {
    if let Some(Mute(error)) = failure.downcast_ref()
        && error.kind() == io::ErrorKind::BrokenPipe
    {
        return ExitCode::from(NOBODY_READS);
    }
    complain(format_args!("colod: {failure}"));
    ExitCode::FAILURE
}
