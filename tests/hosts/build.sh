#!/usr/bin/env bash
# Builds what the hosts boot: Debian's cloud kernel (downloaded as a package, unpacked, not installed), an initramfs
# of a host, an initramfs of a guest. What is there already is kept; remove the directory to build anew.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

for tool in qemu-system-x86_64 busybox cpio lz4 depmod mkfs.ext4 e2fsck ip cc apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || fail "$tool is missing: ./ci.sh setup installs it"
done
mkdir -p "$W" "$SHARE"

# newest META: the package that one of Debian's kernels is at now.
newest() {
    local package
    package=$(apt-cache depends "$1" | awk '/Depends: linux-image/ { print $2; exit }')
    [ -n "$package" ] || fail "apt knows no $1: run apt-get update"
    echo "$package"
}

# unpack PACKAGE: into $W/PACKAGE, with its dependencies of modules.
unpack() {
    local root=$W/$1
    [ -d "$root" ] && return
    (cd "$W" && rm -f "$1"_*.deb && apt-get -qq download "$1" 2>/dev/null) || fail "apt cannot download $1"
    dpkg-deb -x "$W/$1"_*.deb "$root.part"
    rm -f "$W/$1"_*.deb
    depmod -b "$root.part" "${1#linux-image-}"
    mv "$root.part" "$root"
}

# The hosts want 9p, which only the generic kernel has. The guest is what runs in a cloud.
host_kernel=$(newest linux-image-amd64)
guest_kernel=${COLO_HOSTS_KERNEL:-$(newest linux-image-cloud-amd64)}
unpack "$host_kernel"
unpack "$guest_kernel"
cp "$W/$guest_kernel/boot/vmlinuz-${guest_kernel#linux-image-}" "$SHARE/vmlinuz"

# The ELF inside a bzImage: an emulator would take seconds to unpack it. Linux's boot protocol says where it is.
image=$W/$host_kernel/boot/vmlinuz-${host_kernel#linux-image-}
word() { od -An -v -tu"$2" -j "$1" -N "$2" "$image" | tr -d ' '; }
start=$((($(word 497 1) + 1) * 512 + $(word 584 4)))
# The last four bytes are the unpacked size, no part of the stream.
length=$(($(word 588 4) - 4))
payload() { head -c $((start + length)) "$image" | tail -c $length; }
if [ ! -f "$W/vmlinux" ] || [ "$image" -nt "$W/vmlinux" ]; then
    case $(payload | od -An -tx1 -N 4 | tr -d ' ') in
        02214c18) unpacker="lz4 -dc" ;;
        fd377a58) unpacker="xz -dc" ;;
        28b52ffd) unpacker="zstd -dc" ;;
        *) fail "$image is packed in a way that is not known here" ;;
    esac
    payload | $unpacker >"$W/vmlinux.part"
    mv "$W/vmlinux.part" "$W/vmlinux"
fi

# tree DIR: an empty root with busybox.
tree() {
    rm -rf "$1"
    mkdir -p "$1"/{bin,sbin,proc,sys,dev,tmp,run,etc,share,mnt,lib64,root,var,lib/x86_64-linux-gnu}
    cp "$(command -v busybox)" "$1/bin/busybox"
    local applet
    for applet in $(busybox --list); do
        [ "$applet" = busybox ] || ln -sf busybox "$1/bin/$applet"
    done
}

# modules DIR PACKAGE MODULE...: with all they depend on.
modules() {
    local version=${2#linux-image-} module line file
    local to=$1/lib/modules/$version from=$W/$2/lib/modules/$version
    shift 2
    mkdir -p "$to"
    cp "$from"/modules.{builtin,builtin.modinfo,order} "$to/"
    for module; do
        line=$(grep -E "/$module\.ko[^:]*:" "$from/modules.dep") || continue # built in
        for file in ${line/:/ }; do
            mkdir -p "$to/$(dirname "$file")"
            cp -n "$from/$file" "$to/$file"
        done
    done
    depmod -b "${to%/lib/modules/*}" "$version"
}

pack() { (cd "$1" && find . | cpio -o -H newc --quiet -R 0:0) | gzip -1 >"$2.part" && mv "$2.part" "$2"; }

colod=${COLOD:-$top/target/release/colod}
[ -x "$colod" ] || fail "no $colod: cargo build --release -p colod, or set COLOD"

host=$W/host
tree "$host"
modules "$host" "$host_kernel" kvm-amd tun bridge virtio_net virtio_pci 9p 9pnet_virtio virtio-rng
for library in $(ldd "$colod" | grep -o '/[^ ]*'); do cp -L "$library" "$host/lib/x86_64-linux-gnu/"; done
cp -L /lib64/ld-linux-x86-64.so.2 "$host/lib64/"
install -m 755 "$here/host-init" "$host/init"
pack "$host" "$W/host.cpio.gz"

guest=$W/guest
tree "$guest"
modules "$guest" "$guest_kernel" virtio_mmio virtio_pci virtio_net virtio_blk virtio-rng ext4 crc32c_generic
cc -O2 -static -o "$guest/bin/guest" "$here/guest.c"
install -m 755 "$here/guest-init" "$guest/init"
pack "$guest" "$SHARE/guest.cpio.gz"
cp "$colod" "$SHARE/colod"
say "built: hosts with $host_kernel, guest with $guest_kernel; hosts $(du -h "$W/host.cpio.gz" | cut -f1), guest $(du -h "$SHARE/guest.cpio.gz" | cut -f1)"
