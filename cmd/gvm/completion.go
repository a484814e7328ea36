package main

import (
	"fmt"
	"strconv"

	"github.com/urfave/cli/v2"
	"gvm/text"
)

// The scripts ask gvm itself for the words (--generate-bash-completion), so that they are never out
// of date. zsh sources its script, or loads it from a directory of $fpath as the body of _gvm.
var completions = map[string]string{
	"bash": `_gvm() {
  local cur=${COMP_WORDS[COMP_CWORD]} words
  words=$("${COMP_WORDS[@]:0:COMP_CWORD}" $([[ $cur == -* ]] && echo "$cur") --generate-bash-completion 2>/dev/null)
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  [[ ${#COMPREPLY[@]} -gt 0 ]] || COMPREPLY=($(compgen -f -- "$cur"))
}
complete -o bashdefault -o default -F _gvm gvm
`,
	"zsh": `#compdef gvm
_gvm() {
  local -a words_
  words_=("${(@f)$(${words[1,CURRENT-1]} ${${(M)words[CURRENT]:#-*}} --generate-bash-completion 2>/dev/null)}")
  _describe gvm words_ || _files
}
compdef _gvm gvm
[[ $funcstack[1] != _gvm ]] || _gvm
`,
	"fish": `complete -c gvm -f -n '__fish_use_subcommand' -a '(gvm --generate-bash-completion)'
complete -c gvm -F -n 'not __fish_use_subcommand' \
  -a '(set -l t (commandline -opc); $t (commandline -ct) --generate-bash-completion)'
`,
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
