#!/bin/sh
# Prints the licenses of gvm, gvm-agent, gvm-plot and gvm-net, and of all that is linked into them.
set -eu
cd "$(dirname "$0")/.."
go=${GO:-go}
export LC_ALL=C

license() { # name, files
	printf '\n%s\n%s\n\n' "$1" "$(printf '%s' "$1" | tr -c '' '-')"
	shift
	cat "$@"
}

echo "gvm is under the Apache License 2.0. Its programs contain Go's standard library and Go
modules, each under its own license, which follows."
license gvm LICENSE
license "Go's standard library" "$("$go" env GOROOT)/LICENSE"
modules=$("$go" list -deps -tags urfave_cli_no_docs \
	-f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' ./cmd/gvm \
	./cmd/gvm-agent ./cmd/gvm-plot ./cmd/gvm-net | sort -u)
echo "$modules" | while read -r path version dir; do
	set -- "$dir"/LICENSE*
	[ ! -d "$dir/licenses" ] || set -- "$@" "$dir"/licenses/*
	license "$path $version" "$@"
done
