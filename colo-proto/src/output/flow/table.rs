//! Flows by key, least recently used first. The hash is keyed: whoever chooses ports and addresses
//! cannot choose collisions.

use alloc::vec::Vec;
use core::{
    hash::Hasher,
    ops::{Index, IndexMut},
};

use crate::output::packet::FlowKey;

const NONE: u32 = u32::MAX;

/// Where a flow is kept until it is removed.
pub(crate) type Place = u32;

/// An index over a slab whose entries are also a list in order of use.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Table<V> {
    seed: u64,
    slots: Vec<Slot<V>>,
    /// Part of the hash and the place; open addressing over a power of two.
    index: Vec<(u32, Place)>,
    free: Vec<Place>,
    newest: Place,
    oldest: Place,
    len: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Slot<V> {
    key: FlowKey,
    newer: Place,
    older: Place,
    value: V,
}

impl<V: Default> Table<V> {
    pub(crate) const fn new(seed: u64) -> Self {
        Self {
            seed,
            slots: Vec::new(),
            index: Vec::new(),
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            len: 0,
        }
    }

    pub(crate) const fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// The place of a flow, which is now the most recently used.
    pub(crate) fn find(&mut self, key: &FlowKey) -> Option<Place> {
        let place = self.peek(key)?;
        if place != self.newest {
            self.unlink(place);
            self.link(place);
        }
        Some(place)
    }

    /// The place of a flow.
    pub(crate) fn peek(&self, key: &FlowKey) -> Option<Place> {
        let at = self.position(key, self.hash(key))?;
        Some(self.index[at].1)
    }

    pub(crate) fn key(&self, place: Place) -> FlowKey {
        self.slots[place as usize].key
    }

    /// Adds a flow that is not here.
    pub(crate) fn insert(&mut self, key: FlowKey, value: V) -> Place {
        if (self.len + 1) * 2 > self.index.len() {
            self.grow();
        }
        let slot = Slot {
            key,
            newer: NONE,
            older: NONE,
            value,
        };
        let place = match self.free.pop() {
            Some(place) => {
                self.slots[place as usize] = slot;
                place
            }
            None => {
                self.slots.push(slot);
                // The table's owner bounds it far below.
                (self.slots.len() - 1) as Place
            }
        };
        self.enter(self.hash(&key), place);
        self.link(place);
        self.len += 1;
        place
    }

    pub(crate) fn remove(&mut self, key: &FlowKey) -> Option<V> {
        let mut hole = self.position(key, self.hash(key))?;
        let place = self.index[hole].1;
        self.unlink(place);
        self.free.push(place);
        self.len -= 1;
        // Move back what would no longer be found behind the hole.
        let mask = self.index.len() - 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let (hash, moved) = self.index[at];
            if moved == NONE {
                break;
            }
            let wanted = hash as usize & mask;
            if (at.wrapping_sub(wanted) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.index[hole] = (hash, moved);
                hole = at;
            }
        }
        self.index[hole] = (0, NONE);
        Some(core::mem::take(&mut self.slots[place as usize].value))
    }

    /// The least recently used.
    pub(crate) fn oldest(&self) -> Option<Place> {
        Some(self.oldest).filter(|place| *place != NONE)
    }

    /// Places from the least recently used on.
    pub(crate) fn by_age(&self) -> impl Iterator<Item = Place> {
        let mut next = self.oldest;
        core::iter::from_fn(move || {
            let place = next;
            next = self.slots.get(place as usize)?.newer;
            Some(place)
        })
    }

    fn hash(&self, key: &FlowKey) -> u32 {
        #[expect(deprecated, reason = "core has no other keyed hash")]
        let mut hasher = core::hash::SipHasher::new_with_keys(self.seed, !self.seed);
        hasher.write_u128(key.theirs);
        hasher.write_u128(key.ours);
        let rest = u64::from(key.their_port) << 48
            | u64::from(key.our_port) << 32
            | u64::from(key.vlans[0]) << 16
            | u64::from(key.vlans[1]);
        hasher.write_u64(rest);
        hasher.write_u8(key.protocol);
        hasher.finish() as u32
    }

    fn position(&self, key: &FlowKey, hash: u32) -> Option<usize> {
        let mask = self.index.len().checked_sub(1)?;
        let mut at = hash as usize & mask;
        loop {
            let (other, place) = self.index[at];
            if place == NONE {
                return None;
            }
            if other == hash && self.slots[place as usize].key == *key {
                return Some(at);
            }
            at = (at + 1) & mask;
        }
    }

    /// At most half of the index is used, so there is a free entry.
    fn enter(&mut self, hash: u32, place: Place) {
        let mask = self.index.len() - 1;
        let mut at = hash as usize & mask;
        while self.index[at].1 != NONE {
            at = (at + 1) & mask;
        }
        self.index[at] = (hash, place);
    }

    fn grow(&mut self) {
        let size = (self.index.len() * 2).max(8);
        let old = core::mem::replace(&mut self.index, alloc::vec![(0, NONE); size]);
        for (hash, place) in old.into_iter().filter(|(_, place)| *place != NONE) {
            self.enter(hash, place);
        }
    }

    fn link(&mut self, place: Place) {
        let newest = self.newest;
        let slot = &mut self.slots[place as usize];
        (slot.older, slot.newer) = (newest, NONE);
        match self.slots.get_mut(newest as usize) {
            Some(before) => before.newer = place,
            None => self.oldest = place,
        }
        self.newest = place;
    }

    fn unlink(&mut self, place: Place) {
        let Slot { newer, older, .. } = self.slots[place as usize];
        match self.slots.get_mut(newer as usize) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
        match self.slots.get_mut(older as usize) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
    }
}

impl<V> Index<Place> for Table<V> {
    type Output = V;

    fn index(&self, place: Place) -> &V {
        &self.slots[place as usize].value
    }
}

impl<V> IndexMut<Place> for Table<V> {
    fn index_mut(&mut self, place: Place) -> &mut V {
        &mut self.slots[place as usize].value
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;
    use proptest::prelude::*;

    use super::*;

    fn key(n: u8) -> FlowKey {
        FlowKey {
            their_port: u16::from(n),
            ..FlowKey::OPAQUE
        }
    }

    proptest! {
        /// Against a list in order of use.
        #[test]
        fn a_table_finds_what_is_in_it_and_knows_the_order_of_use(
            steps in prop::collection::vec((0u8..3, 0u8..24), 0..300), seed: u64,
        ) {
            let mut table = Table::new(seed);
            let mut list: Vec<u8> = Vec::new();
            for (what, n) in steps {
                let at = list.iter().position(|other| *other == n);
                match (what, at) {
                    (0, None) => {
                        table.insert(key(n), n);
                        list.push(n);
                    }
                    (1, _) => {
                        prop_assert_eq!(table.remove(&key(n)), at.map(|_| n));
                        list.retain(|other| *other != n);
                    }
                    _ => {
                        let found = table.find(&key(n)).map(|place| table[place]);
                        prop_assert_eq!(found, at.map(|_| n));
                        if at.is_some() {
                            list.retain(|other| *other != n);
                            list.push(n);
                        }
                    }
                }
                let order: Vec<u8> = table.by_age().map(|place| table[place]).collect();
                prop_assert_eq!(&order, &list);
                prop_assert_eq!(table.len(), list.len());
            }
        }
    }
}
