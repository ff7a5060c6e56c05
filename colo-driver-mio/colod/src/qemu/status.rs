//! `--status FILE`: how it stands with the primary, for whoever looks.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::standby::Event;

/// What the file says, one JSON object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Status {
    /// Whether the primary has asked for a checkpoint, so that its loss is taken for one.
    protected: bool,
    /// The same in words.
    text: String,
}

/// The file.
#[derive(Debug)]
pub(super) struct Board {
    path: PathBuf,
    shown: Option<Status>,
}

impl Board {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            shown: None,
        }
    }

    /// Takes note of an event. A file that cannot be written must not cost the guest.
    pub(super) fn show(&mut self, event: &Event) {
        let Some(status) = status(event) else { return };
        if self.shown.as_ref() == Some(&status) {
            return;
        }
        if let Err(error) = self.write(&status) {
            tracing::warn!("{}: {error}", self.path.display());
        }
        self.shown = Some(status);
    }

    fn write(&self, status: &Status) -> io::Result<()> {
        let mut partial = self.path.clone().into_os_string();
        partial.push(".partial");
        let mut text = serde_json::to_string(status)?;
        text.push('\n');
        fs::write(&partial, text)?;
        fs::rename(&partial, &self.path)
    }
}

/// What an event changes.
fn status(event: &Event) -> Option<Status> {
    let (protected, text) = match event {
        Event::Listening { .. } => (false, "no primary is connected".into()),
        Event::Connected => (false, "the migration comes in".into()),
        Event::Whole { epoch: 0, .. } => (
            false,
            "the migration is whole, COLO has not begun: no checkpoint was asked for".into(),
        ),
        Event::Protected { qemu, .. } => (true, format!("protected, by the rules of {qemu}")),
        Event::Lost { reason, .. } => (false, reason.clone()),
        _ => return None,
    };
    Some(Status { protected, text })
}
