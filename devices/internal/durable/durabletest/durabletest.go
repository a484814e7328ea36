// Package durabletest shows tests which files package durable makes durable.
package durabletest

import (
	"os"
	"testing"

	"gvm/devices/internal/durable"
)

// Watch returns a function that returns the names in the directory that was made durable last, with
// their sizes: nil if none was since Watch.
func Watch(t *testing.T) func() map[string]int64 {
	var seen map[string]int64
	was := durable.BeforeDir
	t.Cleanup(func() { durable.BeforeDir = was })
	durable.BeforeDir = func(path string) {
		list, err := os.ReadDir(path)
		if err != nil {
			t.Error(err)
		}
		seen = map[string]int64{}
		for _, e := range list {
			if fi, err := e.Info(); err == nil {
				seen[e.Name()] = fi.Size()
			}
		}
	}
	return func() map[string]int64 { return seen }
}
