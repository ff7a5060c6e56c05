//! The two roles: each conducts the sub-machines of its side.

pub mod primary;
pub mod secondary;
