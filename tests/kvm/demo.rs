//! `colod demo` as a newcomer types it: exit status 0, and a story that says why.

use std::process::Command;

use serde_json::Value;

use crate::common::*;

fn demo(more: &[&str]) -> Vec<Value> {
    let output = Command::new(colod())
        .args(["demo", "--json", "--seconds", "1"])
        .args(more)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let complained = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{more:?}\n{said}\n{complained}");
    said.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Names of what happened, in order, each once in a row.
fn names(story: &[Value]) -> Vec<&str> {
    let mut names: Vec<_> = story
        .iter()
        .map(|line| line["what"].as_str().unwrap())
        .collect();
    names.dedup();
    names
}

#[test]
fn tells_of_a_dead_primary() {
    let Some(_alone) = alone() else { return };
    let story = demo(&[]);
    assert_eq!(
        names(&story),
        [
            "started",
            "protected",
            "connected",
            "checkpoints",
            "answers",
            "killed",
            "suspected",
            "promoted",
            "first_byte",
            "first_answer",
            "started",
            "protected",
            "checkpoints",
            "answers",
            "verdict"
        ]
    );
    assert_eq!(story.last().unwrap()["good"], true);
}

#[test]
fn tells_of_a_dead_secondary_and_of_nothing_at_all() {
    let Some(_alone) = alone() else { return };
    let story = demo(&["--kill", "secondary"]);
    assert!(names(&story).contains(&"unprotected"));
    let story = demo(&["--kill", "none", "--mode", "lockstep"]);
    assert!(!names(&story).contains(&"killed"));
}

#[test]
fn works_on_taps_and_the_kernels_stack() {
    let Some(_alone) = alone() else { return };
    let said = Command::new(colod())
        .args(["demo", "--tap", "--kill", "none", "--seconds", "1"])
        .output()
        .unwrap();
    let complained = String::from_utf8_lossy(&said.stderr);
    if complained.contains("taps need") {
        println!("SKIPPED: {complained}");
        return;
    }
    let story = demo(&["--tap"]);
    assert_eq!(story.last().unwrap()["good"], true);
}
