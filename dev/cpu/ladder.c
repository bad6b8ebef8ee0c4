/*
ladder.c: how a matrix product gets fast on a CPU, and how a 3x3 convolution becomes one. Each rung is a short function
that does the same as the one before it, faster; its comment says what it changes and why that helps. The last rungs
call the trainer's own kernels, so the ladder ends at the real thing.

    make ladder                  checks every rung, times it on one thread, prints tables in Markdown
    make ladder LADDER=--quick   checks every rung on small sizes; its times mean nothing

Not a library: the number of columns must be a multiple of PANEL, everything runs on one thread, and a convolution is
3x3 with stride 1 and padding 1. Read it downward:

    Vectors, Measuring           what all rungs share
    Matmul                       c = a b
    bf16                         the same with half the bytes and twice the peak
    Convolution                  y = relu(conv(x, w) + bias + residual)
    Backward weight              dw += the gradient of w
    The last rungs, The tables   train_detr.c's kernels under the same clock; main

Machine words. A core can start FMAS fused multiply-adds of a whole vector in a cycle (Zen 4: one of 64 bytes), and has
the result LATENCY cycles later (4): so at least FMAS * LATENCY independent sums must be under way, or it waits. Of
loads it does about as many as FMAs, so a number must be used several times once it is in a register. Memory comes in
lines of 64 bytes; L1 (32 KB, 64 sets of 8 lines) feeds the FMAs, L2 (1 MB) about half as fast, L3 slower again.
Addresses 4 KB apart share one set of L1, so nine such lines evict each other, however empty the rest is.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __AVX512BF16__
#include <immintrin.h>  // the dot product of pairs
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Vectors: GCC's, as wide as the processor's registers

#if defined __AVX512F__  // 32 registers of 64 bytes
enum { BYTES = 64, VECTORS = 4 };
#elif defined __AVX__      // 16 of 32
enum { BYTES = 32, VECTORS = 2 };
#elif defined __aarch64__  // 32 of 16
enum { BYTES = 16, VECTORS = 4 };
#else                      // 16 of 16
enum { BYTES = 16, VECTORS = 2 };
#endif

enum {
    WIDE = BYTES / 4,  // floats in a vector
    ROWS = 6,          // a tile of the result, ROWS x VECTORS vectors, fills the registers but for a few
    PANEL = VECTORS * WIDE,
    BLOCK = 60,  // rows that use a panel one after another, while it is in L2
};

typedef float floats __attribute__((vector_size(BYTES)));
typedef float floats_anywhere __attribute__((vector_size(BYTES), aligned(4), may_alias));

static inline floats get(const float *from) { return *(const floats_anywhere *)from; }
static inline void put(float *to, floats value) { *(floats_anywhere *)to = value; }
static inline int smaller(int a, int b) { return a < b ? a : b; }

// ---------------------------------------------------------------------------------------------------------------------
// Measuring

// Of this thread: other programs on the machine do not count, unless they take memory bandwidth or cache away.
static double cpu_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void *allocate(size_t bytes) {
    void *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!memory) {
        fprintf(stderr, "error: out of memory: %zu bytes\n", bytes);
        exit(1);
    }
    memset(memory, 0, bytes);  // a page costs its first user microseconds; not inside a measurement
    return memory;
}

static float *new_floats(size_t count) { return (float *)allocate(count * sizeof(float)); }

// Whole numbers from -3 to 3. Every product and every sum of them, in whatever order, is a whole number (in Winograd's
// form a multiple of 1/4) far below 2^24, hence exact in float, as are the numbers themselves in bf16. So a correct
// rung differs from the reference by 0, and one product left out, doubled or misplaced cannot hide in rounding.
static void fill(float *numbers, size_t count, uint32_t seed) {
    for (size_t i = 0; i < count; i++) {
        seed = seed * 1664525 + 1013904223;
        numbers[i] = (float)((seed >> 16) % 7) - 3;
    }
}

// One table. Every rung writes `count` floats to `result`, which must equal `expected`.
typedef struct {
    const float *result;
    const double *expected;
    size_t count;
    double flops, peak, seconds_before;  // GFLOP/s
    int number, failed, quick;
} Ladder;

static void print_head(const char *title) {
    printf(
        "\n**%s**\n\n| | | ms | GFLOP/s | of peak | times the one above |\n| ---: | --- | ---: | ---: | ---: | ---: "
        "|\n",
        title);
}

// RUNG(ladder, name, call): clears the result, runs the call and checks it, then runs it again until half a second or
// 30 runs are used up, and prints the best time. A call that takes a second runs once.
#define RUNG(ladder, name, call)                                               \
    do {                                                                       \
        double best_ = 1e30, total_ = 0;                                       \
        memset((void *)(ladder)->result, 0, (ladder)->count * sizeof(float));  \
        for (int run_ = 0; run_ == 0 || (run_ < 30 && total_ < 0.5); run_++) { \
            double begin_ = cpu_seconds();                                     \
            call;                                                              \
            double seconds_ = cpu_seconds() - begin_;                          \
            if (run_ == 0) check(ladder, name);                                \
            total_ += seconds_;                                                \
            best_ = seconds_ < best_ ? seconds_ : best_;                       \
            if ((ladder)->quick) break;                                        \
        }                                                                      \
        print_rung(ladder, name, best_);                                       \
    } while (0)

static void check(Ladder *ladder, const char *name) {
    for (size_t i = 0; i < ladder->count; i++) {
        if ((double)ladder->result[i] == ladder->expected[i]) continue;
        fprintf(stderr, "error: %s: element %zu is %g, must be %g\n", name, i, (double)ladder->result[i],
                ladder->expected[i]);
        ladder->failed++;
        return;
    }
}

static void print_rung(Ladder *ladder, const char *name, double seconds) {
    printf("| %d | %s | %.1f | %.1f | %.1f %% | ", ++ladder->number, name, 1e3 * seconds,
           1e-9 * ladder->flops / seconds, 100e-9 * ladder->flops / seconds / ladder->peak);
    if (ladder->seconds_before > 0) printf("%.2f ", ladder->seconds_before / seconds);
    printf("|\n");
    fflush(stdout);
    ladder->seconds_before = seconds;
}

// ---------------------------------------------------------------------------------------------------------------------
// Matmul: c = a b, with a (rows, inner), b (inner, columns), c (rows, columns), all row after row

// Three loops, as it is written on paper. The inner one walks down a column of b: of every line of 64 bytes it uses 4,
// and lines a power of two apart fall into few sets of L1, so they are gone before the next column could use them. And
// it is one sum: each addition waits for the one before, and the compiler may not split it, since that rounds
// otherwise.
static void matmul_three_loops(float *c, const float *a, const float *b, int rows, int inner, int columns) {
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < columns; j++) {
            float sum = 0;
            for (int k = 0; k < inner; k++) sum += a[i * inner + k] * b[k * columns + j];
            c[i * columns + j] = sum;
        }
    }
}

// The same products with j innermost: b and c are read along their rows, and neighbouring sums are independent, so the
// compiler makes vectors of them. But each FMA now loads c and stores it again: two loads and a store for one FMA,
// where the core has room for one load.
static void matmul_rows_of_b(float *c, const float *a, const float *b, int rows, int inner, int columns) {
    memset(c, 0, sizeof(float) * rows * columns);
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < inner; k++)
            for (int j = 0; j < columns; j++) c[i * columns + j] += a[i * inner + k] * b[k * columns + j];
}

// A tile: ROWS x VECTORS sums in registers. One turn loads VECTORS vectors of b, each used ROWS times, and ROWS numbers
// of a, each used VECTORS times: with 6 x 4, 10 loads for 24 FMAs, and 24 independent sums hide the latency. Every loop
// over the tile must be unrolled: registers have no index, and a tile that has one lives in memory. The number of a
// costs no instruction of its own: the FMA reads it from memory and spreads it over the lanes.
typedef floats Tile[ROWS][VECTORS];

// tile[i] += sum over k < inner of rows[i][k * step] * b[k * stride + 0 .. PANEL)
static inline __attribute__((always_inline)) void multiply(Tile tile, const float *const rows[ROWS], int inner,
                                                           size_t step, const float *b, size_t stride) {
    const float *row[ROWS];
    size_t at = 0;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) row[i] = rows[i];
    for (int k = 0; k < inner; k++, at += step, b += stride) {
        floats numbers[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) numbers[v] = get(b + v * WIDE);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            float number = row[i][at];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) tile[i][v] += number * numbers[v];
        }
    }
}

static inline __attribute__((always_inline)) void clear(Tile tile) {
    const floats zero = {0};
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) tile[i][v] = zero;
}

// One tile of c from row `row` on; below the last row that one is repeated: read, and written, the same again.
static inline __attribute__((always_inline)) void matmul_tile(float *c, const float *a, const float *b, size_t stride,
                                                              int row, int rows, int inner, int columns) {
    const float *in[ROWS];
    float *out[ROWS];
    Tile tile;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        size_t at = smaller(row + i, rows - 1);
        in[i] = a + at * inner, out[i] = c + at * columns;
    }
    clear(tile);
    multiply(tile, in, inner, 1, b, stride);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) put(out[i] + v * WIDE, tile[i][v]);
}

// The tile, on b as it lies. A panel of it, PANEL columns, has its rows `columns` floats apart: where that is a power
// of two they share a few sets of L1, each page of 4 KB holds only some of them, and the prefetcher, which follows
// lines that are neighbours, gets in what nobody wants.
static void matmul_tiles(float *c, const float *a, const float *b, int rows, int inner, int columns) {
    for (int row = 0; row < rows; row += ROWS)
        for (int j = 0; j < columns; j += PANEL) matmul_tile(c + j, a, b + j, columns, row, rows, inner, columns);
}

// packed[panel][k][0 .. PANEL) = b[k][panel * PANEL + 0 .. PANEL)
static void pack(float *packed, const float *b, int inner, int columns) {
    for (int j = 0; j < columns; j += PANEL)
        for (int k = 0; k < inner; k++, packed += PANEL)
            memcpy(packed, b + (size_t)k * columns + j, sizeof(float) * PANEL);
}

// b is copied once, panel after panel, in the order in which the tile reads it: neighbouring lines, all sets, few
// pages. The copy is part of the time; it is used rows / ROWS times. a needs none: ROWS rows are ROWS streams, and even
// 4 KB apart they fit into the 8 lines of a set (that is one reason why the tile is not 12 rows by 2 vectors).
static void matmul_packed(float *c, const float *a, const float *b, int rows, int inner, int columns, float *packed) {
    pack(packed, b, inner, columns);
    for (int row = 0; row < rows; row += ROWS)
        for (int j = 0; j < columns; j += PANEL)
            matmul_tile(c + j, a, packed + (size_t)j * inner, PANEL, row, rows, inner, columns);
}

// BLOCK rows use a panel before the next panel's turn. Both are in L2 by then, so b comes from L3 once for BLOCK rows
// instead of once for ROWS, and a comes from memory once.
static void matmul_blocks(float *c, const float *a, const float *b, int rows, int inner, int columns, float *packed) {
    pack(packed, b, inner, columns);
    for (int block = 0; block < rows; block += BLOCK)
        for (int j = 0; j < columns; j += PANEL)
            for (int row = block; row < smaller(block + BLOCK, rows); row += ROWS)
                matmul_tile(c + j, a, packed + (size_t)j * inner, PANEL, row, rows, inner, columns);
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16: the upper half of a float. Rows of bf16 are read as rows of pairs, the number with the even index in the lower
// half, so that the loops stay what they are with half the inner dimension. Sums stay in float.

typedef uint32_t Pair;
typedef uint32_t pairs_wide __attribute__((vector_size(BYTES)));
typedef uint32_t pairs_anywhere __attribute__((vector_size(BYTES), aligned(4), may_alias));

// To nearest, ties to even. (NaN is not treated: there is none here.)
static inline uint32_t rounded(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static void make_pairs(Pair *pairs, const float *numbers, size_t count) {
    for (size_t i = 0; i < count; i++) pairs[i] = rounded(numbers[2 * i]) | rounded(numbers[2 * i + 1]) << 16;
}

// packed[panel][k / 2][0 .. PANEL): b[k] and b[k + 1] of a column side by side
static void pack_pairs(Pair *packed, const float *b, int inner, int columns) {
    for (int j = 0; j < columns; j += PANEL)
        for (int k = 0; k < inner; k += 2)
            for (int i = 0; i < PANEL; i++, packed++) {
                const float *at = b + (size_t)k * columns + j + i;
                *packed = rounded(at[0]) | rounded(at[columns]) << 16;
            }
}

// Every processor can do this: a bf16 becomes a float by moving it to the upper half.
static inline floats dot_by_shifts(floats sum, pairs_wide a, pairs_wide b) {
    sum += (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
    return sum + (floats)(a << 16) * (floats)(b << 16);
}

#ifdef __AVX512BF16__
static inline floats dot_instruction(floats sum, pairs_wide a, pairs_wide b) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// matmul_blocks() on pairs. a: (rows, inner / 2) pairs.
static inline __attribute__((always_inline)) void matmul_pairs(float *c, const Pair *a, const float *b, int rows,
                                                               int inner, int columns, Pair *packed,
                                                               floats (*dot)(floats, pairs_wide, pairs_wide)) {
    const int half = inner / 2;
    pack_pairs(packed, b, inner, columns);
    for (int block = 0; block < rows; block += BLOCK) {
        for (int j = 0; j < columns; j += PANEL) {
            for (int row = block; row < smaller(block + BLOCK, rows); row += ROWS) {
                const Pair *in[ROWS], *panel = packed + (size_t)j * half;
                Tile tile;
                clear(tile);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) in[i] = a + (size_t)smaller(row + i, rows - 1) * half;
                for (int k = 0; k < half; k++, panel += PANEL) {
#pragma GCC unroll 8
                    for (int i = 0; i < ROWS; i++) {
                        pairs_wide number = (pairs_wide){0} + in[i][k];
#pragma GCC unroll 8
                        for (int v = 0; v < VECTORS; v++)
                            tile[i][v] = dot(tile[i][v], number, *(const pairs_anywhere *)(panel + v * WIDE));
                    }
                }
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
                    for (int v = 0; v < VECTORS; v++)
                        put(c + (size_t)smaller(row + i, rows - 1) * columns + j + v * WIDE, tile[i][v]);
            }
        }
    }
}

// bf16 only as a way to store: half the bytes come from memory, the arithmetic is that of floats, and taking the pairs
// apart costs two instructions for every two vectors of numbers. Worth it where memory is the limit, which it is not
// here.
static void matmul_pairs_by_shifts(float *c, const Pair *a, const float *b, int rows, int inner, int columns,
                                   Pair *packed) {
    matmul_pairs(c, a, b, rows, inner, columns, packed, dot_by_shifts);
}

#ifdef __AVX512BF16__
// One instruction does both products of a pair in every lane: twice the FLOPs for the same registers, loads and loop.
static void matmul_pairs_by_instruction(float *c, const Pair *a, const float *b, int rows, int inner, int columns,
                                        Pair *packed) {
    matmul_pairs(c, a, b, rows, inner, columns, packed, dot_instruction);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Convolution: y = relu(conv(x, w) + bias + residual), 3x3, stride 1, padding 1, with x (height * width, in), w (3 * 3,
// in, out), y and residual (height * width, out), bias (out). As a matmul: y has a row a pixel, and the inner dimension
// is the 9 taps by the channels of x. With a batch there would be a loop more, around everything.

typedef struct {
    int height, width, in, out;
    const float *x, *w, *bias, *residual;
    float *y;
    const float *zeros;  // `in` of them: a pixel outside the picture
} Conv;

// The pixel of x that y's pixel (i, j) reads through a tap.
static inline const float *pixel(const Conv *v, int i, int j, int tap) {
    i += tap / 3 - 1, j += tap % 3 - 1;
    const int inside = i >= 0 && i < v->height && j >= 0 && j < v->width;
    return inside ? v->x + ((size_t)i * v->width + j) * v->in : v->zeros;
}

// What follows the sum, as three layers would do it: y is read and written three times more.
static void separate_passes(const Conv *v) {
    const size_t pixels = (size_t)v->height * v->width, count = pixels * v->out;
    for (size_t m = 0; m < pixels; m++)
        for (int n = 0; n < v->out; n++) v->y[m * v->out + n] += v->bias[n];
    for (size_t i = 0; i < count; i++) v->y[i] += v->residual[i];
    for (size_t i = 0; i < count; i++) v->y[i] = v->y[i] < 0 ? 0 : v->y[i];
}

// The definition: six loops, and one sum that waits for itself while it walks down the columns of w.
static void conv_loops(const Conv *v) {
    for (int i = 0; i < v->height; i++) {
        for (int j = 0; j < v->width; j++) {
            for (int n = 0; n < v->out; n++) {
                float sum = 0;
                for (int tap = 0; tap < 9; tap++) {
                    const float *from = pixel(v, i, j, tap), *w = v->w + (size_t)tap * v->in * v->out + n;
                    for (int c = 0; c < v->in; c++) sum += from[c] * w[(size_t)c * v->out];
                }
                v->y[((size_t)i * v->width + j) * v->out + n] = sum;
            }
        }
    }
    separate_passes(v);
}

// The out channels innermost, as in matmul_rows_of_b(): vectors, but a load and a store of y for each FMA.
static void conv_rows_of_w(const Conv *v) {
    for (int i = 0; i < v->height; i++) {
        for (int j = 0; j < v->width; j++) {
            float *y = v->y + ((size_t)i * v->width + j) * v->out;
            memset(y, 0, sizeof(float) * v->out);
            for (int tap = 0; tap < 9; tap++) {
                const float *from = pixel(v, i, j, tap), *w = v->w + (size_t)tap * v->in * v->out;
                for (int c = 0; c < v->in; c++)
                    for (int n = 0; n < v->out; n++) y[n] += from[c] * w[c * v->out + n];
            }
        }
    }
    separate_passes(v);
}

// to (pixels, 9, in) = the patches of the pixels first .. first + pixels - 1 of y
static void copy_pixels(float *to, const Conv *v, int first, int pixels) {
    for (int m = first; m < first + pixels; m++)
        for (int tap = 0; tap < 9; tap++, to += v->in)
            memcpy(to, pixel(v, m / v->width, m % v->width, tap), sizeof(float) * v->in);
}

// im2col: every pixel's patch is written side by side, and the best matmul does the rest. Simple, but nine copies of x
// go to memory and come back, and need room there: 62 MB for 128 channels at 100 x 134.
static void conv_im2col(const Conv *v, float *patches, float *packed) {
    copy_pixels(patches, v, 0, v->height * v->width);
    matmul_blocks(v->y, patches, v->w, v->height * v->width, 9 * v->in, v->out, packed);
    separate_passes(v);
}

// The patches of BLOCK pixels at a time: they are multiplied while they are in L2, and memory sees only x and y. What
// is left is the copying itself, nine loads and stores for each number of x.
static void conv_im2col_blocks(const Conv *v, float *patches, float *packed) {
    const int pixels = v->height * v->width, inner = 9 * v->in;
    pack(packed, v->w, inner, v->out);
    for (int first = 0; first < pixels; first += BLOCK) {
        const int count = smaller(BLOCK, pixels - first);
        copy_pixels(patches, v, first, count);
        for (int n = 0; n < v->out; n += PANEL)
            for (int row = 0; row < count; row += ROWS)
                matmul_tile(v->y + (size_t)first * v->out + n, patches, packed + (size_t)n * inner, PANEL, row, count,
                            inner, v->out);
    }
    separate_passes(v);
}

// The tile does not ask for rows that are 9 * in long: it runs over `in` numbers, takes ROWS other pointers, and runs
// on, with its sums in registers. So the patch is never made. The pointers are found once for all panels.
//
// fused: bias, residual and ReLU are done in registers before the tile is written.
static inline __attribute__((always_inline)) void conv_runs(const Conv *v, float *packed, int fused) {
    const int pixels = v->height * v->width, in = v->in;
    const floats zero = {0};
    int taps = 9;
    __asm__(""
            : "+r"(taps));  // gcc must not know the 9: it would unroll the loop and keep less of the tile in registers
    pack(packed, v->w, 9 * v->in, v->out);
    for (int first = 0; first < pixels; first += BLOCK) {
        const float *rows[BLOCK / ROWS][9][ROWS];
        for (int row = 0; row < BLOCK; row++) {
            const int m = smaller(first + row, pixels - 1), i = m / v->width, j = m % v->width;
            for (int tap = 0; tap < 9; tap++) rows[row / ROWS][tap][row % ROWS] = pixel(v, i, j, tap);
        }
        for (int n = 0; n < v->out; n += PANEL) {
            for (int row = 0; row < smaller(BLOCK, pixels - first); row += ROWS) {
                const float *panel = packed + (size_t)n * 9 * v->in;
                Tile tile;
                clear(tile);
                for (int tap = 0; tap < taps; tap++, panel += PANEL * in)
                    multiply(tile, rows[row / ROWS][tap], in, 1, panel, PANEL);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    const size_t at = (size_t)smaller(first + row + i, pixels - 1) * v->out + n;
#pragma GCC unroll 8
                    for (int k = 0; k < VECTORS; k++) {
                        floats sum = tile[i][k];
                        if (fused) {
                            sum += get(v->bias + n + k * WIDE) + get(v->residual + at + k * WIDE);
                            sum = (floats)((sum > zero) & (__typeof__(sum > zero))sum);
                        }
                        put(v->y + at + k * WIDE, sum);
                    }
                }
            }
        }
    }
    if (!fused) separate_passes(v);
}

static void conv_implicit(const Conv *v, float *packed) { conv_runs(v, packed, 0); }

// y is written once and never read. A 3x3 has so much arithmetic for each number that this saves little time.
static void conv_fused(const Conv *v, float *packed) { conv_runs(v, packed, 1); }

// Winograd's F(2x2, 3x3) (Lavin and Gray 2015, https://arxiv.org/abs/1509.09308): 2 x 2 pixels of y are made from 4 x 4
// of x with 16 products instead of 36, for each pair of channels:
//
//     y = A' [ (G w G') * (B' x B) ] A      * element by element, summed over channels: 16 matmuls, one a position
//
// B, G and A hold 0, 1, -1 and 1/2, so the transforms are additions; each is applied along one axis, then the other.
// The FLOPs in the table are still those of the definition: more than 100 % is possible, 225 % is the limit.
static inline void winograd_input(floats *d, int step) {  // d[0 .. 3] = B' d
    const floats d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
    d[0] = d0 - d2, d[step] = d1 + d2, d[2 * step] = d2 - d1, d[3 * step] = d1 - d3;
}

static inline void winograd_weight(floats *u, int step, floats g0, floats g1, floats g2) {  // u[0 .. 3] = G g
    u[0] = g0, u[step] = 0.5f * (g0 + g1 + g2), u[2 * step] = 0.5f * (g0 - g1 + g2), u[3 * step] = g2;
}

static inline void winograd_output(floats *m, int step) {  // m[0 .. 1] = A' m
    const floats m1 = m[step], m2 = m[2 * step];
    m[0] = m[0] + m1 + m2, m[step] = m1 - m2 - m[3 * step];
}

// packed[panel][position][c][0 .. PANEL) = G w G'
static void winograd_pack(float *packed, const Conv *v) {
    const size_t tap = (size_t)v->in * v->out;
    for (int n = 0; n < v->out; n += PANEL) {
        for (int c = 0; c < v->in; c++) {
            for (int k = 0; k < PANEL; k += WIDE) {
                floats half[3][4], u[4][4];
                const float *w = v->w + (size_t)c * v->out + n + k;
                for (int x = 0; x < 3; x++)
                    winograd_weight(half[x], 1, get(w + x * tap), get(w + (3 + x) * tap), get(w + (6 + x) * tap));
                for (int y = 0; y < 4; y++) winograd_weight(u[y], 1, half[0][y], half[1][y], half[2][y]);
                for (int p = 0; p < 16; p++)
                    put(packed + ((size_t)n * 16 + p * PANEL) * v->in + c * PANEL + k, u[p / 4][p % 4]);
            }
        }
    }
}

enum { SQUARES = 30 };  // of 2 x 2 pixels, a block: transformed pixels, sums and a panel fit into L2

// room: 16 * SQUARES * (in + PANEL) floats.
static void conv_winograd(const Conv *v, float *packed, float *room) {
    const int down = (v->height + 1) / 2, across = (v->width + 1) / 2, squares = down * across;
    float *inputs = room, *sums = room + (size_t)16 * SQUARES * v->in;  // [position][square][c], [position][square][n]
    const floats zero = {0};
    winograd_pack(packed, v);
    for (int first = 0; first < squares; first += SQUARES) {
        const int count = smaller(SQUARES, squares - first);
        for (int s = 0; s < count; s++) {
            const int y = (first + s) / across * 2, x = (first + s) % across * 2;
            const float *from[16];
            for (int p = 0; p < 16; p++) {  // position (1, 1) is pixel (y, x): that one through tap 4
                const int i = y + p / 4 - 1, j = x + p % 4 - 1;
                from[p] = pixel(v, i, j, 4);
            }
            for (int c = 0; c < v->in; c += WIDE) {
                floats d[16];
#pragma GCC unroll 16
                for (int p = 0; p < 16; p++) d[p] = get(from[p] + c);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) winograd_input(d + j, 4);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) winograd_input(d + 4 * i, 1);
#pragma GCC unroll 16
                for (int p = 0; p < 16; p++) put(inputs + ((size_t)p * SQUARES + s) * v->in + c, d[p]);
            }
        }
        for (int n = 0; n < v->out; n += PANEL) {
            for (int p = 0; p < 16; p++)
                for (int row = 0; row < count; row += ROWS)
                    matmul_tile(sums + p * SQUARES * PANEL, inputs + (size_t)p * SQUARES * v->in,
                                packed + ((size_t)n * 16 + p * PANEL) * v->in, PANEL, row, count, v->in, PANEL);
            for (int s = 0; s < count; s++) {
                const int y = (first + s) / across * 2, x = (first + s) % across * 2;
                for (int k = 0; k < PANEL; k += WIDE) {
                    floats m[16];
#pragma GCC unroll 16
                    for (int p = 0; p < 16; p++) m[p] = get(sums + (p * SQUARES + s) * PANEL + k);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) winograd_output(m + j, 4);
#pragma GCC unroll 2
                    for (int i = 0; i < 2; i++) winograd_output(m + 4 * i, 1);
                    for (int i = 0; i < smaller(2, v->height - y); i++) {
                        for (int j = 0; j < smaller(2, v->width - x); j++) {
                            const size_t at = ((size_t)(y + i) * v->width + x + j) * v->out + n + k;
                            floats sum = m[4 * i + j] + get(v->bias + n + k) + get(v->residual + at);
                            put(v->y + at, (floats)((sum > zero) & (__typeof__(sum > zero))sum));
                        }
                    }
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward weight: dw[tap][c][n] += sum over pixels of x[the pixel that the tap reads][c] * dy[pixel][n]. A matmul
// whose inner dimension is the pixels, and neither side lies as the tile wants it.

// Pixel by pixel. The inner loop makes vectors, but each FMA loads and stores dw, and all of dw, more than half of L2
// with 128 channels, goes by for every pixel.
static void weight_loops(float *dw, const float *dy, const Conv *v) {
    for (int m = 0; m < v->height * v->width; m++) {
        for (int tap = 0; tap < 9; tap++) {
            const float *from = pixel(v, m / v->width, m % v->width, tap);
            for (int c = 0; c < v->in; c++)
                for (int n = 0; n < v->out; n++)
                    dw[((size_t)tap * v->in + c) * v->out + n] += from[c] * dy[(size_t)m * v->out + n];
        }
    }
}

enum { PIXELS = 128 };  // a block: long enough that reading and writing dw is cheap, short enough for L2

// From one copied pixel of x to the next: an odd number of lines, of 16 floats, with room for a whole tile at the end.
static inline int weight_stride(const Conv *v) { return ((v->in + ROWS + 15) / 16 | 1) * 16; }

// PIXELS pixels of x and dy are copied side by side, and the tile runs over them: its sums stay in registers for PIXELS
// FMAs, and dw is read and written once a block. The rows of a tile are now ROWS neighbouring channels, one pixel after
// the other; a distance of an odd number of lines from pixel to pixel spreads them over all sets of L1 (with a power of
// two, as channels have it, they would share a few). room: PIXELS * (weight_stride() + out) floats.
static void weight_blocks(float *dw, const float *dy, const Conv *v, float *room) {
    const int pixels = v->height * v->width, stride = weight_stride(v);
    float *panels = room, *block = room + (size_t)PIXELS * v->out;
    for (int tap = 0; tap < 9; tap++) {
        for (int first = 0; first < pixels; first += PIXELS) {
            const int count = smaller(PIXELS, pixels - first);
            for (int m = 0; m < count; m++)
                memcpy(block + (size_t)m * stride, pixel(v, (first + m) / v->width, (first + m) % v->width, tap),
                       sizeof(float) * v->in);
            pack(panels, dy + (size_t)first * v->out, count, v->out);
            for (int n = 0; n < v->out; n += PANEL) {
                for (int c = 0; c < v->in; c += ROWS) {
                    float *out = dw + ((size_t)tap * v->in + c) * v->out + n;
                    const float *rows[ROWS];
                    Tile tile;
                    clear(tile);
#pragma GCC unroll 8
                    for (int i = 0; i < ROWS; i++) rows[i] = block + c + i;
                    multiply(tile, rows, count, stride, panels + (size_t)n * count, PANEL);
#pragma GCC unroll 8
                    for (int i = 0; i < ROWS; i++) {
                        if (c + i == v->in) break;
#pragma GCC unroll 8
                        for (int k = 0; k < VECTORS; k++) put(out + k * WIDE, get(out + k * WIDE) + tile[i][k]);
                        out += v->out;
                    }
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The last rungs: train_detr.c's kernels, in trainer.c beside this file, a file of its own because many names are the
// same. The trainer's weights are (out, taps, in), the transpose of the ones here; packing counts as above.

// c = a b; half: a is bf16; packed: inner * (columns + 1) floats
void trainer_matmul(float *c, const void *a, const float *b_transposed, int rows, int inner, int columns, int half,
                    float *packed);
// y as above; packed: 9 * in * (out + 1) floats
void trainer_conv(float *y, const float *x, const float *w_transposed, const float *bias, const float *residual,
                  int height, int width, int in, int out, float *packed);
// dw (out, taps, in) +=; workspace: trainer_weight_workspace() floats
void trainer_weight(float *dw, const float *x, const float *dy, int height, int width, int in, int out,
                    float *workspace);
size_t trainer_weight_workspace(int in, int out);

// ---------------------------------------------------------------------------------------------------------------------
// The tables

// GFLOP/s of FMAs, or of pairs' dot products, on a whole tile of sums in registers: best of ten runs.
static inline __attribute__((always_inline)) double peak_gflops(int pairs) {
    double best = 0;
    for (int run = 0; run < 10; run++) {
        const long count = 500000;
        float memory[ROWS * PANEL];
        for (int i = 0; i < ROWS * PANEL; i++) memory[i] = (float)i;
        __asm__ volatile("" : : "r"(memory) : "memory");  // the compiler may not know that sums could be shared
        const floats half = get(memory) + 0.5f, one = get(memory) + 1;
        Tile tile;
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) tile[i][v] = get(memory + i * PANEL + v * WIDE);
        double begin = cpu_seconds();
        for (long k = 0; k < count; k++) {
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) {
#ifdef __AVX512BF16__
                    if (pairs) tile[i][v] = dot_instruction(tile[i][v], (pairs_wide)half, (pairs_wide)one);
#endif
                    if (!pairs) tile[i][v] = tile[i][v] * half + one;
                }
        }
        double rate = 2e-9 * (1 + pairs) * (double)count * ROWS * PANEL / (cpu_seconds() - begin);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) put(memory + i * PANEL + v * WIDE, tile[i][v]);
        __asm__ volatile("" : : "r"(memory) : "memory");
        best = rate > best ? rate : best;
    }
    return best;
}

// out (columns, rows) = in (rows, columns)
static void transpose(float *out, const float *in, int rows, int columns) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) out[(size_t)j * rows + i] = in[(size_t)i * columns + j];
}

static int matmul_ladder(int rows, int inner, int columns, double peak, double peak_bf16, int quick) {
    const size_t size_a = (size_t)rows * inner, size_b = (size_t)inner * columns, size_c = (size_t)rows * columns;
    float *a = new_floats(size_a), *b = new_floats(size_b), *c = new_floats(size_c),
          *packed = new_floats(size_b + inner);
    float *b_transposed = new_floats(size_b);
    Pair *pairs = (Pair *)allocate(size_a * 2);
    double *expected = (double *)allocate(size_c * sizeof(double));
    char title[100];
    fill(a, size_a, 1), fill(b, size_b, 2);
    transpose(b_transposed, b, inner, columns);
    make_pairs(pairs, a, size_a / 2);
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < inner; k++)
            for (int j = 0; j < columns; j++)
                expected[(size_t)i * columns + j] += (double)a[(size_t)i * inner + k] * b[(size_t)k * columns + j];

    Ladder ladder = {c, expected, size_c, 2.0 * rows * inner * columns, peak, 0, 0, 0, quick};
    snprintf(title, sizeof title, "Matmul, (%d x %d) by (%d x %d)", rows, inner, inner, columns);
    print_head(title);
    RUNG(&ladder, "three loops", matmul_three_loops(c, a, b, rows, inner, columns));
    RUNG(&ladder, "along the rows of b", matmul_rows_of_b(c, a, b, rows, inner, columns));
    RUNG(&ladder, "a tile in registers", matmul_tiles(c, a, b, rows, inner, columns));
    RUNG(&ladder, "b packed in panels", matmul_packed(c, a, b, rows, inner, columns, packed));
    RUNG(&ladder, "blocks of rows", matmul_blocks(c, a, b, rows, inner, columns, packed));
    RUNG(&ladder, "`conv_forward()` of train_detr.c",
         trainer_matmul(c, a, b_transposed, rows, inner, columns, 0, packed));
    ladder.peak = peak_bf16;
    RUNG(&ladder, "bf16, widened by shifts", matmul_pairs_by_shifts(c, pairs, b, rows, inner, columns, (Pair *)packed));
#ifdef __AVX512BF16__
    RUNG(&ladder, "bf16, dot products of pairs",
         matmul_pairs_by_instruction(c, pairs, b, rows, inner, columns, (Pair *)packed));
#endif
    RUNG(&ladder, "`conv_forward()` on bf16", trainer_matmul(c, pairs, b_transposed, rows, inner, columns, 1, packed));
    free(a), free(b), free(c), free(packed), free(b_transposed), free(pairs), free(expected);
    return ladder.failed;
}

static int conv_ladder(int height, int width, int in, int out, double peak, int quick) {
    const size_t pixels = (size_t)height * width, size_x = pixels * in, size_y = pixels * out;
    const size_t inner = (size_t)9 * in, size_w = inner * out, squares = (size_t)16 * SQUARES * (in + PANEL);
    float *x = new_floats(size_x), *y = new_floats(size_y), *w = new_floats(size_w), *w_transposed = new_floats(size_w);
    float *bias = new_floats(out), *residual = new_floats(size_y), *zeros = new_floats(in), *dw = new_floats(size_w);
    float *patches = new_floats(pixels * inner), *packed = new_floats((size_t)16 * in * out + inner);
    const Conv conv = {height, width, in, out, x, w, bias, residual, y, zeros}, *v = &conv;
    float *room = new_floats(squares + (size_t)PIXELS * (weight_stride(v) + out));
    float *workspace = new_floats(trainer_weight_workspace(in, out));
    double *expected = (double *)allocate(size_y * sizeof(double));
    double *expected_dw = (double *)allocate(size_w * sizeof(double));
    double *expected_transposed = (double *)allocate(size_w * sizeof(double));
    char title[100];
    fill(x, size_x, 1), fill(w, size_w, 2), fill(bias, out, 3), fill(residual, size_y, 4);
    transpose(w_transposed, w, (int)inner, out);
    for (size_t m = 0; m < pixels; m++) {
        double *sum = expected + m * out;
        for (int n = 0; n < out; n++) sum[n] = (double)bias[n] + residual[m * out + n];
        for (size_t k = 0; k < inner; k++) {
            const double number = pixel(v, (int)m / width, (int)m % width, (int)(k / in))[k % in];
            for (int n = 0; n < out; n++) {
                sum[n] += number * w[k * out + n];
                expected_dw[k * out + n] += number * residual[m * out + n];  // residual plays dy as well
            }
        }
        for (int n = 0; n < out; n++) sum[n] = sum[n] < 0 ? 0 : sum[n];
    }
    for (size_t k = 0; k < inner; k++)
        for (int n = 0; n < out; n++) expected_transposed[n * inner + k] = expected_dw[k * out + n];

    const double flops = 2.0 * (double)pixels * (double)size_w;
    Ladder ladder = {y, expected, size_y, flops, peak, 0, 0, 0, quick};
    snprintf(title, sizeof title, "Convolution 3x3 with bias, residual and ReLU, %d to %d channels at %d x %d", in, out,
             height, width);
    print_head(title);
    RUNG(&ladder, "six loops", conv_loops(v));
    RUNG(&ladder, "along the rows of w", conv_rows_of_w(v));
    RUNG(&ladder, "im2col and the matmul", conv_im2col(v, patches, packed));
    RUNG(&ladder, "im2col by blocks", conv_im2col_blocks(v, patches, packed));
    RUNG(&ladder, "no im2col: the tile takes other rows", conv_implicit(v, packed));
    RUNG(&ladder, "bias, residual and ReLU in registers", conv_fused(v, packed));
    RUNG(&ladder, "`conv_forward()` of train_detr.c",
         trainer_conv(y, x, w_transposed, bias, residual, height, width, in, out, packed));
    RUNG(&ladder, "Winograd", conv_winograd(v, packed, room));

    Ladder weight = {dw, expected_dw, size_w, flops, peak, 0, 0, ladder.failed, quick};
    snprintf(title, sizeof title, "Backward weight of the same");
    print_head(title);
    RUNG(&weight, "pixel by pixel", weight_loops(dw, residual, v));
    RUNG(&weight, "blocks of pixels side by side", weight_blocks(dw, residual, v, room));
    weight.expected = expected_transposed;
    RUNG(&weight, "`conv_backward_weight()` of train_detr.c",
         trainer_weight(dw, x, residual, height, width, in, out, workspace));
    free(x), free(y), free(w), free(w_transposed), free(bias), free(residual), free(zeros), free(dw), free(patches);
    free(packed), free(room), free(workspace), free(expected), free(expected_dw), free(expected_transposed);
    return weight.failed;
}

int main(int argc, char **argv) {
    const int quick = argc == 2 && !strcmp(argv[1], "--quick");
    int failed = 0;
    if (argc > 1 && !quick) {
        fprintf(stderr, "usage: %s [--quick]\n", argv[0]);
        return 1;
    }
    const double peak = peak_gflops(0);
    double peak_bf16 = peak;  // widened numbers are multiplied as floats
#ifdef __AVX512BF16__
    peak_bf16 = peak_gflops(1);
#endif
    printf(
        "One thread, its own CPU time, best of up to 30 runs in half a second. Measured peak: %.1f GFLOP/s in float, "
        "%.1f in bf16, of which the bf16 rungs' percentages are.\n",
        peak, peak_bf16);
    if (quick) {
        failed += matmul_ladder(127, 64, 2 * PANEL, peak, peak_bf16, quick);
        failed += conv_ladder(11, 17, 32, 2 * PANEL, peak, quick);
    } else {
        failed += matmul_ladder(850, 2048, 2048, peak, peak_bf16, quick);
        failed += conv_ladder(100, 134, 128, 128, peak, quick);
        failed += conv_ladder(200, 267, 64, 64, peak, quick);
    }
    if (failed) fprintf(stderr, "%d rungs are wrong\n", failed);
    return failed > 0;
}
