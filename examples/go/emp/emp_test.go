package emp

import (
	"fmt"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"
)

// arrival is a DELIVER of one message in session 1.
type arrival struct {
	sender, incarnation string
	generation, number  int64
	priority, flags     int
	parent              string
}

// client is attached in session 1, and handles nothing.
func client() *Client {
	c := New(Options{Name: "receiver"})
	c.attached, c.session, c.fresh = true, 1, time.Now()
	return c
}

func (c *Client) arrive(t *testing.T, a arrival) {
	t.Helper()
	fields := []any{1, 1, a.sender, []byte(fmt.Sprintf("%-16s", a.incarnation)), a.generation, "receiver", a.priority,
		a.number, 1, a.number, a.number, []any{}, a.flags}
	packed, err := msgpack.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	var h header
	if err := msgpack.Unmarshal(packed, &h); err != nil {
		t.Fatal(err)
	}
	body, err := msgpack.Marshal([]any{[]any{"id", a.parent, 0, false, "", "", "", "", "", "text", []byte("x")}})
	if err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	c.onDeliver(h, body)
	c.mu.Unlock()
	c.handlers.Wait()
}

func TestBooksOfASendersEarlierProcessesAreForgotten(t *testing.T) {
	c := client()
	for generation := int64(1); generation <= 1000; generation++ {
		c.arrive(t, arrival{sender: "phoenix", incarnation: fmt.Sprint(generation), generation: generation, number: 1, priority: PriorityData})
	}
	if len(c.books) != 1 {
		t.Fatalf("%d books of one sender", len(c.books))
	}
	c.arrive(t, arrival{sender: "phoenix", incarnation: "999", generation: 999, number: 2, priority: PriorityData})
	if len(c.books) != 1 {
		t.Fatal("a zombie's book was kept")
	}
}

func TestABookWithSomethingInHandIsKept(t *testing.T) {
	c := client()
	c.draining = true // what comes is not begun
	c.arrive(t, arrival{sender: "phoenix", incarnation: "1", generation: 1, number: 1, priority: PriorityData})
	c.draining = false
	c.arrive(t, arrival{sender: "phoenix", incarnation: "2", generation: 2, number: 1, priority: PriorityData})
	if len(c.books) != 2 {
		t.Fatalf("%d books", len(c.books))
	}
}

func TestBooksAndNamesAreBounded(t *testing.T) {
	c := client()
	for number := 0; number < maxBooks+100; number++ {
		c.arrive(t, arrival{sender: fmt.Sprint("s", number), incarnation: fmt.Sprint(number), generation: 1, number: 1, priority: PriorityData})
		c.arrive(t, arrival{sender: "s0", incarnation: "0", generation: 1, number: int64(number + 2), priority: PriorityData})
	}
	if len(c.books) > maxBooks || len(c.generations) > maxBooks {
		t.Fatalf("%d books, %d names", len(c.books), len(c.generations))
	}
	if c.books[bookKey{"s0", fmt.Sprintf("%-16s", "0"), "receiver", PriorityData}] == nil {
		t.Fatal("the book that was in use is gone")
	}
}

func TestAnotherSendersIncarnationIsNotItsOwn(t *testing.T) {
	c := client()
	for _, sender := range []string{"pump", "thief"} {
		c.arrive(t, arrival{sender: sender, incarnation: "1", generation: 1, number: 1, priority: PriorityData})
	}
	if len(c.books) != 2 {
		t.Fatal("two senders share a book")
	}
}

func TestOnlyWhoWasAskedCanAnswer(t *testing.T) {
	c := client()
	answer := make(chan *Delivery, 1)
	c.waiters["question"] = waiter{"oracle", answer}
	reply := arrival{sender: "liar", incarnation: "1", generation: 1, number: 1, flags: flagReply, parent: "question"}
	c.arrive(t, reply)
	if len(answer) != 0 {
		t.Fatal("a liar's reply was taken")
	}
	reply.sender = "oracle"
	c.arrive(t, reply)
	if len(answer) != 1 {
		t.Fatal("no reply")
	}
}
