//! Wrong flags, files and addresses: one line that says what, where and what to do, and an exit
//! status that says so too.

use std::{
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    process::{Command, Output, Stdio},
};

use colod::{
    config::{Mac, Size},
    demo::{Host, Stage},
};

use crate::common::*;

fn colod_says(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = Command::new(colod()).args(args).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn a_configuration_that_cannot_be_used_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.toml");
    let path = file.to_str().unwrap();
    for (text, expected) in [
        ("", "missing field `vm`"),
        (
            "[vm]\nkernel = \"/nowhere\"\n",
            "vm.kernel cannot be read: /nowhere",
        ),
        (
            "[vm]\nkernel = \"builtin:server\"\nvcpu = 2\n",
            "did you mean `vcpus`?",
        ),
        (
            "[vm]\nkernel = \"builtin:server\"\nmemory = \"1M\"\n",
            "expected 16M to 64G",
        ),
        (
            "[vm]\nkernel = \"builtin:server\"\n[net]\nbackend = \"tap\"\n",
            "net.tap is missing",
        ),
    ] {
        std::fs::write(&file, text).unwrap();
        let (code, said) = colod_says(&["run", "--config", path]);
        assert_eq!(code, Some(1), "{text:?}: {said}");
        assert!(said.contains(expected), "{text:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    std::fs::write(&file, "[vm]\nkernel = \"builtin:server\"\n").unwrap();
    let (code, said) = colod_says(&["primary", "--config", path]);
    assert_eq!(code, Some(1));
    assert!(said.contains("pair is missing"), "{said}");
    let (code, said) = colod_says(&["run", "--config", "/nowhere/vm.toml"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("/nowhere/vm.toml"), "{said}");
}

#[test]
fn a_key_that_others_can_read_is_warned_of() {
    let Some(_alone) = alone() else { return };
    let stage = stage();
    let key = stage.directory().join("pair.key");
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).unwrap();
    let file = stage.directory().join("vm.toml");
    let text = format!(
        "[vm]\nkernel = \"builtin:server\"\n[pair]\nnode = 1\nid = \"{:032}\"\n\
         key_file = {key:?}\nlisten = \"127.0.0.1:1\"\npeer = \"127.0.0.2:1\"\nstate_dir = \"s\"\n\
         heartbeat = [{{ listen = \"127.0.0.1:2\", peer = \"127.0.0.2:2\" }}]\n\
         [arbiter]\nkind = \"none\"\n",
        1
    );
    std::fs::write(&file, text).unwrap();
    let (code, said) = colod_says(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.starts_with("colod: warning: pair.key_file"), "{said}");
}

#[test]
fn check_says_no_wherever_a_start_would() {
    let Some(_alone) = alone() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("key"), b"0123456789abcdefghijklmnopqrstuv").unwrap();
    std::fs::set_permissions(at("key"), PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(at("script"), "#!/bin/sh\n").unwrap();
    std::fs::write(at("odd.img"), [0; 4096 + 512]).unwrap();
    let good = "[vm]\nkernel = \"builtin:server\"\n[pair]\nnode = 1\n\
         id = \"00000000000000000000000000000001\"\nkey_file = \"key\"\n\
         listen = \"127.0.0.1:7800\"\npeer = \"127.0.0.2:7800\"\nstate_dir = \"s\"\n\
         heartbeat = [{ listen = \"127.0.0.1:7801\", peer = \"127.0.0.2:7801\" }]\n\
         [arbiter]\npath = \"arbiter\"\n[member]\ndetection = \"1200ms\"\n";
    for (from, to, expected) in [
        ("", "", None),
        ("1200ms", "1min", None),
        (
            "builtin:server",
            "script",
            Some("kernel image is of no kind"),
        ),
        (
            "[pair]",
            "memory = \"64G\"\n[pair]",
            Some("vm.memory is 64G, but this host has"),
        ),
        (
            "[pair]",
            "[disk]\npath = \"odd.img\"\n[pair]",
            Some("odd.img has 4608 bytes, expected a multiple of 4096 in a pair"),
        ),
        (
            "[pair]",
            "[net]\nbackend = \"tap\"\ntap = \"colo-no\"\n[pair]",
            Some("net.tap is colo-no, which is not there; make it"),
        ),
        (
            "127.0.0.1:7800",
            "192.0.2.1:7800",
            Some("pair.listen listens at 192.0.2.1, which is no address of this host"),
        ),
        (
            "127.0.0.1:7801",
            "192.0.2.1:7801",
            Some("pair.heartbeat listens at 192.0.2.1, which is no address"),
        ),
        (
            "[member]",
            "[control]\nsocket = \"no/dir/c.sock\"\n[member]",
            Some("control.socket is "),
        ),
    ] {
        assert!(good.contains(from), "{from}");
        std::fs::write(at("vm.toml"), good.replacen(from, to, 1)).unwrap();
        let (code, said) = colod_says(&["check", "--config", &at("vm.toml")]);
        match expected {
            None => assert_eq!((code, &*said), (Some(0), ""), "{to}"),
            Some(expected) => {
                assert_eq!(code, Some(1), "{to}");
                assert!(said.contains(expected), "{said}");
            }
        }
    }
    let mut left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(
        left,
        ["key", "odd.img", "script", "vm.toml"],
        "nothing is made"
    );
}

#[test]
fn wrong_flags_are_explained_with_status_two() {
    let (code, said) = colod_says(&["primary"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("--config"), "{said}");
    let (code, said) = colod_says(&["dmeo"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("demo"), "{said}");
    let (code, said) = colod_says(&["ctl", "--socket", "/nowhere.sock", "status"]);
    assert_eq!(code, Some(1));
    assert!(
        said.contains("no daemon answers at /nowhere.sock"),
        "{said}"
    );
}

#[test]
fn whoever_stops_reading_ends_the_demo_quietly_and_whole() {
    let Some(_alone) = alone() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut demo = Command::new(colod());
    demo.arg("demo").env("TMPDIR", dir.path()).stdout(writer);
    let Output { status, stderr, .. } = demo.stderr(Stdio::piped()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&stderr), "");
    assert_eq!(status.code(), Some(141));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_demo_without_a_place_for_its_files_names_it_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere");
    let long = dir.path().join("x".repeat(110));
    std::fs::create_dir(&long).unwrap();
    for place in [&nowhere, &long] {
        let mut demo = Command::new(colod());
        let Output { status, stderr, .. } = demo.arg("demo").env("TMPDIR", place).output().unwrap();
        let said = String::from_utf8(stderr).unwrap();
        let expected = format!("colod: {}/colod-stage-", place.display());
        assert!(said.starts_with(&expected), "{said}");
        assert_eq!((status.code(), said.lines().count()), (Some(1), 1));
    }
    assert_eq!(std::fs::read_dir(&long).unwrap().count(), 0);
}

#[test]
fn a_full_disk_for_output_is_one_line() {
    let Some(_alone) = alone() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.toml");
    std::fs::write(&file, "[vm]\nkernel = \"builtin:server\"\n").unwrap();
    let full = std::fs::File::options().write(true).open("/dev/full");
    let mut check = Command::new(colod());
    check.arg("check").arg("--config").arg(&file);
    check.stdout(full.unwrap()).stderr(Stdio::piped());
    let Output { status, stderr, .. } = check.output().unwrap();
    let said = String::from_utf8(stderr).unwrap();
    assert!(
        said.starts_with("colod: standard output: No space"),
        "{said}"
    );
    assert_eq!((status.code(), said.lines().count()), (Some(1), 1));
}

#[test]
fn a_kernel_of_no_kind_is_refused() {
    let Some(_alone) = alone() else { return };
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, "#!/bin/sh\n").unwrap();
    let file = dir.path().join("vm.toml");
    std::fs::write(&file, format!("[vm]\nkernel = {kernel:?}\n")).unwrap();
    let (code, said) = colod_says(&["run", "--config", file.to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(said.contains("kernel image is of no kind"), "{said}");
    // A protected VM boots only once its host owns it; the kernel is looked at before that.
    let mut settings = settings();
    settings.vm.kernel = kernel;
    let mut stage = Stage::new(colod(), settings).unwrap();
    let mut daemon = stage.start(Host::A, "primary").unwrap();
    assert_eq!(daemon.wait_end(PATIENCE).unwrap().code(), Some(1));
    let log = daemon.log();
    assert!(log.contains("kernel image is of no kind"), "{log}");
}

#[test]
fn a_port_in_use_is_named() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let at = stage.stream_address(Host::A);
    let _taken = TcpListener::bind(at).unwrap();
    let mut daemon = stage.start(Host::A, "primary").unwrap();
    assert_eq!(daemon.wait_end(PATIENCE).unwrap().code(), Some(1));
    let log = daemon.log();
    let last = log.lines().last().unwrap();
    assert!(
        last.contains(&at.to_string()) && last.contains("in use"),
        "{log}"
    );
}

#[test]
fn a_peer_of_another_shape_is_refused_with_what_differs() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let primary = stage.start(Host::A, "primary").unwrap();
    stage.settings().vm.memory = Size::mib(64);
    stage.settings().vm.vcpus = 2;
    stage.settings().mac = Mac([2, 0, 0, 0, 0, 7]);
    let secondary = stage.start(Host::B, "secondary").unwrap();
    let refused = expect(&secondary, "PEER_REFUSED", 0);
    let reasons = refused["data"]["reasons"].to_string();
    assert!(
        ["vcpus", "slot", "net.mac is "]
            .iter()
            .all(|what| reasons.contains(what)),
        "{reasons}"
    );
    assert_eq!(primary.status().unwrap()["protected"], false);
}

#[test]
fn a_stranger_without_the_key_is_refused() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let primary = stage.start(Host::A, "primary").unwrap();
    // It has read its key by then.
    expect(&primary, "MEMBER", 0);
    std::fs::write(
        stage.directory().join("pair.key"),
        b"0123456789abcdefghijklmnopqrstuv",
    )
    .unwrap();
    let _stranger = stage.start(Host::B, "secondary").unwrap();
    let refused = expect(&primary, "CALLER_REFUSED", 0);
    assert!(refused["data"]["why"].is_string(), "{refused}");
    assert_eq!(primary.status().unwrap()["protected"], false);
}

#[test]
fn a_full_disk_for_logs_loses_lines_and_nothing_else() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    stage.settings().log_file = Some("/dev/full".into());
    let (primary, _secondary) = pair(&mut stage);
    let client = client(&mut stage);
    assert!(client.answer_after(0, PATIENCE).is_some());
    assert_eq!(primary.status().unwrap()["protected"], true);
    served(client);
}
