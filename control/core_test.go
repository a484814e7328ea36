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

// FuzzCore: the parts of a core come in ascending order and are those that were sent, and nothing
// else is read.
func FuzzCore(f *testing.F) {
	var b bytes.Buffer
	if err := errors.Join(PutCore(&b, 0, []byte("head")), PutCore(&b, 4096, []byte("page")),
		EndCore(&b, 1<<40, "6.1.0")); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:30])
	f.Add(b.Bytes()[20:])
	f.Add(append(coreHead(-1, 1), 0))
	f.Add(append(coreHead(1<<63-1, 1), 0))
	f.Add(append(coreHead(0, maxCoreData+1), make([]byte, 64)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		var sent bytes.Buffer
		end := int64(0)
		c := &Client{name: "vm"}
		size, release, err := c.readCore(bytes.NewReader(b), func(off int64, p []byte) error {
			if off < end || len(p) == 0 || len(p) > maxCoreData || off+int64(len(p)) < off {
				t.Errorf("%d bytes at %d, behind %d", len(p), off, end)
			}
			end = off + int64(len(p))
			return PutCore(&sent, off, p)
		})
		if err == nil {
			err = EndCore(&sent, size, release)
			if size < end || len(release) > maxCoreRelease || err != nil {
				t.Errorf("%d bytes for %d, %q, %v", size, end, release, err)
			}
		} else if size != 0 || release != "" {
			t.Errorf("%d bytes, %q and the error %v", size, release, err)
		}
		if !bytes.HasPrefix(b, sent.Bytes()) {
			t.Errorf("%q is read of %q", sent.Bytes(), b)
		}
	})
}
