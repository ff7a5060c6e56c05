//! Network frames: what the guests say and hear.

pub mod announce;
