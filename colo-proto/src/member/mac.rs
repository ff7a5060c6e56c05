//! SipHash-2-4 with 128 bits of output: the keyed code at the end of every heartbeat.
//!
//! Threat model: hosts of a pair share a secret key; someone on the network can send, repeat and
//! change datagrams but does not know the key. A forged datagram passes with probability 2⁻¹²⁸.
//! Repeats pass the code and are harmless by the rules on boot ids, generations and sequence
//! numbers (spec ownership 6). Contents are not secret and are not encrypted.

/// The secret of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MacKey(pub [u8; 16]);

impl core::fmt::Debug for MacKey {
    /// Keeps the secret out of logs.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("MacKey(..)")
    }
}

/// The code of `text` under `key`.
#[must_use]
pub(crate) fn siphash128(key: MacKey, text: &[u8]) -> [u8; 16] {
    let (low, high) = key.0.split_at(8);
    let (k0, k1) = (word(low), word(high));
    let mut v = [
        k0 ^ 0x736f_6d65_7073_6575,
        k1 ^ 0x646f_7261_6e64_6f6d ^ 0xee,
        k0 ^ 0x6c79_6765_6e65_7261,
        k1 ^ 0x7465_6462_7974_6573,
    ];
    let mut chunks = text.chunks_exact(8);
    for chunk in &mut chunks {
        absorb(&mut v, word(chunk));
    }
    // The last word: what is left over, and the length in the top byte.
    absorb(
        &mut v,
        word(chunks.remainder()) | ((text.len() as u64) << 56),
    );

    let mut out = [0; 16];
    v[2] ^= 0xee;
    out[..8].copy_from_slice(&squeeze(&mut v));
    v[1] ^= 0xdd;
    out[8..].copy_from_slice(&squeeze(&mut v));
    out
}

/// Compares two codes in constant time.
#[must_use]
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |diff, (x, y)| diff | (x ^ y)) == 0
}

/// Up to eight bytes as a little-endian number.
fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |w, &b| (w << 8) | u64::from(b))
}

fn absorb(v: &mut [u64; 4], word: u64) {
    v[3] ^= word;
    round(v);
    round(v);
    v[0] ^= word;
}

fn squeeze(v: &mut [u64; 4]) -> [u8; 8] {
    for _ in 0..4 {
        round(v);
    }
    (v[0] ^ v[1] ^ v[2] ^ v[3]).to_le_bytes()
}

fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[2] = v[2].rotate_left(32);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First and sixteenth entry of the reference vectors (key 00..0f, text 00..n).
    #[test]
    fn the_reference_vectors_hold() {
        let mut key = [0; 16];
        let mut text = [0; 16];
        for i in 0..16u8 {
            key[usize::from(i)] = i;
            text[usize::from(i)] = i;
        }
        let empty = siphash128(MacKey(key), &[]);
        assert_eq!(
            empty,
            [
                0xa3, 0x81, 0x7f, 0x04, 0xba, 0x25, 0xa8, 0xe6, 0x6d, 0xf6, 0x72, 0x14, 0xc7, 0x55,
                0x02, 0x93
            ]
        );
        let one = siphash128(MacKey(key), &text[..1]);
        assert_eq!(
            one,
            [
                0xda, 0x87, 0xc1, 0xd8, 0x6b, 0x99, 0xaf, 0x44, 0x34, 0x76, 0x59, 0x11, 0x9b, 0x22,
                0xfc, 0x45
            ]
        );
    }

    #[test]
    fn codes_differ_by_key_text_and_length() {
        let key = MacKey([7; 16]);
        let code = siphash128(key, &[0; 8]);
        assert!(same(&code, &siphash128(key, &[0; 8])));
        assert!(!same(&code, &siphash128(MacKey([8; 16]), &[0; 8])));
        assert!(!same(&code, &siphash128(key, &[0; 9])));
    }
}
