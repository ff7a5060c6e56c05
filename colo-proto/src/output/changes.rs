//! What may leave at a change of roles.

use alloc::vec::Vec;

use bytes::Bytes;

use super::{Outlet, Serving, Shadowing};
use crate::{
    config::Config,
    id::{Epoch, Generation, Slot},
    machine::Output,
    member::{MacKey, MemberConfig, NodeId, Permit, VmId},
    status::Mode,
    time::Instant,
};

const NOW: Instant = Instant::ZERO;
const PERMIT: Permit = Permit {
    generation: Generation(1),
    until: Instant::END,
};

fn config() -> Config {
    let member = MemberConfig::new(VmId([7; 16]), NodeId(2), MacKey([7; 16]));
    let config = Config::builder(NodeId(1), member, &[(Slot(0), 16)]);
    config.mode(Mode::Lockstep).build().unwrap()
}

fn serving() -> Outlet<Serving> {
    Outlet::serving(&config(), 1, Epoch(0), 0)
}

fn shadowing() -> Outlet<Shadowing> {
    Outlet::shadowing(&config(), 1)
}

fn frame(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn left(outlet: &mut Outlet<Serving>) -> Vec<Bytes> {
    let frames = core::iter::from_fn(|| match outlet.poll(NOW, Some(PERMIT))? {
        Output::ToWorld { frame, .. } => Some(frame),
        _ => None,
    });
    frames.collect()
}

#[test]
fn what_was_released_and_did_not_leave_in_time_never_does() {
    let mut outlet = serving();
    let _news = outlet.said(NOW, Epoch(0), Epoch(0), frame("old")).unwrap();
    assert_eq!(outlet.poll(NOW, None), None, "there is no permit");
    outlet.fence();
    assert!(left(&mut outlet).is_empty(), "another ownership's permit");
}

#[test]
fn what_a_host_could_not_say_before_it_lost_the_vm_is_not_said_when_it_has_it_again() {
    let mut outlet = serving();
    let _news = outlet.said(NOW, Epoch(0), Epoch(0), frame("old")).unwrap();
    let mut again = outlet.give_up().take_over(Epoch(0));
    assert!(left(&mut again).is_empty());
}

#[test]
fn what_the_world_has_not_heard_is_said_at_a_takeover_and_not_at_a_boot() {
    let mut outlet = shadowing();
    for text in ["heard", "unheard"] {
        assert!(outlet.is_said(Epoch(0), Epoch(0), &frame(text)).unwrap());
        assert_eq!(outlet.keep(NOW, frame(text)), None);
    }
    outlet.heard_there(1);
    assert!(left(&mut outlet.clone().boot(Epoch(0))).is_empty());
    assert_eq!(left(&mut outlet.take_over(Epoch(0))), ["unheard"]);
}

#[test]
fn client_frames_are_numbered_on_from_what_the_guest_may_have_consumed() {
    let mut outlet = shadowing();
    for index in 5..8 {
        outlet.store(index, index == 5, frame("client")).unwrap();
    }
    let mut outlet = outlet.take_over(Epoch(0));
    let (logged, _) = outlet.number(6, true).unwrap();
    assert_eq!(logged.index, 8);
}
