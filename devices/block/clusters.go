package block

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

// clusterSet is a set of the clusters of an overlay, as a tree that has nodes only for
// its contents: an image of 1 EiB has 2^44 clusters. A write adds a small part of the
// storage that it takes. Clusters are added and never taken out. Readers need
// no lock; those that add have Overlay.mu.
type clusterSet struct {
	root []atomic.Pointer[clusterUpper]
}

const (
	leafWords = 64
	leafBits  = 11 // 64 words of 32 clusters
	midBits   = leafBits + 8
	upperBits = midBits + 10
)

type (
	clusterUpper [1 << (upperBits - midBits)]atomic.Pointer[clusterMid]
	clusterMid   [1 << (midBits - leafBits)]atomic.Pointer[clusterLeaf]
)

type clusterLeaf struct {
	words [leafWords]atomic.Uint32
	dirty atomic.Bool // it has clusters that the second bitmap lacks
}

// newClusterSet returns an empty set for numbers below n: for the largest image, of 4 EiB, that are
// 1 MiB.
func newClusterSet(n int64) *clusterSet {
	return &clusterSet{root: make([]atomic.Pointer[clusterUpper], n>>upperBits+1)}
}

// find returns the leaf of a cluster, or nil and the first cluster from which on there may be one.
func (s *clusterSet) find(c int64) (leaf *clusterLeaf, next int64) {
	upper := s.root[c>>upperBits].Load()
	if upper == nil {
		return nil, (c>>upperBits + 1) << upperBits
	}
	mid := upper[c>>midBits%int64(len(upper))].Load()
	if mid == nil {
		return nil, (c>>midBits + 1) << midBits
	}
	return mid[c>>leafBits%int64(len(mid))].Load(), (c>>leafBits + 1) << leafBits
}

// make returns the leaf of a cluster, with one to have it in.
func (s *clusterSet) make(c int64) *clusterLeaf {
	mid := child(&child(&s.root[c>>upperBits])[c>>midBits%(1<<(upperBits-midBits))])
	return child(&mid[c>>leafBits%(1<<(midBits-leafBits))])
}

func child[T any](p *atomic.Pointer[T]) *T {
	if p.Load() == nil {
		p.Store(new(T))
	}
	return p.Load()
}

func (s *clusterSet) has(c int64) bool {
	leaf, _ := s.find(c)
	return leaf != nil && leaf.words[c/32%leafWords].Load()&(1<<(c%32)) != 0
}

// same returns the first cluster behind c, and at most end, that is not in the set as c is
// or is not.
func (s *clusterSet) same(c, end int64) (has bool, next int64) {
	has = s.has(c)
	for c < end {
		leaf, next := s.find(c)
		if leaf == nil {
			if has {
				return has, c
			}
			c = next
			continue
		}
		word := leaf.words[c/32%leafWords].Load()
		if has {
			word = ^word
		}
		word >>= c % 32
		if n := int64(bits.TrailingZeros32(word)); n < 32-c%32 {
			return has, min(c+n, end)
		}
		c += 32 - c%32
	}
	return has, end
}

// leaves calls do for every leaf, with the number of its first word, until it fails.
func (s *clusterSet) leaves(end int64, do func(word int64, leaf *clusterLeaf) error) error {
	for c := int64(0); c < end; {
		leaf, next := s.find(c)
		if leaf != nil {
			if err := do(c/32, leaf); err != nil {
				return err
			}
		}
		c = next
	}
	return nil
}

// bytes is a leaf as it lies in the file.
func (l *clusterLeaf) bytes() []byte {
	b := make([]byte, 0, 4*leafWords)
	for i := range l.words {
		b = binary.LittleEndian.AppendUint32(b, l.words[i].Load())
	}
	return b
}
