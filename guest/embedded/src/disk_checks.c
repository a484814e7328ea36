// Checks of every disk behind every virtio-scsi device: identification, capacity, reads and (if allowed) writes through buffers in
// odd pieces, and that what must fail fails with the right status.
#include "virtio.h"

enum {
	TEST_UNIT_READY = 0x00, INQUIRY = 0x12, MODE_SENSE_6 = 0x1a, READ_CAPACITY_10 = 0x25, READ_10 = 0x28,
	WRITE_10 = 0x2a, SYNCHRONIZE_CACHE_10 = 0x35, READ_16 = 0x88, WRITE_16 = 0x8a, SERVICE_ACTION_IN_16 = 0x9e,
	READ_CAPACITY_16 = 0x10, REPORT_LUNS = 0xa0, NO_SUCH_COMMAND = 0xc1,
	ILLEGAL_REQUEST = 5, DATA_PROTECT = 7,
	TARGETS_TRIED = 8, MAX_DISKS_PER_TARGET = 16,
	MAX_TRANSFER = 8192, AREA_BYTES = MAX_TRANSFER + 512, // the gaps of scatter need less
};

// Where a transfer is cut into segments; what is left over makes the last one. Lengths and starts are odd on purpose.
static const struct cut { uint32_t length[5]; unsigned n; } cuts[] = {
	{ { 512, 1024, 2560 }, 3 },
	{ { 1, 100, 331, 7, 2077 }, 5 },
	{ { 300, 12, 4000 }, 3 },
};

struct disk {
	struct address at;
	unsigned host;
	uint64_t blocks;
	uint32_t block_size;
	bool write_protected;
};

static uint64_t linear[MAX_TRANSFER / 8], again[MAX_TRANSFER / 8]; // a transfer in one piece
static uint8_t area[AREA_BYTES];                                   // and scattered
static uint8_t answer[512];
static const char cut_poison = 0x3c;

static struct command new_command(struct address at, const uint8_t *cdb, unsigned cdb_length)
{
	struct command c = { .to = at };
	memcpy(c.cdb, cdb, cdb_length);
	return c;
}

enum { TRIES = 5 }; // of a command that finds unit attentions

// run executes a command, again after each unit attention, which it shows.
static void run(struct command *c)
{
	for (unsigned tries = 0; tries < TRIES; tries++) {
		vscsi_execute(REQUEST_QUEUE, c);
		if (!vscsi_attention(c))
			return;
		print("  unit attention %02x/%02x\n", (uint32_t)c->asc, (uint32_t)c->ascq);
	}
}

static bool good(const struct command *c)
{
	return c->response == VIRTIO_SCSI_S_OK && c->status == SCSI_GOOD;
}

static bool check_good(const struct command *c, const char *what)
{
	if (good(c))
		return check(true, "%s", what);
	return check(false, "%s: response %u, status %#x, sense %x/%02x/%02x, residual %u", what, (uint32_t)c->response,
	             (uint32_t)c->status, (uint32_t)c->key, (uint32_t)c->asc, (uint32_t)c->ascq, c->residual);
}

static void check_sense(const struct command *c, uint8_t key, uint8_t asc, uint8_t ascq, const char *what)
{
	check(c->response == VIRTIO_SCSI_S_OK && c->status == SCSI_CHECK_CONDITION && c->key == key && c->asc == asc && c->ascq == ascq,
	      "%s: response %u, status %#x, sense %x/%02x/%02x, residual %u", what, (uint32_t)c->response, (uint32_t)c->status,
	      (uint32_t)c->key, (uint32_t)c->asc, (uint32_t)c->ascq, c->residual);
}

// data_in runs a CDB of up to 16 bytes whose answer goes to answer[0, length).
static struct command data_in(struct address at, const uint8_t *cdb, unsigned cdb_length, uint32_t length)
{
	struct command c = new_command(at, cdb, cdb_length);
	c.in[0] = (struct segment){ answer, length };
	c.ins = 1;
	memset(answer, 0xee, length);
	run(&c);
	return c;
}

// The test pattern: the 8-byte little-endian word at byte position p of a disk, known by its target and LUN, tells all three, so
// that a block from a wrong place or a wrong disk shows. The Go package embeddedtest
// computes the same.
static uint64_t pattern(const struct disk *d, uint64_t position)
{
	uint64_t disk = (uint64_t)d->at.target << 16 | d->at.lun;
	return (position / 8 + 1) * 0x9e3779b97f4a7c15u ^ (disk + 1) << 40;
}

// scatter lays length bytes out over the area as the cut says, a gap of poison after each piece, and returns the pieces.
static unsigned scatter(struct segment *s, const struct cut *cut, uint32_t length)
{
	unsigned n = 0;
	uint8_t *p = area + 3;
	for (unsigned i = 0; length; i++) {
		uint32_t piece = i < cut->n && cut->length[i] < length ? cut->length[i] : length;
		s[n++] = (struct segment){ p, piece };
		p[piece] = (uint8_t)cut_poison;
		p += piece + 5 + 2 * i;
		length -= piece;
	}
	return n;
}

static struct command transfer_command(const struct disk *d, bool write, uint64_t lba, uint32_t blocks)
{
	struct command c = { .to = d->at };
	if (lba + blocks - 1 > 0xffffffffu || lba % 2 == 1) { // the longer form too where the shorter would do
		c.cdb[0] = write ? WRITE_16 : READ_16;
		put_be64(c.cdb + 2, lba);
		put_be32(c.cdb + 10, blocks);
	} else {
		c.cdb[0] = write ? WRITE_10 : READ_10;
		put_be32(c.cdb + 2, (uint32_t)lba);
		put_be16(c.cdb + 7, (uint16_t)blocks);
	}
	return c;
}

static struct command write_blocks(const struct disk *d, uint64_t lba, uint32_t blocks, const struct cut *cut)
{
	struct command c = transfer_command(d, true, lba, blocks);
	const uint8_t *from = (const uint8_t *)linear;
	c.outs = scatter(c.out, cut, blocks * d->block_size);
	for (unsigned i = 0; i < c.outs; from += c.out[i++].length)
		memcpy(c.out[i].base, from, c.out[i].length);
	run(&c);
	return c;
}

// read_blocks reads through buffers that held poison, gathers them into `to`, and fails if a byte behind a piece has changed.
static struct command read_blocks(const struct disk *d, uint64_t lba, uint32_t blocks, const struct cut *cut, uint8_t poison, void *to)
{
	struct command c = transfer_command(d, false, lba, blocks);
	uint8_t *next = to;
	memset(area, poison, AREA_BYTES);
	c.ins = scatter(c.in, cut, blocks * d->block_size);
	run(&c);
	for (unsigned i = 0; i < c.ins; next += c.in[i++].length) {
		memcpy(next, c.in[i].base, c.in[i].length);
		if (((uint8_t *)c.in[i].base)[c.in[i].length] != cut_poison)
			check(false, "read wrote past the end of segment %u", i);
	}
	return c;
}

static void check_region(const struct disk *d, const char *name, uint64_t lba, uint32_t blocks)
{
	uint32_t bytes = blocks * d->block_size;
	struct command c;
	if (options.write && !d->write_protected) {
		for (uint32_t i = 0; i < bytes / 8; i++)
			linear[i] = pattern(d, lba * d->block_size + 8 * i);
		c = write_blocks(d, lba, blocks, &cuts[0]);
		bool ok = good(&c) && c.residual == 0;
		for (unsigned i = 1; ok && i <= 2; i++) {
			c = read_blocks(d, lba, blocks, &cuts[i], 0x55, again);
			ok = good(&c) && c.residual == 0;
			if (ok && memcmp(linear, again, bytes))
				check(false, "%s: data read back through cut %u differ", name, i);
		}
		check(ok, "write and read back %s, LBA %lu, %u blocks in %u segments", name, lba, blocks, c.ins);
	} else {
		c = read_blocks(d, lba, blocks, &cuts[0], 0x55, linear);
		bool ok = good(&c) && c.residual == 0;
		c = read_blocks(d, lba, blocks, &cuts[1], 0xaa, again);
		ok = ok && good(&c) && c.residual == 0;
		check(ok && !memcmp(linear, again, bytes), "read twice %s, LBA %lu, %u blocks in %u segments", name, lba, blocks, c.ins);
	}
	if (!good(&c))
		check_good(&c, "transfer");
}

static void trim(char *text, const uint8_t *field, unsigned n)
{
	memcpy(text, field, n);
	for (; n && text[n - 1] == ' '; n--)
		;
	text[n] = 0;
}

// identify runs INQUIRY and the two READ CAPACITYs, prints the disk's line, and tells whether it is a disk to check.
static bool identify(struct disk *d)
{
	char vendor[9], product[17], revision[5];
	struct command c = data_in(d->at, (uint8_t[]){ INQUIRY, 0, 0, 0, 255 }, 6, 255);
	if (!good(&c))
		return check_good(&c, "INQUIRY");
	uint8_t type = answer[0] & 0x1f;
	if (answer[0] >> 5) // peripheral qualifier: no unit here, as of a LUN 0 that only stands for its target (SPC-4 6.6.2)
		return false;
	uint32_t length = answer[4] + 5u;
	uint32_t inquiry_residual = 255 - (length < 255 ? length : 255);
	bool residual_right = c.residual == inquiry_residual;
	trim(vendor, answer + 8, 8);
	trim(product, answer + 16, 16);
	trim(revision, answer + 32, 4);
	print("disk %u:0:%u:%u %s %s %s", d->host, (uint32_t)d->at.target, (uint32_t)d->at.lun, vendor, product, revision);
	if (type) {
		print(": device type %#x, not a disk, left alone\n", (uint32_t)type);
		return false;
	}
	print("\n");
	check(residual_right, "INQUIRY of %u bytes into 255: residual %u", length, c.residual);

	c = new_command(d->at, (uint8_t[]){ TEST_UNIT_READY }, 1);
	run(&c);
	if (!check_good(&c, "TEST UNIT READY"))
		return false;

	c = data_in(d->at, (uint8_t[]){ READ_CAPACITY_10 }, 1, 8);
	if (!good(&c))
		return check_good(&c, "READ CAPACITY(10)");
	uint64_t last = be32(answer);
	d->block_size = be32(answer + 4);
	c = data_in(d->at, (uint8_t[]){ SERVICE_ACTION_IN_16, READ_CAPACITY_16, [13] = 32 }, 16, 32);
	if (!good(&c))
		return check_good(&c, "READ CAPACITY(16)");
	d->blocks = be64(answer) + 1;
	print("  %lu MiB, %lu blocks of %u bytes\n", d->blocks * d->block_size >> 20, d->blocks, d->block_size);
	if (!check(be32(answer + 8) == d->block_size && last == (d->blocks - 1 > 0xffffffffu ? 0xffffffffu : d->blocks - 1),
	           "READ CAPACITY(10) and (16) agree"))
		return false;
	if (!check(d->block_size >= 512 && 2 * d->block_size <= MAX_TRANSFER && d->blocks > 0, "the block size can be used"))
		return false;

	c = data_in(d->at, (uint8_t[]){ MODE_SENSE_6, 0, 8, 0, 64 }, 6, 64); // caching mode page
	if (check_good(&c, "MODE SENSE(6), caching page")) {
		const uint8_t *page = answer + 4 + answer[3];
		d->write_protected = answer[2] >> 7;
		print("  %s, write cache %s\n", d->write_protected ? "write-protected" : "writable",
		      (page[0] & 0x3f) == 8 && page[2] & 4 ? "on" : "off");
	}
	return true;
}

// check_refusals: what must not work (SBC-4 5.x, SPC-4 4.5).
static void check_refusals(const struct disk *d)
{
	struct command c = transfer_command(d, false, d->blocks, 1);
	c.in[c.ins++] = (struct segment){ area, d->block_size };
	run(&c);
	check_sense(&c, ILLEGAL_REQUEST, 0x21, 0, "READ past the end is refused");

	c = transfer_command(d, false, d->blocks - 1, 2);
	c.in[c.ins++] = (struct segment){ area, 2 * d->block_size };
	run(&c);
	check_sense(&c, ILLEGAL_REQUEST, 0x21, 0, "READ across the end is refused");

	c = new_command(d->at, (uint8_t[]){ NO_SUCH_COMMAND }, 1);
	run(&c);
	check_sense(&c, ILLEGAL_REQUEST, 0x20, 0, "an unknown command is refused");

	if (options.write && d->write_protected) {
		memset(linear, 0, d->block_size);
		c = write_blocks(d, 0, 1, &cuts[2]);
		check_sense(&c, DATA_PROTECT, 0x27, 0, "a write to a write-protected disk is refused");
	}
}

// check_depth has as many reads in flight at once as there are slots, on every request queue in turn, and all of them again after a
// unit attention, which one of them finds when a disk is added meanwhile.
static void check_depth(const struct disk *d)
{
	static struct command c[SLOTS];
	for (unsigned queue = REQUEST_QUEUE; queue < REQUEST_QUEUE + request_queues; queue++) {
		bool ok = true, attention = true;
		unsigned notified = 0;
		uint32_t interrupts = 0;
		for (unsigned i = 0; i < SLOTS; i++) {
			c[i] = transfer_command(d, false, i < d->blocks ? i : 0, 1);
			c[i].in[0] = (struct segment){ (uint8_t *)again + i * 512, d->block_size < 512 ? d->block_size : 512 };
			c[i].in[1] = (struct segment){ area, d->block_size - c[i].in[0].length };
			c[i].ins = d->block_size > 512 ? 2 : 1;
		}
		for (unsigned tries = 0; attention && tries < TRIES; tries++) {
			notified = virtio_statistics.notifications;
			interrupts = interrupts_taken[virtqueues[queue].vector];
			vscsi_batch(queue, c, SLOTS);
			attention = false;
			for (unsigned i = 0; i < SLOTS; i++)
				attention = attention || vscsi_attention(&c[i]);
		}
		for (unsigned i = 0; i < SLOTS; i++)
			ok = ok && good(&c[i]) && c[i].residual == 0;
		check(ok, "queue %u: %u reads at once, %u notifications, %u interrupts", queue, (uint32_t)SLOTS,
		      virtio_statistics.notifications - notified, interrupts_taken[virtqueues[queue].vector] - interrupts);
	}
}

// check_any_layout: where descriptors begin and end is the driver's affair (2.7.4), also within the headers. QEMU 7.2 answers FAILURE,
// so that a refusal is only noted.
static void check_any_layout(const struct disk *d)
{
	struct command c = transfer_command(d, false, 0, 1);
	c.in[0] = (struct segment){ again, d->block_size };
	c.ins = 1;
	c.split_headers = true;
	memset(again, 0x55, d->block_size);
	run(&c);
	if (c.response == VIRTIO_SCSI_S_FAILURE) {
		print("  note headers split over descriptors: not taken, response %u\n", (uint32_t)c.response);
		return;
	}
	bool ok = good(&c) && c.residual == 0;
	c = read_blocks(d, 0, 1, &cuts[0], 0xaa, linear);
	check(ok && good(&c) && !memcmp(linear, again, d->block_size), "headers split over descriptors");
}

// journal writes 4 KiB at a time, all over the disk again and again, each 8 bytes with the number of the write, and prints the
// numbers of those that were answered. Every eighth has FUA, every sixteenth is followed by a flush.
static void journal(const struct disk *d)
{
	enum { SIZE = 4096, FUA = 0x08 };
	uint32_t blocks = SIZE / d->block_size;
	uint64_t slots = d->blocks / blocks;
	for (uint64_t n = 1;; n++) {
		for (unsigned i = 0; i < SIZE / 8; i++)
			linear[i] = n;
		struct command c = transfer_command(d, true, n % slots * blocks, blocks);
		if (n % 8 == 4)
			c.cdb[1] |= FUA;
		c.out[0] = (struct segment){ linear, SIZE };
		c.outs = 1;
		run(&c);
		if (good(&c))
			print("wrote %lu\n", n);
		if (good(&c) && n % 16 == 8) {
			c = new_command(d->at, (uint8_t[]){ SYNCHRONIZE_CACHE_10 }, 1);
			run(&c);
		}
		if (!good(&c)) {
			check_good(&c, "journal");
			return;
		}
	}
}

// check_disk goes through all checks of one disk. False if the unit is none, or cannot be used.
static bool check_disk(struct disk *d)
{
	if (!identify(d))
		return false;
	if (options.write && options.journal)
		journal(d);
	uint32_t run_blocks = MAX_TRANSFER / d->block_size;
	check_region(d, "first block", 0, 1);
	check_region(d, "middle block", d->blocks / 2, 1);
	check_region(d, "last block", d->blocks - 1, 1);
	if (d->blocks > 4 * run_blocks)
		check_region(d, "run of blocks", d->blocks / 4 + 1, run_blocks);
	check_depth(d);
	check_any_layout(d);
	if (options.write && !d->write_protected) {
		struct command c = new_command(d->at, (uint8_t[]){ SYNCHRONIZE_CACHE_10 }, 1);
		run(&c);
		check_good(&c, "SYNCHRONIZE CACHE(10)");
	}
	check_refusals(d);
	return true;
}

// check_addressing: a unit that is not there, beside one that is, and a target that is not there, if one was found.
static void check_addressing(struct address there, int absent_target)
{
	struct command c = new_command((struct address){ there.target, 255 }, (uint8_t[]){ TEST_UNIT_READY }, 1);
	run(&c);
	check(c.response == VIRTIO_SCSI_S_BAD_TARGET || (c.status == SCSI_CHECK_CONDITION && c.key == ILLEGAL_REQUEST && c.asc == 0x25),
	      "LUN 255 is refused: response %u, status %#x, sense %x/%02x/%02x", (uint32_t)c.response, (uint32_t)c.status, (uint32_t)c.key,
	      (uint32_t)c.asc, (uint32_t)c.ascq);
	if (absent_target < 0)
		return;
	c = new_command((struct address){ (uint8_t)absent_target, 0 }, (uint8_t[]){ TEST_UNIT_READY }, 1);
	run(&c);
	check(c.response == VIRTIO_SCSI_S_BAD_TARGET, "target %u is refused: response %u", (uint32_t)absent_target, (uint32_t)c.response);
}

// check_masked_vector: a completion while its vector is masked waits in the pending bit and is delivered on unmask (PCI 3.0, 6.8.3.4).
static void check_masked_vector(struct address at)
{
	struct virtqueue *q = &virtqueues[REQUEST_QUEUE];
	struct command c = new_command(at, (uint8_t[]){ TEST_UNIT_READY }, 1);
	msix_mask(q, true);
	vscsi_submit(REQUEST_QUEUE, 0, &c);
	queue_kick(q, 1);
	for (unsigned spins = 0; !queue_used(q, 1) && spins < 5000; spins++)
		relax();
	interrupts_off();
	for (uint32_t since = ticks(); !queue_used(q, 1) && ticks() - since < TICKS_PER_SECOND;)
		sleep_until_interrupt(); // the tick's
	interrupts_on();
	bool pending = false;
	for (uint32_t since = ticks(); !pending && ticks() - since < TICKS_PER_SECOND;) // the device may be late after its buffer
		pending = msix_pending(q);
	check(pending && interrupts_taken[q->vector] == q->interrupts_before, "a masked vector's interrupt is held pending");
	msix_mask(q, false);
	vscsi_finish(REQUEST_QUEUE, 1);
	check(!msix_pending(q) && c.response == VIRTIO_SCSI_S_OK, "and delivered on unmask");
}

// check_task_management: a LUN reset is answered on the control queue, and the unit tells of it. SAM-5 7.7 has FUNCTION
// COMPLETE for one that is done; Linux's vhost-scsi says FUNCTION SUCCEEDED.
static void check_task_management(struct address at)
{
	uint8_t response = vscsi_reset_lun(at);
	check(response == VIRTIO_SCSI_S_FUNCTION_COMPLETE || response == VIRTIO_SCSI_S_FUNCTION_SUCCEEDED, "LOGICAL UNIT RESET: response %u", (uint32_t)response);
	struct command c = new_command(at, (uint8_t[]){ TEST_UNIT_READY }, 1);
	vscsi_execute(REQUEST_QUEUE, &c);
	check_sense(&c, UNIT_ATTENTION, 0x29, c.ascq, "the unit tells of its reset");
	run(&c);
	check_good(&c, "and is ready again");
}

// report_luns fills lun with the target's units and returns how many there are, or -1 if the target is not there.
static int report_luns(uint8_t target, uint16_t *lun)
{
	struct command c = data_in((struct address){ target, 0 }, (uint8_t[]){ REPORT_LUNS, [9] = sizeof answer & 0xff, [8] = sizeof answer >> 8 },
	                           12, sizeof answer);
	if (c.response == VIRTIO_SCSI_S_BAD_TARGET)
		return -1;
	if (!good(&c)) {
		check_good(&c, "REPORT LUNS");
		return -1;
	}
	uint32_t n = be32(answer) / 8;
	for (uint32_t i = 0; i < n && i < MAX_DISKS_PER_TARGET; i++)
		lun[i] = (uint16_t)((answer[8 + 8 * i] & 0x3f) << 8 | answer[9 + 8 * i]); // peripheral or flat addressing
	return n < MAX_DISKS_PER_TARGET ? (int)n : MAX_DISKS_PER_TARGET;
}

static unsigned check_device(struct pci_device *pci, unsigned host)
{
	unsigned disks = 0;
	struct address first = { 0, 0 };
	int absent_target = -1;
	print("virtio-scsi 00:%02x.%u\n", (uint32_t)pci->device, (uint32_t)pci->function);
	if (options.movebars || options.movebars_high)
		pci_move_bars(pci, options.movebars_high);
	pci_enable(pci);
	if (!virtio_open(pci) || !vscsi_start(true))
		return 0;
	for (uint8_t target = 0; target < TARGETS_TRIED; target++) {
		uint16_t lun[MAX_DISKS_PER_TARGET];
		int n = report_luns(target, lun);
		if (n < 0)
			absent_target = target;
		for (int i = 0; i < n; i++) {
			struct disk d = { .at = { target, lun[i] }, .host = host };
			if (check_disk(&d) && disks++ == 0)
				first = d.at;
		}
	}
	if (disks) {
		print("virtio-scsi 00:%02x.%u again\n", (uint32_t)pci->device, (uint32_t)pci->function);
		check_addressing(first, absent_target);
		check_masked_vector(first);
		check_task_management(first);
		if (vscsi_start(false)) { // a driver may reset the device and begin anew at any time
			struct command c = new_command(first, (uint8_t[]){ TEST_UNIT_READY }, 1);
			run(&c);
			check_good(&c, "TEST UNIT READY after a device reset");
		}
	}
	print("  %u requests, %u of them indirect, %u notifications, %u interrupts\n", virtio_statistics.requests, virtio_statistics.indirect,
	      virtio_statistics.notifications, virtio_interrupts());
	virtio_reset();
	return disks;
}

void check_disks(void)
{
	unsigned hosts = 0, disks = 0;
	for (unsigned i = 0; i < pci_device_count; i++) {
		struct pci_device *d = &pci_devices[i];
		if (d->vendor_id == 0x1af4 && (d->device_id == 0x1048 || d->device_id == 0x1004))
			disks += check_device(d, hosts++);
	}
	if (!disks && !options.nodisk)
		check(false, "%s", hosts ? "no disk" : "no virtio-scsi device");
}
