//! Frames for tests, built field by field.

use alloc::{vec, vec::Vec};

/// How a frame is wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) v6: bool,
    /// VLAN tags.
    pub(crate) tags: usize,
    /// Bytes of IPv4 options, or of an IPv6 extension header.
    pub(crate) extra: usize,
    /// The guest's port, then the client's.
    pub(crate) ports: [u16; 2],
    /// From the guest, or to it.
    pub(crate) from_guest: bool,
    pub(crate) ack: Option<u32>,
    pub(crate) flags: u8,
    pub(crate) protocol: u8,
}

impl Sample {
    pub(crate) const PLAIN: Self = Self {
        v6: false,
        tags: 0,
        extra: 0,
        ports: [80, 4000],
        from_guest: true,
        ack: Some(100),
        flags: 0,
        protocol: 6,
    };

    pub(crate) fn every() -> impl Iterator<Item = Self> {
        [(false, 0), (false, 8), (true, 0), (true, 8)]
            .into_iter()
            .flat_map(|(v6, extra)| {
                [0, 1, 2].map(|tags| Self {
                    v6,
                    tags,
                    extra,
                    ..Self::PLAIN
                })
            })
    }

    fn addresses(&self) -> [Vec<u8>; 2] {
        let (guest, client) = if self.v6 {
            let end = |last| {
                let mut address = vec![0; 16];
                (address[0], address[1], address[15]) = (0x20, 1, last);
                address
            };
            (end(7), end(1))
        } else {
            (vec![192, 0, 2, 7], vec![198, 51, 100, 1])
        };
        if self.from_guest {
            [guest, client]
        } else {
            [client, guest]
        }
    }

    pub(crate) fn pseudo_header(&self, len: usize) -> Vec<u8> {
        let [source, destination] = self.addresses();
        let len = len as u16;
        let mut out = [source, destination].concat();
        if self.v6 {
            out.extend([0, 0]);
            out.extend(len.to_be_bytes());
            out.extend([0, 0, 0, self.protocol]);
        } else {
            out.extend([0, self.protocol]);
            out.extend(len.to_be_bytes());
        }
        out
    }

    /// A segment with timestamps-sized padding as options.
    pub(crate) fn tcp(&self, seq: u32, payload: &[u8]) -> Vec<u8> {
        self.tcp_with(seq, &[1; 12], payload)
    }

    pub(crate) fn tcp_with(&self, seq: u32, options: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut options = options.to_vec();
        options.resize(options.len().next_multiple_of(4), 1);
        let mut body = self.ports_as_sent();
        body.extend(seq.to_be_bytes());
        body.extend(self.ack.unwrap_or(0).to_be_bytes());
        let flags = self.flags | if self.ack.is_some() { 16 } else { 0 };
        body.extend([((5 + options.len() / 4) as u8) << 4, flags]);
        body.extend([0xff, 0xff, 0, 0, 0, 0]);
        body.extend(&options);
        body.extend(payload);
        self.ip(body, Some(16))
    }

    pub(crate) fn udp(&self, payload: &[u8]) -> Vec<u8> {
        let sample = Self {
            protocol: 17,
            ..*self
        };
        sample.ip(sample.udp_body(payload), Some(6))
    }

    pub(crate) fn udp_body(&self, payload: &[u8]) -> Vec<u8> {
        let mut body = self.ports_as_sent();
        body.extend(((8 + payload.len()) as u16).to_be_bytes());
        body.extend([0, 0]);
        body.extend(payload);
        body
    }

    fn ports_as_sent(&self) -> Vec<u8> {
        let [guest, client] = self.ports.map(u16::to_be_bytes);
        if self.from_guest {
            [guest, client].concat()
        } else {
            [client, guest].concat()
        }
    }

    /// An IP packet around `body`, whose checksum at this place is made right.
    pub(crate) fn ip(&self, mut body: Vec<u8>, checksum: Option<usize>) -> Vec<u8> {
        if let Some(at) = checksum {
            let sum = self
                .pseudo_header(body.len())
                .chunks(2)
                .chain(body.chunks(2))
                .fold(0u32, |sum, pair| {
                    let low = pair.get(1).copied().unwrap_or(0);
                    let sum = sum + u32::from(u16::from_be_bytes([pair[0], low]));
                    (sum & 0xffff) + (sum >> 16)
                });
            body[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        }
        self.packet(&body, [0x1234, 0])
    }

    /// Part of a datagram: `offset` in units of 8 bytes, with the flag for more.
    pub(crate) fn fragment(&self, body: &[u8], id: u16, offset: u16, more: bool) -> Vec<u8> {
        assert!(!self.v6, "only IPv4 here");
        self.packet(body, [id, offset | u16::from(more) << 13])
    }

    fn packet(&self, body: &[u8], [id, part]: [u16; 2]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for tag in 0..self.tags {
            frame.extend(if tag == 0 && self.tags == 2 {
                [0x88, 0xa8]
            } else {
                [0x81, 0]
            });
            frame.extend([0x60, 7 + tag as u8]);
        }
        let [source, destination] = self.addresses();
        let len = (body.len() + self.extra) as u16;
        if self.v6 {
            let next = if self.extra > 0 { 60 } else { self.protocol };
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(len.to_be_bytes());
            frame.extend([next, 64]);
            frame.extend(source);
            frame.extend(destination);
            if self.extra > 0 {
                // Destination options, padded.
                frame.extend([self.protocol, 0, 1, 4, 0, 0, 0, 0]);
            }
        } else {
            let words = 5 + (self.extra / 4) as u8;
            frame.extend([0x08, 0x00, 0x40 | words, 0]);
            frame.extend((20 + len).to_be_bytes());
            frame.extend(id.to_be_bytes());
            frame.extend(part.to_be_bytes());
            frame.extend([64, self.protocol, 0, 0]);
            frame.extend(source);
            frame.extend(destination);
            frame.extend(vec![1; self.extra]);
        }
        frame.extend(body);
        frame
    }
}
