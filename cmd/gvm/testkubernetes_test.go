package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestKubernetes: the containers of a Job run the cells of a matrix, end with statuses that the
// Job's policy knows, and their termination messages make the same report as a run of the matrix
// here.
func TestKubernetes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	gvm := func(args ...string) result {
		c := command(t, append([]string{"test"}, args...)...)
		c.Dir = dir
		return gvmRuns(t, c)
	}
	line := []string{"-k", exitKernel(t, 0), "-k", exitKernel(t, 3), "-k", "none", "--cpus", "1,2",
		"--", "sh", "-c", "$(X) 'a\n'"}
	here := gvm(slices.Concat([]string{"--junit", "junit", "--results", "results"}, line)...)
	job := gvm(slices.Concat([]string{"--emit", "kubernetes,image=x"}, line)...)
	if here.status != 3 || job.status != 0 || !strings.Contains(job.out, "\n  completions: 6\n") {
		t.Fatalf("status %d; %d: %s%s", here.status, job.status, job.out, job.errs)
	}
	var args []string
	for _, m := range regexp.MustCompile(`(?m)^        - (".*")$`).FindAllStringSubmatch(job.out, -1) {
		s, err := strconv.Unquote(m[1])
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, strings.ReplaceAll(s, "$$", "$"))
	}
	if n := len(args); n < 4 || !slices.Equal(args[n-4:], line[len(line)-4:]) {
		t.Fatalf("the arguments are %q", args)
	}
	axes := regexp.MustCompile(`gvm-matrix: (.*)`).FindStringSubmatch(job.out)
	annotation, err := strconv.Unquote(axes[1])
	if err != nil {
		t.Fatal(err)
	}
	var pods []any
	for i, want := range []int{0, 0, 1, 1, 125, 125} {
		file := fmt.Sprint("message", i)
		r := gvm(slices.Concat([]string{fmt.Sprint("--cell=", i), "--message=" + file}, args)...)
		if r.status != want || !strings.HasPrefix(r.out, "cell ") || !strings.Contains(r.out, "\n1 cell: ") {
			t.Errorf("cell %d: status %d, want %d: %s%s", i, r.status, want, r.out, r.errs)
		}
		phase := "Failed"
		if want == 0 {
			phase = "Succeeded"
		}
		pods = append(pods, map[string]any{
			"metadata": map[string]any{"annotations": map[string]string{"gvm-matrix": annotation,
				"batch.kubernetes.io/job-completion-index": fmt.Sprint(i)}},
			"status": map[string]any{"phase": phase, "containerStatuses": []any{map[string]any{"state": map[string]any{
				"terminated": map[string]any{"message": string(readTestFile(t, filepath.Join(dir, file)))}}}}},
		})
	}
	b, err := json.Marshal(map[string]any{"items": pods})
	if err := errors.Join(err, os.WriteFile(filepath.Join(dir, "pods"), b, 0o600)); err != nil {
		t.Fatal(err)
	}
	there := gvm("--collect", "pods", "--junit", "junit2", "--results", "results2")
	// Times differ, and the kernel's own.
	same := func(s string) string {
		return regexp.MustCompile(`[0-9]+\.[0-9]+|"start": ".*"|  +`).ReplaceAllString(s, "T")
	}
	if there.status != here.status || same(there.out) != same(here.out) {
		t.Errorf("status %d:\n%swant %d:\n%s", there.status, there.out+there.errs, here.status, here.out)
	}
	for _, name := range []string{"junit", "results"} {
		got, want := readTestFile(t, filepath.Join(dir, name+"2")), readTestFile(t, filepath.Join(dir, name))
		if same(string(got)) != same(string(want)) {
			t.Errorf("%s is\n%s\nwant\n%s", name, got, want)
		}
	}
}

// TestKubernetesWords: wrong words are one line and status 125.
func TestKubernetesWords(t *testing.T) {
	t.Parallel()
	const emit = "-k x --emit kubernetes"
	for _, tt := range []struct{ args, errs string }{
		{"-k x --emit k8s -- sh", "--emit k8s: want kubernetes,image=IMAGE"},
		{emit + " -- sh", "--emit kubernetes: want image=IMAGE, and perhaps"},
		{emit + ",kvm=x/y -- sh", "has no image=IMAGE, of a container with gvm and the command"},
		{emit + ",image= -- sh", "image=: want image=IMAGE, and perhaps kvm=RESOURCE"},
		{emit + ",image=x,image=y -- sh", "--emit kubernetes,image=x,image=y: image= is given twice"},
		{emit + ",img=x -- sh", "--emit: img: want image, kvm or mount"},
		{emit + ",image=x,mount=y -- sh", "mount=y: want an absolute path, of a directory of the node"},
		{"--emit kubernetes,image=x -- sh", "--emit: the pods have no kernel: name one that they see with --kernel"},
		{emit + ",image=x", "give a COMMAND"},
		{emit + ",image=x --repeat 10001 -- sh", "want 10000 cells at most"},
		{emit + ",image=x --junit j -- sh", "--emit runs nothing: give --junit where"},
		{emit + ",image=x --cell 0 -- sh", "--emit runs nothing: give --cell where"},
		{emit + ",image=x -- \xff", `\xff: is no UTF-8, which a Job must be`},
		{"-k x --cell 1 -- sh", "--cell 1: the matrix has 1 cell, from 0"},
		{"-k x --cell -1 -- sh", "--cell -1: want 0 or more"},
		{"-k x --message m -- sh", "--message has the verdict of one cell: choose it with --cell"},
		{"--collect none", "--collect: none: no such file or directory; check the path"},
		{"--collect /dev/null", "--collect: /dev/null: is a character device"},
		{"--collect none --repeat 2",
			"--collect has the matrix from the pods: give it --junit and --results alone, not --repeat"},
		{"--collect none -- sh", "--collect has the command from the pods: give none"},
		{"-k x -k y --emit kubernetes,image=x --backend vhost -- sh", "--backend needs a --disk"},
	} {
		c := command(t, append([]string{"test"}, strings.Fields(tt.args)...)...)
		r := gvmRuns(t, c)
		left, err := os.ReadDir(c.Dir)
		if r.status != 125 || !strings.Contains(r.errs, tt.errs) || r.out != "" || strings.Count(r.errs, "\n") != 1 ||
			err != nil || len(left) > 0 {
			t.Errorf("%s: status %d, %q, want %q; %v left", tt.args, r.status, r.errs+r.out, tt.errs, left)
		}
	}
}
