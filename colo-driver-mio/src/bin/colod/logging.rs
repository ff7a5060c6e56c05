//! Where logs go and how they look.

use std::{fs::OpenOptions, io::IsTerminal as _, sync::Mutex};

use colo_driver_mio::config::{Log, LogFormat};
use tracing_subscriber::{EnvFilter, Layer, Registry, layer::SubscriberExt as _};

use crate::Failure;

/// Sets logging up as the configuration says; `RUST_LOG` has the last word on levels.
pub(crate) fn start(log: &Log) -> Result<(), Failure> {
    let directives = std::env::var("RUST_LOG").unwrap_or_else(|_| log.level.clone());
    let filter = EnvFilter::try_new(&directives).map_err(|error| {
        format!("log.level {directives:?}: {error}; expected error, warn, info, debug or trace")
    })?;
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
