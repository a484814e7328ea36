package scsi

import "iter"

// list is a doubly linked list. Its nodes are part of its elements, so that it needs no allocation
// and no search.
type list[T any] struct{ first, last *node[T] }

type node[T any] struct {
	prev, next *node[T]
	of         *T // nil: it is in no list
}

// push puts v, whose node is n, at the end.
func (l *list[T]) push(n *node[T], v *T) {
	*n = node[T]{prev: l.last, of: v}
	if l.last == nil {
		l.first = n
	} else {
		l.last.next = n
	}
	l.last = n
}

// remove takes n out if it is in the list.
func (l *list[T]) remove(n *node[T]) {
	if n.of == nil {
		return
	}
	if n.prev == nil {
		l.first = n.next
	} else {
		n.prev.next = n.next
	}
	if n.next == nil {
		l.last = n.prev
	} else {
		n.next.prev = n.prev
	}
	*n = node[T]{}
}

// all returns the elements, first to last.
func (l *list[T]) all() iter.Seq[*T] {
	return func(yield func(*T) bool) {
		for n := l.first; n != nil && yield(n.of); n = n.next {
		}
	}
}
