package disk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"gvm/panics"
)

// settlePatience bounds how long the end of a machine waits for unflushed writes.
const settlePatience = 900 * time.Millisecond

// writeBacker is a backend that can write most data back in pieces; *block.File is one.
type writeBacker interface {
	WriteBack(context.Context) error
}

// end ends all work of the disks, and returns the backends whose storage has not completed a
// request before ctx ends. The target no longer serves them.
func (ds *Set) end(ctx context.Context) map[any]bool {
	busy := map[any]bool{}
	units := ds.target.End(ctx)
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for _, u := range units {
		i := slices.IndexFunc(ds.served, func(s served) bool { return s.unit == u })
		if i < 0 {
			continue
		}
		s := ds.served[i]
		ds.mishaps.note(fmt.Sprintf("%s: its storage has not finished a request; gvm ends without it, "+
			"and writes that the guest did not flush may be lost", s.Name()))
		busy[s.backend()] = true
		ds.served = slices.Delete(ds.served, i, i+1)
	}
	return busy
}

// settle makes the guest's unflushed writes durable, with the files beside the images: an overlay's
// map and protection information, without which the image alone is worth less. When ctx ends it
// gives up, reports the disks, and leaves them to the host. The caller has called endChanges.
func (ds *Set) settle(ctx context.Context) error {
	type result struct {
		disk *served
		err  error
	}
	results, left := make(chan result, len(ds.served)), map[*served]bool{}
	for i := range ds.served {
		s := &ds.served[i]
		if ds.busy[s.unit] != "" || !s.unit.Dirty() {
			continue
		}
		left[s] = true
		panics.Go(func() { // not waited for; storage that hangs keeps the process in any case
			var wrote error
			if w, ok := s.backend().(writeBacker); ok {
				if wrote = w.WriteBack(ctx); ctx.Err() != nil {
					results <- result{s, wrote}
					return
				}
			}
			err := s.unit.Sync()
			if !errors.Is(err, wrote) { // unless Sync has reported it, too
				err = errors.Join(wrote, err)
			}
			results <- result{s, err}
		})
	}
	var errs []error
	for len(left) > 0 {
		select {
		case r := <-results:
			if !errors.Is(r.err, context.DeadlineExceeded) {
				delete(left, r.disk)
				if r.err != nil {
					errs = append(errs, ImageError{fmt.Errorf("--disk %s: %w", r.disk.Name(), r.err)})
				}
			}
		case <-ctx.Done():
			for s := range left {
				ds.mishaps.note(fmt.Sprintf("%s: some writes that the guest did not flush "+
					"are not on stable storage yet; the host continues to write them", s.Name()))
			}
			return errors.Join(errs...)
		}
	}
	return errors.Join(errs...)
}
