// gvm's embedded guest: a bare-metal program that looks over the machine it is booted on, checks its virtio-scsi disks and powers
// off. It says what it found on COM1 and ends its report with a line "PASS" or "FAIL: …".
#include "guest.h"

enum { PVPANIC = 0x505, PVPANIC_PANICKED = 1 };

// hvm_start_info and its memory map: Xen's public/arch-x86/hvm/start_info.h
struct start_info {
	uint32_t magic, version, flags, modules;
	uint64_t module_list, command_line, rsdp;
	uint64_t memory_map; // from version 1 on
	uint32_t memory_map_entries;
};
struct memory_range { uint64_t address, size; uint32_t type, reserved; };
enum { START_INFO_MAGIC = 0x336ec578, RANGE_RAM = 1, COMMAND_LINE_MAX = 1024 };

struct options options = { .bench_ms = 300 };
unsigned checks_made, checks_failed;
static void (*mode)(void); // what to do instead of the disk checks

static void __attribute__((noreturn)) halt(void)
{
	for (;;) {
		interrupts_off();
		asm volatile("hlt");
	}
}

// panic_event tells the host of a crash through an ISA pvpanic device, if there is one: nothing there reads as all ones.
static bool panic_event(void)
{
	uint8_t events = in8(PVPANIC);
	if (events == 0xff || !(events & PVPANIC_PANICKED))
		return false;
	out8(PVPANIC, PVPANIC_PANICKED);
	return true;
}

void finish(void)
{
	ticks_stop();
	if (checks_failed == 0) {
		print("PASS\n");
	} else {
		print("FAIL: %u of %u checks failed\n", checks_failed, checks_made);
		panic_event();
	}
	acpi_power_off();
	halt();
}

bool check(bool ok, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	checks_made++;
	checks_failed += !ok;
	print(ok ? "  ok   " : "  FAIL ");
	vprint(format, args);
	print("\n");
	va_end(args);
	return ok;
}

void fatal(const char *format, ...)
{
	static bool again;
	va_list args;
	if (again)
		halt();
	again = true;
	va_start(args, format);
	print("\nFAIL: ");
	vprint(format, args);
	print("\n");
	va_end(args);
	panic_event();
	acpi_power_off();
	halt();
}

static void mode_triple_fault(void)
{
	print("triple fault next\n");
	load_empty_idt();
	// A page fault, which processors and emulators of every kind raise. (Some KVMs cannot emulate int3 or ud2.)
	*(volatile uint8_t *)(1ull << 46) = 0;
}

static void mode_panic(void)
{
	print("pvpanic event next\n");
	if (!panic_event())
		fatal("no pvpanic device at port %#x", (uint32_t)PVPANIC);
	halt();
}

static void reset_cf9(void) { out8(0xcf9, 6); }
static void reset_i8042(void) { out8(0x64, 0xfe); }

static void mode_reset_acpi(void)
{
	print("reset by ACPI next\n");
	acpi_reset();
	fatal("ACPI reset did nothing");
}

static void mode_reset_cf9(void)
{
	print("reset by port 0xcf9 next\n");
	reset_cf9();
	fatal("port 0xcf9 did nothing");
}

static void mode_reset_i8042(void)
{
	print("reset by the i8042 next\n");
	reset_i8042();
	fatal("the i8042 did nothing");
}

static void mode_reset(void)
{
	print("reset next\n");
	acpi_reset();
	reset_cf9();
	reset_i8042();
	fatal("no way of reset works");
}

static void mode_hang(void)
{
	print("hanging\n");
	halt();
}

static void mode_spin(void)
{
	print("spinning\n");
	for (;;)
		compiler_barrier();
}

static void mode_echo(void)
{
	unsigned n = serial_echo();
	print("echo: %u bytes, %u interrupts\n", n, interrupts_taken[VECTOR_SERIAL]);
	check(interrupts_taken[VECTOR_SERIAL] > 0, "serial input came by interrupt");
}

static const struct { const char *name; bool *option; void (*mode)(void); } words[] = {
	{ "write", &options.write, 0 },
	{ "nodisk", &options.nodisk, 0 },
	{ "movebars", &options.movebars, 0 },
	{ "movebars=high", &options.movebars_high, 0 },
	{ "x2apic", &options.x2apic, 0 },
	{ "journal", &options.journal, 0 },
	{ "bench", &options.bench, 0 },
	{ "sanitize", &options.sanitize, 0 },
	{ "crash=triple", 0, mode_triple_fault },
	{ "crash=panic", 0, mode_panic },
	{ "crash=reset", 0, mode_reset },
	{ "crash=reset-acpi", 0, mode_reset_acpi },
	{ "crash=reset-cf9", 0, mode_reset_cf9 },
	{ "crash=reset-i8042", 0, mode_reset_i8042 },
	{ "hang", 0, mode_hang },
	{ "spin", 0, mode_spin },
	{ "echo", 0, mode_echo },
};

// take_number takes words such as bench-ms=100.
static bool take_number(const char *word, size_t length)
{
	static const char name[] = "bench-ms=";
	if (length < sizeof name || memcmp(word, name, sizeof name - 1))
		return false;
	uint32_t n = 0;
	for (size_t i = sizeof name - 1; i < length; i++) {
		if (word[i] < '0' || word[i] > '9' || n > 100000)
			return false;
		n = 10 * n + (uint32_t)(word[i] - '0');
	}
	options.bench_ms = n;
	return n > 0;
}

static bool take_word(const char *word, size_t length)
{
	if (take_number(word, length))
		return true;
	for (unsigned i = 0; i < sizeof words / sizeof *words; i++) {
		if (memcmp(words[i].name, word, length) || words[i].name[length])
			continue;
		if (words[i].option)
			*words[i].option = true;
		else
			mode = words[i].mode;
		return true;
	}
	return false;
}

static void read_command_line(uint64_t address)
{
	const char *line = address ? map(address, COMMAND_LINE_MAX) : "";
	size_t end = 0;
	while (end < COMMAND_LINE_MAX && line[end])
		end++;
	print("command line: \"%.*s\"\n", (uint32_t)end, line);
	for (size_t i = 0; i < end;) {
		size_t start = i;
		while (i < end && line[i] != ' ')
			i++;
		if (i > start && !take_word(line + start, i - start))
			print("  word \"%.*s\" not known, ignored\n", (uint32_t)(i - start), line + start);
		i++;
	}
}

static void show_memory(const struct start_info *s)
{
	if (s->version < 1 || !s->memory_map) {
		print("memory: no map\n");
		return;
	}
	const struct memory_range *r = map(s->memory_map, s->memory_map_entries * sizeof *r);
	uint64_t total = 0;
	for (uint32_t i = 0; i < s->memory_map_entries; i++)
		if (r[i].type == RANGE_RAM)
			total += r[i].size;
	print("memory: %lu MiB\n", (total + (1 << 19)) >> 20);
	for (uint32_t i = 0; i < s->memory_map_entries; i++)
		print("  %010lx-%010lx type %u\n", r[i].address, r[i].address + r[i].size - 1, r[i].type);
}

void guest_main(const struct start_info *s)
{
	serial_init();
	print("gvm embedded guest\n");
	map((uintptr_t)s, sizeof *s);
	if (s->magic != START_INFO_MAGIC)
		fatal("start info at %#lx has magic %#x", (uint64_t)s, s->magic);
	read_command_line(s->command_line);
	show_memory(s);
	uint64_t rsdp = s->rsdp;
	interrupts_init();
	acpi_init(rsdp);
	if (mode) {
		mode();
		finish();
	}
	ticks_start();
	start_processors(); // may overwrite what the loader left below 1 MiB: all of that has been read
	pci_scan();
	if (options.bench)
		bench_disk();
	if (options.sanitize)
		sanitize_disk();
	check_disks();
	finish();
}
