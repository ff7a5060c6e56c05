//! A server like the guest's, in a thread, so that the client and the switch can be tested without
//! a VM.

use std::{
    net::Ipv4Addr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use smoltcp::{
    iface::{Config, Interface, SocketSet},
    socket::tcp,
    wire::{EthernetAddress, HardwareAddress, IpCidr},
};

use super::{
    http::pattern,
    stack::{Cable, clock},
};
use colo_driver_mio::frame_socket::FrameSocket;

pub(super) struct FakeServer {
    end: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl FakeServer {
    pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

    /// `lie` turns the true count of requests into the one that is told.
    pub(super) fn start(path: &Path, lie: impl Fn(u64) -> u64 + Send + 'static) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&end);
        let mut cable = Cable::new(FrameSocket::connect(path).unwrap());
        let thread = thread::spawn(move || serve(&mut cable, &stop, lie));
        Self {
            end,
            thread: Some(thread),
        }
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn serve(cable: &mut Cable, stop: &AtomicBool, lie: impl Fn(u64) -> u64) {
    let mac = EthernetAddress([2, 0, 0, 0, 0, 15]);
    let mut interface = Interface::new(Config::new(HardwareAddress::Ethernet(mac)), cable, clock());
    interface.update_ip_addrs(|list| {
        list.push(IpCidr::new(FakeServer::ADDRESS.into(), 24))
            .unwrap();
    });
    let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.listen(80).unwrap();
    socket.set_nagle_enabled(false);
    let mut sockets = SocketSet::new(vec![]);
    let handle = sockets.add(socket);
    let (mut input, mut output, mut count) = (Vec::new(), Vec::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        interface.poll(clock(), cable, &mut sockets);
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.can_recv() {
            socket
                .recv(|bytes| {
                    input.extend_from_slice(bytes);
                    (bytes.len(), ())
                })
                .unwrap();
        }
        if let Some(body) = answer(&mut input, lie(count + 1)) {
            count += 1;
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX-Counter: {}\r\n\r\n",
                body.len(),
                lie(count)
            );
            output.extend_from_slice(head.as_bytes());
            output.extend_from_slice(&body);
        }
        if socket.can_send() && !output.is_empty() {
            let taken = socket.send_slice(&output).unwrap();
            output.drain(..taken);
        }
        thread::yield_now();
    }
}

fn answer(input: &mut Vec<u8>, count: u64) -> Option<Vec<u8>> {
    let head = input.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let text = String::from_utf8(input[..head].to_vec()).unwrap();
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |n| n.parse().unwrap());
    let body = input.get(head..head + length)?.to_vec();
    input.drain(..head + length);
    let path = text.split(' ').nth(1).unwrap();
    Some(match path.strip_prefix("/bytes/") {
        Some(n) => (0..n.parse().unwrap()).map(pattern).collect(),
        None if path == "/counter" => count.to_string().into_bytes(),
        None => body,
    })
}
