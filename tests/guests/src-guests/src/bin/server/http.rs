//! One connection: requests in, responses out, in order, as far as the socket takes them.
//!
//! | request | answer |
//! |---|---|
//! | `GET /`, `GET /counter` | the number of requests so far, this one included |
//! | `POST /echo` | the body |
//! | `GET /bytes/N` | N bytes; byte `i` is the low byte of `i ^ i >> 8 ^ i >> 16` |
//! | `GET /random` | 32 hexadecimal digits that no other machine would draw |
//! | `GET /sha256?n=K` | SHA-256 applied K times (1, at most a million) to 32 zero bytes |
//! | `GET /selfcheck` | what the working set's checks found, if there is one |
//!
//! Every request increments the counter, and every response carries it as `X-Counter`.

use core::fmt::{self, Write};

use guest::entropy::Entropy;
use guest::stats::{self, Word};
use guest::working_set::WorkingSet;
use sha2::{Digest, Sha256};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::Socket;

use crate::request::{Refusal, Request, head_length};

const INPUT: usize = 4096;
const MOST_ROUNDS: u64 = 1_000_000;

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) counter: u64,
    pub(crate) entropy: Entropy,
    pub(crate) working_set: Option<WorkingSet>,
}

/// The state of one connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) handle: SocketHandle,
    /// Received and not yet consumed.
    input: [u8; INPUT],
    input_used: usize,
    /// Head and short body of a response.
    output: Text<512>,
    output_sent: usize,
    rest: Rest,
    closing: bool,
}

/// What follows the output before the next request is looked at.
#[derive(Debug)]
enum Rest {
    Nothing,
    /// Bytes of `/bytes/N`.
    Bytes {
        at: u64,
        end: u64,
    },
    /// The request's body goes back to where it came from.
    Echo {
        left: u64,
    },
    /// The request's body goes nowhere.
    Discard {
        left: u64,
    },
}

impl Connection {
    pub(crate) fn new(handle: SocketHandle) -> Self {
        Self {
            handle,
            input: [0; INPUT],
            input_used: 0,
            output: Text::new(),
            output_sent: 0,
            rest: Rest::Nothing,
            closing: false,
        }
    }

    /// Forgets the peer.
    pub(crate) fn reset(&mut self) {
        self.input_used = 0;
        self.output.used = 0;
        self.output_sent = 0;
        self.rest = Rest::Nothing;
        self.closing = false;
    }

    /// Does all that can be done without waiting for the peer.
    pub(crate) fn serve(&mut self, socket: &mut Socket<'_>, shared: &mut Shared) {
        // Not before the handshake is over, and not after our end is closed.
        if socket.may_send() {
            while self.step(socket, shared) {}
        }
    }

    /// Makes one step; false if the peer is to move next.
    fn step(&mut self, socket: &mut Socket<'_>, shared: &mut Shared) -> bool {
        let unsent = &self.output.bytes[self.output_sent..self.output.used];
        if !unsent.is_empty() {
            let sent = socket.send_slice(unsent).unwrap_or(0);
            self.output_sent += sent;
            return sent > 0;
        }
        match self.rest {
            Rest::Bytes { at, end } if at < end => {
                let sent = socket
                    .send(|buffer| {
                        let count = buffer
                            .len()
                            .min((end - at).try_into().unwrap_or(usize::MAX));
                        for (i, byte) in (at..).zip(&mut buffer[..count]) {
                            *byte = (i ^ i >> 8 ^ i >> 16) as u8;
                        }
                        (count, count)
                    })
                    .unwrap_or(0);
                self.rest = Rest::Bytes {
                    at: at + sent as u64,
                    end,
                };
                sent > 0
            }
            Rest::Echo { left } if left > 0 => {
                self.receive(socket);
                let count = self.input_used.min(left.try_into().unwrap_or(usize::MAX));
                let sent = socket.send_slice(&self.input[..count]).unwrap_or(0);
                self.rest = Rest::Echo {
                    left: left - sent as u64,
                };
                self.consume(sent);
                sent > 0 || self.give_up(socket)
            }
            Rest::Discard { left } if left > 0 => {
                self.receive(socket);
                let count = self.input_used.min(left.try_into().unwrap_or(usize::MAX));
                self.rest = Rest::Discard {
                    left: left - count as u64,
                };
                self.consume(count);
                count > 0 || self.give_up(socket)
            }
            _ if self.closing => {
                socket.close();
                false
            }
            _ => {
                self.rest = Rest::Nothing;
                self.next_request(socket, shared)
            }
        }
    }

    fn next_request(&mut self, socket: &mut Socket<'_>, shared: &mut Shared) -> bool {
        let Some(length) = head_length(&self.input[..self.input_used]) else {
            if self.input_used == INPUT {
                self.refuse((431, "Request Header Fields Too Large"), shared);
                return true;
            }
            return self.receive(socket) || self.give_up(socket);
        };
        let mut head = [0; INPUT];
        head[..length].copy_from_slice(&self.input[..length]);
        self.consume(length);
        match Request::parse(&head[..length]) {
            Ok(request) => self.respond(&request, shared),
            Err(refusal) => self.refuse(refusal, shared),
        }
        true
    }

    fn respond(&mut self, request: &Request<'_>, shared: &mut Shared) {
        count(shared);
        self.closing = !request.keep_alive;
        self.rest = Rest::Discard {
            left: request.length,
        };
        let mut body = Text::<128>::new();
        let done = match (request.method, request.path) {
            ("GET", "/" | "/counter") => writeln!(body, "{}", shared.counter),
            ("GET", "/random") => {
                writeln!(
                    body,
                    "{:016x}{:016x}",
                    shared.entropy.draw(),
                    shared.entropy.draw()
                )
            }
            ("GET", "/sha256") => {
                let rounds = request.number("n").unwrap_or(1).min(MOST_ROUNDS);
                (0..rounds)
                    .fold([0; 32], |block, _| Sha256::digest(block).into())
                    .iter()
                    .try_for_each(|byte: &u8| write!(body, "{byte:02x}"))
                    .and_then(|()| writeln!(body))
            }
            ("GET", "/selfcheck") => match &shared.working_set {
                Some(set) => writeln!(
                    body,
                    "written={} verified={} errors={}",
                    set.written(),
                    set.verified(),
                    set.errors()
                ),
                None => writeln!(body, "off"),
            },
            ("POST" | "PUT", "/echo") => {
                self.rest = Rest::Echo {
                    left: request.length,
                };
                self.start(200, "OK", request.length, shared, request.expects_continue);
                return;
            }
            ("GET", path) => match path.strip_prefix("/bytes/").map(str::parse::<u64>) {
                Some(Ok(end)) if request.length == 0 => {
                    self.rest = Rest::Bytes { at: 0, end };
                    self.start(200, "OK", end, shared, false);
                    return;
                }
                Some(_) => return self.refuse((400, "Bad Request"), shared),
                None => return self.short(404, "Not Found", "no such page\n", shared),
            },
            _ => return self.short(405, "Method Not Allowed", "GET, or POST /echo\n", shared),
        };
        match done {
            Ok(()) => self.short(200, "OK", body.as_str(), shared),
            Err(_) => self.short(500, "Internal Server Error", "too long\n", shared),
        }
    }

    /// A response to something that is not a request; nothing after it can be understood.
    fn refuse(&mut self, (status, reason): Refusal, shared: &mut Shared) {
        count(shared);
        self.closing = true;
        self.input_used = 0;
        self.rest = Rest::Nothing;
        self.short(status, reason, "cannot do that\n", shared);
    }

    fn short(&mut self, status: u16, reason: &str, body: &str, shared: &Shared) {
        self.start(status, reason, body.len() as u64, shared, false);
        let _ = self.output.write_str(body);
    }

    fn start(&mut self, status: u16, reason: &str, length: u64, shared: &Shared, go_on: bool) {
        self.output.used = 0;
        self.output_sent = 0;
        if go_on {
            let _ = self.output.write_str("HTTP/1.1 100 Continue\r\n\r\n");
        }
        let connection = if self.closing { "close" } else { "keep-alive" };
        // Cannot fail: the buffer is larger than the longest head.
        let _ = write!(
            self.output,
            "HTTP/1.1 {status} {reason}\r\nServer: colo-guest\r\nContent-Type: text/plain\r\n\
             Content-Length: {length}\r\nConnection: {connection}\r\nX-Counter: {}\r\n\r\n",
            shared.counter
        );
    }

    /// Fills up the input; false if nothing came.
    fn receive(&mut self, socket: &mut Socket<'_>) -> bool {
        let received = socket
            .recv_slice(&mut self.input[self.input_used..])
            .unwrap_or(0);
        self.input_used += received;
        received > 0
    }

    fn consume(&mut self, count: usize) {
        self.input.copy_within(count..self.input_used, 0);
        self.input_used -= count;
    }

    /// Closes our end if the peer has closed its own and there is nothing left to answer.
    fn give_up(&mut self, socket: &mut Socket<'_>) -> bool {
        if !socket.may_recv() {
            socket.close();
        }
        false
    }
}

fn count(shared: &mut Shared) {
    shared.counter += 1;
    stats::set(Word::Progress, shared.counter);
}

/// Text in a fixed place; what does not fit is an error.
#[derive(Debug)]
struct Text<const N: usize> {
    bytes: [u8; N],
    used: usize,
}

impl<const N: usize> Text<N> {
    const fn new() -> Self {
        Self {
            bytes: [0; N],
            used: 0,
        }
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.used]).unwrap_or("")
    }
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.used + text.len();
        self.bytes
            .get_mut(self.used..end)
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.used = end;
        Ok(())
    }
}
