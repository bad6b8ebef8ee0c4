/*
A data set: which pictures there are, and which boxes each has. COCO, Pascal VOC and YOLO folders become the same three
arrays: categories, images, annotations. Pictures are not decoded here (loader.h does that).

To read in order: the data set itself > problems and ids > building > COCO > VOC > YOLO > opening a folder > facts.

What is wrong with one entry never ends the run: the entry is left out, or kept as no target, and one line about it
goes to `problems`. What is wrong with the whole (no such folder, no such split, damaged JSON, an id that is there
twice) ends it with one line in `error`.

Compiles as C11 and as C++17.
*/
#ifndef DETR_DATASET_H
#define DETR_DATASET_H

#include <ctype.h>
#include <dirent.h>
#include <expat.h>
#include <float.h>
#include <strings.h>

#include "image.h"
#include "json.h"

// ---------------------------------------------------------------------------------------------------------------------
// The data set

typedef struct {
    int64_t id;  // COCO: as in the file; YOLO: the class number in the labels; VOC: place among the sorted names
    char *name;
} Category;

typedef struct {
    int64_t id;                            // COCO: as in the file, -1 if it has none; else the box's place, from 0
    int class_index;                       // place in `categories`
    double x, y, width, height;            // pixels, as written: left, top, and size; not clipped
    double area;                           // COCO: as written (of the mask, where there is one); else width * height
    unsigned char crowd, ignore, skipped;  // COCO's iscrowd; VOC's difficult; empty or outside the picture
} Annotation;

typedef struct {
    int64_t id;                             // COCO: as in the file; else its place
    char *path;                             // of the picture; NULL where annotations were opened without pictures
    char *name;                             // as in the file: COCO's file_name, VOC's and YOLO's file in its folder
    int width, height;                      // 0 where COCO's file does not say
    int first_annotation, num_annotations;  // its piece of `annotations`
} DatasetImage;

typedef struct {
    int64_t id;
    int index;
} IdPlace;

typedef struct {
    const char *format;  // "COCO", "VOC", "YOLO"
    char *split;         // as asked for
    char *source;        // the annotation file, list or label folder it came from
    Category *categories;
    int num_categories;
    DatasetImage *images;  // in the file's order (YOLO: in byte order of names)
    int num_images;
    Annotation *annotations;  // those of one image side by side, in the file's order
    int num_annotations;
    char **problems;  // "file or annotation: what: skipped"
    int num_problems;
    // Counts over `annotations`; skipped_images is about pictures that are not in `images`
    int num_targets, num_crowds, num_ignored, num_skipped, num_without_targets, skipped_images;
    IdPlace *category_places, *image_places;  // sorted by id
} Dataset;

// A box that is trained on: not a crowd, not difficult, not empty, not outside.
static inline int annotation_is_target(const Annotation *annotation) {
    return !annotation->crowd && !annotation->ignore && !annotation->skipped;
}

// The image's boxes that are trained on.
static inline int dataset_image_targets(const Dataset *set, const DatasetImage *image) {
    int targets = 0;
    for (int a = 0; a < image->num_annotations; a++)
        targets += annotation_is_target(&set->annotations[image->first_annotation + a]);
    return targets;
}

static inline void dataset_free(Dataset *set) {
    for (int i = 0; i < set->num_categories; i++) free(set->categories[i].name);
    for (int i = 0; i < set->num_images; i++) {
        free(set->images[i].path);
        free(set->images[i].name);
    }
    for (int i = 0; i < set->num_problems; i++) free(set->problems[i]);
    free(set->split);
    free(set->source);
    free(set->categories);
    free(set->images);
    free(set->annotations);
    free(set->problems);
    free(set->category_places);
    free(set->image_places);
    memset(set, 0, sizeof *set);
}

// ---------------------------------------------------------------------------------------------------------------------
// Problems, ids, names

// Adds one line to the list. Control characters of a hostile file become '?', so that a line stays a line.
__attribute__((format(printf, 2, 3))) static inline void dataset_problem(Dataset *set, const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    for (char *at = line; *at; at++)
        if ((unsigned char)*at < 32 || *at == 127) *at = '?';
    set->problems = (char **)grow(set->problems, (size_t)set->num_problems, sizeof(char *));
    set->problems[set->num_problems++] = format_string("%s", line);
}

static inline int id_place_order(const void *a, const void *b) {
    const IdPlace *left = (const IdPlace *)a, *right = (const IdPlace *)b;
    return left->id < right->id ? -1 : left->id > right->id;
}

// Place of `id` among `count` sorted ids, or -1.
static inline int id_place_find(const IdPlace *places, int count, int64_t id) {
    IdPlace wanted = {id, 0};
    const IdPlace *found = (const IdPlace *)bsearch(&wanted, places, (size_t)count, sizeof wanted, id_place_order);
    return found ? found->index : -1;
}

// Index of the category or image with this id in the data set's file; -1 if there is none.
static inline int dataset_category_index(const Dataset *set, int64_t id) {
    return id_place_find(set->category_places, set->num_categories, id);
}
static inline int dataset_image_index(const Dataset *set, int64_t id) {
    return id_place_find(set->image_places, set->num_images, id);
}

// Sorts the ids of categories and images for the two above. -1: an id is there twice.
static inline int dataset_index_ids(Dataset *set, Error *error) {
    free(set->category_places);
    free(set->image_places);
    set->category_places = (IdPlace *)allocate((size_t)set->num_categories * sizeof(IdPlace));
    set->image_places = (IdPlace *)allocate((size_t)set->num_images * sizeof(IdPlace));
    for (int kind = 0; kind < 2; kind++) {
        IdPlace *places = kind ? set->image_places : set->category_places;
        int count = kind ? set->num_images : set->num_categories;
        for (int i = 0; i < count; i++) {
            places[i].id = kind ? set->images[i].id : set->categories[i].id;
            places[i].index = i;
        }
        qsort(places, (size_t)count, sizeof(IdPlace), id_place_order);
        for (int i = 1; i < count; i++)
            if (places[i - 1].id == places[i].id)
                return fail(error, "%s: %s id %lld is there twice: give every %s its own", set->source,
                            kind ? "image" : "category", (long long)places[i].id, kind ? "image" : "category");
    }
    return 0;
}

// 1 if a file name from a data set stays inside its folder: not empty, not absolute, no "..".
static inline int is_inside_name(const char *name) {
    if (name[0] == 0 || name[0] == '/') return 0;
    for (const char *at = name; at; at = strchr(at, '/')) {
        at += *at == '/';
        if (at[0] == '.' && at[1] == '.' && (at[2] == 0 || at[2] == '/')) return 0;
    }
    return 1;
}

static inline int ends_with(const char *text, const char *ending) {
    size_t length = strlen(text), tail = strlen(ending);
    return length >= tail && strcasecmp(text + length - tail, ending) == 0;
}

static inline int is_picture_name(const char *name) {
    return ends_with(name, ".jpg") || ends_with(name, ".jpeg") || ends_with(name, ".png");
}

static inline int name_order(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static inline void free_names(char **names, int count) {
    for (int i = 0; i < count; i++) free(names[i]);
    free(names);
}

// Names in a folder in byte order, hidden ones left out; the caller frees them with free_names. A folder that cannot be
// read has none.
static inline char **folder_names(const char *folder, int *count) {
    char **names = NULL;
    *count = 0;
    DIR *directory = opendir(folder);
    if (!directory) return NULL;
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        if (entry->d_name[0] == '.') continue;
        names = (char **)grow(names, (size_t)*count, sizeof(char *));
        names[(*count)++] = format_string("%s", entry->d_name);
    }
    closedir(directory);
    if (names) qsort(names, (size_t)*count, sizeof(char *), name_order);
    return names;
}

// Reads a list, a label file or data.yaml: without a byte order mark, and with '?' for zero bytes. 0, or -1.
static inline int read_text_file(const char *path, char **text, Error *error) {
    size_t size;
    if (read_file(path, text, &size, error) != 0) return -1;
    for (size_t i = 0; i < size; i++)
        if ((*text)[i] == 0) (*text)[i] = '?';
    if (strncmp(*text, "\xEF\xBB\xBF", 3) == 0) memmove(*text, *text + 3, size - 2);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Building: what the three formats share

static inline void dataset_add_category(Dataset *set, int64_t id, const char *name) {
    set->categories = (Category *)grow(set->categories, (size_t)set->num_categories, sizeof(Category));
    Category *category = &set->categories[set->num_categories++];
    category->id = id;
    category->name = format_string("%s", name);
}

// Adds an image whose annotations follow; takes over `path` (may be NULL).
static inline DatasetImage *dataset_add_image(Dataset *set, int64_t id, const char *name, char *path, int width,
                                              int height) {
    set->images = (DatasetImage *)grow(set->images, (size_t)set->num_images, sizeof(DatasetImage));
    DatasetImage *image = &set->images[set->num_images++];
    image->id = id;
    image->name = format_string("%s", name);
    image->path = path;
    image->width = width;
    image->height = height;
    image->first_annotation = set->num_annotations;
    image->num_annotations = 0;
    return image;
}

// Why a box is no target, or NULL if it is one. DETR's rule (datasets/coco.py, ConvertCocoPolysToMask): clip to the
// picture, keep what has a width and a height then. Where the picture's size is unknown (0) nothing is outside.
static inline const char *box_fault(const Annotation *box, int width, int height) {
    double right = box->x + box->width, bottom = box->y + box->height;
    if (!(right > box->x) || !(bottom > box->y)) return "is empty";
    if (right <= 0 || bottom <= 0) return "is outside the picture";
    if (width > 0 && height > 0 && (box->x >= width || box->y >= height)) return "is outside the picture";
    return NULL;
}

// Huge coordinates may differ by more than a double holds: the largest one instead, which the picture's edge cuts off.
static inline double finite_number(double value) { return fmin(fmax(value, -DBL_MAX), DBL_MAX); }

// Adds a box to the image added last, and sets `skipped`. `where` begins the line about a bad one.
static inline void dataset_add_box(Dataset *set, Annotation box, const char *where) {
    DatasetImage *image = &set->images[set->num_images - 1];
    const char *fault = box_fault(&box, image->width, image->height);
    box.skipped = fault != NULL;
    if (fault)
        dataset_problem(set, "%s: box x %g y %g width %g height %g %s (%d x %d): skipped", where, box.x, box.y,
                        box.width, box.height, fault, image->width, image->height);
    set->annotations = (Annotation *)grow(set->annotations, (size_t)set->num_annotations, sizeof(Annotation));
    set->annotations[set->num_annotations++] = box;
    image->num_annotations++;
}

// Counts, and refuses a data set without images or classes.
static inline int dataset_finish(Dataset *set, Error *error) {
    if (set->num_categories == 0) return fail(error, "%s: no classes", set->source);
    if (set->num_images == 0)
        return fail(error, "%s: no usable pictures (%d problems%s%s)", set->source, set->num_problems,
                    set->num_problems ? "; the first: " : "", set->num_problems ? set->problems[0] : "");
    for (int i = 0; i < set->num_images; i++) {
        for (int a = 0; a < set->images[i].num_annotations; a++) {
            const Annotation *annotation = &set->annotations[set->images[i].first_annotation + a];
            set->num_crowds += annotation->crowd;
            set->num_ignored += annotation->ignore;
            set->num_skipped += annotation->skipped;
        }
        const int targets = dataset_image_targets(set, &set->images[i]);
        set->num_targets += targets;
        set->num_without_targets += targets == 0;
    }
    return dataset_index_ids(set, error);
}

// ---------------------------------------------------------------------------------------------------------------------
// COCO: one pass over the file's three lists, which may stand in any order; ids are resolved after it

typedef enum { COCO_IMAGES, COCO_ANNOTATIONS, COCO_CATEGORIES, COCO_LISTS } CocoList;
static const char *const coco_list_names[COCO_LISTS] = {"images", "annotations", "categories"};

// The members that matter. Numbers first, then text.
typedef enum {
    COCO_ID,
    COCO_IMAGE_ID,
    COCO_CATEGORY_ID,
    COCO_WIDTH,
    COCO_HEIGHT,
    COCO_AREA,
    COCO_ISCROWD,
    COCO_BBOX,
    COCO_FILE_NAME,
    COCO_NAME,
    COCO_FIELDS
} CocoField;
static const char *const coco_field_names[COCO_FIELDS] = {"id",   "image_id", "category_id", "width",     "height",
                                                          "area", "iscrowd",  "bbox",        "file_name", "name"};
static const unsigned coco_fields_of_list[COCO_LISTS] = {
    1u << COCO_ID | 1u << COCO_WIDTH | 1u << COCO_HEIGHT | 1u << COCO_FILE_NAME,
    1u << COCO_ID | 1u << COCO_IMAGE_ID | 1u << COCO_CATEGORY_ID | 1u << COCO_AREA | 1u << COCO_ISCROWD |
        1u << COCO_BBOX,
    1u << COCO_ID | 1u << COCO_NAME,
};

typedef struct {
    int64_t image_id, category_id;
    Annotation box;
    int place;  // in the file's list
} CocoAnnotation;

typedef struct {
    Dataset *set;
    Error *error;
    const char *path;
    int depth;       // open arrays and objects: 1 the file, 2 a list, 3 an entry, 4 an entry's bbox
    int list;        // CocoList that is open, or -1
    int field;       // CocoField whose value comes next, or -1
    int in_entry;    // inside an object of a list
    int lists_seen;  // bits by CocoList
    int places[COCO_LISTS];
    // The entry being read
    unsigned present;  // bits by CocoField
    int64_t ids[3];    // by CocoField
    double numbers[COCO_BBOX];
    double bbox[4];
    int bbox_count;
    char *text;      // file_name or name
    char fault[96];  // the first thing wrong with it, or ""
    CocoAnnotation *annotations;
    int num_annotations;
    int without_names;  // annotations only: images need no file_name, categories no name
} CocoReader;

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_CONTAINER } JsonKind;
static const char *const json_kind_names[] = {"null", "true or false", "a number", "text", "a list or object"};

__attribute__((format(printf, 2, 3))) static inline void coco_fault(CocoReader *reader, const char *format, ...) {
    if (reader->fault[0]) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reader->fault, sizeof reader->fault, format, arguments);
    va_end(arguments);
}

// A number of an entry: an id must be whole, a size must be whole and positive, the others finite.
static inline void coco_number(CocoReader *reader, int field, const char *text, size_t length) {
    const char *name = coco_field_names[field];
    int shown = length < 40 ? (int)length : 40;
    if (field <= COCO_CATEGORY_ID) {
        if (!json_text_int64(text, length, &reader->ids[field]))
            coco_fault(reader, "%s %.*s is not a whole number", name, shown, text);
        return;
    }
    double value = json_text_double(text, length);
    if (!isfinite(value)) {
        coco_fault(reader, "%s is not finite", name);
    } else if (field == COCO_BBOX) {
        if (reader->bbox_count < 4) reader->bbox[reader->bbox_count] = value;
        reader->bbox_count++;
    } else if (field <= COCO_HEIGHT && (value < 1 || value > INT32_MAX || value != floor(value))) {
        coco_fault(reader, "%s %.*s is not a size in pixels", name, shown, text);
    } else {
        reader->numbers[field] = value;
    }
}

// 1 for digits with or without a minus: some tools write ids as text.
static inline int is_whole_number(const char *text, size_t length) {
    size_t digits = length > 0 && text[0] == '-';
    for (size_t i = digits; i < length; i++)
        if (!isdigit((unsigned char)text[i])) return 0;
    return length > digits;
}

// Any value at the place where the reader stands. Returns 1 for YAJL to go on.
static inline int coco_value(CocoReader *reader, JsonKind kind, const char *text, size_t length) {
    int field = reader->field;
    if (reader->depth == 2 && reader->list >= 0) {  // an entry that is no object
        reader->set->skipped_images += reader->list == COCO_IMAGES;
        dataset_problem(reader->set, "%s: %s[%d]: is %s, not an object: skipped", reader->path,
                        coco_list_names[reader->list], reader->places[reader->list]++, json_kind_names[kind]);
        return 1;
    }
    if (!reader->in_entry || field < 0) return 1;
    int in_bbox = field == COCO_BBOX && reader->depth == 4;
    reader->present |= 1u << field;
    if (reader->without_names && kind == JSON_NULL &&
        (1u << field & (1u << COCO_FILE_NAME | 1u << COCO_NAME | 1u << COCO_WIDTH | 1u << COCO_HEIGHT))) {
        reader->present &= ~(1u << field);  // as if it were not there
        return 1;
    }
    if (field == COCO_FILE_NAME || field == COCO_NAME) {
        if (kind != JSON_STRING || length == 0 || memchr(text, 0, length)) {
            coco_fault(reader, "%s is %s", coco_field_names[field],
                       kind == JSON_STRING ? (length ? "text with a zero byte" : "empty") : json_kind_names[kind]);
            return 1;
        }
        free(reader->text);
        reader->text = (char *)allocate(length + 1);
        memcpy(reader->text, text, length);
    } else if (kind == JSON_BOOL && field == COCO_ISCROWD) {
        reader->numbers[field] = length != 0;
    } else if ((kind == JSON_NUMBER && (field != COCO_BBOX || in_bbox)) ||
               (kind == JSON_STRING && field <= COCO_CATEGORY_ID && is_whole_number(text, length))) {
        coco_number(reader, field, text, length);
    } else {
        coco_fault(reader, "%s %s %s, not %s", coco_field_names[field], in_bbox ? "holds" : "is", json_kind_names[kind],
                   field == COCO_BBOX && !in_bbox ? "4 numbers" : "a number");
    }
    return 1;
}

static int coco_on_null(void *reader) { return coco_value((CocoReader *)reader, JSON_NULL, "", 0); }
static int coco_on_boolean(void *reader, int yes) {
    return coco_value((CocoReader *)reader, JSON_BOOL, "", (size_t)(yes != 0));
}
static int coco_on_number(void *reader, const char *text, size_t length) {
    return coco_value((CocoReader *)reader, JSON_NUMBER, text, length);
}
static int coco_on_string(void *reader, const unsigned char *text, size_t length) {
    return coco_value((CocoReader *)reader, JSON_STRING, (const char *)text, length);
}

static int coco_on_key(void *context, const unsigned char *key, size_t length) {
    CocoReader *reader = (CocoReader *)context;
    if (reader->depth == 1) {
        reader->list = -1;
        for (int list = 0; list < COCO_LISTS; list++)
            if (strlen(coco_list_names[list]) == length && memcmp(coco_list_names[list], key, length) == 0)
                reader->list = list;
    } else if (reader->depth == 3 && reader->in_entry) {
        reader->field = -1;
        for (int field = 0; field < COCO_FIELDS; field++)
            if ((coco_fields_of_list[reader->list] >> field & 1) && strlen(coco_field_names[field]) == length &&
                memcmp(coco_field_names[field], key, length) == 0)
                reader->field = field;
        if (reader->field == COCO_BBOX) reader->bbox_count = 0;
    }
    return 1;
}

static inline int coco_open(CocoReader *reader, int is_object) {
    if (reader->depth == 0 && !is_object)
        return fail(reader->error, "%s: is a list, not a COCO annotation file", reader->path), 0;
    if (reader->depth == 1 && reader->list >= 0) {
        if (is_object)
            return fail(reader->error, "%s: \"%s\" is not a list", reader->path, coco_list_names[reader->list]), 0;
        reader->lists_seen |= 1 << reader->list;
    } else if (reader->depth == 2 && reader->list >= 0 && is_object) {
        reader->in_entry = 1;
        reader->present = 0;
        reader->field = -1;
        reader->fault[0] = 0;
        reader->bbox_count = 0;
    } else if (!(reader->depth == 3 && reader->field == COCO_BBOX && !is_object)) {
        coco_value(reader, JSON_CONTAINER, "", 0);
    }
    if (reader->depth == 3 && reader->field == COCO_BBOX) reader->present |= 1u << COCO_BBOX;
    if (++reader->depth > JSON_MAX_DEPTH)
        return fail(reader->error, "%s: nested deeper than %d", reader->path, JSON_MAX_DEPTH), 0;
    return 1;
}

static int coco_on_start_map(void *reader) { return coco_open((CocoReader *)reader, 1); }
static int coco_on_start_array(void *reader) { return coco_open((CocoReader *)reader, 0); }
static int coco_on_end_array(void *reader) {
    ((CocoReader *)reader)->depth--;
    return 1;
}

// An entry is complete: keep it, or say why not.
static int coco_on_end_map(void *context) {
    CocoReader *reader = (CocoReader *)context;
    if (--reader->depth != 2 || !reader->in_entry) return 1;
    Dataset *set = reader->set;
    int list = reader->list, place = reader->places[list]++;
    unsigned required = list == COCO_IMAGES       ? 1u << COCO_ID | 1u << COCO_FILE_NAME
                        : list == COCO_CATEGORIES ? 1u << COCO_ID | 1u << COCO_NAME
                                                  : 1u << COCO_IMAGE_ID | 1u << COCO_CATEGORY_ID | 1u << COCO_BBOX;
    reader->in_entry = 0;
    if (reader->without_names) required &= ~(1u << COCO_FILE_NAME | 1u << COCO_NAME);
    for (int field = 0; field < COCO_FIELDS; field++)
        if ((required & ~reader->present) >> field & 1) coco_fault(reader, "has no %s", coco_field_names[field]);
    if (list != COCO_ANNOTATIONS && !(reader->present >> COCO_FILE_NAME & 1) && !(reader->present >> COCO_NAME & 1)) {
        free(reader->text);
        reader->text = format_string("%lld", (long long)reader->ids[COCO_ID]);
    }
    if ((reader->present >> COCO_BBOX & 1) && reader->bbox_count != 4)
        coco_fault(reader, "bbox has %d numbers, not 4", reader->bbox_count);
    if (reader->fault[0]) {
        dataset_problem(set, "%s: %s[%d]: %s: skipped", reader->path, coco_list_names[list], place, reader->fault);
        set->skipped_images += list == COCO_IMAGES;
    } else if (list == COCO_CATEGORIES) {
        dataset_add_category(set, reader->ids[COCO_ID], reader->text);
    } else if (list == COCO_IMAGES) {
        int sized = (reader->present >> COCO_WIDTH & 1) && (reader->present >> COCO_HEIGHT & 1);
        dataset_add_image(set, reader->ids[COCO_ID], reader->text, NULL, sized ? (int)reader->numbers[COCO_WIDTH] : 0,
                          sized ? (int)reader->numbers[COCO_HEIGHT] : 0);
    } else {
        reader->annotations =
            (CocoAnnotation *)grow(reader->annotations, (size_t)reader->num_annotations, sizeof(CocoAnnotation));
        CocoAnnotation *annotation = &reader->annotations[reader->num_annotations++];
        memset(annotation, 0, sizeof *annotation);
        annotation->image_id = reader->ids[COCO_IMAGE_ID];
        annotation->category_id = reader->ids[COCO_CATEGORY_ID];
        annotation->place = place;
        Annotation *box = &annotation->box;
        box->id = reader->present >> COCO_ID & 1 ? reader->ids[COCO_ID] : -1;
        box->x = reader->bbox[0];
        box->y = reader->bbox[1];
        box->width = reader->bbox[2];
        box->height = reader->bbox[3];
        box->area =
            reader->present >> COCO_AREA & 1 ? reader->numbers[COCO_AREA] : finite_number(box->width * box->height);
        box->crowd = (reader->present >> COCO_ISCROWD & 1) && reader->numbers[COCO_ISCROWD] != 0;
    }
    return 1;
}

// Gives every image its path in `folder`; an image whose name leaves the folder, or whose picture is not there, loses
// its name (coco_resolve then drops it).
static inline void coco_find_pictures(Dataset *set, const char *folder) {
    for (int i = 0; i < set->num_images; i++) {
        DatasetImage *image = &set->images[i];
        const char *fault = NULL;
        if (!is_inside_name(image->name)) {
            fault = "file name leaves the picture folder";
        } else {
            image->path = format_string("%s/%s", folder, image->name);
            if (!is_file(image->path))
                fault = "picture is missing";
            else if (image->width == 0) {
                Error why;
                if (image_read_size(image->path, &image->width, &image->height, &why) != 0)
                    fault = "picture is damaged";
            }
        }
        if (!fault) continue;
        dataset_problem(set, "%s: image id %lld: %s (%s in %s): skipped", set->source, (long long)image->id, fault,
                        image->name, folder);
        set->skipped_images++;
        free(image->name);
        free(image->path);
        image->name = image->path = NULL;
    }
}

// Puts the annotations in the order of the images (a counting sort, so the file's order stays within an image), drops
// images without a name together with their annotations, and lists ids that lead nowhere.
static inline void coco_resolve(CocoReader *reader) {
    Dataset *set = reader->set;
    int count = reader->num_annotations;
    int *image_of = (int *)allocate((size_t)count * sizeof *image_of);
    for (int i = 0; i < count; i++) {
        CocoAnnotation *annotation = &reader->annotations[i];
        image_of[i] = dataset_image_index(set, annotation->image_id);
        annotation->box.class_index = dataset_category_index(set, annotation->category_id);
        if (image_of[i] >= 0 && !set->images[image_of[i]].name) {
            image_of[i] = -1;  // listed with its image
        } else if (image_of[i] < 0 || annotation->box.class_index < 0) {
            int about_image = image_of[i] < 0;
            dataset_problem(set, "%s: annotations[%d] (id %lld): %s id %lld is not in the file: skipped", reader->path,
                            annotation->place, (long long)annotation->box.id, about_image ? "image" : "category",
                            (long long)(about_image ? annotation->image_id : annotation->category_id));
            image_of[i] = -1;
        }
        if (image_of[i] >= 0) set->images[image_of[i]].num_annotations++;
    }
    int total = 0, kept = 0;
    for (int i = 0; i < set->num_images; i++) {
        set->images[i].first_annotation = total;
        total += set->images[i].num_annotations;
        set->images[i].num_annotations = 0;
    }
    set->annotations = (Annotation *)allocate((size_t)total * sizeof(Annotation));
    set->num_annotations = total;
    for (int i = 0; i < count; i++) {
        if (image_of[i] < 0) continue;
        CocoAnnotation *annotation = &reader->annotations[i];
        DatasetImage *image = &set->images[image_of[i]];
        const char *fault = box_fault(&annotation->box, image->width, image->height);
        annotation->box.skipped = fault != NULL;
        if (fault)
            dataset_problem(set, "%s: annotations[%d] (id %lld): box [%g, %g, %g, %g] %s (%d x %d): skipped",
                            reader->path, annotation->place, (long long)annotation->box.id, annotation->box.x,
                            annotation->box.y, annotation->box.width, annotation->box.height, fault, image->width,
                            image->height);
        set->annotations[image->first_annotation + image->num_annotations++] = annotation->box;
    }
    free(image_of);
    for (int i = 0; i < set->num_images; i++)
        if (set->images[i].name) set->images[kept++] = set->images[i];
    set->num_images = kept;
}

// `folders`: where the pictures may be, the likeliest first. The first that has one of the first thousand pictures is
// taken; without a hit, the first.
static inline const char *coco_picture_folder(const Dataset *set, char *const *folders, int num_folders) {
    for (int i = 0; i < set->num_images && i < 1000; i++) {
        for (int f = 0; f < num_folders; f++) {
            char *path = format_string("%s/%s", folders[f], set->images[i].name);
            int found = is_inside_name(set->images[i].name) && is_file(path);
            free(path);
            if (found) return folders[f];
        }
    }
    return folders[0];
}

static inline int coco_load(Dataset *set, const char *path, char *const *folders, int num_folders, Error *error) {
    static const yajl_callbacks callbacks = {coco_on_null,
                                             coco_on_boolean,
                                             NULL,
                                             NULL,
                                             coco_on_number,
                                             coco_on_string,
                                             coco_on_start_map,
                                             coco_on_key,
                                             coco_on_end_map,
                                             coco_on_start_array,
                                             coco_on_end_array};
    CocoReader *reader = (CocoReader *)allocate(sizeof *reader);
    reader->set = set;
    reader->error = error;
    reader->path = path;
    reader->list = reader->field = -1;
    reader->without_names = num_folders == 0;
    set->format = "COCO";
    set->source = format_string("%s", path);
    int result = json_stream(path, &callbacks, reader, error);
    for (int list = 0; list < COCO_LISTS && result == 0; list++)
        if (!(reader->lists_seen >> list & 1))
            result = fail(error, "%s: has no list \"%s\": not a COCO annotation file", path, coco_list_names[list]);
    if (result == 0) result = dataset_index_ids(set, error);
    if (result == 0) {
        if (num_folders) coco_find_pictures(set, coco_picture_folder(set, folders, num_folders));
        coco_resolve(reader);
        result = dataset_finish(set, error);
    }
    free(reader->annotations);
    free(reader->text);
    free(reader);
    return result;
}

// Opens one COCO annotation file. image_folder NULL: annotations only; paths stay NULL, no picture is looked for, and
// what has no file_name or name is called by its id.
// 0; or -1, and then nothing is to be freed.
static inline int dataset_open_coco_file(Dataset *set, const char *json_path, const char *image_folder, Error *error) {
    memset(set, 0, sizeof *set);
    set->split = format_string("%s", json_path);
    char *folder = format_string("%s", image_folder ? image_folder : "");
    int result = coco_load(set, json_path, &folder, image_folder != NULL, error);
    free(folder);
    if (result != 0) dataset_free(set);
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Pascal VOC: one XML file a picture

typedef struct {
    char *name;         // of its class; NULL if it has none
    double corners[4];  // xmin, ymin, xmax, ymax
    int present;        // bits of `corners`
    int difficult;
    char fault[96];  // the first thing wrong with it, or ""
} VocObject;

typedef struct {
    XML_Parser parser;
    int depth;
    char path[128];  // elements that are open, "annotation/object/name"; those that do not fit are left out
    int lengths[8];  // of `path` at each depth
    char text[256];  // of the innermost element
    int text_length;
    int width, height;  // 0 where the file does not say
    VocObject *objects;
    int num_objects;
    const char *refusal;  // why the parse was ended, or NULL
} VocFile;

enum { VOC_PATH_DEPTH = 8, VOC_MAX_DEPTH = 256, VOC_MAX_BYTES = 64 << 20 };
static const char *const voc_corner_names[4] = {"xmin", "ymin", "xmax", "ymax"};

static inline void voc_refuse(VocFile *file, const char *why) {
    file->refusal = why;
    XML_StopParser(file->parser, XML_FALSE);
}

static void XMLCALL voc_on_start(void *context, const XML_Char *element, const XML_Char **attributes) {
    VocFile *file = (VocFile *)context;
    (void)attributes;
    file->text_length = 0;
    if (file->depth == 0 && strcmp(element, "annotation") != 0) voc_refuse(file, "its root is not <annotation>");
    if (file->depth >= VOC_MAX_DEPTH) voc_refuse(file, "nested too deep");
    if (file->depth < VOC_PATH_DEPTH) {
        size_t length = strlen(file->path);
        file->lengths[file->depth] = (int)length;
        snprintf(file->path + length, sizeof file->path - length, "%s%s", length ? "/" : "", element);
    }
    if (++file->depth == 2 && strcmp(file->path, "annotation/object") == 0) {
        file->objects = (VocObject *)grow(file->objects, (size_t)file->num_objects, sizeof(VocObject));
        memset(&file->objects[file->num_objects++], 0, sizeof(VocObject));
    }
}

static void XMLCALL voc_on_text(void *context, const XML_Char *text, int length) {
    VocFile *file = (VocFile *)context;
    for (int i = 0; i < length && file->text_length < (int)sizeof file->text - 1; i++) {
        if (file->text_length == 0 && isspace((unsigned char)text[i])) continue;
        file->text[file->text_length++] = text[i];
    }
}

static void XMLCALL voc_on_end(void *context, const XML_Char *element) {
    VocFile *file = (VocFile *)context;
    (void)element;
    while (file->text_length > 0 && isspace((unsigned char)file->text[file->text_length - 1])) file->text_length--;
    file->text[file->text_length] = 0;
    const char *inside = NULL, *text = file->text;
    char *end;
    double number = strtod(text, &end);
    int is_number = file->text_length > 0 && *end == 0 && isfinite(number);
    if (file->depth == 3 && strncmp(file->path, "annotation/size/", 16) == 0 && is_number && number >= 1 &&
        number <= INT32_MAX) {
        if (strcmp(file->path + 16, "width") == 0) file->width = (int)number;
        if (strcmp(file->path + 16, "height") == 0) file->height = (int)number;
    }
    if (file->depth <= 4 && strncmp(file->path, "annotation/object/", 18) == 0) inside = file->path + 18;
    if (inside) {
        VocObject *object = &file->objects[file->num_objects - 1];
        if (strcmp(inside, "name") == 0 && file->text_length > 0) {
            free(object->name);
            object->name = format_string("%s", text);
        }
        if (strcmp(inside, "difficult") == 0) object->difficult = is_number && number != 0;
        for (int i = 0; i < 4; i++) {
            if (strncmp(inside, "bndbox/", 7) != 0 || strcmp(inside + 7, voc_corner_names[i]) != 0) continue;
            object->present |= 1 << i;
            object->corners[i] = number;
            if (!is_number && !object->fault[0])
                snprintf(object->fault, sizeof object->fault, "%s \"%.40s\" is not a finite number", inside + 7, text);
        }
    }
    file->text_length = 0;
    if (--file->depth < VOC_PATH_DEPTH) file->path[file->lengths[file->depth]] = 0;
}

static void XMLCALL voc_on_entity(void *context, const XML_Char *name, int is_parameter, const XML_Char *value,
                                  int value_length, const XML_Char *base, const XML_Char *system_id,
                                  const XML_Char *public_id, const XML_Char *notation) {
    (void)name, (void)is_parameter, (void)value, (void)value_length, (void)base, (void)system_id, (void)public_id;
    (void)notation;
    voc_refuse((VocFile *)context, "it declares entities, which can blow up to any size");
}

static inline void voc_free(VocFile *file) {
    for (int i = 0; i < file->num_objects; i++) free(file->objects[i].name);
    free(file->objects);
}

// Reads one XML file; the caller frees it with voc_free, whatever the result. -1: not readable, or not VOC's XML.
static inline int voc_read(VocFile *file, const char *path, Error *error) {
    memset(file, 0, sizeof *file);
    char *bytes = NULL;
    size_t size = 0;
    if (read_file(path, &bytes, &size, error) != 0) return -1;
    file->parser = size <= VOC_MAX_BYTES ? XML_ParserCreate(NULL) : NULL;
    int result = -1;
    if (!file->parser) {
        fail(error, "%s: %zu bytes are too many for one picture's boxes", path, size);
    } else {
        XML_SetUserData(file->parser, file);
        XML_SetElementHandler(file->parser, voc_on_start, voc_on_end);
        XML_SetCharacterDataHandler(file->parser, voc_on_text);
        XML_SetEntityDeclHandler(file->parser, voc_on_entity);
        int good = XML_Parse(file->parser, bytes, (int)size, 1) == XML_STATUS_OK;
        if (file->refusal)
            fail(error, "%s: %s", path, file->refusal);
        else if (!good)
            fail(error, "%s: line %lu: not valid XML: %s", path, (unsigned long)XML_GetCurrentLineNumber(file->parser),
                 XML_ErrorString(XML_GetErrorCode(file->parser)));
        else
            result = 0;
        XML_ParserFree(file->parser);
    }
    free(bytes);
    return result;
}

// The categories: every class name in the folder's XML files, sorted, so that all splits agree on them.
static inline void voc_categories(Dataset *set, const char *folder) {
    int num_files, num_names = 0;
    char *annotations = format_string("%s/Annotations", folder);
    char **files = folder_names(annotations, &num_files), **names = NULL;
    for (int i = 0; i < num_files; i++) {
        if (!ends_with(files[i], ".xml")) continue;
        char *path = format_string("%s/%s", annotations, files[i]);
        VocFile file;
        Error unused;  // a broken file is listed if its picture is used
        int good = voc_read(&file, path, &unused) == 0;
        for (int k = 0; k < file.num_objects && good; k++) {
            char *name = file.objects[k].name;
            if (!name || (num_names && strcmp(names[num_names - 1], name) == 0)) continue;
            names = (char **)grow(names, (size_t)num_names, sizeof(char *));
            names[num_names++] = format_string("%s", name);
        }
        voc_free(&file);
        free(path);
    }
    if (names) qsort(names, (size_t)num_names, sizeof(char *), name_order);
    for (int i = 0; i < num_names; i++)
        if (i == 0 || strcmp(names[i - 1], names[i]) != 0) dataset_add_category(set, set->num_categories, names[i]);
    free_names(names, num_names);
    free_names(files, num_files);
    free(annotations);
}

// The boxes of one XML file, for the image added last.
static inline void voc_add_boxes(Dataset *set, const VocFile *file, const char *path) {
    for (int i = 0; i < file->num_objects; i++) {
        const VocObject *object = &file->objects[i];
        const double *corners = object->corners;
        char *where = format_string("%s: object %d", path, i + 1);
        Annotation box;
        memset(&box, 0, sizeof box);
        box.class_index = -1;
        for (int low = 0, high = set->num_categories; object->name && low < high;) {  // they are sorted
            const int middle = (low + high) / 2, order = strcmp(set->categories[middle].name, object->name);
            if (order == 0) box.class_index = middle;
            if (order < 0)
                low = middle + 1;
            else
                high = middle;
        }
        box.id = set->num_annotations;
        box.x = corners[0];
        box.y = corners[1];
        box.width = finite_number(corners[2] - corners[0]);
        box.height = finite_number(corners[3] - corners[1]);
        box.area = finite_number(box.width * box.height);
        box.ignore = object->difficult != 0;
        if (object->fault[0]) {
            dataset_problem(set, "%s: %s: box skipped", where, object->fault);
        } else if (object->present != 15) {
            dataset_problem(set, "%s: has no complete <bndbox>: box skipped", where);
        } else if (box.class_index < 0) {
            dataset_problem(set, "%s: has no <name>: box skipped", where);
        } else {
            dataset_add_box(set, box, where);
        }
        free(where);
    }
}

// One line of an image list: a name without its ending (VOC's lists by class have a flag behind it).
static inline void voc_add_image(Dataset *set, const char *folder, char *name) {
    static const char *const endings[] = {"jpg", "jpeg", "png", "JPG", "JPEG", "PNG"};
    if (!is_inside_name(name)) {
        dataset_problem(set, "%s: %s: name leaves the picture folder: skipped", set->source, name);
        set->skipped_images++;
        return;
    }
    char *path = format_string("%s/Annotations/%s.xml", folder, name), *picture = NULL;
    if (!is_file(path) && strcspn(name, " \t") < strlen(name)) {
        name[strcspn(name, " \t")] = 0;
        free(path);
        path = format_string("%s/Annotations/%s.xml", folder, name);
    }
    for (int i = 0; i < 6 && !picture; i++) {
        picture = format_string("%s/JPEGImages/%s.%s", folder, name, endings[i]);
        if (is_file(picture)) break;
        free(picture);
        picture = NULL;
    }
    VocFile file;
    memset(&file, 0, sizeof file);
    Error why;
    int good = 0;
    if (!picture) {
        fail(&why, "%s: %s: no picture JPEGImages/%s.jpg or .png", set->source, name, name);
    } else if (voc_read(&file, path, &why) == 0) {
        good = (file.width > 0 && file.height > 0) || image_read_size(picture, &file.width, &file.height, &why) == 0;
    }
    if (good) {
        dataset_add_image(set, set->num_images, strrchr(picture, '/') + 1, picture, file.width, file.height);
        voc_add_boxes(set, &file, path);
    } else {
        dataset_problem(set, "%s: picture skipped", why.text);
        set->skipped_images++;
        free(picture);
    }
    voc_free(&file);
    free(path);
}

// list: path of the ImageSets/Main file
static inline int voc_load(Dataset *set, const char *folder, const char *list, Error *error) {
    set->format = "VOC";
    set->source = format_string("%s", list);
    char *text, *rest;
    if (read_text_file(list, &text, error) != 0) return -1;
    voc_categories(set, folder);
    for (char *line = strtok_r(text, "\r\n", &rest); line; line = strtok_r(NULL, "\r\n", &rest)) {
        while (isspace((unsigned char)*line)) line++;
        for (size_t length = strlen(line); length > 0 && isspace((unsigned char)line[length - 1]);) line[--length] = 0;
        if (*line) voc_add_image(set, folder, line);
    }
    free(text);
    return dataset_finish(set, error);
}

// ---------------------------------------------------------------------------------------------------------------------
// YOLO: one text file a picture, "class cx cy width height" in parts of the picture; names in data.yaml

// Reads one YAML scalar from *at, up to a character of `stops`, the line's end or a comment; quotes removed. 0; -1 if
// it does not end or is longer than `size` allows.
static inline int yaml_scalar(const char **at, const char *stops, char *out, size_t size) {
    const char *from = *at;
    size_t length = 0;
    char quote = *from == '"' || *from == '\'' ? *from++ : 0;
    for (;; from++) {
        if (*from == 0 && quote) return -1;
        if (quote && *from == quote && !(quote == '\'' && from[1] == quote)) break;
        if (!quote && (*from == 0 || *from == '\n' || strchr(stops, *from))) break;
        if (!quote && *from == '#' && length > 0 && out[length - 1] == ' ') break;
        if (quote && ((*from == '\'' && from[1] == quote) || (quote == '"' && *from == '\\' && from[1]))) from++;
        if (length + 1 >= size) return -1;
        out[length++] = *from;
    }
    if (quote) from++;
    while (!quote && length > 0 && out[length - 1] == ' ') length--;
    out[length] = 0;
    *at = from;
    return 0;
}

// Past spaces and comments; past line ends too if `lines`.
static inline const char *yaml_skip(const char *at, int lines) {
    for (;; at++) {
        if (*at == '#') at += strcspn(at, "\n");
        if (*at == 0 || !(*at == ' ' || *at == '\t' || (lines && *at == '\n'))) return at;
    }
}

// The categories from data.yaml's `names`: [a, b], {0: a, 1: b}, or either of them over several lines. Not a YAML
// parser: what else a file may hold is passed over.
static inline int yolo_categories(Dataset *set, const char *path, Error *error) {
    char *text, key[32], name[256];
    if (read_text_file(path, &text, error) != 0) return -1;
    for (char *c = text; *c; c++)
        if (*c == '\r') *c = ' ';
    const char *at = text;
    while (at && strncmp(at, "names:", 6) != 0) at = (at = strchr(at, '\n')) ? at + 1 : NULL;
    int good = at != NULL;
    at = good ? yaml_skip(at + 6, 0) : "";
    char close = *at == '[' ? ']' : *at == '{' ? '}' : 0;
    const char *stops = close == ']' ? ",]" : close ? ",}" : "";
    if (close)
        at++;
    else
        good = good && *at == '\n';
    while (good) {
        at = yaml_skip(at, 1);
        int indented = at > text && at[-1] != '\n', is_item = *at == '-' && (at[1] == ' ' || at[1] == '\t');
        if (*at == 0 || (close && *at == close) || (!close && !indented && !is_item)) {
            good = !close || *at == close;
            break;
        }
        int64_t id = set->num_categories;
        if (!close && is_item) at = yaml_skip(at + 1, 0);
        if (close == '}' || (!close && !is_item)) {
            char *end = key;
            good = yaml_scalar(&at, ":", key, sizeof key) == 0 && *at == ':';
            if (good) id = strtoll(key, &end, 10);
            good = good && end > key && *end == 0;
            if (good) at = yaml_skip(at + 1, 0);
        }
        good = good && yaml_scalar(&at, stops, name, sizeof name) == 0 && name[0];
        if (good) dataset_add_category(set, id, name);
        at = yaml_skip(at, close != 0);
        if (close && *at == ',')
            at++;
        else if (close && *at != close)
            good = 0;
    }
    free(text);
    if (!good || set->num_categories == 0)
        return fail(error, "%s: \"names\" must be a list or a map of class names, [cat, dog] or {0: cat, 1: dog}",
                    path);
    return 0;
}

// The boxes of one label file, for the image added last. No file: a picture without boxes.
static inline void yolo_add_boxes(Dataset *set, const char *path) {
    char *text, *rest;
    Error why;
    if (!is_file(path)) return;
    if (read_text_file(path, &text, &why) != 0) {
        dataset_problem(set, "%s: boxes skipped", why.text);
        return;
    }
    const DatasetImage *image = &set->images[set->num_images - 1];
    int picture_width = image->width, picture_height = image->height, line_number = 0;
    for (char *line = text; line; line = rest) {
        rest = strchr(line, '\n');
        if (rest) *rest++ = 0;
        line_number++;
        double values[5] = {0, 0, 0, 0, 0};
        int count = 0, finite = 1;
        char *at = line, *end = line;
        for (;; at = end, count++) {
            double value = strtod(at, &end);
            if (end == at) break;
            finite &= isfinite(value) != 0;
            if (count < 5) values[count] = value;
        }
        while (isspace((unsigned char)*at)) at++;
        if (count == 0 && *at == 0) continue;
        char *where = format_string("%s: line %d", path, line_number);
        Annotation box;
        memset(&box, 0, sizeof box);
        box.id = set->num_annotations;
        box.class_index = -1;
        if (fabs(values[0]) < 1e15 && values[0] == floor(values[0]))
            box.class_index = dataset_category_index(set, (int64_t)values[0]);
        box.width = finite_number(values[3] * picture_width);
        box.height = finite_number(values[4] * picture_height);
        box.x = finite_number(finite_number(values[1] * picture_width) - 0.5 * box.width);
        box.y = finite_number(finite_number(values[2] * picture_height) - 0.5 * box.height);
        box.area = finite_number(box.width * box.height);
        if (*at)
            dataset_problem(set, "%s: \"%.40s\" is not a number: box skipped", where, at);
        else if (count != 5)
            dataset_problem(set, "%s: %d numbers, not the 5 of class, cx, cy, width, height: box skipped", where,
                            count);
        else if (!finite)
            dataset_problem(set, "%s: not finite: box skipped", where);
        else if (box.class_index < 0)
            dataset_problem(set, "%s: class %g is not in data.yaml's names: box skipped", where, values[0]);
        else
            dataset_add_box(set, box, where);
        free(where);
    }
    free(text);
}

static inline int yolo_load(Dataset *set, const char *folder, const char *pictures, const char *labels, Error *error) {
    set->format = "YOLO";
    set->source = format_string("%s/data.yaml", folder);
    if (yolo_categories(set, set->source, error) != 0 || dataset_index_ids(set, error) != 0) return -1;
    free(set->source);
    set->source = format_string("%s", pictures);
    int count;
    char **names = folder_names(pictures, &count);
    for (int i = 0; i < count; i++) {
        if (!is_picture_name(names[i])) {  // what else may lie there, notes and caches, is none of ours
            if (ends_with(names[i], ".bmp") || ends_with(names[i], ".webp") || ends_with(names[i], ".tif") ||
                ends_with(names[i], ".tiff") || ends_with(names[i], ".gif")) {
                dataset_problem(set, "%s/%s: not JPEG or PNG: picture skipped", pictures, names[i]);
                set->skipped_images++;
            }
            continue;
        }
        char *path = format_string("%s/%s", pictures, names[i]);
        int width, height, stem = (int)(strrchr(names[i], '.') - names[i]);
        Error why;
        if (image_read_size(path, &width, &height, &why) != 0) {
            dataset_problem(set, "%s: picture skipped", why.text);
            set->skipped_images++;
            free(path);
            continue;
        }
        dataset_add_image(set, set->num_images, names[i], path, width, height);
        char *label = format_string("%s/%.*s.txt", labels, stem, names[i]);
        yolo_add_boxes(set, label);
        free(label);
    }
    free_names(names, count);
    return dataset_finish(set, error);
}

// ---------------------------------------------------------------------------------------------------------------------
// Opening a folder

// The splits a folder holds, in its format.
typedef struct {
    const char *format;  // NULL: not a data set
    char **names;        // "train2017"
    char **sources;      // COCO: annotation file; VOC: list file; YOLO: folder of pictures
    char **labels;       // COCO: likeliest picture folder; YOLO: folder of labels
    int count;
} DatasetSplits;

static inline void splits_add(DatasetSplits *splits, const char *name, int name_length, char *source, char *labels) {
    size_t count = (size_t)splits->count++;
    splits->names = (char **)grow(splits->names, count, sizeof(char *));
    splits->sources = (char **)grow(splits->sources, count, sizeof(char *));
    splits->labels = (char **)grow(splits->labels, count, sizeof(char *));
    splits->names[count] = format_string("%.*s", name_length, name);
    splits->sources[count] = source;
    splits->labels[count] = labels;
}

static inline void splits_free(DatasetSplits *splits) {
    free_names(splits->names, splits->count);
    free_names(splits->sources, splits->count);
    free_names(splits->labels, splits->count);
}

// Calls nothing but stat and readdir: recognises the format, and lists the splits.
static inline void splits_find(DatasetSplits *splits, const char *folder) {
    memset(splits, 0, sizeof *splits);
    const char *inside[] = {"annotations", ".", "ImageSets/Main", "images"};
    for (int kind = 0; kind < 4 && splits->count == 0; kind++) {
        char *place = format_string("%s/%s", folder, inside[kind]);
        int count;
        char **names = folder_names(place, &count);
        for (int i = 0; i < count; i++) {
            const char *name = names[i], *tail = strrchr(name, '_');
            int length = (int)strlen(name);
            if (kind == 0 && strncmp(name, "instances_", 10) == 0 && ends_with(name, ".json")) {
                splits->format = "COCO";
                splits_add(splits, name + 10, length - 15, format_string("%s/%s", place, name),
                           format_string("%s/%.*s", folder, length - 15, name + 10));
            } else if (kind == 1) {
                char *json = format_string("%s/%s/_annotations.coco.json", folder, name);
                if (is_file(json)) {
                    splits->format = "COCO";
                    splits_add(splits, name, length, format_string("%s", json), format_string("%s/%s", folder, name));
                }
                free(json);
                char *pictures = format_string("%s/%s/images", folder, name);
                char *labels = format_string("%s/%s/labels", folder, name);
                if (is_directory(pictures) && is_directory(labels)) {
                    splits->format = "YOLO";
                    splits_add(splits, name, length, format_string("%s", pictures), format_string("%s", labels));
                }
                free(pictures);
                free(labels);
            } else if (kind == 2 && ends_with(name, ".txt")) {
                splits->format = "VOC";  // whose lists by class, cat_train.txt, are no splits
                if (!tail || !(strcmp(tail, "_train.txt") == 0 || strcmp(tail, "_val.txt") == 0 ||
                               strcmp(tail, "_trainval.txt") == 0 || strcmp(tail, "_test.txt") == 0))
                    splits_add(splits, name, length - 4, format_string("%s/%s", place, name), NULL);
            } else if (kind == 3) {
                char *pictures = format_string("%s/images/%s", folder, name);
                if (is_directory(pictures)) {
                    splits->format = "YOLO";
                    splits_add(splits, name, length, format_string("%s", pictures),
                               format_string("%s/labels/%s", folder, name));
                }
                free(pictures);
            }
        }
        free_names(names, count);
        free(place);
    }
    char *voc = format_string("%s/JPEGImages", folder), *yolo = format_string("%s/data.yaml", folder);
    if (!splits->format && is_directory(voc)) splits->format = "VOC";
    if (!splits->format && is_file(yolo)) splits->format = "YOLO";
    free(voc);
    free(yolo);
}

// How well a split's name fits what was asked for: 3 the name itself, 2 the other spelling of val, 1 with a year behind
// it ("train" finds train2017), 0 not.
static inline int split_fit(const char *name, const char *wanted) {
    size_t length = strlen(wanted);
    if (strcmp(name, wanted) == 0) return 3;
    if ((strcmp(wanted, "val") == 0 && strcmp(name, "valid") == 0) ||
        (strcmp(wanted, "valid") == 0 && strcmp(name, "val") == 0))
        return 2;
    return length > 0 && strncmp(name, wanted, length) == 0 && isdigit((unsigned char)name[length]) &&
           name[length + strspn(name + length, "0123456789")] == 0;
}

// Finds a split's place; -1 with the splits that are there if it is missing, or if two fit equally well.
static inline int splits_choose(const DatasetSplits *splits, const char *folder, const char *split, Error *error) {
    int chosen = -1, best = 0, equal = 0;
    char there[512] = "";
    for (int i = 0; i < splits->count; i++) {
        int fit = split_fit(splits->names[i], split);
        size_t length = strlen(there);
        snprintf(there + length, sizeof there - length, "%s%s", i ? ", " : "", splits->names[i]);
        equal = fit == best ? equal + 1 : fit > best ? 1 : equal;
        if (fit > best) best = fit, chosen = i;
    }
    if (!is_directory(folder)) return fail(error, "%s: no such folder", folder);
    if (!splits->format)
        return fail(
            error,
            "%s: no data set found: COCO has annotations/instances_train*.json or train/_annotations.coco.json, "
            "VOC has JPEGImages, Annotations and ImageSets/Main/*.txt, YOLO has images/train, labels/train and "
            "data.yaml",
            folder);
    if (chosen < 0)
        return fail(error, "%s: %s data set without split \"%s\": %s%s", folder, splits->format, split,
                    splits->count ? "there are " : "there is none", there);
    if (equal > 1)
        return fail(error, "%s: split \"%s\" fits more than one of %s: name one of them", folder, split, there);
    return chosen;
}

// 1 if the folder is a data set that has this split.
static inline int dataset_has_split(const char *folder, const char *split) {
    DatasetSplits splits;
    Error unused;
    splits_find(&splits, folder);
    int found = splits_choose(&splits, folder, split, &unused) >= 0;
    splits_free(&splits);
    return found;
}

// Opens one split of a folder: COCO, VOC or YOLO, whichever it is. Pictures that are missing, or whose size cannot be
// read where the format needs it, are listed as problems and left out. 0; or -1, and then nothing is to be freed.
static inline int dataset_open(Dataset *set, const char *folder, const char *split, Error *error) {
    memset(set, 0, sizeof *set);
    DatasetSplits splits;
    splits_find(&splits, folder);
    int chosen = splits_choose(&splits, folder, split, error), result = -1;
    if (chosen >= 0) {
        const char *source = splits.sources[chosen];
        set->split = format_string("%s", split);
        if (strcmp(splits.format, "VOC") == 0) {
            result = voc_load(set, folder, source, error);
        } else if (strcmp(splits.format, "YOLO") == 0) {
            result = yolo_load(set, folder, source, splits.labels[chosen], error);
        } else {
            char *folders[6] = {
                format_string("%s", splits.labels[chosen]), format_string("%s/images/%s", folder, splits.names[chosen]),
                format_string("%s/%s", folder, split),      format_string("%s/images/%s", folder, split),
                format_string("%s/images", folder),         format_string("%s", folder)};
            result = coco_load(set, source, folders, 6, error);
            for (int i = 0; i < 6; i++) free(folders[i]);
        }
    }
    splits_free(&splits);
    if (result != 0) dataset_free(set);
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Facts

// The boxes of a class that are trained on; by area as COCO: less than 32 x 32 pixels, less than 96 x 96, the others.
typedef struct {
    int all, by_area[3];
} BoxCounts;

// By class; the caller frees them.
static inline BoxCounts *dataset_count_boxes(const Dataset *set) {
    BoxCounts *counts = (BoxCounts *)allocate((size_t)set->num_categories * sizeof(BoxCounts));
    for (int i = 0; i < set->num_annotations; i++) {
        const Annotation *box = &set->annotations[i];
        if (!annotation_is_target(box)) continue;
        counts[box->class_index].all++;
        counts[box->class_index].by_area[box->area < 32 * 32 ? 0 : box->area < 96 * 96 ? 1 : 2]++;
    }
    return counts;
}

// What a user wants to know before a training: counts, then a line a class with the id it has in the file.
static inline void dataset_print_facts(FILE *file, const Dataset *set) {
    BoxCounts *boxes = dataset_count_boxes(set);
    fprintf(file, "data set   %s, split %s (%s)\n", set->format, set->split, set->source);
    fprintf(file, "images     %d, %d of them without boxes\n", set->num_images, set->num_without_targets);
    fprintf(file, "boxes      %d to train on, %d crowds, %d difficult\n", set->num_targets, set->num_crowds,
            set->num_ignored);
    fprintf(file, "skipped    %d entries: %d boxes that are empty or outside, %d images, %d others\n",
            set->num_problems, set->num_skipped, set->skipped_images,
            set->num_problems - set->num_skipped - set->skipped_images);
    fprintf(file, "classes    %d\n", set->num_categories);
    fprintf(file, "  index      id   boxes   small  medium   large  name\n");
    for (int i = 0; i < set->num_categories; i++)
        fprintf(file, "  %5d %7lld %7d %7d %7d %7d  %s\n", i, (long long)set->categories[i].id, boxes[i].all,
                boxes[i].by_area[0], boxes[i].by_area[1], boxes[i].by_area[2], set->categories[i].name);
    free(boxes);
}

#endif
