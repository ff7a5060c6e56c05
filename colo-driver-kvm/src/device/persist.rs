//! The checkpoint life cycle of a device, and what may be assumed at each call.
//!
//! ```text
//!            ┌───────────────── checkpoint ─────────────────┐
//!   run ──▶ quiesce ──▶ save ──▶ resume ──▶ run              the primary
//!   run ──▶ quiesce ──▶ (RAM committed) ──▶ load ──▶ resume  the secondary, or a restore from a file
//!   run ──▶ quiesce ──▶ reset ──▶ (guest booted) ──▶ resume  a machine that starts anew
//! ```

use super::BusDevice;

/// A device whose state is part of a checkpoint.
///
/// What holds when:
///
/// * **run** (from creation or `resume` until `quiesce`): bus accesses and the device's own calls come in any order.
/// * **[`quiesce`](Self::quiesce)**: all vCPUs are stopped. When it returns, no transfer is in flight: the device
///   neither reads nor writes guest memory nor raises an interrupt until `resume`, whatever is called on it.
///   What was pending is in the saved state or still in the rings (in guest RAM).
/// * **[`save`](Self::save)**: quiesced. Changes nothing; saving twice gives the same bytes.
/// * **[`load`](Self::load)**: quiesced, guest RAM already holds the checkpoint. The device may be in any earlier
///   state. All or nothing: after an error it is exactly as it was. Interrupts are not raised, since the
///   irqchip may be loaded after the devices.
/// * **[`resume`](Self::resume)**: RAM, devices and irqchip are all loaded. Here a device raises again what the loaded
///   state says is unacknowledged, and wakes itself for requests that wait in the rings: an interrupt or a notify
///   that was on its way when the checkpoint was cut is in nobody's state. The guest may see one twice, never none.
///
/// `quiesce` and `resume` are idempotent.
pub trait Persist: Send {
    /// Name of the section, unique in the machine, the same on both hosts (`"serial0"`, `"virtio-net0"`).
    fn section(&self) -> &str;
    /// Version that [`save`](Self::save) writes; [`load`](Self::load) also takes every older one.
    fn version(&self) -> u16;
    /// Stops touching guest memory and interrupts.
    fn quiesce(&mut self);
    /// Appends the state to `out`.
    fn save(&self, out: &mut Vec<u8>);
    /// Whether [`load`](Self::load) would take these bytes; so that several devices can be loaded wholly or not at all.
    ///
    /// # Errors
    ///
    /// As `load`.
    fn check(&self, version: u16, bytes: &[u8]) -> Result<(), LoadError>;
    /// Becomes what these bytes say.
    ///
    /// # Errors
    ///
    /// [`LoadError`] for a newer version, damage, or another machine's shape; the device is untouched then.
    fn load(&mut self, version: u16, bytes: &[u8]) -> Result<(), LoadError>;
    /// As after power-on: what the guest programmed is forgotten. What is the host's stays (counters, the link,
    /// how many inputs were consumed). Called while quiesced; nothing is raised. `power_on` is what the device
    /// saved before the guest first ran.
    fn reset(&mut self, power_on: &[u8]) {
        let version = self.version();
        if let Err(error) = self.load(version, power_on) {
            tracing::error!(%error, "a device refuses its own state from power-on");
        }
    }
    /// Runs again.
    fn resume(&mut self);
}

/// Both halves: on a bus, and in the checkpoint.
pub trait Device: BusDevice + Persist {}

impl<T: BusDevice + Persist> Device for T {}

/// Why a state section was refused. The device that refused is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Written by a later release.
    #[error(
        "section {section}: version {got} is newer than {newest}, the newest known here; update this host"
    )]
    Newer {
        /// The section.
        section: String,
        /// Its version.
        got: u16,
        /// The newest version this build reads.
        newest: u16,
    },
    /// Fewer bytes than the version has.
    #[error("section {section}: ends {missing} bytes early, in {field}")]
    Truncated {
        /// The section.
        section: String,
        /// The field that is cut.
        field: &'static str,
        /// How many bytes are missing there.
        missing: usize,
    },
    /// More bytes than the version has.
    #[error("section {section}: {extra} bytes too many")]
    Trailing {
        /// The section.
        section: String,
        /// How many.
        extra: usize,
    },
    /// The bytes are not the ones that were written.
    #[error("section {section}: damaged, CRC-32C is {got:#010x} but {expected:#010x} was written")]
    Checksum {
        /// The section.
        section: String,
        /// CRC of the bytes that came.
        got: u32,
        /// CRC that came with them.
        expected: u32,
    },
    /// A value no device can have.
    #[error("section {section}: {field} is {got:#x}, expected {expected}")]
    Invalid {
        /// The section.
        section: String,
        /// The field.
        field: &'static str,
        /// What it held.
        got: u64,
        /// What it may hold.
        expected: &'static str,
    },
    /// A good section of a device made differently: the machines do not have the same shape.
    #[error(
        "section {section}: {field} is {got:#x} there and {here:#x} here; give both the same device options"
    )]
    Shape {
        /// The section.
        section: String,
        /// What differs.
        field: &'static str,
        /// Its value in the section.
        got: u64,
        /// Its value here.
        here: u64,
    },
}
