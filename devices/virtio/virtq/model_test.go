//go:build built

package virtq_test

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestModel has spin visit every state of the model of the split virtqueue. With a rule taken out
// by a macro spin has to find a fault.
func TestModel(t *testing.T) {
	for _, event := range []string{" -DEVENT_IDX=0", " -DEVENT_IDX=1"} {
		for _, small := range []string{"-DQSIZE=1 -DMASK=1", "-DQSIZE=1 -DMASK=3"} {
			spin(t, small+event, "-DSAFETY", false)
			spin(t, small+event, "-DNP", false)
		}
		spin(t, "-DQSIZE=2 -DMASK=3"+event, "-DSAFETY", false)
		for _, broken := range []string{"NO_NOTIFY_FENCE", "NO_USED_EVENT_FENCE", "NO_INTERRUPT_FENCE",
			"NO_AVAIL_EVENT_FENCE", "NO_LOOK_OF_DRIVER", "NO_LOOK_OF_DEVICE", "IDX_BEFORE_ENTRY"} {
			spin(t, "-DQSIZE=2 -DMASK=3 -D"+broken+event, "-DSAFETY", true)
		}
		// An index that wraps with the ring does not tell a full one from an empty one.
		spin(t, "-DQSIZE=2 -DMASK=1"+event, "-DSAFETY", true)
	}
	spin(t, "-DQSIZE=2 -DMASK=3 -DEVENT_IDX=1 -DLAST_EVENT_ONLY", "-DSAFETY", true)
}

// spin checks the model with some macros, for faults (check -DSAFETY) or for cycles without
// progress (-DNP), and reports whether it has an error as expected.
func spin(t *testing.T, macros, check string, broken bool) {
	t.Helper()
	model, err := filepath.Abs("testdata/models/split.pml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	run := func(name string, args ...string) []byte {
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", cmd, err, out)
		}
		return out
	}
	run("spin", append(strings.Fields(macros), "-a", model)...)
	run("gcc", "-O1", check, "-o", "pan", "pan.c")
	args := []string{"-n", "-m3000000"}
	if check == "-DNP" {
		args = append(args, "-l", "-f") // each process that can go on does
	}
	out := run("./pan", args...)
	errors := regexp.MustCompile(`errors: (\d+)`).FindSubmatch(out)
	states := regexp.MustCompile(`(\d+) states, stored`).FindSubmatch(out)
	if errors == nil || states == nil || bytes.Contains(out, []byte("max search depth too small")) ||
		(string(errors[1]) != "0") != broken {
		t.Errorf("%s %s: expected a fault: %t\n%s", macros, check, broken, out)
		return
	}
	found := ""
	if broken {
		found, _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
		found = ": " + found
	}
	t.Logf("%s %s: %s states%s", macros, check, states[1], found)
}
