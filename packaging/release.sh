#!/bin/sh
# Builds the programs and the Debian package of the commit twice, each time from nothing: in a clone
# of its own, with an empty build cache, another umask, time zone and number of processes. If all
# files are the same byte by byte, DIR gets them, the list of their contents, and checksums.
#
#	release.sh DIR [VERSION]
set -eu
cd "$(dirname "$0")/.."
dir=$1 version=${2:-} go=${GO:-go}
[ -z "$(git status --porcelain)" ] || {
	echo "release: the tree has changes that are in no commit: commit or stash them" >&2
	exit 2
}
commit=$(git rev-parse HEAD)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH GOWORK=off GOFLAGS= GOAMD64=v1 GOEXPERIMENT= GOFIPS140=off
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

build() { # directory of the clone, umask, TZ, GOMAXPROCS
	(
		umask "$2"
		git clone -q . "$work/$1"
		export TZ="$3" GOMAXPROCS="$4" GOCACHE="$work/$1.cache"
		make -C "$work/$1" --no-print-directory deb BIN="$work/$1/bin" GO="$go" VERSION="$version" >&2
		rm -rf "$GOCACHE"
	)
}
build one 022 UTC 2
build another/directory 077 Asia/Kolkata 3

one=$work/one/bin
deb=$(basename "$one"/gvm_*_amd64.deb .deb)
for f in gvm gvm-agent gvm-plot gvm-net "$deb.deb"; do
	cmp "$one/$f" "$work/another/directory/bin/$f" || {
		echo "release: two builds of $commit differ in $f: nothing is released" >&2
		exit 1
	}
	install -D -m "$(stat -c %a "$one/$f")" -t "$work/out" "$one/$f"
done
"$go" run ./packaging/sbom "$("$one/gvm" --version | sed 's/.* //')" "$commit" \
	"$one/gvm" "$one/gvm-agent" "$one/gvm-plot" "$one/gvm-net" >"$work/out/$deb.cdx.json"
(cd "$work/out" && sha256sum -- * >"$work/SHA256SUMS" && mv "$work/SHA256SUMS" .)
rm -rf "$dir"
mkdir -p "$(dirname "$dir")"
cp -R "$work/out" "$dir"
echo "release: two builds of $commit by $("$go" env GOVERSION) are the same; $dir has:"
cat "$dir/SHA256SUMS"
