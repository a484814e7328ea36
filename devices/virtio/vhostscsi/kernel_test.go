package vhostscsi_test

import (
	"errors"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gvm/kvmapi/vhost"
)

func openSCSI(t *testing.T) *vhost.SCSI {
	t.Helper()
	s, err := vhost.OpenSCSI()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestKernelsRules checks the kernel's behaviour on which the device relies: the numbers
// that its ioctls answer.
func TestKernelsRules(t *testing.T) {
	tg := newTarget(t, wwn)
	group := tg.group(0, true)
	s, other := openSCSI(t), openSCSI(t)
	is := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, not %v", what, err, want)
		}
	}
	features, err := s.Features()
	is("features without an owner", err, nil)
	t.Logf("features %#x", features)
	is("a vring without an owner", s.SetVringNum(0, 16), unix.EPERM)
	is("an owner", s.SetOwner(), nil)
	is("an owner for the second time", s.SetOwner(), unix.EBUSY)
	_, err = s.BackendFeatures()
	is("backend features", err, unix.ENOTTY)
	is("VIRTIO_SCSI_F_CHANGE", s.SetFeatures(vhost.FeatureVersion1|1<<2), unix.EOPNOTSUPP)
	is("the last vring", s.SetVringNum(2+127, 16), nil)
	is("one more", s.SetVringNum(2+128, 16), unix.ENOBUFS)
	is("17 descriptors", s.SetVringNum(0, 17), unix.EINVAL)
	is("an endpoint without memory", s.SetEndpoint(wwn), unix.EFAULT)
	is("memory", s.SetMemTable(nil), nil)
	is("no such target", s.SetEndpoint(wwn+"0"), unix.ENODEV)
	is("no endpoint to clear", s.ClearEndpoint(wwn), nil)
	is("an endpoint", s.SetEndpoint(wwn), nil)
	is("an endpoint for the second time", s.SetEndpoint(wwn), unix.EEXIST)
	is("a size with an endpoint", s.SetVringNum(0, 16), unix.EBUSY)
	is("an index with an endpoint", s.SetVringBase(0, 0), unix.EBUSY)
	is("addresses with an endpoint", s.SetVringAddr(0, vhost.VringAddr{}), nil)
	_, err = s.VringBase(0)
	is("the index with an endpoint", err, nil)
	is("another owner's memory", errors.Join(other.SetOwner(), other.SetMemTable(nil)), nil)
	is("an endpoint that is in use", other.SetEndpoint(wwn), unix.ENODEV)
	is("to clear another endpoint", s.ClearEndpoint(wwn+"0"), unix.EINVAL)
	is("no more nexus", os.WriteFile(group+"/nexus", []byte("NULL"), 0), unix.EBUSY)
	is("no more portal group", syscall.Rmdir(group), unix.EBUSY)
	is("no more endpoint", s.ClearEndpoint(wwn), nil)
	is("a size after that", s.SetVringNum(0, 16), nil)
	is("an endpoint for the other", other.SetEndpoint(wwn), nil)
	is("to close it", other.Close(), nil)
	is("an endpoint again", s.SetEndpoint(wwn), nil)

	missed, err := s.EventsMissed()
	if err != nil || missed {
		t.Errorf("events missed: %v, %v", missed, err)
	}
	is("events missed", s.SetEventsMissed(true), nil)
	if missed, err = s.EventsMissed(); err != nil || !missed {
		t.Errorf("events missed: %v, %v", missed, err)
	}

	id, err := s.NewWorker()
	if errors.Is(err, unix.ENOTTY) {
		is("to free no worker", s.FreeWorker(0), unix.ENOTTY)
		is("to attach no worker", s.AttachVringWorker(2, 0), unix.ENOTTY)
		return
	}
	is("a worker", err, nil)
	is("to attach it", s.AttachVringWorker(3, id), nil)
	got, err := s.VringWorker(3)
	if err != nil || got != id {
		t.Errorf("vring 3 has worker %d (%v), not %d", got, err, id)
	}
	if got, err = s.VringWorker(2); err != nil || got == id {
		t.Errorf("vring 2 has worker %d (%v)", got, err)
	}
	is("to free it", s.FreeWorker(id), unix.EBUSY)
	is("to attach the first", s.AttachVringWorker(3, got), nil)
	is("to free it", s.FreeWorker(id), nil)
	is("to free it again", s.FreeWorker(id), unix.ENODEV)
}

// TestOwnerAmongSignals makes owners while this process gets signals as fast as
// it can send them: starting a worker must not fail for that.
func TestOwnerAmongSignals(t *testing.T) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				syscall.Kill(os.Getpid(), syscall.SIGURG)
			}
		}
	}()
	for i := range 40 {
		s, err := vhost.OpenSCSI()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetOwner(); err != nil {
			t.Errorf("time %d: %v", i, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			break
		}
	}
	close(stop)
	<-done
}
