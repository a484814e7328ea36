package text

import (
	"strconv"
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for _, tt := range []struct {
		s    string
		want uint64 // of unit 1024
		bad  string // part of the error
	}{
		{"0", 0, ""}, {"1", 1024, ""}, {"512", 512 << 10, ""},
		{"1K", 1 << 10, ""}, {"2k", 2 << 10, ""}, {"3KB", 3 << 10, ""}, {"4KiB", 4 << 10, ""},
		{"5M", 5 << 20, ""}, {"6g", 6 << 30, ""}, {"7T", 7 << 40, ""}, {"8tib", 8 << 40, ""},
		{"1.5G", 3 << 29, ""}, {"0.25", 256, ""}, {".5M", 1 << 19, ""},
		{"4194304T", 1 << 62, ""},
		{"4194305T", 0, "too large"}, {"8388608T", 0, "too large"}, {"16777216T", 0, "too large"},
		{"18446744073709551615", 0, "too large"},
		{"99999999999999999999", 0, "too large"}, {"4194304.5T", 0, "too large"},
		{"", 0, "want a number"}, {"K", 0, "want a number"}, {"B", 0, "want a number"}, {"5B", 0, "want a number"},
		{"5iB", 0, "want a number"},
		{"-1", 0, "want a number"}, {"-1.5M", 0, "want a number"}, {"1 M", 0, "want a number"}, {"1MM", 0, "want a number"},
		{"M1", 0, "want a number"},
		{"1E3", 0, "want a number"}, {"1e3", 0, "want a number"}, {"0x10", 0, "want a number"},
		{"0X10", 0, "want a number"}, {"1_000", 0, "want a number"},
		{"INF", 0, "want a number"}, {"NaN", 0, "want a number"}, {"1P", 0, "want a number"}, {"١", 0, "want a number"},
	} {
		got, err := ParseSize(tt.s, 1024)
		if tt.bad == "" && (err != nil || got != tt.want) {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", tt.s, got, err, tt.want)
		}
		if tt.bad != "" && (err == nil || !strings.Contains(err.Error(), tt.bad) ||
			!strings.Contains(err.Error(), strconv.Quote(tt.s))) {
			t.Errorf("ParseSize(%q) = %d, %v, want an error with %q", tt.s, got, err, tt.bad)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 bytes", 1000: "1000 bytes", 1 << 10: "1 KiB", 3 << 19: "1536 KiB",
		512 << 20: "512 MiB", 5 << 30: "5 GiB", 2 << 40: "2 TiB"} {
		if got := FormatSize(n); got != want {
			t.Errorf("FormatSize(%d) = %q, want %q", n, got, want)
		}
	}
}
