/*
A long run and the machine it is on: a line that shows how far it is, signals that ask it to stop, memory that is left.

Compiles as C11 and as C++17.
*/
#ifndef DETR_PROGRESS_H
#define DETR_PROGRESS_H

#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "common.h"

// On a terminal a line that the next one overwrites, cut off at its edge; elsewhere plain lines, one in ten seconds.
typedef struct {
    double last;  // when the line was shown, as seconds_now
    int open;     // the terminal's cursor stands behind it
    FILE *file;   // where it is shown; NULL: stdout
} Progress;

static inline FILE *progress_file(const Progress *progress) { return progress->file ? progress->file : stdout; }

static inline int progress_due(const Progress *progress) {
    return seconds_now() - progress->last >= (isatty(fileno(progress_file(progress))) ? 0.1 : 10.0);
}

__attribute__((format(printf, 2, 3))) static inline void progress_show(Progress *progress, const char *format, ...) {
    FILE *file = progress_file(progress);
    int terminal = isatty(fileno(file));
    char line[512];
    struct winsize size;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    int known = terminal && ioctl(fileno(file), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    fprintf(file, terminal ? "\r%.*s\033[K" : "%.*s\n", known ? size.ws_col - 1 : (int)sizeof line, line);
    fflush(file);
    va_end(arguments);
    progress->last = seconds_now();
    progress->open = terminal;
}

// Leaves the line where it is, so that other text can follow.
static inline void progress_end(Progress *progress) {
    if (progress->open) fputs("\n", progress_file(progress));
    progress->open = 0;
}

// "1:02:03", from a day on "2 d 03 h".
static inline void format_time(char *out, size_t size, double seconds) {
    long s = seconds > 3e7 ? 30000000 : seconds > 0 ? (long)seconds : 0;
    if (s >= 86400)
        snprintf(out, size, "%ld d %02ld h", s / 86400, s / 3600 % 24);
    else
        snprintf(out, size, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
}

static volatile sig_atomic_t stop_requested;

static inline void on_stop_signal(int number) {
    (void)number;
    if (stop_requested) _exit(1);
    stop_requested = 1;
}

// From here on SIGINT, SIGTERM and SIGHUP (unless nohup ignores it) set stop_requested; a second one ends the program.
static inline void watch_signals(void) {
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_stop_signal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    if (sigaction(SIGHUP, NULL, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, NULL);
}

// The number that follows `name` at the beginning of one of a file's lines, "" for the first line; -1 where there is
// none.
static inline double file_number(const char *path, const char *name) {
    double value = -1;
    char line[256];
    FILE *file = fopen(path, "r");
    while (file && value < 0 && fgets(line, sizeof line, file))
        if (strncmp(line, name, strlen(name)) != 0 || sscanf(line + strlen(name), "%lf", &value) != 1) value = -1;
    if (file) fclose(file);
    return value;
}

// Bytes of memory that can still be had: what Linux calls available, or less if the control group (a container) is
// allowed less, of which files that were read and can be read again are no part. Infinite where the system does not
// say.
static inline double memory_free(void) {
    const double kilobytes = file_number("/proc/meminfo", "MemAvailable:");
    double available = kilobytes < 0 ? INFINITY : 1024 * kilobytes;
    const char *groups[2][4] = {
        {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file "},
        {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
         "/sys/fs/cgroup/memory/memory.stat", "total_inactive_file "}};
    for (int g = 0; g < 2; g++) {
        const double limit = file_number(groups[g][0], ""), used = file_number(groups[g][1], ""),
                     cached = file_number(groups[g][2], groups[g][3]), left = limit - used + (cached > 0 ? cached : 0);
        if (limit > 0 && used >= 0 && left < available) available = left > 0 ? left : 0;
    }
    return available;
}

#endif
