//! A whole VMM over kvm-ioctls with one vCPU, RAM, and a card of two I/O ports, made fault tolerant
//! with `colo_driver_mio::embed`. What an author of a VMM writes is this file.

use std::{
    os::fd::{AsRawFd as _, RawFd},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use colo_driver_kvm::capture::KvmLog;
use colo_driver_mio::{
    Driver,
    embed::{Card, EmbeddedGuest, Host, Orders, Ram, Vm, World, card, embed},
    priority::Priority,
};
use colo_proto::{
    id::Slot,
    member::{MacKey, VmId},
    node::{Node, Start},
    ram::PageSet,
};
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Guest RAM: one slot.
pub(crate) const RAM: usize = 4 << 20;
pub(crate) const SLOT: Slot = Slot(0);
/// Where the guest keeps the last number that it wrote, and how many frames it heard.
pub(crate) const WRITTEN: u64 = 0x4000;
pub(crate) const HEARD: u64 = 0x4008;
/// What it says goes to one port, what it hears comes from the other.
const SAY: u16 = 0x10;
const HEAR: u16 = 0x12;
/// Where it is put, and begins.
const ENTRY: u64 = 0x1000;
/// `n += 1; WRITTEN = n; a page among 256 = n; say n; if hear() != 0 { HEARD += 1 }`, for ever.
const PROGRAM: [u8; 47] = [
    0x8b, 0x1d, 0x00, 0x40, 0x00, 0x00, // mov ebx, [WRITTEN]
    0x43, // 1: inc ebx
    0x89, 0x1d, 0x00, 0x40, 0x00, 0x00, // mov [WRITTEN], ebx
    0x89, 0xd8, 0x25, 0xff, 0x00, 0x00, 0x00, // mov eax, ebx; and eax, 255
    0xc1, 0xe0, 0x0c, // shl eax, 12
    0x89, 0x98, 0x00, 0x00, 0x10, 0x00, // mov [eax + 1 MiB], ebx
    0x89, 0xd8, 0xe7, 0x10, // mov eax, ebx; out SAY, eax
    0xe5, 0x12, 0x85, 0xc0, 0x74, 0xdf, // in eax, HEAR; test eax, eax; jz 1b
    0xff, 0x05, 0x08, 0x40, 0x00, 0x00, // inc dword [HEARD]
    0xeb, 0xd7, // jmp 1b
];
/// What the guest waits when nobody says anything to it.
const IDLE: Duration = Duration::from_micros(500);

/// The machine, as the thread that owns it has it.
pub(crate) struct Machine {
    log: KvmLog,
    cpu: Arc<Cpu>,
    thread: Option<JoinHandle<()>>,
    ram: NonNull<u8>,
    /// Nothing is in RAM yet.
    fresh: bool,
    _vm: VmFd,
}

// SAFETY: `ram` is memory of the process, which is never unmapped.
unsafe impl Send for Machine {}

/// Shared with the vCPU's thread.
struct Cpu {
    fd: Mutex<VcpuFd>,
    runs: AtomicBool,
    ends: AtomicBool,
    card: Arc<Card>,
}

impl Machine {
    /// A machine that has not run, its memory, and its card.
    pub(crate) fn new() -> Result<(Self, Ram, Arc<Card>), Failure> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        vm.set_tss_address(0xfffb_d000)?;
        KvmLog::enable(&vm)?;
        let ram = map(RAM)?;
        let region = kvm_userspace_memory_region {
            slot: SLOT.0.into(),
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: ram.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: mapped so long, for ever, and the only slot.
        unsafe { vm.set_user_memory_region(region) }?;
        let mut pages = Ram::new();
        // SAFETY: as above; this file touches it through raw pointers only.
        unsafe { pages.add(SLOT, ram, RAM) }?;
        let (card, fd) = (card()?, vm.create_vcpu(0)?);
        let cpu = Arc::new(Cpu {
            fd: Mutex::new(fd),
            runs: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            card: Arc::clone(&card),
        });
        let log = KvmLog::new(&vm, &[(SLOT, RAM as u64 >> 12)])?;
        let ours = Arc::clone(&cpu);
        let thread = thread::spawn(move || ours.run());
        let machine = Self {
            log,
            cpu,
            thread: Some(thread),
            ram,
            fresh: true,
            _vm: vm,
        };
        Ok((machine, pages, card))
    }

    fn boot(&mut self) -> Result<(), Failure> {
        // SAFETY: within RAM, and nothing runs yet.
        let at = unsafe { self.ram.add(ENTRY as usize) };
        // SAFETY: as above; the program does not overlap itself.
        unsafe { at.copy_from_nonoverlapping(NonNull::from(&PROGRAM).cast(), PROGRAM.len()) };
        let fd = self.cpu.lock();
        let mut sregs = fd.get_sregs()?;
        let flat = |kind, selector| kvm_segment {
            limit: u32::MAX,
            selector,
            type_: kind,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..kvm_segment::default()
        };
        (sregs.cs, sregs.ds) = (flat(11, 8), flat(3, 16));
        (sregs.es, sregs.ss, sregs.fs, sregs.gs) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
        sregs.cr0 |= 1;
        fd.set_sregs(&sregs)?;
        fd.set_regs(&kvm_regs {
            rip: ENTRY,
            rflags: 2,
            ..kvm_regs::default()
        })?;
        Ok(())
    }

    fn parse(state: &[u8]) -> Result<(kvm_regs, kvm_sregs), Failure> {
        Ok(serde_json::from_slice(state)?)
    }
}

impl Vm for Machine {
    type Error = Failure;

    fn pause(&mut self) -> Result<(), Failure> {
        if !self.cpu.runs.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        // The program leaves the vCPU all the time; one that does not needs a signal here.
        let mut fd = self.cpu.lock();
        // Ends the port access that is under way, so that the registers are those after it.
        fd.set_kvm_immediate_exit(1);
        let interrupted = fd.run().is_err_and(|error| error.errno() == libc::EINTR);
        fd.set_kvm_immediate_exit(0);
        if interrupted {
            return Ok(());
        }
        Err("the vCPU ran on".into())
    }

    fn resume(&mut self) -> Result<(), Failure> {
        if std::mem::take(&mut self.fresh) {
            self.boot()?;
        }
        self.cpu.runs.store(true, Ordering::Release);
        self.thread.iter().for_each(|t| t.thread().unpark());
        Ok(())
    }

    fn running(&self) -> bool {
        self.cpu.runs.load(Ordering::Acquire)
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), Failure> {
        Ok(self.log.collect(dirty, |_, _| ())?)
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), Failure> {
        let fd = self.cpu.lock();
        Ok(serde_json::to_writer(
            state,
            &(fd.get_regs()?, fd.get_sregs()?),
        )?)
    }

    fn check(&mut self, state: &[u8]) -> Result<(), Failure> {
        Self::parse(state).map(drop)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        let (regs, sregs) = Self::parse(state)?;
        let fd = self.cpu.lock();
        fd.set_sregs(&sregs)?;
        fd.set_regs(&regs)?;
        self.fresh = false;
        Ok(())
    }
}

impl Cpu {
    fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while !self.ends.load(Ordering::Acquire) {
            if !self.runs.load(Ordering::Acquire) {
                thread::park_timeout(Duration::from_secs(1));
                continue;
            }
            let mut idle = false;
            {
                let mut fd = self.lock();
                if !self.runs.load(Ordering::Acquire) {
                    continue;
                }
                match fd.run() {
                    Ok(VcpuExit::IoOut(SAY, number)) => {
                        self.card.say(frame(number));
                    }
                    Ok(VcpuExit::IoIn(HEAR, answer)) => {
                        let heard = self.card.hear().is_some();
                        answer.fill(heard.into());
                        idle = !heard;
                    }
                    Err(error) if error.errno() == libc::EINTR => {}
                    other => panic!("the guest did {other:?}"),
                }
            }
            if idle {
                thread::sleep(IDLE);
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.cpu.ends.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _panicked = thread.join();
        }
    }
}

/// An Ethernet frame of an experimental type, to everyone, that carries a number.
pub(crate) fn frame(number: &[u8]) -> Bytes {
    let mut frame = vec![0xff; 6];
    frame.extend([0x02, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    frame.extend(number);
    frame.resize(60, 0);
    frame.into()
}

/// A cable between the card and whoever is at `there`.
pub(crate) struct Cable {
    socket: UnixDatagram,
    there: PathBuf,
}

impl Cable {
    pub(crate) fn plug(here: &Path, there: &Path) -> Result<Self, Failure> {
        let socket = UnixDatagram::bind(here)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            there: there.to_owned(),
        })
    }
}

impl World for Cable {
    fn descriptor(&self) -> Option<RawFd> {
        Some(self.socket.as_raw_fd())
    }

    fn receive(&mut self) -> Option<Bytes> {
        let mut buffer = [0; 2048];
        let len = self.socket.recv(&mut buffer).ok()?;
        buffer.get(..len).map(Bytes::copy_from_slice)
    }

    fn send(&mut self, frame: &[u8]) {
        // A full cable drops.
        let _full = self.socket.send_to(frame, &self.there);
    }

    fn announce(&mut self) {
        // The other end of this cable takes frames from either host.
    }
}

type Loop = Driver<Node, EmbeddedGuest<Ram, Cable>>;

/// Host `node` of a pair whose sockets and files are in `dir`.
pub(crate) fn host(
    dir: &Path,
    node: u64,
    start: Start,
) -> Result<(Loop, Orders<Ram>, Machine), Failure> {
    let (machine, ram, card) = Machine::new()?;
    let at = |node: u64, what: &str| dir.join(format!("{node}-{what}"));
    let unix = |node, what| format!("unix:{}", at(node, what).display()).parse();
    let cable = Cable::plug(&at(node, "cable"), &dir.join("cable"))?;
    let (guest, orders) = embed(ram, card, cable)?;
    let peer = 3 - node;
    let driver = Host::new(VmId([7; 16]), node, MacKey(*b"sixteen or more!"))
        .link(unix(node, "pair")?, unix(peer, "pair")?)
        .path(unix(node, "beat-a")?, unix(peer, "beat-a")?)
        .path(unix(node, "beat-b")?, unix(peer, "beat-b")?)
        .arbiter_file(dir.join("register"))
        .state_dir(dir.join(format!("{node}-state")))
        .shape("machine", "one vCPU and two ports")
        .protocol(|protocol| protocol.longest(Duration::from_millis(20)))
        .priority(Priority::Normal)
        .build(start, &[(SLOT, RAM as u64 >> 12)], guest)?;
    Ok((driver, orders, machine))
}

/// Serves the orders of the loop until it ends.
pub(crate) fn serve(mut machine: Machine, mut orders: Orders<Ram>) {
    let mut wait = [libc::pollfd {
        fd: orders.descriptor(),
        events: libc::POLLIN,
        revents: 0,
    }];
    while orders.serve(&mut machine) {
        // SAFETY: one descriptor, which lives as long as `orders`.
        unsafe { libc::poll(wait.as_mut_ptr(), 1, -1) };
    }
}

fn map(bytes: usize) -> Result<NonNull<u8>, Failure> {
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    );
    // SAFETY: a new mapping at an address the kernel picks, never unmapped.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    NonNull::new(at.cast()).ok_or_else(|| "mapped at zero".into())
}
