package embedded

import (
	"strconv"
	"strings"
)

// Word is a word of the guest's command line.
type Word struct {
	Name string // one that ends with = takes a number
	Text string // the word's effect
}

// Words are all words that the guest knows, as in the table of src/main.c.
var Words = []Word{
	{"write", "write a pattern to some blocks of each disk and read it back; without it disks are only read"},
	{"journal", "with write: write numbered blocks to the first disk for ever, and print which of them were answered"},
	{"nodisk", "a machine without a disk is no failure"},
	{"movebars", "move the virtio device's memory BARs before using it, to 0xd0000000 and up"},
	{"movebars=high", "the same, but the 64-bit ones above 4 GiB: to the next GiB if they are there already, " +
		"else to 448 GiB"},
	{"bench", "measure the first disk instead of the checks: random reads of 4 KiB, and writes with write, at depths " +
		"1 to 64, by polling and by interrupt; in ring 3 where a KVM emulates kernel mode but not user mode"},
	{"sanitize", "overwrite the first disk in 31 passes, with one command that it does not wait for, and loop for ever"},
	{"bench-ms=", "each measurement takes N ms, not 300"},
	{"x2apic", "switch the boot CPU's local APIC to x2APIC mode"},
	{"crash=triple", "raise a triple fault"},
	{"crash=panic", "raise a pvpanic event, then halt for ever"},
	{"crash=reset", "reset the machine by the first method that works"},
	{"crash=reset-acpi", "reset it by ACPI alone"},
	{"crash=reset-cf9", "reset it by port 0xcf9 alone"},
	{"crash=reset-i8042", "reset it by the i8042 alone"},
	{"hang", "halt for ever with interrupts off"},
	{"spin", "loop for ever"},
	{"echo", `print "ready", then send serial input back until a q has come`},
}

// Known reports whether the guest knows a word. It ignores other words.
func Known(word string) bool {
	for _, w := range Words {
		if word == w.Name && !strings.HasSuffix(word, "=") {
			return true
		}
		if number, ok := strings.CutPrefix(word, w.Name); ok && strings.HasSuffix(w.Name, "=") {
			n, err := strconv.ParseUint(number, 10, 64)
			return err == nil && n > 0 && n <= 1_000_000
		}
	}
	return false
}
