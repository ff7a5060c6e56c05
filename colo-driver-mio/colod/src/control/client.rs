//! The other end of the control socket.

use std::{
    io::{self, BufReader, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

use super::wire::{Refused, Reply, Request, WireError, line, read_line};

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    path: PathBuf,
    patience: Duration,
}

/// How long a daemon may take for an answer that it has at hand.
const ALIVE: Duration = Duration::from_secs(5);

fn silent(path: &Path, waited: Duration) -> ClientError {
    ClientError::Silent {
        path: path.to_owned(),
        waited,
    }
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
    /// The daemon is there and says nothing.
    #[error(
        "the daemon at {path} has not answered for {waited:?}: it is stopped, or its host is overloaded; what was asked may still be carried out"
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
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
    /// Connects to the daemon that listens at `path`, and waits five seconds for each answer
    /// until [`patience`](Self::patience) says otherwise.
    ///
    /// # Errors
    /// [`ClientError::Connect`]; [`ClientError::Silent`] if so many wait for a stopped daemon that
    /// it takes no more.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let wrong = |error| ClientError::Connect {
            path: path.to_owned(),
            error,
        };
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(wrong)?;
        // A connection waits where the queue of those before it is full, for as long as a write.
        socket.set_write_timeout(Some(ALIVE)).map_err(wrong)?;
        socket.set_read_timeout(Some(ALIVE)).map_err(wrong)?;
        let to = SockAddr::unix(path).map_err(wrong)?;
        socket.connect(&to).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => silent(path, ALIVE),
            _ => wrong(error),
        })?;
        Ok(Self {
            stream: BufReader::new(OwnedFd::from(socket).into()),
            path: path.to_owned(),
            patience: ALIVE,
        })
    }

    /// How long to wait for answers from now on.
    ///
    /// # Errors
    /// A patience of zero.
    pub fn patience(&mut self, patience: Duration) -> io::Result<()> {
        self.patience = patience;
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
        match sent.map_err(|error| (error.kind(), error)) {
            Ok(()) | Err((io::ErrorKind::BrokenPipe, _)) => {}
            Err((io::ErrorKind::WouldBlock, _)) => return Err(silent(&self.path, ALIVE)),
            Err((_, error)) => return Err(WireError::Io(error).into()),
        }
        let mut bytes = Vec::new();
        let more = match read_line(&mut self.stream, &mut bytes) {
            Err(WireError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => false,
            Err(WireError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(silent(&self.path, self.patience));
            }
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
        // Nothing may happen for days.
        let endless = self.stream.get_ref().set_read_timeout(None);
        endless.map_err(WireError::Io)?;
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_daemon_that_is_stopped_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        // It listens, so the kernel takes connections, and nobody ever answers.
        let _stopped = UnixListener::bind(&path).unwrap();
        let mut client = Client::connect(&path).unwrap();
        client.patience(Duration::from_millis(20)).unwrap();
        let error = client.execute("status", json!({})).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("has not answered for 20ms: it is stopped"),
            "{said}"
        );
    }
}
