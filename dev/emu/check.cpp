// check.cpp: watches every access that a .cu file makes. The .cu is compiled with -fsanitize=thread, which puts a call
// in front of each access to memory; the functions called are not ThreadSanitizer's but these. For every 4 bytes of
// device and shared memory a cell remembers the last writer and the last readers, when that was, where in the program,
// and which bytes hold anything. Found: races within a warp, between warps, between blocks and between streams,
// uninitialised reads, accesses out of bounds, device code in host memory, host code in device memory or in a copy that
// is under way.
#include "emu.h"

#include <sys/mman.h>
#include <algorithm>

namespace emu {

// Who accessed: a thread 0..1023, or if several did that were not ordered, their warp, or kSeveral.
constexpr uint16_t kWarp = 0x8000, kSeveral = 0xFFFF;

struct Trace {
    uint32_t time, pc;  // programs are linked below 4 GB
    uint16_t who;
    uint8_t bytes;        // of the cell, a bit each
    bool by_blocks : 1;   // by more than one block of the operation
    bool by_streams : 1;  // also by an operation of another stream, to which `pc` belongs
};
struct Cell {  // all zero: nothing written, nobody there
    Trace write, read;
    uint8_t initialised;  // a bit for each byte
    bool outside, split, atomic, awaits_copy;
};

// Cells of 4 bytes. One in which a smaller access was seen is split: then the two cells of 2 bytes count instead.
constexpr uintptr_t kWhole = 0x200000000000, kHalves = 0x400000000000;
static Cell *whole(uintptr_t address) { return (Cell *)kWhole + (address - kDevice) / 4; }
static Cell *half(uintptr_t address) { return (Cell *)kHalves + (address - kDevice) / 2; }

__attribute__((constructor(101))) static void reserve() {
    for (uintptr_t base : {kWhole, kHalves}) {
        size_t bytes = kSpace / (base == kWhole ? 4 : 2) * sizeof(Cell);
        if (mmap((void *)base, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                 -1, 0) == MAP_FAILED) {
            fail("%zu bytes of address space cannot be had", bytes);
        }
    }
}

static bool ordered(const Trace &t, bool shared) {
    const State &s = *running;
    if (t.time < s.operation_start) return !s.concurrent || waited_for(t.time, false);
    if (!shared && (t.by_streams || t.by_blocks || t.time < s.block_start)) return false;
    if (t.time < s.barrier_time || t.who == s.thread) return true;
    int warp = s.thread >> 5;
    bool same_warp = t.who < kWarp ? t.who >> 5 == warp : t.who == (kWarp | warp);
    return same_warp && t.time < s.warp_time[warp];
}

[[noreturn]] static void race(const Trace &t, bool write, uintptr_t address, Access access, uintptr_t pc,
                              const void *frame) {
    const State &s = *running;
    const char *scope = "between warps", *remedy = "no __syncthreads";
    if (t.by_streams || t.time < s.operation_start)
        scope = "between streams", remedy = "no event";
    else if (!is_shared((void *)address) && (t.by_blocks || t.time < s.block_start))
        scope = "between blocks", remedy = "no order";
    else if (t.who < kWarp ? t.who >> 5 == s.thread >> 5 : t.who == (kWarp | s.thread >> 5))
        scope = "within a warp", remedy = "no __syncwarp";
    std::string who = t.who < kWarp ? "thread " + std::to_string(t.who) : "several threads", here = source(pc, frame);
    fail("race %s: %s at %s and earlier %s at %s by %s with %s between; %s", scope,
         access == kRead || access == kReadUnchecked ? "read"
         : access == kAtomic                         ? "atomic"
                                                     : "write",
         here.c_str(), write ? "write" : "read", source(t.pc).c_str(), who.c_str(), remedy,
         describe((void *)address).c_str());
}

// Notes an access beside those that were not ordered before it.
static void note(Trace &t, uint8_t bytes, uint32_t pc, bool shared) {
    const State &s = *running;
    bool by_blocks = false, by_streams = false;
    uint16_t who = (uint16_t)s.thread;
    if (t.time && !ordered(t, shared)) {
        by_streams = t.by_streams || t.time < s.operation_start;
        by_blocks = t.time >= s.operation_start && (t.by_blocks || t.time < s.block_start);
        bool same_warp = t.who < kWarp ? t.who >> 5 == who >> 5 : t.who == (kWarp | who >> 5);
        who = same_warp ? (uint16_t)(kWarp | who >> 5) : kSeveral;
        bytes |= t.bytes;
        if (by_streams) pc = t.pc;
    }
    t = {s.now, pc, who, bytes, by_blocks, by_streams};
}

// `bytes` of the cell at `address`, a bit each.
static inline void visit(Cell &cell, uint8_t bytes, uintptr_t address, Access access, uintptr_t pc, const void *frame) {
    bool shared = is_shared((void *)address), reads = access == kRead || access == kReadUnchecked;
    if (cell.outside)
        fail("out of bounds: %s at %s; %s", reads ? "read" : "write", source(pc, frame).c_str(),
             describe((void *)address).c_str());
    // Bytes of one cell that several threads hold side by side cannot be told apart afterwards: no report then.
    auto clash = [&](const Trace &t) {
        return t.time && (t.bytes & bytes) &&
               !(bytes == 1 || bytes == 2 ? t.bytes != bytes && t.who >= kWarp : false) && !ordered(t, shared);
    };
    if (!(access == kAtomic && cell.atomic) && clash(cell.write)) race(cell.write, true, address, access, pc, frame);
    if ((access == kRead || access == kAtomic) && (cell.initialised & bytes) != bytes) {
        if (cell.awaits_copy)
            fail("read at %s before the wait for cp.async; %s", source(pc, frame).c_str(),
                 describe((void *)address).c_str());
        fail("uninitialised read at %s; %s", source(pc, frame).c_str(), describe((void *)address).c_str());
    }
    if (reads) return note(cell.read, bytes, (uint32_t)pc, shared);
    if (clash(cell.read)) race(cell.read, false, address, access, pc, frame);
    note(cell.write, bytes, (uint32_t)pc, shared);
    cell.atomic = access == kAtomic;
    cell.awaits_copy = access == kIssueCopy;
    if (cell.awaits_copy)
        cell.initialised &= (uint8_t)~bytes;
    else
        cell.initialised |= bytes;
}

static void split(uintptr_t address) {
    Cell &cell = *whole(address);
    cell.split = true;
    for (int h = 0; h < 2; h++) {
        Cell &part = *half(address + 2 * (unsigned)h);
        part = cell;
        part.split = false;
        part.initialised = cell.initialised >> 2 * h & 3;
        part.write.bytes = cell.write.bytes >> 2 * h & 3;
        part.read.bytes = cell.read.bytes >> 2 * h & 3;
    }
}

static void device_access(uintptr_t address, size_t bytes, Access access, uintptr_t pc, const void *frame) {
    while (bytes) {
        Cell &cell = *whole(address);
        if (address % 4 == 0 && bytes >= 4 && !cell.split) {
            visit(cell, 0xF, address, access, pc, frame);
            address += 4;
            bytes -= 4;
            continue;
        }
        if (!cell.split) split(address & ~(uintptr_t)3);
        size_t step = std::min(bytes, 2 - address % 2);
        visit(*half(address), (uint8_t)(step == 2 ? 3 : 1 << address % 2), address, access, pc, frame);
        address += step;
        bytes -= step;
    }
}

void check_access(const void *p, size_t bytes, Access access, uintptr_t pc) {
    if (is_device(p)) device_access((uintptr_t)p, bytes, access, pc, __builtin_frame_address(0));
}

void check_copied(void *target, const void *from, size_t bytes) {
    auto initialised = [](uintptr_t a) {
        return whole(a)->split ? half(a)->initialised >> a % 2 & 1 : whole(a)->initialised >> a % 4 & 1;
    };
    for (size_t i = 0; i < bytes; i++) {
        uintptr_t a = (uintptr_t)target + i;
        if (initialised((uintptr_t)from + i)) continue;
        if (!whole(a)->split) split(a & ~(uintptr_t)3);
        half(a)->initialised &= (uint8_t) ~(1 << a % 2);
    }
}

void check_memory(const void *begin, const void *p, size_t bytes, const void *end) {
    memset((void *)whole((uintptr_t)p), 0, (bytes + 3) / 4 * sizeof(Cell));
    for (uintptr_t a = (uintptr_t)begin; a < (uintptr_t)end; a += 4) {
        if (a + 4 > (uintptr_t)p && a < (uintptr_t)p + bytes) {
            if (a + 4 <= (uintptr_t)p + bytes) {
                a = ((uintptr_t)p + bytes) / 4 * 4 - 4;  // on to the last whole cell
                continue;
            }
            split(a);
            for (uintptr_t h = a; h < a + 4; h += 2) half(h)->outside = h >= (uintptr_t)p + bytes;
        } else {
            *whole(a) = Cell();
            whole(a)->outside = true;
        }
    }
}

void check_freed(const void *begin, const void *end) {  // the pages themselves cannot be touched any more
    madvise(whole((uintptr_t)begin), (char *)whole((uintptr_t)end) - (char *)whole((uintptr_t)begin), MADV_DONTNEED);
    madvise(half((uintptr_t)begin), (char *)half((uintptr_t)end) - (char *)half((uintptr_t)begin), MADV_DONTNEED);
}

extern "C" char __executable_start, end;  // of the program: code, constants, __device__ and __constant__ variables

static inline void access(const void *p, size_t bytes, bool write, uintptr_t pc, const void *frame) {
    uintptr_t address = (uintptr_t)p;
    if (!running) {  // host code, in any of its threads
        if (is_device(p))
            fail("host code %s device memory at %s; %s", write ? "writes" : "reads", source(pc, frame).c_str(),
                 describe(p).c_str());
        if (is_pinned(p)) {
            if (uintptr_t call = pending_copy(address, bytes, write)) {
                fail("host code %s memory at %s while the copy called at %s is under way; %s",
                     write ? "writes" : "reads", source(pc, frame).c_str(), source(call).c_str(), describe(p).c_str());
            }
        }
        return;
    }
    if (is_device(p)) return device_access(address, bytes, write ? kWrite : kRead, pc, frame);
    if (address - running->stack < running->stack_end - running->stack) return;
    if (address >= (uintptr_t)&__executable_start && address < (uintptr_t)&end) return;
    if (!running->stack) return;
    fail("a kernel %s host memory, or another thread's local memory, at %s; address %p", write ? "writes" : "reads",
         source(pc, frame).c_str(), p);
}
}  // namespace emu

using emu::access;
#define HERE (uintptr_t) __builtin_return_address(0), __builtin_frame_address(0)

extern "C" {
#define SIZE(n)                                                           \
    void __tsan_read##n(void *p) { access(p, n, false, HERE); }           \
    void __tsan_write##n(void *p) { access(p, n, true, HERE); }           \
    void __tsan_unaligned_read##n(void *p) { access(p, n, false, HERE); } \
    void __tsan_unaligned_write##n(void *p) { access(p, n, true, HERE); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16) void __tsan_read_range(void *p, size_t bytes) {
    access(p, bytes, false, HERE);
}
void __tsan_write_range(void *p, size_t bytes) { access(p, bytes, true, HERE); }
void __tsan_vptr_read(void *p) { access(p, 8, false, HERE); }
void __tsan_vptr_update(void *p, void *) { access(p, 8, true, HERE); }
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// Calls of these three in the .cu are renamed to come here: the compiler puts no calls in front of what they access.
void *emu_memcpy(void *to, const void *from, size_t bytes) {
    if (bytes) access(from, bytes, false, HERE), access(to, bytes, true, HERE);
    return memcpy(to, from, bytes);
}
void *emu_memmove(void *to, const void *from, size_t bytes) {
    if (bytes) access(from, bytes, false, HERE), access(to, bytes, true, HERE);
    return memmove(to, from, bytes);
}
void *emu_memset(void *to, int value, size_t bytes) {
    if (bytes) access(to, bytes, true, HERE);
    return memset(to, value, bytes);
}
}
