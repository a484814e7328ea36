package lab

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestDebianPackage installs the Debian package with dpkg, below a directory of the lab, and has
// its gvm boot the embedded guest and run a command on Debian's kernel. The man pages and the
// completions are where readers look for them. TestPackage of packaging has the contents.
func TestDebianPackage(t *testing.T) {
	l := setUp(t)
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "make", "deb", "BIN="+dir, "DEBFLAGS=-Znone",
		"MAINTAINER=gvm <gvm@example.org>")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	deb, err := one(filepath.Join(dir, "gvm_*_amd64.deb"))
	if err != nil {
		t.Fatal(err)
	}
	const script = `
		root=/tmp/root db=/tmp/root/var/lib/dpkg
		mkdir -p $db/info $db/updates $db/triggers && touch $db/status $db/available || exit 90
		dpkg --root=$root --log=/dev/null --install "$1" >&2 || exit 91
		[ -z "$(dpkg --root=$root --verify gvm)" ] || exit 92
		PATH=$root/usr/bin:$PATH
		[ "$(command -v gvm)" = $root/usr/bin/gvm ] || exit 93
		share=$root/usr/share
		for f in man/man1/gvm.1.gz man/man1/gvm-run.1.gz bash-completion/completions/gvm \
			zsh/vendor-completions/_gvm fish/vendor_completions.d/gvm.fish; do
			[ -s $share/$f ] || exit 94
		done
		gvm run >/tmp/console || exit 95
		tail -n 1 /tmp/console | tr -d '\r'
		gvm test -k "$2" --memory 256M -- sh -c 'read -r release </proc/sys/kernel/osrelease; echo $release; exit 7'
		echo status $?
		dpkg --root=$root --log=/dev/null --purge gvm >&2 || exit 96
		[ ! -e $root/usr ] || find $root/usr
	`
	var out, errs bytes.Buffer
	code, err := l.Run(t.Context(), Command{
		Args:    []string{"sh", "-c", script, "sh", deb, l.Cloud.BZImage},
		Env:     []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp", "LC_ALL=C", "XDG_CACHE_HOME=" + l.Cache},
		Visible: []string{dir}, Fast: true, CPUs: 1, Stdout: &out, Stderr: &errs, Log: Log(t),
	})
	want := "PASS\n" + l.Cloud.Release + "\nstatus 7\n"
	if err != nil || code != 0 || out.String() != want {
		t.Errorf("status %d, %v, output %q, want %q\n%s", code, err, &out, want, &errs)
	}
}
