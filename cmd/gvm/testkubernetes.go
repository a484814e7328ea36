package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"gvm/testrun"
	"gvm/testrun/kubernetes"
	"gvm/testrun/matrix"
	"gvm/text"
)

// kubernetesFlags are the flags of gvm test for a matrix of which each cell runs elsewhere.
func kubernetesFlags() []cli.Flag {
	return []cli.Flag{
		&cli.IntFlag{Name: "cell", Usage: "run cell `N` of the matrix alone; 0 is the first"},
		&cli.StringFlag{Name: "message", TakesFile: true,
			Usage: "write the verdict of --cell into `FILE`, for --collect; status 1 if it is that of a test that failed"},
		&cli.StringFlag{Name: "emit", Usage: "print the matrix as a Job: `kubernetes,image=IMAGE[,kvm=RESOURCE]" +
			"[,mount=DIR]...`; run nothing"},
		&cli.StringFlag{Name: "collect", TakesFile: true,
			Usage: "report on the Job whose pods `FILE` has, the output of kubectl get pods -o json; - is standard input"},
	}
}

// anyHost is a host that is not this one: its limits are not known.
func anyHost() hostLimits {
	return hostLimits{root: os.DevNull, rlimit: func(int) uint64 { return math.MaxUint64 }, own: map[string]string{}}
}

// parseEmit reads --emit.
func parseEmit(s string) (j kubernetes.Job, err error) {
	target, options, _ := strings.Cut(s, ",")
	if target != "kubernetes" {
		return j, fmt.Errorf("--emit %s: want kubernetes,image=IMAGE%s", text.Word(s),
			text.Suggest(target, []string{"kubernetes"}))
	}
	for option := range strings.SplitSeq(options, ",") {
		switch key, value, _ := strings.Cut(option, "="); {
		case value == "":
			return j, fmt.Errorf("--emit %s: want image=IMAGE, and perhaps kvm=RESOURCE and mount=DIR", s)
		case key == "image" && j.Image != "", key == "kvm" && j.KVM != "":
			return j, fmt.Errorf("--emit %s: %s= is given twice", s, key)
		case key == "image":
			j.Image = value
		case key == "kvm":
			j.KVM = value
		case key == "mount" && value[0] == '/':
			j.Mounts = append(j.Mounts, value)
		case key == "mount":
			return j, fmt.Errorf("--emit %s: mount=%s: want an absolute path, of a directory of the node", s, value)
		default:
			return j, text.OneOfNames("--emit: ", key, []string{"image", "kvm", "mount"})
		}
	}
	if j.Image == "" {
		return j, fmt.Errorf("--emit %s: has no image=IMAGE, of a container with gvm and the command", s)
	}
	return j, nil
}

// emit prints the matrix as a Job.
func (t *testConfig) emit(c *cli.Context) error {
	j, err := parseEmit(c.String("emit"))
	if err != nil {
		return err
	}
	if len(t.matrix.axes.Kernels) == 0 {
		return errors.New("--emit: the pods have no kernel: name one that they see with --kernel")
	}
	cells, err := t.matrix.axes.Cells()
	if err != nil {
		return err
	}
	j.Axes, j.Completions, j.Parallelism = t.matrix.axes, len(cells), len(cells)
	if t.matrix.jobs > 0 {
		j.Parallelism = min(t.matrix.jobs, len(cells))
	}
	j.CPUs, j.Memory = t.spec.CPUs, t.spec.Memory.Size+podMemory
	for _, f := range c.Command.Flags {
		name := f.Names()[0]
		if !c.IsSet(name) || name == "emit" || name == "jobs" {
			continue
		}
		if list, ok := c.Generic(name).(*words); ok {
			for _, s := range *list {
				j.Args = append(j.Args, "--"+name+"="+s)
			}
		} else {
			j.Args = append(j.Args, fmt.Sprintf("--%s=%v", name, c.Generic(name)))
		}
	}
	j.Args = append(append(j.Args, "--"), t.args...)
	return j.Write(c.App.Writer)
}

// podMemory is memory that a pod requests beside guest RAM: for gvm and the guest's files.
const podMemory = 128 << 20

// collectPods reports on the pods of a Job as testMatrix does on the cells that it runs.
func collectPods(c *cli.Context) error {
	all, err := readPods(c)
	m := &matrixConfig{
		junit:   outputFile{flag: "--junit", path: c.String("junit")},
		results: outputFile{flag: "--results", path: c.String("results")},
	}
	if err == nil {
		err = openOutputs(&m.junit, &m.results)
	}
	if err != nil {
		return endError{exitUntested, err}
	}
	defer m.junit.close()
	defer m.results.close()
	return m.report(c.Context, c.App.Writer, all, endError{status: matrix.Status(all)})
}

// readPods reads the pods of --collect.
func readPods(c *cli.Context) ([]matrix.Done, error) {
	for _, name := range c.LocalFlagNames() {
		if !slices.Contains([]string{"collect", "junit", "results"}, name) {
			return nil, fmt.Errorf("--collect has the matrix from the pods: give it --junit and --results alone, not --%s", name)
		}
	}
	if c.Args().Present() {
		return nil, errors.New("--collect has the command from the pods: give none")
	}
	in, path := os.Stdin, c.String("collect")
	if path != "-" {
		var err error
		if in, err = openInput(path); err != nil {
			return nil, fmt.Errorf("--collect: %w", err)
		}
		defer in.Close()
	}
	all, err := kubernetes.Collect(in)
	if err != nil {
		err = fmt.Errorf("--collect %s: %w", text.Word(path), err)
	}
	return all, err
}

// podStatus is the exit status of a cell with --message: Kubernetes tells verdicts from other ends
// of a pod by the status alone.
func podStatus(d *matrix.Done, status int) int {
	if r := d.Result(); status != 0 && r != nil && r.Kind != testrun.NotTested && r.Kind != testrun.Stopped {
		return kubernetes.VerdictStatus
	}
	return status
}
