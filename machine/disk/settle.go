package disk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// settlePatience is how long the end of a machine waits for what its guest has not flushed.
const settlePatience = 900 * time.Millisecond

// writeBacker is a backend that can be made nearly durable in pieces; *backend.File is one.
type writeBacker interface {
	WriteBack(context.Context) error
}

// end ends all work of the disks, and returns the backends of those whose storage does not let go of a
// request before ctx ends. They are not served any more.
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
			"and what the guest did not flush may be lost", s.Name()))
		busy[s.backend()] = true
		ds.served = slices.Delete(ds.served, i, i+1)
	}
	return busy
}

// settle makes durable what the guest has not flushed, with all that lies beside the images: an
// overlay's map and protection information, without which the image alone is worth less. When ctx ends it
// gives up, tells of which disks, and leaves them to the host. The caller has called endChanges.
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
		go func() { // it ends by itself; storage that hangs keeps the process, whatever waits for it
			var wrote error
			if w, ok := s.backend().(writeBacker); ok {
				if wrote = w.WriteBack(ctx); ctx.Err() != nil {
					results <- result{s, wrote}
					return
				}
			}
			err := s.unit.Sync()
			if !errors.Is(err, wrote) { // else it tells of that, too
				err = errors.Join(wrote, err)
			}
			results <- result{s, err}
		}()
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
				ds.mishaps.note(fmt.Sprintf("%s: what the guest did not flush is not all on stable storage; the host goes on writing it", s.Name()))
			}
			return errors.Join(errs...)
		}
	}
	return errors.Join(errs...)
}
