// Prints the size, offset and ioctl number of everything in linux/vhost.h that
// package vhost lays out itself, one "kind name value" a line.
//   gcc -o /tmp/abi abi.c && /tmp/abi > abi.golden
#include <linux/vhost.h>
#include <linux/virtio_config.h>
#include <linux/virtio_scsi.h>
#include <stddef.h>
#include <stdio.h>

#define SIZE(t) printf("sizeof %s %zu\n", #t, sizeof(struct t))
#define OFF(t, f) printf("offset %s.%s %zu\n", #t, #f, offsetof(struct t, f))
#define NR(n) printf("value %s %lu\n", #n, (unsigned long)(n))

// Headers older than Linux 6.5 have no workers. These are its definitions; on a
// header that has them its own are printed, which must not differ.
#ifndef VHOST_NEW_WORKER
struct vhost_worker_state {
	unsigned int worker_id;
};
struct vhost_vring_worker {
	unsigned int index;
	unsigned int worker_id;
};
#define VHOST_NEW_WORKER _IOR(VHOST_VIRTIO, 0x8, struct vhost_worker_state)
#define VHOST_FREE_WORKER _IOW(VHOST_VIRTIO, 0x9, struct vhost_worker_state)
#define VHOST_ATTACH_VRING_WORKER _IOW(VHOST_VIRTIO, 0x15, struct vhost_vring_worker)
#define VHOST_GET_VRING_WORKER _IOWR(VHOST_VIRTIO, 0x16, struct vhost_vring_worker)
#endif

int main(void)
{
	SIZE(vhost_vring_state);
	OFF(vhost_vring_state, num);
	SIZE(vhost_vring_file);
	OFF(vhost_vring_file, fd);
	SIZE(vhost_vring_addr);
	OFF(vhost_vring_addr, flags);
	OFF(vhost_vring_addr, desc_user_addr);
	OFF(vhost_vring_addr, used_user_addr);
	OFF(vhost_vring_addr, avail_user_addr);
	OFF(vhost_vring_addr, log_guest_addr);
	SIZE(vhost_memory);
	OFF(vhost_memory, nregions);
	SIZE(vhost_memory_region);
	OFF(vhost_memory_region, guest_phys_addr);
	OFF(vhost_memory_region, memory_size);
	OFF(vhost_memory_region, userspace_addr);
	OFF(vhost_memory_region, flags_padding);
	SIZE(vhost_worker_state);
	SIZE(vhost_vring_worker);
	OFF(vhost_vring_worker, worker_id);
	SIZE(vhost_scsi_target);
	OFF(vhost_scsi_target, vhost_wwpn);
	OFF(vhost_scsi_target, vhost_tpgt);
	OFF(vhost_scsi_target, reserved);
	NR(VHOST_GET_FEATURES);
	NR(VHOST_SET_FEATURES);
	NR(VHOST_SET_OWNER);
	NR(VHOST_SET_MEM_TABLE);
	NR(VHOST_NEW_WORKER);
	NR(VHOST_FREE_WORKER);
	NR(VHOST_SET_VRING_NUM);
	NR(VHOST_SET_VRING_ADDR);
	NR(VHOST_SET_VRING_BASE);
	NR(VHOST_GET_VRING_BASE);
	NR(VHOST_ATTACH_VRING_WORKER);
	NR(VHOST_GET_VRING_WORKER);
	NR(VHOST_SET_VRING_KICK);
	NR(VHOST_SET_VRING_CALL);
	NR(VHOST_SET_VRING_ERR);
	NR(VHOST_SET_BACKEND_FEATURES);
	NR(VHOST_GET_BACKEND_FEATURES);
	NR(VHOST_SCSI_SET_ENDPOINT);
	NR(VHOST_SCSI_CLEAR_ENDPOINT);
	NR(VHOST_SCSI_GET_ABI_VERSION);
	NR(VHOST_SCSI_SET_EVENTS_MISSED);
	NR(VHOST_SCSI_GET_EVENTS_MISSED);
	NR(VHOST_NET_SET_BACKEND);
	NR(VHOST_VSOCK_SET_GUEST_CID);
	NR(VHOST_VSOCK_SET_RUNNING);
	NR(VHOST_SCSI_ABI_VERSION);
	NR(-VHOST_FILE_UNBIND);
	NR(VHOST_F_LOG_ALL);
	NR(VHOST_NET_F_VIRTIO_NET_HDR);
	NR(VIRTIO_F_VERSION_1);
	NR(VIRTIO_SCSI_F_HOTPLUG);
	NR(VIRTIO_SCSI_F_T10_PI);
	NR(VIRTIO_SCSI_CDB_DEFAULT_SIZE);
	NR(VIRTIO_SCSI_SENSE_DEFAULT_SIZE);
	return 0;
}
