package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestABIDiff(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	old := file("old", `{"gvm": "1", "kernel": "6.1", "kvm": {"api_version": 12, "capabilities": {"A": 1, "B": 0}},
		"vhost_scsi": {"abi_version": 1, "features": {"VIRTIO_F_VERSION_1": true}, "workers": "none"}}`)
	newer := file("new", `{"gvm": "1", "kernel": "6.12", "kvm": {"api_version": 12, "capabilities": {"A": 2, "B": 0}},
		"vhost_scsi": {"abi_version": 1, "features": {"VIRTIO_F_VERSION_1": true, "bit 41": true}}}`)
	var out bytes.Buffer
	err := abiDiff(&out, old, newer)
	const want = "~ kernel: 6.1 -> 6.12\n~ kvm.capabilities.A: 1 -> 2\n" +
		"+ vhost_scsi.features.bit 41: yes\n- vhost_scsi.workers: none\n"
	if out.String() != want || err == nil || err.(endError).status != exitABIDiffers {
		t.Errorf("%v\n%s\nwant\n%s", err, out.String(), want)
	}
	out.Reset()
	if err := abiDiff(&out, old, old); err != nil || out.Len() > 0 {
		t.Errorf("a file and itself: %v\n%s", err, out.String())
	}
	for _, bad := range []string{filepath.Join(dir, "none"), file("text", "kernel"), file("other", `{"a": 1}`)} {
		if err := abiDiff(&out, old, bad); exitStatus(err) != exitUsage ||
			!strings.Contains(err.Error(), filepath.Base(bad)) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// TestABI checks that the diff can read the facts of any host.
func TestABI(t *testing.T) {
	r := gvmRuns(t, command(t, "abi", "--json"))
	var f struct {
		Kernel string         `json:"kernel"`
		KVM    map[string]any `json:"kvm"`
		Vhost  map[string]any `json:"vhost_scsi"`
	}
	if err := json.Unmarshal([]byte(r.out), &f); err != nil || r.status != 0 {
		t.Fatalf("%v, status %d: %s", err, r.status, r.errs)
	}
	if f.Kernel == "" || f.KVM["api_version"] != 12.0 || f.Vhost["abi_version"] == nil && f.Vhost["error"] == nil {
		t.Errorf("%s", r.out)
	}
	path := filepath.Join(t.TempDir(), "abi.json")
	if err := os.WriteFile(path, []byte(r.out), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := gvmRuns(t, command(t, "abi", "diff", path, path)); r.status != 0 || r.out != "" {
		t.Errorf("status %d: %s%s", r.status, r.out, r.errs)
	}
	if r := gvmRuns(t, command(t, "abi")); r.status != 0 || !strings.Contains(r.out, "kvm.api_version") {
		t.Errorf("status %d: %s%s", r.status, r.out, r.errs)
	}
}
