//! Both hosts lose power: nothing is left of the VM's memory, and it boots again where it may.

use colod::demo::{Host, now};

use crate::common::*;

#[test]
fn both_hosts_down_and_up_again_in_their_old_roles() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (mut primary, mut secondary) = pair(&mut stage);
    primary.kill().unwrap();
    secondary.kill().unwrap();
    drop((primary, secondary));
    let (primary, _secondary) = pair(&mut stage);
    // A connection to the old VM is lost with it; a new one works.
    let client = client(&mut stage);
    answered(&client, now(), &primary);
    served(client);
}

#[test]
fn a_primary_started_twice_goes_on_alone_with_its_own_record() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let mut primary = stage.start(Host::A, "primary").unwrap();
    expect(&primary, "MEMBER", 0);
    primary.kill().unwrap();
    drop(primary);
    let primary = stage.start(Host::A, "primary").unwrap();
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    served(client);
}
