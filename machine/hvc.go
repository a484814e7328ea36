package machine

import (
	"io"
	"net/http"

	"gvm/control"
	"gvm/devices/virtio/console"
)

// hvcPort is the name of the port of the virtio console, for guests whose device has other ports.
const hvcPort = "gvm.console"

// hvc is the virtio console: the stream of its port, and all that are attached to it. None of them
// delays the guest, whose driver has a CPU wait for each write.
type hvc struct {
	*sharedConsole
	input *io.PipeReader // for the guest
}

func newHVC() *hvc {
	h := &hvc{sharedConsole: newSharedConsole(nil)}
	var keys *io.PipeWriter
	h.input, keys = io.Pipe()
	h.Connect(hvcInput{keys})
	return h
}

func (h *hvc) port() console.Port { return console.Port{Name: hvcPort, Stream: h, Console: true} }

// Read returns input for the guest.
func (h *hvc) Read(p []byte) (int, error) { return h.input.Read(p) }

// Close ends the input.
func (h *hvc) Close() error { return h.input.Close() }

// hvcInput is the guest's side of an InputQueue.
type hvcInput struct{ io.Writer }

// Break does nothing: the port is no serial line.
func (hvcInput) Break() error { return nil }

var errNoHVC = control.Errorf(http.StatusNotFound,
	"the machine has no virtio console: start it with gvm run --hvc")

// AttachHVC returns a new end of the virtio console, as Attach does of COM1. The error is a
// *control.Error: there is no such console.
func (m *Machine) AttachHVC() (*Attachment, error) {
	if m.hvc == nil {
		return nil, errNoHVC
	}
	return m.hvc.attach(), nil
}

// ResizeHVC tells the guest the size of the virtio console's terminal. Several sizes that the guest
// has not taken are one, the last. Errors are *control.Error.
func (m *Machine) ResizeHVC(s control.TerminalSize) error {
	switch {
	case m.hvc == nil:
		return errNoHVC
	case s.Columns == 0 || s.Rows == 0:
		return control.Errorf(http.StatusBadRequest, "a terminal of %d columns and %d rows: want 1 to 65535 of each",
			s.Columns, s.Rows)
	}
	m.ports.Resize(s.Columns, s.Rows)
	return nil
}
