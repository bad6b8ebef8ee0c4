/*
What a user runs: train, check, eval, predict, score, bench. Files, flags, progress and signals are dealt with here;
every number comes from the rooms of train_detr.c before it.

Part of train_detr.c, which includes it last.
*/
#ifndef DETR_COMMANDS_H
#define DETR_COMMANDS_H

// ---------------------------------------------------------------------------------------------------------------------
// Commands: what they share

// Opens a split; its problems go to stderr, one a line, unless the command lists them itself. 0, or -1.
static int open_split(Dataset *set, const Settings *settings, const char *split, Error *error) {
    if (dataset_open(set, flag_text(settings, "data"), split, error) != 0) return -1;
    for (int i = 0; i < set->num_problems && !(settings->command & CHECK); i++)
        fprintf(stderr, "%s\n", set->problems[i]);
    return 0;
}

// Who computes: the functions of this name, or those of train_detr.cu on a GPU, which has values of its own.
static int engine_start(const Settings *settings, Model *model, Activations *acts, int height, int width, int side,
                        int training, int in_flight, int most_targets, Error *error) {
    (void)settings, (void)side, (void)most_targets, (void)error;
    activations_create(acts, model, height, width, training, in_flight);
    return 0;
}

static int step_is_done(Model *model, Error *error) {
    (void)model, (void)error;
    return 0;
}

static void encode_sample(const Model *model, Activations *acts, const Sample *sample) {
    encode_image(model, acts, &sample->image);
}

static void values_are_here(Model *model) { (void)model; }

static struct {
    int is_gpu;
    // Plans and takes memory for pictures of at most this size, with so many boxes; side: the loader's defer_side. 0,
    // or -1 with the reason.
    int (*start)(const Settings *, Model *, Activations *, int height, int width, int side, int training, int in_flight,
                 int most_targets, Error *);
    // Begins a step. `finish` waits for the oldest step that was begun, whose losses are there then: no more than two
    // may be under way, whose samples stay meanwhile. 0, or -1 with the reason.
    int (*train)(Model *, Activations *, const LossSettings *, const OptimizerSettings *, const Sample *,
                 int batch_size, uint64_t seed, int64_t step, Losses *, Error *);
    int (*finish)(Model *, Error *);
    void (*encode)(const Model *, Activations *, const Sample *);
    void (*decode)(const Model *, Activations *);
    void (*fetch)(Model *), (*send)(Model *);  // the model's values before they are used here, after they were changed
    char device[300];                          // what a GPU is called
    size_t bytes;                              // of its memory that start() has taken
} engine = {
    0, engine_start, training_step, step_is_done, encode_sample, decoder_forward, values_are_here, values_are_here, "",
    0};

// The side, in pixels, up to which the loader leaves pictures to the GPU (LoaderSettings): the longest of those in the
// files, but no more than MOST_DEFERRED_SIDE, and no less than what the network sees at most. Larger ones are done by
// the loader's threads, as all are without a GPU.
enum { MOST_DEFERRED_SIDE = 2048 };

static int defer_side(int longest, int height, int width) {
    if (!engine.is_gpu) return 0;
    int side = longest < MOST_DEFERRED_SIDE ? longest : MOST_DEFERRED_SIDE;
    side = height > side ? height : side;
    return width > side ? width : side;
}

static int longest_side(const Dataset *set) {
    int longest = 0;
    for (int i = 0; i < set->num_images; i++) {
        const DatasetImage *image = &set->images[i];
        longest = image->width > longest ? image->width : longest;
        longest = image->height > longest ? image->height : longest;
    }
    return longest;
}

// To compute with the averages, and to go back.
static void engine_swap(Model *model) {
    if (!model->ema.base) return;
    engine.fetch(model);
    ema_swap(model);
    engine.send(model);
}

// Boxes of the picture that has most.
static int most_targets(const Dataset *set) {
    int most = 0;
    for (int i = 0; i < set->num_images; i++) {
        const int targets = dataset_image_targets(set, &set->images[i]);
        most = targets > most ? targets : most;
    }
    return most;
}

// Makes (height, width) the smallest plan that also holds (other_height, other_width), either way round.
static void widen_plan(int *height, int *width, int other_height, int other_width) {
    int low = other_height < other_width ? other_height : other_width,
        high = other_height < other_width ? other_width : other_height;
    if (low > *height) *height = low;
    if (high > *width) *width = high;
}

typedef struct {
    int query, label;
    double score;
    double box[4];  // x0, y0, x1, y1 in pixels of the original picture, not clipped
} Detection;

// The best class of each query that is not "no object", as DETR's PostProcess: the score is the softmax over all
// classes. detections: (num_queries), in the queries' order; their boxes are left out. logits: (num_queries, num_labels
// + 1).
static void best_classes(Detection *detections, const real *logits, const ModelConfig *config, double *probabilities) {
    const int classes = num_logits(config);
    for (int q = 0; q < config->num_queries; q++, logits += classes) {
        int label = 0;
        softmax_row(probabilities, logits, classes);
        for (int c = 1; c < config->num_labels; c++)
            if (logits[c] > logits[label]) label = c;
        detections[q].query = q;
        detections[q].label = label;
        detections[q].score = probabilities[label];
    }
}

// With focal loss classes are independent, and a query may be in several pairs of a query and a class, or in none: the
// num_queries pairs with the greatest sigmoid, greatest first, as Deformable DETR's PostProcess.
static void best_pairs(Detection *detections, const real *logits, const ModelConfig *config) {
    const int Q = config->num_queries, classes = num_logits(config);
    for (int pair = 0, count = 0; pair < Q * classes; pair++) {
        const double score = 1 / (1 + exp(-(double)logits[pair]));
        if (count == Q && !(score > detections[Q - 1].score)) continue;
        int at = count < Q ? count++ : Q - 1;
        for (; at > 0 && detections[at - 1].score < score; at--) detections[at] = detections[at - 1];
        detections[at].query = pair / classes;
        detections[at].label = pair % classes;
        detections[at].score = score;
    }
}

// What the network says about the picture it was last run on. detections: (num_queries).
static void detect(const Network *network, const Activations *acts, int width, int height, Detection *detections) {
    const ModelConfig *config = &network->config;
    const size_t first = (size_t)(config->dec_layers - 1) * (size_t)config->num_queries;
    const real *logits = acts->logits + first * (size_t)num_logits(config);
    if (config->focal)
        best_pairs(detections, logits, config);
    else
        best_classes(detections, logits, config, acts->probabilities);
    for (int d = 0; d < config->num_queries; d++) {
        const real *box = acts->boxes + 4 * (first + (size_t)detections[d].query);
        for (int i = 0; i < 4; i++) {
            double centre = (double)box[i & 1], half = (double)box[2 + (i & 1)] / 2;
            detections[d].box[i] = (i < 2 ? centre - half : centre + half) * (i & 1 ? height : width);
        }
    }
}

// Best score first; equal ones in the order of queries and classes.
static int compare_detections(const void *a, const void *b) {
    const Detection *left = (const Detection *)a, *right = (const Detection *)b;
    if (left->score != right->score) return left->score > right->score ? -1 : 1;
    if (left->query != right->query) return left->query < right->query ? -1 : 1;
    return left->label < right->label ? -1 : left->label > right->label;
}

static void draw_detection(Image *image, const Network *network, int label, double score, const double box[4]) {
    unsigned char colour[3];
    int scale = image_label_scale(image);
    char *text = format_string("%s %.2f", network->label_names[label], score);
    class_colour(label, colour);
    image_draw_box(image, box[0], box[1], box[2], box[3], colour, 1 + scale);
    image_draw_label(image, box[0], box[1], text, colour, scale);
    free(text);
}

// ---------------------------------------------------------------------------------------------------------------------
// Commands: what a training run gathers for its report (data/report.h writes the page): the time of its phases, its
// memory plan, and of the last evaluation the scores, and of some pictures the boxes and where the decoder looked

enum Phase { PHASE_STEPS, PHASE_WAITING, PHASE_EVALUATION, PHASE_CHECKPOINTS, PHASE_REPORT, NUM_PHASES };
static const char *const PHASE_NAMES[NUM_PHASES + 1] = {"training steps", "waiting for pictures", "evaluation",
                                                        "checkpoints",    "this report",          "everything else"};

typedef struct {
    double begin, seconds[NUM_PHASES];
    double written;  // when the page was, as seconds_now
    ReportRow memory[8];
    int num_memory;
    ReportRow work[64];  // of the last step of an epoch
    int num_work;
    // The last evaluation
    int64_t epoch;  // -1: there was none
    CocoScores scores;
    ReportPicture shown[REPORT_PICTURES];
    int num_shown;
} RunReport;

static void run_report_free(RunReport *report) {
    coco_scores_free(&report->scores);
    for (int i = 0; i < report->num_shown; i++) report_picture_free(&report->shown[i]);
}

// Chooses the pictures that are shown: the same in every evaluation, spread over the split.
static void run_report_choose(RunReport *report, const Dataset *set) {
    report->num_shown = set->num_images < REPORT_PICTURES ? set->num_images : REPORT_PICTURES;
    for (int i = 0; i < report->num_shown; i++)
        report->shown[i].image = (int)((int64_t)i * set->num_images / report->num_shown);
}

// The cross-attention of the last picture's query `query` in decoder layer `layer`, in bytes of which 255 is its peak.
// weights: scratch, (keys). Returns the peak.
static double attention_map(unsigned char *map, double *weights, const Network *network, const Activations *acts,
                            int query, int layer) {
    const AttentionActivations *cross = &acts->decoder_cross[layer];
    double peak = 0;
    attention_weights(weights, cross->query, cross->key, cross->lse, query, cross->num_queries, cross->num_keys,
                      network->config.hidden_dim, network->config.nheads, cross->prior, network->config.half);
    for (int key = 0; key < cross->num_keys; key++) peak = fmax(peak, weights[key]);
    for (int key = 0; key < cross->num_keys; key++) map[key] = (unsigned char)lrint(255 * weights[key] / peak);
    return peak;
}

// Keeps what the network has just said about a picture, if it is one of the shown: the boxes with the best scores, and
// attention for the best of them, up to three of a class. found: (num_queries), sorted here; class_of_label: -1 where
// the data set has no such class.
static void run_report_take(RunReport *report, const Network *network, const Activations *acts, const Dataset *set,
                            int image, const int *class_of_label, Detection *found) {
    const double begin = seconds_now();
    const int layers = network->config.dec_layers, cells = acts->map_height * acts->map_width;
    ReportPicture *picture = report->shown;
    while (picture < report->shown + report->num_shown && picture->image != image) picture++;
    if (picture == report->shown + report->num_shown) return;
    report_picture_read(picture, set->images[image].path);
    qsort(found, (size_t)network->config.num_queries, sizeof *found, compare_detections);
    picture->num_boxes = picture->num_looks = 0;
    for (int d = 0; d < network->config.num_queries && picture->num_boxes < REPORT_BOXES; d++) {
        const double *box = found[d].box;
        const int category = class_of_label[found[d].label];
        if (category < 0 || !(found[d].score >= REPORT_LEAST_SCORE)) continue;
        EvalDetection kept = {image, category, {box[0], box[1], box[2] - box[0], box[3] - box[1]}, found[d].score};
        picture->queries[picture->num_boxes] = found[d].query;
        picture->boxes[picture->num_boxes++] = kept;
    }
    int most = REPORT_ATTENTION_BYTES / (layers * cells);
    most = most < 1 ? 1 : most > REPORT_LOOKS ? REPORT_LOOKS : most;
    for (int b = 0; b < picture->num_boxes && picture->num_looks < most; b++) {
        int same = 0;
        for (int i = 0; i < picture->num_looks; i++)
            same += picture->boxes[picture->looks[i]].category == picture->boxes[b].category;
        if (same < 3) picture->looks[picture->num_looks++] = b;
    }
    picture->num_layers = layers, picture->map_height = acts->map_height, picture->map_width = acts->map_width;
    const size_t maps = (size_t)picture->num_looks * (size_t)layers;
    picture->maps = (unsigned char *)reallocate(picture->maps, maps * (size_t)cells);
    picture->peaks = (double *)reallocate(picture->peaks, maps * sizeof(double));
    double *weights = (double *)allocate((size_t)cells * sizeof(double));
    for (int i = 0; i < (int)maps; i++)
        picture->peaks[i] = attention_map(picture->maps + (size_t)i * (size_t)cells, weights, network, acts,
                                          picture->queries[picture->looks[i / layers]], i % layers);
    free(weights);
    report->seconds[PHASE_REPORT] += seconds_now() - begin;
    report->seconds[PHASE_EVALUATION] -= seconds_now() - begin;  // in the middle of which this happens
}

static int compare_work(const void *a, const void *b) {
    const double left = ((const ReportRow *)a)->value, right = ((const ReportRow *)b)->value;
    return left < right ? 1 : left > right ? -1 : 0;
}

// Keeps what the profile holds of one step, the longest first, and ends it.
static void run_report_profile(RunReport *report) {
    profile.on = 0;
    report->num_work = profile.count;
    for (int i = 0; i < profile.count; i++) {
        const ProfileLine *line = &profile.lines[i];
        ReportRow row = {line->work, line->pass, line->seconds, line->flops / line->seconds / 1e9};
        report->work[i] = row;
    }
    qsort(report->work, (size_t)report->num_work, sizeof(ReportRow), compare_work);
}

// ---------------------------------------------------------------------------------------------------------------------
// Commands: evaluation

// Sums over the steps of an epoch, of which log.txt has the means. Numbers and nothing else: it is saved as a list.
typedef struct {
    double steps, lr, loss, class_error, grad_norm, query_spread;
    double pairs, matched_iou;           // of the final layer, all of them
    double by_layer[MAX_DEC_LAYERS][4];  // loss_ce, loss_bbox, loss_giou, cardinality_error; layers as in Losses
} Averages;

enum { NUM_AVERAGES = 8 };  // before by_layer

static const char *const LAYER_KEYS[4] = {"loss_ce", "loss_bbox", "loss_giou", "cardinality_error"};

static void averages_add(Averages *sums, const Losses *losses, double lr, int layers) {
    const double *from[4] = {losses->loss_ce, losses->loss_bbox, losses->loss_giou, losses->cardinality_error};
    sums->steps++;
    sums->lr += lr;
    sums->loss += losses->loss;
    sums->class_error += losses->class_error;
    sums->grad_norm += losses->grad_norm;
    sums->query_spread += losses->query_spread;
    sums->pairs += losses->matched;
    sums->matched_iou += losses->matched_iou;
    for (int k = 0; k < 4; k++)
        for (int l = 0; l < layers; l++) sums->by_layer[l][k] += from[k][l];
}

// How long the epochs of a log took, by its last line that says so.
static double log_seconds(FILE *log) {
    static const char key[] = "\"seconds\": ";
    char *line = NULL;
    size_t room = 0;
    double seconds = 0;
    while (getline(&line, &room, log) > 0) {
        const char *at = strstr(line, key);
        if (at) seconds = strtod(at + strlen(key), NULL);
    }
    free(line);
    return seconds;
}

// The keys of DETR's log.txt for one split ("train" or "test"): weighted, then as they are ("_unscaled"). After them
// what DETR's has not: the gradient's norm, the IoU of matched boxes, the queries' spread.
static void averages_log(FILE *file, const Averages *sums, const char *split, int layers, const LossSettings *loss) {
    double count = sums->steps > 0 ? sums->steps : 1,
           weights[4] = {loss->class_loss_coef, loss->bbox_loss_coef, loss->giou_loss_coef, 0};
    int is_train = strcmp(split, "train") == 0;
    if (is_train) fprintf(file, "\"train_lr\": %.17g, ", sums->lr / count);
    fprintf(file, "\"%s_class_error\": %.17g, \"%s_loss\": %.17g, \"%s_class_error_unscaled\": %.17g, ", split,
            sums->class_error / count, split, sums->loss / count, split, sums->class_error / count);
    for (int unscaled = 0; unscaled < 2; unscaled++) {
        for (int l = layers - 1, place = -1; l >= 0;
             l--, place++) {  // the last layer first, without a number; then 0, 1, ...
            int layer = place < 0 ? layers - 1 : place;
            if (place >= 0 && !loss->aux_loss) break;
            for (int k = 0; k < 3 + unscaled; k++) {
                fprintf(file, "\"%s_%s", split, LAYER_KEYS[k]);
                if (place >= 0) fprintf(file, "_%d", place);
                fprintf(file, "%s\": %.17g, ", unscaled ? "_unscaled" : "",
                        sums->by_layer[layer][k] / count * (unscaled ? 1 : weights[k]));
            }
        }
    }
    if (is_train) fprintf(file, "\"train_grad_norm\": %.17g, ", sums->grad_norm / count);
    fprintf(file, "\"%s_matched_iou\": %.17g, \"%s_query_spread\": %.17g, ", split,
            sums->matched_iou / fmax(sums->pairs, 1), split, sums->query_spread / count);
}

// Says on stderr how fast pictures went through the network.
static void print_pace(int pictures, double seconds, double waited) {
    fprintf(stderr, "%d pictures in %.1f s: %.2f images/s, %.0f %% waiting for data\n", pictures, seconds,
            pictures / seconds, 100 * waited / seconds);
}

// Runs the network over a split, a picture at a time, and collects every query's box for scoring: from the last decoder
// layer, and from the depths - 1 before it as if each were the last. detections, num_detections: (depths), the last
// layer's last; the caller frees detections[d]. seconds: (depths), how long a picture takes with that many layers,
// mean, without what is to be waited for; or NULL. labels: as match_labels gives them; a box whose label is no class of
// the data set is left out. loss: NULL, or averages are added up too (acts must be for training then). report: NULL,
// or it gets what it shows. Unreadable pictures are named on stderr. 1 if it was stopped by a signal, else 0.
static int evaluate(Network *network, Activations *acts, const Dataset *set, LoaderSettings loader_settings,
                    const int *labels, const LossSettings *loss, Averages *sums, RunReport *report, int depths,
                    EvalDetection **detections, int *num_detections, double *seconds) {
    const int num_queries = network->config.num_queries, layers = network->config.dec_layers;
    int unreadable = 0;
    int *class_of_label = (int *)allocate((size_t)network->config.num_labels * sizeof(int));
    Detection *found = (Detection *)allocate((size_t)num_queries * sizeof(Detection));
    for (int i = 0; i < network->config.num_labels; i++) class_of_label[i] = -1;
    for (int c = 0; c < set->num_categories; c++)
        if (labels[c] >= 0) class_of_label[labels[c]] = c;
    for (int d = 0; d < depths; d++) {
        detections[d] =
            (EvalDetection *)allocate((size_t)set->num_images * (size_t)num_queries * sizeof(EvalDetection));
        num_detections[d] = 0;
    }
    loader_settings.batch_size = 1;
    loader_settings.augment = AUGMENT_NOTHING;
    loader_settings.shuffle = 0;
    Loader *loader = loader_start(set, &loader_settings, 0);
    double begin = seconds_now();
    Progress progress = {begin, 0, NULL};
    for (int i = 0; i < set->num_images && !stop_requested; i++) {
        Sample *sample = loader_next_batch(loader);
        if (!sample->image.pixels) {
            fprintf(stderr, "%s: skipped\n", sample->error.text);
            unreadable++;
            continue;
        }
        const double started = seconds_now();
        engine.encode(&network->model, acts, sample);
        const double encoded = seconds_now() - started;
        for (int d = 0; d < depths; d++) {
            const double decoding = seconds_now();
            dec_layers_use(network, layers - depths + 1 + d);
            engine.decode(&network->model, acts);
            detect(network, acts, sample->original_width, sample->original_height, found);
            if (seconds) seconds[d] += encoded + seconds_now() - decoding;
            for (int q = 0; q < num_queries; q++) {
                const double *box = found[q].box;
                EvalDetection detection = {sample->index,
                                           class_of_label[found[q].label],
                                           {box[0], box[1], box[2] - box[0], box[3] - box[1]},
                                           found[q].score};
                if (detection.category >= 0) detections[d][num_detections[d]++] = detection;
            }
        }
        if (loss) {
            Losses losses;
            for (int b = 0; b < sample->num_boxes; b++) sample->classes[b] = labels[sample->classes[b]];
            evaluation_losses(&network->model, acts, loss, sample, &losses);
            averages_add(sums, &losses, 0, layers);
        }
        if (report) run_report_take(report, network, acts, set, sample->index, class_of_label, found);
        if (progress_due(&progress))
            progress_show(&progress, "evaluating %s: %d/%d pictures, %.1f a second", set->split, i + 1, set->num_images,
                          (i + 1) / (seconds_now() - begin));
    }
    progress_end(&progress);
    if (unreadable) printf("unreadable pictures in %s: %d, skipped\n", set->split, unreadable);
    for (int d = 0; seconds && d < depths; d++) seconds[d] /= fmax(set->num_images - unreadable, 1);
    if (seconds) print_pace(set->num_images - unreadable, seconds_now() - begin, loader_wait_seconds(loader));
    loader_stop(loader);
    free(class_of_label);
    free(found);
    return stop_requested;
}

// ---------------------------------------------------------------------------------------------------------------------
// Commands: train

// The evaluation with the highest AP so far, of equal ones (all 0, at first) that with the lowest loss; OUT/best holds
// the checkpoint.
typedef struct {
    int64_t epoch;  // as in log.txt; -1: there was none yet
    double ap, loss;
    int64_t evaluations;  // after it, none of them better
} Best;

static int is_better(double ap, double loss, const Best *best) {
    return best->epoch < 0 || ap > best->ap || (ap == best->ap && loss < best->loss);
}

typedef struct {
    Settings *settings;
    const char *folder;  // OUT
    int lock;
    yajl_val state_tree;  // of the run that is resumed; holds the flags' texts
    Dataset train, val;
    int has_val;
    int *train_labels, *val_labels;  // of each class
    Network network;
    Activations *acts;  // of the pictures in flight
    int in_flight;
    LoaderSettings loader;
    LossSettings loss;
    Schedule schedule;
    int64_t steps_per_epoch, last_step;
    // What trainer_state.json keeps
    int64_t step;           // optimizer steps taken
    int64_t epochs_logged;  // epochs that are in log.txt
    Best best;
    int from_scratch;
    Averages averages;  // of the epoch under way
    char *log_line;     // of log.txt, which the one in OUT has not yet; or NULL
    double log_begin;   // seconds_now() when the run would have begun, had it been one process
    RunReport report;
    // Of the steps that are under way, no more than two; step s has the place s % 2
    int64_t begun;  // steps, `step` of them are done
    Losses losses[2];
    int *pictures[2];  // of the batch, their places in train.images
} Training;

static void training_free(Training *run) {
    activations_free(run->acts);
    free(run->acts);
    network_free(&run->network);
    dataset_free(&run->train);
    dataset_free(&run->val);
    free(run->train_labels);
    free(run->val_labels);
    for (int i = 0; i < 2; i++) free(run->pictures[i]);
    free(run->log_line);
    run_report_free(&run->report);
    yajl_tree_free(run->state_tree);
    if (run->lock > 0) close(run->lock);
}

// "loss_scale" of trainer_state.json, which a run on the CPU does not begin.
static void loss_scale_write(FILE *file, const LossScale *scale) {
    if (scale->scale > 0)
        fprintf(file, " \"loss_scale\": {\"scale\": %.0f, \"good_steps\": %d, \"skipped\": %d},\n",
                (double)scale->scale, scale->good_steps, scale->skipped);
}

static void loss_scale_read(LossScale *scale, ConfigReader *reader, yajl_val tree) {
    yajl_val object = json_member(tree, "loss_scale");
    const int power = read_int(reader, object, "scale", 0, 0, MOST_LOSS_SCALE);
    if (power & (power - 1)) CONFIG_FAIL(reader, "%s: \"scale\" is %d, no power of two", reader->path, power);
    scale->scale = (float)power;
    scale->good_steps = read_int(reader, object, "good_steps", 0, 0, LOSS_SCALE_STEPS - 1);
    scale->skipped = read_int(reader, object, "skipped", 0, 0, INT32_MAX);
}

static int state_write(const Training *run, const char *folder, Error *error) {
    const double *sums = &run->averages.steps;
    FILE *file = fileset_create(folder, "trainer_state.json");
    if (!file) return fileset_close(file, folder, "trainer_state.json", error);
    long long step = run->step, steps_per_epoch = run->steps_per_epoch;
    fprintf(file, "{\n \"step\": %lld,\n \"epoch\": %lld,\n", step, step / steps_per_epoch);
    fprintf(file, " \"step_in_epoch\": %lld,\n \"steps_per_epoch\": %lld,\n", step % steps_per_epoch, steps_per_epoch);
    fprintf(file, " \"epochs_logged\": %lld,\n \"seed\": %lld,\n", (long long)run->epochs_logged,
            (long long)run->loader.seed);
    fprintf(file, " \"planned_steps\": %lld,\n", (long long)run->schedule.planned_steps);
    loss_scale_write(file, &run->network.model.loss_scale);
    if (run->best.epoch >= 0) {
        fprintf(file, " \"best\": {\"epoch\": %lld, \"evaluations\": %lld, \"ap\": ", (long long)run->best.epoch,
                (long long)run->best.evaluations);
        json_print_number(file, run->best.ap);
        fputs(", \"loss\": ", file);
        json_print_number(file, run->best.loss);
        fputs("},\n", file);
    }
    fprintf(file, " \"from_scratch\": %s,\n \"num_images\": %d,\n \"classes\": [", run->from_scratch ? "true" : "false",
            run->train.num_images);
    for (int c = 0; c < run->train.num_categories; c++) {
        fprintf(file, "%s\n  {\"id\": %lld, \"label\": %d, \"name\": ", c ? "," : "",
                (long long)run->train.categories[c].id, run->train_labels[c]);
        json_print_string(file, run->train.categories[c].name);
        fputc('}', file);
    }
    fputs("],\n \"sums\": ", file);
    for (int i = 0; i < NUM_AVERAGES + 4 * run->network.config.dec_layers; i++)
        fprintf(file, "%s%.17g", i ? ", " : "[", sums[i]);
    fputs("],\n \"flags\": ", file);
    settings_write(file, run->settings);
    fputs("\n}\n", file);
    return fileset_close(file, folder, "trainer_state.json", error);
}

static int state_read(Training *run, const char *path, Error *error) {
    yajl_val tree = run->state_tree, classes = json_member(tree, "classes"), list = json_member(tree, "sums");
    ConfigReader reader = {path, error, 0};
    int count = NUM_AVERAGES + 4 * run->network.config.dec_layers,
        num_images = read_int(&reader, tree, "num_images", 0, 0, INT32_MAX);
    double *sums = &run->averages.steps;
    yajl_val best = json_member(tree, "best");
    int64_t planned = run->schedule.planned_steps;
    run->from_scratch = read_bool(&reader, tree, "from_scratch", 0);
    loss_scale_read(&run->network.model.loss_scale, &reader, tree);
    if (json_get_int64(tree, "planned_steps", &planned, path, error) < 0 ||
        json_get_int64(best, "epoch", &run->best.epoch, path, error) < 0 ||
        json_get_int64(best, "evaluations", &run->best.evaluations, path, error) < 0 ||
        json_get_double(best, "ap", &run->best.ap, path, error) < 0 ||
        json_get_double(best, "loss", &run->best.loss, path, error) < 0)
        return -1;
    if (run->schedule.cosine && planned != run->schedule.planned_steps)
        printf("schedule   the cosine now runs over %lld steps, before over %lld\n",
               (long long)run->schedule.planned_steps, (long long)planned);
    if (json_get_int64(tree, "step", &run->step, path, error) != 1 ||
        json_get_int64(tree, "epochs_logged", &run->epochs_logged, path, error) != 1 || run->step < 0 ||
        run->epochs_logged < 0 || !YAJL_IS_ARRAY(classes) || !YAJL_IS_ARRAY(list) || (int)list->u.array.len != count)
        return fail(error, "%s: is damaged: not what a run writes", path);
    // An epoch whose last step is taken may not be logged yet.
    const int64_t epochs = run->step / run->steps_per_epoch,
                  unlogged = run->step > 0 && run->step % run->steps_per_epoch == 0;
    if (run->epochs_logged > epochs || run->epochs_logged < epochs - unlogged || (double)run->step > MOST_STEPS)
        return fail(error, "%s: is damaged: step %lld and %lld logged epochs of %lld steps do not go together", path,
                    (long long)run->step, (long long)run->epochs_logged, (long long)run->steps_per_epoch);
    for (int i = 0; i < count; i++)
        sums[i] = YAJL_IS_NUMBER(list->u.array.values[i]) ? strtod(list->u.array.values[i]->u.number.r, NULL) : 0;
    int same = num_images == run->train.num_images && (int)classes->u.array.len == run->train.num_categories;
    for (int c = 0; c < run->train.num_categories && same; c++) {
        int64_t id = -1;
        yajl_val one = classes->u.array.values[c];
        run->train_labels[c] = read_int(&reader, one, "label", 0, 0, run->network.config.num_labels - 1);
        same = json_get_int64(one, "id", &id, path, error) == 1 && id == run->train.categories[c].id &&
               strcmp(read_text(&reader, one, "name", ""), run->train.categories[c].name) == 0;
    }
    if (reader.failed) return -1;
    return same ? 0
                : fail(error, "%s: %s has changed: the run began with %d images and %zu classes of its ids and names",
                       path, flag_text(run->settings, "data"), num_images, classes->u.array.len);
}

static void training_print_model(FILE *file, const Training *run) {
    const Model *model = &run->network.model;
    size_t parameters = 0;
    for (int i = 0; i < model->num_params; i++)
        parameters += model->params[i]->group == GROUP_STATISTICS ? 0 : model->params[i]->count;
    fprintf(file, "kernel     %s, %d threads\n", KERNEL, omp_get_max_threads());
    fprintf(file, "model      %.2f million parameters, %.2f million of them trained; %d queries, %d%s classes\n",
            (double)parameters / 1e6, (double)model->num_trained / 1e6, model->config.num_queries,
            model->config.num_labels, model->config.focal ? "" : " + 1");
}

// Writes the page about the run. One that cannot be written costs no checkpoint, only a warning.
static void training_report(Training *run) {
    RunReport *gathered = &run->report;
    const Settings *settings = run->settings;
    const double begin = seconds_now();
    char *path = format_string("%s/report.html", run->folder), *log = format_string("%s/log.txt", run->folder),
         *facts = NULL, *flags = NULL;
    size_t size;
    ReportRow times[NUM_PHASES + 1];
    double rest = begin - gathered->begin;
    for (int p = 0; p <= NUM_PHASES; p++) {
        ReportRow row = {PHASE_NAMES[p], NULL, p < NUM_PHASES ? gathered->seconds[p] : rest, 0};
        times[p] = row;
        rest -= row.value;
    }
    FILE *text = open_memstream(&facts, &size);
    if (text) {
        dataset_print_facts(text, &run->train);
        training_print_model(text, run);
        fclose(text);
    }
    text = open_memstream(&flags, &size);
    if (text) {
        settings_write(text, settings);
        fclose(text);
    }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    Report report;
    memset(&report, 0, sizeof report);
    report.title = flag_text(settings, "data");
    report.command = settings->command_line;
    report.flags = flags, report.facts = facts, report.log = fopen(log, "r");
    report.steps = run->step, report.of_steps = run->last_step, report.steps_per_epoch = run->steps_per_epoch;
    report.loss = run->averages.steps ? run->averages.loss / run->averages.steps : NAN;
    report.epoch = gathered->epoch, report.set = &run->val, report.scores = &gathered->scores;
    report.shown = gathered->shown, report.num_shown = gathered->num_shown;
    report.times = times, report.num_times = NUM_PHASES + 1;
    report.work = gathered->work, report.num_work = gathered->num_work;
    report.memory = gathered->memory, report.num_memory = gathered->num_memory;
    report.peak_bytes = (double)usage.ru_maxrss * 1024;
    Error error;
    if (report_write(path, &report, &error) != 0) fprintf(stderr, "warning: %s\n", error.text);
    if (report.log) fclose(report.log);
    free(path);
    free(log);
    free(facts);
    free(flags);
    gathered->written = seconds_now();
    gathered->seconds[PHASE_REPORT] += gathered->written - begin;
}

// The page between two epochs, once a minute. A run that goes on leaves the page of the one before, whose pictures it
// has not, until it has evaluated too.
static void training_report_progress(Training *run) {
    if (seconds_now() - run->report.written < 60) return;
    char *path = format_string("%s/report.html", run->folder);
    if (run->report.epoch >= 0 || !run->has_val || !is_file(path)) training_report(run);
    free(path);
}

// Frees the room of a set that could not be written, and says how to go on from the one before.
static void training_cannot_save(const Training *run, const char *folder, Error *error) {
    char *state = fileset_path(run->folder, "trainer_state.json");
    Error unused;
    fileset_empty(folder, ".next", 0, &unused);
    if (is_file(state)) {
        char *command = resume_command(run->settings, run->folder);
        fail_more(error, "; the checkpoint before it is whole, go on with  %s", command);
        free(command);
    }
    free(state);
}

// Writes the set's log.txt: what OUT's has, and the line that it has not. A log that somebody has removed begins anew.
// 0, or -1.
static int log_write(const Training *run, const char *folder, Error *error) {
    Error unused;
    char *path = fileset_path(run->folder, "log.txt");
    FILE *file = fileset_create(folder, "log.txt");
    const int status = file && is_file(path) ? copy_file(file, path, error) : 0;
    if (file && run->log_line) fputs(run->log_line, file);
    const int closed = fileset_close(file, folder, "log.txt", status == 0 ? error : &unused);
    free(path);
    return status == 0 ? closed : -1;
}

// Writes the whole set into OUT, where the one before becomes OUT/previous, or into OUT/best.
static int training_save(Training *run, const char *folder, Error *error) {
    const Model *model = &run->network.model;
    const double begin = seconds_now();
#ifdef __GLIBC__
    malloc_trim(0);  // gives back what pictures and an evaluation have left free between what is in use
#endif
    int status = fileset_begin(folder, error);
    if (status == 0) {
        engine.fetch(&run->network.model);
        status = log_write(run, folder, error);
    }
    if (status == 0) status = config_write(&run->network, folder, error);
    if (status == 0) status = preprocessor_write(&run->network, folder, error);
    if (status == 0) status = tensors_write(model, folder, TENSORS_MODEL, error);
    if (status == 0) status = tensors_write(model, folder, TENSORS_OPTIMIZER, error);
    if (status == 0 && model->ema.base) status = tensors_write(model, folder, TENSORS_EMA, error);
    if (status == 0) status = state_write(run, folder, error);
    if (status == 0) status = fileset_commit(folder, folder == run->folder, error);
    if (status != 0) training_cannot_save(run, folder, error);
    if (status == 0 && folder == run->folder) {
        free(run->log_line);
        run->log_line = NULL;
    }
    run->report.seconds[PHASE_CHECKPOINTS] += seconds_now() - begin;
    return status;
}

// Status 2 if --freeze names what the network has not, or leaves nothing to train. afresh: the class head starts
// afresh.
static void check_frozen(const Model *model, int afresh) {
    const char *freeze = model->config.freeze;
    for (const char *at = freeze; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        const int length = (int)strcspn(at, ",");
        int found = 0;
        for (int i = 0; i < model->num_params; i++) found |= is_in_module(model->params[i]->name, at, (size_t)length);
        if (!found)
            usage_error(
                "--freeze %.*s: no part of the network has that name; backbone, input_projection, "
                "query_position_embeddings, encoder, decoder, class_labels_classifier and bbox_predictor are "
                "parts, and so is decoder.layers.0",
                length, at);
    }
    if (freeze && afresh && !model->class_head.weight->trained)
        usage_error("--freeze %s: the class head starts afresh, so it must be trained", freeze);
    if (freeze && model->num_trained == 0) usage_error("--freeze %s: nothing is left to train", freeze);
}

// Whether the run has --norm_init track; with pretrained weights, or a frozen backbone, there is nothing to follow.
static int tracks_norms(const Training *run) {
    const char *norm_init = flag_text(run->settings, "norm_init");
    return run->from_scratch && norm_init && strcmp(norm_init, "track") == 0 &&
           flag_number(run->settings, "lr_backbone") > 0;
}

// The network of a run that begins: its shape from --pretrained DIR or from the flags, its values from weights or from
// the seed, its class head kept if it knows every class of the data set.
static int training_begin(Training *run, Error *error) {
    const Settings *settings = run->settings;
    const char *pretrained = flag_text(settings, "pretrained");
    int from_folder = pretrained && is_directory(pretrained), keep_head = 0, status;
    Network *network = &run->network;
    run->from_scratch = pretrained == NULL;
    const char *name = from_folder ? weights_choose(pretrained, 0) : NULL;
    if (from_folder) {
        if (checkpoint_check_weights(settings, "pretrained", name, error) != 0 ||
            config_read(network, pretrained, error) != 0)
            return -1;
        network->config.half = computes_in_bf16(settings);
        config_check_flags(&network->config, settings, pretrained);
        int missing = match_labels(run->train_labels, network, &run->train);
        keep_head = missing == 0;
        if (!keep_head)
            printf("class head starts afresh: %d of %d classes are not in %s/config.json's id2label\n", missing,
                   run->train.num_categories, pretrained);
        else
            printf("class head is kept: all %d classes are in %s/config.json's id2label, by name\n",
                   run->train.num_categories, pretrained);
    } else {
        network->config = config_from_flags(settings);
        if (pretrained)
            printf(
                "class head starts afresh: a file of weights does not name its classes (a folder with config.json "
                "does)\n");
    }
    if (!keep_head) {
        network_labels(network, run->train.num_categories);
        for (int c = 0; c < run->train.num_categories; c++) {
            network->label_names[c] = format_string("%s", run->train.categories[c].name);
            run->train_labels[c] = c;
        }
    }
    for (int c = 0; c < run->train.num_categories; c++)
        network->label_ids[run->train_labels[c]] = run->train.categories[c].id;
    network->short_side = run->loader.short_side;
    network->max_size = run->loader.max_size;
    network->config.freeze = flag_text(settings, "freeze");
    status = model_create(&network->model, &network->config, run->loader.batch_size,
                          flag_number(settings, "lr_backbone") > 0, run->from_scratch, error);
    if (status == 0) check_frozen(&network->model, !keep_head);
    network->model.track_norms = tracks_norms(run);
    if (status == 0) model_initialise(&network->model, run->loader.seed);
    if (status == 0 && pretrained) {
        char *weights = from_folder ? fileset_path(pretrained, name) : format_string("%s", pretrained);
        status = weights_read(&network->model, weights,
                              keep_head     ? WEIGHTS_ALL
                              : from_folder ? WEIGHTS_BUT_HEAD
                                            : WEIGHTS_OR_BACKBONE,
                              error);
        free(weights);
        if (status == 0 && from_folder) weights_say(pretrained, name);
    }
    if (status == 0 && flag_number(settings, "ema") > 0) ema_create(&network->model);
    return status;
}

// The network of a run that goes on.
static int training_resume(Training *run, Error *error) {
    char *state = fileset_path(run->folder, "trainer_state.json"),
         *weights = fileset_path(run->folder, "model.safetensors");
    char *moments = fileset_path(run->folder, "optimizer.safetensors"), *log = fileset_path(run->folder, "log.txt"),
         *ema = fileset_path(run->folder, "ema.safetensors");
    Model *model = &run->network.model;
    int status = config_read(&run->network, run->folder, error);
    run->network.config.half = computes_in_bf16(run->settings);
    run->network.config.freeze = flag_text(run->settings, "freeze");
    run->network.short_side = run->loader.short_side;
    run->network.max_size = run->loader.max_size;
    if (status == 0) status = state_read(run, state, error);
    FILE *lines = status == 0 ? open_file(log, error) : NULL;
    if (!lines) status = -1;
    if (lines) run->log_begin -= log_seconds(lines);
    if (lines) fclose(lines);
    if (status == 0)
        status = model_create(model, &run->network.config, run->loader.batch_size,
                              flag_number(run->settings, "lr_backbone") > 0, run->from_scratch, error);
    model->track_norms = tracks_norms(run);
    if (status == 0) status = weights_read(model, weights, WEIGHTS_ALL, error);
    if (status == 0) status = moments_read(model, moments, error);
    if (status == 0 && flag_number(run->settings, "ema") > 0) {
        ema_create(model);
        ema_swap(model);
        status = weights_read(model, ema, WEIGHTS_ALL, error);
        ema_swap(model);
    }
    for (int c = 0; c < run->train.num_categories && status == 0; c++)
        run->network.label_ids[run->train_labels[c]] = run->train.categories[c].id;
    free(state);
    free(weights);
    free(moments);
    free(log);
    free(ema);
    return status;
}

// Sets the frozen norms from some training pictures as they are, spread over the data set; fewer of them where they are
// large, since all are held in memory layer after layer.
static int training_calibrate(Training *run, int height, int width, Error *error) {
    LoaderSettings plain = run->loader;
    plain.augment = AUGMENT_NOTHING, plain.defer_side = 0;
    int64_t most = 5000000 / ((int64_t)height * width);
    int count = most < 4 ? 4 : most > 48 ? 48 : (int)most, readable = 0;
    if (count > run->train.num_images) count = run->train.num_images;
    Sample *samples = (Sample *)allocate((size_t)count * sizeof(Sample));
    for (int i = 0; i < count; i++) {
        sample_make(&samples[i], &run->train, &plain, 0, (int)((int64_t)i * run->train.num_images / count));
        readable += samples[i].image.pixels != NULL;
    }
    if (run->network.model.track_norms) standardise_filters(&run->network.model);
    calibrate_norms(&run->network.model, samples, count, 1);
    printf("norms      calibrated on %d training pictures%s\n", readable,
           run->network.model.track_norms ? ", and following them" : "");
    Error why = samples[0].error;
    for (int i = 0; i < count; i++) sample_free(&samples[i]);
    free(samples);
    return readable ? 0 : fail(error, "none of %d training pictures can be read, the first: %s", count, why.text);
}

// How many pictures of a batch run side by side, by the rule of --micro_batch: one on each thread, or one on all of
// them. other: bytes that will be taken besides their activations.
static int pictures_in_flight(const Settings *settings, const Model *model, int height, int width, double other) {
    const int threads = omp_get_max_threads(), most = flag_int(settings, "micro_batch");
    if (engine.is_gpu || flag_int(settings, "batch_size") < threads || (most && most < threads)) return 1;
    const double needed = other + (double)activations_bytes(model, height, width, 1, threads),
                 available = memory_free();
    return needed <= available || available == 0 ? threads : 1;
}

static int scaled(int length, int to, int from) { return (int)((int64_t)length * to / from); }

// Bytes that something takes for pictures up to height x width.
typedef double PictureNeeds(const void *of, int height, int width);

// Adds to a complaint that pictures of height x width do not fit which flags would make them fit: the largest shorter
// side, the longer one in proportion, whose needs have room. Returns whether there is one.
static int suggest_side(Error *error, const Settings *settings, int height, int width, double room, PictureNeeds *needs,
                        const void *of) {
    const int short_side = flag_int(settings, "short_side"), max_size = flag_int(settings, "max_size");
    for (int side = short_side - 1; side >= 32; side--) {
        if (needs(of, scaled(height, side, short_side) + 1, scaled(width, side, short_side) + 1) > room) continue;
        fail_more(error, "--short_side %d --max_size %d would fit", side, scaled(max_size, side, short_side));
        return 1;
    }
    return 0;
}

// Pictures that the loader has read; those that a GPU will resize are as large as in their files.
static double read_ahead_bytes(const Training *run, int height, int width) {
    const LoaderSettings *loader = &run->loader;
    const double side = loader->defer_side, pixels = fmax((double)height * width, side * side);
    return (double)(loader->kept + (loader->workers ? loader->prefetch + 1 : 1)) * loader->batch_size * 3.0 * pixels;
}

static double followed_bytes(const Training *run, int height, int width) {
    const Model *model = &run->network.model;
    return model->track_norms && !engine.is_gpu ? calibration_bytes(model, height, width) : 0;
}

// All that depends on the pictures' size, of a Training.
static double training_needs(const void *of, int height, int width) {
    const Training *run = (const Training *)of;
    return read_ahead_bytes(run, height, width) + followed_bytes(run, height, width) +
           (double)activations_bytes(&run->network.model, height, width, !engine.is_gpu, run->in_flight);
}

// Prints what will be taken, and refuses a plan that the machine has no memory for.
static int training_plan(Training *run, int height, int width, Error *error) {
    const Model *model = &run->network.model;
    const double MiB = 1048576;
    const double pictures = read_ahead_bytes(run, height, width), followed = followed_bytes(run, height, width);
    const double scored = coco_score_bytes((double)run->val.num_images * model->config.num_queries);
    run->in_flight = pictures_in_flight(run->settings, model, height, width, followed + pictures + scored);
    const double needs = training_needs(run, height, width);
    const double packed = engine.is_gpu ? 0 : (double)model->packed.used;  // a GPU's program will have given them back
    const ReportRow rows[] = {{"weights", NULL, (double)model->weights.used, 0},
                              {"packed weights", NULL, packed, 0},
                              {"gradients and Adam's moments", NULL, (double)model->optimizer.used, 0},
                              {"average of the weights", NULL, (double)model->ema.used, 0},
                              {"activations and workspace", NULL, needs - pictures - followed, 0},
                              {"pictures the norms follow", NULL, followed, 0},
                              {"pictures read ahead", NULL, pictures, 0},
                              {"boxes of an evaluation", NULL, scored, 0}};
    double total = 0, taken = rows[0].value + rows[2].value + rows[3].value + (double)model->packed.used,  // already
        available = memory_free() + taken;
    printf("\nmemory     for pictures up to %d x %d, %d in flight\n", height, width, run->in_flight);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (rows[i].value > 0) printf("  %-30s %10.1f MiB\n", rows[i].name, rows[i].value / MiB);
        if (rows[i].value > 0) run->report.memory[run->report.num_memory++] = rows[i];
        total += rows[i].value;
    }
    printf("  %-30s %10.1f MiB", "total", total / MiB);
    if (available > taken) printf(" of %.1f that are free", available / MiB);
    printf("\n\n");
    fflush(stdout);
    if (total <= available || memory_free() == 0) return 0;
    fail(error, "out of memory: the plan needs %.1f MiB and %.1f are free: ", total / MiB, available / MiB);
    const double room = 0.95 * available - (total - needs);
    if (!suggest_side(error, run->settings, height, width, room, training_needs, run))
        fail_more(error, "no picture size fits; take a smaller --backbone or --hidden_dim");
    return -1;
}

// Refuses a folder on whose disk not even one checkpoint has room. 0, or -1.
static int training_check_disk(const Training *run, Error *error) {
    const Model *model = &run->network.model;
    const double MiB = 1048576;
    double numbers = 0;
    struct statvfs disk;
    for (int i = 0; i < model->num_params; i++) {
        const Param *param = model->params[i];
        numbers += (1 + 2 * param->trained + (model->ema.base != NULL)) * (double)param->count;
    }
    if (statvfs(run->folder, &disk) != 0 || disk.f_blocks == 0) return 0;  // a file system that does not say
    const double needed = numbers * sizeof(float),
                 room = (double)disk.f_frsize * (double)(geteuid() == 0 ? disk.f_bfree : disk.f_bavail);
    if (room >= needed) return 0;
    return fail(
        error,
        "%s: a checkpoint takes %.1f MiB and its disk has room for %.1f: make room, or take another --output_dir",
        run->folder, needed / MiB, room / MiB);
}

// Notes an evaluation of the epoch under way. 1 if it is the best so far.
static int training_judge(Training *run, double ap, double loss) {
    run->best.evaluations++;
    if (!is_better(ap, loss, &run->best)) return 0;
    Best best = {run->epochs_logged, ap, loss, 0};
    run->best = best;
    return 1;
}

static int training_save_best(Training *run, Error *error) {
    char *folder = format_string("%s/best", run->folder);
    int status = make_directories(folder, error);
    if (status == 0) status = training_save(run, folder, error);
    free(folder);
    return status;
}

// 1 if --patience is at its end.
static int training_is_over(const Training *run) {
    int64_t patience = flag_int64(run->settings, "patience");
    return patience && run->best.evaluations >= patience;
}

// The epoch under way is complete: evaluates, adds its line to the log, saves. 1 if a signal stopped the evaluation.
static int training_end_epoch(Training *run, Error *error) {
    int64_t epoch = run->epochs_logged;
    int layers = run->network.config.dec_layers,
        evaluated = run->has_val && (epoch + 1) % flag_int64(run->settings, "eval_every") == 0;
    size_t size = 0;
    Averages test;
    const double *stats = run->report.scores.stats;
    memset(&test, 0, sizeof test);
    if (evaluated) {
        const double begin = seconds_now();
        EvalDetection *detections;
        int num_detections;
        engine_swap(&run->network.model);
        int stopped = evaluate(&run->network, run->acts, &run->val, run->loader, run->val_labels, &run->loss, &test,
                               &run->report, 1, &detections, &num_detections, NULL);
        engine_swap(&run->network.model);
        if (!stopped) {
            coco_scores_free(&run->report.scores);
            coco_score(&run->report.scores, &run->val, detections, num_detections);
        }
        run->report.epoch = stopped ? -1 : epoch;  // half an evaluation is not shown
        free(detections);
        run->report.seconds[PHASE_EVALUATION] += seconds_now() - begin;
        if (stopped) return 1;
    }
    FILE *file = open_memstream(&run->log_line, &size);
    if (!file) return fail(error, "out of memory for the log");
    fputc('{', file);
    averages_log(file, &run->averages, "train", layers, &run->loss);
    if (evaluated) {
        averages_log(file, &test, "test", layers, &run->loss);
        for (int i = 0; i < 12; i++)
            fprintf(file, "%s%.17g%s", i ? ", " : "\"test_coco_eval_bbox\": [", stats[i], i < 11 ? "" : "], ");
    }
    fprintf(file, "\"epoch\": %lld, \"n_parameters\": %zu, \"seconds\": %.1f}\n", (long long)epoch,
            run->network.model.num_trained, seconds_now() - run->log_begin);
    fclose(file);
    printf("epoch %lld done: train loss %.4f, class error %.1f %%", (long long)epoch + 1,
           run->averages.loss / run->averages.steps, run->averages.class_error / run->averages.steps);
    if (evaluated)
        printf("; %s: loss %.4f, AP %.3f, AP50 %.3f", run->val.split, test.steps ? test.loss / test.steps : 0, stats[0],
               stats[1]);
    int better = evaluated && training_judge(run, stats[0], test.steps ? test.loss / test.steps : 0);
    printf(better ? ", the best so far\n" : "\n");
    fflush(stdout);
    run->epochs_logged++;
    memset(&run->averages, 0, sizeof run->averages);
    // The best first: a run that is killed between the two comes here again, to find the same.
    if (better && training_save_best(run, error) != 0) return -1;
    if (training_save(run, run->folder, error) != 0) return -1;
    training_report(run);
    return 0;
}

// Names the pictures of the step that failed, the first that is not done.
static int training_failed(const Training *run, Error *error) {
    const int *pictures = run->pictures[run->step % 2];
    for (int i = 0; i < run->loader.batch_size; i++)
        fail_more(error, "%s%s", i ? ", " : "; images: ", run->train.images[pictures[i]].path);
    return -1;
}

// Begins an optimizer step on the loader's next batch.
static int training_begin_step(Training *run, Sample *samples, char *reported, Error *error) {
    const Settings *settings = run->settings;
    const int batch = run->loader.batch_size, place = (int)(run->begun % 2);
    double factor = schedule_factor(&run->schedule, run->begun);
    OptimizerSettings optimizer = {factor * flag_number(settings, "lr"), factor * flag_number(settings, "lr_backbone"),
                                   flag_number(settings, "weight_decay"), flag_number(settings, "clip_max_norm"),
                                   flag_number(settings, "ema")};
    for (int i = 0; i < batch; i++) {
        if (!samples[i].image.pixels && !reported[samples[i].index]++)
            fprintf(stderr, "%s: skipped\n", samples[i].error.text);
        for (int b = 0; b < samples[i].num_boxes; b++) samples[i].classes[b] = run->train_labels[samples[i].classes[b]];
        run->pictures[place][i] = samples[i].index;
    }
    if (engine.train(&run->network.model, run->acts, &run->loss, &optimizer, samples, batch, run->loader.seed,
                     run->begun, &run->losses[place], error) != 0)
        return training_failed(run, error);
    run->begun++;
    return 0;
}

// Waits for the oldest step that is under way.
static int training_finish_step(Training *run, Error *error) {
    if (engine.finish(&run->network.model, error) != 0) return training_failed(run, error);
    averages_add(&run->averages, &run->losses[run->step % 2],
                 schedule_factor(&run->schedule, run->step) * flag_number(run->settings, "lr"),
                 run->network.config.dec_layers);
    run->step++;
    return 0;
}

// Steps until the last one, a signal or an error. 0, or -1.
static int training_loop(Training *run, Error *error) {
    int64_t first_step = run->step, save_steps = flag_int64(run->settings, "save_steps"), saved_step = -1;
    char *reported = (char *)allocate((size_t)run->train.num_images);
    Loader *loader = run->step < run->last_step ? loader_start(&run->train, &run->loader, run->step) : NULL;
    Progress progress = {0, 0, NULL};
    Watch watch = watch_begin(run->last_step);
    double seconds = 0, waited = 0;
    const int last = run->network.config.dec_layers - 1;
    int status = 0;
    run->begun = run->step;
    while (status == 0 && !stop_requested) {
        training_report_progress(run);
        if (run->step > run->epochs_logged * run->steps_per_epoch && run->step % run->steps_per_epoch == 0) {
            progress_end(&progress);
            status = training_end_epoch(run, error);
            saved_step = status == 0 ? run->step : -1;
            continue;
        }
        if (run->step >= run->last_step || training_is_over(run)) break;
        if (save_steps && run->step > first_step && run->step % save_steps == 0 && saved_step != run->step) {
            status = training_save(run, run->folder, error);
            saved_step = run->step;
            continue;
        }
        double begin = seconds_now();
        Sample *samples = loader_next_batch(loader);
        const double waiting = seconds_now() - begin;
        waited += waiting;
        profile.on = (run->begun + 1) % run->steps_per_epoch == 0 || run->report.num_work == 0, profile.count = 0;
        status = training_begin_step(run, samples, reported, error);
        // A GPU has the next step before the host waits for this one, unless something else comes behind it.
        const int pauses = run->begun == first_step + 1 || run->begun % run->steps_per_epoch == 0 ||
                           run->begun == run->last_step || (save_steps && run->begun % save_steps == 0);
        const int64_t before = run->step, due = run->begun - (engine.is_gpu && !pauses);
        while (status == 0 && run->step < due) status = training_finish_step(run, error);
        if (profile.on) run_report_profile(&run->report);
        seconds += seconds_now() - begin;
        run->report.seconds[PHASE_WAITING] += waiting;
        run->report.seconds[PHASE_STEPS] += seconds_now() - begin - waiting;
        for (int64_t step = before + 1; status == 0 && step <= run->step; step++) {
            const Losses *losses = &run->losses[(step - 1) % 2];
            if (progress_due(&progress) || step == run->last_step || step == first_step + 1) {
                char left[32];
                format_time(left, sizeof left, seconds / (double)(step - first_step) * (double)(run->last_step - step));
                progress_show(
                    &progress,
                    "epoch %lld/%lld  step %lld/%lld  loss %.4f (epoch %.4f)  %.2f images/s  %s left  class error %.0f "
                    "%%  IoU %.2f  spread %.3f  gradient %.3g  ce %.3g bbox %.3g giou %.3g  %.0f %% waiting for data",
                    (long long)((step - 1) / run->steps_per_epoch + 1),
                    (long long)((run->last_step - 1) / run->steps_per_epoch + 1), (long long)step,
                    (long long)run->last_step, losses->loss, run->averages.loss / run->averages.steps,
                    (double)((step - first_step) * run->loader.batch_size) / seconds, left, losses->class_error,
                    losses->matched_iou / fmax(losses->matched, 1), losses->query_spread, losses->grad_norm,
                    losses->loss_ce[last], losses->loss_bbox[last], losses->loss_giou[last], 100 * waited / seconds);
            }
            const double rate = schedule_factor(&run->schedule, step - 1);
            const int signs = watch_step(&watch, step, rate, losses, waited / seconds);
            if (signs) progress_end(&progress);
            watch_say(stderr, &watch, signs, step, losses, waited / seconds, run->loader.workers);
        }
    }
    while (status == 0 && run->step < run->begun) status = training_finish_step(run, error);
    progress_end(&progress);
    loader_stop(loader);
    int skipped = 0;
    for (int i = 0; i < run->train.num_images; i++) skipped += reported[i] != 0;
    if (skipped) printf("unreadable pictures in %s: %d, skipped\n", run->train.split, skipped);
    free(reported);
    if (status < 0) return -1;
    if (saved_step != run->step) {
        if (training_save(run, run->folder, error) != 0) return -1;
        run->report.written = 0;
        training_report_progress(run);
    }
    if (stop_requested) {
        char *command = resume_command(run->settings, run->folder);
        printf("stopped at step %lld: go on with  %s\n", (long long)run->step, command);
        free(command);
    } else {
        printf("done: %lld steps, checkpoint in %s\n", (long long)run->step, run->folder);
    }
    if (run->step < run->last_step && training_is_over(run))
        printf("patience   no better AP in %lld evaluations: a larger --patience goes on\n",
               (long long)run->best.evaluations);
    if (run->best.epoch >= 0)
        printf("best       epoch %lld: loss %.4f, AP %.3f, in %s/best\n", (long long)run->best.epoch + 1,
               run->best.loss, run->best.ap, run->folder);
    return 0;
}

// Status 2 if flags exclude each other.
static void training_check_flags(const Settings *settings) {
    const char *resume = flag_text(settings, "resume");
    if (resume && flag_text(settings, "pretrained"))
        usage_error("--resume and --pretrained exclude each other: a run that goes on has its weights");
    static const char *const augmentations[] = {"scales", "vflip", "transpose"};
    for (int i = 0; i < 3 && flag_on(settings, "no_augment"); i++)
        if (flag_on(settings, augmentations[i]))
            usage_error("--%s and --no_augment exclude each other", augmentations[i]);
    if (flag_text(settings, "pretrained") && flag_text(settings, "norm_init"))
        usage_error("--norm_init is for runs without --pretrained, whose norms are kept");
    if (flag_on(settings, "freeze") && !flag_on(settings, "pretrained") && !resume)
        usage_error("--freeze needs --pretrained: what starts from random numbers must be trained");
    if (flag_given(settings, "lr_drop") && strcmp(flag_text(settings, "lr_schedule"), "cosine") == 0)
        usage_error("--lr_drop and --lr_schedule cosine exclude each other: the cosine falls without steps");
}

// 0; -1 if --data is no folder.
static int training_find_data(const Settings *settings, Error *error) {
    flag_require(settings, "data");
    const char *data = flag_text(settings, "data");
    if (is_directory(data)) return 0;
    return fail(error, "%s: %s", data, access(data, F_OK) == 0 ? "is not a folder" : "does not exist");
}

// Refuses to go on in OUT/previous, which the run in OUT replaces, or from a checkpoint that is damaged. 0, or -1.
static int training_check_resumed(const Settings *settings, Error *error) {
    const char *folder = flag_text(settings, "resume");
    char *state = format_string("%s/../trainer_state.json", folder), *parent = format_string("%s", folder);
    size_t end = strlen(parent);
    while (end > 1 && parent[end - 1] == '/') parent[--end] = 0;
    char *name = strrchr(parent, '/');
    int status;
    if (name && strcmp(name, "/previous") == 0 && is_file(state)) {
        *name = 0;
        char *command = restore_command(settings, folder, parent);
        status = fail(error, "%s is what the run in %s falls back on: go on with  %s", folder, parent, command);
        free(command);
    } else {
        status = checkpoint_check(settings, "resume", CHECKPOINT_FILES, NUM_CHECKPOINT_FILES, error);
    }
    free(state);
    free(parent);
    return status;
}

// From the flags to OUT's folder: locked, and empty of other runs unless this one resumes there.
static int training_open_folder(Training *run, Error *error) {
    Settings *settings = run->settings;
    const char *resume = flag_text(settings, "resume"), *output_dir = flag_text(settings, "output_dir");
    training_check_flags(settings);
    if (!resume) flag_require(settings, "output_dir");
    if (resume && output_dir && !same_path(resume, output_dir))
        usage_error("--output_dir %s contradicts --resume %s: a run goes on in its own folder; leave --output_dir out",
                    output_dir, resume);
    run->folder = resume ? resume : output_dir;
    if (resume && !is_directory(resume))
        return fail(error, "%s: %s", resume, access(resume, F_OK) == 0 ? "is not a folder" : "does not exist");
    if (!resume && (training_find_data(settings, error) != 0 || make_directories(output_dir, error) != 0)) return -1;
    run->lock = fileset_lock(run->folder, error);
    if (run->lock < 0) return -1;
    char *state = format_string("%s/trainer_state.json", run->folder);
    int status = resume ? training_check_resumed(settings, error) : 0;
    if (resume && status == 0 && !is_file(state)) {
        status = fail(
            error, "%s: no such file, so there is no run to go on with; --pretrained %s would start from its weights",
            state, resume);
    } else if (resume && status == 0) {
        run->state_tree = json_read(state, error);
        settings->source[flag_index(settings, "output_dir")] =
            FROM_DEFAULT;  // a folder that was moved or copied goes on
        if (!run->state_tree || settings_resume(settings, json_member(run->state_tree, "flags"), state, error) != 0)
            status = -1;
        flag_set(settings, "output_dir", run->folder, FROM_USER);
    } else {
        const char *names[5] = {"trainer_state.json", "model.safetensors", "ema.safetensors", "config.json", "log.txt"};
        for (int i = 0; i < 5 && status == 0; i++) {
            char *path = format_string("%s/%s", run->folder, names[i]);
            if (access(path, F_OK) == 0)
                status = fail(
                    error,
                    "%s is there already: go on with that run by --resume %s, or give this one another --output_dir",
                    path, run->folder);
            free(path);
        }
    }
    free(state);
    return status;
}

static int training_open_data(Training *run, Error *error) {
    const Settings *settings = run->settings;
    const char *data = flag_text(settings, "data"), *split = flag_text(settings, "split");
    flag_require(settings, "data");
    if (open_split(&run->train, settings, flag_text(settings, "train_split"), error) != 0) return -1;
    dataset_print_facts(stdout, &run->train);
    run->has_val = dataset_has_split(data, split);
    if (!run->has_val && flag_given(settings, "split"))
        return dataset_open(&run->val, data, split, error);  // names what is there
    if (run->has_val && open_split(&run->val, settings, split, error) != 0) return -1;
    if (run->has_val)
        printf("evaluation split %s: %d images, %d boxes, %d entries skipped\n", split, run->val.num_images,
               run->val.num_targets, run->val.num_problems);
    else
        printf("evaluation none: there is no split \"%s\"\n", split);
    if (!run->has_val && flag_int64(settings, "patience"))
        return fail(error, "%s: has no split \"%s\", whose AP --patience would wait for", data, split);
    run->loader.seed = (uint64_t)flag_int64(settings, "seed");
    run->loader.short_side = flag_int(settings, "short_side");
    run->loader.max_size = flag_int(settings, "max_size");
    run->loader.augment = flag_on(settings, "no_augment") ? AUGMENT_NOTHING
                          : flag_on(settings, "scales")   ? AUGMENT_JITTER
                                                          : AUGMENT_CROP;
    run->loader.scales = flag_number(settings, "scales");
    run->loader.vflip = flag_on(settings, "vflip");
    run->loader.transpose = flag_on(settings, "transpose");
    run->loader.shuffle = !flag_on(settings, "no_shuffle");
    run->loader.batch_size = flag_int(settings, "batch_size");
    run->loader.workers = flag_int(settings, "num_workers");
    run->loader.prefetch = flag_int(settings, "prefetch");
    for (int i = 0; i < 2; i++) run->pictures[i] = (int *)allocate((size_t)run->loader.batch_size * sizeof(int));
    run->steps_per_epoch = run->train.num_images / run->loader.batch_size;
    if (run->steps_per_epoch < 1)
        return fail(error, "%s: %d images do not fill one batch: --batch_size %d at most", run->train.source,
                    run->train.num_images, run->train.num_images);
    run->last_step = flag_int64(settings, "epochs") * run->steps_per_epoch;
    if (flag_text(settings, "steps") && flag_int64(settings, "steps") < run->last_step)
        run->last_step = flag_int64(settings, "steps");
    Schedule schedule = {strcmp(flag_text(settings, "lr_schedule"), "cosine") == 0,
                         flag_int64(settings, "warmup_steps"), flag_int64(settings, "lr_drop") * run->steps_per_epoch,
                         run->last_step};
    run->schedule = schedule;
    run->train_labels = (int *)allocate((size_t)run->train.num_categories * sizeof(int));
    run->val_labels = (int *)allocate((size_t)run->val.num_categories * sizeof(int));
    run_report_choose(&run->report, &run->val);
    return 0;
}

// The focal loss is a small number (a query that is as unsure as can be, at p = 0.5, has 0.04 to 0.13): it counts
// twice, in the matching too, as in Deformable DETR.
static LossSettings loss_from_flags(const Settings *settings, const ModelConfig *config) {
    const double class_weight = config->focal ? 2 : 1;
    LossSettings loss = {class_weight * flag_number(settings, "set_cost_class"),
                         flag_number(settings, "set_cost_bbox"),
                         flag_number(settings, "set_cost_giou"),
                         class_weight,
                         flag_number(settings, "bbox_loss_coef"),
                         flag_number(settings, "giou_loss_coef"),
                         flag_number(settings, "eos_coef"),
                         !flag_on(settings, "no_aux_loss"),
                         (int)flag_int64(settings, "aux_matches")};
    return loss;
}

// The network, and which of its outputs each class has. 0, or -1.
static int training_open_network(Training *run, Error *error) {
    if ((run->state_tree ? training_resume(run, error) : training_begin(run, error)) != 0) return -1;
    run->loss = loss_from_flags(run->settings, &run->network.config);
    if (run->has_val && match_labels(run->val_labels, &run->network, &run->val)) {
        for (int c = 0; c < run->val.num_categories; c++)
            if (run->val_labels[c] < 0)
                return fail(error, "%s: class \"%s\" is not among the classes of %s", run->val.source,
                            run->val.categories[c].name, run->train.source);
    }
    return 0;
}

// What the network and its memory will be, for the largest picture that can come. 0; -1 if memory is short.
static int training_size(Training *run, int *height, int *width, Error *error) {
    int h, w;
    training_print_model(stdout, run);
    LoaderSettings plain = run->loader;
    plain.augment = AUGMENT_NOTHING;
    *height = *width = 0;
    loader_worst_size(&run->train, &run->loader, &h, &w);
    widen_plan(height, width, h, w);
    loader_worst_size(&run->train, &plain, &h, &w);
    widen_plan(height, width, h, w);
    if (run->has_val) loader_worst_size(&run->val, &plain, &h, &w);
    widen_plan(height, width, h, w);
    const int train = longest_side(&run->train), val = longest_side(&run->val);
    run->loader.defer_side = defer_side(train > val ? train : val, *height, *width);
    run->loader.kept = engine.is_gpu;
    warn_of_data(stderr, &run->train, &run->network.config, run->from_scratch);
    return training_plan(run, *height, *width, error);
}

static int training_run(Training *run, Error *error) {
    int height, width;
    if (training_open_folder(run, error) != 0 || training_open_data(run, error) != 0 ||
        training_open_network(run, error) != 0 || training_size(run, &height, &width, error) != 0 ||
        training_check_disk(run, error) != 0)
        return -1;
    const char *norm_init = flag_text(run->settings, "norm_init");
    if (run->from_scratch && !run->state_tree && !(norm_init && strcmp(norm_init, "identity") == 0) &&
        training_calibrate(run, height, width, error) != 0)
        return -1;
    model_pack(&run->network.model);
    if (engine.start(run->settings, &run->network.model, run->acts, height, width, run->loader.defer_side, 1,
                     run->in_flight, most_targets(&run->train), error) != 0)
        return -1;
    if (run->state_tree)
        printf("resume     %s at step %lld of %lld\n", run->folder, (long long)run->step, (long long)run->last_step);
    if (run->step >= run->last_step &&
        run->step <= run->epochs_logged * run->steps_per_epoch + run->steps_per_epoch - 1) {
        printf("nothing to do: %lld steps are taken; a larger --epochs or --steps goes on\n", (long long)run->step);
        return 0;
    }
    if (run->step < run->last_step && training_is_over(run)) {
        printf("nothing to do: no better AP in %lld evaluations; a larger --patience goes on\n",
               (long long)run->best.evaluations);
        return 0;
    }
    return training_loop(run, error);
}

static void training_init(Training *run, Settings *settings) {
    memset(run, 0, sizeof *run);
    run->acts = (Activations *)allocate((size_t)omp_get_max_threads() * sizeof(Activations));
    run->settings = settings;
    run->best.epoch = run->report.epoch = -1;
    run->log_begin = run->report.begin = seconds_now();
}

static int command_train(Settings *settings, Error *error) {
    Training run;
    training_init(&run, settings);
    watch_signals();
    int status = training_run(&run, error);
    training_free(&run);
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Commands: check

// Everything that was found, as JSON. why: NULL, or why training cannot start. 0, or -1.
static int check_write_json(const char *path, const Training *run, const Inspection *inspection, const char *why,
                            Error *error) {
    FILE *file = fopen(path, "w");
    if (!file) return fail(error, "%s: cannot be written: %s", path, strerror(errno));
    fprintf(file, "{\"can_start\": %s, \"error\": ", why ? "false" : "true");
    if (why)
        json_print_string(file, why);
    else
        fputs("null", file);
    fputs(",\n", file);
    inspection_write(file, inspection);
    fprintf(file, ",\n\"pictures_in_flight\": %d, \"memory_bytes\": {", run->in_flight);
    for (int i = 0; i < run->report.num_memory; i++)
        fprintf(file, "%s\"%s\": %.0f", i ? ", " : "", run->report.memory[i].name, run->report.memory[i].value);
    fputs("}}\n", file);
    return coco_close(file, path, error);
}

// What train does before its first step, and a look at every picture instead of that step. 0 if it could begin.
static int command_check(Settings *settings, Error *error) {
    Training run;
    Inspection inspection;
    int height, width;
    if (flag_on(settings, "resume")) usage_error("check is for a run that begins: leave --resume out");
    training_check_flags(settings);
    training_init(&run, settings);
    memset(&inspection, 0, sizeof inspection);
    memset(error, 0, sizeof *error);
    int status = training_find_data(settings, error);
    if (status == 0) status = training_open_data(&run, error);
    if (status == 0) status = training_open_network(&run, error);
    if (run.train.num_images) {
        const int num_queries = run.network.config.num_queries;
        inspect(&inspection, &run.train, run.val.num_images ? &run.val : NULL,
                num_queries ? num_queries : flag_int(settings, "num_queries"));
        inspection_print(stdout, &inspection);
        if (status == 0 && inspection.unreadable[0] == run.train.num_images)
            status = fail(error, "%s: none of %d training pictures can be read, the first: %s", run.train.source,
                          run.train.num_images, inspection.findings[FOUND_UNREADABLE][0]);
    }
    if (status == 0) status = training_size(&run, &height, &width, error);
    if (flag_on(settings, "json")) {
        Error why = *error;
        if (check_write_json(flag_text(settings, "json"), &run, &inspection, status == 0 ? NULL : why.text, error) != 0)
            status = -1;
        else if (status != 0)
            *error = why;
    }
    if (status == 0) printf("training can start\n");
    inspection_free(&inspection);
    training_free(&run);
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Commands: eval, predict, score, bench

// Scores boxes, prints the lines and the table, and writes --json, with the members `more`. 0, or -1.
static int score_and_show(const Settings *settings, const Dataset *set, const EvalDetection *detections, int count,
                          const char *more, Error *error) {
    const char *json = flag_text(settings, "json");
    CocoScores scores;
    coco_score(&scores, set, detections, count);
    coco_print(stdout, &scores, set->categories);
    int status = json ? coco_write_json(json, &scores, set->categories, more, error) : 0;
    coco_scores_free(&scores);
    return status;
}

// Prints AP and speed by the number of decoder layers. Arrays: (depths), of 1 layer, 2, ... (see evaluate). Returns the
// same as members for --json; the caller frees them.
static char *print_sweep(const Dataset *set, int depths, EvalDetection *const *detections, const int *num_detections,
                         const double *seconds) {
    char *json = format_string(", \"dec_layers\": [");
    printf("\ndecoder layers     AP   AP50  images/s\n");
    for (int d = 0; d < depths; d++) {
        CocoScores scores;
        coco_score(&scores, set, detections[d], num_detections[d]);
        const double ap = scores.stats[0], ap50 = scores.stats[1], rate = seconds[d] > 0 ? 1 / seconds[d] : 0;
        char *before = json;
        printf("%14d  %.3f  %.3f  %8.2f\n", d + 1, ap, ap50, rate);
        json = format_string("%s\n{\"layers\": %d, \"AP\": %.17g, \"AP50\": %.17g, \"images_per_second\": %.17g}%s",
                             before, d + 1, ap, ap50, rate, d < depths - 1 ? "," : "]");
        free(before);
        coco_scores_free(&scores);
    }
    printf("\n");
    return json;
}

static int eval_on(const Settings *settings, Network *network, Activations *acts, Dataset *set, int *labels,
                   Error *error) {
    LoaderSettings loader;
    memset(&loader, 0, sizeof loader);
    loader.short_side = network->short_side, loader.max_size = network->max_size;
    loader.batch_size = 1;
    loader.workers = flag_int(settings, "num_workers"), loader.prefetch = flag_int(settings, "prefetch");
    const int sweep = flag_on(settings, "sweep_dec_layers"), depths = sweep ? network->config.dec_layers : 1;
    int height, width, num_detections[MAX_DEC_LAYERS], missing = match_labels(labels, network, set), status = 0;
    double seconds[MAX_DEC_LAYERS] = {0};
    if (missing == set->num_categories)
        return fail(error, "%s: none of its %d classes is in %s/config.json's id2label", set->source, missing,
                    flag_text(settings, "resume"));
    for (int c = 0; c < set->num_categories && missing; c++)
        if (labels[c] < 0)
            fprintf(stderr, "warning: class \"%s\" is not in id2label: its boxes cannot be found\n",
                    set->categories[c].name);
    loader_worst_size(set, &loader, &height, &width);
    loader.defer_side = defer_side(longest_side(set), height, width);
    if (engine.start(settings, &network->model, acts, height, width, loader.defer_side, 0, 1, 0, error) != 0) return -1;
    EvalDetection *detections[MAX_DEC_LAYERS];
    evaluate(network, acts, set, loader, labels, NULL, NULL, NULL, depths, detections, num_detections, seconds);
    printf("%s, one picture at a time, short side %d, at most %d\n", set->source, loader.short_side, loader.max_size);
    char *table = sweep ? print_sweep(set, depths, detections, num_detections, seconds) : NULL;
    status =
        score_and_show(settings, set, detections[depths - 1], num_detections[depths - 1], table ? table : "", error);
    if (status == 0 && flag_text(settings, "results"))
        status = coco_write_results(flag_text(settings, "results"), set, detections[depths - 1],
                                    num_detections[depths - 1], error);
    for (int d = 0; d < depths; d++) free(detections[d]);
    free(table);
    return status;
}

static int command_eval(Settings *settings, Error *error) {
    Network network;
    Activations acts;
    Dataset set;
    memset(&network, 0, sizeof network);
    memset(&acts, 0, sizeof acts);
    flag_require(settings, "data");
    flag_require(settings, "resume");
    if (open_split(&set, settings, flag_text(settings, "split"), error) != 0) return -1;
    int *labels = (int *)allocate((size_t)set.num_categories * sizeof(int));
    int status = network_open(&network, settings, error);
    if (status == 0) dataset_print_facts(stdout, &set);
    if (status == 0) status = eval_on(settings, &network, &acts, &set, labels, error);
    activations_free(&acts);
    network_free(&network);
    dataset_free(&set);
    free(labels);
    return status;
}

// Tensors of all pictures for --dump, written at the end.
typedef struct {
    SafeTensor *tensors;
    int count;
} Dump;

static void dump_add(Dump *dump, int picture, const char *what, const void *values, int half, int dim0, int dim1,
                     int dim2) {
    size_t count = (size_t)dim0 * (size_t)dim1 * (size_t)(dim2 ? dim2 : 1);
    float *copy = (float *)allocate(count * sizeof(float));
    for (size_t i = 0; i < count; i++) copy[i] = (float)load_number(values, i, half);
    dump->tensors = (SafeTensor *)grow(dump->tensors, (size_t)dump->count, sizeof(SafeTensor));
    SafeTensor *tensor = &dump->tensors[dump->count++];
    memset(tensor, 0, sizeof *tensor);
    tensor->name = format_string("%d.%s", picture, what);
    tensor->dtype = "F32";
    tensor->ndim = dim2 ? 3 : 2;
    tensor->shape[0] = dim0, tensor->shape[1] = dim1, tensor->shape[2] = dim2;
    tensor->data = copy;
}

static void predict_json(FILE *json, const Network *network, const char *path, int first, int width, int height,
                         const Detection *found, int count) {
    fprintf(json, "%s\n{\"file\": ", first ? "" : ",");
    json_print_string(json, path);
    fprintf(json, ", \"width\": %d, \"height\": %d, \"detections\": [", width, height);
    for (int d = 0; d < count; d++) {
        fprintf(json, "%s\n  {\"label\": ", d ? "," : "");
        json_print_string(json, network->label_names[found[d].label]);
        fprintf(json, ", \"category_id\": %lld, \"score\": %.17g, \"box\": [%.17g, %.17g, %.17g, %.17g]}",
                (long long)network->label_ids[found[d].label], found[d].score, found[d].box[0], found[d].box[1],
                found[d].box[2], found[d].box[3]);
    }
    fputs("]}", json);
}

static int predict_draw(Image *image, const Network *network, const char *picture, const char *folder,
                        PictureFiles *taken, const Detection *found, int count, Error *error) {
    const char *path = picture_copy_path(taken, folder, picture, error);
    if (!path) return -1;
    for (int d = count - 1; d >= 0; d--) draw_detection(image, network, found[d].label, found[d].score, found[d].box);
    return image_write(path, image, error);
}

// What predict writes, and what it has done so far.
typedef struct {
    const Settings *settings;
    Network network;
    Activations acts;
    PictureFiles pictures, drawn;
    int defer_side;  // as LoaderSettings have it
    Dump dump;
    FILE *json;
    int done, unreadable, boxes;
} Prediction;

// One picture that was read, predicted, and written wherever the flags ask for it. 0, or -1 if something could not be
// written.
static int predict_picture(Prediction *run, Sample *sample, Detection *found, Error *error) {
    const char *path = run->pictures.paths[sample->index];
    const char *draw = flag_text(run->settings, "draw"), *dump = flag_text(run->settings, "dump");
    const ModelConfig *shape = &run->network.config;
    const int num_queries = shape->num_queries, classes = num_logits(shape);
    const int width = sample->original_width, height = sample->original_height;
    int count = 0, status = 0;
    if (!sample->image.pixels) {
        fprintf(stderr, "%s: left out\n", sample->error.text);
        run->unreadable++;
        return 0;
    }
    engine.encode(&run->network.model, &run->acts, sample);
    engine.decode(&run->network.model, &run->acts);
    detect(&run->network, &run->acts, width, height, found);
    for (int q = 0; q < num_queries; q++) {
        if (!(found[q].score > flag_number(run->settings, "threshold"))) continue;
        Detection *kept = &found[count++];
        *kept = found[q];
        for (int i = 0; i < 4; i++) kept->box[i] = fmin(fmax(kept->box[i], 0), i & 1 ? height : width);
    }
    qsort(found, (size_t)count, sizeof(Detection), compare_detections);
    if (run->json) predict_json(run->json, &run->network, path, run->done == 0, width, height, found, count);
    if (dump) {
        size_t last = (size_t)(shape->dec_layers - 1) * (size_t)num_queries;
        if (engine.is_gpu) normalise_pixels(run->acts.pixels, &sample->image, shape->half);
        dump_add(&run->dump, run->done, "pixel_values", run->acts.pixels, shape->half, sample->image.height,
                 sample->image.width, 3);
        dump_add(&run->dump, run->done, "logits", run->acts.logits + last * (size_t)classes, 0, num_queries, classes,
                 0);
        dump_add(&run->dump, run->done, "pred_boxes", run->acts.boxes + last * 4, 0, num_queries, 4, 0);
    }
    for (int d = 0; d < count && !run->json && !draw && !dump; d++)
        printf("%s: %s %.3f  %.1f %.1f %.1f %.1f\n", path, run->network.label_names[found[d].label], found[d].score,
               found[d].box[0], found[d].box[1], found[d].box[2], found[d].box[3]);
    if (draw) status = predict_draw(&sample->original, &run->network, path, draw, &run->drawn, found, count, error);
    run->done++;
    run->boxes += count;
    return status;
}

// All pictures in their order, which the loader's threads read ahead. How it goes is shown on stderr, unless the boxes
// themselves are printed. 0, or -1 if something could not be written.
static int predict_pictures(Prediction *run, Error *error) {
    const Settings *settings = run->settings;
    const int total = run->pictures.count, shown = run->json || flag_on(settings, "draw") || flag_on(settings, "dump");
    Dataset set;
    LoaderSettings loader_settings;
    int status = 0;
    memset(&set, 0, sizeof set);
    memset(&loader_settings, 0, sizeof loader_settings);
    set.num_images = total;
    set.images = (DatasetImage *)allocate((size_t)total * sizeof(DatasetImage));
    for (int i = 0; i < total; i++) set.images[i].path = run->pictures.paths[i];
    loader_settings.short_side = run->network.short_side, loader_settings.max_size = run->network.max_size;
    loader_settings.batch_size = 1, loader_settings.originals = flag_on(settings, "draw");
    loader_settings.defer_side = run->defer_side;
    loader_settings.workers = flag_int(settings, "num_workers");
    loader_settings.prefetch = flag_int(settings, "prefetch");
    Detection *found = (Detection *)allocate((size_t)run->network.config.num_queries * sizeof(Detection));
    const double begin = seconds_now();
    Loader *loader = loader_start(&set, &loader_settings, 0);
    Progress progress = {begin, 0, stderr};
    for (int i = 0; i < total && status == 0; i++) {
        status = predict_picture(run, loader_next_batch(loader), found, error);
        if (shown && progress_due(&progress))
            progress_show(&progress, "%d/%d pictures  %.2f images/s  %.0f %% waiting for data", i + 1, total,
                          (i + 1) / (seconds_now() - begin),
                          100 * loader_wait_seconds(loader) / (seconds_now() - begin));
    }
    progress_end(&progress);
    if (status == 0) print_pace(run->done, seconds_now() - begin, loader_wait_seconds(loader));
    loader_stop(loader);
    free(found);
    free(set.images);
    return status;
}

static int predict_all(Prediction *run, Error *error) {
    const Settings *settings = run->settings;
    const char *json = flag_text(settings, "json"), *draw = flag_text(settings, "draw"),
               *dump = flag_text(settings, "dump");
    int height = 1, width = 1, longest = 0, status = 0;
    if (network_open(&run->network, settings, error) != 0) return -1;
    if (draw && make_directories(draw, error) != 0) return -1;
    if (json && !(run->json = fopen(json, "w"))) return fail(error, "%s: cannot be written: %s", json, strerror(errno));
    for (int i = 0; i < settings->num_arguments; i++) picture_files_find(&run->pictures, settings->arguments[i]);
    for (int i = 0; i < run->pictures.count;
         i++) {  // plan for the largest; one that cannot be read is reported in its turn
        Error unused;
        int w, h, out_width, out_height;
        if (image_read_size(run->pictures.paths[i], &w, &h, &unused) != 0) continue;
        longest = w > longest ? w : longest, longest = h > longest ? h : longest;
        resized_size(w, h, run->network.short_side, run->network.max_size, &out_width, &out_height);
        widen_plan(&height, &width, out_height, out_width);
    }
    const int side = defer_side(longest, height, width);
    run->defer_side = dump ? 0 : side;  // what is dumped is made here
    if (engine.start(settings, &run->network.model, &run->acts, height, width, side, 0, 1, 0, error) != 0) return -1;
    if (json) fputc('[', run->json);
    if (run->pictures.count) status = predict_pictures(run, error);
    if (json) fputs("]\n", run->json);
    if (json && coco_close(run->json, json, error) != 0) return -1;
    if (status == 0 && dump) status = safetensors_write(dump, run->dump.tensors, run->dump.count, error);
    if (status != 0) return -1;
    printf("%d pictures, %d boxes with a score above %s%s%s\n", run->done, run->boxes, flag_text(settings, "threshold"),
           draw ? ", drawn in " : "", draw ? draw : "");
    return run->unreadable ? fail(error, "%d of %d pictures could not be read", run->unreadable, run->pictures.count)
                           : 0;
}

static int command_predict(Settings *settings, Error *error) {
    Prediction run;
    memset(&run, 0, sizeof run);
    run.settings = settings;
    flag_require(settings, "resume");
    if (settings->num_arguments == 0)
        usage_error("predict needs an IMAGE or a DIR after the flags: see %s predict --help", settings->program);
    int status = predict_all(&run, error);
    for (int i = 0; i < run.dump.count; i++) {
        free((void *)run.dump.tensors[i].name);
        free((void *)run.dump.tensors[i].data);
    }
    free(run.dump.tensors);
    picture_files_free(&run.pictures);
    picture_files_free(&run.drawn);
    activations_free(&run.acts);
    network_free(&run.network);
    return status;
}

static int command_score(Settings *settings, Error *error) {
    Dataset set;
    EvalDetection *detections = NULL;
    int count;
    flag_require(settings, "annotations");
    flag_require(settings, "results");
    if (dataset_open_coco_file(&set, flag_text(settings, "annotations"), NULL, error) != 0) return -1;
    for (int i = 0; i < set.num_problems; i++) fprintf(stderr, "%s\n", set.problems[i]);
    if (set.num_problems) printf("skipped    %d entries of %s\n", set.num_problems, set.source);
    int status = coco_read_results(flag_text(settings, "results"), &set, &detections, &count, error);
    if (status == 0) status = score_and_show(settings, &set, detections, count, "", error);
    free(detections);
    dataset_free(&set);
    return status;
}

static int compare_doubles(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return left < right ? -1 : left > right;
}

// A random picture with seven boxes; number: which one.
static void bench_sample(Sample *sample, int height, int width, int num_classes, int number) {
    enum { BOXES = 7 };
    memset(sample, 0, sizeof *sample);
    sample->image = image_new(width, height);
    sample->width = sample->original_width = width, sample->height = sample->original_height = height;
    sample->num_boxes = BOXES;
    sample->boxes = (double *)allocate(4 * BOXES * sizeof(double));
    sample->classes = (int *)allocate(BOXES * sizeof(int));
    size_t bytes = 3 * (size_t)width * (size_t)height;
    for (size_t i = 0; i < bytes; i += 16) {
        uint32_t words[4];
        random_words(words, 0, RANDOM_TEST, 0, 0, (uint32_t)number, (uint32_t)(i / 16));
        memcpy(sample->image.pixels + i, words, bytes - i < 16 ? bytes - i : 16);
    }
    for (int b = 0; b < BOXES; b++) {
        for (int i = 0; i < 4; i++)
            sample->boxes[4 * b + i] =
                (i < 2 ? 0.3 : 0.1) +
                0.4 * random_uniform(0, RANDOM_TEST, 1, 0, (uint32_t)number, (uint64_t)(4 * b + i));
        sample->classes[b] =
            (int)random_below(0, RANDOM_TEST, 2, 0, (uint32_t)number, (uint64_t)b, (uint32_t)num_classes);
    }
}

static int compare_profile_lines(const void *a, const void *b) {
    double left = ((const ProfileLine *)a)->seconds, right = ((const ProfileLine *)b)->seconds;
    return left < right ? 1 : left > right ? -1 : 0;
}

// Prints what the profile holds of `runs` runs that took `seconds` in all, the longest first; on a GPU that is the time
// of its kernels. peak: GFLOP/s, or 0, unknown.
static void print_profile(const char *title, double seconds, int runs, double peak) {
    double known = 0;
    printf("\n%-24s %-17s %7s %9s %6s %9s %7s %7s\n", title, "", "calls", "ms", "share",
           engine.is_gpu ? "TFLOP/s" : "GFLOP/s", peak > 0 ? "of peak" : "", "GB/s");
    qsort(profile.lines, (size_t)profile.count, sizeof profile.lines[0], compare_profile_lines);
    for (int i = 0; i < profile.count; i++) {
        const ProfileLine *line = &profile.lines[i];
        known += line->seconds;
        printf("%-24s %-17s %7ld %9.2f %5.1f%%", line->work, line->pass, line->calls / runs, 1e3 * line->seconds / runs,
               100 * line->seconds / seconds);
        char of_peak[16] = "";
        if (line->flops > 0 && peak > 0)
            snprintf(of_peak, sizeof of_peak, "%.0f%%", line->flops / line->seconds / peak / 1e7);
        if (line->flops > 0)
            printf(" %9.1f %7s", line->flops / line->seconds / (engine.is_gpu ? 1e12 : 1e9), of_peak);
        else
            printf(" %9s %7s", "", "");
        printf(line->bytes > 0 ? " %7.1f\n" : "\n", line->bytes / line->seconds / 1e9);
    }
    printf("%-24s %-17s %7s %9.2f %5.1f%%\n", "everything else", "", "", 1e3 * (seconds - known) / runs,
           100 * (seconds - known) / seconds);
    printf("%-24s %-17s %7s %9.2f %5.1f%%\n", "all", "", "", 1e3 * seconds / runs, 100.0);
}

// Times one command of the two (train: a step, else an inference): the median of 3 to 7 runs, after one that is not
// counted, stopping when they have taken half a minute. With profile.on it prints where their time went.
static double bench_seconds(Model *model, Activations *acts, const LossSettings *loss, Sample *samples, int batch,
                            int train, double peak, Error *error) {
    OptimizerSettings optimizer = {1e-4, 1e-5, 1e-4, 0.1, 0};
    double times[7], total = 0;
    int count = 0;
    for (int run = -1; run < 7 && (run < 3 || total < 30); run++) {
        Losses losses;
        double begin = seconds_now();
        if (run == 0) profile.count = 0;
        if (!train) {
            engine.encode(model, acts, &samples[0]);
            engine.decode(model, acts);
        } else if (engine.train(model, acts, loss, &optimizer, samples, batch, 0, run + 1, &losses, error) != 0 ||
                   engine.finish(model, error) != 0) {
            return -1;
        }
        if (run < 0) continue;
        times[count] = seconds_now() - begin;
        total += times[count++];
    }
    if (profile.on) print_profile(train ? "training step" : "inference", total, count, peak);
    qsort(times, (size_t)count, sizeof(double), compare_doubles);
    return count % 2 ? times[count / 2] : (times[count / 2 - 1] + times[count / 2]) / 2;
}

static int command_bench(Settings *settings, Error *error) {
    const char *size = flag_text(settings, "size"), *json_path = flag_text(settings, "json");
    ModelConfig config = config_from_flags(settings);
    LossSettings loss = {1, 5, 2, 1, 5, 2, 0.1, !flag_on(settings, "no_aux_loss"), 1};
    Model model;
    int height, width, used = 0, batch = flag_int(settings, "batch_size");
    if (sscanf(size, "%5dx%5d%n", &height, &width, &used) != 2 || size[used] || height < 1 || width < 1 ||
        height > 16384 || width > 16384)
        usage_error("--size must be HEIGHTxWIDTH in pixels, from 1 to 16384, not \"%s\"", size);
    config.num_labels = 91;  // COCO's
    if (model_create(&model, &config, batch, 1, 0, error) != 0) return -1;
    model_initialise(&model, 0);
    model_pack(&model);
    profile.on = flag_on(settings, "profile");
    const int in_flight = profile.on ? 1 : pictures_in_flight(settings, &model, height, width, 0);
    Activations *acts = (Activations *)allocate((size_t)in_flight * sizeof(Activations));
    const int side = defer_side(0, height, width);
    if (engine.start(settings, &model, acts, height, width, side, 1, in_flight, 7, error) != 0) return -1;
    Sample *samples = (Sample *)allocate((size_t)batch * sizeof(Sample));
    for (int i = 0; i < batch; i++) bench_sample(&samples[i], height, width, config.num_labels, i);
    const size_t device_bytes = engine.bytes;
    double peak = engine.is_gpu ? 0 : measure_peak_gflops(config.half), infer_seconds = 0,
           train_seconds = bench_seconds(&model, acts, &loss, samples, batch, 1, peak, error);
    double untrained, flops = forward_flops(&model, height, width, &untrained);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    activations_free(acts);
    if (engine.start(settings, &model, acts, height, width, side, 0, 1, 0, error) != 0) return -1;
    if (train_seconds > 0) infer_seconds = bench_seconds(&model, acts, &loss, samples, batch, 0, peak, error);
    double train_flops = batch * (3 * flops - 2 * untrained);
    int status = train_seconds > 0 ? 0 : -1;
    if (status == 0) {
        const char *precision = config.half ? "bf16" : sizeof(real) == 4 ? "fp32" : "fp64";
        printf("%s %dx%d, batch %d, ", flag_text(settings, "backbone"), height, width, batch);
        if (engine.is_gpu)
            printf("%s, %s\n", flag_text(settings, "precision"), engine.device);
        else
            printf("%d in flight, %d threads, %s, %s\n", in_flight, omp_get_max_threads(), precision, KERNEL);
        printf("training step  %8.3f s  %7.1f Gflop/s  %.2f images/s\n", train_seconds,
               train_flops / train_seconds / 1e9, batch / train_seconds);
        printf("inference      %8.3f s  %7.1f Gflop/s\n", infer_seconds, flops / infer_seconds / 1e9);
        if (engine.is_gpu)
            printf("memory         %8.1f MiB of the GPU's in training, %.1f in inference\n",
                   (double)device_bytes / 1048576, (double)engine.bytes / 1048576);
        else
            printf("peak           %18.1f Gflop/s, measured; %.2f GiB of memory\n", peak,
                   (double)usage.ru_maxrss / 1048576);
    }
    if (status == 0 && json_path) {
        FILE *json = fopen(json_path, "w");
        if (!json) status = fail(error, "%s: cannot be written: %s", json_path, strerror(errno));
        if (json) {
            fprintf(json,
                    "{\"train_step_s\": %.17g, \"infer_s\": %.17g, \"peak_rss_bytes\": %lld, \"gflops_train\": %.17g, "
                    "\"gflops_infer\": %.17g, ",
                    train_seconds, infer_seconds, (long long)usage.ru_maxrss * 1024, train_flops / train_seconds / 1e9,
                    flops / infer_seconds / 1e9);
            if (engine.is_gpu)
                fprintf(json, "\"device\": \"%s\", \"device_bytes_train\": %zu, \"device_bytes_infer\": %zu}\n",
                        engine.device, device_bytes, engine.bytes);
            else
                fprintf(json, "\"peak_gflops_measured\": %.17g}\n", peak);
            status = coco_close(json, json_path, error);
        }
    }
    for (int i = 0; i < batch; i++) sample_free(&samples[i]);
    free(samples);
    activations_free(acts);
    free(acts);
    model_free(&model);
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// The table of commands, and --help

static const struct {
    const char *name;
    int command;
    int (*run)(Settings *, Error *);
    const char *usage, *help;
} COMMANDS[] = {
    {"train", TRAIN, command_train, "--data DIR --output_dir OUT [flags]  |  --resume OUT [flags]",
     "trains a network and writes checkpoints"},
    {"check", CHECK | TRAIN, command_check, "--data DIR [--json F] [flags of train]",
     "reads every annotation and decodes every picture of a data set, lists what is wrong or odd, and plans the memory "
     "of a training with these flags. Status 0: training can start, without what is listed as left out; 1: it cannot, "
     "and the last line says why"},
    {"eval", EVAL, command_eval, "--data DIR --resume OUT [flags]", "average precision of a checkpoint on a data set"},
    {"predict", PREDICT, command_predict, "--resume OUT [flags] IMAGE|DIR ...", "finds the objects in pictures"},
    {"score", SCORE, command_score, "--annotations instances.json --results results.json [--json F]",
     "average precision of boxes in a COCO results file"},
    {"bench", BENCH, command_bench, "[flags]", "times a training step and an inference on random pictures"},
};
enum { NUM_COMMANDS = sizeof COMMANDS / sizeof COMMANDS[0] };

// Help for one command, or for all.
static void print_help(const Settings *settings, int command) {
    if (command < 0) printf("DETR, object detection with a transformer: training and use on the CPU.\n\n");
    for (int c = 0; c < NUM_COMMANDS; c++)
        if (command < 0 || command == c)
            printf("%s %s %s\n    %s\n", settings->program, COMMANDS[c].name, COMMANDS[c].usage, COMMANDS[c].help);
    for (int c = 0; c < NUM_COMMANDS; c++) {
        if (command >= 0 && command != c) continue;
        printf("\nFlags of %s, [default]:\n", COMMANDS[c].name);
        settings_print_help(settings, COMMANDS[c].command & CHECK ? CHECK : COMMANDS[c].command);
        if (COMMANDS[c].command & CHECK) printf("  and all flags of train but --resume: see train --help\n");
    }
    if (command < 0 || COMMANDS[command].command & (TRAIN | BENCH)) {
        printf("\nPresets (a flag that is given counts before them):\n");
        settings_print_presets(settings);
    }
    printf("\nExit status: 0 done, 1 failed, 2 wrong call. OMP_NUM_THREADS sets the number of threads.\n");
    printf(
        "Kernel: %s. Built with PORTABLE=1, TRAIN_DETR_CPU=sse2, avx2, avx512, avx512bf16 or amx asks for another.\n",
        KERNEL);
}

#endif
