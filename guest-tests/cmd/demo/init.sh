# The demo guest's init (busybox sh): a file system on /dev/sda, a file in it,
# and the file's checksum before and after it went to the disk.
step() { echo "demo: $*"; }
step "Linux $(uname -r) on $(grep -c ^processor /proc/cpuinfo) CPU"
step "disk /dev/sda: $(cat /sys/block/sda/device/vendor /sys/block/sda/device/model | xargs), $(($(cat /sys/block/sda/size) / 2048)) MiB"
mkdir -p /disk
/bin/mke2fs -q -t ext4 /dev/sda && mount /dev/sda /disk && step "mkfs.ext4 and mount: ok"
dd if=/dev/urandom of=/disk/file bs=64k count=64 2>/dev/null
before=$(sha256sum < /disk/file)
sync
umount /disk
echo 3 > /proc/sys/vm/drop_caches
mount /dev/sda /disk
after=$(sha256sum < /disk/file)
step "4 MiB written, synced, unmounted, mounted, read: $after"
if [ "$before" = "$after" ]; then step "the checksums are equal"; else step "THE CHECKSUMS DIFFER: $before"; fi
if grep -q mode=shell /proc/cmdline; then
	echo "demo: this is a shell in the guest; exit powers it off, Ctrl-a x stops gvm"
	export PS1='guest# '
	cd /disk
	setsid cttyhack sh
	cd /
fi
umount /disk
[ "$before" = "$after" ] || { echo c > /proc/sysrq-trigger; }
