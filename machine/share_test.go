package machine

import (
	"strings"
	"testing"

	"gvm/devices/virtio/fs"
	"gvm/guestmem"
)

// TestShares: mistakes in shares are the user's, and a guest runs beside them.
func TestShares(t *testing.T) {
	dir := t.TempDir()
	for want, shares := range map[string][]fs.Share{
		"two shares have the tag a; give each its own":              {{Tag: "a", Dir: dir}, {Tag: "a", Dir: "/"}},
		"share a: /none: no such file or directory; check the path": {{Tag: "b", Dir: dir}, {Tag: "a", Dir: "/none"}},
		`tag "": want 1 to 36 bytes`:                                {{Dir: dir}},
		"share a: /proc: it shows the state of the kernel":          {{Tag: "a", Dir: "/proc"}},
		"": {{Tag: "a", Dir: dir}, {Tag: "b", Dir: "/", ReadOnly: true}},
	} {
		m, err := Start(t.Context(), Spec{Memory: guestmem.Config{Size: 64 << 20}, Shares: shares})
		if err != nil {
			if want == "" || !IsConfig(err) || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%v, want %s", err, want)
			}
			continue
		}
		if want != "" {
			t.Errorf("no error, want %s", want)
		}
		if _, err := m.Wait(); err != nil {
			t.Error(err)
		}
	}
}
