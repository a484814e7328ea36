// Package durable makes files that are there, whole and with their names, after a loss of power.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// BeforeDir is called with each directory that is about to be made durable. Tests set it.
var BeforeDir = func(path string) {}

// File makes a new file durable, with the name that it has.
func File(f *os.File, path string) error {
	if err := f.Sync(); err != nil {
		return err
	}
	return dir(path)
}

// Replace gives the file at path, which need not exist, new contents. After a crash it has either
// the old or the new ones.
func Replace(path string, data []byte) error {
	tmp, err := write(path, data)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		if tmp != "" {
			os.Remove(tmp)
		}
		return err
	}
	return dir(path)
}

// Remove removes the file at path, if it is there, for good.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return dir(path)
}

// write writes a new file beside path that is on stable storage when it returns.
func write(path string, data []byte) (name string, err error) {
	f, err := nowait.CreateTemp(filepath.Dir(path), filepath.Base(path)+".", ".tmp")
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return f.Name(), errors.Join(err, f.Close())
}

// dir makes new, renamed and removed names in the directory of path durable. A file system that
// cannot (some FUSE and network ones), and a directory that only others may read, are left to do
// that in their own time.
func dir(path string) error {
	path = filepath.Dir(path)
	BeforeDir(path)
	d, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return errors.Join(err, d.Close())
}
