//! The fault table of spec ownership 9, row by row, with its bounds. Times are virtual,
//! in milliseconds; the default settings apply: I = 100, L = 600, T_p = 800, T_s = 1200.

use colo_proto::member::{
    Arbitration, Claim, Command, Critical, Health, Local, MemberConfig, MemberEvent, MemberState,
    WitnessLoss,
};

use crate::sim::Sim;

/// Compare-and-swap, two disk writes, settling: what a takeover adds to the silence.
const GRANT: u64 = 700;

fn pair() -> Sim {
    pair_with(|c| c)
}

fn pair_with(config: fn(MemberConfig) -> MemberConfig) -> Sim {
    let mut sim = Sim::new(1, config, None);
    sim.telling = true;
    sim.pair();
    sim.run_for(1_000);
    sim.mark();
    sim
}

fn run(sim: &mut Sim, millis: u64) {
    sim.run_for(millis);
    assert_eq!(sim.violation, None, "{}", sim.story.join("\n"));
}

/// Host 1 serves, alone or with host 0 as its new partner, and the world waited between `least` and `most`.
fn taken_over(sim: &Sim, least: u64, most: u64) {
    assert!(
        sim.is_open(1) && !sim.is_open(0),
        "{}",
        sim.story.join("\n")
    );
    gap(sim, least, most);
}

/// Host 0 goes on.
fn survived(sim: &Sim, least: u64, most: u64) {
    assert_eq!(
        sim.state(0),
        Some(MemberState::PrimarySolo),
        "{}",
        sim.story.join("\n")
    );
    assert!(sim.is_open(0) && !sim.is_open(1));
    gap(sim, least, most);
}

fn gap(sim: &Sim, least: u64, most: u64) {
    let gap = sim.gap_ms();
    assert!(
        (least..=most).contains(&gap),
        "gap {gap} ms, expected {least} to {most}\n{}",
        sim.story.join("\n")
    );
}

#[test]
fn row_1_primary_dies() {
    let mut sim = pair();
    sim.crash(0);
    run(&mut sim, 3_000);
    taken_over(&sim, 1_000, 1_200 + GRANT);
    assert_eq!(sim.hosts[1].process.as_ref().unwrap().announced, 1);
}

#[test]
fn row_2_primary_restarts_at_once_and_yields() {
    let mut sim = pair();
    sim.crash(0);
    sim.restart_in(0, 50);
    run(&mut sim, 900);
    taken_over(&sim, 0, 50 + GRANT);
    run(&mut sim, 3_000);
    assert_eq!(
        sim.state(0),
        Some(MemberState::Secondary),
        "synchronised again"
    );
}

#[test]
fn row_3_secondary_dies() {
    let mut sim = pair();
    sim.crash(1);
    run(&mut sim, 3_000);
    survived(&sim, 700, 800 + GRANT);
}

#[test]
fn row_4_secondary_restarts_and_abstains() {
    let mut sim = pair();
    sim.crash(1);
    sim.restart_in(1, 50);
    run(&mut sim, 450);
    assert_ne!(sim.state(0), Some(MemberState::PrimaryArbitrating));
    gap(&sim, 0, 450);
    run(&mut sim, 3_000);
    assert_eq!(
        sim.state(1),
        Some(MemberState::Secondary),
        "synchronised again"
    );
}

#[test]
fn row_5_replication_link_down() {
    let mut sim = pair();
    sim.net.replication = false;
    sim.local(0, Local::ReplicationDead);
    run(&mut sim, 700);
    survived(&sim, 0, 100 + GRANT);
    assert!(sim.saw(1, |e| matches!(
        e,
        MemberEvent::State {
            to: MemberState::Syncing,
            ..
        }
    )));
}

#[test]
fn row_6_one_path_down_is_an_event_and_nothing_else() {
    let mut sim = pair();
    sim.net.blocked = [[false, true]; 2];
    run(&mut sim, 3_000);
    assert_eq!(sim.state(0), Some(MemberState::PrimaryDual));
    assert!(sim.saw(0, |e| matches!(e, MemberEvent::PathDown(_))));
    gap(&sim, 0, 20);
    sim.net.blocked = [[false; 2]; 2];
    run(&mut sim, 1_000);
    assert!(sim.saw(0, |e| matches!(e, MemberEvent::PathUp(_))));
}

#[test]
fn row_7_all_paths_down_the_primary_wins() {
    let mut sim = pair();
    sim.cut_both(true);
    run(&mut sim, 3_000);
    survived(&sim, 600, 800 + GRANT);
    assert_eq!(sim.state(1), Some(MemberState::Fenced));
    sim.cut_both(false);
    run(&mut sim, 3_000);
    assert_eq!(
        sim.state(1),
        Some(MemberState::Secondary),
        "synchronised again"
    );
}

#[test]
fn row_8_all_paths_down_and_the_primary_is_degraded() {
    let mut sim = pair();
    sim.cut_both(true);
    sim.health(0, Health::Degraded);
    run(&mut sim, 3_500);
    taken_over(&sim, 1_000, 1_200 + GRANT);
    assert_eq!(sim.state(0), Some(MemberState::Fenced));
}

#[test]
fn row_9_arbiter_down_while_the_pair_is_healthy() {
    let mut sim = pair();
    sim.arbiter(0, false);
    sim.arbiter(1, false);
    run(&mut sim, 25_000);
    assert_eq!(sim.state(0), Some(MemberState::PrimaryDual));
    assert!(sim.saw(0, |e| *e == MemberEvent::ArbiterSilent));
    gap(&sim, 0, 20);
}

#[test]
fn row_10_arbiter_down_then_the_primary_dies() {
    let mut sim = pair();
    sim.arbiter(1, false);
    sim.crash(0);
    run(&mut sim, 20_000);
    assert_eq!(sim.state(1), Some(MemberState::SecondaryArbitrating));
    assert!(!sim.is_open(1));
    sim.local(1, Local::Operator(Command::Override));
    run(&mut sim, 1_000);
    assert!(sim.is_open(1));
    assert!(sim.saw(1, |e| *e == MemberEvent::Critical(Critical::OverrideUsed)));
    sim.arbiter(1, true);
    run(&mut sim, 3_000);
    assert!(sim.is_open(1), "the register agrees");
}

#[test]
fn row_11_arbiter_down_then_the_secondary_dies() {
    let mut sim = pair();
    sim.arbiter(0, false);
    sim.crash(1);
    run(&mut sim, 20_000);
    assert!(!sim.is_open(0));
    sim.arbiter(0, true);
    run(&mut sim, 3_000);
    survived(&sim, 19_000, 24_000);
}

#[test]
fn row_11_unless_the_primary_was_nominated() {
    let mut sim = pair_with(|c| c.witness_loss(WitnessLoss::NominatePrimary));
    sim.arbiter(0, false);
    sim.arbiter(1, false);
    run(&mut sim, 20_000);
    assert_eq!(sim.state(0), Some(MemberState::PrimarySolo));
    sim.crash(1);
    run(&mut sim, 3_000);
    survived(&sim, 0, 1_800);
    sim.arbiter(0, true);
    sim.start(1);
    run(&mut sim, 6_000);
    assert_eq!(
        sim.state(1),
        Some(MemberState::Secondary),
        "a pair once the arbiter is back"
    );
}

#[test]
fn row_12_primary_is_isolated() {
    let mut sim = pair();
    sim.cut_both(true);
    sim.arbiter(0, false);
    run(&mut sim, 3_000);
    taken_over(&sim, 1_000, 1_200 + GRANT);
    sim.cut_both(false);
    sim.arbiter(0, true);
    run(&mut sim, 4_000);
    assert_eq!(
        sim.state(0),
        Some(MemberState::Secondary),
        "synchronised again"
    );
}

#[test]
fn rows_13_and_27_primary_freezes_and_returns_after_the_takeover() {
    let mut sim = pair();
    sim.stall(0, 4_000);
    run(&mut sim, 3_000);
    taken_over(&sim, 1_000, 1_200 + GRANT);
    run(&mut sim, 1_100);
    assert!(
        !sim.is_open(0),
        "not for a moment: property S was checked at every event"
    );
    run(&mut sim, 3_000);
    assert_eq!(
        sim.state(0),
        Some(MemberState::Secondary),
        "synchronised again"
    );
}

#[test]
fn row_14_a_freeze_shorter_than_the_lease_is_nothing() {
    let mut sim = pair();
    sim.stall(0, 400);
    run(&mut sim, 2_000);
    assert_eq!(sim.state(0), Some(MemberState::PrimaryDual));
    gap(&sim, 390, 420);
}

#[test]
fn row_15_a_freeze_shorter_than_the_secondarys_patience_shuts_the_gate_meanwhile() {
    let mut sim = pair();
    sim.stall(0, 1_000);
    run(&mut sim, 2_500);
    assert_eq!(sim.state(0), Some(MemberState::PrimaryDual));
    gap(&sim, 990, 1_150);
}

#[test]
fn row_16_main_loop_hangs_and_the_heartbeat_lives() {
    let mut sim = pair();
    sim.local(0, Local::Progress(1));
    run(&mut sim, 4_900);
    assert_eq!(sim.state(0), Some(MemberState::PrimaryDual));
    run(&mut sim, 1_000);
    taken_over(&sim, 0, GRANT);
}

#[test]
fn row_17_secondary_hangs_shortly() {
    let mut sim = pair();
    sim.stall(1, 700);
    run(&mut sim, 3_000);
    assert_eq!(sim.state(0), Some(MemberState::PrimaryDual));
    assert_eq!(sim.state(1), Some(MemberState::Secondary));
    gap(&sim, 690, 850);
}

#[test]
fn row_18_secondary_hangs_long() {
    let mut sim = pair();
    sim.stall(1, 3_000);
    run(&mut sim, 2_900);
    survived(&sim, 700, 800 + GRANT);
    run(&mut sim, 3_000);
    assert_eq!(
        sim.state(1),
        Some(MemberState::Secondary),
        "synchronised again"
    );
}

#[test]
fn row_19_the_primary_does_not_hear_the_secondary() {
    let mut sim = pair();
    sim.cut(1, true);
    sim.net.replication = false;
    run(&mut sim, 3_000);
    survived(&sim, 600, 800 + GRANT);
    assert_eq!(
        sim.state(1),
        Some(MemberState::Syncing),
        "the notice reached it"
    );
}

#[test]
fn row_20_the_secondary_does_not_hear_the_primary() {
    let mut sim = pair();
    sim.cut(0, true);
    sim.net.replication = false;
    run(&mut sim, 3_000);
    survived(&sim, 600, 800 + GRANT);
    assert_eq!(sim.state(1), Some(MemberState::Fenced));
}

#[test]
fn row_21_only_the_primary_reaches_the_arbiter() {
    let mut sim = pair();
    sim.cut_both(true);
    sim.arbiter(1, false);
    run(&mut sim, 5_000);
    survived(&sim, 600, 800 + GRANT);
    assert_eq!(sim.state(1), Some(MemberState::SecondaryArbitrating));
    sim.arbiter(1, true);
    run(&mut sim, 3_000);
    assert_eq!(sim.state(1), Some(MemberState::Fenced), "denied in the end");
}

#[test]
fn row_22_only_the_secondary_reaches_the_arbiter() {
    let mut sim = pair();
    sim.cut_both(true);
    sim.arbiter(0, false);
    run(&mut sim, 3_000);
    taken_over(&sim, 1_000, 1_200 + GRANT);
}

#[test]
fn row_23_granted_and_the_answer_is_lost() {
    let mut sim = pair();
    sim.net.hear[1] = false;
    sim.crash(0);
    run(&mut sim, 2_500);
    assert_eq!(sim.register.owner.0, 2, "granted");
    assert!(!sim.is_open(1), "and it does not know");
    sim.net.hear[1] = true;
    run(&mut sim, 2_000);
    taken_over(&sim, 2_400, 2_500 + 1_000 + GRANT);
}

#[test]
fn row_24_primary_is_granted_and_dies_before_it_uses_it() {
    let mut sim = pair();
    sim.cut_both(true);
    sim.net.hear[0] = false;
    run(&mut sim, 1_150);
    assert_eq!(sim.register.owner.0, 1, "granted");
    sim.crash(0);
    run(&mut sim, 1_000);
    assert_eq!(
        sim.state(1),
        Some(MemberState::Fenced),
        "must assume that it was used"
    );
    sim.net.hear[0] = true;
    sim.cut_both(false);
    sim.start(0);
    run(&mut sim, 9_000);
    assert!(sim.is_open(1), "handed back: {}", sim.story.join("\n"));
    assert_eq!(sim.counts.cold_boots, 1, "only the first boot ever");
}

#[test]
fn row_24_secondary_is_granted_and_dies_before_it_uses_it() {
    let mut sim = pair();
    sim.health(0, Health::Degraded);
    sim.cut_both(true);
    sim.net.hear[1] = false;
    run(&mut sim, 1_500);
    assert_eq!(sim.register.owner.0, 2, "granted");
    sim.crash(1);
    run(&mut sim, 2_000);
    assert_eq!(sim.state(0), Some(MemberState::Fenced));
    sim.health(0, Health::Ok);
    sim.net.hear[1] = true;
    sim.cut_both(false);
    sim.start(1);
    run(&mut sim, 9_000);
    assert!(sim.is_open(0), "handed back: {}", sim.story.join("\n"));
}

#[test]
fn row_26_wall_clocks_are_not_read() {
    // There is nothing to jump: the machine knows no time but the boot clock it is given.
    let mut sim = pair();
    sim.clocks([0, 0]);
    run(&mut sim, 1_000);
    gap(&sim, 0, 20);
}

#[test]
fn row_29_both_hosts_lose_power() {
    let mut sim = pair();
    sim.crash(0);
    sim.crash(1);
    run(&mut sim, 500);
    sim.start(0);
    sim.start(1);
    run(&mut sim, 8_000);
    assert!(sim.is_open(0), "{}", sim.story.join("\n"));
    assert_eq!(sim.counts.cold_boots, 2, "the last owner, from its disk");
    assert_eq!(
        sim.state(1),
        Some(MemberState::Secondary),
        "and a pair again"
    );
}

#[test]
fn row_30_arbiter_restored_from_an_old_backup() {
    let mut sim = pair();
    sim.register.generation.0 -= 1;
    run(&mut sim, 6_000);
    assert!(sim.saw(0, |e| matches!(e, MemberEvent::ArbiterWentBack { .. })));
    assert_eq!(sim.state(0), Some(MemberState::PrimaryDual));
    gap(&sim, 0, 20);
}

#[test]
fn row_31_thirty_percent_loss() {
    let mut sim = pair();
    sim.net.loss = 30;
    run(&mut sim, 60_000);
    assert_eq!(sim.state(0), Some(MemberState::PrimaryDual));
    gap(&sim, 0, 200);
}

#[test]
fn row_34_operator_orders_a_failover() {
    let mut sim = pair();
    sim.local(0, Local::Operator(Command::Yield));
    run(&mut sim, 1_000);
    taken_over(&sim, 0, GRANT);
}

#[test]
fn row_35_both_told_that_the_other_is_lost() {
    let mut sim = pair();
    sim.local(0, Local::Operator(Command::FailOver));
    sim.local(1, Local::Operator(Command::FailOver));
    run(&mut sim, 2_000);
    assert_ne!(sim.is_open(0), sim.is_open(1), "exactly one goes on");
}

#[test]
fn a_lost_secondary_that_both_agree_on_costs_no_interruption() {
    let mut sim = pair();
    sim.local(1, Local::ReplicaLost);
    run(&mut sim, 450);
    gap(&sim, 0, 350);
    run(&mut sim, 3_000);
    assert_eq!(sim.state(1), Some(MemberState::Secondary));
}

#[test]
fn takeover_within_sixty_milliseconds_of_silence() {
    let mut sim = pair_with(|c| MemberConfig::fast(crate::sim::VM, c.peer(), crate::sim::KEY));
    sim.net.arbiter_delay = 500;
    sim.crash(0);
    // The last heartbeat was up to one interval before the crash.
    run(&mut sim, 54);
    assert_eq!(sim.state(1), Some(MemberState::Secondary));
    run(&mut sim, 8);
    assert_ne!(
        sim.state(1),
        Some(MemberState::Secondary),
        "decided at 60 ms"
    );
    run(&mut sim, 1_000);
    taken_over(&sim, 55, 60 + 650);
}

#[test]
fn fencing_decides_where_there_is_no_arbiter() {
    let mut sim = pair_with(|c| c.arbitration(Arbitration::Fence));
    sim.fence_ok = Some(false);
    sim.cut_both(true);
    run(&mut sim, 6_000);
    assert!(!sim.is_open(0) && !sim.is_open(1), "not fenced, not served");
    sim.fence_ok = Some(true);
    run(&mut sim, 3_000);
    assert_ne!(sim.is_open(0), sim.is_open(1));
}

#[test]
fn without_an_arbiter_the_secondary_stays_passive_unless_told_to_gamble() {
    let none = |c: MemberConfig| {
        c.arbitration(Arbitration::None {
            primary_survives: true,
            unsafe_no_arbiter: false,
        })
    };
    let mut sim = pair_with(none);
    sim.crash(0);
    run(&mut sim, 5_000);
    assert!(!sim.is_open(1));
    let mut sim = pair_with(none);
    sim.crash(1);
    run(&mut sim, 3_000);
    survived(&sim, 700, 800 + GRANT);

    let mut sim = pair_with(|c| {
        c.arbitration(Arbitration::None {
            primary_survives: true,
            unsafe_no_arbiter: true,
        })
    });
    sim.crash(0);
    run(&mut sim, 3_000);
    taken_over(&sim, 1_000, 1_200 + GRANT);
    assert!(sim.saw(1, |e| *e == MemberEvent::Critical(Critical::UnsafeTakeover)));
}

#[test]
fn a_new_owner_writes_it_down_before_it_opens() {
    let mut sim = pair();
    sim.crash(0);
    run(&mut sim, 3_000);
    assert_eq!(sim.hosts[1].record.unwrap().claim, Claim::Solo);
}
