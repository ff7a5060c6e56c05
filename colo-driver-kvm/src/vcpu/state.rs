//! A vCPU's state as bytes and back, and why each step has its place.
//!
//! Save, with all vCPUs parked:
//!
//! 1. *MP state* before everything: reading it makes KVM accept a pending INIT or SIPI, which
//!    changes registers.
//! 2. *General, special, vector and debug registers* in any order: reading them changes nothing.
//! 3. *MSRs* before the LAPIC: the TSC deadline belongs to its timer, and a timer that fires between
//!    the two shows as armed and as fired, which the guest takes for a late interrupt. The other way
//!    round it would show as neither, and the guest would wait for ever.
//! 4. *LAPIC* after MP state, for the same reason.
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
pub(crate) const VERSION: u16 = 2;

/// Most MSRs in a section: a bound on what is read from a peer.
const MOST_MSRS: usize = 256;

/// MSRs of KVM's list that are not saved as such, as first and last of a range.
const ELSEWHERE: &[(u32, u32)] = &[
    // Kept elsewhere: the TSC by its offset; APIC base, EFER, FS and GS base by the special registers.
    (0x10, 0x10),
    (0x1b, 0x1b),
    (0xc000_0080, 0xc000_0080),
    (0xc000_0100, 0xc000_0101),
    // The old numbers of kvmclock, which stand for the same state as the new ones.
    (0x11, 0x12),
    // System management mode, which the machine does not have.
    (0x9e, 0x9e),
    // Nested virtualization, performance counters and Hyper-V: no CPU model shows them.
    (0x480, 0x491),
    (0xc1, 0xc8),
    (0x186, 0x18d),
    (0x309, 0x30c),
    (0x38d, 0x390),
    (0x3f1, 0x3f1),
    (0x4c1, 0x4c8),
    (0xc000_0300, 0xc000_0302),
    (0xc001_0000, 0xc001_0007),
    (0xc001_0117, 0xc001_0117),
    (0xc001_0200, 0xc001_020f),
    (0x4000_0000, 0x4000_0fff),
];

/// What the processor can, in MSRs: it does not change, and both hosts show the same.
const FEATURES: &[u32] = &[0xce, 0xcf, 0x10a, 0x345, 0xc001_1029];

/// Machine check: KVM's list leaves the registers of the only bank out.
const MACHINE_CHECK: &[u32] = &[0x179, 0x17a, 0x17b, 0x400, 0x401, 0x402, 0x403];
/// It is not in KVM's list either, and where the host cannot keep it, it stays zero.
const DEBUGCTL: u32 = 0x1d9;
/// What KVM does when they are written is part of a load, so they are written though they do not
/// differ: the clocks' pages in guest RAM, and the timer.
const ALWAYS_WRITTEN: (u32, u32) = (0x4b56_4d00, 0x4b56_4dff);
/// Loaded last, after everything that it depends on.
const TSC_DEADLINE: u32 = 0x6e0;

/// What a vCPU's state call said, and which it was.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {vcpu}, {call}: {source}")]
pub struct VcpuStateError {
    vcpu: usize,
    call: &'static str,
    source: io::Error,
}

/// The MSRs that make a vCPU what it is, in the order in which they are loaded, with room for their
/// values: made once, used every time.
#[derive(Debug)]
pub(crate) struct MsrBuffer(Msrs);

impl MsrBuffer {
    /// Of the MSRs that KVM lists, those that this vCPU has.
    pub(crate) fn new(listed: &[u32], fd: &VcpuFd) -> Result<Self, io::Error> {
        let mut present = Vec::new();
        for index in candidates(listed) {
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            let mut one = msrs(&[entry])?;
            if fd.get_msrs(&mut one).is_ok_and(|n| n == 1)
                // Neither is an MSR that can be read but not written back the vCPU's state. KVM's
                // log would tell of the attempt on one that is not there.
                && (index == DEBUGCTL || fd.set_msrs(&one).is_ok_and(|n| n == 1))
            {
                present.push(entry);
            }
        }
        Ok(Self(msrs(&present)?))
    }

    /// Their numbers.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> {
        self.0.as_slice().iter().map(|entry| entry.index)
    }
}

/// What is asked for, of what KVM lists and of what it does not.
pub(crate) fn candidates(listed: &[u32]) -> Vec<u32> {
    let elsewhere = |index: u32| ELSEWHERE.iter().any(|&(a, b)| (a..=b).contains(&index));
    let mut all: Vec<u32> = listed
        .iter()
        .filter(|index| !elsewhere(**index) && !FEATURES.contains(index))
        .chain(MACHINE_CHECK)
        .chain([&DEBUGCTL])
        .copied()
        .collect();
    all.sort_unstable_by_key(|&index| (index == TSC_DEADLINE, index));
    all.dedup();
    all
}

/// Those of `wanted` that must be written where the vCPU holds `now`.
fn to_write(wanted: &[kvm_msr_entry], now: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let always =
        |index| index == TSC_DEADLINE || (ALWAYS_WRITTEN.0..=ALWAYS_WRITTEN.1).contains(&index);
    let same = |want: &&kvm_msr_entry, at: usize| now.get(at).is_some_and(|n| n.data == want.data);
    let pairs = wanted.iter().enumerate();
    pairs
        .filter(|(at, want)| always(want.index) || !same(want, *at))
        .map(|(_, want)| *want)
        .collect()
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
    put(fd.get_lapic().map_err(at("get LAPIC"))?.as_bytes());
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
pub(crate) fn decode(section: &str, known: &MsrBuffer, bytes: &[u8]) -> Result<Decoded, LoadError> {
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
    let count: u32 = pieces.take("MSR count")?;
    if count as usize > MOST_MSRS {
        return Err(invalid("MSR count", count.into(), "at most 256"));
    }
    let mut entries = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let entry: kvm_msr_entry = pieces.take("MSRs")?;
        if !known.indices().any(|index| index == entry.index) {
            return Err(invalid(
                "MSR",
                entry.index.into(),
                "one that this host's KVM keeps for a vCPU",
            ));
        }
        entries.push(entry);
    }
    let msrs = msrs(&entries).map_err(|_| invalid("MSR count", count.into(), "at most 256"))?;
    let lapic = pieces.take("LAPIC")?;
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
    set_time(id, fd, state, tsc, host_tsc)?;
    fd.set_regs(&state.regs).map_err(at("set registers"))?;
    fd.set_vcpu_events(&state.events)
        .map_err(at("set events"))?;
    // Tells a guest with kvmclock that it stood still, so that its watchdogs do not bark. A guest
    // without says EINVAL.
    let _without = fd.kvmclock_ctrl();
    Ok(())
}

/// Writes what differs: an MSR that the vCPU does not keep reads as what it was saved as, and is
/// left alone, where a write would be noted in the kernel's log at each load.
fn load_msrs(fd: &VcpuFd, wanted: &Msrs) -> io::Result<()> {
    let mut now = wanted.clone();
    let read = fd.get_msrs(&mut now)?;
    let now = now.as_slice().get(..read).unwrap_or_default();
    let differ = msrs(&to_write(wanted.as_slice(), now))?;
    let done = fd.set_msrs(&differ)?;
    match differ.as_slice().get(done) {
        None => Ok(()),
        Some(refused) => Err(io::Error::other(format!(
            "KVM refused MSR {:#x}",
            refused.index
        ))),
    }
}

/// Steps 7 and 8 of a load, which may be done again with another TSC before the vCPU runs.
pub(crate) fn set_time(
    id: usize,
    fd: &VcpuFd,
    state: &Decoded,
    tsc: u64,
    host_tsc: u64,
) -> Result<(), VcpuStateError> {
    let failed = |call, source| VcpuStateError {
        vcpu: id,
        call,
        source,
    };
    sys::set_tsc_offset(fd, tsc.wrapping_sub(host_tsc))
        .map_err(|source| failed("set TSC offset", source))?;
    load_msrs(fd, &state.msrs).map_err(|source| failed("set MSRs", source))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }
    }

    #[test]
    fn what_kvm_lists_is_saved_unless_it_is_kept_elsewhere() {
        let listed = [
            0x6e0,
            0x10,
            0x48,
            0x140,
            0x480,
            0xc001_0015,
            0x4b56_4d06,
            0x4b56_4d01,
            0x12,
            0x10a,
            0x4000_0020,
            0xc000_0080,
            0x17a,
        ];
        let machine_check = [0x179, 0x17a, 0x17b, 0x400, 0x401, 0x402, 0x403];
        let mut expected = vec![0x48, 0x140, 0x1d9, 0xc001_0015, 0x4b56_4d06, 0x4b56_4d01];
        expected.extend(machine_check);
        expected.sort_unstable();
        expected.push(0x6e0);
        assert_eq!(candidates(&listed), expected);
    }

    #[test]
    fn what_does_not_differ_is_not_written_unless_the_write_does_something() {
        let wanted = [
            entry(0x48, 1),
            entry(0x1d9, 0),
            entry(0x4b56_4d01, 5),
            entry(0x6e0, 9),
        ];
        let now = [
            entry(0x48, 0),
            entry(0x1d9, 0),
            entry(0x4b56_4d01, 5),
            entry(0x6e0, 9),
        ];
        let written =
            |now: &[_]| -> Vec<u32> { to_write(&wanted, now).iter().map(|e| e.index).collect() };
        assert_eq!(written(&now), [0x48, 0x4b56_4d01, 0x6e0]);
        assert_eq!(written(&[]).len(), 4, "what cannot be read is written");
    }
}
