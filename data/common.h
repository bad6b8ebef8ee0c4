/*
What every other header stands on: errors, memory, files, time and random numbers.
Nothing here knows of pictures, data sets or models.

Errors: a function that can fail takes an `Error *`, writes one line into it (which file, which value, what to do)
and returns -1 or NULL. Only the commands in the trainer print and exit.

Compiles as C11 and as C++17.
*/
#ifndef DETR_COMMON_H
#define DETR_COMMON_H

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

// ---------------------------------------------------------------------------------------------------------------------
// Errors

typedef struct {
    char text[1024];
} Error;

// Writes more behind what `error` says. Names and values from files may hold anything: control characters become '?',
// so that one line stays one line.
__attribute__((format(printf, 2, 3))) static inline void fail_more(Error *error, const char *format, ...) {
    const size_t used = strlen(error->text);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text + used, sizeof error->text - used, format, arguments);
    va_end(arguments);
    for (char *at = error->text + used; *at; at++)
        if ((unsigned char)*at < 32 || *at == 127) *at = '?';
}

// Writes one line into `error` and returns -1, so that a caller can `return fail(error, ...)`.
__attribute__((format(printf, 2, 3))) static inline int fail(Error *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    for (char *at = error->text; *at; at++)
        if ((unsigned char)*at < 32 || *at == 127) *at = '?';
    return -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: these do not return when there is none left.

static inline void *allocate(size_t bytes) {
    void *memory = calloc(bytes ? bytes : 1, 1);
    if (!memory) {
        fprintf(stderr, "error: out of memory: %.1f MiB more were asked for\n", (double)bytes / 1048576.0);
        exit(1);
    }
    return memory;
}

static inline void *reallocate(void *memory, size_t bytes) {
    memory = realloc(memory, bytes ? bytes : 1);
    if (!memory) {
        fprintf(stderr, "error: out of memory: %.1f MiB were asked for\n", (double)bytes / 1048576.0);
        exit(1);
    }
    return memory;
}

// Grows *array (elements of `element_bytes`) so that element `count` can be written; doubles, so appending is O(1).
static inline void *grow(void *array, size_t count, size_t element_bytes) {
    if (count & (count - 1)) return array;  // capacity is always the power of two that holds `count` elements
    return reallocate(array, (count ? 2 * count : 1) * element_bytes);
}

// A formatted string on the heap; the caller frees it.
__attribute__((format(printf, 1, 2))) static inline char *format_string(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    char *text = (char *)allocate((size_t)length + 1);
    va_start(arguments, format);
    vsnprintf(text, (size_t)length + 1, format, arguments);
    va_end(arguments);
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Files and time

enum { READ_FILE_MAX = 1 << 30 };  // bytes of a picture, a list, a log; what may be longer is not read as one piece

// Opens a file to be read. NULL if it cannot be, or is something else: a folder, or a pipe, which would be waited for.
static inline FILE *open_file(const char *path, Error *error) {
    struct stat status;
    FILE *file = NULL;
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode))
        fail(error, "%s: is %s, not a file", path, S_ISDIR(status.st_mode) ? "a folder" : "a pipe or device");
    else if (!(file = fopen(path, "rb")))
        fail(error, "%s: cannot be opened: %s", path, strerror(errno));
    return file;
}

// Reads a whole file, up to READ_FILE_MAX. *bytes gets `size` bytes and a closing zero (not counted); the caller frees
// it. 0, or -1.
static inline int read_file(const char *path, char **bytes, size_t *size, Error *error) {
    FILE *file = open_file(path, error);
    struct stat status;
    *bytes = NULL;
    *size = 0;
    if (!file) return -1;
    if (fstat(fileno(file), &status) != 0 || status.st_size > READ_FILE_MAX) {
        fclose(file);
        return fail(error, "%s: %lld bytes, more than the %d that are read as one piece", path,
                    (long long)status.st_size, READ_FILE_MAX);
    }
    char *data = (char *)allocate((size_t)status.st_size + 1);
    size_t got = fread(data, 1, (size_t)status.st_size, file);
    fclose(file);
    if (got != (size_t)status.st_size) {
        free(data);
        return fail(error, "%s: read error: got %zu of %lld bytes", path, got, (long long)status.st_size);
    }
    *bytes = data;
    *size = got;
    return 0;
}

// Writes the bytes of a file, a piece at a time, to `file`, whose errors are found when that is closed. 0, or -1 if
// they cannot be read.
static inline int copy_file(FILE *file, const char *path, Error *error) {
    char piece[4096];
    FILE *from = open_file(path, error);
    if (!from) return -1;
    for (size_t got; (got = fread(piece, 1, sizeof piece, from)) > 0;) fwrite(piece, 1, got, file);
    const int bad = ferror(from), why = errno;
    fclose(from);
    return bad ? fail(error, "%s: cannot be read: %s", path, strerror(why)) : 0;
}

static inline int is_directory(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

static inline int is_file(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISREG(status.st_mode);
}

// mkdir -p. 0, or -1.
static inline int make_directories(const char *path, Error *error) {
    char *partial = format_string("%s", path);
    for (char *at = partial + 1;; at++) {
        if (*at != '/' && *at != 0) continue;
        char kept = *at;
        *at = 0;
        if (mkdir(partial, 0777) != 0 && errno != EEXIST) {
            fail(error, "%s: cannot be created: %s", partial, strerror(errno));
            free(partial);
            return -1;
        }
        *at = kept;
        if (kept == 0) break;
    }
    free(partial);
    return is_directory(path) ? 0 : fail(error, "%s: is not a folder", path);
}

static inline double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers are a function, not a state: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
// 1, 2, 3"). The same arguments give the same number on any thread, in any order, on the CPU and on the GPU.
//
//   key     = (low 32 bits of seed, high 32 bits of seed)
//   counter = (element / 4, purpose | site << 8, epoch or step, image)
//   result  = word (element mod 4) of the four that Philox returns

enum RandomPurpose {
    RANDOM_INIT = 1,     // site: number of the tensor in the parameter table
    RANDOM_SHUFFLE = 2,  // (epoch)
    RANDOM_AUGMENT = 3,  // (epoch, image's place in the data set), element: number of the decision
    RANDOM_DROPOUT = 4,  // site: number of the dropout layer; (step, image's place in the batch)
    RANDOM_TEST = 5,     // made-up data in tests and benchmarks
    RANDOM_SHAPES = 6,   // generated pictures (make_shapes.c). site: split; (part of the picture, picture)
};

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__  // the CUDA version calls it in its kernels too
#else
#define HOST_DEVICE
#endif

HOST_DEVICE static inline void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53u * counter[0];
        uint64_t product1 = (uint64_t)0xCD9E8D57u * counter[2];
        uint32_t word0 = (uint32_t)(product1 >> 32) ^ counter[1] ^ key0;
        uint32_t word2 = (uint32_t)(product0 >> 32) ^ counter[3] ^ key1;
        counter[1] = (uint32_t)product1;
        counter[3] = (uint32_t)product0;
        counter[0] = word0;
        counter[2] = word2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// Four words at once, for elements 4 * group .. 4 * group + 3.
HOST_DEVICE static inline void random_words(uint32_t words[4], uint64_t seed, uint32_t purpose, uint32_t site,
                                            uint32_t step, uint32_t image, uint32_t group) {
    words[0] = group;
    words[1] = purpose | site << 8;
    words[2] = step;
    words[3] = image;
    philox(words, (uint32_t)seed, (uint32_t)(seed >> 32));
}

static inline uint32_t random_word(uint64_t seed, uint32_t purpose, uint32_t site, uint32_t step, uint32_t image,
                                   uint64_t element) {
    uint32_t words[4];
    random_words(words, seed, purpose, site, step, image, (uint32_t)(element >> 2));
    return words[element & 3];
}

// Uniform in (0, 1), never 0 or 1.
static inline double random_uniform(uint64_t seed, uint32_t purpose, uint32_t site, uint32_t step, uint32_t image,
                                    uint64_t element) {
    return (random_word(seed, purpose, site, step, image, element) + 0.5) * (1.0 / 4294967296.0);
}

// An integer in [0, bound), by the high half of a 32 x 32 bit product.
static inline uint32_t random_below(uint64_t seed, uint32_t purpose, uint32_t site, uint32_t step, uint32_t image,
                                    uint64_t element, uint32_t bound) {
    return (uint32_t)((uint64_t)random_word(seed, purpose, site, step, image, element) * bound >> 32);
}

// Standard normal, from elements 2 * element and 2 * element + 1 (Box and Muller 1958).
static inline double random_normal(uint64_t seed, uint32_t purpose, uint32_t site, uint32_t step, uint32_t image,
                                   uint64_t element) {
    double radius = sqrt(-2 * log(random_uniform(seed, purpose, site, step, image, 2 * element)));
    return radius * cos(6.283185307179586 * random_uniform(seed, purpose, site, step, image, 2 * element + 1));
}

#endif
