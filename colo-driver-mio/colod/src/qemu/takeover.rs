//! A checkpoint as a migration stream, into a file or a command's standard input.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, BufWriter, Write},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
};

use colo_proto::{
    id::Epoch,
    qemu::{Resume, Segment, session::State},
};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::{
    image::{Image, is_zero},
    wait::{Clock, Stop, Woken},
};

/// Writes the whole stream that `-incoming` loads; returns its length in bytes.
pub(super) fn write(state: &State, image: &Image, out: impl Write) -> io::Result<u64> {
    let mut out = BufWriter::with_capacity(1 << 18, out);
    let mut resume = Resume::new(
        &state.configuration,
        state.ram,
        image.table().clone(),
        &state.devices,
        Some(&state.description),
    );
    let mut length = 0;
    while let Some(segment) = resume.poll(|page| is_zero(image.page(page))) {
        let bytes = match &segment {
            Segment::Bytes(bytes) => bytes,
            Segment::Page(page) => image.page(*page),
            other => return Err(io::Error::other(format!("{other:?} cannot be written"))),
        };
        out.write_all(bytes)?;
        length += bytes.len() as u64;
    }
    out.flush()?;
    Ok(length)
}

/// What closes the stream after the last page: end of RAM, device sections, description.
pub(super) fn tail(state: &State) -> Vec<u8> {
    Resume::tail(state.ram, &state.devices, Some(&state.description))
}

/// Whether a file could be written here. At the takeover it would be too late to find out.
pub(super) fn can_write(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let partial = partial(path);
    File::create(&partial)?;
    std::fs::remove_file(&partial)
}

fn partial(path: &Path) -> OsString {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    partial
}

/// Writes a stream to a file that is there whole or not at all.
pub(super) fn to_file(
    path: &Path,
    write: impl FnOnce(&File) -> io::Result<u64>,
) -> io::Result<u64> {
    let partial = partial(path);
    let written = File::create(&partial).and_then(|file| {
        let length = write(&file)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)?;
        Ok(length)
    });
    if written.is_err() {
        // Half a stream is of no use, and the room that it takes may be what --state lacks.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

/// Runs a shell command with a stream on its standard input, and waits for its end. If `stop` is
/// asked meanwhile the command is asked in turn, and whatever it started.
pub(super) fn to_command(
    epoch: Epoch,
    command: &OsStr,
    stop: &Stop,
    write: impl FnOnce(ChildStdin) -> io::Result<u64>,
    piped: impl FnOnce(u64),
) -> io::Result<ExitStatus> {
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .env("COLO_EPOCH", epoch.to_string())
        .stdin(Stdio::piped())
        // A signal for the shell alone would leave QEMU behind.
        .process_group(0)
        .spawn()?;
    let stdin = child.stdin.take();
    let written = std::thread::scope(|scope| {
        // Beside the writing, which lasts for as long as the command does not read.
        let forwarding = scope.spawn(|| forward(&child, stop));
        let written = match stdin {
            Some(stdin) => write(stdin),
            None => Err(io::Error::other("the command has no standard input")),
        };
        let written = written.map(piped);
        if let Ok(Err(error)) = forwarding.join() {
            tracing::warn!("a signal would not reach the command: {error}");
        }
        written
    });
    // Only now: its number cannot become another process's while it may be sent a signal.
    let status = child.wait()?;
    match written {
        // It ended before it had read all: its status says more than the broken pipe.
        Err(error) if status.success() => Err(error),
        _ => Ok(status),
    }
}

/// Sends TERM to the process group of `child` if `stop` is asked before its end.
fn forward(child: &Child, stop: &Stop) -> io::Result<()> {
    let pid = Pid::from_child(child);
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    if Clock::start().wait(ended.as_fd(), false, None, stop)? == Woken::Stop {
        kill_process_group(pid, Signal::TERM)?;
    }
    Ok(())
}
