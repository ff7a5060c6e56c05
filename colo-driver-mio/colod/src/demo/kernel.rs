//! The client on the kernel's TCP stack, in a network namespace of its own: as a real one works.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd as _,
    thread,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{
    Answered, Fault, Plan,
    client::{Shared, count, xorshift},
    http::{Answer, Asked},
    now,
};

/// How often a wait looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// Works until it is told to end.
pub(super) fn work(namespace: &File, plan: &Plan, shared: &Shared) -> Result<(), Fault> {
    let failed = |error: io::Error| Fault::Client(error.to_string());
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| failed(error.into()))?;
    let Some(mut stream) = connect(plan, shared) else {
        return Ok(());
    };
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_read_timeout(Some(LOOK)).map_err(failed)?;
    shared.lock().report.connected = Some(now());
    let (mut random, mut due, mut number) = (now() | 1, None, 0);
    let mut buffer = vec![0; 64 << 10];
    loop {
        {
            let mut state = shared.lock();
            if state.end || state.finish {
                return Ok(());
            }
            state.report.waiting = true;
        }
        let asked = Asked::any(plan.counter_only, &mut || xorshift(&mut random));
        let begun = now();
        let reset = |_| Fault::Reset { answers: number };
        stream
            .write_all(&asked.encode(&plan.guest.to_string()))
            .map_err(reset)?;
        let (mut answer, mut first_byte) = (Answer::default(), None);
        while answer.body().is_none() {
            let got = match stream.read(&mut buffer) {
                Ok(0) => return Err(Fault::Reset { answers: number }),
                Ok(got) => got,
                Err(error) if is_quiet(&error) => {
                    if shared.lock().end {
                        return Ok(());
                    }
                    continue;
                }
                Err(error) => return Err(reset(error)),
            };
            first_byte.get_or_insert_with(now);
            let bytes = buffer.get(..got).unwrap_or_default();
            let wrong = |fault| Fault::Wrong {
                number: number + 1,
                fault,
            };
            let taken = answer.push(bytes).map_err(wrong)?;
            if taken < got {
                return Err(Fault::Unasked {
                    number: number + 1,
                    bytes: got - taken,
                });
            }
        }
        number += 1;
        asked
            .judge(&answer)
            .map_err(|fault| Fault::Wrong { number, fault })?;
        count(&mut due, answer.counter, number)?;
        shared.answered(Answered {
            asked: begun,
            first_byte: first_byte.unwrap_or(begun),
            whole: now(),
            bytes: answer.body().map_or(0, <[u8]>::len),
            counter: answer.counter,
        });
        thread::sleep(plan.pause);
    }
}

/// Tries until the guest listens; `None` when the client is not wanted any more.
fn connect(plan: &Plan, shared: &Shared) -> Option<TcpStream> {
    let to = SocketAddr::from((plan.guest, plan.port));
    while !shared.lock().end {
        match TcpStream::connect_timeout(&to, LOOK) {
            Ok(stream) => return Some(stream),
            Err(_) => thread::sleep(LOOK),
        }
    }
    None
}

fn is_quiet(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
