/*
Checks of data/sha256.h, data/fileset.h and of what the program says about a damaged checkpoint: what a kill leaves, as
a folder made by hand, and what becomes of it. dev/survive.py does the same with real kills. Included by test_detr.c
after test_dataset.h, whose fixtures it uses.
*/
#ifndef DETR_TEST_FILESET_H
#define DETR_TEST_FILESET_H

#include <sys/resource.h>

static void test_sha256(void) {
    // The examples of FIPS 180-2, appendix B, and the checksum of nothing.
    static const char *const known[4][2] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {NULL, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};  // a million times "a"
    enum { MILLION = 1000000 };
    char *many = (char *)allocate(MILLION + 1);
    memset(many, 'a', MILLION);
    for (int k = 0; k < 4; k++) {
        const char *text = known[k][0] ? known[k][0] : many;
        const size_t size = strlen(text);
        static const size_t pieces[5] = {MILLION, 1, 63, 64, 65};
        for (int p = 0; p < 5; p++) {
            char hex[SHA256_HEX + 1];
            Sha256 sum;
            sha256_begin(&sum);
            for (size_t at = 0; at < size; at += pieces[p])
                sha256_add(&sum, text + at, size - at < pieces[p] ? size - at : pieces[p]);
            sha256_end(&sum, hex);
            check(strcmp(hex, known[k][1]) == 0, "sha256: %zu bytes in pieces of %zu: %s", size, pieces[p], hex);
        }
    }
    char hex[SHA256_HEX + 1];
    Error error;
    fixture_bytes("sum", many, MILLION);
    check(sha256_file(fixture_path("sum"), hex, &error) == 0 && strcmp(hex, known[3][1]) == 0, "sha256: a file");
    check(sha256_file(fixture_path("absent"), hex, &error) == -1, "sha256: a file that is missing");
    free(many);
}

static const char *const SET_NAMES[2] = {"config.json", "log.txt"};

// 1 if FIXTURE/path holds exactly this text; NULL: if there is no such file.
static int fixture_is(const char *path, const char *text) {
    char *found = NULL;
    size_t size;
    Error unused;
    const int there = is_file(fixture_path(path)) && read_file(fixture_path(path), &found, &size, &unused) == 0,
              same = there && text ? strcmp(found, text) == 0 : there == (text != NULL);
    free(found);
    return same;
}

// Puts a set of two files into FIXTURE/folder. 0, or -1.
static int put_set(const char *folder, const char *text, int keep) {
    Error error;
    if (make_directories(fixture_path(folder), &error) != 0 || fileset_begin(fixture_path(folder), &error) != 0)
        return -1;
    for (int i = 0; i < 2; i++) {
        FILE *file = fileset_create(fixture_path(folder), SET_NAMES[i]);
        if (file) fputs(text, file);
        if (fileset_close(file, fixture_path(folder), SET_NAMES[i], &error) != 0) return -1;
    }
    return fileset_commit(fixture_path(folder), keep, &error);
}

static int nothing_left(void) {
    return !is_directory(fixture_path("set/.next")) && !is_directory(fixture_path("set/.old")) &&
           !is_directory(fixture_path("set/.commit"));
}

static void test_fileset_order(void) {
    Error error;
    check(put_set("set", "1", 1) == 0 && fixture_is("set/log.txt", "1") && nothing_left(), "fileset: the first set");
    check(!is_directory(fixture_path("set/previous")), "fileset: nothing before the first set");
    check(put_set("set", "2", 1) == 0 && fixture_is("set/log.txt", "2") && fixture_is("set/previous/log.txt", "1") &&
              nothing_left(),
          "fileset: the second set keeps the first");
    check(fileset_check(fixture_path("set"), SET_NAMES, 2, &error) == 0 &&
              fileset_check(fixture_path("set/previous"), SET_NAMES, 2, &error) == 0,
          "fileset: both have their checksums");
    check(put_set("set", "3", 0) == 0 && fixture_is("set/log.txt", "3") && fixture_is("set/previous/log.txt", "1"),
          "fileset: a set that keeps nothing leaves what was kept");

    // What a kill leaves, and what the next start makes of it.
    fixture_text("set/.next/log.txt", "half");
    check(fileset_settle(fixture_path("set"), &error) == 0 && fixture_is("set/log.txt", "3") && nothing_left(),
          "fileset: killed while files were written");
    fixture_text("set/.next/log.txt", "whole");
    fixture_text("set/.old/log.txt", "3");
    check(fileset_settle(fixture_path("set"), &error) == 0 && fixture_is("set/log.txt", "3") &&
              fixture_is("set/previous/log.txt", "1") && nothing_left(),
          "fileset: killed before the rename");
    fixture_text("set/.commit/log.txt", "4");
    fixture_text("set/.old/log.txt", "3");
    char *path = fileset_path(fixture_path("set"), "log.txt"),
         *other = fileset_path(fixture_path("set"), "config.json");
    check(strcmp(path, fixture_path("set/.commit/log.txt")) == 0 && strcmp(other, fixture_path("set/config.json")) == 0,
          "fileset: after the rename a reader takes %s and %s", path, other);
    free(path);
    free(other);
    check(fileset_has(fixture_path("set"), "log.txt") && fileset_has(fixture_path("set"), "config.json") &&
              !fileset_has(fixture_path("set"), "ema.safetensors"),
          "fileset: what the set has");
    check(fileset_settle(fixture_path("set"), &error) == 0 && fixture_is("set/log.txt", "4") &&
              fixture_is("set/config.json", "3") && fixture_is("set/previous/log.txt", "3") &&
              fixture_is("set/previous/config.json", NULL) && nothing_left(),
          "fileset: killed after the rename");
    fixture_text("first/.commit/log.txt", "1");
    check(fileset_has(fixture_path("first"), "log.txt"), "fileset: the first set, killed after the rename");
    fixture_text("set/.commit/log.txt", "5");
    check(fileset_settle(fixture_path("set"), &error) == 0 && fixture_is("set/log.txt", "5") &&
              fixture_is("set/previous/log.txt", "3") && nothing_left(),
          "fileset: killed while files were moved");
}

static void test_fileset_checksums(void) {
    Error error;
    put_set("sums", "text", 0);
    char *sums = NULL;
    size_t size;
    char *folder = format_string("%s", fixture_path("sums"));
    if (read_file(fixture_path("sums/SHA256SUMS"), &sums, &size, &error) != 0) {
        check(0, "checksums: %s", error.text);
        return;
    }
    check(size == 2 * SHA256_HEX + strlen("  config.json\n  log.txt\n") &&
              strstr(sums, "  config.json\n") < strstr(sums, "  log.txt\n"),
          "checksums: two lines, sorted by name: %s", sums);
    const struct {
        const char *file, *text, *named;
    } cases[] = {{"sums/log.txt", "texu", "sums/log.txt"},
                 {"sums/log.txt", "tex", "sums/log.txt"},
                 {"sums/config.json", "text ", "sums/config.json"},
                 {"sums/SHA256SUMS", "", "SHA256SUMS: is damaged: it has no line for config.json"},
                 {"sums/SHA256SUMS", "nonsense\n", "SHA256SUMS: is damaged: line 1"}};
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        fixture_text(cases[c].file, cases[c].text);
        check(fileset_check(folder, SET_NAMES, 2, &error) == -1 && strstr(error.text, cases[c].named),
              "checksums: %s with \"%s\": %s", cases[c].file, cases[c].text, error.text);
        fixture_text(cases[c].file, strstr(cases[c].file, "SUMS") ? sums : "text");
    }
    for (size_t cut = 0; cut < size; cut++) {
        fixture_bytes("sums/SHA256SUMS", sums, cut);
        check(fileset_check(folder, SET_NAMES, 2, &error) == -1, "checksums: cut to %zu bytes", cut);
    }
    for (size_t bit = 0; bit < 8 * size; bit += 7) {
        sums[bit / 8] = (char)(sums[bit / 8] ^ 1 << bit % 8);
        fixture_bytes("sums/SHA256SUMS", sums, size);
        check(fileset_check(folder, SET_NAMES, 2, &error) == -1, "checksums: their bit %zu flipped", bit);
        sums[bit / 8] = (char)(sums[bit / 8] ^ 1 << bit % 8);
    }
    fixture_bytes("sums/SHA256SUMS", sums, size);
    check(fileset_check(folder, SET_NAMES, 2, &error) == 0, "checksums: whole again: %s", error.text);
    remove(fixture_path("sums/log.txt"));
    check(fileset_check(folder, SET_NAMES, 2, &error) == -1 && strstr(error.text, "sums/log.txt: is missing"),
          "checksums: a file that is missing: %s", error.text);
    check(fileset_check(folder, SET_NAMES, 1, &error) == 0, "checksums: only the files that are asked for");
    remove(fixture_path("sums/SHA256SUMS"));
    check(fileset_check(folder, SET_NAMES, 2, &error) == 0, "checksums: none, as in a folder of somebody else");
    free(folder);
    free(sums);
}

static void test_fileset_lock(void) {
    Error error;
    char *folder = format_string("%s", fixture_path("set")), *mine = format_string("process %ld on ", (long)getpid());
    fixture_text("set/.lock", "process 1 on a machine that is gone\n");
    const int first = fileset_lock(folder, &error), second = fileset_lock(folder, &error);
    check(first >= 0, "lock: of a process that is gone");
    check(second == -1 && strstr(error.text, folder) && strstr(error.text, mine), "lock: held, by whom: %s",
          error.text);
    close(first);
    const int third = fileset_lock(folder, &error);
    check(third >= 0, "lock: free again");
    close(third);
    check(fileset_lock(fixture_path("nowhere"), &error) == -1, "lock: of no folder");
    free(folder);
    free(mine);
}

// What is said about damage, and what to do about it.
static void test_damaged_checkpoint(void) {
    Error error;
    Settings settings = settings_for("./train_detr", "train", TRAIN);
    put_set("a run", "1", 1);
    put_set("a run", "2", 1);
    char *folder = format_string("%s", fixture_path("a run")), *previous = format_string("%s/previous", folder),
         *command = format_string("go on with  cp -r '%s/.' '%s' && ./train_detr train --resume '%s'", previous, folder,
                                  folder);
    flag_set(&settings, "resume", folder, FROM_USER);
    check(training_check_resumed(&settings, &error) == 0, "damage: none: %s", error.text);
    flag_set(&settings, "resume", previous, FROM_USER);
    fixture_text("a run/trainer_state.json", "");
    check(training_check_resumed(&settings, &error) == -1 && strstr(error.text, command),
          "damage: OUT/previous is no run of its own: %s", error.text);
    remove(fixture_path("a run/trainer_state.json"));
    flag_set(&settings, "resume", folder, FROM_USER);
    fixture_text("a run/log.txt", "3");
    check(training_check_resumed(&settings, &error) == -1 && strstr(error.text, "a run/log.txt: ") &&
              strstr(error.text, command),
          "damage: %s", error.text);
    settings.command = PREDICT;
    check(checkpoint_check(&settings, "resume", SET_NAMES, 2, &error) == -1 && strstr(error.text, "--resume ") &&
              strstr(error.text, previous) && !strstr(error.text, "go on"),
          "damage: for one who reads: %s", error.text);
    check(checkpoint_check_weights(&settings, "resume", "model.safetensors", &error) == 0,
          "damage: not of what is read");
    fixture_text("a run/previous/config.json", "3");
    settings.command = TRAIN;
    check(training_check_resumed(&settings, &error) == -1 && !strstr(error.text, "whole"), "damage: of both: %s",
          error.text);
    put_set("a run/best", "1", 0);
    check(training_check_resumed(&settings, &error) == -1 && strstr(error.text, "/best/."),
          "damage: the best is whole: %s", error.text);
    free(folder);
    free(previous);
    free(command);
}

// A file that cannot be written is named and not left by half; what is no file is not removed.
static void test_half_files(void) {
    struct rlimit limit, before;
    Error error;
    static const float zeros[1000] = {0};
    const SafeTensor tensor = {"zeros", "F32", 1, {1000}, zeros};
    char *path = format_string("%s", fixture_path("half"));
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before);
    limit = before;
    limit.rlim_cur = 100;
    setrlimit(RLIMIT_FSIZE, &limit);
    FILE *file = fopen(path, "w");
    for (int i = 0; i < 1000 && file; i++) fputs("more ", file);
    const int closed = file ? coco_close(file, path, &error) : 0;
    check(closed == -1 && strstr(error.text, path) && !is_file(path), "half a file of results: %s", error.text);
    check(safetensors_write(path, &tensor, 1, &error) == -1 && strstr(error.text, path) && !is_file(path),
          "half a file of tensors: %s", error.text);
    setrlimit(RLIMIT_FSIZE, &before);
    if (access("/dev/full", W_OK) == 0) {
        file = fopen("/dev/full", "w");
        if (file) fputs("more", file);
        check(file && coco_close(file, "/dev/full", &error) == -1 && access("/dev/full", F_OK) == 0,
              "a device is not removed");
    }
    Error more;
    memset(&more, 0, sizeof more);
    for (int i = 0; i < 500; i++) fail_more(&more, "one\n%d,", i);
    check(strncmp(more.text, "one?0,one?1,", 12) == 0 && strlen(more.text) == sizeof more.text - 1,
          "errors: more of them");
    free(path);
}

static void test_fileset(void) {
    if (!fixture_root("fileset")) return;
    test_sha256();
    test_fileset_order();
    test_fileset_checksums();
    test_fileset_lock();
    test_damaged_checkpoint();
    test_half_files();
    fixture_remove(dataset_test_root);
}

#endif
