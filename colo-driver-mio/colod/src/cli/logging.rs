//! Where logs go and how they look.

use std::{fs::OpenOptions, io::IsTerminal as _, sync::Mutex};

use crate::config::{Log, LogFormat};
use tracing_subscriber::{Layer, Registry, layer::SubscriberExt as _};

use crate::cli::Failure;

/// Sets logging up as the configuration says; `RUST_LOG` has the last word on levels.
pub(crate) fn start(log: &Log) -> Result<(), Failure> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(directives) => Log::parse(&directives).map_err(|why| format!("RUST_LOG {why}"))?,
        Err(_) => log.filter().map_err(|why| format!("log.level {why}"))?,
    };
    let lines = tracing_subscriber::fmt::layer().with_target(true);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match (&log.file, log.format) {
        (None, LogFormat::Text) => {
            let colours = std::io::stderr().is_terminal();
            lines
                .with_ansi(colours)
                .with_writer(std::io::stderr)
                .boxed()
        }
        (None, LogFormat::Json) => lines.json().with_writer(std::io::stderr).boxed(),
        (Some(path), format) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|error| format!("log.file {}: {error}", path.display()))?;
            // A full disk makes writes fail; the layer drops those lines and the VM runs on.
            let lines = lines.with_ansi(false).with_writer(Mutex::new(file));
            match format {
                LogFormat::Text => lines.boxed(),
                LogFormat::Json => lines.json().boxed(),
            }
        }
    };
    tracing::subscriber::set_global_default(Registry::default().with(layer.with_filter(filter)))?;
    Ok(())
}
