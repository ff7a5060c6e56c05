//! `colod ctl` as a process, at a socket that needs no VM.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::Arc,
};

use colod::control::{Hub, Operator, Refused, Request, Server};
use serde_json::{Value, json};

use crate::common::colod;

struct Nothing;

impl Operator for Nothing {
    fn execute(&self, request: &Request) -> Result<Value, Refused> {
        Err(Refused::unknown(&request.execute, &[]))
    }
}

#[test]
fn events_of_the_past_are_told_to_whoever_asks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    for (ask, expected) in [
        (&["events", "--history"][..], "A epoch=1\n"),
        (
            &["raw", "events", r#"{"history":true}"#],
            "{\"data\":{\"epoch\":1},\"event\":\"A\"}\n",
        ),
    ] {
        let hub = Hub::default();
        hub.publish(&json!({ "event": "A", "data": { "epoch": 1 } }));
        let server = Server::start(&path, Arc::new(Nothing), hub).unwrap();
        let mut ctl = Command::new(colod())
            .args(["ctl", "--socket"])
            .arg(&path)
            .args(ask)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(ctl.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, expected);
        drop(server);
        assert!(ctl.wait().unwrap().success());
    }
}
