// Command gvm-net is the user-mode network of one machine, for gvm, which starts it. Descriptor 3
// is its end of the socket of the network device (package usernet).
//
//	gvm-net [host=off] [tcp=PORT|udp=PORT]...
//
// Each tcp= and udp= is a port of the guest; the descriptors from 4 on are the sockets of the host
// that lead there, in this order. gvm-net ends when the other end of descriptor 3 is closed, or by
// SIGTERM.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"gvm/usernet"
)

func main() {
	// A frame passes through several goroutines, and Go wakes a thread for each while it has a
	// processor free. The guest and gvm need the others.
	runtime.GOMAXPROCS(max(1, runtime.NumCPU()/2))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "gvm-net: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	file := os.NewFile(3, "the network device")
	c, err := net.FileConn(file)
	conn, ok := c.(*net.UnixConn)
	if err != nil || !ok {
		return errors.New("descriptor 3 is no socket of a network device: gvm run --net user starts gvm-net")
	}
	file.Close()
	config := usernet.Config{Host: true}
	for _, arg := range args {
		key, value, _ := strings.Cut(arg, "=")
		if arg == "host=off" {
			config.Host = false
			continue
		}
		port, err := strconv.ParseUint(value, 10, 16)
		if err != nil || port == 0 || key != "tcp" && key != "udp" {
			return fmt.Errorf("%q: want host=off, tcp=PORT or udp=PORT", arg)
		}
		p, err := published(key, 4+len(config.Published))
		if err != nil {
			return fmt.Errorf("%s: %w", arg, err)
		}
		p.Port = uint16(port)
		config.Published = append(config.Published, p)
	}
	return usernet.Serve(ctx, conn, config)
}

// published returns the host's socket with descriptor fd.
func published(protocol string, fd int) (usernet.Published, error) {
	file := os.NewFile(uintptr(fd), protocol)
	defer file.Close()
	switch protocol {
	case "tcp":
		l, _ := net.FileListener(file)
		if l, ok := l.(*net.TCPListener); ok {
			return usernet.Published{TCP: l}, nil
		}
	case "udp":
		c, _ := net.FilePacketConn(file)
		if c, ok := c.(*net.UDPConn); ok {
			return usernet.Published{UDP: c}, nil
		}
	}
	return usernet.Published{}, fmt.Errorf("descriptor %d is no socket of %s that listens", fd, protocol)
}
