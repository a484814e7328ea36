package main

import (
	"slices"
	"strings"
	"testing"
)

// TestFlagsFirst: flags may stand behind a command's arguments.
func TestFlagsFirst(t *testing.T) {
	for args, want := range map[string]string{
		"":                                       "",
		"list --json":                            "list --json --",
		"disk list build --json":                 "disk list --json -- build",
		"disk resize build 0 1M --shrink":        "disk resize --shrink -- build 0 1M",
		"stop build --grace 1m":                  "stop --grace 1m -- build",
		"stop build --grace=1m -f":               "stop --grace=1m -f -- build",
		"trace show - --json":                    "trace show --json -- -",
		"trace show -- --json":                   "trace show -- --json",
		"image create a.img 1G --raw":            "image create --raw -- a.img 1G",
		"stop build --grcae 1m":                  "stop --grcae -- build 1m",
		"stop build --grace":                     "stop --grace",
		"disk --help":                            "disk --help",
		"disk eject --json":                      "disk eject --json",
		"nonsense --json x":                      "nonsense --json x",
		"run bzImage -m 1G --disk a --disk b":    "run -m 1G --disk a --disk b -- bzImage",
		"test -k k ls -v -t /":                   "test -k k ls -v -t /",
		"disk list b --generate-bash-completion": "disk list b --generate-bash-completion",
	} {
		words := append([]string{"gvm"}, strings.Fields(args)...)
		if got := flagsFirst(app(nil).Commands, words); !slices.Equal(got,
			append([]string{"gvm"}, strings.Fields(want)...)) {
			t.Errorf("%s: %q, want %s", args, got, want)
		}
	}
	if got := flagsFirst(nil, nil); got != nil {
		t.Errorf("no words: %q", got)
	}
}
