//! What becomes of the daemon when its guest will not go on.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use colo_driver_mio::ControlHandle;
use colo_proto::{command::Command, id::Role};

use crate::kvm::Ended;

/// How long the peer may take to hear of a shutdown.
const FAREWELL: Duration = Duration::from_secs(3);

/// How the guest here ended, if it has.
///
/// It counts where the guest is the VM: a shutdown is told to the peer, a crash is left for it to survive. On a
/// secondary it counts when that takes over, unless a checkpoint has replaced the guest before.
#[derive(Debug, Default)]
pub(crate) struct Fate {
    control: OnceLock<ControlHandle>,
    ended: Mutex<Option<Ended>>,
    failed: OnceLock<String>,
}

impl Fate {
    /// The loop, once it is made.
    pub(crate) fn attach(&self, control: ControlHandle) {
        let _first = self.control.set(control);
    }

    /// The guest here ended, or was replaced. Called on the machine's thread.
    pub(crate) fn hear(self: &Arc<Self>, ended: Option<Ended>) {
        let judge = ended.is_some();
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = ended;
        if judge {
            self.judge();
        }
    }

    /// This host has taken over.
    pub(crate) fn promoted(self: &Arc<Self>) {
        self.judge();
    }

    /// Why the daemon ends in failure, if it does.
    pub(crate) fn failed(&self) -> Option<&String> {
        self.failed.get()
    }

    /// On a thread of its own: the loop, which answers, must not wait for its answer.
    fn judge(self: &Arc<Self>) {
        let fate = Arc::clone(self);
        thread::spawn(move || fate.act());
    }

    fn act(&self) {
        let ended = || self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(control), true) = (self.control.get(), ended().is_some()) else {
            return;
        };
        let Ok(snapshot) = control.snapshot() else {
            return;
        };
        if snapshot.status.role == Role::Secondary {
            tracing::warn!(ended = ?*ended(), "the guest ended here; the next checkpoint replaces it");
            return;
        }
        let last = ended().take();
        match last {
            Some(Ended::PowerOff) => {
                tracing::warn!("the guest switched itself off; the VM ends on both hosts");
                end(control, snapshot.status.protected);
            }
            Some(Ended::Reset) => {
                tracing::warn!("the guest asked for a reset; the VM ends on both hosts");
                end(control, snapshot.status.protected);
            }
            Some(Ended::Crashed) => {
                tracing::error!("the guest crashed (triple fault); the VM ends on both hosts");
                let _first = self.failed.set("triple fault; vm.on_crash ends it".into());
                end(control, snapshot.status.protected);
            }
            Some(Ended::Failed(why)) => {
                let next = if snapshot.status.protected {
                    "the peer takes over"
                } else {
                    "no peer can take over"
                };
                tracing::error!(why, "the guest cannot go on here; {next}");
                let _first = self.failed.set(why);
                control.stop();
            }
            None => {}
        }
    }
}

/// In good order: what the guest said last leaves, and what it wrote last is on both hosts' disks.
fn end(control: &ControlHandle, protected: bool) {
    if protected && let Err(error) = control.command(Command::CheckpointNow, FAREWELL) {
        tracing::warn!(%error, "the VM ends without a last checkpoint");
    }
    let _told = control.command(Command::Shutdown, FAREWELL);
    control.stop();
}

#[cfg(test)]
mod tests {
    use colo_driver_mio::{
        Driver, DriverConfig, arbiter::none::NoArbiter, clock, guest::fake::FakeGuest,
        guest::fake::SLOT, record::RecordStore,
    };
    use colo_proto::{
        config::Config,
        member::{BootId, MacKey, MemberConfig, NodeId, VmId},
        node::{Node, Start},
        wire::join::Identity,
    };

    use super::*;

    #[test]
    fn a_guest_that_crashes_on_a_secondary_does_not_end_the_daemon() {
        let (vm, boot, key) = (VmId([1; 16]), BootId(1), MacKey([1; 16]));
        let member = MemberConfig::new(vm, NodeId(1), key);
        let protocol = Config::builder(NodeId(2), member, &[(SLOT, 16)]);
        let protocol = protocol.build().unwrap();
        let node = Node::new(protocol, Start::Secondary, boot, None, 1, clock::now());
        let config = DriverConfig::new(Identity { vm, boot, key });
        let (guest, _guest) = FakeGuest::empty(16);
        let record = RecordStore::in_memory();
        let driver = Driver::new(config, node, guest, Box::new(NoArbiter::default()), record);
        let driver = driver.unwrap();
        let control = driver.control();
        let loop_thread = thread::spawn(move || driver.run());

        let fate = Arc::new(Fate::default());
        fate.attach(control.clone());
        let crash = Some(Ended::Failed("vCPU 0".into()));
        *fate.ended.lock().unwrap() = crash.clone();
        fate.act();
        control.snapshot().expect("the loop runs on");
        assert_eq!(fate.failed(), None);
        assert_eq!(*fate.ended.lock().unwrap(), crash, "it may take over yet");
        // A checkpoint replaces the guest.
        fate.hear(None);
        assert_eq!(*fate.ended.lock().unwrap(), None);
        control.stop();
        loop_thread.join().unwrap().unwrap();
    }
}
