package lio

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/guest-tests/lab"
)

// TestMain has the tests run where there is a vhost-scsi and a LIO to set up: here, or in the lab.
// GVM_TEST_L1=6.12 takes Debian's 6.12 kernel for the lab.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
	}
	os.Exit(lab.Main(m, lab.Options{Direct: canProvision, Modules: []string{"tcm_loop", "sd_mod"}}))
}

// canProvision reports whether this machine has the features that the tests of the kernel need.
func canProvision() (bool, string) {
	for _, p := range []string{filepath.Join(DefaultRoot, core), "/sys/module/vhost_scsi", "/sys/module/tcm_loop",
		"/dev/loop-control"} {
		if err := unix.Access(p, unix.R_OK); err != nil {
			return false, fmt.Sprintf("%s: %v", p, err)
		}
	}
	if err := unix.Access(filepath.Join(DefaultRoot, core), unix.W_OK); err != nil {
		return false, fmt.Sprintf("%s: %v", DefaultRoot, err)
	}
	return true, "vhost-scsi and LIO are here"
}
