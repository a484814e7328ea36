package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/fieldpath"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
)

// node is scheduler and kubelet in one: it takes all pods, and runs their containers as processes
// of this machine, each with a /dev of its own.
type node struct {
	client *kubernetes.Clientset
	dir    string // for the files of pods
	path   string // PATH of containers
	lose   string // the index of which the first pod is lost
	began  func(args []string)
}

// run takes pods until ctx is done. One runs at a time.
func (n *node) run(ctx context.Context) error {
	for ctx.Err() == nil {
		pods, err := n.client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
		for i := 0; err == nil && i < len(pods.Items); i++ {
			if p := &pods.Items[i]; p.Spec.NodeName == "" {
				err = n.runPod(ctx, p)
			}
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// runPod binds a pod to the node, runs its container, and tells how that ended.
func (n *node) runPod(ctx context.Context, p *corev1.Pod) error {
	pods := n.client.CoreV1().Pods(p.Namespace)
	if err := pods.Bind(ctx, &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Name: p.Name},
		Target: corev1.ObjectReference{Kind: "Node", Name: "node"}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	c := p.Spec.Containers[0]
	end := &corev1.ContainerStateTerminated{Reason: "Completed", StartedAt: metav1.Now()}
	if n.lose != "" && p.Annotations["batch.kubernetes.io/job-completion-index"] == n.lose {
		n.lose = ""
		end.ExitCode, end.Reason = 137, "OOMKilled"
	} else if err := n.runContainer(ctx, p, c, end); err != nil {
		return err
	}
	end.FinishedAt = metav1.Now()
	p, err := pods.Get(ctx, p.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	p.Status.Phase = corev1.PodSucceeded
	if end.ExitCode != 0 {
		p.Status.Phase = corev1.PodFailed
	}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: c.Name, Image: c.Image,
		State: corev1.ContainerState{Terminated: end}}}
	_, err = pods.UpdateStatus(ctx, p, metav1.UpdateOptions{})
	return err
}

// inContainer makes a /dev with the usual devices, the file $1 as termination message, and then
// pairs of paths: of the machine and in the container. It runs the words after "--".
const inContainer = `set -e
dev=$1; mount -t tmpfs dev $dev
for f in null zero full random urandom tty; do touch $dev/$f; mount --bind /dev/$f $dev/$f; done
shift
while [ "$1" != -- ]; do touch $dev/${2#/dev/}; mount --bind $1 $dev/${2#/dev/}; shift 2; done
shift
mount --move $dev /dev
exec "$@"`

func (n *node) runContainer(ctx context.Context, p *corev1.Pod, c corev1.Container,
	end *corev1.ContainerStateTerminated) error {
	dir := filepath.Join(n.dir, p.Name)
	message := filepath.Join(dir, "message")
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "dev"), 0o755), os.WriteFile(message, nil, 0o644)); err != nil {
		return err
	}
	env := map[string]string{"PATH": n.path}
	for _, e := range c.Env {
		env[e.Name] = e.Value
		if e.ValueFrom != nil {
			var err error
			if env[e.Name], err = fieldpath.ExtractFieldPathAsString(p, e.ValueFrom.FieldRef.FieldPath); err != nil {
				return err
			}
		}
	}
	args := []string{"--mount", "--propagation", "private"}
	if os.Getuid() != 0 {
		args = append(args, "--map-root-user")
	}
	args = append(args, "sh", "-c", inContainer, "sh", filepath.Join(dir, "dev"), message, c.TerminationMessagePath)
	for i, v := range p.Spec.Volumes {
		if path := c.VolumeMounts[i].MountPath; strings.HasPrefix(path, "/dev/") { // others are where they are
			args = append(args, v.HostPath.Path, path)
		}
	}
	args = append(args, "--")
	var words []string
	for _, s := range append(c.Command, c.Args...) {
		words = append(words, expansion.Expand(s, expansion.MappingFuncFor(env)))
	}
	n.began(words)
	cmd := exec.CommandContext(ctx, "unshare", append(args, words...)...)
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	var log bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &log, &log
	if err := cmd.Run(); cmd.ProcessState == nil {
		return err
	}
	text, err := os.ReadFile(message)
	if err != nil {
		return err
	}
	end.ExitCode = int32(cmd.ProcessState.ExitCode())
	if end.ExitCode != 0 {
		end.Reason = "Error"
		if len(text) == 0 && c.TerminationMessagePolicy == corev1.TerminationMessageFallbackToLogsOnError {
			text = log.Bytes()[max(0, log.Len()-2048):]
		}
	}
	if len(text) > 4096 {
		return fmt.Errorf("the termination message of pod %s has %d bytes", p.Name, len(text))
	}
	end.Message = string(text)
	return nil
}
