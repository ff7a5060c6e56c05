//! What we need of KVM and why, and the message shown when it is missing.

use std::io;

use kvm_bindings as kb;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use libc::c_ulong;

use crate::capture::KvmLog;
use crate::sys;

/// Why this host cannot run a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The device node is not there.
    #[error(
        "no /dev/kvm: load the module kvm_intel or kvm_amd, and enable virtualization in the firmware \
         (or nested virtualization in the outer hypervisor)"
    )]
    NoKvm,
    /// It is there, but not for this user.
    #[error(
        "no permission to open /dev/kvm: run as root or add this user to the group that owns it (usually kvm)"
    )]
    NoPermission,
    /// It cannot be opened for another reason.
    #[error("cannot open /dev/kvm: {0}")]
    Open(#[source] io::Error),
    /// A KVM from another age.
    #[error("KVM speaks API version {got}, expected 12: update the kernel")]
    ApiVersion {
        /// What it speaks.
        got: i32,
    },
    /// The kernel cannot do something we cannot do without.
    #[error("KVM lacks {name}, needed {why}: use a kernel from Linux {since} on")]
    Missing {
        /// The kernel's name of the capability.
        name: &'static str,
        /// What it is for.
        why: &'static str,
        /// The first release that has it.
        since: &'static str,
    },
    /// No way to log dirty pages.
    #[error(
        "KVM has {name} for dirty logging only up to {most} entries, {asked} were asked: choose the bitmap or a smaller ring"
    )]
    RingSize {
        /// The capability.
        name: &'static str,
        /// The largest ring, 0 if there are none.
        most: u32,
        /// What the configuration wants.
        asked: u32,
    },
    /// A KVM call failed.
    #[error("{what}: {source}")]
    Kvm {
        /// The call.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

struct Need {
    cap: u32,
    name: &'static str,
    why: &'static str,
    since: &'static str,
}

macro_rules! needs {
    ($($cap:ident $since:literal $why:literal),+ $(,)?) => {
        &[$(Need { cap: kb::$cap, name: stringify!($cap), why: $why, since: $since }),+]
    };
}

const NEEDS: &[Need] = needs![
    KVM_CAP_USER_MEMORY "2.6.25" "to give the guest memory",
    KVM_CAP_SET_TSS_ADDR "2.6.25" "to run real-mode code on Intel",
    KVM_CAP_IRQCHIP "2.6.25" "for the interrupt controllers",
    KVM_CAP_EXT_CPUID "2.6.26" "to give both hosts the same CPU model",
    KVM_CAP_MP_STATE "2.6.27" "to save halted and waiting vCPUs",
    KVM_CAP_PIT2 "2.6.32" "for the timer",
    KVM_CAP_PIT_STATE2 "2.6.33" "to save the timer",
    KVM_CAP_IRQFD "2.6.32" "for device interrupts",
    KVM_CAP_IOEVENTFD "2.6.32" "for device notifications",
    KVM_CAP_ADJUST_CLOCK "2.6.34" "to save the clock",
    KVM_CAP_VCPU_EVENTS "2.6.34" "to save pending exceptions",
    KVM_CAP_DEBUGREGS "2.6.35" "to save debug registers",
    KVM_CAP_XSAVE "2.6.36" "to save vector registers",
    KVM_CAP_XCRS "2.6.36" "to save vector register control",
    KVM_CAP_IMMEDIATE_EXIT "4.13" "to stop vCPUs at once",
];

/// The host's KVM, checked for everything we need.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
}

/// Why `/dev/kvm` could not be opened.
fn unopened(error: kvm_ioctls::Error) -> HostError {
    match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::NoKvm,
        libc::EACCES | libc::EPERM => HostError::NoPermission,
        _ => HostError::Open(error.into()),
    }
}

impl Host {
    /// Opens `/dev/kvm` and checks it.
    ///
    /// # Errors
    ///
    /// [`HostError`], one for each thing that can be missing, saying what to do.
    pub fn open() -> Result<Self, HostError> {
        let kvm = Kvm::new().map_err(unopened)?;
        let got = kvm.get_api_version();
        if got != 12 {
            return Err(HostError::ApiVersion { got });
        }
        check(|cap| kvm.check_extension_raw(c_ulong::from(cap)))?;
        Ok(Self { kvm })
    }

    /// The descriptor.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Largest dirty ring in entries, 0 where there are none.
    #[must_use]
    pub fn ring_entries(&self) -> u32 {
        let bytes = self
            .kvm
            .check_extension_raw(c_ulong::from(kb::KVM_CAP_DIRTY_LOG_RING_ACQ_REL));
        u32::try_from(bytes).unwrap_or(0)
            / u32::try_from(size_of::<kb::kvm_dirty_gfn>()).unwrap_or(16)
    }

    /// Most vCPUs a VM can have here.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }
}

fn check(has: impl Fn(u32) -> i32) -> Result<(), HostError> {
    match NEEDS.iter().find(|need| has(need.cap) <= 0) {
        None => Ok(()),
        Some(need) => Err(HostError::Missing {
            name: need.name,
            why: need.why,
            since: need.since,
        }),
    }
}

/// Turns on manual protection of the dirty bitmap, with every page dirty at the start of logging
/// so that switching it on write-protects nothing.
pub(crate) fn enable_manual_protect(vm: &VmFd) -> Result<(), HostError> {
    KvmLog::enable(vm).map_err(|_| HostError::Missing {
        name: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
        why: "to protect pages again in small steps while the guest runs",
        since: "5.7",
    })
}

/// Asks a vCPU for what a copy of it needs to go on with the same clock. The kernel has no capability
/// for it.
pub(crate) fn need_tsc_offset(vcpu: &VcpuFd) -> Result<(), HostError> {
    tsc_offset_of(sys::tsc_offset(vcpu))
}

fn tsc_offset_of(asked: io::Result<u64>) -> Result<(), HostError> {
    asked.map(drop).map_err(|_| HostError::Missing {
        name: "KVM_VCPU_TSC_OFFSET",
        why: "to let a copy go on with the same clock",
        since: "5.16",
    })
}

/// Turns on dirty rings of `entries` each; before the first vCPU.
pub(crate) fn enable_rings(vm: &VmFd, host: &Host, entries: u32) -> Result<(), HostError> {
    let refused = HostError::RingSize {
        name: "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
        most: host.ring_entries(),
        asked: entries,
    };
    if !entries.is_power_of_two() || entries > host.ring_entries() {
        return Err(refused);
    }
    let cap = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        args: [
            u64::from(entries) * size_of::<kb::kvm_dirty_gfn>() as u64,
            0,
            0,
            0,
        ],
        ..Default::default()
    };
    vm.enable_cap(&cap).map_err(|_| refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_that_cannot_be_opened_says_what_to_do() {
        for (errno, says) in [
            (
                libc::ENOENT,
                "no /dev/kvm: load the module kvm_intel or kvm_amd",
            ),
            (
                libc::ENODEV,
                "no /dev/kvm: load the module kvm_intel or kvm_amd",
            ),
            (
                libc::EACCES,
                "no permission to open /dev/kvm: run as root or add this user to",
            ),
            (
                libc::EPERM,
                "no permission to open /dev/kvm: run as root or add this user to",
            ),
            (libc::EMFILE, "cannot open /dev/kvm: Too many open files"),
        ] {
            let error = unopened(kvm_ioctls::Error::new(errno)).to_string();
            assert!(error.starts_with(says), "{errno}: {error}");
        }
    }

    #[test]
    fn a_kernel_without_a_tsc_offset_is_told_which_has_one() {
        let older = tsc_offset_of(Err(io::Error::from_raw_os_error(libc::ENOTTY)));
        assert_eq!(
            older.unwrap_err().to_string(),
            "KVM lacks KVM_VCPU_TSC_OFFSET, needed to let a copy go on with the same clock: use a kernel from Linux 5.16 on"
        );
        tsc_offset_of(Ok(1)).unwrap();
    }

    #[test]
    fn a_missing_capability_is_named_with_its_use_and_release() {
        let error = check(|cap| i32::from(cap != kb::KVM_CAP_IMMEDIATE_EXIT)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "KVM lacks KVM_CAP_IMMEDIATE_EXIT, needed to stop vCPUs at once: use a kernel from Linux 4.13 on"
        );
        check(|_| 1).unwrap();
    }
}
