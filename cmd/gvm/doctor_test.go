package main

import (
	"fmt"
	"strings"
	"testing"
)

func TestDoctorOrphans(t *testing.T) {
	const want = "this host's KVM offers avx, avx2 without xsave: guests do not see them; " +
		"where this host is a virtual machine, correct its processor"
	if got := orphans([]string{"avx", "avx2"}, []string{"xsave"}); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestDoctorJail: gvm doctor has lines about a jail on each host, and none of them is a FAIL.
func TestDoctorJail(t *testing.T) {
	var lines []string
	doctorJail(func(kind, format string, args ...any) {
		lines = append(lines, kind+" "+fmt.Sprintf(format, args...))
	})
	for _, l := range lines {
		if !strings.HasPrefix(l, "ok jail: ") && !strings.HasPrefix(l, "note jail: ") {
			t.Errorf("line %q", l)
		}
	}
	if len(lines) == 0 {
		t.Error("no line")
	}
}
