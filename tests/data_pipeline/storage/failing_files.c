/* Preloaded: calls on paths that contain FAULT_PATH fail with FAULT_ERRNO, FAULT_COUNT times after the first FAULT_AFTER. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fails(const char *path) {
  const char *where = getenv("FAULT_PATH"), *count = getenv("FAULT_COUNT");
  static char last[256];
  static int done;
  if (!where || !*where || !path || !strstr(path, where)) return 0;
  if (strcmp(last, getenv("FAULT_CASE"))) done = 0, snprintf(last, sizeof last, "%s", getenv("FAULT_CASE"));
  int after = atoi(getenv("FAULT_AFTER")), number = done++;
  if (number < after || number >= after + atoi(count)) return 0;
  errno = atoi(getenv("FAULT_ERRNO"));
  return 1;
}

static int descriptor_fails(int number) {
  const char *where = getenv("FAULT_PATH");
  char link[64], path[4096];
  int before = errno;
  if (!where || !*where) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", number);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define NEXT(name) \
  static __typeof__(name) *next; \
  if (!next) next = dlsym(RTLD_NEXT, #name)
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    NEXT(name); \
    va_list more; \
    va_start(more, flags); \
    int mode = va_arg(more, int); \
    va_end(more); \
    return strcmp(getenv("FAULT_CALL") ?: "", "open") == 0 && fails(path) ? -1 : next(path, flags, mode); \
  }
#define STAT(name, kind) \
  int name(const char *path, kind *to) { \
    NEXT(name); \
    return strcmp(getenv("FAULT_CALL") ?: "", "stat") == 0 && fails(path) ? -1 : next(path, to); \
  }
#define READING(call) (strcmp(getenv("FAULT_CALL") ?: "", "read") == 0 && (call))
OPEN(open)
OPEN(open64)
STAT(stat, struct stat)
STAT(stat64, struct stat64)
ssize_t read(int number, void *to, size_t size) {
  NEXT(read);
  return READING(descriptor_fails(number)) ? -1 : next(number, to, size);
}
ssize_t pread(int number, void *to, size_t size, off_t at) {
  NEXT(pread);
  return READING(descriptor_fails(number)) ? -1 : next(number, to, size, at);
}
ssize_t pread64(int number, void *to, size_t size, off64_t at) {
  NEXT(pread64);
  return READING(descriptor_fails(number)) ? -1 : next(number, to, size, at);
}
DIR *opendir(const char *path) {
  NEXT(opendir);
  return strcmp(getenv("FAULT_CALL") ?: "", "list") == 0 && fails(path) ? NULL : next(path);
}
