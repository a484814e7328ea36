package machine

import (
	"errors"
	"io"
	"io/fs"
	"sync"

	"gvm/panics"
	"gvm/vmm"
)

// streamPort is a serial port whose other side is a stream.
type streamPort struct {
	stream io.ReadWriteCloser
	reader sync.WaitGroup

	mu     sync.Mutex
	change sync.Cond
	to     vmm.Input // nil: no machine runs
	closed bool
}

func newStreamPort(s io.ReadWriteCloser) *streamPort {
	p := &streamPort{stream: s}
	p.change.L = &p.mu
	p.reader.Go(panics.Func(p.read))
	return p
}

// Write passes the guest's output to the stream. A stream that is closed drops it: the guest runs
// on, as on a line without a peer.
func (p *streamPort) Write(b []byte) (int, error) {
	n, err := p.stream.Write(b)
	if errors.Is(err, fs.ErrClosed) || errors.Is(err, io.ErrClosedPipe) {
		return len(b), nil
	}
	return n, err
}

// Connect sets the guest's input.
func (p *streamPort) Connect(to vmm.Input) {
	p.mu.Lock()
	p.to = to
	p.mu.Unlock()
	p.change.Broadcast()
}

// read passes the stream's bytes to the guest until the stream ends.
func (p *streamPort) read() {
	b := make([]byte, 4096)
	for {
		n, err := p.stream.Read(b)
		for sent := 0; sent < n; {
			to := p.connected()
			if to == nil {
				return
			}
			m, err := to.Write(b[sent:n])
			if sent += m; err != nil {
				p.drop(to)
			}
		}
		if err != nil {
			return
		}
	}
}

// connected waits for the guest's input; nil after close.
func (p *streamPort) connected() vmm.Input {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.to == nil && !p.closed {
		p.change.Wait()
	}
	if p.closed {
		return nil
	}
	return p.to
}

// drop forgets an input that has failed, because its machine ended.
func (p *streamPort) drop(to vmm.Input) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.to == to {
		p.to = nil
	}
}

// close closes the stream and ends the reader.
func (p *streamPort) close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.change.Broadcast()
	err := p.stream.Close()
	p.reader.Wait()
	return err
}
