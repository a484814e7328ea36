package main

import "testing"

func TestDoctorOrphans(t *testing.T) {
	const want = "this host's KVM offers avx, avx2 without xsave: guests do not see them; " +
		"where this host is a virtual machine, correct its processor"
	if got := orphans([]string{"avx", "avx2"}, []string{"xsave"}); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
