//! Ctrl-C and TERM: the first asks for an orderly end, the second ends at once. HUP, which a closed
//! terminal and a log rotation send, opens the log file anew and ends nothing.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
    iterator::{Handle, Signals},
};

use crate::cli::logging;

/// Exit status after Ctrl-C, as shells expect it.
pub(crate) const INTERRUPTED: u8 = 130;

/// What asks for an end.
const ENDING: &[i32] = &[SIGINT, SIGTERM];

/// Remembers whether the user wants an end, and tells someone.
#[derive(Debug)]
pub(crate) struct Interrupt {
    /// A signal came: the next one ends the process.
    came: Arc<AtomicBool>,
    /// Somebody was told.
    told: Arc<AtomicBool>,
    handle: Handle,
}

impl Interrupt {
    /// Calls `tell` at the first signal. A second one ends the process at once.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub(crate) fn start(tell: impl Fn() + Send + 'static) -> io::Result<Self> {
        // Whoever is told first: a signal that comes before the flags are in place is not lost.
        let mut signals = Signals::new(ENDING.iter().chain(&[SIGHUP]))?;
        let handle = signals.handle();
        let (came, told) = (Arc::default(), Arc::<AtomicBool>::default());
        for &signal in ENDING {
            // Order matters: the exit looks at the flag before the next line sets it.
            flag::register_conditional_shutdown(signal, i32::from(INTERRUPTED), Arc::clone(&came))?;
            flag::register(signal, Arc::clone(&came))?;
        }
        let telling = Arc::clone(&told);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    if signal == SIGHUP {
                        logging::reopen();
                        continue;
                    }
                    telling.store(true, Ordering::Relaxed);
                    return tell();
                }
            })?;
        Ok(Self { came, told, handle })
    }

    /// Whether the user wants an end.
    pub(crate) fn asked(&self) -> bool {
        self.came.load(Ordering::Relaxed) || self.told.load(Ordering::Relaxed)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.handle.close();
    }
}

#[cfg(test)]
mod tests {
    use super::{ENDING, INTERRUPTED, SIGHUP};

    #[test]
    fn a_closed_terminal_ends_no_daemon() {
        assert!(!ENDING.contains(&SIGHUP));
    }

    #[test]
    fn the_documented_unit_sends_one_signal_and_takes_its_status_for_success() {
        let docs = include_str!("../../../../docs/operations.md");
        let (_, unit) = docs.split_once("[Service]").unwrap();
        let (unit, _) = unit.split_once("```").unwrap();
        let has = |line: &str| unit.lines().any(|l| l == line);
        assert!(!unit.lines().any(|l| l.starts_with("ExecStop=")), "{unit}");
        assert!(has("KillMode=mixed"), "{unit}");
        assert!(has(&format!("SuccessExitStatus={INTERRUPTED}")), "{unit}");
    }
}
