package panics_test

import (
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"gvm/panics"
)

// TestPanics checks that a panic in any goroutine reaches every handler, and no
// handler that has been canceled.
func TestPanics(t *testing.T) {
	var wg sync.WaitGroup
	for name, start := range map[string]func(){
		"Go":             func() { panics.Go(func() { panic("broken") }) },
		"WaitGroup.Go":   func() { wg.Go(panics.Func(func() { panic("broken") })) },
		"AfterFunc":      func() { time.AfterFunc(0, panics.Func(func() { panic("broken") })) },
		"Catch":          func() { wg.Go(func() { defer panics.Catch(); panic("broken") }) },
		"this goroutine": panics.Func(func() { panic("broken") }),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := make(chan *panics.Panic, 1), make(chan *panics.Panic, 1)
			defer panics.Handle(func(p *panics.Panic) { a <- p })()
			panics.Handle(func(*panics.Panic) { t.Error("a canceled handler was called") })()
			defer panics.Handle(func(p *panics.Panic) { b <- p })()
			start()
			for _, c := range []chan *panics.Panic{a, b} {
				if p := <-c; p.Value != "broken" || p.Error() != "panic: broken" ||
					!strings.Contains(p.Stack, "panics_test.go") {
					t.Errorf("%v\n%s", p, p.Stack)
				}
			}
		})
	}
	wg.Wait()
}

// TestNoHandler checks that no panic is lost in a program without a handler.
func TestNoHandler(t *testing.T) {
	const asProgram = "PANICS_TEST_PANICS"
	if os.Getenv(asProgram) != "" {
		panics.Go(func() { panic("broken") })
		select {}
	}
	c := exec.Command(os.Args[0], "-test.run=^TestNoHandler$")
	c.Env = append(os.Environ(), asProgram+"=1")
	if out, err := c.CombinedOutput(); err == nil || !strings.Contains(string(out), "panic: broken") {
		t.Errorf("%v\n%s", err, out)
	}
}
