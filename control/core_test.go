package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestCore: the parts of a core arrive in their places, and its end with the release.
func TestCore(t *testing.T) {
	f := newFake()
	_, c := serve(t, f)
	_, _, err := c.Core(t.Context(), nil)
	wantError(t, err, http.StatusConflict, "a dump is under way")
	large := bytes.Repeat([]byte("gvm"), maxCoreData)
	var b bytes.Buffer
	err = errors.Join(PutCore(&b, 0, []byte("head")), PutCore(&b, 4096, large), EndCore(&b, 1<<40, "6.1.0"))
	if err != nil {
		t.Fatal(err)
	}
	whole := b.String()
	got := map[int64]string{}
	put := func(off int64, p []byte) error { got[off] = string(p); return nil }
	f.core = io.NopCloser(strings.NewReader(whole))
	size, release, err := c.Core(t.Context(), put)
	if err != nil || size != 1<<40 || release != "6.1.0" || len(got) != 4 || got[0] != "head" ||
		got[4096]+got[4096+maxCoreData]+got[4096+2*maxCoreData] != string(large) {
		t.Errorf("%d bytes, %q, %v, %d parts", size, release, err, len(got))
	}
	for in, want := range map[string]string{
		"":            "machine vm ended before its dump was complete",
		whole[:100]:   "machine vm ended before its dump was complete",
		whole[21:]:    "machine vm sends a dump that this gvm does not understand",
		whole + whole: "", // a long release
	} {
		f.core = io.NopCloser(strings.NewReader(in))
		if _, release, err := c.Core(t.Context(), put); len(release) > maxCoreRelease || (err == nil) != (want == "") ||
			err != nil && err.Error() != want {
			t.Errorf("%d bytes: %v", len(in), err)
		}
	}
	full := errors.New("no space")
	f.core = io.NopCloser(strings.NewReader(whole))
	if _, _, err := c.Core(t.Context(), func(int64, []byte) error { return full }); err != full {
		t.Errorf("put fails: %v", err)
	}
	stalled, _ := io.Pipe()
	f.core = stalled
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(full)
	if _, _, err := c.Core(ctx, put); err != full {
		t.Errorf("cancelled: %v", err)
	}
}
