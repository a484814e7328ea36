package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// flagsFirst moves a command's flags in front of its arguments: package flag stops at the first
// argument, but users write flags behind it as well. Words behind "--" are arguments, and those of
// gvm test and gvm exec behind the command that they run.
func flagsFirst(commands []*cli.Command, args []string) []string {
	if len(args) == 0 || args[len(args)-1] == completionFlag {
		return args
	}
	command, at := findCommand(commands, args)
	if command == nil || command.Name == "test" || command.Name == "exec" {
		return args
	}
	flags, rest := slices.Clone(args[:at]), []string(nil)
	for words := args[at:]; len(words) > 0; words = words[1:] {
		word := words[0]
		if word == "--" {
			rest = append(rest, words[1:]...)
			break
		}
		if len(word) < 2 || word[0] != '-' {
			rest = append(rest, word)
			continue
		}
		flags = append(flags, word)
		if takesNext(command, word) {
			if len(words) == 1 {
				return flags // package flag says so
			}
			words = words[1:]
			flags = append(flags, words[0])
		}
	}
	return append(append(flags, "--"), rest...)
}

// findCommand returns the command that args name, nil for a group or none, and the index of its
// first word.
func findCommand(commands []*cli.Command, args []string) (command *cli.Command, at int) {
	for at = 1; at < len(args); at++ {
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(args[at]) })
		if i < 0 {
			break
		}
		command, commands = commands[i], commands[i].Subcommands
	}
	if len(commands) > 0 {
		command = nil
	}
	return command, at
}

// takesNext reports whether the value of a flag is the next word.
func takesNext(command *cli.Command, word string) bool {
	name := strings.TrimLeft(word, "-")
	return slices.ContainsFunc(command.Flags, func(f cli.Flag) bool {
		d, ok := f.(cli.DocGenerationFlag)
		return ok && d.TakesValue() && slices.Contains(f.Names(), name)
	})
}

// hasFlag reports whether a word is the name of a flag.
func hasFlag(command *cli.Command, word string) bool {
	return slices.ContainsFunc(command.Flags, func(f cli.Flag) bool {
		return slices.Contains(f.Names(), strings.TrimLeft(word, "-"))
	})
}

// words is the value of a flag that may be repeated, with any bytes. The cli package's own type
// goes through JSON, and trims spaces.
type words []string

// The cli package sets the other names of a flag to aliased. No argument has a NUL.
const aliased = "\x00"

func (w *words) Set(s string) error {
	if s != aliased {
		*w = append(*w, s)
	}
	return nil
}

func (w *words) String() string    { return "" }
func (w *words) Serialize() string { return aliased }

func wordsOf(c *cli.Context, flag string) []string { return *c.Generic(flag).(*words) }
