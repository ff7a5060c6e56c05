//! The socket. Each connection has a thread of its own; the loop never waits for any of them.

use std::{
    fs,
    io::{self, BufReader, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::net::{Shutdown, shutdown};
use serde_json::{Value, json};

use super::{
    hub::{Heard, Hub},
    wire::{Refused, Reply, Request, WireError, line, read_line, reply_line},
};
use colo_driver_mio::remove_stale;

const CONNECTIONS_MOST: usize = 16;
/// A client that does not read for this long is left.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// How long a server that ends waits for answers that are on their way.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How soon a listening connection notices that its client left.
const PROBE: Duration = Duration::from_millis(500);

/// Carries commands out.
pub trait Operator: Send + Sync + 'static {
    /// Carries out one command; may wait.
    ///
    /// # Errors
    /// [`Refused`], with the reason.
    fn execute(&self, request: &Request) -> Result<Value, Refused>;
}

/// A listening control socket; the file is gone when this is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: Arc<UnixListener>,
    end: Arc<AtomicBool>,
    /// Commands that have not been answered.
    open: Arc<AtomicUsize>,
    thread: Option<thread::JoinHandle<()>>,
    hub: Hub,
}

impl Server {
    /// Listens at `path`, for this user only. A socket file that nobody answers behind is
    /// replaced.
    ///
    /// # Errors
    /// `AddrInUse` when a daemon answers there, or it is a file of another kind; else why the file
    /// cannot be made.
    pub fn start(path: &Path, operator: Arc<dyn Operator>, hub: Hub) -> io::Result<Self> {
        if let Some(directory) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            // Of directories such as /run/colo nothing is left after a boot.
            match fs::create_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        remove_stale(path, |path| UnixStream::connect(path).map(drop))?;
        let listener = Arc::new(UnixListener::bind(path)?);
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        let end = Arc::new(AtomicBool::new(false));
        let open = Arc::new(AtomicUsize::new(0));
        let (ended, events, busy) = (Arc::clone(&end), hub.clone(), Arc::clone(&open));
        let accepting = Arc::clone(&listener);
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&accepting, &operator, &events, &ended, &busy))?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            end,
            open,
            thread: Some(thread),
            hub,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.hub.end();
        let start = Instant::now();
        while self.open.load(Ordering::Acquire) > 0 && start.elapsed() < LAST_WORDS {
            thread::sleep(Duration::from_millis(1));
        }
        self.end.store(true, Ordering::Release);
        // The accepting thread waits in accept, which ends with the socket.
        let _ended = shutdown(&self.listener, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
        let _gone = fs::remove_file(&self.path);
    }
}

fn accept(
    listener: &UnixListener,
    operator: &Arc<dyn Operator>,
    hub: &Hub,
    end: &Arc<AtomicBool>,
    busy: &Arc<AtomicUsize>,
) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if end.load(Ordering::Acquire) {
            return;
        }
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "control: a connection could not be accepted");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MOST {
            let refused = Refused::because(format!(
                "{CONNECTIONS_MOST} control connections are open already"
            ));
            let _gone = (&stream).write_all(&reply_line(&Reply::Error(refused), None));
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (operator, hub) = (Arc::clone(operator), hub.clone());
        let (counted, busy) = (Counted(Arc::clone(&open)), Arc::clone(busy));
        let spawned = thread::Builder::new()
            .name("control-client".into())
            .spawn(move || {
                let _counted = counted;
                if let Err(error) = serve(&stream, &*operator, &hub, &busy) {
                    tracing::debug!(%error, "control: a connection ended");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "control: no thread for a connection");
        }
    }
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(
    stream: &UnixStream,
    operator: &dyn Operator,
    hub: &Hub,
    busy: &Arc<AtomicUsize>,
) -> Result<(), WireError> {
    stream.set_write_timeout(Some(WRITE_PATIENCE))?;
    let mut reader = BufReader::new(stream);
    let mut bytes = Vec::new();
    let mut out = stream;
    while match read_line(&mut reader, &mut bytes) {
        Err(error @ WireError::TooLong) => {
            let refused = Refused::because(error.to_string());
            out.write_all(&reply_line(&Reply::Error(refused), None))?;
            return Err(error);
        }
        more => more?,
    } {
        let request: Request = match serde_json::from_slice(&bytes) {
            Ok(request) => request,
            Err(error) => {
                let refused = Refused::because(WireError::Syntax(error).to_string());
                out.write_all(&reply_line(&Reply::Error(refused), None))?;
                continue;
            }
        };
        if request.execute == "events" {
            let listener = hub.listen(request.arguments.get("history") == Some(&Value::Bool(true)));
            out.write_all(&reply_line(&Reply::Return(json!({})), request.id))?;
            return stream_events(stream, &listener);
        }
        busy.fetch_add(1, Ordering::Relaxed);
        let _answered = Counted(Arc::clone(busy));
        let reply = match operator.execute(&request) {
            Ok(value) => Reply::Return(value),
            Err(refused) => Reply::Error(refused),
        };
        out.write_all(&reply_line(&reply, request.id))?;
    }
    Ok(())
}

fn stream_events(stream: &UnixStream, listener: &super::Listener) -> Result<(), WireError> {
    let mut out = stream;
    stream.set_nonblocking(true)?;
    loop {
        match listener.next(PROBE) {
            Heard::Event(event) => {
                stream.set_nonblocking(false)?;
                out.write_all(&line(&event))?;
                stream.set_nonblocking(true)?;
            }
            Heard::Ended => return Ok(()),
            Heard::Nothing => {}
        }
        // Whatever a listening client sends is ignored; an end of its stream is not.
        match io::Read::read(&mut out, &mut [0; 256]) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Client, ClientError};
    use super::*;

    struct Echo;

    impl Operator for Echo {
        fn execute(&self, request: &Request) -> Result<Value, Refused> {
            match request.execute.as_str() {
                "echo" => Ok(Value::Object(request.arguments.clone())),
                name => Err(Refused::unknown(name, &["echo"])),
            }
        }
    }

    fn server() -> (tempfile::TempDir, PathBuf, Server, Hub) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let hub = Hub::default();
        let server = Server::start(&path, Arc::new(Echo), hub.clone()).unwrap();
        (dir, path, server, hub)
    }

    #[test]
    fn a_command_is_answered_or_refused_with_the_reason() {
        let (_dir, path, _server, _hub) = server();
        let mut client = Client::connect(&path).unwrap();
        let arguments = json!({ "a": 1 });
        assert_eq!(
            client.execute("echo", arguments.clone()).unwrap(),
            arguments
        );
        let error = client.execute("ecko", json!({})).unwrap_err();
        let ClientError::Refused(refused) = error else {
            panic!("{error}");
        };
        assert_eq!(refused.class, "CommandNotFound");
    }

    #[test]
    fn rubbish_is_answered_with_an_error_and_the_connection_lives() {
        let (_dir, path, _server, _hub) = server();
        let stream = UnixStream::connect(&path).unwrap();
        let mut reader = BufReader::new(&stream);
        let mut bytes = Vec::new();
        for rubbish in [
            "{",
            "[]",
            "\u{0}\u{7f}",
            "{\"execute\": 1}",
            "{\"exec\": \"x\"}",
        ] {
            (&stream).write_all(rubbish.as_bytes()).unwrap();
            (&stream).write_all(b"\n").unwrap();
            read_line(&mut reader, &mut bytes).unwrap();
            assert!(bytes.starts_with(b"{\"error\""), "{rubbish}");
        }
        (&stream).write_all(b"{\"execute\": \"echo\"}\n").unwrap();
        read_line(&mut reader, &mut bytes).unwrap();
        assert_eq!(bytes, b"{\"return\":{}}\n");
    }

    #[test]
    fn events_reach_whoever_listens_until_the_server_ends() {
        let (_dir, path, server, hub) = server();
        let mut events = Client::connect(&path).unwrap().events(false).unwrap();
        hub.publish(&json!({ "event": "A" }));
        assert_eq!(events.next().unwrap().unwrap()["event"], "A");
        drop(server);
        assert!(events.next().is_none());
        assert!(!path.exists());
    }

    #[test]
    fn a_second_daemon_is_refused_and_a_dead_ones_socket_is_replaced() {
        let (dir, path, _server, _hub) = server();
        let again = Server::start(&path, Arc::new(Echo), Hub::default());
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let stale = dir.path().join("stale.sock");
        drop(UnixListener::bind(&stale).unwrap());
        assert!(stale.exists());
        Server::start(&stale, Arc::new(Echo), Hub::default()).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.toml");
        fs::write(&path, b"precious").unwrap();
        let started = Server::start(&path, Arc::new(Echo), Hub::default());
        assert_eq!(started.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_server_whose_file_is_gone_ends() {
        let (_dir, path, server, _hub) = server();
        fs::remove_file(&path).unwrap();
        let (done, is_done) = std::sync::mpsc::channel();
        thread::spawn(move || {
            drop(server);
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
