//! What one machine hands out is what the other was waiting for, however the kernel cuts it.

use core::num::NonZeroUsize;

use bytes::Bytes;
use colo_driver_mio::{DriverConfig, guest::fake::run};
use colo_proto::{
    id::{Channel, PAGE_SIZE},
    machine::{Body, Demand, Output, Sink, Transmit},
};

use crate::script::{Host, PAGES, Seen, config, dialling, listening, message, pair, small};

const RAM: Channel = Channel::Ram(0);

/// Every page of the sender, one message of `pages` pages each, with a head that numbers it.
fn send_all_pages(from: &Host, to: &Host, pages: u32) {
    let messages: Vec<_> = (0..PAGES as u64)
        .step_by(pages as usize)
        .map(|first| (run(first, pages), first.to_le_bytes()))
        .collect();
    for page in 0..PAGES {
        assert!(from.guest.write(page, 1 + page as u64));
    }
    to.tell(|plan| {
        let demands = plan.demands.entry(RAM).or_default();
        demands.push_back(small(8));
        for (n, (runs, _)) in messages.iter().enumerate() {
            demands.push_back(Demand::Read {
                place: Some(Sink::Guest(runs.clone())),
                then: if n + 1 < messages.len() { 8 } else { 0 },
            });
        }
    });
    from.tell(|plan| {
        plan.transmits
            .entry(RAM)
            .or_default()
            .extend(messages.iter().map(|(runs, head)| Transmit {
                head: Bytes::copy_from_slice(head),
                body: Body::Live(runs.clone()),
            }));
    });
    let placed = Seen::Placed(RAM, pages as usize * PAGE_SIZE as usize);
    to.script.wait("all pages", |plan| {
        plan.seen.iter().filter(|seen| **seen == placed).count() == messages.len()
    });
    assert!(to.guest.same_ram(&from.guest));
    // Heads came in order, each before the pages that follow it.
    let heads: Vec<_> = to
        .script
        .plan()
        .seen
        .iter()
        .filter_map(|seen| match seen {
            Seen::Bytes(RAM, head) => Some(u64::from_le_bytes(head[..].try_into().unwrap())),
            _ => None,
        })
        .collect();
    let expected: Vec<_> = (0..PAGES as u64).step_by(pages as usize).collect();
    assert_eq!(heads, expected);
    let total = messages.len() as u64 * 8 + PAGES as u64 * PAGE_SIZE;
    from.script
        .wait("all sent", |plan| plan.sent.get(&RAM) == Some(&total));
}

#[test]
fn pages_go_from_ram_to_ram() {
    let (primary, secondary) = pair(listening(1), |p| dialling(2, p), &[RAM]);
    send_all_pages(&primary, &secondary, 64);
}

#[test]
fn one_page_a_message_is_the_same() {
    let (primary, secondary) = pair(listening(1), |p| dialling(2, p), &[RAM]);
    send_all_pages(&primary, &secondary, 1);
}

#[test]
fn the_smallest_socket_buffers_only_cut_it_finer() {
    // Unix sockets: with buffers this small, TCP would mostly wait for its own timers.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("primary.sock");
    let tiny = |mut config: DriverConfig| {
        config.buffer = Some(1);
        config
    };
    let mut primary = tiny(config(1));
    primary.listen = Some(format!("unix:{}", path.display()).parse().unwrap());
    let (primary, secondary) = pair(primary, |p| tiny(dialling(2, p)), &[RAM]);
    send_all_pages(&primary, &secondary, 32);
}

#[test]
fn unix_sockets_carry_the_same_and_leave_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("primary.sock");
    let mut primary = config(1);
    primary.listen = Some(format!("unix:{}", path.display()).parse().unwrap());
    {
        let (primary, secondary) = pair(primary, |p| dialling(2, p), &[RAM]);
        send_all_pages(&primary, &secondary, 16);
        assert!(path.exists());
    }
    assert!(!path.exists());
}

#[test]
fn frames_and_messages_pass_both_ways_on_their_own_channels() {
    let channels = [Channel::Control, Channel::Net, RAM];
    let (primary, secondary) = pair(listening(1), |p| dialling(2, p), &channels);
    let frame: Vec<u8> = (0..1514u32).map(|n| n as u8).collect();
    for (from, to) in [(&primary, &secondary), (&secondary, &primary)] {
        to.tell(|plan| {
            plan.demands
                .insert(Channel::Control, [small(5), small(6)].into());
            plan.demands.insert(
                Channel::Net,
                [Demand::Frame(NonZeroUsize::new(1514).unwrap())].into(),
            );
        });
        from.tell(|plan| {
            let control = [message(b"hello"), message(b" world")];
            plan.transmits.insert(Channel::Control, control.into());
            let net = Transmit {
                head: Bytes::from(frame[..14].to_vec()),
                body: Body::Bytes(Bytes::from(frame[14..].to_vec())),
            };
            plan.transmits.insert(Channel::Net, [net].into());
        });
        to.script
            .wait_for(&Seen::Bytes(Channel::Control, b"hello".to_vec()));
        to.script
            .wait_for(&Seen::Bytes(Channel::Control, b" world".to_vec()));
        to.script
            .wait_for(&Seen::Frame(Channel::Net, frame.clone()));
    }
}

#[test]
fn last_words_arrive_though_the_channel_is_hung_up_at_once() {
    let (primary, secondary) = pair(listening(1), |p| dialling(2, p), &[Channel::Control]);
    // Unread bytes at the primary must not turn its close into a reset that destroys them.
    secondary.tell(|plan| {
        plan.transmits
            .insert(Channel::Control, [message(&[0; 4096])].into());
    });
    secondary
        .script
        .wait("sent", |plan| plan.sent.contains_key(&Channel::Control));
    primary.tell(|plan| {
        plan.transmits
            .insert(Channel::Control, [message(b"goodbye")].into());
    });
    primary
        .script
        .wait("sent", |plan| plan.sent.contains_key(&Channel::Control));
    primary.tell(|plan| plan.outputs.push_back(Output::HangUp(Channel::Control)));
    secondary.tell(|plan| {
        plan.demands
            .insert(Channel::Control, [small(7), small(1)].into());
    });
    secondary
        .script
        .wait_for(&Seen::Bytes(Channel::Control, b"goodbye".to_vec()));
    secondary.script.wait_for(&Seen::Down(Channel::Control));
    assert!(
        !primary
            .script
            .plan()
            .seen
            .contains(&Seen::Down(Channel::Control)),
        "no Down is owed for a hang-up"
    );
}
