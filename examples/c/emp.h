/* A client of EMP/1, the Edge Module Protocol of edgezmq (docs/emp.md). Copy emp.h and emp.c into a module of your own;
 * they need libzmq and msgpack-c.
 *
 * One thread, one message at a time: emp_turn() sends, reads, handles messages for some milliseconds and returns. So a
 * handler must not wait for another module's answer. Nothing has to be stored: what was sent is kept until the broker says that it is
 * settled, and sent again after every reconnect.
 */
#ifndef EMP_H
#define EMP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { EMP_REQUEST = 1, EMP_SIGNAL = 2, EMP_DATA = 3 }; /* priorities of lanes */

typedef enum {
    EMP_RUNNING = 0,
    EMP_FENCED,  /* a newer process has our name: exit */
    EMP_REFUSED, /* the broker does not take us; it was logged why */
    EMP_BROKEN   /* libzmq failed; errno says why */
} emp_state;

typedef struct {
    const char *data; /* not ended by 0 */
    size_t size;
} emp_text;

typedef struct {
    emp_text id, parent_id, resource_version, source, group, resource, operation, kind, content;
    int64_t timestamp; /* milliseconds since 1970 */
    emp_text sender;   /* the broker vouches for it; source is only claimed */
    bool expects_reply, redelivered;
} emp_delivery;

typedef struct {
    const char *source, *group, *resource, *operation;
    const char *kind; /* json, text or bytes; NULL: json */
    const void *content;
    size_t size;
} emp_message;

typedef struct emp emp;

/* Handle one message; NULL when it is done, else the reason why it is refused (lower-case words joined by `-`).
 * A request is answered with emp_reply() in here. */
typedef const char *(*emp_handler)(emp *bus, const emp_delivery *delivery, void *context);

/* What became of a message that was sent: reason is NULL when it was handled. */
typedef void (*emp_settler)(emp *bus, const char *destination, int64_t number, const char *reason, void *context);

/* Where the bus is, by the environment; to be freed. */
char *emp_endpoint(void);

/* NULL when libzmq fails (errno). Strings are copied; settled may be NULL. */
emp *emp_open(const char *name, const char *endpoint, emp_handler handle, emp_settler settled, void *context);

/* Before the first turn: the broker may give us up when it has heard nothing for so long. 15 s if not set. */
void emp_set_liveness(emp *bus, int ms);

/* Send what was given to emp_send, read what there is, keep up with the broker, handle messages: for 5 ms, or one that
 * takes longer. Waits at most wait_ms when there is nothing to do. */
emp_state emp_turn(emp *bus, int wait_ms);

/* The number of the message in its lane; 0 when the lane's window is full (try again after a turn); -1 when the
 * message is larger than the broker allows. It goes with the next turn, together with others for the same destination
 * and priority, or at once when they make a full batch. */
int64_t emp_send(emp *bus, const char *destination, int priority, const emp_message *message);

/* In a handler: answer the request with this content, of the request's kind. */
void emp_reply(emp *bus, const emp_delivery *request, const void *content, size_t size);

/* Whether the broker has taken us, and answers. */
bool emp_is_attached(const emp *bus);

/* Ask for nothing new; go on with turns until emp_is_idle, or as long as there is time, then emp_close. */
void emp_drain(emp *bus);
bool emp_is_idle(const emp *bus);

/* Say BYE and free everything. */
void emp_close(emp *bus);

#endif
