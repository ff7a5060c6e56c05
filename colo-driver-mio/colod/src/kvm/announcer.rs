//! Says where the VM lives now, several times: a switch or a client that missed the first frame
//! hears a later one (spec ownership 10).
//!
//! Only a host that owns the VM alone announces. It does until its next capture, which is the
//! first step towards sharing ownership, or until it is told to pause: so no announcement is ever
//! made under a lease, which might have ended unseen.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use colo_driver_mio::Wake;

use crate::config::Config;
use colo_proto::output::announce;

use super::backend::offloads;

/// Pauses before the second and later rounds.
const ROUNDS: [u64; 4] = [50, 150, 250, 350];

/// The frames, and whether another round is due.
#[derive(Debug)]
pub(super) struct Announcer {
    frames: Vec<Vec<u8>>,
    /// Whether rounds may be said: the loop's own word, whatever the thread still does.
    active: bool,
    due: Arc<AtomicBool>,
    /// Number of the takeover; rounds of an older one are void.
    takeover: Arc<AtomicU32>,
}

impl Announcer {
    pub(super) fn new(config: &Config) -> Self {
        let mac = config.net.mac.0;
        let header = vec![0; offloads(&config.net).header()];
        let mut frames = vec![announce::reverse_arp(mac).to_vec()];
        for address in &config.net.announce {
            frames.push(match address {
                IpAddr::V4(v4) => announce::gratuitous_arp(mac, v4.octets()).to_vec(),
                IpAddr::V6(v6) => {
                    announce::unsolicited_advertisement(mac, v6.octets(), false).to_vec()
                }
            });
        }
        Self {
            frames: frames
                .into_iter()
                .map(|frame| [&header[..], &frame].concat())
                .collect(),
            active: false,
            due: Arc::default(),
            takeover: Arc::default(),
        }
    }

    /// The first round is due at once; a thread that ends by itself asks for the others.
    pub(super) fn begin(&mut self, wake: Option<&Wake>) {
        let this = self.takeover.fetch_add(1, Ordering::AcqRel) + 1;
        self.active = true;
        self.due.store(true, Ordering::Release);
        let Some(wake) = wake.cloned() else { return };
        let (due, takeover) = (Arc::clone(&self.due), Arc::clone(&self.takeover));
        let rounds = thread::Builder::new()
            .name("announce".into())
            .spawn(move || {
                for pause in ROUNDS {
                    thread::sleep(Duration::from_millis(pause));
                    if takeover.load(Ordering::Acquire) != this {
                        return;
                    }
                    due.store(true, Ordering::Release);
                    wake.wake();
                }
            });
        if let Err(error) = rounds {
            tracing::warn!(%error, "the address is announced once only");
        }
    }

    /// No further rounds.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.active) {
            self.takeover.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The frames of a round that is due.
    pub(super) fn poll(&self) -> &[Vec<u8>] {
        if self.active && self.due.swap(false, Ordering::AcqRel) {
            &self.frames
        } else {
            &[]
        }
    }
}
