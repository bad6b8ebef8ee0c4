/*
Checks of data/json.h, data/safetensors.h and data/dataset.h. Included by test_detr.c, which defines `check`.
Every fixture is written at run time into a folder that is removed at the end.
*/
#ifndef DETR_TEST_DATASET_H
#define DETR_TEST_DATASET_H

#include "dataset.h"
#include "inspect.h"
#include "safetensors.h"

// ---------------------------------------------------------------------------------------------------------------------
// Fixtures

static char dataset_test_root[64];

// Makes the folder of the fixtures of a test of this name. 1, or 0.
static int fixture_root(const char *name) {
    snprintf(dataset_test_root, sizeof dataset_test_root, "/tmp/test_%s_XXXXXX", name);
    const int made = mkdtemp(dataset_test_root) != NULL;
    check(made, "%s: a folder for fixtures in /tmp", name);
    return made;
}

// Path of a fixture; good until the eighth call after.
static const char *fixture_path(const char *name) {
    static char paths[8][512];
    static int turn;
    turn = (turn + 1) % 8;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", dataset_test_root, name);
    return paths[turn];
}

// Writes `size` bytes to a fixture, its folders made as needed.
static void fixture_bytes(const char *name, const void *bytes, size_t size) {
    char folder[512];
    Error unused;
    snprintf(folder, sizeof folder, "%s", fixture_path(name));
    *strrchr(folder, '/') = 0;
    make_directories(folder, &unused);
    FILE *file = fopen(fixture_path(name), "wb");
    if (!file) return;
    fwrite(bytes, 1, size, file);
    fclose(file);
}

static void fixture_text(const char *name, const char *text) { fixture_bytes(name, text, strlen(text)); }

static void fixture_picture(const char *name, int width, int height) {
    Error unused;
    Image image = {width, height, (unsigned char *)allocate((size_t)width * (size_t)height * 3)};
    fixture_bytes(name, "", 0);
    image_write(fixture_path(name), &image, &unused);
    image_free(&image);
}

// Removes a file, or a folder with all that is in it.
static void fixture_remove(const char *path) {
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && (entry = readdir(folder)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        char *inside = format_string("%s/%s", path, entry->d_name);
        fixture_remove(inside);
        free(inside);
    }
    if (folder) closedir(folder);
    remove(path);
}

static int has_text(const char *text, const char *part) { return strstr(text, part) != NULL; }

// 1 if some problem of the data set holds `part`.
static int has_problem(const Dataset *set, const char *part) {
    for (int i = 0; i < set->num_problems; i++)
        if (has_text(set->problems[i], part)) return 1;
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Files

static void test_files(void) {
    Error error;
    char *bytes;
    size_t size;
    SafeFile tensors;
    int width, height;
    const char *pipe = fixture_path("pipe.jpg"), *large = fixture_path("large");
    const int made = mkfifo(pipe, 0600) == 0;  // nobody writes: whoever opened it would wait for ever
    check(made && read_file(pipe, &bytes, &size, &error) != 0 && has_text(error.text, "pipe.jpg: is a pipe"),
          "files: a pipe is not read");
    check(made && image_read_size(pipe, &width, &height, &error) != 0 && has_text(error.text, "is a pipe"),
          "files: a pipe is no picture");
    check(made && safetensors_open(&tensors, pipe, &error) != 0 && has_text(error.text, "no file"),
          "files: a pipe holds no tensors");
    check(read_file(dataset_test_root, &bytes, &size, &error) != 0 && has_text(error.text, "is a folder"),
          "files: nor is a folder");
    fixture_text("large", "x");
    check(truncate(large, (off_t)READ_FILE_MAX + 1) == 0 && read_file(large, &bytes, &size, &error) != 0 &&
              has_text(error.text, "1073741825 bytes, more than"),
          "files: too long to be read as one piece");
}

// ---------------------------------------------------------------------------------------------------------------------
// JSON

static void test_json(void) {
    Error error;
    const char *text = "{\"a\": 1.5, \"b\": 7, \"c\": \"x\", \"d\": null, \"e\": true, \"b\": 8, \"f\": 99999999999}";
    yajl_val tree = json_parse(text, strlen(text), "t", &error);
    double number = 0;
    int64_t whole = 0;
    int narrow = 0, yes = 0;
    const char *string = NULL;
    check(json_get_double(tree, "a", &number, "t", &error) == 1 && number == 1.5, "json: a number");
    check(json_get_int64(tree, "b", &whole, "t", &error) == 1 && whole == 8, "json: of equal keys the last counts");
    check(json_get_int(tree, "f", &narrow, "t", &error) == -1, "json: a number out of int's range");
    check(json_get_int64(tree, "a", &whole, "t", &error) == -1 && has_text(error.text, "\"a\" must be a whole"),
          "json: 1.5 is not whole");
    check(json_get_string(tree, "c", &string, "t", &error) == 1 && strcmp(string, "x") == 0, "json: a string");
    check(json_get_double(tree, "c", &number, "t", &error) == -1, "json: text for a number");
    check(
        json_get_double(tree, "d", &number, "t", &error) == 0 && json_get_double(tree, "z", &number, "t", &error) == 0,
        "json: null and missing are missing");
    check(json_get_bool(tree, "e", &yes, "t", &error) == 1 && yes, "json: true");
    yajl_tree_free(tree);

    static const char *const bad[] = {"", "{", "{\"a\":}", "[1,]", "{} x", "\"abc", "nul", "{\"a\":NaN}", "[\"\\"};
    for (int i = 0; i < (int)(sizeof bad / sizeof bad[0]); i++) {
        tree = json_parse(bad[i], strlen(bad[i]), "t", &error);
        check(tree == NULL && has_text(error.text, "not valid JSON"), "json: refused: %s", bad[i]);
        yajl_tree_free(tree);
    }
    char *deep = (char *)allocate(200001);
    memset(deep, '[', 200000);
    check(json_parse(deep, 200000, "t", &error) == NULL && has_text(error.text, "nested"), "json: nesting is bounded");
    free(deep);
    check(json_parse("[]\0[]", 5, "t", &error) == NULL, "json: a zero byte is refused");

    char *out = NULL;
    size_t size = 0;
    FILE *file = open_memstream(&out, &size);
    json_print_string(file,
                      "a\"\\\n\x01<\xC3\xA4 \xF0\x9F\x98\x80 \xC3( \xED\xA0\x80 \xC0\xAF \xF4\x90\x80\x80 \xE2\x82");
    json_print_number(file, 0.1);
    json_print_number(file, NAN);
    fclose(file);
#define BAD "\xEF\xBF\xBD"
    check(strcmp(out, "\"a\\\"\\\\\\u000a\\u0001\\u003c\xC3\xA4 \xF0\x9F\x98\x80 " BAD "( " BAD BAD BAD " " BAD BAD
                      " " BAD BAD BAD BAD " " BAD BAD "\"0.10000000000000001null") == 0,
          "json: escapes, UTF-8 repair, 17 digits: %s", out);
#undef BAD
    free(out);

    int64_t id = 0;
    check(json_text_int64("12", 2, &id) && id == 12 && json_text_int64("12.0", 4, &id) && id == 12 &&
              json_text_int64("1e3", 3, &id) && id == 1000 && json_text_int64("9223372036854775807", 19, &id) &&
              id == INT64_MAX && !json_text_int64("9223372036854775808", 19, &id) && !json_text_int64("1.5", 3, &id) &&
              !json_text_int64("1e999", 5, &id),
          "json: whole numbers");
    check(isinf(json_text_double("1e999", 5)) && json_text_double("0.25xyz", 4) == 0.25, "json: doubles");
    int same = 1;
    for (uint32_t i = 0; i < 4000; i++) {  // digits with a point anywhere, at times with a sign or an exponent
        char text[40];
        uint64_t digits =
            (uint64_t)random_word(6, RANDOM_TEST, 0, i, 0, 0) << 32 | random_word(6, RANDOM_TEST, 0, i, 0, 1);
        int sign = i % 3 == 0, length = sign + sprintf(text + sign, "%llu", (unsigned long long)(digits >> i % 60));
        if (sign) text[0] = '-';
        int point = sign + 1 + (int)random_below(6, RANDOM_TEST, 0, i, 0, 2, (uint32_t)(length - sign));
        if (i % 7 && point < length) {
            memmove(text + point + 1, text + point, (size_t)(length - point) + 1);
            text[point] = '.';
            length++;
        }
        if (i % 11 == 0) length += sprintf(text + length, "e%d", (int)(i % 40) - 20);
        double value = json_text_double(text, (size_t)length), truth = strtod(text, NULL);
        same = same && memcmp(&value, &truth, sizeof value) == 0;
    }
    double zero = json_text_double("-0.0", 4);
    check(same && zero == 0 && signbit(zero), "json: doubles are strtod's to the last bit");
    check(json_text_int64("9007199254740993", 16, &id) && id == 9007199254740993, "json: whole numbers past 2^53");
}

// ---------------------------------------------------------------------------------------------------------------------
// Safetensors

// Writes a file from a header and `data_bytes` zeros; returns the error line, or "" if it opens.
static const char *safetensors_try(const char *header, size_t data_bytes) {
    static Error error;
    size_t length = strlen(header), total = 8 + length + data_bytes;
    unsigned char *bytes = (unsigned char *)allocate(total);
    uint64_t wide = length;
    memcpy(bytes, &wide, 8);
    memcpy(bytes + 8, header, length);
    fixture_bytes("t.safetensors", bytes, total);
    free(bytes);
    SafeFile file;
    if (safetensors_open(&file, fixture_path("t.safetensors"), &error) != 0) return error.text;
    safetensors_close(&file);
    return "";
}

static void test_safetensors(void) {
    Error error;
    float floats[6] = {1, -2, 3.5f, 0, 1e-30f, 6};
    double doubles[1] = {0.1};
    int64_t longs[2] = {-3, (int64_t)1 << 40};
    uint16_t halves[6] = {0x3C00, 0xC000, 0x0001, 0x7BFF, 0xFC00, 0x8000}, bfloats[2] = {0x3F80, 0xC049};
    int8_t bytes[3] = {-128, 0, 127};
    SafeTensor tensors[7] = {{"z.weight", "F32", 2, {2, 3}, floats}, {"scalar", "F64", 0, {0}, doubles},
                             {"long", "I64", 1, {2}, longs},         {"half", "F16", 1, {6}, halves},
                             {"bf", "BF16", 1, {2}, bfloats},        {"a \"b\"", "I8", 3, {1, 3, 1}, bytes},
                             {"none", "F32", 2, {0, 5}, NULL}};
    check(safetensors_write(fixture_path("a.safetensors"), tensors, 7, &error) == 0 &&
              safetensors_write(fixture_path("b.safetensors"), tensors, 7, &error) == 0,
          "safetensors: written");
    char *first = NULL, *second = NULL;
    size_t first_size = 0, second_size = 1;
    read_file(fixture_path("a.safetensors"), &first, &first_size, &error);
    read_file(fixture_path("b.safetensors"), &second, &second_size, &error);
    check(first_size == second_size && memcmp(first, second, first_size) == 0, "safetensors: same bytes twice");
    uint64_t header = 1;
    if (first_size >= 8) memcpy(&header, first, 8);
    check(header % 8 == 0 && first_size == 8 + header + 24 + 8 + 16 + 12 + 4 + 3, "safetensors: header padded to 8");
    free(first);
    free(second);

    SafeFile file;
    int opened = safetensors_open(&file, fixture_path("a.safetensors"), &error) == 0;
    check(opened && file.count == 7, "safetensors: read back");
    if (!opened) return;
    const SafeEntry *weight = safetensors_find(&file, "z.weight"), *half = safetensors_find(&file, "half");
    const SafeEntry *bf = safetensors_find(&file, "bf"), *whole = safetensors_find(&file, "long");
    const SafeEntry *scalar = safetensors_find(&file, "scalar"), *byte = safetensors_find(&file, "a \"b\"");
    const SafeEntry *none = safetensors_find(&file, "none");
    check(safetensors_find(&file, "weight") == NULL, "safetensors: an unknown name is not found");
    int there = weight && half && bf && whole && scalar && byte && none;
    check(there, "safetensors: every name is found");
    if (there) {
        int64_t shape[2] = {2, 3}, other[2] = {3, 2};
        float back[6];
        safetensors_read_float(weight, back);
        check(safetensors_has_shape(weight, 2, shape) && !safetensors_has_shape(weight, 2, other),
              "safetensors: shape");
        check(memcmp(back, floats, sizeof back) == 0, "safetensors: floats bit for bit");
        check(safetensors_element(half, 0) == 1 && safetensors_element(half, 1) == -2 &&
                  safetensors_element(half, 2) == ldexp(1, -24) && safetensors_element(half, 3) == 65504 &&
                  safetensors_element(half, 4) == -INFINITY && signbit(safetensors_element(half, 5)),
              "safetensors: F16");
        check(safetensors_element(bf, 0) == 1 && safetensors_element(bf, 1) == -3.140625, "safetensors: BF16");
        check(safetensors_element(whole, 0) == -3 && safetensors_element(whole, 1) == 1099511627776.0,
              "safetensors: I64");
        check(safetensors_element(byte, 0) == -128 && safetensors_element(byte, 2) == 127, "safetensors: I8");
        check(scalar->ndim == 0 && scalar->count == 1 && safetensors_element(scalar, 0) == 0.1, "safetensors: F64");
        check(none->count == 0 && none->ndim == 2, "safetensors: an empty tensor");
    }
    safetensors_close(&file);

#define ENTRY(name, type, shape, begin, end) \
    "\"" name "\":{\"dtype\":\"" type "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"
    static const struct {
        const char *header;
        size_t data_bytes;
        const char *problem;
    } cases[] = {
        {"{" ENTRY("a", "F32", "[1]", "0", "4") "}", 4, ""},
        {"{" ENTRY("b", "F32", "[1]", "4", "8") "," ENTRY("a", "F32", "[1]", "0", "4") "}  ", 8, ""},
        {"{}", 0, ""},
        {"{" ENTRY("a", "F32", "[1]", "4", "8") "}", 8, "a hole"},
        {"{" ENTRY("a", "F32", "[1]", "0", "4") "," ENTRY("b", "F32", "[1]", "0", "4") "}", 4, "overlap"},
        {"{" ENTRY("a", "F32", "[1]", "0", "4") "}", 5, "its tensors end at 4"},
        {"{" ENTRY("a\\nb", "F32", "[1]", "4", "8") "}", 8, "tensor a?b begins"},
        {"{" ENTRY("a", "F32", "[1]", "0", "4") "}", 3, "not inside"},
        {"{" ENTRY("a", "F32", "[1]", "-4", "0") "}", 4, "not inside"},
        {"{" ENTRY("a", "F32", "[2]", "0", "4") "}", 4, "type and shape"},
        {"{" ENTRY("a", "F64", "[2305843009213693952]", "0", "0") "}", 0, "type and shape"},
        {"{" ENTRY("a", "F32", "[4611686018427387904,4]", "0", "0") "}", 0, "overflows"},
        {"{" ENTRY("a", "F32", "[-1]", "0", "4") "}", 4, "not a number >= 0"},
        {"{" ENTRY("a", "F32", "[1.0]", "0", "4") "}", 4, "not a number >= 0"},
        {"{" ENTRY("a", "F32", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", 4, "at most 8"},
        {"{" ENTRY("a", "F4", "[1]", "0", "4") "}", 4, "dtype F4"},
        {"{" ENTRY("a", "F32", "[1]", "0", "\"4\"") "}", 4, "two whole numbers"},
        {"{" ENTRY("a", "F32", "[1]", "0", "4") "," ENTRY("a", "F32", "[1]", "4", "8") "}", 8, "twice"},
        {"{\"a\":3}", 0, "not an object"},
        {"[]", 0, "not a JSON object"},
        {"{\"a\":", 0, "not valid JSON"},
    };
#undef ENTRY
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        const char *got = safetensors_try(cases[i].header, cases[i].data_bytes);
        check(cases[i].problem[0] ? has_text(got, cases[i].problem) : got[0] == 0, "safetensors: %s with %zu bytes: %s",
              cases[i].header, cases[i].data_bytes, got);
    }
    fixture_bytes("t.safetensors", "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F{}", 10);
    check(safetensors_open(&file, fixture_path("t.safetensors"), &error) != 0, "safetensors: a header past the end");
    fixture_bytes("t.safetensors", "abc", 3);
    check(safetensors_open(&file, fixture_path("t.safetensors"), &error) != 0, "safetensors: three bytes");
    check(safetensors_open(&file, fixture_path("absent"), &error) != 0, "safetensors: a missing file");
}

// ---------------------------------------------------------------------------------------------------------------------
// COCO

#define COCO_CATS "\"categories\":[{\"id\":23,\"name\":\"dog\"},{\"id\":1,\"name\":\"cat\"}]"
#define COCO_GOOD_IMAGE "{\"id\":5,\"file_name\":\"a.png\",\"width\":64,\"height\":48}"
#define COCO_GOOD_BOX "{\"id\":1,\"image_id\":5,\"category_id\":1,\"bbox\":[1,2,3,4.5],\"area\":9,\"iscrowd\":0}"

// Opens a file made of three lists without pictures; 1 on success, else 0 and `error`.
static int coco_try(Dataset *set, const char *images, const char *annotations, const char *folder, Error *error) {
    char *text = format_string("{\"images\":[%s],\"annotations\":[%s]," COCO_CATS "}", images, annotations);
    fixture_text("coco.json", text);
    free(text);
    return dataset_open_coco_file(set, fixture_path("coco.json"), folder, error) == 0;
}

static void test_coco_annotations(void) {
#define BOX(bbox) "{\"id\":2,\"image_id\":5,\"category_id\":23,\"bbox\":" bbox "}"
#define IDS(id, image, category) \
    "{\"id\":" id ",\"image_id\":" image ",\"category_id\":" category ",\"bbox\":[1,1,2,2]}"
#define MORE(member) "{\"id\":2,\"image_id\":5,\"category_id\":23,\"bbox\":[1,1,2,2]," member "}"
    static const struct {
        const char *entry, *problem;  // "": none
        int annotations, targets;     // with the good one
    } cases[] = {
        {BOX("[0,0,64,48]"), "", 2, 2},
        {BOX("[-5,-5,6,6]"), "", 2, 2},
        {BOX("[-1e300,-1e300,1.7e308,1.7e308]"), "", 2, 2},
        {BOX("[1,1,1e308,1e308]"), "", 2, 2},
        {BOX("[1,\"2\",3,4]"), "bbox holds text", 1, 1},
        {BOX("[1,null,3,4]"), "bbox holds null", 1, 1},
        {BOX("[1,[2],3,4]"), "bbox holds a list", 1, 1},
        {BOX("null"), "bbox is null", 1, 1},
        {BOX("\"1 2 3 4\""), "bbox is text", 1, 1},
        {BOX("{\"x\":1}"), "bbox is a list or object", 1, 1},
        {BOX("7"), "bbox is a number", 1, 1},
        {BOX("[]"), "bbox has 0 numbers", 1, 1},
        {BOX("[1,2,3]"), "bbox has 3 numbers", 1, 1},
        {BOX("[1,2,3,4,5]"), "bbox has 5 numbers", 1, 1},
        {BOX("[1,NaN,3,4]"), "bbox is not finite", 1, 1},
        {BOX("[1,2,-Infinity,4]"), "bbox is not finite", 1, 1},
        {BOX("[1,2,1e999,4]"), "bbox is not finite", 1, 1},
        {BOX("[1,2,0,4]"), "is empty", 2, 1},
        {BOX("[1,2,3,-4]"), "is empty", 2, 1},
        {BOX("[64,2,3,4]"), "is outside", 2, 1},
        {BOX("[1,48,3,4]"), "is outside", 2, 1},
        {BOX("[-3,2,3,4]"), "is outside", 2, 1},
        {IDS("2", "6", "23"), "image id 6 is not", 1, 1},
        {IDS("2", "5", "0"), "category id 0 is not", 1, 1},
        {IDS("2", "5.0", "23"), "", 2, 2},
        {IDS("\"2\"", "\"5\"", "\"23\""), "", 2, 2},
        {IDS("\"2a\"", "5", "23"), "id is text", 1, 1},
        {IDS("2", "\"\"", "23"), "image_id is text", 1, 1},
        {IDS("2", "5", "\"-\""), "category_id is text", 1, 1},
        {IDS("2", "5", "null"), "category_id is null", 1, 1},
        {IDS("2", "5", "1.5"), "category_id 1.5 is not a whole number", 1, 1},
        {IDS("2", "99999999999999999999", "1"), "is not a whole number", 1, 1},
        {MORE("\"bbox\":[3,3,4,4]"), "", 2, 2},
        {MORE("\"iscrowd\":1"), "", 2, 1},
        {MORE("\"iscrowd\":true"), "", 2, 1},
        {MORE("\"iscrowd\":null"), "iscrowd is null", 1, 1},
        {MORE("\"area\":\"9\""), "area is text", 1, 1},
        {MORE("\"area\":NaN"), "area is not finite", 1, 1},
        {MORE("\"segmentation\":[[1,null,[\"x\"]],{\"bbox\":[1]}]"), "", 2, 2},
        {"{\"id\":2,\"image_id\":5,\"category_id\":23}", "has no bbox", 1, 1},
        {"{\"id\":2,\"category_id\":23,\"bbox\":[1,1,2,2]}", "has no image_id", 1, 1},
        {"{\"image_id\":5,\"category_id\":23,\"bbox\":[1,1,2,2]}", "", 2, 2},
        {"{}", "has no", 1, 1},
        {"null", "annotations[1]: is null, not an object", 1, 1},
        {"[{\"id\":1}]", "is a list", 1, 1},
        {"\"x\"", "is text", 1, 1},
    };
#undef BOX
#undef IDS
#undef MORE
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        Dataset set;
        Error error;
        char *entries = format_string("%s,%s", COCO_GOOD_BOX, cases[i].entry);
        int opened = coco_try(&set, COCO_GOOD_IMAGE, entries, NULL, &error);
        free(entries);
        check(opened, "coco: opens with %s", cases[i].entry);
        if (!opened) continue;
        check(set.num_annotations == cases[i].annotations && set.num_targets == cases[i].targets,
              "coco: %s: %d annotations, %d targets", cases[i].entry, set.num_annotations, set.num_targets);
        check(
            cases[i].problem[0] ? set.num_problems == 1 && has_problem(&set, cases[i].problem) : set.num_problems == 0,
            "coco: %s: listed as \"%s\"", cases[i].entry, set.num_problems ? set.problems[0] : "");
        const Annotation *good = &set.annotations[0];
        check(good->id == 1 && good->class_index == 1 && good->x == 1 && good->y == 2 && good->width == 3 &&
                  good->height == 4.5 && good->area == 9,
              "coco: the entry beside %s is whole", cases[i].entry);
        dataset_free(&set);
    }
}

static void test_coco_images(void) {
    static const struct {
        const char *entry, *problem;
    } cases[] = {
        {"{\"id\":6,\"file_name\":\"sub/b.png\"}", ""},
        {"{\"id\":6}", "has no file_name"},
        {"{\"file_name\":\"a.png\"}", "has no id"},
        {"{\"id\":6,\"file_name\":7}", "file_name is a number"},
        {"{\"id\":6,\"file_name\":\"\"}", "file_name is empty"},
        {"{\"id\":6,\"file_name\":\"a.png\\u0000b\"}", "zero byte"},
        {"{\"id\":\"six\",\"file_name\":\"a.png\"}", "id is text"},
        {"{\"id\":6,\"file_name\":\"a.png\",\"width\":\"64\",\"height\":48}", "width is text"},
        {"{\"id\":6,\"file_name\":\"a.png\",\"width\":64,\"height\":0}", "height 0 is not a size"},
        {"{\"id\":6,\"file_name\":\"../a.png\"}", "leaves the picture folder"},
        {"{\"id\":6,\"file_name\":\"sub/../../a.png\"}", "leaves the picture folder"},
        {"{\"id\":6,\"file_name\":\"/etc/passwd\"}", "leaves the picture folder"},
        {"{\"id\":6,\"file_name\":\"absent.png\"}", "picture is missing"},
        {"{\"id\":6,\"file_name\":\"sub\"}", "picture is missing"},
        {"{\"id\":6,\"file_name\":\"broken.png\"}", "picture is damaged"},
        {"6", "images[1]: is a number"},
    };
    char folder[512];
    snprintf(folder, sizeof folder, "%s", fixture_path("pictures"));
    fixture_picture("pictures/a.png", 64, 48);
    fixture_picture("pictures/sub/b.png", 20, 30);
    fixture_text("pictures/broken.png", "\x89PNG");
    fixture_picture("a.png", 8, 8);
    Dataset set;
    Error error;
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        char *entries = format_string("%s,%s", COCO_GOOD_IMAGE, cases[i].entry);
        int opened = coco_try(&set, entries, COCO_GOOD_BOX, folder, &error);
        int good = cases[i].problem[0] == 0;
        free(entries);
        check(opened, "coco: opens with image %s", cases[i].entry);
        if (!opened) continue;
        check(set.num_images == 1 + good && set.num_targets == 1 && set.skipped_images == !good,
              "coco: image %s: %d images", cases[i].entry, set.num_images);
        check(good ? set.num_problems == 0 : set.num_problems == 1 && has_problem(&set, cases[i].problem),
              "coco: image %s: listed as \"%s\"", cases[i].entry, set.num_problems ? set.problems[0] : "");
        if (good)
            check(set.images[1].width == 20 && set.images[1].height == 30, "coco: a missing size is the picture's");
        dataset_free(&set);
    }
    // Boxes of a picture that is missing leave with it, under its one line
    if (coco_try(&set, "{\"id\":4,\"file_name\":\"absent.png\"}," COCO_GOOD_IMAGE,
                 "{\"id\":9,\"image_id\":4,\"category_id\":1,\"bbox\":[1,1,2,2]}," COCO_GOOD_BOX, folder, &error)) {
        check(set.num_images == 1 && set.images[0].id == 5 && set.num_annotations == 1 && set.annotations[0].id == 1 &&
                  set.num_problems == 1 && dataset_image_index(&set, 5) == 0 && dataset_image_index(&set, 4) == -1,
              "coco: a missing picture leaves with its boxes");
        dataset_free(&set);
    } else {
        check(0, "coco: opens with a missing picture: %s", error.text);
    }
    check(!coco_try(&set, "{\"id\":4,\"file_name\":\"absent.png\"}", "", folder, &error) &&
              has_text(error.text, "no usable pictures") && has_text(error.text, "absent.png"),
          "coco: no picture there at all");
}

// Opened for scoring alone, images need no file name and categories no name: their ids take its place.
static void test_coco_nameless(void) {
    Dataset set;
    Error error;
    fixture_text("whole.json",
                 "{\"images\":[{\"id\":7},{\"id\":5,\"file_name\":null,\"width\":null}],\"annotations\":[" COCO_GOOD_BOX
                 "],\"categories\":[{\"id\":1},{\"id\":3,\"name\":null},{\"id\":4,\"name\":\"dog\"},{\"id\":9}]}");
    int opened = dataset_open_coco_file(&set, fixture_path("whole.json"), NULL, &error) == 0;
    check(opened, "coco: without names: %s", opened ? "" : error.text);
    if (!opened) return;
    check(set.num_images == 2 && set.num_categories == 4 && set.num_annotations == 1 && set.num_problems == 0 &&
              strcmp(set.images[0].name, "7") == 0 && strcmp(set.categories[1].name, "3") == 0 &&
              strcmp(set.categories[2].name, "dog") == 0 && strcmp(set.categories[3].name, "9") == 0,
          "coco: without names: ids instead");
    dataset_free(&set);
    check(dataset_open_coco_file(&set, fixture_path("whole.json"), dataset_test_root, &error) != 0,
          "coco: without names, but with pictures: refused");
}

static void test_coco_whole(void) {
    static const struct {
        const char *text, *problem;
    } cases[] = {
        {"{\"images\":[" COCO_GOOD_IMAGE "," COCO_GOOD_IMAGE "],\"annotations\":[]," COCO_CATS "}",
         "image id 5 is there twice"},
        {"{\"images\":[" COCO_GOOD_IMAGE "],\"annotations\":[],\"categories\":[{\"id\":1,\"name\":\"a\"},{\"id\":1,"
         "\"name\":\"b\"}]}",
         "category id 1 is there twice"},
        {"{\"images\":[" COCO_GOOD_IMAGE "]," COCO_CATS "}", "has no list \"annotations\""},
        {"{\"images\":7,\"annotations\":[]," COCO_CATS "}", "has no list \"images\""},
        {"{\"images\":{},\"annotations\":[]," COCO_CATS "}", "\"images\" is not a list"},
        {"{\"images\":[],\"annotations\":[]," COCO_CATS "}", "no usable pictures"},
        {"{\"images\":[" COCO_GOOD_IMAGE "],\"annotations\":[],\"categories\":[]}", "no classes"},
        {"[]", "not a COCO annotation file"},
        {"7", "has no list"},
        {"", "not valid JSON"},
        {"{\"images\":[" COCO_GOOD_IMAGE, "not valid JSON"},
        {"{\"images\":[Nan]}", "not valid JSON"},
        {"{\"images\":[{]}", "not valid JSON"},
    };
    Dataset set;
    Error error;
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        fixture_text("whole.json", cases[i].text);
        int opened = dataset_open_coco_file(&set, fixture_path("whole.json"), NULL, &error) == 0;
        check(!opened && has_text(error.text, cases[i].problem), "coco: %s: %s", cases[i].text,
              opened ? "opened" : error.text);
        if (opened) dataset_free(&set);
    }
    check(dataset_open_coco_file(&set, fixture_path("absent.json"), NULL, &error) != 0 &&
              dataset_open_coco_file(&set, dataset_test_root, NULL, &error) != 0,
          "coco: no file");
    char *deep = format_string("{\"images\":%0*d", 5000, 0);
    memset(deep + 10, '[', 5000);
    fixture_text("whole.json", deep);
    free(deep);
    check(dataset_open_coco_file(&set, fixture_path("whole.json"), NULL, &error) != 0 && has_text(error.text, "nested"),
          "coco: nesting is bounded");

    // A word of Python that two reads share
    for (int shared = 1; shared < 3; shared++) {
        const char *begin = "{\"images\":[" COCO_GOOD_IMAGE "]," COCO_CATS ",\"pad\":\"";
        const char *end =
            "\",\"annotations\":[{\"image_id\":5,\"category_id\":1,\"bbox\":[1,2,NaN,4]}," COCO_GOOD_BOX "]}";
        int pad = JSON_CHUNK_BYTES - shared - (int)strlen(begin) - (int)(strstr(end, "NaN") - end);
        char *text = format_string("%s%0*d%s", begin, pad, 0, end);
        fixture_text("whole.json", text);
        free(text);
        int opened = dataset_open_coco_file(&set, fixture_path("whole.json"), NULL, &error) == 0;
        check(opened && set.num_annotations == 1 && has_problem(&set, "not finite"), "coco: NaN across two reads: %s",
              opened ? "" : error.text);
        if (opened) dataset_free(&set);
    }

    // Lists in any order, images mixed: boxes end up with their image, in the file's order.
    FILE *file = fopen(fixture_path("whole.json"), "wb");
    fprintf(file, "\xEF\xBB\xBF{\"info\":{\"images\":[{\"id\":1}],\"x\":\"NaN\\\"NaN\"},\"annotations\":[");
    for (int i = 0; i < 40000; i++)
        fprintf(file, "%s{\"id\":%d,\"image_id\":%d,\"category_id\":%d,\"area\":1,\"bbox\":[%d,0,1,%s]}", i ? "," : "",
                i, i % 3 * 10 - 10, i % 2 ? 1 : 23, i % 7, i % 4 == 3 ? "NaN" : "2");
    fprintf(file, "]," COCO_CATS ",\"images\":[");
    for (int i = 0; i < 3; i++)
        fprintf(file, "%s{\"file_name\":\"%d\\ud83d.png\",\"id\":%d}", i ? "," : "", i, 10 - 10 * i);
    fprintf(file, "]}");
    fclose(file);
    int opened = dataset_open_coco_file(&set, fixture_path("whole.json"), NULL, &error) == 0;
    check(opened, "coco: lists in any order: %s", opened ? "" : error.text);
    if (!opened) return;
    int good = set.num_images == 3 && set.num_annotations == 30000 && set.num_problems == 10000, seen = 0;
    for (int i = 0; i < set.num_images; i++) {
        const DatasetImage *image = &set.images[i];
        good &=
            image->id == 10 - 10 * i && image->first_annotation == seen && dataset_image_index(&set, image->id) == i;
        for (int a = 0; a < image->num_annotations; a++) {
            const Annotation *box = &set.annotations[seen + a];
            good &= box->id % 3 * 10 - 10 == image->id && box->class_index == box->id % 2 &&
                    box->x == (double)(box->id % 7);
            good &= a == 0 || box[-1].id < box->id;
        }
        seen += image->num_annotations;
    }
    check(good && seen == 30000, "coco: every box with its image and class, in the file's order");
    check(dataset_category_index(&set, 23) == 0 && dataset_category_index(&set, 1) == 1 &&
              dataset_category_index(&set, 0) == -1 && strcmp(set.categories[0].name, "dog") == 0,
          "coco: classes keep the file's order and ids");
    char *out = NULL;
    size_t size = 0;
    FILE *facts = open_memstream(&out, &size);
    dataset_print_facts(facts, &set);
    fclose(facts);
    check(has_text(out, "10000 entries") && has_text(out, "1       1   10000   10000       0       0  cat"),
          "coco: facts:\n%s", out);
    free(out);
    dataset_free(&set);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pascal VOC

#define VOC_BOX(x0, y0, x1, y1) \
    "<bndbox><xmin>" x0 "</xmin><ymin>" y0 "</ymin><xmax>" x1 "</xmax><ymax>" y1 "</ymax></bndbox>"

static void test_voc(void) {
    fixture_text("voc/Annotations/a.xml",
                 "<?xml version='1.0'?><annotation><object><name> dog\n</name><difficult>0</difficult>" VOC_BOX(
                     "10", "20.5", "30", "40") "<part><name>head</name>" VOC_BOX("1", "1", "2", "2") "</part></object>"
                 "<object><name>cat</name><difficult>1</difficult>" VOC_BOX("1", "1", "5", "5") "</object>"
                 "<object><name>cat</name>" VOC_BOX("212", "1", "212", "5") "</object>"
                 "<object><name>cat</name>" VOC_BOX("70", "1", "80", "5") "</object>"
                 "<object><name>cat</name>" VOC_BOX("1", "x", "5", "5") "</object>"
                 "<object><name>cat</name>" VOC_BOX("1", "nan", "5", "5") "</object>"
                 "<object><name>cat</name>" VOC_BOX("-1e308", "-1e308", "1e308", "1e308") "</object>"
                 "<object><name>cat</name><bndbox><xmin>1</xmin></bndbox></object>"
                 "<object>" VOC_BOX("1", "1", "5", "5") "</object>"
                 "<size><width>64</width><height>48</height></size></annotation>");
    fixture_text("voc/Annotations/b.xml", "<annotation></annotation>");
    fixture_text("voc/Annotations/c.xml", "<annotation><object><name>bird</name>");
    fixture_text("voc/Annotations/d.xml",
                 "<!DOCTYPE a [<!ENTITY e \"eeeeeeeeeeeeeeee\">]><annotation><object><name>&e;</name>" VOC_BOX(
                     "1", "1", "2", "2") "</object></annotation>");
    fixture_text("voc/Annotations/e.xml", "<html/>");
    fixture_text("voc/Annotations/only_val.xml",
                 "<annotation><object><name>ant</name>" VOC_BOX("1", "1", "5", "5") "</object></annotation>");
    fixture_picture("voc/JPEGImages/a.png", 64, 48);
    fixture_picture("voc/JPEGImages/b.jpg", 20, 30);
    for (const char *name = "cdef"; *name; name++) {
        char path[32];
        snprintf(path, sizeof path, "voc/JPEGImages/%c.png", *name);
        fixture_picture(path, 8, 8);
    }
    fixture_text("voc/ImageSets/Main/train.txt",
                 "\xEF\xBB\xBF"
                 "a\r\n\n  b -1\nc\nd\ne\nf\ng\n../a\n/etc/x\n");
    fixture_text("voc/ImageSets/Main/cat_train.txt", "a 1\n");
    fixture_text("voc/ImageSets/Main/trainval.txt", "");
    Dataset set;
    Error error;
    int opened = dataset_open(&set, fixture_path("voc"), "train", &error) == 0;
    check(opened, "voc: opens: %s", opened ? "" : error.text);
    if (!opened) return;
    check(strcmp(set.format, "VOC") == 0 && set.num_categories == 3 && strcmp(set.categories[0].name, "ant") == 0 &&
              strcmp(set.categories[1].name, "cat") == 0 && strcmp(set.categories[2].name, "dog") == 0,
          "voc: classes of every file, sorted");
    check(set.num_images == 2 && set.images[1].width == 20 && set.images[1].height == 30 &&
              set.images[1].num_annotations == 0 && strcmp(set.images[1].name, "b.jpg") == 0,
          "voc: a file without size or objects");
    check(set.num_annotations == 5 && set.num_targets == 2 && set.num_ignored == 1 && set.num_skipped == 2,
          "voc: %d boxes, %d targets, %d difficult, %d skipped", set.num_annotations, set.num_targets, set.num_ignored,
          set.num_skipped);
    const Annotation *box = &set.annotations[0];
    check(box->class_index == 2 && box->x == 10 && box->y == 20.5 && box->width == 20 && box->height == 19.5 &&
              box->area == 390,
          "voc: coordinates as written, parts passed over");
    static const char *const problems[] = {
        "object 3: box x 212",          "object 4: box x 70",          "object 5: ymin \"x\"",
        "object 6: ymin \"nan\"",       "object 8: has no complete",   "object 9: has no <name>",
        "c.xml: line 1: not valid XML", "d.xml: it declares entities", "e.xml: its root",
        "f.xml: cannot be opened",      "no picture JPEGImages/g",     "../a: name leaves",
        "/etc/x: name leaves"};
    for (int i = 0; i < 13; i++) check(has_problem(&set, problems[i]), "voc: listed: %s", problems[i]);
    check(set.num_problems == 13 && set.skipped_images == 7, "voc: %d problems", set.num_problems);
    dataset_free(&set);
    check(dataset_open(&set, fixture_path("voc"), "val", &error) != 0 &&
              has_text(error.text, "there are train, trainval"),
          "voc: a missing split lists those there: %s", error.text);
    check(
        dataset_open(&set, fixture_path("voc"), "trainval", &error) != 0 && has_text(error.text, "no usable pictures"),
        "voc: an empty list");
}

// ---------------------------------------------------------------------------------------------------------------------
// YOLO

static void test_yolo(void) {
    static const struct {
        const char *yaml;
        int second_id;  // 0: refused
        const char *second_name;
    } yamls[] = {
        {"train: x\nnames: ['cat', \"big dog\"]\nnc: 2\n", 1, "big dog"},
        {"names: [cat,\n  it, ]\n", 1, "it"},
        {"names:\n  0: cat  # first\n\n  7: 'it''s'\nnc: 2\n", 7, "it's"},
        {"nc: 2\r\nnames:\r\n- cat\r\n- a b\r\nother: [1, 2]\r\n", 1, "a b"},
        {"names: {0: cat, 3: \"a, b\"}\n", 3, "a, b"},
        {"names: # list\n  - cat\n  - c#", 1, "c#"},
        {"nc: 2\n", 0, ""},
        {"names: cat\n", 0, ""},
        {"names: []\n", 0, ""},
        {"names: [cat, dog\n", 0, ""},
        {"names: ['cat\n", 0, ""},
        {"names:\n  x: cat\n", 0, ""},
        {"names: {0: cat, 0: dog}\n", 0, ""},
        {"names: {0", 0, ""},
        {"", 0, ""},
    };
    fixture_picture("yolo/images/train/b.png", 100, 50);
    fixture_picture("yolo/images/train/a.jpg", 10, 10);
    fixture_text("yolo/images/train/c.png", "no picture");
    fixture_text("yolo/images/train/d.webp", "");
    fixture_text("yolo/images/train/notes.txt", "no picture either");
    fixture_text("yolo/labels/train/b.txt",
                 "0 0.5 0.5 0.2 0.4\r\n\n0 .5 .5 0 .1\n0 2 .5 .1 .1\n9 .5 .5 .1 .1\n0.5 .5 .5 .1 .1\n"
                 "0 .5 .5 .1\n0 .5 .5 .1 .1 .1\n0 x .5 .1 .1\n0 nan .5 .1 .1\n-1 .5 .5 .1 .1\n0 .5 .5 1e308 1e200");
    Dataset set;
    Error error;
    for (int i = 0; i < (int)(sizeof yamls / sizeof yamls[0]); i++) {
        fixture_text("yolo/data.yaml", yamls[i].yaml);
        int opened = dataset_open(&set, fixture_path("yolo"), "train", &error) == 0;
        check(opened == (yamls[i].second_id != 0), "yolo: %s: %s", yamls[i].yaml, opened ? "opened" : error.text);
        if (!opened) continue;
        check(set.num_categories == 2 && strcmp(set.categories[0].name, "cat") == 0 &&
                  set.categories[1].id == yamls[i].second_id &&
                  strcmp(set.categories[1].name, yamls[i].second_name) == 0,
              "yolo: names of %s", yamls[i].yaml);
        dataset_free(&set);
    }
    fixture_text("yolo/data.yaml", "names: {0: cat, 4: dog}\n");
    int opened = dataset_open(&set, fixture_path("yolo"), "train", &error) == 0;
    check(opened, "yolo: opens: %s", opened ? "" : error.text);
    if (!opened) return;
    check(set.num_images == 2 && strcmp(set.images[0].name, "a.jpg") == 0 && set.images[0].num_annotations == 0 &&
              set.images[1].width == 100 && set.images[1].height == 50 && set.num_without_targets == 1,
          "yolo: pictures in byte order; no label file: no boxes");
    check(set.num_annotations == 4 && set.num_targets == 2 && set.num_problems == 11, "yolo: %d boxes, %d problems",
          set.num_annotations, set.num_problems);
    const Annotation *box = &set.annotations[0];
    check(fabs(box->x - 40) < 1e-9 && fabs(box->y - 15) < 1e-9 && fabs(box->width - 20) < 1e-9 &&
              fabs(box->height - 20) < 1e-9,
          "yolo: pixels from parts");
    static const char *const problems[] = {
        "line 3: box",       "line 4: box", "line 5: class 9",     "line 6: class 0.5", "line 7: 4 numbers",
        "line 8: 6 numbers", "line 9: \"x", "line 10: not finite", "line 11: class -1", "c.png"};
    for (int i = 0; i < 10; i++) check(has_problem(&set, problems[i]), "yolo: listed: %s", problems[i]);
    check(has_problem(&set, "d.webp: not JPEG"), "yolo: a picture of another kind is listed");
    dataset_free(&set);
    fixture_text("yolo2/data.yaml", "\xEF\xBB\xBFnames: [cat]");
    fixture_text("yolo2/valid/labels/a.txt",
                 "\xEF\xBB\xBF"
                 "0 .5 .5 1 1");
    fixture_picture("yolo2/valid/images/a.png", 10, 10);
    opened = dataset_open(&set, fixture_path("yolo2"), "val", &error) == 0;
    check(opened && set.num_targets == 1, "yolo: valid/images beside valid/labels: %s", opened ? "" : error.text);
    if (opened) dataset_free(&set);
    check(dataset_open(&set, fixture_path("yolo"), "val", &error) != 0 && has_text(error.text, "there are train"),
          "yolo: a missing split lists those there");
}

// ---------------------------------------------------------------------------------------------------------------------
// Folders

static void test_folders(void) {
    const char *text = "{\"images\":[" COCO_GOOD_IMAGE "],\"annotations\":[" COCO_GOOD_BOX "]," COCO_CATS "}";
    Dataset set;
    Error error;
    Error unused;
    make_directories(fixture_path("empty"), &unused);
    check(dataset_open(&set, fixture_path("empty"), "train", &error) != 0 && has_text(error.text, "no data set found"),
          "folder: an empty one");
    check(dataset_open(&set, fixture_path("absent"), "train", &error) != 0 && has_text(error.text, "no such folder"),
          "folder: a missing one");
    static const struct {
        const char *json, *picture;
    } layouts[] = {{"annotations/instances_train2017.json", "train2017/a.png"},
                   {"annotations/instances_train.json", "images/train/a.png"},
                   {"annotations/instances_train2014.json", "train/a.png"},
                   {"annotations/instances_train.json", "images/a.png"},
                   {"annotations/instances_train.json", "a.png"},
                   {"train/_annotations.coco.json", "train/a.png"}};
    for (int i = 0; i < 6; i++) {
        char name[128];
        snprintf(name, sizeof name, "coco%d/%s", i, layouts[i].json);
        fixture_text(name, text);
        snprintf(name, sizeof name, "coco%d/%s", i, layouts[i].picture);
        fixture_picture(name, 64, 48);
        snprintf(name, sizeof name, "coco%d", i);
        int opened = dataset_open(&set, fixture_path(name), "train", &error) == 0;
        check(opened && strcmp(set.format, "COCO") == 0 && is_file(set.images[0].path), "folder: %s with %s: %s",
              layouts[i].json, layouts[i].picture, opened ? "" : error.text);
        if (opened) dataset_free(&set);
        check(dataset_has_split(fixture_path(name), "train") && !dataset_has_split(fixture_path(name), "val") &&
                  !dataset_has_split(fixture_path(name), "trai"),
              "folder: splits of %s", layouts[i].json);
    }
    fixture_text("coco0/annotations/instances_train2014.json", text);
    fixture_text("coco0/annotations/captions_val2017.json", "{}");
    check(dataset_open(&set, fixture_path("coco0"), "train", &error) != 0 && has_text(error.text, "more than one of") &&
              dataset_has_split(fixture_path("coco0"), "train2017"),
          "folder: two years fit");
    check(dataset_open(&set, fixture_path("coco0"), "val", &error) != 0 &&
              has_text(error.text, "there are train2014, train2017"),
          "folder: the splits there are listed");
    fixture_text("coco5/valid/_annotations.coco.json", text);
    check(dataset_has_split(fixture_path("coco5"), "val"), "folder: valid is val");
}

// ---------------------------------------------------------------------------------------------------------------------
// Inspection

// Writes a JPEG of 30 x 20 with an EXIF orientation.
static void fixture_turned(const char *name, int orientation) {
    char *bytes = NULL;
    size_t size = 0;
    Error unused;
    unsigned char exif[36] = "\xFF\xE1\0\42Exif\0\0MM\0*\0\0\0\10\0\1\1\22\0\3\0\0\0\1\0";
    exif[29] = (unsigned char)orientation;
    fixture_picture(name, 30, 20);
    if (read_file(fixture_path(name), &bytes, &size, &unused) != 0) return;
    char *whole = (char *)allocate(size + sizeof exif);
    memcpy(whole, bytes, 2);  // the start of image, then the marker
    memcpy(whole + 2, exif, sizeof exif);
    memcpy(whole + 2 + sizeof exif, bytes + 2, size - 2);
    fixture_bytes(name, whole, size + sizeof exif);
    free(whole);
    free(bytes);
}

// 1 if there are `count` findings of this kind, and one of them holds `part`.
static int has_finding(const Inspection *inspection, FindingKind kind, int count, const char *part) {
    int found = 0;
    for (int i = 0; i < inspection->num_findings[kind]; i++) found |= has_text(inspection->findings[kind][i], part);
    return inspection->num_findings[kind] == count && found;
}

static void test_inspect(void) {
#define IMAGE(id, name, size) "{\"id\":" id ",\"file_name\":\"" name "\"," size "}"
#define SIZED(width, height) "\"width\":" width ",\"height\":" height
#define BOX(id, image, class_, box) "{\"id\":" id ",\"image_id\":" image ",\"category_id\":" class_ ",\"bbox\":" box "}"
    static const struct {
        FindingKind kind;
        int count;
        const char *part;
    } cases[] = {
        {FOUND_LEFT_OUT, 1, "(id 9): box [5, 5, 0, 5] is empty"},
        {FOUND_UNREADABLE, 1, "cut.jpg: the JPEG is cut off"},
        {FOUND_KIND, 1, "wrong.jpg: is a PNG"},
        {FOUND_TURNED, 2, "turned.jpg: orientation 6, upright it is 20 x 30; its annotations have the size before"},
        {FOUND_TURNED, 2, "mirrored.jpg: orientation 2, upright it is 30 x 20"},
        {FOUND_SIZE, 2, "turned.jpg: is 20 x 30, its annotations say 30 x 20"},
        {FOUND_SIZE, 2, "small.png: is 8 x 8, its annotations say 64 x 48"},
        {FOUND_OUTSIDE, 2, "a.png: cat, x 60 y 40 width 5.5 height 2 reaches out of the picture (64 x 48)"},
        {FOUND_OUTSIDE, 2, "small.png: cat, x 20 y 20 width 9 height 9 is outside the picture (8 x 8)"},
        {FOUND_TINY, 1, "a.png: dog, x 1 y 1 width 0.5 height 8"},
        {FOUND_SAME_BOX, 1, "a.png: dog, x 1 y 2 width 3 height 4"},
        {FOUND_TOO_MANY, 1, "a.png: 5 boxes, 4 queries"},
        {FOUND_NO_BOX, 7, "pictures/wrong.jpg"},
        {FOUND_SAME_ID, 1, "annotation id 1"},
        {FOUND_NAMES, 1, "a.png (id 1) and A.jpg (id 7)"},
        {FOUND_COPIES, 1, "copy.png: the same as"},
        {FOUND_IN_BOTH, 1, "val/again.png: the same as"},
        {FOUND_CLASSES, 5, "\"cat\" (id 1) and \"C at\" (id -4): one class or two?"},
        {FOUND_CLASSES, 5, "\"C at\": its id -4 is negative"},
        {FOUND_CLASSES, 5, "\"C at\" (id -4): no box"},
    };
    Dataset train, val;
    Error error;
    char folder[512], other[512];
    snprintf(folder, sizeof folder, "%s", fixture_path("inspect/pictures"));
    snprintf(other, sizeof other, "%s", fixture_path("inspect/val"));
    fixture_picture("inspect/pictures/a.png", 64, 48);
    fixture_picture("inspect/pictures/copy.png", 64, 48);
    fixture_picture("inspect/pictures/small.png", 8, 8);
    fixture_picture("inspect/pictures/A.jpg", 11, 12);
    fixture_picture("inspect/val/again.png", 64, 48);
    fixture_picture("inspect/pictures/wrong.png", 9, 9);
    rename(fixture_path("inspect/pictures/wrong.png"), fixture_path("inspect/pictures/wrong.jpg"));
    fixture_turned("inspect/pictures/turned.jpg", 6);
    fixture_turned("inspect/pictures/mirrored.jpg", 2);
    fixture_picture("inspect/pictures/cut.jpg", 20, 20);
    if (truncate(fixture_path("inspect/pictures/cut.jpg"), 300) != 0) check(0, "inspect: a file that is cut off");
    fixture_text(
        "inspect/train.json",
        "{\"images\":[" IMAGE("1", "a.png", SIZED("64", "48")) "," IMAGE("2", "copy.png", SIZED("64", "48")) "," IMAGE(
            "3", "wrong.jpg", SIZED("9", "9")) "," IMAGE("4", "turned.jpg", SIZED("30", "20")) "," IMAGE("5", "cut.jpg",
                                                                                                        SIZED("20",
                                                                                                              "20")) ","
        IMAGE("6", "small.png", SIZED("64", "48")) "," IMAGE("7", "A.jpg", SIZED("11", "12")) "," IMAGE(
            "8", "mirrored.jpg", SIZED("30", "20")) "],\"annotations\":[" BOX("1", "1", "23", "[1,2,3,4]") "," BOX(
            "1", "1", "23", "[1,2,3,4]") "," BOX("2", "1", "1", "[1,2,3,4]") "," BOX("3", "1", "1", "[60,40,5.5,2]") ","
        BOX("4", "1", "23", "[1,1,0.5,8]") "," BOX("9", "1", "1", "[5,5,0,5]") "," BOX(
            "5", "6", "1", "[20,20,9,9]") "],\"categories\":[{\"id\":23,\"name\":\"dog\"},{\"id\":1,\"name\":"
                                          "\"cat\"},{\"id\":-4,\"name\":\"C at\"}]}");
    fixture_text("inspect/val.json", "{\"images\":[" IMAGE("1", "again.png", SIZED("64", "48")) "],\"annotations\":[],"
                                     "\"categories\":[{\"id\":23,\"name\":\"dog\"},{\"id\":1,\"name\":\"cat\"}]}");
#undef IMAGE
#undef SIZED
#undef BOX
    const int opened = dataset_open_coco_file(&train, fixture_path("inspect/train.json"), folder, &error) == 0 &&
                       dataset_open_coco_file(&val, fixture_path("inspect/val.json"), other, &error) == 0;
    check(opened, "inspect: opens: %s", opened ? "" : error.text);
    if (!opened) return;
    char *said[2] = {NULL, NULL};
    const int threads_before = omp_get_max_threads();
    for (int threads = 0; threads < 2; threads++) {
        Inspection inspection;
        size_t size;
        omp_set_num_threads(1 + 3 * threads);
        inspect(&inspection, &train, &val, 4);
        for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]) && threads == 0; i++)
            check(has_finding(&inspection, cases[i].kind, cases[i].count, cases[i].part), "inspect: %d %s: %s: %s",
                  inspection.num_findings[cases[i].kind], FINDINGS[cases[i].kind].key, cases[i].part,
                  inspection.num_findings[cases[i].kind] ? inspection.findings[cases[i].kind][0] : "");
        FILE *file = open_memstream(&said[threads], &size);
        inspection_print(file, &inspection);
        fputc('{', file);
        inspection_write(file, &inspection);
        fputc('}', file);
        fclose(file);
        inspection_free(&inspection);
    }
    omp_set_num_threads(threads_before);
    check(strcmp(said[0], said[1]) == 0, "inspect: the same for any number of threads");
    check(has_text(said[0], "pictures   ") && has_text(said[0],
                                                       "7 decoded, 1 cannot be; 6 sizes from 8 x 8 to 64 x 48, "
                                                       "most often 64 x 48 (2)"),
          "inspect: sizes of pictures: %s", said[0]);
    const char *json = strstr(said[0], "{\"splits\"");
    yajl_val tree = json ? json_parse(json, strlen(json), "inspect", &error) : NULL,
             splits = json_member(tree, "splits"), findings = json_member(tree, "findings");
    check(YAJL_IS_ARRAY(splits) && splits->u.array.len == 2 && YAJL_IS_ARRAY(findings) && findings->u.array.len == 28 &&
              has_text(said[0], "\"name\": \"cat\", \"boxes\": 3, \"small\": 3, \"medium\": 0, \"large\": 0}"),
          "inspect: JSON: %s", json ? json : "");
    yajl_tree_free(tree);
    free(said[0]);
    free(said[1]);
    dataset_free(&train);
    dataset_free(&val);
}

static void test_dataset(void) {
    if (!fixture_root("dataset")) return;
    test_files();
    test_json();
    test_safetensors();
    test_coco_annotations();
    test_coco_images();
    test_coco_nameless();
    test_coco_whole();
    test_voc();
    test_yolo();
    test_folders();
    test_inspect();
    fixture_remove(dataset_test_root);
}

#undef COCO_CATS
#undef COCO_GOOD_IMAGE
#undef COCO_GOOD_BOX
#undef VOC_BOX

#endif
