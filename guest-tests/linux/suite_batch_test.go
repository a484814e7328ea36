package linux

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gvm/guest-tests/lab"
)

// watch returns a command that runs check, a command of one line, with the names of tests as
// arguments, and frames the output of each as loop does. A test begins as check prints its name at
// the beginning of a line, and ends as the next one begins, or by a line "Ran: ...". One that takes
// longer than limit seconds ends check, which itself has as long as suiteRun gives it.
func watch(limit int, check, names string) string {
	return fmt.Sprintf(`perl -we '
use strict;
use POSIX ();
my ($limit, $tests, @check) = @ARGV;
my @left = split " ", $tests;
$| = 1;
my $pid = open(my $out, "-|") // die "fork: $!\n";
if (!$pid) {
	setpgrp;
	open STDERR, ">&", \*STDOUT;
	exec @check or die "$check[0]: $!\n";
}
my ($test, $began, $text) = ("", time, "");
sub begin { $test = shift @left; $began = time; print "=== $test\n"; }
sub end { print "--- $test ", time - $began, " $_[0]\n" if $test ne ""; $test = ""; }
while (1) {
	my $ready = "";
	vec($ready, fileno $out, 1) = 1;
	my $wait = $test eq "" ? undef : $began + $limit - time;
	if (defined $wait && $wait <= 0 || !select $ready, undef, undef, $wait) {
		kill KILL => -$pid;
		print "$text\n" if $text ne "";
		end("killed");
		POSIX::_exit(0); # exit would wait for check
	}
	sysread $out, $text, 65536, length $text or last;
	do {
		if (@left && $text =~ /^\Q$left[0]\E\s/) {
			end("");
			begin();
		}
		end("") if $text =~ /^Ran: /;
	} while $text =~ s/^(.*\n)/print $1; ""/e;
}
print "$text\n" if $text ne "";
end("");
' %d "%s" %s %s </dev/null
`, limit, names, check, names)
}

var (
	xfstestsFirst  = regexp.MustCompile(`^\S+ *(?:\d+s \.\.\. *)?(.*)`) // after the name and the seconds of a run before
	xfstestsPassed = regexp.MustCompile(`(?:^|\s)\d+s$`)
	xfstestsDiff   = regexp.MustCompile(`(?m)^    ([-+][^-+\n].*)$`)
)

// xfstestsOutcome finds the result of one test in the output of xfstests' check. A test that has
// passed ends in its seconds. The reason of a failure has the first lines of the difference.
func xfstestsOutcome(out string) (verdict, reason string) {
	out = strings.TrimSpace(out)
	first, _, _ := strings.Cut(out, "\n")
	first = xfstestsFirst.FindStringSubmatch(first)[1]
	if reason, ok := strings.CutPrefix(first, "[not run] "); ok {
		return "not run", reason
	}
	if xfstestsPassed.MatchString(out) {
		return "passed", ""
	}
	if !strings.Contains(out, "\n") && first == "" {
		return "", "" // the name alone
	}
	first, _, _ = strings.Cut(first, " (see ")
	reasons := []string{first}
	for _, m := range xfstestsDiff.FindAllStringSubmatch(out, 3) {
		reasons = append(reasons, m[1])
	}
	return "failed", strings.Join(reasons, "; ")
}

// TestSuiteBatch: one check runs several tests, whose outcomes are those of its output. One without
// an end, and one whose guest is lost, leave the rest to the next guest, and so does a check that
// ends before its last test.
func TestSuiteBatch(t *testing.T) {
	dir, out := t.TempDir(), t.TempDir()
	var names []string
	for n := range 9 {
		names = append(names, fmt.Sprintf("generic/%03d", n+1))
		file := filepath.Join(dir, "tests", names[n])
		must(t, os.MkdirAll(filepath.Dir(file), 0o777))
		must(t, os.WriteFile(file, nil, 0o666))
	}
	check := filepath.Join(dir, "check")
	must(t, os.WriteFile(check, []byte(`#!/bin/bash
[ "$1" = --exact-order ] || exit
shift
echo "FSTYP         -- ext4"
echo
for t in "$@"; do
	printf %s $t
	printf '       '
	case $t in
	*1) exec sleep 10000 ;;
	*3) echo '[not run] this test requires a valid $USB' ;;
	*4) printf '%s' '[failed, exit status 1]'
		echo '- output mismatch (see /tmp/results/generic/004.out.bad)'
		echo '    --- tests/generic/004.out	2026-11-29'
		echo '    +++ /tmp/results/generic/004.out.bad	2026-11-29'
		echo '    @@ -1,2 +1,2 @@'
		echo '     QA output created by 004'
		echo '    -generic/005 is silent'
		echo '    +cat: no file' ;;
	*5) echo '_check_generic_filesystem: filesystem on /dev/sda is inconsistent'
		echo '(see /tmp/results/generic/005.full for details)'
		echo ;;
	*6) echo 'umount: /mnt/scratch: not mounted.' >&2
		echo ' 0s' ;;
	*7) echo ' 3s ...  4s'; exit 1 ;;
	*) echo ' 12s' ;;
	esac
done
echo "Ran: $*"
echo "Failures: generic/002 generic/009"
`), 0o777))
	t.Setenv("SUITE", dir)
	t.Setenv("WAYS", "")
	t.Setenv("TESTS", strings.Join(names, " "))
	t.Setenv("LIMIT", "1") // of the first guest, whose first test has no end
	s := suite{name: "suite", env: "SUITE", check: check + " --exact-order", batch: 4, outcome: xfstestsOutcome,
		list: func(_, word string) ([]string, error) { return []string{word}, nil }}
	var guests []string
	way := suiteWay{"qemu", func(t *testing.T, _ *lab.Kernel, _ string, _ int, script string, progress func(string)) (
		string, error) {
		t.Setenv("LIMIT", "10000")
		script = script[strings.LastIndex(script, "perl -we"):] // the part before is for a guest
		_, ran, _ := strings.Cut(script, "--exact-order ")
		ran, _, _ = strings.Cut(ran, " <")
		guests = append(guests, ran)
		b, err := exec.Command("bash", "-c", script).CombinedOutput()
		if strings.HasPrefix(ran, "generic/008") {
			before, _, _ := strings.Cut(string(b), " 12s")
			b, err = []byte(before), errors.New("exit status 121")
		}
		progress(string(b))
		return string(b), err
	}}
	s.run(t, &lab.Kernel{}, []suiteWay{way}, out)
	all := s.load(t, out)
	for i := range all {
		all[i].Seconds = 0
	}
	want := []outcome{
		{Test: "generic/001", Verdict: "timed out", Reason: fmt.Sprint("no end in ", suiteLimit())},
		{Test: "generic/002", Verdict: "passed"},
		{Test: "generic/003", Verdict: "not run", Reason: "this test requires a valid $USB"},
		{Test: "generic/004", Verdict: "failed",
			Reason: "[failed, exit status 1]- output mismatch; -generic/005 is silent; +cat: no file"},
		{Test: "generic/005", Verdict: "failed",
			Reason: "_check_generic_filesystem: filesystem on /dev/sda is inconsistent"},
		{Test: "generic/006", Verdict: "passed"},
		{Test: "generic/007", Verdict: "passed"},
		{Test: "generic/008", Verdict: "lost", Reason: "exit status 121"},
		{Test: "generic/009", Verdict: "passed"},
	}
	for i := range want {
		want[i].Way = "qemu"
	}
	if !slices.Equal(all, want) {
		t.Errorf("the outcomes are\n%+v, want\n%+v", all, want)
	}
	for i, first := range []int{0, 1, 5, 7, 8} {
		if want := strings.Join(names[first:min(first+4, 9)], " "); i >= len(guests) || guests[i] != want {
			t.Errorf("guest %d of %q did not run %q", i, guests, want)
		}
	}
}
