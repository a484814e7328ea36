package main

import (
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"gvm/text"
)

// Help pages fit the narrowest common terminal.
const (
	helpWidth = 80
	helpFlags = 24 // columns of a flag's name
)

func init() {
	cli.FlagStringer = describeFlag
	cli.HelpPrinter = func(w io.Writer, template string, data any) {
		var b strings.Builder
		cli.HelpPrinterCustom(&b, template, data, map[string]any{"wrap": wrap})
		for line := range strings.Lines(b.String()) {
			fmt.Fprintln(w, strings.TrimRight(line, " \n"))
		}
	}
}

// describeFlag returns the entry of a flag in a help page: its names, with its usage beside them or
// below.
func describeFlag(f cli.Flag) string {
	names, value, usage := flagWords(f)
	head := strings.TrimSpace(strings.Join(names, ", ") + " " + value)
	// The template puts the first line in column 3, and other lines in column 6.
	return column(head, helpFlags, usage, helpWidth-6, -3)
}

// flagWords returns the names of a flag with their dashes, the name of its value, which its usage
// has in backquotes, and the usage with the default.
func flagWords(f cli.Flag) (names []string, value, usage string) {
	doc, ok := f.(cli.DocGenerationFlag)
	if !ok {
		return nil, "", ""
	}
	for _, n := range f.Names() {
		names = append(names, dashed(n))
	}
	usage = doc.GetUsage()
	if before, rest, ok := strings.Cut(usage, "`"); ok {
		var after string
		value, after, _ = strings.Cut(rest, "`")
		usage = before + value + after
	}
	if _, many := f.(*cli.GenericFlag); many { // words
		usage += "; may be repeated"
	}
	if _, isBool := f.(*cli.BoolFlag); !isBool {
		if s := strings.Trim(doc.GetDefaultText(), `"`); s != "" && s != "0" && s != "0s" {
			usage += " (default: " + s + ")"
		}
	}
	return names, value, usage
}

// wrap is the templates' function for a text that begins in column offset. Unlike the cli
// package's, it keeps the indentation of lines that it breaks.
func wrap(words string, offset int) string {
	var lines []string
	for line := range strings.SplitSeq(words, "\n") {
		if width := helpWidth - offset; utf8.RuneCountInString(line) > width {
			indent := len(line) - len(strings.TrimLeft(line, " "))
			line = column(strings.Repeat(" ", indent), indent, line, width, 0)
			line = strings.ReplaceAll(line, "\n", "\n"+strings.Repeat(" ", offset))
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n"+strings.Repeat(" ", offset))
}

// column puts words into lines of width columns behind a head of n columns, or below a longer head.
// Every line but the first is indented by indent columns more.
func column(head string, n int, words string, width, indent int) string {
	var b strings.Builder
	b.WriteString(head)
	at := utf8.RuneCountInString(head)
	newline := func() {
		b.WriteString("\n" + strings.Repeat(" ", indent+n))
		at = n
	}
	if at > 0 && at+2 > n && strings.TrimSpace(head) != "" {
		newline()
	} else {
		b.WriteString(strings.Repeat(" ", max(n-at, 0)))
		at = n
	}
	for i, w := range strings.Fields(words) {
		switch size := utf8.RuneCountInString(w); {
		case i == 0:
			at += size
		case at+1+size > width:
			newline()
			at += size
		default:
			b.WriteByte(' ')
			at += 1 + size
		}
		b.WriteString(w)
	}
	return b.String()
}

// complete adds error messages for unknown words to commands, and a help page to groups of
// commands.
func complete(commands []*cli.Command) {
	for _, c := range commands {
		if c.OnUsageError == nil {
			c.OnUsageError = flagError
		}
		own := c.Before
		c.Before = func(ctx *cli.Context) error {
			if err := refuseEmpty(ctx); err != nil || own == nil {
				return err
			}
			return own(ctx)
		}
		if len(c.Subcommands) > 0 {
			c.HideHelpCommand = true
			complete(c.Subcommands)
			if c.Action == nil {
				c.Action = showHelp
			}
		}
	}
}

// wrongValue and noValue are errors of the flag package, which writes one dash.
var (
	wrongValue = pattern(`(?s)^invalid (?:boolean )?value (".*") for (?:flag )?-([a-z0-9-]+): `)
	noValue    = pattern(`^flag needs an argument: -([a-z0-9-]+)$`)
)

// pattern compiles a regular expression on first use, not at every start of gvm.
func pattern(s string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(s) })
}

// flagError rewrites an error of the flag package.
func flagError(c *cli.Context, err error, _ bool) error {
	page := strings.TrimPrefix(c.Command.HelpName, "gvm")
	if name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: "); ok {
		return usageError{unknownFlag(c.Command, name)}
	}
	if m := noValue().FindStringSubmatch(err.Error()); m != nil {
		return usageError{fmt.Errorf("%s: want a value%s; see gvm help%s", dashed(m[1]),
			valueName(c.Command, m[1]), page)}
	}
	if m := wrongValue().FindStringSubmatch(err.Error()); m != nil {
		return usageError{fmt.Errorf("%s %s: %s; see gvm help%s", dashed(m[2]), m[1], wanted(c.Command, m[2], m[1]), page)}
	}
	return usageError{fmt.Errorf("%w; see gvm help%s", err, page)}
}

// refuseEmpty refuses an empty path and an empty name of a machine, as of a variable that is not
// set: it would be the current directory, the only machine that runs, or as if the flag were not
// given. Other empty values are the parsers' to refuse.
func refuseEmpty(c *cli.Context) error {
	for _, name := range c.LocalFlagNames() {
		f, empty := flagOf(c.Command, name), false
		switch f := f.(type) {
		case *cli.StringFlag:
			empty = (f.TakesFile || slices.Contains([]string{"cpu-features", "cwd", "vhost-abi"}, f.Name)) &&
				c.String(f.Name) == ""
		case *cli.GenericFlag:
			w, ok := f.Value.(*words)
			empty = ok && f.TakesFile && slices.Contains(*w, "")
		}
		if empty {
			return c.Command.OnUsageError(c, fmt.Errorf("--%s: the value is empty: want%s, or leave the flag out",
				f.Names()[0], strings.TrimPrefix(valueName(c.Command, name), ",")), true)
		}
	}
	words := c.Command.ArgsUsage
	if strings.HasPrefix(strings.TrimPrefix(words, "["), "VM") && c.Args().Present() && c.Args().First() == "" {
		return c.Command.OnUsageError(c, fmt.Errorf("%s: the first word is empty: want %s",
			strings.TrimPrefix(c.Command.HelpName, "gvm "), words), true)
	}
	return nil
}

// dashed returns a flag's name with its dashes.
func dashed(name string) string { return strings.Repeat("-", min(len(name), 2)) + name }

// flagOf returns the flag with a name, or nil.
func flagOf(c *cli.Command, name string) cli.Flag {
	for _, f := range c.Flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

// valueName returns ", FILE" for a flag whose usage calls its value FILE.
func valueName(c *cli.Command, flag string) string {
	if doc, ok := flagOf(c, flag).(cli.DocGenerationFlag); ok {
		if parts := strings.Split(doc.GetUsage(), "`"); len(parts) == 3 {
			return ", " + parts[1]
		}
	}
	return ""
}

// wanted describes a valid value of a flag, after one that the flag package cannot read.
func wanted(c *cli.Command, flag, value string) string {
	switch f := flagOf(c, flag).(type) {
	case *cli.DurationFlag:
		such := "90s"
		if f.Value != 0 {
			such = f.Value.String()
		}
		if regexp.MustCompile(`^"\+?[0-9][0-9.]*(ns|us|µs|ms|s|m|h)"$`).MatchString(value) {
			return "want a shorter duration, such as " + such
		}
		return "want a duration such as " + such
	case *cli.BoolFlag, nil: // nil is --help
		return "want true or false"
	}
	if regexp.MustCompile(`^"\+?[0-9]+"$`).MatchString(value) {
		return "want a smaller number"
	}
	return "want a number"
}

// unknownFlag returns an error for a flag that a command does not have.
func unknownFlag(c *cli.Command, flag string) error {
	var names []string
	for _, f := range c.Flags {
		names = append(names, f.Names()...)
	}
	word := strings.TrimLeft(flag, "-")
	if len(word) > 1 {
		flag = "--" + word
	}
	near := text.Nearest(word, names)
	if near != "" {
		near = "--" + near
	}
	return text.Unknown("flag "+flag, near, strings.TrimPrefix(c.HelpName, "gvm"))
}

// unknownCommand returns an error for a command that the group at path does not have.
func unknownCommand(commands []*cli.Command, path []string, word string) error {
	var names []string
	for _, c := range commands {
		names = append(names, c.Name)
	}
	thing, page := fmt.Sprintf("command %q", word), ""
	if len(path) > 0 {
		page = " " + strings.Join(path, " ")
		thing += " of gvm" + page
	}
	return usageError{text.Unknown(thing, text.Nearest(word, names), page)}
}

// showHelp is the action of a group of commands: it prints the group's page, or an error for an
// unknown command.
func showHelp(c *cli.Context) error {
	path := strings.Fields(c.Command.HelpName)[1:]
	words := c.Args().Slice()
	if len(words) == 0 || words[0] == "help" || words[0] == "h" {
		return helpPage(c, append(path, words[min(1, len(words)):]...))
	}
	return unknownCommand(c.Command.Subcommands, path, words[0])
}

// helpPage prints the page of the command at a path.
func helpPage(c *cli.Context, path []string) error {
	if len(path) == 0 {
		return cli.ShowAppHelp(c)
	}
	commands := c.App.Commands
	for i, word := range path {
		n := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(word) })
		if n < 0 {
			return unknownCommand(commands, path[:i], word)
		}
		commands = commands[n].Subcommands
	}
	return c.App.Run(append(append([]string{"gvm"}, path...), "--help"))
}

// helpCommand makes `gvm help`, whose arguments are the words of any command.
func helpCommand() *cli.Command {
	return &cli.Command{
		Name: "help", Aliases: []string{"h"}, Usage: "show the help of a command", ArgsUsage: "[COMMAND [SUBCOMMAND]]",
		Description: "gvm help disk has the options of --disk as well, " +
			"gvm help exit-status\nthe exit statuses.",
		Action: func(c *cli.Context) error { return helpPage(c, c.Args().Slice()) },
	}
}
