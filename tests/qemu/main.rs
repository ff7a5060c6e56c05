//! The dialect against unmodified QEMU processes, of every version in `versions.rs`.
//!
//! | file | claim |
//! |---|---|
//! | `inspect.rs` | a recording is shown and written again byte for byte; damage is located |
//! | `standby.rs` | 200 checkpoints of a QEMU primary, its death, and the guest goes on |
//! | `feed.rs` | a QEMU secondary takes a recording, and runs on when told that its primary is lost |
//! | `cuts.rs` | a primary that dies at any byte leaves a usable standby |
//! | `damage.rs` | a primary that sends rubbish loses its link and nothing else; nor does what fails on this side cost the guest |
//! | `matrix.rs` | what each version does with each part of it; the table in docs/qemu.md |
//! | `orderly.rs` | a primary that ends in good order is not taken over from if its monitor can be asked; a fence runs first |
//! | `strangers.rs` | who connects and says nothing costs a primary nothing |
//! | `devices.rs` | whatever devices and machine the primary has |
//! | `vm.rs`, `qmp.rs`, `proxy.rs`, `side.rs` | QEMU processes, their monitors, a link that is cut, the standby beside them |
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod cuts;
mod damage;
mod devices;
mod feed;
mod inspect;
mod matrix;
mod orderly;
mod proxy;
mod qmp;
mod side;
mod standby;
mod strangers;
mod versions;
mod vm;

/// One test of each version for each of these functions.
macro_rules! for_each_version {
    ($($name:ident),+ $(,)?) => {
        mod v7_2 {
            $(#[test] fn $name() { super::$name(crate::versions::V7_2); })+
        }
        mod v10_0 {
            $(#[test] fn $name() { super::$name(crate::versions::V10_0); })+
        }
        mod v11_1 {
            $(#[test] fn $name() { super::$name(crate::versions::V11_1); })+
        }
    };
}
use for_each_version;
