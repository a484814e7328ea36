package text

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestName: any bytes survive JSON, and valid UTF-8 is encoded as itself.
func TestName(t *testing.T) {
	for s, want := range map[string]string{
		"":                         `""`,
		"disk.img":                 `"disk.img"`,
		"\xff":                     `"\udcff"`,
		"a\xe4b":                   `"a\udce4b"`,
		"\xe4\xb8":                 `"\udce4\udcb8"`, // the beginning of 一
		"一\xff\"\\<\n😀":            `"一\udcff\"\\<\n😀"`,
		`\udcff`:                   `"\\udcff"`,
		"\xed\xb3\xbf":             `"\udced\udcb3\udcbf"`, // U+DCFF, which is not valid UTF-8
		"\ufffd":                   `"` + "\ufffd" + `"`,
		strings.Repeat("é\xe9", 3): `"é\udce9é\udce9é\udce9"`,
	} {
		b, err := Name(s).MarshalJSON()
		if err != nil || string(b) != want {
			t.Errorf("%q is %s, %v; want %s", s, b, err, want)
		}
		var got Name
		if err := json.Unmarshal(b, &got); err != nil || string(got) != s {
			t.Errorf("%s is %q, %v; want %q", b, got, err, s)
		}
	}
	for in, want := range map[string]Name{`"\ud83d\udcff"`: "\U0001f4ff", `"\uDCFF"`: "\xff",
		`"\ud83dx\udc7f"`: "\ufffdx\ufffd", `null`: "was", `"\u00e9"`: "é"} {
		got := Name("was")
		if err := json.Unmarshal([]byte(in), &got); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", in, got, err, want)
		}
	}
	var got Name
	if err := json.Unmarshal([]byte("7"), &got); err == nil {
		t.Errorf("7 is %q", got)
	}
}

// FuzzName: any name comes back from JSON, and readers that do not know Name can read it.
func FuzzName(f *testing.F) {
	f.Add("a\xff😀\\udcff")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := json.Marshal(Name(s))
		if err != nil || !json.Valid(b) || !utf8.Valid(b) {
			t.Fatalf("%q is %s, %v", s, b, err)
		}
		var got Name
		if err := json.Unmarshal(b, &got); err != nil || string(got) != s {
			t.Errorf("%s is %q, %v; want %q", b, got, err, s)
		}
		var plain string // for a reader that does not know Name
		if err := json.Unmarshal(b, &plain); err != nil || utf8.ValidString(s) && plain != s {
			t.Errorf("%s is %q, %v; want %q", b, plain, err, s)
		}
	})
}
