package nowait

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// createError is an error with a text of its own.
type createError struct {
	text string
	err  error
}

func (e *createError) Error() string { return e.text }
func (e *createError) Unwrap() error { return e.err }

// CreateError makes of err, from an attempt to make the file at path, one that names the path, the
// reason and the mend.
func CreateError(path string, err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		err = pe.Err
	}
	text := fmt.Sprintf("%s: %v", path, err)
	target, linkErr := os.Readlink(path)
	_, fileErr := os.Stat(path)
	dir := filepath.Dir(path)
	_, dirErr := os.Stat(dir)
	switch {
	case linkErr == nil && errors.Is(fileErr, fs.ErrNotExist):
		text = fmt.Sprintf("%s: is a symbolic link to %s, which does not exist; remove the link, or name that file", path, target)
	case errors.Is(err, fs.ErrNotExist) && errors.Is(dirErr, fs.ErrNotExist):
		text += fmt.Sprintf("; there is no directory %s: make it first, or name another", dir)
	case errors.Is(err, fs.ErrExist):
		text += "; name another file, or remove that one first"
	}
	return &createError{text, err}
}
