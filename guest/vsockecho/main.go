// Vsockecho is a static program for minimal guests: it sends back all that comes on its vsock
// connections.
//
//	vsockecho -connect 10
//
// It listens on port 3000, makes connections to port 2000 of the host, and ends when these have
// ended and the host has connected to port 3001. Each connection has a thread that sends bytes back
// until their end, and then ends its own. First it checks that port 999 of the host refuses
// connections.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "vsockecho:", err)
		os.Exit(1)
	}
}

func run() error {
	connections := flag.Int("connect", 0, "`number` of connections to the host")
	flag.Parse()
	if s, err := connect(999); !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("port 999 of the host: %d, %w", s, err)
	}
	listener, err := listen(3000)
	if err != nil {
		return err
	}
	last, err := listen(3001)
	if err != nil {
		return err
	}
	go func() {
		for {
			s, _, err := unix.Accept(listener)
			if err != nil {
				report(fmt.Errorf("accept: %w", err))
				return
			}
			go func() { report(echo(s)) }()
		}
	}()
	var threads, connecting sync.WaitGroup
	connecting.Add(*connections)
	for range *connections {
		threads.Go(func() {
			s, err := connect(2000)
			connecting.Done()
			if err == nil {
				err = echo(s)
			}
			report(err)
		})
	}
	stop := make(chan struct{})
	go signalThreads(stop)
	connecting.Wait()
	close(stop)
	threads.Wait()
	_, _, err = unix.Accept(last)
	return err
}

// signalThreads sends all threads a signal of Go's scheduler again and again.
func signalThreads(stop chan struct{}) {
	for {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			report(err)
			return
		}
		for _, task := range tasks {
			if tid, err := strconv.Atoi(task.Name()); err == nil {
				unix.Tgkill(os.Getpid(), tid, unix.SIGURG)
			}
		}
		select {
		case <-stop:
			return
		default:
		}
	}
}

func report(err error) {
	if err != nil {
		fmt.Println("vsockecho:", err)
	}
}

func listen(port uint32) (int, error) {
	s, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	if err == nil {
		err = unix.Bind(s, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
	}
	if err == nil {
		err = unix.Listen(s, 1024)
	}
	return s, err
}

func connect(port uint32) (int, error) {
	s, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	if err != nil {
		return s, err
	}
	return s, nowait.Connect(s, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port})
}

// echo sends back all that comes from s.
func echo(s int) error {
	runtime.LockOSThread()
	defer unix.Close(s)
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Read(s, b)
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if n == 0 {
			return unix.Shutdown(s, unix.SHUT_WR)
		}
		for out := b[:n]; len(out) > 0; {
			k, err := unix.Write(s, out)
			if err != nil {
				return fmt.Errorf("write: %w", err)
			}
			out = out[k:]
		}
	}
}
