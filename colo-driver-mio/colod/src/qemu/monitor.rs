//! Before the guest is resumed: does the primary's monitor say that it lives, and is it fenced?

use std::{
    ffi::OsStr,
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    process::{Command, Stdio},
    time::Duration,
};

use colo_proto::{id::Epoch, time::Instant};
use serde_json::{Value, json};

use super::{
    address::{Address, Stream},
    wait::{Clock, Stop, Woken},
};

/// How long a monitor may take for an answer: a primary that hangs must not hold up the guest.
const PATIENCE: Duration = Duration::from_secs(2);
/// How soon a primary that is between two states is asked again.
const AGAIN: Duration = Duration::from_millis(100);
/// Longest line of a monitor.
const LINE: usize = 1 << 20;

/// What is known of a primary whose link has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Its monitor answers nothing: it is gone, or cannot be reached.
    Gone,
    /// It ended its migration as a plain one and will not run the guest again.
    HandedOver,
    /// It has the guest, or ended it in good order.
    Keeps(String),
}

/// The primary's monitor (QMP), open for as long as the link is.
#[derive(Debug)]
pub(super) struct Monitor {
    stream: Stream,
    bytes: Vec<u8>,
    closed: bool,
    /// Why QEMU ends, once it has said so.
    shutdown: Option<String>,
}

impl Monitor {
    /// Connects and greets.
    pub(super) fn open(address: &Address, clock: Clock, stop: &Stop) -> io::Result<Self> {
        let mut monitor = Self {
            stream: Stream::connect_within(address, PATIENCE)?,
            bytes: Vec::new(),
            closed: false,
            shutdown: None,
        };
        let greeted = monitor.ask("qmp_capabilities", clock.now() + PATIENCE, clock, stop)?;
        match greeted {
            Some(_) => Ok(monitor),
            None => Err(io::Error::other("the monitor does not answer")),
        }
    }

    /// Takes the events that have come, so that they do not pile up.
    pub(super) fn listen(&mut self) {
        while !self.closed && self.read().is_ok_and(|n| n > 0) {
            while self.line().is_some() {}
        }
    }

    /// Asks until the answer is certain or `PATIENCE` is over.
    pub(super) fn verdict(&mut self, clock: Clock, stop: &Stop) -> Verdict {
        let deadline = clock.now() + PATIENCE;
        loop {
            let asked = self.ask("query-status", deadline, clock, stop);
            if let Some(reason) = &self.shutdown {
                return Verdict::Keeps(format!("it ended in good order ({reason})"));
            }
            let Ok(Some(status)) = asked else {
                return Verdict::Gone;
            };
            let state = status["status"].as_str().unwrap_or("unknown");
            match state {
                "postmigrate" => return Verdict::HandedOver,
                _ if status["running"] == true => {
                    return Verdict::Keeps("its guest runs".into());
                }
                "shutdown" | "guest-panicked" => {
                    return Verdict::Keeps(format!("its guest has ended ({state})"));
                }
                _ if clock.now() >= deadline => {
                    return Verdict::Keeps(format!("its guest stands ({state}): decide there"));
                }
                _ => {
                    if clock.pause(clock.now() + AGAIN, stop).unwrap_or(true) {
                        return Verdict::Keeps(format!("its guest stands ({state})"));
                    }
                }
            }
        }
    }

    /// Runs a command; `None` if the monitor closes or does not answer in time.
    fn ask(
        &mut self,
        command: &str,
        deadline: Instant,
        clock: Clock,
        stop: &Stop,
    ) -> io::Result<Option<Value>> {
        let line = format!("{}\n", json!({ "execute": command }));
        // A few bytes fit any socket; a monitor that is closed may still have said why.
        let sent = (&self.stream).write_all(line.as_bytes());
        loop {
            while let Some(mut answer) = self.line() {
                if let Some(value) = answer.get_mut("return") {
                    return Ok(Some(value.take()));
                }
                if let Some(error) = answer.get("error") {
                    return Err(io::Error::other(error.to_string()));
                }
            }
            if self.closed || sent.is_err() && self.read()? == 0 {
                return Ok(None);
            }
            match clock.wait(self.stream.as_fd(), false, Some(deadline), stop)? {
                Woken::Ready => {
                    self.read()?;
                }
                Woken::Deadline | Woken::Stop => return Ok(None),
            }
        }
    }

    fn read(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 4096];
        match (&self.stream).read(&mut buffer) {
            Ok(n) => {
                self.closed |= n == 0;
                if self.bytes.len() > LINE {
                    self.closed = true;
                    return Err(io::Error::other("the monitor sends no lines"));
                }
                self.bytes
                    .extend_from_slice(buffer.get(..n).unwrap_or_default());
                Ok(n)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
            // It is gone.
            Err(_) => {
                self.closed = true;
                Ok(0)
            }
        }
    }

    /// The next whole line. An event that QEMU ends is taken note of.
    fn line(&mut self) -> Option<Value> {
        let end = self.bytes.iter().position(|b| *b == b'\n')?;
        let line: Vec<u8> = self.bytes.drain(..=end).collect();
        let value: Value = serde_json::from_slice(&line).unwrap_or_default();
        if value["event"] == "SHUTDOWN" {
            let reason = value["data"]["reason"].as_str().unwrap_or("shutdown");
            self.shutdown = Some(reason.to_owned());
        }
        Some(value)
    }
}

/// Runs the fence; only its success lets the guest be resumed.
pub(super) fn fence(command: &OsStr, epoch: Epoch) -> io::Result<()> {
    let status = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .env("COLO_EPOCH", epoch.to_string())
        .stdin(Stdio::null())
        .status()?;
    if status.success() {
        return Ok(());
    }
    Err(io::Error::other(status.to_string()))
}
