//! The command line. `--help` teaches: every command has an example.

use std::path::PathBuf;

use crate::qemu::{feed::FeedArgs, inspect::InspectArgs, standby::StandbyArgs};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Fault tolerance for KVM virtual machines: two hosts, one VM.
#[derive(Debug, Parser)]
#[command(
    name = "colod",
    version,
    long_about = "Fault tolerance for KVM virtual machines: two hosts, one VM.\n\n\
        A primary runs the VM and copies it to a secondary many times a second. When either host \
        dies, the other goes on, and clients notice nothing but a short silence: no connection \
        breaks, no byte is lost or repeated.",
    after_help = "EXAMPLES:\n  \
        colod demo                            watch a VM survive the death of its host\n  \
        colod check --config vm.toml          is this configuration good?\n  \
        colod primary --config vm.toml        on the first host\n  \
        colod secondary --config vm.toml      on the second; start them in any order\n  \
        colod ctl --socket /run/colo.sock status",
    arg_required_else_help = true,
    subcommand_required = true
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the VM and keep a secondary ready to go on with it.
    Primary(DaemonArgs),
    /// Hold the VM's state, ready to take over.
    Secondary(DaemonArgs),
    /// Run the VM without protection.
    Run(DaemonArgs),
    /// Watch a VM survive the death of its host: everything on this machine, nothing to configure.
    Demo(DemoArgs),
    /// Talk to a running daemon.
    Ctl(CtlArgs),
    /// Write a running VM's state to a file; the VM runs on.
    Save(SaveArgs),
    /// Run a VM from a saved state, without protection.
    Restore(RestoreArgs),
    /// Check a configuration without starting anything.
    Check(ConfigArgs),
    /// Show what is in a captured QEMU COLO stream.
    Inspect(InspectArgs),
    /// Be the COLO secondary of an unmodified QEMU primary, without running a VM.
    Standby(StandbyArgs),
    /// Be the COLO primary of an unmodified QEMU secondary, replaying a captured session.
    Feed(FeedArgs),
}

/// Which configuration.
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// The configuration file; every key is explained in docs/operations.md.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) config: PathBuf,
}

/// How a daemon is started.
#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    pub(crate) die_with_parent: bool,
}

/// `colod demo`.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    colod demo                            kill the primary after five seconds\n  \
    colod demo --kill secondary --json    for machines: one JSON object a line\n  \
    colod demo --kernel bzImage --initrd rootfs.cpio\n\n\
    Exit status 0 means: the client saw no lost, repeated or reset byte.")]
pub(crate) struct DemoArgs {
    /// Which daemon to kill (SIGKILL) after --seconds.
    #[arg(long, value_enum, default_value_t = Kill::Primary)]
    pub(crate) kill: Kill,
    /// How long the client works before the kill, and again after protection is back.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub(crate) seconds: u32,
    /// Silence after which a dead primary is given up, in milliseconds.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(60..=60_000))]
    pub(crate) detection: u32,
    /// Longest time between checkpoints, in milliseconds.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) interval: u32,
    /// Whether the secondary waits at the last checkpoint, or runs along and is compared.
    #[arg(long, value_enum, default_value_t = DemoMode::Standby)]
    pub(crate) mode: DemoMode,
    /// A guest of your own instead of the built-in server; the client is left out.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// Its command line.
    #[arg(long, default_value = "", requires = "kernel")]
    pub(crate) cmdline: String,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(16..=65_536))]
    pub(crate) memory: u32,
    /// Real tap devices and the kernel's TCP stack, in a network namespace; needs root.
    #[arg(long)]
    pub(crate) tap: bool,
    /// One JSON object a line instead of the timeline.
    #[arg(long)]
    pub(crate) json: bool,
    /// Keep the directory with configurations and logs.
    #[arg(long)]
    pub(crate) keep: bool,
}

/// How the demo's pair runs between checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DemoMode {
    /// The secondary is paused at the last checkpoint.
    Standby,
    /// Both run, and what both said leaves at once.
    Lockstep,
}

/// Which daemon the demo kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kill {
    /// The one that runs the VM.
    Primary,
    /// The one that stands by.
    Secondary,
    /// Neither: just watch it work.
    None,
}

/// `colod ctl`.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    colod ctl --socket /run/colo.sock status\n  \
    colod ctl --socket /run/colo.sock set checkpoint-delay 50ms\n  \
    colod ctl --socket /run/colo.sock --json events --history\n  \
    colod ctl --socket /run/colo.sock raw query-colo-status")]
pub(crate) struct CtlArgs {
    /// The daemon's control.socket.
    #[arg(short, long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// Print what the daemon said, one JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
    /// What to ask.
    #[command(subcommand)]
    pub(crate) ask: Ask,
}

/// What can be asked of a daemon.
#[derive(Debug, Subcommand)]
pub(crate) enum Ask {
    /// Who runs the VM, whether it is protected, how the last checkpoints went.
    Status,
    /// Take a checkpoint now and wait until it is safe.
    Checkpoint,
    /// Hand the VM over in good order (primary), or take over (secondary).
    Failover,
    /// Treat the peer as lost: x-colo-lost-heartbeat.
    LostHeartbeat,
    /// Change a setting of the running pair.
    Set {
        /// Which setting.
        #[arg(value_enum)]
        key: Setting,
        /// Its value: a duration such as 50ms, or standby, lockstep.
        value: String,
    },
    /// Print events until the daemon ends.
    Events {
        /// Begin with the last 1,024 of the past.
        #[arg(long)]
        history: bool,
    },
    /// End protection and go on alone.
    Detach,
    /// Take a secondary again after detach.
    Attach,
    /// Serve from this host, whatever the arbiter says. The other host must be off: if it serves,
    /// both do, and what one of them told the world is lost.
    Override {
        /// The other host is off, and what this host has is what is to go on.
        #[arg(long)]
        the_other_host_is_off: bool,
    },
    /// Pause the guest.
    Stop,
    /// Let the guest go on.
    Cont,
    /// Press the power button: the guest shuts itself down, and the VM ends on both hosts.
    Powerdown,
    /// End the VM in good order; the peer does not take over.
    Quit,
    /// Any command of the socket by its name, such as query-colo-status.
    Raw {
        /// The command.
        command: String,
        /// Its arguments as a JSON object.
        #[arg(default_value = "{}")]
        arguments: String,
    },
}

/// What `set` can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Setting {
    /// Longest interval between checkpoints: x-checkpoint-delay.
    CheckpointDelay,
    /// standby or lockstep.
    Mode,
}

/// `colod save`.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLE:\n  colod save --socket /run/colo.sock vm.state")]
pub(crate) struct SaveArgs {
    /// The daemon's control.socket.
    #[arg(short, long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// Where the state goes; replaced whole or not at all.
    pub(crate) file: PathBuf,
}

/// `colod restore`.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLE:\n  colod restore --config vm.toml vm.state")]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
    /// What `colod save` wrote.
    pub(crate) file: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn it_is_called_colod_and_says_what_it_is_for() {
        let cli = Cli::command();
        cli.clone().debug_assert();
        assert!(cli.render_version().starts_with("colod 0."));
        let about = cli.get_about().unwrap().to_string();
        assert!(about.starts_with("Fault tolerance for KVM"), "{about}");
    }
}
