package gvm_test

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/messages.txt anew")

// message is a text of gvm's sources that a user can see. … stands for operands that are no
// literal.
type message struct{ file, kind, text string }

// messageKinds are the kinds of the texts that functions and fields take.
var messageKinds = map[string]string{
	"New": "error", "Errorf": "error", "note": "note", "Note": "note", "warn": "note",
	"Usage": "usage", "ArgsUsage": "usage",
}

// TestMessages holds docs/messages.txt against the sources, so that a review shows a changed
// message among all others, and every message against the rules of CONTRIBUTING.md. -update writes
// the file.
func TestMessages(t *testing.T) {
	var all []message
	if err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (strings.HasSuffix(path, "test") || slices.Contains([]string{".git", "bin", "bench", "guest-tests",
			"testdata"}, path)):
			return filepath.SkipDir // no part of gvm
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err == nil {
			all = append(all, messagesOf(path, file)...)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	list, file := "", ""
	for _, m := range all {
		kinds[m.kind]++
		if m.file != file {
			file = m.file
			list += file + "\n"
		}
		list += fmt.Sprintf("\t%-5s %s\n", m.kind, strings.ReplaceAll(strings.Trim(m.text, "\n"), "\n", "\n\t      "))
		if fault := fault(m); fault != "" {
			t.Errorf("%s: %s %q: %s", m.file, m.kind, m.text, fault)
		}
	}
	if kinds["error"] < 500 || kinds["note"] < 20 || kinds["usage"] < 100 || kinds["text"] < 200 {
		t.Errorf("only %v found", kinds)
	}
	const path = "docs/messages.txt"
	switch was, err := os.ReadFile(path); {
	case *update:
		if err := os.WriteFile(path, []byte(list), 0o644); err != nil {
			t.Fatal(err)
		}
	case err != nil:
		t.Error(err)
	case string(was) != list:
		t.Errorf("%s differs from the sources: go test -run TestMessages . -update, and read the difference", path)
	}
}

// messagesOf returns the messages of a file in their order: the texts of messageKinds, and all
// others that have a space between letters.
func messagesOf(path string, file *ast.File) (list []message) {
	seen := map[ast.Node]bool{}
	take := func(kind string, e ast.Expr) bool {
		text := literal(e, seen)
		if strings.Trim(text, "… ") == "" {
			return false
		}
		list = append(list, message{path, kind, text})
		return true
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.Field:
			if n.Tag != nil {
				seen[n.Tag] = true
			}
		case *ast.CallExpr:
			if kind := messageKinds[called(n)]; kind != "" {
				for _, a := range n.Args {
					if take(kind, a) {
						break
					}
				}
			}
		case *ast.KeyValueExpr:
			if key, ok := n.Key.(*ast.Ident); ok && messageKinds[key.Name] != "" {
				take(messageKinds[key.Name], n.Value)
			}
		case *ast.BinaryExpr, *ast.BasicLit:
			if e := n.(ast.Expr); !seen[n] {
				text := literal(e, map[ast.Node]bool{})
				if words.MatchString(text) && !pattern.MatchString(text) {
					take("text", e)
				}
			}
		}
		return !seen[n]
	})
	return list
}

// A text has two words, of which one is not in capital letters, as the names of SCSI commands are,
// and is no regular expression or script.
var (
	words   = regexp.MustCompile(`\p{Ll}[,:;]? +\pL`)
	pattern = regexp.MustCompile(`^\^|\\[bdsSw.]|\$\(|good>`)
)

// called returns the name of the function of a call.
func called(c *ast.CallExpr) string {
	switch f := c.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		return f.Sel.Name
	}
	return ""
}

// literal returns the text of an expression of string literals, and adds them to seen.
func literal(e ast.Expr, seen map[ast.Node]bool) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind == token.STRING {
			seen[e] = true
			s, _ := strconv.Unquote(e.Value)
			return s
		}
	case *ast.ParenExpr:
		return literal(e.X, seen)
	case *ast.CallExpr:
		if called(e) == "Sprintf" && len(e.Args) > 0 {
			return literal(e.Args[0], seen)
		}
	case *ast.BinaryExpr:
		x, y := literal(e.X, seen), literal(e.Y, seen)
		if x+y != "" {
			seen[e] = true
			if x == "" {
				x = "…"
			}
			if y == "" {
				y = "…"
			}
		}
		return x + y
	}
	return ""
}

var (
	dialect = regexp.MustCompile(`(?i)\b(nobody|somebody|whoever|whatever|who|whom|what)\b`)
	capital = regexp.MustCompile(`^\p{Lu}\p{Ll}`)
	wants   = regexp.MustCompile(`: (must (be|have)|expected|should be|not from) `)
	names   = regexp.MustCompile(`^(Linux|Ctrl)\b`)
)

// fault returns the rule that a message breaks, "" if it breaks none.
func fault(m message) string {
	switch text := m.text; {
	case dialect.MatchString(text):
		return fmt.Sprintf("say it without %q", dialect.FindString(text))
	case m.kind == "text":
		return ""
	case capital.MatchString(text) && !names.MatchString(text):
		return "it begins with a capital letter"
	case strings.HasSuffix(text, ".") && !strings.HasSuffix(text, ".."), strings.HasSuffix(text, "!"):
		return "it ends with a full stop"
	case strings.Contains(text, "\n") && !strings.Contains(text, "%w\n"):
		return "it has several lines"
	case strings.Contains(text, "  "):
		return "it has two spaces in a row"
	case wants.MatchString(text):
		return "say it with want, as others do"
	case strings.Contains(text, "failed to"), strings.Contains(text, "unable to"):
		return "name the operation, without failed to"
	}
	return ""
}
