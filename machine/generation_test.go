package machine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"gvm/guestmem"
)

// TestGenerationID: each machine has an ID of its own, which its guest finds in memory and which
// stays over a reset.
func TestGenerationID(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const at = 0xe_0080 // TestRecompile of vmm/acpi has it in ADDR
	var guest steps
	for i := range uint32(16) {
		guest = append(guest, step{opPrint, at + i, 0})
	}
	seen := map[string]bool{}
	for range 2 {
		out, in := io.Pipe()
		m, err := Start(ctx, Spec{Memory: guestmem.Config{Size: 64 << 20}, Console: Output(in), BareCmdLine: true,
			Kernel: guest.kernel(t)})
		if err != nil {
			t.Fatal(err)
		}
		console := bufio.NewReader(out)
		for life := range 2 {
			id := make([]byte, 16)
			if _, err := io.ReadFull(console, id); err != nil {
				t.Fatal(err)
			}
			if n, err := m.Inspect(ctx, "generation_id"); err != nil || n.Value != fmt.Sprintf("%x", id) {
				t.Errorf("life %d: %v, %v, and the guest has %x", life, n.Value, err, id)
			}
			if seen[string(id)] != (life > 0) || string(id) == string(make([]byte, 16)) {
				t.Errorf("life %d: %x", life, id)
			}
			seen[string(id)] = true
			if life == 0 {
				if err := m.Reset(); err != nil {
					t.Error(err)
				}
			}
		}
		go io.Copy(io.Discard, out) // ends with in
		m.Stop(errors.New("enough"), 0)
		if _, err := m.Wait(); err != nil {
			t.Error(err)
		}
		in.Close()
	}
}
