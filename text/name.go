package text

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// Name is a name from outside gvm, such as a path. Linux allows any bytes in one, and JSON only
// UTF-8: each other byte becomes a surrogate, \udc80 to \udcff, as in Python (surrogateescape).
type Name string

// MarshalJSON implements json.Marshaler.
func (n Name) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	b.WriteByte('"')
	for rest := string(n); rest != ""; {
		valid := 0
		for valid < len(rest) {
			r, size := utf8.DecodeRuneInString(rest[valid:])
			if r == utf8.RuneError && size == 1 {
				break
			}
			valid += size
		}
		at := b.Len()
		if err := e.Encode(rest[:valid]); err != nil {
			return nil, err
		}
		part := bytes.Clone(b.Bytes()[at+1 : b.Len()-2]) // without the quotes and the newline
		b.Truncate(at)
		b.Write(part)
		if rest = rest[valid:]; rest != "" {
			fmt.Fprintf(&b, `\udc%02x`, rest[0])
			rest = rest[1:]
		}
	}
	b.WriteByte('"')
	return b.Bytes(), nil
}

// UnmarshalJSON implements json.Unmarshaler.
func (n *Name) UnmarshalJSON(b []byte) error {
	var all []byte
	plain := func(part []byte) error {
		var s string
		if err := json.Unmarshal(part, &s); err != nil {
			return err
		}
		all = append(all, s...)
		return nil
	}
	if len(b) < 2 || b[0] != '"' {
		if err := plain(b); err != nil || string(b) == "null" {
			return err
		}
	}
	from := 1
	for i := 1; i < len(b)-1; {
		switch u := unit(b[i:]); {
		case u >= 0xdc80 && u <= 0xdcff:
			if err := plain(fmt.Appendf(nil, `"%s"`, b[from:i])); err != nil {
				return err
			}
			all = append(all, byte(u))
			i += 6
			from = i
		case u >= 0xd800 && u < 0xdc00 && unit(b[i+6:])>>10 == 0xdc00>>10: // a pair
			i += 12
		case b[i] == '\\':
			i += 2
		default:
			i++
		}
	}
	if err := plain(fmt.Appendf(nil, `"%s"`, b[from:len(b)-1])); err != nil {
		return err
	}
	*n = Name(all)
	return nil
}

// unit returns the UTF-16 code unit of an escape \uXXXX at the start of b, or 0.
func unit(b []byte) uint64 {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return 0
	}
	u, _ := strconv.ParseUint(string(b[2:6]), 16, 16) // json has checked it
	return u
}

// Names returns the words as names.
func Names(words []string) []Name {
	var names []Name
	for _, w := range words {
		names = append(names, Name(w))
	}
	return names
}
