// truth.c: train_detr.c in double, as one function for test_detr.cu to link. Compiled with -DREAL=double.
#define TRAIN_DETR_NO_MAIN
#include "train_detr.c"

#include "dev/cuda/reference.h"

int truth_run(Reference *reference, Error *error) { return reference_run(reference, error); }
