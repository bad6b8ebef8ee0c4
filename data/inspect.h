/*
Looks a data set over before a training: decodes every picture, and finds what the annotation files alone do not show.
Opening a data set (dataset.h) has listed what is left out of it; here that is gathered with everything else that is
wrong or odd, one line each, with the file and the place.

To read in order: findings > one picture > boxes > names > copies > all of it > what is printed and written.

Pictures are decoded side by side; every line is made afterwards, in the data sets' order, so that any number of threads
finds the same. Compiles as C11 and as C++17.
*/
#ifndef DETR_INSPECT_H
#define DETR_INSPECT_H

#include "dataset.h"
#include "progress.h"

// ---------------------------------------------------------------------------------------------------------------------
// Findings

typedef enum {
    FOUND_LEFT_OUT,
    FOUND_UNREADABLE,
    FOUND_DAMAGED,
    FOUND_KIND,
    FOUND_TURNED,
    FOUND_SIZE,
    FOUND_OUTSIDE,
    FOUND_TINY,
    FOUND_SAME_BOX,
    FOUND_TOO_MANY,
    FOUND_NO_BOX,
    FOUND_SAME_ID,
    FOUND_NAMES,
    FOUND_COPIES,
    FOUND_IN_BOTH,
    FOUND_CLASSES,
    NUM_FOUND
} FindingKind;

static const struct {
    const char *key, *title;  // in JSON; for people
} FINDINGS[NUM_FOUND] = {
    {"left_out", "left out of the data set"},
    {"unreadable", "pictures that cannot be decoded: training goes on without them"},
    {"damaged", "pictures with damage that the decoder passes over: a part of each may be wrong"},
    {"other_kind", "pictures whose name says another kind of file: what they hold counts"},
    {"turned", "pictures that EXIF turns: boxes are taken as pixels of the turned picture"},
    {"other_size", "pictures of another size than their annotations say: boxes are taken as pixels of the picture"},
    {"box_outside", "boxes that reach out of their picture by more than a pixel: what is outside is cut off"},
    {"box_tiny", "boxes of less than a pixel"},
    {"box_twice", "boxes that are there twice, with the same class"},
    {"too_many_boxes", "pictures with more boxes than queries: the rest cannot be learned"},
    {"no_box", "pictures without a box: trained on as background"},
    {"annotation_id_twice", "ids of annotations that are there twice: nothing here needs them, pycocotools does"},
    {"names_alike", "pictures with the same name, or names that differ in case or ending only"},
    {"copies", "pictures that are copies of others, byte for byte"},
    {"in_both_splits", "pictures of the training that are evaluated on, byte for byte: AP says too much"},
    {"classes", "classes"},
};

// What one picture is.
typedef struct {
    int width, height;  // upright; 0: it cannot be decoded
    int is_png;
    ImageNotes notes;
    uint64_t hash;        // of the file's bytes
    char *fault;          // why it cannot be decoded, or NULL
    const char *copy_of;  // path of the first picture that has the same bytes; NULL: this one is the first
    int copy_of_set;      // the split of that
} PictureFacts;

typedef struct {
    const Dataset *sets[2];     // the split to train on, and, where there is one, that to evaluate on
    PictureFacts *pictures[2];  // (sets[s]->num_images)
    int unreadable[2];
    char **findings[NUM_FOUND];
    int num_findings[NUM_FOUND];
} Inspection;

static inline void inspection_free(Inspection *inspection) {
    for (int s = 0; s < 2; s++) {
        for (int i = 0; inspection->pictures[s] && i < inspection->sets[s]->num_images; i++)
            free(inspection->pictures[s][i].fault);
        free(inspection->pictures[s]);
    }
    for (int k = 0; k < NUM_FOUND; k++) free_names(inspection->findings[k], inspection->num_findings[k]);
    memset(inspection, 0, sizeof *inspection);
}

__attribute__((format(printf, 3, 4))) static inline void inspection_add(Inspection *inspection, FindingKind kind,
                                                                        const char *format, ...) {
    Error line;
    char whole[sizeof line.text];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(whole, sizeof whole, format, arguments);
    va_end(arguments);
    fail(&line, "%s", whole);  // one line, whatever a name holds
    char ***list = &inspection->findings[kind];
    *list = (char **)grow(*list, (size_t)inspection->num_findings[kind], sizeof(char *));
    (*list)[inspection->num_findings[kind]++] = format_string("%s", line.text);
}

// ---------------------------------------------------------------------------------------------------------------------
// One picture

// FNV-1a (Fowler, Noll and Vo), 64 bits.
static inline uint64_t bytes_hash(const char *bytes, size_t size) {
    uint64_t hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < size; i++) hash = (hash ^ (unsigned char)bytes[i]) * 0x100000001B3u;
    return hash;
}

static inline void inspect_picture(PictureFacts *facts, const char *path) {
    char *bytes = NULL;
    Image image = {0, 0, NULL};
    Error why;
    memset(facts, 0, sizeof *facts);
    size_t size = 0;
    int status = read_file(path, &bytes, &size, &why);
    if (status == 0) {
        const unsigned char *data = (const unsigned char *)bytes;
        facts->hash = bytes_hash(bytes, size);
        facts->is_png = is_png(data, size);
        status = image_decode_stored(data, size, path, &image, &facts->notes, &why);
    }
    if (status != 0) facts->fault = format_string("%s", why.text);
    facts->width = facts->notes.orientation >= 5 ? image.height : image.width;
    facts->height = facts->notes.orientation >= 5 ? image.width : image.height;
    image_free(&image);
    free(bytes);
}

// Decodes all pictures of a split, on all threads.
static inline void inspect_pictures(Inspection *inspection, int s) {
    const Dataset *set = inspection->sets[s];
    PictureFacts *pictures = (PictureFacts *)allocate((size_t)set->num_images * sizeof(PictureFacts));
    Progress progress = {seconds_now(), 0, stderr};
    int done = 0;
    inspection->pictures[s] = pictures;
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < set->num_images; i++) {
        inspect_picture(&pictures[i], set->images[i].path);
#pragma omp critical(inspect_progress)
        if (done++, progress_due(&progress))
            progress_show(&progress, "checking %s: %d/%d pictures", set->split, done, set->num_images);
    }
    progress_end(&progress);
    for (int i = 0; i < set->num_images; i++) inspection->unreadable[s] += pictures[i].fault != NULL;
}

static inline void inspect_facts(Inspection *inspection, const DatasetImage *image, const PictureFacts *facts) {
    const char *path = image->path;
    if (facts->fault) {
        inspection_add(inspection, FOUND_UNREADABLE, "%s", facts->fault);
        return;
    }
    if (facts->notes.damage[0]) inspection_add(inspection, FOUND_DAMAGED, "%s: %s", path, facts->notes.damage);
    if (facts->is_png != ends_with(path, ".png"))
        inspection_add(inspection, FOUND_KIND, "%s: is a %s", path, facts->is_png ? "PNG" : "JPEG");
    const int differs = image->width > 0 && (image->width != facts->width || image->height != facts->height);
    const int unturned = differs && image->width == facts->height && image->height == facts->width;
    if (facts->notes.orientation > 1)
        inspection_add(inspection, FOUND_TURNED, "%s: orientation %d, upright it is %d x %d%s", path,
                       facts->notes.orientation, facts->width, facts->height,
                       unturned && facts->notes.orientation >= 5
                           ? "; its annotations have the size before the turn: are their boxes from before it too?"
                           : "");
    if (differs)
        inspection_add(inspection, FOUND_SIZE, "%s: is %d x %d, its annotations say %d x %d", path, facts->width,
                       facts->height, image->width, image->height);
}

// ---------------------------------------------------------------------------------------------------------------------
// Boxes

static inline int box_order(const void *a, const void *b) {
    const Annotation *left = *(const Annotation *const *)a, *right = *(const Annotation *const *)b;
    const double difference[] = {(double)left->class_index - right->class_index, left->x - right->x, left->y - right->y,
                                 left->width - right->width, left->height - right->height};
    for (int i = 0; i < 5; i++)
        if (difference[i] != 0) return difference[i] < 0 ? -1 : 1;
    return left < right ? -1 : left > right;
}

// The targets of one picture. num_queries: as the network has them.
static inline void inspect_boxes(Inspection *inspection, const Dataset *set, const DatasetImage *image,
                                 const PictureFacts *facts, int num_queries) {
    const Annotation **boxes =
        (const Annotation **)allocate((size_t)image->num_annotations * sizeof(const Annotation *));
    int count = 0;
    for (int a = 0; a < image->num_annotations; a++) {
        const Annotation *box = &set->annotations[image->first_annotation + a];
        if (annotation_is_target(box)) boxes[count++] = box;
    }
    if (count == 0) inspection_add(inspection, FOUND_NO_BOX, "%s", image->path);
    if (count > num_queries)
        inspection_add(inspection, FOUND_TOO_MANY, "%s: %d boxes, %d queries", image->path, count, num_queries);
    for (int i = 0; i < count; i++) {
        const Annotation *box = boxes[i];
        const char *name = set->categories[box->class_index].name,
                   *fault = facts->fault ? NULL : box_fault(box, facts->width, facts->height);
        const double out = fmax(fmax(-box->x, -box->y),
                                fmax(box->x + box->width - facts->width, box->y + box->height - facts->height));
        if (!facts->fault && (fault || out > 1))
            inspection_add(inspection, FOUND_OUTSIDE, "%s: %s, x %g y %g width %g height %g %s (%d x %d)", image->path,
                           name, box->x, box->y, box->width, box->height, fault ? fault : "reaches out of the picture",
                           facts->width, facts->height);
        if (box->width < 1 || box->height < 1)
            inspection_add(inspection, FOUND_TINY, "%s: %s, x %g y %g width %g height %g", image->path, name, box->x,
                           box->y, box->width, box->height);
    }
    qsort(boxes, (size_t)count, sizeof(Annotation *), box_order);
    for (int i = 1; i < count; i++) {
        const Annotation *box = boxes[i], *before = boxes[i - 1];
        if (box->class_index == before->class_index && box->x == before->x && box->y == before->y &&
            box->width == before->width && box->height == before->height)
            inspection_add(inspection, FOUND_SAME_BOX, "%s: %s, x %g y %g width %g height %g", image->path,
                           set->categories[box->class_index].name, box->x, box->y, box->width, box->height);
    }
    free(boxes);
}

static inline void inspect_annotation_ids(Inspection *inspection, const Dataset *set) {
    IdPlace *ids = (IdPlace *)allocate((size_t)set->num_annotations * sizeof(IdPlace));
    int count = 0;
    for (int i = 0; i < set->num_annotations; i++)
        if (set->annotations[i].id >= 0) ids[count++].id = set->annotations[i].id;
    qsort(ids, (size_t)count, sizeof(IdPlace), id_place_order);
    for (int i = 1; i < count; i++)
        if (ids[i].id == ids[i - 1].id && (i < 2 || ids[i].id != ids[i - 2].id))
            inspection_add(inspection, FOUND_SAME_ID, "%s: annotation id %lld", set->source, (long long)ids[i].id);
    free(ids);
}

// ---------------------------------------------------------------------------------------------------------------------
// Names

typedef struct {
    char *folded;  // what names that are alike have in common
    int index;
} FoldedName;

static inline int folded_order(const void *a, const void *b) {
    const FoldedName *left = (const FoldedName *)a, *right = (const FoldedName *)b;
    int order = strcmp(left->folded, right->folded);
    return order ? order : left->index - right->index;
}

// Lower case; of a class without spaces, _ and -, of a file without its ending.
static inline char *fold_name(const char *name, int is_file_name) {
    char *folded = format_string("%s", name), *to = folded, *dot = strrchr(folded, '.');
    if (is_file_name && dot && !strchr(dot, '/')) *dot = 0;
    for (const char *at = folded; *at; at++)
        if (is_file_name || !strchr(" _-", *at)) *to++ = (char)tolower((unsigned char)*at);
    *to = 0;
    return folded;
}

// Lists the names of pictures, or of classes, that are the same when folded.
static inline void inspect_names(Inspection *inspection, const Dataset *set, int of_classes) {
    const int count = of_classes ? set->num_categories : set->num_images;
    FoldedName *names = (FoldedName *)allocate((size_t)count * sizeof(FoldedName));
    for (int i = 0; i < count; i++) {
        names[i].folded = fold_name(of_classes ? set->categories[i].name : set->images[i].name, !of_classes);
        names[i].index = i;
    }
    qsort(names, (size_t)count, sizeof(FoldedName), folded_order);
    for (int i = 1; i < count; i++) {
        const int a = names[i - 1].index, b = names[i].index;
        if (strcmp(names[i - 1].folded, names[i].folded) != 0) continue;
        if (of_classes)
            inspection_add(inspection, FOUND_CLASSES, "%s: \"%s\" (id %lld) and \"%s\" (id %lld): one class or two?",
                           set->source, set->categories[a].name, (long long)set->categories[a].id,
                           set->categories[b].name, (long long)set->categories[b].id);
        else
            inspection_add(inspection, FOUND_NAMES, "%s: %s (id %lld) and %s (id %lld)", set->source,
                           set->images[a].name, (long long)set->images[a].id, set->images[b].name,
                           (long long)set->images[b].id);
    }
    for (int i = 0; i < count; i++) free(names[i].folded);
    free(names);
}

// Classes without a box, or with an id that no tool gives.
static inline void inspect_classes(Inspection *inspection, const Dataset *set) {
    BoxCounts *boxes = dataset_count_boxes(set);
    for (int c = 0; c < set->num_categories; c++) {
        const Category *class_ = &set->categories[c];
        if (class_->id < 0)
            inspection_add(inspection, FOUND_CLASSES, "%s: \"%s\": its id %lld is negative", set->source, class_->name,
                           (long long)class_->id);
        if (boxes[c].all == 0)
            inspection_add(inspection, FOUND_CLASSES, "%s: \"%s\" (id %lld): no box", set->source, class_->name,
                           (long long)class_->id);
    }
    free(boxes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies

typedef struct {
    PictureFacts *facts;
    const char *path;
    int set, index;
} CopyKey;

static inline int copy_order(const void *a, const void *b) {
    const CopyKey *left = (const CopyKey *)a, *right = (const CopyKey *)b;
    if (left->facts->hash != right->facts->hash) return left->facts->hash < right->facts->hash ? -1 : 1;
    return left->set != right->set ? left->set - right->set : left->index - right->index;
}

static inline int is_same_file(const char *a, const char *b) {
    char *bytes[2] = {NULL, NULL};
    size_t sizes[2] = {0, 1};
    Error unused;
    int same = read_file(a, &bytes[0], &sizes[0], &unused) == 0 && read_file(b, &bytes[1], &sizes[1], &unused) == 0 &&
               sizes[0] == sizes[1] && memcmp(bytes[0], bytes[1], sizes[0]) == 0;
    free(bytes[0]);
    free(bytes[1]);
    return same;
}

// Lists each picture that has the bytes of one before it, in its own split or in the training's.
static inline void inspect_copies(Inspection *inspection) {
    CopyKey *keys = NULL;
    int count = 0;
    for (int s = 0; s < 2 && inspection->sets[s]; s++) {
        for (int i = 0; i < inspection->sets[s]->num_images; i++) {
            CopyKey key = {&inspection->pictures[s][i], inspection->sets[s]->images[i].path, s, i};
            keys = (CopyKey *)grow(keys, (size_t)count, sizeof(CopyKey));
            keys[count++] = key;
        }
    }
    qsort(keys, (size_t)count, sizeof(CopyKey), copy_order);
    for (int k = 1, first = 0; k < count; k++) {
        if (keys[k].facts->hash != keys[first].facts->hash || !is_same_file(keys[k].path, keys[first].path)) {
            first = k;
            continue;
        }
        keys[k].facts->copy_of = keys[first].path;
        keys[k].facts->copy_of_set = keys[first].set;
    }
    free(keys);
    for (int s = 0; s < 2 && inspection->sets[s]; s++) {
        for (int i = 0; i < inspection->sets[s]->num_images; i++) {
            const PictureFacts *facts = &inspection->pictures[s][i];
            if (facts->copy_of)
                inspection_add(inspection, facts->copy_of_set != s ? FOUND_IN_BOTH : FOUND_COPIES, "%s: the same as %s",
                               inspection->sets[s]->images[i].path, facts->copy_of);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// All of it

// Looks over `train`, and `val` where there is one (else NULL); both must outlive the inspection. num_queries: of the
// network that is to be trained.
static inline void inspect(Inspection *inspection, const Dataset *train, const Dataset *val, int num_queries) {
    memset(inspection, 0, sizeof *inspection);
    inspection->sets[0] = train;
    inspection->sets[1] = val && strcmp(val->source, train->source) != 0 ? val : NULL;
    for (int s = 0; s < 2 && inspection->sets[s]; s++) {
        const Dataset *set = inspection->sets[s];
        for (int i = 0; i < set->num_problems; i++) inspection_add(inspection, FOUND_LEFT_OUT, "%s", set->problems[i]);
        inspect_pictures(inspection, s);
        for (int i = 0; i < set->num_images; i++) {
            inspect_facts(inspection, &set->images[i], &inspection->pictures[s][i]);
            inspect_boxes(inspection, set, &set->images[i], &inspection->pictures[s][i], num_queries);
        }
        if (strcmp(set->format, "COCO") == 0) inspect_annotation_ids(inspection, set);
        inspect_names(inspection, set, 0);
        inspect_names(inspection, set, 1);
        inspect_classes(inspection, set);
    }
    inspect_copies(inspection);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is printed and written

typedef struct {
    int width, height, count;
} PictureSize;

static inline int size_order(const void *a, const void *b) {
    const PictureSize *left = (const PictureSize *)a, *right = (const PictureSize *)b;
    const int64_t pixels[2] = {(int64_t)left->width * left->height, (int64_t)right->width * right->height};
    if (pixels[0] != pixels[1]) return pixels[0] < pixels[1] ? -1 : 1;
    return left->width - right->width;
}

// The sizes of a split's readable pictures and how many have each, those with the fewest pixels first; the caller frees
// them.
static inline PictureSize *inspection_sizes(const Inspection *inspection, int s, int *count) {
    const int total = inspection->sets[s]->num_images;
    PictureSize *sizes = (PictureSize *)allocate((size_t)total * sizeof(PictureSize));
    int readable = 0;
    *count = 0;
    for (int i = 0; i < total; i++) {
        const PictureFacts *facts = &inspection->pictures[s][i];
        PictureSize size = {facts->width, facts->height, 1};
        if (!facts->fault) sizes[readable++] = size;
    }
    qsort(sizes, (size_t)readable, sizeof(PictureSize), size_order);
    for (int i = 0; i < readable; i++) {
        PictureSize *last = &sizes[*count - 1];
        if (*count && last->width == sizes[i].width && last->height == sizes[i].height)
            last->count++;
        else
            sizes[(*count)++] = sizes[i];
    }
    return sizes;
}

enum { FINDINGS_SHOWN = 10 };  // of a kind; the JSON file has all

// The first split's counts are left out: whoever opened it has printed them.
static inline void inspection_print(FILE *file, const Inspection *inspection) {
    for (int s = 0; s < 2 && inspection->sets[s]; s++) {
        const Dataset *set = inspection->sets[s];
        int count, often = 0;
        PictureSize *sizes = inspection_sizes(inspection, s, &count);
        if (s) dataset_print_facts(file, set);
        for (int i = 1; i < count; i++)
            if (sizes[i].count > sizes[often].count) often = i;
        fprintf(file, "pictures   %s: %d decoded, %d cannot be", set->split,
                set->num_images - inspection->unreadable[s], inspection->unreadable[s]);
        if (count == 1) fprintf(file, "; all of %d x %d", sizes[0].width, sizes[0].height);
        if (count > 1)
            fprintf(file, "; %d sizes from %d x %d to %d x %d, most often %d x %d (%d)", count, sizes[0].width,
                    sizes[0].height, sizes[count - 1].width, sizes[count - 1].height, sizes[often].width,
                    sizes[often].height, sizes[often].count);
        fputc('\n', file);
        free(sizes);
    }
    int total = 0;
    for (int kind = 0; kind < NUM_FOUND; kind++) {
        const int count = inspection->num_findings[kind];
        if (count) fprintf(file, "\n%d  %s\n", count, FINDINGS[kind].title);
        for (int i = 0; i < count && i < FINDINGS_SHOWN; i++) fprintf(file, "    %s\n", inspection->findings[kind][i]);
        if (count > FINDINGS_SHOWN) fprintf(file, "    ... and %d more\n", count - FINDINGS_SHOWN);
        total += count;
    }
    if (total == 0) fprintf(file, "nothing wrong or odd was found\n");
    fputc('\n', file);
}

// Members of an object: "splits": [...], "findings": [...], without the object's braces.
static inline void inspection_write(FILE *file, const Inspection *inspection) {
    fputs("\"splits\": [", file);
    for (int s = 0; s < 2 && inspection->sets[s]; s++) {
        const Dataset *set = inspection->sets[s];
        int count;
        PictureSize *sizes = inspection_sizes(inspection, s, &count);
        BoxCounts *boxes = dataset_count_boxes(set);
        fprintf(file, "%s\n{\"split\": ", s ? "," : "");
        json_print_string(file, set->split);
        fprintf(file, ", \"format\": \"%s\", \"source\": ", set->format);
        json_print_string(file, set->source);
        fprintf(file, ",\n \"images\": %d, \"unreadable\": %d, \"without_boxes\": %d, \"skipped_images\": %d,\n",
                set->num_images, inspection->unreadable[s], set->num_without_targets, set->skipped_images);
        fprintf(file, " \"boxes\": %d, \"crowds\": %d, \"difficult\": %d, \"skipped_boxes\": %d,\n \"sizes\": [",
                set->num_targets, set->num_crowds, set->num_ignored, set->num_skipped);
        for (int i = 0; i < count; i++)
            fprintf(file, "%s{\"width\": %d, \"height\": %d, \"images\": %d}", i ? ", " : "", sizes[i].width,
                    sizes[i].height, sizes[i].count);
        fputs("],\n \"classes\": [", file);
        for (int c = 0; c < set->num_categories; c++) {
            fprintf(file, "%s\n  {\"id\": %lld, \"name\": ", c ? "," : "", (long long)set->categories[c].id);
            json_print_string(file, set->categories[c].name);
            fprintf(file, ", \"boxes\": %d, \"small\": %d, \"medium\": %d, \"large\": %d}", boxes[c].all,
                    boxes[c].by_area[0], boxes[c].by_area[1], boxes[c].by_area[2]);
        }
        fputs("]}", file);
        free(sizes);
        free(boxes);
    }
    fputs("],\n\"findings\": [", file);
    const char *before = "";
    for (int kind = 0; kind < NUM_FOUND; kind++) {
        for (int i = 0; i < inspection->num_findings[kind]; i++) {
            fprintf(file, "%s\n{\"kind\": \"%s\", \"text\": ", before, FINDINGS[kind].key);
            json_print_string(file, inspection->findings[kind][i]);
            fputc('}', file);
            before = ",";
        }
    }
    fputs("]", file);
}

#endif
