/*
The flags of all commands in one table, and the presets. data/flags.h makes of it the parsing, --help, what a checkpoint
remembers and what a resumed run may change.

Part of train_detr.c, which includes it: everything a user types stands here.
*/
#ifndef DETR_SETTINGS_H
#define DETR_SETTINGS_H

// ---------------------------------------------------------------------------------------------------------------------
// Settings: the flags of all commands (data/flags.h makes parsing, --help, saving and resuming of this table)

enum { TRAIN = 1, EVAL = 2, PREDICT = 4, SCORE = 8, BENCH = 16, CHECK = 32 };

#define MOST_STEPS 1e15  // optimizer steps of a run

static const Flag FLAGS[] = {
    {"data", PATH, "DIR", NULL, 0, 0, TRAIN | EVAL | CHECK,
     "data set: COCO, Pascal VOC or YOLO, recognised by what the folder holds"},
    {"train_split", TEXT, "NAME", "train", 0, 0, TRAIN | CHECK, "its split to train on"},
    {"split", TEXT, "NAME", "val", 0, 0, TRAIN | EVAL | CHECK,
     "its split to evaluate on (train: after each epoch, where it exists)"},
    {"output_dir", PATH, "OUT", NULL, 0, 0, TRAIN,
     "folder for the checkpoint, log.txt and report.html; OUT/best: the checkpoint with the best AP so far"},
    {"resume", PATH, "OUT", NULL, 0, 0, TRAIN | EVAL | PREDICT,
     "a checkpoint: train goes on exactly where it stopped, with its flags"},
    {"raw_weights", SWITCH, NULL, NULL, 0, 0, EVAL | PREDICT,
     "of a run with --ema the weights as trained, model.safetensors, not their average"},
    {"use_dec_layers", INTEGER, "N", NULL, 1, MAX_DEC_LAYERS, EVAL | PREDICT,
     "compute the first N decoder layers and take the N-th one's boxes: faster, less accurate; all if not given"},
    {"sweep_dec_layers", SWITCH, NULL, NULL, 0, 0, EVAL,
     "print AP and speed with 1, 2, ... decoder layers too, all from one pass over the pictures"},
    {"pretrained", PATH, "FILE|DIR", NULL, 0, 0, TRAIN,
     "start from weights: a folder that transformers wrote, or a .safetensors file of DETR or of a ResNet"},
    {"freeze", TEXT, "NAME,...", NULL, 0, 0, TRAIN,
     "with --pretrained: parts that stay as they are, as their tensors' names begin: backbone, input_projection, "
     "query_position_embeddings, encoder, decoder, decoder.layers.0, bbox_predictor, ..."},
    {"preset", CHOICE, "small|detr", NULL, 0, 0, TRAIN | BENCH, "other defaults: see Presets"},
    {"annotations", PATH, "FILE", NULL, 0, 0, SCORE, "COCO annotation file with the true boxes"},
    {"results", PATH, "FILE", NULL, 0, 0, EVAL | SCORE, "COCO results: score reads them, eval writes them"},
    {"json", PATH, "FILE", NULL, 0, 0, EVAL | PREDICT | SCORE | BENCH | CHECK,
     "write the figures, or the boxes, as JSON"},
    {"draw", PATH, "DIR", NULL, 0, 0, PREDICT, "write each picture with its boxes"},
    {"dump", PATH, "FILE", NULL, 0, 0, PREDICT,
     "write pixel_values, logits and pred_boxes of each picture as safetensors"},
    {"threshold", NUMBER, "X", "0.5", 0, 1, PREDICT, "boxes with a higher score than this are shown"},
    {"size", TEXT, "HxW", "800x1066", 0, 0, BENCH, "height and width of the pictures, in pixels"},
    {"profile", SWITCH, NULL, NULL, 0, 0, BENCH,
     "print where the time goes, by kind of work; pictures are then one at a time in flight"},

    {"backbone", CHOICE, "resnet18|resnet34|resnet50|resnet101|tiny", "resnet50", 0, 0, TRAIN | BENCH,
     "the convolutional network in front (tiny: a third of resnet18, for small pictures)"},
    {"dilation", SWITCH, NULL, NULL, 0, 0, TRAIN | BENCH, "DC5: the last stage dilates instead of halving the size"},
    {"enc_layers", INTEGER, "N", "6", 0, 64, TRAIN | BENCH, "encoder layers"},
    {"dec_layers", INTEGER, "N", "6", 1, MAX_DEC_LAYERS, TRAIN | BENCH, "decoder layers"},
    {"dim_feedforward", INTEGER, "N", "2048", 1, 65536, TRAIN | BENCH, "inner channels of the feed-forward layers"},
    {"hidden_dim", INTEGER, "N", "256", 4, 8192, TRAIN | BENCH,
     "channels of the transformer; a multiple of 4 and of nheads"},
    {"nheads", INTEGER, "N", "8", 1, 1024, TRAIN | BENCH, "attention heads"},
    {"num_queries", INTEGER, "N", "100", 1, 10000, TRAIN | BENCH,
     "boxes predicted for each picture: more than any picture has"},
    {"dropout", NUMBER, "P", "0.1", 0, 0.99, TRAIN | BENCH,
     "probability that an activation of the transformer is dropped"},
    {"no_aux_loss", SWITCH, NULL, NULL, 0, 0, TRAIN | BENCH, "train on the last decoder layer's boxes only"},
    {"decoder", CHOICE, "plain|anchor", "plain", 0, 0, TRAIN | BENCH,
     "anchor: queries are boxes, which each layer looks around and moves: learns from few pictures and in few epochs"},
    {"norm_init", CHOICE, "calibrate|track|identity", NULL, 0, 0, TRAIN,
     "without pretrained weights: the frozen norms' mean and variance from some training pictures (calibrate, the "
     "default); the same, and they follow the pictures all the time, with filters of mean 0 and fixed length (track); "
     "or 0 and 1"},

    {"class_loss", CHOICE, "softmax|focal", "softmax", 0, 0, TRAIN | BENCH,
     "softmax: cross-entropy with a class \"no object\"; focal: each class says yes or no; counts twice in the "
     "matching "
     "and in the loss"},
    {"set_cost_class", NUMBER, "X", "1", 0, 1e6, TRAIN, "matching: weight of the class probability"},
    {"set_cost_bbox", NUMBER, "X", "5", 0, 1e6, TRAIN, "matching: weight of the boxes' L1 distance"},
    {"set_cost_giou", NUMBER, "X", "2", 0, 1e6, TRAIN, "matching: weight of generalized IoU"},
    {"bbox_loss_coef", NUMBER, "X", "5", 0, 1e6, TRAIN, "loss: weight of the boxes' L1 distance"},
    {"giou_loss_coef", NUMBER, "X", "2", 0, 1e6, TRAIN, "loss: weight of generalized IoU"},
    {"aux_matches", INTEGER, "N", "1", 1, 100, TRAIN,
     "matching: queries for each object in the first half of the decoder layers; the others have one"},
    {"eos_coef", NUMBER, "X", "0.1", 0, 1e6, TRAIN, "softmax: weight of the class \"no object\""},

    {"lr", NUMBER, "X", "1e-4", 0, 1e3, TRAIN, "learning rate"},
    {"lr_backbone", NUMBER, "X", "1e-5", 0, 1e3, TRAIN, "learning rate of the backbone; 0 freezes it"},
    {"lr_schedule", CHOICE, "step|cosine", "step", 0, 0, TRAIN,
     "how both rates fall, step: by --lr_drop; cosine: to 0 over all steps that --epochs or --steps ask for; a run "
     "that "
     "goes on with more of them takes the longer curve from there on"},
    {"lr_drop", INTEGER, "EPOCHS", "200", 1, 1e9, TRAIN,
     "both rates fall to a tenth each time so many epochs have passed"},
    {"warmup_steps", INTEGER, "N", "0", 0, 1e15, TRAIN, "both rates rise from 0 in the first N steps"},
    {"weight_decay", NUMBER, "X", "1e-4", 0, 1e3, TRAIN, "AdamW's weight decay"},
    {"ema", NUMBER, "D", "0", 0, 0.999999, TRAIN,
     "an exponential average of the weights, decay D (at first less): ema.safetensors, which evaluation, eval and "
     "predict take; 0: none"},
    {"clip_max_norm", NUMBER, "X", "0.1", 0, 1e9, TRAIN, "largest norm of the gradient; 0: not clipped"},
    {"epochs", INTEGER, "N", "300", 1, 1e9, TRAIN | MAY_CHANGE, "passes over the training pictures, in all"},
    {"steps", INTEGER, "N", NULL, 1, MOST_STEPS, TRAIN | MAY_CHANGE,
     "stop when so many optimizer steps have been taken in all"},
    {"batch_size", INTEGER, "N", "2", 1, 65536, TRAIN | BENCH,
     "pictures in one optimizer step; an epoch has floor(pictures / N) steps"},
    {"micro_batch", INTEGER, "N", "0", 0, 65536, TRAIN | BENCH,
     "pictures in flight at once, at most; 0: as many as there are threads. Where the batch, N and memory allow that "
     "many, they run side by side, one thread each; else one at a time, on all threads: the same bytes. On a GPU 0 "
     "takes as many of the largest size as fit its memory"},
    {"recompute", SWITCH, NULL, NULL, 0, 0, TRAIN | BENCH | MAY_CHANGE,
     "on a GPU: keep less of the way forward, and make it again on the way back: more pictures fit, a step takes "
     "longer, the same gradients"},
    {"precision", CHOICE, "fp32|bf16|fp16", "fp32", 0, 0, TRAIN | EVAL | PREDICT | BENCH | MAY_CHANGE,
     "bf16: products of 16-bit numbers, summed in 32 bits; weights, norms and losses stay in 32; fp16: GPUs only"},
    {"tf32", SWITCH, NULL, NULL, 0, 0, TRAIN | EVAL | PREDICT | BENCH | MAY_CHANGE,
     "fp32 on a GPU: linear layers and convolutions may multiply numbers rounded to 10 bits behind the point"},
    {"seed", INTEGER, "N", "42", 0, 9e18, TRAIN, "of every random number"},
    {"eval_every", INTEGER, "EPOCHS", "1", 1, 1e9, TRAIN, "evaluate after each so many epochs"},
    {"patience", INTEGER, "N", "0", 0, 1e9, TRAIN | MAY_CHANGE,
     "stop when N evaluations one after another have brought no better AP (nor, at the same AP, loss); 0: not"},
    {"save_steps", INTEGER, "N", "0", 0, 1e15, TRAIN | MAY_CHANGE,
     "a checkpoint every N steps too, besides each epoch; 0: not"},

    {"short_side", INTEGER, "PIXELS", "800", 16, 16384, TRAIN,
     "pictures are resized to this short side; the augmentation's sizes shrink with it"},
    {"max_size", INTEGER, "PIXELS", "1333", 16, 32768, TRAIN, "... unless the long side would be longer than this"},
    {"no_augment", SWITCH, NULL, NULL, 0, 0, TRAIN, "pictures as they are: no flip, no crop, one size"},
    {"scales", NUMBER, "X", NULL, 0, 0.9, TRAIN,
     "instead of DETR's crops and sizes: no crop, sizes at random from 1 - X to 1 + X times the plain one; 0: flips "
     "only"},
    {"vflip", SWITCH, NULL, NULL, 0, 0, TRAIN,
     "flip top and bottom too, half of the time: for pictures without an up, like cells or satellites'"},
    {"transpose", SWITCH, NULL, NULL, 0, 0, TRAIN,
     "mirror along the diagonal too, half of the time: with --vflip a picture lies in all eight ways that it can"},
    {"no_shuffle", SWITCH, NULL, NULL, 0, 0, TRAIN, "pictures in the order of the annotation file"},
    {"num_workers", INTEGER, "N", "2", 0, 256, TRAIN | EVAL | PREDICT | MAY_CHANGE,
     "threads that read pictures and, without a GPU, resize them; 0: between the steps"},
    {"prefetch", INTEGER, "BATCHES", "4", 1, 1024, TRAIN | EVAL | PREDICT | MAY_CHANGE, "batches that are read ahead"},
};

static const Preset PRESETS[] = {
    {"small",
     "a few hundred to a few thousand pictures, no pretrained weights, a processor (doc/7-recipes.md)",
     {{"backbone", "tiny"},  {"dilation", "1"},       {"norm_init", "track"},     {"hidden_dim", "128"},
      {"enc_layers", "0"},   {"dec_layers", "3"},     {"dim_feedforward", "512"}, {"num_queries", "100"},
      {"dropout", "0"},      {"decoder", "anchor"},   {"class_loss", "focal"},    {"aux_matches", "4"},
      {"short_side", "240"}, {"max_size", "320"},     {"scales", "0.3"},          {"batch_size", "4"},
      {"lr", "1e-3"},        {"lr_backbone", "1e-3"}, {"lr_schedule", "cosine"},  {"warmup_steps", "100"},
      {"ema", "0.998"},      {"epochs", "60"}}},
    {"detr",
     "DETR as it was published: what the defaults are",
     {{"backbone", "resnet50"},
      {"enc_layers", "6"},
      {"dec_layers", "6"},
      {"dim_feedforward", "2048"},
      {"hidden_dim", "256"},
      {"nheads", "8"},
      {"num_queries", "100"},
      {"dropout", "0.1"},
      {"decoder", "plain"},
      {"class_loss", "softmax"},
      {"lr", "1e-4"},
      {"lr_backbone", "1e-5"},
      {"lr_schedule", "step"},
      {"lr_drop", "200"},
      {"weight_decay", "1e-4"},
      {"clip_max_norm", "0.1"},
      {"batch_size", "2"},
      {"epochs", "300"}}},
};

// The table bound to a command (COMMANDS, below): what parsing and --help need.
static Settings settings_for(const char *program, const char *command_name, int command) {
    Settings settings;
    memset(&settings, 0, sizeof settings);
    settings.flags = FLAGS;
    settings.num_flags = sizeof FLAGS / sizeof FLAGS[0];
    settings.presets = PRESETS;
    settings.num_presets = sizeof PRESETS / sizeof PRESETS[0];
    settings.program = program;
    settings.command_name = command_name;
    settings.command = command;
    return settings;
}

#endif
