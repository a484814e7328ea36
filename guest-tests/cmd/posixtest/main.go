// Posixtest runs go-fuse's tests for file systems in the directory that the variable DIR names.
package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

func main() {
	var tests []testing.InternalTest
	for name, test := range posixtest.All {
		// Its own author skips the first; the second races with itself on any file system.
		if slices.Contains([]string{"FcntlFlockLocksFile", "OpenSymlinkRace"}, name) {
			continue
		}
		tests = append(tests, testing.InternalTest{Name: name, F: func(t *testing.T) {
			dir := filepath.Join(os.Getenv("DIR"), name)
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			test(t, dir)
		}})
	}
	testing.Main(func(string, string) (bool, error) { return true, nil }, tests, nil, nil)
}
