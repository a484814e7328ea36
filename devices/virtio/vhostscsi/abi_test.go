package vhostscsi

import (
	"strings"
	"testing"
)

func TestABIPolicy(t *testing.T) {
	for _, c := range []struct {
		policy     ABIPolicy
		kernel     int
		note, fail string
	}{
		{ABIPolicy{}, 1, "", ""},
		{ABIPolicy{}, 2, "", "take a newer gvm"},
		{ABIPolicy{}, 0, "", "boot a newer kernel"},
		{PinABI(1), 1, "", ""},
		{PinABI(2), 2, "speaks version 2 of its interface, gvm is written for 1, and was told to go on", ""},
		{PinABI(2), 1, "", "version 2 is asked for"},
		{PinABI(0), 1, "", "version 0 is asked for"},
		{AnyABI(), 1, "", ""},
		{AnyABI(), 7, "speaks version 7 of its interface, gvm is written for 1", ""},
	} {
		note, err := c.policy.check(c.kernel)
		if (err == nil) != (c.fail == "") || err != nil && !strings.Contains(err.Error(), c.fail) {
			t.Errorf("%+v, kernel %d: %v, want %q", c.policy, c.kernel, err, c.fail)
		}
		if (note == "") != (c.note == "") || !strings.Contains(note, c.note) {
			t.Errorf("%+v, kernel %d: note %q, want %q", c.policy, c.kernel, note, c.note)
		}
	}
}
