//! The PCI transport, modern only (virtio 1.2 section 4.1): `function.rs` holds the function with its capabilities and
//! its section, `common.rs` the registers behind its BAR.

mod common;
mod function;
#[cfg(test)]
mod tests;

pub use function::VirtioPci;
