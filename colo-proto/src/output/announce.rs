//! Telling the network where an address now lives: frames to send after a takeover.
//!
//! Switches learn from the source address of any frame; neighbours must also drop what they cached when the survivor
//! answers at another hardware address. Frames are made here and sent like any other: through the gate, under a
//! permit, a few times over, since nobody acknowledges them.
//!
//! | frame | who learns | needs |
//! |---|---|---|
//! | [`reverse_arp`] | switches | the hardware address alone |
//! | [`gratuitous_arp`] | switches and IPv4 neighbours | an IPv4 address |
//! | [`unsolicited_advertisement`] | switches and IPv6 neighbours | an IPv6 address |

/// Bytes of the shortest Ethernet frame, without its check sequence.
pub const SHORTEST_FRAME: usize = 60;
/// Bytes of an unsolicited neighbour advertisement.
pub const ADVERTISEMENT: usize = 86;

const BROADCAST: [u8; 6] = [0xff; 6];
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: [u8; 16] = [0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;

/// A broadcast RARP request "what is my address", which needs none (RFC 903): any switch on the way learns the port.
#[must_use]
pub fn reverse_arp(mac: [u8; 6]) -> [u8; SHORTEST_FRAME] {
    arp(ETHERTYPE_RARP, 3, mac, [0; 4], mac, [0; 4])
}

/// A broadcast ARP request for one's own address (RFC 5227 section 2.3, "ARP announcement").
#[must_use]
pub fn gratuitous_arp(mac: [u8; 6], address: [u8; 4]) -> [u8; SHORTEST_FRAME] {
    arp(ETHERTYPE_ARP, 1, mac, address, [0; 6], address)
}

/// A neighbour advertisement to all nodes with the override flag set (RFC 4861 section 7.2.6).
///
/// `router` is whether the guest routes: an advertisement without that flag makes neighbours drop it as their router.
#[must_use]
pub fn unsolicited_advertisement(
    mac: [u8; 6],
    address: [u8; 16],
    router: bool,
) -> [u8; ADVERTISEMENT] {
    const OVERRIDE: u8 = 0x20;
    const ROUTER: u8 = 0x80;
    let mut frame = [0; ADVERTISEMENT];
    let mut out = Writer(&mut frame);
    out.ethernet(ALL_NODES_MAC, mac, ETHERTYPE_IPV6);
    // Version 6, no traffic class, no flow label; payload 32; hop limit 255, without which it is ignored.
    out.put(&[0x60, 0, 0, 0, 0, 32, ICMPV6, 255]);
    out.put(&address);
    out.put(&ALL_NODES);
    let flags = if router { OVERRIDE | ROUTER } else { OVERRIDE };
    let mut message = [0; 32];
    let mut body = Writer(&mut message);
    body.put(&[136, 0, 0, 0, flags, 0, 0, 0]);
    body.put(&address);
    body.put(&[2, 1]); // option: target link-layer address, one unit of 8 bytes
    body.put(&mac);
    let sum = checksum(&[
        &address,
        &ALL_NODES,
        &[0, 0, 0, 32, 0, 0, 0, ICMPV6],
        &message,
    ]);
    let [_, _, high, low, ..] = &mut message;
    [*high, *low] = sum.to_be_bytes();
    out.put(&message);
    frame
}

fn arp(
    ethertype: u16,
    operation: u16,
    mac: [u8; 6],
    sender: [u8; 4],
    target_mac: [u8; 6],
    target: [u8; 4],
) -> [u8; SHORTEST_FRAME] {
    let mut frame = [0; SHORTEST_FRAME];
    let mut out = Writer(&mut frame);
    out.ethernet(BROADCAST, mac, ethertype);
    // Ethernet, IPv4, and the lengths of both addresses.
    out.put(&[0, 1, 0x08, 0, 6, 4]);
    out.put(&operation.to_be_bytes());
    out.put(&mac);
    out.put(&sender);
    out.put(&target_mac);
    out.put(&target);
    frame
}

/// Fills a buffer from the front; what does not fit is cut, which the tests of every frame would show.
struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let rest = core::mem::take(&mut self.0);
        let (head, rest) = rest.split_at_mut(bytes.len().min(rest.len()));
        head.iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        self.0 = rest;
    }

    fn ethernet(&mut self, to: [u8; 6], from: [u8; 6], ethertype: u16) {
        self.put(&to);
        self.put(&from);
        self.put(&ethertype.to_be_bytes());
    }
}

/// The Internet checksum (RFC 1071) over parts of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for pair in parts.iter().flat_map(|part| part.chunks_exact(2)) {
        if let [high, low] = pair {
            sum += u32::from(u16::from_be_bytes([*high, *low]));
        }
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Folded above: the sum fits 16 bits.
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

    #[test]
    fn a_gratuitous_arp_asks_everybody_for_its_own_address() {
        let frame = gratuitous_arp(MAC, [192, 0, 2, 7]);
        assert_eq!(
            frame[..42],
            [
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x08,
                0x06, //
                0, 1, 0x08, 0, 6, 4, 0, 1, //
                0x52, 0x54, 0, 0x12, 0x34, 0x56, 192, 0, 2, 7, //
                0, 0, 0, 0, 0, 0, 192, 0, 2, 7,
            ]
        );
        assert_eq!(frame[42..], [0; 18], "padding");
    }

    #[test]
    fn a_reverse_arp_names_only_the_hardware_address() {
        let frame = reverse_arp(MAC);
        assert_eq!(
            frame[12..42],
            [
                0x80, 0x35, 0, 1, 0x08, 0, 6, 4, 0, 3, //
                0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0, 0, 0, //
                0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0, 0, 0,
            ]
        );
    }

    #[test]
    fn an_advertisement_is_a_well_formed_icmpv6_message() {
        let address = [
            0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x42,
        ];
        for (router, flags) in [(false, 0x20), (true, 0xa0)] {
            let frame = unsolicited_advertisement(MAC, address, router);
            assert_eq!(frame[..6], ALL_NODES_MAC);
            assert_eq!(frame[6..12], MAC);
            assert_eq!(frame[12..22], [0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
            assert_eq!(frame[22..38], address);
            assert_eq!(frame[38..54], ALL_NODES);
            assert_eq!(frame[54..56], [136, 0]);
            assert_eq!(frame[58..62], [flags, 0, 0, 0]);
            assert_eq!(frame[62..78], address);
            assert_eq!(frame[78..80], [2, 1]);
            assert_eq!(frame[80..86], MAC);
            // A receiver sums pseudo-header and message with the checksum in place and finds zero.
            let pseudo = [0, 0, 0, 32, 0, 0, 0, 58];
            assert_eq!(checksum(&[&frame[22..54], &pseudo, &frame[54..]]), 0);
        }
    }
}
