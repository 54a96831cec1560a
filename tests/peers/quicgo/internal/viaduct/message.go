package viaduct

import (
	"crypto/rand"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Operations that the framing and the hub know by name.
const (
	OpHeader    = "header"
	OpKeepalive = "keepalive"
	OpPing      = "ping"
	OpPong      = "pong"
	OpConfig    = "config"
	OpQuery     = "query"
	OpResponse  = "response"
	OpUpload    = "upload"
)

// Message is what the protobuf body can carry of KubeEdge's message: resourceversion, type and
// destination do not survive QUIC. Content is bytes, whatever it was before.
type Message struct {
	ID        string
	Parent    string
	Timestamp int64 // milliseconds since 1970
	Sync      bool

	Source    string
	Group     string
	Operation string
	Resource  string

	Content []byte
}

// NewID returns a random UUID of version 4.
func NewID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, says its documentation
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// NewMessage fills in the id and the time.
func NewMessage(source, group, operation, resource string, content []byte) *Message {
	return &Message{
		ID:        NewID(),
		Timestamp: time.Now().UnixMilli(),
		Source:    source,
		Group:     group,
		Operation: operation,
		Resource:  resource,
		Content:   content,
	}
}

// Reply answers m: the parent is m's id; source, group and resource are copied, not swapped.
func (m *Message) Reply(content []byte) *Message {
	reply := NewMessage(m.Source, m.Group, OpResponse, m.Resource, content)
	reply.Parent = m.ID
	return reply
}

// Field numbers. Message {1 header, 2 router, 3 content}.
const (
	fieldHeader  protowire.Number = 1
	fieldRouter  protowire.Number = 2
	fieldContent protowire.Number = 3

	fieldID        protowire.Number = 1
	fieldParent    protowire.Number = 2
	fieldTimestamp protowire.Number = 3 // sint64, zigzag
	fieldSync      protowire.Number = 4

	fieldSource    protowire.Number = 1
	fieldGroup     protowire.Number = 2
	fieldOperation protowire.Number = 3
	fieldResource  protowire.Number = 4
)

// Marshal encodes m. Both submessages are always there: without one the genuine receiver crashes.
func (m *Message) Marshal() []byte {
	header := appendString(nil, fieldID, m.ID)
	header = appendString(header, fieldParent, m.Parent)
	if m.Timestamp != 0 {
		header = protowire.AppendTag(header, fieldTimestamp, protowire.VarintType)
		header = protowire.AppendVarint(header, protowire.EncodeZigZag(m.Timestamp))
	}
	if m.Sync {
		header = protowire.AppendTag(header, fieldSync, protowire.VarintType)
		header = protowire.AppendVarint(header, 1)
	}

	router := appendString(nil, fieldSource, m.Source)
	router = appendString(router, fieldGroup, m.Group)
	router = appendString(router, fieldOperation, m.Operation)
	router = appendString(router, fieldResource, m.Resource)

	body := appendBytes(nil, fieldHeader, header)
	body = appendBytes(body, fieldRouter, router)
	if len(m.Content) > 0 {
		body = appendBytes(body, fieldContent, m.Content)
	}
	return body
}

func appendBytes(b []byte, field protowire.Number, value []byte) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	return protowire.AppendBytes(b, value)
}

func appendString(b []byte, field protowire.Number, value string) []byte {
	if value == "" {
		return b
	}
	b = protowire.AppendTag(b, field, protowire.BytesType)
	return protowire.AppendString(b, value)
}

// ErrNoSubmessage is a message without header or router, at which the genuine receiver panics.
var ErrNoSubmessage = errors.New("protobuf message without header or router")

// Unmarshal decodes a payload by protobuf's rules: unknown fields and known ones of another wire
// type are skipped, of several the last counts, submessages are merged, strings are UTF-8.
func Unmarshal(payload []byte) (*Message, error) {
	m := new(Message)
	var haveHeader, haveRouter bool
	err := fields(payload, func(field protowire.Number, kind protowire.Type, value []byte) error {
		switch {
		case field == fieldHeader && kind == protowire.BytesType:
			haveHeader = true
			return m.unmarshalHeader(value)
		case field == fieldRouter && kind == protowire.BytesType:
			haveRouter = true
			return m.unmarshalRouter(value)
		case field == fieldContent && kind == protowire.BytesType:
			m.Content = value
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if !haveHeader || !haveRouter {
		return nil, ErrNoSubmessage
	}
	return m, nil
}

func (m *Message) unmarshalHeader(b []byte) error {
	return fields(b, func(field protowire.Number, kind protowire.Type, value []byte) error {
		switch {
		case field == fieldID && kind == protowire.BytesType:
			return setString(&m.ID, value)
		case field == fieldParent && kind == protowire.BytesType:
			return setString(&m.Parent, value)
		case field == fieldTimestamp && kind == protowire.VarintType:
			number, _ := protowire.ConsumeVarint(value)
			m.Timestamp = protowire.DecodeZigZag(number)
		case field == fieldSync && kind == protowire.VarintType:
			number, _ := protowire.ConsumeVarint(value)
			m.Sync = protowire.DecodeBool(number)
		}
		return nil
	})
}

func (m *Message) unmarshalRouter(b []byte) error {
	return fields(b, func(field protowire.Number, kind protowire.Type, value []byte) error {
		if kind != protowire.BytesType {
			return nil
		}
		switch field {
		case fieldSource:
			return setString(&m.Source, value)
		case fieldGroup:
			return setString(&m.Group, value)
		case fieldOperation:
			return setString(&m.Operation, value)
		case fieldResource:
			return setString(&m.Resource, value)
		}
		return nil
	})
}

func setString(target *string, value []byte) error {
	if !utf8.Valid(value) {
		return errors.New("protobuf string that is not UTF-8")
	}
	*target = string(value)
	return nil
}

// fields calls visit for each field. A length-delimited value comes without its length, any other
// as it was encoded.
func fields(b []byte, visit func(protowire.Number, protowire.Type, []byte) error) error {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		n = protowire.ConsumeFieldValue(field, kind, b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		value := b[:n]
		if kind == protowire.BytesType {
			value, _ = protowire.ConsumeBytes(value)
		}
		if err := visit(field, kind, value); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
