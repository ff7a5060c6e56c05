//! Contents that can be told from all others: a function of (index, generation).

/// The step between the words of one block.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The first word of block `index` in its `generation`-th version.
#[must_use]
pub fn seed(index: u64, generation: u64) -> u64 {
    let mut x = index.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ generation.wrapping_mul(STEP);
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

/// Fills a block.
pub fn fill(block: &mut [u64], seed: u64) {
    let mut value = seed;
    for word in block {
        *word = value;
        value = value.wrapping_add(STEP);
    }
}

/// The first word that differs: its index, what it should be, what it is.
#[must_use]
pub fn first_difference(block: &[u64], seed: u64) -> Option<(usize, u64, u64)> {
    // Without early exit the compiler compares vectors at a time; a difference is rare.
    let mut value = seed;
    let mut difference = 0;
    for word in block {
        difference |= *word ^ value;
        value = value.wrapping_add(STEP);
    }
    if difference == 0 {
        return None;
    }
    (0..).zip(block).find_map(|(i, &got)| {
        let want = seed.wrapping_add((i as u64).wrapping_mul(STEP));
        (got != want).then_some((i, want, got))
    })
}
