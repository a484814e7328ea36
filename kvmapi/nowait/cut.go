package nowait

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// IsCut reports whether err, of a read or a write, means that the other end has closed the
// connection. Which of these errors comes depends on the work that was under way.
func IsCut(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) ||
		errors.Is(err, unix.EPIPE)
}
