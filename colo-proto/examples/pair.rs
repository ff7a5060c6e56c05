//! Two hosts in one process tell the story of a failover. `cargo run -p colo-proto --example pair`
//!
//! The guest counts: each count writes one of its 16 pages and is said to a client. The primary is
//! killed; whoever goes on must not have forgotten a number that the client saw.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use colo_proto::{
    config::Config,
    error::{ConfigError, Misuse},
    event::Event,
    id::{Epoch, PageRuns, Slot},
    machine::{Body, Captured, GuestDone, GuestOp, Machine as _, Output, Sink},
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    testing::{Guest, Host, Pair},
    time::Instant,
};

const PAGES: usize = 16;

/// A guest with pages of one number each, and the two areas that every embedder keeps besides: what
/// was captured to be sent, and what has arrived and is not whole yet.
#[derive(Default)]
struct Counter {
    count: u64,
    ram: [u64; PAGES],
    dirty: u64,
    staging: ([u64; PAGES], u64),
    cache: ([u64; PAGES], u64),
    running: bool,
    epoch: Epoch,
    said: VecDeque<(Epoch, Bytes)>,
}

impl Counter {
    fn count(&mut self) {
        if self.running {
            self.count += 1;
            self.ram[self.count as usize % PAGES] = self.count;
            self.dirty |= 1 << (self.count as usize % PAGES);
            let frame = Bytes::copy_from_slice(&self.count.to_be_bytes());
            self.said.push_back((self.epoch, frame));
        }
    }
}

impl Guest for Counter {
    type Contents = Vec<u64>;

    fn operate(&mut self, op: GuestOp) -> GuestDone {
        match &op {
            GuestOp::Pause => self.running = false,
            GuestOp::Resume => self.running = true,
            GuestOp::Capture { epoch, resume, .. } => {
                self.staging = (self.ram, self.count);
                (self.epoch, self.running) = (*epoch, *resume);
                return GuestDone::Captured(Captured::new(*epoch, 8));
            }
            GuestOp::CommitRam { runs, .. } => {
                pages(runs).for_each(|page| self.ram[page] = self.cache.0[page]);
            }
            GuestOp::LoadState { epoch, .. } => (self.epoch, self.count) = (*epoch, self.cache.1),
            _ => {}
        }
        op.done()
    }

    fn dirty(&mut self) -> Vec<(Slot, Vec<u64>)> {
        vec![(Slot(0), vec![std::mem::take(&mut self.dirty)])]
    }

    fn read(&mut self, body: &Body) -> Vec<u64> {
        match body {
            Body::Live(runs) => pages(runs).map(|page| self.ram[page]).collect(),
            Body::Staged(runs) => pages(runs).map(|page| self.staging.0[page]).collect(),
            _ => vec![self.staging.1],
        }
    }

    fn write(&mut self, sink: &Sink, contents: Vec<u64>) {
        let (runs, to) = match sink {
            Sink::Guest(runs) => (runs, &mut self.ram),
            Sink::Cache(runs) => (runs, &mut self.cache.0),
            _ => return self.cache.1 = contents[0],
        };
        pages(runs)
            .zip(contents)
            .for_each(|(page, is)| to[page] = is);
    }

    fn say(&mut self) -> Option<(Epoch, Bytes)> {
        self.said.pop_front()
    }
}

fn pages(runs: &PageRuns) -> impl Iterator<Item = usize> {
    runs.iter()
        .flat_map(|run| run.first as usize..run.end() as usize)
}

fn host(id: u64, start: Start) -> Result<Host<Counter>, ConfigError> {
    let member = MemberConfig::new(VmId([7; 16]), NodeId(3 - id), MacKey([7; 16]));
    let config = Config::builder(NodeId(id), member, &[(Slot(0), PAGES as u64)])
        .longest(Duration::from_millis(20))
        .build()?;
    let node = Node::new(config, start, BootId(id), None, id, Instant::ZERO);
    Ok(Host::new(node, Counter::default()))
}

/// The guests count every five milliseconds and the story is printed, until something is true.
fn until(
    pair: &mut Pair<Counter>,
    seen: &mut u64,
    is: impl Fn(&Pair<Counter>, u64) -> bool,
) -> Result<(), Misuse> {
    while !is(pair, *seen) {
        for at in 0..2 {
            pair.host_mut(at)
                .into_iter()
                .for_each(|host| host.guest.count());
        }
        pair.run(Duration::from_millis(5))?;
        while let Some((at, output)) = pair.report() {
            let what = match output {
                Output::ToWorld { frame, .. } => {
                    *seen += 1;
                    assert_eq!(frame[..], seen.to_be_bytes(), "nothing seen is forgotten");
                    format!("the client sees {seen}")
                }
                Output::Event(Event::Member(_)) | Output::Notify(_) => continue,
                Output::Event(event) => format!("{event:?}"),
                other => format!("{other:?}"),
            };
            println!("{:>14}  {}  {what}", pair.now().to_string(), ["A", "B"][at]);
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let first = host(1, Start::Primary)?;
    let mut pair = Pair::new(first.node().channels(), Instant::ZERO);
    let mut seen = 0;
    pair.start(0, first);
    pair.start(1, host(2, Start::Secondary)?);
    println!("-- A boots the VM, B joins");
    until(&mut pair, &mut seen, |pair, _| {
        pair.host(0).is_some_and(|a| a.node().status().protected)
    })?;
    println!("-- the pair is in step; what A's guest says is held until B has a checkpoint of it");
    let before = seen;
    until(&mut pair, &mut seen, |pair, seen| {
        seen >= before + 8 && pair.host(0).is_some_and(|a| a.guest.count > seen + 1)
    })?;
    let counted = pair.host(0).map_or(0, |a| a.guest.count);
    println!("-- A is killed; its guest had counted to {counted}, the client saw {seen}");
    pair.kill(0)?;
    let before = seen;
    until(&mut pair, &mut seen, |_, seen| seen >= before + 3)?;
    println!("-- B serves; nothing that the client saw was lost");
    Ok(())
}
