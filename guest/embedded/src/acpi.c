// What the guest needs of ACPI (6.5): processors and I/O APIC from the MADT, power-off and reset from the FADT and the DSDT's _S5_.
// AML is not interpreted: _S5_ is looked for by its name.
#include "guest.h"

enum {
	// Table header (5.2.6) and the FADT's fields (5.2.9)
	LENGTH = 4, HEADER = 36,
	FADT_DSDT = 40, FADT_SMI_CMD = 48, FADT_ACPI_ENABLE = 52, FADT_PM1A_CNT = 64, FADT_PM1B_CNT = 68, FADT_FLAGS = 112,
	FADT_RESET_REG = 116, FADT_RESET_VALUE = 128, FADT_X_DSDT = 140, FADT_X_PM1A_CNT = 172, FADT_X_PM1B_CNT = 184,
	FLAG_RESET_REG = 1 << 10,
	PM1_SCI_EN = 1, PM1_SLP_EN = 1 << 13,
};

struct acpi acpi;
static const uint8_t *fadt;
static uint32_t fadt_length;
static int sleep_type_a = -1, sleep_type_b;

// byte_sum adds up n bytes modulo 256, eight at a time in 16-bit lanes (128 additions of two bytes cannot overflow one).
static uint8_t byte_sum(const uint8_t *p, uint32_t n)
{
	uint64_t total = 0;
	while (n >= 8) {
		uint64_t lanes = 0;
		for (unsigned i = 0; i < 128 && n >= 8; i++, p += 8, n -= 8) {
			uint64_t w = le64(p);
			lanes += (w & 0x00ff00ff00ff00ffu) + (w >> 8 & 0x00ff00ff00ff00ffu);
		}
		total += (lanes & 0xffff) + (lanes >> 16 & 0xffff) + (lanes >> 32 & 0xffff) + (lanes >> 48);
	}
	while (n--)
		total += *p++;
	return (uint8_t)total;
}

static const uint8_t *map_table(uint64_t address, uint32_t *length)
{
	const uint8_t *t = map(address, HEADER);
	*length = le32(t + LENGTH);
	if (*length < HEADER || *length > 1 << 20) {
		check(false, "ACPI table at %#lx: length %u", address, *length);
		return 0;
	}
	map(address, *length);
	uint8_t sum = byte_sum(t, *length);
	if (sum)
		check(false, "ACPI table %.*s: checksum off by %u", 4, (const char *)t, sum);
	return t;
}

// read_s5 finds Name (_S5_, Package {a, b, …}) and keeps the first two elements: SLP_TYPa and SLP_TYPb (7.4.2).
static void read_s5(const uint8_t *dsdt, uint32_t length)
{
	for (uint32_t i = HEADER; i + 16 < length; i++) {
		if (dsdt[i] != '_' || le32(dsdt + i) != 0x5f35535f)
			continue;
		const uint8_t *p = dsdt + i + 4;
		if (*p++ != 0x12) // PackageOp
			continue;
		p += 1 + (*p >> 6); // PkgLength
		p++;                // NumElements
		int value[2];
		for (unsigned e = 0; e < 2; e++) {
			if (*p == 0x0a) // BytePrefix
				p++;
			value[e] = *p++ & 7; // or ZeroOp 0, OneOp 1
		}
		sleep_type_a = value[0];
		sleep_type_b = value[1];
		return;
	}
}

// read_madt: 5.2.12
static void read_madt(const uint8_t *madt, uint32_t length)
{
	for (uint32_t i = HEADER + 8; i + 2 <= length && madt[i + 1] >= 2 && i + madt[i + 1] <= length; i += madt[i + 1]) {
		const uint8_t *e = madt + i;
		uint32_t id = 0;
		bool enabled = false;
		if (e[0] == 0) { // processor local APIC
			id = e[3];
			enabled = le32(e + 4) & 1;
		} else if (e[0] == 9) { // processor local x2APIC
			id = le32(e + 4);
			enabled = le32(e + 8) & 1;
		} else if (e[0] == 1 && !acpi.ioapic) {
			acpi.ioapic = le32(e + 4);
			acpi.ioapic_gsi_base = le32(e + 8);
		} else if (e[0] == 2 && e[3] < 16) { // interrupt source override
			acpi.isa_gsi[e[3]] = le32(e + 4);
		}
		if (enabled && acpi.cpus < MAX_CPUS)
			acpi.cpu_apic_id[acpi.cpus++] = id;
	}
}

// find_rsdp: 5.2.5.1, the first KiB of the extended BIOS data area and the BIOS read-only area.
static uint64_t find_rsdp(void)
{
	uint64_t ebda = (uint64_t)*(uint16_t *)map(0x40e, 2) << 4;
	uint64_t ranges[2][2] = { { ebda, ebda + 1024 }, { 0xe0000, 0x100000 } };
	for (unsigned r = 0; r < 2; r++)
		for (uint64_t a = ranges[r][0]; a && a < ranges[r][1]; a += 16)
			if (le64((void *)a) == 0x2052545020445352 && byte_sum((void *)a, 20) == 0) // "RSD PTR "
				return a;
	return 0;
}

void acpi_init(uint64_t rsdp_address)
{
	for (unsigned i = 0; i < 16; i++)
		acpi.isa_gsi[i] = i;
	bool given = rsdp_address != 0;
	if (!given)
		rsdp_address = find_rsdp();
	if (!rsdp_address) {
		print("acpi: no RSDP\n");
		return;
	}
	const uint8_t *rsdp = map(rsdp_address, 36);
	uint8_t revision = rsdp[15];
	print("acpi: RSDP at %#lx (%s), revision %u:", rsdp_address, given ? "from the start info" : "found by scan", revision);
	bool wide = revision >= 2 && le64(rsdp + 24);
	uint32_t length, unused;
	const uint8_t *root = map_table(wide ? le64(rsdp + 24) : le32(rsdp + 16), &length);
	uint32_t dsdt_length = 0;
	const uint8_t *dsdt = 0, *madt = 0;
	uint32_t madt_length = 0;
	for (uint32_t i = HEADER; root && i + (wide ? 8 : 4) <= length; i += wide ? 8 : 4) {
		const uint8_t *t = map_table(wide ? le64(root + i) : le32(root + i), &unused);
		if (!t)
			continue;
		print(" %.*s", 4, (const char *)t);
		if (le32(t) == 0x50434146) { // "FACP"
			fadt = t;
			fadt_length = unused;
		} else if (le32(t) == 0x43495041) { // "APIC"
			madt = t;
			madt_length = unused;
		}
	}
	if (fadt) {
		uint64_t address = fadt_length >= FADT_X_DSDT + 8 ? le64(fadt + FADT_X_DSDT) : 0;
		dsdt = map_table(address ? address : le32(fadt + FADT_DSDT), &dsdt_length);
	}
	print("%s\n", dsdt ? " DSDT" : "");
	check(byte_sum(rsdp, revision >= 2 ? 36 : 20) == 0 && root && fadt && dsdt, "ACPI tables are whole");
	if (madt)
		read_madt(madt, madt_length);
	if (dsdt)
		read_s5(dsdt, dsdt_length);
}

// A register of the FADT: by its generic address (5.2.3.2) if that is filled in, else the 32-bit port of older tables.
static uint16_t pm1_port(uint32_t extended, uint32_t legacy)
{
	if (fadt_length >= extended + 12 && le64(fadt + extended + 4) && fadt[extended] == 1)
		return (uint16_t)le64(fadt + extended + 4);
	return (uint16_t)le32(fadt + legacy);
}

void acpi_power_off(void)
{
	if (!fadt || sleep_type_a < 0) {
		print("no ACPI power-off: %s\n", fadt ? "no _S5_ in the DSDT" : "no FADT");
		return;
	}
	uint16_t a = pm1_port(FADT_X_PM1A_CNT, FADT_PM1A_CNT), b = pm1_port(FADT_X_PM1B_CNT, FADT_PM1B_CNT);
	if (!(in16(a) & PM1_SCI_EN) && le32(fadt + FADT_SMI_CMD) && fadt[FADT_ACPI_ENABLE]) {
		out8((uint16_t)le32(fadt + FADT_SMI_CMD), fadt[FADT_ACPI_ENABLE]);
		for (unsigned spins = 0; !(in16(a) & PM1_SCI_EN) && spins < 10000; spins++)
			relax();
	}
	uint16_t keep = in16(a) & ~(uint16_t)(7 << 10 | PM1_SLP_EN);
	if (b)
		out16(b, (uint16_t)(keep | sleep_type_b << 10 | PM1_SLP_EN));
	out16(a, (uint16_t)(keep | sleep_type_a << 10 | PM1_SLP_EN));
	for (unsigned spins = 0; spins < 1000000; spins++) // the machine may stop some time after the write
		relax();
	print("ACPI power-off through port %#x did nothing\n", (uint32_t)a);
}

void acpi_reset(void)
{
	if (!fadt || fadt_length <= FADT_RESET_VALUE || !(le32(fadt + FADT_FLAGS) & FLAG_RESET_REG) || fadt[FADT_RESET_REG] != 1) {
		print("no ACPI reset register\n");
		return;
	}
	out8((uint16_t)le64(fadt + FADT_RESET_REG + 4), fadt[FADT_RESET_VALUE]);
}
