// emu.cpp: the machine that runs a .cu file on a CPU. Every CUDA thread of a block is a fiber with a stack of its own;
// one fiber runs until it waits (barrier, warp operation) or ends, then another one that can is drawn at random. Blocks
// run one after the other in random order. Streams are queues; nothing in them runs before the host waits for
// something, and then in a random order that streams and events allow. EMU_SEED in the environment chooses all of this.
//
// Everything that a kernel or the host does wrong ends the process with a message that begins with "emu: " and names
// the place in the source. The rooms: reports, memory, fibers, barriers and warps, shared memory, asynchronous copies,
// tensor cores, streams, the runtime's functions.
#include "emu.h"

#include <execinfo.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <algorithm>
#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace emu {

static uint64_t random_state = [] {
    const char *seed = getenv("EMU_SEED");
    return seed ? strtoull(seed, nullptr, 10) : 0;
}();
static unsigned long long first_seed = random_state;
void reseed(uint64_t seed) { first_seed = random_state = seed; }

static uint32_t draw(uint32_t below) {  // splitmix64
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (uint32_t)((z >> 32) * below >> 32);
}

// ---------------------------------------------------------------------------------------------------------------------
// What everything below knows about the thread that runs

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 256 * 1024;

struct AsyncCopy {
    char *to;
    const char *from;
    int bytes, group;
    bool early;
    uintptr_t pc;
    char data[16];
};

struct Thread {
    uint3 index;
    void *stack_pointer;
    enum { kReady, kWaits, kDone } state;
    Kind kind;         // of what it waits for
    const char *file;  // and where
    int line;
    int copies, group;  // asynchronous ones: how many are under way, number of the open group
    AsyncCopy copy[64];
};

struct Warp {
    int arrived;
    Kind kind;
    const char *file;
    int line;
    uint64_t brought[32], result[32];
};

struct Kernel {  // the one that runs
    Config config{1, 1};
    const void *function;
    const char *name, *file;
    int line;
    void (*call)(const void *, const void *);
    int threads;
};

__thread State *running;
static State state;
static Kernel kernel;
static Thread threads[kMaxThreads];
static Warp warps[kMaxThreads / 32];
static uint3 block;
alignas(16) static char parameters[4096];
static char *stacks;

const uint3 &thread_index() { return threads[state.thread].index; }
const uint3 &block_index() { return block; }
const dim3 &block_dim() { return kernel.config.block; }
const dim3 &grid_dim() { return kernel.config.grid; }
int lane() { return state.thread & 31; }
static bool in_kernel() { return running && running->stack; }

// ---------------------------------------------------------------------------------------------------------------------
// Reports

// addr2line gives a line for each function that was inlined at pc, innermost first. Headers are passed over, and then
// the functions above on the stack, so that a report names the line of the .cu.
std::string source(uintptr_t pc, const void *frame) {
    std::string first;
    for (int depth = 0; depth < 16 && pc; depth++) {
        char command[256], line[1024], directory[1024];
        snprintf(command, sizeof command, "addr2line -i -e /proc/%d/exe 0x%lx 2>/dev/null", (int)getpid(),
                 (long)pc - 1);
        FILE *pipe = popen(command, "r");
        std::string found;
        size_t prefix = getcwd(directory, sizeof directory) ? strlen(directory) : 0;
        while (pipe && fgets(line, sizeof line, pipe)) {
            line[strcspn(line, " \n")] = 0;
            std::string place = line;
            if (prefix && place.compare(0, prefix, directory) == 0) place = place.substr(prefix + 1);
            if (first.empty() && place[0] != '?') first = place;
            bool header = place.find("/include/") != place.npos || place.find("emu/emu.") != place.npos ||
                          place.find("emu/check.cpp") != place.npos;
            if (found.empty() && !header && place[0] != '?') found = place;
        }
        if (pipe) pclose(pipe);
        if (!found.empty()) return found;
        if (!frame || (uintptr_t)frame % 8) break;
        pc = ((const uintptr_t *)frame)[1];
        const void *next = *(const void *const *)frame;
        frame = next > frame ? next : nullptr;
    }
    return first.empty() ? "unknown place" : first;
}

static std::string place(const char *file, int line) { return std::string(file) + ":" + std::to_string(line); }

static std::string coordinates(const uint3 &i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

[[noreturn]] void fail(const char *format, ...) {
    bool kernel_runs = in_kernel();
    running = nullptr;
    va_list values;
    va_start(values, format);
    fflush(stdout);
    fprintf(stderr, "emu: ");
    vfprintf(stderr, format, values);
    if (kernel_runs) {
        fprintf(stderr, "\n     in %s launched at %s:%d, block %s, thread %s", kernel.name, kernel.file, kernel.line,
                coordinates(block).c_str(), coordinates(threads[state.thread].index).c_str());
    }
    fprintf(stderr, "; EMU_SEED=%llu\n", first_seed);
    abort();
}

// The place that a function of the runtime was called from.
#define CALLER ((uintptr_t)__builtin_return_address(0))

// ---------------------------------------------------------------------------------------------------------------------
// Memory. An allocation ends, but for less than 256 bytes, at a page that nobody may touch; addresses are never used
// again, so that a pointer into freed memory stays wrong. Everything begins as 0xFF: NaN in every format, -1 in
// integers.

struct Allocation {
    char *p, *begin, *end;  // begin and end: its pages
    size_t bytes;
    uintptr_t pc;
    bool freed;
};
static std::map<uintptr_t, Allocation> allocations;  // by `end`
static constexpr size_t kPage = 4096;
static uintptr_t next_address[2];

static void *map(uintptr_t address, size_t bytes, int protection) {
    void *p = mmap((void *)address, bytes, protection,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address ? MAP_FIXED : 0), -1, 0);
    if (p == MAP_FAILED) fail("%zu bytes of address space cannot be had", bytes);
    return p;
}

static Allocation *find(const void *address) {
    auto i = allocations.upper_bound((uintptr_t)address);
    if (i != allocations.end() && (const char *)address >= i->second.begin - kPage) return &i->second;
    if (i == allocations.begin()) return nullptr;  // up to a page behind its end an address belongs to the one before
    --i;
    return (const char *)address < i->second.end + kPage ? &i->second : nullptr;
}

static void *allocate(bool pinned, size_t bytes, uintptr_t pc) {
    size_t rounded = (bytes + 255) / 256 * 256, pages = (rounded + kPage - 1) / kPage * kPage;
    uintptr_t begin = next_address[pinned];
    next_address[pinned] += pages + 2 * kPage;
    if (next_address[pinned] - (pinned ? kPinned : kDevice) > kSpace) fail("the address space for memory is used up");
    map(begin, pages, PROT_READ | PROT_WRITE);
    Allocation a = {(char *)begin + pages - rounded, (char *)begin, (char *)begin + pages, bytes, pc, false};
    memset(a.begin, 0xFF, pages);
    if (check_memory && !pinned) check_memory(a.begin, a.p, bytes, a.end);
    allocations[(uintptr_t)a.end] = a;
    return a.p;
}

static void release(void *p, uintptr_t pc) {
    if (!p) return;
    Allocation *a = find(p);
    if (!a || a->p != p) fail("%p is freed at %s, but was never allocated", p, source(pc).c_str());
    if (a->freed) fail("memory is freed twice, the second time at %s; %s", source(pc).c_str(), describe(p).c_str());
    a->freed = true;
    if (check_freed && is_device(p)) check_freed(a->begin, a->end);
    map((uintptr_t)a->begin, (size_t)(a->end - a->begin), PROT_NONE);
}

struct SharedVariable {
    const void *key;
    const char *name;
    char *p;
    size_t bytes;
};
static std::vector<SharedVariable> shared_variables;  // of the running kernel; [0] is the dynamic one

std::string describe(const void *address) {
    const char *p = (const char *)address;
    char text[256];
    if (is_shared(address)) {
        const SharedVariable *nearest = nullptr;
        for (auto &v : shared_variables) {
            if (v.bytes && p >= v.p - 16 && (!nearest || v.p <= p)) nearest = &v;
        }
        if (!nearest) return "shared memory";
        snprintf(text, sizeof text, "shared %s (%zu bytes) at byte %ld", nearest->name, nearest->bytes,
                 (long)(p - nearest->p));
        return text;
    }
    if (Allocation *a = find(address)) {
        snprintf(text, sizeof text, "%zu bytes allocated at %s%s, at byte %ld", a->bytes, source(a->pc).c_str(),
                 a->freed ? " and freed since" : "", (long)(p - a->p));
        return text;
    }
    snprintf(text, sizeof text, "address %p", address);
    return text;
}

// What lies in [p, p + bytes) must be one allocation that is still there. Copies and the stand-in's matrices pass here.
void require_memory(const void *p, size_t bytes, uintptr_t pc) {
    Allocation *a = find(p);
    if (!bytes) return;
    if (!a || (const char *)p < a->p || (const char *)p + bytes > a->p + a->bytes) {
        fail("out of bounds: %zu bytes used by the call at %s; %s", bytes, source(pc).c_str(), describe(p).c_str());
    }
    if (a->freed) fail("use after free: the call at %s; %s", source(pc).c_str(), describe(p).c_str());
}

static void on_fault(int, siginfo_t *info, void *context) {
    uintptr_t pc = 0, frame = 0, address = (uintptr_t)info->si_addr;
#if defined(__x86_64__)
    pc = (uintptr_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    frame = (uintptr_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RBP];
#elif defined(__aarch64__)
    pc = ((ucontext_t *)context)->uc_mcontext.pc;
    frame = ((ucontext_t *)context)->uc_mcontext.regs[29];
#endif
    signal(SIGSEGV, SIG_DFL);
    std::string where = source(running && !in_kernel() ? running->pc : pc + 1, (void *)frame);
    if (is_device(info->si_addr) || is_pinned(info->si_addr)) {
        Allocation *a = find(info->si_addr);
        fail("%s at %s; %s", a && a->freed ? "use after free" : "out of bounds", where.c_str(),
             describe(info->si_addr).c_str());
    }
    if (address - (uintptr_t)stacks < kMaxThreads * kStack)
        fail("a thread's stack of %zu bytes is full at %s", kStack, where.c_str());
    fail("segmentation fault at %s: address %p", where.c_str(), info->si_addr);
}

// Misaligned accesses: -fsanitize=alignment calls this, with a place of its own. GPUs cannot do them, CPUs can.
struct AlignmentData {
    const char *file;
    uint32_t line, column;
    const void *type;
    unsigned char log_alignment;
};
}  // namespace emu

extern "C" void __ubsan_handle_type_mismatch_v1(emu::AlignmentData *data, uintptr_t p) {
    if (!emu::in_kernel()) return;
    emu::fail("misaligned access at %s: not on a multiple of %d bytes; %s",
              emu::source(CALLER, __builtin_frame_address(0)).c_str(), 1 << data->log_alignment,
              emu::describe((void *)p).c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

extern "C" void emu_switch(void **save, void *load);  // stack pointers
extern "C" void emu_thread_main();
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size emu_switch, .-emu_switch
.section .note.GNU-stack, "", @progbits
.text
)");
// What emu_switch expects: six registers, the address to return to, and one word so that the stack is aligned there.
static void *prepare_stack(char *end) {
    void **sp = (void **)end - 8;
    memset(sp, 0, 8 * sizeof *sp);
    sp[6] = (void *)emu_thread_main;
    return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
    stp x29, x30, [sp, -160]!
    stp x19, x20, [sp, 16]
    stp x21, x22, [sp, 32]
    stp x23, x24, [sp, 48]
    stp x25, x26, [sp, 64]
    stp x27, x28, [sp, 80]
    stp d8, d9, [sp, 96]
    stp d10, d11, [sp, 112]
    stp d12, d13, [sp, 128]
    stp d14, d15, [sp, 144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, 16]
    ldp x21, x22, [sp, 32]
    ldp x23, x24, [sp, 48]
    ldp x25, x26, [sp, 64]
    ldp x27, x28, [sp, 80]
    ldp d8, d9, [sp, 96]
    ldp d10, d11, [sp, 112]
    ldp d12, d13, [sp, 128]
    ldp d14, d15, [sp, 144]
    ldp x29, x30, [sp], 160
    ret
.size emu_switch, .-emu_switch
)");
static void *prepare_stack(char *end) {
    void **sp = (void **)end - 20;
    memset(sp, 0, 20 * sizeof *sp);
    sp[1] = (void *)emu_thread_main;
    return sp;
}
#else
#error "emu_switch: six lines of assembly are missing for this processor"
#endif

namespace emu {

static uint16_t ready[kMaxThreads];  // threads that can run
static int num_ready, num_alive;
static void *scheduler;  // the stack that the block was started from

[[noreturn]] static void report_deadlock();

static void run_next(void **save) {
    if (!num_ready) {
        if (num_alive) report_deadlock();
        emu_switch(save, scheduler);
        return;
    }
    uint32_t i = draw((uint32_t)num_ready);
    int thread = ready[i];
    ready[i] = ready[--num_ready];
    state.thread = thread;
    state.stack = (uintptr_t)stacks + (size_t)thread * kStack;
    state.stack_end = state.stack + kStack;
    if (save != &threads[thread].stack_pointer) emu_switch(save, threads[thread].stack_pointer);
}

static void wait(Kind kind, const char *file, int line) {
    Thread &t = threads[state.thread];
    t.state = Thread::kWaits;
    t.kind = kind;
    t.file = file;
    t.line = line;
    run_next(&t.stack_pointer);
}

static void wake(int thread) {
    threads[thread].state = Thread::kReady;
    ready[num_ready++] = (uint16_t)thread;
}

extern "C" void emu_thread_main() {
    kernel.call(kernel.function, parameters);
    cp_async_wait(-1);
    Thread &t = threads[state.thread];
    t.state = Thread::kDone;
    num_alive--;
    void *gone;
    run_next(&gone);
    __builtin_unreachable();
}

static const char *kind_name(Kind kind) {
    static const char *names[] = {"__syncthreads", "__syncwarp", "shuffle", "vote", "reduce", "mma", "ldmatrix"};
    return names[kind];
}

static std::string status(int thread) {
    Thread &t = threads[thread];
    if (t.state == Thread::kDone) return "left the kernel";
    if (t.state == Thread::kReady) return "can run";
    return std::string("waits in ") + kind_name(t.kind) + " at " + place(t.file, t.line);
}

[[noreturn]] static void report_deadlock() {
    std::string text;
    for (int first = 0, last; first < kernel.threads; first = last + 1) {
        last = first;
        while (last + 1 < kernel.threads && status(last + 1) == status(first)) last++;
        text += "\n     threads " + std::to_string(first) + " to " + std::to_string(last) + ": " + status(first);
    }
    fail("deadlock: every thread waits or has left%s", text.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and warp operations

static struct {
    int arrived, holds, result;
    const char *file;
    int line;
} block_barrier;

int barrier(bool predicate, const char *file, int line) {
    auto &b = block_barrier;
    if (count_wait) count_wait(kBarrier);
    if (b.arrived && (b.line != line || strcmp(b.file, file) != 0)) {
        fail("divergent __syncthreads: this thread at %s, others of its block at %s", place(file, line).c_str(),
             place(b.file, b.line).c_str());
    }
    b.file = file;
    b.line = line;
    b.holds += predicate;
    if (++b.arrived < kernel.threads) {
        wait(kBarrier, file, line);
        return b.result;
    }
    state.barrier_time = ++state.now;
    b.result = b.holds;
    b.arrived = b.holds = 0;
    int self = state.thread;
    for (int t = 0; t < kernel.threads; t++) {
        if (t != self) wake(t);
    }
    ready[num_ready++] = (uint16_t)self;  // the last one to come need not be the first to go on
    run_next(&threads[self].stack_pointer);
    return b.result;
}

const uint64_t *meet(Kind kind, unsigned mask, uint64_t mine, const char *file, int line,
                     void (*complete)(uint64_t *)) {
    int self = state.thread, first = self & ~31;
    Warp &w = warps[self / 32];
    if (count_wait) count_wait(kind);
    if (mask != ~0u) {
        fail("%s with mask 0x%08x at %s: lane %d is missing; only full masks are emulated", kind_name(kind), mask,
             place(file, line).c_str(), __builtin_ctz(~mask));
    }
    if (w.arrived && (w.kind != kind || w.line != line || strcmp(w.file, file) != 0)) {
        fail("divergent warp: lane %d comes to %s at %s, others wait in %s at %s", self & 31, kind_name(kind),
             place(file, line).c_str(), kind_name(w.kind), place(w.file, w.line).c_str());
    }
    w.kind = kind;
    w.file = file;
    w.line = line;
    w.brought[self & 31] = mine;
    if (++w.arrived < 32) {
        wait(kind, file, line);
        return w.result;
    }
    w.arrived = 0;
    if (kind == kSyncwarp) state.warp_time[self / 32] = ++state.now;  // only this one orders accesses to memory
    if (complete) complete(w.brought);
    memcpy(w.result, w.brought, sizeof w.result);  // a quick lane may bring its next before a slow one has read
    for (int t = first; t < first + 32; t++) {
        if (t != self) wake(t);
    }
    return w.result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Atomics

uint64_t atomic(AtomicOperation operation, void *address, int bytes, bool is_signed, uint64_t value, uint64_t compare) {
    if ((uintptr_t)address % (unsigned)bytes) {
        fail("misaligned atomic at %s; %s", source(CALLER, __builtin_frame_address(0)).c_str(),
             describe(address).c_str());
    }
    touch(address, (size_t)bytes, kAtomic, CALLER);
    uint64_t all = bytes == 8 ? ~0ull : 0xFFFFFFFF, old = bytes == 8 ? *(uint64_t *)address : *(uint32_t *)address,
             result = old;
    auto extended = [&](uint64_t x) { return is_signed && bytes == 4 ? (int64_t)(int32_t)x : (int64_t)x; };
    value &= all;
    bool less = is_signed ? extended(value) < extended(old) : value < old;
    switch (operation) {
        case kAdd:
            result = old + value;
            break;
        case kMin:
            result = less ? value : old;
            break;
        case kMax:
            result = less ? old : value;
            break;
        case kAnd:
            result = old & value;
            break;
        case kOr:
            result = old | value;
            break;
        case kXor:
            result = old ^ value;
            break;
        case kExchange:
            result = value;
            break;
        case kCompareAndSwap:
            result = old == (compare & all) ? value : old;
            break;
    }
    if (bytes == 8)
        *(uint64_t *)address = result;
    else
        *(uint32_t *)address = (uint32_t)result;
    return old;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory. Dynamic memory ends at a page that nobody may touch; variables have 16 bytes between them that are
// nobody's.

static char *const kVariables = (char *)kDevice + 0x100000, *const kDynamicEnd = (char *)kDevice + 0x200000;
static size_t static_bytes;
static std::map<const void *, int> shared_limits;

static const struct {
    int architecture, shared_per_block, multiprocessors;
} kGpus[] = {{80, 163 * 1024, 108}, {86, 99 * 1024, 84}, {89, 99 * 1024, 128}, {90, 227 * 1024, 132}};

static auto &gpu = []() -> auto & {
    const char *wanted = getenv("EMU_SM");
    for (auto &g : kGpus) {
        if (g.architecture == (wanted ? atoi(wanted) : 80)) return g;
    }
    fail("EMU_SM=%s: must be 80, 86, 89 or 90", wanted);
}
();

static void fresh_shared(const SharedVariable &v) {
    memset(v.p, 0xFF, v.bytes);
    if (check_memory) check_memory(v.p, v.p, v.bytes, v.p + v.bytes);
}

void *shared_variable(const void *key, size_t bytes, size_t alignment, const char *name) {
    for (auto &v : shared_variables) {
        if (v.key == key) return v.p;
    }
    alignment = std::max(alignment, (size_t)4);
    SharedVariable &last = shared_variables.back();
    char *from = shared_variables.size() == 1 ? kVariables : last.p + last.bytes + 16;
    SharedVariable v = {key, name, (char *)(((uintptr_t)from + alignment - 1) / alignment * alignment), bytes};
    static_bytes = (static_bytes + alignment - 1) / alignment * alignment + bytes;
    if (static_bytes > 48 * 1024)
        fail("too much shared memory: %s makes it %zu bytes, variables may have 49152", name, static_bytes);
    if (static_bytes + kernel.config.shared > (size_t)gpu.shared_per_block) {
        fail("too much shared memory: %zu bytes of variables and %zu dynamic ones, sm_%d has %d", static_bytes,
             kernel.config.shared, gpu.architecture, gpu.shared_per_block);
    }
    fresh_shared(v);
    shared_variables.push_back(v);
    return v.p;
}

void *dynamic_shared(size_t alignment) {
    if ((uintptr_t)shared_variables[0].p % alignment)
        fail("dynamic shared memory aligned to %zu: at most 128", alignment);
    return shared_variables[0].p;
}

cudaError_t set_shared_limit(const void *function, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
    if (value < 0 || value > gpu.shared_per_block) return cudaErrorInvalidValue;
    shared_limits[function] = value;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies. The GPU may read the source at any time before the wait: at once or at the last moment, by coin
// flip. The destination is poisoned until the wait, so that whoever reads it too early, or still, gets NaN.

void cp_async(void *to, const void *from, int bytes) {
    Thread &t = threads[state.thread];
    if (bytes < 0 || bytes > 16 || (uintptr_t)to % 16 || (uintptr_t)from % 16 || !is_shared(to)) {
        const void *wrong = (uintptr_t)to % 16 || !is_shared(to) ? to : from;
        fail(
            "cp.async at %s: %d bytes (0 to 16) from a multiple of 16 to a multiple of 16 in shared memory; misaligned "
            "or not shared: %s",
            source(CALLER, __builtin_frame_address(0)).c_str(), bytes, describe(wrong).c_str());
    }
    if (t.copies == 64) fail("a thread has 64 asynchronous copies under way at %s", source(CALLER).c_str());
    AsyncCopy &c = t.copy[t.copies++];
    c = {(char *)to, (const char *)from, bytes, t.group, draw(2) == 0, CALLER, {}};
    touch(from, (size_t)bytes, kRead, CALLER);
    touch(to, 16, kIssueCopy, CALLER);
    if (c.early) std::copy_n(c.from, bytes, c.data);
    std::fill_n(c.to, 16, (char)0xFF);
}

void cp_async_commit() { threads[state.thread].group++; }

void cp_async_wait(int pending_groups) {
    Thread &t = threads[state.thread];
    int kept = 0;
    for (int i = 0; i < t.copies; i++) {
        AsyncCopy &c = t.copy[i];
        if (pending_groups >= 0 && c.group >= t.group - pending_groups) {
            t.copy[kept++] = c;
            continue;
        }
        if (!c.early) {
            touch(c.from, (size_t)c.bytes, kRead, c.pc);
            std::copy_n(c.from, c.bytes, c.data);
        }
        touch(c.to, 16, kWrite, c.pc);
        std::copy_n(c.data, 16, c.to);
    }
    t.copies = kept;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores. Lane 4 g + t holds, in the tables of the PTX manual, rows g and g + 8 of a and of the sum, and column g
// of b. The last lane to come multiplies for all, straight from and into the other fibers' stacks.

struct Fragments {
    MatrixType type;
    float *d;
    const uint32_t *a, *b;
    const float *c;
};

static float half_of(MatrixType type, uint32_t pair, int high) {
    uint16_t bits = (uint16_t)(pair >> 16 * high);
    return type == kBf16 ? from<float>((uint64_t)bits << 16) : (float)from<__half>(bits);
}

static void multiply(uint64_t *lanes) {
    float a[16][16], b[16][8];
    MatrixType type = ((Fragments *)lanes[0])->type;
    int depth = type == kTf32 ? 8 : 16;
    for (int i = 0; i < 32; i++) {
        const Fragments &f = *(Fragments *)lanes[i];
        int g = i / 4, t = i % 4;
        for (int r = 0; r < 4; r++) {  // of a: odd ones lower, the last two further right
            int row = g + 8 * (r & 1);
            if (type == kTf32)
                a[row][t + 4 * (r >> 1)] = from<float>(f.a[r] & ~0x1fffu);
            else
                for (int h = 0; h < 2; h++) a[row][2 * t + h + 8 * (r >> 1)] = half_of(type, f.a[r], h);
        }
        for (int r = 0; r < 2; r++) {
            if (type == kTf32)
                b[t + 4 * r][g] = from<float>(f.b[r] & ~0x1fffu);
            else
                for (int h = 0; h < 2; h++) b[2 * t + h + 8 * r][g] = half_of(type, f.b[r], h);
        }
    }
    float sums[16][8] = {};
    for (int row = 0; row < 16; row++) {
        for (int k = 0; k < depth; k++) {
            for (int column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int i = 0; i < 32; i++) {
        const Fragments &f = *(Fragments *)lanes[i];
        for (int r = 0; r < 4; r++) f.d[r] = f.c[r] + sums[i / 4 + 8 * (r >> 1)][2 * (i % 4) + (r & 1)];
    }
}

void mma(MatrixType type, float *d, const uint32_t *a, const uint32_t *b, const float *c, const char *file, int line) {
    Fragments mine = {type, d, a, b, c};
    meet(kMatrix, ~0u, (uint64_t)&mine, file, line, multiply);
}

void ldmatrix(int count, bool transposed, uint32_t *d, const void *row, const char *file, int line) {
    uint16_t numbers[8] = {};
    int self = lane();
    if (self < 8 * count) {
        if ((uintptr_t)row % 16 || !is_shared(row)) {
            fail("ldmatrix at %s: a row is misaligned (16 bytes) or not in shared memory; %s",
                 place(file, line).c_str(), describe(row).c_str());
        }
        touch(row, 16, kRead, CALLER);
        std::copy_n((const uint16_t *)row, 8, numbers);
    }
    const uint64_t *rows = meet(kLoadMatrix, ~0u, (uint64_t)numbers, file, line);
    for (int m = 0; m < count; m++) {
        auto number = [&](int r, int c) { return (uint32_t)((const uint16_t *)rows[8 * m + r])[c]; };
        int r = self / 4, c = self % 4 * 2;
        d[m] = transposed ? number(c, r) | number(c + 1, r) << 16 : number(r, c) | number(r, c + 1) << 16;
    }
    meet(kLoadMatrix, ~0u, 0, file, line);  // `numbers` lie on the lanes' stacks: none may go before all have read
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams. A clock says for each stream how many of its operations are behind; an operation may run when its clock is.

constexpr int kStreams = 32;
struct Clock {
    std::array<uint32_t, kStreams> at{};
    void join(const Clock &other) {
        for (int s = 0; s < kStreams; s++) at[s] = std::max(at[s], other.at[s]);
    }
    bool covers(const Clock &other, int but = -1) const {
        for (int s = 0; s < kStreams; s++) {
            if (s != but && at[s] < other.at[s]) return false;
        }
        return true;
    }
};
struct Operation {
    std::function<void()> run;
    Clock clock;
    uintptr_t pc;
};
struct Stream {
    bool used, blocking;  // blocking: waits for the null stream and is waited for by it
    Clock tail;           // of the last operation, and what the next one has to wait for
    std::deque<Operation> queue;
};
struct Event {
    Clock clock;
    std::shared_ptr<double> time;
};
struct Ran {
    uint32_t time;
    int stream;
    uint32_t number;
};
struct Pending {  // a copy from or to pinned memory that the host has not waited for
    uintptr_t begin, end, pc;
    bool writes;
    int stream;
    uint32_t number;
};

static Stream streams[kStreams];  // [0]: the null stream
static Clock done, host, current;
static std::vector<Ran> ran;
static std::vector<Pending> pending;
static cudaError_t last_error;

bool waited_for(uint32_t time, bool by_host) {
    auto i = std::upper_bound(ran.begin(), ran.end(), time, [](uint32_t t, const Ran &r) { return t < r.time; });
    if (i == ran.begin()) return true;
    --i;
    return (by_host ? host : current).at[(size_t)i->stream] >= i->number;
}

uintptr_t pending_copy(uintptr_t address, size_t bytes, bool write) {
    for (auto &p : pending) {
        if (address < p.end && address + bytes > p.begin && (write || p.writes)) return p.pc;
    }
    return 0;
}

static int slot(cudaStream_t stream, uintptr_t pc) {
    Stream *s = stream == nullptr || stream == cudaStreamLegacy ? &streams[0] : (Stream *)stream;
    if (s < streams || s >= streams + kStreams || (s != streams && !s->used))
        fail("no such stream at %s", source(pc).c_str());
    return (int)(s - streams);
}

static Operation &push(cudaStream_t stream, uintptr_t pc, std::function<void()> run) {
    int number = slot(stream, pc);
    Stream &s = streams[number];
    s.tail.join(host);
    if (number == 0) {
        for (auto &other : streams) {
            if (other.used && other.blocking) s.tail.join(other.tail);
        }
    } else if (s.blocking) {
        s.tail.join(streams[0].tail);
    }
    s.tail.at[(size_t)number]++;
    s.queue.push_back({std::move(run), s.tail, pc});
    return s.queue.back();
}

void enqueue(cudaStream_t stream, uintptr_t pc, const std::function<void()> &run) { push(stream, pc, run); }

// Runs one operation whose turn it may be; false if there is none.
static bool run_one() {
    int able[kStreams], count = 0;
    for (int s = 0; s < kStreams; s++) {
        if (!streams[s].queue.empty() && done.covers(streams[s].queue.front().clock, s)) able[count++] = s;
    }
    if (!count) return false;
    int s = able[draw((uint32_t)count)];
    Operation operation = std::move(streams[s].queue.front());
    streams[s].queue.pop_front();
    current = operation.clock;
    state.concurrent = !current.covers(done);
    state.operation_start = state.block_start = state.barrier_time = ++state.now;
    state.thread = 0;
    state.stack = state.stack_end = 0;
    state.pc = operation.pc;
    ran.push_back({state.now, s, current.at[(size_t)s]});
    running = &state;
    operation.run();
    running = nullptr;
    done.at[(size_t)s]++;
    return true;
}

unsigned long host_waited;

static void host_waits(const Clock &clock) {
    host_waited += !done.covers(clock);
    while (!done.covers(clock)) {
        if (!run_one()) fail("deadlock: streams wait for each other");
    }
    host.join(clock);
    pending.erase(std::remove_if(pending.begin(), pending.end(),
                                 [](const Pending &p) { return host.at[(size_t)p.stream] >= p.number; }),
                  pending.end());
}

static Clock everything() {
    Clock all;
    for (auto &s : streams) all.join(s.tail);
    return all;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

static void run_block(uint32_t number) {
    dim3 g = kernel.config.grid, b = kernel.config.block;
    block = {number % g.x, number / g.x % g.y, number / g.x / g.y};
    state.block_start = state.barrier_time = ++state.now;
    for (uint32_t &time : state.warp_time) time = state.now;
    for (auto &v : shared_variables) fresh_shared(v);
    block_barrier = {};
    for (int i = 0; i < kernel.threads; i++) {
        Thread &t = threads[i];
        unsigned n = (unsigned)i;
        t.index = {n % b.x, n / b.x % b.y, n / b.x / b.y};
        t.state = Thread::kReady;
        t.copies = t.group = 0;
        t.stack_pointer = prepare_stack(stacks + (size_t)(i + 1) * kStack);
        ready[i] = (uint16_t)i;
        warps[i / 32].arrived = 0;
    }
    num_ready = num_alive = kernel.threads;
    run_next(&scheduler);
    state.stack = state.stack_end = 0;
}

static void run_kernel(const Kernel &k, const std::vector<char> &arguments) {
    kernel = k;
    std::copy(arguments.begin(), arguments.end(), parameters);
    static_bytes = 0;
    size_t dynamic = (k.config.shared + 127) / 128 * 128;
    shared_variables.assign(1, {nullptr, "dynamic memory", kDynamicEnd - dynamic, k.config.shared});
    std::vector<uint32_t> order(k.config.grid.x * k.config.grid.y * k.config.grid.z);
    for (uint32_t i = 0; i < order.size(); i++) {
        order[i] = i;
        std::swap(order[i], order[draw(i + 1)]);
    }
    for (uint32_t number : order) run_block(number);
    if (!check_memory) return;
    for (auto &v : shared_variables) check_memory(v.p, v.p, 0, v.p + v.bytes);
}

unsigned long launches;

void enqueue_kernel(const Config &c, const void *function, const char *name, void (*call)(const void *, const void *),
                    const void *arguments, size_t bytes, const char *file, int line) {
    unsigned long count = (unsigned long)c.block.x * c.block.y * c.block.z;
    std::string where = std::string(name) + " launched at " + place(file, line);
    if (count == 0 || count > kMaxThreads || c.block.z > 64 || count % 32) {
        fail("%s: a block of %ux%ux%u threads: must be a multiple of 32, at most 1024 and 64 deep", where.c_str(),
             c.block.x, c.block.y, c.block.z);
    }
    if (!c.grid.x || !c.grid.y || !c.grid.z || c.grid.x > 0x7fffffff || c.grid.y > 65535 || c.grid.z > 65535) {
        fail("%s: a grid of %ux%ux%u blocks: each from 1 to 2147483647, 65535, 65535", where.c_str(), c.grid.x,
             c.grid.y, c.grid.z);
    }
    auto limit = shared_limits.find(function);
    size_t most = limit == shared_limits.end() ? 48 * 1024 : std::max((size_t)limit->second, (size_t)48 * 1024);
    if (c.shared > most) {
        fail("%s: too much shared memory: %zu bytes; without cudaFuncSetAttribute 49152, with it on sm_%d %d, here %zu",
             where.c_str(), c.shared, gpu.architecture, gpu.shared_per_block, most);
    }
    Kernel k = {c, function, name, file, line, call, (int)count};
    launches++;
    std::vector<char> copy((const char *)arguments, (const char *)arguments + bytes);
    push(c.stream, CALLER, [k, copy] { run_kernel(k, copy); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies

static void run_copy(char *to, const char *from, size_t bytes) {
    if (is_device(from)) require_memory(from, bytes, state.pc);
    if (is_device(to)) require_memory(to, bytes, state.pc);
    bool onwards = is_device(from) && is_device(to);
    if (is_device(from)) touch(from, bytes, onwards ? kReadUnchecked : kRead, state.pc);
    if (is_device(to)) touch(to, bytes, kWrite, state.pc);
    memmove(to, from, bytes);
    if (onwards && check_copied) check_copied(to, from, bytes);
}

static void copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream, bool symbol,
                 bool waits, uintptr_t pc) {
    bool to_device = is_device(to), from_device = is_device(from);
    static const char *names[] = {"HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice"};
    if (!symbol && kind != cudaMemcpyDefault && (int)kind != from_device * 2 + to_device) {
        fail("the copy at %s says cudaMemcpy%s but is %s", source(pc).c_str(), names[kind],
             names[from_device * 2 + to_device]);
    }
    if (to_device) require_memory(to, bytes, pc);
    if (from_device) require_memory(from, bytes, pc);
    for (const void *p : {(const void *)to, from}) {
        if (is_pinned(p)) require_memory(p, bytes, pc);
        if (!waits && !symbol && !is_device(p) && !is_pinned(p)) {
            fail(
                "the asynchronous copy at %s uses memory that is not pinned (cudaMallocHost); it would wait, or be "
                "torn",
                source(pc).c_str());
        }
    }
    int s = slot(stream, pc);
    uint32_t number = push(stream, pc, [=] { run_copy((char *)to, (const char *)from, bytes); }).clock.at[(size_t)s];
    if (waits) return host_waits(streams[s].tail);
    if (is_pinned(from)) pending.push_back({(uintptr_t)from, (uintptr_t)from + bytes, pc, false, s, number});
    if (is_pinned(to)) {  // who reads it before the end of the copy gets NaN; but an earlier copy may still need it
        if (!pending_copy((uintptr_t)to, bytes, true)) memset(to, 0xFF, bytes);
        pending.push_back({(uintptr_t)to, (uintptr_t)to + bytes, pc, true, s, number});
    }
}

void symbol_copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream, bool wait) {
    copy(to, from, bytes, kind, stream, true, wait, CALLER);
}

static void fill(void *p, int value, size_t bytes, cudaStream_t stream, uintptr_t pc) {
    if (!is_device(p)) fail("cudaMemset at %s: not device memory", source(pc).c_str());
    require_memory(p, bytes, pc);
    push(stream, pc, [=] {
        require_memory(p, bytes, state.pc);
        touch(p, bytes, kWrite, state.pc);
        memset(p, value, bytes);
    });
}

static double seconds() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Before main(): memory for stacks and shared memory, and the handler that turns a fault into a report.
__attribute__((constructor)) static void start() {
    next_address[0] = kSharedEnd + kPage;
    next_address[1] = kPinned + kPage;
    for (uintptr_t space : {kDevice, kPinned}) map(space, kSpace, PROT_NONE);
    for (char *end : {kVariables + 0x80000, kDynamicEnd}) {
        map((uintptr_t)end - 0x80000, 0x80000, PROT_READ | PROT_WRITE);
        if (check_memory) check_memory(end - 0x80000, end - 0x80000, 0, end);
    }
    stacks = (char *)map(0, kMaxThreads * kStack, PROT_READ | PROT_WRITE);
    for (int t = 0; t < kMaxThreads; t++) mprotect(stacks + (size_t)t * kStack, kPage, PROT_NONE);
    streams[0].used = true;
    stack_t alternative = {};
    alternative.ss_size = 1 << 18;
    alternative.ss_sp = map(0, alternative.ss_size, PROT_READ | PROT_WRITE);
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}
}  // namespace emu

// ---------------------------------------------------------------------------------------------------------------------
// The runtime's functions. What is missing here is missing at link time.

using namespace emu;

static cudaError_t result(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

extern "C" {
cudaError_t cudaMalloc(void **p, size_t bytes) {
    return *p = bytes ? allocate(false, bytes, CALLER) : nullptr, cudaSuccess;
}
cudaError_t cudaMallocHost(void **p, size_t bytes) { return *p = allocate(true, bytes, CALLER), cudaSuccess; }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return *p = allocate(true, bytes, CALLER), cudaSuccess; }
cudaError_t cudaFree(void *p) { return host_waits(everything()), release(p, CALLER), cudaSuccess; }
cudaError_t cudaFreeHost(void *p) { return host_waits(everything()), release(p, CALLER), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = *total = (size_t)16 << 30;
    for (auto &a : allocations) *available -= a.second.freed || !is_device(a.second.p) ? 0 : a.second.bytes;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return copy(to, from, bytes, kind, 0, false, true, CALLER), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes, kind, stream, false, false, CALLER), cudaSuccess;
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { return fill(p, value, bytes, 0, CALLER), cudaSuccess; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s) {
    return fill(p, value, bytes, s, CALLER), cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    for (auto &s : streams) {
        if (s.used) continue;
        s.used = true;
        s.blocking = !(flags & cudaStreamNonBlocking);
        return *stream = (cudaStream_t)&s, cudaSuccess;
    }
    fail("more than %d streams at %s", kStreams, source(CALLER).c_str());
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return host_waits(streams[slot(stream, CALLER)].tail), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return host_waits(everything()), cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Stream &s = streams[slot(stream, CALLER)];
    Clock before = host;
    host_waits(s.tail);  // its work is done, but the host has not waited for it
    host = before;
    s.used = false;
    return cudaSuccess;
}
static cudaError_t query(const Clock &clock) {  // whoever asks again and again gets an answer in the end
    if (!done.covers(clock)) run_one();
    if (!done.covers(clock)) return cudaErrorNotReady;
    return host_waits(clock), cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return query(streams[slot(stream, CALLER)].tail); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    return *event = (cudaEvent_t) new Event(), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete (Event *)event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    auto time = ((Event *)event)->time = std::make_shared<double>(0);
    ((Event *)event)->clock = push(stream, CALLER, [time] { *time = seconds(); }).clock;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    return streams[slot(stream, CALLER)].tail.join(((Event *)event)->clock), cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return host_waits(((Event *)event)->clock), cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return query(((Event *)event)->clock); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    auto &a = ((Event *)start)->time, &b = ((Event *)end)->time;
    if (!a || !b) return result(cudaErrorInvalidResourceHandle);
    if (!*a || !*b) return result(cudaErrorNotReady);
    return *milliseconds = (float)(1e3 * (*b - *a)), cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char *cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
const char *cudaGetErrorString(cudaError_t error) {
    static char text[64];
    return snprintf(text, sizeof text, "error %d of the runtime", (int)error), text;
}
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return result(device ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = gpu.architecture / 10;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = gpu.architecture % 10;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = gpu.multiprocessors;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = 48 * 1024;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = gpu.shared_per_block;
            break;
        case cudaDevAttrMaxThreadsPerBlock:
            *value = kMaxThreads;
            break;
        case cudaDevAttrWarpSize:
            *value = 32;
            break;
        default:
            return result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = cudaDeviceProp();
    snprintf(p->name, sizeof p->name, "emulated sm_%d (no GPU)", gpu.architecture);
    p->major = gpu.architecture / 10;
    p->minor = gpu.architecture % 10;
    p->totalGlobalMem = (size_t)16 << 30;
    p->multiProcessorCount = gpu.multiprocessors;
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = (size_t)gpu.shared_per_block;
    p->maxThreadsPerBlock = kMaxThreads;
    p->warpSize = 32;
    return cudaSuccess;
}
}
