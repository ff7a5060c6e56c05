//! The dialect against unmodified QEMU processes.
//!
//! | file | claim |
//! |---|---|
//! | `inspect.rs` | a recording is shown and written again byte for byte; damage is located |
//! | `standby.rs` | 200 checkpoints of a QEMU primary, its death, and the guest goes on |
//! | `feed.rs` | a QEMU secondary takes a recording, and runs on when told that its primary is lost |
//! | `cuts.rs` | a primary that dies at any byte leaves a usable standby |
//! | `damage.rs` | a primary that sends rubbish loses its link and nothing else; nor does what fails on this side cost the guest |
//! | `devices.rs` | whatever devices and machine the primary has |
//! | `vm.rs`, `qmp.rs`, `proxy.rs`, `side.rs` | QEMU processes, their monitors, a link that is cut, the standby beside them |
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod cuts;
mod damage;
mod devices;
mod feed;
mod inspect;
mod proxy;
mod qmp;
mod side;
mod standby;
mod vm;

/// Whether this host can run QEMU guests; says why not, unless it must.
fn can_run() -> bool {
    let missing = if !std::path::Path::new("/dev/kvm").exists() {
        Some(("kvm", "no /dev/kvm"))
    } else if std::process::Command::new(vm::BINARY)
        .arg("--version")
        .output()
        .is_err()
    {
        Some(("qemu", "no qemu-system-x86_64"))
    } else {
        None
    };
    let Some((what, why)) = missing else {
        return true;
    };
    let required = std::env::var("COLO_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|r| r == what), "{why}");
    eprintln!("SKIPPED: {why}");
    false
}
