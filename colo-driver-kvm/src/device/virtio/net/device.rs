//! What the card is: features, configuration space, link.

use std::collections::VecDeque;

use bytes::Bytes;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use super::super::chain::Chain;
use super::super::{Backend, ConfigSpace, Queues, Virtio};
use super::metrics::NetMetrics;

/// Bytes of the header before each frame in the rings (`virtio_net_hdr_v1`), and on a tap.
pub const VNET_HEADER: usize = 12;
/// The longest frame in a ring, its header included: a segment of 64 KiB (virtio 1.2 section 5.1.6.3.1). It is also
/// the longest frame the protocol carries, so a guest cannot make one that the other host refuses.
pub(super) const MOST_BYTES: usize = 65_562;
/// Frames that wait for receive buffers, and their bytes.
pub(super) const MOST_WAITING: usize = 1024;
pub(super) const MOST_WAITING_BYTES: usize = 4 << 20;

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;

/// What the guest may leave to others. The default is nothing: frames are whole, and need no header.
///
/// With any of them, frames on the loop's side begin with the 12-byte header ([`VNET_HEADER`]), which says what is
/// left to do; a [`Tap`](crate::tap::Tap) opened with the same value speaks that way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums, in both directions.
    pub checksum: bool,
    /// TCP segmentation over IPv4 and IPv6, in both directions; needs `checksum`, and is off without.
    pub segmentation: bool,
}

impl Offloads {
    /// Bytes before each frame on the loop's side.
    #[must_use]
    pub fn header(self) -> usize {
        if self.checksum { VNET_HEADER } else { 0 }
    }
}

/// How the card is made. Both hosts must agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Hardware address.
    pub mac: [u8; 6],
    /// What the guest may leave to others.
    pub offloads: Offloads,
}

/// A virtio network card; [`Virtio<Net>`] is the device.
#[derive(Debug)]
pub struct Net {
    pub(super) config: NetConfig,
    pub(super) link_up: bool,
    pub(super) epoch: u64,
    /// Every input up to here was delivered or dropped.
    pub(super) consumed: u64,
    /// The newest input seen.
    pub(super) newest: u64,
    pub(super) backlog: VecDeque<(u64, Bytes)>,
    pub(super) backlog_bytes: usize,
    pub(super) chain: Chain,
    pub(super) metrics: NetMetrics,
}

impl Net {
    /// A card whose link is up.
    #[must_use]
    pub fn new(config: NetConfig) -> Self {
        Self {
            config,
            link_up: true,
            epoch: 0,
            consumed: 0,
            newest: 0,
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            chain: Chain::default(),
            metrics: NetMetrics::default(),
        }
    }

    /// How it was made.
    #[must_use]
    pub fn config(&self) -> NetConfig {
        self.config
    }

    /// Counters.
    #[must_use]
    pub fn metrics(&self) -> NetMetrics {
        self.metrics
    }

    /// Drops what waits for receive buffers; all of it counts as consumed.
    fn drop_backlog(&mut self) {
        self.metrics.rx_dropped += self.backlog.len() as u64;
        self.backlog.clear();
        self.backlog_bytes = 0;
        self.consumed = self.newest;
    }
}

impl Virtio<Net> {
    /// Plugs the cable in or pulls it. While it is out, frames are dropped in both directions; the guest is told.
    pub fn set_link(&mut self, up: bool) {
        if self.device.link_up != up {
            self.device.link_up = up;
            self.queues.config_changed();
        }
    }

    /// What the guest's driver takes over from the card on the way in; set the tap to this.
    #[must_use]
    pub fn guest_offloads(&self) -> Offloads {
        Offloads {
            checksum: self.queues.agreed(VIRTIO_NET_F_GUEST_CSUM),
            segmentation: self.queues.agreed(VIRTIO_NET_F_GUEST_TSO4)
                && self.queues.agreed(VIRTIO_NET_F_GUEST_TSO6),
        }
    }
}

impl Backend for Net {
    const POLLED: bool = true;
    const ID: u32 = VIRTIO_ID_NET;

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS;
        if self.config.offloads.checksum {
            features |= 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM;
            if self.config.offloads.segmentation {
                features |= 1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6;
                features |= 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
            }
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 256]
    }

    fn config(&self) -> ConfigSpace {
        let status = if self.link_up {
            VIRTIO_NET_S_LINK_UP
        } else {
            0
        };
        ConfigSpace::new()
            .with(0, &self.config.mac)
            .with(6, &status.to_le_bytes())
    }

    /// The guest may have posted receive buffers. The transmit ring is the loop's ([`Virtio::poll_tx`]).
    fn serve(&mut self, queues: &mut Queues) -> bool {
        self.deliver_backlog(queues);
        if self.backlog.is_empty() {
            // Nobody waits for buffers; whoever finds none asks again.
            queues.disarm(RX);
        }
        false
    }

    fn reset(&mut self) {
        self.drop_backlog();
    }
}
