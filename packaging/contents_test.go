package packaging_test

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// testContents compares the list of contents of a release with those that the programs have in
// them.
func testContents(t *testing.T, bin string, programs map[string]*buildinfo.BuildInfo) {
	args := []string{"run", "./packaging/sbom", "1.2.3", "0123abcd"}
	names := slices.Sorted(maps.Keys(programs))
	for _, name := range names {
		args = append(args, filepath.Join(bin, name))
	}
	text := outputIn(t, "..", []string{"SOURCE_DATE_EPOCH=1700000000"}, "go", args...)
	var list struct {
		BOMFormat, SpecVersion string
		Metadata               struct {
			Timestamp string
			Component struct {
				Name, Version string
				Properties    []struct{ Name, Value string }
			}
		}
		Components []struct {
			Type, Name, Version, PURL string
			Ref                       string `json:"bom-ref"`
			Hashes                    []struct{ Alg, Content string }
			Licenses                  []struct{ Expression string }
			Properties                []struct{ Name, Value string }
		}
		Dependencies []struct {
			Ref       string
			DependsOn []string
		}
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatal(err)
	}
	of := list.Metadata.Component
	if list.BOMFormat != "CycloneDX" || list.SpecVersion != "1.6" || list.Metadata.Timestamp != "2023-11-14T22:13:20Z" ||
		of.Name != "gvm" || of.Version != "1.2.3" || of.Properties[0].Value != "0123abcd" {
		t.Errorf("it begins %.500s", text)
	}
	depends := map[string][]string{}
	for _, d := range list.Dependencies {
		depends[d.Ref] = d.DependsOn
	}
	modules := map[string]string{} // module and version to the sum of go.sum
	for _, name := range names {
		info := programs[name]
		version := strings.TrimPrefix(info.GoVersion, "go")
		want := []string{"pkg:golang/stdlib@" + version}
		modules["stdlib "+version] = ""
		for _, m := range info.Deps {
			want = append(want, "pkg:golang/"+m.Path+"@"+m.Version)
			modules[m.Path+" "+m.Version] = m.Sum
		}
		slices.Sort(want)
		if got := depends["program "+name]; !slices.Equal(got, want) {
			t.Errorf("%s is said to have %q, and has %q", name, got, want)
		}
	}
	for _, c := range list.Components {
		if len(c.Licenses) != 1 || c.Licenses[0].Expression == "" {
			t.Errorf("%s has the licenses %v", c.Name, c.Licenses)
		}
		if info := programs[c.Name]; info != nil {
			b, err := os.ReadFile(filepath.Join(bin, c.Name))
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(b)
			if len(c.Hashes) != 1 || c.Hashes[0].Content != hex.EncodeToString(sum[:]) || c.Version != "1.2.3" {
				t.Errorf("%s %s has the hashes %v, want %x", c.Name, c.Version, c.Hashes, sum)
			}
			settings := map[string]string{}
			for _, p := range c.Properties {
				settings[strings.TrimPrefix(p.Name, "gvm:build:")] = p.Value
			}
			for _, s := range info.Settings {
				if settings[s.Key] != s.Value {
					t.Errorf("%s is said to have %s=%s, and has %s", c.Name, s.Key, settings[s.Key], s.Value)
				}
			}
			continue
		}
		sum, ok := modules[c.Name+" "+c.Version]
		if !ok || sum != "" && (len(c.Properties) != 1 || c.Properties[0].Value != sum) || c.PURL != c.Ref {
			t.Errorf("%s %s, sum %v: no program has it; or want %q", c.Name, c.Version, c.Properties, sum)
		}
		delete(modules, c.Name+" "+c.Version)
	}
	if len(modules) > 0 {
		t.Errorf("the list lacks %q", slices.Sorted(maps.Keys(modules)))
	}
}

// testDependencies checks that docs/dependencies.md has the modules of the programs in its first
// table, and in its second the others of go.mod.
func testDependencies(t *testing.T, programs map[string]*buildinfo.BuildInfo) {
	var mod struct {
		Require []struct{ Path, Version string }
	}
	if err := json.Unmarshal([]byte(output(t, "go", "mod", "edit", "-json")), &mod); err != nil {
		t.Fatal(err)
	}
	users := map[string][]string{} // programs, by module and version
	for _, name := range slices.Sorted(maps.Keys(programs)) {
		for _, m := range programs[name].Deps {
			users[m.Path+" "+m.Version] = append(users[m.Path+" "+m.Version], name)
		}
	}
	others := map[string]bool{}
	for _, m := range mod.Require {
		if users[m.Path+" "+m.Version] == nil {
			others[m.Path+" "+m.Version] = true
		}
	}
	page, err := os.ReadFile("../docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	linked, unlinked, _ := strings.Cut(string(page), "\n## Tests and tools\n")
	rows := func(text string, row func(module, users string)) {
		for line := range strings.Lines(text) {
			cells := strings.Split(strings.TrimSpace(line), "|")
			if len(cells) != 7 || strings.HasPrefix(cells[1], "--") || strings.TrimSpace(cells[1]) == "module" {
				continue
			}
			for i := range cells {
				cells[i] = strings.TrimSpace(cells[i])
			}
			if slices.Contains(cells[1:6], "") {
				t.Errorf("a cell is empty: %s", line)
			}
			if cells[1] != "stdlib" {
				row(cells[1]+" "+cells[2], cells[3])
			}
		}
	}
	rows(linked, func(module, by string) {
		if want := strings.Join(users[module], ", "); by != want {
			t.Errorf("%s is in the programs %q, and not in %q", module, want, by)
		}
		delete(users, module)
	})
	rows(unlinked, func(module, _ string) {
		if !others[module] {
			t.Errorf("%s is in a program, or not in go.mod", module)
		}
		delete(others, module)
	})
	for module, by := range users {
		t.Errorf("no row for %s, which is in %s", module, strings.Join(by, ", "))
	}
	for module := range others {
		t.Errorf("no row for %s, which go.mod has", module)
	}
}
