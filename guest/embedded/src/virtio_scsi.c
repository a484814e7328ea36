// The virtio-scsi driver (virtio 1.3, 5.6): commands, task management and event buffers.
#include "virtio.h"

enum {
	// Device configuration (5.6.4)
	NUM_QUEUES = 0, SEG_MAX = 4, SENSE_SIZE = 20, CDB_SIZE = 24, MAX_TARGET = 30,
	// Request (5.6.6.1): lun 8, id 8, task_attr, prio, crn, cdb; response: sense_len 4, residual 4, status_qualifier 2, status,
	// response, sense
	CDB_AT = 19, REQUEST_BYTES = CDB_AT + 32, SENSE_AT = 12, RESPONSE_BYTES = SENSE_AT + 96,
	// Task management (5.6.6.2): type 4, subtype 4, lun 8, id 8
	TMF_LOGICAL_UNIT_RESET = 5, TMF_BYTES = 24,
	EVENT_BUFFERS = 4, EVENT_BYTES = 16,
};

unsigned request_queues;

static struct slot {
	struct command *command;
	uint8_t request[REQUEST_BYTES], response[RESPONSE_BYTES];
} slots[MAX_QUEUES][SLOTS];
static uint8_t events[EVENT_BUFFERS][EVENT_BYTES];

bool vscsi_start(bool verbose)
{
	if (!virtio_negotiate(VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX))
		return false;
	if (!check(virtio_features & VIRTIO_F_VERSION_1, "VIRTIO_F_VERSION_1"))
		return false;
	request_queues = read32(virtio_device_config + NUM_QUEUES);
	if (verbose)
		print("  %u request queues, seg_max %u, cdb_size %u, sense_size %u, max_target %u\n", request_queues,
		      read32(virtio_device_config + SEG_MAX), read32(virtio_device_config + CDB_SIZE),
		      read32(virtio_device_config + SENSE_SIZE), (uint32_t)read16(virtio_device_config + MAX_TARGET));
	if (!check(request_queues > 0, "the device has request queues"))
		return false;
	if (request_queues > MAX_QUEUES - REQUEST_QUEUE)
		request_queues = MAX_QUEUES - REQUEST_QUEUE;
	memset(slots, 0, sizeof slots);
	if (!virtio_start_queues(REQUEST_QUEUE + request_queues))
		return false;
	for (unsigned i = 0; i < EVENT_BUFFERS; i++)
		queue_add(&virtqueues[EVENT_QUEUE], i, &(struct segment){ events[i], EVENT_BYTES }, 0, 1);
	queue_kick(&virtqueues[EVENT_QUEUE], 1);
	return true;
}

// put_lun: 5.6.6.1, "first byte 1, second the target, third and fourth a single-level LUN structure, then zero"
static void put_lun(uint8_t *p, struct address to)
{
	memset(p, 0, 8);
	p[0] = 1;
	p[1] = to.target;
	p[2] = (uint8_t)(0x40 | to.lun >> 8);
	p[3] = (uint8_t)to.lun;
}

static unsigned add_header(struct segment *s, uint8_t *p, uint32_t length, uint32_t split)
{
	if (!split) {
		s[0] = (struct segment){ p, length };
		return 1;
	}
	s[0] = (struct segment){ p, split };
	s[1] = (struct segment){ p + split, length - split };
	return 2;
}

void vscsi_submit(unsigned queue, unsigned slot, struct command *c)
{
	struct slot *r = &slots[queue][slot];
	struct segment s[SLOT_DESCRIPTORS + 4];
	unsigned out, in;
	r->command = c;
	c->response = NO_RESPONSE;
	memset(r->request, 0, CDB_AT);
	put_lun(r->request, c->to);
	r->request[8] = (uint8_t)(slot + 1); // id: unique among those in flight on this queue,
	r->request[9] = (uint8_t)queue;      // and between queues
	memcpy(r->request + CDB_AT, c->cdb, 32);
	memset(r->response, 0xff, RESPONSE_BYTES);

	out = add_header(s, r->request, REQUEST_BYTES, c->split_headers ? 20 : 0);
	for (unsigned i = 0; i < c->outs; i++)
		s[out++] = c->out[i];
	in = add_header(s + out, r->response, RESPONSE_BYTES, c->split_headers ? 7 : 0);
	for (unsigned i = 0; i < c->ins; i++)
		s[out + in++] = c->in[i];
	queue_add(&virtqueues[queue], slot, s, out, in);
}

void vscsi_read_response(const uint8_t *p, struct command *c)
{
	const uint8_t *sense = p + SENSE_AT;
	c->sense_length = le32(p);
	c->residual = le32(p + 4);
	c->status = p[10];
	c->response = p[11];
	c->key = c->asc = c->ascq = 0;
	if (c->response != VIRTIO_SCSI_S_OK || c->status != SCSI_CHECK_CONDITION || c->sense_length < 8)
		return;
	bool descriptor_format = (sense[0] & 0x7f) >= 0x72; // SPC-4 4.5
	c->key = sense[descriptor_format ? 1 : 2] & 0xf;
	c->asc = sense[descriptor_format ? 2 : 12];
	c->ascq = sense[descriptor_format ? 3 : 13];
}

bool vscsi_attention(const struct command *c)
{
	return c->response == VIRTIO_SCSI_S_OK && c->status == SCSI_CHECK_CONDITION && c->key == UNIT_ATTENTION;
}

void vscsi_finish(unsigned queue, unsigned expected)
{
	queue_wait(&virtqueues[queue], expected);
	for (unsigned i = 0; i < expected; i++) {
		unsigned slot = queue_take(&virtqueues[queue]);
		struct slot *r = &slots[queue][slot];
		if (!r->command)
			fatal("queue %u: used ring names slot %u, which is not in flight", queue, slot);
		vscsi_read_response(r->response, r->command);
		r->command = 0;
	}
}

void vscsi_batch(unsigned queue, struct command *commands, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		vscsi_submit(queue, i, &commands[i]);
	queue_kick(&virtqueues[queue], n);
	vscsi_finish(queue, n);
}

void vscsi_execute(unsigned queue, struct command *c)
{
	vscsi_batch(queue, c, 1);
}

uint8_t vscsi_reset_lun(struct address to)
{
	struct virtqueue *q = &virtqueues[CONTROL_QUEUE];
	static uint8_t request[TMF_BYTES], response;
	memset(request, 0, TMF_BYTES); // type 0: task management
	request[4] = TMF_LOGICAL_UNIT_RESET;
	put_lun(request + 8, to);
	response = NO_RESPONSE;
	queue_add(q, 0, (struct segment[]){ { request, TMF_BYTES }, { &response, 1 } }, 1, 1);
	queue_kick(q, 1);
	queue_wait(q, 1);
	queue_take(q);
	return response;
}

void vscsi_start_first(void)
{
	struct pci_device *d = pci_devices;
	while (d < pci_devices + pci_device_count && !(d->vendor_id == 0x1af4 && (d->device_id == 0x1048 || d->device_id == 0x1004)))
		d++;
	if (d == pci_devices + pci_device_count)
		fatal("no virtio-scsi device");
	pci_enable(d);
	if (!virtio_open(d) || !vscsi_start(true))
		fatal("the device does not start");
}

void vscsi_first_command(struct command *c)
{
	for (unsigned tries = 0; tries < 5; tries++) {
		vscsi_execute(REQUEST_QUEUE, c);
		if (c->response == VIRTIO_SCSI_S_OK && c->status == SCSI_GOOD)
			return;
	}
	fatal("%x ends with response %u, status %#x", (uint32_t)c->cdb[0], (uint32_t)c->response, (uint32_t)c->status);
}
