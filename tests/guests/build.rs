//! Builds the guests in `src-guests` with the same cargo and copies the images to `OUT_DIR`.
//!
//! They are a package of their own, outside the workspace, because they need their own linker
//! script and code model; both come from `src-guests/.cargo/config.toml`, which cargo reads because
//! it is started there.

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

const IMAGES: [&str; 3] = ["dirty", "disk", "server"];
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let source = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("src-guests");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target_dir = out.join("target");
    for part in [
        "src",
        "link.ld",
        "Cargo.toml",
        "Cargo.lock",
        ".cargo/config.toml",
    ] {
        println!("cargo::rerun-if-changed={}", source.join(part).display());
    }

    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .current_dir(&source)
        .args(["build", "--release", "--locked", "--bins", "--target-dir"])
        .arg(&target_dir);
    // What the outer build was told (flags, wrappers such as clippy, another target) is not meant
    // for a freestanding program.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let ours = text.starts_with("CARGO_PROFILE_")
            || text.starts_with("CARGO_BUILD_")
            || text.starts_with("CARGO_TARGET_");
        if ours {
            cargo.env_remove(&name);
        }
    }
    for name in [
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTFLAGS",
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "TARGET",
        "CARGO_INCREMENTAL",
    ] {
        cargo.env_remove(name);
    }
    let output = cargo.output()?;
    if !output.status.success() {
        let report = String::from_utf8_lossy(&output.stderr);
        return Err(format!("the guests in {} do not build:\n{report}", source.display()).into());
    }
    for image in IMAGES {
        fs::copy(
            target_dir.join(TARGET).join("release").join(image),
            out.join(image),
        )?;
    }
    Ok(())
}
