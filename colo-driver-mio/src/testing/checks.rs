//! The checks, in the order in which one guest can go through them.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use colo_proto::{
    id::{Epoch, PAGE_SIZE, PageRuns, Slot},
    machine::{Body, GuestOp, GuestOpKind, Sink},
    ram::PageSet,
};

use super::{
    Subject, Verdict,
    kit::{Image, Kit, differ, page, refused},
};
use crate::Guest;

/// Between two captures.
const BURST: Duration = Duration::from_millis(20);
/// How long a guest that stands still is watched.
const WATCH: Duration = Duration::from_millis(30);
/// How long a guest may take until it says its first number: it boots.
const BOOT: Duration = Duration::from_secs(20);
/// How long it may take until it says another.
const NEXT: Duration = Duration::from_secs(5);

/// Names, in the order of the table.
const NAMES: [&str; 14] = [
    "answers",
    "pages",
    "also",
    "still memory",
    "still frames",
    "stamps",
    "order",
    "cut",
    "failed captures",
    "bytes",
    "damage",
    "load",
    "permit",
    "at once",
];

/// What came of the checks so far.
#[derive(Default)]
struct Book(BTreeMap<&'static str, Result<String, String>>);

impl Book {
    /// Notes what came of a check. The first fault counts.
    fn note(&mut self, name: &'static str, outcome: Result<String, String>) {
        let known = self.0.get(name);
        if known.is_none_or(Result::is_ok) {
            self.0.insert(name, outcome);
        }
    }

    fn wrong(&mut self, name: &'static str, why: impl Into<String>) {
        self.note(name, Err(why.into()));
    }
}

/// Examines a guest that has not run. It is given back to nobody: it ends with the examination.
pub fn examine<G: Guest>(guest: G, subject: Subject) -> Vec<Verdict> {
    let mut book = Book::default();
    match Kit::new(guest, subject) {
        Err(why) => book.wrong("answers", why),
        Ok(mut kit) => {
            // What stops the examination is a fault of whoever does not answer.
            if let Err(why) = all(&mut kit, &mut book) {
                book.wrong("answers", why);
            }
            let (early, slow) = (kit.early.take(), kit.slow.take());
            let frames = kit.frames;
            book.note(
                "order",
                early.map_or_else(|| Ok(format!("{frames} frames")), Err),
            );
            book.note(
                "at once",
                slow.map_or_else(|| Ok("every call".to_owned()), Err),
            );
        }
    }
    NAMES
        .iter()
        .map(|&name| Verdict {
            name,
            outcome: book
                .0
                .remove(name)
                .unwrap_or_else(|| Err("not reached".to_owned())),
        })
        .collect()
}

fn all<G: Guest>(kit: &mut Kit<G>, book: &mut Book) -> Result<(), String> {
    for _ in 0..2 {
        kit.succeed(GuestOp::Resume)?;
    }
    says(kit, BOOT)?;
    let images = captures(kit, book)?;
    failed_captures(kit, book)?;
    damage(kit, book)?;
    loads(kit, book, &images)?;
    permit(kit, book);
    for _ in 0..2 {
        kit.succeed(GuestOp::Pause)?;
    }
    kit.succeed(GuestOp::Harvest)?;
    book.note("answers", Ok("every operation".to_owned()));
    Ok(())
}

/// Waits until the guest says a number; it.
fn says<G: Guest>(kit: &mut Kit<G>, patience: Duration) -> Result<u64, String> {
    let until = std::time::Instant::now() + patience;
    loop {
        if let Some((_, number)) = kit.said.first() {
            return Ok(*number);
        }
        if std::time::Instant::now() > until {
            return Err("the guest says no number".to_owned());
        }
        kit.pump(BURST)?;
    }
}

/// Captures under load; two images of the guest, an older and a newer.
fn captures<G: Guest>(kit: &mut Kit<G>, book: &mut Book) -> Result<[Image; 2], String> {
    let mut at_stop: BTreeMap<Epoch, u64> = BTreeMap::new();
    let mut images = Vec::new();
    let (mut staged, mut stops, mut numbers) = (0, 0, 0);
    for round in 1..=kit.subject.rounds.max(6) {
        kit.call();
        kit.pump(BURST)?;
        kit.call();
        let (slot, pages) = *kit.subject.slots.first().ok_or("there is no slot")?;
        let also = if round % 3 == 0 {
            page(slot, pages - 1)
        } else {
            PageRuns::new()
        };
        let resume = round % 2 == 0;
        let (captured, mut dirty) = kit.capture(&also, resume)?;
        if round == 1 && dirty.count() < kit.subject.slots.iter().map(|s| s.1).sum() {
            book.wrong("pages", "the first capture is not of every page");
            dirty.fill();
        }
        staged += kit.take_staged(&dirty)?;
        at_stop.insert(captured.epoch, kit.written());
        lengths(kit, book, &dirty, captured.state_len);
        let heard = kit.number(&kit.shadow, kit.subject.heard);
        if heard > captured.inputs {
            book.wrong(
                "cut",
                format!("{heard} frames were heard, the cut is {}", captured.inputs),
            );
        }
        if !resume {
            let state = kit.state(&captured)?;
            let live = kit.live()?;
            stops += 1;
            if let Some(pages) = differ(&live, &kit.shadow) {
                let epoch = captured.epoch;
                book.wrong(
                    "pages",
                    format!("epoch {epoch}: {pages} differ from RAM at the stop"),
                );
            }
            still(kit, book, &live, captured.inputs)?;
            asked_for(kit, book, slot, pages)?;
            images.push(Image {
                ram: live,
                state,
                inputs: captured.inputs,
            });
            kit.succeed(GuestOp::Resume)?;
        }
        for (stamp, said) in std::mem::take(&mut kit.said) {
            numbers += 1;
            if let Some(held) = at_stop.get(&stamp).filter(|held| said < **held) {
                book.wrong(
                    "stamps",
                    format!("{said} was said after epoch {stamp}, whose capture holds {held}"),
                );
            }
            if let Some(held) = at_stop.get(&stamp.next()).filter(|held| said > **held) {
                book.wrong(
                    "stamps",
                    format!(
                        "{said} was said before the next epoch than {stamp}, which holds {held}"
                    ),
                );
            }
        }
    }
    book.note("pages", Ok(format!("{staged} staged pages, {stops} stops")));
    book.note("stamps", Ok(format!("{numbers} numbers")));
    book.note("cut", Ok(format!("{} client frames", kit.index)));
    let newer = images.pop().ok_or("no capture stopped")?;
    let older = images.into_iter().next().ok_or("one capture stopped")?;
    Ok([older, newer])
}

/// Sources and sinks to the byte.
fn lengths<G: Guest>(kit: &mut Kit<G>, book: &mut Book, dirty: &PageSet, state: u64) {
    let outcome = (|| {
        let expect = |what: &str, got: u64, expected: u64| {
            if got == expected {
                return Ok(());
            }
            Err(format!("{what}: {got} bytes, {expected} were asked for"))
        };
        let runs = dirty.clone().take_runs(256, 64);
        expect(
            "staged pages",
            kit.vectors(&Body::Staged(runs.clone()))?.bytes(),
            runs.bytes(),
        )?;
        expect(
            "live pages",
            kit.vectors(&Body::Live(runs.clone()))?.bytes(),
            runs.bytes(),
        )?;
        expect("state", kit.vectors(&Body::State(0..state))?.bytes(), state)?;
        let cache = Sink::Cache(runs.clone());
        expect(
            "a place in the cache",
            kit.places(&cache)?.bytes(),
            runs.bytes(),
        )?;
        if state > 0 && kit.vectors(&Body::State(0..u64::MAX / 2)).is_ok() {
            return Err("a state of half of all bytes has a source".to_owned());
        }
        for (slot, pages) in kit.subject.slots.clone() {
            if kit.vectors(&Body::Live(page(slot, pages))).is_ok() {
                return Err(format!("the page after the end of {slot:?} has a source"));
            }
            if kit.places(&Sink::Guest(page(slot, pages))).is_ok() {
                return Err(format!("the page after the end of {slot:?} has a place"));
            }
        }
        if kit.vectors(&Body::Live(page(Slot(u16::MAX), 0))).is_ok() {
            return Err("a slot that there is not has a source".to_owned());
        }
        Ok("sources and sinks".to_owned())
    })();
    book.note("bytes", outcome);
}

/// A guest that stands still, with client frames waiting for it.
fn still<G: Guest>(
    kit: &mut Kit<G>,
    book: &mut Book,
    before: &BTreeMap<Slot, Vec<u8>>,
    inputs: u64,
) -> Result<(), String> {
    // What was said before the stop may still come.
    kit.pump(BURST)?;
    let frames = kit.frames;
    for _ in 0..3 {
        kit.call();
    }
    kit.pump(WATCH)?;
    let said = kit.frames - frames;
    book.note(
        "still frames",
        if said == 0 {
            Ok("while client frames waited".to_owned())
        } else {
            Err(format!("{said} frames were said while it stood still"))
        },
    );
    let after = kit.live()?;
    book.note(
        "still memory",
        differ(before, &after).map_or_else(
            || Ok("while client frames waited".to_owned()),
            |pages| Err(format!("{pages} changed while it stood still")),
        ),
    );
    let (captured, dirty) = kit.capture(&PageRuns::new(), false)?;
    kit.take_staged(&dirty)?;
    if captured.inputs != inputs {
        book.wrong(
            "cut",
            format!(
                "{} frames were consumed by a guest that stands still, {inputs} before",
                captured.inputs
            ),
        );
    }
    Ok(())
}

/// A page that is not dirty, asked for: its staged copy is RAM.
fn asked_for<G: Guest>(
    kit: &mut Kit<G>,
    book: &mut Book,
    slot: Slot,
    pages: u64,
) -> Result<(), String> {
    // The staging area holds something else there than RAM does, unless it is copied.
    let also = page(slot, pages - 1);
    let junk = vec![0xa5; PAGE_SIZE as usize];
    kit.receive(&Sink::Guest(also.clone()), &junk)?;
    let (_, dirty) = kit.capture(&also, false)?;
    kit.take_staged(&dirty)?;
    let mut copy = vec![0; PAGE_SIZE as usize];
    let staged = kit.copy(&Body::Staged(also.clone()), &mut copy);
    let same = staged.is_ok() && copy == junk;
    // As it was: nobody uses the last page, but it is part of the images.
    kit.receive(&Sink::Guest(also.clone()), &vec![0; PAGE_SIZE as usize])?;
    let (_, dirty) = kit.capture(&also, false)?;
    kit.take_staged(&dirty)?;
    if let Some(shadow) = kit.shadow.get_mut(&slot) {
        let at = ((pages - 1) * PAGE_SIZE) as usize;
        shadow[at..].fill(0);
    }
    book.note(
        "also",
        if same {
            Ok("a clean page that was asked for".to_owned())
        } else {
            Err("a page that was asked for is not what RAM holds".to_owned())
        },
    );
    Ok(())
}

/// What a failed capture took from the log is not lost.
fn failed_captures<G: Guest>(kit: &mut Kit<G>, book: &mut Book) -> Result<(), String> {
    const NAME: &str = "failed captures";
    let Some(mut fail) = kit.subject.fail.take() else {
        book.note(NAME, Ok("not examined: nobody makes one fail".to_owned()));
        return Ok(());
    };
    kit.pump(BURST)?;
    fail();
    let epoch = kit.next_epoch();
    let done = kit.operate(GuestOp::Capture {
        epoch,
        also: PageRuns::new(),
        resume: true,
    })?;
    if !refused(&done, GuestOpKind::Capture) {
        book.wrong(NAME, format!("it was made to fail and ended with {done:?}"));
    }
    kit.pump(BURST)?;
    let (_, dirty) = kit.capture(&PageRuns::new(), false)?;
    kit.take_staged(&dirty)?;
    let live = kit.live()?;
    book.note(
        NAME,
        differ(&live, &kit.shadow).map_or_else(
            || Ok("the next one has all".to_owned()),
            |pages| Err(format!("{pages} are missing from the next")),
        ),
    );
    kit.succeed(GuestOp::Resume)
}

/// A state that is not whole.
fn damage<G: Guest>(kit: &mut Kit<G>, book: &mut Book) -> Result<(), String> {
    let (captured, dirty) = kit.capture(&PageRuns::new(), false)?;
    kit.take_staged(&dirty)?;
    let state = kit.state(&captured)?;
    let ram = kit.live()?;
    let half = state.get(..state.len() / 2).unwrap_or_default().to_vec();
    let mut flipped = state.clone();
    flipped.iter_mut().take(16).for_each(|byte| *byte = !*byte);
    for (what, bytes) in [("cut in half", half), ("flipped at its head", flipped)] {
        if bytes.is_empty() {
            continue;
        }
        kit.receive(&Sink::State(0..bytes.len() as u64), &bytes)?;
        let done = kit.operate(GuestOp::CheckState(captured.epoch))?;
        book.note(
            "damage",
            if refused(&done, GuestOpKind::CheckState) {
                Ok("refused".to_owned())
            } else {
                Err(format!("a state that is {what}: {done:?}"))
            },
        );
    }
    if let Some(pages) = differ(&ram, &kit.live()?) {
        book.wrong("damage", format!("{pages} changed by looking at a state"));
    }
    kit.succeed(GuestOp::Resume)
}

/// Twice, over a guest that ran, over an older epoch.
fn loads<G: Guest>(kit: &mut Kit<G>, book: &mut Book, images: &[Image; 2]) -> Result<(), String> {
    let [older, newer] = images;
    let (first, second) = (kit.next_epoch(), kit.next_epoch());
    let steps = [
        ("a newer state", newer, second),
        ("the same again", newer, second),
        ("an older epoch", older, first),
    ];
    for (what, image, epoch) in steps {
        kit.load(image, epoch)?;
        kit.said.clear();
        let live = kit.live()?;
        if let Some(pages) = differ(&image.ram, &live) {
            book.wrong("load", format!("{what}: {pages} are not the state's"));
        }
        let written = kit.number(&image.ram, kit.subject.written);
        kit.succeed(GuestOp::Resume)?;
        let said = says(kit, NEXT)?;
        let stamps: Vec<Epoch> = kit.said.iter().map(|said| said.0).collect();
        if let Some(stamp) = stamps.iter().find(|stamp| **stamp != epoch) {
            book.wrong("stamps", format!("{stamp} after a load of epoch {epoch}"));
        }
        book.note(
            "load",
            if (written..=written + 1).contains(&said) {
                Ok("twice, over a guest that ran, over an older epoch".to_owned())
            } else {
                Err(format!("{what}: it holds {written}, {said} was said next"))
            },
        );
    }
    Ok(())
}

fn permit<G: Guest>(kit: &mut Kit<G>, book: &mut Book) {
    const NAME: &str = "permit";
    let Some(mut left) = kit.subject.left.take() else {
        book.note(
            NAME,
            Ok("not examined: nobody counts what leaves".to_owned()),
        );
        return;
    };
    if let Err(why) = kit
        .succeed(GuestOp::Pause)
        .and_then(|()| kit.pump(BURST).map(drop))
    {
        book.wrong(NAME, why);
        return;
    }
    let before = left();
    let frame = Bytes::from_static(&[0xee; 60]);
    kit.lets_out(frame.clone(), Kit::<G>::ended());
    let muted = left() == before;
    kit.lets_out(frame, colo_proto::time::Instant::END);
    let spoken = left() == before + 1;
    book.note(
        NAME,
        match (muted, spoken) {
            (true, true) => Ok("an ended one mutes, a good one does not".to_owned()),
            (false, _) => Err("a frame left whose permit had ended".to_owned()),
            (true, false) => Err("a frame did not leave whose permit was good".to_owned()),
        },
    );
}
