//! Opens the control socket, if the configuration has one.

use std::sync::Arc;

use crate::{
    config::Control,
    control::{Hub, Operator, Server},
};

use crate::cli::Failure;

/// Listens where the configuration says.
pub(crate) fn server(
    control: &Control,
    operator: impl Operator,
    hub: &Hub,
) -> Result<Option<Server>, Failure> {
    let Some(path) = &control.socket else {
        return Ok(None);
    };
    Server::start(path, Arc::new(operator), hub.clone())
        .map(Some)
        .map_err(|error| {
            let what = match error.kind() {
                std::io::ErrorKind::AddrInUse => {
                    "another daemon answers there, or it is a file of another kind".into()
                }
                _ => error.to_string(),
            };
            format!("control.socket {}: {what}", path.display()).into()
        })
}
