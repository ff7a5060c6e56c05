//! Heartbeat datagrams: one socket a path.
//!
//! Sending never waits and losing is fine; whatever arrives is handed to the machine, which checks
//! its code. Sockets are not connected: a peer that restarts or answers from another address of
//! its host is known by the code, not by the address.

use std::{io, net::SocketAddr, os::fd::AsFd, path::PathBuf};

use colo_proto::member::{DATAGRAM_SIZE, PathId};
use mio::{
    Interest, Registry, Token,
    net::{UdpSocket, UnixDatagram},
};

use crate::{
    Endpoint,
    channel::stream::{OwnedPath, remove_stale},
};

/// Datagrams taken from one path in one turn of the loop.
const TURN_MOST: usize = 64;

/// One way between the hosts for heartbeats. An [`Endpoint::Tcp`] names a UDP address here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathConfig {
    /// Address here.
    pub local: Endpoint,
    /// Address of the peer, of the same kind.
    pub peer: Endpoint,
}

/// The sockets of all paths, numbered as configured.
#[derive(Debug)]
pub(crate) struct HeartbeatSockets {
    paths: Vec<Socket>,
    base: usize,
}

#[derive(Debug)]
enum Socket {
    Udp {
        socket: UdpSocket,
        peer: SocketAddr,
        readable: bool,
    },
    Unix {
        socket: UnixDatagram,
        peer: PathBuf,
        readable: bool,
        _file: OwnedPath,
    },
}

impl HeartbeatSockets {
    /// Binds every path; the token of path *n* is `base + n`.
    pub(crate) fn bind(
        paths: &[PathConfig],
        registry: &Registry,
        base: usize,
    ) -> Result<Self, (Endpoint, io::Error)> {
        let paths = paths
            .iter()
            .enumerate()
            .map(|(n, path)| {
                Socket::bind(path, registry, Token(base + n)).map_err(|e| (path.local.clone(), e))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { paths, base })
    }

    /// Where the paths are bound.
    pub(crate) fn local(&self) -> Vec<Option<Endpoint>> {
        self.paths.iter().map(Socket::local).collect()
    }

    /// Notes that a path is readable; `false` when the token is none of ours.
    pub(crate) fn ready(&mut self, token: Token) -> bool {
        let path = token.0.checked_sub(self.base);
        match path.and_then(|n| self.paths.get_mut(n)) {
            Some(Socket::Udp { readable, .. } | Socket::Unix { readable, .. }) => {
                *readable = true;
                true
            }
            None => false,
        }
    }

    /// Sends, if the network takes it.
    pub(crate) fn send(&self, path: PathId, bytes: &[u8; DATAGRAM_SIZE]) {
        let Some(socket) = self.paths.get(usize::from(path.0)) else {
            return;
        };
        let sent = match socket {
            Socket::Udp { socket, peer, .. } => socket.send_to(bytes, *peer),
            Socket::Unix { socket, peer, .. } => socket.send_to(bytes, peer),
        };
        if let Err(error) = sent {
            // A peer that is down looks like this on every beat: the machine tells, not the log.
            tracing::trace!(?path, %error, "heartbeat not sent");
        }
    }

    /// The next datagram, into `buffer`. The budget of a turn is `left`, to begin with
    /// [`turn`](Self::turn).
    pub(crate) fn receive<'a>(
        &mut self,
        left: &mut usize,
        buffer: &'a mut [u8; BUFFER],
    ) -> Option<(PathId, &'a [u8])> {
        for (n, path) in (0u8..).zip(&mut self.paths) {
            while *left > 0 && path.is_readable() {
                *left -= 1;
                match path.receive(buffer) {
                    Ok(got) => return Some((PathId(n), &buffer[..got])),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => path.drained(),
                    // An error that the network reports for an earlier datagram.
                    Err(error) => tracing::trace!(path = n, %error, "heartbeat path"),
                }
            }
        }
        None
    }

    /// The budget of one turn.
    pub(crate) const fn turn(&self) -> usize {
        TURN_MOST * self.paths.len()
    }

    /// Whether a path was left unread.
    pub(crate) fn is_pending(&self) -> bool {
        self.paths.iter().any(Socket::is_readable)
    }
}

/// Longer than a datagram: a longer one must not pass as one that was cut.
pub(crate) const BUFFER: usize = 2 * DATAGRAM_SIZE;

impl Socket {
    fn bind(path: &PathConfig, registry: &Registry, token: Token) -> io::Result<Self> {
        match (&path.local, &path.peer) {
            (Endpoint::Tcp(local), Endpoint::Tcp(peer)) => {
                let mut socket = UdpSocket::bind(*local)?;
                mark_urgent(&socket, local.is_ipv4());
                registry.register(&mut socket, token, Interest::READABLE)?;
                Ok(Self::Udp {
                    socket,
                    peer: *peer,
                    readable: true,
                })
            }
            (Endpoint::Unix(local), Endpoint::Unix(peer)) => {
                let probe = UnixDatagram::unbound()?;
                remove_stale(local, |path| probe.connect(path))?;
                let mut socket = UnixDatagram::bind(local)?;
                registry.register(&mut socket, token, Interest::READABLE)?;
                Ok(Self::Unix {
                    socket,
                    peer: peer.clone(),
                    readable: true,
                    _file: OwnedPath(local.clone()),
                })
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "both ends of a heartbeat path must be of the same kind",
            )),
        }
    }

    fn local(&self) -> Option<Endpoint> {
        match self {
            Self::Udp { socket, .. } => socket.local_addr().ok().map(Endpoint::Tcp),
            Self::Unix { _file, .. } => Some(Endpoint::Unix(_file.0.clone())),
        }
    }

    const fn is_readable(&self) -> bool {
        match self {
            Self::Udp { readable, .. } | Self::Unix { readable, .. } => *readable,
        }
    }

    const fn drained(&mut self) {
        match self {
            Self::Udp { readable, .. } | Self::Unix { readable, .. } => *readable = false,
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Udp { socket, .. } => socket.recv_from(buffer).map(|(n, _)| n),
            Self::Unix { socket, .. } => socket.recv_from(buffer).map(|(n, _)| n),
        }
    }
}

/// Asks queues on the way, ours first, to let heartbeats pass bulk data (DSCP CS6, "network
/// control").
fn mark_urgent(socket: &impl AsFd, v4: bool) {
    const CS6: u8 = 48 << 2;
    let marked = if v4 {
        rustix::net::sockopt::set_ip_tos(socket, CS6)
    } else {
        rustix::net::sockopt::set_ipv6_tclass(socket, u32::from(CS6))
    };
    if let Err(error) = marked {
        tracing::debug!(%error, "heartbeats travel without priority");
    }
}
