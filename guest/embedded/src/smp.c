// Starts the application processors the MADT lists (SDM volume 3, 9.4.4): INIT, start-up IPI, and a count of who arrived.
#include "guest.h"

enum { START_PAGE = 0x8000, ICR_INIT = 0x4500, ICR_STARTUP = 0x4600, WAIT_TICKS = 2 * TICKS_PER_SECOND };

extern const char ap_start[], ap_counter[], ap_end[];

static volatile uint32_t *arrived;

static bool wait_for_processors(unsigned n, uint32_t wait_ticks)
{
	for (unsigned spins = 0; spins < 2000; spins++) {
		if (*arrived >= n)
			return true;
		relax();
	}
	interrupts_off();
	for (uint32_t since = ticks(); *arrived < n && ticks() - since < wait_ticks;)
		sleep_until_interrupt();
	interrupts_on();
	return *arrived >= n;
}

void start_processors(void)
{
	unsigned started = 0;
	char *page = map(START_PAGE, 4096);
	memcpy(page, ap_start, (size_t)(ap_end - ap_start));
	arrived = (volatile uint32_t *)(page + (ap_counter - ap_start));
	for (unsigned i = 0; i < acpi.cpus; i++) {
		uint32_t id = acpi.cpu_apic_id[i];
		if (id == apic_id)
			continue;
		if (!x2apic && id > 254) {
			print("cpu with APIC id %u is out of xAPIC's reach\n", id);
			continue;
		}
		send_ipi(id, ICR_INIT);
		send_ipi(id, ICR_STARTUP | START_PAGE >> 12);
		started++;
		// A second start-up IPI for one that the first did not wake, as the SDM's protocol has it.
		if (!wait_for_processors(started, 1)) {
			send_ipi(id, ICR_STARTUP | START_PAGE >> 12);
			wait_for_processors(started, WAIT_TICKS);
		}
	}
	print("cpus: %u of %u up, boot CPU has APIC id %u, %s mode\n", *arrived + 1, acpi.cpus ? acpi.cpus : 1, apic_id,
	      x2apic ? "x2APIC" : "xAPIC");
	if (acpi.cpus)
		check(*arrived + 1 == acpi.cpus, "every CPU of the MADT starts");
}
