//! A tap: the host's end of a network card, one frame a call.
//!
//! Every frame on a tap has the 12-byte header of virtio (`IFF_VNET_HDR`). Without offloads it says nothing: it is
//! added and taken off here, so that frames look as [`Virtio<Net>`](crate::device::virtio::Virtio) gives and takes them
//! with the same [`Offloads`].

use std::ffi::{c_int, c_ulong};
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketType};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use crate::device::virtio::{Offloads, VNET_HEADER};

const DEVICE: &str = "/dev/net/tun";
const HEADER: [u8; VNET_HEADER] = [0; VNET_HEADER];

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// No interface can have that name.
    #[error(
        "tap name {name:?} is not one: expected 1 to 15 bytes without '/', ':', '%' or white space"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The kernel has no tun driver, or it is not mounted here.
    #[error(
        "{DEVICE} is not there, needed for tap {name}; load the module tun, or give the container that device"
    )]
    NoDevice {
        /// The tap.
        name: String,
    },
    /// Not allowed.
    #[error(
        "no permission for tap {name}; run with CAP_NET_ADMIN, or create it for this user: \
         ip tuntap add dev {name} mode tap vnet_hdr user NAME"
    )]
    Permission {
        /// The tap.
        name: String,
    },
    /// Another process has it open.
    #[error("tap {name} is in use; stop the process that has it open, or use another name")]
    Busy {
        /// The tap.
        name: String,
    },
    /// There is an interface of that name which is no tap, or one made with other flags.
    #[error(
        "interface {name} cannot be opened as a single-queue tap; remove it, or use another name"
    )]
    OtherKind {
        /// The interface.
        name: String,
    },
    /// Anything else.
    #[error("tap {name}: {step} failed")]
    Io {
        /// The tap.
        name: String,
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// An open tap. The interface disappears with it, unless it was made persistent.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    offloads: Offloads,
    /// Any socket of this network namespace: what is asked of interfaces is asked there.
    control: OwnedFd,
}

impl Tap {
    /// Opens the tap of that name, or creates it. It stays down, and has no address: both are the operator's. Frames
    /// it gives are whole until [`set_offloads`](Self::set_offloads) says that the guest takes others.
    ///
    /// # Errors
    ///
    /// [`TapError`], with what to do.
    pub fn open(name: &str, offloads: Offloads) -> Result<Self, TapError> {
        let mut request = libc::ifreq {
            ifr_name: interface_name(name)?,
            ifr_ifru: libc::__c_anonymous_ifr_ifru {
                // All three fit 15 bits.
                ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16,
            },
        };
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|source| because(name, "opening /dev/net/tun", source))?;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
        let result = unsafe { ioctl_with_mut_ref(&file, libc::TUNSETIFF, &mut request) };
        done(result).map_err(|source| because(name, "TUNSETIFF", source))?;
        let header = VNET_HEADER as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which `header` is.
        let result = unsafe { ioctl_with_ref(&file, libc::TUNSETVNETHDRSZ, &header) };
        done(result).map_err(|source| because(name, "TUNSETVNETHDRSZ", source))?;
        let control = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)
            .map_err(|source| because(name, "opening a socket", source.into()))?;
        let tap = Self {
            file,
            name: name.into(),
            offloads,
            control,
        };
        // Asked for once, so that a kernel that knows them not is found out now.
        tap.set_offloads(offloads)?;
        tap.set_offloads(Offloads::default())?;
        Ok(tap)
    }

    /// Whether frames pass: the interface is up and has a carrier. Neither is ours to change.
    ///
    /// # Errors
    ///
    /// The kernel does not tell, or the interface is gone.
    pub fn is_running(&self) -> io::Result<bool> {
        let mut request = libc::ifreq {
            ifr_name: interface_name(&self.name).map_err(io::Error::other)?,
            ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
        };
        // SAFETY: SIOCGIFFLAGS reads the name of one `ifreq` and writes its flags.
        let result = unsafe { ioctl_with_mut_ref(&self.control, libc::SIOCGIFFLAGS, &mut request) };
        done(result)?;
        // SAFETY: the kernel has just written the flags, and any bits are.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        let both = libc::IFF_UP | libc::IFF_RUNNING;
        Ok(flags & both == both)
    }

    /// What the kernel may leave undone in frames it gives; at most what the tap was opened with. Set it to what the
    /// guest agreed to ([`guest_offloads`](crate::device::virtio::Virtio::guest_offloads)).
    ///
    /// # Errors
    ///
    /// The kernel does not know one of them.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        let mut flags = 0;
        if offloads.checksum && self.offloads.checksum {
            flags |= libc::TUN_F_CSUM;
            if offloads.segmentation && self.offloads.segmentation {
                flags |= libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        let result =
            unsafe { ioctl_with_val(&self.file, libc::TUNSETOFFLOAD, c_ulong::from(flags)) };
        done(result).map_err(|source| because(&self.name, "TUNSETOFFLOAD", source))
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads one frame into `into`; what does not fit is cut off. `None` when there is none.
    ///
    /// # Errors
    ///
    /// The interface is gone or down.
    pub fn read_frame(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut header = HEADER;
        let skip = VNET_HEADER - self.offloads.header();
        let header = header.get_mut(..skip).unwrap_or_default();
        let mut parts = [IoSliceMut::new(header), IoSliceMut::new(into)];
        loop {
            match (&self.file).read_vectored(&mut parts) {
                Ok(len) => return Ok(Some(len.saturating_sub(skip))),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes one frame. `false` when the queue is full; the frame was not sent then.
    ///
    /// # Errors
    ///
    /// The interface is gone or down, or the frame is none.
    pub fn write_frame(&self, frame: &[u8]) -> io::Result<bool> {
        let skip = VNET_HEADER - self.offloads.header();
        let header = HEADER.get(..skip).unwrap_or_default();
        let parts = [IoSlice::new(header), IoSlice::new(frame)];
        loop {
            match (&self.file).write_vectored(&parts) {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// To wait for frames.
impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The name as the kernel takes it, ended by a zero.
fn interface_name(name: &str) -> Result<[libc::c_char; libc::IFNAMSIZ], TapError> {
    // '%' would make the kernel choose a number, which nobody here would know of.
    let forbidden = |byte: u8| byte.is_ascii_whitespace() || b"/:%\0".contains(&byte);
    let reserved = name == "." || name == "..";
    let fits = !name.is_empty() && name.len() < libc::IFNAMSIZ;
    if !fits || reserved || name.bytes().any(forbidden) {
        return Err(TapError::Name { name: name.into() });
    }
    let mut bytes = [0; libc::IFNAMSIZ];
    bytes
        .iter_mut()
        .zip(name.bytes())
        .for_each(|(to, from)| *to = from.cast_signed());
    Ok(bytes)
}

/// What the three ioctls of a tap return.
fn done(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn because(name: &str, step: &'static str, source: io::Error) -> TapError {
    let name = name.into();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDevice { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { name },
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EINVAL) if step == "TUNSETIFF" => TapError::OtherKind { name },
        _ => TapError::Io { name, step, source },
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::thread::UnshareFlags;
    use rustix::time::Timespec;
    use virtio_bindings::virtio_net::VIRTIO_NET_HDR_F_NEEDS_CSUM;

    use super::*;

    /// A tap in a network namespace of this thread's own, or `None` where that is not possible and not required.
    fn tap(offloads: Offloads) -> Option<Tap> {
        // SAFETY: only the network changes, for this thread and what it starts; no descriptor is affected.
        let alone = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
        let why = match alone {
            Err(error) => format!("no network namespace: {error}"),
            Ok(()) => match Tap::open("tap0", offloads) {
                Ok(tap) => return Some(tap),
                Err(error @ TapError::NoDevice { .. }) => error.to_string(),
                Err(error) => panic!("{error:?}"),
            },
        };
        let required = std::env::var("COLO_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|what| what == "netns"), "{why}");
        println!("SKIPPED: {why}");
        None
    }

    /// The next frame of an EtherType; the kernel says more than one is waiting for.
    fn next(tap: &Tap, ethertype: u16) -> Vec<u8> {
        let mut frame = [0; 2048];
        loop {
            if let Some(len) = tap.read_frame(&mut frame).unwrap() {
                if frame[tap.offloads.header() + 12..][..2] == ethertype.to_be_bytes() {
                    return frame[..len].to_vec();
                }
                continue;
            }
            let patience = Timespec {
                tv_sec: 10,
                tv_nsec: 0,
            };
            let mut ready = [PollFd::new(tap, PollFlags::IN)];
            assert_eq!(poll(&mut ready, Some(&patience)).unwrap(), 1, "silence");
        }
    }

    fn ip(arguments: &str) {
        let status = Command::new("ip")
            .args(arguments.split(' '))
            .status()
            .unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    #[test]
    fn names_that_cannot_be_are_refused_before_the_kernel_sees_them() {
        for name in [
            "",
            "a/b",
            "tap%d",
            "0123456789abcdef",
            "a b",
            "a:0",
            ".",
            "..",
            "a\0b",
        ] {
            let error = Tap::open(name, Offloads::default()).unwrap_err();
            assert!(matches!(error, TapError::Name { .. }), "{name:?}: {error}");
        }
        assert!(interface_name("0123456789abcde").is_ok());
    }

    #[test]
    fn a_tap_in_use_and_an_interface_that_is_none_are_told_apart() {
        let Some(tap) = tap(Offloads::default()) else {
            return;
        };
        let error = Tap::open(tap.name(), Offloads::default()).unwrap_err();
        assert!(matches!(error, TapError::Busy { .. }), "{error:?}");
        let error = Tap::open("lo", Offloads::default()).unwrap_err();
        assert!(matches!(error, TapError::OtherKind { .. }), "{error:?}");
    }

    const OURS: [u8; 6] = [2, 0, 0, 0, 0, 2];

    /// Sends a datagram to a neighbour behind the tap, and answers the kernel's question where that is.
    fn ping(tap: &Tap) {
        assert!(tap.write_frame(&[0; 72]).is_err(), "the interface is down");
        ip("link set tap0 up");
        ip("address add 192.0.2.1/30 dev tap0");
        let socket = std::net::UdpSocket::bind("192.0.2.1:0").unwrap();
        socket.send_to(b"ping", "192.0.2.2:9").unwrap();
        // Whose address is not known yet, so the kernel asks.
        let request = next(tap, 0x0806);
        let (header, arp) = request.split_at(tap.offloads.header());
        assert_eq!(arp.len(), 42);
        assert_eq!(arp[28..32], [192, 0, 2, 1]);
        assert_eq!(arp[38..42], [192, 0, 2, 2]);
        // The answer lets the datagram out: so the kernel understood it.
        let mut answer = arp.to_vec();
        answer.copy_within(6..12, 0);
        answer.copy_within(22..32, 32);
        answer[6..12].copy_from_slice(&OURS);
        answer[20..22].copy_from_slice(&[0, 2]);
        answer[22..28].copy_from_slice(&OURS);
        answer[28..32].copy_from_slice(&[192, 0, 2, 2]);
        assert!(tap.write_frame(&[header, &answer].concat()).unwrap());
    }

    #[test]
    fn frames_go_both_ways_without_a_header() {
        let Some(tap) = tap(Offloads::default()) else {
            return;
        };
        ping(&tap);
        let datagram = next(&tap, 0x0800);
        assert_eq!(datagram[..6], OURS);
        assert_eq!(datagram[42..], *b"ping");
    }

    #[test]
    fn a_checksum_is_left_out_only_for_a_guest_that_takes_that() {
        let all = Offloads {
            checksum: true,
            segmentation: true,
        };
        for taken in [Offloads::default(), all] {
            let Some(tap) = tap(all) else {
                return;
            };
            if taken.checksum {
                tap.set_offloads(taken).unwrap();
            }
            ping(&tap);
            let datagram = next(&tap, 0x0800);
            let (header, datagram) = datagram.split_at(VNET_HEADER);
            assert_eq!(datagram[42..], *b"ping");
            let undone = u32::from(header[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
            assert_eq!(undone, taken.checksum, "{header:?}");
        }
    }
}
