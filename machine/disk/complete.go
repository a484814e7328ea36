package disk

import (
	"slices"
	"strings"

	"gvm/text"
)

// words returns the values of an option that are words, as opposed to those that help describes by
// a name in capital letters.
func (o *Option) words() []string {
	return slices.DeleteFunc(strings.Split(o.Value, "|"), func(w string) bool { return w != strings.ToLower(w) })
}

// Complete returns the continuations of an unfinished value of --disk for a shell, each with all
// before it: options that go with the disk and its other options, or values of the last option.
func Complete(s string) (values []string) {
	words := splitCommas(s)
	last := len(words) - 1
	if last == 0 {
		return nil
	}
	d, options, err := parse(words[:last])
	if err != nil {
		return nil
	}
	before := s[:strings.LastIndexByte(s, ',')+1]
	_, _, hasValue := strings.Cut(words[last], "=")
	for _, o := range Options() {
		if slices.ContainsFunc(options, func(g given) bool { return g.Key == o.Key }) {
			continue
		}
		var all []string
		switch legal := d.legal(options, &o); {
		case hasValue:
			for _, val := range legal {
				all = append(all, o.name()+val)
			}
		case legal != nil || len(o.words()) == 0 && d.takes(options, given{Option: &o}):
			all = []string{o.name()}
		}
		for _, word := range all {
			if strings.HasPrefix(word, words[last]) {
				values = append(values, before+word)
			}
		}
	}
	return values
}

// legal returns the words of an option that go with a disk and its other options.
func (s *Spec) legal(options []given, o *Option) (words []string) {
	for _, val := range o.words() {
		with := *s
		if err := o.set(&with, val); err == nil && with.takes(options, given{o, val, false}) {
			words = append(words, val)
		}
	}
	return words
}

// takes reports whether a disk can have one more option, with either backend if none is given.
func (s Spec) takes(options []given, more given) bool {
	options = append(slices.Clone(options), more)
	if s.check(options) == nil {
		return true
	}
	if slices.ContainsFunc(options, func(g given) bool { return g.Key == "backend" }) {
		return false
	}
	s.Backend = Vhost
	return s.check(options) == nil
}

// options returns the options that are not at their defaults, as the control socket shows them.
func (s *Spec) options() map[string]text.Name {
	values := map[string]text.Name{}
	for _, o := range Options() {
		if val := o.get(s); val != "" {
			values[o.Key] = text.Name(val)
		}
	}
	return values
}
