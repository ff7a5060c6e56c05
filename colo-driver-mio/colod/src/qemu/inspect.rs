//! `colod inspect`: what is in a captured stream.

mod report;
mod text;

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::PathBuf,
};

use clap::Args;
use colo_proto::qemu::{Expectation, Item, Limits, Reader, Writer};
use thiserror::Error;

pub use self::report::{Block, Checkpoint, Device, Fault, Initial, Report};
use super::capture::{self, Visitor, WalkError};

/// Show what is in a captured QEMU COLO stream.
///
/// Prints the header, the machine, the RAM blocks, the sections, and for every checkpoint its
/// pages by kind, its bytes and its device sections. In a damaged file it prints what came before
/// the first fault, and the fault: offset, place, field, what was there and what should have been.
/// Exit status 1 then.
#[derive(Clone, Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    colod inspect session.p2s\n  \
    colod inspect session.p2s.xz --json | jq .checkpoints[0]\n  \
    socat -u tcp-listen:4444 - | colod inspect -\n  \
    colod inspect session.p2s --reencode copy.p2s && cmp session.p2s copy.p2s")]
pub struct InspectArgs {
    /// The captured stream, plain or xz; - is standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// One JSON object instead of text.
    #[arg(long)]
    pub json: bool,
    /// Write what was understood to this file; the same bytes, up to the first fault.
    #[arg(long, value_name = "OUT")]
    pub reencode: Option<PathBuf>,
}

/// Why a capture could not be inspected. A damaged one can.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InspectError {
    /// The capture cannot be opened or read.
    #[error("{}: {error}", .file.display())]
    Read {
        /// The capture.
        file: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// The copy cannot be written.
    #[error("{}: {error}", .file.display())]
    Write {
        /// The copy.
        file: PathBuf,
        /// The system's word.
        error: io::Error,
    },
}

/// Reads the capture and tells what is in it.
///
/// # Errors
/// Only if a file cannot be read or written; faults of the stream are in the report.
pub fn inspect(args: &InspectArgs) -> Result<Report, InspectError> {
    let read = |error| InspectError::Read {
        file: args.file.clone(),
        error,
    };
    let write = |error| InspectError::Write {
        file: args.reencode.clone().unwrap_or_default(),
        error,
    };
    let source = capture::open(&args.file).map_err(read)?;
    let copy: Box<dyn Write> = match &args.reencode {
        Some(path) => Box::new(BufWriter::new(File::create(path).map_err(write)?)),
        None => Box::new(io::sink()),
    };
    let mut reader = Reader::new(Limits::default(), Expectation::default());
    let mut inspector = Inspector {
        report: Report::default(),
        copy,
        writer: Writer::new(),
        encoded: Vec::new(),
    };
    let walked = capture::walk(source, &mut reader, &mut inspector);
    let fault = match walked {
        Ok(()) => None,
        Err(WalkError::Stream(fault)) => Some(fault),
        Err(WalkError::Read(error)) => return Err(read(error)),
        Err(WalkError::Visitor(error)) => return Err(write(error)),
    };
    inspector.copy.flush().map_err(write)?;
    let mut report = inspector.report;
    report.end(&reader, fault.as_ref());
    Ok(report)
}

/// Prints a report.
///
/// # Errors
/// If `out` cannot be written.
pub fn print(report: &Report, json: bool, out: &mut dyn Write) -> io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, report)?;
        return writeln!(out);
    }
    text::print(report, out)
}

struct Inspector {
    report: Report,
    copy: Box<dyn Write>,
    writer: Writer,
    encoded: Vec<u8>,
}

impl Visitor for Inspector {
    type Error = io::Error;

    fn item(&mut self, item: &Item, reader: &Reader) -> io::Result<()> {
        self.encoded.clear();
        self.writer
            .write(item, &mut self.encoded)
            .map_err(io::Error::other)?;
        self.copy.write_all(&self.encoded)?;
        self.report.add(item, reader.offset());
        Ok(())
    }

    fn page(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.copy.write_all(bytes)
    }

    fn raw(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}
