//! What the author of a VMM writes: [`Vmm`], one method for each thing that a machine may want, and
//! the loop of [`serve`]. Here a VMM of nothing but stubs runs alone for a simulated second; each
//! comment says what stands there in a real one. `cargo run -p colo-proto --example embed`

use std::{collections::VecDeque, num::NonZeroUsize};

use colo_proto::{
    config::Config,
    error::{ConfigError, Misuse},
    id::{Channel, Slot},
    machine::{Body, Captured, Demand, GuestDone, GuestOp, Input, Machine, Output, Transmit},
    member::{BootId, MacKey, MemberConfig, NodeId, Register, VmId},
    node::{Node, Start},
    time::Instant,
};

/// What surrounds a machine: guest, sockets, arbiter, disk, clock.
trait Vmm {
    /// Now, on a clock that never goes back and counts through suspend (`CLOCK_BOOTTIME`).
    fn now(&self) -> Instant;
    /// Does one thing. What comes of it is queued and becomes a later input.
    fn execute(&mut self, output: Output);
    /// Whether the socket has room, and for how many bytes.
    fn room(&self, channel: Channel) -> usize;
    /// Writes head and body with one `writev`; page bytes come from the VMM's own memory.
    fn send(&mut self, channel: Channel, message: &Transmit);
    /// Reads what is wanted, straight to where it belongs; the input once it is all there.
    fn receive(&mut self, channel: Channel, demand: Demand) -> Option<Input<'static>>;
    /// The next thing that happened; waits until `at` for it, then `Timeout`. `None`: end.
    fn wait(&mut self, at: Option<Instant>) -> Option<Input<'static>>;
}

/// The loop, in the order of the drain contract.
fn serve(node: &mut impl Machine, vmm: &mut impl Vmm, channels: &[Channel]) -> Result<(), Misuse> {
    loop {
        drain(node, vmm);
        for &channel in channels {
            while let (room @ 1.., now) = (vmm.room(channel), vmm.now()) {
                let Some(message) = node.poll_transmit(channel, room) else {
                    break;
                };
                vmm.send(channel, &message);
                let sent = usize::try_from(message.len())
                    .ok()
                    .and_then(NonZeroUsize::new);
                if let Some(sent) = sent {
                    node.handle_input(now, Input::Sent(channel, sent))?;
                    drain(node, vmm);
                }
            }
            while let Some(input) = vmm.receive(channel, node.poll_demand(channel)) {
                node.handle_input(vmm.now(), input)?;
                drain(node, vmm);
            }
        }
        let deadline = node.poll_timeout().map(|deadline| deadline.at);
        let Some(input) = vmm.wait(deadline) else {
            return Ok(());
        };
        node.handle_input(vmm.now(), input)?;
    }
}

fn drain(node: &mut impl Machine, vmm: &mut impl Vmm) {
    while let Some(output) = node.poll_output() {
        vmm.execute(output);
    }
}

/// A VMM of stubs, with time that jumps to the next deadline.
#[derive(Default)]
struct Toy {
    now: Instant,
    happened: VecDeque<Input<'static>>,
    register: Register,
    running: bool,
}

impl Toy {
    /// Whatever the guest is told to do is done at once. A real one starts it and reports later.
    fn guest(&mut self, op: GuestOp) -> Option<GuestDone> {
        Some(match op {
            // Kick the vCPUs out of KVM_RUN, quiesce devices, flush disks.
            GuestOp::Pause => {
                self.running = false;
                GuestDone::Paused
            }
            GuestOp::Resume => {
                self.running = true;
                GuestDone::Resumed
            }
            // KVM_GET_DIRTY_LOG of every slot, each an `Input::Dirty`, then this.
            GuestOp::Harvest => GuestDone::Harvested,
            // The same, with dirty pages and device state copied to a staging area.
            GuestOp::Capture { epoch, resume, .. } => {
                self.running = resume;
                GuestDone::Captured(Captured::new(epoch, 0))
            }
            // Parse the received device state; touch nothing.
            GuestOp::CheckState(epoch) => GuestDone::StateChecked(epoch),
            // Copy the runs from the cache to guest memory.
            GuestOp::CommitRam { epoch, .. } => GuestDone::RamCommitted(epoch),
            // Tell replicated disks; without any, done.
            GuestOp::Replication(op) => GuestDone::Replication(op),
            // Set vCPU and device state; deliver client frames after the cut again.
            GuestOp::LoadState { epoch, .. } => GuestDone::StateLoaded(epoch),
            _ => return None,
        })
    }
}

impl Vmm for Toy {
    fn now(&self) -> Instant {
        self.now
    }

    fn execute(&mut self, output: Output) {
        let answer = match output {
            Output::Guest(op) => self.guest(op).map(Input::Guest),
            // Put the frame on the guest's receive queue; remember the index when it is consumed.
            Output::ToGuest { .. } => None,
            // Look at the permit last of all before the write; drop the frame if it has ended.
            Output::ToWorld { permit, .. } if permit.allows(self.now) => None,
            Output::ToWorld { .. } => None,
            // Connect, join and authenticate; here nobody is there.
            Output::Dial(channel) => Some(Input::Down(channel)),
            // Close when what was handed out is sent.
            Output::HangUp(_) => None,
            // `sendto`; losing it is fine.
            Output::Datagram(..) => None,
            // A process, file or service that both hosts reach; it applies `Register::cast`.
            Output::AskArbiter(ballot) => {
                Some(Input::Arbiter(ballot.request, self.register.cast(&ballot)))
            }
            Output::ReadArbiter(request) => {
                Some(Input::Arbiter(request, self.register.read(request)))
            }
            // Power the peer off through its management board; here there is none.
            Output::Fence(_) => Some(Input::Fenced(false)),
            // Write, fsync, rename, fsync the directory.
            Output::Persist(id, _record) => Some(Input::Persisted(id)),
            // Gratuitous ARP from the guest's addresses.
            Output::Announce(_) => None,
            // Reset the comparer's or filters' own state.
            Output::Notify(_) => None,
            // Back to the operator who asked.
            Output::Answer(id, answer) => {
                println!("{id:?}: {answer:?}");
                None
            }
            Output::Event(event) => {
                println!("{}: {event:?}", self.now);
                None
            }
            // Later versions may want more; a log line shows what is missed.
            _ => None,
        };
        self.happened.extend(answer);
    }

    fn room(&self, _channel: Channel) -> usize {
        0 // SO_SNDBUF less what is queued; nothing is connected here
    }

    fn send(&mut self, _channel: Channel, message: &Transmit) {
        match &message.body {
            Body::Empty | Body::Bytes(_) => {}     // as given
            Body::Live(_) => {}                    // from guest memory
            Body::Staged(_) | Body::State(_) => {} // from the last capture
            _ => {}
        }
    }

    fn receive(&mut self, _channel: Channel, demand: Demand) -> Option<Input<'static>> {
        match demand {
            Demand::Pause => None,       // leave the bytes in the socket
            Demand::Frame(_) => None,    // a whole frame: `Input::Frame`
            Demand::Read { .. } => None, // `readv`: `Input::Placed` first, then `Input::Bytes`
            _ => None,
        }
    }

    fn wait(&mut self, at: Option<Instant>) -> Option<Input<'static>> {
        if let Some(input) = self.happened.pop_front() {
            return Some(input);
        }
        // A real one polls its sockets and the guest with this timeout.
        self.now = self.now.max(at?);
        (self.now < Instant::from_millis(1000)).then_some(Input::Timeout)
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Misuse(#[from] Misuse),
    #[error("the guest does not run")]
    Idle,
}

fn main() -> Result<(), Failure> {
    let member = MemberConfig::new(VmId([7; 16]), NodeId(2), MacKey([7; 16]));
    let config = Config::builder(NodeId(1), member, &[(Slot(0), 16)]).build()?;
    let channels: Vec<Channel> = config.channels().collect();
    let mut vmm = Toy::default();
    // The record comes from disk; boot id and entropy from `getrandom`.
    let mut node = Node::new(config, Start::Primary, BootId(1), None, 1, vmm.now());
    serve(&mut node, &mut vmm, &channels)?;
    println!("{:#?}", node.status());
    if vmm.running {
        Ok(())
    } else {
        Err(Failure::Idle)
    }
}
