// Diskload reads or writes blocks of 4 KiB of a disk at random places, past the
// page cache, and prints how many a second and with what mean latency in µs:
//
//	diskload -file /dev/sda -depth 32 -time 4s
//
// It is a static program for guests that have nothing else: what keeps depth
// requests in flight are as many threads.
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
	"time"

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
	limit := flag.Duration("time", 0, "end after a `duration`, and do a quarter of that before, which is not counted")
	flag.Parse()
	if *name == "" || *depth < 1 || (*count > 0) == (*limit > 0) || flag.NArg() > 0 {
		flag.Usage()
		return errors.New("want -file, and either -count or -time")
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
	if *limit > 0 {
		if _, _, err := load(f, size, *write, *depth, 0, *limit/4); err != nil {
			return err
		}
	}
	n, took, err := load(f, size, *write, *depth, *count, *limit)
	if err != nil {
		return err
	}
	fmt.Printf("%.1f %.1f %d\n", float64(n)/took.Seconds(), took.Seconds()*1e6*float64(*depth)/float64(n), n)
	return nil
}

// load keeps depth requests in flight until count of them have been sent or limit
// has passed, and returns how many there were and the time they took.
func load(f *os.File, size int64, write bool, depth int, count int64, limit time.Duration) (n int64, took time.Duration, err error) {
	var sent atomic.Int64
	var failed atomic.Pointer[error]
	var threads sync.WaitGroup
	begin := time.Now()
	for range depth {
		threads.Go(func() {
			runtime.LockOSThread()
			buf, err := unix.Mmap(-1, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS) // aligned
			for err == nil && (count == 0 || sent.Add(1) <= count) && (limit == 0 || time.Since(begin) < limit) {
				at := rand.Int64N(size/block) * block
				if write {
					_, err = f.WriteAt(buf, at)
				} else {
					_, err = f.ReadAt(buf, at)
				}
				if count == 0 {
					sent.Add(1)
				}
			}
			if err != nil {
				failed.Store(&err)
			}
		})
	}
	threads.Wait()
	took = time.Since(begin)
	if err := failed.Load(); err != nil {
		return 0, 0, *err
	}
	if n = sent.Load(); count > 0 {
		n = count
	}
	return n, took, nil
}
