//! Doing what the machine says. Nothing here waits, and nothing here feeds the machine.

use colo_proto::machine::{Machine, Output};

use super::Driver;
use crate::{Guest, clock, handle::What};

impl<M: Machine, G: Guest> Driver<M, G> {
    pub(super) fn execute(&mut self, output: Output) {
        match output {
            Output::Guest(op) => self.guest.start(op),
            Output::ToGuest { index, frame } => self.guest.to_guest(index, frame),
            Output::ToWorld { frame, permit } => self.guest.to_world(frame, permit),
            Output::Notify(notify) => self.guest.notify(notify),
            Output::Dial(channel) => self.connector.dial(channel, clock::now()),
            Output::HangUp(channel) => self.hang_up(channel),
            Output::Datagram(path, bytes) => self.send_heartbeat(path, &bytes),
            Output::AskArbiter(ballot) => self.arbiter.cast(clock::now(), ballot),
            Output::ReadArbiter(request) => self.arbiter.read(clock::now(), request),
            Output::Fence(delay) => {
                if self.fence.ask(delay) {
                    tracing::error!(
                        "no fencing device is configured; the peer cannot be powered off"
                    );
                    self.more = true;
                }
            }
            Output::Persist(id, record) => {
                self.record.persist(id, record);
                self.more = true;
            }
            Output::Announce(permit) => {
                if permit.allows(clock::now()) {
                    self.guest.announce();
                }
            }
            Output::Answer(id, answer) => {
                if let Some(asked) = self.answers.remove(&id) {
                    // Whoever asked may have stopped waiting.
                    let _gone = asked.send(answer);
                }
            }
            Output::Event(event) => self.report(What::Machine(event)),
            other => tracing::error!(?other, "an output that this driver does not know"),
        }
    }
}
