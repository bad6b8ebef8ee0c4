/*
fuzz.c: every reader of files, fed with anything. The input is written where the reader expects its file, in a small
folder in which all else is good, and the trainer's own functions open that folder.

    make fuzz [FUZZ=name] [FUZZ_SECONDS=60]   libFuzzer looks for inputs that break a reader
    make test-fuzz                            what is in dev/fuzz/seeds, each once: where the search begins, and all
that it ever found (needs no libFuzzer)

Under AddressSanitizer and UndefinedBehaviorSanitizer an input is a find if it crashes, leaks, overflows, takes more
than SECONDS of processor time, or asks for more memory at once than its reader's limit, which grows with the input's
size.
*/
#define TRAIN_DETR_NO_MAIN
#include "train_detr.c"

#include <sys/time.h>
#include <sys/wait.h>

#include "data/test_check.h"

// From the sanitizers' allocator_interface.h, which gcc does not bring.
int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void *, size_t),
                                              void (*on_free)(const volatile void *));

enum { SECONDS = 5 };  // of processor time an input; what a loaded machine takes for it does not count

static FILE *nowhere;  // where to readers print

// ---------------------------------------------------------------------------------------------------------------------
// The readers. folder: where the input lies

static char *inside(const char *folder, const char *name) { return format_string("%s/%s", folder, name); }

static void parse_picture(const char *folder) {
    char *path = inside(folder, "picture");
    Error error;
    Image image;
    int width, height;
    const int sized = image_read_size(path, &width, &height, &error) == 0;
    if (image_read(path, &image, &error) == 0 && (!sized || width != image.width || height != image.height)) abort();
    image_free(&image);
    free(path);
}

// The data set as `check` looks over it, and the first of its samples.
static void parse_data(const char *folder) {
    static const LoaderSettings settings = {.short_side = 32, .max_size = 64, .augment = AUGMENT_CROP};
    Error error;
    Dataset set;
    if (dataset_open(&set, folder, "train", &error) != 0) return;
    Inspection inspection;
    inspect(&inspection, &set, NULL, 2);
    inspection_print(nowhere, &inspection);
    inspection_write(nowhere, &inspection);
    inspection_free(&inspection);
    for (int i = 0; i < set.num_images && i < 4; i++) {
        Sample sample;
        sample_make(&sample, &set, &settings, 0, i);
        for (int b = 0; b < 4 * sample.num_boxes; b++)
            if (!(sample.boxes[b] >= 0 && sample.boxes[b] <= 1)) abort();
        sample_free(&sample);
    }
    dataset_free(&set);
}

// Annotations without pictures, as `score` takes them.
static void parse_annotations(const char *folder) {
    char *path = inside(folder, "annotations/instances_train.json");
    Error error;
    Dataset set;
    if (dataset_open_coco_file(&set, path, NULL, &error) == 0) dataset_free(&set);
    free(path);
    parse_data(folder);
}

static void parse_results(const char *folder) {
    char *truth = inside(folder, "annotations/instances_train.json"), *path = inside(folder, "results.json");
    Error error;
    Dataset set;
    EvalDetection *detections;
    CocoScores scores;
    int count;
    if (dataset_open_coco_file(&set, truth, NULL, &error) != 0) abort();
    if (coco_read_results(path, &set, &detections, &count, &error) == 0) {
        coco_score(&scores, &set, detections, count);
        coco_print(nowhere, &scores, set.categories);
        coco_scores_free(&scores);
        free(detections);
    }
    dataset_free(&set);
    free(truth);
    free(path);
}

static void parse_config(const char *folder) {
    Error error;
    Network network;
    config_read(&network, folder, &error);
    network_free(&network);
}

// A network of 700 numbers for the tensors.
static const ModelConfig SMALLEST = {.num_stages = 1,
                                     .depths = {1},
                                     .widths = {4},
                                     .stem_width = 4,
                                     .hidden_dim = 4,
                                     .nheads = 1,
                                     .dec_layers = 1,
                                     .dim_feedforward = 1,
                                     .num_queries = 1,
                                     .num_labels = 1};

static Model model;

static void parse_tensors(const char *folder) {
    char *path = inside(folder, "model.safetensors");
    Error error;
    SafeFile file;
    if (safetensors_open(&file, path, &error) == 0) {
        for (int i = 0; i < file.count; i++) {
            double *values = (double *)allocate((size_t)file.entries[i].count * sizeof *values);
            safetensors_read_double(&file.entries[i], values);
            free(values);
        }
        safetensors_close(&file);
    }
    for (int needed = WEIGHTS_ALL; needed <= WEIGHTS_OR_BACKBONE; needed++)
        weights_read(&model, path, (WeightsNeeded)needed, &error);
    moments_read(&model, path, &error);
    free(path);
}

static void parse_state(const char *folder) {
    char *path = inside(folder, "trainer_state.json"), name[] = "cell";
    Settings settings = settings_for("train_detr", "train", TRAIN);
    Category category = {1, name};
    Training run;
    Error error;
    training_init(&run, &settings);
    run.steps_per_epoch = 2;
    run.train.num_images = 4;
    run.train.num_categories = run.network.config.num_labels = run.network.config.dec_layers = 1;
    run.train.categories = &category;
    run.train_labels = (int *)allocate(sizeof(int));
    run.state_tree = json_read(path, &error);
    if (run.state_tree && settings_resume(&settings, json_member(run.state_tree, "flags"), path, &error) == 0 &&
        state_read(&run, path, &error) == 0 && run.train_labels[0] != 0)
        abort();
    memset(&run.train, 0, sizeof run.train);
    training_free(&run);
    free(path);
}

// Most bytes that a reader may ask for at once: `least` and so many for each byte of the input.
// Pictures: a block of 32 x 32 pixels of 3 bytes for each bit of a JPEG, 24 bytes for each bit that a byte of a PNG can
// hold after deflate's 1032 : 1 (image.h), and what the libraries take whatever the size.
// Data sets: a megabyte of a stream, and an entry of a list for a few bytes of text.
static const struct {
    const char *name, *file;
    void (*parse)(const char *folder);
    size_t least, for_each_byte;
} READERS[] = {
    {"jpeg", "picture", parse_picture, 9 << 20, 8 * 32 * 32 * 3},
    {"png", "picture", parse_picture, 1 << 20, 1032 * 24},
    {"coco", "annotations/instances_train.json", parse_annotations, 5 << 18, 64},
    {"voc", "Annotations/a.xml", parse_data, 5 << 18, 64},
    {"yolo", "labels/train/a.txt", parse_data, 5 << 18, 64},
    {"yaml", "data.yaml", parse_data, 5 << 18, 64},
    {"results", "results.json", parse_results, 5 << 18, 64},
    {"safetensors", "model.safetensors", parse_tensors, 1 << 16, 64},
    {"config", "config.json", parse_config, 1 << 16, 64},
    {"preprocessor", "preprocessor_config.json", parse_config, 1 << 16, 64},
    {"state", "trainer_state.json", parse_state, 1 << 16, 64},
};
enum { NUM_READERS = sizeof READERS / sizeof READERS[0] };

// ---------------------------------------------------------------------------------------------------------------------
// One input

static int reader = -1;
static char folder[64];
static size_t allowed = SIZE_MAX;

static void on_allocation(const volatile void *memory, size_t bytes) {
    (void)memory;
    if (bytes <= allowed) return;
    fprintf(stderr, "%zu bytes were asked for; an input of this size may ask for %zu\n", bytes, allowed);
    abort();
}
static void on_release(const volatile void *memory) { (void)memory; }

static void on_time(int signal) {
    (void)signal;
    static const char text[] = "more than 5 seconds of processor time\n";
    if (write(2, text, sizeof text - 1) < 0) _exit(1);
    abort();
}

static void set_timer(int seconds) {
    const struct itimerval timer = {{0, 0}, {seconds, 0}};
    setitimer(ITIMER_PROF, &timer, NULL);
}

static void write_file(const char *name, const void *bytes, size_t size) {
    char *path = inside(folder, name);
    FILE *file = fopen(path, "wb");
    if (!file || (size && fwrite(bytes, size, 1, file) != 1) || fclose(file) != 0) abort();
    free(path);
}

// Makes the folder with what is good around the input of reader number `which`.
static void begin(int which) {
    static const char *const COCO_FOLDERS[] = {"annotations", "train", NULL},
                             *const VOC_FOLDERS[] = {"Annotations", "ImageSets", "ImageSets/Main", "JPEGImages", NULL},
                             *const YOLO_FOLDERS[] = {"images", "images/train", "labels", "labels/train", NULL};
    static const char TRUTH[] =
        "{\"images\": [{\"id\": 1}, {\"id\": 2}], \"categories\": [{\"id\": 1}, {\"id\": 7}], \"annotations\": ["
        "{\"id\": 1, \"image_id\": 1, \"category_id\": 1, \"bbox\": [1, 1, 5, 5]},"
        "{\"id\": 2, \"image_id\": 2, \"category_id\": 7, \"bbox\": [2, 2, 40, 40], \"iscrowd\": 1},"
        "{\"id\": 3, \"image_id\": 2, \"category_id\": 1, \"bbox\": [0, 0, 9, 2]}]}";
    const char *const name = READERS[which].name;
    const char *const *folders = strcmp(name, "voc") == 0                                 ? VOC_FOLDERS
                                 : strcmp(name, "yolo") == 0 || strcmp(name, "yaml") == 0 ? YOLO_FOLDERS
                                                                                          : COCO_FOLDERS;
    reader = which;
    nowhere = fopen("/dev/null", "w");
    snprintf(folder, sizeof folder, "%s/fuzz.XXXXXX", is_directory("/dev/shm") ? "/dev/shm" : "/tmp");
    if (!nowhere || !mkdtemp(folder)) abort();
    for (int i = 0; folders[i]; i++) {
        char *path = inside(folder, folders[i]);
        if (mkdir(path, 0777) != 0) abort();
        free(path);
    }
    static const unsigned char GREY[5 * 4 * 3];
    Image picture = {5, 4, (unsigned char *)(uintptr_t)GREY};
    const char *const places[3] = {"train/a.png", "JPEGImages/a.png", "images/train/a.png"};
    char *path = inside(folder, places[folders == VOC_FOLDERS ? 1 : folders == YOLO_FOLDERS ? 2 : 0]);
    Error error;
    if (image_write(path, &picture, &error) != 0 || model_create(&model, &SMALLEST, 1, 1, 1, &error) != 0) abort();
    free(path);
    if (folders == VOC_FOLDERS) write_file("ImageSets/Main/train.txt", "a", 1);
    if (folders == YOLO_FOLDERS) write_file("data.yaml", "names: [cell, rest]", 19);
    if (strcmp(name, "yaml") == 0) write_file("labels/train/a.txt", "0 .5 .5 .4 .4\n", 14);
    if (strcmp(name, "results") == 0) write_file("annotations/instances_train.json", TRUTH, sizeof TRUTH - 1);
    if (strcmp(name, "config") == 0) write_file("preprocessor_config.json", "{}", 2);
    if (strcmp(name, "preprocessor") == 0) write_file("config.json", "{\"model_type\": \"detr\"}", 22);
    signal(SIGPROF, on_time);
    __sanitizer_install_malloc_and_free_hooks(on_allocation, on_release);
}

// Removes the folder.
static void end(void) {
    char *command = format_string("rm -rf %s", folder);
    if (system(command) != 0) perror(folder);
    free(command);
}

static void parse(const void *bytes, size_t size) {
    write_file(READERS[reader].file, bytes, size);
    set_timer(SECONDS);
    allowed = READERS[reader].least + size * READERS[reader].for_each_byte;
    READERS[reader].parse(folder);
    allowed = SIZE_MAX;
    set_timer(0);
}

// The reader called so; -1 if there is none.
static int find_reader(const char *name, size_t length) {
    for (int i = 0; i < NUM_READERS; i++)
        if (strlen(READERS[i].name) == length && strncmp(READERS[i].name, name, length) == 0) return i;
    return -1;
}

#ifdef LIBFUZZER
#include <zlib.h>

// ---------------------------------------------------------------------------------------------------------------------
// What libFuzzer calls

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const unsigned char *bytes, size_t size);
size_t LLVMFuzzerMutate(unsigned char *bytes, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(unsigned char *bytes, size_t size, size_t most, unsigned seed);

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    const char *name = getenv("FUZZ");
    const int which = name ? find_reader(name, strlen(name)) : -1;
    if (which < 0) {
        fprintf(stderr, "FUZZ must name one of:");
        for (int i = 0; i < NUM_READERS; i++) fprintf(stderr, " %s", READERS[i].name);
        fputc('\n', stderr);
        exit(2);
    }
    begin(which);
    atexit(end);
    return 0;
}

int LLVMFuzzerTestOneInput(const unsigned char *bytes, size_t size) {
    parse(bytes, size);
    return 0;
}

// Puts right what a random change nearly always breaks and what would hide all that comes after it: the checksums of a
// PNG's chunks, the length of a safetensors header. One input in 16 stays as it is.
size_t LLVMFuzzerCustomMutator(unsigned char *bytes, size_t size, size_t most, unsigned seed) {
    size = LLVMFuzzerMutate(bytes, size, most);
    if (seed % 16 == 0) return size;
    if (strcmp(READERS[reader].name, "png") == 0) {
        for (size_t at = 8; size >= 12 && at <= size - 12;) {
            const size_t length = exif_number(bytes + at, 4, 1);
            if (length > size - 12 - at) break;
            const uint32_t sum = (uint32_t)crc32(crc32(0, NULL, 0), bytes + at + 4, (unsigned)length + 4);
            for (int i = 0; i < 4; i++) bytes[at + 8 + length + (size_t)i] = (unsigned char)(sum >> (24 - 8 * i));
            at += length + 12;
        }
    }
    if (strcmp(READERS[reader].name, "safetensors") == 0) {
        uint64_t length = size;
        while (length > 8 && bytes[length - 1] != '}') length--;
        length -= 8;
        if (size > 8 && length > 0) memcpy(bytes, &length, 8);
    }
    return size;
}

#else
// ---------------------------------------------------------------------------------------------------------------------
// Each input once, in a process of its own

static void run_once(const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash;
    while (name && name > path && name[-1] != '/') name--;
    const int which = name ? find_reader(name, (size_t)(slash - name)) : -1;
    check(which >= 0, "%s: its folder is not called as a reader is", path);
    if (which < 0) return;
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        char *bytes;
        size_t size;
        Error error;
        if (read_file(path, &bytes, &size, &error) != 0) abort();
        if (!freopen("/dev/null", "w", stdout)) abort();
        begin(which);
        parse(bytes, size);
        end();
        free(bytes);
        exit(0);  // looks for leaks
    }
    int status = -1;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0, "%s: status %d", path, status);
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) run_once(argv[i]);
    printf("%d passed, %d failed\n", num_passed, num_failed);
    return num_failed > 0;
}
#endif
