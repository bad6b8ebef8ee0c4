/*
train_detr.cu: DETR's training on an NVIDIA GPU of compute capability 8.0 and newer. All of train_detr.c is part of it:
the configuration, the table of parameters, the boxes' mathematics, the commands are there once, and it is the reference
that each kernel here is held against (test_detr.cu). It has run on dev/emu only, never on a GPU.
doc/8-the-cuda-version.md says what is there, what is not, and what each kernel costs.

Read it after train_detr.c, whose order it keeps: an image on its way to a loss, then to a step of the optimizer.

    Device        errors, memory that is planned before it is used
    Feed          what comes from the host, while kernels run
    Numbers       how a kernel reads and writes: eight at a time, stored as float, bf16 or fp16
    Ragged        a micro-batch: the rows of all its images one after another
    Sums          the two passes that every sum over rows takes
    Parameters    where they lie, and what products read instead of them
    Pictures      from what a file holds to what the network sees
    Epilogue      what happens to a product's sums before they are written
    Tensor cores  and asynchronous copies: the instructions
    Linear layers by cuBLASLt
    Convolutions  as products whose rows are looked up (implicit GEMM), forward and backward
    Max pooling   forward and backward
    Positions     of tokens and of queries
    Dropout       masks that are asked for again, never stored
    Attention     forward and backward, scores never in memory
    Layer norm    with the residual sum before it, forward and backward
    Set loss      matching, losses and their gradients
    Optimizer     norm of the gradient, AdamW, the loss's scale
    Network       of these kernels: memory, forward, backward, the training step
    Commands      train, eval, predict, bench

Conventions. A kernel is called NAME_kernel, and the function that launches it gpu_NAME: that one has the contract. All
launches go to `stream`. Every channel count is a multiple of 8, but for the picture's three colours, the classes and
the four numbers of a box; so a row of any type is whole pieces of 16 bytes, and a thread has eight channels of one row.
T is the type that activations and operands are stored as: float, __nv_bfloat16 or __half; sums are floats, and doubles
where there are few of them. No atomics on floats: every sum has an order that depends on shapes alone.
*/
#ifdef __CUDACC__
#pragma nv_diag_suppress 1675  // nvcc does not know `#pragma GCC unroll`; the host's compiler, which gets it, does
#endif
#define MAIN main_of_commands
#include "train_detr.c"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <initializer_list>
#include <type_traits>
#if __has_include(<cublasLt.h>)  // the emulator can do without: then there are no linear layers
#define HAVE_CUBLASLT
#include <cublasLt.h>
#endif

#include "program/ptx.h"

static_assert(std::is_same<real, float>::value, "the CUDA version is built with REAL=float");

// ---------------------------------------------------------------------------------------------------------------------
// Device

static void cuda_check(cudaError_t error, const char *file, int line) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "error: %s:%d: CUDA: %s\n", file, line, cudaGetErrorString(error));
    exit(1);
}
#define CUDA(call) cuda_check((call), __FILE__, __LINE__)

static cudaStream_t stream;  // that all kernels run in, one after another

// Before everything else on the device. Not the default stream, which every other one would wait for; but a synchronous
// copy, which is in that one, comes behind what is in `stream`, and before what will be.
static void device_begin() {
    if (!stream) CUDA(cudaStreamCreate(&stream));
}

enum { THREADS = 256, WARPS = THREADS / 32 };  // of nearly all blocks

// Blocks of a launch in which each does `per_block` of `count` things.
static unsigned blocks(size_t count, size_t per_block) { return (unsigned)divide_up(count, per_block); }

// More shared memory than every kernel has, 48 KB, has to be asked for.
template <class K>
static void allow_shared(K *kernel, size_t bytes) {
    if (bytes > 48 << 10) CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// arena_allocate() of train_detr.c on the device: a walk that took from an Arena without memory is followed by this and
// the same walk again. Nothing is allocated after it.
static void device_arena_allocate(Arena *arena) {
    arena->capacity = arena->used;
    arena->used = 0;
    CUDA(cudaMalloc((void **)&arena->base, arena->capacity));
}

// What bench --profile says of a launch, from here to the end of the block or to the next Timed in it: two events in
// `stream`, which are read when the host has waited. flops and bytes: what is to be done at least, 0 where that depends
// on the data. Without a profile it is nothing.
typedef struct {
    const char *work, *pass;
    double flops, bytes;
    cudaEvent_t begin, end;
} TimedLaunch;

static struct {
    TimedLaunch *launches;
    int count, made;  // of which so many have events
    bool open;
} timed;

struct Timed {
    Timed(const char *work, const char *pass, double bytes, double flops = 0) {
        if (!profile.on) return;
        end();
        if (timed.count == timed.made) {
            timed.launches = (TimedLaunch *)grow(timed.launches, (size_t)timed.made, sizeof(TimedLaunch));
            CUDA(cudaEventCreate(&timed.launches[timed.made].begin));
            CUDA(cudaEventCreate(&timed.launches[timed.made++].end));
        }
        TimedLaunch *launch = &timed.launches[timed.count++];
        launch->work = work, launch->pass = pass, launch->flops = flops, launch->bytes = bytes;
        CUDA(cudaEventRecord(launch->begin, stream));
        timed.open = true;
    }
    ~Timed() { end(); }
    static void end() {
        if (timed.open) CUDA(cudaEventRecord(timed.launches[timed.count - 1].end, stream));
        timed.open = false;
    }
};

// Books what was launched, after the host has waited for `stream`.
static void book_launches() {
    for (int i = 0; i < timed.count; i++) {
        const TimedLaunch *launch = &timed.launches[i];
        float milliseconds;
        CUDA(cudaEventElapsedTime(&milliseconds, launch->begin, launch->end));
        profile_add(launch->work, launch->pass, 1e-3 * (double)milliseconds, launch->flops, launch->bytes);
    }
    timed.count = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Feed. What kernels need of the host comes batch by batch, each in one copy: the host takes room in pinned memory and
// fills it, the copy has a stream of its own, and `stream` waits for its event, not the host. All is there twice, so
// that one batch is filled and copied while kernels read the other. In turn, for each batch:
//
//     feed_begin, feed_take ..., feed_send; launches of kernels that read what was sent; feed_end
//
// What is sent before the host waits for results of the batch before is on its way while that is computed.

typedef struct {
    Arena host[2];  // pinned; what is taken lies at the same place in device[turn]
    char *device[2];
    int turn;
    cudaStream_t stream;             // of the copies
    cudaEvent_t copied[2], read[2];  // the copy has ended; so have the kernels
} Feed;

// Its bytes, on the device and in pinned memory alike, when it is made or counted.
static size_t feed_bytes(const Feed *feed) { return 2 * feed->host[0].capacity; }

// bytes: of a batch, what is taken being rounded up to 64 each time.
static void feed_create(Feed *feed, size_t bytes) {
    memset((void *)feed, 0, sizeof *feed);
    CUDA(cudaStreamCreateWithFlags(&feed->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; i++) {
        feed->host[i].capacity = bytes;
        CUDA(cudaMallocHost((void **)&feed->host[i].base, bytes));
        CUDA(cudaMalloc((void **)&feed->device[i], bytes));
        CUDA(cudaEventCreateWithFlags(&feed->copied[i], cudaEventDisableTiming));
        CUDA(cudaEventCreateWithFlags(&feed->read[i], cudaEventDisableTiming));
    }
}

static void feed_free(Feed *feed) {
    for (int i = 0; i < 2; i++) {
        CUDA(cudaEventDestroy(feed->copied[i]));
        CUDA(cudaEventDestroy(feed->read[i]));
        CUDA(cudaFreeHost(feed->host[i].base));
        CUDA(cudaFree(feed->device[i]));
    }
    CUDA(cudaStreamDestroy(feed->stream));
    memset((void *)feed, 0, sizeof *feed);
}

// Waits until the batch before the last has been copied, whose memory this one takes.
static void feed_begin(Feed *feed) {
    feed->turn ^= 1;
    feed->host[feed->turn].used = 0;
    CUDA(cudaEventSynchronize(feed->copied[feed->turn]));
}

// Room for `count` of V, which the caller fills before feed_send(); *device: where kernels find them, on 64 bytes.
template <class V>
static V *feed_take(Feed *feed, size_t count, const V **device) {
    Arena *host = &feed->host[feed->turn];
    V *memory = (V *)arena_bytes(host, count * sizeof(V));
    *device = (const V *)(feed->device[feed->turn] + ((char *)memory - host->base));
    return memory;
}

// Copies what was taken, as soon as kernels have read what lies there; what is launched in `stream` from now on reads
// it.
static void feed_send(Feed *feed) {
    const Arena *host = &feed->host[feed->turn];
    CUDA(cudaStreamWaitEvent(feed->stream, feed->read[feed->turn], 0));
    CUDA(cudaMemcpyAsync(feed->device[feed->turn], host->base, host->used, cudaMemcpyHostToDevice, feed->stream));
    CUDA(cudaEventRecord(feed->copied[feed->turn], feed->stream));
    CUDA(cudaStreamWaitEvent(stream, feed->copied[feed->turn], 0));
}

// Behind the last launch that reads what was sent.
static void feed_end(Feed *feed) { CUDA(cudaEventRecord(feed->read[feed->turn], stream)); }

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

HOST_DEVICE static inline float to_float(float x) { return x; }
HOST_DEVICE static inline double to_float(double x) { return x; }
HOST_DEVICE static inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
HOST_DEVICE static inline float to_float(__half x) { return __half2float(x); }

template <class T>
HOST_DEVICE static inline T to_type(float x) {
    if constexpr (std::is_same<T, float>::value)
        return x;
    else if constexpr (std::is_same<T, __half>::value)
        return __float2half(x);
    else
        return __float2bfloat16(x);
}

typedef struct {
    float x[8];
} Eight;

// Eight numbers at `from`, which lies on 16 bytes, in loads of 16 bytes.
template <class T>
__device__ static inline Eight load8(const T *from) {
    constexpr int count = 16 / (int)sizeof(T);
    Eight value;
#pragma unroll
    for (int i = 0; i < 8; i += count) {
        const uint4 piece = *(const uint4 *)(from + i);
        T numbers[count];
        memcpy((void *)numbers, &piece, sizeof piece);
#pragma unroll
        for (int j = 0; j < count; j++) value.x[i + j] = to_float(numbers[j]);
    }
    return value;
}

template <class T>
__device__ static inline void store8(T *to, const Eight &value) {
    constexpr int count = 16 / (int)sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += count) {
        T numbers[count];
#pragma unroll
        for (int j = 0; j < count; j++) numbers[j] = to_type<T>(value.x[i + j]);
        uint4 piece;
        memcpy(&piece, (const void *)numbers, sizeof piece);
        *(uint4 *)(to + i) = piece;
    }
}

// Where a thread's eight numbers of `count` are, or -1 for a thread that has none.
__device__ static inline int64_t place8(size_t count) {
    const size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 8;
    return at < count ? (int64_t)at : -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Ragged: the images of a micro-batch keep their sizes. A tensor has the rows of the first image, then those of the
// second, and so on, with nothing between. What works on rows alone (linear layers, norms, sums) never notices. What
// has to know its image, for its neighbours or its random numbers, finds it by its row in a table, of which there is
// one for each size that a map has on its way through the network.

typedef struct {
    int first, height, width;  // rows first .. first + height * width are the image's pixels, line after line
    int image;                 // its place in the batch: dropout's masks are made from it
} Segment;

typedef struct {
    const Segment *segments;  // device, by `first`
    int count, rows;          // images, rows of all
} Ragged;

// The number of the segment that holds a row.
__device__ static int find_segment(Ragged map, int row) {
    int low = 0, high = map.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (map.segments[middle].first <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// What becomes of the segments of `count` images in a convolution or pooling of this shape, or with NULL what they are
// themselves: all is copied but `first`, which is counted anew. Returns the number of rows, or -1 if there are more
// than an int can count.
static int ragged_segments(Segment *to, const Segment *from, int count, const ConvShape *shape) {
    int64_t rows = 0;
    for (int i = 0; i < count; i++) {
        to[i] = from[i];
        if (shape) to[i].height = conv_size(from[i].height, *shape), to[i].width = conv_size(from[i].width, *shape);
        to[i].first = (int)rows;
        rows += (int64_t)to[i].height * to[i].width;
        if (rows > INT32_MAX) return -1;
    }
    return (int)rows;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums over rows take two passes: a block sums CHUNK_ROWS rows to one row of partial sums, then those are added up in
// their order. The result depends on the number of rows, not on which block came first.

enum { CHUNK_ROWS = 64 };

// The warp's sum, to all lanes.
template <class R>
__device__ static inline R warp_sum(R value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// The sum of a block of THREADS threads, to all of them. shared: (WARPS), free again afterwards.
__device__ static double block_sum(double value, double *shared) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < WARPS; i++) sum += shared[i];
    __syncthreads();
    return sum;
}

__device__ static void add_partial_sums(float *first, float *second, const float *partials, int chunks, int C,
                                        int columns) {
    __shared__ double sums[WARPS][32];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, column = (int)blockIdx.x * 32 + lane;
    double sum = 0;
    for (int chunk = warp; chunk < chunks && column < columns; chunk += WARPS)
        sum += partials[(size_t)chunk * columns + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    for (int i = 1; i < WARPS; i++) sum += sums[i][lane];
    float *to = column < C ? first + column : second + (column - C);
    *to += (float)sum;
}

__global__ static void __launch_bounds__(THREADS)
    add_partials_kernel(float *first, float *second, const float *partials, int chunks, int C, int columns) {
    add_partial_sums(first, second, partials, chunks, C, columns);
}

// first and second (C) += the sums of partials (chunks, 2, C), or first alone of (chunks, C) if second is NULL.
static void gpu_add_partials(float *first, float *second, const float *partials, int chunks, int C) {
    const int columns = second ? 2 * C : C;
    const Timed timed_sums("add_partials", "", 4.0 * ((double)chunks + 2) * columns);
    add_partials_kernel<<<blocks((size_t)columns, 32), THREADS, 0, stream>>>(first, second, partials, chunks, C,
                                                                             columns);
    CUDA(cudaGetLastError());
}

template <class T>
__device__ static void sum_columns(float *partials, const T *x, int rows, int C) {
    __shared__ float sums[WARPS][THREADS];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int first = (int)blockIdx.x * CHUNK_ROWS, column = (int)blockIdx.y * THREADS + 8 * lane;
    Eight sum = {};
    if (column < C) {
        for (int row = first + warp; row < rows && row < first + CHUNK_ROWS; row += WARPS) {
            const T *from = x + (size_t)row * C + column;
            Eight value = {};
            if (C % 8 == 0) value = load8(from);
            for (int j = 0; C % 8 != 0 && j < 8 && column + j < C; j++) value.x[j] = to_float(from[j]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum.x[j] += value.x[j];
        }
    }
    store8(&sums[warp][8 * lane], sum);
    __syncthreads();
    const int mine = (int)blockIdx.y * THREADS + (int)threadIdx.x;
    if (mine >= C) return;
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += sums[i][threadIdx.x];
    partials[(size_t)blockIdx.x * C + mine] = total;
}

template <class T>
__global__ static void __launch_bounds__(THREADS) column_sums_kernel(float *partials, const T *x, int rows, int C) {
    sum_columns(partials, x, rows, C);
}

// sums (C) += the sum over the rows of x (rows, C): the gradient of a bias; C may be any number. partials:
// (divide_up(rows, CHUNK_ROWS), C).
template <class T>
static void gpu_column_sums(float *sums, float *partials, const T *x, int rows, int C) {
    const dim3 grid(blocks((size_t)rows, CHUNK_ROWS), blocks((size_t)C, THREADS));
    const Timed timed_sums("column_sums", "", (double)sizeof(T) * rows * C);
    column_sums_kernel<T><<<grid, THREADS, 0, stream>>>(partials, x, rows, C);
    CUDA(cudaGetLastError());
    gpu_add_partials(sums, NULL, partials, (int)grid.x, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters. All numbers of the table lie in one array, those that are trained first, so that gradients, Adam's
// moments and averages are arrays with the same places. Each tensor begins a chunk, and a chunk is what a block of the
// optimizer does. `operand` has at the same places what products read: the values rounded to T, and for convolutions
// the values times the scale of the frozen norm behind them.

enum {
    PARAM_CHUNK = 1024,  // numbers
    NORM_CHUNKS = 8,     // that one block squares and sums
    KIND_BACKBONE = 1,   // a chunk's bits: its learning rate is the backbone's;
    KIND_FOLDED = 2,     // its operand has a scale in it, so the optimizer leaves it to gpu_fold
};

// A convolution with the frozen norm behind it, all in device memory. Gradients are NULL where nothing is trained.
typedef struct {
    float *weight;                         // (filters, length)
    const float *norm_weight, *norm_bias;  // (filters)
    float *norm_mean, *norm_variance;      // (filters)
    void *operand;                         // (filters, length): weight * scale
    float *scale, *bias;                   // (filters), as in Layer
    void *bias_operand;                    // (filters): bias, rounded to T
    float *dweight, *dnorm_weight;
    const float *dnorm_bias;
    int first, length;  // how many filters come before its own; numbers of a filter
    double size;        // the length that standardise_filters() gives a filter
} Folded;

// The numbers of one step, as optimizer_step() has them; [1] is the backbone's.
typedef struct {
    float decay[2], rate[2], root, share;
    float factor;  // of the gradient: clipping and 1 / scale
    int finite;    // else nothing changes
    int failed;    // and the loss's scale cannot help: nothing will change any more
} AdamwStep;

typedef struct {
    Arena arena;
    int tracks;             // --norm_init track: filters are standardised behind each step
    size_t *place;          // host: where in the arrays each tensor of the model's table begins
    size_t trained, count;  // numbers: of trained tensors, of all, whole chunks
    float *value, *grad, *exp_avg, *exp_avg_sq, *ema;  // (count), (trained), ...; ema NULL where the model has none
    void *operand;                                     // (count) of T
    unsigned char *kinds;                              // (trained / PARAM_CHUNK)
    Folded *folded;
    int num_folded, num_filters;        // convolutions with a norm, their filters
    size_t folded_count;                // their weights
    float *scale, *bias;                // (num_filters)
    void *bias_operand;                 // (num_filters) of T
    double *norm_partials, *grad_norm;  // grad_norm (1): of the step's gradients, without the loss's scale
    LossScale *loss_scale;              // (1)
    AdamwStep *step;                    // (1)
} DeviceParams;

// Takes its memory. number_bytes: of T.
static void device_params_walk(DeviceParams *d, const Model *model, size_t number_bytes) {
    Arena *arena = &d->arena;
    d->count = 0;
    for (int untrained = 0; untrained < 2; untrained++) {
        for (int i = 0; i < model->num_params; i++) {
            if (model->params[i]->trained == untrained) continue;
            d->place[i] = d->count;
            d->count += round_up(model->params[i]->count, PARAM_CHUNK);
        }
        if (!untrained) d->trained = d->count;
    }
    d->num_folded = d->num_filters = 0, d->folded_count = 0;
    d->tracks = model->track_norms;
    for (int i = 0; i < model->num_layers; i++) {
        if (!model->layers[i]->norm_weight) continue;
        d->num_folded++, d->num_filters += model->layers[i]->shape.out_channels;
        d->folded_count += model->layers[i]->weight->count;
    }
    d->value = arena_take(arena, d->count);
    d->operand = arena_bytes(arena, d->count * number_bytes);
    d->grad = arena_take(arena, d->trained);
    d->exp_avg = arena_take(arena, d->trained);
    d->exp_avg_sq = arena_take(arena, d->trained);
    d->ema = model->ema.base ? arena_take(arena, d->trained) : NULL;
    d->kinds = (unsigned char *)arena_bytes(arena, d->trained / PARAM_CHUNK);
    d->folded = (Folded *)arena_bytes(arena, (size_t)d->num_folded * sizeof(Folded));
    d->scale = arena_take(arena, (size_t)d->num_filters);
    d->bias = arena_take(arena, (size_t)d->num_filters);
    d->bias_operand = arena_bytes(arena, (size_t)d->num_filters * number_bytes);
    d->norm_partials = (double *)arena_bytes(arena, divide_up(d->trained, NORM_CHUNKS * PARAM_CHUNK) * sizeof(double));
    d->grad_norm = (double *)arena_bytes(arena, sizeof(double));
    d->loss_scale = (LossScale *)arena_bytes(arena, sizeof(LossScale));
    d->step = (AdamwStep *)arena_bytes(arena, sizeof(AdamwStep));
}

// Where a tensor is in the arrays.
static size_t device_place(const DeviceParams *d, const Model *model, const Param *param) {
    int i = 0;
    while (model->params[i] != param) i++;
    return d->place[i];
}

// One field of all tensors (&Param::value, &Param::exp_avg ...) to the device's array of it, or back.
static void device_params_copy(const DeviceParams *d, const Model *model, float *array, real *Param::*field,
                               cudaMemcpyKind kind) {
    for (int i = 0; i < model->num_params; i++) {
        real *host = model->params[i]->*field;
        const size_t bytes = model->params[i]->count * sizeof(real);
        if (host && kind == cudaMemcpyHostToDevice) CUDA(cudaMemcpy(array + d->place[i], host, bytes, kind));
        if (host && kind == cudaMemcpyDeviceToHost) CUDA(cudaMemcpy(host, array + d->place[i], bytes, kind));
    }
}

template <class T>
__global__ static void __launch_bounds__(THREADS) round_kernel(T *y, const float *x, size_t count) {
    const int64_t at = place8(count);
    if (at >= 0) store8(y + at, load8(x + at));
}

// y = x rounded to T; count: a multiple of 8.
template <class T>
static void gpu_round(T *y, const float *x, size_t count) {
    const Timed timed_kernel("round", "", (4.0 + sizeof(T)) * (double)count);
    round_kernel<T><<<blocks(count, 8 * THREADS), THREADS, 0, stream>>>(y, x, count);
    CUDA(cudaGetLastError());
}

// The convolution that the block's filter belongs to.
__device__ static int find_convolution(const Folded *layers, int count) {
    int i = 0;
    while (i + 1 < count && layers[i + 1].first <= (int)blockIdx.x) i++;
    return i;
}

// As in fold_norm().
__device__ static inline void set_norm(const Folded &layer, int n, float scale) {
    layer.scale[n] = scale;
    layer.bias[n] = norm_shift(layer.norm_bias[n], layer.norm_mean[n], scale);
}

template <class T>
__global__ static void __launch_bounds__(THREADS) fold_kernel(const Folded *layers, int count) {
    const Folded layer = layers[find_convolution(layers, count)];
    const int n = (int)blockIdx.x - layer.first;
    const float scale = norm_scale(layer.norm_weight[n], layer.norm_variance[n]);
    const float *weight = layer.weight + (size_t)n * layer.length;
    T *operand = (T *)layer.operand + (size_t)n * layer.length;
    for (int k = (int)threadIdx.x; k < layer.length; k += THREADS) operand[k] = to_type<T>(weight[k] * scale);
    if (threadIdx.x > 0) return;
    set_norm(layer, n, scale);
    ((T *)layer.bias_operand)[n] = to_type<T>(layer.bias[n]);
}

// The operands, scales and biases of all convolutions with a frozen norm, as layers_pack() has them; a block does a
// filter. After values have changed.
template <class T>
static void gpu_fold(const DeviceParams *d) {
    const Timed timed_kernel("fold", "", (4.0 + sizeof(T)) * (double)d->folded_count);
    fold_kernel<T><<<(unsigned)d->num_filters, THREADS, 0, stream>>>(d->folded, d->num_folded);
    CUDA(cudaGetLastError());
}

__global__ static void __launch_bounds__(THREADS) unfold_kernel(const Folded *layers, int count) {
    __shared__ double shared[WARPS];
    const Folded layer = layers[find_convolution(layers, count)];
    const int n = (int)blockIdx.x - layer.first;
    if (!layer.dweight) return;
    const float scale = layer.scale[n], *weight = layer.weight + (size_t)n * layer.length;
    float *dweight = layer.dweight + (size_t)n * layer.length;
    double product = 0;
    for (int k = (int)threadIdx.x; k < layer.length; k += THREADS) {
        const float gradient = dweight[k];
        if (layer.dnorm_weight) product += (double)gradient * (double)weight[k];
        dweight[k] = gradient * scale;
    }
    if (!layer.dnorm_weight) return;
    product = block_sum(product, shared);
    const double r = 1 / sqrt((double)layer.norm_variance[n] + 1e-5);
    if (threadIdx.x == 0)
        layer.dnorm_weight[n] = (float)(r * (product - (double)layer.norm_mean[n] * (double)layer.dnorm_bias[n]));
}

// unfold_norms(): from the gradients of folded weights and biases, which lie in dweight and dnorm_bias, to those of
// what is stored.
static void gpu_unfold(const DeviceParams *d) {
    const Timed timed_kernel("unfold", "", 8.0 * (double)d->folded_count);
    unfold_kernel<<<(unsigned)d->num_filters, THREADS, 0, stream>>>(d->folded, d->num_folded);
    CUDA(cudaGetLastError());
}

__global__ static void __launch_bounds__(THREADS)
    standardise_kernel(const Folded *layers, int count, const AdamwStep *step) {
    __shared__ double shared[WARPS];
    if (!step->finite) return;
    const Folded layer = layers[find_convolution(layers, count)];
    float *filter = layer.weight + (size_t)((int)blockIdx.x - layer.first) * layer.length;
    double sum = 0, squares = 0;
    for (int k = (int)threadIdx.x; k < layer.length; k += THREADS) sum += (double)filter[k];
    const float mean = (float)(block_sum(sum, shared) / layer.length);
    for (int k = (int)threadIdx.x; k < layer.length; k += THREADS) {
        const float x = filter[k] - mean;
        filter[k] = x;
        squares += (double)x * (double)x;
    }
    const float factor = (float)(layer.size / fmax(sqrt(block_sum(squares, shared)), 1e-12));
    for (int k = (int)threadIdx.x; k < layer.length; k += THREADS) filter[k] *= factor;
}

// standardise_filters(), where the last step was taken; a block does a filter.
static void gpu_standardise(const DeviceParams *d) {
    const Timed timed_kernel("standardise", "", 8.0 * (double)d->folded_count);
    standardise_kernel<<<(unsigned)d->num_filters, THREADS, 0, stream>>>(d->folded, d->num_folded, d->step);
    CUDA(cudaGetLastError());
}

// How the loss's scale stands where T multiplies: as a run before left it; at the beginning if there was none.
template <class T>
static LossScale loss_scale_of(LossScale scale) {
    if (!std::is_same<T, __half>::value)
        scale.scale = 1, scale.good_steps = 0;
    else if (scale.scale == 0)
        scale.scale = FIRST_LOSS_SCALE;
    return scale;
}

template <class T>
static void loss_scale_upload(const DeviceParams *d, LossScale scale) {
    scale = loss_scale_of<T>(scale);
    CUDA(cudaMemcpy(d->loss_scale, &scale, sizeof scale, cudaMemcpyHostToDevice));
}

// The device's side of a model: parameters and the optimizer's state as the model has them now, gradients zero.
template <class T>
static void device_params_create(DeviceParams *d, const Model *model) {
    memset(d, 0, sizeof *d);
    d->place = (size_t *)allocate((size_t)model->num_params * sizeof(size_t));
    device_params_walk(d, model, sizeof(T));
    device_arena_allocate(&d->arena);
    device_params_walk(d, model, sizeof(T));
    CUDA(cudaMemset(d->arena.base, 0, d->arena.capacity));  // what completes a chunk stays zero
    const cudaMemcpyKind to_device = cudaMemcpyHostToDevice;
    device_params_copy(d, model, d->value, &Param::value, to_device);
    device_params_copy(d, model, d->exp_avg, &Param::exp_avg, to_device);
    device_params_copy(d, model, d->exp_avg_sq, &Param::exp_avg_sq, to_device);
    if (d->ema) device_params_copy(d, model, d->ema, &Param::ema, to_device);

    unsigned char *kinds = (unsigned char *)allocate(d->trained / PARAM_CHUNK);
    for (int i = 0; i < model->num_params; i++)
        for (size_t k = 0; model->params[i]->trained && k < model->params[i]->count; k += PARAM_CHUNK)
            kinds[(d->place[i] + k) / PARAM_CHUNK] = model->params[i]->group == GROUP_BACKBONE ? KIND_BACKBONE : 0;
    Folded *folded = (Folded *)allocate((size_t)d->num_folded * sizeof(Folded)), *next = folded;
    int filters = 0;
    for (int i = 0; i < model->num_layers; i++) {
        const Layer *layer = model->layers[i];
        if (!layer->norm_weight) continue;
        const Param *params[5] = {layer->weight, layer->norm_weight, layer->norm_bias, layer->norm_mean,
                                  layer->norm_variance};
        float *values[5], *grads[5];
        for (int p = 0; p < 5; p++) {
            const size_t place = device_place(d, model, params[p]);
            values[p] = d->value + place, grads[p] = params[p]->trained ? d->grad + place : NULL;
        }
        const size_t place = (size_t)(values[0] - d->value);
        next->weight = values[0], next->norm_weight = values[1], next->norm_bias = values[2];
        next->norm_mean = values[3], next->norm_variance = values[4];
        next->operand = (T *)d->operand + place;
        next->scale = d->scale + filters, next->bias = d->bias + filters;
        next->bias_operand = (T *)d->bias_operand + filters;
        next->dweight = grads[0], next->dnorm_weight = grads[1], next->dnorm_bias = grads[2];
        next->first = filters, next->length = (int)(layer->weight->count / (size_t)layer->shape.out_channels);
        next->size = sqrt(2.0 * layer->shape.in_channels / layer->shape.out_channels);
        filters += layer->shape.out_channels;
        for (size_t k = 0; layer->weight->trained && k < layer->weight->count; k += PARAM_CHUNK)
            kinds[(place + k) / PARAM_CHUNK] |= KIND_FOLDED;
        next++;
    }
    CUDA(cudaMemcpy(d->kinds, kinds, d->trained / PARAM_CHUNK, to_device));
    CUDA(cudaMemcpy(d->folded, folded, (size_t)d->num_folded * sizeof(Folded), to_device));
    free(kinds);
    free(folded);
    loss_scale_upload<T>(d, model->loss_scale);
    gpu_round((T *)d->operand, d->value, d->count);
    gpu_fold<T>(d);
}

static void device_params_free(DeviceParams *d) {
    CUDA(cudaFree(d->arena.base));
    free(d->place);
    memset(d, 0, sizeof *d);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pictures. They come as files hold them, and image_change() of data/loader.h happens here, with the same weights and
// the same roundings: the same bytes as on the CPU. A resize is a pass along x and one along y, each rounded to 8 bits;
// mirroring is how the first one reads. A pass does all pictures that have one, up to four in all; those with fewer
// join later, and the last pass writes what the network reads.

enum { PICTURE_PASSES = 4, PICTURE_TILE = 16 };

// What a pass does to a picture: pixels of the result are weighted means of pixels of the source, along y or along x.
typedef struct {
    const unsigned char *from;  // the source's pixel (0, 0): red, green, blue
    int right, below;           // bytes from one of its pixels to the next in both directions
    int along_y, packed;        // packed: as in a file, three bytes a pixel; else four
    int width, height;          // of the result
    int first_tile;             // how many tiles come before its own
    size_t first;               // how many pixels
    // (2 + taps, places), places being rows or columns of the result: the first pixel that each is a mean of, how many
    // there are, their weights. NULL: that direction stays as it is.
    const int *table;
} PicturePass;

// A micro-batch's pictures on their way.
typedef struct {
    const PicturePass *passes[PICTURE_PASSES];  // device
    int counts[PICTURE_PASSES], tiles[PICTURE_PASSES];
    uint32_t *scratch[2];  // what a pass leaves for the next one: pixels of four bytes
} Pictures;

// The most pixels that one of a picture's stages has. side: the loader's defer_side; worst_pixels: of what the network
// sees.
static size_t picture_pixels(int side, size_t worst_pixels) {
    const size_t square = (size_t)side * (size_t)side;
    return square > worst_pixels ? square : worst_pixels;
}

// Bytes of a Feed that `count` pictures take at most. A table of n places out of m has two numbers a place and
// 2 max(1, m / n) + 3 weights at most, so less than 7 times the longer side.
static size_t pictures_bytes(int count, int side, size_t worst_pixels) {
    const size_t of_tables = 2 * PICTURE_PASSES * 64 + PICTURE_PASSES * 7 * (size_t)side * sizeof(int);
    return (size_t)count * (3 * picture_pixels(side, worst_pixels) + 64 + of_tables) +
           PICTURE_PASSES * ((size_t)count * sizeof(PicturePass) + 64);
}

// Takes the scratch of `count` pictures.
static void pictures_walk(Pictures *p, Arena *arena, int count, int side, size_t worst_pixels) {
    const size_t bytes = (size_t)count * picture_pixels(side, worst_pixels) * sizeof(uint32_t);
    for (int i = 0; i < 2; i++) p->scratch[i] = (uint32_t *)arena_bytes(arena, bytes);
}

// One direction of a resize: of `size` places `kept` from `first` on in a result of `full`. Afterwards first and length
// are the places that this needs.
typedef struct {
    ResizeTable table;
    int resized, first, length, kept;
} ResizeAxis;

static ResizeAxis resize_axis(int size, int full, int first, int kept) {
    ResizeAxis axis = {{NULL, NULL, NULL, 0}, full != size, first, kept, kept};
    if (!axis.resized) return axis;
    axis.table = resize_table(size, full, first, kept);
    axis.first = axis.table.starts[0];
    axis.length = axis.table.starts[kept - 1] + axis.table.counts[kept - 1] - axis.first;
    return axis;
}

// The table as PicturePass has it, or NULL; places count from axis->first.
static const int *feed_table(Feed *feed, const ResizeAxis *axis) {
    const int *device, places = axis->kept, taps = axis->table.taps;
    if (!axis->resized) return NULL;
    int *to = feed_take(feed, (size_t)places * (size_t)(2 + taps), &device);
    for (int i = 0; i < places; i++) {
        to[i] = axis->table.starts[i] - axis->first, to[places + i] = axis->table.counts[i];
        for (int t = 0; t < taps; t++)
            to[(2 + t) * places + i] = (int)resize_whole_weight(axis->table.weights[i * taps + t]);
    }
    return device;
}

// Writes down the passes of one picture, `next` being where each pass's list ends, and puts its pixels and tables into
// the feed.
static void feed_picture(Feed *feed, Pictures *p, PicturePass *next[PICTURE_PASSES], size_t pixels[PICTURE_PASSES],
                         const Image *image, const ImageChange *change) {
    int width = image->width, height = image->height, right = 3, below = 3 * width;
    const size_t bytes = 3 * (size_t)width * (size_t)height;
    const unsigned char *from;
    memcpy(feed_take(feed, bytes, &from), image->pixels, bytes);
    if (change->flip) from += (ptrdiff_t)(width - 1) * right, right = -right;
    if (change->vflip) from += (ptrdiff_t)(height - 1) * below, below = -below;
    if (change->transpose) {
        const int step = right, side = width;
        right = below, below = step, width = height, height = side;
    }
    const Resize whole = {width, height, 0, 0, width, height};
    const int resizes = change->num_resizes ? change->num_resizes : 1;
    for (int i = 0; i < 2 * resizes; i += 2) {
        const Resize to = change->num_resizes ? change->resizes[i / 2] : whole;
        ResizeAxis axes[2] = {resize_axis(width, to.full_width, to.x, to.width),
                              resize_axis(height, to.full_height, to.y, to.height)};
        const int y_first = resize_y_first(width, height, to.full_width, to.full_height);
        from += (ptrdiff_t)axes[0].first * right + (ptrdiff_t)axes[1].first * below;
        width = axes[0].length, height = axes[1].length;
        for (int turn = 0; turn < 2; turn++) {
            const int pass = PICTURE_PASSES - 2 * resizes + i + turn, along_y = y_first ^ turn;
            *(along_y ? &height : &width) = axes[along_y].kept;
            const PicturePass made = {from,  right,  below,          along_y,      i + turn == 0,
                                      width, height, p->tiles[pass], pixels[pass], feed_table(feed, &axes[along_y])};
            *next[pass]++ = made;
            p->counts[pass]++;
            p->tiles[pass] += (int)(divide_up((size_t)width, PICTURE_TILE) * divide_up((size_t)height, PICTURE_TILE));
            from = (const unsigned char *)(p->scratch[pass % 2] + pixels[pass]);
            right = 4, below = 4 * width;
            pixels[pass] += (size_t)width * (size_t)height;
        }
        for (int axis = 0; axis < 2; axis++)
            if (axes[axis].resized) resize_table_free(&axes[axis].table);
    }
}

// Puts the pictures of samples[places[i]] into the feed, with what is still to be done to them. The samples may be
// freed afterwards.
static void feed_pictures(Feed *feed, Pictures *p, const Sample *samples, const int *places, int count) {
    PicturePass *next[PICTURE_PASSES];
    size_t pixels[PICTURE_PASSES] = {};
    for (int pass = 0; pass < PICTURE_PASSES; pass++) {
        next[pass] = feed_take(feed, (size_t)count, &p->passes[pass]);
        p->counts[pass] = p->tiles[pass] = 0;
    }
    for (int i = 0; i < count; i++) {
        const Sample *sample = &samples[places[i]];
        feed_picture(feed, p, next, pixels, &sample->image, &sample->change);
    }
}

// What each byte of each colour becomes: table (3, 256), as normalise_pixels() computes it.
static void pixel_table(float *table) {
    for (int c = 0; c < 3; c++)
        for (int i = 0; i < 256; i++) table[256 * c + i] = (float)((i / 255.0 - PIXEL_MEAN[c]) / PIXEL_STD[c]);
}

// A block has a tile of a picture, a thread one of its pixels: square, so that what is read across, by a transposed
// picture, is in few lines. T is uint32_t between passes.
template <class T>
__global__ static void __launch_bounds__(PICTURE_TILE *PICTURE_TILE)
    resize_kernel(T *y, const PicturePass *passes, int count, const float *table) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (passes[middle].first_tile <= (int)blockIdx.x)
            low = middle;
        else
            high = middle - 1;
    }
    const PicturePass p = passes[low];
    const int tiles = (p.width + PICTURE_TILE - 1) / PICTURE_TILE, tile = (int)blockIdx.x - p.first_tile;
    const int column = tile % tiles * PICTURE_TILE + (int)threadIdx.x % PICTURE_TILE;
    const int row = tile / tiles * PICTURE_TILE + (int)threadIdx.x / PICTURE_TILE;
    if (column >= p.width || row >= p.height) return;
    const int place = p.along_y ? row : column, places = p.along_y ? p.height : p.width;
    const int start = p.table ? p.table[place] : place, taps = p.table ? p.table[places + place] : 1;
    const ptrdiff_t x = p.along_y ? column : start, step = p.along_y ? p.below : p.right;
    const unsigned char *from = p.from + x * p.right + (ptrdiff_t)(p.along_y ? start : row) * p.below;
    uint32_t sum[3], bytes[3];
    for (int c = 0; c < 3; c++) sum[c] = 1 << (RESIZE_BITS - 1);
    for (int t = 0; t < taps; t++, from += step) {
        const uint32_t weight = p.table ? (uint32_t)p.table[(2 + t) * places + place] : 1 << RESIZE_BITS;
        if (p.packed) {
            for (int c = 0; c < 3; c++) sum[c] += weight * from[c];
        } else {
            const uint32_t pixel = *(const uint32_t *)from;
            for (int c = 0; c < 3; c++) sum[c] += weight * (pixel >> 8 * c & 255);
        }
    }
    for (int c = 0; c < 3; c++) bytes[c] = min(sum[c] >> RESIZE_BITS, 255u);
    const size_t at = p.first + (size_t)row * p.width + column;
    if constexpr (std::is_same<T, uint32_t>::value)
        y[at] = bytes[0] | bytes[1] << 8 | bytes[2] << 16;
    else
        for (int c = 0; c < 3; c++) y[3 * at + c] = to_type<T>(table[256 * c + bytes[c]]);
}

// y (rows, 3): what normalise_pixels() makes of the pictures that were fed, one after another. table: pixel_table(), on
// the device.
template <class T>
static void gpu_pictures(T *y, const Pictures *p, const float *table) {
    enum { TILE = PICTURE_TILE * PICTURE_TILE };
    for (int pass = 0; pass < PICTURE_PASSES; pass++) {
        const PicturePass *passes = p->passes[pass];
        const int count = p->counts[pass];
        const unsigned grid = (unsigned)p->tiles[pass];
        if (grid == 0) continue;
        const Timed timed_kernel("resize", "", 0);
        if (pass < PICTURE_PASSES - 1)
            resize_kernel<uint32_t><<<grid, TILE, 0, stream>>>(p->scratch[pass % 2], passes, count, NULL);
        else
            resize_kernel<T><<<grid, TILE, 0, stream>>>(y, passes, count, table);
        CUDA(cudaGetLastError());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue. A kernel that has sums in registers calls finish8() before it writes them; gpu_finish is for sums that had
// to be written.

// `value`, the sums of eight channels from `column` on, at place `at` of the result, as Epilogue (train_detr.c) says;
// its add and mask are of type T.
template <class T>
__device__ static inline Eight finish8(Eight value, const Epilogue &e, size_t at, int column) {
    if (e.bias) {
        const Eight bias = load8(e.bias + column);
#pragma unroll
        for (int j = 0; j < 8; j++) value.x[j] += bias.x[j];
    }
    if (e.add) {
        const Eight add = load8((const T *)e.add + at);
#pragma unroll
        for (int j = 0; j < 8; j++) value.x[j] += add.x[j];
    }
    if (e.relu) {
#pragma unroll
        for (int j = 0; j < 8; j++) value.x[j] = value.x[j] < 0 ? 0 : value.x[j];  // NaN stays NaN
    }
    if (e.mask) {
        const Eight mask = load8((const T *)e.mask + at);
#pragma unroll
        for (int j = 0; j < 8; j++) value.x[j] = mask.x[j] > 0 ? value.x[j] : 0;
    }
    return value;
}

template <class T, class S>
__global__ static void __launch_bounds__(THREADS)
    finish_kernel(T *y, const S *sums, Epilogue epilogue, size_t count, int C) {
    const int64_t at = place8(count);
    if (at >= 0) store8(y + at, finish8<T>(load8(sums + at), epilogue, (size_t)at, (int)(at % C)));
}

// y (rows, C) = the epilogue of sums (rows, C); y may be sums if the types are the same.
template <class T, class S>
static void gpu_finish(T *y, const S *sums, Epilogue epilogue, int rows, int C) {
    const size_t count = (size_t)rows * (size_t)C;
    const Timed timed_kernel(
        "finish", "",
        ((double)sizeof(S) + sizeof(T) * (1.0 + (epilogue.add != NULL) + (epilogue.mask != NULL))) * (double)count);
    finish_kernel<T, S><<<blocks(count, 8 * THREADS), THREADS, 0, stream>>>(y, sums, epilogue, count, C);
    CUDA(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores: program/ptx.h has the instructions

// --tf32: products of floats in linear layers and convolutions are those of numbers rounded to 10 bits behind the
// point, which tensor cores multiply; their sums stay floats. Set before the first product.
static bool allow_tf32;

// T 16 bits: 16 x 16 by 16 x 8 numbers; float: 16 x 8 by 8 x 8, as TF32.
template <class T>
__device__ static inline void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    if constexpr (std::is_same<T, float>::value) {
        const uint32_t rounded_b[2] = {to_tf32(__uint_as_float(b0)), to_tf32(__uint_as_float(b1))};
        uint32_t rounded_a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) rounded_a[i] = to_tf32(__uint_as_float(a[i]));
        mma_tf32(sum, rounded_a, rounded_b, sum);
    } else if constexpr (std::is_same<T, __half>::value) {
        mma_f16(sum, a, b, sum);
    } else {
        mma_bf16(sum, a, b, sum);
    }
}

// Two floats as a pair of T, the first in the lower half.
template <class T>
__device__ static inline uint32_t pair(float first, float second) {
    const T numbers[2] = {to_type<T>(first), to_type<T>(second)};
    uint32_t bits;
    memcpy(&bits, (const void *)numbers, sizeof bits);
    return bits;
}

enum Pass { FORWARD, BACKWARD_DATA, BACKWARD_WEIGHT };  // of a product with weights
static const char *const PASS_NAMES[] = {"forward", "backward, data", "backward, weight"};

// ---------------------------------------------------------------------------------------------------------------------
// Linear layers, which 1 x 1 convolutions of stride 1 are too, by cuBLASLt. The library counts in columns: what is
// (rows, C) here is a matrix of C rows and `rows` columns to it, with its numbers where they are.
//
// Which of its kernels is the fastest for a product has to be asked, which takes long, and the number of rows is
// another one in each micro-batch. So it is asked for that number rounded up to a power of two, and the answer kept:
// after a few steps nothing is asked any more. Kernels that split a sum among blocks are left out for results that have
// rows.

#ifdef HAVE_CUBLASLT
static void cublas_check(cublasStatus_t status, const char *file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "error: %s:%d: cuBLASLt: %s\n", file, line, cublasLtGetStatusString(status));
    exit(1);
}
#define CUBLAS(call) cublas_check((call), __FILE__, __LINE__)

enum { LINEAR_WORKSPACE = 32 << 20 };  // bytes that the library is recommended to have on an H100

typedef struct {
    int pass, operand_type, result_type, epilogue, bucket, in, out;
} LinearKey;

// A product that was asked about, d = a b; a and b as the library has them.
typedef struct {
    LinearKey key;
    cublasLtMatmulDesc_t how;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace_bytes;
} LinearProduct;

static struct {
    cublasLtHandle_t handle;
    void *workspace;  // device: all products in `stream` share it
    size_t workspace_bytes;
    LinearProduct *products;
    int count;
} linear;

// Before the first product. workspace: device, `bytes` of it, on 16 bytes; the caller's.
static void linear_create(void *workspace, size_t bytes) {
    CUBLAS(cublasLtCreate(&linear.handle));
    linear.workspace = workspace, linear.workspace_bytes = bytes;
}

static void linear_free() {
    for (int i = 0; i < linear.count; i++) {
        const LinearProduct *p = &linear.products[i];
        CUBLAS(cublasLtMatmulDescDestroy(p->how));
        for (cublasLtMatrixLayout_t layout : {p->a, p->b, p->d}) CUBLAS(cublasLtMatrixLayoutDestroy(layout));
    }
    CUBLAS(cublasLtDestroy(linear.handle));
    free(linear.products);
    memset((void *)&linear, 0, sizeof linear);
}

template <class T>
static cudaDataType number_type() {
    return std::is_same<T, float>::value ? CUDA_R_32F : std::is_same<T, __half>::value ? CUDA_R_16F : CUDA_R_16BF;
}

// Floats are multiplied as TF32 only where that is allowed. Of bias, a pointer, only the alignment counts.
static void ask_linear(LinearProduct *p, LinearKey key, const void *bias) {
    const cublasOperation_t transpose = CUBLAS_OP_T;
    const cudaDataType type = (cudaDataType)key.operand_type, result = (cudaDataType)key.result_type;
    const cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)key.epilogue;
    const uint64_t rows = (uint64_t)key.bucket, in = (uint64_t)key.in, out = (uint64_t)key.out;
    const cublasComputeType_t compute =
        allow_tf32 && type == CUDA_R_32F ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    p->key = key;
    CUBLAS(cublasLtMatmulDescCreate(&p->how, compute, CUDA_R_32F));
    CUBLAS(cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    CUBLAS(cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    if (key.pass == BACKWARD_WEIGHT) {  // dw (in, out) = x (in, rows) dy^T (rows, out)
        CUBLAS(cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_TRANSB, &transpose, sizeof transpose));
        CUBLAS(cublasLtMatrixLayoutCreate(&p->a, type, in, rows, key.in));
        CUBLAS(cublasLtMatrixLayoutCreate(&p->b, type, out, rows, key.out));
        CUBLAS(cublasLtMatrixLayoutCreate(&p->d, result, in, out, key.in));
    } else {  // y (out, rows) = w^T (out, in) x (in, rows), and dx (in, rows) = w (in, out) dy (out, rows)
        const bool forward = key.pass == FORWARD;
        if (forward)
            CUBLAS(cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose));
        CUBLAS(cublasLtMatrixLayoutCreate(&p->a, type, in, out, key.in));
        CUBLAS(cublasLtMatrixLayoutCreate(&p->b, type, forward ? in : out, rows, forward ? key.in : key.out));
        CUBLAS(cublasLtMatrixLayoutCreate(&p->d, result, forward ? out : in, rows, forward ? key.out : key.in));
    }
    cublasLtMatmulPreference_t wish;
    cublasLtMatmulHeuristicResult_t answer;
    const uint32_t alignment = 16, reductions = CUBLASLT_REDUCTION_SCHEME_NONE;
    int answers = 0;
    CUBLAS(cublasLtMatmulPreferenceCreate(&wish));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &linear.workspace_bytes,
                                                sizeof linear.workspace_bytes));
    for (cublasLtMatmulPreferenceAttributes_t name :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        CUBLAS(cublasLtMatmulPreferenceSetAttribute(wish, name, &alignment, sizeof alignment));
    if (key.pass != BACKWARD_WEIGHT)
        CUBLAS(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions,
                                                    sizeof reductions));
    CUBLAS(cublasLtMatmulAlgoGetHeuristic(linear.handle, p->how, p->a, p->b, p->d, p->d, wish, 1, &answer, &answers));
    CUBLAS(cublasLtMatmulPreferenceDestroy(wish));
    if (answers == 0) {
        fprintf(stderr, "error: cuBLASLt has no kernel for a linear layer of %d to %d channels and %d rows\n", key.in,
                key.out, key.bucket);
        exit(1);
    }
    p->algorithm = answer.algo, p->workspace_bytes = answer.workspaceSize;
}

// d = epilogue(a b + add), the key without its bucket. add: like d, and may be it, or NULL.
static void multiply_linear(LinearKey key, void *d, const void *a, const void *b, const void *bias, const void *add,
                            int rows) {
    const double operand = key.operand_type == CUDA_R_32F ? 4 : 2, result = key.result_type == CUDA_R_32F ? 4 : 2;
    if (rows == 0) return;
    for (key.bucket = 64; key.bucket < rows;) key.bucket *= 2;
    int i = 0;
    while (i < linear.count && memcmp(&linear.products[i].key, &key, sizeof key) != 0) i++;
    if (i == linear.count) {
        linear.products = (LinearProduct *)grow(linear.products, (size_t)linear.count, sizeof(LinearProduct));
        ask_linear(&linear.products[linear.count++], key, bias);
    }
    const LinearProduct *p = &linear.products[i];
    const uint64_t columns = (uint64_t)rows;
    const float one = 1, beta = add ? 1 : 0;
    for (cublasLtMatrixLayout_t layout : {key.pass == BACKWARD_WEIGHT ? p->a : p->d, p->b})
        CUBLAS(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_COLS, &columns, sizeof columns));
    CUBLAS(cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    const bool of_weights = key.pass == BACKWARD_WEIGHT;
    const double inputs = (double)rows * key.in, outputs = (double)rows * key.out, weights = (double)key.in * key.out;
    const double bytes =
        operand * (of_weights ? inputs + outputs : weights + (key.pass == FORWARD ? inputs : outputs)) +
        result * (add ? 2 : 1) *
            (of_weights            ? weights
             : key.pass == FORWARD ? outputs
                                   : inputs);
    const Timed timed_product("linear", PASS_NAMES[key.pass], bytes, 2.0 * rows * key.in * key.out);
    CUBLAS(cublasLtMatmul(linear.handle, p->how, &one, a, p->a, b, p->b, &beta, add ? add : d, p->d, d, p->d,
                          &p->algorithm, linear.workspace, p->workspace_bytes, stream));
}

// y (rows, out) = relu?(x w^T + add + bias). x: (rows, in), w: (out, in), bias: (out) or NULL, add: (rows, out) or
// NULL, may be y. Y is T or float; the library wants a bias of the result's type. Its ReLU may make 0 of NaN.
template <class T, class Y>
static void gpu_linear_forward(Y *y, const T *x, const T *w, const Y *bias, const Y *add, bool relu, int rows, int in,
                               int out) {
    const int epilogue = bias   ? relu ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_BIAS
                         : relu ? CUBLASLT_EPILOGUE_RELU
                                : CUBLASLT_EPILOGUE_DEFAULT;
    const LinearKey key = {FORWARD, number_type<T>(), number_type<Y>(), epilogue, 0, in, out};
    multiply_linear(key, (void *)y, w, x, bias, add, rows);
}

// dx (rows, in) = mask(dy w + add), mask: dx where mask > 0, else 0. dy: (rows, out), w: (out, in), add and mask: like
// dx, each NULL or even dx. The mask is a pass of its own.
template <class T, class Y>
static void gpu_linear_backward_data(Y *dx, const T *dy, const T *w, const Y *add, const Y *mask, int rows, int in,
                                     int out) {
    const LinearKey key = {BACKWARD_DATA, number_type<T>(), number_type<Y>(), CUBLASLT_EPILOGUE_DEFAULT, 0, in, out};
    multiply_linear(key, (void *)dx, w, dy, NULL, add, rows);
    const Epilogue epilogue = {NULL, NULL, 0, mask, 0};
    if (mask) gpu_finish(dx, dx, epilogue, rows, in);
}

// dw (out, in) += dy^T x. The bias's gradient is gpu_column_sums() of dy.
template <class T>
static void gpu_linear_backward_weight(float *dw, const T *x, const T *dy, int rows, int in, int out) {
    const LinearKey key = {BACKWARD_WEIGHT, number_type<T>(), CUDA_R_32F, CUBLASLT_EPILOGUE_DEFAULT, 0, in, out};
    multiply_linear(key, dw, x, dy, NULL, dw, rows);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Convolutions, as products of matrices of which one is never made (implicit GEMM). A row of it is an output pixel, its
// columns are the channels of the pixels that the kernel's taps see, tap after tap; whoever fetches a piece of 16 bytes
// looks up where that is, and pieces outside of the image are zeros.
//
//   forward          y  (pixels, out) = patches of x (pixels, taps * in)    times w^T
//   backward data    dx (pixels, in)  = patches of dy (pixels, taps * out)  times w, tap by tap
//   backward weight  dw (out, taps * in) = dy^T (out, pixels)               times patches of x
//
// On the way back to x a stride of 2 makes four products: pixels of the same remainders are seen by the same taps.
//
// A block makes TILE_M x TILE_N sums. It goes through the inner dimension in steps of 128 bytes, of which two are on
// their way to shared memory while a third is multiplied. Where the inner dimension is contiguous in memory a line of a
// tile is one row's (or column's) step, and ldmatrix finds there what mma wants; where it is not, a line is one number
// of the inner dimension for all rows, and ldmatrix transposes. Pieces are shuffled within their line, so that eight
// pieces that are read or written together lie in different banks. With T float the same tiles are multiplied by FFMA,
// or as TF32.

enum {
    CONV_THREADS = 128,  // two warps by two, each with half of the tile's rows and columns
    TILE_M = 128,
    STEP_BYTES = 128,      // of the inner dimension: 64 numbers of 16 bits, or 32 floats
    STAGES = 3,            // steps in shared memory
    SPLIT_BLOCKS = 264,    // backward weight divides pixels among blocks until there are so many: an H100 has room for
    SPLIT_PIXELS = 8 * 64  // 264 at a time; but none gets fewer pixels than this
};

// A tap of the kernel: how far from its row's origin it reads, and its place in w.
typedef struct {
    signed char y, x;
    short index;
} ConvTap;

typedef struct {
    int count;
    ConvTap taps[MAX_KERNEL * MAX_KERNEL];
} ConvTaps;

template <class T>
struct ConvParams {
    void *result;     // y, dx (T), or sums of dw for each part of the pixels (parts, out channels, columns) (float)
    const T *source;  // what has pixels and taps: x, or dy on the way back to x
    const T *other;   // w, or dy
    Ragged in, out;   // maps of x and y
    int channels;     // of source
    int rows, columns, tiles;  // of the result, rows at most; tiles of TILE_N columns
    int of_part;               // pixels, backward weight
    int stride, num_taps;      // of the whole kernel
    Epilogue epilogue;
    ConvTaps taps[4];  // [2 * (y % 2) + x % 2] on the way back to x, else [0]
};

// An origin: pixel (y, x) of an image of source, whose rows start at `first`. height 0: a row that does not exist.
typedef struct {
    int first, out_row;  // out_row: of the result, -1 where there is none
    short y, x, height, width;
} Origin;

// Of the output pixel `row`, if there is one before `end`.
template <class T>
__device__ static inline Origin output_origin(const ConvParams<T> &p, int row, int end) {
    Origin origin = {0, -1, 0, 0, 0, 0};
    if (row >= end) return origin;
    const int number = find_segment(p.out, row);
    const Segment to = p.out.segments[number], from = p.in.segments[number];
    origin.first = from.first, origin.out_row = row;
    origin.y = (short)((row - to.first) / to.width * p.stride),
    origin.x = (short)((row - to.first) % to.width * p.stride);
    origin.height = (short)from.height, origin.width = (short)from.width;
    return origin;
}

// Of the input pixel number `row` of those whose y and x have these remainders, image by image.
template <class T>
__device__ static inline Origin input_origin(const ConvParams<T> &p, int row, int first_y, int first_x) {
    Origin origin = {0, -1, 0, 0, 0, 0};
    for (int number = 0; number < p.in.count; number++) {
        const Segment from = p.in.segments[number], to = p.out.segments[number];
        const int height = (from.height - first_y + p.stride - 1) / p.stride;
        const int width = (from.width - first_x + p.stride - 1) / p.stride;
        if (row >= height * width) {
            row -= height * width;
            continue;
        }
        const int y = row / width, x = row % width;
        origin.first = to.first;
        origin.out_row = from.first + (y * p.stride + first_y) * from.width + x * p.stride + first_x;
        origin.y = (short)y, origin.x = (short)x, origin.height = (short)to.height, origin.width = (short)to.width;
        return origin;
    }
    return origin;
}

// The first number of a piece in a tile with PIECES pieces a line.
template <int PIECES, class T>
__device__ static inline T *piece_at(T *tile, int line, int piece) {
    return tile + (line * PIECES + (piece ^ (line & 7))) * (16 / (int)sizeof(T));
}

// Asks for a tile of LINES patches, or zeros, from column `first` on.
template <int LINES, int PIECES, class T>
__device__ static inline void fetch_patches(T *tile, const Origin *origins, const T *source, int channels,
                                            const ConvTap *taps, int num_taps, int first) {
    constexpr int PIECE = 16 / (int)sizeof(T);
    const int piece = (int)threadIdx.x % PIECES, column = first + piece * PIECE;
    for (int line = (int)threadIdx.x / PIECES; line < LINES; line += CONV_THREADS / PIECES) {
        T *to = piece_at<PIECES>(tile, line, piece);
        const Origin origin = origins[line];
        int tap = column / channels, channel = column % channels;
        auto find = [&]() -> const T * {
            if (tap >= num_taps) return NULL;
            const int y = origin.y + taps[tap].y, x = origin.x + taps[tap].x;
            if (y < 0 || y >= origin.height || x < 0 || x >= origin.width) return NULL;
            return source + (size_t)(origin.first + y * origin.width + x) * channels + channel;
        };
        if (channels % PIECE == 0) {
            const T *from = find();
            cp_async_16(to, from ? from : source, from ? 16 : 0);
        } else {  // the picture
            for (int i = 0; i < PIECE; i++) {
                const T *from = find();
                to[i] = from ? *from : to_type<T>(0);
                if (++channel == channels) tap++, channel = 0;
            }
        }
    }
}

// Asks for a tile of LINES lines with numbers side by side, `columns` of them: line(i) is where those of line i begin,
// or NULL. aligned: all on 16 bytes.
template <int LINES, int PIECES, class T, class Line>
__device__ static inline void fetch_lines(T *tile, int columns, bool aligned, const T *anywhere, Line line) {
    constexpr int PIECE = 16 / (int)sizeof(T);
    const int piece = (int)threadIdx.x % PIECES, column = piece * PIECE;
    for (int i = (int)threadIdx.x / PIECES; i < LINES; i += CONV_THREADS / PIECES) {
        T *to = piece_at<PIECES>(tile, i, piece);
        const T *from = line(i);
        if (aligned) {
            const bool inside = from && column < columns;
            cp_async_16(to, inside ? from + column : anywhere, inside ? 16 : 0);
        } else {
            for (int j = 0; j < PIECE; j++) to[j] = from && column + j < columns ? from[column + j] : to_type<T>(0);
        }
    }
}

// Four floats of the inner dimension from k on, of row (or column) i of a tile.
template <int PIECES, bool ACROSS>
__device__ static inline void load4(float (&to)[4], const float *tile, int i, int k) {
    if constexpr (ACROSS) {
#pragma unroll
        for (int q = 0; q < 4; q++) to[q] = piece_at<PIECES>(tile, k + q, i / 4)[i % 4];
    } else {
        const float4 piece = *(const float4 *)piece_at<PIECES>(tile, i, k / 4);
        to[0] = piece.x, to[1] = piece.y, to[2] = piece.z, to[3] = piece.w;
    }
}

// Which mma wants of a tile whose lines are the inner dimension, from line k and number i on, of floats: lane l has
// line l % 4 and number l / 4.
template <int PIECES>
__device__ static inline uint32_t across(const float *tile, int i, int k) {
    const int lane = (int)threadIdx.x % 32, number = i + lane / 4;
    return __float_as_uint(piece_at<PIECES>(tile, k + lane % 4, number / 4)[number % 4]);
}

// How a block's sums lie in its threads. With tensor cores (MMA) a warp has M x N, and sum[N / 8 * i + j] is what mma
// makes of rows 16 * i and columns 8 * j on; without, T being float, a thread has rows y + 8 * i and columns x + 16 *
// j, one after another.
template <class T, int PASS, int TILE_N, bool MMA>
struct ConvSums {
    static constexpr int PIECE = 16 / (int)sizeof(T), STEP = STEP_BYTES / (int)sizeof(T);
    static constexpr int A_PIECES = PASS == BACKWARD_WEIGHT ? TILE_M / PIECE : STEP_BYTES / 16;  // a line
    static constexpr int B_PIECES = PASS == FORWARD ? STEP_BYTES / 16 : TILE_N / PIECE;
    static constexpr int M = TILE_M / 2, N = TILE_N / 2, ROW = TILE_N + 8;  // ROW: a line of spill()'s
    float sum[TILE_M * TILE_N / CONV_THREADS / 4][4];

    // += the product of a step's tiles.
    __device__ void multiply_add(const T *a, const T *b) {
        if constexpr (MMA) {
            const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
            const int row = warp / 2 * M, column = warp % 2 * N;
            const int upper = lane % 16, right = lane / 16, lower = lane / 16 * 8 + lane % 8, left = lane / 8 % 2;
#pragma unroll
            for (int k = 0; k < STEP; k += 2 * PIECE) {
                uint32_t rows[M / 16][4], columns[N / 16][4];
#pragma unroll
                for (int i = 0; i < M / 16; i++) {
                    if constexpr (PASS != BACKWARD_WEIGHT)
                        ldmatrix_x4(rows[i], piece_at<A_PIECES>(a, row + 16 * i + upper, k / PIECE + right));
                    else if constexpr (sizeof(T) == 2)
                        ldmatrix_x4_trans(rows[i], piece_at<A_PIECES>(a, k + lower, row / 8 + 2 * i + left));
                    else
                        for (int q = 0; q < 4; q++)
                            rows[i][q] = across<A_PIECES>(a, row + 16 * i + q % 2 * 8, k + q / 2 * 4);
                }
#pragma unroll
                for (int j = 0; j < N / 16; j++) {
                    if constexpr (PASS == FORWARD)
                        ldmatrix_x4(columns[j], piece_at<B_PIECES>(b, column + 16 * j + lower, k / PIECE + left));
                    else if constexpr (sizeof(T) == 2)
                        ldmatrix_x4_trans(columns[j], piece_at<B_PIECES>(b, k + upper, column / 8 + 2 * j + right));
                    else
                        for (int q = 0; q < 4; q++)
                            columns[j][q] = across<B_PIECES>(b, column + 16 * j + q / 2 * 8, k + q % 2 * 4);
                }
#pragma unroll
                for (int i = 0; i < M / 16; i++)
#pragma unroll
                    for (int j = 0; j < N / 8; j++)
                        mma<T>(sum[N / 8 * i + j], rows[i], columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]);
            }
        } else {
            const int y = (int)threadIdx.x / 16, x = (int)threadIdx.x % 16;
#pragma unroll 1
            for (int k = 0; k < STEP; k += 4) {
                float columns[TILE_N / 16][4];
#pragma unroll
                for (int j = 0; j < TILE_N / 16; j++) load4<B_PIECES, PASS != FORWARD>(columns[j], b, x + 16 * j, k);
#pragma unroll
                for (int i = 0; i < TILE_M / 8; i++) {
                    float row[4];
                    load4<A_PIECES, PASS == BACKWARD_WEIGHT>(row, a, y + 8 * i, k);
#pragma unroll
                    for (int j = 0; j < TILE_N / 16; j++)
#pragma unroll
                        for (int q = 0; q < 4; q++) sum[(i * (TILE_N / 16) + j) / 4][j % 4] += row[q] * columns[j][q];
                }
            }
        }
    }

    // Writes them to shared memory: (TILE_M, ROW).
    __device__ void spill(float *to) const {
        if constexpr (MMA) {
            const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
            const int row = warp / 2 * M + lane / 4, column = warp % 2 * N + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < M / 8; i++)
#pragma unroll
                for (int j = 0; j < N / 8; j++)
                    *(float2 *)(to + (row + 8 * i) * ROW + column + 8 * j) =
                        make_float2(sum[i / 2 * (N / 8) + j][i % 2 * 2], sum[i / 2 * (N / 8) + j][i % 2 * 2 + 1]);
        } else {
            const int y = (int)threadIdx.x / 16, x = (int)threadIdx.x % 16;
#pragma unroll
            for (int i = 0; i < TILE_M / 8; i++)
#pragma unroll
                for (int j = 0; j < TILE_N / 16; j++)
                    to[(y + 8 * i) * ROW + x + 16 * j] = sum[(i * (TILE_N / 16) + j) / 4][j % 4];
        }
    }
};

template <int TILE_N>
static size_t conv_shared() {
    return STAGES * (TILE_M + TILE_N) * STEP_BYTES + TILE_M * sizeof(Origin) +
           MAX_KERNEL * MAX_KERNEL * sizeof(ConvTap);
}

// blockIdx.y: remainders of y and x on the way back to x, the part of the pixels on that to w.
template <class T, int PASS, int TILE_N, bool MMA>
__global__ static void __launch_bounds__(CONV_THREADS, 2) conv_kernel(const __grid_constant__ ConvParams<T> p) {
    extern __shared__ __align__(128) unsigned char smem[];
    typedef ConvSums<T, PASS, TILE_N, MMA> Sums;
    constexpr int STEP = Sums::STEP;
    Origin *origins = (Origin *)(smem + STAGES * (TILE_M + TILE_N) * STEP_BYTES);
    ConvTap *taps = (ConvTap *)(origins + TILE_M);
    const int thread = (int)threadIdx.x, which = PASS == BACKWARD_DATA ? (int)blockIdx.y : 0;
    const int row = (int)blockIdx.x / p.tiles * TILE_M, column = (int)blockIdx.x % p.tiles * TILE_N;
    const int num_taps = p.taps[which].count, first = PASS == BACKWARD_WEIGHT ? (int)blockIdx.y * p.of_part : 0;
    const int end = min(first + p.of_part, p.out.rows);  // of the part
    const int inner = PASS == BACKWARD_WEIGHT ? end - first : num_taps * p.channels, steps = (inner + STEP - 1) / STEP;

    auto find_pixels = [&](int step) {  // backward weight: of two steps, in turns
        if (thread < STEP) origins[step % 2 * STEP + thread] = output_origin(p, first + step * STEP + thread, end);
    };
    auto fetch = [&](int step) {
        T *a = (T *)smem + step % STAGES * (TILE_M + TILE_N) * STEP, *b = a + TILE_M * STEP;
        const int k = step * STEP;
        if constexpr (PASS == BACKWARD_WEIGHT) {
            fetch_lines<STEP, Sums::A_PIECES>(a, p.rows - row, true, p.other, [&](int i) {
                return first + k + i < end ? p.other + (size_t)(first + k + i) * p.rows + row : NULL;
            });
            fetch_patches<STEP, Sums::B_PIECES>(b, origins + step % 2 * STEP, p.source, p.channels, taps, num_taps,
                                                column);
        } else {
            fetch_patches<TILE_M, Sums::A_PIECES>(a, origins, p.source, p.channels, taps, num_taps, k);
        }
        if constexpr (PASS == FORWARD) {
            fetch_lines<TILE_N, Sums::B_PIECES>(b, inner - k, inner % Sums::PIECE == 0, p.other, [&](int i) {
                return column + i < p.columns ? p.other + (size_t)(column + i) * inner + k : NULL;
            });
        }
        if constexpr (PASS == BACKWARD_DATA) {
            const int tap = k / p.channels, channel = k % p.channels;
            fetch_lines<STEP, Sums::B_PIECES>(b, p.columns - column, true, p.other, [&](int i) -> const T * {
                int t = tap, c = channel + i;
                while (c >= p.channels) t++, c -= p.channels;
                if (t >= num_taps) return NULL;
                return p.other + ((size_t)c * p.num_taps + taps[t].index) * p.columns + column;
            });
        }
    };

    static_assert(MAX_KERNEL * MAX_KERNEL <= CONV_THREADS && TILE_M == CONV_THREADS, "one each");
    if (thread < num_taps) taps[thread] = p.taps[which].taps[thread];
    if (PASS == BACKWARD_WEIGHT) find_pixels(0), find_pixels(1);
    if (PASS == FORWARD) origins[thread] = output_origin(p, row + thread, p.out.rows);
    if (PASS == BACKWARD_DATA) origins[thread] = input_origin(p, row + thread, which / 2, which % 2);
    __syncthreads();
    if (PASS != BACKWARD_WEIGHT && origins[0].out_row < 0) return;  // fewer pixels have these remainders than others
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) fetch(step);
        cp_async_commit();
    }
    if (PASS == BACKWARD_WEIGHT) {
        __syncthreads();
        find_pixels(STAGES - 1);
    }
    Sums sums = {};
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) fetch(step + STAGES - 1);
        cp_async_commit();
        if (PASS == BACKWARD_WEIGHT) find_pixels(step + STAGES);
        const T *a = (const T *)smem + step % STAGES * (TILE_M + TILE_N) * STEP;
        sums.multiply_add(a, a + TILE_M * STEP);
    }
    cp_async_wait<0>();
    __syncthreads();
    float *spilled = (float *)smem;
    sums.spill(spilled);
    __syncthreads();
    for (int i = thread; i < TILE_M * TILE_N / 8; i += CONV_THREADS) {
        const int r = i / (TILE_N / 8), c = i % (TILE_N / 8) * 8;
        if (column + c >= p.columns) continue;
        const Eight value = load8(spilled + r * Sums::ROW + c);
        if constexpr (PASS == BACKWARD_WEIGHT) {
            if (row + r < p.rows)
                store8((float *)p.result + ((size_t)blockIdx.y * p.rows + row + r) * p.columns + column + c, value);
        } else {
            if (origins[r].out_row < 0) continue;
            const size_t at = (size_t)origins[r].out_row * p.columns + column + c;
            store8((T *)p.result + at, finish8<T>(value, p.epilogue, at, column + c));
        }
    }
}

template <class T, int PASS, int TILE_N, bool MMA>
static void launch_conv_tiles(ConvParams<T> *p, unsigned layers) {
    p->tiles = (int)divide_up((size_t)p->columns, TILE_N);
    const dim3 grid(blocks((size_t)p->rows, TILE_M) * (unsigned)p->tiles, layers);
    allow_shared(conv_kernel<T, PASS, TILE_N, MMA>, conv_shared<TILE_N>());
    conv_kernel<T, PASS, TILE_N, MMA><<<grid, CONV_THREADS, conv_shared<TILE_N>(), stream>>>(*p);
    CUDA(cudaGetLastError());
}

// What all passes have in common; result and operands are the caller's. layers: blockIdx.y's.
template <class T, int PASS>
static void launch_conv(ConvParams<T> *p, Ragged out, Ragged in, ConvShape s, unsigned layers) {
    p->in = in, p->out = out, p->stride = s.stride, p->num_taps = s.kernel * s.kernel;
    for (int first = 0; first < 4; first++) {
        ConvTaps *list = &p->taps[first];
        list->count = 0;
        for (int i = 0; i < p->num_taps; i++) {
            int y = i / s.kernel * s.dilation - s.padding, x = i % s.kernel * s.dilation - s.padding;
            if (PASS == BACKWARD_DATA) {
                y = first / 2 - y, x = first % 2 - x;
                if (y % s.stride != 0 || x % s.stride != 0) continue;
                y /= s.stride, x /= s.stride;
            }
            const ConvTap tap = {(signed char)y, (signed char)x, (short)i};
            list->taps[list->count++] = tap;
        }
    }
    if (p->rows == 0) return;
    const double weights = (double)s.out_channels * (double)patch_size(s);
    const Timed timed_kernel(
        "conv", PASS_NAMES[PASS],
        sizeof(T) * ((double)in.rows * s.in_channels + (double)out.rows * s.out_channels + weights),
        2 * out.rows * weights);
    constexpr bool HALF = sizeof(T) == 2;
    constexpr int WIDE = HALF ? 128 : 64;  // floats of a wider tile do not fit the registers
    if (HALF && p->columns > 64)
        launch_conv_tiles<T, PASS, WIDE, true>(p, layers);
    else if (HALF || allow_tf32)
        launch_conv_tiles<T, PASS, 64, true>(p, layers);
    else
        launch_conv_tiles<T, PASS, 64, HALF>(p, layers);
}

// conv_forward() of all images: y (out.rows, out channels) by the epilogue, whose add and mask are like y. x: (in.rows,
// in channels), w: (out channels, kernel, kernel, in channels). Here and in the other passes out is the map that the
// shape makes of in, the kernel's size is odd and half of it padded (as many pixels out as in, or half in both
// directions), the stride is 1 or 2, sides are below 32768.
template <class T>
static void gpu_conv_forward(T *y, const T *x, const T *w, Epilogue epilogue, Ragged out, Ragged in, ConvShape s) {
    ConvParams<T> p;
    p.result = (void *)y, p.source = x, p.other = w, p.epilogue = epilogue;
    p.channels = s.in_channels, p.rows = out.rows, p.columns = s.out_channels, p.of_part = 0;
    launch_conv<T, FORWARD>(&p, out, in, s, 1);
}

// conv_backward_data(): dx (in.rows, in channels) by the epilogue, whose add and mask are like dx, and may be dx.
template <class T>
static void gpu_conv_backward_data(T *dx, const T *dy, const T *w, Epilogue epilogue, Ragged out, Ragged in,
                                   ConvShape s) {
    ConvParams<T> p;
    p.result = (void *)dx, p.source = dy, p.other = w, p.epilogue = epilogue;
    p.channels = s.out_channels, p.rows = out.rows, p.columns = s.in_channels, p.of_part = 0;
    launch_conv<T, BACKWARD_DATA>(&p, out, in, s, (unsigned)(s.stride * s.stride));
}

__global__ static void __launch_bounds__(THREADS)
    add_parts_kernel(float *dw, const float *partials, int parts, int rows, int length, int columns) {
    const size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= (size_t)rows * length) return;
    const float *from = partials + at / length * columns + at % length;
    double sum = 0;
    for (int part = 0; part < parts; part++) sum += from[(size_t)part * rows * columns];
    dw[at] += (float)sum;
}

// Parts of the pixels, at most, and the floats that their sums take.
static int conv_parts(ConvShape s, int rows) {
    const size_t tiles = divide_up((size_t)s.out_channels, TILE_M) * divide_up(patch_size(s), 128);
    const size_t most = divide_up((size_t)rows, SPLIT_PIXELS), wanted = divide_up(SPLIT_BLOCKS, tiles);
    return (int)(most < wanted ? most : wanted);
}

static size_t conv_partials(ConvShape s, int rows) {
    return (size_t)conv_parts(s, rows) * (size_t)s.out_channels * round_up(patch_size(s), 8);
}

// conv_backward_weight(): dw (out channels, kernel, kernel, in channels) += that of all images, part by part. x, dy: as
// in forward. partials: conv_partials() of as many output pixels or more.
template <class T>
static void gpu_conv_backward_weight(float *dw, float *partials, const T *x, const T *dy, Ragged out, Ragged in,
                                     ConvShape s) {
    if (out.rows == 0) return;
    const int length = (int)patch_size(s);
    ConvParams<T> p;
    p.result = partials, p.source = x, p.other = dy, p.epilogue = Epilogue();
    p.channels = s.in_channels, p.rows = s.out_channels, p.columns = (int)round_up((size_t)length, 8);
    p.of_part = (int)round_up(divide_up((size_t)out.rows, (size_t)conv_parts(s, out.rows)), 64);
    const unsigned parts = blocks((size_t)out.rows, (size_t)p.of_part);
    launch_conv<T, BACKWARD_WEIGHT>(&p, out, in, s, parts);
    const size_t count = (size_t)p.rows * (size_t)length;
    const Timed timed_kernel("add_parts", "", 4.0 * (parts + 2.0) * (double)count);
    add_parts_kernel<<<blocks(count, THREADS), THREADS, 0, stream>>>(dw, partials, (int)parts, p.rows, length,
                                                                     p.columns);
    CUDA(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Max pooling, 3 x 3, stride 2, padding 1

static const ConvShape POOLING = {0, 0, 3, 2, 1, 1};  // for ragged_segments()

template <class T>
__global__ static void __launch_bounds__(THREADS)
    maxpool_forward_kernel(T *y, unsigned char *argmax, const T *x, Ragged out, Ragged in, int C) {
    const int64_t at = place8((size_t)out.rows * C);
    if (at < 0) return;
    const int row = (int)(at / C), c = (int)(at % C), number = find_segment(out, row);
    const Segment to = out.segments[number], from = in.segments[number];
    const int oy = (row - to.first) / to.width, ox = (row - to.first) % to.width;
    Eight best;
    unsigned char which[8];
    bool found = false;
    for (int ky = 0; ky < 3; ky++) {
        for (int kx = 0; kx < 3; kx++) {
            const int iy = 2 * oy - 1 + ky, ix = 2 * ox - 1 + kx;
            if (iy < 0 || iy >= from.height || ix < 0 || ix >= from.width) continue;
            const Eight pixel = load8(x + (size_t)(from.first + iy * from.width + ix) * C + c);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (found && !(pixel.x[j] > best.x[j]) && pixel.x[j] == pixel.x[j]) continue;
                best.x[j] = pixel.x[j], which[j] = (unsigned char)(3 * ky + kx);
            }
            found = true;
        }
    }
    store8(y + at, best);
    uint2 taps;
    memcpy(&taps, which, sizeof taps);
    *(uint2 *)(argmax + at) = taps;
}

// maxpool_forward() on all images: x (in.rows, C) to y and argmax (out.rows, C); out: POOLING of in.
template <class T>
static void gpu_maxpool_forward(T *y, unsigned char *argmax, const T *x, Ragged out, Ragged in, int C) {
    const unsigned grid = blocks((size_t)out.rows * (size_t)C, 8 * THREADS);
    const Timed timed_kernel("maxpool_forward", "", ((double)sizeof(T) * in.rows + (sizeof(T) + 1.0) * out.rows) * C);
    maxpool_forward_kernel<T><<<grid, THREADS, 0, stream>>>(y, argmax, x, out, in, C);
    CUDA(cudaGetLastError());
}

template <class T>
__global__ static void __launch_bounds__(THREADS)
    maxpool_backward_kernel(T *dx, const T *dy, const unsigned char *argmax, Ragged out, Ragged in, int C) {
    const int64_t at = place8((size_t)in.rows * C);
    if (at < 0) return;
    const int row = (int)(at / C), c = (int)(at % C), number = find_segment(in, row);
    const Segment to = out.segments[number], from = in.segments[number];
    const int iy = (row - from.first) / from.width, ix = (row - from.first) % from.width;
    Eight sum = {};
    for (int oy = iy / 2; oy <= (iy + 1) / 2 && oy < to.height; oy++) {
        for (int ox = ix / 2; ox <= (ix + 1) / 2 && ox < to.width; ox++) {
            const int tap = 3 * (iy + 1 - 2 * oy) + (ix + 1 - 2 * ox);
            const size_t window = (size_t)(to.first + oy * to.width + ox) * C + c;
            const uint2 piece = *(const uint2 *)(argmax + window);
            unsigned char taps[8];
            memcpy(taps, &piece, sizeof piece);
            const Eight gradient = load8(dy + window);
#pragma unroll
            for (int j = 0; j < 8; j++) sum.x[j] += taps[j] == tap ? gradient.x[j] : 0;
        }
    }
    store8(dx + at, sum);
}

// maxpool_backward() on all images: dx (in.rows, C) is written.
template <class T>
static void gpu_maxpool_backward(T *dx, const T *dy, const unsigned char *argmax, Ragged out, Ragged in, int C) {
    const unsigned grid = blocks((size_t)in.rows * (size_t)C, 8 * THREADS);
    const Timed timed_kernel("maxpool_backward", "", ((double)sizeof(T) * in.rows + (sizeof(T) + 1.0) * out.rows) * C);
    maxpool_backward_kernel<T><<<grid, THREADS, 0, stream>>>(dx, dy, argmax, out, in, C);
    CUDA(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Positions. Those of tokens are read from a table that the host makes once for all sizes of maps there can be: the
// features of place p of n are its row n (n - 1) / 2 + p. It is small, 462 KB for 42 places and 256 channels, and it is
// the CPU's own numbers; the positions themselves, (tokens, C), are never in memory.

static size_t position_table_rows(int max_places) { return (size_t)max_places * (size_t)(max_places + 1) / 2; }

// table: (position_table_rows(max_places), half_C), host.
static void position_table(float *table, int max_places, int half_C) {
    for (int places = 1; places <= max_places; places++)
        for (int place = 0; place < places; place++, table += half_C)
            sine_features(table, half_C, 2 * 3.14159265358979323846 * (place + 1) / (places + 1e-6));
}

template <class T>
__global__ static void __launch_bounds__(THREADS)
    add_positions_kernel(T *y, const float *x, const float *table, Ragged map, int C) {
    const int64_t at = place8((size_t)map.rows * C);
    if (at < 0) return;
    const int row = (int)(at / C), c = (int)(at % C), half_C = C / 2;
    const Segment segment = map.segments[find_segment(map, row)];
    const int place_y = (row - segment.first) / segment.width, place_x = (row - segment.first) % segment.width;
    const float *along_y = table + (size_t)(segment.height * (segment.height - 1) / 2 + place_y) * half_C,
                *along_x = table + (size_t)(segment.width * (segment.width - 1) / 2 + place_x) * half_C;
    Eight value = load8(x + at);
#pragma unroll
    for (int j = 0; j < 8; j += 4) {  // half of C is a multiple of 4
        const float4 position = *(const float4 *)(c + j < half_C ? along_y + c + j : along_x + c + j - half_C);
        value.x[j] += position.x, value.x[j + 1] += position.y;
        value.x[j + 2] += position.z, value.x[j + 3] += position.w;
    }
    store8(y + at, value);
}

// y = x + sine_positions() of each image's map; x, y: (map.rows, C). table: position_table(), on the device.
template <class T>
static void gpu_add_positions(T *y, const float *x, const float *table, Ragged map, int C) {
    const unsigned grid = blocks((size_t)map.rows * (size_t)C, 8 * THREADS);
    const Timed timed_kernel("add_positions", "", (4.0 + sizeof(T)) * map.rows * C);
    add_positions_kernel<T><<<grid, THREADS, 0, stream>>>(y, x, table, map, C);
    CUDA(cudaGetLastError());
}

template <class T>
__global__ static void __launch_bounds__(THREADS)
    add_queries_kernel(T *y, const float *x, const float *embeddings, size_t count, size_t period) {
    const int64_t at = place8(count);
    if (at < 0) return;
    Eight value = load8(x + at);
    const Eight position = load8(embeddings + (size_t)at % period);
#pragma unroll
    for (int j = 0; j < 8; j++) value.x[j] += position.x[j];
    store8(y + at, value);
}

// y = x + the learned positions of the queries, the same for each image; x, y: (images, Q, C), embeddings: (Q, C).
template <class T>
static void gpu_add_queries(T *y, const float *x, const float *embeddings, int images, int Q, int C) {
    const size_t period = (size_t)Q * (size_t)C, count = (size_t)images * period;
    const Timed timed_kernel("add_queries", "", (4.0 + sizeof(T)) * (double)count);
    add_queries_kernel<T><<<blocks(count, 8 * THREADS), THREADS, 0, stream>>>(y, x, embeddings, count, period);
    CUDA(cudaGetLastError());
}

__global__ static void __launch_bounds__(THREADS)
    add_queries_backward_kernel(float *dembeddings, const float *dy, int images, size_t period) {
    const int64_t at = place8(period);
    if (at < 0) return;
    Eight sum = load8(dembeddings + at);
    for (int image = 0; image < images; image++) {
        const Eight gradient = load8(dy + (size_t)image * period + at);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.x[j] += gradient.x[j];
    }
    store8(dembeddings + at, sum);
}

// dembeddings (Q, C) += the sum over images of dy (images, Q, C), in their order.
static void gpu_add_queries_backward(float *dembeddings, const float *dy, int images, int Q, int C) {
    const size_t period = (size_t)Q * (size_t)C;
    const Timed timed_kernel("add_queries_backward", "", 4.0 * (images + 2) * (double)period);
    add_queries_backward_kernel<<<blocks(period, 8 * THREADS), THREADS, 0, stream>>>(dembeddings, dy, images, period);
    CUDA(cudaGetLastError());
}

// Frequencies of box_features: (count / 2) of sine_features() with so many features, host.
static void box_periods(float *periods, int count) {
    for (int i = 0; i < count; i += 2) periods[i / 2] = (float)pow(10000, (double)i / count);
}

__global__ static void __launch_bounds__(THREADS)
    box_features_kernel(float *features, const float *boxes, const float *periods, size_t values, int count) {
    const size_t pair = (size_t)blockIdx.x * THREADS + threadIdx.x, value = pair / (count / 2);
    if (value >= values) return;
    const int i = (int)(pair % (count / 2));
    float2 of_pair;
    sincospif(2 * boxes[value] / periods[i], &of_pair.x, &of_pair.y);
    ((float2 *)features)[pair] = of_pair;
}

// What --decoder anchor makes its queries' positions from: features (values, count), sine_features() of 2 pi times each
// of the numbers of boxes, (values) in 0..1. count: half of the channels; periods: box_periods(), on the device.
static void gpu_box_features(float *features, const float *boxes, const float *periods, size_t values, int count) {
    const unsigned grid = blocks(values * (size_t)count / 2, THREADS);
    const Timed timed_kernel("box_features", "", 4.0 * (count + 1) * (double)values);
    box_features_kernel<<<grid, THREADS, 0, stream>>>(features, boxes, periods, values, count);
    CUDA(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Dropout. Element e of an image's (rows, C) has the mask that the CPU gives it, whichever images it is in company
// with.

// A Dropout as kernels want it. Its image is that of the segment.
typedef struct {
    uint32_t threshold;  // a word below it drops its element; 0: no dropout
    float scale;         // of those that stay
    uint64_t seed;
    uint32_t site, step;
} Mask;

static Mask dropout_mask(Dropout dropout) {
    const Mask mask = {(uint32_t)dropout_threshold(dropout), (float)(1 / (1 - dropout.p)), dropout.seed, dropout.site,
                       dropout.step};
    return mask;
}

// The words of elements 4 * group .. 4 * group + 3 of an image.
__device__ static inline void mask_words(uint32_t (&words)[4], Mask mask, int image, uint64_t group) {
    random_words(words, mask.seed, RANDOM_DROPOUT, mask.site, mask.step, (uint32_t)image, (uint32_t)group);
}

// Dropout of eight numbers from `element`, a multiple of 8, on.
__device__ static inline Eight dropout8(Eight value, Mask mask, int image, uint64_t element) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        uint32_t words[4];
        mask_words(words, mask, image, (element + i) / 4);
#pragma unroll
        for (int j = 0; j < 4; j++) value.x[i + j] = words[j] >= mask.threshold ? value.x[i + j] * mask.scale : 0;
    }
    return value;
}

template <class T>
__global__ static void __launch_bounds__(THREADS) dropout_kernel(T *y, const T *x, Mask mask, Ragged map, int C) {
    const int64_t at = place8((size_t)map.rows * C);
    if (at < 0) return;
    const Segment segment = map.segments[find_segment(map, (int)(at / C))];
    store8(y + at, dropout8(load8(x + at), mask, segment.image, (uint64_t)at - (uint64_t)segment.first * C));
}

// y = dropout(x), (map.rows, C); y may be x. The gradient of x is the same of dy.
template <class T>
static void gpu_dropout(T *y, const T *x, Mask mask, Ragged map, int C) {
    const unsigned grid = blocks((size_t)map.rows * (size_t)C, 8 * THREADS);
    const Timed timed_kernel("dropout", "", 2.0 * sizeof(T) * map.rows * C);
    dropout_kernel<T><<<grid, THREADS, 0, stream>>>(y, x, mask, map, C);
    CUDA(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention (train_detr.c has the formula and what it is named after). A block has 64 rows of a head of an image, 16 a
// warp, and goes through the rows of the other side, queries against keys: these come by asynchronous copies, one tile
// ahead; products and sums are in registers, in the layout that mma gives them, and the probabilities of one product
// are the operand of the next as they are. With T float there is no such instruction: the same elements are summed one
// by one.

#define LOG2E 1.4426950408889634f
#define LN2 0.69314718055994531f

enum { PART_ROWS = 64, ATTENTION_THREADS = 128 };

template <class T>
struct AttentionParams {
    T *out;                // (queries.rows, C): written
    float *lse;            // (heads, queries.rows): written, as attention_forward() has it
    const T *q, *k, *v;    // (queries.rows, C), (keys.rows, C): a head has C / heads adjacent channels
    Ragged queries, keys;  // of the same images
    Mask mask;             // element (head * Tq + query) * Tk + key of an image with Tq queries and Tk keys
    int C, heads;
    const float4 *prior;  // (heads, queries.rows): gpu_attention_prior(), or NULL
    // the way back, which reads all of the above
    const T *dout;
    T *dq, *dk, *dv;  // written, as operands
    float *dots;      // (heads, queries.rows): room
};

// Blocks that the rows of a batch's images make; segments: host.
static int attention_parts(const Segment *segments, int count) {
    int sum = 0;
    for (int i = 0; i < count; i++)
        sum += (int)divide_up((size_t)segments[i].height * (size_t)segments[i].width, PART_ROWS);
    return sum;
}

// Which of the elements element .. element + COUNT - 1 dropout keeps, a bit each, COUNT 32 or 64; the four lanes of a
// quad ask together, for the same elements, and each makes a quarter of the words.
template <int COUNT>
__device__ static inline uint64_t quad_keeps(Mask mask, int image, uint64_t element) {
    constexpr int turns = COUNT / 16;
    const int quarter = (int)threadIdx.x % 4, shift = (int)(element % 4);
    uint64_t low = 0, high = 0;
#pragma unroll
    for (int i = 0; i <= turns; i++) {  // what does not begin with a group of four ends in another one
        if (i == turns && shift == 0) break;
        uint32_t words[4];
        mask_words(words, mask, image, element / 4 + 4 * i + (i < turns ? quarter : 0));
        uint64_t bits = 0;
        for (int j = 0; j < 4; j++) bits |= (uint64_t)(words[j] >= mask.threshold) << j;
        if (i < turns)
            low |= bits << (16 * i + 4 * quarter);
        else
            high = bits;
    }
    low |= __shfl_xor_sync(~0u, low, 1);
    low |= __shfl_xor_sync(~0u, low, 2);
    return shift ? low >> shift | high << (COUNT - shift) : low;
}

// The same for 16 elements, by one thread.
__device__ static inline uint32_t thread_keeps(Mask mask, int image, uint64_t element) {
    const int shift = (int)(element % 4);
    uint32_t keeps = 0;
#pragma unroll
    for (int i = 0; i < 5; i++) {
        if (i == 4 && shift == 0) break;
        uint32_t words[4];
        mask_words(words, mask, image, element / 4 + i);
        for (int j = 0; j < 4; j++) keeps |= (uint32_t)(words[j] >= mask.threshold) << (4 * i + j);
    }
    return keeps >> shift & 0xFFFF;
}

// Row `number` of a segment, or its first where there is no such: what comes of that is not used.
__device__ static inline int row_or_first(Segment segment, int number) {
    return segment.first + (number < segment.height * segment.width ? number : 0);
}

// Rows of two tensors that come to shared memory together: keys and values, or queries and gradients.
template <class T, int D, int ROWS>
struct Tile {
    static constexpr int STRIDE = D + 16 / (int)sizeof(T);  // eight rows that lie in different banks
    T first[ROWS][STRIDE], second[ROWS][STRIDE];
};

// Asks for the tile of a segment's rows from `from` on; those past its last are zero. first, second: (rows, C) at the
// head's first channel.
template <class T, int D, int ROWS>
__device__ static inline void fetch_tile(Tile<T, D, ROWS> *to, const T *first, const T *second, Segment segment,
                                         int from, int C) {
    constexpr int PIECE = 16 / (int)sizeof(T);
    for (int i = (int)threadIdx.x; i < ROWS * D / PIECE; i += ATTENTION_THREADS) {
        const int row = i / (D / PIECE), d = i % (D / PIECE) * PIECE;
        const bool inside = from + row < segment.height * segment.width;
        const size_t at = (size_t)(segment.first + (inside ? from + row : 0)) * C + d;
        cp_async_16(&to->first[row][d], first + at, inside ? 16 : 0);
        cp_async_16(&to->second[row][d], second + at, inside ? 16 : 0);
    }
}

typedef struct {
    double of_head[8][3];
} PriorHeads;

// AttentionPrior's Gaussians, one for each row and head: x, y: the middle; z, w: LOG2E / (2 deviation^2) along x and y.
__global__ static void __launch_bounds__(THREADS)
    attention_prior_kernel(float4 *prior, const float *boxes, Ragged queries, Ragged keys, int heads,
                           const __grid_constant__ PriorHeads table) {
    const int at = (int)(blockIdx.x * THREADS + threadIdx.x), row = at % queries.rows, head = at / queries.rows;
    if (head >= heads) return;
    const Segment map = keys.segments[find_segment(queries, row)];
    const double *of_head = table.of_head[head % 8];
    float middle[2], steepness[2];
    for (int axis = 0; axis < 2; axis++) {
        const double half_size = (double)boxes[4 * row + 2 + axis] / 2,
                     half_cell = 0.5 / (axis ? map.height : map.width);
        const double deviation = fmax(of_head[2] * half_size, half_cell);
        middle[axis] = (float)((double)boxes[4 * row + axis] + of_head[axis] * half_size);
        steepness[axis] = (float)(LOG2E * 0.5 / (deviation * deviation));
    }
    prior[at] = make_float4(middle[0], middle[1], steepness[0], steepness[1]);
}

// prior (heads, queries.rows): where the heads of each query look around its box; boxes: (queries.rows, 4).
static void gpu_attention_prior(float4 *prior, const float *boxes, Ragged queries, Ragged keys, int heads) {
    const unsigned grid = blocks((size_t)queries.rows * (size_t)heads, THREADS);
    PriorHeads table;
    memcpy(table.of_head, PRIOR_HEADS, sizeof table.of_head);
    const Timed timed_kernel("attention_prior", "", 16.0 * queries.rows * (heads + 1));
    attention_prior_kernel<<<grid, THREADS, 0, stream>>>(prior, boxes, queries, keys, heads, table);
    CUDA(cudaGetLastError());
}

// The centre of key `key` of a map, in 0..1.
__device__ static inline float2 place_of(int key, Segment map) {
    return make_float2((key % map.width + 0.5f) / map.width, (key / map.width + 0.5f) / map.height);
}

// What a prior takes from the score of the key at `place`, a logarithm of base 2.
__device__ static inline float prior_distance(float4 prior, float2 place) {
    const float dx = place.x - prior.x, dy = place.y - prior.y;
    return dx * dx * prior.z + dy * dy * prior.w;
}

// Takes it from a lane's scores of queries at[0] and at[1], where they are in p.prior; places: of ROWS keys, shared.
template <int ROWS>
__device__ static inline void subtract_prior(float (&score)[ROWS / 8][4], const float4 *prior, const int (&at)[2],
                                             const float2 *places) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float4 of_query = prior[at[r]];
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                score[j][2 * r + i] -= prior_distance(of_query, places[8 * j + threadIdx.x % 4 * 2 + i]);
    }
}

// Sixteen rows of D channels as a warp has them for products: a lane those at rows[0] and rows[1] that mma gives it.
template <class T, int D>
struct WarpRows {
    const T *rows[2];
    uint32_t fragment[D / 16][4];  // if T has 16 bits

    // The segment's rows `from` and from + 8.
    __device__ WarpRows(const T *x, Segment segment, int from, int C) {
        for (int i = 0; i < 2; i++) rows[i] = x + (size_t)row_or_first(segment, from + 8 * i) * C;
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int i = 0; i < D / 16; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    fragment[i][j] = *(const uint32_t *)(rows[j % 2] + 16 * i + j / 2 * 8 + threadIdx.x % 4 * 2);
        }
    }
};

// product (16, ROWS) = a (16, D) times the transpose of b (ROWS, D).
template <class T, int D, int ROWS, int STRIDE>
__device__ static inline void multiply_transposed(float (&product)[ROWS / 8][4], const WarpRows<T, D> &a,
                                                  const T (&b)[ROWS][STRIDE]) {
    const int lane = (int)threadIdx.x % 32;
    constexpr int step = sizeof(T) == 2 && D == 16 ? 2 : 1;
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++)
        for (int i = 0; i < 4; i++) product[j][i] = 0;
#pragma unroll
    for (int j = 0; j < ROWS / 8; j += step) {
        if constexpr (step == 2) {  // four matrices are two times eight rows
            uint32_t columns[4];
            ldmatrix_x4(columns, &b[8 * j + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
            mma<T>(product[j], a.fragment[0], columns[0], columns[1]);
            mma<T>(product[j + 1], a.fragment[0], columns[2], columns[3]);
        } else if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int d = 0; d < D; d += 32) {
                uint32_t columns[4];
                ldmatrix_x4(columns, &b[8 * j + lane % 8][d + lane / 8 * 8]);
                mma<T>(product[j], a.fragment[d / 16], columns[0], columns[1]);
                mma<T>(product[j], a.fragment[d / 16 + 1], columns[2], columns[3]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll 4
                for (int d = 0; d < D; d++) product[j][i] += a.rows[i / 2][d] * b[8 * j + lane % 4 * 2 + i % 2][d];
        }
    }
}

// sum (16, D) += a (16, ROWS), which multiply_transposed() made, rounded to T, times b (ROWS, D). scratch: the warp's,
// if T is float.
template <class T, int D, int ROWS, int STRIDE>
__device__ static inline void multiply_add(float (&sum)[D / 8][4], const float (&a)[ROWS / 8][4],
                                           const T (&b)[ROWS][STRIDE], float (*scratch)[ROWS]) {
    const int lane = (int)threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int j = 0; j < ROWS / 16; j++) {
            const uint32_t fragment[4] = {pair<T>(a[2 * j][0], a[2 * j][1]), pair<T>(a[2 * j][2], a[2 * j][3]),
                                          pair<T>(a[2 * j + 1][0], a[2 * j + 1][1]),
                                          pair<T>(a[2 * j + 1][2], a[2 * j + 1][3])};
#pragma unroll
            for (int d = 0; d < D; d += 16) {
                uint32_t rows[4];
                ldmatrix_x4_trans(rows, &b[16 * j + lane % 16][d + lane / 16 * 8]);
                mma<T>(sum[d / 8], fragment, rows[0], rows[1]);
                mma<T>(sum[d / 8 + 1], fragment, rows[2], rows[3]);
            }
        }
    } else {  // what a lane has is needed by its quad, for other channels
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) scratch[lane / 4 + i / 2 * 8][8 * j + lane % 4 * 2 + i % 2] = a[j][i];
        __syncwarp();
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll 4
                for (int row = 0; row < ROWS; row++)
                    sum[j][i] += scratch[lane / 4 + i / 2 * 8][row] * b[row][8 * j + lane % 4 * 2 + i % 2];
        __syncwarp();
    }
}

// Writes factor times a lane's part of row r (0: the upper) of what multiply_add() has summed; to: the row at the
// head's first channel.
template <class T, int D>
__device__ static inline void store_row(T *to, const float (&sum)[D / 8][4], int r, float factor) {
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) to[8 * j + threadIdx.x % 4 * 2 + i] = to_type<T>(sum[j][2 * r + i] * factor);
}

// Turns the number of a block into that of its part of a segment, which is returned.
__device__ static inline int find_part(int *block, Ragged map) {
    *block = (int)blockIdx.x;
    for (int image = 0;; image++) {
        const int parts = (map.segments[image].height * map.segments[image].width + PART_ROWS - 1) / PART_ROWS;
        if (*block < parts) return image;
        *block -= parts;
    }
}

template <class T, int D, int ROWS>
__global__ static void __launch_bounds__(ATTENTION_THREADS) attention_forward_kernel(AttentionParams<T> p) {
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ float2 places[ROWS];
    Tile<T, D, ROWS> *stages = (Tile<T, D, ROWS> *)smem;  // two
    int part;
    const int image = find_part(&part, p.queries), head = (int)blockIdx.y, column = (int)threadIdx.x % 4 * 2;
    const Segment of_queries = p.queries.segments[image], of_keys = p.keys.segments[image];
    const int Tq = of_queries.height * of_queries.width, Tk = of_keys.height * of_keys.width;
    const int warp = (int)threadIdx.x / 32, first = part * PART_ROWS + 16 * warp + (int)threadIdx.x % 32 / 4;
    float(*scratch)[ROWS] = (float(*)[ROWS])(stages + 2) + 16 * warp;
    const WarpRows<T, D> q(p.q + head * D, of_queries, first, p.C);
    const float factor = LOG2E / sqrtf((float)D);  // scores are logarithms of base 2
    int at[2];
    for (int r = 0; r < 2; r++) at[r] = head * p.queries.rows + row_or_first(of_queries, first + 8 * r);
    float out[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    fetch_tile(&stages[0], p.k + head * D, p.v + head * D, of_keys, 0, p.C);
    cp_async_commit();
    for (int key = 0; key < Tk; key += ROWS) {
        Tile<T, D, ROWS> *now = &stages[key / ROWS % 2], *next = &stages[(key / ROWS + 1) % 2];
        if (key + ROWS < Tk) fetch_tile(next, p.k + head * D, p.v + head * D, of_keys, key + ROWS, p.C);
        cp_async_commit();
        if (p.prior && threadIdx.x < ROWS) places[threadIdx.x] = place_of(key + (int)threadIdx.x, of_keys);
        cp_async_wait<1>();
        __syncthreads();
        float score[ROWS / 8][4];
        multiply_transposed(score, q, now->first);
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                score[j][i] = key + 8 * j + column + i % 2 < Tk ? score[j][i] * factor : -INFINITY;
        if (p.prior) subtract_prior<ROWS>(score, p.prior, at, places);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = highest[r];
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) top = fmaxf(top, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float shrink = exp2f(highest[r] - top);
            highest[r] = top;
            sum[r] *= shrink;
#pragma unroll
            for (int j = 0; j < D / 8; j++) out[j][2 * r] *= shrink, out[j][2 * r + 1] *= shrink;
            uint64_t keep = 0;
            if (p.mask.threshold)
                keep = quad_keeps<ROWS>(p.mask, of_queries.image, ((uint64_t)head * Tq + first + 8 * r) * Tk + key);
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    score[j][i] = exp2f(score[j][i] - top);
                    sum[r] += score[j][i];
                    if (p.mask.threshold)
                        score[j][i] = keep >> (8 * j + column + i % 2) & 1 ? score[j][i] * p.mask.scale : 0;
                }
            }
        }
        multiply_add<T, D>(out, score, now->second, scratch);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        const int query = first + 8 * r;
        if (query >= Tq) continue;
        const size_t row = (size_t)(of_queries.first + query);
        store_row<T, D>(p.out + row * p.C + head * D, out, r, 1 / sum[r]);
        if (column == 0) p.lse[(size_t)head * p.queries.rows + row] = (highest[r] + log2f(sum[r])) * LN2;
    }
}

// Shared memory of attention's kernels: two tiles, and for floats the warps' scratch.
template <class T, int D, int ROWS>
static size_t attention_shared() {
    return 2 * sizeof(Tile<T, D, ROWS>) + (sizeof(T) == 4 ? sizeof(float) * PART_ROWS * ROWS : 0);
}

// Queries times keys, of images of one size.
template <class T>
static double attention_pairs(const AttentionParams<T> &p) {
    return (double)p.queries.rows * p.keys.rows / p.queries.count;
}

template <class T, int D>
static void launch_attention_forward(const AttentionParams<T> &p, int query_parts) {
    constexpr int ROWS = sizeof(T) == 2 ? 64 : 32;
    const dim3 grid((unsigned)query_parts, (unsigned)p.heads);
    const size_t shared = attention_shared<T, D, ROWS>();
    const double row = (double)sizeof(T) * p.C, product = attention_pairs(p) * p.C;
    allow_shared(attention_forward_kernel<T, D, ROWS>, shared);
    const Timed timed_kernel("attention", "forward", 2.0 * row * (p.queries.rows + p.keys.rows), 4 * product);
    attention_forward_kernel<T, D, ROWS><<<grid, ATTENTION_THREADS, shared, stream>>>(p);
    CUDA(cudaGetLastError());
}

// attention_forward() for every image. query_parts: attention_parts() of p.queries. Heads have 16, 32 or 64 channels.
template <class T>
static void gpu_attention_forward(const AttentionParams<T> &p, int query_parts) {
    if (p.C / p.heads == 16)
        launch_attention_forward<T, 16>(p, query_parts);
    else if (p.C / p.heads == 32)
        launch_attention_forward<T, 32>(p, query_parts);
    else
        launch_attention_forward<T, 64>(p, query_parts);
}

// The way back. With P the probabilities, M dropout's factors, S the scores and D = sum over channels of dout * out:
//   dv = (P M)^T dout,   dS = P (dout v^T M - D) / sqrt(head_dim),   dq = dS k,   dk = dS^T q.
// P is made again from the scores and lse. Two kernels, so that every sum has one owner: a warp of the first has 16
// queries and sums over the keys, a warp of the second has 16 keys and sums over the queries.

// A warp has a row: D of its heads.
template <class T>
__global__ static void __launch_bounds__(THREADS) attention_dots_kernel(AttentionParams<T> p) {
    const int lane = (int)threadIdx.x % 32, row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    if (row >= p.queries.rows) return;
    const int lanes = p.C / p.heads / 8;  // of a head: 2, 4 or 8
    for (int first = 0; first < p.C; first += 256) {
        const int c = first + 8 * lane;
        float sum = 0;
        if (c < p.C) {
            const Eight out = load8(p.out + (size_t)row * p.C + c), dout = load8(p.dout + (size_t)row * p.C + c);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += out.x[j] * dout.x[j];
        }
        for (int distance = 1; distance < lanes; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (c < p.C && lane % lanes == 0) p.dots[(size_t)(c / 8 / lanes) * p.queries.rows + row] = sum;
    }
}

// Floats of 64 channels: nvcc would stop at 128 registers and spill some, unless it is told how many blocks there are;
// 0 leaves it to nvcc.
template <class T, int D, int ROWS>
__global__ static void __launch_bounds__(ATTENTION_THREADS, sizeof(T) == 4 && D == 64 ? 3 : 0)
    attention_backward_queries_kernel(AttentionParams<T> p) {
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ float2 places[ROWS];
    Tile<T, D, ROWS> *stages = (Tile<T, D, ROWS> *)smem;
    int part;
    const int image = find_part(&part, p.queries), head = (int)blockIdx.y, column = (int)threadIdx.x % 4 * 2;
    const Segment of_queries = p.queries.segments[image], of_keys = p.keys.segments[image];
    const int Tq = of_queries.height * of_queries.width, Tk = of_keys.height * of_keys.width;
    const int warp = (int)threadIdx.x / 32, first = part * PART_ROWS + 16 * warp + (int)threadIdx.x % 32 / 4;
    float(*scratch)[ROWS] = (float(*)[ROWS])(stages + 2) + 16 * warp;
    const WarpRows<T, D> q(p.q + head * D, of_queries, first, p.C), dout(p.dout + head * D, of_queries, first, p.C);
    const float scale = 1 / sqrtf((float)D), factor = LOG2E * scale;
    float dq[D / 8][4] = {}, lse[2], dots[2];
    int at[2];
    for (int r = 0; r < 2; r++) {
        at[r] = head * p.queries.rows + row_or_first(of_queries, first + 8 * r);
        lse[r] = p.lse[at[r]] * LOG2E, dots[r] = p.dots[at[r]];
    }
    fetch_tile(&stages[0], p.k + head * D, p.v + head * D, of_keys, 0, p.C);
    cp_async_commit();
    for (int key = 0; key < Tk; key += ROWS) {
        Tile<T, D, ROWS> *now = &stages[key / ROWS % 2], *next = &stages[(key / ROWS + 1) % 2];
        if (key + ROWS < Tk) fetch_tile(next, p.k + head * D, p.v + head * D, of_keys, key + ROWS, p.C);
        cp_async_commit();
        if (p.prior && threadIdx.x < ROWS) places[threadIdx.x] = place_of(key + (int)threadIdx.x, of_keys);
        cp_async_wait<1>();
        __syncthreads();
        float score[ROWS / 8][4], dp[ROWS / 8][4];
        multiply_transposed(score, q, now->first);
        multiply_transposed(dp, dout, now->second);
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) score[j][i] *= factor;
        if (p.prior) subtract_prior<ROWS>(score, p.prior, at, places);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint64_t keep = 0;
            if (p.mask.threshold)
                keep = quad_keeps<ROWS>(p.mask, of_queries.image, ((uint64_t)head * Tq + first + 8 * r) * Tk + key);
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    const bool inside = key + 8 * j + column + i % 2 < Tk;
                    const float P = inside ? exp2f(score[j][i] - lse[r]) : 0;
                    if (p.mask.threshold) dp[j][i] = keep >> (8 * j + column + i % 2) & 1 ? dp[j][i] * p.mask.scale : 0;
                    score[j][i] = P * (dp[j][i] - dots[r]) * scale;
                }
            }
        }
        multiply_add<T, D>(dq, score, now->first, scratch);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
        if (first + 8 * r < Tq)
            store_row<T, D>(p.dq + (size_t)(of_queries.first + first + 8 * r) * p.C + head * D, dq, r, 1);
}

template <class T, int D, int ROWS>
__global__ static void __launch_bounds__(ATTENTION_THREADS) attention_backward_keys_kernel(AttentionParams<T> p) {
    extern __shared__ __align__(128) unsigned char smem[];
    Tile<T, D, ROWS> *stages = (Tile<T, D, ROWS> *)smem;
    int part;
    const int image = find_part(&part, p.keys), head = (int)blockIdx.y, column = (int)threadIdx.x % 4 * 2;
    const Segment of_queries = p.queries.segments[image], of_keys = p.keys.segments[image];
    const int Tq = of_queries.height * of_queries.width, Tk = of_keys.height * of_keys.width;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int first_of_warp = part * PART_ROWS + 16 * warp, first = first_of_warp + lane / 4;
    float(*scratch)[ROWS] = (float(*)[ROWS])(stages + 2) + 16 * warp;
    const WarpRows<T, D> k(p.k + head * D, of_keys, first, p.C), v(p.v + head * D, of_keys, first, p.C);
    const float scale = 1 / sqrtf((float)D), factor = LOG2E * scale;
    const int of_head = head * p.queries.rows + of_queries.first;
    const float2 places[2] = {place_of(first, of_keys), place_of(first + 8, of_keys)};
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    fetch_tile(&stages[0], p.q + head * D, p.dout + head * D, of_queries, 0, p.C);
    cp_async_commit();
    for (int query = 0; query < Tq; query += ROWS) {
        Tile<T, D, ROWS> *now = &stages[query / ROWS % 2], *next = &stages[(query / ROWS + 1) % 2];
        if (query + ROWS < Tq) fetch_tile(next, p.q + head * D, p.dout + head * D, of_queries, query + ROWS, p.C);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        uint32_t keeps = 0;  // of the query `query + lane`, the warp's 16 keys
        static_assert(ROWS == 32, "a lane has a query's words");
        if (p.mask.threshold)
            keeps = thread_keeps(p.mask, of_queries.image, ((uint64_t)head * Tq + query + lane) * Tk + first_of_warp);
        float score[ROWS / 8][4], dp[ROWS / 8][4];
        multiply_transposed(score, k, now->first);
        multiply_transposed(dp, v, now->second);
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int i = 8 * j + column + c, inside = query + i < Tq;
                const int at = of_head + query + i;
                const float base = inside ? p.lse[at] * LOG2E : 0, dot = inside ? p.dots[at] : 0;
                const float4 around = p.prior && inside ? p.prior[at] : make_float4(0, 0, 0, 0);
                const uint32_t keep = __shfl_sync(~0u, keeps, i);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float *s = &score[j][2 * r + c], *d = &dp[j][2 * r + c];
                    const float far = p.prior ? prior_distance(around, places[r]) : 0;
                    const float P = inside ? exp2f(*s * factor - far - base) : 0;
                    const float M = !p.mask.threshold ? 1 : keep >> (lane / 4 + 8 * r) & 1 ? p.mask.scale : 0;
                    *s = P * M;
                    *d = P * (*d * M - dot) * scale;
                }
            }
        }
        multiply_add<T, D>(dv, score, now->second, scratch);
        multiply_add<T, D>(dk, dp, now->first, scratch);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (first + 8 * r >= Tk) continue;
        const size_t at = (size_t)(of_keys.first + first + 8 * r) * p.C + head * D;
        store_row<T, D>(p.dk + at, dk, r, 1);
        store_row<T, D>(p.dv + at, dv, r, 1);
    }
}

template <class T, int D>
static void launch_attention_backward(const AttentionParams<T> &p, int query_parts, int key_parts) {
    const dim3 of_queries((unsigned)query_parts, (unsigned)p.heads), of_keys((unsigned)key_parts, (unsigned)p.heads);
    const size_t shared = attention_shared<T, D, 32>();
    const double row = (double)sizeof(T) * p.C, product = attention_pairs(p) * p.C;
    const Timed timed_dots("attention", "backward, dots", 2 * row * p.queries.rows);
    attention_dots_kernel<T><<<blocks((size_t)p.queries.rows, WARPS), THREADS, 0, stream>>>(p);
    CUDA(cudaGetLastError());
    allow_shared(attention_backward_queries_kernel<T, D, 32>, shared);
    const Timed timed_queries("attention", "backward, queries", row * (3.0 * p.queries.rows + 2.0 * p.keys.rows),
                              6 * product);
    attention_backward_queries_kernel<T, D, 32><<<of_queries, ATTENTION_THREADS, shared, stream>>>(p);
    CUDA(cudaGetLastError());
    allow_shared(attention_backward_keys_kernel<T, D, 32>, shared);
    const Timed timed_keys("attention", "backward, keys", row * (2.0 * p.queries.rows + 4.0 * p.keys.rows),
                           8 * product);
    attention_backward_keys_kernel<T, D, 32><<<of_keys, ATTENTION_THREADS, shared, stream>>>(p);
    CUDA(cudaGetLastError());
}

// attention_backward() for every image; dq, dk and dv are written. key_parts: attention_parts() of p.keys.
template <class T>
static void gpu_attention_backward(const AttentionParams<T> &p, int query_parts, int key_parts) {
    if (p.C / p.heads == 16)
        launch_attention_backward<T, 16>(p, query_parts, key_parts);
    else if (p.C / p.heads == 32)
        launch_attention_backward<T, 32>(p, query_parts, key_parts);
    else
        launch_attention_backward<T, 64>(p, query_parts, key_parts);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layer norm, with what stands around it in a transformer: sum = residual + dropout(x), y = norm(sum). A warp has a row
// and keeps it in registers, PIECES times 8 channels a lane.

enum { MAX_PIECES = 4, MAX_NORM_CHANNELS = 256 * MAX_PIECES };

template <class T>
struct NormForward {
    float *sum, *y, *mean, *rstd;  // written: (rows, C), (rows, C), (rows), (rows)
    T *operand;                    // y rounded, or NULL
    const float *x, *residual;     // x NULL: sum is not written, it is residual
    const float *weight, *bias;    // (C)
    Mask mask;
    Ragged map;
    int C;
};

template <class T, int PIECES>
__global__ static void __launch_bounds__(THREADS) norm_forward_kernel(NormForward<T> p) {
    const int lane = (int)threadIdx.x % 32, row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    if (row >= p.map.rows) return;
    Segment segment = {};
    if (p.mask.threshold) segment = p.map.segments[find_segment(p.map, row)];
    Eight value[PIECES];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int c = (32 * i + lane) * 8;
        const size_t at = (size_t)row * p.C + c;
        value[i] = Eight();
        if (c >= p.C) continue;
        value[i] = load8(p.residual + at);
        if (p.x) {
            Eight x = load8(p.x + at);
            if (p.mask.threshold) x = dropout8(x, p.mask, segment.image, (uint64_t)(row - segment.first) * p.C + c);
#pragma unroll
            for (int j = 0; j < 8; j++) value[i].x[j] += x.x[j];
            store8(p.sum + at, value[i]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum += value[i].x[j];
    }
    const float mean = warp_sum(sum) / p.C;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float offset = (32 * i + lane) * 8 < p.C ? value[i].x[j] - mean : 0;
            squares += offset * offset;
        }
    }
    const float rstd = 1 / sqrtf(warp_sum(squares) / p.C + 1e-5f);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int c = (32 * i + lane) * 8;
        if (c >= p.C) continue;
        const Eight weight = load8(p.weight + c), bias = load8(p.bias + c);
#pragma unroll
        for (int j = 0; j < 8; j++) value[i].x[j] = (value[i].x[j] - mean) * rstd * weight.x[j] + bias.x[j];
        store8(p.y + (size_t)row * p.C + c, value[i]);
        if (p.operand) store8(p.operand + (size_t)row * p.C + c, value[i]);
    }
    if (lane == 0) p.mean[row] = mean, p.rstd[row] = rstd;
}

template <class T>
static void gpu_norm_forward(const NormForward<T> &p) {
    const unsigned grid = blocks((size_t)p.map.rows, WARPS);
    const Timed timed_kernel("norm_forward", "", ((p.x ? 16.0 : 8.0) + (p.operand ? sizeof(T) : 0)) * p.map.rows * p.C);
    if (p.C <= 256)
        norm_forward_kernel<T, 1><<<grid, THREADS, 0, stream>>>(p);
    else
        norm_forward_kernel<T, MAX_PIECES><<<grid, THREADS, 0, stream>>>(p);
    CUDA(cudaGetLastError());
}

template <class T>
struct NormBackward {
    float *dsum;             // written: (rows, C), the gradient of sum and of residual
    T *dx;                   // written, or NULL: that of x, dropout(dsum), as an operand
    float *dweight, *dbias;  // (C), added to; NULL if the norm is frozen
    float *partials;         // (divide_up(rows, CHUNK_ROWS), 2, C)
    const float *dy, *sum, *mean, *rstd, *weight;
    Mask mask;
    Ragged map;
    int C;
};

template <class T, int PIECES>
__global__ static void __launch_bounds__(THREADS, PIECES == 1 ? 2 : 1) norm_backward_kernel(NormBackward<T> p) {
    __shared__ float totals[2][256 * PIECES];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, first = (int)blockIdx.x * CHUNK_ROWS;
    Eight weight[PIECES], of_weight[PIECES], of_bias[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int c = (32 * i + lane) * 8;
        weight[i] = c < p.C ? load8(p.weight + c) : Eight();
        of_weight[i] = of_bias[i] = Eight();
    }
    for (int row = first + warp; row < p.map.rows && row < first + CHUNK_ROWS; row += WARPS) {
        const float mean = p.mean[row], rstd = p.rstd[row];
        Eight g[PIECES], n[PIECES];  // dy weight, (sum - mean) rstd
        float sum_g = 0, sum_gn = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int c = (32 * i + lane) * 8;
            g[i] = n[i] = Eight();
            if (c >= p.C) continue;
            const Eight dy = load8(p.dy + (size_t)row * p.C + c), sum = load8(p.sum + (size_t)row * p.C + c);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                n[i].x[j] = (sum.x[j] - mean) * rstd;
                g[i].x[j] = dy.x[j] * weight[i].x[j];
                sum_g += g[i].x[j];
                sum_gn += g[i].x[j] * n[i].x[j];
                of_bias[i].x[j] += dy.x[j];
                of_weight[i].x[j] += dy.x[j] * n[i].x[j];
            }
        }
        const float mean_g = warp_sum(sum_g) / p.C;
        const float mean_gn = warp_sum(sum_gn) / p.C;
        Segment segment = {};
        if (p.mask.threshold) segment = p.map.segments[find_segment(p.map, row)];
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int c = (32 * i + lane) * 8;
            if (c >= p.C) continue;
            Eight dsum;
#pragma unroll
            for (int j = 0; j < 8; j++) dsum.x[j] = rstd * (g[i].x[j] - mean_g - n[i].x[j] * mean_gn);
            store8(p.dsum + (size_t)row * p.C + c, dsum);
            if (!p.dx) continue;
            if (p.mask.threshold)
                dsum = dropout8(dsum, p.mask, segment.image, (uint64_t)(row - segment.first) * p.C + c);
            store8(p.dx + (size_t)row * p.C + c, dsum);
        }
    }
    if (!p.dweight) return;
    for (int turn = 0; turn < WARPS; turn++) {  // one warp after another adds what it has
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int c = (32 * i + lane) * 8 + j;
                if (warp != turn) continue;
                totals[0][c] = (turn ? totals[0][c] : 0) + of_weight[i].x[j];
                totals[1][c] = (turn ? totals[1][c] : 0) + of_bias[i].x[j];
            }
        }
        __syncthreads();
    }
    for (int c = (int)threadIdx.x; c < p.C; c += THREADS) {
        p.partials[((size_t)blockIdx.x * 2 + 0) * p.C + c] = totals[0][c];
        p.partials[((size_t)blockIdx.x * 2 + 1) * p.C + c] = totals[1][c];
    }
}

// The mathematics are layernorm_backward()'s. Leaves partial sums for gpu_add_partials(); returns how many.
template <class T>
static int launch_norm_backward(const NormBackward<T> &p) {
    const unsigned grid = blocks((size_t)p.map.rows, CHUNK_ROWS);
    const Timed timed_kernel("norm_backward", "", (12.0 + (p.dx ? sizeof(T) : 0)) * p.map.rows * p.C);
    if (p.C <= 256)
        norm_backward_kernel<T, 1><<<grid, THREADS, 0, stream>>>(p);
    else
        norm_backward_kernel<T, MAX_PIECES><<<grid, THREADS, 0, stream>>>(p);
    CUDA(cudaGetLastError());
    return (int)grid;
}

template <class T>
static void gpu_norm_backward(const NormBackward<T> &p) {
    const int chunks = launch_norm_backward(p);
    if (p.dweight) gpu_add_partials(p.dweight, p.dbias, p.partials, chunks, p.C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Set loss. All decoder layers of all images are done at once. A query is a row of logits and boxes, in the order
// (layer, image, query). The mathematics are the CPU's own functions in double, and sums over classes are in their
// order, so costs, matches and gradients are the CPU's bits wherever exp() and log() are.

enum { SUM_CE, SUM_BBOX, SUM_GIOU, SUM_CARDINALITY, SUM_MATCHED, SUM_RIGHT, LOSS_SUMS };  // see Losses
enum { SAYS_OBJECT = 1, IS_MATCHED = 2, IS_RIGHT = 4 };                                   // bits of a query's answer

typedef struct {
    int layers, images, Q, classes, num_labels, focal;  // classes: num_logits()
    int num_targets, most_targets;                      // of all images, of the image that has most
    LossSettings settings;
    LossDivisors divisors;
    // read: targets of all images side by side, first_target (images + 1)
    const double *target_boxes;                // (num_targets, 4)
    const int *target_classes, *first_target;  // (num_targets)
    const float *logits, *boxes;               // (rows, classes), (rows, 4)
    // written
    double *costs;                 // (layers, num_targets, Q)
    int *match;                    // (rows): as in match_queries()
    float *dlogits, *dbox_logits;  // (rows, classes), (rows, 4): the latter through the boxes' sigmoid
    double *terms;                 // (rows, 3): unweighted losses of a query
    unsigned char *answers;        // (rows)
    double *sums;                  // (layers, LOSS_SUMS), added to
    const LossScale *loss_scale;   // device: of the gradients, not of the sums; NULL: none
} SetLoss;

__global__ static void __launch_bounds__(THREADS) sigmoid_kernel(float *y, const float *x, size_t count) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) y[i] = (float)(1 / (1 + exp(-(double)x[i])));
}

// y = sigmoid(x), (count): boxes from what the box head says. The way back is in set_loss_kernel.
static void gpu_sigmoid(float *y, const float *x, size_t count) {
    const Timed timed_kernel("sigmoid", "", 8.0 * (double)count);
    sigmoid_kernel<<<blocks(count, THREADS), THREADS, 0, stream>>>(y, x, count);
    CUDA(cudaGetLastError());
}

// softmax_row() by a warp. probabilities: (classes), shared memory of the warp.
__device__ static double warp_softmax(double *probabilities, const float *logits, int classes) {
    const int lane = (int)threadIdx.x % 32;
    float highest = logits[0];
    for (int c = lane; c < classes; c += 32) highest = logits[c] > highest ? logits[c] : highest;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(~0u, highest, distance);
        highest = other > highest ? other : highest;
    }
    for (int c = lane; c < classes; c += 32) probabilities[c] = exp((double)logits[c] - (double)highest);
    __syncwarp();
    double sum = 0;
    for (int c = 0; c < classes; c++) sum += probabilities[c];
    __syncwarp();
    for (int c = lane; c < classes; c += 32) probabilities[c] /= sum;
    __syncwarp();
    return (double)highest + log(sum);
}

__global__ static void __launch_bounds__(THREADS) match_costs_kernel(SetLoss p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const int lane = (int)threadIdx.x % 32, row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    if (row >= p.layers * p.images * p.Q) return;
    const int layer = row / (p.images * p.Q), image = row / p.Q % p.images, q = row % p.Q;
    const int first = p.first_target[image], count = p.first_target[image + 1] - first;
    double *probabilities = (double *)smem + threadIdx.x / 32 * p.classes;
    const float *logits = p.logits + (size_t)row * p.classes;
    if (!p.focal) warp_softmax(probabilities, logits, p.classes);
    double box[4];
    for (int i = 0; i < 4; i++) box[i] = (double)p.boxes[4 * (size_t)row + i];
    for (int t = lane; t < count; t += 32) {
        const double *target = p.target_boxes + 4 * (first + t);
        const int c = p.target_classes[first + t];
        const double of_class = p.focal
                                    ? focal_loss((double)logits[c], 1, NULL) - focal_loss((double)logits[c], 0, NULL)
                                    : -probabilities[c];
        double distance = 0;
        for (int i = 0; i < 4; i++) distance += fabs(box[i] - target[i]);
        p.costs[((size_t)layer * p.num_targets + first + t) * p.Q + q] =
            p.settings.cost_bbox * distance + p.settings.cost_class * of_class -
            p.settings.cost_giou * generalized_iou(box, target, NULL);
    }
}

// A warp has one problem and does what assign() does, its lanes over the columns.
__global__ static void __launch_bounds__(32) match_kernel(SetLoss p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const int lane = (int)threadIdx.x, layer = (int)blockIdx.x / p.images, image = (int)blockIdx.x % p.images;
    const int first = p.first_target[image], N = p.first_target[image + 1] - first, Q = p.Q;
    const int T = (layer < p.layers / 2 ? p.settings.aux_matches : 1) * N;
    const bool transposed = T > Q;
    const int rows = transposed ? Q : T, columns = transposed ? T : Q;
    const double *cost = p.costs + ((size_t)layer * p.num_targets + first) * Q;
    double *u = (double *)smem, *v = u + rows, *shortest = v + columns;
    int *row_of_column = (int *)(shortest + columns), *before = row_of_column + columns, *done = before + columns,
        *column_of_row = done + columns;
    int *match = p.match + (size_t)blockIdx.x * Q;
    for (int q = lane; q < Q; q += 32) match[q] = -1;
    for (int i = lane; i < rows; i += 32) u[i] = 0;
    for (int j = lane; j < columns; j += 32) v[j] = 0, row_of_column[j] = -1;
    for (int start = 0; start < rows; start++) {
        for (int j = lane; j < columns; j += 32) shortest[j] = INFINITY, done[j] = 0, before[j] = start;
        __syncwarp();
        int row = start, sink = -1;
        double length = 0;
        while (sink < 0) {
            int nearest = -1;
            double least = INFINITY;
            for (int j = lane; j < columns; j += 32) {
                if (done[j]) continue;
                const double c = transposed ? cost[(size_t)(j % N) * Q + row] : cost[(size_t)(row % N) * Q + j];
                const double path = length + assign_cost(c) - u[row] - v[j];
                if (path < shortest[j]) shortest[j] = path, before[j] = row;
                if (nearest < 0 || shortest[j] < least) nearest = j, least = shortest[j];
            }
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) {  // of equal ones the first column
                const double other = __shfl_xor_sync(~0u, least, distance);
                const int column = __shfl_xor_sync(~0u, nearest, distance);
                if (column < 0 || (nearest >= 0 && (other > least || (other == least && column > nearest)))) continue;
                least = other, nearest = column;
            }
            length = least;
            if (nearest % 32 == lane) done[nearest] = 1;
            row = row_of_column[nearest];
            if (row < 0) sink = nearest;
        }
        __syncwarp();
        for (int j = lane; j < columns; j += 32)
            if (done[j] && j != sink) assign_price(&u[row_of_column[j]], &v[j], length - shortest[j]);
        __syncwarp();
        if (lane == 0) {
            u[start] += length;
            assign_along(column_of_row, row_of_column, before, start, sink);
        }
        __syncwarp();
    }
    for (int i = lane; i < rows; i += 32) {
        if (transposed)
            match[i] = column_of_row[i] % N;
        else
            match[column_of_row[i]] = i % N;
    }
}

// match_queries() for every image and layer.
static void gpu_match(const SetLoss &p) {
    const size_t rows = (size_t)(p.layers * p.images * p.Q), most = (size_t)(p.settings.aux_matches * p.most_targets);
    const size_t Q = (size_t)p.Q, columns = most > Q ? most : Q;
    const size_t of_costs = WARPS * (size_t)p.classes * sizeof(double);
    const size_t of_match = (Q + 2 * columns) * sizeof(double) + (Q + 3 * columns) * sizeof(int);
    allow_shared(match_costs_kernel, of_costs);
    const Timed timed_costs("match_costs", "", 4.0 * p.classes * (double)rows);
    match_costs_kernel<<<blocks(rows, WARPS), THREADS, of_costs, stream>>>(p);
    CUDA(cudaGetLastError());
    allow_shared(match_kernel, of_match);
    const Timed timed_match("match", "", 0);
    match_kernel<<<(unsigned)(p.layers * p.images), 32, of_match, stream>>>(p);
    CUDA(cudaGetLastError());
}

// class_loss() and layer_loss() of one query by a warp.
__global__ static void __launch_bounds__(THREADS) set_loss_kernel(SetLoss p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const int lane = (int)threadIdx.x % 32, row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    if (row >= p.layers * p.images * p.Q) return;
    const int layer = row / (p.images * p.Q), image = row / p.Q % p.images, many = layer < p.layers / 2;
    const int first = p.first_target[image], target = p.match[row];
    const int label = target >= 0 ? p.target_classes[first + target] : p.num_labels;
    const double weight = layer == p.layers - 1 || p.settings.aux_loss ? 1 : 0;
    const double class_weight = weight * p.settings.class_loss_coef, num_boxes = fmax(p.divisors.boxes[many], 1.0);
    const float scale = p.loss_scale ? p.loss_scale->scale : 1;
    double *of_class = (double *)smem + threadIdx.x / 32 * p.classes, loss;
    const float *z = p.logits + (size_t)row * p.classes;
    float *dz = p.dlogits + (size_t)row * p.classes;
    if (p.focal) {
        for (int c = lane; c < p.classes; c += 32) {
            double derivative;
            of_class[c] = focal_loss((double)z[c], c == label, &derivative);
            dz[c] = scale * (float)(class_weight * derivative / num_boxes);
        }
        __syncwarp();
        loss = 0;
        for (int c = 0; c < p.classes; c++) loss += of_class[c];
        loss /= num_boxes;
    } else {
        const double log_sum = warp_softmax(of_class, z, p.classes);
        const double w = (label < p.num_labels ? 1 : p.settings.eos_coef) / p.divisors.weights[many];
        for (int c = lane; c < p.classes; c += 32)
            dz[c] = scale * (float)(class_weight * w * (of_class[c] - (c == label)));
        loss = w * (log_sum - (double)z[label]);
    }
    int best = -1;
    float highest = 0;
    for (int c = lane; c < p.classes; c += 32)
        if (best < 0 || z[c] > highest) best = c, highest = z[c];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {  // of equal ones the first class
        const float other = __shfl_xor_sync(~0u, highest, distance);
        const int c = __shfl_xor_sync(~0u, best, distance);
        if (c < 0 || (best >= 0 && (other < highest || (other == highest && c > best)))) continue;
        highest = other, best = c;
    }
    if (lane > 0) return;
    double *terms = p.terms + 3 * (size_t)row, dbox[4] = {0, 0, 0, 0};
    terms[0] = loss, terms[1] = terms[2] = 0;
    p.answers[row] = (unsigned char)((p.focal ? highest > 0 : best != p.num_labels) ? SAYS_OBJECT : 0);
    if (target >= 0) {
        double box[4], dgiou[4];
        for (int i = 0; i < 4; i++) box[i] = (double)p.boxes[4 * (size_t)row + i];
        const double *t = p.target_boxes + 4 * (first + target);
        terms[2] = (1 - generalized_iou(box, t, dgiou)) / num_boxes;
        for (int i = 0; i < 4; i++) {
            const double difference = box[i] - t[i], sign = (difference > 0) - (difference < 0);
            terms[1] += fabs(difference) / num_boxes;
            dbox[i] = weight * (p.settings.bbox_loss_coef * sign - p.settings.giou_loss_coef * dgiou[i]) / num_boxes;
        }
        p.answers[row] |= IS_MATCHED | (best == label ? IS_RIGHT : 0);
    }
    for (int i = 0; i < 4; i++) {
        const float b = p.boxes[4 * (size_t)row + i];
        p.dbox_logits[4 * (size_t)row + i] = scale * ((float)dbox[i] * (b * (1 - b)));
    }
}

// A block sums what the queries of a decoder layer have.
__global__ static void __launch_bounds__(THREADS) loss_sums_kernel(SetLoss p) {
    __shared__ double shared[WARPS];
    const int rows = p.images * p.Q, first = (int)blockIdx.x * rows;
    double sums[LOSS_SUMS] = {};
    for (int i = (int)threadIdx.x; i < rows; i += THREADS) {
        for (int term = 0; term < 3; term++) sums[term] += p.terms[3 * (size_t)(first + i) + term];
        sums[SUM_MATCHED] += (p.answers[first + i] & IS_MATCHED) != 0;
        sums[SUM_RIGHT] += (p.answers[first + i] & IS_RIGHT) != 0;
    }
    for (int image = (int)threadIdx.x; image < p.images; image += THREADS) {
        int objects = 0;
        for (int q = 0; q < p.Q; q++) objects += p.answers[first + image * p.Q + q] & SAYS_OBJECT;
        sums[SUM_CARDINALITY] += abs(objects - (p.first_target[image + 1] - p.first_target[image])) / p.divisors.images;
    }
    for (int i = 0; i < LOSS_SUMS; i++) {
        const double sum = block_sum(sums[i], shared);
        if (threadIdx.x == 0) p.sums[blockIdx.x * LOSS_SUMS + i] += sum;
    }
}

// Losses and gradients from the matches, as layer_loss() has them, for every image and layer.
static void gpu_set_loss(const SetLoss &p) {
    const size_t rows = (size_t)(p.layers * p.images * p.Q), shared = WARPS * (size_t)p.classes * sizeof(double);
    allow_shared(set_loss_kernel, shared);
    const Timed timed_losses("set_loss", "", 8.0 * p.classes * (double)rows);
    set_loss_kernel<<<blocks(rows, WARPS), THREADS, shared, stream>>>(p);
    CUDA(cudaGetLastError());
    const Timed timed_sums("loss_sums", "", 24.0 * (double)rows);
    loss_sums_kernel<<<(unsigned)p.layers, THREADS, 0, stream>>>(p);
    CUDA(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Optimizer. The host does not wait for the gradient's norm: what depends on it is decided on the device.

__global__ static void __launch_bounds__(THREADS)
    gradient_norm_kernel(double *partials, const float *grad, size_t count) {
    __shared__ double shared[WARPS];
    double sum = 0;
#pragma unroll
    for (int i = 0; i < NORM_CHUNKS * PARAM_CHUNK / (8 * THREADS); i++) {
        const size_t at =
            (((size_t)blockIdx.x * (NORM_CHUNKS * PARAM_CHUNK / (8 * THREADS)) + i) * THREADS + threadIdx.x) * 8;
        if (at >= count) continue;
        const Eight g = load8(grad + at);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += (double)g.x[j] * (double)g.x[j];
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ static void __launch_bounds__(THREADS)
    gradient_norm_finish_kernel(double *norm, const double *partials, int count, const LossScale *scale) {
    __shared__ double shared[WARPS];
    double sum = 0;
    for (int i = (int)threadIdx.x; i < count; i += THREADS) sum += partials[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *norm = sqrt(sum) / scale->scale;
}

__global__ static void __launch_bounds__(THREADS)
    clear_gradients_kernel(float *grad, size_t count, const AdamwStep *before) {
    const int64_t at = place8(count);
    if (at < 0 || before->failed) return;
    const Eight zeros = {};
    store8(grad + at, zeros);
}

// The gradients are zero, unless the step before has failed: then they stay, so that this one fails too, and the host,
// which is a step behind, finds what was not finite.
static void gpu_clear_gradients(const DeviceParams *d) {
    const Timed timed_kernel("clear_gradients", "", 4.0 * (double)d->trained);
    clear_gradients_kernel<<<blocks(d->trained, 8 * THREADS), THREADS, 0, stream>>>(d->grad, d->trained, d->step);
    CUDA(cudaGetLastError());
}

// d->grad_norm = the norm of all gradients together, divided by the loss's scale.
static void gpu_gradient_norm(const DeviceParams *d) {
    const unsigned count = blocks(d->trained, NORM_CHUNKS * PARAM_CHUNK);
    const Timed timed_squares("gradient_norm", "", 4.0 * (double)d->trained);
    gradient_norm_kernel<<<count, THREADS, 0, stream>>>(d->norm_partials, d->grad, d->trained);
    CUDA(cudaGetLastError());
    const Timed timed_sum("gradient_norm_finish", "", 8.0 * count);
    gradient_norm_finish_kernel<<<1, THREADS, 0, stream>>>(d->grad_norm, d->norm_partials, (int)count, d->loss_scale);
    CUDA(cudaGetLastError());
}

// One thread: the step's numbers, and what becomes of the loss's scale. step: of the run, those that were skipped among
// them; Adam counts the others.
__global__ static void __launch_bounds__(32)
    adamw_step_kernel(AdamwStep *to, LossScale *scale, const double *grad_norm, OptimizerSettings settings,
                      int64_t step, bool scales, const double *loss_sums, int num_sums) {
    if (threadIdx.x > 0) return;
    bool finite_loss = true;
    for (int i = 0; i < num_sums; i++) finite_loss &= isfinite(loss_sums[i]);
    AdamwStep s;
    LossScale now = *scale;
    const double norm = *grad_norm, taken = (double)(step - now.skipped);
    const double correction1 = 1 - pow(0.9, taken + 1), correction2 = 1 - pow(0.999, taken + 1);
    for (int group = 0; group < 2; group++) {
        const double lr = group ? settings.lr_backbone : settings.lr;
        s.decay[group] = (float)(1 - lr * settings.weight_decay), s.rate[group] = (float)(lr / correction1);
    }
    s.root = (float)(1 / sqrt(correction2));
    s.share = (float)(1 - fmin(settings.ema_decay, taken / (taken + 9)));
    s.factor = settings.clip_max_norm > 0 ? (float)fmin(1.0, settings.clip_max_norm / (norm + 1e-6)) : 1;
    s.factor /= now.scale;
    s.finite = isfinite(norm);
    s.failed = !s.finite && (now.scale == 1 || !finite_loss);
    now.good_steps++;
    if (!s.finite) {
        now.scale = fmaxf(now.scale / 2, 1), now.good_steps = 0, now.skipped++;
    } else if (now.good_steps == LOSS_SCALE_STEPS) {
        now.scale = scales ? fminf(now.scale * 2, MOST_LOSS_SCALE) : 1, now.good_steps = 0;
    }
    *to = s, *scale = now;
}

template <class T>
__global__ static void __launch_bounds__(PARAM_CHUNK / 8)
    adamw_kernel(float *value, float *exp_avg, float *exp_avg_sq, float *ema, T *operand, const float *grad,
                 const unsigned char *kinds, const AdamwStep *numbers) {
    const AdamwStep step = *numbers;
    if (!step.finite) return;
    const int kind = kinds[blockIdx.x];
    const float decay = kind & KIND_BACKBONE ? step.decay[1] : step.decay[0];
    const float rate = kind & KIND_BACKBONE ? step.rate[1] : step.rate[0];
    const float beta1 = (float)0.9, beta2 = (float)0.999, rest1 = (float)(1 - 0.9), rest2 = (float)(1 - 0.999);
    const size_t at = (size_t)blockIdx.x * PARAM_CHUNK + 8 * threadIdx.x;
    const Eight gradient = load8(grad + at);
    Eight x = load8(value + at), m = load8(exp_avg + at), v = load8(exp_avg_sq + at);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float g = gradient.x[j] * step.factor;
        m.x[j] = beta1 * m.x[j] + rest1 * g;
        v.x[j] = beta2 * v.x[j] + rest2 * g * g;
        x.x[j] = x.x[j] * decay - rate * m.x[j] / (sqrtf(v.x[j]) * step.root + (float)1e-8);
    }
    store8(exp_avg + at, m);
    store8(exp_avg_sq + at, v);
    store8(value + at, x);
    if (ema) {
        Eight average = load8(ema + at);
#pragma unroll
        for (int j = 0; j < 8; j++) average.x[j] += step.share * (x.x[j] - average.x[j]);
        store8(ema + at, average);
    }
    if (!(kind & KIND_FOLDED)) store8(operand + at, x);
}

// optimizer_step() with the norm in d->grad_norm; where that is not finite nothing changes but the loss's scale. step:
// number of the run's steps before this one; loss_sums (num_sums): of the loss, device. A block does a chunk.
// Afterwards the operands are those of the new values.
template <class T>
static void gpu_optimizer_step(const DeviceParams *d, const OptimizerSettings *settings, int64_t step,
                               const double *loss_sums, int num_sums) {
    const bool scales = std::is_same<T, __half>::value;
    const Timed timed_step("adamw_step", "", 0);
    adamw_step_kernel<<<1, 32, 0, stream>>>(d->step, d->loss_scale, d->grad_norm, *settings, step, scales, loss_sums,
                                            num_sums);
    CUDA(cudaGetLastError());
    const Timed timed_adamw("adamw", "", (28.0 + (d->ema ? 8 : 0) + sizeof(T)) * (double)d->trained);
    adamw_kernel<T><<<(unsigned)(d->trained / PARAM_CHUNK), PARAM_CHUNK / 8, 0, stream>>>(
        d->value, d->exp_avg, d->exp_avg_sq, d->ema, (T *)d->operand, d->grad, d->kinds, d->step);
    CUDA(cudaGetLastError());
    if (d->tracks) gpu_standardise(d);
    gpu_fold<T>(d);
}

// What the host says when it learns, by an asynchronous copy of d->loss_scale, how that stands behind a step (0 is the
// first); before: how it stood before that. A line if the gradient was too large for it. 0, or -1: at a scale of 1 it
// was not the scale's fault, and the run must stop.
static int loss_scale_say(const LossScale *before, const LossScale *after, int64_t step, Error *error) {
    if (after->skipped == before->skipped) return 0;
    if (before->scale == 1) return fail(error, "step %lld: the gradient is not finite", (long long)step + 1);
    printf("step %lld: the gradient overflows fp16: left out; the loss is scaled by %.0f, before by %.0f\n",
           (long long)step + 1, (double)after->scale, (double)before->scale);
    return 0;
}

#ifdef HAVE_CUBLASLT
// ---------------------------------------------------------------------------------------------------------------------
// Network: what the passes below need besides the kernels

template <class T>
__global__ static void __launch_bounds__(THREADS) scale_kernel(T *y, const T *x, float factor, size_t count) {
    const int64_t at = place8(count);
    if (at < 0) return;
    Eight value = load8(x + at);
#pragma unroll
    for (int j = 0; j < 8; j++) value.x[j] *= factor;
    store8(y + at, value);
}

// y = x * factor; count: a multiple of 8.
template <class T>
static void gpu_scale(T *y, const T *x, float factor, size_t count) {
    const Timed timed_kernel("scale", "", 2.0 * sizeof(T) * (double)count);
    scale_kernel<T><<<blocks(count, 8 * THREADS), THREADS, 0, stream>>>(y, x, factor, count);
    CUDA(cudaGetLastError());
}

__global__ static void __launch_bounds__(THREADS)
    add_kernel(float *y, const float *a, const float *b, const float *c, float *sum, size_t count) {
    const int64_t at = place8(count);
    if (at < 0) return;
    Eight value = load8(a + at);
    const Eight second = load8(b + at), third = c ? load8(c + at) : Eight();
    Eight total = sum ? load8(sum + at) : Eight();
#pragma unroll
    for (int j = 0; j < 8; j++) value.x[j] = value.x[j] + second.x[j] + third.x[j], total.x[j] += second.x[j];
    store8(y + at, value);
    if (sum) store8(sum + at, total);
}

// y = a + b + c, and sum += b; c and sum may be NULL, y may be any of the others. count: a multiple of 8.
static void gpu_add(float *y, const float *a, const float *b, const float *c, float *sum, size_t count) {
    const Timed timed_kernel("add", "", (12.0 + (c ? 4 : 0) + (sum ? 8 : 0)) * (double)count);
    add_kernel<<<blocks(count, 8 * THREADS), THREADS, 0, stream>>>(y, a, b, c, sum, count);
    CUDA(cudaGetLastError());
}

// Sums that wait. Each bias, and each norm's weight and bias, has a sum over rows for a gradient, in the two passes of
// gpu_column_sums(): a pair of launches for each would be a third of all launches of a step. So the tensors of a block
// share the first pass, and the second passes wait in a list, their partial sums in memory, and are one launch.

enum { SUM_TENSORS = 4, WAITING_SUMS = 96 };  // of one first pass; of one second pass

template <class S>
struct ColumnSums {
    int count;
    const S *x[SUM_TENSORS];
    float *partials[SUM_TENSORS];
    int rows[SUM_TENSORS], C[SUM_TENSORS];
};

template <class S>
__global__ static void __launch_bounds__(THREADS) column_sums_of_kernel(const __grid_constant__ ColumnSums<S> p) {
    const int i = (int)blockIdx.z;
    if ((int)blockIdx.x * CHUNK_ROWS < p.rows[i] && (int)blockIdx.y * THREADS < p.C[i])
        sum_columns(p.partials[i], p.x[i], p.rows[i], p.C[i]);
}

typedef struct {
    float *first, *second;  // as in gpu_add_partials()
    const float *partials;
    int chunks, C;
} WaitingSum;

typedef struct {
    WaitingSum sums[WAITING_SUMS];
    int count;
} WaitingSums;

__global__ static void __launch_bounds__(THREADS) add_waiting_kernel(const __grid_constant__ WaitingSums p) {
    const WaitingSum sum = p.sums[blockIdx.y];
    add_partial_sums(sum.first, sum.second, sum.partials, sum.chunks, sum.C, sum.second ? 2 * sum.C : sum.C);
}

// A layer's tensors in device memory: as floats, and as what products with operands of T read.
typedef struct {
    const float *weight, *bias;          // bias: of a convolution with a frozen norm the folded one
    const void *operand, *bias_operand;  // T
    float *dweight, *dbias;              // NULL if they are not trained
    const Folded *folded;                // NULL without a norm
} DeviceLayer;

static void device_layers(DeviceLayer *layers, const DeviceParams *d, const Model *model, size_t number_bytes) {
    const Folded *folded = d->folded;
    size_t filters = 0;
    for (int i = 0; i < model->num_layers; i++) {
        const Layer *layer = model->layers[i];
        const Param *bias = layer->bias ? layer->bias : layer->norm_bias;
        const size_t place = device_place(d, model, layer->weight), bias_place = device_place(d, model, bias);
        DeviceLayer *to = &layers[i];
        to->weight = d->value + place, to->operand = (char *)d->operand + place * number_bytes;
        to->bias = layer->bias ? d->value + bias_place : d->bias + filters;
        to->bias_operand = layer->bias ? (char *)d->operand + bias_place * number_bytes
                                       : (char *)d->bias_operand + filters * number_bytes;
        to->dweight = layer->weight->trained ? d->grad + place : NULL;
        to->dbias = bias->trained ? d->grad + bias_place : NULL;
        to->folded = layer->bias ? NULL : folded++;
        if (!layer->bias) filters += (size_t)layer->shape.out_channels;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Network: where the activations of a micro-batch lie. With n->recompute (--recompute) a block of the backbone keeps
// its input and output, an encoder layer the same, and their other activations, which all of them have in the same
// memory, are made again on the way back: the same kernels on the same numbers, so the same bytes.

// Sizes that the maps of a micro-batch have on their way; behind these one for each stride of the blocks, then the
// queries (num_queries x 1 an image), and the queries of all decoder layers as one map.
enum { LEVEL_PICTURE, LEVEL_STEM, LEVEL_POOLED, MAX_LEVELS = LEVEL_POOLED + MAX_STAGES + 2 };

// As in train_detr.c, with the rows of all images. Pixels, maps and operands are T.
template <class T>
struct DeviceBlock {
    int in_level, out_level;
    T *in, *inner[2], *shortcut, *out;
};

template <class T>
struct DeviceAttention {
    Ragged queries, keys;
    int query_parts, key_parts;
    const T *query_in, *key_in, *value_in;
    const float *residual;
    float4 *prior;  // of the anchor decoder's cross-attention, or NULL
    T *query, *key, *value, *attended;
    float *lse, *sum, *mean, *rstd, *out;
    T *operand;  // out, rounded; with T float out itself
};

template <class T>
struct DeviceFeedForward {
    Ragged map;
    const T *in;
    const float *residual;
    T *hidden;
    float *sum, *mean, *rstd, *out;
    T *operand;
};

// What the device tells of a step, in pinned memory, there when `done` is; and what the host remembers of it until
// then. The images are those of the batch that could be read.
typedef struct {
    double *sums, *grad_norm;  // (dec_layers, LOSS_SUMS), (1)
    LossScale *scale;          // (1)
    float *boxes;              // (images, Q, 4), of the last decoder layer
    int *match;                // (images, Q)
    cudaEvent_t done;
    int images, *places;  // (images), in the batch
    LossDivisors divisors;
    LossSettings settings;
    Dropout dropout;
    int64_t step;
    const Sample *samples;  // the caller's, like the losses
    Losses *losses;
} StepResult;

// --norm_init track: maps of the pictures that the norms follow, floats whatever T is, each as large as the largest;
// raw: what a convolution makes, before its norm.
typedef struct {
    float *maps[2], *inner, *raw;
    double *partials;  // (FOLLOW_PARTS, 2, channels)
} FollowedMaps;

enum { FOLLOW_PARTS = 128 };

template <class T>
struct DeviceNetwork {
    const Model *model;
    DeviceParams params;
    DeviceLayer *layers;  // as model->layers
    int training;
    bool recompute;          // see below: what a block or an encoder layer keeps
    int batch, max_images;   // of a step, of a micro-batch
    int slots;               // of pictures that are loaded at once: max_images, or more that the norms follow
    int max_places;          // height or width of the largest map of tokens
    size_t workspace_bytes;  // of cuBLASLt
    Arena fixed;             // device: tables, sums, cuBLASLt's workspace
    Arena arena;             // device: of a micro-batch, laid out anew for each
    Feed feed;               // of micro-batches: tables of segments, targets, pictures
    Pictures pictures;
    Arena host;               // pinned: results
    StepResult results[2];    // of the step that was begun last, and of the one before
    int64_t begun, finished;  // steps
    float *pixel_table, *position_table;
    void *workspace;
    double *loss_sums;             // (dec_layers, LOSS_SUMS), of a step
    int tokens, queries, answers;  // levels
    // The micro-batch
    int images, num_targets, most_targets;
    Segment *segments;            // host: (MAX_LEVELS, slots)
    const Segment *fed_segments;  // the same on the device
    Ragged maps[MAX_LEVELS];
    Dropout dropout;
    T *pixels, *stem, *pooled;
    unsigned char *argmax;
    DeviceBlock<T> *blocks;
    float *token_rows;  // (tokens, C), as an operand: token_operand
    T *token_operand, **encoder_query, *memory_query;
    DeviceAttention<T> *encoder_attention, *decoder_self, *decoder_cross;
    DeviceFeedForward<T> *encoder_ffn, *decoder_ffn;
    float *target;  // zeros, or the queries' content
    T *target_operand;
    // --decoder anchor: the learned boxes of each image, as logits and as boxes; what positions are made of, (L,
    // images, Q) rows; frequencies
    float *anchors, *first_boxes, *box_features, *position_hidden, *positions, *periods;
    T **self_query, **cross_query;
    // (L, images, Q) are rows, of what the layers' feed forwards leave too
    float *states, *state_mean, *state_rstd, *logits, *box_hidden[2], *box_logits, *boxes;
    SetLoss loss;
    FollowedMaps followed;
    // The way back
    T *dshortcut, *dprojected, *dattended, *dq, *dk, *dv;
    float *dstates, *dx, *dsum, *dquery, *dmemory, *dmemory_query, *dpositions, *dots, *conv_partials;
    float *partials;
    size_t partials_used, partials_count;
    WaitingSums waiting;
};

template <class T>
static T *take(Arena *arena, size_t count) {
    return (T *)arena_bytes(arena, count * sizeof(T));
}

// Bytes of the feed that a micro-batch takes at most.
static size_t micro_batch_bytes(int images, int targets, int side, size_t worst_pixels) {
    return (size_t)(MAX_LEVELS * images) * sizeof(Segment) + ((size_t)images + 1) * sizeof(int) +
           (size_t)targets * (sizeof(int) + 4 * sizeof(double)) + 4 * 64 + pictures_bytes(images, side, worst_pixels);
}

// The level behind a block; block: its number.
static int level_behind(const Model *model, int block, int level) {
    for (int j = 0; j < model->blocks[block].num_convs; j++) level += model->blocks[block].conv[j].shape.stride > 1;
    return level;
}

// Makes the tables of all levels from that of the pictures. False if a map has more rows than an int can count.
template <class T>
static bool network_levels(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    const int Q = model->config.num_queries, L = model->config.dec_layers;
    const ConvShape *shapes[MAX_LEVELS] = {NULL, &model->stem.shape, &POOLING};
    int level = LEVEL_POOLED;
    for (int i = 0; i < model->num_blocks; i++) {
        const int behind = level_behind(model, i, level);
        for (int j = 0; j < model->blocks[i].num_convs && behind > level; j++)
            if (model->blocks[i].conv[j].shape.stride > 1) shapes[behind] = &model->blocks[i].conv[j].shape;
        level = behind;
    }
    n->tokens = level, n->queries = level + 1, n->answers = level + 2;
    for (int i = 0; i <= n->tokens; i++) {
        Segment *to = n->segments + i * n->slots;
        n->maps[i].rows = ragged_segments(to, i ? to - n->slots : to, n->images, shapes[i]);
        n->maps[i].count = n->images;
        if (n->maps[i].rows < 0) return false;
    }
    for (int i = 0; i < n->images; i++) {
        const Segment segment = {i * Q, Q, 1, n->segments[i].image};
        n->segments[n->queries * n->slots + i] = segment;
    }
    const Segment all = {0, L * n->images, Q, 0};
    n->segments[n->answers * n->slots] = all;
    n->maps[n->queries] = {NULL, n->images, n->images * Q};
    n->maps[n->answers] = {NULL, 1, L * n->images * Q};
    for (int i = 0; i <= n->answers; i++) n->maps[i].segments = n->fed_segments + i * n->slots;
    return true;
}

template <class T>
static void plan_device_backbone(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    Arena *arena = &n->arena;
    const int stem_kept = n->training && model->stem.weight->trained;
    const size_t stem = (size_t)n->maps[LEVEL_STEM].rows * (size_t)model->config.stem_width,
                 pooled = (size_t)n->maps[LEVEL_POOLED].rows * (size_t)model->config.stem_width,
                 pixels = 3 * (size_t)n->maps[LEVEL_PICTURE].rows;
    // As on the CPU: blocks that are not trained share two inner maps and two outer ones, and a block without a
    // shortcut adds to its input in place. With n->recompute those that are trained share the inner maps too.
    size_t map[2] = {larger(pooled, pixels), stem}, inner[2] = {pooled, 0}, shortcut = 0;
    int level = LEVEL_POOLED, at = 0;
    for (int i = 0; i < model->num_blocks; i++) {
        const Block *block = &model->blocks[i];
        DeviceBlock<T> *b = &n->blocks[i];
        b->in_level = level, b->out_level = level = level_behind(model, i, level);
        const size_t in = (size_t)n->maps[b->in_level].rows, out = (size_t)n->maps[b->out_level].rows;
        if (block->has_shortcut && block->shortcut.needs_input_gradient)
            shortcut = larger(shortcut, in * (size_t)block->shortcut.shape.in_channels);
        const bool kept = block->trained && n->training;
        int of_conv = b->in_level;
        for (int j = 0; j < block->num_convs - 1 && (!kept || n->recompute); j++) {
            if (block->conv[j].shape.stride > 1) of_conv = b->out_level;
            inner[j] = larger(inner[j], (size_t)n->maps[of_conv].rows * (size_t)block->conv[j].shape.out_channels);
        }
        if (kept) continue;
        at ^= block->has_shortcut;
        map[at] = larger(map[at], out * (size_t)block->conv[block->num_convs - 1].shape.out_channels);
    }
    T *maps[2], *inners[2];
    for (int i = 0; i < 2; i++) maps[i] = take<T>(arena, map[i]), inners[i] = take<T>(arena, inner[i]);
    n->dshortcut = take<T>(arena, shortcut);
    n->pixels = stem_kept ? take<T>(arena, pixels) : maps[0];
    n->stem = stem_kept ? take<T>(arena, stem) : maps[1];
    n->pooled = stem_kept ? take<T>(arena, pooled) : maps[0];
    n->argmax = stem_kept ? take<unsigned char>(arena, pooled) : (unsigned char *)inners[0];
    T *in = n->pooled;
    at = 0;
    for (int i = 0; i < model->num_blocks; i++) {
        const Block *block = &model->blocks[i];
        DeviceBlock<T> *b = &n->blocks[i];
        const int kept = block->trained && n->training, last = block->num_convs - 1;
        int of_conv = b->in_level;
        for (int j = 0; j < last; j++) {
            if (block->conv[j].shape.stride > 1) of_conv = b->out_level;
            const size_t count = (size_t)n->maps[of_conv].rows * (size_t)block->conv[j].shape.out_channels;
            b->inner[j] = kept && !n->recompute ? take<T>(arena, count) : inners[j];
        }
        at ^= block->has_shortcut;
        const size_t count = (size_t)n->maps[b->out_level].rows * (size_t)block->conv[last].shape.out_channels;
        b->in = in, b->out = kept ? take<T>(arena, count) : maps[at];
        b->shortcut = block->has_shortcut ? b->out : b->in;
        in = b->out;
    }
}

// out as what the next product multiplies.
template <class T>
static T *take_operand(Arena *arena, float *out, size_t count) {
    if constexpr (std::is_same<T, float>::value) return (void)arena, (void)count, out;
    return take<T>(arena, count);
}

template <class T>
static void plan_device_attention(DeviceNetwork<T> *n, DeviceAttention<T> *a, int queries, int keys) {
    Arena *arena = &n->arena;
    const size_t C = (size_t)n->model->config.hidden_dim, rows = (size_t)n->maps[queries].rows,
                 of_keys = (size_t)n->maps[keys].rows;
    a->queries = n->maps[queries], a->keys = n->maps[keys];
    a->query_parts = attention_parts(n->segments + queries * n->slots, n->images);
    a->key_parts = attention_parts(n->segments + keys * n->slots, n->images);
    a->query = take<T>(arena, rows * C), a->key = take<T>(arena, of_keys * C), a->value = take<T>(arena, of_keys * C);
    a->attended = take<T>(arena, rows * C);
    a->lse = take<float>(arena, rows * (size_t)n->model->config.nheads);
    a->sum = take<float>(arena, rows * C), a->mean = take<float>(arena, rows), a->rstd = take<float>(arena, rows);
    a->out = take<float>(arena, rows * C);
    a->operand = take_operand<T>(arena, a->out, rows * C);
}

// f->out and f->operand are there.
template <class T>
static void plan_device_feed_forward(DeviceNetwork<T> *n, DeviceFeedForward<T> *f, int level) {
    Arena *arena = &n->arena;
    const size_t C = (size_t)n->model->config.hidden_dim, rows = (size_t)n->maps[level].rows;
    f->map = n->maps[level];
    f->hidden = take<T>(arena, rows * (size_t)n->model->config.dim_feedforward);
    f->sum = take<float>(arena, rows * C), f->mean = take<float>(arena, rows), f->rstd = take<float>(arena, rows);
}

template <class T>
static void plan_device_transformer(DeviceNetwork<T> *n) {
    const ModelConfig *config = &n->model->config;
    Arena *arena = &n->arena;
    const size_t C = (size_t)config->hidden_dim, tokens = (size_t)n->maps[n->tokens].rows,
                 queries = (size_t)n->maps[n->queries].rows;
    float *x = n->token_rows = take<float>(arena, tokens * C);
    const T *operand = n->token_operand = take_operand<T>(arena, x, tokens * C);
    for (int l = 0; l < config->enc_layers; l++) {
        DeviceFeedForward<T> *f = &n->encoder_ffn[l];
        f->out = take<float>(arena, tokens * C), f->operand = take_operand<T>(arena, f->out, tokens * C);
    }
    const size_t shared = arena->used;
    for (int l = 0; l < config->enc_layers; l++) {
        DeviceAttention<T> *a = &n->encoder_attention[l];
        DeviceFeedForward<T> *f = &n->encoder_ffn[l];
        if (n->recompute) arena->used = shared;  // the same memory for each layer
        a->query_in = a->key_in = n->encoder_query[l] = take<T>(arena, tokens * C);
        a->value_in = operand, a->residual = x;
        plan_device_attention(n, a, n->tokens, n->tokens);
        plan_device_feed_forward(n, f, n->tokens);
        f->in = a->operand, f->residual = a->out;
        x = f->out, operand = f->operand;
    }
    const size_t answers = (size_t)n->maps[n->answers].rows;
    const T *memory = operand;
    n->memory_query = take<T>(arena, tokens * C);
    x = n->target = take<float>(arena, queries * C);
    operand = n->target_operand = take_operand<T>(arena, x, queries * C);
    for (int l = 0; l < config->dec_layers; l++)  // side by side: C is whole cache lines
        n->decoder_ffn[l].out = take<float>(arena, queries * C);
    for (int l = 0; l < config->dec_layers; l++)
        n->decoder_ffn[l].operand = take_operand<T>(arena, n->decoder_ffn[l].out, queries * C);
    if (config->anchor) {
        n->anchors = take<float>(arena, 4 * queries), n->first_boxes = take<float>(arena, 4 * queries);
        n->box_features = take<float>(arena, 2 * answers * C);
        n->position_hidden = take<float>(arena, answers * C), n->positions = take<float>(arena, answers * C);
    }
    for (int l = 0; l < config->dec_layers; l++) {
        DeviceAttention<T> *self = &n->decoder_self[l], *cross = &n->decoder_cross[l];
        DeviceFeedForward<T> *f = &n->decoder_ffn[l];
        self->query_in = self->key_in = n->self_query[l] = take<T>(arena, queries * C);
        self->value_in = operand, self->residual = x;
        plan_device_attention(n, self, n->queries, n->queries);
        cross->query_in = n->cross_query[l] = take<T>(arena, queries * C);
        cross->key_in = n->memory_query, cross->value_in = memory, cross->residual = self->out;
        plan_device_attention(n, cross, n->queries, n->tokens);
        cross->prior = config->anchor ? take<float4>(arena, queries * (size_t)config->nheads) : NULL;
        plan_device_feed_forward(n, f, n->queries);
        f->in = cross->operand, f->residual = cross->out;
        x = f->out, operand = f->operand;
    }
}

template <class T>
static void plan_device_heads(DeviceNetwork<T> *n) {
    const ModelConfig *config = &n->model->config;
    Arena *arena = &n->arena;
    const size_t C = (size_t)config->hidden_dim, rows = (size_t)n->maps[n->answers].rows,
                 classes = (size_t)num_logits(config);
    n->states = take<float>(arena, rows * C);
    n->state_mean = take<float>(arena, rows), n->state_rstd = take<float>(arena, rows);
    n->logits = take<float>(arena, rows * classes);
    for (int i = 0; i < 2; i++) n->box_hidden[i] = take<float>(arena, rows * C);
    n->box_logits = take<float>(arena, 4 * rows), n->boxes = take<float>(arena, 4 * rows);
    SetLoss *p = &n->loss;
    p->layers = config->dec_layers, p->images = n->images, p->Q = config->num_queries, p->classes = num_logits(config);
    p->num_labels = config->num_labels, p->focal = config->focal;
    p->num_targets = n->num_targets, p->most_targets = n->most_targets;
    p->logits = n->logits, p->boxes = n->boxes, p->sums = n->loss_sums;
    if (!n->training) return;
    p->costs = take<double>(arena, (size_t)(config->dec_layers * n->num_targets) * (size_t)config->num_queries);
    p->match = take<int>(arena, rows);
    p->dlogits = take<float>(arena, rows * classes), p->dbox_logits = take<float>(arena, 4 * rows);
    p->terms = take<double>(arena, 3 * rows), p->answers = take<unsigned char>(arena, rows);
}

template <class T>
static void plan_device_backward(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    const ModelConfig *config = &model->config;
    Arena *arena = &n->arena;
    const size_t C = (size_t)config->hidden_dim, tokens = (size_t)n->maps[n->tokens].rows,
                 queries = (size_t)n->maps[n->queries].rows, answers = (size_t)n->maps[n->answers].rows,
                 rows = larger(tokens, queries), most = divide_up(larger(tokens, answers), CHUNK_ROWS);
    for (T **to : {&n->dprojected, &n->dattended, &n->dq, &n->dk, &n->dv}) *to = take<T>(arena, rows * C);
    for (float **to : {&n->dx, &n->dsum, &n->dquery}) *to = take<float>(arena, rows * C);
    n->dmemory = take<float>(arena, tokens * C), n->dmemory_query = take<float>(arena, tokens * C);
    n->dpositions = take<float>(arena, (config->anchor ? answers : queries) * C),
    n->dstates = take<float>(arena, answers * C);
    n->dots = take<float>(arena, rows * (size_t)config->nheads);
    // Partial sums of every bias and norm, and of the convolution that has most
    size_t of_conv = 0;
    n->partials_count = (size_t)(2 * config->enc_layers + 3 * config->dec_layers + 1) * 2 * C * most;
    if (config->anchor) n->partials_count += 4 * (size_t)config->num_queries * divide_up((size_t)n->images, CHUNK_ROWS);
    for (int i = 0; i < model->num_layers; i++)
        if (model->layers[i]->bias) n->partials_count += (size_t)model->layers[i]->shape.out_channels * most;
    for (int i = -1; i < model->num_blocks; i++) {
        const Block *block = i < 0 ? NULL : &model->blocks[i];
        int level = i < 0 ? LEVEL_STEM : n->blocks[i].in_level;
        for (int j = 0; j < (block ? block->num_convs + block->has_shortcut : 1); j++) {
            const Layer *layer = !block ? &model->stem : j < block->num_convs ? &block->conv[j] : &block->shortcut;
            if (block && layer->shape.stride > 1) level = n->blocks[i].out_level;
            if (!layer->weight->trained) continue;
            of_conv = larger(of_conv, conv_partials(layer->shape, n->maps[level].rows));
            if (layer->norm_bias->trained)
                n->partials_count +=
                    (size_t)layer->shape.out_channels * divide_up((size_t)n->maps[level].rows, CHUNK_ROWS);
        }
    }
    n->conv_partials = take<float>(arena, of_conv);
    n->partials = take<float>(arena, n->partials_count);
}

// Gives everything of the micro-batch whose pictures are in n->segments its place. With arena.base NULL: only counts.
template <class T>
static bool plan_device_network(DeviceNetwork<T> *n) {
    if (!network_levels(n)) return false;
    n->arena.used = 0;
    plan_device_backbone(n);
    plan_device_transformer(n);
    plan_device_heads(n);
    if (n->training) plan_device_backward(n);
    return true;
}

// The same for pictures that the norms follow, which take the memory of a micro-batch, as none is under way then.
template <class T>
static bool plan_device_followed(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    int level = LEVEL_POOLED;
    if (!network_levels(n)) return false;
    size_t channels = (size_t)model->config.stem_width, most = channels * (size_t)n->maps[LEVEL_STEM].rows;
    for (int i = 0; i < model->num_blocks; i++) {
        for (int j = 0; j < model->blocks[i].num_convs; j++) {
            const ConvShape shape = model->blocks[i].conv[j].shape;
            level += shape.stride > 1;
            channels = larger(channels, (size_t)shape.out_channels);
            most = larger(most, (size_t)n->maps[level].rows * (size_t)shape.out_channels);
        }
    }
    most = larger(most, 3 * (size_t)n->maps[LEVEL_PICTURE].rows);
    n->arena.used = 0;
    FollowedMaps *f = &n->followed;
    for (float **to : {&f->maps[0], &f->maps[1], &f->inner, &f->raw}) *to = take<float>(&n->arena, most);
    f->partials = take<double>(&n->arena, FOLLOW_PARTS * 2 * channels);
    return true;
}

// What stays: from an arena without memory, only counts.
template <class T>
static void plan_device_fixed(DeviceNetwork<T> *n) {
    const ModelConfig *config = &n->model->config;
    n->pixel_table = take<float>(&n->fixed, 3 * 256);
    n->position_table = take<float>(&n->fixed, position_table_rows(n->max_places) * (size_t)config->hidden_dim / 2);
    n->periods = take<float>(&n->fixed, (size_t)config->hidden_dim / 4);
    n->loss_sums = take<double>(&n->fixed, (size_t)config->dec_layers * LOSS_SUMS);
    n->workspace = take<unsigned char>(&n->fixed, n->workspace_bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Network: forward and backward of a micro-batch. The functions are those of train_detr.c, rows of all images at once.

template <class T>
static const DeviceLayer *layer_of(const DeviceNetwork<T> *n, const Layer *layer) {
    int i = 0;
    while (n->model->layers[i] != layer) i++;
    return &n->layers[i];
}

template <class T>
static const float *value_of(const DeviceNetwork<T> *n, const Param *param) {
    return n->params.value + device_place(&n->params, n->model, param);
}

template <class T>
static float *grad_of(const DeviceNetwork<T> *n, const Param *param) {
    return param->trained ? n->params.grad + device_place(&n->params, n->model, param) : NULL;
}

// Adds up what waits.
template <class T>
static void add_waiting(DeviceNetwork<T> *n) {
    size_t columns = 0;
    for (int i = 0; i < n->waiting.count; i++)
        columns = larger(columns, (size_t)n->waiting.sums[i].C * (n->waiting.sums[i].second ? 2 : 1));
    const dim3 grid(blocks(columns, 32), (unsigned)n->waiting.count);
    if (n->waiting.count == 0) return;
    const Timed timed_kernel("add_waiting", "", 4.0 * (double)n->partials_used);
    add_waiting_kernel<<<grid, THREADS, 0, stream>>>(n->waiting);
    CUDA(cudaGetLastError());
    n->waiting.count = 0, n->partials_used = 0;
}

// Room for the partial sums of (rows, C), or (rows, 2, C), which will be added to first and second.
template <class T>
static float *wait_for(DeviceNetwork<T> *n, float *first, float *second, int rows, int C) {
    float *partials = n->partials + n->partials_used;
    const int chunks = (int)divide_up((size_t)rows, CHUNK_ROWS);
    const WaitingSum sum = {first, second, partials, chunks, C};
    n->partials_used += (size_t)chunks * (size_t)C * (second ? 2 : 1);
    n->waiting.sums[n->waiting.count++] = sum;
    return partials;
}

// The gradients of the layers' biases, as far as they are trained: sums over rows of dy.
template <class S>
struct BiasSum {
    const Layer *layer;
    const S *dy;
    int rows;
};

template <class S, class T>
static void sum_biases(DeviceNetwork<T> *n, std::initializer_list<BiasSum<S>> list) {
    ColumnSums<S> p;
    p.count = 0;
    size_t chunks = 0, columns = 0;
    double bytes = 0;
    if (n->waiting.count + SUM_TENSORS > WAITING_SUMS) add_waiting(n);
    for (const BiasSum<S> &sum : list) {
        float *dbias = layer_of(n, sum.layer)->dbias;
        if (!dbias) continue;
        const int i = p.count++, C = sum.layer->shape.out_channels;
        p.x[i] = sum.dy, p.partials[i] = wait_for(n, dbias, NULL, sum.rows, C), p.rows[i] = sum.rows, p.C[i] = C;
        chunks = larger(chunks, divide_up((size_t)sum.rows, CHUNK_ROWS)), columns = larger(columns, (size_t)C);
        bytes += (double)sizeof(S) * sum.rows * C;
    }
    const dim3 grid((unsigned)chunks, blocks(columns, THREADS), (unsigned)p.count);
    if (p.count == 0) return;
    const Timed timed_kernel("column_sums", "", bytes);
    column_sums_of_kernel<S><<<grid, THREADS, 0, stream>>>(p);
    CUDA(cudaGetLastError());
}

static bool is_linear(ConvShape s) { return s.kernel == 1 && s.stride == 1; }

// y = relu?(convolution of x + add), with its frozen norm.
template <class T>
static void convolve(const DeviceNetwork<T> *n, T *y, const T *x, const Layer *layer, int in_level, int out_level,
                     bool relu, const T *add) {
    const DeviceLayer *d = layer_of(n, layer);
    const ConvShape s = layer->shape;
    const Epilogue epilogue = {d->bias, add, relu, NULL, 0};
    if (is_linear(s))
        gpu_linear_forward(y, x, (const T *)d->operand, (const T *)d->bias_operand, add, relu, n->maps[in_level].rows,
                           s.in_channels, s.out_channels);
    else
        gpu_conv_forward(y, x, (const T *)d->operand, epilogue, n->maps[out_level], n->maps[in_level], s);
}

// dx = mask(dy W^T + add) of a convolution; dx may be mask or add. cuBLASLt does no mask before it writes, so there
// 1 x 1 convolutions too are done by the kernel.
template <class T>
static void convolve_backward_data(T *dx, const T *dy, const void *w, Ragged out, Ragged in, ConvShape s, const T *add,
                                   const T *mask) {
    const Epilogue epilogue = {NULL, add, 0, mask, 0};
    if (is_linear(s) && !mask)
        gpu_linear_backward_data<T, T>(dx, dy, (const T *)w, add, NULL, in.rows, s.in_channels, s.out_channels);
    else
        gpu_conv_backward_data(dx, dy, (const T *)w, epilogue, out, in, s);
}

// Both, where something is trained.
template <class T>
static void convolve_backward(DeviceNetwork<T> *n, T *dx, const T *x, const T *dy, const Layer *layer, int in_level,
                              int out_level, const T *add, const T *mask) {
    const DeviceLayer *d = layer_of(n, layer);
    const ConvShape s = layer->shape;
    const Ragged out = n->maps[out_level], in = n->maps[in_level];
    if (d->dweight) {
        if (is_linear(s))
            gpu_linear_backward_weight(d->dweight, x, dy, in.rows, s.in_channels, s.out_channels);
        else
            gpu_conv_backward_weight(d->dweight, n->conv_partials, x, dy, out, in, s);
        sum_biases<T>(n, {{layer, dy, out.rows}});
    }
    if (layer->needs_input_gradient) convolve_backward_data(dx, dy, d->operand, out, in, s, add, mask);
}

// y (rows, out) = relu?(x W + b) of a linear layer; operands of type S, T or float, results Y.
template <class S, class Y, class T>
static void project(const DeviceNetwork<T> *n, Y *y, const S *x, const Layer *layer, bool relu, int rows) {
    const DeviceLayer *d = layer_of(n, layer);
    const void *weight = std::is_same<S, float>::value ? d->weight : d->operand;
    const void *bias = std::is_same<Y, float>::value ? d->bias : d->bias_operand;
    gpu_linear_forward<S, Y>(y, x, (const S *)weight, (const Y *)bias, NULL, relu, rows, layer->shape.in_channels,
                             layer->shape.out_channels);
}

// dW += x^T dy; dx = dy W^T + add, if something before is trained; add may be NULL or dx. Biases: sum_biases().
template <class S, class Y, class T>
static void project_backward(const DeviceNetwork<T> *n, Y *dx, const S *x, const S *dy, const Layer *layer,
                             const Y *add, int rows) {
    const DeviceLayer *d = layer_of(n, layer);
    const int in = layer->shape.in_channels, out = layer->shape.out_channels;
    const void *weight = std::is_same<S, float>::value ? d->weight : d->operand;
    if (d->dweight) gpu_linear_backward_weight(d->dweight, x, dy, rows, in, out);
    if (layer->needs_input_gradient)
        gpu_linear_backward_data<S, Y>(dx, dy, (const S *)weight, add, NULL, rows, in, out);
}

template <class T>
static Mask mask_at(const DeviceNetwork<T> *n, int site) {
    Dropout dropout = n->dropout;
    dropout.site = (uint32_t)site;
    return dropout_mask(dropout);
}

// out = norm(sum) with sum = residual + dropout(sum), or with no_site as sum is; operand: out rounded.
enum { NO_SITE = -1 };

template <class T>
static void norm_rows(const DeviceNetwork<T> *n, const Norm *of, float *sum, const float *residual, int site,
                      float *out, T *operand, float *mean, float *rstd, Ragged map) {
    NormForward<T> p;
    memset((void *)&p, 0, sizeof p);
    p.sum = sum, p.y = out, p.mean = mean, p.rstd = rstd;
    p.operand = (void *)operand == (void *)out ? NULL : operand;
    p.x = site == NO_SITE ? NULL : sum, p.residual = site == NO_SITE ? sum : residual;
    p.weight = value_of(n, of->weight), p.bias = value_of(n, of->bias);
    if (site != NO_SITE) p.mask = mask_at(n, site);
    p.map = map, p.C = n->model->config.hidden_dim;
    gpu_norm_forward(p);
}

// dsum, and dx = dropout(dsum) as an operand, NULL with no site.
template <class T>
static void norm_rows_backward(DeviceNetwork<T> *n, const Norm *of, float *dsum, T *dx, const float *dy,
                               const float *sum, const float *mean, const float *rstd, int site, Ragged map) {
    NormBackward<T> p;
    memset((void *)&p, 0, sizeof p);
    p.dsum = dsum, p.dx = dx, p.dy = dy, p.sum = sum, p.mean = mean, p.rstd = rstd;
    p.dweight = grad_of(n, of->weight), p.dbias = grad_of(n, of->bias);
    p.weight = value_of(n, of->weight);
    if (site != NO_SITE) p.mask = mask_at(n, site);
    p.map = map, p.C = n->model->config.hidden_dim;
    if (n->waiting.count == WAITING_SUMS) add_waiting(n);
    if (p.dweight) p.partials = wait_for(n, p.dweight, p.dbias, map.rows, p.C);
    launch_norm_backward(p);
}

template <class T>
static AttentionParams<T> attention_params(const DeviceNetwork<T> *n, const DeviceAttention<T> *a, int site) {
    AttentionParams<T> p;
    memset((void *)&p, 0, sizeof p);
    p.out = a->attended, p.lse = a->lse, p.q = a->query, p.k = a->key, p.v = a->value;
    p.queries = a->queries, p.keys = a->keys, p.mask = mask_at(n, site), p.prior = a->prior;
    p.C = n->model->config.hidden_dim, p.heads = n->model->config.nheads;
    return p;
}

// attention_block_forward()
template <class T>
static void attend(const DeviceNetwork<T> *n, const AttentionBlock *block, DeviceAttention<T> *a, int site) {
    project(n, a->query, a->query_in, &block->query, false, a->queries.rows);
    project(n, a->key, a->key_in, &block->key, false, a->keys.rows);
    project(n, a->value, a->value_in, &block->value, false, a->keys.rows);
    gpu_attention_forward(attention_params(n, a, site), a->query_parts);
    project(n, a->sum, (const T *)a->attended, &block->output, false, a->queries.rows);
    norm_rows(n, &block->norm, a->sum, a->residual, site + 1, a->out, a->operand, a->mean, a->rstd, a->queries);
}

// attention_block_backward(). dout: gradient of `out`. Written: dresidual, and dquery = the gradient of query_in +
// add_query, which may be NULL. Added to: dkey, dvalue. dquery, dkey, dvalue, dout and (after the first use) add_query
// may be the same memory where one tensor plays several parts.
template <class T>
static void attend_backward(DeviceNetwork<T> *n, const AttentionBlock *block, const DeviceAttention<T> *a, int site,
                            float *dresidual, float *dquery, const float *add_query, float *dkey, float *dvalue,
                            const float *dout) {
    const int rows = a->queries.rows, keys = a->keys.rows;
    AttentionParams<T> p = attention_params(n, a, site);
    norm_rows_backward(n, &block->norm, dresidual, n->dprojected, dout, a->sum, a->mean, a->rstd, site + 1, a->queries);
    project_backward(n, n->dattended, (const T *)a->attended, (const T *)n->dprojected, &block->output, (const T *)NULL,
                     rows);
    p.dout = n->dattended, p.dq = n->dq, p.dk = n->dk, p.dv = n->dv, p.dots = n->dots;
    gpu_attention_backward(p, a->query_parts, a->key_parts);
    project_backward(n, dquery, a->query_in, (const T *)n->dq, &block->query, add_query, rows);
    project_backward(n, dkey, a->key_in, (const T *)n->dk, &block->key, (const float *)dkey, keys);
    project_backward(n, dvalue, a->value_in, (const T *)n->dv, &block->value, (const float *)dvalue, keys);
    sum_biases<T>(n, {{&block->output, n->dprojected, rows},
                      {&block->query, n->dq, rows},
                      {&block->key, n->dk, keys},
                      {&block->value, n->dv, keys}});
}

// feed_forward_forward()
template <class T>
static void feed_forward(const DeviceNetwork<T> *n, const FeedForward *ffn, DeviceFeedForward<T> *f, int site) {
    project(n, f->hidden, f->in, &ffn->fc1, true, f->map.rows);
    if (n->dropout.p > 0) gpu_dropout(f->hidden, f->hidden, mask_at(n, site), f->map, n->model->config.dim_feedforward);
    project(n, f->sum, (const T *)f->hidden, &ffn->fc2, false, f->map.rows);
    norm_rows(n, &ffn->norm, f->sum, f->residual, site + 1, f->out, f->operand, f->mean, f->rstd, f->map);
}

// feed_forward_backward()
template <class T>
static void feed_forward_backward(DeviceNetwork<T> *n, const FeedForward *ffn, const DeviceFeedForward<T> *f, int site,
                                  float *din, const float *dout) {
    const int rows = f->map.rows;
    const T *dprojected = n->dprojected;
    const DeviceLayer *fc2 = layer_of(n, &ffn->fc2);
    const ConvShape shape = ffn->fc2.shape;
    norm_rows_backward(n, &ffn->norm, n->dsum, n->dprojected, dout, f->sum, f->mean, f->rstd, site + 1, f->map);
    if (fc2->dweight)
        gpu_linear_backward_weight(fc2->dweight, f->hidden, dprojected, rows, shape.in_channels, shape.out_channels);
    if (ffn->fc2.needs_input_gradient) {
        if (n->dropout.p > 0) {
            const float factor = (float)(1 / (1 - n->dropout.p));
            gpu_scale(n->dattended, dprojected, factor, (size_t)rows * (size_t)shape.out_channels);
            dprojected = n->dattended;
        }
        convolve_backward_data(f->hidden, dprojected, fc2->operand, f->map, f->map, shape, (const T *)NULL,
                               (const T *)f->hidden);
    }
    project_backward(n, din, f->in, (const T *)f->hidden, &ffn->fc1, (const float *)n->dsum, rows);
    sum_biases<T>(n, {{&ffn->fc2, n->dprojected, rows}, {&ffn->fc1, f->hidden, rows}});
}

// x as an operand: rounded, or as it is.
template <class T>
static const T *rounded_to(T *operand, const float *x, size_t count) {
    if constexpr (std::is_same<T, float>::value) return (void)operand, (void)count, x;
    gpu_round(operand, x, count);
    return operand;
}

// block_forward(); again: only the inner maps, on the way back with n->recompute.
template <class T>
static void device_block_forward(const DeviceNetwork<T> *n, int i, bool again) {
    const Block *block = &n->model->blocks[i];
    const DeviceBlock<T> *b = &n->blocks[i];
    const T *x = b->in;
    int level = b->in_level;
    if (block->has_shortcut && !again)
        convolve(n, b->shortcut, x, &block->shortcut, level, b->out_level, false, (const T *)NULL);
    for (int j = 0; j < block->num_convs - again; j++) {
        const int last = j == block->num_convs - 1, to = block->conv[j].shape.stride > 1 ? b->out_level : level;
        T *y = last ? b->out : b->inner[j];
        convolve(n, y, x, &block->conv[j], level, to, true, last ? (const T *)b->shortcut : NULL);
        x = y, level = to;
    }
}

// backbone_forward() from the pictures on, as they were fed
template <class T>
static void device_backbone_forward(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    const int C = model->config.hidden_dim, tokens = n->maps[n->tokens].rows;
    gpu_pictures(n->pixels, &n->pictures, n->pixel_table);
    convolve(n, n->stem, (const T *)n->pixels, &model->stem, LEVEL_PICTURE, LEVEL_STEM, true, (const T *)NULL);
    gpu_maxpool_forward(n->pooled, n->argmax, n->stem, n->maps[LEVEL_POOLED], n->maps[LEVEL_STEM],
                        model->config.stem_width);
    for (int i = 0; i < model->num_blocks; i++) device_block_forward(n, i, false);
    project(n, n->token_rows, (const T *)n->blocks[model->num_blocks - 1].out, &model->input_projection, false, tokens);
    rounded_to(n->token_operand, n->token_rows, (size_t)tokens * (size_t)C);
}

// The rows that encoder layer l receives; those of the layer behind the last are what the encoder leaves.
template <class T>
static const float *encoder_rows(const DeviceNetwork<T> *n, int l) {
    return l > 0 ? n->encoder_ffn[l - 1].out : n->token_rows;
}

template <class T>
static void device_encoder_layer(const DeviceNetwork<T> *n, int l) {
    gpu_add_positions(n->encoder_query[l], encoder_rows(n, l), n->position_table, n->maps[n->tokens],
                      n->model->config.hidden_dim);
    attend(n, &n->model->encoder_attention[l], &n->encoder_attention[l], 4 * l);
    feed_forward(n, &n->model->encoder_ffn[l], &n->encoder_ffn[l], 4 * l + 2);
}

template <class T>
static void device_encoder_forward(DeviceNetwork<T> *n) {
    const ModelConfig *config = &n->model->config;
    for (int l = 0; l < config->enc_layers; l++) device_encoder_layer(n, l);
    gpu_add_positions(n->memory_query, encoder_rows(n, config->enc_layers), n->position_table, n->maps[n->tokens],
                      config->hidden_dim);
}

// The boxes that decoder layer l receives, (images, Q, 4); anchor only.
template <class T>
static const float *references(const DeviceNetwork<T> *n, int l) {
    return l > 0 ? n->boxes + 4 * (size_t)(l - 1) * (size_t)n->maps[n->queries].rows : n->first_boxes;
}

// What the decoder begins with; anchor: each image's copy of the learned boxes and of the queries' content.
template <class T>
static void device_decoder_begin(DeviceNetwork<T> *n) {
    const ModelConfig *config = &n->model->config;
    const size_t Q = (size_t)config->num_queries, C = (size_t)config->hidden_dim, count = (size_t)n->images * Q * C;
    CUDA(cudaMemsetAsync(n->target, 0, count * sizeof(float), stream));
    if (config->anchor) {
        const float *boxes = value_of(n, n->model->query_embeddings), *content = value_of(n, n->model->query_content);
        for (size_t i = 0; i < (size_t)n->images; i++)
            CUDA(cudaMemcpyAsync(n->anchors + 4 * i * Q, boxes, 4 * Q * sizeof(float), cudaMemcpyDeviceToDevice,
                                 stream));
        gpu_sigmoid(n->first_boxes, n->anchors, 4 * (size_t)n->images * Q);
        gpu_add_queries(n->target, n->target, content, n->images, (int)Q, (int)C);
    }
    rounded_to(n->target_operand, n->target, count);
}

// query_positions() of all images, (images, Q, C): the anchor decoder's; and where its cross-attention looks.
template <class T>
static const float *device_query_positions(DeviceNetwork<T> *n, int l) {
    const Model *model = n->model;
    const Ragged queries = n->maps[n->queries];
    const size_t count = (size_t)queries.rows * (size_t)model->config.hidden_dim, first = (size_t)l * count;
    float *features = n->box_features + 2 * first, *hidden = n->position_hidden + first, *y = n->positions + first;
    gpu_box_features(features, references(n, l), n->periods, 4 * (size_t)queries.rows, model->config.hidden_dim / 2);
    project(n, hidden, (const float *)features, &model->query_position_head[0], true, queries.rows);
    project(n, y, (const float *)hidden, &model->query_position_head[1], false, queries.rows);
    gpu_attention_prior(n->decoder_cross[l].prior, references(n, l), queries, n->maps[n->tokens], model->config.nheads);
    return y;
}

// box_head_forward() for `layers` decoder layers from `first` on, with the norm before it.
template <class T>
static void device_boxes_forward(DeviceNetwork<T> *n, int first, int layers) {
    const Model *model = n->model;
    const size_t queries = (size_t)n->maps[n->queries].rows, at = (size_t)first * queries,
                 state = at * (size_t)model->config.hidden_dim;
    const Ragged map = {n->maps[n->answers].segments, 1, layers * (int)queries};
    const DeviceLayer *last = layer_of(n, &model->box_head[2]);
    const float *before = !model->config.anchor ? NULL : first > 0 ? n->box_logits + 4 * (at - queries) : n->anchors;
    norm_rows(n, &model->decoder_norm, n->decoder_ffn[first].out, NULL, NO_SITE, n->states + state, (T *)NULL,
              n->state_mean + at, n->state_rstd + at, map);
    project(n, n->box_hidden[0] + state, (const float *)n->states + state, &model->box_head[0], true, map.rows);
    project(n, n->box_hidden[1] + state, (const float *)n->box_hidden[0] + state, &model->box_head[1], true, map.rows);
    gpu_linear_forward(n->box_logits + 4 * at, (const float *)n->box_hidden[1] + state, last->weight, last->bias,
                       before, false, map.rows, model->config.hidden_dim, 4);
    gpu_sigmoid(n->boxes + 4 * at, n->box_logits + 4 * at, 4 * (size_t)map.rows);
}

template <class T>
static void device_decoder_forward(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    const ModelConfig *config = &model->config;
    const int C = config->hidden_dim, rows = n->maps[n->queries].rows, anchor = config->anchor;
    const float *positions = value_of(n, model->query_embeddings), *x = n->target;
    const int copies = anchor ? 1 : n->images, each = rows / copies;  // of the positions
    device_decoder_begin(n);
    for (int l = 0; l < config->dec_layers; l++) {
        const int site = 4 * config->enc_layers + 6 * l;
        if (anchor) positions = device_query_positions(n, l);
        gpu_add_queries(n->self_query[l], x, positions, copies, each, C);
        attend(n, &model->decoder_self[l], &n->decoder_self[l], site);
        gpu_add_queries(n->cross_query[l], n->decoder_self[l].out, positions, copies, each, C);
        attend(n, &model->decoder_cross[l], &n->decoder_cross[l], site + 2);
        feed_forward(n, &model->decoder_ffn[l], &n->decoder_ffn[l], site + 4);
        if (anchor) device_boxes_forward(n, l, 1);
        x = n->decoder_ffn[l].out;
    }
    if (!anchor) device_boxes_forward(n, 0, config->dec_layers);
    project(n, n->logits, (const float *)n->states, &model->class_head, false, n->maps[n->answers].rows);
}

// From dy, the gradient of what a linear layer made of x, hidden units behind a ReLU: dW, and in the place of x its
// gradient. Biases: sum_biases().
template <class T>
static void hidden_backward(DeviceNetwork<T> *n, float *x, const float *dy, const Layer *layer, Ragged map) {
    const DeviceLayer *d = layer_of(n, layer);
    const ConvShape s = layer->shape;
    if (d->dweight) gpu_linear_backward_weight(d->dweight, x, dy, map.rows, s.in_channels, s.out_channels);
    if (layer->needs_input_gradient) convolve_backward_data<float>(x, dy, d->weight, map, map, s, NULL, x);
}

// Leaves the gradient of the states in dstates.
template <class T>
static void device_heads_backward(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    const Ragged map = n->maps[n->answers];
    float *const *hidden = n->box_hidden;
    const float *const dlogits = n->loss.dlogits, *dy = n->loss.dbox_logits;
    project_backward(n, n->dstates, (const float *)n->states, dlogits, &model->class_head, (const float *)NULL,
                     map.rows);
    for (int i = 2; i > 0; i--, dy = hidden[i]) hidden_backward(n, hidden[i - 1], dy, &model->box_head[i], map);
    float *learned = model->config.anchor ? grad_of(n, model->query_embeddings) : NULL;
    if (learned) {  // the first layer's boxes are sums with them
        const int count = 4 * model->config.num_queries;
        const dim3 grid(blocks((size_t)n->images, CHUNK_ROWS), blocks((size_t)count, THREADS));
        float *partials = wait_for(n, learned, NULL, n->images, count);
        const Timed timed_sums("column_sums", "", 4.0 * n->images * count);
        column_sums_kernel<float><<<grid, THREADS, 0, stream>>>(partials, n->loss.dbox_logits, n->images, count);
        CUDA(cudaGetLastError());
    }
    project_backward(n, n->dstates, (const float *)n->states, dy, &model->box_head[0], (const float *)n->dstates,
                     map.rows);
    sum_biases<float>(n, {{&model->class_head, dlogits, map.rows},
                          {&model->box_head[2], n->loss.dbox_logits, map.rows},
                          {&model->box_head[1], hidden[1], map.rows},
                          {&model->box_head[0], hidden[0], map.rows}});
}

// query_positions_backward()
template <class T>
static void device_query_positions_backward(DeviceNetwork<T> *n) {
    const Layer *head = n->model->query_position_head;
    const Ragged map = n->maps[n->answers];
    const DeviceLayer *first = layer_of(n, &head[0]);
    const ConvShape s = head[0].shape;
    hidden_backward(n, n->position_hidden, n->dpositions, &head[1], map);
    if (first->dweight)
        gpu_linear_backward_weight(first->dweight, (const float *)n->box_features, (const float *)n->position_hidden,
                                   map.rows, s.in_channels, s.out_channels);
    sum_biases<float>(n, {{&head[1], n->dpositions, map.rows}, {&head[0], n->position_hidden, map.rows}});
}

// decoder_backward(): leaves the gradient of the encoder's output in dmemory.
template <class T>
static void device_decoder_backward(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    const ModelConfig *config = &model->config;
    const int C = config->hidden_dim, Q = config->num_queries;
    const size_t count = (size_t)(n->images * Q) * (size_t)C, tokens = (size_t)n->maps[n->tokens].rows * (size_t)C;
    CUDA(cudaMemsetAsync(n->dmemory, 0, tokens * sizeof(float), stream));
    CUDA(cudaMemsetAsync(n->dmemory_query, 0, tokens * sizeof(float), stream));
    const int anchor = config->anchor;
    CUDA(cudaMemsetAsync(n->dpositions, 0, (size_t)(anchor ? config->dec_layers : 1) * count * sizeof(float), stream));
    norm_rows_backward(n, &model->decoder_norm, n->dstates, (T *)NULL, n->dstates, n->decoder_ffn[0].out, n->state_mean,
                       n->state_rstd, NO_SITE, n->maps[n->answers]);
    const float *dout = n->dstates + (size_t)(config->dec_layers - 1) * count;
    for (int l = config->dec_layers - 1; l >= 0 && model->decoder_ffn[l].trained; l--) {
        const int site = 4 * config->enc_layers + 6 * l;
        const float *before = l > 0 ? n->dstates + (size_t)(l - 1) * count : NULL;  // what the heads ask of it
        float *dpositions = n->dpositions + (anchor ? (size_t)l * count : 0);
        feed_forward_backward(n, &model->decoder_ffn[l], &n->decoder_ffn[l], site + 4, n->dx, dout);
        attend_backward(n, &model->decoder_cross[l], &n->decoder_cross[l], site + 2, n->dsum, n->dquery, NULL,
                        n->dmemory_query, n->dmemory, n->dx);
        gpu_add(n->dx, n->dsum, n->dquery, NULL, dpositions, count);
        attend_backward(n, &model->decoder_self[l], &n->decoder_self[l], site, n->dsum, n->dquery, NULL, n->dquery,
                        n->dsum, n->dx);
        gpu_add(n->dx, n->dsum, n->dquery, before, dpositions, count);
        dout = n->dx;
    }
    float *learned = grad_of(n, anchor ? model->query_content : model->query_embeddings);
    if (learned) gpu_add_queries_backward(learned, anchor ? n->dx : n->dpositions, n->images, Q, C);
    if (anchor) device_query_positions_backward(n);
    gpu_add(n->dmemory, n->dmemory, n->dmemory_query, NULL, NULL, tokens);
}

template <class T>
static void device_encoder_backward(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    float *dx = n->dmemory;
    const int last = model->config.enc_layers - 1;
    for (int l = last; l >= 0 && model->encoder_ffn[l].trained; l--) {
        if (n->recompute && l < last) device_encoder_layer(n, l);
        feed_forward_backward(n, &model->encoder_ffn[l], &n->encoder_ffn[l], 4 * l + 2, dx, dx);
        attend_backward(n, &model->encoder_attention[l], &n->encoder_attention[l], 4 * l, n->dsum, dx, n->dsum, dx, dx,
                        dx);
    }
}

template <class T>
static void device_backbone_backward(DeviceNetwork<T> *n) {
    const Model *model = n->model;
    const Layer *projection = &model->input_projection;
    const size_t count = (size_t)n->maps[n->tokens].rows * (size_t)model->config.hidden_dim;
    T *map = n->blocks[model->num_blocks - 1].out;
    convolve_backward(n, map, map, rounded_to(n->dprojected, n->dmemory, count), projection, n->tokens, n->tokens,
                      (const T *)NULL, map);
    for (int i = model->num_blocks - 1; i >= 0 && model->blocks[i].trained; i--) {
        const Block *block = &model->blocks[i];
        const DeviceBlock<T> *b = &n->blocks[i];
        const int last = block->num_convs - 1;
        int level = b->out_level;
        const T *dy = b->out, *dshortcut = b->out;
        if (n->recompute && i < model->num_blocks - 1) device_block_forward(n, i, true);
        for (int j = last; j > 0; j--) {
            const int from = block->conv[j].shape.stride > 1 ? b->in_level : level;
            convolve_backward(n, b->inner[j - 1], b->inner[j - 1], dy, &block->conv[j], from, level, (const T *)NULL,
                              (const T *)b->inner[j - 1]);
            dy = b->inner[j - 1], level = from;
        }
        if (block->has_shortcut) {
            convolve_backward(n, n->dshortcut, b->in, b->out, &block->shortcut, b->in_level, b->out_level,
                              (const T *)NULL, (const T *)NULL);
            dshortcut = n->dshortcut;
        }
        convolve_backward(n, b->in, b->in, dy, &block->conv[0], b->in_level, level, dshortcut, (const T *)b->in);
    }
    if (!model->stem.weight->trained) return;
    gpu_maxpool_backward(n->stem, n->pooled, n->argmax, n->maps[LEVEL_POOLED], n->maps[LEVEL_STEM],
                         model->config.stem_width);
    convolve_backward(n, (T *)NULL, n->pixels, n->stem, &model->stem, LEVEL_PICTURE, LEVEL_STEM, (const T *)NULL,
                      (const T *)NULL);
}

// The whole network on the micro-batch that device_load() has brought.
template <class T>
static void device_forward(DeviceNetwork<T> *n) {
    device_backbone_forward(n);
    device_encoder_forward(n);
    device_decoder_forward(n);
}

// Adds its gradients to those of the parameters.
template <class T>
static void device_backward(DeviceNetwork<T> *n) {
    device_heads_backward(n);
    if (n->model->class_head.needs_input_gradient) {
        device_decoder_backward(n);
        device_encoder_backward(n);
        device_backbone_backward(n);
    }
    add_waiting(n);
}

// ---------------------------------------------------------------------------------------------------------------------
// Network: its memory, and the training step

// Why this network cannot be computed here, or NULL.
static const char *device_refuses(const ModelConfig *config) {
    const int head = config->hidden_dim / config->nheads;
    int odd = config->stem_width % 8 || config->dim_feedforward % 8;
    for (int s = 0; s < config->num_stages; s++) odd |= config->widths[s] % (config->bottleneck ? 32 : 8);
    return head != 16 && head != 32 && head != 64
               ? "on a GPU an attention head has 16, 32 or 64 channels: --hidden_dim must be that many times --nheads"
           : config->hidden_dim > MAX_NORM_CHANNELS ? "on a GPU --hidden_dim is 1024 at most"
           : odd ? "on a GPU the backbone's channels and --dim_feedforward must be multiples of 8"
                 : NULL;
}

// Takes the memory of both results.
template <class T>
static void results_walk(DeviceNetwork<T> *n, int batch) {
    const size_t images = (size_t)batch, queries = images * (size_t)n->model->config.num_queries;
    for (StepResult &r : n->results) {
        r.sums = take<double>(&n->host, (size_t)n->model->config.dec_layers * LOSS_SUMS);
        r.grad_norm = take<double>(&n->host, 1), r.scale = take<LossScale>(&n->host, 1);
        r.boxes = take<float>(&n->host, 4 * queries), r.match = take<int>(&n->host, queries);
        r.places = take<int>(&n->host, images);
    }
}

// The bytes of the device's memory that a network takes, when it is made or counted.
template <class T>
static size_t device_bytes(const DeviceNetwork<T> *n) {
    return n->params.arena.capacity + n->fixed.capacity + n->arena.capacity + feed_bytes(&n->feed);
}

// And of the host's pinned memory.
template <class T>
static size_t pinned_bytes(const DeviceNetwork<T> *n) {
    return n->host.capacity + feed_bytes(&n->feed);
}

// Everything on the device that `model` needs for micro-batches of max_images pictures, none larger than (max_height,
// max_width), either way round, with max_targets boxes each, of batches of `batch` pictures; side: the loader's
// defer_side; training: the model's, and else 0. Nothing is allocated afterwards. With counting only the bytes are
// counted: device_bytes() and pinned_bytes(). 0, or -1 with the reason.
template <class T>
static int device_network_create(DeviceNetwork<T> *n, const Model *model, int max_height, int max_width, int side,
                                 int max_images, int max_targets, int batch, size_t workspace_bytes, bool recompute,
                                 bool counting, Error *error) {
    const ModelConfig *config = &model->config;
    const size_t enc = (size_t)config->enc_layers, dec = (size_t)config->dec_layers,
                 worst_pixels = (size_t)max_height * (size_t)max_width;
    memset((void *)n, 0, sizeof *n);
    if (device_refuses(config)) return fail(error, "%s", device_refuses(config));
    n->model = model, n->training = model->batch_size > 0, n->workspace_bytes = workspace_bytes;
    n->recompute = recompute && n->training;
    n->max_images = max_images, n->batch = batch;
    const int followed = !model->track_norms ? 0 : batch < TRACK_IMAGES ? batch : TRACK_IMAGES;
    n->slots = max_images > followed ? max_images : followed;
    n->num_targets = n->training ? max_images * max_targets : 0;
    n->segments = (Segment *)allocate((size_t)(MAX_LEVELS * n->slots) * sizeof(Segment));
    n->blocks = (DeviceBlock<T> *)allocate((size_t)model->num_blocks * sizeof(DeviceBlock<T>));
    n->encoder_query = (T **)allocate(enc * sizeof(T *));
    n->encoder_attention = (DeviceAttention<T> *)allocate(enc * sizeof(DeviceAttention<T>));
    n->encoder_ffn = (DeviceFeedForward<T> *)allocate(enc * sizeof(DeviceFeedForward<T>));
    n->self_query = (T **)allocate(dec * sizeof(T *)), n->cross_query = (T **)allocate(dec * sizeof(T *));
    n->decoder_self = (DeviceAttention<T> *)allocate(dec * sizeof(DeviceAttention<T>));
    n->decoder_cross = (DeviceAttention<T> *)allocate(dec * sizeof(DeviceAttention<T>));
    n->decoder_ffn = (DeviceFeedForward<T> *)allocate(dec * sizeof(DeviceFeedForward<T>));
    for (int i = 0; i < n->slots; i++) n->segments[i] = {0, max_height, max_width, i};
    n->images = followed;
    const bool fits = followed == 0 || plan_device_followed(n);
    const size_t followed_bytes = n->arena.used;
    n->images = max_images;
    if (!fits || !plan_device_network(n))
        return fail(error, "%d pictures of %d x %d at once are too many: a smaller --micro_batch", n->slots, max_height,
                    max_width);
    n->arena.used = larger(n->arena.used, followed_bytes);
    const Segment *last = &n->segments[n->tokens * n->slots];
    // A picture of one line may be twice as long as the plan's (loader_worst_size).
    n->max_places = 2 * (last->height > last->width ? last->height : last->width);
    plan_device_fixed(n);
    pictures_walk(&n->pictures, &n->fixed, n->slots, side, worst_pixels);
    results_walk(n, batch);
    n->feed.host[0].capacity = micro_batch_bytes(n->slots, n->num_targets, side, worst_pixels);
    if (counting) {
        n->params.place = (size_t *)allocate((size_t)model->num_params * sizeof(size_t));
        device_params_walk(&n->params, model, sizeof(T));
        free(n->params.place);
        for (Arena *arena : {&n->params.arena, &n->fixed, &n->arena, &n->host}) arena->capacity = arena->used;
        return 0;
    }

    n->layers = (DeviceLayer *)allocate((size_t)model->num_layers * sizeof(DeviceLayer));
    device_params_create<T>(&n->params, model);
    device_layers(n->layers, &n->params, model, sizeof(T));
    device_arena_allocate(&n->arena);
    device_arena_allocate(&n->fixed);
    plan_device_fixed(n);
    pictures_walk(&n->pictures, &n->fixed, n->slots, side, worst_pixels);
    n->host.capacity = n->host.used, n->host.used = 0;
    CUDA(cudaMallocHost((void **)&n->host.base, n->host.capacity));
    results_walk(n, batch);
    for (StepResult &r : n->results) CUDA(cudaEventCreateWithFlags(&r.done, cudaEventDisableTiming));
    feed_create(&n->feed, n->feed.host[0].capacity);
    CUDA(cudaMemset(n->arena.base, 0, n->arena.capacity));
    const size_t positions = position_table_rows(n->max_places) * (size_t)config->hidden_dim / 2;
    float *table = (float *)allocate(larger(positions, 3 * 256) * sizeof(float));
    pixel_table(table);
    CUDA(cudaMemcpy(n->pixel_table, table, 3 * 256 * sizeof(float), cudaMemcpyHostToDevice));
    position_table(table, n->max_places, config->hidden_dim / 2);
    CUDA(cudaMemcpy(n->position_table, table, positions * sizeof(float), cudaMemcpyHostToDevice));
    box_periods(table, config->hidden_dim / 2);
    CUDA(cudaMemcpy(n->periods, table, (size_t)config->hidden_dim / 4 * sizeof(float), cudaMemcpyHostToDevice));
    free(table);
    linear_create(n->workspace, n->workspace_bytes);
    return 0;
}

template <class T>
static void device_network_free(DeviceNetwork<T> *n) {
    if (n->layers) {
        CUDA(cudaStreamSynchronize(stream));
        linear_free();
        feed_free(&n->feed);
        for (StepResult &r : n->results) CUDA(cudaEventDestroy(r.done));
        device_params_free(&n->params);
        CUDA(cudaFree(n->arena.base));
        CUDA(cudaFree(n->fixed.base));
        CUDA(cudaFreeHost(n->host.base));
    }
    free(n->layers);
    free(n->segments);
    free(n->blocks);
    free(n->encoder_query);
    free(n->encoder_attention);
    free(n->encoder_ffn);
    free(n->self_query);
    free(n->cross_query);
    free(n->decoder_self);
    free(n->decoder_cross);
    free(n->decoder_ffn);
    memset((void *)n, 0, sizeof *n);
}

// Bytes of the device's memory that a network for so many pictures at once takes; infinite if it cannot be.
template <class T>
static double network_needs(const Model *model, int height, int width, int side, int images, int most_targets,
                            int batch, bool recompute) {
    DeviceNetwork<T> n;
    Error unused;
    const int status = device_network_create(&n, model, height, width, side, images, most_targets, batch,
                                             LINEAR_WORKSPACE, recompute, true, &unused);
    const double bytes = status == 0 ? (double)device_bytes(&n) : INFINITY;
    device_network_free(&n);
    return bytes;
}

// How many pictures of (height, width) at once, `most` at most, have room in so many bytes of the device's memory:
// those that it counts for device_network_create() are what that takes, to the byte. 0: not even one has.
template <class T>
static int images_that_fit(const Model *model, int height, int width, int side, int most, int most_targets, int batch,
                           bool recompute, double room) {
    int images = 0;
    while (images < most) {  // more pictures never need less
        const int middle = images + (most - images + 1) / 2;
        if (network_needs<T>(model, height, width, side, middle, most_targets, batch, recompute) <= room)
            images = middle;
        else
            most = middle - 1;
    }
    return images;
}

typedef enum { TO_ANSWER, TO_TRAIN, TO_FOLLOW } Purpose;  // with boxes: TO_TRAIN; for the norms: TO_FOLLOW

// Lays out a micro-batch of `count` pictures, samples[places[i]], and sends it on its way. feed_end() comes behind the
// last launch that reads it.
template <class T>
static void device_load(DeviceNetwork<T> *n, const Sample *samples, const int *places, int count, Purpose purpose) {
    Feed *feed = &n->feed;
    n->images = count, n->num_targets = n->most_targets = 0;
    for (int i = 0; i < count; i++) {
        const Sample *sample = &samples[places[i]];
        const int targets = purpose == TO_TRAIN ? sample->num_boxes : 0;
        n->segments[i] = {0, sample->height, sample->width, places[i]};
        n->num_targets += targets, n->most_targets = targets > n->most_targets ? targets : n->most_targets;
    }
    feed_begin(feed);
    const size_t segments = (size_t)(MAX_LEVELS * n->slots);
    Segment *fed = feed_take(feed, segments, &n->fed_segments);
    purpose == TO_FOLLOW ? plan_device_followed(n) : plan_device_network(n);
    memcpy(fed, n->segments, segments * sizeof(Segment));
    int targets = 0, *first_target = feed_take(feed, (size_t)count + 1, &n->loss.first_target);
    int *classes = feed_take(feed, (size_t)n->num_targets, &n->loss.target_classes);
    double *boxes = feed_take(feed, 4 * (size_t)n->num_targets, &n->loss.target_boxes);
    for (int i = 0; i < count; i++) {
        const Sample *sample = &samples[places[i]];
        first_target[i] = targets;
        if (purpose != TO_TRAIN) continue;
        memcpy(classes + targets, sample->classes, (size_t)sample->num_boxes * sizeof(int));
        memcpy(boxes + 4 * targets, sample->boxes, 4 * (size_t)sample->num_boxes * sizeof(double));
        targets += sample->num_boxes;
    }
    first_target[count] = targets;
    feed_pictures(feed, &n->pictures, samples, places, count);
    feed_send(feed);
}

// What the device has added up over a step, as Losses. sums: (dec_layers, LOSS_SUMS).
static void device_losses(Losses *losses, const double *sums, const ModelConfig *config, const LossSettings *settings) {
    for (int l = 0; l < config->dec_layers; l++, sums += LOSS_SUMS) {
        losses->loss_ce[l] = sums[SUM_CE], losses->loss_bbox[l] = sums[SUM_BBOX], losses->loss_giou[l] = sums[SUM_GIOU];
        losses->cardinality_error[l] = sums[SUM_CARDINALITY];
        losses->matched = (int)sums[SUM_MATCHED], losses->matched_right = (int)sums[SUM_RIGHT];
    }
    losses_finish(losses, config->dec_layers, settings);
}

// A look for the first tensor that holds a NaN or an infinity; name: empty as long as there is none.
typedef struct {
    char name[128];
} Search;

template <class S>
__attribute__((format(printf, 4, 5))) static void look(Search *search, const S *x, size_t count, const char *format,
                                                       ...) {
    if (search->name[0]) return;
    S *numbers = (S *)allocate(count * sizeof(S));
    size_t i = 0;
    CUDA(cudaMemcpy((void *)numbers, x, count * sizeof(S), cudaMemcpyDeviceToHost));
    while (i < count && isfinite(to_float(numbers[i]))) i++;
    va_list list;
    va_start(list, format);
    if (i < count) vsnprintf(search->name, sizeof search->name, format, list);
    va_end(list);
    free((void *)numbers);
}

template <class T>
static void look_at_attention(Search *search, const DeviceAttention<T> *a, size_t C, const char *name, int layer) {
    const size_t queries = (size_t)a->queries.rows * C, keys = (size_t)a->keys.rows * C;
    look(search, a->query, queries, "%s %d: query", name, layer);
    look(search, a->key, keys, "%s %d: key", name, layer);
    look(search, a->value, keys, "%s %d: value", name, layer);
    look(search, a->attended, queries, "%s %d: attended", name, layer);
    look(search, a->sum, queries, "%s %d: sum", name, layer);
    look(search, a->out, queries, "%s %d: norm", name, layer);
}

template <class T>
static void look_at_feed_forward(Search *search, const DeviceFeedForward<T> *f, const ModelConfig *config,
                                 const char *name, int layer) {
    const size_t rows = (size_t)f->map.rows, C = (size_t)config->hidden_dim;
    look(search, f->hidden, rows * (size_t)config->dim_feedforward, "%s %d: hidden", name, layer);
    look(search, f->sum, rows * C, "%s %d: sum", name, layer);
    look(search, f->out, rows * C, "%s %d: norm", name, layer);
}

// The activations of the way forward, in their order and with the CPU's names, as far as each has its own memory.
template <class T>
static void look_at_activations(Search *search, const DeviceNetwork<T> *n) {
    const Model *model = n->model;
    const ModelConfig *config = &model->config;
    const size_t C = (size_t)config->hidden_dim, rows = (size_t)n->maps[n->answers].rows,
                 classes = (size_t)num_logits(config), stem = (size_t)config->stem_width;
    if (model->stem.weight->trained) {
        look(search, n->stem, (size_t)n->maps[LEVEL_STEM].rows * stem, "stem");
        look(search, n->pooled, (size_t)n->maps[LEVEL_POOLED].rows * stem, "stem, pooled");
    }
    for (int i = 0; i < model->num_blocks; i++) {
        const Block *block = &model->blocks[i];
        const DeviceBlock<T> *b = &n->blocks[i];
        int level = b->in_level;
        for (int j = 0; j < block->num_convs && block->trained; j++) {
            if (block->conv[j].shape.stride > 1) level = b->out_level;
            const size_t count = (size_t)n->maps[level].rows * (size_t)block->conv[j].shape.out_channels;
            if (j == block->num_convs - 1)
                look(search, b->out, count, "backbone block %d", i);
            else if (!n->recompute)
                look(search, b->inner[j], count, "backbone block %d, convolution %d", i, j);
        }
    }
    look(search, n->token_rows, (size_t)n->maps[n->tokens].rows * C, "projected feature map");
    for (int l = 0; l < config->enc_layers; l++) {
        if (!n->recompute) look_at_attention(search, &n->encoder_attention[l], C, "encoder layer", l);
        if (n->recompute)
            look(search, n->encoder_ffn[l].out, (size_t)n->maps[n->tokens].rows * C, "encoder feed forward %d: norm",
                 l);
        else
            look_at_feed_forward(search, &n->encoder_ffn[l], config, "encoder feed forward", l);
    }
    for (int l = 0; l < config->dec_layers; l++) {
        const size_t queries = (size_t)n->maps[n->queries].rows * C;
        if (config->anchor) {
            look(search, n->position_hidden + (size_t)l * queries, queries, "query positions, hidden");
            look(search, n->positions + (size_t)l * queries, queries, "query positions");
        }
        look_at_attention(search, &n->decoder_self[l], C, "decoder self-attention", l);
        look_at_attention(search, &n->decoder_cross[l], C, "decoder cross-attention", l);
        look_at_feed_forward(search, &n->decoder_ffn[l], config, "decoder feed forward", l);
    }
    look(search, n->states, rows * C, "decoder states");
    look(search, n->logits, rows * classes, "logits");
    for (int i = 0; i < 2; i++) look(search, n->box_hidden[i], rows * C, "box head, layer %d", i);
    look(search, n->boxes, 4 * rows, "pred_boxes");
    look(search, n->loss.dlogits, rows * classes, "gradient of the logits");
    look(search, n->loss.dbox_logits, 4 * rows, "gradient of the boxes");
}

// Behind a step whose loss was not finite, and since which nothing has changed: computes its pictures again, one by
// one, up to the first whose loss is not finite. Its place in the batch, or -1; search: where the first such number is.
template <class T>
static int device_search(DeviceNetwork<T> *n, Search *search, const StepResult *r) {
    const size_t sums = (size_t)n->model->config.dec_layers * LOSS_SUMS;
    n->dropout = r->dropout, n->loss.settings = r->settings, n->loss.divisors = r->divisors;
    for (int i = 0; i < r->images; i++) {
        Search of_sums = {""};
        device_load(n, r->samples, r->places + i, 1, TO_TRAIN);
        CUDA(cudaMemsetAsync(n->loss_sums, 0, sums * sizeof(double), stream));
        device_forward(n);
        gpu_match(n->loss);
        gpu_set_loss(n->loss);
        feed_end(&n->feed);
        look(&of_sums, n->loss_sums, sums, "loss");
        if (!of_sums.name[0]) continue;
        look_at_activations(search, n);
        return r->places[i];
    }
    return -1;
}

// Why a step failed whose loss or gradient was not finite, in the words of training_step(). -1.
template <class T>
static int device_step_failed(DeviceNetwork<T> *n, const StepResult *r, Error *error) {
    const double loss = r->losses->loss;
    device_params_copy(&n->params, n->model, n->params.value, &Param::value, cudaMemcpyDeviceToHost);
    device_params_copy(&n->params, n->model, n->params.grad, &Param::grad, cudaMemcpyDeviceToHost);
    if (isfinite(loss)) return fail_nonfinite(error, r->step, 0, loss, first_nonfinite(n->model, NULL));
    Search search = {""};
    const int image = device_search(n, &search, r);
    for (int i = n->model->num_params - 1; i >= 0; i--) {
        const Param *param = n->model->params[i];
        if (!is_finite_tensor(param->value, param->count, 0))
            snprintf(search.name, sizeof search.name, "%s", param->name);
    }
    return fail_nonfinite(error, r->step, image, loss, search.name[0] ? search.name : NULL);
}

// ---------------------------------------------------------------------------------------------------------------------
// Network: --norm_init track, the norms that follow the pictures. As in training_step(), every TRACK_STEPS steps, with
// floats: a convolution, mean and variance of what it made, and with those its norm.

// partials (gridDim.y, 2, C): each channel's sum and sum of squares over a part of the rows.
__global__ static void __launch_bounds__(THREADS) statistics_kernel(double *partials, const float *x, int rows, int C) {
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x), each = (rows + (int)gridDim.y - 1) / (int)gridDim.y;
    const int first = (int)blockIdx.y * each, end = min(first + each, rows);
    if (c >= C) return;
    double sum = 0, squares = 0;
    for (int row = first; row < end; row++) {
        const double value = (double)x[(size_t)row * C + c];
        sum += value, squares += value * value;
    }
    double *to = partials + (size_t)blockIdx.y * 2 * C;
    to[c] = sum, to[C + c] = squares;
}

// Unless a step has failed, behind which nothing changes.
__global__ static void __launch_bounds__(THREADS)
    follow_kernel(const Folded *layer, const double *partials, int parts, int rows, int C, const AdamwStep *step) {
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (c >= C || step->failed) return;
    double sum = 0, squares = 0;
    for (int i = 0; i < parts; i++) sum += partials[2 * i * C + c], squares += partials[(2 * i + 1) * C + c];
    const double mean = sum / rows, variance = squares / rows - mean * mean;
    float *of_mean = &layer->norm_mean[c], *of_variance = &layer->norm_variance[c];
    *of_mean = (float)((1 - TRACK_SHARE) * (double)*of_mean + TRACK_SHARE * mean);
    *of_variance = (float)((1 - TRACK_SHARE) * (double)*of_variance + TRACK_SHARE * variance);
    set_norm(*layer, c, norm_scale(layer->norm_weight[c], *of_variance));
}

__global__ static void __launch_bounds__(THREADS)
    normalise_kernel(float *y, const float *x, const float *scale, Epilogue epilogue, size_t count, int C) {
    const int64_t at = place8(count);
    if (at < 0) return;
    Eight value = load8(x + at);
    const Eight factor = load8(scale + at % C);
#pragma unroll
    for (int j = 0; j < 8; j++) value.x[j] *= factor.x[j];
    store8(y + at, finish8<float>(value, epilogue, (size_t)at, (int)(at % C)));
}

// calibrate_layer(): y = relu?(norm(convolution of x) + add), with the norm's new statistics; y may be x or add.
template <class T>
static void follow_layer(const DeviceNetwork<T> *n, const Layer *layer, float *y, const float *x, const float *add,
                         bool relu, int in_level, int out_level) {
    const DeviceParams *d = &n->params;
    const DeviceLayer *of = layer_of(n, layer);
    const ConvShape s = layer->shape;
    const int C = s.out_channels, rows = n->maps[out_level].rows;
    const size_t count = (size_t)rows * (size_t)C;
    float *raw = n->followed.raw;
    if (is_linear(s))
        gpu_linear_forward<float, float>(raw, x, of->weight, NULL, NULL, false, rows, s.in_channels, C);
    else
        gpu_conv_forward<float>(raw, x, of->weight, Epilogue(), n->maps[out_level], n->maps[in_level], s);
    const Timed timed_kernels("norms that follow", "", 4.0 * (3 + (add != NULL)) * (double)count);
    const dim3 grid(blocks((size_t)C, THREADS), FOLLOW_PARTS);
    statistics_kernel<<<grid, THREADS, 0, stream>>>(n->followed.partials, raw, rows, C);
    CUDA(cudaGetLastError());
    follow_kernel<<<grid.x, THREADS, 0, stream>>>(of->folded, n->followed.partials, FOLLOW_PARTS, rows, C, d->step);
    CUDA(cudaGetLastError());
    const Epilogue epilogue = {of->bias, add, relu, NULL, 0};
    const float *scale = d->scale + (of->bias - d->bias);
    normalise_kernel<<<blocks(count, 8 * THREADS), THREADS, 0, stream>>>(y, raw, scale, epilogue, count, C);
    CUDA(cudaGetLastError());
}

// calibrate_norms() with the batch's first TRACK_IMAGES pictures and TRACK_SHARE.
template <class T>
static void device_follow(DeviceNetwork<T> *n, const Sample *samples, int batch_size) {
    const Model *model = n->model;
    float *const *maps = n->followed.maps;
    int places[TRACK_IMAGES], count = 0, at = 0;
    for (int i = 0; i < batch_size && i < TRACK_IMAGES; i++)
        if (samples[i].image.pixels) places[count++] = i;
    if (count == 0) return;
    device_load(n, samples, places, count, TO_FOLLOW);
    gpu_pictures(maps[0], &n->pictures, n->pixel_table);
    follow_layer(n, &model->stem, maps[1], maps[0], NULL, true, LEVEL_PICTURE, LEVEL_STEM);
    gpu_maxpool_forward(maps[0], (unsigned char *)n->followed.inner, maps[1], n->maps[LEVEL_POOLED],
                        n->maps[LEVEL_STEM], model->config.stem_width);
    for (int i = 0; i < model->num_blocks; i++) {
        const Block *block = &model->blocks[i];
        const DeviceBlock<T> *b = &n->blocks[i];
        const float *x = maps[at];
        int level = b->in_level;
        at ^= block->has_shortcut;
        if (block->has_shortcut) follow_layer(n, &block->shortcut, maps[at], x, NULL, false, level, b->out_level);
        for (int j = 0; j < block->num_convs; j++) {
            const bool last = j == block->num_convs - 1;
            const int to = block->conv[j].shape.stride > 1 ? b->out_level : level;
            follow_layer(n, &block->conv[j], last ? maps[at] : n->followed.inner, x, last ? maps[at] : NULL, true,
                         level, to);
            x = n->followed.inner, level = to;
        }
    }
    feed_end(&n->feed);
    gpu_fold<T>(&n->params);
}

// training_step() on the device, in micro-batches of n->max_images pictures. Only launched: device_step_finish() says
// when it is done, and *losses what it was like. No more than two steps may be under way, whose samples stay as they
// are meanwhile.
template <class T>
static void device_step_begin(DeviceNetwork<T> *n, const LossSettings *loss_settings,
                              const OptimizerSettings *optimizer_settings, const Sample *samples, int batch_size,
                              uint64_t seed, int64_t step, Losses *losses) {
    const ModelConfig *config = &n->model->config;
    const size_t L = (size_t)config->dec_layers, Q = (size_t)config->num_queries;
    StepResult *r = &n->results[n->begun++ % 2];
    int count = 0;
    LossDivisors divisors = {{0, 0}, {0, 0}, 0};
    for (int i = 0; i < batch_size; i++) {
        if (!samples[i].image.pixels) continue;
        r->places[count++] = i;
        divisors_add(&divisors, samples[i].num_boxes, config->num_queries, loss_settings);
    }
    n->dropout.p = config->dropout, n->dropout.seed = seed, n->dropout.step = (uint32_t)step;
    r->images = count, r->divisors = divisors, r->settings = *loss_settings, r->dropout = n->dropout;
    r->step = step, r->samples = samples, r->losses = losses;
    if (n->params.tracks && step > 0 && step % TRACK_STEPS == 0) device_follow(n, samples, batch_size);
    gpu_clear_gradients(&n->params);
    CUDA(cudaMemsetAsync(n->loss_sums, 0, L * LOSS_SUMS * sizeof(double), stream));
    for (int first = 0; first < count; first += n->max_images) {
        const int images = count - first < n->max_images ? count - first : n->max_images;
        device_load(n, samples, r->places + first, images, TO_TRAIN);
        n->loss.settings = *loss_settings, n->loss.divisors = divisors, n->loss.loss_scale = n->params.loss_scale;
        device_forward(n);
        gpu_match(n->loss);
        gpu_set_loss(n->loss);
        const size_t queries = (size_t)images * Q, last = (L - 1) * queries, before = (size_t)first * Q;
        const cudaMemcpyKind to_host = cudaMemcpyDeviceToHost;
        CUDA(cudaMemcpyAsync(r->boxes + 4 * before, n->boxes + 4 * last, 4 * queries * sizeof(float), to_host, stream));
        CUDA(cudaMemcpyAsync(r->match + before, n->loss.match + last, queries * sizeof(int), to_host, stream));
        device_backward(n);
        feed_end(&n->feed);
    }
    gpu_unfold(&n->params);
    gpu_gradient_norm(&n->params);
    gpu_optimizer_step<T>(&n->params, optimizer_settings, step, n->loss_sums, (int)L * LOSS_SUMS);
    CUDA(cudaMemcpyAsync(r->sums, n->loss_sums, L * LOSS_SUMS * sizeof(double), cudaMemcpyDeviceToHost, stream));
    CUDA(cudaMemcpyAsync(r->grad_norm, n->params.grad_norm, sizeof(double), cudaMemcpyDeviceToHost, stream));
    CUDA(cudaMemcpyAsync(r->scale, n->params.loss_scale, sizeof(LossScale), cudaMemcpyDeviceToHost, stream));
    CUDA(cudaEventRecord(r->done, stream));
}

// Waits for the oldest step that is under way and fills its losses; scale: the loss's, before and afterwards. A step
// that fp16 leaves out has a norm of 0. 0, or -1 with the reason if a loss or the gradient is not finite: then nothing
// has changed since, on the device either.
template <class T>
static int device_step_finish(DeviceNetwork<T> *n, LossScale *scale, Error *error) {
    const StepResult *r = &n->results[n->finished++ % 2];
    const size_t Q = (size_t)n->model->config.num_queries;
    Losses *losses = r->losses;
    CUDA(cudaEventSynchronize(r->done));
    memset(losses, 0, sizeof *losses);
    device_losses(losses, r->sums, &n->model->config, &r->settings);
    losses->grad_norm = *r->grad_norm;
    Model last = *n->model;  // watch_boxes() looks at the last layer; here there is no other
    last.config.dec_layers = 1;
    for (int i = 0; i < r->images; i++) {
        const Sample *sample = &r->samples[r->places[i]];
        const Targets targets = {sample->num_boxes, sample->boxes, sample->classes};
        Activations acts;
        memset(&acts, 0, sizeof acts);
        acts.boxes = r->boxes + 4 * (size_t)i * Q, acts.match = r->match + (size_t)i * Q;
        watch_boxes(&last, &acts, targets, r->divisors.images, losses);
    }
    const LossScale before = loss_scale_of<T>(*scale);
    *scale = *r->scale;
    if (isfinite(losses->loss) && isfinite(losses->grad_norm)) return 0;
    if (isfinite(losses->loss) && loss_scale_say(&before, scale, r->step, error) == 0) {
        losses->grad_norm = 0;
        return 0;
    }
    return device_step_failed(n, r, error);
}

// ---------------------------------------------------------------------------------------------------------------------
// Commands: those of program/commands.h, computed here. The host's model has the values that a checkpoint has; between
// fetch and send the device's may be others.

template <class T>
static DeviceNetwork<T> network_of;  // the program's, with operands of T

template <class T>
static int engine_train(Model *, Activations *, const LossSettings *loss, const OptimizerSettings *optimizer,
                        const Sample *samples, int batch_size, uint64_t seed, int64_t step, Losses *losses, Error *) {
    device_step_begin(&network_of<T>, loss, optimizer, samples, batch_size, seed, step, losses);
    return 0;
}

template <class T>
static int engine_finish(Model *model, Error *error) {
    DeviceNetwork<T> *n = &network_of<T>;
    const int status = device_step_finish(n, &model->loss_scale, error);
    if (n->finished == n->begun) book_launches();
    return status;
}

// The host lays out its activations for what is read of them: answers, and where the decoder looked.
template <class T>
static void engine_encode(const Model *model, Activations *acts, const Sample *sample) {
    DeviceNetwork<T> *n = &network_of<T>;
    const int place = 0;
    activations_plan(acts, model, sample->height, sample->width);
    n->dropout.p = 0;
    device_load(n, sample, &place, 1, TO_ANSWER);
    device_forward(n);
    feed_end(&n->feed);
}

// Rows of T to the host's, which are bf16 where T is that, else floats.
template <class T>
static void fetch_rows(void *to, const T *from, size_t count) {
    CUDA(cudaMemcpy(to, from, count * sizeof(T), cudaMemcpyDeviceToHost));
    if constexpr (std::is_same<T, __half>::value)  // from the last on, each to its place
        for (size_t i = count; i-- > 0;) {
            T number;
            memcpy((void *)&number, (T *)to + i, sizeof number);
            const float wide = to_float(number);
            memcpy((float *)to + i, &wide, sizeof wide);
        }
}

template <class T>
static void engine_decode(const Model *model, Activations *acts) {
    const DeviceNetwork<T> *n = &network_of<T>;
    const ModelConfig *config = &model->config;
    const size_t rows = (size_t)(config->dec_layers * config->num_queries), Q = (size_t)config->num_queries;
    const size_t C = (size_t)config->hidden_dim, keys = (size_t)n->maps[n->tokens].rows;
    CUDA(cudaStreamSynchronize(stream));
    book_launches();
    fetch_rows(acts->logits, n->logits, rows * (size_t)num_logits(config));
    fetch_rows(acts->boxes, n->boxes, 4 * rows);
    for (int l = 0; l < config->dec_layers && config->anchor; l++)
        fetch_rows(acts->references + 4 * (size_t)l * Q, references(n, l), 4 * Q);
    for (int l = 0; l < config->dec_layers; l++) {
        AttentionActivations *cross = &acts->decoder_cross[l];
        fetch_rows(cross->query, n->decoder_cross[l].query, Q * C);
        fetch_rows(cross->key, n->decoder_cross[l].key, keys * C);
        fetch_rows(cross->lse, n->decoder_cross[l].lse, Q * (size_t)config->nheads);
    }
}

template <class T>
static void engine_fetch(Model *model) {
    const DeviceParams *d = &network_of<T>.params;
    const cudaMemcpyKind to_host = cudaMemcpyDeviceToHost;
    CUDA(cudaStreamSynchronize(stream));
    device_params_copy(d, model, d->value, &Param::value, to_host);
    device_params_copy(d, model, d->exp_avg, &Param::exp_avg, to_host);
    device_params_copy(d, model, d->exp_avg_sq, &Param::exp_avg_sq, to_host);
    if (d->ema) device_params_copy(d, model, d->ema, &Param::ema, to_host);
}

template <class T>
static void engine_send(Model *model) {
    const DeviceParams *d = &network_of<T>.params;
    device_params_copy(d, model, d->value, &Param::value, cudaMemcpyHostToDevice);
    gpu_round((T *)d->operand, d->value, d->count);
    gpu_fold<T>(d);
}

// What network_needs() asks besides the pictures' size and number.
typedef struct {
    const Model *model;
    int side, most_targets, batch;
    bool recompute;
} NetworkPlan;

// Of one picture; of: a NetworkPlan.
template <class T>
static double picture_needs(const void *of, int height, int width) {
    const NetworkPlan *p = (const NetworkPlan *)of;
    return network_needs<T>(p->model, height, width, p->side, 1, p->most_targets, p->batch, p->recompute);
}

// Not even one picture has room: says so, and what would have. -1.
template <class T>
static int engine_refuse(const Settings *settings, const Model *model, int height, int width, int side,
                         int most_targets, int batch, bool recompute, double room, Error *error) {
    const double MiB = 1048576;
    const NetworkPlan plan = {model, side, most_targets, batch, recompute},
                      recomputed = {model, side, most_targets, batch, true};
    fail(error, "out of memory on the GPU: a picture of %d x %d needs %.1f MiB and %.1f are free: ", height, width,
         picture_needs<T>(&plan, height, width) / MiB, room / MiB);
    if (picture_needs<T>(&recomputed, height, width) <= room)
        fail_more(error, "--recompute would fit");
    else if (!(settings->command & TRAIN) ||
             !suggest_side(error, settings, height, width, room, picture_needs<T>, &plan))
        fail_more(error, "take smaller pictures, a smaller --backbone or --hidden_dim");
    return -1;
}

// Takes the device's memory: for all pictures of a step at once, or as many as --micro_batch allows and memory has room
// for, each as large as any that can come.
template <class T>
static int engine_start_as(const Settings *settings, Model *model, Activations *acts, int height, int width, int side,
                           int training, int most_targets, Error *error) {
    DeviceNetwork<T> *n = &network_of<T>;
    const double MiB = 1048576;
    size_t available, all;
    device_network_free(n);
    arena_free(&model->packed);  // only the norms' calibration has used them
    activations_create(acts, model, height, width, 0, 1);
    CUDA(cudaMemGetInfo(&available, &all));
    if (device_refuses(&model->config)) return fail(error, "%s", device_refuses(&model->config));
    const double room = 0.95 * (double)available;  // kernels and cuBLASLt take some too
    const int batch = training ? flag_int(settings, "batch_size") : 1;
    const int asked = training ? flag_int(settings, "micro_batch") : 0, most = asked && asked < batch ? asked : batch;
    const bool recompute = training && flag_on(settings, "recompute");
    const int images = images_that_fit<T>(model, height, width, side, most, most_targets, batch, recompute, room);
    if (images == 0)
        return engine_refuse<T>(settings, model, height, width, side, most_targets, batch, recompute, room, error);
    if (device_network_create(n, model, height, width, side, images, most_targets, batch, LINEAR_WORKSPACE, recompute,
                              false, error) != 0)
        return -1;
    printf("GPU memory for pictures up to %d x %d, %d in flight: %s\n", height, width, images,
           images < most    ? "more would not fit"
           : images < batch ? "as --micro_batch asks"
                            : "all of a step");
    printf("  %-30s %10.1f MiB\n", training ? "weights, gradients, moments" : "weights",
           (double)n->params.arena.capacity / MiB);
    const double taken = (double)device_bytes(n), fed = (double)feed_bytes(&n->feed);
    printf("  %-30s %10.1f MiB", "activations and workspace", (double)(n->arena.capacity + n->fixed.capacity) / MiB);
    if (training) {
        const double other = network_needs<T>(model, height, width, side, images, most_targets, batch, !recompute);
        printf("; with%s --recompute %.1f", recompute ? "out" : "",
               (other - fed - (double)n->params.arena.capacity) / MiB);
    }
    printf("\n  %-30s %10.1f MiB\n", "pictures that arrive", fed / MiB);
    printf("  %-30s %10.1f MiB of %.1f that are free; pinned on the host %.1f MiB\n\n", "total", taken / MiB,
           (double)available / MiB, (double)pinned_bytes(n) / MiB);
    fflush(stdout);
    engine.bytes = device_bytes(n);
    engine.train = engine_train<T>, engine.finish = engine_finish<T>;
    engine.encode = engine_encode<T>, engine.decode = engine_decode<T>;
    engine.fetch = engine_fetch<T>, engine.send = engine_send<T>;
    return 0;
}

static int engine_start_on_gpu(const Settings *settings, Model *model, Activations *acts, int height, int width,
                               int side, int training, int, int most_targets, Error *error) {
    const char *precision = flag_text(settings, "precision");
    allow_tf32 = flag_on(settings, "tf32");
    device_begin();
    return (strcmp(precision, "bf16") == 0 ? engine_start_as<__nv_bfloat16>
            : strcmp(precision, "fp16") == 0
                ? engine_start_as<__half>
                : engine_start_as<float>)(settings, model, acts, height, width, side, training, most_targets, error);
}

#ifndef TRAIN_DETR_NO_MAIN
int main(int argc, char **argv) {
    cudaDeviceProp gpu;
    if (cudaGetDeviceProperties(&gpu, 0) == cudaSuccess)  // without a GPU, some commands need none
        snprintf(engine.device, sizeof engine.device, "%s, compute capability %d.%d", gpu.name, gpu.major, gpu.minor);
    engine.is_gpu = 1, engine.start = engine_start_on_gpu;
    return main_of_commands(argc, argv);
}
#endif
#elif !defined TRAIN_DETR_NO_MAIN
#error "cublasLt.h is missing: it is in the toolkit and in PyPI's nvidia-cublas"
#endif
