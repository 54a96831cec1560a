// Package emp is a client of EMP/1, the Edge Module Protocol of edgezmq (docs/emp.md). Copy the file into a module of
// your own; it needs ZeroMQ and MessagePack and nothing else.
//
// One goroutine owns the DEALER socket. Each lane's messages are handled one after another, in their order, in a
// goroutine of that lane; requests have one of their own each. Nothing has to be stored: what was sent is kept until
// the broker says that it is settled, and sent again after every reconnect.
package emp

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	zmq "github.com/pebbe/zmq4"
	"github.com/vmihailenco/msgpack/v5"
)

// Priorities of lanes: the class of a message, lower ones first.
const (
	priorityReply   = 0
	PriorityRequest = 1
	PrioritySignal  = 2
	PriorityData    = 3
)

const (
	flagExpectsReply = 1 << iota
	flagReply
	flagResent
	flagRetain
	flagRedelivered
	flagFromStore
)

const (
	helloInterval = 500 * time.Millisecond
	drainTime     = 8 * time.Second
	window        = 4096    // unsettled messages of a lane; the broker's own limit is taken when it is lower
	windowBytes   = 1 << 20 // likewise, before WELCOME has told one
	maxBatch      = 1024    // messages; likewise
	batchBytes    = 1 << 18 // before WELCOME has told a number
	maxFloors     = 1024    // in one PING
	maxBooks      = 4096    // of lanes towards us, and as many senders
	retries       = 2       // of a handler that fails
)

// Errors that end Run.
var (
	ErrFenced = errors.New("emp: a newer process has our name")
	// ErrTooLarge is returned by Send for a message that no broker would take.
	ErrTooLarge = errors.New("emp: the message is larger than the broker allows")
)

// Refused says why a message of ours was not handled, or, returned by a handler, why it will not be.
type Refused struct{ Reason string }

func (r *Refused) Error() string { return "refused: " + r.Reason }

// Message is KubeEdge's message: on the bus an array with these fields in this order.
type Message struct {
	ID              string
	ParentID        string
	Timestamp       int64 // milliseconds since 1970
	Sync            bool
	ResourceVersion string
	Source          string // claimed; Delivery.Sender is vouched for
	Group           string
	Resource        string
	Operation       string
	Kind            string // json, text or bytes: what Content is
	Content         []byte
}

// Delivery is a message for us, and what the broker says of it.
type Delivery struct {
	Message
	Sender       string
	ExpectsReply bool
	Redelivered  bool // it may have been handled before
}

// Handler handles one message. What it returns for a request is the reply's content, of the request's kind. An error
// is tried again twice, then the sender is told `failed`; a *Refused is told at once.
type Handler func(ctx context.Context, delivery *Delivery) ([]byte, error)

// Receipt tells what became of a message of ours.
type Receipt struct {
	settled chan struct{}
	err     error
}

// Wait returns nil once the message was handled, *Refused when it was not.
func (r *Receipt) Wait(ctx context.Context) error {
	select {
	case <-r.settled:
		return r.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Options of a client. Name and Endpoint are needed.
type Options struct {
	Name     string
	Groups   []string
	Endpoint string // Endpoint() finds it as the page says
	Liveness time.Duration
	Handle   Handler // nil: what comes is refused as unroutable
}

// Endpoint is where the bus is, by the environment.
func Endpoint() string {
	if bus := os.Getenv("EDGEZMQ_BUS"); bus != "" {
		return bus
	}
	home := os.Getenv("EDGEZMQ_HOME")
	if home == "" {
		state := os.Getenv("XDG_STATE_HOME")
		if !filepath.IsAbs(state) {
			state = filepath.Join(os.Getenv("HOME"), ".local", "state")
		}
		home = filepath.Join(state, "edgezmq")
	}
	return "ipc://" + filepath.Join(home, "run", "bus.sock")
}

// NewID makes an id for a message (UUID version 4).
func NewID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

type laneKey struct {
	destination string
	priority    int
}

// batch is messages of one lane under one header. It grows until it is sent, and never changes afterwards.
type batch struct {
	first     int64
	flags     int
	requester []byte
	body      []byte     // the messages, without the array around them
	deadline  time.Time  // zero: none
	receipts  []*Receipt // one for each message
	isSent    bool
}

func (b *batch) last() int64 { return b.first + int64(len(b.receipts)) - 1 }

type lane struct {
	key         laneKey
	floor, next int64
	open        []*batch // unsettled, in order; of the first perhaps only the end
	bytes       int      // of them
}

type bookKey struct {
	sender      string // the broker vouches for it; an incarnation others can say too
	incarnation string
	destination string
	priority    int
}

type item struct {
	number   int64
	delivery *Delivery // nil: the body did not hold it
	from     []byte    // the sender's incarnation
	isReply  bool
}

// book is what we know of one lane towards us.
type book struct {
	base, high, done  int64
	finished          map[int64]bool // above done, out of order
	failed            map[int64]string
	session, lane     int64
	sessionHigh, told int64
	queue             []*item
	busy              bool
	isOwed            bool  // an ACK, with those of the others
	used              int64 // the number of the last DELIVER that was for it
}

// waiter is who waits for the reply to one request.
type waiter struct {
	asked  string // only this module's reply counts; empty: a group was asked
	answer chan *Delivery
}

// Client is one module on the bus.
type Client struct {
	options     Options
	incarnation []byte

	mu          sync.Mutex
	room        *sync.Cond
	out         [][][]byte
	unsent      []*lane // with batches to be sent
	owed        []*book
	rung        bool // the goroutine of the DEALER will look
	wake        *zmq.Socket
	attached    bool
	draining    bool
	ended       error
	epoch       string
	session     int64
	generation  int64
	heartbeat   time.Duration
	limits      limits
	nonce       int64
	pinged      time.Time // when the PING went that has no PONG; zero: none
	pingDue     time.Time
	helloDue    time.Time
	takenSince  time.Time
	fresh       time.Time // when the last answered PING was sent
	freshened   *sync.Cond
	lanes       map[laneKey]*lane
	books       map[bookKey]*book
	generations map[string]int64
	delivered   int64 // how many DELIVERs came
	waiters     map[string]waiter
	handlers    sync.WaitGroup
	ctx         context.Context
}

type limits struct{ message, window, windowBytes, batch, batchBytes int }

// New makes a client; Run connects it. Send may be called before.
func New(options Options) *Client {
	if options.Liveness == 0 {
		options.Liveness = 15 * time.Second
	}
	incarnation := make([]byte, 16)
	_, _ = rand.Read(incarnation)
	c := &Client{
		options:     options,
		incarnation: incarnation,
		session:     -1,
		heartbeat:   time.Second,
		limits:      limits{windowBytes, 64, windowBytes, 64, batchBytes},
		lanes:       map[laneKey]*lane{},
		books:       map[bookKey]*book{},
		generations: map[string]int64{},
		waiters:     map[string]waiter{},
	}
	c.room, c.freshened = sync.NewCond(&c.mu), sync.NewCond(&c.mu)
	return c
}

// Run attaches and serves until ctx ends (it then drains) or the broker turns us away.
func (c *Client) Run(ctx context.Context) error {
	own, err := zmq.NewContext()
	if err != nil {
		return err
	}
	defer own.Term() // waits, as long as the sockets linger, until BYE is on its way
	dealer, err := own.NewSocket(zmq.DEALER)
	if err != nil {
		return err
	}
	defer dealer.Close()
	for _, set := range []error{
		dealer.SetImmediate(true), dealer.SetLinger(time.Second), dealer.SetSndhwm(0), dealer.SetRcvhwm(0),
		dealer.SetReconnectIvl(20 * time.Millisecond), dealer.SetReconnectIvlMax(500 * time.Millisecond),
	} {
		if set != nil {
			return set
		}
	}
	// Goroutines wake the one that owns the DEALER through a pair of their own: a socket is for one at a time.
	bell, err := own.NewSocket(zmq.PAIR)
	if err != nil {
		return err
	}
	defer bell.Close()
	name := "inproc://emp-" + hex.EncodeToString(c.incarnation)
	if err := bell.Bind(name); err != nil {
		return err
	}
	wake, err := own.NewSocket(zmq.PAIR)
	if err != nil {
		return err
	}
	defer wake.Close()
	if err := wake.Connect(name); err != nil {
		return err
	}
	if err := dealer.Connect(c.options.Endpoint); err != nil {
		return fmt.Errorf("%s: %w", c.options.Endpoint, err)
	}
	working, stopWorking := context.WithCancel(context.Background())
	c.mu.Lock()
	c.wake, c.ctx = wake, working
	c.mu.Unlock()
	stop := context.AfterFunc(ctx, c.ring)
	defer func() {
		stop()
		stopWorking()
		c.mu.Lock()
		c.wake = nil
		c.mu.Unlock()
	}()
	return c.serve(ctx, dealer, bell)
}

func (c *Client) serve(ctx context.Context, dealer, bell *zmq.Socket) error {
	poller := zmq.NewPoller()
	poller.Add(dealer, zmq.POLLIN)
	poller.Add(bell, zmq.POLLIN)
	var drainUntil time.Time
	for {
		c.mu.Lock()
		now := time.Now()
		c.rung = false
		if ctx.Err() != nil && drainUntil.IsZero() {
			drainUntil = now.Add(drainTime)
			c.draining = true
			c.freshened.Broadcast()
			if c.attached {
				c.put("DRAIN/1", drainTime.Milliseconds())
			}
		}
		if !drainUntil.IsZero() && (c.isDone() || now.After(drainUntil)) {
			if c.attached {
				c.collect()
				c.put("BYE/1", false)
			}
			c.ended = context.Cause(ctx)
		}
		c.keepAttached(now)
		c.collect()
		c.flush(dealer)
		ended := c.ended
		if ended != nil {
			c.release(ended)
		}
		wait := c.untilDue(now)
		c.mu.Unlock()
		if ended != nil {
			if errors.Is(ended, context.Canceled) {
				return nil
			}
			return ended
		}
		ready, err := poller.Poll(wait)
		if err != nil && zmq.AsErrno(err) != zmq.Errno(4) { // EINTR
			return err
		}
		for _, polled := range ready {
			for { // all that is there: before anything is handled (rule 21), and before a PONG is missed
				frames, err := polled.Socket.RecvMessageBytes(zmq.DONTWAIT)
				if err != nil {
					break
				}
				if polled.Socket == dealer {
					c.mu.Lock()
					c.read(frames, time.Now())
					c.mu.Unlock()
				}
			}
		}
	}
}

// Send gives the message to its lane and returns its receipt. It waits for room while the lane's window is full.
func (c *Client) Send(ctx context.Context, to string, priority int, message Message) (*Receipt, error) {
	return c.send(ctx, to, priority, 0, nil, message)
}

// Request sends a question to a module and waits for the answer as long as ctx allows.
func (c *Client) Request(ctx context.Context, to string, message Message) (*Delivery, error) {
	if message.ID == "" {
		message.ID = NewID()
	}
	answer := make(chan *Delivery, 1)
	asked := to
	if strings.HasPrefix(to, "@") {
		asked = ""
	}
	c.mu.Lock()
	c.waiters[message.ID] = waiter{asked, answer} // before the question goes
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiters, message.ID)
		c.mu.Unlock()
	}()
	receipt, err := c.send(ctx, to, PriorityRequest, flagExpectsReply, nil, message)
	if err != nil {
		return nil, err
	}
	settled := receipt.settled
	for {
		select {
		case reply := <-answer:
			return reply, nil
		case <-settled:
			if receipt.err != nil {
				return nil, receipt.err
			}
			settled = nil // handled; the reply may still be under way
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (c *Client) send(ctx context.Context, to string, priority, flags int, requester []byte, message Message) (*Receipt, error) {
	if message.ID == "" {
		message.ID = NewID()
	}
	if message.Timestamp == 0 {
		message.Timestamp = time.Now().UnixMilli()
	}
	if message.Kind == "" {
		message.Kind = "json"
	}
	body, err := encode(&message)
	if err != nil {
		return nil, err
	}
	receipt := &Receipt{settled: make(chan struct{})}
	c.mu.Lock()
	defer c.mu.Unlock()
	key := laneKey{to, priority}
	l := c.lanes[key]
	if l == nil {
		l = &lane{key: key, floor: 1, next: 1}
		c.lanes[key] = l
	}
	isWaiting := false
	for priority != priorityReply && len(l.open) > 0 &&
		(l.next-l.floor >= int64(c.limits.window) || l.bytes+len(body) > c.limits.windowBytes) {
		if c.ended != nil {
			return nil, c.ended
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if !isWaiting {
			isWaiting = true
			stop := context.AfterFunc(ctx, func() {
				c.mu.Lock()
				c.room.Broadcast()
				c.mu.Unlock()
			})
			defer stop()
		}
		c.room.Wait()
	}
	if c.ended != nil {
		return nil, c.ended
	}
	if len(body) > c.limits.message {
		return nil, ErrTooLarge
	}
	var b *batch
	if len(l.open) > 0 {
		b = l.open[len(l.open)-1]
	}
	// Only plain messages share a batch: a header of one tells of requests and replies.
	if b == nil || b.isSent || flags != 0 || b.flags != 0 || len(b.receipts) >= c.limits.batch ||
		len(b.body)+len(body) > c.limits.batchBytes {
		b = &batch{first: l.next, flags: flags, requester: requester}
		if deadline, ok := ctx.Deadline(); ok && flags&flagExpectsReply != 0 {
			b.deadline = deadline
		}
		l.open = append(l.open, b)
		c.unsent = append(c.unsent, l)
	}
	b.body = append(b.body, body...)
	b.receipts = append(b.receipts, receipt)
	l.next++
	l.bytes += len(body)
	if c.attached {
		c.ring2()
	}
	return receipt, nil
}

// --- out; c.mu is held -------------------------------------------------------------------------------

func (c *Client) put(verb string, fields ...any) {
	header, err := msgpack.Marshal(fields)
	if err != nil {
		panic(err) // fields are ours: numbers, strings, bytes
	}
	c.out = append(c.out, [][]byte{[]byte(verb), header})
}

// collect puts the batches that have come together, then the ACKs: a reply goes before the ACK of its request (rule 28).
func (c *Client) collect() {
	if !c.attached {
		return // WELCOME will bring everything
	}
	for _, l := range c.unsent {
		at := len(l.open)
		for at > 0 && !l.open[at-1].isSent {
			at--
		}
		for _, b := range l.open[at:] {
			c.putBatch(l, b)
		}
	}
	c.unsent = c.unsent[:0]
	for _, b := range c.owed {
		b.isOwed = false
		c.acknowledge(b)
	}
	c.owed = c.owed[:0]
}

func (c *Client) owe(b *book) {
	if !b.isOwed {
		b.isOwed = true
		c.owed = append(c.owed, b)
	}
}

func (c *Client) putBatch(l *lane, b *batch) {
	var ttl, requester any
	if !b.deadline.IsZero() {
		ttl = max(time.Until(b.deadline).Milliseconds(), 0)
	}
	if b.requester != nil {
		requester = b.requester
	}
	count := len(b.receipts)
	c.put("SEND/1", l.key.destination, l.key.priority, b.first, count, l.floor, b.flags, ttl, requester)
	body := make([]byte, 0, 3+len(b.body))
	if count < 16 {
		body = append(body, 0x90|byte(count))
	} else {
		body = append(body, 0xdc, byte(count>>8), byte(count))
	}
	c.out[len(c.out)-1] = append(c.out[len(c.out)-1], append(body, b.body...))
	b.isSent = true
	b.flags |= flagResent // if it goes once more
}

func (c *Client) flush(dealer *zmq.Socket) {
	for _, frames := range c.out {
		if _, err := dealer.SendMessageDontwait(frames); err != nil {
			c.attached = false // no connection: WELCOME will bring it again
			break
		}
	}
	c.out = nil
}

func (c *Client) ring() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ring2()
}

func (c *Client) ring2() {
	if c.wake != nil && !c.rung {
		c.rung = true
		_, _ = c.wake.SendBytes(nil, zmq.DONTWAIT)
	}
}

func (c *Client) keepAttached(now time.Time) {
	if c.ended != nil {
		return
	}
	if c.attached && !c.pinged.IsZero() && now.Sub(c.pinged) > c.options.Liveness {
		c.attached = false // no PONG
	}
	if !c.attached {
		if !now.Before(c.helloDue) {
			c.helloDue = now.Add(helloInterval)
			groups := c.options.Groups
			if groups == nil {
				groups = []string{}
			}
			c.put("HELLO/1", c.options.Name, groups, c.incarnation, c.generation,
				c.options.Liveness.Milliseconds(), "go-example", 2048, 8<<20, os.Getpid())
		}
	} else if c.pinged.IsZero() && !now.Before(c.pingDue) {
		c.ping(now)
	}
}

func (c *Client) ping(now time.Time) {
	c.nonce++
	c.pinged, c.pingDue = now, now.Add(c.heartbeat)
	floors := [][]any{}
	for key, l := range c.lanes {
		if len(l.open) == 0 && len(floors) < maxFloors {
			floors = append(floors, []any{key.destination, key.priority, l.next})
		}
	}
	c.put("PING/1", c.nonce, map[string]int{}, floors)
}

func (c *Client) untilDue(now time.Time) time.Duration {
	due := c.helloDue
	if c.attached {
		due = c.pingDue
		if !c.pinged.IsZero() {
			due = c.pinged.Add(c.options.Liveness)
		}
	}
	if c.draining {
		due = now.Add(50 * time.Millisecond)
	}
	return max(due.Sub(now), 0) + time.Millisecond
}

// --- in; c.mu is held --------------------------------------------------------------------------------

func (c *Client) read(frames [][]byte, now time.Time) {
	if len(frames) < 2 {
		return
	}
	h, err := newHeader(frames[1])
	if err != nil {
		log.Printf("emp: %s with a header that cannot be read: %v", frames[0], err)
		return
	}
	switch string(frames[0]) {
	case "WELCOME/1":
		c.onWelcome(h, now)
	case "WHO/1":
		if c.attached {
			c.attached, c.helloDue = false, now
		}
	case "PONG/1":
		if !c.pinged.IsZero() && h.int(0) == c.nonce {
			c.fresh, c.pinged = c.pinged, time.Time{}
			c.freshened.Broadcast()
		}
	case "SETTLED/1":
		c.onSettled(h)
	case "DELIVER/1":
		if len(frames) == 3 {
			c.onDeliver(h, frames[2])
		}
	case "FENCED/1":
		if h.int(0) >= c.generation {
			c.ended = ErrFenced
		}
	case "REFUSED/1":
		c.onRefused(h, now)
	}
}

func (c *Client) onWelcome(h header, now time.Time) {
	epoch, session := string(h.bytes(0)), h.int(1)
	if len(epoch) != 8 || session < 0 || h.int(2) < 1 || h.int(3) < 1 {
		log.Print("emp: a WELCOME that makes no sense")
		return
	}
	if epoch == c.epoch && session <= c.session {
		return // an old one that lay unread
	}
	c.epoch, c.session, c.generation = epoch, session, h.int(2)
	c.heartbeat = min(time.Duration(h.int(3))*time.Millisecond, c.options.Liveness/3)
	c.attached, c.takenSince = true, time.Time{}
	if l := header(h.list(5)); len(l) >= 3 {
		c.limits.message, c.limits.window, c.limits.windowBytes = int(l.int(0)), min(int(l.int(1)), window), int(l.int(2))
		if len(l) >= 5 {
			c.limits.batch, c.limits.batchBytes = min(int(l.int(3)), maxBatch), int(l.int(4))
		}
	}
	c.unsent = c.unsent[:0]
	for _, l := range c.lanes {
		for _, b := range l.open { // everything unsettled, in order (rule 4)
			c.putBatch(l, b)
		}
	}
	if c.draining {
		c.put("DRAIN/1", drainTime.Milliseconds())
	}
	c.ping(now)
	c.room.Broadcast()
}

func (c *Client) onRefused(h header, now time.Time) {
	code := h.str(0)
	if c.attached {
		log.Printf("emp: the broker refused a frame: %s: %s", code, h.str(1))
		return
	}
	switch code {
	case "name-taken":
		if c.takenSince.IsZero() {
			c.takenSince = now
		}
		if now.Sub(c.takenSince) <= c.options.Liveness {
			return // it may be our own predecessor
		}
		fallthrough
	case "denied", "version", "too-many":
		c.ended = fmt.Errorf("emp: the broker does not take us as %q: %s: %s", c.options.Name, code, h.str(1))
	default:
		log.Printf("emp: the broker refused our HELLO: %s: %s", code, h.str(1))
	}
}

func (c *Client) onSettled(h header) {
	l := c.lanes[laneKey{h.str(0), int(h.int(1))}]
	cumulative := h.int(2)
	if l == nil || cumulative < l.floor || cumulative >= l.next {
		return
	}
	refused := map[int64]string{}
	for _, e := range h.list(3) {
		if exception, ok := e.([]any); ok {
			refused[header(exception).int(0)] = header(exception).str(1)
		}
	}
	for ; l.floor <= cumulative; l.floor++ {
		b := l.open[0]
		receipt := b.receipts[l.floor-b.first]
		if reason, ok := refused[l.floor]; ok {
			receipt.err = &Refused{reason}
		}
		close(receipt.settled)
		if l.floor == b.last() { // it stays whole until then
			l.open[0] = nil
			l.open = l.open[1:]
			l.bytes -= len(b.body)
		}
	}
	c.room.Broadcast()
}

func (c *Client) onDeliver(h header, body []byte) {
	session, laneNumber, sender, incarnation := h.int(0), h.int(1), h.str(2), h.bytes(3)
	generation, first, count, from, floor := h.int(4), h.int(7), h.int(8), h.int(9), h.int(10)
	flags := int(h.int(12))
	last := first + count - 1
	if count < 1 || from < first || from > last || floor > from {
		log.Printf("emp: a DELIVER that makes no sense: first %d count %d from %d floor %d", first, count, from, floor)
		return
	}
	key := bookKey{sender, string(incarnation), h.str(5), int(h.int(6))}
	b := c.books[key]
	if b == nil {
		b = &book{base: floor, high: floor - 1, done: floor - 1, finished: map[int64]bool{}, failed: map[int64]string{}}
		known := c.generations[sender]
		counts := flags&(flagReply|flagFromStore) == 0
		if counts && generation < known { // rule 20
			b.high, b.done = last, last
			for number := from; number <= last; number++ {
				b.failed[number] = "fenced"
			}
		} else {
			if counts && generation > known {
				c.forgetOlder(sender, key.incarnation)
				c.generations[sender] = generation
			}
			c.forgetUnused()
			c.books[key] = b
		}
	}
	c.delivered++
	b.used = c.delivered
	for number := range b.failed {
		if number < floor {
			delete(b.failed, number)
		}
	}
	if from > b.high+1 { // rule 15: everything below `from` is known now
		for _, v := range h.list(11) {
			if void, ok := v.([]any); ok {
				if number := header(void).int(0); number > b.high && number < from {
					b.failed[number] = header(void).str(1)
				}
			}
		}
		for number := b.high + 1; number < from; number++ {
			b.finished[number] = true
		}
		b.high = from - 1
		b.advance()
	}
	for number := from; number <= min(last, b.base-1); number++ {
		b.failed[number] = "overtaken"
	}
	if session == c.session {
		if b.session != session || b.lane != laneNumber {
			b.session, b.lane, b.sessionHigh, b.told = session, laneNumber, 0, 0
		}
		b.sessionHigh = max(b.sessionHigh, last)
		b.told = min(b.told, from-1) // duplicates get the same answer again
	}
	messages := decode(body, count)
	for number := max(from, b.high+1); number <= last; number++ {
		i := &item{number: number, from: incarnation, isReply: flags&flagReply != 0}
		if messages != nil {
			i.delivery = &Delivery{messages[number-first], sender, flags&flagExpectsReply != 0, flags&flagRedelivered != 0}
		}
		b.high = number
		switch {
		case i.isReply:
			if i.delivery != nil {
				// Ids can be guessed from earlier ones: a reply of another than was asked is none.
				if w, ok := c.waiters[i.delivery.ParentID]; ok && (w.asked == "" || w.asked == sender) {
					select {
					case w.answer <- i.delivery:
					default: // a second answer: taken and forgotten
					}
				}
			}
			b.finish(number, "")
		case c.draining: // not begun: it goes back to the mailbox
		default:
			c.work(b, i)
		}
	}
	c.owe(b)
}

// forgetOlder drops the books of a sender's earlier processes: the broker delivers a newer one's messages only when all
// of the older ones' were acknowledged (rules 18 and 19).
func (c *Client) forgetOlder(sender, incarnation string) {
	for key, b := range c.books {
		if key.sender == sender && key.incarnation != incarnation && b.isIdle() {
			delete(c.books, key)
		}
	}
}

// forgetUnused makes room for one more book and one more name, those unused longest first. What is forgotten too early
// can lead to a repeat, never to a loss (rule 18).
func (c *Client) forgetUnused() {
	for len(c.books) >= maxBooks {
		var oldest bookKey
		used := int64(math.MaxInt64)
		for key, b := range c.books {
			if b.used < used && b.isIdle() {
				oldest, used = key, b.used
			}
		}
		if used == math.MaxInt64 {
			break // all are in use
		}
		delete(c.books, oldest)
	}
	if len(c.generations) < maxBooks {
		return
	}
	present := map[string]bool{}
	for key := range c.books {
		present[key.sender] = true
	}
	for sender := range c.generations {
		if !present[sender] {
			delete(c.generations, sender)
		}
	}
}

// work has an item handled: a request in a goroutine of its own, others in their order.
func (c *Client) work(b *book, i *item) {
	if i.delivery != nil && i.delivery.ExpectsReply {
		c.handlers.Add(1)
		go func() {
			defer c.handlers.Done()
			c.handle(b, i)
		}()
		return
	}
	b.queue = append(b.queue, i)
	if b.busy {
		return
	}
	b.busy = true
	c.handlers.Add(1)
	go func() {
		defer c.handlers.Done()
		for {
			c.mu.Lock()
			if len(b.queue) == 0 {
				b.busy = false
				c.mu.Unlock()
				return
			}
			next := b.queue[0]
			b.queue = b.queue[1:]
			c.mu.Unlock()
			c.handle(b, next)
		}
	}()
}

func (c *Client) handle(b *book, i *item) {
	c.mu.Lock()
	for c.ended == nil && !c.draining && time.Since(c.fresh) > c.options.Liveness { // rule 21
		c.freshened.Wait()
	}
	stopped := c.ended != nil || c.draining
	ctx := c.ctx
	c.mu.Unlock()
	if stopped {
		return // not begun: the next process gets it
	}
	reason := ""
	switch {
	case i.delivery == nil:
		reason = "invalid"
	case c.options.Handle == nil:
		reason = "unroutable"
	default:
		reason = c.call(ctx, i)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	b.finish(i.number, reason)
	c.owe(b)
	c.ring2()
}

// call runs the handler, again if it fails, and sends the reply before anything is acknowledged (rule 28).
func (c *Client) call(ctx context.Context, i *item) string {
	pause := 100 * time.Millisecond
	for attempt := 0; ; attempt++ {
		content, err := c.options.Handle(ctx, i.delivery)
		var refused *Refused
		switch {
		case err == nil:
			if i.delivery.ExpectsReply && content != nil {
				d := i.delivery
				reply := Message{ParentID: d.ID, Source: d.Source, Group: d.Group, Resource: d.Resource,
					Operation: "response", Kind: d.Kind, Content: content}
				if _, err := c.send(ctx, d.Sender, priorityReply, flagReply, i.from, reply); err != nil {
					log.Printf("emp: no reply to %s: %v", d.Sender, err)
					return "failed"
				}
			}
			return ""
		case errors.As(err, &refused):
			return refused.Reason
		case attempt == retries:
			log.Printf("emp: handling %s of %s failed: %v", i.delivery.Resource, i.delivery.Sender, err)
			return "failed"
		}
		time.Sleep(pause)
		pause *= 5
	}
}

func (c *Client) acknowledge(b *book) {
	done := min(b.done, b.sessionHigh)
	if !c.attached || b.session != c.session || done <= b.told {
		return
	}
	refused := [][]any{}
	for number, reason := range b.failed {
		if number > b.told && number <= done {
			refused = append(refused, []any{number, reason})
		}
	}
	b.told = done
	c.put("ACK/1", c.session, [][]any{{b.lane, done, refused}})
}

func (b *book) finish(number int64, reason string) {
	if reason != "" {
		b.failed[number] = reason
	}
	b.finished[number] = true
	b.advance()
}

// isIdle: all that came has its outcome.
func (b *book) isIdle() bool {
	return b.done == b.high && len(b.queue) == 0
}

func (b *book) advance() {
	for b.finished[b.done+1] {
		b.done++
		delete(b.finished, b.done)
	}
}

// isDone: nothing of ours is unsettled and nothing of others is in hand.
func (c *Client) isDone() bool {
	for _, l := range c.lanes {
		if len(l.open) > 0 {
			return false
		}
	}
	for _, b := range c.books {
		if b.busy && len(b.queue) > 0 {
			return false
		}
	}
	return true
}

// release wakes everybody who waits for something that will not come.
func (c *Client) release(why error) {
	for _, l := range c.lanes {
		for _, b := range l.open {
			for _, receipt := range b.receipts[max(l.floor-b.first, 0):] {
				receipt.err = why
				close(receipt.settled)
			}
		}
		l.open, l.floor = nil, l.next
	}
	c.room.Broadcast()
	c.freshened.Broadcast()
}

// --- bodies ------------------------------------------------------------------------------------------

func encode(m *Message) ([]byte, error) {
	return msgpack.Marshal([]any{m.ID, m.ParentID, m.Timestamp, m.Sync, m.ResourceVersion, m.Source, m.Group,
		m.Resource, m.Operation, m.Kind, m.Content})
}

// decode returns nil for a body that is no array of count messages. Fields may be missing at the end, or be new to us.
func decode(body []byte, count int64) []Message {
	var arrays [][]any
	if err := msgpack.Unmarshal(body, &arrays); err != nil || int64(len(arrays)) != count {
		return nil
	}
	messages := make([]Message, len(arrays))
	for i, fields := range arrays {
		h := header(fields)
		sync, _ := h.at(3).(bool)
		messages[i] = Message{h.str(0), h.str(1), h.int(2), sync, h.str(4), h.str(5), h.str(6), h.str(7), h.str(8),
			h.str(9), h.bytes(10)}
	}
	return messages
}

// --- headers -----------------------------------------------------------------------------------------

// header is an array of MessagePack, read by position. Fields that are missing are zero: trailing ones may be.
type header []any

func newHeader(data []byte) (header, error) {
	var h []any
	if err := msgpack.Unmarshal(data, &h); err != nil {
		return nil, err
	}
	return h, nil
}

func (h header) at(i int) any {
	if i < len(h) {
		return h[i]
	}
	return nil
}

func (h header) int(i int) int64 {
	switch n := h.at(i).(type) {
	case int8:
		return int64(n)
	case uint8:
		return int64(n)
	case int16:
		return int64(n)
	case uint16:
		return int64(n)
	case int32:
		return int64(n)
	case uint32:
		return int64(n)
	case int64:
		return n
	case uint64:
		return int64(n)
	}
	return 0
}

func (h header) str(i int) string {
	s, _ := h.at(i).(string)
	return s
}

func (h header) bytes(i int) []byte {
	b, _ := h.at(i).([]byte)
	return b
}

func (h header) list(i int) []any {
	l, _ := h.at(i).([]any)
	return l
}
