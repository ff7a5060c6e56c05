//! The card as its driver and its loop see it.

use bytes::Bytes;

use super::super::test_utils::*;
use super::*;
use crate::device::Persist as _;
use crate::device::test_utils::{assert_refuses_damage, saved};

const RX: usize = 0;
const TX: usize = 1;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const EVENT_IDX: u64 = 1 << 29;
/// A frame's place in RAM, by turn.
const fn place(turn: u64) -> u64 {
    BUFFERS + 0x1000 * turn
}

fn card() -> Net {
    Net::new(NetConfig {
        mac: MAC,
        offloads: Offloads::default(),
    })
}

fn up() -> Driver<Net> {
    Driver::up(card(), 0)
}

/// Lays out a frame as Linux does: header and frame in buffers of their own.
fn lay_tx(driver: &mut Driver<Net>, turn: u64, frame: &[u8]) -> u16 {
    let at = place(turn);
    driver.put(at, &[0; VNET_HEADER]);
    driver.put(at + 0x100, frame);
    let len = u32::try_from(frame.len()).unwrap();
    driver.lay(TX, &[Buf::Out(at, 12), Buf::Out(at + 0x100, len)])
}

fn send(driver: &mut Driver<Net>, turn: u64, frame: &[u8]) {
    let head = lay_tx(driver, turn, frame);
    driver.publish(TX, head);
}

fn post_rx(driver: &mut Driver<Net>, turn: u64, len: u32) {
    driver.post(RX, &[Buf::In(place(turn), len)]);
}

fn poll(driver: &mut Driver<Net>, budget: usize) -> Vec<(u64, Bytes)> {
    let mut frames = vec![];
    driver
        .mmio
        .poll_tx(budget, &mut |epoch, frame| frames.push((epoch, frame)));
    frames
}

fn frame(number: u8) -> Vec<u8> {
    vec![number; 60]
}

#[test]
fn the_configuration_space_holds_address_and_link() {
    let mut driver = up();
    let read = |driver: &mut Driver<Net>| {
        let mut data = [0xff; 8];
        crate::device::BusDevice::read(&mut driver.mmio, 0x100, &mut data);
        data
    };
    assert_eq!(read(&mut driver), [0x52, 0x54, 0, 1, 2, 3, 1, 0]);
    driver.mmio.set_link(false);
    assert!(driver.interrupted());
    assert_eq!(driver.get(0x60), 2);
    assert_eq!(driver.get(0xfc), 1, "generation");
    assert_eq!(read(&mut driver), [0x52, 0x54, 0, 1, 2, 3, 0, 0]);
    driver.mmio.set_link(false);
    assert!(!driver.interrupted(), "no change, no news");
}

#[test]
fn a_frame_sent_wakes_the_loop_and_comes_out_without_its_header() {
    let mut driver = up();
    driver.woken();
    send(&mut driver, 0, &frame(7));
    driver.notify(TX);
    assert!(driver.woken());
    assert_eq!(driver.completed(TX), None, "the loop's to take");
    assert_eq!(poll(&mut driver, 16), [(0, Bytes::from(frame(7)))]);
    assert_eq!(driver.completed(TX), Some((0, 0)));
    assert!(driver.interrupted());
    assert!(!driver.woken());
}

#[test]
fn a_budget_leaves_the_rest_and_comes_back() {
    let mut driver = up();
    for turn in 0..5 {
        send(&mut driver, turn, &frame(turn as u8));
    }
    assert_eq!(poll(&mut driver, 2).len(), 2);
    assert!(driver.woken());
    let rest = poll(&mut driver, 16);
    assert_eq!(rest.len(), 3);
    assert_eq!(rest[0].1, frame(2));
    assert!(!driver.woken());
}

#[test]
fn an_emptied_ring_wants_a_notification_and_a_busy_one_does_not() {
    let mut driver = up();
    for turn in 0..3 {
        send(&mut driver, turn, &frame(1));
    }
    poll(&mut driver, 2);
    assert_eq!(driver.used_field(TX, 0), 1, "the loop comes back by itself");
    poll(&mut driver, 2);
    assert_eq!(driver.used_field(TX, 0), 0);

    let mut driver = Driver::up(card(), EVENT_IDX);
    let avail_event = 4 + 8 * u64::from(RING);
    for turn in 0..3 {
        send(&mut driver, turn, &frame(1));
    }
    poll(&mut driver, 2);
    assert_eq!(driver.used_field(TX, avail_event), 0, "long past");
    poll(&mut driver, 2);
    assert_eq!(driver.used_field(TX, avail_event), 3, "at the next one");
}

#[test]
fn frames_too_short_too_long_or_outside_ram_are_completed_and_dropped() {
    let mut driver = up();
    driver.post(TX, &[Buf::Out(BUFFERS, 12)]);
    driver.post(TX, &[Buf::Out(BUFFERS, 3)]);
    driver.post(TX, &[Buf::Out(BUFFERS, 65_563)]);
    driver.post(TX, &[Buf::Out(RAM - 20, 100)]);
    driver.post(TX, &[Buf::In(BUFFERS, 100)]);
    send(&mut driver, 0, &frame(1));
    assert_eq!(poll(&mut driver, 16).len(), 1);
    assert_eq!(driver.mmio.device().metrics().tx_dropped, 5);
    for _ in 0..6 {
        driver.completed(TX).unwrap();
    }
}

#[test]
fn the_header_may_share_a_buffer_with_the_frame_or_be_cut_anywhere() {
    for cut in [1, 11, 12, 13, 40] {
        let mut driver = up();
        let mut bytes = vec![0; 12];
        bytes.extend(frame(9));
        driver.put(BUFFERS, &bytes);
        let rest = 72 - cut;
        driver.post(
            TX,
            &[
                Buf::Out(BUFFERS, cut),
                Buf::Out(BUFFERS + u64::from(cut), rest),
            ],
        );
        assert_eq!(poll(&mut driver, 1)[0].1, frame(9), "cut at {cut}");
    }
}

#[test]
fn a_frame_received_has_a_header_for_one_buffer() {
    let mut driver = up();
    post_rx(&mut driver, 0, 1526);
    assert_eq!(driver.mmio.rx(1, &frame(5)), RxOutcome::Delivered);
    assert_eq!(driver.completed(RX), Some((0, 72)));
    let bytes = driver.bytes(place(0), 72);
    assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(bytes[12..], frame(5));
    assert!(driver.interrupted());
    assert_eq!(driver.mmio.consumed_inputs(), 1);
}

#[test]
fn without_buffers_frames_wait_in_order() {
    for features in [0, EVENT_IDX] {
        let mut driver = Driver::up(card(), features);
        for index in 1..=3 {
            let got = driver.mmio.rx(index, &frame(index as u8));
            assert_eq!(got, RxOutcome::Queued);
        }
        assert_eq!(driver.mmio.consumed_inputs(), 0);
        post_rx(&mut driver, 0, 1526);
        post_rx(&mut driver, 1, 1526);
        driver.notify(RX);
        assert_eq!(driver.mmio.consumed_inputs(), 2);
        assert!(driver.interrupted());
        post_rx(&mut driver, 2, 1526);
        post_rx(&mut driver, 3, 1526);
        assert_eq!(driver.mmio.rx(4, &frame(4)), RxOutcome::Delivered);
        assert_eq!(driver.mmio.consumed_inputs(), 4);
        for turn in 0..4 {
            assert_eq!(driver.bytes(place(turn) + 12, 60), frame(turn as u8 + 1));
        }
    }
}

#[test]
fn a_starved_card_asks_for_the_notification_it_had_turned_off() {
    let mut driver = up();
    post_rx(&mut driver, 0, 1526);
    driver.notify(RX);
    assert_eq!(driver.used_field(RX, 0), 1, "no notify: nobody waits");
    driver.mmio.rx(1, &frame(1));
    driver.mmio.rx(2, &frame(2));
    assert_eq!(driver.used_field(RX, 0), 0, "somebody waits");
}

#[test]
fn the_backlog_has_a_bound_and_what_is_dropped_is_not_consumed_before_what_waits() {
    let mut driver = up();
    let mut index = 0;
    while driver.mmio.rx(index + 1, &frame(1)) == RxOutcome::Queued {
        index += 1;
    }
    assert_eq!(index, 1024);
    assert_eq!(driver.mmio.consumed_inputs(), 0);
    post_rx(&mut driver, 0, 1526);
    driver.notify(RX);
    assert_eq!(driver.mmio.consumed_inputs(), 1);
    let metrics = driver.mmio.device().metrics();
    assert_eq!((metrics.rx_queued, metrics.rx_dropped), (1024, 1));
    driver.initialise(0);
    assert_eq!(
        driver.mmio.consumed_inputs(),
        1025,
        "a reset drops the rest"
    );

    let mut driver = up();
    let long = vec![0; 65_000];
    let queued = (1..100)
        .take_while(|&index| driver.mmio.rx(index, &long) == RxOutcome::Queued)
        .count();
    assert_eq!(queued, (4 << 20) / 65_000);
}

#[test]
fn a_buffer_too_short_drops_the_frame_and_stays() {
    let mut driver = up();
    post_rx(&mut driver, 0, 71);
    assert_eq!(driver.mmio.rx(1, &frame(1)), RxOutcome::Dropped);
    assert_eq!(driver.mmio.consumed_inputs(), 1);
    assert_eq!(driver.mmio.rx(2, &[2; 59]), RxOutcome::Delivered);
}

#[test]
fn a_card_without_driver_or_cable_drops() {
    let mut driver = Driver::new(card());
    assert_eq!(driver.mmio.rx(1, &frame(1)), RxOutcome::Dropped);
    assert_eq!(driver.mmio.consumed_inputs(), 1);
    let mut driver = up();
    driver.mmio.set_link(false);
    post_rx(&mut driver, 0, 1526);
    assert_eq!(driver.mmio.rx(2, &frame(1)), RxOutcome::Dropped);
    send(&mut driver, 1, &frame(1));
    assert_eq!(poll(&mut driver, 1), []);
    assert!(driver.completed(TX).is_some());
}

#[test]
fn frames_in_the_ring_at_the_stop_come_out_under_the_next_epoch_on_both_sides() {
    let mut one = up();
    send(&mut one, 0, &frame(1));
    send(&mut one, 1, &frame(2));
    send(&mut one, 2, &frame(3));
    assert_eq!(poll(&mut one, 1), [(0, Bytes::from(frame(1)))]);
    // Descriptors of a fourth are written, its index is not: the guest was stopped in between.
    let half = lay_tx(&mut one, 3, &frame(4));
    one.mmio.quiesce();
    assert_eq!(poll(&mut one, 16), [], "nothing leaves while quiesced");
    one.mmio.set_epoch(1);
    let mut two = Driver::new(card());
    two.mmio.set_epoch(1);
    one.checkpoint_into(&mut two);
    for machine in [&mut one, &mut two] {
        assert!(machine.woken());
        let frames = poll(machine, 16);
        let expected = [2, 3].map(|n| (1, Bytes::from(frame(n))));
        assert_eq!(frames, expected);
        machine.publish(TX, half);
        machine.notify(TX);
        assert_eq!(poll(machine, 16), [(1, Bytes::from(frame(4)))]);
        assert_eq!((0..5).map_while(|_| machine.completed(TX)).count(), 4);
    }
}

#[test]
fn inputs_during_the_stop_wait_and_arrive_after_it() {
    let mut driver = up();
    post_rx(&mut driver, 0, 1526);
    driver.mmio.quiesce();
    let before = saved(&driver.mmio);
    assert_eq!(driver.mmio.rx(1, &frame(1)), RxOutcome::Queued);
    assert_eq!(saved(&driver.mmio), before, "not in the checkpoint");
    assert!(!driver.interrupted());
    driver.mmio.resume();
    assert!(driver.interrupted());
    assert_eq!(driver.completed(RX), Some((0, 72)));
    assert_eq!(driver.mmio.consumed_inputs(), 1);
}

#[test]
fn a_loaded_card_says_which_inputs_its_guest_knows() {
    let mut one = up();
    post_rx(&mut one, 0, 1526);
    one.mmio.rx(1, &frame(1));
    one.mmio.rx(2, &frame(2));
    let mut two = up();
    for index in 1..=5 {
        two.mmio.rx(index, &frame(index as u8));
    }
    one.checkpoint_into(&mut two);
    assert_eq!(two.mmio.consumed_inputs(), 1);
    // The core brings 2 and later again; what waited for the replaced guest does not come as well.
    post_rx(&mut two, 1, 1526);
    post_rx(&mut two, 2, 1526);
    for index in 2..=3 {
        let got = two.mmio.rx(index, &frame(index as u8));
        assert_eq!(got, RxOutcome::Delivered);
    }
    assert_eq!(two.bytes(place(1) + 12, 60), frame(2));
    assert_eq!(two.bytes(place(2) + 12, 60), frame(3));
}

#[test]
fn another_hardware_address_is_another_machine() {
    let mut one = up();
    one.mmio.quiesce();
    let bytes = saved(&one.mmio);
    let mut other = Driver::new(Net::new(NetConfig {
        mac: [2; 6],
        offloads: Offloads::default(),
    }));
    let error = other.mmio.load(1, &bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "section virtio0: hardware address is 0x525400010203 there and 0x20202020202 here; \
         give both the same device options"
    );
}

#[test]
fn damage_is_refused_and_changes_nothing() {
    let mut one = up();
    send(&mut one, 0, &frame(1));
    one.mmio.rx(1, &frame(1));
    one.mmio.quiesce();
    let bytes = saved(&one.mmio);
    assert_refuses_damage(&mut up().mmio, &bytes);
}

#[test]
fn offloads_are_offered_and_carried_in_the_header_only_when_configured() {
    assert_eq!(up().features() & 0xffff_ffff, 1 << 5 | 1 << 16 | EVENT_IDX);
    let offloads = Offloads {
        checksum: true,
        segmentation: true,
    };
    let config = NetConfig { mac: MAC, offloads };
    let all = 0b11 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
    let mut driver = Driver::up(Net::new(config), all);
    assert_eq!(driver.features() & all, all);
    assert_eq!(driver.mmio.guest_offloads(), offloads);
    // A checksum left to others, on the way out and in.
    let mut bytes = vec![1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 9, 9];
    bytes.extend(frame(3));
    driver.put(BUFFERS, &bytes);
    driver.post(TX, &[Buf::Out(BUFFERS, 72)]);
    assert_eq!(poll(&mut driver, 1)[0].1, bytes);
    driver.post(RX, &[Buf::In(place(1), 2000)]);
    assert_eq!(driver.mmio.rx(1, &bytes), RxOutcome::Delivered);
    bytes[10..12].copy_from_slice(&[1, 0]);
    assert_eq!(driver.bytes(place(1), 72), bytes);
}

#[test]
fn a_guest_without_offloads_never_gets_an_unfinished_frame() {
    let offloads = Offloads {
        checksum: true,
        segmentation: true,
    };
    let config = NetConfig { mac: MAC, offloads };
    let mut driver = Driver::up(Net::new(config), 0);
    driver.post(RX, &[Buf::In(place(0), 2000)]);
    for head in [[1, 0], [0, 1], [0, 4]] {
        let mut bytes = vec![0; 72];
        bytes[..2].copy_from_slice(&head);
        assert_eq!(driver.mmio.rx(1, &bytes), RxOutcome::Dropped, "{head:?}");
    }
    assert_eq!(driver.mmio.rx(1, &[0; 72]), RxOutcome::Delivered);
}
