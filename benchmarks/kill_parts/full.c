// A disk that is full: writes below FULL_FOLDER fail from number FULL_FROM on (0: none), and are listed in FULL_TALLY.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static long calls;

static int refused(int fd) {
    char link[64], path[4096];
    const char *folder = getenv("FULL_FOLDER"), *from = getenv("FULL_FROM"), *tally = getenv("FULL_TALLY");
    if (fd < 3 || !folder || !from) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < (ssize_t)strlen(folder) || strncmp(path, folder, strlen(folder))) return 0;
    path[size] = 0;
    long call = __sync_add_and_fetch(&calls, 1);
    if (tally) {
        int out = open(tally, O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (out >= 0) {
            dprintf(out, "%ld %s\n", call, path);
            close(out);
        }
    }
    return atol(from) > 0 && call >= atol(from);
}

#define FULL { errno = ENOSPC; return -1; }

ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "write");
    if (refused(fd)) FULL
    return next(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    static ssize_t (*next)(int, const void *, size_t, off64_t);
    if (!next) next = dlsym(RTLD_NEXT, "pwrite64");
    if (refused(fd)) FULL
    return next(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    static ssize_t (*next)(int, const struct iovec *, int);
    if (!next) next = dlsym(RTLD_NEXT, "writev");
    if (refused(fd)) FULL
    return next(fd, parts, count);
}
