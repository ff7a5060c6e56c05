//! An HTTP server on a bare machine: smoltcp over virtio-net, halting whenever there is nothing to
//! do. See `http.rs` for what it answers.
#![no_std]
#![no_main]

extern crate alloc;

mod http;
mod request;

use alloc::vec;
use alloc::vec::Vec;

use guest::clock::Clock;
use guest::entropy::Entropy;
use guest::stats::{self, Word};
use guest::virtio::net::Net;
use guest::working_set::WorkingSet;
use guest::{Boot, cpu, println};
use http::{Connection, Shared};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address, Ipv4Cidr};

guest::entry!(main);

const PORT: u16 = 80;
const CONNECTIONS: usize = 64;
const RECEIVE_BUFFER: usize = 16 * 1024;
const SEND_BUFFER: usize = 32 * 1024;
/// A connection in TIME-WAIT is given up early when fewer sockets than this listen.
const FEWEST_LISTENING: usize = 16;
/// A peer that vanished is noticed, so that its socket can listen again.
const PROBE_EVERY: Duration = Duration::from_secs(30 * HASTE);
const GIVE_UP_AFTER: Duration = Duration::from_secs(120 * HASTE);

fn main(boot: &'static Boot) -> ! {
    let mut net = match Net::find(&boot.cmdline) {
        Ok(net) => net,
        Err(trouble) => {
            println!("server: no virtio network card: {trouble:?}");
            cpu::stop();
        }
    };
    let address = boot
        .cmdline
        .value("ip")
        .map_or(Ok(Ipv4Cidr::new(DEFAULT_IP, 24)), str::parse);
    let gateway = boot
        .cmdline
        .value("gw")
        .map_or(Ok(DEFAULT_GATEWAY), str::parse);
    let (Ok(address), Ok(gateway)) = (address, gateway) else {
        println!("server: want ip=A.B.C.D/PREFIX gw=A.B.C.D on the command line");
        cpu::stop();
    };

    let mac = net.mac();
    let mut entropy = Entropy::new(boot.cmdline.number("seed").unwrap_or(0));
    let mut config = Config::new(EthernetAddress(mac).into());
    config.random_seed = entropy.draw();
    let mut interface = Interface::new(config, &mut net, instant(boot.clock));
    interface.update_ip_addrs(|addresses| {
        let _ = addresses.push(IpCidr::Ipv4(address));
    });
    let _ = interface.routes_mut().add_default_ipv4_route(gateway);
    let mut sockets = SocketSet::new(vec![]);
    let mut connections: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let buffer = |size| tcp::SocketBuffer::new(vec![0; size]);
            let mut socket = tcp::Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
            socket.set_nagle_enabled(false);
            socket.set_keep_alive(Some(PROBE_EVERY));
            socket.set_timeout(Some(GIVE_UP_AFTER));
            Connection::new(sockets.add(socket))
        })
        .collect();

    let mut chores = Chores::new(boot);
    relisten(&mut connections, &mut sockets);
    stats::begin(b"SERV");
    announce(&mut net, mac, address.address());
    println!(
        "server: ready ip={address} gw={gateway} mac={} port={PORT} device={} tsc_khz={}",
        EthernetAddress(mac),
        net.transport(),
        boot.clock.tsc_khz()
    );

    let mut shared = Shared {
        counter: 0,
        entropy,
        working_set: chores.working_set.take(),
    };
    loop {
        net.acknowledge();
        interface.poll(instant(boot.clock), &mut net, &mut sockets);
        serve(&mut connections, &mut sockets, &mut shared);
        interface.poll(instant(boot.clock), &mut net, &mut sockets);
        net.flush();

        let mut wake = chores.run(boot.clock, &mut shared);
        let now = instant(boot.clock);
        if !net.can_transmit() {
            // The card does not interrupt for what it has sent.
            wake = wake.min(micros(now) + 1_000);
        } else if let Some(at) = interface.poll_at(now, &sockets) {
            wake = wake.min(micros(at));
        }
        boot.clock.halt_until(Some(wake));
    }
}

const DEFAULT_IP: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);
const DEFAULT_GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);

/// The stack never repeats before a second has passed; Linux's waits 200 ms. Its clock runs this
/// much faster, so that a takeover is noticed as fast as with a guest in the field.
const HASTE: u64 = 5;

fn instant(clock: Clock) -> Instant {
    Instant::from_micros((clock.micros() * HASTE) as i64)
}

/// The guest's own time of an instant of the stack.
fn micros(at: Instant) -> u64 {
    at.total_micros() as u64 / HASTE
}

fn serve(connections: &mut [Connection], sockets: &mut SocketSet<'_>, shared: &mut Shared) {
    for connection in connections.iter_mut() {
        connection.serve(sockets.get_mut(connection.handle), shared);
    }
    relisten(connections, sockets);
}

/// Lets the sockets that are done with their peer wait for the next.
fn relisten(connections: &mut [Connection], sockets: &mut SocketSet<'_>) {
    let is_listening = |connection: &&Connection| {
        sockets
            .get::<tcp::Socket<'_>>(connection.handle)
            .is_listening()
    };
    let mut listening = connections.iter().filter(is_listening).count();
    for connection in connections {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
        let spent = match socket.state() {
            tcp::State::Closed => true,
            tcp::State::TimeWait => listening < FEWEST_LISTENING,
            _ => false,
        };
        if spent {
            // Listening again right after the abort forgets the peer before a reset goes out.
            socket.abort();
            connection.reset();
            let _ = socket.listen(PORT);
            listening += 1;
        }
    }
}

/// Tells the network whose this address is.
fn announce(net: &mut Net, mac: [u8; 6], ip: Ipv4Address) {
    let mut frame = [0; 42];
    frame[..6].fill(0xFF);
    frame[6..12].copy_from_slice(&mac);
    frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&ip.octets());
    frame[38..42].copy_from_slice(&ip.octets());
    net.send(&frame);
}

/// What the server does besides serving: a line each second in which something happened, and, if
/// asked, the work of the `dirty` guest.
struct Chores {
    quiet: bool,
    pages: u64,
    checks: u64,
    period: u64,
    next_work: u64,
    next_line: u64,
    reported: u64,
    working_set: Option<WorkingSet>,
}

impl Chores {
    fn new(boot: &Boot) -> Self {
        let number = |key, default| boot.cmdline.number(key).unwrap_or(default);
        let pages = number("pages", 0);
        Self {
            quiet: number("quiet", 0) != 0,
            pages,
            checks: number("verify", pages.max(16)),
            period: number("period_us", 10_000).max(1),
            next_work: 0,
            next_line: 0,
            reported: 0,
            working_set: (pages > 0).then(|| WorkingSet::new(boot, number("ws", 4096))),
        }
    }

    /// Does what is due and says when more will be.
    fn run(&mut self, clock: Clock, shared: &mut Shared) -> u64 {
        let now = clock.micros();
        if now >= self.next_line {
            if !self.quiet && shared.counter != self.reported {
                let errors = shared.working_set.as_ref().map_or(0, WorkingSet::errors);
                println!(
                    "server: t={} requests={} errors={errors}",
                    now / 1_000_000,
                    shared.counter
                );
                self.reported = shared.counter;
            }
            stats::set(Word::Micros, now);
            self.next_line = now - now % 1_000_000 + 1_000_000;
        }
        let Some(set) = &mut shared.working_set else {
            return self.next_line;
        };
        if now >= self.next_work || self.next_work > now + 2 * self.period {
            set.write(self.pages);
            set.verify(self.checks);
            self.next_work = (self.next_work + self.period).max(now + self.period / 2);
        }
        self.next_line.min(self.next_work)
    }
}
