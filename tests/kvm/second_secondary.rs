//! There is one secondary: another process that wants to be it is refused, and the pair goes on.

use colo_driver_mio::demo::{Host, now};

use crate::common::*;

#[test]
fn a_second_daemon_on_the_same_host_is_refused_in_one_line() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let mut second = stage.start(Host::B, "secondary").unwrap();
    let status = second.wait_end(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(1));
    let log = second.log();
    assert!(log.contains("another colod runs"), "{log}");
    assert!(client.answer_after(now(), PATIENCE).is_some());
    assert_eq!(
        primary.status().unwrap()["protected"],
        true,
        "{}",
        primary.log()
    );
    assert!(
        secondary.control().exists(),
        "its control socket is its own"
    );
    served(client);
}
