// The instructions that C has no words for. Device registers are reached by plain single moves, which every emulator knows.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline void out8(uint16_t port, uint8_t v) { asm volatile("outb %0, %1" : : "a"(v), "Nd"(port) : "memory"); }
static inline void out16(uint16_t port, uint16_t v) { asm volatile("outw %0, %1" : : "a"(v), "Nd"(port) : "memory"); }
static inline void out32(uint16_t port, uint32_t v) { asm volatile("outl %0, %1" : : "a"(v), "Nd"(port) : "memory"); }
static inline uint8_t in8(uint16_t port) { uint8_t v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
static inline uint16_t in16(uint16_t port) { uint16_t v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
static inline uint32_t in32(uint16_t port) { uint32_t v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }

static inline uint8_t read8(const volatile void *p) { uint8_t v; asm volatile("movb (%1), %0" : "=r"(v) : "r"(p) : "memory"); return v; }
static inline uint16_t read16(const volatile void *p) { uint16_t v; asm volatile("movw (%1), %0" : "=r"(v) : "r"(p) : "memory"); return v; }
static inline uint32_t read32(const volatile void *p) { uint32_t v; asm volatile("movl (%1), %0" : "=r"(v) : "r"(p) : "memory"); return v; }
static inline void write8(volatile void *p, uint8_t v) { asm volatile("movb %0, (%1)" : : "r"(v), "r"(p) : "memory"); }
static inline void write16(volatile void *p, uint16_t v) { asm volatile("movw %0, (%1)" : : "r"(v), "r"(p) : "memory"); }
static inline void write32(volatile void *p, uint32_t v) { asm volatile("movl %0, (%1)" : : "r"(v), "r"(p) : "memory"); }

static inline uint64_t read_msr(uint32_t msr)
{
	uint32_t lo, hi;
	asm volatile("rdmsr" : "=a"(lo), "=d"(hi) : "c"(msr));
	return (uint64_t)hi << 32 | lo;
}

static inline void write_msr(uint32_t msr, uint64_t v)
{
	asm volatile("wrmsr" : : "a"((uint32_t)v), "d"((uint32_t)(v >> 32)), "c"(msr) : "memory");
}

static inline uint64_t read_tsc(void)
{
	uint32_t lo, hi;
	asm volatile("rdtsc" : "=a"(lo), "=d"(hi) : : "memory");
	return (uint64_t)hi << 32 | lo;
}

struct cpuid { uint32_t eax, ebx, ecx, edx; };

static inline struct cpuid cpuid(uint32_t leaf)
{
	struct cpuid r;
	asm volatile("cpuid" : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx) : "a"(leaf), "c"(0));
	return r;
}

static inline void interrupts_off(void) { asm volatile("cli" : : : "memory"); }
static inline void interrupts_on(void) { asm volatile("sti" : : : "memory"); }
// Interrupts are taken from the hlt on, not before it, so no wake-up falls between the caller's check and the sleep.
static inline void sleep_until_interrupt(void) { asm volatile("sti; hlt; cli" : : : "memory"); }
static inline void relax(void) { asm volatile("pause" : : : "memory"); }
// x86 keeps every order but store-then-load; a locked operation gives that too (and is emulated where mfence is not).
static inline void full_barrier(void) { asm volatile("lock; addl $0, (%%rsp)" : : : "memory", "cc"); }
static inline void compiler_barrier(void) { asm volatile("" : : : "memory"); }

// Loads and stores of unaligned little-endian (le) and big-endian (be) fields, as tables and CDBs have them.
static inline uint16_t le16(const void *p) { uint16_t v; __builtin_memcpy(&v, p, 2); return v; }
static inline uint32_t le32(const void *p) { uint32_t v; __builtin_memcpy(&v, p, 4); return v; }
static inline uint64_t le64(const void *p) { uint64_t v; __builtin_memcpy(&v, p, 8); return v; }
static inline uint32_t be32(const void *p) { return __builtin_bswap32(le32(p)); }
static inline uint64_t be64(const void *p) { return __builtin_bswap64(le64(p)); }
static inline void put_be16(void *p, uint16_t v) { v = (uint16_t)(v << 8 | v >> 8); __builtin_memcpy(p, &v, 2); }
static inline void put_be32(void *p, uint32_t v) { v = __builtin_bswap32(v); __builtin_memcpy(p, &v, 4); }
static inline void put_be64(void *p, uint64_t v) { v = __builtin_bswap64(v); __builtin_memcpy(p, &v, 8); }
