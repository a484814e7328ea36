package main

import (
	"errors"
	"fmt"
	stdnet "net"
	"strconv"
	"strings"

	"gvm/devices/virtio/net"
	"gvm/devices/virtio/net/tap"
	"gvm/machine"
	"gvm/text"
)

var vhosts = map[string]machine.Vhost{"auto": machine.VhostAuto, "off": machine.VhostOff, "on": machine.VhostOn}

// netOptions are the options of --net, by its first word, and what sets them.
var netOptions = map[string]func(n *machine.Net, value string) error{
	"mac": func(n *machine.Net, value string) error {
		mac, err := stdnet.ParseMAC(value)
		if err != nil || len(mac) != len(n.Device.MAC) || mac[0]&1 != 0 || [6]byte(mac) == [6]byte{} {
			return errors.New("want the address of a station, such as 02:00:00:12:34:56")
		}
		n.Device.MAC = [6]byte(mac)
		return nil
	},
	"queues": func(n *machine.Net, value string) (err error) {
		if n.Pairs, err = strconv.Atoi(value); err != nil || n.Pairs < 1 || n.Pairs > net.MaxPairs {
			return fmt.Errorf("want 1 to %d", net.MaxPairs)
		}
		return nil
	},
	"vhost": func(n *machine.Net, value string) error {
		var ok bool
		if n.Vhost, ok = vhosts[value]; !ok {
			return errors.New("want auto, off or on")
		}
		return nil
	},
}

// parseNets reads the values of --net.
func parseNets(values []string) (nets []machine.Net, _ error) {
	for _, s := range values {
		if s == "none" {
			if len(values) > 1 {
				return nil, errors.New("--net none excludes another --net")
			}
			return nil, nil
		}
		n, err := parseNet(s)
		if err != nil {
			return nil, fmt.Errorf("--net %s: %w", s, err)
		}
		nets = append(nets, n)
	}
	return nets, nil
}

// parseNet reads tap=NAME[,OPTION=VALUE]….
func parseNet(s string) (n machine.Net, err error) {
	kind, options, more := strings.Cut(s, ",")
	word, name, named := strings.Cut(kind, "=")
	switch {
	case word == "tap" && named:
		n.Tap = name
		err = tap.CheckName(name)
	default:
		err = errors.New("want none or tap=NAME")
	}
	for more && err == nil {
		var option string
		option, options, more = strings.Cut(options, ",")
		key, value, _ := strings.Cut(option, "=")
		set := netOptions[key]
		if set == nil {
			return n, text.OneOf("option ", key, netOptions)
		}
		if err = set(&n, value); err != nil {
			err = fmt.Errorf("%s=%s: %w", key, value, err)
		}
	}
	return n, err
}
