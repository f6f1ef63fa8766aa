#!/bin/busybox sh
# The VM's first process: this machine's file system by virtiofs below, a disk of the VM's own above, then systemd.
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in virtio_pci virtio_blk virtiofs overlay ext4; do
    modprobe $module || echo "init: no module $module"
done
mkdir -p /lower /disk /root
mount -t virtiofs -o ro share /lower || exec sh
mount -t ext4 /dev/vda /disk || exec sh
mkdir -p /disk/upper /disk/work
mount -t overlay -o lowerdir=/lower,upperdir=/disk/upper,workdir=/disk/work overlay /root || exec sh
mkdir -p /root/lib/modules
for word in $(cat /proc/cmdline); do
    case $word in
    weft.modules=*) mount --bind "/lower${word#*=}" /root/usr/lib/modules || mount --bind "/lower${word#*=}" /root/lib/modules ;;
    esac
done
# systemd empties /tmp at boot, and that of a machine at work takes minutes.
mount -t tmpfs -o mode=1777 tmp /root/tmp
umount /proc /sys
mount --move /dev /root/dev
exec switch_root /root /lib/systemd/systemd
