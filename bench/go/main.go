// One side of the one → one benchmark, in Go on the client of examples/go:
//
//	bench ROLE ENDPOINT COUNT SIZE PER_SECOND WARM_UP      ROLE: sender, receiver, requester, responder
//
// The talk with the bench is that of bench/worker.py: {"ready": true}, a line to begin, one line of result, and the end
// when standard input ends. PER_SECOND 0: as fast as the window allows, else so many messages a second.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log"
	"os"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"edgezmq.example/go/emp"
)

const (
	sink        = "bench-sink"
	numberBytes = 8
	stampBytes  = 8
	clockMono   = 1 // CLOCK_MONOTONIC of Linux, which the two sides share
	waitTime    = 120 * time.Second
)

type work struct {
	role                           string
	count, size, perSecond, warmUp int
	received, expected, skips      int
	tookMicros                     []float64
	last                           int64
	finished                       chan struct{}
}

func monotonic() int64 {
	var now syscall.Timespec
	_, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockMono, uintptr(unsafe.Pointer(&now)), 0)
	if errno != 0 {
		log.Fatal(errno)
	}
	return now.Nano()
}

func cpuSeconds() float64 {
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		log.Fatal(err)
	}
	return float64(used.Utime.Nano()+used.Stime.Nano()) / 1e9
}

func say(values map[string]any) {
	if err := json.NewEncoder(os.Stdout).Encode(values); err != nil {
		log.Fatal(err)
	}
}

func number(text string) int {
	value, err := strconv.Atoi(text)
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 7 {
		log.Fatal("expected ROLE ENDPOINT COUNT SIZE PER_SECOND WARM_UP")
	}
	w := &work{role: os.Args[1], count: number(os.Args[3]), size: number(os.Args[4]), perSecond: number(os.Args[5]),
		warmUp: number(os.Args[6]), finished: make(chan struct{})}
	if w.size < numberBytes+stampBytes {
		log.Fatal("the size is too small")
	}
	options := emp.Options{Name: "bench-" + w.role, Endpoint: os.Args[2], Handle: w.take}
	if w.role == "receiver" || w.role == "responder" {
		options.Name = sink
	}
	client := emp.New(options)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- client.Run(ctx) }()
	time.AfterFunc(waitTime, func() { log.Fatal("took too long") })
	attached(ctx, client)
	say(map[string]any{"ready": true})
	input := bufio.NewScanner(os.Stdin)
	if w.role != "responder" {
		input.Scan()
		cpu := cpuSeconds()
		result := w.run(ctx, client)
		result["cpu_seconds"] = cpuSeconds() - cpu
		say(result)
	}
	for input.Scan() {
	}
	stop()
	if err := <-ended; err != nil {
		log.Fatal(err)
	}
}

// attached returns once the broker answers: here by refusing a question to nobody.
func attached(ctx context.Context, client *emp.Client) {
	var refused *emp.Refused
	if _, err := client.Request(ctx, "bench-nobody", emp.Message{Operation: "query"}); !errors.As(err, &refused) {
		log.Fatalf("a question to nobody: %v, expected a refusal", err)
	}
}

func (w *work) take(_ context.Context, d *emp.Delivery) ([]byte, error) {
	if w.role == "responder" {
		return d.Content, nil
	}
	if len(d.Content) < numberBytes+stampBytes {
		return nil, &emp.Refused{Reason: "invalid"}
	}
	if got := int(binary.BigEndian.Uint64(d.Content)); got != w.expected {
		w.skips++
		w.expected = got
	}
	w.expected++
	if w.perSecond > 0 {
		sent := int64(binary.BigEndian.Uint64(d.Content[numberBytes:]))
		w.tookMicros = append(w.tookMicros, float64(monotonic()-sent)/1000)
	}
	if w.received++; w.received == w.count {
		w.last = monotonic()
		close(w.finished)
	}
	return nil, nil
}

func (w *work) run(ctx context.Context, client *emp.Client) map[string]any {
	switch w.role {
	case "sender":
		return w.send(ctx, client)
	case "receiver":
		<-w.finished
		result := map[string]any{"received": w.received, "skips": w.skips, "last_ns": w.last}
		if w.perSecond > 0 {
			result["took_us"] = w.tookMicros
		}
		return result
	case "requester":
		return w.request(ctx, client)
	}
	log.Fatalf("no role %q", w.role)
	return nil
}

func (w *work) message(number int) emp.Message {
	content := bytes.Repeat([]byte{'x'}, w.size)
	binary.BigEndian.PutUint64(content, uint64(number))
	if w.perSecond > 0 {
		binary.BigEndian.PutUint64(content[numberBytes:], uint64(monotonic()))
	}
	return emp.Message{Source: "bench", Resource: "bench", Operation: "update", Kind: "bytes", Content: content}
}

func (w *work) send(ctx context.Context, client *emp.Client) map[string]any {
	receipts := make(chan *emp.Receipt, 1<<16)
	confirmed := make(chan int)
	go func() {
		settled := 0
		for receipt := range receipts {
			if err := receipt.Wait(ctx); err != nil {
				log.Fatal(err)
			}
			settled++
		}
		confirmed <- settled
	}()
	started, began := monotonic(), time.Now()
	for number := 0; number < w.count; number++ {
		if w.perSecond > 0 {
			time.Sleep(time.Until(began.Add(time.Duration(number) * time.Second / time.Duration(w.perSecond))))
		}
		receipt, err := client.Send(ctx, sink, emp.PriorityData, w.message(number))
		if err != nil {
			log.Fatal(err)
		}
		receipts <- receipt
	}
	close(receipts)
	settled := <-confirmed
	return map[string]any{"started_ns": started, "finished_ns": monotonic(), "confirmed": settled}
}

func (w *work) request(ctx context.Context, client *emp.Client) map[string]any {
	took := make([]float64, 0, w.count)
	for number := 0; number < w.warmUp+w.count; number++ {
		question := w.message(number)
		before := time.Now()
		limited, done := context.WithTimeout(ctx, 10*time.Second)
		reply, err := client.Request(limited, sink, question)
		done()
		if err != nil || !bytes.Equal(reply.Content, question.Content) {
			log.Fatalf("request %d: %v, or another payload", number, err)
		}
		if number >= w.warmUp {
			took = append(took, float64(time.Since(before).Nanoseconds())/1000)
		}
	}
	return map[string]any{"took_us": took}
}
