package vmm

import (
	"context"
	"testing"

	"gvm/guestmem"
	"gvm/vmm/vmcore"
)

// TestCoreEnds: a core that sees the machine's end before cut does has the same error.
func TestCoreEnds(t *testing.T) {
	i := &Inspector{}
	p, c, stop := pausableWith(t, "spin", Config{CPUs: 2, Inspector: i})
	c.waitFor("spinning")
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	begun, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- i.Core(func() {}, func(life context.Context, _ *guestmem.Memory, cpus []vmcore.CPU) error {
			if len(cpus) != 2 {
				t.Errorf("%d CPUs", len(cpus))
			}
			close(begun)
			<-life.Done()
			return context.Cause(life)
		})
	}()
	<-begun
	stop()
	if err := <-ended; err != ErrNotRunning {
		t.Errorf("the end gives %v", err)
	}
}
