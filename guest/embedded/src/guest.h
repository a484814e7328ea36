// What the guest's files offer each other.
#pragma once
#include <stdarg.h>
#include "cpu.h"

// string.c
void *memcpy(void *to, const void *from, size_t n);
void *memmove(void *to, const void *from, size_t n);
void *memset(void *to, int byte, size_t n);
int memcmp(const void *a, const void *b, size_t n);

// serial.c: COM1, the console
void serial_init(void);
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void vprint(const char *format, va_list args);
void serial_write(const void *data, size_t n);
void serial_receive_interrupt(void);
unsigned serial_echo(void); // returns the bytes echoed, up to and with the 'q' that ends it

// main.c
extern struct options {
	bool write;    // the disks' contents may be changed
	bool nodisk;   // no disk is expected
	bool movebars; // move the virtio device's BARs before use,
	bool movebars_high; // and the 64-bit ones far above RAM
	bool x2apic;   // switch the boot CPU's local APIC to x2APIC mode if it has it
	bool journal;  // write numbered blocks for ever
	bool bench;    // measure the first disk instead of checking the disks
	bool sanitize; // overwrite the first disk for as long as it takes
	uint32_t bench_ms; // how long each measurement takes
} options;
bool check(bool ok, const char *format, ...) __attribute__((format(printf, 2, 3))); // prints the line, counts, returns ok
void fatal(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

void finish(void) __attribute__((noreturn)); // the report's last line, and off

// boot.S
void run_in_ring3(void (*f)(void)) __attribute__((noreturn)); // f does not return

// bench.c: reads of the first disk, and writes with the word write
void bench_disk(void) __attribute__((noreturn));

// sanitize.c
void sanitize_disk(void) __attribute__((noreturn));

// paging.c
void *map(uint64_t address, uint64_t length);

// interrupts.c: IDT, local APIC, I/O APIC
enum {
	VECTOR_TICK = 0x30,
	VECTOR_SERIAL = 0x31,
	VECTOR_MSIX = 0x32, // and up
	VECTOR_SPURIOUS = 0x3f,
	VECTORS = 64,
	TICKS_PER_SECOND = 10,
};
extern volatile uint32_t interrupts_taken[VECTORS];
extern bool x2apic;
extern uint32_t apic_id;
void interrupts_init(void);
void ticks_start(void); // a slow periodic timer, so that a wait for a lost interrupt ends
void ticks_stop(void);
static inline uint32_t ticks(void) { return interrupts_taken[VECTOR_TICK]; }
void send_ipi(uint32_t destination, uint32_t command);
bool ioapic_route(uint8_t isa_irq, uint8_t vector);
void load_empty_idt(void);

// smp.c
void start_processors(void);

// acpi.c
enum { MAX_CPUS = 4096 };
extern struct acpi {
	unsigned cpus;
	uint32_t cpu_apic_id[MAX_CPUS];
	uint64_t ioapic;           // address, 0 if none
	uint32_t ioapic_gsi_base;
	uint32_t isa_gsi[16];      // global system interrupt of each ISA IRQ
} acpi;
void acpi_init(uint64_t rsdp); // 0: look for it
void acpi_power_off(void);     // returns only if it failed
void acpi_reset(void);         // likewise

// pci.c
struct pci_bar {
	uint64_t address, size; // size 0: not there
	bool io, wide;
};
struct pci_device {
	uint8_t device, function; // on bus 0
	uint16_t vendor_id, device_id;
	uint32_t class; // class, subclass, programming interface
	struct pci_bar bar[6];
};
enum { MAX_PCI_DEVICES = 64 };
extern struct pci_device pci_devices[MAX_PCI_DEVICES];
extern unsigned pci_device_count;
void pci_scan(void);
uint32_t pci_read(const struct pci_device *d, unsigned offset, unsigned size);
void pci_write(const struct pci_device *d, unsigned offset, unsigned size, uint32_t value);
uint8_t pci_find_capability(const struct pci_device *d, uint8_t id, uint8_t after); // after 0: the first; returns 0 at the end
void pci_move_bars(struct pci_device *d, bool high);
void pci_enable(const struct pci_device *d); // memory decoding and bus mastering

// disk_checks.c
void check_disks(void);
