//! What a frame is and where its parts are.

use etherparse::{IpNumber, Ipv4Slice, Ipv6ExtensionSlice, Ipv6Slice, TcpSlice};
use thiserror::Error;

use super::{
    key::{FlowKey, Heading, mapped},
    tcp::Segment,
};

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLANS: [u16; 3] = [0x8100, 0x88a8, 0x9100];
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const AUTHENTICATION: u8 = 51;
/// `flags` of a virtio-net header: the checksum is still to be filled in.
const NEEDS_CSUM: u8 = 1;

/// A frame, taken apart. All places are counted from the beginning of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The conversation.
    pub key: FlowKey,
    /// What the IP packet carries.
    pub content: Content,
    /// Where the transport header begins; of other frames, what follows the ethertype.
    pub transport: usize,
    /// Where the packet ends. Padding follows it.
    pub end: usize,
    /// The transport checksum covers the pseudo-header only: the card fills it in.
    pub partial: bool,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A TCP segment.
    Tcp(Segment),
    /// A UDP datagram.
    Udp,
    /// An ICMP or ICMPv6 message.
    Icmp {
        /// Its type.
        kind: u8,
    },
    /// Another protocol over IP.
    Ip,
    /// A part of an IP datagram.
    Fragment(Fragment),
    /// Not IP.
    Other {
        /// What it says that it is.
        ethertype: u16,
    },
}

/// Which part of which datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The sender's number for the datagram.
    pub id: u32,
    /// Where the part belongs, in bytes.
    pub offset: usize,
    /// Whether others follow.
    pub more: bool,
}

/// Why a frame cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Unreadable {
    /// It ends inside a header.
    #[error("the frame ends inside its {0} header, at byte {1}")]
    Short(&'static str, usize),
    /// A header contradicts itself or the length of the frame.
    #[error("the {0} header at byte {1} contradicts itself or the frame's length")]
    Bad(&'static str, usize),
}

impl View {
    /// Takes a frame apart that begins with `header` bytes of virtio-net header.
    ///
    /// # Errors
    /// [`Unreadable`], if a header is cut off or wrong.
    pub fn new(frame: &[u8], header: usize, heading: Heading) -> Result<Self, Unreadable> {
        let mut at = header.saturating_add(12);
        let mut ethertype = be16(frame, at).ok_or(Unreadable::Short("Ethernet", at))?;
        let mut vlans = [0; 2];
        for vlan in &mut vlans {
            if !VLANS.contains(&ethertype) {
                break;
            }
            let tag = be16(frame, at + 2).ok_or(Unreadable::Short("VLAN", at))?;
            *vlan = (tag & 0x0fff) + 1;
            at += 4;
            ethertype = be16(frame, at).ok_or(Unreadable::Short("VLAN", at))?;
        }
        at += 2;
        let mut view = match ethertype {
            IPV4 => Self::v4(frame, at, heading, vlans)?,
            IPV6 => Self::v6(frame, at, heading, vlans)?,
            _ => Self {
                key: FlowKey::OPAQUE,
                content: Content::Other { ethertype },
                transport: at,
                end: frame.len(),
                partial: false,
            },
        };
        view.partial = is_partial(frame, header, view.transport);
        Ok(view)
    }

    fn v4(frame: &[u8], at: usize, heading: Heading, vlans: [u16; 2]) -> Result<Self, Unreadable> {
        let bytes = frame.get(at..).unwrap_or_default();
        let ip = Ipv4Slice::from_slice(bytes).map_err(|_| Unreadable::Bad("IPv4", at))?;
        let header = ip.header();
        let ends = [mapped(header.source()), mapped(header.destination())];
        let end = at + usize::from(header.total_len());
        let mut protocol = header.protocol().0;
        let mut transport = at + usize::from(header.ihl()) * 4;
        let fragment = header.is_fragmenting_payload().then(|| Fragment {
            id: u32::from(header.identification()),
            offset: usize::from(header.fragments_offset().byte_offset()),
            more: header.more_fragments(),
        });
        if fragment.is_none() && ip.extensions().auth.is_some() {
            // Signed: compared as it is, and never changed.
            protocol = AUTHENTICATION;
            transport = transport.min(end);
        }
        Self::ip(
            frame,
            heading,
            vlans,
            ends,
            protocol,
            [transport, end],
            fragment,
        )
    }

    fn v6(frame: &[u8], at: usize, heading: Heading, vlans: [u16; 2]) -> Result<Self, Unreadable> {
        let bytes = frame.get(at..).unwrap_or_default();
        let ip = Ipv6Slice::from_slice(bytes).map_err(|_| Unreadable::Bad("IPv6", at))?;
        let header = ip.header();
        let ends = [
            u128::from_be_bytes(header.source()),
            u128::from_be_bytes(header.destination()),
        ];
        let mut protocol = ip.payload().ip_number.0;
        let mut transport = at + header.header_len() + ip.extensions().slice().len();
        let end = transport + ip.payload().payload.len();
        let mut fragment = None;
        for extension in ip.extensions().clone() {
            match extension {
                Ipv6ExtensionSlice::Fragment(part) if part.is_fragmenting_payload() => {
                    fragment = Some(Fragment {
                        id: part.identification(),
                        offset: usize::from(part.fragment_offset().byte_offset()),
                        more: part.more_fragments(),
                    });
                }
                Ipv6ExtensionSlice::Authentication(_) => {
                    protocol = AUTHENTICATION;
                    transport = at + header.header_len();
                }
                _ => {}
            }
        }
        Self::ip(
            frame,
            heading,
            vlans,
            ends,
            protocol,
            [transport, end],
            fragment,
        )
    }

    fn ip(
        frame: &[u8],
        heading: Heading,
        vlans: [u16; 2],
        ends: [u128; 2],
        protocol: u8,
        [transport, end]: [usize; 2],
        fragment: Option<Fragment>,
    ) -> Result<Self, Unreadable> {
        let view = |ports, content| Self {
            key: FlowKey::new(heading, ends, ports, protocol, vlans),
            content,
            transport,
            end,
            partial: false,
        };
        if let Some(fragment) = fragment {
            return Ok(view([0; 2], Content::Fragment(fragment)));
        }
        let body = frame
            .get(transport..end)
            .ok_or(Unreadable::Short("IP", transport))?;
        let (ports, content) = transport_of(IpNumber(protocol), body, transport)?;
        Ok(view(ports, content))
    }

    /// The view of a datagram that was put together from fragments with this key: the same parts,
    /// counted from the beginning of its transport header.
    ///
    /// # Errors
    /// [`Unreadable`], if the transport header is cut off or wrong.
    pub fn of_whole(key: FlowKey, body: &[u8], heading: Heading) -> Result<Self, Unreadable> {
        let (ports, content) = transport_of(IpNumber(key.protocol), body, 0)?;
        let (our_port, their_port) = match (heading, ports) {
            (Heading::FromGuest, [from, to]) => (from, to),
            (Heading::ToGuest, [from, to]) => (to, from),
        };
        Ok(Self {
            key: FlowKey {
                our_port,
                their_port,
                ..key
            },
            content,
            transport: 0,
            end: body.len(),
            partial: false,
        })
    }

    /// Where the transport's payload is: of TCP what follows the header, otherwise all of it.
    #[must_use]
    pub const fn payload(&self) -> core::ops::Range<usize> {
        let skip = match self.content {
            Content::Tcp(segment) => segment.header,
            _ => 0,
        };
        self.transport + skip..self.end
    }

    /// Where the transport's checksum is, from the beginning of the transport header.
    #[must_use]
    pub const fn checksum(&self) -> Option<usize> {
        match self.content {
            Content::Tcp(_) => Some(16),
            Content::Udp => Some(6),
            Content::Icmp { .. } => Some(2),
            _ => None,
        }
    }
}

fn transport_of(
    protocol: IpNumber,
    body: &[u8],
    at: usize,
) -> Result<([u16; 2], Content), Unreadable> {
    let port = |at| be16(body, at).unwrap_or(0);
    Ok(match protocol.0 {
        TCP => {
            let tcp = TcpSlice::from_slice(body).map_err(|_| Unreadable::Bad("TCP", at))?;
            (
                [tcp.source_port(), tcp.destination_port()],
                Content::Tcp(Segment::new(&tcp)),
            )
        }
        UDP if body.len() < 8 => return Err(Unreadable::Short("UDP", at)),
        UDP => ([port(0), port(2)], Content::Udp),
        ICMP | ICMPV6 => match body.first() {
            Some(kind) if body.len() >= 4 => ([0; 2], Content::Icmp { kind: *kind }),
            _ => return Err(Unreadable::Short("ICMP", at)),
        },
        _ => ([0; 2], Content::Ip),
    })
}

fn is_partial(frame: &[u8], header: usize, transport: usize) -> bool {
    if header < 10 {
        return false;
    }
    let start = match frame.get(6..8) {
        Some([low, high]) => usize::from(u16::from_le_bytes([*low, *high])),
        _ => return false,
    };
    frame.first().is_some_and(|flags| flags & NEEDS_CSUM != 0) && start + header == transport
}

pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes([*pair.first()?, *pair.last()?]))
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};
    use proptest::prelude::*;

    use super::{super::sample::Sample, *};

    #[test]
    fn segments_are_found_behind_tags_options_padding_and_a_virtio_header() {
        for sample in Sample::every() {
            for header in [0, 12] {
                let mut frame = vec![0; header];
                frame.extend(sample.tcp(7, b"hello"));
                frame.extend([0; 9]);
                let view = View::new(&frame, header, Heading::FromGuest).unwrap();
                let Content::Tcp(segment) = view.content else {
                    panic!("{view:?}");
                };
                assert_eq!((segment.seq, segment.ack), (7, Some(100)), "{sample:?}");
                assert_eq!(&frame[view.payload()], b"hello", "{sample:?}");
                assert_eq!((view.key.our_port, view.key.their_port), (80, 4000));
                assert_eq!(
                    view.key.vlans.iter().filter(|v| **v > 0).count(),
                    sample.tags
                );
            }
        }
    }

    #[test]
    fn arp_and_frames_that_are_cut_off_have_their_names() {
        let arp = [&[0; 12][..], &[8, 6], &[0; 28]].concat();
        let view = View::new(&arp, 0, Heading::FromGuest).unwrap();
        assert_eq!(view.content, Content::Other { ethertype: 0x0806 });
        assert_eq!(
            View::new(&arp[..13], 0, Heading::FromGuest),
            Err(Unreadable::Short("Ethernet", 12))
        );
        let bad = [&[0; 12][..], &[8, 0], &[0x45; 10]].concat();
        assert_eq!(
            View::new(&bad, 0, Heading::FromGuest),
            Err(Unreadable::Bad("IPv4", 14))
        );
    }

    #[test]
    fn signed_packets_keep_the_protocol_of_the_signature() {
        let sample = Sample::every().next().unwrap();
        let mut frame = sample.tcp(1, b"x");
        frame[23] = 51;
        let view = View::new(&frame, 0, Heading::FromGuest);
        assert!(
            view.is_err() || view.unwrap().content == Content::Ip,
            "a TCP header is not a signature"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_and_every_place_is_inside(
            head in prop::sample::select(vec![0usize, 10, 12, 20]),
            ethertype in prop::sample::select(vec![0x0800u16, 0x86dd, 0x8100, 0x88a8, 0x0806]),
            start in prop::sample::select(vec![0x45u8, 0x60, 0x4f]),
            rest in prop::collection::vec(any::<u8>(), 0..120),
        ) {
            let mut frame: Vec<u8> = vec![1; head + 12];
            frame.extend(ethertype.to_be_bytes());
            frame.push(start);
            frame.extend(&rest);
            if let Ok(view) = View::new(&frame, head, Heading::ToGuest) {
                prop_assert!(view.transport <= view.end && view.end <= frame.len());
                prop_assert!(frame.get(view.payload()).is_some());
            }
        }
    }
}
