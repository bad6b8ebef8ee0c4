/*
ladder.cu: how four of the trainer's kernels get fast. Each version does the same as the one before it; its comment
says what it changes and why that helps. The last one of each ladder is train_detr.cu's own.

    make cuda-ladder                  on dev/emu: checks every version, counts what it asks of memory, prints tables
    make cuda-ladder LADDER=--quick   on small sizes: only the checks mean anything
    make build/cuda/ladder SM=90      by nvcc: prints times instead of counts, where there is a GPU

A beginning for whoever reads about kernels for the first time, so sizes are as simple as they can be: rows of 256
channels, heads of 32, no dropout, one picture. Read it downward:

    Measuring, Tables    what a version is held against
    Layer norm           bytes: who reads what, and how often
    Matching             steps: one after another, nothing but latency
    Attention            both, and products: forward, in bf16
    Convolution          products: how often a number is used that has been fetched

Machine words. 32 threads are a warp: they do an instruction together. A multiprocessor (132 of them on an H100) has 64
warps at most and changes to another one when one waits. A warp's load is done in lines of 128 bytes, of which sectors
of 32 come from the L2 cache or from memory; a line a clock. Shared memory belongs to a block of threads; it has 32
banks of 4 bytes, each of which gives one word a clock, so 32 threads that want different words of one bank wait 32
clocks: a bank conflict. Registers belong to a thread; lanes of a warp can read each other's by shuffles.
*/
#define TRAIN_DETR_NO_MAIN
#include "train_detr.cu"

// ---------------------------------------------------------------------------------------------------------------------
// Measuring

typedef struct {
    double flops;  // of the job, in floats where there are no tensor cores
    int number, failed;
} Ladder;

static void print_head(const char *title) {
    printf("\n**%s**\n\n", title);
#ifdef CUDA_EMU
    if (!emu::take_counts) return;
    printf(
        "| | | memory, MB | moved, MB | lines | banks | conflicts | barriers, shuffles | products | "
        "steps | floor, us |\n| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n");
#else
    printf("| | | us |\n| ---: | --- | ---: |\n");
#endif
}

#ifdef CUDA_EMU
// An H100 SXM by its data sheet: 3.35 TB/s of memory; 989 TFLOP/s of tensor cores in bf16, 67 of floats. A
// multiprocessor does 128 products with their sums in a clock, which tells the clocks of a second; and it goes through
// one line or once through the banks of shared memory.
static const double MEMORY = 3.35e12, TENSOR = 989e12, FLOATS = 67e12, LINES = FLOATS / 256;

static void print_counts(const Ladder *ladder, const char *name, const emu::Counts &c) {
    const double barriers = (double)(c.waits[emu::kBarrier] + c.waits[emu::kShuffle]) / 32,
                 products = (double)c.waits[emu::kMatrix] / 32, bytes = (double)(c.read + c.written);
    const double tensor = 16 * 8 * 16 * 2 * products;
    const double floors[] = {bytes / MEMORY, (double)(c.lines + c.wavefronts) / LINES, tensor / TENSOR,
                             tensor > 0 ? 0 : ladder->flops / FLOATS};
    static const char *const limits[] = {"memory", "lines", "tensor cores", "floats"};
    int longest = 0;
    for (int i = 1; i < 4; i++)
        if (floors[i] > floors[longest]) longest = i;
    printf("| %d | %s | %.2f | %.2f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.2f, %s |\n", ladder->number, name,
           1e-6 * bytes, 1e-6 * (double)c.moved, (double)c.lines, (double)c.wavefronts, (double)c.conflicts, barriers,
           products, (double)c.steps, 1e6 * floors[longest], limits[longest]);
}
#endif

// One version: runs it, asks whether the result is right, prints a line. On the emulator the line has counts, if they
// were counted, on a GPU the best time of ten more runs.
template <class Run, class IsRight>
static void rung(Ladder *ladder, const char *name, Run run, IsRight is_right) {
    ladder->number++;
#ifdef CUDA_EMU
    if (emu::take_counts) emu::take_counts();
#endif
    run();
    CUDA(cudaDeviceSynchronize());
#ifdef CUDA_EMU
    if (emu::take_counts) print_counts(ladder, name, emu::take_counts());
#else
    cudaEvent_t begin, end;
    float best = INFINITY;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    for (int i = 0; i < 10; i++) {
        float milliseconds;
        CUDA(cudaEventRecord(begin, stream));
        run();
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
        best = fminf(best, milliseconds);
    }
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    printf("| %d | %s | %.1f |\n", ladder->number, name, (double)(1000 * best));
#endif
    if (is_right()) return;
    fprintf(stderr, "error: %s: the result is wrong\n", name);
    ladder->failed++;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tables: numbers on the host and the same on the device

template <class T>
static T *on_device(size_t count) {  // NaN
    T *memory;
    CUDA(cudaMalloc((void **)&memory, count * sizeof(T)));
    CUDA(cudaMemset(memory, 0xFF, count * sizeof(T)));
    return memory;
}

template <class T>
static T *upload(const T *host, size_t count) {
    T *memory = on_device<T>(count);
    CUDA(cudaMemcpy(memory, host, count * sizeof(T), cudaMemcpyHostToDevice));
    return memory;
}

// Fetches what a version wrote to host memory, and makes it NaN on the device for the next one.
template <class T>
static void take(T *host, T *device, size_t count) {
    CUDA(cudaMemcpy(host, device, count * sizeof(T), cudaMemcpyDeviceToHost));
    CUDA(cudaMemset(device, 0xFF, count * sizeof(T)));
}

static float *random_numbers(size_t count, uint32_t site) {  // -1 to 1
    float *numbers = (float *)allocate(count * sizeof(float));
    for (size_t i = 0; i < count; i++)
        numbers[i] = (float)(2 * random_uniform(7, RANDOM_TEST, site, 0, 0, (uint64_t)i) - 1);
    return numbers;
}

#ifdef CUDA_EMU
// What is counted of this is known: a load of 32 lines, a store and a load of 32 words in one bank, a store and a load
// of words in 32 banks, a store of one line.
__global__ static void known_kernel(float *to, const float *from) {
    __shared__ float same[32 * 32];
    __shared__ float apart[32 * 33];
    const int lane = (int)threadIdx.x;
    const float number = from[32 * lane];
    same[32 * lane] = number;
    apart[33 * lane] = number;
    __syncwarp();
    to[lane] = same[32 * (31 - lane)] + apart[33 * (31 - lane)];
}

static int count_known() {
    float *from = on_device<float>(32 * 32), *to = on_device<float>(32);
    CUDA(cudaMemset(from, 0, 32 * 32 * sizeof(float)));
    known_kernel<<<1, 32, 0, stream>>>(to, from);
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaFree(from));
    CUDA(cudaFree(to));
    if (!emu::take_counts) return 0;
    const emu::Counts c = emu::take_counts();
    const int right = c.read == 32 * 32 && c.written == 128 && c.moved == 32 * 32 + 128 && c.lines == 33 &&
                      c.wavefronts == 66 && c.conflicts == 62 && c.steps == 7;
    if (!right) fprintf(stderr, "error: what is known is not counted so\n");
    return !right;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Layer norm of 256 channels, with what stands around it: sum = x + residual, y = norm(sum) * weight + bias, and y once
// more in bf16 for the next product.

enum { CHANNELS = 256 };

typedef struct {
    float *sum, *y;
    __nv_bfloat16 *operand;
    const float *x, *residual, *weight, *bias;
    int rows;
} NormJob;

// A thread has a number. Neighbours read neighbours: each line once.
__global__ static void add_alone_kernel(NormJob p) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < p.rows * CHANNELS) p.sum[i] = p.x[i] + p.residual[i];
}

// A thread has a row, as on paper. When it reads channel c, its neighbour reads channel c of the next row, 1 KB further
// on: a warp's load touches 32 lines to get 128 bytes, and does that three times, for mean, variance and result. What
// saves it from being 8 times worse is that the rest of each sector may still be in the L1 cache when its turn comes.
__global__ static void norm_thread_kernel(NormJob p) {
    const int row = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (row >= p.rows) return;
    const float *x = p.sum + (size_t)row * CHANNELS;
    float mean = 0, variance = 0;
    for (int c = 0; c < CHANNELS; c++) mean += x[c];
    mean /= CHANNELS;
    for (int c = 0; c < CHANNELS; c++) variance += (x[c] - mean) * (x[c] - mean);
    const float rstd = 1 / sqrtf(variance / CHANNELS + 1e-5f);
    for (int c = 0; c < CHANNELS; c++) p.y[(size_t)row * CHANNELS + c] = (x[c] - mean) * rstd * p.weight[c] + p.bias[c];
}

// The sum of a block's 256 numbers, halving what is left in shared memory.
__device__ static float tree_sum(float value, float *shared) {
    shared[threadIdx.x] = value;
    for (int half = CHANNELS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    const float sum = shared[0];
    __syncthreads();
    return sum;
}

// A block has a row, a thread a channel: lines are read whole, and once, since a thread keeps its number. But each sum
// is eight rounds in which all 256 threads wait for each other, and half of those that worked before have nothing to
// do.
__global__ static void norm_block_kernel(NormJob p) {
    __shared__ float shared[CHANNELS];
    const int c = (int)threadIdx.x;
    const float x = p.sum[blockIdx.x * CHANNELS + c];
    const float offset = x - tree_sum(x, shared) / CHANNELS;
    const float rstd = 1 / sqrtf(tree_sum(offset * offset, shared) / CHANNELS + 1e-5f);
    p.y[blockIdx.x * CHANNELS + c] = offset * rstd * p.weight[c] + p.bias[c];
}

// A warp has a row, a lane eight channels, 32 apart. Sums of a lane are free, the last five rounds are shuffles between
// registers: no shared memory and no barrier, and warps go their own way.
__global__ static void norm_warp_kernel(NormJob p) {
    const int lane = (int)threadIdx.x % 32, row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    if (row >= p.rows) return;
    float x[8], sum = 0, squares = 0;
    for (int i = 0; i < 8; i++) sum += x[i] = p.sum[(size_t)row * CHANNELS + 32 * i + lane];
    const float mean = warp_sum(sum) / CHANNELS;
    for (int i = 0; i < 8; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float rstd = 1 / sqrtf(warp_sum(squares) / CHANNELS + 1e-5f);
    for (int i = 0; i < 8; i++) {
        const int c = 32 * i + lane;
        p.y[(size_t)row * CHANNELS + c] = (x[i] - mean) * rstd * p.weight[c] + p.bias[c];
    }
}

// A lane has eight adjacent channels and asks for them in two loads of 16 bytes instead of eight of 4: less than half
// the steps. (Lanes are 32 bytes apart then, so both loads touch all lines of the row. That is more lines, but they are
// not what limits it; and with numbers of 16 bits, which is what this is for, one load is all.)
__global__ static void norm_wide_kernel(NormJob p) {
    const int c = (int)threadIdx.x % 32 * 8, row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    if (row >= p.rows) return;
    Eight x = load8(p.sum + (size_t)row * CHANNELS + c);
    const Eight weight = load8(p.weight + c), bias = load8(p.bias + c);
    float sum = 0, squares = 0;
    for (int i = 0; i < 8; i++) sum += x.x[i];
    const float mean = warp_sum(sum) / CHANNELS;
    for (int i = 0; i < 8; i++) squares += (x.x[i] - mean) * (x.x[i] - mean);
    const float rstd = 1 / sqrtf(warp_sum(squares) / CHANNELS + 1e-5f);
    for (int i = 0; i < 8; i++) x.x[i] = (x.x[i] - mean) * rstd * weight.x[i] + bias.x[i];
    store8(p.y + (size_t)row * CHANNELS + c, x);
}

static void add_before(const NormJob &p) {
    add_alone_kernel<<<blocks((size_t)p.rows * CHANNELS, THREADS), THREADS, 0, stream>>>(p);
    CUDA(cudaGetLastError());
}

static void round_behind(const NormJob &p) {
    CUDA(cudaGetLastError());
    gpu_round(p.operand, p.y, (size_t)p.rows * CHANNELS);
}

// The last version is the trainer's: sum, norm and rounding in one kernel that reads x and residual once and writes
// each result once. What lies between three kernels is never read back from memory, and that is the largest step of
// all.
static int norm_ladder(int rows) {
    const size_t count = (size_t)rows * CHANNELS;
    float *x = random_numbers(count, 1), *residual = random_numbers(count, 2), *weight = random_numbers(CHANNELS, 3),
          *bias = random_numbers(CHANNELS, 4), *cpu = (float *)allocate((3 * count + 2 * (size_t)rows) * sizeof(float)),
          *sum = cpu + count, *ours = sum + count, *mean = ours + count;
    double *truth = (double *)allocate(count * sizeof(double));
    __nv_bfloat16 *operand = (__nv_bfloat16 *)allocate(count * sizeof(__nv_bfloat16));
    for (size_t i = 0; i < count; i++) sum[i] = x[i] + residual[i];
    layernorm_forward(cpu, NULL, mean, mean + rows, sum, weight, bias, rows, CHANNELS);
    double allowed = 0;  // four times the CPU's largest error
    for (int row = 0; row < rows; row++) {
        const float *from = sum + (size_t)row * CHANNELS;
        double m = 0, variance = 0;
        for (int c = 0; c < CHANNELS; c++) m += (double)from[c] / CHANNELS;
        for (int c = 0; c < CHANNELS; c++) variance += ((double)from[c] - m) * ((double)from[c] - m) / CHANNELS;
        for (int c = 0; c < CHANNELS; c++) {
            const size_t i = (size_t)row * CHANNELS + (size_t)c;
            truth[i] = ((double)from[c] - m) / sqrt(variance + 1e-5) * (double)weight[c] + (double)bias[c];
            allowed = fmax(allowed, 4 * fabs((double)cpu[i] - truth[i]));
        }
    }
    const NormJob p = {
        on_device<float>(count), on_device<float>(count),  on_device<__nv_bfloat16>(count), upload(x, count),
        upload(residual, count), upload(weight, CHANNELS), upload(bias, CHANNELS),          rows};
    auto is_right = [&] {
        size_t right = 0;
        take(ours, p.y, count);
        take(operand, p.operand, count);
        for (size_t i = 0; i < count; i++)
            right += fabs((double)ours[i] - truth[i]) <= allowed &&
                     to_float(operand[i]) == to_float(to_type<__nv_bfloat16>(ours[i]));
        return right == count;
    };
    // add 1, sums 1 and 3, result 4: nine operations a number
    Ladder ladder = {9.0 * (double)count, 0, 0};
    char title[100];
    snprintf(title, sizeof title, "Residual sum, layer norm and rounding of %d x %d", rows, CHANNELS);
    print_head(title);
    rung(
        &ladder, "a thread has a row",
        [&] {
            add_before(p);
            norm_thread_kernel<<<blocks((size_t)rows, 32), 32, 0, stream>>>(p);
            round_behind(p);
        },
        is_right);
    rung(
        &ladder, "a block has a row",
        [&] {
            add_before(p);
            norm_block_kernel<<<(unsigned)rows, CHANNELS, 0, stream>>>(p);
            round_behind(p);
        },
        is_right);
    rung(
        &ladder, "a warp has a row",
        [&] {
            add_before(p);
            norm_warp_kernel<<<blocks((size_t)rows, WARPS), THREADS, 0, stream>>>(p);
            round_behind(p);
        },
        is_right);
    rung(
        &ladder, "16 bytes at a time",
        [&] {
            add_before(p);
            norm_wide_kernel<<<blocks((size_t)rows, WARPS), THREADS, 0, stream>>>(p);
            round_behind(p);
        },
        is_right);
    NormForward<__nv_bfloat16> fused;
    memset(&fused, 0, sizeof fused);
    fused.sum = p.sum, fused.y = p.y, fused.operand = p.operand, fused.x = p.x, fused.residual = p.residual;
    fused.weight = p.weight, fused.bias = p.bias, fused.C = CHANNELS, fused.map.rows = rows;
    fused.mean = on_device<float>((size_t)rows), fused.rstd = on_device<float>((size_t)rows);
    rung(
        &ladder, "`gpu_norm_forward()`: all three in one kernel", [&] { gpu_norm_forward(fused); }, is_right);
    for (const void *memory : {(void *)p.sum, (void *)p.y, (void *)p.operand, (void *)p.x, (void *)p.residual,
                               (void *)p.weight, (void *)p.bias, (void *)fused.mean, (void *)fused.rstd})
        CUDA(cudaFree((void *)memory));
    free(x), free(residual), free(weight), free(bias), free(cpu), free(truth), free(operand);
    return ladder.failed;
}

// ---------------------------------------------------------------------------------------------------------------------
// Matching: each of T targets gets a query of its own at the least total cost (assign() of train_detr.c). A problem is
// T searches one after another, each a chain of steps in which the nearest open query is taken, until a free one is
// found. There are few problems, one a picture and decoder layer, and next to no bytes: the time is that of the steps,
// so the column to watch is how many of them the longest thread has.

typedef struct {
    int *column_of_row;   // (problems, T)
    const double *costs;  // (problems, T, Q)
    double *room;         // (problems, assign_room(T, Q))
    int problems, T, Q;
} MatchJob;

static size_t assign_room(int T, int Q) { return (size_t)(T + 2 * Q) + (size_t)(3 * Q + 1) / 2; }  // doubles

// A thread has a problem and does what the CPU does. The state of a search lies in global memory, where each of its
// steps has to go and come back, some 500 clocks; 32 problems are one warp, so one multiprocessor has all the work.
__global__ static void match_thread_kernel(MatchJob p, int room) {
    const int problem = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (problem >= p.problems) return;
    assign(p.column_of_row + (size_t)problem * p.T, p.costs + (size_t)problem * p.T * p.Q, p.T, p.Q,
           p.room + (size_t)problem * room);
}

// A block has a problem, still one thread of it: a multiprocessor each, and the state in shared memory, some 30 clocks
// away. As many steps, each shorter.
__global__ static void match_shared_kernel(MatchJob p) {
    extern __shared__ __align__(128) unsigned char smem[];
    if (threadIdx.x > 0) return;
    assign(p.column_of_row + (size_t)blockIdx.x * p.T, p.costs + (size_t)blockIdx.x * p.T * p.Q, p.T, p.Q,
           (double *)smem);
}

// A block of 128 threads, each with the queries j, j + 128 ...: all open queries are looked at in one step. The nearest
// is found by a tree in shared memory, with a barrier a round: seven of them, in which most threads wait.
__global__ static void match_block_kernel(MatchJob p) {
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ double least[128];
    __shared__ int nearest[128];
    const int T = p.T, Q = p.Q, me = (int)threadIdx.x;
    const double *cost = p.costs + (size_t)blockIdx.x * T * Q;
    int *column_of_row = p.column_of_row + (size_t)blockIdx.x * T;
    double *u = (double *)smem, *v = u + T, *shortest = v + Q;
    int *row_of_column = (int *)(shortest + Q), *before = row_of_column + Q, *done = before + Q;
    for (int i = me; i < T; i += 128) u[i] = 0;
    for (int j = me; j < Q; j += 128) v[j] = 0, row_of_column[j] = -1;
    for (int start = 0; start < T; start++) {
        for (int j = me; j < Q; j += 128) shortest[j] = INFINITY, done[j] = 0, before[j] = start;
        __syncthreads();
        int row = start, sink = -1;
        double length = 0;
        while (sink < 0) {
            least[me] = INFINITY, nearest[me] = -1;
            for (int j = me; j < Q; j += 128) {
                if (done[j]) continue;
                const double c = cost[(size_t)row * Q + j];
                const double path = length + assign_cost(c) - u[row] - v[j];
                if (path < shortest[j]) shortest[j] = path, before[j] = row;
                if (nearest[me] < 0 || shortest[j] < least[me]) nearest[me] = j, least[me] = shortest[j];
            }
            for (int half = 64; half > 0; half /= 2) {  // of equal ones the first column
                __syncthreads();
                const int other = me < half ? nearest[me + half] : -1;
                if (other < 0) continue;
                if (nearest[me] >= 0 &&
                    (least[me] < least[me + half] || (least[me] == least[me + half] && nearest[me] < other)))
                    continue;
                nearest[me] = other, least[me] = least[me + half];
            }
            __syncthreads();
            const int j = nearest[0];
            length = least[0];
            row = row_of_column[j];
            if (row < 0) sink = j;
            __syncthreads();
            if (me == 0) done[j] = 1;
            __syncthreads();
        }
        for (int j = me; j < Q; j += 128) {
            if (!done[j] || j == sink) continue;
            u[row_of_column[j]] += length - shortest[j];
            v[j] -= length - shortest[j];
        }
        __syncthreads();
        if (me == 0) {
            u[start] += length;
            assign_along(column_of_row, row_of_column, before, start, sink);
        }
        __syncthreads();
    }
}

// The last version is the trainer's: a warp has a problem. A lane looks at four queries instead of one, and then five
// rounds of shuffles, with no barrier and no memory between them, find the nearest: fewer threads and fewer steps.
static int match_ladder(int layers, int images, int T, int Q) {
    const int problems = layers * images;
    const size_t targets = (size_t)problems * (size_t)T, count = targets * (size_t)Q;
    const size_t room = assign_room(T, Q), shared = room * sizeof(double);
    double *costs = (double *)allocate(count * sizeof(double)), *workspace = (double *)allocate(shared);
    int *expected = (int *)allocate(targets * sizeof(int)), *ours = (int *)allocate(targets * sizeof(int)),
        *match = (int *)allocate((size_t)problems * (size_t)Q * sizeof(int));
    for (size_t i = 0; i < count; i++) {  // many objects look alike, so paths are long, and there are ties
        costs[i] = 4 * random_uniform(7, RANDOM_TEST, 5, 0, 0, i % (size_t)Q + i / (2 * (size_t)Q) * (size_t)Q);
        costs[i] = floor(4 * costs[i]) / 4 + (i % 3 ? 0 : 0.01);
    }
    for (int i = 0; i < problems; i++) assign(expected + i * T, costs + (size_t)i * (size_t)(T * Q), T, Q, workspace);
    const MatchJob p = {
        on_device<int>(targets), upload(costs, count), on_device<double>(room * (size_t)problems), problems, T, Q};
    auto is_right = [&] {
        take(ours, p.column_of_row, targets);
        return memcmp(ours, expected, targets * sizeof(int)) == 0;
    };
    Ladder ladder = {0, 0, 0};
    char title[100];
    snprintf(title, sizeof title, "Matching of %d targets and %d queries, %d problems", T, Q, problems);
    print_head(title);
    rung(
        &ladder, "a thread has a problem",
        [&] { match_thread_kernel<<<blocks((size_t)problems, 32), 32, 0, stream>>>(p, (int)room); }, is_right);
    rung(
        &ladder, "its state in shared memory",
        [&] { match_shared_kernel<<<(unsigned)problems, 32, shared, stream>>>(p); }, is_right);
    rung(
        &ladder, "a block has a problem", [&] { match_block_kernel<<<(unsigned)problems, 128, shared, stream>>>(p); },
        is_right);
    SetLoss trainer;
    memset(&trainer, 0, sizeof trainer);
    int *first = (int *)allocate((size_t)(images + 1) * sizeof(int));
    for (int i = 0; i <= images; i++) first[i] = i * T;
    trainer.layers = layers, trainer.images = images, trainer.Q = Q, trainer.num_targets = images * T;
    trainer.settings.aux_matches = 1, trainer.costs = (double *)p.costs;
    int *device_first = upload(first, (size_t)(images + 1));
    trainer.first_target = device_first, trainer.match = on_device<int>((size_t)(problems * Q));
    const size_t of_match = (size_t)(3 * Q) * sizeof(double) + (size_t)(4 * Q) * sizeof(int);
    rung(
        &ladder, "`match_kernel`: a warp has a problem",
        [&] { match_kernel<<<(unsigned)problems, 32, of_match, stream>>>(trainer); },
        [&] {
            int right = 0;
            take(match, trainer.match, (size_t)(problems * Q));
            for (int i = 0; i < problems; i++)
                for (int t = 0; t < T; t++) right += match[i * Q + expected[i * T + t]] == t;
            return right == problems * T;
        });
    CUDA(cudaFree(p.column_of_row));
    CUDA(cudaFree((void *)p.costs));
    CUDA(cudaFree(p.room));
    CUDA(cudaFree(device_first));
    CUDA(cudaFree(trainer.match));
    free(costs), free(workspace), free(expected), free(ours), free(match), free(first);
    return ladder.failed;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention, forward: out = softmax(q k^T / sqrt(32)) v for each head of 32 channels, T queries and T keys, in bf16.

enum { D = 32 };  // channels of a head

typedef struct {
    __nv_bfloat16 *out;              // (T, C)
    const __nv_bfloat16 *q, *k, *v;  // (T, C)
    float *scores;                   // (heads, T, T), for those that have them in memory
    int T, C, heads;
} AttentionJob;

// Three kernels for three lines of mathematics. A thread has a score; all scores of all heads go to memory, come back
// to be normalised, and come back again: T numbers a query and head, where q, k, v and out are 32. Rows of k are 2 C
// bytes apart, so each lane of a warp reads a line of its own.
__global__ static void scores_kernel(AttentionJob p) {
    const int key = (int)(blockIdx.x * blockDim.x + threadIdx.x), query = (int)blockIdx.y, head = (int)blockIdx.z;
    if (key >= p.T) return;
    float sum = 0;
    for (int d = 0; d < D; d++)
        sum += to_float(p.q[(size_t)query * p.C + head * D + d]) * to_float(p.k[(size_t)key * p.C + head * D + d]);
    p.scores[((size_t)head * p.T + query) * p.T + key] = sum / sqrtf((float)D);
}

__global__ static void softmax_kernel(AttentionJob p) {  // a warp has a row
    const int lane = (int)threadIdx.x % 32, row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    if (row >= p.heads * p.T) return;
    float *scores = p.scores + (size_t)row * p.T, highest = -INFINITY, sum = 0;
    for (int key = lane; key < p.T; key += 32) highest = fmaxf(highest, scores[key]);
    for (int distance = 16; distance > 0; distance /= 2)
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
    for (int key = lane; key < p.T; key += 32) sum += scores[key] = expf(scores[key] - highest);
    sum = warp_sum(sum);
    for (int key = lane; key < p.T; key += 32) scores[key] /= sum;
}

__global__ static void values_kernel(AttentionJob p) {  // a thread has a number of the result
    const int c = (int)threadIdx.x, query = (int)blockIdx.x, head = c / D;
    float sum = 0;
    for (int key = 0; key < p.T; key++)
        sum += p.scores[((size_t)head * p.T + query) * p.T + key] * to_float(p.v[(size_t)key * p.C + c]);
    p.out[(size_t)query * p.C + c] = to_type<__nv_bfloat16>(sum);
}

// What the next two have in common: a thread's query meets the next key, which comes eight numbers at a time. The
// softmax is kept up as keys come by (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867): when a higher
// score comes, what was summed so far shrinks.
__device__ static void meet(float (&out)[D], float *highest, float *sum, const float (&q)[D], const __nv_bfloat16 *k,
                            const __nv_bfloat16 *v) {
    float score = 0;
#pragma unroll
    for (int d = 0; d < D; d += 8) {
        const Eight key = load8(k + d);
#pragma unroll
        for (int j = 0; j < 8; j++) score += q[d + j] * key.x[j];
    }
    const float top = fmaxf(*highest, score), shrink = expf(*highest - top), weight = expf(score - top);
    *highest = top;
    *sum = *sum * shrink + weight;
#pragma unroll
    for (int d = 0; d < D; d += 8) {
        const Eight value = load8(v + d);
#pragma unroll
        for (int j = 0; j < 8; j++) out[d + j] = out[d + j] * shrink + weight * value.x[j];
    }
}

// A thread has a query of a head, with its 32 channels and sums in registers, and goes through the keys. No score is
// ever in memory. All lanes of a warp read the same 16 bytes at once: one line for 32 products, but each warp asks for
// all keys and values, and waits for the cache each time.
__global__ static void __launch_bounds__(128) attention_thread_kernel(AttentionJob p) {
    const int query = (int)(blockIdx.x * blockDim.x + threadIdx.x), head = (int)blockIdx.y;
    if (query >= p.T) return;
    float q[D], out[D] = {}, highest = -INFINITY, sum = 0;
#pragma unroll
    for (int d = 0; d < D; d++) q[d] = to_float(p.q[(size_t)query * p.C + head * D + d]) / sqrtf((float)D);
    for (int key = 0; key < p.T; key++)
        meet(out, &highest, &sum, q, p.k + (size_t)key * p.C + head * D, p.v + (size_t)key * p.C + head * D);
#pragma unroll
    for (int d = 0; d < D; d++) p.out[(size_t)query * p.C + head * D + d] = to_type<__nv_bfloat16>(out[d] / sum);
}

// Copies rows from .. from + 63 of k and v to shared memory, 16 bytes a thread at a time; rows past the last are zero.
template <int STRIDE>
__device__ static void copy_tile(__nv_bfloat16 (*k)[STRIDE], __nv_bfloat16 (*v)[STRIDE], const AttentionJob &p,
                                 int head, int from) {
    for (int i = (int)threadIdx.x; i < 64 * D / 8; i += (int)blockDim.x) {
        const int row = i / (D / 8), d = i % (D / 8) * 8;
        const size_t at = (size_t)(from + row) * p.C + head * D + d;
        const uint4 zero = {0, 0, 0, 0};
        *(uint4 *)&k[row][d] = from + row < p.T ? *(const uint4 *)(p.k + at) : zero;
        *(uint4 *)&v[row][d] = from + row < p.T ? *(const uint4 *)(p.v + at) : zero;
    }
}

// 128 threads bring 64 keys and values to shared memory together and all use them. As many loads as before, but each is
// from nearby, and global memory is waited for once a tile instead of once a key. Products are still one by one, which
// takes about as long as the loads do.
__global__ static void __launch_bounds__(128) attention_tile_kernel(AttentionJob p) {
    __shared__ __align__(16) __nv_bfloat16 k[64][D];
    __shared__ __align__(16) __nv_bfloat16 v[64][D];
    const int query = (int)(blockIdx.x * blockDim.x + threadIdx.x), head = (int)blockIdx.y;
    float q[D], out[D] = {}, highest = -INFINITY, sum = 0;
#pragma unroll
    for (int d = 0; d < D; d++)
        q[d] = query < p.T ? to_float(p.q[(size_t)query * p.C + head * D + d]) / sqrtf((float)D) : 0;
    for (int first = 0; first < p.T; first += 64) {
        copy_tile<D>(k, v, p, head, first);
        __syncthreads();
        for (int key = 0; key < 64 && first + key < p.T; key++) meet(out, &highest, &sum, q, k[key], v[key]);
        __syncthreads();
    }
#pragma unroll
    for (int d = 0; d < D; d++)
        if (query < p.T) p.out[(size_t)query * p.C + head * D + d] = to_type<__nv_bfloat16>(out[d] / sum);
}

// Tensor cores: a warp has 16 queries, and multiplies them with 64 keys by 64 instructions, each of which does 2048
// products with their sums. The probabilities stay in the registers that they were made in and are the operand of the
// second product (train_detr.cu's multiply_transposed() and multiply_add(), which the last version calls as well).
//
// STRIDE is the distance of rows in shared memory. With 32 numbers, 64 bytes, rows 0, 2, 4 and 6 lie in the same banks,
// and so do 1, 3, 5 and 7: ldmatrix, which fetches eight rows at once, takes four turns. With 40 they lie in different
// ones, since 80 bytes are five times 16, and 5 has no factor in common with the 8 places for 16 bytes that there are.
template <int STRIDE>
__global__ static void __launch_bounds__(128) attention_mma_kernel(AttentionJob p) {
    __shared__ __align__(16) __nv_bfloat16 k[64][STRIDE];
    __shared__ __align__(16) __nv_bfloat16 v[64][STRIDE];
    const int head = (int)blockIdx.y, column = (int)threadIdx.x % 4 * 2;
    const int first = (int)blockIdx.x * 64 + (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4;
    const Segment all = {0, p.T, 1, 0};
    const WarpRows<__nv_bfloat16, D> q(p.q + head * D, all, first, p.C);
    const float factor = LOG2E / sqrtf((float)D);  // scores are logarithms of base 2
    float out[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int from = 0; from < p.T; from += 64) {
        float score[8][4];
        copy_tile<STRIDE>(k, v, p, head, from);
        __syncthreads();
        multiply_transposed(score, q, k);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = highest[r];
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    score[j][i] = from + 8 * j + column + i % 2 < p.T ? score[j][i] * factor : -INFINITY;
                    top = fmaxf(top, score[j][i]);
                }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float shrink = exp2f(highest[r] - top);
            highest[r] = top;
            sum[r] *= shrink;
#pragma unroll
            for (int j = 0; j < D / 8; j++) out[j][2 * r] *= shrink, out[j][2 * r + 1] *= shrink;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) sum[r] += score[j][i] = exp2f(score[j][i] - top);
        }
        multiply_add<__nv_bfloat16, D, 64, STRIDE>(out, score, v, NULL);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        if (first + 8 * r < p.T)
            store_row<__nv_bfloat16, D>(p.out + (size_t)(first + 8 * r) * p.C + head * D, out, r, 1 / sum[r]);
    }
}

// The last version is the trainer's: two tiles, of which one arrives by asynchronous copies while the other is used, so
// that a warp does not wait for memory between tiles. The counts are the same; the waiting is not.
static int attention_ladder(int T, int heads) {
    const int C = heads * D;
    const size_t count = (size_t)(T * C);
    float *numbers[3], *out = (float *)allocate(count * sizeof(float)),
                       *lse = (float *)allocate((size_t)(heads * T) * sizeof(float));
    __nv_bfloat16 *rounded = (__nv_bfloat16 *)allocate(count * sizeof(__nv_bfloat16)), *device[3];
    float largest = 0;  // of v
    for (int i = 0; i < 3; i++) {
        numbers[i] = random_numbers(count, 6 + (uint32_t)i);
        for (size_t e = 0; e < count; e++) {
            rounded[e] = to_type<__nv_bfloat16>((i < 2 ? 3 : 1) * numbers[i][e]);
            numbers[i][e] = to_float(rounded[e]);
            if (i == 2) largest = fmaxf(largest, fabsf(numbers[i][e]));
        }
        device[i] = upload(rounded, count);
    }
    Dropout none;
    AttentionPrior no_prior;
    memset(&none, 0, sizeof none), memset(&no_prior, 0, sizeof no_prior);
    float *workspace = (float *)allocate(attention_workspace(T, T, C, heads, 1) * sizeof(float));
    attention_forward(out, NULL, lse, numbers[0], numbers[1], numbers[2], T, T, C, heads, none, no_prior, 0, workspace);
    const AttentionJob p = {on_device<__nv_bfloat16>(count),
                            device[0],
                            device[1],
                            device[2],
                            on_device<float>((size_t)heads * (size_t)T * (size_t)T),
                            T,
                            C,
                            heads};
    // Rounding a probability to bf16 changes it by 2^-8 of itself at most, so the mean of v that they make by 2^-8 of
    // the largest v; rounding the result as much again. But roundings of many probabilities cancel: the worst version
    // here is 0.65 * 2^-8 away, so half of that is allowed, and a hundredth for the sums in floats.
    const float allowed = 1.01f * 0x1p-8f * largest;
    auto is_right = [&] {
        size_t right = 0;
        take(rounded, p.out, count);
        for (size_t i = 0; i < count; i++) right += fabsf(to_float(rounded[i]) - out[i]) <= allowed;
        return right == count;
    };
    Ladder ladder = {4.0 * heads * T * T * D, 0, 0};
    char title[100];
    snprintf(title, sizeof title, "Attention, %d heads of %d channels, %d queries and keys", heads, D, T);
    print_head(title);
    const unsigned tiles = blocks((size_t)T, 64), wide_tiles = blocks((size_t)T, 128);
    rung(
        &ladder, "scores in memory",
        [&] {
            scores_kernel<<<dim3(wide_tiles, (unsigned)T, (unsigned)heads), 128, 0, stream>>>(p);
            softmax_kernel<<<blocks((size_t)(heads * T), WARPS), THREADS, 0, stream>>>(p);
            values_kernel<<<(unsigned)T, (unsigned)C, 0, stream>>>(p);
        },
        is_right);
    rung(
        &ladder, "a thread has a query",
        [&] { attention_thread_kernel<<<dim3(wide_tiles, (unsigned)heads), 128, 0, stream>>>(p); }, is_right);
    rung(
        &ladder, "keys and values in shared memory",
        [&] { attention_tile_kernel<<<dim3(wide_tiles, (unsigned)heads), 128, 0, stream>>>(p); }, is_right);
    rung(
        &ladder, "tensor cores", [&] { attention_mma_kernel<D><<<dim3(tiles, (unsigned)heads), 128, 0, stream>>>(p); },
        is_right);
    rung(
        &ladder, "rows 16 bytes longer",
        [&] { attention_mma_kernel<D + 8><<<dim3(tiles, (unsigned)heads), 128, 0, stream>>>(p); }, is_right);
    const Segment all = {0, T, 1, 0};
    Segment *segment = upload(&all, 1);
    AttentionParams<__nv_bfloat16> trainer;
    memset(&trainer, 0, sizeof trainer);
    trainer.out = p.out, trainer.lse = on_device<float>((size_t)(heads * T));
    trainer.q = p.q, trainer.k = p.k, trainer.v = p.v, trainer.C = C, trainer.heads = heads;
    trainer.queries.segments = trainer.keys.segments = segment;
    trainer.queries.count = trainer.keys.count = 1, trainer.queries.rows = trainer.keys.rows = T;
    rung(
        &ladder, "`gpu_attention_forward()`: tiles come while others are used",
        [&] { gpu_attention_forward(trainer, attention_parts(&all, 1)); }, is_right);
    for (int i = 0; i < 3; i++) {
        CUDA(cudaFree(device[i]));
        free(numbers[i]);
    }
    CUDA(cudaFree(p.out));
    CUDA(cudaFree(p.scores));
    CUDA(cudaFree(segment));
    CUDA(cudaFree(trainer.lse));
    free(out), free(lse), free(rounded), free(workspace);
    return ladder.failed;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3x3 convolution, stride 1, padding 1, of one picture's map, in bf16: y (height * width, filters), x (height * width,
// channels), w (filters, 3, 3, channels). Channels are a multiple of 32, filters of 8.

typedef struct {
    __nv_bfloat16 *y;
    const __nv_bfloat16 *x, *w;
    int height, width, channels, filters;
} ConvJob;

// A thread has a number of y, as on paper, neighbours the next filter. All read the same number of x, but each its own
// filter, 18 bytes a channel apart: 32 lines for 32 products, of which the next channel uses 2 bytes more each.
__global__ static void conv_thread_kernel(ConvJob p) {
    const int filter = (int)threadIdx.x, row = (int)blockIdx.x, oy = row / p.width, ox = row % p.width;
    if (filter >= p.filters) return;
    float sum = 0;
    for (int tap = 0; tap < 9; tap++) {
        const int y = oy + tap / 3 - 1, x = ox + tap % 3 - 1;
        if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
        const __nv_bfloat16 *from = p.x + (size_t)(y * p.width + x) * p.channels,
                            *weight = p.w + (size_t)(9 * filter + tap) * p.channels;
        for (int c = 0; c < p.channels; c++) sum += to_float(from[c]) * to_float(weight[c]);
    }
    p.y[(size_t)row * p.filters + filter] = to_type<__nv_bfloat16>(sum);
}

// A block has 8 x 8 pixels of 32 filters and goes through the channels 16 at a time: the 10 x 10 pixels that these need
// and the filters come to shared memory once and are used 64 and 32 times. A thread has a pixel and eight filters; a
// number of x that it has read is good for eight products, so 9 loads for 8. Edges cost most on small maps: 100 pixels
// are fetched for 64.
__global__ static void __launch_bounds__(THREADS) conv_tile_kernel(ConvJob p) {
    __shared__ float x[10 * 10][16 + 1];  // odd, so that neighbours lie in different banks
    __shared__ float w[9 * 16][32 + 1];
    const int across = (p.width + 7) / 8, tile_y = (int)blockIdx.x / across * 8, tile_x = (int)blockIdx.x % across * 8;
    const int pixel = (int)threadIdx.x % 64, first = (int)threadIdx.x / 64 * 8, filters = (int)blockIdx.y * 32;
    const int oy = tile_y + pixel / 8, ox = tile_x + pixel % 8;
    float sum[8] = {};
    for (int c = 0; c < p.channels; c += 16) {
        for (int i = (int)threadIdx.x; i < 100 * 16; i += THREADS) {
            const int y = tile_y + i / 160 - 1, column = tile_x + i / 16 % 10 - 1;
            const bool inside = y >= 0 && y < p.height && column >= 0 && column < p.width;
            x[i / 16][i % 16] = inside ? to_float(p.x[(size_t)(y * p.width + column) * p.channels + c + i % 16]) : 0;
        }
        for (int i = (int)threadIdx.x; i < 9 * 16 * 32; i += THREADS) {
            const int filter = i / (9 * 16), tap = i / 16 % 9;
            w[16 * tap + i % 16][filter] =
                filters + filter < p.filters
                    ? to_float(p.w[(size_t)(9 * (filters + filter) + tap) * p.channels + c + i % 16])
                    : 0;
        }
        __syncthreads();
        for (int tap = 0; tap < 9; tap++) {
            const float *from = x[(pixel / 8 + tap / 3) * 10 + pixel % 8 + tap % 3];
            for (int k = 0; k < 16; k++) {
#pragma unroll
                for (int j = 0; j < 8; j++) sum[j] += from[k] * w[16 * tap + k][first + j];
            }
        }
        __syncthreads();
    }
    if (oy >= p.height || ox >= p.width) return;
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (filters + first + j < p.filters)
            p.y[(size_t)(oy * p.width + ox) * p.filters + filters + first + j] = to_type<__nv_bfloat16>(sum[j]);
}

// Eight numbers of a row of the matrix that is never made, from column k on: tap by tap, the channels of the pixel that
// the output pixel `row` sees there.
__device__ static uint4 patch_piece(const ConvJob &p, int row, int k) {
    const int tap = k / p.channels, y = row / p.width + tap / 3 - 1, x = row % p.width + tap % 3 - 1;
    const bool inside = row < p.height * p.width && y >= 0 && y < p.height && x >= 0 && x < p.width;
    const uint4 zero = {0, 0, 0, 0};
    return inside ? *(const uint4 *)(p.x + (size_t)(y * p.width + x) * p.channels + k % p.channels) : zero;
}

// The same of a filter, which lies in memory as it is needed.
__device__ static uint4 filter_piece(const ConvJob &p, int filter, int k) {
    const uint4 zero = {0, 0, 0, 0};
    return filter < p.filters ? *(const uint4 *)(p.w + (size_t)filter * 9 * p.channels + k) : zero;
}

// Implicit GEMM: a product of (pixels, 9 channels) with (9 channels, filters), 64 x 64 sums a block, 32 columns at a
// time, and nothing of it is about pixels but where a piece of 16 bytes is fetched from. So tiles have no edges of
// their own, and it serves any kernel size and stride. A thread has 4 x 4 sums in registers: 8 loads for 16 products.
__global__ static void __launch_bounds__(THREADS) conv_register_kernel(ConvJob p) {
    __shared__ float a[32][64 + 4];  // column by column, so that a thread's four rows are neighbours
    __shared__ float b[32][64 + 4];
    const int thread = (int)threadIdx.x, row = (int)blockIdx.x * 64, filter = (int)blockIdx.y * 64;
    const int i = thread / 16 * 4, j = thread % 16 * 4;
    float sum[4][4] = {};
    for (int k = 0; k < 9 * p.channels; k += 32) {
        const int line = thread / 4, at = thread % 4 * 8;  // the piece that this thread brings
        const uint4 pieces[2] = {patch_piece(p, row + line, k + at), filter_piece(p, filter + line, k + at)};
        for (int n = 0; n < 8; n++) {
            a[at + n][line] = to_float(((const __nv_bfloat16 *)&pieces[0])[n]);
            b[at + n][line] = to_float(((const __nv_bfloat16 *)&pieces[1])[n]);
        }
        __syncthreads();
        for (int n = 0; n < 32; n++) {
            const float4 left = *(const float4 *)&a[n][i], right = *(const float4 *)&b[n][j];
            const float rows[4] = {left.x, left.y, left.z, left.w}, columns[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[r][c] += rows[r] * columns[c];
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (row + i + r < p.height * p.width && filter + j + c < p.filters)
                p.y[(size_t)(row + i + r) * p.filters + filter + j + c] = to_type<__nv_bfloat16>(sum[r][c]);
}

// Tensor cores: the same tiles, as bf16, and each of four warps multiplies 32 x 32 of the 64 x 64 by instructions of
// 16 x 8 x 16. A lane of an operand has pairs of numbers of rows l / 4 and l / 4 + 8 at columns 2 (l % 4) and 8 further
// (doc/8): four loads of 4 bytes for 16 x 16 numbers, or, with LDMATRIX, one instruction of the warp, which hands out
// four matrices of 8 x 8 as they are needed. Rows 16 bytes longer than their 64 keep both free of bank conflicts.
template <bool LDMATRIX>
__device__ static void load_fragment(uint32_t (&to)[4], const __nv_bfloat16 (*tile)[32 + 8], int row, int k) {
    const int lane = (int)threadIdx.x % 32;
    if (LDMATRIX) {
        ldmatrix_x4(to, &tile[row + lane % 16][k + lane / 16 * 8]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        to[i] = *(const uint32_t *)&tile[row + lane / 4 + i % 2 * 8][k + lane % 4 * 2 + i / 2 * 8];
}

template <bool LDMATRIX>
__global__ static void __launch_bounds__(128) conv_mma_kernel(ConvJob p) {
    __shared__ __align__(16) __nv_bfloat16 a[64][32 + 8];
    __shared__ __align__(16) __nv_bfloat16 b[64][32 + 8];
    const int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row = (int)blockIdx.x * 64, filter = (int)blockIdx.y * 64, i = warp / 2 * 32, j = warp % 2 * 32;
    float sum[2][4][4] = {};
    for (int k = 0; k < 9 * p.channels; k += 32) {
        for (int line = thread / 4; line < 64; line += 32) {
            *(uint4 *)&a[line][thread % 4 * 8] = patch_piece(p, row + line, k + thread % 4 * 8);
            *(uint4 *)&b[line][thread % 4 * 8] = filter_piece(p, filter + line, k + thread % 4 * 8);
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < 32; n += 16) {
            uint32_t rows[2][4], columns[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                load_fragment<LDMATRIX>(rows[half], a, i + 16 * half, n);
                load_fragment<LDMATRIX>(columns[half], b, j + 16 * half, n);
            }
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    mma<__nv_bfloat16>(sum[r][c], rows[r], columns[c / 2][c % 2], columns[c / 2][c % 2 + 2]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int to = row + i + 8 * r + lane / 4, column = filter + j + 8 * c + lane % 4 * 2;
            if (to < p.height * p.width && column < p.filters)
                *(uint32_t *)(p.y + (size_t)to * p.filters + column) =
                    pair<__nv_bfloat16>(sum[r / 2][c][r % 2 * 2], sum[r / 2][c][r % 2 * 2 + 1]);
        }
}

// The last version is the trainer's: tiles of 128 rows, 64 columns of the inner dimension at a time, of which two
// arrive by asynchronous copies, past the registers, while a third is multiplied; each piece at a place that depends on
// its row instead of longer rows; and a warp has twice as many sums (four times with more filters), so that a fragment
// is used for more of them.
static int conv_ladder(int height, int width, int channels, int filters) {
    const int rows = height * width;
    const size_t num_x = (size_t)(rows * channels), num_w = (size_t)(9 * filters * channels),
                 num_y = (size_t)(rows * filters);
    float *x = random_numbers(num_x, 10), *w = random_numbers(num_w, 11);
    __nv_bfloat16 *rounded_x = (__nv_bfloat16 *)allocate(num_x * sizeof(__nv_bfloat16)),
                  *rounded_w = (__nv_bfloat16 *)allocate(num_w * sizeof(__nv_bfloat16)),
                  *y = (__nv_bfloat16 *)allocate(num_y * sizeof(__nv_bfloat16));
    double *truth = (double *)allocate(num_y * sizeof(double)), *allowed = (double *)allocate(num_y * sizeof(double));
    for (size_t i = 0; i < num_x; i++) x[i] = to_float(rounded_x[i] = to_type<__nv_bfloat16>(x[i]));
    for (size_t i = 0; i < num_w; i++) w[i] = to_float(rounded_w[i] = to_type<__nv_bfloat16>(w[i]));
    for (int row = 0; row < rows; row++)
        for (int filter = 0; filter < filters; filter++) {
            double sum = 0, sizes = 0;
            for (int tap = 0; tap < 9; tap++) {
                const int iy = row / width + tap / 3 - 1, ix = row % width + tap % 3 - 1;
                if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
                const float *from = x + (iy * width + ix) * channels, *weight = w + (9 * filter + tap) * channels;
                for (int c = 0; c < channels; c++) {
                    const double product = (double)from[c] * (double)weight[c];
                    sum += product, sizes += fabs(product);
                }
            }
            // bf16 rounds by 2^-8 of the result; a sum of n floats in any order is off by n 2^-23 of their sizes, and
            // that may change the rounding
            const size_t at = (size_t)row * (size_t)filters + (size_t)filter;
            truth[at] = sum, allowed[at] = 0x1p-8 * 1.01 * fabs(sum) + 9 * channels * 0x1p-23 * sizes;
        }
    const ConvJob p = {on_device<__nv_bfloat16>(num_y),
                       upload(rounded_x, num_x),
                       upload(rounded_w, num_w),
                       height,
                       width,
                       channels,
                       filters};
    auto is_right = [&] {
        size_t right = 0;
        take(y, p.y, num_y);
        for (size_t i = 0; i < num_y; i++) right += fabs((double)to_float(y[i]) - truth[i]) <= allowed[i];
        return right == num_y;
    };
    Ladder ladder = {2.0 * 9 * rows * channels * filters, 0, 0};
    char title[100];
    snprintf(title, sizeof title, "3x3 convolution of %d x %d pixels, %d to %d channels", height, width, channels,
             filters);
    print_head(title);
    const dim3 tiles(blocks((size_t)height, 8) * blocks((size_t)width, 8), blocks((size_t)filters, 32)),
        products(blocks((size_t)rows, 64), blocks((size_t)filters, 64));
    rung(
        &ladder, "a thread has a number",
        [&] { conv_thread_kernel<<<(unsigned)rows, blocks((size_t)filters, 32) * 32, 0, stream>>>(p); }, is_right);
    rung(
        &ladder, "a block has 8 x 8 pixels in shared memory",
        [&] { conv_tile_kernel<<<tiles, THREADS, 0, stream>>>(p); }, is_right);
    rung(
        &ladder, "implicit GEMM, 4 x 4 sums a thread",
        [&] { conv_register_kernel<<<products, THREADS, 0, stream>>>(p); }, is_right);
    rung(
        &ladder, "tensor cores", [&] { conv_mma_kernel<false><<<products, 128, 0, stream>>>(p); }, is_right);
    rung(
        &ladder, "`ldmatrix`", [&] { conv_mma_kernel<true><<<products, 128, 0, stream>>>(p); }, is_right);
    const Segment all = {0, height, width, 0};
    Segment *segment = upload(&all, 1);
    const Ragged map = {segment, 1, rows};
    const ConvShape shape = {channels, filters, 3, 1, 1, 1};
    const Epilogue epilogue = {NULL, NULL, 0, NULL, 0};
    rung(
        &ladder, "`gpu_conv_forward()`: steps come while others are used",
        [&] { gpu_conv_forward(p.y, p.x, p.w, epilogue, map, map, shape); }, is_right);
    CUDA(cudaFree(p.y));
    CUDA(cudaFree((void *)p.x));
    CUDA(cudaFree((void *)p.w));
    CUDA(cudaFree(segment));
    free(x), free(w), free(rounded_x), free(rounded_w), free(y), free(truth), free(allowed);
    return ladder.failed;
}

int main(int argc, char **argv) {
    const int quick = argc == 2 && !strcmp(argv[1], "--quick");
    int failed = 0;
    if (argc > 1 && !quick) {
        fprintf(stderr, "usage: %s [--quick]\n", argv[0]);
        return 1;
    }
    cudaDeviceProp gpu;
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    device_begin();
    printf("kernels run on: %s\n", gpu.name);
#ifdef CUDA_EMU
    failed += count_known();
#endif
    failed += norm_ladder(quick ? 37 : 850);
    failed += match_ladder(quick ? 2 : 6, quick ? 3 : 8, quick ? 7 : 20, quick ? 45 : 100);
    failed += attention_ladder(quick ? 70 : 250, quick ? 2 : 8);
    failed += quick ? conv_ladder(7, 9, 32, 40) : conv_ladder(25, 34, 64, 64);
    if (failed) fprintf(stderr, "%d results are wrong\n", failed);
    return failed > 0;
}
