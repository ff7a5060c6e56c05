//! Which conversation a frame belongs to, seen from the guest.

use core::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Heading {
    /// The guest said it.
    FromGuest,
    /// The guest is to hear it.
    ToGuest,
}

/// One conversation: both ends, the protocol and the virtual networks it is on.
///
/// The guest's end comes first in both directions. IPv4 addresses are kept mapped into IPv6's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// Port there; 0 where the protocol has none.
    pub their_port: u16,
    /// Port here.
    pub our_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// VLAN identifiers plus one, outermost first; 0: none.
    pub vlans: [u16; 2],
    /// The other end's address.
    pub theirs: u128,
    /// The guest's address.
    pub ours: u128,
}

impl FlowKey {
    /// Frames that are no IP packet, or none that can be read.
    pub const OPAQUE: Self = Self {
        their_port: 0,
        our_port: 0,
        protocol: 255,
        vlans: [0; 2],
        theirs: 0,
        ours: 0,
    };

    pub(super) const fn new(
        heading: Heading,
        [source, destination]: [u128; 2],
        [from, to]: [u16; 2],
        protocol: u8,
        vlans: [u16; 2],
    ) -> Self {
        let (ours, theirs, our_port, their_port) = match heading {
            Heading::FromGuest => (source, destination, from, to),
            Heading::ToGuest => (destination, source, to, from),
        };
        Self {
            their_port,
            our_port,
            protocol,
            vlans,
            theirs,
            ours,
        }
    }

    /// The key as bytes, for a keyed hash and for the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        let fields = self
            .theirs
            .to_be_bytes()
            .into_iter()
            .chain(self.ours.to_be_bytes())
            .chain(self.their_port.to_be_bytes())
            .chain(self.our_port.to_be_bytes())
            .chain(self.vlans.into_iter().flat_map(u16::to_be_bytes))
            .chain([self.protocol]);
        out.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        out
    }

    /// The key that these bytes are.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        let mut take = |n: usize| {
            let (head, tail) = rest.split_at(n);
            rest = tail;
            head.iter()
                .fold(0u128, |value, byte| value << 8 | u128::from(*byte))
        };
        // Each is as long as its field.
        Self {
            theirs: take(16),
            ours: take(16),
            their_port: take(2) as u16,
            our_port: take(2) as u16,
            vlans: [take(2) as u16, take(2) as u16],
            protocol: take(1) as u8,
        }
    }

    /// Bytes of a key.
    pub const BYTES: usize = 41;
}

struct End(u128, u16);

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from(self.0);
        match address.to_ipv4_mapped() {
            Some(v4) => write!(f, "{v4}:{}", self.1),
            None => write!(f, "[{address}]:{}", self.1),
        }
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::OPAQUE {
            return f.write_str("frames that are not IP");
        }
        match self.protocol {
            6 => f.write_str("tcp")?,
            17 => f.write_str("udp")?,
            1 => f.write_str("icmp")?,
            58 => f.write_str("icmpv6")?,
            other => write!(f, "protocol {other}")?,
        }
        let (ours, theirs) = (
            End(self.ours, self.our_port),
            End(self.theirs, self.their_port),
        );
        write!(f, " {ours} to {theirs}")?;
        for vlan in self.vlans.into_iter().filter(|v| *v > 0) {
            write!(f, " on VLAN {}", vlan - 1)?;
        }
        Ok(())
    }
}

impl fmt::Debug for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An IPv4 address as a [`FlowKey`] keeps it.
pub(super) fn mapped(v4: [u8; 4]) -> u128 {
    Ipv4Addr::from(v4).to_ipv6_mapped().into()
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_key_comes_back_from_its_bytes(bytes: [u8; FlowKey::BYTES]) {
            prop_assert_eq!(FlowKey::from_bytes(&bytes).to_bytes(), bytes);
        }
    }

    #[test]
    fn both_directions_have_one_key_and_it_reads_like_an_address() {
        let (guest, client) = (mapped([192, 0, 2, 7]), mapped([198, 51, 100, 1]));
        let out = FlowKey::new(Heading::FromGuest, [guest, client], [80, 4000], 6, [8, 0]);
        let back = FlowKey::new(Heading::ToGuest, [client, guest], [4000, 80], 6, [8, 0]);
        assert_eq!(out, back);
        assert_eq!(
            out.to_string(),
            "tcp 192.0.2.7:80 to 198.51.100.1:4000 on VLAN 7"
        );
    }
}
