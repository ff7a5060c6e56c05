//! For `--tap`: a network namespace with a bridge, a tap for each host, and loopback between the
//! daemons. Gone when dropped.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use colo_driver_mio::demo::Site;

use crate::Failure;

/// The taps of the two hosts.
pub(super) const TAPS: [&str; 2] = ["tap-alpha", "tap-beta"];

#[derive(Debug)]
pub(super) struct Wires {
    name: String,
}

impl Wires {
    pub(super) fn lay() -> Result<Self, Failure> {
        let wires = Self {
            name: format!("colo-demo-{}", std::process::id()),
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

    /// The namespace's file, for whoever wants to be in it.
    pub(super) fn namespace(&self) -> PathBuf {
        ["/run/netns", &self.name].iter().collect()
    }

    /// Both hosts, in the namespace. Its ports are all free.
    pub(super) fn sites(&self) -> [Site; 2] {
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

fn ip(arguments: &str) -> Result<(), Failure> {
    let ran = Command::new("ip")
        .args(arguments.split(' '))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("--tap needs the program ip (iproute2): {error}"))?;
    if ran.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    Err(format!(
        "--tap needs root, tap devices and bridges: ip {arguments}: {}",
        said.trim()
    )
    .into())
}
