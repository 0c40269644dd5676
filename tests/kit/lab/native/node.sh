#!/bin/sh
# node.sh NAME NODE_DIR STATE_DIR INIT-AND-ITS-ARGUMENTS…
#
# Runs in a test host's fresh network, mount and UTS namespaces: gives it its own name, /run, /etc/hosts and libvirt
# folders, then becomes its init. Every mount made here is private to the namespace and ends with its last process.
set -eu
name=$1 node=$2 state=$3
shift 3

hostname "$name"
umount -R /sys
mount -t sysfs sysfs /sys
mount --bind "$state/hosts" /etc/hosts
# As udev makes it on a host. A QEMU user who may not open /dev/kvm would have libvirt probe QEMU again at each start.
if [ -c /dev/kvm ] && [ -e "$node/kvm" ]; then
    mount --bind "$node/kvm" /dev/kvm
fi
for folder in etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt; do
    mount --bind "$node/$folder" "/$folder"
done

# The lab's own folder must stay visible at the same path, also when that path is below the /run which we now cover.
case $state in
/run/*)
    mkdir -p "$node/run/${state#/run/}"
    mount --rbind "$state" "$node/run/${state#/run/}"
    mount --rbind "$node/run" /run
    ;;
*) mount --bind "$node/run" /run ;;
esac
cd /
echo $$ >"$node/init.pid"
exec "$@"
