//go:build man

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
)

// With the tag man, this program is not gvm but writes gvm's man pages into the directory that its
// argument names: gvm(1), a page for each command, gvm-agent(1), gvm-plot(1) and gvm-net(1). They
// come from the tree of commands that makes the pages of help.
func init() { program = manPages }

func manPages(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: man DIRECTORY")
		return exitUsage
	}
	a := app(nil)
	a.Setup()
	pages := map[string]string{"gvm": mainPage(a), "gvm-agent": agentPage(), "gvm-plot": plotPage(), "gvm-net": netPage()}
	for _, c := range a.VisibleCommands() {
		pages["gvm-"+c.Name] = commandPage(a, c)
	}
	for name, page := range pages {
		if err := os.WriteFile(filepath.Join(args[1], name+".1"), []byte(page), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return exitHost
		}
	}
	return 0
}

// manEntry is an entry of a list.
type manEntry struct{ name, meaning string }

var manEnvironment = []manEntry{
	{"GOMAXPROCS", "the number of processors of the Go runtime; by default one more than this host has CPUs"},
	{"KBUILD_OUTPUT", "in a kernel's source tree, the directory of its build, where gvm run looks for the kernel"},
	{"LD_LIBRARY_PATH", "where gvm test looks first for the libraries of its command, which gets the variable too"},
	{"PATH", "where gvm looks for the command of gvm test, for gvm-plot and gvm-net, if they are not beside gvm, and " +
		"for the programs that gvm bench measures: QEMU and fio"},
	{"TERM", "the type of the terminal, which a command that gvm exec starts on it gets too"},
	{"TMPDIR", "the directory for temporary files: the images of gvm replay and gvm bench, and overlays that " +
		"are not kept; /tmp by default"},
	{"XDG_CACHE_HOME", "the directory of the cache of decompressed kernels; ~/.cache by default"},
	{"XDG_RUNTIME_DIR", "the directory of the control sockets; /run/user/UID by default"},
}

var manFiles = []manEntry{
	{"/dev/kvm", "the kernel's hypervisor, which gvm needs access to"},
	{"/dev/vhost-scsi", "the kernel's SCSI target, for disks with backend=vhost"},
	{"/sys/kernel/config/target", "where gvm configures that target"},
	{"$XDG_RUNTIME_DIR/gvm/NAME/sock", "the control socket of the machine NAME, and beside it lock and vsock"},
	{"$XDG_CACHE_HOME/gvm", "decompressed kernels"},
	{"IMAGE.pi", "the protection information of the disk IMAGE, with pi=1"},
	{"IMAGE.pr", "the persistent reservations of the disk IMAGE that last when the machine ends"},
}

// mainPage is gvm(1).
func mainPage(a *cli.App) string {
	r := newRoff("gvm", a.Usage)
	r.synopsis("gvm [command [options]]")
	r.section("DESCRIPTION")
	r.describe(a.Description, false)
	r.text("Each command has a page of its own: gvm-run(1) has the flags of a run, gvm-disk(1) the options of a disk.")
	r.section("COMMANDS")
	for _, c := range a.VisibleCommands() {
		r.entry(bold("gvm-"+c.Name)+"(1)", prose(c.Usage))
	}
	r.options("OPTIONS", a.VisibleFlags())
	r.section("EXIT STATUS")
	r.describe(exitStatusHelp, false)
	r.terms("ENVIRONMENT", manEnvironment)
	r.terms("FILES", manFiles)
	r.seeAlso(a, "")
	return r.String()
}

// commandPage is the page of a command and those below it.
func commandPage(a *cli.App, c *cli.Command) string {
	r := newRoff("gvm-"+c.Name, c.Usage)
	runnable := c.Subcommands
	if c.HelpName = "gvm " + c.Name; len(c.Subcommands) == 0 || len(c.Flags) > 0 {
		runnable = append([]*cli.Command{c}, runnable...)
	}
	var lines []string
	for _, s := range runnable {
		if s != c {
			s.HelpName = "gvm " + c.Name + " " + s.Name
		}
		lines = append(lines, usageLine(s))
	}
	r.synopsis(lines...)
	r.section("DESCRIPTION")
	if c.Description == "" || headed(c.Description) {
		r.text(sentence(c.Usage))
	}
	examples := r.describe(c.Description, false)
	if len(c.Subcommands) > 0 {
		r.section("COMMANDS")
		for _, s := range c.Subcommands {
			r.line(".SS " + quoted(bold(s.HelpName)+prose(strings.TrimPrefix(usageLine(s), s.HelpName))))
			r.text(sentence(s.Usage))
			r.describe(s.Description, true)
			r.options("", s.VisibleFlags())
		}
	}
	r.options("OPTIONS", c.VisibleFlags())
	if c.Description != exitStatusHelp {
		r.section("EXIT STATUS")
		r.text("gvm(1) lists the exit statuses.")
	}
	if examples != nil {
		r.section("EXAMPLES")
		r.example(examples)
	}
	r.seeAlso(a, c.Name)
	return r.String()
}

// agentPage is gvm-agent(1).
func agentPage() string {
	r := newRoff("gvm-agent", "the first program of the guests of gvm test")
	r.synopsis("gvm-agent")
	r.section("DESCRIPTION")
	r.text("gvm test puts gvm-agent into its guests, where it runs the command. It is of no use elsewhere.")
	r.text("gvm looks for gvm-agent beside itself. Without one of the same build gvm is the agent itself, which is " +
		"larger: guests start later and need more memory.")
	r.section("EXIT STATUS")
	r.text("2.")
	r.section("SEE ALSO")
	r.text("gvm-test(1)")
	return r.String()
}

// plotPage is gvm-plot(1).
func plotPage() string {
	r := newRoff("gvm-plot", "draw the plots of gvm")
	r.synopsis("gvm-plot")
	r.section("DESCRIPTION")
	r.text("gvm starts gvm-plot for gvm trace plot and gvm bench --plot. It reads the description of a plot " +
		"as JSON from standard input, and writes an SVG or PNG file to standard output. It takes no arguments.")
	r.text("gvm looks for gvm-plot beside itself, then in $PATH.")
	r.section("EXIT STATUS")
	r.text("0, or 1 if there is no plot, or 2 if there are arguments.")
	r.section("SEE ALSO")
	r.text("gvm-bench(1), gvm-trace(1)")
	return r.String()
}

// netPage is gvm-net(1).
func netPage() string {
	r := newRoff("gvm-net", "the user-mode network of gvm")
	r.synopsis("gvm-net")
	r.section("DESCRIPTION")
	r.text("gvm starts gvm-net for gvm run --net user, one for each machine, and hands over the sockets that it " +
		"serves. It ends with the machine.")
	r.text("gvm looks for gvm-net beside itself, then in $PATH.")
	r.section("EXIT STATUS")
	r.text("0, or 1 if the network failed or gvm did not start it.")
	r.section("SEE ALSO")
	r.text("gvm-run(1)")
	return r.String()
}

// usageLine is how a command is called.
func usageLine(c *cli.Command) string {
	line := c.HelpName
	if len(c.VisibleFlags()) > 0 {
		line += " [options]"
	}
	return strings.TrimSpace(line + " " + c.ArgsUsage)
}

// sentence makes a sentence of a command's usage.
func sentence(usage string) string {
	return strings.ToUpper(usage[:1]) + usage[1:] + "."
}

// roff is a man page as it is written, in the language of man(7).
type roff struct {
	strings.Builder
	mentions map[string]bool // commands that the page has named
	begun    bool            // the last line begins a section: it needs no macro for a paragraph
}

func newRoff(name, usage string) *roff {
	date := time.Now()
	if n, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
		date = time.Unix(n, 0)
	}
	r := &roff{mentions: map[string]bool{}}
	day := date.UTC().Format(time.DateOnly)
	r.line(fmt.Sprintf(`.TH %s 1 %s "gvm %s" "gvm's manual"`, plain(strings.ToUpper(name)), day, version))
	r.section("NAME")
	r.fill(plain(name) + ` \- ` + plain(usage))
	return r
}

func (r *roff) line(s string) {
	if s == ".PP" && r.begun {
		return
	}
	r.begun = strings.HasPrefix(s, ".SH ") || strings.HasPrefix(s, ".SS ")
	r.WriteString(s + "\n")
}

func (r *roff) section(name string) { r.line(".SH " + quoted(plain(name))) }

func (r *roff) synopsis(lines ...string) {
	r.section("SYNOPSIS")
	r.line(".nf")
	for _, l := range lines {
		name, rest, _ := strings.Cut(l, " [")
		if rest != "" {
			rest = " [" + rest
		}
		r.line(bold(name) + prose(rest))
	}
	r.line(".fi")
}

// text is a paragraph.
func (r *roff) text(s string) {
	r.line(".PP")
	r.fill(r.prose(s))
}

// prose is prose, in which the names of commands are remembered.
func (r *roff) prose(s string) string {
	for _, m := range commandWord.FindAllStringSubmatch(s, -1) {
		r.mentions[m[1]] = true
	}
	return prose(s)
}

// fill writes words in lines, each sentence on a line of its own.
func (r *roff) fill(s string) {
	r.begun = false
	var at int
	for _, w := range strings.Fields(s) {
		if at > 0 && at+1+len(w) > 78 {
			r.WriteByte('\n')
			at = 0
		}
		if at > 0 {
			r.WriteByte(' ')
		} else if strings.HasPrefix(w, ".") || strings.HasPrefix(w, "'") {
			w = `\&` + w
		}
		r.WriteString(w)
		if at += 1 + len(w); strings.HasSuffix(w, ".") {
			r.WriteByte('\n')
			at = 0
		}
	}
	if at > 0 {
		r.WriteByte('\n')
	}
}

// entry is an entry of a list.
func (r *roff) entry(head, body string) {
	r.line(".TP")
	r.line(head)
	r.fill(body)
}

func (r *roff) terms(section string, terms []manEntry) {
	r.section(section)
	for _, t := range terms {
		r.entry(bold(t.name), r.prose(sentence(t.meaning)))
	}
}

// options are a command's flags. Without a section they are those of a command within a page.
func (r *roff) options(section string, flags []cli.Flag) {
	flags = slices.DeleteFunc(slices.Clone(flags), func(f cli.Flag) bool { return section == "" && f == cli.HelpFlag })
	if len(flags) > 0 && section != "" {
		r.section(section)
	}
	for _, f := range flags {
		names, value, usage := flagWords(f)
		for i, n := range names {
			names[i] = bold(n)
		}
		head := strings.Join(names, ", ")
		if value != "" {
			head += " " + italic(value)
			at := strings.IndexByte(f.(cli.DocGenerationFlag).GetUsage(), '`')
			usage = usage[:at] + "\x00" + usage[at+len(value):]
		}
		r.entry(head, strings.ReplaceAll(r.prose(usage), "\x00", italic(value)))
	}
}

// example has lines as they are.
func (r *roff) example(lines []string) {
	r.line(".PP")
	r.line(".EX")
	for _, l := range lines {
		if l = plain(l); strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			l = `\&` + l
		}
		r.line(l)
	}
	r.line(".EE")
}

var (
	heading     = regexp.MustCompile(`^[A-Z]{2}[A-Z ]+( --[a-z-]+)?$`)
	longFlag    = regexp.MustCompile(`(^|[ (])(--[a-z][a-z-]*)`)
	commandWord = regexp.MustCompile(`\bgvm (?:help )?([a-z-]+)`)
)

// headed reports whether a description begins with a heading.
func headed(description string) bool {
	first, _, _ := strings.Cut(description, "\n")
	return heading.MatchString(first)
}

// describe writes the description of a command: paragraphs, tables, which are indented, and parts
// with a heading. It returns the lines of the examples, or writes them if nested is set, for a
// command within a page.
func (r *roff) describe(description string, nested bool) (examples []string) {
	inExamples := false
	for block := range strings.SplitSeq(description, "\n\n") {
		lines := strings.Split(strings.Trim(block, "\n"), "\n")
		if heading.MatchString(lines[0]) {
			if inExamples = strings.HasPrefix(lines[0], "EXAMPLE"); !inExamples {
				r.section(lines[0])
			}
			lines = lines[1:]
		}
		switch {
		case len(lines) == 0:
		case inExamples:
			for _, l := range lines {
				examples = append(examples, strings.TrimPrefix(l, "   "))
			}
		case strings.HasPrefix(lines[0], " "):
			r.table(lines)
		default:
			if paragraph := strings.Join(lines, " "); strings.TrimSpace(paragraph) != "" {
				r.text(paragraph)
			}
		}
	}
	if nested && examples != nil {
		r.example(examples)
	}
	return examples
}

// table writes the entries of a table: each begins in the fourth column, and its meaning is behind
// two spaces or more, or on lines that are indented further.
func (r *roff) table(lines []string) {
	var rows []manEntry
	for _, l := range lines {
		l = strings.TrimPrefix(l, "   ")
		if strings.HasPrefix(l, " ") {
			rows[len(rows)-1].meaning += " " + strings.TrimSpace(l)
			continue
		}
		name, meaning, _ := strings.Cut(l, "  ")
		rows = append(rows, manEntry{name, strings.TrimSpace(meaning)})
	}
	for _, row := range rows {
		r.entry(bold(row.name), r.prose(row.meaning))
	}
}

// seeAlso refers to the pages of the commands that a page has named.
func (r *roff) seeAlso(a *cli.App, self string) {
	r.section("SEE ALSO")
	var pages []string
	if self != "" {
		pages = append(pages, bold("gvm")+"(1)")
	}
	names := []string{}
	for _, c := range a.VisibleCommands() {
		if c.Name != self && (self == "" || r.mentions[c.Name]) {
			names = append(names, c.Name)
		}
	}
	slices.Sort(names)
	for _, n := range names {
		pages = append(pages, bold("gvm-"+n)+"(1)")
	}
	r.line(".ad l")
	r.line(".nh")
	r.line(strings.Join(pages, ",\n"))
}

var escapes = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`)

// plain writes text so that roff shows it as it is.
func plain(s string) string {
	var b strings.Builder
	for _, c := range escapes.Replace(s) {
		if c < 0x80 {
			b.WriteRune(c)
		} else {
			fmt.Fprintf(&b, `\[u%04X]`, c)
		}
	}
	return b.String()
}

func bold(s string) string   { return `\fB` + plain(s) + `\fR` }
func italic(s string) string { return `\fI` + plain(s) + `\fR` }

// prose is escaped text, in which flags are bold.
func prose(s string) string {
	marked := longFlag.ReplaceAllString(s, "$1\x01$2\x02")
	return strings.NewReplacer("\x01", `\fB`, "\x02", `\fR`).Replace(plain(marked))
}

// quoted is an argument of a macro.
func quoted(s string) string { return `"` + strings.ReplaceAll(s, `"`, `\(dq`) + `"` }
