//! The keyed code at the end of every heartbeat and join: BLAKE3 in its keyed mode, cut to 128 bits.
//!
//! Threat model: the hosts of a pair share a secret key; someone on the network can send, repeat and
//! change datagrams but does not know the key. A forged datagram passes with probability 2⁻¹²⁸.
//! Repeats pass the code and are harmless by the rules on boot ids, generations and sequence
//! numbers (spec ownership 6). Contents are not secret and are not encrypted.

use blake3::{Hash, KEY_LEN, derive_key, hash, keyed_hash};

/// The secret of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MacKey(pub [u8; 16]);

impl MacKey {
    /// The key that comes of what two hosts share, such as the contents of a file. Nothing is
    /// learnt about the material from the key, and material that differs in a bit gives another key.
    /// It cannot be stronger than the material: whoever reads that checks that it was made at random.
    #[must_use]
    pub fn derive(material: &[u8]) -> Self {
        Self(cut(derive_key("colo 2026-12-01 pair key", material)))
    }

    /// As the hash takes it. The rest stays zero, which costs no strength: the key is secret in
    /// all of its 128 bits.
    fn padded(self) -> [u8; KEY_LEN] {
        pad(&self.0)
    }
}

impl core::fmt::Debug for MacKey {
    /// Keeps the secret out of logs.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("MacKey(..)")
    }
}

/// The code of `text` under `key`.
#[must_use]
pub(crate) fn code(key: MacKey, text: &[u8]) -> [u8; 16] {
    cut(keyed_hash(&key.padded(), text).into())
}

/// A number that damage to `bytes` changes. It does not authenticate: there is no key.
#[must_use]
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = <[u8; KEY_LEN]>::from(hash(bytes));
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// Compares two codes in a time that does not depend on them.
#[must_use]
pub(crate) fn same(a: &[u8; 16], b: &[u8; 16]) -> bool {
    Hash::from_bytes(pad(a)) == Hash::from_bytes(pad(b))
}

fn cut(whole: [u8; KEY_LEN]) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&whole[..16]);
    half
}

fn pad(half: &[u8; 16]) -> [u8; KEY_LEN] {
    let mut whole = [0; KEY_LEN];
    whole[..16].copy_from_slice(half);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_differ_by_key_text_and_length() {
        let key = MacKey([7; 16]);
        let of_zeros = code(key, &[0; 8]);
        assert!(same(&of_zeros, &code(key, &[0; 8])));
        assert!(!same(&of_zeros, &code(MacKey([8; 16]), &[0; 8])));
        assert!(!same(&of_zeros, &code(key, &[0; 9])));
    }

    #[test]
    fn no_material_gives_a_key_that_other_material_gives() {
        // What folding by XOR made one key of: zeros, and any sixteen bytes twice.
        let keys = [
            MacKey::derive(&[0; 32]),
            MacKey::derive(&[5; 32]),
            MacKey::derive(b"0123456789abcdef0123456789abcdef"),
            MacKey::derive(b"0123456789abcdef0123456789abcdef\n"),
            MacKey([0; 16]),
        ];
        for (at, key) in keys.iter().enumerate() {
            assert!(!keys[..at].contains(key), "key {at}");
        }
    }
}
