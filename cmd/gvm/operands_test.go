package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"gvm/text"
)

// badValues are values of each kind that no operand of that kind takes, in a directory of badFiles.
// All ways in which an open can fail are in TestNamedErrors of package nowait.
var badValues = map[string][]string{
	"input":    {"missing", "text/x", "dir", "", "new\nline\x1b[7m"},
	"output":   {"none/x", "text/x", "dir", "", "none/new\nline\x1b[7m"},
	"dir":      {"missing", "text/x", "text", "", "new\nline\x1b[7m"},
	"number":   {"x", "", "-1", "1.5", "99999999999999999999"},
	"size":     {"x", "", "-1M", "99999999999999999999", "1\n"},
	"duration": {"x", "", "-1s", "5", "99999999h"},
	"word":     {"nosuch", "", "no\nsuch"},
	"list":     {"?", "", ",", "?,1"},
	"newdir":   {"none/x", "text/x", "text", ""},
	"machine":  {"nosuch", "", "no\nsuch"},
}

// operands has a row for each flag with a value and each argument of gvm: the commands, its name,
// the kind of its value or the reason why no value is bad, and the words that it needs, where % is
// the value.
var operands = []struct{ commands, name, kind, words string }{
	{"run", "--kernel", "input", ""},
	{"test", "--kernel", "input", ""},
	{"kunit", "--kernel", "input", "%"},
	{"run", "--initrd", "input", "--kernel guest.elf %"},
	{"run", "--disk", "input", ""},
	{"test", "--disk", "parsed as that of run, and opened with the machine", ""},
	{"run", "--share", "list", "--kernel guest.elf %"},
	{"run", "--vsock", "word", ""},
	{"run", "--net", "word", ""},
	{"run", "--publish", "list", "--net user %"},
	{"run,test,kunit", "--cmdline", "any text", ""},
	{"run", "--guest-arg", "any text", ""},
	{"run,kunit", "--cpus", "number", ""},
	{"test", "--cpus", "list", ""},
	{"run", "--apic-ids", "list", ""},
	{"run", "--cpu-features", "list", ""},
	{"run,test,kunit", "--memory", "size", ""},
	{"run", "--boot", "word", ""},
	{"run", "--entry", "word", ""},
	{"run", "--on-reset", "word", ""},
	{"run", "--watchdog", "word", ""},
	{"run,test,kunit", "--timeout", "duration", ""},
	{"run,test", "--grace", "duration", ""},
	{"run", "--name", "list", ""},
	{"run", "--trace", "output", "--disk mem:1M %"},
	{"run", "--vhost-abi", "word", ""},
	{"replay", "--vhost-abi", "word", "% whole.tr"},
	{"run", "--queues", "number", ""},
	{"run", "--poll", "duration", ""},
	{"run", "--gdb", "list", ""},
	{"run,test,kunit", "--sandbox", "word", ""},
	{"bench boot,bench guest", "--sandbox", "word", ""},
	{"replay", "--sandbox", "word", "% whole.tr"},
	{"run", "--jail", "dir", "--uid 1 --gid 1 %"},
	{"run", "--uid", "number", "--jail / --gid 1 %"},
	{"run", "--gid", "number", "--jail / --uid 1 %"},
	{"run", "--jail-limit", "list", "--jail / --uid 1 --gid 1 %"},
	{"run,test", "--crash-dir", "dir", ""},
	{"run,test,kunit", "--oops", "word", ""},
	{"run", "--allow", "input", "--strict %"},
	{"test", "--allow", "input", "--strict % -- true"},
	{"kunit", "--allow", "input", "--strict --kernel guest.elf %"},
	{"run,test,kunit", "--junit --results", "output", ""},

	{"test", "--scratch", "size", ""},
	{"test", "--module", "read with the kernel's modules: TestModules of package initramfs", ""},
	{"test", "--file", "read with the kernel: TestHostFile of package initramfs", ""},
	{"test", "--root --rw --ro", "dir", ""},
	{"test", "--env", "any text with a name", ""},
	{"test", "--cwd", "word", ""},
	{"test", "--user", "word", ""},
	{"test", "--klog", "output", "--kernel guest.elf % -- true"},
	{"test", "--verdict", "output", ""},
	{"test", "--hang", "duration", ""},
	{"test", "--rung", "word", ""},
	{"test", "--cell", "number", ""},
	{"test", "--message", "output", "--cell 0 % -- true"},
	{"test", "--emit", "word", ""},
	{"test", "--collect", "input", "%"},
	{"test", "--backend", "word", "--disk mem:1M % -- true"},
	{"test", "--repeat --jobs --retry", "number", ""},
	{"test", "--output", "newdir", ""},
	{"test", "COMMAND ARG", "any program of the guest", ""},
	{"kunit", "GLOB", "any text without spaces and quotes: TestKUnitWords", ""},

	{"disk list,balloon,inspect,stat,pause,resume,reset,console,shell," +
		"nmi,stop", "VM", "machine", "%"},
	{"disk add,disk remove,disk resize,dump,sysrq", "VM", "machine", "% w"},
	{"exec", "VM", "machine", "% -- true"},
	{"disk add,disk remove,disk resize", "DISK", "the machine's: TestDiskCommand", ""},
	{"disk resize", "SIZE", "size", "nosuch 0 -- %"},
	{"balloon", "SIZE", "size", "nosuch -- %"},
	{"inspect", "PATH", "the machine's: TestInspect", ""},
	{"inspect,stat", "--interval", "duration", "--watch %"},
	{"dump", "FILE", "the machine's: TestDump", ""},
	{"exec", "COMMAND ARGUMENT...", "any program of the guest", ""},
	{"cp", "SOURCE DESTINATION", "a machine's, or a file beside one: TestCopy", ""},
	{"sysrq", "KEY", "the guest's kernel says so: TestVerbs", ""},
	{"stop", "--grace", "duration", ""},

	{"image create", "PATH", "output", "% 1M"},
	{"image info", "PATH", "input", "%"},
	{"image resize", "PATH", "input", "% 2M"},
	{"image create", "SIZE", "size", "new -- %"},
	{"image resize", "SIZE", "size", "disk -- %"},
	{"image resize", "--lock", "word", "% disk 2M"},
	{"kernel check", "KERNEL", "input", "%"},
	{"kernel check", "--feature", "word", "% guest.elf"},
	{"kernel config", "--feature", "word", "%"},
	{"bench disk,bench guest", "--disk", "input", ""},
	{"bench disk,bench guest,bench footprint", "--time", "duration", ""},
	{"bench disk,bench guest,bench boot,bench footprint", "--rounds", "number", ""},
	{"bench disk,bench guest,bench boot,bench footprint", "--json", "output", ""},
	{"bench disk,bench guest", "--plot", "output", ""},
	{"bench disk", "--size --depth --queues --driver", "list", ""},
	{"bench disk,bench guest", "--poll", "duration", ""},
	{"bench guest,bench boot,bench footprint", "--qemu", "a program that is missing is left out, with a note", ""},
	{"bench boot", "--kernel", "input", ""},
	{"bench boot", "--initrd", "input", "--kernel guest.elf --until x %"},
	{"bench boot", "--cmdline", "any text", ""},
	{"bench boot", "--until", "any text", ""},
	{"bench boot", "--timeout", "duration", ""},
	{"bench footprint", "--guests", "number", ""},
	{"trace show", "FILE", "input", "%"},
	{"trace stat", "FILE...", "input", "%"},
	{"trace plot", "FILE...", "input", "-o x.svg %"},
	{"trace diff", "A B", "input", "% %"},
	{"trace show", "--lun", "number", "% whole.tr"},
	{"trace show", "--op", "word", "% whole.tr"},
	{"trace show", "--min-latency", "duration", "% whole.tr"},
	{"trace plot", "--output", "output", "% good.tr"},
	{"replay", "FILE", "input", "%"},
	{"replay", "--backend", "word", "% whole.tr"},
	{"abi diff", "A.json B.json", "input", "% %"},
	{"completion", "bash|zsh|fish", "word", "%"},
	{"help", "COMMAND SUBCOMMAND", "word", "%"},
}

// The words that follow those of an operand, by command.
var operandEnds = map[string]string{"test": "-- true", "kunit": "--kernel guest.elf", "inspect": "--watch"}

// Each message names a mend, and has none of Go's own words.
var (
	mends = regexp.MustCompile(
		`; |: (want|check|give|name|remove|change|run)|\bwant |largest is|see gvm help|did you mean`)
	goWords = regexp.MustCompile(`\b(open|l?stat|mkdir|read|bind|access) \S*: |strconv|parsing|invalid (syntax|argument)`)
)

// TestOperands gives each flag and each argument of each command bad values of its kind: a new one
// needs a row.
func TestOperands(t *testing.T) {
	rows := map[string]bool{} // false: not seen in the tree
	for _, o := range operands {
		for command := range strings.SplitSeq(o.commands, ",") {
			for name := range strings.FieldsSeq(o.name) {
				rows[command+" "+name] = false
			}
		}
	}
	for name := range commandOperands("", app([]string{"gvm"}).Commands) {
		if _, ok := rows[name]; !ok {
			t.Errorf("gvm %s: no row of operands", name)
		}
		rows[name] = true
	}
	for name, seen := range rows {
		if !seen {
			t.Errorf("gvm %s: there is no such operand", name)
		}
	}
	dir := badFiles(t)
	if err := os.WriteFile(filepath.Join(dir, "good.tr"), []byte("gvm-trace 1\n{}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := contents(t, dir)
	t.Run("each", func(t *testing.T) {
		for _, o := range operands {
			for command := range strings.SplitSeq(o.commands, ",") {
				for name := range strings.FieldsSeq(o.name) {
					for _, value := range badValues[o.kind] {
						testOperand(t, dir, command, name, value, o.words)
					}
				}
			}
		}
	})
	if after := contents(t, dir); after != before {
		t.Errorf("files changed from\n%sto\n%s", before, after)
	}
}

func testOperand(t *testing.T, dir, of, name, value, words string) {
	args := strings.Fields(of)
	if words == "" {
		words = "% " + operandEnds[of]
	}
	for word := range strings.FieldsSeq(words) {
		switch {
		case word == "%" && name[0] == '-':
			word = name + "=" + value
		case word == "%":
			word = value
		}
		args = append(args, word)
	}
	t.Run(fmt.Sprintf("%s %s %.20q", of, name, value), func(t *testing.T) {
		t.Parallel()
		c := command(t, args...)
		c.Dir = dir
		r := gvmRuns(t, c)
		want := exitUsage
		if slices.Contains([]string{"test", "exec", "shell"}, args[0]) {
			want = exitUntested
		}
		if r.status != want {
			t.Errorf("status %d, want %d", r.status, want)
		}
		if r.out != "" || !strings.HasPrefix(r.errs, "gvm: ") || strings.Index(r.errs, "\n") != len(r.errs)-1 {
			t.Errorf("%q, and one line is due on standard error: %q", r.out, r.errs)
		}
		if !mends.MatchString(r.errs) {
			t.Errorf("%q names no mend", r.errs)
		}
		empty := value == "" && name == "VM"
		if strings.HasPrefix(r.errs, "gvm: no machine of this user runs") && !empty { // the name does not matter
			return
		}
		if os.Geteuid() != 0 && strings.HasPrefix(r.errs, "gvm: --jail needs root") { // nor do the jail's flags
			return
		}
		if value == "" && !strings.Contains(r.errs, `""`) && !strings.Contains(r.errs, "empty") {
			t.Errorf("%q does not show that the value is empty", r.errs)
		}
		if !slices.ContainsFunc([]string{name, text.Printable(value), strconv.Quote(value)}, func(s string) bool {
			return s != "" && strings.Contains(r.errs, s)
		}) && value != "" {
			t.Errorf("%q does not name %s or its value %q", r.errs, name, value)
		}
		if goWords.MatchString(r.errs) {
			t.Errorf("%q has words of Go", r.errs)
		}
	})
}

// commandOperands returns the names of all flags with values and all arguments of commands.
func commandOperands(above string, commands []*cli.Command) map[string]bool {
	all := map[string]bool{}
	for _, c := range commands {
		name := strings.TrimSpace(above + " " + c.Name)
		maps.Copy(all, commandOperands(name, c.Subcommands))
		for _, f := range c.Flags {
			if d, ok := f.(cli.DocGenerationFlag); ok && d.TakesValue() {
				all[name+" --"+f.Names()[0]] = true
			}
		}
		words := strings.FieldsFunc(c.ArgsUsage, func(r rune) bool { return strings.ContainsRune(" []", r) })
		for _, word := range slices.DeleteFunc(words, func(s string) bool { return s == "--" || s == "..." }) {
			all[name+" "+word] = true
		}
	}
	return all
}
