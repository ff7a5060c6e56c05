//! Both roles against the recording and against each other: what is owed when, and what is whole
//! when the link ends.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{io::Read, path::Path, sync::OnceLock, time::Duration};

use colo_proto::{
    id::PAGE_SIZE,
    qemu::{
        Expectation, Fault, Item, Limits, Message, Reader,
        session::{Action, FeedError, Feeder, Lost, Patience, Phase, Standby},
    },
    time::Instant,
};

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

const RECORDINGS: [&str; 3] = ["qemu72-pc-1vcpu", "qemu1013-pc", "qemu111-pc"];

fn unpacked(name: &str) -> Vec<u8> {
    let packed = fixture(&format!("{name}.p2s.xz"));
    let mut bytes = Vec::new();
    xz2::read::XzDecoder::new(&packed[..])
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

fn recording() -> &'static [u8] {
    static RECORDING: OnceLock<Vec<u8>> = OnceLock::new();
    RECORDING.get_or_init(|| unpacked(RECORDINGS[0]))
}

const NOW: Instant = Instant::ZERO;
const VMSTATE_LOADED: [u8; 4] = [0, 0, 0, 6];

fn standby() -> Standby {
    Standby::new(
        NOW,
        Limits::default(),
        Expectation::default(),
        Patience::default(),
    )
}

/// What a link brought.
#[derive(Default)]
struct Taken {
    /// Offset at which each state was whole.
    whole: Vec<u64>,
    sent: Vec<u8>,
    /// Pages of the state in hand, and of the whole ones.
    pages: u64,
    kept: Vec<u64>,
}

fn take(standby: &mut Standby, mut input: &[u8]) -> Result<Taken, Lost> {
    let mut taken = Taken::default();
    loop {
        while let Some(place) = standby.demand().place {
            if input.is_empty() {
                return Ok(taken);
            }
            let n = input.len().min(PAGE_SIZE as usize - place.skip);
            standby.handle_placed(NOW, n).unwrap();
            input = &input[n..];
        }
        match standby.handle_bytes(NOW, &mut input)? {
            Some(Action::Whole(state)) => {
                assert_eq!(state.epoch.0, taken.whole.len() as u64);
                taken.whole.push(standby.offset());
                taken.kept.push(std::mem::take(&mut taken.pages));
            }
            Some(Action::Page(_)) => taken.pages += 1,
            Some(Action::Send(messages)) => taken.sent.extend(Message::encode_all(&messages)),
            Some(_) => {}
            None if input.is_empty() && standby.demand().place.is_none() => return Ok(taken),
            None => {}
        }
    }
}

#[test]
fn the_standby_sends_what_the_real_secondary_sent() {
    for name in RECORDINGS {
        let mut standby = standby();
        let taken = take(&mut standby, &unpacked(name)).unwrap();
        let sent = fixture(&format!("{name}.s2p"));
        assert_eq!(taken.sent, sent, "{name}");
        // The migration, and what was said to be loaded. QEMU 11.1 opens with two messages of the
        // return path, so that the length alone does not tell.
        let loaded = sent.chunks(4).filter(|word| *word == VMSTATE_LOADED);
        assert_eq!(taken.whole.len(), 1 + loaded.count(), "{name}");
        assert!(standby.began());
        assert_eq!(standby.handle_closed(), Lost::ClosedIdle);
    }
}

/// QEMU 10.0.2 ends as a plain migration; so does a primary that dies before its first request.
#[test]
fn a_primary_that_asks_for_no_checkpoint_never_began() {
    for name in RECORDINGS {
        let mut all = standby();
        let bytes = unpacked(name);
        let whole = take(&mut all, &bytes).unwrap().whole[0] as usize;
        let mut standby = standby();
        take(&mut standby, &bytes[..whole]).unwrap();
        assert!(!standby.began());
        let lost = standby.handle_closed();
        assert_eq!(lost, Lost::NeverBegan);
        assert!(lost.to_string().contains("COLO never began"));
        // What it has is a whole migration, and its sender has nothing that runs.
        assert_eq!(standby.take_over(NOW, &lost).map(|epoch| epoch.0), Some(0));
    }
}

/// Roll forward or back, never between: a state is whole behind its last byte, not before.
#[test]
fn a_cut_anywhere_leaves_exactly_the_states_that_were_whole() {
    let all = take(&mut standby(), recording()).unwrap();
    let step = recording().len() / 60;
    let around = all.whole.iter().flat_map(|at| [at - 1, *at, at + 1]);
    let cuts = (0..recording().len() as u64).step_by(step).chain(around);
    for cut in cuts.filter(|cut| *cut <= recording().len() as u64) {
        let mut standby = standby();
        let taken = take(&mut standby, &recording()[..cut as usize]).unwrap();
        let whole = all.whole.iter().filter(|at| **at <= cut).count();
        assert_eq!(taken.whole.len(), whole, "cut behind byte {cut}");
        assert_eq!(taken.kept, all.kept[..whole]);
        let idle = all.whole.contains(&cut);
        let lost = standby.handle_closed();
        let between = matches!(lost, Lost::ClosedIdle | Lost::NeverBegan);
        assert_eq!(between, idle);
        // Whatever the link ends in, it takes over with the newest one.
        let epoch = standby.take_over(NOW, &lost).map(|epoch| epoch.0 + 1);
        assert_eq!(epoch.unwrap_or(0), whole as u64, "cut behind byte {cut}");
    }
}

#[test]
fn silence_counts_inside_a_checkpoint_and_not_between_unless_asked_for() {
    let late = NOW + Duration::from_secs(3600);
    let whole = take(&mut standby(), recording()).unwrap().whole;
    let mut idle = standby();
    take(&mut idle, &recording()[..whole[3] as usize]).unwrap();
    assert_eq!((idle.phase(), idle.poll_timeout()), (Phase::Idle, None));
    idle.handle_timeout(late).unwrap();

    let mut within = standby();
    take(&mut within, &recording()[..whole[3] as usize + 4]).unwrap();
    let deadline = within.poll_timeout().unwrap();
    assert_eq!(deadline, NOW + Patience::default().within);
    within
        .handle_timeout(deadline - Duration::from_nanos(1))
        .unwrap();
    let lost = within.handle_timeout(deadline).unwrap_err();
    assert!(
        matches!(
            lost,
            Lost::Silent {
                phase: Phase::Stopped,
                ..
            }
        ),
        "{lost}"
    );

    let patience = Patience {
        between: Some(Duration::from_secs(1)),
        ..Patience::default()
    };
    let mut asked = Standby::new(NOW, Limits::default(), Expectation::default(), patience);
    take(&mut asked, &recording()[..whole[3] as usize]).unwrap();
    asked.handle_timeout(late).unwrap_err();
}

#[test]
fn a_primary_that_sends_rubbish_is_alive_and_not_taken_over_from() {
    let whole = take(&mut standby(), recording()).unwrap().whole;
    let mut data = recording()[..whole[3] as usize].to_vec();
    data.extend([0, 0, 0, 9]);
    let mut standby = standby();
    let lost = take(&mut standby, &data).map(|_| ()).unwrap_err();
    assert!(matches!(lost, Lost::Faulty(_)), "{lost}");
    assert_eq!(standby.take_over(NOW, &lost), None);
}

/// A primary goes silent behind its description: if that does not fit, it is the reason.
#[test]
fn a_description_that_does_not_fit_explains_the_silence() {
    let all = take(&mut standby(), recording()).unwrap();
    let mut data = recording()[..all.whole[0] as usize].to_vec();
    let last = data.len() - 1;
    data[last] = b' ';
    let mut standby = standby();
    take(&mut standby, &data).unwrap();
    let lost = standby
        .handle_timeout(NOW + Duration::from_secs(9))
        .unwrap_err();
    let Lost::Faulty(fault) = lost else {
        panic!("{lost}");
    };
    assert_eq!(
        (fault.field, fault.fault),
        ("description", Fault::Malformed)
    );
}

/// The primary's role waits for READY, REPLY, and RECEIVED with LOADED.
#[test]
fn the_feeder_waits_for_every_reply_of_the_standby() {
    for name in RECORDINGS {
        let bytes = unpacked(name);
        let (mut feeder, mut standby) = (Feeder::new(NOW, Duration::from_secs(1)), standby());
        let mut reader = Reader::new(Limits::default(), Expectation::default());
        let (mut input, mut from) = (&bytes[..], 0);
        let (mut waits, mut replies) = (0, vec![]);
        while let Some(item) = reader.skip_pages(&mut input).unwrap() {
            let upto = reader.offset() as usize;
            assert!(feeder.may_send());
            replies.extend(take_on(&mut standby, &bytes[from..upto]));
            from = upto;
            feeder.handle_sent(NOW, &item).unwrap();
            // Device sections and description come out together: the reply is owed after both.
            if !feeder.may_send() {
                waits += 1;
                assert!(feeder.poll_timeout().is_some());
                feeder.handle_bytes(NOW, &replies).unwrap();
                replies.clear();
            }
        }
        let checkpoints = feeder.checkpoints();
        assert_eq!(waits, 1 + 2 * checkpoints, "{name}");
        assert!(checkpoints >= 11, "{name}");
        feeder.handle_closed().unwrap();
    }
}

fn take_on(standby: &mut Standby, mut input: &[u8]) -> Vec<u8> {
    let mut sent = vec![];
    loop {
        while let Some(place) = standby.demand().place {
            if input.is_empty() {
                return sent;
            }
            let n = input.len().min(PAGE_SIZE as usize - place.skip);
            standby.handle_placed(NOW, n).unwrap();
            input = &input[n..];
        }
        match standby.handle_bytes(NOW, &mut input).unwrap() {
            Some(Action::Send(messages)) => sent.extend(Message::encode_all(&messages)),
            Some(_) => {}
            None if input.is_empty() && standby.demand().place.is_none() => return sent,
            None => {}
        }
    }
}

/// A feeder that has sent the migration.
fn migrated(patience: Duration) -> Feeder {
    let mut feeder = Feeder::new(NOW, patience);
    let mut reader = Reader::new(Limits::default(), Expectation::default());
    let mut input = recording();
    while feeder.may_send() {
        let item = reader.skip_pages(&mut input).unwrap().unwrap();
        feeder.handle_sent(NOW, &item).unwrap();
    }
    feeder
}

#[test]
fn the_feeder_names_the_reply_that_is_missing_wrong_or_unasked() {
    let patience = Duration::from_secs(1);
    let mut feeder = Feeder::new(NOW, patience);
    let unasked = feeder.handle_bytes(NOW, &[0; 4]).unwrap_err();
    assert!(matches!(
        unasked,
        FeedError::Unasked {
            reply: Message::CheckpointReady
        }
    ));

    let feeder = migrated(patience);
    let wrong = feeder.clone().handle_bytes(NOW, &[0, 0, 0, 6]).unwrap_err();
    assert!(matches!(wrong, FeedError::Faulty(_)), "{wrong}");
    let silent = feeder.handle_timeout(NOW + patience).unwrap_err();
    assert_eq!(
        silent.to_string(),
        "the secondary did not send CHECKPOINT_READY within 1s"
    );
    let closed = feeder.handle_closed().unwrap_err();
    assert!(matches!(
        closed,
        FeedError::Closed {
            due: Message::CheckpointReady
        }
    ));
}

#[test]
fn the_feeder_refuses_what_its_machine_has_not_asked_for() {
    let mut feeder = migrated(Duration::from_secs(1));
    let request = Item::Message(Message::CheckpointRequest);
    let early = feeder.handle_sent(NOW, &request).unwrap_err();
    assert_eq!(
        early.to_string(),
        "CHECKPOINT_REQUEST was sent before it was due"
    );
}

#[test]
fn a_migration_may_take_longer_to_send_than_any_step_may_stall() {
    let mut feeder = Feeder::new(NOW, Duration::from_secs(30));
    let mut reader = Reader::new(Limits::default(), Expectation::default());
    let mut input = recording();
    let mut now = NOW;
    while let Some(item) = reader.skip_pages(&mut input).unwrap() {
        // Something goes out all the time: nothing is ever silent.
        now = now + Duration::from_millis(700);
        feeder.handle_sent(now, &item).unwrap();
        if matches!(item, Item::Description(_)) {
            break;
        }
    }
    assert!(now.since(NOW) > Duration::from_secs(660));
}
