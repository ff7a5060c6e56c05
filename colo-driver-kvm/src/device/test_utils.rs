//! What the tests of every device share.

use super::{LoadError, Persist};

/// The section a device saves.
pub(crate) fn saved(device: &dyn Persist) -> Vec<u8> {
    let mut out = Vec::new();
    device.save(&mut out);
    out
}

/// Every flipped bit, every cut and every longer or newer section is refused by `check` and by `load`, and leaves
/// the device saving what it saved before.
pub(crate) fn assert_refuses_damage(device: &mut dyn Persist, good: &[u8]) {
    device.quiesce();
    let before = saved(device);
    let version = device.version();
    device.check(version, good).unwrap();
    let mut refuse = |version: u16, bytes: &[u8], what: &str| {
        let checked = device.check(version, bytes).unwrap_err();
        let loaded = device.load(version, bytes).unwrap_err();
        assert_eq!(checked, loaded, "{what}");
        assert_eq!(saved(device), before, "{what}");
        loaded
    };
    for bit in 0..good.len() * 8 {
        let mut bytes = good.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let error = refuse(version, &bytes, &format!("bit {bit}"));
        assert!(matches!(error, LoadError::Checksum { .. }), "{error}");
    }
    for len in 0..good.len() {
        refuse(version, &good[..len], &format!("cut to {len}"));
    }
    let longer = [good, &[0]].concat();
    refuse(version, &longer, "one byte more");
    let error = refuse(version + 1, good, "newer");
    assert!(matches!(error, LoadError::Newer { .. }), "{error}");
}
