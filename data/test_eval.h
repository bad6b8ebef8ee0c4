/*
Checks of coco_eval.h and report.h: small cases whose values are derived by hand beside them, two larger ones whose
values pycocotools 2.0.11 gave, and files that must be refused. Included by test_detr.c, which defines check().
*/
#ifndef DETR_TEST_EVAL_H
#define DETR_TEST_EVAL_H

#include <unistd.h>

#include "coco_eval.h"
#include "report.h"

// ---------------------------------------------------------------------------------------------------------------------
// Cases are written as boxes in a list

enum { EVAL_CROWD = 1, EVAL_IGNORE = 2, EVAL_ID_ZERO = 4 };

typedef struct {
    EvalTruth truths[400];
    EvalDetection detections[1200];
    int num_truths, num_detections;
} EvalCase;

static void eval_truth(EvalCase *eval, int image, int category, double x, double y, double width, double height,
                       int flags) {
    EvalTruth *truth = &eval->truths[eval->num_truths++];
    memset(truth, 0, sizeof *truth);
    truth->image = image;
    truth->category = category;
    truth->box[0] = x;
    truth->box[1] = y;
    truth->box[2] = width;
    truth->box[3] = height;
    truth->area = width * height;
    truth->crowd = (flags & EVAL_CROWD) != 0;
    truth->ignore = (flags & EVAL_IGNORE) != 0;
    truth->id_is_zero = (flags & EVAL_ID_ZERO) != 0;
}

static void eval_detection(EvalCase *eval, int image, int category, double x, double y, double width, double height,
                           double score) {
    EvalDetection *detection = &eval->detections[eval->num_detections++];
    detection->image = image;
    detection->category = category;
    detection->box[0] = x;
    detection->box[1] = y;
    detection->box[2] = width;
    detection->box[3] = height;
    detection->score = score;
}

// Compares the stats with `expected` (12 numbers) and empties the case.
static void eval_check_stats(EvalCase *eval, int num_categories, const double *expected, double limit,
                             const char *name) {
    CocoScores scores;
    coco_evaluate(&scores, eval->truths, eval->num_truths, eval->detections, eval->num_detections, num_categories);
    for (int i = 0; i < 12; i++)
        check(fabs(scores.stats[i] - expected[i]) <= limit, "coco: %s: number %d is %.17g, not %.17g", name, i,
              scores.stats[i], expected[i]);
    coco_scores_free(&scores);
    eval->num_truths = eval->num_detections = 0;
}

// The same for AP, AP50 and AR with 100 detections.
static void eval_check_ap(EvalCase *eval, double ap, double ap50, double ar100, const char *name) {
    CocoScores scores;
    coco_evaluate(&scores, eval->truths, eval->num_truths, eval->detections, eval->num_detections, 1);
    check(fabs(scores.stats[0] - ap) <= 1e-12, "coco: %s: AP is %.17g, not %.17g", name, scores.stats[0], ap);
    check(fabs(scores.stats[1] - ap50) <= 1e-12, "coco: %s: AP50 is %.17g, not %.17g", name, scores.stats[1], ap50);
    check(fabs(scores.stats[8] - ar100) <= 1e-12, "coco: %s: AR is %.17g, not %.17g", name, scores.stats[8], ar100);
    coco_scores_free(&scores);
    eval->num_truths = eval->num_detections = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// By hand

static void test_coco_iou(void) {
    const double a[4] = {0, 0, 10, 10}, b[4] = {5, 0, 10, 10}, c[4] = {10, 0, 10, 10}, flat[4] = {2, 2, 0, 5};
    check(coco_iou(a, a, 0) == 1, "coco: IoU of a box with itself");
    check(coco_iou(a, b, 0) == 50.0 / 150.0, "coco: IoU: 5 x 10 shared, 100 + 100 - 50 covered");
    check(coco_iou(a, b, 1) == 0.5, "coco: crowd: 5 x 10 shared, of the detection's own 100");
    check(coco_iou(a, c, 0) == 0, "coco: IoU of boxes that touch");
    check(coco_iou(a, flat, 0) == 0 && coco_iou(flat, a, 1) == 0, "coco: IoU with a box without width");
    for (int i = 0; i < 9; i++) {
        volatile double offset = i * ((0.95 - 0.5) / 9);  // rounded before it is added, as numpy does
        check(coco_thresholds[i] == 0.5 + offset, "coco: threshold %d is numpy.linspace's", i);
    }
}

static void test_coco_by_hand(void) {
    EvalCase *eval = (EvalCase *)allocate(sizeof *eval);

    // Found exactly. 50 x 50 = 2500 pixels are medium; there is no small and no large truth.
    const double found[12] = {1, 1, 1, -1, 1, -1, 1, 1, 1, -1, 1, -1};
    eval_truth(eval, 0, 0, 10, 10, 50, 50, 0);
    eval_detection(eval, 0, 0, 10, 10, 50, 50, 0.3);
    eval_check_stats(eval, 1, found, 1e-12, "one box, found");

    // 32 x 32 = 1024 pixels lie on a limit that belongs to both sides, so they are small and medium.
    const double limit32[12] = {1, 1, 1, 1, 1, -1, 1, 1, 1, 1, 1, -1};
    eval_truth(eval, 0, 0, 10, 10, 32, 32, 0);
    eval_detection(eval, 0, 0, 10, 10, 32, 32, 0.3);
    eval_check_stats(eval, 1, limit32, 1e-12, "32 x 32");
    const double limit96[12] = {1, 1, 1, -1, 1, 1, 1, 1, 1, -1, 1, 1};
    eval_truth(eval, 0, 0, 10, 10, 96, 96, 0);
    eval_detection(eval, 0, 0, 10, 10, 96, 96, 0.3);
    eval_check_stats(eval, 1, limit96, 1e-12, "96 x 96");

    // A small truth found; two large false boxes with higher scores. All areas: the true one is third, precision 1/3 at
    // every recall. Small: the false ones are outside the range and ignored. The large range has no truth.
    const double ignored[12] = {1. / 3, 1. / 3, 1. / 3, 1, -1, -1, 0, 1, 1, 1, -1, -1};
    eval_truth(eval, 0, 0, 10, 10, 20, 20, 0);
    eval_detection(eval, 0, 0, 200, 0, 200, 200, 0.9);
    eval_detection(eval, 0, 0, 200, 200, 200, 200, 0.8);
    eval_detection(eval, 0, 0, 10, 10, 20, 20, 0.1);
    eval_check_stats(eval, 1, ignored, 1e-12, "false boxes outside the range");

    // No truth at all, with and without detections; truth without detections.
    const double nothing[12] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    eval_check_stats(eval, 3, nothing, 1e-12, "nothing");
    eval_detection(eval, 0, 0, 10, 10, 50, 50, 0.3);
    eval_check_stats(eval, 1, nothing, 1e-12, "no truth");
    eval_truth(eval, 0, 0, 0, 0, 50, 50, EVAL_CROWD);
    eval_check_stats(eval, 1, nothing, 1e-12, "only a crowd");
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_check_ap(eval, 0, 0, 0, "no detections");

    // Classes: 0 is found (AP 1), 1 is missed (AP 0; the box there has class 0, and 3 is no class), 2 has no truth.
    // Mean over the two with truth. Class 0: the true box is first, precision 1 up to recall 1.
    const double classes[12] = {0.5, 0.5, 0.5, -1, 0.5, -1, 0.5, 0.5, 0.5, -1, 0.5, -1};
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_truth(eval, 0, 1, 100, 0, 50, 50, 0);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.9);
    eval_detection(eval, 0, 0, 100, 0, 50, 50, 0.8);
    eval_detection(eval, 0, 2, 100, 0, 50, 50, 0.8);
    eval_detection(eval, 0, 3, 100, 0, 50, 50, 0.8);
    CocoScores scores;
    coco_evaluate(&scores, eval->truths, eval->num_truths, eval->detections, eval->num_detections, 3);
    check(fabs(scores.class_ap[0] - 1) <= 1e-12 && scores.class_ap[1] == 0 && scores.class_ap[2] == -1,
          "coco: AP by class");
    check(fabs(scores.class_ap50[0] - 1) <= 1e-12 && scores.class_ap50[1] == 0 && scores.class_ap50[2] == -1,
          "coco: AP50 by class");
    check(scores.class_truths[0] == 1 && scores.class_truths[1] == 1 && scores.class_truths[2] == 0, "coco: truths");
    coco_scores_free(&scores);
    eval_check_stats(eval, 3, classes, 1e-12, "three classes");

    // IoU 100 * 50 / 100 * 100 is 0.5 exactly, which reaches the first threshold and no other.
    eval_truth(eval, 0, 0, 0, 0, 100, 100, 0);
    eval_detection(eval, 0, 0, 0, 0, 100, 50, 0.5);
    eval_check_ap(eval, 0.1, 1, 0.1, "IoU 0.5");
    // IoU 0.9 reaches nine of ten.
    eval_truth(eval, 0, 0, 0, 0, 100, 100, 0);
    eval_detection(eval, 0, 0, 0, 0, 100, 90, 0.5);
    eval_check_ap(eval, 0.9, 1, 0.9, "IoU 0.9");

    // The curve, two truths. In a crowd, false, true: the first is ignored, recall 0 takes the false box, from 0.01 to
    // 0.5 both; 1 is not reached.
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_truth(eval, 0, 0, 100, 0, 50, 50, 0);
    eval_truth(eval, 0, 0, 300, 300, 50, 50, EVAL_CROWD);
    eval_detection(eval, 0, 0, 310, 310, 20, 20, 0.95);
    eval_detection(eval, 0, 0, 200, 0, 50, 50, 0.9);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.8);
    coco_evaluate(&scores, eval->truths, eval->num_truths, eval->detections, eval->num_detections, 2);
    const CocoCurve *curve = scores.class_curves;
    check(curve->score[0] == 0.9 && curve->score[1] == 0.8 && curve->score[50] == 0.8 && curve->score[51] == 0,
          "coco: scores at recalls");
    check(fabs(curve->precision[50] - 0.5) < 1e-12 && curve->precision[51] == 0, "coco: precision at recalls");
    check(curve[1].precision[0] == -1 && curve[1].score[0] == -1, "coco: the curve of a class without truth");
    coco_scores_free(&scores);
    eval->num_truths = eval->num_detections = 0;

    // The staircase, two truths. False, true, true: precisions 0, 1/2, 2/3 at recalls 0, 1/2, 1; at or beyond every
    // recall the best is 2/3.
    for (int order = 0; order < 2; order++) {
        eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
        eval_truth(eval, 1, 0, 0, 0, 50, 50, 0);
        eval_detection(eval, 1, 0, 0, 0, 50, 50, 0.7);
        eval_detection(eval, 0, 0, 0, 0, 50, 50, order ? 0.9 : 0.8);
        eval_detection(eval, 0, 0, 200, 0, 50, 50, order ? 0.8 : 0.9);
        // True, false, true: precisions 1, 1/2, 2/3 at recalls 1/2, 1/2, 1: 1 at the 51 recalls 0 .. 0.5, then 2/3
        // at 50.
        if (order)
            eval_check_ap(eval, (51 + 50 * 2. / 3) / 101, (51 + 50 * 2. / 3) / 101, 1, "true, false, true");
        else
            eval_check_ap(eval, 2. / 3, 2. / 3, 1, "false, true, true");
    }
    // Half of the truth is never found: precision 1 at 51 recalls, 0 at the other 50.
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_truth(eval, 1, 0, 0, 0, 50, 50, 0);
    eval_detection(eval, 1, 0, 0, 0, 50, 50, 0.7);
    eval_check_ap(eval, 51. / 101, 51. / 101, 0.5, "half found");

    // The second box on one truth is false: precisions 1, 1/2, 2/3 again.
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_truth(eval, 0, 0, 200, 0, 50, 50, 0);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.9);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.8);
    eval_detection(eval, 0, 0, 200, 0, 50, 50, 0.7);
    eval_check_ap(eval, (51 + 50 * 2. / 3) / 101, (51 + 50 * 2. / 3) / 101, 1, "found twice");

    // Equal scores in one image keep the order of the input: true first gives 1, false first 1/2.
    for (int order = 0; order < 2; order++) {
        eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
        eval_detection(eval, 0, 0, order ? 200 : 0, 0, 50, 50, 0.5);
        eval_detection(eval, 0, 0, order ? 0 : 200, 0, 50, 50, 0.5);
        eval_check_ap(eval, order ? 0.5 : 1, order ? 0.5 : 1, 1, "equal scores in one image");
    }
    // Equal scores in two images go by image, whatever the order of the input.
    for (int order = 0; order < 2; order++) {
        eval_truth(eval, order, 0, 0, 0, 50, 50, 0);
        eval_detection(eval, 1, 0, 0, 0, 50, 50, 0.5);
        eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.5);
        eval_check_ap(eval, order ? 0.5 : 1, order ? 0.5 : 1, 1, "equal scores in two images");
    }
    // Of two truths with the same IoU the later is taken: here the second (IoU 2/3 with both), so that the next
    // detection, which fits the first only, is true as well at the thresholds up to 0.65. From 0.7 on only the next one
    // is: precision 1/2 up to recall 1/2.
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_truth(eval, 0, 0, 20, 0, 50, 50, 0);
    eval_detection(eval, 0, 0, 10, 0, 50, 50, 0.9);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.8);
    eval_check_ap(eval, (4 + 6 * 0.5 * 51 / 101) / 10, 1, (4 + 6 * 0.5) / 10, "equal IoU");

    // Boxes inside a crowd are ignored, any number of them, and a crowd that nobody found is not missed.
    eval_truth(eval, 0, 0, 100, 0, 100, 100, EVAL_CROWD);
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_truth(eval, 1, 0, 100, 0, 100, 100, EVAL_CROWD);
    eval_detection(eval, 0, 0, 110, 0, 10, 10, 0.9);
    eval_detection(eval, 0, 0, 120, 0, 10, 10, 0.8);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.1);
    eval_check_ap(eval, 1, 1, 1, "crowd");
    // A difficult box is ignored likewise, but by plain IoU: the box of 10 x 10 in it is false and comes first.
    eval_truth(eval, 0, 0, 100, 0, 100, 100, EVAL_IGNORE);
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_detection(eval, 0, 0, 110, 0, 10, 10, 0.9);
    eval_detection(eval, 0, 0, 100, 0, 100, 100, 0.8);
    eval_detection(eval, 0, 0, 100, 0, 100, 100, 0.7);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.1);
    eval_check_ap(eval, 0.5, 0.5, 1, "difficult");
    // A real truth (IoU 0.6) is preferred to a crowd that fits better (1), up to the threshold 0.6; beyond it the
    // detection belongs to the crowd and the truth is missed.
    eval_truth(eval, 0, 0, 0, 0, 200, 200, EVAL_CROWD);
    eval_truth(eval, 0, 0, 0, 0, 100, 60, 0);
    eval_detection(eval, 0, 0, 0, 0, 100, 100, 0.9);
    eval_check_ap(eval, 0.3, 1, 0.3, "real before crowd");
    // pycocotools' id 0: taken, but not counted as found, so the detection is false.
    eval_truth(eval, 0, 0, 0, 0, 50, 50, EVAL_ID_ZERO);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.9);
    eval_check_ap(eval, 0, 0, 0, "id 0");

    // The best truth is taken, not the first or the last that will do. Widths of 100 x 50 boxes: the detection 0 .. 100
    // has IoU 1 with the first truth and 75 / 125 with the second, 25 .. 125; the detection 40 .. 127 has IoU 85 / 102
    // with the second, true up to the threshold 0.8, and 60 / 127 with the first.
    eval_truth(eval, 0, 0, 0, 0, 100, 50, 0);
    eval_truth(eval, 0, 0, 25, 0, 100, 50, 0);
    eval_detection(eval, 0, 0, 0, 0, 100, 50, 0.9);
    eval_detection(eval, 0, 0, 40, 0, 87, 50, 0.8);
    eval_check_ap(eval, (7 + 3 * 51. / 101) / 10, 1, (7 + 3 * 0.5) / 10, "best truth");
    // That holds among ignored truths too. Two boxes of 30 x 30 have outlines of 5000 pixels, so they are ignored as
    // small ones. The first detection fits the second of them exactly and has IoU 0.5 with the first; the next, 0 ..
    // 28, fits only the first (28 / 30; 18 / 40 with the second), so it is ignored but at 0.95. There it is false,
    // before the true small box: precision 1/2.
    eval_truth(eval, 0, 0, 0, 0, 30, 30, 0);
    eval_truth(eval, 0, 0, 10, 0, 30, 30, 0);
    eval->truths[0].area = eval->truths[1].area = 5000;
    eval_truth(eval, 0, 0, 200, 0, 20, 20, 0);
    eval_detection(eval, 0, 0, 10, 0, 30, 30, 0.9);
    eval_detection(eval, 0, 0, 0, 0, 28, 30, 0.8);
    eval_detection(eval, 0, 0, 200, 0, 20, 20, 0.1);
    coco_evaluate(&scores, eval->truths, eval->num_truths, eval->detections, eval->num_detections, 1);
    check(fabs(scores.stats[3] - 0.95) <= 1e-12, "coco: best ignored truth: AP of small ones %.17g", scores.stats[3]);
    coco_scores_free(&scores);
    eval->num_truths = eval->num_detections = 0;
    // A score that is no number comes last.
    eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
    eval_detection(eval, 0, 0, 200, 0, 50, 50, NAN);
    eval_detection(eval, 0, 0, 0, 0, 50, 50, -1);
    eval_check_ap(eval, 1, 1, 1, "NaN");

    // Only the best 100 of an image count: the true box as number 100 has precision 1/100, as number 101 it is cut off.
    for (int others = 99; others <= 100; others++) {
        eval_truth(eval, 0, 0, 0, 0, 50, 50, 0);
        eval_detection(eval, 0, 0, 0, 0, 50, 50, 0.1);
        for (int i = 0; i < others; i++) eval_detection(eval, 0, 0, 200, 0, 50, 50, 0.5);
        double kept = others == 99, ap = 0.01 * kept;
        const double cut[12] = {ap, ap, ap, -1, ap, -1, 0, 0, kept, -1, kept, -1};
        eval_check_stats(eval, 1, cut, 1e-12, "cut at 100");
    }
    free(eval);
}

// ---------------------------------------------------------------------------------------------------------------------
// By pycocotools

// 300 truths and 900 detections in 20 images and 6 classes (the last two without truth), in whole pixels, so that IoUs,
// areas and scores (in tenths) meet exactly. Crowds; areas that are not width * height.
static void eval_random_case(EvalCase *eval) {
    for (int i = 0; i < 300; i++) {
        uint32_t r[8];
        for (int k = 0; k < 8; k++) r[k] = random_word(7, RANDOM_TEST, 1, 0, (uint32_t)i, (uint64_t)k);
        eval_truth(eval, (int)(r[0] % 20), (int)(r[1] % 4), r[2] % 200, r[3] % 200, r[4] % 5 ? r[4] % 120 : 32,
                   r[4] % 5 ? r[5] % 120 : 32, r[6] % 12 == 0 ? EVAL_CROWD : 0);
        if (r[7] % 3 == 0) eval->truths[i].area = floor(eval->truths[i].area / 2);
    }
    for (int i = 0; i < 900; i++) {
        uint32_t r[8];
        for (int k = 0; k < 8; k++) r[k] = random_word(7, RANDOM_TEST, 2, 0, (uint32_t)i, (uint64_t)k);
        const EvalTruth *near = &eval->truths[r[0] % 300];
        int moved = r[1] % 4 != 0;
        eval_detection(eval, near->image, r[2] % 9 ? near->category : (int)(r[2] / 9 % 6),
                       near->box[0] + moved * (double)(r[3] % 11), near->box[1] + moved * (double)(r[4] % 7),
                       near->box[2] + moved * (double)(r[5] % 5), near->box[3] + moved * (double)(r[6] % 5),
                       (r[7] % 11) / 10.0);
    }
}

static void test_coco_golden(void) {
    static const double expected[12] = {0.2549896316371714,  0.4075085121943507, 0.24453596512797424,
                                        0.22277537167346476, 0.3281344821864625, 0.5729754902181948,
                                        0.11060685670722592, 0.5359596909660975, 0.6478353332685581,
                                        0.5324732809034078,  0.7330530858264248, 0.8800000000000001};
    static const double expected_ap[6] = {
        0.2644657719408396, 0.2846263409846552, 0.22285436388138094, 0.24801204974181, -1.0, -1.0};
    EvalCase *eval = (EvalCase *)allocate(sizeof *eval);
    eval_random_case(eval);
    CocoScores scores;
    coco_evaluate(&scores, eval->truths, eval->num_truths, eval->detections, eval->num_detections, 6);
    for (int c = 0; c < 6; c++)
        check(scores.class_ap[c] == expected_ap[c], "coco: pycocotools: AP of class %d is %.17g, not %.17g", c,
              scores.class_ap[c], expected_ap[c]);
    coco_scores_free(&scores);
    eval_check_stats(eval, 6, expected, 0, "pycocotools");
    free(eval);
}

// ---------------------------------------------------------------------------------------------------------------------
// Files

static void eval_write(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    check(file && fputs(text, file) >= 0 && fclose(file) == 0, "eval: %s can be written", path);
}

static int eval_file_has(const char *path, const char *wanted) {
    char *text;
    size_t size;
    Error error;
    if (read_file(path, &text, &size, &error) != 0) return 0;
    int found = strstr(text, wanted) != NULL;
    free(text);
    return found;
}

// Ids with gaps and in no order; annotation 0, a crowd, an empty box; a result of category 9, which does not exist.
static const char *const eval_annotations =
    "{\"images\": [{\"id\": 70000000001, \"file_name\": \"b.jpg\", \"width\": 300, \"height\": 300},"
    "{\"id\": 3, \"file_name\": \"a.jpg\", \"width\": 300, \"height\": 300}],"
    "\"categories\": [{\"id\": 44, \"name\": \"cat \\\"x\\\"\"}, {\"id\": 1, \"name\": \"dog\"}, {\"id\": 7, \"name\": "
    "\"emu\"}],"
    "\"annotations\": ["
    "{\"id\": 5, \"image_id\": 70000000001, \"category_id\": 44, \"bbox\": [0, 0, 50, 50], \"area\": 1000, "
    "\"iscrowd\": 0},"
    "{\"id\": 0, \"image_id\": 3, \"category_id\": 44, \"bbox\": [100, 0, 50, 50], \"area\": 2500, \"iscrowd\": 0},"
    "{\"id\": 2, \"image_id\": 3, \"category_id\": 44, \"bbox\": [0, 100, 100, 100], \"area\": 9216, \"iscrowd\": 0},"
    "{\"id\": 3, \"image_id\": 3, \"category_id\": 1, \"bbox\": [200, 100, 90, 90], \"area\": 8100, \"iscrowd\": 1},"
    "{\"id\": 4, \"image_id\": 3, \"category_id\": 1, \"bbox\": [10, 10, 20, 20], \"area\": 400, \"iscrowd\": 0},"
    "{\"id\": 9, \"image_id\": 3, \"category_id\": 1, \"bbox\": [60, 10, 0, 20], \"area\": 0, \"iscrowd\": 0}]}";
static const char *const eval_results =
    "[{\"image_id\": 70000000001, \"category_id\": 44, \"bbox\": [0, 0, 50, 40], \"score\": 0.5, \"more\": [1, {\"a\": "
    "[]}]},"
    "{\"image_id\": 3, \"category_id\": 44, \"bbox\": [200, 200, 50, 40], \"score\": 0.5},"
    "{\"image_id\": 3, \"category_id\": 44, \"bbox\": [100, 0, 50, 50], \"score\": 0.5},"
    "{\"image_id\": 3, \"category_id\": 9, \"bbox\": [100, 0, 50, 50], \"score\": 0.99},"
    "{\"image_id\": 3, \"category_id\": 44, \"bbox\": [0, 100.5, 100, 100], \"score\": 0.25},"
    "{\"image_id\": 3, \"category_id\": 1, \"bbox\": [210, 110, 30, 30], \"score\": 1},"
    "{\"image_id\": 3, \"category_id\": 1, \"bbox\": [11, 10, 20, 20], \"score\": 1e-3}]";

// Reads `text` as results and expects a refusal whose line has `wanted`.
static void eval_check_refused(const char *path, const Dataset *set, const char *text, const char *wanted) {
    EvalDetection *detections;
    int count;
    Error error;
    error.text[0] = 0;
    eval_write(path, text);
    int status = coco_read_results(path, set, &detections, &count, &error);
    check(status == -1 && strstr(error.text, wanted) && strstr(error.text, path),
          "coco: results %.60s: status %d, line \"%s\" without \"%s\"", text, status, error.text, wanted);
    if (status == 0) free(detections);
}

static void test_coco_files(const char *folder) {
    char *annotations = format_string("%s/annotations.json", folder),
         *results = format_string("%s/results.json", folder);
    char *output = format_string("%s/scores.json", folder);
    static const double expected[12] = {0.3559405940594059,
                                        0.4183168316831683,
                                        0.4183168316831683,
                                        0.5772277227722771,
                                        0.1556930693069307,
                                        0.9999999999999998,
                                        0.11666666666666665,
                                        0.5083333333333334,
                                        0.5083333333333334,
                                        0.575,
                                        0.5,
                                        1.0};
    static const double expected_ap[3] = {0.25742574257425743, 0.45445544554455436, -1.0};
    Dataset set;
    Error error;
    EvalDetection *detections = NULL;
    CocoScores scores;
    int count = 0;
    memset(&set, 0, sizeof set);
    eval_write(annotations, eval_annotations);
    eval_write(results, eval_results);
    check(dataset_open_coco_file(&set, annotations, NULL, &error) == 0, "coco: annotations open");
    for (int round = 0; round < 2; round++) {  // as written above, then as written by coco_write_results
        check(coco_read_results(results, &set, &detections, &count, &error) == 0 && count == 6,
              "coco: results are read");
        coco_score(&scores, &set, detections, count);
        for (int i = 0; i < 12; i++)
            check(scores.stats[i] == expected[i], "coco: files: number %d is %.17g, not %.17g", i, scores.stats[i],
                  expected[i]);
        for (int c = 0; c < 3; c++)
            check(scores.class_ap[c] == expected_ap[c], "coco: files: AP of class %d is %.17g, not %.17g", c,
                  scores.class_ap[c], expected_ap[c]);
        check(coco_write_results(results, &set, detections, count, &error) == 0, "coco: results are written");
        if (round == 0) {
            free(detections);
            coco_scores_free(&scores);
        }
    }
    check(coco_write_json(output, &scores, set.categories, ", \"more\": [1]", &error) == 0, "coco: scores are written");
    yajl_val tree = json_read(output, &error), stats = json_member(tree, "stats"),
             classes = json_member(tree, "per_class");
    check(YAJL_IS_ARRAY(stats) && stats->u.array.len == 12 && YAJL_IS_ARRAY(classes) && classes->u.array.len == 3,
          "coco: scores: 12 numbers and 3 classes");
    check(YAJL_IS_ARRAY(json_member(tree, "more")), "coco: scores: members of the caller's own");
    if (YAJL_IS_ARRAY(stats) && stats->u.array.len == 12 && YAJL_IS_ARRAY(classes) && classes->u.array.len == 3) {
        double ap = 0;
        int64_t id = 0;
        for (int i = 0; i < 12; i++)
            check(stats->u.array.values[i]->u.number.d == scores.stats[i], "coco: scores: number %d to the last bit",
                  i);
        json_get_double(classes->u.array.values[0], "AP", &ap, output, &error);
        json_get_int64(classes->u.array.values[0], "category_id", &id, output, &error);
        check(id == 44 && ap == scores.class_ap[0], "coco: scores: category 44 first");
    }
    yajl_tree_free(tree);

    FILE *file = fopen(output, "w");
    if (file) coco_print(file, &scores, set.categories), fclose(file);
    check(eval_file_has(output, " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.356\n"),
          "coco: print: the first line");
    check(eval_file_has(output, " Average Recall     (AR) @[ IoU=0.50:0.95 | area= small | maxDets=100 ] = 0.575\n"),
          "coco: print: the tenth line");
    check(eval_file_has(output, "      -      -       0  emu\n"), "coco: print: a class without truth");
    coco_scores_free(&scores);
    for (int a = 0; a < set.num_annotations; a++) set.annotations[a].ignore = 1;
    coco_score(&scores, &set, detections, count);
    check(scores.stats[0] == -1, "coco: nothing but ignored truth");
    for (int a = 0; a < set.num_annotations; a++) set.annotations[a].ignore = 0;
    coco_scores_free(&scores);
    free(detections);

    eval_check_refused(results, &set, "[{\"image_id\": 4, \"category_id\": 1, \"bbox\": [1, 1, 1, 1], \"score\": 1}]",
                       "result 0: image_id 4 is not in");
    eval_check_refused(
        results, &set,
        "[{\"image_id\": 3, \"category_id\": 1, \"bbox\": [1, 1, 1, 1], \"score\": 1}, {\"image_id\": 3}]",
        "result 1: has no category_id");
    eval_check_refused(results, &set, "[{\"image_id\": 3, \"category_id\": 1, \"bbox\": [1, 1, 1], \"score\": 1}]",
                       "4 finite");
    eval_check_refused(results, &set, "[{\"image_id\": 3, \"category_id\": 1, \"bbox\": [1, 1, 1, 1, 1]}]", "4 finite");
    eval_check_refused(results, &set, "[{\"image_id\": 3, \"bbox\": [1, 1, 1, [1]]}]", "4 finite");
    eval_check_refused(results, &set, "[{\"image_id\": 3, \"bbox\": 4}]", "4 finite");
    eval_check_refused(results, &set, "[{\"image_id\": \"3\"}]", "image_id must be");
    eval_check_refused(results, &set, "[{\"image_id\": 3.5}]", "image_id must be");
    eval_check_refused(results, &set, "[{\"category_id\": null}]", "category_id must be");
    eval_check_refused(results, &set, "[{\"score\": NaN}]", "score must be");
    eval_check_refused(results, &set, "[{\"score\": {}}]", "score must be");
    eval_check_refused(results, &set, "[7]", "result 0 must be an object");
    eval_check_refused(results, &set, "[[]]", "result 0 must be an object");
    eval_check_refused(results, &set, "{\"image_id\": 3}", "must be a list");
    eval_check_refused(results, &set, "3", "must be a list");
    eval_check_refused(results, &set, "[{\"image_id\": 3", "JSON");
    eval_check_refused(results, &set, "", "JSON");
    eval_write(results, "[]");
    check(coco_read_results(results, &set, &detections, &count, &error) == 0 && count == 0,
          "coco: no results is a result");
    coco_score(&scores, &set, detections, count);
    check(scores.stats[0] == 0 && scores.stats[8] == 0, "coco: no results: AP 0");
    coco_scores_free(&scores);
    free(detections);
    check(coco_write_json("/nowhere/scores.json", &scores, set.categories, "", &error) == -1,
          "coco: a folder that is not there");
    dataset_free(&set);
    remove(annotations);
    remove(results);
    remove(output);
    free(annotations);
    free(results);
    free(output);
}

// The JSON of a page; the caller frees the tree. NULL if the page cannot be read or has none.
static yajl_val report_tree(const char *page) {
    char *text;
    size_t size;
    Error error;
    if (read_file(page, &text, &size, &error) != 0) return NULL;
    char *from = strstr(text, "id=\"data\">"), *to = from ? strstr(from, "</script>") : NULL;
    if (to) *to = 0;
    yajl_val tree = to ? json_parse(from + 10, strlen(from + 10), page, &error) : NULL;
    check(tree != NULL, "report: the data: %s", error.text);
    free(text);
    return tree;
}

// A member of a member ..., by keys and places that are written like "pictures.0.found.1.5"; NULL if there is none.
static yajl_val report_value(yajl_val tree, const char *path) {
    for (const char *at = path; at && *at && tree; at = strchr(at, '.') ? strchr(at, '.') + 1 : NULL) {
        char key[64];
        snprintf(key, sizeof key, "%.*s", (int)strcspn(at, "."), at);
        if (YAJL_IS_ARRAY(tree))
            tree = (size_t)atoi(key) < tree->u.array.len ? tree->u.array.values[atoi(key)] : NULL;
        else
            tree = json_member(tree, key);
    }
    return tree;
}

static void check_report_text(yajl_val tree, const char *path, const char *wanted) {
    yajl_val value = report_value(tree, path);
    check(YAJL_IS_STRING(value) && strcmp(value->u.string, wanted) == 0, "report: %s is \"%s\", not \"%s\"", path,
          YAJL_IS_STRING(value) ? value->u.string : "no text", wanted);
}

static void check_report_number(yajl_val tree, const char *path, double wanted) {
    yajl_val value = report_value(tree, path);
    check(YAJL_IS_NUMBER(value) && fabs(YAJL_GET_DOUBLE(value) - wanted) <= 1e-5 * fabs(wanted),
          "report: %s is %g, not %g", path, YAJL_IS_NUMBER(value) ? YAJL_GET_DOUBLE(value) : NAN, wanted);
}

static void test_report_log(void) {
    static const char *const lines[] = {
        "{\"train_loss\": 4, \"test_loss\": 6, \"test_coco_eval_bbox\": [0.25, 0.5, -1], \"epoch\": 0}\n",
        "{\"train_loss\": 2, \"test_loss\": null}", "no JSON\n", "[1]\n"};
    double rows[4][REPORT_COLUMNS];
    for (int i = 0; i < 4; i++)
        check(report_read_line(rows[i], lines[i], strlen(lines[i]), i) == (i < 2 ? 0 : -1), "report: line %d", i);
    check(rows[0][REPORT_LOSS] == 4 && rows[1][REPORT_LOSS] == 2, "report: the loss");
    check(rows[0][REPORT_AP + 1] == 0.5 && isnan(rows[0][REPORT_AP + 2]), "report: AP50, and no AP75");
    check(isnan(rows[1][REPORT_TEST_LOSS]), "report: a loss that was not measured");
    check(rows[1][REPORT_EPOCH] == 1, "report: an epoch without its number has its place");
}

// A page about two classes, and names that would end the script element, open a comment or a string.
static void test_report(const char *folder) {
    char *page = format_string("%s/report.html", folder), *temporary = format_string("%s.tmp", page);
    char *picture = format_string("%s/a.png", folder);
    Error error;
    char hostile[] = "</script><!--\"'&\\u003c\xFF", kept[] = "</script><!--\"'&\\u003c\xEF\xBF\xBD", thing[] = "thing";
    char name[] = "<b>.jpg", split[] = "val";
    Category categories[2] = {{1, hostile}, {2, thing}};
    Annotation annotations[3] = {
        {1, 0, 10, 20, 30, 40, 1200, 0, 0, 0}, {2, 1, 1, 2, 3, 4, 12, 1, 0, 0}, {3, 1, 0, 0, 0, 0, 0, 0, 0, 1}};
    DatasetImage images[1] = {{1, NULL, name, 640, 480, 0, 3}};
    Dataset set;
    memset(&set, 0, sizeof set);
    set.split = split;
    set.categories = categories, set.num_categories = 2;
    set.images = images, set.num_images = 1;
    set.annotations = annotations, set.num_annotations = 3;
    double ap[2] = {0.25, -1}, ap50[2] = {0.5, -1};
    int truths[2] = {1, 0};
    CocoCurve curves[2];
    memset(curves, 0, sizeof curves);
    curves[0].precision[0] = 0.75, curves[0].score[0] = NAN;
    CocoScores scores = {{0.25, 0.5, -1}, 2, ap, ap50, truths, curves};

    Image image = image_new(1280, 960);
    check(image_write(picture, &image, &error) == 0, "report: a picture");
    image_free(&image);
    ReportPicture shown[2];  // the second is not there
    memset(shown, 0, sizeof shown);
    report_picture_read(&shown[0], picture);
    report_picture_read(&shown[1], "/nowhere/a.png");
    check(shown[0].width == 1280 && shown[0].height == 960 && !shown[1].jpeg, "report: the pictures are read");
    Image small = {0, 0, NULL};
    check(shown[0].jpeg && image_decode(shown[0].jpeg, shown[0].jpeg_size, "small", &small, &error) == 0 &&
              small.width == REPORT_PICTURE_SIDE && small.height == 3 * REPORT_PICTURE_SIDE / 4,
          "report: the picture is %d x %d on the page", small.width, small.height);
    image_free(&small);
    unsigned char maps[4] = {'f', 'o', 'o', 255};
    double peaks[2] = {0.5, 0.25};
    EvalDetection box = {0, 1, {5, 6, 7, 8.5}, 0.125};
    shown[0].boxes[0] = box, shown[0].queries[0] = 17, shown[0].num_boxes = 1;
    shown[0].num_looks = 1, shown[0].num_layers = 2, shown[0].map_height = 1, shown[0].map_width = 2;
    shown[0].maps = maps, shown[0].peaks = peaks;

    const ReportRow rows[2] = {{"steps", NULL, 1.5, 0}, {"<rest>", "forward", 0.5, 20}};
    Report report;
    memset(&report, 0, sizeof report);
    report.title = hostile, report.command = hostile, report.facts = "x < y", report.flags = "{\"data\": 1}";
    char log[] =
        "{\"train_loss\": 4, \"test_coco_eval_bbox\": [0.25, 0.5, -1], \"seconds\": 8.5}\n\n[</script>]\n"
        " \t\n{\"train_loss\": 3}";
    report.log = fmemopen(log, strlen(log), "r");
    report.steps = 3, report.of_steps = 10, report.steps_per_epoch = 2, report.loss = NAN;
    report.epoch = 0, report.set = &set, report.scores = &scores, report.shown = shown, report.num_shown = 2;
    report.times = rows, report.num_times = 1, report.memory = rows, report.num_memory = 1;
    report.work = rows, report.num_work = 2;
    check(report_write(page, &report, &error) == 0 && !is_file(temporary), "report: written, nothing left beside it");
    fclose(report.log);
    yajl_val tree = report_tree(page);
    check_report_text(tree, "title", kept);
    check_report_text(tree, "command", kept);
    check_report_text(tree, "facts", "x < y");
    check_report_number(tree, "flags.data", 1);
    check(YAJL_IS_NULL(report_value(tree, "loss")), "report: no number that is none");
    check_report_number(tree, "steps", 3);
    check_report_number(tree, "log.rows.0.3", 4);
    check_report_number(tree, "log.rows.0.18", 8.5);
    check_report_number(tree, "log.rows.0.20", 0.5);
    check_report_number(tree, "log.rows.1.0", 1);
    check_report_number(tree, "log.rows.1.3", 3);
    check(report_value(tree, "log.rows.2") == NULL, "report: empty lines of the log");
    check_report_number(tree, "log.bad_lines", 1);
    check_report_text(tree, "evaluation.classes.0.name", kept);
    check_report_number(tree, "evaluation.classes.0.ap50", 0.5);
    check_report_number(tree, "evaluation.classes.0.precision.0", 0.75);
    check(YAJL_IS_NULL(report_value(tree, "evaluation.classes.0.score.0")), "report: a score that is no number");
    check(report_value(tree, "evaluation.classes.0.precision.100") != NULL &&
              report_value(tree, "evaluation.classes.1.precision.0") == NULL,
          "report: a class without truth has no curve");
    check_report_text(tree, "pictures.0.name", "<b>.jpg");
    check_report_number(tree, "pictures.0.width", 1280);
    check_report_number(tree, "pictures.0.truth.0.3", 30);
    check_report_number(tree, "pictures.0.truth.1.5", 1);
    check(report_value(tree, "pictures.0.truth.2") == NULL, "report: a box that is skipped");
    check_report_number(tree, "pictures.0.found.0.0", 1);
    check_report_number(tree, "pictures.0.found.0.4", 8.5);
    check_report_number(tree, "pictures.0.found.0.5", 0.125);
    check_report_number(tree, "pictures.0.found.0.6", 17);
    check_report_text(tree, "pictures.0.attention.maps", "Zm9v/w==");
    check_report_number(tree, "pictures.0.attention.peaks.1", 0.25);
    check(report_value(tree, "pictures.1") == NULL, "report: a picture that is not there");
    check_report_text(tree, "work.1.name", "<rest>");
    check_report_text(tree, "work.1.detail", "forward");
    check_report_number(tree, "work.1.rate", 20);
    yajl_tree_free(tree);

    memset(&report, 0, sizeof report);
    report.title = "t", report.epoch = -1;
    check(report_write(page, &report, &error) == 0, "report: of a run that begins");
    tree = report_tree(page);
    check(report_value(tree, "pictures") == NULL && report_value(tree, "log.rows.0") == NULL, "report: nothing yet");
    yajl_tree_free(tree);
    check(report_write("/nowhere/r.html", &report, &error) == -1, "report: no folder");
    shown[0].maps = NULL, shown[0].peaks = NULL;  // not of the heap
    report_picture_free(&shown[0]);
    remove(page);
    remove(picture);
    free(page);
    free(picture);
    free(temporary);
}

static void test_base64(void) {
    static const char *const cases[4][2] = {
        {"", ""}, {"f", "Zg=="}, {"fo", "Zm8="}, {"foobar", "Zm9vYmFy"}};  // RFC 4648
    for (int i = 0; i < 4; i++) {
        char text[16] = "";
        FILE *file = fmemopen(text, sizeof text, "w");
        base64_print(file, (const unsigned char *)cases[i][0], strlen(cases[i][0]));
        fclose(file);
        check(strcmp(text, cases[i][1]) == 0, "report: base64 of \"%s\" is \"%s\"", cases[i][0], text);
    }
}

static void test_eval(void) {
    char folder[] = "/tmp/test_eval.XXXXXX";
    check(mkdtemp(folder) != NULL, "eval: a folder under /tmp");
    test_coco_iou();
    test_coco_by_hand();
    test_coco_golden();
    test_coco_files(folder);
    test_base64();
    test_report_log();
    test_report(folder);
    check(rmdir(folder) == 0, "eval: nothing left in %s", folder);
}

#endif
