//! Everything that is decided before the machines start. Only [`ConfigBuilder::build`] makes a
//! [`Config`], so a `Config` is always one that can work.

use alloc::{string::ToString, vec::Vec};
use core::time::Duration;

use crate::{
    error::ConfigError,
    id::{Channel, Slot},
    member::{MemberConfig, NodeId},
    ram::CacheMode,
    status::{Mode, ResumePolicy},
    wire::{FEATURES, Hello, ShapeItem, VERSION},
};

/// A configuration that passed its checks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    #[cfg(feature = "mutations")]
    pub(crate) bug: Option<crate::Bug>,
    pub(crate) node: NodeId,
    pub(crate) member: MemberConfig,
    pub(crate) slots: Vec<(Slot, u64)>,
    pub(crate) shape: Vec<ShapeItem>,
    pub(crate) lanes: u8,
    pub(crate) cache: CacheMode,
    pub(crate) mode: Mode,
    pub(crate) resume: ResumePolicy,
    pub(crate) longest: Duration,
    pub(crate) shortest: Duration,
    pub(crate) compare_timeout: Duration,
    pub(crate) hold_bytes: usize,
    pub(crate) last_round_pages: u64,
    pub(crate) state_bytes: u64,
    pub(crate) stall: Duration,
    pub(crate) handshake: Duration,
    pub(crate) redial: Duration,
    pub(crate) adaptive: Option<Adaptive>,
    pub(crate) pass: PassThrough,
}

/// When pacing changes the mode by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Adaptive {
    /// Lockstep gives way to standby after this many checkpoints in a row that were taken because
    /// the outputs did not agree.
    pub to_standby_after: u32,
    /// Standby tries lockstep again after this many checkpoints.
    pub to_lockstep_after: u32,
}

/// Classes of output that are neither compared nor held. They still need a permit.
///
/// Losing or repeating such a frame harms nobody, and both guests say them at different times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct PassThrough {
    /// ARP (ethertype 0x0806) and reverse ARP (0x8035).
    pub arp: bool,
    /// Any other frame that is neither IPv4 nor IPv6.
    pub other: bool,
    /// Bytes before the Ethernet header of each frame: 12 when the card's offloads are on and a
    /// virtio-net header comes first, otherwise 0.
    pub header: usize,
}

impl Config {
    /// A builder with every default, for this node and this memory, given as (slot, pages).
    #[must_use]
    pub fn builder(node: NodeId, member: MemberConfig, slots: &[(Slot, u64)]) -> ConfigBuilder {
        ConfigBuilder(Self {
            #[cfg(feature = "mutations")]
            bug: None,
            node,
            member,
            slots: slots.to_vec(),
            shape: Vec::new(),
            lanes: 1,
            cache: CacheMode::default(),
            mode: Mode::default(),
            resume: ResumePolicy::default(),
            longest: Duration::from_millis(100),
            shortest: Duration::from_millis(5),
            compare_timeout: Duration::from_millis(100),
            hold_bytes: 16 << 20,
            last_round_pages: 16_384,
            state_bytes: 64 << 20,
            stall: Duration::from_secs(10),
            handshake: Duration::from_secs(5),
            redial: Duration::from_millis(250),
            adaptive: None,
            pass: PassThrough::default(),
        })
    }

    /// RAM lanes.
    #[must_use]
    pub const fn lanes(&self) -> u8 {
        self.lanes
    }

    /// Every channel of a pair, Control first.
    pub fn channels(&self) -> impl Iterator<Item = Channel> + use<> {
        core::iter::once(Channel::Control)
            .chain((0..self.lanes).map(Channel::Ram))
            .chain(core::iter::once(Channel::Net))
    }

    /// The same with a seeded bug.
    #[cfg(feature = "mutations")]
    #[must_use]
    pub const fn with_bug(mut self, bug: Option<crate::Bug>) -> Self {
        self.bug = bug;
        self
    }

    pub(crate) fn hello(&self, boot: u64, mode: Mode) -> Hello {
        let shared = self.member.shared().map(|(name, value)| ShapeItem {
            name: name.into(),
            value: value.to_string(),
        });
        Hello {
            version: VERSION,
            features: FEATURES,
            pair: self.member.vm().0,
            node: self.node.0,
            boot,
            lanes: self.lanes,
            cache: self.cache,
            mode,
            resume: self.resume,
            slots: self.slots.clone(),
            shape: self.shape.iter().cloned().chain(shared).collect(),
        }
    }
}

/// Builds a [`Config`]. Each setter says default, range and reason.
#[derive(Clone, Debug)]
pub struct ConfigBuilder(Config);

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: $type) -> Self {
            self.0.$name = $name;
            self
        })*
    };
}

impl ConfigBuilder {
    setters! {
        /// What must be the same on both hosts besides memory; at most 1,024 items, whose
        /// names and values are at most 255 bytes without control characters. Default: none.
        shape: Vec<ShapeItem>;
        /// RAM lanes, 1 to 16, default 1. More than one pays where one core cannot fill the link.
        lanes: u8;
        /// How a secondary keeps a coming epoch. Default [`CacheMode::Union`]: no second copy of
        /// RAM.
        cache: CacheMode;
        /// Mode to begin with. Default standby.
        mode: Mode;
        /// When the primary runs on. Default after capture.
        resume: ResumePolicy;
        /// Longest time between checkpoints (`x-checkpoint-delay`), 1 ms to 1 h, default 100 ms.
        /// In standby mode also the longest that output waits.
        longest: Duration;
        /// Shortest time from the start of one checkpoint to the start of the next, at most
        /// `longest`, default 5 ms. Bounds what a guest that never agrees can cost.
        shortest: Duration;
        /// A frame that waits longer than this for its match asks for a checkpoint; 1 ms to 1 min,
        /// default 100 ms. QEMU: 3 s.
        compare_timeout: Duration;
        /// Most bytes of held output, and of mirrored input in flight; 64 KiB to 1 GiB, default
        /// 16 MiB. At half of it a checkpoint is asked for.
        hold_bytes: usize;
        /// The last round of the first synchronisation begins when at most this many pages are
        /// left, 1 to 2^32, default 16,384 (64 MiB): it bounds the staging area.
        last_round_pages: u64;
        /// Largest device state accepted, 4 KiB to 1 GiB, default 64 MiB (spec qemu 11).
        state_bytes: u64;
        /// A checkpoint step without any progress for this long ends the pairing; so do frames
        /// of either guest that the network does not take within it (lockstep), and ownership that cannot be arranged within it after the first synchronisation; 100 ms to
        /// 10 min, default 10 s. Liveness is the heartbeats' business; this catches a peer that
        /// lives and does nothing, and an arbiter that is not there.
        stall: Duration;
        /// A peer must say hello within this time; 100 ms to 1 min, default 5 s.
        handshake: Duration;
        /// First pause between attempts to connect, doubled up to 16 times; 1 ms to 1 min, default
        /// 250 ms.
        redial: Duration;
        /// Whether pacing may change the mode. Default: no.
        adaptive: Option<Adaptive>;
        /// Output that is not compared. Default: none.
        pass: PassThrough;
    }

    /// Checks everything.
    ///
    /// # Errors
    /// [`ConfigError`] naming the setting, its value and its range.
    pub fn build(self) -> Result<Config, ConfigError> {
        let mut c = self.0;
        c.slots.sort_by_key(|s| s.0);
        if c.slots.is_empty() {
            return Err(ConfigError::Memory("there is no memory slot"));
        }
        if c.slots.iter().any(|s| s.1 == 0) {
            return Err(ConfigError::Memory("a slot has no pages"));
        }
        if c.slots.iter().any(|s| s.1 > 1 << 32) {
            return Err(ConfigError::Memory("a slot has more than 2^32 pages"));
        }
        if c.slots
            .windows(2)
            .any(|w| matches!(w, [a, b] if a.0 == b.0))
        {
            return Err(ConfigError::Memory("two slots have the same number"));
        }
        let range = |key, got: u64, low: u64, high: u64, expected| {
            if (low..=high).contains(&got) {
                return Ok(());
            }
            Err(ConfigError::Range { key, got, expected })
        };
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        range("slots", c.slots.len() as u64, 1, 512, "1 to 512")?;
        range("shape", c.shape.len() as u64, 0, 1024, "at most 1024 items")?;
        if let Some(item) = c.shape.iter().find(|item| !item.is_readable()) {
            return Err(ConfigError::Shape(item.name.clone()));
        }
        range("lanes", u64::from(c.lanes), 1, 16, "1 to 16")?;
        range(
            "longest (ms)",
            millis(c.longest),
            1,
            3_600_000,
            "1 ms to 1 h",
        )?;
        range(
            "compare_timeout (ms)",
            millis(c.compare_timeout),
            1,
            60_000,
            "1 ms to 1 min",
        )?;
        range(
            "hold_bytes",
            c.hold_bytes as u64,
            64 << 10,
            1 << 30,
            "64 KiB to 1 GiB",
        )?;
        range(
            "last_round_pages",
            c.last_round_pages,
            1,
            1 << 32,
            "1 to 2^32",
        )?;
        range(
            "state_bytes",
            c.state_bytes,
            4096,
            1 << 30,
            "4 KiB to 1 GiB",
        )?;
        range(
            "stall (ms)",
            millis(c.stall),
            100,
            600_000,
            "100 ms to 10 min",
        )?;
        range(
            "handshake (ms)",
            millis(c.handshake),
            100,
            60_000,
            "100 ms to 1 min",
        )?;
        range("redial (ms)", millis(c.redial), 1, 60_000, "1 ms to 1 min")?;
        if c.longest < c.shortest {
            return Err(ConfigError::Order {
                a: "longest",
                a_value: c.longest,
                b: "shortest",
                b_value: c.shortest,
            });
        }
        c.member = c.member.check()?;
        // A host whose own guest hangs must have given the VM away before its peer, which waits for
        // it, gives up on it.
        if c.stall <= c.member.longest_operation() {
            return Err(ConfigError::Order {
                a: "stall",
                a_value: c.stall,
                b: "hang_in_checkpoint",
                b_value: c.member.longest_operation(),
            });
        }
        Ok(c)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::member::{MacKey, VmId};

    #[test]
    fn a_shape_that_the_peer_would_read_otherwise_is_refused_here() {
        let build = |name: &str, value: &str| {
            let member = MemberConfig::new(VmId([1; 16]), NodeId(2), MacKey([1; 16]));
            let item = ShapeItem {
                name: name.into(),
                value: value.into(),
            };
            let builder = Config::builder(NodeId(1), member, &[(Slot(0), 1)]);
            builder.shape(vec![item]).build()
        };
        let long = "x".repeat(256);
        for (name, value) in [
            ("disk\n", "1"),
            ("disk", "1\0"),
            (&long, "1"),
            ("disk", &long),
        ] {
            let refused = build(name, value).unwrap_err();
            assert_eq!(refused, ConfigError::Shape(name.into()));
        }
        build("disk", long.get(1..).unwrap_or_default()).unwrap();
    }
}
