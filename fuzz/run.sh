#!/usr/bin/env bash
# fuzz/run.sh [SECONDS [TARGET...]]: every target for that long, one on each processor; fails on a
# finding, prints executions. New inputs go to fuzz/work (not committed); the committed corpus is
# only read. FUZZ_JOBS=1 uses one processor.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-30}
shift $(($# > 0))
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(wire_decode page_sets machine pair_schedule qemu_stream virtio_mmio packets flows translator)
export RUSTC_BOOTSTRAP=1 # libFuzzer's instrumentation is unstable; no nightly toolchain is needed

# The core forbids unsafe code: there is nothing for a sanitizer to find. The driver has some.
flags() {
    case $1 in
        virtio_mmio) echo "-s address -O --target-dir fuzz/target/address" ;;
        *) echo "-s none -O --target-dir fuzz/target/none" ;;
    esac
}

one() {
    local target=$1 seconds=$2 most=512
    case $target in
        qemu_stream) most=65536 ;;
        virtio_mmio) most=2048 ;;
    esac
    mkdir -p "fuzz/work/$target" "fuzz/artifacts/$target" "fuzz/corpus/$target" "fuzz/regressions/$target"
    # shellcheck disable=SC2046
    cargo fuzz run $(flags "$target") "$target" \
        "fuzz/work/$target" "fuzz/corpus/$target" "fuzz/regressions/$target" -- \
        -max_total_time="$seconds" -max_len="$most" -timeout=10 -rss_limit_mb=1024 \
        -print_final_stats=1 -verbosity=1 >"$logs/$target" 2>&1 || touch "$logs/$target.failed"
}

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export logs
export -f one flags
for target in "${targets[@]}"; do
    # shellcheck disable=SC2046
    cargo fuzz build $(flags "$target") "$target"
done
printf '%s\n' "${targets[@]}" | xargs -P "${FUZZ_JOBS:-$(nproc)}" -I{} bash -c 'one "$1" "$2"' _ {} "$seconds"

total=0 failed=0
for target in "${targets[@]}"; do
    if [ -e "$logs/$target.failed" ]; then
        failed=1
        echo "FINDING in $target:"
        tail -n 40 "$logs/$target"
    fi
    n=$(sed -n 's/^stat::number_of_executed_units: *//p' "$logs/$target" | tail -n 1)
    printf '%-16s %14s\n' "$target" "${n:-0}"
    total=$((total + ${n:-0}))
done
printf '%-16s %14s executions\n' sum "$total"
exit "$failed"
