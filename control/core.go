package control

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"gvm/panics"
)

// coreProtocol is the protocol of a connection that carries a core: docs/control.md.
const coreProtocol = "gvm-core"

const (
	maxCoreData    = 1 << 20
	maxCoreRelease = 4096
)

// PutCore writes a part of a core, as parts of 1 MiB at most: the place in the file, the length,
// and the bytes.
func PutCore(w io.Writer, off int64, p []byte) error {
	for len(p) > 0 {
		part := p[:min(len(p), maxCoreData)]
		if _, err := w.Write(coreHead(off, len(part))); err != nil {
			return err
		}
		if _, err := w.Write(part); err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

func coreHead(off int64, n int) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, uint64(off)), uint64(n))
}

// EndCore writes the end of a core: its size and no bytes, and the release of the guest's kernel.
func EndCore(w io.Writer, size int64, release string) error {
	_, err := w.Write(append(coreHead(size, 0), release[:min(len(release), maxCoreRelease)]...))
	return err
}

// coreStream is a stream of output alone.
type coreStream struct{ io.ReadCloser }

func (coreStream) Write(p []byte) (int, error) { return len(p), nil }

// Core passes the parts of an ELF core of the machine to put, in ascending order. The others are
// zeros. It returns the size of the core and the release of the guest's kernel, "" if the core has
// no VMCOREINFO. The machine is paused until it returns.
func (c *Client) Core(
	ctx context.Context, put func(off int64, p []byte) error,
) (size int64, release string, err error) {
	conn, err := c.upgrade(ctx, "machine/core", coreProtocol, changeTimeout)
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, panics.Func(func() { conn.Close() }))()
	defer func() {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
	}()
	return c.readCore(conn, put)
}

// readCore reads the parts of a core, which may be a hostile machine's.
func (c *Client) readCore(conn io.Reader, put func(off int64, p []byte) error) (size int64, release string, err error) {
	cut := func(err error) error {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("machine %s ended before its dump was complete", c.name)
		}
		return fmt.Errorf("machine %s: read its memory: %w", c.name, err)
	}
	var head [16]byte
	buf := make([]byte, maxCoreData)
	for {
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return 0, "", cut(err)
		}
		off, n := int64(binary.LittleEndian.Uint64(head[:])), binary.LittleEndian.Uint64(head[8:])
		if off < size || n > maxCoreData || off+int64(n) < off {
			return 0, "", fmt.Errorf("machine %s sends a dump that this gvm does not understand", c.name)
		}
		size = off + int64(n)
		if n == 0 {
			b, err := io.ReadAll(io.LimitReader(conn, maxCoreRelease))
			if err != nil {
				return 0, "", cut(err)
			}
			return size, string(b), nil
		}
		if _, err := io.ReadFull(conn, buf[:n]); err != nil {
			return 0, "", cut(err)
		}
		if err := put(off, buf[:n]); err != nil {
			return 0, "", err
		}
	}
}
