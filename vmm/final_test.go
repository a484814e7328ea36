package vmm

import (
	"context"
	"testing"
	"time"

	"gvm/guestmem"
	"gvm/vmm/vmcore"
)

// TestFinalIsAlive: the end waits for Config.Final as long as that gives signs of life, also after
// the end of the context, and no longer.
func TestFinalIsAlive(t *testing.T) {
	for _, dies := range []bool{false, true} {
		over := make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		notes := make(chan string, 10)
		out, _ := script{}.powerOff().runContext(ctx, t, false, Config{
			Note: func(s string) { notes <- s },
			Final: func(_ Outcome, mem *guestmem.Memory, cpus []vmcore.CPU, alive func()) {
				cancel()
				for range 20 {
					time.Sleep(endPatience / 10)
					alive()
				}
				if dies {
					<-over
				}
			},
		})
		close(over)
		if out.Ending != PoweredOff || out.Left != dies || len(notes) != map[bool]int{true: 1}[dies] {
			t.Errorf("dies %v: %+v, %d notes", dies, out, len(notes))
		}
	}
}
