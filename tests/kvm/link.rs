//! The cables between the hosts are cut and slow; the hosts live. In network namespaces, with two
//! cables: streams and heartbeats on the first, heartbeats on the second.

use std::{process::Command, time::Duration};

use colod::demo::{Daemon, Host, Site, Stage, now};

use crate::common::*;

/// Two hosts and two switches between them, each in a network namespace; gone when dropped.
struct Cables {
    host: [String; 2],
    middle: String,
}

fn ip(args: &str) -> bool {
    let mut command = Command::new("ip");
    command
        .args(args.split(' '))
        .stderr(std::process::Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

impl Cables {
    /// `None` where namespaces cannot be made.
    fn lay() -> Option<Self> {
        let pid = std::process::id();
        let laid = Self {
            host: [format!("colo-a{pid}"), format!("colo-b{pid}")],
            middle: format!("colo-m{pid}"),
        };
        if laid.connect() {
            return Some(laid);
        }
        skip(
            "netns",
            "network namespaces cannot be made (root and iproute2 are needed)",
        );
        None
    }

    fn connect(&self) -> bool {
        let Self { host, middle } = self;
        let mut good = ip(&format!("netns add {middle}"));
        for name in host {
            good = good && ip(&format!("netns add {name}"));
        }
        for cable in 0..2 {
            good = good
                && ip(&format!("-n {middle} link add br{cable} type bridge"))
                && ip(&format!("-n {middle} link set br{cable} up"));
            for (end, name) in host.iter().enumerate() {
                let (near, far) = (format!("c{cable}"), format!("p{cable}{end}"));
                let address = format!("10.77.{cable}.{}/24", end + 1);
                good =
                    good && ip(&format!(
                        "link add {near} netns {name} type veth peer name {far} netns {middle}"
                    )) && ip(&format!("-n {name} addr add {address} dev {near}"))
                        && ip(&format!("-n {name} link set {near} up"))
                        && ip(&format!("-n {middle} link set {far} master br{cable} up"));
            }
        }
        good
    }

    fn sites(&self) -> [Site; 2] {
        [0, 1].map(|end| Site {
            through: ["ip", "netns", "exec", &self.host[end]]
                .map(str::to_owned)
                .to_vec(),
            stream: format!("10.77.0.{}:7800", end + 1).parse().unwrap(),
            beats: [0, 1].map(|n| format!("10.77.{n}.{}:7801", end + 1).parse().unwrap()),
        })
    }

    /// Whether frames pass the cable. It is cut in the middle: neither end sees its link go down.
    fn set(&self, cable: usize, passes: bool) {
        let middle = &self.middle;
        let master = if passes {
            format!("master br{cable}")
        } else {
            "nomaster".into()
        };
        assert!(ip(&format!("-n {middle} link set p{cable}1 {master}")));
    }

    /// Whether what this end says arrives, on either cable: a bucket that no frame fits into drops
    /// all of them. What the other end says still comes.
    fn mute(&self, end: usize, muted: bool) -> bool {
        let name = &self.host[end];
        (0..2).all(|cable| {
            let change = if muted {
                format!("add dev c{cable} root tbf rate 8kbit burst 20b latency 1ms")
            } else {
                format!("del dev c{cable} root")
            };
            ip(&format!("netns exec {name} tc qdisc {change}"))
        })
    }

    /// Lets at most this many megabits a second pass each end of the first cable.
    fn slow(&self, megabits: u32) -> bool {
        self.host.iter().all(|name| {
            ip(&format!(
                "netns exec {name} tc qdisc add dev c0 root tbf rate {megabits}mbit burst 256kb latency 50ms"
            ))
        })
    }
}

impl Drop for Cables {
    fn drop(&mut self) {
        for name in self.host.iter().chain([&self.middle]) {
            ip(&format!("netns del {name}"));
        }
    }
}

fn stage_on(cables: &Cables) -> Stage {
    Stage::at(colod(), settings(), cables.sites()).unwrap()
}

#[test]
fn both_cables_cut_and_mended_the_primary_goes_on_and_is_protected_again() {
    let Some(_alone) = alone() else { return };
    let Some(cables) = Cables::lay() else { return };
    let mut stage = stage_on(&cables);
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let seen = primary.events().len();
    cables.set(0, false);
    cables.set(1, false);
    expect(&primary, "UNPROTECTED", seen);
    answered(&client, now(), &primary);
    let seen = primary.events().len();
    cables.set(0, true);
    cables.set(1, true);
    expect(&primary, "PROTECTED", seen);
    served(client);
    let speakers = stage.switch().speakers(stage.settings_now().mac);
    assert!(
        !speakers.contains(&secondary.pid()),
        "the secondary was heard"
    );
}

/// Spec heartbeat section 9, rows 19 and 20: whichever direction is lost, the primary goes on.
fn one_direction_is_lost(mute: usize) {
    let Some(_alone) = alone() else { return };
    let Some(cables) = Cables::lay() else { return };
    let mut stage = stage_on(&cables);
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let seen = primary.events().len();
    if !cables.mute(mute, true) {
        println!("SKIPPED: this kernel has no tc qdisc tbf");
        return;
    }
    expect(&primary, "UNPROTECTED", seen);
    answered(&client, now(), &primary);
    let seen = primary.events().len();
    assert!(cables.mute(mute, false));
    expect(&primary, "PROTECTED", seen);
    served(client);
    let speakers = stage.switch().speakers(stage.settings_now().mac);
    assert!(
        !speakers.contains(&secondary.pid()),
        "the secondary was heard"
    );
}

#[test]
fn only_what_the_primary_says_is_lost() {
    one_direction_is_lost(0);
}

#[test]
fn only_what_the_secondary_says_is_lost() {
    one_direction_is_lost(1);
}

#[test]
fn the_second_cable_cut_changes_nothing() {
    let Some(_alone) = alone() else { return };
    let Some(cables) = Cables::lay() else { return };
    let mut stage = stage_on(&cables);
    let (primary, _secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let seen = primary.events().len();
    cables.set(1, false);
    expect(&primary, "PATH_DOWN", seen);
    assert!(client.answer_after(now(), PATIENCE).is_some());
    assert_eq!(
        primary.status().unwrap()["protected"],
        true,
        "{}",
        primary.log()
    );
    served(client);
}

#[test]
fn the_first_cable_cut_ends_protection_without_a_takeover() {
    let Some(_alone) = alone() else { return };
    let Some(cables) = Cables::lay() else { return };
    let mut stage = stage_on(&cables);
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let seen = primary.events().len();
    cables.set(0, false);
    expect(&primary, "UNPROTECTED", seen);
    answered(&client, now(), &primary);
    assert!(
        secondary
            .wait_for("PROMOTED", 0, Duration::from_millis(600))
            .is_none()
    );
    served(client);
    one_voice_at_a_time(&mut stage);
}

#[test]
fn sockets_full_of_pages_delay_no_heartbeat() {
    let Some(_alone) = alone() else { return };
    let Some(cables) = Cables::lay() else { return };
    let mut stage = stage_on(&cables);
    let (mut primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    if !cables.slow(20) {
        println!("SKIPPED: this kernel has no tc qdisc tbf");
        return;
    }
    let (seen, heard) = (primary.events().len(), secondary.events().len());
    // Until one has 6 MB: it took two seconds, many times the detection time.
    let begin = now();
    let mut pages = 0;
    while pages < 1_500 {
        assert!(now() - begin < 60_000_000_000, "the cable is never full");
        let next = expect(&primary, "CHECKPOINTED", primary.events().len());
        pages = next["data"]["pages"].as_u64().unwrap();
    }
    let since = |daemon: &Daemon, seen: usize, event: &str| {
        let events = daemon.events();
        events[seen..].iter().any(|e| e["event"] == event)
    };
    assert!(!since(&primary, seen, "UNPROTECTED"), "{}", primary.log());
    assert!(!since(&secondary, heard, "PROMOTED"), "{}", secondary.log());
    let killed = now();
    primary.kill().unwrap();
    expect(&secondary, "PROMOTED", heard);
    answered(&client, killed, &secondary);
    served(client);
    memory_held(&stage);
}

#[test]
fn a_slow_cable_is_slower_and_otherwise_the_same() {
    let Some(_alone) = alone() else { return };
    let Some(cables) = Cables::lay() else { return };
    let mut stage = stage_on(&cables);
    if !cables.slow(200) {
        println!("SKIPPED: this kernel has no tc qdisc tbf");
        return;
    }
    let (mut primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let killed = now();
    let seen = secondary.events().len();
    primary.kill().unwrap();
    expect(&secondary, "PROMOTED", seen);
    answered(&client, killed, &secondary);
    assert_eq!(secondary.host(), Host::B);
    served(client);
}
