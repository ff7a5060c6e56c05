//! The control socket: one JSON object a line, with QEMU's names where QEMU has one.
//!
//! ```text
//! → {"execute": "query-colo-status", "id": 1}
//! ← {"return": {"mode": "primary", "last-mode": "none", "reason": "none"}, "id": 1}
//! → {"execute": "x-colo-lost-heartbeat"}
//! ← {"error": {"class": "GenericError", "desc": "this VM is not protected: no secondary is in step"}}
//! → {"execute": "events"}
//! ← {"return": {}}
//! ← {"event": "COLO_EXIT", "data": {"mode": "primary", "reason": "request"}, "timestamp": {…}}
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `wire.rs` | lines: [`Request`], [`Reply`] |
//! | `server.rs` | [`Server`]: the socket, a thread a connection, so that no client can delay the VM |
//! | `hub.rs` | [`Hub`]: events to whoever listens; a listener that is slow loses events and is told |
//! | `client.rs` | [`Client`]: what `colod ctl`, the demo and the tests use |

mod client;
mod hub;
mod server;
mod wire;

pub use client::{Client, ClientError};
pub use hub::{Hub, Listener};
pub use server::{Operator, Server};
pub use wire::{LINE_MOST, Refused, Reply, Request, WireError};
