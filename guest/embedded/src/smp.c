// Starts the application processors the MADT lists (SDM volume 3, 9.4.4): INIT, start-up IPI, and a count of who arrived.
#include "guest.h"

enum { START_PAGE = 0x8000, ICR_INIT = 0x4500, ICR_STARTUP = 0x4600, WAIT_TICKS = 2 * TICKS_PER_SECOND };

extern const char ap_start[], ap_counter[], ap_end[];

static volatile uint32_t *arrived;

// wait_for_processors waits for n of them, and gives up when none has arrived for wait_ticks.
static bool wait_for_processors(unsigned n, uint32_t wait_ticks)
{
	for (unsigned spins = 0; spins < 2000; spins++) {
		if (*arrived >= n)
			return true;
		relax();
	}
	interrupts_off();
	for (uint32_t since = ticks(), seen = 0; *arrived < n && ticks() - since < wait_ticks;) {
		sleep_until_interrupt();
		if (*arrived != seen) {
			seen = *arrived;
			since = ticks();
		}
	}
	interrupts_on();
	return *arrived >= n;
}

// send_to_processors sends an IPI to each processor but this one, and returns their number.
static unsigned send_to_processors(uint32_t command)
{
	unsigned sent = 0;
	for (unsigned i = 0; i < acpi.cpus; i++) {
		uint32_t id = acpi.cpu_apic_id[i];
		if (id == apic_id)
			continue;
		if (!x2apic && id > 254) {
			if (command == ICR_INIT)
				print("cpu with APIC id %u is out of xAPIC's reach\n", id);
			continue;
		}
		send_ipi(id, command);
		sent++;
	}
	return sent;
}

// All processors start before any is waited for: a wait can take a tick.
void start_processors(void)
{
	const uint32_t startup = ICR_STARTUP | START_PAGE >> 12;
	char *page = map(START_PAGE, 4096);
	memcpy(page, ap_start, (size_t)(ap_end - ap_start));
	arrived = (volatile uint32_t *)(page + (ap_counter - ap_start));
	send_to_processors(ICR_INIT);
	unsigned started = send_to_processors(startup);
	// A second start-up IPI, as the SDM's protocol has it, for those that the first did not wake. The others ignore it.
	if (!wait_for_processors(started, 1)) {
		send_to_processors(startup);
		wait_for_processors(started, WAIT_TICKS);
	}
	print("cpus: %u of %u up, boot CPU has APIC id %u, %s mode\n", *arrived + 1, acpi.cpus ? acpi.cpus : 1, apic_id,
	      x2apic ? "x2APIC" : "xAPIC");
	if (acpi.cpus)
		check(*arrived + 1 == acpi.cpus, "every CPU of the MADT starts");
}
