// self_test.cu: is the emulator right, and does it find what is wrong? Three rooms: kernels that are as they should
// be, PTX wrappers among them (equal to a plain reference under eight random schedules, and silent), one kernel for
// each mistake (it must be found, and the line named that is marked with "bug:"), and main. Compiled by nvcc the first
// room runs on a GPU.
//
//     self_test [NAME...]    all tests, or those whose name contains one of the words
//     self_test --cost       what a barrier, a shuffle and an mma cost here
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#if defined(__has_include)
#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#define HAVE_CUBLASLT 1
#endif
#endif
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <type_traits>

#include "program/ptx.h"

#define CHECK(call)                                                                                   \
    do {                                                                                              \
        cudaError_t error = (call);                                                                   \
        if (error != cudaSuccess) {                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
            exit(3);                                                                                  \
        }                                                                                             \
    } while (0)

typedef __nv_bfloat16 bf16;

// ---------------------------------------------------------------------------------------------------------------------
// Help for the tests: numbers that do not depend on a library, memory, comparison

static uint32_t lottery;
static float number() {  // -1 to 1, in steps that bf16 holds
    lottery = lottery * 1664525u + 1013904223u;
    return (float)((int)(lottery >> 24) - 128) / 128.0f;
}

template <class T>
struct Array {  // in host and device memory
    size_t count;
    T *host, *device;
    explicit Array(size_t count, bool filled = true) : count(count) {
        host = (T *)calloc(count, sizeof(T));
        for (size_t i = 0; filled && i < count; i++) host[i] = (T)number();
        CHECK(cudaMalloc(&device, count * sizeof(T)));
        if (filled) upload();
    }
    ~Array() {
        CHECK(cudaFree(device));
        free(host);
    }
    void upload() { CHECK(cudaMemcpy(device, host, count * sizeof(T), cudaMemcpyHostToDevice)); }
    T *download() {
        CHECK(cudaGetLastError());
        CHECK(cudaMemcpy(host, device, count * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }
    Array(const Array &) = delete;
};

static bool near(double value, double wanted, double tolerance, const char *what) {
    if (fabs(value - wanted) <= tolerance) return true;  // false for NaN
    fprintf(stderr, "%s: %.9g, must be %.9g within %.2g\n", what, value, wanted, tolerance);
    return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// Fragments, against the tables of the PTX ISA manual ("Matrix Fragments for mma.m16n8k16 with floating point type",
// "... mma.m16n8k8", "ldmatrix"), written down here as the manual has them, element by element.

template <class T>
__global__ void mma_16x8x16(float *d, const T *a, const T *b, const float *c) {
    int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
    union {
        T number[8];
        uint32_t bits[4];
    } fa;
    union {
        T number[4];
        uint32_t bits[2];
    } fb;
    float fc[4], fd[4];
    for (int i = 0; i < 8; i++) {
        int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        fa.number[i] = a[row * 16 + column];
    }
    for (int i = 0; i < 4; i++) {
        int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        fb.number[i] = b[row * 8 + group];
    }
    for (int i = 0; i < 4; i++) fc[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    if constexpr (std::is_same<T, bf16>::value)
        mma_bf16(fd, fa.bits, fb.bits, fc);
    else
        mma_f16(fd, fa.bits, fb.bits, fc);
    for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = fd[i];
}

__global__ void mma_16x8x8(float *d, const float *a, const float *b, const float *c) {
    int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    float fc[4], fd[4];
    for (int i = 0; i < 4; i++) {
        int row = i == 0 || i == 2 ? group : group + 8, column = i < 2 ? in_group : in_group + 4;
        fa[i] = to_tf32(a[row * 8 + column]);
    }
    for (int i = 0; i < 2; i++) fb[i] = to_tf32(b[(i == 0 ? in_group : in_group + 4) * 8 + group]);
    for (int i = 0; i < 4; i++) fc[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    mma_tf32(fd, fa, fb, fc);
    for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = fd[i];
}

template <class T>
static bool check_mma(int depth, void (*launch)(float *, const T *, const T *, const float *)) {
    Array<T> a(16 * (size_t)depth), b((size_t)depth * 8);
    Array<float> c(16 * 8), d(16 * 8, false);
    launch(d.device, a.device, b.device, c.device);
    d.download();
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            double sum = c.host[i * 8 + j];  // the products are multiples of 2^-14 below 16: exact in fp32 in any order
            for (int k = 0; k < depth; k++)
                sum += (double)(float)a.host[i * depth + k] * (double)(float)b.host[k * 8 + j];
            if (!near(d.host[i * 8 + j], sum, 1e-6, "mma")) return false;
        }
    }
    return true;
}
static void launch_bf16(float *d, const bf16 *a, const bf16 *b, const float *c) {
    mma_16x8x16<bf16><<<1, 32>>>(d, a, b, c);
}
static void launch_f16(float *d, const half *a, const half *b, const float *c) {
    mma_16x8x16<half><<<1, 32>>>(d, a, b, c);
}
static void launch_tf32(float *d, const float *a, const float *b, const float *c) { mma_16x8x8<<<1, 32>>>(d, a, b, c); }
static bool good_mma_bf16() { return check_mma<bf16>(16, launch_bf16); }
static bool good_mma_f16() { return check_mma<half>(16, launch_f16); }
static bool good_mma_tf32() { return check_mma<float>(8, launch_tf32); }

template <int count, bool transposed>
__global__ void load_matrices(uint32_t *out) {
    __shared__ __align__(16) uint16_t numbers[4][8][8];
    for (int i = (int)threadIdx.x; i < 256; i += 32) (&numbers[0][0][0])[i] = (uint16_t)i;
    __syncwarp();
    const void *row = numbers[threadIdx.x / 8][threadIdx.x % 8];
    uint32_t d1[1], d2[2], d4[4];
    if (count == 1 && !transposed) ldmatrix_x1(d1, row);
    if (count == 1 && transposed) ldmatrix_x1_trans(d1, row);
    if (count == 2 && !transposed) ldmatrix_x2(d2, row);
    if (count == 2 && transposed) ldmatrix_x2_trans(d2, row);
    if (count == 4 && !transposed) ldmatrix_x4(d4, row);
    if (count == 4 && transposed) ldmatrix_x4_trans(d4, row);
    for (int m = 0; m < count; m++) out[m * 32 + threadIdx.x] = count == 1 ? d1[m] : count == 2 ? d2[m % 2] : d4[m];
}

static bool check_ldmatrix(const uint32_t *out, int count, bool transposed) {
    for (int m = 0; m < count; m++) {
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 2; i++) {  // the manual: lane l holds elements 2 (l % 4) and the next of row l / 4
                int row = lane / 4, column = 2 * (lane % 4) + i;
                int wanted = m * 64 + (transposed ? column * 8 + row : row * 8 + column);
                if (!near(out[m * 32 + lane] >> 16 * i & 0xFFFF, wanted, 0, "ldmatrix")) return false;
            }
        }
    }
    return true;
}
static bool good_ldmatrix() {
    Array<uint32_t> out(128, false);
    bool good = true;
    load_matrices<1, false><<<1, 32>>>(out.device);
    CHECK(cudaMemcpy(out.host, out.device, 128, cudaMemcpyDeviceToHost));
    good &= check_ldmatrix(out.host, 1, false);
    load_matrices<1, true><<<1, 32>>>(out.device);
    CHECK(cudaMemcpy(out.host, out.device, 128, cudaMemcpyDeviceToHost));
    good &= check_ldmatrix(out.host, 1, true);
    load_matrices<2, false><<<1, 32>>>(out.device);
    CHECK(cudaMemcpy(out.host, out.device, 256, cudaMemcpyDeviceToHost));
    good &= check_ldmatrix(out.host, 2, false);
    load_matrices<2, true><<<1, 32>>>(out.device);
    CHECK(cudaMemcpy(out.host, out.device, 256, cudaMemcpyDeviceToHost));
    good &= check_ldmatrix(out.host, 2, true);
    load_matrices<4, false><<<1, 32>>>(out.device);
    good &= check_ldmatrix(out.download(), 4, false);
    load_matrices<4, true><<<1, 32>>>(out.device);
    return good & check_ldmatrix(out.download(), 4, true);
}

__global__ void copy_some(uint8_t *out, const uint8_t *in) {
    __shared__ __align__(16) uint8_t buffer[32][16];
    cp_async_16(buffer[threadIdx.x], in + 16 * threadIdx.x, (int)threadIdx.x % 17);
    cp_async_wait_all();
    for (int i = 0; i < 16; i++) out[16 * threadIdx.x + i] = buffer[threadIdx.x][i];
}
static bool good_cp_async_zero_fill() {
    Array<uint8_t> in(512, false), out(512, false);
    for (int i = 0; i < 512; i++) in.host[i] = (uint8_t)(i + 1);
    in.upload();
    copy_some<<<1, 32>>>(out.device, in.device);
    out.download();
    for (int i = 0; i < 512; i++) {
        if (!near(out.host[i], i % 16 < i / 16 % 17 ? in.host[i] : 0, 0, "cp.async")) return false;
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels as a trainer has them

// C[m, n] = A[m, k] B[k, n], bf16 in, fp32 out; k and n multiples of 8. A block makes 64x64 of C, each of its 4 warps
// 32x32; tiles of 64x32 and 32x64 come through a pipeline of three stages. Rows are padded so that the 8 rows of an
// ldmatrix lie in different banks.
constexpr int kTile = 64, kDepth = 32, kStages = 3, kStrideA = kDepth + 8, kStrideB = kTile + 8;
constexpr int kStage = kTile * kStrideA + kDepth * kStrideB;  // numbers
__global__ void __launch_bounds__(128) matmul(float *C, const bf16 *A, const bf16 *B, int m, int n, int k) {
    extern __shared__ __align__(128) unsigned char smem[];
    bf16 *stages = (bf16 *)smem;
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, row0 = (int)blockIdx.y * kTile,
        column0 = (int)blockIdx.x * kTile;
    int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32, tiles = (k + kDepth - 1) / kDepth;
    float sum[2][4][4] = {};
    auto fetch = [&](int tile) {
        bf16 *a = stages + tile % kStages * kStage, *b = a + kTile * kStrideA;
        for (int i = (int)threadIdx.x; i < kTile * kDepth / 8; i += 128) {
            int r = i / (kDepth / 8), c = i % (kDepth / 8) * 8, from = tile * kDepth + c;
            bool inside = row0 + r < m && from < k;
            cp_async_16(a + r * kStrideA + c, inside ? A + (size_t)(row0 + r) * k + from : A, inside ? 16 : 0);
        }
        for (int i = (int)threadIdx.x; i < kDepth * kTile / 8; i += 128) {
            int r = i / (kTile / 8), c = i % (kTile / 8) * 8, from = tile * kDepth + r;
            bool inside = from < k && column0 + c < n;
            cp_async_16(b + r * kStrideB + c, inside ? B + (size_t)from * n + column0 + c : B, inside ? 16 : 0);
        }
    };
    for (int tile = 0; tile < kStages - 1; tile++) {
        if (tile < tiles) fetch(tile);
        cp_async_commit();
    }
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        if (tile + kStages - 1 < tiles) fetch(tile + kStages - 1);
        cp_async_commit();
        const bf16 *a = stages + tile % kStages * kStage, *b = a + kTile * kStrideA;
        for (int depth = 0; depth < kDepth; depth += 16) {
            uint32_t fa[2][4], fb[2][4];
            for (int i = 0; i < 2; i++) {
                ldmatrix_x4(fa[i], a + (warp_row + 16 * i + lane % 16) * kStrideA + depth + lane / 16 * 8);
                ldmatrix_x4_trans(fb[i], b + (depth + lane % 16) * kStrideB + warp_column + 16 * i + lane / 16 * 8);
            }
            for (int i = 0; i < 2; i++) {
                for (int j = 0; j < 4; j++) {
                    uint32_t column[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
                    mma_bf16(sum[i][j], fa[i], column, sum[i][j]);
                }
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
            for (int h = 0; h < 2; h++) {
                int row = row0 + warp_row + 16 * i + 8 * h + lane / 4,
                    column = column0 + warp_column + 8 * j + lane % 4 * 2;
                if (row < m && column < n)
                    *(float2 *)&C[(size_t)row * n + column] = make_float2(sum[i][j][2 * h], sum[i][j][2 * h + 1]);
            }
        }
    }
}

static bool good_matmul() {
    int m = 100, n = 88, k = 136;
    Array<bf16> a((size_t)(m * k)), b((size_t)(k * n));
    Array<float> c((size_t)(m * n), false);
    size_t bytes = kStages * kStage * sizeof(bf16);
    CHECK(cudaFuncSetAttribute(matmul, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    dim3 grid((unsigned)(n + kTile - 1) / kTile, (unsigned)(m + kTile - 1) / kTile);
    matmul<<<grid, 128, bytes>>>(c.device, a.device, b.device, m, n, k);
    c.download();
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int d = 0; d < k; d++) sum += (double)(float)a.host[i * k + d] * (double)(float)b.host[d * n + j];
            if (!near(c.host[i * n + j], sum, 2e-4, "matmul")) return false;
        }
    }
    return true;
}

__device__ float warp_sum(float x) {
    for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
    return x;
}
__device__ float warp_max(float x) {
    for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
    return x;
}

// out[rows, 32] = softmax(q k^T / sqrt(32)) v, k and v [keys, 32]; a warp a row, 32 keys at a time, the maximum and the
// sum corrected as they grow.
__global__ void attention(float *out, const float *q, const float *k, const float *v, int rows, int keys) {
    __shared__ float tile_k[32][33];
    __shared__ float tile_v[32][33];
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, row = (int)(blockIdx.x * 4) + warp;
    float most = -INFINITY, total = 0, sum = 0, mine = row < rows ? q[row * 32 + lane] : 0;
    for (int first = 0; first < keys; first += 32) {
        __syncthreads();
        for (int i = warp; i < 32; i += 4) {
            bool inside = first + i < keys;
            tile_k[i][lane] = inside ? k[(first + i) * 32 + lane] : 0;
            tile_v[i][lane] = inside ? v[(first + i) * 32 + lane] : 0;
        }
        __syncthreads();
        float score = 0;
        for (int c = 0; c < 32; c++) score += __shfl_sync(0xffffffff, mine, c) * tile_k[lane][c];
        score = first + lane < keys ? score * rsqrtf(32) : -INFINITY;
        float largest = fmaxf(most, warp_max(score)), shrink = __expf(most - largest), p = __expf(score - largest);
        total = total * shrink + warp_sum(p);
        sum *= shrink;
        for (int j = 0; j < 32; j++) sum += __shfl_sync(0xffffffff, p, j) * tile_v[j][lane];
        most = largest;
    }
    if (row < rows) out[row * 32 + lane] = sum / total;
}

static bool good_attention() {
    int rows = 10, keys = 77;
    Array<float> q((size_t)rows * 32), k((size_t)keys * 32), v((size_t)keys * 32), out((size_t)rows * 32, false);
    attention<<<(rows + 3) / 4, 128>>>(out.device, q.device, k.device, v.device, rows, keys);
    out.download();
    for (int i = 0; i < rows; i++) {
        double p[77], total = 0;
        for (int j = 0; j < keys; j++) {
            double score = 0;
            for (int c = 0; c < 32; c++) score += (double)q.host[i * 32 + c] * (double)k.host[j * 32 + c];
            total += p[j] = exp(score / sqrt(32.0));
        }
        for (int c = 0; c < 32; c++) {
            double sum = 0;
            for (int j = 0; j < keys; j++) sum += p[j] / total * (double)v.host[j * 32 + c];
            if (!near(out.host[i * 32 + c], sum, 1e-5, "attention")) return false;
        }
    }
    return true;
}

__global__ void layernorm(bf16 *out, const float *in, const float *weight, const float *bias, int channels) {
    const float *x = in + blockIdx.x * (unsigned)channels;
    float sum = 0, squares = 0;
    for (int c = (int)threadIdx.x; c < channels; c += 32) sum += x[c];
    float mean = warp_sum(sum) / (float)channels;
    for (int c = (int)threadIdx.x; c < channels; c += 32) squares += (x[c] - mean) * (x[c] - mean);
    float scale = rsqrtf(warp_sum(squares) / (float)channels + 1e-5f);
    for (int c = (int)threadIdx.x; c < channels; c += 32) {
        out[blockIdx.x * (unsigned)channels + (unsigned)c] =
            __float2bfloat16((x[c] - mean) * scale * weight[c] + bias[c]);
    }
}
static bool good_layernorm() {
    int rows = 9, channels = 75;  // an odd number: two rows share 4 bytes
    Array<float> in((size_t)(rows * channels)), weight((size_t)channels), bias((size_t)channels);
    Array<bf16> out((size_t)(rows * channels), false);
    layernorm<<<rows, 32>>>(out.device, in.device, weight.device, bias.device, channels);
    out.download();
    for (int i = 0; i < rows; i++) {
        double mean = 0, squares = 0;
        for (int c = 0; c < channels; c++) mean += (double)in.host[i * channels + c] / channels;
        for (int c = 0; c < channels; c++) squares += pow((double)in.host[i * channels + c] - mean, 2) / channels;
        for (int c = 0; c < channels; c++) {
            double wanted = ((double)in.host[i * channels + c] - mean) / sqrt(squares + 1e-5) * (double)weight.host[c] +
                            (double)bias.host[c];
            if (!near((float)out.host[i * channels + c], wanted, fabs(wanted) / 200 + 1e-5, "layernorm")) return false;
        }
    }
    return true;
}

// The sum of squares in two launches: nobody waits for another block, and the order of the sum is always the same.
__global__ void norm_parts(float *parts, const float *x, int count) {
    __shared__ float sums[8];
    float sum = 0;
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += (int)(gridDim.x * blockDim.x))
        sum += x[i] * x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = warp_sum(threadIdx.x < 8 ? sums[threadIdx.x] : 0);
        if (threadIdx.x == 0) parts[blockIdx.x] = sum;
    }
}
__global__ void norm_total(float *total, const float *parts, int count) {
    float sum = warp_sum((int)threadIdx.x < count ? parts[threadIdx.x] : 0);
    if (threadIdx.x == 0) *total = sqrtf(sum);
}
static bool good_norm() {
    Array<float> x(5000), parts(7, false), total(1, false);
    float first = 0;
    for (int repeat = 0; repeat < 2; repeat++) {
        norm_parts<<<7, 256>>>(parts.device, x.device, 5000);
        norm_total<<<1, 32>>>(total.device, parts.device, 7);
        double sum = 0;
        for (int i = 0; i < 5000; i++) sum += (double)x.host[i] * (double)x.host[i];
        if (!near(*total.download(), sqrt(sum), 1e-4, "norm")) return false;
        if (repeat && memcmp(&first, total.host, sizeof first) != 0) return false;
        first = *total.host;
    }
    return true;
}

__constant__ float rates[3];  // learning rate, weight decay, epsilon
__global__ void adamw(float *weight, bf16 *copy, float *m, float *v, const float *gradient, int count) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    float g = gradient[i];
    m[i] = 0.9f * m[i] + 0.1f * g;
    v[i] = 0.999f * v[i] + 0.001f * g * g;
    weight[i] = weight[i] * (1 - rates[0] * rates[1]) - rates[0] * m[i] / (sqrtf(v[i]) + rates[2]);
    copy[i] = __float2bfloat16(weight[i]);
    copy[i] = __hadd(copy[i], copy[i]);  // in place: the neighbour has the other half of the 4 bytes
}
static bool good_adamw() {
    int count = 1000;
    Array<float> w((size_t)count), m((size_t)count), v((size_t)count), g((size_t)count), before((size_t)count, false);
    Array<bf16> copy((size_t)count, false);
    float r[3] = {0.01f, 0.1f, 1e-8f};
    CHECK(cudaMemcpyToSymbol(rates, r, sizeof r));
    for (int i = 0; i < count; i++) v.host[i] = fabsf(v.host[i]), before.host[i] = w.host[i];
    v.upload();
    adamw<<<(count + 127) / 128, 128>>>(w.device, copy.device, m.device, v.device, g.device, count);
    w.download();
    copy.download();
    for (int i = 0; i < count; i++) {
        double gi = g.host[i], mi = 0.9 * (double)m.host[i] + 0.1 * gi,
               vi = 0.999 * (double)v.host[i] + 0.001 * gi * gi;
        double wanted = (double)before.host[i] * (1 - 0.001) - 0.01 * mi / (sqrt(vi) + 1e-8);
        if (!near(w.host[i], wanted, 1e-5 * (1 + fabs(wanted)), "adamw")) return false;
        if (!near((float)copy.host[i], 2 * (double)w.host[i], fabs(wanted) / 100 + 1e-6, "adamw, bf16")) return false;
    }
    return true;
}

template <class T>
__device__ T *scratch() {  // each instantiation has memory of its own
    __shared__ T memory[64];
    return memory;
}
__global__ void warp_operations(int *out, unsigned *bins) {
    __shared__ unsigned histogram[4];
    int lane = (int)threadIdx.x % 32, t = (int)threadIdx.x;
    if (t < 4) histogram[t] = 0;
    float *f = scratch<float>();
    int *n = scratch<int>();
    f[t] = 1.5f;
    n[t] = t;
    __syncthreads();
    atomicAdd(&histogram[t % 3], 1u);
    int failures = f[63 - t] != 1.5f || n[63 - t] != 63 - t;
    failures += __shfl_up_sync(0xffffffff, lane, 1) != (lane ? lane - 1 : 0);
    failures += __shfl_down_sync(0xffffffff, lane, 4, 8) != (lane % 8 < 4 ? lane + 4 : lane);
    failures += __shfl_sync(0xffffffff, (double)lane, 9, 8) != lane / 8 * 8 + 1;
    failures += __ballot_sync(0xffffffff, lane & 1) != 0xaaaaaaaa;
    failures += !__any_sync(0xffffffff, lane == 7) || __all_sync(0xffffffff, lane != 7);
    failures += __reduce_add_sync(0xffffffff, lane) != 496 || __reduce_max_sync(0xffffffff, -lane) != 0;
    failures += __syncthreads_count(t < 40) != 40;
    failures += __syncthreads_or(t == 63) == 0;
    failures += min(3, -2) != -2 || max(3u, 5u) != 5 || __popc(255) != 8 || __clz(1) != 31 || __brev(1) != 0x80000000;
    failures += (float)__hfma(bf16(2.0f), bf16(3.0f), bf16(1.0f)) != 7.0f;
    out[blockIdx.x * 64 + threadIdx.x] = failures;
    if (t < 4) atomicMax(&bins[t], histogram[t]);
}
static bool good_warp_operations() {
    Array<int> out(5 * 64, false);
    Array<unsigned> bins(4, false);
    bins.upload();
    warp_operations<<<5, dim3(64, 1, 1)>>>(out.device, bins.device);
    out.download();
    bins.download();
    for (int i = 0; i < 5 * 64; i++) {
        if (!near(out.host[i], 0, 0, "warp operations")) return false;
    }
    return near(bins.host[0], 22, 0, "atomics") && near(bins.host[1], 21, 0, "atomics") &&
           near(bins.host[3], 0, 0, "atomics");
}

__global__ void add_to(float *x, float amount) { x[blockIdx.x * 32 + threadIdx.x] += amount; }
__global__ void copy_to(float *to, const float *from) {
    to[blockIdx.x * 32 + threadIdx.x] = from[blockIdx.x * 32 + threadIdx.x];
}

// Two streams hand memory to each other by events; the host waits before it reads.
static bool good_streams() {
    float *pinned, *x, *y, milliseconds = -1;
    cudaStream_t a, b;
    cudaEvent_t ready, start, end;
    CHECK(cudaMallocHost((void **)&pinned, 128));
    CHECK(cudaMalloc(&x, 128));
    CHECK(cudaMalloc(&y, 128));
    CHECK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&ready, cudaEventDisableTiming));
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    bool good = true;
    for (int round = 0; round < 3 && good; round++) {
        for (int i = 0; i < 32; i++) pinned[i] = (float)i;
        CHECK(cudaEventRecord(start, a));
        CHECK(cudaMemcpyAsync(x, pinned, 128, cudaMemcpyHostToDevice, a));
        add_to<<<1, 32, 0, a>>>(x, 2);
        CHECK(cudaEventRecord(ready, a));
        CHECK(cudaStreamWaitEvent(b, ready, 0));
        copy_to<<<1, 32, 0, b>>>(y, x);
        CHECK(cudaEventRecord(ready, b));
        CHECK(cudaStreamWaitEvent(a, ready, 0));
        add_to<<<1, 32, 0, a>>>(x, 5);
        CHECK(cudaMemcpyAsync(pinned, y, 128, cudaMemcpyDeviceToHost, b));
        CHECK(cudaEventRecord(end, b));
        CHECK(cudaStreamSynchronize(b));
        for (int i = 0; i < 32; i++) good &= near(pinned[i], i + 2, 0, "streams");
        CHECK(cudaEventElapsedTime(&milliseconds, start, end));
        good &= milliseconds >= 0;
    }
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaEventDestroy(ready));
    CHECK(cudaStreamDestroy(a));
    CHECK(cudaFree(x));
    CHECK(cudaFreeHost(pinned));
    return good;
}

#ifdef HAVE_CUBLASLT
#define BLAS(call)                                                            \
    do {                                                                      \
        if ((call) != CUBLAS_STATUS_SUCCESS) {                                \
            fprintf(stderr, "%s:%d: %s failed\n", __FILE__, __LINE__, #call); \
            exit(3);                                                          \
        }                                                                     \
    } while (0)

// Row-major y[rows, out] = epilogue(x[rows, in] w[out, in]^T + residual): for cuBLASLt, which thinks in columns, w is
// the transposed first operand, and the bias has one number for each row of its result.
static void linear(float *y, const float *x, const float *w, const float *bias, const float *residual, int rows, int in,
                   int out, cublasLtEpilogue_t epilogue, void *workspace, size_t bytes, cudaStream_t stream) {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t how;
    cublasLtMatrixLayout_t lw, lx, ly;
    cublasOperation_t transpose = CUBLAS_OP_T;
    float alpha = 1, beta = residual ? 1 : 0;
    BLAS(cublasLtCreate(&handle));
    BLAS(cublasLtMatmulDescCreate(&how, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    BLAS(cublasLtMatmulDescSetAttribute(how, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose));
    const cublasLtMatmulDescAttributes_t name = CUBLASLT_MATMUL_DESC_EPILOGUE;
    BLAS(cublasLtMatmulDescSetAttribute(how, name, &epilogue, sizeof epilogue));  // bug: epilogue
    BLAS(cublasLtMatmulDescSetAttribute(how, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    BLAS(cublasLtMatrixLayoutCreate(&lw, CUDA_R_32F, (uint64_t)in, (uint64_t)out, in));
    BLAS(cublasLtMatrixLayoutCreate(&lx, CUDA_R_32F, (uint64_t)in, (uint64_t)rows, in));
    BLAS(cublasLtMatrixLayoutCreate(&ly, CUDA_R_32F, (uint64_t)out, (uint64_t)rows, out));
    BLAS(cublasLtMatmul(handle, how, &alpha, w, lw, x, lx, &beta,  // bug: workspace
                        residual ? residual : y, ly, y, ly, NULL, workspace, bytes, stream));
    BLAS(cublasLtMatrixLayoutDestroy(lw));
    BLAS(cublasLtMatrixLayoutDestroy(lx));
    BLAS(cublasLtMatrixLayoutDestroy(ly));
    BLAS(cublasLtMatmulDescDestroy(how));
    BLAS(cublasLtDestroy(handle));
}

static bool good_cublaslt() {
    int rows = 7, in = 12, out = 8;
    Array<float> x((size_t)(rows * in)), w((size_t)(out * in)), bias((size_t)out), residual((size_t)(rows * out)),
        y((size_t)(rows * out), false);
    for (int kind = 0; kind < 4; kind++) {
        cublasLtEpilogue_t epilogue[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_RELU,
                                         CUBLASLT_EPILOGUE_RELU_BIAS};
        bool with_bias = kind % 2 == 1, relu = kind >= 2;
        linear(y.device, x.device, w.device, bias.device, kind == 3 ? residual.device : NULL, rows, in, out,
               epilogue[kind], NULL, 0, 0);
        y.download();
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < out; j++) {
                double sum =
                    (with_bias ? (double)bias.host[j] : 0) + (kind == 3 ? (double)residual.host[i * out + j] : 0);
                for (int k = 0; k < in; k++) sum += (double)x.host[i * in + k] * (double)w.host[j * in + k];
                if (!near(y.host[i * out + j], relu ? fmax(sum, 0) : sum, 1e-5, "cuBLASLt")) return false;
            }
        }
    }
    return true;
}

// D[m, n] = A[m, k] B[k, n] in columns, two of each, bf16 in and out, and the gradient of a bias beside the first.
static bool good_cublaslt_batched() {
    const int m = 6, n = 10, k = 4, batch = 2;
    Array<bf16> a(m * k * batch), b(k * n * batch), d(m * n * batch, false);
    Array<float> sums(n, false);
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t how;
    cublasLtMatrixLayout_t la, lb, ld;
    float one = 1, none = 0;
    BLAS(cublasLtCreate(&handle));
    BLAS(cublasLtMatmulDescCreate(&how, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    BLAS(cublasLtMatrixLayoutCreate(&la, CUDA_R_16BF, m, k, m));
    BLAS(cublasLtMatrixLayoutCreate(&lb, CUDA_R_16BF, k, n, k));
    BLAS(cublasLtMatrixLayoutCreate(&ld, CUDA_R_16BF, m, n, m));
    for (int with_gradient = 1; with_gradient >= 0; with_gradient--) {
        cublasLtEpilogue_t epilogue = with_gradient ? CUBLASLT_EPILOGUE_BGRADB : CUBLASLT_EPILOGUE_DEFAULT;
        cudaDataType_t type = CUDA_R_32F;
        BLAS(cublasLtMatmulDescSetAttribute(how, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
        BLAS(cublasLtMatmulDescSetAttribute(how, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &sums.device, sizeof sums.device));
        BLAS(cublasLtMatmulDescSetAttribute(how, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type));
        if (!with_gradient) {
            cublasLtMatrixLayout_t layouts[] = {la, lb, ld};
            int64_t strides[] = {m * k, k * n, m * n};
            int32_t count = batch;
            for (int i = 0; i < 3; i++) {
                BLAS(cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                                      sizeof count));
                BLAS(cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                      &strides[i], sizeof strides[i]));
            }
        }
        BLAS(cublasLtMatmul(handle, how, &one, a.device, la, b.device, lb, &none, d.device, ld, d.device, ld, NULL,
                            NULL, 0, 0));
    }
    d.download();
    sums.download();
    for (int j = 0; j < n; j++) {
        double total = 0;
        for (int i = 0; i < k; i++) total += (double)(float)b.host[j * k + i];
        if (!near(sums.host[j], total, 1e-6, "cuBLASLt, bias gradient")) return false;
        for (int i = 0; i < m * batch; i++) {
            double sum = 0;
            const bf16 *A = a.host + i / m * m * k, *B = b.host + i / m * k * n;
            for (int l = 0; l < k; l++) sum += (double)(float)A[l * m + i % m] * (double)(float)B[j * k + l];
            if (!near((float)d.host[i / m * m * n + j * m + i % m], sum, fabs(sum) / 256 + 1e-6, "cuBLASLt, bf16"))
                return false;
        }
    }
    return true;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Mistakes. Each is the smallest kernel that has it. The line that a report must name ends with "bug:" and the name.

#ifdef CUDA_EMU
__global__ void kernel_missing_barrier(float *out) {
    __shared__ float x[64];
    x[threadIdx.x] = 0;
    __syncthreads();
    x[threadIdx.x] = 1;                      // bug: missing barrier
    out[threadIdx.x] = x[63 - threadIdx.x];  // bug: missing barrier
}
static void bug_missing_barrier() {
    Array<float> out(64, false);
    kernel_missing_barrier<<<1, 64>>>(out.device);
    out.download();
}

__global__ void kernel_second_barrier(float *out) {
    __shared__ float x[64];
    float sum = 0;
    for (int i = 0; i < 2; i++) {
        x[threadIdx.x] = (float)i;  // bug: second barrier
        __syncthreads();
        sum += x[63 - threadIdx.x];  // bug: second barrier
    }
    out[threadIdx.x] = sum;
}
static void bug_second_barrier() {
    Array<float> out(64, false);
    kernel_second_barrier<<<1, 64>>>(out.device);
    out.download();
}

__global__ void kernel_missing_syncwarp(float *out) {
    __shared__ float x[32];
    x[threadIdx.x] = 0;
    __syncthreads();
    x[threadIdx.x] = 1;                      // bug: missing syncwarp
    out[threadIdx.x] = x[31 - threadIdx.x];  // bug: missing syncwarp
}
static void bug_missing_syncwarp() {
    Array<float> out(32, false);
    kernel_missing_syncwarp<<<1, 32>>>(out.device);
    out.download();
}

__global__ void kernel_only_syncwarp(float *out) {
    __shared__ float x[32];
    if (threadIdx.x >= 32) x[threadIdx.x - 32] = 1;           // bug: only syncwarp
    for (int i = 0; i < 100; i++) __syncwarp();               // long enough that the other warp has written
    if (threadIdx.x < 32) out[threadIdx.x] = x[threadIdx.x];  // bug: only syncwarp
}
static void bug_only_syncwarp() {
    Array<float> out(32, false);
    kernel_only_syncwarp<<<1, 64>>>(out.device);
    out.download();
}

__global__ void kernel_blocks(float *out) {
    out[threadIdx.x] = (float)blockIdx.x;  // bug: race between blocks
}
static void bug_blocks() {
    Array<float> out(32, false);
    kernel_blocks<<<2, 32>>>(out.device);
    out.download();
}

// All blocks read what one writes: wherever the writer's turn comes.
__global__ void kernel_blocks_read(float *x, float *out) {
    if (blockIdx.x == 1)
        x[threadIdx.x] = 1;  // bug: read between blocks
    else
        out[blockIdx.x * 32 + threadIdx.x] = x[threadIdx.x];  // bug: read between blocks
}
static void bug_blocks_read() {
    Array<float> x(32), out(128, false);
    kernel_blocks_read<<<4, 32>>>(x.device, out.device);
    out.download();
}

// The last block to come writes what the others have read.
__global__ void kernel_last_block(int *tickets, float *x, float *out) {
    __shared__ int ticket;
    if (threadIdx.x == 0) ticket = atomicAdd(tickets, 1);
    out[blockIdx.x * 32 + threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    if (ticket == 1) x[threadIdx.x] = 0;  // bug: last block
}
static void bug_last_block() {
    Array<int> tickets(1, false);
    Array<float> x(32), out(64, false);
    tickets.upload();
    kernel_last_block<<<2, 32>>>(tickets.device, x.device, out.device);
    out.download();
}

__global__ void kernel_halves(bf16 *out) {
    out[threadIdx.x / 2] = __float2bfloat16((float)threadIdx.x);  // bug: halves
}
static void bug_halves() {
    Array<bf16> out(16, false);
    kernel_halves<<<1, 32>>>(out.device);
    out.download();
}

__global__ void kernel_atomic(int *count, int *out) {
    atomicAdd(count, 1);        // bug: atomic and read
    out[threadIdx.x] = *count;  // bug: atomic and read
}
static void bug_atomic() {
    Array<int> count(1), out(64, false);
    kernel_atomic<<<1, 64>>>(count.device, out.device);
    out.download();
}

__global__ void kernel_uninitialised_shared(float *out) {
    __shared__ float x[64];
    if (threadIdx.x != 5) x[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = x[63 - threadIdx.x];  // bug: uninitialised shared
}
static void bug_uninitialised_shared() {
    Array<float> out(64, false);
    kernel_uninitialised_shared<<<1, 64>>>(out.device);
    if (isnan(out.download()[58])) fprintf(stderr, "wrong result\n");
}

__global__ void kernel_uninitialised_global(float *out, const float *in) {
    out[threadIdx.x] = in[threadIdx.x] * 2;  // bug: uninitialised global
}
static void bug_uninitialised_global() {
    Array<float> in(32, false), out(32, false);
    CHECK(cudaMemset(in.device, 0, 31 * 4));
    kernel_uninitialised_global<<<1, 32>>>(out.device, in.device);
    if (isnan(out.download()[31])) fprintf(stderr, "wrong result\n");
}

static void bug_uninitialised_copy() {
    Array<float> in(32, false), out(32, false);
    CHECK(cudaMemcpy(out.device, in.device, 128, cudaMemcpyDeviceToDevice));  // that may be
    CHECK(cudaMemcpy(out.host, out.device, 128, cudaMemcpyDeviceToHost));     // bug: uninitialised copy
}

__global__ void kernel_divergent_barrier() {
    if (threadIdx.x < 32) {
        __syncthreads();  // bug: divergent barrier
    } else {
        __syncthreads();  // bug: divergent barrier
    }
}
static void bug_divergent_barrier() {
    kernel_divergent_barrier<<<1, 64>>>();
    CHECK(cudaDeviceSynchronize());
}

__global__ void kernel_early_exit(int count) {
    if ((int)threadIdx.x >= count) return;
    __syncthreads();  // bug: early exit
}
static void bug_early_exit() {
    kernel_early_exit<<<1, 64>>>(32);
    CHECK(cudaDeviceSynchronize());
}

__global__ void kernel_by_one(float *out, int count) {
    int i = (int)threadIdx.x;
    if (i <= count) out[i] = 0;  // bug: out of bounds by one
}
static void bug_by_one() {
    Array<float> out(31, false);
    kernel_by_one<<<1, 32>>>(out.device, 31);
    out.download();
}

__global__ void kernel_half_by_one(bf16 *out, int count) {
    int i = (int)threadIdx.x;
    if (i <= count) out[i] = __float2bfloat16(0);  // bug: out of bounds by half a cell
}
static void bug_half_by_one() {
    Array<bf16> out(31, false);
    kernel_half_by_one<<<1, 32>>>(out.device, 31);
    out.download();
}

__global__ void kernel_far(float *out, int far) {
    out[(int)threadIdx.x + far] = 0;  // bug: out of bounds
}
static void bug_far() {
    Array<float> out(32, false);
    kernel_far<<<1, 32>>>(out.device, 64);
    CHECK(cudaDeviceSynchronize());
}

__global__ void kernel_shared_by_one(float *out, int shift) {
    __shared__ float x[32];
    x[(int)threadIdx.x + shift] = 0;  // bug: shared by one
    __syncthreads();
    out[threadIdx.x] = x[threadIdx.x];
}
static void bug_shared_by_one() {
    Array<float> out(32, false);
    kernel_shared_by_one<<<1, 32>>>(out.device, 1);
    out.download();
}

__global__ void kernel_dynamic_by_one(int shift) {
    extern __shared__ __align__(128) unsigned char smem[];
    smem[(int)threadIdx.x + shift] = 0;  // bug: dynamic shared by one
}
static void bug_dynamic_by_one() {
    kernel_dynamic_by_one<<<1, 32, 32>>>(1);
    CHECK(cudaDeviceSynchronize());
}

__global__ void kernel_misaligned(float4 *out, const float *in) {
    out[threadIdx.x] = *(const float4 *)(in + threadIdx.x);  // bug: misaligned
}
static void bug_misaligned() {
    Array<float> in(64), out(128, false);
    kernel_misaligned<<<1, 32>>>((float4 *)out.device, in.device);
    CHECK(cudaDeviceSynchronize());
}

__global__ void kernel_misaligned_copy(const float *in) {
    __shared__ __align__(16) float x[32][4];
    cp_async_16(x[threadIdx.x], in + threadIdx.x);  // bug: misaligned cp.async
    cp_async_wait_all();
}
static void bug_misaligned_copy() {
    Array<float> in(64);
    kernel_misaligned_copy<<<1, 32>>>(in.device);
    CHECK(cudaDeviceSynchronize());
}

__global__ void kernel_missing_wait(float *out, const float *in) {
    __shared__ __align__(16) float x[2][32][4];
    for (int i = 0; i < 2; i++) {
        cp_async_16(x[i][threadIdx.x], in + 4 * threadIdx.x);
        cp_async_commit();
    }
    cp_async_wait<1>();
    out[threadIdx.x] = x[0][threadIdx.x][0] + x[1][threadIdx.x][0];  // bug: missing cp.async wait
}
static void bug_missing_wait() {
    Array<float> in(128), out(32, false);
    kernel_missing_wait<<<1, 32>>>(out.device, in.device);
    if (isnan(out.download()[0])) fprintf(stderr, "wrong result\n");
}

__global__ void kernel_wait_without_barrier(float *out, const float *in) {
    __shared__ __align__(16) float x[64][4];
    x[threadIdx.x][0] = 0;
    __syncthreads();
    cp_async_16(x[threadIdx.x], in + 4 * threadIdx.x);  // bug: wait without barrier
    cp_async_wait_all();
    out[threadIdx.x] = x[63 - threadIdx.x][0];  // bug: wait without barrier
}
static void bug_wait_without_barrier() {
    Array<float> in(256), out(64, false);
    kernel_wait_without_barrier<<<1, 64>>>(out.device, in.device);
    out.download();
}

__global__ void kernel_mask() {
    __syncwarp(0xffffffef);  // bug: lane missing from mask
}
static void bug_mask() {
    kernel_mask<<<1, 32>>>();
    CHECK(cudaDeviceSynchronize());
}

__global__ void kernel_divergent_shuffle(int *out) {
    int x = (int)threadIdx.x;
    if (x < 16) {
        x = __shfl_xor_sync(0xffffffff, x, 1);  // bug: divergent shuffle
    } else {
        x = __shfl_xor_sync(0xffffffff, x, 2);  // bug: divergent shuffle
    }
    out[threadIdx.x] = x;
}
static void bug_divergent_shuffle() {
    Array<int> out(32, false);
    kernel_divergent_shuffle<<<1, 32>>>(out.device);
    out.download();
}

__global__ void kernel_lane_left(int *out, int count) {
    for (int i = (int)threadIdx.x; i < count; i += 32)
        out[i] = __shfl_xor_sync(0xffffffff, i, 1);  // bug: lane has left
}
static void bug_lane_left() {
    Array<int> out(40, false);
    kernel_lane_left<<<1, 32>>>(out.device, 40);
    out.download();
}

__global__ void kernel_much_shared(float *out) {
    extern __shared__ float x[];
    out[threadIdx.x] = x[threadIdx.x] = 0;
}
static void bug_much_shared() {
    Array<float> out(32, false);
    kernel_much_shared<<<1, 32, 50000>>>(out.device);  // bug: too much shared memory
    out.download();
}

static void bug_block_size() {
    kernel_mask<<<1, 33>>>();  // bug: block size
    CHECK(cudaDeviceSynchronize());
}

static void bug_host_reads_device() {
    Array<float> x(32);
    volatile float *p = x.device;
    x.host[0] = p[3];  // bug: host reads device memory
}
static void bug_host_clears_device() {
    Array<float> x(32);
    size_t bytes = 4 * x.count;
    memset(x.device, 0, bytes);  // bug: host writes device memory
}

static void bug_kernel_reads_host() {
    Array<float> in(32), out(32, false);
    copy_to<<<1, 32>>>(out.device, in.host);
    out.download();
}

static void bug_missing_event() {
    Array<float> x(32), y(32);
    cudaStream_t a, b;
    CHECK(cudaStreamCreate(&a));
    CHECK(cudaStreamCreate(&b));
    x.host[0] = x.host[0] + 1;
    add_to<<<1, 32, 0, a>>>(x.device, 1);
    copy_to<<<1, 32, 0, b>>>(y.device, x.device);
    if (y.download()[0] != x.host[0]) fprintf(stderr, "wrong result\n");
}

static void bug_read_before_copy() {
    Array<float> x(32);
    float *pinned;
    CHECK(cudaMallocHost((void **)&pinned, 128));
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaMemcpyAsync(pinned, x.device, 128, cudaMemcpyDeviceToHost, stream));  // bug: read before copy
    x.host[0] = pinned[0];                                                          // bug: read before copy
    if (isnan(x.host[0])) fprintf(stderr, "wrong result\n");
}
static void bug_write_before_copy() {
    Array<float> x(32, false);
    float *pinned;
    CHECK(cudaMallocHost((void **)&pinned, 128));
    for (int i = 0; i < 32; i++) pinned[i] = 1;
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaMemcpyAsync(x.device, pinned, 128, cudaMemcpyHostToDevice, stream));  // bug: write before copy
    pinned[0] = 2;                                                                  // bug: write before copy
    CHECK(cudaStreamSynchronize(stream));
    if (x.download()[0] != 1) fprintf(stderr, "wrong result\n");
}

static void bug_not_pinned() {
    Array<float> x(32);
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaMemcpyAsync(x.device, x.host, 128, cudaMemcpyHostToDevice, stream));  // bug: not pinned
}

static void bug_use_after_free() {
    Array<float> out(32, false);
    float *x;
    CHECK(cudaMalloc(&x, 128));
    CHECK(cudaFree(x));
    kernel_far<<<1, 32>>>(x, 0);  // the line that is named is that of "out of bounds"
    CHECK(cudaDeviceSynchronize());
}
static void bug_free_twice() {
    float *x;
    CHECK(cudaMalloc(&x, 128));
    CHECK(cudaFree(x));
    CHECK(cudaFree(x));  // bug: free twice
}
static void bug_long_copy() {
    Array<float> x(32);
    CHECK(cudaMemcpy(x.device, x.host, 132, cudaMemcpyHostToDevice));  // bug: copy too long
}
static void bug_wrong_way() {
    Array<float> x(32);
    CHECK(cudaMemcpy(x.device, x.host, 128, cudaMemcpyDeviceToHost));  // bug: copy the wrong way
}

#ifdef HAVE_CUBLASLT
static void bug_epilogue() {
    Array<float> x(64), w(64), y(64, false);
    linear(y.device, x.device, w.device, NULL, NULL, 8, 8, 8, CUBLASLT_EPILOGUE_GELU, NULL, 0, 0);
}
static void bug_workspace() {
    Array<float> x(64), w(64), y(64, false), z(64, false), workspace(256, false);
    cudaStream_t streams[2];
    for (int i = 0; i < 2; i++) {
        CHECK(cudaStreamCreate(&streams[i]));
        linear(i ? y.device : z.device, x.device, w.device, NULL, NULL, 8, 8, 8, CUBLASLT_EPILOGUE_DEFAULT,
               workspace.device, 1024, streams[i]);
    }
    CHECK(cudaDeviceSynchronize());
}
#endif
#endif

// ---------------------------------------------------------------------------------------------------------------------
// main

static const struct {
    const char *name;
    bool (*run)();
} good_tests[] = {
    {"mma m16n8k16 bf16 and the tables", good_mma_bf16},
    {"mma m16n8k16 f16 and the tables", good_mma_f16},
    {"mma m16n8k8 tf32 and the tables", good_mma_tf32},
    {"ldmatrix x1, x2, x4, trans and the tables", good_ldmatrix},
    {"cp.async with zero-fill", good_cp_async_zero_fill},
    {"matmul: cp.async pipeline, ldmatrix, mma", good_matmul},
    {"attention: softmax over the keys as they come", good_attention},
    {"layernorm, fp32 to bf16", good_layernorm},
    {"norm in two launches", good_norm},
    {"AdamW with a bf16 copy", good_adamw},
    {"shuffles, votes, reductions, atomics, intrinsics", good_warp_operations},
    {"streams and events", good_streams},
#ifdef HAVE_CUBLASLT
    {"cuBLASLt: a linear layer and its epilogues", good_cublaslt},
    {"cuBLASLt: bf16, batched, and the gradient of a bias", good_cublaslt_batched},
#endif
};

static int passed, failed;

static void report(bool good, const char *kind, const char *name, const char *detail) {
    printf("%s  %s: %s%s\n", good ? "ok    " : "FAILED", kind, name, good ? "" : "; it said:\n");
    if (!good) printf("%s\n", detail);
    good ? passed++ : failed++;
    fflush(stdout);
}

#ifdef CUDA_EMU
// Found when: always; only by the checker; the same, but without it the result is wrong under some schedule.
enum Found { kAlways, kChecked, kSeen };
static const struct {
    const char *name;  // as in the comment "bug: NAME"
    Found found;
    const char *says;
    void (*run)();
} bugs[] = {
    {"missing barrier", kChecked, "race between warps", bug_missing_barrier},
    {"second barrier", kChecked, "race between warps", bug_second_barrier},
    {"missing syncwarp", kChecked, "race within a warp", bug_missing_syncwarp},
    {"only syncwarp", kChecked, "race between warps", bug_only_syncwarp},
    {"race between blocks", kChecked, "race between blocks", bug_blocks},
    {"read between blocks", kChecked, "race between blocks", bug_blocks_read},
    {"last block", kChecked, "race between blocks", bug_last_block},
    {"halves", kChecked, "race within a warp", bug_halves},
    {"atomic and read", kChecked, "race", bug_atomic},
    {"uninitialised shared", kSeen, "uninitialised read", bug_uninitialised_shared},
    {"uninitialised global", kSeen, "uninitialised read", bug_uninitialised_global},
    {"uninitialised copy", kChecked, "uninitialised read", bug_uninitialised_copy},
    {"divergent barrier", kAlways, "divergent __syncthreads", bug_divergent_barrier},
    {"early exit", kAlways, "deadlock", bug_early_exit},
    {"out of bounds by one", kChecked, "out of bounds", bug_by_one},
    {"out of bounds by half a cell", kChecked, "out of bounds", bug_half_by_one},
    {"out of bounds", kAlways, "out of bounds", bug_far},
    {"shared by one", kChecked, "out of bounds", bug_shared_by_one},
    {"dynamic shared by one", kChecked, "out of bounds", bug_dynamic_by_one},
    {"misaligned", kAlways, "misaligned", bug_misaligned},
    {"misaligned cp.async", kAlways, "misaligned", bug_misaligned_copy},
    {"missing cp.async wait", kSeen, "before the wait for cp.async", bug_missing_wait},
    {"wait without barrier", kChecked, "race between warps", bug_wait_without_barrier},
    {"lane missing from mask", kAlways, "lane 4 is missing", bug_mask},
    {"divergent shuffle", kAlways, "divergent warp", bug_divergent_shuffle},
    {"lane has left", kAlways, "left the kernel", bug_lane_left},
    {"too much shared memory", kAlways, "too much shared memory", bug_much_shared},
    {"block size", kAlways, "multiple of 32", bug_block_size},
    {"host reads device memory", kChecked, "host code reads device memory", bug_host_reads_device},
    {"host writes device memory", kChecked, "host code writes device memory", bug_host_clears_device},
    {"kernel reads host memory", kChecked, "reads host memory", bug_kernel_reads_host},
    {"missing event", kSeen, "race between streams", bug_missing_event},
    {"read before copy", kSeen, "is under way", bug_read_before_copy},
    {"write before copy", kSeen, "is under way", bug_write_before_copy},
    {"not pinned", kAlways, "not pinned", bug_not_pinned},
    {"use after free", kAlways, "use after free", bug_use_after_free},
    {"free twice", kAlways, "freed twice", bug_free_twice},
    {"copy too long", kAlways, "out of bounds", bug_long_copy},
    {"copy the wrong way", kAlways, "HostToDevice", bug_wrong_way},
#ifdef HAVE_CUBLASLT
    {"epilogue", kAlways, "is not emulated", bug_epilogue},
    {"workspace", kChecked, "race between streams", bug_workspace},
#endif
};

// Whether `text` names a line of this file that is marked with the bug's name (or any line, if none is marked).
static bool names_line(const char *text, const char *name) {
    FILE *file = fopen(__FILE__, "r");
    char line[1024], mark[128], place[1100];
    bool marked = false, named = false;
    snprintf(mark, sizeof mark, "// bug: %s\n", name);
    for (int number = 1; file && fgets(line, sizeof line, file); number++) {
        const char *at = strstr(line, "// bug: ");
        if (!at || strcmp(at, mark) != 0) continue;
        marked = true;
        snprintf(place, sizeof place, "%s:%d", __FILE__, number);
        const char *found = strstr(text, place);
        named |= found && !(found[strlen(place)] >= '0' && found[strlen(place)] <= '9');
    }
    if (file) fclose(file);
    return marked ? named : strstr(text, __FILE__) != NULL;
}
#endif

// Runs a test in a process of its own; what it writes to stderr comes back in `text`.
template <class F>
static int apart(F run, char *text, size_t size) {
    int ends[2], status = 0;
    if (pipe(ends) != 0) exit(3);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        _exit(run() ? 0 : 1);
    }
    close(ends[1]);
    size_t length = 0;
    for (ssize_t got; length + 1 < size && (got = read(ends[0], text + length, size - 1 - length)) > 0;)
        length += (size_t)got;
    text[length] = 0;
    close(ends[0]);
    waitpid(child, &status, 0);
    return status;
}

static bool wanted(const char *name, int count, char **words) {
    for (int i = 1; i < count; i++) {
        if (strstr(name, words[i])) return true;
    }
    return count == 1;
}

__global__ void cost_barrier(int count) {
    for (int i = 0; i < count; i++) __syncthreads();
}
__global__ void cost_shuffle(int *out, int count) {
    int x = (int)threadIdx.x;
    for (int i = 0; i < count; i++) x = __shfl_xor_sync(0xffffffff, x, 1) + 1;
    out[threadIdx.x] = x;
}
__global__ void cost_mma(float *out, int count) {
    float sum[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < count; i++) mma_bf16(sum, a, b, sum);
    out[threadIdx.x] = sum[0];
}
__global__ void cost_access(float *x, int count) {
    for (int i = 0; i < count; i++) x[threadIdx.x * 64 + (unsigned)i % 64] += 1;
}

static double nanoseconds() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}
static void cost() {
    Array<float> x(256 * 64);
    Array<int> n(256, false);
    for (int round = 0; round < 2; round++) {  // the first warms up
        double t[6];
        const int count = 20000;
        t[0] = nanoseconds();
        cost_barrier<<<1, 256>>>(count);
        CHECK(cudaDeviceSynchronize());
        t[1] = nanoseconds();
        cost_shuffle<<<1, 256>>>(n.device, count);
        CHECK(cudaDeviceSynchronize());
        t[2] = nanoseconds();
        cost_mma<<<1, 32>>>(x.device, count);
        CHECK(cudaDeviceSynchronize());
        t[3] = nanoseconds();
        cost_access<<<1, 256>>>(x.device, count);
        CHECK(cudaDeviceSynchronize());
        t[4] = nanoseconds();
        good_matmul();
        t[5] = nanoseconds();
        if (round == 0) continue;
        printf(
            "a thread's __syncthreads %.1f ns, shuffle %.1f ns, x[i] += 1 %.1f ns; a warp's mma %.2f us; matmul "
            "100x88x136 %.1f ms\n",
            (t[1] - t[0]) / (256.0 * count), (t[2] - t[1]) / (256.0 * count), (t[4] - t[3]) / (256.0 * count),
            1e-3 * (t[3] - t[2]) / count, 1e-6 * (t[5] - t[4]));
    }
}

int main(int count, char **words) {
    static char text[1 << 16];
    if (count == 2 && strcmp(words[1], "--cost") == 0) return cost(), 0;
#ifdef CUDA_EMU
    bool checked = emu::check_access != nullptr;
    const char *kind = checked ? "emulated, with the checker" : "emulated";
    int schedules = 8;
#else
    const char *kind = "GPU";
    int schedules = 1;
#endif
#ifndef HAVE_CUBLASLT
    printf("left out: cuBLASLt, there is no cublasLt.h\n");
#endif
    for (const auto &test : good_tests) {
        if (!wanted(test.name, count, words)) continue;
        int status = apart(
            [&] {
                for (int seed = 1; seed <= schedules; seed++) {
#ifdef CUDA_EMU
                    emu::reseed((uint64_t)seed);
#endif
                    lottery = (uint32_t)seed;
                    if (!test.run()) return false;
                }
                return true;
            },
            text, sizeof text);
        report(status == 0 && !text[0], kind, test.name, text);
    }
#ifdef CUDA_EMU
    for (const auto &bug : bugs) {
        if (!wanted(bug.name, count, words) || (!checked && bug.found == kChecked)) continue;
        bool seen = false;
        for (int seed = 1; seed <= 8 && !seen; seed++) {
            int status = apart([&] { return emu::reseed((uint64_t)seed), bug.run(), true; }, text, sizeof text);
            if (!checked && bug.found == kSeen) {
                seen = status == 0 && strstr(text, "wrong result");
                continue;
            }
            seen = WIFSIGNALED(status) && strstr(text, bug.says) && names_line(text, bug.name);
            if (!seen || seed == 2) break;  // whatever the schedule
            seen = seed == 2;
        }
        report(seen, kind, bug.name, text);
    }
#endif
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0 || passed == 0;
}
