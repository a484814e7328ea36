// Package panics makes a panic of any goroutine an event of the program: Go ends a process at once
// when a goroutine panics, and no other goroutine can restore the terminal, make disks durable or
// remove a socket. Every goroutine of gvm starts through this package (TestGoroutines).
package panics

import (
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
)

// Panic is the panic of a goroutine.
type Panic struct {
	Value any
	Stack string // the goroutine's
}

func (p *Panic) Error() string { return fmt.Sprintf("panic: %v", p.Value) }

var (
	mu       sync.Mutex
	handlers []*func(*Panic)
)

// Handle has h called with every panic until cancel is called. h is called by the goroutine that
// panicked and does not wait. While there is no handler, a panic ends the process.
func Handle(h func(*Panic)) (cancel func()) {
	mu.Lock()
	defer mu.Unlock()
	handlers = append(handlers, &h)
	return func() {
		mu.Lock()
		defer mu.Unlock()
		handlers = slices.DeleteFunc(slices.Clone(handlers), func(other *func(*Panic)) bool { return other == &h })
	}
}

// Go runs f in a goroutine. After a panic the handlers are called and the goroutine ends; what it
// was to deliver is not delivered, so a handler ends each wait for that.
func Go(f func()) {
	go func() {
		defer Catch()
		f()
	}()
}

// Func returns f for another function that runs it in a goroutine, such as sync.WaitGroup.Go and
// time.AfterFunc. A panic of f is treated as by Go.
func Func(f func()) func() {
	return func() {
		defer Catch()
		f()
	}
}

// Unlocked calls f with l unlocked, and locks l again. It does so even if f panics: the caller's
// deferred Unlock of an unlocked mutex would end the process, and cannot be caught.
func Unlocked(l sync.Locker, f func()) {
	l.Unlock()
	defer l.Lock()
	f()
}

// Catch is deferred at the top of a goroutine that another package starts, and treats a panic as Go
// does.
func Catch() {
	mu.Lock()
	hs := handlers
	mu.Unlock()
	if len(hs) == 0 {
		return // the runtime prints the goroutine as it is
	}
	r := recover()
	if r == nil {
		return
	}
	p := &Panic{Value: r, Stack: string(debug.Stack())}
	for _, h := range hs {
		(*h)(p)
	}
}
