package lab

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// setup is one run of Setup, which holds the cache's lock.
type setup struct {
	ctx      context.Context
	cache    string
	progress io.Writer
	apt      client
}

func (s *setup) say(format string, args ...any) {
	fmt.Fprintf(s.progress, "lab: "+format+"\n", args...)
}

func (s *setup) all() error {
	start := time.Now()
	// Leftovers of a killed setup.
	stale, err := filepath.Glob(filepath.Join(s.cache, "*.tmp*"))
	if err != nil {
		return err
	}
	for _, d := range stale {
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	if err := s.hostTools(); err != nil {
		return err
	}
	if _, err := os.Stat(qemuPath(s.cache)); err != nil {
		if err := s.qemu(); err != nil {
			return err
		}
	}
	for _, k := range stocks {
		if _, err := openKernel(s.cache, k); err == nil {
			continue
		}
		if err := s.kernel(k); err != nil {
			return fmt.Errorf("kernel %s: %w", k.name, err)
		}
	}
	if err := s.root(); err != nil {
		return err
	}
	s.say("ready in %s after %.0f s", s.cache, time.Since(start).Seconds())
	return nil
}
