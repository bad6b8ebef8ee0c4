/*
What the network of train_detr.c makes of a batch, for test_detr.cu to hold the GPU's against: once as the CPU's own
floats (or bf16), and once, compiled by itself with REAL=double (truth.c), as the truth.

Included behind train_detr.c.
*/
#ifndef DETR_REFERENCE_H
#define DETR_REFERENCE_H

enum { REFERENCE_STEPS = 2 };

// Arrays of doubles whatever the network computes in. Tensors: as in the model's table.
typedef struct {
    const ModelConfig *config;
    int from_scratch, track_norms;
    const float *const *values;  // at the start
    const LossSettings *loss;
    const OptimizerSettings *optimizer;
    const Sample *samples;
    int count;
    uint64_t seed;
    int64_t first_step;
    // written
    double *logits, *boxes;  // without dropout: (images that could be read, L, Q, num_logits), (images, L, Q, 4)
    int *match;              // (images, L, Q)
    double **grads;          // of the first step
    double **after;          // the values behind the last one
    Losses losses[REFERENCE_STEPS];
} Reference;

static inline void copy_numbers(double *to, const real *from, size_t count) {
    for (size_t i = 0; i < count; i++) to[i] = (double)from[i];
}

// 0, or -1 with the reason.
static inline int reference_run(Reference *r, Error *error) {
    Model model;
    Activations acts;
    const size_t rows = (size_t)r->config->dec_layers * (size_t)r->config->num_queries,
                 classes = (size_t)num_logits(r->config);
    int height = 1, width = 1, status = model_create(&model, r->config, r->count, 1, r->from_scratch, error);
    for (int i = 0; i < r->count; i++) {
        height = r->samples[i].image.height > height ? r->samples[i].image.height : height;
        width = r->samples[i].image.width > width ? r->samples[i].image.width : width;
    }
    for (int i = 0; i < model.num_params; i++)
        for (size_t k = 0; k < model.params[i]->count; k++) model.params[i]->value[k] = (real)r->values[i][k];
    model.track_norms = r->track_norms;
    model_pack(&model);
    activations_create(&acts, &model, height, width, 1, 1);
    for (int i = 0, images = 0; i < r->count; i++) {
        if (!r->samples[i].image.pixels) continue;
        const size_t first = (size_t)images++ * rows;
        Losses unused;
        encode_image(&model, &acts, &r->samples[i].image);
        decoder_forward(&model, &acts);
        evaluation_losses(&model, &acts, r->loss, &r->samples[i], &unused);
        copy_numbers(r->logits + first * classes, acts.logits, rows * classes);
        copy_numbers(r->boxes + first * 4, acts.boxes, rows * 4);
        memcpy(r->match + first, acts.match, rows * sizeof(int));
    }
    for (int step = 0; step < REFERENCE_STEPS && status == 0; step++) {
        status = training_step(&model, &acts, r->loss, r->optimizer, r->samples, r->count, r->seed,
                               r->first_step + step, &r->losses[step], error);
        for (int i = 0; i < model.num_params && step == 0; i++)
            if (model.params[i]->trained) copy_numbers(r->grads[i], model.params[i]->grad, model.params[i]->count);
    }
    for (int i = 0; i < model.num_params; i++)
        copy_numbers(r->after[i], model.params[i]->value, model.params[i]->count);
    activations_free(&acts);
    model_free(&model);
    return status;
}

#ifdef __cplusplus
extern "C"
#endif
    int
    truth_run(Reference *reference, Error *error);  // the same in double: truth.c

#endif
