package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/machine/disk"
	"gvm/text"
)

// completionFlag is the last word of a script's question.
const completionFlag = "--generate-bash-completion"

// The scripts ask gvm itself for the words (--generate-bash-completion), so that they are never out
// of date. zsh sources its script, or loads it from a directory of $fpath as the body of _gvm.
var completions = map[string]string{
	"bash": `_gvm() {
  # Bash makes separate words of = and : and replaces the last of them.
  local i=$COMP_CWORD last=${COMP_WORDS[COMP_CWORD]} words word
  local cur=$last
  while ((i > 1)) && [[ ${COMP_WORDS[i]} == [=:]* || ${COMP_WORDS[i-1]} == *[=:] ]]; do
    cur=${COMP_WORDS[--i]}$cur
  done
  [[ $last != [=:]* ]] || last=
  words=("${COMP_WORDS[@]:0:i}")
  [[ $cur != -* && $cur != *[,:]* ]] || words+=("$cur")
  mapfile -t words < <("${words[@]}" --generate-bash-completion 2>/dev/null)
  COMPREPLY=()
  for word in "${words[@]}"; do
    [[ $word != "$cur"* ]] || COMPREPLY+=("${word#"${cur%"$last"}"}")
  done
  [[ ${#COMPREPLY[@]} -gt 0 ]] || mapfile -t COMPREPLY < <(compgen -f -- "$last")
  [[ ${COMPREPLY[0]} != *[=:] ]] || compopt -o nospace 2>/dev/null
}
complete -o bashdefault -o default -F _gvm gvm
`,
	"zsh": `#compdef gvm
_gvm() {
  local -a words_
  local cur_=${(Q)words[CURRENT]}
  words_=("${(@f)$(${words[1,CURRENT-1]} ${(M)cur_:#(-*|*[,:]*)} --generate-bash-completion 2>/dev/null)}")
  if [[ $cur_ == *[,:]* || $words_[1] == *: ]]; then
    compadd -S '' -- $words_ || { compset -P '*='; _files }
  else
    _describe gvm words_ || _files
  fi
}
compdef _gvm gvm
[[ $funcstack[1] != _gvm ]] || _gvm
`,
	"fish": `complete -c gvm -f -n '__fish_use_subcommand' -a '(gvm --generate-bash-completion)'
complete -c gvm -F -n 'not __fish_use_subcommand' \
  -a '(set -l t (commandline -opc); $t (commandline -ct) --generate-bash-completion)'
`,
}

// completeWord prints the continuations of the word before the cursor for a completion script, and
// reports whether it is a value of a flag, or may be the name of a machine. A script gives the word
// if it begins with a dash or has a comma or a colon; that of fish gives every word.
func completeWord(out io.Writer, commands []*cli.Command, args []string) bool {
	n := len(args) - 1
	if n < 2 || args[n] != completionFlag {
		return false
	}
	c, at := findCommand(commands, args[:n])
	if c == nil {
		return false
	}
	flag, values, rest := "", []string(nil), []string(nil) // flag: whose value is the next word
	for i, word := range args[at:n] {
		last := at+i == n-1
		name, value, has := strings.Cut(word, "=")
		switch isFlag := len(word) > 1 && word[0] == '-'; {
		case flag != "":
			if last {
				values = valuesOf(c, flag, "", word)
			}
			flag = ""
		case isFlag && has && last:
			values = valuesOf(c, name, name+"=", value)
		case isFlag && !has && takesNext(c, word):
			if flag = word; last {
				values = valuesOf(c, flag, "", "")
			}
		case word == "--", isFlag && last && !hasFlag(c, word):
			return false // the cli package completes names of flags
		case !isFlag:
			rest = append(rest, word)
		}
	}
	if values == nil && flag == "" {
		if args[1] == "disk" && c.Name == "add" && len(rest) > 0 && strings.Contains(rest[len(rest)-1], ",") {
			values = disk.Complete(rest[len(rest)-1])
		} else {
			values = machineNames(c, rest)
		}
	}
	for _, v := range values {
		fmt.Fprintln(out, v)
	}
	return values != nil
}

// valuesOf returns the continuations of the value of a flag of gvm run or gvm test, with the text
// before it; nil: unknown. The cli package completes no values.
func valuesOf(c *cli.Command, flag, before, value string) (values []string) {
	if c.Name != "run" && c.Name != "test" {
		return nil
	}
	switch strings.TrimLeft(flag, "-") {
	case "disk", "d":
		values = disk.Complete(value)
	case "net":
		values = completeNet(value)
	case "vsock":
		values = completeVsock(value)
	case "publish":
		values = completePublish(value)
	case "watchdog":
		values = slices.Sorted(maps.Keys(watchdogs))
	default:
		return nil
	}
	for i := range values {
		values[i] = before + values[i]
	}
	return append([]string{}, values...)
}

// machineNames returns the names of machines if the next of a command's words, or the last one, may
// be one.
func machineNames(c *cli.Command, words []string) []string {
	last := ""
	if len(words) > 0 {
		last = words[len(words)-1]
	}
	colon := ""
	switch {
	case c.Name == "cp":
		colon = ":"
	case !strings.HasPrefix(strings.Trim(c.ArgsUsage, "["), "VM") || len(words) > 1:
		return nil
	}
	entries, err := control.DefaultDirectory().List()
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if colon == "" && e.Name == last {
			return nil // the next word is no machine
		}
		names = append(names, e.Name+colon)
	}
	return names
}

func completionCommand() *cli.Command {
	return &cli.Command{
		Name:        "completion",
		Usage:       "print a completion script for bash, zsh or fish",
		ArgsUsage:   "bash|zsh|fish",
		Description: "EXAMPLE\n   source <(gvm completion bash)",
		Action: func(c *cli.Context) error {
			if c.NArg() > 1 {
				return usageError{fmt.Errorf("completion takes one word, and got %d: want bash, fish or zsh", c.NArg())}
			}
			script, ok := completions[c.Args().First()]
			if !ok {
				return usageError{text.OneOf("completion ", c.Args().First(), completions)}
			}
			_, err := fmt.Fprint(c.App.Writer, script)
			return err
		},
	}
}
