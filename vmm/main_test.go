package vmm

import (
	"os"
	"regexp"
	"testing"

	"gvm/guest-tests/lab"
)

// lost matches a failed test whose guest of many CPUs was lost by the lab: see README.md of package
// lab.
var lost = regexp.MustCompile(`KVM_EXIT_SHUTDOWN`)

func TestMain(m *testing.M) { os.Exit(lab.Main(m, lab.Options{Direct: lab.KVM, CPUs: 1, Lost: lost})) }
