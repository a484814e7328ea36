package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"runtime"

	"gvm/panics"
	"gvm/vmm/boot"
)

// The format of .xz files has blocks that can be decompressed apart: dpkg writes many, since it
// compresses with several threads (https://tukaani.org/xz/xz-file-format.txt).
const (
	xzMagic   = "\xfd7zXZ\x00"
	xzHeader  = 12
	maxBlock  = 64 << 20 // of decompressed data: larger blocks are decompressed in one thread
	maxBlocks = 1 << 16
	// maxThreads bounds the blocks in memory.
	maxThreads = 8
	maxIndex   = 1 << 20
)

// xzBlock is a block of a stream.
type xzBlock struct {
	off, size, unpadded int64 // in the file; with and without padding
	length              int64 // of the data
}

// xzBlocks returns the blocks of a file that is one .xz stream, and the stream's header; nil if it
// is not, or its blocks are too large, too many or one alone. It checks all of the index and the
// footer, as no decoder of a block sees them: a damaged file is for one decoder to refuse.
func xzBlocks(r io.ReaderAt, size int64) (blocks []xzBlock, header []byte) {
	header, footer := make([]byte, xzHeader), make([]byte, xzHeader)
	if size < 2*xzHeader {
		return nil, nil
	}
	for off, b := range map[int64][]byte{0: header, size - xzHeader: footer} {
		if n, _ := r.ReadAt(b, off); n < len(b) {
			return nil, nil
		}
	}
	le := binary.LittleEndian
	indexSize := (int64(le.Uint32(footer[4:])) + 1) * 4
	if string(header[:6]) != xzMagic || string(footer[10:]) != "YZ" || string(header[6:8]) != string(footer[8:10]) ||
		crc32.ChecksumIEEE(footer[4:10]) != le.Uint32(footer) || indexSize > min(maxIndex, size-2*xzHeader) {
		return nil, nil
	}
	index := make([]byte, indexSize)
	if n, _ := r.ReadAt(index, size-xzHeader-indexSize); n < len(index) || index[0] != 0 ||
		crc32.ChecksumIEEE(index[:indexSize-4]) != le.Uint32(index[indexSize-4:]) {
		return nil, nil
	}
	rest := index[1 : indexSize-4]
	number := func() int64 {
		v, n := binary.Uvarint(rest)
		if n <= 0 || v > 1<<62 || n > 1 && rest[n-1] == 0 { // a zero more than it needs
			rest = nil
			return -1
		}
		rest = rest[n:]
		return int64(v)
	}
	n, off := number(), int64(xzHeader)
	if n < 2 || n > maxBlocks {
		return nil, nil
	}
	for range n {
		b := xzBlock{off: off, unpadded: number(), length: number()}
		if b.unpadded < 1 || b.unpadded > size || b.length < 0 || b.length > maxBlock {
			return nil, nil
		}
		b.size = (b.unpadded + 3) &^ 3
		off += b.size
		blocks = append(blocks, b)
	}
	if len(rest) > 3 || len(bytes.Trim(rest, "\x00")) > 0 { // padding
		return nil, nil
	}
	if off+indexSize+xzHeader != size {
		return nil, nil
	}
	return blocks, header
}

// stream returns a block as a stream of its own.
func (b xzBlock) stream(r io.ReaderAt, header []byte) io.Reader {
	index := binary.AppendUvarint(binary.AppendUvarint([]byte{0, 1}, uint64(b.unpadded)), uint64(b.length))
	index = append(index, make([]byte, -len(index)&3)...)
	le := binary.LittleEndian
	index = le.AppendUint32(index, crc32.ChecksumIEEE(index))
	end := append(le.AppendUint32(nil, uint32(len(index)/4-1)), header[6:8]...)
	index = append(append(le.AppendUint32(index, crc32.ChecksumIEEE(end)), end...), "YZ"...)
	return io.MultiReader(bytes.NewReader(header), io.NewSectionReader(r, b.off, b.size), bytes.NewReader(index))
}

// decode decompresses a block.
func (b xzBlock) decode(ctx context.Context, r io.ReaderAt, header []byte) ([]byte, error) {
	d, err := boot.Decompress(b.stream(r, header))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	u := &unpacked{ctx, d, b.length + 1}
	data := bytes.NewBuffer(make([]byte, 0, b.length+bytes.MinRead))
	n, err := data.ReadFrom(u)
	if err == nil && n != b.length {
		err = fmt.Errorf("a block that should have %d bytes has %d", b.length, n)
	}
	if err != nil {
		return nil, err
	}
	return data.Bytes(), nil
}

// parallel is the data of blocks that several threads decompress.
type parallel struct {
	ctx     context.Context
	cancel  context.CancelFunc
	file    io.ReaderAt
	header  []byte
	blocks  []xzBlock
	results []chan decoded // of one result each
	next    int            // block to read
	ahead   int            // blocks from there that are decompressed or being so
	data    []byte         // the rest of the block before
	err     error
}

type decoded struct {
	data []byte
	err  error
}

// newParallel returns the data of a file of blocks.
func newParallel(ctx context.Context, file io.ReaderAt, blocks []xzBlock, header []byte) *parallel {
	p := &parallel{file: file, header: header, blocks: blocks}
	p.ctx, p.cancel = context.WithCancel(ctx)
	for range blocks {
		p.results = append(p.results, make(chan decoded, 1))
	}
	return p
}

// start starts to decompress blocks, one for each thread.
func (p *parallel) start() {
	for threads := min(runtime.GOMAXPROCS(0), maxThreads); p.ahead < threads; p.ahead++ {
		i := p.next + p.ahead
		if i == len(p.blocks) {
			return
		}
		panics.Go(func() {
			data, err := p.blocks[i].decode(p.ctx, p.file, p.header)
			p.results[i] <- decoded{data, err}
		})
	}
}

// take waits for the next block.
func (p *parallel) take() decoded {
	d := <-p.results[p.next]
	p.next++
	p.ahead--
	return d
}

func (p *parallel) Read(b []byte) (int, error) {
	for len(p.data) == 0 && p.err == nil {
		if p.start(); p.ahead == 0 {
			p.err = io.EOF
			break
		}
		d := p.take() // decode ends with the context
		p.data, p.err = d.data, d.err
	}
	if len(p.data) == 0 {
		return 0, p.err
	}
	n := copy(b, p.data)
	p.data = p.data[n:]
	return n, nil
}

// Close ends the threads, which stop within a piece of a block, and waits for them.
func (p *parallel) Close() error {
	for p.cancel(); p.ahead > 0; {
		p.take()
	}
	return nil
}
