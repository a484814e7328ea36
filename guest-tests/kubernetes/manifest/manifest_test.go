// Package manifest tests the Job of gvm test --emit kubernetes against the types of Kubernetes.
package manifest

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

var gvm string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "manifest")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		gvm = filepath.Join(dir, "gvm")
		build := exec.Command("go", "build", "-o", gvm, "./cmd/gvm")
		build.Dir = "../../.."
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// emit returns the Job that gvm prints, decoded so that a field which Kubernetes does not know is
// an error.
func emit(t *testing.T, args ...string) (job batchv1.Job) {
	t.Helper()
	cmd := exec.Command(gvm, append([]string{"test"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict(out, &job); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return job
}

// TestArguments: all kinds of characters reach a pod, but NUL, which no argument has.
func TestArguments(t *testing.T) {
	args := []string{"./prog", "", " ", "'", `"`, "- a: b # c", "%YAML 1.2\n---\n", "{}", "null", "~", "0x1f",
		"$(JOB_COMPLETION_INDEX)", "$$", "trailing \n\n", "\t", "&a *a !t |\n  x", "é𝄞"}
	for _, block := range [][2]rune{{1, 0x4000}, {0xd000, 0xd7ff}, {0xe000, 0xffff}, {0x1f000, 0x1ffff},
		{0x10ff00, 0x10ffff}} {
		var all []rune
		for r := block[0]; r <= block[1]; r++ {
			all = append(all, r)
		}
		args = append(args, string(all))
	}
	job := emit(t, slices.Concat([]string{"-k", "a b", "--env", "X=\"\n", "--emit", "kubernetes,image=x", "--"}, args)...)
	var got []string
	for _, s := range job.Spec.Template.Spec.Containers[0].Args {
		got = append(got, strings.ReplaceAll(s, "$$", "$"))
	}
	if want := slices.Concat([]string{"--kernel=a b", "--env=X=\"\n", "--"}, args); !slices.Equal(got, want) {
		t.Errorf("the arguments are %q, want %q", got, want)
	}
}

// TestJob: the Job has the cells of the matrix, and the device, memory and directories that they
// need.
func TestJob(t *testing.T) {
	line := []string{"-k", "/boot/vmlinuz", "--cpus", "1,4", "--repeat", "3", "-m", "2G"}
	spec := func(emitted string, more ...string) (batchv1.JobSpec, corev1.PodSpec, corev1.Container) {
		job := emit(t, slices.Concat(line, more, []string{"--emit", "kubernetes,image=r/x:1" + emitted, "--", "./prog"})...)
		pod := job.Spec.Template.Spec
		if job.APIVersion != "batch/v1" || job.Kind != "Job" || len(pod.Containers) != 1 ||
			pod.Containers[0].Image != "r/x:1" {
			t.Fatalf("the Job is %+v", job)
		}
		return job.Spec, pod, pod.Containers[0]
	}
	job, pod, c := spec(",mount=/boot,mount=/srv/a")
	if *job.CompletionMode != batchv1.IndexedCompletion || *job.Completions != 6 || *job.Parallelism != 6 ||
		*job.BackoffLimitPerIndex < 1 || len(job.PodFailurePolicy.Rules) != 2 ||
		!slices.Equal(job.PodFailurePolicy.Rules[1].OnExitCodes.Values, []int32{1}) {
		t.Errorf("the Job is %+v", job)
	}
	if r := c.Resources.Requests; r.Cpu().Value() != 4 || r.Memory().Value() < 2<<30 {
		t.Errorf("a pod requests %v", r)
	}
	var volumes []string
	for i, v := range pod.Volumes {
		m := c.VolumeMounts[i]
		if v.Name != m.Name || v.HostPath.Path != m.MountPath || m.ReadOnly != (i > 0) {
			t.Errorf("volume %+v is mounted as %+v", v, m)
		}
		volumes = append(volumes, m.MountPath)
	}
	if !slices.Equal(volumes, []string{"/dev/kvm", "/boot", "/srv/a"}) || !*c.SecurityContext.Privileged {
		t.Errorf("a pod has %q, security context %+v", volumes, c.SecurityContext)
	}
	var axes struct{ Rounds int }
	if err := json.Unmarshal([]byte(job.Template.Annotations["gvm-matrix"]), &axes); err != nil || axes.Rounds != 3 {
		t.Errorf("%v; the annotations are %q", err, job.Template.Annotations)
	}
	job, pod, c = spec(",kvm=devices.kubevirt.io/kvm", "-j", "2")
	limit := c.Resources.Limits["devices.kubevirt.io/kvm"]
	if *job.Parallelism != 2 || len(pod.Volumes) > 0 || c.SecurityContext != nil || limit.Value() != 1 {
		t.Errorf("with a device plugin a pod is %+v, %d at a time", pod, *job.Parallelism)
	}
}

// TestExamples: the examples of docs/ci.md have the form of their CI, and their commands that of
// sh.
func TestExamples(t *testing.T) {
	b, err := os.ReadFile("../../../docs/ci.md")
	if err != nil {
		t.Fatal(err)
	}
	type step struct {
		Name, Uses, If, Run string
		With                map[string]string
	}
	var github struct {
		Name string
		On   []string `json:"true"` // as YAML 1.1 takes the word
		Jobs map[string]struct {
			RunsOn string `json:"runs-on"`
			Steps  []step
		}
	}
	var gitlab map[string]struct {
		Image     string
		Tags      []string
		Parallel  int
		Script    []string
		Artifacts struct {
			When    string
			Paths   []string
			Reports map[string]string
		}
	}
	blocks := strings.Split(string(b), "\n```yaml\n")[1:]
	if len(blocks) != 2 {
		t.Fatalf("%d examples", len(blocks))
	}
	var scripts []string
	for i, into := range []any{&github, &gitlab} {
		text, _, _ := strings.Cut(blocks[i], "\n```\n")
		if err := yaml.UnmarshalStrict([]byte(text), into); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
	}
	for _, s := range github.Jobs["test"].Steps {
		if (s.Uses == "") == (s.Run == "") {
			t.Errorf("the step %+v", s)
		}
		scripts = append(scripts, s.Run)
	}
	scripts = append(scripts, gitlab["test"].Script...)
	tests := 0
	for _, s := range scripts {
		if out, err := exec.Command("sh", "-n", "-c", s).CombinedOutput(); err != nil {
			t.Errorf("%v: %s\n%s", err, out, s)
		}
		if strings.HasPrefix(s, "gvm test ") {
			tests++
		}
	}
	if tests != 2 {
		t.Errorf("%d examples of gvm test in %q", tests, scripts)
	}
}
