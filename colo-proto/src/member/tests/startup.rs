//! Starts after both hosts were down, or before anything was ever up: every way in which nobody
//! would serve, and the way out of it.

use super::*;

/// What a start of the daemon does: see `Node::new`.
fn start(
    id: NodeId,
    boot: u64,
    record: Option<Record>,
    now: Instant,
    primary: bool,
    auto: bool,
) -> Node {
    let peer = NodeId(3 - id.0);
    let mut node = Node::new(
        id,
        boot,
        record,
        config(peer).autostart(auto || primary),
        now,
    );
    let promised = node.member.state() != MemberState::Idle;
    if primary {
        node.local(now, Local::Operator(Command::Create));
    } else if !promised {
        node.local(now, Local::Operator(Command::Join));
    }
    node
}

impl Pair {
    fn records(&self) -> [Option<Record>; 2] {
        [&self.a, &self.b].map(|node| Some(*node.member.record()))
    }

    /// Both hosts lose power, and only later something is started on each.
    fn power_comes_back(&mut self, primary: [bool; 2], auto: bool) {
        let [a, b] = self.records();
        self.now = self.now + ms(60_000);
        let boot = self.a.member.boot().0 + 10;
        self.a = start(A, boot, a, self.now, primary[0], auto);
        self.b = start(B, boot + 1, b, self.now, primary[1], auto);
        self.run(ms(12_000));
    }

    /// The daemon of a host is ended and started in another role.
    fn started_anew(&mut self, a: bool, primary: bool) {
        let boot = self.a.member.boot().0 + self.b.member.boot().0;
        let [first, second] = self.records();
        if a {
            self.a = start(A, boot, first, self.now, primary, false);
        } else {
            self.b = start(B, boot, second, self.now, primary, false);
        }
        self.run(ms(12_000));
    }

    fn serves(&self) -> [bool; 2] {
        [&self.a, &self.b].map(|node| node.member.permit(self.now).is_some())
    }
}

fn nobody(last: NodeId) -> impl Fn(&Node) -> bool {
    move |node| {
        node.events()
            .iter()
            .any(|e| matches!(e, MemberEvent::NobodyServes { last: l, .. } if *l == last))
    }
}

/// b has taken over from a and serves alone.
fn taken_over() -> Pair {
    let mut pair = Pair::dual();
    pair.b.local(pair.now, Local::Operator(Command::FailOver));
    pair.links = (false, false);
    pair.run(ms(2_000));
    pair.b.local(pair.now, Local::Settled);
    pair.run(ms(2_000));
    assert_eq!(pair.b.member.state(), MemberState::PrimarySolo);
    pair.links = (true, true);
    pair
}

#[test]
fn two_secondaries_name_who_served_last_and_that_one_boots_as_primary() {
    let mut pair = Pair::dual();
    pair.power_comes_back([false, false], false);
    assert_eq!(pair.serves(), [false, false]);
    assert!(nobody(A)(&pair.a) && nobody(A)(&pair.b));
    pair.started_anew(true, true);
    assert_eq!(pair.serves(), [true, false]);
}

#[test]
fn two_secondaries_settle_it_by_the_register_if_they_may() {
    let mut pair = Pair::dual();
    pair.power_comes_back([false, false], true);
    assert_eq!(pair.serves(), [true, false]);
    let mut pair = taken_over();
    pair.power_comes_back([false, false], true);
    assert_eq!(pair.serves(), [false, true]);
}

#[test]
fn the_one_that_served_alone_boots_as_primary_after_both_were_secondaries() {
    let mut pair = taken_over();
    pair.power_comes_back([false, false], false);
    assert_eq!(pair.serves(), [false, false]);
    assert!(nobody(B)(&pair.a) && nobody(B)(&pair.b));
    pair.started_anew(false, true);
    assert_eq!(pair.serves(), [false, true]);
}

#[test]
fn the_wrong_host_started_as_primary_names_the_right_one_and_spoils_nothing() {
    let mut pair = Pair::dual();
    pair.power_comes_back([false, true], false);
    assert_eq!(pair.serves(), [false, false]);
    assert!(nobody(A)(&pair.b), "{:?}", pair.b.events());
    pair.started_anew(true, true);
    assert_eq!(pair.serves(), [true, false]);
    let mut pair = taken_over();
    pair.power_comes_back([true, false], false);
    assert!(nobody(B)(&pair.a), "{:?}", pair.a.events());
    pair.started_anew(false, true);
    assert_eq!(pair.serves(), [false, true]);
}

#[test]
fn a_first_installation_enabled_as_secondary_on_both_is_begun_by_a_primary() {
    let mut pair = Pair::with(|c| c);
    pair.power_comes_back([false, false], false);
    assert!(pair.a.events().contains(&MemberEvent::WaitingForOperator));
    pair.started_anew(true, true);
    assert_eq!(pair.serves(), [true, false]);
}

#[test]
fn the_wrong_host_started_first_of_all_is_named_and_can_be_overridden() {
    let mut pair = Pair::with(|c| c);
    pair.power_comes_back([false, true], false);
    assert_eq!(pair.serves(), [false, true]);
    // That was wrong; the other is wanted. It says who served last, and is told to all the same.
    pair.power_comes_back([true, false], false);
    assert_eq!(pair.serves(), [false, false]);
    assert!(nobody(B)(&pair.a), "{:?}", pair.a.events());
    pair.a.local(pair.now, Local::Operator(Command::Override));
    pair.run(ms(3_000));
    assert_eq!(pair.serves(), [true, false]);
    assert!(pair.register.is_solo_of(A), "the register was taken");
}

#[test]
fn both_started_as_primary_agree_on_the_one_that_served_last() {
    for taken in [false, true] {
        let mut pair = if taken { taken_over() } else { Pair::dual() };
        pair.power_comes_back([true, true], false);
        assert_eq!(pair.serves(), [!taken, taken]);
    }
}

#[test]
fn an_override_is_refused_while_the_other_host_serves() {
    let mut pair = Pair::with(|c| c);
    pair.power_comes_back([true, false], false);
    pair.b.local(pair.now, Local::Operator(Command::Override));
    pair.run(ms(3_000));
    assert_eq!(pair.serves(), [true, false]);
}
