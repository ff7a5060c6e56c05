//! The transport as a driver sees it.

use virtio_bindings::virtio_mmio::*;

use super::super::backend::Saved;
use super::super::test_utils::*;
use super::super::{Backend, ConfigSpace, Queues};
use crate::device::codec::{Decoder, Encoder};
use crate::device::test_utils::{assert_refuses_damage, saved};
use crate::device::virtio::chain::Chain;
use crate::device::{BusDevice as _, LoadError, Persist as _};

const EVENT_IDX: u64 = 1 << 29;
const ONE_FEATURE: u64 = 1 << 3;

/// Echoes: each request's readable bytes come back in its writable ones.
#[derive(Debug, Default)]
struct Echo {
    chain: Chain,
    served: u64,
    resets: u64,
}

impl Backend for Echo {
    const ID: u32 = 42;

    fn features(&self) -> u64 {
        ONE_FEATURE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 16]
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::new().with(0, b"abcdefgh")
    }

    fn serve(&mut self, queues: &mut Queues) -> bool {
        for ring in 0..2 {
            let mut any = false;
            while queues.pop(ring, &mut self.chain) {
                let mut bytes = vec![0; self.chain.readable.len().min(4096)];
                let echoed = self
                    .chain
                    .readable
                    .read(queues.ram(), 0, &mut bytes)
                    .and_then(|()| self.chain.writable.write(queues.ram(), 0, &bytes));
                let written = if echoed.is_ok() { bytes.len() } else { 0 };
                queues.complete(ring, &self.chain, written);
                self.served += 1;
                any = true;
            }
            if any {
                queues.signal(ring);
            }
            queues.arm(ring);
        }
        false
    }

    fn reset(&mut self) {
        self.resets += 1;
    }
}

impl Saved for Echo {
    type State = u64;

    fn save(&self, encoder: &mut Encoder<'_>) {
        encoder.u64(self.served);
    }

    fn decode(&self, decoder: &mut Decoder<'_>) -> Result<u64, LoadError> {
        decoder.u64("served")
    }

    fn apply(&mut self, served: u64) {
        self.served = served;
    }
}

fn up(features: u64) -> Driver<Echo> {
    Driver::up(Echo::default(), features)
}

fn post_echo(driver: &mut Driver<Echo>, ring: usize) -> u16 {
    driver.put(BUFFERS, b"ping");
    driver.post(ring, &[Buf::Out(BUFFERS, 4), Buf::In(BUFFERS + 0x100, 4)])
}

#[test]
fn the_identity_registers_say_virtio_1() {
    let mut driver = Driver::new(Echo::default());
    assert_eq!(driver.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.get(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(driver.features(), 1 << 32 | EVENT_IDX | ONE_FEATURE);
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!(driver.get(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn a_queue_that_does_not_exist_has_size_zero() {
    let mut driver = Driver::new(Echo::default());
    for (queue, max) in [(0, 64), (1, 16), (2, 0), (u32::MAX, 0)] {
        driver.set(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), max);
        driver.set(VIRTIO_MMIO_QUEUE_NUM, 16);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }
}

#[test]
fn features_are_refused_when_not_offered_or_without_version_1() {
    for features in [0, ONE_FEATURE, 1 << 32 | 1 << 5, 1 << 32 | 1 << 63] {
        let mut driver = Driver::new(Echo::default());
        driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        driver.set_features(features);
        driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER);
        driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER);
    }
}

#[test]
fn features_are_fixed_once_accepted() {
    let mut driver = up(0);
    driver.set_features(u64::MAX);
    assert_eq!(driver.mmio.driver_features, 1 << 32);
    assert!(!driver.mmio.queues.agreed(3));
}

#[test]
fn a_driver_cannot_clear_status_bits_except_all() {
    let mut driver = up(0);
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0xf);
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn requests_are_echoed_around_the_ring_many_times() {
    for features in [0, EVENT_IDX] {
        let mut driver = up(features);
        for turn in 0..5 * RING {
            let head = post_echo(&mut driver, 1);
            driver.notify(1);
            assert_eq!(driver.completed(1), Some((head.into(), 4)), "{turn}");
            assert_eq!(driver.bytes(BUFFERS + 0x100, 4), b"ping");
            driver.put(BUFFERS + 0x100, &[0; 4]);
        }
        assert_eq!(driver.completed(1), None);
    }
}

#[test]
fn the_indices_wrap_after_65536_requests() {
    for features in [0, EVENT_IDX] {
        let mut driver = up(features);
        for turn in 0..65_540 {
            let head = post_echo(&mut driver, 0);
            driver.notify(0);
            assert_eq!(driver.completed(0), Some((head.into(), 4)), "{turn}");
        }
    }
}

#[test]
fn a_completion_interrupts_until_acknowledged() {
    let mut driver = up(0);
    post_echo(&mut driver, 0);
    driver.notify(0);
    assert!(driver.interrupted());
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut driver = up(0);
    driver.set_available(0, 0, 1);
    post_echo(&mut driver, 0);
    driver.notify(0);
    assert!(driver.completed(0).is_some());
    assert!(!driver.interrupted());
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn with_event_idx_the_interrupt_comes_at_the_index_asked_for() {
    let mut driver = up(EVENT_IDX);
    driver.set_available(0, 4 + 2 * u64::from(RING), 1);
    post_echo(&mut driver, 0);
    driver.notify(0);
    assert!(!driver.interrupted(), "asked for the second");
    post_echo(&mut driver, 0);
    driver.notify(0);
    assert!(driver.interrupted());
    let avail_event = driver.used_field(0, 4 + 8 * u64::from(RING));
    assert_eq!(avail_event, 2, "the device wants to hear of the third");
}

#[test]
fn nothing_is_served_before_driver_ok() {
    let mut driver = Driver::new(Echo::default());
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    driver.set_features(1 << 32);
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    driver.set_ring(0, RING, ring_base(0));
    driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
    post_echo(&mut driver, 0);
    driver.notify(0);
    assert_eq!(driver.completed(0), None);
    driver.set(
        VIRTIO_MMIO_STATUS,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    );
    assert!(
        driver.completed(0).is_some(),
        "the early notify is not lost"
    );
}

#[test]
fn a_ring_programmed_wrongly_does_not_become_ready() {
    let cases = [
        (0, ring_base(0), "no entries"),
        (12, ring_base(0), "no power of two"),
        (128, ring_base(0), "longer than the device allows"),
        (16, ring_base(0) + 8, "descriptor table not aligned"),
        (16, RAM, "outside RAM"),
        (16, RAM - 16, "runs out of RAM"),
        (16, !15, "wraps around"),
    ];
    for (size, base, why) in cases {
        let mut driver = Driver::new(Echo::default());
        driver.set_ring(0, size, base);
        driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "{why}");
    }
}

#[test]
fn a_ready_ring_cannot_be_moved() {
    let mut driver = up(0);
    driver.set_ring(0, 2, RAM);
    post_echo(&mut driver, 0);
    driver.notify(0);
    assert!(driver.completed(0).is_some());
}

#[test]
fn a_jumping_index_breaks_the_device_until_reset() {
    let mut driver = up(0);
    driver.set_available(0, 2, RING + 1);
    driver.notify(0);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert!(driver.interrupted());
    post_echo(&mut driver, 1);
    driver.notify(1);
    assert_eq!(driver.completed(1), None, "broken as a whole");
    driver.put(ring_base(0), &[0; 0x5000]);
    driver.put(ring_base(1), &[0; 0x5000]);
    driver.initialise(0);
    post_echo(&mut driver, 0);
    driver.notify(0);
    assert!(driver.completed(0).is_some());
}

#[test]
fn a_head_outside_the_table_breaks_the_device() {
    let mut driver = up(0);
    driver.publish(0, RING);
    driver.notify(0);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn a_chain_that_loops_or_leaves_the_table_is_completed_empty() {
    for next in [0, 1, RING, u16::MAX] {
        let mut driver = up(0);
        driver.store_descriptor(0, 0, BUFFERS, 4, 1, 1);
        driver.store_descriptor(0, 1, BUFFERS, 4, 1, next);
        driver.publish(0, 0);
        driver.notify(0);
        assert_eq!(driver.completed(0), Some((0, 0)), "next {next}");
        assert_eq!(driver.mmio.malformed(), 1);
        assert_eq!(driver.mmio.device().served, 0);
    }
}

#[test]
fn buffers_outside_ram_fail_only_their_request() {
    let mut driver = up(0);
    driver.post(0, &[Buf::Out(RAM - 2, 4), Buf::In(BUFFERS, 4)]);
    driver.post(0, &[Buf::Out(BUFFERS, 4), Buf::In(u64::MAX, 4)]);
    driver.post(0, &[Buf::Out(BUFFERS, 4), Buf::In(BUFFERS, 0)]);
    post_echo(&mut driver, 0);
    driver.notify(0);
    let written: Vec<_> = (0..4).map(|_| driver.completed(0).unwrap().1).collect();
    assert_eq!(written, [0, 0, 0, 4]);
}

#[test]
fn a_table_of_descriptors_has_a_bound() {
    let mut driver = up(0);
    // 4,096 descriptors of one byte, all linked, where a chain may have 256.
    for index in 0..4096u16 {
        let at = BUFFERS + 16 * u64::from(index);
        let next = index + 1;
        driver.put(at, &BUFFERS.to_le_bytes());
        driver.put(at + 8, &[1, 0, 0, 0, 1, 0]);
        driver.put(at + 14, &next.to_le_bytes());
    }
    driver.store_descriptor(0, 0, BUFFERS, 4096 * 16, 4, 0);
    driver.publish(0, 0);
    driver.notify(0);
    assert_eq!(driver.completed(0), Some((0, 0)));
    assert_eq!(driver.mmio.malformed(), 1);
}

#[test]
fn registers_ignore_widths_and_places_they_do_not_have() {
    let mut driver = up(0);
    let before = saved(&driver.mmio);
    for len in [1, 2, 3, 8] {
        let mut data = vec![0xaa; len];
        driver.mmio.read(VIRTIO_MMIO_STATUS.into(), &mut data);
        assert_eq!(data, vec![0xaa; len], "left alone");
        driver.mmio.write(VIRTIO_MMIO_STATUS.into(), &vec![0; len]);
    }
    for offset in [1, 2, 0x72, 0xfff, 0x1_0000_0070] {
        driver.mmio.write(offset, &[0; 4]);
    }
    assert_eq!(saved(&driver.mmio), before);
}

#[test]
fn the_configuration_space_reads_in_any_width_and_as_zero_behind_its_end() {
    let mut driver = up(0);
    let mut read = |offset: u64, len| {
        let mut data = vec![0xff; len];
        driver.mmio.read(0x100 + offset, &mut data);
        data
    };
    assert_eq!(read(0, 8), b"abcdefgh");
    assert_eq!(read(3, 1), b"d");
    assert_eq!(read(6, 4), b"gh\0\0");
    assert_eq!(read(0xefe, 2), [0, 0]);
}

#[test]
fn device_writes_are_logged_as_dirty() {
    use vm_memory::GuestMemoryBackend as _;
    let mut driver = up(0);
    driver.put(BUFFERS, b"ping");
    driver.post(0, &[Buf::Out(BUFFERS, 4), Buf::In(BUFFERS + 0x3ffe, 4)]);
    let region = driver.ram.find_region(vm_memory::GuestAddress(0)).unwrap();
    region.get_mmap().bitmap().clear();
    driver.notify(0);
    let region = driver.ram.find_region(vm_memory::GuestAddress(0)).unwrap();
    let mut words = [0; 4];
    region.get_mmap().bitmap().take(&mut words);
    let dirty: Vec<usize> = (0..256)
        .filter(|page| words[page / 64] & 1 << (page % 64) != 0)
        .collect();
    assert_eq!(
        dirty,
        [0x14, 0x24, 0x83, 0x84],
        "used rings, both buffer pages"
    );
}

#[test]
fn a_checkpoint_carries_the_device_to_another_machine() {
    for features in [0, EVENT_IDX | ONE_FEATURE] {
        let mut one = up(features);
        for _ in 0..RING + 3 {
            post_echo(&mut one, 0);
            one.notify(0);
            one.completed(0).unwrap();
        }
        let mut two = Driver::new(Echo::default());
        one.checkpoint_into(&mut two);
        for machine in [&mut one, &mut two] {
            let head = post_echo(machine, 0);
            machine.notify(0);
            assert_eq!(machine.completed(0), Some((head.into(), 4)));
            assert_eq!(machine.mmio.device().served, u64::from(RING) + 4);
        }
    }
}

#[test]
fn a_request_in_the_ring_at_the_stop_is_served_after_it_on_both_sides() {
    let mut one = up(0);
    post_echo(&mut one, 0);
    let mut two = Driver::new(Echo::default());
    one.checkpoint_into(&mut two);
    for machine in [&mut one, &mut two] {
        assert!(machine.completed(0).is_some());
        assert!(machine.interrupted());
    }
}

#[test]
fn a_quiesced_device_touches_neither_memory_nor_the_interrupt() {
    let mut driver = up(0);
    driver.mmio.quiesce();
    post_echo(&mut driver, 0);
    let before = driver.bytes(0, usize::try_from(RAM).unwrap());
    driver.notify(0);
    driver.mmio.serve();
    assert!(driver.bytes(0, usize::try_from(RAM).unwrap()) == before);
    assert!(!driver.interrupted());
    driver.mmio.resume();
    assert!(driver.completed(0).is_some());
    assert!(driver.interrupted());
    driver.mmio.resume();
    assert!(!driver.interrupted(), "a second resume is no news");
}

#[test]
fn an_interrupt_that_nobody_acknowledged_is_raised_again_on_the_other_side() {
    let mut one = up(0);
    post_echo(&mut one, 0);
    one.notify(0);
    let mut two = up(0);
    one.checkpoint_into(&mut two);
    assert!(two.interrupted());
    assert_eq!(two.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
}

#[test]
fn an_interrupt_of_the_replaced_state_is_not_raised() {
    let mut one = up(0);
    let mut two = up(0);
    two.mmio.quiesce();
    two.mmio.queues.config_changed();
    one.checkpoint_into(&mut two);
    assert!(!two.interrupted());
}

#[test]
fn damage_is_refused_and_changes_nothing() {
    let mut driver = up(0);
    post_echo(&mut driver, 0);
    driver.notify(0);
    driver.mmio.quiesce();
    let bytes = saved(&driver.mmio);
    assert_refuses_damage(&mut up(EVENT_IDX).mmio, &bytes);
}

#[test]
fn a_section_with_a_ring_outside_this_ram_is_refused() {
    let mut driver = up(0);
    driver.mmio.queues.rings[1].used = RAM - 8;
    driver.mmio.quiesce();
    let bytes = saved(&driver.mmio);
    let error = up(0).mmio.load(1, &bytes).unwrap_err();
    assert!(matches!(error, LoadError::Invalid { .. }), "{error}");
}

#[test]
fn reset_forgets_the_driver() {
    let mut driver = up(0);
    post_echo(&mut driver, 0);
    driver.set(VIRTIO_MMIO_STATUS, 0);
    driver.notify(0);
    assert_eq!(driver.completed(0), None);
    assert_eq!(driver.mmio.device().resets, 2, "at start and now");
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
}
