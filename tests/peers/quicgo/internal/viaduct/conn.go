package viaduct

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/quic-go/quic-go"
)

// Use types: what the opener of a stream writes into it first.
const (
	useMessages = "msg"
	useRaw      = "str"
)

// maxStreams is how many message streams there may be for a sender to open one more; else it waits
// for an idle one.
const maxStreams = 99

// Handler is given each message with the number of the stream it came on. Messages of one stream
// come one after another, those of several streams at the same time. An error ends the connection.
type Handler func(ctx context.Context, stream quic.StreamID, m *Message) error

// Conn sends and receives messages over one QUIC connection, on either side of it.
type Conn struct {
	quic    *quic.Conn
	gate    Gate
	options Options

	mu      sync.Mutex
	known   map[*quic.Stream]struct{} // the message streams that live, idle or not
	idle    []*quic.Stream
	opening int           // streams that are being opened here
	changed chan struct{} // closed and replaced when a stream becomes idle or is forgotten
}

// Options say which stream a sender takes. By default it is the idle one that was used last.
type Options struct {
	Rotate bool // the one that has been idle for longest
	Single bool // always the same, opened here: then the order of sending is the order of arriving
}

// NewConn wraps a connection whose control stream is opened or accepted by the caller.
func NewConn(connection *quic.Conn, options Options) *Conn {
	return &Conn{
		quic:    connection,
		options: options,
		known:   make(map[*quic.Stream]struct{}),
		changed: make(chan struct{}),
	}
}

// Gate lets its holder stop all reading of a connection, so that flow control fills up.
func (c *Conn) Gate() *Gate { return &c.gate }

// Reader is stream behind the gate.
func (c *Conn) Reader(stream *quic.Stream) io.Reader {
	return gatedReader{stream: stream, gate: &c.gate, done: c.quic.Context().Done()}
}

// Streams is the number of message streams.
func (c *Conn) Streams() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.known)
}

// Serve accepts the peer's streams and reads them until the connection ends or ctx is done; it
// returns the reason, never nil. Only after the control stream has been accepted or opened.
func (c *Conn) Serve(ctx context.Context, handle Handler) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel(nil)
	for {
		stream, err := c.quic.AcceptStream(ctx)
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return err
		}
		readers.Go(func() {
			if err := c.serveStream(ctx, stream, handle); err != nil {
				cancel(err)
			}
		})
	}
}

// serveStream returns nil when the peer ended the stream, which leaves the others alone.
func (c *Conn) serveStream(ctx context.Context, stream *quic.Stream, handle Handler) error {
	var use [len(useMessages)]byte
	if _, err := io.ReadFull(c.Reader(stream), use[:]); err != nil {
		return nil // opened and given up before it said what for
	}
	switch string(use[:]) {
	case useMessages:
	case useRaw:
		_, err := io.Copy(io.Discard, c.Reader(stream))
		return ignoreReset(err)
	default:
		return fmt.Errorf("stream %d begins with %q", stream.StreamID(), use)
	}
	c.add(stream)
	return c.readMessages(ctx, stream, handle)
}

func (c *Conn) readMessages(ctx context.Context, stream *quic.Stream, handle Handler) error {
	reader := c.Reader(stream)
	for {
		payload, err := ReadPackage(reader)
		if err == io.EOF {
			c.forget(stream)
			stream.Close()
			return nil
		}
		if err != nil {
			c.forget(stream)
			return ignoreReset(err)
		}
		m, err := Unmarshal(payload)
		if err != nil {
			return fmt.Errorf("stream %d: %w", stream.StreamID(), err)
		}
		if err := handle(ctx, stream.StreamID(), m); err != nil {
			return err
		}
	}
}

// ignoreReset drops the error of a stream that its peer reset: the connection lives on.
func ignoreReset(err error) error {
	var reset *quic.StreamError
	if errors.As(err, &reset) && reset.Remote {
		return nil
	}
	return err
}

// Send writes m on an idle message stream, whoever opened it; without one it opens a new one, or
// waits when there are too many. handle reads what comes back on a stream opened here.
func (c *Conn) Send(ctx context.Context, m *Message, handle Handler) error {
	stream, err := c.take(ctx, handle)
	if err != nil {
		return err
	}
	if err := WritePackage(stream, m.Marshal()); err != nil {
		c.forget(stream)
		return err
	}
	c.release(stream)
	return nil
}

// Open begins one more message stream and leaves it idle.
func (c *Conn) Open(ctx context.Context, handle Handler) error {
	c.mu.Lock()
	c.opening++
	c.mu.Unlock()
	stream, err := c.open(ctx, handle)
	if err != nil {
		return err
	}
	c.release(stream)
	return nil
}

func (c *Conn) take(ctx context.Context, handle Handler) (*quic.Stream, error) {
	limit := maxStreams
	if c.options.Single {
		limit = 1
	}
	for {
		c.mu.Lock()
		if n := len(c.idle); n > 0 {
			at := n - 1
			if c.options.Rotate {
				at = 0
			}
			stream := c.idle[at]
			c.idle = slices.Delete(c.idle, at, at+1)
			c.mu.Unlock()
			return stream, nil
		}
		if len(c.known)+c.opening < limit {
			c.opening++
			c.mu.Unlock()
			return c.open(ctx, handle)
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-c.quic.Context().Done():
			return nil, context.Cause(c.quic.Context())
		}
	}
}

// open returns a new stream that is not idle yet. The caller has counted it in c.opening.
func (c *Conn) open(ctx context.Context, handle Handler) (*quic.Stream, error) {
	stream, err := c.begin(ctx)
	c.mu.Lock()
	c.opening--
	if err == nil {
		c.known[stream] = struct{}{}
	}
	c.wake()
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	go c.Read(ctx, stream, handle)
	return stream, nil
}

// Read reads the messages that come on a stream opened here, until it ends. An error ends the connection.
func (c *Conn) Read(ctx context.Context, stream *quic.Stream, handle Handler) {
	if err := c.readMessages(ctx, stream, handle); err != nil {
		c.quic.CloseWithError(CodeProtocol, err.Error()) // without effect if it is closed already
	}
}

func (c *Conn) begin(ctx context.Context) (*quic.Stream, error) {
	stream, err := c.quic.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	_, err = io.WriteString(stream, useMessages)
	return stream, err
}

// add makes a stream of the peer's known and idle.
func (c *Conn) add(stream *quic.Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.options.Single {
		return
	}
	c.known[stream] = struct{}{}
	c.idle = append(c.idle, stream)
	c.wake()
}

// release makes a stream idle again, unless it ended in the meantime.
func (c *Conn) release(stream *quic.Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, lives := c.known[stream]; lives {
		c.idle = append(c.idle, stream)
		c.wake()
	}
}

func (c *Conn) forget(stream *quic.Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.known, stream)
	c.idle = slices.DeleteFunc(c.idle, func(each *quic.Stream) bool { return each == stream })
	c.wake()
}

func (c *Conn) wake() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// Application error codes of a close. KubeEdge defines none.
const (
	CodeClosed   quic.ApplicationErrorCode = 0
	CodeProtocol quic.ApplicationErrorCode = 1
)

// A Gate is open until it is shut. Its zero value is an open gate.
type Gate struct {
	mu   sync.Mutex
	shut chan struct{} // nil while open, closed on opening
}

// Set shuts or opens the gate.
func (g *Gate) Set(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case shut && g.shut == nil:
		g.shut = make(chan struct{})
	case !shut && g.shut != nil:
		close(g.shut)
		g.shut = nil
	}
}

// wait returns once the gate is open, or done is closed.
func (g *Gate) wait(done <-chan struct{}) {
	g.mu.Lock()
	shut := g.shut
	g.mu.Unlock()
	if shut == nil {
		return
	}
	select {
	case <-shut:
	case <-done:
	}
}

type gatedReader struct {
	stream *quic.Stream
	gate   *Gate
	done   <-chan struct{}
}

func (r gatedReader) Read(p []byte) (int, error) {
	// A Read that is already under way when the gate shuts still returns what it gets.
	r.gate.wait(r.done)
	return r.stream.Read(p)
}
