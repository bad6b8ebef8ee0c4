/*
test_detr.c: every check of numbers. It includes the trainer with its main left out, so it can call any function.

    make test                  runs it in float and in double; needs no Python
    ./test_detr NAME ...       runs only the tests whose names begin so
    ./test_detr -NAME ...      leaves those out

The truth in dev/dumps/ was made by PyTorch (dev/oracle.py). In double everything must agree with PyTorch's float64 to
1e-10: a wrong formula cannot hide. In float the yardstick is PyTorch's own float32 error, which the dumps carry, and
for --precision bf16 the error of its autocast to bf16.
The last line is "N passed, N failed"; the exit status is 1 when anything failed.
*/
#define TRAIN_DETR_NO_MAIN
#include "train_detr.c"

#include "data/test_check.h"
#include "dev/dump.h"
#include "data/test_image.h"
#include "data/test_dataset.h"
#include "data/test_fileset.h"
#include "data/test_shapes.h"
#include "data/test_eval.h"

static double test_uniform(uint32_t site, uint64_t element) {
    return random_uniform(7, RANDOM_TEST, site, 0, 0, element);
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers

static void test_random(void) {
    // The known answers of the authors' own library (Random123, kat_vectors, philox4x32-10).
    static const uint32_t cases[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1}};
    for (int i = 0; i < 3; i++) {
        uint32_t counter[4] = {cases[i][0], cases[i][1], cases[i][2], cases[i][3]};
        philox(counter, cases[i][4], cases[i][5]);
        for (int w = 0; w < 4; w++) check(counter[w] == cases[i][6 + w], "philox: known answer %d, word %d", i, w);
    }
    double sum = 0, squares = 0;
    enum { DRAWS = 20000 };
    for (uint64_t i = 0; i < DRAWS; i++) {
        double x = random_normal(1, RANDOM_TEST, 0, 0, 0, i);
        sum += x, squares += x * x;
    }
    // five standard errors: 5 / sqrt(20000) = 0.035 for the mean, 5 sqrt(2 / 20000) = 0.05 for the variance
    check(fabs(sum / DRAWS) < 0.035 && fabs(squares / DRAWS - 1) < 0.05, "normal numbers: mean %g, variance %g",
          sum / DRAWS, squares / DRAWS);
    check(random_word(1, RANDOM_TEST, 0, 0, 0, 5) != random_word(2, RANDOM_TEST, 0, 0, 0, 5),
          "another seed gives another number");
    check(random_word(1, RANDOM_TEST, 0, 0, 0, 5) != random_word(1, RANDOM_TEST, 1, 0, 0, 5),
          "another site gives another number");
}

// ---------------------------------------------------------------------------------------------------------------------
// Matching and boxes

// The least cost over all ways to give rows 0..rows-1 columns of their own.
static double cheapest(const double *cost, int row, int rows, int columns, unsigned taken) {
    double best = row == rows ? 0 : INFINITY;
    for (int j = 0; row < rows && j < columns; j++) {
        if (taken >> j & 1) continue;
        best = fmin(best, cost[row * columns + j] + cheapest(cost, row + 1, rows, columns, taken | 1u << j));
    }
    return best;
}

static void test_matching(void) {
    double cost[64], workspace[128];
    int column_of_row[8];
    for (int round = 0; round < 300; round++) {
        int rows = 1 + round % 6, columns = rows + (round / 6) % 3, distinct = 1;
        for (int i = 0; i < rows * columns; i++) {
            cost[i] = 10 * test_uniform(1, (uint64_t)(round * 64 + i)) - 5;
            if (round % 3 == 0) cost[i] = floor(cost[i]);  // many ties
        }
        assign(column_of_row, cost, rows, columns, workspace);
        double sum = 0;
        unsigned used = 0;
        for (int i = 0; i < rows; i++) {
            if (column_of_row[i] < 0 || column_of_row[i] >= columns || (used >> column_of_row[i] & 1)) {
                distinct = 0;
                break;
            }
            used |= 1u << column_of_row[i];
            sum += cost[i * columns + column_of_row[i]];
        }
        double best = cheapest(cost, 0, rows, columns, 0);
        check(distinct && fabs(sum - best) < 1e-9, "assignment %d (%d x %d): %g, the best is %g", round, rows, columns,
              sum, best);
    }
    const double bad[4] = {NAN, INFINITY, -INFINITY, 1e300};
    for (int round = 0; round < 40; round++) {
        int rows = 4, columns = 5, distinct = 1;
        for (int i = 0; i < 20; i++)
            cost[i] = test_uniform(2, (uint64_t)(round * 20 + i)) < 0.5 || round == 0 ? bad[(i + round) % 4] : i;
        assign(column_of_row, cost, rows, columns, workspace);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j <= i; j++)
                distinct &= column_of_row[i] >= 0 && column_of_row[i] < columns &&
                            (j == i || column_of_row[i] != column_of_row[j]);
        check(distinct, "assignment of costs that are not finite %d: every row has a column of its own", round);
    }
}

static void test_boxes(void) {
    double same[4] = {0.5, 0.5, 0.2, 0.4}, apart[4] = {0.1, 0.5, 0.2, 0.4}, half[4] = {0.6, 0.5, 0.2, 0.4};
    check(fabs(generalized_iou(same, same, NULL) - 1) < 1e-15, "GIoU of a box with itself is 1");
    // apart: no overlap; union 0.16, the box around both is 0.6 x 0.4 = 0.24: -(0.24 - 0.16) / 0.24 = -1/3
    check(fabs(generalized_iou(same, apart, NULL) + 1.0 / 3) < 1e-14, "GIoU of boxes apart");
    // half: they share 0.1 x 0.4 = 0.04; union 0.12, around both 0.3 x 0.4 = 0.12: 1/3
    check(fabs(generalized_iou(same, half, NULL) - 1.0 / 3) < 1e-14, "GIoU of boxes that overlap by half");
    for (int round = 0; round < 200; round++) {
        double a[4], b[4], d[4], moved[4], worst = 0;
        for (int i = 0; i < 4; i++) {
            a[i] = 0.05 + 0.9 * test_uniform(3, (uint64_t)(round * 8 + i)),
            b[i] = 0.05 + 0.9 * test_uniform(3, (uint64_t)(round * 8 + 4 + i));
            if (round % 2 && i >= 2) a[i] *= 0.2, b[i] *= 0.2;  // half of them mostly apart
        }
        generalized_iou(a, b, d);
        for (int i = 0; i < 4; i++) {
            memcpy(moved, a, sizeof a);
            moved[i] = a[i] + 1e-6;
            double above = generalized_iou(moved, b, NULL);
            moved[i] = a[i] - 1e-6;
            worst = fmax(worst, fabs((above - generalized_iou(moved, b, NULL)) / 2e-6 - d[i]) / (1 + fabs(d[i])));
        }
        check(worst < 1e-6, "gradient of GIoU, case %d: off by %g", round, worst);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A small network and made-up pictures, for tests that need no truth from outside

// The kinds of small networks: basic blocks; bottleneck blocks; the anchor decoder with focal loss, on basic blocks.
enum { BASIC, BOTTLENECK, ANCHOR, KINDS };
static const char *const KIND_NAMES[KINDS] = {"basic", "bottleneck", "anchor"};

enum { SMALL_BATCH = 4 };

static ModelConfig small_config(int kind) {
    ModelConfig config;
    memset(&config, 0, sizeof config);
    config.bottleneck = kind == BOTTLENECK;
    config.anchor = config.focal = kind == ANCHOR;
    config.num_stages = 3;
    for (int s = 0; s < 3; s++) config.depths[s] = 1 + (s == 1), config.widths[s] = 16 << s;
    config.stem_width = 12;
    config.hidden_dim = 32, config.nheads = 4, config.enc_layers = 2, config.dec_layers = 2,
    config.dim_feedforward = 40;
    config.num_queries = 9, config.num_labels = 3;
    if (kind == ANCHOR) config.dec_layers = 1;  // see test_gradients
    return config;
}

static void small_model_of(Model *model, const ModelConfig *config, int batch_size) {
    Error error;
    if (model_create(model, config, batch_size, 1, 1, &error) != 0) check(0, "%s", error.text);
    model_initialise(model, 3);
    for (int i = 0; i < model->num_params; i++) {  // no value stays where a wrong formula would not show
        Param *param = model->params[i];
        for (size_t k = 0; k < param->count; k++) {
            double u = test_uniform(4, (uint64_t)i << 20 | k);
            if (param->init == INIT_ONE) param->value[k] = (real)(0.5 + u);
            if (param->init == INIT_ZERO) param->value[k] = (real)(0.2 * u - 0.1);
        }
    }
    model_pack(model);
}

static void small_model(Model *model, int kind, double dropout, int half) {
    ModelConfig config = small_config(kind);
    config.dropout = dropout, config.half = half;
    small_model_of(model, &config, SMALL_BATCH);
}

static const LossSettings SMALL_LOSS = {1, 5, 2, 1, 5, 2, 0.1, 1, 1};

// Pictures of noise of four sizes; the third has no boxes.
static void small_batch(Sample samples[SMALL_BATCH]) {
    static const int sizes[SMALL_BATCH][2] = {{50, 35}, {33, 70}, {48, 48}, {37, 34}};
    memset(samples, 0, SMALL_BATCH * sizeof *samples);
    for (int i = 0; i < SMALL_BATCH; i++) {
        Sample *sample = &samples[i];
        sample->image.width = sizes[i][0], sample->image.height = sizes[i][1];
        size_t count = (size_t)(3 * sizes[i][0] * sizes[i][1]);
        sample->image.pixels = (unsigned char *)allocate(count);
        for (size_t k = 0; k < count; k++)
            sample->image.pixels[k] = (unsigned char)random_word(7, RANDOM_TEST, 5, 0, (uint32_t)i, k);
        sample->num_boxes = i == 2 ? 0 : i == 3 ? 12 : i + 2;  // the fourth has more boxes than queries
        sample->boxes = (double *)allocate((size_t)sample->num_boxes * 4 * sizeof(double));
        sample->classes = (int *)allocate((size_t)sample->num_boxes * sizeof(int));
        for (int b = 0; b < sample->num_boxes; b++) {
            for (int c = 0; c < 4; c++)
                sample->boxes[4 * b + c] =
                    (c < 2 ? 0.3 : 0.05) + 0.4 * test_uniform(6, (uint64_t)((i * 16 + b) * 4 + c));
            sample->classes[b] = (i + b) % 3;
        }
    }
}

static void free_batch(Sample *samples, int count) {
    for (int i = 0; i < count; i++) sample_free(&samples[i]);
}

// What most tests below begin with and end with: a small model, its activations, and the batch.
typedef struct {
    Model model;
    Activations acts;
    Sample samples[SMALL_BATCH];
} SmallRun;

// half: computed in bf16, which the build with reals of 64 bits refuses.
static void small_run_begin(SmallRun *small, int kind, double dropout, int half, int training) {
    small_model(&small->model, kind, dropout, half);
    activations_create(&small->acts, &small->model, 70, 70, training, 1);
    small_batch(small->samples);
}

static void small_run_end(SmallRun *small) {
    free_batch(small->samples, SMALL_BATCH);
    activations_free(&small->acts);
    model_free(&small->model);
}

// Loss of the batch; with gradients also the gradients.
static double batch_loss(Model *model, Activations *acts, const Sample *samples, int gradients) {
    Losses losses;
    LossDivisors divisors = {{0, 0}, {0, 0}, 0};
    memset(&losses, 0, sizeof losses);
    for (int i = 0; i < SMALL_BATCH; i++)
        divisors_add(&divisors, samples[i].num_boxes, model->config.num_queries, &SMALL_LOSS);
    if (gradients) zero_gradients(model);
    for (int i = 0; i < SMALL_BATCH; i++) {
        acts->dropout.p = model->config.dropout, acts->dropout.seed = 11, acts->dropout.step = 5,
        acts->dropout.image = (uint32_t)i;
        load_image(model, acts, &samples[i].image);
        network_forward(model, acts);
        Targets targets = {samples[i].num_boxes, samples[i].boxes, samples[i].classes};
        set_loss(model, acts, targets, divisors, &SMALL_LOSS, &losses);
        if (gradients) network_backward(model, acts);
    }
    if (gradients) unfold_norms(model);
    losses_finish(&losses, model->config.dec_layers, &SMALL_LOSS);
    return losses.loss;
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients against central differences

// For every tensor of the network, a random direction d in it: (loss(w + e d) - loss(w - e d)) / 2e against grad . d.
// Each tensor belongs to one layer, so each layer's backward pass is tested, through all that lies behind it. In double
// with e = 1e-6 truncation and rounding are both near 1e-9 of the loss; a kink of ReLU within e of zero is rarer still.
// Where a layer of the anchor decoder looks is a constant in its gradient, but not in differences: so its learned boxes
// are left out, and it has one layer.
static void test_gradients(void) {
    if (!IS_DOUBLE) return;
    for (int kind = 0; kind < KINDS; kind++) {
        double dropout = kind == BOTTLENECK ? 0.2 : 0;
        SmallRun small;
        small_run_begin(&small, kind, dropout, 0, 1);
        batch_loss(&small.model, &small.acts, small.samples, 1);
        double whole = gradient_norm(&small.model), step = 1e-6, total_slope = 0, total_expected = 0;
        for (int i = 0; i < small.model.num_params; i++) {
            Param *param = small.model.params[i];
            if (!param->trained || (kind == ANCHOR && param == small.model.query_embeddings)) continue;
            double expected = 0, norm = 0, loss[2];
            for (size_t k = 0; k < param->count; k++)
                norm += pow(random_normal(9, RANDOM_TEST, (uint32_t)i, 0, 0, k), 2);
            for (int side = 0; side < 2; side++) {
                for (size_t k = 0; k < param->count; k++) {
                    double d = random_normal(9, RANDOM_TEST, (uint32_t)i, 0, 0, k) / sqrt(norm);
                    if (side == 0) expected += d * (double)param->grad[k];
                    param->value[k] += (real)((side ? -2 : 1) * step * d);
                }
                model_pack(&small.model);
                loss[side] = batch_loss(&small.model, &small.acts, small.samples, 0);
            }
            for (size_t k = 0; k < param->count; k++)
                param->value[k] += (real)(step * random_normal(9, RANDOM_TEST, (uint32_t)i, 0, 0, k) / sqrt(norm));
            double slope = (loss[0] - loss[1]) / (2 * step);
            total_slope += slope, total_expected += expected;
            check(fabs(slope - expected) <= 1e-6 * fmax(fabs(expected), whole),
                  "gradient of %s (%s%s): %.12g, differences say %.12g", param->name, KIND_NAMES[kind],
                  dropout > 0 ? ", dropout" : "", expected, slope);
        }
        check(fabs(total_slope - total_expected) <= 1e-6 * fabs(total_expected),
              "gradient of the whole loss: %.12g, differences say %.12g", total_expected, total_slope);
        small_run_end(&small);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Same bytes

static uint64_t fingerprint(const Model *model, int gradients) {
    uint64_t hash = 14695981039346656037u;
    for (int i = 0; i < model->num_params; i++) {
        const Param *param = model->params[i];
        const unsigned char *bytes = (const unsigned char *)(gradients ? param->grad : param->value);
        if (!gradients || param->trained)
            for (size_t k = 0; k < param->count * sizeof(real); k++) hash = (hash ^ bytes[k]) * 1099511628211u;
    }
    return hash;
}

// In inference layers share memory that in training each has of its own: the same bytes come out.
static void test_inference_in(int kind, int half) {
    Model model;
    Activations acts[2];  // without and with training
    Sample samples[SMALL_BATCH];
    small_model(&model, kind, 0.1, half);
    small_batch(samples);
    const size_t rows = (size_t)(model.config.dec_layers * model.config.num_queries);
    for (int t = 0; t < 2; t++) activations_create(&acts[t], &model, 70, 70, t, 1);
    for (int i = 0; i < SMALL_BATCH; i++) {
        for (int t = 0; t < 2; t++) {
            encode_image(&model, &acts[t], &samples[i].image);
            decoder_forward(&model, &acts[t]);
        }
        check(memcmp(acts[0].logits, acts[1].logits, rows * (size_t)num_logits(&model.config) * sizeof(real)) == 0 &&
                  memcmp(acts[0].boxes, acts[1].boxes, rows * 4 * sizeof(real)) == 0,
              "picture %d in inference as in training, %s%s", i, KIND_NAMES[kind], half ? " in bf16" : "");
    }
    for (int t = 0; t < 2; t++) activations_free(&acts[t]);
    free_batch(samples, SMALL_BATCH);
    model_free(&model);
}

static void test_inference(void) {
    for (int kind = 0; kind < KINDS; kind++)
        for (int half = 0; half <= !IS_DOUBLE; half++) test_inference_in(kind, half);
}

// Two steps on a batch with an unreadable picture, one without boxes and one half as large as the one before it: with
// any number of threads, the pictures one after another or side by side, also more of them than there are.
static void test_same_bytes_in(int kind, int half) {
    enum { RUNS = 8, MOST = 8 };
    static const int runs[RUNS][2] = {{1, 1}, {1, 1}, {2, 1}, {3, 1}, {2, 2}, {3, 3}, {4, 4}, {MOST, MOST}};
    uint64_t gradient[RUNS], weights[RUNS];
    Losses losses[RUNS];
    int threads_before = omp_get_max_threads();
    const OptimizerSettings optimizer = {1e-3, 1e-3, 1e-4, 0.1, 0};
    for (int run = 0; run < RUNS; run++) {
        omp_set_num_threads(runs[run][0]);
        Model model;
        Activations acts[MOST];
        Sample samples[SMALL_BATCH + 1], small;
        Error error;
        small_model(&model, kind, 0.1, half);
        activations_create(acts, &model, 70, 70, 1, runs[run][1]);
        small_batch(samples);
        small = samples[3], samples[3] = samples[2], samples[2] = small;
        samples[SMALL_BATCH] = samples[0], samples[0] = samples[1];
        memset(&samples[1], 0, sizeof samples[1]);
        for (int64_t step = 0; step < 2; step++)
            training_step(&model, acts, &SMALL_LOSS, &optimizer, samples, SMALL_BATCH + 1, 42, step, &losses[run],
                          &error);
        gradient[run] = fingerprint(&model, 1), weights[run] = fingerprint(&model, 0);
        free_batch(samples, SMALL_BATCH + 1);
        activations_free(acts);
        model_free(&model);
    }
    omp_set_num_threads(threads_before);
    for (int run = 1; run < RUNS; run++)
        check(gradient[run] == gradient[0] && weights[run] == weights[0] &&
                  memcmp(&losses[run], &losses[0], sizeof losses[0]) == 0,
              "two steps, %s%s, with %d threads and %d pictures in flight give the bytes that 1 thread gives",
              KIND_NAMES[kind], half ? " in bf16" : "", runs[run][0], runs[run][1]);
}

typedef struct {
    Activations first, second;
    int64_t seen[3];
} TwoImages;

static void *second_image(void *memory) {
    TwoImages *two = (TwoImages *)memory;
    for (int i = 0; i < 3; i++) {
        take_turn(&two->second);
        two->seen[i] = __atomic_load_n(&two->first.turn, __ATOMIC_RELAXED);
    }
    return NULL;
}

// A picture takes its n-th turn when the one before it has taken its n + 1st, and there is one for the losses and for
// each layer that is trained.
static void test_turns(void) {
    TwoImages two;
    pthread_t thread;
    memset(&two, 0, sizeof two);
    two.second.before = &two.first;
    set_turn(&two.second, MAX_TURNS);
    pthread_create(&thread, NULL, second_image, &two);
    while (__atomic_load_n(&two.second.turn, __ATOMIC_RELAXED) == MAX_TURNS) sched_yield();
    for (int turn = 1; turn <= 4; turn++) {
        usleep(2000);
        set_turn(&two.first, turn);
    }
    pthread_join(thread, NULL);
    for (int i = 0; i < 3; i++)
        check(two.seen[i] >= i + 2, "turn %d of an image, when the one before has taken %d", i + 1, (int)two.seen[i]);
    for (int kind = 0; kind < KINDS; kind++) {
        SmallRun small;
        int trained = 0;
        small_run_begin(&small, kind, 0, 0, 1);
        set_turn(&two.first, INT64_MAX);
        small.acts.before = &two.first;
        batch_loss(&small.model, &small.acts, small.samples, 1);
        for (int i = 0; i < small.model.num_layers; i++) trained += small.model.layers[i]->weight->trained;
        check(small.acts.turn == SMALL_BATCH * (1 + trained), "%s: %d turns, %d layers are trained", KIND_NAMES[kind],
              (int)small.acts.turn / SMALL_BATCH, trained);
        small_run_end(&small);
    }
}

static void test_same_bytes(void) {
    for (int half = 0; half <= !IS_DOUBLE; half++) {
        test_same_bytes_in(BOTTLENECK, half);
        test_same_bytes_in(ANCHOR, half);
    }
    test_turns();
}

// Predictions for one image: the last num_queries rows of acts->logits and acts->boxes.
static void predict_image(const Model *model, Activations *acts, const Image *image) {
    encode_image(model, acts, image);
    decoder_forward(model, acts);
}

// What one image gives may not depend on what was computed before it.
static void test_company_in(int kind, int half) {
    SmallRun small;
    small_run_begin(&small, kind, 0, half, 0);
    size_t count = (size_t)(small.model.config.dec_layers * small.model.config.num_queries) * 4;
    real *alone = (real *)allocate(count * sizeof(real));
    predict_image(&small.model, &small.acts, &small.samples[0].image);
    memcpy(alone, small.acts.boxes, count * sizeof(real));
    predict_image(&small.model, &small.acts, &small.samples[1].image);
    small.acts.dropout.p = 0.5;  // as a training step may leave it
    predict_image(&small.model, &small.acts, &small.samples[0].image);
    check(memcmp(alone, small.acts.boxes, count * sizeof(real)) == 0,
          "an image's boxes are the same after another image (%s%s)", KIND_NAMES[kind], half ? ", bf16" : "");
    check(activations_bytes(&small.model, 70, 70, 0, 1) == small.acts.arena.capacity, "the plan is what is allocated");
    free(alone);
    small_run_end(&small);
}

static void test_company(void) {
    for (int half = 0; half <= !IS_DOUBLE; half++) {
        test_company_in(BASIC, half);
        test_company_in(ANCHOR, half);
    }
}

// Tensors of a few numbers, of several chunks and of one that is not trained, against a plain sum.
// What of a model is frozen, and how many layers then still have a gradient of their input computed: in the kinds of
// small networks, with three decoder layers; -1: there is no such part.
static const struct {
    const char *freeze;
    int input_gradients[KINDS];
} frozen_cases[] = {
    {"backbone", {46, 46, 47}},
    {"backbone,input_projection,encoder", {28, 28, 29}},
    {"model", {2, 2, 2}},
    {"model,bbox_predictor", {0, 0, 0}},
    {"decoder", {58, 62, 58}},
    {"backbone,input_projection,encoder,query_position_embeddings,model.decoder.layers.0,decoder.layers.1", {9, 9, -1}},
    {"backbone,input_projection,encoder,query_content_embeddings,decoder.layers,decoder.query_position_head",
     {-1, -1, 4}},
    {"backbone,encoder.layers.0,bbox_predictor,query_position_embeddings", {43, 43, 47}},
    {"backbone.conv_encoder.model.encoder.stages.1,decoder.layernorm", {58, 62, 59}},
    {"backbone.conv_encoder.model.embedder,backbone.conv_encoder.model.encoder.stages.0,decoder.layers.2",
     {53, 56, 54}},
    {"backbone.conv_encoder.model.encoder.stages.1.layers.0.layer.0,encoder.layers.1.fc1", {58, 62, 59}},
};

// With parts frozen, the gradients of all others are the same to the last bit; a step leaves the frozen as they are.
static void test_frozen_in(int kind, int half, const char *freeze, int input_gradients) {
    ModelConfig config = small_config(kind);
    Model models[2];
    Activations acts;
    Sample samples[SMALL_BATCH];
    Losses losses;
    Error error;
    const OptimizerSettings optimizer = {1e-2, 1e-2, 1e-4, 0.1, 0};
    int wrong = 0, computed = 0;
    config.dec_layers = 3, config.dropout = 0.2, config.half = half;
    small_batch(samples);
    for (int frozen = 0; frozen < 2; frozen++) {
        config.freeze = frozen ? freeze : NULL;
        small_model_of(&models[frozen], &config, SMALL_BATCH);
        activations_create(&acts, &models[frozen], 70, 70, 1, 1);
        batch_loss(&models[frozen], &acts, samples, 1);
        if (!frozen) activations_free(&acts);
    }
    for (int i = 0; i < models[1].num_params; i++) {
        const Param *plain = models[0].params[i], *param = models[1].params[i];
        wrong += param->trained != (plain->trained && !is_frozen(&config, param->name));
        if (param->trained) wrong += memcmp(param->grad, plain->grad, param->count * sizeof(real)) != 0;
    }
    check(wrong == 0, "%s, --freeze %s: %d gradients are others", KIND_NAMES[kind], freeze, wrong);
    for (int i = 0; i < models[1].num_layers; i++) computed += models[1].layers[i]->needs_input_gradient;
    check(computed == input_gradients, "%s, --freeze %s: %d layers have a gradient of their input, not %d",
          KIND_NAMES[kind], freeze, computed, input_gradients);
    training_step(&models[1], &acts, &SMALL_LOSS, &optimizer, samples, SMALL_BATCH, 11, 5, &losses, &error);
    wrong = 0;
    for (int i = 0; i < models[1].num_params; i++) {
        const Param *before = models[0].params[i], *param = models[1].params[i];
        wrong += param->trained == !memcmp(param->value, before->value, param->count * sizeof(real));
    }
    check(wrong == 0, "%s, --freeze %s: %d tensors change that should not, or the other way round", KIND_NAMES[kind],
          freeze, wrong);
    free_batch(samples, SMALL_BATCH);
    activations_free(&acts);
    for (int m = 0; m < 2; m++) model_free(&models[m]);
}

static void test_frozen(void) {
    check(is_in_module("model.encoder.layers.1.fc1.bias", "encoder.layers.1", 16) &&
              is_in_module("model.encoder.layers.1.fc1.bias", "model,encoder", 5) &&
              !is_in_module("model.encoder.layers.10.fc1.bias", "encoder.layers.1", 16) &&
              !is_in_module("model.encoder.layers.1.fc1.bias", "layers.1", 8),
          "what is in a module");
    for (size_t i = 0; i < sizeof frozen_cases / sizeof frozen_cases[0]; i++)
        for (int kind = 0; kind < KINDS; kind++)
            for (int half = 0; half < (IS_DOUBLE ? 1 : 2); half++)
                if (frozen_cases[i].input_gradients[kind] >= 0)
                    test_frozen_in(kind, half, frozen_cases[i].freeze, frozen_cases[i].input_gradients[kind]);
}

static void test_gradient_norm(void) {
    const size_t counts[3] = {21, 40001, 300};
    Param params[3], *table[3];
    Model model;
    double sum = 0;
    memset(params, 0, sizeof params), memset(&model, 0, sizeof model);
    for (int i = 0; i < 3; i++) {
        table[i] = &params[i];
        params[i].count = counts[i], params[i].trained = i < 2;
        params[i].grad = (real *)allocate(counts[i] * sizeof(real));
        for (size_t k = 0; k < counts[i]; k++) {
            params[i].grad[k] = (real)test_uniform(8, (uint64_t)i << 20 | k);
            if (i < 2) sum += (double)params[i].grad[k] * (double)params[i].grad[k];
        }
    }
    model.params = table, model.num_params = 3;
    const double norm = gradient_norm(&model);
    check(fabs(norm - sqrt(sum)) < 1e-12 * norm, "norm of the gradient: %.15g instead of %.15g", norm, sqrt(sum));
    for (int i = 0; i < 3; i++) free(params[i].grad);
}

// The training step's gradients are those of the batch as the other tests compute it, which the truth is compared with.
static void test_training_step(void) {
    SmallRun small;
    Losses losses;
    Error error;
    const OptimizerSettings optimizer = {1e-3, 1e-3, 1e-4, 0.1, 0};
    small_run_begin(&small, BOTTLENECK, 0.1, 0, 1);
    double loss = batch_loss(&small.model, &small.acts, small.samples, 1);
    uint64_t gradient = fingerprint(&small.model, 1), weights = fingerprint(&small.model, 0);
    int status = training_step(&small.model, &small.acts, &SMALL_LOSS, &optimizer, small.samples, SMALL_BATCH, 11, 5,
                               &losses, &error);
    check(status == 0 && losses.loss == loss && fingerprint(&small.model, 1) == gradient,
          "a training step has the batch's loss and gradient: %.9g, %.9g", losses.loss, loss);
    check(losses.grad_norm == gradient_norm(&small.model), "a training step reports and clips by the gradient's norm");
    check(fingerprint(&small.model, 0) != weights, "a training step changes the weights");
    small_run_end(&small);
    test_gradient_norm();
}

// A model whose steps have one picture packs its weights for the way back where those for the way forward lie. Three
// steps and an inference behind them give the bytes of a model that has both; the frozen encoder has weights that only
// the way back packs.
static void test_one_picture_in(int kind, int half) {
    const OptimizerSettings optimizer = {1e-3, 1e-3, 1e-4, 0.1, 0};
    ModelConfig config = small_config(kind);
    Model models[2];
    Activations acts[2];
    Sample samples[SMALL_BATCH];
    Losses losses;
    Error error;
    config.dropout = 0.1, config.half = half, config.freeze = "encoder.layers";
    small_batch(samples);
    for (int i = 0; i < 2; i++) {
        small_model_of(&models[i], &config, i + 1);
        activations_create(&acts[i], &models[i], 70, 70, 1, 1);
        for (int step = 0; step < 3; step++) {
            const int status = training_step(&models[i], &acts[i], &SMALL_LOSS, &optimizer, &samples[step], 1, 42, step,
                                             &losses, &error);
            check(status == 0, "a step of one picture: %s", status ? error.text : "");
        }
        predict_image(&models[i], &acts[i], &samples[3].image);
    }
    const size_t boxes = (size_t)(config.dec_layers * config.num_queries * 4) * sizeof(real);
    check(fingerprint(&models[0], 1) == fingerprint(&models[1], 1) &&
              fingerprint(&models[0], 0) == fingerprint(&models[1], 0) &&
              memcmp(acts[0].boxes, acts[1].boxes, boxes) == 0,
          "steps of one picture, %s%s, in one packed copy of the weights and in two", KIND_NAMES[kind],
          half ? " in bf16" : "");
    check(models[0].packed.used < models[1].packed.used, "one packed copy: %zu bytes, two: %zu", models[0].packed.used,
          models[1].packed.used);
    Sample unreadable;
    memset(&unreadable, 0, sizeof unreadable);
    training_step(&models[0], &acts[0], &SMALL_LOSS, &optimizer, &unreadable, 1, 42, 3, &losses, &error);
    check(losses.grad_norm == 0, "a step without a picture has a gradient of %g", losses.grad_norm);
    free_batch(samples, SMALL_BATCH);
    for (int i = 0; i < 2; i++) activations_free(&acts[i]), model_free(&models[i]);
}

static void test_one_picture(void) {
    for (int kind = 0; kind < KINDS; kind++)
        for (int half = 0; half <= !IS_DOUBLE; half++) test_one_picture_in(kind, half);
}

// Adds each channel's sum and sum of squares of what a layer makes of x; returns the number of pixels.
static int add_moments(double *sums, const Layer *layer, const real *x, int height, int width) {
    int pixels = conv_size(height, layer->shape) * conv_size(width, layer->shape);
    int C = layer->shape.out_channels;
    real *y = (real *)allocate((size_t)(pixels * C) * sizeof(real));
    layer_forward(y, x, height, width, layer, 0, NULL);
    for (int i = 0; i < pixels * C; i++) sums[i % C] += y[i], sums[C + i % C] += (double)y[i] * y[i];
    free(y);
    return pixels;
}

// Norms' scale and bias as after some training, of channel n.
static double trained_scale(int n) { return 0.5 + n % 5 / 4.0; }
static double trained_bias(int n) { return n % 3 / 4.0 - 0.25; }

static void change_norms(Model *model) {
    for (int i = 0; i < model->num_layers; i++) {
        for (int n = 0; model->layers[i]->norm_weight && n < model->layers[i]->shape.out_channels; n++) {
            model->layers[i]->norm_weight->value[n] = (real)trained_scale(n);
            model->layers[i]->norm_bias->value[n] = (real)trained_bias(n);
        }
    }
}

// The largest difference between two models' statistics, relative to what they are.
static double statistics_distance(const Model *a, const Model *b) {
    double worst = 0;
    for (int i = 0; i < a->num_params; i++) {
        const Param *p = a->params[i], *q = b->params[i];
        for (size_t k = 0; p->group == GROUP_STATISTICS && k < p->count; k++)
            worst = fmax(worst, fabs((double)p->value[k] - (double)q->value[k]) / (fabs((double)q->value[k]) + 0.1));
    }
    return worst;
}

// --norm_init track: filters keep mean 0 and their length, and the statistics follow the pictures every so many steps,
// half of the way; where the pictures stay, they arrive at what a calibration finds.
static void test_track(void) {
    SmallRun small;
    Model reference;
    Losses losses;
    Error error;
    const OptimizerSettings optimizer = {1e-3, 1e-3, 1e-4, 0.1, 0};
    small_run_begin(&small, BASIC, 0, 0, 1);
    Model *model = &small.model;
    model_create(&reference, &model->config, SMALL_BATCH, 1, 1, &error);
    model->track_norms = 1;
    const size_t stem = (size_t)model->stem.shape.out_channels;
    for (int64_t step = TRACK_STEPS - 1; step < TRACK_STEPS + 2; step++) {
        for (int i = 0; i < model->num_params; i++)
            memcpy(reference.params[i]->value, model->params[i]->value, model->params[i]->count * sizeof(real));
        int status = training_step(model, &small.acts, &SMALL_LOSS, &optimizer, small.samples, SMALL_BATCH, 11, step,
                                   &losses, &error);
        check(status == 0, "a step that tracks norms: %s", status ? error.text : "");
        const int moves = step == TRACK_STEPS;
        check((statistics_distance(&reference, model) > 0) == moves, "step %d %s the statistics", (int)step,
              moves ? "moves" : "leaves");
        if (!moves) continue;
        double worst = 0;
        Model all;  // of the stem, which no other layer's statistics reach: half of the way
        model_create(&all, &model->config, SMALL_BATCH, 1, 1, &error);
        for (int i = 0; i < model->num_params; i++)
            memcpy(all.params[i]->value, reference.params[i]->value, model->params[i]->count * sizeof(real));
        calibrate_norms(&all, small.samples, SMALL_BATCH, 1);
        for (size_t n = 0; n < stem; n++) {
            double half =
                ((double)reference.stem.norm_variance->value[n] + (double)all.stem.norm_variance->value[n]) / 2;
            worst = fmax(worst, fabs((double)model->stem.norm_variance->value[n] - half) / half);
        }
        check(worst < 1e-6, "a step moves the stem's variance half of the way, but for %g", worst);
        model_free(&all);
    }
    double mean = 0, length = 0;
    for (int i = 0; i < model->num_layers; i++) {
        const Layer *layer = model->layers[i];
        if (!layer->norm_weight) continue;
        const size_t row = layer->weight->count / (size_t)layer->shape.out_channels;
        for (int n = 0; n < layer->shape.out_channels; n++) {
            double sum = 0, squares = 0;
            for (size_t k = 0; k < row; k++) {
                const double w = (double)layer->weight->value[(size_t)n * row + k];
                sum += w, squares += w * w;
            }
            mean = fmax(mean, fabs(sum));
            length = fmax(length, fabs(squares * layer->shape.out_channels / layer->shape.in_channels - 2));
        }
    }
    check(mean < 1e-5 && length < 1e-5, "a step leaves filters with mean 0 and their length, but for %g and %g", mean,
          length);
    change_norms(model);
    for (int i = 0; i < model->num_params; i++)
        memcpy(reference.params[i]->value, model->params[i]->value, model->params[i]->count * sizeof(real));
    calibrate_norms(&reference, small.samples, SMALL_BATCH, 1);
    for (int i = 0; i < 80; i++) calibrate_norms(model, small.samples, SMALL_BATCH, 0.5);
    check(statistics_distance(model, &reference) < 1e-4, "statistics that follow arrive, but for %g",
          statistics_distance(model, &reference));
    model_free(&reference);
    small_run_end(&small);
}

// Calibrated norms pass on their bias as mean and the square of their scale as variance, each channel of each layer
// over the pictures they were calibrated on.
static void test_calibrate(void) {
    for (int bottleneck = 0; bottleneck < 2; bottleneck++) {
        Model model;
        Activations acts;
        Sample samples[SMALL_BATCH];
        Error error;
        ModelConfig config = small_config(bottleneck);
        check(model_create(&model, &config, SMALL_BATCH, 1, 1, &error) == 0, "a small model");
        model_initialise(&model, 3);
        activations_create(&acts, &model, 70, 70, 1, 1);
        small_batch(samples);
        change_norms(&model);
        calibrate_norms(&model, samples, SMALL_BATCH, 1);
        model_pack(&model);
        for (int b = -1; b < model.num_blocks; b++) {  // -1: the stem
            int convs = b < 0 ? 1 : model.blocks[b].num_convs,
                layers = convs + (b >= 0 && model.blocks[b].has_shortcut);
            for (int j = 0; j < layers; j++) {
                const Layer *layer = b < 0       ? &model.stem
                                     : j < convs ? &model.blocks[b].conv[j]
                                                 : &model.blocks[b].shortcut;
                double sums[2 * 64] = {0}, worst = 0, pixels = 0;
                int C = layer->shape.out_channels;
                for (int i = 0; i < SMALL_BATCH; i++) {
                    predict_image(&model, &acts, &samples[i].image);
                    int height = acts.height, width = acts.width;
                    const real *x = (const real *)acts.pixels;
                    if (b >= 0) {
                        const BlockActivations *block = &acts.blocks[b];
                        int strided = j == convs - 1;  // what carries the block's stride comes before it
                        height = strided ? block->out_height : block->height;
                        width = strided ? block->out_width : block->width;
                        x = (const real *)(j == 0 || j == convs ? block->in : block->inner[j - 1]);
                    }
                    pixels += add_moments(sums, layer, x, height, width);
                }
                for (int n = 0; n < C; n++) {
                    double mean = sums[n] / pixels, variance = sums[C + n] / pixels - mean * mean;
                    double scale = trained_scale(n);
                    worst = fmax(worst, fmax(fabs(mean - trained_bias(n)), fabs(variance - scale * scale)));
                }
                check(worst < 3e-3, "calibrated %s: mean and variance of a channel are off by %g", layer->weight->name,
                      worst);
            }
        }
        free_batch(samples, SMALL_BATCH);
        activations_free(&acts);
        model_free(&model);
    }
}

// A weight that is not finite stops the step, is named, and changes nothing.
static void test_nonfinite_weight(void) {
    SmallRun small;
    Losses losses;
    Error error;
    const OptimizerSettings optimizer = {1e-3, 1e-3, 1e-4, 0.1, 0};
    small_run_begin(&small, BASIC, 0, 0, 1);
    small.model.input_projection.weight->value[3] = (real)NAN;
    model_pack(&small.model);
    uint64_t before = fingerprint(&small.model, 0);
    int status = training_step(&small.model, &small.acts, &SMALL_LOSS, &optimizer, small.samples, SMALL_BATCH, 42, 0,
                               &losses, &error);
    check(status == -1 && strstr(error.text, "model.input_projection.weight") != NULL, "a NaN in a weight is named: %s",
          status ? error.text : "no error");
    check(fingerprint(&small.model, 0) == before, "a step that fails leaves the weights alone");
    small_run_end(&small);
}

// So does a picture whose loss is not finite, and the step is left in the same state whatever runs beside it.
static void test_nonfinite_image(void) {
    const OptimizerSettings optimizer = {1e-3, 1e-3, 1e-4, 0.1, 0};
    const int threads_before = omp_get_max_threads();
    uint64_t gradient = 0;
    for (int in_flight = 1; in_flight <= SMALL_BATCH + 1; in_flight++) {
        omp_set_num_threads(in_flight);
        Model model;
        Activations acts[SMALL_BATCH + 1];
        Sample samples[SMALL_BATCH];
        Losses losses;
        Error error;
        small_model(&model, BASIC, 0, 0);
        activations_create(acts, &model, 70, 70, 1, in_flight);
        small_batch(samples);
        samples[1].boxes[2] = NAN;
        int status = training_step(&model, acts, &SMALL_LOSS, &optimizer, samples, SMALL_BATCH, 42, 0, &losses, &error);
        check(status == -1 && strstr(error.text, "image 1 of") && strstr(error.text, "\"gradient of the boxes\""),
              "a NaN in a picture's box, %d in flight: %s", in_flight, status ? error.text : "no error");
        if (in_flight == 1) gradient = fingerprint(&model, 1);
        check(fingerprint(&model, 1) == gradient, "%d in flight: the gradients are those of the pictures before",
              in_flight);
        free_batch(samples, SMALL_BATCH);
        activations_free(acts);
        model_free(&model);
    }
    omp_set_num_threads(threads_before);
}

// So does a gradient that overflows behind losses that are finite: the box head is a product of numbers that are large,
// tiny and large, and on the way back the large ones meet.
static void test_nonfinite_gradient(void) {
    const real huge = sizeof(real) == 4 ? (real)1e38 : (real)1e306, large = (real)1e6, tiny = 1 / huge / large;
    SmallRun small;
    Losses losses;
    Error error;
    const OptimizerSettings optimizer = {1e-3, 1e-3, 1e-4, 0.1, 0};
    small_run_begin(&small, BASIC, 0, 0, 1);
    Param *norm = small.model.decoder_norm.weight, *first = small.model.box_head[0].weight,
          *bias = small.model.box_head[0].bias, *second = small.model.box_head[1].weight;
    for (size_t k = 0; k < norm->count; k++) norm->value[k] = large;
    for (size_t k = 0; k < first->count; k++) first->value[k] = first->value[k] < 0 ? -tiny : tiny;
    for (size_t k = 0; k < bias->count; k++) bias->value[k] = 0;
    for (size_t k = 0; k < second->count; k++) second->value[k] = second->value[k] < 0 ? -huge : huge;
    model_pack(&small.model);
    uint64_t before = fingerprint(&small.model, 0);
    int status = training_step(&small.model, &small.acts, &SMALL_LOSS, &optimizer, small.samples, SMALL_BATCH, 42, 0,
                               &losses, &error);
    check(isfinite(losses.loss) && status == -1 &&
              strstr(error.text,
                     "step 1: the gradient is not finite; the first such tensor is \"bbox_predictor.layers.0"),
          "a gradient that overflows, with a loss of %g: %s", losses.loss, status ? error.text : "no error");
    check(fingerprint(&small.model, 0) == before, "a step whose gradient fails leaves the weights alone");
    small_run_end(&small);
}

static void test_nonfinite(void) {
    test_nonfinite_weight();
    test_nonfinite_image();
    test_nonfinite_gradient();
}

// What the memory plan is held against.
static void test_memory_free(void) {
    char path[] = "/tmp/detr-numbers-XXXXXX";
    FILE *file = fdopen(mkstemp(path), "w");
    fputs("12 x\nfree 7\nfree: 2.5 kB\nfreed: 3\n", file);
    fclose(file);
    check(file_number(path, "") == 12 && file_number(path, "free:") == 2.5 && file_number(path, "none") == -1 &&
              file_number("/absent", "") == -1,
          "numbers of a file");
    unlink(path);
    const double all = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGE_SIZE), available = memory_free();
    check(available > 0 && available < all, "%g bytes of %g are free", available, all);
}

// What a plan that has no room proposes is the largest picture that has; what a GPU resizes is as large as its file.
static void test_plan(void) {
    Settings settings = settings_for("test_detr", "train", TRAIN);
    flag_set(&settings, "short_side", "400", FROM_USER), flag_set(&settings, "max_size", "800", FROM_USER);
    check(scaled(800, 207, 400) == 414, "a length that a float would round down: %d", scaled(800, 207, 400));
    Training run;
    memset(&run, 0, sizeof run);
    small_model(&run.network.model, BOTTLENECK, 0, 0);
    run.in_flight = 1, run.loader.batch_size = 50, run.loader.workers = run.loader.prefetch = 1;
    for (int i = 0; i < 4; i++) {
        run.loader.defer_side = i / 2 * 600, run.network.model.track_norms = i % 2;
        Error error = {""};
        const double room = 0.3 * training_needs(&run, 400, 600) + (i / 2 ? 0.7 * 100 * 3 * 600 * 600 : 0);
        int side = 0, longer = 0, read = 0;
        const int fits = suggest_side(&error, &settings, 400, 600, room, training_needs, &run);
        sscanf(error.text, "--short_side %d --max_size %d would fit%n", &side, &longer, &read);
        const double at = training_needs(&run, side + 1, 3 * side / 2 + 1),
                     next = training_needs(&run, side + 2, 3 * (side + 1) / 2 + 1);
        check(fits && read > 0 && longer == 2 * side && at <= room && next > room,
              "proposed for %g bytes: \"%s\", which takes %g, and the next size %g", room, error.text, at, next);
        check(!suggest_side(&error, &settings, 400, 600, 0, training_needs, &run), "nothing fits into nothing");
        const double read_ahead = 2 * 50 * 3.0 * (run.loader.defer_side ? 600 * 600 : 100 * 150);
        check(training_needs(&run, 100, 150) == read_ahead + (i % 2) * calibration_bytes(&run.network.model, 100, 150) +
                                                    (double)activations_bytes(&run.network.model, 100, 150, 1, 1),
              "100 x 150: %g bytes", training_needs(&run, 100, 150));
    }
    model_free(&run.network.model);
}

// Networks that cannot be computed are refused by a line that says which number is wrong.
static void test_refused(void) {
    Model model;
    Error error;
    for (int i = 0; i < 9; i++) {
        ModelConfig config = small_config(BOTTLENECK);
        config.half = i >= 4 && !IS_DOUBLE;
        const struct {
            int *number, value;
            const char *says;
        } wrong[] = {{&config.num_stages, 0, "0 stages"},
                     {&config.dec_layers, MAX_DEC_LAYERS + 1, "dec_layers is"},
                     {&config.nheads, 5, "multiple of nheads 5"},
                     {&config.depths[2], 0, "stage 3 of the backbone has depth 0"},
                     {&config.stem_width, 13, "the stem has 13"},
                     {&config.dim_feedforward, 41, "dim_feedforward is 41"},
                     {&config.widths[1], 36, "stage 2 of the backbone has width 36"},
                     {&config.hidden_dim, 33, "33 is odd"},
                     {&config.widths[0], 0, "stage 1 of the backbone has"}};
        if (IS_DOUBLE && i >= 4 && i <= 6) continue;  // of bf16
        *wrong[i].number = wrong[i].value;
        if (config.hidden_dim == 33) config.nheads = 3;
        error.text[0] = 0;
        check(model_create(&model, &config, 1, 1, 1, &error) != 0 && strstr(error.text, wrong[i].says),
              "refused: %s: \"%s\"", wrong[i].says, error.text);
    }
    ModelConfig config = small_config(BOTTLENECK);
    config.widths[0] = 3;
    check(model_create(&model, &config, 1, 1, 1, &error) != 0 && strstr(error.text, "at least 4"), "refused: narrow");
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks of the Matmul room: each shape, forward and backward, against plain loops in double.

typedef struct {
    int height, width;
    ConvShape shape;  // in_channels, out_channels, kernel, stride, padding, dilation
} MatmulCase;

static const MatmulCase matmul_cases[] = {
    // linear layers: one row, tails of rows and columns, pieces of rows, columns and pixels in backward weight
    {1, 1, {1, 1, 1, 1, 0, 1}},
    {1, 1, {256, 4, 1, 1, 0, 1}},
    {5, 1, {7, 92, 1, 1, 0, 1}},
    {6, 1, {64, 64, 1, 1, 0, 1}},
    {100, 1, {36, 24, 1, 1, 0, 1}},
    {61, 1, {32, 130, 1, 1, 0, 1}},
    {67, 1, {600, 70, 1, 1, 0, 1}},
    {67, 1, {70, 600, 1, 1, 0, 1}},
    {131, 1, {128, 128, 1, 1, 0, 1}},
    {1500, 1, {33, 65, 1, 1, 0, 1}},
    {1001, 1, {100, 26, 1, 1, 0, 1}},
    // 1x1 convolutions with a stride: three of four pixels get no gradient
    {9, 12, {64, 64, 1, 2, 0, 1}},
    {8, 7, {5, 24, 1, 2, 0, 1}},
    {10, 11, {6, 9, 1, 3, 0, 1}},
    // 3x3: image sides even, odd, smaller than the kernel; strides; dilations (DC5)
    {17, 14, {64, 64, 3, 1, 1, 1}},
    {16, 13, {24, 36, 3, 1, 1, 1}},
    {1, 1, {16, 16, 3, 1, 1, 1}},
    {1, 40, {10, 20, 3, 1, 1, 1}},
    {15, 12, {32, 64, 3, 2, 1, 1}},
    {12, 15, {64, 40, 3, 2, 1, 1}},
    {2, 2, {8, 8, 3, 2, 1, 1}},
    {13, 10, {48, 64, 3, 1, 2, 2}},
    {11, 16, {20, 12, 3, 2, 2, 2}},
    {9, 9, {5, 7, 3, 3, 1, 1}},
    {7, 8, {18, 5, 3, 1, 0, 1}},
    {30, 33, {24, 36, 3, 1, 1, 1}},
    // few inputs, whole kernel rows at once; the stem
    {19, 22, {3, 64, 7, 2, 3, 1}},
    {37, 41, {3, 24, 7, 2, 3, 1}},
    {2, 3, {3, 16, 7, 2, 3, 1}},
    {7, 12, {3, 10, 5, 1, 0, 1}},
    {12, 9, {5, 64, 3, 1, 1, 1}},
    {9, 14, {17, 11, 3, 2, 1, 1}},
    {10, 10, {3, 8, 7, 1, 6, 2}},
    {9, 11, {4, 6, 5, 1, 2, 1}},
    // what Winograd does, and with it odd and even sides, tails of vectors, of panels and of tiles, several blocks
    {2, 1, {3, 67, 3, 1, 1, 1}},
    {3, 4, {70, 140, 3, 1, 1, 1}},
    {41, 38, {40, 10, 3, 1, 1, 1}},
    {23, 25, {130, 33, 3, 1, 1, 1}},
    {10, 9, {272, 64, 3, 1, 1, 1}},
    {9, 24, {66, 272, 3, 1, 1, 1}},
    {33, 33, {8, 540, 3, 1, 1, 1}},
    // AMX: several groups of tiles, with more threads than groups are needed; lines that no copy has room for; and
    // columns that do not fill a tile, after all rows
    {35, 61, {64, 32, 3, 1, 1, 1}},
    {1, 180, {512, 70, 3, 1, 1, 1}},
    {1, 230, {512, 32, 3, 1, 1, 1}},
};

// Values in (-1, 1), with the case and the tensor's number as the seed.
static real *matmul_random(long count, int number, int tensor) {
    real *values = (real *)allocate(sizeof(real) * count);
    for (long i = 0; i < count; i++) values[i] = (real)(2 * random_uniform(number, RANDOM_TEST, tensor, 0, 0, i) - 1);
    return values;
}

// The norm of the difference over the norm of the truth.
static double matmul_error(const real *values, const double *truth, long count) {
    double difference = 0, norm = 0;
    for (long i = 0; i < count; i++) {
        difference += (values[i] - truth[i]) * (values[i] - truth[i]);
        norm += truth[i] * truth[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

static void matmul_epilogue(double *truth, long rows, int columns, Epilogue e, const real *add) {
    for (long i = 0; i < rows * columns; i++) {
        if (e.bias) truth[i] += e.bias[i % columns];
        if (e.add) truth[i] += add[i];
        if (e.relu && truth[i] < 0) truth[i] = 0;
        if (e.mask && load_number(e.mask, (size_t)i, 0) <= 0) truth[i] = 0;
    }
}

// winograd: with the functions of the Winograd room. Its sums are shorter and of larger numbers; with random values the
// two make up for each other (relative rounding error: sqrt(9 n / 6) units for n channels by the plain sum, sqrt(n / 2)
// and about 3 for the transforms by Winograd), so both are held to the same tolerance.
static void test_matmul_case(const MatmulCase *c, int number, int winograd) {
    const ConvShape s = c->shape;
    const int out_height = conv_size(c->height, s), out_width = conv_size(c->width, s);
    const long pixels = (long)c->height * c->width, out_pixels = (long)out_height * out_width;
    const long x_size = pixels * s.in_channels, y_size = out_pixels * s.out_channels;
    const long patch = (long)s.kernel * s.kernel * s.in_channels, w_size = patch * s.out_channels;
    const double tolerance = sizeof(real) == 8 ? 1e-13 : 2e-6;
    const char *method = winograd ? "winograd" : "matmul";
    const size_t size = winograd ? winograd_packed_size(s.in_channels, s.out_channels) : packed_size(s, 0);
    const size_t backward_size =
        winograd ? winograd_packed_size(s.out_channels, s.in_channels) : packed_backward_size(s, 0);
    real *x = matmul_random(x_size, number, 0), *w = matmul_random(w_size, number, 1);
    real *dy = matmul_random(y_size, number, 2), *scale = matmul_random(s.out_channels, number, 3);
    real *bias = matmul_random(s.out_channels, number, 4), *bias_in = matmul_random(s.in_channels, number, 5);
    real *add = matmul_random(y_size, number, 6), *add_in = matmul_random(x_size, number, 7);
    real *mask = matmul_random(y_size, number, 8), *mask_in = matmul_random(x_size, number, 9);
    real *dw_start = matmul_random(w_size + s.out_channels, number, 10);

    // Which parts of the epilogue are in use changes from case to case.
    Epilogue forward, backward;
    forward.half = backward.half = 0;
    forward.bias = number % 2 ? NULL : bias, forward.add = number % 3 == 2 ? NULL : add;
    forward.relu = number % 4 < 2, forward.mask = number % 5 == 4 ? mask : NULL;
    backward.bias = number % 5 == 3 ? bias_in : NULL, backward.add = number % 3 == 1 ? NULL : add_in;
    backward.relu = number % 7 == 6, backward.mask = number % 4 == 3 ? NULL : mask_in;
    if (number % 6 == 5) free(scale), scale = NULL;

    // The truth: every product once.
    double *y_truth = (double *)allocate(sizeof(double) * y_size),
           *dx_truth = (double *)allocate(sizeof(double) * x_size);
    double *dw_truth = (double *)allocate(sizeof(double) * (w_size + s.out_channels));
    const int adds = number % 3 > 0;
    for (long i = 0; i < w_size + s.out_channels; i++) {
        if (!adds) dw_start[i] = (real)NAN;
        dw_truth[i] = adds ? dw_start[i] : 0;
    }
    for (long at = 0; at < out_pixels * s.kernel * s.kernel; at++) {
        const int tap = (int)(at % (s.kernel * s.kernel));
        const long pixel = at / (s.kernel * s.kernel);
        const long row = pixel / out_width * s.stride - s.padding + tap / s.kernel * s.dilation;
        const long column = pixel % out_width * s.stride - s.padding + tap % s.kernel * s.dilation;
        for (int n = 0; n < s.out_channels && tap == 0; n++) dw_truth[w_size + n] += dy[pixel * s.out_channels + n];
        if (row < 0 || row >= c->height || column < 0 || column >= c->width) continue;
        const long x_at = (row * c->width + column) * s.in_channels;
        for (int n = 0; n < s.out_channels; n++) {
            const long w_at = (n * s.kernel * s.kernel + tap) * (long)s.in_channels, y_at = pixel * s.out_channels + n;
            for (int k = 0; k < s.in_channels; k++) {
                // packing rounds weight times scale to a real
                const double weight = scale ? (real)(w[w_at + k] * scale[n]) : w[w_at + k];
                y_truth[y_at] += x[x_at + k] * weight;
                dx_truth[x_at + k] += dy[y_at] * weight;
                dw_truth[w_at + k] += (double)dy[y_at] * x[x_at + k];
            }
        }
    }
    matmul_epilogue(y_truth, out_pixels, s.out_channels, forward, add);
    matmul_epilogue(dx_truth, pixels, s.in_channels, backward, add_in);

    // Ours, with 1, 2 and 3 threads: right with one, and the same bits with more. The results stand in one array, each
    // followed by a guard that must stay as it is.
    const long guard = 8, all = y_size + x_size + w_size + s.out_channels + 4 * guard;
    const int threads_before = omp_get_max_threads();
    real *results[3];
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        real *result = results[threads - 1] = (real *)allocate(sizeof(real) * all);
        for (long i = 0; i < all; i++) result[i] = 7;
        real *y = result, *dx = y + y_size + guard, *dw = dx + x_size + guard, *dbias = dw + w_size + guard;
        const size_t room = winograd
                                ? larger(winograd_workspace(s, threads), winograd_backward_weight_workspace(s, threads))
                                : conv_backward_weight_workspace(s, threads);
        real *packed = (real *)allocate(sizeof(real) * size);
        real *packed_backward = (real *)allocate(sizeof(real) * backward_size);
        real *workspace = (real *)allocate(sizeof(real) * (room + 1));
        for (size_t i = 0; i < size; i++) packed[i] = NAN;  // all of it must be written
        for (size_t i = 0; i < backward_size; i++) packed_backward[i] = NAN;
        for (size_t i = 0; i < room; i++) workspace[i] = NAN;
        workspace[room] = 7;
        const int apart = number % 2;  // one way after the other
        for (int way = 0; way <= apart; way++) {
            real *forward_way = way == 0 ? packed : NULL, *backward_way = way == apart ? packed_backward : NULL;
            if (winograd)
                winograd_pack(forward_way, backward_way, w, scale, s);
            else
                pack_weights(forward_way, backward_way, w, scale, s, 0);
        }
        if (number % 3 == 0) memcpy(y, add, sizeof(real) * y_size), forward.add = y;  // add may be the result
        if (number % 3 == 0) memcpy(dx, add_in, sizeof(real) * x_size), backward.add = dx;
        if (winograd) {
            winograd_forward(y, x, c->height, c->width, packed, forward, s, workspace);
            winograd_backward_data(dx, dy, c->height, c->width, packed_backward, backward, s, workspace);
        } else {
            conv_forward(y, x, c->height, c->width, packed, forward, s, 0);
            conv_backward_data(dx, dy, c->height, c->width, packed_backward, backward, s, 0);
        }
        memcpy(dw, dw_start, sizeof(real) * w_size);
        memcpy(dbias, dw_start + w_size, sizeof(real) * s.out_channels);
        real *dbias_or_not = number % 4 == 1 ? NULL : dbias;
        if (winograd)
            winograd_backward_weight(dw, dbias_or_not, adds, x, dy, c->height, c->width, s, workspace);
        else
            conv_backward_weight(dw, dbias_or_not, adds, x, dy, c->height, c->width, s, 0, workspace);
        const int within = workspace[room] == 7;
        free(packed), free(packed_backward), free(workspace);
        if (threads > 1) {
            check(memcmp(result, results[0], sizeof(real) * all) == 0,
                  "%s: %d->%d channels, kernel %d: %d threads give the bits of one", method, s.in_channels,
                  s.out_channels, s.kernel, threads);
            continue;
        }
        int guards = 0;
        for (int i = 0; i < guard; i++)
            guards +=
                y[y_size + i] == 7 && dx[x_size + i] == 7 && dw[w_size + i] == 7 && dbias[s.out_channels + i] == 7;
        double error[4];
        error[0] = matmul_error(y, y_truth, y_size), error[1] = matmul_error(dx, dx_truth, x_size);
        error[2] = matmul_error(dw, dw_truth, w_size);
        error[3] = number % 4 == 1 ? 0 : matmul_error(dbias, dw_truth + w_size, s.out_channels);
        const char *names[] = {"forward", "backward data", "backward weight", "backward bias"};
        for (int i = 0; i < 4; i++)
            check(error[i] <= tolerance,
                  "%s %s: (%d, %d) pixels, %d->%d channels, kernel %d stride %d padding %d dilation %d: relative "
                  "error %.3g, at most %.3g",
                  method, names[i], c->height, c->width, s.in_channels, s.out_channels, s.kernel, s.stride, s.padding,
                  s.dilation, error[i], tolerance);
        check(guards == guard && within, "%s: %d->%d channels, kernel %d: nothing is written past a result", method,
              s.in_channels, s.out_channels, s.kernel);
    }
    omp_set_num_threads(threads_before);
    for (int i = 0; i < 3; i++) free(results[i]);
    free(x), free(w), free(dy), free(scale), free(bias), free(bias_in), free(add), free(add_in), free(mask);
    free(mask_in), free(dw_start), free(y_truth), free(dx_truth), free(dw_truth);
}

// A sum that is not a number passes ReLU, in full tiles (64 columns) and at the edge, so that it is seen.
static void test_matmul_nan(void) {
    const ConvShape s = {2, 70, 1, 1, 0, 1};
    real x[14], w[140], y[7 * 70];
    real *packed = (real *)allocate(sizeof(real) * packed_size(s, 0));
    Epilogue relu = {NULL, NULL, 1, NULL, 0};
    int seen = 0;
    for (int i = 0; i < 14; i++) x[i] = i < 2 || i > 11 ? (real)NAN : 1;
    for (int i = 0; i < 140; i++) w[i] = -1;
    pack_weights(packed, NULL, w, NULL, s, 0);
    conv_forward(y, x, 7, 1, packed, relu, s, 0);
    for (int i = 0; i < 7 * 70; i++) seen += i / 70 % 6 == 0 ? isnan(y[i]) : y[i] == 0;
    check(seen == 7 * 70, "matmul: NaN passes ReLU, negative sums do not (%d of %d right)", seen, 7 * 70);
    free(packed);
}

// Packed weights, element by element, as reals and as pairs of bf16, at an address that is a vector's and one that is
// not: columns past the last channel and the row of zeros are written, nothing beyond. Of bf16 with odd in channels a
// kernel's row is one tap, whose channels a zero makes even.
static void test_packing(void) {
    const ConvShape shapes[] = {{6, 70, 3, 1, 1, 1}, {130, 64, 1, 1, 0, 1}, {64, 128, 3, 2, 1, 1}, {3, 70, 7, 2, 3, 1}};
    for (int i = 0; i < 4 * 2 * 2; i++) {
        const ConvShape s = shapes[i / 4];
        const int half = i & 1, aligned = i / 2 & 1, unit = half ? 2 : 1, odd = half && s.in_channels % 2;
        const int taps = s.kernel * (odd ? 1 : s.kernel), in = s.in_channels * (odd ? s.kernel : 1);
        const int padded_in = odd ? patch_runs(s, half).units * 2 : in;
        if (half && IS_DOUBLE) continue;
        const long sizes[2] = {(long)packed_size(s, half), (long)packed_backward_size(s, half)};
        real *w = matmul_random(taps * in * (long)s.out_channels, i, 0);
        real *scale = matmul_random(s.out_channels, i, 1);
        size_t bytes = (sizeof(real) * (size_t)(sizes[0] + sizes[1]) / VECTOR_BYTES + 3) * VECTOR_BYTES;
        char *memory = (char *)aligned_alloc(VECTOR_BYTES, bytes);
        memset(memory, 0xFF, bytes);
        real *packed[2] = {(real *)memory + !aligned, NULL};
        packed[1] = packed[0] + sizes[0] + 1;
        packed[1] += aligned ? LANES - (packed[1] - (real *)memory) % LANES : 0;
        pack_weights(packed[0], odd ? NULL : packed[1], w, scale, s, half);
        for (int backward = 0; backward < (odd ? 1 : 2); backward++) {
            const int inner = backward ? s.out_channels : padded_in, outer = backward ? in : s.out_channels;
            long wrong = 0, panels = (long)divide_up((size_t)outer, TILE_COLUMNS);
            for (long at = 0; at < sizes[backward] * unit; at++) {
                const long row = at / unit / TILE_COLUMNS * unit + at % unit;  // panel, tap, inner channel
                const long column = row / (taps * inner) * TILE_COLUMNS + at / unit % TILE_COLUMNS;
                const long n = backward ? row % inner : column, c = backward ? column : row % inner;
                real value = 0;
                if (at < panels * TILE_COLUMNS * taps * inner && column < outer && c < in)
                    value = w[(n * taps + row / inner % taps) * in + c] * scale[n];
                const real found = load_number(packed[backward], (size_t)at, half);
                wrong += found != (half ? (real)from_bf16(to_bf16((float)value)) : value);
            }
            check(wrong == 0 && isnan(packed[backward][sizes[backward]]),
                  "packing %d->%d channels, kernel %d%s%s%s: %ld numbers are wrong", s.in_channels, s.out_channels,
                  s.kernel, backward ? ", backward" : "", half ? ", bf16" : "", aligned ? ", aligned" : "", wrong);
        }
        free(memory), free(w), free(scale);
    }
}

static void test_matmul(void) {
    test_packing();
    for (int i = 0; i < (int)(sizeof matmul_cases / sizeof *matmul_cases); i++)
        test_matmul_case(&matmul_cases[i], i, 0);
    test_matmul_nan();
}

// A NaN reaches all the outputs of the tiles that read it, and no other tile's.
static void test_winograd_nan(void) {
    const ConvShape s = {2, 70, 3, 1, 1, 1};
    real x[28], w[70 * 9 * 2], y[14 * 70];
    real *packed = (real *)allocate(sizeof(real) * winograd_packed_size(2, 70));
    real *workspace = (real *)allocate(sizeof(real) * winograd_workspace(s, omp_get_max_threads()));
    Epilogue relu = {NULL, NULL, 1, NULL, 0};
    int seen = 0;
    for (int i = 0; i < 28; i++) x[i] = i < 2 ? (real)NAN : 1;
    for (int i = 0; i < 70 * 9 * 2; i++) w[i] = -1;
    winograd_pack(packed, NULL, w, NULL, s);
    winograd_forward(y, x, 1, 14, packed, relu, s, workspace);
    for (int i = 0; i < 14 * 70; i++) seen += i / 70 < 2 ? isnan(y[i]) != 0 : y[i] == 0;
    check(seen == 14 * 70, "winograd: NaN passes ReLU, negative sums do not (%d of %d right)", seen, 14 * 70);
    free(packed), free(workspace);
}

// Pictures side by side, each in a layer of its own, have workspaces of their own.
static void test_winograd_side_by_side(void) {
    const int threads_before = omp_get_max_threads();
    Model model;
    omp_set_num_threads(2);
    small_model(&model, BASIC, 0, 0);
    omp_set_num_threads(threads_before);
    const Layer *layer = &model.blocks[0].conv[0];
    const size_t size = layer->workspace_size, pixels = 8 * 8;
    real *x = matmul_random((long)pixels * layer->shape.in_channels, 0, 1);
    real *y = (real *)allocate(sizeof(real) * pixels * (size_t)layer->shape.out_channels);
    int written[2] = {0, 0};
    for (size_t i = 0; i < 2 * size; i++) layer->workspace[i] = (real)NAN;
#pragma omp parallel num_threads(2)
    if (omp_get_thread_num() == 1) layer_forward(y, x, 8, 8, layer, 0, NULL);
    for (size_t i = 0; i < 2 * size; i++) written[i / size] |= !isnan(layer->workspace[i]);
    check(layer->winograd && !written[0] && written[1], "winograd: the second of two threads has the second workspace");
    model_free(&model);
    free(x), free(y);
}

static void test_winograd(void) {
    for (int i = 0; i < (int)(sizeof matmul_cases / sizeof *matmul_cases); i++)
        if (winograd_fits(matmul_cases[i].shape)) test_matmul_case(&matmul_cases[i], i, 1);
    test_winograd_nan();
    test_winograd_side_by_side();
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16: rounding, and products that are the same bits on every processor

static void test_bf16_rounding(void) {
    static const struct {
        uint32_t bits;
        bf16 rounded;
    } cases[] = {
        {0x3F800000, 0x3F80}, {0x3F808000, 0x3F80}, {0x3F808001, 0x3F81},  // 1; a tie goes to even, more goes up
        {0x3F818000, 0x3F82}, {0xBF818000, 0xBF82}, {0x3F817FFF, 0x3F81},  // ties to even, the sign stays
        {0x7F7FFFFF, 0x7F80}, {0x7F800000, 0x7F80}, {0xFF800000, 0xFF80},  // the largest float is nearer to infinity
        {0x7F800001, 0x7FC0}, {0xFFFFFFFF, 0xFFFF}, {0x00000000, 0x0000},  // NaN stays NaN
        {0x80000000, 0x8000}, {0x007FFFFF, 0x0000}, {0x80000001, 0x8000},  // what is not normal is zero
        {0x00800000, 0x0080},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float value;
        memcpy(&value, &cases[i].bits, sizeof value);
        check(to_bf16(value) == cases[i].rounded, "bf16 of 0x%08X: 0x%04X, not 0x%04X", cases[i].bits, to_bf16(value),
              cases[i].rounded);
    }
}

static bf16 *bf16_random(long count, int number, int tensor) {
    real *values = matmul_random(count, number, tensor);
    bf16 *rounded = (bf16 *)allocate(sizeof(bf16) * (size_t)count);
    for (long i = 0; i < count; i++) rounded[i] = to_bf16((float)values[i]);
    free(values);
    return rounded;
}

// What the kernels must do with one pair of neighbouring k after another, to the bit. (Products of two bf16 are exact.)
// In vectors the odd one is added first. AMX adds up the even and the odd ones of 16 pairs, then both to the sum.
typedef struct {
    int amx, count;
    float sum, part[2];
} PairSum;

// Not inlined: gcc 12.2 makes vectors of a loop over it whose sums are wrong.
__attribute__((noinline)) static void add_pair(PairSum *s, const bf16 *a, const bf16 *b) {
    for (int odd = 1; odd >= 0; odd--) *(s->amx ? &s->part[odd] : &s->sum) += from_bf16(a[odd]) * from_bf16(b[odd]);
    if (++s->count % AMX_DEPTH == 0) s->sum += s->part[0] + s->part[1], s->part[0] = s->part[1] = 0;
}
static float pair_sum(const PairSum *s) { return s->sum + (s->part[0] + s->part[1]); }

static float bf16_finish(float sum, Epilogue e, long i, int columns) {
    if (e.bias) sum += (float)e.bias[i % columns];
    if (e.add) sum += (float)load_number(e.add, (size_t)i, e.half);
    if (e.relu && sum < 0) sum = 0;
    if (e.mask && !(load_number(e.mask, (size_t)i, e.half) > 0)) sum = 0;
    return e.half ? from_bf16(to_bf16(sum)) : sum;
}

// Forward and backward data against sums in their order of taps and channels: equal bits, with 1 and 3 threads. Where
// in_channels are odd there is no backward data, and a kernel's row is summed as one run, which a zero completes.
// Behind x lie NaNs that no sum may reach.
static void test_bf16_case(const MatmulCase *c, int number) {
    const ConvShape s = c->shape;
    const int odd = s.in_channels % 2, merged = odd ? s.kernel : 1, run = merged * s.in_channels;
    if (odd ? s.dilation > 1 || patch_size(s) > MAX_PATCH : s.out_channels % 2) return;
    const int out_height = conv_size(c->height, s), out_width = conv_size(c->width, s), taps = s.kernel * s.kernel;
    const long pixels = (long)c->height * c->width, out_pixels = (long)out_height * out_width;
    const long x_size = pixels * s.in_channels, y_size = out_pixels * s.out_channels;
    const long w_size = (long)taps * s.in_channels * s.out_channels;
    const long behind = 64;
    bf16 *x = bf16_random(x_size + behind, number, 0), *dy = bf16_random(y_size, number, 2);
    real *w = matmul_random(w_size, number, 1), *scale = matmul_random(s.out_channels, number, 3);
    real *bias = matmul_random(s.out_channels, number, 4);
    const long most = x_size > y_size ? x_size : y_size;
    void *others[2];  // what is added, and the mask: of bf16 in every second case, else of reals
    for (int i = 0; i < 2; i++)
        others[i] = number % 2 ? (void *)bf16_random(most, number, 6 + i) : (void *)matmul_random(most, number, 6 + i);
    Epilogue forward = {bias, number % 3 ? others[0] : NULL, number % 4 < 2, NULL, number % 2};
    Epilogue backward = {NULL, number % 3 == 1 ? NULL : others[0], 0, number % 4 == 3 ? NULL : others[1], number % 2};
    bf16 *rounded = (bf16 *)allocate(sizeof(bf16) * (size_t)w_size);     // (out, tap, in)
    bf16 *transposed = (bf16 *)allocate(sizeof(bf16) * (size_t)w_size);  // (tap, in, out)
    for (long i = 0; i < w_size; i++) {
        const long n = i / (taps * s.in_channels), inner = i % (taps * s.in_channels);
        rounded[i] = transposed[inner * s.out_channels + n] = to_bf16((float)(w[i] * scale[n]));
    }
    memset(x + x_size, 0xFF, sizeof(bf16) * (size_t)behind);
    real *packed = (real *)allocate(sizeof(real) * packed_size(s, 1));
    real *packed_backward = (real *)allocate(sizeof(real) * packed_backward_size(s, 1));
    memset(packed, 0xFF, sizeof(real) * packed_size(s, 1));  // all of it must be written
    memset(packed_backward, 0xFF, sizeof(real) * packed_backward_size(s, 1));
    pack_weights(packed, odd ? NULL : packed_backward, w, scale, s, 1);

    const int threads_before = omp_get_max_threads();
    for (int threads = 1; threads <= 3; threads += 2) {
        long wrong[2] = {0, 0};
        void *y = allocate(sizeof(real) * (size_t)y_size), *dx = allocate(sizeof(real) * (size_t)x_size);
        omp_set_num_threads(threads);
        conv_forward(y, x, c->height, c->width, packed, forward, s, 1);
        if (!odd) conv_backward_data(dx, dy, c->height, c->width, packed_backward, backward, s, 1);
        for (long i = 0; i < y_size; i++) {
            const long pixel = i / s.out_channels, n = i % s.out_channels;
            PairSum sum = {amx_usable() && (odd || s.in_channels % (2 * AMX_DEPTH) == 0), 0, 0, {0, 0}};
            for (int tap = 0; tap < taps; tap += merged) {
                const int depth = sum.amx ? 2 * AMX_DEPTH : 2, padded = (run + depth - 1) / depth * depth;
                for (int k = 0; k < padded; k += 2) {
                    bf16 pair[2][2] = {{0, 0}, {0, 0}};
                    for (int i = 0; i < 2 && k + i < run; i++) {
                        const int at = tap + (k + i) / s.in_channels, channel = (k + i) % s.in_channels;
                        const long row = pixel / out_width * s.stride - s.padding + at / s.kernel * s.dilation;
                        const long column = pixel % out_width * s.stride - s.padding + at % s.kernel * s.dilation;
                        if (row >= 0 && row < c->height && column >= 0 && column < c->width)
                            pair[0][i] = x[(row * c->width + column) * s.in_channels + channel];
                        pair[1][i] = rounded[(n * taps + at) * s.in_channels + channel];
                    }
                    add_pair(&sum, pair[0], pair[1]);
                }
            }
            wrong[0] += bf16_finish(pair_sum(&sum), forward, i, s.out_channels) !=
                        (float)load_number(y, (size_t)i, forward.half);
        }
        for (long i = 0; i < x_size && !odd; i++) {
            const long pixel = i / s.in_channels, channel = i % s.in_channels;
            PairSum sum = {amx_usable() && s.out_channels % (2 * AMX_DEPTH) == 0, 0, 0, {0, 0}};
            for (int tap = 0; tap < taps; tap++) {
                const long y_at = pixel / c->width + s.padding - tap / s.kernel * s.dilation;
                const long x_at = pixel % c->width + s.padding - tap % s.kernel * s.dilation;
                if (y_at % s.stride || x_at % s.stride || y_at < 0 || x_at < 0 || y_at / s.stride >= out_height ||
                    x_at / s.stride >= out_width)
                    continue;
                for (int n = 0; n < s.out_channels; n += 2)
                    add_pair(&sum, dy + (y_at / s.stride * out_width + x_at / s.stride) * s.out_channels + n,
                             transposed + ((long)tap * s.in_channels + channel) * s.out_channels + n);
            }
            wrong[1] += bf16_finish(pair_sum(&sum), backward, i, s.in_channels) !=
                        (float)load_number(dx, (size_t)i, backward.half);
        }
        for (int i = 0; i < 2; i++)
            check(wrong[i] == 0,
                  "bf16 %s, %d threads: (%d, %d) pixels, %d->%d channels, kernel %d stride %d dilation %d: %ld numbers "
                  "differ",
                  i ? "backward data" : "forward", threads, c->height, c->width, s.in_channels, s.out_channels,
                  s.kernel, s.stride, s.dilation, wrong[i]);
        free(y), free(dx);
    }
    omp_set_num_threads(threads_before);
    free(x), free(dy), free(w), free(scale), free(bias), free(others[0]), free(others[1]);
    free(rounded), free(transposed), free(packed), free(packed_backward);
}

// Backward weight pairs pixels, so channels may be odd. Against sums in double, with 1, 2 and 3 threads of equal bits:
// products are exact, and n sums of floats in whatever order are off by at most n rounding errors of all magnitudes
// together. Where one block has all the pixels, also to the bit.
static void test_bf16_weight(const MatmulCase *c, int number) {
    const ConvShape s = c->shape;
    const int out_width = conv_size(c->width, s), taps = s.kernel * s.kernel;
    const long pixels = (long)conv_size(c->height, s) * out_width, inner = (long)taps * s.in_channels;
    const long w_size = inner * s.out_channels, all = w_size + s.out_channels, guard = 8;
    bf16 *x = bf16_random((long)c->height * c->width * s.in_channels, number, 0);
    bf16 *dy = bf16_random(pixels * s.out_channels, number, 2);
    bf16 *patches = (bf16 *)allocate(sizeof(bf16) * (size_t)((pixels + 1) * inner));  // and a pixel of zeros
    bf16 *rows = (bf16 *)allocate(sizeof(bf16) * (size_t)((pixels + 1) * s.out_channels));
    real *start = matmul_random(all, number, 10), *results[3];
    memcpy(rows, dy, sizeof(bf16) * (size_t)(pixels * s.out_channels));
    for (long at = 0; at < pixels * taps; at++) {
        const long pixel = at / taps, tap = at % taps;
        const long row = pixel / out_width * s.stride - s.padding + tap / s.kernel * s.dilation;
        const long column = pixel % out_width * s.stride - s.padding + tap % s.kernel * s.dilation;
        if (row < 0 || row >= c->height || column < 0 || column >= c->width) continue;
        memcpy(patches + pixel * inner + tap * s.in_channels, x + (row * c->width + column) * s.in_channels,
               sizeof(bf16) * (size_t)s.in_channels);
    }
    const int threads_before = omp_get_max_threads();
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        const size_t workspace_size = conv_backward_weight_workspace(s, threads);
        real *workspace = (real *)allocate(sizeof(real) * workspace_size);
        real *dw = results[threads - 1] = (real *)allocate(sizeof(real) * (size_t)(all + guard));
        memset(workspace, 0xFF, sizeof(real) * workspace_size);
        memcpy(dw, start, sizeof(real) * (size_t)all);
        for (int i = 0; i < guard; i++) dw[all + i] = 7;
        conv_backward_weight(dw, dw + w_size, 1, x, dy, c->height, c->width, s, 1, workspace);
        check(memcmp(dw, results[0], sizeof(real) * (size_t)(all + guard)) == 0 && dw[all] == 7 && dw[all + 7] == 7,
              "bf16 backward weight: %d->%d channels, kernel %d: %d threads give the bits of one and nothing more",
              s.in_channels, s.out_channels, s.kernel, threads);
        free(workspace);
    }
    omp_set_num_threads(threads_before);
    const int one_block = pixels <= 2 * BLOCK_PIXELS && pixels <= 2 * SLICE_PIXELS;
    long wrong = 0, differ = 0;
    for (long i = 0; i < all; i++) {
        const long n = i < w_size ? i / inner : i - w_size;
        double truth = start[i], magnitude = fabs((double)start[i]);
        PairSum sum = {amx_usable(), 0, 0, {0, 0}};
        for (long m = 0; m < pixels; m++) {
            const bf16 *a = rows + m * s.out_channels + n, *b = patches + m * inner + i % inner;
            const double product = (double)from_bf16(*a) * (i < w_size ? from_bf16(*b) : 1);
            truth += product, magnitude += fabs(product);
            if (m % 2) continue;
            const bf16 two[2] = {a[0], a[s.out_channels]}, other[2] = {b[0], b[inner]};
            add_pair(&sum, two, other);
        }
        wrong += !(fabs((double)results[0][i] - truth) <= (double)(pixels + 1) * FLT_EPSILON / 2 * magnitude);
        differ += one_block && i < w_size && (float)results[0][i] != (float)start[i] + pair_sum(&sum);
    }
    check(wrong == 0 && differ == 0,
          "bf16 backward weight: (%d, %d) pixels, %d->%d channels, kernel %d stride %d dilation %d: %ld of %ld numbers "
          "wrong, %ld in their bits",
          c->height, c->width, s.in_channels, s.out_channels, s.kernel, s.stride, s.dilation, wrong, all, differ);
    for (int i = 0; i < 3; i++) free(results[i]);
    free(x), free(dy), free(patches), free(rows), free(start);
}

static void test_bf16(void) {
    if (IS_DOUBLE) return;
    test_bf16_rounding();
    for (int i = 0; i < (int)(sizeof matmul_cases / sizeof *matmul_cases); i++) {
        test_bf16_case(&matmul_cases[i], i);
        test_bf16_weight(&matmul_cases[i], i);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention, dropout, layer norm, max pooling and positions against plain loops in double, and those loops' gradients
// against central differences.

static double test_number(uint32_t tensor, uint64_t element) {
    return (double)(real)random_normal(7, RANDOM_TEST, tensor, 0, 0, element);
}

// The greatest difference, relative to the greatest magnitude of the truth (or to `floor` if that is more).
static double worst_difference(const real *ours, const double *truth, size_t n, double floor) {
    double worst = 0, magnitude = floor;
    for (size_t i = 0; i < n; i++) {
        const double difference = fabs((double)ours[i] - truth[i]);
        if (!(difference <= worst)) worst = difference;  // NaN stays
        if (fabs(truth[i]) > magnitude) magnitude = fabs(truth[i]);
    }
    return worst / magnitude;
}

static double test_factor(Dropout dropout, uint64_t element) {
    if (dropout.p == 0) return 1;
    const uint32_t word = random_word(dropout.seed, RANDOM_DROPOUT, dropout.site, dropout.step, dropout.image, element);
    return word >= (uint32_t)(dropout.p * 4294967296.0) ? 1 / (1 - dropout.p) : 0;
}

// The logarithm of a prior's Gaussian of a head around a query's box, at a key.
static double test_prior(AttentionPrior prior, int head, int query, int key) {
    if (!prior.boxes) return 0;
    const int cells[2] = {prior.width, prior.height}, place[2] = {key % prior.width, key / prior.width};
    double squares = 0;
    for (int axis = 0; axis < 2; axis++) {
        const double size = (double)prior.boxes[4 * query + 2 + axis];
        const double middle = (double)prior.boxes[4 * query + axis] + PRIOR_HEADS[head % 8][axis] * size / 2;
        double deviation = PRIOR_HEADS[head % 8][2] * size / 2;
        if (deviation * cells[axis] < 0.5) deviation = 0.5 / cells[axis];
        squares += pow(((place[axis] + 0.5) / cells[axis] - middle) / deviation, 2);
    }
    return -squares / 2;
}

// A prior of random boxes on a grid of Tk cells, so many to a row; none if there are 0. The caller frees its boxes.
static AttentionPrior random_prior(int Tq, int Tk, int width) {
    AttentionPrior prior = NO_PRIOR;
    if (!width) return prior;
    real *boxes = (real *)allocate(4 * (size_t)Tq * sizeof(real));
    for (int i = 0; i < 4 * Tq; i++)
        boxes[i] = (real)(i % 4 < 2 ? test_uniform(7, (uint64_t)i) : 0.02 + 0.5 * test_uniform(7, (uint64_t)i));
    prior.boxes = boxes, prior.width = width, prior.height = Tk / width;
    return prior;
}

// One head's dimension at a time, as in the paper: probabilities and their factors in full. Returns sum(out * dout).
//
// bounds: NULL, or (out, dq, dk, dv) one after another: how far bf16 may be off, from the same inputs. What is rounded
// is off by u = 2^-8 of its magnitude at most (half of the last of 8 bits): A, dS and the four results. So, with the
// symbols of attention_backward,
//   |out error| <= u (A |v| + |out|),  |dv error| <= u (A^T |dout| + |dv|),
//   |D error| <= |dout| u A |v| (D is taken from out before it is rounded),   |dS error| <= u |dS| + P |D error|,
//   |dq error| <= scale |dS error| |k| + u |dq|,  |dk error| <= scale |dS error|^T |q| + u |dk|.
// Errors of floats are left out.
static double plain_attention(double *out, double *lse, double *dq, double *dk, double *dv, const double *dout,
                              const double *q, const double *k, const double *v, int Tq, int Tk, int C, int heads,
                              Dropout dropout, AttentionPrior prior, double *bounds) {
    const int D = C / heads;
    double loss = 0, *P = (double *)allocate(3 * (size_t)Tk * sizeof(double)), *M = P + Tk, *dP = M + Tk;
    memset(dq, 0, (size_t)Tq * C * sizeof(double));
    memset(dk, 0, (size_t)Tk * C * sizeof(double));
    memset(dv, 0, (size_t)Tk * C * sizeof(double));
    const size_t nq = (size_t)Tq * C, nk = (size_t)Tk * C;
    const double u = 1.0 / 256;
    double *dq_bound = bounds ? bounds + nq : NULL, *dk_bound = bounds ? dq_bound + nq : NULL;
    double *dv_bound = bounds ? dk_bound + nk : NULL;
    if (bounds) memset(bounds, 0, 2 * (nq + nk) * sizeof(double));
    for (int h = 0; h < heads; h++) {
        for (int i = 0; i < Tq; i++) {
            double D_bound = 0;
            const double *qi = q + (size_t)i * C + h * D, *doi = dout + (size_t)i * C + h * D;
            double top = -1e300, total = 0, mean = 0;
            for (int j = 0; j < Tk; j++) {
                P[j] = 0;
                for (int d = 0; d < D; d++) P[j] += qi[d] * k[(size_t)j * C + h * D + d] / sqrt((double)D);
                P[j] += test_prior(prior, h, i, j);
                if (P[j] > top) top = P[j];
                M[j] = test_factor(dropout, ((uint64_t)h * Tq + i) * Tk + j);
            }
            for (int j = 0; j < Tk; j++) total += P[j] = exp(P[j] - top);
            lse[(size_t)h * Tq + i] = top + log(total);
            for (int d = 0; d < D; d++) {
                double sum = 0, magnitudes = 0;
                for (int j = 0; j < Tk; j++) {
                    const double term = P[j] / total * M[j] * v[(size_t)j * C + h * D + d];
                    sum += term, magnitudes += fabs(term);
                }
                out[(size_t)i * C + h * D + d] = sum;
                loss += sum * doi[d];
                if (bounds) bounds[(size_t)i * C + h * D + d] = u * (magnitudes + fabs(sum));
                D_bound += fabs(doi[d]) * u * magnitudes;
            }
            for (int j = 0; j < Tk; j++) {
                P[j] /= total;
                dP[j] = 0;
                for (int d = 0; d < D; d++) {
                    dP[j] += M[j] * doi[d] * v[(size_t)j * C + h * D + d];
                    dv[(size_t)j * C + h * D + d] += P[j] * M[j] * doi[d];
                    if (bounds) dv_bound[(size_t)j * C + h * D + d] += u * P[j] * M[j] * fabs(doi[d]);
                }
                mean += P[j] * dP[j];
            }
            for (int j = 0; j < Tk; j++) {
                const double dS = P[j] * (dP[j] - mean) / sqrt((double)D);
                for (int d = 0; d < D; d++) {
                    dq[(size_t)i * C + h * D + d] += dS * k[(size_t)j * C + h * D + d];
                    dk[(size_t)j * C + h * D + d] += dS * qi[d];
                    if (!bounds) continue;
                    const double dS_bound = u * fabs(dS) + P[j] * D_bound / sqrt((double)D);
                    dq_bound[(size_t)i * C + h * D + d] += dS_bound * fabs(k[(size_t)j * C + h * D + d]);
                    dk_bound[(size_t)j * C + h * D + d] += dS_bound * fabs(qi[d]);
                }
            }
        }
    }
    for (size_t i = 0; bounds && i < nq; i++) dq_bound[i] += u * fabs(dq[i]);
    for (size_t i = 0; bounds && i < nk; i++) dk_bound[i] += u * fabs(dk[i]), dv_bound[i] += u * fabs(dv[i]);
    free(P);
    return loss;
}

// The greatest difference of attention_weights, of the first, a middle and the last query, from softmaxes in full.
// lse, q, k: what plain_attention had and gave; the others: what attention_forward had and gave.
static double worst_attention_weights(const real *lse_ours, const void *q_ours, const void *k_ours, const double *lse,
                                      const double *q, const double *k, int Tq, int Tk, int C, int heads,
                                      AttentionPrior prior, int half) {
    const int D = C / heads, queries[3] = {0, Tq / 2, Tq - 1};
    double worst = 0, *weights = (double *)allocate((size_t)Tk * sizeof(double));
    for (int n = 0; n < 3; n++) {
        const int i = queries[n];
        attention_weights(weights, q_ours, k_ours, lse_ours, i, Tq, Tk, C, heads, prior, half);
        for (int j = 0; j < Tk; j++) {
            double sum = 0;
            for (int h = 0; h < heads; h++) {
                double score = test_prior(prior, h, i, j) - lse[(size_t)h * Tq + i];
                for (int d = 0; d < D; d++)
                    score += q[(size_t)i * C + h * D + d] * k[(size_t)j * C + h * D + d] / sqrt((double)D);
                sum += exp(score);
            }
            const double difference = fabs(weights[j] - sum / heads);
            if (!(difference <= worst)) worst = difference;  // NaN stays
        }
    }
    free(weights);
    return worst;
}

// grid_width: with a prior on a grid of so many columns; 0: without one.
static void test_attention_shape(int Tq, int Tk, int C, int heads, double p, double spread, int differences,
                                 int grid_width) {
    const AttentionPrior prior = random_prior(Tq, Tk, grid_width);
    const size_t nq = (size_t)Tq * C, nk = (size_t)Tk * C, nl = (size_t)heads * Tq, all = 4 * nq + 4 * nk + nl;
    // in the order out, dq, dk, dv, lse, q, dout, k, v
    double *truth = (double *)allocate(all * sizeof(double)), *spare = (double *)allocate(all * sizeof(double));
    double *out = truth, *dq = out + nq, *dk = dq + nq, *dv = dk + nk, *lse = dv + nk, *q = lse + nl, *dout = q + nq;
    double *k = dout + nq, *v = k + nk;
    const size_t results = 2 * nq + 2 * nk + nl, needed = attention_workspace(Tq, Tk, C, heads, 3);
    real *ours = (real *)allocate(2 * all * sizeof(real)), *once = ours + all;
    real *workspace = (real *)allocate((needed + 1) * sizeof(real));
    Dropout dropout;
    memset(&dropout, 0, sizeof dropout);
    dropout.p = p, dropout.seed = 0x123456789ABCDEFull, dropout.site = 5, dropout.step = 77, dropout.image = 3;
    for (size_t i = results; i < all; i++) {
        truth[i] = (double)(real)(test_number(0, i) * (i < results + nq ? spread : 1));
        ours[i] = (real)truth[i];
    }
    real *dq_ours = ours + nq, *dk_ours = dq_ours + nq, *dv_ours = dk_ours + nk, *lse_ours = dv_ours + nk;
    const real *q_ours = lse_ours + nl, *dout_ours = q_ours + nq, *k_ours = dout_ours + nq, *v_ours = k_ours + nk;
    plain_attention(out, lse, dq, dk, dv, dout, q, k, v, Tq, Tk, C, heads, dropout, prior, NULL);
    const int threads = omp_get_max_threads();
    int same = 1;
    for (int t = 1; t <= 3; t++) {  // stale numbers in the workspace and the results must not matter: NaN
        memset(workspace, 0xFF, needed * sizeof(real));
        memset(ours, 0xFF, results * sizeof(real));
        workspace[needed] = 42;
        omp_set_num_threads(t);
        attention_forward(ours, NULL, lse_ours, q_ours, k_ours, v_ours, Tq, Tk, C, heads, dropout, prior, 0, workspace);
        memset(workspace, 0xFF, needed * sizeof(real));
        attention_backward(dq_ours, dk_ours, dv_ours, dout_ours, q_ours, k_ours, v_ours, ours, lse_ours, Tq, Tk, C,
                           heads, dropout, prior, 0, workspace);
        if (t == 1) memcpy(once, ours, results * sizeof(real));
        same = same && memcmp(once, ours, results * sizeof(real)) == 0 && workspace[needed] == 42;
    }
    omp_set_num_threads(threads);
    const double bound = (IS_DOUBLE ? 1e-13 : 2e-6) * (spread > 1 || grid_width ? 20 : 1);
    const char *name[] = {"out", "dq", "dk", "dv", "lse"};
    const size_t count[] = {nq, nq, nk, nk, nl};
    size_t at = 0;
    check(same, "attention %dx%d C %d heads %d p %g grid %d: 1, 2, 3 threads: same bits, within the workspace", Tq, Tk,
          C, heads, p, grid_width);
    for (int i = 0; i < 5; at += count[i++]) {
        // with one key dq and dk are zero, of which rounding leaves something: held against 1
        const double worst = worst_difference(ours + at, truth + at, count[i], Tk == 1 ? 1 : 1e-30);
        check(worst < bound, "attention %dx%d C %d heads %d p %g spread %g grid %d: %s differs by %.2e, bound %.0e", Tq,
              Tk, C, heads, p, spread, grid_width, name[i], worst, bound);
    }
    const double worst_weight =
        worst_attention_weights(lse_ours, q_ours, k_ours, lse, q, k, Tq, Tk, C, heads, prior, 0);
    check(worst_weight < bound, "attention %dx%d C %d heads %d grid %d: weights differ by %.2e, bound %.0e", Tq, Tk, C,
          heads, grid_width, worst_weight, bound);
    for (int i = 0; i < differences; i++) {  // d sum(out * dout) / dx for x in q, k, v
        double *where_x = i % 3 == 0 ? q : i % 3 == 1 ? k : v;
        const double *gradient = i % 3 == 0 ? dq : i % 3 == 1 ? dk : dv;
        const size_t place = random_below(9, RANDOM_TEST, 0, 0, 0, (uint64_t)i, (uint32_t)(i % 3 == 0 ? nq : nk));
        const double kept = where_x[place], step = 1e-5;
        double loss[2];
        for (int sign = 0; sign < 2; sign++) {
            where_x[place] = kept + (sign ? step : -step);
            loss[sign] =
                plain_attention(spare, spare + nq, spare + nq + nl, spare + 2 * nq + nl, spare + 2 * nq + nl + nk, dout,
                                q, k, v, Tq, Tk, C, heads, dropout, prior, NULL);
        }
        where_x[place] = kept;
        const double numeric = (loss[1] - loss[0]) / (2 * step);
        check(fabs(numeric - gradient[place]) < 1e-7 * (1 + fabs(numeric)),
              "attention: derivative for %s[%zu] is %.10g, central difference %.10g",
              i % 3 == 0   ? "q"
              : i % 3 == 1 ? "k"
                           : "v",
              place, gradient[place], numeric);
    }
    free(truth), free(spare), free(ours), free(workspace), free((void *)prior.boxes);
}

// The same in bf16: each element within its bound of plain_attention; and a tensor as a whole within u = 2^-8 of its
// length, because roundings are independent: one is off by u / 2 to u at most, by 0.58 u at most in the root mean
// square, and three of them that meet in a result (A or dS, D, the result itself) by less than u typically.
static void test_attention_bf16(int Tq, int Tk, int C, int heads, double p, int grid_width) {
    const AttentionPrior prior = random_prior(Tq, Tk, grid_width);
    const size_t nq = (size_t)Tq * C, nk = (size_t)Tk * C, nl = (size_t)heads * Tq;
    const size_t inputs = 2 * (nq + nk), results = inputs, needed = attention_workspace(Tq, Tk, C, heads, 3);
    // inputs: q, dout, k, v; results and bounds: out, dq, dk, dv
    double *truth = (double *)allocate((inputs + 2 * results + nl) * sizeof(double)), *wide = truth + results;
    double *bounds = wide + inputs, *lse = bounds + results;
    bf16 *x = (bf16 *)allocate((inputs + 2 * results) * sizeof(bf16)), *ours = x + inputs, *once = ours + results;
    real *workspace = (real *)allocate((needed + 1 + nl + nq) * sizeof(real)), *lse_ours = workspace + needed + 1;
    real *exact = lse_ours + nl;  // out before it is rounded
    Dropout dropout;
    memset(&dropout, 0, sizeof dropout);
    dropout.p = p, dropout.seed = 0x123456789ABCDEFull, dropout.site = 5, dropout.step = 77, dropout.image = 3;
    for (size_t i = 0; i < inputs; i++) {
        x[i] = to_bf16((float)test_number(0, i));
        wide[i] = (double)from_bf16(x[i]);
    }
    plain_attention(truth, lse, truth + nq, truth + 2 * nq, truth + 2 * nq + nk, wide + nq, wide, wide + 2 * nq,
                    wide + 2 * nq + nk, Tq, Tk, C, heads, dropout, prior, bounds);
    const int threads = omp_get_max_threads();
    int same = 1;
    for (int t = 1; t <= 3; t++) {
        memset(workspace, 0xFF, needed * sizeof(real));
        memset(ours, 0xFF, results * sizeof(bf16));
        workspace[needed] = 42;
        omp_set_num_threads(t);
        attention_forward(exact, ours, lse_ours, x, x + 2 * nq, x + 2 * nq + nk, Tq, Tk, C, heads, dropout, prior, 1,
                          workspace);
        memset(workspace, 0xFF, needed * sizeof(real));
        attention_backward(ours + nq, ours + 2 * nq, ours + 2 * nq + nk, x + nq, x, x + 2 * nq, x + 2 * nq + nk, exact,
                           lse_ours, Tq, Tk, C, heads, dropout, prior, 1, workspace);
        if (t == 1) memcpy(once, ours, results * sizeof(bf16));
        same = same && memcmp(once, ours, results * sizeof(bf16)) == 0 && workspace[needed] == 42;
    }
    omp_set_num_threads(threads);
    check(same, "attention bf16 %dx%d C %d heads %d p %g: 1, 2, 3 threads: same bits, within the workspace", Tq, Tk, C,
          heads, p);
    const double worst_lse = worst_difference(lse_ours, lse, nl, 1e-30);
    check(worst_lse < 2e-6, "attention bf16 %dx%d C %d heads %d: lse differs by %.2e", Tq, Tk, C, heads, worst_lse);
    const double worst_weight =
        worst_attention_weights(lse_ours, x, x + 2 * nq, lse, wide, wide + 2 * nq, Tq, Tk, C, heads, prior, 1);
    check(worst_weight < 1e-5, "attention bf16 %dx%d C %d heads %d grid %d: weights differ by %.2e", Tq, Tk, C, heads,
          grid_width, worst_weight);
    const char *name[] = {"out", "dq", "dk", "dv"};
    const size_t count[] = {nq, nq, nk, nk};
    size_t at = 0;
    for (int tensor = 0; tensor < 4; at += count[tensor++]) {
        double worst = 0, squares = 0, error = 0;
        for (size_t i = at; i < at + count[tensor]; i++) {
            const double difference = fabs((double)from_bf16(ours[i]) - truth[i]);
            // 1.02: u to the second; 1e-6: floats
            const double part = difference / (1.02 * bounds[i] + 1e-6);
            if (!(part <= worst)) worst = part;  // NaN stays
            squares += truth[i] * truth[i], error += difference * difference;
        }
        check(worst <= 1, "attention bf16 %dx%d C %d heads %d p %g: %s is off by %.2f of its bound", Tq, Tk, C, heads,
              p, name[tensor], worst);
        if (Tk == 1 && (tensor == 1 || tensor == 2)) continue;  // dq and dk are zero
        check(sqrt(error) <= sqrt(squares) / 256,
              "attention bf16 %dx%d C %d heads %d p %g: %s as a whole is off by %.2e", Tq, Tk, C, heads, p,
              name[tensor], sqrt(error / squares));
    }
    free(truth), free(x), free(workspace), free((void *)prior.boxes);
}

// One NaN in q, k or v: it reaches every output that depends on it, and no other.
static void test_attention_nan(int half) {
    enum { T = 130, C = 24, HEADS = 2, N = T * C };
    real *memory = (real *)allocate(9 * N * sizeof(real)), *lse = (real *)allocate(HEADS * T * sizeof(real));
    real *workspace = (real *)allocate(attention_workspace(T, T, C, HEADS, omp_get_max_threads()) * sizeof(real));
    const size_t bytes = N * number_bytes(half);
    char *k = (char *)memory + bytes, *v = k + bytes, *dq = v + bytes, *dk = dq + bytes, *dv = dk + bytes;
    char *dout = dv + bytes;
    real *out = memory + 7 * N;
    bf16 *rounded = (bf16 *)(memory + 8 * N);
    Dropout none;
    memset(&none, 0, sizeof none);
    for (int which = 0; which < 3; which++) {
        const int row = 101, channel = 14;
        for (size_t i = 0; i < 3 * N; i++) store_number(memory, i, (real)test_number(1, i), half);
        for (size_t i = 0; i < N; i++) store_number(dout, i, (real)test_number(2, i), half);
        store_number(memory, (size_t)(which * N + row * C + channel), (real)NAN, half);
        attention_forward(out, half ? rounded : NULL, lse, memory, k, v, T, T, C, HEADS, none, NO_PRIOR, half,
                          workspace);
        attention_backward(dq, dk, dv, dout, memory, k, v, out, lse, T, T, C, HEADS, none, NO_PRIOR, half, workspace);
        int wrong = 0, backward = 0;
        for (int i = 0; i < N; i++) {
            const int head = i % C / (C / HEADS);
            const int reached = which == 0 ? head == 1 && i / C == row : which == 1 ? head == 1 : i % C == channel;
            wrong += (isnan(half ? (real)from_bf16(rounded[i]) : out[i]) != 0) != reached;
            backward += isnan(load_number(dq, (size_t)i, half)) || isnan(load_number(dk, (size_t)i, half)) ||
                        isnan(load_number(dv, (size_t)i, half));
        }
        check(wrong == 0, "attention%s: a NaN in %c: %d outputs are wrongly NaN or not NaN", half ? " bf16" : "",
              "qkv"[which], wrong);
        check(backward > 0, "attention%s: a NaN in %c does not reach the gradients", half ? " bf16" : "", "qkv"[which]);
    }
    free(memory), free(lse), free(workspace);
}

static void test_attention(void) {
    // Tq, Tk, C, heads, columns of the prior's grid: one token; the test models; ends inside a block; 1, 2, 4 chunks;
    // head_dim 4, 9, 12, 16, 32, 64; more heads than the prior's table has
    const int shapes[][5] = {{1, 1, 4, 1, 1},     {6, 6, 36, 3, 3},     {6, 6, 36, 4, 2},      {6, 6, 36, 9, 3},
                             {48, 96, 32, 1, 12}, {100, 97, 64, 2, 97}, {49, 515, 48, 3, 103}, {25, 1030, 64, 1, 103}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int *s = shapes[i];
        for (int with = 0; with < 2; with++) {
            test_attention_shape(s[0], s[1], s[2], s[3], 0, 1, s[0] < 10 ? 6 : 0, with * s[4]);
            test_attention_shape(s[0], s[1], s[2], s[3], 0.1, 1, s[0] < 10 ? 6 : 3, with * s[4]);
            for (int dropped = 0; dropped < 2 && !IS_DOUBLE; dropped++)
                test_attention_bf16(s[0], s[1], s[2], s[3], dropped * 0.1, with * s[4]);
        }
    }
    test_attention_shape(50, 300, 64, 2, 0.5, 30, 6, 0);  // scores around 170, whose exponentials leave float's range
    for (int half = 0; half <= !IS_DOUBLE; half++) test_attention_nan(half);

    vec x = fill(0);
    double worst = 0;
    const double lowest = IS_DOUBLE ? -690 : -50;
    for (double value = lowest; value < (IS_DOUBLE ? 708 : 87); value += 0.00987) {
        x += (real)value - x;
        const double truth = exp((double)(real)value);
        worst = fmax(worst, fabs((double)exp_lanes(x)[LANES - 1] / truth - 1));
    }
    check(worst < (IS_DOUBLE ? 1e-15 : 1.2e-7), "exp: relative error %.2e", worst);
    check(exp_lanes(fill((real)-INFINITY))[0] == 0 && exp_lanes(fill((real)(lowest - 0.01)))[0] == 0,
          "exp of -inf, or of less than %g, is not 0", lowest);
    check(exp_lanes(fill(0))[0] == 1 && isnan(exp_lanes(fill((real)NAN))[0]), "exp(0) is not 1, or exp(NaN) not NaN");
}

// dropout(x) + add within rounding, x + add and x * factor to the bit, in reals or bf16; nothing is written past the
// end.
static void test_dropout_sum(size_t rows, size_t channels, int half) {
    const size_t n = rows * channels;
    real *x = (real *)allocate((4 * n + 1) * sizeof(real)), *add = x + n, *truth = add + n, *y = truth + n;
    const Dropout dropout = {0.3, 5, 9, 1000, 1};
    int wrong[3] = {0, 0, 0};
    for (size_t i = 0; i < n; i++) add[i] = (real)test_number(5, i);
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < n; i++) {
            store_number(x, i, (real)test_number(3, i), half && round != 1);
            const real value = load_number(x, i, half && round != 1);
            const real kept = test_factor(dropout, i) != 0 ? value * (real)(1 / (1 - dropout.p)) : 0;
            store_number(truth, i, round == 0 ? kept + add[i] : round == 1 ? value + add[i] : value * 3, half);
        }
        y[n] = 42;
        if (half) ((bf16 *)y)[n] = 42;
        if (round == 0) dropout_forward(y, half, x, half, add, rows, channels, dropout);
        if (round == 1) add_rows(y, half, x, add, n);
        if (round == 2) memcpy(y, x, n * number_bytes(half)), scale_rows(y, half, 3, n);
        for (size_t i = 0; i < n; i++) {
            const double difference = load_number(y, i, half) - load_number(truth, i, half);
            wrong[round] += fabs(difference) > (round == 0 ? (half ? 8e-3 : 1e-6) * (1 + fabs(add[i])) : 0);
        }
        wrong[round] += y[n] != 42 || (half && ((bf16 *)y)[n] != 42);
    }
    check(!wrong[0] && !wrong[1] && !wrong[2],
          "%zu elements%s: dropout with a sum has %d wrong, a sum %d, a multiple %d", n, half ? " of bf16" : "",
          wrong[0], wrong[1], wrong[2]);
    free(x);
}

static void test_dropout(void) {
    const size_t shapes[][2] = {{1, 1}, {3, 7}, {5, 36}, {200, 256}};
    for (int i = 0; i < 4; i++) {
        const size_t n = shapes[i][0] * shapes[i][1];
        real *x = (real *)allocate(2 * n * sizeof(real)), *y = x + n;
        Dropout dropout;
        memset(&dropout, 0, sizeof dropout);
        dropout.p = 0.3, dropout.seed = 0xFEDCBA9876543210ull, dropout.site = 9, dropout.step = 1000, dropout.image = 1;
        double worst = 0;
        for (size_t j = 0; j < n; j++) x[j] = (real)test_number(3, j);
        dropout_forward(y, 0, x, 0, NULL, shapes[i][0], shapes[i][1], dropout);
        for (size_t j = 0; j < n; j++) {
            worst = fmax(worst, fabs(y[j] - x[j] * test_factor(dropout, j)) / (fabs(x[j]) + 1e-9));
        }
        dropout_forward(x, 0, x, 0, NULL, shapes[i][0], shapes[i][1], dropout);
        check(worst < (IS_DOUBLE ? 1e-15 : 2e-7), "dropout of %zu elements: differs by %.2e", n, worst);
        check(memcmp(x, y, n * sizeof(real)) == 0, "dropout of %zu elements in place differs", n);
        dropout.p = 0;
        dropout_forward(y, 0, x, 0, NULL, shapes[i][0], shapes[i][1], dropout);
        check(memcmp(x, y, n * sizeof(real)) == 0, "dropout with p = 0 is not the identity");
        free(x);
        for (int half = 0; half <= !IS_DOUBLE; half++) test_dropout_sum(shapes[i][0], shapes[i][1], half);
    }
}

// Returns sum(y * dy).
static double plain_layernorm(double *y, const double *x, const double *weight, const double *bias, const double *dy,
                              int rows, int C) {
    double loss = 0;
    for (int row = 0; row < rows; row++) {
        double mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += x[row * C + c] / C;
        for (int c = 0; c < C; c++) variance += (x[row * C + c] - mean) * (x[row * C + c] - mean) / C;
        for (int c = 0; c < C; c++) {
            y[row * C + c] = (x[row * C + c] - mean) / sqrt(variance + 1e-5) * weight[c] + bias[c];
            loss += y[row * C + c] * dy[row * C + c];
        }
    }
    return loss;
}

static void test_layernorm(void) {
    const int shapes[][2] = {{1, 4}, {7, 36}, {90, 256}};
    for (int s = 0; s < 3; s++) {
        const int rows = shapes[s][0], C = shapes[s][1], n = rows * C, all = 2 * n + 2 * C;
        // in the order x, weight, bias, dy
        double *truth = (double *)allocate((size_t)(all + n) * sizeof(double)), *y = truth + all;
        real *ours = (real *)allocate((size_t)(all + 4 * n + 6 * C + 6 * rows) * sizeof(real));
        for (int i = 0; i < all; i++) {
            ours[i] = (real)(test_number(4, (uint64_t)i) + (i < n ? 5 : 0));
            truth[i] = ours[i];
        }
        const real *weight = ours + n, *bias = weight + C, *dy = bias + C;
        real *result[2], *mean = ours + all, *rstd = mean + rows, *next = rstd + rows;
        plain_layernorm(y, truth, truth + n, truth + n + C, truth + n + 2 * C, rows, C);
        const int threads = omp_get_max_threads(), results = 2 * n + 2 * C;
        for (int t = 0; t < 2; t++, next += results) {  // y, dx, dweight, dbias
            result[t] = next;
            omp_set_num_threads(t ? 3 : 1);
            for (int c = 0; c < 2 * C; c++) next[2 * n + c] = 1;  // gradients are added to what is there
            layernorm_forward(next, NULL, mean, rstd, ours, weight, bias, rows, C);
            layernorm_backward(next + n, next + 2 * n, next + 2 * n + C, dy, ours, mean, rstd, weight, rows, C);
        }
        omp_set_num_threads(threads);
        check(memcmp(result[0], result[1], (size_t)results * sizeof(real)) == 0, "layernorm: 1 and 3 threads differ");
        if (!IS_DOUBLE) {  // y once more as bf16
            bf16 *rounded = (bf16 *)allocate(((size_t)n + 1) * sizeof(bf16));
            rounded[n] = 42;
            layernorm_forward(result[1], rounded, mean, rstd, ours, weight, bias, rows, C);
            int wrong = memcmp(result[0], result[1], (size_t)n * sizeof(real)) != 0 || rounded[n] != 42;
            for (int i = 0; i < n; i++) wrong += rounded[i] != to_bf16((float)result[0][i]);
            check(wrong == 0, "layernorm %dx%d: %d numbers of bf16 are wrong", rows, C, wrong);
            free(rounded);
        }
        const double worst = worst_difference(result[0], y, (size_t)n, 0);
        check(worst < (IS_DOUBLE ? 1e-14 : 1e-6), "layernorm %dx%d: y differs by %.2e", rows, C, worst);
        for (int i = 0; i < n + 2 * C; i += n < 100 ? 1 : 211) {  // x, weight, bias
            const double kept = truth[i], step = 1e-5;
            double loss[2];
            for (int sign = 0; sign < 2; sign++) {
                truth[i] = kept + (sign ? step : -step);
                loss[sign] = plain_layernorm(y, truth, truth + n, truth + n + C, truth + n + 2 * C, rows, C);
            }
            truth[i] = kept;
            const double numeric = (loss[1] - loss[0]) / (2 * step);
            const double gradient = (double)result[0][n + i] - (i >= n);
            const double bound = (IS_DOUBLE ? 1e-7 : 1e-5) * (1 + fabs(numeric)) * (C == 4 ? 10 : 1);
            check(fabs(numeric - gradient) < bound, "layernorm %dx%d: derivative %d is %.9g, central difference %.9g",
                  rows, C, i, gradient, numeric);
        }
        free(truth), free(ours);
    }
}

static void test_maxpool(void) {
    const int shapes[][3] = {{1, 1, 3}, {7, 10, 19}, {12, 9, 64}};
    for (int s = 0; s < 3; s++) {
        const int H = shapes[s][0], W = shapes[s][1], C = shapes[s][2], h = (H + 1) / 2, w = (W + 1) / 2;
        const int n = H * W * C, m = h * w * C;
        real *x = (real *)allocate((size_t)(2 * n + 2 * m) * sizeof(real)), *dx = x + n, *y = dx + n, *dy = y + m;
        double *truth = (double *)allocate((size_t)n * sizeof(double));
        unsigned char *argmax = (unsigned char *)allocate((size_t)m);
        for (int i = 0; i < n; i++) x[i] = (real)((int)random_below(1, RANDOM_TEST, 5, 0, 0, (uint64_t)i, 4) - 5);
        if (s > 0) x[(3 * W + 4) * C + 1] = (real)NAN, x[(3 * W + 5) * C + C - 1] = (real)-INFINITY;
        for (int i = 0; i < m; i++) dy[i] = (real)test_number(6, (uint64_t)i);
        maxpool_forward(y, argmax, x, H, W, C, 0);
        maxpool_backward(dx, dy, argmax, H, W, C, 0);
        int wrong = 0, nans = 0;
        for (int i = 0; i < m; i++) {
            const int c = i % C, ox = i / C % w, oy = i / C / w;
            int tap = -1, place = -1;
            for (int t = 0; t < 9; t++) {  // few values: ties everywhere, the first one wins
                const int iy = 2 * oy - 1 + t / 3, ix = 2 * ox - 1 + t % 3, at = (iy * W + ix) * C + c;
                if (iy < 0 || ix < 0 || iy >= H || ix >= W) continue;
                if (tap < 0 || x[at] > x[place] || isnan(x[at])) tap = t, place = at;
            }
            truth[place] += dy[i];
            nans += isnan(y[i]) != 0;
            wrong += argmax[i] != tap || memcmp(y + i, x + place, sizeof(real)) != 0;
        }
        check(wrong == 0, "maxpool %dx%dx%d: %d outputs are wrong", H, W, C, wrong);
        check(nans == (s > 0 ? 2 : 0), "maxpool %dx%dx%d: the NaN is in %d outputs", H, W, C, nans);
        const double worst = worst_difference(dx, truth, (size_t)n, 0);
        check(worst < (IS_DOUBLE ? 1e-15 : 3e-7), "maxpool %dx%dx%d: dx differs by %.2e", H, W, C, worst);
        if (!IS_DOUBLE) {  // bf16 holds these x; dy is rounded
            bf16 *x_half = (bf16 *)allocate((size_t)(n + 2 * m) * sizeof(bf16)), *y_half = x_half + n;
            bf16 *dy_half = y_half + m;
            unsigned char *argmax_half = (unsigned char *)allocate((size_t)m);
            bf16 *dx_half = (bf16 *)allocate((size_t)n * sizeof(bf16));
            for (int i = 0; i < n; i++) x_half[i] = to_bf16((float)x[i]);
            for (int i = 0; i < m; i++) dy_half[i] = to_bf16((float)dy[i]), dy[i] = (real)from_bf16(dy_half[i]);
            maxpool_forward(y_half, argmax_half, x_half, H, W, C, 1);
            maxpool_backward(dx_half, dy_half, argmax, H, W, C, 1);
            maxpool_backward(dx, dy, argmax, H, W, C, 0);
            wrong = memcmp(argmax, argmax_half, (size_t)(m > 0 ? m : 0)) != 0;
            for (int i = 0; i < n; i++) wrong += dx_half[i] != to_bf16((float)dx[i]);
            for (int i = 0; i < m; i++) wrong += y_half[i] != to_bf16((float)y[i]);
            check(wrong == 0, "maxpool %dx%dx%d of bf16: %d numbers are wrong", H, W, C, wrong);
            free(x_half), free(argmax_half), free(dx_half);
        }
        free(x), free(truth), free(argmax);
    }
}

static void test_positions(void) {
    // PyTorch's own numbers (DETR's PositionEmbeddingSine in float64): h 2, w 3, 8 channels; cell (1, 0), then (0, 2)
    const double truth[2][8] = {
        {-3.1415910835174788e-06, 0.99999999999506517, 0.062790488175394621, 0.9980267304008924, 0.86602575284996186,
         -0.49999939540029131, 0.02094241290357339, 0.9997806836210511},
        {1.5707955417606774e-06, -0.99999999999876632, 0.031410743377923794, 0.99950656085913026,
         -2.0943944048159954e-06, 0.99999999999780675, 0.062790498626697402, 0.99802672974335249}};
    real pos[6 * 8];
    sine_positions(pos, 2, 3, 8);
    const double worst0 = worst_difference(pos + 3 * 8, truth[0], 8, 0);
    const double worst1 = worst_difference(pos + 2 * 8, truth[1], 8, 0);
    check(fmax(worst0, worst1) < (IS_DOUBLE ? 1e-14 : 1e-7), "positions differ by %.2e", fmax(worst0, worst1));
    // C / 2 odd: the last channel of a half is a sine
    real odd[2 * 3 * 6];
    sine_positions(odd, 2, 3, 6);
    const double last = sin(2 * 3.14159265358979323846 * 2 / (3 + 1e-6) / pow(10000, 2. / 3));
    check(fabs(odd[(1 * 3 + 1) * 6 + 5] - last) < 1e-7, "positions, C 6: last channel %.9g, expected %.9g",
          (double)odd[(1 * 3 + 1) * 6 + 5], last);
}

// ---------------------------------------------------------------------------------------------------------------------
// Against PyTorch: dev/dumps/

// set_loss() with the matches that PyTorch found.
static void dump_loss(const TruthDump *dump, const Model *model, Activations *acts, int step, int i, Targets targets,
                      LossDivisors divisors, const LossSettings *settings, Losses *losses) {
    int Q = model->config.num_queries, classes = num_logits(&model->config), L = model->config.dec_layers;
    dump_matches(dump, model, acts->match, step, i);
    for (int l = 0; l < L; l++)
        layer_loss(losses, acts->dlogits + l * Q * classes, acts->dboxes + l * Q * 4, acts->logits + l * Q * classes,
                   acts->boxes + l * Q * 4, acts->match + l * Q, l, &model->config, l == L - 1, targets, divisors,
                   settings, 1, acts->probabilities);
}

// The decoder with one layer, with two, ... with all: the answers of the last layer of each, put together, are those
// that PyTorch's decoder gives layer by layer. In the end acts are those of the whole network.
static void dump_layers(TruthDump *dump, Model *model, Activations *acts, int step, int i) {
    const int layers = model->config.dec_layers;
    const size_t numbers[2] = {(size_t)(model->config.num_queries * num_logits(&model->config)),
                               (size_t)(model->config.num_queries * 4)};
    real *ours[2];
    char name[64];
    for (int k = 0; k < 2; k++) ours[k] = (real *)allocate((size_t)layers * numbers[k] * sizeof(real));
    for (int l = 0; l < layers; l++) {
        model->config.dec_layers = l + 1;
        decoder_forward(model, acts);
        for (int k = 0; k < 2; k++)
            memcpy(ours[k] + (size_t)l * numbers[k], (k ? acts->boxes : acts->logits) + (size_t)l * numbers[k],
                   numbers[k] * sizeof(real));
    }
    for (int k = 0; k < 2; k++) {
        const size_t count = (size_t)layers * numbers[k];
        snprintf(name, sizeof name, "s%d.i%d.%s", step, i, k ? "pred_boxes" : "logits");
        compare_reals(dump, name, ours[k], count);
        compare_reals(dump, name, k ? acts->boxes : acts->logits, count);
        free(ours[k]);
    }
}

// One training step on the dump's images, compared with PyTorch's. In bf16 the matches are given: a pair that is near a
// tie may fall either way, which would make a different loss, and is no error.
static void dump_step(DumpCase *c, int step) {
    TruthDump *dump = &c->dump;
    Model *model = &c->model;
    const LossSettings *loss_settings = &c->loss;
    DumpImage images[DUMP_IMAGES];
    Targets targets[DUMP_IMAGES];
    Losses losses;
    int Q = model->config.num_queries, L = model->config.dec_layers, half = model->config.half, largest = 0;
    memset(&losses, 0, sizeof losses);
    for (int i = 0; i < DUMP_IMAGES; i++) {
        dump_image(dump, step, i, &images[i]);
        targets[i].num_boxes = images[i].num_boxes, targets[i].boxes = images[i].boxes,
        targets[i].classes = images[i].classes;
        if (images[i].height > largest) largest = images[i].height;
        if (images[i].width > largest) largest = images[i].width;
    }
    Activations acts;
    activations_create(&acts, model, largest, largest, 1, 1);
    LossDivisors divisors = {{0, 0}, {0, 0}, 0};
    for (int i = 0; i < DUMP_IMAGES; i++) divisors_add(&divisors, images[i].num_boxes, Q, loss_settings);
    zero_gradients(model);
    for (int i = 0; i < DUMP_IMAGES; i++) {
        acts.dropout.p = model->config.dropout, acts.dropout.seed = c->seed, acts.dropout.step = (uint32_t)step,
        acts.dropout.image = (uint32_t)i;
        activations_plan(&acts, model, images[i].height, images[i].width);
        for (int k = 0; k < images[i].height * images[i].width * 3; k++)
            store_number(acts.pixels, (size_t)k, images[i].pixels[k], half);
        backbone_forward(model, &acts);
        encoder_forward(model, &acts);
        dump_layers(dump, model, &acts, step, i);
        if (half)
            dump_loss(dump, model, &acts, step, i, targets[i], divisors, loss_settings, &losses);
        else
            set_loss(model, &acts, targets[i], divisors, loss_settings, &losses);
        compare_matches(dump, model, acts.match, step, i);
        network_backward(model, &acts);
        free(images[i].pixels), free(images[i].boxes), free(images[i].classes);
    }
    unfold_norms(model);
    losses.grad_norm = gradient_norm(model);
    losses_finish(&losses, L, loss_settings);
    compare_losses(dump, &losses, step, L, half);
    compare_gradients(dump, model, step, losses.grad_norm);
    optimizer_step(model, &c->optimizer, step, losses.grad_norm);
    activations_free(&acts);
}

// The steps of one dump. In bf16 only the first: Adam's first step is lr times the gradient's sign, and gradients are
// too far off to tell the sign of every element, so the second step starts from other weights than PyTorch's.
static void test_dump(const char *folder, int half) {
    DumpCase c;
    if (dump_case_open(&c, folder, half ? "bf16" : "float32", 4, half) != 0) return;
    // These networks are too narrow for Winograd's backward weight to pay. In float its rounding, where the plain sum
    // is exactly zero, would be seen after AdamW has divided it by its size; in double it is below eps.
    for (int i = 0; IS_DOUBLE && i < c.model.num_layers; i++)
        c.model.layers[i]->winograd_weight = c.model.layers[i]->winograd;
    for (int step = 0; step < (half ? 1 : DUMP_STEPS); step++) dump_step(&c, step);
    if (!half) compare_values(&c.dump, &c.model);
    dump_case_close(&c, half ? "bf16" : IS_DOUBLE ? "double" : "float");
}

static void test_dumps(void) {
    static const struct {
        const char *folder;
        int takes_bf16;  // every number of channels that is multiplied is even
    } dumps[] = {{"dev/dumps/basic", 1}, {"dev/dumps/bottleneck", 0}, {"dev/dumps/dc5", 0},
                 {"dev/dumps/odd", 0},   {"dev/dumps/even", 1},       {"dev/dumps/anchor", 1},
                 {"dev/dumps/dense", 1}, {"dev/dumps/gpu", 1},        {"dev/dumps/gpu_anchor", 1}};
    for (size_t f = 0; f < sizeof dumps / sizeof dumps[0]; f++) {
        test_dump(dumps[f].folder, 0);
        if (!IS_DOUBLE && dumps[f].takes_bf16) test_dump(dumps[f].folder, 1);
    }
}

// Twenty steps on given gradients under one of the schedules, with an average of the values; what the averages are
// swapped for, and back.
static void test_schedule(TruthDump *dump, const char *name) {
    enum { COUNT = 12, FIRST = 7, STEPS = 20 };  // the transformer's 7 numbers, the backbone's 5
    const SafeEntry *start = safetensors_find(&dump->truth, "start"),
                    *gradients = safetensors_find(&dump->truth, "gradients");
    char entry[4][64];
    const char *parts[4] = {"drop", "warmup", "factors", "values"};
    for (int i = 0; i < 4; i++) snprintf(entry[i], sizeof entry[i], "%s.%s", name, parts[i]);
    const int64_t drop = (int64_t)dump_scalar(dump, entry[0]), warmup = (int64_t)dump_scalar(dump, entry[1]);
    const Schedule schedule = {drop == 0, warmup, drop, STEPS};
    real numbers[4][COUNT];
    Param params[2], *table[2] = {&params[0], &params[1]};
    Model model;
    double factors[STEPS], values[2][COUNT];
    memset(&model, 0, sizeof model), memset(params, 0, sizeof params), memset(numbers, 0, sizeof numbers);
    model.params = table, model.num_params = 2;
    for (int i = 0; i < 2; i++) {
        const int first = i * FIRST;
        params[i].group = i ? GROUP_BACKBONE : GROUP_TRANSFORMER, params[i].trained = 1;
        params[i].count = i ? COUNT - FIRST : FIRST;
        params[i].value = numbers[0] + first, params[i].grad = numbers[1] + first;
        params[i].exp_avg = numbers[2] + first, params[i].exp_avg_sq = numbers[3] + first;
    }
    for (int k = 0; k < COUNT; k++) numbers[0][k] = (real)safetensors_element(start, k);
    ema_create(&model);
    check(params[1].ema[2] == params[1].value[2] && params[0].ema != params[0].value, "averages begin as the values");
    for (int step = 0; step < STEPS; step++) {
        const double factor = factors[step] = schedule_factor(&schedule, step);
        const OptimizerSettings optimizer = {
            factor * dump_scalar(dump, "settings.lr"), factor * dump_scalar(dump, "settings.lr_backbone"),
            dump_scalar(dump, "settings.weight_decay"), dump_scalar(dump, "settings.clip_max_norm"),
            dump_scalar(dump, "settings.ema_decay")};
        for (int k = 0; k < COUNT; k++) numbers[1][k] = (real)safetensors_element(gradients, step * COUNT + k);
        optimizer_step(&model, &optimizer, step, gradient_norm(&model));
    }
    for (int average = 0; average < 2; average++) {
        for (int k = 0; k < COUNT; k++) values[average][k] = (double)params[k >= FIRST].value[k % FIRST];
        ema_swap(&model);
    }
    check(params[0].value == numbers[0], "two swaps leave the values where they were");
    compare(dump, entry[2], factors, STEPS, 0, 1e-10);
    compare(dump, entry[3], values[0], COUNT, 0, 1e-10);
    snprintf(entry[3], sizeof entry[3], "%s.ema", name);
    compare(dump, entry[3], values[1], COUNT, 0, 1e-10);
    arena_free(&model.ema);
}

// What is told of the boxes of a picture: 6 queries, 3 targets.
static void test_watch_boxes(TruthDump *dump) {
    enum { QUERIES = 6, TARGETS = 3 };
    real boxes[2 * QUERIES * 4];
    double targets[TARGETS * 4];
    int match[2 * QUERIES], classes[TARGETS] = {0, 0, 0};
    const SafeEntry *pairs = safetensors_find(&dump->truth, "matches");
    for (int k = 0; k < 2 * QUERIES * 4; k++)  // the layer before the last has boxes of its own
        boxes[k] = k < QUERIES * 4
                       ? (real)0.5
                       : (real)safetensors_element(safetensors_find(&dump->truth, "boxes"), k - QUERIES * 4);
    for (int k = 0; k < TARGETS * 4; k++)
        targets[k] = safetensors_element(safetensors_find(&dump->truth, "targets"), k);
    for (int q = 0; q < 2 * QUERIES; q++) match[q] = q < QUERIES ? 0 : -1;
    for (int p = 0; p < TARGETS; p++)
        match[QUERIES + (int)safetensors_element(pairs, 2 * p)] = (int)safetensors_element(pairs, 2 * p + 1);
    Model model;
    Activations acts;
    Losses losses;
    memset(&model, 0, sizeof model), memset(&acts, 0, sizeof acts), memset(&losses, 0, sizeof losses);
    model.config.num_queries = QUERIES, model.config.dec_layers = 2;
    acts.boxes = boxes, acts.match = match;
    const Targets given = {TARGETS, targets, classes};
    for (int image = 0; image < 2; image++) watch_boxes(&model, &acts, given, 2, &losses);
    losses.matched_iou /= 2 * TARGETS;
    compare(dump, "matched_iou", &losses.matched_iou, 1, 0, 1e-10);
    compare(dump, "query_spread", &losses.query_spread, 1, 0, 1e-10);
}

// A plan that no size of pictures makes small enough says so: here are more boxes of an evaluation than any memory
// holds.
static void test_plan_without_size(void) {
    Settings settings = settings_for("test_detr", "train", TRAIN);
    Training run;
    Error error;
    memset(&run, 0, sizeof run);
    small_model(&run.network.model, BASIC, 0, 0);
    run.settings = &settings, run.loader.batch_size = 1, run.loader.short_side = 64, run.loader.max_size = 96;
    run.val.num_images = INT32_MAX;
    check(training_plan(&run, 64, 96, &error) == -1 && strstr(error.text, "no picture size fits"),
          "a plan without a size: %s", error.text);
    model_free(&run.network.model);
}

// A step of `bench` that fails ends it.
static void test_bench_fails(void) {
    SmallRun small;
    Error error;
    small_run_begin(&small, BASIC, 0, 0, 1);
    small.model.input_projection.weight->value[0] = (real)NAN;
    model_pack(&small.model);
    check(bench_seconds(&small.model, &small.acts, &SMALL_LOSS, small.samples, SMALL_BATCH, 1, 0, &error) == -1 &&
              strstr(error.text, "model.input_projection.weight"),
          "bench: %s", error.text);
    small_run_end(&small);
}

// The best evaluation is the one with the highest AP, of equal ones that with the lowest loss; patience counts from it.
static void test_best(void) {
    static const double evaluations[][3] = {
        // AP, loss, is the best so far
        {0, 5, 1}, {0, 6, 0}, {0, 4, 1}, {0.1, 9, 1}, {0.1, 9, 0}, {0.05, 1, 0}, {0.1, 8, 1}};
    Settings settings = settings_for("test_detr", "train", TRAIN);
    Training run;
    memset(&run, 0, sizeof run);
    run.settings = &settings, run.best.epoch = -1;
    flag_set(&settings, "patience", "2", FROM_USER);
    for (int i = 0; i < 7; i++) {
        run.epochs_logged = 10 + i;
        const int better = training_judge(&run, evaluations[i][0], evaluations[i][1]);
        check(better == evaluations[i][2] && training_is_over(&run) == (i == 5),
              "evaluation %d: best so far %d, over %d", i, better, training_is_over(&run));
    }
    check(run.best.epoch == 16 && run.best.ap == 0.1 && run.best.loss == 8, "the best evaluation is the last");
    flag_set(&settings, "patience", "0", FROM_USER), run.best.evaluations = 100;
    check(!training_is_over(&run), "without patience nothing ends early");
}

// What trainer_state.json says of fp16's scale comes back; a run on the CPU says nothing.
static void test_loss_scale_state(void) {
    const LossScale states[3] = {{16777216, 1999, 12}, {1, 0, 0}, {0, 0, 0}};
    for (int i = 0; i < 3; i++) {
        char *text = NULL;
        size_t size;
        FILE *file = open_memstream(&text, &size);
        fputs("{\n", file);
        loss_scale_write(file, &states[i]);
        fputs(" \"step\": 0\n}\n", file);
        fclose(file);
        Error error;
        ConfigReader reader = {"state", &error, 0};
        yajl_val tree = json_parse(text, size, "state", &error);
        LossScale read = {7, 7, 7};
        if (tree) loss_scale_read(&read, &reader, tree);
        check(tree && !reader.failed && memcmp(&read, &states[i], sizeof read) == 0,
              "the loss's scale comes back: %g, %d, %d", (double)read.scale, read.good_steps, read.skipped);
        check((strstr(text, "scale") != NULL) == (i < 2), "the state says: %s", text);
        yajl_tree_free(tree);
        free(text);
    }
    static const char *const bad[3] = {"{\"loss_scale\": {\"scale\": 3}}", "{\"loss_scale\": {\"scale\": -2}}",
                                       "{\"loss_scale\": {\"scale\": 2, \"good_steps\": 2000}}"};
    for (int i = 0; i < 3; i++) {
        Error error;
        LossScale read;
        ConfigReader reader = {"state", &error, 0};
        yajl_val tree = json_parse(bad[i], strlen(bad[i]), "state", &error);
        loss_scale_read(&read, &reader, tree);
        check(reader.failed, "%s is refused", bad[i]);
        yajl_tree_free(tree);
    }
}

// What needs no network: schedules, the average of the values, what is told of the boxes, the best checkpoint.
static void test_options(void) {
    static const char *const schedules[] = {"drop", "warm", "cosine", "both"};
    TruthDump dump;
    if (dump_open(&dump, "dev/dumps/options", "float32", 4) != 0) return;
    for (int i = 0; i < 4; i++) test_schedule(&dump, schedules[i]);
    test_watch_boxes(&dump);
    test_best();
    test_plan_without_size();
    test_bench_fails();
    test_loss_scale_state();
    safetensors_close(&dump.truth);
}

// ImageNet's mean and deviation, channel by channel.
static void test_normalise(void) {
    unsigned char bytes[6] = {0, 128, 255, 200, 7, 60};
    static const double truth[6] = {-2.1179039301310043, 0.20518207282913165, 2.6399999999999997,
                                    1.3070468362017296,  -1.9131652661064424, -0.7586928104575165};
    real pixels[6];
    Image image = {2, 1, bytes};
    normalise_pixels(pixels, &image, 0);
    for (int i = 0; i < 6; i++)
        check(fabs((double)pixels[i] - truth[i]) < (IS_DOUBLE ? 1e-14 : 1e-6),
              "normalised pixel %d is %.17g, not %.17g", i, (double)pixels[i], truth[i]);
    bf16 rounded[6];
    if (!IS_DOUBLE) normalise_pixels(rounded, &image, 1);
    for (int i = 0; i < 6 && !IS_DOUBLE; i++)
        check(rounded[i] == to_bf16((float)pixels[i]), "normalised pixel %d of bf16 is 0x%04X", i, rounded[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the anchor decoder starts from, and predictions

// The boxes of 100 queries cover the picture evenly: of its 25 parts each has the centres of 2 to 6 boxes (4 on
// average). No layer moves them yet, and no class is likely.
static void test_anchor_queries(void) {
    Model model;
    Error error;
    ModelConfig config = small_config(ANCHOR);
    config.num_queries = 100, config.dec_layers = 2;
    check(model_create(&model, &config, 0, 0, 0, &error) == 0, "the anchor model is created");
    model_initialise(&model, 3);
    model_pack(&model);
    Activations acts;
    Sample samples[SMALL_BATCH];
    small_batch(samples);
    activations_create(&acts, &model, 70, 70, 0, 1);
    predict_image(&model, &acts, &samples[0].image);
    int centres[25] = {0}, wrong = 0;
    for (int q = 0; q < config.num_queries; q++) {
        const real *box = acts.boxes + 4 * (config.num_queries + q);
        for (int i = 0; i < 4; i++) wrong += fabs((double)(box[i] - acts.boxes[4 * q + i])) > 0;
        for (int i = 0; i < 2; i++) {
            wrong += fabs((double)box[2 + i] - ANCHOR_SIZE) > 1e-6;
            wrong += box[i] - box[2 + i] / 2 < (real)-1e-6 || box[i] + box[2 + i] / 2 > (real)(1 + 1e-6);
        }
        const double span = 1 - ANCHOR_SIZE, low = ANCHOR_SIZE / 2;
        centres[(int)(((double)box[0] - low) / span * 5) + 5 * (int)(((double)box[1] - low) / span * 5)]++;
    }
    for (int part = 0; part < 25; part++) wrong += centres[part] < 2 || centres[part] > 6;
    for (int c = 0; c < config.num_labels; c++)
        wrong += fabs(1 / (1 + exp(-(double)model.class_head.bias->value[c])) - 0.01) > 1e-6;
    check(wrong == 0, "%d numbers of what the anchor decoder starts from are wrong", wrong);
    free_batch(samples, SMALL_BATCH);
    activations_free(&acts);
    model_free(&model);
}

// With focal loss, the pairs of a query and a class in the order of their scores; of equal ones the earlier pair first.
static void test_detections(void) {
    SmallRun small;
    small_run_begin(&small, ANCHOR, 0, 0, 0);
    const ModelConfig *config = &small.model.config;
    const int pairs = config->num_queries * config->num_labels;
    predict_image(&small.model, &small.acts, &small.samples[0].image);
    for (int i = 0; i < pairs; i++)  // every value twice
        small.acts.logits[i] = (real)(8 * test_uniform(8, (uint64_t)(i * 5 % pairs / 2)) - 4);
    Network network;
    memset(&network, 0, sizeof network);
    network.config = *config;
    Detection *found = (Detection *)allocate((size_t)config->num_queries * sizeof(Detection));
    detect(&network, &small.acts, 200, 100, found);
    int wrong = 0;
    for (int d = 0; d < config->num_queries; d++) {
        const int pair = found[d].query * config->num_labels + found[d].label;
        const real logit = small.acts.logits[pair], *box = small.acts.boxes + 4 * found[d].query;
        int before = 0;
        for (int i = 0; i < pairs; i++)
            before += small.acts.logits[i] > logit || (small.acts.logits[i] == logit && i < pair);
        wrong += before != d || fabs(found[d].score - 1 / (1 + exp(-(double)logit))) > 1e-12 ||
                 fabs(found[d].box[2] - 200 * ((double)box[0] + (double)box[2] / 2)) > 1e-9 ||
                 fabs(found[d].box[1] - 100 * ((double)box[1] - (double)box[3] / 2)) > 1e-9;
    }
    check(wrong == 0, "focal: %d of %d detections are not the best pairs of a query and a class, in order", wrong,
          config->num_queries);
    free(found);
    small_run_end(&small);
}

// With fewer decoder layers: those behind are not computed, and the boxes are those that the last of the others gave
// before. What evaluate() collects layer by layer in one pass is what it finds with so many layers.
static void test_detections_by_layer(void) {
    enum { LAYERS = 2, PICTURES = 3 };
    SmallRun small;
    Network network;
    small_run_begin(&small, BASIC, 0, 0, 0);
    memset(&network, 0, sizeof network);
    network.config = small.model.config, network.model = small.model;
    const int Q = network.config.num_queries;
    Detection *found = (Detection *)allocate((size_t)Q * sizeof(Detection));
    predict_image(&network.model, &small.acts, &small.samples[0].image);
    real *boxes = (real *)allocate((size_t)Q * 4 * sizeof(real)), *behind = small.acts.decoder_ffn[1].out;
    memcpy(boxes, small.acts.boxes, (size_t)Q * 4 * sizeof(real));
    behind[0] = 12345;
    dec_layers_use(&network, 1);
    predict_image(&network.model, &small.acts, &small.samples[0].image);
    detect(&network, &small.acts, 1, 1, found);
    int wrong = behind[0] != 12345;
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < 2; i++)
            wrong += fabs(found[q].box[i] + found[q].box[i + 2] - 2 * (double)boxes[4 * q + i]) > 1e-5;
    check(wrong == 0, "with one decoder layer %d numbers are not that layer's", wrong);

    Dataset set;
    Error error;
    const int opened = dataset_open(&set, "data/bccd", "val", &error), num_images = set.num_images;
    check(opened == 0, "%s", opened ? error.text : "");
    if (opened != 0) return;
    LoaderSettings loader;
    memset(&loader, 0, sizeof loader);
    loader.short_side = 48, loader.max_size = 64;
    const int labels[3] = {0, 1, 2};
    EvalDetection *one_pass[LAYERS], *alone;
    int counts[LAYERS], count;
    double seconds[LAYERS] = {0};
    set.num_images = PICTURES;
    dec_layers_use(&network, LAYERS);
    evaluate(&network, &small.acts, &set, loader, labels, NULL, NULL, NULL, LAYERS, one_pass, counts, seconds);
    check(network.config.dec_layers == LAYERS, "%d decoder layers are left", network.config.dec_layers);
    check(seconds[0] > 0 && seconds[1] > 0 && seconds[0] != seconds[1], "one decoder layer takes %g s, two %g",
          seconds[0], seconds[1]);  // each its own time; which is longer a busy machine decides
    for (int l = 0; l < LAYERS; l++) {
        dec_layers_use(&network, l + 1);
        evaluate(&network, &small.acts, &set, loader, labels, NULL, NULL, NULL, 1, &alone, &count, NULL);
        wrong = count != PICTURES * Q || counts[l] != count;
        for (int d = 0; d < count && !wrong; d++)
            wrong += memcmp(alone[d].box, one_pass[l][d].box, sizeof alone[d].box) != 0 ||
                     alone[d].score != one_pass[l][d].score || alone[d].image != one_pass[l][d].image;
        check(wrong == 0, "decoder layer %d finds other boxes in the pass for all layers", l + 1);
        free(alone);
        free(one_pass[l]);
    }
    set.num_images = num_images;
    dataset_free(&set);
    free(found);
    free(boxes);
    small_run_end(&small);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is said when a training does not go well

// What warn_of_data writes about a data set, into said: (size).
static void data_warnings(char *said, size_t size, const Dataset *set, int num_queries, int anchor, int from_scratch) {
    ModelConfig config;
    memset(&config, 0, sizeof config);
    config.num_queries = num_queries, config.anchor = anchor;
    memset(said, 0, size);
    FILE *file = fmemopen(said, size, "w");
    warn_of_data(file, set, &config, from_scratch);
    fclose(file);
}

static void test_warn_of_data(void) {
    enum { MANY = 10000 };
    Annotation *boxes = (Annotation *)allocate(10 * sizeof(Annotation));
    DatasetImage *images = (DatasetImage *)allocate(MANY * sizeof(DatasetImage));
    Dataset set;
    memset(&set, 0, sizeof set);
    set.images = images, set.annotations = boxes, set.source = (char *)"made up";
    set.num_images = MANY, set.num_targets = 9;
    images[0].num_annotations = 4, images[1].num_annotations = 6, images[1].first_annotation = 4;
    boxes[9].crowd = 1;  // no target: the second picture has five
    const struct {
        int num_images, num_targets, num_queries, anchor, from_scratch;
        const char *text;  // what is said, NULL: nothing
    } cases[] = {
        {MANY, 9, 5, 0, 1, NULL},
        {MANY, 9, 4, 0, 1, "warning: 1 images have more boxes than the 4 queries (up to 5)"},
        {MANY, 9, 3, 0, 0, "warning: 2 images have more boxes than the 3 queries (up to 5)"},
        {MANY - 1, 9, 5, 0, 1, "warning: 9999 images are few for a DETR from scratch"},
        {MANY - 1, 9, 5, 0, 1, "--preset small is a recipe"},
        {MANY - 1, 9, 5, 0, 0, NULL},
        {MANY - 1, 9, 5, 1, 1, NULL},
        {1000, 9, 5, 1, 1, NULL},
        {999, 9, 5, 1, 1, "warning: 999 images are few to learn from scratch"},
        {999, 9, 5, 1, 0, NULL},
        {MANY, 0, 5, 0, 1, "warning: made up has no box to train on"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        set.num_images = cases[i].num_images, set.num_targets = cases[i].num_targets;
        char said[1024];
        data_warnings(said, sizeof said, &set, cases[i].num_queries, cases[i].anchor, cases[i].from_scratch);
        check(cases[i].text ? has_text(said, cases[i].text) && strchr(said, '\n')[1] == 0 : said[0] == 0,
              "warnings about data, case %zu: said is \"%s\"", i, said);
    }
    free(boxes);
    free(images);
}

static void test_log_seconds(void) {
    static const struct {
        const char *text;
        double seconds;
    } logs[] = {{"\n", 0},
                {"{\"epoch\": 0}\n", 0},
                {"{\"epoch\": 0, \"seconds\": 1.5}\n{\"epoch\": 1, \"seconds\": 3.2}\n", 3.2},
                {"{\"epoch\": 0, \"seconds\": 1.5}\n{\"epoch\": 1}", 1.5}};
    for (size_t i = 0; i < sizeof logs / sizeof logs[0]; i++) {
        FILE *log = fmemopen((char *)logs[i].text, strlen(logs[i].text), "r");
        const double seconds = log_seconds(log);
        check(seconds == logs[i].seconds, "a log says how long its epochs took: %g seconds, not %g", seconds,
              logs[i].seconds);
        fclose(log);
    }
}

// A preset comes before the defaults and after the user, who can switch off what it switches on.
static void test_preset(void) {
    for (int off = 0; off < 2; off++) {
        const char *words[] = {"train", "--preset", "small", "--dropout", "0.1", "--dilation=off"};
        Settings settings = settings_for("test_detr", "train", TRAIN);
        optind = 1;
        settings_parse(&settings, off ? 6 : 5, (char **)words);
        check(flag_on(&settings, "dilation") == !off && flag_number(&settings, "dropout") == 0.1 &&
                  flag_int(&settings, "enc_layers") == 0 && flag_int(&settings, "save_steps") == 0,
              "a preset, one of its numbers changed, its switch %s", off ? "off" : "on");
    }
    const char *words[] = {"train", "--preset", "detr"};
    Settings settings = settings_for("test_detr", "train", TRAIN), plain = settings_for("test_detr", "train", TRAIN);
    optind = 1;
    settings_parse(&settings, 3, (char **)words);
    optind = 1;
    settings_parse(&plain, 1, (char **)words);
    for (int i = 0; i < settings.num_flags; i++)
        check(strcmp(settings.flags[i].name, "preset") == 0 || settings.text[i] == plain.text[i] ||
                  (settings.text[i] && plain.text[i] && strcmp(settings.text[i], plain.text[i]) == 0),
              "--preset detr: %s is the default", settings.flags[i].name);
}

// A made-up history of steps: what they measure at a step, and after which steps something has to be said.
typedef struct {
    const char *name;
    int64_t first, last_step;             // the first step of this process is first + 1
    double decay, spread, waiting, rate;  // the loss is exp(-decay * step)
    int sign;                             // the one to be said, 0: none
    int64_t step;                         // and after which step
    const char *text;
} History;

static void test_watch(void) {
    static const History histories[] = {
        {"healthy", 0, 3000, 1e-3, 0.3, 0.1, 1, 0, 0, ""},
        {"just healthy", 0, 3000, 2.1e-5, 0.0101, 0.25, 1, 0, 0, ""},
        {"one box", 0, 3000, 1e-3, 0.0099, 0.1, 1, SAME_BOX, 200,
         "step 200: all queries predict nearly the same box (spread of their centres 0.0099"},
        {"one box, resumed", 700, 3000, 1e-3, 0.0099, 0.1, 1, SAME_BOX, 701, "step 701: all queries predict"},
        {"flat", 0, 3000, 0, 0.3, 0.1, 1, FLAT_LOSS, 1000,
         "step 1000: the loss does not fall: 1.0000 over the last 500 steps, 1.0000 over those before"},
        {"nearly flat", 0, 3000, 1.9e-5, 0.3, 0.1, 0.5, FLAT_LOSS, 1000, "0.9858 over the last 500 steps, 0.9953 over"},
        {"flat, a long run", 0, 40000, 0, 0.3, 0.1, 1, FLAT_LOSS, 4000, "over the last 2000 steps"},
        {"flat at the end of a schedule", 0, 3000, 0, 0.3, 0.1, 0.49, 0, 0, ""},
        {"waiting", 0, 3000, 1e-3, 0.3, 0.41, 1, SLOW_DATA, 100,
         "41 % of the time the training waits for pictures to be read: more than 2 --num_workers"},
        {"waiting, resumed", 700, 3000, 1e-3, 0.3, 0.41, 1, SLOW_DATA, 800, "41 % of the time"},
    };
    test_warn_of_data();
    test_preset();
    test_log_seconds();
    for (size_t h = 0; h < sizeof histories / sizeof histories[0]; h++) {
        const History *history = &histories[h];
        Watch watch = watch_begin(history->last_step);
        Losses losses;
        memset(&losses, 0, sizeof losses);
        losses.query_spread = history->spread;
        int wrong = 0, times = 0;
        char said[1024] = "";
        FILE *file = fmemopen(said, sizeof said, "w");
        for (int64_t step = history->first + 1; step <= history->last_step && step < 6000; step++) {
            losses.loss = exp(-history->decay * (double)step);
            const int signs = watch_step(&watch, step, history->rate, &losses, history->waiting);
            watch_say(file, &watch, signs, step, &losses, history->waiting, 2);
            times += signs != 0;
            wrong += signs != (history->sign && step == history->step ? history->sign : 0);
        }
        fclose(file);
        check(wrong == 0 && times == (history->sign != 0) && has_text(said, history->text) &&
                  (history->sign || said[0] == 0),
              "history \"%s\": something is said %d times, at %d steps wrongly: %s", history->name, times, wrong, said);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Learning by heart

// AP50 of the model's predictions on the pictures it is given, boxes in percent of the picture.
static double average_precision_50(Model *model, Activations *acts, const Sample *samples, int count) {
    enum { MAX_QUERIES = 16 };
    int num_truths = 0, num_detections = 0;
    EvalTruth truths[64];
    EvalDetection detections[4 * MAX_QUERIES];
    Detection found[MAX_QUERIES];
    Network network;
    memset(truths, 0, sizeof truths);
    memset(&network, 0, sizeof network);
    network.config = model->config;
    for (int i = 0; i < count; i++) {
        predict_image(model, acts, &samples[i].image);
        for (int b = 0; b < samples[i].num_boxes; b++) {
            const double *box = samples[i].boxes + 4 * b;
            EvalTruth *truth = &truths[num_truths++];
            truth->image = i, truth->category = samples[i].classes[b];
            for (int k = 0; k < 4; k++) truth->box[k] = 100 * (k < 2 ? box[k] - box[k + 2] / 2 : box[k]);
            truth->area = truth->box[2] * truth->box[3];
        }
        detect(&network, acts, 100, 100, found);
        for (int q = 0; q < model->config.num_queries; q++) {
            const double *box = found[q].box;
            EvalDetection detection = {
                i, found[q].label, {box[0], box[1], box[2] - box[0], box[3] - box[1]}, found[q].score};
            detections[num_detections++] = detection;
        }
    }
    CocoScores scores;
    coco_evaluate(&scores, truths, num_truths, detections, num_detections, model->config.num_labels);
    double ap50 = scores.stats[1];
    coco_scores_free(&scores);
    return ap50;
}

// A batch of four real pictures is learned from random weights. It takes some 400 steps; a sign or a factor that is
// wrong anywhere on the way back shows here even if no formula was ever compared.
static void test_learns_by_heart_in(int kind, int half) {
    enum { PICTURES = 4, MAX_BOXES = 8, MAX_STEPS = 1000 };
    Error error;
    Dataset dataset;
    int opened = dataset_open(&dataset, "data/bccd", "train", &error);
    check(opened == 0, "%s", opened ? error.text : "");
    if (opened != 0) return;
    LoaderSettings settings;
    memset(&settings, 0, sizeof settings);
    settings.seed = 1, settings.short_side = 96, settings.max_size = 192, settings.batch_size = PICTURES;
    Sample samples[PICTURES];
    int found = 0;
    for (int i = 0; i < dataset.num_images && found < PICTURES; i++) {
        sample_make(&samples[found], &dataset, &settings, 0, i);
        if (samples[found].num_boxes > 0 && samples[found].num_boxes <= MAX_BOXES)
            found++;
        else
            sample_free(&samples[found]);
    }
    ModelConfig config = small_config(kind);
    for (int s = 0; s < 3; s++) config.depths[s] = 1, config.widths[s] = 24 << s;
    config.stem_width = 16, config.hidden_dim = 64, config.enc_layers = 1, config.dec_layers = 2,
    config.dim_feedforward = 128, config.num_queries = 10, config.half = half;
    Model model;
    Activations acts;
    Losses losses;
    OptimizerSettings optimizer = {1e-3, 1e-3, 1e-4, 0.1, 0};
    model_create(&model, &config, PICTURES, 1, 1, &error);
    model_initialise(&model, 1);
    calibrate_norms(&model, samples, PICTURES, 1);
    model_pack(&model);
    activations_create(&acts, &model, 192, 192, 1, 1);
    double ap50 = 0, first_loss = 0;
    int step = 0;
    for (; step < MAX_STEPS && ap50 < 0.95; step++) {
        if (training_step(&model, &acts, &SMALL_LOSS, &optimizer, samples, PICTURES, 1, step, &losses, &error) != 0)
            break;
        if (step == 0) first_loss = losses.loss;
        if (step % 50 == 49) ap50 = average_precision_50(&model, &acts, samples, PICTURES);
    }
    const char *name = KIND_NAMES[kind], *type = half ? " in bf16" : "";
    printf("  learned by heart, %s%s: AP50 %.3f after %d steps, loss %.2f from %.2f\n", name, type, ap50, step,
           losses.loss, first_loss);
    check(ap50 >= 0.95, "four pictures are learned by heart, %s%s: AP50 is %.3f after %d steps", name, type, ap50,
          step);
    check(losses.loss < first_loss / 4, "the loss falls: %.3f from %.3f", losses.loss, first_loss);
    free_batch(samples, PICTURES);
    activations_free(&acts);
    model_free(&model);
    dataset_free(&dataset);
}

static void test_learns_by_heart(void) {
    if (IS_DOUBLE) return;  // the float build does it, in half the time
    for (int half = 0; half < 2; half++) {
        test_learns_by_heart_in(BASIC, half);
        test_learns_by_heart_in(ANCHOR, half);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What a run gathers for its report

static void test_run_report(void) {
    static const char *const words[7] = {"./a", "--data", "a b", "it's", "", "$x<&", "x=1,%@:+"};
    char *line = shell_command(7, (char **)words);
    check(strcmp(line, "./a --data 'a b' 'it'\\''s' '' '$x<&' x=1,%@:+") == 0, "report: the command: %s", line);
    free(line);
    Dataset set;
    memset(&set, 0, sizeof set);
    RunReport *report = (RunReport *)allocate(sizeof *report);
    for (set.num_images = 0; set.num_images < 40; set.num_images += 5) {
        run_report_choose(report, &set);
        int rising = 1;
        for (int i = 1; i < report->num_shown; i++) rising &= report->shown[i].image > report->shown[i - 1].image;
        check(report->num_shown == (set.num_images < 12 ? set.num_images : 12) && rising &&
                  (set.num_images == 0 || report->shown[report->num_shown - 1].image < set.num_images),
              "report: pictures that are shown, of %d", set.num_images);
    }
    free(report);
}

// Every task once, with any number of threads; a thread's own range in order, then the others' from their ends.
static void test_tasks(void) {
    enum { MOST = 1000 };
    static const int threads[] = {1, 2, 3, MOST_RANGES + 3}, counts[] = {0, 1, 2, 7, MOST};
    static const long order[2][6] = {{0, 1, 4, 3, 2, -1}, {2, 3, 4, 1, 0, -1}};
    const int threads_before = omp_get_max_threads();
    for (int t = 0; t < 4; t++) {
        omp_set_num_threads(threads[t]);
        for (int c = 0; c < 5; c++) {
            int taken[MOST] = {0}, wrong = 0;
            Tasks tasks = share_tasks(counts[c]);
#pragma omp parallel reduction(+ : wrong)
            for (long task; (task = take_task(&tasks)) >= 0;) {
                if (task < counts[c])
                    __atomic_fetch_add(&taken[task], 1, __ATOMIC_RELAXED);
                else
                    wrong++;
            }
            for (int i = 0; i < counts[c]; i++) wrong += taken[i] != 1;
            check(wrong == 0, "tasks: %d for %d threads: %d not taken once", counts[c], threads[t], wrong);
        }
    }
    omp_set_num_threads(2);
    for (int thread = 0; thread < 2; thread++) {
        long taken[6] = {0};
        Tasks tasks = share_tasks(5);
#pragma omp parallel
        for (int i = 0; i < 6 && omp_get_thread_num() == thread; i++) taken[i] = take_task(&tasks);
        check(memcmp(taken, order[thread], sizeof taken) == 0, "tasks: the order of thread %d of 2, alone", thread);
    }
    omp_set_num_threads(threads_before);
}

// ---------------------------------------------------------------------------------------------------------------------

static const Test TESTS[] = {
    {"random", test_random},
    {"tasks", test_tasks},
    {"matmul", test_matmul},
    {"winograd", test_winograd},
    {"bf16", test_bf16},
    {"attention", test_attention},
    {"dropout", test_dropout},
    {"layernorm", test_layernorm},
    {"maxpool", test_maxpool},
    {"positions", test_positions},
    {"matching", test_matching},
    {"boxes", test_boxes},
    {"normalise", test_normalise},
    {"dumps", test_dumps},
    {"options", test_options},
    {"queries", test_anchor_queries},
    {"detections", test_detections},
    {"detections_by_layer", test_detections_by_layer},
    {"watch", test_watch},
    {"gradients", test_gradients},
    {"inference", test_inference},
    {"same_bytes", test_same_bytes},
    {"company", test_company},
    {"frozen", test_frozen},
    {"step", test_training_step},
    {"one_picture", test_one_picture},
    {"calibrate", test_calibrate},
    {"track", test_track},
    {"nonfinite", test_nonfinite},
    {"refused", test_refused},
    {"memory_free", test_memory_free},
    {"plan", test_plan},
    {"heart", test_learns_by_heart},
    {"image", test_image},
    {"dataset", test_dataset},
    {"fileset", test_fileset},
    {"eval", test_eval},
    {"report", test_run_report},
    {"shapes", test_shapes},
};

static void run_test(const Test *test) { test->run(); }

int MAIN(int argc, char **argv) {
    wait_briefly(argv);
    printf("numbers are %s, kernel: %s\n", IS_DOUBLE ? "double" : "float", KERNEL);
    return run_tests(TESTS, (int)(sizeof TESTS / sizeof TESTS[0]), run_test, argc, argv);
}
