//! The processor the guest sees: a named model, so that two hosts can show the same one.
//!
//! Starts from what KVM supports and takes away: leaves and feature bits that the model does not
//! name, host topology, host caches, and whatever has state that a checkpoint does not carry. What is left is
//! hashed for the hello; hosts that differ print the leaves.
//!
//! Two bits are not KVM's to say: it runs as a hypervisor whether it reports that or not, and whether its LAPIC
//! has a deadline mode is a capability. Releases before Linux 6.14 report neither bit, later ones both; the hash
//! must not depend on that, nor may a guest miss its clock because of it.

use std::fmt;

use kvm_bindings::{CpuId, KVM_CAP_TSC_DEADLINE_TIMER, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::caps::HostError;

/// A named processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CpuModel {
    /// The x86-64 baseline: every host, the software back ends of KVM too.
    #[default]
    V1,
    /// x86-64-v2: every server since about 2010; what current enterprise distributions want.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA; since about 2015.
    V3,
    /// All that KVM offers here. Both hosts must have the same processor and microcode.
    Host,
}

impl CpuModel {
    /// The name, as configuration and messages spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V1 => "x86-64",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::Host => "host",
        }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for CpuModel {
    type Err = CpuError;

    fn from_str(name: &str) -> Result<Self, CpuError> {
        [Self::V1, Self::V2, Self::V3, Self::Host]
            .into_iter()
            .find(|model| model.name() == name)
            .ok_or_else(|| CpuError::NoSuchModel { name: name.into() })
    }
}

/// Why a model cannot be shown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// Not a name we know.
    #[error("no CPU model {name:?}: choose x86-64, x86-64-v2, x86-64-v3 or host")]
    NoSuchModel {
        /// The name.
        name: String,
    },
    /// The host cannot do all of the model.
    #[error(
        "this host lacks {missing:?} of CPU model {model}: choose an older model for both hosts"
    )]
    Lacks {
        /// The model.
        model: CpuModel,
        /// Names of the missing features.
        missing: Vec<&'static str>,
    },
    /// KVM did not tell.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// A feature bit: leaf, subleaf, register (0 = eax … 3 = edx), bit.
struct Bit(&'static str, u32, u32, u8, u8);

/// The baseline: what every 64-bit kernel takes for granted, with the psABI's x86-64 in it.
const V1: &[Bit] = &[
    Bit("fpu", 1, 0, 3, 0),
    Bit("de", 1, 0, 3, 2),
    Bit("pse", 1, 0, 3, 3),
    Bit("tsc", 1, 0, 3, 4),
    Bit("msr", 1, 0, 3, 5),
    Bit("pae", 1, 0, 3, 6),
    Bit("mce", 1, 0, 3, 7),
    Bit("cx8", 1, 0, 3, 8),
    Bit("apic", 1, 0, 3, 9),
    Bit("sep", 1, 0, 3, 11),
    Bit("mtrr", 1, 0, 3, 12),
    Bit("pge", 1, 0, 3, 13),
    Bit("mca", 1, 0, 3, 14),
    Bit("cmov", 1, 0, 3, 15),
    Bit("pat", 1, 0, 3, 16),
    Bit("pse36", 1, 0, 3, 17),
    Bit("clflush", 1, 0, 3, 19),
    Bit("mmx", 1, 0, 3, 23),
    Bit("fxsr", 1, 0, 3, 24),
    Bit("sse", 1, 0, 3, 25),
    Bit("sse2", 1, 0, 3, 26),
    Bit("syscall", 0x8000_0001, 0, 3, 11),
    Bit("nx", 0x8000_0001, 0, 3, 20),
    Bit("lm", 0x8000_0001, 0, 3, 29),
];

/// What the psABI's x86-64-v2 adds.
const V2: &[Bit] = &[
    Bit("sse3", 1, 0, 2, 0),
    Bit("ssse3", 1, 0, 2, 9),
    Bit("cx16", 1, 0, 2, 13),
    Bit("sse4_1", 1, 0, 2, 19),
    Bit("sse4_2", 1, 0, 2, 20),
    Bit("popcnt", 1, 0, 2, 23),
    Bit("lahf_lm", 0x8000_0001, 0, 2, 0),
];

/// What KVM emulates in every release that we run on; shown by every model.
const EMULATED: &[Bit] = &[Bit("x2apic", 1, 0, 2, 21)];

/// Leaf 1, `ecx`: not taken from what KVM reports.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;

/// Leaf 0x4000_0001, `eax`: kvmclock by its current MSRs, and that it agrees between vCPUs. Everything else there has
/// state that is not in a checkpoint, or is of no use to a guest that may move.
const KVM_FEATURES: u32 = KVMCLOCK | 1 << 24;
const KVMCLOCK: u32 = 1 << 3;
/// Rates of TSC and LAPIC timer, which differ between hosts by a little and are no part of the hash.
const KVM_TIMING: u32 = 0x4000_0010;
/// KVM's LAPIC timer counts nanoseconds.
const LAPIC_KHZ: u32 = 1_000_000;

/// What even `host` does not show: its state is not in a checkpoint, or is nothing that KVM lets us carry.
const HIDDEN: &[Bit] = &[
    Bit("monitor", 1, 0, 2, 3),
    Bit("vmx", 1, 0, 2, 5),
    Bit("pdcm", 1, 0, 2, 15),
    Bit("sgx", 7, 0, 1, 2),
    Bit("mpx", 7, 0, 1, 14),
    Bit("intel_pt", 7, 0, 1, 25),
    Bit("waitpkg", 7, 0, 2, 5),
    Bit("shstk", 7, 0, 2, 7),
    Bit("sgx_lc", 7, 0, 2, 30),
    Bit("pks", 7, 0, 2, 31),
    Bit("arch_lbr", 7, 0, 3, 19),
    Bit("ibt", 7, 0, 3, 20),
    Bit("amx_bf16", 7, 0, 3, 22),
    Bit("amx_tile", 7, 0, 3, 24),
    Bit("amx_int8", 7, 0, 3, 25),
    Bit("arch_capabilities", 7, 0, 3, 29),
    Bit("core_capabilities", 7, 0, 3, 30),
    Bit("svm", 0x8000_0001, 0, 2, 2),
    Bit("osvw", 0x8000_0001, 0, 2, 9),
    Bit("ibs", 0x8000_0001, 0, 2, 10),
    Bit("lwp", 0x8000_0001, 0, 2, 15),
    Bit("perfctr_core", 0x8000_0001, 0, 2, 23),
    Bit("perfctr_nb", 0x8000_0001, 0, 2, 24),
    Bit("perfctr_llc", 0x8000_0001, 0, 2, 28),
    Bit("invariant_tsc", 0x8000_0007, 0, 3, 8),
];

/// What the psABI's x86-64-v3 adds.
const V3: &[Bit] = &[
    Bit("fma", 1, 0, 2, 12),
    Bit("movbe", 1, 0, 2, 22),
    Bit("xsave", 1, 0, 2, 26),
    Bit("avx", 1, 0, 2, 28),
    Bit("f16c", 1, 0, 2, 29),
    Bit("bmi1", 7, 0, 1, 3),
    Bit("avx2", 7, 0, 1, 5),
    Bit("bmi2", 7, 0, 1, 8),
    Bit("abm", 0x8000_0001, 0, 2, 5),
];

/// x87, SSE and AVX state: what `xsave` of x86-64-v3 covers.
const V3_XCR0: u32 = 0b111;
const V3_XSAVE_BYTES: u32 = 576 + 256;

/// The processor as one VM's vCPUs see it.
#[derive(Debug, Clone)]
pub struct Cpu {
    model: CpuModel,
    leaves: Vec<kvm_cpuid_entry2>,
}

/// What a host's KVM offers.
struct Offer<'a> {
    leaves: &'a [kvm_cpuid_entry2],
    tsc_deadline: bool,
}

/// Two hosts differ in one register of one leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// CPUID leaf.
    pub leaf: u32,
    /// Its subleaf.
    pub subleaf: u32,
    /// Register name.
    pub register: &'static str,
    /// Here.
    pub ours: u32,
    /// There.
    pub theirs: u32,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "leaf {:#x}.{:x} {}: {:#010x} here, {:#010x} there",
            self.leaf, self.subleaf, self.register, self.ours, self.theirs
        )
    }
}

impl Cpu {
    /// The model as this host can show it.
    ///
    /// # Errors
    ///
    /// [`CpuError::Lacks`] naming every missing feature.
    pub fn new(kvm: &Kvm, model: CpuModel) -> Result<Self, CpuError> {
        let host = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| HostError::Kvm {
                what: "KVM_GET_SUPPORTED_CPUID",
                source: e.into(),
            })?;
        let deadline = kvm.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into());
        let offer = Offer {
            leaves: host.as_slice(),
            tsc_deadline: deadline > 0,
        };
        Self::filtered(&offer, model)
    }

    /// The highest level, and all below it, that this host can show: names only, never `host`.
    ///
    /// # Errors
    ///
    /// [`CpuError::Lacks`] if it cannot show the lowest.
    pub fn best(kvm: &Kvm) -> Result<CpuModel, CpuError> {
        for model in [CpuModel::V3, CpuModel::V2] {
            match Self::new(kvm, model) {
                Ok(_) => return Ok(model),
                Err(CpuError::Lacks { .. }) => {}
                Err(other) => return Err(other),
            }
        }
        Self::new(kvm, CpuModel::V1).map(|cpu| cpu.model)
    }

    fn filtered(offer: &Offer<'_>, model: CpuModel) -> Result<Self, CpuError> {
        let mut leaves: Vec<_> = match model {
            CpuModel::Host => offer.leaves.iter().filter_map(|e| unhosted(*e)).collect(),
            CpuModel::V1 => named(offer.leaves, model, &[V1])?,
            CpuModel::V2 => named(offer.leaves, model, &[V1, V2])?,
            CpuModel::V3 => named(offer.leaves, model, &[V1, V2, V3])?,
        };
        for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 1) {
            leaf.ecx = leaf.ecx & !TSC_DEADLINE | HYPERVISOR;
            if offer.tsc_deadline {
                leaf.ecx |= TSC_DEADLINE;
            }
        }
        Ok(Self { model, leaves })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> CpuModel {
        self.model
    }

    /// What one vCPU sees: the shared leaves with its own APIC id and this host's clock rate in them.
    pub(crate) fn for_vcpu(&self, id: u8, count: u8, tsc_khz: u32) -> Result<CpuId, HostError> {
        let mut leaves: Vec<_> = self
            .leaves
            .iter()
            .map(|entry| {
                let mut entry = *entry;
                match entry.function {
                    1 => {
                        entry.ebx =
                            (entry.ebx & 0xff00) | u32::from(id) << 24 | u32::from(count) << 16;
                        if count > 1 {
                            entry.edx |= 1 << 28;
                        }
                    }
                    KVM_TIMING => entry.eax = tsc_khz,
                    _ => {}
                }
                entry
            })
            .collect();
        leaves.extend(topology(id, count));
        CpuId::from_entries(&leaves).map_err(|_| HostError::Kvm {
            what: "too many CPUID leaves",
            source: std::io::ErrorKind::InvalidData.into(),
        })
    }

    /// FNV-1a over all leaves: equal on two hosts that show the same processor.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| {
            (hash ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
        })
    }

    /// The leaves as bytes (24 a leaf, little-endian: leaf, subleaf, eax, ebx, ecx, edx), to be
    /// sent to a peer that wants to know where it differs.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.leaves
            .iter()
            .flat_map(|e| [e.function, e.index, e.eax, e.ebx, e.ecx, e.edx])
            .flat_map(u32::to_le_bytes)
            .collect()
    }

    /// Where a peer's leaves, as [`bytes`](Self::bytes) made them, differ from ours. A leaf that one
    /// side lacks counts as zeros.
    #[must_use]
    pub fn differences(&self, theirs: &[u8]) -> Vec<Difference> {
        let theirs = parse(theirs);
        let ours = parse(&self.bytes());
        let mut keys: Vec<_> = ours.iter().chain(&theirs).map(|e| (e[0], e[1])).collect();
        keys.sort_unstable();
        keys.dedup();
        let find = |all: &[[u32; 6]], key| {
            all.iter()
                .find(|e| (e[0], e[1]) == key)
                .map_or([0; 4], |e| [e[2], e[3], e[4], e[5]])
        };
        let mut all = Vec::new();
        for key in keys {
            let pairs = find(&ours, key).into_iter().zip(find(&theirs, key));
            for (register, (ours, theirs)) in ["eax", "ebx", "ecx", "edx"].into_iter().zip(pairs) {
                if ours != theirs {
                    all.push(Difference {
                        leaf: key.0,
                        subleaf: key.1,
                        register,
                        ours,
                        theirs,
                    });
                }
            }
        }
        all
    }
}

fn parse(bytes: &[u8]) -> Vec<[u32; 6]> {
    let (leaves, _rest) = bytes.as_chunks::<24>();
    leaves
        .iter()
        .map(|leaf| {
            let (words, _) = leaf.as_chunks::<4>();
            let mut out = [0; 6];
            for (out, word) in out.iter_mut().zip(words) {
                *out = u32::from_le_bytes(*word);
            }
            out
        })
        .collect()
}

/// Leaf 0xb: one package of `count` cores with a thread each.
fn topology(id: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let shift = count.next_power_of_two().trailing_zeros();
    [
        (0, 0, 1, THREAD),
        (1, shift, u32::from(count), CORE | 1),
        (2, 0, 0, 2),
    ]
    .map(|(index, eax, ebx, ecx)| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx: id.into(),
        ..Default::default()
    })
}

/// A host leaf without what differs between vCPUs, moves under us or has state that stays behind.
fn unhosted(mut entry: kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    match entry.function {
        1 => entry.ebx &= 0xff00,
        0x4000_0000 => entry.eax = KVM_TIMING,
        0x4000_0001 => entry.eax &= KVM_FEATURES,
        KVM_TIMING => entry.ebx = LAPIC_KHZ,
        // Topology is ours to say. Frequencies, power and counters are of this host, now. The rest belongs to
        // features that are hidden.
        0xb | 0x1f | 0xa | 0x15 | 0x16 | 0x12 | 0x14 | 0x1c..=0x1e | 0x23 => return None,
        0x8000_000a | 0x8000_001b | 0x8000_001e | 0x8000_001f | 0x8000_0022 => return None,
        _ => {}
    }
    for bit in HIDDEN {
        if (bit.1, bit.2) == (entry.function, entry.index) {
            *register(&mut entry, bit.3) &= !(1 << bit.4);
        }
    }
    Some(entry)
}

fn register(entry: &mut kvm_cpuid_entry2, which: u8) -> &mut u32 {
    match which {
        0 => &mut entry.eax,
        1 => &mut entry.ebx,
        2 => &mut entry.ecx,
        _ => &mut entry.edx,
    }
}

fn named(
    host: &[kvm_cpuid_entry2],
    model: CpuModel,
    required: &[&[Bit]],
) -> Result<Vec<kvm_cpuid_entry2>, CpuError> {
    let at = |leaf: u32, subleaf: u32| {
        host.iter()
            .find(|e| e.function == leaf && e.index == subleaf)
            .copied()
            .unwrap_or_else(|| kvm_cpuid_entry2 {
                function: leaf,
                index: subleaf,
                ..Default::default()
            })
    };
    let has = |bit: &Bit| *register(&mut at(bit.1, bit.2), bit.3) >> bit.4 & 1 == 1;
    let missing: Vec<_> = required
        .iter()
        .flat_map(|set| set.iter())
        .filter(|bit| !has(bit))
        .map(|bit| bit.0)
        .collect();
    if !missing.is_empty() {
        return Err(CpuError::Lacks { model, missing });
    }
    let bits = |leaf: u32, which: u8| {
        let all = required
            .iter()
            .chain([&EMULATED])
            .flat_map(|set| set.iter());
        all.filter(|bit| bit.1 == leaf && bit.3 == which && has(bit))
            .fold(0, |mask, bit| mask | 1 << bit.4)
    };
    let vendor = at(0, 0);
    let v3 = model == CpuModel::V3;
    let entry = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let indexed = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
        function,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    // One family, model and stepping for a named model: the guest chooses its quirks by them.
    // A recent one of each vendor, so that no old processor's faults are worked around.
    let signature = if vendor.ebx == u32::from_le_bytes(*b"Auth") {
        0x00b0_0f21
    } else {
        0x0008_06f8
    };
    let highest = if v3 { 0xd } else { 0xb };
    let mut leaves = vec![
        entry(0, highest, vendor.ebx, vendor.ecx, vendor.edx),
        // CLFLUSH line of 64 bytes; APIC id and count are each vCPU's own.
        entry(1, signature, 0x0800, bits(1, 2), bits(1, 3)),
        indexed(7, 0, 0, bits(7, 1), bits(7, 2), 0),
    ];
    if v3 {
        leaves.push(indexed(0xd, 0, V3_XCR0, V3_XSAVE_BYTES, V3_XSAVE_BYTES, 0));
        leaves.push(indexed(0xd, 1, 0, 0, 0, 0));
        leaves.push(indexed(0xd, 2, 256, 576, 0, 0));
    }
    let kvm = at(0x4000_0000, 0);
    let features = at(0x4000_0001, 0).eax & KVM_FEATURES;
    leaves.push(entry(0x4000_0000, KVM_TIMING, kvm.ebx, kvm.ecx, kvm.edx));
    leaves.push(entry(0x4000_0001, features, 0, 0, 0));
    leaves.push(entry(KVM_TIMING, 0, LAPIC_KHZ, 0, 0));
    leaves.push(entry(
        0x8000_0000,
        0x8000_0008,
        vendor.ebx,
        vendor.ecx,
        vendor.edx,
    ));
    leaves.push(entry(
        0x8000_0001,
        signature,
        0,
        bits(0x8000_0001, 2),
        bits(0x8000_0001, 3),
    ));
    leaves.extend(
        brand(model)
            .into_iter()
            .zip(0x8000_0002..)
            .map(|(r, f)| entry(f, r[0], r[1], r[2], r[3])),
    );
    // Invariant TSC is not shown: a takeover may change its rate.
    leaves.push(entry(0x8000_0007, 0, 0, 0, 0));
    // Physical bits as the host has them: they bound where RAM may lie.
    leaves.push(entry(0x8000_0008, at(0x8000_0008, 0).eax & 0xffff, 0, 0, 0));
    Ok(leaves)
}

/// The brand string, 48 bytes in three leaves.
fn brand(model: CpuModel) -> [[u32; 4]; 3] {
    let mut text = [0u8; 48];
    for (to, from) in text
        .iter_mut()
        .zip(b"colo ".iter().chain(model.name().as_bytes()))
    {
        *to = *from;
    }
    let (words, _) = text.as_chunks::<4>();
    let mut out = [[0; 4]; 3];
    for (to, from) in out.iter_mut().flatten().zip(words) {
        *to = u32::from_le_bytes(*from);
    }
    out
}

/// Physical address bits that KVM gives guests here.
pub(crate) fn physical_bits(kvm: &Kvm) -> Result<u32, HostError> {
    let all = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| HostError::Kvm {
            what: "KVM_GET_SUPPORTED_CPUID",
            source: e.into(),
        })?;
    let leaf = all.as_slice().iter().find(|e| e.function == 0x8000_0008);
    Ok(leaf.map_or(36, |e| e.eax & 0xff))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(without: Option<&str>) -> Vec<kvm_cpuid_entry2> {
        let mut all: Vec<kvm_cpuid_entry2> = [
            0,
            1,
            7,
            0xd,
            0x4000_0000,
            0x4000_0001,
            0x8000_0001,
            0x8000_0007,
        ]
        .into_iter()
        .map(|function| kvm_cpuid_entry2 {
            function,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        })
        .collect();
        for bit in V1
            .iter()
            .chain(V2)
            .chain(V3)
            .filter(|b| Some(b.0) == without)
        {
            let entry = all.iter_mut().find(|e| e.function == bit.1).unwrap();
            *register(entry, bit.3) &= !(1 << bit.4);
        }
        all
    }

    fn shown(host: &[kvm_cpuid_entry2], model: CpuModel) -> Result<Cpu, CpuError> {
        let offer = Offer {
            leaves: host,
            tsc_deadline: true,
        };
        Cpu::filtered(&offer, model)
    }

    fn leaf(cpu: &Cpu, function: u32) -> kvm_cpuid_entry2 {
        let found = cpu.leaves.iter().find(|e| e.function == function);
        *found.unwrap()
    }

    /// Releases before 6.14 report neither that there is a hypervisor nor the deadline timer.
    #[test]
    fn the_hash_does_not_depend_on_what_this_kvm_release_reports() {
        let newer = host(None);
        let mut older = host(None);
        for entry in older.iter_mut().filter(|e| e.function == 1) {
            entry.ecx &= !(TSC_DEADLINE | HYPERVISOR);
        }
        for model in [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::Host] {
            let (older, newer) = (shown(&older, model).unwrap(), shown(&newer, model).unwrap());
            assert_eq!(older.differences(&newer.bytes()), [], "{model}");
            assert_eq!(leaf(&older, 1).ecx & HYPERVISOR, HYPERVISOR);
            assert_eq!(leaf(&older, 1).ecx & TSC_DEADLINE, TSC_DEADLINE);
        }
        let without = Offer {
            leaves: &newer,
            tsc_deadline: false,
        };
        let without = Cpu::filtered(&without, CpuModel::V1).unwrap();
        assert_eq!(leaf(&without, 1).ecx & TSC_DEADLINE, 0);
    }

    /// The psABI's table, by hand: a level has these features and no others beside what any kernel needs.
    #[test]
    fn the_levels_are_those_of_the_psabi() {
        let names = |set: &[Bit]| set.iter().map(|bit| bit.0).collect::<Vec<_>>();
        assert_eq!(
            names(V2),
            [
                "sse3", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt", "lahf_lm"
            ]
        );
        assert_eq!(
            names(V3),
            [
                "fma", "movbe", "xsave", "avx", "f16c", "bmi1", "avx2", "bmi2", "abm"
            ]
        );
        for name in [
            "cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2",
        ] {
            assert!(names(V1).contains(&name), "{name}");
        }
        let v2 = leaf(&shown(&host(None), CpuModel::V2).unwrap(), 1).ecx;
        let mask = |set: &[Bit]| {
            let of_leaf = set.iter().filter(|b| (b.1, b.3) == (1, 2));
            of_leaf.fold(0, |mask, b| mask | 1 << b.4)
        };
        let platform = mask(EMULATED) | TSC_DEADLINE | HYPERVISOR;
        assert_eq!(v2, mask(V2) | platform);
    }

    #[test]
    fn nothing_is_shown_of_kvm_whose_state_is_not_saved() {
        use crate::vcpu::state::candidates;
        for model in [CpuModel::V1, CpuModel::Host] {
            let features = leaf(&shown(&host(None), model).unwrap(), 0x4000_0001).eax;
            assert_eq!(features, KVMCLOCK | 1 << 24, "{model}");
        }
        let kvmclock = [0x4b56_4d00, 0x4b56_4d01];
        let saved = candidates(&kvmclock);
        assert!(kvmclock.iter().all(|msr| saved.contains(msr)));
        let cpu = shown(&host(None), CpuModel::Host).unwrap();
        for name in ["vmx", "svm", "intel_pt", "pdcm", "shstk", "amx_tile"] {
            let bit = HIDDEN.iter().find(|bit| bit.0 == name).unwrap();
            let mut entry = leaf(&cpu, bit.1);
            assert_eq!(*register(&mut entry, bit.3) >> bit.4 & 1, 0, "{name}");
        }
    }

    #[test]
    fn clock_rates_are_shown_and_not_hashed() {
        let cpu = shown(&host(None), CpuModel::V1).unwrap();
        let before = cpu.hash();
        let all = cpu.for_vcpu(0, 1, 2_596_126).unwrap();
        let timing = all.as_slice().iter().find(|e| e.function == KVM_TIMING);
        assert_eq!(timing.unwrap().eax, 2_596_126);
        assert_eq!(leaf(&cpu, KVM_TIMING).eax, 0);
        assert_eq!(cpu.hash(), before);
    }

    #[test]
    fn vcpus_are_cores_of_one_package() {
        let cpu = shown(&host(None), CpuModel::V1).unwrap();
        let all = cpu.for_vcpu(2, 3, 0).unwrap();
        let levels: Vec<_> = all
            .as_slice()
            .iter()
            .filter(|e| e.function == 0xb)
            .map(|e| (e.index, e.eax, e.ebx, e.edx))
            .collect();
        assert_eq!(levels, [(0, 0, 1, 2), (1, 2, 3, 2), (2, 0, 0, 2)]);
    }

    #[test]
    fn a_named_model_hides_what_it_does_not_name() {
        let rich = shown(&host(None), CpuModel::V2).unwrap();
        let poor = shown(&host(Some("avx2")), CpuModel::V2).unwrap();
        assert_eq!(rich.hash(), poor.hash());
        assert_eq!(rich.differences(&poor.bytes()), []);
    }

    #[test]
    fn a_lacking_host_is_refused_by_feature_name() {
        let error = shown(&host(Some("avx2")), CpuModel::V3).unwrap_err();
        assert_eq!(
            error.to_string(),
            "this host lacks [\"avx2\"] of CPU model x86-64-v3: choose an older model for both hosts"
        );
    }

    #[test]
    fn hosts_that_differ_list_the_leaves() {
        let one = shown(&host(None), CpuModel::Host).unwrap();
        let other = shown(&host(Some("avx2")), CpuModel::Host).unwrap();
        assert_ne!(one.hash(), other.hash());
        let all = one.differences(&other.bytes());
        assert_eq!(all.len(), 1);
        assert_eq!(
            all[0].to_string(),
            "leaf 0x7.0 ebx: 0xfdffbffb here, 0xfdffbfdb there"
        );
    }

    #[test]
    fn garbage_from_a_peer_is_only_a_difference() {
        let cpu = shown(&host(None), CpuModel::V2).unwrap();
        assert!(!cpu.differences(&[1, 2, 3]).is_empty());
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let cpu = shown(&host(None), CpuModel::V2).unwrap();
        let leaf = |id| {
            let all = cpu.for_vcpu(id, 4, 0).unwrap();
            all.as_slice()
                .iter()
                .find(|e| e.function == 1)
                .copied()
                .unwrap()
        };
        assert_eq!(leaf(3).ebx, 0x0304_0800);
        assert_eq!(leaf(3).edx >> 28 & 1, 1);
    }
}
