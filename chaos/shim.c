/* What a disk and a clock do to one process, without touching the machine's own (docs/chaos.md).
 *
 * Preloaded into a process, it reads a page of control that chaos writes (CHAOS_CONTROL/<process>) and
 *
 *   - adds an offset to the wall clock;
 *   - refuses, with ENOSPC, whatever would write into a file below CHAOS_ROOT;
 *   - at each fsync and fdatasync copies what was written since the last one to CHAOS_SHADOW, so that the
 *     files of a power loss can be put together afterwards: the content of each file as of its last fsync,
 *     and the names of each directory as of the directory's last fsync.
 *
 * Files are told apart by inode and time of birth, for an inode number comes again. Only libc's functions are
 * replaced: a program that calls the kernel itself, or writes through a mapping, is not seen (SQLite maps its
 * -shm file alone, which is worth nothing after a power loss).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t clock_offset_ns;
    int64_t disk_is_full;
    int64_t refused; /* counted by us: writes that met the full disk */
};

static struct control nothing;
static volatile struct control *control = &nothing;
static char root[PATH_MAX];
static size_t root_length;
static char shadow[PATH_MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name, ...)                                      \
    static type (*real_##name)(__VA_ARGS__);                       \
    if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void)
{
    const char *name = getenv("SUPERVISOR_PROCESS_NAME"); /* supervisord sets it for its children */
    const char *directory = getenv("CHAOS_CONTROL");
    const char *value;
    char path[PATH_MAX];
    if (!name) name = getenv("CHAOS_PROCESS");
    if (name && directory) {
        snprintf(path, sizeof path, "%s/%s", directory, name);
        int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd >= 0) {
            if (syscall(SYS_ftruncate, fd, 4096) == 0) {
                void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
                if (page != MAP_FAILED) control = page;
            }
            syscall(SYS_close, fd);
        }
    }
    if ((value = getenv("CHAOS_ROOT")) && realpath(value, root)) root_length = strlen(root);
    if ((value = getenv("CHAOS_SHADOW"))) snprintf(shadow, sizeof shadow, "%s", value);
}

/* --- the clock ----------------------------------------------------------------------------------- */

static int is_wall(clockid_t id) { return id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE || id == CLOCK_TAI; }

int clock_gettime(clockid_t id, struct timespec *at)
{
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int status = real_clock_gettime(id, at);
    int64_t offset;
    if (status == 0 && is_wall(id) && (offset = control->clock_offset_ns)) {
        int64_t all = (int64_t)at->tv_sec * 1000000000 + at->tv_nsec + offset;
        if (all < 0) all = 0;
        at->tv_sec = all / 1000000000;
        at->tv_nsec = all % 1000000000;
    }
    return status;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

/* --- which file ------------------------------------------------------------------------------------ */

static int path_is_ours(const char *path)
{
    return root_length && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

/* The path of a regular file (or directory, as `kind` says) below the root; 0 for anything else. */
static int ours(int fd, mode_t kind, char *path)
{
    struct stat facts;
    char link[64];
    ssize_t length;
    if (!root_length || fstat(fd, &facts) != 0 || (facts.st_mode & S_IFMT) != kind) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path_is_ours(path);
}

static int is_full(int fd)
{
    char path[PATH_MAX];
    int saved = errno;
    if (!control->disk_is_full || !ours(fd, S_IFREG, path)) {
        errno = saved;
        return 0;
    }
    __sync_fetch_and_add((int64_t *)&control->refused, 1);
    errno = ENOSPC;
    return 1;
}

/* The name of a file in the shadow: inode and birth. */
static int key_of(int fd, const char *name, int flags, char *key, size_t size)
{
    struct statx facts;
    if (statx(fd, name, flags, STATX_INO | STATX_BTIME, &facts) != 0) return -1;
    snprintf(key, size, "%llu-%lld.%09u", (unsigned long long)facts.stx_ino, (long long)facts.stx_btime.tv_sec,
             facts.stx_btime.tv_nsec);
    return 0;
}

/* --- what was written since the last fsync ----------------------------------------------------------- */

#define DIRTY 512
static struct dirty {
    char key[64];
    off_t from, to;
} dirty[DIRTY];

static void note(int fd, off_t from, off_t to)
{
    char path[PATH_MAX], key[64];
    int saved = errno, i, free_place = -1;
    if (!*shadow || !ours(fd, S_IFREG, path) || key_of(fd, "", AT_EMPTY_PATH, key, sizeof key) != 0) {
        errno = saved;
        return;
    }
    pthread_mutex_lock(&lock);
    for (i = 0; i < DIRTY; i++) {
        if (!dirty[i].key[0]) {
            if (free_place < 0) free_place = i;
        } else if (strcmp(dirty[i].key, key) == 0)
            break;
    }
    if (i < DIRTY) {
        if (from < dirty[i].from) dirty[i].from = from;
        if (to > dirty[i].to) dirty[i].to = to;
    } else if (free_place >= 0) {
        strcpy(dirty[free_place].key, key);
        dirty[free_place].from = from;
        dirty[free_place].to = to;
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
}

static int copy(int from_fd, int to_fd, off_t from, off_t to)
{
    static __thread char buffer[1 << 16];
    while (from < to) {
        size_t want = (size_t)(to - from) < sizeof buffer ? (size_t)(to - from) : sizeof buffer;
        ssize_t got = syscall(SYS_pread64, from_fd, buffer, want, from);
        if (got <= 0) return (int)got;
        if (syscall(SYS_pwrite64, to_fd, buffer, got, from) != got) return -1;
        from += got;
    }
    return 0;
}

/* The file's shadow gets what the disk has now. A descriptor that may not read is opened anew. */
static void keep_file(int fd)
{
    char path[PATH_MAX], key[64], target[PATH_MAX + 128], link[64];
    struct stat facts;
    off_t from = 0, to;
    int out, in, is_new, i, saved = errno;
    if (!*shadow || !ours(fd, S_IFREG, path) || key_of(fd, "", AT_EMPTY_PATH, key, sizeof key) != 0) goto done;
    snprintf(target, sizeof target, "%s/files/%s", shadow, key);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if ((in = (int)syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0)) < 0) goto done;
    pthread_mutex_lock(&lock);
    is_new = access(target, F_OK) != 0;
    out = (int)syscall(SYS_openat, AT_FDCWD, target, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (out >= 0 && fstat(in, &facts) == 0) {
        to = facts.st_size;
        if (!is_new) {
            for (i = 0; i < DIRTY && strcmp(dirty[i].key, key) != 0; i++) continue;
            if (i < DIRTY) {
                from = dirty[i].from;
                if (dirty[i].to < to) to = dirty[i].to;
                dirty[i].key[0] = 0;
            } /* else: another process wrote it, or nobody did; to be sure, all of it */
        } else
            for (i = 0; i < DIRTY; i++)
                if (strcmp(dirty[i].key, key) == 0) dirty[i].key[0] = 0;
        copy(in, out, from, to);
        syscall(SYS_ftruncate, out, facts.st_size);
    }
    if (out >= 0) syscall(SYS_close, out);
    pthread_mutex_unlock(&lock);
    syscall(SYS_close, in);
done:
    errno = saved;
}

/* The names in a directory, as they are now: one line `key kind name` each, in a file named after its path. */
static void keep_directory(int fd)
{
    char path[PATH_MAX], target[PATH_MAX + 128], scratch[PATH_MAX + 192], key[64], *at;
    DIR *directory;
    struct dirent *entry;
    FILE *out;
    int saved = errno;
    if (!*shadow || !ours(fd, S_IFDIR, path)) goto done;
    snprintf(target, sizeof target, "%s/names/@%s", shadow, path[root_length] ? path + root_length + 1 : ".");
    for (at = target + strlen(shadow) + 7; *at; at++)
        if (*at == '/') *at = '\1';
    snprintf(scratch, sizeof scratch, "%s.%ld", target, (long)syscall(SYS_gettid));
    if (!(directory = opendir(path))) goto done;
    if ((out = fopen(scratch, "w"))) {
        while ((entry = readdir(directory))) {
            if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
            if (key_of(dirfd(directory), entry->d_name, AT_SYMLINK_NOFOLLOW, key, sizeof key) != 0) continue;
            fprintf(out, "%s %c %s\n", key, entry->d_type == DT_REG ? 'f' : entry->d_type == DT_DIR ? 'd' : 'x',
                    entry->d_name);
        }
        fclose(out);
        rename(scratch, target);
    }
    closedir(directory);
done:
    errno = saved;
}

static void keep(int fd)
{
    keep_file(fd);
    keep_directory(fd);
}

int fsync(int fd)
{
    REAL(int, fsync, int);
    if (is_full(fd)) return -1;
    int status = real_fsync(fd);
    if (status == 0) keep(fd);
    return status;
}

int fdatasync(int fd)
{
    REAL(int, fdatasync, int);
    if (is_full(fd)) return -1;
    int status = real_fdatasync(fd);
    if (status == 0) keep(fd);
    return status;
}

/* --- writing --------------------------------------------------------------------------------------------- */

static off_t position(int fd) { return *shadow ? lseek(fd, 0, SEEK_CUR) : 0; }

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(ssize_t, write, int, const void *, size_t);
    if (is_full(fd)) return -1;
    ssize_t done = real_write(fd, data, size);
    if (done > 0 && root_length && *shadow) {
        int saved = errno;
        off_t end = position(fd);
        if (end >= done) note(fd, end - done, end); /* after the write: right for O_APPEND too */
        errno = saved;
    }
    return done;
}

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (is_full(fd)) return -1;
    ssize_t done = real_writev(fd, pieces, count);
    if (done > 0 && root_length && *shadow) {
        int saved = errno;
        off_t end = position(fd);
        if (end >= done) note(fd, end - done, end);
        errno = saved;
    }
    return done;
}

static ssize_t at_place(ssize_t done, int fd, off_t at)
{
    if (done > 0) note(fd, at, at + done);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    return is_full(fd) ? -1 : at_place(real_pwrite(fd, data, size, at), fd, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    return is_full(fd) ? -1 : at_place(real_pwrite64(fd, data, size, at), fd, at);
}

ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t at)
{
    REAL(ssize_t, pwritev, int, const struct iovec *, int, off_t);
    return is_full(fd) ? -1 : at_place(real_pwritev(fd, pieces, count, at), fd, at);
}

static int grows(int fd, off_t size)
{
    struct stat facts;
    return control->disk_is_full && fstat(fd, &facts) == 0 && size > facts.st_size;
}

int ftruncate(int fd, off_t size)
{
    REAL(int, ftruncate, int, off_t);
    if (grows(fd, size) && is_full(fd)) return -1;
    int status = real_ftruncate(fd, size);
    if (status == 0) note(fd, size, size);
    return status;
}

int ftruncate64(int fd, off64_t size)
{
    REAL(int, ftruncate64, int, off64_t);
    if (grows(fd, size) && is_full(fd)) return -1;
    int status = real_ftruncate64(fd, size);
    if (status == 0) note(fd, size, size);
    return status;
}

int fallocate(int fd, int mode, off_t at, off_t size)
{
    REAL(int, fallocate, int, int, off_t, off_t);
    if (is_full(fd)) return -1;
    int status = real_fallocate(fd, mode, at, size);
    if (status == 0) note(fd, at, at + size);
    return status;
}

int fallocate64(int fd, int mode, off64_t at, off64_t size)
{
    REAL(int, fallocate64, int, int, off64_t, off64_t);
    if (is_full(fd)) return -1;
    int status = real_fallocate64(fd, mode, at, size);
    if (status == 0) note(fd, at, at + size);
    return status;
}

int posix_fallocate(int fd, off_t at, off_t size)
{
    REAL(int, posix_fallocate, int, off_t, off_t);
    if (is_full(fd)) return ENOSPC;
    int status = real_posix_fallocate(fd, at, size);
    if (status == 0) note(fd, at, at + size);
    return status;
}

int posix_fallocate64(int fd, off64_t at, off64_t size)
{
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    if (is_full(fd)) return ENOSPC;
    int status = real_posix_fallocate64(fd, at, size);
    if (status == 0) note(fd, at, at + size);
    return status;
}

/* stdio writes through libc's own write, which nobody can replace: mosquitto's persistence uses it. */
int fflush(FILE *file)
{
    REAL(int, fflush, FILE *);
    if (file && control->disk_is_full && is_full(fileno(file))) return EOF;
    int status = real_fflush(file);
    if (file && status == 0 && root_length && *shadow) note(fileno(file), 0, (off_t)1 << 60);
    return status;
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file)
{
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
    if (control->disk_is_full && is_full(fileno(file))) return 0;
    return real_fwrite(data, size, count, file);
}
