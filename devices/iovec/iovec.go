// Package iovec works on data that is scattered over several buffers, as a guest or readv gives it.
package iovec

// Len returns the number of bytes of iov.
func Len(iov [][]byte) int {
	n := 0
	for _, p := range iov {
		n += len(p)
	}
	return n
}

// Gather fills dst from iov and returns the number of bytes copied.
func Gather(dst []byte, iov [][]byte) int {
	n := 0
	for _, p := range iov {
		n += copy(dst[n:], p)
	}
	return n
}

// Scatter copies src into iov and returns the number of bytes that fitted.
func Scatter(iov [][]byte, src []byte) int {
	n := 0
	for _, p := range iov {
		n += copy(p, src[n:])
	}
	return n
}

// Cut appends to dst the n bytes of iov that start at byte off. The range is
// inside iov.
func Cut(dst, iov [][]byte, off, n int) [][]byte {
	for _, p := range iov {
		if n == 0 {
			break
		}
		if off >= len(p) {
			off -= len(p)
			continue
		}
		q := p[off:]
		if len(q) > n {
			q = q[:n]
		}
		off = 0
		n -= len(q)
		dst = append(dst, q)
	}
	return dst
}
