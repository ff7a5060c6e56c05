//! The file, key by key. A key that is not here is refused.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use colo_driver_mio::Endpoint;

use super::value::{Hex, Mac, Size, Span, string};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The machine; the same on both hosts.
    pub vm: Vm,
    /// Its network card.
    #[serde(default)]
    pub net: Net,
    /// Its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// Its console.
    #[serde(default)]
    pub serial: Serial,
    /// The two hosts. Not needed by `colod run`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pair: Option<Pair>,
    /// When checkpoints are taken and how much may wait for them.
    #[serde(default)]
    pub protection: Protection,
    /// Liveness.
    #[serde(default)]
    pub member: Member,
    /// Who decides which host owns the VM.
    #[serde(default)]
    pub arbiter: Arbiter,
    /// The control socket.
    #[serde(default)]
    pub control: Control,
    /// The HTTP endpoint for metrics, health and the status page.
    #[serde(default)]
    pub metrics: Metrics,
    /// Logs.
    #[serde(default)]
    pub log: Log,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// For people: in logs and status.
    #[serde(default = "default_name")]
    pub name: String,
    /// ELF (PVH or multiboot) or bzImage. `builtin:server` is the guest of the demo.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Virtual processors.
    #[serde(default = "default_vcpus")]
    pub vcpus: u8,
    /// Guest RAM.
    #[serde(default = "default_memory")]
    pub memory: Size,
    /// What processor the guest sees: the highest level that this host has if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuName>,
    /// What the guest's clocks do at a takeover.
    #[serde(default)]
    pub clock: ClockName,
    /// What follows when the guest asks for a reset.
    #[serde(default)]
    pub on_reboot: Then,
    /// What follows when a processor gives up (triple fault).
    #[serde(default)]
    pub on_crash: Then,
}

/// Processor by name: the levels of the psABI, or all that the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuName {
    /// The baseline.
    #[serde(rename = "x86-64")]
    V1,
    /// With SSE4.2 and popcnt.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// With AVX2, BMI and FMA.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// Everything; both hosts must have the same processor and microcode.
    #[serde(rename = "host")]
    Host,
}

/// What a guest's clocks do at a takeover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClockName {
    /// They step by the time that was lost.
    #[default]
    Step,
    /// They go on where they stood.
    GoOn,
}

/// What becomes of a machine whose guest is at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Then {
    /// It boots again; a protected one stays protected.
    #[default]
    Reset,
    /// The VM ends, on both hosts.
    End,
}

/// The network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Net {
    /// Where its frames go.
    pub backend: Backend,
    /// Hardware address, the same on both hosts.
    pub mac: Mac,
    /// For `tap`: the interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// For `tap`: whether guest and host may leave checksums and TCP segmentation to each other;
    /// the same on both hosts. On if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offloads: Option<bool>,
    /// For `socket`: the switch to connect to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Addresses of the guest that are announced after a takeover. Without any, only the hardware
    /// address is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub announce: Vec<std::net::IpAddr>,
}

/// Where the network card's frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// No card.
    None,
    /// A tap interface of the host.
    Tap,
    /// A user-mode switch behind a Unix `SOCK_SEQPACKET` socket, one frame a packet.
    Socket,
}

/// The disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Raw image.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub readonly: bool,
}

/// The serial console.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Serial {
    /// Where output goes.
    pub console: Console,
    /// For `file`: the file, appended to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

/// Where the serial console's output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// Nowhere.
    #[default]
    None,
    /// The daemon's standard output.
    Stdio,
    /// A file.
    File,
}

/// The two hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// This host: 1 or 2, the peer is the other.
    pub node: u8,
    /// The pair, the same on both hosts.
    pub id: Hex,
    /// 32 bytes or more that only the two hosts know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// Where this host waits for the peer.
    #[serde(with = "string")]
    pub listen: Endpoint,
    /// Where the peer waits.
    #[serde(with = "string")]
    pub peer: Endpoint,
    /// Streams that carry pages side by side.
    #[serde(default = "default_lanes")]
    pub ram_lanes: u8,
    /// Ways that heartbeats take; two or more on separate cables.
    pub heartbeat: Vec<Path>,
    /// Where this host remembers who owned the VM.
    pub state_dir: PathBuf,
    /// Whether this host boots the VM by itself, as a secondary, when nobody serves and the arbiter
    /// names it as the last host that did.
    #[serde(default)]
    pub autostart: bool,
}

/// One way between the hosts for heartbeats (UDP).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Path {
    /// Address here.
    pub listen: SocketAddr,
    /// Address of the peer.
    pub peer: SocketAddr,
}

/// When checkpoints are taken and how much may wait for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Protection {
    /// How the pair runs between checkpoints.
    pub mode: ModeName,
    /// Longest interval between checkpoints.
    pub longest: Span,
    /// Shortest interval between checkpoints.
    pub shortest: Span,
    /// When the primary runs on.
    pub resume: ResumeName,
    /// Longest wait of one output frame for its match before a checkpoint is taken (lockstep).
    pub compare_timeout: Span,
    /// Most bytes of output that may wait.
    pub hold_bytes: Size,
}

/// Mode by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModeName {
    /// The secondary is paused at the last checkpoint.
    Standby,
    /// Both run and their outputs are compared.
    Lockstep,
}

/// Resume policy by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResumeName {
    /// As soon as its state is captured.
    AfterCapture,
    /// When the secondary has loaded it: QEMU's order.
    AfterLoad,
}

/// Liveness: how fast a dead peer is noticed. What is left out follows from `detection`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Member {
    /// Silence after which the secondary asks for the VM.
    pub detection: Span,
    /// Interval of heartbeats; a twelfth of `detection` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beat: Option<Span>,
    /// How long the primary may speak after a heartbeat that was acknowledged; five twelfths of
    /// `detection` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<Span>,
    /// Silence after which the primary asks to go on alone; seven twelfths of `detection` if
    /// absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_silence: Option<Span>,
}

/// Who decides which host owns the VM.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Arbiter {
    /// Which kind.
    pub kind: ArbiterKind,
    /// For `file`: a record on storage that both hosts see.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

/// Kind of arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArbiterKind {
    /// Nobody decides: a cut link makes two owners. For tests only.
    None,
    /// A locked record on storage that both hosts see.
    #[default]
    File,
}

/// The control socket.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// Where it lies; none if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// The HTTP endpoint for metrics, health and the status page.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Where it listens; there is none if absent. It is read-only and asks nobody who they are, so
    /// other addresses than the loopback's belong on a network of operators.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
}

/// Logs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,colo_proto=debug`.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
    /// Where they go; standard error if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Net {
    fn default() -> Self {
        Self {
            backend: Backend::None,
            mac: Mac([0x52, 0x54, 0x00, 0xc0, 0x10, 0x01]),
            tap: None,
            offloads: None,
            path: None,
            announce: Vec::new(),
        }
    }
}

impl Net {
    /// Whether frames carry a virtio header that tells what is left to do in them.
    #[must_use]
    pub fn offloads(&self) -> bool {
        self.offloads.unwrap_or(self.backend == Backend::Tap)
    }
}

impl Default for Protection {
    fn default() -> Self {
        Self {
            mode: ModeName::Standby,
            longest: Span::from_millis(100),
            shortest: Span::from_millis(5),
            resume: ResumeName::AfterCapture,
            compare_timeout: Span::from_millis(100),
            hold_bytes: Size::mib(16),
        }
    }
}

impl Default for Member {
    fn default() -> Self {
        Self {
            detection: Span::from_millis(1200),
            beat: None,
            lease: None,
            primary_silence: None,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
            file: None,
        }
    }
}

fn default_name() -> String {
    "vm".into()
}

const fn default_vcpus() -> u8 {
    1
}

const fn default_memory() -> Size {
    Size::mib(128)
}

const fn default_lanes() -> u8 {
    1
}
