// emu.h: what a .cu file needs to run on a CPU. It is included in front of the rewritten .cu (see rewrite.c) and gives
// a plain C++17 compiler what nvcc would give it: threadIdx and friends, barriers, warp operations, atomics,
// intrinsics, the twins of our PTX wrappers. Types, conversions and the declarations of the runtime come from the
// toolkit's own headers; emu.cpp runs the threads and stands in for the runtime library, check.cpp watches every
// access, count.cpp counts them, cublaslt.cpp multiplies. doc/9-testing-a-kernel-without-a-gpu.md says how to use it
// and what it cannot show.
//
// Not here on purpose, so that using it does not compile: floating-point atomics, partial masks, __activemask,
// cooperative groups, managed memory, dynamic parallelism. Read top down: launches, barriers and warps, atomics,
// arithmetic, tensor cores and asynchronous copies, and last what the other files share.
#ifndef EMU_H
#define EMU_H

#define CUDA_EMU 1  // the switch for PTX wrappers; __CUDA_ARCH__ would not do, nvcc's host pass lacks it too

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>

// The rewriter replaces every __shared__; one that it overlooked must not become an ordinary variable.
#undef __shared__
#define __shared__ this_shared_declaration_was_not_rewritten
#undef __managed__
#define __managed__ managed_memory_is_not_emulated
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif

// A defaulted parameter of this kind is the place of the call: barriers and warp operations are compared by it.
#define EMU_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---------------------------------------------------------------------------------------------------------------------
// Launches

namespace emu {
void reseed(uint64_t seed);  // another order of everything, as EMU_SEED chooses it

// Where a thread is. Declared const because nothing of it changes while a thread lives: the compiler asks once.
const uint3 &thread_index() __attribute__((const));
const uint3 &block_index() __attribute__((const));
const dim3 &block_dim() __attribute__((const));
const dim3 &grid_dim() __attribute__((const));

struct Config {  // what stands between <<< and >>>
    dim3 grid, block;
    size_t shared;  // bytes of dynamic shared memory
    cudaStream_t stream;
    Config(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t stream = 0)
        : grid(grid), block(block), shared(shared), stream(stream) {}
};

// Queues a kernel. `call(kernel, arguments)` runs it in one thread with a copy of the `bytes` at `arguments`.
void enqueue_kernel(const Config &config, const void *kernel, const char *name,
                    void (*call)(const void *, const void *), const void *arguments, size_t bytes, const char *file,
                    int line);

template <class... P>
struct Launch {
    void (*kernel)(P...);
    const char *name, *file;
    int line;
    Config config;
    using Arguments = std::tuple<std::decay_t<P>...>;
    static void call(const void *kernel, const void *arguments) {
        std::apply((void (*)(P...))kernel, *(const Arguments *)arguments);
    }
    void operator()(P... values) const {
        static_assert((std::is_trivially_copyable_v<std::decay_t<P>> && ...), "a kernel's argument is copied as bytes");
        static_assert(sizeof(Arguments) <= 4096, "a kernel's arguments may have 4096 bytes");
        Arguments arguments(values...);
        enqueue_kernel(config, (const void *)kernel, name, call, &arguments, sizeof arguments, file, line);
    }
};

template <class... P>
Launch<P...> launch(void (*kernel)(P...), const char *name, const Config &config, EMU_AT) {
    return {kernel, name, file, line, config};
}

// A block's shared memory. `key` is a static variable beside the declaration, so that each instantiation of a template
// has its own memory, as on the GPU.
void *shared_variable(const void *key, size_t bytes, size_t alignment, const char *name);
void *dynamic_shared(size_t alignment);

template <class T>
T *shared(const void *key, const char *name, size_t alignment = 1) {
    return (T *)shared_variable(key, sizeof(T), alignment > alignof(T) ? alignment : alignof(T), name);
}

// What the asynchronous call `name` was given has to be checked where it was called: its return address.
void symbol_copy(void *target, const void *source, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream, bool wait);
cudaError_t set_shared_limit(const void *kernel, cudaFuncAttribute attribute, int value);
}  // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_dim())
#define gridDim (emu::grid_dim())
constexpr int warpSize = 32;

// The parts of the runtime's interface that its headers give to nvcc alone.
template <class T>
cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value) {
    return emu::set_shared_limit((const void *)kernel, attribute, value);
}
template <class T>
cudaError_t cudaMemcpyToSymbolAsync(T &symbol, const void *source, size_t bytes, size_t offset, cudaMemcpyKind kind,
                                    cudaStream_t stream = 0) {
    emu::symbol_copy((char *)&symbol + offset, source, bytes, kind, stream, false);
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T &symbol, const void *source, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind kind = cudaMemcpyHostToDevice) {
    emu::symbol_copy((char *)&symbol + offset, source, bytes, kind, 0, true);
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyFromSymbol(void *target, const T &symbol, size_t bytes, size_t offset = 0,
                                 cudaMemcpyKind kind = cudaMemcpyDeviceToHost) {
    emu::symbol_copy(target, (const char *)&symbol + offset, bytes, kind, 0, true);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers, shuffles, votes

namespace emu {
enum Kind : uint8_t { kBarrier, kSyncwarp, kShuffle, kVote, kReduce, kMatrix, kLoadMatrix };

// Waits for all threads of the block; returns how many brought a predicate that holds.
int barrier(bool predicate, const char *file, int line);

// Waits for all lanes of the warp; returns what the 32 lanes brought. The last lane to come calls `complete` on it
// first.
const uint64_t *meet(Kind kind, unsigned mask, uint64_t mine, const char *file, int line,
                     void (*complete)(uint64_t *) = nullptr);
int lane();

template <class T>
T from(uint64_t bits) {
    T value;
    memcpy((void *)&value, &bits, sizeof value);
    return value;
}
template <class T>
uint64_t bits(T value) {
    static_assert(sizeof value <= 8, "a shuffle moves at most 8 bytes");
    uint64_t result = 0;
    memcpy(&result, &value, sizeof value);
    return result;
}
// The lane `source` of the part of `width` lanes that this lane is in; beyond the part a lane reads itself.
template <class T>
T shuffle(unsigned mask, T value, int source, int width, const char *file, int line) {
    int base = lane() & ~(width - 1);
    if (source < base || source >= base + width) source = lane();
    return from<T>(meet(kShuffle, mask, bits(value), file, line)[source]);
}
template <class T, class F>
T reduce(unsigned mask, T value, F combine, const char *file, int line) {
    const uint64_t *all = meet(kReduce, mask, bits(value), file, line);
    T result = from<T>(all[0]);
    for (int i = 1; i < 32; i++) result = combine(result, from<T>(all[i]));
    return result;
}
inline unsigned ballot(unsigned mask, bool predicate, const char *file, int line) {
    const uint64_t *all = meet(kVote, mask, predicate, file, line);
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= (unsigned)all[i] << i;
    return result;
}
}  // namespace emu

inline void __syncthreads(EMU_AT) { emu::barrier(false, file, line); }
inline int __syncthreads_count(int predicate, EMU_AT) { return emu::barrier(predicate, file, line); }
inline int __syncthreads_or(int predicate, EMU_AT) { return emu::barrier(predicate, file, line) > 0; }
inline int __syncthreads_and(int predicate, EMU_AT) { return emu::barrier(!predicate, file, line) == 0; }
inline void __syncwarp(unsigned mask = ~0u, EMU_AT) { emu::meet(emu::kSyncwarp, mask, 0, file, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_AT) {
    return emu::shuffle(mask, value, (emu::lane() & ~(width - 1)) + (source & (width - 1)), width, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMU_AT) {
    return emu::shuffle(mask, value, emu::lane() ^ lane_mask, width, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_AT) {
    return emu::shuffle(mask, value, emu::lane() - (int)delta, width, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_AT) {
    return emu::shuffle(mask, value, emu::lane() + (int)delta, width, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_AT) { return emu::ballot(mask, predicate, file, line); }
inline int __any_sync(unsigned mask, int predicate, EMU_AT) { return emu::ballot(mask, predicate, file, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMU_AT) { return emu::ballot(mask, predicate, file, line) == ~0u; }

#define EMU_REDUCE(name, type, expression)                                               \
    inline type name(unsigned mask, type value, EMU_AT) {                                \
        return emu::reduce(                                                              \
            mask, value, [](type a, type b) -> type { return expression; }, file, line); \
    }
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_add_sync, int, (int)((unsigned)a + (unsigned)b))
EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, a &b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMU_REDUCE

// ---------------------------------------------------------------------------------------------------------------------
// Atomics: integers of 4 and 8 bytes, whose sum does not depend on the order

namespace emu {
enum AtomicOperation { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareAndSwap };
uint64_t atomic(AtomicOperation operation, void *address, int bytes, bool is_signed, uint64_t value, uint64_t compare);

template <class T>
T atomic(AtomicOperation operation, T *address, T value, T compare = 0) {
    static_assert(std::is_integral_v<T> && sizeof(T) >= 4,
                  "no atomics on floating point: their sum depends on the order");
    return (T)atomic(operation, (void *)address, sizeof(T), std::is_signed_v<T>, (uint64_t)value, (uint64_t)compare);
}
template <class T>
using Same = std::common_type_t<T>;  // takes no part in deducing T, so that atomicAdd(&an_unsigned, 1) works
}  // namespace emu

// clang-format off
template <class T> T atomicAdd(T *p, emu::Same<T> v) { return emu::atomic(emu::kAdd, p, v); }
template <class T> T atomicSub(T *p, emu::Same<T> v) { return emu::atomic(emu::kAdd, p, (T)(0 - v)); }
template <class T> T atomicMin(T *p, emu::Same<T> v) { return emu::atomic(emu::kMin, p, v); }
template <class T> T atomicMax(T *p, emu::Same<T> v) { return emu::atomic(emu::kMax, p, v); }
template <class T> T atomicAnd(T *p, emu::Same<T> v) { return emu::atomic(emu::kAnd, p, v); }
template <class T> T atomicOr(T *p, emu::Same<T> v) { return emu::atomic(emu::kOr, p, v); }
template <class T> T atomicXor(T *p, emu::Same<T> v) { return emu::atomic(emu::kXor, p, v); }
template <class T> T atomicExch(T *p, emu::Same<T> v) { return emu::atomic(emu::kExchange, p, v); }
template <class T> T atomicCAS(T *p, emu::Same<T> compare, emu::Same<T> v) { return emu::atomic(emu::kCompareAndSwap, p, v, compare); }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic. Intrinsics that trade digits for speed are exact here: tests leave them room.

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline void sincospif(float x, float *s, float *c) { *s = (float)sin(M_PI * (double)x), *c = (float)cos(M_PI * (double)x); }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __int_as_float(int x) { return emu::from<float>((uint32_t)x); }
inline float __uint_as_float(unsigned x) { return emu::from<float>(x); }
inline int __float_as_int(float x) { return (int)emu::bits(x); }
inline unsigned __float_as_uint(float x) { return (unsigned)emu::bits(x); }
inline double __longlong_as_double(long long x) { return emu::from<double>((uint64_t)x); }
inline long long __double_as_longlong(double x) { return (long long)emu::bits(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((uint64_t)x * y >> 32); }
inline int __mulhi(int x, int y) { return (int)((int64_t)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) { return (unsigned long long)((unsigned __int128)x * y >> 64); }
inline unsigned __brev(unsigned x) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return r; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(((uint64_t)y << 32 | x) >> (s >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}

// min and max of one type, and of the mixed ones that CUDA resolves.
#define EMU_MIN_MAX(type, a, b) \
    inline type min(a x, b y) { return (type)x < (type)y ? (type)x : (type)y; } \
    inline type max(a x, b y) { return (type)x > (type)y ? (type)x : (type)y; }
EMU_MIN_MAX(int, int, int) EMU_MIN_MAX(unsigned, unsigned, unsigned) EMU_MIN_MAX(unsigned, int, unsigned) EMU_MIN_MAX(unsigned, unsigned, int)
EMU_MIN_MAX(long, long, long) EMU_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMU_MIN_MAX(long long, long long, long long) EMU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMU_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

// Loads and stores with a hint for the caches.
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldca(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stcg(T *p, T v) { *p = v; }
template <class T> void __stwb(T *p, T v) { *p = v; }

// Half precision that the headers give to nvcc alone: one rounding at the end. Double holds the product and the sum.
inline __nv_bfloat16 __hfma(__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) { return __double2bfloat16((double)(float)x * (float)y + (float)z); }
inline __half __hfma(__half x, __half y, __half z) { return __double2half((double)(float)x * (float)y + (float)z); }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 x, __nv_bfloat162 y, __nv_bfloat162 z) { return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)}; }
inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) { return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)}; }
// clang-format on

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores and asynchronous copies: the twins of what is in program/ptx.h, same names, same order of operands.

namespace emu {
enum MatrixType { kBf16, kF16, kTf32 };
void mma(MatrixType type, float *d, const uint32_t *a, const uint32_t *b, const float *c, const char *file, int line);
void ldmatrix(int count, bool transposed, uint32_t *d, const void *row, const char *file, int line);
void cp_async(void *shared, const void *global, int bytes);
void cp_async_commit();
void cp_async_wait(int pending_groups);  // -1: all copies, also those of no group
}  // namespace emu

// d = a b + c in fp32; a is 16x16 and b 16x8, bf16 or fp16, or a 16x8 and b 8x8 in tf32, whose low 13 bits do not
// count.
__forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                              EMU_AT) {
    emu::mma(emu::kBf16, d, a, b, c, file, line);
}
__forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                             EMU_AT) {
    emu::mma(emu::kF16, d, a, b, c, file, line);
}
__forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                              EMU_AT) {
    emu::mma(emu::kTf32, d, a, b, c, file, line);
}
inline uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000) & ~0x1fffu; }  // cvt.rna: halves away from zero

// Lane i brings the address of row i % 8 of matrix i / 8: 8 numbers of 2 bytes in shared memory, on a multiple of 16.
__forceinline__ void ldmatrix_x1(uint32_t (&d)[1], const void *row, EMU_AT) {
    emu::ldmatrix(1, false, d, row, file, line);
}
__forceinline__ void ldmatrix_x2(uint32_t (&d)[2], const void *row, EMU_AT) {
    emu::ldmatrix(2, false, d, row, file, line);
}
__forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void *row, EMU_AT) {
    emu::ldmatrix(4, false, d, row, file, line);
}
__forceinline__ void ldmatrix_x1_trans(uint32_t (&d)[1], const void *row, EMU_AT) {
    emu::ldmatrix(1, true, d, row, file, line);
}
__forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], const void *row, EMU_AT) {
    emu::ldmatrix(2, true, d, row, file, line);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], const void *row, EMU_AT) {
    emu::ldmatrix(4, true, d, row, file, line);
}

// 16 bytes from global to shared memory behind the thread's back: the first `bytes` of them (0..16), then zeros.
__forceinline__ void cp_async_16(void *shared, const void *global, int bytes = 16) {
    emu::cp_async(shared, global, bytes);
}
__forceinline__ void cp_async_commit() { emu::cp_async_commit(); }
template <int pending_groups>
__forceinline__ void cp_async_wait() {
    emu::cp_async_wait(pending_groups);
}
__forceinline__ void cp_async_wait_all() { emu::cp_async_wait(-1); }

// ---------------------------------------------------------------------------------------------------------------------
// Shared by emu.cpp, check.cpp, count.cpp and cublaslt.cpp

namespace emu {
// Addresses. Device memory, with shared memory at its start, and pinned host memory each have a part of the address
// space of their own, so that one comparison tells what a pointer points to. No address is given out twice.
constexpr uintptr_t kDevice = 0x100000000000, kPinned = 0x180000000000, kSpace = (uintptr_t)1 << 38;
constexpr uintptr_t kSharedEnd = kDevice + 0x400000;
inline bool is_device(const void *p) { return (uintptr_t)p - kDevice < kSpace; }
inline bool is_shared(const void *p) { return (uintptr_t)p - kDevice < kSharedEnd - kDevice; }
inline bool is_pinned(const void *p) { return (uintptr_t)p - kPinned < kSpace; }

// Time goes on by one with every barrier and every __syncwarp of the running block and at the start of every block and
// every operation of a stream: two accesses of which the earlier is older than the last one of these that both took
// part in are ordered.
struct State {
    uint32_t now, operation_start, block_start, barrier_time, warp_time[32];
    int thread;                  // of the block, 0..1023; 0 in a copy or a matmul
    uintptr_t stack, stack_end;  // of this thread; both 0 outside of kernels
    bool concurrent;             // operations that this one has not waited for have run already
    uintptr_t pc;                // where a copy or a matmul was called
};
extern __thread State *running;             // null in host code
bool waited_for(uint32_t time, bool host);  // did the running operation (or the host) wait for the one of that time?
uintptr_t pending_copy(uintptr_t address, size_t bytes, bool write);  // 0, or where the copy was called

[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
std::string source(uintptr_t pc, const void *frame = nullptr);  // "file:line" of code, the first that is no header
std::string describe(const void *address);  // "shared variable x + 4 bytes", "512 bytes allocated at ..."

// Queues what a library does; require_memory fails if [p, p + bytes) is not one living allocation.
void enqueue(cudaStream_t stream, uintptr_t pc, const std::function<void()> &run);
void require_memory(const void *p, size_t bytes, uintptr_t pc);

enum Access { kRead, kWrite, kAtomic, kReadUnchecked, kIssueCopy };
// Present only where check.cpp is linked.
#define EMU_WEAK __attribute__((weak))
void check_access(const void *address, size_t bytes, Access access, uintptr_t pc) EMU_WEAK;
void check_copied(void *target, const void *source, size_t bytes) EMU_WEAK;  // what is uninitialised stays it
// [begin, end) is memory whose part [p, p + bytes) may be used and holds nothing yet.
void check_memory(const void *begin, const void *p, size_t bytes, const void *end) EMU_WEAK;
void check_freed(const void *begin, const void *end) EMU_WEAK;

// Present only where count.cpp is linked: what the kernels did since the last call.
struct Counts {
    uint64_t read, written;          // bytes of global memory, each sector of 32 once a launch
    uint64_t moved, lines;           // bytes in sectors, and lines of 128 bytes, added up over the warps' instructions
    uint64_t wavefronts, conflicts;  // passes through shared memory; how many less there would be without conflicts
    uint64_t waits[7];               // of threads, by Kind
    uint64_t steps;                  // accesses and waits of the thread that has most of them
};
Counts take_counts() EMU_WEAK;
extern unsigned long launches;     // of kernels, and products of cuBLASLt, that the program has asked for
extern unsigned long host_waited;  // times, for something that was not done yet
void count_wait(Kind kind) EMU_WEAK;

inline void touch(const void *address, size_t bytes, Access access, uintptr_t pc) {
    if (check_access && bytes) check_access(address, bytes, access, pc);
}
}  // namespace emu

#endif
