//! The VM generation id: 16 random bytes that tell a guest that it was put back to an earlier time.
//!
//! A machine that is restored from a file gets another one, and its guest an event, so that it makes new keys and
//! leases: the same guest may run elsewhere. A takeover is no such thing: the guest goes on where it was, once, and
//! the id moves with its memory.

use std::io;
use std::sync::PoisonError;

use vm_memory::{Bytes as _, GuestAddress};

use crate::boot::BootError;
use crate::memory::layout::GENERATION_ID;
use crate::vm::{Vm, VmError};

const LEN: usize = 16;

impl Vm {
    /// The id as the guest reads it.
    ///
    /// # Errors
    ///
    /// Memory ends below it.
    pub fn generation_id(&self) -> Result<[u8; LEN], VmError> {
        let mut id = [0; LEN];
        let read = self
            .memory
            .ram()
            .read_slice(&mut id, GuestAddress(GENERATION_ID));
        read.map_err(|error| VmError::System {
            what: "read the generation id",
            source: io::Error::other(error),
        })?;
        Ok(id)
    }

    /// Gives a machine that has none an id. One that is reset keeps its own.
    pub(crate) fn first_generation(&self) -> Result<(), BootError> {
        let ram = self.memory.ram();
        let mut id = [0; LEN];
        ram.read_slice(&mut id, GuestAddress(GENERATION_ID))?;
        if id == [0; LEN] {
            ram.write_slice(
                &random().map_err(BootError::Entropy)?,
                GuestAddress(GENERATION_ID),
            )?;
        }
        Ok(())
    }

    /// Another id, and the event that says so.
    pub(crate) fn next_generation(&mut self) -> Result<(), VmError> {
        let at = |what| move |source| VmError::System { what, source };
        let id = random().map_err(at("read entropy for the generation id"))?;
        let written = self
            .memory
            .ram()
            .write_slice(&id, GuestAddress(GENERATION_ID));
        written
            .map_err(io::Error::other)
            .map_err(at("write the generation id"))?;
        let mut power = self.power().lock().unwrap_or_else(PoisonError::into_inner);
        power.generation_changed();
        Ok(())
    }
}

fn random() -> io::Result<[u8; LEN]> {
    let mut id = [0; LEN];
    let read = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    if read != LEN {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(id)
}
