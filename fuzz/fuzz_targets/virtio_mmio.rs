#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| colo_driver_kvm::device::fuzzing::virtio_mmio(data));
