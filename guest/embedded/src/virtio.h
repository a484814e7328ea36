// virtio over PCI and the virtio-scsi driver (virtio 1.3).
#pragma once
#include "guest.h"

// Feature bits (6): those the guest accepts.
#define VIRTIO_F_INDIRECT_DESC (1ull << 28)
#define VIRTIO_F_EVENT_IDX (1ull << 29)
#define VIRTIO_F_VERSION_1 (1ull << 32)

struct segment {
	void *base;
	uint32_t length;
};

// Requests are built in slots: slot s of a queue owns descriptors s*SLOT_DESCRIPTORS and up, and one indirect table.
enum { QUEUE_SIZE = 64, SLOT_DESCRIPTORS = 16, SLOTS = QUEUE_SIZE / SLOT_DESCRIPTORS, MAX_QUEUES = 6 };

struct virtqueue {
	uint16_t index, size, last_used, next_avail, kicked_avail;
	uint8_t vector;       // of this CPU
	uint16_t msix_entry;
	uint32_t interrupts_before; // taken by the vector when the last request was added
	void *notify;
	uint8_t *descriptors, *avail, *used;
};

struct virtio_statistics {
	unsigned requests, indirect, notifications;
};

// virtio_pci.c: one device at a time
extern uint64_t virtio_features; // negotiated
extern uint8_t *virtio_device_config;
extern struct virtio_statistics virtio_statistics;
extern struct virtqueue virtqueues[MAX_QUEUES];
bool virtio_open(const struct pci_device *d);          // finds the device's registers
bool virtio_negotiate(uint64_t wanted);                // reset up to FEATURES_OK
bool virtio_start_queues(unsigned count);              // MSI-X, rings, DRIVER_OK
void virtio_reset(void);
uint32_t virtio_interrupts(void);                      // taken for the device so far
void msix_mask(const struct virtqueue *q, bool masked);
bool msix_pending(const struct virtqueue *q);
void queue_add(struct virtqueue *q, unsigned slot, const struct segment *s, unsigned out, unsigned in);
void queue_kick(struct virtqueue *q, unsigned expected); // the interrupt is asked for the last of expected completions
void queue_wait(struct virtqueue *q, unsigned expected); // fatal if they, or their interrupt, fail to come
bool queue_used(const struct virtqueue *q, unsigned expected); // whether that many have completed, interrupt or not
void queue_publish(struct virtqueue *q);                 // kick with used_event as it is
uint32_t queue_next(struct virtqueue *q);                // the head of the next completion, unchecked
unsigned queue_take(struct virtqueue *q);                // the slot of the next completion

// virtio_scsi.c. Response codes: 5.6.6.1; control queue: 5.6.6.2.
enum {
	VIRTIO_SCSI_S_OK = 0, VIRTIO_SCSI_S_BAD_TARGET = 3, VIRTIO_SCSI_S_FAILURE = 9, VIRTIO_SCSI_S_FUNCTION_COMPLETE = 0,
	VIRTIO_SCSI_S_FUNCTION_SUCCEEDED = 10,
	SCSI_GOOD = 0, SCSI_CHECK_CONDITION = 2, UNIT_ATTENTION = 6,
	NO_RESPONSE = 0xff,
	CONTROL_QUEUE = 0, EVENT_QUEUE = 1, REQUEST_QUEUE = 2,
};

struct address { uint8_t target; uint16_t lun; };

struct command {
	struct address to;
	uint8_t cdb[32];
	struct segment out[8], in[8];
	unsigned outs, ins;
	bool split_headers; // the request and response headers in two descriptors each (2.7.4: any layout)
	// Filled in on completion. response is NO_RESPONSE if the device has not written it.
	uint8_t response, status, key, asc, ascq;
	uint32_t residual, sense_length;
};

extern unsigned request_queues;

bool vscsi_start(bool verbose);
void vscsi_execute(unsigned queue, struct command *c);
void vscsi_batch(unsigned queue, struct command *commands, unsigned n); // n ≤ SLOTS at once, one notification
void vscsi_submit(unsigned queue, unsigned slot, struct command *c);    // the parts of execute,
void vscsi_finish(unsigned queue, unsigned expected);                   // for a caller that looks in between
void vscsi_read_response(const uint8_t *response, struct command *c);   // what the device wrote
bool vscsi_attention(const struct command *c);                          // c found a unit attention, and has to be sent again
void vscsi_start_first(void);                                           // the first device of the machine
void vscsi_first_command(struct command *c);                            // again while the unit tells of unit attentions
uint8_t vscsi_reset_lun(struct address to);                             // the task management response
