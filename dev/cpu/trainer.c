/*
trainer.c: the last rungs of ladder.c, where their contracts are: the kernels of train_detr.c, on one thread.
*/
#define TRAIN_DETR_NO_MAIN
#include "../../train_detr.c"

void trainer_matmul(float *c, const void *a, const float *b_transposed, int rows, int inner, int columns, int half,
                    float *packed) {
    const ConvShape shape = {inner, columns, 1, 1, 0, 1};
    const Epilogue epilogue = {NULL, NULL, 0, NULL, 0};
    omp_set_num_threads(1);
    pack_weights(packed, NULL, b_transposed, NULL, shape, half);
    conv_forward(c, a, rows, 1, packed, epilogue, shape, half);
}

void trainer_conv(float *y, const float *x, const float *w_transposed, const float *bias, const float *residual,
                  int height, int width, int in, int out, float *packed) {
    const ConvShape shape = {in, out, 3, 1, 1, 1};
    const Epilogue epilogue = {bias, residual, 1, NULL, 0};
    omp_set_num_threads(1);
    pack_weights(packed, NULL, w_transposed, NULL, shape, 0);
    conv_forward(y, x, height, width, packed, epilogue, shape, 0);
}

void trainer_weight(float *dw, const float *x, const float *dy, int height, int width, int in, int out,
                    float *workspace) {
    const ConvShape shape = {in, out, 3, 1, 1, 1};
    omp_set_num_threads(1);
    conv_backward_weight(dw, NULL, 1, x, dy, height, width, shape, 0, workspace);
}

size_t trainer_weight_workspace(int in, int out) {
    const ConvShape shape = {in, out, 3, 1, 1, 1};
    return conv_backward_weight_workspace(shape, 1);
}
