// Package kubernetes writes a matrix of gvm test as an Indexed Job of Kubernetes, whose pods run a
// cell each, and reads the verdicts out of the pods again.
//
// It knows the few fields that it needs, without the Go types of Kubernetes, which would multiply
// the size of gvm.
package kubernetes

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"gvm/testrun/matrix"
	"gvm/text"
)

// Job describes the Job of a matrix.
type Job struct {
	Axes        matrix.Axes
	Completions int      // the cells
	Parallelism int      // pods that run at a time
	Image       string   // of the container: has gvm in its PATH, kernels and the command
	Args        []string // the arguments of gvm test, without those that choose a cell
	CPUs        int      // that a pod requests
	Memory      uint64   // bytes that a pod requests
	KVM         string   // the resource by which a device plugin gives /dev/kvm; "": the node's file
	Mounts      []string // directories of the node that a pod sees read-only, at the same path
}

// VerdictStatus is the exit status of a cell in a pod that did not pass, with any verdict. The
// Job runs a pod with another status again.
const VerdictStatus = 1

// matrixAnnotation is the annotation of a pod with the axes of its matrix.
const matrixAnnotation = "gvm-matrix"

// messagePath is the file that the kubelet reads a container's termination message from.
const messagePath = "/dev/termination-log"

// template is the Job. A pod that Kubernetes disrupts is no try of its cell, and a verdict stays.
const template = `apiVersion: batch/v1
kind: Job
metadata:
  generateName: gvm-test-
spec:
  completionMode: Indexed
  completions: %d
  parallelism: %d
  backoffLimitPerIndex: 2
  podFailurePolicy:
    rules:
    - action: Ignore
      onPodConditions:
      - type: DisruptionTarget
        status: "True"
    - action: FailIndex
      onExitCodes:
        containerName: gvm
        operator: In
        values: [%d]
  template:
    metadata:
      annotations:
        ` + matrixAnnotation + `: %s
    spec:
      restartPolicy: Never
      automountServiceAccountToken: false
      nodeSelector:
        kubernetes.io/arch: amd64
      containers:
      - name: gvm
        image: %s
        command: [gvm, test, --cell=$(JOB_COMPLETION_INDEX), --message=` + messagePath + `]
        args:%s
        terminationMessagePath: ` + messagePath + `
        terminationMessagePolicy: FallbackToLogsOnError
        resources:
          requests:
            cpu: %d
            memory: %d
%s`

// Write writes the Job as YAML.
func (j Job) Write(w io.Writer) error {
	axes, err := json.Marshal(j.Axes)
	if err != nil {
		return err
	}
	var args, access, mounts, volumes strings.Builder
	for _, s := range append([]string{j.Image, j.KVM}, append(j.Args, j.Mounts...)...) {
		if !utf8.ValidString(s) {
			return fmt.Errorf("%s: is no UTF-8, which a Job must be", text.Printable(s))
		}
	}
	for _, s := range j.Args {
		// The kubelet replaces $(NAME), and takes $$ for $.
		fmt.Fprintf(&args, "\n        - %s", quote(strings.ReplaceAll(s, "$", "$$")))
	}
	mount := func(name, path, readOnly, kind string) {
		fmt.Fprintf(&mounts, "        - {name: %s, mountPath: %s%s}\n", name, path, readOnly)
		fmt.Fprintf(&volumes, "      - {name: %s, hostPath: {path: %s, type: %s}}\n", name, path, kind)
	}
	if j.KVM != "" {
		fmt.Fprintf(&access, "          limits:\n            %s: 1\n", quote(j.KVM))
	} else { // the device cgroup lets a privileged container alone use the file
		access.WriteString("        securityContext:\n          privileged: true\n")
		mount("kvm", "/dev/kvm", "", "CharDevice")
	}
	for i, dir := range j.Mounts {
		mount(fmt.Sprint("mount", i), quote(dir), ", readOnly: true", "Directory")
	}
	if mounts.Len() > 0 {
		access.WriteString("        volumeMounts:\n" + mounts.String() + "      volumes:\n" + volumes.String())
	}
	_, err = fmt.Fprintf(w, template, j.Completions, j.Parallelism, VerdictStatus, quote(string(axes)), quote(j.Image),
		args.String(), j.CPUs, j.Memory, access.String())
	return err
}

// quote returns a scalar of YAML 1.2, 7.3.1: the escapes of Go are among those of its double-quoted
// style.
func quote(s string) string { return strconv.Quote(s) }
