package gdbstub

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
)

// maxPacket bounds the body of a packet in either direction.
const maxPacket = 16 << 10

// message is a packet or another word of the client's.
type message struct {
	kind byte   // '$': a packet, interrupt, '-': the last packet is to be sent again, '!': a bad packet
	body []byte // of a packet, without escapes; nil if it is longer than maxPacket
}

// interrupt is the byte that stops a running target.
const interrupt = 0x03

// read reads the next message. It ignores acknowledgments, and bytes between packets.
func read(r *bufio.Reader) (message, error) {
	for {
		b, err := r.ReadByte()
		switch {
		case err != nil:
			return message{}, err
		case b == '$':
			return readPacket(r)
		case b == '-', b == interrupt:
			return message{kind: b}, nil
		}
	}
}

// readPacket reads a packet behind its '$'.
func readPacket(r *bufio.Reader) (message, error) {
	var body []byte
	var sum, escape byte
	long := false
	for {
		b, err := r.ReadByte()
		if err != nil {
			return message{}, unexpected(err)
		}
		if b == '#' {
			break
		}
		if b == '$' { // the rest of the last packet was lost
			body, sum, escape, long = nil, 0, 0, false
			continue
		}
		sum += b
		if b == '}' && escape == 0 {
			escape = 0x20
			continue
		}
		if len(body) == maxPacket {
			long = true
			continue
		}
		body, escape = append(body, b^escape), 0
	}
	var digits [2]byte
	if _, err := io.ReadFull(r, digits[:]); err != nil {
		return message{}, unexpected(err)
	}
	if want, err := strconv.ParseUint(string(digits[:]), 16, 8); err != nil || byte(want) != sum {
		return message{kind: '!'}, nil
	}
	if long {
		body = nil
	}
	return message{'$', body}, nil
}

// unexpected returns the error for an end of the stream within a packet.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// packet makes a packet with a body.
func packet(body string) []byte {
	p := []byte{'$'}
	for i := range len(body) {
		switch b := body[i]; b {
		case '#', '$', '}', '*':
			p = append(p, '}', b^0x20)
		default:
			p = append(p, b)
		}
	}
	var sum byte
	for _, b := range p[1:] {
		sum += b
	}
	return fmt.Appendf(p, "#%02x", sum)
}
