//! Addresses of streams, as a person writes them.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

/// Where a stream is listened on or connected to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `"192.0.2.1:7800"`.
    Tcp(SocketAddr),
    /// `"unix:/run/colo/pair.sock"`.
    Unix(PathBuf),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => text.parse().map(Self::Tcp).map_err(|_| {
                format!("\"{text}\" is no address, expected \"192.0.2.1:7800\", \"[2001:db8::1]:7800\" or \"unix:/path\"")
            }),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}
