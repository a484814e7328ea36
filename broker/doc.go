// Package broker opens files for a machine whose process may open none any more.
//
// The broker is a second process of the same program. It accepts the connections of the control
// socket, reads each request, and passes both to the machine. The machine asks it to open the files
// that a request names, with those beside them, and gets descriptors. It refuses every other path:
// a machine that its guest has taken over can open only the files that the owner of the socket has
// named. In the same way it adds them to the kernel's target of the machine (backend=vhost), and
// takes that down at the machine's end. It makes the machine's Record, in a directory that the
// machine names before it may open no files. It removes the socket, and other sockets that the
// machine names by then, after that end, and the kernel's targets of a machine that died.
//
// In a jail the broker has no right to LIO. It has the machine's Janitor add and remove disks, a
// process outside of the jail, which sees to it that the user of the jail gets no more rights by
// that.
//
// A machine with such a socket or target has a third process, the keeper. It removes them when the
// machine has ended, if they are still there because the broker was killed.
//
// The two have a pair of sockets (SOCK_SEQPACKET). A message is a line of JSON, then data, with
// descriptors (SCM_RIGHTS).
package broker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/lio"
	"gvm/devices/scsi/sidecar"
	"gvm/kvmapi/nowait"
	"gvm/text"
)

// operation is the kind of a message.
type operation string

const (
	connection operation = "connection" // to the machine: a connection, and the beginning of its request as data

	// To the broker, without an answer. The first four are not valid after closed.
	door    operation = "door"    // Path is the directory of the control socket; descriptors of that and of its lock
	keep    operation = "keep"    // Paths are beside disks of the command line
	atEnd   operation = "atEnd"   // Files are sockets of the machine's, removed at its end, with a descriptor of each
	records operation = "records" // Paths are the directory for the machine's record, and the machine's name in it
	closed  operation = "closed"  // the machine opens no files any more
	end     operation = "end"     // the machine ends in order; to the machine: its name is given up

	// To the broker, which answers: the methods of block.Files.
	openImage operation = "image"
	temporary operation = "temporary"
	openFile  operation = "open"
	syncFile  operation = "sync"
	replace   operation = "replace"
	remove    operation = "remove"
	discard   operation = "discard"

	// To the broker, which answers: the methods of disk.Targets. The first two are also for a Janitor.
	addTo      operation = "addTo"
	removeFrom operation = "removeFrom"
	takeDown   operation = "takeDown"

	// To the broker, which answers: the methods of Record.
	recordDirectory operation = "recordDirectory"
	recordFiles     operation = "recordFiles"
	recordCore      operation = "recordCore"
	linkCore        operation = "linkCore"
	removeCore      operation = "removeCore"
)

// message is a message without its data and descriptors.
type message struct {
	ID    uint64 `json:",omitempty"` // of a request, and of its answer
	Op    operation
	Path  text.Name   `json:",omitempty"`
	Paths []text.Name `json:",omitempty"`
	Files []ownFile   `json:",omitempty"`

	Flag    int         `json:",omitempty"`
	Perm    fs.FileMode `json:",omitempty"`
	Options *options    `json:",omitempty"`
	WWN     string      `json:",omitempty"` // of a target of the kernel's
	LUN     int         `json:",omitempty"`
	Unit    *unit       `json:",omitempty"` // to a Janitor

	Named bool         `json:",omitempty"` // a core has its name
	Facts *block.Facts `json:",omitempty"`
	Notes []string     `json:",omitempty"`
	Err   *wireError   `json:",omitempty"`
}

// notice has the fields of the messages up to closed. The encoder of JSON makes its tables of a
// type at the first value: of message it takes 0.1 ms, for which the guest would wait.
type notice struct {
	Op    operation
	Path  text.Name   `json:",omitempty"`
	Paths []text.Name `json:",omitempty"`
	Files []ownFile   `json:",omitempty"`
}

// ownFile is a file that the machine has made.
type ownFile struct {
	Path     text.Name
	Dev, Ino uint64
}

// pin opens the file, because an open inode has no successor of its number; nil: it is not there.
func (f *ownFile) pin() *os.File {
	fd, err := unix.Open(string(f.Path), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), string(f.Path))
}

// remove removes the file, unless another has its path.
func (f *ownFile) remove() error {
	var st unix.Stat_t
	if unix.Lstat(string(f.Path), &st) != nil || st.Dev != f.Dev || st.Ino != f.Ino {
		return nil
	}
	if err := os.Remove(string(f.Path)); !errors.Is(err, fs.ErrNotExist) { // the broker and the keeper may meet
		return err
	}
	return nil
}

// options are those of block.Options that the machine gives.
type options struct {
	ReadOnly, NoLock, Direct, Lend, Raw, Overlay bool
	Size                                         int64
	BlockSize                                    int
	Uses                                         []block.Use
}

// Limits of a message. Linux limits it to some 200 kB (net.core.wmem_max).
const (
	maxMessage = 192 << 10
	maxFiles   = 253 // SCM_MAX_FD
)

// send sends a message or a notice.
func send[M message | notice](c *net.UnixConn, m M, data []byte, files ...*os.File) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(append(append(b, '\n'), data...), oob, nil)
	return err
}

// receiver receives the messages of a socket.
type receiver struct {
	conn *net.UnixConn
	b    []byte
	oob  []byte
}

func newReceiver(c *net.UnixConn) *receiver {
	return &receiver{c, make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFiles))}
}

// next returns the next message. The data is valid until the next call; the files are the caller's.
// An error is the end of the socket, or of its other end.
func (r *receiver) next() (m message, data []byte, files []*os.File, err error) {
	n, oobn, flags, _, err := r.conn.ReadMsgUnix(r.b, r.oob)
	if err != nil {
		return m, nil, nil, err
	}
	files = received(r.oob[:oobn])
	line, data, ok := bytes.Cut(r.b[:n], []byte("\n"))
	switch {
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("a message is too long")
	case !ok:
		err = errors.New("a message has no line")
	default:
		err = json.Unmarshal(line, &m)
	}
	if err != nil {
		closeAll(files)
		return m, nil, nil, err
	}
	return m, data, files, nil
}

// received returns the descriptors in a control message.
func received(oob []byte) (files []*os.File) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// kinds are the errors that users of block.Files and disk.Targets tell apart, by their place here.
var kinds = []error{block.ErrLocked, block.ErrFormat, block.ErrSize, block.ErrNotDisk, block.ErrBase,
	block.ErrNoLocks, sidecar.ErrTuples, scsi.ErrReservationState, errors.ErrUnsupported, lio.ErrUnit, lio.ErrBusy}

// wireError is an error in a message.
type wireError struct {
	Text   text.Name
	Errno  unix.Errno         `json:",omitempty"`
	Kinds  []int              `json:",omitempty"`
	File   *nowait.KindError  `json:",omitempty"`
	Locked *block.LockedError `json:",omitempty"`
}

// encodeError returns the message's error for err. In it the machine's PID stands for that of this
// process, and the text of a LockedError is left out, as the machine makes it anew.
func encodeError(err error, machine int) *wireError {
	if err == nil {
		return nil
	}
	e := &wireError{Text: text.Name(err.Error())}
	_ = errors.As(err, &e.Errno)
	_ = errors.As(err, &e.File)
	for i, kind := range kinds {
		if errors.Is(err, kind) {
			e.Kinds = append(e.Kinds, i)
		}
	}
	for errno, kind := range map[unix.Errno]error{unix.ENOENT: fs.ErrNotExist, unix.EEXIST: fs.ErrExist,
		unix.EACCES: fs.ErrPermission} {
		if e.Errno == 0 && errors.Is(err, kind) {
			e.Errno = errno
		}
	}
	if locked := (*block.LockedError)(nil); errors.As(err, &locked) {
		l := *locked
		if l.PID == os.Getpid() {
			l.PID = machine
		}
		e.Locked = &l
		before, after, _ := strings.Cut(err.Error(), locked.Error())
		e.Text = text.Name(before + "\n" + after)
	}
	return e
}

// brokerError is an error of the broker's.
type brokerError struct {
	text string
	is   []error
}

func (e *brokerError) Error() string   { return e.text }
func (e *brokerError) Unwrap() []error { return e.is }

// decode returns the error as the broker had it.
func (e *wireError) decode() error {
	if e == nil {
		return nil
	}
	d := &brokerError{text: string(e.Text)}
	if e.Errno != 0 {
		d.is = append(d.is, e.Errno)
	}
	if e.File != nil {
		d.is = append(d.is, e.File)
	}
	for _, i := range e.Kinds {
		if i >= 0 && i < len(kinds) {
			d.is = append(d.is, kinds[i])
		}
	}
	if e.Locked != nil {
		d.is = append(d.is, e.Locked)
		before, after, _ := strings.Cut(d.text, "\n")
		d.text = before + e.Locked.Error() + after
	}
	return d
}

func refusal(path text.Name) error {
	return &fs.PathError{Op: "open", Path: string(path), Err: fmt.Errorf("%w: no request names it", unix.EACCES)}
}
