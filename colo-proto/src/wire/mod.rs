//! The native protocol.
//!
//! Every message is a 32-byte [`Head`] and a body. Integers are little-endian. A length is checked
//! against the limit of its [`Kind`] before anything is done about it, and a kind belongs to one
//! kind of channel.
//!
//! ```text
//! head    0  u16 magic 0xC010
//!         2  u8  kind           3  u8  flags (1 = live round)
//!         4  u32 body length
//!         8  u64 generation     the ownership this pairing belongs to
//!        16  u64 number         epoch, round or index, by kind
//!        24  u32 count          28 u32 arg, by kind
//! ```
//!
//! # First contact and first synchronisation
//!
//! ```text
//! secondary                                   primary (runs its guest all along)
//!   dial Control ── HELLO ────────────────────▶ compare version, pair, memory, shape
//!                ◀──────────── WELCOME | REFUSE
//!   dial Ram(0..n), Net ──────────────────────▶
//!                ◀── PAGES* LANE_END (live, round 0: everything)
//!   ROUND_DONE 0 ─────────────────────────────▶ harvest what was dirtied meanwhile
//!                ◀── PAGES* LANE_END (live, round 1) ...
//!                                               little enough is left:
//!                ◀── CHECKPOINT_REQUEST e       an ordinary checkpoint is the last round
//!   ... as below, but CHECKPOINT_READY instead of VMSTATE_LOADED
//! ```
//!
//! # A checkpoint (spec checkpoint 4, `resume: after-capture`)
//!
//! ```text
//! primary                                     secondary
//!   run │ ── CHECKPOINT_REQUEST e ───────────▶  stop, harvest own dirty pages
//!       │ ◀─ OWN_DIRTY*, CHECKPOINT_REPLY e ──
//!   first pass over the dirty log
//!  stop │ capture                    (pause)
//!   run │ ── VMSTATE_SEND e ─────────────────▶
//!       │ ══ PAGES*, LANE_END e, every lane ═▶  into the cache
//!       │ ── VMSTATE_SIZE e, state ──────────▶  whole? state valid?
//!       │ ◀─ VMSTATE_RECEIVED e ──────────────  ─── the commit point ───
//!   release output made before the stop         commit RAM, disks, load state
//!       │ ◀─ VMSTATE_LOADED e ────────────────  run (lockstep) or wait (standby)
//! ```
//!
//! Any break before RECEIVED: the secondary drops what came and can still take over from where it
//! was. Any break after: it finishes by itself.
//!
//! # Between checkpoints, in lockstep, on Net
//!
//! ```text
//! primary ── INPUT i ▶ secondary     client frames, indexed
//!         ◀ INPUT_ACK i ──           stored up to i
//!         ◀ OUTPUT epoch, frame ──   what the secondary's guest said
//!         ── RELEASED epoch, n ▶     the first n of the primary's frames have left
//! ```
//!
//! # Promise
//!
//! [`VERSION`] changes when an old peer could misunderstand a new one; such peers refuse each
//! other in the hello. Additions that can be ignored become feature bits.

mod body;
mod frame;
mod hello;
pub mod join;

pub use body::{RUN_LEN, VmstateSend, decode_reasons, decode_runs, encode_reasons, encode_runs};
pub use frame::{BODY_MOST, FLAG_FIRST, FLAG_LIVE, FRAME_MOST, HEAD_LEN, Head, Kind, MAGIC};
pub use hello::{FEATURES, Hello, ShapeItem, VERSION};

/// Most pages in one [`Kind::Pages`] message: 4 MiB.
pub const BATCH_PAGES: u32 = 1024;
/// Most runs in one [`Kind::Pages`] message, so that one `writev` takes head and pages.
pub const BATCH_RUNS: usize = 512;
