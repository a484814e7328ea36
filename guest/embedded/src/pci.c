// PCI bus 0 by configuration mechanism #1, ports 0xcf8 and 0xcfc (PCI 3.0, 3.2.2.3.2).
#include "guest.h"

enum {
	VENDOR_ID = 0, COMMAND = 4, STATUS = 6, CLASS_REVISION = 8, HEADER_TYPE = 0xe, BAR0 = 0x10, CAPABILITIES = 0x34,
	COMMAND_IO = 1, COMMAND_MEMORY = 2, COMMAND_MASTER = 4, STATUS_CAPABILITIES = 0x10,
};

// Where this guest puts memory BARs that nobody has assigned, or that it was told to move: within every PC's 32-bit PCI window.
static uint64_t next_bar = 0xd0000000;

struct pci_device pci_devices[MAX_PCI_DEVICES];
unsigned pci_device_count;

static const struct { uint16_t vendor, device; const char *name; } names[] = {
	{ 0x8086, 0x29c0, "Q35 host bridge" }, { 0x8086, 0x1237, "440FX host bridge" }, { 0x1b36, 0x0008, "PCIe host bridge" },
	{ 0x8086, 0x7000, "PIIX3 ISA bridge" }, { 0x8086, 0x7010, "PIIX3 IDE" }, { 0x8086, 0x7113, "PIIX4 power management" },
	{ 0x8086, 0x2918, "ICH9 LPC bridge" }, { 0x8086, 0x2922, "ICH9 AHCI" }, { 0x8086, 0x2930, "ICH9 SMBus" },
	{ 0x1234, 0x1111, "VGA" }, { 0x8086, 0x100e, "e1000" }, { 0x8086, 0x10d3, "e1000e" }, { 0x1b36, 0x0011, "pvpanic" },
	{ 0x1af4, 0x1041, "virtio-net" }, { 0x1af4, 0x1000, "virtio-net" }, { 0x1af4, 0x1042, "virtio-blk" },
	{ 0x1af4, 0x1001, "virtio-blk" }, { 0x1af4, 0x1043, "virtio-console" }, { 0x1af4, 0x1003, "virtio-console" },
	{ 0x1af4, 0x1044, "virtio-rng" }, { 0x1af4, 0x1005, "virtio-rng" }, { 0x1af4, 0x1045, "virtio-balloon" },
	{ 0x1af4, 0x1048, "virtio-scsi" }, { 0x1af4, 0x1004, "virtio-scsi" }, { 0x1af4, 0x1049, "virtio-9p" },
	{ 0x1af4, 0x1053, "virtio-vsock" }, { 0x1af4, 0x105a, "virtio-fs" },
};

static void select(const struct pci_device *d, unsigned offset)
{
	out32(0xcf8, 0x80000000 | (uint32_t)d->device << 11 | (uint32_t)d->function << 8 | (offset & 0xfc));
}

uint32_t pci_read(const struct pci_device *d, unsigned offset, unsigned size)
{
	uint16_t port = (uint16_t)(0xcfc + (offset & 3));
	select(d, offset);
	return size == 1 ? in8(port) : size == 2 ? in16(port) : in32(port);
}

void pci_write(const struct pci_device *d, unsigned offset, unsigned size, uint32_t value)
{
	uint16_t port = (uint16_t)(0xcfc + (offset & 3));
	select(d, offset);
	if (size == 1)
		out8(port, (uint8_t)value);
	else if (size == 2)
		out16(port, (uint16_t)value);
	else
		out32(port, value);
}

uint8_t pci_find_capability(const struct pci_device *d, uint8_t id, uint8_t after)
{
	if (!(pci_read(d, STATUS, 2) & STATUS_CAPABILITIES))
		return 0;
	uint8_t at = (uint8_t)pci_read(d, after ? after + 1u : CAPABILITIES, 1) & 0xfc;
	for (unsigned hops = 0; at && hops < 48; hops++) { // a list of 48 fills the space: more is a loop
		uint32_t head = pci_read(d, at, 2);
		if ((head & 0xff) == id)
			return at;
		at = head >> 8 & 0xfc;
	}
	return 0;
}

static void set_bar(const struct pci_device *d, unsigned i, uint64_t address)
{
	pci_write(d, BAR0 + 4 * i, 4, (uint32_t)address);
	if (d->bar[i].wide)
		pci_write(d, BAR0 + 4 * i + 4, 4, (uint32_t)(address >> 32));
}

static void assign_bar(struct pci_device *d, unsigned i, uint64_t *next)
{
	struct pci_bar *b = &d->bar[i];
	b->address = (*next + b->size - 1) & ~(b->size - 1);
	*next = b->address + (b->size < 4096 ? 4096 : b->size);
	set_bar(d, i, b->address);
}

// probe_bars learns address and size of each BAR (6.2.5.1) with decoding off, so that no half-written address answers.
static void probe_bars(struct pci_device *d)
{
	uint32_t command = pci_read(d, COMMAND, 2);
	pci_write(d, COMMAND, 2, command & ~(uint32_t)(COMMAND_IO | COMMAND_MEMORY));
	for (unsigned i = 0; i < 6; i++) {
		struct pci_bar *b = &d->bar[i];
		uint32_t low = pci_read(d, BAR0 + 4 * i, 4), high = 0;
		pci_write(d, BAR0 + 4 * i, 4, ~0u);
		uint64_t mask = pci_read(d, BAR0 + 4 * i, 4);
		if (mask == 0)
			continue;
		b->io = low & 1;
		b->wide = !b->io && (low & 6) == 4 && i < 5;
		if (b->wide) {
			high = pci_read(d, BAR0 + 4 * i + 4, 4);
			pci_write(d, BAR0 + 4 * i + 4, 4, ~0u);
			mask |= (uint64_t)pci_read(d, BAR0 + 4 * i + 4, 4) << 32;
		} else {
			mask |= ~0ull << 32;
		}
		b->size = -(mask & (b->io ? ~3ull : ~15ull));
		if (b->io)
			b->size &= 0xffff;
		b->address = (uint64_t)high << 32 | (low & (b->io ? ~3u : ~15u));
		set_bar(d, i, b->address);
		bool unassigned = !b->address && !b->io;
		if (unassigned)
			assign_bar(d, i, &next_bar);
		print("  bar %u: %s %#lx size %#lx%s\n", i, b->io ? "port" : b->wide ? "memory, 64-bit," : "memory,", b->address, b->size,
		      unassigned ? " (assigned here)" : "");
		i += b->wide;
	}
	pci_write(d, COMMAND, 2, command);
}

// high_place returns an address above 4 GiB to move the BAR to. A host bridge may pass on no more than the window that the firmware
// took the BAR's address from: so it is the next GiB in there, or, for a BAR from below 4 GiB, one that 40 address bits reach.
static uint64_t high_place(const struct pci_bar *b)
{
	static uint64_t next;
	uint64_t place = b->address >> 32 ? ((b->address >> 30) + 1) << 30 : 0x7000000000;
	if (place < next)
		place = next;
	next = place + (1 << 30);
	return place;
}

void pci_move_bars(struct pci_device *d, bool high)
{
	uint32_t command = pci_read(d, COMMAND, 2);
	pci_write(d, COMMAND, 2, command & ~(uint32_t)(COMMAND_IO | COMMAND_MEMORY));
	for (unsigned i = 0; i < 6; i++) {
		if (d->bar[i].size && !d->bar[i].io) {
			uint64_t place;
			if (high && d->bar[i].wide) {
				place = high_place(&d->bar[i]);
				assign_bar(d, i, &place);
			} else {
				assign_bar(d, i, &next_bar);
			}
			print("  bar %u moved to %#lx\n", i, d->bar[i].address);
		}
	}
	pci_write(d, COMMAND, 2, command);
}

void pci_enable(const struct pci_device *d)
{
	pci_write(d, COMMAND, 2, pci_read(d, COMMAND, 2) | COMMAND_MEMORY | COMMAND_MASTER);
}

void pci_scan(void)
{
	for (uint8_t device = 0; device < 32; device++) {
		for (uint8_t function = 0; function < 8 && pci_device_count < MAX_PCI_DEVICES; function++) {
			struct pci_device *d = &pci_devices[pci_device_count];
			d->device = device;
			d->function = function;
			uint32_t id = pci_read(d, VENDOR_ID, 4);
			if ((id & 0xffff) != 0xffff) {
				d->vendor_id = (uint16_t)id;
				d->device_id = (uint16_t)(id >> 16);
				d->class = pci_read(d, CLASS_REVISION, 4) >> 8;
				const char *name = "";
				for (unsigned n = 0; n < sizeof names / sizeof *names; n++)
					if (names[n].vendor == d->vendor_id && names[n].device == d->device_id)
						name = names[n].name;
				print("pci 00:%02x.%u %04x:%04x class %06x %s\n", (uint32_t)device, (uint32_t)function, (uint32_t)d->vendor_id,
				      (uint32_t)d->device_id, d->class, name);
				pci_device_count++;
				if (d->class >> 16 != 6) // bridges hold other things there
					probe_bars(d);
			} else if (function) {
				continue;
			}
			if (function == 0 && ((id & 0xffff) == 0xffff || !(pci_read(d, HEADER_TYPE, 1) & 0x80)))
				break; // not there, or of one function
		}
	}
	if (!pci_device_count)
		print("pci: nothing on bus 0\n");
}
