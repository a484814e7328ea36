package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"gvm/testrun"
	"gvm/testrun/matrix"
	"gvm/text"
)

// maxMessage is the largest termination message that Kubernetes keeps of a container.
const maxMessage = 4096

// Message writes a cell that has ended as a termination message. Of logs and the like it has the
// parts that fit.
func Message(w io.Writer, d matrix.Done) error {
	d.Kernel = "" // the axes have it
	b, err := json.Marshal(d)
	for keep := 64; err == nil && len(b) > maxMessage && keep > 0; {
		keep /= 2
		b, err = json.Marshal(cut(d, keep))
	}
	if err == nil {
		_, err = w.Write(b)
	}
	return err
}

// cutLine begins the log of a verdict that is cut.
const cutLine = "[cut to the size of a pod's termination message; kubectl logs has more]"

// cutName returns the first bytes of a name, and no part of a character.
func cutName(s text.Name, length int) text.Name {
	if len(s) <= length {
		return s
	}
	for part := range utf8.UTFMax { // a name may have any bytes
		if utf8.RuneStart(s[length-part]) {
			return s[:length-part]
		}
	}
	return s[:length]
}

// cut returns a cell with keep elements of each list at most, and short strings.
func cut(d matrix.Done, keep int) matrix.Done {
	length := 80 + 16*keep
	short := func(s *string) { *s = strings.ToValidUTF8((*s)[:min(len(*s), length)], "") }
	last := func(list *[]string) {
		*list = slices.Clone((*list)[max(0, len(*list)-keep):])
		for i := range *list {
			short(&(*list)[i])
		}
	}
	d.Attempts = slices.Clone(d.Attempts[max(0, len(d.Attempts)-1-keep):])
	for i := range d.Attempts {
		a := &d.Attempts[i]
		r := *a.Result
		a.Result = &r
		short(&r.Text)
		r.Kernel = cutName(r.Kernel, length)
		short(&r.Release)
		if r.Command != nil {
			c := *r.Command
			r.Command = &c
			short(&c.Error)
		}
		for _, list := range []*[]string{&r.Missing, &r.Detail, &r.Log, &a.Output} {
			last(list)
		}
		r.Log = append([]string{cutLine}, r.Log...)
		kept := min(len(r.Reports), keep)
		r.Dropped += len(r.Reports) - kept
		r.Reports = slices.Clone(r.Reports[:kept])
		for i := range r.Reports {
			p := &r.Reports[i]
			short(&p.Title)
			p.Text, p.Frames = p.Text[:min(len(p.Text), keep)], p.Frames[:min(len(p.Frames), keep)]
		}
	}
	return d
}

// pod has the fields of a Pod that matter here.
type pod struct {
	Metadata struct {
		Name                string
		CreationTimestamp   string
		Labels, Annotations map[string]string
	}
	Status struct {
		Phase, Reason, Message string
		ContainerStatuses      []struct {
			State struct {
				Terminated *struct {
					ExitCode        int
					Reason, Message string
				}
			}
		}
	}
}

// Collect reads the pods of a Job, the output of kubectl get pods -o json, and returns all cells of
// its matrix. A cell without a pod that has ended was not run. All pods of a cell but its last one
// are retries.
func Collect(r io.Reader) ([]matrix.Done, error) {
	var list struct{ Items []pod }
	if err := json.NewDecoder(r).Decode(&list); err == io.EOF {
		return nil, errors.New("is empty; want the output of kubectl get pods -o json")
	} else if err != nil {
		return nil, fmt.Errorf("want the output of kubectl get pods -o json: %w", err)
	}
	if len(list.Items) == 0 {
		return nil, errors.New("has no pods; select those of a Job with -l job-name=NAME")
	}
	sort.SliceStable(list.Items, func(i, j int) bool { // in the order of RFC 3339, in UTC
		return list.Items[i].Metadata.CreationTimestamp < list.Items[j].Metadata.CreationTimestamp
	})
	const jobLabel, indexLabel = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"
	first := list.Items[0].Metadata
	all, err := cellsOf(first.Annotations[matrixAnnotation])
	if err != nil {
		return nil, fmt.Errorf("pod %s is of no Job of gvm test --emit: %w", first.Name, err)
	}
	for _, p := range list.Items {
		if got, want := p.Metadata.Labels[jobLabel], first.Labels[jobLabel]; got != want {
			return nil, fmt.Errorf("has pods of two Jobs, %s and %s; select those of one with -l job-name=NAME", want, got)
		}
		index, err := strconv.Atoi(p.Metadata.Annotations[indexLabel])
		if err != nil || index < 0 || index >= len(all) {
			return nil, fmt.Errorf("pod %s has the index %q of %d cells", p.Metadata.Name,
				p.Metadata.Annotations[indexLabel], len(all))
		}
		if p.Status.Phase == "Succeeded" || p.Status.Phase == "Failed" {
			p.addTo(&all[index])
		}
	}
	return all, nil
}

// cellsOf returns the cells of an annotation.
func cellsOf(annotation string) ([]matrix.Done, error) {
	var axes matrix.Axes
	if err := json.Unmarshal([]byte(annotation), &axes); err != nil {
		return nil, fmt.Errorf("annotation %s: %w", matrixAnnotation, err)
	}
	cells, err := axes.Cells()
	if err != nil {
		return nil, fmt.Errorf("annotation %s: %w", matrixAnnotation, err)
	}
	all := make([]matrix.Done, len(cells))
	for i, c := range cells {
		all[i].Cell = c
	}
	return all, nil
}

// addTo adds the attempts of a pod that has ended to its cell.
func (p *pod) addTo(d *matrix.Done) {
	reason, said := p.Status.Reason, strings.TrimSpace(p.Status.Message)
	for _, c := range p.Status.ContainerStatuses {
		if t := c.State.Terminated; t != nil {
			reason, said = fmt.Sprintf("%s, status %d", t.Reason, t.ExitCode), strings.TrimSpace(t.Message)
		}
	}
	var m matrix.Done
	err := json.Unmarshal([]byte(said), &m)
	if err != nil || m.Name != d.Name || len(m.Attempts) == 0 || slices.ContainsFunc(m.Attempts,
		func(a matrix.Attempt) bool { return a.Result == nil || a.Result.Format != testrun.Format }) {
		// gvm did not come to its end.
		if said != "" {
			reason += ": " + said[strings.LastIndexByte(said, '\n')+1:]
		}
		err := fmt.Errorf("pod %s: %s", p.Metadata.Name, reason)
		m = matrix.Done{Attempts: []matrix.Attempt{{Result: testrun.Untested(err)}}}
	}
	d.Took += m.Took
	d.Attempts = append(d.Attempts, m.Attempts...)
}
