// COM1, a 16550A: polled output, interrupt-driven input. Short text: each byte is a VM exit.
#include "guest.h"

enum {
	COM1 = 0x3f8, COM1_IRQ = 4,
	DATA = COM1, IER = COM1 + 1, IIR_FCR = COM1 + 2, LCR = COM1 + 3, MCR = COM1 + 4, LSR = COM1 + 5,
	LSR_DATA_READY = 1, LSR_THR_EMPTY = 0x20,
};

static unsigned fifo_depth = 1, fifo_room;
static volatile uint8_t received[256];
static volatile uint8_t received_head; // written by the interrupt handler
static uint8_t received_tail;

void serial_init(void)
{
	out8(IER, 0);
	out8(LCR, 0x80); // divisor latch
	out8(DATA, 1);   // 115200 baud
	out8(IER, 0);
	out8(LCR, 3);    // 8N1
	out8(IIR_FCR, 1);
	out8(MCR, 0xb);  // DTR, RTS, OUT2 (lets the interrupt out)
	if ((in8(IIR_FCR) & 0xc0) == 0xc0)
		fifo_depth = 16;
}

static void put(char c)
{
	// An empty holding register means an empty FIFO: as many bytes as it holds may follow without another look.
	if (fifo_room == 0) {
		for (unsigned spins = 0; !(in8(LSR) & LSR_THR_EMPTY) && spins < 100000; spins++)
			relax();
		fifo_room = fifo_depth;
	}
	fifo_room--;
	out8(DATA, (uint8_t)c);
}

void serial_write(const void *data, size_t n)
{
	for (const char *p = data; n--; p++) {
		if (*p == '\n')
			put('\r');
		put(*p);
	}
}

static void put_number(uint64_t v, unsigned base, unsigned width, char pad)
{
	char digits[24];
	unsigned n = 0;
	do {
		digits[n++] = "0123456789abcdef"[base == 16 ? v & 15 : v % 10];
		v = base == 16 ? v >> 4 : v / 10;
	} while (v);
	for (; width > n; width--)
		put(pad);
	while (n)
		put(digits[--n]);
}

// vprint knows %s %c %u %x with l, 0, #, a width, and %.*s.
void vprint(const char *f, va_list args)
{
	for (; *f; f++) {
		if (*f != '%') {
			serial_write(f, 1);
			continue;
		}
		unsigned width = 0, wide = 0, limit = ~0u;
		char pad = ' ';
		f++;
		if (*f == '#') {
			serial_write("0x", 2);
			f++;
		}
		if (*f == '0')
			pad = *f++;
		for (; *f >= '0' && *f <= '9'; f++)
			width = width * 10 + (unsigned)(*f - '0');
		if (*f == '.') {
			limit = va_arg(args, unsigned);
			f += 2;
		}
		if (*f == 'l') {
			wide = 1;
			f++;
		}
		if (*f == 's') {
			const char *s = va_arg(args, const char *);
			for (; *s && limit; s++, limit--)
				serial_write(s, 1);
		} else if (*f == 'c') {
			put((char)va_arg(args, int));
		} else {
			put_number(wide ? va_arg(args, uint64_t) : va_arg(args, uint32_t), *f == 'x' ? 16 : 10, width, pad);
		}
	}
}

void print(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	vprint(format, args);
	va_end(args);
}

void serial_receive_interrupt(void)
{
	in8(IIR_FCR);
	while (in8(LSR) & LSR_DATA_READY)
		received[received_head++] = in8(DATA);
}

unsigned serial_echo(void)
{
	unsigned count = 0;
	if (!ioapic_route(COM1_IRQ, VECTOR_SERIAL))
		fatal("no I/O APIC to take the serial interrupt");
	out8(IER, 1); // received data available
	print("ready\n");
	for (;;) {
		interrupts_off();
		while (received_tail == received_head)
			sleep_until_interrupt();
		uint8_t byte = received[received_tail++];
		interrupts_on();
		put((char)byte);
		count++;
		if (byte == 'q')
			break;
	}
	out8(IER, 0);
	print("\n");
	return count;
}
