/*
make_shapes: a data set of generated pictures, for quick experiments. Coloured circles, squares and triangles of any
size and angle lie on a mottled, noisy ground, later ones over earlier ones; it is written as COCO data set:

    make_shapes OUT [--images N] [--val N] [--size HxW] [--shapes N] [--seed N]

    OUT/train/000000.jpg ...               OUT/annotations/instances_train.json
    OUT/val/000000.jpg ...                 OUT/annotations/instances_val.json

A box encloses the pixels of a shape that can be seen, as COCO's do, and the area is their number. Of every shape at
least MIN_VISIBLE can be seen: one that would hide more of an earlier one is not drawn. So every shape in a picture is
annotated. A picture is a function of (seed, split, its number) and of the flags that describe pictures: more pictures
are the same ones and others.

Order to read in: Shapes, Pictures, Data set. Compiles as C11 and as C++17.
*/
#include "flags.h"
#include "image.h"

// ---------------------------------------------------------------------------------------------------------------------
// Shapes: a circle, or a regular polygon

static const struct {
    const char *name;
    int sides;  // 0: a circle
} SHAPES[] = {{"circle", 0}, {"square", 4}, {"triangle", 3}};

enum { NUM_SHAPES = sizeof SHAPES / sizeof SHAPES[0], MAX_SIDES = 4, MAX_SHAPES = 100 };

static const double MIN_VISIBLE = 0.6, MIN_RADIUS = 0.07, MAX_RADIUS = 0.16;  // radii: of the picture's short side
static const double OUTLINE = 1.25;                                           // pixels at the edge that are darker

typedef struct {
    int kind;             // in SHAPES
    int pixels, visible;  // pixels it covers, and those of them that no later shape covers
    int x0, y0, x1,
        y1;  // the box of what is visible (until it is drawn, of all of it): pixels x0 <= x < x1, y0 <= y < y1
    double x, y, radius;           // centre and distance of the corners, in pixels
    double inner;                  // distance of the sides from the centre
    double normals[MAX_SIDES][2];  // direction of each side from the centre
    double colour[3];              // 0 to 255
    double shade[2];               // change of brightness from the centre to x and y one radius away
} Shape;

// How far (x, y) is outside the nearest side, in pixels; negative inside.
static double shape_distance(const Shape *shape, double x, double y) {
    const int sides = SHAPES[shape->kind].sides;
    const double dx = x - shape->x, dy = y - shape->y;
    double farthest = -INFINITY;
    if (sides == 0) return sqrt(dx * dx + dy * dy) - shape->inner;
    for (int i = 0; i < sides; i++) {
        const double along = dx * shape->normals[i][0] + dy * shape->normals[i][1];
        if (along > farthest) farthest = along;
    }
    return farthest - shape->inner;
}

// The colour of the hue 0 to 1, with the value 0 to 255.
static void hue_colour(double colour[3], double hue, double saturation, double value) {
    for (int c = 0; c < 3; c++) {
        const double ramp = fabs(fmod(6 * hue + (c == 0 ? 0 : c == 1 ? 4 : 2), 6) - 3) - 1;
        colour[c] = value * (1 - saturation * (1 - fmin(fmax(ramp, 0), 1)));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Pictures

typedef struct {
    uint64_t seed;
    uint32_t split, number;  // 0: train, 1: val; the picture's number in it
    int height, width, max_shapes;
} Scene;

// A number in (low, high): decision `element` about `part` of the picture, 0: its ground, then its shapes.
static double scene_random(const Scene *scene, int part, int element, double low, double high) {
    return low + (high - low) * random_uniform(scene->seed, RANDOM_SHAPES, scene->split, (uint32_t)part, scene->number,
                                               (uint64_t)element);
}

static Shape scene_shape(const Scene *scene, int part) {
    const double side = scene->height < scene->width ? scene->height : scene->width;
    Shape shape;
    memset(&shape, 0, sizeof shape);
    shape.kind = (int)scene_random(scene, part, 0, 0, NUM_SHAPES);
    shape.radius = side * scene_random(scene, part, 1, MIN_RADIUS, MAX_RADIUS);
    shape.x = scene_random(scene, part, 2, shape.radius, scene->width - shape.radius);
    shape.y = scene_random(scene, part, 3, shape.radius, scene->height - shape.radius);
    shape.x0 = (int)fmax(shape.x - shape.radius - 1, 0), shape.x1 = (int)fmin(shape.x + shape.radius + 2, scene->width);
    shape.y0 = (int)fmax(shape.y - shape.radius - 1, 0),
    shape.y1 = (int)fmin(shape.y + shape.radius + 2, scene->height);
    const double angle = scene_random(scene, part, 4, 0, 2 * M_PI);
    shape.inner = shape.radius * (SHAPES[shape.kind].sides ? cos(M_PI / SHAPES[shape.kind].sides) : 1);
    for (int i = 0; i < SHAPES[shape.kind].sides; i++) {
        shape.normals[i][0] = cos(angle + 2 * M_PI * i / SHAPES[shape.kind].sides);
        shape.normals[i][1] = sin(angle + 2 * M_PI * i / SHAPES[shape.kind].sides);
    }
    hue_colour(shape.colour, scene_random(scene, part, 5, 0, 1), scene_random(scene, part, 6, 0.6, 1),
               scene_random(scene, part, 7, 130, 255));
    for (int i = 0; i < 2; i++) shape.shade[i] = scene_random(scene, part, 8 + i, -0.15, 0.15);
    return shape;
}

// The ground: a colour, lighter or darker at the crossings of a coarse grid and between them as bilinear interpolation
// gives.
static void scene_ground(const Scene *scene, double *pixels) {
    enum { CELLS = 6 };
    double base[3], grid[CELLS + 1][CELLS + 1];
    hue_colour(base, scene_random(scene, 0, 1, 0, 1), 0.3, scene_random(scene, 0, 2, 80, 200));
    for (int i = 0; i < (CELLS + 1) * (CELLS + 1); i++)
        grid[i / (CELLS + 1)][i % (CELLS + 1)] = scene_random(scene, 0, 3 + i, 0.7, 1.3);
    for (int i = 0; i < scene->height * scene->width; i++) {
        const double v = (double)(i / scene->width) * CELLS / scene->height,
                     u = (double)(i % scene->width) * CELLS / scene->width;
        const double *above = grid[(int)v], *below = grid[(int)v + 1];
        const int left = (int)u;
        const double top = above[left] + (u - left) * (above[left + 1] - above[left]),
                     bottom = below[left] + (u - left) * (below[left + 1] - below[left]);
        for (int c = 0; c < 3; c++) *pixels++ = base[c] * (top + (v - (int)v) * (bottom - top));
    }
}

// Counts the pixels that a shape covers, and in hidden those that it would take from each owner.
static void scene_count(const Scene *scene, Shape *shape, const unsigned char *owner, int *hidden) {
    for (int y = shape->y0; y < shape->y1; y++) {
        for (int x = shape->x0; x < shape->x1; x++) {
            if (shape_distance(shape, x + 0.5, y + 0.5) >= 0) continue;
            hidden[owner[y * scene->width + x]]++;
            shape->pixels++;
        }
    }
}

// Paints a shape over pixels: (height, width, 3), with smooth edges, and makes it, `number`, the owner of what it
// covers.
static void scene_paint(const Scene *scene, double *pixels, unsigned char *owner, const Shape *shape, int number) {
    for (int y = shape->y0; y < shape->y1; y++) {
        for (int x = shape->x0; x < shape->x1; x++) {
            const double distance = shape_distance(shape, x + 0.5, y + 0.5);
            if (distance > 0.5) continue;
            const double cover = fmin(0.5 - distance, 1), u = (x - shape->x) / shape->radius,
                         v = (y - shape->y) / shape->radius,
                         light = (1 + u * shape->shade[0] + v * shape->shade[1]) * (distance > -OUTLINE ? 0.5 : 1);
            double *pixel = pixels + 3 * (y * scene->width + x);
            for (int c = 0; c < 3; c++) pixel[c] += cover * (light * shape->colour[c] - pixel[c]);
            if (distance < 0) owner[y * scene->width + x] = (unsigned char)number;
        }
    }
}

// Draws picture and shapes; shapes: (max_shapes), returned is how many there are, 1 at least. The caller frees *image.
static int scene_draw(const Scene *scene, Image *image, Shape *shapes) {
    const int size = scene->height * scene->width, wanted = 1 + (int)scene_random(scene, 0, 0, 0, scene->max_shapes);
    double *pixels = (double *)allocate(3 * (size_t)size * sizeof(double));
    unsigned char *owner = (unsigned char *)allocate((size_t)size);  // of each pixel, from 1; 0: the ground
    int count = 0;
    scene_ground(scene, pixels);
    for (int part = 1; part <= wanted; part++) {
        int hidden[MAX_SHAPES + 1] = {0}, allowed = 1;
        Shape *shape = &shapes[count];
        *shape = scene_shape(scene, part);
        scene_count(scene, shape, owner, hidden);
        for (int s = 0; s < count; s++) allowed &= shapes[s].visible - hidden[s + 1] >= MIN_VISIBLE * shapes[s].pixels;
        if (!allowed) continue;
        for (int s = 0; s < count; s++) shapes[s].visible -= hidden[s + 1];
        shape->visible = shape->pixels;
        scene_paint(scene, pixels, owner, shape, ++count);
    }
    for (int s = 0; s < count; s++) {
        shapes[s].x0 = scene->width, shapes[s].y0 = scene->height;
        shapes[s].x1 = shapes[s].y1 = 0;
    }
    *image = image_new(scene->width, scene->height);
    for (int i = 0; i < size; i++) {
        const int x = i % scene->width, y = i / scene->width;
        uint32_t noise[4];
        random_words(noise, scene->seed, RANDOM_SHAPES, 2 + scene->split, 0, scene->number, (uint32_t)i);
        for (int c = 0; c < 3; c++)
            image->pixels[3 * i + c] = (unsigned char)clamp_round(pixels[3 * i + c] + noise[c] % 21 - 10.0, 0, 255);
        if (!owner[i]) continue;
        Shape *shape = &shapes[owner[i] - 1];
        if (x < shape->x0) shape->x0 = x;
        if (y < shape->y0) shape->y0 = y;
        if (x >= shape->x1) shape->x1 = x + 1;
        if (y >= shape->y1) shape->y1 = y + 1;
    }
    free(pixels);
    free(owner);
    return count;
}

// ---------------------------------------------------------------------------------------------------------------------
// Data set

// Writes the pictures of a split into OUT/SPLIT and what is in them into OUT/instances_SPLIT.json. 0, or -1.
static int split_write(Scene scene, const char *folder, const char *split, int num_images, Error *error) {
    char *pictures = format_string("%s/%s", folder, split),
         *path = format_string("%s/instances_%s.json", folder, split);
    int status = make_directories(pictures, error), boxes = 0;
    FILE *file = status == 0 ? fopen(path, "w") : NULL, *annotations = tmpfile();
    if (status == 0 && (!file || !annotations))
        status = fail(error, "%s: cannot be written: %s", path, strerror(errno));
    if (status == 0) fputs("{\"images\": [", file);
    for (int i = 0; i < num_images && status == 0; i++) {
        Shape shapes[MAX_SHAPES];
        Image image;
        char *name = format_string("%s/%06d.jpg", pictures, i);
        scene.number = (uint32_t)i;
        const int count = scene_draw(&scene, &image, shapes);
        fprintf(file, "%s\n{\"id\": %d, \"file_name\": \"%06d.jpg\", \"width\": %d, \"height\": %d}", i ? "," : "", i,
                i, image.width, image.height);
        for (int s = 0; s < count; s++, boxes++)
            fprintf(annotations,
                    "%s\n{\"id\": %d, \"image_id\": %d, \"category_id\": %d, \"bbox\": [%d, %d, %d, %d], \"area\": %d, "
                    "\"iscrowd\": 0}",
                    boxes ? "," : "", boxes + 1, i, shapes[s].kind + 1, shapes[s].x0, shapes[s].y0,
                    shapes[s].x1 - shapes[s].x0, shapes[s].y1 - shapes[s].y0, shapes[s].visible);
        status = image_write(name, &image, error);
        image_free(&image);
        free(name);
    }
    if (status == 0) {
        fputs("],\n\"annotations\": [", file);
        rewind(annotations);
        for (int c; (c = getc(annotations)) != EOF;) putc(c, file);
        fputs("],\n\"categories\": [", file);
        for (int k = 0; k < NUM_SHAPES; k++)
            fprintf(file, "%s\n{\"id\": %d, \"name\": \"%s\"}", k ? "," : "", k + 1, SHAPES[k].name);
        fputs("]}\n", file);
        if (ferror(file) || ferror(annotations)) status = fail(error, "%s: cannot be written", path);
    }
    if (file && fclose(file) != 0 && status == 0)
        status = fail(error, "%s: cannot be written: %s", path, strerror(errno));
    if (annotations) fclose(annotations);
    free(pictures);
    free(path);
    return status;
}

static const Flag SHAPE_FLAGS[] = {
    {"images", INTEGER, "N", "1600", 1, 1e6, 1, "pictures to train on"},
    {"val", INTEGER, "N", "200", 1, 1e6, 1, "pictures to evaluate on"},
    {"size", TEXT, "HxW", "192x192", 0, 0, 1, "height and width of the pictures, in pixels, from 32 to 4096"},
    {"shapes", INTEGER, "N", "16", 1, MAX_SHAPES, 1, "most shapes in a picture; every number from 1 is as likely"},
    {"seed", INTEGER, "N", "1", 0, 9e18, 1, "of every random number"},
};

// Writes both splits; the annotations come to their place last, and show that the data set is whole. 0, or -1.
static int make_shapes(const Settings *settings, Error *error) {
    static const char *const splits[2] = {"train", "val"};
    const char *size = flag_text(settings, "size"), *folder = settings->arguments[0];
    char *annotations = format_string("%s/annotations", folder);
    int used = 0, status = 0;
    Scene scene = {(uint64_t)flag_int64(settings, "seed"), 0, 0, 0, 0, flag_int(settings, "shapes")};
    if (sscanf(size, "%dx%d%n", &scene.height, &scene.width, &used) != 2 || size[used] || scene.height < 32 ||
        scene.width < 32 || scene.height > 4096 || scene.width > 4096)
        usage_error("--size must be HEIGHTxWIDTH in pixels, from 32 to 4096, not \"%s\"", size);
    if (access(annotations, F_OK) == 0)
        status = fail(error, "%s is there already: give the data set another folder", annotations);
    for (int s = 0; s < 2 && status == 0; s++) {
        scene.split = (uint32_t)s;
        status = split_write(scene, folder, splits[s], flag_int(settings, s ? "val" : "images"), error);
    }
    if (status == 0) status = make_directories(annotations, error);
    for (int s = 0; s < 2 && status == 0; s++) {
        char *from = format_string("%s/instances_%s.json", folder, splits[s]),
             *to = format_string("%s/instances_%s.json", annotations, splits[s]);
        if (rename(from, to) != 0) status = fail(error, "%s: cannot be written: %s", to, strerror(errno));
        free(from);
        free(to);
    }
    free(annotations);
    return status;
}

static Settings shape_settings(const char *program) {
    Settings settings;
    memset(&settings, 0, sizeof settings);
    settings.flags = SHAPE_FLAGS;
    settings.num_flags = sizeof SHAPE_FLAGS / sizeof SHAPE_FLAGS[0];
    settings.program = program;
    settings.command_name = "OUT";
    settings.command = 1;
    return settings;
}

#ifndef MAKE_SHAPES_NO_MAIN
int main(int argc, char **argv) {
    Error error;
    Settings settings = shape_settings(argv[0]);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") != 0 && strcmp(argv[i], "-h") != 0) continue;
        printf(
            "%s OUT [flags]\n    makes a COCO data set of generated pictures: coloured shapes, some before others\n\n"
            "Flags, [default]:\n",
            argv[0]);
        settings_print_help(&settings, 1);
        return 0;
    }
    settings_parse(&settings, argc, argv);
    if (settings.num_arguments != 1) usage_error("one folder must be given: see %s --help", argv[0]);
    if (make_shapes(&settings, &error) != 0) {
        fprintf(stderr, "error: %s\n", error.text);
        return 1;
    }
    printf("%s: %s pictures to train on, %s to evaluate on, of %s pixels\n", settings.arguments[0],
           flag_text(&settings, "images"), flag_text(&settings, "val"), flag_text(&settings, "size"));
    return 0;
}
#endif
