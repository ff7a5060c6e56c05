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

/// Datagrams taken from one path in one turn of the loop. Each path has its own: whoever floods one
/// takes nothing from the others.
const TURN_MOST: usize = 64;
/// Turns in a row for which datagrams that wait hold a timeout back: more than a socket's default
/// buffer holds, so that what had arrived in time counts, and few enough for a flood to delay it by
/// milliseconds only.
const DEFERRED_MOST: u32 = 16;

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
    paths: Vec<Path>,
    base: usize,
    /// The path that is read next.
    next: usize,
    /// Turns in a row that ended with datagrams unread.
    unread: u32,
}

#[derive(Debug)]
struct Path {
    socket: Socket,
    readable: bool,
    /// Datagrams that may be taken in this turn.
    left: usize,
}

#[derive(Debug)]
enum Socket {
    Udp {
        socket: UdpSocket,
        peer: SocketAddr,
    },
    Unix {
        socket: UnixDatagram,
        peer: PathBuf,
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
                let socket = Socket::bind(path, registry, Token(base + n))
                    .map_err(|e| (path.local.clone(), e))?;
                Ok(Path {
                    socket,
                    readable: true,
                    left: TURN_MOST,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            paths,
            base,
            next: 0,
            unread: 0,
        })
    }

    /// Where the paths are bound.
    pub(crate) fn local(&self) -> Vec<Option<Endpoint>> {
        self.paths.iter().map(|path| path.socket.local()).collect()
    }

    /// Notes that a path is readable; `false` when the token is none of ours.
    pub(crate) fn ready(&mut self, token: Token) -> bool {
        let path = token.0.checked_sub(self.base);
        match path.and_then(|n| self.paths.get_mut(n)) {
            Some(path) => {
                path.readable = true;
                true
            }
            None => false,
        }
    }

    /// Sends, if the network takes it.
    pub(crate) fn send(&self, path: PathId, bytes: &[u8; DATAGRAM_SIZE]) {
        let Some(to) = self.paths.get(usize::from(path.0)) else {
            return;
        };
        let sent = match &to.socket {
            Socket::Udp { socket, peer } => socket.send_to(bytes, *peer),
            Socket::Unix { socket, peer, .. } => socket.send_to(bytes, peer),
        };
        if let Err(error) = sent {
            // A peer that is down looks like this on every beat: the machine tells, not the log.
            tracing::trace!(?path, %error, "heartbeat not sent");
        }
    }

    /// Begins a turn of the loop: every path may be read again.
    pub(crate) fn begin_turn(&mut self) {
        for path in &mut self.paths {
            path.left = TURN_MOST;
        }
    }

    /// The next datagram of this turn, into `buffer`: one from each path in turn.
    pub(crate) fn receive<'a>(
        &mut self,
        buffer: &'a mut [u8; BUFFER],
    ) -> Option<(PathId, &'a [u8])> {
        let count = self.paths.len();
        for n in (self.next..count).chain(0..self.next) {
            let (Some(path), Ok(id)) = (self.paths.get_mut(n), u8::try_from(n)) else {
                continue;
            };
            while path.left > 0 && path.readable {
                path.left -= 1;
                match path.socket.receive(buffer) {
                    Ok(got) => {
                        self.next = (n + 1) % count;
                        return Some((PathId(id), &buffer[..got]));
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => path.readable = false,
                    // An error that the network reports for an earlier datagram.
                    Err(error) => tracing::trace!(path = n, %error, "heartbeat path"),
                }
            }
        }
        None
    }

    /// Ends a turn's reading. `true`: a path was left unread.
    pub(crate) fn end_turn(&mut self) -> bool {
        let pending = self.paths.iter().any(|path| path.readable);
        self.unread = if pending { self.unread + 1 } else { 0 };
        pending
    }

    /// Whether what waits unread may be the heartbeat that a timeout would miss. A flood that goes
    /// on does not hold timeouts back for ever.
    pub(crate) fn defers_timeouts(&mut self) -> bool {
        if self.unread > DEFERRED_MOST {
            self.unread = 0;
        }
        self.unread > 0
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

#[cfg(test)]
mod tests {
    use std::net::UdpSocket as Outside;

    use super::*;

    fn two_paths() -> (mio::Poll, HeartbeatSockets, Vec<SocketAddr>) {
        let poll = mio::Poll::new().unwrap();
        let path = || PathConfig {
            local: "127.0.0.1:0".parse().unwrap(),
            peer: "127.0.0.1:9".parse().unwrap(),
        };
        let sockets = HeartbeatSockets::bind(&[path(), path()], poll.registry(), 8).unwrap();
        let at = sockets
            .local()
            .into_iter()
            .filter_map(|local| match local {
                Some(Endpoint::Tcp(at)) => Some(at),
                _ => None,
            })
            .collect();
        (poll, sockets, at)
    }

    /// Which paths the datagrams of one turn came from.
    fn turn(sockets: &mut HeartbeatSockets) -> Vec<u8> {
        let mut buffer = [0; BUFFER];
        sockets.begin_turn();
        let got = std::iter::from_fn(|| sockets.receive(&mut buffer).map(|(path, _)| path.0));
        let got = got.collect();
        sockets.end_turn();
        got
    }

    #[test]
    fn a_flood_on_one_path_takes_nothing_from_the_others() {
        let (_poll, mut sockets, at) = two_paths();
        let outside = Outside::bind("127.0.0.1:0").unwrap();
        for _ in 0..200 {
            outside.send_to(b"flood", at[0]).unwrap();
        }
        for _ in 0..3 {
            outside.send_to(b"beat", at[1]).unwrap();
        }
        let got = turn(&mut sockets);
        assert_eq!(got[..6], [0, 1, 0, 1, 0, 1], "in turn");
        assert_eq!(got.len(), TURN_MOST + 3);
    }

    #[test]
    fn a_flood_that_goes_on_holds_timeouts_back_for_a_bounded_number_of_turns() {
        let (_poll, mut sockets, at) = two_paths();
        let outside = Outside::bind("127.0.0.1:0").unwrap();
        let mut deferred = 0;
        for _ in 0..=DEFERRED_MOST {
            for _ in 0..=TURN_MOST {
                outside.send_to(b"flood", at[0]).unwrap();
            }
            turn(&mut sockets);
            deferred += u32::from(sockets.defers_timeouts());
        }
        assert_eq!(deferred, DEFERRED_MOST);
    }
}
