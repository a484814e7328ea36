package control

import (
	"errors"
	"io"
	"net/http"

	"gvm/inspect"
)

// route is a request of the protocol.
type route struct {
	method, path string
	does         string // its effect, for docs/openapi.json
	body, answer any    // zero values of their types; nil: none
	refuses      []int  // statuses of its own errors, besides those of anyRequest
	do           endpoint
}

// anyRequest are the statuses of errors that each request may have: a bad body or URL, one that is
// too long, a failure of the host, and the machine's end.
var anyRequest = []int{http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusInternalServerError,
	http.StatusServiceUnavailable}

// Version is the version of the protocol.
const Version = 1

// routes are the requests that a server of m answers. docs/openapi.json is made from them.
func routes(m Machine) []route {
	const (
		missing  = http.StatusNotFound
		conflict = http.StatusConflict
		late     = http.StatusGatewayTimeout
	)
	change := []int{missing, conflict, late}
	return []route{
		{"GET", "/v1/machine", "describes the machine", nil, Info{}, nil,
			func(*http.Request) (any, error) { return m.Info(), nil }},
		{"POST", "/v1/machine/pause", "stops the CPUs and devices", nil, nil, []int{conflict, late},
			bare(func(r *http.Request) (any, error) { return nil, m.Pause(r.Context()) })},
		{"POST", "/v1/machine/resume", "lets the CPUs and devices go on", nil, nil, []int{conflict},
			bare(func(*http.Request) (any, error) { return nil, m.Resume() })},
		{"POST", "/v1/machine/stop", "presses the power button, and stops the machine after the grace time", Stop{},
			Stopped{}, []int{conflict}, with(func(_ *http.Request, s Stop) (any, error) {
				if s.GraceMS < 0 || s.GraceMS > MaxGrace.Milliseconds() {
					return nil, Errorf(http.StatusBadRequest, "grace_ms %d: want 0 to %d", s.GraceMS, MaxGrace.Milliseconds())
				}
				return m.Stop(s)
			})},
		{"POST", "/v1/machine/reset", "starts the guest again, as the reset button does", nil, nil, []int{conflict},
			bare(func(*http.Request) (any, error) { return nil, m.Reset() })},
		{"POST", "/v1/machine/nmi", "raises a non-maskable interrupt on the CPUs", nil, nil, []int{late},
			bare(func(r *http.Request) (any, error) { return nil, m.NMI(r.Context()) })},
		{"POST", "/v1/machine/sysrq", "sends a break and a key to the console, which Linux takes for SysRq", SysRq{}, nil,
			[]int{conflict, late}, with(func(r *http.Request, s SysRq) (any, error) {
				if len(s.Key) != 1 || s.Key[0] <= ' ' || s.Key[0] > '~' {
					return nil, Errorf(http.StatusBadRequest, "key %q: want one letter, digit or mark", s.Key)
				}
				return nil, m.SysRq(r.Context(), s.Key[0])
			})},
		{"GET", "/v1/machine/core", "makes the connection an ELF core of the machine, by an Upgrade to " + coreProtocol, nil,
			stream{}, []int{http.StatusUpgradeRequired, conflict, late},
			upgrade(coreProtocol, func(r *http.Request) (io.ReadWriteCloser, error) {
				c, err := m.Core(r.Context())
				return coreStream{c}, err
			})},
		{"GET", "/v1/console", "makes the connection the console, by an Upgrade to " + consoleProtocol, nil, stream{},
			[]int{http.StatusUpgradeRequired},
			upgrade(consoleProtocol, func(*http.Request) (io.ReadWriteCloser, error) { return m.Console(), nil })},
		{"GET", "/v1/agent", "makes the connection a session of the guest's agent, by an Upgrade to " + agentProtocol, nil,
			stream{}, []int{http.StatusUpgradeRequired, missing, conflict, late},
			upgrade(agentProtocol, func(r *http.Request) (io.ReadWriteCloser, error) { return m.Agent(r.Context()) })},
		{"POST", "/v1/console/break", "sends a break on the console", nil, nil, nil,
			bare(func(*http.Request) (any, error) { m.Break(); return nil, nil })},
		{"GET", "/v1/hvc", "makes the connection the virtio console, by an Upgrade to " + consoleProtocol, nil, stream{},
			[]int{http.StatusUpgradeRequired, missing},
			upgrade(consoleProtocol, func(*http.Request) (io.ReadWriteCloser, error) { return m.HVC() })},
		{"POST", "/v1/hvc/size", "tells the guest the size of the virtio console's terminal", TerminalSize{}, nil,
			[]int{missing}, with(func(_ *http.Request, s TerminalSize) (any, error) { return nil, m.ResizeHVC(s) })},
		{"GET", "/v1/disks", "lists the disks", nil, []Disk{}, nil,
			func(*http.Request) (any, error) { return append([]Disk{}, m.Disks()...), nil }},
		{"POST", "/v1/disks", "adds a disk", AddDisk{}, Change{}, change,
			with(func(r *http.Request, a AddDisk) (any, error) { return m.AddDisk(r.Context(), a) })},
		{"DELETE", "/v1/disks/{id}", "removes a disk", nil, Change{}, change,
			bare(func(r *http.Request) (any, error) { return m.RemoveDisk(r.Context(), r.PathValue("id")) })},
		{"POST", "/v1/disks/{id}/resize", "changes the size of a disk, or reads it again", ResizeDisk{}, Change{}, change,
			with(func(r *http.Request, c ResizeDisk) (any, error) {
				return m.ResizeDisk(r.Context(), r.PathValue("id"), c)
			})},
		{"GET", "/v1/balloon", "describes the balloon, with fresh statistics of the guest", nil, Balloon{}, []int{missing},
			func(r *http.Request) (any, error) { return m.Balloon(r.Context()) }},
		{"POST", "/v1/balloon", "asks the guest for a balloon of another size", ResizeBalloon{}, Balloon{}, []int{missing},
			with(func(_ *http.Request, b ResizeBalloon) (any, error) { return m.ResizeBalloon(b) })},
		{"GET", "/v1/inspect/{path...}", "shows the machine's state at a path, everything without one", nil, inspect.Node{},
			[]int{missing}, func(r *http.Request) (any, error) {
				n, err := m.Inspect(r.Context(), r.PathValue("path"))
				if e := (*inspect.PathError)(nil); errors.As(err, &e) {
					err = Errorf(http.StatusNotFound, "%v", err)
				}
				return n, err
			}},
		{"GET", "/metrics", "shows the numbers of the state in Prometheus's text format", nil, metrics{}, nil,
			func(r *http.Request) (any, error) {
				n, err := m.Inspect(r.Context(), "")
				if err != nil {
					return nil, err
				}
				i := m.Info()
				n.Nodes = append(n.Nodes, inspect.Group("machine", inspect.Text("name", i.Name), inspect.Text("gvm", i.GVM),
					inspect.Text("kernel", string(i.Kernel)), inspect.Int("pid", i.PID), inspect.Int("cpus", i.CPUs),
					inspect.Int("memory_bytes", i.Memory)))
				return metricsOf(n), nil
			}},
	}
}

// bare returns an endpoint that refuses a body with fields.
func bare(do endpoint) endpoint {
	return func(r *http.Request) (any, error) {
		if err := body(r, nil); err != nil {
			return nil, err
		}
		return do(r)
	}
}

// with returns an endpoint that reads its body.
func with[T any](do func(*http.Request, T) (any, error)) endpoint {
	return func(r *http.Request) (any, error) {
		var v T
		if err := body(r, &v); err != nil {
			return nil, err
		}
		return do(r, v)
	}
}
