/*
A training run as one self-contained page, report.html: curves, scores by class, pictures with what was found and missed
in them, where the decoder looked, where time and memory went, the command. This header gathers nothing and draws
nothing: it writes what it is given as one JSON object into data/report.html, whose script draws it. That file is part
of the program (see report_page).

Nothing from outside becomes markup: every text is a JSON string, which has no "<" in it (json_print_string), and the
page's script makes text nodes of texts. A browser that opens the page asks the network for nothing; the page forbids
it.

Read in order: the log > what a page shows > writing it.

Compiles as C11 and as C++17.
*/
#ifndef DETR_REPORT_H
#define DETR_REPORT_H

#include "coco_eval.h"

// ---------------------------------------------------------------------------------------------------------------------
// The log: one JSON object a line, with the keys of DETR's log.txt

enum ReportColumn {
    REPORT_EPOCH,
    REPORT_LR,
    REPORT_PARAMETERS,
    REPORT_LOSS,  // this and what follows to REPORT_AP: training, then test
    REPORT_TEST_LOSS,
    REPORT_CE,
    REPORT_TEST_CE,
    REPORT_BBOX,
    REPORT_TEST_BBOX,
    REPORT_GIOU,
    REPORT_TEST_GIOU,
    REPORT_CLASS_ERROR,
    REPORT_TEST_CLASS_ERROR,
    REPORT_IOU,
    REPORT_TEST_IOU,
    REPORT_SPREAD,
    REPORT_TEST_SPREAD,
    REPORT_GRADIENT,
    REPORT_SECONDS,
    REPORT_AP,  // twelve COCO numbers
    REPORT_COLUMNS = REPORT_AP + 12
};

static const char *const report_keys[REPORT_AP + 1] = {"epoch",
                                                       "train_lr",
                                                       "n_parameters",
                                                       "train_loss",
                                                       "test_loss",
                                                       "train_loss_ce",
                                                       "test_loss_ce",
                                                       "train_loss_bbox",
                                                       "test_loss_bbox",
                                                       "train_loss_giou",
                                                       "test_loss_giou",
                                                       "train_class_error",
                                                       "test_class_error",
                                                       "train_matched_iou",
                                                       "test_matched_iou",
                                                       "train_query_spread",
                                                       "test_query_spread",
                                                       "train_grad_norm",
                                                       "seconds",
                                                       "test_coco_eval_bbox"};

// What a page shows of a line: row: (REPORT_COLUMNS), NAN where the line has no such number; number: the row's. 0, or
// -1 if the line is no JSON object.
static inline int report_read_line(double *row, const char *line, size_t size, int number) {
    Error why;
    yajl_val object = json_parse(line, size, "log", &why);
    const int status = YAJL_IS_OBJECT(object) ? 0 : -1;
    for (int column = 0; column < REPORT_COLUMNS && status == 0; column++) {
        yajl_val value = json_member(object, report_keys[column < REPORT_AP ? column : REPORT_AP]);
        size_t element = column < REPORT_AP ? 0 : (size_t)(column - REPORT_AP);
        if (YAJL_IS_ARRAY(value)) value = element < value->u.array.len ? value->u.array.values[element] : NULL;
        row[column] = YAJL_IS_DOUBLE(value) ? value->u.number.d : NAN;
        if (column >= REPORT_AP && row[column] < 0) row[column] = NAN;  // -1: no truth of that size
    }
    if (status == 0 && isnan(row[REPORT_EPOCH])) row[REPORT_EPOCH] = number;
    yajl_tree_free(object);
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// What a page shows

enum {
    REPORT_PICTURES = 12,
    REPORT_BOXES = 60,               // of a picture, the best
    REPORT_LOOKS = 8,                // boxes of a picture whose attention is shown
    REPORT_PICTURE_SIDE = 512,       // pixels of the longer side
    REPORT_ATTENTION_BYTES = 64000,  // of a picture; its number of such boxes is smaller where its maps are large
};

static const double REPORT_LEAST_SCORE = 0.05;  // boxes below it are not shown

// A picture of the evaluated split and what was said about it.
typedef struct {
    int image;            // place in the data set
    int width, height;    // of the picture there, as it is shown
    unsigned char *jpeg;  // made small; NULL: there is none
    size_t jpeg_size;
    EvalDetection boxes[REPORT_BOXES];  // best score first
    int queries[REPORT_BOXES];          // the decoder's query that said the box
    int num_boxes;
    // Cross-attention of the queries of some boxes
    int num_looks, num_layers, map_height, map_width;
    int looks[REPORT_LOOKS];  // places in `boxes`
    unsigned char *maps;      // (num_looks, num_layers, map_height, map_width): 255 is the map's own peak
    double *peaks;            // (num_looks, num_layers): the greatest weight; those of a map add up to 1
} ReportPicture;

// A line of a table.
typedef struct {
    const char *name, *detail;  // detail: or NULL
    double value, rate;         // rate: or 0
} ReportRow;

typedef struct {
    const char *title, *command;
    const char *flags;        // all of them, as a JSON object; or NULL
    const char *facts;        // data set, model, machine: lines of text; or NULL
    FILE *log;                // log.txt, opened to be read; or NULL
    int64_t steps, of_steps;  // taken, planned
    int64_t steps_per_epoch;
    double loss;           // mean over the epoch under way; NAN if it has not begun
    int64_t epoch;         // of the last evaluation, as in log.txt; -1: there was none, and the next four are not read
    const Dataset *set;    // what was evaluated
    CocoScores *scores;    // on it
    ReportPicture *shown;  // of it
    int num_shown;
    const ReportRow *times;  // seconds by phase
    int num_times;
    const ReportRow *work;  // value: seconds, rate: GFLOP/s, in one training step
    int num_work;
    const ReportRow *memory;  // planned bytes
    int num_memory;
    double peak_bytes;  // of memory that the process has had; 0: unknown
} Report;

static inline void report_picture_free(ReportPicture *picture) {
    free(picture->jpeg);
    free(picture->maps);
    free(picture->peaks);
    memset(picture, 0, sizeof *picture);
}

// Sets picture->jpeg from a file, once; it stays NULL if the file cannot be read.
static inline void report_picture_read(ReportPicture *picture, const char *path) {
    Image image;
    Error error;
    int width, height;
    if (picture->jpeg || image_read(path, &image, &error) != 0) return;
    picture->width = image.width, picture->height = image.height;
    resized_size(image.width, image.height, 1 << 20, REPORT_PICTURE_SIDE, &width, &height);
    if (width < image.width) image_resize(&image, width, height);
    char *bytes = NULL;
    FILE *file = open_memstream(&bytes, &picture->jpeg_size);
    int status = file ? jpeg_write_file(file, path, &image, &error) : -1;
    if (file) fclose(file);
    if (status != 0) free(bytes);
    if (status == 0) picture->jpeg = (unsigned char *)bytes;
    image_free(&image);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing: JSON

static inline void base64_print(FILE *file, const unsigned char *bytes, size_t size) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < size; i += 3) {
        size_t left = size - i;
        unsigned triple = (unsigned)bytes[i] << 16;
        if (left > 1) triple |= (unsigned)bytes[i + 1] << 8;
        if (left > 2) triple |= bytes[i + 2];
        fputc(digits[triple >> 18], file);
        fputc(digits[triple >> 12 & 63], file);
        fputc(left > 1 ? digits[triple >> 6 & 63] : '=', file);
        fputc(left > 2 ? digits[triple & 63] : '=', file);
    }
}

// A number to be looked at: six digits; null where there is none.
static inline void report_print_number(FILE *file, double value) {
    if (isfinite(value))
        fprintf(file, "%.6g", value);
    else
        fputs("null", file);
}

static inline void report_print_numbers(FILE *file, const double *values, size_t count) {
    for (size_t i = 0; i < count; i++) {
        fputc(i ? ',' : '[', file);
        report_print_number(file, values[i]);
    }
    fputs(count ? "]" : "[]", file);
}

// A text; null for NULL.
static inline void report_print_text(FILE *file, const char *text) {
    if (text)
        json_print_string(file, text);
    else
        fputs("null", file);
}

static inline void report_print_rows(FILE *file, const char *key, const ReportRow *rows, int count) {
    fprintf(file, ",\n\"%s\": [", key);
    for (int i = 0; i < count; i++) {
        fputs(i ? ", {\"name\": " : "{\"name\": ", file);
        report_print_text(file, rows[i].name);
        fputs(", \"detail\": ", file);
        report_print_text(file, rows[i].detail);
        fputs(", \"value\": ", file);
        report_print_number(file, rows[i].value);
        fputs(", \"rate\": ", file);
        report_print_number(file, rows[i].rate);
        fputc('}', file);
    }
    fputc(']', file);
}

// Line by line: the log of a long run is not held in memory.
static inline void report_print_log(FILE *file, FILE *log) {
    double row[REPORT_COLUMNS];
    char *line = NULL;
    size_t room = 0;
    int rows = 0, bad_lines = 0;
    fputs(",\n\"log\": {\"keys\": [", file);
    for (int column = 0; column <= REPORT_AP; column++)
        fprintf(file, "%s\"%s\"", column ? ", " : "", report_keys[column]);
    fputs("], \"rows\": [", file);  // the last key's numbers to the end of the row
    for (ssize_t size; log && (size = getline(&line, &room, log)) > 0;) {
        if (line[strspn(line, " \t\r\n")] == 0) continue;
        if (report_read_line(row, line, (size_t)size, rows) != 0) {
            bad_lines++;
            continue;
        }
        fputs(rows++ ? ",\n" : "\n", file);
        report_print_numbers(file, row, REPORT_COLUMNS);
    }
    fprintf(file, "], \"bad_lines\": %d}", bad_lines);
    free(line);
}

static inline void report_print_scores(FILE *file, const Report *report) {
    const CocoScores *scores = report->scores;
    fprintf(file, ",\n\"evaluation\": {\"epoch\": %lld, \"images\": %d, \"split\": ", (long long)report->epoch,
            report->set->num_images);
    report_print_text(file, report->set->split);
    fputs(", \"stats\": ", file);
    report_print_numbers(file, scores->stats, 12);
    fputs(", \"classes\": [", file);
    for (int c = 0; c < scores->num_classes; c++) {
        fputs(c ? ",\n{\"name\": " : "\n{\"name\": ", file);
        report_print_text(file, report->set->categories[c].name);
        fprintf(file, ", \"boxes\": %d, \"ap\": ", scores->class_truths[c]);
        report_print_number(file, scores->class_ap[c]);
        fputs(", \"ap50\": ", file);
        report_print_number(file, scores->class_ap50[c]);
        fputs(", \"precision\": ", file);
        report_print_numbers(file, scores->class_curves[c].precision,
                             scores->class_truths[c] ? COCO_RECALLS : 0);  // at IoU 0.5
        fputs(", \"score\": ", file);
        report_print_numbers(file, scores->class_curves[c].score, scores->class_truths[c] ? COCO_RECALLS : 0);
        fputc('}', file);
    }
    fputs("]}", file);
}

// Boxes are [class, x, y, width, height, ...] in pixels of the data set's picture; truth goes on with 1
// where it is a crowd or difficult, which counts neither way, what was found with its score and its query.
static inline void report_print_picture(FILE *file, const ReportPicture *picture, const Dataset *set) {
    const DatasetImage *image = &set->images[picture->image];
    fputs("{\"name\": ", file);
    report_print_text(file, image->name);
    fprintf(file, ", \"width\": %d, \"height\": %d, \"truth\": [", picture->width, picture->height);
    for (int a = 0, count = 0; a < image->num_annotations; a++) {
        const Annotation *truth = &set->annotations[image->first_annotation + a];
        if (truth->skipped) continue;
        fprintf(file, "%s[%d,%.5g,%.5g,%.5g,%.5g,%d]", count++ ? "," : "", truth->class_index, truth->x, truth->y,
                truth->width, truth->height, truth->crowd || truth->ignore);
    }
    fputs("], \"found\": [", file);
    for (int b = 0; b < picture->num_boxes; b++) {
        const EvalDetection *box = &picture->boxes[b];
        fprintf(file, "%s[%d,%.5g,%.5g,%.5g,%.5g,%.4g,%d]", b ? "," : "", box->category, box->box[0], box->box[1],
                box->box[2], box->box[3], box->score, picture->queries[b]);
    }
    fprintf(file, "],\n\"attention\": {\"height\": %d, \"width\": %d, \"layers\": %d, \"boxes\": [",
            picture->map_height, picture->map_width, picture->num_layers);
    for (int look = 0; look < picture->num_looks; look++) fprintf(file, "%s%d", look ? "," : "", picture->looks[look]);
    const size_t count = (size_t)picture->num_looks * (size_t)picture->num_layers;
    fputs("], \"peaks\": ", file);
    report_print_numbers(file, picture->peaks, count);
    fputs(", \"maps\": \"", file);
    base64_print(file, picture->maps, count * (size_t)picture->map_height * (size_t)picture->map_width);
    fputs("\"},\n\"jpeg\": \"", file);
    base64_print(file, picture->jpeg, picture->jpeg_size);
    fputs("\"}", file);
}

static inline void report_print(FILE *file, const Report *report) {
    char now[32];
    time_t seconds = time(NULL);
    strftime(now, sizeof now, "%Y-%m-%d %H:%M", localtime(&seconds));
    fputs("{\"title\": ", file);
    report_print_text(file, report->title);
    fprintf(file,
            ", \"written\": \"%s\", \"steps\": %lld, \"of_steps\": %lld, \"steps_per_epoch\": %lld, \"loss\": ", now,
            (long long)report->steps, (long long)report->of_steps, (long long)report->steps_per_epoch);
    report_print_number(file, report->loss);
    fputs(",\n\"command\": ", file);
    report_print_text(file, report->command);
    fputs(",\n\"facts\": ", file);
    report_print_text(file, report->facts);
    fprintf(file, ",\n\"flags\": %s, \"peak_bytes\": %.0f", report->flags ? report->flags : "null", report->peak_bytes);
    report_print_rows(file, "times", report->times, report->num_times);
    report_print_rows(file, "work", report->work, report->num_work);
    report_print_rows(file, "memory", report->memory, report->num_memory);
    report_print_log(file, report->log);
    if (report->epoch >= 0) {
        report_print_scores(file, report);
        fputs(",\n\"pictures\": [", file);
        for (int i = 0, count = 0; i < report->num_shown; i++) {
            if (!report->shown[i].jpeg) continue;
            fputs(count++ ? ",\n" : "\n", file);
            report_print_picture(file, &report->shown[i], report->set);
        }
        fputc(']', file);
    }
    fputs("}\n", file);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing: the page

// The bytes of data/report.html, which the assembler copies into the program; __FILE__ is this header's path, and that
// page lies beside it.
#ifdef __APPLE__
#define READ_ONLY_SECTION ".section __TEXT,__const\n"
#else
#define READ_ONLY_SECTION ".section .rodata\n"
#endif
__asm__(READ_ONLY_SECTION "report_page:\n.incbin \"" __FILE__ "tml\"\n.byte 0\n.text\n");
extern const char report_page[] __asm__("report_page");

// Writes the page beside its place and renames it, so that a page is always whole. 0, or -1.
static inline int report_write(const char *path, const Report *report, Error *error) {
    static const char place[] = "DATA OF THE RUN";
    const char *rest = strstr(report_page, place);
    char *temporary = format_string("%s.tmp", path);
    FILE *file = fopen(temporary, "w");
    int bad = !file;
    if (file) {
        fwrite(report_page, 1, (size_t)(rest - report_page), file);
        report_print(file, report);
        fputs(rest + strlen(place), file);
        bad = ferror(file);
        bad |= fclose(file) != 0;
    }
    if (bad || rename(temporary, path) != 0) bad = fail(error, "%s: cannot be written: %s", path, strerror(errno));
    if (bad) remove(temporary);
    free(temporary);
    return bad ? -1 : 0;
}

#endif
