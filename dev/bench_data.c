/*
The data side as dev/bench_data.py times it: one thread, seconds of processor time. Prints one line of numbers.

    bench_data load FOLDER SPLIT EPOCHS          pictures; seconds to read, augment and normalise them as train does
    bench_data open ANNOTATIONS                  images, boxes; seconds until a COCO file is ready; peak memory in bytes
    bench_data score ANNOTATIONS RESULTS         seconds to read both files, seconds to evaluate; average precision
*/
#define TRAIN_DETR_NO_MAIN
#include "../train_detr.c"

static double cpu_seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

static int load(const char *folder, const char *split, int epochs, Error *error) {
    LoaderSettings settings = {42, 800, 1333, AUGMENT_CROP, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0};
    Dataset set;
    if (dataset_open(&set, folder, split, error) != 0) return -1;
    real *pixels = (real *)allocate(3 * 1333 * 1333 * sizeof(real));
    memset(pixels, 1, 3 * 1333 * 1333 * sizeof(real));  // touched, as the memory of a training is
    Loader *loader = loader_start(&set, &settings, 0);
    double begin = cpu_seconds();
    int count = epochs * set.num_images;
    for (int i = 0; i < count; i++) {
        Sample *sample = loader_next_batch(loader);
        if (!sample->image.pixels) return fail(error, "%s", sample->error.text);
        normalise_pixels(pixels, &sample->image, 0);
    }
    printf("%d %.6f\n", count, cpu_seconds() - begin);
    loader_stop(loader);
    dataset_free(&set);
    free(pixels);
    return 0;
}

static int score(const char *annotations, const char *results, Error *error) {
    double begin = cpu_seconds();
    Dataset set;
    EvalDetection *detections;
    int count;
    if (dataset_open_coco_file(&set, annotations, NULL, error) != 0) return -1;
    if (coco_read_results(results, &set, &detections, &count, error) != 0) return -1;
    double read = cpu_seconds();
    CocoScores scores;
    coco_score(&scores, &set, detections, count);
    printf("%.6f %.6f %.17g\n", read - begin, cpu_seconds() - read, scores.stats[0]);
    coco_scores_free(&scores);
    free(detections);
    dataset_free(&set);
    return 0;
}

static int open_annotations(const char *path, Error *error) {
    double seconds = cpu_seconds();
    Dataset set;
    if (dataset_open_coco_file(&set, path, NULL, error) != 0) return -1;
    seconds = cpu_seconds() - seconds;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("%d %d %.6f %lld\n", set.num_images, set.num_annotations, seconds, (long long)usage.ru_maxrss * 1024);
    dataset_free(&set);
    return 0;
}

int main(int argc, char **argv) {
    Error error;
    const char *what = argc > 2 ? argv[1] : "";
    int status = strcmp(what, "load") == 0 && argc == 5    ? load(argv[2], argv[3], atoi(argv[4]), &error)
                 : strcmp(what, "open") == 0 && argc == 3  ? open_annotations(argv[2], &error)
                 : strcmp(what, "score") == 0 && argc == 4 ? score(argv[2], argv[3], &error)
                                                           : fail(&error, "see the top of dev/bench_data.c");
    if (status != 0) fprintf(stderr, "error: %s\n", error.text);
    return status == 0 ? 0 : 1;
}
