package control

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// TestConsole: bytes go both ways, and the end of the console is that of the connection.
func TestConsole(t *testing.T) {
	f := newFake()
	near, far := net.Pipe()
	f.console = near
	d, c := serve(t, f)
	conn, err := c.Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "typed"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(far, b); err != nil || string(b) != "typed" {
		t.Errorf("the machine got %q, %v", b, err)
	}
	if err := c.Break(t.Context()); err != nil || f.breaks != 1 {
		t.Errorf("%d breaks, %v", f.breaks, err)
	}
	go func() {
		_, _ = io.WriteString(far, "printed")
		far.Close()
	}()
	if out, err := io.ReadAll(conn); err != nil || string(out) != "printed" {
		t.Errorf("the client got %q, %v", out, err)
	}
	for _, header := range []string{"", "Connection: Upgrade\r\nUpgrade: websocket\r\n"} {
		status, _, body := exchange(t, d, "GET /v1/console HTTP/1.1\r\nHost: gvm\r\n"+header+"\r\n")
		if status != http.StatusUpgradeRequired ||
			!strings.Contains(body, "want Connection: Upgrade and Upgrade: gvm-console") {
			t.Errorf("%q: %d %s", header, status, body)
		}
	}
}

// echo connects to a stream of the machine, by which bytes go both ways, and the end comes back.
func (f *fake) echo(t *testing.T, connect func(context.Context) (io.ReadWriteCloser, error)) {
	t.Helper()
	near, far := net.Pipe()
	f.console = near
	conn, err := connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = io.CopyN(far, far, 5)
		far.Close()
	}()
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestHVC: bytes of the virtio console go both ways, and sizes of its terminal are checked.
func TestHVC(t *testing.T) {
	f := newFake()
	d, c := serve(t, f)
	_, err := c.HVC(t.Context())
	wantError(t, err, http.StatusNotFound, "no virtio console")
	f.echo(t, c.HVC)
	want := TerminalSize{Columns: 65535, Rows: 1}
	if err := c.ResizeHVC(t.Context(), want); err != nil || f.size != want {
		t.Errorf("%+v, %v", f.size, err)
	}
	wantError(t, c.ResizeHVC(t.Context(), TerminalSize{Rows: 24}), http.StatusBadRequest, "no columns")
	for _, body := range []string{`{"columns": 65536, "rows": 1}`, `{"columns": -1, "rows": 1}`,
		`{"columns": 80, "rows": 24, "cells": 1}`, `{"columns": "80"}`, ``} {
		status, _, answer := exchange(t, d, fmt.Sprintf(
			"POST /v1/hvc/size HTTP/1.1\r\nHost: gvm\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
		if status != http.StatusBadRequest || f.size != want {
			t.Errorf("%s: %d %s, %+v", body, status, answer, f.size)
		}
	}
}

// TestAgent: a session's bytes go both ways.
func TestAgent(t *testing.T) {
	f := newFake()
	_, c := serve(t, f)
	_, err := c.Agent(t.Context())
	wantError(t, err, http.StatusNotFound, "no agent")
	f.echo(t, c.Agent)
}

// TestConsoleEnds: a console ends with the machine, also if that has not read all input, for which
// Linux resets the connection.
func TestConsoleEnds(t *testing.T) {
	f := newFake()
	near, far := net.Pipe()
	f.console = near
	_, c := serve(t, f)
	conn, err := c.Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(make([]byte, 64<<10)); err != nil { // more than the server reads at a time
		t.Fatal(err)
	}
	if _, err := far.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	far.Close()
	if out, err := io.ReadAll(conn); err != nil || len(out) > 0 {
		t.Errorf("%q, %v", out, err)
	}
}

// TestConsoleLeft: the machine's end of the console closes when a client goes.
func TestConsoleLeft(t *testing.T) {
	f := newFake()
	near, far := net.Pipe()
	f.console = near
	_, c := serve(t, f)
	conn, err := c.Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the console is open: %v", err)
	}
}

// flood is a console whose output never ends before Close.
type flood struct{ closed chan struct{} }

func (f flood) Read(p []byte) (int, error) {
	select {
	case <-f.closed:
		return 0, io.EOF
	default:
		return len(p), nil
	}
}

func (f flood) Write(p []byte) (int, error) { <-f.closed; return 0, io.ErrClosedPipe }

func (f flood) Close() error {
	select {
	case <-f.closed:
	default:
		close(f.closed)
	}
	return nil
}

// TestConsoleUnread: a client that does not read, and whose input the guest does not take, does not
// delay the end of the server.
func TestConsoleUnread(t *testing.T) {
	f := newFake()
	f.console = flood{make(chan struct{})}
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	s.Serve(f)
	conn, err := NewClient(d, "vm").Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "typed"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil { // waits for the goroutines of the console
		t.Error(err)
	}
}
