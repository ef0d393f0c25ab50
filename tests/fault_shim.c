/* Preloaded into a process, it sees each system call that touches a folder, and lets one go wrong.

   Modes: count, kill before the call, tear (write a half, then kill), fail with an errno, record.
   Recorded calls go to a file, a line each, with the bytes of a write after its line. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FAIL, RECORD };
static char folder[PATH_MAX];
static size_t folder_length;
static volatile pid_t armed; /* the process that it is for: a child has the same memory */
static int mode, error_number, trace = -1;
static long wanted, calls;
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t real_write(int fd, const void *data, size_t size) {
  REAL(write);
  return real(fd, data, size);
}

void fault_arm(const char *path, int how, long call, int error, const char *trace_path) {
  strncpy(folder, path, sizeof folder - 1);
  folder_length = strlen(folder);
  mode = how, wanted = call, error_number = error, calls = 0;
  if (*trace_path) trace = open(trace_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  armed = getpid();
}

void fault_disarm(void) { armed = 0; }
long fault_calls(void) { return calls; }

static int inside(const char *path) {
  if (!path || strncmp(path, folder, folder_length)) return 0;
  const char *rest = path + folder_length;
  /* The project's source is copied there before training begins: hundreds of calls. */
  return !*rest || (*rest == '/' && strncmp(rest, "/code", 5));
}

static const char *of_descriptor(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

/* Returns -1, with errno set, if the call is to fail. */
static int before(const char *name, const char *path, const char *other, int fd, const void *data,
                  size_t size) {
  if (armed != getpid() || !(inside(path) || inside(other))) return 0;
  int result = 0, saved = errno;
  pthread_mutex_lock(&one);
  int now = ++calls == wanted;
  if (mode == RECORD) {
    char line[2 * PATH_MAX + 100];
    long offset = 0;
    if (data) {
      int append = fcntl(fd, F_GETFL) & O_APPEND;
      struct stat status;
      offset = append && !fstat(fd, &status) ? status.st_size : lseek(fd, 0, SEEK_CUR);
    }
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%ld\t%ld\n", name, path,
                          other ? other : "", offset, data ? (long)size : fd);
    real_write(trace, line, length);
    if (data) real_write(trace, data, size);
  } else if (now && mode == FAIL) {
    saved = error_number, result = -1;
  } else if (now && (mode == KILL || mode == TEAR)) {
    if (mode == TEAR && data) real_write(fd, data, size / 2);
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  pthread_mutex_unlock(&one);
  errno = saved;
  return result;
}

#define OPEN(name)                                                                \
  int name(const char *path, int flags, ...) {                                    \
    REAL(name);                                                                   \
    va_list list;                                                                 \
    va_start(list, flags);                                                        \
    int bits = va_arg(list, int);                                                 \
    va_end(list);                                                                 \
    if (before(flags & O_TRUNC ? "create" : "open", path, 0, flags, 0, 0)) return -1; \
    return real(path, flags, bits);                                               \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                              \
  int name(int place, const char *path, int flags, ...) {                         \
    REAL(name);                                                                   \
    va_list list;                                                                 \
    va_start(list, flags);                                                        \
    int bits = va_arg(list, int);                                                 \
    va_end(list);                                                                 \
    if (before(flags & O_TRUNC ? "create" : "open", path, 0, flags, 0, 0)) return -1; \
    return real(place, path, flags, bits);                                        \
  }
OPENAT(openat)
OPENAT(openat64)

#define WITH_DESCRIPTOR(type, name, parameters, arguments, data, size) \
  type name parameters {                                               \
    REAL(name);                                                        \
    if (armed) {                                                       \
      char path[PATH_MAX];                                             \
      if (before(#name, of_descriptor(fd, path), 0, fd, data, size)) return -1; \
    }                                                                  \
    return real arguments;                                             \
  }
WITH_DESCRIPTOR(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), data, size)
WITH_DESCRIPTOR(int, fsync, (int fd), (fd), 0, 0)
WITH_DESCRIPTOR(int, fdatasync, (int fd), (fd), 0, 0)
WITH_DESCRIPTOR(int, ftruncate, (int fd, off_t size), (fd, size), 0, 0)
WITH_DESCRIPTOR(int, ftruncate64, (int fd, off64_t size), (fd, size), 0, 0)

/* The descriptor is gone after a close, whatever it returns. */
int close(int fd) {
  REAL(close);
  char path[PATH_MAX];
  int failed = armed && before("close", of_descriptor(fd, path), 0, fd, 0, 0);
  int saved = errno, result = real(fd);
  if (failed) errno = saved;
  return failed ? -1 : result;
}

#define WITH_PATHS(name, parameters, arguments, path, other)   \
  int name parameters {                                        \
    REAL(name);                                                \
    if (before(#name, path, other, 0, 0, 0)) return -1;        \
    return real arguments;                                     \
  }
WITH_PATHS(rename, (const char *from, const char *to), (from, to), from, to)
WITH_PATHS(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), from, to)
WITH_PATHS(link, (const char *from, const char *to), (from, to), from, to)
WITH_PATHS(linkat, (int a, const char *from, int b, const char *to, int flags),
           (a, from, b, to, flags), from, to)
WITH_PATHS(unlink, (const char *path), (path), path, 0)
WITH_PATHS(unlinkat, (int a, const char *path, int flags), (a, path, flags), path, 0)
WITH_PATHS(mkdir, (const char *path, mode_t bits), (path, bits), path, 0)
WITH_PATHS(mkdirat, (int a, const char *path, mode_t bits), (a, path, bits), path, 0)
