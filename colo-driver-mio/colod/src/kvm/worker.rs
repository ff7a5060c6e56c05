//! The thread that owns the machine: it serves the loop's orders and the operator's, and looks at
//! what vCPUs and devices have left for it.

use std::{
    os::fd::{AsRawFd as _, RawFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread,
};

use colo_driver_kvm::{
    device::{PowerLine, PowerRequest, ResetLine},
    memory::Memory,
    vcpu::VcpuEvent,
    vm::Vm,
};
use colo_driver_mio::{
    Wake,
    embed::{self, Vm as _},
};
use colo_proto::{id::Role, machine::ReplicationOp, ram::PageSet};
use mio::{Events, Interest, Poll, Token, unix::SourceFd};

use super::build::{Built, Image, Served};
use crate::{cli::Failure, config::Then};

const LOOP: Token = Token(0);
const OPERATOR: Token = Token(1);
/// vCPUs that have something to say, devices with requests left.
const LOOK: Token = Token(2);

/// Something for the worker that is not the loop's business.
#[derive(Debug)]
pub(crate) enum Order {
    Pause,
    Resume,
    /// Write the machine's state to a file; the guest runs on.
    Save(PathBuf, Sender<Result<(), String>>),
    /// Press the power button. The answer is whether the guest listens to it.
    PowerButton(Sender<bool>),
}

/// A way to the worker from any thread.
#[derive(Clone, Debug)]
pub(crate) struct Orders {
    orders: Sender<Order>,
    bell: Wake,
}

impl Orders {
    /// Gives an order; `false` when the machine has ended.
    pub(crate) fn give(&self, order: Order) -> bool {
        let given = self.orders.send(order).is_ok();
        self.bell.wake();
        given
    }
}

/// Why the guest will not go on by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It switched itself off.
    PowerOff,
    /// It asked for a reset, which the configuration does not grant.
    Reset,
    /// A processor gave up (triple fault), and the configuration does not reset it.
    Crashed,
    /// A vCPU cannot go on.
    Failed(String),
}

/// Starts the thread. `on_end` is told when the guest will not go on, and `None` when another state
/// has been loaded in its place.
pub(super) fn start(
    built: Built,
    orders: embed::Orders<Memory>,
    on_end: impl FnMut(Option<Ended>) + Send + 'static,
) -> Result<Orders, Failure> {
    let poll = Poll::new()?;
    let bell = Wake::new(poll.registry(), OPERATOR)?;
    let loops = orders.descriptor();
    let looks: Vec<RawFd> = built
        .served
        .fds()
        .chain([built.vm.event_fd().as_raw_fd()])
        .collect();
    for (token, fd) in [(LOOP, loops)]
        .into_iter()
        .chain(looks.into_iter().map(|fd| (LOOK, fd)))
    {
        poll.registry()
            .register(&mut SourceFd(&fd), token, Interest::READABLE)?;
    }
    let (ordering, inbox) = channel();
    let owner = Owner {
        vm: built.vm,
        served: built.served,
        reset: built.reset,
        power: built.power,
        on_reboot: built.on_reboot,
        on_crash: built.on_crash,
        image: built.image,
        tracking: false,
        fresh: built.fresh,
        on_end: Box::new(on_end),
    };
    thread::Builder::new()
        .name("vm".into())
        .spawn(move || owner.run(poll, orders, &inbox))?;
    Ok(Orders {
        orders: ordering,
        bell,
    })
}

struct Owner {
    vm: Vm,
    served: Served,
    reset: ResetLine,
    power: PowerLine,
    on_reboot: Then,
    on_crash: Then,
    image: Image,
    tracking: bool,
    /// Memory holds nothing that could run.
    fresh: bool,
    /// `None`: another guest is here now, or the same at an earlier time.
    on_end: Box<dyn FnMut(Option<Ended>) + Send>,
}

impl Owner {
    /// Until the loop has ended.
    fn run(mut self, mut poll: Poll, mut orders: embed::Orders<Memory>, inbox: &Receiver<Order>) {
        let mut events = Events::with_capacity(8);
        loop {
            if let Err(error) = poll.poll(&mut events, None)
                && error.kind() != std::io::ErrorKind::Interrupted
            {
                tracing::error!(%error, "the machine's thread cannot wait any more");
                break;
            }
            for event in &events {
                match event.token() {
                    LOOP => {
                        if !orders.serve(&mut self) {
                            self.vm.pause();
                            return;
                        }
                    }
                    OPERATOR => self.obey(inbox),
                    _ => self.look(),
                }
            }
        }
        self.vm.pause();
    }

    fn obey(&mut self, inbox: &Receiver<Order>) {
        loop {
            let done = match inbox.try_recv() {
                Ok(Order::Pause) => self.pause(),
                Ok(Order::Resume) => self.boot_or_go_on(),
                Ok(Order::Save(path, answer)) => {
                    let saved = self.write(&path).map_err(|failure| failure.to_string());
                    let _gone = answer.send(saved);
                    Ok(())
                }
                Ok(Order::PowerButton(answer)) => {
                    let listens = lock(self.vm.power()).press();
                    let _gone = answer.send(listens);
                    Ok(())
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            };
            if let Err(failure) = done {
                (self.on_end)(Some(Ended::Failed(failure.to_string())));
            }
        }
    }

    fn boot_or_go_on(&mut self) -> Result<(), Failure> {
        if self.fresh {
            self.image.boot(&mut self.vm)?;
            self.fresh = false;
        }
        Ok(self.vm.resume()?)
    }

    fn track(&mut self) -> Result<(), Failure> {
        if !self.tracking {
            self.vm.start_tracking()?;
            self.tracking = true;
        }
        Ok(())
    }

    fn write(&mut self, path: &std::path::Path) -> Result<(), Failure> {
        let was_running = self.vm.running();
        let saved = self.vm.save(path);
        if was_running {
            self.vm.resume()?;
        }
        Ok(saved?)
    }

    fn look(&mut self) {
        for event in self.vm.take_events() {
            let why = match event {
                // The power line says it too, and is part of the checkpoint.
                VcpuEvent::Shutdown { .. } => continue,
                VcpuEvent::Failed { vcpu, why } => format!("vCPU {vcpu}: {why}"),
                other => format!("{other:?}"),
            };
            (self.on_end)(Some(Ended::Failed(why)));
        }
        let reset = self.reset.take();
        let ended = match self.power.take() {
            Some(PowerRequest::Off) => Some(Ended::PowerOff),
            Some(PowerRequest::Crash) => self.again(self.on_crash, Ended::Crashed),
            None if reset => self.again(self.on_reboot, Ended::Reset),
            None => None,
        };
        if ended.is_some() {
            (self.on_end)(ended);
        }
        // Nothing while the machine is paused: its resume looks into every ring.
        self.served.serve();
    }

    /// Lets the guest boot again, if that is wanted. What the kernel and the tables overwrite is dirty like any
    /// other page: the next checkpoint carries it, and protection goes on.
    fn again(&mut self, then: Then, ended: Ended) -> Option<Ended> {
        if then == Then::End {
            return Some(ended);
        }
        tracing::info!(why = ?ended, "the guest boots again");
        let was_running = self.vm.running();
        let started = self.start_anew().and_then(|()| {
            if was_running {
                self.vm.resume()?;
            }
            Ok(())
        });
        let error = started.err()?;
        Some(Ended::Failed(format!("reset: {error}")))
    }

    fn start_anew(&mut self) -> Result<(), Failure> {
        self.vm.reset()?;
        self.image.boot(&mut self.vm)
    }
}

impl embed::Vm for Owner {
    type Error = Failure;

    fn pause(&mut self) -> Result<(), Failure> {
        self.vm.pause();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Failure> {
        let resumed = self.boot_or_go_on();
        if let Err(failure) = &resumed {
            // Nobody will try again: where the guest is the VM, the daemon ends with this.
            (self.on_end)(Some(Ended::Failed(failure.to_string())));
        }
        resumed
    }

    fn replicate(&mut self, op: ReplicationOp) -> Result<(), Failure> {
        let Some(disk) = self.served.image() else {
            return Ok(());
        };
        match op {
            // All of it is about to be written.
            ReplicationOp::Start(Role::Secondary) => disk.forget_failure(),
            // What the guest flushed at the primary was only written here.
            ReplicationOp::Stop { .. } if disk.has_unflushed() => disk.flush()?,
            _ => {}
        }
        Ok(())
    }

    fn running(&self) -> bool {
        self.vm.running()
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), Failure> {
        self.track()?;
        Ok(self.vm.harvest(dirty)?)
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), Failure> {
        Ok(self.vm.save_state(state)?)
    }

    fn check(&mut self, state: &[u8]) -> Result<(), Failure> {
        Ok(self.vm.check_state(state)?)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        self.vm.load_state(state)?;
        (self.on_end)(None);
        self.fresh = false;
        Ok(())
    }
}

pub(super) fn lock<T: ?Sized>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The card's port, or none.
pub(super) fn port(card: Option<&super::build::Card>) -> Arc<dyn embed::Port> {
    match card {
        Some(card) => Arc::new(super::outside::CardPort(Arc::clone(card))),
        None => Arc::new(embed::NoCard),
    }
}
