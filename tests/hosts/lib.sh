# Sourced by run.sh: the bench of two emulated hosts. See docs/testing.md.
#
#   netns $NS:  bridge colo-p (the link of the pair), bridge colo-w (the world, with the client at 10.8.0.100)
#               taps pA pB wA wB: the hosts' cables
#   $W:         everything that is built, and $W/share, which the hosts see as /share (9p)

top=$(cd "$here/../.." && pwd)
W=${COLO_HOSTS_DIR:-$top/target/hosts}
NS=colo-hosts-$$
GUEST=10.8.0.50
SHARE=$W/share

say() { printf '%s  %s\n' "$(date +%T)" "$*"; }
fail() { say "FAILED: $*"; exit 1; }

# until_true SECONDS WHAT COMMAND...: waits for the command to succeed.
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "$what: not within the time it may take here"
        sleep 0.3
    done
}

# --- The network ---

net_up() {
    ip netns add "$NS"
    ip -n "$NS" link set lo up
    local b h
    for b in p w; do
        ip -n "$NS" link add "colo-$b" type bridge
        ip -n "$NS" link set "colo-$b" up
        for h in A B; do
            ip -n "$NS" tuntap add "$b$h" mode tap
            ip -n "$NS" link set "$b$h" master "colo-$b"
            ip -n "$NS" link set "$b$h" up
        done
    done
    ip -n "$NS" addr add 10.8.0.100/24 dev colo-w
}

in_net() { ip netns exec "$NS" "$@"; }

# --- Hosts ---

number() { [ "$1" = A ] && echo 1 || echo 2; }
other() { [ "$1" = A ] && echo B || echo A; }

# boot HOST: a host from nothing, in the background.
boot() {
    local h=$1 n
    n=$(number "$h")
    mkdir -p "$SHARE/$h"
    rm -f "$SHARE/$h/up"
    in_net qemu-system-x86_64 -name "host$h" -M q35 -accel tcg -cpu EPYC-Rome,+svm,+npt -smp 1 -m 1280 \
        -nodefaults -display none -no-reboot -daemonize -pidfile "$W/$h.pid" \
        -kernel "$W/vmlinux" -initrd "$W/host.cpio.gz" \
        -append "console=ttyS0 panic=-1 loglevel=4 mitigations=off host=$h number=$n" \
        -serial "file:$W/$h.serial" -monitor "unix:$W/$h.monitor,server,nowait" \
        -netdev "tap,id=pair,ifname=p$h,script=no,downscript=no" \
        -device "virtio-net-pci,id=pair0,netdev=pair,mac=52:54:00:09:00:0$n,romfile=" \
        -netdev "tap,id=world,ifname=w$h,script=no,downscript=no" \
        -device "virtio-net-pci,id=world0,netdev=world,mac=52:54:00:08:00:0$n,romfile=" \
        -fsdev "local,id=share,path=$SHARE,security_model=none" \
        -device virtio-9p-pci,fsdev=share,mount_tag=share -device virtio-rng-pci 2>"$W/$h.qemu" ||
        fail "QEMU for host $h: $(cat "$W/$h.qemu")"
    until_true 120 "host $h boots (its console: $W/$h.serial)" test -f "$SHARE/$h/up"
}

# A power failure, a hang and its end.
power_failure() { kill -KILL "$(cat "$W/$1.pid")"; }
hang() { kill -STOP "$(cat "$W/$1.pid")"; }
go_on() { kill -CONT "$(cat "$W/$1.pid")"; }

# cable HOST pair|world on|off
cable() { printf 'set_link %s %s\n' "$2" "$3" | busybox nc -w 1 "local:$W/$1.monitor" >/dev/null 2>&1; }

# on HOST 'COMMAND' [SECONDS]: runs it there and prints what it said.
on() {
    local h=$1 id end=$((SECONDS + ${3:-60}))
    id=$(date +%s%N)
    printf '%s\n' "$2" >"$SHARE/$h/command.$id"
    mv "$SHARE/$h/command.$id" "$SHARE/$h/in/$id"
    until [ -s "$SHARE/$h/out/$id.rc" ]; do
        [ $SECONDS -lt $end ] || return 124
        sleep 0.1
    done
    cat "$SHARE/$h/out/$id"
    return "$(cat "$SHARE/$h/out/$id.rc")"
}

ctl() { on "$1" "colod ctl --socket /run/colo.sock $2" 60; }
is() { ctl "$1" status | grep -qE "^$2 +$3\$"; }

# daemon HOST primary|secondary: starts colod there.
daemon() {
    on "$1" "[ -f /tmp/disk.img ] || cp /share/disk.img /tmp/disk.img
        rm -f /run/colo.sock
        (colod $2 --config /share/$1.toml >/share/$1/colod.out 2>>/share/$1/colod.log
         echo \$? >/share/$1/colod.rc) &"
}

# inside 'COMMAND': in the guest.
inside() { printf '%s\n' "$1" | in_net timeout "${2:-20}" busybox nc "$GUEST" 2323; }

# configure HOST VCPUS MODE
configure() {
    local h=$1 me peer
    me=$(number "$h")
    peer=$(number "$(other "$h")")
    mkdir -p "$SHARE/$h/state"
    cat >"$SHARE/$h.toml" <<TOML
[vm]
kernel = "/share/vmlinuz"
initrd = "/share/guest.cpio.gz"
cmdline = "console=ttyS0 panic=-1"
# The emulator does not tell KVM of a guest's XSETBV, so that there is no AVX.
cpu = "x86-64-v2"
vcpus = $2
memory = "192M"
[net]
backend = "tap"
tap = "colo0"
announce = ["$GUEST"]
[disk]
path = "/tmp/disk.img"
[serial]
console = "file"
path = "/share/$h/console"
[pair]
node = $me
id = "6f1ed002ab5595859014ebf0951522d9"
key_file = "/share/key"
listen = "10.9.0.$me:7800"
peer = "10.9.0.$peer:7800"
state_dir = "/share/$h/state"
heartbeat = [
    { listen = "10.9.0.$me:7801", peer = "10.9.0.$peer:7801" },
    { listen = "10.8.0.$me:7801", peer = "10.8.0.$peer:7801" },
]
[protection]
mode = "$3"
longest = "200ms"
[member]
detection = "3s"
# A 9p server grants every lock, which a file as an arbiter cannot do with: both hosts' writes meet in it. Power
# fails here, and no link is cut while both hosts live.
[arbiter]
kind = "none"
[control]
socket = "/run/colo.sock"
TOML
}

# fresh_pair VCPUS MODE: configurations, a clean disk, no memory of an earlier pair.
fresh_pair() {
    local h
    rm -rf "$SHARE/A" "$SHARE/B" "$SHARE/key"
    mkdir -p "$SHARE/A" "$SHARE/B"
    (umask 077 && head -c 32 /dev/urandom >"$SHARE/key")
    truncate -s 0 "$SHARE/disk.img"
    truncate -s 32M "$SHARE/disk.img"
    mkfs.ext4 -q -F "$SHARE/disk.img"
    for h in A B; do configure "$h" "$1" "$2"; done
}

protected() { is "$1" protected true; }

# What must never be in a guest's log.
COMPLAINTS='stall|lockup|hung task|BUG|WARNING|Oops|Call Trace|unstable|not connected|I/O error|EXT4-fs (error|warning)|time went backwards|ACPI (Error|Warning)|ACPI BIOS'

# Complaints in a guest's console, and in its log as it shows it itself.
no_complaints() {
    local found
    found=$(cat "$SHARE"/?/console "$@" 2>/dev/null | grep -aE "$COMPLAINTS" | sort | uniq -c | sed -n 1,20p) || true
    [ -z "$found" ] || fail "the guest complains:
$found"
}

cleanup() {
    local h
    exec 3>&- 4<&-
    for h in A B; do
        [ -f "$W/$h.pid" ] && kill -KILL "$(cat "$W/$h.pid")" 2>/dev/null
        rm -f "$W/$h.pid"
    done
    ip netns del "$NS" 2>/dev/null
}
