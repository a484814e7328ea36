package lio

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/guest-tests/lab"
)

// TestMain has the tests run where there is a vhost-scsi and a LIO to set up:
// here, or in the lab, on Debian's own and its 6.12 kernel one after the other.
// GVM_TEST_L1 takes one kernel alone.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
	}
	run := &once{M: m}
	options := lab.Options{Direct: canProvision, Modules: []string{"tcm_loop", "sd_mod"}}
	code := 0
	kernels := []string{"debian", "6.12"}
	if k := os.Getenv(lab.KernelEnv); k != "" {
		kernels = []string{k}
	}
	for _, options.Kernel = range kernels {
		if code == 0 && !run.done {
			code = lab.Main(run, options)
		}
	}
	os.Exit(code)
}

// once remembers that the tests have run in this process.
type once struct {
	*testing.M
	done bool
}

func (o *once) Run() int { o.done = true; return o.M.Run() }

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
