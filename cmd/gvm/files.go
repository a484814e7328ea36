package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/text"
)

// openInput opens a user's file for reading. It does not wait for the writer of a FIFO.
func openInput(path string) (*os.File, error) {
	f, err := nowait.Open(path, os.O_RDONLY, 0, nowait.Regular|nowait.Pipe)
	if err != nil {
		return nil, namedError(nowait.OpenError(path, err))
	}
	return f, nil
}

// checkDir refuses a path that is no directory with the permissions of mode, as of access(2).
func checkDir(path string, mode uint32) error {
	fi, err := os.Stat(path)
	if err == nil && !fi.IsDir() {
		err = &nowait.KindError{Path: path, Is: nowait.KindOf(fi.Mode()), Wants: nowait.Directory}
	}
	if err == nil {
		err = unix.Access(path, mode)
	}
	if err != nil {
		return namedError(nowait.OpenError(path, err))
	}
	return nil
}

// readInput reads a user's file of at most limit bytes. It ends with ctx, as the writer of a pipe
// may be silent.
func readInput(ctx context.Context, path string, limit int64) ([]byte, error) {
	b, err := nowait.Until(ctx, func() string { return path + " was read" },
		func() ([]byte, error) { return readWhole(ctx, path, limit+1) }, func([]byte) {})
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, configError{fmt.Errorf("%s: larger than %s", path, text.FormatSize(uint64(limit)))}
	}
	return b, nil
}

// readWhole is readInput without an end for storage that does not answer. It cuts the file off.
func readWhole(ctx context.Context, path string, limit int64) ([]byte, error) {
	f, err := openInput(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	defer context.AfterFunc(ctx, panics.Func(func() { _ = f.SetReadDeadline(time.Now()) }))() // of a pipe alone
	b, err := io.ReadAll(io.LimitReader(f, limit))
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%w while %s was read", context.Cause(ctx), path)
	case err != nil:
		return nil, disk.ImageError{Err: err}
	}
	return b, nil
}

// openOutput opens or creates a user's file for writing, and keeps its contents. It refuses a
// locked file, such as a disk or a trace in use. made reports whether it created the file.
func openOutput(path string) (f *os.File, made bool, err error) {
	return openFormer(path, formerOutput)
}

// openLog is openOutput for a text that the guest prints, so that the file of an earlier run may be
// any text.
func openLog(path string) (f *os.File, made bool, err error) {
	return openFormer(path, func(head []byte) bool { return !bytes.Contains(head, []byte{0}) })
}

// openFormer opens an output. former reports whether a file with such a head may be overwritten.
func openFormer(path string, former func(head []byte) bool) (f *os.File, made bool, err error) {
	f, made, err = nowait.Make(path, os.O_WRONLY, 0o666, nowait.Regular|nowait.Pipe|nowait.CharDevice)
	if err != nil {
		return nil, false, outputError(path, err)
	}
	if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() {
		l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err == unix.EAGAIN || err == unix.EACCES {
			f.Close()
			return nil, false, configError{fmt.Errorf("%s: in use by another gvm; name another file", path)}
		}
		if fi.Size() > 0 && !former(headOf(f)) {
			f.Close()
			return nil, false, configError{fmt.Errorf(
				"%s: has something that gvm did not write; name another file, or remove it first", path)}
		}
	}
	return f, made, nil
}

// outputError is the error of opening a user's file or pipe for writing.
func outputError(path string, err error) error {
	if !errors.Is(err, unix.ENXIO) {
		return namedError(nowait.CreateError(path, err))
	}
	if fi, err := os.Stat(path); err == nil && fi.Mode()&fs.ModeNamedPipe != 0 {
		return configError{fmt.Errorf("%s: is a pipe that no program reads; start that first, or name another file", path)}
	}
	// A device has this error too, such as /dev/tty of a process without a terminal.
	return configError{fmt.Errorf("%s: %w; name another file", path, unix.ENXIO)}
}

// headOf returns the first bytes of a file that is open for writing; a NUL if they cannot be read.
func headOf(f *os.File) []byte {
	r, err := nowait.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDONLY, 0, nowait.Regular)
	if err != nil {
		return []byte{0}
	}
	defer r.Close()
	head := make([]byte, 4096)
	n, _ := io.ReadFull(r, head)
	return head[:n]
}

// formerOutput reports whether a file begins like JSON, an SVG or a PNG. Any other file may be a
// disk image, and is not overwritten.
func formerOutput(head []byte) bool {
	return slices.ContainsFunc([]string{"[", "{", "<?xml", "<svg", "\x89PNG"},
		func(s string) bool { return strings.HasPrefix(string(head), s) })
}

// writeOutput makes b the contents of a user's file.
func writeOutput(path string, b []byte) error {
	f, made, err := openOutput(path)
	if err != nil {
		return err
	}
	err = fillOutput(f, made, b)
	if e := f.Close(); e != nil && err == nil {
		err = disk.ImageError{Err: e}
	}
	return err
}

// fillOutput makes b the contents of a file from openOutput. If there is no room for all of b, an
// existing file stays as it is, and a new one is removed.
func fillOutput(f *os.File, made bool, b []byte) (err error) {
	defer func() {
		if err != nil {
			if made {
				err = errors.Join(err, nowait.Remove(f, f.Name()))
			}
			err = disk.ImageError{Err: err}
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	regular := fi.Mode().IsRegular()
	if regular && len(b) > 0 {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, int64(len(b)))
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) { // some file systems report a lack of space only on write
			return errors.Join(&fs.PathError{Op: "write", Path: f.Name(), Err: err}, f.Truncate(fi.Size()))
		}
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	if regular {
		return f.Truncate(int64(len(b)))
	}
	return nil
}

// outputFile is a user's file for results, or none if its path is empty.
type outputFile struct {
	flag, path string
	file       *os.File
	made       bool
}

// openOutputs opens files and empties them: results of an earlier run must not be taken for those
// of a run that dies. After an error no new file is left.
func openOutputs(files ...*outputFile) error {
	for i, o := range files {
		if err := o.open(); err != nil {
			err = fmt.Errorf("%s: %w", o.flag, err)
			for _, o := range files[:i+1] {
				if o.made && o.file != nil {
					err = errors.Join(err, nowait.Remove(o.file, o.path))
				}
				err = errors.Join(err, o.close())
			}
			return err
		}
	}
	return nil
}

func (o *outputFile) open() (err error) {
	if o.path != "" {
		if o.file, o.made, err = openOutput(o.path); err == nil {
			err = fillOutput(o.file, o.made, nil)
		}
	}
	return err
}

// fill makes the output of write, with foreign text escaped, the contents of the file.
func (o *outputFile) fill(write func(io.Writer) error) error {
	if o.file == nil {
		return nil
	}
	var b bytes.Buffer
	err := write(&b)
	if err == nil {
		err = fillOutput(o.file, false, []byte(text.Lines(b.String())))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o.flag, err)
	}
	return nil
}

// endSoon bounds the wait for the reader of a pipe, once the end of the run was asked for.
func (o *outputFile) endSoon(patience time.Duration) {
	if o.file != nil {
		_ = o.file.SetWriteDeadline(time.Now().Add(patience)) // fails for a regular file
	}
}

// saveOutputs returns the error of save, which fills and closes files. If soon, as the end of the
// run was asked for, it waits neither for a pipe's reader nor for storage that does not answer.
func saveOutputs(soon bool, files []*outputFile, save func() error) error {
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	var paths []string
	patience := left(hostPatience)
	for _, o := range files {
		if o.path != "" {
			paths = append(paths, o.path)
		}
		if soon {
			o.endSoon(patience / 2)
		}
	}
	if soon {
		stop(disk.ImageError{Err: errors.New("the storage does not answer")})
	}
	_, err := nowait.Within(ctx, patience, func() string { return strings.Join(paths, " and ") + " was written" },
		func() (struct{}, error) { return struct{}{}, save() }, func(struct{}) {})
	return err
}

func (o *outputFile) close() error {
	if o.file == nil {
		return nil
	}
	return o.file.Close()
}

// namedError classifies an error of opening a user's file.
func namedError(err error) error {
	if kind := (*nowait.KindError)(nil); errors.As(err, &kind) {
		return configError{err}
	}
	return disk.ImageError{Err: err}
}

// tempDir is nowait.TempDir. Its error says how to choose another directory.
func tempDir(prefix string) (string, error) {
	dir, err := nowait.TempDir(prefix)
	if err != nil {
		return "", disk.ImageError{Err: nowait.TempError("directory", err)}
	}
	return dir, nil
}
