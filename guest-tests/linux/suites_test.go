//go:build built

package linux

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"gvm/guest-tests/lab"
)

// A suite is tests of Linux that others maintain. The variable env names its tree, which is built.
type suite struct {
	name, env string
	// setup is a shell's script before the first test, and check runs the test $t.
	setup, check string
	disks        int
	// list returns the tests that a word of $TESTS stands for.
	list func(dir, word string) ([]string, error)
	// outcome finds the verdict and its reason in the output of check.
	outcome func(out string) (verdict, reason string)
}

// An outcome is the result of one test on the disks of one way.
type outcome struct {
	Test    string `json:"test"`
	Way     string `json:"way"`
	Verdict string `json:"verdict"` // passed, failed, not run, timed out, or lost: its guest had no end
	Reason  string `json:"reason,omitempty"`
	Seconds int    `json:"seconds"`
}

// suiteDisk is the size of each disk.
const suiteDisk = 2 << 30

// suiteLimit is the time that a test has: $LIMIT seconds, or two minutes.
func suiteLimit() time.Duration {
	if s, err := strconv.Atoi(os.Getenv("LIMIT")); err == nil {
		return time.Duration(s) * time.Second
	}
	return 2 * time.Minute
}

// suiteCPUs is the number of a guest's CPUs: the lab, with one, loses guests of more under such loads.
func suiteCPUs() string {
	if os.Getenv(lab.InLabEnv) == "1" {
		return "1"
	}
	return "4"
}

// A suiteWay runs a shell's script in a guest with empty disks, the host's files below an overlay, and the
// suite's tree. It returns the output, and how the guest ended if not by the script's end.
type suiteWay struct {
	name string
	run  func(t *testing.T, k *lab.Kernel, dir string, disks int, script string) (out string, err error)
}

// suiteWays are all ways, of which $WAYS may name some.
var suiteWays = []suiteWay{
	{"process", func(t *testing.T, k *lab.Kernel, dir string, disks int, script string) (string, error) {
		return suiteOnGVM(k, dir, script, "--scratch", fmt.Sprintf("%dx%d", disks, suiteDisk))
	}},
	{"vhost", func(t *testing.T, k *lab.Kernel, dir string, disks int, script string) (string, error) {
		var args []string
		for _, file := range suiteFiles(t, disks) {
			args = append(args, "--disk", file+",backend=vhost")
		}
		return suiteOnGVM(k, dir, script, args...)
	}},
	{"qemu", func(t *testing.T, k *lab.Kernel, _ string, disks int, script string) (string, error) {
		file := filepath.Join(t.TempDir(), "script")
		must(t, os.WriteFile(file, []byte(script), 0o644))
		g := guest{kernel: k, modules: []string{"9p", "9pnet_virtio", "overlay", "sg"},
			files: map[string]string{"script": file}, script: `mkdir /host /memory /system
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro host /host
mount -t tmpfs memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /system
for d in proc sys dev; do mount -t tmpfs none /system/$d; mount --move /$d /system/$d; done
cp /script /system/script
chroot /system /bin/bash /script 2>&1 | cat # a terminal would get colors
exec 0</system/dev/console
mount --move /system/proc /proc
echo
echo "= ended"
`}
		q, err := theLab(t).QEMUs(t.Context())
		must(t, err)
		args := append(qemuArgs("q35", k.BZImage, g.initramfs(t)), "-smp", suiteCPUs(), "-m", "2048",
			"-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
			"-device", "virtio-9p-pci,fsdev=host,mount_tag=host", "-device", "virtio-scsi-pci")
		for i, file := range suiteFiles(t, disks) {
			args = append(args, "-device", fmt.Sprintf("scsi-hd,drive=d%d", i), "-drive",
				fmt.Sprintf("if=none,id=d%d,format=raw,cache=unsafe,discard=unmap,file=%s", i, file))
		}
		out, err := suiteRun(q[len(q)-1].Path, args...)
		out = strings.ReplaceAll(out, "\r", "")
		if err == nil && !strings.Contains(out, "\n= ended\n") {
			err = errors.New("the guest was lost")
		}
		return out, err
	}},
}

func suiteOnGVM(k *lab.Kernel, dir, script string, disks ...string) (string, error) {
	args := append([]string{"test", "-k", k.BZImage, "--cpus", suiteCPUs(), "--memory", "2G", "--oops=ignore",
		"--module", "sg", "--root", "/", "--ro", dir}, disks...)
	return suiteRun(lab.Program("gvm"), append(args, "--", "bash", "-c", script)...)
}

func suiteRun(program string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	// A boot takes less, and a test that has no end is killed before: the guest is lost, or a process in it
	// does not die.
	silence := suiteLimit() + 2*time.Minute
	silent := time.AfterFunc(silence, func() { stop(fmt.Errorf("no output for %v", silence)) })
	defer silent.Stop()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+cacheHome)
	// It takes long: show it at once.
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, os.Stderr, sign{func() { silent.Reset(silence) }}), &errs
	err := cmd.Run()
	if late := context.Cause(ctx); late != nil {
		err = late
	}
	if err != nil {
		lines := strings.Split(strings.TrimSpace(errs.String()), "\n")
		err = fmt.Errorf("%w: %s", err, lines[len(lines)-1])
	}
	return out.String(), err
}

// sign calls a function at each Write.
type sign struct{ f func() }

func (s sign) Write(p []byte) (int, error) {
	s.f()
	return len(p), nil
}

// suiteFiles makes the files of empty disks.
func suiteFiles(t *testing.T, n int) (files []string) {
	for range n {
		file := diskFile(t, nil)
		must(t, os.Truncate(file, suiteDisk))
		files = append(files, file)
	}
	return files
}

// TestBlktests runs the tests of blktests that $TESTS names, of groups and single ones, in guests with a
// disk of each backend of gvm, and with one of QEMU's.
func TestBlktests(t *testing.T) {
	status := regexp.MustCompile(`(?m) \[(passed|failed|not run)\]$`)
	noise := regexp.MustCompile(`^(runtime |--- |\+\+\+ |@@ |Running |$)|^\S+/\d+ .*\)( +\[.*\])?$`)
	suite{
		name: "blktests", env: "BLKTESTS", disks: 1,
		setup: "export TEST_DEVS=/dev/sda TIMEOUT=10", check: "./check -o /tmp/results $t",
		list: func(dir, word string) ([]string, error) {
			if strings.Contains(word, "/") {
				return []string{word}, nil
			}
			return filepath.Glob(filepath.Join(dir, "tests", word, "[0-9][0-9][0-9]"))
		},
		outcome: func(out string) (verdict, reason string) {
			for _, m := range status.FindAllStringSubmatch(out, -1) {
				if verdict == "" || verdict == "not run" || m[1] == "failed" {
					verdict = m[1]
				}
			}
			var reasons []string
			for line := range strings.Lines(out) {
				if line = strings.TrimSpace(line); verdict != "passed" && !noise.MatchString(line) {
					reasons = append(reasons, line)
				}
			}
			return verdict, strings.Join(reasons[:min(len(reasons), 3)], "; ")
		},
	}.run(t)
}

// TestXfstests runs the tests of xfstests that $TESTS names, of groups such as quick and single ones, on
// the file system $FSTYP, in the same guests with five disks.
func TestXfstests(t *testing.T) {
	fs := os.Getenv("FSTYP")
	counted := regexp.MustCompile(`(?m)^(Not run|Failures|Passed all 1 tests)`)
	reason := regexp.MustCompile(`(?m)^\w+/\d+ +(?:\d+s \.\.\. +)?(.*)$`)
	suite{
		name: "xfstests-" + fs, env: "XFSTESTS", disks: 5,
		setup: "export FSTYP=" + fs + ` TEST_DEV=/dev/sda SCRATCH_DEV_POOL="/dev/sdb /dev/sdc /dev/sdd" LOGWRITES_DEV=/dev/sde
export TEST_DIR=/mnt/test SCRATCH_MNT=/mnt/scratch RESULT_BASE=/tmp/results
mkdir -p $TEST_DIR $SCRATCH_MNT $RESULT_BASE
mkfs.$FSTYP $TEST_DEV >/dev/null 2>&1`,
		check: "./check $t",
		list: func(dir, word string) (tests []string, err error) {
			if strings.Contains(word, "/") {
				return []string{word}, nil
			}
			for _, group := range []string{"generic", "shared", fs} {
				b, err := os.ReadFile(filepath.Join(dir, "tests", group, "group.list"))
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					return nil, err
				}
				for line := range strings.Lines(string(b)) {
					if f := strings.Fields(line); len(f) > 1 && f[0] != "#" && slices.Contains(f[1:], word) {
						tests = append(tests, group+"/"+f[0])
					}
				}
			}
			return tests, nil
		},
		outcome: func(out string) (string, string) {
			verdict := map[string]string{"Not run": "not run", "Failures": "failed",
				"Passed all 1 tests": "passed"}[counted.FindString(out)]
			if m := reason.FindStringSubmatch(out); m != nil && verdict != "passed" {
				return verdict, strings.TrimPrefix(m[1], "[not run] ")
			}
			return verdict, ""
		},
	}.run(t)
}

// run runs the suite in each way, and writes a table, JSON and JUnit to -outputdir. It fails if a test
// passes on QEMU's disk alone.
func (s suite) run(t *testing.T) {
	dir, words := os.Getenv(s.env), strings.Fields(os.Getenv("TESTS"))
	var tests []string
	for _, word := range words {
		some, err := s.list(dir, word)
		must(t, err)
		if len(some) == 0 {
			t.Fatalf("no tests of %s in %s", word, dir)
		}
		for _, name := range some {
			name = strings.TrimPrefix(name, filepath.Join(dir, "tests")+"/")
			if _, err := os.Stat(filepath.Join(dir, "tests", name)); err != nil {
				t.Fatal(err)
			}
			tests = append(tests, name)
		}
	}
	if only := os.Getenv("WAYS"); only != "" {
		suiteWays = slices.DeleteFunc(suiteWays, func(w suiteWay) bool {
			return !slices.Contains(strings.Fields(only), w.name)
		})
	}
	var all []outcome
	for _, way := range suiteWays {
		tries := 0
		for left := tests; len(left) > 0; {
			out, err := way.run(t, theLab(t).Debian, dir, s.disks, s.script(theLab(t).Debian, dir, left))
			done := s.outcomes(out, way.name)
			if len(done) == 0 && err == nil {
				t.Fatalf("%s: no test began:\n%s", way.name, out)
			}
			if len(done) < len(left) && (len(done) == 0 || !done[len(done)-1].endless()) {
				done = append(done, outcome{Test: left[len(done)], Way: way.name, Verdict: "lost"})
			}
			if last := &done[len(done)-1]; last.Verdict == "lost" && err != nil {
				last.Reason = err.Error()
				if tries++; tries < 4 && os.Getenv(lab.InLabEnv) == "1" && lost.MatchString(last.Reason) {
					t.Logf("%s on %s: the lab lost a guest", last.Test, way.name)
					done = done[:len(done)-1]
				}
			}
			for _, o := range done {
				t.Logf("%s on %s: %s in %d s %s", o.Test, o.Way, o.Verdict, o.Seconds, o.Reason)
			}
			all, left = append(all, done...), left[len(done):]
		}
	}
	s.report(t, tests, all)
}

// script returns the script that runs tests one after the other. It ends after one that has no end.
func (s suite) script(k *lab.Kernel, dir string, tests []string) string {
	return fmt.Sprintf(`
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mkdir -p /lib/modules
ln -s %s /lib/modules/
ln -s %s /boot/
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
modprobe -q configfs
mount -t configfs none /sys/kernel/config
mount -t debugfs none /sys/kernel/debug
for d in a b c d e; do
	[ $d = a ] || [ %d != 1 ] || break
	until [ -b /dev/sd$d ]; do sleep 0.1; done
done
cd %s
%s
for t in %s; do
	echo "=== $t"
	start=$(date +%%s)
	export t
	timeout -s KILL %d %s </dev/null 2>&1
	[ $? != 137 ] || killed=killed
	echo "--- $t $(($(date +%%s) - start)) $killed"
	[ -z "$killed" ] || exit 0
done
`, k.Modules, filepath.Join(filepath.Dir(k.BZImage), "config-"+k.Release), s.disks, dir, s.setup,
		strings.Join(tests, " "), int(suiteLimit().Seconds()), s.check)
}

var suiteTest = regexp.MustCompile(`(?ms)^=== (\S+)\n(.*?)(?:^--- (\S+) (\d+) (killed)?$|\z)`)

// outcomes finds the results of tests in the output of script.
func (s suite) outcomes(out, way string) (all []outcome) {
	for _, m := range suiteTest.FindAllStringSubmatch(out, -1) {
		o := outcome{Test: m[1], Way: way, Verdict: "lost"}
		switch {
		case m[3] != m[1]:
		case m[5] != "":
			o.Verdict, o.Reason = "timed out", fmt.Sprintf("no end in %v", suiteLimit())
		default:
			if o.Verdict, o.Reason = s.outcome(m[2]); o.Verdict == "" {
				o.Verdict = "failed"
				o.Reason = "no verdict: " + strings.ReplaceAll(strings.TrimSpace(m[2]), "\n", "; ")
			}
		}
		o.Seconds, _ = strconv.Atoi(m[4])
		all = append(all, o)
	}
	return all
}

// endless tells whether the test had no end; its guest ran no other after it.
func (o outcome) endless() bool { return o.Verdict == "lost" || o.Verdict == "timed out" }

// report writes the outcomes.
func (s suite) report(t *testing.T, tests []string, all []outcome) {
	type problem struct {
		Message string `xml:"message,attr"`
	}
	type testcase struct {
		Class   string   `xml:"classname,attr"`
		Name    string   `xml:"name,attr"`
		Time    int      `xml:"time,attr"`
		Failure *problem `xml:"failure"`
		Skipped *problem `xml:"skipped"`
	}
	var cases []testcase
	of := map[[2]string]outcome{}
	for _, o := range all {
		of[[2]string{o.Test, o.Way}] = o
		c := testcase{Class: s.name + "." + o.Way, Name: o.Test, Time: o.Seconds}
		switch o.Verdict {
		case "failed", "lost", "timed out":
			c.Failure = &problem{o.Verdict + ": " + o.Reason}
		case "not run":
			c.Skipped = &problem{o.Reason}
		}
		cases = append(cases, c)
	}
	var table, reasons strings.Builder
	head := []string{s.name}
	for _, way := range suiteWays {
		head = append(head, way.name)
	}
	fmt.Fprintf(&table, "| %s | |\n|%s\n", strings.Join(head, " | "), strings.Repeat("---|", len(head)+1))
	for _, test := range tests {
		row := []string{test}
		reasons.Reset()
		for _, way := range suiteWays {
			o := of[[2]string{test, way.name}]
			row = append(row, o.Verdict)
			if o.Reason != "" && !strings.Contains(reasons.String(), o.Reason) {
				reasons.WriteString(strings.ReplaceAll(o.Reason, "|", `\|`) + ". ")
			}
		}
		fmt.Fprintf(&table, "| %s | %s |\n", strings.Join(row, " | "), strings.TrimSpace(reasons.String()))
		qemu := of[[2]string{test, "qemu"}].Verdict
		for _, way := range suiteWays {
			if o := of[[2]string{test, way.name}]; o.Verdict != qemu && (o.Verdict == "failed" || o.endless()) {
				t.Errorf("%s: %q with %s, %q with qemu", test, o.Verdict, way.name, qemu)
			}
		}
	}
	fmt.Printf("\n%s", &table)
	out := flag.Lookup("test.outputdir").Value.String()
	if out == "" {
		return
	}
	results, err := json.MarshalIndent(all, "", "\t")
	junit, xmlErr := xml.MarshalIndent(struct {
		XMLName xml.Name   `xml:"testsuite"`
		Name    string     `xml:"name,attr"`
		Tests   int        `xml:"tests,attr"`
		Cases   []testcase `xml:"testcase"`
	}{Name: s.name, Tests: len(cases), Cases: cases}, "", "\t")
	must(t, errors.Join(err, xmlErr))
	write := func(suffix, text string) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(out, s.name+suffix), []byte(text), 0o666))
	}
	write(".json", string(results)+"\n")
	write(".xml", string(junit)+"\n")
	write(".md", table.String())
}
