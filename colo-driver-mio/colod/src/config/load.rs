//! From a file to a checked [`Config`], or to one line that says what, where and what to do.

use std::{
    fs,
    io::{self, Read as _},
    path::Path,
};

use super::{Config, Purpose, places::kind};

/// Largest file that is read.
const FILE_MOST: u64 = 1 << 20;
/// How alike a misspelt key must be to the one that is suggested.
const ALIKE: f64 = 0.7;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        error: io::Error,
    },
    /// The file is no configuration.
    #[error("{path}:{line}: {message}")]
    Parse {
        /// The file.
        path: String,
        /// Line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value outside its range, or one that contradicts another.
    #[error("{path}: {key} {message}")]
    Invalid {
        /// The file.
        path: String,
        /// The key, with its table.
        key: &'static str,
        /// What is wrong with it and what to do.
        message: String,
    },
}

impl Config {
    /// Reads and checks a file. Relative paths in it are taken from the file's own directory, so
    /// that it means the same wherever the daemon is started.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the line or key, and what to do.
    pub fn load(path: &Path, purpose: Purpose) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let read = |error| ConfigError::Read {
            path: shown.clone(),
            error,
        };
        let text = read_text(path).map_err(read)?;
        let mut config = Self::parse(&text, &shown)?;
        config.resolve(path.parent().unwrap_or_else(|| Path::new(".")));
        config.check(purpose, &shown)?;
        Ok(config)
    }

    /// Parses without looking at ranges. `path` is for messages.
    ///
    /// # Errors
    /// [`ConfigError::Parse`].
    pub fn parse(text: &str, path: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error: toml::de::Error| ConfigError::Parse {
            path: path.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            message: explain(error.message()),
        })
    }

    fn resolve(&mut self, directory: &Path) {
        let builtin = self.vm.kernel.to_string_lossy().starts_with("builtin:");
        let paths = [
            (!builtin).then_some(&mut self.vm.kernel),
            self.vm.initrd.as_mut(),
            self.net.path.as_mut(),
            self.disk.as_mut().map(|disk| &mut disk.path),
            self.serial.path.as_mut(),
            self.arbiter.path.as_mut(),
            self.control.socket.as_mut(),
            self.log.file.as_mut(),
        ];
        let pair = self.pair.iter_mut().flat_map(|pair| {
            [Some(&mut pair.state_dir), pair.key_file.as_mut()]
                .into_iter()
                .flatten()
        });
        for path in paths.into_iter().flatten().chain(pair) {
            *path = directory.join(&*path);
        }
    }
}

/// Reads a file that may be no file: a pipe would be waited for, and a device has no end.
fn read_text(path: &Path) -> io::Result<String> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() {
        let what = format!("is {}, expected a file", kind(&meta));
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut text = String::new();
    fs::File::open(path)?
        .take(FILE_MOST + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > FILE_MOST {
        let what = format!("is longer than {FILE_MOST} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, what));
    }
    Ok(text)
}

fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&b| b == b'\n').count() + 1
}

/// Serde's words for an unknown key, with the key that was probably meant instead of all keys.
fn explain(message: &str) -> String {
    let message = message.lines().next().unwrap_or(message);
    let Some(rest) = message.strip_prefix("unknown field ") else {
        return message.to_owned();
    };
    let mut quoted = rest.split('`').skip(1).step_by(2);
    let Some(key) = quoted.next() else {
        return message.to_owned();
    };
    let known: Vec<&str> = quoted.collect();
    let nearest = known
        .iter()
        .map(|candidate| (strsim::jaro_winkler(key, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(score, _)| *score >= ALIKE);
    match nearest {
        Some((_, candidate)) => format!("unknown key `{key}`, did you mean `{candidate}`?"),
        None => format!("unknown key `{key}`, known here: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::places::make_fifo;

    fn error(text: &str) -> String {
        Config::parse(text, "vm.toml").unwrap_err().to_string()
    }

    #[test]
    fn a_misspelt_key_is_refused_with_the_one_that_was_meant() {
        assert_eq!(
            error("[vm]\nkernel = \"k\"\nmemroy = \"1G\"\n"),
            "vm.toml:3: unknown key `memroy`, did you mean `memory`?"
        );
        assert_eq!(
            error("[vm]\nkernel = \"k\"\n[protecton]\n"),
            "vm.toml:3: unknown key `protecton`, did you mean `protection`?"
        );
    }

    #[test]
    fn a_key_like_no_other_gets_the_whole_list() {
        let error = error("[vm]\nkernel = \"k\"\n[serial]\nzzz = 1\n");
        assert_eq!(
            error,
            "vm.toml:4: unknown key `zzz`, known here: console, path"
        );
    }

    #[test]
    fn a_bad_value_names_its_line_and_shows_a_good_one() {
        let error = error("[vm]\nkernel = \"k\"\nmemory = \"1T\"\n");
        assert!(error.starts_with("vm.toml:3: \"1T\" is no size"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }

    #[test]
    fn paths_are_taken_from_the_directory_of_the_file() {
        let mut config =
            Config::parse("[vm]\nkernel = \"k\"\ninitrd = \"/abs\"\n", "vm.toml").unwrap();
        config.resolve(Path::new("/etc/colo"));
        assert_eq!(config.vm.kernel, Path::new("/etc/colo/k"));
        assert_eq!(config.vm.initrd.as_deref(), Some(Path::new("/abs")));
        let mut config = Config::parse("[vm]\nkernel = \"builtin:server\"\n", "vm.toml").unwrap();
        config.resolve(Path::new("/etc/colo"));
        assert_eq!(config.vm.kernel, Path::new("builtin:server"));
    }

    #[test]
    fn a_missing_file_is_one_line_that_names_it() {
        let error = Config::load(Path::new("/nowhere/vm.toml"), Purpose::Run).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("cannot read configuration /nowhere/vm.toml:"),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        make_fifo(&fifo);
        for (path, expected) in [
            (fifo.as_path(), "is a pipe, expected a file"),
            (Path::new("/dev/zero"), "is a device, expected a file"),
            (dir.path(), "is a directory, expected a file"),
        ] {
            let error = Config::load(path, Purpose::Run).unwrap_err().to_string();
            assert!(error.ends_with(expected), "{error}");
        }
        let long = dir.path().join("long.toml");
        fs::write(&long, vec![b'#'; (FILE_MOST + 1) as usize]).unwrap();
        let error = Config::load(&long, Purpose::Run).unwrap_err().to_string();
        assert!(error.ends_with("is longer than 1048576 bytes"), "{error}");
    }

    #[test]
    fn the_example_is_good_and_every_key_is_documented() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
        let text = fs::read_to_string(docs.join("examples/vm.toml")).unwrap();
        // Addresses that this host has, wherever it is.
        let text = text.replace("10.0.", "127.0.");
        let mut config = Config::parse(&text, "vm.toml").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        fs::write(&key, b"0123456789abcdefghijklmnopqrstuv").unwrap();
        config.vm.kernel = "builtin:server".into();
        config.net.tap = Some("lo".into());
        config.pair.as_mut().unwrap().key_file = Some(key);
        config.serial.path = Some(dir.path().join("serial.log"));
        config.check(Purpose::Pair, "vm.toml").unwrap();

        let operations = fs::read_to_string(docs.join("operations.md")).unwrap();
        let all = toml::Table::try_from(&config).unwrap();
        for (table, keys) in &all {
            for key in keys.as_table().unwrap().keys() {
                let documented = format!("| `{table}.{key}` |");
                assert!(
                    operations.contains(&documented),
                    "docs/operations.md lacks {documented}"
                );
            }
        }
    }
}
