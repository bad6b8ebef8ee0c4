/*
From a data set to training samples: reads a picture, augments it the way DETR does, and keeps worker threads some
batches ahead of the training. It does not normalise pixels and knows nothing of the model.

Order to read in: Augmentation, Samples, The order of an epoch, The worst size, Worker threads.

A sample is a pure function of (data set, settings, epoch, index): each decision of the augmentation is its own random
number, so any number of workers, and a run that was resumed, gives the same pixels and boxes.

Compiles as C11 and as C++17.
*/
#ifndef DETR_LOADER_H
#define DETR_LOADER_H

#include "dataset.h"
#include "image.h"
#include <pthread.h>

// What is done to the pictures besides resizing. CROP: DETR's own, mirrored, cropped, of several sizes. JITTER:
// mirrored, and larger or smaller.
typedef enum { AUGMENT_NOTHING, AUGMENT_CROP, AUGMENT_JITTER } Augment;

typedef struct {
    uint64_t seed;
    int short_side, max_size;  // pixels; max_size 0: no limit for the long side
    Augment augment;
    int shuffle;     // 0 or 1
    int batch_size;  // pictures in one step
    int workers;     // threads; 0: the calling thread decodes
    int prefetch;    // batches that the workers may be ahead
    double scales;   // with JITTER: sizes are from (1 - scales) to (1 + scales) times the plain one, 0 <= scales < 1
    int vflip;       // 0 or 1: mirrored top and bottom too, half of the time, unless nothing is done
    int transpose;   // 0 or 1: mirrored along the diagonal too, likewise
    int originals;   // 0 or 1: samples hold the picture as it was read, too
    int defer_side;  // pictures with no longer side than this, in pixels, at any stage come as they were read, and what
                     // is to be done to them is the caller's to do; 0: all come augmented and resized
    int kept;        // batches before the last one that the caller still has
} LoaderSettings;

// What is done to a picture: mirrored left and right, top and bottom, along the diagonal, in this order; then resized,
// up to two times, and of each result a rectangle kept.
typedef struct {
    int full_width, full_height;  // of the result
    int x, y, width, height;      // of the rectangle
} Resize;

typedef struct {
    int flip, vflip, transpose;  // 0 or 1
    int num_resizes;
    Resize resizes[2];
} ImageChange;

typedef struct {
    int index;                            // place in dataset->images
    Image image;                          // augmented and resized; pixels NULL if unreadable: `error` says why
    ImageChange change;                   // what is still to be done to image: nothing unless the settings defer it
    int width, height;                    // of the picture when that is done
    int original_width, original_height;  // of the picture as image_read gives it
    Image original;                       // that picture, with originals
    int num_boxes;                        // targets: no crowd, difficult or skipped box, nothing cropped away
    double *boxes;                        // (num_boxes, 4): cx cy w h in 0..1 of the picture when that is done
    int *classes;                         // (num_boxes)
    Error error;
} Sample;

// ---------------------------------------------------------------------------------------------------------------------
// Augmentation, after make_coco_transforms in DETR's datasets/coco.py: mirrored half of the time, then either resized
// to a random scale, or resized to 400, 500 or 600, cropped at random, and resized to a random scale. Or, for objects
// whose size and surroundings tell what they are: mirrored, and resized to a random scale around the plain one.
// While a sample is made its boxes are x0 y0 x1 y1 in pixels of the picture as it stands, and pixels themselves wait:
// what is to be done to them is written down, and image_change() does it at the end.

// The numbers of the decisions: elements of RANDOM_AUGMENT for (epoch, index).
enum {
    AUGMENT_FLIP,
    AUGMENT_IS_CROPPED,
    AUGMENT_FIRST_SCALE,
    AUGMENT_CROP_WIDTH,
    AUGMENT_CROP_HEIGHT,
    AUGMENT_CROP_LEFT,
    AUGMENT_CROP_TOP,
    AUGMENT_SCALE,
    AUGMENT_VFLIP,
    AUGMENT_TRANSPOSE
};

static const int augment_scales[11] = {480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800};
static const int augment_first_scales[3] = {400, 500, 600};
enum { AUGMENT_CROP_MIN = 384, AUGMENT_CROP_MAX = 600 };

// DETR's lengths are for a short side of 800; others shrink or grow in proportion, rounded, at least 1.
static inline int augment_length(int length, int short_side) {
    int64_t scaled = ((int64_t)length * short_side + 400) / 800;
    return scaled < 1 ? 1 : (int)scaled;
}

// A length times a factor, rounded; at least 1, but no limit (0) stays none.
static inline int jitter_length(int length, double factor) {
    int scaled = (int)lrint(length * factor);
    return scaled < 1 && length > 0 ? 1 : scaled;
}

// Moves all boxes to the coordinates of a crop, cuts them off at its edges, and drops those with nothing left.
static inline void sample_crop_boxes(Sample *sample, double left, double top, double width, double height) {
    int kept = 0;
    for (int i = 0; i < sample->num_boxes; i++) {
        const double *box = sample->boxes + 4 * i;
        double x0 = fmin(fmax(box[0] - left, 0), width), x1 = fmin(fmax(box[2] - left, 0), width);
        double y0 = fmin(fmax(box[1] - top, 0), height), y1 = fmin(fmax(box[3] - top, 0), height);
        if (!(x1 > x0 && y1 > y0)) continue;
        double *to = sample->boxes + 4 * kept;
        to[0] = x0, to[1] = y0, to[2] = x1, to[3] = y1;
        sample->classes[kept++] = sample->classes[i];
    }
    sample->num_boxes = kept;
}

static inline void sample_scale_boxes(Sample *sample, double x_ratio, double y_ratio) {
    for (int i = 0; i < 4 * sample->num_boxes; i++) sample->boxes[i] *= i % 2 ? y_ratio : x_ratio;
}

// Mirrors picture and boxes: left and right, or top and bottom.
static inline void sample_flip(Sample *sample, int vertical) {
    const double size = vertical ? sample->height : sample->width;
    *(vertical ? &sample->change.vflip : &sample->change.flip) = 1;
    for (int i = 0; i < sample->num_boxes; i++) {
        double *box = sample->boxes + 4 * i + vertical, low = box[0];
        box[0] = size - box[2];
        box[2] = size - low;
    }
}

// Mirrors picture and boxes along the diagonal from the upper left: width and height change places.
static inline void sample_transpose(Sample *sample) {
    const int width = sample->width;
    sample->change.transpose = 1;
    sample->width = sample->height;
    sample->height = width;
    for (int i = 0; i < 4 * sample->num_boxes; i += 2) {
        const double x = sample->boxes[i];
        sample->boxes[i] = sample->boxes[i + 1];
        sample->boxes[i + 1] = x;
    }
}

// Resizes picture and boxes and keeps a rectangle of the picture; the boxes may reach out of it.
static inline void sample_resize(Sample *sample, Resize resize) {
    sample_scale_boxes(sample, (double)resize.full_width / sample->width, (double)resize.full_height / sample->height);
    sample->change.resizes[sample->change.num_resizes++] = resize;
    sample->width = resize.width;
    sample->height = resize.height;
}

typedef struct {
    uint64_t seed;
    uint32_t epoch, index;
} AugmentKey;

static inline int augment_choose(const AugmentKey *key, int decision, int count) {
    return (int)random_below(key->seed, RANDOM_AUGMENT, 0, key->epoch, key->index, (uint64_t)decision, (uint32_t)count);
}

static inline int augment_between(const AugmentKey *key, int decision, int low, int high) {
    return low + augment_choose(key, decision, high - low + 1);
}

// Resizes to one of the first scales and crops.
static inline void sample_random_crop(Sample *sample, const AugmentKey *key, int short_side) {
    int first = augment_length(augment_first_scales[augment_choose(key, AUGMENT_FIRST_SCALE, 3)], short_side);
    int low = augment_length(AUGMENT_CROP_MIN, short_side), high = augment_length(AUGMENT_CROP_MAX, short_side);
    Resize to;
    resized_size(sample->width, sample->height, first, 0, &to.full_width, &to.full_height);
    int most_wide = to.full_width < high ? to.full_width : high,
        most_high = to.full_height < high ? to.full_height : high;
    to.width = augment_between(key, AUGMENT_CROP_WIDTH, low < most_wide ? low : most_wide, most_wide);
    to.height = augment_between(key, AUGMENT_CROP_HEIGHT, low < most_high ? low : most_high, most_high);
    to.x = augment_between(key, AUGMENT_CROP_LEFT, 0, to.full_width - to.width);
    to.y = augment_between(key, AUGMENT_CROP_TOP, 0, to.full_height - to.height);
    sample_resize(sample, to);
    sample_crop_boxes(sample, to.x, to.y, to.width, to.height);
}

// The longest side that a picture of this size has before, between and after its resizes.
static inline int change_longest_side(const ImageChange *change, int width, int height) {
    int longest = width > height ? width : height;
    for (int i = 0; i < change->num_resizes; i++) {
        if (change->resizes[i].width > longest) longest = change->resizes[i].width;
        if (change->resizes[i].height > longest) longest = change->resizes[i].height;
    }
    return longest;
}

// Does it, in place. Of a resized picture only what is kept is computed.
static inline void image_change(Image *image, const ImageChange *change) {
    if (change->flip) image_flip(image);
    if (change->vflip) image_flip_vertical(image);
    if (change->transpose) image_orient(image, 5);
    for (int i = 0; i < change->num_resizes; i++) {
        const Resize *to = &change->resizes[i];
        image_resize_crop(image, to->full_width, to->full_height, to->x, to->y, to->width, to->height);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Samples

static inline void sample_free(Sample *sample) {
    image_free(&sample->image);
    image_free(&sample->original);
    free(sample->boxes);
    free(sample->classes);
    memset(sample, 0, sizeof *sample);
}

// Reads and augments picture `index` of the data set as it is seen in `epoch`; with AUGMENT_NOTHING it is only resized.
// *sample is overwritten; sample_free releases it. Boxes are taken as pixels of the picture that was decoded,
// whatever size the annotation file gives, and cut off at its edges.
static inline void sample_make(Sample *sample, const Dataset *set, const LoaderSettings *settings, int epoch,
                               int index) {
    const DatasetImage *entry = &set->images[index];
    memset(sample, 0, sizeof *sample);
    sample->index = index;
    if (!entry->path) {
        fail(&sample->error, "%s: the data set was opened without its pictures", entry->name);
        return;
    }
    if (image_read(entry->path, &sample->image, &sample->error) != 0) return;
    sample->original_width = sample->width = sample->image.width;
    sample->original_height = sample->height = sample->image.height;
    if (settings->originals) {
        sample->original = image_unset(sample->image.width, sample->image.height);
        memcpy(sample->original.pixels, sample->image.pixels,
               3 * (size_t)sample->image.width * (size_t)sample->image.height);
    }
    sample->boxes = (double *)allocate(4 * (size_t)entry->num_annotations * sizeof(double));
    sample->classes = (int *)allocate((size_t)entry->num_annotations * sizeof(int));
    for (int i = 0; i < entry->num_annotations; i++) {
        const Annotation *annotation = &set->annotations[entry->first_annotation + i];
        if (annotation->crowd || annotation->ignore || annotation->skipped) continue;
        double *box = sample->boxes + 4 * sample->num_boxes;
        box[0] = annotation->x;
        box[1] = annotation->y;
        box[2] = annotation->x + annotation->width;
        box[3] = annotation->y + annotation->height;
        sample->classes[sample->num_boxes++] = annotation->class_index;
    }
    sample_crop_boxes(sample, 0, 0, sample->width, sample->height);

    AugmentKey key = {settings->seed, (uint32_t)epoch, (uint32_t)index};
    int short_side = settings->short_side, max_size = settings->max_size;
    if (settings->augment && augment_choose(&key, AUGMENT_FLIP, 2)) sample_flip(sample, 0);
    if (settings->augment && settings->vflip && augment_choose(&key, AUGMENT_VFLIP, 2)) sample_flip(sample, 1);
    if (settings->augment && settings->transpose && augment_choose(&key, AUGMENT_TRANSPOSE, 2))
        sample_transpose(sample);
    if (settings->augment == AUGMENT_CROP) {
        if (augment_choose(&key, AUGMENT_IS_CROPPED, 2)) sample_random_crop(sample, &key, short_side);
        short_side = augment_length(augment_scales[augment_choose(&key, AUGMENT_SCALE, 11)], short_side);
    }
    if (settings->augment == AUGMENT_JITTER) {
        short_side = augment_between(&key, AUGMENT_SCALE, jitter_length(short_side, 1 - settings->scales),
                                     jitter_length(short_side, 1 + settings->scales));
        max_size = jitter_length(max_size, (double)short_side / settings->short_side);
    }
    Resize to = {0, 0, 0, 0, 0, 0};
    resized_size(sample->width, sample->height, short_side, max_size, &to.full_width, &to.full_height);
    to.width = to.full_width, to.height = to.full_height;
    sample_resize(sample, to);
    if (change_longest_side(&sample->change, sample->image.width, sample->image.height) > settings->defer_side) {
        image_change(&sample->image, &sample->change);
        memset(&sample->change, 0, sizeof sample->change);
    }

    for (int i = 0; i < sample->num_boxes; i++) {
        double *box = sample->boxes + 4 * i, x0 = box[0], y0 = box[1], x1 = box[2], y1 = box[3];
        box[0] = (x0 + x1) / 2 / sample->width;
        box[1] = (y0 + y1) / 2 / sample->height;
        box[2] = (x1 - x0) / sample->width;
        box[3] = (y1 - y0) / sample->height;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The order of an epoch

// Writes the places 0 .. num_images - 1 in the order in which `epoch` goes through them: shuffled (Fisher and Yates) by
// settings->seed, or as they are.
static inline void epoch_order(int *order, int num_images, const LoaderSettings *settings, int epoch) {
    for (int i = 0; i < num_images; i++) order[i] = i;
    if (!settings->shuffle) return;
    for (int i = num_images - 1; i > 0; i--) {
        int other = (int)random_below(settings->seed, RANDOM_SHUFFLE, 0, (uint32_t)epoch, 0, (uint64_t)i, i + 1u);
        int kept = order[i];
        order[i] = order[other];
        order[other] = kept;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The worst size, for planning memory

// A height and width that no sample exceeds in pixels, nor in places on a feature map of stride 2, 4, 8, 16 or 32
// (ceil(height / stride) * ceil(width / stride)). With a max_size the bound holds for any picture in the world, so
// `set` may be NULL; without one the long side follows from the sizes in the data set.
//
// Why: if the long side is limited, the short side becomes k = round(max_size / r) for a picture r times as long as
// wide, so r <= max_size / (k - 1/2), and the long side, at most k * r, can pass max_size by a factor k / (k - 1/2).
static inline void loader_worst_size(const Dataset *set, const LoaderSettings *settings, int *height, int *width) {
    const double largest = settings->augment == AUGMENT_JITTER ? 1 + settings->scales : 1;
    int short_side = jitter_length(settings->short_side, largest);
    int max_size = jitter_length(settings->max_size, (double)short_side / settings->short_side);
    *height = short_side;
    if (max_size > 0) {
        *width = max_size;
        for (int stride = 1; stride <= 32; stride *= 2) {
            int64_t most = 0, rows = (short_side + stride - 1) / stride;
            for (int64_t k = 1; k <= short_side; k++) {
                int64_t longest = 2 * k * max_size / (2 * k - 1);
                int64_t places = ((k + stride - 1) / stride) * ((longest + stride - 1) / stride);
                if (places > most) most = places;
            }
            int64_t columns = (most + rows - 1) / rows;
            if ((*width + stride - 1) / stride < columns) *width = (int)((columns - 1) * stride + 1);
        }
        return;
    }
    // The most stretched crop, then the pictures themselves; unknown sizes (0) count as the crop.
    int64_t low = augment_length(AUGMENT_CROP_MIN, short_side), high = augment_length(AUGMENT_CROP_MAX, short_side);
    int64_t longest = settings->augment == AUGMENT_CROP ? (short_side * high + low - 1) / low : short_side;
    for (int i = 0; set && i < set->num_images; i++) {
        int out_width, out_height, in_width = set->images[i].width, in_height = set->images[i].height;
        if (in_width < 1 || in_height < 1) continue;
        resized_size(in_width, in_height, short_side, 0, &out_width, &out_height);
        if (out_width > longest) longest = out_width;
        if (out_height > longest) longest = out_height;
    }
    *width = longest > INT32_MAX ? INT32_MAX : (int)longest;
}

// ---------------------------------------------------------------------------------------------------------------------
// Worker threads. Samples are numbered through all steps: number n is place n % batch_size of step n / batch_size.
// Workers take the next number under the lock, make the sample without it, and put it into slot n % num_slots; they
// stop when they are `prefetch` batches ahead. The batches that the caller holds keep their slots.

typedef struct {
    const Dataset *set;
    LoaderSettings settings;
    int64_t steps_per_epoch;
    int64_t step;  // the step the caller holds
    int64_t next;  // number of the next sample that nobody has begun
    Sample *slots;
    unsigned char *done;  // per slot: the sample is ready
    int num_slots;        // (prefetch + 1 + kept) * batch_size
    int *order;           // of epoch `order_epoch`
    int64_t order_epoch;
    double wait_seconds;
    int stop, num_threads;
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t work, ready;
} Loader;

// Which picture sample `number` shows, and in which epoch. Numbers come in rising order, under the lock.
static inline int loader_place(Loader *loader, int64_t number, int *epoch) {
    int64_t batch_size = loader->settings.batch_size, step = number / batch_size;
    int64_t position = step % loader->steps_per_epoch * batch_size + number % batch_size;
    *epoch = (int)(step / loader->steps_per_epoch);
    if (*epoch != loader->order_epoch) {
        epoch_order(loader->order, loader->set->num_images, &loader->settings, *epoch);
        loader->order_epoch = *epoch;
    }
    return loader->order[position % loader->set->num_images];
}

static inline void *loader_work(void *context) {
    Loader *loader = (Loader *)context;
    const LoaderSettings *settings = &loader->settings;
    pthread_mutex_lock(&loader->lock);
    for (;;) {
        while (!loader->stop && loader->next >= (loader->step + 1 + settings->prefetch) * settings->batch_size)
            pthread_cond_wait(&loader->work, &loader->lock);
        if (loader->stop) break;
        int64_t number = loader->next++;
        int epoch, index = loader_place(loader, number, &epoch), slot = (int)(number % loader->num_slots);
        pthread_mutex_unlock(&loader->lock);
        sample_make(&loader->slots[slot], loader->set, settings, epoch, index);
        pthread_mutex_lock(&loader->lock);
        loader->done[slot] = 1;
        pthread_cond_signal(&loader->ready);
    }
    pthread_mutex_unlock(&loader->lock);
    return NULL;
}

// Begins with step `first_step` (0-based) and goes on over epochs without end. Step s is step s % n of epoch s / n,
// where n = num_images / batch_size, rounded down: the last few places of an epoch's order are left out. Needs at least
// one picture; with fewer than batch_size, a batch has some of them twice. The data set must outlive the loader.
static inline Loader *loader_start(const Dataset *set, const LoaderSettings *settings, int64_t first_step) {
    Loader *loader = (Loader *)allocate(sizeof *loader);
    loader->set = set;
    loader->settings = *settings;
    if (loader->settings.prefetch < 0) loader->settings.prefetch = 0;
    if (loader->settings.workers <= 0) loader->settings.prefetch = 0;
    loader->steps_per_epoch = set->num_images / settings->batch_size;
    if (loader->steps_per_epoch < 1) loader->steps_per_epoch = 1;
    loader->step = first_step - 1;
    loader->next = first_step * settings->batch_size;
    loader->num_slots = (loader->settings.prefetch + 1 + settings->kept) * settings->batch_size;
    loader->slots = (Sample *)allocate((size_t)loader->num_slots * sizeof(Sample));
    loader->done = (unsigned char *)allocate((size_t)loader->num_slots);
    loader->order = (int *)allocate((size_t)set->num_images * sizeof(int));
    loader->order_epoch = -1;
    pthread_mutex_init(&loader->lock, NULL);
    pthread_cond_init(&loader->work, NULL);
    pthread_cond_init(&loader->ready, NULL);
    int workers = settings->workers > 0 ? settings->workers : 0;
    loader->threads = (pthread_t *)allocate((size_t)workers * sizeof(pthread_t));
    while (loader->num_threads < workers &&  // fewer where the system allows no more; none: the caller decodes
           pthread_create(&loader->threads[loader->num_threads], NULL, loader_work, loader) == 0)
        loader->num_threads++;
    return loader;
}

// The samples of the next step, batch_size of them in order. They belong to the loader and last until the next call, or
// for `kept` calls more.
static inline Sample *loader_next_batch(Loader *loader) {
    int batch_size = loader->settings.batch_size;
    double begin = seconds_now();
    int held = (int)((loader->step + 1) * batch_size % loader->num_slots);  // first slot of the step that is asked for
    int oldest = (held + loader->num_slots - (loader->settings.kept + 1) * batch_size) % loader->num_slots;
    for (int i = 0; i < batch_size; i++) sample_free(&loader->slots[oldest + i]);
    pthread_mutex_lock(&loader->lock);
    loader->step++;
    pthread_cond_broadcast(&loader->work);
    for (int i = 0; i < batch_size; i++) {
        if (loader->num_threads == 0) {
            int epoch, index = loader_place(loader, loader->next++, &epoch);
            sample_make(&loader->slots[held + i], loader->set, &loader->settings, epoch, index);
        } else {
            while (!loader->done[held + i]) pthread_cond_wait(&loader->ready, &loader->lock);
        }
        loader->done[held + i] = 0;
    }
    pthread_mutex_unlock(&loader->lock);
    loader->wait_seconds += seconds_now() - begin;
    return &loader->slots[held];
}

// Seconds that loader_next_batch has kept its caller waiting, in all.
static inline double loader_wait_seconds(const Loader *loader) { return loader->wait_seconds; }

// Ends the threads (each finishes the picture it is at) and releases everything, the last batch included.
static inline void loader_stop(Loader *loader) {
    if (!loader) return;
    pthread_mutex_lock(&loader->lock);
    loader->stop = 1;
    pthread_cond_broadcast(&loader->work);
    pthread_mutex_unlock(&loader->lock);
    for (int i = 0; i < loader->num_threads; i++) pthread_join(loader->threads[i], NULL);
    for (int i = 0; i < loader->num_slots; i++) sample_free(&loader->slots[i]);
    pthread_mutex_destroy(&loader->lock);
    pthread_cond_destroy(&loader->work);
    pthread_cond_destroy(&loader->ready);
    free(loader->slots);
    free(loader->done);
    free(loader->order);
    free(loader->threads);
    free(loader);
}

#endif
