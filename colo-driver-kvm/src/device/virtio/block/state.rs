//! The disk's field: its capacity, which must be the same here. Contents travel as pages of the image.

use super::Block;
use crate::device::LoadError;
use crate::device::codec::{Decoder, Encoder};
use crate::device::virtio::backend::Saved;

impl Saved for Block {
    type State = ();

    fn save(&self, encoder: &mut Encoder<'_>) {
        encoder.u64(self.sectors());
    }

    fn decode(&self, decoder: &mut Decoder<'_>) -> Result<(), LoadError> {
        let sectors = decoder.u64("sectors")?;
        decoder.same("sectors", sectors, self.sectors())
    }

    fn apply(&mut self, (): ()) {
        self.flusher.forget();
    }
}
