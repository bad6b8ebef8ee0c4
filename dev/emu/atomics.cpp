// atomics.cpp: -fsanitize=thread makes calls of the host's own atomics (OpenMP, tasks, reference counts) too. They only
// have to work, whether check.cpp or count.cpp has the kernels' accesses.
#include <cstdint>

extern "C" {
#define ATOMIC(bits, type)                                                                                        \
    type __tsan_atomic##bits##_load(const volatile type *p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
    void __tsan_atomic##bits##_store(volatile type *p, type v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
    type __tsan_atomic##bits##_exchange(volatile type *p, type v, int) {                                          \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                       \
    }                                                                                                             \
    type __tsan_atomic##bits##_fetch_add(volatile type *p, type v, int) {                                         \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                        \
    }                                                                                                             \
    type __tsan_atomic##bits##_fetch_sub(volatile type *p, type v, int) {                                         \
        return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                        \
    }                                                                                                             \
    type __tsan_atomic##bits##_fetch_and(volatile type *p, type v, int) {                                         \
        return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                                        \
    }                                                                                                             \
    type __tsan_atomic##bits##_fetch_or(volatile type *p, type v, int) {                                          \
        return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                         \
    }                                                                                                             \
    type __tsan_atomic##bits##_fetch_xor(volatile type *p, type v, int) {                                         \
        return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST);                                                        \
    }                                                                                                             \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile type *p, type *c, type v, int, int) {              \
        return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                   \
    }                                                                                                             \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile type *p, type *c, type v, int, int) {                \
        return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                   \
    }
ATOMIC(8, uint8_t) ATOMIC(16, uint16_t) ATOMIC(32, uint32_t) ATOMIC(64, uint64_t) void __tsan_atomic_thread_fence(int) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
void __tsan_atomic_signal_fence(int) {}
}
