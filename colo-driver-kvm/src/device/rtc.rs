//! The clock with its battery-backed memory (MC146818): what it is today, for kernels without a better source.
//!
//! It shows the host's time plus what the guest has set it apart from that. So it keeps time while the machine is
//! paused and goes on with the other host's after a takeover. It has no alarm and raises no interrupt.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::codec::{Decoder, Encoder};
use super::{BusDevice, LoadError, Persist};

const VERSION: u16 = 1;
const SECTION: &str = "rtc";
const MEMORY: usize = 128;

/// Register B: update stopped while the guest sets the time, binary instead of BCD, 24 hours.
const SET: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Register A as a PC sets it: 32.768 kHz, 1,024 Hz.
const A: u8 = 0x26;
/// Register D: the battery is good.
const D: u8 = 0x80;
/// Largest distance to the host's time: what a guest can set, 10,000 years.
const FARTHEST: u64 = 10_000 * 366 * 86_400;

/// The clock.
#[derive(Debug)]
pub struct Rtc {
    index: u8,
    b: u8,
    memory: [u8; MEMORY],
    /// The guest's time minus the host's, in seconds.
    apart: i64,
    /// Time fields as they stand while the guest sets them.
    set: [u8; 10],
    now: fn() -> Duration,
}

/// A point of the calendar, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Date {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// Sunday is 1.
    weekday: u8,
}

impl Rtc {
    /// Index port; data is the next.
    pub const BASE: u16 = 0x70;
    /// Ports.
    pub const LEN: u16 = 2;
    /// Where the century is.
    pub const CENTURY: u8 = 0x32;

    /// A clock that shows the host's time.
    #[must_use]
    pub fn new() -> Self {
        Self::with(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
        })
    }

    fn with(now: fn() -> Duration) -> Self {
        Self {
            index: 0,
            b: HOURS_24,
            memory: [0; MEMORY],
            apart: 0,
            set: [0; 10],
            now,
        }
    }

    /// Puts a byte into the battery-backed memory, as firmware finds it there. Clock registers are not memory.
    pub fn preset(&mut self, index: u8, byte: u8) {
        if clock_register(index).is_none()
            && index > 0xd
            && let Some(cell) = self.memory.get_mut(usize::from(index))
        {
            *cell = byte;
        }
    }

    fn seconds(&self) -> i64 {
        let now = i64::try_from((self.now)().as_secs()).unwrap_or(i64::MAX);
        now.saturating_add(self.apart)
    }

    /// The time fields as the guest reads them.
    fn fields(&self) -> [u8; 10] {
        let date = Date::from_seconds(self.seconds());
        let hour = if self.b & HOURS_24 != 0 {
            self.coded(date.hour)
        } else {
            let twelve = match date.hour % 12 {
                0 => 12,
                other => other,
            };
            self.coded(twelve) | if date.hour >= 12 { 0x80 } else { 0 }
        };
        let year = date.year.rem_euclid(10_000);
        let mut fields = [0; 10];
        fields[0] = self.coded(date.second);
        fields[1] = self.coded(date.minute);
        fields[2] = hour;
        fields[3] = self.coded(date.weekday);
        fields[4] = self.coded(date.day);
        fields[5] = self.coded(date.month);
        fields[6] = self.coded((year % 100) as u8);
        fields[7] = self.coded((year / 100) as u8);
        fields
    }

    /// Takes over what the guest has put into the time fields.
    fn adopt(&mut self) {
        let [second, minute, hour, _, day, month, year, century, ..] = self.set;
        let hour_24 = if self.b & HOURS_24 != 0 {
            self.plain(hour)
        } else {
            self.plain(hour & 0x7f) % 12 + if hour & 0x80 != 0 { 12 } else { 0 }
        };
        let date = Date {
            year: i64::from(self.plain(century)) * 100 + i64::from(self.plain(year)),
            month: self.plain(month).clamp(1, 12),
            day: self.plain(day).clamp(1, 31),
            hour: hour_24,
            minute: self.plain(minute),
            second: self.plain(second),
            weekday: 1,
        };
        let now = i64::try_from((self.now)().as_secs()).unwrap_or(i64::MAX);
        // In binary a guest can name the year 25,755, which no state may hold.
        let apart = date.seconds().saturating_sub(now);
        self.apart = apart.clamp(-FARTHEST.cast_signed(), FARTHEST.cast_signed());
    }

    fn coded(&self, value: u8) -> u8 {
        if self.b & BINARY != 0 {
            value
        } else {
            ((value / 10 % 10) << 4) | (value % 10)
        }
    }

    fn plain(&self, value: u8) -> u8 {
        if self.b & BINARY != 0 {
            value
        } else {
            (value >> 4).min(9) * 10 + (value & 0xf).min(9)
        }
    }

    fn register(&self, index: u8) -> u8 {
        if let Some(field) = clock_register(index) {
            let fields = if self.b & SET != 0 {
                self.set
            } else {
                self.fields()
            };
            return fields.get(field).copied().unwrap_or(0);
        }
        match index {
            0xa => A,
            0xb => self.b,
            0xc => 0,
            0xd => D,
            _ => self.memory.get(usize::from(index)).copied().unwrap_or(0),
        }
    }

    fn set_register(&mut self, index: u8, value: u8) {
        if let Some(field) = clock_register(index) {
            let stopped = self.b & SET != 0;
            if !stopped {
                self.set = self.fields();
            }
            if let Some(cell) = self.set.get_mut(field) {
                *cell = value;
            }
            if !stopped {
                self.adopt();
            }
            return;
        }
        match index {
            0xb => {
                // What it shows is frozen when updates stop, and counts on from what is there.
                let before = self.b;
                if before & SET == 0 && value & SET != 0 {
                    self.set = self.fields();
                }
                self.b = value & (SET | BINARY | HOURS_24);
                if before & SET != 0 && value & SET == 0 {
                    self.adopt();
                }
            }
            0xa | 0xc | 0xd => {}
            _ => {
                if let Some(cell) = self.memory.get_mut(usize::from(index)) {
                    *cell = value;
                }
            }
        }
    }

    fn decode(version: u16, bytes: &[u8]) -> Result<Decoded, LoadError> {
        let mut decoder = Decoder::open(SECTION, VERSION, version, bytes)?;
        let index = decoder.u8("index")?;
        let b = decoder.u8("register B")?;
        let apart = decoder.u64("distance to the host's time")?.cast_signed();
        if apart.unsigned_abs() > FARTHEST {
            let expected = "less than 10,000 years";
            return Err(decoder.invalid("distance to the host's time", apart as u64, expected));
        }
        let mut set = [0; 10];
        set.copy_from_slice(decoder.raw("time fields", 10)?);
        let mut memory = [0; MEMORY];
        memory.copy_from_slice(decoder.raw("memory", MEMORY)?);
        decoder.end()?;
        if index >= MEMORY as u8 || b & !(SET | BINARY | HOURS_24) != 0 {
            return Err(LoadError::Invalid {
                section: SECTION.into(),
                field: "index and register B",
                got: u64::from(index) << 8 | u64::from(b),
                expected: "an index below 128 and known bits",
            });
        }
        Ok(Decoded {
            index,
            b,
            apart,
            set,
            memory,
        })
    }
}

struct Decoded {
    index: u8,
    b: u8,
    apart: i64,
    set: [u8; 10],
    memory: [u8; MEMORY],
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

/// Which time field a register is, without the alarm's.
fn clock_register(index: u8) -> Option<usize> {
    match index {
        0 => Some(0),
        2 => Some(1),
        4 => Some(2),
        6..=9 => Some(usize::from(index) - 3),
        Rtc::CENTURY => Some(7),
        _ => None,
    }
}

impl Date {
    /// Days are counted in eras of 400 years that begin on the first of March.
    fn from_seconds(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self {
            year,
            month: month as u8,
            day: day as u8,
            hour: (rest / 3_600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    fn seconds(&self) -> i64 {
        let month = i64::from(self.month);
        let year = self.year - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let shifted_month = (month + 9) % 12;
        let day_of_year = (153 * shifted_month + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        let (hour, minute) = (i64::from(self.hour), i64::from(self.minute));
        days * 86_400 + hour * 3_600 + minute * 60 + i64::from(self.second)
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = if at == 1 {
                self.register(self.index)
            } else {
                0xff
            };
        }
    }

    /// The top bit of the index masks NMIs on a PC, which there are none of.
    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [index]) => self.index = index & 0x7f,
            (1, [value]) => self.set_register(self.index, *value),
            _ => {}
        }
    }
}

/// No interrupt, no guest memory: nothing to stop.
impl Persist for Rtc {
    fn section(&self) -> &str {
        SECTION
    }

    fn version(&self) -> u16 {
        VERSION
    }

    fn quiesce(&mut self) {}

    fn save(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(SECTION, VERSION, out);
        encoder.u8(self.index);
        encoder.u8(self.b);
        encoder.u64(self.apart.cast_unsigned());
        encoder.raw(&self.set);
        encoder.raw(&self.memory);
        encoder.seal();
    }

    fn check(&self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        Self::decode(version, bytes).map(drop)
    }

    fn load(&mut self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        let state = Self::decode(version, bytes)?;
        self.index = state.index;
        self.b = state.b;
        self.apart = state.apart;
        self.set = state.set;
        self.memory = state.memory;
        Ok(())
    }

    /// Its battery keeps time and memory.
    fn reset(&mut self, _: &[u8]) {
        self.index = 0;
    }

    fn resume(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_utils::{assert_refuses_damage, saved};
    use proptest::prelude::{any, prop, proptest};

    /// 2026-11-30 23:54:31 UTC, a Monday.
    const NOW: i64 = 1_796_082_871;

    fn rtc() -> Rtc {
        Rtc::with(|| Duration::from_secs(NOW as u64))
    }

    fn get(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(0, &[index | 0x80]);
        let mut byte = [0];
        rtc.read(1, &mut byte);
        byte[0]
    }

    fn put(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    #[test]
    fn it_shows_the_hosts_time_in_bcd_or_binary() {
        let mut rtc = rtc();
        let date = [0x32, 9, 8, 7, 4, 2, 0].map(|i| get(&mut rtc, i));
        assert_eq!(date, [0x20, 0x26, 0x11, 0x30, 0x23, 0x54, 0x31]);
        assert_eq!(get(&mut rtc, 6), 2, "Monday");
        put(&mut rtc, 0xb, BINARY);
        assert_eq!(get(&mut rtc, 4), 0x80 | 11, "11 pm");
        assert_eq!(
            get(&mut rtc, 0xa) & 0x80,
            0,
            "never in the middle of an update"
        );
        assert_eq!(get(&mut rtc, 0xd), 0x80);
    }

    #[test]
    fn what_the_guest_sets_is_kept_apart_from_the_hosts_time() {
        let mut rtc = rtc();
        put(&mut rtc, 0xb, SET | HOURS_24);
        for (index, value) in [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23)] {
            put(&mut rtc, index, value);
        }
        put(&mut rtc, 0xb, HOURS_24);
        assert_eq!(Date::from_seconds(rtc.seconds()).year, 1999);
        let bytes = saved(&rtc);
        let mut other = self::rtc();
        assert_refuses_damage(&mut other, &bytes);
        other.load(1, &bytes).unwrap();
        assert_eq!(get(&mut other, 9), 0x99);
        other.reset(&[]);
        assert_eq!(
            get(&mut other, 9),
            0x99,
            "a reset does not touch the battery"
        );
    }

    #[test]
    fn memory_that_firmware_looks_into_can_be_preset() {
        let mut rtc = rtc();
        rtc.preset(0x5f, 3);
        rtc.preset(0, 0x59);
        rtc.preset(0xff, 1);
        assert_eq!(get(&mut rtc, 0x5f), 3);
        assert_eq!(get(&mut rtc, 0), 0x31, "the clock is not memory");
    }

    proptest! {
        #[test]
        fn a_date_is_its_seconds_and_back(seconds in -62_000_000_000i64..250_000_000_000) {
            assert_eq!(Date::from_seconds(seconds).seconds(), seconds);
        }

        /// Whatever the guest does, it can be saved and loaded.
        #[test]
        fn no_guest_hurts_the_clock(program in prop::collection::vec((any::<u8>(), any::<u8>()), 0..64)) {
            let mut rtc = rtc();
            for (index, value) in program {
                put(&mut rtc, index & 0x7f, value);
                let _any = get(&mut rtc, index);
                let bytes = saved(&rtc);
                let mut other = self::rtc();
                other.load(1, &bytes).unwrap();
                assert_eq!(saved(&other), bytes);
            }
        }
    }
}
