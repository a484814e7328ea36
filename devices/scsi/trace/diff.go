package trace

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"
	"sort"
)

// Change is a request of both traces with different answers.
type Change struct {
	A, B *Record
	What []string // "status", "sense", "residual", "response", "length"
}

// Diff is the result of Compare.
type Diff struct {
	Requests     int // pairs that were compared
	Moved        int // those of them that are in another order
	Changed      []Change
	OnlyA, OnlyB []*Record
	LostA, LostB uint64 // records that are missing in the traces
}

// Same reports whether there is no difference. A different order is none: requests that are in
// flight together have no order.
func (d *Diff) Same() bool { return len(d.Changed)+len(d.OnlyA)+len(d.OnlyB) == 0 }

// Compare compares the requests and answers of two traces. It aligns the requests of each logical
// unit in their order; requests with the same CDB are the same request. It then compares those left
// over on both sides, as requests in another order. Times, tags and queues may differ, and so may
// fields that one of the backends does not know.
func Compare(a, b *Reader) (*Diff, error) {
	d := &Diff{}
	sides := [2]map[string][]*Record{}
	for i, side := range []struct {
		r    *Reader
		lost *uint64
	}{{a, &d.LostA}, {b, &d.LostB}} {
		var err error
		if sides[i], *side.lost, err = load(side.r); err != nil {
			return nil, &SideError{i, err}
		}
	}
	var units []string
	for _, side := range sides {
		for unit := range side {
			units = append(units, unit)
		}
	}
	slices.Sort(units)
	for _, unit := range slices.Compact(units) {
		d.unit(sides[0][unit], sides[1][unit])
	}
	byTime := func(x, y *Record) int { return cmp.Compare(x.Time, y.Time) }
	sort.SliceStable(d.Changed, func(i, j int) bool { return byTime(d.Changed[i].A, d.Changed[j].A) < 0 })
	slices.SortStableFunc(d.OnlyA, byTime)
	slices.SortStableFunc(d.OnlyB, byTime)
	return d, nil
}

// SideError is an error of the trace that is argument Side (0 or 1) of Compare.
type SideError struct {
	Side int
	Err  error
}

func (e *SideError) Error() string { return e.Err.Error() }
func (e *SideError) Unwrap() error { return e.Err }

// load reads a trace into lists by unit, in the order of the requests.
func load(t *Reader) (map[string][]*Record, uint64, error) {
	units := map[string][]*Record{}
	var lost uint64
	for {
		var r Record
		err := t.Next(&r)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, 0, err
		}
		if r.Kind == Lost {
			lost += r.Count
			continue
		}
		r.CDB, r.Sense, r.Payload = bytes.Clone(r.CDB), bytes.Clone(r.Sense), nil
		unit := fmt.Sprintf("%d %s", r.Device, r.Unit())
		if r.Unit() == "none" {
			unit += fmt.Sprintf(" %x", r.LUN)
		}
		units[unit] = append(units[unit], &r)
	}
	for _, list := range units {
		slices.SortStableFunc(list, func(x, y *Record) int { return cmp.Compare(x.Time, y.Time) })
	}
	return units, lost, nil
}

// key returns the identity of a request: requests with equal keys are the same.
func (r *Record) key() string { return fmt.Sprintf("%d %d %s", r.Kind, r.Function, trim(r.CDB)) }

// unit compares the requests of one unit.
func (d *Diff) unit(a, b []*Record) {
	ids := map[string]int{}
	number := func(list []*Record) []int {
		keys := make([]int, len(list))
		for i, r := range list {
			k := r.key()
			if _, ok := ids[k]; !ok {
				ids[k] = len(ids)
			}
			keys[i] = ids[k]
		}
		return keys
	}
	ka, kb := number(a), number(b)
	pairs := align(ka, kb)
	i := 0
	var restA []int
	waiting := map[int][]int{} // of b, by key, those that align left over
	j := 0
	for _, p := range append(pairs, [2]int{len(a), len(b)}) {
		for ; i < p[0]; i++ {
			restA = append(restA, i)
		}
		for ; j < p[1]; j++ {
			waiting[kb[j]] = append(waiting[kb[j]], j)
		}
		if i < len(a) && j < len(b) {
			d.pair(a[i], b[j])
		}
		i, j = i+1, j+1
	}
	for _, i := range restA {
		if w := waiting[ka[i]]; len(w) > 0 {
			waiting[ka[i]] = w[1:]
			d.Moved++
			d.pair(a[i], b[w[0]])
			continue
		}
		d.OnlyA = append(d.OnlyA, a[i])
	}
	for _, w := range waiting {
		for _, j := range w {
			d.OnlyB = append(d.OnlyB, b[j])
		}
	}
}

// pair compares two records of the same request.
func (d *Diff) pair(a, b *Record) {
	d.Requests++
	unknown := a.Missing | b.Missing
	var what []string
	for _, f := range []struct {
		name    string
		differs bool
	}{
		{"response", unknown&NoResponse == 0 && a.Response != b.Response},
		{"status", a.Status != b.Status},
		{"sense", !bytes.Equal(bytes.TrimRight(a.Sense, "\x00"), bytes.TrimRight(b.Sense, "\x00"))},
		{"residual", unknown&NoResidual == 0 && a.Residual != b.Residual},
		{"length", a.Out != b.Out || a.In != b.In},
	} {
		if f.differs {
			what = append(what, f.name)
		}
	}
	if len(what) > 0 {
		d.Changed = append(d.Changed, Change{a, b, what})
	}
}

// Outcomes describes the results of the request in A and in B, so that the two texts differ.
func (c *Change) Outcomes() (a, b string) {
	a, b = c.A.Outcome(), c.B.Outcome()
	if slices.Contains(c.What, "length") {
		a += fmt.Sprintf(" (out %d, in %d)", c.A.Out, c.A.In)
		b += fmt.Sprintf(" (out %d, in %d)", c.B.Out, c.B.In)
	}
	if a == b { // sense data with the same meaning
		a += fmt.Sprintf(" [% x]", c.A.Sense)
		b += fmt.Sprintf(" [% x]", c.B.Sense)
	}
	return a, b
}

// maxEdits bounds the differences that align searches ahead before it takes a partial result: its
// time and memory grow with their square.
const maxEdits = 1000

// align returns the pairs of positions of a longest common subsequence of a and
// b, in ascending order, by E. W. Myers' greedy algorithm ("An O(ND) Difference
// Algorithm and Its Variations", 1986). Where a and b differ in more than
// maxEdits places, it is long, but there may be a longer one.
func align(a, b []int) [][2]int {
	var pairs [][2]int
	for x, y := 0, 0; x < len(a) && y < len(b); {
		part, dx, dy := alignPart(a[x:], b[y:])
		for _, p := range part {
			pairs = append(pairs, [2]int{x + p[0], y + p[1]})
		}
		x, y = x+dx, y+dy
	}
	return pairs
}

// alignPart aligns a prefix of each, and returns their lengths, at least one of which is not 0.
func alignPart(a, b []int) (pairs [][2]int, x, y int) {
	const mid = maxEdits + 1
	reach := make([]int, 2*mid+1) // by diagonal x-y, the furthest x
	var steps [][]int             // reach before each number of edits, from diagonal -d to d
	best, bestEdits, bestK := -1, 0, 0
	for edits := 0; edits <= maxEdits && best < len(a)+len(b); edits++ {
		before := slices.Clone(reach[mid-edits : mid+edits+1])
		steps = append(steps, before)
		far := -1
		for k := -edits; k <= edits; k += 2 {
			x := from(before, edits, k)
			y := x - k
			for x < len(a) && y < len(b) && a[x] == b[y] {
				x, y = x+1, y+1
			}
			reach[mid+k] = x
			// Of equals take the one near the middle: it leaves neither of the two behind.
			if x <= len(a) && y <= len(b) && (x+y > far || x+y == far && k*k < bestK*bestK) {
				far = x + y
				best, bestEdits, bestK = far, edits, k
			}
		}
	}
	x = (best + bestK) / 2
	y = best - x
	ex := x
	for edits, k := bestEdits, bestK; edits >= 0; edits-- {
		sx := from(steps[edits], edits, k)
		for ; ex > sx; ex-- {
			pairs = append(pairs, [2]int{ex - 1, ex - 1 - k})
		}
		// Back over the edit: on the diagonal above it was one down.
		if down(steps[edits], edits, k) {
			k++
		} else {
			ex, k = ex-1, k-1
		}
	}
	slices.Reverse(pairs)
	return pairs, x, y
}

// from returns the start of the furthest path with one more edit on diagonal k, and whether it
// comes down from the diagonal above. reach holds the furthest positions after edits-1 edits, for
// the diagonals -edits to edits.
func from(reach []int, edits, k int) int {
	switch {
	case edits == 0:
		return 0
	case down(reach, edits, k):
		return reach[edits+k+1]
	}
	return reach[edits+k-1] + 1
}

func down(reach []int, edits, k int) bool {
	return k == -edits || k != edits && reach[edits+k-1] < reach[edits+k+1]
}
