/*
train_detr.c: trains and runs DETR, the detection transformer of Carion et al. 2020 (https://arxiv.org/abs/2005.12872),
on a CPU. Every forward and backward pass is written out by hand; pictures, JSON and XML are left to libraries behind
the headers in data/. It is the reference that the CUDA version is held against.

It is not a framework: there is no graph and no autograd, one network, one loss, one optimizer. Backward passes stand
beside the forward passes they belong to.

Read it downward; the rooms follow an image on its way to a loss and back:

    Numbers        real, the arena that memory is planned with
    Profile        where the time of a step goes
    Matmul         the one hot loop: linear layers and convolutions are the same product of rows
    Winograd       3x3 convolutions with fewer products
    Layers         attention, layer norm, max pooling, positions, dropout
    Model          configuration, the table of parameters, forward and backward of one image
    Set loss       boxes, generalized IoU, matching, cross-entropy
    Calibration    statistics for the frozen norms of a network without a pretrained backbone
    Optimizer      AdamW in two groups, clipping, schedule, averaged weights, the training step
    main           and the program around it, in program/: flags, checkpoints, commands

Three decisions carry all of it. An activation is rows of channels: an image is (height * width, channels), a sequence
(tokens, channels). There is no batch dimension: a batch is a loop over images that adds up gradients, so nothing is
padded and an image never feels its neighbours. Random numbers are functions of counters (data/common.h), so any number
of threads, and a resumed run, sees the same ones.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <omp.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>  // instructions that GCC's vector extensions do not reach
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "data/common.h"         // Error, memory, files, random numbers
#include "data/safetensors.h"    // weights on disk
#include "data/json.h"           // configuration on disk
#include "data/image.h"          // JPEG, PNG, Pillow's resize, drawing
#include "data/dataset.h"        // COCO, Pascal VOC, YOLO folders
#include "data/loader.h"         // augmentation, worker threads
#include "data/coco_eval.h"      // average precision
#include "data/report.h"         // report.html
#include "data/fileset.h"        // a checkpoint's files change as a whole
#include "data/flags.h"          // a table of flags: parsing, --help, resuming
#include "data/picture_files.h"  // the pictures that a user names
#include "data/progress.h"       // the line that updates
#include "data/inspect.h"        // what is wrong or odd in a data set

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

#ifndef REAL
#define REAL float  // make REAL=double builds the reference in which a wrong formula cannot hide behind rounding
#endif
typedef REAL real;

#define INLINE static inline __attribute__((always_inline))

static inline real square_root(real x) { return sizeof(real) == 4 ? (real)sqrtf((float)x) : (real)sqrt((double)x); }

// Memory is planned before it is used: the same walk over a model runs once with base == NULL, which only counts, and
// once for real. `named` lists what was taken, so that a non-finite value can be traced to the first tensor it is in.
typedef struct {
    char name[48];
    const void *data;
    size_t count;
    int half;  // bf16, else reals
} NamedTensor;

typedef struct {
    char *base;
    size_t used, capacity, gap;  // bytes; gap: between one tensor and the next
    NamedTensor *named;
    size_t num_named, named_capacity;
} Arena;

enum { HUGE_PAGE = 2 << 20 };  // bytes: an arena has whole ones, so that few entries of the TLB reach all of it
static inline size_t larger(size_t a, size_t b) { return a > b ? a : b; }
static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

static void *arena_bytes(Arena *arena, size_t bytes) {
    char *memory = arena->base ? arena->base + arena->used : NULL;
    arena->used += divide_up(bytes, 64) * 64 + arena->gap;  // cache lines
    if (arena->base && arena->used > arena->capacity) {
        fprintf(stderr, "error: the memory plan has %zu bytes but %zu are needed\n", arena->capacity, arena->used);
        exit(1);
    }
    return memory;
}

static real *arena_take(Arena *arena, size_t count) { return (real *)arena_bytes(arena, count * sizeof(real)); }

// Turns the counted bytes of a dry run into memory.
static void arena_allocate(Arena *arena) {
    arena->capacity = arena->used;
    arena->used = 0;
    const double needed = (double)arena->capacity, room = memory_free();
    if (needed <= room)
        arena->base = (char *)aligned_alloc(HUGE_PAGE, divide_up(larger(arena->capacity, 1), HUGE_PAGE) * HUGE_PAGE);
    if (!arena->base) {  // Linux would give more than there is, and kill the process that touches it
        fprintf(stderr, "error: out of memory: %.1f MiB are needed at once and %.1f are free: take a smaller network\n",
                needed / 1048576, room / 1048576);
        exit(1);
    }
#ifdef MADV_HUGEPAGE
    madvise(arena->base, arena->capacity, MADV_HUGEPAGE);
#endif
    memset(arena->base, 0, arena->capacity);  // touched once here, so that no step pays for it
}

static void arena_free(Arena *arena) {
    free(arena->base);
    free(arena->named);
    memset(arena, 0, sizeof *arena);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tasks: the pieces of a parallel loop, which take unlike times

// Each thread begins with a range of its own, the same share in every loop, and so finds in its cache what it wrote
// there in the loop before. When it is done it takes the last tasks of others' ranges. Which thread makes a task never
// changes a bit of it.
enum { MOST_RANGES = 128 };  // more threads share them
typedef struct {
    int ranges;
    uint64_t left[MOST_RANGES];  // of a range: the first task << 32 | the one past the last
} Tasks;

// Tasks 0 .. count - 1, for the threads of a parallel region to come.
static Tasks share_tasks(long count) {
    Tasks tasks;
    tasks.ranges = (int)smaller((size_t)omp_get_max_threads(), MOST_RANGES);
    for (int i = 0; i < tasks.ranges; i++)
        tasks.left[i] = (uint64_t)(count * i / tasks.ranges) << 32 | (uint64_t)(count * (i + 1) / tasks.ranges);
    return tasks;
}

// The next one for this thread, or -1 where all are taken.
static long take_task(Tasks *tasks) {
    const int own = omp_get_thread_num();
    for (int i = 0; i < tasks->ranges; i++) {
        uint64_t *left = &tasks->left[(own + i) % tasks->ranges], seen = __atomic_load_n(left, __ATOMIC_RELAXED);
        while (seen >> 32 < (uint32_t)seen) {
            const uint64_t after = i == 0 ? seen + ((uint64_t)1 << 32) : seen - 1;
            if (__atomic_compare_exchange_n(left, &seen, after, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
                return i == 0 ? (long)(seen >> 32) : (long)(uint32_t)after;
        }
    }
    return -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Profile: where the time of a step goes, for bench --profile

// One line of the table, for all the calls of one kind of work. flops and bytes are what the work has to do at least:
// every product once, every input and output moved once.
typedef struct {
    const char *work, *pass;
    long calls;
    double seconds, flops, bytes;
} ProfileLine;

static struct {
    int on, count;
    ProfileLine lines[64];
} profile;

static inline double profile_begin(void) { return profile.on ? seconds_now() : 0; }

// Books one call of (work, pass) that took so long.
static void profile_add(const char *work, const char *pass, double seconds, double flops, double bytes) {
    int i = 0;
    while (i < profile.count && (strcmp(profile.lines[i].work, work) != 0 || strcmp(profile.lines[i].pass, pass) != 0))
        i++;
    if (i == (int)(sizeof profile.lines / sizeof profile.lines[0])) return;
    ProfileLine *line = &profile.lines[i];
    if (i == profile.count) {
        memset(line, 0, sizeof *line);
        line->work = work, line->pass = pass;
        profile.count++;
    }
    line->calls++;
    line->seconds += seconds;
    line->flops += flops, line->bytes += bytes;
}

// Books the time since `begin`, which profile_begin() gave.
static void profile_end(double begin, const char *work, const char *pass, double flops, double bytes) {
    if (profile.on) profile_add(work, pass, seconds_now() - begin, flops, bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Matmul: convolutions and linear layers, forward and backward
//
// Nearly all the time goes here, into one loop: multiply_tile(). A tile is TILE_ROWS rows (pixels or tokens) by
// TILE_COLUMNS columns (channels) of the result, held in registers while the loop runs over the inner dimension:
//
//     for k: load TILE_VECTORS vectors of weights; for each row: broadcast one activation, multiply, add
//
// Everything around it decides only where the rows come from and where the tile goes:
//
//   forward          y[pixel][n]  = sum over taps t, channels c of x[pixel moved by t][c] * w[n][t][c]
//   backward data    dx[pixel][c] = sum over taps t, channels n of dy[the pixel that read it by t][n] * w[n][t][c]
//   backward weight  dw[n][t][c] += sum over pixels of dy[pixel][n] * x[pixel moved by t][c]
//
// In the first two the rows are read where they lie: a convolution hands the loop a list of runs, one a tap, each with
// TILE_ROWS pointers to pixels (a row of zeros stands for pixels outside the image), and the tile stays in registers
// across all taps. So there is no im2col, the result is written once, and bias, residual and ReLU cost no extra pass.
// Weights are packed once an optimizer step into panels of TILE_COLUMNS columns, [panel][tap and channel][column].
// In the third the inner dimension is the pixels, see conv_backward_weight().
//
// A linear layer is a convolution with kernel 1 over an "image" of (rows, 1).
//
// Every element of a result is summed by one thread in an order that depends on shapes alone: the number of threads
// never changes a bit. doc/6-how-the-matmul-gets-fast.md tells how the sizes below were found.

#if defined __AVX512F__  // 32 registers of 64 bytes: 24 hold the tile
enum { VECTOR_BYTES = 64, TILE_VECTORS = 4 };
#elif defined __AVX__      // 16 registers of 32 bytes: 12 hold the tile
enum { VECTOR_BYTES = 32, TILE_VECTORS = 2 };
#elif defined __aarch64__  // 32 registers of 16 bytes
enum { VECTOR_BYTES = 16, TILE_VECTORS = 4 };
#else                      // 16 registers of 16 bytes, as SSE2 has; elsewhere the compiler makes do
enum { VECTOR_BYTES = 16, TILE_VECTORS = 2 };
#endif

// The instructions that this was compiled for, in words.
#if defined __AMX_BF16__
static const char KERNEL[] = "AVX-512, AMX for bf16";
#elif defined __AVX512BF16__
static const char KERNEL[] = "AVX-512, bf16 instructions";
#elif defined __AVX512F__
static const char KERNEL[] = "AVX-512";
#elif defined __AVX2__ && defined __FMA__
static const char KERNEL[] = "AVX2";
#elif defined __AVX__
static const char KERNEL[] = "AVX";
#elif defined __aarch64__
static const char KERNEL[] = "NEON";
#elif defined __SSE2__
static const char KERNEL[] = "SSE2";
#else
static const char KERNEL[] = "what the compiler makes of it";
#endif

enum {
    LANES = VECTOR_BYTES / sizeof(real),
    TILE_ROWS = 6,  // more rows would fit in registers, but 4 KB apart they evict each other from the L1 cache
    TILE_COLUMNS = TILE_VECTORS * LANES,
    BLOCK_TILES = 17,      // tiles that use a panel of weights one after another: 100 queries are so many
    CACHE_LINE = 64,       // bytes
    PAGE = 4096,           // bytes: numbers so far apart share a few lines of the L1 cache
    PIECE_UNITS = 512,     // of a tap: where weights come from beyond the L2 cache, tiles use no more of them at a time
    L2_WEIGHTS = 3 << 18,  // bytes: weights up to this stay there from block to block
    MAX_KERNEL = 7,        // taps of a kernel: 7 x 7
    MAX_PATCH = 160,       // a kernel with no more inputs than this reads all its columns as one run
    BLOCK_PIXELS = 224,    // backward weight: pixels, or pairs of them, summed in registers
    COPIED_ROWS = 8,       // backward weight: TILE_ROWS numbers of dy as they are copied, by one vector
    WEIGHT_ROWS = 258,     // backward weight: a piece of dw, out channels
    WEIGHT_COLUMNS = 256,  // and taps and in channels: it stays in the L2 cache while the pixels go by
    WEIGHT_PIECES = 16,    // backward weight: pieces there should be for threads to share
    SLICE_PIXELS = 256,    // backward weight: where dw itself is too small to split, so are the pixels, not below this
    AMX_DEPTH = 16,        // units of 4 bytes in a row of an AMX register, which has as many rows
    AMX_TILE = 32,         // rows, and columns, that AMX makes at a time, in four of its eight registers
    AMX_GROUP = 8,         // AMX: tiles of rows that are copied at a time,
    AMX_GROUP_MOST = 32,   // more where taps reach far beyond them, or all weights have no room in the L2 cache
    AMX_COPY = 192 << 10,  // units of all copies: with the panel in use they stay in the L2 cache
    AMX_WEIGHTS = 320 << 10,   // units of weights that have room there
    AMX_ROW = 512,             // units of a row up to which a tile has all its columns before the next tile
    AMX_WEIGHT_ROWS = 256,     // backward weight by AMX: a piece of dw, out channels
    AMX_PIXELS = 512,          // and the pairs of pixels that are summed in registers: slices are no shorter
    AMX_WEIGHT_COLUMNS = 512,  // and taps and in channels
};

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef real vec_memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));  // any address

static inline vec vec_load(const real *from) { return *(const vec_memory *)from; }
static inline void vec_store(real *to, vec value) { *(vec_memory *)to = value; }

// Writes past the caches what nobody reads before it would have left them anyway: memory need not be read first. Only
// where `to` lies on VECTOR_BYTES. Other threads see it after stream_end().
INLINE void vec_stream(real *to, vec value) {
#if defined __AVX512F__
    if ((uintptr_t)to % VECTOR_BYTES == 0) {
        _mm512_stream_si512((__m512i *)to, (__m512i)value);
        return;
    }
#elif defined __AVX__
    if ((uintptr_t)to % VECTOR_BYTES == 0) {
        _mm256_stream_si256((__m256i *)to, (__m256i)value);
        return;
    }
#endif
    vec_store(to, value);
}

INLINE void stream_end(void) {
#if defined __x86_64__
    _mm_sfence();
#endif
}

INLINE vec fill(real x) {
    const vec zero = {0};
    return zero + x;
}

// Zero where `value` is negative. NaN is not, so it stays and is seen.
static inline vec vec_relu(vec value) {
    __typeof__(value < 0) negative = value < 0;
    return (vec)(~negative & (__typeof__(negative))value);
}

// `value` where `mask` is positive, else zero.
static inline vec vec_where_positive(vec value, vec mask) {
    __typeof__(mask > 0) positive = mask > 0;
    return (vec)(positive & (__typeof__(positive))value);
}

// Rows become columns: lane l of row i is what lane i of row l was.
INLINE void transpose_lanes(vec row[LANES]) {
#ifdef __AVX512F__
    if (sizeof(real) == 4) {  // lanes are exchanged over distances of 1, 2, 4, 8
        typedef uint32_t places __attribute__((vector_size(VECTOR_BYTES)));
        const places lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
        for (uint32_t step = 1; step < LANES; step *= 2) {
            const places odd = (places)((lane & step) != 0);
            const __m512i of_first = (__m512i)(lane - (odd & step) + (odd & LANES));
            const __m512i of_second = (__m512i)(lane + (~odd & step) + (odd & LANES));
#pragma GCC unroll 16
            for (uint32_t i = 0; i < LANES; i++) {
                if (i & step) continue;
                const __m512i first = (__m512i)row[i], second = (__m512i)row[i + step];
                row[i] = (vec)_mm512_permutex2var_epi32(first, of_first, second);
                row[i + step] = (vec)_mm512_permutex2var_epi32(first, of_second, second);
            }
        }
        return;
    }
#endif
    real memory[LANES][LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) vec_store(memory[i], row[i]);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) row[l][i] = memory[i][l];
    }
}

// bf16 (--precision bf16, where real is float): the upper half of a float, rounded to the nearest, to even in between;
// what is below 2^-126 becomes zero. Two of them that belong to neighbouring k make a pair of 32 bits, and a row of
// bf16 is a row of pairs: rows of C numbers are read, moved and multiplied as rows of C / 2 units as wide as a float.
typedef uint16_t bf16;

typedef float fvec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t pairs __attribute__((vector_size(VECTOR_BYTES)));  // the number with the even k in the lower half
typedef uint32_t pair_memory __attribute__((aligned(2), may_alias));
typedef uint32_t pairs_memory __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
typedef uint16_t bf16_memory __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

INLINE fvec dot_pairs(fvec sum, pairs a, pairs b) {
#ifdef __AVX512BF16__
    return (fvec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else  // the same bits: products are exact, and the instruction adds the odd one first
    sum += (fvec)(a & 0xFFFF0000u) * (fvec)(b & 0xFFFF0000u);
    return sum + (fvec)(a << 16) * (fvec)(b << 16);
#endif
}

// Numbers of bf16 in the lower halves of their lanes.
INLINE pairs widen_bf16(const bf16 *from) {
#ifdef __AVX512F__  // of a conversion gcc makes two halves and joins them
    return (pairs)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#else
    return __builtin_convertvector(*(const bf16_memory *)from, pairs);
#endif
}
INLINE vec load_bf16(const bf16 *from) { return (vec)(widen_bf16(from) << 16); }

// A vector of pairs at any number's address.
INLINE pairs load_pairs(const real *from) { return *(const pairs_memory *)from; }

// The pair at `from` in every lane.
INLINE pairs broadcast_pair(const real *from) { return *(const pair_memory *)from + (pairs){0}; }

// The bits of `value` rounded to bf16, in the upper half of each lane; the lower half is meaningless.
INLINE pairs round_bf16(vec value) {
    const pairs bits = (pairs)value, magnitude = bits & 0x7FFFFFFFu;
    const pairs tiny = (pairs)(magnitude < 0x00800000u), nan = (pairs)(magnitude > 0x7F800000u);
    const pairs rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) & ~nan;
    return (rounded | (nan & (bits | 0x00400000u))) & (~tiny | 0x80000000u);
}

INLINE void store_bf16(bf16 *to, vec value) {
#ifdef __AVX512BF16__
    *(bf16_memory *)to = (bf16_memory)_mm512_cvtneps_pbh((__m512)value);
#else
    *(bf16_memory *)to = __builtin_convertvector(round_bf16(value) >> 16, bf16_memory);
#endif
}

// Lane by lane the pair (even, odd).
INLINE pairs make_pairs(vec even, vec odd) {
#ifdef __AVX512BF16__
    const __m512i lanes =
        _mm512_add_epi32(_mm512_set1_epi32(16 << 16),
                         _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(0x10001)));
    return (pairs)_mm512_permutexvar_epi16(lanes, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
    return round_bf16(even) >> 16 | (round_bf16(odd) & 0xFFFF0000u);
#endif
}

// Pairs of the numbers at `even` and those at `odd`.
INLINE pairs join_pairs(const bf16 *even, const bf16 *odd) { return widen_bf16(even) | widen_bf16(odd) << 16; }

static inline float from_bf16(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline bf16 to_bf16(float x) {
    fvec lanes = {x};
    bf16 rounded[VECTOR_BYTES / 4];
    store_bf16(rounded, (vec)lanes);
    return rounded[0];
}

// Numbers `at`.. of a tensor of bf16 (half) or of reals.
INLINE vec load_lanes(const void *from, size_t at, int half) {
    return half ? load_bf16((const bf16 *)from + at) : vec_load((const real *)from + at);
}
INLINE void store_lanes(void *to, size_t at, vec value, int half) {
    half ? store_bf16((bf16 *)to + at, value) : vec_store((real *)to + at, value);
}
INLINE real load_number(const void *from, size_t at, int half) {
    return half ? (real)from_bf16(((const bf16 *)from)[at]) : ((const real *)from)[at];
}
INLINE void store_number(void *to, size_t at, real value, int half) {
    if (half)
        ((bf16 *)to)[at] = to_bf16((float)value);
    else
        ((real *)to)[at] = value;
}
static inline size_t number_bytes(int half) { return half ? sizeof(bf16) : sizeof(real); }

// load_lanes() and store_lanes() where only n numbers are left; lanes past the last are 0.
INLINE vec load_rest(const void *from, size_t at, size_t n, int half) {
    if (n >= LANES) return load_lanes(from, at, half);
    real lanes[LANES] = {0};
    for (size_t i = 0; i < n; i++) lanes[i] = load_number(from, at + i, half);
    return vec_load(lanes);
}
INLINE void store_rest(void *to, size_t at, vec value, size_t n, int half) {
    if (n >= LANES) {
        store_lanes(to, at, value, half);
        return;
    }
    for (size_t i = 0; i < n; i++) store_number(to, at + i, value[i], half);
}

// One run of products: row i of the tile gets the sum over k < length of rows[i][k * step] * weights[k * panel_step +
// column]. With pairs length and steps count pairs.
typedef struct {
    const real *rows[TILE_ROWS];
    size_t offset;  // of its weights from the panel's start
} Run;

// What comes next, asked for while a tile is multiplied: a line of the caches from `from` on every so many turns of the
// loop, none if that is 0.
typedef struct {
    const char *from;
    int every;
} Ahead;

static const Ahead NOTHING_AHEAD = {NULL, 0};

// The share of tile number `tile` in asking for the next `units` of weights, while `tiles` tiles use some one after
// another. Else the first tile to use them would wait for all of them, as long as it takes to multiply several.
INLINE Ahead weights_ahead(const real *next, int units, long tile, long tiles) {
    const long turns = tiles * CACHE_LINE / (TILE_COLUMNS * (long)sizeof(real));
    const int every = turns > 0 ? (int)turns : 1;
    const Ahead ahead = {(const char *)next + tile * (units / every) * CACHE_LINE, every};
    return ahead;
}

// Whether weights, so many reals, have to come from beyond the L2 cache: no thread takes them for a second block, or
// they have no room there.
static int weights_cold(long blocks, size_t weights) {
    return blocks <= omp_get_max_threads() || weights * sizeof(real) > L2_WEIGHTS;
}

// The first `rows` rows of tile += the sum of all runs, of each the k from `first` on; half: of pairs of bf16. Inlined
// for one number of rows, so that the tile is in registers; each loop over the tile must be unrolled for that, or it
// falls back to memory at half the speed. Whatever else there is in the loop costs time where another thread shares the
// core: hence so little of it, and four turns in one.
INLINE void multiply_rows(vec tile[TILE_ROWS][TILE_VECTORS], int rows, const Run *runs, int num_runs, int first,
                          int length, size_t step, const real *panel, size_t panel_step, Ahead ahead, int half) {
    int turns = ahead.every;
    for (int run = 0; run < num_runs; run++) {
        const real *from[TILE_ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) from[i] = runs[run].rows[i];
        const real *weights = panel + runs[run].offset + first * panel_step;
        size_t at = first * step;
#pragma GCC unroll 4
        for (int k = 0; k < length; k++, at += step, weights += panel_step) {
            vec w[TILE_VECTORS];
#pragma GCC unroll 8
            for (int j = 0; j < TILE_VECTORS; j++) w[j] = vec_load(weights + j * LANES);
            if (--turns == 0) {
                __builtin_prefetch(ahead.from, 0, 2);
                ahead.from += CACHE_LINE, turns = ahead.every;
            }
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                if (half) {
                    const pairs two = broadcast_pair(from[i] + at);
#pragma GCC unroll 8
                    for (int j = 0; j < TILE_VECTORS; j++)
                        tile[i][j] = (vec)dot_pairs((fvec)tile[i][j], two, (pairs)w[j]);
                } else {
                    real value = from[i][at];
#pragma GCC unroll 8
                    for (int j = 0; j < TILE_VECTORS; j++) tile[i][j] += value * w[j];
                }
            }
        }
    }
}

// The same where the first `rows` rows are wanted, or more: the last tile should not cost as much as a whole one where
// it has few rows. Of 80 rows, a small picture's tokens, it has two.
INLINE void multiply_tile(vec tile[TILE_ROWS][TILE_VECTORS], int rows, const Run *runs, int num_runs, int first,
                          int length, size_t step, const real *panel, size_t panel_step, Ahead ahead, int half) {
    if (rows > 4)
        multiply_rows(tile, TILE_ROWS, runs, num_runs, first, length, step, panel, panel_step, ahead, half);
    else if (rows > 2)
        multiply_rows(tile, 4, runs, num_runs, first, length, step, panel, panel_step, ahead, half);
    else
        multiply_rows(tile, 2, runs, num_runs, first, length, step, panel, panel_step, ahead, half);
}

INLINE void clear_tile(vec tile[TILE_ROWS][TILE_VECTORS]) {
    const vec zero = {0};
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_VECTORS; j++) tile[i][j] = zero;
}

// Writes the tile to memory, rows of TILE_COLUMNS: to go on with it later, or because only a part of it is used.
INLINE void spill_tile(real *out, vec tile[TILE_ROWS][TILE_VECTORS]) {
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_VECTORS; j++) vec_store(out + i * TILE_COLUMNS + j * LANES, tile[i][j]);
}

INLINE void load_tile(vec tile[TILE_ROWS][TILE_VECTORS], const real *from) {
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_VECTORS; j++) tile[i][j] = vec_load(from + i * TILE_COLUMNS + j * LANES);
}

// A square kernel. Activations are (height * width, channels), weights (out_channels, kernel, kernel, in_channels).
typedef struct {
    int in_channels, out_channels, kernel, stride, padding, dilation;
} ConvShape;

// What happens to a sum before it is written: value = sum + bias[n] + add[m][n]; with relu max(value, 0), NaN stays
// NaN; with a mask, value where mask[m][n] > 0, else 0 (the backward pass of ReLU). Any pointer may be NULL; add and
// mask have the result's shape; add may be the result itself. half: result, add and mask are bf16.
typedef struct {
    const real *bias;
    const void *add;
    int relu;
    const void *mask;
    int half;
} Epilogue;

// Rows, or columns, of the output for `size` rows, or columns, of the input.
static inline int conv_size(int size, ConvShape s) {
    return (size + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1;
}

static inline size_t patch_size(ConvShape s) { return (size_t)s.kernel * s.kernel * s.in_channels; }

static int amx_usable(void);

// How a patch lies in packed weights: `count` runs of `length` numbers that lie side by side in x; each takes `units`
// reals or (half) pairs of bf16. A run is a tap. Where a tap's channels are odd and make no pairs (the picture's
// three), it is a row of the kernel, filled up with weights of zero, which meet whatever follows in x, for AMX to whole
// registers: then there is no dilation, and all runs together are no longer than MAX_PATCH.
typedef struct {
    int count, length, units;
} PatchRuns;

static PatchRuns patch_runs(ConvShape s, int half) {
    const int odd = half && s.in_channels % 2, merged = odd ? s.kernel : 1;
    PatchRuns runs = {s.kernel * s.kernel / merged, s.in_channels * merged, 0};
    runs.units = half ? (runs.length + 1) / 2 : runs.length;
    if (odd && amx_usable()) runs.units = (int)divide_up(runs.units, AMX_DEPTH) * AMX_DEPTH;
    return runs;
}

// Packed weights, in reals: the panels, then the row of zeros that stands for pixels outside the image. With pairs of
// bf16 (half) the inner dimension is half as long.
static size_t packed_size(ConvShape s, int half) {
    const PatchRuns runs = patch_runs(s, half);
    return divide_up(s.out_channels, TILE_COLUMNS) * TILE_COLUMNS * runs.count * runs.units +
           (size_t)s.kernel * runs.units;
}
static size_t packed_backward_size(ConvShape s, int half) {
    if (half) s.out_channels /= 2;
    size_t inner = (size_t)s.kernel * s.kernel * s.out_channels;
    return divide_up(s.in_channels, TILE_COLUMNS) * TILE_COLUMNS * inner + s.out_channels;
}

// TILE_COLUMNS out channels by TILE_COLUMNS numbers of a run, of which there are `rows` and `columns`, through the L1
// cache; `units` of packed are written. w: the first weight; the next out channel lies `row` further. scale: of the
// first channel, or NULL.
INLINE void pack_block(real *packed, real *packed_backward, const real *w, size_t row, const real *scale, int rows,
                       int columns, int units, int half) {
    const int step = half ? 2 : 1;
    real block[TILE_COLUMNS][TILE_COLUMNS];  // with half the first half of a row is in use
    for (int n = 0; n < TILE_COLUMNS; n++) {
        const real *from = w + (n < rows ? n : 0) * row;
        const vec factor = fill(n < rows && scale ? scale[n] : 1);
#pragma GCC unroll 8
        for (int j = 0; j < TILE_COLUMNS; j += LANES) {
            __builtin_prefetch(from + columns + j);  // the next block
            vec value = fill(0);
            if (n < rows && j < columns) value = load_rest(from, j, columns - j, 0) * factor;
            store_lanes(block[n], j, value, half);
        }
    }
    for (int first = 0; packed && first < units; first += LANES) {
        for (int n = 0; n < TILE_COLUMNS; n += LANES) {
            vec lines[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) lines[i] = vec_load(block[n + i] + first);
            transpose_lanes(lines);
#pragma GCC unroll 16
            for (int c = 0; c < LANES; c++)
                if (first + c < units) vec_stream(packed + (first + c) * TILE_COLUMNS + n, lines[c]);
        }
    }
    for (int n = 0; packed_backward && n < rows; n += step) {
#pragma GCC unroll 8
        for (int j = 0; j < TILE_COLUMNS; j += LANES)
            vec_stream(packed_backward + n / step * TILE_COLUMNS + j,
                       half ? (vec)join_pairs((const bf16 *)block[n] + j, (const bf16 *)block[n + step - 1] + j)
                            : vec_load(block[n] + j));
    }
}

// Weights w (out_channels, kernel, kernel, in_channels) for forward and for backward, either unless it is NULL:
//   packed[panel][tap][in channel c][column] = w[n][tap][c] * scale[n], where n = panel * TILE_COLUMNS + column
//   packed_backward[panel][tap][out channel n][column] = the same, where c = panel * TILE_COLUMNS + column
// Columns past the last channel are zero. scale: (out_channels) or NULL, a frozen norm's scale folded in. half: rows 2i
// and 2i + 1 of a tap become one of pairs of bf16, so out_channels must be even for packed_backward, and in_channels
// too; else the forward one has patch_runs(). For speed both should lie on VECTOR_BYTES. Called by all threads, which
// share the work and do not wait for one another at its end.
static void pack_weights(real *packed, real *packed_backward, const real *w, const real *scale, ConvShape s, int half) {
    const PatchRuns shape = patch_runs(s, half);
    const long runs = shape.count, in = shape.length, units = shape.units, out = s.out_channels, step = half ? 2 : 1;
    const long width = TILE_COLUMNS;
    const long out_panels = (long)divide_up(out, TILE_COLUMNS), in_panels = (long)divide_up(in, TILE_COLUMNS);
#pragma omp single nowait
    {
        if (packed) memset(packed + out_panels * runs * units * TILE_COLUMNS, 0, sizeof(real) * s.kernel * units);
        if (packed_backward)
            memset(packed_backward + in_panels * runs * out / step * TILE_COLUMNS, 0, sizeof(real) * out / step);
    }
#pragma omp for collapse(3) schedule(static) nowait
    for (long out_panel = 0; out_panel < out_panels; out_panel++) {
        for (long run = 0; run < runs; run++) {
            for (long in_panel = 0; in_panel < in_panels; in_panel++) {
                const long n = out_panel * TILE_COLUMNS, c = in_panel * TILE_COLUMNS, unit = c / step;
                real *forward = packed ? packed + ((out_panel * runs + run) * units + unit) * TILE_COLUMNS : NULL;
                real *backward = packed_backward
                                     ? packed_backward + ((in_panel * runs + run) * out + n) / step * TILE_COLUMNS
                                     : NULL;
                const int rows = (int)(out - n < width ? out - n : width);
                const int columns = (int)(in - c < width ? in - c : width);
                const int count = (int)(in_panel < in_panels - 1 ? width / step : units - unit);
                const real *from = w + (n * runs + run) * in + c, *factors = scale ? scale + n : NULL;
                if (half)
                    pack_block(forward, backward, from, (size_t)(runs * in), factors, rows, columns, count, 1);
                else
                    pack_block(forward, backward, from, (size_t)(runs * in), factors, rows, columns, count, 0);
            }
        }
    }
    stream_end();
}

// out[0 .. length) = line[first .. first + length), zero where that is outside [0, line_length) or line is NULL; all in
// bytes.
INLINE void copy_clipped(void *out, const char *line, long first, long length, long line_length) {
    if (line && first >= 0 && first + length <= line_length) {
        memcpy(out, line + first, length);
        return;
    }
    const long begin = first < 0 ? -first : 0, end = length < line_length - first ? length : line_length - first;
    memset(out, 0, length);
    if (line && begin < end) memcpy((char *)out + begin, line + first + begin, end - begin);
}

// A product of gathered pixels with packed weights: what forward and backward data have in common. Its rows are the
// pixels (i, j) of a grid. Pixel (i, j) reads, for each tap, `run` units of source from pixel (step * i + tap.y,
// step * j + tap.x) on, and becomes the pixel (spacing * i + first_y, spacing * j + first_x) of out.
typedef struct {
    int y, x;
    long distance;  // the same in bytes of source
    size_t offset;  // of the tap's weights from the panel's start
} Tap;

typedef struct {
    const char *source;
    int height, width;
    long pixel_bytes;  // of source
    int grid_height, grid_width, step, run;
    int num_taps;
    Tap taps[MAX_KERNEL * MAX_KERNEL];
    int low_y, high_y, low_x, high_x;  // the taps' reach: pixels this far inside the image need no care
    const real *packed, *zeros;
    size_t panel_size;
    int half;  // source and packed hold bf16: a unit is a pair of them
    void *out;
    int out_width, out_channels, spacing, first_y, first_x;
    Epilogue epilogue;
} Product;

// The row of out that the grid's pixel (y, x) becomes.
static inline size_t out_row(const Product *p, long y, long x) {
    return (size_t)((y * p->spacing + p->first_y) * p->out_width + x * p->spacing + p->first_x);
}

// The pixels and out rows of the grid's pixels first .. first + TILE_ROWS - 1; past the end the last one is repeated.
// edges: room for runs that lie partly outside the image.
static void gather_tile(Run *runs, size_t *out_rows, real *edges, const Product *p, long first) {
    const long line_length = p->width * p->pixel_bytes, length = p->run * (long)sizeof(real);
    int grid_y = (int)(first / p->grid_width), grid_x = (int)(first % p->grid_width);
    for (int t = 0; t < p->num_taps; t++) runs[t].offset = p->taps[t].offset;
    for (int i = 0; i < TILE_ROWS; i++) {
        const int y = grid_y * p->step, x = grid_x * p->step;
        const long center = y * line_length + x * p->pixel_bytes;
        out_rows[i] = out_row(p, grid_y, grid_x);
        if (y >= -p->low_y && y < p->height - p->high_y && x >= -p->low_x && x < p->width - p->high_x) {
            for (int t = 0; t < p->num_taps; t++)
                runs[t].rows[i] = (const real *)(p->source + (center + p->taps[t].distance));
        } else {
            for (int t = 0; t < p->num_taps; t++) {
                const int row = y + p->taps[t].y;
                const long start = ((long)x + p->taps[t].x) * p->pixel_bytes;
                const char *line = row >= 0 && row < p->height ? p->source + row * line_length : NULL;
                if (!line || start + length <= 0 || start >= line_length) {
                    runs[t].rows[i] = p->zeros;
                } else if (start >= 0 && start + length <= line_length) {
                    runs[t].rows[i] = (const real *)(line + start);
                } else {
                    real *copy = edges + (i * p->num_taps + t) * p->run;
                    copy_clipped(copy, line, start, length, line_length);
                    runs[t].rows[i] = copy;
                }
            }
        }
        if (grid_x + 1 < p->grid_width)
            grid_x++;
        else if (grid_y + 1 < p->grid_height)
            grid_x = 0, grid_y++;
    }
}

// Numbers at.. of out, of which `left` are left in their row and whose bias is at `column`: value, as the epilogue
// asks.
INLINE void finish_lanes(void *out, size_t at, vec value, const Epilogue *e, int column, size_t left, int half) {
    if (e->bias) value += load_rest(e->bias, column, left, 0);
    if (e->add) value += load_rest(e->add, at, left, half);
    if (e->relu) value = vec_relu(value);
    if (e->mask) value = vec_where_positive(value, load_rest(e->mask, at, left, half));
    store_rest(out, at, value, left, half);
}

#define NO_ROW SIZE_MAX  // of out: not to be written

// Writes the sums (rows, width) in memory as finish_lanes() does, columns first_column on, to rows out_rows.
INLINE void finish_rows(void *out, int channels, const real *sums, int width, const size_t *out_rows, int rows,
                        int first_column, Epilogue epilogue) {
    const int left = channels - first_column, half = epilogue.half;
    for (int i = 0; i < rows; i++, sums += width) {
        if (out_rows[i] == NO_ROW) continue;
        const size_t at = out_rows[i] * channels + first_column;
        if (left >= width) {
#pragma GCC unroll 8
            for (int j = 0; j < width; j += LANES)
                finish_lanes(out, at + j, vec_load(sums + j), &epilogue, first_column + j, LANES, half);
        } else {
            for (int j = 0; j < left; j += LANES)
                finish_lanes(out, at + j, vec_load(sums + j), &epilogue, first_column + j, left - j, half);
        }
    }
}

// Adds to a tile what the epilogue asks for and writes it: out rows out_rows[0 .. rows), columns first_column on.
INLINE void finish_tile(const Product *p, vec tile[TILE_ROWS][TILE_VECTORS], const size_t *out_rows, int rows,
                        int first_column, int half) {
    if (rows == TILE_ROWS && p->out_channels - first_column >= TILE_COLUMNS) {
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++) {
            const size_t at = out_rows[i] * p->out_channels + first_column;
#pragma GCC unroll 8
            for (int j = 0; j < TILE_VECTORS; j++)
                finish_lanes(p->out, at + j * LANES, tile[i][j], &p->epilogue, first_column + j * LANES, LANES, half);
        }
        return;
    }
    real edge[TILE_ROWS * TILE_COLUMNS];
    Epilogue epilogue = p->epilogue;
    epilogue.half = half;  // as the compiler knows it
    spill_tile(edge, tile);
    finish_rows(p->out, p->out_channels, edge, TILE_COLUMNS, out_rows, rows, first_column, epilogue);
}

// Asks for what the epilogue of a tile will read, so that it comes in while the tile is multiplied; and for where the
// `result` will be written, which does not pay next to AMX: it keeps the lines that are to be read from coming.
INLINE void prefetch_tile(const Product *p, const size_t *out_rows, int rows, int first_column, int columns,
                          int result) {
    if (!p->epilogue.add && !p->epilogue.mask && !result) return;
    const size_t bytes = number_bytes(p->epilogue.half), line = VECTOR_BYTES / bytes;
    for (int i = 0; i < rows; i++) {
        if (out_rows[i] == NO_ROW) continue;
        const size_t at = out_rows[i] * p->out_channels + first_column;
        for (size_t j = 0; j < (size_t)columns; j += line) {
            if (p->epilogue.add) __builtin_prefetch((const char *)p->epilogue.add + (at + j) * bytes);
            if (p->epilogue.mask) __builtin_prefetch((const char *)p->epilogue.mask + (at + j) * bytes);
            if (result) __builtin_prefetch((const char *)p->out + (at + j) * bytes, 1);
        }
    }
}

// What a tile sums before the next tile has its turn: the k first .. first + length - 1 of some taps of a panel. Sums
// that are not whole lie in memory meanwhile.
typedef struct {
    int panel, tap, taps, first, length;
    int begins, ends;  // the sums
} Piece;

// Piece number `turn` where a panel has `pieces`: one is all of it, more are parts of a tap each.
static Piece product_piece(const Product *p, int turn, int pieces) {
    const int piece = turn % pieces;
    if (pieces == 1) return (Piece){turn, 0, p->num_taps, 0, p->run, 1, 1};
    const int parts = pieces / p->num_taps, part = piece % parts, first = p->run * part / parts;
    return (Piece){turn / pieces, piece / parts,      1, first, p->run * (part + 1) / parts - first,
                   piece == 0,    piece == pieces - 1};
}

// Multiplies a piece of one tile and, with the panel's last one, writes it: out rows out_rows[0 .. rows). sums: as
// spill_tile() writes them.
INLINE void product_tile(const Product *p, const Run *runs, const size_t *out_rows, real *sums, int rows, Piece piece,
                         Ahead ahead, int half) {
    vec tile[TILE_ROWS][TILE_VECTORS];
    const int first_column = piece.panel * TILE_COLUMNS;
    if (piece.ends) prefetch_tile(p, out_rows, TILE_ROWS, first_column, TILE_COLUMNS, 1);
    if (piece.begins)
        clear_tile(tile);
    else
        load_tile(tile, sums);
    multiply_tile(tile, rows, runs + piece.tap, piece.taps, piece.first, piece.length, 1,
                  p->packed + piece.panel * p->panel_size, TILE_COLUMNS, ahead, half);
    if (!piece.ends)
        spill_tile(sums, tile);
    else if (p->epilogue.half)
        finish_tile(p, tile, out_rows, rows, first_column, 1);
    else
        finish_tile(p, tile, out_rows, rows, first_column, 0);
}

// At least so many blocks, the same number for each thread where there are more than threads.
static long shared_blocks(long least) {
    const long threads = omp_get_max_threads();
    return least > threads ? (long)divide_up(least, threads) * threads : least;
}

// AMX (on Intel's server processors since 2023) multiplies bf16 in registers of 16 rows by 64 bytes: one instruction
// adds to 16 x 16 sums the products of 16 x 32 and 32 x 16 numbers, the second as pairs just as they are packed here,
// some 30 times as fast as vectors there. Each sum takes first the 16 even k, then the 16 odd ones, then
// both, so that the last bits are not those of dot_pairs(). Numbers below 2^-126 count as zero, as there.
#ifdef __AMX_BF16__
// Whether the operating system lets this process have the registers: Linux wants to be asked (arch_prctl(2)).
static int amx_usable(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static int usable = -1;
    if (usable < 0) usable = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return usable;
}

// Sets up this thread's registers, all eight 16 rows by 64 bytes. amx_end() when its task is done.
static void amx_begin(void) {
    static const struct {  // gcc does not know that the instruction reads it: a local one it would leave unwritten
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } registers = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&registers);
}

static void amx_end(void) { _tile_release(); }

// Four registers of sums, a tile: 0 1 over 2 3.
INLINE void amx_clear(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Two registers of rows, 4 over 5, times two of columns, 6 beside 7.
INLINE void amx_dot_products(void) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// As much arithmetic as amx_multiply() does with `units` units in a row, in registers.
static void amx_only_multiply(long units) {
    amx_begin();
    amx_clear();
    for (long k = 0; k < units; k += AMX_DEPTH) amx_dot_products();
    amx_end();
}

// The sums += two registers of rows, `row` units apart, times two of columns, `step` units from one unit to the next.
INLINE void amx_step(const real *rows, size_t row, const real *columns, size_t step) {
    enum { HALF = AMX_TILE / 2, UNIT = sizeof(real) };
    _tile_loadd(4, rows, row * UNIT);
    _tile_loadd(5, rows + HALF * row, row * UNIT);
    _tile_loadd(6, columns, step * UNIT);
    _tile_loadd(7, columns + HALF, step * UNIT);
    amx_dot_products();
}

// gcc does not know that the instructions read and write memory.
INLINE void amx_barrier(void) { __asm__ volatile("" : : : "memory"); }

INLINE void amx_load(const real *sums, size_t row) {
    enum { HALF = AMX_TILE / 2, UNIT = sizeof(real) };
    _tile_loadd(0, sums, row * UNIT);
    _tile_loadd(1, sums + HALF, row * UNIT);
    _tile_loadd(2, sums + HALF * row, row * UNIT);
    _tile_loadd(3, sums + HALF * row + HALF, row * UNIT);
}

INLINE void amx_store(real *sums, size_t row) {
    enum { HALF = AMX_TILE / 2, UNIT = sizeof(real) };
    _tile_stored(0, sums, row * UNIT);
    _tile_stored(1, sums + HALF, row * UNIT);
    _tile_stored(2, sums + HALF * row, row * UNIT);
    _tile_stored(3, sums + HALF * row + HALF, row * UNIT);
}

// Units from one copied row to the next: an odd number of cache lines, as in tile_stride().
static inline size_t amx_stride(long units) { return (divide_up((size_t)units, AMX_DEPTH) | 1) * AMX_DEPTH; }

// Where a tap's part of the rows and of the columns begins, in units.
typedef struct {
    size_t rows, columns;
} AmxTap;

// sums (AMX_TILE, AMX_TILE) = rows, `row` units apart, times columns, `step` units from one unit to the next: for each
// tap `length` units from where it begins.
INLINE void amx_multiply(real *sums, const real *rows, size_t row, const real *columns, size_t step, const AmxTap *taps,
                         int num_taps, int length) {
    amx_barrier();
    amx_clear();
    for (int tap = 0; tap < num_taps; tap++) {
        const real *from = rows + taps[tap].rows, *at = columns + taps[tap].columns;
        for (int k = 0; k < length; k += AMX_DEPTH, at += AMX_DEPTH * step) amx_step(from + k, row, at, step);
    }
    amx_store(sums, AMX_TILE);
    amx_barrier();
}

// c (rows, columns) = a (rows, depth) b (depth, columns), or += if `add`: a and b of units, rows and columns multiples
// of AMX_TILE, depth one of AMX_DEPTH; a row of c follows c_row numbers after the one before, and so on.
static void amx_matmul(real *c, size_t c_row, const real *a, size_t a_row, const real *b, size_t b_row, int rows,
                       int columns, int depth, int add) {
    amx_barrier();
    for (int i = 0; i < rows; i += AMX_TILE) {
        for (int j = 0; j < columns; j += AMX_TILE) {
            if (add)
                amx_load(c + i * c_row + j, c_row);
            else
                amx_clear();
            for (int t = 0; t < depth; t += AMX_DEPTH) amx_step(a + i * a_row + t, a_row, b + t * b_row + j, b_row);
            amx_store(c + i * c_row + j, c_row);
        }
    }
    amx_barrier();
}

// What amx_product() copies for a block of tiles. Its rows are the places of a grid that is wider than the product's by
// the reach of the taps, so that a tap reads one row of registers behind the other, over the ends of lines, from one
// copy of the pixels with their borders; what the places past a line's end sum is not written. Taps whose pixels are
// whole steps apart share a copy. Where they read more than a pixel each (the stem's) each has its own.
typedef struct {
    long line, places;  // of a line of the wider grid; of all of it up to the last pixel
    long reach;         // places after a block's last that are copied, of all copies together
    size_t row;         // units from one place to the next
    int count;
    struct {
        int y, x;  // place (i, j) has the pixel (step * i + y, step * j + x) of source
        long reach;
    } copies[MAX_KERNEL * MAX_KERNEL];
    struct {
        int copy, y, x;  // the tap's pixel for the first row: place (y, x) of this copy
    } taps[MAX_KERNEL * MAX_KERNEL];
} AmxRows;

static inline long amx_place(const AmxRows *rows, int tap) {
    return rows->taps[tap].y * rows->line + rows->taps[tap].x;
}

static AmxRows amx_rows(const Product *p, int shared) {
    AmxRows rows = {.row = amx_stride(p->run)};
    int span = 0;
    for (int t = 0; t < p->num_taps; t++) {
        const Tap tap = p->taps[t];
        int at = 0;
        while (at < rows.count &&
               !(shared && (tap.y - rows.copies[at].y) % p->step == 0 && (tap.x - rows.copies[at].x) % p->step == 0))
            at++;
        if (at == rows.count) rows.copies[rows.count].y = tap.y, rows.copies[rows.count++].x = tap.x;
        if (tap.y < rows.copies[at].y) rows.copies[at].y = tap.y;
        if (tap.x < rows.copies[at].x) rows.copies[at].x = tap.x;
        rows.taps[t].copy = at;
    }
    for (int t = 0; t < p->num_taps; t++) {
        const int at = rows.taps[t].copy;
        rows.taps[t].y = (p->taps[t].y - rows.copies[at].y) / p->step;
        rows.taps[t].x = (p->taps[t].x - rows.copies[at].x) / p->step;
        if (rows.taps[t].x > span) span = rows.taps[t].x;
    }
    rows.line = p->grid_width + span, rows.places = p->grid_height * rows.line - span;
    for (int t = 0; t < p->num_taps; t++) {
        long *reach = &rows.copies[rows.taps[t].copy].reach;
        *reach = larger(*reach, amx_place(&rows, t));
    }
    for (int i = 0; i < rows.count; i++) rows.reach += rows.copies[i].reach;
    return rows;
}

// Tiles whose copies AMX_COPY holds.
static long amx_tiles(const AmxRows *rows) {
    const long units = (long)AMX_COPY - rows->reach * (long)rows->row;
    return units < 0 ? 0 : units / (rows->count * (long)rows->row * AMX_TILE);
}

// The products that amx_product() can make: whole rows of registers, and a tile of copied rows fits.
static int amx_fits(const Product *p) {
    return p->half && p->num_taps > 0 && p->run > 0 && p->run % AMX_DEPTH == 0 &&
           amx_stride(p->run) * p->num_taps * AMX_TILE <= AMX_COPY && amx_usable();
}

// Places first .. first + count - 1 of a copy, zero outside the image.
static void amx_copy(real *to, const AmxRows *rows, int copy, const Product *p, long first, long count) {
    const long line_length = p->width * p->pixel_bytes, length = p->run * (long)sizeof(real), row = (long)rows->row;
    const long step = p->step * p->pixel_bytes, first_start = rows->copies[copy].x * p->pixel_bytes;
    long y = first / rows->line * p->step + rows->copies[copy].y, left = rows->line - first % rows->line;
    long start = first_start + first % rows->line * step;
    while (count > 0) {
        const char *line = y >= 0 && y < p->height ? p->source + y * line_length : NULL;
        const long end = line ? line_length - length : -1, places = smaller(left, count);
        for (long i = 0; i < places; i++, start += step, to += row) {
            if (start < 0 || start > end)
                copy_clipped(to, line, start, length, line_length);
            else
                for (long at = 0; at < length; at += VECTOR_BYTES)
                    vec_store((real *)((char *)to + at), (vec)load_pairs((const real *)(line + start + at)));
        }
        count -= places, y += p->step, start = first_start, left = rows->line;
    }
}

// finish_rows() of an AMX tile for what a forward pass asks for: whole lines of bf16, known where it is compiled.
INLINE void amx_finish_lines(const Product *p, const real *sums, const size_t *out_rows, int first_column, int add,
                             int relu) {
    const Epilogue e = p->epilogue;
    const vec low = vec_load(e.bias + first_column), high = vec_load(e.bias + first_column + LANES);
    for (int i = 0; i < AMX_TILE; i++, sums += AMX_TILE) {
        if (out_rows[i] == NO_ROW) continue;
        const size_t at = out_rows[i] * p->out_channels + first_column;
        vec line[2] = {vec_load(sums) + low, vec_load(sums + LANES) + high};
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            if (add) line[j] += load_lanes(e.add, at + j * LANES, 1);
            if (relu) line[j] = vec_relu(line[j]);
        }
        store_lanes(p->out, at, line[0], 1);
        store_lanes(p->out, at + LANES, line[1], 1);
    }
}

// finish_rows() of an AMX tile.
static void amx_finish(const Product *p, const real *sums, const size_t *out_rows, int first_column) {
    const Epilogue e = p->epilogue, half = {e.bias, e.add, e.relu, e.mask, 1};  // as the compiler knows it
    if (!e.half)
        finish_rows(p->out, p->out_channels, sums, AMX_TILE, out_rows, AMX_TILE, first_column, e);
    else if (!e.bias || e.mask || p->out_channels - first_column < AMX_TILE)
        finish_rows(p->out, p->out_channels, sums, AMX_TILE, out_rows, AMX_TILE, first_column, half);
    else if (e.add && e.relu)
        amx_finish_lines(p, sums, out_rows, first_column, 1, 1);
    else if (e.add)
        amx_finish_lines(p, sums, out_rows, first_column, 1, 0);
    else if (e.relu)
        amx_finish_lines(p, sums, out_rows, first_column, 0, 1);
    else
        amx_finish_lines(p, sums, out_rows, first_column, 0, 0);
}

// gather_tile() of a block of tiles, `places` places from number `first` on: makes its copies and says where in them
// each tap reads, and each place's out row.
static void amx_gather(real *copied, AmxTap *taps, size_t *out_rows, const Product *p, const AmxRows *rows, long first,
                       long places) {
    size_t at = 0;
    for (int i = 0; i < rows->count; i++) {
        const long count = places + rows->copies[i].reach;
        amx_copy(copied + at, rows, i, p, first, count);
        for (int t = 0; t < p->num_taps; t++)
            if (rows->taps[t].copy == i)
                taps[t] = (AmxTap){at + (size_t)amx_place(rows, t) * rows->row, p->taps[t].offset};
        at += (size_t)count * rows->row;
    }
    long y = first / rows->line, x = first % rows->line;
    for (long i = 0; i < places; i++) {
        out_rows[i] = x < p->grid_width && y < p->grid_height ? out_row(p, y, x) : NO_ROW;
        if (++x == rows->line) x = 0, y++;
    }
}

// Multiplies `tiles` tiles of copied rows, `row` units apart, by the columns first_column .. last_column - 1, counted
// in tiles, and writes them, each while the next one is multiplied.
static void amx_multiply_tiles(const Product *p, const real *copied, size_t row, const AmxTap *taps,
                               const size_t *out_rows, long tiles, int first_column, int last_column) {
    static __thread real sums[2][AMX_TILE * AMX_TILE] __attribute__((aligned(64)));
    const int num_taps = p->num_taps, run = p->run;  // stores could change them where they are
    // Where a tile's rows stay in the nearest cache they take all columns, and the result is written in one piece; else
    // a panel takes all tiles.
    const int by_rows = num_taps * run <= AMX_ROW;
    const long wide = last_column - first_column, turns = tiles * wide;
    const long tile_turns = by_rows ? wide : 1, column_turns = by_rows ? 1 : tiles;
    long column = 0, at = 0;
    for (long turn = 0; turn <= turns; turn++) {
        const long column_before = column, at_before = at;
        if (turn < turns) {
            column = (first_column + turn / column_turns % wide) * AMX_TILE;
            at = turn / tile_turns % tiles * AMX_TILE;
            prefetch_tile(p, out_rows + at, AMX_TILE, (int)column, AMX_TILE, 0);
            amx_multiply(sums[turn % 2], copied + at * row, row,
                         p->packed + column / TILE_COLUMNS * p->panel_size + column % TILE_COLUMNS, TILE_COLUMNS, taps,
                         num_taps, run);
        }
        if (turn > 0) amx_finish(p, sums[(turn - 1) % 2], out_rows + at_before, (int)column_before);
    }
}

// product() where amx_fits(). A task copies what a group of tiles reads and multiplies it by a part of the columns,
// whose weights have room in the L2 cache; by a smaller one where there are few rows.
static void amx_product(const Product *p) {
    static __thread real copied[AMX_COPY] __attribute__((aligned(64)));
    AmxRows rows = amx_rows(p, p->run * (long)sizeof(real) == p->pixel_bytes);
    if (amx_tiles(&rows) < 1) rows = amx_rows(p, 0);
    const long threads = omp_get_max_threads(), weights = (long)p->num_taps * p->run * p->out_channels;
    const long tiles = (long)divide_up(rows.places, AMX_TILE), reach = rows.reach / AMX_TILE;
    const long group = weights > AMX_WEIGHTS ? AMX_GROUP_MOST : AMX_GROUP + 2 * reach;
    const long wanted = smaller(smaller(group, AMX_GROUP_MOST), amx_tiles(&rows));
    const long blocks = shared_blocks(larger(divide_up(tiles, wanted), smaller(divide_up(tiles, AMX_GROUP), threads)));
    const long columns = (long)divide_up(p->out_channels, AMX_TILE);
    const int parts = (int)smaller(larger(divide_up(threads, blocks), divide_up(weights, AMX_WEIGHTS)), columns);
    Tasks tasks = share_tasks(blocks * parts);
#pragma omp parallel
    for (long task; (task = take_task(&tasks)) >= 0;) {
        const long block = task / parts, part = task % parts;
        const long first_tile = block * tiles / blocks, count = (block + 1) * tiles / blocks - first_tile;
        size_t out_rows[AMX_GROUP_MOST * AMX_TILE];
        AmxTap taps[MAX_KERNEL * MAX_KERNEL];
        amx_gather(copied, taps, out_rows, p, &rows, first_tile * AMX_TILE, count * AMX_TILE);
        amx_begin();
        amx_multiply_tiles(p, copied, rows.row, taps, out_rows, count, (int)(part * columns / parts),
                           (int)((part + 1) * columns / parts));
        amx_end();
    }
}
#else
static int amx_usable(void) { return 0; }
static void amx_begin(void) {}
static void amx_end(void) {}
static void amx_matmul(real *c, size_t c_row, const real *a, size_t a_row, const real *b, size_t b_row, int rows,
                       int columns, int depth, int add) {
    (void)c, (void)c_row, (void)a, (void)a_row, (void)b, (void)b_row, (void)rows, (void)columns, (void)depth, (void)add;
}
static int amx_fits(const Product *p) { return (void)p, 0; }
static void amx_product(const Product *p) { (void)p; }
static void amx_only_multiply(long units) { (void)units; }
#endif

// Parts in which the panels are shared out: one where threads have blocks enough, or there is one thread.
static int panel_parts(long blocks, int panels) {
    const int threads = omp_get_max_threads(), parts = threads > 1 ? (int)divide_up(4 * threads, blocks) : 1;
    return (int)larger(smaller((size_t)parts, (size_t)panels), 1);
}

// A task is BLOCK_TILES tiles of rows by all panels, so that rows and the panel in use stay in the L2 cache; where
// there are few rows, the panels are shared out as well. Weights from beyond that cache are used in pieces, each by all
// tiles while they ask for the next one.
static void product(Product *p) {
    long rows = (long)p->grid_height * p->grid_width;
    if (rows <= 0) return;
    if (amx_fits(p)) {
        amx_product(p);
        return;
    }
    p->low_y = p->high_y = p->low_x = p->high_x = 0;
    for (int t = 0; t < p->num_taps; t++) {
        Tap *tap = &p->taps[t];
        const int last_x = tap->x + (int)divide_up(p->run * sizeof(real), p->pixel_bytes) - 1;
        tap->distance = ((long)tap->y * p->width + tap->x) * p->pixel_bytes;
        if (tap->y < p->low_y) p->low_y = tap->y;
        if (tap->y > p->high_y) p->high_y = tap->y;
        if (tap->x < p->low_x) p->low_x = tap->x;
        if (last_x > p->high_x) p->high_x = last_x;
    }
    const long tiles = (long)divide_up(rows, TILE_ROWS), blocks = shared_blocks(divide_up(tiles, BLOCK_TILES));
    const int panels = (int)divide_up(p->out_channels, TILE_COLUMNS), parts = panel_parts(blocks, panels);
    const int cold = p->num_taps > 0 && weights_cold(blocks, panels * p->panel_size);
    const int pieces = cold ? p->num_taps * (int)divide_up(p->run, PIECE_UNITS) : 1;
    const int row_turns = CACHE_LINE * p->num_taps / (TILE_ROWS * p->step * (int)sizeof(real));
    Tasks tasks = share_tasks(blocks * parts);
#pragma omp parallel
    for (long task; (task = take_task(&tasks)) >= 0;) {
        const long block = task / parts;
        const int part = (int)(task % parts);
        real sums[BLOCK_TILES][TILE_ROWS * TILE_COLUMNS] __attribute__((aligned(VECTOR_BYTES)));
        Run runs[BLOCK_TILES][MAX_KERNEL * MAX_KERNEL];
        size_t out_rows[BLOCK_TILES][TILE_ROWS];
        real edges[BLOCK_TILES][TILE_ROWS * MAX_PATCH];
        long first_tile = block * tiles / blocks, last_tile = (block + 1) * tiles / blocks;
        for (long tile = first_tile; tile < last_tile; tile++) {
            long at = tile - first_tile;
            gather_tile(runs[at], out_rows[at], edges[at], p, tile * TILE_ROWS);
        }
        const int first_turn = part * panels / parts * pieces, last_turn = (part + 1) * panels / parts * pieces;
        Piece next = product_piece(p, first_turn, pieces);
        for (int turn = first_turn; turn < last_turn; turn++) {
            const Piece piece = next;
            next = product_piece(p, turn + 1 < last_turn ? turn + 1 : first_turn, pieces);
            const real *weights = p->packed + next.panel * p->panel_size + next.first * (size_t)TILE_COLUMNS;
            for (long tile = first_tile; tile < last_tile; tile++) {
                const long left = rows - tile * TILE_ROWS, at = tile - first_tile;
                const int count = left < TILE_ROWS ? (int)left : TILE_ROWS;
                Ahead ahead = NOTHING_AHEAD;
                if (cold)
                    ahead = weights_ahead(weights + p->taps[next.tap].offset, next.length, at, last_tile - first_tile);
                else if (turn == first_turn && p->num_taps > 0)  // the rows of the next tile
                    ahead = (Ahead){(const char *)(runs[at][p->num_taps - 1].rows[TILE_ROWS - 1] + p->run), row_turns};
                if (p->half)
                    product_tile(p, runs[at], out_rows[at], sums[at], count, piece, ahead, 1);
                else
                    product_tile(p, runs[at], out_rows[at], sums[at], count, piece, ahead, 0);
            }
        }
    }
}

// y: (out height * out width, out_channels), by the epilogue, whose add and mask have y's shape.
// x: (height * width, in_channels). packed: by pack_weights(). half: x and packed are bf16.
static void conv_forward(void *y, const void *x, int height, int width, const real *packed, Epilogue epilogue,
                         ConvShape s, int half) {
    Product p;
    const PatchRuns runs = patch_runs(s, half);
    const long inner = (long)runs.count * runs.units;
    // A kernel with few inputs (the stem: 3 channels) reads the pixels of a whole kernel row, which lie side by side.
    const int across = s.dilation == 1 && inner <= MAX_PATCH ? 1 : s.kernel;
    p.source = (const char *)x, p.height = height, p.width = width, p.half = half;
    p.pixel_bytes = s.in_channels * (long)number_bytes(half);
    p.grid_height = conv_size(height, s), p.grid_width = conv_size(width, s), p.step = s.stride;
    p.num_taps = s.kernel * across;
    p.run = (int)(inner / p.num_taps);
    for (int t = 0; t < p.num_taps; t++) {
        p.taps[t].y = t / across * s.dilation - s.padding, p.taps[t].x = t % across * s.dilation - s.padding;
        p.taps[t].offset = (size_t)t * p.run * TILE_COLUMNS;
    }
    p.packed = packed, p.panel_size = inner * TILE_COLUMNS;
    p.zeros = packed + divide_up(s.out_channels, TILE_COLUMNS) * p.panel_size;
    p.out = y, p.out_width = p.grid_width, p.out_channels = s.out_channels;
    p.spacing = 1, p.first_y = 0, p.first_x = 0;
    p.epilogue = epilogue;
    product(&p);
}

// dx: (height * width, in_channels), by the epilogue, whose add and mask have dx's shape. dy: (out height * out width,
// out_channels). packed: by pack_weights(). half: dy and packed are bf16, out_channels is even.
//
// Pixel (iy, ix) was read by tap (ky, kx) of output (oy, ox) where oy * stride = iy + padding - ky * dilation, and the
// same in x. With stride 2 a tap fits only every second row: the pixels fall into stride * stride classes by their
// remainders, each with its own taps and no wasted products.
static void conv_backward_data(void *dx, const void *dy, int height, int width, const real *packed, Epilogue epilogue,
                               ConvShape s, int half) {
    Product p;
    if (half) s.out_channels /= 2;
    size_t inner = (size_t)s.kernel * s.kernel * s.out_channels;
    p.source = (const char *)dy, p.height = conv_size(height, s), p.width = conv_size(width, s), p.half = half;
    p.step = 1, p.run = s.out_channels, p.pixel_bytes = p.run * (long)sizeof(real);
    p.packed = packed, p.panel_size = inner * TILE_COLUMNS;
    p.zeros = packed + divide_up(s.in_channels, TILE_COLUMNS) * p.panel_size;
    p.out = dx, p.out_width = width, p.out_channels = s.in_channels, p.spacing = s.stride;
    p.epilogue = epilogue;
    for (p.first_y = 0; p.first_y < s.stride; p.first_y++) {
        for (p.first_x = 0; p.first_x < s.stride; p.first_x++) {
            p.grid_height = (height - p.first_y + s.stride - 1) / s.stride;
            p.grid_width = (width - p.first_x + s.stride - 1) / s.stride;
            p.num_taps = 0;
            for (int ky = 0; ky < s.kernel; ky++) {
                for (int kx = 0; kx < s.kernel; kx++) {
                    int y = p.first_y + s.padding - ky * s.dilation, x = p.first_x + s.padding - kx * s.dilation;
                    if (y % s.stride != 0 || x % s.stride != 0) continue;
                    Tap *tap = &p.taps[p.num_taps++];
                    tap->y = y / s.stride, tap->x = x / s.stride;
                    tap->offset = (size_t)(ky * s.kernel + kx) * s.out_channels * TILE_COLUMNS;
                }
            }
            product(&p);
        }
    }
}

// How backward weight is shared out: dw (out_channels, patch) in pieces of rows by columns, and where these are few,
// the pixels in slices, each with a dw of its own, added up at the end. By shapes alone, never by threads.
typedef struct {
    int rows, columns, row_pieces, column_pieces, slices;
} WeightPlan;

// Pieces of at most piece_rows by piece_columns, of whole tiles of tile_rows rows; slices of at least slice_units of
// what is summed over.
static WeightPlan plan_weight(int rows, long columns, int piece_rows, int piece_columns, int tile_rows, long units,
                              int slice_units) {
    WeightPlan plan;
    size_t row_tiles = divide_up(rows, tile_rows), panels = divide_up(columns, TILE_COLUMNS);
    plan.row_pieces = (int)divide_up(rows, piece_rows);
    plan.column_pieces = (int)divide_up(columns, piece_columns);
    plan.slices = (int)divide_up(WEIGHT_PIECES, (size_t)plan.row_pieces * plan.column_pieces);
    if (plan.slices > (long)divide_up(units, slice_units)) plan.slices = (int)divide_up(units, slice_units);
    while (plan.row_pieces * plan.column_pieces * plan.slices < WEIGHT_PIECES / 4 &&
           rows / plan.row_pieces > 10 * TILE_ROWS)
        plan.row_pieces *= 2;  // few rows and a small dw: smaller pieces are slower, but let two threads work
    plan.rows = (int)divide_up(row_tiles, plan.row_pieces) * tile_rows;
    plan.columns = (int)divide_up(panels, plan.column_pieces) * TILE_COLUMNS;
    plan.row_pieces = (int)divide_up(rows, plan.rows);
    plan.column_pieces = (int)divide_up(columns, plan.columns);
    return plan;
}

// units: of the inner dimension, pixels or (bf16) pairs of pixels.
static WeightPlan plan_backward_weight(ConvShape s, long units, int amx) {
    const long columns = (long)patch_size(s);
    if (amx)
        return plan_weight(s.out_channels, columns, AMX_WEIGHT_ROWS, AMX_WEIGHT_COLUMNS, AMX_TILE, units, AMX_PIXELS);
    return plan_weight(s.out_channels, columns, WEIGHT_ROWS, WEIGHT_COLUMNS, TILE_ROWS, units, SLICE_PIXELS);
}

// The input of a backward weight, and one piece of it: rows first_row .. first_row + rows of dy's channels by `columns`
// of the patch (taps and in channels), over the pixels first .. last. x and dy are bf16 where half. For Winograd's
// columns are in channels, and first .. last are tiles.
typedef struct {
    const void *x, *dy;
    int height, width, half;
    ConvShape shape;
    WeightPlan plan;
    long first, last, first_column;
    int first_row, rows, columns;
    int once;  // dw is written and not read again soon: it may go past the caches
} WeightPiece;

// Makes one piece of dw (out_channels, patch): += if `add`, else =. dbias (out_channels) likewise, or NULL. memory: the
// thread's own.
typedef void WeightPieceFunction(real *dw, real *dbias, int add, const WeightPiece *p, real *memory);

// to[i] += the sum over k < count of slices[k * size + i], for i < n. Called by all threads.
static void add_slices(real *to, const real *slices, long size, int count, long n) {
#pragma omp for schedule(static)
    for (long i = 0; i < n; i += LANES) {
        vec sum = load_rest(slices, i, n - i, 0);
        for (int k = 1; k < count; k++) sum += load_rest(slices, k * size + i, n - i, 0);
        store_rest(to, i, load_rest(to, i, n - i, 0) + sum, n - i, 0);
    }
}

// dw += (or =) and dbias (or NULL) likewise all pieces of `whole`, of which only what comes before `first` counts:
// `columns` and `units`, what is summed over, are shared out by its plan. workspace: weight_workspace() reals, `memory`
// of them for a thread.
static void share_weight(real *dw, real *dbias, int add, const WeightPiece *whole, long columns, long units,
                         WeightPieceFunction *make, real *workspace, size_t memory) {
    const WeightPlan plan = whole->plan;
    const int rows = whole->shape.out_channels;
    const long count = rows * (long)patch_size(whole->shape), size = count + rows;  // a slice's own dw and dbias
    real *slices = workspace, *memories = workspace + (plan.slices - 1) * size;     // slice 0 is made in dw itself
    Tasks tasks = share_tasks((long)plan.slices * plan.row_pieces * plan.column_pieces);
#pragma omp parallel
    {
        for (long task; (task = take_task(&tasks)) >= 0;) {
            const long column_piece = task % plan.column_pieces, row_pieces = task / plan.column_pieces;
            const long row_piece = row_pieces % plan.row_pieces, slice = row_pieces / plan.row_pieces;
            WeightPiece p = *whole;
            p.once = !add && plan.slices == 1;
            p.first = units * slice / plan.slices, p.last = units * (slice + 1) / plan.slices;
            p.first_row = (int)row_piece * plan.rows, p.first_column = column_piece * plan.columns;
            p.rows = rows - p.first_row < plan.rows ? rows - p.first_row : plan.rows;
            p.columns = columns - p.first_column < plan.columns ? (int)(columns - p.first_column) : plan.columns;
            real *own = slice ? slices + (slice - 1) * size : dw;
            real *own_bias = !dbias || column_piece ? NULL : slice ? own + count : dbias;
            make(own, own_bias, add && slice == 0, &p, memories + (size_t)omp_get_thread_num() * memory);
        }
#pragma omp barrier
        if (plan.slices > 1) {
            add_slices(dw, slices, size, plan.slices - 1, count);
            if (dbias) add_slices(dbias, slices + count, size, plan.slices - 1, rows);
        }
    }
}

// Reals of workspace for share_weight() with a plan of no more slices, on up to `threads` threads.
static size_t weight_workspace(ConvShape s, WeightPlan plan, int threads, size_t memory) {
    return threads * memory + (plan.slices - 1) * s.out_channels * (patch_size(s) + 1);
}

// Reals from one tile to the next in a copied block of dy: an odd number of cache lines, because a power of two would
// put one pixel's numbers for all tiles into the same few lines of the L1 cache.
static inline size_t tile_stride(int units) { return (divide_up((size_t)units * COPIED_ROWS, LANES) | 1) * LANES; }

// Reals that one thread needs for its copies of dy and of a panel.
static inline size_t weight_block(void) {
    return larger(divide_up(WEIGHT_ROWS, TILE_ROWS) * tile_stride(BLOCK_PIXELS) + BLOCK_PIXELS * TILE_COLUMNS,
                  AMX_WEIGHT_ROWS * (AMX_PIXELS + AMX_DEPTH) + AMX_PIXELS * TILE_COLUMNS);
}

// Reals of workspace for conv_backward_weight() on up to `threads` threads.
static size_t conv_backward_weight_workspace(ConvShape s, int threads) {
    const long units = (long)WEIGHT_PIECES * AMX_PIXELS;  // as many slices as there can be
    return larger(weight_workspace(s, plan_backward_weight(s, units, 0), threads, weight_block()),
                  weight_workspace(s, plan_backward_weight(s, units, amx_usable()), threads, weight_block()));
}

typedef uint16_t copied_half __attribute__((vector_size(COPIED_ROWS * 2), aligned(2), may_alias));
typedef uint32_t copied_pairs __attribute__((vector_size(COPIED_ROWS * 4), aligned(4), may_alias));
typedef float copied_floats __attribute__((vector_size(COPIED_ROWS * 4), aligned(4), may_alias));
typedef real copied_rows __attribute__((vector_size(COPIED_ROWS * sizeof(real)), aligned(4), may_alias));

// block[tile][pixel][i] = dy[first_pixel + pixel][first_row + tile * TILE_ROWS + i], zero past the last row; half:
// pairs of two pixels' numbers, an odd last pixel's with zero.
INLINE void copy_gradients(real *block, const WeightPiece *p, long first_pixel, int pixels, int half) {
    const int step = half ? 2 : 1, units = (pixels + step - 1) / step;
    const size_t bytes = number_bytes(half), stride = p->shape.out_channels * bytes;
    for (int unit = 0; unit < units; unit++) {
        const char *pixel = (const char *)p->dy + (first_pixel + unit * step) * stride + p->first_row * bytes;
        const int both = unit * step + 1 < pixels;
        const char *next = both ? pixel + stride : pixel;
        const uint32_t keep = both ? 0xFFFF0000u : 0;
        real *out = block + unit * COPIED_ROWS;
        for (int row = 0; row < p->rows; row += TILE_ROWS, out += tile_stride(units)) {
            real numbers[2][COPIED_ROWS];
            const void *even = pixel + row * bytes, *odd = next + row * bytes;
            if (row + COPIED_ROWS > p->rows) {
                memset(numbers, 0, sizeof numbers);
                even = memcpy(numbers[0], even, (p->rows - row) * bytes);
                odd = memcpy(numbers[1], odd, (p->rows - row) * bytes);
            }
            if (half)
                *(copied_pairs *)out = __builtin_convertvector(*(const copied_half *)even, copied_pairs) |
                                       (__builtin_convertvector(*(const copied_half *)odd, copied_pairs) << 16 & keep);
            else
                *(copied_rows *)out = *(const copied_rows *)even;
        }
    }
}

// dbias[row] += (or =) the sum of dy over the pixels of a block that copy_gradients() wrote.
INLINE void sum_gradients(real *dbias, const real *block, int rows, int units, int add, int half) {
    for (int row = 0; row < rows; row += TILE_ROWS, block += tile_stride(units)) {
        copied_rows sum = {0};
        for (int unit = 0; unit < units; unit++) {
            const real *at = block + unit * COPIED_ROWS;
            if (half) {
                const copied_pairs two = *(const copied_pairs *)at;
                sum += __builtin_convertvector((copied_floats)(two << 16) + (copied_floats)(two & 0xFFFF0000u),
                                               copied_rows);
            } else {
                sum += *(const copied_rows *)at;
            }
        }
        for (int i = 0; i < TILE_ROWS && row + i < rows; i++) dbias[row + i] = (add ? dbias[row + i] : 0) + sum[i];
    }
}

// Pairs of `length` numbers, from even_first and odd_first on, of the two lines, zero where that is outside [0,
// line_length) or a line is NULL.
INLINE void pair_clipped(real *out, const bf16 *even, long even_first, const bf16 *odd, long odd_first, long length,
                         long line_length) {
    if (length >= LANES && even && even_first >= 0 && even_first + length <= line_length && odd && odd_first >= 0 &&
        odd_first + length <= line_length) {
        even += even_first, odd += odd_first;
        for (long j = 0; j < length; j += LANES) {
            const long at = j < length - LANES ? j : length - LANES;  // the last vector may overlap the one before
            vec_store(out + at, (vec)join_pairs(even + at, odd + at));
        }
        return;
    }
    for (long j = 0; j < length; j++) {
        const long low = even_first + j, high = odd_first + j;
        const uint32_t lower = even && low >= 0 && low < line_length ? even[low] : 0;
        const uint32_t upper = odd && high >= 0 && high < line_length ? odd[high] : 0;
        ((pair_memory *)out)[j] = lower | upper << 16;
    }
}

// panel[m][j] = column first_column + j of the patch that output pixel first_pixel + m read from x, for m < pixels and
// j < TILE_COLUMNS as far as the patch goes; zero outside the image. half: pairs of two pixels' numbers, an odd last
// pixel's with zero.
INLINE void copy_patches(real *panel, const WeightPiece *p, long first_pixel, int pixels, long first_column, int half) {
    const ConvShape s = p->shape;
    const int merged = s.dilation == 1 ? s.kernel : 1, out_width = conv_size(p->width, s);
    const long run = (long)merged * s.in_channels, line_length = (long)p->width * s.in_channels;
    const long rest = (long)patch_size(s) - first_column, columns = rest < TILE_COLUMNS ? rest : (long)TILE_COLUMNS;
    const size_t bytes = number_bytes(half);
    long length;  // of a stretch of columns that lie side by side in x
    for (long column = 0; column < columns; column += length) {
        const long tap = (first_column + column) / run * merged, from = (first_column + column) % run;
        length = run - from < columns - column ? run - from : columns - column;
        int y = (int)(first_pixel / out_width) * s.stride - s.padding + (int)(tap / s.kernel) * s.dilation;
        int out_x = (int)(first_pixel % out_width);
        const char *even = NULL;
        long even_first = 0;
        for (long m = 0; m < pixels; m++) {
            const char *line = y >= 0 && y < p->height ? (const char *)p->x + y * line_length * bytes : NULL;
            const long pixel = (long)out_x * s.stride - s.padding + tap % s.kernel * s.dilation;
            const long first = pixel * s.in_channels + from;
            real *out = panel + (half ? m / 2 : m) * TILE_COLUMNS + column;
            if (++out_x == out_width) out_x = 0, y += s.stride;
            if (!half) {
                copy_clipped(out, line, first * bytes, length * bytes, line_length * bytes);
            } else if (m % 2) {
                pair_clipped(out, (const bf16 *)even, even_first, (const bf16 *)line, first, length, line_length);
            } else if (m == pixels - 1) {
                pair_clipped(out, (const bf16 *)line, first, NULL, 0, length, line_length);
            } else {
                even = line, even_first = first;
            }
        }
    }
}

// Asks for memory that will be read soon to be brought into the L2 cache.
INLINE void prefetch(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

// The same for dy's rows of the pixels first .. last, and for what copy_patches() will read of a panel.
INLINE void prefetch_gradients(const WeightPiece *p, long first, long last, int half) {
    const size_t bytes = number_bytes(half);
    for (long pixel = first; pixel < last; pixel++)
        prefetch((const char *)p->dy + (pixel * p->shape.out_channels + p->first_row) * bytes, p->rows * bytes);
}
INLINE void prefetch_patches(const WeightPiece *p, long first, long last, long first_column, int half) {
    const ConvShape s = p->shape;
    const int out_width = conv_size(p->width, s), tap = (int)(first_column / s.in_channels);
    const int from = (int)(first_column % s.in_channels), left = s.in_channels - from;
    const int tap_y = tap / s.kernel * s.dilation - s.padding, tap_x = tap % s.kernel * s.dilation - s.padding;
    const size_t bytes = number_bytes(half), length = left < TILE_COLUMNS ? left : TILE_COLUMNS;
    for (long pixel = first; pixel < last; pixel++) {
        const long y = pixel / out_width * s.stride + tap_y, x = pixel % out_width * s.stride + tap_x;
        if (y < 0 || y >= p->height || x < 0 || x >= p->width) continue;
        prefetch((const char *)p->x + ((y * p->width + x) * s.in_channels + from) * bytes, length * bytes);
    }
}

// dw[i][j] += (or =) the sum over units of rows[unit][i] * panel[unit][j] for i < rows_left and j < columns_left, at
// most a tile. rows: a tile of copy_gradients(). inner: of dw's rows. once: it is not read again soon.
INLINE void weight_tile(real *dw, size_t inner, const real *rows, const real *panel, size_t panel_step, int units,
                        int rows_left, int columns_left, int add, int once, int half) {
    vec tile[TILE_ROWS][TILE_VECTORS];
    Run run;
    for (int i = 0; i < TILE_ROWS; i++) run.rows[i] = rows + i;
    run.offset = 0;
    clear_tile(tile);
    multiply_tile(tile, rows_left, &run, 1, 0, units, COPIED_ROWS, panel, panel_step, NOTHING_AHEAD, half);
    if (rows_left >= TILE_ROWS && columns_left >= TILE_COLUMNS) {
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++) {
#pragma GCC unroll 8
            for (int j = 0; j < TILE_VECTORS; j++) {
                real *out = dw + i * inner + j * LANES;
                if (add)
                    vec_store(out, vec_load(out) + tile[i][j]);
                else if (once)
                    vec_stream(out, tile[i][j]);
                else
                    vec_store(out, tile[i][j]);
            }
        }
        return;
    }
    real edge[TILE_ROWS * TILE_COLUMNS];
    spill_tile(edge, tile);
    for (int i = 0; i < rows_left && i < TILE_ROWS; i++)
        for (int j = 0; j < columns_left && j < TILE_COLUMNS; j++)
            dw[i * inner + j] = (add ? dw[i * inner + j] : 0) + edge[i * TILE_COLUMNS + j];
}

// dw (out_channels, patch), where the piece lies in it: += if `add`, else =. dbias (out_channels) likewise, or NULL.
// block: weight_block() reals for the copies.
//
// A panel of x is copied, unless it lies in rows of its own already that do not share a few lines of the L1 cache as
// rows a page apart do, and then meets dy's tiles one after another. Memory
// is the bottleneck unless it is asked for in time: while a tile is multiplied, a share of the next block's dy and of
// the next panel of x is on its way to the L2 cache, and during the first block dw as well, unless it is written only
// once: then it goes past the caches.
INLINE void weight_piece_tiles(real *dw, real *dbias, int add, const WeightPiece *p, real *block, int half) {
    const ConvShape s = p->shape;
    const int step = half ? 2 : 1, tiles = (int)divide_up(p->rows, TILE_ROWS);
    const long inner = (long)patch_size(s), all_units = (long)divide_up(p->last - p->first, step);
    const long blocks = (long)divide_up(all_units, BLOCK_PIXELS);
    const int panels = (int)divide_up(p->columns, TILE_COLUMNS), plain = s.kernel == 1 && s.stride == 1 && !s.padding;
    const int in_rows = plain && !half && inner * (long)sizeof(real) < PAGE;
    real *copied = block + tiles * tile_stride(BLOCK_PIXELS);
    long start = p->first, end;
    for (long b = 0; b < blocks; b++, start = end) {
        end = b == blocks - 1 ? p->last : p->first + all_units * (b + 1) / blocks * step;
        const int pixels = (int)(end - start), units = (pixels + step - 1) / step, adds = add || b > 0;
        const int once = p->once && blocks == 1;
        const long ahead = end + pixels < p->last ? pixels : p->last - end;  // pixels of the next block
        copy_gradients(block, p, start, pixels, half);
        if (dbias) sum_gradients(dbias + p->first_row, block, p->rows, units, adds, half);
        for (int panel = 0; panel < panels; panel++) {
            const long column = p->first_column + panel * TILE_COLUMNS;
            const int in_place = in_rows && column + TILE_COLUMNS <= inner, last = panel == panels - 1;
            const real *patches = in_place ? (const real *)p->x + start * inner + column : copied;
            const long next = last ? end : start, count = last ? ahead : pixels;  // the next panel's pixels
            const long next_column = last ? p->first_column : column + TILE_COLUMNS;
            if (!in_place) copy_patches(copied, p, start, pixels, column, half);
            for (long tile = 0; tile < tiles; tile++) {
                const long turn = panel * tiles + tile, turns = (long)panels * tiles;
                const int row = (int)tile * TILE_ROWS;
                real *out = dw + (p->first_row + row) * inner + column;
                prefetch_gradients(p, end + ahead * turn / turns, end + ahead * (turn + 1) / turns, half);
                prefetch_patches(p, next + count * tile / tiles, next + count * (tile + 1) / tiles, next_column, half);
                for (int i = 0; b == 0 && !once && i < TILE_ROWS; i++)
                    prefetch(out + i * inner, TILE_COLUMNS * sizeof(real));
                weight_tile(out, inner, block + tile * tile_stride(units), patches,
                            in_place ? (size_t)inner : (size_t)TILE_COLUMNS, units, p->rows - row,
                            p->columns - panel * TILE_COLUMNS, adds, once, half);
            }
        }
    }
    stream_end();
}

#ifdef __AMX_BF16__
// The same of copy_gradients(), as amx_multiply() takes rows: block[out channel][unit], a row amx_stride(units), zero
// past the last row and the last pixel up to `units`, whole registers; and of sum_gradients(): dbias (of the first row)
// += or = the sum over the pixels, or NULL.
static void amx_copy_gradients(real *block, real *dbias, const WeightPiece *p, long first_pixel, int pixels, int units,
                               int add) {
    const size_t stride = p->shape.out_channels;
    const int rows = (int)divide_up(p->rows, AMX_TILE) * AMX_TILE;
    vec sums[AMX_WEIGHT_ROWS / AMX_DEPTH];
    for (int row = 0; row < rows; row += AMX_DEPTH) sums[row / AMX_DEPTH] = fill(0);
    for (int unit = 0; unit < units; unit += AMX_DEPTH) {
        for (int row = 0; row < rows; row += AMX_DEPTH) {
            const size_t left = row < p->rows ? p->rows - row : 0, from = first_pixel * stride + p->first_row + row;
            const int whole = left >= AMX_DEPTH && 2 * (unit + AMX_DEPTH) <= pixels;
            vec line[AMX_DEPTH];
            vec sum = sums[row / AMX_DEPTH];
#pragma GCC unroll 16
            for (int i = 0; i < AMX_DEPTH; i++) {
                const long pixel = 2 * (unit + i);
                const size_t at = from + pixel * stride;
                const vec even = whole            ? load_lanes(p->dy, at, 1)
                                 : pixel < pixels ? load_rest(p->dy, at, left, 1)
                                                  : fill(0);
                const vec odd = whole                ? load_lanes(p->dy, at + stride, 1)
                                : pixel + 1 < pixels ? load_rest(p->dy, at + stride, left, 1)
                                                     : fill(0);
                line[i] = (vec)((pairs)even >> 16 | (pairs)odd);
                sum += even + odd;
            }
            sums[row / AMX_DEPTH] = sum;
            transpose_lanes(line);
            real *to = block + row * amx_stride(units) + unit;
#pragma GCC unroll 16
            for (int i = 0; i < AMX_DEPTH; i++) vec_store(to + i * amx_stride(units), line[i]);
        }
    }
    for (int row = 0; dbias && row < p->rows; row++)
        dbias[row] = (add ? dbias[row] : 0) + sums[row / AMX_DEPTH][row % AMX_DEPTH];
}

// weight_piece_tiles() by AMX.
static void amx_weight_piece(real *dw, real *dbias, int add, const WeightPiece *p, real *block) {
    const long inner = (long)patch_size(p->shape), all_units = (long)divide_up(p->last - p->first, 2);
    const long blocks = (long)divide_up(all_units, AMX_PIXELS);
    const AmxTap whole = {0, 0};
    real *panel = block + AMX_WEIGHT_ROWS * (AMX_PIXELS + AMX_DEPTH);
    amx_begin();
    for (long b = 0; b < blocks; b++) {
        const long start = p->first + all_units * b / blocks * 2;
        const long end = b == blocks - 1 ? p->last : p->first + all_units * (b + 1) / blocks * 2;
        const int pixels = (int)(end - start), pixel_pairs = (pixels + 1) / 2, adds = add || b > 0;
        const int units = (int)divide_up(pixel_pairs, AMX_DEPTH) * AMX_DEPTH;
        const size_t stride = amx_stride(units);
        amx_copy_gradients(block, dbias ? dbias + p->first_row : NULL, p, start, pixels, units, adds);
        memset(panel + (size_t)pixel_pairs * TILE_COLUMNS, 0, sizeof(real) * (units - pixel_pairs) * TILE_COLUMNS);
        for (int column = 0; column < p->columns; column += AMX_TILE) {
            if (column % TILE_COLUMNS == 0) copy_patches(panel, p, start, pixels, p->first_column + column, 1);
            for (int row = 0; row < p->rows; row += AMX_TILE) {
                real sums[AMX_TILE * AMX_TILE] __attribute__((aligned(64)));
                real *to = dw + (p->first_row + row) * inner + p->first_column + column;
                for (int i = 0; i < AMX_TILE; i++) prefetch(to + i * inner, AMX_TILE * sizeof(real));
                amx_multiply(sums, block + row * stride, stride, panel + column % TILE_COLUMNS, TILE_COLUMNS, &whole, 1,
                             units);
                for (int i = 0; i < AMX_TILE && row + i < p->rows; i++) {
                    real *out = to + i * inner;
                    for (int j = 0; j < AMX_TILE && column + j < p->columns; j += LANES) {
                        const size_t left = p->columns - column - j;
                        const vec sum = vec_load(sums + i * AMX_TILE + j);
                        store_rest(out, j, adds ? load_rest(out, j, left, 0) + sum : sum, left, 0);
                    }
                }
            }
        }
    }
    amx_end();
}
#else
static void amx_weight_piece(real *dw, real *dbias, int add, const WeightPiece *p, real *block) {
    (void)dw, (void)dbias, (void)add, (void)p, (void)block;
}
#endif

static void weight_piece(real *dw, real *dbias, int add, const WeightPiece *p, real *block) {
    if (p->half)
        weight_piece_tiles(dw, dbias, add, p, block, 1);
    else
        weight_piece_tiles(dw, dbias, add, p, block, 0);
}

// dw += the weight's gradient, or = unless `add`, in w's layout (of the weight as it was packed: a folded scale is the
// caller's to apply); dbias (out_channels) the sum of dy over pixels likewise, or NULL. x: (height * width,
// in_channels), dy: (out height * out width, out_channels), of bf16 where half; at least a pixel. workspace:
// conv_backward_weight_workspace() reals.
//
// dw is shared out in pieces. For each block of BLOCK_PIXELS pixels a piece copies its channels of dy, a tile's rows
// side by side, and goes through the panels of x's patches; the tile loop runs over the pixels of the block. With bf16
// the copies make pairs of two pixels that follow each other, and a block is as many pairs.
static void conv_backward_weight(real *dw, real *dbias, int add, const void *x, const void *dy, int height, int width,
                                 ConvShape s, int half, real *workspace) {
    long pixels = (long)conv_size(height, s) * conv_size(width, s), inner = (long)patch_size(s);
    const int amx = half && amx_usable();
    const WeightPlan plan = plan_backward_weight(s, half ? (pixels + 1) / 2 : pixels, amx);
    const WeightPiece whole = {x, dy, height, width, half, s, plan, 0, 0, 0, 0, 0, 0, 0};
    share_weight(dw, dbias, add, &whole, inner, pixels, amx ? amx_weight_piece : weight_piece, workspace,
                 weight_block());
}

// The machine's speed limit in GFLOP/s, measured: all threads do nothing but multiply_tile's arithmetic in registers,
// on reals or (half) on pairs of bf16. By each thread's own CPU time, best of five, so that other programs on the
// machine do not lower it.
static double measure_peak_gflops(int half) {
    const real factor = (real)0.5, one = 1;
    const pairs two = (pairs)fill((real)1e-3);
    const int amx = half && amx_usable();
    double total = 0;
#pragma omp parallel reduction(+ : total)
    {
        double best = 0;
        for (int attempt = 0; attempt < 5; attempt++) {
            struct timespec start, end;
            const long count = 400000;
            real memory[TILE_ROWS * TILE_COLUMNS];
            vec tile[TILE_ROWS][TILE_VECTORS];
            for (int i = 0; i < TILE_ROWS * TILE_COLUMNS; i++) memory[i] = (real)i;
            __asm__ volatile("" : : "r"(memory) : "memory");  // the compiler may not know that sums could be shared
#pragma GCC unroll 8
            for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 8
                for (int j = 0; j < TILE_VECTORS; j++) tile[i][j] = vec_load(memory + i * TILE_COLUMNS + j * LANES);
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
            if (amx) amx_only_multiply(count);
            for (long k = 0; k < count && !amx; k++) {
#pragma GCC unroll 8
                for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 8
                    for (int j = 0; j < TILE_VECTORS; j++)
                        tile[i][j] = half ? (vec)dot_pairs((fvec)tile[i][j], two, two) : tile[i][j] * factor + one;
            }
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
            spill_tile(memory, tile);
            __asm__ volatile("" : : "r"(memory) : "memory");
            const double seconds = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
            const double sums = amx ? AMX_TILE * AMX_TILE : TILE_ROWS * TILE_COLUMNS;
            const double rate = (half ? 4e-9 : 2e-9) * (double)count * sums / seconds;
            if (rate > best) best = rate;
        }
        total += best;
    }
    return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Winograd: 3x3 convolutions of stride 1 with 4 products where there were 9 (Lavin and Gray 2015, arXiv:1509.09308)
//
// F(2x2, 3x3) makes 2 x 2 pixels of the output from 4 x 4 of the input. In one dimension, two outputs of a kernel g
// over four inputs d cost four products instead of six:
//
//     d0 g0 + d1 g1 + d2 g2 = m0 + m1 + m2     m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2
//     d1 g0 + d2 g1 + d3 g2 = m1 - m2 - m3     m3 = (d1 - d3) g2    m2 = (d2 - d1) (g0 - g1 + g2) / 2
//
// As matrices y = A^T [(G g) . (B^T d)], where . is the product of elements; in two dimensions, on rows and columns,
//
//     Y = A^T [(G g G^T) . (B^T d B)] A        16 products for 4 outputs of 9 taps: 2.25 times fewer
//
//           1  0 -1  0            1    0    0
//     B^T = 0  1  1  0      G =  1/2  1/2  1/2     A^T = 1  1  1  0
//           0 -1  1  0           1/2 -1/2  1/2           0  1 -1 -1
//           0  1  0 -1            0    0    1
//
// The transforms are linear, so the sums over channels and tiles stand between them, and the gradients are those of
// linear maps. Each of the 16 elements xi = 4 * row + column is a matmul of its own, with V = B^T d B and U = G g G^T:
//
//   forward          M[xi][tile][n] = sum over c of V[xi][tile][c] * U[xi][c][n], then Y = A^T M A
//   backward data    the same of dy, with the kernels turned by 180 degrees: in G g that swaps the rows 0 and 3
//   backward weight  dU[xi][n][c] = sum over tiles of P[xi][tile][n] * V[xi][tile][c], P = A dY A^T; then dg = G^T dU G
//
// Transforming costs a few percent of what the products cost, and F(2x2), unlike larger tiles, rounds no worse than the
// plain sum: its factors are 1 and 1/2. What is not finite reaches all four outputs of a tile. The matmuls are
// multiply_tile() again. Operations are counted everywhere as those of the plain sum: the speed may exceed the peak.

enum {
    WINOGRAD_BLOCK = 384 * 1024,  // bytes: transformed inputs and products of a block of tiles stay in the L2 cache
    WINOGRAD_WEIGHTS = 2 << 20,   // bytes: a larger U comes from beyond that cache in any case, once a block of tiles:
    WINOGRAD_GROUPS = 14,         // then a block has at least this many groups of them
    WINOGRAD_ROWS = 66,           // backward weight: a piece of dU, out channels
    WINOGRAD_COLUMNS = 128,       // and in channels
    WINOGRAD_DEPTH = 128,         // backward weight: tiles that are transformed together and summed in registers
    WINOGRAD_CHANNELS = 32,       // backward weight: with fewer channels the transforms cost what the products save
};

// Reals from one row to the next in transformed numbers: an odd number of cache lines, because a power of two would put
// all rows into the same few lines of the L1 cache.
static inline size_t block_stride(int columns) { return (divide_up(columns, LANES) | 1) * LANES; }

static inline long winograd_tiles(int height, int width) { return (long)((height + 1) / 2) * ((width + 1) / 2); }

// Whether conv_forward() and conv_backward_data() can be done by the functions of this room: it always pays.
static inline int winograd_fits(ConvShape s) {
    return s.kernel == 3 && s.stride == 1 && s.padding == 1 && s.dilation == 1;
}

// Whether it pays for conv_backward_weight(). Where ReLU has silenced whatever a tap multiplies, the plain sum is
// exactly zero and this one is rounding of products that cancel, some 1e-7 of them. AdamW, which divides a gradient by
// its own size, stays blind to that as long as it is far below eps = 1e-8: so it is in a network of a detector's size.
static inline int winograd_weight_pays(ConvShape s) {
    return winograd_fits(s) && s.in_channels >= WINOGRAD_CHANNELS && s.out_channels >= WINOGRAD_CHANNELS;
}

// d = B^T d B.
INLINE void transform_input(vec d[4][4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vec d0 = d[0][i], d1 = d[1][i], d2 = d[2][i], d3 = d[3][i];
        d[0][i] = d0 - d2, d[1][i] = d1 + d2, d[2][i] = d2 - d1, d[3][i] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vec d0 = d[i][0], d1 = d[i][1], d2 = d[i][2], d3 = d[i][3];
        d[i][0] = d0 - d2, d[i][1] = d1 + d2, d[i][2] = d2 - d1, d[i][3] = d1 - d3;
    }
}

// y = A^T m A.
INLINE void transform_output(vec y[2][2], vec m[4][4]) {
    vec half[2][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        half[0][i] = m[0][i] + m[1][i] + m[2][i];
        half[1][i] = m[1][i] - m[2][i] - m[3][i];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        y[i][0] = half[i][0] + half[i][1] + half[i][2];
        y[i][1] = half[i][1] - half[i][2] - half[i][3];
    }
}

// u = G g G^T.
INLINE void transform_kernel(vec u[4][4], vec g[3][3]) {
    const real half = (real)0.5;
    vec rows[4][3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
        const vec outer = (g[0][i] + g[2][i]) * half, middle = g[1][i] * half;
        rows[0][i] = g[0][i], rows[1][i] = outer + middle, rows[2][i] = outer - middle, rows[3][i] = g[2][i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vec outer = (rows[i][0] + rows[i][2]) * half, middle = rows[i][1] * half;
        u[i][0] = rows[i][0], u[i][1] = outer + middle, u[i][2] = outer - middle, u[i][3] = rows[i][2];
    }
}

// Packed kernels, in reals: panels of the 16 matrices U, then the row of zeros that stands for pixels outside the
// image. inner: channels that are summed over; columns: channels of the result.
static size_t winograd_packed_size(int inner, int columns) {
    return divide_up(columns, TILE_COLUMNS) * 16 * inner * TILE_COLUMNS + inner;
}

// Kernels w (out_channels, 3, 3, in_channels) for forward and for backward, either unless it is NULL:
//   packed[panel][xi][in channel][column] = (G g G^T)[xi] of the kernel g from that channel to channel n = panel *
//   TILE_COLUMNS + column, times scale[n]
//   packed_backward[panel][xi][out channel n][column] = the same of the turned kernel g to that channel from channel
//   panel * TILE_COLUMNS + column
// Columns past the last channel are zero. scale: (out_channels) or NULL. Called by all threads, as pack_weights().
static void winograd_pack(real *packed, real *packed_backward, const real *w, const real *scale, ConvShape s) {
    static const int turned[4] = {3, 1, 2, 0};
    const long in = s.in_channels, out = s.out_channels, width = TILE_COLUMNS;
    const long panels = (long)divide_up(out, TILE_COLUMNS), in_panels = (long)divide_up(in, TILE_COLUMNS);
#pragma omp single nowait
    {
        if (packed) memset(packed + panels * 16 * in * width, 0, sizeof(real) * in);
        if (packed_backward) memset(packed_backward + in_panels * 16 * out * width, 0, sizeof(real) * out);
    }
#pragma omp for collapse(2) schedule(static) nowait
    for (long part = 0; part < panels * TILE_VECTORS; part++) {  // LANES out channels
        for (long in_panel = 0; in_panel < in_panels; in_panel++) {
            const long first_n = part * LANES, first_c = in_panel * width;
            vec g[TILE_VECTORS][9][LANES];  // of LANES in channels, of a tap, of each out channel
            for (int i = 0; i < LANES; i++) {
                const long n = first_n + i;
                for (int j = 0; j < TILE_VECTORS; j++) {
                    const long c = first_c + j * LANES;
                    vec kernel[3][3], u[4][4];
#pragma GCC unroll 9
                    for (int tap = 0; tap < 9; tap++) {
                        const real *from = w + (n * 9 + tap) * in + c;
                        vec value = fill(0);
                        if (n < out) {
                            __builtin_prefetch(from + width, 0, 2);  // the next panel
                            value = load_rest(from, 0, c < in ? in - c : 0, 0) * (scale ? scale[n] : 1);
                        }
                        kernel[tap / 3][tap % 3] = g[j][tap][i] = value;
                    }
                    if (!packed_backward || n >= out) continue;
                    transform_kernel(u, kernel);
                    real *to = packed_backward + (in_panel * 16 * out + n) * width + j * LANES;
#pragma GCC unroll 16
                    for (int xi = 0; xi < 16; xi++)
                        vec_stream(to + xi * out * width, u[turned[xi / 4]][turned[xi % 4]]);
                }
            }
            for (long c = 0; packed && c < width && first_c + c < in; c++) {
                vec(*taps)[LANES] = g[c / LANES], kernel[3][3], u[4][4];
                if (c % LANES == 0)
                    for (int tap = 0; tap < 9; tap++) transpose_lanes(taps[tap]);  // now a lane is an out channel
#pragma GCC unroll 9
                for (int tap = 0; tap < 9; tap++) kernel[tap / 3][tap % 3] = taps[tap][c % LANES];
                transform_kernel(u, kernel);
                real *to = packed + (first_n / width * 16 * in + first_c + c) * width + first_n % width;
#pragma GCC unroll 16
                for (int xi = 0; xi < 16; xi++) vec_stream(to + xi * in * width, u[xi / 4][xi % 4]);
            }
        }
    }
    stream_end();
}

// V = B^T d B of the `tiles` tiles from first_tile on, v[xi][tile][channel - first_channel], for the channels
// first_channel .. last_channel: `stride` reals from tile to tile, `plane` from xi to xi. Tiles go from left to right,
// then down. source: (height * width, channels); zeros: a row of them, which stands for pixels outside the image.
static void transform_inputs(real *v, size_t stride, size_t plane, const real *source, int height, int width,
                             int channels, const real *zeros, long first_tile, int tiles, int first_channel,
                             int last_channel) {
    const int tiles_wide = (width + 1) / 2;
    for (int t = 0; t < tiles; t++) {
        const int y = (int)((first_tile + t) / tiles_wide) * 2 - 1, x = (int)((first_tile + t) % tiles_wide) * 2 - 1;
        const real *pixels[16];
        for (int i = 0; i < 16; i++) {
            const int row = y + i / 4, column = x + i % 4,
                      inside = row >= 0 && row < height && column >= 0 && column < width;
            pixels[i] = inside ? source + ((size_t)row * width + column) * channels : zeros;
        }
        for (int c = first_channel; c < last_channel; c += LANES) {
            vec d[4][4];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) d[i / 4][i % 4] = load_rest(pixels[i], c, channels - c, 0);
            transform_input(d);
            real *out = v + t * stride + c - first_channel;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) vec_store(out + i * plane, d[i / 4][i % 4]);
        }
    }
}

// A convolution of `in` to `out` channels over an image: what forward and backward data have in common.
typedef struct {
    real *y;
    const real *x;
    int height, width, in, out;
    const real *packed;
    Epilogue epilogue;
} Winograd;

// y = A^T M A and the epilogue for the tiles first_tile .. first_tile + tiles, columns panel * TILE_COLUMNS on.
static void transform_outputs(const Winograd *p, const real *m, size_t plane, long first_tile, int tiles, int panel) {
    const int tiles_wide = (p->width + 1) / 2, first_column = panel * TILE_COLUMNS;
    for (int t = 0; t < tiles; t++) {
        const int row = (int)((first_tile + t) / tiles_wide) * 2, column = (int)((first_tile + t) % tiles_wide) * 2;
        const size_t corner = ((size_t)row * p->width + column) * p->out + first_column;
        for (int j = 0; j < TILE_COLUMNS && first_column + j < p->out; j += LANES) {
            const int lanes = p->out - first_column - j;
            vec products[4][4], y[2][2];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) products[i / 4][i % 4] = vec_load(m + i * plane + t * TILE_COLUMNS + j);
            transform_output(y, products);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                if (row + i / 2 >= p->height || column + i % 2 >= p->width) continue;
                const size_t at = corner + ((size_t)(i / 2) * p->width + i % 2) * p->out + j;
                finish_lanes(p->y, at, y[i / 2][i % 2], &p->epilogue, first_column + j, lanes, 0);
            }
        }
    }
}

// Most groups of TILE_ROWS tiles in a block.
static int winograd_groups(int in, int out) {
    const size_t group = 16 * TILE_ROWS * (block_stride(in) + TILE_COLUMNS) * sizeof(real);
    const int groups = (int)larger(WINOGRAD_BLOCK / group, 1);
    return groups < WINOGRAD_GROUPS && 16 * sizeof(real) * in * out > WINOGRAD_WEIGHTS ? WINOGRAD_GROUPS : groups;
}

// Reals from one of the 16 matrices to the next where a row has `stride`: off a power of two.
static inline size_t winograd_plane(int tiles, size_t stride) { return tiles * stride + LANES; }

// Reals of workspace for winograd_forward() and winograd_backward_data() on up to `threads` threads.
static size_t winograd_workspace(ConvShape s, int threads) {
    size_t most = 0;
    for (int pass = 0; pass < 2; pass++) {
        const int in = pass ? s.out_channels : s.in_channels;
        const int tiles = winograd_groups(in, pass ? s.in_channels : s.out_channels) * TILE_ROWS;
        most = larger(most, winograd_plane(tiles, block_stride(in)) + winograd_plane(tiles, TILE_COLUMNS));
    }
    return threads * 16 * most;
}

// A task is a block of tiles, whose V is made once, by all panels; where there are few blocks, the panels are shared
// out as well, each task with its own V: the transform is cheap beside even one panel.
static void winograd_product(const Winograd *p, real *workspace) {
    const long tiles = winograd_tiles(p->height, p->width);
    if (tiles <= 0) return;
    const int most_groups = winograd_groups(p->in, p->out), most = most_groups * TILE_ROWS;
    const long groups = (long)divide_up(tiles, TILE_ROWS), blocks = shared_blocks(divide_up(groups, most_groups));
    const int panels = (int)divide_up(p->out, TILE_COLUMNS);
    const size_t stride = block_stride(p->in), v_plane = winograd_plane(most, stride);
    const size_t m_plane = winograd_plane(most, TILE_COLUMNS), u_plane = (size_t)p->in * TILE_COLUMNS;
    const int parts = panel_parts(blocks, panels);
    const int cold = weights_cold(blocks, panels * 16 * u_plane);
    Tasks tasks = share_tasks(blocks * parts);
#pragma omp parallel
    for (long task; (task = take_task(&tasks)) >= 0;) {
        const long block = task / parts;
        const int part = (int)(task % parts);
        const long first = block * groups / blocks * TILE_ROWS, last = (block + 1) * groups / blocks * TILE_ROWS;
        const int count = (int)((last < tiles ? last : tiles) - first);
        real *v = workspace + omp_get_thread_num() * 16 * (v_plane + m_plane), *m = v + 16 * v_plane;
        transform_inputs(v, stride, v_plane, p->x, p->height, p->width, p->in, p->packed + panels * 16 * u_plane, first,
                         count, 0, p->in);
        for (int panel = part * panels / parts; panel < (part + 1) * panels / parts; panel++) {
            for (int xi = 0; xi < 16; xi++) {
                const real *u = p->packed + (panel * 16 + xi) * u_plane;
                for (int t = 0; t < count; t += TILE_ROWS) {
                    const Ahead ahead =
                        cold ? weights_ahead(u + u_plane, p->in, t / TILE_ROWS, divide_up(count, TILE_ROWS))
                             : NOTHING_AHEAD;
                    vec tile[TILE_ROWS][TILE_VECTORS];
                    Run run;
                    for (int i = 0; i < TILE_ROWS; i++)  // past the end any numbers: nobody reads their products
                        run.rows[i] = v + xi * v_plane + (t + i) * stride;
                    run.offset = 0;
                    clear_tile(tile);
                    multiply_tile(tile, count - t, &run, 1, 0, p->in, 1, u, TILE_COLUMNS, ahead, 0);
                    spill_tile(m + xi * m_plane + t * TILE_COLUMNS, tile);
                }
            }
            transform_outputs(p, m, m_plane, first, count, panel);
        }
    }
}

// y: (height * width, out_channels), by the epilogue, whose add and mask have y's shape. x: (height * width,
// in_channels). packed: by winograd_pack(). workspace: winograd_workspace() reals.
static void winograd_forward(real *y, const real *x, int height, int width, const real *packed, Epilogue epilogue,
                             ConvShape s, real *workspace) {
    const Winograd p = {y, x, height, width, s.in_channels, s.out_channels, packed, epilogue};
    winograd_product(&p, workspace);
}

// dx: (height * width, in_channels), by the epilogue, whose add and mask have dx's shape. dy: (height * width,
// out_channels). packed: by winograd_pack(), for backward. workspace: winograd_workspace() reals.
static void winograd_backward_data(real *dx, const real *dy, int height, int width, const real *packed,
                                   Epilogue epilogue, ConvShape s, real *workspace) {
    const Winograd p = {dx, dy, height, width, s.out_channels, s.in_channels, packed, epilogue};
    winograd_product(&p, workspace);
}

// P = A dY A^T of the `tiles` tiles from first_tile on, p[xi][tile][channel - first_channel], laid out as V is.
// dy: (height * width, channels); the last row or column of tiles may reach over the edge, where dy is zero.
static void transform_gradients(real *p, size_t stride, size_t plane, const real *dy, int height, int width,
                                int channels, const real *zeros, long first_tile, int tiles, int first_channel,
                                int last_channel) {
    const int tiles_wide = (width + 1) / 2;
    for (int t = 0; t < tiles; t++) {
        const int y = (int)((first_tile + t) / tiles_wide) * 2, x = (int)((first_tile + t) % tiles_wide) * 2;
        const real *pixels[4];
        for (int i = 0; i < 4; i++)
            pixels[i] = y + i / 2 < height && x + i % 2 < width
                            ? dy + ((size_t)(y + i / 2) * width + x + i % 2) * channels
                            : zeros;
        for (int c = first_channel; c < last_channel; c += LANES) {
            vec rows[4][2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const vec above = load_rest(pixels[i], c, channels - c, 0);
                const vec below = load_rest(pixels[2 + i], c, channels - c, 0);
                rows[0][i] = above, rows[1][i] = above + below, rows[2][i] = above - below, rows[3][i] = -below;
            }
            real *out = p + t * stride + c - first_channel;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                vec_store(out + (4 * i + 0) * plane, rows[i][0]);
                vec_store(out + (4 * i + 1) * plane, rows[i][0] + rows[i][1]);
                vec_store(out + (4 * i + 2) * plane, rows[i][0] - rows[i][1]);
                vec_store(out + (4 * i + 3) * plane, -rows[i][1]);
            }
        }
    }
}

// g = G^T u G.
INLINE void transform_kernel_gradient(vec g[3][3], vec u[4][4]) {
    const real half = (real)0.5;
    vec rows[3][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vec sum = (u[1][i] + u[2][i]) * half;
        rows[0][i] = u[0][i] + sum, rows[1][i] = (u[1][i] - u[2][i]) * half, rows[2][i] = sum + u[3][i];
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
        const vec sum = (rows[i][1] + rows[i][2]) * half;
        g[i][0] = rows[i][0] + sum, g[i][1] = (rows[i][1] - rows[i][2]) * half, g[i][2] = sum + rows[i][3];
    }
}

static WeightPlan plan_winograd_weight(ConvShape s, long tiles) {
    return plan_weight(s.out_channels, s.in_channels, WINOGRAD_ROWS, WINOGRAD_COLUMNS, TILE_ROWS, tiles,
                       WINOGRAD_DEPTH);
}

// The memory of one thread in backward weight, in reals: where P, V and dU begin, after a row of zeros; the planes'
// sizes.
typedef struct {
    size_t p, v, u, p_stride, p_plane, v_plane, u_plane, size;
} WinogradPiece;

static WinogradPiece winograd_piece(ConvShape s, WeightPlan plan) {
    WinogradPiece piece;
    piece.p_stride = block_stride(plan.rows);
    piece.p_plane = winograd_plane(WINOGRAD_DEPTH, piece.p_stride);
    piece.v_plane = winograd_plane(WINOGRAD_DEPTH, TILE_COLUMNS);
    piece.u_plane = winograd_plane(plan.rows, plan.columns);
    piece.p = divide_up(larger(s.in_channels, s.out_channels), LANES) * LANES;
    piece.v = piece.p + 16 * piece.p_plane;
    piece.u = piece.v + 16 * piece.v_plane;
    piece.size = piece.u + 16 * piece.u_plane;
    return piece;
}

// Reals of workspace for winograd_backward_weight() on up to `threads` threads.
static size_t winograd_backward_weight_workspace(ConvShape s, int threads) {
    const WeightPlan plan = plan_winograd_weight(s, (long)WEIGHT_PIECES * WINOGRAD_DEPTH);
    return weight_workspace(s, plan, threads, winograd_piece(s, plan).size);
}

// dU's tile, of which `rows` rows are wanted: = (or += if `add`) the sum over the `tiles` tiles of P's rows and V.
static inline void winograd_weight_tile(real *u, int rows, const real *p, size_t p_stride, const real *v, int tiles,
                                        int add) {
    vec tile[TILE_ROWS][TILE_VECTORS];
    Run run;
    for (int i = 0; i < TILE_ROWS; i++) run.rows[i] = p + i;
    run.offset = 0;
    for (int i = 0; add && i < TILE_ROWS * TILE_VECTORS; i++) __builtin_prefetch(u + i * LANES, 1);
    clear_tile(tile);
    multiply_tile(tile, rows, &run, 1, 0, tiles, p_stride, v, TILE_COLUMNS, NOTHING_AHEAD, 0);
    if (add) {
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 8
            for (int j = 0; j < TILE_VECTORS; j++) tile[i][j] += vec_load(u + i * TILE_COLUMNS + j * LANES);
    }
    spill_tile(u, tile);
}

// A WeightPieceFunction. dU of the piece lies in tiles as multiply_tile() makes them,
// [xi][panel][row / TILE_ROWS][TILE_ROWS][TILE_COLUMNS]. While its last products are made, dw is asked for.
static void winograd_weight_piece(real *dw, real *dbias, int add, const WeightPiece *p, real *memory) {
    const ConvShape s = p->shape;
    const WinogradPiece piece = winograd_piece(s, p->plan);
    const int first_column = (int)p->first_column, rows = p->rows, columns = p->columns;
    const long total = p->last - p->first, blocks = (long)divide_up(total, WINOGRAD_DEPTH);
    const size_t row_tiles = divide_up(rows, TILE_ROWS), u_panel = row_tiles * TILE_ROWS * TILE_COLUMNS;
    real *zeros = memory, *gradients = memory + piece.p, *v = memory + piece.v, *u = memory + piece.u;
    memset(zeros, 0, piece.p * sizeof(real));
    for (long b = 0; b < blocks; b++) {
        const long start = p->first + total * b / blocks;
        const int tiles = (int)(p->first + total * (b + 1) / blocks - start);
        transform_gradients(gradients, piece.p_stride, piece.p_plane, (const real *)p->dy, p->height, p->width,
                            s.out_channels, zeros, start, tiles, p->first_row, p->first_row + rows);
        for (int i = 0; dbias && i < rows; i++) {  // P[1][1] is the sum of the tile's dy
            real sum = 0, *to = dbias + p->first_row + i;
            for (int t = 0; t < tiles; t++) sum += gradients[5 * piece.p_plane + t * piece.p_stride + i];
            *to = (add || b > 0 ? *to : 0) + sum;
        }
        for (int column = 0; column < columns; column += TILE_COLUMNS) {
            const int first = first_column + column, left = columns - column;
            transform_inputs(v, TILE_COLUMNS, piece.v_plane, (const real *)p->x, p->height, p->width, s.in_channels,
                             zeros, start, tiles, first, first + (left < TILE_COLUMNS ? left : TILE_COLUMNS));
            for (int xi = 0; xi < 16; xi++) {
                for (int row = 0; row < rows; row += TILE_ROWS) {
                    real *tile = u + xi * piece.u_plane + column / TILE_COLUMNS * u_panel + row * TILE_COLUMNS;
                    for (int i = row; add && b == blocks - 1 && xi < 9 && i < rows && i < row + TILE_ROWS; i++)
                        prefetch(dw + ((size_t)(p->first_row + i) * 9 + xi) * s.in_channels + first,  // tap xi
                                 TILE_COLUMNS * sizeof(real));
                    winograd_weight_tile(tile, rows - row, gradients + xi * piece.p_plane + row, piece.p_stride,
                                         v + xi * piece.v_plane, tiles, b > 0);
                }
            }
        }
    }
    for (int row = 0; row < rows; row++) {
        for (int column = 0; column < columns; column += LANES) {
            const real *from = u + column / TILE_COLUMNS * u_panel + row * TILE_COLUMNS + column % TILE_COLUMNS;
            real *to = dw + (size_t)(p->first_row + row) * 9 * s.in_channels + first_column + column;
            vec gradient[4][4], g[3][3];
#pragma GCC unroll 16
            for (int xi = 0; xi < 16; xi++) gradient[xi / 4][xi % 4] = vec_load(from + xi * piece.u_plane);
            transform_kernel_gradient(g, gradient);
#pragma GCC unroll 9
            for (int tap = 0; tap < 9; tap++) {
                real *out = to + (size_t)tap * s.in_channels;
                vec value = g[tap / 3][tap % 3];
                if (p->once && columns - column >= LANES) {
                    vec_stream(out, value);
                    continue;
                }
                if (add) value += load_rest(out, 0, columns - column, 0);
                store_rest(out, 0, value, columns - column, 0);
            }
        }
    }
    stream_end();
}

// conv_backward_weight(). x: (height * width, in_channels), dy: (height * width, out_channels). workspace:
// winograd_backward_weight_workspace() reals.
static void winograd_backward_weight(real *dw, real *dbias, int add, const real *x, const real *dy, int height,
                                     int width, ConvShape s, real *workspace) {
    const long tiles = winograd_tiles(height, width);
    const WeightPlan plan = plan_winograd_weight(s, tiles);
    const WeightPiece whole = {x, dy, height, width, 0, s, plan, 0, 0, 0, 0, 0, 0, 0};
    share_weight(dw, dbias, add, &whole, s.in_channels, tiles, winograd_weight_piece, workspace,
                 winograd_piece(s, plan).size);
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of the layers: exp and random numbers, beside what the Matmul room has

typedef __typeof__((*(vec *)0 < *(vec *)0)[0]) lane_int;           // as wide as real
typedef lane_int ivec __attribute__((vector_size(VECTOR_BYTES)));  // all ones is true, 0 is false
typedef uint64_t u64vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t i64vec __attribute__((vector_size(VECTOR_BYTES)));
enum { U64_LANES = VECTOR_BYTES / 8 };

INLINE vec where(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE vec vec_max(vec x, vec y) {  // y where x is NaN
#ifdef __AVX512F__
    return sizeof(real) == 4 ? (vec)_mm512_max_ps((__m512)x, (__m512)y) : (vec)_mm512_max_pd((__m512d)x, (__m512d)y);
#else
    return where(x > y, x, y);
#endif
}

// The lanes' sum, always in the same order.
INLINE real lane_sum(vec x) {
    real sum = x[0];
    for (int i = 1; i < LANES; i++) sum += x[i];
    return sum;
}

static inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// exp(x) for x <= 88 (709 in double), 0 below -50 (-690), NaN for NaN; the relative error is below 1e-7 (1e-15). A
// weight that small beside the largest changes no sum, but its product with a gradient could be a denormal number, with
// which a processor is a hundred times slower.
// With n = round(x / ln 2) and r = x - n ln 2 it is 2^n exp(r), exp(r) by a polynomial: |r| <= 0.347. Adding
// 1.5 * 2^23 (2^52) leaves n in the lowest bits; the exponent's bias is added with it, so that a shift makes 2^n.
INLINE vec exp_lanes(vec x) {
    const int is_float = sizeof(real) == 4, degree = is_float ? 6 : 13, mantissa_bits = is_float ? 23 : 52;
    // For double Taylor's series; for float the smallest greatest error among those of degree 6 that begin with 1 + r.
    static const double taylor[] = {
        1,         1,          1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
        1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
    static const double minimax[] = {1, 1, 0.49999993, 0.16666515, 0.041668457, 0.0083694188, 0.0013813145};
    const double *series = is_float ? minimax : taylor;
    const real lowest = (real)(is_float ? -50 : -690);
    const real magic = (real)(is_float ? 12582912.0 + 127 : 6755399441055744.0 + 1023);
    const real ln2_high = (real)(is_float ? 0.693359375 : 0.693147180369123816490);  // few bits: n ln2_high is exact
    const real ln2_low = (real)(is_float ? -2.12194440e-4 : 1.90821492927058770002e-10);
    const vec shifted = x * (real)1.4426950408889634 + magic, n = shifted - magic;
    const vec r = x - n * ln2_high - n * ln2_low;
    vec sum = fill((real)series[degree]);
#pragma GCC unroll 16
    for (int k = degree - 1; k >= 0; k--) sum = sum * r + (real)series[k];
    const vec power = (vec)((ivec)shifted << mantissa_bits);
    return (vec)((ivec)(sum * power) & ~(x < lowest));
}

// ---------------------------------------------------------------------------------------------------------------------
// Dropout: element e of a layer is kept if its random word (data/common.h) is at least p * 2^32, and is then multiplied
// by 1 / (1 - p). A mask is never stored: the backward pass asks for the same words again.

typedef struct {
    double p;  // probability of dropping, 0 <= p < 1; 0: none
    uint64_t seed;
    uint32_t site, step, image;
} Dropout;

// (low half of a) * b in every lane, b < 2^32: vpmuludq, which compilers do not find by themselves.
INLINE u64vec multiply_low_halves(u64vec a, uint64_t b) {
#if defined(__AVX512F__)
    return (u64vec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64((long long)b));
#elif defined(__AVX2__)
    return (u64vec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x((long long)b));
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
}

// random_words() of data/common.h for the groups in `group`, one a lane. The upper halves of the words are meaningless.
INLINE void dropout_words(u64vec word[4], Dropout dropout, u64vec group) {
    u64vec zero = {0};
    u64vec word0 = group, word1 = zero + (uint64_t)(RANDOM_DROPOUT | dropout.site << 8);
    u64vec word2 = zero + (uint64_t)dropout.step, word3 = zero + (uint64_t)dropout.image;
    uint32_t key0 = (uint32_t)dropout.seed, key1 = (uint32_t)(dropout.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
        u64vec product0 = multiply_low_halves(word0, 0xD2511F53u);
        u64vec product1 = multiply_low_halves(word2, 0xCD9E8D57u);
        word0 = (product1 >> 32) ^ word1 ^ (uint64_t)key0;
        word2 = (product0 >> 32) ^ word3 ^ (uint64_t)key1;
        word1 = product1;
        word3 = product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    word[0] = word0, word[1] = word1, word[2] = word2, word[3] = word3;
}

static inline uint64_t dropout_threshold(Dropout dropout) { return (uint32_t)(dropout.p * 4294967296.0); }

enum { DROPOUT_ELEMENTS = 4 * U64_LANES };  // of one dropout_words()

// Bit i: is element DROPOUT_ELEMENTS * block + i kept?
INLINE uint32_t dropout_keep_bits(Dropout dropout, uint64_t block) {
    const u64vec zero = {0}, threshold = zero + (dropout_threshold(dropout) << 32);
    u64vec lane, word[4], bits = zero;
    for (int i = 0; i < U64_LANES; i++) lane[i] = (uint64_t)i;
    dropout_words(word, dropout, lane + block * U64_LANES);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) bits |= (u64vec)(word[i] << 32 >= threshold) & ((uint64_t)1 << i);
    bits <<= 4 * lane;
    uint64_t all = 0;
    for (int i = 0; i < U64_LANES; i++) all |= bits[i];
    return (uint32_t)all;
}

// y = dropout(x) + add, all (rows, channels); add may be NULL, y may be x or add. half_y, half_x: y, x are bf16.
// Dropout is linear: the gradient of x is dropout_forward of dy.
static void dropout_forward(void *y, int half_y, const void *x, int half_x, const real *add, size_t rows,
                            size_t channels, Dropout dropout) {
    const double begin = profile_begin();
    const size_t count = rows * channels;
    const int64_t blocks = (int64_t)divide_up(count, DROPOUT_ELEMENTS);
    const vec scale = fill((real)(1 / (1 - dropout.p)));
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma omp parallel for schedule(static) firstprivate(dropout) if (count > 16384)
    for (int64_t block = 0; block < blocks; block++) {
        uint32_t keep = dropout.p > 0 ? dropout_keep_bits(dropout, (uint64_t)block) : 0xFFFFFFFFu;
        size_t at = (size_t)block * DROPOUT_ELEMENTS;
        for (int i = 0; i < DROPOUT_ELEMENTS && at < count; i += LANES, at += LANES) {
            const ivec kept = -((((ivec)fill(0) + (int)(keep >> i)) >> lane) & 1);
            vec value = (vec)((ivec)(load_rest(x, at, count - at, half_x) * scale) & kept);
            if (add) value += load_rest(add, at, count - at, 0);
            store_rest(y, at, value, count - at, half_y);
        }
    }
    profile_end(begin, "dropout", "", 0, (double)(number_bytes(half_x) + number_bytes(half_y)) * (double)count);
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention: out = dropout(softmax(q k^T / sqrt(head_dim))) v for each head, Vaswani et al. 2017.
//
// The (queries, keys) matrix is never in memory (Dao et al. 2022, FlashAttention): a block of K_BLOCK keys by Q_BLOCK
// queries is made, used and forgotten inside the first-level cache. It is kept transposed, S^T: a row is a key and the
// lanes are queries. Then the softmax's maximum and sum run down the rows, lane by lane, with no sum across a vector,
// and the operand of the products that is not a vector is read in place, one number at a time.
//
// With `half` all tensors but out and lse are bf16. Scores, sums, maxima and exponentials are floats all the same; a
// product's two operands are rows of units, where a unit is a pair of bf16 that are neighbours along the inner
// dimension, and else one real. The probabilities and their gradients are rounded to bf16 when they become an operand.
//
// Blocks and their order depend on the shapes alone and each output has one owner, so any number of threads gives the
// same bits. Inside, head_dim is padded with zeros to `padded_dim`, Tk to whole K_BLOCKs, Tq to whole Q_BLOCKs; of the
// last block of queries only the vectors that have queries are computed.
//
// Where there is AMX the five products of bf16 are amx_matmul()'s: a block then has AMX_TILE queries, so that all is
// whole tiles, and what completes the last tile of keys or queries weighs nothing. The rest is the same code.

#if defined(__AVX512F__) || defined(__aarch64__)
enum { WIDE_ROWS = 8, TALL_ROWS = 12 };  // tiles of 8 x 3 and 12 x 2 vectors: 24 sums in 32 registers
#else
enum { WIDE_ROWS = 4, TALL_ROWS = 6 };  // 12 sums in 16 registers
#endif
enum { WIDE = 3, TALL = 2, Q_BLOCK = WIDE * VECTOR_BYTES / (int)sizeof(real), K_BLOCK = 96 };

typedef struct {
    int Tq, Tk, C, heads, half;
    int amx;                   // the products are AMX's: whole tiles of 32 keys, 32 queries and 32 channels
    int queries;               // of a block, Q_BLOCK at most; its rows are Q_BLOCK apart all the same
    int head_dim, padded_dim;  // padded_dim: a multiple of LANES and of WIDE_ROWS
    int dim_units;             // a row of one head in units: half of head_dim if half
    int padded_queries, padded_keys;
    int chunks, chunk;  // the backward pass deals keys out in so many chunks of so many keys
    real scale;
    size_t head_queries, head_keys, thread_scratch;  // reals: one head's packed q, one head's packed k
} AttentionPlan;

static AttentionPlan attention_plan(int Tq, int Tk, int C, int heads, int half) {
    AttentionPlan plan;
    plan.Tq = Tq, plan.Tk = Tk, plan.C = C, plan.heads = heads, plan.half = half;
    plan.head_dim = C / heads;
    plan.padded_dim = (int)round_up(round_up((size_t)plan.head_dim, LANES), WIDE_ROWS);  // both powers of two
    plan.dim_units = half ? (plan.head_dim + 1) / 2 : plan.head_dim;
    plan.amx = sizeof(real) == 4 && half && plan.head_dim % AMX_TILE == 0 && amx_usable();
    plan.queries = plan.amx ? (int)AMX_TILE : (int)Q_BLOCK;
    plan.padded_queries = (int)divide_up((size_t)Tq, plan.queries) * Q_BLOCK;
    plan.padded_keys = (int)round_up((size_t)Tk, K_BLOCK);
    plan.chunks = Tk < 512 ? 1 : Tk < 1024 ? 2 : 4;
    plan.chunk = (int)round_up((size_t)(Tk + plan.chunks - 1) / plan.chunks, K_BLOCK);
    plan.scale = (real)(1 / sqrt((double)plan.head_dim));
    plan.head_queries = (size_t)plan.padded_queries * plan.padded_dim;
    plan.head_keys = (size_t)plan.padded_keys * plan.padded_dim;
    // forward: scores, queries, sums; backward: scores, their gradient, dk, dv
    size_t forward = K_BLOCK * Q_BLOCK + 2 * Q_BLOCK * (size_t)plan.padded_dim;
    size_t backward = 2 * K_BLOCK * Q_BLOCK + 2 * (size_t)plan.chunk * plan.padded_dim;
    plan.thread_scratch = round_up(forward > backward ? forward : backward, 128 / sizeof(real));
    return plan;
}

// Reals of workspace that attention_forward and attention_backward need with at most `threads` OpenMP threads; with
// reals they need no more than with bf16.
static size_t attention_workspace(int Tq, int Tk, int C, int heads, int threads) {
    const AttentionPlan plan = attention_plan(Tq, Tk, C, heads, 1);
    return (size_t)heads *
               (2 * plan.head_keys + (4 + (size_t)plan.chunks) * plan.head_queries + 2 * (size_t)plan.padded_queries) +
           (size_t)threads * plan.thread_scratch;
}

// `n` keys or queries of a block with those that complete the last operand, which weigh nothing.
INLINE int attention_round(int n, const AttentionPlan *plan) {
    return (int)round_up((size_t)n, plan->amx ? AMX_TILE : 2);
}

// Where the packed queries of the block that begins with `first` lie.
INLINE size_t attention_block(int head, int first, const AttentionPlan *plan) {
    return head * plan->head_queries + (size_t)(first / plan->queries) * Q_BLOCK * plan->padded_dim;
}

// c[i][j] = c[i][j] * keep[j] + sum over t < depth of a[i * a_row + t * a_step] * b[t * b_step + j], for i < rows and
// j < vectors * LANES; keep NULL stands for zeros. a and b are units, two products each if half. rows, vectors and
// half are constants where this is called.
INLINE void attention_tile(int rows, int vectors, real *c, size_t c_row, const real *a, size_t a_row, size_t a_step,
                           const real *b, size_t b_step, int depth, const real *keep, int half) {
    vec sum[12][3];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++) sum[i][j] = fill(0);
    }
#pragma GCC unroll 1
    for (int t = 0; t < depth; t++, a += a_step, b += b_step) {
        vec x[3];
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++) x[j] = vec_load(b + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            if (half) {
                const pairs factor = broadcast_pair(a + (size_t)i * a_row);
#pragma GCC unroll 3
                for (int j = 0; j < vectors; j++) sum[i][j] = (vec)dot_pairs((fvec)sum[i][j], factor, (pairs)x[j]);
            } else {
                const real factor = a[(size_t)i * a_row];
#pragma GCC unroll 3
                for (int j = 0; j < vectors; j++) sum[i][j] += factor * x[j];
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++) {
            real *to = c + (size_t)i * c_row + j * LANES;
            vec_store(to, keep ? vec_load(to) * vec_load(keep + j * LANES) + sum[i][j] : sum[i][j]);
        }
    }
}

// scores (keys, Q_BLOCK) = rows (keys, padded_dim) times columns (dim_units, Q_BLOCK), of the first `wide` vectors;
// keys is rounded up to WIDE_ROWS.
INLINE void attention_scores(real *scores, const real *rows, const real *columns, int keys, const AttentionPlan *plan,
                             int wide, int half) {
    const size_t row = (size_t)plan->padded_dim / (half ? 2 : 1);
    if (half && plan->amx) {
        amx_matmul(scores, Q_BLOCK, rows, row, columns, Q_BLOCK, attention_round(keys, plan), AMX_TILE, plan->dim_units,
                   0);
        return;
    }
    for (int k = 0; k < keys; k += WIDE_ROWS) {
        attention_tile(WIDE_ROWS, wide, scores + k * Q_BLOCK, Q_BLOCK, rows + (size_t)k * row, row, 1, columns, Q_BLOCK,
                       plan->dim_units, NULL, half);
    }
}

// sums (padded_dim, Q_BLOCK) = sums * keep (Q_BLOCK) + transposed rows (units, padded_dim) times weights
// (units, Q_BLOCK), of the first `wide` vectors and of head_dim rows, rounded up to WIDE_ROWS; a unit is a key or two.
// By AMX the rows are transposed already: attention_pack_across().
INLINE void attention_sum_keys(real *sums, const real *rows, const real *weights, int units, const real *keep,
                               const AttentionPlan *plan, int wide, int half) {
    if (half && plan->amx) {
        for (int d = 0; keep && d < plan->head_dim; d++) {
            for (int j = 0; j < wide * LANES; j += LANES) {
                real *sum = sums + d * Q_BLOCK + j;
                vec_store(sum, vec_load(sum) * vec_load(keep + j));
            }
        }
        amx_matmul(sums, Q_BLOCK, rows, K_BLOCK / 2, weights, Q_BLOCK, plan->head_dim, AMX_TILE, units, keep != NULL);
        return;
    }
    for (int d = 0; d < plan->head_dim; d += WIDE_ROWS) {
        attention_tile(WIDE_ROWS, wide, sums + d * Q_BLOCK, Q_BLOCK, rows + d, 1, (size_t)plan->padded_dim, weights,
                       Q_BLOCK, units, keep, half);
    }
}

INLINE void attention_sum_queries_tile(int tall, real *sums, const real *weights, const real *rows, int units,
                                       int padded_dim, const real *keep, int half) {
    int d = 0;
    for (; d + TALL * LANES <= padded_dim; d += TALL * LANES) {
        attention_tile(tall, TALL, sums + d, (size_t)padded_dim, weights, Q_BLOCK, 1, rows + d, (size_t)padded_dim,
                       units, keep, half);
    }
    for (; d < padded_dim; d += LANES) {
        attention_tile(tall, 1, sums + d, (size_t)padded_dim, weights, Q_BLOCK, 1, rows + d, (size_t)padded_dim, units,
                       keep, half);
    }
}

// sums (keys, padded_dim) = sums * keep + weights (keys, Q_BLOCK) times rows (units, padded_dim); keys is rounded up to
// WIDE_ROWS, a unit is a query or two, keep is ones (TALL * LANES) or NULL.
INLINE void attention_sum_queries(real *sums, const real *weights, const real *rows, int keys, int units,
                                  const real *keep, const AttentionPlan *plan, int half) {
    const int padded_dim = plan->padded_dim, last = (int)round_up((size_t)keys, WIDE_ROWS);
    int k = 0;
    if (half && plan->amx) {
        amx_matmul(sums, padded_dim, weights, Q_BLOCK, rows, padded_dim, attention_round(keys, plan), padded_dim, units,
                   keep != NULL);
        return;
    }
    for (; k + TALL_ROWS <= last; k += TALL_ROWS) {
        attention_sum_queries_tile(TALL_ROWS, sums + (size_t)k * padded_dim, weights + k * Q_BLOCK, rows, units,
                                   padded_dim, keep, half);
    }
    for (; k < last; k += TALL_ROWS / 3) {
        attention_sum_queries_tile(TALL_ROWS / 3, sums + (size_t)k * padded_dim, weights + k * Q_BLOCK, rows, units,
                                   padded_dim, keep, half);
    }
}

// The channels of one head in row `row` of a tensor (rows, C).
INLINE const char *attention_row(const void *x, int row, int head, const AttentionPlan *plan) {
    return (const char *)x + ((size_t)row * plan->C + (size_t)head * plan->head_dim) * number_bytes(plan->half);
}

// Rows `first` .. of one head, x (rows, C), into `to` (count, padded_dim); zeros beside and below.
static void attention_pack_rows(real *to, const void *x, int first, int count, int rows, int head,
                                const AttentionPlan *plan) {
    const size_t bytes = plan->head_dim * number_bytes(plan->half), row = plan->padded_dim * number_bytes(plan->half);
    for (int i = 0; i < count; i++) {
        char *out = (char *)to + i * row;
        const char *from = first + i < rows ? attention_row(x, first + i, head, plan) : NULL;
        size_t at = 0;
        for (; from && at + VECTOR_BYTES <= bytes; at += VECTOR_BYTES) memcpy(out + at, from + at, VECTOR_BYTES);
        if (from && at < bytes) memcpy(out + at, from + at, bytes - at), at = bytes;
        if (at < row) memset(out + at, 0, row - at);
    }
}

// The same as units along the rows: with bf16 a row of `to` (count / 2, padded_dim) holds pairs out of two rows of x.
static void attention_pack_units(real *to, const void *x, int first, int count, int rows, int head,
                                 const AttentionPlan *plan) {
    enum { PAIRS = VECTOR_BYTES / 4 };
    if (!plan->half) {
        attention_pack_rows(to, x, first, count, rows, head, plan);
        return;
    }
    for (int i = 0; i < count; i += 2) {
        pair_memory *out = (pair_memory *)to + (size_t)(i / 2) * plan->padded_dim;
        bf16 row[2][PAIRS];
        for (int d = 0; d < plan->padded_dim; d += PAIRS) {
            const int n = plan->head_dim - d < PAIRS ? plan->head_dim - d : PAIRS;
            const bf16 *from[2];
            for (int r = 0; r < 2; r++) {
                const bf16 *source = (const bf16 *)attention_row(x, first + i + r, head, plan) + d;
                from[r] = source;
                if (n == PAIRS && first + i + r < rows) continue;
                memset(row[r], 0, sizeof row[r]);
                if (n > 0 && first + i + r < rows) memcpy(row[r], source, n * sizeof(bf16));
                from[r] = row[r];
            }
            const pairs two = join_pairs(from[0], from[1]);
            memcpy(out + d, &two, sizeof two);
        }
    }
}

// The same of `count` rows as attention_sum_keys() takes them: by AMX transposed, `to` (padded_dim, K_BLOCK / 2).
static void attention_pack_across(real *to, const void *x, int first, int count, int rows, int head,
                                  const AttentionPlan *plan) {
#ifdef __AMX_BF16__
    static const bf16 zeros[AMX_DEPTH] = {0};
    for (int i = 0; plan->amx && i < count; i += 2 * AMX_DEPTH) {
        for (int d = 0; d < plan->head_dim; d += AMX_DEPTH) {
            vec line[AMX_DEPTH];
#pragma GCC unroll 16
            for (int unit = 0; unit < AMX_DEPTH; unit++) {
                const int row = first + i + 2 * unit;
                const bf16 *even = row < rows ? (const bf16 *)attention_row(x, row, head, plan) + d : zeros;
                const bf16 *odd = row + 1 < rows ? (const bf16 *)attention_row(x, row + 1, head, plan) + d : zeros;
                line[unit] = (vec)join_pairs(even, odd);
            }
            transpose_lanes(line);
#pragma GCC unroll 16
            for (int j = 0; j < AMX_DEPTH; j++) vec_store(to + (d + j) * (K_BLOCK / 2) + i / 2, line[j]);
        }
    }
#endif
    if (!plan->amx) attention_pack_units(to, x, first, count, rows, head, plan);
}

// Q_BLOCK rows of one head transposed, `to` (dim_units, Q_BLOCK), zeros beyond the last row.
static void attention_pack_columns(real *to, const void *x, int first, int rows, int head, const AttentionPlan *plan) {
    const int count = rows - first < plan->queries ? rows - first : plan->queries;
    if (count < plan->queries) memset(to, 0, sizeof(real) * plan->dim_units * Q_BLOCK);
    for (int i = 0; i < count; i++) {
        const char *from = attention_row(x, first + i, head, plan);
        if (plan->half) {
            pair_memory *out = (pair_memory *)to + i;
            for (int d = 0; d < plan->head_dim / 2; d++) out[d * Q_BLOCK] = ((const pair_memory *)from)[d];
            if (plan->head_dim % 2) out[plan->head_dim / 2 * Q_BLOCK] = ((const bf16 *)from)[plan->head_dim - 1];
        } else {
            for (int d = 0; d < plan->head_dim; d++) to[d * Q_BLOCK + i] = ((const real *)from)[d];
        }
    }
}

// Row `row` of one head of y (rows, C) = from[d] * factor, d < head_dim.
INLINE void attention_unpack(void *y, int row, int head, const real *from, real factor, const AttentionPlan *plan) {
    char *to = (char *)attention_row(y, row, head, plan);
    for (int d = 0; d < plan->head_dim; d += LANES)
        store_rest(to, d, vec_load(from + d) * factor, plan->head_dim - d, plan->half);
}

// Rows `row` .. of one head of y (Tq, C), bf16 if half, LANES of them at most = columns of sums (padded_dim, Q_BLOCK)
// times a factor each.
INLINE void attention_unpack_columns(void *y, int half, int row, int head, const real *sums, const real *factor,
                                     const AttentionPlan *plan) {
    const int rows = plan->Tq - row < LANES ? plan->Tq - row : (int)LANES;
    for (int d = 0; d < plan->head_dim; d += LANES) {
        vec line[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) line[i] = vec_load(sums + (d + i) * Q_BLOCK);
        transpose_lanes(line);
        for (int i = 0; i < rows; i++)
            store_rest(y, (size_t)(row + i) * plan->C + (size_t)head * plan->head_dim + d, line[i] * factor[i],
                       plan->head_dim - d, half);
    }
}

// Is a key kept? Key 32 w + r of the block, query LANES * j + i: bit r from the top, lane i of keep[w][j]. `element` is
// the number of the first query's first key here, a query has `Tk` elements. A query's groups of 4 words need not start
// at the block's first key: its bits are shifted by what is left of the first group.
static void attention_keep_bits(ivec keep[K_BLOCK / 32][WIDE], Dropout dropout, uint64_t element, int Tk, int keys,
                                int wide) {
    enum { PARTS = 8 / sizeof(real) };  // a float lane is half of a 64-bit lane: even queries, then odd ones
    const uint64_t low_half = 0xFFFFFFFFu, threshold = dropout_threshold(dropout);
    const int groups = (keys + 31) / 32 * 8;
    for (int j = 0; j < wide; j++) {
        u64vec group[PARTS], shift = {0};
        for (int part = 0; part < PARTS; part++) {
            u64vec first;
            for (int i = 0; i < U64_LANES; i++)
                first[i] = element + (uint64_t)(j * LANES + i * PARTS + part) * (uint64_t)Tk;
            shift |= (first & 3) << (32 * part);
            group[part] = first >> 2;
        }
        ivec bits = {0}, next = {0};  // of the groups before the last, of the last
        for (int g = 0; g <= groups; g++) {
            u64vec word[2][4];
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; part++) dropout_words(word[part], dropout, group[part] + (uint64_t)g);
            bits = bits << 4 | next;
            next = bits ^ bits;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const u64vec words = word[0][i] & low_half;
                const ivec kept = PARTS == 1 ? (ivec)(words >= threshold)
                                             : (ivec)((pairs)(words | word[PARTS - 1][i] << 32) >= (uint32_t)threshold);
                next |= kept & (lane_int)((lane_int)8 >> i) << (8 * (int)sizeof(real) - 32);
            }
            if (g % 8 == 0 && g > 0) {
                keep[g / 8 - 1][j] = bits << (ivec)shift | next >> (4 - (ivec)shift);
                bits = bits ^ bits;
            }
        }
    }
}

// All ones where key i of a block is kept for the queries of vector j.
INLINE ivec attention_kept(ivec keep[K_BLOCK / 32][WIDE], int i, int j) {
    return (keep[i / 32][j] & (lane_int)(1ull << (8 * sizeof(real) - 1 - (i & 31)))) != 0;
}

// Stores two rows of a block of `half` as operands: a vector of pairs (even, odd); as reals: both rows.
INLINE void attention_store_units(real *block, int i, int j, vec even, vec odd, int half) {
    if (half) {
        const pairs two = make_pairs(even, odd);
        memcpy(block + i / 2 * Q_BLOCK + j * LANES, &two, sizeof two);
    } else {
        vec_store(block + i * Q_BLOCK + j * LANES, even);
        vec_store(block + (i + 1) * Q_BLOCK + j * LANES, odd);
    }
}

// The keys that complete the last operand get the weight exp(-inf) = 0.
INLINE void attention_complete(real *scores, int keys, int completed, int wide) {
    for (int i = keys; i < completed; i++) {
        for (int j = 0; j < wide; j++) vec_store(scores + i * Q_BLOCK + j * LANES, fill((real)-INFINITY));
    }
}

// Where a query is to look, for keys that are the cells of a grid: to its scores are added the logarithms of Gaussians
// around the query's box (SMCA: Gao et al. 2021, where the network chooses each head's middle). It has no gradient.
typedef struct {
    const real *boxes;  // (Tq, 4): cx, cy, w, h in 0..1; NULL: there is no prior
    int height,
        width;  // of the grid; key y * width + x is the cell with the centre (x + 0.5) / width, (y + 0.5) / height
} AttentionPrior;

static const AttentionPrior NO_PRIOR = {NULL, 0, 0};

// By head modulo 8: the Gaussian's middle (x, y) from the box's centre and its deviation, in halves of the box's width
// and height. Four heads look closely at the middles of the four sides, where it shows how far the box is off; the
// others around the centre, more and less closely.
static const double PRIOR_HEADS[8][3] = {{-1, 0, 0.25}, {1, 0, 0.25}, {0, -1, 0.25}, {0, 1, 0.25},
                                         {0, 0, 1},     {0, 0, 2},    {0, 0, 0.5},   {0, 0, 4}};

// The Gaussians of one block of queries of one head: middle and 1 / (2 deviation^2) along x and y. A deviation is at
// least half a cell, so that there is always a cell to look at.
typedef struct {
    vec middle[2][WIDE], steepness[2][WIDE];
} PriorBlock;

static void attention_prior_block(PriorBlock *block, AttentionPrior prior, int head, int first,
                                  const AttentionPlan *plan) {
    const double *of_head = PRIOR_HEADS[head % 8];
    memset(block, 0, sizeof *block);
    for (int i = 0; i < plan->queries && first + i < plan->Tq; i++) {
        const real *box = prior.boxes + 4 * (first + i);
        for (int axis = 0; axis < 2; axis++) {
            const double half_size = (double)box[2 + axis] / 2, half_cell = 0.5 / (axis ? prior.height : prior.width);
            const double deviation = fmax(of_head[2] * half_size, half_cell);
            block->middle[axis][i / LANES][i % LANES] = (real)((double)box[axis] + of_head[axis] * half_size);
            block->steepness[axis][i / LANES][i % LANES] = (real)(0.5 / (deviation * deviation));
        }
    }
}

// Adds the prior to a block's raw scores (keys, Q_BLOCK), which are still to be multiplied by plan->scale. key: the
// first of the block.
INLINE void attention_add_prior(real *scores, const PriorBlock *block, AttentionPrior prior, int key, int keys,
                                const AttentionPlan *plan, int wide) {
    const real inverse_scale = 1 / plan->scale;
    for (int i = 0; i < keys; i++) {
        const real x = (real)(((key + i) % prior.width + 0.5) / prior.width);
        const real y = (real)(((key + i) / prior.width + 0.5) / prior.height);
#pragma GCC unroll 3
        for (int j = 0; j < wide; j++) {
            const vec dx = x - block->middle[0][j], dy = y - block->middle[1][j];
            const vec distance = dx * dx * block->steepness[0][j] + dy * dy * block->steepness[1][j];
            real *score = scores + i * Q_BLOCK + j * LANES;
            vec_store(score, vec_load(score) - distance * inverse_scale);
        }
    }
}

typedef struct {
    real *out, *lse;
    bf16 *rounded;
    const void *q;
    const real *keys, *values;  // packed: keys as rows, values as units along the keys
    Dropout dropout;
    AttentionPrior prior;
    AttentionPlan plan;
} AttentionForward;

// From a block's scores to the weights exp(scale score - base) that v meets, in place, where base is the greatest
// scaled score so far; total: their sum before dropout. shrink (Q_BLOCK): the factor of what was summed with the old
// base.
INLINE void attention_forward_scores(real *scores, real *shrink, vec base[WIDE], vec total[WIDE],
                                     const AttentionForward *f, uint64_t element, int keys, int wide, int half) {
    const real scale = f->plan.scale;
    const int completed = attention_round(keys, &f->plan), dropping = f->dropout.p > 0;
    ivec keep[K_BLOCK / 32][WIDE];
    vec top[WIDE], block_total[WIDE];
    if (dropping) attention_keep_bits(keep, f->dropout, element, f->plan.Tk, keys, wide);
#pragma GCC unroll 3
    for (int j = 0; j < wide; j++) top[j] = vec_load(scores + j * LANES), block_total[j] = fill(0);
    for (int i = 0; i < keys; i++) {
#pragma GCC unroll 3
        for (int j = 0; j < wide; j++) top[j] = vec_max(vec_load(scores + i * Q_BLOCK + j * LANES), top[j]);
    }
#pragma GCC unroll 3
    for (int j = 0; j < wide; j++) {
        const vec old = base[j];
        base[j] = vec_max(top[j] * scale, old);
        top[j] = exp_lanes(old - base[j]);
        vec_store(shrink + j * LANES, top[j]);
    }
    attention_complete(scores, keys, completed, wide);
    for (int i = 0; i < completed; i += 2) {
#pragma GCC unroll 3
        for (int j = 0; j < wide; j++) {
            const real *score = scores + i * Q_BLOCK + j * LANES;
            vec even = exp_lanes(vec_load(score) * scale - base[j]);
            vec odd = exp_lanes(vec_load(score + Q_BLOCK) * scale - base[j]);
            block_total[j] += even + odd;
            if (dropping) {
                even = (vec)((ivec)even & attention_kept(keep, i, j));
                odd = (vec)((ivec)odd & attention_kept(keep, i + 1, j));
            }
            attention_store_units(scores, i, j, even, odd, half);
        }
    }
#pragma GCC unroll 3
    for (int j = 0; j < wide; j++) total[j] = total[j] * top[j] + block_total[j];
}

// One block of queries of one head, of which the first `wide` vectors are in use. As keys pass by, `base` is the
// greatest scaled score so far, `total` the sum of exp(score - base) and `sums` that of exp(score - base) v.
// scratch: scores (K_BLOCK, Q_BLOCK), queries and sums (padded_dim, Q_BLOCK).
INLINE void attention_forward_tiles(const AttentionForward *f, int head, int first, real *scratch, int wide, int half) {
    const AttentionPlan *plan = &f->plan;
    const size_t padded_dim = (size_t)plan->padded_dim;
    real *scores = scratch, *queries = scores + K_BLOCK * Q_BLOCK, *sums = queries + Q_BLOCK * padded_dim;
    real shrink[Q_BLOCK], *start = NULL;
    vec base[WIDE], total[WIDE];
    for (int j = 0; j < wide; j++) {  // not -inf: -inf - -inf would be NaN
        base[j] = fill(sizeof(real) == 4 ? (real)-3.4e38 : (real)-1.7e308);
        total[j] = fill(0);
    }
    PriorBlock gaussians;
    if (f->prior.boxes) attention_prior_block(&gaussians, f->prior, head, first, plan);
    attention_pack_columns(queries, f->q, first, plan->Tq, head, plan);
    for (int key = 0; key < plan->Tk; key += K_BLOCK) {
        const int count = plan->Tk - key < K_BLOCK ? plan->Tk - key : K_BLOCK;
        const size_t at = (head * plan->head_keys + key * padded_dim) / (half ? 2 : 1);
        attention_scores(scores, f->keys + at, queries, count, plan, wide, half);
        if (f->prior.boxes) attention_add_prior(scores, &gaussians, f->prior, key, count, plan, wide);
        attention_forward_scores(scores, shrink, base, total, f, ((uint64_t)head * plan->Tq + first) * plan->Tk + key,
                                 count, wide, half);
        attention_sum_keys(sums, f->values + at, scores, half ? attention_round(count, plan) / 2 : count, start, plan,
                           wide, half);
        start = shrink;
    }
    for (int j = 0; j < wide; j++) {
        const int row = first + j * LANES;
        real factor[LANES];
        for (int i = 0; i < LANES && row + i < plan->Tq; i++) {
            const real sum = total[j][i];
            factor[i] = (real)(1 / (sum * (1 - f->dropout.p)));
            f->lse[(size_t)head * plan->Tq + row + i] = base[j][i] + (real)log((double)sum);
        }
        attention_unpack_columns(f->out, 0, row, head, sums + j * LANES, factor, plan);
        if (f->rounded) attention_unpack_columns(f->rounded, 1, row, head, sums + j * LANES, factor, plan);
    }
}

// Rows in use in the block of keys that begins with `first`, whole tiles of any product.
static int attention_rows(int first, int Tk) {
    return Tk - first < K_BLOCK ? (int)round_up((size_t)(Tk - first), AMX_TILE) : K_BLOCK;
}

// Vectors in use in the block of queries that begins with `first`.
static int attention_vectors(int first, const AttentionPlan *plan) {
    if (plan->amx) return AMX_TILE / LANES;
    return plan->Tq - first < Q_BLOCK ? (int)divide_up((size_t)(plan->Tq - first), LANES) : WIDE;
}

static void attention_forward_block(const AttentionForward *f, int head, int first, real *scratch) {
    const int wide = attention_vectors(first, &f->plan);
    if (f->plan.amx) amx_begin();
    if (sizeof(real) == 4 && f->plan.half) {
        if (wide == 1) attention_forward_tiles(f, head, first, scratch, 1, 1);
        if (wide == 2) attention_forward_tiles(f, head, first, scratch, 2, 1);
        if (wide == 3) attention_forward_tiles(f, head, first, scratch, 3, 1);
    } else {
        if (wide == 1) attention_forward_tiles(f, head, first, scratch, 1, 0);
        if (wide == 2) attention_forward_tiles(f, head, first, scratch, 2, 0);
        if (wide == 3) attention_forward_tiles(f, head, first, scratch, 3, 0);
    }
    if (f->plan.amx) amx_end();
}

// out (Tq, C) from q (Tq, C), k (Tk, C), v (Tk, C); C = heads * head_dim, a head has head_dim adjacent channels.
// lse (heads, Tq): logarithm of the softmax's denominator, sum over keys of exp(score). All of out and lse is written.
// dropout: on the probabilities, element (head * Tq + query) * Tk + key. prior: is added to the scores. A NaN in q, k
// or v comes out as NaN. half: q, k and v are bf16, and rounded (Tq, C) receives out as bf16; else rounded is NULL.
// workspace: attention_workspace() reals.
static void attention_forward(real *out, bf16 *rounded, real *lse, const void *q, const void *k, const void *v, int Tq,
                              int Tk, int C, int heads, Dropout dropout, AttentionPrior prior, int half,
                              real *workspace) {
    const double begin = profile_begin();
    const AttentionPlan plan = attention_plan(Tq, Tk, C, heads, half);
    const size_t all_keys = heads * plan.head_keys;
    real *keys = workspace, *values = keys + all_keys, *scratch = values + all_keys;
    const AttentionForward f = {out, lse, rounded, q, keys, values, dropout, prior, plan};
    const long blocks = (long)divide_up(Tq, plan.queries);
    Tasks tasks = share_tasks(heads * blocks);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int head = 0; head < heads; head++) {
            for (int first = 0; first < plan.padded_keys; first += K_BLOCK) {
                const size_t at = (head * plan.head_keys + (size_t)first * plan.padded_dim) / (half ? 2 : 1);
                const int rows = attention_rows(first, Tk);
                attention_pack_rows(keys + at, k, first, rows, Tk, head, &plan);
                attention_pack_across(values + at, v, first, rows, Tk, head, &plan);
            }
        }
        real *mine = scratch + (size_t)omp_get_thread_num() * plan.thread_scratch;
        for (long task; (task = take_task(&tasks)) >= 0;)
            attention_forward_block(&f, (int)(task / blocks), (int)(task % blocks) * plan.queries, mine);
    }
    profile_end(begin, "attention", "forward", 4.0 * Tq * Tk * C, (double)number_bytes(half) * 2.0 * (Tq + Tk) * C);
}

// Where query `query` looks: weights (Tk), the mean over the heads of softmax(q k^T / sqrt(head_dim) + prior), made
// again from what attention_forward was given and from the lse it left. For looking at: one query at a time, and not
// fast.
static void attention_weights(double *weights, const void *q, const void *k, const real *lse, int query, int Tq, int Tk,
                              int C, int heads, AttentionPrior prior, int half) {
    const AttentionPlan plan = attention_plan(Tq, Tk, C, heads, half);
    memset(weights, 0, (size_t)Tk * sizeof(double));
    for (int head = 0; head < heads; head++) {
        const char *query_row = attention_row(q, query, head, &plan);
        const double base = (double)lse[(size_t)head * Tq + query];
        PriorBlock block;  // of which the query is the first
        if (prior.boxes) attention_prior_block(&block, prior, head, query, &plan);
        for (int key = 0; key < Tk; key++) {
            const char *key_row = attention_row(k, key, head, &plan);
            double score = 0;
            for (int d = 0; d < plan.head_dim; d++)
                score += (double)load_number(query_row, d, half) * (double)load_number(key_row, d, half);
            score *= (double)plan.scale;
            for (int axis = 0; axis < 2 && prior.boxes; axis++) {
                const double centre =
                    axis ? (key / prior.width + 0.5) / prior.height : (key % prior.width + 0.5) / prior.width;
                const double distance = centre - (double)block.middle[axis][0][0];
                score -= distance * distance * (double)block.steepness[axis][0][0];
            }
            weights[key] += exp(score - base) / heads;
        }
    }
}

// What attention_backward works with. Packed, for each head: keys, values (rows, and key_units as units along the
// keys), queries and douts as units along the queries, and block by block as columns. dots: D of attention_backward.
typedef struct {
    void *dq, *dk, *dv;
    real *keys, *values, *key_units, *queries, *query_columns, *douts, *dout_columns;
    real *dq_parts;    // (chunks, heads, query blocks, padded_dim, Q_BLOCK)
    real *dots, *lse;  // (heads, padded_queries)
    real *scratch;
    Dropout dropout;
    AttentionPrior prior;
    AttentionPlan plan;
} AttentionBackward;

// Packs one block of queries of one head.
static void attention_backward_pack(const AttentionBackward *b, const void *dout, const void *q, const real *out,
                                    const real *lse, int head, int first) {
    const AttentionPlan *plan = &b->plan;
    const int head_dim = plan->head_dim, Tq = plan->Tq, half = plan->half;
    const size_t at = attention_block(head, first, plan) / (half ? 2 : 1);
    const int rows = Tq - first < plan->queries ? attention_round(Tq - first, plan) : plan->queries;
    attention_pack_units(b->queries + at, q, first, rows, Tq, head, plan);
    attention_pack_units(b->douts + at, dout, first, rows, Tq, head, plan);
    attention_pack_columns(b->query_columns + at, q, first, Tq, head, plan);
    attention_pack_columns(b->dout_columns + at, dout, first, Tq, head, plan);
    for (int i = first; i < first + plan->queries; i++) {
        const size_t row = (size_t)i * plan->C + (size_t)head * head_dim;
        double dots[8] = {0};  // what D and dP have in common, which may be most of them, cancels
        for (int d = 0; d < head_dim && i < Tq; d++)
            dots[d % 8] += (double)load_number(dout, row + d, half) * out[row + d];
        for (int n = 4; n > 0; n /= 2) {
            for (int d = 0; d < n; d++) dots[d] += dots[d + n];
        }
        b->dots[(size_t)head * plan->padded_queries + i] = (real)dots[0];
        b->lse[(size_t)head * plan->padded_queries + i] = i < Tq ? lse[(size_t)head * Tq + i] : 0;
    }
}

// From a block's raw scores and dA^T = v dout^T (both (keys, Q_BLOCK)) to the weights A^T that v met and to dS^T, as
// operands of the products with rows of queries: in place; with half both are in `scores`, row by row one beside the
// other, and dS^T is in `dscores` once more as units along the keys. lse and dots (Q_BLOCK).
INLINE void attention_backward_scores(real *scores, real *dscores, const real *lse, const real *dots, int keys,
                                      const AttentionBackward *b, uint64_t element, int wide, int half) {
    const real scale = b->plan.scale, inverse_keep = (real)(1 / (1 - b->dropout.p));
    const int completed = attention_round(keys, &b->plan), dropping = b->dropout.p > 0;
    ivec keep[K_BLOCK / 32][WIDE];
    if (dropping) attention_keep_bits(keep, b->dropout, element, b->plan.Tk, keys, wide);
    attention_complete(scores, keys, completed, wide);
    for (int i = 0; i < completed; i += 2) {
        vec kept[2][WIDE], dscore[2][WIDE];
#pragma GCC unroll 3
        for (int j = 0; j < wide; j++) {
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++) {
                const int at = (i + r) * Q_BLOCK + j * LANES;
                const vec weight = exp_lanes(vec_load(scores + at) * scale - vec_load(lse + j * LANES));
                vec dweight = vec_load(dscores + at);
                kept[r][j] = weight;
                if (dropping) {
                    const ivec mask = attention_kept(keep, i + r, j);
                    kept[r][j] = (vec)((ivec)weight & mask);
                    dweight = (vec)((ivec)dweight & mask);
                }
                dscore[r][j] = weight * (dweight * inverse_keep - vec_load(dots + j * LANES));
            }
        }
#pragma GCC unroll 3
        for (int j = 0; j < wide; j++) {
            attention_store_units(dscores, i, j, dscore[0][j], dscore[1][j], half);
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++) {
                real *row = scores + (i + r) * Q_BLOCK;
                store_lanes(row, (size_t)j * LANES, kept[r][j], half);
                if (half) store_lanes(row + Q_BLOCK / 2, (size_t)j * LANES, dscore[r][j], half);
            }
        }
    }
}

// One head, one chunk of keys and one block of queries: five products for a block of keys, none of them done twice.
// Rows past the last key are zeros that are multiplied with zeros and left out at the end. scratch: scores and dscores
// (K_BLOCK, Q_BLOCK), dkeys and dvalues (chunk, padded_dim), sums over the blocks of queries.
INLINE void attention_backward_tiles(const AttentionBackward *b, int head, int chunk, int first, real *scratch,
                                     int wide, int half) {
    const AttentionPlan *plan = &b->plan;
    const int padded_dim = plan->padded_dim, Tq = plan->Tq, Tk = plan->Tk;
    const int start = chunk * plan->chunk, end = start + plan->chunk < Tk ? start + plan->chunk : Tk;
    const int queries = Tq - first < plan->queries ? Tq - first : plan->queries;
    const int query_units = half ? attention_round(queries, plan) / 2 : queries;
    const size_t block = attention_block(head, first, plan), at = block / (half ? 2 : 1);
    const size_t lanes = (size_t)head * plan->padded_queries + first;
    real *scores = scratch, *dscores = scores + K_BLOCK * Q_BLOCK, *dkeys = dscores + K_BLOCK * Q_BLOCK;
    real *dvalues = dkeys + (size_t)plan->chunk * padded_dim, ones[Q_BLOCK];
    real *dq_part = b->dq_parts + chunk * plan->heads * plan->head_queries + block;
    PriorBlock gaussians;
    if (b->prior.boxes) attention_prior_block(&gaussians, b->prior, head, first, plan);
    for (int i = 0; i < Q_BLOCK; i++) ones[i] = 1;
    for (int key = start; key < end; key += K_BLOCK) {
        const int count = end - key < K_BLOCK ? end - key : K_BLOCK;
        const size_t key_at = (head * plan->head_keys + (size_t)key * padded_dim) / (half ? 2 : 1);
        const size_t chunk_at = (size_t)(key - start) * padded_dim;
        attention_scores(scores, b->keys + key_at, b->query_columns + at, count, plan, wide, half);
        if (b->prior.boxes) attention_add_prior(scores, &gaussians, b->prior, key, count, plan, wide);
        attention_scores(dscores, b->values + key_at, b->dout_columns + at, count, plan, wide, half);
        attention_backward_scores(scores, dscores, b->lse + lanes, b->dots + lanes, count, b,
                                  ((uint64_t)head * Tq + first) * Tk + key, wide, half);
        attention_sum_queries(dvalues + chunk_at, scores, b->douts + at, count, query_units, first ? ones : NULL, plan,
                              half);
        attention_sum_queries(dkeys + chunk_at, half ? scores + Q_BLOCK / 2 : dscores, b->queries + at, count,
                              query_units, first ? ones : NULL, plan, half);
        attention_sum_keys(dq_part, b->key_units + key_at, dscores, half ? attention_round(count, plan) / 2 : count,
                           key > start ? ones : NULL, plan, wide, half);
    }
}

// One head and one chunk of keys with all queries.
static void attention_backward_chunk(const AttentionBackward *b, int head, int chunk, real *scratch) {
    const AttentionPlan *plan = &b->plan;
    if (plan->amx) amx_begin();
    for (int first = 0; first < plan->Tq; first += plan->queries) {
        const int wide = attention_vectors(first, plan);
        if (sizeof(real) == 4 && plan->half) {
            if (wide == 1) attention_backward_tiles(b, head, chunk, first, scratch, 1, 1);
            if (wide == 2) attention_backward_tiles(b, head, chunk, first, scratch, 2, 1);
            if (wide == 3) attention_backward_tiles(b, head, chunk, first, scratch, 3, 1);
        } else {
            if (wide == 1) attention_backward_tiles(b, head, chunk, first, scratch, 1, 0);
            if (wide == 2) attention_backward_tiles(b, head, chunk, first, scratch, 2, 0);
            if (wide == 3) attention_backward_tiles(b, head, chunk, first, scratch, 3, 0);
        }
    }
    if (plan->amx) amx_end();
    const real *dkeys = scratch + 2 * K_BLOCK * Q_BLOCK, *dvalues = dkeys + (size_t)plan->chunk * plan->padded_dim;
    const real inverse_keep = (real)(1 / (1 - b->dropout.p));
    for (int i = 0, key = chunk * plan->chunk; i < plan->chunk && key < plan->Tk; i++, key++) {
        attention_unpack(b->dk, key, head, dkeys + (size_t)i * plan->padded_dim, plan->scale, plan);
        attention_unpack(b->dv, key, head, dvalues + (size_t)i * plan->padded_dim, inverse_keep, plan);
    }
}

// One block of dq: the chunks' parts, added up in their order.
static void attention_backward_sum(const AttentionBackward *b, int head, int first) {
    const AttentionPlan *plan = &b->plan;
    real *sum = b->dq_parts + attention_block(head, first, plan);
    for (int chunk = 1; chunk < plan->chunks; chunk++) {
        const real *part = sum + chunk * plan->heads * plan->head_queries;
        for (int i = 0; i < Q_BLOCK * plan->head_dim; i++) sum[i] += part[i];
    }
    real scale[LANES];
    vec_store(scale, fill(plan->scale));
    for (int i = 0; i < plan->queries && first + i < plan->Tq; i += LANES)
        attention_unpack_columns(b->dq, plan->half, first + i, head, sum + i, scale, plan);
}

// dq, dk, dv from dout; all of them are written. out and lse are attention_forward's, dropout and prior are what they
// were there.
// half: all of them but out and lse are bf16.
//
// With scores S = q k^T scale, P = softmax(S), A = M P (M: 1 / (1 - p) where kept, else 0) and out = A v:
//   dv = A^T dout,  dA = dout v^T,  dP = M dA,  dS = P (dP - D),  dq = scale dS k,  dk = scale dS^T q
// where D_i = sum_j P_ij dP_ij = sum_j P_ij M_ij (dout_i . v_j) = dout_i . sum_j A_ij v_j = dout_i . out_i, dropout or
// not: no pass over the keys is needed to get it. P = exp(S - lse) is made again block by block. Factors that a whole
// tensor has in common are left to the end, so that operands are rounded once.
//
// A task is one head and one chunk of keys: it owns its rows of dk and dv, and its part of dq.
static void attention_backward(void *dq, void *dk, void *dv, const void *dout, const void *q, const void *k,
                               const void *v, const real *out, const real *lse, int Tq, int Tk, int C, int heads,
                               Dropout dropout, AttentionPrior prior, int half, real *workspace) {
    const double begin = profile_begin();
    AttentionBackward b;
    const AttentionPlan plan = b.plan = attention_plan(Tq, Tk, C, heads, half);
    const size_t all_keys = heads * plan.head_keys, all_queries = heads * plan.head_queries;
    b.dq = dq, b.dk = dk, b.dv = dv, b.dropout = dropout, b.prior = prior;
    b.keys = workspace;
    b.values = b.keys + all_keys;
    b.key_units = half ? b.keys + all_keys / 2 : b.keys;
    b.queries = b.values + all_keys;
    b.query_columns = b.queries + all_queries;
    b.douts = b.query_columns + all_queries;
    b.dout_columns = b.douts + all_queries;
    b.dq_parts = b.dout_columns + all_queries;
    b.dots = b.dq_parts + plan.chunks * all_queries;
    b.lse = b.dots + (size_t)heads * plan.padded_queries;
    b.scratch = b.lse + (size_t)heads * plan.padded_queries;
    Tasks tasks = share_tasks((long)heads * plan.chunks);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static) nowait
        for (int head = 0; head < heads; head++) {
            for (int first = 0; first < plan.padded_keys; first += K_BLOCK) {
                const size_t at = (head * plan.head_keys + (size_t)first * plan.padded_dim) / (half ? 2 : 1);
                const int rows = attention_rows(first, Tk);
                attention_pack_rows(b.keys + at, k, first, rows, Tk, head, &plan);
                attention_pack_rows(b.values + at, v, first, rows, Tk, head, &plan);
                if (half) attention_pack_across(b.key_units + at, k, first, rows, Tk, head, &plan);
            }
        }
#pragma omp for collapse(2) schedule(static)
        for (int head = 0; head < heads; head++) {
            for (int first = 0; first < Tq; first += plan.queries)
                attention_backward_pack(&b, dout, q, out, lse, head, first);
        }
        real *mine = b.scratch + (size_t)omp_get_thread_num() * plan.thread_scratch;
        for (long task; (task = take_task(&tasks)) >= 0;)
            attention_backward_chunk(&b, (int)(task / plan.chunks), (int)(task % plan.chunks), mine);
#pragma omp barrier
#pragma omp for collapse(2) schedule(static)
        for (int head = 0; head < heads; head++) {
            for (int first = 0; first < Tq; first += plan.queries) attention_backward_sum(&b, head, first);
        }
    }
    profile_end(begin, "attention", "backward", 10.0 * Tq * Tk * C, (double)number_bytes(half) * 4.0 * (Tq + Tk) * C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layer norm (Ba et al. 2016)

// y = (x - mean) * rstd * weight + bias for each of `rows` rows of C channels; mean and rstd (rows) are kept for the
// backward pass: mean of the row and 1 / sqrt(variance + 1e-5), the variance biased (divided by C). rounded: y once
// more as bf16, or NULL.
static void layernorm_forward(real *y, bf16 *rounded, real *mean, real *rstd, const real *x, const real *weight,
                              const real *bias, int rows, int C) {
    const double begin = profile_begin();
    const int whole = C / LANES * LANES;
#pragma omp parallel for schedule(static) if ((int64_t)rows * C > 16384)
    for (int row = 0; row < rows; row++) {
        const real *from = x + (size_t)row * C;
        real *to = y + (size_t)row * C;
        vec lanes = {0};
        for (int c = 0; c < whole; c += LANES) lanes += vec_load(from + c);
        double sum = lane_sum(lanes);
        for (int c = whole; c < C; c++) sum += from[c];
        const real center = (real)(sum / C);
        lanes = fill(0);
        for (int c = 0; c < whole; c += LANES) {
            vec offset = vec_load(from + c) - center;
            lanes += offset * offset;
        }
        sum = lane_sum(lanes);
        for (int c = whole; c < C; c++) sum += (from[c] - center) * (from[c] - center);
        const real scale = (real)(1 / sqrt(sum / C + 1e-5));
        for (int c = 0; c < C; c += LANES) {
            const size_t left = (size_t)(C - c);
            const vec normed = (load_rest(from, c, left, 0) - center) * scale;
            const vec value = normed * load_rest(weight, c, left, 0) + load_rest(bias, c, left, 0);
            store_rest(to, c, value, left, 0);
            if (rounded) store_rest(rounded, (size_t)row * C + c, value, left, 1);
        }
        mean[row] = center;
        rstd[row] = scale;
    }
    profile_end(begin, "layer norm", "forward", 0, sizeof(real) * 2.0 * rows * C);
}

// dx is written, dy may be its memory; dweight and dbias (C; or NULL, of a frozen norm) are added to, rows in order,
// one owner for a channel. With n = (x - mean) rstd and g = dy weight:
//   dbias = sum over rows of dy,  dweight = sum over rows of dy n,
//   dx = rstd (g - mean_C(g) - n mean_C(g n)): the part of g that moves neither the row's mean nor its variance.
static void layernorm_backward(real *dx, real *dweight, real *dbias, const real *dy, const real *x, const real *mean,
                               const real *rstd, const real *weight, int rows, int C) {
    const double begin = profile_begin();
    enum { COLUMNS = 32 };
    const int whole = C / LANES * LANES, trained = dweight ? C : 0;
#pragma omp parallel if ((int64_t)rows * C > 16384)
    {
#pragma omp for schedule(static)
        for (int first = 0; first < trained; first += COLUMNS) {
            const int count = C - first < COLUMNS ? C - first : COLUMNS;
            double sum[COLUMNS] = {0}, sum_normed[COLUMNS] = {0};
            for (int row = 0; row < rows; row++) {
                const real *dy_row = dy + (size_t)row * C + first, *x_row = x + (size_t)row * C + first;
                for (int c = 0; c < count; c++) {
                    sum[c] += dy_row[c];
                    sum_normed[c] += (double)(dy_row[c] * ((x_row[c] - mean[row]) * rstd[row]));
                }
            }
            for (int c = 0; c < count; c++) {
                dbias[first + c] += (real)sum[c];
                dweight[first + c] += (real)sum_normed[c];
            }
        }
#pragma omp for schedule(static)
        for (int row = 0; row < rows; row++) {
            const real *dy_row = dy + (size_t)row * C, *x_row = x + (size_t)row * C;
            vec lanes = {0}, lanes_normed = {0};
            for (int c = 0; c < whole; c += LANES) {
                const vec g = vec_load(dy_row + c) * vec_load(weight + c);
                lanes += g;
                lanes_normed += g * ((vec_load(x_row + c) - mean[row]) * rstd[row]);
            }
            double sum = lane_sum(lanes), sum_normed = lane_sum(lanes_normed);
            for (int c = whole; c < C; c++) {
                const real g = dy_row[c] * weight[c];
                sum += g;
                sum_normed += g * ((x_row[c] - mean[row]) * rstd[row]);
            }
            const real mean_g = (real)(sum / C), mean_gn = (real)(sum_normed / C);
            for (int c = 0; c < C; c++) {
                const real n = (x_row[c] - mean[row]) * rstd[row];
                dx[(size_t)row * C + c] = rstd[row] * (dy_row[c] * weight[c] - mean_g - n * mean_gn);
            }
        }
    }
    profile_end(begin, "layer norm", "backward", 0, sizeof(real) * 3.0 * rows * C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Max pooling, 3 x 3, stride 2, padding 1

typedef unsigned char lane_bytes __attribute__((vector_size(LANES)));

// x (H, W, C) to y ((H + 1) / 2, (W + 1) / 2, C), both bf16 with half. argmax: 3 * ky + kx of the greatest pixel of the
// window, the first one among equals, in rows, as PyTorch chooses; a NaN counts as greater than all.
static void maxpool_forward(void *y, unsigned char *argmax, const void *x, int H, int W, int C, int half) {
    const double begin = profile_begin();
    const int out_H = (H + 1) / 2, out_W = (W + 1) / 2;
#pragma omp parallel for schedule(static)
    for (int oy = 0; oy < out_H; oy++) {
        for (int ox = 0; ox < out_W; ox++) {
            const int ky0 = oy == 0, kx0 = ox == 0;  // the first and one past the last tap inside the picture
            const int ky1 = 2 * oy + 1 < H ? 3 : 2, kx1 = 2 * ox + 1 < W ? 3 : 2;
            for (int c = 0; c < C; c += LANES) {
                const size_t left = (size_t)(C - c), out = ((size_t)oy * out_W + ox) * C + c;
                vec best = fill(0);
                ivec which = (ivec)fill(0);
                for (int ky = ky0; ky < ky1; ky++) {
                    for (int kx = kx0; kx < kx1; kx++) {
                        const size_t at = ((size_t)(2 * oy - 1 + ky) * W + 2 * ox - 1 + kx) * C + c;
                        const vec pixel = load_rest(x, at, left, half);
                        const ivec is_first = (ivec)fill(0) - (ky == ky0 && kx == kx0);
                        const ivec better = is_first | (pixel > best) | (pixel != pixel);
                        best = where(better, pixel, best);
                        which = (better & (3 * ky + kx)) | (~better & which);
                    }
                }
                store_rest(y, out, best, left, half);
                const lane_bytes taps = __builtin_convertvector(which, lane_bytes);
                memcpy(argmax + out, &taps, left < sizeof taps ? left : sizeof taps);
            }
        }
    }
    profile_end(begin, "max pooling", "forward", 0, sizeof(real) * 1.25 * H * W * C);
}

// dx (H, W, C), written, and dy are bf16 with half. A pixel gathers dy from the up to four windows that hold it and
// chose it, in their order.
static void maxpool_backward(void *dx, const void *dy, const unsigned char *argmax, int H, int W, int C, int half) {
    const double begin = profile_begin();
    const int out_H = (H + 1) / 2, out_W = (W + 1) / 2;
#pragma omp parallel for schedule(static)
    for (int iy = 0; iy < H; iy++) {
        for (int ix = 0; ix < W; ix++) {
            for (int c = 0; c < C; c += LANES) {
                const size_t left = (size_t)(C - c);
                vec sum = fill(0);
                for (int oy = iy / 2; oy <= (iy + 1) / 2 && oy < out_H; oy++) {
                    for (int ox = ix / 2; ox <= (ix + 1) / 2 && ox < out_W; ox++) {
                        const int tap = 3 * (iy + 1 - 2 * oy) + (ix + 1 - 2 * ox);
                        const size_t at = ((size_t)oy * out_W + ox) * C + c;
                        lane_bytes taps = {0};
                        memcpy(&taps, argmax + at, left < sizeof taps ? left : sizeof taps);
                        const ivec chosen = __builtin_convertvector(taps, ivec) == tap;
                        sum += (vec)(chosen & (ivec)load_rest(dy, at, left, half));
                    }
                }
                store_rest(dx, ((size_t)iy * W + ix) * C + c, sum, left, half);
            }
        }
    }
    profile_end(begin, "max pooling", "backward", 0, sizeof(real) * 1.25 * H * W * C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Positions

// features (count): a number as sines and cosines of falling frequencies, angle / 10000^(2 (i / 2) / count) for i <
// count, sines for even i (i / 2 is rounded down).
static void sine_features(real *features, int count, double angle) {
    for (int i = 0; i < count; i++) {
        const double slow = angle / pow(10000, 2.0 * (i / 2) / count);
        features[i] = (real)(i % 2 ? cos(slow) : sin(slow));
    }
}

// pos (h * w, C): DETR's PositionEmbeddingSine over an unpadded h x w grid, normalize=True, temperature 10000. The
// first C / 2 channels tell y, the others x, as features of the angle 2 pi (place + 1) / (places + 1e-6).
static void sine_positions(real *pos, int h, int w, int C) {
    const int half = C / 2;
    for (int along_x = 0; along_x < 2; along_x++) {
        const int places = along_x ? w : h;
        for (int place = 0; place < places; place++) {
            // computed at the first cell of this row or column, then copied along it
            real *first = pos + (size_t)(along_x ? place : place * w) * C + (along_x ? half : 0);
            sine_features(first, half, 2 * 3.14159265358979323846 * (place + 1) / (places + 1e-6));
            const size_t step = (size_t)(along_x ? w : 1) * C;
            for (int i = 1; i < (along_x ? h : w); i++) memcpy(first + i * step, first, (size_t)half * sizeof(real));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Model: configuration and parameters

enum { MAX_STAGES = 8, MAX_DEC_LAYERS = 64 };

typedef struct {
    // ResNet (v1.5: the stride sits in the 3x3 convolution)
    int bottleneck;                              // 1: 1x1, 3x3, 1x1 blocks; 0: basic blocks of two 3x3
    int num_stages;                              // 4 in every published ResNet
    int depths[MAX_STAGES], widths[MAX_STAGES];  // blocks and output channels of each stage
    int stem_width;                              // 64
    int dilation;                                // DC5: the last stage dilates by 2 instead of halving the size
    int timm_names;  // the checkpoint calls the backbone's tensors what timm calls them (always so in a published DC5)
    // transformer
    int hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, num_queries;
    int num_labels;  // classes without "no object"
    int focal;       // --class_loss focal: a class's score is the sigmoid of its logit, and "no object" has no logit
    int anchor;      // --decoder anchor: queries are boxes, which the decoder's layers move
    double dropout;
    int half;            // --precision bf16: how it is computed, no property of the network
    const char *freeze;  // --freeze: names with commas between them, see is_frozen(); or NULL
} ModelConfig;

// Logits of a query: one for each class; without focal the last is "no object".
static inline int num_logits(const ModelConfig *config) { return config->num_labels + !config->focal; }

enum ParamGroup { GROUP_BACKBONE, GROUP_TRANSFORMER, GROUP_STATISTICS };  // statistics: a norm's mean and variance
enum ParamInit { INIT_ZERO, INIT_ONE, INIT_UNIFORM, INIT_NORMAL, INIT_CONSTANT, INIT_BOXES };

// One tensor of the network. The table of these is what initialising, loading, saving, the optimizer, the memory plan
// and the tests walk.
typedef struct {
    char name[120];  // as in the checkpoint
    int ndim;
    int64_t shape[4];  // as in the checkpoint: a convolution is (out, in, kernel, kernel); in memory it is
    size_t count;      //   (out, kernel, kernel, in), rows of channels like everything else
    enum ParamGroup group;
    int trained;  // the optimizer changes it
    enum ParamInit init;
    double init_scale;  // uniform: the bound; normal: the deviation; constant: the value; boxes: their width and height
    real *value;
    real *grad, *exp_avg, *exp_avg_sq;  // NULL unless trained
    int stale;                          // grad is the last step's, of a layer's weight: see zero_gradients()
    real *ema;                          // average of the values; NULL unless trained and asked for
} Param;

// A linear layer or a convolution, with the frozen batch norm that may follow it folded in.
typedef struct {
    ConvShape shape;
    Param *weight, *bias;                                        // bias: NULL where a norm follows
    Param *norm_weight, *norm_bias, *norm_mean, *norm_variance;  // or NULL
    real *scale;                                                 // (out): norm_weight / sqrt(variance + 1e-5)
    real *folded_bias;                                           // (out): norm_bias - mean * scale
    int winograd, winograd_weight;   // done by the Winograd room: forward and backward data; backward weight
    real *packed, *packed_backward;  // one and the same with one picture a step, see has_one_packed()
    real *workspace;        // for Winograd, forward and backward data: all layers share it, see layer_workspace()
    size_t workspace_size;  // of it, for one thread
    int needs_input_gradient;
    // Which numbers are bf16. half: the operands of its products, x and dy; half_y: y and what is added to it;
    // half_dx: dx, what is added to it, and the mask.
    int half, half_y, half_dx;
} Layer;

typedef struct {
    Param *weight, *bias;
} Norm;

typedef struct {
    Layer query, key, value, output;
    Norm norm;
} AttentionBlock;

typedef struct {
    Layer fc1, fc2;
    Norm norm;
    int trained;  // it, or something before it: a gradient comes here
} FeedForward;

typedef struct {
    Layer conv[3], shortcut;               // conv[2] in bottleneck blocks, shortcut where the shape changes
    int num_convs, has_shortcut, trained;  // trained: as in FeedForward
} Block;

// fp16 (train_detr.cu): the loss is multiplied by this before the way back, so that small gradients stay numbers, and
// the gradient divided by it at the end; being a power of two, it rounds nothing. A gradient that is not finite was too
// large: its step changes nothing and halves the scale, which doubles after LOSS_SCALE_STEPS others (Micikevicius et
// al. 2018).
typedef struct {
    float scale;     // 1 to MOST_LOSS_SCALE, always 1 where T is another type; 0: no step has been taken on a GPU
    int good_steps;  // since it changed
    int skipped;     // steps that changed nothing, of all
} LossScale;

enum {
    FIRST_LOSS_SCALE = 1 << 16,
    MOST_LOSS_SCALE = 1 << 24,  // the smallest number above 0 that fp16 has becomes 1
    LOSS_SCALE_STEPS = 2000
};

typedef struct {
    ModelConfig config;
    Param **params;
    int num_params;
    size_t num_trained;  // numbers the optimizer changes
    int batch_size;      // pictures in an optimizer step; 0: no packed_backward, gradients and optimizer state
    int train_backbone;  // --lr_backbone is not 0
    int from_scratch;    // no pretrained weights: stem, first stage and the norms' scale and bias are trained too
    int track_norms;     // --norm_init track: the frozen norms' statistics follow the pictures of the training
    Layer **layers;      // every layer that has weights to pack
    int num_layers;
    Layer stem;
    Block *blocks;  // all stages, one after another
    int num_blocks;
    Layer input_projection;
    Param *query_embeddings;  // (num_queries, hidden_dim): positions; anchor: (num_queries, 4), logits of cx, cy, w, h
    Param *query_content;     // anchor: (num_queries, hidden_dim), the decoder's first input
    Layer query_position_head[2];  // anchor: from a box's sine features to the query's position
    AttentionBlock *encoder_attention, *decoder_self, *decoder_cross;
    FeedForward *encoder_ffn, *decoder_ffn;
    Norm decoder_norm;
    Layer class_head, box_head[3];
    Arena weights, packed, optimizer;  // values; packed panels; gradients and Adam's moments
    Arena ema;                         // averages of the values
    LossScale loss_scale;
} Model;

// ---------------------------------------------------------------------------------------------------------------------
// Model: building the table of parameters

// 1 if the tensor `name` is in the module that `length` characters at `module` name: "encoder.layers.1", or the same
// with "model." before it, holds model.encoder.layers.1.fc1.weight.
static int is_in_module(const char *name, const char *module, size_t length) {
    const char *inner = strncmp(name, "model.", 6) == 0 ? name + 6 : name;
    return (strncmp(name, module, length) == 0 && name[length] == '.') ||
           (strncmp(inner, module, length) == 0 && inner[length] == '.');
}

// 1 if one of the modules that --freeze names holds the tensor.
static int is_frozen(const ModelConfig *config, const char *name) {
    int frozen = 0;
    for (const char *at = config->freeze; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        frozen |= is_in_module(name, at, strcspn(at, ","));
    return frozen;
}

// Adds one tensor to the table. Dimensions that do not exist are 0. `scale`: see ParamInit.
__attribute__((format(printf, 10, 11))) static Param *add_param(Model *model, enum ParamGroup group, int trained,
                                                                enum ParamInit init, double scale, int dim0, int dim1,
                                                                int dim2, int dim3, const char *format, ...) {
    Param *param = (Param *)allocate(sizeof(Param));
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(param->name, sizeof param->name, format, arguments);
    va_end(arguments);
    int dims[4] = {dim0, dim1, dim2, dim3};
    param->count = 1;
    for (int i = 0; i < 4 && dims[i]; i++) {
        param->shape[param->ndim++] = dims[i];
        param->count *= (size_t)dims[i];
    }
    param->group = group;
    param->trained = trained && model->batch_size > 0 && !is_frozen(&model->config, param->name);
    param->init = init;
    param->init_scale = scale;
    model->params = (Param **)grow(model->params, (size_t)model->num_params, sizeof(Param *));
    model->params[model->num_params++] = param;
    return param;
}

static void add_layer(Model *model, Layer *layer, ConvShape shape, int needs_input_gradient, int half, int half_y,
                      int half_dx) {
    layer->shape = shape;
    layer->half = half, layer->half_y = half_y, layer->half_dx = half_dx;
    layer->winograd = !half && winograd_fits(shape), layer->winograd_weight = !half && winograd_weight_pays(shape);
    layer->needs_input_gradient = needs_input_gradient && model->batch_size > 0;
    model->layers = (Layer **)grow(model->layers, (size_t)model->num_layers, sizeof(Layer *));
    model->layers[model->num_layers++] = layer;
}

// 1 if a gradient comes through the layer's output: the layer is trained, or something before it.
static int passes_gradient(const Layer *layer) { return layer->weight->trained || layer->needs_input_gradient; }

// A convolution and its frozen batch norm. `convolution` and `norm` are the names of the two in the checkpoint.
static void add_convolution(Model *model, Layer *layer, int in, int out, int kernel, int stride, int dilation,
                            int trained, int needs_input_gradient, const char *convolution, const char *norm) {
    const char *prefix = "model.backbone.conv_encoder.model";
    ConvShape shape = {in, out, kernel, stride, kernel / 2 * dilation, dilation};
    // He et al. 2015, fan out, as torchvision initialises its ResNets
    layer->weight = add_param(model, GROUP_BACKBONE, trained, INIT_NORMAL, sqrt(2.0 / ((double)out * kernel * kernel)),
                              out, in, kernel, kernel, "%s.%s.weight", prefix, convolution);
    const int train_norm = layer->weight->trained && model->from_scratch;
    layer->norm_weight =
        add_param(model, GROUP_BACKBONE, train_norm, INIT_ONE, 0, out, 0, 0, 0, "%s.%s.weight", prefix, norm);
    layer->norm_bias =
        add_param(model, GROUP_BACKBONE, train_norm, INIT_ZERO, 0, out, 0, 0, 0, "%s.%s.bias", prefix, norm);
    layer->norm_mean =
        add_param(model, GROUP_STATISTICS, 0, INIT_ZERO, 0, out, 0, 0, 0, "%s.%s.running_mean", prefix, norm);
    layer->norm_variance =
        add_param(model, GROUP_STATISTICS, 0, INIT_ONE, 0, out, 0, 0, 0, "%s.%s.running_var", prefix, norm);
    add_layer(model, layer, shape, needs_input_gradient, model->config.half, model->config.half, model->config.half);
}

enum { HALF_Y = 1, HALF_DX = 2, REAL_OPERANDS = 4 };

// A linear layer. bound < 0: PyTorch's default, 1 / sqrt(in), for weight and bias; else the weight's, with bias zero.
// bits: with --precision bf16 its operands are bf16 unless REAL_OPERANDS; y and dx are not unless HALF_Y, HALF_DX.
// trained_before: something that its input depends on is trained.
static void add_linear(Model *model, Layer *layer, int in, int out, double bound, int bits, int trained_before,
                       const char *name) {
    double standard = 1 / sqrt((double)in);
    ConvShape shape = {in, out, 1, 1, 0, 1};
    int is_projection =
        layer == &model->input_projection;  // the one linear layer that the checkpoint calls a 1x1 convolution
    layer->weight = add_param(model, GROUP_TRANSFORMER, 1, INIT_UNIFORM, bound < 0 ? standard : bound, out, in,
                              is_projection, is_projection, "%s.weight", name);
    layer->bias = add_param(model, GROUP_TRANSFORMER, 1, bound < 0 ? INIT_UNIFORM : INIT_ZERO, standard, out, 0, 0, 0,
                            "%s.bias", name);
    add_layer(model, layer, shape, trained_before, model->config.half && !(bits & REAL_OPERANDS),
              model->config.half && bits & HALF_Y, model->config.half && bits & HALF_DX);
}

static void add_norm(Model *model, Norm *norm, const char *name) {
    norm->weight =
        add_param(model, GROUP_TRANSFORMER, 1, INIT_ONE, 0, model->config.hidden_dim, 0, 0, 0, "%s.weight", name);
    norm->bias =
        add_param(model, GROUP_TRANSFORMER, 1, INIT_ZERO, 0, model->config.hidden_dim, 0, 0, 0, "%s.bias", name);
}

static const double ANCHOR_SIZE = 0.1;  // width and height of the boxes that --decoder anchor starts from

// Glorot and Bengio 2010: what DETR gives every matrix of the transformer.
static double xavier_bound(int in, int out) { return sqrt(6.0 / ((double)in + out)); }

// query_before, memory_before: something is trained before what the queries, and what keys and values are made of.
// Returns the same of the block's output.
static int add_attention(Model *model, AttentionBlock *block, int query_before, int memory_before, const char *prefix,
                         const char *name) {
    int C = model->config.hidden_dim, before = query_before;
    const char *projections[4] = {"q_proj", "k_proj", "v_proj", "out_proj"};
    Layer *layers[4] = {&block->query, &block->key, &block->value, &block->output};
    char full[120];
    for (int i = 0; i < 4; i++) {  // DETR initialises query, key and value as one (3C, C) matrix
        snprintf(full, sizeof full, "%s.%s.%s", prefix, name, projections[i]);
        add_linear(model, layers[i], C, C, xavier_bound(C, i < 3 ? 3 * C : C), i < 3 ? HALF_Y : HALF_DX,
                   i == 0   ? query_before
                   : i == 3 ? before
                            : memory_before,
                   full);
        before |= passes_gradient(layers[i]);
    }
    snprintf(full, sizeof full, "%s.%s_layer_norm", prefix, name);
    add_norm(model, &block->norm, full);
    return before || block->norm.weight->trained;
}

static int add_feed_forward(Model *model, FeedForward *ffn, int trained_before, const char *prefix) {
    int C = model->config.hidden_dim, F = model->config.dim_feedforward;
    char full[120];
    // as xavier with PyTorch's default bias: DETR resets matrices only
    snprintf(full, sizeof full, "%s.fc1", prefix);
    add_linear(model, &ffn->fc1, C, F, -1, HALF_Y, trained_before, full);
    ffn->fc1.weight->init_scale = xavier_bound(C, F);
    snprintf(full, sizeof full, "%s.fc2", prefix);
    add_linear(model, &ffn->fc2, F, C, -1, HALF_DX, passes_gradient(&ffn->fc1), full);
    ffn->fc2.weight->init_scale = xavier_bound(C, F);
    snprintf(full, sizeof full, "%s.final_layer_norm", prefix);
    add_norm(model, &ffn->norm, full);
    return ffn->trained = passes_gradient(&ffn->fc2) || ffn->norm.weight->trained;
}

// One residual block. DC5 dilates the last stage: as in torchvision and timm, its first block still has dilation 1 in
// the convolution that would have had the stride.
static void add_block(Model *model, Block *block, int stage, int index, int in, int *trained_before) {
    const ModelConfig *config = &model->config;
    int out = config->widths[stage], dilated = config->dilation && stage == config->num_stages - 1;
    int stride = stage > 0 && index == 0 && !dilated ? 2 : 1;
    int first_dilation = dilated && index > 0 ? 2 : 1, dilation = dilated ? 2 : 1;
    int inner = config->bottleneck ? out / 4 : out;
    int trained = model->train_backbone && (stage > 0 || model->from_scratch), before = *trained_before;
    char convolution[64], norm[64];
    block->num_convs = config->bottleneck ? 3 : 2;
    block->has_shortcut = in != out || stride != 1;
    if (block->has_shortcut) {
        snprintf(convolution, sizeof convolution,
                 config->timm_names ? "layer%d.%d.downsample.0" : "encoder.stages.%d.layers.%d.shortcut.convolution",
                 stage + config->timm_names, index);
        snprintf(norm, sizeof norm,
                 config->timm_names ? "layer%d.%d.downsample.1" : "encoder.stages.%d.layers.%d.shortcut.normalization",
                 stage + config->timm_names, index);
        add_convolution(model, &block->shortcut, in, out, 1, stride, 1, trained, *trained_before, convolution, norm);
        block->trained = passes_gradient(&block->shortcut);
    }
    for (int j = 0; j < block->num_convs; j++) {
        int strided = config->bottleneck ? j == 1 : j == 0;  // the convolution that carries stride and first dilation
        int kernel = config->bottleneck && j != 1 ? 1 : 3;
        int conv_in = j == 0 ? in : inner, conv_out = j == block->num_convs - 1 ? out : inner;
        int conv_dilation = kernel == 1 ? 1 : strided ? first_dilation : dilation;
        snprintf(convolution, sizeof convolution,
                 config->timm_names ? "layer%d.%d.conv%d" : "encoder.stages.%d.layers.%d.layer.%d.convolution",
                 stage + config->timm_names, index, j + config->timm_names);
        snprintf(norm, sizeof norm,
                 config->timm_names ? "layer%d.%d.bn%d" : "encoder.stages.%d.layers.%d.layer.%d.normalization",
                 stage + config->timm_names, index, j + config->timm_names);
        add_convolution(model, &block->conv[j], conv_in, conv_out, kernel, strided ? stride : 1, conv_dilation, trained,
                        before, convolution, norm);
        before |= passes_gradient(&block->conv[j]);
    }
    *trained_before = block->trained = before || block->trained;
}

// Walks the network once and lists its tensors. The order is that of the checkpoint.
static void model_walk(Model *model) {
    const ModelConfig *config = &model->config;
    int C = config->hidden_dim, before;  // before: something up to here is trained
    char name[96];
    add_convolution(model, &model->stem, 3, config->stem_width, 7, 2, 1, model->train_backbone && model->from_scratch,
                    0, config->timm_names ? "conv1" : "embedder.embedder.convolution",
                    config->timm_names ? "bn1" : "embedder.embedder.normalization");
    before = passes_gradient(&model->stem);
    int block = 0, in = config->stem_width;
    for (int stage = 0; stage < config->num_stages; stage++) {
        for (int i = 0; i < config->depths[stage]; i++) {
            add_block(model, &model->blocks[block++], stage, i, in, &before);
            in = config->widths[stage];
        }
    }
    add_linear(model, &model->input_projection, in, C, -1, HALF_DX, before, "model.input_projection");
    before = passes_gradient(&model->input_projection);
    model->query_embeddings = add_param(model, GROUP_TRANSFORMER, 1, config->anchor ? INIT_BOXES : INIT_NORMAL,
                                        config->anchor ? ANCHOR_SIZE : 1, config->num_queries, config->anchor ? 4 : C,
                                        0, 0, "model.query_position_embeddings.weight");
    if (config->anchor)
        model->query_content = add_param(model, GROUP_TRANSFORMER, 1, INIT_NORMAL, 1, config->num_queries, C, 0, 0,
                                         "model.query_content_embeddings.weight");
    for (int l = 0; l < config->enc_layers; l++) {
        snprintf(name, sizeof name, "model.encoder.layers.%d", l);
        before = add_attention(model, &model->encoder_attention[l], before, before, name, "self_attn");
        before = add_feed_forward(model, &model->encoder_ffn[l], before, name);
    }
    // What the anchor decoder's boxes are to its layers is a constant to them, but for the head that makes positions.
    const int memory_before = before;
    before = config->anchor ? model->query_content->trained ||
                                  (model->batch_size > 0 && !is_frozen(config, "model.decoder.query_position_head."))
                            : model->query_embeddings->trained;
    for (int l = 0; l < config->dec_layers; l++) {
        snprintf(name, sizeof name, "model.decoder.layers.%d", l);
        before = add_attention(model, &model->decoder_self[l], before, before, name, "self_attn");
        before = add_attention(model, &model->decoder_cross[l], before, memory_before, name, "encoder_attn");
        before = add_feed_forward(model, &model->decoder_ffn[l], before, name);
    }
    for (int i = 0; i < 2 && config->anchor; i++) {
        const int in = i == 0 ? 2 * C : C;
        snprintf(name, sizeof name, "model.decoder.query_position_head.layers.%d", i);
        add_linear(model, &model->query_position_head[i], in, C, xavier_bound(in, C), REAL_OPERANDS,
                   i == 1 && passes_gradient(&model->query_position_head[0]), name);
    }
    add_norm(model, &model->decoder_norm, "model.decoder.layernorm");
    before |= model->decoder_norm.weight->trained;
    add_linear(model, &model->class_head, C, num_logits(config), -1, REAL_OPERANDS, before, "class_labels_classifier");
    if (config->focal) {  // every class starts with a score of 0.01 (Lin et al. 2017)
        model->class_head.bias->init = INIT_CONSTANT;
        model->class_head.bias->init_scale = -log(99);
    }
    for (int i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "bbox_predictor.layers.%d", i);
        add_linear(model, &model->box_head[i], C, i < 2 ? C : 4, -1, REAL_OPERANDS, before, name);
        before = passes_gradient(&model->box_head[i]);
    }
    if (config->anchor)  // at first the layers leave the boxes where they are
        model->box_head[2].weight->init = model->box_head[2].bias->init = INIT_ZERO;
}

// The memory of a model that has been walked, in two arenas: what a checkpoint needs, and what only training needs.
static void model_take_memory(Model *model) {
    for (int i = 0; i < model->num_params; i++)
        model->params[i]->value = arena_take(&model->weights, model->params[i]->count);
    size_t workspace = 0;
    for (int i = 0; i < model->num_layers; i++) {
        Layer *layer = model->layers[i];
        if (layer->norm_weight) {
            layer->scale = arena_take(&model->packed, (size_t)layer->shape.out_channels);
            layer->folded_bias = arena_take(&model->packed, (size_t)layer->shape.out_channels);
        }
        const int in = layer->shape.in_channels, out = layer->shape.out_channels;
        const size_t forward = layer->winograd ? winograd_packed_size(in, out) : packed_size(layer->shape, layer->half);
        const size_t backward = !layer->needs_input_gradient ? 0
                                : layer->winograd            ? winograd_packed_size(out, in)
                                                             : packed_backward_size(layer->shape, layer->half);
        const int shared = backward > 0 && model->batch_size == 1;
        layer->packed = arena_take(&model->packed, shared ? larger(forward, backward) : forward);
        if (backward > 0) layer->packed_backward = shared ? layer->packed : arena_take(&model->packed, backward);
        if (layer->winograd) workspace = larger(workspace, winograd_workspace(layer->shape, 1));
    }
    real *shared = arena_take(&model->packed, (size_t)omp_get_max_threads() * workspace);
    for (int i = 0; i < model->num_layers; i++)
        model->layers[i]->workspace = shared, model->layers[i]->workspace_size = workspace;
    real **slots[3];
    for (int slot = 0; slot < 3; slot++) {  // gradients of all tensors lie together, then the moments
        for (int i = 0; i < model->num_params; i++) {
            Param *param = model->params[i];
            slots[0] = &param->grad, slots[1] = &param->exp_avg, slots[2] = &param->exp_avg_sq;
            if (param->trained) *slots[slot] = arena_take(&model->optimizer, param->count);
        }
    }
}

// Builds the network of `config`. batch_size: pictures in a training step, at most, or 0: then there are no gradients
// and no moments. train_backbone: --lr_backbone is not 0.
// from_scratch: there are no pretrained weights, so stem, first stage and the frozen norms' scale and bias are trained
// too; DETR freezes them. Values are zero until they are initialised or loaded. 0, or -1 with the reason.
static int model_create(Model *model, const ModelConfig *config, int batch_size, int train_backbone, int from_scratch,
                        Error *error) {
    memset(model, 0, sizeof *model);
    model->config = *config;
    model->batch_size = batch_size;
    model->train_backbone = train_backbone;
    model->from_scratch = from_scratch;
    if (config->num_stages < 1 || config->num_stages > MAX_STAGES)
        return fail(error, "the backbone has %d stages: 1 to %d are possible", config->num_stages, MAX_STAGES);
    if (config->dec_layers < 1 || config->dec_layers > MAX_DEC_LAYERS)
        return fail(error, "dec_layers is %d: 1 to %d are possible", config->dec_layers, MAX_DEC_LAYERS);
    if (config->nheads < 1 || config->hidden_dim % config->nheads)
        return fail(error, "hidden_dim %d is not a multiple of nheads %d", config->hidden_dim, config->nheads);
    if (config->hidden_dim % 2)
        return fail(error, "hidden_dim %d is odd: half of it encodes y, half x", config->hidden_dim);
    if (config->half && sizeof(real) != 4) return fail(error, "bf16 needs the build with REAL=float");
    if (config->half && (config->stem_width % 2 || config->dim_feedforward % 2))
        return fail(error, "bf16 needs even numbers of channels: the stem has %d, dim_feedforward is %d",
                    config->stem_width, config->dim_feedforward);
    for (int s = 0; s < config->num_stages; s++) {
        if (config->half && config->widths[s] % (config->bottleneck ? 8 : 2))
            return fail(error, "bf16 needs even numbers of channels: stage %d of the backbone has width %d", s + 1,
                        config->widths[s]);
        if (config->depths[s] < 1 || config->widths[s] < 1)
            return fail(error, "stage %d of the backbone has depth %d and width %d", s + 1, config->depths[s],
                        config->widths[s]);
        if (config->bottleneck && config->widths[s] < 4)
            return fail(error, "stage %d of the backbone has width %d: bottleneck blocks need at least 4", s + 1,
                        config->widths[s]);
        model->num_blocks += config->depths[s];
    }
    model->blocks = (Block *)allocate((size_t)model->num_blocks * sizeof(Block));
    model->encoder_attention = (AttentionBlock *)allocate((size_t)config->enc_layers * sizeof(AttentionBlock));
    model->encoder_ffn = (FeedForward *)allocate((size_t)config->enc_layers * sizeof(FeedForward));
    model->decoder_self = (AttentionBlock *)allocate((size_t)config->dec_layers * sizeof(AttentionBlock));
    model->decoder_cross = (AttentionBlock *)allocate((size_t)config->dec_layers * sizeof(AttentionBlock));
    model->decoder_ffn = (FeedForward *)allocate((size_t)config->dec_layers * sizeof(FeedForward));
    model_walk(model);
    Arena *arenas[3] = {&model->weights, &model->packed, &model->optimizer};
    model_take_memory(model);
    for (int i = 0; i < 3; i++) arena_allocate(arenas[i]);
    model_take_memory(model);
    for (int i = 0; i < model->num_params; i++)
        if (model->params[i]->trained) model->num_trained += model->params[i]->count;
    return 0;
}

static void model_free(Model *model) {
    for (int i = 0; i < model->num_params; i++) free(model->params[i]);
    free(model->params);
    free(model->layers);
    free(model->blocks);
    free(model->encoder_attention);
    free(model->encoder_ffn);
    free(model->decoder_self);
    free(model->decoder_cross);
    free(model->decoder_ffn);
    arena_free(&model->weights);
    arena_free(&model->packed);
    arena_free(&model->optimizer);
    arena_free(&model->ema);
    memset(model, 0, sizeof *model);
}

// Boxes as logits, number i of (count, 4): their centres cover the picture evenly, however many there are. (The
// additive recurrence of Roberts 2018, "The unreasonable effectiveness of quasirandom sequences", with the plastic
// number.)
static double spread_box(size_t i, double size) {
    double place = i % 4 < 2 ? (double)(i / 4 + 1) * (i % 4 ? 0.56984029099805327 : 0.75487766624669276) : 0;
    double value = i % 4 < 2 ? size / 2 + (1 - size) * (place - floor(place)) : size;
    return log(value / (1 - value));
}

static void param_initialise(Param *param, int index, uint64_t seed) {
    for (size_t i = 0; i < param->count; i++) {
        double value = param->init == INIT_ONE ? 1 : 0;
        if (param->init == INIT_CONSTANT) value = param->init_scale;
        if (param->init == INIT_BOXES) value = spread_box(i, param->init_scale);
        if (param->init == INIT_UNIFORM)
            value = param->init_scale * (2 * random_uniform(seed, RANDOM_INIT, (uint32_t)index, 0, 0, i) - 1);
        if (param->init == INIT_NORMAL)
            value = param->init_scale * random_normal(seed, RANDOM_INIT, (uint32_t)index, 0, 0, i);
        param->value[i] = (real)(float)value;  // float32, so that every build starts from the same network
    }
}

// DETR's initialisation: He for the backbone, Xavier for the transformer, N(0, 1) for the queries.
static void model_initialise(Model *model, uint64_t seed) {
    for (int i = 0; i < model->num_params; i++) param_initialise(model->params[i], i, seed);
}

// A frozen norm is y = x * scale + shift.
HOST_DEVICE static inline real norm_scale(real weight, real variance) {
    return weight / (real)sqrt((double)variance + 1e-5);
}
HOST_DEVICE static inline real norm_shift(real bias, real mean, real scale) { return bias - mean * scale; }

// A layer's weights for the matmul, for the way forward and for the way back, either unless it is NULL. Called by all
// threads.
static void pack_ways(const Layer *layer, real *packed, real *packed_backward) {
    if (layer->winograd)
        winograd_pack(packed, packed_backward, layer->weight->value, layer->scale, layer->shape);
    else
        pack_weights(packed, packed_backward, layer->weight->value, layer->scale, layer->shape, layer->half);
}

// Where a step has one picture, weights packed for the way back would be used once, so they get no memory of their own:
// layer_backward_data() packs them where those for the way forward lie.
static int has_one_packed(const Layer *layer) { return layer->packed_backward == layer->packed; }

// What packing moves in memory.
static double packing_bytes(const Layer *layer, int ways) {
    return (sizeof(real) + ways * (double)number_bytes(layer->half)) * (double)layer->weight->count;
}

// Whether a step leaves a layer's weights other than they were packed: the optimizer changes them, or the way back
// takes their place.
static int needs_packing(const Layer *layer) { return layer->weight->trained || has_one_packed(layer); }

// Frozen batch norm is y = (x - mean) * norm_weight / sqrt(variance + 1e-5) + norm_bias = x * scale + folded_bias, and
// the scale of an output channel can be multiplied into that channel's weights once a step: the norm costs nothing.
static void fold_norm(const Layer *layer) {
    for (int n = 0; layer->norm_weight && n < layer->shape.out_channels; n++) {
        layer->scale[n] = norm_scale(layer->norm_weight->value[n], layer->norm_variance->value[n]);
        layer->folded_bias[n] = norm_shift(layer->norm_bias->value[n], layer->norm_mean->value[n], layer->scale[n]);
    }
}

// Packs the weights of layers, of all or of those that need it.
static void layers_pack(Layer **layers, int count, int all) {
    const double begin = profile_begin();
    double bytes = 0;
    for (int i = 0; i < count; i++) {
        const Layer *layer = layers[i];
        if (!all && !needs_packing(layer)) continue;
        fold_norm(layer);
        bytes += packing_bytes(layer, layer->packed_backward && !has_one_packed(layer) ? 2 : 1);
    }
#pragma omp parallel
    for (int i = 0; i < count; i++)
        if (all || needs_packing(layers[i]))
            pack_ways(layers[i], layers[i]->packed, has_one_packed(layers[i]) ? NULL : layers[i]->packed_backward);
    profile_end(begin, "packing of weights", "", 0, bytes);
}

// Where element i of a tensor as the checkpoint orders it lies in memory: (out, in, k, k) against (out, k, k, in).
static size_t param_place(const Param *param, size_t i) {
    if (param->ndim != 4) return i;
    size_t in = (size_t)param->shape[1], taps = (size_t)(param->shape[2] * param->shape[3]);
    return (i / (in * taps) * taps + i % taps) * in + i / taps % in;
}

// Packs every layer's weights for the matmul: after values were initialised, loaded or changed.
static void model_pack(Model *model) { layers_pack(model->layers, model->num_layers, 1); }

// ---------------------------------------------------------------------------------------------------------------------
// Model: forward and backward of one image

// A void * below is a tensor of bf16 with --precision bf16, else of reals.
typedef struct {
    int height, width, out_height, out_width;
    void *in, *inner[2], *shortcut, *out;  // all after their ReLU, shortcut before it
} BlockActivations;

typedef struct {
    const void *query_in, *key_in, *value_in;  // what the projections read
    const real *residual;                      // what is added to the result
    void *query, *key, *value;
    real *attended;
    void *attended_operand;               // the same as the output projection reads it: bf16, or attended itself
    real *lse, *sum, *mean, *rstd, *out;  // residual + attention, its statistics, after the norm
    void *operand;                        // out as what reads it next multiplies it: bf16, or out itself
    int num_queries, num_keys;
    AttentionPrior prior;
} AttentionActivations;

typedef struct {
    const void *in;        // operand of fc1
    const real *residual;  // the same in reals
    void *hidden;
    real *sum, *mean, *rstd, *out;
    void *operand;
    int rows;
} FeedForwardActivations;

// Everything one image leaves behind on its way forward, and the scratch of its way back. On that way the gradients of
// the backbone and of hidden units take the place of the activations they belong to, which nobody needs any more.
// T = tokens = height * width of the last feature map, Q = num_queries, C = hidden_dim, L = dec_layers.
typedef struct Activations {
    Arena arena;
    int training, height, width, map_height, map_width;
    Dropout dropout;  // p = 0 in inference
    void *pixels;     // (height, width, 3), normalised
    void *stem, *pooled;
    unsigned char *argmax;
    BlockActivations *blocks;
    real *tokens, *positions;  // (T, C)
    void *tokens_operand;      // tokens, as an operand
    void **encoder_query;      // a layer: (T, C), its input plus positions
    AttentionActivations *encoder_attention, *decoder_self, *decoder_cross;
    FeedForwardActivations *encoder_ffn, *decoder_ffn;
    void *memory_query;  // (T, C) encoder output plus positions
    real *target;        // (Q, C), the decoder's first input: zeros, or the queries' content
    void *target_operand;
    real *references;                                        // anchor: (L, Q, 4), the box that each layer receives
    real *box_features, *position_hidden, *query_positions;  // anchor: (L, Q, 2 C), (L, Q, C), (L, Q, C)
    void **self_query, **cross_query;                        // a layer: (Q, C), input plus the queries' positions
    real *states, *state_mean, *state_rstd;                  // (L, Q, C): decoder outputs after the shared norm
    real *logits, *box_hidden[2];                            // (L, Q, num_logits); (L, Q, C)
    real *box_logits, *boxes;                                // (L, Q, 4) as cx cy w h, before the sigmoid and in 0..1
    real *dlogits, *dboxes;
    // scratch of the way back
    void *dshortcut;  // of a block with a shortcut, what comes back through it
    real *dstates;
    real *dx, *dsum, *dquery, *dmemory, *dmemory_query;  // (max(T, Q), C)
    real *dquery_positions;                              // (Q, C), which the layers share; anchor: (L, Q, C)
    void *dprojected, *dattended, *dq, *dk, *dv;
    real *workspace;  // for attention and for the weights' gradients
    // the matcher's
    double *costs;
    size_t costs_capacity;
    double *probabilities;  // (num_logits)
    int *match;             // (L, Q): the target that a query is matched with, or -1
    // side by side with those of other images
    int in_flight, one_thread;   // how many there are, in the first; in the others that they never have more
    struct Activations *before;  // while they run: of the image before, else NULL
    int64_t turn;                // the image's place in the batch * MAX_TURNS + the turns it has taken: see take_turn()
} Activations;

// A tensor of reals or (half) of bf16, with a name.
__attribute__((format(printf, 4, 5))) static void *take_named(Arena *arena, size_t count, int half, const char *format,
                                                              ...) {
    void *data = arena_bytes(arena, count * number_bytes(half));
    if (!data) return data;
    if (arena->num_named == arena->named_capacity) {
        arena->named_capacity = arena->named_capacity ? 2 * arena->named_capacity : 256;
        arena->named = (NamedTensor *)reallocate(arena->named, arena->named_capacity * sizeof(NamedTensor));
    }
    NamedTensor *named = &arena->named[arena->num_named++];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(named->name, sizeof named->name, format, arguments);
    va_end(arguments);
    named->data = data;
    named->count = count;
    named->half = half;
    return data;
}

// The scratch of the way back, from byte `begin` of the arena on, where the way forward has what it forgets. shortcut:
// numbers in the largest map that a gradient comes back to through a shortcut.
static void plan_scratch(Activations *acts, const Model *model, size_t begin, size_t shortcut) {
    const ModelConfig *config = &model->config;
    Arena *arena = &acts->arena;
    const size_t forward = arena->used;
    const int T = acts->map_height * acts->map_width, Q = config->num_queries, rows = T > Q ? T : Q;
    const size_t bytes = number_bytes(config->half), C = (size_t)config->hidden_dim, R = (size_t)rows;
    if (acts->training) {
        void **halves[5] = {&acts->dprojected, &acts->dattended, &acts->dq, &acts->dk, &acts->dv};
        real **reals[5] = {&acts->dx, &acts->dsum, &acts->dquery, &acts->dmemory, &acts->dmemory_query};
        arena->used = begin;
        acts->dshortcut = arena_bytes(arena, shortcut * bytes);
        acts->dstates = arena_take(arena, (size_t)(config->dec_layers * Q) * C);
        for (int i = 0; i < 5; i++) *halves[i] = arena_bytes(arena, R * C * bytes);
        for (int i = 0; i < 5; i++) *reals[i] = arena_take(arena, R * C);
        acts->dquery_positions = arena_take(arena, (size_t)((config->anchor ? config->dec_layers : 1) * Q) * C);
        arena->used = larger(arena->used, forward);
    }
    const int threads = acts->one_thread ? 1 : omp_get_max_threads();
    size_t workspace = attention_workspace(rows, rows, config->hidden_dim, config->nheads, threads);
    for (int i = 0; acts->training && i < model->num_layers; i++) {
        const Layer *layer = model->layers[i];
        workspace = larger(workspace, layer->winograd_weight ? winograd_backward_weight_workspace(layer->shape, threads)
                                                             : conv_backward_weight_workspace(layer->shape, threads));
    }
    acts->workspace = arena_take(arena, workspace);
}

// Lays out the backbone. Blocks that are not trained, all of them in inference, keep nothing: they share two inner maps
// and two outer ones, `map`, of which the last one written stays. A block without a shortcut adds to its input in
// place.
static void plan_backbone(Activations *acts, const Model *model) {
    Arena *arena = &acts->arena;
    const int half = model->config.half, stem_kept = acts->training && model->stem.weight->trained;
    const int stem_height = conv_size(acts->height, model->stem.shape),
              stem_width = conv_size(acts->width, model->stem.shape);
    const size_t stem_count = (size_t)stem_height * (size_t)stem_width * (size_t)model->config.stem_width;
    int height = (stem_height + 1) / 2, width = (stem_width + 1) / 2, at = 0;  // at: the map that holds the input
    const size_t pooled_count = (size_t)height * (size_t)width * (size_t)model->config.stem_width;
    size_t inner_count[2] = {0, 0}, shortcut_count = 0;
    size_t map_count[2] = {stem_kept ? 0 : pooled_count, stem_kept ? 0 : stem_count};
    const size_t argmax = stem_kept ? 0 : pooled_count;  // not kept it lies where the first block will write
    const size_t pixels_count = (size_t)acts->height * (size_t)acts->width * 3;
    for (int i = 0; i < model->num_blocks; i++) {  // sizes
        const Block *block = &model->blocks[i];
        BlockActivations *b = &acts->blocks[i];
        const size_t in = (size_t)height * (size_t)width * (size_t)block->conv[0].shape.in_channels;
        b->height = height, b->width = width;
        for (int j = 0; j < block->num_convs; j++) {
            height = conv_size(height, block->conv[j].shape), width = conv_size(width, block->conv[j].shape);
            const size_t count = (size_t)height * (size_t)width * (size_t)block->conv[j].shape.out_channels;
            if (block->trained && acts->training) continue;
            if (j < block->num_convs - 1) {
                // NOLINTNEXTLINE(clang-analyzer-core.CallAndMessage): no block has more than three
                inner_count[j] = larger(inner_count[j], count);
            } else {
                at ^= block->has_shortcut;
                map_count[at] = larger(map_count[at], count);
            }
        }
        b->out_height = height, b->out_width = width;
        if (block->has_shortcut && block->shortcut.needs_input_gradient) shortcut_count = larger(shortcut_count, in);
    }
    acts->map_height = height, acts->map_width = width;

    void *map[2], *inner[2];
    size_t map_bytes[2] = {map_count[0] * number_bytes(half), map_count[1] * number_bytes(half)};
    const int pixels_kept = stem_kept || !acts->training;  // else the first map may take their place
    if (!pixels_kept) map_bytes[0] = larger(map_bytes[0], pixels_count * number_bytes(half));
    map[at] = arena_bytes(arena, map_bytes[at]);
    const size_t scratch = arena->used;  // what the way forward forgets makes room for the way back
    map[!at] = arena_bytes(arena, map_bytes[!at]);
    for (int j = 0; j < 2; j++)
        inner[j] = arena_bytes(arena, larger(inner_count[j] * number_bytes(half), j ? 0 : argmax));
    plan_scratch(acts, model, scratch, shortcut_count);

    acts->stem = stem_kept ? take_named(arena, stem_count, half, "stem") : map[1];
    acts->pooled = stem_kept ? take_named(arena, pooled_count, half, "stem, pooled") : map[0];
    acts->argmax = (unsigned char *)(stem_kept ? arena_bytes(arena, pooled_count) : inner[0]);
    acts->pixels = pixels_kept ? take_named(arena, pixels_count, half, "pixels") : map[0];
    void *in = acts->pooled;
    at = 0;
    for (int i = 0; i < model->num_blocks; i++) {  // places
        const Block *block = &model->blocks[i];
        BlockActivations *b = &acts->blocks[i];
        const int kept = block->trained && acts->training, last = block->num_convs - 1;
        int h = b->height, w = b->width;
        b->in = in;
        for (int j = 0; j < last; j++) {
            h = conv_size(h, block->conv[j].shape), w = conv_size(w, block->conv[j].shape);
            const size_t count = (size_t)h * (size_t)w * (size_t)block->conv[j].shape.out_channels;
            b->inner[j] = kept ? take_named(arena, count, half, "backbone block %d, convolution %d", i, j) : inner[j];
        }
        const size_t count =
            (size_t)b->out_height * (size_t)b->out_width * (size_t)block->conv[last].shape.out_channels;
        at ^= block->has_shortcut;
        b->out = kept ? take_named(arena, count, half, "backbone block %d", i) : map[at];
        b->shortcut = block->has_shortcut ? b->out : b->in;  // written first, then added to in place
        in = b->out;
    }
}

static void plan_attention(Activations *acts, const Model *model, AttentionActivations *a, int num_queries,
                           int num_keys, const char *name, int layer) {
    Arena *arena = &acts->arena;
    size_t C = (size_t)model->config.hidden_dim, rows = (size_t)num_queries, keys = (size_t)num_keys;
    a->num_queries = num_queries, a->num_keys = num_keys, a->prior = NO_PRIOR;
    const int half = model->config.half;
    a->query = take_named(arena, rows * C, half, "%s %d: query", name, layer);
    a->key = take_named(arena, keys * C, half, "%s %d: key", name, layer);
    a->value = take_named(arena, keys * C, half, "%s %d: value", name, layer);
    a->attended = (real *)take_named(arena, rows * C, 0, "%s %d: attended", name, layer);
    a->attended_operand = half ? arena_bytes(arena, rows * C * sizeof(bf16)) : a->attended;
    a->lse = arena_take(arena, rows * (size_t)model->config.nheads);
    a->sum = (real *)take_named(arena, rows * C, 0, "%s %d: sum", name, layer);
    a->mean = arena_take(arena, rows), a->rstd = arena_take(arena, rows);
    a->out = (real *)take_named(arena, rows * C, 0, "%s %d: norm", name, layer);
    a->operand = half ? arena_bytes(arena, rows * C * sizeof(bf16)) : a->out;
}

static void plan_feed_forward(Activations *acts, const Model *model, FeedForwardActivations *f, int rows,
                              const char *name, int layer) {
    Arena *arena = &acts->arena;
    size_t C = (size_t)model->config.hidden_dim, R = (size_t)rows;
    f->rows = rows;
    const int half = model->config.half;
    f->hidden = take_named(arena, R * (size_t)model->config.dim_feedforward, half, "%s %d: hidden", name, layer);
    f->sum = (real *)take_named(arena, R * C, 0, "%s %d: sum", name, layer);
    f->mean = arena_take(arena, R), f->rstd = arena_take(arena, R);
    f->out = (real *)take_named(arena, R * C, 0, "%s %d: norm", name, layer);
    f->operand = half ? arena_bytes(arena, R * C * sizeof(bf16)) : f->out;
}

// Bytes between two activations. Many are a multiple of 4 KB long, and a load waits for a store that is not done yet
// where the last 12 bits of the two addresses are the same, as those of a residual and of the result in its place
// would.
enum { ACTIVATIONS_GAP = 9 * 64 };

// Gives every activation of an image of (height, width) its place in the arena. With arena.base == NULL: only counts.
static void activations_plan(Activations *acts, const Model *model, int height, int width) {
    const ModelConfig *config = &model->config;
    Arena *arena = &acts->arena;
    const int half = config->half;
    const size_t bytes = number_bytes(half);
    size_t C = (size_t)config->hidden_dim, Q = (size_t)config->num_queries, L = (size_t)config->dec_layers;
    arena->used = arena->num_named = 0, arena->gap = ACTIVATIONS_GAP;
    acts->height = height, acts->width = width;
    plan_backbone(acts, model);
    int T = acts->map_height * acts->map_width;
    size_t tokens = (size_t)T;
    acts->positions = arena_take(arena, tokens * C);
    acts->tokens = (real *)take_named(arena, tokens * C, 0, "projected feature map");
    acts->tokens_operand = half ? arena_bytes(arena, tokens * C * bytes) : acts->tokens;
    const real *x = acts->tokens;
    const void *operand = acts->tokens_operand;
    const size_t encoder = arena->used;
    for (int l = 0; l < config->enc_layers; l++) {
        AttentionActivations *a = &acts->encoder_attention[l];
        if (!acts->training) arena->used = encoder;  // all in one place: what a layer has read, its output may replace
        acts->encoder_query[l] = arena_bytes(arena, tokens * C * bytes);
        plan_attention(acts, model, a, T, T, "encoder layer", l);
        plan_feed_forward(acts, model, &acts->encoder_ffn[l], T, "encoder feed forward", l);
        a->query_in = a->key_in = acts->encoder_query[l];
        a->value_in = operand, a->residual = x;
        acts->encoder_ffn[l].in = a->operand, acts->encoder_ffn[l].residual = a->out;
        x = acts->encoder_ffn[l].out, operand = acts->encoder_ffn[l].operand;
    }
    const void *memory = operand;
    acts->memory_query = arena_bytes(arena, tokens * C * bytes);
    x = acts->target = arena_take(arena, Q * C);
    operand = acts->target_operand = half ? arena_bytes(arena, Q * C * bytes) : acts->target;
    if (config->anchor) {
        acts->references = arena_take(arena, L * Q * 4);
        acts->box_features = arena_take(arena, L * Q * 2 * C);
        acts->position_hidden = (real *)take_named(arena, L * Q * C, 0, "query positions, hidden");
        acts->query_positions = (real *)take_named(arena, L * Q * C, 0, "query positions");
    }
    for (int l = 0; l < config->dec_layers; l++) {
        AttentionActivations *self = &acts->decoder_self[l], *cross = &acts->decoder_cross[l];
        acts->self_query[l] = arena_bytes(arena, Q * C * bytes);
        acts->cross_query[l] = arena_bytes(arena, Q * C * bytes);
        plan_attention(acts, model, self, config->num_queries, config->num_queries, "decoder self-attention", l);
        plan_attention(acts, model, cross, config->num_queries, T, "decoder cross-attention", l);
        plan_feed_forward(acts, model, &acts->decoder_ffn[l], config->num_queries, "decoder feed forward", l);
        self->query_in = self->key_in = acts->self_query[l];
        self->value_in = operand, self->residual = x;
        cross->query_in = acts->cross_query[l];
        cross->key_in = acts->memory_query;
        cross->value_in = memory;
        cross->residual = self->out;
        if (config->anchor) {
            cross->prior.boxes = acts->references + (size_t)l * Q * 4;
            cross->prior.height = acts->map_height, cross->prior.width = acts->map_width;
        }
        acts->decoder_ffn[l].in = cross->operand, acts->decoder_ffn[l].residual = cross->out;
        x = acts->decoder_ffn[l].out, operand = acts->decoder_ffn[l].operand;
    }
    acts->states = (real *)take_named(arena, L * Q * C, 0, "decoder states");
    acts->state_mean = arena_take(arena, L * Q), acts->state_rstd = arena_take(arena, L * Q);
    acts->logits = (real *)take_named(arena, L * Q * (size_t)num_logits(config), 0, "logits");
    for (int i = 0; i < 2; i++) acts->box_hidden[i] = (real *)take_named(arena, L * Q * C, 0, "box head, layer %d", i);
    acts->box_logits = arena_take(arena, L * Q * 4);
    acts->boxes = (real *)take_named(arena, L * Q * 4, 0, "pred_boxes");
    acts->dlogits = (real *)take_named(arena, L * Q * (size_t)num_logits(config), 0, "gradient of the logits");
    acts->dboxes = (real *)take_named(arena, L * Q * 4, 0, "gradient of the boxes");
    acts->match = (int *)arena_bytes(arena, L * Q * sizeof(int));
    acts->probabilities = (double *)arena_bytes(arena, (size_t)num_logits(config) * sizeof(double));
}

static void activations_lists(Activations *acts, const Model *model, int training) {
    size_t enc = (size_t)model->config.enc_layers, dec = (size_t)model->config.dec_layers;
    memset(acts, 0, sizeof *acts);
    acts->training = training;
    acts->in_flight = 1;
    acts->blocks = (BlockActivations *)allocate((size_t)model->num_blocks * sizeof(BlockActivations));
    acts->encoder_query = (void **)allocate(enc * sizeof(void *));
    acts->encoder_attention = (AttentionActivations *)allocate(enc * sizeof(AttentionActivations));
    acts->encoder_ffn = (FeedForwardActivations *)allocate(enc * sizeof(FeedForwardActivations));
    acts->self_query = (void **)allocate(dec * sizeof(void *));
    acts->cross_query = (void **)allocate(dec * sizeof(void *));
    acts->decoder_self = (AttentionActivations *)allocate(dec * sizeof(AttentionActivations));
    acts->decoder_cross = (AttentionActivations *)allocate(dec * sizeof(AttentionActivations));
    acts->decoder_ffn = (FeedForwardActivations *)allocate(dec * sizeof(FeedForwardActivations));
}

// acts: as activations_create() took it.
static void activations_free(Activations *acts) {
    for (int i = acts->in_flight - 1; i >= 0; i--) {
        free(acts[i].blocks);
        free(acts[i].encoder_query);
        free(acts[i].encoder_attention);
        free(acts[i].encoder_ffn);
        free(acts[i].self_query);
        free(acts[i].cross_query);
        free(acts[i].decoder_self);
        free(acts[i].decoder_cross);
        free(acts[i].decoder_ffn);
        free(acts[i].costs);
        arena_free(&acts[i].arena);
        memset(&acts[i], 0, sizeof *acts);
    }
}

// Bytes that activations_create() takes; the same for (width, height).
static size_t activations_bytes(const Model *model, int height, int width, int training, int in_flight) {
    size_t bytes = 0;
    for (int i = 0; i < in_flight; i++) {
        Activations acts;
        activations_lists(&acts, model, training);
        acts.one_thread = i > 0;
        activations_plan(&acts, model, height, width);
        bytes += acts.arena.used;
        activations_free(&acts);
    }
    return bytes;
}

// Plans and allocates for the largest image; every image no larger than it, either way round, fits. acts: (in_flight),
// for as many images side by side, one thread each, no more than there were threads when the model was made; the first
// may also have all threads, alone.
static void activations_create(Activations *acts, const Model *model, int max_height, int max_width, int training,
                               int in_flight) {
    for (int i = 0; i < in_flight; i++) {
        activations_lists(&acts[i], model, training);
        acts[i].one_thread = i > 0;
        activations_plan(&acts[i], model, max_height, max_width);
        arena_allocate(&acts[i].arena);
        activations_plan(&acts[i], model, max_height, max_width);
    }
    acts->in_flight = in_flight;
}

// Counts the operations of the plain sum, of which Winograd needs less than half: its speed may exceed the peak.
static void profile_layer(double begin, const Layer *layer, int height, int width, const char *pass) {
    const ConvShape s = layer->shape;
    const double out = (double)conv_size(height, s) * conv_size(width, s), in = (double)height * width,
                 weights = (double)layer->weight->count;
    const char *work = s.kernel > 3         ? "stem 7x7"
                       : s.kernel == 3      ? s.stride > 1 ? "3x3, stride 2" : "3x3"
                       : s.stride > 1       ? "1x1, stride 2"
                       : layer->norm_weight ? "1x1"
                                            : "linear";
    profile_end(begin, work, pass, 2 * out * weights,
                (double)number_bytes(layer->half) * (in * s.in_channels + out * s.out_channels + weights));
}

// Of all threads together; of images side by side each has that of its own thread.
static real *layer_workspace(const Layer *layer) {
    return layer->workspace + (size_t)omp_get_thread_num() * layer->workspace_size;
}

// y = relu?(x W + b (+ add)). x: (height * width, in), y and add: (output height * width, out). What of this is bf16
// stands in Layer; so in the functions below.
static void layer_forward(void *y, const void *x, int height, int width, const Layer *layer, int relu,
                          const void *add) {
    const Epilogue epilogue = {layer->bias ? layer->bias->value : layer->folded_bias, add, relu, NULL, layer->half_y};
    const double begin = profile_begin();
    if (layer->winograd)
        winograd_forward((real *)y, (const real *)x, height, width, layer->packed, epilogue, layer->shape,
                         layer_workspace(layer));
    else
        conv_forward(y, x, height, width, layer->packed, epilogue, layer->shape, layer->half);
    profile_layer(begin, layer, height, width, "forward");
}

// Pictures of a batch that run side by side, each on a thread of its own, add to the same losses and gradients, and in
// the order of the batch. So there is a turn for every such addition: a picture takes it when the picture before has
// taken its next one. All take the same turns, one behind the other. What belongs to a turn is all that follows
// take_turn() up to the next one; before the first a picture adds to nothing.
enum { MAX_TURNS = 1 << 16 };  // more than a picture has

static void set_turn(Activations *acts, int64_t turn) { __atomic_store_n(&acts->turn, turn, __ATOMIC_RELEASE); }

static void take_turn(Activations *acts) {
    if (!acts->before) return;
    set_turn(acts, acts->turn + 1);
    for (int looks = 0; __atomic_load_n(&acts->before->turn, __ATOMIC_ACQUIRE) <= acts->turn - MAX_TURNS; looks++)
        if (looks > 1000) sched_yield();
}

// dW += x^T dy, db += sum of dy, if the layer is trained; the first picture of a step writes what others add to. Under
// a frozen norm dW and db are those of the folded weights until unfold_norms.
static void layer_backward_weight(Activations *acts, const void *x, const void *dy, int height, int width,
                                  const Layer *layer) {
    if (!layer->weight->trained) return;
    take_turn(acts);  // for dW and db, and what is added behind them
    const Param *bias = layer->bias ? layer->bias : layer->norm_bias;
    const double begin = profile_begin();
    const int add = !layer->weight->stale;
    layer->weight->stale = 0;
    if (layer->winograd_weight)
        winograd_backward_weight(layer->weight->grad, bias->grad, add, (const real *)x, (const real *)dy, height, width,
                                 layer->shape, acts->workspace);
    else
        conv_backward_weight(layer->weight->grad, bias->grad, add, x, dy, height, width, layer->shape, layer->half,
                             acts->workspace);
    profile_layer(begin, layer, height, width, "backward, weight");
}

// dx = mask(dy W^T (+ add)), if an earlier layer is trained. dx may be the memory of mask or of add. With one picture a
// step the layer cannot go forward again until it is packed.
static void layer_backward_data(void *dx, const void *dy, int height, int width, const Layer *layer, const void *add,
                                const void *mask) {
    if (!layer->needs_input_gradient) return;
    const Epilogue epilogue = {NULL, add, 0, mask, layer->half_dx};
    double begin = profile_begin();
    if (has_one_packed(layer)) {
#pragma omp parallel
        pack_ways(layer, NULL, layer->packed_backward);
        profile_end(begin, "packing of weights", "", 0, packing_bytes(layer, 1));
        begin = profile_begin();
    }
    if (layer->winograd)
        winograd_backward_data((real *)dx, (const real *)dy, height, width, layer->packed_backward, epilogue,
                               layer->shape, layer_workspace(layer));
    else
        conv_backward_data(dx, dy, height, width, layer->packed_backward, epilogue, layer->shape, layer->half);
    profile_layer(begin, layer, height, width, "backward, data");
}

// Both; the gradient dx may take the place of x.
static void layer_backward(Activations *acts, void *dx, const void *x, const void *dy, int height, int width,
                           const Layer *layer, const void *add, const void *mask) {
    layer_backward_weight(acts, x, dy, height, width, layer);
    layer_backward_data(dx, dy, height, width, layer, add, mask);
}

// y = a + b; b may be NULL, y may be a or b. half: y is bf16.
static void add_rows(void *y, int half, const real *a, const real *b, size_t count) {
    const double begin = profile_begin();
#pragma omp parallel for schedule(static) if (count > 16384)
    for (size_t i = 0; i < count; i += LANES) {
        vec sum = load_rest(a, i, count - i, 0);
        if (b) sum += load_rest(b, i, count - i, 0);
        store_rest(y, i, sum, count - i, half);
    }
    profile_end(begin, "sums", "", 0, ((b ? 2.0 : 1.0) * sizeof(real) + (double)number_bytes(half)) * (double)count);
}

// y *= factor; half: y is bf16.
static void scale_rows(void *y, int half, real factor, size_t count) {
#pragma omp parallel for schedule(static) if (count > 16384)
    for (size_t i = 0; i < count; i += LANES)
        store_rest(y, i, load_rest(y, i, count - i, half) * factor, count - i, half);
}

static Dropout dropout_at(const Activations *acts, int site) {
    Dropout dropout = acts->dropout;
    dropout.site = (uint32_t)site;
    return dropout;
}

// Where a norm's output goes as an operand, if it is not the output itself.
static bf16 *rounded(const Model *model, void *operand) { return model->config.half ? (bf16 *)operand : NULL; }

// The gradient that reaches a sum, dsum, on its way through the sum's dropout, as an operand.
static const void *dropout_backward(Activations *acts, const Model *model, const real *dsum, int rows,
                                    Dropout dropout) {
    const int half = model->config.half;
    if (dropout.p == 0 && !half) return dsum;
    dropout_forward(acts->dprojected, half, dsum, 0, NULL, (size_t)rows, (size_t)model->config.hidden_dim, dropout);
    return acts->dprojected;
}

// sum = residual + dropout(x W + b)
static void add_residual(real *sum, const real *residual, const void *x, const Layer *layer, int rows,
                         Dropout dropout) {
    size_t C = (size_t)layer->shape.out_channels;
    layer_forward(sum, x, rows, 1, layer, 0, dropout.p > 0 ? NULL : residual);
    if (dropout.p > 0) dropout_forward(sum, 0, sum, 0, residual, (size_t)rows, C, dropout);
}

// out = norm(residual + dropout(output projection of attention)). `site`: the first of this block's two dropouts.
static void attention_block_forward(Activations *acts, const Model *model, const AttentionBlock *block,
                                    AttentionActivations *a, int site) {
    int C = model->config.hidden_dim;
    layer_forward(a->query, a->query_in, a->num_queries, 1, &block->query, 0, NULL);
    layer_forward(a->key, a->key_in, a->num_keys, 1, &block->key, 0, NULL);
    layer_forward(a->value, a->value_in, a->num_keys, 1, &block->value, 0, NULL);
    attention_forward(a->attended, rounded(model, a->attended_operand), a->lse, a->query, a->key, a->value,
                      a->num_queries, a->num_keys, C, model->config.nheads, dropout_at(acts, site), a->prior,
                      model->config.half, acts->workspace);
    add_residual(a->sum, a->residual, a->attended_operand, &block->output, a->num_queries, dropout_at(acts, site + 1));
    layernorm_forward(a->out, rounded(model, a->operand), a->mean, a->rstd, a->sum, block->norm.weight->value,
                      block->norm.bias->value, a->num_queries, C);
}

// The way back of the block above. dout: gradient of `out`, (queries, C). Written: dresidual, the gradient of
// `residual`, and dquery, that of query_in. Accumulated: dkey and dvalue, those of key_in and value_in; they may be the
// same memory as dquery and dresidual, as in self-attention, where one tensor plays several parts.
static void attention_block_backward(Activations *acts, const Model *model, const AttentionBlock *block,
                                     const AttentionActivations *a, int site, real *dresidual, real *dquery, real *dkey,
                                     real *dvalue, const real *dout) {
    int C = model->config.hidden_dim, rows = a->num_queries;
    const Norm *norm = &block->norm;
    Dropout dropout = dropout_at(acts, site + 1);
    layernorm_backward(dresidual, norm->weight->grad, norm->bias->grad, dout, a->sum, a->mean, a->rstd,
                       norm->weight->value, rows, C);
    const void *dprojected = dropout_backward(acts, model, dresidual, rows, dropout);
    layer_backward(acts, acts->dattended, a->attended_operand, dprojected, rows, 1, &block->output, NULL, NULL);
    attention_backward(acts->dq, acts->dk, acts->dv, acts->dattended, a->query, a->key, a->value, a->attended, a->lse,
                       rows, a->num_keys, C, model->config.nheads, dropout_at(acts, site), a->prior, model->config.half,
                       acts->workspace);
    layer_backward(acts, dquery, a->query_in, acts->dq, rows, 1, &block->query, NULL, NULL);
    layer_backward(acts, dkey, a->key_in, acts->dk, a->num_keys, 1, &block->key, dkey, NULL);
    layer_backward(acts, dvalue, a->value_in, acts->dv, a->num_keys, 1, &block->value, dvalue, NULL);
}

// hidden = dropout(relu(in W1 + b1)); out = norm(in + dropout(hidden W2 + b2))
static void feed_forward_forward(Activations *acts, const Model *model, const FeedForward *ffn,
                                 FeedForwardActivations *f, int site) {
    Dropout dropout = dropout_at(acts, site);
    layer_forward(f->hidden, f->in, f->rows, 1, &ffn->fc1, 1, NULL);
    if (dropout.p > 0)
        dropout_forward(f->hidden, model->config.half, f->hidden, model->config.half, NULL, (size_t)f->rows,
                        (size_t)model->config.dim_feedforward, dropout);
    add_residual(f->sum, f->residual, f->hidden, &ffn->fc2, f->rows, dropout_at(acts, site + 1));
    layernorm_forward(f->out, rounded(model, f->operand), f->mean, f->rstd, f->sum, ffn->norm.weight->value,
                      ffn->norm.bias->value, f->rows, model->config.hidden_dim);
}

// din: written, the gradient of `in`. The hidden units that ReLU or dropout silenced are those with hidden == 0, so one
// mask serves both; what is left of dropout is its factor 1 / (1 - p), which is multiplied in before fc2's weights:
// there are fewer channels there. The gradient of `hidden` takes its place.
static void feed_forward_backward(Activations *acts, const Model *model, const FeedForward *ffn,
                                  const FeedForwardActivations *f, int site, real *din, const real *dout) {
    int C = model->config.hidden_dim, rows = f->rows;
    Dropout dropout = dropout_at(acts, site + 1);
    layernorm_backward(acts->dsum, ffn->norm.weight->grad, ffn->norm.bias->grad, dout, f->sum, f->mean, f->rstd,
                       ffn->norm.weight->value, rows, C);
    const void *dprojected = dropout_backward(acts, model, acts->dsum, rows, dropout);
    layer_backward_weight(acts, f->hidden, dprojected, rows, 1, &ffn->fc2);
    if (dropout.p > 0)
        scale_rows(acts->dprojected, model->config.half, (real)(1 / (1 - dropout.p)), (size_t)rows * (size_t)C);
    layer_backward_data(f->hidden, dprojected, rows, 1, &ffn->fc2, NULL, f->hidden);
    layer_backward(acts, din, f->in, f->hidden, rows, 1, &ffn->fc1, acts->dsum, NULL);
}

static void block_forward(const Block *block, BlockActivations *b) {
    int h = b->height, w = b->width, last = block->num_convs - 1;
    const void *x = b->in;
    if (block->has_shortcut) layer_forward(b->shortcut, b->in, h, w, &block->shortcut, 0, NULL);
    for (int j = 0; j < last; j++) {
        layer_forward(b->inner[j], x, h, w, &block->conv[j], 1, NULL);
        h = conv_size(h, block->conv[j].shape), w = conv_size(w, block->conv[j].shape);
        x = b->inner[j];
    }
    layer_forward(b->out, x, h, w, &block->conv[last], 1, b->shortcut);
}

// On the way in, b->out holds the gradient before the block's last ReLU, that is, masked by out > 0; on the way out
// b->in holds the same for the block before, masked by in > 0. (`in` of the first block is a maximum over ReLUs, for
// which the same holds.) The inner maps too are replaced by their gradients.
static void block_backward(Activations *acts, const Block *block, const BlockActivations *b) {
    const int last = block->num_convs - 1;
    const int heights[3] = {b->height, conv_size(b->height, block->conv[0].shape), b->out_height};
    const int widths[3] = {b->width, conv_size(b->width, block->conv[0].shape), b->out_width};
    const void *dy = b->out;
    for (int j = last; j > 0; j--) {
        layer_backward(acts, b->inner[j - 1], b->inner[j - 1], dy, heights[j], widths[j], &block->conv[j], NULL,
                       b->inner[j - 1]);
        dy = b->inner[j - 1];
    }
    const void *dshortcut = b->out;
    if (block->has_shortcut) {
        layer_backward(acts, acts->dshortcut, b->in, b->out, b->height, b->width, &block->shortcut, NULL, NULL);
        dshortcut = acts->dshortcut;
    }
    layer_backward(acts, b->in, b->in, dy, b->height, b->width, &block->conv[0], dshortcut, b->in);
}

static void sigmoid(real *y, const real *x, size_t count) {
    for (size_t i = 0; i < count; i++) y[i] = (real)(1 / (1 + exp(-(double)x[i])));
}

// What is added to the queries (Q, C) where decoder layer l compares them: learned, and the same for all layers; or,
// with
// --decoder anchor, a function of the box that the layer receives (DAB-DETR: Liu et al. 2022),
//   relu(features W0 + b0) W1 + b1, features: those of 2 pi cx, 2 pi cy, 2 pi w, 2 pi h beside each other.
static const real *query_positions(const Model *model, Activations *acts, int l) {
    if (!model->config.anchor) return model->query_embeddings->value;
    const int Q = model->config.num_queries, C = model->config.hidden_dim;
    const size_t first = (size_t)l * (size_t)Q, count = (size_t)C / 2;
    const real *reference = acts->references + first * 4;
    real *features = acts->box_features + first * 4 * count, *hidden = acts->position_hidden + first * (size_t)C,
         *positions = acts->query_positions + first * (size_t)C;
    for (int i = 0; i < 4 * Q; i++)
        sine_features(features + (size_t)i * count, (int)count, 2 * 3.14159265358979323846 * (double)reference[i]);
    layer_forward(hidden, features, Q, 1, &model->query_position_head[0], 1, NULL);
    layer_forward(positions, hidden, Q, 1, &model->query_position_head[1], 0, NULL);
    return positions;
}

// The boxes of decoder layer l: sigmoid(box head). With --decoder anchor the head says by how much the layer moves the
// box it received, in logits, and what comes out is the next layer's reference (Deformable DETR: Zhu et al. 2021).
static void box_head_forward(const Model *model, Activations *acts, int l) {
    const int Q = model->config.num_queries, anchor = model->config.anchor;
    const size_t first = (size_t)l * (size_t)Q, state = first * (size_t)model->config.hidden_dim, count = (size_t)Q * 4;
    real *logits = acts->box_logits + first * 4, *boxes = acts->boxes + first * 4;
    const real *before = !anchor ? NULL : l ? logits - count : model->query_embeddings->value;
    layer_forward(acts->box_hidden[0] + state, acts->states + state, Q, 1, &model->box_head[0], 1, NULL);
    layer_forward(acts->box_hidden[1] + state, acts->box_hidden[0] + state, Q, 1, &model->box_head[1], 1, NULL);
    layer_forward(logits, acts->box_hidden[1] + state, Q, 1, &model->box_head[2], 0, before);
    sigmoid(boxes, logits, count);
    if (anchor && l < model->config.dec_layers - 1)
        memcpy(acts->references + (first + (size_t)Q) * 4, boxes, count * sizeof(real));
}

static void backbone_forward(const Model *model, Activations *acts) {
    const int half = model->config.half;
    layer_forward(acts->stem, acts->pixels, acts->height, acts->width, &model->stem, 1, NULL);
    maxpool_forward(acts->pooled, acts->argmax, acts->stem, conv_size(acts->height, model->stem.shape),
                    conv_size(acts->width, model->stem.shape), model->config.stem_width, half);
    for (int i = 0; i < model->num_blocks; i++) block_forward(&model->blocks[i], &acts->blocks[i]);
    const size_t map_count =
        (size_t)(acts->map_height * acts->map_width) * (size_t)model->input_projection.shape.out_channels;
    layer_forward(acts->tokens, acts->blocks[model->num_blocks - 1].out, acts->map_height, acts->map_width,
                  &model->input_projection, 0, NULL);
    if (half) add_rows(acts->tokens_operand, 1, acts->tokens, NULL, map_count);
}

static void encoder_forward(const Model *model, Activations *acts) {
    const ModelConfig *config = &model->config;
    const int C = config->hidden_dim, half = config->half;
    const size_t map_count = (size_t)(acts->map_height * acts->map_width) * (size_t)C;
    sine_positions(acts->positions, acts->map_height, acts->map_width, C);
    const real *x = acts->tokens;
    for (int l = 0; l < config->enc_layers; l++) {
        add_rows(acts->encoder_query[l], half, x, acts->positions, map_count);
        attention_block_forward(acts, model, &model->encoder_attention[l], &acts->encoder_attention[l], 4 * l);
        feed_forward_forward(acts, model, &model->encoder_ffn[l], &acts->encoder_ffn[l], 4 * l + 2);
        x = acts->encoder_ffn[l].out;
    }
    add_rows(acts->memory_query, half, x, acts->positions, map_count);
}

// The decoder and the heads behind each of its layers. Every layer's output is an answer: fewer dec_layers than
// activations_plan laid out for give the answers of the first ones.
static void decoder_forward(const Model *model, Activations *acts) {
    const ModelConfig *config = &model->config;
    const int C = config->hidden_dim, Q = config->num_queries, L = config->dec_layers, half = config->half;
    const size_t query_count = (size_t)Q * (size_t)C;
    if (config->anchor) {
        sigmoid(acts->references, model->query_embeddings->value, (size_t)Q * 4);
        memcpy(acts->target, model->query_content->value, query_count * sizeof(real));
    } else {
        memset(acts->target, 0, query_count * sizeof(real));
    }
    if (half) add_rows(acts->target_operand, 1, acts->target, NULL, query_count);
    const real *x = acts->target;
    for (int l = 0; l < L; l++) {
        int site = 4 * config->enc_layers + 6 * l;
        const real *positions = query_positions(model, acts, l);
        add_rows(acts->self_query[l], half, x, positions, query_count);
        attention_block_forward(acts, model, &model->decoder_self[l], &acts->decoder_self[l], site);
        add_rows(acts->cross_query[l], half, acts->decoder_self[l].out, positions, query_count);
        attention_block_forward(acts, model, &model->decoder_cross[l], &acts->decoder_cross[l], site + 2);
        feed_forward_forward(acts, model, &model->decoder_ffn[l], &acts->decoder_ffn[l], site + 4);
        x = acts->decoder_ffn[l].out;
        layernorm_forward(acts->states + (size_t)l * query_count, NULL, acts->state_mean + l * Q,
                          acts->state_rstd + l * Q, x, model->decoder_norm.weight->value,
                          model->decoder_norm.bias->value, Q, C);
        box_head_forward(model, acts, l);
    }
    layer_forward(acts->logits, acts->states, L * Q, 1, &model->class_head, 0, NULL);
}

// The whole network for one image that activations_plan has laid out and whose acts->pixels are filled.
static void network_forward(const Model *model, Activations *acts) {
    backbone_forward(model, acts);
    encoder_forward(model, acts);
    decoder_forward(model, acts);
}

// With --decoder anchor the box that a layer receives is a constant to it, but for the learned boxes in the first
// layer, which its boxes are sums with: their gradient is that of the sum.
static void heads_backward(const Model *model, Activations *acts) {
    int rows = model->config.dec_layers * model->config.num_queries;
    for (int i = 0; i < rows * 4; i++) acts->dboxes[i] *= acts->boxes[i] * (1 - acts->boxes[i]);  // through the sigmoid
    Param *learned = model->query_embeddings;
    if (model->config.anchor && learned->trained)
        add_rows(learned->grad, 0, learned->grad, acts->dboxes, learned->count);
    layer_backward(acts, acts->dstates, acts->states, acts->dlogits, rows, 1, &model->class_head, NULL, NULL);
    real **hidden = acts->box_hidden;  // their gradients take their place
    layer_backward(acts, hidden[1], hidden[1], acts->dboxes, rows, 1, &model->box_head[2], NULL, hidden[1]);
    layer_backward(acts, hidden[0], hidden[0], hidden[1], rows, 1, &model->box_head[1], NULL, hidden[0]);
    layer_backward(acts, acts->dstates, acts->states, hidden[0], rows, 1, &model->box_head[0], acts->dstates, NULL);
}

// From acts->dquery_positions, with --decoder anchor, to the head that made the positions.
static void query_positions_backward(const Model *model, Activations *acts) {
    const int rows = model->config.dec_layers * model->config.num_queries;
    real *hidden = acts->position_hidden;  // its gradient takes its place
    layer_backward(acts, hidden, hidden, acts->dquery_positions, rows, 1, &model->query_position_head[1], NULL, hidden);
    layer_backward_weight(acts, acts->box_features, hidden, rows, 1, &model->query_position_head[0]);
}

// Leaves the gradient of the encoder's output in acts->dmemory. Goes down to the lowest layer that is trained, or that
// something before it is; only the norm is behind all of them. It comes first: what layers add to together they must
// add in one turn.
static void decoder_backward(const Model *model, Activations *acts) {
    if (!model->class_head.needs_input_gradient) return;
    const ModelConfig *config = &model->config;
    int C = config->hidden_dim, Q = config->num_queries;
    size_t map_count = (size_t)(acts->map_height * acts->map_width) * (size_t)C, query_count = (size_t)Q * (size_t)C;
    real *dx = acts->dx, *dquery = acts->dquery, *dresidual = acts->dsum;
    memset(acts->dmemory, 0, map_count * sizeof(real));
    memset(acts->dmemory_query, 0, map_count * sizeof(real));
    memset(acts->dquery_positions, 0, (config->anchor ? config->dec_layers : 1) * query_count * sizeof(real));
    for (int l = config->dec_layers - 1; l >= 0; l--) {
        real *dstate = acts->dstates + (size_t)l * query_count;
        layernorm_backward(dstate, model->decoder_norm.weight->grad, model->decoder_norm.bias->grad, dstate,
                           acts->decoder_ffn[l].out, acts->state_mean + l * Q, acts->state_rstd + l * Q,
                           model->decoder_norm.weight->value, Q, C);
    }
    for (int l = config->dec_layers - 1; l >= 0 && model->decoder_ffn[l].trained; l--) {
        int site = 4 * config->enc_layers + 6 * l;
        const real *dstate = acts->dstates + (size_t)l * query_count;
        real *dpositions = acts->dquery_positions + (config->anchor ? (size_t)l * query_count : 0);
        if (l == config->dec_layers - 1)
            memcpy(dx, dstate, query_count * sizeof(real));
        else
            add_rows(dx, 0, dx, dstate, query_count);
        feed_forward_backward(acts, model, &model->decoder_ffn[l], &acts->decoder_ffn[l], site + 4, dx, dx);
        attention_block_backward(acts, model, &model->decoder_cross[l], &acts->decoder_cross[l], site + 2, dresidual,
                                 dquery, acts->dmemory_query, acts->dmemory, dx);
        add_rows(dpositions, 0, dpositions, dquery, query_count);
        add_rows(dx, 0, dresidual, dquery, query_count);
        attention_block_backward(acts, model, &model->decoder_self[l], &acts->decoder_self[l], site, dresidual, dquery,
                                 dquery, dresidual, dx);
        add_rows(dpositions, 0, dpositions, dquery, query_count);
        add_rows(dx, 0, dresidual, dquery, query_count);
    }
    if (config->anchor) {
        query_positions_backward(model, acts);
        if (model->query_content->trained)
            add_rows(model->query_content->grad, 0, model->query_content->grad, dx, query_count);
    } else if (model->query_embeddings->trained) {
        add_rows(model->query_embeddings->grad, 0, model->query_embeddings->grad, acts->dquery_positions, query_count);
    }
    add_rows(acts->dmemory, 0, acts->dmemory, acts->dmemory_query, map_count);
}

static void encoder_backward(const Model *model, Activations *acts) {
    size_t map_count = (size_t)(acts->map_height * acts->map_width) * (size_t)model->config.hidden_dim;
    real *dx = acts->dmemory;
    for (int l = model->config.enc_layers - 1; l >= 0 && model->encoder_ffn[l].trained; l--) {
        feed_forward_backward(acts, model, &model->encoder_ffn[l], &acts->encoder_ffn[l], 4 * l + 2, dx, dx);
        attention_block_backward(acts, model, &model->encoder_attention[l], &acts->encoder_attention[l], 4 * l,
                                 acts->dsum, acts->dquery, acts->dquery, acts->dsum, dx);
        add_rows(dx, 0, acts->dsum, acts->dquery, map_count);
    }
}

static void backbone_backward(const Model *model, Activations *acts) {
    const int half = model->config.half;
    void *map = acts->blocks[model->num_blocks - 1].out;
    const void *dtokens = acts->dmemory;
    if (half) {
        add_rows(acts->dprojected, 1, acts->dmemory, NULL,
                 (size_t)(acts->map_height * acts->map_width) * (size_t)model->config.hidden_dim);
        dtokens = acts->dprojected;
    }
    layer_backward(acts, map, map, dtokens, acts->map_height, acts->map_width, &model->input_projection, NULL, map);
    for (int i = model->num_blocks - 1; i >= 0 && model->blocks[i].trained; i--)
        block_backward(acts, &model->blocks[i], &acts->blocks[i]);
    if (model->stem.weight->trained) {
        int h = conv_size(acts->height, model->stem.shape), w = conv_size(acts->width, model->stem.shape);
        maxpool_backward(acts->stem, acts->pooled, acts->argmax, h, w, model->config.stem_width, half);
        layer_backward_weight(acts, acts->pixels, acts->stem, acts->height, acts->width, &model->stem);
    }
}

// Adds one image's gradients to those of the parameters, from acts->dlogits and acts->dboxes.
static void network_backward(const Model *model, Activations *acts) {
    heads_backward(model, acts);
    decoder_backward(model, acts);
    encoder_backward(model, acts);
    backbone_backward(model, acts);
}

// ---------------------------------------------------------------------------------------------------------------------
// Set loss: DETR's criterion (models/detr.py, models/matcher.py of the reference), one image at a time

typedef struct {
    double cost_class, cost_bbox, cost_giou;                 // the matcher's weights
    double class_loss_coef, bbox_loss_coef, giou_loss_coef;  // the loss's
    double eos_coef;                                         // of the class "no object", in softmax's cross-entropy
    int aux_loss;                                            // every decoder layer is trained, not only the last
    int aux_matches;  // queries that each of the first layers matches with a target
} LossSettings;

// What one optimizer step measured, as DETR logs it: unweighted, entry dec_layers - 1 is the final layer.
typedef struct {
    double loss;  // the weighted sum that is minimised
    double loss_ce[MAX_DEC_LAYERS], loss_bbox[MAX_DEC_LAYERS], loss_giou[MAX_DEC_LAYERS];
    double cardinality_error[MAX_DEC_LAYERS];  // mean of |queries that say "object" - objects|
    double class_error;                        // percent of matched queries that name another class
    double grad_norm;                          // of all gradients, before clipping
    int matched, matched_right;                // of the final layer
    double matched_iou;                        // sum over those pairs
    double query_spread;                       // how far apart the boxes of an image are, mean: see watch_boxes()
} Losses;

// The targets of one image: boxes (num_boxes, 4) as cx cy w h in 0..1, classes (num_boxes).
typedef struct {
    int num_boxes;
    const double *boxes;
    const int *classes;
} Targets;

// What the sums of a step are divided by, added up over its images; [1] in the decoder layers that match a box with
// aux_matches queries, see has_many(), [0] in the others. All of it follows from the targets alone: every layer of
// every image matches min(boxes, queries) queries. So it is known before the first forward pass, and the gradients of
// any number of images can be added up without rescaling anything later.
typedef struct {
    double boxes[2];    // all target boxes; the losses divide by at least 1
    double weights[2];  // the cross-entropy's class weights: matched + eos_coef * unmatched queries
    double images;
} LossDivisors;

// Whether a decoder layer is one of the first half, which --aux_matches lets match a box with several queries: more of
// them are told what an object is and where. The second half learns to leave one (the hybrid layer scheme of Jia et al.
// 2023, "DETRs with Hybrid Matching").
static int has_many(const ModelConfig *config, int l) { return l < config->dec_layers / 2; }

static void divisors_add(LossDivisors *divisors, int num_boxes, int num_queries, const LossSettings *settings) {
    for (int many = 0; many < 2; many++) {
        const int boxes = many ? settings->aux_matches * num_boxes : num_boxes,
                  matched = boxes < num_queries ? boxes : num_queries;
        divisors->boxes[many] += boxes;
        divisors->weights[many] += matched + settings->eos_coef * (num_queries - matched);
    }
    divisors->images++;
}

// Generalized intersection over union (Rezatofighi et al. 2019) of two boxes cx cy w h:
//   I / U - (E - U) / E,  I: intersection, U: union, E: the smallest box around both.
// d, or NULL: (4), receives its gradient with respect to a. With U = A + B - I,
//   dGIoU = (1/U + I/U^2 - 1/E) dI + (1/E - I/U^2) dA - U/E^2 dE.
HOST_DEVICE static double generalized_iou(const double a[4], const double b[4], double d[4]) {
    double intersection = 1, enclosing = 1, side[2], enclosing_side[2];
    int inner_low[2], inner_high[2];  // a's edge bounds the intersection on that side; otherwise it bounds E
    for (int axis = 0; axis < 2; axis++) {
        double a0 = a[axis] - a[axis + 2] / 2, a1 = a[axis] + a[axis + 2] / 2;
        double b0 = b[axis] - b[axis + 2] / 2, b1 = b[axis] + b[axis + 2] / 2;
        inner_low[axis] = a0 > b0;
        inner_high[axis] = a1 < b1;
        side[axis] = fmax((inner_high[axis] ? a1 : b1) - (inner_low[axis] ? a0 : b0), 0.0);
        enclosing_side[axis] = (inner_high[axis] ? b1 : a1) - (inner_low[axis] ? b0 : a0);
        intersection *= side[axis];
        enclosing *= enclosing_side[axis];
    }
    double area_union = a[2] * a[3] + b[2] * b[3] - intersection;
    if (d) {
        double u = 1 / area_union, e = 1 / enclosing;
        double of_intersection = u + intersection * u * u - e, of_area = e - intersection * u * u,
               of_enclosing = -area_union * e * e;
        for (int axis = 0; axis < 2; axis++) {
            int other = 1 - axis;
            double of_side = intersection > 0 ? of_intersection * side[other] : 0;
            double of_enclosing_side = of_enclosing * enclosing_side[other];
            double low = -(inner_low[axis] ? of_side : of_enclosing_side);
            double high = inner_high[axis] ? of_side : of_enclosing_side;
            d[axis] = low + high;
            d[axis + 2] = (high - low) / 2 + of_area * a[other + 2];
        }
    }
    return intersection / area_union - (enclosing - area_union) / enclosing;
}

// A cost as assign() counts it: one that is not finite is a very high one, so that it ends on any input.
HOST_DEVICE static inline double assign_cost(double c) { return isfinite(c) && fabs(c) < 1e12 ? c : 1e12; }

// The prices of a column that the search has reached and of the row that had it; rest: of the path, from there to its
// end.
HOST_DEVICE static inline void assign_price(double *row, double *column, double rest) { *row += rest, *column -= rest; }

// Every row on the path from row `start` to the free column `sink` moves to the column that it reached.
HOST_DEVICE static inline void assign_along(int *column_of_row, int *row_of_column, const int *before, int start,
                                            int sink) {
    column_of_row[start] = -1;
    for (int j = sink; j >= 0;) {
        const int row = before[j], left = column_of_row[row];
        row_of_column[j] = row;
        column_of_row[row] = j;
        j = left;
    }
}

// The assignment of every row to a column of its own with the least sum of costs, rows <= columns, cost (rows,
// columns): shortest augmenting paths (Jonker and Volgenant 1987; in this form Crouse 2016). Rows are entered one by
// one; each looks for the cheapest way to a free column through columns already taken, whose rows move on. u, v: dual
// prices, under which every reduced cost is >= 0. column_of_row: (rows), written. workspace: (rows + 2 * columns)
// doubles with (3 * columns) ints behind them.
HOST_DEVICE static void assign(int *column_of_row, const double *cost, int rows, int columns, double *workspace) {
    double *u = workspace, *v = u + rows, *shortest = v + columns;
    int *row_of_column = (int *)(shortest + columns), *before = row_of_column + columns, *done = before + columns;
    for (int i = 0; i < rows; i++) u[i] = 0;
    for (int j = 0; j < columns; j++) v[j] = 0, row_of_column[j] = -1;
    for (int start = 0; start < rows; start++) {
        for (int j = 0; j < columns; j++) shortest[j] = INFINITY, done[j] = 0, before[j] = start;
        int row = start, sink = -1;
        double length = 0;  // of the path to `row`
        while (sink < 0) {
            int nearest = -1;
            for (int j = 0; j < columns; j++) {
                if (done[j]) continue;
                double c = cost[(size_t)row * (size_t)columns + (size_t)j];
                double path = length + assign_cost(c) - u[row] - v[j];
                if (path < shortest[j]) shortest[j] = path, before[j] = row;
                if (nearest < 0 || shortest[j] < shortest[nearest]) nearest = j;
            }
            length = shortest[nearest];
            done[nearest] = 1;
            if (row_of_column[nearest] < 0)
                sink = nearest;
            else
                row = row_of_column[nearest];
        }
        u[start] += length;
        for (int j = 0; j < columns; j++)
            if (done[j] && j != sink) assign_price(&u[row_of_column[j]], &v[j], length - shortest[j]);
        assign_along(column_of_row, row_of_column, before, start, sink);
    }
}

// Softmax of one row of logits in double; returns the log of its denominator.
static double softmax_row(double *probabilities, const real *logits, int classes) {
    double highest = (double)logits[0], sum = 0;
    for (int c = 1; c < classes; c++) highest = (double)logits[c] > highest ? (double)logits[c] : highest;
    for (int c = 0; c < classes; c++) sum += probabilities[c] = exp((double)logits[c] - highest);
    for (int c = 0; c < classes; c++) probabilities[c] /= sum;
    return highest + log(sum);
}

// Focal loss (Lin et al. 2017) of one logit z that should say yes (positive) or no, with the sigmoid p of z:
//   yes: 0.25 (1 - p)^2 (-log p),   no: 0.75 p^2 (-log (1 - p)).
// derivative, or NULL: receives d/dz. With x = -z for yes, x = z for no, q = sigmoid(x) and softplus(x) = -log(1 - q)
// both are alpha q^2 softplus(x), whose derivative by x is alpha q^2 (2 (1 - q) softplus(x) + q).
HOST_DEVICE static double focal_loss(double z, int positive, double *derivative) {
    const double alpha = positive ? 0.25 : 0.75, x = positive ? -z : z;
    const double q = 1 / (1 + exp(-x)), softplus = fmax(x, 0.0) + log1p(exp(-fabs(x)));
    if (derivative) *derivative = (positive ? -1 : 1) * alpha * q * q * (2 * (1 - q) * softplus + q);
    return alpha * q * q * softplus;
}

// What the classes add to the cost of a query with these logits, if it is matched with a target of class c: (classes).
// softmax: -p(c). focal: by how much the loss grows if c should be yes instead of no (Deformable DETR's matcher).
static void class_costs(double *costs, const real *logits, const ModelConfig *config) {
    const int classes = num_logits(config);
    if (!config->focal) softmax_row(costs, logits, classes);
    for (int c = 0; c < classes; c++)
        costs[c] =
            config->focal ? focal_loss((double)logits[c], 1, NULL) - focal_loss((double)logits[c], 0, NULL) : -costs[c];
}

// Matches the queries of one decoder layer with the targets at the least total cost
//   cost_bbox * |b - t|_1 + cost_class * (class cost) - cost_giou * GIoU(b, t).
// match: (num_queries), the target of each query or -1. Every target finds `times` queries, or every query a target if
// there are fewer queries. logits: (num_queries, num_logits); boxes: (num_queries, 4).
static void match_queries(Activations *acts, int *match, const real *logits, const real *boxes,
                          const ModelConfig *config, Targets targets, int times, const LossSettings *settings) {
    const int N = targets.num_boxes;
    int T = times * N, Q = config->num_queries, transposed = T > Q;
    int rows = transposed ? Q : T, columns = transposed ? T : Q;
    size_t costs = (size_t)T * (size_t)Q;
    size_t needed = costs + (size_t)(rows + 2 * columns) + (size_t)(3 * columns + rows + 1) / 2;
    for (int q = 0; q < Q; q++) match[q] = -1;
    if (T == 0) return;
    if (needed > acts->costs_capacity) {
        acts->costs = (double *)reallocate(acts->costs, needed * sizeof(double));
        acts->costs_capacity = needed;
    }
    double *cost = acts->costs, *workspace = cost + costs, *of_class = acts->probabilities;
    int *column_of_row = (int *)(workspace + rows + 2 * columns) + 3 * columns;
    for (int q = 0; q < Q; q++) {
        class_costs(of_class, logits + (size_t)q * (size_t)num_logits(config), config);
        double box[4] = {(double)boxes[4 * q], (double)boxes[4 * q + 1], (double)boxes[4 * q + 2],
                         (double)boxes[4 * q + 3]};
        for (int t = 0; t < T; t++) {
            const double *target = targets.boxes + 4 * (t % N);
            double distance = 0;
            for (int i = 0; i < 4; i++) distance += fabs(box[i] - target[i]);
            cost[transposed ? (size_t)q * (size_t)T + (size_t)t : (size_t)t * (size_t)Q + (size_t)q] =
                settings->cost_bbox * distance + settings->cost_class * of_class[targets.classes[t % N]] -
                settings->cost_giou * generalized_iou(box, target, NULL);
        }
    }
    assign(column_of_row, cost, rows, columns, workspace);
    for (int i = 0; i < rows; i++) {
        if (transposed)
            match[i] = column_of_row[i] % N;
        else
            match[column_of_row[i]] = i % N;
    }
}

// The class loss of one query; writes its gradient, scaled by `weight`, to dlogits (classes). label: its class, or
// num_labels for "no object".
//   cross-entropy: w (log sum exp z - z_label) / divisors.weights, w = eos_coef for "no object", else 1;
//                  d/dz = w (softmax - onehot) / divisors.weights
//   focal:         the sum over classes of focal_loss / divisors.boxes
static double class_loss(real *dlogits, const real *z, int label, const ModelConfig *config, LossDivisors divisors,
                         int many, const LossSettings *settings, double weight, double *probabilities) {
    const int classes = num_logits(config);
    if (config->focal) {
        double sum = 0, num_boxes = fmax(divisors.boxes[many], 1), derivative;
        for (int c = 0; c < classes; c++) {
            sum += focal_loss((double)z[c], c == label, &derivative);
            dlogits[c] = (real)(weight * derivative / num_boxes);
        }
        return sum / num_boxes;
    }
    const double log_sum = softmax_row(probabilities, z, classes),
                 w = (label < config->num_labels ? 1 : settings->eos_coef) / divisors.weights[many];
    for (int c = 0; c < classes; c++) dlogits[c] = (real)(weight * w * (probabilities[c] - (c == label)));
    return w * (log_sum - (double)z[label]);
}

// Loss of one decoder layer l of one image: adds its share to `losses`, writes its gradient to dlogits and dboxes,
// scaled by `weight` (0 for an auxiliary layer that is not trained).
//   classes: class_loss_coef * class_loss
//   boxes:   bbox_loss_coef |b - t|_1 / divisors.boxes + giou_loss_coef (1 - GIoU) / divisors.boxes
// A query says "object" if its most likely class is one; with focal loss, if it is at least as likely as not.
static void layer_loss(Losses *losses, real *dlogits, real *dboxes, const real *logits, const real *boxes,
                       const int *match, int l, const ModelConfig *config, int is_final, Targets targets,
                       LossDivisors divisors, const LossSettings *settings, double weight, double *probabilities) {
    const int classes = num_logits(config), no_object = config->num_labels;
    int objects = 0;
    const int many = has_many(config, l);
    double num_boxes = fmax(divisors.boxes[many], 1);
    for (int q = 0; q < config->num_queries; q++) {
        const real *z = logits + (size_t)q * (size_t)classes;
        int target = match[q], label = target >= 0 ? targets.classes[target] : no_object, best = 0;
        losses->loss_ce[l] += class_loss(dlogits + (size_t)q * (size_t)classes, z, label, config, divisors, many,
                                         settings, weight * settings->class_loss_coef, probabilities);
        for (int c = 1; c < classes; c++)
            if (z[c] > z[best]) best = c;
        objects += config->focal ? z[best] > 0 : best != no_object;
        for (int i = 0; i < 4; i++) dboxes[4 * q + i] = 0;
        if (target < 0) continue;
        if (is_final) losses->matched++, losses->matched_right += best == label;
        double box[4] = {(double)boxes[4 * q], (double)boxes[4 * q + 1], (double)boxes[4 * q + 2],
                         (double)boxes[4 * q + 3]};
        const double *t = targets.boxes + 4 * target;
        double dgiou[4], giou = generalized_iou(box, t, dgiou);
        losses->loss_giou[l] += (1 - giou) / num_boxes;
        for (int i = 0; i < 4; i++) {
            double difference = box[i] - t[i], sign = (difference > 0) - (difference < 0);
            losses->loss_bbox[l] += fabs(difference) / num_boxes;
            dboxes[4 * q + i] =
                (real)(weight * (settings->bbox_loss_coef * sign - settings->giou_loss_coef * dgiou[i]) / num_boxes);
        }
    }
    losses->cardinality_error[l] += abs(objects - targets.num_boxes) / divisors.images;
}

// The loss of one image over all decoder layers, from acts->logits and acts->boxes; writes acts->match, dlogits,
// dboxes.
static void set_loss(const Model *model, Activations *acts, Targets targets, LossDivisors divisors,
                     const LossSettings *settings, Losses *losses) {
    const double begin = profile_begin();
    const ModelConfig *config = &model->config;
    for (int l = 0; l < config->dec_layers; l++) {
        size_t row = (size_t)l * (size_t)config->num_queries;
        match_queries(acts, acts->match + row, acts->logits + row * (size_t)num_logits(config), acts->boxes + row * 4,
                      config, targets, has_many(config, l) ? settings->aux_matches : 1, settings);
    }
    take_turn(acts);  // for the losses
    for (int l = 0; l < config->dec_layers; l++) {
        size_t row = (size_t)l * (size_t)config->num_queries, place = row * (size_t)num_logits(config);
        const real *logits = acts->logits + place, *boxes = acts->boxes + row * 4;
        int is_final = l == config->dec_layers - 1;
        layer_loss(losses, acts->dlogits + place, acts->dboxes + row * 4, logits, boxes, acts->match + row, l, config,
                   is_final, targets, divisors, settings, is_final || settings->aux_loss, acts->probabilities);
    }
    profile_end(begin, "matching and loss", "", 0, 0);
}

// Closes the sums of a step: class_error and the weighted total.
static void losses_finish(Losses *losses, int dec_layers, const LossSettings *settings) {
    losses->class_error = 100 - (losses->matched ? 100.0 * losses->matched_right / losses->matched : 0);
    losses->loss = 0;
    for (int l = settings->aux_loss ? 0 : dec_layers - 1; l < dec_layers; l++)
        losses->loss += settings->class_loss_coef * losses->loss_ce[l] +
                        settings->bbox_loss_coef * losses->loss_bbox[l] +
                        settings->giou_loss_coef * losses->loss_giou[l];
}

// ---------------------------------------------------------------------------------------------------------------------
// Calibration: statistics for frozen norms when there is no pretrained backbone

// ImageNet's mean and deviation, as every published backbone expects: (height * width, 3) bytes to reals, or (half)
// bf16.
static const double PIXEL_MEAN[3] = {0.485, 0.456, 0.406}, PIXEL_STD[3] = {0.229, 0.224, 0.225};

static void normalise_pixels(void *pixels, const Image *image, int half) {
    const double begin = profile_begin();
    real table[3][256];
    bf16 rounded[3][256];
    for (int c = 0; c < 3; c++) {
        for (int i = 0; i < 256; i++) {
            table[c][i] = (real)((i / 255.0 - PIXEL_MEAN[c]) / PIXEL_STD[c]);
            rounded[c][i] = to_bf16((float)table[c][i]);
        }
    }
    const size_t row = 3 * (size_t)image->width;
#pragma omp parallel for schedule(static)
    for (int y = 0; y < image->height; y++) {
        // volatile: look-ups one after the other take a third of the time of look-ups that a compiler packs into
        // vectors
        const volatile unsigned char *bytes = image->pixels + (size_t)y * row;
        for (size_t i = 0; i < row; i += 3) {
            for (size_t c = 0; c < 3; c++) {
                if (half)
                    ((bf16 *)pixels)[(size_t)y * row + i + c] = rounded[c][bytes[i + c]];
                else
                    ((real *)pixels)[(size_t)y * row + i + c] = table[c][bytes[i + c]];
            }
        }
    }
    profile_end(begin, "pixels normalised", "", 0, ((double)number_bytes(half) + 1) * 3 * image->width * image->height);
}

typedef struct {
    int height, width;
    real *data;  // (height * width, channels)
} FeatureMap;

// sums[n] += the sum over a map's pixels of channel n, or with `mean` of its squared distance from mean[n]; pixel after
// pixel, whichever thread has the channel.
static void add_channels(double *sums, const FeatureMap *map, const double *mean, int C) {
    enum { CHUNK = 16 };
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += CHUNK) {
        const int end = first + CHUNK < C ? first + CHUNK : C;
        for (int p = 0; p < map->height * map->width; p++) {
            const real *y = map->data + (size_t)p * (size_t)C;
            for (int n = first; n < end; n++) {
                const double difference = (double)y[n] - (mean ? mean[n] : 0);
                sums[n] += mean ? difference * difference : difference;
            }
        }
    }
}

// Runs one convolution over all maps, moves its norm's statistics by `share` of the way (1: all of it) to the mean and
// variance of what comes out, and applies the norm: out = relu?(norm(x W) (+ add)). in may be the same maps as out.
static void calibrate_layer(Layer *layer, FeatureMap *out, const FeatureMap *in, const FeatureMap *add, int relu,
                            int count, double share) {
    const int C = layer->shape.out_channels;
    Param *const norm[4] = {layer->norm_weight, layer->norm_bias, layer->norm_mean, layer->norm_variance};
    const real nothing[4] = {1, 0, 0, (real)(1 - 1e-5)};  // of a norm that changes nothing
    double *sum = (double *)allocate(6 * (size_t)C * sizeof(double)), *squares = sum + C, *before = squares + C,
           pixels = 0;
    for (int n = 0; n < 4 * C; n++)
        before[n] = (double)norm[n / C]->value[n % C], norm[n / C]->value[n % C] = nothing[n / C];
    layers_pack(&layer, 1, 1);
    for (int i = 0; i < count; i++) {
        FeatureMap y = {conv_size(in[i].height, layer->shape), conv_size(in[i].width, layer->shape), NULL};
        y.data = (real *)allocate((size_t)y.height * (size_t)y.width * (size_t)C * sizeof(real));
        layer_forward(y.data, in[i].data, in[i].height, in[i].width, layer, 0, NULL);
        add_channels(sum, &y, NULL, C);
        pixels += (double)y.height * y.width;
        if (out == in) free(in[i].data);
        out[i] = y;
    }
    for (int n = 0; n < C; n++) sum[n] /= pixels;
    for (int i = 0; i < count; i++) add_channels(squares, &out[i], sum, C);
    for (int n = 0; n < C; n++) {
        norm[0]->value[n] = (real)before[n], norm[1]->value[n] = (real)before[C + n];
        norm[2]->value[n] = (real)(float)((1 - share) * before[2 * C + n] + share * sum[n]);
        norm[3]->value[n] = (real)(float)((1 - share) * before[3 * C + n] + share * squares[n] / pixels);
    }
    fold_norm(layer);
    for (int i = 0; i < count; i++) {
#pragma omp parallel for schedule(static)
        for (int p = 0; p < out[i].height * out[i].width; p++) {
            for (int n = 0; n < C; n++) {
                const size_t at = (size_t)p * (size_t)C + (size_t)n;
                const real y = out[i].data[at] * layer->scale[n] + layer->folded_bias[n] + (add ? add[i].data[at] : 0);
                out[i].data[at] = relu && y < 0 ? 0 : y;
            }
        }
    }
    free(sum);
}

// Gives the frozen batch norms, layer after layer, the statistics of their inputs over `count` pictures, so that a
// network that starts from random weights passes on signals of unit variance. It stays a frozen-norm network: no image
// depends on another, and transformers opens it. share: how far the statistics move from what they were, 1 before
// training. Samples without pixels (unreadable) are left out; with none the statistics stay. The model is to be packed
// afterwards.
static void calibrate_norms(Model *model, const Sample *samples, int count, double share) {
    if (model->config.half) {  // in 32 bits all the same: both precisions start from one network
        Model twin;
        ModelConfig config = model->config;
        Error unused;
        config.half = 0;
        if (model_create(&twin, &config, 0, 0, 0, &unused) != 0) return;
        for (int i = 0; i < twin.num_params; i++)
            memcpy(twin.params[i]->value, model->params[i]->value, twin.params[i]->count * sizeof(real));
        calibrate_norms(&twin, samples, count, share);
        for (int i = 0; i < twin.num_params; i++)
            memcpy(model->params[i]->value, twin.params[i]->value, twin.params[i]->count * sizeof(real));
        model_free(&twin);
        return;
    }
    FeatureMap *maps = (FeatureMap *)allocate(3 * (size_t)count * sizeof(FeatureMap)), *inner = maps + count,
               *shortcut = inner + count;
    int images = 0;
    for (int i = 0; i < count; i++) {
        const Image *image = &samples[i].image;
        if (!image->pixels) continue;
        FeatureMap map = {image->height, image->width, NULL};
        map.data = (real *)allocate((size_t)map.height * (size_t)map.width * 3 * sizeof(real));
        normalise_pixels(map.data, image, 0);
        maps[images++] = map;
    }
    if (images == 0) {
        free(maps);
        return;
    }
    calibrate_layer(&model->stem, maps, maps, NULL, 1, images, share);
    for (int i = 0; i < images; i++) {
        FeatureMap pooled = {(maps[i].height + 1) / 2, (maps[i].width + 1) / 2, NULL};
        size_t pooled_count = (size_t)pooled.height * (size_t)pooled.width * (size_t)model->config.stem_width;
        unsigned char *argmax = (unsigned char *)allocate(pooled_count);
        pooled.data = (real *)allocate(pooled_count * sizeof(real));
        maxpool_forward(pooled.data, argmax, maps[i].data, maps[i].height, maps[i].width, model->config.stem_width, 0);
        free(argmax);
        free(maps[i].data);
        maps[i] = pooled;
    }
    for (int b = 0; b < model->num_blocks; b++) {
        Block *block = &model->blocks[b];
        int last = block->num_convs - 1;
        if (block->has_shortcut) calibrate_layer(&block->shortcut, shortcut, maps, NULL, 0, images, share);
        calibrate_layer(&block->conv[0], inner, maps, NULL, 1, images, share);
        for (int j = 1; j <= last; j++)
            calibrate_layer(&block->conv[j], inner, inner,
                            j < last              ? NULL
                            : block->has_shortcut ? shortcut
                                                  : maps,
                            j <= last, images, share);
        for (int i = 0; i < images; i++) {
            free(maps[i].data);
            if (block->has_shortcut) free(shortcut[i].data);
            maps[i] = inner[i];
        }
    }
    for (int i = 0; i < images; i++) free(maps[i].data);
    free(maps);
}

// --norm_init track calibrates again during training, with the pictures that are there anyway: so often, with so many
// of the batch, and so far.
enum { TRACK_STEPS = 8, TRACK_IMAGES = 4 };
static const double TRACK_SHARE = 0.5;

// Bytes that calibrate_norms takes for TRACK_IMAGES pictures of (height, width), at most: the picture with the stem's
// map, or the maps of the first stage.
static double calibration_bytes(const Model *model, int height, int width) {
    const double stem = 3 + model->config.stem_width / 4.0, stage = 4 * model->config.widths[0] / 16.0;
    return TRACK_IMAGES * sizeof(real) * (stem > stage ? stem : stage) * height * width;
}

// ---------------------------------------------------------------------------------------------------------------------
// Optimizer: AdamW in DETR's two groups, and the training step

typedef struct {
    double lr, lr_backbone, weight_decay, clip_max_norm;  // as they are at this step; clip_max_norm 0: no clipping
    double ema_decay;                                     // of the average, where the model has one
} OptimizerSettings;

// How the learning rates run: a function of the step alone, so that a run that goes on needs no state for it.
typedef struct {
    int cosine;            // from the full rate to 0 over the planned steps; else a tenth after each `drop_steps`
    int64_t warmup_steps;  // in which the rate rises from 0
    int64_t drop_steps, planned_steps;
} Schedule;

// What both learning rates are multiplied with in the step that `step` others came before. With a cosine and a warm-up
// it is get_cosine_schedule_with_warmup of transformers: the cosine begins where the warm-up ends.
static double schedule_factor(const Schedule *schedule, int64_t step) {
    const double warmup = (double)schedule->warmup_steps, after = (double)step - warmup;
    double factor = after < 0 ? (double)step / warmup : 1;
    if (!schedule->cosine)
        factor *= pow(0.1, (double)(step / schedule->drop_steps));
    else if (after > 0)
        factor = (1 + cos(M_PI * after / ((double)schedule->planned_steps - warmup))) / 2;
    return factor;
}

// Gives the model an exponential average of its trained values, which begins as they are.
static void ema_create(Model *model) {
    for (int counting = 1; counting >= 0; counting--) {
        for (int i = 0; i < model->num_params; i++) {
            Param *param = model->params[i];
            if (!param->trained) continue;
            param->ema = arena_take(&model->ema, param->count);
            if (!counting) memcpy(param->ema, param->value, param->count * sizeof(real));
        }
        if (counting) arena_allocate(&model->ema);
    }
}

// Exchanges the values and their averages, where there are any: to compute with the averages, and to go back.
static void ema_swap(Model *model) {
    if (!model->ema.base) return;
    for (int i = 0; i < model->num_params; i++) {
        Param *param = model->params[i];
        real *value = param->value;
        if (param->ema) param->value = param->ema, param->ema = value;
    }
    layers_pack(model->layers, model->num_layers, 0);
}

// Before the pictures of a step. The weights of layers, nearly all there is, are left as they are: the first picture
// writes their gradients, and unfold_norms() sees to those that none came to.
static void zero_gradients(Model *model) {
    for (int i = 0; i < model->num_layers; i++) model->layers[i]->weight->stale = 1;
    for (int i = 0; i < model->num_params; i++) {
        const Param *param = model->params[i];
        if (param->trained && !param->stale) memset(param->grad, 0, param->count * sizeof(real));
    }
}

// The sum of a[i] * b[i], in an order that depends on count alone. Products of floats are exact in double; a sum of
// squares has a relative error of at most (count / (2 * U64_LANES) + 2 * U64_LANES) * 2^-53.
static double dot_product(const real *a, const real *b, size_t count) {
    typedef double dvec __attribute__((vector_size(VECTOR_BYTES)));
    typedef real few __attribute__((vector_size(U64_LANES * sizeof(real)), aligned(sizeof(real)), may_alias));
    dvec sums[2] = {{0}, {0}};
    size_t i = 0;
    for (; i + 2 * U64_LANES <= count; i += 2 * U64_LANES) {
        __builtin_prefetch(a + i + 1024);  // the processor itself does not ask far enough ahead
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
            sums[j] += __builtin_convertvector(*(const few *)(a + i + j * U64_LANES), dvec) *
                       __builtin_convertvector(*(const few *)(b + i + j * U64_LANES), dvec);
    }
    double sum = 0;
    for (int lane = 0; lane < U64_LANES; lane++) sum += sums[0][lane] + sums[1][lane];
    for (; i < count; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

// From the gradients of folded weights W' = scale W, b' = norm_bias - mean scale to those of what is stored. A row n of
// the weights shares one scale[n] = norm_weight[n] r[n], r = 1 / sqrt(variance + 1e-5):
//   dnorm_weight = r (sum over k of dW'[n, k] W[n, k] - mean db'),  dnorm_bias = db',  dW = scale dW'
static void unfold_norms(Model *model) {
    const double begin = profile_begin();
    double bytes = 0;
    for (int i = 0; i < model->num_layers; i++) {
        const Param *weight = model->layers[i]->weight;
        if (weight->trained && weight->stale) memset(weight->grad, 0, weight->count * sizeof(real));
    }
#pragma omp parallel reduction(+ : bytes)
    for (int i = 0; i < model->num_layers; i++) {
        Layer *layer = model->layers[i];
        if (!layer->norm_weight || !layer->weight->trained) continue;
        size_t row = layer->weight->count / (size_t)layer->shape.out_channels;
#pragma omp for schedule(static) nowait
        for (int n = 0; n < layer->shape.out_channels; n++) {
            real *dw = layer->weight->grad + (size_t)n * row;
            const real scale = layer->scale[n];
            if (layer->norm_weight->trained) {
                double product = dot_product(dw, layer->weight->value + (size_t)n * row, row);
                double r = 1 / sqrt((double)layer->norm_variance->value[n] + 1e-5);
                layer->norm_weight->grad[n] =
                    (real)(r * (product - (double)layer->norm_mean->value[n] * (double)layer->norm_bias->grad[n]));
            }
            for (size_t k = 0; k < row; k++) dw[k] *= scale;
            bytes += sizeof(real) * (layer->norm_weight->trained ? 3.0 : 2.0) * (double)row;
        }
    }
    profile_end(begin, "frozen norms unfolded", "backward", 0, bytes);
}

// The norm of all gradients together. Chunks of fixed size are summed on any thread and added up in order, so the
// result does not depend on the number of threads.
static double gradient_norm(const Model *model) {
    const size_t chunk = 16384;
    const double begin = profile_begin();
    size_t count = 0;
    for (int i = 0; i < model->num_params; i++)
        if (model->params[i]->trained) count += divide_up(model->params[i]->count, chunk);
    double *partial = (double *)allocate(count * sizeof(double)), total = 0;
#pragma omp parallel
    {
        double *sums = partial;
        for (int i = 0; i < model->num_params; i++) {
            const Param *param = model->params[i];
            if (!param->trained) continue;
#pragma omp for schedule(static) nowait
            for (size_t first = 0; first < param->count; first += chunk) {
                const size_t left = param->count - first;
                sums[first / chunk] =
                    dot_product(param->grad + first, param->grad + first, left < chunk ? left : chunk);
            }
            sums += divide_up(param->count, chunk);
        }
    }
    for (size_t i = 0; i < count; i++) total += partial[i];
    free(partial);
    profile_end(begin, "norm of the gradient", "", 0, sizeof(real) * (double)model->num_trained);
    return sqrt(total);
}

// --norm_init track: every filter of the backbone is moved back to mean 0 and to the length that He's initialisation
// gives it, sqrt(2 in / out) (weight standardisation: Qiao et al. 2019; without batch statistics: Brock et al. 2021).
// A norm that is constant within a step does not hold back what it is to norm: filters that grow, or that agree to
// answer the mean of their input, which is positive behind a ReLU, would make each layer's output larger than the
// one's before, by orders of magnitude in a hundred steps. What is left to the filter is its direction; its scale is
// the norm's.
static void standardise_filters(Model *model) {
    for (int i = 0; i < model->num_layers; i++) {
        Layer *layer = model->layers[i];
        if (!layer->norm_weight) continue;
        const int out = layer->shape.out_channels;
        const size_t row = layer->weight->count / (size_t)out;
        const double length = sqrt(2.0 * layer->shape.in_channels / out);
#pragma omp parallel for schedule(static)
        for (int n = 0; n < out; n++) {
            real *filter = layer->weight->value + (size_t)n * row;
            double mean = 0;
            for (size_t k = 0; k < row; k++) mean += (double)filter[k] / (double)row;
            for (size_t k = 0; k < row; k++) filter[k] -= (real)mean;
            const real factor = (real)(length / fmax(sqrt(dot_product(filter, filter, row)), 1e-12));
            for (size_t k = 0; k < row; k++) filter[k] *= factor;
        }
    }
}

// One AdamW step (Loshchilov and Hutter 2019; betas 0.9 and 0.999, eps 1e-8) with gradients clipped to clip_max_norm,
// then every changed layer is packed again. step: number of steps taken before this one. grad_norm: gradient_norm().
// The average follows the new values: ema += (1 - d) (value - ema) with d = min(ema_decay, step / (step + 9)), so that
// it holds about a ninth of the way so far until that is longer than the decay reaches, and nothing of the start.
// (d ema + (1 - d) value would be the same, were the two factors, rounded, to add up to 1.)
static void optimizer_step(Model *model, const OptimizerSettings *settings, int64_t step, double grad_norm) {
    enum { CHUNK = 4096 };
    const double begin = profile_begin();
    double clip = settings->clip_max_norm > 0 ? fmin(1, settings->clip_max_norm / (grad_norm + 1e-6)) : 1;
    double correction1 = 1 - pow(0.9, (double)(step + 1)), correction2 = 1 - pow(0.999, (double)(step + 1));
#pragma omp parallel
    for (int i = 0; i < model->num_params; i++) {
        Param *param = model->params[i];
        if (!param->trained) continue;
        double lr = param->group == GROUP_BACKBONE ? settings->lr_backbone : settings->lr;
        real share = (real)(1 - fmin(settings->ema_decay, (double)step / ((double)step + 9)));
        real decay = (real)(1 - lr * settings->weight_decay), rate = (real)(lr / correction1);
        real root = (real)(1 / sqrt(correction2)), factor = (real)clip;
        real *value = param->value, *m = param->exp_avg, *v = param->exp_avg_sq, *ema = param->ema;
        const real *grad = param->grad;
        const real beta1 = (real)0.9, beta2 = (real)0.999, rest1 = (real)(1 - 0.9), rest2 = (real)(1 - 0.999),
                   eps = (real)1e-8;
#pragma omp for schedule(static) nowait
        for (size_t first = 0; first < param->count; first += CHUNK) {  // the average follows while a chunk is in cache
            const size_t end = param->count - first < CHUNK ? param->count : first + CHUNK;
#pragma omp simd
            for (size_t k = first; k < end; k++) {
                real g = grad[k] * factor;
                m[k] = beta1 * m[k] + rest1 * g;
                v[k] = beta2 * v[k] + rest2 * g * g;
                value[k] = value[k] * decay - rate * m[k] / (square_root(v[k]) * root + eps);
            }
#pragma omp simd
            for (size_t k = first; k < (ema ? end : first); k++) ema[k] += share * (value[k] - ema[k]);
        }
    }
    if (model->track_norms) standardise_filters(model);
    profile_end(begin, "AdamW", "", 0, sizeof(real) * (model->ema.base ? 9.0 : 7.0) * (double)model->num_trained);
    layers_pack(model->layers, model->num_layers, 0);
}

static int is_finite_tensor(const void *data, size_t count, int half) {
    for (size_t i = 0; i < count; i++)
        if (!isfinite((double)load_number(data, i, half))) return 0;
    return 1;
}

// Names the first tensor, in the order of computation, that holds a NaN or an infinity: weights, activations (acts, or
// NULL after the way back, which takes their place), gradients.
static const char *first_nonfinite(const Model *model, const Activations *acts) {
    for (int i = 0; i < model->num_params; i++)
        if (!is_finite_tensor(model->params[i]->value, model->params[i]->count, 0)) return model->params[i]->name;
    for (size_t i = 0; acts && i < acts->arena.num_named; i++) {
        const NamedTensor *tensor = &acts->arena.named[i];
        if (!is_finite_tensor(tensor->data, tensor->count, tensor->half)) return tensor->name;
    }
    for (int i = model->num_params - 1; i >= 0; i--)
        if (model->params[i]->trained && !is_finite_tensor(model->params[i]->grad, model->params[i]->count, 0))
            return model->params[i]->name;
    return NULL;
}

// Says why a step failed: its loss, or else its gradient, is not finite. image: of the batch, the first with such a
// loss; name: of the first such tensor, NULL if there is none. -1.
static int fail_nonfinite(Error *error, int64_t step, int image, double loss, const char *name) {
    if (!name) name = "none: the sum overflowed";
    if (isfinite(loss))
        return fail(error, "step %lld: the gradient is not finite; the first such tensor is \"%s\"",
                    (long long)step + 1, name);
    return fail(error,
                "step %lld, image %d of the batch: the loss is %g; the first tensor that is not finite is \"%s\"",
                (long long)step + 1, image, loss, name);
}

// Lays out the activations for an image and writes its normalised pixels.
static void load_image(const Model *model, Activations *acts, const Image *image) {
    activations_plan(acts, model, image->height, image->width);
    normalise_pixels(acts->pixels, image, model->config.half);
}

// What is told of an image's final boxes besides its loss, once set_loss has matched them. Adds to losses: the IoU of
// every pair; and the root of the mean squared distance of the boxes' centres from their mean, in fractions of the
// picture, over `images`. It is 0 when every query says the same box, and sqrt(1 / 6) when they fill the picture
// evenly.
static void watch_boxes(const Model *model, const Activations *acts, Targets targets, double images, Losses *losses) {
    const int Q = model->config.num_queries;
    const size_t first = (size_t)(model->config.dec_layers - 1) * (size_t)Q;
    double mean[2] = {0, 0}, square = 0;
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < 2; i++) mean[i] += (double)acts->boxes[4 * (first + (size_t)q) + (size_t)i] / Q;
    for (int q = 0; q < Q; q++) {
        const real *box = acts->boxes + 4 * (first + (size_t)q);
        const int target = acts->match[first + (size_t)q];
        for (int i = 0; i < 2; i++) square += ((double)box[i] - mean[i]) * ((double)box[i] - mean[i]) / Q;
        if (target < 0) continue;
        double corner[2][4];  // x, y, width, height of both boxes
        for (int i = 0; i < 4; i++) {
            const double *other = targets.boxes + 4 * target;
            corner[0][i] = i < 2 ? (double)box[i] - (double)box[i + 2] / 2 : (double)box[i];
            corner[1][i] = i < 2 ? other[i] - other[i + 2] / 2 : other[i];
        }
        losses->matched_iou += coco_iou(corner[0], corner[1], 0);
    }
    losses->query_spread += sqrt(square) / images;
}

// What the images of a step have in common.
typedef struct {
    const LossSettings *settings;
    const Sample *samples;
    int count;
    uint64_t seed;
    int64_t step;
    LossDivisors divisors;
    Losses *losses;
    // the first image with which the loss is not finite, and that loss; acts: NULL if there is none
    const Activations *acts;
    int image;
    double loss;
} Batch;

// Adds to the losses and gradients what images of a batch give, one after another: every threads-th, the thread-th
// first. Samples without pixels (unreadable) are left out and do not count. Stops at a loss that is not finite.
static void train_images(const Model *model, Activations *acts, Batch *batch, int thread, int threads) {
    Losses *losses = batch->losses;
    int64_t place = -1;  // in the batch
    acts[thread].before = threads > 1 ? &acts[(thread + threads - 1) % threads] : NULL;
    acts += thread;
    for (int i = 0; i < batch->count; i++) {
        const Sample *sample = &batch->samples[i];
        if (!sample->image.pixels || ++place % threads != thread) continue;
        set_turn(acts, place * MAX_TURNS);
        acts->dropout.p = model->config.dropout, acts->dropout.seed = batch->seed;
        acts->dropout.step = (uint32_t)batch->step, acts->dropout.image = (uint32_t)i;
        Targets targets = {sample->num_boxes, sample->boxes, sample->classes};
        load_image(model, acts, &sample->image);
        network_forward(model, acts);
        set_loss(model, acts, targets, batch->divisors, batch->settings, losses);
        losses_finish(losses, model->config.dec_layers, batch->settings);
        watch_boxes(model, acts, targets, batch->divisors.images, losses);
        if (!isfinite(losses->loss)) {  // nor will it be with the images behind, which stop here too
            if (!batch->acts) batch->acts = acts, batch->image = i, batch->loss = losses->loss;
            break;
        }
        network_backward(model, acts);
    }
    set_turn(acts, INT64_MAX);
    acts->before = NULL;
}

// One optimizer step over a batch: the gradients of its images are added up in order, with divisors that hold for the
// whole batch. acts: for as many images side by side as activations_create() was asked for; with a profile one after
// another. --norm_init track: every TRACK_STEPS steps the frozen norms first go TRACK_SHARE of the way to the
// statistics of the batch's first TRACK_IMAGES pictures; within a step they are constants. Samples without pixels
// (unreadable) are left out. On a loss or gradient that is not finite the weights stay as they are, and -1 comes back
// with the name of the first bad tensor.
static int training_step(Model *model, Activations *acts, const LossSettings *loss_settings,
                         const OptimizerSettings *optimizer_settings, const Sample *samples, int batch_size,
                         uint64_t seed, int64_t step, Losses *losses, Error *error) {
    if (model->track_norms && step > 0 && step % TRACK_STEPS == 0) {
        calibrate_norms(model, samples, batch_size < TRACK_IMAGES ? batch_size : TRACK_IMAGES, TRACK_SHARE);
        model_pack(model);
    }
    Batch batch = {loss_settings, samples, batch_size, seed, step, {{0, 0}, {0, 0}, 0}, losses, NULL, 0, 0};
    for (int i = 0; i < batch_size; i++)
        if (samples[i].image.pixels)
            divisors_add(&batch.divisors, samples[i].num_boxes, model->config.num_queries, loss_settings);
    memset(losses, 0, sizeof *losses);
    zero_gradients(model);
    if (acts->in_flight == 1 || profile.on) {
        train_images(model, acts, &batch, 0, 1);
    } else {
        for (int i = 0; i < acts->in_flight; i++) acts[i].turn = 0;
#pragma omp parallel num_threads(acts->in_flight)
        {
            omp_set_num_threads(1);  // for the loops inside
            train_images(model, acts, &batch, omp_get_thread_num(), omp_get_num_threads());
        }
    }
    if (batch.acts) return fail_nonfinite(error, step, batch.image, batch.loss, first_nonfinite(model, batch.acts));
    unfold_norms(model);
    losses->grad_norm = gradient_norm(model);
    if (!isfinite(losses->grad_norm)) return fail_nonfinite(error, step, 0, losses->loss, first_nonfinite(model, NULL));
    optimizer_step(model, optimizer_settings, step, losses->grad_norm);
    return 0;
}

// One image up to the encoder's output. decoder_forward() goes on to its predictions: the last num_queries rows of
// acts->logits and acts->boxes.
static void encode_image(const Model *model, Activations *acts, const Image *image) {
    acts->dropout.p = 0;
    load_image(model, acts, image);
    backbone_forward(model, acts);
    encoder_forward(model, acts);
}

// The loss of predictions that decoder_forward has made, without gradients.
static void evaluation_losses(const Model *model, Activations *acts, const LossSettings *settings, const Sample *sample,
                              Losses *losses) {
    Targets targets = {sample->num_boxes, sample->boxes, sample->classes};
    LossDivisors divisors = {{0, 0}, {0, 0}, 0};
    divisors_add(&divisors, targets.num_boxes, model->config.num_queries, settings);
    memset(losses, 0, sizeof *losses);
    set_loss(model, acts, targets, divisors, settings, losses);
    losses_finish(losses, model->config.dec_layers, settings);
    watch_boxes(model, acts, targets, divisors.images, losses);
}

// Multiply-adds times two of one forward pass over an image: what benchmarks state speed in. *untrained: the share of
// backbone layers that are not trained and so have no backward pass.
static double forward_flops(const Model *model, int height, int width, double *untrained) {
    Activations acts;
    activations_lists(&acts, model, 0);
    activations_plan(&acts, model, height, width);
    double T = (double)acts.map_height * acts.map_width, Q = model->config.num_queries, C = model->config.hidden_dim,
           F = model->config.dim_feedforward;
    double sum = (double)conv_size(height, model->stem.shape) * conv_size(width, model->stem.shape) *
                 (double)model->stem.weight->count;
    *untrained = model->stem.weight->trained ? 0 : 2 * sum;
    for (int i = 0; i < model->num_blocks; i++) {
        const Block *block = &model->blocks[i];
        const BlockActivations *b = &acts.blocks[i];
        double in = (double)b->height * b->width, out = (double)b->out_height * b->out_width;
        double of_block = block->has_shortcut ? out * (double)block->shortcut.weight->count : 0;
        for (int j = 0; j < block->num_convs; j++) {
            if (block->conv[j].shape.stride > 1) in = out;
            of_block += in * (double)block->conv[j].weight->count;
        }
        sum += of_block;
        if (!block->trained) *untrained += 2 * of_block;
    }
    sum += T * (double)model->input_projection.weight->count;
    sum += model->config.enc_layers * (T * (4 * C * C + 2 * C * F) + 2 * T * T * C);
    sum += model->config.dec_layers * (Q * (6 * C * C + 2 * C * F) + 2 * T * C * C + 2 * Q * Q * C + 2 * Q * T * C);
    sum += model->config.dec_layers * Q * (C * num_logits(&model->config) + 2 * C * C + 4 * C);
    if (model->config.anchor) sum += model->config.dec_layers * Q * 3 * C * C;
    activations_free(&acts);
    return 2 * sum;
}

// Starts this program again with what OpenMP reads before main: a thread that waits for the others spins for as long as
// it takes to wake one that sleeps, some tens of microseconds, and then sleeps. A step has some hundred parallel loops,
// and to sleep in each costs a tenth of it; to spin on costs more where the loader's threads, or another program, need
// the core (doc/6-how-the-matmul-gets-fast.md, "Threads that wait").
static void wait_briefly(char **argv) {
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv("/proc/self/exe", argv);  // comes back where there is no such file: then they spin
}

// ---------------------------------------------------------------------------------------------------------------------
// The program around it: what a user types, what lands on disk

#include "program/settings.h"    // flags and presets
#include "program/checkpoint.h"  // config.json, tensors
#include "program/watch.h"       // warnings, before and during training
#include "program/commands.h"    // train, check, eval, predict, score, bench

#ifndef MAIN
#define MAIN main  // program/portable.c chooses among several, each of another name
#endif

#ifndef TRAIN_DETR_NO_MAIN
int MAIN(int argc, char **argv) {
    wait_briefly(argv);
#ifdef __GLIBC__
    mallopt(M_ARENA_MAX, 1);  // or each reading thread of an evaluation leaves a heap of its own behind
#endif
    char *command_line = shell_command(argc, argv);  // before getopt moves the words
    Error error;
    int command = -1, help = 0;
    signal(SIGPIPE, SIG_IGN);  // a reader that goes away is an error like any other,
    signal(SIGXFSZ, SIG_IGN);  // and so is a file that may not grow further
    for (int i = 1; i < argc; i++) help |= strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0;
    for (int c = 0; c < NUM_COMMANDS && argc > 1; c++)
        if (strcmp(argv[1], COMMANDS[c].name) == 0) command = c;
    if (command < 0 && !(help && argv[1][0] == '-'))
        usage_error("%s \"%s\": train, check, eval, predict, score or bench must come first: see %s --help",
                    argc < 2 ? "no command" : "unknown command", argc < 2 ? "" : argv[1], argv[0]);
    Settings settings =
        settings_for(argv[0], command < 0 ? "" : COMMANDS[command].name, command < 0 ? 0 : COMMANDS[command].command);
    int status = 0;
    if (help) {
        print_help(&settings, command);
    } else {
        settings_parse(&settings, argc - 1, argv + 1);
        settings.command_line = command_line;
        if (settings.num_arguments && settings.command != PREDICT)
            usage_error("%s: %s takes flags only: see %s %s --help", settings.arguments[0], settings.command_name,
                        argv[0], settings.command_name);
        if (!engine.is_gpu && strcmp(flag_text(&settings, "precision"), "fp16") == 0)
            usage_error("--precision fp16 is for GPUs: on the CPU there are fp32 and bf16");
        if (!engine.is_gpu && flag_on(&settings, "tf32"))
            usage_error("--tf32 is for GPUs: on the CPU fp32 is multiplied as it is");
        if (!engine.is_gpu && flag_on(&settings, "recompute"))
            usage_error("--recompute is for GPUs: the CPU has one picture's activations a thread");
        status = COMMANDS[command].run(&settings, &error);
    }
    if (status == 0 && (fflush(stdout) != 0 || ferror(stdout)))
        status = fail(&error, "standard output: cannot be written");
    if (status != 0) fprintf(stderr, "error: %s\n", error.text);
    free(command_line);
    return status == 0 ? 0 : 1;
}
#endif
