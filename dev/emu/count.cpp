// count.cpp: counts what a .cu file's kernels ask of memory. It is linked instead of check.cpp, with the same object
// file: each access of a kernel arrives at one of the __tsan_ functions below. The n-th time that the lanes of a warp
// come to one place in the program since they last waited for each other they are taken to do so together, as one
// instruction: its addresses tell how many sectors of 32 bytes and lines of 128 bytes it moves, or how often shared
// memory has to be gone through for it. A compiler for the GPU may keep in registers what g++ reads again, so these are
// counts of the source, not of machine code.
#include "emu.h"

#include <algorithm>
#include <vector>

namespace emu {
static Counts counts;

struct Group {  // what the lanes of a warp do together
    uint64_t address[32];
    uint32_t lanes;  // a bit for each that took part
    bool has(int lane) const { return lanes >> lane & 1; }
};
struct Visits {  // of a warp
    std::vector<Group> groups;
    uint32_t wait;  // the number of the warp's last wait when it was here last, and how many groups there were before
    size_t before;
};
struct Place {  // in the program
    uintptr_t pc;
    bool shared;
    unsigned bytes;
    std::vector<uint32_t> wait, times;  // the same of each thread, and how many times it has been here since then
    std::vector<Visits> warps;
};
static std::vector<Place> places;
static std::vector<uint16_t> place_of[2];  // by pc, of global and of shared memory, from 1
static std::vector<uint8_t> sectors;       // of 32 bytes of device memory: 1 read, 2 written by this launch
static uint64_t steps[1024];               // of a thread of this block
static uint32_t waits[1024];               // likewise, from 1
static uint32_t block_start, operation_start;

// Adds up how many times 128 bytes of shared memory are gone through for these lanes: with 16 bytes a lane for 8 lanes
// at a time, with 8 for 16, else for all; each time a bank gives one word of 4 bytes. One time for so many would do. If
// all want the same, all get it at once.
static void pass_through_banks(const Group &group, unsigned bytes) {
    int at_once = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
    if (std::count(group.address, group.address + 32, group.address[0]) == 32) at_once = 32;
    for (int first = 0; first < 32; first += at_once) {
        std::vector<uint64_t> words[32];
        size_t most = 0;
        for (int lane = first; lane < first + at_once; lane++) {
            for (uint64_t word = group.address[lane] / 4; word <= (group.address[lane] + bytes - 1) / 4; word++) {
                std::vector<uint64_t> &bank = words[word % 32];
                if (!group.has(lane)) break;
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                most = std::max(most, bank.size());
            }
        }
        counts.wavefronts += most;
        counts.conflicts += most ? most - 1 : 0;
    }
}

// How many pieces of `unit` bytes the lanes touch.
static unsigned distinct(const Group &group, unsigned bytes, unsigned unit) {
    uint64_t units[64];
    int count = 0;
    for (int lane = 0; lane < 32; lane++) {
        if (!group.has(lane)) continue;
        units[count++] = group.address[lane] / unit;
        units[count++] = (group.address[lane] + bytes - 1) / unit;
    }
    std::sort(units, units + count);
    return (unsigned)(std::unique(units, units + count) - units);
}

static void end_of_block() {
    for (Place &place : places) {
        for (Visits &visits : place.warps) {
            for (const Group &group : visits.groups) {
                if (place.shared) {
                    pass_through_banks(group, place.bytes);
                } else {
                    counts.moved += 32 * distinct(group, place.bytes, 32);
                    counts.lines += distinct(group, place.bytes, 128);
                }
            }
            visits.groups.clear();
            visits.wait = 0;
        }
        std::fill(place.wait.begin(), place.wait.end(), 0);
    }
    counts.steps = std::max(counts.steps, *std::max_element(steps, steps + 1024));
    std::fill(steps, steps + 1024, 0);
    std::fill(waits, waits + 1024, 1);
}

static void end_of_operation() {
    for (uint8_t &sector : sectors) {
        counts.read += sector & 1 ? 32 : 0, counts.written += sector & 2 ? 32 : 0;
        sector = 0;
    }
}

static bool in_kernel() {
    if (!running || !running->stack) return false;
    if (running->block_start != block_start) end_of_block();
    if (running->operation_start != operation_start) end_of_operation();
    block_start = running->block_start, operation_start = running->operation_start;
    return true;
}

static void count(const void *p, size_t bytes, bool write, uintptr_t pc) {
    if (!in_kernel() || !is_device(p)) return;
    const bool shared = is_shared(p);
    std::vector<uint16_t> &table = place_of[shared];
    if (table.size() <= pc) table.resize(pc + 1);
    if (!table[pc]) {
        places.push_back({pc, shared, (unsigned)bytes, std::vector<uint32_t>(1024), std::vector<uint32_t>(1024),
                          std::vector<Visits>(32)});
        table[pc] = (uint16_t)places.size();
    }
    Place &place = places[table[pc] - 1u];
    const size_t thread = (size_t)running->thread;
    Visits &visits = place.warps[thread / 32];
    if (visits.wait != waits[thread]) visits.wait = waits[thread], visits.before = visits.groups.size();
    if (place.wait[thread] != waits[thread]) place.wait[thread] = waits[thread], place.times[thread] = 0;
    const size_t at = visits.before + place.times[thread]++;
    if (visits.groups.size() <= at) visits.groups.resize(at + 1);
    Group &group = visits.groups[at];
    group.address[thread % 32] = (uintptr_t)p;
    group.lanes |= 1u << thread % 32;
    steps[thread]++;
    if (shared) return;
    for (uintptr_t s = ((uintptr_t)p - kSharedEnd) / 32; s <= ((uintptr_t)p + bytes - 1 - kSharedEnd) / 32; s++) {
        if (sectors.size() <= s) sectors.resize(s + s / 2 + 1);
        sectors[s] |= write ? 2 : 1;
    }
}

// From emu.cpp: ldmatrix reads shared memory; an asynchronous copy reads, then announces where it will write. When it
// is waited for it reads and writes once more, which does not count.
void check_access(const void *p, size_t bytes, Access access, uintptr_t pc) {
    static const void *from;
    static size_t from_bytes;
    if (access == kRead && is_shared(p)) return count(p, bytes, false, pc);
    if (access == kAtomic) return count(p, bytes, true, pc);
    if (access == kIssueCopy) {
        if (from) count(from, from_bytes, false, pc);
        count(p, bytes, true, pc);
    }
    from = access == kRead ? p : nullptr, from_bytes = bytes;
}

void count_wait(Kind kind) {
    if (!in_kernel()) return;
    steps[running->thread]++;
    waits[running->thread]++;
    counts.waits[kind]++;
}

Counts take_counts() {
    end_of_block();
    end_of_operation();
    const Counts taken = counts;
    counts = Counts();
    return taken;
}
}  // namespace emu

#define PC (uintptr_t) __builtin_return_address(0)

extern "C" {
#define SIZE(n)                                                             \
    void __tsan_read##n(void *p) { emu::count(p, n, false, PC); }           \
    void __tsan_write##n(void *p) { emu::count(p, n, true, PC); }           \
    void __tsan_unaligned_read##n(void *p) { emu::count(p, n, false, PC); } \
    void __tsan_unaligned_write##n(void *p) { emu::count(p, n, true, PC); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16) void __tsan_read_range(void *p, size_t bytes) {
    emu::count(p, bytes, false, PC);
}
void __tsan_write_range(void *p, size_t bytes) { emu::count(p, bytes, true, PC); }
void __tsan_init() {}

void *emu_memcpy(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes); }
void *emu_memmove(void *to, const void *from, size_t bytes) { return memmove(to, from, bytes); }
void *emu_memset(void *to, int value, size_t bytes) { return memset(to, value, bytes); }
}
