//! The story of the demo. Each step waits for what the daemons and the client really report.

use std::{
    net::Ipv4Addr,
    path::PathBuf,
    time::{Duration, Instant},
};

use crate::{
    config::{Mac, ModeName, Size, Span},
    demo::{Answered, Client, Daemon, Host, Plan, Report, Settings, Stage, Wires, now},
};
use serde_json::{Value, json};

use super::timeline::{Timeline, millis, percentile};
use crate::{
    cli::Failure,
    cli::args::{DemoArgs, DemoMode, Kill},
    cli::say::complain,
    cli::signals::Interrupt,
};

/// How long a step may take before the demo gives up and says which.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a wait looks at Ctrl-C and at the daemons' health.
const LOOK: Duration = Duration::from_millis(50);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const CLIENT_MAC: Mac = Mac([0x02, 0xc0, 0x10, 0, 0, 2]);

/// Tells the whole story; whether the client was served as if nothing had happened.
pub(super) fn tell(args: &DemoArgs, interrupt: &Interrupt) -> Result<bool, Failure> {
    let wires = args.tap.then(Wires::lay).transpose()?;
    let (exe, mut settings) = (std::env::current_exe()?, settings(args)?);
    let mut stage = match &wires {
        None => Stage::new(&exe, settings)?,
        Some(wires) => {
            settings.taps = Some(wires.taps());
            Stage::at(&exe, settings, wires.sites())?
        }
    };
    if args.keep {
        let directory = stage.keep().display().to_string();
        complain(format_args!("configurations and logs: {directory}"));
    }
    let mut story = Story {
        args,
        interrupt,
        line: Timeline::new(args.json),
        client: None,
    };
    let primary = story.start(&mut stage, Host::A, "primary")?;
    let secondary = story.start(&mut stage, Host::B, "secondary")?;
    let mut pair = Pair { primary, secondary };
    story.protected(&mut pair, 0)?;
    if args.kernel.is_none() {
        let plan = story.plan(&mut stage);
        story.client = Some(match &wires {
            None => Client::start(&stage.switch_path(), plan)?,
            Some(wires) => Client::start_in(&wires.namespace(), plan)?,
        });
    }
    story.work(&mut pair)?;
    pair = match args.kill {
        Kill::None => pair,
        Kill::Primary => story.kill_primary(&mut stage, pair)?,
        Kill::Secondary => story.kill_secondary(&mut stage, pair)?,
    };
    if args.kill != Kill::None {
        story.work(&mut pair)?;
    }
    story.end(&mut pair)
}

fn settings(args: &DemoArgs) -> Result<Settings, Failure> {
    let mut settings = Settings::demo();
    if let Some(kernel) = &args.kernel {
        settings.vm.kernel = std::path::absolute(kernel)?;
        settings.vm.cmdline.clone_from(&args.cmdline);
        settings.vm.initrd = args.initrd.as_ref().map(std::path::absolute).transpose()?;
        for path in [Some(&settings.vm.kernel), settings.vm.initrd.as_ref()] {
            readable(path)?;
        }
    }
    settings.vm.memory = Size::mib(args.memory.into());
    settings.protection.mode = match args.mode {
        DemoMode::Standby => ModeName::Standby,
        DemoMode::Lockstep => ModeName::Lockstep,
    };
    settings.member.detection = Span::from_millis(args.detection.into());
    let longest = Span::from_millis(args.interval.into());
    settings.protection.longest = longest;
    settings.protection.shortest = settings.protection.shortest.min(longest);
    Ok(settings)
}

fn readable(path: Option<&PathBuf>) -> Result<(), Failure> {
    match path.map(|path| (path, std::fs::File::open(path))) {
        Some((path, Err(error))) => Err(format!("{}: {error}", path.display()).into()),
        _ => Ok(()),
    }
}

struct Pair {
    primary: Daemon,
    secondary: Daemon,
}

struct Story<'a> {
    args: &'a DemoArgs,
    interrupt: &'a Interrupt,
    line: Timeline,
    client: Option<Client>,
}

impl Story<'_> {
    fn plan(&self, stage: &mut Stage) -> Plan {
        Plan {
            mac: CLIENT_MAC,
            address: CLIENT,
            guest: stage.settings().guest,
            port: 80,
            pause: Duration::from_millis(2),
            counter_only: false,
        }
    }

    fn start(&self, stage: &mut Stage, host: Host, role: &str) -> Result<Daemon, Failure> {
        let daemon = stage.start(host, role)?;
        let text = format!("started as {role}, process {}", daemon.pid());
        let data = json!({ "role": role, "pid": daemon.pid() });
        self.line.tell(now(), host.name(), "started", &text, data)?;
        Ok(daemon)
    }

    /// Waits until the pair is protected.
    fn protected(&mut self, pair: &mut Pair, skip: usize) -> Result<(), Failure> {
        let start = Instant::now();
        self.line.busy("synchronising");
        let event = loop {
            let found = pair.primary.wait_for("PROTECTED", skip, LOOK);
            if let Some(event) = found {
                break event;
            }
            self.look(pair, start, "the pair to be protected")?;
            let events = pair.primary.events();
            if let Some(sync) = events
                .iter()
                .skip(skip)
                .rfind(|event| event["event"] == "SYNCHRONISING")
            {
                self.line
                    .note(synchronising(&sync["data"], start.elapsed()));
            }
        };
        self.line.idle();
        let name = pair.primary.host().name();
        let (data, took) = (&event["data"], start.elapsed());
        let text = format!(
            "protected: {} mode, epoch {}, {:.0} ms after the start of {}",
            word(&data["mode"]),
            data["epoch"],
            took.as_secs_f64() * 1e3,
            pair.secondary.host().name()
        );
        self.line
            .tell(at(&event), name, "protected", &text, data.clone())?;
        Ok(())
    }

    /// Lets the client work for as long as was asked for, then sums up.
    fn work(&mut self, pair: &mut Pair) -> Result<(), Failure> {
        if let Some(client) = &self.client
            && client.report().connected.is_none()
        {
            let start = Instant::now();
            self.line.busy("waiting for the guest to answer");
            while client.answer_after(0, LOOK).is_none() {
                fault(client)?;
                self.look(pair, start, "the guest's first answer")?;
            }
            self.line.idle();
            let text = "connected to the guest; works over this one connection from here on";
            let at = client.report().connected.unwrap_or_default();
            self.line.tell(at, "client", "connected", text, json!({}))?;
        }
        let (start, first) = (Instant::now(), pair.primary.events().len());
        let from = now();
        self.line.busy("the client works");
        while start.elapsed() < Duration::from_secs(self.args.seconds.into()) {
            std::thread::sleep(LOOK);
            self.alive(pair)?;
            if let Some(client) = &self.client {
                fault(client)?;
                let (answers, counter) = client.progress();
                self.line.note(format!(
                    "{answers} answers, the guest's counter is {}",
                    counter.unwrap_or_default()
                ));
            }
        }
        self.line.idle();
        self.checkpoints(&pair.primary, first)?;
        self.answers(from)
    }

    fn checkpoints(&self, primary: &Daemon, first: usize) -> Result<(), Failure> {
        let events = primary.events();
        let pauses = events
            .iter()
            .skip(first)
            .filter(|event| event["event"] == "CHECKPOINTED")
            .filter_map(|event| event["data"]["pause_us"].as_u64());
        let mut pauses: Vec<u64> = pauses.collect();
        pauses.sort_unstable();
        let (median, p99) = (percentile(&pauses, 50), percentile(&pauses, 99));
        let longest = pauses.last().copied().unwrap_or_default();
        let text = format!(
            "{} checkpoints; the guest stood still for {:.2} ms (median), {:.2} ms (99 of 100), {:.2} ms (longest)",
            pauses.len(),
            median as f64 / 1e3,
            p99 as f64 / 1e3,
            longest as f64 / 1e3,
        );
        let data = json!({
            "checkpoints": pauses.len(),
            "pause_us": { "median": median, "p99": p99, "max": longest },
        });
        self.line
            .tell(now(), primary.host().name(), "checkpoints", &text, data)?;
        Ok(())
    }

    fn answers(&self, from: u64) -> Result<(), Failure> {
        let Some(client) = &self.client else {
            return Ok(());
        };
        let answers = client.report().answers;
        let answers = answers.iter().filter(|answer| answer.asked >= from);
        let (mut latencies, mut bytes) = (Vec::new(), 0);
        for answer in answers {
            latencies.push(answer.whole - answer.asked);
            bytes += answer.bytes;
        }
        latencies.sort_unstable();
        let (median, p99) = (percentile(&latencies, 50), percentile(&latencies, 99));
        let (_, counter) = client.progress();
        let text = format!(
            "{} answers, {bytes} bytes, every one right; the counter is {}; latency {:.1} ms (median), {:.1} ms (99 of 100)",
            latencies.len(),
            counter.unwrap_or_default(),
            millis(median),
            millis(p99),
        );
        let data = json!({
            "answers": latencies.len(),
            "bytes": bytes,
            "counter": counter,
            "latency_ms": { "median": millis(median), "p99": millis(p99) },
        });
        self.line.tell(now(), "client", "answers", &text, data)?;
        Ok(())
    }

    fn kill_primary(&mut self, stage: &mut Stage, pair: Pair) -> Result<Pair, Failure> {
        let Pair {
            mut primary,
            secondary,
        } = pair;
        let (dead, dead_pid) = (primary.host(), primary.pid());
        let seen = secondary.events().len();
        let killed = now();
        primary.kill()?;
        drop(primary);
        let text = format!("kill -9 {dead_pid}: the primary is dead");
        self.line.tell(
            killed,
            dead.name(),
            "killed",
            &text,
            json!({ "pid": dead_pid }),
        )?;
        let mut survivor = secondary;
        let promoted = self.wait(&mut survivor, "PROMOTED", seen, "the takeover")?;
        if let Some(silence) = survivor.wait_for("SUSPECTED", seen, Duration::ZERO) {
            let text = format!(
                "noticed the silence {} after the kill",
                after(killed, at(&silence))
            );
            self.line.tell(
                at(&silence),
                survivor.host().name(),
                "suspected",
                &text,
                json!({}),
            )?;
        }
        let (generation, epoch) = (&promoted["data"]["generation"], &promoted["data"]["epoch"]);
        let text = format!(
            "took over {} after the kill: generation {generation}, from epoch {epoch}",
            after(killed, at(&promoted)),
        );
        let data = json!({
            "after_kill_ms": millis(at(&promoted).saturating_sub(killed)),
            "generation": generation,
            "epoch": epoch,
        });
        self.line.tell(
            at(&promoted),
            survivor.host().name(),
            "promoted",
            &text,
            data,
        )?;
        self.first_signs(stage, &mut survivor, killed)?;
        let before = survivor.events().len();
        let secondary = self.start(stage, dead, "secondary")?;
        let mut pair = Pair {
            primary: survivor,
            secondary,
        };
        self.protected(&mut pair, before)?;
        Ok(pair)
    }

    /// The first frame and the first answer that the survivor's guest gave.
    fn first_signs(
        &self,
        stage: &mut Stage,
        survivor: &mut Daemon,
        killed: u64,
    ) -> Result<(), Failure> {
        if stage.settings_now().taps.is_some() {
            // Nobody listens on the bridge but the client.
            return self.first_answer(survivor, killed, killed);
        }
        let mac = stage.settings().mac;
        let pid = survivor.pid();
        let start = Instant::now();
        let first = loop {
            let sightings = stage.switch().sightings();
            let mut seen = sightings.iter();
            if let Some(seen) = seen.find(|s| s.mac == mac && s.pid == pid && s.at > killed) {
                break seen.at;
            }
            if start.elapsed() > PATIENCE {
                return Err("the survivor's guest was not heard".into());
            }
            self.healthy(survivor)?;
            std::thread::sleep(Duration::from_millis(1));
        };
        let name = survivor.host().name();
        let text = format!(
            "its first byte is on the network, {} after the kill",
            after(killed, first)
        );
        let data = json!({ "after_kill_ms": millis(first - killed) });
        self.line.tell(first, name, "first_byte", &text, data)?;
        self.first_answer(survivor, killed, first)
    }

    fn first_answer(&self, survivor: &mut Daemon, killed: u64, since: u64) -> Result<(), Failure> {
        let Some(client) = &self.client else {
            return Ok(());
        };
        let answer = self.answer(client, survivor, since)?;
        let text = format!(
            "first answer {} after the kill, over the same connection",
            after(killed, answer.first_byte)
        );
        let data = json!({ "after_kill_ms": millis(answer.first_byte - killed) });
        self.line
            .tell(answer.first_byte, "client", "first_answer", &text, data)?;
        Ok(())
    }

    fn answer(
        &self,
        client: &Client,
        survivor: &mut Daemon,
        since: u64,
    ) -> Result<Answered, Failure> {
        let start = Instant::now();
        loop {
            if let Some(answer) = client.answer_after(since, LOOK) {
                return Ok(answer);
            }
            fault(client)?;
            self.healthy(survivor)?;
            if start.elapsed() > PATIENCE {
                return Err("the client was not answered after the takeover".into());
            }
        }
    }

    fn kill_secondary(&mut self, stage: &mut Stage, pair: Pair) -> Result<Pair, Failure> {
        let Pair {
            mut primary,
            mut secondary,
        } = pair;
        let (dead, dead_pid) = (secondary.host(), secondary.pid());
        let seen = primary.events().len();
        let killed = now();
        secondary.kill()?;
        drop(secondary);
        let text = format!("kill -9 {dead_pid}: the secondary is dead");
        self.line.tell(
            killed,
            dead.name(),
            "killed",
            &text,
            json!({ "pid": dead_pid }),
        )?;
        let alone = self.wait(
            &mut primary,
            "UNPROTECTED",
            seen,
            "the primary to go on alone",
        )?;
        let text = format!(
            "goes on alone {} after the kill: generation {}",
            after(killed, at(&alone)),
            alone["data"]["generation"]
        );
        let data = json!({ "after_kill_ms": millis(at(&alone).saturating_sub(killed)) });
        self.line.tell(
            at(&alone),
            primary.host().name(),
            "unprotected",
            &text,
            data,
        )?;
        if let Some(client) = &self.client {
            let answer = self.answer(client, &mut primary, at(&alone))?;
            let text = format!(
                "next answer {} after the kill",
                after(killed, answer.first_byte)
            );
            let data = json!({ "after_kill_ms": millis(answer.first_byte - killed) });
            self.line
                .tell(answer.first_byte, "client", "first_answer", &text, data)?;
        }
        let before = primary.events().len();
        let secondary = self.start(stage, dead, "secondary")?;
        let mut pair = Pair { primary, secondary };
        self.protected(&mut pair, before)?;
        Ok(pair)
    }

    /// The verdict.
    fn end(&mut self, pair: &mut Pair) -> Result<bool, Failure> {
        self.alive(pair)?;
        let Some(client) = self.client.take() else {
            self.line.tell(
                now(),
                "demo",
                "verdict",
                "the VM is protected again",
                json!({ "good": true }),
            )?;
            return Ok(true);
        };
        let Report {
            answers,
            fault,
            waiting,
            ..
        } = client.finish(PATIENCE);
        let bytes: usize = answers.iter().map(|answer| answer.bytes).sum();
        let silence = answers
            .windows(2)
            .filter_map(|pair| match pair {
                [a, b] => Some(b.first_byte.saturating_sub(a.whole)),
                _ => None,
            })
            .max()
            .unwrap_or_default();
        let good = fault.is_none() && !waiting;
        let text = match &fault {
            None if good => format!(
                "good: {} answers and {bytes} bytes over one connection, none lost, repeated or reset; longest silence {:.0} ms",
                answers.len(),
                millis(silence)
            ),
            None => "bad: the last request was not answered".into(),
            Some(fault) => format!("bad: {fault}"),
        };
        let data = json!({
            "good": good,
            "answers": answers.len(),
            "bytes": bytes,
            "longest_silence_ms": millis(silence),
            "fault": fault.map(|fault| fault.to_string()),
        });
        self.line.tell(now(), "demo", "verdict", &text, data)?;
        Ok(good)
    }

    fn wait(
        &mut self,
        daemon: &mut Daemon,
        event: &str,
        skip: usize,
        what: &str,
    ) -> Result<Value, Failure> {
        let start = Instant::now();
        loop {
            if let Some(event) = daemon.wait_for(event, skip, LOOK) {
                return Ok(event);
            }
            self.healthy(daemon)?;
            if start.elapsed() > PATIENCE {
                return Err(format!("waited {PATIENCE:?} for {what}\n{}", daemon.log()).into());
            }
        }
    }

    fn look(&self, pair: &mut Pair, start: Instant, what: &str) -> Result<(), Failure> {
        self.alive(pair)?;
        if start.elapsed() > PATIENCE {
            return Err(format!(
                "waited {PATIENCE:?} for {what}; {}: {}; {}: {}",
                pair.primary.host().name(),
                last(&pair.primary),
                pair.secondary.host().name(),
                last(&pair.secondary)
            )
            .into());
        }
        Ok(())
    }

    fn alive(&self, pair: &mut Pair) -> Result<(), Failure> {
        self.healthy(&mut pair.primary)?;
        self.healthy(&mut pair.secondary)
    }

    fn healthy(&self, daemon: &mut Daemon) -> Result<(), Failure> {
        if self.interrupt.asked() {
            return Err("interrupted".into());
        }
        match daemon.obituary() {
            Some(obituary) => Err(obituary.into()),
            None => Ok(()),
        }
    }
}

fn last(daemon: &Daemon) -> String {
    daemon.log().lines().last().unwrap_or("silent").to_owned()
}

fn fault(client: &Client) -> Result<(), Failure> {
    match client.fault() {
        Some(fault) => Err(format!("the client saw what must never happen: {fault}").into()),
        None => Ok(()),
    }
}

fn synchronising(data: &Value, so_far: Duration) -> String {
    let (pages, sent) = (
        data["pages"].as_u64().unwrap_or_default(),
        data["sent"].as_u64().unwrap_or_default(),
    );
    let rate = sent as f64 * 4096.0 / so_far.as_secs_f64().max(1e-3);
    let left = pages.saturating_sub(sent) as f64 * 4096.0 / rate.max(1.0);
    format!(
        "synchronising: round {}, {sent} of {pages} pages, {:.0} MB/s, {left:.1} s left",
        data["round"],
        rate / 1e6
    )
}

/// When an event happened, in nanoseconds since the host started.
fn at(event: &Value) -> u64 {
    event["at"].as_u64().unwrap_or_default()
}

fn after(start: u64, end: u64) -> String {
    format!("{:.1} ms", millis(end.saturating_sub(start)))
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}
