//! Taps: a network namespace with a bridge, a tap for each host, and loopback between the daemons.

use std::{
    io,
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use super::Site;

/// The taps of the two hosts.
const TAPS: [&str; 2] = ["tap-alpha", "tap-beta"];

/// A namespace with the taps of a pair, and `10.0.2.2/24` on the bridge between them; gone when
/// dropped.
#[derive(Debug)]
pub struct Wires {
    name: String,
}

impl Wires {
    /// Makes them.
    ///
    /// # Errors
    /// Not root, or the kernel or the machine lacks what is needed; the error says what was tried.
    pub fn lay() -> io::Result<Self> {
        static LAID: AtomicU32 = AtomicU32::new(0);
        let number = LAID.fetch_add(1, Ordering::Relaxed);
        let wires = Self {
            name: format!("colo-demo-{}-{number}", std::process::id()),
        };
        let name = &wires.name;
        ip(&format!("netns add {name}"))?;
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("-n {name} link add br0 type bridge"))?;
        ip(&format!("-n {name} addr add 10.0.2.2/24 dev br0"))?;
        ip(&format!("-n {name} link set br0 up"))?;
        for tap in TAPS {
            ip(&format!("-n {name} tuntap add {tap} mode tap"))?;
            ip(&format!("-n {name} link set {tap} master br0 up"))?;
        }
        Ok(wires)
    }

    /// The taps of the two hosts.
    #[must_use]
    pub fn taps(&self) -> [String; 2] {
        TAPS.map(str::to_owned)
    }

    /// The namespace's file, for whoever wants to be in it.
    #[must_use]
    pub fn namespace(&self) -> PathBuf {
        ["/run/netns", &self.name].iter().collect()
    }

    /// Both hosts, in the namespace. Its ports are all free.
    #[must_use]
    pub fn sites(&self) -> [Site; 2] {
        [7800, 7900].map(|port| Site {
            through: ["ip", "netns", "exec", &self.name]
                .map(str::to_owned)
                .to_vec(),
            stream: ([127, 0, 0, 1], port).into(),
            beats: [1, 2].map(|path| ([127, 0, 0, 1], port + path).into()),
        })
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        // Not there is as good as removed.
        let _gone = ip(&format!("netns del {}", self.name));
    }
}

fn ip(arguments: &str) -> io::Result<()> {
    let ran = Command::new("ip")
        .args(arguments.split(' '))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(&format!("taps need the program ip (iproute2): {error}")))?;
    if ran.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    Err(failed(&format!(
        "taps need root, tap devices and bridges: ip {arguments}: {}",
        said.trim()
    )))
}

fn failed(why: &str) -> io::Error {
    io::Error::other(why.to_owned())
}
