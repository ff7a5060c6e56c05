//! Which QEMU speaks: one table says what each version puts where and who answers what.
//!
//! The version is chosen from the stream itself. The opening commands leave one or two rows; the
//! end of the migration's RAM, with or without command 11 before it, leaves one. What fits no row
//! is a mixture of versions and is refused by that name.

use alloc::string::String;
use core::fmt;

use super::error::{Expected, Fault, Feature, Flaw, Got};

/// A QEMU version that changed the stream. Later ones speak as the newest row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Generation {
    /// 7.2, and every later one below 11 that is told not to send switchover-start.
    Qemu72,
    /// 10.0: switchover-start before the end of RAM, in the migration and in each checkpoint.
    Qemu100,
    /// 11.1: a return path instead of command 8.
    Qemu111,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu72 => "QEMU 7.2",
            Self::Qemu100 => "QEMU 10.0",
            Self::Qemu111 => "QEMU 11.1",
        })
    }
}

/// A command of the migration stream that COLO needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Command {
    /// 1: the secondary may answer from now on.
    OpenReturnPath,
    /// 2: the secondary is to send this number back.
    Ping(u32),
    /// 8: the stream goes on as COLO.
    EnableColo,
    /// 11: the end of RAM comes next.
    SwitchoverStart,
}

impl Command {
    /// Its number.
    #[must_use]
    pub const fn number(&self) -> u16 {
        match self {
            Self::OpenReturnPath => OPEN,
            Self::Ping(_) => PING,
            Self::EnableColo => COLO,
            Self::SwitchoverStart => SWITCHOVER,
        }
    }
}

const OPEN: u16 = 1;
const PING: u16 = 2;
const COLO: u16 = 8;
const SWITCHOVER: u16 = 11;

/// Whether a command stands somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stands {
    /// It must not.
    Never,
    /// It must.
    Always,
    /// Old machine types switch it off.
    Maybe,
}

/// What one version sends and expects.
#[derive(Debug)]
struct Rules {
    generation: Generation,
    /// The commands between the configuration and the RAM section, in order.
    opening: &'static [u16],
    /// Command 11 before the end of the migration's RAM.
    in_migration: Stands,
    /// Command 11 before the RAM of a checkpoint.
    in_live: Stands,
    /// The secondary answers the ping, and says after its load that the return path is over.
    answers: bool,
}

/// The rules of every version.
static TABLE: [Rules; 3] = [
    Rules {
        generation: Generation::Qemu72,
        opening: &[COLO],
        in_migration: Stands::Never,
        in_live: Stands::Never,
        answers: false,
    },
    Rules {
        generation: Generation::Qemu100,
        opening: &[COLO],
        in_migration: Stands::Always,
        in_live: Stands::Always,
        answers: false,
    },
    Rules {
        generation: Generation::Qemu111,
        opening: &[OPEN, PING],
        in_migration: Stands::Maybe,
        in_live: Stands::Never,
        answers: true,
    },
];

/// How many data bytes a command has.
pub(super) const fn data_length(number: u16) -> u16 {
    if number == PING { 4 } else { 0 }
}

/// The command of a number whose data, if any, is `data`.
pub(super) const fn command(number: u16, data: u32) -> Option<Command> {
    Some(match number {
        OPEN => Command::OpenReturnPath,
        PING => Command::Ping(data),
        COLO => Command::EnableColo,
        SWITCHOVER => Command::SwitchoverStart,
        _ => return None,
    })
}

/// Narrows the table down to the row that the stream follows.
#[derive(Clone, Debug, Default)]
pub(super) struct Chooser {
    /// A row whose opening is the one that came; the first that fits.
    opened: Option<&'static Rules>,
    /// How many opening commands came.
    commands: usize,
    /// Whether command 11 came before the RAM section that is next.
    announced: bool,
    chosen: Option<&'static Rules>,
}

impl Chooser {
    /// The version, once it is certain.
    pub(super) fn generation(&self) -> Option<Generation> {
        self.chosen.map(|rules| rules.generation)
    }

    /// Whether the secondary owes the end of the return path after its load.
    pub(super) fn answers(&self) -> bool {
        self.chosen.is_some_and(|rules| rules.answers)
    }

    /// A command between the configuration and the RAM section.
    pub(super) fn opening(&mut self, number: u16, length: u16) -> Result<(), Flaw> {
        let at = self.commands;
        let so_far = self.opened.map_or(&[][..], |rules| rules.opening);
        let so_far = so_far.get(..at).unwrap_or_default();
        let fits = TABLE.iter().find(|rules| {
            rules.opening.starts_with(so_far) && rules.opening.get(at) == Some(&number)
        });
        match fits {
            Some(rules) => {
                measured(number, length)?;
                self.opened = Some(rules);
                self.commands += 1;
                Ok(())
            }
            None => Err(self.no_opening(number, length)),
        }
    }

    /// Why a command does not belong to any opening.
    fn no_opening(&self, number: u16, length: u16) -> Flaw {
        let came = self.opened.map_or(&[][..], |rules| rules.opening);
        let came = came.get(..self.commands).unwrap_or_default();
        let fault = match number {
            // An older version sends both with this capability, and then waits for ever.
            COLO if came.first() == Some(&OPEN) => Fault::Unsupported(Feature::ReturnPath),
            OPEN | PING | COLO if came.contains(&number) => Fault::Repeated,
            OPEN | PING | COLO | SWITCHOVER => Fault::Mixture,
            // Advise comes with postcopy (its data are page sizes) or with dirty bitmaps (none).
            3 if length == 0 => Fault::Unsupported(Feature::DirtyBitmaps),
            3..=6 | 9 | 10 => Fault::Unsupported(Feature::Postcopy),
            7 => Fault::Unsupported(Feature::Packaged),
            _ => Fault::Unknown,
        };
        Flaw::new(
            0,
            "command",
            fault,
            u32::from(number),
            self.next_in_opening(),
        )
    }

    /// What each version that is still possible would send next, in words.
    fn next_in_opening(&self) -> Expected {
        use fmt::Write as _;
        let came = self.opened.map_or(&[][..], |rules| rules.opening);
        let came = came.get(..self.commands).unwrap_or_default();
        let mut text = String::new();
        let mut last = "";
        for rules in TABLE.iter().filter(|r| r.opening.starts_with(came)) {
            let next = match rules.opening.get(self.commands) {
                Some(&number) => named(number),
                None => "the start of the ram section",
            };
            if next != last {
                let or = if text.is_empty() { "" } else { " or " };
                let _ = write!(text, "{or}{next} ({})", rules.generation);
            }
            last = next;
        }
        Expected::Text(text.into())
    }

    /// The RAM section starts: the opening must be whole.
    pub(super) fn start(&self) -> Result<(), Flaw> {
        match self.opened {
            Some(rules) if rules.opening.len() == self.commands => Ok(()),
            Some(_) => Err(Flaw::new(
                0,
                "section type",
                Fault::Missing,
                "the start of the ram section",
                self.next_in_opening(),
            )),
            None => Err(Flaw::new(
                0,
                "section type",
                Fault::Missing,
                "the start of the ram section",
                "command 8, or 1 and 2 before it: switch on x-colo at the sender, and return-path \
                 from QEMU 11.1 on",
            )),
        }
    }

    /// A command before a RAM section: of the migration, or of a checkpoint if `live`.
    pub(super) fn before_ram(&mut self, number: u16, length: u16, live: bool) -> Result<(), Flaw> {
        if number != SWITCHOVER {
            let fault = match number {
                OPEN | PING | COLO => Fault::OutOfPlace,
                _ => Fault::Unknown,
            };
            let expected = "command 11 (switchover-start) or none: the ram section began";
            return Err(Flaw::new(0, "command", fault, u32::from(number), expected));
        }
        measured(number, length)?;
        if self.announced {
            let got = u32::from(number);
            return Err(Flaw::new(
                0,
                "command",
                Fault::Repeated,
                got,
                "command 11 once",
            ));
        }
        if live
            && let Some(rules) = self.chosen
            && rules.in_live == Stands::Never
        {
            return Err(mixture(
                rules.generation,
                u32::from(number).into(),
                "3, the ram section",
            ));
        }
        self.announced = true;
        Ok(())
    }

    /// A part of the migration's RAM opens: nothing may have announced its end.
    pub(super) fn part(&self) -> Result<(), Flaw> {
        if self.announced {
            return Err(Flaw::new(
                0,
                "section type",
                Fault::OutOfPlace,
                "2 (a part)",
                "3, the end of the ram section, after command 11",
            ));
        }
        Ok(())
    }

    /// The end of the migration's RAM opens: the version is certain from here on.
    pub(super) fn end(&mut self) -> Result<Generation, Flaw> {
        let announced = core::mem::take(&mut self.announced);
        let opening = self.opened.map_or(&[][..], |rules| rules.opening);
        let fits = TABLE
            .iter()
            .find(|rules| rules.opening == opening && stands(rules.in_migration, announced));
        match fits {
            Some(rules) => {
                self.chosen = Some(rules);
                Ok(rules.generation)
            }
            // Every opening has a row for both; should one be taken away, this refuses.
            None => Err(Flaw::new(
                0,
                "section type",
                Fault::Mixture,
                "the end of the ram section",
                "what one version of QEMU sends before it",
            )),
        }
    }

    /// The RAM of a checkpoint opens.
    pub(super) fn live(&mut self) -> Result<(), Flaw> {
        let announced = core::mem::take(&mut self.announced);
        match self.chosen {
            Some(rules) if !stands(rules.in_live, announced) => Err(mixture(
                rules.generation,
                "the ram section".into(),
                "command 11 (switchover-start) before it, as in the migration",
            )),
            _ => Ok(()),
        }
    }
}

fn stands(rule: Stands, is_there: bool) -> bool {
    match rule {
        Stands::Never => !is_there,
        Stands::Always => is_there,
        Stands::Maybe => true,
    }
}

fn measured(number: u16, length: u16) -> Result<(), Flaw> {
    let expected = data_length(number);
    if length == expected {
        return Ok(());
    }
    let (got, expected) = (u32::from(length), u32::from(expected));
    Err(Flaw::new(
        2,
        "command length",
        Fault::Malformed,
        got,
        expected,
    ))
}

fn mixture(follows: Generation, got: Got, expected: &'static str) -> Flaw {
    use alloc::format;
    let expected = Expected::Text(format!("{expected} (this is {follows})").into());
    Flaw::new(0, "section type", Fault::Mixture, got, expected)
}

const fn named(number: u16) -> &'static str {
    match number {
        OPEN => "command 1, open the return path",
        PING => "command 2, a ping",
        COLO => "command 8, enable colo",
        _ => "another command",
    }
}

#[cfg(test)]
mod tests {
    use alloc::{format, vec::Vec};

    use super::*;

    /// A chooser behind these opening commands.
    fn opened(commands: &[u16]) -> Chooser {
        let mut chooser = Chooser::default();
        for &number in commands {
            chooser.opening(number, data_length(number)).unwrap();
        }
        chooser.start().unwrap();
        chooser
    }

    #[test]
    fn every_row_of_the_table_chooses_itself() {
        for rules in &TABLE {
            let mut chooser = opened(rules.opening);
            assert_eq!(chooser.generation(), None);
            if rules.in_migration == Stands::Always {
                chooser.before_ram(SWITCHOVER, 0, false).unwrap();
            }
            assert_eq!(chooser.end(), Ok(rules.generation));
            assert_eq!(chooser.generation(), Some(rules.generation));
            for _ in 0..2 {
                if rules.in_live == Stands::Always {
                    chooser.before_ram(SWITCHOVER, 0, true).unwrap();
                }
                chooser.live().unwrap();
            }
        }
    }

    /// A machine type below 10.0 does not send command 11, whatever the version.
    #[test]
    fn the_newest_with_an_old_machine_type_is_still_the_newest() {
        assert_eq!(opened(&[OPEN, PING]).end(), Ok(Generation::Qemu111));
        let mut with = opened(&[OPEN, PING]);
        with.before_ram(SWITCHOVER, 0, false).unwrap();
        assert_eq!(with.end(), Ok(Generation::Qemu111));
    }

    #[test]
    fn mixtures_of_versions_are_refused_by_name() {
        let opening = |commands: &[u16]| {
            let mut chooser = Chooser::default();
            let all: Result<Vec<()>, Flaw> = commands
                .iter()
                .map(|&number| chooser.opening(number, data_length(number)))
                .collect();
            all.unwrap_err()
        };
        let return_path = Fault::Unsupported(Feature::ReturnPath);
        for (commands, fault) in [
            (&[OPEN, PING, COLO][..], return_path),
            (&[OPEN, COLO], return_path),
            (&[COLO, OPEN], Fault::Mixture),
            (&[PING], Fault::Mixture),
            (&[COLO, PING], Fault::Mixture),
            (&[SWITCHOVER], Fault::Mixture),
            (&[COLO, SWITCHOVER], Fault::Mixture),
            (&[OPEN, OPEN], Fault::Repeated),
            (&[OPEN, PING, PING], Fault::Repeated),
            (&[COLO, COLO], Fault::Repeated),
        ] {
            assert_eq!(opening(commands).fault, fault, "{commands:?}");
        }
        assert_eq!(
            format!("{}", opening(&[COLO, OPEN]).expected),
            "the start of the ram section (QEMU 7.2)"
        );
        let mut newest = opened(&[OPEN, PING]);
        newest.end().unwrap();
        let live = newest.before_ram(SWITCHOVER, 0, true).unwrap_err();
        assert_eq!(live.fault, Fault::Mixture);

        let mut oldest = opened(&[COLO]);
        oldest.end().unwrap();
        let live = oldest.before_ram(SWITCHOVER, 0, true).unwrap_err();
        assert_eq!(live.fault, Fault::Mixture);

        let mut middle = opened(&[COLO]);
        middle.before_ram(SWITCHOVER, 0, false).unwrap();
        assert_eq!(middle.part().unwrap_err().fault, Fault::OutOfPlace);
        middle.end().unwrap();
        assert_eq!(middle.live().unwrap_err().fault, Fault::Mixture);
    }

    #[test]
    fn an_opening_that_is_not_whole_is_refused() {
        let mut half = Chooser::default();
        half.opening(OPEN, 0).unwrap();
        assert_eq!(
            format!("{}", half.start().unwrap_err().expected),
            "command 2, a ping (QEMU 11.1)"
        );
        assert!(Chooser::default().start().is_err());
    }
}
