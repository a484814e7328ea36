package linux

import (
	"cmp"
	"debug/elf"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"gvm/guest-tests/lab"
)

// A suite is tests of Linux that others maintain. The variable env names its tree, which is built.
type suite struct {
	name, env string
	// setup is a shell's script before the first test, and check runs the test $t. If batch is not 0,
	// check has up to so many tests as arguments instead: see watch.
	setup, check string
	batch        int
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

// suiteLimit is the time that a test has: $LIMIT seconds, or two minutes.
func suiteLimit() time.Duration {
	if s, err := strconv.Atoi(os.Getenv("LIMIT")); err == nil {
		return time.Duration(s) * time.Second
	}
	return 2 * time.Minute
}

// A processor is that of the suites' guests: their number of CPUs, and QEMU's words for it.
type processor struct {
	cpus string
	qemu []string
}

// processorOf returns the processor of the lab, or of a machine whose KVM runs Linux. On another,
// which has none or one that emulates the guest's kernel, QEMU emulates a processor itself.
func processorOf(inLab, linux bool, cpus string) processor {
	switch {
	case inLab:
		return processor{cmp.Or(cpus, "1"), qemuKVM}
	case linux:
		return processor{cmp.Or(cpus, "4"), qemuKVM}
	}
	return processor{cmp.Or(cpus, "1"), []string{"-accel", "tcg", "-cpu", "max,-erms,-fsrm"}}
}

// A suiteWay runs a shell's script in a guest with empty disks, and the host's files below an
// overlay, those of dir among them. It calls progress with the output so far whenever there is
// more. It returns the output, and how the guest ended if not by the script's end.
type suiteWay struct {
	name string
	run  func(t *testing.T, k *lab.Kernel, dir string, disks int, script string, progress func(out string)) (
		out string, err error)
}

// run runs the tests that $TESTS names in each way, except those that have an outcome in out's JSON
// from a run that was interrupted. It writes JSON to out after each test, and a table and JUnit at
// the end. It fails if a test passes on QEMU's disk alone.
func (s suite) run(t *testing.T, k *lab.Kernel, ways []suiteWay, out string) {
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
	all := s.load(t, out)
	only := strings.Fields(cmp.Or(os.Getenv("WAYS"), "process vhost qemu"))
	archive := s.archive(t, dir)
	for _, way := range ways {
		if slices.Contains(only, way.name) {
			all = s.runWay(t, k, way, dir, archive, out, tests, all)
		}
	}
	s.report(t, out, all)
}

// runWay runs those of tests that all has no outcome of, and returns all with theirs.
func (s suite) runWay(t *testing.T, k *lab.Kernel, way suiteWay, dir, archive, to string,
	tests []string, all []outcome) []outcome {
	left := s.left(tests, way.name, all)
	for tries := 0; len(left) > 0; {
		ended, some := 0, left
		if s.batch > 0 {
			some = left[:min(s.batch, len(left))]
		}
		out, err := way.run(t, k, filepath.Dir(archive), s.disks, s.script(k, dir, archive, some), func(out string) {
			if n := strings.Count(out, "\n--- "); n > ended {
				ended = n
				s.save(t, to, merge(all, s.outcomes(out, way.name)))
			}
		})
		done := s.outcomes(out, way.name)
		if len(done) == 0 && err == nil {
			t.Fatalf("%s: no test began:\n%s", way.name, out)
		}
		// A check that ends by itself before its last test leaves the rest to the next guest.
		if err != nil && len(done) < len(some) && (len(done) == 0 || !done[len(done)-1].endless()) {
			done = append(done, outcome{Test: some[len(done)], Way: way.name, Verdict: "lost"})
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
		all, left = merge(all, done), left[len(done):]
		s.save(t, to, all)
	}
	return all
}

// left returns the tests without an outcome in a way, and after them those that were lost.
func (s suite) left(tests []string, way string, all []outcome) (left []string) {
	var again []string
	for _, test := range tests {
		switch i := slices.IndexFunc(all, func(o outcome) bool { return o.Test == test && o.Way == way }); {
		case i < 0:
			left = append(left, test)
		case all[i].Verdict == "lost":
			again = append(again, test)
		}
	}
	return append(left, again...)
}

// merge returns the outcomes of both, in the order of tests, with those of more in place of all's.
func merge(all, more []outcome) []outcome {
	all = slices.DeleteFunc(slices.Clone(all), func(o outcome) bool {
		return slices.ContainsFunc(more, func(m outcome) bool { return m.Test == o.Test && m.Way == o.Way })
	})
	all = append(all, more...)
	slices.SortStableFunc(all, func(a, b outcome) int { return strings.Compare(a.Test, b.Test) })
	return all
}

// load returns the outcomes that out has of a run before, if any.
func (s suite) load(t *testing.T, out string) (all []outcome) {
	file := filepath.Join(out, s.name+".json")
	b, err := os.ReadFile(file)
	if out == "" || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	must(t, err)
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatalf("%s has no outcomes of a run before: %v; remove it", file, err)
	}
	return all
}

// save writes the outcomes.
func (s suite) save(t *testing.T, out string, all []outcome) {
	if out == "" {
		return
	}
	b, err := json.MarshalIndent(all, "", "\t")
	must(t, err)
	file := filepath.Join(out, s.name+".json")
	must(t, os.WriteFile(file+".new", append(b, '\n'), 0o666))
	must(t, os.Rename(file+".new", file))
}

// script returns the script that runs tests one after the other. It ends after one that has no end.
// In QEMU's guest it runs below chroot, of which udevadm would tell in the output of a test.
func (s suite) script(k *lab.Kernel, dir, archive string, tests []string) string {
	return fmt.Sprintf(`
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root SYSTEMD_IGNORE_CHROOT=1
mkdir -p /lib/modules
mount -t tmpfs modules /lib/modules
%s
%s
ln -s %s /boot/
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
modprobe -q configfs
mount -t configfs none /sys/kernel/config
mount -t debugfs none /sys/kernel/debug
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup
for d in a b c d e; do
	[ $d = a ] || [ %d != 1 ] || break
	until [ -b /dev/sd$d ]; do sleep 0.1; done
done
mkdir -p %[5]s
mount -t tmpfs -o mode=755 tree %[5]s
tar -C %[5]s -xf %[6]s
cd %[5]s
%[7]s
%[8]s`, inMemory(), linkModules(k.Modules, "/lib/modules/"+k.Release),
		filepath.Join(filepath.Dir(k.BZImage), "config-"+k.Release), s.disks, dir, archive,
		s.setup, s.loop(tests))
}

// archive makes an archive of the suite's tree for the guests' memory, and returns its name. Of a
// tree of the host's a guest opens each file again at each use, which takes the lab long, and it
// could not write beside them as some tests of xfstests do.
func (s suite) archive(t *testing.T, dir string) string {
	file := filepath.Join(t.TempDir(), "tree.tar")
	if out, err := exec.Command("tar", "-C", dir, "--exclude=./.git", "--exclude=*.o", "-cf", file, ".").
		CombinedOutput(); err != nil {
		t.Fatalf("tar of %s: %v: %s", dir, err, out)
	}
	return file
}

// loop returns the end of script, which frames the output of each test by two lines: "=== TEST",
// and "--- TEST SECONDS", to which it adds " killed" if the test had no end.
func (s suite) loop(tests []string) string {
	names, limit := strings.Join(tests, " "), int(suiteLimit().Seconds())
	if s.batch > 0 {
		return watch(limit, s.check, names)
	}
	return fmt.Sprintf(`
for t in %s; do
	echo "=== $t"
	start=$(date +%%s)
	export t
	timeout -s KILL %d %s </dev/null 2>&1
	[ $? != 137 ] || killed=killed
	echo "--- $t $(($(date +%%s) - start)) $killed"
	[ -z "$killed" ] || exit 0
done
`, names, limit, s.check)
}

// suitePrograms are those that the suites' scripts run again and again.
const suitePrograms = `awk basename bash blkdiscard blockdev cat chmod chown cmp cp cut date dd df diff dirname dmesg
du e2fsck egrep env expr fgrep find fio fsck fstrim gawk getconf getfattr getopt grep head hexdump hostname id kill
ln logger losetup ls lsblk md5sum mkdir mkfs mkfs.ext4 mkfs.xfs mktemp modinfo modprobe mount mountpoint mv nproc od
perl pgrep pkill ps readlink realpath rm rmdir rmmod sed seq setfattr sg_inq sg_raw sh sleep sort stat sync sysctl
tail tee timeout touch tr truncate true tune2fs udevadm umount uname uniq wc xargs xfs_db xfs_growfs xfs_info xfs_io
xfs_repair xxd`

// inMemory returns a command that copies the suites' programs and their libraries up to the guest's
// overlay. Of a program of the host's a guest opens each file again at each start: in the lab
// /bin/true takes 150 ms so, and 25 ms from memory.
var inMemory = sync.OnceValue(func() string { return "touch -ac " + strings.Join(programFiles(suitePrograms), " ") })

// programFiles returns the files of those of programs that this machine has, and of their
// libraries, without large ones, of which a program uses little.
func programFiles(programs string) []string {
	files := []string{"/etc/ld.so.cache", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group"}
	for _, name := range strings.Fields(programs) {
		for _, dir := range []string{"/usr/bin", "/usr/sbin", "/bin", "/sbin"} {
			if file := filepath.Join(dir, name); isFile(file) {
				files = append(files, file)
				break
			}
		}
	}
	for i := 0; i < len(files); i++ { // files grows by the libraries, which have libraries
		for _, library := range libraries(files[i]) {
			if !slices.Contains(files, library) {
				files = append(files, library)
			}
		}
	}
	return slices.DeleteFunc(files, func(file string) bool {
		info, err := os.Stat(file)
		return err != nil || info.Size() > 4<<20
	})
}

func isFile(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.Mode().IsRegular()
}

// libraries returns the files of the libraries that an ELF file names, and of its loader. ldd
// starts the file's loader several times, which takes a minute for all programs in the lab.
func libraries(file string) (files []string) {
	f, err := elf.Open(file)
	if err != nil {
		return nil // a script
	}
	defer f.Close()
	names, _ := f.ImportedLibraries()
	dirs, _ := f.DynString(elf.DT_RUNPATH)
	dirs = append(dirs, "/lib64", "/usr/lib64", "/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")
	for _, name := range names {
		for _, dir := range dirs {
			if library := filepath.Join(dir, name); isFile(library) {
				files = append(files, library)
				break
			}
		}
	}
	if p := f.Section(".interp"); p != nil {
		if b, err := p.Data(); err == nil {
			files = append(files, strings.TrimRight(string(b), "\x00"))
		}
	}
	return files
}

// linkModules returns a command that makes the directory to with links to all of a kernel's
// modules. Tests look for a module with find in all 900 directories, which takes a guest of the lab
// 15 to 50 s in the host's tree, and a second in its own memory.
func linkModules(modules, to string) string {
	return `perl -we '
my ($from, $to) = @ARGV;
sub parents { my ($dir) = @_; -d $dir or $dir =~ m{^(.+)/} && parents($1), mkdir $dir or die "$dir: $!\n"; }
parents($to);
symlink $_, $to . substr($_, length $from) or die "$_: $!\n" for glob "$from/modules.*";
open my $dep, "<", "$from/modules.dep" or die "$from/modules.dep: $!\n";
while (<$dep>) {
	my ($dir, $name) = m{^(.+)/([^/:]+):} or next;
	parents("$to/$dir");
	symlink "$from/$dir/$name", "$to/$dir/$name" or die "$name: $!\n";
}' ` + modules + " " + to
}

var suiteTest = regexp.MustCompile(`(?ms)^=== (\S+)\n(.*?)(?:^--- (\S+) (\d+) (killed)?$|\z)`)

// outcomes finds the results of tests in the output of script.
func (s suite) outcomes(out, way string) (all []outcome) {
	for _, m := range suiteTest.FindAllStringSubmatch(strings.ReplaceAll(out, "\r", ""), -1) {
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

// report writes a table of the outcomes, and JUnit.
func (s suite) report(t *testing.T, out string, all []outcome) {
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
	var tests []string
	of := map[[2]string]outcome{}
	for _, o := range all {
		of[[2]string{o.Test, o.Way}] = o
		tests = append(tests, o.Test)
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
	ways := []string{"process", "vhost", "qemu"}
	fmt.Fprintf(&table, "| %s | %s | |\n|---|---|---|---|---|\n", s.name, strings.Join(ways, " | "))
	for _, test := range slices.Compact(tests) {
		row := []string{test}
		reasons.Reset()
		for _, way := range ways {
			o := of[[2]string{test, way}]
			row = append(row, o.Verdict)
			if o.Reason != "" && !strings.Contains(reasons.String(), o.Reason) {
				reasons.WriteString(strings.ReplaceAll(o.Reason, "|", `\|`) + ". ")
			}
		}
		fmt.Fprintf(&table, "| %s | %s |\n", strings.Join(row, " | "), strings.TrimSpace(reasons.String()))
		qemu := of[[2]string{test, "qemu"}].Verdict
		for _, way := range ways {
			if o := of[[2]string{test, way}]; o.Verdict != qemu && (o.Verdict == "failed" || o.endless()) {
				t.Errorf("%s: %q with %s, %q with qemu", test, o.Verdict, way, qemu)
			}
		}
	}
	fmt.Printf("\n%s", &table)
	if out == "" {
		return
	}
	junit, err := xml.MarshalIndent(struct {
		XMLName xml.Name   `xml:"testsuite"`
		Name    string     `xml:"name,attr"`
		Tests   int        `xml:"tests,attr"`
		Cases   []testcase `xml:"testcase"`
	}{Name: s.name, Tests: len(cases), Cases: cases}, "", "\t")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(out, s.name+".xml"), append(junit, '\n'), 0o666))
	must(t, os.WriteFile(filepath.Join(out, s.name+".md"), []byte(table.String()), 0o666))
}

// TestSuiteContinues: the outcomes of a run are there after its end in the midst of a guest, and
// the next run does the rest, and the lost tests at last.
func TestSuiteContinues(t *testing.T) {
	dir, out := t.TempDir(), t.TempDir()
	for _, name := range []string{"block/001", "block/002", "scsi/001"} {
		file := filepath.Join(dir, "tests", name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o777))
		must(t, os.WriteFile(file, nil, 0o666))
	}
	t.Setenv("SUITE", dir)
	t.Setenv("WAYS", "")
	s := suite{name: "suite", env: "SUITE",
		list:    func(_, word string) ([]string, error) { return []string{word}, nil },
		outcome: func(out string) (verdict, reason string) { return strings.TrimSpace(out), "" }}
	// run runs tests with an end of the guest, and after it an end of the run if stop is set.
	run := func(tests, output string, stop bool) (ran string) {
		t.Helper()
		t.Setenv("TESTS", tests)
		way := suiteWay{"qemu", func(t *testing.T, _ *lab.Kernel, _ string, _ int, script string, progress func(string)) (
			string, error) {
			_, ran, _ = strings.Cut(script, "for t in ")
			ran, _, _ = strings.Cut(ran, ";")
			progress(output)
			if stop {
				panic(errStopped)
			}
			return output, nil
		}}
		defer func() {
			if r := recover(); r != nil && r != any(errStopped) {
				panic(r)
			}
		}()
		s.run(t, &lab.Kernel{}, []suiteWay{way}, out)
		return ran
	}
	const ended = "=== block/001\r\npassed\r\n--- block/001 3 \r\n"
	run("block/001 block/002 scsi/001", ended+"=== block/002\n", true)
	if all := s.load(t, out); len(all) != 2 || all[0] != (outcome{"block/001", "qemu", "passed", "", 3}) ||
		all[1].Verdict != "lost" {
		t.Errorf("a run that ended in block/002 left %v", all)
	}
	ran := run("block/001 block/002 scsi/001",
		"=== scsi/001\nnot run\n--- scsi/001 1 \n=== block/002\nfailed\n--- block/002 2 \n", false)
	if ran != "scsi/001 block/002" {
		t.Errorf("the next run ran %q, want %q", ran, "scsi/001 block/002")
	}
	const table = "| suite | process | vhost | qemu | |\n|---|---|---|---|---|\n" +
		"| block/001 |  |  | passed |  |\n| block/002 |  |  | failed |  |\n| scsi/001 |  |  | not run |  |\n"
	if b, err := os.ReadFile(filepath.Join(out, "suite.md")); err != nil || string(b) != table {
		t.Errorf("the table is\n%s%v, want\n%s", b, err, table)
	}
}

var errStopped = errors.New("stopped")

// TestSuiteProcessor: QEMU's guests have a KVM that runs Linux or none: not one that only exists.
func TestSuiteProcessor(t *testing.T) {
	for _, c := range []struct {
		inLab, linux bool
		cpus, want   string
	}{
		{true, true, "", "1 -accel kvm -cpu host"},
		{true, true, "2", "2 -accel kvm -cpu host"},
		{false, true, "", "4 -accel kvm -cpu host"},
		{false, false, "", "1 -accel tcg -cpu max,-erms,-fsrm"},
		{false, false, "2", "2 -accel tcg -cpu max,-erms,-fsrm"},
	} {
		p := processorOf(c.inLab, c.linux, c.cpus)
		if got := strings.Join(append([]string{p.cpus}, p.qemu...), " "); got != c.want {
			t.Errorf("in the lab %v, Linux on KVM %v, CPUS=%q: %q, want %q", c.inLab, c.linux, c.cpus, got, c.want)
		}
	}
}

// TestLinkModules: find sees every module below the new directory, and modprobe reads it there.
func TestLinkModules(t *testing.T) {
	from, to := filepath.Join(t.TempDir(), "modules"), filepath.Join(t.TempDir(), "lib", "6.1")
	files := map[string]string{
		"modules.dep":            "kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko\nkernel/lib/crc16.ko:\n",
		"modules.alias":          "alias",
		"kernel/fs/ext4/ext4.ko": "ext4",
		"kernel/lib/crc16.ko":    "crc16",
	}
	for name, contents := range files {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(from, name)), 0o777))
		must(t, os.WriteFile(filepath.Join(from, name), []byte(contents), 0o666))
	}
	if out, err := exec.Command("sh", "-c", linkModules(from, to)).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("%v: %s", err, out)
	}
	for name, contents := range files {
		if b, err := os.ReadFile(filepath.Join(to, name)); string(b) != contents {
			t.Errorf("%s has %q, %v; want %q", name, b, err, contents)
		}
	}
}

// TestProgramFiles: a program comes with its libraries and their loader, and one that is not there
// is left out.
func TestProgramFiles(t *testing.T) {
	files := programFiles("bash nonesuch\nldd")
	for _, name := range []string{"bash", "ldd", "libc.so.6", "ld-linux-x86-64.so.2"} {
		if !slices.ContainsFunc(files, func(f string) bool { return filepath.Base(f) == name }) {
			t.Errorf("no %s in %q", name, files)
		}
	}
	for _, f := range files {
		if _, err := os.Stat(f); err != nil {
			t.Error(err)
		}
	}
}
