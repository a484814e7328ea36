package text

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// MaxSize is the largest size that ParseSize takes, in bytes.
const MaxSize = 1 << 62

// ParseSize reads a size such as 512M, 1.5G or 8GiB: suffixes K, M, G and T are
// powers of 1024. A number without a suffix counts units of unit bytes.
func ParseSize(s string, unit uint64) (uint64, error) {
	num := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(s), "B"), "I")
	scale := unit
	if i := strings.IndexAny(num, "KMGT"); i >= 0 && i == len(num)-1 {
		scale = 1 << (10 * (1 + strings.IndexByte("KMGT", num[i])))
		num = num[:i]
	} else if num != s {
		return 0, badSize(s, num)
	}
	whole, err := strconv.ParseUint(num, 10, 64)
	if err == nil {
		if whole > MaxSize/scale {
			return 0, tooLarge(s)
		}
		return whole * scale, nil
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || !(f >= 0) || strings.ContainsAny(num, "xXeEpPnN_") {
		return 0, badSize(s, num)
	}
	if f *= float64(scale); f > MaxSize {
		return 0, tooLarge(s)
	}
	return uint64(f), nil
}

// SizeError is the error of ParseSize.
type SizeError struct {
	Word string // the input
	Why  string // the mistake, or the expected form
}

func (e *SizeError) Error() string { return fmt.Sprintf("size %q: %s", e.Word, e.Why) }

func tooLarge(s string) error {
	return &SizeError{s, "too large: the largest is " + SizeWord(MaxSize)}
}

// badSize explains the form of a size, and gives one in petabytes in terabytes.
func badSize(s, num string) error {
	such := ""
	if number, ok := strings.CutSuffix(num, "P"); ok {
		if f, err := strconv.ParseFloat(number, 64); err == nil && f > 0 && f <= MaxSize>>50 {
			such = fmt.Sprintf(", such as %sT; the largest is %s", strconv.FormatFloat(1024*f, 'f', -1, 64),
				SizeWord(MaxSize))
		}
	}
	return &SizeError{s, "want a number and K, M, G or T" + such}
}

// Count formats a number of things.
func Count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}

// SizeWord formats a size as ParseSize takes it.
func SizeWord(n uint64) string {
	number, unit, _ := strings.Cut(FormatSize(n), " ")
	return number + strings.TrimSuffix(strings.TrimSuffix(unit, "bytes"), "iB")
}

// FormatSize formats a size with the largest suffix that leaves it whole.
func FormatSize(n uint64) string {
	for i := 3; i >= 0; i-- {
		if scale := uint64(1) << (10 * (1 + i)); n >= scale && n%scale == 0 {
			return fmt.Sprintf("%d %ciB", n/scale, "KMGT"[i])
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

// Word returns a word for a message: in quotes if it is empty or would not stand as one.
func Word(s string) string {
	if s == "" || strings.ContainsRune(s, ' ') || Printable(s) != s {
		return strconv.Quote(s)
	}
	return s
}

// Unknown is the error for an unknown word. It suggests the nearest name, and names the page of
// help with the names, such as " run".
func Unknown(thing, near, page string) error {
	if near != "" {
		return fmt.Errorf("unknown %s; did you mean %s? See gvm help%s", thing, near, page)
	}
	return fmt.Errorf("unknown %s; see gvm help%s", thing, page)
}

// OneOf returns the error, prefixed with what, for a value that is not a key of values.
func OneOf[V any](what, value string, values map[string]V) error {
	return OneOfNames(what, value, slices.Sorted(maps.Keys(values)))
}

// OneOfNames is OneOf for a list of names.
func OneOfNames(what, value string, names []string) error {
	last := len(names) - 1
	near := Suggest(strings.Trim(value, `"`), names)
	return fmt.Errorf("%s%s: want %s or %s%s", what, Word(value), strings.Join(names[:last], ", "), names[last], near)
}
