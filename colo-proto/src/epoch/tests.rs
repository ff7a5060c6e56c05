//! What a receiver refuses.

use core::num::NonZeroU32;

use super::{Receiver, Step};
use crate::{
    config::Config,
    error::PeerFault,
    id::{Epoch, Generation, PageRun, PageRuns, Slot},
    machine::GuestOp,
    member::{MacKey, MemberConfig, NodeId, VmId},
    wire::{FLAG_LIVE, Head, Kind, VmstateSend},
};

fn head(kind: Kind, number: u64) -> Head {
    Head::new(kind, Generation(0), number)
}

fn page(first: u64) -> PageRuns {
    let mut runs = PageRuns::new();
    let pages = NonZeroU32::MIN;
    let slot = Slot(0);
    runs.push(PageRun { slot, first, pages }).unwrap();
    runs
}

/// Takes a checkpoint without pages, or with this one.
fn offered(receiver: &mut Receiver, newest: u64, epoch: u64, sent: Option<u64>) -> PeerFaultOr {
    receiver.request(Epoch(newest), epoch)?;
    let mut step = receiver.paused();
    if step == Some(Step::Do(GuestOp::Harvest)) {
        receiver.own_dirty(Slot(0), &[0b1000]);
        step = Some(receiver.harvested());
    }
    while let Some((_, next)) = receiver.poll_report() {
        step = Some(next);
    }
    assert_eq!(step, Some(Step::Tell(Kind::CheckpointReply, epoch)));
    let (inputs, pages) = (0, sent.iter().count() as u64);
    let send = VmstateSend { inputs, pages }.encode();
    receiver.announced(&head(Kind::VmstateSend, epoch), &send)?;
    let mut table = head(Kind::Pages, epoch);
    let mut end = head(Kind::LaneEnd, epoch);
    if let Some(first) = sent {
        table.arg = 1;
        receiver.pages(0, &table, page(first))?;
        receiver.placed(&table);
        end.count = 1;
    }
    let _nothing = receiver.lane_end(0, &end)?;
    assert_eq!(receiver.state(&head(Kind::VmstateSize, epoch))?, None);
    let check = receiver.check(false)?;
    assert_eq!(check, Step::Do(GuestOp::CheckState(Epoch(epoch))));
    receiver.checked().unwrap();
    let _disks = receiver.ram_committed(Epoch(epoch));
    receiver.replicated().unwrap();
    receiver.loaded(Epoch(epoch)).unwrap();
    Ok(())
}

type PeerFaultOr = Result<(), PeerFault>;

/// Whole at epoch 1.
fn whole() -> Receiver {
    let member = MemberConfig::new(VmId([7; 16]), NodeId(2), MacKey([7; 16]));
    let config = Config::builder(NodeId(1), member, &[(Slot(0), 16)]);
    let mut receiver = Receiver::new(&config.build().unwrap());
    let mut live = head(Kind::LaneEnd, 0);
    live.flags = FLAG_LIVE;
    assert!(receiver.begins(&live));
    let done = receiver.lane_end(0, &live).unwrap();
    assert_eq!(done, Step::Tell(Kind::RoundDone, 0));
    offered(&mut receiver, 0, 1, None).unwrap();
    receiver
}

#[test]
fn a_checkpoint_that_is_not_newer_than_the_one_held_is_refused() {
    let fault = offered(&mut whole(), 1, 1, None).unwrap_err();
    assert!(
        matches!(
            fault,
            PeerFault::Field {
                field: "epoch",
                got: 1,
                expected: 2,
                ..
            }
        ),
        "{fault}"
    );
    assert_eq!(offered(&mut whole(), 1, 2, None), Ok(()));
}

#[test]
fn a_page_that_only_this_side_wrote_must_come_back_with_the_checkpoint() {
    let mut receiver = whole();
    receiver.resumed();
    let fault = offered(&mut receiver, 1, 2, None).unwrap_err();
    assert!(
        matches!(
            fault,
            PeerFault::Field {
                field: "own dirty pages sent back",
                ..
            }
        ),
        "{fault}"
    );
    let mut receiver = whole();
    receiver.resumed();
    assert_eq!(offered(&mut receiver, 1, 2, Some(3)), Ok(()));
}
