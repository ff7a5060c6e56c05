//! The two roles: each conducts the sub-machines of its side.

mod conduct;
pub mod primary;
pub mod secondary;
#[cfg(test)]
mod tests;

pub(crate) use conduct::Conduct;
