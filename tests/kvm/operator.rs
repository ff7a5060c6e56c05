//! What an operator asks for happens, or is refused with the reason; the pair stays whole.

use colod::{control::ClientError, demo::now};
use serde_json::json;

use crate::common::*;

#[test]
fn asks_for_status_a_checkpoint_a_delay_and_a_pause() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    assert_eq!(
        primary.execute("query-colo-status", json!({})).unwrap(),
        json!({ "mode": "primary", "last-mode": "none", "reason": "none" })
    );
    assert_eq!(
        secondary.execute("query-colo-status", json!({})).unwrap()["mode"],
        "secondary"
    );
    let before = primary.status().unwrap()["checkpoints"].as_u64().unwrap();
    primary.execute("checkpoint", json!({})).unwrap();
    assert!(primary.status().unwrap()["checkpoints"].as_u64().unwrap() > before);
    primary
        .execute(
            "migrate-set-parameters",
            json!({ "x-checkpoint-delay": 40 }),
        )
        .unwrap();
    primary.execute("stop", json!({})).unwrap();
    assert_eq!(primary.status().unwrap()["stopped"], true);
    primary.execute("cont", json!({})).unwrap();
    answered(&client, now(), &primary);
    let Err(ClientError::Refused(refused)) = secondary.execute("checkpoint", json!({})) else {
        panic!("a secondary takes no checkpoints");
    };
    assert_eq!(refused.class, "GenericError");
    served(client);
}

#[test]
fn hands_the_vm_over_and_back() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (a, b) = pair(&mut stage);
    let client = client(&mut stage);
    assert!(client.answer_after(0, PATIENCE).is_some(), "{}", a.log());
    let (seen_a, seen_b) = (a.events().len(), b.events().len());
    a.execute("failover", json!({})).unwrap();
    expect(&b, "PROMOTED", seen_b);
    answered(&client, now(), &b);
    // The old primary joins again by itself.
    expect(&b, "PROTECTED", seen_b);
    b.execute("failover", json!({})).unwrap();
    expect(&a, "PROMOTED", seen_a);
    answered(&client, now(), &a);
    served(client);
}

#[test]
fn says_lost_heartbeat_on_either_side() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (a, b) = pair(&mut stage);
    let client = client(&mut stage);
    assert!(client.answer_after(0, PATIENCE).is_some(), "{}", a.log());
    let seen = b.events().len();
    // On both at once: one of them wins, and one VM is heard.
    let both = std::thread::scope(|scope| {
        let on_b = scope.spawn(|| b.execute("x-colo-lost-heartbeat", json!({})).is_ok());
        let on_a = a.execute("x-colo-lost-heartbeat", json!({})).is_ok();
        [on_a, on_b.join().unwrap()]
    });
    assert!(both.contains(&true), "{both:?}\n{}\n{}", a.log(), b.log());
    assert!(
        client.answer_after(now(), PATIENCE).is_some(),
        "{}\n{}",
        a.log(),
        b.log()
    );
    let b_won = b
        .wait_for("PROMOTED", seen, std::time::Duration::ZERO)
        .is_some();
    let exit = if b_won {
        expect(&b, "COLO_EXIT", seen)
    } else {
        expect(&a, "COLO_EXIT", 0)
    };
    assert_eq!(exit["data"]["reason"], "request");
    served(client);
}
