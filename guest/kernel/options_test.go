package kernel

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// TestOptions checks the table: every option has a known feature, and one row.
func TestOptions(t *testing.T) {
	seen := map[string]bool{}
	for _, o := range Options {
		if !slices.Contains(Features, o.Feature) || o.Why == "" || seen[o.Symbol] ||
			strings.HasPrefix(o.Symbol, "CONFIG_") {
			t.Errorf("%+v", o)
		}
		seen[o.Symbol] = true
	}
	for _, f := range Features {
		if len(Of([]string{f})) == 0 {
			t.Errorf("feature %s has no option", f)
		}
	}
	if got := Of(nil); len(got) != len(Options) {
		t.Errorf("%d options of all features, want %d", len(got), len(Options))
	}
}

// TestBuiltConfig: the kernel that the guests' tests build and boot has all that is required.
func TestBuiltConfig(t *testing.T) {
	b, err := os.ReadFile("../../guest-tests/lab/built.config")
	if err != nil {
		t.Fatal(err)
	}
	if lacks := newConfig(b, "").Missing(Features, true); lacks != "" {
		t.Error(lacks)
	}
}

// TestFragment: a kernel with a fragment's options has all of its features.
func TestFragment(t *testing.T) {
	for _, features := range [][]string{nil, {"console"}, {"boot", "disk"}} {
		fragment := Fragment(Of(features))
		c := newConfig([]byte(fragment), "")
		for _, o := range Options {
			want := "n"
			if features == nil || slices.Contains(features, o.Feature) {
				want = "y"
			}
			if got := c.Has(o); got != want {
				t.Errorf("%v: CONFIG_%s is %s, want %s", features, o.Symbol, got, want)
			}
		}
		seen := map[string]bool{}
		for line := range strings.Lines(fragment) {
			symbol, ok := strings.CutPrefix(line, "CONFIG_")
			if !ok && !strings.HasPrefix(line, "# ") || ok && (seen[symbol] || !strings.HasSuffix(symbol, "=y\n")) {
				t.Errorf("%v: line %q", features, line)
			}
			seen[symbol] = ok
		}
	}
}

func TestMissing(t *testing.T) {
	full := Fragment(Options)
	without := func(old, new string) string { return strings.Replace(full, old, new, 1) }
	for _, tt := range []struct {
		name, config string
		features     []string
		builtIn      bool
		want         string
	}{
		{"full", full, Features, true, ""},
		{"unknown", "", Features, true, ""},
		{"one", without("CONFIG_TTY=y", "# CONFIG_TTY is not set"), Features, false, "lacks CONFIG_TTY (terminals)"},
		{"not mentioned", without("CONFIG_TTY=y", ""), []string{"console"}, false, "lacks CONFIG_TTY (terminals)"},
		{"of another feature", without("CONFIG_TTY=y", ""), []string{"boot", "disk"}, false, ""},
		{"recommended", without("CONFIG_TMPFS=y", ""), Features, true, ""},
		{"module", without("CONFIG_SCSI_VIRTIO=y", "CONFIG_SCSI_VIRTIO=m"), Features, false, ""},
		{"module without initrd", without("CONFIG_SCSI_VIRTIO=y", "CONFIG_SCSI_VIRTIO=m"), Features, true,
			"has only as modules, which need an initrd: CONFIG_SCSI_VIRTIO"},
		{"module with an initramfs inside", without("CONFIG_SCSI_VIRTIO=y",
			"CONFIG_SCSI_VIRTIO=m\nCONFIG_INITRAMFS_SOURCE=\"/root.cpio\""), Features, true, ""},
		{"both", strings.Replace(without("CONFIG_TTY=y", ""), "CONFIG_SCSI_VIRTIO=y",
			"CONFIG_SCSI_VIRTIO=m\nCONFIG_INITRAMFS_SOURCE=\"\"", 1), Features, true,
			"lacks CONFIG_TTY (terminals); has only as modules, which need an initrd: CONFIG_SCSI_VIRTIO"},
	} {
		if got := newConfig([]byte(tt.config), "").Missing(tt.features, tt.builtIn); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
	panicOption := Options[slices.IndexFunc(Options, func(o Option) bool { return o.before != "" })]
	for text, want := range map[string]string{
		"CONFIG_PVPANIC=m\n": "m", "CONFIG_PVPANIC=y\n# CONFIG_PVPANIC_MMIO is not set\n": "n",
	} {
		if got := newConfig([]byte(text), "").Has(panicOption); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}
