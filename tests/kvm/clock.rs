//! Somebody sets the clock of the hosts: nothing here goes by it.

use rustix::{
    io::Errno,
    time::{ClockId, Timespec, clock_gettime, clock_settime},
};

use colod::demo::now;

use crate::common::*;

/// Several times what any timer of the pair waits for, and little enough to be put back unnoticed.
const LEAP: i64 = 5;

/// A clock that is wrong until this is dropped.
struct Wrong(i64);

impl Wrong {
    fn by(seconds: i64) -> Result<Self, Errno> {
        turn(seconds).map(|()| Self(seconds))
    }
}

impl Drop for Wrong {
    fn drop(&mut self) {
        turn(-self.0).unwrap();
    }
}

fn turn(seconds: i64) -> Result<(), Errno> {
    let time = clock_gettime(ClockId::Realtime);
    let tv_sec = time.tv_sec + seconds;
    clock_settime(ClockId::Realtime, Timespec { tv_sec, ..time })
}

#[test]
fn that_is_set_forward_or_back_takes_no_vm_over_and_stops_no_checkpoint() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    for leap in [LEAP, -LEAP] {
        let (before, heard) = (primary.events().len(), secondary.events().len());
        let wrong = match Wrong::by(leap) {
            Ok(wrong) => wrong,
            Err(error) => {
                println!("SKIPPED: the clock of this host cannot be set: {error}");
                return;
            }
        };
        for _ in 0..10 {
            let seen = primary.events().len();
            expect(&primary, "CHECKPOINTED", seen);
            answered(&client, now(), &primary);
        }
        drop(wrong);
        let calm = |event: &serde_json::Value| {
            event["event"] != "UNPROTECTED" && event["event"] != "PROMOTED"
        };
        assert!(primary.events()[before..].iter().all(calm));
        assert!(secondary.events()[heard..].iter().all(calm));
    }
    served(client);
}
