package jail

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
	"gvm/panics"
)

// Arg0 is the name of the program as janitor, the first of its arguments.
const Arg0 = "gvm-janitor"

// Descriptors of the janitor.
const (
	machineFD = 3 // a pidfd of the machine's process
	lockFD    = 4 // the jail's directory, with the lock
	lifeFD    = 5 // the read end of the pipe of nowait.WakeAtClose
	pairFD    = 6 // Requests.Pair, of the second janitor
)

// Requests lets the second janitor of a jail serve the program in it, which a hostile
// guest or the jail's user may control.
type Requests struct {
	Program int      // the program's PID
	Images  []string // Config's
	Jail    *os.File `json:"-"` // the jail's directory, by its path
	Pair    *os.File `json:"-"` // one end of a pair of sockets (SOCK_SEQPACKET); the program has the other
}

// startSecond starts the second janitor, and sets Janitor.
func (in *Inside) startSecond(c *Config, cgroup string, lock *os.File) error {
	request, err := json.Marshal(Requests{Program: os.Getpid(), Images: c.Images})
	if err != nil {
		return err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("--jail %s: socketpair: %w", c.Dir, err)
	}
	pair := os.NewFile(uintptr(fds[0]), "pair")
	defer pair.Close()
	in.Janitor = fds[1]
	return in.startJanitor(c.Dir, lock, []string{cgroup, c.Dir, string(request)}, pair)
}

// startJanitor starts the process that cleans up after the machine, as soon as this one ends, also
// if a signal has stopped it. Of the words the first is the machine's control group, and the others
// are for Requests, as is pair.
func (in *Inside) startJanitor(dir string, lock *os.File, words []string, pair *os.File) error {
	fail := func(err error) error { return fmt.Errorf("--jail %s: start the janitor: %w", dir, err) }
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return fail(err)
	}
	self := os.NewFile(uintptr(fd), "pidfd")
	defer self.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	defer null.Close()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return fail(os.NewSyscallError("pipe2", err))
	}
	in.Lives = append(in.Lives, pipe[1])
	life := os.NewFile(uintptr(pipe[0]), "life")
	defer life.Close()
	files := []*os.File{null, null, os.Stderr, self, lock, life}
	if pair != nil {
		files = append(files, pair)
	}
	p, err := os.StartProcess(ownProgram, append([]string{Arg0}, words...), &os.ProcAttr{
		Dir:   "/",
		Env:   append([]string{"GOMAXPROCS=1"}, os.Environ()...), // the first value counts
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true}, // the terminal's signals are not for it
	})
	if err != nil {
		return fail(err)
	}
	_ = nowait.WakeAtClose(life, p.Pid) // fails if it has ended
	return p.Release()
}

// cleanPatience bounds the wait for the end of the last processes of a machine.
const cleanPatience = time.Second

// Main is the janitor's program. serve answers the requests of the program in the jail, in a
// goroutine that ends with this process, if it is the second janitor.
func Main(args []string, serve func(Requests)) error {
	signal.Ignore() // all that can be: it ends after the machine
	var r Requests
	if len(args) != 2 && (len(args) != 4 || json.Unmarshal([]byte(args[3]), &r) != nil) {
		return fmt.Errorf("%s is a part of gvm run --jail", Arg0)
	}
	if len(args) == 4 {
		unix.CloseOnExec(pairFD)
		r.Jail, r.Pair = os.NewFile(lockFD, args[2]), os.NewFile(pairFD, "pair")
		panics.Go(func() { serve(r) })
	}
	for {
		poll := []unix.PollFd{{Fd: machineFD, Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, -1); n == 1 {
			break
		} else if err != unix.EINTR {
			return fmt.Errorf("wait for the machine: %w", err)
		}
	}
	// The control socket is the broker's to remove, if that lives. Other files of the user's machine
	// stay, and so does the directory then.
	return tidy(filepath.Join("/proc/self/fd", strconv.Itoa(lockFD), runDir), args[1])
}

// tidy removes a machine's directory of sockets and its control group. The machine's last processes
// end before gvm removes their sockets: they could make new ones.
func tidy(run, cgroup string) (err error) {
	left := clean(func() error { return removeRun(run) })
	if cgroup != "" {
		_ = write(cgroup, "cgroup.kill", "1") // Linux 5.14; the others end by themselves
		if err = clean(func() error { return ignoreMissing(unix.Rmdir(cgroup)) }); err != nil {
			err = fmt.Errorf("control group %s: %w", cgroup, err)
		}
		_ = unix.Rmdir(filepath.Dir(cgroup)) // of the last machine
	}
	if left != nil {
		_ = removeSockets(run)
		_ = removeRun(run)
	}
	return err
}

// clean repeats a removal until it succeeds.
func clean(remove func() error) (err error) {
	for end := time.Now().Add(cleanPatience); ; time.Sleep(2 * time.Millisecond) {
		if err = remove(); err == nil || time.Now().After(end) {
			return err
		}
	}
}

func removeRun(path string) error {
	if err := ignoreMissing(unix.Rmdir(filepath.Join(path, "gvm"))); err != nil {
		return err
	}
	return ignoreMissing(unix.Rmdir(path))
}

// mostFiles bounds the files that the janitor reads of a machine that was killed, as it has the
// jail's lock meanwhile: the machine's user may have made any number.
const mostFiles = 1000

// removeSockets removes the sockets of a machine that was killed. They are in directories of an
// ordinary user's.
func removeSockets(path string) error {
	root, err := os.OpenRoot(path)
	if err != nil {
		return err
	}
	defer root.Close()
	left := mostFiles
	files, err := readFiles(root, ".", &left)
	for _, f := range files {
		if f.Type() == os.ModeSocket {
			err = errors.Join(err, root.Remove(f.Name()))
		}
	}
	const own = "gvm" // has a directory for each machine, and that its files
	machines, err2 := readFiles(root, own, &left)
	err = errors.Join(err, err2)
	for _, m := range machines {
		name := filepath.Join(own, m.Name())
		if m.IsDir() {
			files, err2 := readFiles(root, name, &left)
			err = errors.Join(err, err2)
			for _, f := range files {
				err = errors.Join(err, root.Remove(filepath.Join(name, f.Name())))
			}
		}
		err = errors.Join(err, root.Remove(name))
	}
	return err
}

// readFiles reads the first of the files of a directory, and takes their number from left.
func readFiles(root *os.Root, dir string, left *int) ([]os.DirEntry, error) {
	if *left < 1 {
		return nil, fmt.Errorf("%s: more files than a machine has", dir)
	}
	d, err := root.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	files, err := d.ReadDir(*left)
	*left -= len(files)
	if err == io.EOF {
		err = nil
	}
	return files, err
}

func ignoreMissing(err error) error {
	if err == unix.ENOENT {
		return nil
	}
	return err
}
