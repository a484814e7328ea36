package conformance

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

func TestParse(t *testing.T) {
	v := Parse("    [SKIPPED] of none\nSuite: Read6\n  Test: Simple ...    Test READ6\n    [OK] READ6\n" +
		"  Test: BeyondEol ...\n    [FAILED] READ6 command\n    [FAILED] again\n" +
		"    1. test.c:7  - CU_FAIL\n  Test: Probe ...\n    [FAILED] as it should\n" +
		"  Test: Rmb ...    [SKIPPED] not removable\n    [SKIPPED] twice\nSuite:\n    [SKIPPED] of another run\n" +
		"Suite: Write6\n  Test: Simple ...\n    1. test.c:20  - CU_FAIL\n")
	want := Verdicts{"Read6.Simple": "PASS", "Read6.BeyondEol": "FAIL READ6 command", "Read6.Probe": "PASS",
		"Read6.Rmb": "SKIP not removable", "Write6.Simple": "FAIL 1. test.c:20  - CU_FAIL"}
	if len(v) != len(want) {
		t.Errorf("%d verdicts: %v", len(v), v)
	}
	for name, verdict := range want {
		if v[name] != verdict {
			t.Errorf("%s: %q, want %q", name, v[name], verdict)
		}
	}
	if n := v.Count(); n["PASS"] != 2 || n["FAIL"] != 2 || n["SKIP"] != 1 {
		t.Errorf("count %v", n)
	}
	if names := v.With("FAIL"); !slices.Equal(names, []string{"Read6.BeyondEol", "Write6.Simple"}) {
		t.Errorf("failed: %v", names)
	}
}

// TestTarget: the in-process target fails no test, and passes all tests that it passed before.
func TestTarget(t *testing.T) {
	suite, err := exec.LookPath("iscsi-test-cu")
	if err != nil {
		t.Skip("needs iscsi-test-cu, of Debian's libiscsi-bin")
	}
	environment := preload(t)
	for _, v := range []struct {
		list    string // of passed tests, in testdata
		unit    scsi.UnitConfig
		thick   bool
		destroy bool
		fails   []string // not caused by the target
	}{
		{"512", scsi.UnitConfig{}, false, true, nil},
		{"4096", scsi.UnitConfig{BlockSize: 4096}, false, true, nil},
		{"thick", scsi.UnitConfig{Cache: scsi.WriteThrough, Serial: "thick"}, true, true, nil},
		// The first three write although the suite was told not to. The others expect a
		// registration that the suite did not let them make.
		{"readonly", scsi.UnitConfig{ReadOnly: true}, false, false,
			[]string{"WriteVerify10.Dpo", "WriteVerify12.Dpo", "WriteVerify16.Dpo",
				"PrinReadKeys.Truncate", "ProutRegister.Simple", "ProutReserve.Simple"}},
	} {
		t.Run(v.list, func(t *testing.T) {
			t.Parallel()
			file, err := block.Open(filepath.Join(t.TempDir(), "disk"), block.Options{Size: Size})
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			v.unit.Backend = file
			if v.thick {
				v.unit.Backend = struct{ block.Backend }{file}
			}
			u, err := scsi.NewUnit(v.unit)
			if err != nil {
				t.Fatal(err)
			}
			socket := serve(t, u)
			runs := [][]string{{"-t", "ALL"}}
			if v.destroy {
				runs[0] = append(runs[0], DestroyFlag)
				for _, test := range Sanitize {
					runs = append(runs, []string{DestroyFlag, SanitizeFlag, "-t", test})
				}
			}
			var output strings.Builder
			for _, args := range runs {
				cmd := exec.Command(suite, slices.Concat(strings.Fields(Flags), args, []string{"/dev/sg0"})...)
				cmd.Env = environment(socket)
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
					t.Fatalf("%v: %v\n%s", args, err, out[max(0, len(out)-2000):])
				}
				fmt.Fprintf(&output, "Suite:\n%s\n", out)
			}
			got := Parse(output.String())
			for _, name := range got.With("FAIL") {
				if !slices.Contains(v.fails, name) {
					t.Errorf("%s: %s", name, got[name])
				}
			}
			list, err := os.ReadFile(filepath.Join("testdata", v.list+".txt"))
			if err != nil {
				t.Fatal(err)
			}
			want := strings.Fields(string(list))
			for _, name := range want {
				if got[name] != "PASS" {
					t.Errorf("%s does not pass: %q", name, got[name])
				}
			}
			for _, name := range got.With("PASS") {
				if !slices.Contains(want, name) {
					t.Errorf("%s passes, and is not in testdata/%s.txt", name, v.list)
				}
			}
			t.Logf("%d tests: %v", len(got), got.Count())
		})
	}
}

// serve serves units as the LUNs of one target at the sockets that testdata/sgio.c connects to. All
// connections belong to one initiator, like all opens of /dev/sg0.
func serve(t *testing.T, units ...*scsi.Unit) string {
	target := scsi.NewTarget()
	socket := filepath.Join(t.TempDir(), "socket")
	for i, u := range units {
		lun, _ := scsi.EncodeLUN(i)
		if err := target.Attach(lun, u); err != nil {
			t.Fatal(err)
		}
	}
	for i := range units {
		lun, _ := scsi.EncodeLUN(i)
		if err := scsitest.Ready(target, lun); err != nil {
			t.Fatal(err)
		}
		name := socket
		if i > 0 {
			name += strconv.Itoa(i)
		}
		l, err := net.Listen("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		var served sync.WaitGroup
		served.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return // the listener is closed
				}
				served.Go(func() {
					defer c.Close()
					for answer(c, target, lun) == nil {
					}
				})
			}
		})
		t.Cleanup(func() {
			l.Close()
			served.Wait()
		})
	}
	return socket
}

// resets are the task management functions for the requests of SG_SCSI_RESET (scsi/sg.h).
var resets = map[uint32]func(*scsi.Target, scsi.LUN) scsi.TaskResponse{
	1: (*scsi.Target).LogicalUnitReset,                                               // device
	4: func(t *scsi.Target, _ scsi.LUN) scsi.TaskResponse { return t.NexusReset(0) }, // target
}

// answer does one command.
func answer(c net.Conn, target *scsi.Target, lun scsi.LUN) error {
	le := binary.LittleEndian
	var head [16]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	cdb, out, in := make([]byte, le.Uint32(head[:])), make([]byte, le.Uint32(head[4:])), make([]byte, le.Uint32(head[8:]))
	for _, b := range [][]byte{cdb, out} {
		if _, err := io.ReadFull(c, b); err != nil {
			return err
		}
	}
	if what := le.Uint32(head[12:]) &^ 0x100; what != 0 { // SG_SCSI_RESET_NO_ESCALATE
		failed := uint32(1)
		if reset := resets[what]; reset != nil && reset(target, lun) == scsi.FunctionComplete {
			failed = 0
		}
		clear(head[:])
		le.PutUint32(head[:], failed)
		_, err := c.Write(head[:])
		return err
	}
	cmd := &scsi.Command{LUN: lun, CDB: append(cdb, make([]byte, 32-min(32, len(cdb)))...)} // padded as by virtio-scsi
	if len(out) > 0 {
		cmd.Out = [][]byte{out}
	}
	if len(in) > 0 {
		cmd.In = [][]byte{in}
	}
	a := scsitest.Run(target, cmd)
	le.PutUint32(head[:], uint32(a.Status))
	le.PutUint32(head[4:], uint32(len(a.Sense)))
	le.PutUint32(head[8:], a.Residual)
	_, err := c.Write(slices.Concat(head[:], a.Sense, in))
	return err
}

// preload compiles testdata/sgio.c and returns the environment for a program that uses it, with
// devices at a socket.
func preload(t *testing.T) func(socket string) []string {
	shim := filepath.Join(t.TempDir(), "sgio.so")
	gcc := exec.Command("gcc", "-Wall", "-shared", "-fPIC", "-o", shim, "testdata/sgio.c")
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return func(socket string) []string { return append(os.Environ(), "LD_PRELOAD="+shim, "SGIO_SOCKET="+socket) }
}
