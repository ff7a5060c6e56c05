//! What a role takes from nobody but its own pairing.

use bytes::Bytes;

use super::{Conduct, primary::Primary, secondary::Secondary};
use crate::{
    base::Base,
    config::Config,
    error::PeerFault,
    event::{Event, PeerLost},
    id::{Channel, Generation, Slot},
    machine::{Machine, Output},
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    ownership::External,
    pairing::Item,
    time::Instant,
    wire::{Head, Kind},
};

fn base(told: External) -> Base {
    let member = MemberConfig::new(VmId([7; 16]), NodeId(2), MacKey([7; 16]));
    let config = Config::builder(NodeId(1), member, &[(Slot(0), 16)]);
    Base::new(config.build().unwrap(), BootId(1), told, Instant::ZERO)
}

/// Whether the peer is left because of its generation.
fn leaves(role: &mut (impl Conduct + Machine), channel: Channel, item: Item) -> bool {
    role.arrived(channel, item);
    core::iter::from_fn(|| role.poll_output()).any(|output| {
        let Output::Event(Event::PeerLeft(PeerLost::Faulty(fault))) = output else {
            return false;
        };
        matches!(fault, PeerFault::OtherGeneration { .. })
    })
}

#[test]
fn nothing_of_another_ownership_is_taken_whatever_it_is() {
    let old = Generation(9);
    let frame = || Bytes::from_static(&[0; 60]);
    let to_primary = [
        Item::Message(Head::new(Kind::InputAck, old, 0), Bytes::new()),
        Item::Frame(Head::new(Kind::Output, old, 0), frame()),
    ];
    for item in to_primary {
        let mut primary = Primary::accepted(base(External::owner()), BootId(2));
        assert!(leaves(&mut primary, Channel::Net, item));
    }
    let to_secondary = [
        Item::Message(Head::new(Kind::CheckpointRequest, old, 1), Bytes::new()),
        Item::Frame(Head::new(Kind::Input, old, 1), frame()),
        Item::Contents(Head::new(Kind::VmstateSize, old, 1)),
        Item::Placed(Head::new(Kind::Pages, old, 1)),
    ];
    for item in to_secondary {
        let mut secondary = Secondary::accepted(base(External::partner()), BootId(2));
        assert!(leaves(&mut secondary, Channel::Net, item));
    }
}
