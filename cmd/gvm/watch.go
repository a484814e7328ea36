package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"gvm/control"
	"gvm/inspect"
	"gvm/text"
)

// watchFlags are the flags of a command that may show a machine's state again and again.
func watchFlags(json string) []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "repeat until Ctrl-C or the machine's end"},
		&cli.DurationFlag{Name: "interval", Value: time.Second, Usage: "`DURATION` between two readings",
			Action: func(_ *cli.Context, d time.Duration) error {
				if d < minInterval || d > time.Hour {
					return usageError{fmt.Errorf("--interval %v: want %v to 1h", d, minInterval)}
				}
				return nil
			}},
		&cli.BoolFlag{Name: "json", Usage: json},
	}
}

// minInterval keeps a watcher from stopping the CPUs all the time.
const minInterval = 50 * time.Millisecond

// follow reads a machine's state at a path times times, or with --watch until the machine's end,
// and calls show with it.
func follow(c *cli.Context, client *control.Client, path string, times int, show func(inspect.Node) error) error {
	ticks := time.NewTicker(c.Duration("interval"))
	defer ticks.Stop()
	var deaf time.Time // since then nothing has listened on the control socket
	for i := 0; ; {
		n, err := client.Inspect(c.Context, path)
		if !errors.Is(err, control.ErrNoListener) {
			deaf = time.Time{}
		} else if deaf.IsZero() {
			deaf = time.Now()
		}
		switch {
		case err == nil:
			if err := show(n); err != nil {
				return err
			}
			i++
		case i > 0 && hasEnded(client, err) && c.Bool("watch"):
			note("machine " + client.Name() + " has ended")
			return nil
		case i > 0 && hasEnded(client, err):
			return fmt.Errorf("machine %s has ended", client.Name())
		case i == 0 || !isBetween(err) || !deaf.IsZero() && time.Since(deaf) > stopPatience:
			return refused(err)
		}
		if i >= times && !c.Bool("watch") {
			return nil
		}
		<-ticks.C
	}
}

// hasEnded reports whether the machine of a request is gone. One whose processes were killed leaves
// its socket.
func hasEnded(client *control.Client, err error) bool {
	if !errors.Is(err, control.ErrNoListener) {
		return errors.Is(err, control.ErrNoSocket)
	}
	entry, err := find(client)
	return err == nil && entry == nil
}

// find returns the living machine of the client's name, or nil.
func find(client *control.Client) (*control.Entry, error) {
	entries, err := control.DefaultDirectory().List()
	for _, e := range entries {
		if e.Name == client.Name() {
			return &e, nil
		}
	}
	return nil, err
}

// isBetween reports whether the machine is ending, or its guest is between two lives.
func isBetween(err error) bool {
	var e *control.Error
	return errors.As(err, &e) && e.Status == http.StatusServiceUnavailable || errors.Is(err, control.ErrCut) ||
		errors.Is(err, control.ErrNoListener) || errors.Is(err, control.ErrNoSocket)
}

// screen shows one text after the other: on a terminal each over the one before and as much as
// fits, elsewhere below it.
type screen struct {
	out   io.Writer
	watch bool
	shown bool
}

// show shows a text of lines.
func (s *screen) show(words string) error {
	first := !s.shown
	s.shown = true
	if !s.watch || !term.IsTerminal(int(os.Stdout.Fd())) {
		if !first {
			words = "\n" + words
		}
		_, err := io.WriteString(s.out, words)
		return err
	}
	width, height, err := term.GetSize(int(os.Stdout.Fd()))
	if err != nil || width <= 0 || height <= 1 {
		width, height = helpWidth, 24
	}
	var b strings.Builder
	if first {
		b.WriteString("\x1b[2J")
	}
	b.WriteString("\x1b[H")
	lines := strings.Split(strings.TrimSuffix(text.Lines(words), "\n"), "\n")
	if more := len(lines) - (height - 1); more > 0 {
		lines = append(lines[:height-2], text.Count(more+1, "more line"))
	}
	for _, line := range lines {
		if r := []rune(line); len(r) > width {
			line = string(r[:width])
		}
		b.WriteString(line + "\x1b[K\n")
	}
	b.WriteString("\x1b[J")
	_, err = io.WriteString(os.Stdout, b.String())
	return err
}

// showJSON writes v as JSON, on one line while watching.
func (s *screen) showJSON(v any) error {
	if !s.watch {
		return writeJSON(s.out, v)
	}
	e := json.NewEncoder(s.out)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
