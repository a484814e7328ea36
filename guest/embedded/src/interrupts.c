// Interrupt descriptor table, local APIC (xAPIC or x2APIC, as found) and I/O APIC. SDM volume 3, chapters 6 and 11.
#include "guest.h"

enum {
	LAPIC_ID = 0x20, LAPIC_TPR = 0x80, LAPIC_EOI = 0xb0, LAPIC_SPURIOUS = 0xf0, LAPIC_ICR = 0x300, LAPIC_ICR_HIGH = 0x310,
	LAPIC_TIMER = 0x320, LAPIC_LINT0 = 0x350, LAPIC_TIMER_INITIAL = 0x380, LAPIC_TIMER_DIVIDE = 0x3e0,
	LVT_MASKED = 0x10000, LVT_PERIODIC = 0x20000, ICR_PENDING = 0x1000,
	MSR_APIC_BASE = 0x1b, MSR_X2APIC = 0x800,
};
#define TIMER_HZ 1000000000u // KVM's and QEMU's APIC timers count nanoseconds

struct interrupt_frame {
	uint64_t r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
	uint64_t vector, error, rip, cs, rflags, rsp, ss;
};

extern const char vector_entries[];
volatile uint32_t interrupts_taken[VECTORS];
bool x2apic;
uint32_t apic_id;
static uint8_t *lapic;
static struct { uint64_t low, high; } idt[VECTORS] __attribute__((aligned(16)));

struct __attribute__((packed)) table_pointer { uint16_t limit; uint64_t base; };

static uint32_t lapic_read(uint32_t reg)
{
	return x2apic ? (uint32_t)read_msr(MSR_X2APIC + (reg >> 4)) : read32(lapic + reg);
}

static void lapic_write(uint32_t reg, uint32_t v)
{
	if (x2apic)
		write_msr(MSR_X2APIC + (reg >> 4), v);
	else
		write32(lapic + reg, v);
}

void interrupts_init(void)
{
	// The 8259s stay silent: every interrupt here is an MSI, the APIC timer's or the I/O APIC's.
	out8(0x21, 0xff);
	out8(0xa1, 0xff);

	for (unsigned v = 0; v < VECTORS; v++) {
		uint64_t entry = (uintptr_t)vector_entries + 16 * v;
		idt[v].low = (entry & 0xffff) | 8 << 16 | 0x8eull << 40 | (entry >> 16 & 0xffff) << 48; // interrupt gate
		idt[v].high = entry >> 32;
	}
	struct table_pointer p = { sizeof idt - 1, (uintptr_t)idt };
	asm volatile("lidt %0" : : "m"(p));

	uint64_t base = read_msr(MSR_APIC_BASE);
	if (!(base & 1 << 11))
		write_msr(MSR_APIC_BASE, base |= 1 << 11);
	if (options.x2apic && cpuid(1).ecx >> 21 & 1)
		write_msr(MSR_APIC_BASE, base |= 1 << 10);
	x2apic = base >> 10 & 1;
	if (!x2apic)
		lapic = map(base & 0x000ffffffffff000u, 4096);
	apic_id = lapic_read(LAPIC_ID);
	if (!x2apic)
		apic_id >>= 24;
	lapic_write(LAPIC_LINT0, LVT_MASKED);
	lapic_write(LAPIC_TPR, 0);
	lapic_write(LAPIC_SPURIOUS, 0x100 | VECTOR_SPURIOUS); // enabled
	interrupts_on();
}

void ticks_start(void)
{
	lapic_write(LAPIC_TIMER_DIVIDE, 0xb); // by 1
	lapic_write(LAPIC_TIMER, LVT_PERIODIC | VECTOR_TICK);
	lapic_write(LAPIC_TIMER_INITIAL, TIMER_HZ / TICKS_PER_SECOND);
}

void ticks_stop(void)
{
	lapic_write(LAPIC_TIMER_INITIAL, 0);
	lapic_write(LAPIC_TIMER, LVT_MASKED);
}

void send_ipi(uint32_t destination, uint32_t command)
{
	if (x2apic) {
		write_msr(MSR_X2APIC + (LAPIC_ICR >> 4), (uint64_t)destination << 32 | command);
		return;
	}
	lapic_write(LAPIC_ICR_HIGH, destination << 24);
	lapic_write(LAPIC_ICR, command);
	for (unsigned spins = 0; lapic_read(LAPIC_ICR) & ICR_PENDING && spins < 10000; spins++)
		relax();
}

// ioapic_route sends an ISA interrupt to this processor as vector, edge-triggered and active high, the ISA default.
bool ioapic_route(uint8_t isa_irq, uint8_t vector)
{
	if (!acpi.ioapic)
		return false;
	uint8_t *select = map(acpi.ioapic, 32), *window = select + 16;
	uint32_t pin = acpi.isa_gsi[isa_irq] - acpi.ioapic_gsi_base;
	write32(select, 0x11 + 2 * pin); // the redirection entry's high half, then its low half
	write32(window, apic_id << 24 | (apic_id >> 8 & 0x7f) << 17);
	write32(select, 0x10 + 2 * pin);
	write32(window, vector);
	return true;
}

// load_empty_idt leaves nothing to handle an exception with: the next one is a triple fault.
void load_empty_idt(void)
{
	struct table_pointer p = { 0, 0 };
	interrupts_off();
	asm volatile("lidt %0" : : "m"(p));
}

void interrupt_handler(struct interrupt_frame *f)
{
	if (f->vector < 32) {
		uint64_t cr2;
		asm volatile("mov %%cr2, %0" : "=r"(cr2));
		fatal("exception %lu, error %#lx, rip %#lx, cr2 %#lx", f->vector, f->error, f->rip, cr2);
	}
	interrupts_taken[f->vector]++;
	if (f->vector == VECTOR_SERIAL)
		serial_receive_interrupt();
	if (f->vector != VECTOR_SPURIOUS)
		lapic_write(LAPIC_EOI, 0);
}
