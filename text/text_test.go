package text

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestPrintable(t *testing.T) {
	for s, want := range map[string]string{
		"":                       "",
		"disk 1, größe 日本":       "disk 1, größe 日本",
		"\x1b]0;x\x07":           `\u001b]0;x\u0007`,
		"a\nb\tc\rd\x7f":         `a\u000ab\u0009c\u000dd\u007f`,
		"\u009b31m":              `\u009b31m`,
		"\x9b31m":                `\x9b31m`,
		"\xff\xc3":               `\xff\xc3`,
		"\u202egnp.exe":          `\u202egnp.exe`,
		"\U000e0041\ufffe\u200b": `\udb40\udc41\ufffe\u200b`,
		"\ufffd":                 "\ufffd",
	} {
		if got := Printable(s); got != want {
			t.Errorf("%q becomes %s, want %s", s, got, want)
		}
	}
}

// TestWriter: JSON keeps its meaning in the writer, and lines stay lines.
func TestWriter(t *testing.T) {
	const s = "a\u009b\u202e\U000e0041\x7f\x1b\x00"
	in, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if n, err := NewWriter(&b).Write(in); err != nil || n != len(in) {
		t.Fatal(n, err)
	}
	var out string
	if err := json.Unmarshal(b.Bytes(), &out); err != nil || out != s ||
		strings.ContainsFunc(b.String(), unicode.IsControl) {
		t.Errorf("%q becomes %q: %v", in, &b, err)
	}
	b.Reset()
	if _, err := NewWriter(&b).Write([]byte("a\tb\nc\r\n")); err != nil || b.String() != "a\tb\nc\\u000d\n" {
		t.Errorf("%q, %v", &b, err)
	}
}

// FuzzPrintable: any text becomes printable, and stays as it is the second time.
func FuzzPrintable(f *testing.F) {
	f.Add("\x1b[31m")
	f.Fuzz(func(t *testing.T, s string) {
		p := Printable(s)
		if !utf8.ValidString(p) || strings.ContainsFunc(p, func(r rune) bool { return !unicode.IsPrint(r) }) ||
			Printable(p) != p {
			t.Errorf("%q becomes %q", s, p)
		}
	})
}

func TestNearest(t *testing.T) {
	names := []string{"memory", "name", "cpus", "cpu-features", "disk", "run", "list", "remove", "resize", "k"}
	for word, want := range map[string]string{
		"memroy": "memory", "mem": "memory", "MEMORY": "memory", "cpu": "cpus", "rnu": "run", "lst": "list",
		"resiez": "resize", "nam": "name", "xyzzy": "", "": "", "-": "", strings.Repeat("x", 1<<20): "",
	} {
		if got := Nearest(word, names); got != want {
			t.Errorf("%.20q is near %q, want %q", word, got, want)
		}
	}
}
