package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"edgezmq/quicgo/internal/viaduct"
)

// Reasons for which the hub ends a connection without the node being at fault.
var (
	errDropped  = errors.New("dropped")
	errReplaced = fmt.Errorf("%w: the node connected again", errDropped)
	errSilent   = fmt.Errorf("%w: no keepalive", errDropped)
	errKicked   = fmt.Errorf("%w: told to", errDropped)
)

// attempts is how often an object is sent before the next one has its turn.
const attempts = 5

// A delivery is one message on its way down. Its exported fields are under the hub's lock.
type delivery struct {
	Node     string `json:"node"`
	Attempts int    `json:"attempts"` // times that it was written into a stream as a whole
	Acked    bool   `json:"acked"`

	message *viaduct.Message
	acked   chan struct{} // closed with the ack
}

// session is one connection of one node, served or rejected.
type session struct {
	hub      *hub
	node     string
	number   int
	rejected string // why it gets nothing, empty if it is served
	quic     *quic.Conn
	control  *quic.Stream
	lane     *viaduct.Conn
	alive    chan struct{} // a keepalive came
	plain    *queue        // needs no ack, overtakes the objects
	objects  *queue

	ending context.Context
	end    context.CancelCauseFunc
}

func newSession(h *hub, node string, number int, connection *quic.Conn, control *quic.Stream) *session {
	s := &session{
		hub:     h,
		node:    node,
		number:  number,
		quic:    connection,
		control: control,
		lane:    viaduct.NewConn(connection, viaduct.Options{Rotate: h.rotate}),
		alive:   make(chan struct{}, 1),
		plain:   newQueue(),
		objects: newQueue(),
	}
	s.ending, s.end = context.WithCancelCause(connection.Context())
	return s
}

// run serves the connection until it ends, and returns why. What is queued then is thrown away.
func (s *session) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.end(context.Cause(ctx)) })
	defer stop()
	// Whatever ends the session ends the connection, and with it every read and write of it.
	context.AfterFunc(s.ending, func() { s.quic.CloseWithError(viaduct.CodeClosed, "") })
	var tasks sync.WaitGroup
	start := func(task func() error) {
		tasks.Go(func() { s.end(task()) })
	}
	start(s.answerControl)
	start(func() error { return s.lane.Serve(s.ending, s.handle) })
	if s.rejected == "" {
		start(s.watchKeepalive)
		start(s.sendPlain)
		start(s.sendObjects)
	}
	tasks.Wait()
	return context.Cause(s.ending)
}

// answerControl answers each later package of the control stream with an ack.
func (s *session) answerControl() error {
	for {
		payload, err := viaduct.ReadPackage(s.control)
		if err != nil {
			return fmt.Errorf("control stream: %w", err)
		}
		m, err := viaduct.Unmarshal(payload)
		if err != nil {
			return fmt.Errorf("control stream: %w", err)
		}
		s.hub.receive(s, s.control.StreamID(), m)
		if err := viaduct.WritePackage(s.control, m.Reply([]byte("ack")).Marshal()); err != nil {
			return err
		}
	}
}

// handle takes one message of a message stream.
func (s *session) handle(ctx context.Context, stream quic.StreamID, m *viaduct.Message) error {
	s.hub.receive(s, stream, m)
	switch m.Operation {
	case viaduct.OpPing, viaduct.OpPong, viaduct.OpConfig:
		// The connection layer answers, on rejected connections too.
		return s.lane.Send(ctx, m.Reply([]byte("ack")), s.handle)
	}
	if s.rejected != "" {
		return nil
	}
	switch {
	case m.Operation == viaduct.OpKeepalive:
		select {
		case s.alive <- struct{}{}:
		default: // several at once count as one
		}
	case m.Operation == viaduct.OpResponse:
		s.hub.acked(s.node, m.Parent)
	case m.Operation == viaduct.OpQuery && m.Resource == "k8s/ca.crt":
		answer := viaduct.NewMessage("cloudhub", "resource", viaduct.OpResponse, m.Resource, s.hub.ca)
		answer.Parent = m.ID
		s.plain.put(&delivery{Node: s.node, message: answer})
	}
	return nil
}

func (s *session) watchKeepalive() error {
	timer := time.NewTimer(s.hub.keepalive)
	defer timer.Stop()
	for {
		select {
		case <-s.alive:
			timer.Reset(s.hub.keepalive)
		case <-timer.C:
			return errSilent
		case <-s.ending.Done():
			return nil
		}
	}
}

func (s *session) sendPlain() error {
	for {
		d, err := s.plain.take(s.ending)
		if err != nil {
			return err
		}
		if err := s.send(d); err != nil {
			return err
		}
	}
}

// sendObjects sends one object at a time until it is acked or has had its attempts; then it goes to
// the end of the queue. (A CloudHub also lets a newer version replace a queued one; this one does not.)
func (s *session) sendObjects() error {
	for {
		d, err := s.objects.take(s.ending)
		if err != nil {
			return err
		}
		acked, err := s.sendUntilAcked(d)
		if err != nil {
			return err
		}
		if !acked {
			s.objects.put(d)
		}
	}
}

func (s *session) sendUntilAcked(d *delivery) (bool, error) {
	for range attempts {
		if err := s.send(d); err != nil {
			return false, err
		}
		select {
		case <-d.acked:
			return true, nil
		case <-time.After(s.hub.retry):
		case <-s.ending.Done():
			return false, context.Cause(s.ending)
		}
	}
	return false, nil
}

func (s *session) send(d *delivery) error {
	if err := s.lane.Send(s.ending, d.message, s.handle); err != nil {
		return err
	}
	s.hub.sent(d)
	return nil
}

// writeRaw opens a stream and writes what no CloudHub would. The edge may answer on it: it is read.
func (s *session) writeRaw(text, end string) error {
	data, err := hex.DecodeString(text)
	if err != nil {
		return err
	}
	stream, err := s.quic.OpenStreamSync(s.ending)
	if err != nil {
		return err
	}
	if _, err := stream.Write(data); err != nil {
		return err
	}
	go s.lane.Read(s.ending, stream, s.handle)
	switch end {
	case "fin":
		return stream.Close()
	case "reset":
		time.Sleep(50 * time.Millisecond) // a reset overtakes what is not sent yet
		stream.CancelWrite(7)
	}
	return nil
}

// queue is an unbounded queue: a CloudHub's are, too.
type queue struct {
	mu      sync.Mutex
	waiting []*delivery
	filled  chan struct{}
}

func newQueue() *queue {
	return &queue{filled: make(chan struct{}, 1)}
}

func (q *queue) put(d *delivery) {
	q.mu.Lock()
	q.waiting = append(q.waiting, d)
	q.mu.Unlock()
	select {
	case q.filled <- struct{}{}:
	default:
	}
}

// take waits for the oldest. For one taker.
func (q *queue) take(ctx context.Context) (*delivery, error) {
	for {
		q.mu.Lock()
		if len(q.waiting) > 0 {
			d := q.waiting[0]
			q.waiting = q.waiting[1:]
			q.mu.Unlock()
			return d, nil
		}
		q.mu.Unlock()
		select {
		case <-q.filled:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
