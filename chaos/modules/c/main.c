/* The C module of a chaos node (docs/chaos.md): it sends numbered messages to its fellow in Go and to the cloud, and
 * answers and handles what comes.
 *
 *     c-module NAME FELLOW KIND
 *
 * KIND is its word in the tokens of its messages. What it knows is written into files outside of the node
 * (CHAOS_RECORD), one line a fact, with one write: what is in the file survives the death of the process.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "emp.h"

enum { DRAIN_MS = 8000, TURN_MS = 10, LOOK_MS = 200, MOST_DUE = 20, LIVENESS_MS = 3000, FLOWS = 2 };

/* One lane of ours. Nothing else goes over it, so a message's number in the lane is also the number in its token. */
typedef struct {
    const char *destination;
    char letter;
    double due;
    int64_t next;
    bool is_told; /* that the next one is sent */
} flow;

typedef struct {
    const char *name, *kind, *directory;
    int sent, handled; /* files */
    int generation;
    flow flows[FLOWS];
} module;

static volatile sig_atomic_t stopping;

static void on_signal(int number) {
    (void)number;
    stopping = 1;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* One line, with one write. */
static void record(int file, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void record(int file, const char *format, ...) {
    char line[256];
    va_list values;
    int size;
    va_start(values, format);
    size = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    if (size < 0 || (size_t)size >= sizeof line || write(file, line, (size_t)size) != size) die("record");
}

static int open_record(const module *m, const char *ending, int flags) {
    char path[4096];
    int file;
    snprintf(path, sizeof path, "%s/%s%s", m->directory, m->name, ending);
    file = open(path, flags | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) die(path);
    return file;
}

/* Numbers never come again: each process counts in a generation of its own. */
static int count_generations(const module *m) {
    FILE *file = fdopen(open_record(m, "", O_RDONLY), "r");
    char line[256];
    int count = 0;
    if (file == NULL) die("record");
    while (fgets(line, sizeof line, file) != NULL) count += strncmp(line, "G ", 2) == 0;
    fclose(file);
    return count;
}

/* The third word of the file `rates`; what it was when it cannot be read. */
static double read_rate(const module *m, double last) {
    char path[4096];
    double ignored, rate = last;
    FILE *file;
    snprintf(path, sizeof path, "%s/rates", m->directory);
    file = fopen(path, "r");
    if (file == NULL) return last;
    if (fscanf(file, "%lf %lf %lf", &ignored, &ignored, &rate) != 3) rate = last;
    fclose(file);
    return rate;
}

static const char *handle(emp *bus, const emp_delivery *delivery, void *context) {
    module *m = context;
    if (delivery->expects_reply)
        emp_reply(bus, delivery, delivery->content.data, delivery->content.size);
    else
        record(m->handled, "H %.*s %d %d %.4f\n", (int)delivery->content.size, delivery->content.data,
               delivery->redelivered, (int)getpid(), seconds());
    return NULL;
}

/* Only what is written down here counts as accepted. */
static void on_settled(emp *bus, const char *destination, int64_t number, const char *reason, void *context) {
    module *m = context;
    (void)bus;
    for (int i = 0; i < FLOWS; i++) {
        if (strcmp(m->flows[i].destination, destination) != 0) continue;
        record(m->sent, "%s%s %c.%s.%d.%" PRId64 ". %.4f\n", reason != NULL ? "X:" : "R", reason != NULL ? reason : "",
               m->flows[i].letter, m->kind, m->generation, number, seconds());
    }
}

/* Send what is due; what finds no room stays due. */
static void make(module *m, emp *bus, flow *f) {
    while (f->due >= 1) {
        char token[64], content[96];
        emp_message message = {.source = m->name, .group = "user", .content = content};
        int64_t number;
        snprintf(token, sizeof token, "%c.%s.%d.%" PRId64 ".", f->letter, m->kind, m->generation, f->next);
        if (f->letter == 'm') {
            message.resource = "default/chaos/1";
            message.operation = "upload";
            message.size = (size_t)snprintf(content, sizeof content, "{\"t\": \"%s\"}", token);
        } else {
            message.resource = "chaos/keep";
            message.operation = "keep";
            message.kind = "text";
            message.size = (size_t)snprintf(content, sizeof content, "%s", token);
        }
        if (!f->is_told) record(m->sent, "S %s %.4f\n", token, seconds()); /* before it is sent */
        f->is_told = true;
        number = emp_send(bus, f->destination, EMP_DATA, &message);
        if (number == 0) return;
        if (number != f->next) {
            fprintf(stderr, "number %" PRId64 " instead of %" PRId64 "\n", number, f->next);
            exit(1);
        }
        f->next++;
        f->due--;
        f->is_told = false;
    }
}

int main(int count, char **words) {
    struct sigaction action = {.sa_handler = on_signal};
    char *endpoint = emp_endpoint();
    const char *directory = getenv("CHAOS_RECORD");
    double rate = 0, last = seconds(), looked = 0, until = 0;
    emp_state state = EMP_RUNNING;
    module m;
    emp *bus;

    if (count != 4 || directory == NULL) {
        fprintf(stderr, "usage: CHAOS_RECORD=DIRECTORY %s NAME FELLOW KIND\n", words[0]);
        return 2;
    }
    m = (module){.name = words[1], .kind = words[3], .directory = directory,
                 .flows = {{.destination = words[2], .letter = 'k', .next = 1},
                           {.destination = "@hub", .letter = 'm', .next = 1}}};
    m.generation = count_generations(&m);
    m.sent = open_record(&m, "", O_WRONLY | O_APPEND);
    m.handled = open_record(&m, ".handled", O_WRONLY | O_APPEND);
    record(m.sent, "G %s %d\n", m.kind, m.generation);
    bus = emp_open(m.name, endpoint, handle, on_settled, &m);
    if (bus == NULL) die(endpoint);
    emp_set_liveness(bus, LIVENESS_MS);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    while (state == EMP_RUNNING) {
        double now = seconds();
        if (stopping) {
            if (until == 0) {
                until = now + DRAIN_MS / 1e3;
                emp_drain(bus);
            }
            if (emp_is_idle(bus) || now >= until) break;
        } else {
            if (now - looked > LOOK_MS / 1e3) {
                looked = now;
                rate = read_rate(&m, rate);
            }
            for (int i = 0; i < FLOWS; i++) {
                flow *f = &m.flows[i];
                f->due += rate * (now - last);
                if (f->due > MOST_DUE) f->due = MOST_DUE;
                make(&m, bus, f);
            }
        }
        last = now;
        state = emp_turn(bus, TURN_MS);
    }
    emp_close(bus);
    free(endpoint);
    return state == EMP_RUNNING ? 0 : state == EMP_FENCED ? 3 : 1;
}
