package main

import (
	"cmp"
	"fmt"
	"net"
	"strings"
	"testing"
)

func TestParseNets(t *testing.T) {
	for args, want := range map[string]string{
		"":                                     "",
		"none":                                 "",
		"tap=tap0":                             "tap0 0 00:00:00:00:00:00",
		"tap=a tap=b,queues=4":                 "a 0 00:00:00:00:00:00, b 4 00:00:00:00:00:00",
		"tap=a,mac=02:00:00:12:34:56":          "a 0 02:00:00:12:34:56",
		"tap=a,queues=2,mac=52-54-00-12-34-ff": "a 2 52:54:00:12:34:ff",

		"user": " 0 00:00:00:00:00:00",
		"user,host=off,mac=02:00:00:12:34:56 tap=a": " 0 02:00:00:12:34:56, a 0 00:00:00:00:00:00",

		"user user":                   "--net user is given twice: a machine has one",
		"user=a":                      "--net user=a: want none, user or tap=NAME",
		"user,host":                   "--net user,host: host=: want on or off",
		"user,queues=2":               "--net user,queues=2: option queues: want host or mac",
		"none tap=a":                  "--net none excludes another --net",
		"tap":                         "--net tap: want none, user or tap=NAME",
		"eth0":                        "--net eth0: want none, user or tap=NAME",
		"tap=":                        `--net tap=: interface name "": want`,
		"tap=a/b":                     `--net tap=a/b: interface name "a/b": want`,
		"tap=a,":                      `--net tap=a,: option "": want mac, queues or vhost`,
		"tap=a,queue=1":               "--net tap=a,queue=1: option queue: want mac, queues or vhost; did you mean queues?",
		"tap=a,vhost=yes":             "--net tap=a,vhost=yes: vhost=yes: want auto, off or on",
		"tap=a,queues=2,queues=2":     "--net tap=a,queues=2,queues=2: queues= is given twice",
		"tap=a,queues=0":              "--net tap=a,queues=0: queues=0: want 1 to 16",
		"tap=a,queues=17":             "--net tap=a,queues=17: queues=17: want 1 to 16",
		"tap=a,queues":                "--net tap=a,queues: queues=: want 1 to 16",
		"tap=a,mac=03:00:00:12:34:56": "--net tap=a,mac=03:00:00:12:34:56: mac=03:00:00:12:34:56: want the address of a",
		"tap=a,mac=00:00:00:00:00:00": "--net tap=a,mac=00:00:00:00:00:00: mac=00:00:00:00:00:00: want the address of a",
		"tap=a,mac=02:00:00:12:34":    "--net tap=a,mac=02:00:00:12:34: mac=02:00:00:12:34: want the address of a",
	} {
		nets, _, err := parseNets(strings.Fields(args))
		var got []string
		for _, n := range nets {
			got = append(got, fmt.Sprintf("%s %d %s", n.Tap, n.Pairs, net.HardwareAddr(n.Device.MAC[:])))
		}
		if err != nil {
			got = []string{err.Error()}
		}
		if s := strings.Join(got, ", "); s != want && (err == nil || !strings.HasPrefix(s, want)) {
			t.Errorf("%q: %s, want %s", args, s, want)
		}
	}
}

func TestParsePublish(t *testing.T) {
	for word, want := range map[string]string{
		"8080:80":           "127.0.0.1:8080 80 false",
		"0:80":              "127.0.0.1:0 80 false",
		"8080:80/tcp":       "127.0.0.1:8080 80 false",
		"53:53/udp":         "127.0.0.1:53 53 true",
		"0.0.0.0:8080:80":   "0.0.0.0:8080 80 false",
		"[::1]:8080:80/udp": "[::1]:8080 80 true",
		"::1:8080:80":       "[::1]:8080 80 false",
		"":                  "", "80": "", ":80": "", "80:": "", "80:0": "", "80:65536": "", "65536:80": "",
		"80:80/sctp": "", "80:80/": "", "x:80:80": "", "localhost:80:80": "",
	} {
		p, err := parsePublish(word)
		got := fmt.Sprint(p.addr, p.guest, p.udp)
		if err != nil {
			got = ""
			if fault := err.Error(); !strings.HasPrefix(fault, "--publish "+cmp.Or(word, `""`)+": want ") {
				t.Error(err)
			}
		}
		if got != want {
			t.Errorf("%q: %q, want %q", word, got, want)
		}
	}
	var none *userConfig
	if err := none.parsePublishes([]string{"8080:80"}); err == nil || err.Error() != "--publish needs --net user" {
		t.Error(err)
	}
}
