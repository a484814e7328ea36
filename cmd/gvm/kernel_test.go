package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gvm/guest/embedded"
	"gvm/guest/kernel"
)

// buildTree makes a build directory whose kernel is the embedded guest.
func buildTree(t *testing.T, config string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"vmlinux": string(embedded.Image), "Makefile": "include x\n",
		".config": "# Linux/x86 6.12.0 Kernel Configuration\n" + config} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestKernelCheck checks kernels by their configurations.
func TestKernelCheck(t *testing.T) {
	full := buildTree(t, kernel.Fragment(kernel.Options))
	lacking := buildTree(t, strings.Replace(kernel.Fragment(kernel.Options), "CONFIG_TTY=y", "# CONFIG_TTY is not set", 1))
	alone := filepath.Join(t.TempDir(), "alone")
	if err := os.WriteFile(alone, embedded.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args   string
		status int
		out    string // parts, apart by |
		errs   string
	}{
		{"check " + full, 0, "config   " + full + "/.config|CONFIG_TTY                  required    y   terminals", ""},
		{"check " + full + "/vmlinux --feature disk", 0, "CONFIG_SCSI_VIRTIO", ""},
		{"check " + lacking, exitLacks, "CONFIG_TTY                  required    n ", "lacks CONFIG_TTY: merge"},
		{"check --feature disk " + lacking, 0, "CONFIG_BLK_DEV_SD", ""},
		{"check " + alone, exitUsage, "", "has no configuration"},
		{"check", exitUsage, "", "takes one KERNEL"},
		{"check none", exitUsage, "", "none does not exist"},
		{"check --feature dsk " + full, exitUsage, "", "did you mean disk?"},
		{"config", 0, kernel.Fragment(kernel.Options), ""},
		{"config --feature console", 0, "CONFIG_TTY=y", ""},
		{"config x", exitUsage, "", "takes no argument"},
		{"chek", exitUsage, "", "check"},
	} {
		r := gvmRuns(t, command(t, append([]string{"kernel"}, strings.Fields(tt.args)...)...))
		if r.status != tt.status || !strings.Contains(r.errs, tt.errs) || (tt.errs == "") != (r.errs == "") {
			t.Errorf("%s: status %d, %s", tt.args, r.status, r.errs)
		}
		for part := range strings.SplitSeq(tt.out, "|") {
			if !strings.Contains(r.out, part) {
				t.Errorf("%s:\n%s\nlacks %q", tt.args, r.out, part)
			}
		}
		for line := range strings.Lines(r.out) {
			if len(line) > helpWidth+1 && !strings.Contains(line, os.TempDir()) {
				t.Errorf("%s: %d columns: %s", tt.args, len(line)-1, line)
			}
		}
	}
	r := gvmRuns(t, command(t, "kernel", "check", "--json", lacking))
	var report kernelReport
	if err := json.Unmarshal([]byte(r.out), &report); err != nil || report.OK ||
		len(report.Options) != len(kernel.Options) || string(report.Config) != lacking+"/.config" || r.status != exitLacks {
		t.Errorf("status %d, %v, %+v", r.status, err, report)
	}
}

// TestRunLacks: gvm run notes before the boot which options the kernel lacks, by a configuration in
// a file.
func TestRunLacks(t *testing.T) {
	for _, tt := range []struct{ name, config, args, want string }{
		{"full", kernel.Fragment(kernel.Options), "", ""},
		{"console", strings.Replace(kernel.Fragment(kernel.Options), "CONFIG_TTY=y", "", 1), "",
			"lacks CONFIG_TTY (terminals); by "},
		{"modules without a disk", strings.Replace(kernel.Fragment(kernel.Options), "CONFIG_SCSI_VIRTIO=y",
			"CONFIG_SCSI_VIRTIO=m", 1), "", ""},
		{"modules", strings.Replace(kernel.Fragment(kernel.Options), "CONFIG_SCSI_VIRTIO=y", "CONFIG_SCSI_VIRTIO=m", 1),
			"--disk mem:1M", "has only as modules, which need an initrd: CONFIG_SCSI_VIRTIO; by "},
	} {
		dir := buildTree(t, tt.config)
		r := gvmRuns(t, command(t, append([]string{"run", "-k", dir, "--bare-cmdline", "--cmdline", "crash=reset"},
			strings.Fields(tt.args)...)...))
		if r.status != exitReset || !strings.Contains(r.errs, tt.want) ||
			strings.Contains(r.errs, ".config") != (tt.want != "") {
			t.Errorf("%s: status %d, %s", tt.name, r.status, r.errs)
		}
	}
}
