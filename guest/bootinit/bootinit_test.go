package bootinit

import (
	"bytes"
	"io"
	"testing"

	"github.com/cavaliergopher/cpio"

	"gvm/guest-tests/imagetest"
)

func TestProgramIsBuiltFromItsSource(t *testing.T) {
	imagetest.BuiltFromSource(t, "init", program)
}

// TestInitramfs: /init is the program and is executable. Tests that boot it check its output.
func TestInitramfs(t *testing.T) {
	archive, err := Initramfs()
	if err != nil {
		t.Fatal(err)
	}
	r := cpio.NewReader(bytes.NewReader(archive))
	h, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if h.Name != "init" || h.Mode != cpio.TypeReg|0o755 || !bytes.Equal(b, program) ||
		!bytes.Contains(b, []byte(Line+"\n")) {
		t.Errorf("%s, mode %o, %d bytes; want init, an executable file of %d bytes that has %q",
			h.Name, h.Mode, len(b), len(program), Line)
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("after /init: %v, want the archive's end", err)
	}
}
