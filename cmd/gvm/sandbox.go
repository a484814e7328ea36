package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/machine"
	"gvm/sandbox"
	"gvm/text"
)

// sandboxDefault is the value of --sandbox if it is not given.
var sandboxDefault = sandbox.On.String()

// sandboxNotes is whether a machine notes the parts that its sandbox lacks.
var sandboxNotes = true

func sandboxFlag(first string) cli.Flag {
	return &cli.StringFlag{Name: "sandbox", Value: sandboxDefault,
		Usage: "before the " + first + " give up every right that gvm does not need then: `MODE` on, off, " +
			"or strict, which fails where the kernel cannot take all of them; see docs/security.md"}
}

func parseSandbox(c *cli.Context) (sandbox.Mode, error) {
	mode, ok := sandbox.ParseMode(c.String("sandbox"))
	if !ok {
		return mode, text.OneOfNames("--sandbox ", c.String("sandbox"), sandbox.ModeNames[:])
	}
	return mode, nil
}

// refusedBy returns a Policy.Refused that ends the process with the status.
func refusedBy(status int) func(sandbox.Refusal) {
	return func(c sandbox.Refusal) {
		exitNow(status, patience, func() { stderr.say("gvm: " + c.String() + "\n") })
	}
}

// noteLacks tells of the parts that a sandbox lacks.
func noteLacks(r sandbox.Report, note func(string)) {
	if len(r.Missing) > 0 && sandboxNotes {
		note("sandbox: " + strings.Join(r.Missing, "; "))
	}
}

// enterSandbox enters a sandbox without a machine. A refused call ends the process with the status.
func enterSandbox(p sandbox.Policy, status int) error {
	p.Refused = refusedBy(status)
	r, err := sandbox.Prepare(p).Enter()
	if err == nil {
		noteLacks(r, note)
	}
	return err
}

// seal gives the machine its sandbox, with the files of the process. A refused call ends the
// process with the status.
func (rc *runConfig) seal(status int, note func(string)) {
	if rc.sandbox == sandbox.Off {
		return
	}
	p := sandbox.Policy{Mode: rc.sandbox, Refused: refusedBy(status), Uses: sandbox.Broker}
	if rc.spec.Name != "" {
		// If the broker is dead, gvm removes the machine's directory. A neighbour's is never empty.
		dir := control.DefaultDirectory()
		p.Paths = append(p.Paths, sandbox.Path{Name: dir.Path(), Rights: sandbox.RemoveDir, Own: true},
			sandbox.Path{Name: dir.Machine(rc.spec.Name), Rights: sandbox.Remove, Own: true})
	}
	if rc.spec.Vsock != nil && rc.vsock != nil {
		p.Uses |= sandbox.Connect
	}
	if rc.user != nil {
		p.Uses |= sandbox.Child
	}
	if rc.watch != nil {
		if rc.watch.prepare(); rc.watch.decoder != nil {
			p.Uses |= sandbox.Child
			p.Groups = append(p.Groups, rc.watch.decoder.Group())
		}
	}
	if rc.record != nil {
		rc.broker.KeepRecord(rc.record.files)
	}
	shut := func() error { // until then a failure of the start removes the files that it made
		if err := rc.broker.Shut(); err != nil {
			return fmt.Errorf("%w (--sandbox=off runs without)", err)
		}
		return nil
	}
	rc.spec.Sandbox = &machine.Sandbox{Policy: p, Entering: shut,
		Entered: func(r sandbox.Report) { noteLacks(r, note) }}
}
