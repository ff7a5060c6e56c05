//! The thread that owns the machine. It takes operations one by one and reports what came of them.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use colo_driver_kvm::{
    checkpoint::{Checkpoint, Passes},
    device::ResetLine,
    vcpu::VcpuEvent,
    vm::Vm,
};
use colo_driver_mio::{Wake, guest::Happened};
use colo_proto::{
    machine::{Captured, GuestDone, GuestOp, GuestOpKind},
    ram::PageSet,
};

use super::build::{Built, Card, Image, Served};
use crate::cli::Failure;

/// Buffers of one checkpoint, shared with the loop, which points the kernel at them.
pub(super) type Kept = Arc<Mutex<Checkpoint>>;

/// Something for the worker.
#[derive(Debug)]
pub(crate) enum Order {
    Do(GuestOp),
    /// A vCPU has something to say, or a device has left requests for later.
    Look,
    /// Write the machine's state to a file; the guest runs on.
    Save(std::path::PathBuf, Sender<Result<(), String>>),
}

/// A way to the worker from any thread.
pub(crate) type Orders = Sender<Order>;

/// Why the guest will not go on by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It shut down or asked for a reset.
    Shutdown,
    /// A vCPU cannot go on.
    Failed(String),
}

/// The loop's end of the worker.
#[derive(Debug)]
pub(super) struct Worker {
    orders: Orders,
    pub(super) happened: Receiver<Happened>,
    pub(super) ended: Receiver<Option<Ended>>,
}

impl Worker {
    pub(super) fn start(
        built: Built,
        outgoing: Kept,
        incoming: Kept,
        (orders, inbox): (Orders, Receiver<Order>),
        wake: Wake,
    ) -> std::io::Result<Self> {
        let (outbox, happened) = channel();
        let (end, ended) = channel();
        let Built {
            vm,
            card,
            served,
            reset,
            image,
            fresh,
            ..
        } = built;
        let dirty = PageSet::new(&vm.shape().slots);
        let mut owner = Owner {
            vm,
            card,
            served,
            reset,
            image,
            outgoing,
            incoming,
            dirty,
            tracking: false,
            fresh,
            outbox,
            end,
        };
        thread::Builder::new().name("vm".into()).spawn(move || {
            for order in inbox {
                owner.carry_out(order);
                wake.wake();
            }
            owner.vm.pause();
        })?;
        Ok(Self {
            orders,
            happened,
            ended,
        })
    }

    pub(super) fn order(&self, order: Order) {
        if self.orders.send(order).is_err() {
            // Only a panic ends it, and a panic ends the process.
            tracing::error!("the machine's thread is gone");
        }
    }
}

struct Owner {
    vm: Vm,
    card: Option<Card>,
    served: Served,
    reset: ResetLine,
    image: Image,
    outgoing: Kept,
    incoming: Kept,
    dirty: PageSet,
    tracking: bool,
    /// Memory holds nothing that could run.
    fresh: bool,
    outbox: Sender<Happened>,
    /// `None`: another guest is here now, or the same at an earlier time.
    end: Sender<Option<Ended>>,
}

impl Owner {
    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Do(op) => {
                let kind = op.kind();
                let done = self
                    .run(op)
                    .unwrap_or_else(|failure| failed(kind, &failure));
                self.tell(Happened::Done(done));
            }
            Order::Look => self.look(),
            Order::Save(path, answer) => {
                let saved = self.save(&path).map_err(|failure| failure.to_string());
                let _gone = answer.send(saved);
            }
        }
    }

    fn run(&mut self, op: GuestOp) -> Result<GuestDone, Failure> {
        match op {
            GuestOp::Pause => {
                self.vm.pause();
                Ok(GuestDone::Paused)
            }
            GuestOp::Resume => {
                if self.fresh {
                    self.image.boot(&mut self.vm)?;
                    self.fresh = false;
                }
                self.vm.resume()?;
                Ok(GuestDone::Resumed)
            }
            GuestOp::Harvest => {
                self.dirty.clear();
                self.track()?;
                self.vm.harvest(&mut self.dirty)?;
                let dirty = std::mem::take(&mut self.dirty);
                self.tell_dirty(&dirty);
                self.dirty = dirty;
                Ok(GuestDone::Harvested)
            }
            GuestOp::Capture {
                epoch,
                also,
                resume,
            } => {
                let kept = Arc::clone(&self.outgoing);
                let mut kept = lock(&kept);
                let (card, mut inputs) = (self.card.clone(), 0);
                let captured =
                    self.vm
                        .capture(&mut kept, &also, resume, Passes::Two, &mut || {
                            if let Some(card) = &card {
                                let mut card = lock(card);
                                card.set_epoch(epoch.0);
                                inputs = card.consumed_inputs();
                            }
                        })?;
                self.tell_dirty(&kept.dirty);
                Ok(GuestDone::Captured(Captured {
                    epoch,
                    state_len: captured.state_len,
                    inputs,
                    pause: captured.times.pause,
                    live: captured.times.pass1,
                }))
            }
            GuestOp::CheckState(epoch) => {
                self.vm.check_state(&lock(&self.incoming).state)?;
                Ok(GuestDone::StateChecked(epoch))
            }
            GuestOp::CommitRam { epoch, runs } => {
                let mut kept = lock(&self.incoming);
                self.vm.commit_ram(&kept.staging, &runs)?;
                kept.staging.clear();
                Ok(GuestDone::RamCommitted(epoch))
            }
            GuestOp::LoadState { epoch, .. } => {
                self.vm.load_state(&lock(&self.incoming).state)?;
                let _gone = self.end.send(None);
                self.fresh = false;
                if let Some(card) = &self.card {
                    lock(card).set_epoch(epoch.0);
                }
                if !self.tracking {
                    // From here on every page that this side writes is known; all others are the
                    // primary's.
                    self.track()?;
                    self.vm.harvest(&mut self.dirty)?;
                }
                Ok(GuestDone::StateLoaded(epoch))
            }
            GuestOp::Replication(op) => Ok(GuestDone::Replication(op)),
            other => Err(format!("{other:?} is not known here").into()),
        }
    }

    fn track(&mut self) -> Result<(), Failure> {
        if !self.tracking {
            self.vm.start_tracking()?;
            self.tracking = true;
        }
        Ok(())
    }

    fn save(&mut self, path: &std::path::Path) -> Result<(), Failure> {
        let was_running = self.vm.running();
        let saved = self.vm.save(path);
        if was_running {
            self.vm.resume()?;
        }
        Ok(saved?)
    }

    fn look(&mut self) {
        for event in self.vm.take_events() {
            let ended = match event {
                VcpuEvent::Shutdown { .. } => Ended::Shutdown,
                VcpuEvent::Failed { vcpu, why } => Ended::Failed(format!("vCPU {vcpu}: {why}")),
                other => Ended::Failed(format!("{other:?}")),
            };
            let _gone = self.end.send(Some(ended));
        }
        if self.reset.take() {
            let _gone = self.end.send(Some(Ended::Shutdown));
        }
        // Nothing while the machine is paused: its resume looks into every ring.
        self.served.serve();
    }

    fn tell_dirty(&self, set: &PageSet) {
        for (slot, _) in set.slots() {
            if let Some(words) = set.words(slot) {
                self.tell(Happened::Dirty(slot, words.to_vec()));
            }
        }
    }

    fn tell(&self, happened: Happened) {
        // The loop has ended: so will this thread.
        let _gone = self.outbox.send(happened);
    }
}

fn failed(op: GuestOpKind, failure: &Failure) -> GuestDone {
    GuestDone::Failed {
        op,
        why: failure.to_string(),
    }
}

pub(super) fn lock<T: ?Sized>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
