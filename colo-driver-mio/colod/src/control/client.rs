//! The other end of the control socket.

use std::{
    io::{self, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value, json};

use super::wire::{Refused, Reply, Request, WireError, line, read_line};

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

/// A command that brought nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No daemon answers there.
    #[error(
        "no daemon answers at {path}: {error}; is colod running, and does its control.socket say so?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The daemon ended before it answered.
    #[error("the daemon at {0} ended before it answered")]
    Ended(PathBuf),
    /// What came is no reply.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] Refused),
}

impl Client {
    /// Connects to the daemon that listens at `path`.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|error| ClientError::Connect {
            path: path.to_owned(),
            error,
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
            path: path.to_owned(),
        })
    }

    /// How long to wait for an answer; for ever if not said.
    ///
    /// # Errors
    /// A patience of zero.
    pub fn patience(&self, patience: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(patience))
    }

    /// Has a command carried out and waits for the answer.
    ///
    /// # Errors
    /// [`ClientError`]; [`Refused`](ClientError::Refused) with the daemon's own words.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let arguments = match arguments {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        let request = Request {
            execute: command.into(),
            arguments,
            id: None,
        };
        let value = serde_json::to_value(&request).map_err(WireError::Syntax)?;
        let sent = self.stream.get_mut().write_all(&line(&value));
        if let Err(error) = sent
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(WireError::Io(error).into());
        }
        let mut bytes = Vec::new();
        let more = match read_line(&mut self.stream, &mut bytes) {
            Err(WireError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => false,
            more => more?,
        };
        if !more {
            return Err(ClientError::Ended(self.path.clone()));
        }
        match serde_json::from_slice(&bytes).map_err(WireError::Syntax)? {
            Reply::Return(value) => Ok(value),
            Reply::Error(refused) => Err(refused.into()),
        }
    }

    /// Listens to events until the daemon ends: from now on, or also to those of the past that it
    /// still remembers.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn events(
        mut self,
        history: bool,
    ) -> Result<impl Iterator<Item = Result<Value, WireError>> + Send, ClientError> {
        self.execute("events", json!({ "history": history }))?;
        let (mut bytes, mut ended) = (Vec::new(), false);
        Ok(std::iter::from_fn(move || {
            if ended {
                return None;
            }
            match read_line(&mut self.stream, &mut bytes) {
                Ok(true) => Some(serde_json::from_slice(&bytes).map_err(WireError::Syntax)),
                Ok(false) => None,
                Err(error) => {
                    ended = true;
                    Some(Err(error))
                }
            }
        }))
    }
}
