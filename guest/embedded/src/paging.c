// Identity mapping on demand: 64-bit BARs and ACPI tables may lie anywhere, and building tables for all of the address space
// would cost more than the rest of the run.
#include "guest.h"

enum { PRESENT = 1, WRITABLE = 2, USER = 4, LARGE = 0x80, TABLES = 16 };
#define ADDRESS_MASK 0x000ffffffffff000u

extern uint64_t page_map[512];
static uint64_t tables[TABLES][512] __attribute__((aligned(4096)));
static unsigned tables_used;

static uint64_t *next_level(uint64_t *entry)
{
	if (!(*entry & PRESENT)) {
		if (tables_used == TABLES)
			fatal("no page table left");
		*entry = (uintptr_t)tables[tables_used++] | USER | WRITABLE | PRESENT;
	}
	return (uint64_t *)(*entry & ADDRESS_MASK);
}

static bool has_1gib_pages(void)
{
	static int known = -1;
	if (known < 0)
		known = cpuid(0x80000000).eax >= 0x80000001 && cpuid(0x80000001).edx >> 26 & 1;
	return known;
}

// map makes [address, address + length) reachable at its own address and returns it. Memory types are left to the MTRRs
// (write-back here): a hypervisor traps its devices' pages whatever the tables say.
void *map(uint64_t address, uint64_t length)
{
	uint64_t last = address + (length ? length - 1 : 0);
	if (last < address || last >> 47)
		fatal("physical range %#lx+%#lx out of reach", address, length);
	for (uint64_t page = address & ~0x1fffffull; page <= last; page += 0x200000) {
		uint64_t *entry = &next_level(&page_map[page >> 39])[page >> 30 & 511];
		if (!(*entry & PRESENT) && has_1gib_pages())
			*entry = (page & ~0x3fffffffull) | LARGE | USER | WRITABLE | PRESENT;
		if (*entry & LARGE)
			continue;
		entry = &next_level(entry)[page >> 21 & 511];
		if (!(*entry & PRESENT))
			*entry = page | LARGE | USER | WRITABLE | PRESENT;
	}
	return (void *)address;
}
