//! Single moments at which a pair once did the wrong thing. Each test brings two real hosts exactly
//! there, by holding back one thing, and says what has to come of it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use colo_proto::{
    command::{Answer, Command, CommandId, Refusal},
    config::{Config, ConfigBuilder},
    error::PeerFault,
    event::{Event, PeerLost},
    id::{Channel, Epoch, Role, Slot},
    machine::{
        Body, Captured, GuestDone, GuestOp, GuestOpKind, Input, Machine as _, Notify, Output, Sink,
    },
    member::{
        Arbitration, BootId, Health, MacKey, MemberConfig, MemberState, NodeId, PathId, VmId,
    },
    node::{Node, Start},
    status::{FailoverStatus, Mode, ResumePolicy, Status},
    testing::{Effect, Guest, Host, Pair},
    time::Instant,
};

const CHANNELS: [Channel; 3] = [Channel::Control, Channel::Ram(0), Channel::Net];
const CLIENT: &[u8] = &[0; 60];

/// A guest that keeps no memory and remembers what was done to it.
#[derive(Default)]
struct Toy {
    running: bool,
    epoch: Epoch,
    /// The next operation of this kind fails.
    fail: Option<GuestOpKind>,
    /// So many times the guest cannot be stopped.
    stubborn: usize,
    /// Pages of one epoch, device state of another.
    half: bool,
    ran_half: bool,
    heard: Vec<u64>,
    /// What a capture claims to have consumed, instead of the truth.
    claims: Option<u64>,
    said: VecDeque<(Epoch, Bytes)>,
}

impl Guest for Toy {
    type Contents = ();

    fn operate(&mut self, op: GuestOp) -> GuestDone {
        if self.fail == Some(op.kind()) {
            self.fail = None;
            return GuestDone::Failed {
                op: op.kind(),
                why: "told to".into(),
            };
        }
        if op.kind() == GuestOpKind::Pause && self.stubborn > 0 {
            self.stubborn -= 1;
            return GuestDone::Failed {
                op: op.kind(),
                why: "told to".into(),
            };
        }
        match &op {
            GuestOp::Pause => self.running = false,
            GuestOp::Resume => {
                self.running = true;
                self.ran_half |= self.half;
            }
            GuestOp::Capture { epoch, resume, .. } => {
                (self.epoch, self.running) = (*epoch, *resume);
                let mut captured = Captured::new(*epoch, 8);
                let consumed = self.heard.last().copied().unwrap_or_default();
                captured.inputs = self.claims.unwrap_or(consumed);
                return GuestDone::Captured(captured);
            }
            GuestOp::CommitRam { .. } => self.half = true,
            GuestOp::LoadState { epoch, .. } => (self.epoch, self.half) = (*epoch, false),
            _ => {}
        }
        op.done()
    }

    fn dirty(&mut self) -> Vec<(Slot, Vec<u64>)> {
        vec![(Slot(0), vec![1])]
    }

    fn read(&mut self, _: &Body) {}

    fn write(&mut self, _: &Sink, (): ()) {}

    fn hear(&mut self, index: u64, _: Bytes) {
        self.heard.push(index);
    }

    fn say(&mut self) -> Option<(Epoch, Bytes)> {
        self.said.pop_front()
    }
}

/// What is held back.
type Held<'a> = &'a dyn Fn(usize, &Output) -> bool;

const NOTHING: Held<'static> = &|_, _| false;

fn config(
    id: u64,
    member: impl Fn(MemberConfig) -> MemberConfig,
    more: impl Fn(ConfigBuilder) -> ConfigBuilder,
) -> Config {
    let peer = MemberConfig::new(VmId([7; 16]), NodeId(3 - id), MacKey([7; 16]));
    let builder = Config::builder(NodeId(id), member(peer), &[(Slot(0), 16)]);
    more(builder).build().unwrap()
}

/// Host 0 starts as the primary.
struct Two(Pair<Toy>);

impl Two {
    fn new(
        told: bool,
        member: impl Fn(MemberConfig) -> MemberConfig,
        more: impl Fn(ConfigBuilder) -> ConfigBuilder,
    ) -> Self {
        let config = |id| config(id, &member, &more);
        let now = Instant::from_millis(1);
        let mut pair = Pair::new(config(1).channels(), now);
        for (at, start) in [Start::Primary, Start::Secondary].into_iter().enumerate() {
            let id = at as u64 + 1;
            let node = if told {
                Node::told(config(id), start, BootId(id), now)
            } else {
                Node::new(config(id), start, BootId(id), None, id, now)
            };
            pair.start(at, Host::new(node, Toy::default()));
        }
        Self(pair)
    }

    /// Power on again, with what was kept on the disk.
    fn restart(&mut self, at: usize, more: impl Fn(ConfigBuilder) -> ConfigBuilder) {
        let id = at as u64 + 1;
        let config = config(id, |member| member, more);
        let (record, now) = (self.0.record(at), self.0.now());
        let node = Node::new(config, Start::Secondary, BootId(100 + id), record, id, now);
        self.0.start(at, Host::new(node, Toy::default()));
    }

    fn protected(more: impl Fn(ConfigBuilder) -> ConfigBuilder) -> Self {
        let mut two = Self::new(false, |member| member, more);
        two.protect();
        two
    }

    fn protect(&mut self) {
        assert!(self.until(5_000, NOTHING, Self::is_protected));
        while self.0.report().is_some() {}
    }

    fn is_protected(&self) -> bool {
        (0..2).all(|at| self.status(at).protected)
    }

    fn status(&self, at: usize) -> Status {
        self.0
            .host(at)
            .map(|h| h.node().status())
            .unwrap_or_default()
    }

    fn guest(&mut self, at: usize) -> &mut Toy {
        &mut self.0.host_mut(at).unwrap().guest
    }

    /// Whether a host has handed out an operation of this kind that has not ended.
    fn asks(&self, at: usize, kind: GuestOpKind) -> bool {
        let mut asked = self.0.host(at).unwrap().asked();
        asked.any(|o| matches!(o, Output::Guest(op) if op.kind() == kind))
    }

    /// Up to the moment at which a host has handed that out, and holds it back.
    fn at(mut self, at: usize, kind: GuestOpKind) -> Self {
        let hold = |host: usize, o: &Output| host == at && is(o, kind);
        assert!(self.until(5_000, &hold, |two| two.asks(at, kind)));
        self
    }

    fn until(&mut self, millis: u64, hold: Held<'_>, is: impl Fn(&Self) -> bool) -> bool {
        for _ in 0..millis {
            if is(self) {
                return true;
            }
            self.tick(hold, &|_, _| false);
        }
        is(self)
    }

    fn run(&mut self, millis: u64) {
        self.until(millis, NOTHING, |_| false);
    }

    /// One millisecond, in which everything happens except what is held back, and what a host is
    /// not given of a channel.
    fn tick(&mut self, hold: Held<'_>, withheld: &dyn Fn(usize, Channel) -> bool) {
        self.0.pass(Duration::from_millis(1));
        for at in 0..2 {
            self.0.wake(at).unwrap();
        }
        loop {
            let mut moved = false;
            for at in 0..2 {
                moved |= self.0.listen(at).unwrap();
                for effect in Effect::ALL {
                    let host = self.0.host(at);
                    let next = host.and_then(|h| {
                        let mut asked = h.asked();
                        asked.find(|o| Effect::of(o) == Some(effect))
                    });
                    if next.is_some_and(|output| !hold(at, output)) {
                        moved |= self.0.effect(at, effect).unwrap();
                    }
                }
                for channel in CHANNELS {
                    moved |= self.0.send(at, channel, 1 << 20).unwrap();
                    if !withheld(at, channel) {
                        moved |= self.0.receive(at, channel).unwrap();
                    }
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn command(&mut self, at: usize, id: u64, command: Command) {
        let input = Input::Command(CommandId(id), command);
        self.0.input(at, input).unwrap();
    }

    fn reports(&mut self) -> Vec<(usize, Output)> {
        core::iter::from_fn(|| self.0.report()).collect()
    }

    fn answers(&mut self) -> Vec<(u64, Answer)> {
        let answer = |(_, output)| match output {
            Output::Answer(id, answer) => Some((id.0, answer)),
            _ => None,
        };
        self.reports().into_iter().filter_map(answer).collect()
    }

    /// Events of a host.
    fn count(&mut self, at: usize, wanted: impl Fn(&Event) -> bool) -> usize {
        let reports = self.reports();
        let events = reports
            .iter()
            .filter(|(host, o)| matches!(o, Output::Event(event) if *host == at && wanted(event)));
        events.count()
    }
}

fn is(output: &Output, kind: GuestOpKind) -> bool {
    matches!(output, Output::Guest(op) if op.kind() == kind)
}

fn standby(builder: ConfigBuilder) -> ConfigBuilder {
    builder
}

fn lockstep(builder: ConfigBuilder) -> ConfigBuilder {
    builder.mode(Mode::Lockstep)
}

#[test]
fn a_load_that_fails_during_a_takeover_leaves_nothing_to_take_over_with() {
    let mut two = Two::new(true, |member| member, standby);
    two.protect();
    let mut two = two.at(1, GuestOpKind::LoadState);
    two.command(1, 7, Command::LostHeartbeat);
    two.guest(1).fail = Some(GuestOpKind::LoadState);
    two.run(100);
    assert_eq!(two.answers(), [(7, Answer::Refused(Refusal::NotOwner))]);
    assert_eq!(two.status(1).role, Role::Secondary);
    assert!(!two.guest(1).ran_half);
}

#[test]
fn frames_of_clients_do_not_hide_a_step_that_stalls() {
    let order = |b: ConfigBuilder| lockstep(b).resume(ResumePolicy::AfterLoad);
    let mut two = Two::protected(order).at(1, GuestOpKind::CheckState);
    for _ in 0..12 {
        let input = Input::FromWorld(Bytes::from_static(CLIENT));
        two.0.input(0, input).unwrap();
        let hold = |at: usize, o: &Output| at == 1 && is(o, GuestOpKind::CheckState);
        two.until(1_000, &hold, |_| false);
    }
    assert!(!two.status(0).protected, "the stall is ten seconds");
    assert!(two.guest(0).running);
}

#[test]
fn frames_of_clients_do_not_hide_that_control_is_a_black_hole() {
    let mut two = Two::protected(lockstep);
    for millis in 0..12_000 {
        if millis % 1_000 == 0 {
            let input = Input::FromWorld(Bytes::from_static(CLIENT));
            two.0.input(0, input).unwrap();
        }
        two.tick(NOTHING, &|_, channel| channel == Channel::Control);
    }
    assert!(!two.status(0).protected);
}

#[test]
fn a_partner_said_to_be_lost_is_not_taken_back_while_the_record_is_written() {
    let mut two = Two::protected(standby);
    two.command(0, 7, Command::LostHeartbeat);
    let disk: Held<'_> = &|at, o| at == 0 && matches!(o, Output::Persist(..));
    two.until(120, disk, |_| false);
    two.run(3_000);
    assert_eq!(two.answers(), [(7, Answer::Done)]);
}

#[test]
fn of_two_hosts_that_are_told_that_the_other_is_lost_one_wins() {
    let mut two = Two::protected(standby);
    two.command(0, 7, Command::LostHeartbeat);
    two.command(1, 8, Command::LostHeartbeat);
    let disk: Held<'_> = &|_, o| matches!(o, Output::Persist(..));
    two.until(20, disk, |_| false);
    two.run(5_000);
    let answers = two.answers();
    let done = answers.iter().filter(|(_, a)| *a == Answer::Done).count();
    assert_eq!((answers.len(), done), (2, 1), "{answers:?}");
    assert!(
        [0, 1]
            .iter()
            .all(|at| two.status(*at).failover != FailoverStatus::Require)
    );
}

#[test]
fn a_host_that_could_not_take_over_is_not_synchronised_until_it_is_well() {
    let mut two = Two::new(false, |member| member, standby);
    two.0.input(1, Input::Health(Health::Fatal)).unwrap();
    for _ in 0..10_000 {
        two.tick(NOTHING, &|_, _| false);
        let now = two.0.now();
        let member = two.0.host(0).unwrap().node().member().unwrap();
        assert!(now < Instant::from_millis(1_000) || member.permit(now).is_some());
    }
    assert_eq!(two.count(0, |e| matches!(e, Event::PeerAccepted { .. })), 0);
    two.0.input(1, Input::Health(Health::Ok)).unwrap();
    two.protect();
}

#[test]
fn a_guest_that_could_not_be_resumed_does_not_mark_its_host_for_ever() {
    let mut two = Two::protected(standby);
    two.command(0, 1, Command::Stop);
    two.run(50);
    two.guest(0).fail = Some(GuestOpKind::Resume);
    two.command(0, 2, Command::Continue);
    assert!(two.until(10_000, NOTHING, |two| two.status(1).role == Role::Primary));
    two.protect();
    assert!(!two.status(0).stopped);
}

#[test]
fn a_check_that_fails_after_the_primary_died_costs_no_replica() {
    let mut two = Two::protected(standby).at(1, GuestOpKind::CheckState);
    two.0.kill(0).unwrap();
    two.guest(1).fail = Some(GuestOpKind::CheckState);
    assert!(two.until(10_000, NOTHING, |two| two.status(1).role == Role::Primary));
}

#[test]
fn what_the_replaced_guest_said_does_not_leave_after_a_takeover() {
    let mut two = Two::protected(lockstep);
    assert!(two.until(5_000, NOTHING, |two| two.status(1).epoch >= Epoch(3)));
    two.0.kill(0).unwrap();
    assert!(two.until(5_000, NOTHING, |two| two.status(1).role == Role::Primary));
    two.run(100);
    two.reports();
    let frame = Bytes::from_static(b"never happened");
    let epoch = Epoch(1);
    two.0.input(1, Input::FromGuest { epoch, frame }).unwrap();
    assert_eq!(two.reports(), []);
}

#[test]
fn a_checkpoint_on_demand_is_one_that_was_captured_after_the_demand() {
    let mut two = Two::protected(standby).at(1, GuestOpKind::LoadState);
    let captured = two.status(0).epoch;
    two.reports();
    two.command(0, 7, Command::CheckpointNow);
    while two.answers().is_empty() {
        two.run(1);
    }
    assert!(two.status(0).epoch > captured);
}

#[test]
fn a_hand_over_is_refused_where_there_is_none_and_not_twice_at_once() {
    let mut told = Two::new(true, |member| member, standby);
    told.protect();
    told.command(0, 7, Command::FailOver);
    let refused = Answer::Refused(Refusal::Ownership(MemberState::PrimaryDual));
    assert_eq!(told.answers(), [(7, refused)]);

    let mut two = Two::protected(standby);
    two.command(0, 7, Command::FailOver);
    two.command(0, 8, Command::FailOver);
    two.run(5_000);
    let refused = Answer::Refused(Refusal::InProgress);
    assert_eq!(two.answers(), [(8, refused), (7, Answer::Done)]);
    assert_eq!(two.status(1).role, Role::Primary);
}

#[test]
fn a_replication_command_is_answered_by_its_own_operation_and_ends_no_pair() {
    let mut two = Two::protected(standby);
    let start = Command::XenSetReplication {
        enable: true,
        role: Role::Primary,
        failover: None,
    };
    two.command(0, 7, start);
    two.command(0, 8, start);
    two.0.effect(0, Effect::Guest).unwrap();
    assert_eq!(two.answers(), [(7, Answer::Done)]);
    two.guest(0).fail = Some(GuestOpKind::Replication);
    two.run(50);
    assert_eq!(two.answers(), [(8, Answer::Refused(Refusal::GuestFailed))]);
    assert!(two.is_protected());
}

#[test]
fn stop_is_answered_when_the_guest_has_stopped() {
    let mut two = Two::protected(standby);
    two.command(0, 7, Command::Stop);
    assert!(two.guest(0).running);
    assert_eq!(two.answers(), []);
    two.run(5);
    assert!(!two.guest(0).running);
    assert_eq!(two.answers(), [(7, Answer::Done)]);
    two.command(0, 8, Command::Stop);
    assert_eq!(two.answers(), [(8, Answer::Done)], "it is stopped already");
}

#[test]
fn no_timer_stays_in_the_past_where_nobody_may_act_on_silence() {
    for dies in [0, 1] {
        let nobody = |member: MemberConfig| {
            member.arbitration(Arbitration::None {
                primary_survives: false,
                unsafe_no_arbiter: false,
            })
        };
        let mut two = Two::new(false, nobody, standby);
        two.protect();
        two.0.kill(dies).unwrap();
        two.run(5_000);
        let next = two.0.host(1 - dies).unwrap().node().poll_timeout().unwrap();
        assert!(next.at > two.0.now(), "{next:?}");
    }
}

#[test]
fn a_count_of_frames_that_leaves_no_room_is_refused() {
    let mut two = Two::protected(lockstep);
    two.guest(0).claims = Some(u64::MAX);
    two.run(200);
    let refused = |event: &Event| {
        matches!(
            event,
            Event::PeerLeft(PeerLost::Faulty(PeerFault::OverLimit {
                field: "inputs",
                ..
            }))
        )
    };
    assert_ne!(two.count(1, refused), 0);
}

#[test]
fn a_client_frame_that_the_loaded_state_has_consumed_is_not_given_again() {
    let mut two = Two::new(false, |member| member, lockstep);
    let mut asked = false;
    // The frames channel is slow: the secondary gets nothing there before it has loaded.
    while two.status(1).epoch < Epoch(1) {
        let withheld: &dyn Fn(usize, Channel) -> bool =
            &|at, channel| at == 1 && channel == Channel::Net;
        let hold: Held<'_> = &|at, o| at == 0 && !asked && is(o, GuestOpKind::Capture);
        two.tick(hold, withheld);
        if !asked && two.asks(0, GuestOpKind::Capture) {
            asked = true;
            for _ in 0..2 {
                let input = Input::FromWorld(Bytes::from_static(CLIENT));
                two.0.input(0, input).unwrap();
            }
        }
    }
    two.run(20);
    assert_eq!(two.guest(0).heard, [1, 2]);
    assert_eq!(two.guest(1).heard, []);
}

#[test]
fn a_secondary_that_was_detached_stays_away_until_it_is_attached() {
    let mut two = Two::protected(standby);
    two.command(1, 7, Command::Detach);
    assert_eq!(two.answers(), [(7, Answer::Done)]);
    assert!(!two.until(8_000, NOTHING, Two::is_protected));
    two.command(1, 8, Command::Attach);
    two.protect();
}

#[test]
fn a_detach_that_was_refused_leaves_the_pair_to_come_together_again() {
    let mut two = Two::protected(standby);
    two.0.reaches_arbiter = [false; 2];
    two.command(0, 7, Command::Detach);
    let mut answers = Vec::new();
    let silent: Held<'_> = &|_, output| matches!(output, Output::Datagram(..));
    for _ in 0..60_000 {
        two.until(1, silent, |_| false);
        answers.extend(two.answers());
        if !answers.is_empty() {
            break;
        }
    }
    assert_eq!(answers, [(7, Answer::Refused(Refusal::TookTooLong))]);
    two.0.reaches_arbiter = [true; 2];
    assert!(two.until(60_000, NOTHING, Two::is_protected));
}

#[test]
fn a_guest_is_heard_after_a_capture_that_was_given_up() {
    let mut two = Two::protected(standby).at(0, GuestOpKind::Capture);
    let epoch = two.status(0).epoch.next();
    two.0.cut(Channel::Control).unwrap();
    let frame = Bytes::from_static(b"hello");
    two.0.input(0, Input::FromGuest { epoch, frame }).unwrap();
}

#[test]
fn a_zombie_that_thaws_in_a_capture_is_not_taken_for_a_broken_driver() {
    let mut two = Two::protected(standby).at(0, GuestOpKind::Capture);
    // Host 0 is frozen: nothing is given to it, and nothing of it leaves. Host 1 takes over.
    let mut waiting: Vec<(PathId, _)> = Vec::new();
    while waiting.len() < 500 {
        two.0.pass(Duration::from_millis(1));
        two.0.wake(1).unwrap();
        for effect in Effect::ALL {
            match effect {
                Effect::Connection => {}
                Effect::Datagram => {
                    let host = two.0.host_mut(1).unwrap();
                    while let Some(Output::Datagram(path, bytes)) = host.take(effect) {
                        waiting.push((path, bytes));
                    }
                }
                _ => {
                    two.0.effect(1, effect).unwrap();
                }
            }
        }
    }
    assert_eq!(two.status(1).role, Role::Primary);
    // Thawed, it hears of that before its guest's side has ended what it was told to do.
    for (path, bytes) in &waiting {
        two.0.input(0, Input::Datagram(*path, bytes)).unwrap();
    }
    assert_eq!(two.status(0).role, Role::Secondary);
    two.0.effect(0, Effect::Guest).unwrap();
    let (epoch, frame) = (two.guest(0).epoch, Bytes::from_static(b"hello"));
    two.0.input(0, Input::FromGuest { epoch, frame }).unwrap();
}

#[test]
fn a_frame_said_on_the_way_to_a_takeover_does_not_end_the_next_pairing() {
    let mut two = Two::protected(lockstep);
    two.run(100);
    two.0.kill(0).unwrap();
    let (epoch, frame) = (two.status(1).epoch, Bytes::from_static(CLIENT));
    two.0.input(1, Input::FromGuest { epoch, frame }).unwrap();
    assert!(two.until(5_000, NOTHING, |two| two.status(1).role == Role::Primary));
    two.restart(0, lockstep);
    two.protect();
    two.run(12_000);
    let left = |event: &Event| matches!(event, Event::PeerLeft(_));
    assert_eq!(two.count(1, left), 0, "the stall is ten seconds");
}

#[test]
fn a_replica_that_can_never_be_loaded_is_tried_less_and_less_often() {
    for kind in [GuestOpKind::CheckState, GuestOpKind::LoadState] {
        let mut two = Two::new(false, |member| member, standby);
        for _ in 0..60_000 {
            two.guest(1).fail = Some(kind);
            two.tick(NOTHING, &|_, _| false);
        }
        let tries = two.count(0, |event| matches!(event, Event::PeerAccepted { .. }));
        // After a quarter of a second first, every four in the end.
        assert!((10..25).contains(&tries), "{tries}");
        two.guest(1).fail = None;
        two.protect();
    }
}

#[test]
fn a_host_is_told_when_its_guest_is_the_vm_and_when_it_is_not_any_more() {
    let told = |two: &mut Two, at: usize| -> Vec<Notify> {
        let reports = two.reports().into_iter();
        let notes = reports.filter_map(|(host, output)| match output {
            Output::Notify(note @ (Notify::Serves | Notify::Shadows)) if host == at => Some(note),
            _ => None,
        });
        notes.collect()
    };
    let mut two = Two::new(false, |member| member, standby);
    assert!(two.until(5_000, NOTHING, Two::is_protected));
    assert_eq!(told(&mut two, 0), [Notify::Serves]);
    two.command(0, 1, Command::FailOver);
    assert!(two.until(5_000, NOTHING, |two| two.status(1).role == Role::Primary));
    two.run(500);
    assert_eq!(told(&mut two, 0), [Notify::Shadows]);
    // Both lose power, and the last owner boots the VM, started as a secondary like every host.
    two.0.kill(0).unwrap();
    two.run(5_000);
    two.0.kill(1).unwrap();
    two.reports();
    two.restart(1, standby);
    assert!(two.until(5_000, NOTHING, |two| two.status(1).role == Role::Primary));
    assert_eq!(told(&mut two, 1), [Notify::Serves]);
}

#[test]
fn a_stop_does_not_outlive_the_guest_that_was_stopped() {
    let mut two = Two::protected(standby);
    two.command(0, 1, Command::Stop);
    two.run(100);
    two.command(0, 2, Command::FailOver);
    let refused = Answer::Refused(Refusal::Stopped);
    assert_eq!(two.answers().last(), Some(&(2, refused)));
    // The other host takes over all the same when this one dies or says that it is lost.
    two.command(1, 3, Command::LostHeartbeat);
    assert!(two.until(10_000, NOTHING, |two| two.status(1).role == Role::Primary));
    two.protect();
    assert!(two.guest(1).running);
    two.0.kill(1).unwrap();
    assert!(two.until(10_000, NOTHING, |two| two.status(0).role == Role::Primary));
    two.run(500);
    assert!(two.guest(0).running);
}

#[test]
fn a_guest_that_cannot_be_stopped_is_not_asked_thousands_of_times_at_once() {
    let mut two = Two::protected(standby);
    two.guest(0).stubborn = 5_000;
    two.command(0, 7, Command::Stop);
    two.run(100);
    let refused = Answer::Refused(Refusal::GuestFailed);
    assert_eq!(two.answers(), [(7, refused)]);
    assert!(two.guest(0).stubborn > 4_990, "{}", two.guest(0).stubborn);
    assert!(two.guest(0).running, "a refused stop does not stop later");
}

#[test]
fn a_secondary_that_could_not_be_stopped_is_tried_again_and_comes_back() {
    let mut two = Two::protected(lockstep);
    two.guest(1).stubborn = 3;
    assert!(two.until(5_000, NOTHING, |two| !two.is_protected()));
    two.run(100);
    assert!(two.until(30_000, NOTHING, Two::is_protected));
    assert_eq!(two.guest(1).stubborn, 0);
}

#[test]
fn a_capture_that_fails_on_the_way_does_not_hide_a_running_guest_from_who_stops_it() {
    let order = |b: ConfigBuilder| standby(b).resume(ResumePolicy::AfterLoad);
    let mut two = Two::protected(order).at(0, GuestOpKind::Capture);
    two.command(0, 7, Command::Stop);
    two.guest(0).fail = Some(GuestOpKind::Capture);
    two.run(100);
    assert_eq!(two.answers(), [(7, Answer::Done)]);
    assert!(!two.guest(0).running, "it was answered that it is stopped");
}

#[test]
fn where_the_vm_lives_is_said_under_a_permit_only() {
    let said = |two: &mut Two| {
        let reports = two.reports();
        let permits = reports.iter().filter_map(|(at, o)| match o {
            Output::Announce(permit) if *at == 1 => Some(*permit),
            _ => None,
        });
        permits.collect::<Vec<_>>()
    };
    let mut two = Two::protected(standby);
    two.0.kill(0).unwrap();
    assert!(two.until(10_000, NOTHING, |two| two.status(1).role == Role::Primary));
    two.run(2_000);
    let rounds = said(&mut two);
    assert_eq!(rounds.len(), 5, "several times, and not for ever");
    assert!(rounds.iter().all(|permit| permit.allows(two.0.now())));
}
