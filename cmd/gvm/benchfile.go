package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	"gvm/kvmapi/nowait"
)

// benchRecord is the JSON file of a benchmark. What is in the file stays there until there
// is something to put in its place. A nil one takes everything and keeps nothing.
type benchRecord struct {
	f    *os.File
	made bool // the file was not there
}

func openBenchRecord(path string) (*benchRecord, error) {
	if path == "" {
		return nil, nil
	}
	f, made, err := openOutput(path)
	if err != nil {
		return nil, err
	}
	return &benchRecord{f, made}, nil
}

func (r *benchRecord) regular() (int64, bool) {
	fi, err := r.f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return 0, false
	}
	return fi.Size(), true
}

func (r *benchRecord) write(v any) error {
	if r == nil {
		return nil
	}
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	return fillOutput(r.f, r.made, append(b, '\n'))
}

// close closes the file after a benchmark that ended with err, and removes the one that a failed
// benchmark made and has written nothing to.
func (r *benchRecord) close(err error) error {
	if r == nil {
		return err
	}
	if n, _ := r.regular(); r.made && err != nil && n == 0 {
		err = errors.Join(err, nowait.Remove(r.f, r.f.Name()))
	}
	return errors.Join(err, r.f.Close())
}

// benchImage is the size of the image that is made for want of --disk.
const benchImage = 256 << 20

// benchFile returns the image to measure: path, or else one that it makes, which remove
// takes away.
func benchFile(path string) (_ string, remove func() error, err error) {
	if path != "" {
		return path, func() error { return nil }, nil
	}
	dir, err := tempDir("gvm-bench-")
	if err != nil {
		return "", nil, err
	}
	remove = func() error { return os.RemoveAll(dir) }
	path = filepath.Join(dir, "disk.img")
	if err := fillImage(path, benchImage); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return path, remove, nil
}

// fillImage makes an image without holes, of data that is not all the same.
func fillImage(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i ^ i>>9)
	}
	for off := 0; off < size; off += len(buf) {
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	return f.Sync() // write-back would be measured with the rest
}
