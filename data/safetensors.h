/*
Safetensors (huggingface/safetensors, its README is the specification): an 8-byte little-endian length, a JSON header
of that length {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {...}},
then the numbers, row-major, offsets counted from the header's end.

Reading maps the file, and believes nothing in it: every offset, shape and type is checked against the file's size
before a number is touched. Writing gives the same bytes for the same tensors.

Compiles as C11 and as C++17. Little-endian machines, as everything in the trainer.
*/
#ifndef DETR_SAFETENSORS_H
#define DETR_SAFETENSORS_H

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "json.h"

enum {
    SAFETENSORS_MAX_DIMENSIONS = 8,
    SAFETENSORS_MAX_HEADER = 100000000,  // the specification's own limit
};

// ---------------------------------------------------------------------------------------------------------------------
// Element types

typedef enum {
    SAFE_F64,
    SAFE_F32,
    SAFE_F16,
    SAFE_BF16,
    SAFE_I64,
    SAFE_I32,
    SAFE_I16,
    SAFE_I8,
    SAFE_U64,
    SAFE_U32,
    SAFE_U16,
    SAFE_U8,
    SAFE_BOOL,
    SAFE_DTYPES
} SafeDtype;

static const char *const safe_dtype_names[SAFE_DTYPES] = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16",
                                                          "I8",  "U64", "U32", "U16",  "U8",  "BOOL"};
static const int safe_dtype_bytes[SAFE_DTYPES] = {8, 4, 2, 2, 8, 4, 2, 1, 8, 4, 2, 1, 1};

// The type called `name`, or -1.
static inline int safetensors_dtype(const char *name) {
    for (int dtype = 0; dtype < SAFE_DTYPES; dtype++)
        if (strcmp(name, safe_dtype_names[dtype]) == 0) return dtype;
    return -1;
}

// IEEE half precision: 1 sign, 5 exponent, 10 fraction bits.
static inline double half_to_double(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                  : exponent == 0 ? ldexp(fraction, -24)
                                  : ldexp(fraction + 1024, exponent - 25);
    return bits >> 15 ? -size : size;
}

// bfloat16: the upper half of a float.
static inline float bfloat16_to_float(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading

typedef struct {
    char *name;
    int dtype;  // SafeDtype
    int ndim;   // 0: one number
    int64_t shape[SAFETENSORS_MAX_DIMENSIONS];
    int64_t count;              // of elements; may be 0
    size_t begin, end;          // bytes in the data part
    const unsigned char *data;  // in the mapped file; need not be aligned
} SafeEntry;

typedef struct {
    char *path;
    void *map;
    size_t map_bytes;
    SafeEntry *entries;  // sorted by name
    int count;
} SafeFile;

static inline int safe_entry_by_name(const void *a, const void *b) {
    return strcmp(((const SafeEntry *)a)->name, ((const SafeEntry *)b)->name);
}

static inline int safe_entry_by_place(const void *a, const void *b) {
    const SafeEntry *left = (const SafeEntry *)a, *right = (const SafeEntry *)b;
    if (left->begin != right->begin) return left->begin < right->begin ? -1 : 1;
    return left->end < right->end ? -1 : left->end > right->end;
}

static inline void safetensors_close(SafeFile *file) {
    for (int i = 0; i < file->count; i++) free(file->entries[i].name);
    free(file->entries);
    free(file->path);
    if (file->map) munmap(file->map, file->map_bytes);
    memset(file, 0, sizeof *file);
}

// One member of the header, checked by itself: type known, shape without overflow, offsets in order, inside the data
// and as far apart as type and shape say. 0, or -1.
static inline int safe_entry_read(SafeEntry *entry, yajl_val value, size_t data_bytes, const char *path, Error *error) {
    const char *dtype = NULL, *name = entry->name;
    yajl_val shape = json_member(value, "shape"), offsets = json_member(value, "data_offsets");
    if (!YAJL_IS_OBJECT(value)) return fail(error, "%s: tensor %.100s: its entry is not an object", path, name);
    if (json_get_string(value, "dtype", &dtype, path, error) != 1)
        return fail(error, "%s: tensor %.100s: no \"dtype\"", path, name);
    entry->dtype = safetensors_dtype(dtype);
    if (entry->dtype < 0) return fail(error, "%s: tensor %.100s: dtype %.40s is not supported", path, name, dtype);
    if (!YAJL_IS_ARRAY(shape) || shape->u.array.len > SAFETENSORS_MAX_DIMENSIONS)
        return fail(error, "%s: tensor %.100s: \"shape\" must be a list of at most %d sizes", path, name,
                    SAFETENSORS_MAX_DIMENSIONS);
    entry->ndim = (int)shape->u.array.len;
    entry->count = 1;
    for (int i = 0; i < entry->ndim; i++) {
        yajl_val size = shape->u.array.values[i];
        if (!YAJL_IS_INTEGER(size) || size->u.number.i < 0)
            return fail(error, "%s: tensor %.100s: size %d of its shape is not a number >= 0", path, name, i);
        entry->shape[i] = size->u.number.i;
        if (__builtin_mul_overflow(entry->count, entry->shape[i], &entry->count))
            return fail(error, "%s: tensor %.100s: its shape overflows 63 bits", path, name);
    }
    if (!YAJL_IS_ARRAY(offsets) || offsets->u.array.len != 2 || !YAJL_IS_INTEGER(offsets->u.array.values[0]) ||
        !YAJL_IS_INTEGER(offsets->u.array.values[1]))
        return fail(error, "%s: tensor %.100s: \"data_offsets\" must be two whole numbers", path, name);
    long long begin = offsets->u.array.values[0]->u.number.i, end = offsets->u.array.values[1]->u.number.i;
    if (begin < 0 || end < begin || (unsigned long long)end > data_bytes)
        return fail(error, "%s: tensor %.100s: bytes %lld to %lld are not inside the file's %zu bytes of data", path,
                    name, begin, end, data_bytes);
    int64_t bytes;
    if (__builtin_mul_overflow(entry->count, (int64_t)safe_dtype_bytes[entry->dtype], &bytes) || bytes != end - begin)
        return fail(error, "%s: tensor %.100s: %lld bytes, but its type and shape do not take that many", path, name,
                    end - begin);
    entry->begin = (size_t)begin;
    entry->end = (size_t)end;
    return 0;
}

// All members of the header; then that they cover the data from end to end without a hole, and no name twice.
static inline int safe_header_read(SafeFile *file, yajl_val header, const unsigned char *data, size_t data_bytes,
                                   Error *error) {
    const char *path = file->path;
    if (!YAJL_IS_OBJECT(header)) return fail(error, "%s: its header is not a JSON object", path);
    size_t members = header->u.object.len;
    file->entries = (SafeEntry *)allocate(members * sizeof(SafeEntry));
    for (size_t i = 0; i < members; i++) {
        if (strcmp(header->u.object.keys[i], "__metadata__") == 0) continue;
        SafeEntry *entry = &file->entries[file->count++];
        entry->name = format_string("%s", header->u.object.keys[i]);
        if (safe_entry_read(entry, header->u.object.values[i], data_bytes, path, error) != 0) return -1;
        entry->data = data + entry->begin;
    }
    qsort(file->entries, (size_t)file->count, sizeof(SafeEntry), safe_entry_by_place);
    size_t covered = 0;
    for (int i = 0; i < file->count; i++) {
        const SafeEntry *entry = &file->entries[i];
        if (entry->begin != covered)
            return fail(error, "%s: tensor %.100s begins at byte %zu of the data, where %zu was due: %s", path,
                        entry->name, entry->begin, covered, entry->begin < covered ? "tensors overlap" : "a hole");
        covered = entry->end;
    }
    if (covered != data_bytes)
        return fail(error, "%s: %zu bytes of data, but its tensors end at %zu", path, data_bytes, covered);
    qsort(file->entries, (size_t)file->count, sizeof(SafeEntry), safe_entry_by_name);
    for (int i = 1; i < file->count; i++)
        if (strcmp(file->entries[i - 1].name, file->entries[i].name) == 0)
            return fail(error, "%s: tensor %.100s is there twice", path, file->entries[i].name);
    return 0;
}

// Opens and checks a file. 0; or -1, and then nothing is to be closed.
static inline int safetensors_open(SafeFile *file, const char *path, Error *error) {
    memset(file, 0, sizeof *file);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is not waited for
    struct stat status;
    if (descriptor < 0) return fail(error, "%s: cannot be opened: %s", path, strerror(errno));
    if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size < 8) {
        close(descriptor);
        return fail(error, "%s: is not a safetensors file (shorter than 8 bytes, or no file)", path);
    }
    file->map_bytes = (size_t)status.st_size;
    file->map = mmap(NULL, file->map_bytes, PROT_READ, MAP_PRIVATE, descriptor, 0);
    close(descriptor);
    if (file->map == MAP_FAILED) {
        file->map = NULL;
        return fail(error, "%s: cannot be mapped: %s", path, strerror(errno));
    }
    file->path = format_string("%s", path);
    const unsigned char *bytes = (const unsigned char *)file->map;
    uint64_t header_bytes;
    memcpy(&header_bytes, bytes, 8);
    int result = -1;
    if (header_bytes > SAFETENSORS_MAX_HEADER || header_bytes > file->map_bytes - 8) {
        fail(error, "%s: is not a safetensors file, or is cut off: a header of %llu bytes in a file of %zu", path,
             (unsigned long long)header_bytes, file->map_bytes);
    } else {
        char *text = (char *)allocate((size_t)header_bytes + 1);
        memcpy(text, bytes + 8, (size_t)header_bytes);
        yajl_val header = json_parse(text, (size_t)header_bytes, path, error);
        free(text);
        size_t data_begin = 8 + (size_t)header_bytes;
        if (header) result = safe_header_read(file, header, bytes + data_begin, file->map_bytes - data_begin, error);
        yajl_tree_free(header);
    }
    if (result != 0) {
        for (char *at = error->text; *at; at++)  // names come from the file: keep the line a line
            if ((unsigned char)*at < 32) *at = '?';
        safetensors_close(file);
    }
    return result;
}

// The tensor of that name, or NULL.
static inline const SafeEntry *safetensors_find(const SafeFile *file, const char *name) {
    SafeEntry wanted;
    wanted.name = (char *)name;
    return (const SafeEntry *)bsearch(&wanted, file->entries, (size_t)file->count, sizeof(SafeEntry),
                                      safe_entry_by_name);
}

// Element `index` (row-major, below entry->count) as a double.
static inline double safetensors_element(const SafeEntry *entry, int64_t index) {
    int bytes = safe_dtype_bytes[entry->dtype];
    uint64_t word = 0;
    memcpy(&word, entry->data + index * bytes, (size_t)bytes);
    double wide;
    float narrow;
    switch (entry->dtype) {
        case SAFE_F64:
            memcpy(&wide, &word, 8);
            return wide;
        case SAFE_F32:
            memcpy(&narrow, &word, 4);
            return (double)narrow;
        case SAFE_F16:
            return half_to_double((uint16_t)word);
        case SAFE_BF16:
            return (double)bfloat16_to_float((uint16_t)word);
        case SAFE_I64:
            return (double)(int64_t)word;
        case SAFE_I32:
            return (double)(int32_t)word;
        case SAFE_I16:
            return (double)(int16_t)word;
        case SAFE_I8:
            return (double)(int8_t)word;
        default:
            return (double)word;  // unsigned, and BOOL
    }
}

// All elements as float. out: (entry->count)
static inline void safetensors_read_float(const SafeEntry *entry, float *out) {
    if (entry->dtype == SAFE_F32)
        memcpy(out, entry->data, (size_t)entry->count * sizeof(float));
    else
        for (int64_t i = 0; i < entry->count; i++) out[i] = (float)safetensors_element(entry, i);
}

// All elements as double. out: (entry->count)
static inline void safetensors_read_double(const SafeEntry *entry, double *out) {
    for (int64_t i = 0; i < entry->count; i++) out[i] = safetensors_element(entry, i);
}

// 1 if the tensor has exactly this shape.
static inline int safetensors_has_shape(const SafeEntry *entry, int ndim, const int64_t *shape) {
    return entry->ndim == ndim && (ndim == 0 || memcmp(entry->shape, shape, (size_t)ndim * sizeof *shape) == 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

typedef struct {
    const char *name;
    const char *dtype;  // "F32"
    int ndim;
    int64_t shape[SAFETENSORS_MAX_DIMENSIONS];
    const void *data;  // as many bytes as dtype and shape take
} SafeTensor;

// Writes the tensors in the given order, with {"format": "pt"} as metadata, and flushes the file to the disk. The file
// is overwritten in place: for one that must never be half there, write another name and rename. 0; or -1, and then
// half a file is removed.
static inline int safetensors_write(const char *path, const SafeTensor *tensors, int count, Error *error) {
    char *header = NULL;
    size_t header_bytes = 0, offset = 0;
    FILE *text = open_memstream(&header, &header_bytes);
    if (!text) return fail(error, "%s: out of memory", path);
    size_t *bytes = (size_t *)allocate((size_t)count * sizeof *bytes);
    fputs("{\"__metadata__\":{\"format\":\"pt\"}", text);
    for (int i = 0; i < count; i++) {
        const SafeTensor *tensor = &tensors[i];
        int dtype = safetensors_dtype(tensor->dtype);
        if (dtype < 0 || tensor->ndim < 0 || tensor->ndim > SAFETENSORS_MAX_DIMENSIONS) {
            fclose(text);
            free(header);
            free(bytes);
            return fail(error, "%s: tensor %.100s: cannot write dtype %s with %d dimensions", path, tensor->name,
                        tensor->dtype, tensor->ndim);
        }
        bytes[i] = (size_t)safe_dtype_bytes[dtype];
        fputc(',', text);
        json_print_string(text, tensor->name);
        fprintf(text, ":{\"dtype\":\"%s\",\"shape\":[", tensor->dtype);
        for (int d = 0; d < tensor->ndim; d++) {
            fprintf(text, "%s%lld", d ? "," : "", (long long)tensor->shape[d]);
            bytes[i] *= (size_t)tensor->shape[d];
        }
        fprintf(text, "],\"data_offsets\":[%zu,%zu]}", offset, offset + bytes[i]);
        offset += bytes[i];
    }
    fputc('}', text);
    while (ftell(text) % 8) fputc(' ', text);  // so that the numbers begin at a multiple of 8
    fclose(text);

    uint64_t length = header_bytes;
    FILE *file = fopen(path, "wb");
    int good = file != NULL && fwrite(&length, 8, 1, file) == 1 && fwrite(header, header_bytes, 1, file) == 1;
    for (int i = 0; i < count && good; i++) good = bytes[i] == 0 || fwrite(tensors[i].data, bytes[i], 1, file) == 1;
    if (good) good = fflush(file) == 0 && fsync(fileno(file)) == 0;
    int why = errno;
    if (file && fclose(file) != 0) good = 0;
    free(header);
    free(bytes);
    if (good) return 0;
    if (is_file(path)) remove(path);
    return fail(error, "%s: cannot be written: %s", path, strerror(why));
}

#endif
