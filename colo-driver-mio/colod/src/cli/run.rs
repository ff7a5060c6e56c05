//! `colod run` and `colod restore`: a VM without protection, on a loop that only moves frames. What
//! it costs less than a protected one is what protection costs.

use std::{
    path::Path,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::channel,
    },
};

use colo_driver_mio::{
    Guest as _, Wake,
    guest::{Happened, Ready, Tokens},
};

use crate::{
    config::{Config, Purpose},
    control::{Hub, Operator, Refused, Request},
};
use colo_proto::{
    id::Generation,
    machine::{GuestDone, GuestOp},
    member::Permit,
    time::Instant,
};
use mio::{Events, Poll, Token};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::{Value, json};

use crate::{
    cli::Failure,
    cli::args::DaemonArgs,
    cli::control::server,
    cli::logging,
    cli::signals,
    kvm::{self, Ended, Order, Orders, build},
};

const WAKE: Token = Token(0);
/// Frames moved before descriptors are looked at again.
const TURN: usize = 512;
/// Nobody else owns this VM, ever.
const ALWAYS: Permit = Permit {
    generation: Generation(0),
    until: Instant::END,
};

/// Runs the VM until it ends or is told to.
pub(crate) fn run(args: &DaemonArgs, state: Option<&Path>) -> Result<ExitCode, Failure> {
    if args.die_with_parent {
        set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    let config = Config::load(&args.config.config, Purpose::Run)?;
    logging::start(&config.log)?;
    let mut built = build(&config)?;
    if let Some(state) = state {
        built.restore(state)?;
    }
    let end = Arc::new(Mutex::new(None));
    let ending = Arc::clone(&end);
    let mut poll = Poll::new()?;
    let wake = Wake::new(poll.registry(), WAKE)?;
    let heard = wake.clone();
    let (mut guest, orders) = kvm::guest(&config, built, move |ended| {
        *ending.lock().unwrap_or_else(PoisonError::into_inner) = ended;
        heard.wake();
    })?;
    guest.attach(poll.registry(), Tokens::GUEST, wake.clone())?;
    let quit = Arc::new(AtomicBool::new(false));
    let stop = {
        let (quit, wake) = (Arc::clone(&quit), wake.clone());
        move || {
            quit.store(true, Ordering::Release);
            wake.wake();
        }
    };
    let interrupt = signals::Interrupt::start(stop.clone())?;
    let operator = Alone {
        name: config.vm.name.clone(),
        orders,
        quit: Box::new(stop),
    };
    let _server = server(&config.control, operator, &Hub::default())?;
    tracing::info!(vm = config.vm.name, "runs without protection");
    guest.start(GuestOp::Resume);

    let (mut events, mut index, mut more) = (Events::with_capacity(64), 0, false);
    while !quit.load(Ordering::Acquire) {
        let wait = more.then_some(std::time::Duration::ZERO);
        match poll.poll(&mut events, wait) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                return Err(error.into());
            }
            _ => {}
        }
        for event in &events {
            if let Some(index) = Tokens::GUEST.index(event.token()) {
                guest.ready(
                    index,
                    Ready {
                        readable: true,
                        writable: false,
                    },
                );
            }
        }
        more = true;
        for _ in 0..TURN {
            let Some(happened) = guest.poll() else {
                more = false;
                break;
            };
            match happened {
                Happened::FromGuest { frame, .. } => guest.to_world(frame, ALWAYS),
                Happened::FromWorld(frame) => {
                    index += 1;
                    guest.to_guest(index, frame);
                }
                Happened::Done(GuestDone::Failed { op, why }) => {
                    return Err(format!("the guest could not {op:?}: {why}").into());
                }
                _ => {}
            }
        }
        let ended = end.lock().unwrap_or_else(PoisonError::into_inner).take();
        match ended {
            Some(Ended::PowerOff) => {
                tracing::info!("the guest switched itself off");
                return Ok(ExitCode::SUCCESS);
            }
            Some(Ended::Reset) => {
                tracing::info!("the guest asked for a reset; vm.on_reboot ends it");
                return Ok(ExitCode::SUCCESS);
            }
            Some(Ended::Crashed) => {
                return Err("the guest crashed (triple fault); vm.on_crash ends it".into());
            }
            Some(Ended::Failed(why)) => return Err(format!("the guest cannot go on: {why}").into()),
            None => {}
        }
    }
    Ok(if interrupt.asked() {
        ExitCode::from(signals::INTERRUPTED)
    } else {
        ExitCode::SUCCESS
    })
}

/// The control socket of a VM without protection.
struct Alone {
    name: String,
    orders: Orders,
    quit: Box<dyn Fn() + Send + Sync>,
}

impl Alone {
    fn order(&self, order: Order) -> Result<(), Refused> {
        if self.orders.give(order) {
            return Ok(());
        }
        Err(Refused::because("the machine has ended"))
    }

    fn save(&self, request: &Request) -> Result<Value, Refused> {
        let file = request
            .arguments
            .get("file")
            .and_then(Value::as_str)
            .map(std::path::PathBuf::from)
            .filter(|file| file.is_absolute())
            .ok_or_else(|| Refused::because("save: expected \"file\", an absolute path"))?;
        let (answer, answered) = channel();
        self.order(Order::Save(file, answer))?;
        answered
            .recv()
            .map_err(|_| Refused::because("the machine has ended"))?
            .map(|()| json!({}))
            .map_err(Refused::because)
    }
}

impl Operator for Alone {
    fn execute(&self, request: &Request) -> Result<Value, Refused> {
        match request.execute.as_str() {
            "status" => Ok(json!({ "vm": self.name, "role": "alone", "protected": false })),
            "query-colo-status" => {
                Ok(json!({ "mode": "none", "last-mode": "none", "reason": "none" }))
            }
            "stop" => self.order(Order::Pause).map(|()| json!({})),
            "cont" => self.order(Order::Resume).map(|()| json!({})),
            "save" => self.save(request),
            "system_powerdown" => press(&self.orders),
            "quit" => {
                (self.quit)();
                Ok(json!({}))
            }
            other => Err(refused(other)),
        }
    }
}

/// Commands of this socket.
const KNOWN: [&str; 8] = [
    "status",
    "query-colo-status",
    "stop",
    "cont",
    "save",
    "system_powerdown",
    "quit",
    "events",
];
/// Commands that need a pair.
const OF_A_PAIR: [&str; 9] = [
    "checkpoint",
    "failover",
    "x-colo-lost-heartbeat",
    "detach",
    "attach",
    "set-mode",
    "migrate-set-parameters",
    "xen-set-replication",
    "xen-colo-do-checkpoint",
];

/// Presses the power button of a machine.
pub(super) fn press(orders: &Orders) -> Result<Value, Refused> {
    let ended = || Refused::because("the machine has ended");
    let (answer, answered) = channel();
    if !orders.give(Order::PowerButton(answer)) {
        return Err(ended());
    }
    if answered.recv().map_err(|_| ended())? {
        Ok(json!({}))
    } else {
        Err(Refused::because(
            "the guest does not listen to its power button (yet): it needs ACPI",
        ))
    }
}

/// Why a command that is none of this socket's is not carried out.
fn refused(command: &str) -> Refused {
    if OF_A_PAIR.contains(&command) {
        return Refused::because(format!("{command}: this VM is not protected (colod run)"));
    }
    Refused::unknown(command, &KNOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pairs_command_is_known_and_has_no_pair_here() {
        assert_eq!(
            refused("detach").desc,
            "detach: this VM is not protected (colod run)"
        );
        assert!(refused("statsu").desc.ends_with("did you mean status?"));
    }
}
