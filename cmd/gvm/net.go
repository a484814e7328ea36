package main

import (
	"errors"
	"fmt"
	"maps"
	stdnet "net"
	"slices"
	"strconv"
	"strings"

	"gvm/devices/virtio/net"
	"gvm/devices/virtio/net/tap"
	"gvm/machine"
	"gvm/text"
)

var vhosts = map[string]machine.Vhost{"auto": machine.VhostAuto, "off": machine.VhostOff, "on": machine.VhostOn}

// netConfig is a parsed --net.
type netConfig struct {
	machine.Net
	user *userConfig // nil: another backend
}

// netOptions are the options of --net, by its first word, and their setters.
var netOptions = map[string]map[string]func(n *netConfig, value string) error{
	"tap":  {"mac": setMAC, "queues": setPairs, "vhost": setVhost},
	"user": {"mac": setMAC, "host": setHost},
}

func setMAC(n *netConfig, value string) error {
	mac, err := stdnet.ParseMAC(value)
	if err != nil || len(mac) != len(n.Device.MAC) || mac[0]&1 != 0 || [6]byte(mac) == [6]byte{} {
		return errors.New("want the address of a station, such as 02:00:00:12:34:56")
	}
	n.Device.MAC = [6]byte(mac)
	return nil
}

func setPairs(n *netConfig, value string) (err error) {
	if n.Pairs, err = strconv.Atoi(value); err != nil || n.Pairs < 1 || n.Pairs > net.MaxPairs {
		return fmt.Errorf("want 1 to %d", net.MaxPairs)
	}
	return nil
}

func setVhost(n *netConfig, value string) error {
	var ok bool
	if n.Vhost, ok = vhosts[value]; !ok {
		return errors.New("want auto, off or on" + text.Suggest(value, slices.Collect(maps.Keys(vhosts))))
	}
	return nil
}

func setHost(n *netConfig, value string) error {
	if value != "on" && value != "off" {
		return errors.New("want on or off" + text.Suggest(value, []string{"on", "off"}))
	}
	n.user.hostOff = value == "off"
	return nil
}

// parseNets reads the values of --net.
func parseNets(values []string) (nets []machine.Net, user *userConfig, _ error) {
	for i, s := range values {
		if s == "none" {
			if len(values) > 1 {
				return nil, nil, errors.New("--net none excludes another --net")
			}
			return nil, nil, nil
		}
		n, err := parseNet(s)
		if err != nil {
			return nil, nil, fmt.Errorf("--net %s: %w", text.Word(s), err)
		}
		if n.user != nil {
			if user != nil {
				return nil, nil, errors.New("--net user is given twice: a machine has one")
			}
			user = n.user
			user.index = i
		}
		nets = append(nets, n.Net)
	}
	return nets, user, nil
}

// parseNet reads tap=NAME[,OPTION=VALUE]… or user[,OPTION=VALUE]….
func parseNet(s string) (n netConfig, err error) {
	kind, options, more := strings.Cut(s, ",")
	word, name, named := strings.Cut(kind, "=")
	switch {
	case word == "tap" && named:
		n.Tap = name
		err = tap.CheckName(name)
	case kind == "user":
		n.user = new(userConfig)
	default:
		near, names := "", []string{"none", "tap", "user"}
		if !slices.Contains(names, word) {
			near = text.Suggest(word, names)
		}
		err = errors.New("want none, user or tap=NAME" + near)
	}
	given := map[string]bool{}
	for more && err == nil {
		var option string
		option, options, more = strings.Cut(options, ",")
		key, value, _ := strings.Cut(option, "=")
		set := netOptions[word][key]
		if set == nil {
			return n, text.OneOf("option ", key, netOptions[word])
		}
		if given[key] {
			return n, fmt.Errorf("%s= is given twice", key)
		}
		given[key] = true
		if err = set(&n, value); err != nil {
			err = fmt.Errorf("%s=%s: %w", key, value, err)
		}
	}
	return n, err
}

// completeNet continues a value of --net.
func completeNet(s string) (values []string) {
	at := strings.LastIndexByte(s, ',') + 1
	if at == 0 {
		return []string{"none", "tap=", "user"}
	}
	kind, _, _ := strings.Cut(s[:at-1], ",")
	kind, _, _ = strings.Cut(kind, "=")
	given := "," + s[:at]
	key, _, hasValue := strings.Cut(s[at:], "=")
	for _, name := range slices.Sorted(maps.Keys(netOptions[kind])) {
		word := s[:at] + name + "="
		switch {
		case strings.Contains(given, ","+name+"="):
		case !hasValue:
			values = append(values, word)
		case name == key && name == "vhost":
			values = append(values, word+"auto", word+"off", word+"on")
		case name == key && name == "host":
			values = append(values, word+"off", word+"on")
		}
	}
	return values
}
