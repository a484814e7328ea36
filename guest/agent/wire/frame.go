package wire

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"gvm/kvmapi/nowait"
)

// Version is the protocol's. Ends of different versions do not talk to each other.
const Version = 1

// Magic precedes the hello frame. Its first byte is in no other place of it, nor in UTF-8 text.
const Magic = "\xf5gvm-agent\x00"

const (
	// MaxPayload bounds the payload of a frame.
	MaxPayload = 32 << 10
	// MaxWindow bounds the room that a receiver may announce.
	MaxWindow = 1 << 20
	// MaxJunk bounds the bytes before Magic.
	MaxJunk = 1 << 20
	// AlivePeriod is the time between two alive frames.
	AlivePeriod = time.Second
)

// Places where the two ends look for each other.
const (
	VsockPort = 1024        // of the host, CID 2
	PortName  = "gvm.agent" // of the virtio-console port
)

const headerLen = 8

type frameType uint8

const (
	frameHello frameType = 1 + iota
	frameData
	frameWindow
	frameClose
	frameStop
	frameSignal
	frameWinsize
	frameBye
	frameStarted
	frameAlive
	frameLog
	frameExit
	frameCommand
)

// frame is a decoded frame. Its payload is valid until the next one is read.
type frame struct {
	typ     frameType
	stream  int
	payload []byte
}

var errDamaged = errors.New("a frame is damaged: bytes were lost or changed on the way")

// appendFrame appends the encoded frame to b.
func appendFrame(b []byte, f frame) []byte {
	at := len(b)
	b = append(b, byte(f.typ), byte(f.stream))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(f.payload)))
	b = binary.LittleEndian.AppendUint32(b, checksum(b[at:], f.payload))
	return append(b, f.payload...)
}

func checksum(header, payload []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli) // made once, at the first call
	return crc32.Update(crc32.Checksum(header[:4], table), table, payload)
}

// frameReader decodes a stream of frames.
type frameReader struct {
	r       *bufio.Reader
	payload [MaxPayload]byte
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: bufio.NewReaderSize(r, headerLen+MaxPayload)}
}

// next returns the next frame, or io.EOF if the stream ends between two frames.
func (d *frameReader) next() (frame, error) {
	var header [headerLen]byte
	if _, err := io.ReadFull(d.r, header[:1]); err != nil {
		return frame{}, err
	}
	if _, err := io.ReadFull(d.r, header[1:]); err != nil {
		return frame{}, unexpected(err)
	}
	n := int(binary.LittleEndian.Uint16(header[2:]))
	if n > MaxPayload {
		return frame{}, errDamaged
	}
	payload := d.payload[:n]
	if _, err := io.ReadFull(d.r, payload); err != nil {
		return frame{}, unexpected(err)
	}
	if checksum(header[:], payload) != binary.LittleEndian.Uint32(header[4:]) {
		return frame{}, errDamaged
	}
	return frame{frameType(header[0]), int(header[1]), payload}, nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// seek reads up to the end of Magic.
func (d *frameReader) seek() error {
	matched := 0
	for range MaxJunk + len(Magic) {
		c, err := d.r.ReadByte()
		if err != nil {
			return err
		}
		if c != Magic[matched] {
			matched = 0
		}
		if c == Magic[matched] {
			matched++
		}
		if matched == len(Magic) {
			return nil
		}
	}
	return fmt.Errorf("no hello in %d bytes", MaxJunk)
}

// Hello is the first message of each end.
type Hello struct {
	Build string // BuildID of the agent's program
	Rung  string // name of the transport, for the user; the host's is empty
}

// VersionError is the error of two ends that are not of one build.
type VersionError struct{ Own, Peer string }

func (e *VersionError) Error() string {
	return fmt.Sprintf("the agent and gvm are of different builds: this one is %s, the other %s; "+
		"make the initramfs with this gvm", e.Own, e.Peer)
}

type role uint8

const (
	roleAgent role = iota
	roleHost
)

func appendHello(b []byte, r role, h Hello) []byte {
	p := binary.LittleEndian.AppendUint16([]byte{byte(r)}, Version)
	for _, s := range []string{h.Build, h.Rung} {
		s = s[:min(len(s), 1024)]
		p = append(binary.LittleEndian.AppendUint16(p, uint16(len(s))), s...)
	}
	return appendFrame(append(b, Magic...), frame{frameHello, 0, p})
}

// readHello finds the hello of a peer that has the given role, and looks for its build among own.
func (d *frameReader) readHello(peer role, own ...string) (Hello, error) {
	if err := d.seek(); err != nil {
		return Hello{}, err
	}
	f, err := d.next()
	if err != nil {
		return Hello{}, unexpected(err)
	}
	if f.typ != frameHello || len(f.payload) < 3 {
		return Hello{}, errors.New("no hello frame after the magic")
	}
	if role(f.payload[0]) != peer {
		return Hello{}, errors.New("the hello came back: the stream echoes")
	}
	version, p := binary.LittleEndian.Uint16(f.payload[1:]), f.payload[3:]
	if version != Version {
		return Hello{}, &VersionError{fmt.Sprintf("version %d", Version), fmt.Sprintf("version %d", version)}
	}
	var h Hello
	for _, s := range []*string{&h.Build, &h.Rung} {
		if len(p) < 2 || len(p)-2 < int(binary.LittleEndian.Uint16(p)) {
			return Hello{}, errors.New("the hello frame is cut short")
		}
		n := int(binary.LittleEndian.Uint16(p))
		*s, p = string(p[2:2+n]), p[2+n:]
	}
	if !slices.Contains(own, h.Build) {
		return h, &VersionError{fmt.Sprintf("%q", strings.Join(own, " or ")), fmt.Sprintf("%q", h.Build)}
	}
	return h, nil
}

// BuildID returns the build ID that Go's linker wrote into the program at path, such as
// /proc/self/exe: programs of one ID have the same contents.
func BuildID(path string) (string, error) {
	file, err := nowait.Open(path, os.O_RDONLY, 0, nowait.Regular)
	if err != nil {
		return "", err
	}
	defer file.Close()
	f, err := elf.NewFile(file)
	if err != nil {
		return "", fmt.Errorf("read the build ID of %s: %w", path, err)
	}
	s := f.Section(".note.go.buildid")
	if s == nil || s.Size > 4096 {
		return "", fmt.Errorf("%s has no build ID of Go", path)
	}
	note, err := s.Data()
	if err != nil {
		return "", fmt.Errorf("read the build ID of %s: %w", path, err)
	}
	const nameAt = 12 // after the lengths of name and description, and the type
	if len(note) < nameAt+4 || !bytes.Equal(note[nameAt:nameAt+4], []byte("Go\x00\x00")) {
		return "", fmt.Errorf("%s has no build ID of Go", path)
	}
	id := note[nameAt+4:]
	return string(id[:min(len(id), int(binary.LittleEndian.Uint32(note[4:])))]), nil
}
