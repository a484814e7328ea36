// Sbom writes a list of the contents of gvm's programs to standard output, as CycloneDX 1.6 in
// JSON.
//
//	SOURCE_DATE_EPOCH=SECONDS go run ./packaging/sbom VERSION COMMIT PROGRAM...
//
// It reads the modules and the settings of each PROGRAM out of the program, and their licenses out
// of docs/dependencies.md. The same programs give the same bytes.
package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

// bom and the types below have the names of the specification (cyclonedx.org/docs/1.6/json).
type bom struct {
	BOMFormat    string       `json:"bomFormat"`
	SpecVersion  string       `json:"specVersion"`
	Version      int          `json:"version"`
	Metadata     metadata     `json:"metadata"`
	Components   []component  `json:"components"`
	Dependencies []dependency `json:"dependencies"`
}

type metadata struct {
	Timestamp string    `json:"timestamp"`
	Component component `json:"component"`
}

type component struct {
	Type       string     `json:"type"`
	BOMRef     string     `json:"bom-ref"`
	Name       string     `json:"name"`
	Version    string     `json:"version"`
	Hashes     []hash     `json:"hashes,omitempty"`
	Licenses   []license  `json:"licenses"`
	PURL       string     `json:"purl,omitempty"`
	Properties []property `json:"properties,omitempty"`
}

type hash struct {
	Alg     string `json:"alg"`
	Content string `json:"content"`
}

type license struct {
	Expression string `json:"expression"`
}

type property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type dependency struct {
	Ref       string   `json:"ref"`
	DependsOn []string `json:"dependsOn"`
}

func run(w io.Writer, args []string) error {
	if len(args) < 3 {
		return errors.New("want VERSION, COMMIT and at least one PROGRAM")
	}
	version, commit, programs := args[0], args[1], args[2:]
	seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH is no time: %w", err)
	}
	licenses, err := readLicenses("docs/dependencies.md")
	if err != nil {
		return err
	}
	own := []license{{"Apache-2.0"}}
	list := bom{BOMFormat: "CycloneDX", SpecVersion: "1.6", Version: 1, Metadata: metadata{
		Timestamp: time.Unix(seconds, 0).UTC().Format(time.RFC3339),
		Component: component{Type: "application", BOMRef: "gvm", Name: "gvm", Version: version, Licenses: own,
			Properties: []property{{"gvm:commit", commit}}},
	}}
	whole := dependency{Ref: "gvm"}
	modules := map[string]component{}
	for _, path := range programs {
		name := filepath.Base(path)
		p := component{Type: "application", BOMRef: "program " + name, Name: name, Version: version, Licenses: own}
		depends, err := p.read(path, licenses, modules)
		if err != nil {
			return err
		}
		whole.DependsOn = append(whole.DependsOn, p.BOMRef)
		list.Components = append(list.Components, p)
		list.Dependencies = append(list.Dependencies, dependency{p.BOMRef, depends})
	}
	list.Dependencies = append(list.Dependencies, whole)
	first := len(list.Components)
	for _, m := range modules {
		list.Components = append(list.Components, m)
	}
	slices.SortFunc(list.Components[first:], func(a, b component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "\t")
	return e.Encode(list)
}

// read adds to p the hash and the settings of the program at path, and to modules those that are in
// it. It returns their names for dependencies.
func (p *component) read(path string, licenses map[string]string, modules map[string]component) ([]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(text)
	p.Hashes = []hash{{"SHA-256", hex.EncodeToString(sum[:])}}
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for _, s := range info.Settings {
		p.Properties = append(p.Properties, property{"gvm:build:" + s.Key, s.Value})
	}
	goVersion := strings.TrimPrefix(info.GoVersion, "go")
	std := component{Name: "stdlib", Version: goVersion, PURL: "pkg:golang/stdlib@" + goVersion}
	all := []component{std}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		all = append(all, component{Name: m.Path, Version: m.Version, PURL: "pkg:golang/" + m.Path + "@" + m.Version,
			Properties: []property{{"gvm:go.sum", m.Sum}}})
	}
	var depends []string
	for _, m := range all {
		if licenses[m.Name] == "" {
			return nil, fmt.Errorf("%s has the module %s, which docs/dependencies.md does not list", path, m.Name)
		}
		m.Type, m.BOMRef, m.Licenses = "library", m.PURL, []license{{licenses[m.Name]}}
		modules[m.BOMRef] = m
		depends = append(depends, m.BOMRef)
	}
	slices.Sort(depends)
	return depends, nil
}

// readLicenses returns the last column of the page's tables, which are SPDX expressions, by the
// first.
func readLicenses(page string) (map[string]string, error) {
	text, err := os.ReadFile(page)
	if err != nil {
		return nil, err
	}
	licenses := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(strings.TrimSpace(line), "|"); len(cells) == 7 {
			licenses[strings.TrimSpace(cells[1])] = strings.TrimSpace(cells[5])
		}
	}
	return licenses, nil
}
