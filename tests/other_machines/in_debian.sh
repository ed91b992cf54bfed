#!/usr/bin/env bash
# `check.sh` with the Python of a Debian release, on this processor or on an emulated one (as root, on
# Debian or Ubuntu; apt-get install mmdebstrap):
#
#     tests/other_machines/in_debian.sh FOLDER trixie [arm64]
#
# FOLDER is the release's root, made at the first call and kept.
set -euo pipefail

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=$1 release=$2 own=$(dpkg --print-architecture)
architecture=${3:-$own}

# Unpacked, not set up: an emulated processor would take minutes for that, and nothing here needs it.
unpacked() {
    [ -e "$1" ] || mmdebstrap --variant=extract --architectures="$2" --include="$3" \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr "$release" "$1"
}

unpacked "$root" "$architecture" bash,coreutils,diffutils,libgomp1,libstdc++6,python3,python3-venv,tar

# The kernel is told what runs the programs of the other processor: the release's own emulator, for an
# older one takes seven times as long.
binfmt=/proc/sys/fs/binfmt_misc
if [ "$architecture $own" = "arm64 amd64" ] && ! [ -e $binfmt/aarch64-of-mhmoe-np ]; then
    unpacked "$root.emulator" "$own" qemu-user
    [ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
    start='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    emulator=$(realpath "$root.emulator/usr/bin/qemu-aarch64")
    echo ":aarch64-of-mhmoe-np:M::$start:$mask:$emulator:PF" > $binfmt/register
fi

# A processor that exists. The emulator's own one has vectors longer than any, and OpenBLAS 0.3.34 computes
# wrong products on it.
export QEMU_CPU=${QEMU_CPU:-neoverse-n1}

# How this machine reaches the network.
for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
    if [ -e $file ]; then
        mkdir -p "$root${file%/*}"
        cp --dereference $file "$root$file"
    fi
done
rm -rf "$root/clone"
mkdir "$root/clone"
(cd "$clone" && git ls-files -z | tar --null -T - -cf -) | tar -C "$root/clone" -xf -

# Mounts that end with the command.
exec unshare --mount bash -euc '
    mount -t proc proc "$0/proc"
    mount --rbind /dev "$0/dev"
    exec chroot "$0" /clone/tests/other_machines/check.sh /check' "$root"
