/*
test_detr.cu: every kernel of train_detr.cu against the CPU's function, or against a plain loop where there is none; and
the network of all of them against the CPU's and against PyTorch's (dev/dump.h).

    make emu-check                          on dev/emu, which needs no GPU, plain and with its checker
    make test_detr_cu && ./test_detr_cu     on a GPU; SM=80 or newer
    make test_detr_emu; ./test_detr_emu NAME    only the tests whose names begin so

Where a kernel's arithmetic is the CPU's, its result must be the CPU's bits; that holds on the emulator, which fuses no
products, and different() allows for them on a GPU. Where sums are in another order, the bound stands beside the check:
it is derived, or it is four times the CPU's own error, the truth being computed in double. All tests but that of whole
programs run under several schedules of the emulator, with its checker under one, and each must give the same bytes.
The last line is "N passed, N failed"; the exit status is 1 when anything failed.
*/
#define TRAIN_DETR_NO_MAIN
#include "train_detr.cu"

#include "data/test_check.h"
#include "dev/cuda/reference.h"
#include "dev/dump.h"

static uint64_t all_bytes;  // fingerprint of all results so far

// In (-1, 1).
static float number(uint32_t site, uint64_t element) {
    return (float)(2 * random_uniform(7, RANDOM_TEST, site, 0, 0, element) - 1);
}

// An array in host and in device memory. What nobody wrote is NaN on the emulator's device.
template <class T>
struct Array {
    size_t count;
    T *host, *device;
    explicit Array(size_t count) : count(count), host((T *)allocate((count + 1) * sizeof(T))) {
        CUDA(cudaMalloc((void **)&device, (count + 1) * sizeof(T)));
    }
    Array(size_t count, uint32_t site) : Array(count) {  // random numbers
        for (size_t i = 0; i < count; i++) host[i] = to_type<T>(number(site, i));
        upload();
    }
    ~Array() {
        CUDA(cudaFree(device));
        free(host);
    }
    Array(const Array &) = delete;
    T &operator[](size_t i) { return host[i]; }
    void upload() { CUDA(cudaMemcpy(device, host, count * sizeof(T), cudaMemcpyHostToDevice)); }
    T *download() {
        CUDA(cudaMemcpy(host, device, count * sizeof(T), cudaMemcpyDeviceToHost));
        const unsigned char *bytes = (const unsigned char *)host;
        for (size_t i = 0; i < count * sizeof(T); i++) all_bytes = (all_bytes ^ bytes[i]) * 1099511628211u;
        return host;
    }
};

template <class T>
static const char *type_name() {
    return std::is_same<T, float>::value ? "float" : std::is_same<T, __half>::value ? "fp16" : "bf16";
}

// How many numbers of `ours`, rounded results, are not `expected` rounded to T. On a GPU, which fuses products, they
// may differ by four roundings of the largest one, and of T's last bit.
template <class T>
static int different(const T *ours, const float *expected, size_t count) {
    int wrong = 0;
    float largest = 0;  // for a GPU
    for (size_t i = 0; i < count; i++) largest = fmaxf(largest, isfinite(expected[i]) ? fabsf(expected[i]) : 0);
    for (size_t i = 0; i < count; i++) {
        const T wanted = to_type<T>(expected[i]);
        const float ours_i = to_float(ours[i]), wanted_i = to_float(wanted);
#ifdef CUDA_EMU
        const bool same = memcmp(ours + i, &wanted, sizeof wanted) == 0;
#else
        const float last_bit = std::is_same<T, float>::value    ? 0x1p-23f
                               : std::is_same<T, __half>::value ? 0x1p-10f
                                                                : 0x1p-7f;
        const bool same =
            ours_i == wanted_i || fabsf(ours_i - wanted_i) <= last_bit * fabsf(wanted_i) + 0x1p-22f * largest;
#endif
        wrong += !same && !(isnan(ours_i) && isnan(wanted_i));
    }
    return wrong;
}

// Counts how far `ours` and the CPU's result are from the truth, in the norm of the whole array: ours may be four times
// as far, but never has to be nearer than the rounding of the last bit.
static void check_error(const float *ours, const float *cpu, const double *truth, size_t count, const char *name,
                        int rows, int C) {
    double our_error = 0, cpu_error = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        our_error += (ours[i] - truth[i]) * (ours[i] - truth[i]);
        cpu_error += (cpu[i] - truth[i]) * (cpu[i] - truth[i]);
        norm += truth[i] * truth[i];
    }
    const double bound = 4 * fmax(sqrt(cpu_error), 0x1p-24 * sqrt(norm));
    check(sqrt(our_error) <= bound, "%s of %dx%d: error %.3g, may be %.3g", name, rows, C, sqrt(our_error), bound);
}

// ---------------------------------------------------------------------------------------------------------------------
// Ragged batches

// Images as they come from the loader: of any size, and the third could not be read.
static const Segment PICTURES[] = {{0, 7, 10, 0}, {0, 1, 1, 1}, {0, 12, 9, 3}, {0, 5, 16, 4}};
enum { NUM_PICTURES = 4 };

struct RaggedTable {
    Array<Segment> table;
    Ragged map;
    RaggedTable(const Segment *from, int count, const ConvShape *shape) : table((size_t)count) {
        map.count = count, map.rows = ragged_segments(table.host, from, count, shape), map.segments = table.device;
        table.upload();
    }
};

static void test_ragged() {
    const ConvShape stem = {3, 8, 7, 2, 3, 1};
    Segment after[NUM_PICTURES], huge[2] = {{0, 40000, 40000, 0}, {0, 40000, 40000, 1}};
    const int rows = ragged_segments(after, PICTURES, NUM_PICTURES, &stem);
    check(rows == 4 * 5 + 1 + 6 * 5 + 3 * 8, "the stem makes %d rows", rows);
    check(after[2].first == 21 && after[2].height == 6 && after[2].width == 5 && after[2].image == 3,
          "the third picture's segment behind the stem");
    check(ragged_segments(huge, huge, 2, NULL) == -1, "more rows than an int can count are refused");
    RaggedTable batch(PICTURES, NUM_PICTURES, NULL);
    check(batch.map.rows == 70 + 1 + 108 + 80 && batch.table[3].first == 179, "segments lie side by side");
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

template <class T>
static void test_round_to() {
    const float special[8] = {0, -0.0f, 1, -1.00390625f, 65504, INFINITY, -INFINITY, NAN};
    Array<float> x(2048 + 8, 1);
    for (int i = 0; i < 8; i++) x[(size_t)i] = special[i];
    x.upload();
    Array<T> y(x.count);
    gpu_round(y.device, x.device, x.count);
    check(different(y.download(), x.host, x.count) == 0, "rounding to %s", type_name<T>());
}

template <class T>
static void test_sums_of(int rows, int C) {
    Array<T> x((size_t)rows * (size_t)C, 2);
    Array<float> sums((size_t)C, 3), before((size_t)C, 3), partials(divide_up((size_t)rows, CHUNK_ROWS) * (size_t)C);
    gpu_column_sums(sums.device, partials.device, x.device, rows, C);
    sums.download();
    int wrong = 0;
    for (int c = 0; c < C; c++) {
        double sum = before[(size_t)c], magnitude = fabs(sum);
        for (int row = 0; row < rows; row++) {
            const double value = to_float(x[(size_t)row * (size_t)C + (size_t)c]);
            sum += value, magnitude += fabs(value);
        }
        // A warp adds 8 rows, then 8 warps are added: 14 roundings; one to a float, one in the addition to what is
        // there.
        wrong += !(fabs(sums[(size_t)c] - sum) <= 16 * 0x1p-24 * magnitude);
    }
    check(wrong == 0, "column sums of %s, %dx%d: %d are wrong", type_name<T>(), rows, C, wrong);
}

template <class T>
static void test_rows_of() {
    test_round_to<T>();
    test_sums_of<T>(1, 8);
    test_sums_of<T>(63, 264);
    test_sums_of<T>(700, 40);
    test_sums_of<T>(70, 5);
    test_sums_of<T>(3, 261);
}

static void test_rows() {
    test_rows_of<float>();
    test_rows_of<__nv_bfloat16>();
    test_rows_of<__half>();
}

// ---------------------------------------------------------------------------------------------------------------------
// Feed, pictures

__global__ static void __launch_bounds__(THREADS) double_kernel(int *y, const int *x) {
    y[threadIdx.x] = 2 * x[threadIdx.x];
}

// Seven batches, none of which the host waits for.
static void test_feed() {
    enum { BATCHES = 7 };
    Array<int> y(BATCHES * THREADS);
    Feed feed;
    const int *before = NULL;
    feed_create(&feed, (3 + THREADS) * sizeof(int) + 128 - THREADS * sizeof(int) % 64);
    for (int batch = 0; batch < BATCHES; batch++) {
        const int *little, *x;
        feed_begin(&feed);
        feed_take(&feed, 3, &little)[0] = batch;
        int *host = feed_take(&feed, THREADS, &x);
        for (int i = 0; i < THREADS; i++) host[i] = THREADS * batch + i;
        feed_send(&feed);
        double_kernel<<<1, THREADS, 0, stream>>>(y.device + THREADS * batch, x);
        feed_end(&feed);
        check((uintptr_t)x % 64 == 0 && (const char *)x - (const char *)little == 64, "what is taken lies on 64 bytes");
        check(x != before, "batch %d lies where the one before is read", batch);
        before = x;
    }
    y.download();
    int wrong = 0;
    for (int i = 0; i < BATCHES * THREADS; i++) wrong += y[(size_t)i] != 2 * i;
    check(wrong == 0, "%d numbers of batches on their way are wrong", wrong);
    feed_free(&feed);
}

// Sizes and what is to be done, of each kind: larger, smaller, along y first, one direction alone, none; mirrored all
// ways; cropped; two resizes.
static const struct {
    int width, height;
    ImageChange change;
} CHANGES[] = {
    {40, 30, {0, 0, 0, 1, {{53, 41, 0, 0, 53, 41}}}},
    {61, 47, {1, 0, 0, 1, {{20, 15, 0, 0, 20, 15}}}},
    {30, 64, {0, 1, 0, 1, {{25, 31, 0, 0, 25, 31}}}},
    {50, 37, {1, 1, 1, 2, {{30, 41, 4, 7, 19, 25}, {33, 43, 0, 0, 33, 43}}}},
    {1, 1, {0, 0, 1, 1, {{3, 5, 0, 0, 3, 5}}}},
    {33, 20, {0, 0, 0, 0, {}}},
    {45, 52, {0, 0, 1, 2, {{37, 19, 9, 3, 21, 15}, {30, 22, 0, 0, 30, 22}}}},
    {57, 60, {1, 0, 1, 2, {{50, 22, 11, 3, 33, 17}, {17, 9, 0, 0, 17, 9}}}},
    {17, 19, {0, 1, 1, 1, {{19, 30, 2, 4, 16, 20}}}},
    {17, 40, {1, 1, 0, 1, {{17, 10, 3, 2, 9, 5}}}},
    {22, 11, {1, 0, 1, 1, {{11, 22, 4, 5, 6, 16}}}},
};
enum { NUM_CHANGES = sizeof CHANGES / sizeof CHANGES[0], CHANGE_SIDE = 64 };

template <class T>
static void test_pictures_to() {
    enum { BATCHES = 4, COUNT = 5 };  // a batch's samples, of which one has no picture
    static const int places[COUNT - 1] = {0, 1, 3, 4};
    Feed feed;
    Pictures pictures;
    Arena arena;
    memset(&arena, 0, sizeof arena);
    const size_t most = (size_t)COUNT * CHANGE_SIDE * CHANGE_SIDE * 3;
    for (int turn = 0; turn < 2; turn++) {
        pictures_walk(&pictures, &arena, COUNT, CHANGE_SIDE, 100);
        if (turn == 0) device_arena_allocate(&arena);
    }
    feed_create(&feed, pictures_bytes(COUNT, CHANGE_SIDE, 100));
    Array<float> table(3 * 256);
    Array<T> y(BATCHES * most);
    pixel_table(table.host);
    table.upload();
    float *expected = (float *)allocate(BATCHES * most * sizeof(float));
    size_t counts[BATCHES] = {};
    for (int batch = 0; batch < BATCHES; batch++) {
        Sample samples[COUNT];
        memset((void *)samples, 0, sizeof samples);
        for (int i = 0; i < COUNT; i++) {
            const int which = (3 * batch + i) % NUM_CHANGES;
            if (i == 2) continue;
            Image image = image_new(CHANGES[which].width, CHANGES[which].height);
            const size_t bytes = 3 * (size_t)image.width * (size_t)image.height;
            for (size_t k = 0; k < bytes; k++)
                image.pixels[k] = (unsigned char)random_word(7, RANDOM_TEST, 70, (uint32_t)which, 0, k);
            for (size_t k = 0; k < bytes / 2; k++)  // half of it black or white: sums that reach both ends
                image.pixels[k] = image.pixels[k] < 128 ? 0 : 255;
            samples[i].image = image_new(image.width, image.height), samples[i].change = CHANGES[which].change;
            memcpy(samples[i].image.pixels, image.pixels, bytes);
            image_change(&image, &CHANGES[which].change);
            normalise_pixels(expected + (size_t)batch * most + counts[batch], &image, 0);
            counts[batch] += 3 * (size_t)image.width * (size_t)image.height;
            image_free(&image);
        }
        feed_begin(&feed);
        feed_pictures(&feed, &pictures, samples, places, COUNT - 1);
        feed_send(&feed);
        gpu_pictures(y.device + (size_t)batch * most, &pictures, table.device);
        feed_end(&feed);
        for (int i = 0; i < COUNT; i++) image_free(&samples[i].image);
    }
    for (int batch = 0; batch < BATCHES; batch++) {
        Array<T> ours(counts[batch]);
        CUDA(
            cudaMemcpy(ours.device, y.device + (size_t)batch * most, ours.count * sizeof(T), cudaMemcpyDeviceToDevice));
        const int wrong = different(ours.download(), expected + (size_t)batch * most, ours.count);
        check(wrong == 0, "pictures to %s, batch %d: %d of %zu numbers are not the CPU's", type_name<T>(), batch, wrong,
              ours.count);
    }
    free(expected);
    feed_free(&feed);
    CUDA(cudaFree(arena.base));
}

static void test_pictures() {
    test_pictures_to<float>();
    test_pictures_to<__nv_bfloat16>();
    test_pictures_to<__half>();

    // The largest tables fit in what is planned: two resizes that take one pixel away, in both directions.
    Sample sample;
    const int place = 0;
    Feed feed;
    Pictures pictures;
    memset((void *)&sample, 0, sizeof sample), memset(&pictures, 0, sizeof pictures);
    sample.image = image_new(CHANGE_SIDE, CHANGE_SIDE);
    sample.change = {0, 0, 0, 2, {{63, 63, 0, 0, 63, 63}, {62, 62, 0, 0, 62, 62}}};
    feed_create(&feed, pictures_bytes(1, CHANGE_SIDE, 0));
    feed_begin(&feed);
    feed_pictures(&feed, &pictures, &sample, &place, 1);
    check(feed.host[feed.turn].used <= feed.host[feed.turn].capacity, "the largest tables fit");
    feed_free(&feed);
    image_free(&sample.image);

    // A long white line stays white, as on the CPU, though its weights' sum passes 1 by half a percent.
    enum { LONG = 798937 };
    Array<float> table(3 * 256), y(3);
    Array<uint32_t> scratch(1);
    pixel_table(table.host);
    table.upload();
    sample.image = image_new(LONG, 1);
    memset(sample.image.pixels, 255, 3 * LONG);
    sample.change = {0, 0, 0, 1, {{1, 1, 0, 0, 1, 1}, {}}};
    pictures.scratch[0] = scratch.device;
    feed_create(&feed, 3 * LONG + 3 * LONG * sizeof(int));
    feed_begin(&feed);
    feed_pictures(&feed, &pictures, &sample, &place, 1);
    feed_send(&feed);
    gpu_pictures(y.device, &pictures, table.device);
    feed_end(&feed);
    y.download();
    check(y[0] == table[255] && y[1] == table[511] && y[2] == table[767], "a long white line is %g %g %g", y[0], y[1],
          y[2]);
    feed_free(&feed);
    image_free(&sample.image);

    const auto before = engine;
    const int without = defer_side(1500, 800, 1333);
    engine.is_gpu = 1;
    const int small = defer_side(1500, 800, 1333), large = defer_side(1500, 800, 3000),
              most = defer_side(9000, 800, 1333);
    check(without == 0 && small == 1500 && large == 3000 && most == MOST_DEFERRED_SIDE,
          "deferred up to sides of %d, %d, %d, without a GPU %d", small, large, most, without);
    engine = before;
}

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue, max pooling

template <class T>
static void test_epilogue_of() {
    const int rows = 37, C = 72;
    const size_t count = (size_t)(rows * C);
    Array<float> sums(count, 5), bias((size_t)C, 6);
    Array<T> add(count, 7), mask(count, 8), y(count);
    mask[3] = mask[100] = to_type<T>(0);
    sums[7] = NAN, sums[8] = -INFINITY;
    sums.upload(), mask.upload();
    for (int parts = 0; parts < 16; parts++) {
        const Epilogue epilogue = {parts & 1 ? bias.device : NULL, parts & 2 ? add.device : NULL, parts & 4,
                                   parts & 8 ? mask.device : NULL, 0};
        float *expected = (float *)allocate(count * sizeof(float));
        for (size_t i = 0; i < count; i++) {
            float value = sums[i];
            if (parts & 1) value += bias[i % (size_t)C];
            if (parts & 2) value += to_float(add[i]);
            if (parts & 4 && value < 0) value = 0;
            if (parts & 8 && !(to_float(mask[i]) > 0)) value = 0;
            expected[i] = value;
        }
        gpu_finish(y.device, sums.device, epilogue, rows, C);
        check(different(y.download(), expected, count) == 0, "epilogue %d in %s", parts, type_name<T>());
        free(expected);
    }
}

static void test_epilogue() {
    test_epilogue_of<float>();
    test_epilogue_of<__nv_bfloat16>();
    test_epilogue_of<__half>();
}

template <class T>
static void test_maxpool_of(int C) {
    RaggedTable in(PICTURES, NUM_PICTURES, NULL), out(PICTURES, NUM_PICTURES, &POOLING);
    const size_t n = (size_t)(in.map.rows * C), m = (size_t)(out.map.rows * C);
    Array<T> x(n), y(m), dy(m, 10), dx(n);
    Array<unsigned char> argmax(m);
    float *plain = (float *)allocate((2 * n + 2 * m) * sizeof(float)), *plain_dx = plain + n, *plain_y = plain_dx + n,
          *plain_dy = plain_y + m;
    unsigned char *plain_argmax = (unsigned char *)allocate(m);
    for (size_t i = 0; i < n; i++)  // few values: ties everywhere
        x[i] = to_type<T>((float)((int)random_below(1, RANDOM_TEST, 9, 0, 0, i, 4) - 5));
    x[(size_t)(13 * C)] = to_type<T>(NAN), x[(size_t)(90 * C + 1)] = to_type<T>(-INFINITY);
    x.upload();
    for (size_t i = 0; i < n; i++) plain[i] = to_float(x[i]);
    for (size_t i = 0; i < m; i++) plain_dy[i] = to_float(dy[i]);
    for (int i = 0; i < NUM_PICTURES; i++) {
        const Segment *from = &in.table[(size_t)i];
        const size_t at = (size_t)(from->first * C), to = (size_t)(out.table[(size_t)i].first * C);
        maxpool_forward(plain_y + to, plain_argmax + to, plain + at, from->height, from->width, C, 0);
        maxpool_backward(plain_dx + at, plain_dy + to, plain_argmax + to, from->height, from->width, C, 0);
    }
    gpu_maxpool_forward(y.device, argmax.device, x.device, out.map, in.map, C);
    gpu_maxpool_backward(dx.device, dy.device, argmax.device, out.map, in.map, C);
    check(different(y.download(), plain_y, m) == 0, "maxpool of %s, %d channels: y", type_name<T>(), C);
    check(memcmp(argmax.download(), plain_argmax, m) == 0, "maxpool of %s, %d channels: argmax", type_name<T>(), C);
    check(different(dx.download(), plain_dx, n) == 0, "maxpool of %s, %d channels: dx", type_name<T>(), C);
    free(plain);
    free(plain_argmax);
}

static void test_maxpool() {
    test_maxpool_of<float>(8);
    test_maxpool_of<float>(64);
    test_maxpool_of<__nv_bfloat16>(24);
    test_maxpool_of<__half>(24);
}

// ---------------------------------------------------------------------------------------------------------------------
// Linear layers, convolutions

// Adds the products of one image's convolution in double, and the sum of their magnitudes behind each result; all of x
// (height * width, in), w (out, kernel, kernel, in), dy (output pixels, out).
struct ConvTruth {
    double *y, *dx, *dw, *y_size, *dx_size, *dw_size;
};

static void plain_conv(ConvTruth t, const float *x, const float *w, const float *dy, int height, int width,
                       ConvShape s) {
    const int out_height = conv_size(height, s), out_width = conv_size(width, s);
    for (int i = 0; i < out_height * out_width * s.kernel * s.kernel; i++) {
        const int pixel = i / (s.kernel * s.kernel), tap = i % (s.kernel * s.kernel);
        const int iy = pixel / out_width * s.stride + tap / s.kernel * s.dilation - s.padding;
        const int ix = pixel % out_width * s.stride + tap % s.kernel * s.dilation - s.padding;
        if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
        for (int n = 0; n < s.out_channels; n++) {
            const size_t to = (size_t)(pixel * s.out_channels + n), from = (size_t)(iy * width + ix) * s.in_channels;
            const size_t weight = (size_t)(n * s.kernel * s.kernel + tap) * s.in_channels;
            for (size_t c = 0; c < (size_t)s.in_channels; c++) {
                const double a = x[from + c], b = w[weight + c], g = dy[to];
                t.y[to] += a * b, t.y_size[to] += fabs(a * b);
                t.dx[from + c] += g * b, t.dx_size[from + c] += fabs(g * b);
                t.dw[weight + c] += g * a, t.dw_size[weight + c] += fabs(g * a);
            }
        }
    }
}

// A convolution with all that stands around it, of random numbers: what goes in, and what must come out. Operands are
// T, results Y (but dw, which is float).
template <class T, class Y>
struct ConvCase {
    ConvShape s;
    RaggedTable in, out;
    size_t nx, ny, nw;
    Array<T> x, w, dy;
    Array<Y> bias, add, dadd, mask, y, dx;
    Array<float> dw, plain_bias;  // plain_bias: what linear layers have as Y
    double *memory;
    float *cpu;
    ConvTruth truth;

    ConvCase(ConvShape s, const Segment *pictures, int count)
        : s(s),
          in(pictures, count, NULL),
          out(pictures, count, &s),
          nx((size_t)(in.map.rows * s.in_channels)),
          ny((size_t)(out.map.rows * s.out_channels)),
          nw(patch_size(s) * (size_t)s.out_channels),
          x(nx, 40),
          w(nw, 41),
          dy(ny, 42),
          bias((size_t)s.out_channels, 43),
          add(ny, 44),
          dadd(nx, 45),
          mask(nx, 46),
          y(ny),
          dx(nx),
          dw(nw, 47),
          plain_bias((size_t)s.out_channels) {
        const size_t all = nx + ny + nw;
        for (size_t i = 0; i < bias.count; i++) plain_bias[i] = to_float(bias[i]);
        plain_bias.upload();
        memory = (double *)allocate(2 * all * sizeof(double));
        truth = {memory, memory + ny, memory + ny + nx, memory + all, memory + all + ny, memory + all + ny + nx};
        cpu = (float *)allocate(2 * all * sizeof(float));
        float *plain_x = cpu + all, *plain_w = plain_x + nx, *plain_dy = plain_w + nw;
        for (size_t i = 0; i < nx; i++) plain_x[i] = to_float(x[i]);
        for (size_t i = 0; i < nw; i++) plain_w[i] = to_float(w[i]);
        for (size_t i = 0; i < ny; i++) plain_dy[i] = to_float(dy[i]);
        for (int i = 0; i < count; i++) {
            const size_t from = (size_t)(in.table[(size_t)i].first * s.in_channels),
                         to = (size_t)(out.table[(size_t)i].first * s.out_channels);
            plain_conv(
                {truth.y + to, truth.dx + from, truth.dw, truth.y_size + to, truth.dx_size + from, truth.dw_size},
                plain_x + from, plain_w, plain_dy + to, pictures[i].height, pictures[i].width, s);
        }
        for (size_t i = 0; i < ny; i++) {
            const double b = to_float(bias[i % (size_t)s.out_channels]), a = to_float(add[i]);
            truth.y[i] = fmax(truth.y[i] + b + a, 0), truth.y_size[i] += fabs(b) + fabs(a);
        }
        for (size_t i = 0; i < nx; i++) {
            truth.dx[i] += to_float(dadd[i]), truth.dx_size[i] += fabs(to_float(dadd[i]));
            if (!(to_float(mask[i]) > 0)) truth.dx[i] = 0;
        }
        for (size_t i = 0; i < nw; i++) truth.dw[i] += dw[i], truth.dw_size[i] += fabs(dw[i]);
        if (std::is_same<T, float>::value) cpu_results(plain_x, plain_w, plain_dy, pictures, count);
    }
    ~ConvCase() {
        free(memory);
        free(cpu);
    }

    void cpu_results(const float *plain_x, const float *plain_w, const float *plain_dy, const Segment *pictures,
                     int count) {
        const size_t sizes[3] = {packed_size(s, 0), packed_backward_size(s, 0), conv_backward_weight_workspace(s, 1)};
        float *buffers[3];
        for (int i = 0; i < 3; i++) {
            buffers[i] = (float *)aligned_alloc(64, round_up(sizes[i] * sizeof(float), 64));
            memset(buffers[i], 0, sizes[i] * sizeof(float));
        }
        pack_weights(buffers[0], buffers[1], plain_w, NULL, s, 0);
        memcpy(cpu + ny + nx, dw.host, nw * sizeof(float));
        for (int i = 0; i < count; i++) {
            const size_t from = (size_t)(in.table[(size_t)i].first * s.in_channels),
                         to = (size_t)(out.table[(size_t)i].first * s.out_channels);
            const int height = pictures[i].height, width = pictures[i].width;
            const Epilogue forward = {plain_bias.host, (Y *)add.host + to, 1, NULL, 0};
            const Epilogue backward = {NULL, (Y *)dadd.host + from, 0, (Y *)mask.host + from, 0};
            conv_forward(cpu + to, plain_x + from, height, width, buffers[0], forward, s, 0);
            conv_backward_data(cpu + ny + from, plain_dy + to, height, width, buffers[1], backward, s, 0);
            conv_backward_weight(cpu + ny + nx, NULL, 1, plain_x + from, plain_dy + to, height, width, s, 0,
                                 buffers[2]);
        }
        for (int i = 0; i < 3; i++) free(buffers[i]);
    }

    // Tensor cores may cut off what does not fit, so each of `terms` additions is wrong by 2^-23 of the magnitudes at
    // most; then the result is rounded to R.
    template <class R>
    void check_result(const R *ours, const double *expected, const double *size, const float *of_cpu, size_t count,
                      int terms, const char *name) {
        const int rows = in.map.rows, kernel = s.kernel;
        if (std::is_same<T, float>::value && !allow_tf32) {
            check_error((const float *)(const void *)ours, of_cpu, expected, count, name, rows, s.in_channels);
            return;
        }
        const double unit = std::is_same<R, float>::value ? 0x1p-24 : std::is_same<R, __half>::value ? 0x1p-11 : 0x1p-8;
        // TF32 has 10 bits behind the point: each operand is wrong by 2^-11, by 2^-10 if it is cut off.
        const double operands = std::is_same<T, float>::value ? 0x1p-9 : 0;
        int wrong = 0, rounded = 0;
        for (size_t i = 0; i < count; i++) {
            const double error = fabs(to_float(ours[i]) - expected[i]);
            wrong += !(error <= unit * fabs(expected[i]) + ((terms + 4) * 0x1p-23 + operands) * size[i] + 0x1p-25);
            rounded += error > 0x1p-16 * size[i];
        }
        check(operands == 0 || rounded > 0, "%s: floats are multiplied as TF32 where that is allowed", name);
        check(wrong == 0, "%s in %s, %d to %d channels, kernel %d, stride %d, dilation %d: %d of %zu are wrong", name,
              type_name<T>(), s.in_channels, s.out_channels, kernel, s.stride, s.dilation, wrong, count);
    }
    void check_forward() { check_result(y.download(), truth.y, truth.y_size, cpu, ny, (int)patch_size(s), "y"); }
    void check_backward_data() {
        const int terms = s.kernel * s.kernel * s.out_channels;
        check_result(dx.download(), truth.dx, truth.dx_size, cpu + ny, nx, terms, "dx");
    }
    void check_backward_weight() {
        check_result(dw.download(), truth.dw, truth.dw_size, cpu + ny + nx, nw, out.map.rows, "dw");
    }
};

#ifdef HAVE_CUBLASLT
template <class T, class Y>
static void test_linear_of(int rows, int in, int out) {
    const Segment all = {0, rows, 1, 0};
    ConvCase<T, Y> c({in, out, 1, 1, 0, 1}, &all, 1);
    Array<unsigned char> workspace(64);
    linear_create(workspace.device, 64);
    gpu_linear_forward(c.y.device, c.x.device, c.w.device, c.bias.device, c.add.device, true, rows, in, out);
    gpu_linear_backward_data(c.dx.device, c.dy.device, c.w.device, c.dadd.device, c.mask.device, rows, in, out);
    gpu_linear_backward_weight(c.dw.device, c.x.device, c.dy.device, rows, in, out);
    c.check_forward();
    c.check_backward_data();
    c.check_backward_weight();
    const int count = linear.count, buckets[4] = {65, 128, 129, 200};
    if (rows >= 200) {  // in two buckets, of which the second is that of all rows
        for (int few : buckets) gpu_linear_backward_weight(c.dw.device, c.x.device, c.dy.device, few, in, out);
        check(count == 3 && linear.count == count + 1, "of 4 numbers of rows %d are new", linear.count - count);
    }
    gpu_linear_forward<T, Y>(c.y.device, c.x.device, c.w.device, NULL, NULL, false, rows, in, out);  // nothing around
    gpu_linear_backward_data<T, Y>(c.dx.device, c.dy.device, c.w.device, NULL, NULL, rows, in, out);
    c.y.download(), c.dx.download();
    double y = 0, dx = 0;
    for (int k = 0; k < in; k++) y += (double)to_float(c.x[(size_t)k]) * (double)to_float(c.w[(size_t)k]);
    for (int n = 0; n < out; n++) dx += (double)to_float(c.dy[(size_t)n]) * (double)to_float(c.w[(size_t)(n * in)]);
    check(fabs(to_float(c.y[0]) - y) <= 0.01 * (1 + fabs(y)) && fabs(to_float(c.dx[0]) - dx) <= 0.01 * (1 + fabs(dx)),
          "linear layer with nothing around it: %g, %g instead of %g, %g", to_float(c.y[0]), to_float(c.dx[0]), y, dx);
    linear_free();
}

static void test_linear() {
    test_linear_of<float, float>(37, 40, 24);
    allow_tf32 = true;
    test_linear_of<float, float>(37, 40, 24);
    test_linear_of<__nv_bfloat16, __nv_bfloat16>(9, 16, 24);  // for which it is nothing
    allow_tf32 = false;
    test_linear_of<__nv_bfloat16, __nv_bfloat16>(250, 32, 72);
    test_linear_of<__nv_bfloat16, float>(9, 72, 5);  // five classes
    test_linear_of<__half, __half>(1, 8, 264);
    test_linear_of<__half, float>(130, 64, 8);
}
#endif

// Ours of these pictures alone, pixel by pixel the same bytes as in company?
template <class T>
static void check_alone(ConvCase<T, T> *c, const Segment *pictures, int count) {
    int wrong = 0;
    for (int i = 0; i < count; i++) {
        RaggedTable in(pictures + i, 1, NULL), out(pictures + i, 1, &c->s);
        const size_t from = (size_t)(c->in.table[(size_t)i].first * c->s.in_channels),
                     to = (size_t)(c->out.table[(size_t)i].first * c->s.out_channels);
        Array<T> y((size_t)(out.map.rows * c->s.out_channels)), dx((size_t)(in.map.rows * c->s.in_channels));
        const Epilogue forward = {c->plain_bias.device, c->add.device + to, 1, NULL, 0};
        const Epilogue backward = {NULL, c->dadd.device + from, 0, c->mask.device + from, 0};
        gpu_conv_forward(y.device, c->x.device + from, c->w.device, forward, out.map, in.map, c->s);
        wrong += memcmp(y.download(), c->y.host + to, y.count * sizeof(T)) != 0;
        if (c->s.in_channels % 8 != 0) continue;
        gpu_conv_backward_data(dx.device, c->dy.device + to, c->w.device, backward, out.map, in.map, c->s);
        wrong += memcmp(dx.download(), c->dx.host + from, dx.count * sizeof(T)) != 0;
    }
    check(wrong == 0, "%s, kernel %d: %d results are others where a picture is alone", type_name<T>(), c->s.kernel,
          wrong);
}

template <class T>
static void test_conv_of(ConvShape s, const Segment *pictures, int count) {
    s.padding = s.dilation * (s.kernel - 1) / 2;
    ConvCase<T, T> c(s, pictures, count);
    Array<float> partials(conv_partials(s, c.out.map.rows));
    const Epilogue forward = {c.plain_bias.device, c.add.device, 1, NULL, 0};
    const Epilogue backward = {NULL, c.dadd.device, 0, c.mask.device, 0};
    gpu_conv_forward(c.y.device, c.x.device, c.w.device, forward, c.out.map, c.in.map, s);
    if (s.in_channels % 8 == 0)
        gpu_conv_backward_data(c.dx.device, c.dy.device, c.w.device, backward, c.out.map, c.in.map, s);
    gpu_conv_backward_weight(c.dw.device, partials.device, c.x.device, c.dy.device, c.out.map, c.in.map, s);
    c.check_forward();
    if (s.in_channels % 8 == 0) c.check_backward_data();
    c.check_backward_weight();
    if (count > 1) check_alone(&c, pictures, count);
}

static const Segment LARGE[] = {{0, 33, 41, 0}};  // its pixels are divided into parts

template <class T>
static void test_conv_type() {
    test_conv_of<T>({64, 64, 3, 1, 0, 1}, PICTURES, NUM_PICTURES);
    test_conv_of<T>({3, 64, 7, 2, 0, 1}, PICTURES, NUM_PICTURES);  // the stem
    test_conv_of<T>({16, 72, 3, 2, 0, 1}, PICTURES, NUM_PICTURES);
    test_conv_of<T>({72, 16, 3, 1, 0, 2}, PICTURES, NUM_PICTURES);
    test_conv_of<T>({24, 136, 1, 2, 0, 1}, PICTURES, NUM_PICTURES);
    test_conv_of<T>({8, 8, 3, 1, 0, 1}, LARGE, 1);
}

static void test_conv() {
    test_conv_type<float>();
    allow_tf32 = true;
    test_conv_of<float>({3, 64, 7, 2, 0, 1}, PICTURES, NUM_PICTURES);
    test_conv_of<float>({16, 72, 3, 2, 0, 1}, PICTURES, NUM_PICTURES);
    allow_tf32 = false;
    test_conv_type<__nv_bfloat16>();
    test_conv_of<__half>({136, 8, 1, 1, 0, 1}, PICTURES, 1);
    test_conv_of<__half>({40, 72, 3, 2, 0, 1}, PICTURES, NUM_PICTURES);
}

// ---------------------------------------------------------------------------------------------------------------------
// Positions, dropout

template <class T>
static void test_positions_of(int C) {
    enum { PLACES = 16 };  // the widest picture
    RaggedTable batch(PICTURES, NUM_PICTURES, NULL);
    const size_t count = (size_t)(batch.map.rows * C);
    Array<float> x(count, 11), table(position_table_rows(PLACES) * (size_t)C / 2);
    Array<T> y(count);
    float *expected = (float *)allocate(count * sizeof(float));
    position_table(table.host, PLACES, C / 2);
    table.upload();
    for (int i = 0; i < NUM_PICTURES; i++)
        sine_positions(expected + batch.table[(size_t)i].first * C, PICTURES[i].height, PICTURES[i].width, C);
    for (size_t i = 0; i < count; i++) expected[i] = x[i] + expected[i];
    gpu_add_positions(y.device, x.device, table.device, batch.map, C);
    check(different(y.download(), expected, count) == 0, "positions to %s, %d channels", type_name<T>(), C);
    free(expected);

    const int images = 3, Q = 5;
    const size_t period = (size_t)(Q * C), queries = 3 * period;
    Array<float> target(queries, 12), embeddings(period, 13), dembeddings(period, 14), dquery(queries, 15);
    Array<T> query(queries);
    float *sum = (float *)allocate(queries * sizeof(float));
    for (size_t i = 0; i < queries; i++) sum[i] = target[i] + embeddings[i % period];
    gpu_add_queries(query.device, target.device, embeddings.device, images, Q, C);
    check(different(query.download(), sum, queries) == 0, "query positions to %s, %d channels", type_name<T>(), C);
    for (size_t i = 0; i < period; i++)
        sum[i] = dembeddings[i] + dquery[i] + dquery[i + period] + dquery[i + 2 * period];
    gpu_add_queries_backward(dembeddings.device, dquery.device, images, Q, C);
    check(different(dembeddings.download(), sum, period) == 0, "gradient of query positions, %d channels", C);
    free(sum);
}

// The angle in half turns is rounded once and its period once, each by 2^-24 of it; then the sine, which is off by two
// roundings, while the CPU's is rounded once.
static void test_box_features() {
    const int count = 20, values = 37;
    Array<float> boxes(values, 36), periods(count / 2), features((size_t)(values * count));
    for (size_t i = 0; i < values; i++) boxes[i] = i ? fabsf(boxes[i]) : 1;
    boxes.upload();
    box_periods(periods.host, count);
    periods.upload();
    gpu_box_features(features.device, boxes.device, periods.device, (size_t)values, count);
    features.download();
    int wrong = 0;
    for (int v = 0; v < values; v++) {
        float expected[count];
        sine_features(expected, count, 2 * 3.14159265358979323846 * (double)boxes[(size_t)v]);
        for (int i = 0; i < count; i++)
            wrong += !(fabsf(features[(size_t)(v * count + i)] - expected[i]) <=
                       0x1p-24f * (2 * 6.2832f * boxes[(size_t)v] / periods[(size_t)i / 2] + 3));
    }
    check(wrong == 0, "%d box features are wrong", wrong);
}

static void test_sigmoid() {
    Array<float> x(1001, 37), y(1001);
    float *expected = (float *)allocate(x.count * sizeof(float));
    for (size_t i = 0; i < x.count; i++) x[i] *= 20;
    x.upload();
    sigmoid(expected, x.host, x.count);
    gpu_sigmoid(y.device, x.device, x.count);
    check(different(y.download(), expected, x.count) == 0, "sigmoid");
    free(expected);
}

static void test_positions() {
    test_positions_of<float>(8);
    test_positions_of<float>(40);
    test_positions_of<__nv_bfloat16>(256);
    test_positions_of<__half>(24);
    test_box_features();
    test_sigmoid();
}

static Dropout a_dropout(double p) {
    Dropout dropout;
    memset(&dropout, 0, sizeof dropout);
    dropout.p = p, dropout.seed = 0xFEDCBA9876543210ull, dropout.site = 9, dropout.step = 1000;
    return dropout;
}

template <class T>
static void test_dropout_of(double p, int C) {
    RaggedTable batch(PICTURES, NUM_PICTURES, NULL);
    const size_t count = (size_t)(batch.map.rows * C);
    Array<T> x(count, 16), y(count);
    float *plain = (float *)allocate(count * sizeof(float));
    for (size_t i = 0; i < count; i++) plain[i] = to_float(x[i]);
    for (int i = 0; i < NUM_PICTURES; i++) {
        Dropout dropout = a_dropout(p);
        dropout.image = (uint32_t)PICTURES[i].image;
        float *of_image = plain + batch.table[(size_t)i].first * C;
        dropout_forward(of_image, 0, of_image, 0, NULL, (size_t)(PICTURES[i].height * PICTURES[i].width), (size_t)C,
                        dropout);
    }
    gpu_dropout(y.device, x.device, dropout_mask(a_dropout(p)), batch.map, C);
    check(different(y.download(), plain, count) == 0, "dropout %g of %s, %d channels", p, type_name<T>(), C);
    gpu_dropout(x.device, x.device, dropout_mask(a_dropout(p)), batch.map, C);
    check(different(x.download(), plain, count) == 0, "dropout %g in place of %s, %d channels", p, type_name<T>(), C);
    free(plain);
}

static void test_dropout() {
    test_dropout_of<float>(0.3, 8);
    test_dropout_of<float>(0, 24);
    test_dropout_of<__nv_bfloat16>(0.1, 40);
    test_dropout_of<__half>(0.5, 24);
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

// What attention makes of one image, in double: rows of C channels, lse (heads, Tq).
struct AttentionTruth {
    double *out, *dq, *dk, *dv, *lse;
    double *out_bound, *dq_bound, *dk_bound, *dv_bound;  // NULL, or how far an implementation in 16 bits may be off
    const double *q, *k, *v, *dout;
};

// Bounds, with u the relative and t the absolute error of rounding to T, A = P M, and the symbols of train_detr.cu:
// rounded are A, dS, and the results, so
//   |out error| <= (u A + t) |v| + u |out|,           |dv error| <= (u A + t)^T |dout| + u |dv|,
//   |D error| <= |dout| |out error|,                  |dS error| <= u |dS| + t + P |D error| / sqrt(head_dim),
//   |dq error| <= |dS error| |k| + u |dq|,            |dk error| <= |dS error|^T |q| + u |dk|.
// The forward pass rounds P before it is divided by its sum, which is at least 1, so t counts no more there. Errors of
// floats are left out.
static void plain_attention(const AttentionTruth &a, int Tq, int Tk, int C, int heads, Dropout dropout,
                            AttentionPrior prior, double u, double t) {
    const int D = C / heads;
    double *P = (double *)allocate((size_t)Tk * 3 * sizeof(double)), *M = P + Tk, *dP = M + Tk;
    for (int head = 0; head < heads; head++) {
        const int low = head * D, high = low + D;
        for (int i = 0; i < Tq; i++) {
            double top = -INFINITY, sum = 0, dot = 0, dot_bound = 0;
            for (int j = 0; j < Tk; j++) {
                const uint64_t element = ((uint64_t)head * (uint64_t)Tq + (uint64_t)i) * (uint64_t)Tk + (uint64_t)j;
                const uint32_t word =
                    random_word(dropout.seed, RANDOM_DROPOUT, dropout.site, dropout.step, dropout.image, element);
                M[j] = word >= dropout_threshold(dropout) ? 1 / (1 - dropout.p) : 0;
                P[j] = dP[j] = 0;
                for (int d = low; d < high; d++) P[j] += a.q[i * C + d] * a.k[j * C + d] / sqrt((double)D);
                for (int axis = 0; axis < 2 && prior.boxes; axis++) {
                    const double *of_head = PRIOR_HEADS[head % 8], half = prior.boxes[4 * i + 2 + axis] / 2.0;
                    const int cells = axis ? prior.height : prior.width, at = axis ? j / prior.width : j % prior.width;
                    const double far = (at + 0.5) / cells - prior.boxes[4 * i + axis] - of_head[axis] * half;
                    P[j] -= pow(far / fmax(of_head[2] * half, 0.5 / cells), 2) / 2;
                }
                top = fmax(top, P[j]);
            }
            for (int j = 0; j < Tk; j++) sum += P[j] = exp(P[j] - top);
            a.lse[head * Tq + i] = top + log(sum);
            for (int d = low; d < high; d++) {
                double out = 0, bound = 0;
                for (int j = 0; j < Tk; j++) {
                    out += P[j] / sum * M[j] * a.v[j * C + d];
                    bound += (u * P[j] / sum * M[j] + t) * fabs(a.v[j * C + d]);
                }
                a.out[i * C + d] = out;
                a.out_bound[i * C + d] = bound + u * fabs(out);
                dot += a.dout[i * C + d] * out;
                dot_bound += fabs(a.dout[i * C + d]) * a.out_bound[i * C + d];
            }
            for (int j = 0; j < Tk; j++) {
                P[j] /= sum;
                for (int d = low; d < high; d++) {
                    dP[j] += M[j] * a.dout[i * C + d] * a.v[j * C + d];
                    a.dv[j * C + d] += P[j] * M[j] * a.dout[i * C + d];
                    a.dv_bound[j * C + d] += (u * P[j] * M[j] + t) * fabs(a.dout[i * C + d]);
                }
                const double dS = P[j] * (dP[j] - dot) / sqrt((double)D);
                const double bound = u * fabs(dS) + t + P[j] * dot_bound / sqrt((double)D);
                for (int d = low; d < high; d++) {
                    a.dq[i * C + d] += dS * a.k[j * C + d], a.dq_bound[i * C + d] += bound * fabs(a.k[j * C + d]);
                    a.dk[j * C + d] += dS * a.q[i * C + d], a.dk_bound[j * C + d] += bound * fabs(a.q[i * C + d]);
                }
            }
        }
    }
    for (int i = 0; i < Tq * C; i++) a.dq_bound[i] += u * fabs(a.dq[i]);
    for (int i = 0; i < Tk * C; i++) a.dk_bound[i] += u * fabs(a.dk[i]), a.dv_bound[i] += u * fabs(a.dv[i]);
    free(P);
}

// cross: the queries are nine an image, else the image's own tokens; 2: with a prior.
template <class T>
static void test_attention_of(int C, int heads, double p, int cross) {
    Segment nine[NUM_PICTURES];
    for (int i = 0; i < NUM_PICTURES; i++) nine[i] = {0, 9, 1, PICTURES[i].image};
    RaggedTable keys(PICTURES, NUM_PICTURES, NULL), queries(cross ? nine : PICTURES, NUM_PICTURES, NULL);
    const size_t nq = (size_t)(queries.map.rows * C), nk = (size_t)(keys.map.rows * C);
    const size_t nl = (size_t)(heads * queries.map.rows);
    Array<T> q(nq, 32), k(nk, 33), v(nk, 34), dout(nq, 35), out(nq), dq(nq), dk(nk), dv(nk);
    Array<float> lse(nl), dots(nl);
    for (size_t i = 0; i < nq; i++) q[i] = to_type<T>(4 * to_float(q[i]));  // probabilities that are not all alike
    for (size_t i = 0; i < nk; i += (size_t)C) k[i] = to_type<T>(1);
    q[(size_t)(3 * C)] = to_type<T>(-1200);  // a query all of whose scores are below -100: exp() of them is 0
    q.upload(), k.upload();
    Array<float> boxes(4 * (size_t)queries.map.rows, 36);
    Array<float4> prior(nl);
    for (size_t i = 0; i < boxes.count; i++)  // some of them smaller than a cell
        boxes[i] = (float)(i % 4 < 2 ? 0.5 + 0.4 * sin(boxes[i] * 9) : 0.01 + 0.3 * pow(sin(boxes[i] * 9), 2));
    boxes.upload();
    gpu_attention_prior(prior.device, boxes.device, queries.map, keys.map, heads);
    const AttentionParams<T> params = {out.device,
                                       lse.device,
                                       q.device,
                                       k.device,
                                       v.device,
                                       queries.map,
                                       keys.map,
                                       dropout_mask(a_dropout(p)),
                                       C,
                                       heads,
                                       cross == 2 ? prior.device : NULL,
                                       dout.device,
                                       dq.device,
                                       dk.device,
                                       dv.device,
                                       dots.device};
    const int query_parts = attention_parts(queries.table.host, NUM_PICTURES);
    gpu_attention_forward(params, query_parts);
    gpu_attention_backward(params, query_parts, attention_parts(keys.table.host, NUM_PICTURES));
    const T *ours[4] = {out.download(), dq.download(), dk.download(), dv.download()};
    lse.download();

    // In the order out, dq, dk, dv: the truth, its bounds, and the CPU's; then q, dout, k, v, and lse of an image.
    const size_t counts[4] = {nq, nq, nk, nk}, all = 2 * nq + 2 * nk;
    double *truth = (double *)allocate((3 * all + nl) * sizeof(double)), *bounds = truth + all, *inputs = bounds + all;
    float *cpu = (float *)allocate((2 * all + nl) * sizeof(float)), *cpu_inputs = cpu + all;
    for (size_t i = 0; i < all; i++)
        inputs[i] = cpu_inputs[i] = to_float(i < nq            ? q[i]
                                             : i < 2 * nq      ? dout[i - nq]
                                             : i < 2 * nq + nk ? k[i - 2 * nq]
                                                               : v[i - 2 * nq - nk]);
    const bool fp16 = std::is_same<T, __half>::value;
    int wrong_lse = 0;
    for (int i = 0; i < NUM_PICTURES; i++) {
        const Segment from = queries.table[(size_t)i], to = keys.table[(size_t)i];
        const int Tq = from.height * from.width, Tk = to.height * to.width;
        const size_t at = (size_t)(from.first * C), at_keys = (size_t)(to.first * C);
        const size_t first[4] = {at, nq + at, 2 * nq + at_keys, 2 * nq + nk + at_keys};
        Dropout dropout = a_dropout(p);
        dropout.image = (uint32_t)from.image;
        const AttentionTruth a = {truth + first[0],  truth + first[1],  truth + first[2],  truth + first[3],
                                  inputs + all,      bounds + first[0], bounds + first[1], bounds + first[2],
                                  bounds + first[3], inputs + first[0], inputs + first[2], inputs + first[3],
                                  inputs + first[1]};
        // fp16 has nothing between 0 and 2^-24; probabilities, which are floats, nothing exact below 2^-126
        const AttentionPrior around = {cross == 2 ? boxes.host + 4 * from.first : NULL, to.height, to.width};
        plain_attention(a, Tq, Tk, C, heads, dropout, around, fp16 ? 0x1p-11 : 0x1p-8, fp16 ? 0x1p-25 : 0x1p-126);
        for (int head = 0; head < heads; head++)
            for (int row = 0; row < Tq; row++)
                wrong_lse += !(fabs(lse[(size_t)(head * queries.map.rows + from.first + row)] -
                                    a.lse[head * Tq + row]) <= 2e-6 * (1 + fabs(a.lse[head * Tq + row])));
        if (!std::is_same<T, float>::value) continue;
        float *cpu_lse = cpu + 2 * all, *q_i = cpu_inputs + first[0], *k_i = cpu_inputs + first[2],
              *v_i = cpu_inputs + first[3];
        const size_t needed = attention_workspace(Tq, Tk, C, heads, omp_get_max_threads());
        float *workspace = (float *)aligned_alloc(64, round_up(needed * sizeof(float), 64));
        attention_forward(cpu + first[0], NULL, cpu_lse, q_i, k_i, v_i, Tq, Tk, C, heads, dropout, around, 0,
                          workspace);
        attention_backward(cpu + first[1], cpu + first[2], cpu + first[3], cpu_inputs + first[1], q_i, k_i, v_i,
                           cpu + first[0], cpu_lse, Tq, Tk, C, heads, dropout, around, 0, workspace);
        free(workspace);
    }
    static const char *const names[4] = {"attention's out", "attention's dq", "attention's dk", "attention's dv"};
    size_t first = 0;
    for (int n = 0; n < 4; first += counts[n], n++) {
        if (std::is_same<T, float>::value) {
            check_error((const float *)(const void *)ours[n], cpu + first, truth + first, counts[n], names[n],
                        (int)counts[n] / C, C);
            continue;
        }
        int wrong = 0;
        for (size_t i = 0; i < counts[n]; i++)  // a tenth for the errors of floats
            wrong += !(fabs(to_float(ours[n][i]) - truth[first + i]) <= 1.1 * bounds[first + i]);
        check(wrong == 0, "%s in %s, %d channels, %d heads, dropout %g: %d of %zu are wrong", names[n], type_name<T>(),
              C, heads, p, wrong, counts[n]);
    }
    check(wrong_lse == 0, "attention in %s, %d channels, %d heads: %d of lse are wrong", type_name<T>(), C, heads,
          wrong_lse);
    free(truth);
    free(cpu);
}

static void test_attention() {
    test_attention_of<float>(64, 2, 0, 0);
    test_attention_of<float>(64, 1, 0.1, 1);
    test_attention_of<__nv_bfloat16>(64, 2, 0.3, 0);
    test_attention_of<__nv_bfloat16>(128, 2, 0, 0);
    test_attention_of<__nv_bfloat16>(64, 1, 0.1, 1);
    test_attention_of<__half>(64, 2, 0.1, 0);
    test_attention_of<__half>(64, 1, 0, 1);
    test_attention_of<float>(128, 8, 0, 2);
    test_attention_of<__nv_bfloat16>(128, 8, 0.1, 2);
    test_attention_of<__half>(128, 4, 0, 2);
    test_attention_of<__half>(32, 2, 0.1, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layer norm

// y, dsum (rows, C), dweight, dbias (C) of a layer norm of `sum`, in double.
static void plain_norm(double *y, double *dsum, double *dweight, double *dbias, const float *sum, const float *weight,
                       const float *bias, const float *dy, int rows, int C) {
    for (int row = 0; row < rows; row++, y += C, dsum += C, sum += C, dy += C) {
        double mean = 0, variance = 0, mean_g = 0, mean_gn = 0;
        for (int c = 0; c < C; c++) mean += (double)sum[c] / C;
        for (int c = 0; c < C; c++) variance += (sum[c] - mean) * (sum[c] - mean) / C;
        const double rstd = 1 / sqrt(variance + 1e-5);
        for (int c = 0; c < C; c++) {
            const double n = (sum[c] - mean) * rstd, g = (double)dy[c] * weight[c];
            y[c] = n * weight[c] + bias[c];
            mean_g += g / C, mean_gn += g * n / C;
            dweight[c] += dy[c] * n, dbias[c] += dy[c];
        }
        for (int c = 0; c < C; c++)
            dsum[c] = rstd * ((double)dy[c] * weight[c] - mean_g - (sum[c] - mean) * rstd * mean_gn);
    }
}

template <class T>
static void test_norm_of(int C, double p) {
    RaggedTable batch(PICTURES, NUM_PICTURES, NULL);
    const int rows = batch.map.rows;
    const size_t count = (size_t)(rows * C), width = (size_t)C;
    Array<float> x(count, 17), residual(count, 18), weight(width, 19), bias(width, 20), dy(count, 21);
    Array<float> sum(count), y(count), mean((size_t)rows), rstd((size_t)rows), dsum(count);
    Array<float> dweight(width, 22), dbias(width, 23), partials(divide_up((size_t)rows, CHUNK_ROWS) * 2 * width);
    Array<T> operand(count), dx(count);
    for (size_t i = 0; i < count; i++) residual[i] += 3;  // a mean that has to be subtracted
    residual.upload();

    // The CPU, image by image
    float *cpu = (float *)allocate((4 * count + 2 * (size_t)rows + 4 * width) * sizeof(float)), *cpu_sum = cpu,
          *cpu_y = cpu_sum + count, *cpu_dsum = cpu_y + count, *cpu_dx = cpu_dsum + count, *cpu_mean = cpu_dx + count,
          *cpu_rstd = cpu_mean + rows, *cpu_dweight = cpu_rstd + rows, *cpu_dbias = cpu_dweight + C;
    double *truth = (double *)allocate((2 * count + 2 * width) * sizeof(double)), *true_dsum = truth + count,
           *true_dweight = true_dsum + count, *true_dbias = true_dweight + C;
    for (int i = 0; i < NUM_PICTURES; i++) {
        const int first = batch.table[(size_t)i].first, size = PICTURES[i].height * PICTURES[i].width;
        Dropout dropout = a_dropout(p);
        dropout.image = (uint32_t)PICTURES[i].image;
        dropout_forward(cpu_sum + first * C, 0, x.host + first * C, 0, residual.host + first * C, (size_t)size, width,
                        dropout);
    }
    layernorm_forward(cpu_y, NULL, cpu_mean, cpu_rstd, cpu_sum, weight.host, bias.host, rows, C);
    layernorm_backward(cpu_dsum, cpu_dweight, cpu_dbias, dy.host, cpu_sum, cpu_mean, cpu_rstd, weight.host, rows, C);
    plain_norm(truth, true_dsum, true_dweight, true_dbias, cpu_sum, weight.host, bias.host, dy.host, rows, C);

    NormForward<T> forward;
    memset((void *)&forward, 0, sizeof forward);
    forward.sum = sum.device, forward.y = y.device, forward.operand = operand.device;
    forward.mean = mean.device, forward.rstd = rstd.device;
    forward.x = x.device, forward.residual = residual.device, forward.weight = weight.device;
    forward.bias = bias.device, forward.mask = dropout_mask(a_dropout(p)), forward.map = batch.map, forward.C = C;
    gpu_norm_forward(forward);
    check(different(sum.download(), cpu_sum, count) == 0, "norm of %dx%d, dropout %g: the sum", rows, C, p);
    check_error(y.download(), cpu_y, truth, count, "norm's y", rows, C);
    check(different(operand.download(), y.host, count) == 0, "norm of %dx%d: y rounded to %s", rows, C, type_name<T>());
    mean.download(), rstd.download();

    NormBackward<T> backward;
    memset((void *)&backward, 0, sizeof backward);
    backward.dsum = dsum.device, backward.dx = dx.device, backward.dweight = dweight.device;
    backward.dbias = dbias.device, backward.partials = partials.device, backward.dy = dy.device;
    backward.sum = sum.device, backward.mean = mean.device, backward.rstd = rstd.device;
    backward.weight = weight.device, backward.mask = forward.mask, backward.map = batch.map, backward.C = C;
    gpu_norm_backward(backward);
    check_error(dsum.download(), cpu_dsum, true_dsum, count, "norm's dsum", rows, C);
    for (int i = 0; i < NUM_PICTURES; i++) {  // the mask on our own dsum
        const int first = batch.table[(size_t)i].first, size = PICTURES[i].height * PICTURES[i].width;
        Dropout dropout = a_dropout(p);
        dropout.image = (uint32_t)PICTURES[i].image;
        dropout_forward(cpu_dx + first * C, 0, dsum.host + first * C, 0, NULL, (size_t)size, width, dropout);
    }
    check(different(dx.download(), cpu_dx, count) == 0, "norm of %dx%d: dx in %s", rows, C, type_name<T>());
    // Each term has the errors of mean and rstd, which are near 2^-24 of what they are, and its own three roundings;
    // then the sums as in test_sums_of().
    int wrong = 0;
    dweight.download(), dbias.download();
    for (int c = 0; c < C; c++) {
        double magnitude = 1, magnitude_bias = 1;
        for (int row = 0; row < rows; row++) {
            const size_t at = (size_t)(row * C + c);
            magnitude += fabs(dy[at]) * (fabs(((double)cpu_sum[at] - cpu_mean[row]) * cpu_rstd[row]) + 4);
            magnitude_bias += fabs(dy[at]);
        }
        wrong +=
            !(fabs(dweight[(size_t)c] - (double)number(22, (uint64_t)c) - true_dweight[c]) <= 21 * 0x1p-24 * magnitude);
        wrong += !(fabs(dbias[(size_t)c] - (double)number(23, (uint64_t)c) - true_dbias[c]) <=
                   16 * 0x1p-24 * magnitude_bias);
    }
    check(wrong == 0, "norm of %dx%d: %d gradients of weight and bias are wrong", rows, C, wrong);

    if (p > 0) {  // a frozen norm that nothing stands before: residual alone, no operands
        forward.x = NULL, forward.operand = NULL, forward.sum = NULL;
        backward.dx = NULL, backward.dweight = NULL, backward.sum = forward.residual = sum.device;
        const float first = y[0], last = dsum[count - 1];
        gpu_norm_forward(forward);
        gpu_norm_backward(backward);
        y.download(), dsum.download();
        check(y[0] == first && dsum[count - 1] == last, "norm of %dx%d without what stands around it", rows, C);
    }
    free(cpu);
    free(truth);
}

static void test_norm() {
    test_norm_of<float>(8, 0);
    test_norm_of<float>(256, 0.1);
    test_norm_of<__nv_bfloat16>(40, 0.3);
    test_norm_of<__half>(264, 0.1);
    test_norm_of<__nv_bfloat16>(MAX_NORM_CHANNELS, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Set loss

static const LossSettings LOSS = {1, 5, 2, 1, 5, 2, 0.1, 1, 2};

// What the CPU makes of the same logits and boxes; rows in its order, (image, layer, query).
struct CpuLoss {
    Model model;
    Activations acts;
    Losses losses;
};

// ties: logits and boxes of few values, and the same target twice.
static void test_set_loss_of(int focal, int num_labels, int aux_loss, int ties) {
    enum { LAYERS = 4, IMAGES = 4, Q = 9, MOST = 12 };
    static const int counts[IMAGES] = {3, 0, MOST, 5};  // MOST, and twice 5, are more than there are queries
    Model model;
    Activations acts;
    Losses losses;
    memset(&model, 0, sizeof model), memset(&acts, 0, sizeof acts), memset(&losses, 0, sizeof losses);
    model.config.dec_layers = LAYERS, model.config.num_queries = Q, model.config.num_labels = num_labels;
    model.config.focal = focal;
    LossSettings settings = LOSS;
    settings.aux_loss = aux_loss;
    const int classes = num_logits(&model.config);
    const size_t rows = LAYERS * IMAGES * Q, width = (size_t)classes, of_image = LAYERS * Q;

    SetLoss p;
    memset(&p, 0, sizeof p);
    p.layers = LAYERS, p.images = IMAGES, p.Q = Q, p.classes = classes, p.num_labels = num_labels, p.focal = focal;
    p.settings = settings;
    Array<int> first(IMAGES + 1);
    for (int i = 0; i < IMAGES; i++) {
        first[(size_t)i + 1] = first[(size_t)i] + counts[i];
        divisors_add(&p.divisors, counts[i], Q, &settings);
    }
    p.num_targets = first[IMAGES], p.most_targets = MOST;
    const size_t targets = (size_t)p.num_targets;
    Array<double> boxes(4 * targets), costs(LAYERS * targets * Q), terms(3 * rows), sums(LAYERS * LOSS_SUMS);
    Array<int> target_classes(targets), match(rows);
    Array<float> logits(rows * width), pred_boxes(4 * rows), dlogits(rows * width), dbox_logits(4 * rows);
    Array<unsigned char> answers(rows);
    for (size_t t = 0; t < targets; t++) {
        const size_t as = ties ? t / 2 : t;
        for (size_t i = 0; i < 4; i++)
            boxes[4 * t + i] = (i < 2 ? 0.3 : 0.05) + 0.2 * (1 + (double)number(24, 4 * as + i));
        target_classes[t] = (int)(as * 7 % (size_t)num_labels);
    }
    for (size_t i = 0; i < rows * width; i++) logits[i] = ties ? floorf(2 * number(25, i)) : 4 * number(25, i);
    for (size_t i = 0; i < 4 * rows; i++)
        pred_boxes[i] = 0.4f + 0.3f * (ties ? floorf(2 * number(26, i)) / 2 : number(26, i));
    for (size_t i = 0; i < LAYERS * LOSS_SUMS; i++) sums[i] = 1;
    first.upload(), boxes.upload(), target_classes.upload(), logits.upload(), pred_boxes.upload(), sums.upload();
    p.target_boxes = boxes.device, p.target_classes = target_classes.device, p.first_target = first.device;
    p.logits = logits.device, p.boxes = pred_boxes.device, p.costs = costs.device, p.match = match.device;
    p.dlogits = dlogits.device, p.dbox_logits = dbox_logits.device, p.terms = terms.device;
    p.answers = answers.device, p.sums = sums.device;
    gpu_match(p);
    gpu_set_loss(p);
    match.download(), dlogits.download(), dbox_logits.download(), sums.download(), answers.download();

    // The CPU, image by image: its rows are in the order (layer, query).
    float *memory = (float *)allocate(of_image * (2 * width + 8) * sizeof(float));
    acts.logits = memory, acts.dlogits = memory + of_image * width, acts.boxes = acts.dlogits + of_image * width;
    acts.dboxes = acts.boxes + 4 * of_image;
    acts.match = (int *)allocate(of_image * sizeof(int));
    acts.probabilities = (double *)allocate((width + 1) * sizeof(double));
    int wrong_match = 0, wrong_logits = 0, wrong_boxes = 0;
    for (int image = 0; image < IMAGES; image++) {
        for (size_t r = 0; r < of_image; r++) {
            const size_t row = (r / Q * IMAGES + (size_t)image) * Q + r % Q;
            memcpy(acts.logits + r * width, logits.host + row * width, width * sizeof(float));
            memcpy(acts.boxes + 4 * r, pred_boxes.host + 4 * row, 4 * sizeof(float));
        }
        const Targets of = {counts[image], boxes.host + 4 * first[(size_t)image],
                            target_classes.host + first[(size_t)image]};
        set_loss(&model, &acts, of, p.divisors, &settings, &losses);
        for (size_t r = 0; r < of_image; r++) {
            const size_t row = (r / Q * IMAGES + (size_t)image) * Q + r % Q;
            float through[4];
            for (int i = 0; i < 4; i++) {
                const float b = acts.boxes[4 * r + (size_t)i];
                through[i] = acts.dboxes[4 * r + (size_t)i] * (b * (1 - b));  // as heads_backward() does
            }
            wrong_match += match[row] != acts.match[r];
            wrong_logits += different(dlogits.host + row * width, acts.dlogits + r * width, width);
            wrong_boxes += different(dbox_logits.host + 4 * row, through, 4);
        }
    }
    const char *loss = focal ? "focal" : "softmax";
    check(wrong_match == 0, "%s, %d classes, ties %d: %d matches are not the CPU's", loss, classes, ties, wrong_match);
    check(wrong_logits == 0, "%s, %d classes: %d gradients of logits", loss, classes, wrong_logits);
    check(wrong_boxes == 0, "%s, %d classes: %d gradients of boxes", loss, classes, wrong_boxes);
    for (int l = 0; l < LAYERS; l++) {
        const double *ours = sums.host + l * LOSS_SUMS;
        const int last = l == LAYERS - 1;
        int matched = 0;
        for (size_t r = 0; r < IMAGES * Q; r++) matched += match[(size_t)l * IMAGES * Q + r] >= 0;
        // sums of at most 36 numbers, in another order: 36 roundings of a double at most
        check(fabs(ours[SUM_CE] - 1 - losses.loss_ce[l]) <= 1e-14 * (1 + losses.loss_ce[l]) &&
                  fabs(ours[SUM_BBOX] - 1 - losses.loss_bbox[l]) <= 1e-14 * (1 + losses.loss_bbox[l]) &&
                  fabs(ours[SUM_GIOU] - 1 - losses.loss_giou[l]) <= 1e-14 * (1 + losses.loss_giou[l]),
              "%s: losses of layer %d: %g %g %g instead of %g %g %g", loss, l, ours[SUM_CE] - 1, ours[SUM_BBOX] - 1,
              ours[SUM_GIOU] - 1, losses.loss_ce[l], losses.loss_bbox[l], losses.loss_giou[l]);
        check(fabs(ours[SUM_CARDINALITY] - 1 - losses.cardinality_error[l]) < 1e-14 * (1 + losses.cardinality_error[l]),
              "%s: cardinality error of layer %d: %g instead of %g", loss, l, ours[SUM_CARDINALITY] - 1,
              losses.cardinality_error[l]);
        check((int)ours[SUM_MATCHED] - 1 == (last ? losses.matched : matched) &&
                  (!last || (int)ours[SUM_RIGHT] - 1 == losses.matched_right),
              "%s: matched queries of layer %d: %g, %g right", loss, l, ours[SUM_MATCHED] - 1, ours[SUM_RIGHT] - 1);
    }
    // The loss's scale: gradients are so many times as large, to the bit.
    Array<LossScale> scale(1);
    scale[0].scale = 4096;
    scale.upload();
    p.loss_scale = scale.device;
    float *plain = (float *)allocate(rows * (width + 4) * sizeof(float)), *plain_boxes = plain + rows * width;
    for (size_t i = 0; i < rows * width; i++) plain[i] = 4096 * dlogits[i];
    for (size_t i = 0; i < 4 * rows; i++) plain_boxes[i] = 4096 * dbox_logits[i];
    gpu_set_loss(p);
    check(memcmp(dlogits.download(), plain, rows * width * sizeof(float)) == 0 &&
              memcmp(dbox_logits.download(), plain_boxes, 4 * rows * sizeof(float)) == 0,
          "%s, %d classes: gradients are 4096 times as large", loss, classes);
    const double twice = sums[SUM_CE];
    sums.download();
    check(fabs(sums[SUM_CE] - 2 * twice + 1) <= 1e-14 * twice, "%s: losses are not scaled", loss);
    free(plain);
    free(memory);
    free(acts.match);
    free(acts.probabilities);
    free(acts.costs);
}

static void test_set_loss() {
    for (int ties = 0; ties < 2; ties++) {
        test_set_loss_of(0, 3, 1, ties);
        test_set_loss_of(0, 40, 0, ties);
        test_set_loss_of(1, 40, 1, ties);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters and optimizer

// Compares one field of all trained tensors (or of all, where the CPU has it) with the device's array; how many differ.
static int compare_field(const DeviceParams *d, const Model *model, const float *array, real *Param::*field) {
    Array<float> ours(d->count);
    int wrong = 0;
    for (int i = 0; i < model->num_params; i++) {
        const Param *param = model->params[i];
        if (!(param->*field)) continue;
        CUDA(cudaMemcpy(ours.host, array + d->place[i], param->count * sizeof(float), cudaMemcpyDeviceToHost));
        wrong += different(ours.host, param->*field, param->count);
    }
    return wrong;
}

// The operands: values rounded to T, those of convolutions with their scale.
template <class T>
static int compare_operands(const DeviceParams *d, const Model *model) {
    Array<T> ours(d->count);
    int wrong = 0;
    CUDA(cudaMemcpy(ours.host, d->operand, d->count * sizeof(T), cudaMemcpyDeviceToHost));
    for (int i = 0; i < model->num_layers; i++) {
        const Layer *layer = model->layers[i];
        const size_t place = device_place(d, model, layer->weight), count = layer->weight->count;
        float *expected = (float *)allocate(count * sizeof(float));
        for (size_t k = 0; k < count; k++)
            expected[k] = layer->weight->value[k] *
                          (layer->scale ? layer->scale[k / (count / (size_t)layer->shape.out_channels)] : 1);
        wrong += different(ours.host + place, expected, count);
        free(expected);
    }
    return wrong;
}

// A small model of random numbers, norms as well.
static void optimizer_model(Model *model, int from_scratch) {
    ModelConfig config;
    Error error;
    memset(&config, 0, sizeof config);
    config.bottleneck = 1, config.num_stages = 2, config.stem_width = 8, config.hidden_dim = 32, config.nheads = 4;
    for (int s = 0; s < 2; s++) config.depths[s] = 1, config.widths[s] = 32 << s;
    config.enc_layers = config.dec_layers = 1, config.dim_feedforward = 40, config.num_queries = 9,
    config.num_labels = 3;
    if (model_create(model, &config, 2, 1, from_scratch, &error) != 0) check(0, "%s", error.text);
    model_initialise(model, 3);
    for (int i = 0; i < model->num_params; i++) {
        Param *param = model->params[i];
        for (size_t k = 0; k < param->count; k++) {
            if (param->init == INIT_ONE) param->value[k] = 1 + 0.5f * number(27, k);
            if (param->init == INIT_ZERO) param->value[k] = 0.1f * number(28, k);
        }
    }
    model_pack(model);
}

template <class T>
static void test_optimizer_of(int from_scratch, double ema_decay, double clip_max_norm) {
    Model model;
    optimizer_model(&model, from_scratch);
    if (ema_decay > 0) ema_create(&model);
    DeviceParams d;
    device_params_create<T>(&d, &model);
    check(compare_field(&d, &model, d.value, &Param::value) == 0 && compare_operands<T>(&d, &model) == 0,
          "parameters and their operands in %s are those of the model", type_name<T>());
    int wrong_bias = 0;
    Array<float> bias((size_t)d.num_filters);
    Array<T> bias_operand(bias.count);
    CUDA(cudaMemcpy(bias.host, d.bias, bias.count * sizeof(float), cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(bias_operand.host, d.bias_operand, bias.count * sizeof(T), cudaMemcpyDeviceToHost));
    for (int i = 0, filters = 0; i < model.num_layers; i++) {
        if (!model.layers[i]->norm_weight) continue;
        const size_t count = (size_t)model.layers[i]->shape.out_channels;
        wrong_bias += different(bias.host + filters, model.layers[i]->folded_bias, count);
        wrong_bias += different(bias_operand.host + filters, model.layers[i]->folded_bias, count);
        filters += model.layers[i]->shape.out_channels;
    }
    check(wrong_bias == 0, "%d folded biases are wrong", wrong_bias);

    const OptimizerSettings settings = {1e-2, 3e-3, 1e-1, clip_max_norm, ema_decay};
    loss_scale_upload<T>(&d, {1, 0, 0});
    for (int64_t step = 0; step < 3; step++) {
        for (int i = 0; i < model.num_params; i++)
            for (size_t k = 0; model.params[i]->trained && k < model.params[i]->count; k++)
                model.params[i]->grad[k] = number(29 + (uint32_t)step, (uint64_t)i << 20 | k);
        device_params_copy(&d, &model, d.grad, &Param::grad, cudaMemcpyHostToDevice);
        unfold_norms(&model);
        gpu_unfold(&d);
        int wrong = 0;  // a norm's gradient is a sum in double, whose other order may be rounded otherwise
        for (int i = 0; i < model.num_params; i++) {
            Param *param = model.params[i];
            if (!param->trained) continue;
            Array<float> ours(param->count);
            CUDA(cudaMemcpy(ours.host, d.grad + d.place[i], param->count * sizeof(float), cudaMemcpyDeviceToHost));
            for (size_t k = 0; k < param->count; k++)
                wrong +=
                    !(fabsf(ours[k] - param->grad[k]) <= (param->count > 64 ? 0 : 0x1p-23f * fabsf(param->grad[k])));
        }
        check(wrong == 0, "%d unfolded gradients of step %d are wrong", wrong, (int)step);
        device_params_copy(&d, &model, d.grad, &Param::grad, cudaMemcpyHostToDevice);  // the CPU's, to go on from
        const double norm = gradient_norm(&model);
        gpu_gradient_norm(&d);
        Array<double> ours(1);
        CUDA(cudaMemcpy(ours.host, d.grad_norm, sizeof(double), cudaMemcpyDeviceToHost));
        // squares are exact in double; 32 + 13 additions of a thread and its block, and at most as many again
        check(fabs(ours[0] - norm) <= 1e-14 * norm, "norm of the gradient: %.17g instead of %.17g", ours[0], norm);
        optimizer_step(&model, &settings, step, norm);
        gpu_optimizer_step<T>(&d, &settings, step, NULL, 0);
        check(compare_field(&d, &model, d.value, &Param::value) == 0, "values after step %d", (int)step);
        check(compare_field(&d, &model, d.exp_avg, &Param::exp_avg) == 0 &&
                  compare_field(&d, &model, d.exp_avg_sq, &Param::exp_avg_sq) == 0,
              "moments after step %d", (int)step);
        check(!d.ema || compare_field(&d, &model, d.ema, &Param::ema) == 0, "averages after step %d", (int)step);
        check(compare_operands<T>(&d, &model) == 0, "operands in %s after step %d", type_name<T>(), (int)step);
    }
    const float bad = NAN;
    CUDA(cudaMemcpy(d.grad + d.trained - PARAM_CHUNK, &bad, sizeof bad, cudaMemcpyHostToDevice));
    gpu_gradient_norm(&d);
    gpu_optimizer_step<T>(&d, &settings, 3, NULL, 0);
    check(compare_field(&d, &model, d.value, &Param::value) == 0 &&
              compare_field(&d, &model, d.exp_avg, &Param::exp_avg) == 0,
          "a gradient that is not finite changes nothing");
    LossScale scale = {1, LOSS_SCALE_STEPS - 1, 1};
    CUDA(cudaMemcpy(d.loss_scale, &scale, sizeof scale, cudaMemcpyHostToDevice));
    CUDA(cudaMemset(d.grad, 0, d.trained * sizeof(float)));
    gpu_gradient_norm(&d);
    gpu_optimizer_step<T>(&d, &settings, 4, NULL, 0);
    CUDA(cudaMemcpy(&scale, d.loss_scale, sizeof scale, cudaMemcpyDeviceToHost));
    check(scale.scale == (std::is_same<T, __half>::value ? 2 : 1) && scale.good_steps == 0, "%s: the loss's scale: %g",
          type_name<T>(), (double)scale.scale);
    loss_scale_upload<T>(&d, {4096, 7, 2});
    CUDA(cudaMemcpy(&scale, d.loss_scale, sizeof scale, cudaMemcpyDeviceToHost));
    check((std::is_same<T, __half>::value ? scale.scale == 4096 && scale.good_steps == 7
                                          : scale.scale == 1 && scale.good_steps == 0) &&
              scale.skipped == 2,
          "%s: a run goes on with the loss's scale", type_name<T>());
    device_params_copy(&d, &model, d.value, &Param::value, cudaMemcpyDeviceToHost);
    device_params_free(&d);
    model_free(&model);
}

// Trains one model with the loss scaled and one without, on gradients that come in three micro-batches and in fp16.
struct ScaledRun {
    DeviceParams d;
    LossScale scale;

    ScaledRun(const Model *model, float factor) {
        device_params_create<__half>(&d, model);
        set({factor, 0, 0});
    }
    ~ScaledRun() { device_params_free(&d); }
    ScaledRun(const ScaledRun &) = delete;
    void set(LossScale to) {
        loss_scale_upload<__half>(&d, to);
        CUDA(cudaMemcpy(&scale, d.loss_scale, sizeof scale, cudaMemcpyDeviceToHost));
    }
    // One step on the gradient of this number; what the network makes of the scaled loss's gradient is as large.
    // overflow: and once too large.
    void step(uint32_t gradient, int64_t number_of_step, bool overflow) {
        enum { ROWS = 3 };
        const OptimizerSettings settings = {1e-2, 3e-3, 1e-1, 0.1, 0.9};
        const size_t count = d.trained;
        Array<__half> dy(ROWS * count);
        Array<float> partials(count);
        CUDA(cudaMemset(d.grad, 0, count * sizeof(float)));
        for (uint32_t micro_batch = 0; micro_batch < 3; micro_batch++) {
            __half some[4096];
            for (size_t i = 0; i < 4096; i++) {  // 2^-10 to 1: normal numbers with any scale from 1/16 to 32768
                const float x = number(80 + micro_batch + 3 * gradient, i);
                some[i] = to_type<__half>((x + copysignf(0x1p-10f, x)) / 1.001f * scale.scale);
            }
            for (size_t i = 0; i < dy.count; i++) dy[i] = some[i * 7 % 4096];
            if (overflow && micro_batch == 1) dy[count + 70] = to_type<__half>(65536.f);
            dy.upload();
            gpu_column_sums(d.grad, partials.device, dy.device, ROWS, (int)count);
        }
        gpu_gradient_norm(&d);
        gpu_optimizer_step<__half>(&d, &settings, number_of_step, NULL, 0);
        CUDA(cudaMemcpy(&scale, d.loss_scale, sizeof scale, cudaMemcpyDeviceToHost));
    }
    // Everything that training changes.
    Array<char> *state() const {
        const float *arrays[4] = {d.value, d.exp_avg, d.exp_avg_sq, d.ema};
        const size_t bytes = d.trained * sizeof(float);
        Array<char> *all = new Array<char>(4 * bytes + d.trained * sizeof(__half));
        for (size_t i = 0; i < 4; i++)
            CUDA(cudaMemcpy(all->device + i * bytes, arrays[i], bytes, cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy(all->device + 4 * bytes, d.operand, d.trained * sizeof(__half), cudaMemcpyDeviceToDevice));
        all->download();
        return all;
    }
};

static int same_state(const Array<char> *a, const Array<char> *b) { return memcmp(a->host, b->host, a->count) == 0; }

static void test_loss_scale() {
    Model model;
    optimizer_model(&model, 1);
    ema_create(&model);
    {
        ScaledRun plain(&model, 1), scaled(&model, 1024);
        plain.step(0, 0, false), scaled.step(0, 0, false);
        double norms[2];
        CUDA(cudaMemcpy(&norms[0], plain.d.grad_norm, sizeof(double), cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(&norms[1], scaled.d.grad_norm, sizeof(double), cudaMemcpyDeviceToHost));
        Array<char> *ours = scaled.state(), *before = plain.state();
        check(norms[0] == norms[1] && norms[0] > 1 && same_state(ours, before),
              "a step with the loss scaled is the same: norms %.17g and %.17g", norms[0], norms[1]);
        check(scaled.scale.scale == 1024 && scaled.scale.good_steps == 1 && scaled.scale.skipped == 0, "a good step");
        LossScale was = scaled.scale;
        scaled.step(1, 1, true);
        Array<char> *after = scaled.state();
        check(same_state(after, before), "an overflow leaves every byte");
        check(scaled.scale.scale == 512 && scaled.scale.good_steps == 0 && scaled.scale.skipped == 1,
              "and halves the scale: %g, %d, %d", (double)scaled.scale.scale, scaled.scale.good_steps,
              scaled.scale.skipped);
        Error error;
        check(loss_scale_say(&was, &scaled.scale, 1, &error) == 0, "that is no error");
        was.scale = scaled.scale.scale = 1;
        check(loss_scale_say(&was, &scaled.scale, 1, &error) == -1 && strstr(error.text, "step 2"), "at 1 it is one");
        scaled.scale.skipped = was.skipped, scaled.scale.scale = 512;
        check(loss_scale_say(&was, &scaled.scale, 2, &error) == 0, "nothing was left out");
        was.scale = 2, was.skipped--, scaled.scale.scale = 1;
        check(loss_scale_say(&was, &scaled.scale, 2, &error) == 0, "from 2 to 1 is no error");

        // What follows is what would have, had the step not been: Adam counts the steps that were taken.
        Array<char> *next = NULL, *wanted = NULL;
        scaled.set({512, 0, 1});
        scaled.step(1, 2, false), plain.step(1, 1, false);
        next = scaled.state(), wanted = plain.state();
        check(same_state(next, wanted) == 1, "the same gradient again is taken");
        delete next;
        delete wanted;
        delete after;
        delete ours;
        delete before;
    }
    {
        ScaledRun run(&model, 0);
        check(run.scale.scale == FIRST_LOSS_SCALE, "a run begins with a scale of %g", (double)run.scale.scale);
        const struct {
            LossScale before;
            bool overflow;
            LossScale after;
        } cases[] = {{{1024, LOSS_SCALE_STEPS - 2, 3}, false, {1024, LOSS_SCALE_STEPS - 1, 3}},
                     {{1024, LOSS_SCALE_STEPS - 1, 3}, false, {2048, 0, 3}},
                     {{1024, LOSS_SCALE_STEPS - 1, 3}, true, {512, 0, 4}},
                     {{1, 5, 3}, true, {1, 0, 4}}};
        for (int i = 0; i < 4; i++) {
            run.set(cases[i].before);
            run.step(0, 9, cases[i].overflow);
            check(memcmp(&run.scale, &cases[i].after, sizeof run.scale) == 0, "case %d: scale %g, %d good steps, %d", i,
                  (double)run.scale.scale, run.scale.good_steps, run.scale.skipped);
        }
        const OptimizerSettings settings = {1e-2, 3e-3, 1e-1, 0.1, 0.9};
        run.set({MOST_LOSS_SCALE, LOSS_SCALE_STEPS - 1, 0});
        CUDA(cudaMemset(run.d.grad, 0, run.d.trained * sizeof(float)));
        gpu_gradient_norm(&run.d);
        gpu_optimizer_step<__half>(&run.d, &settings, 9, NULL, 0);
        CUDA(cudaMemcpy(&run.scale, run.d.loss_scale, sizeof run.scale, cudaMemcpyDeviceToHost));
        check(run.scale.scale == MOST_LOSS_SCALE && run.scale.good_steps == 0, "the largest scale stays");
    }
    model_free(&model);
}

static void test_optimizer() {
    test_optimizer_of<float>(1, 0.9, 0.1);
    test_optimizer_of<__nv_bfloat16>(0, 0, 0);
    test_optimizer_of<__half>(1, 0, 1e9);
}

// ---------------------------------------------------------------------------------------------------------------------
// The network of all kernels

#ifdef HAVE_CUBLASLT
static const OptimizerSettings OPTIMIZER = {1e-3, 3e-4, 1e-1, 0.1, 0};
enum { MODEL_IMAGES = 3, MODEL_BATCH = 4 };  // of a batch of four one could not be read

// A network that has every kind of layer, its values, and a batch of pictures of different sizes.
struct ModelCase {
    ModelConfig config;
    Model model;
    Sample samples[MODEL_BATCH];
    const float **values;
    size_t rows;  // answers of an image: L Q
    int from_scratch;
    int64_t first_step;  // of two

    ModelCase(int bottleneck, int from_scratch, int enc_layers, int anchor, int dec_layers = 2)
        : from_scratch(from_scratch), first_step(anchor ? TRACK_STEPS - 1 : 0) {
        static const int sizes[MODEL_BATCH][2] = {{40, 56}, {0, 0}, {33, 47}, {72, 24}};
        Error error;
        memset(&config, 0, sizeof config), memset(samples, 0, sizeof samples);
        config.bottleneck = bottleneck, config.num_stages = 2, config.stem_width = 8;
        config.hidden_dim = 64, config.enc_layers = enc_layers, config.dec_layers = dec_layers;
        config.dim_feedforward = 72, config.num_queries = 9, config.num_labels = 3, config.dropout = 0.1;
        config.anchor = config.focal = anchor, config.nheads = anchor ? 4 : 2;
        for (int s = 0; s < 2; s++) config.depths[s] = 2, config.widths[s] = 32 << s;
        rows = (size_t)(config.dec_layers * config.num_queries);
        if (model_create(&model, &config, MODEL_BATCH, 1, from_scratch, &error) != 0) check(0, "%s", error.text);
        model_initialise(&model, 5);
        model.loss_scale.scale = 1, model.track_norms = anchor && from_scratch;
        values = (const float **)allocate((size_t)model.num_params * sizeof(float *));
        for (int i = 0; i < model.num_params; i++) {
            Param *param = model.params[i];
            values[i] = param->value;
            for (size_t k = 0; k < param->count; k++) {
                if (param->init == INIT_ONE) param->value[k] = 1 + 0.3f * number(50, (uint64_t)i << 20 | k);
                if (param->init == INIT_ZERO) param->value[k] = 0.1f * number(51, (uint64_t)i << 20 | k);
            }
        }
        // boxes and classes that differ from query to query, so that which one matches is no matter of rounding
        for (Param *param : {model.class_head.weight, model.box_head[2].weight})
            for (size_t k = 0; k < param->count; k++) param->value[k] *= 6;
        model_pack(&model);
        for (int i = 0; i < MODEL_BATCH; i++) {
            if (sizes[i][0] == 0) continue;
            bench_sample(&samples[i], sizes[i][0], sizes[i][1], config.num_labels, i);
            samples[i].num_boxes = 3 * i % 7;  // 0, 6, 2
        }
    }
    ~ModelCase() {
        for (int i = 0; i < MODEL_BATCH; i++) sample_free(&samples[i]);
        free(values);
        model_free(&model);
    }
    ModelCase(const ModelCase &) = delete;
};

// What a reference says of it.
struct ModelResult {
    ModelConfig config;
    Reference r;
    int num_params;
    explicit ModelResult(const ModelCase &c, bool half) : config(c.config), num_params(c.model.num_params) {
        const size_t rows = MODEL_IMAGES * c.rows, n = (size_t)num_params;
        memset(&r, 0, sizeof r);
        config.half = half;
        r.config = &config, r.from_scratch = c.from_scratch, r.values = c.values, r.loss = &LOSS;
        r.track_norms = c.model.track_norms, r.first_step = c.first_step;
        r.optimizer = &OPTIMIZER, r.samples = c.samples, r.count = MODEL_BATCH, r.seed = 11;
        r.logits = (double *)allocate(rows * (size_t)num_logits(&config) * sizeof(double));
        r.boxes = (double *)allocate(rows * 4 * sizeof(double));
        r.match = (int *)allocate(rows * sizeof(int));
        r.grads = (double **)allocate(n * sizeof(double *)), r.after = (double **)allocate(n * sizeof(double *));
        for (size_t i = 0; i < n; i++) {
            r.grads[i] = (double *)allocate(c.model.params[i]->count * sizeof(double));
            r.after[i] = (double *)allocate(c.model.params[i]->count * sizeof(double));
        }
    }
    ~ModelResult() {
        for (int i = 0; i < num_params; i++) free(r.grads[i]), free(r.after[i]);
        free(r.grads), free(r.after), free(r.logits), free(r.boxes), free(r.match);
    }
    ModelResult(const ModelResult &) = delete;
};
// How far our numbers are from the truth, in the norm of the whole tensor, against how far the CPU's are.
struct Distance {
    double ours, cpu, truth;  // sums of squares
    void add(double our_number, double cpu_number, double true_number) {
        ours += (our_number - true_number) * (our_number - true_number);
        cpu += (cpu_number - true_number) * (cpu_number - true_number);
        truth += true_number * true_number;
    }
    void check_against(double times, const char *what) const {
        const double bound = times * fmax(sqrt(cpu), 0x1p-24 * sqrt(truth));
        check(sqrt(ours) <= bound, "%s: error %.3g, may be %.3g", what, sqrt(ours), bound);
    }
};

static const int MODEL_PLACES[MODEL_IMAGES] = {0, 2, 3};

template <class T>
static void create_model_network(DeviceNetwork<T> *n, const ModelCase &c, int max_images, bool recompute) {
    Error error;
    if (device_network_create(n, &c.model, 40, 72, 72, max_images, 7, MODEL_BATCH, 4096, recompute, false, &error) != 0)
        check(0, "%s", error.text);
}

// Answers of pictures first .. first + count - 1 into logits and boxes, (L, count, Q).
template <class T>
static void model_answers(DeviceNetwork<T> *n, const ModelCase &c, double dropout, int first, int count,
                          Array<float> *logits, Array<float> *boxes) {
    n->dropout.p = dropout, n->dropout.seed = 11, n->dropout.step = 3;
    device_load(n, c.samples, MODEL_PLACES + first, count, TO_TRAIN);
    device_forward(n);
    n->loss.settings = LOSS;
    gpu_match(n->loss);
    feed_end(&n->feed);
    const size_t rows = (size_t)count * c.rows;
    CUDA(cudaMemcpy(logits->device, n->logits, rows * (size_t)num_logits(&c.config) * sizeof(float),
                    cudaMemcpyDeviceToDevice));
    CUDA(cudaMemcpy(boxes->device, n->boxes, rows * 4 * sizeof(float), cudaMemcpyDeviceToDevice));
    logits->download(), boxes->download();
}

template <class T>
static void test_model_forward(DeviceNetwork<T> *n, const ModelCase &c, const ModelResult &cpu,
                               const ModelResult &truth, double times) {
    const size_t classes = (size_t)num_logits(&c.config), rows = c.rows, all = MODEL_IMAGES * rows;
    const size_t Q = (size_t)c.config.num_queries;
    Array<float> logits(all * classes), boxes(all * 4), alone_logits(rows * classes), alone_boxes(rows * 4);
    Array<int> match(all);
    Distance of_logits = {}, of_boxes = {};
    int wrong = 0, other_bytes = 0;
    model_answers(n, c, 0, 0, MODEL_IMAGES, &logits, &boxes);
    CUDA(cudaMemcpy(match.host, n->loss.match, all * sizeof(int), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < all; i++) {  // the reference's rows are (image, layer, query)
        const size_t image = i / rows, row = (i % rows / Q * MODEL_IMAGES + image) * Q + i % Q;
        for (size_t k = 0; k < classes; k++)
            of_logits.add(logits[row * classes + k], cpu.r.logits[i * classes + k], truth.r.logits[i * classes + k]);
        for (size_t k = 0; k < 4; k++)
            of_boxes.add(boxes[row * 4 + k], cpu.r.boxes[i * 4 + k], truth.r.boxes[i * 4 + k]);
        wrong += match[row] != truth.r.match[i];
    }
    of_logits.check_against(times, "logits");
    of_boxes.check_against(times, "boxes");
    check(wrong == 0, "network in %s: %d matches are wrong", type_name<T>(), wrong);
    // Each picture alone, with dropout
    model_answers(n, c, c.config.dropout, 0, MODEL_IMAGES, &logits, &boxes);
    for (int i = 0; i < MODEL_IMAGES; i++) {
        model_answers(n, c, c.config.dropout, i, 1, &alone_logits, &alone_boxes);
        for (size_t r = 0; r < rows; r++) {
            const size_t row = (r / Q * MODEL_IMAGES + (size_t)i) * Q + r % Q;
            other_bytes += memcmp(&alone_logits[r * classes], &logits[row * classes], classes * sizeof(float)) != 0;
            other_bytes += memcmp(&alone_boxes[r * 4], &boxes[row * 4], 4 * sizeof(float)) != 0;
        }
    }
    check(other_bytes == 0, "network in %s: %d answers are others where a picture is alone", type_name<T>(),
          other_bytes);
}

// Two steps, and the first one's gradients, into gradients (trained).
template <class T>
static void test_model_steps(DeviceNetwork<T> *n, const ModelCase &c, const ModelResult &cpu, const ModelResult &truth,
                             double times, Array<float> *gradients) {
    const double unit = std::is_same<T, float>::value ? 0x1p-24 : std::is_same<T, __half>::value ? 0x1p-11 : 0x1p-8;
    Distance after = {};
    double whole = 0;  // the squared distance of the CPU's first gradient
    for (int i = 0; i < c.model.num_params; i++)
        for (size_t k = 0; c.model.params[i]->trained && k < c.model.params[i]->count; k++)
            whole += pow(cpu.r.grads[i][k] - truth.r.grads[i][k], 2);
    LossScale scale = c.model.loss_scale;
    Error error;
    Losses of_steps[REFERENCE_STEPS];
    for (int step = 0; step < REFERENCE_STEPS; step++) {
        device_step_begin(n, &LOSS, &OPTIMIZER, c.samples, MODEL_BATCH, 11, c.first_step + step, &of_steps[step]);
        if (step > 0) continue;
        CUDA(
            cudaMemcpy(gradients->device, n->params.grad, n->params.trained * sizeof(float), cudaMemcpyDeviceToDevice));
    }
    for (int step = 0; step < REFERENCE_STEPS; step++) {
        if (device_step_finish(n, &scale, &error) != 0) check(0, "%s", error.text);
        const Losses losses = of_steps[step];
        const Losses *right = &truth.r.losses[step], *theirs = &cpu.r.losses[step];
        Distance loss = {}, norm = {}, boxes = {};
        loss.add(losses.loss, theirs->loss, right->loss),
            norm.add(losses.grad_norm, theirs->grad_norm, right->grad_norm);
        // One number, which the CPU may be near by luck: a norm is no farther off than the gradient as a whole.
        if (!std::is_same<T, float>::value) norm.cpu = fmax(norm.cpu, whole);
        boxes.add(losses.matched_iou, theirs->matched_iou, right->matched_iou);
        boxes.add(losses.query_spread, theirs->query_spread, right->query_spread);
        loss.check_against(times, "loss"), norm.check_against(times, "norm of the gradient");
        boxes.check_against(times, "IoU and spread");
        // in 16 bits two classes may be as likely
        check(losses.matched == right->matched &&
                  (!std::is_same<T, float>::value || losses.matched_right == right->matched_right),
              "%d matched, %d right", losses.matched, losses.matched_right);
        if (step > 0) continue;
        gradients->download();
        for (int i = 0; i < c.model.num_params; i++) {
            const Param *param = c.model.params[i];
            Distance distance = {};
            for (size_t k = 0; param->trained && k < param->count; k++)
                distance.add(gradients->host[n->params.place[i] + k], cpu.r.grads[i][k], truth.r.grads[i][k]);
            // A key's bias adds the same to all scores of a query: its gradient is 0, and what is there are roundings
            // of parts of the whole gradient.
            if (sqrt(distance.truth) < 1e-12 * right->grad_norm) distance.cpu += pow(unit * right->grad_norm, 2) / 16;
            if (param->trained) distance.check_against(times, param->name);
        }
    }
    Array<float> values(n->params.count);
    CUDA(cudaMemcpy(values.device, n->params.value, values.count * sizeof(float), cudaMemcpyDeviceToDevice));
    values.download();
    for (int i = 0; i < c.model.num_params; i++)
        for (size_t k = 0; k < c.model.params[i]->count; k++)
            after.add(values[n->params.place[i] + k], cpu.r.after[i][k], truth.r.after[i][k]);
    after.check_against(times, "values after two steps");
}

// One step's gradients into an array, by a network of its own.
template <class T>
static void model_gradients(const ModelCase &c, int max_images, bool recompute, Array<float> *gradients) {
    DeviceNetwork<T> n;
    Losses losses;
    LossScale scale = c.model.loss_scale;
    Error error;
    create_model_network(&n, c, max_images, recompute);
    profile.on = 1, profile.count = 0;
#ifdef CUDA_EMU
    const unsigned long before = emu::launches;
#endif
    device_step_begin(&n, &LOSS, &OPTIMIZER, c.samples, MODEL_BATCH, 11, c.first_step, &losses);
    if (device_step_finish(&n, &scale, &error) != 0) check(0, "%s", error.text);
    book_launches();
    profile.on = 0;
    long launches = 0, timeless = 0;
    for (int i = 0; i < profile.count; i++)
        launches += profile.lines[i].calls, timeless += !(profile.lines[i].seconds > 0);
    check(timeless == 0, "%ld lines of a step's profile have no time", timeless);
#ifdef CUDA_EMU
    check(launches == (long)(emu::launches - before), "a step has %lu launches, its profile %ld",
          emu::launches - before, launches);
#else
    check(launches > 0, "a step's profile has no launch");
#endif
    CUDA(cudaMemcpy(gradients->device, n.params.grad, gradients->count * sizeof(float), cudaMemcpyDeviceToDevice));
    gradients->download();
    device_network_free(&n);
}

// The plan is what is taken of the device's memory, to the byte; made again, activations take less of it and give the
// same gradients.
template <class T>
static void test_model_memory(int bottleneck, int from_scratch) {
    ModelCase c(bottleneck, from_scratch, 2, 1);
    size_t planned[2];
    Array<float> *gradients[2];
    for (int recompute = 0; recompute < 2; recompute++) {
        DeviceNetwork<T> n;
        Error error;
        size_t before, after, all;
        if (device_network_create(&n, &c.model, 40, 72, 72, MODEL_IMAGES, 7, MODEL_BATCH, 4096, recompute, true,
                                  &error))
            check(0, "%s", error.text);
        planned[recompute] = device_bytes(&n);
        const size_t pinned = pinned_bytes(&n);
        device_network_free(&n);
        CUDA(cudaMemGetInfo(&before, &all));
        create_model_network(&n, c, MODEL_IMAGES, recompute);
        CUDA(cudaMemGetInfo(&after, &all));
#ifdef CUDA_EMU  // a GPU rounds up, and cuBLASLt takes what it likes
        check(before - after == planned[recompute], "%zu bytes are planned, %zu were taken", planned[recompute],
              before - after);
#endif
        check(device_bytes(&n) == planned[recompute] && pinned_bytes(&n) == pinned, "the plan holds");
        check(plan_device_network(&n) && (n.encoder_ffn[0].hidden == n.encoder_ffn[1].hidden) == recompute &&
                  (n.blocks[2].inner[0] == n.blocks[3].inner[0]) == recompute,
              "layers share what is made again, and nothing else");
        for (int images = 0; images < 3; images++) {
            const double room = network_needs<T>(&c.model, 40, 72, 72, images + 1, 7, MODEL_BATCH, recompute);
            const int fit = images_that_fit<T>(&c.model, 40, 72, 72, MODEL_BATCH, 7, MODEL_BATCH, recompute, room),
                      fewer =
                          images_that_fit<T>(&c.model, 40, 72, 72, MODEL_BATCH, 7, MODEL_BATCH, recompute, room - 1);
            check(fit == images + 1 && fewer == images, "where %d have room %d fit, in a byte less %d", images + 1, fit,
                  fewer);
        }
        Settings settings = settings_for("test_detr", "train", TRAIN);
        flag_set(&settings, "short_side", "64", FROM_USER), flag_set(&settings, "max_size", "128", FROM_USER);
        const NetworkPlan plan = {&c.model, 72, 7, MODEL_BATCH, recompute == 1};
        const double room = picture_needs<T>(&plan, 30, 54);
        engine_refuse<T>(&settings, &c.model, 40, 72, 72, 7, MODEL_BATCH, plan.recompute, room, &error);
        int side = 0, longer = 0;
        const char *proposal = strstr(error.text, "--short_side");
        if (proposal) sscanf(proposal, "--short_side %d --max_size %d would fit", &side, &longer);
        check(longer == 2 * side && picture_needs<T>(&plan, 40 * side / 64 + 1, 72 * side / 64 + 1) <= room &&
                  picture_needs<T>(&plan, 40 * (side + 1) / 64 + 1, 72 * (side + 1) / 64 + 1) > room,
              "proposed where %g bytes are free: %s", room, error.text);
        gradients[recompute] = new Array<float>(n.params.trained);
        device_network_free(&n);
        model_gradients<T>(c, MODEL_IMAGES, recompute, gradients[recompute]);
    }
    check(planned[1] < planned[0], "recomputing takes %zu bytes instead of %zu", planned[1], planned[0]);
    check(memcmp(gradients[0]->host, gradients[1]->host, gradients[0]->count * sizeof(float)) == 0,
          "recomputed gradients in %s differ", type_name<T>());
    for (Array<float> *array : gradients) delete array;
}

template <class T>
static void test_model_of(int bottleneck, int from_scratch, int anchor) {
    const double times = 4;
    // A decoder layer that looks at the first one's boxes, not at those of the one before, shows from the third on.
    // With three in bf16 a box's edge is 3e-4 from its target's, where GIoU's gradient jumps, and box edges are 1e-3
    // off on the CPU as here: three in floats alone.
    ModelCase c(bottleneck, from_scratch, 1, anchor, std::is_same<T, float>::value ? 3 : 2);
    ModelResult cpu(c, !std::is_same<T, float>::value), truth(c, false);
    Error error;
    if (reference_run(&cpu.r, &error) != 0 || truth_run(&truth.r, &error) != 0) check(0, "%s", error.text);
    DeviceNetwork<T> n;
    create_model_network(&n, c, MODEL_IMAGES, false);
    Array<float> together(n.params.trained), apart(n.params.trained);
    device_network_free(&n);
    model_gradients<T>(c, 1, false, &apart);  // one picture after another
    create_model_network(&n, c, MODEL_IMAGES, false);
    test_model_forward(&n, c, cpu, truth, times);
    test_model_steps(&n, c, cpu, truth, times, &together);
    device_network_free(&n);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < apart.count; i++) {
        difference += (apart[i] - together[i]) * (apart[i] - together[i]);
        norm += together[i] * together[i];
    }
    check(sqrt(difference) <= 1e-6 * sqrt(norm), "micro-batches of one: gradients differ by %.3g of their norm",
          sqrt(difference / norm));
}

// The dump's picture, of bytes; its boxes go over to the sample.
static void dump_sample(Sample *sample, const TruthDump *dump, int step, int i) {
    DumpImage image;
    float table[3 * 256];
    int others = 0;
    dump_image(dump, step, i, &image);
    memset(sample, 0, sizeof *sample);
    sample->image = image_new(image.width, image.height);
    sample->width = sample->original_width = image.width, sample->height = sample->original_height = image.height;
    sample->num_boxes = image.num_boxes, sample->boxes = image.boxes, sample->classes = image.classes;
    pixel_table(table);
    for (int k = 0; k < 3 * image.width * image.height; k++) {
        const int c = k % 3, byte = (int)lround(255 * (PIXEL_MEAN[c] + PIXEL_STD[c] * (double)image.pixels[k]));
        sample->image.pixels[k] = (unsigned char)byte;
        others += byte < 0 || byte > 255 || table[256 * c + byte] != image.pixels[k];
    }
    check(others == 0, "%s: step %d, image %d: %d pixels are no bytes", dump->folder, step, i, others);
    free(image.pixels);
}

// A network's first two steps against PyTorch's (dev/dump.h). In 16 bits only the first, for the reason that
// test_detr.c gives; bf16's errors may be 1.5 times those of PyTorch's autocast to bf16. fp16 has three bits more: four
// times an eighth of them.
template <class T>
static void test_dump(const char *folder) {
    const bool half = sizeof(T) == 2;
    const double times = !half ? 4 : std::is_same<T, __half>::value ? 4.0 / 8 : 1.5;
    enum { SIDE = 100, MOST_TARGETS = 10 };  // of any case
    DumpCase c;
    DeviceNetwork<T> n;
    Error error;
    if (dump_case_open(&c, folder, half ? "bf16" : "float32", times, 0) != 0) return;
    if (device_network_create(&n, &c.model, SIDE, SIDE, SIDE, DUMP_IMAGES, MOST_TARGETS, DUMP_IMAGES, 4096, false,
                              false, &error) != 0)
        check(0, "%s", error.text);
    const int L = c.model.config.dec_layers, Q = c.model.config.num_queries;
    LossScale scale = loss_scale_of<T>(c.model.loss_scale);
    for (int step = 0; step < (half ? 1 : DUMP_STEPS); step++) {
        Sample samples[DUMP_IMAGES];
        Array<int> match((size_t)(L * DUMP_IMAGES * Q)), of_image((size_t)(L * Q));
        Losses losses;
        const float scaled_by = scale.scale;
        for (int i = 0; i < DUMP_IMAGES; i++) dump_sample(&samples[i], &c.dump, step, i);
        device_step_begin(&n, &c.loss, &c.optimizer, samples, DUMP_IMAGES, c.seed, step, &losses);
        if (device_step_finish(&n, &scale, &error) != 0) check(0, "%s", error.text);
        CUDA(cudaMemcpy(match.device, n.loss.match, match.count * sizeof(int), cudaMemcpyDeviceToDevice));
        match.download();
        for (int i = 0; i < DUMP_IMAGES; i++) {
            for (int l = 0; l < L; l++)
                memcpy(of_image.host + l * Q, match.host + (l * DUMP_IMAGES + i) * Q, (size_t)Q * sizeof(int));
            compare_matches(&c.dump, &c.model, of_image.host, step, i);
        }
        device_params_copy(&n.params, &c.model, n.params.grad, &Param::grad, cudaMemcpyDeviceToHost);
        for (int i = 0; i < c.model.num_params; i++)
            for (size_t k = 0; c.model.params[i]->trained && k < c.model.params[i]->count; k++)
                c.model.params[i]->grad[k] /= scaled_by;
        compare_losses(&c.dump, &losses, step, L, half);
        compare_gradients(&c.dump, &c.model, step, losses.grad_norm);
        for (Sample &sample : samples) sample_free(&sample);
    }
    device_params_copy(&n.params, &c.model, n.params.value, &Param::value, cudaMemcpyDeviceToHost);
    if (!half) compare_values(&c.dump, &c.model);
    dump_case_close(&c, type_name<T>());
    device_network_free(&n);
}

static void test_dumps() {
    for (const char *folder : {"dev/dumps/gpu", "dev/dumps/gpu_anchor"}) {
        test_dump<float>(folder);
        test_dump<__nv_bfloat16>(folder);
        test_dump<__half>(folder);
    }
}

// The search for what is not finite looks at each of a tensor's numbers.
static void test_look() {
    Array<float> numbers(5);
    for (size_t bad = 0; bad <= numbers.count; bad++) {  // 5: all are finite
        Search search = {""};
        for (size_t i = 0; i < numbers.count; i++) numbers[i] = i == bad ? NAN : 1;
        numbers.upload();
        look(&search, numbers.device, numbers.count, "here");
        check(strcmp(search.name, bad < numbers.count ? "here" : "") == 0, "number %zu of 5 is not finite: \"%s\"", bad,
              search.name);
    }
}

// What stops a step is named as on the CPU, with the picture.
template <class T>
static void test_model_nonfinite() {
    static const char *const names[] = {"model.input_projection.weight", "gradient of the boxes", "logits",
                                        "encoder layer 1: query", NULL};
    for (int i = 0; i < 5; i++) {
        ModelCase c(1, 1, 2, 1);
        LossSettings settings = LOSS;
        Model *model = &c.model;
        if (i == 0) model->input_projection.weight->value[3] = NAN;
        if (i == 1) c.samples[2].boxes[2] = NAN;
        Param *const weights[] = {model->class_head.weight, model->encoder_attention[1].query.weight};
        for (size_t k = 0; i >= 2 && i < 4 && k < weights[i - 2]->count; k++) {
            float *weight = &weights[i - 2]->value[k];
            *weight = *weight > 0 ? 3e38f : -3e38f;  // their sums overflow
        }
        if (i == 4) settings.bbox_loss_coef = 1e300;  // a double has room for the loss
        model_pack(model);
        Activations acts;
        DeviceNetwork<T> n;
        Losses losses;
        Error error, cpu_error;
        LossScale scale = model->loss_scale;
        create_model_network(&n, c, MODEL_IMAGES, false);
        device_step_begin(&n, &settings, &OPTIMIZER, c.samples, MODEL_BATCH, 11, 0, &losses);
        const int failed = device_step_finish(&n, &scale, &error);
        Array<float> values(n.params.count);
        CUDA(cudaMemcpy(values.device, n.params.value, values.count * sizeof(float), cudaMemcpyDeviceToDevice));
        values.download();
        int changed = 0;
        for (int p = 0; p < model->num_params; p++)
            changed += memcmp(values.host + n.params.place[p], model->params[p]->value,
                              model->params[p]->count * sizeof(float)) != 0;
        device_network_free(&n);
        activations_create(&acts, model, 40, 72, 1, 1);
        const int cpu_failed =
            training_step(model, &acts, &settings, &OPTIMIZER, c.samples, MODEL_BATCH, 11, 0, &losses, &cpu_error);
        const char *ours = strchr(error.text, '"'), *theirs = strchr(cpu_error.text, '"');
        const char *image = i == 4 ? "step 1: the gradient" : i == 1 ? "step 1, image 2 of" : "step 1, image 0 of";
        check(failed == -1 && cpu_failed == -1 && ours && theirs && strcmp(ours, theirs) == 0 &&
                  (!names[i] || strstr(ours, names[i])) && strncmp(error.text, image, strlen(image)) == 0 &&
                  strncmp(cpu_error.text, image, strlen(image)) == 0,
              "a step that is not finite: ours: %s, the CPU's: %s", error.text, cpu_error.text);
        check(changed == 0, "a step that fails changes %d tensors", changed);
        activations_free(&acts);
    }
}

static void test_model() {
    test_model_of<float>(1, 1, 0);
    test_model_of<float>(0, 1, 1);
    test_model_of<__nv_bfloat16>(1, 0, 0);
    test_model_of<__nv_bfloat16>(0, 1, 1);
    test_model_of<__half>(0, 1, 0);
    test_look();
    test_model_nonfinite<float>();
    test_model_memory<float>(0, 1);
    // blocks whose inner maps are the largest behind some that are not trained, whose maps lie beside
    test_model_memory<__nv_bfloat16>(1, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Steps, of which two are under way

static unsigned long host_waits() {
#ifdef CUDA_EMU
    return emu::host_waited;
#else
    return 0;  // a GPU does not tell
#endif
}

// The host waits once a step, for the step before, and hears what it hears when nothing is under way meanwhile.
static void test_steps() {
    enum { STEPS = 4, FIRST = TRACK_STEPS - 2 };  // the norms follow in step 2 of 0 .. 3
    ModelCase c(0, 1, 1, 1);
    Error error;
    DeviceNetwork<float> n;
    Losses alone[STEPS], ahead[STEPS];
    LossScale scale = c.model.loss_scale;
    create_model_network(&n, c, MODEL_IMAGES, false);
    for (int step = 0; step < STEPS; step++) {
        device_step_begin(&n, &LOSS, &OPTIMIZER, c.samples, MODEL_BATCH, 11, FIRST + step, &alone[step]);
        if (device_step_finish(&n, &scale, &error) != 0) check(0, "%s", error.text);
    }
    device_network_free(&n);
    create_model_network(&n, c, MODEL_IMAGES, false);
    for (int step = 0; step <= STEPS; step++) {
        // Two batches are loaded where the norms follow: the second takes the feed that the step before has sent.
        const unsigned long before = host_waits(), copies = FIRST + step == TRACK_STEPS;
        if (step < STEPS)
            device_step_begin(&n, &LOSS, &OPTIMIZER, c.samples, MODEL_BATCH, 11, FIRST + step, &ahead[step]);
        check(host_waits() <= before + copies, "the host waits when step %d begins", step);
        if (step > 0 && device_step_finish(&n, &scale, &error) != 0) check(0, "%s", error.text);
        check(host_waits() <= before + copies + 1, "the host waits %d times in step %d", (int)(host_waits() - before),
              step);
#ifdef CUDA_EMU
        if (step < STEPS)
            check(cudaEventQuery(n.results[step % 2].done) == cudaErrorNotReady, "the host waits for step %d", step);
#endif
    }
    for (int step = 0; step < STEPS; step++)
        check(memcmp(&alone[step], &ahead[step], sizeof(Losses)) == 0, "step %d: a loss of %.9g is %.9g", step,
              alone[step].loss, ahead[step].loss);

    // A step whose loss is not finite, found when the next one, which would be, and for which the norms would follow,
    // is done too: nothing has changed, and the picture is found among the first one's.
    Array<float> values(n.params.count), after(n.params.count);
    Sample samples[MODEL_BATCH];
    double boxes[4 * 7] = {};
    memcpy((void *)samples, c.samples, sizeof samples);
    memcpy(boxes, samples[2].boxes, 4 * (size_t)samples[2].num_boxes * sizeof(double));
    boxes[2] = NAN, samples[2].boxes = boxes;
    CUDA(cudaMemcpy(values.device, n.params.value, values.count * sizeof(float), cudaMemcpyDeviceToDevice));
    device_step_begin(&n, &LOSS, &OPTIMIZER, samples, MODEL_BATCH, 11, 2 * TRACK_STEPS - 1, &ahead[0]);
    device_step_begin(&n, &LOSS, &OPTIMIZER, c.samples, MODEL_BATCH, 11, 2 * TRACK_STEPS, &ahead[1]);
    CUDA(cudaStreamSynchronize(stream));
    const int status = device_step_finish(&n, &scale, &error);
    check(status != 0 && strstr(error.text, "step 16, image 2 of the batch") &&
              strstr(error.text, "gradient of the boxes"),
          "%s", status ? error.text : "a loss that is not finite is none");
    CUDA(cudaMemcpy(after.device, n.params.value, values.count * sizeof(float), cudaMemcpyDeviceToDevice));
    values.download(), after.download();
    check(memcmp(values.host, after.host, values.count * sizeof(float)) == 0, "a step behind a bad one changes values");
    device_network_free(&n);

    // A step that fp16 leaves out, and the next one, which is taken.
    DeviceNetwork<__half> half;
    LossSettings bad = LOSS;
    bad.giou_loss_coef = 1e9;
    c.model.loss_scale.scale = FIRST_LOSS_SCALE;
    scale = c.model.loss_scale;
    create_model_network(&half, c, MODEL_IMAGES, false);
    device_step_begin(&half, &bad, &OPTIMIZER, c.samples, MODEL_BATCH, 11, 0, &ahead[0]);
    device_step_begin(&half, &LOSS, &OPTIMIZER, c.samples, MODEL_BATCH, 11, 1, &ahead[1]);
    const int first = device_step_finish(&half, &scale, &error), second = device_step_finish(&half, &scale, &error);
    check(first == 0 && second == 0 && ahead[0].grad_norm == 0 && ahead[1].grad_norm > 0 && scale.skipped == 1,
          "fp16: norms %g, %g, %d steps left out", ahead[0].grad_norm, ahead[1].grad_norm, scale.skipped);
    CUDA(cudaMemcpy(values.device, half.params.value, values.count * sizeof(float), cudaMemcpyDeviceToDevice));
    device_step_begin(&half, &LOSS, &OPTIMIZER, samples, MODEL_BATCH, 11, 2, &ahead[0]);  // a loss that no scale helps
    device_step_begin(&half, &LOSS, &OPTIMIZER, c.samples, MODEL_BATCH, 11, 3, &ahead[1]);
    const int third = device_step_finish(&half, &scale, &error);
    check(third != 0 && strstr(error.text, "step 3, image 2 of the batch"), "fp16: %s",
          third ? error.text : "a loss that is not finite is none");
    CUDA(cudaMemcpy(after.device, half.params.value, values.count * sizeof(float), cudaMemcpyDeviceToDevice));
    values.download(), after.download();
    check(memcmp(values.host, after.host, values.count * sizeof(float)) == 0,
          "fp16: a step behind a bad one changes values");
    device_network_free(&half);
}

// ---------------------------------------------------------------------------------------------------------------------
// Commands: what the CPU's write, on pictures that are cropped, mirrored and resized here

// Runs a command, its words between blanks, on the CPU or here, and keeps quiet.
static void run_command(bool gpu, const char *words) {
    static const auto cpu = engine;
    char *line = format_string("%s", words), *argv[64];
    int argc = 0, command = 0;
    for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    argv[argc] = NULL;
    while (strcmp(COMMANDS[command].name, argv[0]) != 0) command++;
    engine = cpu;
    if (gpu) engine.is_gpu = 1, engine.start = engine_start_on_gpu;
    Settings settings = settings_for("test_detr", argv[0], COMMANDS[command].command);
    Error error;
    fflush(stdout);
    const int output = dup(1), errors = dup(2), nowhere = open("/dev/null", O_WRONLY);
    dup2(nowhere, 1), dup2(nowhere, 2);
    optind = 0;  // getopt begins anew
    settings_parse(&settings, argc, argv);
    settings.command_line = words;
    const int status = COMMANDS[command].run(&settings, &error);
    fflush(stdout);
    dup2(output, 1), dup2(errors, 2);
    close(output), close(errors), close(nowhere);
    check(status == 0, "%s: %s", words, status ? error.text : "");
    engine = cpu;
    free(line);
}

// How many numbers of two JSON trees differ by more than `bound` of themselves, or of 1 if they are smaller; anything
// else that differs counts too. "seconds" are left out.
static int json_differences(yajl_val ours, yajl_val cpu, double bound) {
    int wrong = 0;
    if (!ours || !cpu || ours->type != cpu->type) return 1;
    if (YAJL_IS_NUMBER(ours)) {
        const double a = YAJL_GET_DOUBLE(ours), b = YAJL_GET_DOUBLE(cpu);
        return !(fabs(a - b) <= bound * fmax(1, fabs(b)));
    }
    if (YAJL_IS_STRING(ours)) return strcmp(ours->u.string, cpu->u.string) != 0;
    if (YAJL_IS_ARRAY(ours)) {
        if (ours->u.array.len != cpu->u.array.len) return 1;
        for (size_t i = 0; i < ours->u.array.len; i++)
            wrong += json_differences(ours->u.array.values[i], cpu->u.array.values[i], bound);
    }
    if (YAJL_IS_OBJECT(ours)) {
        if (ours->u.object.len != cpu->u.object.len) return 1;
        for (size_t i = 0; i < ours->u.object.len; i++)
            wrong += strcmp(ours->u.object.keys[i], cpu->u.object.keys[i]) != 0 ||
                     (strcmp(ours->u.object.keys[i], "seconds") != 0 &&
                      json_differences(ours->u.object.values[i], cpu->u.object.values[i], bound));
    }
    return wrong;
}

// The same file in both folders.
static void check_json(const char *folder, const char *name, double bound) {
    Error error;
    char *paths[2] = {format_string("%s/gpu/%s", folder, name), format_string("%s/cpu/%s", folder, name)};
    yajl_val trees[2] = {json_read(paths[0], &error), json_read(paths[1], &error)};
    const int wrong = json_differences(trees[0], trees[1], bound);
    check(wrong == 0, "%s: %d things are not the CPU's", name, wrong);
    for (int i = 0; i < 2; i++) yajl_tree_free(trees[i]), free(paths[i]);
}

// The norm of the difference of all tensors of a file, in norms of the CPU's.
static double tensors_differ(const char *folder, const char *name) {
    Error error;
    SafeFile files[2];
    double difference = 0, norm = 0;
    for (int gpu = 0; gpu < 2; gpu++) {
        char *path = format_string("%s/%s/%s", folder, gpu ? "gpu" : "cpu", name);
        if (safetensors_open(&files[gpu], path, &error) != 0) return check(0, "%s", error.text), NAN;
        free(path);
    }
    for (int i = 0; i < files[0].count; i++) {
        const SafeEntry *cpu = &files[0].entries[i], *ours = safetensors_find(&files[1], cpu->name);
        if (!ours || ours->count != cpu->count) return check(0, "%s: %s", name, cpu->name), NAN;
        for (int64_t k = 0; k < cpu->count; k++) {
            const double a = safetensors_element(ours, k), b = safetensors_element(cpu, k);
            const float number = (float)a;
            uint32_t bits;
            memcpy(&bits, &number, sizeof bits);
            all_bytes = (all_bytes ^ bits) * 1099511628211u;
            difference += (a - b) * (a - b), norm += b * b;
        }
    }
    for (SafeFile &file : files) safetensors_close(&file);
    return sqrt(difference / norm);
}

static void test_commands() {
    char folder[] = "/tmp/test_commands_XXXXXX";
    if (!mkdtemp(folder)) return check(0, "no folder in /tmp");
    char *words = format_string(
        "bccd=$PWD/data/bccd; mkdir -p %s/cpu %s/gpu %s/data/ImageSets/Main && cd %s/data && "
        "ln -s $bccd/JPEGImages $bccd/Annotations . && head -n 8 $bccd/ImageSets/Main/train.txt "
        ">ImageSets/Main/train.txt"
        " && head -n 2 $bccd/ImageSets/Main/val.txt >ImageSets/Main/val.txt",
        folder, folder, folder, folder);
    check(system(words) == 0, "%s", words);
    free(words);
    for (int gpu = 0; gpu < 2; gpu++) {
        const char *to = gpu ? "gpu" : "cpu";
        // An epoch of four steps, of which two are under way, and its evaluation
        words = format_string(
            "train --data %s/data --output_dir %s/%s/run --epochs 1 --batch_size 2 --num_workers 0 --short_side 48 "
            "--max_size 64 --backbone tiny --hidden_dim 64 --nheads 2 --enc_layers 1 --dec_layers 2 --dim_feedforward "
            "72 --num_queries 25 --vflip --transpose",
            folder, folder, to);
        run_command(gpu, words);
        free(words);
        words = format_string("eval --data %s/data --resume %s/cpu/run --results %s/%s/results --num_workers 0", folder,
                              folder, folder, to);
        run_command(gpu, words);
        free(words);
        words = format_string(
            "predict --resume %s/cpu/run --json %s/%s/found --threshold 0 --num_workers 0 "
            "data/bccd/JPEGImages/BloodImage_00007.jpg data/bccd/JPEGImages/BloodImage_00011.jpg",
            folder, folder, to);
        run_command(gpu, words);
        free(words);
    }
    const double difference = tensors_differ(folder, "run/model.safetensors");
    // 1e-8 on the emulator; where one run lacks --vflip, 7e-4
    check(difference < 1e-6, "weights after training differ by %.3g", difference);
    check_json(folder, "run/log.txt", 1e-4);
    check_json(folder, "results", 1e-4);
    check_json(folder, "found", 1e-4);
    words = format_string("rm -r %s", folder);
    check(system(words) == 0, "%s", words);
    free(words);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------

// A profile has each launch while it is on, with the bytes that it has to move.
static void test_profile() {
    enum { COUNT = 3 * 8 * THREADS };
    Array<float> x(COUNT);
    Array<__nv_bfloat16> y(COUNT);
    for (size_t i = 0; i < COUNT; i++) x[i] = (double)i;
    x.upload();
    profile.on = 1, profile.count = 0;
    const double begin = seconds_now();
    gpu_round(y.device, x.device, COUNT);
    gpu_sigmoid(x.device, x.device, COUNT);
    gpu_round(y.device, x.device, COUNT);
    CUDA(cudaStreamSynchronize(stream));
    book_launches();
    const double wall = seconds_now() - begin;
    profile.on = 0;
    gpu_round(y.device, x.device, COUNT);
    CUDA(cudaStreamSynchronize(stream));
    book_launches();
    const ProfileLine *round = &profile.lines[0], *sigmoid = &profile.lines[1];
    check(profile.count == 2 && round->calls == 2 && sigmoid->calls == 1, "%d lines, %ld and %ld calls", profile.count,
          round->calls, sigmoid->calls);
    check(!strcmp(round->work, "round") && !strcmp(sigmoid->work, "sigmoid"), "they are called %s and %s", round->work,
          sigmoid->work);
    check(round->bytes == 12.0 * COUNT && sigmoid->bytes == 8.0 * COUNT, "%g and %g bytes", round->bytes,
          sigmoid->bytes);
    check(round->seconds > 0 && sigmoid->seconds > 0 && round->seconds + sigmoid->seconds < wall,
          "%g and %g s of %g together", round->seconds, sigmoid->seconds, wall);
}

static const Test TESTS[] = {
    {"profile", test_profile},   {"ragged", test_ragged},       {"rows", test_rows},
    {"feed", test_feed},         {"pictures", test_pictures},   {"epilogue", test_epilogue},
#ifdef HAVE_CUBLASLT
    {"linear", test_linear},     {"model", test_model},         {"steps", test_steps},
    {"commands", test_commands}, {"dumps", test_dumps},
#endif
    {"conv", test_conv},         {"maxpool", test_maxpool},     {"positions", test_positions},
    {"dropout", test_dropout},   {"attention", test_attention}, {"norm", test_norm},
    {"set_loss", test_set_loss}, {"optimizer", test_optimizer}, {"loss_scale", test_loss_scale}};

// The emulator's checker sees in one schedule what would go wrong in another; a test of whole programs takes a minute.
#ifdef __SANITIZE_THREAD__
enum { SCHEDULES = 1 };
#else
enum { SCHEDULES = 3 };
#endif

static void run_test(const Test *test) {
    uint64_t bytes = 0;
    const int schedules = strcmp(test->name, "commands") == 0 ? 1 : SCHEDULES;
    for (int schedule = 0; schedule < schedules; schedule++) {
#ifdef CUDA_EMU
        emu::reseed((uint64_t)schedule + 1);
#endif
        all_bytes = 0;
        test->run();
        if (schedule == 0) bytes = all_bytes;
        check(bytes == all_bytes, "%s: run %d gives other bytes", test->name, schedule);
    }
}

int main(int argc, char **argv) {
    cudaDeviceProp device;
    CUDA(cudaGetDeviceProperties(&device, 0));
    device_begin();
    printf("kernels run on: %s\n", device.name);
    return run_tests(TESTS, (int)(sizeof TESTS / sizeof TESTS[0]), run_test, argc, argv);
}
