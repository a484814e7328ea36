// A guest whose disk is busy for long: SANITIZE, OVERWRITE, without IMMED (SBC-4 5.29) with as many passes as there can be.
#include "virtio.h"

enum { TEST_UNIT_READY = 0, SANITIZE = 0x48, OVERWRITE = 1, PASSES = 31, NOT_READY = 2 };

void sanitize_disk(void)
{
	static uint8_t parameters[] = { PASSES, 0, 0, 1, 0xa5 }; // of one byte
	struct command ready = { .cdb = { TEST_UNIT_READY } };
	struct command c = { .cdb = { SANITIZE, OVERWRITE, [8] = sizeof parameters }, .out = { { parameters, sizeof parameters } }, .outs = 1 };
	vscsi_start_first();
	vscsi_first_command(&ready);
	vscsi_submit(REQUEST_QUEUE, 0, &c);
	queue_kick(&virtqueues[REQUEST_QUEUE], 1);
	do { // until the disk says that it has begun
		vscsi_submit(REQUEST_QUEUE, 1, &ready);
		queue_kick(&virtqueues[REQUEST_QUEUE], 1);
		vscsi_finish(REQUEST_QUEUE, 1);
		if (c.response != NO_RESPONSE)
			fatal("SANITIZE ends with response %u, status %#x, sense %x/%02x/%02x", (uint32_t)c.response, (uint32_t)c.status,
			      (uint32_t)c.key, (uint32_t)c.asc, (uint32_t)c.ascq);
	} while (ready.key != NOT_READY || ready.asc != 0x04 || ready.ascq != 0x1b);
	print("sanitizing\n");
	for (;;)
		compiler_barrier();
}
