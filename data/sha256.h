/*
SHA-256 (FIPS 180-4, "Secure Hash Standard", 2015): what sha256sum prints of a file. A checkpoint's files have theirs in
SHA256SUMS (fileset.h), so that a flipped bit is found by this program and by everybody's.

Compiles as C11 and as C++17. Little-endian machines.
*/
#ifndef DETR_SHA256_H
#define DETR_SHA256_H

#include "common.h"

enum { SHA256_HEX = 64 };  // characters of a checksum

typedef struct {
    uint32_t state[8];
    uint64_t bytes;  // so far
    unsigned char block[64];
} Sha256;

static inline uint32_t rotate_right(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

// The compression function on one block of 64 bytes, section 6.2.2.
static inline void sha256_block(uint32_t state[8], const unsigned char *block) {
    static const uint32_t constants[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t words[64], s[8];
    memcpy(words, block, 64);
    for (int i = 0; i < 16; i++) words[i] = __builtin_bswap32(words[i]);
    for (int i = 16; i < 64; i++) {
        const uint32_t near = words[i - 2], far = words[i - 15];
        words[i] = words[i - 16] + (rotate_right(far, 7) ^ rotate_right(far, 18) ^ far >> 3) + words[i - 7] +
                   (rotate_right(near, 17) ^ rotate_right(near, 19) ^ near >> 10);
    }
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
        const uint32_t choice = s[6] ^ (s[4] & (s[5] ^ s[6])), majority = (s[0] & s[1]) | (s[2] & (s[0] | s[1])),
                       one = s[7] + (rotate_right(s[4], 6) ^ rotate_right(s[4], 11) ^ rotate_right(s[4], 25)) + choice +
                             constants[i] + words[i],
                       two = (rotate_right(s[0], 2) ^ rotate_right(s[0], 13) ^ rotate_right(s[0], 22)) + majority;
        s[7] = s[6], s[6] = s[5], s[5] = s[4], s[4] = s[3] + one;
        s[3] = s[2], s[2] = s[1], s[1] = s[0], s[0] = one + two;
    }
    for (int i = 0; i < 8; i++) state[i] += s[i];
}

static inline void sha256_begin(Sha256 *sum) {
    static const uint32_t initial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memset(sum, 0, sizeof *sum);
    memcpy(sum->state, initial, sizeof initial);
}

static inline void sha256_add(Sha256 *sum, const void *bytes, size_t count) {
    const unsigned char *from = (const unsigned char *)bytes;
    while (count > 0) {
        const size_t used = (size_t)(sum->bytes % 64), taken = count < 64 - used ? count : 64 - used;
        if (taken < 64) memcpy(sum->block + used, from, taken);
        if (used + taken == 64) sha256_block(sum->state, taken < 64 ? sum->block : from);
        sum->bytes += taken;
        from += taken;
        count -= taken;
    }
}

// The checksum in hexadecimal. sum is used up.
static inline void sha256_end(Sha256 *sum, char hex[SHA256_HEX + 1]) {
    static const unsigned char padding[64] = {0x80};
    const uint64_t bits = __builtin_bswap64(8 * sum->bytes);
    sha256_add(sum, padding, 1 + (size_t)((119 - sum->bytes % 64) % 64));  // to 8 bytes before the end of a block
    sha256_add(sum, &bits, 8);
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08x", sum->state[i]);
}

// The checksum of a file. 0, or -1.
static inline int sha256_file(const char *path, char hex[SHA256_HEX + 1], Error *error) {
    enum { PIECE = 1 << 16 };
    FILE *file = open_file(path, error);
    if (!file) return -1;
    unsigned char *piece = (unsigned char *)allocate(PIECE);
    Sha256 sum;
    size_t got;
    sha256_begin(&sum);
    while ((got = fread(piece, 1, PIECE, file)) > 0) sha256_add(&sum, piece, got);
    const int bad = ferror(file), why = errno;
    fclose(file);
    free(piece);
    sha256_end(&sum, hex);
    return bad ? fail(error, "%s: cannot be read: %s", path, strerror(why)) : 0;
}

#endif
