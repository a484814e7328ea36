package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
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
  [[ $cur != -* && $cur != *,* ]] || words+=("$cur")
  mapfile -t words < <("${words[@]}" --generate-bash-completion 2>/dev/null)
  COMPREPLY=()
  for word in "${words[@]}"; do
    [[ $word != "$cur"* ]] || COMPREPLY+=("${word#"${cur%"$last"}"}")
  done
  [[ ${#COMPREPLY[@]} -gt 0 ]] || mapfile -t COMPREPLY < <(compgen -f -- "$last")
  [[ ${COMPREPLY[0]} != *= ]] || compopt -o nospace 2>/dev/null
}
complete -o bashdefault -o default -F _gvm gvm
`,
	"zsh": `#compdef gvm
_gvm() {
  local -a words_
  local cur_=${(Q)words[CURRENT]}
  words_=("${(@f)$(${words[1,CURRENT-1]} ${(M)cur_:#(-*|*,*)} --generate-bash-completion 2>/dev/null)}")
  if [[ $cur_ == *,* ]]; then
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

// completeDisk prints the continuations of a disk for a completion script, and reports whether the
// word before the cursor is a disk with options. The cli package completes no values of flags.
func completeDisk(out io.Writer, args []string) bool {
	n := len(args)
	if n < 4 || args[n-1] != completionFlag || !strings.Contains(args[n-2], ",") {
		return false
	}
	before, value := "", args[n-2]
	switch name, rest, has := strings.Cut(value, "="); {
	case args[1] == "disk" && args[2] == "add":
	case args[1] != "run":
		return false
	case has && isDiskFlag(name):
		before, value = name+"=", rest
	case !isDiskFlag(args[n-3]):
		return false
	}
	for _, c := range disk.Complete(value) {
		fmt.Fprintln(out, before+c)
	}
	return true
}

// isDiskFlag reports whether a word is the flag --disk.
func isDiskFlag(word string) bool {
	return slices.Contains([]string{"--disk", "-disk", "-d", "--d"}, word)
}

func completionCommand() *cli.Command {
	return &cli.Command{
		Name:        "completion",
		Usage:       "print a completion script for bash, zsh or fish",
		ArgsUsage:   "bash|zsh|fish",
		Description: "EXAMPLE\n   source <(gvm completion bash)",
		Action: func(c *cli.Context) error {
			script, ok := completions[c.Args().First()]
			if !ok || c.NArg() != 1 {
				return usageError{text.OneOf("completion ", strconv.Quote(c.Args().First()), completions)}
			}
			_, err := fmt.Fprint(c.App.Writer, script)
			return err
		},
	}
}
