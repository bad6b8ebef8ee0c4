// rewrite.c: FILE.cu in, C++ out, on the same lines: the two things in CUDA C++ that no macro can give a plain
// compiler.
//
//     k<T><<<grid, block, bytes, stream>>>(a, b);  ->  emu::launch(k<T>, "k<T>", emu::Config(grid, block, bytes,
//     stream))(a, b);
//     __shared__ float x[8][9];                    ->  static char x_key; auto &x = *emu::shared<float[8][9]>(&x_key,
//     "x"); extern __shared__ T x[];                     ->  T *const x = (T *)emu::dynamic_shared(16);
//
// One declarator a __shared__ statement, no initialiser; no launch inside a macro. What it does not understand stays
// and is a syntax error. Comments, strings and files that are included are left alone.
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *out;  // what is written so far
static size_t length;

static void put(const char *text, size_t bytes) {
    memcpy(out + length, text, bytes);
    length += bytes;
}

static int is_name(char c) { return isalnum((unsigned char)c) || c == '_'; }

// The end of the comment, string or character that starts at p; p itself if none does.
static const char *skip(const char *p, const char *start) {
    if (p[0] == '/' && p[1] == '/') return p + strcspn(p, "\n");
    if (p[0] == '/' && p[1] == '*') return strstr(p, "*/") ? strstr(p, "*/") + 2 : p + strlen(p);
    if (*p != '"' && (*p != '\'' || (p > start && is_name(p[-1])))) return p;  // 1'000 is a number
    const char *end = p + 1;
    while (*end && *end != *p && *end != '\n') end += *end == '\\' && end[1] ? 2 : 1;
    return *end == *p ? end + 1 : end;
}

// p is at <<<, the kernel's name is the end of `out`. Returns the place behind >>>, or NULL.
static const char *launch(const char *p) {
    const char *end = strstr(p, ">>>");
    size_t name = length;
    while (name && isspace((unsigned char)out[name - 1])) name--;
    if (name && out[name - 1] == '>') {
        int depth = 0;
        do {
            name--;
            depth += out[name] == '>' ? 1 : out[name] == '<' ? -1 : 0;
        } while (name && depth);
    }
    while (name && (is_name(out[name - 1]) || out[name - 1] == ':')) name--;
    if (!end || name == length) return NULL;
    char *kernel = strndup(out + name, length - name);
    length = name;
    length += (size_t)sprintf(out + length, "emu::launch(%s, \"%s\", emu::Config(", kernel, kernel);
    put(p + 3, (size_t)(end - p - 3));
    put("))", 2);
    free(kernel);
    return end + 3;
}

// p is behind __shared__. Returns the semicolon, or NULL.
static const char *declaration(const char *p, int is_extern) {
    const char *semicolon = strchr(p, ';'), *alignment = "1", *type = p;
    int digits = 1;
    while (isspace((unsigned char)*type)) type++;
    if (strncmp(type, "__align__", 9) == 0 || strncmp(type, "alignas", 7) == 0) {
        alignment = strchr(type, '(') + 1;
        digits = (int)(strchr(alignment, ')') - alignment);
        type = alignment + digits + 1;
        while (isspace((unsigned char)*type)) type++;
    }
    if (!semicolon || semicolon < type) return NULL;
    const char *end = memchr(type, '[', (size_t)(semicolon - type));  // of the name
    if (!end) end = semicolon;
    int bounds = (int)(semicolon - end);
    while (end > type && isspace((unsigned char)end[-1])) end--;
    const char *name = end;
    while (name > type && is_name(name[-1])) name--;
    int letters = (int)(end - name);
    if (name == type || !letters || memchr(type, ',', (size_t)(name - type)) != NULL) {
        // a comma in the type's template arguments is rare enough to be refused, two declarators must be
        return NULL;
    }
    if (is_extern) {
        length += (size_t)sprintf(out + length, "%.*s*const %.*s = (%.*s*)emu::dynamic_shared(%.*s)",
                                  (int)(name - type), type, letters, name, (int)(name - type), type, digits, alignment);
    } else {
        length += (size_t)sprintf(
            out + length, "static char %.*s_key; auto &%.*s = *emu::shared<%.*s%.*s>(&%.*s_key, \"%.*s\", %.*s)",
            letters, name, letters, name, (int)(name - type), type, bounds, semicolon - bounds, letters, name, letters,
            name, digits, alignment);
    }
    return semicolon;
}

int main(int count, char **arguments) {
    FILE *file = count == 2 ? fopen(arguments[1], "rb") : NULL;
    if (!file) {
        fprintf(stderr, "usage: rewrite FILE.cu > FILE.cpp: %s\n", count == 2 ? "cannot be read" : "one file");
        return 1;
    }
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *text = calloc(size + 1, 1);
    out = malloc(16 * size + 4096);  // no replacement is 16 times as long as what it replaces
    if (!text || !out || fread(text, 1, size, file) != size) return 1;
    fclose(file);
    printf("#line 1 \"%s\"\n", arguments[1]);
    for (const char *p = text, *next; *p; p = next) {
        if ((next = skip(p, text)) > p) {
            put(p, (size_t)(next - p));
        } else if (strncmp(p, "<<<", 3) == 0 && (next = launch(p)) != NULL) {
        } else if (strncmp(p, "__shared__", 10) == 0 && !is_name(p[10]) && (p == text || !is_name(p[-1]))) {
            size_t end = length;
            while (end && isspace((unsigned char)out[end - 1])) end--;
            int is_extern = end >= 6 && strncmp(out + end - 6, "extern", 6) == 0;
            size_t before = length;
            if (is_extern) length = end - 6;
            next = declaration(p + 10, is_extern);
            if (!next) {
                length = before;
                next = p + 10;
                put(p, 10);
            }
        } else {
            next = p + 1;
            put(p, 1);
        }
    }
    fwrite(out, 1, length, stdout);
    return fflush(stdout) != 0;
}
