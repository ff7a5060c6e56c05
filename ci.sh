#!/usr/bin/env bash
# One door for every job: what CI runs is what you run.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<'TEXT'
usage: ./ci.sh JOB

  setup   install what the tests need (Debian packages; as root), QEMU 10.0 and 11.1 beside it
  fmt     formatting
  lint    clippy, warnings denied
  doc     documentation, warnings denied
  test    every test, on real KVM, QEMU and network namespaces where they exist
  world   simulated schedules of a pair, optimised     COLO_SCHEDULES=20000
  model   model checking, optimised                    COLO_MODEL_STATES=200000
  fuzz    every fuzz target for a while                COLO_FUZZ_SECONDS=30
  examples  what colo-proto's examples print
  demo    one VM survives its hosts, in both modes
  hosts   two emulated hosts, a stock Debian kernel, power failures
  bench   the numbers we promise, beside their alternatives
  all     what CI runs, in its order

COLO_REQUIRE=kvm,qemu,netns turns a skipped test into a failed one.
TEXT
}

setup() {
    local missing=()
    command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
    command -v ip >/dev/null || missing+=(iproute2)
    command -v xz >/dev/null || missing+=(xz-utils)
    command -v cc >/dev/null || missing+=(build-essential)
    command -v c++ >/dev/null || missing+=(g++)
    command -v curl >/dev/null || missing+=(curl)
    # The emulated hosts.
    command -v busybox >/dev/null || missing+=(busybox-static)
    command -v depmod >/dev/null || missing+=(kmod)
    command -v cpio >/dev/null || missing+=(cpio)
    command -v lz4 >/dev/null || missing+=(lz4)
    command -v mkfs.ext4 >/dev/null || missing+=(e2fsprogs)
    if [ ${#missing[@]} -gt 0 ]; then
        [ "$(id -u)" = 0 ] || { echo "setup: as root, install: ${missing[*]}" >&2; exit 1; }
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
    fi
    # A version that cannot be had is a skipped test, or a failed one if COLO_REQUIRE has qemu.
    for version in 10.0 11.1; do
        tests/newer-qemu.sh "$version" || echo "setup: no QEMU $version: its tests are skipped" >&2
    done
}

fmt() { cargo fmt --all --check; }
lint() { cargo clippy --workspace --all-targets -- -D warnings; }
doc() { RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps; }
tests() { cargo test --workspace --no-fail-fast; }
world() {
    COLO_SCHEDULES="${COLO_SCHEDULES:-20000}" \
        cargo test --release -p colo-tests --test pair schedules -- --nocapture
}
model() {
    COLO_MODEL_STATES="${COLO_MODEL_STATES:-200000}" \
        cargo test --release -p colo-tests --test model -- --nocapture
}
fuzz() {
    command -v cargo-fuzz >/dev/null || cargo install --locked --quiet cargo-fuzz
    fuzz/run.sh "${COLO_FUZZ_SECONDS:-30}"
}
examples() {
    cargo run --quiet -p colo-proto --example pair
    cargo run --quiet -p colo-proto --example embed
}
demo() {
    if [ ! -w /dev/kvm ]; then
        echo "SKIPPED: demo: no /dev/kvm"
        case ",${COLO_REQUIRE:-}," in *,kvm,*) exit 1 ;; esac
        return
    fi
    cargo build --release -p colod
    ./target/release/colod demo --seconds 3
    ./target/release/colod demo --seconds 3 --mode lockstep
    ./target/release/colod demo --seconds 3 --kill secondary
}
hosts() {
    cargo build --release -p colod
    tests/hosts/run.sh short
}
bench() {
    cargo bench -p colo-proto
    cargo bench -p colo-driver-kvm
    cargo bench -p colo-driver-mio
    cargo bench -p colod
    cargo bench -p colo-tests
}
all() {
    setup
    fmt
    lint
    doc
    examples
    world
    demo
    fuzz
    tests
}

case "${1:-}" in
    setup | fmt | lint | doc | examples | world | model | fuzz | demo | hosts | bench | all) "$1" ;;
    test) tests ;;
    *) usage; [ "${1:-}" = --help ] && exit 0; exit 2 ;;
esac
