/*
How good are the boxes? COCO's average precision (AP), equal to pycocotools' COCOeval for boxes to the last bit,
because every published number was made by it. This header holds the measure and, in its last room, the files around
it (truth from a data set, results read and written, the scores as text and as JSON). It knows nothing of the model.

What AP is. A detector gives boxes with a class and a score. Take one class and one IoU threshold, say 0.5:

 1. In each picture the detections, best score first, each take the free truth box of the class that they overlap most,
    if the IoU (intersection over union) reaches the threshold. A detection with a truth is a true positive, one
    without is a false positive; a truth box can be found only once, so the second box on the same thing is false.
 2. All pictures' detections together are sorted by score. Going down the list is lowering the bar: after each one,
    recall    = true positives so far / all truth boxes        (how much of what is there was found)
    precision = true positives so far / detections so far      (how much of what was found is there)
 3. AP is the area under precision as a function of recall. Precision is first made a falling staircase (at each recall
    the best precision at that or any higher recall), then read at the 101 recalls 0, 0.01 ... 1 and averaged. A recall
    that was never reached counts as precision 0.

"AP" without more is the mean over ten IoU thresholds 0.5, 0.55 ... 0.95 and over the classes that have truth; AP50 and
AP75 use one threshold. AR, average recall, is the recall at the end of the list, averaged likewise, with only the best
1, 10 or 100 detections of each picture and class.

What is ignored counts neither for nor against. A truth box is ignored if it is a crowd ("many people here"), or if its
area lies outside the range that is asked for (small, medium, large). A detection is ignored if it took an ignored
truth, or if it took none and its own area is outside the range. A real truth is always preferred to an ignored one.

Read in order: one picture (match_image), one class (evaluate_class), all classes (coco_evaluate), files.

Compiles as C11 and as C++17.
*/
#ifndef DETR_COCO_EVAL_H
#define DETR_COCO_EVAL_H

#include <float.h>

#include "dataset.h"
#include "json.h"

// `image` is any number: pictures are taken in its order, which matters only between equal scores in two pictures
// (pycocotools goes by image id); classes likewise, for the last bit of a mean. A category outside 0 .. num_categories
// - 1 is left out.
typedef struct {
    int image, category;
    double box[4], area;  // x, y, width, height in pixels; the area may be an outline's, smaller than the box's
    int crowd;            // many things in one box: found any number of times, never missed
    int ignore;           // not asked for (VOC's "difficult"): likewise, but its IoU is as for any other box
    int id_is_zero;  // pycocotools marks "no match" by the id 0: a truth of that id stays missed though it is taken
} EvalTruth;

typedef struct {
    int image, category;
    double box[4];  // x, y, width, height in pixels
    double score;
} EvalDetection;

enum { COCO_THRESHOLDS = 10, COCO_RECALLS = 101, COCO_AREAS = 4, COCO_SETTINGS = 6 };

// Of one class at IoU 0.5, all areas, 100 detections: the staircase at the recalls 0, 0.01 ... 1 and the score down to
// which one must go for that recall. -1 where there is no truth; both 0 at a recall that is not reached.
typedef struct {
    double precision[COCO_RECALLS], score[COCO_RECALLS];
} CocoCurve;

typedef struct {
    double stats[12];  // the lines that coco_print prints; -1 where there is no truth
    int num_classes;   // of the arrays below
    double *class_ap;  // mean over the ten IoU thresholds, all areas, 100 detections; -1 where there is no truth
    double *class_ap50;
    int *class_truths;  // boxes to be found: crowds and ignored ones not counted
    CocoCurve *class_curves;
} CocoScores;

// numpy.linspace(.5, .95, 10): 0.9 comes out one bit low, and pycocotools compares with that.
static const double coco_thresholds[COCO_THRESHOLDS] = {0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.8999999999999999,
                                                        0.95};

// Square pixels; both ends belong to the range, so a box of exactly 32 x 32 is small and medium.
static const double coco_areas[COCO_AREAS][2] = {{0, 1e10}, {0, 32 * 32}, {32 * 32, 96 * 96}, {96 * 96, 1e10}};
static const char *const coco_area_names[COCO_AREAS] = {"all", "small", "medium", "large"};

// The ways to count that the twelve lines need.
static const struct {
    int area, max_detections;
} coco_settings[COCO_SETTINGS] = {{0, 100}, {1, 100}, {2, 100}, {3, 100}, {0, 1}, {0, 10}};

static const struct {
    int recall;     // 1: average recall, 0: average precision
    int threshold;  // index into coco_thresholds; -1: the mean over all ten
    int setting;    // index into coco_settings
} coco_lines[12] = {{0, -1, 0}, {0, 0, 0},  {0, 5, 0},  {0, -1, 1}, {0, -1, 2}, {0, -1, 3},
                    {1, -1, 4}, {1, -1, 5}, {1, -1, 0}, {1, -1, 1}, {1, -1, 2}, {1, -1, 3}};

// ---------------------------------------------------------------------------------------------------------------------
// One picture, one class

// What became of a detection.
enum { COCO_FALSE_POSITIVE, COCO_TRUE_POSITIVE, COCO_IGNORED };

// Intersection over union of two boxes x, y, width, height. With a crowd: intersection over the detection's own area,
// for a detection inside the crowd's box is no error however small. As in pycocotools' bbIou, to the bit: `volatile`
// keeps the compiler from fusing a product into a sum, which rounds otherwise and could cross a threshold.
static inline double coco_iou(const double detection[4], const double truth[4], int crowd) {
    double width = fmin(detection[0] + detection[2], truth[0] + truth[2]) - fmax(detection[0], truth[0]);
    if (width <= 0) return 0;
    double height = fmin(detection[1] + detection[3], truth[1] + truth[3]) - fmax(detection[1], truth[1]);
    if (height <= 0) return 0;
    volatile double intersection = width * height, detection_area = detection[2] * detection[3],
                    truth_area = truth[2] * truth[3];
    double both = crowd ? detection_area : detection_area + truth_area - intersection;
    return intersection / both;
}

static inline int coco_outside(double area, int range) {
    return area < coco_areas[range][0] || area > coco_areas[range][1];
}

// Which truth a detection takes: the free one with the largest IoU, if that reaches the threshold; a real one before
// any ignored one; of equal ones the last. ious: (num_truths), of this detection; order: (num_truths), the truths with
// the num_real real ones first; taken: (num_truths). Returns a place in `order`, or -1.
static inline int best_truth(const double *ious, const int *order, int num_truths, int num_real, const int *taken,
                             double threshold) {
    double best = threshold;
    int match = -1;
    for (int place = 0; place < num_truths; place++) {
        if (place >= num_real && match >= 0 && match < num_real) break;
        if (taken[order[place]] || ious[order[place]] < best) continue;
        best = ious[order[place]];
        match = place;
    }
    return match;
}

// Step 1 for the detections of one picture and class, for all area ranges and thresholds.
// detections: (num_detections) pointers, best score first; truths: (num_truths) pointers, in the file's order;
// outcomes: outcomes[(area * COCO_THRESHOLDS + threshold) * stride + d] is set to what became of detection d;
// num_positive: (COCO_AREAS), += the truths that are not ignored in that range.
static inline void match_image(const EvalDetection *const *detections, int num_detections,
                               const EvalTruth *const *truths, int num_truths, unsigned char *outcomes, size_t stride,
                               int num_positive[COCO_AREAS]) {
    double *ious = (double *)allocate((size_t)num_detections * num_truths * sizeof(double));
    for (int d = 0; d < num_detections; d++)
        for (int t = 0; t < num_truths; t++)
            ious[(size_t)d * num_truths + t] = coco_iou(detections[d]->box, truths[t]->box, truths[t]->crowd);
    int *order = (int *)allocate((size_t)num_truths * sizeof(int));  // real truths, then ignored ones
    int *taken = (int *)allocate((size_t)num_truths * sizeof(int));  // 1: by a detection
    for (int area = 0; area < COCO_AREAS; area++) {
        int num_real = 0, placed = 0;
        for (int pass = 0; pass < 2; pass++) {
            for (int t = 0; t < num_truths; t++) {
                int ignored = truths[t]->crowd || truths[t]->ignore || coco_outside(truths[t]->area, area);
                if (ignored == pass) order[placed++] = t;
            }
            if (pass == 0) num_real = placed;
        }
        num_positive[area] += num_real;
        for (int threshold = 0; threshold < COCO_THRESHOLDS; threshold++) {
            unsigned char *outcome = outcomes + (size_t)(area * COCO_THRESHOLDS + threshold) * stride;
            memset(taken, 0, (size_t)num_truths * sizeof(int));
            for (int d = 0; d < num_detections; d++) {
                int match = best_truth(ious + (size_t)d * num_truths, order, num_truths, num_real, taken,
                                       coco_thresholds[threshold]);
                const EvalTruth *truth = match < 0 ? NULL : truths[order[match]];
                if (truth) taken[order[match]] = !truth->crowd && !truth->ignore;
                int found = truth && !truth->id_is_zero;
                int outside = coco_outside(detections[d]->box[2] * detections[d]->box[3], area);
                outcome[d] = found ? COCO_TRUE_POSITIVE : COCO_FALSE_POSITIVE;
                if (match >= num_real || (!found && outside)) outcome[d] = COCO_IGNORED;
            }
        }
    }
    free(ious);
    free(order);
    free(taken);
}

// ---------------------------------------------------------------------------------------------------------------------
// One class, all pictures

// A truth or a detection, for sorting.
typedef struct {
    int category, image, index;
    double score;
} CocoItem;

// By class, then picture, then score from high to low, then place in the input. No two items are equal, so that any
// sorting algorithm gives the order of numpy's stable merge sort.
static inline int compare_coco_items(const void *left, const void *right) {
    const CocoItem *a = (const CocoItem *)left, *b = (const CocoItem *)right;
    if (a->category != b->category) return a->category < b->category ? -1 : 1;
    if (a->image != b->image) return a->image < b->image ? -1 : 1;
    if (a->score != b->score) return a->score > b->score ? -1 : 1;
    return a->index < b->index ? -1 : a->index > b->index;
}

// By setting and IoU threshold; -1 where there is no truth.
typedef struct {
    double precision[COCO_SETTINGS][COCO_THRESHOLDS][COCO_RECALLS];
    double recall[COCO_SETTINGS][COCO_THRESHOLDS];  // at the end of the list
    double score[COCO_RECALLS];                     // CocoCurve's
    int truths;                                     // not ignored, all areas
} CocoClass;

// Steps 2 and 3. order: (count) detections by falling score; rank[d]: place of detection d by score in its own picture,
// those from max_detections on are left out; outcomes: (count), by detection; curve: scratch, 3 * count numbers;
// precision and score: (COCO_RECALLS) are set, *recall too.
static inline void precision_and_recall(const CocoItem *order, int count, const int *rank, int max_detections,
                                        const unsigned char *outcomes, int num_positive, double *curve,
                                        double *precision, double *score, double *recall) {
    double *recalls = curve, *precisions = curve + count, *scores = curve + 2 * count;
    double true_positives = 0, false_positives = 0;
    int points = 0;
    for (int i = 0; i < count; i++) {
        int detection = order[i].index;
        if (rank[detection] >= max_detections || outcomes[detection] == COCO_IGNORED) continue;
        if (outcomes[detection] == COCO_TRUE_POSITIVE)
            true_positives++;
        else
            false_positives++;
        recalls[points] = true_positives / num_positive;
        scores[points] = order[i].score;
        precisions[points++] = true_positives / (false_positives + true_positives + DBL_EPSILON);  // as pycocotools
    }
    for (int i = points - 1; i > 0; i--)
        if (precisions[i] > precisions[i - 1]) precisions[i - 1] = precisions[i];
    for (int i = 0, point = 0; i < COCO_RECALLS; i++) {
        while (point < points && recalls[point] < i * 0.01) point++;  // i * 0.01 is numpy.linspace(0, 1, 101)[i]
        precision[i] = point < points ? precisions[point] : 0;
        score[i] = point < points ? scores[point] : 0;
    }
    *recall = points ? recalls[points - 1] : 0;
}

// truth_items, detection_items: those of one class, in the order of compare_coco_items. Only the best 100
// detections of an image are matched, for no setting counts more.
static inline void evaluate_class(CocoClass *scores, const EvalTruth *truths, const CocoItem *truth_items,
                                  int num_truths, const EvalDetection *detections, const CocoItem *detection_items,
                                  int num_detections) {
    size_t count = (size_t)num_detections;
    const EvalTruth **class_truths = (const EvalTruth **)allocate((size_t)num_truths * sizeof(EvalTruth *));
    const EvalDetection **class_detections = (const EvalDetection **)allocate(count * sizeof(EvalDetection *));
    CocoItem *order = (CocoItem *)allocate(count * sizeof *order);  // by score, over all images
    int *rank = (int *)allocate(count * sizeof *rank);
    unsigned char *outcomes = (unsigned char *)allocate(COCO_AREAS * COCO_THRESHOLDS * count);
    double *curve = (double *)allocate(3 * count * sizeof *curve);
    int num_positive[COCO_AREAS] = {0, 0, 0, 0};
    for (int t = 0; t < num_truths; t++) class_truths[t] = &truths[truth_items[t].index];
    for (int t = 0, d = 0; t < num_truths || d < num_detections;) {  // image by image
        int from_truths = d == num_detections || (t < num_truths && truth_items[t].image < detection_items[d].image);
        int image = from_truths ? truth_items[t].image : detection_items[d].image;
        int first_truth = t, first = d;
        while (t < num_truths && truth_items[t].image == image) t++;
        for (; d < num_detections && detection_items[d].image == image; d++) {
            class_detections[d] = &detections[detection_items[d].index];
            rank[d] = d - first;
            order[d].score = detection_items[d].score;
            order[d].index = d;
        }
        int matched = d - first < 100 ? d - first : 100;
        match_image(class_detections + first, matched, class_truths + first_truth, t - first_truth, outcomes + first,
                    count, num_positive);
    }
    qsort(order, count, sizeof *order, compare_coco_items);
    scores->truths = num_positive[0];
    for (int setting = 0; setting < COCO_SETTINGS; setting++) {
        int area = coco_settings[setting].area;
        for (int threshold = 0; threshold < COCO_THRESHOLDS; threshold++) {
            double *precision = scores->precision[setting][threshold], *recall = &scores->recall[setting][threshold];
            double unused[COCO_RECALLS], *score = setting == 0 && threshold == 0 ? scores->score : unused;
            if (num_positive[area] == 0) {
                for (int i = 0; i < COCO_RECALLS; i++) precision[i] = score[i] = -1;
                *recall = -1;
            } else {
                precision_and_recall(order, num_detections, rank, coco_settings[setting].max_detections,
                                     outcomes + (size_t)(area * COCO_THRESHOLDS + threshold) * count,
                                     num_positive[area], curve, precision, score, recall);
            }
        }
    }
    free((void *)class_truths);
    free((void *)class_detections);
    free(order);
    free(rank);
    free(outcomes);
    free(curve);
}

// ---------------------------------------------------------------------------------------------------------------------
// All classes

// The sum in numpy's order of additions (pairwise summation), so that the mean is numpy's to the bit and its third
// digit is rounded the same way.
static inline double numpy_sum(const double *values, size_t count) {
    if (count > 128) {
        size_t half = count / 2 - count / 2 % 8;
        return numpy_sum(values, half) + numpy_sum(values + half, count - half);
    }
    double sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    size_t whole = count - count % 8;
    for (size_t i = 0; i < whole; i++) sums[i % 8] += values[i];
    double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (size_t i = whole; i < count; i++) sum += values[i];
    return sum;
}

// One of the twelve numbers, over the classes given: the mean of all precisions (recalls) that are not -1, or -1.
static inline double coco_mean(const CocoClass *classes, int num_classes, int line) {
    int setting = coco_lines[line].setting, only = coco_lines[line].threshold, is_recall = coco_lines[line].recall;
    double *values = (double *)allocate((size_t)COCO_THRESHOLDS * COCO_RECALLS * num_classes * sizeof(double));
    size_t count = 0;
    for (int threshold = 0; threshold < COCO_THRESHOLDS; threshold++) {
        if (only >= 0 && threshold != only) continue;
        for (int i = 0; i < (is_recall ? 1 : COCO_RECALLS); i++) {
            for (int c = 0; c < num_classes; c++) {
                double value =
                    is_recall ? classes[c].recall[setting][threshold] : classes[c].precision[setting][threshold][i];
                if (value > -1) values[count++] = value;
            }
        }
    }
    double mean = count ? numpy_sum(values, count) / (double)count : -1;
    free(values);
    return mean;
}

static inline void coco_scores_allocate(CocoScores *scores, int num_classes) {
    scores->num_classes = num_classes;
    scores->class_ap = (double *)allocate((size_t)num_classes * sizeof(double));
    scores->class_ap50 = (double *)allocate((size_t)num_classes * sizeof(double));
    scores->class_truths = (int *)allocate((size_t)num_classes * sizeof(int));
    scores->class_curves = (CocoCurve *)allocate((size_t)num_classes * sizeof(CocoCurve));
}

static inline void coco_scores_free(CocoScores *scores) {
    free(scores->class_ap);
    free(scores->class_ap50);
    free(scores->class_truths);
    free(scores->class_curves);
    memset(scores, 0, sizeof *scores);
}

// Fills *scores, whose arrays coco_scores_free frees. Neither input is changed; the order of equal scores in
// `detections` matters, as in pycocotools. 500,000 detections and 35,000 truths of 80 classes take half a second on one
// core.
static inline void coco_evaluate(CocoScores *scores, const EvalTruth *truths, int num_truths,
                                 const EvalDetection *detections, int num_detections, int num_categories) {
    CocoItem *truth_items = (CocoItem *)allocate((size_t)num_truths * sizeof(CocoItem));
    CocoItem *detection_items = (CocoItem *)allocate((size_t)num_detections * sizeof(CocoItem));
    // Class c has items first[c] .. first[c + 1] - 1.
    int *first_truth = (int *)allocate(((size_t)num_categories + 1) * sizeof(int));
    int *first_detection = (int *)allocate(((size_t)num_categories + 1) * sizeof(int));
    int kept_truths = 0, kept_detections = 0;
    for (int t = 0; t < num_truths; t++) {
        int category = truths[t].category;
        if (category < 0 || category >= num_categories) continue;
        CocoItem item = {category, truths[t].image, t, 0};
        truth_items[kept_truths++] = item;
        first_truth[category + 1]++;
    }
    for (int d = 0; d < num_detections; d++) {
        int category = detections[d].category;
        if (category < 0 || category >= num_categories) continue;
        double score = detections[d].score;
        CocoItem item = {category, detections[d].image, d, isnan(score) ? -INFINITY : score};
        detection_items[kept_detections++] = item;
        first_detection[category + 1]++;
    }
    for (int c = 0; c < num_categories; c++) {
        first_truth[c + 1] += first_truth[c];
        first_detection[c + 1] += first_detection[c];
    }
    qsort(truth_items, (size_t)kept_truths, sizeof(CocoItem), compare_coco_items);
    qsort(detection_items, (size_t)kept_detections, sizeof(CocoItem), compare_coco_items);

    CocoClass *classes = (CocoClass *)allocate((size_t)num_categories * sizeof(CocoClass));
    for (int c = 0; c < num_categories; c++)
        evaluate_class(&classes[c], truths, truth_items + first_truth[c], first_truth[c + 1] - first_truth[c],
                       detections, detection_items + first_detection[c], first_detection[c + 1] - first_detection[c]);

    coco_scores_allocate(scores, num_categories);
    for (int c = 0; c < num_categories; c++) {
        scores->class_ap[c] = coco_mean(&classes[c], 1, 0);
        scores->class_ap50[c] = coco_mean(&classes[c], 1, 1);
        scores->class_truths[c] = classes[c].truths;
        memcpy(scores->class_curves[c].precision, classes[c].precision[0][0], sizeof classes[c].precision[0][0]);
        memcpy(scores->class_curves[c].score, classes[c].score, sizeof classes[c].score);
    }
    for (int line = 0; line < 12; line++) scores->stats[line] = coco_mean(classes, num_categories, line);
    free(truth_items);
    free(detection_items);
    free(first_truth);
    free(first_detection);
    free(classes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores of a data set

// rank[i]: the place of element i of `count` when they are sorted by id. The caller frees it.
static inline int *ranks_by_id(const IdPlace *sorted, int count) {
    int *rank = (int *)allocate((size_t)count * sizeof(int));
    for (int i = 0; i < count; i++) rank[sorted[i].index] = i;
    return rank;
}

// The most bytes that so many detections take while they are scored, themselves included: all of one class.
static inline double coco_score_bytes(double num_detections) {
    return num_detections * (2 * sizeof(EvalDetection) + 2 * sizeof(CocoItem) + sizeof(EvalDetection *) + sizeof(int) +
                             COCO_AREAS * COCO_THRESHOLDS + 3 * sizeof(double));
}

// Scores detections whose `image` and `category` are places in set->images and set->categories, against all boxes of
// the data set; those that are skipped as training targets (empty, outside) count here as they do in pycocotools.
// Images and classes are gone through by id, as there; the scores by class are in the order of set->categories.
static inline void coco_score(CocoScores *scores, const Dataset *set, const EvalDetection *detections,
                              int num_detections) {
    EvalTruth *truths = (EvalTruth *)allocate((size_t)set->num_annotations * sizeof(EvalTruth));
    EvalDetection *ranked = (EvalDetection *)allocate((size_t)num_detections * sizeof(EvalDetection));
    int *image_rank = ranks_by_id(set->image_places, set->num_images);
    int *class_rank = ranks_by_id(set->category_places, set->num_categories);
    int num_truths = 0;
    for (int i = 0; i < set->num_images; i++) {
        for (int a = 0; a < set->images[i].num_annotations; a++) {
            const Annotation *from = &set->annotations[set->images[i].first_annotation + a];
            EvalTruth *truth = &truths[num_truths++];
            truth->image = image_rank[i];
            truth->category = class_rank[from->class_index];
            truth->box[0] = from->x;
            truth->box[1] = from->y;
            truth->box[2] = from->width;
            truth->box[3] = from->height;
            truth->area = from->area;
            truth->crowd = from->crowd;
            truth->ignore = from->ignore;
            truth->id_is_zero = from->id == 0 && strcmp(set->format, "COCO") == 0;
        }
    }
    for (int d = 0; d < num_detections; d++) {
        ranked[d] = detections[d];
        ranked[d].image = image_rank[detections[d].image];
        ranked[d].category = class_rank[detections[d].category];
    }
    CocoScores by_id;
    coco_evaluate(&by_id, truths, num_truths, ranked, num_detections, set->num_categories);
    coco_scores_allocate(scores, set->num_categories);
    memcpy(scores->stats, by_id.stats, sizeof by_id.stats);
    for (int c = 0; c < set->num_categories; c++) {
        scores->class_ap[c] = by_id.class_ap[class_rank[c]];
        scores->class_ap50[c] = by_id.class_ap50[class_rank[c]];
        scores->class_truths[c] = by_id.class_truths[class_rank[c]];
        scores->class_curves[c] = by_id.class_curves[class_rank[c]];
    }
    coco_scores_free(&by_id);
    free(truths);
    free(ranked);
    free(image_rank);
    free(class_rank);
}

// The twelve lines as pycocotools prints them, then a table by class. `categories`: (scores->num_classes).
static inline void coco_print(FILE *file, const CocoScores *scores, const Category *categories) {
    for (int line = 0; line < 12; line++) {
        int setting = coco_lines[line].setting, threshold = coco_lines[line].threshold;
        char range[16] = "0.50:0.95";
        if (threshold >= 0) snprintf(range, sizeof range, "%.2f", coco_thresholds[threshold]);
        fprintf(file, " %-18s %s @[ IoU=%-9s | area=%6s | maxDets=%3d ] = %0.3f\n",
                coco_lines[line].recall ? "Average Recall" : "Average Precision",
                coco_lines[line].recall ? "(AR)" : "(AP)", range, coco_area_names[coco_settings[setting].area],
                coco_settings[setting].max_detections, scores->stats[line]);
    }
    fprintf(file, "\n     AP   AP50   boxes  class\n");
    for (int c = 0; c < scores->num_classes; c++) {
        if (scores->class_ap[c] < 0)
            fprintf(file, "      -      -       0  ");
        else
            fprintf(file, "  %0.3f  %0.3f %7d  ", scores->class_ap[c], scores->class_ap50[c], scores->class_truths[c]);
        for (const char *at = categories[c].name; *at; at++)
            fputc((unsigned char)*at < 32 || *at == 127 ? '?' : *at, file);
        fputc('\n', file);
    }
}

// Closes a file that was written to. 0; or -1 if anything of it failed, and then half a file is removed.
static inline int coco_close(FILE *file, const char *path, Error *error) {
    int bad = ferror(file);
    bad |= fclose(file) != 0;
    if (!bad) return 0;
    fail(error, "%s: cannot be written: %s", path, strerror(errno));
    if (is_file(path)) remove(path);
    return -1;
}

// {"stats": [12 numbers], "per_class": [{"category_id": id, "name": name, "AP": x, "AP50": x, "boxes": n}, ...]}, -1
// where a class has no truth. `categories`: (scores->num_classes). more: further members, each after a comma. 0, or -1.
static inline int coco_write_json(const char *path, const CocoScores *scores, const Category *categories,
                                  const char *more, Error *error) {
    FILE *file = fopen(path, "w");
    if (!file) return fail(error, "%s: cannot be written: %s", path, strerror(errno));
    fputs("{\"stats\": [", file);
    for (int line = 0; line < 12; line++) fprintf(file, "%s%.17g", line ? ", " : "", scores->stats[line]);
    fputs("], \"per_class\": [", file);
    for (int c = 0; c < scores->num_classes; c++) {
        fprintf(file, "%s\n{\"category_id\": %lld, \"name\": ", c ? "," : "", (long long)categories[c].id);
        json_print_string(file, categories[c].name);
        fprintf(file, ", \"AP\": %.17g, \"AP50\": %.17g, \"boxes\": %d}", scores->class_ap[c], scores->class_ap50[c],
                scores->class_truths[c]);
    }
    fprintf(file, "]%s}\n", more);
    return coco_close(file, path, error);
}

// ---------------------------------------------------------------------------------------------------------------------
// Results: [{"image_id": id, "category_id": id, "bbox": [x, y, width, height], "score": s}, ...]

// Writes detections (places in set->images and set->categories) with the ids of the data set. 0, or -1.
static inline int coco_write_results(const char *path, const Dataset *set, const EvalDetection *detections,
                                     int num_detections, Error *error) {
    FILE *file = fopen(path, "w");
    if (!file) return fail(error, "%s: cannot be written: %s", path, strerror(errno));
    fputc('[', file);
    for (int d = 0; d < num_detections; d++) {
        const double *box = detections[d].box;
        fprintf(file,
                "%s\n{\"image_id\": %lld, \"category_id\": %lld, \"bbox\": [%.17g, %.17g, %.17g, %.17g], "
                "\"score\": %.17g}",
                d ? "," : "", (long long)set->images[detections[d].image].id,
                (long long)set->categories[detections[d].category].id, box[0], box[1], box[2], box[3],
                detections[d].score);
    }
    fputs("\n]\n", file);
    return coco_close(file, path, error);
}

enum { RESULT_IMAGE = 1, RESULT_CATEGORY = 2, RESULT_SCORE = 4, RESULT_BOX = 8 };  // bits

typedef struct {
    const char *path;
    const Dataset *set;
    Error *error;
    EvalDetection *detections;
    int num_detections;
    int depth;  // open arrays and objects: 1 the list, 2 a result, 3 its bbox
    int field;  // whose value comes next, 0: one that is not needed
    int place;  // of the result in the list
    // The result being read
    int present, box_count;
    int64_t image_id, category_id;
    EvalDetection detection;
} ResultsReader;

// Refuses a file whose outline is not a list of objects, or whose fields have the wrong type.
static inline int results_refuse(ResultsReader *reader) {
    if (reader->depth == 0)
        fail(reader->error, "%s: must be a list of results, [{\"image_id\": ...}, ...]", reader->path);
    else if (reader->depth == 1)
        fail(reader->error, "%s: result %d must be an object, {\"image_id\": ...}", reader->path, reader->place);
    else
        fail(reader->error, "%s: result %d: %s", reader->path, reader->place,
             reader->field == RESULT_BOX     ? "bbox must be 4 finite numbers: x, y, width, height"
             : reader->field == RESULT_SCORE ? "score must be a finite number"
             : reader->field == RESULT_IMAGE ? "image_id must be a whole number"
                                             : "category_id must be a whole number");
    return 0;
}

static int results_on_number(void *context, const char *text, size_t length) {
    ResultsReader *reader = (ResultsReader *)context;
    double value = json_text_double(text, length);
    int good = 1;
    if (reader->depth < 2) return results_refuse(reader);
    if (reader->depth == 3 && reader->field == RESULT_BOX) {
        good = reader->box_count < 4 && isfinite(value);
        if (good) reader->detection.box[reader->box_count++] = value;
    } else if (reader->depth == 2 && reader->field) {
        good = reader->field == RESULT_IMAGE      ? json_text_int64(text, length, &reader->image_id)
               : reader->field == RESULT_CATEGORY ? json_text_int64(text, length, &reader->category_id)
                                                  : reader->field == RESULT_SCORE && isfinite(value);
        if (reader->field == RESULT_SCORE) reader->detection.score = value;
        reader->present |= reader->field;
    }
    return good ? 1 : results_refuse(reader);
}

// A string, true, false or null.
static inline int results_other(ResultsReader *reader) {
    return reader->depth < 2 || reader->field ? results_refuse(reader) : 1;
}
static int results_on_null(void *reader) { return results_other((ResultsReader *)reader); }
static int results_on_boolean(void *reader, int value) { return (void)value, results_other((ResultsReader *)reader); }
static int results_on_string(void *reader, const unsigned char *text, size_t length) {
    return (void)text, (void)length, results_other((ResultsReader *)reader);
}

static int results_on_key(void *context, const unsigned char *key, size_t length) {
    ResultsReader *reader = (ResultsReader *)context;
    static const char *const names[4] = {"image_id", "category_id", "score", "bbox"};
    if (reader->depth != 2) return 1;
    reader->field = 0;
    for (int i = 0; i < 4; i++)
        if (strlen(names[i]) == length && memcmp(names[i], key, length) == 0) reader->field = 1 << i;
    return 1;
}

static int results_on_start_array(void *context) {
    ResultsReader *reader = (ResultsReader *)context;
    int is_box = reader->depth == 2 && reader->field == RESULT_BOX;
    if (reader->depth == 1 || (reader->depth >= 2 && reader->field && !is_box)) return results_refuse(reader);
    if (is_box) {
        reader->box_count = 0;
        reader->present |= RESULT_BOX;
    }
    reader->depth++;
    return 1;
}

static int results_on_start_map(void *context) {
    ResultsReader *reader = (ResultsReader *)context;
    if (reader->depth == 0 || (reader->depth >= 2 && reader->field)) return results_refuse(reader);
    if (reader->depth == 1) reader->present = reader->field = 0;
    reader->depth++;
    return 1;
}

static int results_on_end_array(void *context) {
    ResultsReader *reader = (ResultsReader *)context;
    reader->depth--;
    return reader->field == RESULT_BOX && reader->box_count != 4 ? results_refuse(reader) : 1;
}

static int results_on_end_map(void *context) {
    ResultsReader *reader = (ResultsReader *)context;
    if (--reader->depth != 1) return 1;
    static const char *const names[4] = {"image_id", "category_id", "score", "bbox"};
    for (int i = 0; i < 4; i++)
        if (!(reader->present >> i & 1))
            return fail(reader->error, "%s: result %d: has no %s", reader->path, reader->place, names[i]), 0;
    reader->detection.image = dataset_image_index(reader->set, reader->image_id);
    reader->detection.category = dataset_category_index(reader->set, reader->category_id);
    if (reader->detection.image < 0)
        return fail(reader->error, "%s: result %d: image_id %lld is not in %s", reader->path, reader->place,
                    (long long)reader->image_id, reader->set->source),
               0;
    if (reader->detection.category >= 0) {
        reader->detections =
            (EvalDetection *)grow(reader->detections, (size_t)reader->num_detections, sizeof(EvalDetection));
        reader->detections[reader->num_detections++] = reader->detection;
    }
    reader->place++;
    reader->field = 0;
    return 1;
}

// Reads results as a stream; `image` and `category` become places in set->images and set->categories. A result of a
// category that the data set has not is left out, as in pycocotools; one for an image that it has not, or one that is
// incomplete, ends the reading with a line that names it (results are counted from 0). *detections is the caller's to
// free; 0, or -1 and nothing to free.
static inline int coco_read_results(const char *path, const Dataset *set, EvalDetection **detections,
                                    int *num_detections, Error *error) {
    ResultsReader reader;
    memset(&reader, 0, sizeof reader);
    reader.path = path;
    reader.set = set;
    reader.error = error;
    yajl_callbacks callbacks;
    memset(&callbacks, 0, sizeof callbacks);
    callbacks.yajl_null = results_on_null;
    callbacks.yajl_boolean = results_on_boolean;
    callbacks.yajl_number = results_on_number;
    callbacks.yajl_string = results_on_string;
    callbacks.yajl_map_key = results_on_key;
    callbacks.yajl_start_map = results_on_start_map;
    callbacks.yajl_end_map = results_on_end_map;
    callbacks.yajl_start_array = results_on_start_array;
    callbacks.yajl_end_array = results_on_end_array;
    if (json_stream(path, &callbacks, &reader, error) != 0) {
        free(reader.detections);
        return -1;
    }
    *detections = reader.detections;
    *num_detections = reader.num_detections;
    return 0;
}

#endif
