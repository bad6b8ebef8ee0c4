// ptx.h: the instructions of an NVIDIA GPU that CUDA C++ has no functions for: matrix products of a warp, loads of
// their operands, asynchronous copies. dev/emu/emu.h has a twin of each, with the same name and operands, which stands
// in where there is no GPU. Layouts are those of the PTX manual.
#ifndef DETR_PTX_H
#define DETR_PTX_H
#ifndef CUDA_EMU

#include <stdint.h>

__device__ static inline unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// d = a b + c: a is 16 x 16, b 16 x 8, c and d 16 x 8 floats. Lane l has of c and d the elements (l / 4, 2 (l % 4)) and
// the next, and the same 8 rows further down; of a those of its left half, then those of its right half, as pairs; of b
// (2 (l % 4), l / 4) and the one below, and the same 8 rows further down. In tf32, a is 16 x 8 and b 8 x 8: (l / 4,
// l % 4), the same 8 rows further down, then both 4 columns further right; of b (l % 4, l / 4) and 4 rows further down.
#define MMA(name, shape)                                                                                       \
    __device__ static inline void name(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2],             \
                                       const float(&c)[4]) {                                                   \
        asm volatile("mma.sync.aligned." shape " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"    \
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), \
                       "f"(c[2]), "f"(c[3]));                                                                  \
    }
MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")

__device__ static inline uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// One, two or four matrices of 8 x 8 numbers of 16 bits: lane l has the address of row l % 8 of matrix l / 8 and
// receives of each the elements (l / 4, 2 (l % 4)) and the next; with _trans, of each matrix transposed.
#define LDMATRIX(suffix, trans)                                                               \
    __device__ static inline void ldmatrix_x1##suffix(uint32_t(&d)[1], const void *row) {     \
        asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];"          \
                     : "=r"(d[0])                                                             \
                     : "r"(shared_address(row))                                               \
                     : "memory");                                                             \
    }                                                                                         \
    __device__ static inline void ldmatrix_x2##suffix(uint32_t(&d)[2], const void *row) {     \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0,%1}, [%2];"       \
                     : "=r"(d[0]), "=r"(d[1])                                                 \
                     : "r"(shared_address(row))                                               \
                     : "memory");                                                             \
    }                                                                                         \
    __device__ static inline void ldmatrix_x4##suffix(uint32_t(&d)[4], const void *row) {     \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                         \
                     : "r"(shared_address(row))                                               \
                     : "memory");                                                             \
    }
LDMATRIX(, "")
LDMATRIX(_trans, ".trans")
#undef MMA
#undef LDMATRIX

// 16 bytes from global to shared memory behind the thread's back: the first `bytes` of them, then zeros.
__device__ static inline void cp_async_16(void *shared, const void *global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
__device__ static inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending_groups>
__device__ static inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending_groups) : "memory");
}
__device__ static inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif
#endif
