//! How far the lanes of a round or an epoch are.

/// Which lanes have sent their LANE_END, and how many pages went over each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct LaneEnds {
    ended: u16,
    pages: [u32; 16],
}

impl LaneEnds {
    pub(crate) fn add(&mut self, lane: u8, pages: u32) {
        if let Some(sum) = self.pages.get_mut(usize::from(lane)) {
            *sum = sum.saturating_add(pages);
        }
    }

    pub(crate) fn pages(&self, lane: u8) -> u32 {
        self.pages.get(usize::from(lane)).copied().unwrap_or(0)
    }

    /// False if the lane had ended already.
    pub(crate) fn end(&mut self, lane: u8) -> bool {
        let bit = 1u16.checked_shl(u32::from(lane)).unwrap_or(0);
        let fresh = self.ended & bit == 0;
        self.ended |= bit;
        fresh
    }

    pub(crate) const fn has_ended(&self, lane: u8) -> bool {
        lane < 16 && self.ended >> lane & 1 == 1
    }

    pub(crate) const fn all_ended(&self, lanes: u8) -> bool {
        self.ended.count_ones() >= lanes as u32
    }
}
