// A module of an edgezmq node, in Go: it answers requests with what it was asked, and uploads a reading now and then.
//
//	edgezmq send go-example -r anything --content '{"x": 1}' --request
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"edgezmq.example/go/emp"
)

const name = "go-example"

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	client := emp.New(emp.Options{Name: name, Endpoint: emp.Endpoint(), Handle: echo})
	go upload(ctx, client)
	if err := client.Run(ctx); err != nil {
		log.Print(err)
		if errors.Is(err, emp.ErrFenced) {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

// echo answers a request with what it was asked. Other messages are taken and that is that.
func echo(_ context.Context, d *emp.Delivery) ([]byte, error) {
	return d.Content, nil
}

// upload sends a reading to the cloud every UPLOAD_SECONDS. Send waits while the lane's window is full, so nothing is
// left out when the broker or the cloud is away for long: readings are made when there is room for them.
func upload(ctx context.Context, client *emp.Client) {
	tick := time.NewTicker(interval())
	defer tick.Stop()
	for number := 1; ; number++ {
		receipt, err := client.Send(ctx, "@hub", emp.PriorityData, emp.Message{
			Source:    name,
			Group:     "user",
			Resource:  "default/go-example/reading",
			Operation: "upload",
			Content:   []byte(fmt.Sprintf(`{"number": %d}`, number)),
		})
		if err != nil {
			return
		}
		go func() {
			if err := receipt.Wait(ctx); err != nil && ctx.Err() == nil {
				log.Printf("reading %d: %v", number, err)
			}
		}()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func interval() time.Duration {
	seconds, err := strconv.ParseFloat(os.Getenv("UPLOAD_SECONDS"), 64)
	if err != nil || seconds <= 0 {
		seconds = 10
		if os.Getenv("EDGEZMQ_CONFORM") != "" {
			seconds = 0.2
		}
	}
	return time.Duration(seconds * float64(time.Second))
}
