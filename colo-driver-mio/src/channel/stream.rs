//! TCP and Unix stream sockets behind one type, with the options this crate wants on them.

use core::time::Duration;
use std::{
    fs,
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
};

use colo_proto::id::Channel;
use mio::{
    Interest, Registry, Token,
    event::Source,
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use socket2::{SockRef, TcpKeepalive};

use crate::Endpoint;

/// Buffers of RAM lanes over Unix sockets, which unlike TCP's do not grow by themselves.
const UNIX_BUFFER: usize = 4 << 20;

/// A connected or connecting socket.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Begins to connect.
    pub(crate) fn dial(to: &Endpoint) -> io::Result<Self> {
        match to {
            Endpoint::Tcp(at) => TcpStream::connect(*at).map(Self::Tcp),
            Endpoint::Unix(path) => UnixStream::connect(path).map(Self::Unix),
        }
    }

    /// Whether the connection stands. To be asked when the socket was reported writable.
    pub(crate) fn connected(&self) -> io::Result<bool> {
        let (error, peer) = match self {
            Self::Tcp(s) => (s.take_error()?, s.peer_addr().map(|_| ())),
            Self::Unix(s) => (s.take_error()?, s.peer_addr().map(|_| ())),
        };
        if let Some(error) = error {
            return Err(error);
        }
        match peer {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Who called, in words. Not from which port: each attempt has another.
    pub(crate) fn caller(&self) -> String {
        let from = match self {
            Self::Tcp(s) => s.peer_addr().ok(),
            Self::Unix(_) => None,
        };
        from.map_or_else(|| "a caller".into(), |at| format!("caller {}", at.ip()))
    }

    /// Options for the time of the handshake: small messages leave at once.
    pub(crate) fn set_handshake_options(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_nodelay(true),
            Self::Unix(_) => Ok(()),
        }
    }

    /// Options for the channel.
    ///
    /// The kernel's silence limit is tight on the control channel alone: it also counts the time
    /// that a peer keeps its window shut, and a RAM lane may rightly be held back for long. When
    /// control goes, the machine leaves the peer and the others go with it.
    pub(crate) fn set_channel_options(
        &self,
        channel: Channel,
        silence: Duration,
        buffer: Option<usize>,
    ) -> io::Result<()> {
        let socket = SockRef::from(self);
        match self {
            Self::Tcp(_) => {
                let silence = match channel {
                    Channel::Control => silence,
                    _ => silence.saturating_mul(10),
                };
                socket.set_tcp_user_timeout(Some(silence))?;
                let second = Duration::from_secs(1);
                socket.set_tcp_keepalive(
                    &TcpKeepalive::new()
                        .with_time(second)
                        .with_interval(second)
                        .with_retries(3),
                )?;
                // Left alone, the kernel sizes the buffers by what the path carries.
                if let Some(buffer) = buffer {
                    set_buffers(self, buffer)?;
                }
            }
            Self::Unix(_) => {
                let bulk = matches!(channel, Channel::Ram(_) | Channel::Disk);
                if let Some(buffer) = buffer.or_else(|| bulk.then_some(UNIX_BUFFER)) {
                    set_buffers(self, buffer)?;
                }
            }
        }
        Ok(())
    }

    /// No more bytes will be sent.
    pub(crate) fn finish(&self) {
        let closed = match self {
            Self::Tcp(s) => s.shutdown(Shutdown::Write),
            Self::Unix(s) => s.shutdown(Shutdown::Write),
        };
        if let Err(error) = closed {
            tracing::trace!(%error, "the peer had closed first");
        }
    }
}

/// Sets both buffers, beyond the limit for ordinary processes where that is allowed.
fn set_buffers(stream: &Stream, bytes: usize) -> io::Result<()> {
    let socket = SockRef::from(stream);
    if set_socket_send_buffer_size_force(stream, bytes).is_err() {
        socket.set_send_buffer_size(bytes)?;
    }
    if set_socket_recv_buffer_size_force(stream, bytes).is_err() {
        socket.set_recv_buffer_size(bytes)?;
    }
    Ok(())
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(s) => s.as_fd(),
            Self::Unix(s) => s.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(into),
            Self::Unix(s) => s.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(from),
            Self::Unix(s) => s.write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Source for Stream {
    fn register(&mut self, r: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.register(r, token, interests),
            Self::Unix(s) => s.register(r, token, interests),
        }
    }

    fn reregister(&mut self, r: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.reregister(r, token, interests),
            Self::Unix(s) => s.reregister(r, token, interests),
        }
    }

    fn deregister(&mut self, r: &Registry) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.deregister(r),
            Self::Unix(s) => s.deregister(r),
        }
    }
}

/// A listening socket. A Unix one is removed from the file system when it is dropped.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, OwnedPath),
}

impl Listener {
    pub(crate) fn bind(at: &Endpoint, registry: &Registry, token: Token) -> io::Result<Self> {
        let mut listener = match at {
            Endpoint::Tcp(at) => Self::Tcp(TcpListener::bind(*at)?),
            Endpoint::Unix(path) => {
                remove_stale(path, |path| {
                    std::os::unix::net::UnixStream::connect(path).map(drop)
                })?;
                Self::Unix(UnixListener::bind(path)?, OwnedPath(path.clone()))
            }
        };
        match &mut listener {
            Self::Tcp(l) => registry.register(l, token, Interest::READABLE)?,
            Self::Unix(l, _) => registry.register(l, token, Interest::READABLE)?,
        }
        Ok(listener)
    }

    pub(crate) fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
            Self::Unix(l, _) => l.accept().map(|(s, _)| Stream::Unix(s)),
        }
    }

    /// Where it listens; differs from what was asked for when the port was 0.
    pub(crate) fn local(&self) -> Option<Endpoint> {
        match self {
            Self::Tcp(l) => l.local_addr().ok().map(Endpoint::Tcp),
            Self::Unix(_, path) => Some(Endpoint::Unix(path.0.clone())),
        }
    }
}

/// A socket file that goes with its owner.
#[derive(Debug)]
pub(crate) struct OwnedPath(pub(crate) PathBuf);

impl Drop for OwnedPath {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "socket file was not removed");
        }
    }
}

/// Removes a socket file that nobody is behind any more: what a killed process leaves. Anything
/// else is left alone, and binding says that the address is in use. `connect` probes.
///
/// # Errors
///
/// When the file cannot be removed.
pub fn remove_stale(path: &Path, connect: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !found.file_type().is_socket() {
        return Ok(());
    }
    match connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}
