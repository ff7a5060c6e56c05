//! The versions of QEMU that the tests run against: the system's, and newer ones unpacked beside
//! it by `tests/newer-qemu.sh`.

use std::{path::PathBuf, process::Command};

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Qemu {
    /// As it is called in the documentation.
    pub(crate) name: &'static str,
    /// Its recording in `tests/fixtures`, the memory of the recorded machine in MiB, and how many
    /// checkpoints are in it.
    pub(crate) recording: (&'static str, u32, u64),
    /// Whether `x-colo` needs `return-path`.
    pub(crate) return_path: bool,
}

pub(crate) const V7_2: Qemu = Qemu {
    name: "7.2",
    recording: ("qemu72-pc-1vcpu", 80, 11),
    return_path: false,
};
pub(crate) const V10_0: Qemu = Qemu {
    name: "10.0",
    recording: ("qemu1013-pc", 64, 16),
    return_path: false,
};
pub(crate) const V11_1: Qemu = Qemu {
    name: "11.1",
    recording: ("qemu111-pc", 64, 16),
    return_path: true,
};
pub(crate) const ALL: [Qemu; 3] = [V7_2, V10_0, V11_1];

impl Qemu {
    /// Its binary, if it is here.
    pub(crate) fn binary(self) -> Option<String> {
        let binary = match self {
            V7_2 => "qemu-system-x86_64".into(),
            newer => cache().join(newer.name).join("qemu-system-x86_64"),
        };
        let said = Command::new(&binary).arg("--version").output().ok()?;
        let said = String::from_utf8_lossy(&said.stdout);
        let version = format!("version {}.", self.name);
        said.contains(&version)
            .then(|| binary.to_str().unwrap().to_owned())
    }

    /// Whether this host can run guests in it; says why not, unless it must.
    pub(crate) fn can_run(self) -> bool {
        let missing = if !std::path::Path::new("/dev/kvm").exists() {
            Some(("kvm", "no /dev/kvm".to_owned()))
        } else if self.binary().is_none() {
            let name = self.name;
            let why = format!("no QEMU {name}; tests/newer-qemu.sh unpacks the newer ones");
            Some(("qemu", why))
        } else {
            None
        };
        let Some((what, why)) = missing else {
            return true;
        };
        let required = std::env::var("COLO_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|r| r == what), "{why}");
        eprintln!("SKIPPED: {why}");
        false
    }

    /// The path of its recording.
    pub(crate) fn recording_path(self) -> String {
        let here = env!("CARGO_MANIFEST_DIR");
        format!("{here}/fixtures/{}.p2s.xz", self.recording.0)
    }
}

/// Where `tests/newer-qemu.sh` unpacks.
fn cache() -> PathBuf {
    match std::env::var_os("XDG_CACHE_HOME") {
        Some(cache) if !cache.is_empty() => PathBuf::from(cache).join("colo-qemu"),
        _ => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/qemu"),
    }
}
