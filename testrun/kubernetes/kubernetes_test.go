package kubernetes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"gvm/testrun"
	"gvm/testrun/matrix"
	"gvm/text"
	"gvm/verdict"
	"gvm/verdict/klog"
)

// axes have four cells.
var axes = matrix.Axes{Kernels: []text.Name{"/boot/a", "/boot/b"}, CPUs: []int{1, 4}, Backends: []string{""}, Rounds: 1}

// attempt is one with a value in each field that JSON has.
func attempt(kind testrun.Kind, status int) matrix.Attempt {
	return matrix.Attempt{
		Result: &testrun.Result{Format: testrun.Format, Kind: kind, Status: status, Text: "why",
			Command: &testrun.CommandEnd{Status: &status}, Rung: "vsock", Kernel: "/boot/a", Release: "6.1",
			Missing: []string{"m"},
			Reports: []verdict.Report{{Report: klog.Report{Kind: "oops", Title: "t", Fingerprint: "f", Text: []string{"t"},
				Frames: []klog.Frame{{Symbol: "s", Offset: 1, Size: 2}}}, Count: 3, Fails: true}},
			Failing: 1, Dropped: 2,
			Times: testrun.Times{Start: time.Unix(1, 0).UTC(), Hello: testrun.Millis(1234567 * time.Microsecond)},
			Log:   []string{"l"}, Detail: []string{"d"},
		},
		Output: []string{"o"},
	}
}

// pods returns the output of kubectl get pods -o json: a pod for each message, of the index, the
// phase and the second that it begins with.
func pods(t *testing.T, list ...map[string]any) string {
	t.Helper()
	text, err := json.Marshal(axes)
	if err != nil {
		t.Fatal(err)
	}
	var items []any
	for i, p := range list {
		pod := map[string]any{"metadata": map[string]any{"name": fmt.Sprint("p", i), "creationTimestamp": p["created"],
			"labels": map[string]string{"batch.kubernetes.io/job-name": "j"},
			"annotations": map[string]any{matrixAnnotation: string(text),
				"batch.kubernetes.io/job-completion-index": p["index"]}},
			"status": map[string]any{"phase": p["phase"]}}
		if p["message"] != nil {
			pod["status"].(map[string]any)["containerStatuses"] = []any{map[string]any{"state": map[string]any{
				"terminated": map[string]any{"exitCode": 9, "reason": "Error", "message": p["message"]}}}}
		}
		items = append(items, pod)
	}
	b, err := json.Marshal(map[string]any{"kind": "List", "items": items})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func message(t *testing.T, d matrix.Done) string {
	t.Helper()
	var b bytes.Buffer
	if err := Message(&b, d); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestCollect: cells come back as they were, with those of earlier pods as retries, in the order of
// the pods' creation; a pod that gvm did not come to an end in is not tested.
func TestCollect(t *testing.T) {
	cells, err := axes.Cells()
	if err != nil {
		t.Fatal(err)
	}
	done := func(i int, attempts ...matrix.Attempt) matrix.Done {
		return matrix.Done{Cell: cells[i], Attempts: attempts, Took: time.Duration(i) * time.Second}
	}
	passed := done(0, attempt(testrun.Crash, 121), attempt(testrun.Exited, 0))
	failed := done(1, attempt(testrun.Panic, 120))
	in := pods(t,
		map[string]any{"index": "1", "phase": "Failed", "created": "2026-01-01T00:00:02Z", "message": message(t, failed)},
		map[string]any{"index": "0", "phase": "Succeeded", "created": "2026-01-01T00:00:03Z", "message": message(t, passed)},
		map[string]any{"index": "1", "phase": "Failed", "created": "2026-01-01T00:00:01Z", "message": "gvm: no KVM\n"},
		map[string]any{"index": "2", "phase": "Failed", "created": "2026-01-01T00:00:01Z"},
		map[string]any{"index": "3", "phase": "Running", "created": "2026-01-01T00:00:01Z"})
	all, err := Collect(strings.NewReader(in))
	if err != nil || len(all) != 4 {
		t.Fatalf("%v, %v", all, err)
	}
	if !reflect.DeepEqual(all[0], passed) {
		t.Errorf("cell 0 is %+v, want %+v", all[0], passed)
	}
	if d := all[1]; d.Retries() != 1 || !reflect.DeepEqual(d.Attempts[1], failed.Attempts[0]) ||
		d.Attempts[0].Result.Text != "pod p2: Error, status 9: gvm: no KVM" || d.Took != time.Second {
		t.Errorf("cell 1 is %+v", d)
	}
	if d := all[2]; d.Result() == nil || d.Result().Kind != testrun.NotTested {
		t.Errorf("cell 2 is %+v", d)
	}
	if all[3].Result() != nil {
		t.Errorf("cell 3 is %+v, and its pod runs", all[3])
	}
}

// TestCollectErrors: input that is not that of one Job is refused.
func TestCollectErrors(t *testing.T) {
	one := pods(t, map[string]any{"index": "0", "phase": "Failed"})
	two := strings.Replace(one, `{"items":[`, `{"items":[{"metadata":{"creationTimestamp":"2026-01-01T00:00:01Z",`+
		`"labels":{"batch.kubernetes.io/job-name":"k"}}},`, 1)
	for _, tt := range []struct{ in, want string }{
		{"", "is empty; want the output of kubectl get pods -o json"},
		{"[]", "want the output of kubectl get pods -o json: "},
		{`{"items":[]}`, "has no pods"},
		{`{"items":[{}]}`, "is of no Job of gvm test --emit"},
		{strings.ReplaceAll(one, `\"rounds\":1`, `\"rounds\":0`), "no cells"},
		{strings.ReplaceAll(one, `index":"0"`, `index":"4"`), `pod p0 has the index "4" of 4 cells`},
		{strings.ReplaceAll(one, `index":"0"`, `index":"x"`), `pod p0 has the index "x"`},
		{two, "has pods of two Jobs, j and k"},
	} {
		if all, err := Collect(strings.NewReader(tt.in)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, %v, want %q", tt.in, all, err, tt.want)
		}
	}
}

// TestWriteErrors: YAML has no bytes that are not UTF-8.
func TestWriteErrors(t *testing.T) {
	if err := (Job{Axes: axes, Args: []string{"\xff"}}).Write(&bytes.Buffer{}); err == nil {
		t.Error("an argument that is no UTF-8 is accepted")
	}
}

// FuzzMessage: a message of any verdict fits, and keeps its kind and status.
func FuzzMessage(f *testing.F) {
	f.Add("line", 100, 3)
	f.Add("\x00\u2028\xff<&>", 64, 1)
	f.Add(strings.Repeat("\u2028\xff\x80", 40), 64, 1)
	f.Fuzz(func(t *testing.T, s string, lines, attempts int) {
		if lines < 0 || lines > 200 || attempts < 1 || attempts > 20 || len(s) > 4096 {
			t.Skip()
		}
		d := matrix.Done{Cell: matrix.Cell{Name: strings.Repeat("n", 190), Kernel: text.Name(s)}}
		for range attempts {
			a := attempt(testrun.NotStarted, 127)
			r := a.Result
			r.Text, r.Kernel, r.Release, r.Command.Error = s, text.Name(s), s, s
			r.Reports[0].Title, r.Reports[0].Frames[0].Symbol = s, s
			for range lines {
				for _, list := range []*[]string{&r.Log, &r.Missing, &r.Detail, &a.Output} {
					*list = append(*list, s)
				}
				r.Reports = append(r.Reports, r.Reports[0])
			}
			d.Attempts = append(d.Attempts, a)
		}
		before, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		text := message(t, d)
		var got matrix.Done
		if err := json.Unmarshal([]byte(text), &got); err != nil || len(text) > maxMessage || got.Name != d.Name ||
			got.Result().Kind != testrun.NotStarted || got.Result().Status != 127 {
			t.Fatalf("%d bytes, %v: %s", len(text), err, text)
		}
		if k := string(got.Result().Kernel); !strings.HasPrefix(s, k) || len(k) < min(len(s), 80-utf8.UTFMax) {
			t.Errorf("the kernel %q became %q", s, k)
		}
		if after, err := json.Marshal(d); err != nil || !bytes.Equal(after, before) {
			t.Error("the cell itself was cut")
		}
	})
}

// FuzzCollect: pods come from elsewhere.
func FuzzCollect(f *testing.F) {
	f.Add([]byte(`{"items":[{"metadata":{"annotations":{"gvm-matrix":` +
		`"{\"kernels\":[\"k\"],\"cpus\":[1],\"backends\":[\"\"],\"rounds\":2}",` +
		`"batch.kubernetes.io/job-completion-index":"1"}},"status":{"phase":"Failed"}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := Collect(bytes.NewReader(b))
		if err != nil {
			return
		}
		for _, write := range []func() error{
			func() error { return matrix.Table(&bytes.Buffer{}, all) },
			func() error { return matrix.JUnit(&bytes.Buffer{}, all) },
			func() error { return matrix.JSON(&bytes.Buffer{}, all, matrix.Status(all)) },
		} {
			if err := write(); err != nil {
				t.Error(err)
			}
		}
	})
}
