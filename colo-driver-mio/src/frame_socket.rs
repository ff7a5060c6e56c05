//! Ethernet frames over a Unix `SOCK_SEQPACKET` socket: one packet a frame, so nothing frames
//! them, and no frame is ever cut.
//!
//! A full socket drops, as a cable does; the ends' transports repeat.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with,
        bind, connect, listen, recv, send, socket_with, socketpair, sockopt,
    },
};

use crate::channel::stream::remove_stale;

/// Longest frame that is carried: one segment offload's worth with its heads.
pub const FRAME_MOST: usize = 65_600;
const BUFFER: usize = 1 << 20;
const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// One end of a cable. Never blocks.
#[derive(Debug)]
pub struct FrameSocket(OwnedFd);

/// What became of a frame that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The other end will see it.
    Yes,
    /// The socket was full: dropped.
    Dropped,
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A frame of this many bytes.
    Frame(usize),
    /// Nothing now.
    Nothing,
    /// The other end is gone.
    Closed,
}

impl FrameSocket {
    /// Plugs into the switch that listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there, or the path is too long for a socket address.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = new()?;
        connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(Self(fd))
    }

    /// Two ends of one cable.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        Ok((Self(a), Self(b)))
    }

    /// Takes the next frame into `buffer`, which should hold [`FRAME_MOST`] bytes.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<Received> {
        loop {
            return match recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => Ok(Received::Closed),
                Ok((n, _)) => Ok(Received::Frame(n)),
                Err(Errno::AGAIN) => Ok(Received::Nothing),
                Err(Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Sends a frame, or drops it where the socket is full.
    ///
    /// # Errors
    /// The other end is gone.
    pub fn send(&self, frame: &[u8]) -> io::Result<Sent> {
        loop {
            return match send(&self.0, frame, SendFlags::NOSIGNAL) {
                Ok(_) => Ok(Sent::Yes),
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::MSGSIZE) => Ok(Sent::Dropped),
                Err(Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// The process at the other end, as the kernel knows it.
    #[must_use]
    pub fn peer_pid(&self) -> Option<u32> {
        let credentials = sockopt::socket_peercred(&self.0).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits for cables. Its socket file is gone when it is.
#[derive(Debug)]
pub struct FrameListener {
    fd: OwnedFd,
    path: PathBuf,
}

impl FrameListener {
    /// Listens at `path`. A socket file that nobody answers behind is replaced.
    ///
    /// # Errors
    /// Somebody listens there already, it is a file of another kind, or the directory cannot be written.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let fd = new()?;
        remove_stale(path, |path| FrameSocket::connect(path).map(drop))?;
        bind(&fd, &address)?;
        listen(&fd, 16)?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// The next cable that was plugged in.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn accept(&self) -> io::Result<Option<FrameSocket>> {
        match accept_with(&self.fd, FLAGS) {
            Ok(fd) => {
                buffers(&fd)?;
                Ok(Some(FrameSocket(fd)))
            }
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for FrameListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for FrameListener {
    fn drop(&mut self) {
        let _gone = fs::remove_file(&self.path);
    }
}

fn new() -> io::Result<OwnedFd> {
    let fd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
    buffers(&fd)?;
    Ok(fd)
}

fn buffers(fd: &OwnedFd) -> io::Result<()> {
    Ok(sockopt::set_socket_send_buffer_size(fd, BUFFER)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_keep_their_bounds_and_an_end_is_seen() {
        let (a, b) = FrameSocket::pair().unwrap();
        assert_eq!(a.send(&[1; 60]).unwrap(), Sent::Yes);
        assert_eq!(a.send(&[2; 1514]).unwrap(), Sent::Yes);
        let mut buffer = [0; FRAME_MOST];
        assert_eq!(b.recv(&mut buffer).unwrap(), Received::Frame(60));
        assert_eq!(b.recv(&mut buffer).unwrap(), Received::Frame(1514));
        assert_eq!(b.recv(&mut buffer).unwrap(), Received::Nothing);
        drop(a);
        assert_eq!(b.recv(&mut buffer).unwrap(), Received::Closed);
        assert!(b.send(&[1; 60]).is_err());
    }

    #[test]
    fn a_full_cable_drops() {
        let (a, _b) = FrameSocket::pair().unwrap();
        let dropped = (0..100_000).any(|_| a.send(&[0; 1514]).unwrap() == Sent::Dropped);
        assert!(dropped);
    }

    #[test]
    fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("switch.sock");
        let listener = FrameListener::bind(&path).unwrap();
        let error = FrameListener::bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(
            listener.accept().unwrap().is_some(),
            "the probe of the second bind"
        );

        // As a killed process leaves it: bound once, nobody behind it.
        let stale = dir.path().join("stale.sock");
        let fd = new().unwrap();
        bind(&fd, &SocketAddrUnix::new(&stale).unwrap()).unwrap();
        drop(fd);
        drop(FrameListener::bind(&stale).unwrap());
        assert!(!stale.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, b"precious").unwrap();
        let error = FrameListener::bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
