package main

import (
	"fmt"
	"strconv"
	"strings"
)

// parseSize reads a size such as 512M, 1.5G or 8GiB: suffixes K, M, G and T are
// powers of 1024. A number without a suffix counts units of unit bytes.
func parseSize(s string, unit uint64) (uint64, error) {
	num := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(s), "B"), "I")
	scale := unit
	if i := strings.IndexAny(num, "KMGT"); i >= 0 && i == len(num)-1 {
		scale = 1 << (10 * (1 + strings.IndexByte("KMGT", num[i])))
		num = num[:i]
	} else if num != s {
		return 0, fmt.Errorf("size %q: want a number and K, M, G or T", s)
	}
	whole, err := strconv.ParseUint(num, 10, 64)
	if err == nil {
		if whole > (1<<62)/scale {
			return 0, fmt.Errorf("size %q is too large", s)
		}
		return whole * scale, nil
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || !(f >= 0) || strings.ContainsAny(num, "xXeEpPnN_") {
		return 0, fmt.Errorf("size %q: want a number and K, M, G or T", s)
	}
	if f *= float64(scale); f > 1<<62 {
		return 0, fmt.Errorf("size %q is too large", s)
	}
	return uint64(f), nil
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
