package emp

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"
)

// sends takes what the client has put and gives the headers and bodies of its SENDs.
func sends(t *testing.T, c *Client) (headers []header, bodies [][]byte) {
	t.Helper()
	for _, frames := range c.out {
		if string(frames[0]) != "SEND/1" {
			continue
		}
		h, err := newHeader(frames[1])
		if err != nil {
			t.Fatal(err)
		}
		headers, bodies = append(headers, h), append(bodies, frames[2])
	}
	c.out = nil
	return headers, bodies
}

func welcomed(t *testing.T, c *Client, session int64) {
	t.Helper()
	frame, err := msgpack.Marshal([]any{[]byte("epoch-01"), session, 7, 5000, false, []int{1 << 20, 4096, 1 << 20, 20, 1 << 18}})
	if err != nil {
		t.Fatal(err)
	}
	c.read([][]byte{[]byte("WELCOME/1"), frame}, time.Now())
}

func settle(t *testing.T, c *Client, cumulative int64) {
	t.Helper()
	frame, err := msgpack.Marshal([]any{"sink", PriorityData, cumulative, [][]any{{2, "denied"}}})
	if err != nil {
		t.Fatal(err)
	}
	c.read([][]byte{[]byte("SETTLED/1"), frame}, time.Now())
}

func TestABatchGoesOnceAndAgainUnchangedUntilItsLastMessageIsSettled(t *testing.T) {
	c := New(Options{Name: "source"})
	welcomed(t, c, 1)
	c.out = nil
	receipts := []*Receipt{}
	for range 22 {
		receipt, err := c.Send(context.Background(), "sink", PriorityData, Message{Content: []byte("1")})
		if err != nil {
			t.Fatal(err)
		}
		receipts = append(receipts, receipt)
	}
	c.collect()
	c.collect() // what was sent is not sent again
	headers, bodies := sends(t, c)
	if len(headers) != 2 || headers[0].int(3) != 20 || headers[1].int(2) != 21 || headers[1].int(3) != 2 {
		t.Fatalf("%v: expected 20 messages from 1 and 2 from 21", headers)
	}
	for i, body := range bodies {
		if decode(body, headers[i].int(3)) == nil {
			t.Errorf("batch %d: no array of %d messages", i, headers[i].int(3))
		}
	}

	settle(t, c, 5)
	if receipts[4].err != nil || receipts[1].err == nil || isSettled(receipts[5]) {
		t.Errorf("settled up to 5, 2 is refused: got %v, %v, 6 settled: %v", receipts[4].err, receipts[1].err, isSettled(receipts[5]))
	}
	welcomed(t, c, 2)
	again, same := sends(t, c)
	if len(again) != 2 || again[0].int(4) != 6 || again[0].int(5)&flagResent == 0 || !bytes.Equal(bodies[0], same[0]) {
		t.Errorf("%v: expected the same two, the floor 6 and RESENT", again)
	}

	settle(t, c, 20)
	welcomed(t, c, 3)
	if rest, _ := sends(t, c); len(rest) != 1 || rest[0].int(2) != 21 {
		t.Errorf("%v: expected what begins with 21", rest)
	}
	settle(t, c, 22)
	if l := c.lanes[laneKey{"sink", PriorityData}]; len(l.open) != 0 || l.bytes != 0 || !isSettled(receipts[21]) {
		t.Errorf("%d batches, %d bytes: expected none", len(l.open), l.bytes)
	}
}

func TestARequestHasABatchOfItsOwn(t *testing.T) {
	c := New(Options{Name: "source"})
	welcomed(t, c, 1)
	c.out = nil
	for _, flags := range []int{0, flagExpectsReply, 0} {
		if _, err := c.send(context.Background(), "sink", PriorityData, flags, nil, Message{}); err != nil {
			t.Fatal(err)
		}
	}
	c.collect()
	if headers, _ := sends(t, c); len(headers) != 3 || headers[1].int(5) != flagExpectsReply || headers[2].int(5) != 0 {
		t.Errorf("%v: expected three", headers)
	}
}

func isSettled(receipt *Receipt) bool {
	select {
	case <-receipt.settled:
		return true
	default:
		return false
	}
}
