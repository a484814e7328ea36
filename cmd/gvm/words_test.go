package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gvm/control"
	"gvm/machine/disk"
)

func TestHelp(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string // parts, apart by |
	}{
		{nil, "boot Linux guests|run|doctor|completion|exit-status"},
		{[]string{"help"}, "boot Linux guests|run|doctor|completion|exit-status"},
		{[]string{"--help"}, "boot Linux guests|doctor"},
		{[]string{"--version"}, "gvm version " + version},
		{[]string{"-v"}, "gvm version " + version},
		{[]string{"help", "run"},
			"EXAMPLES|--kernel|--disk|gvm help disk|--timeout|--on-reset|--cpu-features|--queues"},
		{[]string{"run", "--help"}, "EXAMPLES|--kernel"},
		{[]string{"help", "pause"}, "gvm pause build"},
		{[]string{"help", "resume"}, "error=enospc-stop|gvm resume build"},
		{[]string{"help", "abi"}, "gvm abi diff 6.1.json 6.12.json|--json"},
		{[]string{"bench", "disk", "--help"}, "gvm bench disk --depth 32|--rounds"},
		{[]string{"help", "doctor"}, "FAIL|exit status"},
		{[]string{"help", "completion"}, "source <(gvm completion bash)"},
		{[]string{"help", "exit-status"}, exitStatusHelp},
		{[]string{"exit-status"}, exitStatusHelp},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			t.Parallel()
			r := gvmRuns(t, command(t, tt.args...))
			if r.status != 0 || r.errs != "" {
				t.Errorf("status %d: %s", r.status, r.errs)
			}
			for part := range strings.SplitSeq(tt.want, "|") {
				if !strings.Contains(r.out, part) {
					t.Errorf("%s\nlacks %q", r.out, part)
				}
			}
		})
	}
}

// TestExitStatusHelp checks the table against the constants.
func TestExitStatusHelp(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "exit.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^   (\d+)(?:, (\d+))?  +\S`).FindAllStringSubmatch(exitStatusHelp, -1) {
		rows[m[1]], rows[m[2]] = true, true
	}
	found := 0
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || len(v.Names) != 1 || !strings.HasPrefix(v.Names[0].Name, "exit") {
			return true
		}
		if lit, ok := v.Values[0].(*ast.BasicLit); ok && lit.Kind == token.INT {
			found++
			if !rows[lit.Value] {
				t.Errorf("the table lacks %s = %s", v.Names[0].Name, lit.Value)
			}
		}
		return true
	})
	if found < 8 || !rows["0"] || !rows["143"] {
		t.Errorf("%d constants, rows %v", found, rows)
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	r := gvmRuns(t, command(t, "doctor"))
	if r.status != 0 || r.errs != "" || !strings.HasPrefix(r.out, "ok    /dev/kvm, API version 12\n") {
		t.Errorf("status %d: %s%s", r.status, r.out, r.errs)
	}
	for line := range strings.Lines(r.out) {
		if !regexp.MustCompile(`^(ok   |note ) \S.*\n$`).MatchString(line) {
			t.Errorf("line %q", line)
		}
	}
	for _, want := range []string{"CPUs in a guest", "MIPS", "of memory", "vhost-scsi", "2 MiB pages"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("%s\nlacks %q", r.out, want)
		}
	}
}

// TestCompletionOfDisks has the shells complete each option of a disk.
func TestCompletionOfDisks(t *testing.T) {
	bin := t.TempDir()
	if err := os.Symlink(self(t), filepath.Join(bin, "gvm")); err != nil {
		t.Fatal(err)
	}
	var asked, want []string
	for _, o := range disk.Options() {
		word, value, _ := strings.Cut(o.Word(), "=")
		if value != "" {
			word += "="
		}
		asked, want = append(asked, "img,"+word[:2]), append(want, "img,"+word)
	}
	for shell, script := range map[string]string{
		"bash": `source <(gvm completion bash)
			for w; do COMP_WORDS=(gvm run --disk "$w"); COMP_CWORD=3; _gvm; printf '%s\n' "${COMPREPLY[@]}"; done`,
		"zsh": `compdef() { }; compadd() { shift 3; print -l -- $@ }; source <(gvm completion zsh)
			for w; do words=(gvm run --disk "$w") CURRENT=4; _gvm; done`,
		"fish": `gvm completion fish | source; for w in $argv[2..]; complete -C "gvm run --disk $w"; end`,
	} {
		t.Run(shell, func(t *testing.T) {
			path, err := exec.LookPath(shell)
			if err != nil {
				t.Skipf("its completion is not tried: %v", err)
			}
			c := exec.Command(path, append([]string{"-c", script, shell}, asked...)...)
			c.Env = append(environment(t.TempDir()), "PATH="+bin+":"+os.Getenv("PATH"), "HOME="+bin)
			out, err := c.CombinedOutput()
			lines := strings.Split(string(out), "\n")
			for i, word := range want {
				if err != nil || !slices.Contains(lines, word) {
					t.Errorf("%s: %v, %q lacks %s", asked[i], err, out, word)
				}
			}
		})
	}
}

func TestCompletion(t *testing.T) {
	bin := t.TempDir()
	if err := os.Symlink(self(t), filepath.Join(bin, "gvm")); err != nil {
		t.Fatal(err)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		t.Run(shell, func(t *testing.T) {
			r := gvmRuns(t, command(t, "completion", shell))
			if r.status != 0 || r.errs != "" || !strings.Contains(r.out, "--generate-bash-completion") {
				t.Fatalf("status %d: %s%s", r.status, r.out, r.errs)
			}
			path, err := exec.LookPath(shell)
			if err != nil {
				t.Skipf("its syntax is not checked: %v", err)
			}
			c := exec.Command(path, "-n")
			c.Stdin = strings.NewReader(r.out)
			if out, err := c.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"bzImage", "disk.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := t.TempDir()
	for _, name := range []string{"build", "other"} {
		s, err := control.Claim(control.In(filepath.Join(run, "gvm")), name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() }) // after the parallel subtests
	}
	for _, tt := range []struct {
		words []string
		want  []string
	}{
		{[]string{"gvm", "ru"}, []string{"run"}},
		{[]string{"gvm", ""}, []string{"abi", "balloon", "bench", "completion", "console", "cp", "disk", "doctor",
			"dump",
			"exec", "exit-status",
			"h", "help",
			"image", "inspect", "kernel", "kunit", "lio", "list", "nmi", "pause", "ps",
			"replay", "reset", "resume", "run", "shell", "stat", "stop", "sysrq", "test", "trace"}},
		{[]string{"gvm", "run", "--ker"}, []string{"--kernel"}},
		{[]string{"gvm", "run", "--cpus", "2", "--mem"}, []string{"--memory"}},
		{[]string{"gvm", "run", "--cpu"}, []string{"--cpu-features", "--cpus"}},
		{[]string{"gvm", "run", "--kernel", "bz"}, []string{"bzImage"}},
		{[]string{"gvm", "run", "--disk", "di"}, []string{"disk.img"}},
		{[]string{"gvm", "run", "--disk", "disk.img,loc"}, []string{"disk.img,lock="}},
		{[]string{"gvm", "run", "-d", "disk.img,cache", "="}, []string{"unsafe", "writeback", "writethrough"}},
		{[]string{"gvm", "run", "--disk", "=", "disk.img,cache", "=", "write"}, []string{"writeback", "writethrough"}},
		{[]string{"gvm", "run", "--disk", "mem", ":", "1M,p"}, []string{"1M,physical_block_size=", "1M,pi="}},
		{[]string{"gvm", "run", "--disk", "disk.img,overlay", "=", "bz"}, []string{"bzImage"}},
		{[]string{"gvm", "disk", "add", "build", "disk.img,rea"}, []string{"disk.img,readonly"}},
		{[]string{"gvm", "run", "--cpu-features", "x,rea"}, []string{""}},
		{[]string{"gvm", "run", "--net", ""}, []string{"none", "tap=", "user"}},
		{[]string{"gvm", "run", "--net", "=", "us"}, []string{"user"}},
		{[]string{"gvm", "run", "--net", "user,"}, []string{"user,host=", "user,mac="}},
		{[]string{"gvm", "run", "--net", "user,host", "="}, []string{"off", "on"}},
		{[]string{"gvm", "run", "--net", "tap", "=", "tap0,queues", "=", "2,"}, []string{"2,mac=", "2,vhost="}},
		{[]string{"gvm", "run", "--net", "tap", "=", "tap0,vhost", "=", "o"}, []string{"off", "on"}},
		{[]string{"gvm", "run", "--vsock", ""}, []string{"unix", "vhost,cid="}},
		{[]string{"gvm", "run", "--vsock", "unix,"}, []string{"unix,cid=", "unix,path="}},
		{[]string{"gvm", "run", "--vsock", "vhost,"}, []string{"vhost,cid="}},
		{[]string{"gvm", "run", "--vsock", "path", "=", "di"}, []string{"disk.img"}},
		{[]string{"gvm", "run", "--watchdog", ""}, []string{"exit", "nmi", "pause", "reset"}},
		{[]string{"gvm", "run", "--watchdog", "=", "re"}, []string{"reset"}},
		{[]string{"gvm", "run", "--publish", "0"}, []string{"0.0.0.0:"}},
		{[]string{"gvm", "run", "--publish", "8080", ":", "80"}, []string{"80/tcp", "80/udp"}},
		{[]string{"gvm", "stop", ""}, []string{"build", "other"}},
		{[]string{"gvm", "stop", "--force", "bu"}, []string{"build"}},
		{[]string{"gvm", "stop", "--grace", "bz"}, []string{"bzImage"}},
		{[]string{"gvm", "disk", "list", ""}, []string{"build", "other"}},
		{[]string{"gvm", "disk", "add", "build", "di"}, []string{"disk.img"}},
		{[]string{"gvm", "exec", "ot"}, []string{"other"}},
		{[]string{"gvm", "cp", "-r", "ot"}, []string{"other:"}},
		{[]string{"gvm", "cp", "disk.img", "b"}, []string{"build:"}},
		{[]string{"gvm", "cp", "di"}, []string{"disk.img"}},
	} {
		t.Run(strings.Join(tt.words, " "), func(t *testing.T) {
			t.Parallel()
			c := exec.Command(bash, "-c",
				`source <(gvm completion bash); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); `+
					`_gvm; printf '%s\n' "${COMPREPLY[@]}"`, "bash")
			c.Args = append(c.Args, tt.words...)
			c.Dir = dir
			c.Env = append(environment(t.TempDir()), "PATH="+bin+":"+os.Getenv("PATH"), "XDG_RUNTIME_DIR="+run)
			out, err := c.CombinedOutput()
			got := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
			slices.Sort(got)
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("%q, %v, want %q", got, err, tt.want)
			}
		})
	}
}
