#!/usr/bin/env bash
# fuzz/run.sh [SECONDS]: every target for that long; fails on a finding, prints executions.
# New inputs go to fuzz/work (not committed); the committed corpus is only read.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-30}
export RUSTC_BOOTSTRAP=1 # libFuzzer's instrumentation is unstable; no nightly toolchain is needed
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
cargo fuzz build -s none -O
total=0 failed=0 table=
for target in wire_decode page_sets machine pair_schedule qemu_stream virtio_mmio; do
    case $target in
        qemu_stream) most=65536 ;;
        virtio_mmio) most=2048 ;;
        *) most=512 ;;
    esac
    mkdir -p "fuzz/work/$target" "fuzz/artifacts/$target" "fuzz/corpus/$target" "fuzz/regressions/$target"
    log=$logs/$target
    if ! cargo fuzz run -s none -O "$target" "fuzz/work/$target" "fuzz/corpus/$target" "fuzz/regressions/$target" -- \
        -max_total_time="$seconds" -max_len="$most" -timeout=10 -rss_limit_mb=1024 \
        -print_final_stats=1 -verbosity=1 >"$log" 2>&1; then
        failed=1
        echo "FINDING in $target:"
        tail -n 40 "$log"
    fi
    n=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
    table+=$(printf '%-16s %14s' "$target" "${n:-0}")$'\n'
    total=$((total + ${n:-0}))
done
printf '%s%-16s %14s executions\n' "$table" sum "$total"
exit "$failed"
