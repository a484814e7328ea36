package ktap

import "strings"

// lava is the state of LAVA's signals, which a job's test definitions print on the console. ENDTC
// comes before the result of its case, and says nothing:
//
//	<LAVA_SIGNAL_STARTRUN suite UUID>
//	<LAVA_SIGNAL_TESTSET START name>
//	<LAVA_SIGNAL_STARTTC case>
//	<LAVA_SIGNAL_ENDTC case>
//	<LAVA_SIGNAL_TESTCASE TEST_CASE_ID=case RESULT=pass|fail|skip|unknown MEASUREMENT=1 UNITS=s>
//	<LAVA_SIGNAL_ENDRUN suite UUID>
type lava struct {
	run, set *Test  // nil: none
	running  string // the case that STARTTC named and has no result
}

var signalWord = pattern(`<LAVA_SIGNAL_([A-Z]+) ([^<>]*)>`)

// signal reads a line, and reports whether it is a signal.
func (p *Parser) signal(line string) bool {
	if !strings.Contains(line, "<LAVA_SIGNAL_") {
		return false
	}
	m := signalWord().FindStringSubmatch(line)
	if m == nil {
		return false
	}
	words := append(strings.Fields(m[2]), "")
	l := &p.lava
	switch m[1] {
	case "STARTRUN":
		l.end(p)
		p.started = true
		l.run = &Test{Name: cut(words[0])}
		p.add(&p.root, l.run)
	case "ENDRUN":
		l.end(p)
	case "TESTSET":
		l.endCase(p)
		if l.set = nil; words[0] == "START" {
			set := &Test{Name: cut(words[1])}
			p.add(l.suite(p), set)
			l.set = set
		}
	case "STARTTC":
		l.endCase(p)
		p.started = true
		l.running = cut(words[0])
	case "TESTCASE":
		p.started = true
		l.result(p, words)
	}
	return true
}

// suite returns the suite for a result.
func (l *lava) suite(p *Parser) *Test {
	switch {
	case l.set != nil:
		return l.set
	case l.run == nil:
		l.run = &Test{Name: "lava"}
		p.add(&p.root, l.run)
	}
	return l.run
}

// result adds a test.
func (l *lava) result(p *Parser, words []string) {
	fields := map[string]string{}
	for _, w := range words {
		if key, value, ok := strings.Cut(w, "="); ok {
			fields[strings.ToUpper(key)] = cut(value)
		}
	}
	t := &Test{Name: fields["TEST_CASE_ID"], Status: Status(strings.ToLower(fields["RESULT"]))}
	switch t.Status {
	case Pass, Fail, Skip:
	default:
		t.Status, t.Reason = Crash, "result "+fields["RESULT"]
	}
	if m := fields["MEASUREMENT"]; m != "" {
		t.Measurement = strings.TrimSpace(m + " " + fields["UNITS"])
	}
	if t.Name == l.running {
		l.running = ""
	}
	p.add(l.suite(p), t)
	p.ended(t, 1)
}

// endCase ends a case that began.
func (l *lava) endCase(p *Parser) {
	if l.running != "" {
		t := &Test{Name: l.running, Status: Crash, Reason: "no result"}
		l.running = ""
		p.add(l.suite(p), t)
		p.ended(t, 1)
	}
}

// end ends the run.
func (l *lava) end(p *Parser) {
	l.endCase(p)
	if l.run != nil {
		for _, t := range l.run.Tests {
			if t.Status == "" { // a set
				t.Status = t.Counts().Status()
			}
		}
		l.run.Status = l.run.Counts().Status()
	}
	l.run, l.set = nil, nil
}
