// atomics.cpp: -fsanitize=thread makes calls of the host's own atomics (OpenMP, tasks, reference counts) too. They only
// have to work, whether check.cpp or count.cpp has the kernels' accesses.
#include <cstdint>

extern "C" {
#define UPDATE(bits, type, name, builtin)                              \
    type __tsan_atomic##bits##_##name(volatile type *p, type v, int) { \
        return __atomic_##builtin(p, v, __ATOMIC_SEQ_CST);             \
    }
#define COMPARE(bits, type, name)                                                               \
    int __tsan_atomic##bits##_##name(volatile type *p, type *c, type v, int, int) {             \
        return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }
#define ATOMIC(bits, type)                                                                                        \
    type __tsan_atomic##bits##_load(const volatile type *p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
    void __tsan_atomic##bits##_store(volatile type *p, type v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
    UPDATE(bits, type, exchange, exchange_n)                                                                      \
    UPDATE(bits, type, fetch_add, fetch_add)                                                                      \
    UPDATE(bits, type, fetch_sub, fetch_sub)                                                                      \
    UPDATE(bits, type, fetch_and, fetch_and)                                                                      \
    UPDATE(bits, type, fetch_or, fetch_or)                                                                        \
    UPDATE(bits, type, fetch_xor, fetch_xor)                                                                      \
    COMPARE(bits, type, compare_exchange_strong)                                                                  \
    COMPARE(bits, type, compare_exchange_weak)
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
}
