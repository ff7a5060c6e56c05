//! `protected`: a takeover would succeed. One thing at a time is taken away, and both say so.

use super::*;

/// What both hosts say, from their sides.
fn both(pair: &Pair) -> (Option<Unprotected>, Option<Unprotected>) {
    (
        pair.a.member.unprotected(pair.now),
        pair.b.member.unprotected(pair.now),
    )
}

/// Long enough for every probe to be missed, short enough for an alarm within ten seconds.
const NOTICED: Duration = Duration::from_secs(9);

#[test]
fn a_pair_is_protected_as_soon_as_both_know_that_a_takeover_would_succeed() {
    let mut pair = Pair::dual();
    assert_eq!(both(&pair), (None, None));
    // And it stays so.
    for _ in 0..300 {
        pair.run(ms(100));
        assert_eq!(both(&pair), (None, None), "at {:?}", pair.now);
    }
}

#[test]
fn a_record_that_cannot_be_written_is_told_by_both() {
    for owner in [true, false] {
        let mut pair = Pair::dual();
        if owner {
            pair.a.disk = false;
        } else {
            pair.b.disk = false;
        }
        pair.run(NOTICED);
        let (here, there) = (
            Some(Unprotected::Here(Unready::Record)),
            Some(Unprotected::There(Unready::Record)),
        );
        let expected = if owner { (here, there) } else { (there, here) };
        assert_eq!(both(&pair), expected);
        pair.a.disk = true;
        pair.b.disk = true;
        pair.run(ms(500));
        assert_eq!(both(&pair), (None, None));
    }
}

#[test]
fn an_arbiter_that_does_not_answer_is_told_by_both() {
    let mut pair = Pair::dual();
    pair.arbiter = false;
    pair.run(NOTICED);
    let why = Some(Unprotected::Here(Unready::Arbiter));
    assert_eq!(both(&pair), (why, why));
    pair.arbiter = true;
    pair.run(ms(6_000));
    assert_eq!(both(&pair), (None, None));
}

#[test]
fn a_register_that_was_lost_is_told_by_both() {
    let mut pair = Pair::dual();
    pair.register = Register::default();
    pair.run(NOTICED);
    let why = Some(Unprotected::Here(Unready::OtherArbiter));
    assert_eq!(both(&pair), (why, why));
}

#[test]
fn a_copy_of_the_register_is_told_by_both() {
    let mut pair = Pair::dual();
    pair.copy = Some(pair.register);
    pair.run(NOTICED);
    let (a, b) = both(&pair);
    assert_eq!(a, Some(Unprotected::There(Unready::OtherArbiter)));
    assert_eq!(b, Some(Unprotected::Here(Unready::OtherArbiter)));
}

#[test]
fn a_host_that_could_not_run_the_vm_is_told_by_both() {
    let mut pair = Pair::dual();
    // The partner cannot take over, so the owner keeps the VM.
    pair.b.disk = false;
    pair.run(NOTICED);
    pair.a.local(pair.now, Local::Health(Health::Fatal));
    pair.run(ms(300));
    let (a, b) = both(&pair);
    assert_eq!(a, Some(Unprotected::Here(Unready::Unfit)));
    assert_eq!(b, Some(Unprotected::Here(Unready::Record)));
}

#[test]
fn a_fenced_owner_protects_nothing() {
    let mut pair = Pair::dual();
    pair.a.local(pair.now, Local::Operator(Command::Yield));
    pair.run(ms(300));
    let fenced = Unprotected::Unpaired(MemberState::Fenced);
    assert_eq!(pair.a.member.unprotected(pair.now), Some(fenced));
}

#[test]
fn an_owner_does_not_offer_the_vm_to_a_partner_that_could_not_take_it() {
    let mut pair = Pair::dual();
    pair.b.disk = false;
    pair.run(NOTICED);
    pair.a.local(pair.now, Local::Health(Health::Fatal));
    pair.run(ms(3_000));
    assert_eq!(pair.a.member.state(), MemberState::PrimaryDual);
}

#[test]
fn nodes_of_other_settings_do_not_become_a_pair_and_say_why() {
    for change in [
        |c: MemberConfig| c.lease(ms(601)),
        |c: MemberConfig| c.secondary_silence(ms(5_000)),
        |c: MemberConfig| c.primary_silence(ms(801)),
        |c: MemberConfig| c.interval(ms(99)),
        |c: MemberConfig| c.drift_ppm(999),
        |c: MemberConfig| c.margin(ms(21)),
        |c: MemberConfig| c.penalty(ms(999)),
        |c: MemberConfig| c.witness_silence(ms(9_999)),
        |c: MemberConfig| c.witness_loss(WitnessLoss::NominatePrimary),
        |c: MemberConfig| c.arbitration(Arbitration::Arbiter { fence_assist: true }),
        |c: MemberConfig| c.arbiter_id(1),
    ] {
        let mut pair = Pair::with(|c| c);
        pair.b = Node::new(B, 2, None, change(config(A)).check().unwrap(), pair.now);
        pair.a.local(pair.now, Local::Operator(Command::Create));
        pair.b.local(pair.now, Local::Operator(Command::Join));
        pair.run(ms(1_000));
        assert!(!pair.a.did(&MemberOutput::StartSync { peer: BootId(2) }));
        let said = |node: &Node| {
            let events = node.events();
            let same = |e: &&MemberEvent| **e == MemberEvent::SettingsDiffer;
            events.iter().filter(same).count()
        };
        assert_eq!(said(&pair.a), 1, "said once");
    }
}

#[test]
fn settings_that_each_node_has_for_itself_may_differ() {
    let mut pair = Pair::with(|c| c);
    let own = config(A)
        .rtt_max(ms(90))
        .arbiter_attempt(ms(400))
        .arbiter_typical(ms(150))
        .stall(ms(250))
        .hang(ms(6_000))
        .hang_in_checkpoint(ms(7_000));
    pair.b = Node::new(B, 2, None, own.check().unwrap(), pair.now);
    pair.a.local(pair.now, Local::Operator(Command::Create));
    pair.b.local(pair.now, Local::Operator(Command::Join));
    pair.run(ms(1_000));
    pair.sync(Epoch(7));
    pair.run(ms(500));
    assert_eq!(both(&pair), (None, None));
}

#[test]
fn a_handover_into_the_void_is_refused_while_the_owner_still_serves() {
    type Break = fn(&mut Pair);
    let breaks: [(Break, Unprotected); 4] = [
        (|p| p.arbiter = false, Unprotected::Here(Unready::Arbiter)),
        (|p| p.a.disk = false, Unprotected::Here(Unready::Record)),
        (|p| p.b.disk = false, Unprotected::There(Unready::Record)),
        (|p| p.b_asks = false, Unprotected::There(Unready::Arbiter)),
    ];
    for (what, why) in breaks {
        let mut pair = Pair::dual();
        // Nobody has noticed yet.
        what(&mut pair);
        pair.a.local(pair.now, Local::Operator(Command::Yield));
        pair.run(ms(6_000));
        assert_eq!(
            pair.states(),
            (MemberState::PrimaryDual, MemberState::Secondary),
            "{why}"
        );
        assert!(pair.a.member.permit(pair.now).is_some(), "{why}");
        assert!(
            pair.a.events().contains(&MemberEvent::NotHandedOver(why)),
            "{why}: {:?}",
            pair.a.events()
        );
    }
}
