//! One host of a pair from one description: configuration, identity, paths, arbiter, record.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};

use colo_proto::{
    config::{Config, ConfigBuilder},
    error::ConfigError,
    id::Slot,
    member::{Arbitration, BootId, MacKey, MemberConfig, NodeId, Record, VmId},
    node::{Node, Start},
    wire::{ShapeItem, join::Identity},
};

use crate::{
    Driver, DriverConfig, DriverError, Endpoint, Guest,
    arbiter::{Arbiter, file::FileArbiter, none::NoArbiter},
    clock,
    driver::Fencer,
    heartbeat::PathConfig,
    priority::Priority,
    record::{RecordError, RecordStore},
};

/// How long the arbiter's file may take to answer.
const ARBITER_PATIENCE: Duration = Duration::from_millis(500);

/// Why a host cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The two hosts are number 1 and 2.
    #[error("node {0}: the hosts of a pair are 1 and 2")]
    Node(u64),
    /// Nobody decides who owns the VM.
    #[error(
        "no arbiter: give `arbiter_file` or `arbiter`, or say `without_arbiter` for a demonstration"
    )]
    NoArbiter,
    /// Nothing remembers who owned the VM.
    #[error(
        "no record: give `state_dir` or `record`, or say `record(RecordStore::in_memory(), None)` for a test"
    )]
    NoRecord,
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The loop.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// No randomness.
    #[error("the kernel gives no random numbers: {0}")]
    Random(#[source] io::Error),
}

type Change<T> = Box<dyn FnOnce(T) -> T + Send>;

/// A description of one host. Both hosts give the same, but for `node` and the addresses.
pub struct Host {
    vm: VmId,
    node: u64,
    key: MacKey,
    driver: Addresses,
    lanes: u8,
    shape: Vec<ShapeItem>,
    arbiter: Option<(Box<dyn Arbiter>, Arbitration)>,
    record: Option<Place>,
    fencer: Option<Fencer>,
    member: Vec<Change<MemberConfig>>,
    protocol: Vec<Change<ConfigBuilder>>,
}

enum Place {
    Directory(PathBuf),
    Store(RecordStore, Option<Record>),
}

#[derive(Default)]
struct Addresses {
    listen: Option<Endpoint>,
    peer: Option<Endpoint>,
    paths: Vec<PathConfig>,
    silence: Option<Duration>,
    priority: Option<Priority>,
}

impl Host {
    /// Host `node`, 1 or 2, of the pair that protects `vm`; both know `key`.
    #[must_use]
    pub fn new(vm: VmId, node: u64, key: MacKey) -> Self {
        Self {
            vm,
            node,
            key,
            driver: Addresses::default(),
            lanes: 1,
            shape: Vec::new(),
            arbiter: None,
            record: None,
            fencer: None,
            member: Vec::new(),
            protocol: Vec::new(),
        }
    }

    /// Where it listens, and where its peer does. Both are needed on both: roles change.
    #[must_use]
    pub fn link(mut self, listen: Endpoint, peer: Endpoint) -> Self {
        self.driver.listen = Some(listen);
        self.driver.peer = Some(peer);
        self
    }

    /// One more way for heartbeats; two on separate cables are what a pair should have. The core is
    /// configured for as many as are given here.
    #[must_use]
    pub fn path(mut self, local: Endpoint, peer: Endpoint) -> Self {
        self.driver.paths.push(PathConfig { local, peer });
        self
    }

    /// Connections for RAM, 1 to 16. Default 1.
    #[must_use]
    pub fn lanes(mut self, lanes: u8) -> Self {
        self.lanes = lanes;
        self
    }

    /// Something besides memory that must be the same on both hosts; a host that differs is told
    /// in what.
    #[must_use]
    pub fn shape(mut self, name: impl Into<String>, value: impl fmt::Display) -> Self {
        self.shape.push(ShapeItem {
            name: name.into(),
            value: value.to_string(),
        });
        self
    }

    /// Who owns the VM is decided in this file, on storage that both hosts see.
    #[must_use]
    pub fn arbiter_file(self, path: impl Into<PathBuf>) -> Self {
        self.arbiter(FileArbiter::new(path.into(), ARBITER_PATIENCE))
    }

    /// Who owns the VM is decided by this arbiter.
    #[must_use]
    pub fn arbiter(mut self, arbiter: impl Arbiter + 'static) -> Self {
        let fence_assist = self.fencer.is_some();
        self.arbiter = Some((Box::new(arbiter), Arbitration::Arbiter { fence_assist }));
        self
    }

    /// Nobody decides: with a cut network both hosts serve. For demonstrations.
    #[must_use]
    pub fn without_arbiter(mut self) -> Self {
        let arbitration = Arbitration::None {
            primary_survives: true,
            unsafe_no_arbiter: true,
        };
        self.arbiter = Some((Box::new(NoArbiter::new()), arbitration));
        self
    }

    /// How the peer is powered off when the core wants it (see [`Driver::fence_with`]). What the
    /// core does with it is [`Arbitration`]'s business, set by [`member`](Self::member).
    #[must_use]
    pub fn fencer(mut self, fencer: impl FnMut(Duration) -> bool + Send + 'static) -> Self {
        self.fencer = Some(Box::new(fencer));
        if let Some((_, Arbitration::Arbiter { fence_assist })) = &mut self.arbiter {
            *fence_assist = true;
        }
        self
    }

    /// What this host remembers is in this directory, which it locks.
    #[must_use]
    pub fn state_dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.record = Some(Place::Directory(dir.as_ref().to_owned()));
        self
    }

    /// What this host remembers is kept by `store`, which found `record` in it.
    #[must_use]
    pub fn record(mut self, store: RecordStore, record: Option<Record>) -> Self {
        self.record = Some(Place::Store(store, record));
        self
    }

    /// Changes the settings of ownership: times, arbitration.
    #[must_use]
    pub fn member(
        mut self,
        change: impl FnOnce(MemberConfig) -> MemberConfig + Send + 'static,
    ) -> Self {
        self.member.push(Box::new(change));
        self
    }

    /// Changes the settings of checkpoints: mode, intervals, bounds.
    #[must_use]
    pub fn protocol(
        mut self,
        change: impl FnOnce(ConfigBuilder) -> ConfigBuilder + Send + 'static,
    ) -> Self {
        self.protocol.push(Box::new(change));
        self
    }

    /// How long the kernel lets bytes go unacknowledged; see [`DriverConfig::silence`].
    #[must_use]
    pub fn silence(mut self, silence: Duration) -> Self {
        self.driver.silence = Some(silence);
        self
    }

    /// How the loop's thread competes for a processor. Default high.
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.driver.priority = Some(priority);
        self
    }

    /// The loop of this host, over a guest with these slots, given as (slot, pages).
    ///
    /// # Errors
    /// [`HostError`] says which part of the description is missing or wrong.
    pub fn build<G: Guest>(
        self,
        start: Start,
        slots: &[(Slot, u64)],
        guest: G,
    ) -> Result<Driver<Node, G>, HostError> {
        if !(1..=2).contains(&self.node) {
            return Err(HostError::Node(self.node));
        }
        let (arbiter, arbitration) = self.arbiter.ok_or(HostError::NoArbiter)?;
        let paths = u8::try_from(self.driver.paths.len()).unwrap_or(u8::MAX);
        let member = MemberConfig::new(self.vm, NodeId(3 - self.node), self.key)
            .paths(paths)
            .arbitration(arbitration);
        let member = self.member.into_iter().fold(member, |m, change| change(m));
        let builder = Config::builder(NodeId(self.node), member, slots)
            .shape(self.shape)
            .lanes(self.lanes);
        let builder = self
            .protocol
            .into_iter()
            .fold(builder, |b, change| change(b));
        let protocol = builder.build()?;
        let (store, record) = match self.record.ok_or(HostError::NoRecord)? {
            Place::Directory(dir) => RecordStore::open(&dir)?,
            Place::Store(store, record) => (store, record),
        };
        let mut words = [[0; 8]; 2];
        for word in &mut words {
            let all = rustix::rand::getrandom(&mut *word, rustix::rand::GetRandomFlags::empty());
            all.map_err(|error| HostError::Random(error.into()))?;
        }
        let [boot, entropy] = words.map(u64::from_le_bytes);
        let boot = BootId(boot);
        let node = Node::new(protocol, start, boot, record, entropy, clock::now());
        let mut config = DriverConfig::new(Identity {
            vm: self.vm,
            boot,
            key: self.key,
        });
        config.listen = self.driver.listen;
        config.peer = self.driver.peer;
        config.paths = self.driver.paths;
        config.silence = self.driver.silence.unwrap_or(config.silence);
        config.priority = self.driver.priority.unwrap_or(config.priority);
        let mut driver = Driver::new(config, node, guest, arbiter, store)?;
        if let Some(fencer) = self.fencer {
            driver.fence_with(fencer)?;
        }
        Ok(driver)
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("vm", &self.vm)
            .field("node", &self.node)
            .field("paths", &self.driver.paths)
            .field("lanes", &self.lanes)
            .finish_non_exhaustive()
    }
}
