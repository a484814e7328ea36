package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"gvm/machine/disk"
)

// TestHelpWidth walks the tree of commands: every page of help has text, and fits a
// terminal of 80 columns.
func TestHelpWidth(t *testing.T) {
	page := func(args ...string) string {
		var b bytes.Buffer
		args = append([]string{"gvm"}, args...)
		a := app(args)
		a.Writer = &b
		if err := a.Run(args); err != nil {
			t.Errorf("%s: %v", strings.Join(args, " "), err)
		}
		if b.Len() < 40 {
			t.Errorf("%s prints %q", strings.Join(args, " "), &b)
		}
		for line := range strings.Lines(b.String()) {
			if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > 80 || strings.HasSuffix(line, " \n") {
				t.Errorf("%s: %d columns: %q", strings.Join(args, " "), n, line)
			}
		}
		return b.String()
	}
	pages := 0
	var walk func(path []string, cs []*cli.Command)
	walk = func(path []string, cs []*cli.Command) {
		for _, c := range cs {
			if c.Name == "help" {
				continue
			}
			pages++
			path := append(slices.Clone(path), c.Name)
			for line := range strings.Lines(c.Description) {
				if n := utf8.RuneCountInString(line); n > helpWidth-3+1 && c.CustomHelpTemplate == "" {
					t.Errorf("%q: a line of %d columns would be broken: %q", path, n, line)
				}
			}
			help := page(append([]string{"help"}, path...)...)
			if flag := page(append(path, "--help")...); flag != help {
				t.Errorf("gvm %s --help differs from its page:\n%s\n%s", strings.Join(path, " "), flag, help)
			}
			if !strings.Contains(help, "EXIT") && c.CustomHelpTemplate == "" &&
				!strings.Contains(help, "gvm "+strings.Join(path, " ")) {
				t.Errorf("the page of %q is another's:\n%s", path, help)
			}
			walk(path, c.Subcommands)
		}
	}
	page()
	page("help")
	page("--help")
	walk(nil, app(nil).Commands)
	for i, c := range commands { // a single command is the same command
		if one := app([]string{"gvm", c.name}).Commands; one[0].Name != c.name && c.name != "help" ||
			app(nil).Commands[i].Name != c.name {
			t.Errorf("%s makes %s", c.name, one[0].Name)
		}
	}
	if pages < 25 {
		t.Errorf("%d pages", pages)
	}
	// The page of gvm disk has every option, too.
	for _, row := range disk.Options() {
		if !strings.Contains(page("help", "disk"), "\n      "+row.Word()) {
			t.Errorf("gvm help disk lacks %s", row.Word())
		}
	}
}

// TestSuggestions: an unknown word gets the nearest name as suggestion, if one is near.
func TestSuggestions(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"run --memroy 1G", "unknown flag --memroy; did you mean --memory? See gvm help run"},
		{"run --mem 1G", "did you mean --memory?"},
		{"run --cpus abc", `--cpus "abc": want a number; see gvm help run`},
		{"run --cpus", "--cpus: want a value, N; see gvm help run"},
		{"trace stat --json=maybe f", `--json "maybe": want true or false; see gvm help trace stat`},
		{"run -c abc", `-c "abc": want a number; see gvm help run`},
		{"run --cpus 99999999999999999999", `--cpus "99999999999999999999": want a smaller number; see`},
		{"run --cpus=-99999999999999999999", `--cpus "-99999999999999999999": want a number; see`},
		{"run --timeout 99999999h", `--timeout "99999999h": want a shorter duration, such as 90s; see`},
		{"run --timeout=-99999999h", `--timeout "-99999999h": want a duration such as 90s; see`},
		{"run --timeout 5", `--timeout "5": want a duration such as 90s; see gvm help run`},
		{"run --poll x", `--poll "x": want a duration such as 64µs; see gvm help run`},
		{"run --kernel", "--kernel: want a value, KERNEL; see gvm help run"},
		{"run --hugepages=x", `--hugepages "x": want true or false; see gvm help run`},
		{"stop --grace 5", `--grace "5": want a duration such as 10s; see gvm help stop`},
		{"trace show x --lun y", `--lun "y": want a number`},
		{"run --xyzzy", "unknown flag --xyzzy; see gvm help run"},
		{"stop build --grace", "--grace: want a value, DURATION; see gvm help stop"},
		{"trace show -- --json", "--json: no such file or directory; check the path"},
		{"image info a -- --x", "image info takes PATH, and got 2 words"},
		{"rnu", `unknown command "rnu"; did you mean run? See gvm help`},
		{"xyzzy", `unknown command "xyzzy"; see gvm help`},
		{"help rnu", "did you mean run?"},
		{"help trace shwo", "did you mean show?"},
		{"help xyzzy", `unknown command "xyzzy"; see gvm help`},
		{"--vresion", "did you mean --version?"},
		{"disk lst", `unknown command "lst" of gvm disk; did you mean list? See gvm help disk`},
		{"disk resize --shrnik x", "unknown flag --shrnik; did you mean --shrink? See gvm help disk resize"},
		{"lio gcc", "did you mean gc?"},
		{"abi dif a b", "did you mean diff?"},
		{"bench dsk", "did you mean disk?"},
		{"image craete x 1G", "did you mean create?"},
		{"trace sohw x", "did you mean show?"},
		{"trace show x --jsn", "unknown flag --jsn; did you mean --json? See gvm help trace show"},
		{"trace show --jsn x", "unknown flag --jsn; did you mean --json? See gvm help trace show"},
		{"replay --corpus --bakend both", "did you mean --backend?"},
		{"replay --corpus --backend bth", "did you mean both?"},
		{"completion bsh", "did you mean bash?"},
		{"run --boot bzimge", "did you mean bzimage?"},
		{"run --entry phv", "did you mean pvh?"},
		{"run --on-reset rebot", "did you mean reboot?"},
		{"run --cpu-features -x2apci", "did you mean x2apic?"},
		{"run --disk a,cahce=writeback", "did you mean cache? See gvm help disk"},
		{"run --disk a,read-only", "did you mean readonly?"},
		{"run --disk a,xyzzy=1", `unknown option "xyzzy"; see gvm help disk`},
		{"run --disk a,cache=write-back", "did you mean writeback?"},
		{"run --disk a,error=enospc", "did you mean enospc-stop?"},
		{"run --disk a,backend=vhots", "did you mean vhost?"},
		{"run --disk wwn=naa.1,backend=vhost,worker=1", "did you mean workers?"},
		{"run --disk wwn=naa.1,backend=vhots", "did you mean vhost?"},
		{"run --disk wwm=naa.1,backend=vhost", "did you mean wwn=naa.1? ./wwm=naa.1 is a file of that name"},
		{"run --disk nul:1M", "did you mean null:1M? ./nul:1M is a file of that name"},
		{"run --disk NULL:1M", "did you mean null:1M?"},
		{"run --disk mem=1M", "did you mean mem:1M?"},
		{"run --disk mem:1P",
			`--disk mem:1P: size "1P": want a number and K, M, G or T, such as 1024T; the largest is 4194304T`},
		{"run --disk mem:1x",
			`--disk mem:1x: size "1x": want a number and K, M, G or T (./mem:1x is a file of that name)`},
		{"run --disk null:0", "--disk null:0: size 0: want 512 bytes or more"},
		{"run --disk null:8388608T", `size "8388608T": too large: the largest is 4194304T`},
		{"run --disk mem:4194304T --disk mem:4194304T --disk mem:4194304T --disk mem:4194304T",
			"the disks in memory have more than 4194304T"},
		{"run --memory 8388608T", `--memory: size "8388608T": too large: the largest is 4194304T`},
		{"run --disk a,lock=of", "did you mean off?"},
		{"run --disk a,workers=share,backend=vhost", "did you mean shared?"},
		{"run --watchdog rest", "did you mean reset?"},
		{"run --net usr", "did you mean user?"},
		{"run --net nnoe", "did you mean none?"},
		{"run --net tpa=tap0", "did you mean tap?"},
		{"run --net tap,mac=x", "--net tap,mac=x: want none, user or tap=NAME"},
		{"run --net tap=tap0,vhost=onn", "did you mean on?"},
		{"run --net user,host=ofF", "did you mean off?"},
		{"run --net user,hots=off", "did you mean host?"},
		{"run --vsock vhots,cid=3", "did you mean vhost?"},
		{"run --vsock unix,pth=/x", "did you mean path?"},
		{"run --net user --publish 8080:80/upd", "did you mean udp?"},
		{"run --vhost-abi nay", "did you mean any?"},
		{"run --sandbox=strcit", "did you mean strict?"},
		{"run --gdb stido", "did you mean stdio?"},
		{"run --oops fial", "did you mean fail?"},
		{"bench disk --driver pol", "did you mean poll?"},
		{"image resize a 1G --lock of", "did you mean off?"},
		{"kernel check --feature dsk x", "did you mean disk?"},
		{"test -k x --emit kubernets,image=a -- true", "did you mean kubernetes?"},
		{"test -k x --rung vsok -- true", "did you mean vsock?"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			var b bytes.Buffer
			a := app(nil)
			a.Writer, a.ErrWriter = &b, &b
			status := exitUsage
			if strings.HasPrefix(tt.args, "test ") {
				status = exitUntested
			}
			err := a.Run(flagsFirst(a.Commands, append([]string{"gvm"}, strings.Fields(tt.args)...)))
			if err == nil || !strings.Contains(err.Error(), tt.want) || len(err.Error()) > 200 ||
				exitStatus(err) != status {
				t.Errorf("%v\nlacks %q, or is long", err, tt.want)
			}
		})
	}
}

// TestRunFlags: the library looks at no flag of a run after the parsing, at which a start would
// spend 0.2 ms.
func TestRunFlags(t *testing.T) {
	a := app([]string{"gvm", "run"})
	left := -1
	a.Commands[0].Action = func(c *cli.Context) error { left = len(c.Command.Flags); return nil }
	if err := a.Run([]string{"gvm", "run", "--cpus", "2"}); err != nil || left != 0 {
		t.Errorf("%v, flags left: %d", err, left)
	}
}

// TestSurplusArguments walks the tree of commands: none takes more words than its help page names,
// or an unknown word.
func TestSurplusArguments(t *testing.T) {
	refused := func(words ...string) {
		t.Helper()
		status := exitUsage
		if slices.Contains([]string{"test", "exec", "shell"}, words[0]) {
			status = exitUntested
		}
		var b bytes.Buffer
		a := app(nil)
		a.Writer, a.ErrWriter = &b, &b
		err := a.Run(flagsFirst(a.Commands, append([]string{"gvm"}, words...)))
		if exitStatus(err) != status || b.Len() > 0 ||
			strings.Contains(err.Error(), "no machine of this user runs") {
			t.Errorf("gvm %s: %v, output %.200q", strings.Join(words, " "), err, &b)
		}
	}
	var walk func(path []string, cs []*cli.Command)
	walk = func(path []string, cs []*cli.Command) {
		for _, c := range cs {
			path := append(slices.Clone(path), c.Name)
			if len(c.Subcommands) > 0 {
				walk(path, c.Subcommands)
				refused(append(path, "nosuch")...)
				refused(append(path, c.Subcommands[0].Name, "nosuch", "nosuch", "nosuch", "nosuch")...)
				continue
			}
			if most := len(strings.Fields(c.ArgsUsage)); !strings.Contains(c.ArgsUsage, "...") {
				refused(append(path, slices.Repeat([]string{"nosuch"}, most+1)...)...)
			}
			refused("help", strings.Join(path, " "), "nosuch")
			refused(append(path, "--nosuch")...)
		}
	}
	walk(nil, app(nil).Commands)
	refused("nosuch")
}
