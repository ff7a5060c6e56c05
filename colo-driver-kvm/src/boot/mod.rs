//! Kernels of four kinds into guest memory.
//!
//! | kind | recognised by | entered in |
//! |---|---|---|
//! | multiboot, ELF or flat | header in the first 8 KiB | 32-bit protected mode, `ebx` → multiboot info |
//! | PVH | ELF note 18 | 32-bit protected mode, `ebx` → start info |
//! | bzImage | `HdrS` at 0x202 | 32-bit protected mode, `esi` → boot parameters |
//!
//! All find their command line, initial ramdisk, memory map, ACPI tables and, for small kernels without ACPI, an MP
//! table. virtio-mmio devices are in the tables; kernels of the first two kinds find them on the command line too,
//! as Linux built for that wants it: `virtio_mmio.device=4K@0xd0000000:5`. A bzImage is a distribution's, whose
//! kernel would only complain.
//!
//! | file | holds |
//! |---|---|
//! | `loader.rs` | which kind, and its pieces into memory |
//! | `params.rs` | what each kind wants to be told |
//! | `tables.rs` | GDT and MP table, entry registers |
//! | `acpi/` | ACPI tables |

pub(crate) mod acpi;
mod loader;
mod params;
mod tables;

use vm_memory::GuestMemoryError;

use crate::memory::PAGE_SIZE;
use crate::state::SaveError;
use crate::vm::{MmioWindow, Vm};

/// Longest command line, the end mark included: Linux on x86 takes this much.
pub const MOST_CMDLINE: usize = 2048;

/// What to start.
#[derive(Debug, Clone, Copy)]
pub struct Boot<'a> {
    /// The image, whole.
    pub kernel: &'a [u8],
    /// The initial ramdisk (multiboot: the first module), whole.
    pub initrd: Option<&'a [u8]>,
    /// The command line; devices are appended to it.
    pub cmdline: &'a str,
}

/// What kind of image was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelKind {
    /// Multiboot 1.
    Multiboot,
    /// ELF with a PVH note.
    Pvh,
    /// Linux bzImage.
    BzImage,
}

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// None of the kinds.
    #[error(
        "the kernel image is of no kind known here: it begins with {magic:02x?}; give a multiboot image, an ELF with a PVH note, or a bzImage"
    )]
    UnknownKind {
        /// Its first bytes.
        magic: Vec<u8>,
    },
    /// An ELF nobody can enter.
    #[error(
        "the kernel is an ELF image for {machine} without a PVH note or multiboot header; build Linux with CONFIG_PVH=y, or use its bzImage"
    )]
    NoEntry {
        /// What machine.
        machine: &'static str,
    },
    /// A multiboot kernel that wants what we do not have.
    #[error(
        "the multiboot header requires features {flags:#x} that are not offered here (offered: 0x10003)"
    )]
    MultibootFlags {
        /// The required flags.
        flags: u32,
    },
    /// A damaged image.
    #[error("the kernel image is damaged or cut: {what}")]
    Damaged {
        /// What is wrong.
        what: String,
    },
    /// A piece that does not fit.
    #[error(
        "{what} needs {start:#x}..{end:#x}, outside of guest memory; give the guest more memory"
    )]
    NoRoom {
        /// The piece.
        what: &'static str,
        /// Where it begins.
        start: u64,
        /// Where it ends.
        end: u64,
    },
    /// No room for the initial ramdisk between the kernel and the end of what it can reach.
    #[error(
        "the initial ramdisk has {len} bytes, and the kernel takes it between {start:#x} and {end:#x} only; give the guest more memory or a smaller ramdisk"
    )]
    NoRoomForRamdisk {
        /// Its length.
        len: u64,
        /// First address behind the kernel.
        start: u64,
        /// First address that is out of reach.
        end: u64,
    },
    /// Too long.
    #[error(
        "the command line has {len} bytes with its devices, this kernel takes {most}: shorten it"
    )]
    CmdlineTooLong {
        /// How long.
        len: usize,
        /// The most.
        most: usize,
    },
    /// Not text.
    #[error("the command line has a NUL in it: remove it")]
    CmdlineNul,
    /// No entropy for the generation id.
    #[error("reading entropy for the VM's generation id: {0}")]
    Entropy(#[source] std::io::Error),
    /// Writing guest memory failed.
    #[error("writing guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// Setting the registers failed.
    #[error(transparent)]
    Registers(#[from] SaveError),
}

/// Whether an image is of a kind that can be booted, without loading it: a daemon that will boot it
/// only once it owns the VM wants to know at its start.
///
/// # Errors
///
/// [`BootError::UnknownKind`], or a multiboot header that asks for what we do not have.
pub fn identify(image: &[u8]) -> Result<(), BootError> {
    loader::identify(image)
}

impl Vm {
    /// Loads a kernel and points the first vCPU at it. The guest starts with the next resume.
    ///
    /// # Errors
    ///
    /// [`BootError`] says what is wrong with the image or the memory. Guest memory may be half
    /// written then.
    pub fn boot(&mut self, boot: &Boot<'_>) -> Result<KernelKind, BootError> {
        let ram = self.memory().ram();
        let layout = self.layout();
        let loaded = loader::load(ram, layout, boot.kernel)?;
        let announced = match loaded.kind() {
            KernelKind::BzImage => &[],
            KernelKind::Multiboot | KernelKind::Pvh => self.windows(),
        };
        let cmdline = cmdline(boot.cmdline, announced, loaded.most_cmdline())?;
        let initrd = boot
            .initrd
            .map(|bytes| loader::initrd(ram, layout, bytes, &loaded))
            .transpose()?;
        params::cmdline(ram, &cmdline)?;
        let info = params::Info {
            layout,
            cmdline: &cmdline,
            initrd,
            rsdp: acpi::write(ram, &self.platform())?,
        };
        let registers = params::tell(ram, &loaded, &info)?;
        tables::gdt(ram)?;
        tables::mp(ram, self.shape().vcpus)?;
        self.first_generation()?;
        self.enter_at(registers)?;
        Ok(loaded.kind())
    }
}

fn cmdline(given: &str, windows: &[MmioWindow], most: usize) -> Result<String, BootError> {
    if given.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    let mut all = given.trim().to_owned();
    for window in windows {
        let separator = if all.is_empty() { "" } else { " " };
        let kib = window.len / 1024;
        all += &format!(
            "{separator}virtio_mmio.device={kib}K@{:#x}:{}",
            window.base, window.gsi
        );
    }
    if all.len() > most {
        let len = all.len();
        return Err(BootError::CmdlineTooLong { len, most });
    }
    Ok(all)
}

const _: () = assert!(MOST_CMDLINE <= PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    fn window(n: u64) -> MmioWindow {
        MmioWindow {
            base: 0xd000_0000 + n * 4096,
            len: 4096,
            gsi: 5,
        }
    }

    #[test]
    fn devices_are_announced_as_linux_wants_it() {
        assert_eq!(
            cmdline(" console=ttyS0 ", &[window(0), window(1)], 2047).unwrap(),
            "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:5"
        );
        assert_eq!(cmdline("", &[], 2047).unwrap(), "");
    }

    #[test]
    fn a_line_that_linux_would_cut_is_refused() {
        let long = "x".repeat(MOST_CMDLINE - 1);
        assert!(cmdline(&long, &[], 2047).is_ok());
        assert!(matches!(
            cmdline(&long, &[window(0)], 2047),
            Err(BootError::CmdlineTooLong { .. })
        ));
        assert!(matches!(
            cmdline("a\0b", &[], 2047),
            Err(BootError::CmdlineNul)
        ));
    }
}
