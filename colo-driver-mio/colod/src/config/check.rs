//! Ranges and contradictions. What a command needs is asked for by that command only.

use std::time::Duration;

use super::{
    ArbiterKind, Backend, Config, Console, Endpoint, Pair, Span,
    key::read_key,
    load::ConfigError,
    places::{readable, readable_or_disk},
    schema::{Log, Member, Protection},
};
use tracing_subscriber::filter::{EnvFilter, LevelFilter};

/// Least guest RAM: below it no kernel starts.
const MEMORY_LEAST: u64 = 16 << 20;
/// Most guest RAM that is addressed.
const MEMORY_MOST: u64 = 64 << 30;
const VCPUS_MOST: u8 = 8;
const LANES_MOST: u8 = 8;
const PATHS_MOST: usize = 8;
/// Longest interface name of Linux.
const TAP_NAME_MOST: usize = 15;

/// What a configuration is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// `colod run`: the machine alone.
    Run,
    /// `colod primary` and `colod secondary`: the pair too.
    Pair,
    /// `colod check`: whatever is there.
    Check,
}

/// Key and message of the first thing that is wrong.
pub(super) type Wrong = (&'static str, String);

impl Config {
    /// Checks ranges and contradictions, and that the files it names are there.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`], with the first thing that is wrong. `path` is for messages.
    pub fn check(&self, purpose: Purpose, path: &str) -> Result<(), ConfigError> {
        self.machine()
            .and_then(|()| self.net())
            .and_then(|()| self.files())
            .and_then(|()| self.log.filter().map(drop).or_else(|why| wrong("log.level", why)))
            .and_then(|()| self.protection.check())
            .and_then(|()| self.member.check())
            .and_then(|()| match (&self.pair, purpose) {
                (Some(pair), _) => pair.check().and_then(|()| self.arbiter()),
                (None, Purpose::Pair) => wrong(
                    "pair",
                    "is missing: a protected VM needs the two hosts; `colod run` runs it without protection",
                ),
                (None, Purpose::Run | Purpose::Check) => Ok(()),
            })
            .and_then(|()| self.places(purpose))
            .map_err(|(key, message)| ConfigError::Invalid {
                path: path.to_owned(),
                key,
                message,
            })
    }

    fn machine(&self) -> Result<(), Wrong> {
        let vm = &self.vm;
        if !(1..=VCPUS_MOST).contains(&vm.vcpus) {
            return wrong(
                "vm.vcpus",
                format!("is {}, expected 1 to {VCPUS_MOST}", vm.vcpus),
            );
        }
        if !(MEMORY_LEAST..=MEMORY_MOST).contains(&vm.memory.0) {
            return wrong(
                "vm.memory",
                format!("is {}, expected 16M to 64G", vm.memory),
            );
        }
        if !vm.memory.0.is_multiple_of(1 << 20) {
            return wrong(
                "vm.memory",
                format!("is {}, expected whole mebibytes", vm.memory),
            );
        }
        Ok(())
    }

    fn files(&self) -> Result<(), Wrong> {
        let kernel = self.vm.kernel.to_string_lossy();
        if let Some(name) = kernel.strip_prefix("builtin:") {
            if name != "server" {
                return wrong(
                    "vm.kernel",
                    format!("names the builtin guest {name:?}, but there is only builtin:server"),
                );
            }
        } else {
            readable("vm.kernel", &self.vm.kernel)?;
        }
        if let Some(initrd) = &self.vm.initrd {
            readable("vm.initrd", initrd)?;
        }
        if let Some(disk) = &self.disk {
            readable_or_disk("disk.path", &disk.path)?;
        }
        match (self.serial.console, &self.serial.path) {
            (Console::File, None) => wrong("serial.path", "is missing: console is \"file\""),
            (Console::None | Console::Stdio, Some(_)) => wrong(
                "serial.path",
                "contradicts serial.console: only \"file\" has a path",
            ),
            _ => Ok(()),
        }
    }

    fn net(&self) -> Result<(), Wrong> {
        let net = &self.net;
        match (net.backend, &net.tap, &net.path) {
            (Backend::Tap, None, _) => wrong("net.tap", "is missing: backend is \"tap\""),
            (Backend::Socket, _, None) => wrong("net.path", "is missing: backend is \"socket\""),
            (Backend::None | Backend::Socket, Some(_), _) => {
                wrong("net.tap", "contradicts net.backend: only \"tap\" has one")
            }
            (Backend::None | Backend::Socket, ..) if net.offloads() => wrong(
                "net.offloads",
                "contradicts net.backend: only \"tap\" has them",
            ),
            (Backend::None | Backend::Tap, _, Some(_)) => wrong(
                "net.path",
                "contradicts net.backend: only \"socket\" has one",
            ),
            (Backend::Tap, Some(name), None)
                if name.is_empty()
                    || name.len() > TAP_NAME_MOST
                    || name.contains(['/', ' ', '\0']) =>
            {
                wrong(
                    "net.tap",
                    format!(
                        "is {name:?}, expected an interface name of 1 to {TAP_NAME_MOST} bytes"
                    ),
                )
            }
            _ => Ok(()),
        }
    }

    fn arbiter(&self) -> Result<(), Wrong> {
        match (self.arbiter.kind, &self.arbiter.path) {
            (ArbiterKind::File, None) => wrong(
                "arbiter.path",
                "is missing: name a file on storage that both hosts see, or set arbiter.kind = \"none\" for a test",
            ),
            (ArbiterKind::None, Some(_)) => {
                wrong("arbiter.path", "contradicts arbiter.kind = \"none\"")
            }
            _ => Ok(()),
        }
    }
}

impl Pair {
    fn check(&self) -> Result<(), Wrong> {
        if !(1..=2).contains(&self.node) {
            return wrong(
                "pair.node",
                format!(
                    "is {}, expected 1 on one host and 2 on the other",
                    self.node
                ),
            );
        }
        if !(1..=LANES_MOST).contains(&self.ram_lanes) {
            return wrong(
                "pair.ram_lanes",
                format!("is {}, expected 1 to {LANES_MOST}", self.ram_lanes),
            );
        }
        if self.listen == self.peer {
            return wrong(
                "pair.peer",
                format!("is {}, which is pair.listen", self.peer),
            );
        }
        if !(1..=PATHS_MOST).contains(&self.heartbeat.len()) {
            return wrong(
                "pair.heartbeat",
                format!(
                    "has {} paths, expected 1 to {PATHS_MOST}; two or more survive a cut cable",
                    self.heartbeat.len()
                ),
            );
        }
        if let Some(path) = self.heartbeat.iter().find(|path| path.listen == path.peer) {
            return wrong("pair.heartbeat", format!("sends {} to itself", path.listen));
        }
        for (key, at) in [("pair.listen", &self.listen), ("pair.peer", &self.peer)] {
            if matches!(at, Endpoint::Tcp(at) if at.port() == 0) {
                return wrong(key, format!("is {at}, expected a port that is not 0"));
            }
        }
        let mut seen = Vec::new();
        let paths = self.heartbeat.iter();
        for at in paths.flat_map(|path| [path.listen, path.peer]) {
            if at.port() == 0 {
                return wrong(
                    "pair.heartbeat",
                    format!("has {at}, expected a port that is not 0"),
                );
            }
            if seen.contains(&at) {
                return wrong(
                    "pair.heartbeat",
                    format!("has {at} twice, expected another address or port for each path"),
                );
            }
            seen.push(at);
        }
        let Some(key_file) = &self.key_file else {
            return wrong(
                "pair.key_file",
                "is missing: make one with `head -c 32 /dev/urandom > colo.key` and copy it to the other host",
            );
        };
        read_key(key_file).or_else(|why| wrong("pair.key_file", why))?;
        Ok(())
    }
}

impl Protection {
    fn check(&self) -> Result<(), Wrong> {
        within("protection.longest", self.longest, 1, 3_600_000)?;
        within("protection.shortest", self.shortest, 0, 3_600_000)?;
        within(
            "protection.compare_timeout",
            self.compare_timeout,
            1,
            60_000,
        )?;
        if self.shortest > self.longest {
            return wrong(
                "protection.shortest",
                format!(
                    "({}) must not be more than protection.longest ({})",
                    self.shortest, self.longest
                ),
            );
        }
        if !((64 << 10)..=(1 << 30)).contains(&self.hold_bytes.0) {
            return wrong(
                "protection.hold_bytes",
                format!("is {}, expected 64K to 1G", self.hold_bytes),
            );
        }
        Ok(())
    }
}

impl Member {
    /// Interval of heartbeats.
    #[must_use]
    pub fn beat(&self) -> Duration {
        self.beat.map_or(self.detection.0 / 12, |span| span.0)
    }

    /// How long the primary may speak after an acknowledged heartbeat.
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.lease.map_or(self.detection.0 * 5 / 12, |span| span.0)
    }

    /// Silence after which the primary asks to go on alone.
    #[must_use]
    pub fn primary_silence(&self) -> Duration {
        self.primary_silence
            .map_or(self.detection.0 * 7 / 12, |span| span.0)
    }

    fn check(&self) -> Result<(), Wrong> {
        within("member.detection", self.detection, 60, 60_000)?;
        let (beat, lease) = (Span(self.beat()), Span(self.lease()));
        let silence = Span(self.primary_silence());
        if beat.0 < Duration::from_millis(1) {
            return wrong("member.beat", format!("is {beat}, expected 1ms or more"));
        }
        if lease.0 < beat.0 * 3 {
            return wrong(
                "member.lease",
                format!(
                    "({lease}) must be at least three times member.beat ({beat}), or one lost heartbeat mutes the VM"
                ),
            );
        }
        if silence.0 < lease.0 + beat.0 {
            return wrong(
                "member.primary_silence",
                format!(
                    "({silence}) must be at least member.lease ({lease}) and member.beat ({beat})"
                ),
            );
        }
        if self.detection.0 < silence.0 + beat.0 {
            return wrong(
                "member.detection",
                format!(
                    "({}) must be at least member.primary_silence ({silence}) and member.beat ({beat}), so that the primary wins when only the link is cut",
                    self.detection
                ),
            );
        }
        Ok(())
    }
}

impl Log {
    /// What is logged.
    ///
    /// # Errors
    /// [`Log::parse`].
    pub fn filter(&self) -> Result<EnvFilter, String> {
        Self::parse(&self.level)
    }

    /// What is logged by directives such as `info,colo_proto=debug`. A word alone is a level: where
    /// the filter would take it for the name of a module, a misspelt level would silence the daemon.
    ///
    /// # Errors
    /// In words: what is not understood, and what is.
    pub fn parse(directives: &str) -> Result<EnvFilter, String> {
        let expected = "expected off, error, warn, info, debug, trace, or MODULE=LEVEL";
        let mut words = directives
            .split(',')
            .filter(|word| !word.contains(['=', '[']));
        if let Some(word) = words.find(|word| word.parse::<LevelFilter>().is_err()) {
            return Err(format!("has {word:?}, which is no level; {expected}"));
        }
        EnvFilter::try_new(directives)
            .map_err(|error| format!("is {directives:?}: {error}; {expected}"))
    }
}

fn within(key: &'static str, span: Span, least_ms: u64, most_ms: u64) -> Result<(), Wrong> {
    let (least, most) = (Span::from_millis(least_ms), Span::from_millis(most_ms));
    if (least..=most).contains(&span) {
        return Ok(());
    }
    wrong(key, format!("is {span}, expected {least} to {most}"))
}

pub(super) fn wrong<T>(key: &'static str, message: impl Into<String>) -> Result<T, Wrong> {
    Err((key, message.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::places::make_fifo;

    const GOOD: &str = r#"
[vm]
kernel = "builtin:server"
[pair]
node = 1
id = "6f1ed002ab5595859014ebf0951522d9"
key_file = "KEY"
listen = "127.0.0.1:7800"
peer = "127.0.0.2:7800"
heartbeat = [{ listen = "127.0.0.1:7801", peer = "127.0.0.2:7801" }]
state_dir = "state"
[arbiter]
path = "arbiter"
"#;

    fn check(purpose: Purpose, change: impl FnOnce(String) -> String) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        std::fs::write(&key, b"0123456789abcdefghijklmnopqrstuv").unwrap();
        let text = change(GOOD.replace("KEY", key.to_str().unwrap()));
        Config::parse(&text, "vm.toml")
            .and_then(|config| config.check(purpose, "vm.toml"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_small_file_is_enough() {
        check(Purpose::Pair, |text| text).unwrap();
        check(Purpose::Run, |_| {
            "[vm]\nkernel = \"builtin:server\"\n".into()
        })
        .unwrap();
    }

    #[test]
    fn a_pair_is_asked_for_only_where_one_is_needed() {
        let alone = |_| "[vm]\nkernel = \"builtin:server\"\n".to_owned();
        check(Purpose::Check, alone).unwrap();
        let error = check(Purpose::Pair, alone).unwrap_err();
        assert!(error.starts_with("vm.toml: pair is missing"), "{error}");
    }

    #[test]
    fn every_contradiction_is_named() {
        let cases: [(&str, &str, &str); 15] = [
            (
                "[arbiter]",
                "[net]\nbackend = \"tap\"\n[arbiter]",
                "net.tap is missing",
            ),
            (
                "[arbiter]",
                "[net]\ntap = \"t0\"\n[arbiter]",
                "net.tap contradicts",
            ),
            (
                "[arbiter]",
                "[net]\nbackend = \"socket\"\n[arbiter]",
                "net.path is missing",
            ),
            (
                "[arbiter]",
                "[net]\nbackend = \"socket\"\npath = \"x\"\noffloads = true\n[arbiter]",
                "net.offloads contradicts",
            ),
            (
                "[arbiter]",
                "[serial]\nconsole = \"file\"\n[arbiter]",
                "serial.path is missing",
            ),
            (
                "[arbiter]",
                "[serial]\npath = \"x\"\n[arbiter]",
                "serial.path contradicts",
            ),
            (
                "path = \"arbiter\"",
                "kind = \"file\"",
                "arbiter.path is missing",
            ),
            (
                "path = \"arbiter\"",
                "kind = \"none\"\npath = \"x\"",
                "arbiter.path contradicts",
            ),
            ("node = 1", "node = 3", "pair.node is 3"),
            (
                "127.0.0.2:7800",
                "127.0.0.1:7800",
                "pair.peer is 127.0.0.1:7800",
            ),
            ("127.0.0.2:7801", "127.0.0.1:7801", "pair.heartbeat sends"),
            (
                "[arbiter]",
                "[protection]\nshortest = \"200ms\"\n[arbiter]",
                "protection.shortest",
            ),
            (
                "[arbiter]",
                "[member]\ndetection = \"10ms\"\n[arbiter]",
                "member.detection is 10ms",
            ),
            (
                "[arbiter]",
                "[member]\nlease = \"200ms\"\n[arbiter]",
                "member.lease (200ms)",
            ),
            (
                "\"builtin:server\"",
                "\"/nowhere/vmlinux\"",
                "vm.kernel cannot be read",
            ),
        ];
        for (from, to, expected) in cases {
            let error = check(Purpose::Pair, |text| {
                assert!(text.contains(from), "{from}");
                text.replacen(from, to, 1)
            })
            .unwrap_err();
            assert!(error.contains(expected), "{to}: {error}");
        }
    }

    #[test]
    fn a_key_that_is_a_pipe_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        make_fifo(&fifo);
        for key in [fifo.to_str().unwrap(), "/dev/zero"] {
            let error = check(Purpose::Pair, |text| {
                let from = text.lines().find(|line| line.starts_with("key_file"));
                text.replace(from.unwrap(), &format!("key_file = {key:?}"))
            })
            .unwrap_err();
            let expected = format!("pair.key_file is {key}, which is a ");
            assert!(error.contains(&expected), "{error}");
        }
    }

    #[test]
    fn a_misspelt_level_is_no_module() {
        for good in [
            "info",
            "OFF",
            "",
            "info,colo_proto=debug",
            "warn,[span]=trace",
        ] {
            assert!(Log::parse(good).is_ok(), "{good}");
        }
        let says = |level: &str| {
            check(Purpose::Check, |text| {
                text + &format!("[log]\nlevel = {level:?}\n")
            })
            .unwrap_err()
        };
        let error = says("inof");
        assert!(
            error.contains("log.level has \"inof\", which is no level; expected off, error"),
            "{error}"
        );
        assert!(says("warn,colo_proto").contains("has \"colo_proto\""));
        assert!(says("info,colo_proto=debgu").contains("expected off"));
    }

    #[test]
    fn sixty_milliseconds_of_detection_are_possible() {
        check(Purpose::Pair, |text| {
            text + "[member]\ndetection = \"60ms\"\n"
        })
        .unwrap();
    }
}
