package lab

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// The host and the agent in L1 exchange frames over one virtio-serial port: one byte of type, four
// of length (little endian), then the payload. A single port keeps output, heartbeat and exit
// status in order, and apart from the kernel's output on its console.
const (
	frameHello  byte = iota + 1 // agent: L1 user space is up, the command starts now
	frameBeat                   // agent: still alive; sent every beatPeriod
	frameStdout                 // agent: bytes the command wrote
	frameStderr                 // agent
	frameExit                   // agent: the command's exit status, one byte; its last frame
	frameFail                   // agent: the command could not be started, and the reason; the last frame
	frameTaken                  // agent: the last frameStdin reached the command, send the next
	frameStdin                  // host: bytes for the command; empty means end of file
	frameSize                   // host: terminal size, rows and columns, two bytes each
	frameNext                   // host, after frameExit: another command's arguments, in JSON
)

const (
	frameHeader = 5
	maxPayload  = 64 << 10
)

// frameWriter sends whole frames from several goroutines.
type frameWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (f *frameWriter) send(kind byte, p []byte) error {
	b := make([]byte, frameHeader, frameHeader+len(p))
	b[0] = kind
	binary.LittleEndian.PutUint32(b[1:], uint32(len(p)))
	b = append(b, p...)
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.w.Write(b)
	return err
}

// readFrame reads one frame. The payload is valid until the next call with the
// same buffer.
func readFrame(r io.Reader, buf []byte) (kind byte, payload []byte, err error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(h[1:])
	if n > maxPayload || int(n) > len(buf) {
		return 0, nil, fmt.Errorf("frame of type %d has %d bytes, more than %d", h[0], n, len(buf))
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		return 0, nil, err
	}
	return h[0], buf[:n], nil
}
