// Package kubernetes runs the Job of gvm test --emit kubernetes on the control plane of Kubernetes:
// etcd, kube-apiserver and kube-controller-manager, with a node of its own.
package kubernetes

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"
)

// TestJob: the Job of a matrix of which one cell fails runs each cell once, but for one whose pod
// is lost, and the pods make the report of a matrix that ran here.
func TestJob(t *testing.T) {
	dir := t.TempDir()
	build(t, filepath.Join(dir, "bin/"), "../..", "./cmd/gvm", "./guest-tests/cmd/exitkernel")
	build(t, filepath.Join(dir, "bin/"), ".", "./controlplane")
	for name, status := range map[string]string{"passes": "0", "fails": "3", "too": "0"} {
		image, err := exec.Command(filepath.Join(dir, "bin/exitkernel"), status).Output()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), image, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	gvm := func(stdin []byte, args ...string) (stdout []byte, status int) {
		cmd := exec.Command(filepath.Join(dir, "bin/gvm"), append([]string{"test"}, args...)...)
		cmd.Dir, cmd.Stdin, cmd.Stderr = dir, bytes.NewReader(stdin), os.Stderr
		stdout, _ = cmd.Output()
		return stdout, cmd.ProcessState.ExitCode()
	}
	matrix := func(want int, stdin []byte, args ...string) (r results) {
		file := filepath.Join(dir, "results")
		table, status := gvm(stdin, append([]string{"--results", file}, args...)...)
		t.Logf("%s", table)
		text, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err != nil || status != want {
			t.Fatalf("%v; status %d, want %d: %s", err, status, want, text)
		}
		return r
	}
	tested := []string{"--", "sh", "-c", "$(PATH) $$ '\"\n"}
	line := func(flags ...string) []string {
		return slices.Concat(flags, []string{"-k", filepath.Join(dir, "passes"), "-k", filepath.Join(dir, "fails"),
			"-k", filepath.Join(dir, "too")}, tested)
	}
	here := matrix(3, nil, line("-j", "1")...)
	manifest, status := gvm(nil, line("--emit", "kubernetes,image=none")...)
	if status != 0 {
		t.Fatalf("--emit: status %d", status)
	}
	var job batchv1.Job
	if err := yaml.UnmarshalStrict(manifest, &job); err != nil {
		t.Fatalf("%v\n%s", err, manifest)
	}

	client := startControlPlane(t, dir)
	var ran [][]string
	ctx, stop := context.WithCancel(t.Context())
	n := &node{client: client, dir: dir, path: filepath.Join(dir, "bin") + ":" + os.Getenv("PATH"), lose: "2",
		began: func(args []string) { ran = append(ran, args) }}
	ended := make(chan error, 1)
	go func() { ended <- n.run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("the node: %v", err)
		}
		if len(ran) != 3 {
			t.Errorf("%d containers ran, want one for each of 3 cells", len(ran))
		}
		for _, args := range ran {
			if !slices.Equal(args[max(0, len(args)-len(tested)):], tested) {
				t.Errorf("a container ran %q, want %q at its end", args, tested)
			}
		}
	}()
	jobs := client.BatchV1().Jobs("default")
	created, err := jobs.Create(ctx, &job, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict})
	if err != nil {
		t.Fatalf("%v\n%s", err, manifest)
	}
	eventually(t, "the Job ends", func() (err error) {
		if created, err = jobs.Get(ctx, created.Name, metav1.GetOptions{}); err != nil {
			return err
		}
		for _, c := range created.Status.Conditions {
			if c.Type == batchv1.JobFailed && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("its status is %+v", created.Status)
	})
	if s := created.Status; s.CompletedIndexes != "0,2" || *s.FailedIndexes != "1" {
		t.Errorf("indexes %s are completed, %s failed", s.CompletedIndexes, *s.FailedIndexes)
	}
	pods, err := client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: "job-name=" + created.Name})
	if err != nil {
		t.Fatal(err)
	}
	if len(pods.Items) != 4 {
		t.Errorf("%d pods, want one for each of 3 cells, and another for the lost one", len(pods.Items))
	}
	list, err := json.Marshal(pods)
	if err != nil {
		t.Fatal(err)
	}
	there := matrix(3, list, "--collect", "-")
	if len(there.Cells) != 3 || len(there.Cells[2].Lost) != 1 ||
		!strings.HasSuffix(there.Cells[2].Lost[0].Text, ": OOMKilled, status 137") {
		t.Fatalf("the results are %+v", there)
	}
	there.Cells[2].Lost = here.Cells[2].Lost
	if !reflect.DeepEqual(there, here) {
		t.Errorf("the results are %+v, want %+v", there, here)
	}
}

// results are those of a matrix, without times.
type results struct {
	Status int
	Cells  []struct {
		Name    string
		Verdict verdict
		Lost    []verdict
	}
}

type verdict struct {
	Kind, Text, Kernel string
	Status             int
}

// build builds programs into a directory.
func build(t *testing.T, into, dir string, programs ...string) {
	t.Helper()
	args := append([]string{"build", "-trimpath", "-ldflags", "-s -w", "-o", into + "/"}, programs...)
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// patience is how long a part of the control plane, and the Job, may take.
const patience = 2 * time.Minute

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Since(start) > patience {
			t.Fatalf("waiting until %s: %v", what, err)
		}
	}
}

// startControlPlane starts etcd, kube-apiserver and kube-controller-manager. It returns once Jobs
// can be created.
func startControlPlane(t *testing.T, dir string) *kubernetes.Clientset {
	t.Helper()
	ports := freePorts(t, 3)
	etcd, peers, api := ports[0], ports[1], ports[2]
	const token = "token-of-the-test"
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	start := func(name string, args ...string) {
		log, err := os.Create(filepath.Join(dir, name+".log"))
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(dir, "bin/controlplane"), append([]string{name}, args...)...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Signal(syscall.SIGKILL)
			_ = cmd.Wait()
			log.Close()
			if text, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
				t.Logf("the end of the log of %s:\n%s", name, text[max(0, len(text)-4096):])
			}
		})
	}
	start("etcd", "--data-dir", filepath.Join(dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", "http://"+etcd, "--advertise-client-urls", "http://"+etcd,
		"--listen-peer-urls", "http://"+peers, "--initial-advertise-peer-urls", "http://"+peers,
		"--initial-cluster", "default=http://"+peers)
	key := write("key", serviceAccountKey(t))
	_, port, err := net.SplitHostPort(api)
	if err != nil {
		t.Fatal(err)
	}
	start("kube-apiserver", "--etcd-servers", "http://"+etcd, "--bind-address", "127.0.0.1", "--secure-port", port,
		"--cert-dir", filepath.Join(dir, "certificates"), "--service-cluster-ip-range", "10.0.0.0/24",
		"--service-account-issuer", "https://localhost", "--service-account-key-file", key,
		"--service-account-signing-key-file", key, "--authorization-mode", "RBAC", "--allow-privileged",
		"--token-auth-file", write("tokens", token+",admin,admin,system:masters\n"))
	config := &rest.Config{Host: "https://" + api, BearerToken: token, QPS: 100, Burst: 100,
		TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "kube-apiserver is ready", func() error {
		return client.RESTClient().Get().AbsPath("/readyz").Do(t.Context()).Error()
	})
	start("kube-controller-manager", "--kubeconfig", write("kubeconfig", fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "https://%s", insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: %s}}]
`, api, token)), "--controllers", "job-controller,serviceaccount-controller", "--leader-elect=false",
		"--secure-port", "0")
	eventually(t, "pods have a service account", func() error {
		_, err := client.CoreV1().ServiceAccounts("default").Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return client
}

// freePorts returns addresses of this machine that no program listens at.
func freePorts(t *testing.T, n int) (all []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		all = append(all, l.Addr().String())
	}
	return all
}

// serviceAccountKey returns a private key that signs tokens of service accounts.
func serviceAccountKey(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: b}))
}
