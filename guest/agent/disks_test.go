package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"gvm/guest/agent/wire"
	"gvm/text"
)

// fakeDisks is a /sys and a /dev. Each sleep of the finder adds a disk, the node of which comes
// with the next sleep.
type fakeDisks struct {
	diskFinder
	t     *testing.T
	time  time.Time
	later [][2]string // names and serial numbers
	node  string      // to come
}

func newFakeDisks(t *testing.T, later ...[2]string) *fakeDisks {
	f := &fakeDisks{t: t, later: later}
	f.diskFinder = diskFinder{t.TempDir(), t.TempDir(), f.pass, func() time.Time { return f.time }}
	return f
}

func (f *fakeDisks) pass(d time.Duration) {
	f.time = f.time.Add(d)
	var err error
	if f.node != "" {
		err = os.WriteFile(f.node, nil, 0o600)
	}
	if f.node = ""; len(f.later) > 0 {
		name, serial := f.later[0][0], f.later[0][1]
		f.node, f.later = filepath.Join(f.dev, name), f.later[1:]
		device := filepath.Join(f.sys, "block", name, "device")
		page := append([]byte{0, 0x80, 0, byte(len(serial))}, serial...)
		err = errors.Join(err, os.MkdirAll(device, 0o755),
			os.WriteFile(filepath.Join(device, "vpd_pg80"), page, 0o600))
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

// TestDiskEnvironment: variables have the nodes of their disks, in the order of the serial numbers
// and not in that of the nodes, however late the disks come. Those of the user stay.
func TestDiskEnvironment(t *testing.T) {
	f := newFakeDisks(t, [2]string{"sdb", "other"}, [2]string{"sdd", "gvm-scratch-1"}, [2]string{"sdc", "gvm-scratch-10"},
		[2]string{"sda", "gvm-scratch-2"})
	if err := os.MkdirAll(filepath.Join(f.sys, "block", "loop0"), 0o755); err != nil { // no SCSI device
		t.Fatal(err)
	}
	cmd := &wire.Command{Env: []text.Name{"A=b", "OWN=mine"}, Disks: []wire.DiskVariable{
		{Name: "ALL", Serials: []string{"gvm-scratch-1", "gvm-scratch-2"}},
		{Name: "OWN", Serials: []string{"gvm-scratch-1"}},
		{Name: "LAST", Serials: []string{"gvm-scratch-10"}},
	}}
	if err := f.environment(cmd); err != nil {
		t.Fatal(err)
	}
	want := []text.Name{"A=b", "OWN=mine", text.Name("ALL=" + f.dev + "/sdd " + f.dev + "/sda"),
		text.Name("LAST=" + f.dev + "/sdc")}
	if !slices.Equal(cmd.Env, want) {
		t.Errorf("%q, want %q", cmd.Env, want)
	}
	if _, err := os.Stat(filepath.Join(f.dev, "sda")); err != nil { // the last to come
		t.Error(err)
	}
}

// TestDiskMissing: a disk that does not come ends the wait.
func TestDiskMissing(t *testing.T) {
	f := newFakeDisks(t, [2]string{"sda", "one"})
	cmd := &wire.Command{Disks: []wire.DiskVariable{{Name: "A", Serials: []string{"one", "two"}}}}
	err := f.environment(cmd)
	if err == nil || !strings.Contains(err.Error(), "the disk with the serial number two is not in ") || cmd.Env != nil {
		t.Errorf("%v, %q", err, cmd.Env)
	}
	if f.time.Sub(time.Time{}) < diskPatience {
		t.Errorf("gave up after %s", f.time.Sub(time.Time{}))
	}
}

// TestUnitSerial reads pages that are short or padded.
func TestUnitSerial(t *testing.T) {
	for page, want := range map[string]string{
		"": "", "\x00\x80\x00": "", "\x00\x80\x00\x05": "", "\x00\x80\x00\x05ab": "ab", "\x00\x80\x00\x02abc": "ab",
		"\x00\x80\x00\x05 ab  ": "ab", "\x00\x80\xff\xffabc": "abc",
	} {
		if got := unitSerial([]byte(page)); got != want {
			t.Errorf("%q: %q, want %q", page, got, want)
		}
	}
}
