//! `colod primary` and `colod secondary`: configuration → machine → loop, until it ends.

use std::{
    collections::BTreeMap,
    fmt::Display,
    fs,
    io::Read as _,
    process::ExitCode,
    sync::{Arc, mpsc::RecvTimeoutError},
    thread,
    time::Duration,
};

use crate::{
    config::{self, ArbiterKind, Config, ModeName, Pair, Purpose, ResumeName},
    control::Hub,
};
use colo_driver_kvm::vm::Vm;
use colo_driver_mio::{
    ControlHandle, Driver, DriverConfig,
    arbiter::{Arbiter, file::FileArbiter, none::NoArbiter},
    clock,
    handle::What,
    heartbeat::PathConfig,
    record::RecordStore,
};
use colo_proto::{
    command::Command,
    config::Config as Protocol,
    event::Event,
    id::Role,
    member::{Arbitration, BootId, MacKey, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    status::{Mode, ResumePolicy},
    wire::{ShapeItem, join::Identity},
};
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::{
    cli::Failure,
    cli::args::DaemonArgs,
    cli::control::server,
    cli::fate::Fate,
    cli::logging,
    cli::operator::LoopOperator,
    cli::progress::Synchronisation,
    cli::report,
    cli::signals,
    kvm::{build, guest, populate},
    observe::{self, Observer},
};

/// How often the progress of a synchronisation is logged.
const EACH: Duration = Duration::from_secs(1);

/// How long a hand-over may take at Ctrl-C before the daemon just ends.
const FAREWELL: Duration = Duration::from_secs(3);

/// How long the guest's side may make no progress before this host gives the VM away.
const HANG: Duration = Duration::from_secs(5);

/// How much longer it may while a checkpoint is taken, and a peer after that.
const HANG_MORE: Duration = Duration::from_secs(3);

/// Runs one host of a pair.
pub(crate) fn run(args: &DaemonArgs, start: Start) -> Result<ExitCode, Failure> {
    if args.die_with_parent {
        set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    let config = Config::load(&args.config.config, Purpose::Pair)?;
    logging::start(&config.log)?;
    let pair = config
        .pair
        .as_ref()
        .ok_or("the configuration has no pair")?;
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    let built = build(&config)?;
    let [boot, entropy] = random()?;
    let boot = BootId(boot);
    let key = key(pair)?;
    let protocol = protocol(&config, pair, key, &built.vm)?;
    let (store, record) = RecordStore::open(&pair.state_dir)?;
    let node = Node::new(protocol, start, boot, record, entropy, clock::now());

    let fate: Arc<Fate> = Arc::default();
    let ending = Arc::clone(&fate);
    // Until the loop hears that this host serves.
    built.console.set_muted(true);
    let memory = built.vm.memory().clone();
    let (guest, orders) = guest(&config, built, move |ended| ending.hear(ended))?;
    if start == Start::Secondary {
        populate(&memory)?;
    }
    let identity = Identity {
        vm: VmId(pair.id.0),
        boot,
        key,
    };
    let driver_config = driver_config(&config, pair, identity);
    let driver = Driver::new(driver_config, node, guest, arbiter(&config), store)?;
    let control = driver.control();
    fate.attach(control.clone());

    // Before there is a socket file that a signal could leave behind.
    let ask = control.clone();
    let interrupt = signals::Interrupt::start(move || farewell(&ask))?;
    let hub = Hub::default();
    let sync = Synchronisation::default();
    let observer = Observer::new();
    let reporter = reporter(&control, &hub, &observer, sync.clone(), Arc::clone(&fate))?;
    let operator = LoopOperator::new(config.vm.name.clone(), control.clone(), sync, orders);
    let web = match config.metrics.listen {
        Some(at) => Some(observe::serve(
            at,
            config.vm.name.clone(),
            observer,
            operator.clone(),
        )?),
        None => None,
    };
    if let Some(web) = &web {
        tracing::info!("metrics and status page on http://{}/", web.local);
    }
    let server = server(&config.control, operator, &hub)?;
    tracing::info!(
        vm = config.vm.name,
        node = pair.node,
        listen = %pair.listen,
        peer = %pair.peer,
        "{}",
        match start {
            Start::Primary => "started as primary",
            Start::Secondary => "started as secondary",
        }
    );
    let ended = driver.run();
    drop(server);
    drop(web);
    drop(control);
    let _panicked = reporter.join();
    let _guest = ended?;
    if let Some(why) = fate.failed() {
        return Err(format!("the guest cannot go on: {why}").into());
    }
    Ok(if interrupt.asked() {
        ExitCode::from(signals::INTERRUPTED)
    } else {
        ExitCode::SUCCESS
    })
}

/// Makes everything that a start makes of a configuration, but takes hold of nothing that a running
/// daemon has: for `colod check`.
pub(crate) fn rehearse(config: &Config) -> Result<(), Failure> {
    let mut config = config.clone();
    // A start may open it; here it would be made.
    config.serial = config::Serial::default();
    let mut built = build(&config)?;
    built.rehearse_boot()?;
    if let Some(pair) = &config.pair {
        protocol(&config, pair, key(pair)?, &built.vm)?;
    }
    Ok(())
}

/// Ctrl-C: the VM goes on at the other host if it can; this process ends either way.
fn farewell(control: &ControlHandle) {
    let primary = control
        .snapshot()
        .is_ok_and(|snapshot| snapshot.status.role == Role::Primary && snapshot.status.protected);
    if primary {
        match control.command(Command::FailOver, FAREWELL) {
            Ok(answer) => tracing::info!(?answer, "asked the peer to take over before ending"),
            Err(error) => tracing::warn!(%error, "ending without a hand-over"),
        }
    }
    control.stop();
}

/// A thread that writes reports to the log and hands them to whoever listens.
fn reporter(
    control: &ControlHandle,
    hub: &Hub,
    observer: &Observer,
    sync: Synchronisation,
    fate: Arc<Fate>,
) -> Result<thread::JoinHandle<()>, Failure> {
    let (first, control, hub) = (control.subscribe()?, control.clone(), hub.clone());
    let observer = observer.clone();
    Ok(thread::Builder::new()
        .name("reports".into())
        .spawn(move || {
            let (mut stream, mut attempts) = (first, report::Attempts::default());
            let sent = || Some(control.snapshot().ok()?.stats.sync_pages);
            loop {
                loop {
                    let wait = if sync.runs() { EACH } else { Duration::MAX };
                    match stream.recv_timeout(wait) {
                        Ok(report) => {
                            let mut told = report::tell(&report.what);
                            attempts.weigh(&mut told);
                            told.log();
                            let event = told.event(&report);
                            hub.publish(&event);
                            observer.heard(&report.what, &event);
                            sync.heard(&report.what, sent);
                            if let What::Machine(Event::Promoted { .. }) = report.what {
                                fate.promoted();
                            }
                        }
                        Err(RecvTimeoutError::Timeout) => {
                            if let Some(progress) = sent().and_then(|sent| sync.progress(sent)) {
                                tracing::info!("{}", progress.line());
                            }
                        }
                        Err(RecvTimeoutError::Disconnected) => break,
                    }
                }
                // The stream ends with the loop, or because this thread fell behind.
                match control.subscribe() {
                    Ok(again) => stream = again,
                    Err(_) => return,
                }
            }
        })?)
}

fn arbiter(config: &Config) -> Box<dyn Arbiter> {
    match (config.arbiter.kind, &config.arbiter.path) {
        (ArbiterKind::File, Some(path)) => {
            let patience = config.member.detection.0 / 3;
            Box::new(FileArbiter::new(
                path.clone(),
                patience.max(Duration::from_millis(50)),
            ))
        }
        _ => Box::new(NoArbiter::new()),
    }
}

fn driver_config(config: &Config, pair: &Pair, identity: Identity) -> DriverConfig {
    let mut driver = DriverConfig::new(identity);
    driver.listen = Some(pair.listen.clone());
    driver.peer = Some(pair.peer.clone());
    driver.paths = pair
        .heartbeat
        .iter()
        .map(|path| PathConfig {
            local: config::Endpoint::Tcp(path.listen),
            peer: config::Endpoint::Tcp(path.peer),
        })
        .collect();
    driver.silence = config.member.detection.0;
    driver
}

fn protocol(config: &Config, pair: &Pair, key: MacKey, vm: &Vm) -> Result<Protocol, Failure> {
    let member = &config.member;
    let detection = member.detection.0;
    let arbitration = match config.arbiter.kind {
        ArbiterKind::File => Arbitration::Arbiter {
            fence_assist: false,
        },
        ArbiterKind::None => Arbitration::None {
            primary_survives: true,
            unsafe_no_arbiter: true,
        },
    };
    let beat = member.beat();
    // Limits in order: silence, a hang, a hang in a checkpoint, a peer that does nothing.
    let hang = detection.max(HANG);
    let members = MemberConfig::new(VmId(pair.id.0), NodeId(u64::from(3 - pair.node)), key)
        .paths(u8::try_from(pair.heartbeat.len())?)
        .autostart(pair.autostart)
        .arbitration(arbitration)
        .interval(beat)
        .lease(member.lease())
        .rtt_max(beat)
        .margin((detection / 12).min(Duration::from_millis(20)))
        .primary_silence(member.primary_silence())
        .secondary_silence(detection)
        .arbiter_attempt((detection * 5 / 12).max(Duration::from_millis(50)))
        .arbiter_typical(detection - member.primary_silence() - beat)
        .stall(detection / 4)
        .hang(hang)
        .hang_in_checkpoint(hang + HANG_MORE)
        .witness_silence((detection * 5 / 6).max(Duration::from_secs(10)))
        .penalty(detection);
    let protection = &config.protection;
    let shape = vm.shape();
    Ok(
        Protocol::builder(NodeId(pair.node.into()), members, &shape.slots)
            .shape(shape_items(config, vm))
            .lanes(pair.ram_lanes)
            .mode(match protection.mode {
                ModeName::Standby => Mode::Standby,
                ModeName::Lockstep => Mode::Lockstep,
            })
            .resume(match protection.resume {
                ResumeName::AfterCapture => ResumePolicy::AfterCapture,
                ResumeName::AfterLoad => ResumePolicy::AfterLoad,
            })
            .longest(protection.longest.0)
            .shortest(protection.shortest.0)
            .compare_timeout(protection.compare_timeout.0)
            .hold_bytes(usize::try_from(protection.hold_bytes.0)?)
            .stall(hang + HANG_MORE * 2)
            .build()?,
    )
}

/// What must be the same on both hosts besides memory.
fn shape_items(config: &Config, vm: &Vm) -> Vec<ShapeItem> {
    let vcpus = item("vcpus", vm.shape().vcpus);
    let disk = item("disk", config.disk.is_some());
    // It may be longer than an item.
    let cmdline = item("vm.cmdline", text_digest(&config.vm.cmdline));
    let net = network(&config.net);
    // Before its leaves, so that a refusal names the key.
    let cpu = item("vm.cpu", vm.cpu().model());
    let items = [vcpus, disk, cmdline, cpu].into_iter().chain(net);
    items
        .chain(processor(vm))
        .chain(registers(&vm.msrs()))
        .collect()
}

/// The registers that a checkpoint carries, 256 numbers an item: a host whose KVM keeps others is
/// told which, and not at the first checkpoint.
fn registers(msrs: &[u32]) -> Vec<ShapeItem> {
    let mut groups: BTreeMap<u32, String> = BTreeMap::new();
    for msr in msrs {
        let group = groups.entry(msr >> 8).or_default();
        *group += &format!("{:02x}", msr & 0xff);
    }
    let item = |(group, numbers)| item(&format!("MSRs {group:#x}.."), numbers);
    groups.into_iter().map(item).collect()
}

/// A text in a few characters: as it is if it is short, else its length and a sum.
fn text_digest(text: &str) -> String {
    if text.len() <= 200 {
        return format!("{text:?}");
    }
    let sum = text.bytes().fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{} bytes, sum {sum:016x}", text.len())
}

/// The network card, one thing an item: a host that differs is told in which, by its key.
fn network(net: &config::Net) -> [ShapeItem; 3] {
    [
        item("network card", net.backend != config::Backend::None),
        item("net.mac", net.mac),
        item("net.offloads", net.offloads()),
    ]
}

fn item(name: &str, value: impl Display) -> ShapeItem {
    ShapeItem {
        name: name.into(),
        value: value.to_string(),
    }
}

/// The processor, leaf by leaf: two hosts that differ are told where.
fn processor(vm: &Vm) -> Vec<ShapeItem> {
    let word = |bytes: &[u8]| {
        bytes
            .iter()
            .rev()
            .fold(0_u32, |all, b| all << 8 | u32::from(*b))
    };
    let leaves = vm.cpu().bytes();
    let leaf = |leaf: &[u8]| {
        let words: Vec<u32> = leaf.chunks(4).map(word).collect();
        let (key, registers) = words.split_at(2);
        let hex = |words: &[u32], by: &str| {
            let all: Vec<String> = words.iter().map(|w| format!("{w:x}")).collect();
            all.join(by)
        };
        ShapeItem {
            name: format!("cpuid 0x{}", hex(key, ".")),
            value: hex(registers, ":"),
        }
    };
    leaves.chunks_exact(24).map(leaf).collect()
}

fn key(pair: &Pair) -> Result<MacKey, Failure> {
    let path = pair.key_file.as_ref().ok_or("pair.key_file is missing")?;
    Ok(config::read_key(path).map_err(|why| format!("pair.key_file {why}"))?)
}

fn random() -> Result<[u64; 2], Failure> {
    let mut bytes = [[0; 8]; 2];
    let mut source = fs::File::open("/dev/urandom")?;
    for word in &mut bytes {
        source.read_exact(word)?;
    }
    Ok(bytes.map(u64::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_told_in_groups_that_fit_an_item() {
        let told = registers(&[0x48, 0x400, 0x401, 0x4b56_4d06]);
        let told: Vec<String> = told
            .iter()
            .map(|i| format!("{} {}", i.name, i.value))
            .collect();
        assert_eq!(
            told,
            ["MSRs 0x0.. 48", "MSRs 0x4.. 0001", "MSRs 0x4b564d.. 06"]
        );
    }

    #[test]
    fn a_card_that_differs_is_told_by_the_key_that_does() {
        let here = config::Net::default();
        let there = config::Net {
            mac: config::Mac([2, 0, 0, 0, 0, 1]),
            ..here.clone()
        };
        let differ: Vec<String> = network(&here)
            .into_iter()
            .zip(network(&there))
            .filter(|(a, b)| a != b)
            .map(|(a, b)| format!("{} {} {}", a.name, a.value, b.value))
            .collect();
        assert_eq!(differ, ["net.mac 52:54:00:c0:10:01 02:00:00:00:00:01"]);
    }
}
