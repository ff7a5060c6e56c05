//! The files and sockets that a configuration names: what can be seen of them before anything
//! starts.

use std::{
    fs::{self, File, Metadata},
    io::ErrorKind,
    net::{IpAddr, UdpSocket},
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::{
    Backend, Config, Endpoint, Purpose,
    check::{Wrong, wrong},
};
use colo_driver_mio::record;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, netdevice::name_to_index},
};

/// Longest path of a Unix socket.
const SOCKET_MOST: usize = 107;

impl Config {
    /// Places that cannot be what they are wanted for, or that are wanted for two things.
    pub(super) fn places(&self, purpose: Purpose) -> Result<(), Wrong> {
        if let Some(path) = self
            .net
            .path
            .as_ref()
            .filter(|_| self.net.backend == Backend::Socket)
        {
            short("net.path", path)?;
        }
        if let Some(path) = &self.control.socket {
            short("control.socket", path)?;
            socket("control.socket", path)?;
            // The daemon makes the directory of the socket, and none above it.
            let parent = directory(path);
            if !parent.exists() {
                in_directory("control.socket", parent)?;
            }
        }
        if let (Backend::Tap, Some(name)) = (self.net.backend, &self.net.tap) {
            interface("net.tap", name)?;
        }
        for (key, path) in [
            ("serial.path", &self.serial.path),
            ("log.file", &self.log.file),
        ] {
            if let Some(path) = path {
                no_directory(key, path)?;
                in_directory(key, path)?;
            }
        }
        if let Some(path) = &self.arbiter.path {
            no_directory("arbiter.path", path)?;
            // A daemon can start while shared storage is away: it asks again.
            if purpose == Purpose::Check {
                in_directory("arbiter.path", path)?;
            }
        }
        if let Some(pair) = &self.pair {
            for (key, at) in [("pair.listen", &pair.listen), ("pair.peer", &pair.peer)] {
                if let Endpoint::Unix(path) = at {
                    short(key, path)?;
                }
            }
            match &pair.listen {
                Endpoint::Unix(path) => {
                    socket("pair.listen", path)?;
                    in_directory("pair.listen", path)?;
                }
                Endpoint::Tcp(at) => local("pair.listen", at.ip())?,
            }
            for path in &pair.heartbeat {
                local("pair.heartbeat", path.listen.ip())?;
            }
            if let Ok(meta) = fs::metadata(&pair.state_dir)
                && !meta.is_dir()
            {
                return unlike("pair.state_dir", &pair.state_dir, &meta, "a directory");
            }
        }
        self.distinct()
    }

    fn distinct(&self) -> Result<(), Wrong> {
        let pair = self.pair.as_ref();
        let record = pair.map(|pair| pair.state_dir.join(record::FILE));
        let listen = pair.and_then(|pair| match &pair.listen {
            Endpoint::Unix(path) => Some(path),
            Endpoint::Tcp(_) => None,
        });
        let named = [
            ("vm.kernel", Some(&self.vm.kernel)),
            ("vm.initrd", self.vm.initrd.as_ref()),
            ("disk.path", self.disk.as_ref().map(|disk| &disk.path)),
            (
                "pair.key_file",
                pair.and_then(|pair| pair.key_file.as_ref()),
            ),
            ("the record in pair.state_dir", record.as_ref()),
            ("net.path", self.net.path.as_ref()),
            ("pair.listen", listen),
            ("control.socket", self.control.socket.as_ref()),
            ("arbiter.path", self.arbiter.path.as_ref()),
            ("serial.path", self.serial.path.as_ref()),
            ("log.file", self.log.file.as_ref()),
        ];
        let mut seen: Vec<(&str, PathBuf)> = Vec::new();
        for (key, path) in named {
            // /dev/null is good for more than one.
            let Some(path) = path.filter(|path| !is_device(path)) else {
                continue;
            };
            let place = real(path);
            if let Some((other, _)) = seen.iter().find(|(_, other)| *other == place) {
                return wrong(key, format!("is {}, which is {other} too", path.display()));
            }
            seen.push((key, place));
        }
        Ok(())
    }

    /// What works and should not be left so, each in a line.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let key_file = self.pair.as_ref().and_then(|pair| pair.key_file.as_ref());
        let open = key_file.and_then(|path| {
            let mode = fs::metadata(path).ok()?.permissions().mode() & 0o777;
            let path = path.display();
            (mode & 0o077 != 0).then(|| {
                format!(
                    "pair.key_file {path} has mode {mode:04o}: others can use it; chmod 600 {path}"
                )
            })
        });
        open.into_iter().collect()
    }
}

/// An interface that is there: one that a daemon made for itself would be in no bridge.
fn interface(key: &'static str, name: &str) -> Result<(), Wrong> {
    let known = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|socket| name_to_index(&socket, name));
    match known {
        Err(Errno::NODEV) => wrong(
            key,
            format!(
                "is {name}, which is not there; make it and put it into its bridge: \
                 ip tuntap add {name} mode tap && ip link set {name} up master BRIDGE"
            ),
        ),
        _ => Ok(()),
    }
}

/// An address of this host.
fn local(key: &'static str, at: IpAddr) -> Result<(), Wrong> {
    // Any port: the one that is meant may be a running daemon's.
    match UdpSocket::bind((at, 0)) {
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => wrong(
            key,
            format!("listens at {at}, which is no address of this host"),
        ),
        _ => Ok(()),
    }
}

fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_char_device())
}

/// The path without links and dots, as far as it exists.
fn real(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| {
        match (directory(path).canonicalize(), path.file_name()) {
            (Ok(directory), Some(name)) => directory.join(name),
            _ => path.to_owned(),
        }
    })
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn short(key: &'static str, path: &Path) -> Result<(), Wrong> {
    let (at, len) = (path.display(), path.as_os_str().len());
    if len > SOCKET_MOST {
        let message = format!("is {at}, {len} bytes; a socket has at most {SOCKET_MOST}");
        return wrong(key, message);
    }
    Ok(())
}

/// Nothing, or a socket that may be stale.
fn socket(key: &'static str, path: &Path) -> Result<(), Wrong> {
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            unlike(key, path, &meta, "a socket or nothing")
        }
        _ => Ok(()),
    }
}

fn no_directory(key: &'static str, path: &Path) -> Result<(), Wrong> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => unlike(key, path, &meta, "a file"),
        _ => Ok(()),
    }
}

fn in_directory(key: &'static str, path: &Path) -> Result<(), Wrong> {
    let directory = directory(path);
    match fs::metadata(directory) {
        Ok(meta) if !meta.is_dir() => unlike(key, directory, &meta, "a directory"),
        Ok(_) => Ok(()),
        Err(error) => {
            let (at, of) = (path.display(), directory.display());
            wrong(key, format!("is {at}, but {of}: {error}"))
        }
    }
}

fn unlike<T>(key: &'static str, path: &Path, meta: &Metadata, expected: &str) -> Result<T, Wrong> {
    let (at, kind) = (path.display(), kind(meta));
    wrong(
        key,
        format!("is {at}, which is {kind}, expected {expected}"),
    )
}

/// What kind of file this is, in words.
pub(super) fn kind(meta: &Metadata) -> &'static str {
    let kind = meta.file_type();
    if kind.is_file() {
        "a file"
    } else if kind.is_symlink() {
        "a symbolic link"
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// A file that can be read to its end.
pub(super) fn readable(key: &'static str, path: &Path) -> Result<(), Wrong> {
    opens(key, path, Metadata::is_file)
}

/// A file, or a disk of the host.
pub(super) fn readable_or_disk(key: &'static str, path: &Path) -> Result<(), Wrong> {
    opens(key, path, |meta| {
        meta.is_file() || meta.file_type().is_block_device()
    })
}

/// The kind comes before the opening, which waits where it is a pipe.
fn opens(key: &'static str, path: &Path, good: impl Fn(&Metadata) -> bool) -> Result<(), Wrong> {
    let at = path.display();
    match fs::metadata(path) {
        Ok(meta) if !good(&meta) => unlike(key, path, &meta, "a file"),
        meta => match meta.and_then(|_| File::open(path)) {
            Ok(_) => Ok(()),
            Err(error) => wrong(key, format!("cannot be read: {at}: {error}")),
        },
    }
}

#[cfg(test)]
pub(super) fn make_fifo(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[vm]
kernel = "builtin:server"
[serial]
console = "file"
path = "DIR/serial.log"
[pair]
node = 1
id = "6f1ed002ab5595859014ebf0951522d9"
key_file = "DIR/key"
listen = "127.0.0.1:7800"
peer = "127.0.0.2:7800"
heartbeat = [
    { listen = "127.0.0.1:7801", peer = "127.0.0.2:7801" },
    { listen = "127.0.0.1:7802", peer = "127.0.0.2:7802" },
]
state_dir = "DIR/state"
[arbiter]
path = "DIR/arbiter"
[control]
socket = "DIR/c.sock"
[log]
file = "DIR/log"
"#;

    fn place() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        fs::write(&key, b"0123456789abcdefghijklmnopqrstuv").unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("file"), dir.path().join("link")).unwrap();
        dir
    }

    fn config(dir: &Path, from: &str, to: &str) -> Config {
        assert!(GOOD.contains(from), "{from}");
        let text = GOOD.replacen(from, to, 1);
        let text = text.replace("DIR", dir.to_str().unwrap());
        Config::parse(&text, "vm.toml").unwrap()
    }

    fn error(dir: &Path, from: &str, to: &str) -> String {
        let config = config(dir, from, to);
        let error = config.check(Purpose::Check, "vm.toml").unwrap_err();
        error.to_string().replace(dir.to_str().unwrap(), "DIR")
    }

    #[test]
    fn what_can_be_seen_to_be_wrong_is_seen() {
        let dir = place();
        config(dir.path(), "", "")
            .check(Purpose::Check, "vm.toml")
            .unwrap();
        let long = format!("DIR/{}", "x".repeat(SOCKET_MOST));
        for (from, to, expected) in [
            ("DIR/c.sock", &*long, "control.socket is DIR/xxx"),
            (
                "127.0.0.1:7800",
                &format!("unix:{long}"),
                "a socket has at most 107",
            ),
            (
                "127.0.0.1:7802",
                "127.0.0.1:7801",
                "pair.heartbeat has 127.0.0.1:7801 twice",
            ),
            (
                "127.0.0.2:7802",
                "127.0.0.2:7801",
                "pair.heartbeat has 127.0.0.2:7801 twice",
            ),
            (
                "127.0.0.1:7800",
                "127.0.0.1:0",
                "pair.listen is 127.0.0.1:0, expected a port",
            ),
            (
                "127.0.0.2:7800",
                "127.0.0.2:0",
                "pair.peer is 127.0.0.2:0, expected a port",
            ),
            (
                "127.0.0.1:7801",
                "127.0.0.1:0",
                "pair.heartbeat has 127.0.0.1:0, expected a port",
            ),
            (
                "DIR/state",
                "DIR/file",
                "pair.state_dir is DIR/file, which is a file",
            ),
            (
                "DIR/c.sock",
                "DIR/file",
                "control.socket is DIR/file, which is a file",
            ),
            (
                "DIR/c.sock",
                "DIR/link",
                "control.socket is DIR/link, which is a symbolic link",
            ),
            (
                "127.0.0.1:7800",
                "unix:DIR/file",
                "pair.listen is DIR/file, which is a file",
            ),
            (
                "DIR/serial.log",
                "DIR",
                "serial.path is DIR, which is a directory",
            ),
            ("DIR/log", "DIR", "log.file is DIR, which is a directory"),
            (
                "DIR/log",
                "DIR/no/log",
                "log.file is DIR/no/log, but DIR/no: No such",
            ),
            (
                "DIR/arbiter",
                "DIR",
                "arbiter.path is DIR, which is a directory",
            ),
            (
                "DIR/arbiter",
                "DIR/no/arbiter",
                "arbiter.path is DIR/no/arbiter, but DIR/no: No",
            ),
            (
                "DIR/arbiter",
                "DIR/state/record",
                "arbiter.path is DIR/state/record, which is the record in pair.state_dir too",
            ),
            (
                "DIR/serial.log",
                "DIR/state/../key",
                "serial.path is DIR/state/../key, which is pair.key_file too",
            ),
        ] {
            let error = error(dir.path(), from, to);
            assert!(error.contains(expected), "{to}: {error}");
        }
    }

    #[test]
    fn a_daemon_starts_without_its_shared_storage() {
        let dir = place();
        let config = config(dir.path(), "DIR/arbiter", "DIR/no/arbiter");
        config.check(Purpose::Pair, "vm.toml").unwrap();
    }

    #[test]
    fn a_key_that_others_can_read_is_warned_of() {
        let dir = place();
        let config = config(dir.path(), "", "");
        assert_eq!(config.warnings(), [""; 0]);
        let key = dir.path().join("key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let warnings = config.warnings();
        assert!(warnings[0].contains("key has mode 0640"), "{warnings:?}");
    }
}
