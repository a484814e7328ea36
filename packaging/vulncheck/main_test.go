package main

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

// list is in the form of govulncheck -format json: one vulnerability of a module is called, one
// only imported; one of the standard library is called.
const list = `{"config":{"protocol_version":"v1.0.0"}}
{"osv":{"id":"GO-1","summary":"Excessive allocation"}}
{"osv":{"id":"GO-2","summary":"Panic"}}
{"osv":{"id":"GO-3","summary":"Wrong answer"}}
{"finding":{"osv":"GO-1","fixed_version":"v0.39.0","trace":[{"module":"example.org/image","version":"v0.30.0"}]}}
{"finding":{"osv":"GO-1","fixed_version":"v0.39.0","trace":[
	{"module":"example.org/image","version":"v0.30.0","package":"example.org/image/sfnt","function":"Parse"},
	{"module":"gvm","package":"gvm/plot/draw","function":"init"}]}}
{"finding":{"osv":"GO-2","trace":[{"module":"example.org/text","version":"v1.0.0","package":"example.org/text"}]}}
{"finding":{"osv":"GO-3","fixed_version":"v1.26.9","trace":[
	{"module":"stdlib","version":"v1.26.8","package":"net/http","function":"Do"},
	{"module":"gvm","package":"gvm/control","function":"ask"}]}}
`

func TestReport(t *testing.T) {
	const (
		module = "vulncheck: GO-1: Excessive allocation, in example.org/image v0.30.0, fixed in v0.39.0; " +
			"called by gvm/plot/draw.init\n"
		standard = "vulncheck: GO-3: Wrong answer, in stdlib v1.26.8, fixed in v1.26.9; called by gvm/control.ask\n"
		counts   = " vulnerabilities of modules are called, "
	)
	all, err := read(strings.NewReader(list))
	if err != nil || len(all) != 3 {
		t.Fatalf("%d vulnerabilities: %v", len(all), err)
	}
	for _, tt := range []struct {
		name          string
		found         []*vulnerability
		optional      bool
		lines, failed string
	}{
		{"all", all, false, module + standard, "1" + counts + "1 of Go's standard library, and 1 are not called"},
		{"optional", all, true, module + standard, "1" + counts + "1 of Go's standard library, and 1 are not called"},
		{"standard", all[1:], false, standard, "0" + counts + "1 of Go's standard library, and 1 are not called"},
		{"optional standard", all[1:], true,
			standard + "vulncheck: 0" + counts + "1 of Go's standard library, and 1 are not called\n", ""},
		{"none", nil, false, "vulncheck: 0" + counts + "0 of Go's standard library, and 0 are not called\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			failed := ""
			if err := report(&out, tt.found, tt.optional); err != nil {
				failed = err.Error()
			}
			if out.String() != tt.lines || failed != tt.failed {
				t.Errorf("prints\n%swith error %q, want\n%swith %q", &out, failed, tt.lines, tt.failed)
			}
		})
	}
	if _, err := read(strings.NewReader(list[:len(list)-10])); err == nil {
		t.Error("half a list is no error")
	}
}

// TestDatabase: a database that was chosen is used, or there is none.
func TestDatabase(t *testing.T) {
	status := http.StatusOK
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) }))
	defer server.Close()
	dir := "file://" + t.TempDir()
	for _, chosen := range []string{dir, server.URL} {
		if source, _, err := database(t.Context(), chosen); source != chosen || err != nil {
			t.Errorf("%s gives %q, %v", chosen, source, err)
		}
	}
	status = http.StatusNotFound
	gone := httptest.NewServer(nil)
	gone.Close()
	for _, chosen := range []string{filepath.Join(dir, "missing"), server.URL, gone.URL, "ftp://example.org"} {
		if source, _, err := database(t.Context(), chosen); err == nil {
			t.Errorf("%s gives %q", chosen, source)
		}
		t.Setenv("GOVULNDB", chosen)
		var out strings.Builder
		if err := run(t.Context(), &out, []string{"."}); err == nil || !strings.Contains(err.Error(), "nothing was checked") {
			t.Errorf("without a database: %v\n%s", err, &out)
		}
		if err := run(t.Context(), &out, []string{"-optional", "."}); err != nil ||
			!strings.HasPrefix(out.String(), "vulncheck: nothing was checked: no database: ") ||
			strings.Count(out.String(), "\n") != 1 {
			t.Errorf("-optional: %v\n%s", err, &out)
		}
	}
}
