//! The numbers of failure detection, and the relations between them that safety needs.

use core::time::Duration;

use super::{MacKey, NodeId, VmId};

/// Most network paths of a pair.
pub const MAX_PATHS: u8 = 8;

/// Most heartbeats that may be unacknowledged within one lease.
const MAX_BEATS_PER_LEASE: u32 = 256;

/// Who says whether a node may own the VM alone (spec ownership 4 and 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arbitration {
    /// A register with compare-and-swap on a third party. The only choice that is safe against
    /// every fault of the model and still fails over by itself.
    Arbiter {
        /// Also try to power the primary off when taking over; success waives the wait for the
        /// last lease and nothing else.
        fence_assist: bool,
    },
    /// No register: a grant is the confirmed power-off of the peer.
    Fence,
    /// Neither. The secondary never acts on silence, unless told to gamble.
    None {
        /// The primary goes on alone when the secondary is silent. Safe as long as the secondary
        /// is passive.
        primary_survives: bool,
        /// The secondary takes over on silence **without asking anyone**: with a cut network both
        /// nodes then serve the world. For demonstrations; each use is a
        /// [`Critical`](super::Critical::UnsafeTakeover) event.
        unsafe_no_arbiter: bool,
    },
}

/// What to do when the arbiter is silent while the pair is healthy (spec ownership 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum WitnessLoss {
    /// Go on in dual mode. The next fault of a node stops service until the arbiter is back.
    #[default]
    Hold,
    /// The primary asks the secondary to abstain and goes on alone: survives the loss of the
    /// secondary, not of the primary.
    NominatePrimary,
}

/// Settings of a [`Member`](super::Member). Build with [`MemberConfig::new`], which gives the
/// defaults of spec ownership 5, then [`MemberConfig::check`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MemberConfig {
    pub(super) vm: VmId,
    pub(super) peer: NodeId,
    pub(super) key: MacKey,
    pub(super) paths: u8,
    pub(super) arbitration: Arbitration,
    pub(super) arbiter_id: u64,
    pub(super) witness_loss: WitnessLoss,
    pub(super) autostart: bool,
    pub(super) interval: Duration,
    pub(super) lease: Duration,
    pub(super) rtt_max: Duration,
    pub(super) drift_ppm: u32,
    pub(super) margin: Duration,
    pub(super) primary_silence: Duration,
    pub(super) secondary_silence: Duration,
    pub(super) arbiter_attempt: Duration,
    pub(super) arbiter_typical: Duration,
    pub(super) stall: Duration,
    pub(super) hang: Duration,
    pub(super) hang_in_checkpoint: Duration,
    pub(super) penalty: Duration,
    pub(super) witness_silence: Duration,
}

/// A setting, or a pair of settings, that cannot work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A duration that must be longer than another is not.
    #[error("member setting {name} is {got:?} and must be at least {least:?} ({because})")]
    TooShort {
        /// The setting.
        name: &'static str,
        /// Its value.
        got: Duration,
        /// The least value that works with the other settings.
        least: Duration,
        /// The constraint.
        because: &'static str,
    },
    /// A count is out of range.
    #[error("member setting {name} is {got}, expected {least} to {most}")]
    OutOfRange {
        /// The setting.
        name: &'static str,
        /// Its value.
        got: u64,
        /// The least value.
        least: u64,
        /// The greatest value.
        most: u64,
    },
}

/// A setting that both nodes have alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Setting {
    /// A time.
    Time(Duration),
    /// A number, or one of several choices.
    Number(u64),
}

impl Setting {
    fn bits(self) -> u64 {
        match self {
            Self::Time(time) => u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
            Self::Number(number) => number,
        }
    }
}

impl core::fmt::Display for Setting {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Time(time) => write!(f, "{time:?}"),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $($(#[$doc])* #[must_use] pub const fn $name(mut self, $name: $type) -> Self {
            self.$name = $name;
            self
        })*
    };
}

impl MemberConfig {
    /// The defaults: about 1.2 s from a fault to a takeover, with an arbiter, on two paths.
    #[must_use]
    pub const fn new(vm: VmId, peer: NodeId, key: MacKey) -> Self {
        Self {
            vm,
            peer,
            key,
            paths: 2,
            arbitration: Arbitration::Arbiter {
                fence_assist: false,
            },
            arbiter_id: 0,
            witness_loss: WitnessLoss::Hold,
            autostart: true,
            interval: Duration::from_millis(100),
            lease: Duration::from_millis(600),
            rtt_max: Duration::from_millis(100),
            drift_ppm: 1000,
            margin: Duration::from_millis(20),
            primary_silence: Duration::from_millis(800),
            secondary_silence: Duration::from_millis(1200),
            arbiter_attempt: Duration::from_millis(500),
            arbiter_typical: Duration::from_millis(200),
            stall: Duration::from_millis(300),
            hang: Duration::from_secs(5),
            hang_in_checkpoint: Duration::from_secs(8),
            penalty: Duration::from_secs(1),
            witness_silence: Duration::from_secs(10),
        }
    }

    /// Takeover within about 60 ms of silence. For quiet links and a process with real-time
    /// priority: every pause longer than the lease costs an interruption.
    #[must_use]
    pub const fn fast(vm: VmId, peer: NodeId, key: MacKey) -> Self {
        Self::new(vm, peer, key)
            .interval(Duration::from_millis(5))
            .lease(Duration::from_millis(25))
            .rtt_max(Duration::from_millis(5))
            .margin(Duration::from_millis(5))
            .primary_silence(Duration::from_millis(35))
            .secondary_silence(Duration::from_millis(60))
            .arbiter_attempt(Duration::from_millis(50))
            .arbiter_typical(Duration::from_millis(20))
            .stall(Duration::from_millis(20))
            .penalty(Duration::from_millis(100))
    }

    setters! {
        /// Network paths between the hosts, 1 to 8; 2 by default.
        paths: u8;
        /// Who grants ownership.
        arbitration: Arbitration;
        /// Name of the arbiter, kept in the record.
        arbiter_id: u64;
        /// What to do when the arbiter is silent.
        witness_loss: WitnessLoss;
        /// Whether this node boots the VM from its disk by itself, when nobody serves and the
        /// register names it as the last that did. Otherwise it says so and waits for an operator.
        autostart: bool;
        /// I: time between heartbeats; 100 ms.
        interval: Duration;
        /// L: how long one acknowledged heartbeat keeps the gate open; 600 ms.
        lease: Duration;
        /// Longest round trip expected; 100 ms.
        rtt_max: Duration;
        /// ρ: bound on the rate error of either clock, in parts per million; 1000.
        drift_ppm: u32;
        /// δ: scheduling margin; 20 ms.
        margin: Duration;
        /// T_p: silence after which the primary arbitrates; 800 ms.
        primary_silence: Duration;
        /// T_s: silence after which the secondary arbitrates; 1.2 s.
        secondary_silence: Duration;
        /// T_cas: one attempt at the arbiter; 500 ms.
        arbiter_attempt: Duration;
        /// What a compare-and-swap usually takes; 200 ms.
        arbiter_typical: Duration;
        /// T_stall: a gap between calls that counts as our own stall; 300 ms.
        stall: Duration;
        /// T_hang: time without progress of the main loop that counts as a hang; 5 s.
        hang: Duration;
        /// T_hang while a checkpoint runs, and the longest that one operation of the guest's side
        /// may take; 8 s.
        hang_in_checkpoint: Duration;
        /// H_pen: how much longer a node of degraded health waits before it arbitrates; 1 s.
        penalty: Duration;
        /// T_wit: arbiter silence after which [`WitnessLoss`] applies; 10 s.
        witness_silence: Duration;
    }

    /// W: how long a secondary waits after its last acknowledgement before it may open its gate.
    ///
    /// The primary counts L from *sending* the heartbeat on a clock up to ρ slow, the secondary
    /// waits on a clock up to ρ fast: L(1+ρ)/(1−ρ), rounded up to L(1+2ρ) plus the margin.
    #[must_use]
    pub fn wait(&self) -> Duration {
        let drift = self.lease.saturating_mul(self.drift_ppm).saturating_mul(2) / 1_000_000;
        self.lease.saturating_add(drift).saturating_add(self.margin)
    }

    /// Whether this node boots the VM without an operator's word.
    #[must_use]
    pub const fn boots_by_itself(&self) -> bool {
        self.autostart
    }

    /// How long an operation of the guest's side may take before this host counts as hanging.
    #[must_use]
    pub const fn longest_operation(&self) -> Duration {
        self.hang_in_checkpoint
    }

    /// A digest of what both nodes must have alike: what one of them promises by a heartbeat, the
    /// other relies upon by its own settings. Nodes that differ do not become a pair.
    #[must_use]
    pub fn promise(&self) -> u64 {
        self.shared()
            .iter()
            .flat_map(|(_, value)| value.bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })
    }

    /// The settings that must be the same on both nodes, by the names of the daemon's keys.
    #[must_use]
    pub const fn shared(&self) -> [(&'static str, Setting); 11] {
        use Setting::{Number, Time};
        let arbitration = match self.arbitration {
            Arbitration::Arbiter { fence_assist } => 1 + fence_assist as u64,
            Arbitration::Fence => 3,
            Arbitration::None {
                primary_survives,
                unsafe_no_arbiter,
            } => 4 + primary_survives as u64 + 2 * unsafe_no_arbiter as u64,
        };
        [
            ("member.beat", Time(self.interval)),
            ("member.lease", Time(self.lease)),
            ("member.drift", Number(self.drift_ppm as u64)),
            ("member.margin", Time(self.margin)),
            ("member.primary_silence", Time(self.primary_silence)),
            ("member.detection", Time(self.secondary_silence)),
            ("member.penalty", Time(self.penalty)),
            ("arbiter.kind", Number(arbitration)),
            ("arbiter.id", Number(self.arbiter_id)),
            ("arbiter.silence", Time(self.witness_silence)),
            (
                "arbiter.loss",
                Number(matches!(self.witness_loss, WitnessLoss::NominatePrimary) as u64),
            ),
        ]
    }

    /// The VM that the pair protects.
    #[must_use]
    pub const fn vm(&self) -> VmId {
        self.vm
    }

    /// The peer's name.
    #[must_use]
    pub const fn peer(&self) -> NodeId {
        self.peer
    }

    /// Checks the constraints of spec ownership 5.
    ///
    /// # Errors
    /// The first relation that does not hold.
    pub fn check(self) -> Result<Self, ConfigError> {
        let range = |name, got: u64, least, most| {
            (least..=most)
                .contains(&got)
                .then_some(())
                .ok_or(ConfigError::OutOfRange {
                    name,
                    got,
                    least,
                    most,
                })
        };
        let least = |name, got, least, because| {
            (got >= least).then_some(()).ok_or(ConfigError::TooShort {
                name,
                got,
                least,
                because,
            })
        };
        range("paths", u64::from(self.paths), 1, u64::from(MAX_PATHS))?;
        // Beyond 5 % the rounding of W no longer covers (1+ρ)/(1−ρ) within the margin.
        range("drift_ppm", u64::from(self.drift_ppm), 0, 50_000)?;
        least(
            "interval",
            self.interval,
            Duration::from_nanos(1),
            "time must pass between heartbeats",
        )?;
        let beats = self.lease.as_nanos() / self.interval.as_nanos().max(1);
        range(
            "lease in intervals",
            u64::try_from(beats).unwrap_or(u64::MAX),
            3,
            u64::from(MAX_BEATS_PER_LEASE),
        )?;
        least(
            "lease",
            self.lease,
            self.interval.saturating_mul(3).saturating_add(self.rtt_max),
            "lease ≥ 3·interval + rtt_max",
        )?;
        // L(1+2ρ)+δ must cover L(1+ρ)/(1−ρ) = L(1 + 2ρ + 2ρ²/(1−ρ)).
        let ppm = u128::from(self.drift_ppm);
        let short = 2 * self.lease.as_nanos() * ppm * ppm / (1_000_000 * (1_000_000 - ppm));
        least(
            "margin",
            self.margin,
            Duration::from_nanos(u64::try_from(short).unwrap_or(u64::MAX)),
            "margin ≥ 2·lease·ρ²/(1−ρ)",
        )?;
        least(
            "primary_silence",
            self.primary_silence,
            self.lease.saturating_add(self.interval),
            "primary_silence ≥ lease + interval",
        )?;
        least(
            "secondary_silence",
            self.secondary_silence,
            self.primary_silence
                .saturating_add(self.arbiter_typical)
                .saturating_add(self.interval)
                .max(self.wait()),
            "secondary_silence ≥ primary_silence + arbiter_typical + interval, and ≥ wait",
        )?;
        least(
            "stall",
            self.stall,
            self.interval.saturating_mul(2),
            "stall ≥ 2·interval",
        )?;
        least(
            "arbiter_attempt",
            self.arbiter_attempt,
            self.arbiter_typical,
            "arbiter_attempt ≥ arbiter_typical",
        )?;
        least(
            "hang",
            self.hang,
            self.secondary_silence,
            "hang ≥ secondary_silence",
        )?;
        least(
            "hang_in_checkpoint",
            self.hang_in_checkpoint,
            self.hang,
            "hang_in_checkpoint ≥ hang",
        )?;
        least(
            "witness_silence",
            self.witness_silence,
            self.arbiter_attempt.saturating_mul(2),
            "witness_silence ≥ 2·arbiter_attempt",
        )?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> MemberConfig {
        MemberConfig::new(VmId::default(), NodeId(2), MacKey::default())
    }

    #[test]
    fn the_defaults_hold_and_wait_as_the_spec_computes() {
        let config = defaults().check().unwrap();
        assert_eq!(config.wait(), Duration::from_micros(621_200));
    }

    #[test]
    fn sixty_milliseconds_of_detection_are_allowed() {
        MemberConfig::fast(VmId::default(), NodeId(2), MacKey::default())
            .check()
            .unwrap();
    }

    #[test]
    fn each_broken_relation_is_named() {
        let ms = Duration::from_millis;
        let name = |config: MemberConfig| match config.check().unwrap_err() {
            ConfigError::TooShort { name, .. } | ConfigError::OutOfRange { name, .. } => name,
        };
        assert_eq!(name(defaults().paths(0)), "paths");
        assert_eq!(name(defaults().interval(Duration::ZERO)), "interval");
        assert_eq!(name(defaults().rtt_max(ms(301))), "lease");
        assert_eq!(name(defaults().primary_silence(ms(699))), "primary_silence");
        assert_eq!(
            name(defaults().secondary_silence(ms(1099))),
            "secondary_silence"
        );
        assert_eq!(name(defaults().stall(ms(199))), "stall");
        assert_eq!(
            name(defaults().margin(Duration::ZERO).drift_ppm(50_000)),
            "margin"
        );
    }
}
