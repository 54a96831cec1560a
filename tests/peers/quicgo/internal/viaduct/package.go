// Package viaduct is the framing that KubeEdge lays over QUIC streams, written from
// docs/cloudlink.md alone and from nothing that the Python side of this repository uses: it is
// there to disagree with it.
//
// A connection has one control stream, the first one its client opens, and any number of message
// streams, opened by either side, each begun once by its opener with three bytes of use type.
// Both carry packages: ten bytes of header, then one protobuf message.
package viaduct

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	// MaxPayload is the largest payload of a package, in bytes. Both sides refuse more.
	MaxPayload = 33554432

	headerSize  = 10
	typeMessage = 1
)

// version is what a writer puts into the first four bytes; a reader does not look at it.
var version = [4]byte{1, 1, 1, 0}

// A SizeError is a payload length above MaxPayload.
type SizeError uint32

func (e SizeError) Error() string {
	return fmt.Sprintf("payload length %d exceeds maximum %d", uint32(e), MaxPayload)
}

// WritePackage writes one package in two writes, header and payload, as the genuine packer does:
// a reader that expects them to arrive together is wrong.
func WritePackage(w io.Writer, payload []byte) error {
	if len(payload) > MaxPayload {
		return SizeError(len(payload))
	}
	var header [headerSize]byte
	copy(header[:], version[:])
	header[4] = typeMessage
	binary.BigEndian.PutUint32(header[6:], uint32(len(payload)))
	if _, err := w.Write(header[:]); err != nil {
		return err
	}
	_, err := w.Write(payload)
	return err
}

// ReadPackage returns the payload of the next package. It looks at the length only, as the genuine
// reader does. The error is io.EOF only between packages; a package cut short is io.ErrUnexpectedEOF.
func ReadPackage(r io.Reader) ([]byte, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[6:])
	if size > MaxPayload {
		return nil, SizeError(size)
	}
	// Grows with what really comes: a length alone must not cost 32 MiB.
	payload, err := io.ReadAll(io.LimitReader(r, int64(size)))
	if err != nil {
		return nil, err
	}
	if len(payload) < int(size) {
		return nil, io.ErrUnexpectedEOF
	}
	return payload, nil
}
