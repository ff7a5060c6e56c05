//! A vCPU's state as bytes and back, and why each step has its place.
//!
//! Save, with all vCPUs parked:
//!
//! 1. *MP state* before everything: reading it makes KVM accept a pending INIT or SIPI, which
//!    changes registers.
//! 2. *General, special, vector and debug registers* in any order: reading them changes nothing.
//! 3. *LAPIC* after MP state, for the same reason.
//! 4. *MSRs* after the LAPIC: the TSC deadline belongs to its timer, and a timer that fires between
//!    the two shows as fired in neither or in both.
//! 5. *Events* last: everything above can still move an exception or interrupt into them.
//!
//! Load:
//!
//! 1. *CPUID* was set when the vCPU was made: it decides which values the calls below take.
//! 2. *Special registers* first: they hold the APIC base, which decides how LAPIC state is read, and
//!    the modes by which the rest is checked. They also queue an interrupt, which step 9 overrides.
//! 3. *MP state* after them: KVM takes special registers that look like a reset for a request to run.
//! 4. *XCR0* before *vector registers*: it decides which parts of those are valid.
//! 5. *Debug registers* anywhere.
//! 6. *LAPIC* after the APIC base (2), before the TSC deadline (8), which is ignored unless the LAPIC's
//!    timer is in deadline mode.
//! 7. *TSC offset* before the deadline, which is compared with the guest's TSC.
//! 8. *MSRs*. The kvmclock ones make KVM write guest memory, so RAM must be in place already.
//! 9. *General registers* before *events*: setting them clears pending exceptions. *Events* last.
//!
//! The TSC is set by its offset, not by writing the MSR: KVM takes a write that is within a second of
//! what it expects as an attempt to synchronise vCPUs and keeps the old offset, which would let time
//! go back after a restore.

use std::io;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, IntoBytes};

use crate::device::LoadError;
use crate::sys;

/// Version of a vCPU's section.
pub(crate) const VERSION: u16 = 1;

/// Most MSRs in a section: a bound on what is read from a peer.
const MOST_MSRS: usize = 256;

/// The MSRs that make a vCPU what it is, in the order in which they are loaded. Those that KVM
/// keeps elsewhere (EFER, FS and GS base, APIC base: special registers; TSC: its offset) are not here.
const MSRS: &[u32] = &[
    0x3b,  // TSC_ADJUST
    0x48,  // SPEC_CTRL
    0x8b,  // UCODE_REV
    0x122, // TSX_CTRL
    0x174, // SYSENTER_CS
    0x175, // SYSENTER_ESP
    0x176, // SYSENTER_EIP
    0x17a, // MCG_STATUS
    0x17b, // MCG_CTL
    0x1a0, // MISC_ENABLE
    0x1d9, // DEBUGCTL
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207, // MTRR variable ranges
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f, // …
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,       // MTRR fixed
    0x277,       // PAT
    0x2ff,       // MTRR default type
    0xda0,       // XSS
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SYSCALL_MASK
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
    0x4b56_4d00, // KVM_WALL_CLOCK_NEW
    0x4b56_4d01, // KVM_SYSTEM_TIME_NEW
    0x4b56_4d02, // KVM_ASYNC_PF_EN
    0x4b56_4d03, // KVM_STEAL_TIME
    0x4b56_4d04, // KVM_PV_EOI_EN
    0x4b56_4d05, // KVM_POLL_CONTROL
    0x6e0,       // TSC_DEADLINE, after everything it depends on
];

/// What a vCPU's state call said, and which it was.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {vcpu}, {call}: {source}")]
pub struct VcpuStateError {
    vcpu: usize,
    call: &'static str,
    source: io::Error,
}

/// The list of MSRs that this host has, with room for their values: made once, used every time.
#[derive(Debug)]
pub(crate) struct MsrBuffer(Msrs);

impl MsrBuffer {
    /// Asks a vCPU which of the MSRs it has.
    pub(crate) fn new(fd: &VcpuFd) -> Result<Self, io::Error> {
        let mut present = Vec::new();
        for &index in MSRS {
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            let mut one = msrs(&[entry])?;
            // Neither is an MSR of this vCPU that can be read but not written back its state.
            if fd.get_msrs(&mut one).is_ok_and(|n| n == 1)
                && fd.set_msrs(&one).is_ok_and(|n| n == 1)
            {
                present.push(entry);
            }
        }
        Ok(Self(msrs(&present)?))
    }
}

fn msrs(entries: &[kvm_msr_entry]) -> io::Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Appends the state of a parked vCPU.
pub(crate) fn save(
    id: usize,
    fd: &VcpuFd,
    msrs: &mut MsrBuffer,
    out: &mut Vec<u8>,
) -> Result<(), VcpuStateError> {
    let at = |call| {
        move |e: kvm_ioctls::Error| VcpuStateError {
            vcpu: id,
            call,
            source: e.into(),
        }
    };
    let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
    put(fd.get_mp_state().map_err(at("get MP state"))?.as_bytes());
    put(fd.get_regs().map_err(at("get registers"))?.as_bytes());
    put(fd
        .get_sregs()
        .map_err(at("get special registers"))?
        .as_bytes());
    put(fd
        .get_xsave()
        .map_err(at("get vector registers"))?
        .as_bytes());
    put(fd.get_xcrs().map_err(at("get XCR0"))?.as_bytes());
    put(fd
        .get_debug_regs()
        .map_err(at("get debug registers"))?
        .as_bytes());
    put(fd.get_lapic().map_err(at("get LAPIC"))?.as_bytes());
    let all = &mut msrs.0;
    let want = all.as_slice().len();
    let got = fd.get_msrs(all).map_err(at("get MSRs"))?;
    if got != want {
        return Err(VcpuStateError {
            vcpu: id,
            call: "get MSRs",
            source: io::Error::other(format!("only {got} of {want}")),
        });
    }
    put(&u32::try_from(want).unwrap_or(0).to_le_bytes());
    put(all.as_slice().as_bytes());
    put(fd.get_vcpu_events().map_err(at("get events"))?.as_bytes());
    Ok(())
}

/// A vCPU section, decoded but not yet applied.
#[derive(Debug)]
pub(crate) struct Decoded {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Msrs,
    events: kvm_vcpu_events,
}

/// Reads fixed-size pieces off the front of a section.
pub(crate) struct Pieces<'a> {
    section: &'a str,
    rest: &'a [u8],
}

impl<'a> Pieces<'a> {
    pub(crate) fn new(section: &'a str, rest: &'a [u8]) -> Self {
        Self { section, rest }
    }

    pub(crate) fn take<T: FromBytes>(&mut self, field: &'static str) -> Result<T, LoadError> {
        let (value, rest) = T::read_from_prefix(self.rest).map_err(|_| LoadError::Truncated {
            section: self.section.into(),
            field,
            missing: size_of::<T>() - self.rest.len(),
        })?;
        self.rest = rest;
        Ok(value)
    }

    pub(crate) fn end(self) -> Result<(), LoadError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(LoadError::Trailing {
            section: self.section.into(),
            extra: self.rest.len(),
        })
    }
}

/// Decodes a section wholly.
pub(crate) fn decode(section: &str, bytes: &[u8]) -> Result<Decoded, LoadError> {
    let mut pieces = Pieces::new(section, bytes);
    let mp_state = pieces.take("MP state")?;
    let regs = pieces.take("registers")?;
    let sregs = pieces.take("special registers")?;
    let xsave = pieces.take("vector registers")?;
    let xcrs: kvm_xcrs = pieces.take("XCR0")?;
    let invalid = |field, got: u64, expected| LoadError::Invalid {
        section: section.into(),
        field,
        got,
        expected,
    };
    if xcrs.nr_xcrs as usize > xcrs.xcrs.len() {
        return Err(invalid("XCR0", xcrs.nr_xcrs.into(), "at most 16 registers"));
    }
    let debug = pieces.take("debug registers")?;
    let lapic = pieces.take("LAPIC")?;
    let count: u32 = pieces.take("MSR count")?;
    if count as usize > MOST_MSRS {
        return Err(invalid("MSR count", count.into(), "at most 256"));
    }
    let mut entries = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let entry: kvm_msr_entry = pieces.take("MSRs")?;
        if !MSRS.contains(&entry.index) {
            return Err(invalid(
                "MSR",
                entry.index.into(),
                "one of those that are saved",
            ));
        }
        entries.push(entry);
    }
    let msrs = msrs(&entries).map_err(|_| invalid("MSR count", count.into(), "at most 256"))?;
    let events = pieces.take("events")?;
    pieces.end()?;
    Ok(Decoded {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug,
        lapic,
        msrs,
        events,
    })
}

/// Makes a parked vCPU what the section says, with its TSC reading `tsc` when the host's reads
/// `host_tsc`.
pub(crate) fn load(
    id: usize,
    fd: &VcpuFd,
    state: &Decoded,
    tsc: u64,
    host_tsc: u64,
) -> Result<(), VcpuStateError> {
    let at = |call| {
        move |e: kvm_ioctls::Error| VcpuStateError {
            vcpu: id,
            call,
            source: e.into(),
        }
    };
    fd.set_sregs(&state.sregs)
        .map_err(at("set special registers"))?;
    fd.set_mp_state(state.mp_state)
        .map_err(at("set MP state"))?;
    fd.set_xcrs(&state.xcrs).map_err(at("set XCR0"))?;
    // SAFETY: KVM reads 4096 bytes, the size of the structure: larger state exists only for
    // features (AMX) that a process must ask for, and we do not.
    unsafe { fd.set_xsave(&state.xsave) }.map_err(at("set vector registers"))?;
    fd.set_debug_regs(&state.debug)
        .map_err(at("set debug registers"))?;
    fd.set_lapic(&state.lapic).map_err(at("set LAPIC"))?;
    sys::set_tsc_offset(fd, tsc.wrapping_sub(host_tsc)).map_err(|source| VcpuStateError {
        vcpu: id,
        call: "set TSC offset",
        source,
    })?;
    let want = state.msrs.as_slice().len();
    let done = fd.set_msrs(&state.msrs).map_err(at("set MSRs"))?;
    if done != want {
        let refused = state.msrs.as_slice().get(done).map_or(0, |e| e.index);
        return Err(VcpuStateError {
            vcpu: id,
            call: "set MSRs",
            source: io::Error::other(format!("KVM refused MSR {refused:#x}")),
        });
    }
    fd.set_regs(&state.regs).map_err(at("set registers"))?;
    fd.set_vcpu_events(&state.events)
        .map_err(at("set events"))?;
    // Tells a guest with kvmclock that it stood still, so that its watchdogs do not bark. A guest
    // without says EINVAL.
    let _without = fd.kvmclock_ctrl();
    Ok(())
}
