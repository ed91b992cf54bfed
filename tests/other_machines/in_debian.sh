#!/usr/bin/env bash
# `check.sh` with the Python of a Debian release, on this processor or on an emulated one (as root, on
# Debian; apt-get install mmdebstrap, and qemu-user-static for another processor):
#
#     tests/other_machines/in_debian.sh FOLDER trixie [arm64]
#
# FOLDER is the release's root, made at the first call and kept.
set -euo pipefail

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=$1 release=$2 architecture=${3:-$(dpkg --print-architecture)}

# The kernel must know what runs the programs of another processor. In a machine that has not started
# its services it is told here.
binfmt=/proc/sys/fs/binfmt_misc
if [ "$architecture" = arm64 ] && [ "$(uname -m)" != aarch64 ] && ! [ -e $binfmt/qemu-aarch64 ]; then
    [ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
    cat /usr/lib/binfmt.d/qemu-aarch64.conf > $binfmt/register
fi

if ! [ -e "$root/made" ]; then
    # Unpacked, not set up: an emulated processor would take minutes for that, and nothing here needs it.
    mmdebstrap --variant=extract --architectures="$architecture" \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
        --include=bash,coreutils,diffutils,libgomp1,python3,python3-venv,tar "$release" "$root"
    touch "$root/made"
fi

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
