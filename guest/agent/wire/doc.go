// Package wire is the protocol between gvm and its agent, the first program of a test guest: frames
// over one byte stream. Both ends are here. Host is gvm's, Agent the guest's.
//
// The agent sends Magic and a hello frame, and the host answers with its own. The magic is searched
// for, because a serial line may begin with output of the kernel. Both ends are of one build, or
// Accept and Dial fail.
//
// Then there are three streams of bytes. Stdin goes to the guest; Stdout and Stderr come from it.
// Each stream has its own credits: a sender sends no more than its receiver has announced room for,
// so a stream that is not read holds up no other one. The sender ends a stream with Close. A
// receiver that closes makes the sender's Write fail with ErrClosed, as a pipe without a reader
// does.
//
// A host serves a command like this:
//
//	h, err := wire.Accept(stream, wire.HostConfig{Builds: []string{build}})
//	if err != nil {
//		return err
//	}
//	defer h.Close()
//	go func() { io.Copy(h.Stdin, os.Stdin); h.Stdin.Close() }()
//	go func() { io.Copy(os.Stderr, h.Stderr) }()
//	io.Copy(os.Stdout, h.Stdout) // until the command and its children have closed it
//	exit, err := h.Wait()
//	h.Bye() // the agent powers the machine off
//
// # Frames
//
// A frame is a header of 8 bytes and up to MaxPayload bytes. All numbers are little-endian.
//
//	0  type
//	1  stream: 0 stdin, 1 stdout, 2 stderr; 0 in frames that belong to no stream
//	2  length of the payload, 2 bytes
//	4  CRC-32C of the header before this field, and of the payload
//
//	type     from   payload
//	hello    both   role, 1 byte: 0 agent, 1 host; Version, 2 bytes; build and rung, each a length
//	                of 2 bytes and the text
//	data     both   bytes of a stream
//	window   both   room for this many more bytes of a stream, 4 bytes
//	close    both   none; the sender's end of a stream
//	stop     both   none; the receiver takes no more of a stream
//	signal   host   the number of a signal for the command's process group, 1 byte
//	winsize  host   rows and columns of the terminal, 2 bytes each
//	bye      host   none; the host has taken the exit frame
//	command  host   a part of a command file, for an agent that has none: see Agent.Command; an empty
//	                one ends it
//	started  agent  the process ID of the command, 4 bytes
//	alive    agent  none; sent every AlivePeriod
//	log      agent  a line for the user
//	exit     agent  kind, 1 byte: 0 exited, 1 signaled, 2 not started; status or signal, 1 byte;
//	                text. It ends stdout and stderr.
package wire
