//! Round trips on the control channel while a RAM lane takes all it can get.

use core::time::Duration;
use std::{
    sync::mpsc::{Sender, channel},
    thread,
};

use bytes::Bytes;
use colo_driver_mio::{
    Driver, DriverConfig,
    arbiter::none::NoArbiter,
    guest::fake::{FakeGuest, run},
    record::RecordStore,
};
use colo_proto::{
    error::Misuse,
    id::{Channel, Epoch, Generation, PageRuns, Role},
    machine::{Body, Deadline, Demand, Input, Machine, Output, Sink, Transmit},
    member::{BootId, MacKey, MemberState, VmId},
    stats::Stats,
    status::{ColoMode, ExitReason, FailoverStatus, Mode, Status},
    time::Instant,
    wire::join::Identity,
};
use hdrhistogram::Histogram;

use crate::plain;

const PING: usize = 64;
const ROUNDS: u64 = 5_000;
const REPEATS: usize = 5;
/// Bytes of a plain copy.
const PLAIN: usize = 4 << 30;
/// Guest RAM: more than the processor's caches, so that both copies come from memory.
const PAGES: u32 = 16_384;
/// Pages a message.
const BATCH: u32 = 64;

/// Pings on Control, one at a time, and floods the RAM lane if told to.
struct Pinger {
    role: Role,
    flood: bool,
    dial: Vec<Channel>,
    pings: u32,
    sent_at: Instant,
    now: Instant,
    times: Histogram<u64>,
    done: Option<Sender<(Histogram<u64>, u64)>>,
    flooded: u64,
    next_out: u64,
    next_in: u64,
}

/// The next pages in turn.
fn batch(next: &mut u64) -> PageRuns {
    let first = *next;
    *next = (first + u64::from(BATCH)) % u64::from(PAGES);
    run(first, BATCH)
}

impl Machine for Pinger {
    fn channels(&self) -> Vec<Channel> {
        vec![Channel::Control, Channel::Net, Channel::Ram(0)]
    }

    fn handle_input(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        self.now = now;
        match input {
            Input::Up(Channel::Control) if self.role == Role::Primary => self.pings = 1,
            Input::Bytes(Channel::Control, _) => {
                if self.role == Role::Primary {
                    let nanos = now.since(self.sent_at).as_nanos();
                    self.times.record(u64::try_from(nanos).unwrap()).unwrap();
                    if self.times.len() == ROUNDS
                        && let Some(done) = self.done.take()
                    {
                        done.send((self.times.clone(), self.flooded)).unwrap();
                    }
                }
                self.pings += 1;
            }
            Input::Sent(Channel::Ram(_), bytes) => self.flooded += bytes.get() as u64,
            _ => {}
        }
        Ok(())
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.dial.pop().map(Output::Dial)
    }

    fn poll_transmit(&mut self, channel: Channel, _budget: usize) -> Option<Transmit> {
        match channel {
            Channel::Control if self.pings > 0 => {
                self.pings -= 1;
                self.sent_at = self.now;
                Some(Transmit {
                    head: Bytes::from_static(&[1; PING]),
                    body: Body::Empty,
                })
            }
            Channel::Ram(_) if self.flood => Some(Transmit {
                head: Bytes::from_static(&[2; 32]),
                body: Body::Live(batch(&mut self.next_out)),
            }),
            _ => None,
        }
    }

    fn poll_demand(&mut self, channel: Channel) -> Demand {
        match channel {
            Channel::Control => Demand::Read {
                place: None,
                then: PING,
            },
            Channel::Ram(_) => Demand::Read {
                place: Some(Sink::Cache(batch(&mut self.next_in))),
                then: 32,
            },
            _ => Demand::Pause,
        }
    }

    fn poll_timeout(&self) -> Option<Deadline> {
        None
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }

    fn status(&self) -> Status {
        Status {
            role: self.role,
            unprotected: None,
            protected: false,
            colo_mode: ColoMode::None,
            last_mode: ColoMode::None,
            reason: ExitReason::None,
            failover: FailoverStatus::None,
            mode: Mode::Standby,
            phase: "bench",
            epoch: Epoch(0),
            generation: Generation(0),
            member: MemberState::Idle,
            checkpoint_delay: Duration::ZERO,
            stopped: false,
            replica_valid: false,
        }
    }
}

pub(crate) fn measure() {
    round_trips(false);
    // Alternating, so that what else the host does weighs on both.
    let mut rates: Vec<_> = (0..REPEATS)
        .map(|_| {
            let lane = round_trips(true);
            let plain = plain::copy(PLAIN, (PAGES * 4096) as usize);
            println!("RAM lane {lane:.2} GB/s, plain TCP copy {plain:.2} GB/s");
            (lane / plain * 100.0).round() as u64
        })
        .collect();
    rates.sort_unstable();
    println!(
        "RAM lane of a plain copy: median {} %, all {rates:?}",
        rates[REPEATS / 2]
    );
}

/// Yields the rate of the lane, in GB/s.
fn round_trips(flood: bool) -> f64 {
    let (done, finished) = channel();
    let machine = |role, dial, done| Pinger {
        role,
        flood: flood && role == Role::Primary,
        dial,
        pings: 0,
        sent_at: Instant::ZERO,
        now: Instant::ZERO,
        times: Histogram::new(3).unwrap(),
        done,
        flooded: 0,
        next_out: 0,
        next_in: 0,
    };
    let mut config = config(1);
    config.listen = Some("127.0.0.1:0".parse().unwrap());
    let primary = driver(config, machine(Role::Primary, vec![], Some(done)));
    let mut config = self::config(2);
    config.peer = primary.local();
    let dial = vec![Channel::Ram(0), Channel::Control];
    let secondary = driver(config, machine(Role::Secondary, dial, None));
    let controls = [primary.control(), secondary.control()];
    let threads = [
        thread::spawn(move || primary.run()),
        thread::spawn(move || secondary.run()),
    ];
    let begun = std::time::Instant::now();
    let (times, flooded) = finished.recv().unwrap();
    let lane = flooded as f64 / begun.elapsed().as_secs_f64() / 1e9;
    let us = |q| times.value_at_quantile(q) as f64 / 1e3;
    println!(
        "control round trip, RAM lane {}: p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs, max {:.0} µs",
        if flood {
            format!("full at {lane:.2} GB/s")
        } else {
            "idle".to_owned()
        },
        us(0.5),
        us(0.99),
        us(0.999),
        us(1.0)
    );
    let longest = controls[0].snapshot().unwrap().driver.longest_turn;
    println!("    longest turn of the sending loop: {longest:?}");
    controls.iter().for_each(|control| control.stop());
    threads.into_iter().for_each(|thread| {
        thread.join().unwrap().unwrap();
    });
    lane
}

fn driver(config: DriverConfig, machine: Pinger) -> Driver<Pinger, FakeGuest> {
    let guest = FakeGuest::new(PAGES as usize).0;
    Driver::new(
        config,
        machine,
        guest,
        Box::new(NoArbiter::new()),
        RecordStore::in_memory(),
    )
    .unwrap()
}

fn config(boot: u64) -> DriverConfig {
    DriverConfig::new(Identity {
        vm: VmId([1; 16]),
        boot: BootId(boot),
        key: MacKey([1; 16]),
    })
}
