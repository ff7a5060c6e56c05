//! Where the network card's frames go: a tap, a user-mode switch, or nowhere.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
};

use crate::config::{Backend as Kind, Net};
use bytes::Bytes;
use colo_driver_kvm::{device::virtio::Offloads, tap::Tap};
use colo_driver_mio::frame_socket::{FRAME_MOST, FrameSocket, Received};

use crate::cli::Failure;

/// The outside, as one card sees it.
#[derive(Debug)]
pub(super) enum Backend {
    None,
    Tap(Tap),
    Socket(FrameSocket),
    /// The switch went away.
    Gone,
}

impl Backend {
    pub(super) fn open(net: &Net) -> Result<Self, Failure> {
        match (net.backend, &net.tap, &net.path) {
            (Kind::Tap, Some(name), _) => Ok(Self::Tap(Tap::open(name, offloads(net))?)),
            (Kind::Socket, _, Some(path)) => {
                FrameSocket::connect(path)
                    .map(Self::Socket)
                    .map_err(|error| {
                        format!(
                            "net.path {}: {error}; is the switch running?",
                            path.display()
                        )
                        .into()
                    })
            }
            _ => Ok(Self::None),
        }
    }

    pub(super) fn fd(&self) -> Option<RawFd> {
        match self {
            Self::None | Self::Gone => None,
            Self::Tap(tap) => Some(tap.as_fd().as_raw_fd()),
            Self::Socket(socket) => Some(socket.as_fd().as_raw_fd()),
        }
    }

    /// The next frame from outside; `None` when there is none now.
    pub(super) fn recv(&mut self, buffer: &mut [u8]) -> Option<Bytes> {
        let len = match self {
            Self::None | Self::Gone => None,
            Self::Tap(tap) => tap.read_frame(buffer).unwrap_or_else(|error| {
                tracing::warn!(%error, "net: the tap cannot be read");
                None
            }),
            Self::Socket(socket) => match socket.recv(buffer) {
                Ok(Received::Frame(len)) => Some(len),
                Ok(Received::Nothing) => None,
                Ok(Received::Closed) | Err(_) => self.lost(),
            },
        };
        len.and_then(|len| buffer.get(..len))
            .map(Bytes::copy_from_slice)
    }

    /// Sends, or drops as a full wire does.
    pub(super) fn send(&mut self, frame: &[u8]) {
        let sent: io::Result<()> = match self {
            Self::None | Self::Gone => Ok(()),
            Self::Tap(tap) => tap.write_frame(frame).map(drop),
            Self::Socket(socket) => socket.send(frame).map(drop),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "net: a frame was not sent");
        }
    }

    /// From now on the outside leaves to the guest what it agreed to.
    pub(super) fn set_offloads(&self, agreed: Offloads) {
        let Self::Tap(tap) = self else { return };
        if let Err(error) = tap.set_offloads(agreed) {
            tracing::warn!(%error, "net: frames that the guest cannot read are dropped");
        }
    }

    fn lost<T>(&mut self) -> Option<T> {
        tracing::error!("net: the switch closed the cable; the guest is off the network");
        *self = Self::Gone;
        None
    }
}

/// What the card offers; with any of it, frames begin with a virtio header.
pub(super) fn offloads(net: &Net) -> Offloads {
    Offloads {
        checksum: net.offloads(),
        segmentation: net.offloads(),
    }
}

/// A buffer for any frame.
pub(super) fn buffer() -> Vec<u8> {
    vec![0; FRAME_MOST]
}
