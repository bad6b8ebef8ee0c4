/*
What tells a user whether a training learns, in plain words on stderr: before the first step what in the data will be in
the way, and while it trains, once each, what looks wrong. doc/when-it-does-not-learn.md says what to do then.

Part of train_detr.c, which includes it before program/commands.h.
*/
#ifndef DETR_WATCH_H
#define DETR_WATCH_H

// A plain DETR wants this many pictures from random weights; one whose queries are boxes gets along with far fewer.
enum { ENOUGH_IMAGES = 10000, ENOUGH_IMAGES_ANCHOR = 1000 };

// Writes a line about each thing in the training data that will be in the way. from_scratch: no pretrained weights.
static void warn_of_data(FILE *file, const Dataset *train, const ModelConfig *config, int from_scratch) {
    int crowded = 0, most = 0;
    for (int i = 0; i < train->num_images; i++) {
        const int boxes = dataset_image_targets(train, &train->images[i]);
        crowded += boxes > config->num_queries;
        if (boxes > most) most = boxes;
    }
    if (crowded)
        fprintf(file,
                "warning: %d images have more boxes than the %d queries (up to %d): the rest of their boxes cannot be "
                "learned; --num_queries %d would do\n",
                crowded, config->num_queries, most, most);
    if (from_scratch && train->num_images < (config->anchor ? ENOUGH_IMAGES_ANCHOR : ENOUGH_IMAGES))
        fprintf(file,
                config->anchor ? "warning: %d images are few to learn from scratch: --pretrained starts from weights\n"
                               : "warning: %d images are few for a DETR from scratch: it will need hundreds of epochs; "
                                 "--preset small is a recipe for few pictures, --pretrained starts from weights\n",
                train->num_images);
    if (train->num_targets == 0) fprintf(file, "warning: %s has no box to train on\n", train->source);
}

// What the steps of this process have told so far.
typedef struct {
    int64_t steps, window;  // steps so far; over so many the loss is averaged
    double sum;             // of the loss, over the steps of the window under way
    double last, before;    // its mean over the last whole window, and over the one before
    int said;               // bits, below
} Watch;

enum { SAME_BOX = 1, FLAT_LOSS = 2, SLOW_DATA = 4 };

static Watch watch_begin(int64_t last_step) {
    Watch watch = {0, last_step / 20 > 500 ? last_step / 20 : 500, 0, 0, 0, 0};
    return watch;
}

// Notes a step and returns what is to be said after it, each once: SAME_BOX, if after 200 steps all queries still say
// nearly the same box; FLAT_LOSS, if the loss of a window is not 1 % below that of the window before, while the
// learning rate is at least half of what was asked for (rate: the schedule's factor; at the end of a schedule a loss
// may stand still); SLOW_DATA, if after 100 steps of this process more than a quarter of the time (waiting: that share)
// went into waiting for pictures. step: optimizer steps in all.
static int watch_step(Watch *watch, int64_t step, double rate, const Losses *losses, double waiting) {
    int signs = 0;
    watch->sum += losses->loss;
    if (++watch->steps % watch->window == 0) {
        watch->before = watch->last;
        watch->last = watch->sum / (double)watch->window;
        watch->sum = 0;
        if (watch->steps > watch->window && rate >= 0.5 && watch->last > 0.99 * watch->before) signs |= FLAT_LOSS;
    }
    if (step >= 200 && losses->query_spread < 0.01) signs |= SAME_BOX;
    if (watch->steps >= 100 && waiting > 0.25) signs |= SLOW_DATA;
    signs &= ~watch->said;
    watch->said |= signs;
    return signs;
}

// Says the signs that watch_step returned; workers: --num_workers.
static void watch_say(FILE *file, const Watch *watch, int signs, int64_t step, const Losses *losses, double waiting,
                      int workers) {
    if (signs & SAME_BOX)
        fprintf(file,
                "warning: step %lld: all queries predict nearly the same box (spread of their centres %.4f of the "
                "picture): they have not learned to differ yet. If it stays so: --decoder anchor, --warmup_steps, "
                "another --lr, or --pretrained\n",
                (long long)step, losses->query_spread);
    if (signs & FLAT_LOSS)
        fprintf(file,
                "warning: step %lld: the loss does not fall: %.4f over the last %lld steps, %.4f over those before. If "
                "it should, try another --lr; else there may be nothing left to learn\n",
                (long long)step, watch->last, (long long)watch->window, watch->before);
    if (signs & SLOW_DATA)
        fprintf(file,
                "warning: %.0f %% of the time the training waits for pictures to be read: more than %d --num_workers, "
                "or smaller files, would help\n",
                100 * waiting, workers);
}

#endif
