#!/usr/bin/env bash
# Stories of two hosts with real Linux guests, on emulated hardware: no KVM is needed.
#
#   tests/hosts/run.sh short              what CI runs
#   tests/hosts/run.sh campaign KILLS     one connection over many power failures
#   tests/hosts/run.sh boot-kills ROUNDS  power failures at random moments of the guest's boot
#   tests/hosts/run.sh shell              hosts, a protected guest, and a prompt
#
# VCPUS=1|2|4 and MODE=standby|lockstep choose the machine, COLOD a binary, COLO_HOSTS_DIR where things are built.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
vcpus=${VCPUS:-1} mode=${MODE:-standby}

# --- A client with one connection ---

sent=0
connect() {
    coproc CLIENT { in_net busybox nc "$GUEST" 7001; }
    exec 3>&"${CLIENT[1]}" 4<&"${CLIENT[0]}"
}

# lines COUNT: sends so many, one after the other, and checks every answer.
lines() {
    local i answer number count
    for ((i = 0; i < $1; i++)); do
        sent=$((sent + 1))
        printf '%s\n' "$sent" >&3
        IFS= read -r -t 120 answer <&4 || fail "no answer to line $sent"
        read -r number count _ <<<"$answer"
        [ "$number" = "$sent" ] && [ "$count" = "$sent" ] || fail "line $sent was answered with: $answer"
    done
}

# --- Scenes ---

# start_pair: both hosts up, the guest booted and protected.
start_pair() {
    fresh_pair "$vcpus" "$mode"
    boot A
    boot B
    say "two hosts are up"
    daemon A primary
    daemon B secondary
    until_true 180 "the guest boots" grep -qa 'GUEST READY' "$SHARE/A/console"
    say "the guest is ready: $(grep -a 'GUEST READY' "$SHARE/A/console")"
    until_true 120 "the guest is protected" protected A
    say "protected"
}

# lose HOST: its power fails while the client works; the answers go on from the other.
lose() {
    local dead=$1 begin
    power_failure "$dead"
    begin=$SECONDS
    lines 1
    say "host $dead lost its power; the next answer came within $((SECONDS - begin + 1)) s"
    until_true 30 "the survivor owns the VM" is "$(other "$dead")" role primary
    lines 20
}

# give_back HOST: it boots again and becomes the secondary.
give_back() {
    boot "$1"
    daemon "$1" secondary
    until_true 120 "protected again" protected "$(other "$1")"
    say "host $1 is back; protected again"
}

# switch_off HOST: the guest there switches itself off. The daemon ends well, the peer does not take over, the disks
# are whole and alike.
switch_off() {
    local h owner=$1
    inside 'dmesg' >"$W/dmesg"
    inside 'cat /tmp/clock' >"$W/clock"
    [ "$(inside 'wc -l </mnt/lines' | tr -d ' ')" = "$sent" ] || fail "the file has not $sent lines"
    [ "$(inside 'sort -n /mnt/lines | uniq | wc -l' | tr -d ' ')" = "$sent" ] || fail "a line is there twice"
    exec 3>&- 4<&-
    rm -f "$SHARE"/?/colod.rc
    inside '(umount /mnt; poweroff -f) >/dev/null 2>&1 &' || true
    until_true 60 "colod on $owner ends" test -s "$SHARE/$owner/colod.rc"
    [ "$(cat "$SHARE/$owner/colod.rc")" = 0 ] || fail "colod on $owner ended with $(cat "$SHARE/$owner/colod.rc")"
    is "$(other "$owner")" role secondary || fail "the peer took over a VM that was switched off"
    for h in A B; do
        on "$h" "cp /tmp/disk.img /share/$h/disk.img"
        e2fsck -fn "$SHARE/$h/disk.img" >"$W/$h.fsck" 2>&1 || fail "the disk of $h: $(cat "$W/$h.fsck")"
    done
    cmp "$SHARE/A/disk.img" "$SHARE/B/disk.img" || fail "the disks differ"
    say "the guest switched itself off and stayed off; ext4 is clean and the same on both hosts"
}

# --- Stories ---

short() {
    start_pair
    inside 'reboot -f' 2 || true
    until_true 120 "the guest boots again" sh -c "[ \$(grep -ac 'GUEST READY' '$SHARE/A/console') = 2 ]"
    protected A || fail "a reboot ended protection"
    say "the guest booted again, protected all the while"
    until_true 20 "the guest serves" inside true
    work A
}

# work HOST: a client at work over two power failures, the first of HOST; then the end.
work() {
    local first=$1 second
    second=$(other "$1")
    connect
    lines 20
    lose "$first"
    give_back "$first"
    lines 20
    lose "$second"
    give_back "$second"
    lines 5
    switch_off "$first"
    no_complaints "$W/dmesg"
    say "$sent lines, each answered once and on the disk once; nothing to complain about in the guest's log"
}

campaign() {
    local kills=$1 i owner=A
    start_pair
    connect
    for ((i = 1; i <= kills; i++)); do
        lines $((RANDOM % 60 + 20))
        lose $owner
        give_back $owner
        owner=$(other $owner)
        say "power failure $i of $kills survived, $sent lines"
    done
    switch_off $owner
    no_complaints "$W/dmesg"
    cat "$W/clock"
    say "$sent lines over $kills power failures"
}

boot_kills() {
    local rounds=$1 i h
    for ((i = 1; i <= rounds; i++)); do
        fresh_pair "$vcpus" "$mode"
        boot A
        boot B
        daemon B secondary
        daemon A primary
        until_true 120 "the guest is protected" protected A
        sleep "$((RANDOM % 8)).$((RANDOM % 1000))"
        power_failure A
        say "round $i: A is gone when the guest said: $(tail -n 1 "$SHARE/A/console" | cut -c 1-90)"
        until_true 180 "the guest gets ready on B" sh -c "cat '$SHARE'/?/console | grep -qa 'GUEST READY'"
        until_true 60 "the guest serves" inside true
        no_complaints
        for h in A B; do kill -KILL "$(cat "$W/$h.pid")" 2>/dev/null || true; done
    done
    say "$rounds power failures during the boot survived"
}

trap cleanup EXIT
"$here/build.sh"
net_up
case "${1:-}" in
    short) short ;;
    campaign) campaign "${2:-10}" ;;
    boot-kills) boot_kills "${2:-5}" ;;
    shell)
        start_pair
        echo "on A|B 'COMMAND', ctl A|B status, inside 'COMMAND', power_failure A, cable A pair off, hang A, go_on A"
        while IFS= read -r -p 'hosts> ' line; do eval "$line" || true; done
        ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
say "OK: $*"
