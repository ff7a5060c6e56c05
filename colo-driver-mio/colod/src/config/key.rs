//! The pair's key: read, weighed and derived in one place, for `check` as for a start.

use std::{collections::BTreeSet, fs::File, io::Read as _, path::Path};

use colo_proto::member::MacKey;

use super::places::kind;

/// Fewest bytes of a key file, and the most that are read.
const LEAST: usize = 32;
const MOST: usize = 4096;
/// Fewest different bytes. Thirty-two at random have fewer less than once in 10²⁰; a key in
/// hexadecimal digits has sixteen.
const DIFFERENT_LEAST: usize = 8;
/// A file whose last bytes are its first ones again, this many or more, was not made at random.
const AGAIN_MOST: usize = 15;

/// The key that the file at `path` gives.
///
/// # Errors
/// In words that follow the key's name: the file cannot be read, or nobody made it at random.
pub(crate) fn read_key(path: &Path) -> Result<MacKey, String> {
    let at = path.display();
    let unread = |error| format!("cannot be read: {at}: {error}");
    // The kind comes before the opening, which waits where it is a pipe.
    let meta = std::fs::metadata(path).map_err(unread)?;
    if !meta.is_file() {
        return Err(format!(
            "is {at}, which is {}, expected a file",
            kind(&meta)
        ));
    }
    let mut material = Vec::new();
    let file = File::open(path).map_err(unread)?;
    let read = file.take(MOST as u64 + 1).read_to_end(&mut material);
    read.map_err(unread)?;
    if !(LEAST..=MOST).contains(&material.len()) {
        let size = meta.len();
        return Err(format!("{at} has {size} bytes, expected {LEAST} to {MOST}"));
    }
    match weakness(&material) {
        None => Ok(MacKey::derive(&material)),
        Some(why) => Err(format!(
            "{at} {why}, so it was not made at random; make one with `head -c 32 /dev/urandom`"
        )),
    }
}

/// What shows that nobody drew these bytes at random. It finds files that were left empty, filled
/// or copied together, and cannot tell whether any other is good.
fn weakness(material: &[u8]) -> Option<String> {
    let different = material.iter().collect::<BTreeSet<_>>().len();
    if different < DIFFERENT_LEAST {
        return Some(format!("has {different} different bytes in all"));
    }
    let again = (1..material.len() - AGAIN_MOST)
        .find(|&period| material[period..] == material[..material.len() - period]);
    again.map(|period| format!("repeats its first {period} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_of(material: &[u8]) -> Result<MacKey, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, material).unwrap();
        read_key(&path).map_err(|why| why.replace(dir.path().to_str().unwrap(), "DIR"))
    }

    #[test]
    fn a_file_that_nobody_made_at_random_is_refused_with_what_shows_it() {
        let line = "abcdefghijklmnop";
        let long: Vec<u8> = (0..=255).cycle().take(1024).collect();
        for (material, says) in [
            (vec![0; 32], "DIR/key has 1 different bytes in all"),
            (
                b"0101010101010101\n0101010101010101\n".to_vec(),
                "different bytes",
            ),
            (line.repeat(2).into_bytes(), "repeats its first 16 bytes"),
            (
                format!("{line}\n{line}").into_bytes(),
                "repeats its first 17 bytes",
            ),
            (long, "repeats its first 256 bytes"),
            (vec![1; 31], "has 31 bytes, expected 32 to 4096"),
            (vec![1; 4097], "has 4097 bytes, expected 32 to 4096"),
        ] {
            let why = key_of(&material).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
    }

    #[test]
    fn keys_made_at_random_are_taken_in_any_spelling() {
        let mut random = [0; 32];
        let mut source = File::open("/dev/urandom").unwrap();
        source.read_exact(&mut random).unwrap();
        let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let plain = key_of(&random).unwrap();
        let spelt = key_of(format!("{hex}\n").as_bytes()).unwrap();
        assert_ne!(plain, spelt, "the file is the key, not what it stands for");
    }
}
