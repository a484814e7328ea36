package kvmapi

import (
	"os"
	"testing"

	"gvm/guest-tests/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m, lab.Options{Direct: lab.KVM, CPUs: 1})) }
