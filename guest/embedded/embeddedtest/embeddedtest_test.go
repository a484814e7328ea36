package embeddedtest

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

func TestParseReport(t *testing.T) {
	const passing = "gvm embedded guest\r\ncpus: 3 of 4 up, boot CPU has APIC id 0, xAPIC mode\r\n  ok   one\r\n" +
		"disk 0:0:1:2 GVM DISK 1\r\n  43 requests, 21 of them indirect, 42 notifications, 40 interrupts\r\n" +
		"  7 requests, 3 of them indirect, 7 notifications, 6 interrupts\r\nPASS\r\n"
	r, err := ParseReport(passing)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Passed || r.Checks != 1 || r.CPUs != 3 || r.CPUsListed != 4 || r.Requests != 50 || r.Indirect != 24 ||
		r.Interrupts != 46 ||
		!slices.Equal(r.Disks, []string{"0:0:1:2 GVM DISK 1"}) || r.Failures != nil {
		t.Errorf("parsed %+v", r)
	}

	r, err = ParseReport("  ok   one\n  FAIL two: 5\nFAIL: 1 of 2 checks failed\n")
	if err != nil {
		t.Fatal(err)
	}
	if r.Passed || r.Checks != 2 || !slices.Equal(r.Failures, []string{"two: 5", "1 of 2 checks failed"}) {
		t.Errorf("parsed %+v", r)
	}

	if _, err := ParseReport("  ok   one\n"); err == nil || !strings.Contains(err.Error(), "no verdict") {
		t.Errorf("a report that stops short: error %v", err)
	}
}

func TestPatternTellsPlaceAndDisk(t *testing.T) {
	got, want := Pattern(0, 0, Range{0, 8}), []byte{0x15, 0x7c, 0x4a, 0x7f, 0xb9, 0x78, 0x37, 0x9e}
	if !bytes.Equal(got, want) {
		t.Errorf("first word of 0:0 is % x, want % x", got, want)
	}
	got, want = Pattern(2, 1, Range{8, 8}), []byte{0x2a, 0xf8, 0x94, 0xfe, 0x72, 0xf1, 0x6e, 0x3e}
	if !bytes.Equal(got, want) {
		t.Errorf("second word of 2:1 is % x, want % x", got, want)
	}
}

func TestCheckDisk(t *testing.T) {
	const size = 1 << 20
	image := make([]byte, size)
	for _, r := range Written(size, 512) {
		copy(image[r.Offset:], Pattern(0, 3, r))
	}
	if err := CheckDisk(bytes.NewReader(image), size, 512, 0, 3); err != nil {
		t.Error(err)
	}
	if err := CheckDisk(bytes.NewReader(image), size, 512, 0, 2); err == nil {
		t.Error("the pattern of LUN 3 passes for that of LUN 2")
	}
	image[size-1] ^= 1
	if err := CheckDisk(bytes.NewReader(image), size, 512, 0, 3); err == nil {
		t.Error("a wrong last byte goes unseen")
	}
}
