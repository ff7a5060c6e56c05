//! The client on a TCP stack of its own, behind the switch: no root needed.

use std::{io, time::Duration};

use mio::{Events, Poll};
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp,
    time::Instant,
    wire::{EthernetAddress, HardwareAddress, IpCidr},
};

use super::{
    client::{Answered, Fault, Plan, Shared, count, xorshift},
    http::{Answer, Asked},
    now,
};
use colo_driver_mio::frame_socket::{FRAME_MOST, FrameSocket, Received};

/// The client's TCP stack never repeats before a second has passed; Linux's waits 200 ms. Its
/// clock runs this much faster, so that it is as patient as a client in the field.
const HASTE: u64 = 5;
const BUFFER: usize = 64 << 10;
const ETHERNET_MTU: usize = 1514;

/// A request on its way.
struct Pending {
    asked: Asked,
    at: u64,
    /// What the stack has not taken yet.
    unsent: Vec<u8>,
    first_byte: Option<u64>,
    answer: Answer,
}

pub(super) struct Worker<'a> {
    plan: Plan,
    poll: Poll,
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    shared: &'a Shared,
    pending: Option<Pending>,
    next_at: u64,
    number: u64,
    /// What the next counter must be, known after the first.
    due: Option<u64>,
    connected: bool,
    random: u64,
}

impl<'a> Worker<'a> {
    pub(super) fn new(plan: Plan, socket: FrameSocket, poll: Poll, shared: &'a Shared) -> Self {
        let mut cable = Cable::new(socket);
        let random = now() | 1;
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(plan.mac.0)));
        config.random_seed = random;
        let mut interface = Interface::new(config, &mut cable, clock());
        interface.update_ip_addrs(|addresses| {
            // An empty list has room for one.
            let _full = addresses.push(IpCidr::new(plan.address.into(), 24));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; BUFFER]),
            tcp::SocketBuffer::new(vec![0; BUFFER]),
        );
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let handle = sockets.add(socket);
        Self {
            plan,
            poll,
            cable,
            interface,
            sockets,
            handle,
            shared,
            pending: None,
            next_at: 0,
            number: 0,
            due: None,
            connected: false,
            random,
        }
    }

    pub(super) fn run(&mut self) -> Result<(), Fault> {
        let failed = |error: io::Error| Fault::Client(error.to_string());
        let mut events = Events::with_capacity(4);
        loop {
            if self.shared.lock().end {
                return Ok(());
            }
            self.interface
                .poll(clock(), &mut self.cable, &mut self.sockets);
            if self.work()? {
                // What was just written goes out before anything is waited for.
                continue;
            }
            let wait = self.wait();
            match self.poll.poll(&mut events, Some(wait)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(failed(error));
                }
                _ => {}
            }
        }
    }

    fn wait(&mut self) -> Duration {
        let stack = self
            .interface
            .poll_delay(clock(), &self.sockets)
            .map_or(1_000_000, |delay| delay.total_micros() / HASTE);
        let request = if self.pending.is_none() && self.connected {
            self.next_at.saturating_sub(now()) / 1_000
        } else {
            1_000_000
        };
        Duration::from_micros(stack.min(request).min(1_000_000))
    }

    /// Moves the conversation on; true if there is something to transmit at once.
    fn work(&mut self) -> Result<bool, Fault> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if !self.connected {
            match socket.state() {
                tcp::State::Established => {
                    self.connected = true;
                    self.shared.lock().report.connected = Some(now());
                }
                tcp::State::Closed => {
                    // Nobody was there, or refused: the guest may still be starting.
                    let port = 49_152 + (self.random() % 16_384) as u16;
                    let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
                    socket
                        .connect(
                            self.interface.context(),
                            (self.plan.guest, self.plan.port),
                            port,
                        )
                        .map_err(|error| Fault::Client(format!("connect: {error:?}")))?;
                    return Ok(true);
                }
                _ => return Ok(false),
            }
        }
        if self.pending.is_none() && now() >= self.next_at && !self.shared.lock().finish {
            self.ask();
        }
        let wrote = self.write()?;
        self.read()?;
        Ok(wrote)
    }

    fn ask(&mut self) {
        let asked = Asked::any(self.plan.counter_only, &mut || self.random());
        let unsent = asked.encode(&self.plan.guest.to_string());
        self.shared.lock().report.waiting = true;
        self.pending = Some(Pending {
            asked,
            at: now(),
            unsent,
            first_byte: None,
            answer: Answer::default(),
        });
    }

    fn write(&mut self) -> Result<bool, Fault> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if !socket.may_send() {
            return Err(Fault::Reset {
                answers: self.number,
            });
        }
        let Some(pending) = self.pending.as_mut().filter(|p| !p.unsent.is_empty()) else {
            return Ok(false);
        };
        let taken = socket.send_slice(&pending.unsent).unwrap_or(0);
        pending.unsent.drain(..taken);
        Ok(taken > 0)
    }

    fn read(&mut self) -> Result<(), Fault> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        while socket.can_recv() {
            let Some(pending) = &mut self.pending else {
                return Err(Fault::Unasked {
                    number: self.number,
                    bytes: socket.recv_queue(),
                });
            };
            pending.first_byte.get_or_insert_with(now);
            let taken = socket
                .recv(|bytes| match pending.answer.push(bytes) {
                    Ok(taken) => (taken, Ok(())),
                    Err(fault) => (bytes.len(), Err(fault)),
                })
                .unwrap_or(Ok(()));
            taken.map_err(|fault| Fault::Wrong {
                number: self.number + 1,
                fault,
            })?;
            if let Some(body) = pending.answer.body() {
                self.number += 1;
                let number = self.number;
                pending
                    .asked
                    .judge(&pending.answer)
                    .map_err(|fault| Fault::Wrong { number, fault })?;
                let counter = pending.answer.counter;
                let answered = Answered {
                    asked: pending.at,
                    first_byte: pending.first_byte.unwrap_or(pending.at),
                    whole: now(),
                    bytes: body.len(),
                    counter,
                };
                count(&mut self.due, counter, number)?;
                self.pending = None;
                self.next_at = answered.whole + self.plan.pause.as_nanos() as u64;
                self.shared.answered(answered);
            }
        }
        Ok(())
    }

    fn random(&mut self) -> u64 {
        xorshift(&mut self.random)
    }
}

pub(super) fn clock() -> Instant {
    Instant::from_micros((now() / 1_000 * HASTE) as i64)
}

/// The cable as smoltcp sees it.
pub(super) struct Cable {
    socket: FrameSocket,
    buffer: Vec<u8>,
}

impl Cable {
    pub(super) fn new(socket: FrameSocket) -> Self {
        Self {
            socket,
            buffer: vec![0; FRAME_MOST],
        }
    }
}

impl Device for Cable {
    type RxToken<'a> = Arrived<'a>;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived<'_>, Leaving<'_>)> {
        let Ok(Received::Frame(len)) = self.socket.recv(&mut self.buffer) else {
            return None;
        };
        let frame = self.buffer.get(..len)?;
        Some((Arrived(frame), Leaving(&self.socket)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Leaving<'_>> {
        Some(Leaving(&self.socket))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_MTU;
        capabilities
    }
}

pub(super) struct Arrived<'a>(&'a [u8]);

impl RxToken for Arrived<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

pub(super) struct Leaving<'a>(&'a FrameSocket);

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let done = f(&mut frame);
        // Full or gone: TCP repeats it.
        let _dropped = self.0.send(&frame);
        done
    }
}
