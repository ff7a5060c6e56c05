//! Which frames are neither compared nor held.

use crate::config::PassThrough;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86DD;
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const VLAN: u16 = 0x8100;

/// Whether the frame belongs to a class that the configuration lets through. A frame too short to
/// have an ethertype is held like any other.
pub(crate) fn passes(config: PassThrough, frame: &[u8]) -> bool {
    let mut at = config.header.saturating_add(12);
    let mut ethertype = be16(frame, at);
    if ethertype == Some(VLAN) {
        at = at.saturating_add(4);
        ethertype = be16(frame, at);
    }
    match ethertype {
        Some(ARP | RARP) => config.arp,
        Some(IPV4 | IPV6) | None => false,
        Some(_) => config.other,
    }
}

fn be16(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes([*bytes.first()?, *bytes.last()?]))
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};

    use super::*;

    fn frame(types: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend_from_slice(types);
        frame
    }

    #[test]
    fn only_configured_classes_pass_and_ip_never_does() {
        let all = PassThrough {
            arp: true,
            other: true,
            header: 0,
        };
        let behind_a_header = PassThrough { header: 12, ..all };
        let none = PassThrough::default();
        for (types, with_all) in [
            (&[0x08, 0x06][..], true),
            (&[0x81, 0, 0, 1, 0x08, 0x06], true),
            (&[0x88, 0xcc], true),
            (&[0x08, 0x00], false),
            (&[0x86, 0xdd], false),
            (&[0x81, 0, 0, 1, 0x08, 0x00], false),
            (&[0x08], false),
            (&[], false),
        ] {
            assert_eq!(passes(all, &frame(types)), with_all, "{types:x?}");
            let with_header = [&[0xff; 12], &frame(types)[..]].concat();
            assert_eq!(passes(behind_a_header, &with_header), with_all);
            assert!(!passes(none, &frame(types)), "{types:x?}");
        }
    }
}
