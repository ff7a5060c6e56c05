//! The keyboard controller, of which only the reset line is left: how a guest asks to be reset.

mod device;

pub use device::{I8042, ResetLine};
