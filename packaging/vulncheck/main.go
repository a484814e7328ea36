// Vulncheck looks with govulncheck for known vulnerabilities in programs and Go's standard library.
//
//	go run ./packaging/vulncheck [-optional] [-tags TAGS] PACKAGE...
//
// The database is the one at GOVULNDB, or else vuln.go.dev, or else the newest copy on the Go
// module proxy. The status is 1 if a program calls vulnerable code, and if no database could be
// read.
//
// With -optional the status is 0 for faults that no change of this tree mends: those of the
// standard library, which a newer Go mends, and the lack of a database. The lines are the same.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Stdout, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vulncheck:", err)
		os.Exit(1)
	}
}

const vulnGoDev = "https://vuln.go.dev"

func run(ctx context.Context, w io.Writer, args []string) error {
	flags := flag.NewFlagSet("vulncheck", flag.ContinueOnError)
	optional := flags.Bool("optional", false, "faults that no change of this tree mends are no failure")
	tags := flags.String("tags", "", "build tags")
	if err := flags.Parse(args); err != nil {
		return err
	}
	source, note, err := database(ctx, os.Getenv("GOVULNDB"))
	if err != nil {
		if err = fmt.Errorf("nothing was checked: no database: %w", err); *optional {
			fmt.Fprintln(w, "vulncheck:", err)
			return nil
		}
		return err
	}
	work, err := os.MkdirTemp("", "vulncheck")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	program := filepath.Join(work, "govulncheck")
	if _, err := output(ctx, "", "go", "build", "-C", "packaging/govulncheck", "-o", program,
		"golang.org/x/vuln/cmd/govulncheck"); err != nil {
		return err
	}
	list, err := output(ctx, "", program,
		append([]string{"-db", source, "-format", "json", "-tags", *tags}, flags.Args()...)...)
	if err != nil {
		return err
	}
	found, err := read(bytes.NewReader(list))
	if err != nil {
		return fmt.Errorf("reading govulncheck's list: %w", err)
	}
	fmt.Fprintf(w, "vulncheck: database %s%s\n", source, note)
	return report(w, found, *optional)
}

// database returns the URL of the first database that can be read, and a note on it.
func database(ctx context.Context, chosen string) (source, note string, err error) {
	source = cmp.Or(chosen, vulnGoDev)
	if dir, ok := strings.CutPrefix(source, "file://"); ok {
		_, err := os.ReadDir(dir)
		return source, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodHead, source+"/index/db.json.gz", nil)
	if err != nil {
		return "", "", err
	}
	answer, err := http.DefaultClient.Do(request)
	if err == nil {
		answer.Body.Close()
		if answer.StatusCode == http.StatusOK {
			return source, "", nil
		}
		err = fmt.Errorf("%s answers %s", source, answer.Status)
	}
	if chosen != "" {
		return "", "", err
	}
	dir, version, copyErr := proxyCopy(ctx)
	if copyErr != nil {
		return "", "", errors.Join(err, copyErr)
	}
	return "file://" + dir, ", golang.org/x/vulndb " + version, nil
}

// proxyCopy fetches the newest copy of the database that the Go module proxy has.
func proxyCopy(ctx context.Context) (dir, version string, err error) {
	work, err := os.MkdirTemp("", "vulncheck")
	if err != nil {
		return "", "", err
	}
	defer os.RemoveAll(work)
	if err := os.WriteFile(filepath.Join(work, "go.mod"), []byte("module copy\n"), 0o600); err != nil {
		return "", "", err
	}
	out, err := output(ctx, work, "go", "mod", "download", "-json", "golang.org/x/vulndb@latest")
	if err != nil {
		return "", "", err
	}
	var module struct{ Dir, Version string }
	if err := json.Unmarshal(out, &module); err != nil {
		return "", "", err
	}
	dir = filepath.Join(module.Dir, "data/osv")
	_, err = os.ReadDir(dir)
	return dir, module.Version, err
}

func output(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = dir
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, bytes.TrimSpace(errs.Bytes()))
	}
	return out, nil
}

// vulnerability is one that the programs have.
type vulnerability struct {
	id, summary, module, version, fixed string
	caller                              string // "" if they do not call its functions
}

// standard reports whether it is in Go itself, and not in a module of go.mod.
func (v *vulnerability) standard() bool { return v.module == "stdlib" || v.module == "toolchain" }

// read reads the messages of govulncheck -format json.
func read(r io.Reader) (found []*vulnerability, err error) {
	summaries := map[string]string{}
	d := json.NewDecoder(r)
	for {
		var m struct {
			OSV     *struct{ ID, Summary string }
			Finding *struct {
				OSV   string
				Fixed string `json:"fixed_version"`
				Trace []struct{ Module, Version, Package, Receiver, Function string }
			}
		}
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if m.OSV != nil {
			summaries[m.OSV.ID] = m.OSV.Summary
		}
		if m.Finding == nil || len(m.Finding.Trace) == 0 {
			continue
		}
		f, at, from := m.Finding, m.Finding.Trace[0], m.Finding.Trace[len(m.Finding.Trace)-1]
		i := slices.IndexFunc(found, func(v *vulnerability) bool { return v.id == f.OSV && v.module == at.Module })
		if i < 0 {
			i = len(found)
			found = append(found, &vulnerability{id: f.OSV, module: at.Module, version: at.Version, fixed: f.Fixed})
		}
		if at.Function != "" {
			found[i].caller = from.Package + "." + from.Function
		}
	}
	for _, v := range found {
		v.summary = summaries[v.id]
	}
	slices.SortFunc(found, func(a, b *vulnerability) int {
		return cmp.Or(cmp.Compare(a.module, b.module), cmp.Compare(a.id, b.id))
	})
	return found, nil
}

// report prints the vulnerabilities that are called, and counts the others.
func report(w io.Writer, found []*vulnerability, optional bool) error {
	standard, modules := 0, 0
	for _, v := range found {
		if v.caller == "" {
			continue
		}
		fmt.Fprintf(w, "vulncheck: %s: %s, in %s %s, fixed in %s; called by %s\n", v.id, v.summary, v.module, v.version,
			cmp.Or(v.fixed, "no version"), v.caller)
		if v.standard() {
			standard++
		} else {
			modules++
		}
	}
	summary := fmt.Sprintf("%d vulnerabilities of modules are called, %d of Go's standard library, and %d are not called",
		modules, standard, len(found)-modules-standard)
	if modules > 0 || standard > 0 && !optional {
		return errors.New(summary)
	}
	fmt.Fprintln(w, "vulncheck:", summary)
	return nil
}
