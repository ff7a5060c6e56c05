//! The card's fields: hardware address (must be the same here), link, inputs consumed.

use super::Net;
use crate::device::LoadError;
use crate::device::codec::{Decoder, Encoder};
use crate::device::virtio::backend::Saved;

#[derive(Debug)]
pub(crate) struct NetState {
    link_up: bool,
    consumed: u64,
}

impl Saved for Net {
    type State = NetState;

    fn save(&self, encoder: &mut Encoder<'_>) {
        encoder.u64(mac(self));
        encoder.bool(self.link_up);
        encoder.u64(self.consumed);
    }

    fn decode(&self, decoder: &mut Decoder<'_>) -> Result<NetState, LoadError> {
        let theirs = decoder.u64("hardware address")?;
        decoder.same("hardware address", theirs, mac(self))?;
        Ok(NetState {
            link_up: decoder.bool("link")?,
            consumed: decoder.u64("inputs consumed")?,
        })
    }

    fn apply(&mut self, state: NetState) {
        self.link_up = state.link_up;
        self.consumed = state.consumed;
        self.newest = state.consumed;
        // The core brings every input after `consumed` again.
        self.backlog.clear();
        self.backlog_bytes = 0;
    }
}

fn mac(net: &Net) -> u64 {
    let [a, b, c, d, e, f] = net.config.mac;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}
