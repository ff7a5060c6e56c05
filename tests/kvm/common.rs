//! What every behaviour needs: the binary, a stage, a client.

use std::{
    env,
    path::PathBuf,
    process::Command,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use colod::{
    config::{Mac, Span},
    demo::{Client, Daemon, Host, Plan, Report, Settings, Stage},
};

/// How long anything may take before a test gives up on it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the tests can run here; says why not, and panics where they must.
fn kvm() -> bool {
    let here = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    let Err(error) = here else { return true };
    skip("kvm", &format!("/dev/kvm cannot be used: {error}"));
    false
}

/// Says why a test is skipped that needs `what`, and panics where it must not be.
pub(crate) fn skip(what: &str, why: &str) {
    let required = env::var("COLO_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|required| required == what),
        "COLO_REQUIRE names {what}, but {why}"
    );
    println!("SKIPPED: {why}");
}

/// One pair at a time: they share two processors with whatever else runs here. `None` where no pair
/// can run.
pub(crate) fn alone() -> Option<MutexGuard<'static, ()>> {
    static ALONE: Mutex<()> = Mutex::new(());
    kvm().then(|| ALONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The daemon, built once: a test of another package does not get it from cargo by itself.
pub(crate) fn colod() -> &'static PathBuf {
    static COLOD: OnceLock<PathBuf> = OnceLock::new();
    COLOD.get_or_init(|| {
        let test = env::current_exe().unwrap();
        let profile = test.parent().unwrap().parent().unwrap();
        let release = profile.ends_with("release");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "colod", "--bin", "colod"]);
        if release {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "colod does not build");
        profile.join("colod")
    })
}

/// Settings that make faults quick to watch.
pub(crate) fn settings() -> Settings {
    let mut settings = Settings::demo();
    settings.member.detection = Span::from_millis(300);
    settings.protection.longest = Span::from_millis(20);
    // Besides serving it writes pages, and checks that each is what it last wrote there.
    settings.vm.cmdline = "pages=64 period_us=5000 ws=2048".into();
    settings
}

pub(crate) fn stage() -> Stage {
    Stage::new(colod(), settings()).unwrap()
}

/// A client with a plan of its own.
pub(crate) fn client(stage: &mut Stage) -> Client {
    let plan = plan(stage);
    Client::start(&stage.switch_path(), plan).unwrap()
}

/// What a client does.
pub(crate) fn plan(stage: &mut Stage) -> Plan {
    Plan {
        mac: Mac([0x02, 0xc0, 0x10, 0, 0, 2]),
        address: [10, 0, 2, 2].into(),
        guest: stage.settings().guest,
        port: 80,
        pause: Duration::from_millis(1),
        counter_only: false,
    }
}

/// Both daemons, protected.
pub(crate) fn pair(stage: &mut Stage) -> (Daemon, Daemon) {
    let primary = stage.start(Host::A, "primary").unwrap();
    let secondary = stage.start(Host::B, "secondary").unwrap();
    expect(&primary, "PROTECTED", 0);
    (primary, secondary)
}

/// Waits for an event after the first `skip`, or shows the daemon's log.
pub(crate) fn expect(daemon: &Daemon, event: &str, skip: usize) -> serde_json::Value {
    daemon.wait_for(event, skip, PATIENCE).unwrap_or_else(|| {
        panic!(
            "no {event}; the log of {}:\n{}",
            daemon.host().name(),
            daemon.log()
        )
    })
}

/// The client was served as if nothing had happened.
pub(crate) fn served(client: Client) -> Report {
    let report = client.finish(PATIENCE);
    assert_eq!(report.fault, None);
    assert!(!report.waiting, "the last request was not answered");
    report
}

/// The client got an answer to something asked after `since`, or shows why not.
pub(crate) fn answered(client: &Client, since: u64, server: &Daemon) {
    assert!(
        client.answer_after(since, PATIENCE).is_some(),
        "no answer; {:?}; {} says:\n{}",
        client.fault(),
        server.host().name(),
        server.log()
    );
}

/// The guest found every page as it had left it, on whichever host it ran.
pub(crate) fn memory_held(stage: &Stage) {
    let mut checked = 0;
    for host in [Host::A, Host::B] {
        let log = stage.directory().join(host.name()).join("serial.log");
        let said = std::fs::read_to_string(log).unwrap_or_default();
        assert!(!said.contains("CORRUPT"), "{said}");
        for line in said.lines().filter(|line| line.contains("errors=")) {
            assert!(line.ends_with("errors=0"), "{line}");
            checked += 1;
        }
    }
    assert!(checked > 0, "the guest never said what it found");
}

/// Each process spoke for the guest's address in one stretch: nobody was heard after another had
/// taken over.
pub(crate) fn one_voice_at_a_time(stage: &mut Stage) {
    let mac = stage.settings().mac;
    let speakers = stage.switch().speakers(mac);
    let mut seen = std::collections::BTreeSet::new();
    for pid in &speakers {
        assert!(
            seen.insert(pid),
            "{pid} spoke again after others: {speakers:?}"
        );
    }
}
