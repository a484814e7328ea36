package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	"gvm/kvmapi/nowait"
)

// benchRecord is the JSON file of a benchmark. Its contents stay until write replaces them. A nil
// *benchRecord ignores all calls.
type benchRecord struct {
	f    *os.File
	made bool // openBenchRecord created the file
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

// close closes the file after a benchmark that ended with err. It removes a file that the benchmark
// created if the benchmark failed before it wrote to the file.
func (r *benchRecord) close(err error) error {
	if r == nil {
		return err
	}
	if n, _ := r.regular(); r.made && err != nil && n == 0 {
		err = errors.Join(err, nowait.Remove(r.f, r.f.Name()))
	}
	return errors.Join(err, r.f.Close())
}

// benchDir makes a temporary directory. remove removes it, and an immediate end does.
func benchDir() (dir string, remove func() error, err error) {
	urgent.making.Lock() // before it is there: behind the steps of an immediate end none is made
	defer urgent.making.Unlock()
	if dir, err = tempDir("gvm-bench-"); err != nil {
		return "", nil, err
	}
	remove = func() error { return os.RemoveAll(dir) }
	removeAtEnd(remove)
	return dir, remove, nil
}

// benchImage is the size of the image that a benchmark without --disk makes.
const benchImage = 256 << 20

// benchFile returns the image to measure: path, or a new image that remove removes.
func benchFile(path string) (_ string, remove func() error, err error) {
	if path != "" {
		return path, func() error { return nil }, nil
	}
	dir, remove, err := benchDir()
	if err != nil {
		return "", nil, err
	}
	path = filepath.Join(dir, "disk.img")
	if err := fillImage(path, benchImage); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return path, remove, nil
}

// writeNew makes a file of gvm's own.
func writeNew(path string, b []byte) error {
	f, err := nowait.Open(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600, nowait.Regular)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// fillImage makes an image without holes, with data that varies.
func fillImage(path string, size int) error {
	f, err := nowait.Open(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600, nowait.Regular)
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
	return f.Sync() // otherwise the benchmark would measure write-back too
}
