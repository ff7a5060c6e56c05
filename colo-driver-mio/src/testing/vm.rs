//! The same for seven calls: embedded here, on a thread of its own.

use std::{
    fmt,
    os::fd::{BorrowedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use bytes::Bytes;
use colo_proto::ram::PageSet;
use rustix::event::{PollFd, PollFlags, poll};

use super::{Subject, Verdict, examine};
use crate::embed::{Orders, Pages, Port, Vm, World, embed};

/// Examines a VM that has not run: [`examine`] of it, embedded. What the kit can count or break by
/// itself, [`Subject::left`] and [`Subject::fail`], it does.
///
/// # Errors
/// When it cannot be embedded, or there is no thread for it.
pub fn examine_vm<V, P>(
    vm: V,
    pages: P,
    port: Arc<dyn Port>,
    mut subject: Subject,
) -> Result<Vec<Verdict>, String>
where
    V: Vm + Send + 'static,
    P: Pages + Clone + Send + 'static,
{
    let left = Arc::new(AtomicU64::new(0));
    let fail = Arc::new(AtomicBool::new(false));
    let world = Counter(Arc::clone(&left));
    let (guest, orders) = embed(pages, port, world).map_err(|error| error.to_string())?;
    let flaky = Flaky {
        vm,
        fail: Arc::clone(&fail),
    };
    let served = thread::Builder::new()
        .name("vm".to_owned())
        .spawn(move || serve(flaky, orders))
        .map_err(|error| error.to_string())?;
    subject.left = Some(Box::new(move || left.load(Ordering::Acquire)));
    subject.fail = Some(Box::new(move || fail.store(true, Ordering::Release)));
    let verdicts = examine(guest, subject);
    served
        .join()
        .map_err(|_| "the thread that serves the VM panicked".to_owned())?;
    Ok(verdicts)
}

fn serve<V: Vm, P: Pages>(mut vm: Flaky<V>, mut orders: Orders<P>) {
    let bell = orders.descriptor();
    while orders.serve(&mut vm) {
        // SAFETY: open for as long as `orders`.
        let bell = unsafe { BorrowedFd::borrow_raw(bell) };
        // Interrupted is as good as rung.
        let _interrupted = poll(&mut [PollFd::new(&bell, PollFlags::IN)], None);
    }
    let _paused = vm.pause();
}

/// Counts what leaves.
struct Counter(Arc<AtomicU64>);

impl World for Counter {
    fn descriptor(&self) -> Option<RawFd> {
        None
    }

    fn receive(&mut self) -> Option<Bytes> {
        None
    }

    fn send(&mut self, _: &[u8]) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    fn announce(&mut self) {}
}

/// A VM whose next `save` fails when it is told to.
struct Flaky<V> {
    vm: V,
    fail: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Fault<E> {
    Told,
    Own(E),
}

impl<E: fmt::Display> fmt::Display for Fault<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told => f.write_str("told to fail"),
            Self::Own(error) => error.fmt(f),
        }
    }
}

impl<V: Vm> Vm for Flaky<V> {
    type Error = Fault<V::Error>;

    fn pause(&mut self) -> Result<(), Self::Error> {
        self.vm.pause().map_err(Fault::Own)
    }

    fn resume(&mut self) -> Result<(), Self::Error> {
        self.vm.resume().map_err(Fault::Own)
    }

    fn running(&self) -> bool {
        self.vm.running()
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), Self::Error> {
        self.vm.harvest(dirty).map_err(Fault::Own)
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), Self::Error> {
        if self.fail.swap(false, Ordering::AcqRel) {
            return Err(Fault::Told);
        }
        self.vm.save(state).map_err(Fault::Own)
    }

    fn check(&mut self, state: &[u8]) -> Result<(), Self::Error> {
        self.vm.check(state).map_err(Fault::Own)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Self::Error> {
        self.vm.load(state).map_err(Fault::Own)
    }
}
