/*
Checks of data/make_shapes.c. Included by test_detr.c, which defines `check`.
*/
#ifndef DETR_TEST_SHAPES_H
#define DETR_TEST_SHAPES_H

#define MAKE_SHAPES_NO_MAIN
#include "make_shapes.c"

// Pixels that a shape covers, without others, against the area that geometry gives it; distances at its centre.
static void test_shape_distance(const Scene *scene) {
    int seen[NUM_SHAPES] = {0};
    for (int part = 1; part <= 40; part++) {
        const Shape shape = scene_shape(scene, part);
        const double r = shape.radius;
        const double areas[NUM_SHAPES] = {M_PI * r * r, 2 * r * r, 3 * sqrt(3) / 4 * r * r};
        const double depths[NUM_SHAPES] = {-r, -r / sqrt(2), -r / 2};
        int pixels = 0;
        for (int i = 0; i < scene->height * scene->width; i++)
            pixels += shape_distance(&shape, i % scene->width + 0.5, i / scene->width + 0.5) < 0;
        check(fabs(pixels - areas[shape.kind]) < 3 * r, "%s of radius %.1f: %d pixels, its area is %.1f",
              SHAPES[shape.kind].name, r, pixels, areas[shape.kind]);
        check(fabs(shape_distance(&shape, shape.x, shape.y) - depths[shape.kind]) < 1e-9,
              "%s of radius %.1f: its centre is %.3f from the edge", SHAPES[shape.kind].name, r,
              -shape_distance(&shape, shape.x, shape.y));
        seen[shape.kind]++;
    }
    for (int k = 0; k < NUM_SHAPES; k++) check(seen[k] > 0, "%s is drawn", SHAPES[k].name);
}

// A picture's annotations against its shapes, painted one over the other in their order, and against its pixels.
static void test_scene(const Scene *scene, int *hidden_pixels) {
    Shape shapes[MAX_SHAPES];
    Image image;
    const int count = scene_draw(scene, &image, shapes);
    int wrong_colour = 0;
    check(count >= 1 && count <= scene->max_shapes, "picture %u: %d shapes", scene->number, count);
    for (int s = 0; s < count; s++) {
        int box[4] = {scene->width, scene->height, 0, 0}, visible = 0;
        for (int i = 0; i < scene->height * scene->width; i++) {
            const int x = i % scene->width, y = i / scene->width;
            const double distance = shape_distance(&shapes[s], x + 0.5, y + 0.5);
            double nearest = INFINITY;  // of the shapes painted later
            for (int later = s + 1; later < count; later++)
                nearest = fmin(nearest, shape_distance(&shapes[later], x + 0.5, y + 0.5));
            if (distance >= 0 || nearest < 0) continue;
            visible++;
            if (x < box[0]) box[0] = x;
            if (y < box[1]) box[1] = y;
            if (x >= box[2]) box[2] = x + 1;
            if (y >= box[3]) box[3] = y + 1;
            for (int c = 0; c < 3 && distance < -2 && nearest > 1; c++)
                wrong_colour += fabs(image.pixels[3 * i + c] - shapes[s].colour[c]) > 0.22 * shapes[s].colour[c] + 11;
        }
        check(visible == shapes[s].visible && visible >= MIN_VISIBLE * shapes[s].pixels,
              "picture %u, shape %d: %d of its %d pixels can be seen, said is %d", scene->number, s, visible,
              shapes[s].pixels, shapes[s].visible);
        check(box[0] == shapes[s].x0 && box[1] == shapes[s].y0 && box[2] == shapes[s].x1 && box[3] == shapes[s].y1,
              "picture %u, shape %d: its box is not %d %d %d %d", scene->number, s, box[0], box[1], box[2], box[3]);
        *hidden_pixels += shapes[s].pixels - visible;
    }
    check(wrong_colour == 0, "picture %u: %d pixels have not their shape's colour", scene->number, wrong_colour);
    image_free(&image);
}

// The program's own way, from its flags to a folder that opens as a data set.
static void test_shapes_folder(const char *root) {
    char folder[128];
    snprintf(folder, sizeof folder, "%s/set", root);
    const char *words[] = {"make_shapes", folder, "--images", "3", "--val", "2", "--size", "64x96", "--shapes", "5"};
    Settings settings = shape_settings("make_shapes");
    Error error;
    optind = 1;
    settings_parse(&settings, 10, (char **)words);
    check(make_shapes(&settings, &error) == 0, "a set of shapes is written");
    for (int split = 0; split < 2; split++) {
        Dataset set;
        const int opened = dataset_open(&set, folder, split ? "val" : "train", &error) == 0;
        check(opened && set.num_images == 3 - split && set.num_categories == NUM_SHAPES && set.num_problems == 0,
              "the set of shapes opens: %s", opened ? "with other pictures or problems" : error.text);
        for (int i = 0; opened && i < set.num_images; i++) {
            const Scene scene = {1, (uint32_t)split, (uint32_t)i, 64, 96, 5};
            Shape shapes[MAX_SHAPES];
            Image drawn, read;
            const int count = scene_draw(&scene, &drawn, shapes);
            int same = set.images[i].num_annotations == count;
            for (int s = 0; s < count && same; s++) {
                const Annotation *box = &set.annotations[set.images[i].first_annotation + s];
                same = box->class_index == shapes[s].kind && box->x == shapes[s].x0 && box->y == shapes[s].y0 &&
                       box->width == shapes[s].x1 - shapes[s].x0 && box->height == shapes[s].y1 - shapes[s].y0 &&
                       box->area == shapes[s].visible && !box->crowd;
            }
            check(same, "split %d, picture %d: annotations are its shapes", split, i);
            double difference = 0;
            if (image_read(set.images[i].path, &read, &error) == 0) {
                for (int p = 0; p < 3 * 64 * 96; p++)
                    difference += abs(read.pixels[p] - drawn.pixels[p]) / (3. * 64 * 96);
                image_free(&read);
            }
            check(difference > 0 && difference < 6, "split %d, picture %d: its file is off by %.1f", split, i,
                  difference);
            image_free(&drawn);
        }
        if (opened) dataset_free(&set);
    }
    check(make_shapes(&settings, &error) != 0, "a set that is there is not written over");
}

static void test_shapes(void) {
    Scene scene = {1, 0, 0, 100, 140, 8};
    char folder[] = "/tmp/test_shapes_XXXXXX";
    int hidden_pixels = 0;
    test_shape_distance(&scene);
    for (scene.number = 0; scene.number < 12; scene.number++) test_scene(&scene, &hidden_pixels);
    check(hidden_pixels > 200, "shapes lie over others: %d pixels are hidden", hidden_pixels);
    if (!mkdtemp(folder)) {
        check(0, "a temporary folder can be made under /tmp");
        return;
    }
    test_shapes_folder(folder);
    fixture_remove(folder);
}

#endif
