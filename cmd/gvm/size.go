package main

import (
	"fmt"
	"strconv"
	"strings"
)

// maxSize is the largest size that parseSize takes.
const maxSize = 1 << 62

// parseSize reads a size such as 512M, 1.5G or 8GiB: suffixes K, M, G and T are
// powers of 1024. A number without a suffix counts units of unit bytes.
func parseSize(s string, unit uint64) (uint64, error) {
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
		if whole > maxSize/scale {
			return 0, tooLarge(s)
		}
		return whole * scale, nil
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || !(f >= 0) || strings.ContainsAny(num, "xXeEpPnN_") {
		return 0, badSize(s, num)
	}
	if f *= float64(scale); f > maxSize {
		return 0, tooLarge(s)
	}
	return uint64(f), nil
}

func tooLarge(s string) error {
	return fmt.Errorf("size %q is too large: the largest is %s", s, sizeWord(maxSize))
}

// badSize says what a size is. One in petabytes is given in terabytes.
func badSize(s, num string) error {
	such := ""
	if number, ok := strings.CutSuffix(num, "P"); ok {
		if f, err := strconv.ParseFloat(number, 64); err == nil && f > 0 && f < 1<<20 {
			such = fmt.Sprintf(", such as %gT; the largest is %s", 1024*f, sizeWord(maxSize))
		}
	}
	return fmt.Errorf("size %q: want a number and K, M, G or T%s", s, such)
}

// diskSize reads the size of a disk; names is what messages call it.
func diskSize(names, word string) (int64, error) {
	n, err := parseSize(word, 1)
	switch {
	case err != nil:
		return 0, usageError{fmt.Errorf("%s: %w", names, err)}
	case n == 0:
		return 0, usageError{fmt.Errorf("%s: size %s: want 512 bytes or more", names, word)}
	}
	return int64(n), nil
}

// count writes a number of things.
func count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}

// sizeWord writes a size as parseSize takes it.
func sizeWord(n uint64) string {
	number, unit, _ := strings.Cut(formatSize(n), " ")
	return number + strings.TrimSuffix(strings.TrimSuffix(unit, "bytes"), "iB")
}

// formatSize writes a size with the largest suffix that leaves it whole.
func formatSize(n uint64) string {
	for i := 3; i >= 0; i-- {
		if scale := uint64(1) << (10 * (1 + i)); n >= scale && n%scale == 0 {
			return fmt.Sprintf("%d %ciB", n/scale, "KMGT"[i])
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
