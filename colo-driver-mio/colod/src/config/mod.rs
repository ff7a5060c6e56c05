//! The configuration file of `colod`: one TOML document describes the VM, its pair and how it is
//! protected.
//!
//! | file | holds |
//! |---|---|
//! | `schema.rs` | [`Config`] and its tables: the file as it is written, with every default |
//! | `check.rs` | ranges and contradictions, and what each command needs |
//! | `key.rs` | the pair's key: read, weighed and derived |
//! | `places.rs` | the files it names: what can be seen of them before anything starts |
//! | `load.rs` | reading a file; where an error is and which key was meant |
//! | `value.rs` | durations, sizes, addresses and keys as they are written |
//!
//! Every key, its default, range and reason stand in `docs/operations.md`.

mod check;
mod key;
mod load;
mod places;
mod schema;
mod value;

pub use check::Purpose;
pub use colo_driver_mio::Endpoint;
pub(crate) use key::read_key;
pub use load::ConfigError;
pub use schema::{
    Arbiter, ArbiterKind, Backend, ClockName, Config, Console, Control, CpuName, Disk, Log,
    LogFormat, Member, Metrics, ModeName, Net, Pair, Path as HeartbeatPath, Protection, ResumeName,
    Serial, Then, Vm,
};
pub use value::{Hex, Mac, Size, Span};
