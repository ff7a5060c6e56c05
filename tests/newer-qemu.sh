#!/usr/bin/env bash
# Unpacks newer QEMUs beside the system's own, each with its own libraries and loader:
#
#   tests/newer-qemu.sh [VERSION...]      10.0 (Debian trixie) and 11.1 (trixie-backports)
#
# Afterwards CACHE/VERSION/qemu-system-x86_64 runs it; CACHE is $XDG_CACHE_HOME/colo-qemu, or
# target/qemu here. What is there already stays. Nothing of the system is changed. As root, from
# the mirror that apt uses.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
cache=${XDG_CACHE_HOME:+$XDG_CACHE_HOME/colo-qemu}
cache=${cache:-$here/target/qemu}

sources() { # FIELD WORD: of the first source in either of apt's formats
    grep -hsm1 -E "^$1:" /etc/apt/sources.list.d/*.sources | awk '{print $2}'
}

unpack() { # VERSION SUITE
    local dir=$cache/$1 suite=$2 mirror keys
    [ -x "$dir/qemu-system-x86_64" ] && return
    mirror=$(sources URIs || true)
    mirror=${mirror:-$(grep -hsm1 -oE '^deb .*' /etc/apt/sources.list | grep -oE 'https?://[^ ]+' || true)}
    mirror=${mirror:-http://deb.debian.org/debian}
    keys=$(sources Signed-By || true)
    keys=${keys:-/usr/share/keyrings/debian-archive-keyring.gpg}
    rm -rf "$dir"
    local a=$dir/apt root=$dir/root
    mkdir -p "$a"/{sources,lists/partial,cache/archives/partial,state} "$root"
    : >"$a/state/status"
    for s in "${suite%-backports}" "$suite"; do
        echo "deb [signed-by=$keys] $mirror $s main"
    done | sort -u >"$a/sources/newer.list"
    local o=(-qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$a/sources"
        -o Dir::State="$a/state" -o Dir::State::lists="$a/lists" -o Dir::State::status="$a/state/status"
        -o Dir::Cache="$a/cache" -o APT::Sandbox::User=root -o APT::Install-Recommends=false)
    apt-get "${o[@]}" update
    apt-get "${o[@]}" -y -t "$suite" --download-only install qemu-system-x86 seabios ipxe-qemu
    for d in "$a"/cache/archives/*.deb; do dpkg-deb -x "$d" "$root"; done
    rm -rf "$a"
    local u=$root/usr
    cat >"$dir/qemu-system-x86_64" <<X
#!/bin/sh
exec $u/lib64/ld-linux-x86-64.so.2 --library-path $u/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu $u/bin/qemu-system-x86_64 -L $u/share/qemu -L $u/share/seabios -L $u/lib/ipxe/qemu "\$@"
X
    chmod +x "$dir/qemu-system-x86_64"
}

[ $# -gt 0 ] || set -- 10.0 11.1
for version; do
    case $version in
        10.0) unpack 10.0 trixie ;;
        11.1) unpack 11.1 trixie-backports ;;
        *) echo "newer-qemu: $version: 10.0 or 11.1" >&2; exit 2 ;;
    esac
    echo "$version: $("$cache/$version/qemu-system-x86_64" --version | head -1)"
done
