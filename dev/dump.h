/*
What dev/oracle.py says that PyTorch computes, dev/dumps/NAME/, and the comparison with it: for test_detr.c and
test_detr.cu.

Included behind train_detr.c and data/test_check.h.
*/
#ifndef DETR_DUMP_H
#define DETR_DUMP_H

enum { DUMP_IMAGES = 3, DUMP_STEPS = 2 };

static const int IS_DOUBLE = sizeof(real) == 8;

typedef struct {
    const char *folder;
    SafeFile truth;
    const char *yardstick;  // PyTorch's arithmetic whose errors bound ours in float: "float32" or "bf16"
    double times;           // how many of its errors ours may be
    double worst_ratio;     // error over bound, of all that was compared
    char worst[200];        // where it is
} TruthDump;

// A network that a dump has the first steps of, at its start, and what it is trained with.
typedef struct {
    TruthDump dump;
    Model model;
    LossSettings loss;
    OptimizerSettings optimizer;
    uint64_t seed;
} DumpCase;

static double dump_scalar(const TruthDump *dump, const char *name) {
    const SafeEntry *entry = safetensors_find(&dump->truth, name);
    check(entry != NULL, "%s: has no \"%s\"", dump->folder, name);
    return entry ? safetensors_element(entry, 0) : 0;
}

// Opens folder/truth.safetensors. 0; -1, a failed check, if that cannot be read.
static int dump_open(TruthDump *dump, const char *folder, const char *yardstick, double times) {
    Error error;
    memset(dump, 0, sizeof *dump);
    dump->folder = folder, dump->yardstick = yardstick, dump->times = times;
    char *path = format_string("%s/truth.safetensors", folder);
    const int status = safetensors_open(&dump->truth, path, &error);
    check(status == 0, "%s", status ? error.text : "");
    free(path);
    return status;
}

// Compares `ours` with the truth called `name`: norm of the difference over norm of the truth, or over `scale` where
// that is larger. In double the bound is `exact`; in float it is so many times PyTorch's own error, but never below as
// many roundings of the last bit, 2^-24, without which not even the right answer could be written down. With a scale
// the truth is zero but for rounding, and how much of that is left depends on where one rounds: four times.
static void compare(TruthDump *dump, const char *name, const double *ours, size_t count, double scale, double exact) {
    const SafeEntry *entry = safetensors_find(&dump->truth, name);
    if (!entry || (size_t)entry->count != count) {
        check(0, "%s: %s: the dump has %lld numbers, we have %zu", dump->folder, name,
              entry ? (long long)entry->count : -1, count);
        return;
    }
    double difference = 0, norm = 0, bound = exact;
    for (size_t i = 0; i < count; i++) {
        double truth = safetensors_element(entry, (int64_t)i);
        difference += (ours[i] - truth) * (ours[i] - truth), norm += truth * truth;
    }
    if (!IS_DOUBLE) {
        char error_name[200];
        snprintf(error_name, sizeof error_name, "%s_error.%s", dump->yardstick, name);
        bound = (scale > 0 ? 4 : dump->times) * fmax(dump_scalar(dump, error_name), 1.0 / (1 << 24));
    }
    norm = fmax(sqrt(norm), scale);
    double error = norm > 0 ? sqrt(difference) / norm : sqrt(difference);
    if (error > dump->worst_ratio * bound) {
        dump->worst_ratio = error / bound;
        snprintf(dump->worst, sizeof dump->worst, "%s", name);
    }
    check(error <= bound, "%s: %s differs by %.3g, %.3g is allowed", dump->folder, name, error, bound);
}

static void compare_reals(TruthDump *dump, const char *name, const real *ours, size_t count) {
    double *wide = (double *)allocate(count * sizeof(double));
    for (size_t i = 0; i < count; i++) wide[i] = (double)ours[i];
    compare(dump, name, wide, count, 0, 1e-10);
    free(wide);
}

// `what` of a parameter ("s0.grad." or "after."), in the checkpoint's order. `whole`: the norm of the whole gradient; a
// gradient whose truth is zero, like a key's bias, is held to that.
static void compare_param(TruthDump *dump, const char *what, const Param *param, const real *ours, double whole,
                          double exact) {
    char name[200];
    snprintf(name, sizeof name, "%s%s", what, param->name);
    double *wide = (double *)allocate(param->count * sizeof(double)), scale = 0;
    for (size_t i = 0; i < param->count; i++) wide[i] = (double)ours[param_place(param, i)];
    const SafeEntry *entry = safetensors_find(&dump->truth, name);
    if (entry && whole > 0) {
        double norm = 0;
        for (int64_t i = 0; i < entry->count; i++) norm += pow(safetensors_element(entry, i), 2);
        if (sqrt(norm) < 1e-10 * whole) scale = whole;
    }
    compare(dump, name, wide, param->count, scale, exact);
    free(wide);
}

typedef struct {
    int height, width, num_boxes;
    real *pixels;
    double *boxes;
    int *classes;
} DumpImage;

// Reads one image of the dump; crowds are no targets.
static void dump_image(const TruthDump *dump, int step, int i, DumpImage *image) {
    char name[64];
    const char *parts[4] = {"pixel_values", "boxes", "labels", "iscrowd"};
    const SafeEntry *entries[4];
    memset(image, 0, sizeof *image);
    for (int k = 0; k < 4; k++) {
        snprintf(name, sizeof name, "s%d.i%d.%s", step, i, parts[k]);
        entries[k] = safetensors_find(&dump->truth, name);
        check(entries[k] != NULL, "%s: has no \"%s\"", dump->folder, name);
        if (!entries[k]) return;
    }
    image->height = (int)entries[0]->shape[0], image->width = (int)entries[0]->shape[1];
    image->pixels = (real *)allocate((size_t)entries[0]->count * sizeof(real));
    for (int64_t k = 0; k < entries[0]->count; k++) image->pixels[k] = (real)safetensors_element(entries[0], k);
    image->boxes = (double *)allocate((size_t)entries[1]->count * sizeof(double));
    image->classes = (int *)allocate((size_t)entries[2]->count * sizeof(int));
    for (int64_t b = 0; b < entries[2]->count; b++) {
        if (safetensors_element(entries[3], b) != 0) continue;
        for (int64_t c = 0; c < 4; c++)
            image->boxes[4 * image->num_boxes + c] = safetensors_element(entries[1], 4 * b + c);
        image->classes[image->num_boxes++] = (int)safetensors_element(entries[2], b);
    }
}

// match: (layers, queries), the target that PyTorch matched each query with, or -1.
static void dump_matches(const TruthDump *dump, const Model *model, int *match, int step, int i) {
    char name[64];
    int Q = model->config.num_queries, L = model->config.dec_layers;
    for (int q = 0; q < L * Q; q++) match[q] = -1;
    snprintf(name, sizeof name, "s%d.i%d.matches", step, i);
    const SafeEntry *entry = safetensors_find(&dump->truth, name);
    check(entry != NULL, "%s: has no \"%s\"", dump->folder, name);
    if (!entry) return;
    int64_t pairs = entry->count / 2 / L;
    for (int64_t at = 0; at < L * pairs; at++) {
        const int query = (int)safetensors_element(entry, 2 * at);  // -1 where a layer has fewer pairs than others
        if (query >= 0) match[at / pairs * Q + query] = (int)safetensors_element(entry, 2 * at + 1);
    }
}

// Queries matched with other targets than PyTorch matched them.
static void compare_matches(const TruthDump *dump, const Model *model, const int *match, int step, int i) {
    int count = model->config.num_queries * model->config.dec_layers, wrong = 0;
    int *truth = (int *)allocate((size_t)count * sizeof(int));
    dump_matches(dump, model, truth, step, i);
    for (int q = 0; q < count; q++) wrong += match[q] != truth[q];
    check(wrong == 0, "%s: step %d, image %d: %d matched pairs differ", dump->folder, step, i, wrong);
    free(truth);
}

// half: without what counts decisions (class and cardinality error), which roundings of bf16 turn over.
static void compare_losses(TruthDump *dump, const Losses *losses, int step, int layers, int half) {
    const double *values[4] = {losses->loss_ce, losses->loss_bbox, losses->loss_giou, losses->cardinality_error};
    const char *names[4] = {"loss_ce", "loss_bbox", "loss_giou", "cardinality_error"};
    char name[64];
    for (int k = 0; k < (half ? 3 : 4); k++) {
        for (int l = 0; l < layers; l++) {
            if (l == layers - 1)
                snprintf(name, sizeof name, "s%d.%s", step, names[k]);
            else
                snprintf(name, sizeof name, "s%d.%s_%d", step, names[k], l);
            compare(dump, name, &values[k][l], 1, 0, 1e-10);
        }
    }
    snprintf(name, sizeof name, "s%d.class_error", step);
    if (!half) compare(dump, name, &losses->class_error, 1, 0, 1e-10);
    snprintf(name, sizeof name, "s%d.loss", step);
    compare(dump, name, &losses->loss, 1, 0, 1e-10);
    snprintf(name, sizeof name, "s%d.grad_norm", step);
    compare(dump, name, &losses->grad_norm, 1, 0, 1e-10);
}

// The gradients of a step, of all that is trained; whole: the norm of all together.
static void compare_gradients(TruthDump *dump, const Model *model, int step, double whole) {
    char what[32];
    snprintf(what, sizeof what, "s%d.grad.", step);
    for (int i = 0; i < model->num_params; i++)
        if (model->params[i]->trained)
            compare_param(dump, what, model->params[i], model->params[i]->grad, whole, 1e-10);
}

// The values behind the last step.
static void compare_values(TruthDump *dump, const Model *model) {
    for (int i = 0; i < model->num_params; i++)
        if (model->params[i]->trained)
            compare_param(dump, "after.", model->params[i], model->params[i]->value, 0, 1e-9);
}

// What lies in a dump's folder: the start as a checkpoint, the settings beside the truth. half: the CPU's own, not what
// a GPU multiplies. 0; -1, a failed check, if it cannot be read.
static int dump_case_open(DumpCase *c, const char *folder, const char *yardstick, double times, int half) {
    Network network;
    Error error;
    TruthDump *dump = &c->dump;
    if (dump_open(dump, folder, yardstick, times) != 0) return -1;
    memset(&network, 0, sizeof network);
    char *weights = format_string("%s/model.safetensors", folder);
    int status = config_read(&network, folder, &error);
    const int from_scratch = dump_scalar(dump, "settings.train_all") != 0;
    network.config.dropout = dump_scalar(dump, "settings.dropout"), network.config.half = half;
    if (status == 0) status = model_create(&c->model, &network.config, DUMP_IMAGES, 1, from_scratch, &error);
    if (status == 0) status = weights_read(&c->model, weights, WEIGHTS_ALL, &error);
    free(weights);
    network_free(&network);
    check(status == 0, "%s", status ? error.text : "");
    if (status != 0) return -1;
    model_pack(&c->model);
    const int focal = c->model.config.focal;
    const LossSettings loss = {dump_scalar(dump, "settings.cost_class"),
                               dump_scalar(dump, "settings.cost_bbox"),
                               dump_scalar(dump, "settings.cost_giou"),
                               focal ? dump_scalar(dump, "settings.class_loss_coef") : 1,
                               dump_scalar(dump, "settings.bbox_loss_coef"),
                               dump_scalar(dump, "settings.giou_loss_coef"),
                               dump_scalar(dump, "settings.eos_coef"),
                               1,
                               focal ? (int)dump_scalar(dump, "settings.aux_matches") : 1};
    const OptimizerSettings optimizer = {dump_scalar(dump, "settings.lr"), dump_scalar(dump, "settings.lr_backbone"),
                                         dump_scalar(dump, "settings.weight_decay"),
                                         dump_scalar(dump, "settings.clip_max_norm"), 0};
    c->loss = loss, c->optimizer = optimizer, c->seed = (uint64_t)dump_scalar(dump, "settings.seed");
    return 0;
}

// Says how near it came.
static void dump_case_close(DumpCase *c, const char *computed_in) {
    printf("  %s, %s: the largest error is %.2g of what is allowed (%s)\n", c->dump.folder, computed_in,
           c->dump.worst_ratio, c->dump.worst);
    model_free(&c->model);
    safetensors_close(&c->dump.truth);
}

#endif
