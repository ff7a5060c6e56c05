//! Bodies of the fuzz targets. They panic where a law is broken; the ordinary tests replay the
//! corpus and the regressions through them.
//!
//! | target | attacks | law |
//! |---|---|---|
//! | [`wire_decode`] | everything that decodes peer bytes | typed errors; what decodes encodes to itself |
//! | [`page_sets`] | page sets, runs, the coming epoch's cache | agrees with a set of numbers |
//! | [`machine`] | one host, any sequence of inputs | no misuse for right calls, wrong ones change nothing, bounded polls and queues |
//! | [`packets`] | views of frames, edits in place | places inside, there and back is the same |
//! | [`flows`] | the comparator of flows | agrees with arrays of bytes, keeps to its budget |
//! | [`translator`] | the translator, any schedule | no panic, no growth |
//! | [`pair_schedule`] | two hosts, any schedule of faults | the laws of `tests/world`: output commit, no mixture of epochs, one owner, bounded queues, no silence without a timer |

mod machine;
mod pages;
mod pair;
mod proxy;
mod toy;
mod wire;

pub use machine::machine;
pub use pages::page_sets;
pub use pair::pair_schedule;
pub use proxy::{flows, packets, translator};
pub use wire::wire_decode;

/// The program that a fuzzer wrote; zeros for ever after its end.
struct Program<'a>(&'a [u8]);

impl<'a> Program<'a> {
    fn next(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{fs, path::Path};

    fn replay(target: &str, body: fn(&[u8])) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let mut seeds = 0;
        for kind in ["corpus", "regressions"] {
            let Ok(files) = fs::read_dir(root.join(kind).join(target)) else {
                continue;
            };
            for file in files {
                body(&fs::read(file.unwrap().path()).unwrap());
                seeds += 1;
            }
        }
        assert!(seeds > 0, "no seeds for {target}");
    }

    #[test]
    fn every_seed_keeps_the_laws_of_the_wire() {
        replay("wire_decode", super::wire_decode);
    }

    #[test]
    fn every_seed_keeps_the_laws_of_page_sets() {
        replay("page_sets", super::page_sets);
    }

    #[test]
    fn every_seed_keeps_the_laws_of_a_machine() {
        replay("machine", super::machine);
    }

    #[test]
    fn every_seed_keeps_the_laws_of_the_proxy() {
        replay("packets", super::packets);
        replay("flows", super::flows);
        replay("translator", super::translator);
    }

    #[test]
    fn every_seed_keeps_the_laws_of_a_pair() {
        replay("pair_schedule", super::pair_schedule);
    }
}
