//! Two hosts on one machine: each a directory, addresses and a control socket; and the daemons on
//! them as real processes.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use super::{Daemon, Switch};
use crate::config::{
    Arbiter, ArbiterKind, Backend, ClockName, Config, Console, Control, Disk, Endpoint,
    HeartbeatPath, Hex, Log, LogFormat, Mac, Member, Metrics, Net, Pair, Protection, Serial, Size,
    Then, Vm,
};

const PATHS: usize = 2;

/// What all daemons of a stage have in common.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The guest.
    pub vm: Vm,
    /// When checkpoints are taken.
    pub protection: Protection,
    /// How fast a dead peer is noticed.
    pub member: Member,
    /// Whether a secondary boots the VM that it served last.
    pub autostart: bool,
    /// The guest's disk. Each host of the stage works on a copy of its own.
    pub disk: Option<Disk>,
    /// Who decides: a file in the stage's directory, or nobody.
    pub arbiter: ArbiterKind,
    /// The guest's hardware address.
    pub mac: Mac,
    /// Its Internet address, announced after a takeover.
    pub guest: Ipv4Addr,
    /// Taps of the two hosts instead of the stage's switch.
    pub taps: Option<[String; 2]>,
    /// Log level of the daemons.
    pub log: String,
    /// Where it goes instead of the file that [`Daemon::log`] reads.
    pub log_file: Option<PathBuf>,
}

impl Settings {
    /// The built-in server, protected as the demo does it.
    #[must_use]
    pub fn demo() -> Self {
        Self {
            vm: Vm {
                cpu: None,
                clock: ClockName::Step,
                on_reboot: Then::Reset,
                on_crash: Then::Reset,
                name: "demo".into(),
                kernel: "builtin:server".into(),
                initrd: None,
                cmdline: String::new(),
                vcpus: 1,
                memory: Size::mib(128),
            },
            protection: Protection::default(),
            member: Member::default(),
            autostart: false,
            disk: None,
            arbiter: ArbiterKind::File,
            mac: Net::default().mac,
            guest: Ipv4Addr::new(10, 0, 2, 15),
            taps: None,
            log: "info".into(),
            log_file: None,
        }
    }
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The first.
    A,
    /// The second.
    B,
}

impl Host {
    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "alpha",
            Self::B => "beta",
        }
    }

    const fn node(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }
}

/// The machine-local world: a directory that is gone afterwards, a switch, two hosts.
#[derive(Debug)]
pub struct Stage {
    exe: PathBuf,
    directory: Directory,
    switch: Switch,
    settings: Settings,
    id: Hex,
    sites: [Site; 2],
    started: u32,
}

/// Where a host is.
#[derive(Clone, Debug)]
pub struct Site {
    /// What its daemons are started through, such as `ip netns exec NAME`; nothing for this
    /// process's own network.
    pub through: Vec<String>,
    /// Where it listens for its peer's streams.
    pub stream: SocketAddr,
    /// Where it listens for heartbeats.
    pub beats: [SocketAddr; PATHS],
}

impl Site {
    /// Two hosts on loopback, on ports that are free now.
    fn loopback() -> io::Result<[Self; 2]> {
        // Held until all are chosen, so that no two are the same.
        let tcp = [
            TcpListener::bind("127.0.0.1:0")?,
            TcpListener::bind("127.0.0.1:0")?,
        ];
        let udp = [(); 2 * PATHS].map(|()| UdpSocket::bind("127.0.0.1:0"));
        let [a, b, c, d] = udp;
        let beats = [[a?, b?], [c?, d?]];
        let site = |stream: &TcpListener, beats: &[UdpSocket; PATHS]| -> io::Result<Self> {
            Ok(Self {
                through: Vec::new(),
                stream: stream.local_addr()?,
                beats: [beats[0].local_addr()?, beats[1].local_addr()?],
            })
        };
        Ok([site(&tcp[0], &beats[0])?, site(&tcp[1], &beats[1])?])
    }
}

impl Stage {
    /// Sets everything up; `exe` is `colod`.
    ///
    /// # Errors
    /// No room for files, or no port is free.
    pub fn new(exe: &Path, settings: Settings) -> io::Result<Self> {
        Self::at(exe, settings, Site::loopback()?)
    }

    /// As [`new`](Self::new), with the two hosts where they are said to be.
    ///
    /// # Errors
    /// No room for files.
    pub fn at(exe: &Path, settings: Settings, sites: [Site; 2]) -> io::Result<Self> {
        static STAGES: AtomicU32 = AtomicU32::new(0);
        let number = STAGES.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("colod-stage-{}-{number}", std::process::id()));
        let directory = Directory::make(directory)?;
        let id = u128::from(super::now()) << 64 | u128::from(std::process::id());
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(directory.path.join("pair.key"))?
            .write_all(&key(id))?;
        let plug = directory.path.join("switch.sock");
        Ok(Self {
            exe: exe.to_owned(),
            switch: Switch::start(&plug).map_err(naming(&plug))?,
            settings,
            id: Hex(id.to_be_bytes()),
            sites,
            started: 0,
            directory,
        })
    }

    /// Leaves configurations and logs behind, and says where.
    pub fn keep(&mut self) -> &Path {
        self.directory.keep = true;
        &self.directory.path
    }

    /// Where configurations and logs lie.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory.path
    }

    /// The network.
    #[must_use]
    pub const fn switch(&self) -> &Switch {
        &self.switch
    }

    /// Where to plug into it.
    #[must_use]
    pub fn switch_path(&self) -> PathBuf {
        self.directory.path.join("switch.sock")
    }

    const fn site(&self, host: Host) -> &Site {
        let [a, b] = &self.sites;
        match host {
            Host::A => a,
            Host::B => b,
        }
    }

    /// Where a host's daemon listens for its peer's streams.
    #[must_use]
    pub const fn stream_address(&self, host: Host) -> SocketAddr {
        self.site(host).stream
    }

    /// Where a host's daemon listens for heartbeats.
    #[must_use]
    pub const fn beat_addresses(&self, host: Host) -> [SocketAddr; PATHS] {
        self.site(host).beats
    }

    /// What the daemons have in common.
    #[must_use]
    pub const fn settings_now(&self) -> &Settings {
        &self.settings
    }

    /// What the daemons to come have in common; those that run are not changed.
    pub const fn settings(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// Starts `colod primary`, `colod secondary` or `colod run` on a host.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(&mut self, host: Host, command: &str) -> io::Result<Daemon> {
        self.start_with(host, command, &[])
    }

    /// As [`start`](Self::start), with more arguments at the end.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start_with(&mut self, host: Host, command: &str, more: &[&str]) -> io::Result<Daemon> {
        self.started += 1;
        let place = self.directory.path.join(host.name());
        fs::create_dir_all(&place)?;
        let mut config = self.config(host, &place);
        if let Some(disk) = &mut config.disk {
            let own = place.join("disk.img");
            if !own.exists() {
                fs::copy(&disk.path, &own)?;
            }
            disk.path = own;
        }
        let text = toml::to_string(&config).map_err(io::Error::other)?;
        let file = place.join("vm.toml");
        fs::write(&file, text)?;
        let log = place.join(format!("{command}-{}.log", self.started));
        let control = place.join("control.sock");
        let mut program = self.site(host).through.clone();
        program.push(self.exe.display().to_string());
        let mut arguments = vec![command, "--die-with-parent", "--config"];
        let file = file.display().to_string();
        arguments.push(&file);
        arguments.extend_from_slice(more);
        Daemon::start(&program, &arguments, &log, &control, host)
    }

    fn config(&self, host: Host, place: &Path) -> Config {
        let settings = &self.settings;
        let peer = host.other();
        let tap = settings.taps.as_ref().map(|[a, b]| match host {
            Host::A => a.clone(),
            Host::B => b.clone(),
        });
        let heartbeat = self
            .beat_addresses(host)
            .into_iter()
            .zip(self.beat_addresses(peer))
            .map(|(listen, peer)| HeartbeatPath { listen, peer })
            .collect();
        Config {
            vm: settings.vm.clone(),
            net: Net {
                backend: if tap.is_some() {
                    Backend::Tap
                } else {
                    Backend::Socket
                },
                mac: settings.mac,
                path: tap.is_none().then(|| self.switch_path()),
                tap,
                offloads: None,
                announce: vec![settings.guest.into()],
            },
            disk: settings.disk.clone(),
            serial: Serial {
                console: Console::File,
                path: Some(place.join("serial.log")),
            },
            pair: Some(Pair {
                node: host.node(),
                id: self.id,
                key_file: Some(self.directory.path.join("pair.key")),
                listen: Endpoint::Tcp(self.stream_address(host)),
                peer: Endpoint::Tcp(self.stream_address(peer)),
                ram_lanes: 1,
                autostart: self.settings.autostart,
                heartbeat,
                state_dir: place.join("state"),
            }),
            protection: settings.protection,
            member: settings.member,
            arbiter: Arbiter {
                kind: settings.arbiter,
                path: (settings.arbiter == ArbiterKind::File)
                    .then(|| self.directory.path.join("arbiter")),
            },
            control: Control {
                socket: Some(place.join("control.sock")),
            },
            metrics: Metrics::default(),
            log: Log {
                level: settings.log.clone(),
                format: LogFormat::Text,
                file: settings.log_file.clone(),
            },
        }
    }
}

/// A directory that is gone afterwards, unless it is kept.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    keep: bool,
}

impl Directory {
    fn make(path: PathBuf) -> io::Result<Self> {
        fs::create_dir(&path).map_err(naming(&path))?;
        Ok(Self { path, keep: false })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !self.keep {
            let _gone = fs::remove_dir_all(&self.path);
        }
    }
}

/// An error of the system that says of what.
fn naming(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// A key of the machine's own randomness.
fn key(salt: u128) -> Vec<u8> {
    use std::hash::{BuildHasher as _, RandomState};
    // RandomState is keyed by the system's entropy, once a process; four of its answers are 32 bytes.
    let state = RandomState::new();
    (0..4u128)
        .flat_map(|n| state.hash_one(salt + n).to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Purpose;

    #[test]
    fn the_configurations_it_writes_are_good_and_mirror_each_other() {
        let stage = Stage::new(Path::new("colod"), Settings::demo()).unwrap();
        let configs = [Host::A, Host::B].map(|host| {
            let config = stage.config(host, stage.directory());
            let text = toml::to_string(&config).unwrap();
            let read = Config::parse(&text, "vm.toml").unwrap();
            assert_eq!(read, config);
            read.check(Purpose::Pair, "vm.toml").unwrap();
            read.pair.unwrap()
        });
        assert_eq!(configs[0].listen, configs[1].peer);
        assert_eq!(configs[0].heartbeat[1].peer, configs[1].heartbeat[1].listen);
        let directory = stage.directory().to_owned();
        drop(stage);
        assert!(!directory.exists());
    }
}
