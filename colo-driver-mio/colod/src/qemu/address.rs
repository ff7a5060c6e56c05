//! Where QEMU is: `HOST:PORT` or `unix:PATH`.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use thiserror::Error;

use colo_driver_mio::remove_stale;

/// Where to listen or to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// A host and a port.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

/// Not an address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` is no address, expected HOST:PORT, tcp:HOST:PORT or unix:PATH")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        let tcp = text.strip_prefix("tcp:").unwrap_or(text);
        match tcp.rsplit_once(':') {
            Some((_, port)) if port.parse::<u16>().is_ok() => Ok(Self::Tcp(tcp.into())),
            _ => Err(AddressError(text.into())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(at) => write!(f, "tcp:{at}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    pub(super) fn bind(address: &Address) -> io::Result<Self> {
        let listener = match address {
            Address::Tcp(at) => Self::Tcp(TcpListener::bind(at)?),
            Address::Unix(path) => {
                remove_stale(path, |path| UnixStream::connect(path).map(drop))?;
                Self::Unix(UnixListener::bind(path)?, path.clone())
            }
        };
        match &listener {
            Self::Tcp(l) => l.set_nonblocking(true)?,
            Self::Unix(l, _) => l.set_nonblocking(true)?,
        }
        Ok(listener)
    }

    /// Where it listens, with the port that the system chose.
    pub(super) fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Tcp(l) => Address::Tcp(l.local_addr()?.to_string()),
            Self::Unix(_, path) => Address::Unix(path.clone()),
        })
    }

    /// The next connection, if one waits.
    pub(super) fn accept(&self) -> io::Result<Option<Stream>> {
        let accepted = match self {
            Self::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
            Self::Unix(l, _) => l.accept().map(|(s, _)| Stream::Unix(s)),
        };
        match accepted {
            Ok(stream) => stream.tuned().map(Some),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(l) => l.as_fd(),
            Self::Unix(l, _) => l.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Nobody listens there any more; if it is gone already, so much the better.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A connection. Non-blocking.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(super) fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(at) => Self::Tcp(TcpStream::connect(at)?).tuned(),
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?).tuned(),
        }
    }

    /// [`connect`](Self::connect), with a bound on the wait for a host that is gone.
    pub(super) fn connect_within(address: &Address, patience: Duration) -> io::Result<Self> {
        let Address::Tcp(at) = address else {
            return Self::connect(address);
        };
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for to in at.to_socket_addrs()? {
            match TcpStream::connect_timeout(&to, patience) {
                Ok(stream) => return Self::Tcp(stream).tuned(),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Acknowledges what has arrived at once. QEMU leaves Nagle's algorithm on: it sends nothing
    /// after a small message until that is acknowledged, and the kernel would take 40 ms for it
    /// while the primary's guest stands still (spec qemu A9). The option wears off, so it is
    /// set again before each wait.
    pub(super) fn acknowledge_at_once(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => Ok(rustix::net::sockopt::set_tcp_quickack(stream, true)?),
            Self::Unix(_) => Ok(()),
        }
    }

    /// Small replies leave at once (spec qemu A9), and a peer host that is gone without a
    /// word is noticed within a few seconds.
    fn tuned(self) -> io::Result<Self> {
        match &self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                let socket = SockRef::from(stream);
                let alive = TcpKeepalive::new()
                    .with_time(Duration::from_secs(1))
                    .with_interval(Duration::from_secs(1))
                    .with_retries(3);
                socket.set_tcp_keepalive(&alive)?;
                socket.set_tcp_user_timeout(Some(Duration::from_secs(4)))?;
                stream.set_nonblocking(true)?;
            }
            Self::Unix(stream) => stream.set_nonblocking(true)?,
        }
        Ok(self)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(s) => s.as_fd(),
            Self::Unix(s) => s.as_fd(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => (&mut &*s).read(buf),
            Stream::Unix(s) => (&mut &*s).read(buf),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => (&mut &*s).write(buf),
            Stream::Unix(s) => (&mut &*s).write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hosts_with_ports_or_paths() {
        let tcp = |at: &str| Ok(Address::Tcp(at.into()));
        assert_eq!("127.0.0.1:0".parse(), tcp("127.0.0.1:0"));
        assert_eq!("tcp:[::1]:4444".parse(), tcp("[::1]:4444"));
        assert_eq!("unix:/run/x".parse(), Ok(Address::Unix("/run/x".into())));
        for bad in ["", "host", "host:", "host:99999", "/run/x"] {
            assert_eq!(bad.parse::<Address>(), Err(AddressError(bad.into())));
        }
    }
}
