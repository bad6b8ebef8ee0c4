/*
JSON, on YAJL. Two ways to read:
  json_read    a small file (a configuration, a header) as a tree, with getters that tell "missing" from "wrong type";
  json_stream  a file of any size as a stream of callbacks, so that COCO's 450 MB never sit in memory.
And what is needed to write: json_print_string and json_print_number.

Python's json module writes NaN, Infinity and -Infinity, which JSON has not. The stream passes them on as numbers that
are not finite ("1e999"), so that whoever reads the number can name the entry; the tree refuses them.

Compiles as C11 and as C++17.
*/
#ifndef DETR_JSON_H
#define DETR_JSON_H

#include <yajl/yajl_parse.h>
#include <yajl/yajl_tree.h>

#include "common.h"

enum {
    JSON_MAX_DEPTH = 512,             // arrays and objects inside one another
    JSON_MAX_TREE_BYTES = 256 << 20,  // of a file that is read as a tree
    JSON_CHUNK_BYTES = 1 << 20,       // of a stream, at a time
};

// ---------------------------------------------------------------------------------------------------------------------
// Trees

// Parses `size` bytes; text[size] must be 0. `name` is what error lines call the text. The caller frees the tree with
// yajl_tree_free. NULL on text that is not JSON, or nested so deep that walking the tree could exhaust the stack.
static inline yajl_val json_parse(const char *text, size_t size, const char *name, Error *error) {
    int depth = 0, in_string = 0;
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        if (c == 0) return fail(error, "%s: not valid JSON: a zero byte at byte %zu", name, i), (yajl_val)NULL;
        if (in_string) {
            if (c == '\\' && i + 1 < size && text[i + 1]) i++;
            if (c == '"') in_string = 0;
        } else if (c == '"') {
            in_string = 1;
        } else if (c == '[' || c == '{') {
            if (++depth > JSON_MAX_DEPTH)
                return fail(error, "%s: not usable: nested deeper than %d at byte %zu", name, JSON_MAX_DEPTH, i),
                       (yajl_val)NULL;
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    char why[256] = "";
    yajl_val tree = yajl_tree_parse(text, why, sizeof why);
    if (tree) return tree;
    why[strcspn(why, "\n")] = 0;
    fail(error, "%s: not valid JSON: %s", name, why[0] ? why : size ? "cut off" : "empty");
    return NULL;
}

// Reads a file as a tree; the caller frees it with yajl_tree_free. NULL: the file cannot be read, is longer than
// JSON_MAX_TREE_BYTES, or is not JSON.
static inline yajl_val json_read(const char *path, Error *error) {
    struct stat status;
    if (stat(path, &status) == 0 && status.st_size > JSON_MAX_TREE_BYTES) {
        fail(error, "%s: %lld bytes, more than the %d that are read as one piece", path, (long long)status.st_size,
             JSON_MAX_TREE_BYTES);
        return NULL;
    }
    char *text = NULL;
    size_t size = 0;
    if (read_file(path, &text, &size, error) != 0) return NULL;
    yajl_val tree = json_parse(text, size, path, error);
    free(text);
    return tree;
}

// The value of `key` in an object; NULL if `object` is NULL, no object, or has no such key. Of two equal keys the last
// counts, as in Python.
static inline yajl_val json_member(yajl_val object, const char *key) {
    if (!YAJL_IS_OBJECT(object)) return NULL;
    for (size_t i = object->u.object.len; i-- > 0;)
        if (strcmp(object->u.object.keys[i], key) == 0) return object->u.object.values[i];
    return NULL;
}

// The getters return 1 and set *value; 0 if the key is missing or null, *value untouched (so set the default before);
// -1 if it is there with another type or out of range. `name` is the file, for the error line.

static inline int json_get_double(yajl_val object, const char *key, double *value, const char *name, Error *error) {
    yajl_val member = json_member(object, key);
    if (!member || YAJL_IS_NULL(member)) return 0;
    if (!YAJL_IS_DOUBLE(member) || !isfinite(member->u.number.d))
        return fail(error, "%s: \"%s\" must be a finite number", name, key);
    *value = member->u.number.d;
    return 1;
}

static inline int json_get_int64(yajl_val object, const char *key, int64_t *value, const char *name, Error *error) {
    yajl_val member = json_member(object, key);
    if (!member || YAJL_IS_NULL(member)) return 0;
    if (!YAJL_IS_INTEGER(member)) return fail(error, "%s: \"%s\" must be a whole number", name, key);
    *value = member->u.number.i;
    return 1;
}

static inline int json_get_int(yajl_val object, const char *key, int *value, const char *name, Error *error) {
    int64_t wide = 0;
    int found = json_get_int64(object, key, &wide, name, error);
    if (found != 1) return found;
    if (wide < INT32_MIN || wide > INT32_MAX)
        return fail(error, "%s: \"%s\" is out of range: %lld", name, key, (long long)wide);
    *value = (int)wide;
    return 1;
}

static inline int json_get_bool(yajl_val object, const char *key, int *value, const char *name, Error *error) {
    yajl_val member = json_member(object, key);
    if (!member || YAJL_IS_NULL(member)) return 0;
    if (!YAJL_IS_TRUE(member) && !YAJL_IS_FALSE(member))
        return fail(error, "%s: \"%s\" must be true or false", name, key);
    *value = YAJL_IS_TRUE(member);
    return 1;
}

// The string belongs to the tree.
static inline int json_get_string(yajl_val object, const char *key, const char **value, const char *name,
                                  Error *error) {
    yajl_val member = json_member(object, key);
    if (!member || YAJL_IS_NULL(member)) return 0;
    if (!YAJL_IS_STRING(member)) return fail(error, "%s: \"%s\" must be a string", name, key);
    *value = member->u.string;
    return 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers of a stream arrive as text (YAJL itself would end the whole parse at 1e999 or at 20 digits)

// The number as a double, correctly rounded; infinite where its exponent is too large. The text needs no closing zero.
static inline double json_text_double(const char *text, size_t length) {
    // With a point among up to 15 digits, they and the power of ten are doubles, so that the division alone rounds;
    // without a point nothing is divided.
    static const double powers[16] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                      1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
    size_t at = length > 0 && text[0] == '-', point = length;
    int64_t digits = 0;
    for (; length <= 16 && at < length; at++) {
        if (text[at] == '.' && point == length)
            point = at;
        else if (text[at] >= '0' && text[at] <= '9')
            digits = 10 * digits + (text[at] - '0');
        else
            break;
    }
    if (at == length) {
        double value = (double)digits / powers[point < length ? length - 1 - point : 0];
        return text[0] == '-' ? -value : value;
    }
    char small[64], *copy = length < sizeof small ? small : (char *)allocate(length + 1);
    memcpy(copy, text, length);
    copy[length] = 0;
    double value = strtod(copy, NULL);
    if (copy != small) free(copy);
    return value;
}

// 1 and *value if the number is whole and fits ("12" and "12.0" do), else 0.
static inline int json_text_int64(const char *text, size_t length, int64_t *value) {
    const double exact = 9007199254740992.0;  // 2^53: below it doubles hold every whole number
    double wide = json_text_double(text, length);
    char copy[32];
    if (fabs(wide) >= exact && length < sizeof copy) {
        memcpy(copy, text, length);
        copy[length] = 0;
        char *end;
        errno = 0;
        *value = strtoll(copy, &end, 10);
        if (*end == 0) return errno == 0;
    }
    if (!(fabs(wide) <= exact) || wide != floor(wide)) return 0;
    *value = (int64_t)wide;
    return 1;
}

// Runs a file through YAJL's callbacks (see yajl_parse.h; set yajl_number, not yajl_integer and yajl_double). A
// callback that returns 0 ends the parse: it has written its reason into `error`. Strings may hold invalid UTF-8 and
// zero bytes. 0, or -1 on a file that cannot be read or is not JSON.
static inline int json_stream(const char *path, const yajl_callbacks *callbacks, void *context, Error *error) {
    if (is_directory(path)) return fail(error, "%s: is a folder, not a file", path);
    FILE *file = fopen(path, "rb");
    if (!file) return fail(error, "%s: cannot be opened: %s", path, strerror(errno));
    yajl_handle parser = yajl_alloc(callbacks, NULL, context);
    if (!parser) {
        fclose(file);
        return fail(error, "%s: out of memory", path);
    }
    yajl_config(parser, yajl_dont_validate_strings, 1);
    unsigned char *buffer = (unsigned char *)allocate(JSON_CHUNK_BYTES);
    yajl_status status = yajl_status_ok;
    size_t held = 0;       // bytes at the start of the buffer that no parser call has seen
    long long offset = 0;  // of buffer[0] in the file
    int in_string = 0, escaped = 0, at_end = 0;
    unsigned char inside[256] = {0}, outside[256] = {0};  // the characters at which the search below stops
    inside['"'] = inside['\\'] = outside['"'] = outside['N'] = outside['I'] = 1;
    while (status == yajl_status_ok && !at_end) {
        size_t got = fread(buffer + held, 1, JSON_CHUNK_BYTES - held, file);
        at_end = got == 0;
        size_t end = held + got, from = 0, at = 0;
        if (offset == 0 && end >= 3 && memcmp(buffer, "\xEF\xBB\xBF", 3) == 0) from = at = 3;  // a byte order mark
        for (; at < end && status == yajl_status_ok; at++) {
            if (escaped) {
                escaped = 0;
                continue;
            }
            const unsigned char *stops = in_string ? inside : outside;
            while (at < end && !stops[buffer[at]]) at++;
            if (at == end) break;
            unsigned char c = buffer[at];
            if (c == '\\') escaped = 1;
            if (c == '"') in_string = !in_string;
            if (c != 'N' && c != 'I') continue;
            // Outside strings these two letters begin Python's words and nothing else. A word cut by the buffer's end
            // waits for the next read.
            const char *word = c == 'N' ? "NaN" : "Infinity";
            size_t length = strlen(word);
            if (at + length > end && !at_end) break;
            if (at + length > end || memcmp(buffer + at, word, length) != 0) continue;
            status = yajl_parse(parser, buffer + from, at - from);
            if (status == yajl_status_ok) status = yajl_parse(parser, (const unsigned char *)"1e999", 5);
            from = at + length;
            at = from - 1;
        }
        if (status == yajl_status_ok) status = yajl_parse(parser, buffer + from, at - from);
        if (status != yajl_status_ok) {
            offset += (long long)(from + yajl_get_bytes_consumed(parser));
            break;
        }
        held = end - at;
        memmove(buffer, buffer + at, held);
        offset += (long long)at;
    }
    int read_error = ferror(file);
    fclose(file);
    free(buffer);
    if (status == yajl_status_ok && !read_error) status = yajl_complete_parse(parser);
    if (status == yajl_status_error) {
        unsigned char *why = yajl_get_error(parser, 0, NULL, 0);
        size_t length = strcspn((const char *)why, "\n");
        fail(error, "%s: not valid JSON near byte %lld: %.*s", path, offset, (int)length, (const char *)why);
        yajl_free_error(parser, why);
    }
    yajl_free(parser);
    if (read_error) return fail(error, "%s: read error", path);
    return status == yajl_status_ok ? 0 : -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

// Length of the well-formed UTF-8 character at `text` (RFC 3629), or 0.
static inline int utf8_length(const unsigned char *text) {
    if (text[0] < 0x80) return 1;
    int length = text[0] >= 0xC2 && text[0] < 0xE0 ? 2 : text[0] >= 0xE0 && text[0] < 0xF0 ? 3 : 0;
    if (text[0] >= 0xF0 && text[0] < 0xF5) length = 4;
    for (int i = 1; i < length; i++)
        if ((text[i] & 0xC0) != 0x80) return 0;
    if (text[0] == 0xE0 && text[1] < 0xA0) return 0;   // longer than it need be
    if (text[0] == 0xED && text[1] >= 0xA0) return 0;  // half of a surrogate pair
    if (text[0] == 0xF0 && text[1] < 0x90) return 0;
    if (text[0] == 0xF4 && text[1] >= 0x90) return 0;  // past U+10FFFF
    return length;
}

// Writes text as a JSON string with its quotes; a byte that is not UTF-8 becomes U+FFFD. "<" is escaped too: without it
// no text can end the script element of an HTML page.
static inline void json_print_string(FILE *file, const char *text) {
    fputc('"', file);
    for (const unsigned char *at = (const unsigned char *)text; *at;) {
        int length = utf8_length(at);
        if (*at == '"' || *at == '\\') {
            fprintf(file, "\\%c", *at);
        } else if (*at < 0x20 || *at == 0x7F || *at == '<') {
            fprintf(file, "\\u%04x", *at);
        } else if (length == 0) {
            fputs("\xEF\xBF\xBD", file);
        } else {
            fwrite(at, 1, (size_t)length, file);
        }
        at += length ? length : 1;
    }
    fputc('"', file);
}

// 17 digits bring a double back bit for bit. JSON has no NaN and no infinity: those become null.
static inline void json_print_number(FILE *file, double value) {
    if (isfinite(value))
        fprintf(file, "%.17g", value);
    else
        fputs("null", file);
}

#endif
