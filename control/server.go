package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"gvm/panics"
	"gvm/text"
)

// Limits of a server.
const (
	maxBody     = 64 << 10
	maxHeader   = 16 << 10
	readTimeout = 10 * time.Second
	// answerTimeout is for a request and its answer. It is longer than opening a disk takes,
	// because the answer is lost after it.
	answerTimeout = 5 * time.Minute
	// sendTimeout is how long Close waits for requests in progress, and closeTimeout how long after
	// that for their answers: a machine's end may take a second, and its disks need most of that.
	sendTimeout  = 50 * time.Millisecond
	closeTimeout = 50 * time.Millisecond
)

// Server is the control socket of a machine.
type Server struct {
	release  func() error // gives up the name, once
	listener net.Listener
	lock     *os.File

	mux     http.Handler // nil before Serve
	clients *clients
	streams streams
	accepts sync.WaitGroup

	readTimeout, closeTimeout time.Duration

	busy   sync.RWMutex // held for reading by requests that are at the machine
	closed bool         // guarded by busy
}

// Claim takes a name in the directory and opens its socket, where requests wait for Serve. It
// returns ErrInUse for the name of a live machine, takes over the name of a dead one, and removes
// the files of other dead machines.
func Claim(d Directory, name string) (*Server, error) {
	if _, err := d.List(); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	lock, l, err := d.claim(name)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return &Server{release: sync.OnceValue(func() error { return d.release(name, lock) }), listener: l, lock: lock,
		readTimeout: readTimeout, closeTimeout: closeTimeout}, nil
}

// HandOver gives the socket to a Door, which another process makes of the two files, for the caller
// to close. connections is where those of Serve come from. Close and Release call end, which
// returns when the Door has given up the name, or an error if the Door is dead: then the Server
// does, if it may.
func (s *Server) HandOver(connections net.Listener, end func() error) (socket, lock *os.File, err error) {
	l := s.listener.(*net.UnixListener)
	if socket, err = l.File(); err != nil {
		return nil, nil, err
	}
	own := s.release
	s.release = sync.OnceValue(func() error {
		if end() != nil {
			_ = own() // else the next gvm does
			return nil
		}
		return s.lock.Close()
	})
	s.listener = connections
	return socket, s.lock, l.Close()
}

// Serve starts answering for m. It may be called once, before Close.
func (s *Server) Serve(m Machine) {
	s.mux = s.handler(m)
	s.streams.conns = map[net.Conn]bool{}
	s.clients = &clients{Listener: s.listener}
	s.accepts.Go(panics.Func(func() { s.clients.serve(s.request) }))
}

// Close ends the service, waits for requests at the machine, and removes the socket.
func (s *Server) Close() error {
	var err error
	if s.mux == nil {
		err = s.listener.Close()
	} else {
		_ = s.clients.Listener.Close()
		s.accepts.Wait()
		if !s.clients.wait(sendTimeout) {
			s.clients.closeUntil(sending)
			if !s.clients.wait(s.closeTimeout) {
				s.clients.closeUntil(answering)
			}
		}
		s.streams.close(s.closeTimeout)
		s.busy.Lock()
		s.closed = true // for a request that was just read
		s.busy.Unlock()
	}
	return errors.Join(err, s.release())
}

// Release gives up the name and removes the socket, as Close does, without waiting for requests:
// for a process that ends at once. It may be called at any time.
func (s *Server) Release() error { return s.release() }

// call is a connection's request and its answer.
type call struct {
	*client
	in     *bufio.Reader
	header http.Header
	status int
	body   bytes.Buffer
	taken  bool // by a stream
	cancel context.CancelFunc
}

// Header, Write and WriteHeader make a call an http.ResponseWriter.
func (x *call) Header() http.Header         { return x.header }
func (x *call) Write(b []byte) (int, error) { return x.body.Write(b) }
func (x *call) WriteHeader(status int)      { x.status = status }

// request reads the request of a connection, and answers it. That is little work for one request on
// a connection, and package http's Server and Transport, which can do much more, would make the
// program a tenth larger, most of it TLS.
func (s *Server) request(c *client) {
	_ = c.SetReadDeadline(time.Now().Add(s.readTimeout))
	_ = c.SetWriteDeadline(time.Now().Add(answerTimeout))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	head := &io.LimitedReader{R: c, N: maxHeader + 4096}
	x := &call{client: c, in: bufio.NewReader(head), status: http.StatusOK, cancel: cancel,
		header: http.Header{"Date": {time.Now().UTC().Format(http.TimeFormat)}}}
	r, err := http.ReadRequest(x.in)
	large := head.N <= 0
	head.N = math.MaxInt64 // serve limits the body
	switch failed := net.Error(nil); {
	case err != nil && large:
		x.reply(nil, Errorf(http.StatusRequestHeaderFieldsTooLarge, "the request's header has more than %d bytes", maxHeader))
	case errors.As(err, &failed), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return
	case err != nil:
		x.reply(nil, Errorf(http.StatusBadRequest, "not a request of HTTP/1.1: %v", err))
	case r.Host == "":
		x.reply(nil, Errorf(http.StatusBadRequest, "the request has no Host"))
	default:
		if strings.EqualFold(r.Header.Get("Expect"), "100-continue") {
			_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
		}
		s.mux.ServeHTTP(x, r.WithContext(ctx))
	}
	if x.taken {
		return
	}
	answer := http.Response{StatusCode: x.status, ProtoMajor: 1, ProtoMinor: 1, Header: x.header, Close: true,
		ContentLength: int64(x.body.Len()), Body: io.NopCloser(&x.body), Request: r}
	_ = answer.Write(c) // fails if the client has gone
}

// watch ends the request's context if the client goes, until stop.
func (x *call) watch() (stop func()) {
	_ = x.SetReadDeadline(time.Time{})
	done := make(chan struct{})
	panics.Go(func() {
		defer close(done)
		if _, err := x.in.Peek(1); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && x.hasGone() {
			x.cancel()
		}
	})
	return func() {
		_ = x.SetReadDeadline(time.Now())
		<-done
	}
}

// endpoint answers a request with metrics, a stream, or a value for JSON; nil: no content.
type endpoint func(*http.Request) (any, error)

// handler routes the paths and methods of the protocol.
func (s *Server) handler(m Machine) http.Handler {
	mux := http.NewServeMux()
	paths := map[string][]route{}
	for _, r := range routes(m) {
		paths[r.path] = append(paths[r.path], r)
	}
	for path, rows := range paths {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			var allow []string
			for _, row := range rows {
				if row.method == r.Method {
					s.serve(w, r, row.do)
					return
				}
				allow = append(allow, row.method)
			}
			w.Header().Set("Allow", strings.Join(allow, ", "))
			s.serve(w, r, func(*http.Request) (any, error) {
				return nil, Errorf(http.StatusMethodNotAllowed, "%s of %s: want %s",
					r.Method, r.URL.Path, strings.Join(allow, " or "))
			})
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, func(*http.Request) (any, error) {
			return nil, Errorf(http.StatusNotFound, "no %s in version %d of the protocol", r.URL.Path, Version)
		})
	})
	return mux
}

// serve answers one request.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, do endpoint) {
	// Read the whole body before entering the machine: the client may never send it.
	x := w.(*call)
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var value any
	if err != nil {
		err = bodyError(err)
	} else {
		r.Body = io.NopCloser(bytes.NewReader(b))
		x.enter(atMachine)
		stop := x.watch()
		value, err = s.guarded(do, r)
		stop()
		x.enter(answering)
	}
	if st, ok := value.(stream); ok && err == nil {
		x.taken = true
		x.enter(streaming)
		s.streams.serve(x.client, x.in, st)
		return
	}
	x.reply(value, err)
}

// reply makes the answer of a value or an error.
func (x *call) reply(value any, err error) {
	if err != nil {
		x.status = http.StatusInternalServerError
		if e := (*Error)(nil); errors.As(err, &e) {
			x.status = e.Status
		}
		value = struct {
			Error text.Name `json:"error"`
		}{text.Name(err.Error())}
	} else if value == nil {
		x.status = http.StatusNoContent
		return
	}
	if b, ok := value.(metrics); ok {
		x.header.Set("Content-Type", metricsType)
		x.body.Write(b)
		return
	}
	x.header.Set("Content-Type", "application/json")
	e := json.NewEncoder(&x.body)
	e.SetEscapeHTML(false)
	_ = e.Encode(value)
}

// guarded runs a request unless the machine has ended. A panic becomes an error: the machine
// continues.
func (s *Server) guarded(do endpoint, r *http.Request) (value any, err error) {
	s.busy.RLock()
	defer s.busy.RUnlock()
	if s.closed {
		return nil, ErrEnded
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("a bug in gvm, please report it: %v", p)
		}
	}()
	return do(r)
}

// body reads a request's JSON object into v, which has all valid fields; nil: the body has none and
// may be empty.
func body(r *http.Request, v any) error {
	empty := v == nil
	if empty {
		v = &struct{}{}
	}
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == io.EOF && empty {
		return nil
	}
	if err == nil {
		if _, err = d.Token(); err == io.EOF {
			return nil
		} else if err == nil {
			err = errors.New("more than one JSON value")
		}
	}
	return bodyError(err)
}

func bodyError(err error) error {
	if e := (*http.MaxBytesError)(nil); errors.As(err, &e) {
		return Errorf(http.StatusRequestEntityTooLarge, "the body has more than %d bytes", e.Limit)
	}
	return Errorf(http.StatusBadRequest, "the body does not fit this request: %v", err)
}
