package usernet

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// closed is an endpoint that has data to send to a guest, which answers a number of times.
type closed struct {
	tcpip.Endpoint
	stats   tcp.Stats
	answers uint64
	aborted bool
}

func (c *closed) Stats() tcpip.EndpointStats { return &c.stats }
func (c *closed) Abort()                     { c.aborted = true }

func (c *closed) State() uint32 {
	if c.answers > 0 && c.stats.SegmentsReceived.Value() == c.answers {
		return uint32(tcp.StateClose)
	}
	return uint32(tcp.StateLastAck)
}

// TestDrain: a guest that takes the end of its data slowly gets all of it, and one that does not
// answer is not waited for.
func TestDrain(t *testing.T) {
	for _, answers := range []uint64{0, 20} {
		synctest.Test(t, func(t *testing.T) {
			c := &closed{answers: answers}
			go func() {
				for range answers {
					time.Sleep(silence / 2)
					c.stats.SegmentsReceived.Increment()
				}
			}()
			n := network{ctx: context.Background()}
			n.drain(c)
			if c.aborted != (answers == 0) {
				t.Errorf("%d answers: aborted: %v", answers, c.aborted)
			}
		})
	}
}
