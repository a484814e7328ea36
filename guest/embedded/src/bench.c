// The benchmark of a disk: random transfers of 4 KiB on the first request queue, a fixed number of them in flight, completed by
// polling the used ring or by interrupt. Where ring 0 is slow, because a KVM without hardware virtualization emulates it, all of it
// runs in ring 3, which such a KVM runs natively.
#include "virtio.h"

enum {
	BLOCK = 4096, DEPTH_MAX = QUEUE_SIZE,
	SLOW_LOOPS = 1000, SLOW_CYCLES = 50, // a loop that takes more cycles than that for each turn is emulated
	CALIBRATION_TICKS = 2, ANSWER_TICKS = 5 * TICKS_PER_SECOND,
	DESCRIPTORS = 3, NEXT = 1, WRITE = 2, INDIRECT = 4,
	TEST_UNIT_READY = 0, READ_CAPACITY_10 = 0x25, READ_10 = 0x28, WRITE_10 = 0x2a,
	HEADER_BYTES = 51, CDB_AT = 19, RESPONSE_BYTES = 108, STATUS_AT = 10,
	SUBBUCKETS = 32, // of each power of two of a latency in cycles
};

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };

static struct request {
	struct descriptor table[DESCRIPTORS];
	uint64_t sent;
	uint8_t header[HEADER_BYTES], response[RESPONSE_BYTES];
} __attribute__((aligned(64))) requests[DEPTH_MAX];
static uint8_t data[DEPTH_MAX][BLOCK] __attribute__((aligned(4096)));
static uint32_t histogram[64 * SUBBUCKETS];

static struct virtqueue *queue;
static uint32_t block_size, blocks_per_transfer, places;
static uint64_t cycles_per_ms, random_state = 88172645463325252ull;

static uint32_t random_below(uint32_t n)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32_t)((random_state >> 32) * n >> 32);
}

static unsigned bucket_of(uint64_t cycles)
{
	if (cycles < SUBBUCKETS)
		return (unsigned)cycles;
	unsigned power = 63u - (unsigned)__builtin_clzll(cycles) - 5; // 2^5 is SUBBUCKETS
	return (power + 1) * SUBBUCKETS + (unsigned)(cycles >> power) - SUBBUCKETS;
}

static uint64_t bucket_end(unsigned b)
{
	if (b < SUBBUCKETS)
		return b;
	return ((uint64_t)(b % SUBBUCKETS + SUBBUCKETS + 1) << (b / SUBBUCKETS - 1)) - 1;
}

static uint64_t nanoseconds(uint64_t cycles) { return cycles * 1000000 / cycles_per_ms; }

// quantile returns the latency in ns that per_mille of n requests do not exceed.
static uint64_t quantile(uint64_t n, unsigned per_mille)
{
	uint64_t sum = 0, want = (n * per_mille + 999) / 1000;
	for (unsigned b = 0; b < sizeof histogram / sizeof *histogram; b++) {
		sum += histogram[b];
		if (sum >= want && sum)
			return nanoseconds(bucket_end(b));
	}
	return 0;
}

static void prepare(uint8_t operation)
{
	for (unsigned i = 0; i < DEPTH_MAX; i++) {
		struct request *r = &requests[i];
		uint8_t *cdb = r->header + CDB_AT;
		bool write = operation == WRITE_10;
		memset(r->header, 0, HEADER_BYTES);
		r->header[0] = 1, r->header[2] = 0x40; // target 0, LUN 0 (5.6.6.1)
		r->header[8] = (uint8_t)i;
		cdb[0] = operation;
		put_be16(cdb + 7, (uint16_t)blocks_per_transfer);
		struct descriptor *d = r->table;
		*d = (struct descriptor){ (uintptr_t)r->header, HEADER_BYTES, NEXT, 1 };
		if (write)
			*++d = (struct descriptor){ (uintptr_t)data[i], BLOCK, NEXT, 2 };
		*++d = (struct descriptor){ (uintptr_t)r->response, RESPONSE_BYTES, write ? WRITE : NEXT | WRITE, 2 };
		if (!write)
			*++d = (struct descriptor){ (uintptr_t)data[i], BLOCK, WRITE, 0 };
		((struct descriptor *)queue->descriptors)[i] = (struct descriptor){ (uintptr_t)r->table, sizeof r->table, INDIRECT, 0 };
	}
}

static void send(unsigned i, uint64_t now)
{
	struct request *r = &requests[i];
	put_be32(r->header + CDB_AT + 2, random_below(places) * blocks_per_transfer);
	r->response[STATUS_AT] = r->response[STATUS_AT + 1] = NO_RESPONSE;
	r->sent = now;
	write16(queue->avail + 4 + 2 * (queue->next_avail++ % queue->size), (uint16_t)i);
}

// wait returns when something has completed.
static void wait(bool by_interrupt)
{
	uint32_t since = ticks(), before = interrupts_taken[queue->vector];
	if (by_interrupt) {
		write16(queue->avail + 4 + 2 * queue->size, queue->last_used); // used_event
		full_barrier();
		if (queue_used(queue, 1))
			return; // there may be no interrupt for it
	}
	while (!queue_used(queue, 1) || (by_interrupt && interrupts_taken[queue->vector] == before)) {
		if (ticks() - since > ANSWER_TICKS)
			fatal(queue_used(queue, 1) ? "a request completed without its interrupt" : "the disk does not answer");
		relax(); // not hlt, which ring 3 must not
	}
}

static void measure(uint8_t operation, unsigned depth, bool by_interrupt)
{
	uint64_t done = 0, longest = 0, start, now, end;
	unsigned flying = depth;
	memset(histogram, 0, sizeof histogram);
	prepare(operation);
	// The event field of a driver that polls stays behind: 2.7.7.2.
	write16(queue->avail + 4 + 2 * queue->size, (uint16_t)(queue->last_used - 1));
	unsigned notified = virtio_statistics.notifications, interrupted = interrupts_taken[queue->vector];
	start = now = read_tsc();
	end = start + options.bench_ms * cycles_per_ms;
	for (unsigned i = 0; i < depth; i++)
		send(i, now);
	while (flying) {
		queue_publish(queue);
		wait(by_interrupt);
		now = read_tsc();
		do {
			uint32_t i = queue_next(queue);
			if (i >= depth)
				fatal("the used ring names request %u of %u", i, depth);
			const uint8_t *status = requests[i].response + STATUS_AT;
			if (status[0] != SCSI_GOOD || status[1] != VIRTIO_SCSI_S_OK) {
				struct command c;
				vscsi_read_response(requests[i].response, &c);
				if (!vscsi_attention(&c)) // such as that of a disk that was added
					fatal("a request ended with status %#x, response %u", (uint32_t)status[0], (uint32_t)status[1]);
				send(i, now);
				continue;
			}
			uint64_t took = now - requests[i].sent;
			histogram[bucket_of(took)]++;
			if (took > longest)
				longest = took;
			done++;
			if (now < end)
				send(i, now);
			else
				flying--;
		} while (queue_used(queue, 1));
	}
	uint64_t us = nanoseconds(now - start) / 1000;
	print("bench: %s depth %u %s: %lu requests in %lu us; ns p50 %lu p99 %lu p999 %lu max %lu; %u notifications, %u interrupts\n",
	      operation == READ_10 ? "read" : "write", depth, by_interrupt ? "interrupt" : "poll", done, us, quantile(done, 500),
	      quantile(done, 990), quantile(done, 999), nanoseconds(longest), virtio_statistics.notifications - notified,
	      interrupts_taken[queue->vector] - interrupted);
}

static void calibrate(void)
{
	uint32_t edge = ticks();
	while (ticks() == edge)
		relax();
	uint64_t start = read_tsc();
	for (edge = ticks(); ticks() - edge < CALIBRATION_TICKS;)
		relax();
	cycles_per_ms = (read_tsc() - start) * TICKS_PER_SECOND / (CALIBRATION_TICKS * 1000);
	print("bench: %lu TSC cycles in a ms\n", cycles_per_ms);
}

static void __attribute__((noreturn)) run(void)
{
	static const unsigned depths[] = { 1, 4, 16, 32, 64 };
	calibrate();
	for (unsigned write = 0; write <= options.write; write++)
		for (unsigned by_interrupt = 0; by_interrupt < 2; by_interrupt++)
			for (unsigned i = 0; i < sizeof depths / sizeof *depths; i++)
				measure(write ? WRITE_10 : READ_10, depths[i], by_interrupt);
	finish();
}

void bench_disk(void)
{
	vscsi_start_first();
	if (!(virtio_features & VIRTIO_F_INDIRECT_DESC) || !(virtio_features & VIRTIO_F_EVENT_IDX))
		fatal("the device is not one to measure");
	static uint8_t capacity[8];
	struct command ready = { .cdb = { TEST_UNIT_READY } };
	struct command c = { .cdb = { READ_CAPACITY_10 }, .in = { { capacity, sizeof capacity } }, .ins = 1 };
	vscsi_first_command(&ready);
	vscsi_first_command(&c);
	block_size = be32(capacity + 4);
	if (!block_size || BLOCK % block_size)
		fatal("blocks of %u bytes", block_size);
	blocks_per_transfer = BLOCK / block_size;
	places = (be32(capacity) + 1) / blocks_per_transfer;
	if (!places)
		fatal("the disk is too small");
	queue = &virtqueues[REQUEST_QUEUE];

	uint64_t start = read_tsc();
	for (volatile unsigned i = 0; i < SLOW_LOOPS; i++)
		;
	bool slow = read_tsc() - start > (uint64_t)SLOW_LOOPS * SLOW_CYCLES;
	print("bench: %u transfers of 4 KiB fit, in ring %u\n", places, slow ? 3u : 0u);
	if (slow)
		run_in_ring3(run);
	run();
}
