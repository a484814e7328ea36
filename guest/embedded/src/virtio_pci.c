// The modern virtio PCI transport (virtio 1.3, 4.1) with MSI-X, and the driver's side of the split virtqueue (2.7).
#include "virtio.h"

enum {
	CAP_VENDOR = 9, CAP_MSIX = 0x11,
	// Vendor capability types (4.1.4)
	CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_ISR = 3, CAP_DEVICE = 4,
	// Common configuration (4.1.4.3)
	DEVICE_FEATURE_SELECT = 0, DEVICE_FEATURE = 4, DRIVER_FEATURE_SELECT = 8, DRIVER_FEATURE = 12, CONFIG_MSIX_VECTOR = 16,
	NUM_QUEUES = 18, DEVICE_STATUS = 20, QUEUE_SELECT = 22, QUEUE_SIZE_FIELD = 24, QUEUE_MSIX_VECTOR = 26, QUEUE_ENABLE = 28,
	QUEUE_NOTIFY_OFF = 30, QUEUE_DESC = 32, QUEUE_DRIVER = 40, QUEUE_DEVICE = 48,
	// Device status (2.1)
	ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8,
	// Descriptor flags (2.7.5)
	NEXT = 1, WRITE = 2, INDIRECT = 4,
	MSIX_ENABLE = 1 << 15, MSIX_FUNCTION_MASK = 1 << 14,
	COMPLETION_TICKS = 5 * TICKS_PER_SECOND,
};

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };

// Where the parts of a ring lie in its memory: each at no more than the alignment 2.7 asks for.
enum { AVAIL_AT = QUEUE_SIZE * 16 + 2, USED_AT = 1224, RING_BYTES = 1792 };
_Static_assert(USED_AT >= AVAIL_AT + 6 + 2 * QUEUE_SIZE && USED_AT % 4 == 0 && RING_BYTES >= USED_AT + 6 + 8 * QUEUE_SIZE, "ring");

static uint8_t ring_memory[MAX_QUEUES][RING_BYTES] __attribute__((aligned(16)));
static struct descriptor indirect_tables[MAX_QUEUES][SLOTS][SLOT_DESCRIPTORS] __attribute__((aligned(16)));

static const struct pci_device *pci;
static uint8_t *common, *notify;
static uint32_t notify_multiplier;
static uint8_t *msix_table, *msix_pba;
static uint8_t msix_capability;
static uint16_t msix_entries;
static uint32_t interrupts_at_open;

uint64_t virtio_features;
uint8_t *virtio_device_config;
struct virtio_statistics virtio_statistics;
struct virtqueue virtqueues[MAX_QUEUES];

static uint8_t *bar_region(unsigned bar, uint32_t offset, uint32_t length)
{
	if (bar > 5 || pci->bar[bar].io || (uint64_t)offset + length > pci->bar[bar].size)
		return 0;
	return map(pci->bar[bar].address + offset, length);
}

bool virtio_open(const struct pci_device *d)
{
	pci = d;
	common = notify = virtio_device_config = msix_table = 0;
	for (uint8_t at = 0; (at = pci_find_capability(d, CAP_VENDOR, at));) {
		uint8_t type = (uint8_t)pci_read(d, at + 3u, 1), bar = (uint8_t)pci_read(d, at + 4u, 1);
		uint8_t *region = bar_region(bar, pci_read(d, at + 8u, 4), pci_read(d, at + 12u, 4));
		// The first of a type that the driver can use is the one to use (4.1.4.1).
		if (type == CAP_COMMON && !common)
			common = region;
		if (type == CAP_DEVICE && !virtio_device_config)
			virtio_device_config = region;
		if (type == CAP_NOTIFY && !notify) {
			notify = region;
			notify_multiplier = pci_read(d, at + 16u, 4);
		}
	}
	virtio_statistics = (struct virtio_statistics){ 0 };
	interrupts_at_open = 0;
	interrupts_at_open = virtio_interrupts();
	msix_capability = pci_find_capability(d, CAP_MSIX, 0);
	if (msix_capability) {
		uint32_t table = pci_read(d, msix_capability + 4u, 4), pba = pci_read(d, msix_capability + 8u, 4);
		msix_entries = (uint16_t)((pci_read(d, msix_capability + 2u, 2) & 0x7ff) + 1);
		msix_table = bar_region(table & 7, table & ~7u, msix_entries * 16u);
		msix_pba = bar_region(pba & 7, pba & ~7u, (msix_entries + 63u) / 64 * 8);
	}
	return check(common && notify && virtio_device_config && msix_table && msix_pba && msix_entries >= 4,
	             "virtio capabilities and MSI-X with %u vectors, in memory BARs", (uint32_t)msix_entries);
}

static void set_status(uint8_t bits)
{
	write8(common + DEVICE_STATUS, read8(common + DEVICE_STATUS) | bits);
}

void virtio_reset(void)
{
	write8(common + DEVICE_STATUS, 0);
	for (unsigned spins = 0; read8(common + DEVICE_STATUS) != 0; spins++) // 4.1.4.3.2: done when it reads 0
		if (spins == 10000)
			fatal("virtio device does not finish its reset");
}

bool virtio_negotiate(uint64_t wanted)
{
	virtio_reset();
	set_status(ACKNOWLEDGE);
	set_status(DRIVER);
	uint64_t offered = 0;
	for (uint32_t half = 0; half < 2; half++) {
		write32(common + DEVICE_FEATURE_SELECT, half);
		offered |= (uint64_t)read32(common + DEVICE_FEATURE) << 32 * half;
	}
	virtio_features = offered & wanted;
	for (uint32_t half = 0; half < 2; half++) {
		write32(common + DRIVER_FEATURE_SELECT, half);
		write32(common + DRIVER_FEATURE, (uint32_t)(virtio_features >> 32 * half));
	}
	set_status(FEATURES_OK);
	return check(read8(common + DEVICE_STATUS) & FEATURES_OK, "features %#lx accepted of %#lx offered", virtio_features, offered);
}

static void set_msix_entry(uint16_t entry)
{
	uint8_t *e = msix_table + 16 * entry;
	// Bits 8 to 14 of the ID are where KVM_FEATURE_MSI_EXT_DEST_ID has them.
	write32(e, 0xfee00000 | (apic_id & 0xff) << 12 | (apic_id >> 8 & 0x7f) << 5);
	write32(e + 4, 0);
	write32(e + 8, VECTOR_MSIX + entry);
	write32(e + 12, 0);
}

static bool start_queue(unsigned i)
{
	struct virtqueue *q = &virtqueues[i];
	write16(common + QUEUE_SELECT, (uint16_t)i);
	uint16_t size = read16(common + QUEUE_SIZE_FIELD);
	if (size < QUEUE_SIZE) {
		check(false, "queue %u holds %u descriptors, %u wanted", i, (uint32_t)size, (uint32_t)QUEUE_SIZE);
		return false;
	}
	uint8_t *ring = ring_memory[i];
	uint16_t entry = (uint16_t)(i + 1 < msix_entries ? i + 1 : msix_entries - 1u); // entry 0 is for configuration changes
	*q = (struct virtqueue){
		.index = (uint16_t)i, .size = QUEUE_SIZE, .msix_entry = entry, .vector = (uint8_t)(VECTOR_MSIX + entry),
		.descriptors = ring, .avail = ring + AVAIL_AT, .used = ring + USED_AT,
		.notify = notify + read16(common + QUEUE_NOTIFY_OFF) * notify_multiplier,
	};
	memset(ring + QUEUE_SIZE * 16, 0, RING_BYTES - QUEUE_SIZE * 16);
	write16(common + QUEUE_SIZE_FIELD, QUEUE_SIZE);
	write16(common + QUEUE_MSIX_VECTOR, entry);
	bool ok = read16(common + QUEUE_MSIX_VECTOR) == entry; // 4.1.5.1.2.2: 0xffff if the device has no room
	const struct { unsigned at; uint8_t *part; } parts[] = {
		{ QUEUE_DESC, q->descriptors }, { QUEUE_DRIVER, q->avail }, { QUEUE_DEVICE, q->used },
	};
	for (unsigned p = 0; p < 3; p++) {
		write32(common + parts[p].at, (uint32_t)(uintptr_t)parts[p].part);
		write32(common + parts[p].at + 4, (uint32_t)((uintptr_t)parts[p].part >> 32));
	}
	write16(common + QUEUE_ENABLE, 1);
	return ok && read16(common + QUEUE_ENABLE) == 1;
}

bool virtio_start_queues(unsigned count)
{
	uint32_t control = pci_read(pci, msix_capability + 2u, 2) & ~(uint32_t)MSIX_FUNCTION_MASK;
	pci_write(pci, msix_capability + 2u, 2, control | MSIX_ENABLE | MSIX_FUNCTION_MASK);
	for (uint16_t e = 0; e < msix_entries && e <= count; e++)
		set_msix_entry(e);
	pci_write(pci, msix_capability + 2u, 2, control | MSIX_ENABLE);
	write16(common + CONFIG_MSIX_VECTOR, 0);
	bool ok = read16(common + CONFIG_MSIX_VECTOR) == 0 && count <= read16(common + NUM_QUEUES);
	for (unsigned i = 0; ok && i < count; i++)
		ok = start_queue(i);
	if (ok)
		set_status(DRIVER_OK);
	return check(ok, "%u queues started", count);
}

void msix_mask(const struct virtqueue *q, bool masked)
{
	write32(msix_table + 16 * q->msix_entry + 12, masked);
}

bool msix_pending(const struct virtqueue *q)
{
	return read32(msix_pba + q->msix_entry / 32 * 4) >> q->msix_entry % 32 & 1;
}

uint32_t virtio_interrupts(void)
{
	uint32_t sum = -interrupts_at_open;
	for (unsigned e = 0; e <= MAX_QUEUES; e++)
		sum += interrupts_taken[VECTOR_MSIX + e];
	return sum;
}

// queue_add makes a chain of the segments, out of them for the device to read and then in of them for it to write: every other
// one through an indirect table (2.7.5.3) if the device takes those.
void queue_add(struct virtqueue *q, unsigned slot, const struct segment *s, unsigned out, unsigned in)
{
	unsigned head = slot * SLOT_DESCRIPTORS, first = head, n = out + in;
	struct descriptor *ring = (struct descriptor *)q->descriptors, *table = ring + head;
	bool indirect = virtio_features & VIRTIO_F_INDIRECT_DESC && virtio_statistics.requests & 1 && out;
	if (n == 0 || n > SLOT_DESCRIPTORS || slot >= SLOTS)
		fatal("request of %u segments in slot %u", n, slot);
	if (indirect) {
		table = indirect_tables[q->index][slot];
		first = 0;
		ring[head] = (struct descriptor){ (uintptr_t)table, n * (uint32_t)sizeof *table, INDIRECT, 0 };
		virtio_statistics.indirect++;
	}
	for (unsigned i = 0; i < n; i++)
		table[i] = (struct descriptor){
			(uintptr_t)s[i].base, s[i].length, (uint16_t)((i < out ? 0 : WRITE) | (i + 1 < n ? NEXT : 0)), (uint16_t)(first + i + 1),
		};
	write16(q->avail + 4 + 2 * (q->next_avail % q->size), (uint16_t)head);
	q->next_avail++;
	q->interrupts_before = interrupts_taken[q->vector];
	virtio_statistics.requests += out != 0; // an event buffer is none
}

void queue_kick(struct virtqueue *q, unsigned expected)
{
	write16(q->avail + 4 + 2 * q->size, (uint16_t)(q->last_used + expected - 1)); // used_event, 2.7.7.1
	compiler_barrier();
	queue_publish(q);
}

void queue_publish(struct virtqueue *q)
{
	write16(q->avail + 2, q->next_avail); // publishes the chains; x86 stores stay in order
	full_barrier();                       // before the look at whether the device wants to hear of it (2.7.13.4.1)
	bool wanted;
	if (virtio_features & VIRTIO_F_EVENT_IDX) {
		uint16_t event = read16(q->used + 4 + 8 * q->size);
		wanted = (uint16_t)(q->next_avail - event - 1) < (uint16_t)(q->next_avail - q->kicked_avail);
	} else {
		wanted = !(read16(q->used) & 1);
	}
	q->kicked_avail = q->next_avail;
	if (wanted) {
		write16(q->notify, q->index);
		virtio_statistics.notifications++;
	}
}

bool queue_used(const struct virtqueue *q, unsigned expected)
{
	return (uint16_t)(read16(q->used + 2) - q->last_used) >= expected;
}

void queue_wait(struct virtqueue *q, unsigned expected)
{
	interrupts_off();
	for (uint32_t since = ticks();;) {
		bool done = queue_used(q, expected);
		if (done && interrupts_taken[q->vector] != q->interrupts_before)
			break;
		if (ticks() - since > COMPLETION_TICKS)
			fatal("queue %u: %s", (uint32_t)q->index, done ? "completed without its interrupt" : "TIMEOUT, no completion");
		sleep_until_interrupt();
	}
	interrupts_on();
}

// queue_next leaves the element's length alone: QEMU counts bytes it read too, and LIO writes 0.
uint32_t queue_next(struct virtqueue *q)
{
	return read32(q->used + 4 + 8 * (q->last_used++ % q->size));
}

unsigned queue_take(struct virtqueue *q)
{
	uint32_t id = queue_next(q);
	if (id >= q->size || id % SLOT_DESCRIPTORS)
		fatal("queue %u: used ring names chain %u, which was not made", (uint32_t)q->index, id);
	return id / SLOT_DESCRIPTORS;
}
