//! The outside of the KVM guest: its card's port, where frames go, what is said after a takeover.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd as _, RawFd},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use colo_driver_kvm::device::{
    Sink,
    virtio::{Disk, Offloads},
};
use colo_driver_mio::embed::{Port, World};
use colo_proto::{
    id::{Epoch, PageRuns},
    machine::Notify,
    output::announce,
};

use super::{
    backend::{self, Backend, offloads},
    build::{Built, Card, DISK},
    worker::lock,
};
use crate::{cli::Failure, config::Config};

/// Frames taken from the card before the loop gets on with other things.
const TURN: usize = 128;

/// How long the end waits for whoever reads the console.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The card stamps its frames itself, while it takes them from its ring.
#[derive(Debug)]
pub(super) struct CardPort(pub(super) Card);

impl Port for CardPort {
    fn descriptor(&self) -> Option<RawFd> {
        Some(lock(&self.0).wake_fd().as_raw_fd())
    }

    fn said(&self, each: &mut dyn FnMut(Epoch, Bytes)) {
        // What does not fit this turn makes the eventfd readable again.
        lock(&self.0).poll_tx(TURN, &mut |epoch, frame| each(Epoch(epoch), frame));
    }

    fn bring(&self, index: u64, frame: Bytes) {
        lock(&self.0).rx(index, &frame);
    }

    fn cut(&self, epoch: Epoch) -> u64 {
        let mut card = lock(&self.0);
        card.set_epoch(epoch.0);
        card.consumed_inputs()
    }

    /// What it has consumed is part of the state that was loaded, and loading dropped its backlog.
    fn replace(&self, epoch: Epoch, _: u64) {
        lock(&self.0).set_epoch(epoch.0);
    }
}

/// Where the frames go, and the console's voice.
#[derive(Debug)]
pub(crate) struct Outside {
    backend: Backend,
    buffer: Vec<u8>,
    /// What is said where the VM lives now.
    announcements: Vec<Vec<u8>>,
    card: Option<Card>,
    /// What the backend was told the guest can do.
    offloads: Offloads,
    console: Sink,
    disk: Option<Arc<Disk>>,
}

impl Outside {
    pub(super) fn open(config: &Config, built: &Built) -> Result<Self, Failure> {
        Ok(Self {
            disk: built.served.image(),
            backend: Backend::open(&config.net)?,
            buffer: backend::buffer(),
            announcements: announcements(config),
            card: built.card.clone(),
            offloads: Offloads::default(),
            console: built.console.clone(),
        })
    }
}

fn announcements(config: &Config) -> Vec<Vec<u8>> {
    let mac = config.net.mac.0;
    let header = vec![0; offloads(&config.net).header()];
    let mut frames = vec![announce::reverse_arp(mac).to_vec()];
    for address in &config.net.announce {
        frames.push(match address {
            IpAddr::V4(v4) => announce::gratuitous_arp(mac, v4.octets()).to_vec(),
            IpAddr::V6(v6) => announce::unsolicited_advertisement(mac, v6.octets(), false).to_vec(),
        });
    }
    frames
        .into_iter()
        .map(|frame| [&header[..], &frame].concat())
        .collect()
}

impl World for Outside {
    fn descriptor(&self) -> Option<RawFd> {
        self.backend.fd()
    }

    fn receive(&mut self) -> Option<Bytes> {
        self.backend.recv(&mut self.buffer)
    }

    fn send(&mut self, frame: &[u8]) {
        self.backend.send(frame);
    }

    fn announce(&mut self) {
        for frame in &self.announcements {
            self.backend.send(frame);
        }
    }

    fn make_room(&mut self, runs: &PageRuns) -> Result<(), String> {
        let Some(disk) = &self.disk else {
            return Ok(());
        };
        let mut disks = runs.iter().filter(|run| run.slot == DISK);
        disks
            .try_for_each(|run| disk.make_room(run.first, run.pages.get()))
            .map_err(|error| error.to_string())
    }

    fn notify(&mut self, notify: Notify) {
        match notify {
            Notify::Serves => self.console.set_muted(false),
            Notify::Shadows => self.console.set_muted(true),
            _ => {}
        }
    }

    /// Tells the backend what the guest's driver has agreed to. A driver that comes or goes rings, and
    /// a frame that the host made before it heard of it is dropped by the card.
    fn card_rang(&mut self) {
        let Some(card) = &self.card else { return };
        let agreed = lock(card).guest_offloads();
        if agreed != self.offloads {
            // As often as the guest likes.
            tracing::debug!(
                checksum = agreed.checksum,
                segmentation = agreed.segmentation,
                "net: what the guest lets the host leave undone"
            );
            self.backend.set_offloads(agreed);
            self.offloads = agreed;
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if !self.console.drain(LAST_WORDS) {
            tracing::warn!("nobody reads the console; its last output is lost");
        }
    }
}
