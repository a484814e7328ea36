package agent

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/wire"
	"gvm/panics"
	"gvm/text"
)

// maxSessions bounds the sessions at a time.
const maxSessions = 64

// serve serves sessions of the host by vsock, each a command beside the guest's own, cmd, until the
// machine ends.
func (g *guest) serve(cmd *wire.Command) error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: wire.VsockPort})
	if err == nil {
		err = unix.Listen(fd, maxSessions)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	panics.Go(func() { // ends with the machine
		slots := make(chan struct{}, maxSessions)
		for {
			slots <- struct{}{}
			fd, from, err := unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if err != nil {
				<-slots
				continue
			}
			conn := os.NewFile(uintptr(fd), "session")
			if peer, ok := from.(*unix.SockaddrVM); !ok || peer.CID != unix.VMADDR_CID_HOST { // a program of the guest
				conn.Close()
				<-slots
				continue
			}
			panics.Go(func() {
				defer func() { <-slots }()
				g.session(conn, cmd)
			})
		}
	})
	return nil
}

// session runs a command of the host: as that user, in that directory, and with that environment,
// which own has, unless the session's command has its own.
func (g *guest) session(conn *os.File, own *wire.Command) {
	j := &job{}
	w, err := dial(conn, wire.AgentConfig{Hello: wire.Hello{Build: g.build, Rung: rungs[0].name}, Window: sessionWindow,
		Signal: j.signal, Winsize: j.winsize})
	if err != nil {
		return
	}
	defer w.Close()
	cmd, err := w.Command()
	if err != nil {
		return
	}
	c := *own
	c.Args, c.Terminal, c.Env, c.Copy = cmd.Args, cmd.Terminal, append(slices.Clip(cmd.Env), own.Env...), cmd.Copy
	there := func(file string) bool { _, err := os.Stat(file); return err == nil }
	if name := string(c.Args[0]); path.Base(string(own.Args[0])) == "busybox" && !strings.Contains(name, "/") &&
		!slices.ContainsFunc(candidates(name, c.Env), there) {
		c.Args = append([]text.Name{own.Args[0]}, c.Args...) // a guest with that program alone has its applets
	}
	over := make(chan struct{})
	defer close(over)
	panics.Go(func() { // a command without its host ends as with a terminal that hangs up
		select {
		case <-w.Gone():
			j.signal(int(unix.SIGHUP))
		case <-over:
		}
	})
	exit := j.run(&c, streams{w.Stdin, w.Stdout, w.Stderr, w.Started})
	w.Stdout.Close()
	w.Stderr.Close()
	if err := w.Exit(exit, byePatience); err != nil {
		fmt.Fprintln(os.Stderr, "gvm-agent: a session:", err)
	}
}

// sessionWindow is the room for a session's standard input.
const sessionWindow = 256 << 10
