//! The TCP header with the options that matter to the proxy, by value and by place.

use etherparse::TcpSlice;

/// TCP flags.
pub mod flag {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 2;
    /// Reset the connection.
    pub const RST: u8 = 4;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 16;
}

/// The timestamps option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp {
    /// The sender's clock.
    pub value: u32,
    /// The clock of the other end that it has seen last.
    pub echo: u32,
    /// Where the value stands, from the beginning of the TCP header; the echo follows it.
    pub at: usize,
}

/// Options of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Largest segment.
    pub mss: Option<u16>,
    /// Window scale.
    pub scale: Option<u8>,
    /// Whether selective acknowledgements are permitted.
    pub sack_permitted: bool,
    /// Timestamps.
    pub timestamp: Option<Timestamp>,
    /// Selective acknowledgements: where the first edge stands, from the beginning of the TCP header,
    /// and how many blocks of two edges there are.
    pub sack: Option<(usize, usize)>,
    /// The segment is signed (MD5, TCP-AO): nothing in it can be changed.
    pub signed: bool,
}

/// A TCP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First sequence number.
    pub seq: u32,
    /// Acknowledgement number, if the flag says that it counts.
    pub ack: Option<u32>,
    /// [`flag`]s.
    pub flags: u8,
    /// Bytes of the header with its options.
    pub header: usize,
    /// The options.
    pub options: Options,
}

impl Segment {
    pub(super) fn new(tcp: &TcpSlice<'_>) -> Self {
        let flags = tcp.header_slice().get(13).copied().unwrap_or(0);
        Self {
            seq: tcp.sequence_number(),
            ack: tcp.ack().then(|| tcp.acknowledgment_number()),
            flags,
            header: tcp.header_len(),
            options: Options::new(tcp.options()),
        }
    }

    /// Whether any of these flags is set.
    #[must_use]
    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }
}

impl Options {
    /// Reads options; what is cut off or has a wrong length is left out, like the rest after it.
    fn new(bytes: &[u8]) -> Self {
        const HEADER: usize = 20;
        let mut options = Self::default();
        let mut at = 0;
        while let Some(&kind) = bytes.get(at) {
            match kind {
                0 => break,
                1 => {
                    at += 1;
                    continue;
                }
                _ => {}
            }
            let Some(len) = bytes.get(at + 1).map(|len| usize::from(*len)) else {
                break;
            };
            let Some(body) = bytes.get(at + 2..at + len).filter(|_| len >= 2) else {
                break;
            };
            let place = HEADER + at + 2;
            match (kind, body) {
                (2, [high, low]) => options.mss = Some(u16::from_be_bytes([*high, *low])),
                (3, [scale]) => options.scale = Some(*scale),
                (4, []) => options.sack_permitted = true,
                (5, edges) if !edges.is_empty() && edges.len() % 8 == 0 => {
                    options.sack = Some((place, edges.len() / 8));
                }
                (8, [a, b, c, d, e, f, g, h]) => {
                    options.timestamp = Some(Timestamp {
                        value: u32::from_be_bytes([*a, *b, *c, *d]),
                        echo: u32::from_be_bytes([*e, *f, *g, *h]),
                        at: place,
                    });
                }
                (19 | 29, _) => options.signed = true,
                _ => {}
            }
            at += len;
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_that_matters_is_found_where_it_stands() {
        let bytes = [
            2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 3, 1, 3, 3, 7, 5, 10, 0, 0, 0, 1,
            0, 0, 0, 2, 19, 4, 0, 0, 0, 2, 4,
        ];
        let options = Options::new(&bytes);
        assert_eq!(options.mss, Some(1460));
        assert_eq!(options.scale, Some(7));
        assert!(options.sack_permitted && options.signed);
        let stamp = options.timestamp.unwrap();
        assert_eq!((stamp.value, stamp.echo, stamp.at), (9, 3, 28));
        assert_eq!(options.sack, Some((42, 1)));
    }

    #[test]
    fn options_that_are_cut_off_end_the_list() {
        for bytes in [&[8u8, 10, 0][..], &[8], &[8, 1, 0], &[5, 2], &[2, 3, 1]] {
            assert_eq!(Options::new(bytes), Options::default(), "{bytes:?}");
        }
    }
}
