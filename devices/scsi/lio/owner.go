package lio

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// owner is a Target of a process. The start time makes a process id that is
// used again another owner.
type owner struct {
	pid   int
	start uint64 // clock ticks after boot, modulo startModulus (proc_pid_stat(5), field 22)
	seq   int    // tells the Targets of one process apart
}

const (
	startModulus = 1e10 // three years of ticks
	maxSeq       = 49
)

// adapter returns the name of the owner's adapter directory for a backstore. The kernel wants
// PLUGIN_NUMBER, with a number below 2^64, of which it uses 32 bits, in messages only. The 20
// digits are 1PPPPPPPSSSSSSSSSSQQ: process id, start time, and twice seq, plus 1 if the vhost
// directory was not there before gvm: then the last gvm removes it.
func (o owner) adapter(plugin string, madeFabric bool) string {
	q := 2 * o.seq
	if madeFabric {
		q++
	}
	return fmt.Sprintf("%s_1%07d%010d%02d", plugin, o.pid, o.start, q)
}

// parseAdapter is the inverse of adapter; ok is false for adapters that are not
// gvm's.
func parseAdapter(name string) (o owner, madeFabric, ok bool) {
	plugin, n, _ := strings.Cut(name, "_")
	if _, known := backstores[plugin]; !known || len(n) != 20 || n[0] != '1' {
		return o, false, false
	}
	pid, err1 := strconv.Atoi(n[1:8])
	start, err2 := strconv.ParseUint(n[8:18], 10, 64)
	q, err3 := strconv.Atoi(n[18:])
	o = owner{pid, start, q / 2}
	return o, q%2 == 1, errors.Join(err1, err2, err3) == nil && o.adapter(plugin, q%2 == 1) == name
}

// disk is the name of the backstore behind a LUN.
func (o owner) disk(lun int) string {
	return fmt.Sprintf("gvm-%d-%d-%d-lun%d", o.pid, o.start, o.seq, lun)
}

// wwn names the owner's target port, and its initiator port. NAA 5 (IEEE
// Registered) with LIO's company id, as other tools for LIO name them and expect
// it; the 36 bits that are left are a hash.
func (o owner) wwn() string       { return o.naa("target") }
func (o owner) initiator() string { return o.naa("initiator") }

func (o owner) naa(role string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %d %d", role, o.pid, o.start, o.seq))
	return "naa.5001405" + hex.EncodeToString(sum[:])[:9]
}

// self returns the owner of this process.
func (h *host) self() (owner, error) {
	pid := os.Getpid()
	start, ok := h.running(pid)
	if !ok {
		return owner{}, errors.New("/proc/self/stat: cannot be read: mount -t proc proc /proc")
	}
	return owner{pid: pid, start: start}, nil
}

// startTime returns when a process started, as owner counts, unless it has
// ended. One that waits for its parent has.
func startTime(pid int) (start uint64, ok bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	// The name, in brackets, may hold anything: fields count from its end, and
	// the first after it is the third, the state.
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 20 || strings.ContainsAny(string(f[0]), "ZXx") {
		return 0, false
	}
	start, err = strconv.ParseUint(string(f[22-3]), 10, 64)
	return start % startModulus, err == nil
}

// alive reports whether an owner is alive.
func (h *host) alive(o owner, adapters []string) (bool, error) {
	if start, ok := h.running(o.pid); ok && start == o.start {
		return true, nil
	}
	for _, a := range adapters {
		if locked, err := h.locked(core + "/" + a); locked || err != nil {
			return locked, err
		}
	}
	return false, nil
}
