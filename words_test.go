package gvm_test

import (
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// eachFile calls f for every file of the tree whose name ends with suffix.
func eachFile(t *testing.T, suffix string, f func(path, text string)) {
	t.Helper()
	if err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && slices.Contains([]string{".git", "bin", "bench", "testdata"}, d.Name()):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, suffix):
			return nil
		}
		text, err := os.ReadFile(path)
		if err == nil {
			f(path, string(text))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// comments calls f for each line of each comment of a Go file, from the column on in which the
// comment begins, with the line's number.
func comments(path, text string, f func(line int, comment string)) {
	set := token.NewFileSet()
	file := set.AddFile(path, -1, len(text))
	var s scanner.Scanner
	s.Init(file, []byte(text), nil, scanner.ScanComments)
	for {
		switch pos, tok, lit := s.Scan(); tok {
		case token.EOF:
			return
		case token.COMMENT:
			n := file.Line(pos)
			for line := range strings.SplitSeq(lit, "\n") {
				f(n, line)
				n++
			}
		}
	}
}

// prose calls f for each line of a page of documentation that is no code and in no table.
func prose(text string, f func(line int, text string)) {
	code, n := false, 0
	for line := range strings.Lines(text) {
		n++
		if strings.HasPrefix(line, "```") {
			code = !code
		}
		if !code && !strings.HasPrefix(line, "    ") && !strings.HasPrefix(line, "|") {
			f(n, strings.TrimSuffix(line, "\n"))
		}
	}
}

// TestLines checks that every line of Go ends by column 120, and every line that is a comment or
// prose by column 100. A tab counts as one column.
func TestLines(t *testing.T) {
	check := func(path string, n, most int, line string) {
		if width := utf8.RuneCountInString(line); width > most {
			t.Errorf("%s:%d has %d columns; break it by column %d", path, n, width, most)
		}
	}
	eachFile(t, ".go", func(path, text string) {
		lines := strings.Split(text, "\n")
		for i, line := range lines {
			check(path, i+1, 120, line)
		}
		comments(path, text, func(n int, comment string) {
			if line := lines[n-1]; strings.TrimSpace(line) == strings.TrimSpace(comment) {
				check(path, n, 100, line)
			}
		})
	})
	eachFile(t, ".md", func(path, text string) {
		prose(text, func(n int, line string) { check(path, n, 100, line) })
	})
}

// TestDialect counts two kinds of words in comments and in documentation: one idea a sentence,
// whose subject is a thing with a name, needs few of them. Go's package os has 0.3 and 0.03 of
// 1,000.
func TestDialect(t *testing.T) {
	word := regexp.MustCompile(`\pL[\pL'-]*`)
	for _, tt := range []struct {
		words string
		most  float64 // of 1,000
	}{
		{`(?i)\bwhat\b`, 1},
		{`(?i)\b(who|whom|whoever|nobody|somebody|anybody|everybody|whatever)\b`, 0.5},
	} {
		words := regexp.MustCompile(tt.words)
		check := func(kind string, each func(count func(line int, text string))) {
			all, found := 0, 0
			each(func(_ int, text string) {
				all += len(word.FindAllString(text, -1))
				found += len(words.FindAllString(text, -1))
			})
			share := 1000 * float64(found) / float64(all)
			t.Logf("%s: %d of %d words, %.2f of 1,000, match %s", kind, found, all, share, words)
			if share >= tt.most || all < 10_000 {
				t.Errorf("%s: %.2f of 1,000 words match %s: want less than %.1f", kind, share, words, tt.most)
			}
		}
		check("comments", func(count func(int, string)) {
			eachFile(t, ".go", func(path, text string) { comments(path, text, count) })
		})
		check("documentation", func(count func(int, string)) {
			eachFile(t, ".md", func(_, text string) { prose(text, count) })
		})
	}
}

// Names of code in documentation.
var (
	testName = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark|Example)\p{Lu}\w*`)
	fileName = regexp.MustCompile("`([\\w./-]+\\.go)`")
	nameIn   = regexp.MustCompile("((?:`[\\w.]+`,?\\s(?:and\\s)?)+)(?:in|of)\\s(?:package\\s)?" +
		"`?([a-z]\\w*(?:/\\w+)+(?:\\.go)?)`?")
	quoted = regexp.MustCompile("`(?:\\w+\\.)?(\\w+)`")
)

// TestNames checks the names of code in the documentation: each test exists, each file of Go, and
// each name that it says is in a file or package is declared there.
func TestNames(t *testing.T) {
	declared := map[string]map[string]bool{} // by file and by directory
	all := map[string]bool{}
	eachFile(t, ".go", func(path, text string) {
		f, err := parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, in := range []string{path, filepath.Dir(path)} {
			if declared[in] == nil {
				declared[in] = map[string]bool{}
			}
		}
		declare := func(name *ast.Ident) {
			all[name.Name] = true
			declared[path][name.Name], declared[filepath.Dir(path)][name.Name] = true, true
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				declare(n.Name)
				return false
			case *ast.TypeSpec:
				declare(n.Name)
			case *ast.ValueSpec:
				for _, name := range n.Names {
					declare(name)
				}
			case *ast.Field:
				for _, name := range n.Names {
					declare(name)
				}
			}
			return true
		})
	})
	named := 0
	eachFile(t, ".md", func(page, text string) {
		if page == "CHANGELOG.md" { // of other times
			return
		}
		for _, name := range testName.FindAllString(text, -1) {
			if named++; !all[name] {
				t.Errorf("%s has %s, which is nowhere", page, name)
			}
		}
		for _, m := range fileName.FindAllStringSubmatch(text, -1) {
			named++
			found := false
			for path := range declared {
				found = found || path == m[1] || strings.HasSuffix(path, "/"+m[1])
			}
			if !found {
				t.Errorf("%s has %s, which is nowhere", page, m[1])
			}
		}
		for _, m := range nameIn.FindAllStringSubmatch(text, -1) {
			in := declared[m[2]]
			if in == nil {
				continue // no file or package of Go
			}
			for _, name := range quoted.FindAllStringSubmatch(m[1], -1) {
				if named++; !in[name[1]] {
					t.Errorf("%s has %s in %s, which does not declare it", page, name[1], m[2])
				}
			}
		}
	})
	if named < 300 {
		t.Errorf("only %d names found", named)
	}
}
