// The Go module of a chaos node (docs/chaos.md): it sends numbered messages to its fellow in C and to the cloud, asks
// it, answers, and handles what comes.
//
//	go-module NAME FELLOW KIND
//
// KIND is its word in the tokens of its messages. What it knows is written into files outside of the node
// (CHAOS_RECORD), one line a fact, with one write: what is in the file survives the death of the process.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"edgezmq.example/go/emp"
)

const (
	liveness    = 3 * time.Second
	tick        = 20 * time.Millisecond
	look        = 200 * time.Millisecond
	mostDue     = 20.0
	askFor      = 30 * time.Second
	mixedRateAt = 2 // place in the file `rates`
)

// module is one process of the Go module.
type module struct {
	name, fellow, kind string
	client             *emp.Client
	directory          string
	generation         int
	sent, handled      *os.File
}

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	m, err := newModule(os.Args[1], os.Args[2], os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	m.client = emp.New(emp.Options{Name: m.name, Endpoint: emp.Endpoint(), Liveness: liveness, Handle: m.handle})
	// A lane that has no room must not hold up the others.
	go m.make(ctx, "k", m.keep)
	go m.make(ctx, "m", m.upload)
	go m.make(ctx, "q", m.ask)
	if err := m.client.Run(ctx); err != nil {
		log.Print(err)
		if errors.Is(err, emp.ErrFenced) {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

func newModule(name, fellow, kind string) (*module, error) {
	m := &module{name: name, fellow: fellow, kind: kind, directory: os.Getenv("CHAOS_RECORD")}
	for _, record := range []struct {
		file *(*os.File)
		name string
	}{{&m.sent, name}, {&m.handled, name + ".handled"}} {
		file, err := os.OpenFile(filepath.Join(m.directory, record.name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, err
		}
		*record.file = file
	}
	text, err := os.ReadFile(m.sent.Name())
	if err != nil {
		return nil, err
	}
	// Numbers never come again: each process counts in a generation of its own.
	m.generation = strings.Count(string(text), "G ")
	return m, write(m.sent, "G %s %d", kind, m.generation)
}

func write(file *os.File, format string, values ...any) error {
	_, err := fmt.Fprintf(file, format+"\n", values...) // one write
	return err
}

// seconds of the machine's monotonic clock, which all processes of a run share.
func seconds() float64 {
	const monotonic = 1
	var now syscall.Timespec
	_, _, _ = syscall.Syscall(syscall.SYS_CLOCK_GETTIME, monotonic, uintptr(unsafe.Pointer(&now)), 0)
	return float64(now.Sec) + float64(now.Nsec)/1e9
}

func (m *module) handle(_ context.Context, d *emp.Delivery) ([]byte, error) {
	if d.ExpectsReply {
		return d.Content, nil
	}
	marked := 0
	if d.Redelivered {
		marked = 1
	}
	return nil, write(m.handled, "H %s %d %d %.4f", d.Content, marked, os.Getpid(), seconds())
}

// make calls send as often as the file `rates` says, until ctx ends.
func (m *module) make(ctx context.Context, flow string, send func(context.Context, string)) {
	var rate, due float64
	var looked time.Time
	last := time.Now()
	number := 0
	for ctx.Err() == nil {
		time.Sleep(tick)
		now := time.Now()
		if now.Sub(looked) > look {
			looked = now
			rate = m.rate(rate)
		}
		due = min(due+rate*now.Sub(last).Seconds(), mostDue)
		last = now
		for ; due >= 1 && ctx.Err() == nil; due-- {
			number++
			token := fmt.Sprintf("%s.%s.%d.%d.", flow, m.kind, m.generation, number)
			// Before it is sent: nobody may get what is not in the file.
			if err := write(m.sent, "S %s %.4f", token, seconds()); err != nil {
				log.Fatal(err)
			}
			send(ctx, token)
		}
	}
}

func (m *module) rate(last float64) float64 {
	text, err := os.ReadFile(filepath.Join(m.directory, "rates"))
	words := strings.Fields(string(text))
	if err != nil || len(words) <= mixedRateAt {
		return last
	}
	rate, err := strconv.ParseFloat(words[mixedRateAt], 64)
	if err != nil {
		return last
	}
	return rate
}

func (m *module) keep(ctx context.Context, token string) {
	m.send(ctx, token, m.fellow, emp.Message{Resource: "chaos/keep", Operation: "keep", Kind: "text", Content: []byte(token)})
}

func (m *module) upload(ctx context.Context, token string) {
	content := fmt.Sprintf(`{"t": "%s"}`, token)
	m.send(ctx, token, "@hub", emp.Message{Resource: "default/chaos/1", Operation: "upload", Content: []byte(content)})
}

// send writes the receipt down: only then the message counts as accepted.
func (m *module) send(ctx context.Context, token, to string, message emp.Message) {
	message.Source, message.Group = m.name, "user"
	receipt, err := m.client.Send(ctx, to, emp.PriorityData, message)
	if err != nil {
		return // the process ends
	}
	go func() {
		m.settle(token, receipt.Wait(context.Background()))
	}()
}

func (m *module) settle(token string, err error) {
	var refused *emp.Refused
	word := "R"
	if errors.As(err, &refused) {
		word = "X:" + refused.Reason
	} else if err != nil {
		return // the process ends, and nobody knows what became of it
	}
	if err := write(m.sent, "%s %s %.4f", word, token, seconds()); err != nil {
		log.Fatal(err)
	}
}

// ask has the fellow answer, and writes down the answer, or that none came in its time.
func (m *module) ask(_ context.Context, token string) {
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), askFor)
		defer cancel()
		question := emp.Message{Source: m.name, Group: "user", Resource: "chaos/ask", Operation: "ask", Kind: "text",
			Content: []byte(token)}
		answer, err := m.client.Request(ctx, m.fellow, question)
		word := "A"
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			word = "T"
		case err != nil:
			m.settle(token, err)
			return
		case string(answer.Content) != token:
			word = "T" // another's answer is none
		}
		if err := write(m.sent, "%s %s %.4f", word, token, seconds()); err != nil {
			log.Fatal(err)
		}
	}()
}
