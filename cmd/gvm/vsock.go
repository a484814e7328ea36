package main

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"gvm/control"
	"gvm/devices/virtio/vhostvsock"
	"gvm/devices/virtio/vsock"
	"gvm/kvmapi/nowait"
	"gvm/text"
)

// vsockConfig is a parsed --vsock.
type vsockConfig struct {
	kind string
	cid  uint64 // 0: the first that is not reserved
	path string // "": NAME/vsock beside the control socket
}

// Kinds of --vsock.
const (
	vsockUnix  = "unix"
	vsockVhost = "vhost"
)

// vsockOptions are the options of --vsock. The value of path is the rest of the flag's.
var vsockOptions = []struct {
	name string
	set  func(*vsockConfig, string) error
}{
	{"cid", func(v *vsockConfig, s string) (err error) {
		if v.cid, err = strconv.ParseUint(s, 10, 32); err != nil || v.cid < 3 || v.cid == math.MaxUint32 {
			return fmt.Errorf("want a number from 3 to %d", uint32(math.MaxUint32-1))
		}
		return nil
	}},
	{"path", func(v *vsockConfig, s string) error {
		if v.path = s; s == "" {
			return errors.New("the path is empty; name a file")
		}
		return nil
	}},
}

// parseVsock reads unix[,cid=N][,path=FILE] or vhost,cid=N. Options alone are those of unix.
func parseVsock(s string) (*vsockConfig, error) {
	v := &vsockConfig{kind: vsockUnix}
	if word, rest, more := strings.Cut(s, ","); !strings.Contains(word, "=") {
		if word != vsockUnix && word != vsockVhost {
			return nil, text.OneOfNames("--vsock ", word, []string{vsockUnix, vsockVhost})
		}
		if v.kind, s = word, rest; more && s == "" {
			return nil, fmt.Errorf("--vsock %s,: want cid or path behind the comma", word)
		}
		if !more {
			return v.checked()
		}
	}
	given := map[string]bool{}
	for more := true; more; {
		var word string
		if strings.HasPrefix(s, "path=") {
			word, more = s, false
		} else {
			word, s, more = strings.Cut(s, ",")
		}
		name, value, _ := strings.Cut(word, "=")
		var names []string
		set := func(*vsockConfig, string) error { return nil }
		for _, o := range vsockOptions {
			names = append(names, o.name)
			if o.name == name {
				set, names = o.set, nil
				break
			}
		}
		switch err := set(v, value); {
		case names != nil:
			return nil, text.OneOfNames("--vsock ", name, names)
		case given[name]:
			return nil, fmt.Errorf("--vsock: %s= is given twice", name)
		case err != nil:
			return nil, fmt.Errorf("--vsock %s: %w", text.Word(word), err)
		}
		given[name] = true
	}
	return v.checked()
}

// completeVsock continues a value of --vsock.
func completeVsock(s string) (values []string) {
	at := strings.LastIndexByte(s, ',') + 1
	if at == 0 {
		return []string{vsockUnix, vsockVhost + ",cid="}
	}
	given := "," + s[:at]
	for _, o := range vsockOptions {
		path := o.name == "path"
		if !strings.Contains(given, ","+o.name+"=") && !(path && strings.HasPrefix(s, vsockVhost)) &&
			!strings.Contains(given, ",path=") {
			values = append(values, s[:at]+o.name+"=")
		}
	}
	return values
}

// checked returns v, unless its options do not go with each other.
func (v *vsockConfig) checked() (*vsockConfig, error) {
	switch {
	case v.kind == vsockVhost && v.path != "":
		return nil, errors.New("--vsock vhost,path=: programs reach the guest by AF_VSOCK; path goes with unix")
	case v.kind == vsockVhost && v.cid == 0:
		return nil, errors.New("--vsock vhost: want cid=N, which no other machine of this host has, such as vhost,cid=3")
	}
	return v, nil
}

// listenVsock gives the machine the device of --vsock, and opens its socket. nil: there is none.
func (rc *runConfig) listenVsock(named bool) (*vsock.Bridge, error) {
	v := rc.vsock
	if v == nil {
		return nil, nil
	}
	if v.kind == vsockVhost {
		rc.spec.VhostVsock = &vhostvsock.Config{CID: v.cid}
		return nil, nil
	}
	path, chosen := v.path, v.path != ""
	if !chosen {
		if !named {
			return nil, configError{errors.New("--vsock: the machine has no control socket to put one beside; name a file: " +
				"--vsock path=FILE")}
		}
		path = control.DefaultDirectory().Vsock(rc.spec.Name)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	urgent.making.Lock()
	defer urgent.making.Unlock()
	b, err := vsock.Listen(path)
	if errno := syscall.Errno(0); errors.As(err, &errno) && errno != syscall.EWOULDBLOCK { // of a lock
		err = nowait.CreateError(path, errno)
	}
	if err != nil {
		return nil, configError{fmt.Errorf("--vsock: %w", err)}
	}
	if rc.broker != nil && chosen { // the other one is in the machine's own directory
		b.RemoveBy(rc.broker.RemoveAtEnd)
	}
	removeAtEnd(b.Remove)
	if !chosen {
		note("the guest's vsock is at " + path + ": send CONNECT PORT")
	}
	rc.spec.Vsock = &vsock.Config{CID: v.cid, Accept: b.Accept}
	return b, nil
}
