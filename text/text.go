// Package text prepares text from a user, a file, a guest or another process for people to read.
package text

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Printable returns s with everything but graphic characters and spaces escaped: control
// characters, which a terminal obeys and XML forbids, formatting characters, which reorder a line,
// and bytes that are not UTF-8. Runes become \uXXXX (a surrogate pair past U+FFFF), so that a JSON
// text keeps its meaning; other bytes become \xXX.
func Printable(s string) string { return printable(s, "") }

func printable(s, keep string) string {
	ok := func(r rune) bool { return unicode.IsPrint(r) || strings.ContainsRune(keep, r) }
	if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !ok(r) }) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case ok(r):
			b.WriteRune(r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		i += n
	}
	return b.String()
}

// Lines is Printable for a text with its own lines and columns: it keeps newlines and tabs.
func Lines(s string) string { return printable(s, "\n\t") }

// NewWriter returns a writer of Lines to w, for output that has foreign text anywhere. A single
// Write has whole characters.
func NewWriter(w io.Writer) io.Writer { return writer{w} }

type writer struct{ w io.Writer }

func (w writer) Write(p []byte) (int, error) {
	if _, err := io.WriteString(w.w, Lines(string(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Nearest returns the name that word probably stands for: one that it is a prefix of, or that
// differs from it by a few letters. It returns "" if none is near.
func Nearest(word string, names []string) string {
	word = strings.ToLower(word)
	if len(word) < 2 || len(word) > 64 {
		return ""
	}
	best, least := "", 2*max(1, (len(word)+1)/3)+2
	byLength := func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) }
	for _, name := range slices.SortedFunc(slices.Values(names), byLength) {
		d := 2 * distance(word, strings.ToLower(name))
		if strings.HasPrefix(strings.ToLower(name), word) {
			d = min(d-1, 3) // between one letter and two, and before another with as many changes
		} else if name != "" && name[0]|0x20 != word[0] {
			d++ // the first letter is rarely wrong
		}
		if d < least && len(name) > 1 {
			best, least = name, d
		}
	}
	return best
}

// distance counts the letters to insert, delete, replace or exchange with their neighbor to turn a
// into b (optimal string alignment).
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			replace := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				replace++
			}
			rows[i][j] = min(replace, rows[i-1][j]+1, rows[i][j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

// Suggest returns "; did you mean x?", or "" if no name is near.
func Suggest(word string, names []string) string {
	if near := Nearest(word, names); near != "" {
		return "; did you mean " + near + "?"
	}
	return ""
}
