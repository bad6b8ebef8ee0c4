/*
A network on disk: the folder that transformers opens and that a run resumes from. First config.json, in all the forms
that transformers has written, then the tensors.

Part of train_detr.c, which includes it after the Model, whose table of parameters it walks.
*/
#ifndef DETR_CHECKPOINT_H
#define DETR_CHECKPOINT_H

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoint: config.json

static const struct {
    const char *name;
    int bottleneck, num_stages, depths[4], widths[4], stem_width;
} BACKBONES[] = {
    {"resnet18", 0, 4, {2, 2, 2, 2}, {64, 128, 256, 512}, 64},
    {"resnet34", 0, 4, {3, 4, 6, 3}, {64, 128, 256, 512}, 64},
    {"resnet50", 1, 4, {3, 4, 6, 3}, {256, 512, 1024, 2048}, 64},
    {"resnet101", 1, 4, {3, 4, 23, 3}, {256, 512, 1024, 2048}, 64},
    {"tiny", 0, 3, {2, 2, 2}, {32, 64, 128}, 32},
};
enum { NUM_BACKBONES = sizeof BACKBONES / sizeof BACKBONES[0] };

// A network with what it needs to be used: names for its outputs, the size of its inputs.
typedef struct {
    ModelConfig config;
    Model model;
    char **label_names;        // (config.num_labels)
    int64_t *label_ids;        // (config.num_labels): category ids in results
    int short_side, max_size;  // of the pictures, as resized_size takes them
} Network;

static void network_labels_free(Network *network) {
    for (int i = 0; network->label_names && i < network->config.num_labels; i++) free(network->label_names[i]);
    free(network->label_names);
    free(network->label_ids);
}

static void network_free(Network *network) {
    network_labels_free(network);
    model_free(&network->model);
    memset(network, 0, sizeof *network);
}

// Room for so many labels, without names; ids are their places.
static void network_labels(Network *network, int num_labels) {
    network_labels_free(network);
    network->config.num_labels = num_labels;
    network->label_names = (char **)allocate((size_t)num_labels * sizeof(char *));
    network->label_ids = (int64_t *)allocate((size_t)num_labels * sizeof(int64_t));
    for (int i = 0; i < num_labels; i++) network->label_ids[i] = i;
}

// Sets the backbone's shape from its name; what follows a dot (timm's "resnet50.a1_in1k") does not matter. 0, or -1.
static int backbone_by_name(ModelConfig *config, const char *name) {
    for (int b = 0; b < NUM_BACKBONES; b++) {
        const char *known = BACKBONES[b].name;
        if (strlen(known) != strcspn(name, ".") || strncmp(known, name, strlen(known)) != 0) continue;
        config->bottleneck = BACKBONES[b].bottleneck;
        config->num_stages = BACKBONES[b].num_stages;
        config->stem_width = BACKBONES[b].stem_width;
        memcpy(config->depths, BACKBONES[b].depths, sizeof BACKBONES[b].depths);
        memcpy(config->widths, BACKBONES[b].widths, sizeof BACKBONES[b].widths);
        return 0;
    }
    return -1;
}

static int same_backbone(const ModelConfig *a, const ModelConfig *b) {
    if (a->bottleneck != b->bottleneck || a->num_stages != b->num_stages || a->stem_width != b->stem_width) return 0;
    for (int s = 0; s < a->num_stages; s++)
        if (a->depths[s] != b->depths[s] || a->widths[s] != b->widths[s]) return 0;
    return 1;
}

// The network that the flags describe; num_labels is left 0. Status 2 if they do not go together.
static int computes_in_bf16(const Settings *settings) { return strcmp(flag_text(settings, "precision"), "bf16") == 0; }

static ModelConfig config_from_flags(const Settings *settings) {
    ModelConfig config;
    memset(&config, 0, sizeof config);
    backbone_by_name(&config, flag_text(settings, "backbone"));
    config.dilation = flag_on(settings, "dilation");
    config.timm_names = config.dilation && config.stem_width == 64;  // timm has no other stem
    config.hidden_dim = flag_int(settings, "hidden_dim");
    config.nheads = flag_int(settings, "nheads");
    config.enc_layers = flag_int(settings, "enc_layers");
    config.dec_layers = flag_int(settings, "dec_layers");
    config.dim_feedforward = flag_int(settings, "dim_feedforward");
    config.num_queries = flag_int(settings, "num_queries");
    config.dropout = flag_number(settings, "dropout");
    config.anchor = strcmp(flag_text(settings, "decoder"), "anchor") == 0;
    config.focal = strcmp(flag_text(settings, "class_loss"), "focal") == 0;
    config.half = computes_in_bf16(settings);
    if (config.hidden_dim % 4 || config.hidden_dim % config.nheads)
        usage_error("--hidden_dim %d must be a multiple of 4 and of --nheads %d", config.hidden_dim, config.nheads);
    if (config.dilation && !config.timm_names && !config.anchor)
        usage_error("--dilation of --backbone %s needs --decoder anchor: as a plain DETR others would misread it",
                    flag_text(settings, "backbone"));
    return config;
}

// As the flags and config.json call them.
static const char *decoder_name(const ModelConfig *config) { return config->anchor ? "anchor" : "plain"; }
static const char *class_loss_name(const ModelConfig *config) { return config->focal ? "focal" : "softmax"; }

// Status 2 if the user gave a model flag that says something else than config.json.
static void config_check_flags(const ModelConfig *config, const Settings *settings, const char *folder) {
    ModelConfig named;
    memset(&named, 0, sizeof named);
    backbone_by_name(&named, flag_text(settings, "backbone"));
    const struct {
        const char *flag;
        int theirs;
    } numbers[] = {{"enc_layers", config->enc_layers},
                   {"dec_layers", config->dec_layers},
                   {"dim_feedforward", config->dim_feedforward},
                   {"hidden_dim", config->hidden_dim},
                   {"nheads", config->nheads},
                   {"num_queries", config->num_queries}};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (flag_given(settings, numbers[i].flag) && flag_int(settings, numbers[i].flag) != numbers[i].theirs)
            usage_error("--%s %s contradicts %s/config.json, which has %d: leave it out", numbers[i].flag,
                        flag_text(settings, numbers[i].flag), folder, numbers[i].theirs);
    if (flag_given(settings, "dropout") && flag_number(settings, "dropout") != config->dropout)
        usage_error("--dropout %s contradicts %s/config.json, which has %g: leave it out, or change it there",
                    flag_text(settings, "dropout"), folder, config->dropout);
    const char *const choices[2][2] = {{"decoder", decoder_name(config)}, {"class_loss", class_loss_name(config)}};
    for (int i = 0; i < 2; i++)
        if (flag_given(settings, choices[i][0]) && strcmp(flag_text(settings, choices[i][0]), choices[i][1]) != 0)
            usage_error("--%s %s contradicts %s/config.json, which has %s: leave it out", choices[i][0],
                        flag_text(settings, choices[i][0]), folder, choices[i][1]);
    if (flag_given(settings, "dilation") && flag_on(settings, "dilation") != config->dilation)
        usage_error("--dilation contradicts %s/config.json, which says otherwise: leave it out", folder);
    if (flag_given(settings, "backbone") && !same_backbone(&named, config))
        usage_error("--backbone %s contradicts %s/config.json, which has another one: leave it out",
                    flag_text(settings, "backbone"), folder);
}

// A JSON file that is read key by key. The first thing wrong with it stays in `error`, and what follows is only
// defaults, so that a caller asks once, at the end.
typedef struct {
    const char *path;
    Error *error;
    int failed;
} ConfigReader;

#define CONFIG_FAIL(reader, ...) ((reader)->failed ? 0 : ((reader)->failed = 1, fail((reader)->error, __VA_ARGS__)))

static int read_int(ConfigReader *reader, yajl_val object, const char *key, int unset, int low, int high) {
    Error why;
    int value = unset;
    if (json_get_int(object, key, &value, reader->path, &why) < 0) CONFIG_FAIL(reader, "%s", why.text);
    if (value < low || value > high)
        CONFIG_FAIL(reader, "%s: \"%s\" is %d, not from %d to %d", reader->path, key, value, low, high);
    return value < low ? low : value > high ? high : value;
}

static int read_bool(ConfigReader *reader, yajl_val object, const char *key, int unset) {
    Error why;
    if (json_get_bool(object, key, &unset, reader->path, &why) < 0) CONFIG_FAIL(reader, "%s", why.text);
    return unset;
}

static const char *read_text(ConfigReader *reader, yajl_val object, const char *key, const char *unset) {
    Error why;
    if (json_get_string(object, key, &unset, reader->path, &why) < 0) CONFIG_FAIL(reader, "%s", why.text);
    return unset;
}

// A list of whole numbers, one a stage, times `scale`. Returns its length; without such a key `unset`, values
// untouched.
static int read_stages(ConfigReader *reader, yajl_val object, const char *key, int *values, int scale, int unset) {
    yajl_val list = json_member(object, key);
    if (!list || YAJL_IS_NULL(list)) return unset;
    int count = YAJL_IS_ARRAY(list) && list->u.array.len <= MAX_STAGES ? (int)list->u.array.len : 0;
    for (int i = 0; i < count; i++) {
        yajl_val value = list->u.array.values[i];
        if (YAJL_IS_INTEGER(value) && value->u.number.i >= 1 && value->u.number.i <= 65536)
            values[i] = scale * (int)value->u.number.i;
        else
            CONFIG_FAIL(reader, "%s: \"%s\": entry %d is not a number from 1 to 65536", reader->path, key, i);
    }
    if (!count) CONFIG_FAIL(reader, "%s: \"%s\" must be a list of 1 to %d numbers", reader->path, key, MAX_STAGES);
    return count ? count : unset;
}

// Refuses any value but the one that is computed here (or none).
static void read_only(ConfigReader *reader, yajl_val object, const char *key, const char *computed) {
    yajl_val value = json_member(object, key);
    if (!value || YAJL_IS_NULL(value)) return;
    const char *text = YAJL_IS_STRING(value)   ? value->u.string
                       : YAJL_IS_NUMBER(value) ? value->u.number.r
                       : YAJL_IS_TRUE(value)   ? "true"
                                               : "false";
    if (strcmp(text, computed) != 0)
        CONFIG_FAIL(reader, "%s: \"%s\" is %.60s, but only %s is computed", reader->path, key, text, computed);
}

// backbone_config of a native backbone: a ResNetConfig, with its defaults.
static void config_read_resnet(ConfigReader *reader, ModelConfig *config, yajl_val resnet) {
    backbone_by_name(config, "resnet50");
    const char *const only[5][2] = {{"model_type", "resnet"},
                                    {"hidden_act", "relu"},
                                    {"num_channels", "3"},
                                    {"downsample_in_first_stage", "false"},
                                    {"downsample_in_bottleneck", "false"}};
    for (int i = 0; i < 5; i++) read_only(reader, resnet, only[i][0], only[i][1]);
    config->stem_width = read_int(reader, resnet, "embedding_size", 64, 1, 65536);
    int num_depths = read_stages(reader, resnet, "depths", config->depths, 1, 4);
    config->num_stages = read_stages(reader, resnet, "hidden_sizes", config->widths, 1, 4);
    config->bottleneck = strcmp(read_text(reader, resnet, "layer_type", "bottleneck"), "bottleneck") == 0;
    if (!config->bottleneck) read_only(reader, resnet, "layer_type", "basic");
    if (num_depths != config->num_stages)
        CONFIG_FAIL(reader, "%s: \"depths\" and \"hidden_sizes\" differ in length", reader->path);
    yajl_val indices = json_member(resnet, "out_indices");
    yajl_val last =
        YAJL_IS_ARRAY(indices) && indices->u.array.len ? indices->u.array.values[indices->u.array.len - 1] : NULL;
    if (YAJL_IS_INTEGER(last) && last->u.number.i != config->num_stages && last->u.number.i != -1)
        CONFIG_FAIL(reader, "%s: \"out_indices\" must end with the last stage, %d", reader->path, config->num_stages);
}

// A backbone that transformers takes from timm: by name, its shape changed by backbone_kwargs. Since version 5 both are
// in a backbone_config, beside which "dilation" says nothing.
static void config_read_timm(ConfigReader *reader, ModelConfig *config, yajl_val tree) {
    yajl_val own = json_member(tree, "backbone_config"), kwargs = json_member(tree, "backbone_kwargs");
    int has_own = YAJL_IS_OBJECT(own);
    if (has_own) kwargs = own;
    const char *name = read_text(reader, has_own ? own : tree, "backbone", "resnet50");
    if (backbone_by_name(config, name) != 0 || config->stem_width != 64)
        CONFIG_FAIL(reader, "%s: \"backbone\" is %.60s: resnet18, 34, 50 and 101 are computed", reader->path, name);
    read_only(reader, kwargs, has_own ? "num_channels" : "in_chans", "3");
    if (read_stages(reader, kwargs, "layers", config->depths, 1, 4) != 4 ||
        read_stages(reader, kwargs, "channels", config->widths, config->bottleneck ? 4 : 1, 4) != 4)
        CONFIG_FAIL(reader, "%s: \"layers\" and \"channels\" must have 4 entries", reader->path);
    int stride = read_int(reader, kwargs, "output_stride", 32, 1, 32);
    if (stride != 32) read_only(reader, kwargs, "output_stride", "16");
    config->dilation = (!has_own && read_bool(reader, tree, "dilation", 0)) || stride == 16;
    config->timm_names = config->dilation;  // one without dilation is saved as a ResNetConfig
}

// id2label, {"0": "cat", ...}, whole from 0 to the last; without one, what transformers assumes.
static void config_read_labels(ConfigReader *reader, Network *network, yajl_val tree) {
    yajl_val labels = json_member(tree, "id2label");
    int named = YAJL_IS_OBJECT(labels) ? (int)labels->u.object.len : 0;
    network_labels(network, named ? named : read_int(reader, tree, "num_labels", 2, 1, 1000000));
    for (int i = 0; i < named; i++) {
        char *end;
        const char *key = labels->u.object.keys[i];
        long index = strtol(key, &end, 10);
        yajl_val name = labels->u.object.values[i];
        if (!*end && index >= 0 && index < named && !network->label_names[index] && YAJL_IS_STRING(name))
            network->label_names[index] = format_string("%s", name->u.string);
        else
            CONFIG_FAIL(reader, "%s: \"id2label\" must name each of 0 to %d once: \"%.40s\"", reader->path, named - 1,
                        key);
    }
    for (int i = 0; i < network->config.num_labels; i++)
        if (!network->label_names[i]) network->label_names[i] = format_string("LABEL_%d", i);
}

// What is no DETR to transformers has a model_type of its own, and says in what it differs.
static const char OWN_MODEL_TYPE[] = "train_detr";

static void config_read_tree(ConfigReader *reader, Network *network, yajl_val tree) {
    ModelConfig *config = &network->config;
    const int own = strcmp(read_text(reader, tree, "model_type", ""), OWN_MODEL_TYPE) == 0;
    const char *decoder = own ? read_text(reader, tree, "decoder", "plain") : "plain";
    const char *class_loss = own ? read_text(reader, tree, "class_loss", "softmax") : "softmax";
    config->anchor = strcmp(decoder, "anchor") == 0;
    config->focal = strcmp(class_loss, "focal") == 0;
    if (strcmp(decoder, decoder_name(config)) != 0 || strcmp(class_loss, class_loss_name(config)) != 0)
        CONFIG_FAIL(reader, "%s: \"decoder\" is %.40s and \"class_loss\" %.40s: plain or anchor, softmax or focal",
                    reader->path, decoder, class_loss);
    const char *const only[5][2] = {{"model_type", own ? OWN_MODEL_TYPE : "detr"},
                                    {"activation_function", "relu"},
                                    {"num_channels", "3"},
                                    {"position_embedding_type", "sine"},
                                    {"scale_embedding", "false"}};
    for (int i = 0; i < 5; i++) read_only(reader, tree, only[i][0], only[i][1]);
    if (!YAJL_IS_STRING(json_member(tree, "model_type")))
        CONFIG_FAIL(reader, "%s: has no \"model_type\", so it is no DETR", reader->path);
    config->hidden_dim = read_int(reader, tree, "d_model", 256, 4, 8192);
    config->enc_layers = read_int(reader, tree, "encoder_layers", 6, 0, 64);
    config->dec_layers = read_int(reader, tree, "decoder_layers", 6, 1, MAX_DEC_LAYERS);
    config->nheads = read_int(reader, tree, "encoder_attention_heads", 8, 1, 1024);
    config->dim_feedforward = read_int(reader, tree, "encoder_ffn_dim", 2048, 1, 65536);
    config->num_queries = read_int(reader, tree, "num_queries", 100, 1, 10000);
    config->dropout = 0.1;
    Error why;
    if (json_get_double(tree, "dropout", &config->dropout, reader->path, &why) < 0) CONFIG_FAIL(reader, "%s", why.text);
    if (!(config->dropout >= 0 && config->dropout < 1))
        CONFIG_FAIL(reader, "%s: \"dropout\" is %g", reader->path, config->dropout);
    if (read_int(reader, tree, "decoder_attention_heads", 8, 1, 1024) != config->nheads ||
        read_int(reader, tree, "decoder_ffn_dim", 2048, 1, 65536) != config->dim_feedforward)
        CONFIG_FAIL(reader,
                    "%s: attention heads or ffn_dim of encoder and decoder differ: only equal ones are computed",
                    reader->path);
    if (config->hidden_dim % config->nheads || config->hidden_dim % 4)
        CONFIG_FAIL(reader, "%s: \"d_model\" %d must be a multiple of 4 and of %d heads", reader->path,
                    config->hidden_dim, config->nheads);
    yajl_val backbone = json_member(tree, "backbone_config");
    const char *type = read_text(reader, backbone, "model_type", "resnet");
    if (strcmp(type, "timm_backbone") == 0 ||
        (!YAJL_IS_OBJECT(backbone) && read_bool(reader, tree, "use_timm_backbone", 1)))
        config_read_timm(reader, config, tree);
    else
        config_read_resnet(reader, config, backbone);
    if (own && !config->timm_names) config->dilation = read_bool(reader, tree, "dilation", 0);
    if (!YAJL_IS_OBJECT(backbone) && !read_bool(reader, tree, "use_timm_backbone", 1))
        read_only(reader, tree, "backbone", "resnet50");
    config_read_labels(reader, network, tree);
}

// {"shortest_edge": 800, "longest_edge": 1333} as "size"; formerly 800, and "max_size" beside it.
static void preprocessor_read_tree(ConfigReader *reader, Network *network, yajl_val tree) {
    if (tree && !YAJL_IS_OBJECT(tree)) CONFIG_FAIL(reader, "%s: is not an object, {...}", reader->path);
    yajl_val size = json_member(tree, "size");
    int nested = YAJL_IS_OBJECT(size);
    network->short_side = read_int(reader, nested ? size : tree, nested ? "shortest_edge" : "size", 800, 1, 16384);
    network->max_size = read_int(reader, nested ? size : tree, nested ? "longest_edge" : "max_size", 1333, 1, 32768);
    for (int k = 0; k < 2; k++) {
        const char *key = k ? "image_std" : "image_mean";
        yajl_val list = json_member(tree, key);
        for (size_t c = 0; YAJL_IS_ARRAY(list) && c < list->u.array.len && c < 3; c++)
            if (!YAJL_IS_DOUBLE(list->u.array.values[c]) ||
                fabs(list->u.array.values[c]->u.number.d - (k ? PIXEL_STD : PIXEL_MEAN)[c]) > 1e-6)
                CONFIG_FAIL(reader, "%s: \"%s\" is not ImageNet's, the only one that is computed", reader->path, key);
    }
}

// A lower bound of how many numbers a network of this shape has: its attention, feed-forward and convolutions.
static double config_least_numbers(const ModelConfig *config) {
    const double d = config->hidden_dim, layers = config->enc_layers + config->dec_layers;
    double numbers = layers * (4 * d * d + 2 * d * config->dim_feedforward);
    for (int s = 0; s < config->num_stages; s++)
        numbers += 0.5 * config->depths[s] * (double)config->widths[s] * config->widths[s];
    return numbers;
}

// Refuses a shape that the weights beside it cannot have, before memory is asked for it. 0, or -1.
static int config_check_weights(const ModelConfig *config, const char *folder, Error *error) {
    char *path = fileset_path(folder, "model.safetensors");
    struct stat status;
    const double needed = 2 * config_least_numbers(config);  // two bytes a number at least
    int good = stat(path, &status) != 0 || (double)status.st_size >= needed;
    if (!good)
        fail(error, "%s: has %lld bytes; the network that config.json describes needs more than %.0f", path,
             (long long)status.st_size, needed);
    free(path);
    return good ? 0 : -1;
}

// Reads a folder's config.json and preprocessor_config.json. 0, or -1 with what is not computed here, by name.
static int config_read(Network *network, const char *folder, Error *error) {
    memset(network, 0, sizeof *network);
    if (!is_directory(folder))
        return fail(error, "%s: %s", folder, access(folder, F_OK) ? "does not exist" : "is not a folder");
    int failed = 0;
    for (int i = 0; i < 2 && !failed; i++) {
        char *path = fileset_path(folder, i ? "preprocessor_config.json" : "config.json");
        ConfigReader reader = {path, error, 0};
        int missing = i && !is_file(path);
        yajl_val tree = missing ? NULL : json_read(path, error);
        if (missing)
            fprintf(stderr, "note: %s is missing: pictures are resized as DETR's are, to 800 and 1333\n", path);
        if (!tree && !missing)
            reader.failed = 1;
        else if (i)
            preprocessor_read_tree(&reader, network, tree);
        else
            config_read_tree(&reader, network, tree);
        failed = reader.failed;
        yajl_tree_free(tree);
        free(path);
    }
    return failed ? -1 : config_check_weights(&network->config, folder, error);
}

static void print_int_list(FILE *file, const int *values, int count, int divisor) {
    for (int i = 0; i < count; i++) fprintf(file, "%s%d", i ? ", " : "[", values[i] / divisor);
    fputc(']', file);
}

static void config_write_backbone(FILE *file, const ModelConfig *config) {
    if (!config->timm_names) {
        fprintf(file, " \"use_timm_backbone\": false,\n \"backbone\": null,\n \"dilation\": %s,\n",
                config->dilation ? "true" : "false");
        fprintf(file,
                " \"backbone_config\": {\"model_type\": \"resnet\", \"num_channels\": 3, \"embedding_size\": %d, ",
                config->stem_width);
        fprintf(file, "\"hidden_act\": \"relu\", \"layer_type\": \"%s\", ",
                config->bottleneck ? "bottleneck" : "basic");
        fprintf(file, "\"downsample_in_first_stage\": false, \"downsample_in_bottleneck\": false, \"depths\": ");
        print_int_list(file, config->depths, config->num_stages, 1);
        fputs(", \"hidden_sizes\": ", file);
        print_int_list(file, config->widths, config->num_stages, 1);
        fprintf(file, ", \"out_features\": [\"stage%d\"], \"out_indices\": [%d]},\n", config->num_stages,
                config->num_stages);
        return;
    }
    // No ResNetConfig dilates, timm does. The name says which kind of block; shapes that have none are spelled out.
    const char *name = config->bottleneck ? "resnet50" : "resnet18";
    int is_named = 0;
    for (int b = 0; b < NUM_BACKBONES && !is_named; b++) {
        ModelConfig named;
        memset(&named, 0, sizeof named);
        backbone_by_name(&named, BACKBONES[b].name);
        is_named = same_backbone(&named, config);
        if (is_named) name = BACKBONES[b].name;
    }
    fprintf(file, " \"use_timm_backbone\": true,\n \"backbone_config\": null,\n \"dilation\": true,\n");
    fprintf(file, " \"backbone\": \"%s\",\n", name);
    if (is_named) return;
    fputs(" \"backbone_kwargs\": {\"in_chans\": 3, \"out_indices\": [1, 2, 3, 4], \"layers\": ", file);
    print_int_list(file, config->depths, config->num_stages, 1);
    fputs(", \"channels\": ", file);
    print_int_list(file, config->widths, config->num_stages, config->bottleneck ? 4 : 1);
    fputs(", \"output_stride\": 16},\n", file);
}

// Writes config.json, as DetrConfig.save_pretrained does, into the set of `folder`. transformers knows neither the
// anchor decoder nor the focal loss's head: with these the model_type is another, and the shapes of the query
// embeddings or of the class head are no DETR's, so that it refuses the folder instead of misreading it. Nor has it a
// ResNetConfig that dilates: one is written beside the anchor decoder only. 0, or -1.
static int config_write(const Network *network, const char *folder, Error *error) {
    const ModelConfig *config = &network->config;
    FILE *file = fileset_create(folder, "config.json");
    if (!file) return fileset_close(file, folder, "config.json", error);
    if (config->anchor || config->focal)
        fprintf(file, "{\n \"model_type\": \"%s\",\n \"decoder\": \"%s\",\n \"class_loss\": \"%s\",\n", OWN_MODEL_TYPE,
                decoder_name(config), class_loss_name(config));
    else
        fputs("{\n \"architectures\": [\"DetrForObjectDetection\"],\n \"model_type\": \"detr\",\n", file);
    fputs(" \"is_encoder_decoder\": true,\n \"num_channels\": 3,\n \"use_pretrained_backbone\": false,\n", file);
    config_write_backbone(file, config);
    const struct {
        const char *key;
        int value;
    } sizes[] = {{"d_model", config->hidden_dim},
                 {"num_queries", config->num_queries},
                 {"encoder_layers", config->enc_layers},
                 {"decoder_layers", config->dec_layers},
                 {"num_hidden_layers", config->enc_layers},
                 {"encoder_attention_heads", config->nheads},
                 {"decoder_attention_heads", config->nheads},
                 {"encoder_ffn_dim", config->dim_feedforward},
                 {"decoder_ffn_dim", config->dim_feedforward}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        fprintf(file, " \"%s\": %d,\n", sizes[i].key, sizes[i].value);
    const char *const dropouts[3] = {"dropout", "attention_dropout", "activation_dropout"};
    for (int i = 0; i < 3; i++) fprintf(file, " \"%s\": %.17g,\n", dropouts[i], config->dropout);
    fputs(" \"activation_function\": \"relu\",\n \"position_embedding_type\": \"sine\",\n", file);
    fputs(" \"auxiliary_loss\": false,\n \"id2label\": {", file);
    for (int i = 0; i < config->num_labels; i++) {
        fprintf(file, "%s\"%d\": ", i ? ", " : "", i);
        json_print_string(file, network->label_names[i]);
    }
    fputs("},\n \"label2id\": {", file);
    for (int i = 0; i < config->num_labels; i++) {
        fputs(i ? ", " : "", file);
        json_print_string(file, network->label_names[i]);
        fprintf(file, ": %d", i);
    }
    fputs("}\n}\n", file);
    return fileset_close(file, folder, "config.json", error);
}

// Writes preprocessor_config.json, for DetrImageProcessor. 0, or -1.
static int preprocessor_write(const Network *network, const char *folder, Error *error) {
    const double *mean = PIXEL_MEAN, *deviation = PIXEL_STD;
    FILE *file = fileset_create(folder, "preprocessor_config.json");
    if (!file) return fileset_close(file, folder, "preprocessor_config.json", error);
    fputs("{\n \"image_processor_type\": \"DetrImageProcessor\",\n \"format\": \"coco_detection\",\n", file);
    fputs(" \"do_convert_annotations\": true,\n \"do_normalize\": true,\n \"do_pad\": true,\n", file);
    fputs(" \"do_rescale\": true,\n \"do_resize\": true,\n \"resample\": 2,\n", file);
    fprintf(file, " \"rescale_factor\": %.17g,\n \"image_mean\": [%g, %g, %g],\n", 1 / 255.0, mean[0], mean[1],
            mean[2]);
    fprintf(file, " \"image_std\": [%g, %g, %g],\n", deviation[0], deviation[1], deviation[2]);
    fprintf(file, " \"size\": {\"shortest_edge\": %d, \"longest_edge\": %d}\n}\n", network->short_side,
            network->max_size);
    return fileset_close(file, folder, "preprocessor_config.json", error);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoint: tensors

// What timm calls a tensor of the backbone that transformers' own ResNet calls `name`; other names stay as they are.
// Names are compared in this form, so that either kind of file fits either kind of network. A file of a backbone alone
// has names without the prefix, or with "resnet.".
static void canonical_name(char *out, size_t size, const char *name) {
    static const char prefix[] = "model.backbone.conv_encoder.model.";
    int stage, block, layer, used = 0, in_detr = strncmp(name, prefix, sizeof prefix - 1) == 0;
    const char *at = in_detr ? name + sizeof prefix - 1 : strncmp(name, "resnet.", 7) == 0 ? name + 7 : name;
    char kind[16] = "", module[64] = "";
    if (sscanf(at, "embedder.embedder.%15[a-z].%n", kind, &used) == 1 && used)
        snprintf(module, sizeof module, "%s1.", kind[0] == 'c' ? "conv" : "bn");
    else if (sscanf(at, "encoder.stages.%3d.layers.%3d.shortcut.%15[a-z].%n", &stage, &block, kind, &used) == 3 && used)
        snprintf(module, sizeof module, "layer%d.%d.downsample.%d.", stage + 1, block, kind[0] != 'c');
    else if (sscanf(at, "encoder.stages.%3d.layers.%3d.layer.%3d.%15[a-z].%n", &stage, &block, &layer, kind, &used) ==
                 4 &&
             used)
        snprintf(module, sizeof module, "layer%d.%d.%s%d.", stage + 1, block, kind[0] == 'c' ? "conv" : "bn",
                 layer + 1);
    else
        used = 0;
    int bare = strncmp(at, "conv1.", 6) == 0 || strncmp(at, "bn1.", 4) == 0 ||
               (strncmp(at, "layer", 5) == 0 && at[5] >= '1' && at[5] <= '9');
    snprintf(out, size, "%s%s%s", in_detr || used || bare ? prefix : "", module, at + used);
}

// Copies a tensor of a file into memory order. 0, or -1: another shape, no float type, a value that is not finite.
static int tensor_read(const Param *param, real *to, const SafeEntry *entry, const char *path, Error *error) {
    if (!safetensors_has_shape(entry, param->ndim, param->shape)) {
        char shapes[2][128] = {"", ""};
        for (int s = 0; s < 2; s++)
            for (int i = 0; i < (s ? entry->ndim : param->ndim); i++) {
                size_t used = strlen(shapes[s]);
                snprintf(shapes[s] + used, sizeof shapes[s] - used, "%s%lld", i ? ", " : "",
                         (long long)(s ? entry->shape[i] : param->shape[i]));
            }
        return fail(error, "%s: tensor %s has the shape (%s), but the network needs (%s)", path, entry->name, shapes[1],
                    shapes[0]);
    }
    if (entry->dtype > SAFE_BF16)
        return fail(error, "%s: tensor %s is of type %s, not a floating-point type", path, entry->name,
                    safe_dtype_names[entry->dtype]);
    for (size_t i = 0; i < param->count; i++) {
        double value = safetensors_element(entry, (int64_t)i);
        if (!isfinite(value)) return fail(error, "%s: tensor %s: element %zu is not finite", path, entry->name, i);
        to[param_place(param, i)] = (real)value;
    }
    return 0;
}

// What may be missing in a file of weights.
typedef enum {
    WEIGHTS_ALL,         // nothing
    WEIGHTS_BUT_HEAD,    // the class head is not taken, be it there or not
    WEIGHTS_OR_BACKBONE  // that, and the file may hold a backbone alone
} WeightsNeeded;

// Loads the model's values by name. What the file has beyond them is listed on stderr (num_batches_tracked, which
// BatchNorm counts and nobody needs, is not).
static int weights_read(Model *model, const char *path, WeightsNeeded needed, Error *error) {
    SafeFile file;
    if (safetensors_open(&file, path, error) != 0) return -1;
    char(*names)[192] = (char(*)[192])allocate((size_t)file.count * sizeof *names);
    char *used = (char *)allocate((size_t)file.count);
    const char *missing = NULL;
    int status = 0, num_missing[3] = {0, 0, 0}, num_found[3] = {0, 0, 0};
    for (int i = 0; i < file.count; i++) canonical_name(names[i], sizeof names[i], file.entries[i].name);
    for (int p = 0; p < model->num_params && status == 0; p++) {
        const Param *param = model->params[p];
        char wanted[192];
        int found = -1;
        canonical_name(wanted, sizeof wanted, param->name);
        for (int i = 0; i < file.count && found < 0; i++)
            if (strcmp(names[i], wanted) == 0) found = i;
        if (found >= 0) used[found] = 1;
        if (needed != WEIGHTS_ALL && strncmp(param->name, "class_labels_classifier.", 24) == 0) continue;
        if (found < 0 && is_frozen(&model->config, param->name))
            status = fail(error, "%s: tensor %s is missing, which --freeze would leave at random numbers", path,
                          param->name);
        if (found < 0) {
            num_missing[param->group]++;
            if (!missing || param->group != GROUP_TRANSFORMER) missing = param->name;
            continue;
        }
        num_found[param->group]++;
        status = tensor_read(param, param->value, &file.entries[found], path, error);
        for (size_t i = 0; ends_with(param->name, "running_var") && status == 0 && i < param->count; i++)
            if (param->value[i] < 0)
                status = fail(error, "%s: tensor %s: element %zu, a variance, is negative", path, param->name, i);
    }
    int backbone_alone = needed == WEIGHTS_OR_BACKBONE && num_found[GROUP_TRANSFORMER] == 0;
    if (status == 0 && missing && (num_missing[GROUP_BACKBONE] || num_missing[GROUP_STATISTICS] || !backbone_alone))
        status = fail(error, "%s: tensor %s is missing, one of %d that the network needs and the file has not", path,
                      missing, num_missing[0] + num_missing[1] + num_missing[2]);
    if (status == 0 && missing) printf("start      %s holds a backbone: the transformer starts afresh\n", path);
    int num_unused = 0;
    for (int i = 0; i < file.count && status == 0; i++) {
        if (used[i] || ends_with(file.entries[i].name, "num_batches_tracked")) continue;
        fprintf(stderr, "%s%s", num_unused++ ? ", " : "note: not part of the network: ", file.entries[i].name);
    }
    if (num_unused) fprintf(stderr, " (%s)\n", path);
    free(names);
    free(used);
    safetensors_close(&file);
    return status;
}

// The values as the file holds them: float32 in the checkpoint's order. *copy is what is to be freed, or NULL.
static const float *tensor_for_disk(const Param *param, const real *values, float **copy) {
    *copy = NULL;
    if (sizeof(real) == sizeof(float) && (param->ndim != 4 || param->shape[2] * param->shape[3] == 1))
        return (const float *)(const void *)values;
    *copy = (float *)allocate(param->count * sizeof(float));
    for (size_t i = 0; i < param->count; i++) (*copy)[i] = (float)values[param_place(param, i)];
    return *copy;
}

static const char *const MOMENT_NAMES[2] = {"exp_avg", "exp_avg_sq"};

// The files of tensors in a checkpoint.
typedef enum {
    TENSORS_MODEL,      // model.safetensors: the values
    TENSORS_OPTIMIZER,  // optimizer.safetensors: exp_avg.NAME and exp_avg_sq.NAME of each trained tensor
    TENSORS_EMA         // ema.safetensors, with --ema only: as the model's, but the averages of what is trained
} TensorsFile;

static int tensors_write(const Model *model, const char *folder, TensorsFile which, Error *error) {
    static const char *const names[3] = {"model", "optimizer", "ema"};
    int moments = which == TENSORS_OPTIMIZER, capacity = 2 * model->num_params, count = 0;
    SafeTensor *tensors = (SafeTensor *)allocate((size_t)capacity * sizeof(SafeTensor));
    float **copies = (float **)allocate((size_t)capacity * sizeof(float *));
    for (int kind = 0; kind < 1 + moments; kind++) {
        for (int p = 0; p < model->num_params; p++) {
            const Param *param = model->params[p];
            const real *values = !moments ? param->value : kind ? param->exp_avg_sq : param->exp_avg;
            if (which == TENSORS_EMA && param->ema) values = param->ema;
            if (!values) continue;
            SafeTensor *tensor = &tensors[count];
            tensor->name =
                moments ? format_string("%s.%s", MOMENT_NAMES[kind], param->name) : format_string("%s", param->name);
            tensor->dtype = "F32";
            tensor->ndim = param->ndim;
            memcpy(tensor->shape, param->shape, sizeof param->shape);
            tensor->data = tensor_for_disk(param, values, &copies[count++]);
        }
    }
    char *path = format_string("%s/.next/%s.safetensors", folder, names[which]);
    int status = safetensors_write(path, tensors, count, error);
    for (int i = 0; i < count; i++) {
        free((void *)tensors[i].name);
        free(copies[i]);
    }
    free(copies);
    free(tensors);
    free(path);
    return status;
}

static int moments_read(Model *model, const char *path, Error *error) {
    SafeFile file;
    if (safetensors_open(&file, path, error) != 0) return -1;
    int status = 0;
    for (int kind = 0; kind < 2; kind++) {
        for (int p = 0; p < model->num_params && status == 0; p++) {
            const Param *param = model->params[p];
            if (!param->trained) continue;
            char *name = format_string("%s.%s", MOMENT_NAMES[kind], param->name);
            const SafeEntry *entry = safetensors_find(&file, name);
            status = entry ? tensor_read(param, kind ? param->exp_avg_sq : param->exp_avg, entry, path, error)
                           : fail(error, "%s: tensor %s is missing", path, name);
            free(name);
        }
    }
    safetensors_close(&file);
    return status;
}

// All files of a checkpoint but the checksums.
static const char *const CHECKPOINT_FILES[] = {"config.json",
                                               "preprocessor_config.json",
                                               "model.safetensors",
                                               "optimizer.safetensors",
                                               "ema.safetensors",
                                               "trainer_state.json",
                                               "log.txt"};
enum { NUM_CHECKPOINT_FILES = sizeof CHECKPOINT_FILES / sizeof CHECKPOINT_FILES[0] };

// The command that goes on with the run in `folder`; the caller frees it.
static char *resume_command(const Settings *settings, const char *folder) {
    const char *words[4] = {settings->program, "train", "--resume", folder};
    return shell_command(4, (char **)words);
}

// The command that makes `folder`, or one below it, the checkpoint in `target` and goes on with that; the caller frees
// it.
static char *restore_command(const Settings *settings, const char *folder, const char *target) {
    char *from = format_string("%s/.", folder), *resume = resume_command(settings, target);
    const char *words[4] = {"cp", "-r", from, target};
    char *copy = shell_command(4, (char **)words), *command = format_string("%s && %s", copy, resume);
    free(from);
    free(resume);
    free(copy);
    return command;
}

// Compares files of the checkpoint that --resume or --pretrained names with their checksums. 0; or -1 with the damaged
// file's name, and what to do if one of the older checkpoints beside it is whole.
static int checkpoint_check(const Settings *settings, const char *flag, const char *const *names, int count,
                            Error *error) {
    static const char *const others[2] = {"previous", "best"};
    const char *folder = flag_text(settings, flag);
    if (fileset_check(folder, names, count, error) == 0) return 0;
    for (int o = 0, found = 0; o < 2 && !found; o++) {
        char *other = format_string("%s/%s", folder, others[o]), *sums = fileset_path(other, FILESET_SUMS);
        Error unused;
        found = is_file(sums) && fileset_check(other, CHECKPOINT_FILES, NUM_CHECKPOINT_FILES, &unused) == 0;
        if (found && (settings->command & TRAIN) && strcmp(flag, "resume") == 0) {
            char *command = restore_command(settings, other, folder);
            fail_more(error, "; an older checkpoint is whole, go on with  %s", command);
            free(command);
        } else if (found) {
            fail_more(error, "; an older checkpoint is whole: --%s %s", flag, other);
        }
        free(other);
        free(sums);
    }
    return -1;
}

// What of the checkpoint is read where no run goes on with it: its shape, its classes and the weights of that name.
static int checkpoint_check_weights(const Settings *settings, const char *flag, const char *weights, Error *error) {
    const char *names[4] = {"config.json", "preprocessor_config.json", "trainer_state.json", weights};
    return checkpoint_check(settings, flag, names, 4, error);
}

// The name of the file with a folder's weights as they are to be used: the averaged ones where it has any, unless raw
// ones are wanted.
static const char *weights_choose(const char *folder, int raw) {
    return fileset_has(folder, "ema.safetensors") && !raw ? "ema.safetensors" : "model.safetensors";
}

// Says so where there is a choice.
static void weights_say(const char *folder, const char *name) {
    if (fileset_has(folder, "ema.safetensors"))
        printf("weights    %s/%s, %s\n", folder, name, *name == 'e' ? "averaged by --ema" : "as trained");
}

// From here on the network ends with decoder layer `layers`, counted from 1: every layer was trained to answer, through
// the same norm and heads. Those behind it keep their weights, so that later on there may be more layers again.
static void dec_layers_use(Network *network, int layers) {
    network->config.dec_layers = network->model.config.dec_layers = layers;
}

static int network_open_once(Network *network, const Settings *settings, Error *error) {
    const char *folder = flag_text(settings, "resume");
    const int layers = flag_int(settings, "use_dec_layers");
    const char *name = weights_choose(folder, flag_on(settings, "raw_weights"));
    char *weights = NULL, *state = fileset_path(folder, "trainer_state.json");
    yajl_val tree = NULL;
    memset(network, 0, sizeof *network);
    int status = checkpoint_check_weights(settings, "resume", name, error);
    if (status == 0) status = config_read(network, folder, error);
    if (status == 0 && layers > network->config.dec_layers)
        usage_error("--use_dec_layers %d: the network in %s has %d decoder layers", layers, folder,
                    network->config.dec_layers);
    network->config.half = computes_in_bf16(settings);
    if (status == 0 && fileset_has(folder, "trainer_state.json") && !(tree = json_read(state, error))) status = -1;
    ConfigReader reader = {state, error, 0};
    yajl_val classes = json_member(tree, "classes");
    for (size_t i = 0; YAJL_IS_ARRAY(classes) && i < classes->u.array.len; i++) {
        int label = read_int(&reader, classes->u.array.values[i], "label", 0, 0, network->config.num_labels - 1);
        if (json_get_int64(classes->u.array.values[i], "id", &network->label_ids[label], state, error) < 0)
            reader.failed = 1;
    }
    if (reader.failed) status = -1;
    if (status == 0) status = model_create(&network->model, &network->config, 0, 0, 0, error);
    if (status == 0) {
        weights = fileset_path(folder, name);
        status = weights_read(&network->model, weights, WEIGHTS_ALL, error);
    }
    if (status == 0) weights_say(folder, name);
    if (status == 0) model_pack(&network->model);
    if (status == 0 && layers) dec_layers_use(network, layers);
    yajl_tree_free(tree);
    free(weights);
    free(state);
    return status;
}

// Opens the folder --resume for eval and predict: a checkpoint of ours, whose classes have ids, or one that
// transformers wrote. A run may put another set in place meanwhile (fileset_path). 0, or -1; the caller frees the
// network in either case.
static int network_open(Network *network, const Settings *settings, Error *error) {
    for (int attempt = 0;; attempt++) {
        int status = network_open_once(network, settings, error);
        if (status == 0 || attempt == 2 || !strstr(error->text, "/.commit/")) return status;
        network_free(network);
    }
}

// labels[c]: the output for class c of the data set, by name; -1 where the network has none. Where names are there
// twice the same place counts. Returns how many have none.
static int match_labels(int *labels, const Network *network, const Dataset *set) {
    int missing = 0, count = network->config.num_labels;
    for (int c = 0; c < set->num_categories; c++) {
        const char *name = set->categories[c].name;
        labels[c] = -1;
        for (int i = count - 1; i >= 0; i--)
            if (strcmp(network->label_names[i], name) == 0) labels[c] = i;
        if (c < count && strcmp(network->label_names[c], name) == 0) labels[c] = c;
        missing += labels[c] < 0;
    }
    return missing;
}

#endif
