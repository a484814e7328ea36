package cli_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"gvm/cli"
)

// words is a value that may be repeated.
type words []string

func (w *words) Set(s string) error { *w = append(*w, s); return nil }
func (w *words) String() string     { return "" }

// tool is a program with a command, and a group with a flag of its own.
func tool(out *strings.Builder) *cli.App {
	show := func(c *cli.Context) error {
		fmt.Fprintf(out, "%s %q %s %d %t %s %q set %q", c.Command.HelpName, c.Args(), c.String("name"), c.Int("number"),
			c.Bool("all"), c.Duration("time"), *c.Generic("word").(*words), c.LocalFlagNames())
		return nil
	}
	return &cli.App{
		Name: "tool", Version: "1.2", Writer: out,
		Action:     func(c *cli.Context) error { fmt.Fprintf(out, "no command %q", c.Args()); return nil },
		UsageError: func(_ *cli.Context, err error) error { return fmt.Errorf("usage: %w", err) },
		Help: func(c *cli.Context, words []string) error {
			fmt.Fprintf(out, "page of %s %q", c.Command.HelpName, words)
			return nil
		},
		Commands: []*cli.Command{{
			Name: "show", Aliases: []string{"s"}, Action: show, Flags: []cli.Flag{
				&cli.StringFlag{Name: "name", Aliases: []string{"n"}, Value: "none"},
				&cli.IntFlag{Name: "number", Value: 7},
				&cli.BoolFlag{Name: "all", Aliases: []string{"a"}},
				&cli.DurationFlag{Name: "time", Value: time.Second},
				&cli.GenericFlag{Name: "word", Aliases: []string{"w"}, Value: new(words)},
			},
		}, {
			Name: "group", Action: func(c *cli.Context) error { fmt.Fprintf(out, "group %q", c.Args()); return nil },
			Flags: []cli.Flag{&cli.BoolFlag{Name: "json"}},
			Subcommands: []*cli.Command{{
				Name:       "one",
				Action:     func(c *cli.Context) error { fmt.Fprintf(out, "one %t", c.Bool("json")); return nil },
				UsageError: func(*cli.Context, error) error { return errors.New("of one") },
			}},
		}},
	}
}

func TestRun(t *testing.T) {
	for _, tt := range []struct{ args, out, errs string }{
		{"show", `tool show [] none 7 false 1s [] set []`, ""},
		{"s -n x -a --number 8 --time 2s -w a --word b -- --c",
			`tool show ["--c"] x 8 true 2s ["a" "b"] set ["name" "n" "number" "all" "a" "time" "word" "w"]`, ""},
		{"show --name=x -n y --all=false z --number",
			`tool show ["z" "--number"] y 7 false 1s [] set ["name" "n" "all" "a"]`, ""},
		{"", "no command []", ""},
		{"nosuch -x", `no command ["nosuch" "-x"]`, ""},
		{"-- show", "tool show [] none 7 false 1s [] set []", ""},
		{"group nosuch", `group ["nosuch"]`, ""},
		{"group --json one", "one true", ""},
		{"group one", "one false", ""},
		{"--version", "tool version 1.2\n", ""},
		{"-v show", "tool version 1.2\n", ""},
		{"show -v", "", "usage: flag provided but not defined: -v"},
		{"--help", "page of tool []", ""},
		{"-h show", `page of tool ["show"]`, ""},
		{"show --help", "page of tool show []", ""},
		{"s help", "page of tool show []", ""},
		{"show h", "page of tool show []", ""},
		{"show help me", `tool show ["help" "me"] none 7 false 1s [] set []`, ""},
		{"group help", `group ["help"]`, ""},
		{"group one -h", "page of tool group one []", ""},
		{"show --nosuch", "", "usage: flag provided but not defined: -nosuch"},
		{"show --name", "", "usage: flag needs an argument: -name"},
		{"show --number x", "", `usage: invalid value "x" for flag -number: parse error`},
		{"show --all=x", "", `usage: invalid boolean value "x" for -all: parse error`},
		{"group one -x", "", "of one"},

		{cli.CompletionFlag, "show\ns\ngroup\n", ""},
		{"- " + cli.CompletionFlag, "--help\n-h\n--version\n-v\n", ""},
		{"-- " + cli.CompletionFlag, "no command [\"" + cli.CompletionFlag + "\"]", ""},
		{"show " + cli.CompletionFlag, "", ""},
		{"show --n " + cli.CompletionFlag, "--name\n--number\n", ""},
		{"show --name x --n " + cli.CompletionFlag, "--number\n", ""},
		{"show -w " + cli.CompletionFlag, "--word\n", ""},
		{"show --number x - " + cli.CompletionFlag, "--name\n-n\n--all\n-a\n--time\n--word\n-w\n--help\n-h\n", ""},
		{"group " + cli.CompletionFlag, "one\n", ""},
		{"group o " + cli.CompletionFlag, "one\n", ""},
	} {
		var out strings.Builder
		err := tool(&out).Run(append([]string{"tool"}, strings.Fields(tt.args)...))
		if out.String() != tt.out || (err != nil || tt.errs != "") && fmt.Sprint(err) != tt.errs {
			t.Errorf("%s: %q, %v\nwant %q, %s", tt.args, &out, err, tt.out, tt.errs)
		}
	}
}

// TestSet: an action may set its flags.
func TestSet(t *testing.T) {
	var out strings.Builder
	a := tool(&out)
	a.Commands[0].Action = func(c *cli.Context) error {
		if err := c.Set("number", "x"); err == nil {
			t.Error("a number is x")
		}
		if c.IsSet("name") || !c.IsSet("a") || c.IsSet("nosuch") {
			t.Errorf("set: %q", c.LocalFlagNames())
		}
		if err := c.Set("name", "y"); err != nil || c.String("n") != "y" {
			t.Errorf("%v, name %s", err, c.String("n"))
		}
		if c.Args().Get(1) != "" || c.Args().Get(0) != "file" || c.Args().Len() != 1 || c.String("nosuch") != "" {
			t.Errorf("arguments %q", c.Args().Slice())
		}
		return nil
	}
	if err := a.Run([]string{"tool", "show", "--all", "file"}); err != nil {
		t.Error(err)
	}
}

// TestText: help shows a flag's usage and its default.
func TestText(t *testing.T) {
	for want, f := range map[string]cli.Flag{
		"a `NAME` x":  &cli.StringFlag{Name: "s", Usage: "a `NAME`", Value: "x"},
		"a number 0":  &cli.IntFlag{Name: "i", Usage: "a number"},
		"words all":   &cli.GenericFlag{Name: "w", Usage: "words", Value: new(words), DefaultText: "all"},
		"a time 1m0s": &cli.DurationFlag{Name: "d", Usage: "a time", Value: time.Minute},
		"a fact true": &cli.BoolFlag{Name: "b", Usage: "a fact", Value: true},
	} {
		usage, value := f.Text()
		if _, isBool := f.(*cli.BoolFlag); usage+" "+value != want || f.TakesValue() == isBool {
			t.Errorf("%s %s, takes a value: %t; want %s", usage, value, f.TakesValue(), want)
		}
	}
}
