//! First contact between the two hosts, and the channels that come of it.

pub(crate) mod link;
