// Diskload reads or writes blocks of 4 KiB of a disk at random places, past the page cache:
//
//	diskload -file /dev/sda -depth 32 -count 1000
//
// It is a static program for minimal guests. It keeps depth requests in flight by as many threads.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const block = 4096

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "diskload:", err)
		os.Exit(1)
	}
}

func run() error {
	name := flag.String("file", "", "the `disk`")
	write := flag.Bool("write", false, "write, and not read")
	depth := flag.Int("depth", 1, "`number` of requests in flight")
	count := flag.Int64("count", 0, "end after `number` requests")
	flag.Parse()
	if *name == "" || *depth < 1 || *count < 1 || flag.NArg() > 0 {
		flag.Usage()
		return errors.New("want -file and -count")
	}
	f, err := os.OpenFile(*name, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	return load(f, size, *write, *depth, *count)
}

// load keeps depth requests in flight until count of them have been sent.
func load(f *os.File, size int64, write bool, depth int, count int64) error {
	var sent atomic.Int64
	var failed atomic.Pointer[error]
	var threads sync.WaitGroup
	for range depth {
		threads.Go(func() {
			runtime.LockOSThread()
			buf, err := unix.Mmap(-1, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS) // aligned
			for err == nil && sent.Add(1) <= count {
				at := rand.Int64N(size/block) * block
				if write {
					_, err = f.WriteAt(buf, at)
				} else {
					_, err = f.ReadAt(buf, at)
				}
			}
			if err != nil {
				failed.Store(&err)
			}
		})
	}
	threads.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}
