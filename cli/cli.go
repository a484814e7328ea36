// Package cli is a command line of commands, commands below commands, and flags, which package flag
// parses.
//
// The usual libraries print help by text/template. It calls methods by their names, for which the
// linker keeps every exported method of the program: a seventh of gvm.
package cli

import (
	"context"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// App is a program's command line.
type App struct {
	Name        string
	Usage       string // the program in a line
	Version     string
	Description string
	Commands    []*Command
	Writer      io.Writer // takes help, completions and the version
	ErrWriter   io.Writer // for the actions

	// Action runs without a command, or with arguments that begin with none.
	Action ActionFunc
	// Help prints the page of the context's command, or of one below it that the words name, for the
	// flag --help.
	Help func(c *Context, words []string) error
	// UsageError takes errors of package flag.
	UsageError func(*Context, error) error
}

// ActionFunc runs a command.
type ActionFunc func(*Context) error

// Command is a command, or a group of commands.
type Command struct {
	Name        string
	Aliases     []string
	Usage       string // the command in a line
	ArgsUsage   string // its arguments
	Description string
	Flags       []Flag
	Subcommands []*Command
	Action      ActionFunc
	BareHelp    bool                        // the page of help is Description alone
	UsageError  func(*Context, error) error // nil: that of App

	// HelpName is the command's name with those above it; Setup sets it.
	HelpName string
}

// Names returns the name and the aliases.
func (c *Command) Names() []string { return append([]string{c.Name}, c.Aliases...) }

// HasName reports whether name is the command's name or an alias.
func (c *Command) HasName(name string) bool { return slices.Contains(c.Names(), name) }

// Find returns the command of a list with a name, or nil.
func Find(commands []*Command, name string) *Command {
	if i := slices.IndexFunc(commands, func(c *Command) bool { return c.HasName(name) }); i >= 0 {
		return commands[i]
	}
	return nil
}

// HelpFlag is a flag of every command.
var HelpFlag = &BoolFlag{Name: "help", Aliases: []string{"h"}, Usage: "show help"}

var versionFlag = &BoolFlag{Name: "version", Aliases: []string{"v"}, Usage: "print the version"}

// Flags returns the flags that stand before the command.
func (a *App) Flags() []Flag { return []Flag{HelpFlag, versionFlag} }

// Setup completes the commands: with the flag for help, and with their names in help. Run does it
// as well.
func (a *App) Setup() { setup(a.Name, a.Commands) }

func setup(above string, commands []*Command) {
	for _, c := range commands {
		c.HelpName = above + " " + c.Name
		if !slices.Contains(c.Flags, Flag(HelpFlag)) {
			c.Flags = append(c.Flags, HelpFlag)
		}
		setup(c.HelpName, c.Subcommands)
	}
}

// Flag is a flag: a *FlagOf.
type Flag interface {
	Names() []string
	// Text returns the usage, and the default as text.
	Text() (usage, value string)
	TakesValue() bool

	add(*flag.FlagSet)
}

// FlagOf is a flag with a value of a type.
type FlagOf[T any] struct {
	Name        string
	Aliases     []string
	Usage       string // has the name of the value in backquotes
	Value       T      // the default
	DefaultText string // describes the default
}

// Flags of the types that there are. The value of a GenericFlag is set as often as the flag stands
// on the command line.
type (
	StringFlag   = FlagOf[string]
	BoolFlag     = FlagOf[bool]
	IntFlag      = FlagOf[int]
	DurationFlag = FlagOf[time.Duration]
	GenericFlag  = FlagOf[flag.Value]
)

// Names implements Flag.
func (f *FlagOf[T]) Names() []string { return append([]string{f.Name}, f.Aliases...) }

// Text implements Flag.
func (f *FlagOf[T]) Text() (usage, value string) {
	if value = f.DefaultText; value == "" {
		value = fmt.Sprint(f.Value)
	}
	return f.Usage, value
}

// TakesValue implements Flag.
func (f *FlagOf[T]) TakesValue() bool {
	_, isBool := any(f.Value).(bool)
	return !isBool
}

// add adds the flag to a set: by all its names, which share the value.
func (f *FlagOf[T]) add(s *flag.FlagSet) {
	switch v := any(f.Value).(type) {
	case string:
		s.StringVar(&v, f.Name, v, "")
	case bool:
		s.BoolVar(&v, f.Name, v, "")
	case int:
		s.IntVar(&v, f.Name, v, "")
	case time.Duration:
		s.DurationVar(&v, f.Name, v, "")
	case flag.Value:
		s.Var(v, f.Name, "")
	}
	for _, name := range f.Aliases {
		s.Var(s.Lookup(f.Name).Value, name, "")
	}
}

// Context is a command as it runs.
type Context struct {
	context.Context
	App     *App
	Command *Command
	set     *flag.FlagSet
	above   *Context // nil: none
}

// CompletionFlag is the last word of a completion script's question.
const CompletionFlag = "--generate-bash-completion"

// Run parses the arguments, of which the first is the program's name, and runs the command.
func (a *App) Run(args []string) error {
	a.Setup()
	root := &Command{Name: a.Name, HelpName: a.Name, Flags: a.Flags(), Subcommands: a.Commands, Action: a.Action}
	last := len(args) - 1
	complete := last >= 0 && args[last] == CompletionFlag && !slices.Contains(args, "--")
	if complete {
		args = args[:last]
	}
	if len(args) > 0 {
		args = args[1:]
	}
	c := &Context{Context: context.Background(), App: a, Command: root}
	return c.run(args, args, complete)
}

// run parses the words behind a command's name, and runs the command or one below it. all are the
// words of the command line, of which complete asks for continuations.
func (c *Context) run(words, all []string, complete bool) error {
	c.set = flag.NewFlagSet(c.Command.Name, flag.ContinueOnError)
	c.set.SetOutput(io.Discard)
	for _, f := range c.Command.Flags {
		f.add(c.set)
	}
	err := c.set.Parse(words)
	below := Find(c.Command.Subcommands, c.Args().First())
	switch {
	case complete && below == nil:
		return c.complete(all)
	case complete:
	case err != nil && c.Command.UsageError != nil:
		return c.Command.UsageError(c, err)
	case err != nil:
		return c.App.UsageError(c, err)
	case c.Bool(HelpFlag.Name):
		return c.App.Help(c, c.Args())
	case c.above == nil && c.Bool(versionFlag.Name):
		_, err := fmt.Fprintf(c.App.Writer, "%s version %s\n", c.App.Name, c.App.Version)
		return err
	case len(c.Command.Subcommands) == 0 && c.NArg() == 1 && slices.Contains(helpWords, c.Args().First()):
		return c.App.Help(c, nil)
	}
	if below != nil {
		sub := &Context{Context: c.Context, App: c.App, Command: below, above: c}
		return sub.run(c.Args()[1:], all, complete)
	}
	return c.Command.Action(c)
}

// helpWords are words that ask a command for its page of help.
var helpWords = []string{"help", "h"}

// complete prints the words that may follow: flags that begin as the last word does and are not there
// yet, or commands.
func (c *Context) complete(all []string) error {
	var b strings.Builder
	if last := all[max(len(all)-1, 0):]; len(last) == 0 || !strings.HasPrefix(last[0], "-") {
		for _, s := range c.Command.Subcommands {
			for _, n := range s.Names() {
				b.WriteString(n + "\n")
			}
		}
	} else {
		begin := strings.TrimPrefix(strings.TrimPrefix(last[0], "-"), "-")
		for _, f := range c.Command.Flags {
			for _, n := range f.Names() {
				word := Dashed(n)
				if strings.HasPrefix(n, begin) && n != begin && !slices.Contains(all, word) &&
					(len(n) > 1 || !strings.HasPrefix(last[0], "--")) {
					b.WriteString(word + "\n")
				}
			}
		}
	}
	_, err := io.WriteString(c.App.Writer, b.String())
	return err
}

// Dashed returns a flag's name with its dashes.
func Dashed(name string) string { return strings.Repeat("-", min(len(name), 2)) + name }

// Args are the arguments of a command.
type Args []string

// Args returns the arguments.
func (c *Context) Args() Args { return c.set.Args() }

// NArg returns the number of arguments.
func (c *Context) NArg() int { return c.set.NArg() }

// Get returns an argument, or "" if there are fewer.
func (a Args) Get(n int) string {
	if n < len(a) {
		return a[n]
	}
	return ""
}

// First returns the first argument, or "".
func (a Args) First() string { return a.Get(0) }

// Len returns the number of arguments.
func (a Args) Len() int { return len(a) }

// Present reports whether there are arguments.
func (a Args) Present() bool { return len(a) > 0 }

// Slice returns a copy.
func (a Args) Slice() []string { return slices.Clone(a) }

// value returns the value of a flag of the command, or of one above it; zero if none has the flag.
func value[T any](c *Context, name string) (v T) {
	for ; c != nil; c = c.above {
		if f := c.set.Lookup(name); f != nil {
			v, _ = f.Value.(flag.Getter).Get().(T)
			return v
		}
	}
	return v
}

// String returns the value of a StringFlag.
func (c *Context) String(name string) string { return value[string](c, name) }

// Bool returns the value of a BoolFlag.
func (c *Context) Bool(name string) bool { return value[bool](c, name) }

// Int returns the value of an IntFlag.
func (c *Context) Int(name string) int { return value[int](c, name) }

// Duration returns the value of a DurationFlag.
func (c *Context) Duration(name string) time.Duration { return value[time.Duration](c, name) }

// Generic returns the value of a GenericFlag of the command.
func (c *Context) Generic(name string) flag.Value { return c.set.Lookup(name).Value }

// Set sets a flag of the command as the command line does.
func (c *Context) Set(name, value string) error { return c.set.Set(name, value) }

// IsSet reports whether a flag of the command is on the command line.
func (c *Context) IsSet(name string) bool { return slices.Contains(c.LocalFlagNames(), name) }

// LocalFlagNames returns the names of the command's flags on the command line, each with all others of
// the same flag.
func (c *Context) LocalFlagNames() (names []string) {
	given := map[string]bool{}
	c.set.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, f := range c.Command.Flags {
		if all := f.Names(); slices.ContainsFunc(all, func(n string) bool { return given[n] }) {
			names = append(names, all...)
		}
	}
	return names
}
