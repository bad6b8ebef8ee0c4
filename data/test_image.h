/*
Checks of image.h and loader.h: decoding of every kind of PNG and JPEG, EXIF, damage, resize, drawing, augmentation and
worker threads. All files are made here, in a temporary folder. Included by test_detr.c, which defines check().
*/
#ifndef DETR_TEST_IMAGE_H
#define DETR_TEST_IMAGE_H

#include "image.h"
#include "loader.h"
#include <unistd.h>

static int test_same(const Image *a, const Image *b) {
    return a->pixels && b->pixels && a->width == b->width && a->height == b->height &&
           memcmp(a->pixels, b->pixels, 3 * (size_t)a->width * (size_t)a->height) == 0;
}

static double test_mean_difference(const Image *a, const Image *b) {
    if (!a->pixels || !b->pixels || a->width != b->width || a->height != b->height) return 255;
    double sum = 0;
    size_t count = 3 * (size_t)a->width * (size_t)a->height;
    for (size_t i = 0; i < count; i++) sum += abs(a->pixels[i] - b->pixels[i]);
    return sum / (double)count;
}

static Image test_copy(const Image *image) {
    Image copy = image_new(image->width, image->height);
    memcpy(copy.pixels, image->pixels, 3 * (size_t)image->width * (size_t)image->height);
    return copy;
}

// Smooth, and different in every corner.
static Image test_picture(int width, int height) {
    Image image = image_new(width, height);
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++) {
            unsigned char *pixel = image.pixels + 3 * (y * width + x);
            pixel[0] = (unsigned char)(30 + 200 * x / width);
            pixel[1] = (unsigned char)(220 - 180 * y / height);
            pixel[2] = (unsigned char)(40 + 90 * x / width + 100 * y / height);
        }
    }
    return image;
}

// EXIF data of one entry, in either byte order. Returns its length.
static int test_exif(unsigned char *to, int orientation, int big, int type) {
    static const unsigned char little_end[26] = {'I', 'I', '*', 0, 8, 0, 0, 0, 1, 0, 0x12, 0x01, 3, 0, 1, 0};
    static const unsigned char big_end[26] = {'M', 'M', 0, '*', 0, 0, 0, 8, 0, 1, 0x01, 0x12, 0, 3, 0, 0, 0, 1};
    memcpy(to, big ? big_end : little_end, 26);
    to[big ? 13 : 12] = (unsigned char)type;
    to[big ? (type == 3 ? 19 : 21) : 18] = (unsigned char)orientation;
    return 26;
}

// ---------------------------------------------------------------------------------------------------------------------
// JPEG

typedef struct {
    int components, horizontal, vertical, progressive, restart;
    int orientation, big_endian;  // orientation 0: no EXIF
} TestJpeg;

// Encodes the picture (its red channel for gray; for CMYK its colours with a quarter of black ink) into new memory.
static unsigned char *test_jpeg(const Image *image, const TestJpeg *kind, size_t *size) {
    struct jpeg_compress_struct encoder;
    struct jpeg_error_mgr errors;
    unsigned char *bytes = NULL;
    unsigned long length = 0;
    encoder.err = jpeg_std_error(&errors);
    jpeg_create_compress(&encoder);
    jpeg_mem_dest(&encoder, &bytes, &length);
    encoder.image_width = (JDIMENSION)image->width;
    encoder.image_height = (JDIMENSION)image->height;
    encoder.input_components = kind->components;
    encoder.in_color_space = kind->components == 1 ? JCS_GRAYSCALE : kind->components == 4 ? JCS_CMYK : JCS_RGB;
    jpeg_set_defaults(&encoder);
    jpeg_set_quality(&encoder, 97, TRUE);
    encoder.comp_info[0].h_samp_factor = kind->horizontal;
    encoder.comp_info[0].v_samp_factor = kind->vertical;
    if (kind->components == 4) {
        encoder.comp_info[3].h_samp_factor = kind->horizontal;
        encoder.comp_info[3].v_samp_factor = kind->vertical;
    }
    if (kind->progressive) jpeg_simple_progression(&encoder);
    encoder.restart_interval = (unsigned)kind->restart;
    jpeg_start_compress(&encoder, TRUE);
    if (kind->orientation) {
        unsigned char exif[32] = {'E', 'x', 'i', 'f', 0, 0};
        int exif_size = 6 + test_exif(exif + 6, kind->orientation, kind->big_endian, 3);
        jpeg_write_marker(&encoder, JPEG_APP0 + 1, exif, (unsigned)exif_size);
    }
    unsigned char *row = (unsigned char *)allocate(4 * (size_t)image->width);
    for (int y = 0; y < image->height; y++) {
        const unsigned char *from = image->pixels + 3 * (size_t)y * (size_t)image->width;
        for (int i = 0; i < image->width * kind->components; i++) {
            int x = i / kind->components, c = i % kind->components;
            row[i] = c == 3 ? 191 : from[3 * x + c];
        }
        JSAMPROW pointer = row;
        jpeg_write_scanlines(&encoder, &pointer, 1);
    }
    jpeg_finish_compress(&encoder);
    jpeg_destroy_compress(&encoder);
    free(row);
    *size = length;
    return bytes;
}

static void test_jpeg_kinds(void) {
    Image picture = test_picture(53, 38), decoded;
    Error error;
    for (int i = 0; i < 48; i++) {
        static const int sampling[4][2] = {{1, 1}, {2, 1}, {1, 2}, {2, 2}};
        TestJpeg kind = {i % 3 == 0 ? 1 : i % 3 == 1 ? 3 : 4,
                         sampling[i / 3 % 4][0],
                         sampling[i / 3 % 4][1],
                         i / 12 % 2,
                         i / 24 * 2,
                         0,
                         0};
        size_t size;
        unsigned char *bytes = test_jpeg(&picture, &kind, &size);
        int status = image_decode(bytes, size, "a.jpg", &decoded, &error);
        Image expected = test_copy(&picture);
        for (int p = 0; p < picture.width * picture.height; p++) {
            unsigned char *pixel = expected.pixels + 3 * p;
            if (kind.components == 1) pixel[1] = pixel[2] = pixel[0];
            if (kind.components == 4)  // 191 of 255 is left of white, and of that what each ink lets through
                for (int c = 0; c < 3; c++) pixel[c] = (unsigned char)lrint(191 - (255 - pixel[c]) * 191 / 255.0);
        }
        double difference = test_mean_difference(&decoded, &expected);
        check(status == 0 && difference < 2,
              "JPEG, %d components, sampling %dx%d, progressive %d, restart %d: off by %g", kind.components,
              kind.horizontal, kind.vertical, kind.progressive, kind.restart, difference);
        image_free(&decoded);
        image_free(&expected);
        free(bytes);
    }
    image_free(&picture);
}

// ---------------------------------------------------------------------------------------------------------------------
// EXIF

// The pixel of the stored picture that stands at (x, y) of the upright one, from the EXIF standard's table.
static const unsigned char *test_oriented(const Image *stored, int orientation, int x, int y) {
    int right = stored->width - 1, bottom = stored->height - 1, from_x = x, from_y = y;
    switch (orientation) {
        case 2:
            from_x = right - x;
            break;
        case 3:
            from_x = right - x, from_y = bottom - y;
            break;
        case 4:
            from_y = bottom - y;
            break;
        case 5:
            from_x = y, from_y = x;
            break;
        case 6:
            from_x = y, from_y = bottom - x;
            break;
        case 7:
            from_x = right - y, from_y = bottom - x;
            break;
        case 8:
            from_x = right - y, from_y = x;
            break;
        default:
            break;
    }
    return stored->pixels + 3 * (from_y * stored->width + from_x);
}

static void test_exif_orientations(const char *folder) {
    Image picture = test_picture(37, 22), stored, turned;
    Error error;
    for (int big = 0; big < 2; big++) {
        for (int orientation = 0; orientation <= 9; orientation++) {
            TestJpeg kind = {3, 1, 1, 0, 0, 0, 0};
            size_t size;
            unsigned char *bytes = test_jpeg(&picture, &kind, &size);
            image_decode(bytes, size, "a.jpg", &stored, &error);
            free(bytes);
            kind.orientation = orientation;
            kind.big_endian = big;
            bytes = test_jpeg(&picture, &kind, &size);
            char *path = format_string("%s/exif.jpg", folder);
            FILE *file = fopen(path, "wb");
            if (file) fwrite(bytes, 1, size, file), fclose(file);
            free(bytes);
            int same = image_read(path, &turned, &error) == 0, swap = orientation >= 5 && orientation <= 8;
            same = same && turned.width == (swap ? 22 : 37) && turned.height == (swap ? 37 : 22);
            for (int y = 0; same && y < turned.height; y++)
                for (int x = 0; same && x < turned.width; x++)
                    same = memcmp(turned.pixels + 3 * (y * turned.width + x), test_oriented(&stored, orientation, x, y),
                                  3) == 0;
            check(same, "EXIF orientation %d, %s-endian", orientation, big ? "big" : "little");
            int width = 0, height = 0;
            check(
                image_read_size(path, &width, &height, &error) == 0 && width == turned.width && height == turned.height,
                "size from the header, orientation %d: %d x %d", orientation, width, height);
            image_free(&stored);
            image_free(&turned);
            free(path);
        }
    }
    unsigned char exif[26];
    check(exif_orientation(exif, (size_t)test_exif(exif, 6, 1, 4)) == 6, "EXIF orientation stored as a long number");
    for (int size = 0; size < 22; size++) {
        unsigned char *cut = (unsigned char *)malloc((size_t)size + 1);  // exact, so that a sanitizer sees an overrun
        memcpy(cut, exif, (size_t)size);
        check(exif_orientation(cut, (size_t)size) == 1, "EXIF of one entry, cut off after %d bytes", size);
        free(cut);
    }
    image_free(&picture);
}

// ---------------------------------------------------------------------------------------------------------------------
// PNG

typedef struct {
    unsigned char *bytes;
    size_t size;
} TestBytes;

static void test_png_append(png_structp encoder, png_bytep from, png_size_t count) {
    TestBytes *to = (TestBytes *)png_get_io_ptr(encoder);
    to->bytes = (unsigned char *)reallocate(to->bytes, to->size + count);
    memcpy(to->bytes + to->size, from, count);
    to->size += count;
}

static void test_png_flush(png_structp encoder) { (void)encoder; }

// A PNG of random samples. *expected gets what it must decode to.
static TestBytes test_png(int width, int height, int depth, int colour, int interlaced, int orientation,
                          Image *expected) {
    TestBytes file = {NULL, 0};
    png_structp encoder = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(encoder);
    png_set_write_fn(encoder, &file, test_png_append, test_png_flush);
    png_set_IHDR(encoder, info, (png_uint_32)width, (png_uint_32)height, depth, colour,
                 interlaced ? PNG_INTERLACE_ADAM7 : PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                 PNG_FILTER_TYPE_DEFAULT);
    png_color palette[256];
    png_byte alphas[256];
    for (int i = 0; i < 256; i++) {
        palette[i].red = (png_byte)(i * 7), palette[i].green = (png_byte)(255 - i),
        palette[i].blue = (png_byte)(i * 31);
        alphas[i] = (png_byte)(i * 3);
    }
    if (colour == PNG_COLOR_TYPE_PALETTE) {
        png_set_PLTE(encoder, info, palette, 1 << depth);
        png_set_tRNS(encoder, info, alphas, 1 << depth, NULL);
    } else if (!(colour & PNG_COLOR_MASK_ALPHA)) {
        png_color_16 clear = {0, 1, 1, 1, 1};
        png_set_tRNS(encoder, info, NULL, 0, &clear);
    }
    unsigned char exif[26];
    if (orientation) png_set_eXIf_1(encoder, info, (png_uint_32)test_exif(exif, orientation, 0, 3), exif);
    png_write_info(encoder, info);

    int channels = png_get_channels(encoder, info), row_bytes = (width * channels * depth + 7) / 8;
    unsigned char *samples = (unsigned char *)allocate((size_t)height * (size_t)row_bytes);
    png_bytep *rows = (png_bytep *)allocate((size_t)height * sizeof(png_bytep));
    for (int i = 0; i < height * row_bytes; i++)
        samples[i] = (unsigned char)random_word(1, RANDOM_TEST, 0, (uint32_t)colour, (uint32_t)depth, (uint64_t)i);
    *expected = image_new(width, height);
    for (int y = 0; y < height; y++) {
        rows[y] = samples + y * row_bytes;
        for (int x = 0; x < width; x++) {
            unsigned char *pixel = expected->pixels + 3 * (y * width + x);
            for (int c = 0; c < 3; c++) {
                int bit = (x * channels + (channels >= 3 ? c : 0)) * depth;
                int value = rows[y][bit / 8];  // of 16 bits the high byte stands first
                if (depth < 8) value = (value >> (8 - depth - bit % 8)) & ((1 << depth) - 1);
                if (colour == PNG_COLOR_TYPE_PALETTE)
                    value = c == 0 ? palette[value].red : c == 1 ? palette[value].green : palette[value].blue;
                else if (depth < 8)
                    value = value * 255 / ((1 << depth) - 1);
                pixel[c] = (unsigned char)value;
            }
        }
    }
    png_write_image(encoder, rows);
    png_write_end(encoder, info);
    png_destroy_write_struct(&encoder, &info);
    free(samples);
    free(rows);
    return file;
}

static void test_png_kinds(void) {
    static const int kinds[15][2] = {{0, 1}, {0, 2}, {0, 4}, {0, 8}, {0, 16}, {2, 8}, {2, 16}, {3, 1},
                                     {3, 2}, {3, 4}, {3, 8}, {4, 8}, {4, 16}, {6, 8}, {6, 16}};  // colour type, depth
    Error error;
    for (int i = 0; i < 60; i++) {
        int colour = kinds[i % 15][0], depth = kinds[i % 15][1], interlaced = i / 15 % 2, small = i / 30;
        Image decoded, expected;
        TestBytes file = test_png(small ? 3 : 29, small ? 2 : 18, depth, colour, interlaced, 0, &expected);
        int status = image_decode(file.bytes, file.size, "a.png", &decoded, &error);
        check(status == 0 && test_same(&decoded, &expected), "PNG of colour type %d, %d bits, interlaced %d, %d wide",
              colour, depth, interlaced, expected.width);
        image_free(&decoded);
        image_free(&expected);
        free(file.bytes);
    }
    Image decoded, expected;
    TestBytes file = test_png(29, 18, 8, 2, 0, 6, &expected);
    image_decode(file.bytes, file.size, "a.png", &decoded, &error);
    check(decoded.width == 18 && decoded.height == 29 && memcmp(decoded.pixels, expected.pixels + 3 * 29 * 17, 3) == 0,
          "a PNG with EXIF orientation 6 is turned");
    image_free(&decoded);
    image_free(&expected);
    free(file.bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Damage

// Decodes a copy of exactly `size` bytes, so that a sanitizer sees the first byte read beyond the end.
static int test_decode_exact(const unsigned char *bytes, size_t size, Error *error) {
    unsigned char *copy = (unsigned char *)malloc(size ? size : 1);
    Image image;
    memcpy(copy, bytes, size);
    int status = image_decode(copy, size, "some/name", &image, error);
    if (status != 0 && image.pixels) status = 1;
    image_free(&image);
    free(copy);
    return status;
}

static void test_damage(void) {
    Image picture = test_picture(61, 47), expected;
    TestJpeg plain = {3, 2, 2, 0, 0, 6, 0}, progressive = {3, 2, 2, 1, 0, 0, 0};
    Error error;
    for (int kind = 0; kind < 4; kind++) {
        TestBytes file = {NULL, 0};
        if (kind < 2) {
            file.bytes = test_jpeg(&picture, kind ? &progressive : &plain, &file.size);
        } else {
            file = test_png(61, 47, 8, 2, kind == 3, 0, &expected);
            image_free(&expected);
        }
        int refused = 1, crashed = 0;
        for (size_t size = 0; size + 16 < file.size; size += 1 + size / 40)
            refused = refused && test_decode_exact(file.bytes, size, &error) == -1 && strstr(error.text, "some/name");
        check(refused, "a cut off file is refused by name, kind %d", kind);
        for (uint32_t i = 0; i < 300; i++) {
            TestBytes bad = {(unsigned char *)allocate(file.size), file.size};
            memcpy(bad.bytes, file.bytes, file.size);
            for (uint32_t j = 0; j <= i % 4; j++) {
                uint32_t limit = (uint32_t)file.size;
                if (i % 2 && limit > 200) limit = 200;  // half of them in the headers
                bad.bytes[random_below(2, RANDOM_TEST, 0, i, j, 0, limit)] =
                    (unsigned char)random_word(2, RANDOM_TEST, 0, i, j, 1);
            }
            strcpy(error.text, "");
            int status = test_decode_exact(bad.bytes, bad.size, &error);
            crashed |= status != 0 && (status != -1 || !error.text[0] || strchr(error.text, '\n'));
            free(bad.bytes);
        }
        check(!crashed, "a damaged file gives a picture or one line of error, kind %d", kind);
        if (kind == 0) {  // stray bytes before the scan: passed over, and noted
            size_t scan = 0;
            while (scan + 2 < file.size && memcmp(file.bytes + scan, "\xFF\xDA", 2) != 0) scan++;
            unsigned char *strayed = (unsigned char *)allocate(file.size + 3);
            memcpy(strayed, file.bytes, scan);
            memcpy(strayed + scan + 3, file.bytes + scan, file.size - scan);
            Image whole, noted;
            ImageNotes notes[2];
            const int status = image_decode_stored(file.bytes, file.size, "a", &whole, &notes[0], &error) +
                               image_decode_stored(strayed, file.size + 3, "b", &noted, &notes[1], &error);
            check(status == 0 && test_mean_difference(&whole, &noted) == 0 && notes[0].damage[0] == 0 &&
                      strstr(notes[1].damage, "3 extraneous bytes"),
                  "damage that is passed over is noted: \"%s\", \"%s\"", notes[0].damage, notes[1].damage);
            image_free(&whole);
            image_free(&noted);
            free(strayed);
        }
        free(file.bytes);
    }
    unsigned char huge[57] = {0x89, 'P', 'N', 'G',  '\r', '\n', 0x1A, '\n', 0, 0, 0, 13, 'I', 'H', 'D',
                              'R',  0,   0,   0x40, 0,    0,    0,    0x40, 0, 8, 2, 0,  0,   0};  // 16384 x 16384
    check(test_decode_exact(huge, sizeof huge, &error) == -1, "a tiny PNG that promises 16384 x 16384 pixels");
    huge[16] = 0x7F;
    check(test_decode_exact(huge, sizeof huge, &error) == -1 && strstr(error.text, "limits"), "a PNG of 2 G columns");
    check(test_decode_exact((const unsigned char *)"", 0, &error) == -1 && strstr(error.text, "empty"),
          "an empty file");
    check(test_decode_exact((const unsigned char *)"GIF89a..", 8, &error) == -1 && strstr(error.text, "GIF"), "a GIF");
    image_free(&picture);
}

// ---------------------------------------------------------------------------------------------------------------------
// Resize, crop, flip

static uint64_t test_hash(const void *data, size_t size, uint64_t hash) {
    const unsigned char *bytes = (const unsigned char *)data;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 1099511628211ull;
    return hash;
}

static Image test_noise(int width, int height) {
    Image image = image_new(width, height);
    for (int64_t i = 0; i < 3 * (int64_t)width * height; i++)
        image.pixels[i] = (unsigned char)((i * i * 7 + i * 13) % 251);
    return image;
}

static void test_resize(void) {
    static const struct {
        int width, height, to_width, to_height;
        uint64_t hash;  // FNV-1a over the pixels that Pillow 13.0.0 gives
    } cases[8] = {
        {5, 4, 3, 7, 0xf395ea10f7b840eeull},     {37, 23, 64, 50, 0xcf1917c818096642ull},
        {64, 50, 37, 23, 0x870c40acf095596bull}, {300, 7, 11, 7, 0xd390620e6723cabbull},
        {7, 300, 7, 11, 0xf9cc0cc5cb61efe3ull},  {1, 1, 9, 9, 0x556d54a31ac1e925ull},
        {97, 61, 1, 1, 0xbff7b2198029378full},   {120, 90, 133, 41, 0x6f6a039b502c69bbull},
    };
    for (int i = 0; i < 8; i++) {
        Image image = test_noise(cases[i].width, cases[i].height);
        image_resize(&image, cases[i].to_width, cases[i].to_height);
        size_t size = 3 * (size_t)image.width * (size_t)image.height;
        check(test_hash(image.pixels, size, 0xcbf29ce484222325ull) == cases[i].hash,
              "resize from %d x %d to %d x %d as Pillow", cases[i].width, cases[i].height, cases[i].to_width,
              cases[i].to_height);
        image_free(&image);
    }
    for (uint32_t i = 0; i < 60; i++) {
        int size[8];
        for (uint32_t j = 0; j < 4; j++) size[j] = 1 + (int)random_below(3, RANDOM_TEST, 0, i, j, 0, 90);
        if (i % 5 == 0) size[2] = size[0];
        if (i % 7 == 0) size[3] = size[1];
        for (uint32_t j = 4; j < 6; j++) size[j] = (int)random_below(3, RANDOM_TEST, 0, i, j, 0, (uint32_t)size[j - 2]);
        for (uint32_t j = 6; j < 8; j++)
            size[j] = 1 + (int)random_below(3, RANDOM_TEST, 0, i, j, 0, (uint32_t)(size[j - 4] - size[j - 2]));
        Image whole = test_noise(size[0], size[1]), part = test_copy(&whole);
        image_resize(&whole, size[2], size[3]);
        image_crop(&whole, size[4], size[5], size[6], size[7]);
        image_resize_crop(&part, size[2], size[3], size[4], size[5], size[6], size[7]);
        check(test_same(&whole, &part), "resize then crop in one, %d x %d to %d x %d", size[0], size[1], size[2],
              size[3]);
        image_free(&whole);
        image_free(&part);
    }
    // Of 798937 weights so many are rounded up that their sum passes 1 by half a percent: Pillow cuts off at 255.
    Image line = image_new(798937, 1);
    memset(line.pixels, 255, 3 * (size_t)line.width);
    image_resize(&line, 1, 1);
    check(line.pixels[0] == 255 && line.pixels[1] == 255 && line.pixels[2] == 255, "a long white line stays white");
    image_free(&line);
    Image image = test_noise(5, 3), mirrored = test_copy(&image);
    image_flip(&mirrored);
    int good = 1;
    for (int i = 0; i < 15; i++)
        good = good && memcmp(mirrored.pixels + 3 * i, image.pixels + 3 * (i / 5 * 5 + 4 - i % 5), 3) == 0;
    check(good, "mirrored");
    image_flip(&mirrored);
    image_flip_vertical(&mirrored);
    for (int y = 0; y < 3; y++) good = good && memcmp(mirrored.pixels + 15 * y, image.pixels + 15 * (2 - y), 15) == 0;
    check(good, "mirrored back, then top and bottom");
    image_free(&image);
    image_free(&mirrored);

    static const int sizes[][6] = {
        // width, height, short side, maximum, and what DETR's Python gives
        {640, 480, 800, 1333, 1066, 800},  {480, 640, 800, 1333, 800, 1066},  {640, 427, 800, 1333, 1199, 800},
        {2000, 500, 800, 1333, 1332, 333}, {500, 2000, 800, 1333, 333, 1332}, {800, 1000, 800, 1333, 800, 1000},
        {427, 1111, 800, 1333, 512, 1332}, {100, 2000, 800, 1333, 67, 1340},  {5, 10, 5, 5, 2, 4},
        {640, 480, 400, 0, 533, 400},      {9000, 3, 800, 0, 2400000, 800},   {1, 5000, 800, 1333, 1, 1333}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        int width, height;
        resized_size(sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], &width, &height);
        check(width == sizes[i][4] && height == sizes[i][5], "DETR's size for %d x %d: %d x %d", sizes[i][0],
              sizes[i][1], width, height);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing and drawing

static void test_write_draw(const char *folder) {
    Error error;
    Image picture = test_picture(90, 70), back;
    char *png = format_string("%s/a.png", folder), *jpeg = format_string("%s/a.JPG", folder);
    check(image_write(png, &picture, &error) == 0 && image_read(png, &back, &error) == 0 && test_same(&picture, &back),
          "a PNG that was written is read as it was");
    image_free(&back);
    check(image_write(jpeg, &picture, &error) == 0 && image_read(jpeg, &back, &error) == 0 &&
              test_mean_difference(&picture, &back) < 2,
          "a JPEG that was written is read nearly as it was");
    image_free(&back);
    check(image_write("/nowhere/a.png", &picture, &error) == -1 && strstr(error.text, "/nowhere/a.png"),
          "a folder that is not there");
    check(image_write("a.gif", &picture, &error) == -1, "a GIF cannot be written");
    image_free(&picture);
    free(png);
    free(jpeg);

    const unsigned char red[3] = {255, 0, 0}, yellow[3] = {255, 255, 0}, black[3] = {0, 0, 0};
    Image canvas = image_new(40, 30);
    image_draw_box(&canvas, 4.6, 6.4, 20, 17, red, 2);
    int wrong = 0;
    for (int y = 0; y < 30; y++) {
        for (int x = 0; x < 40; x++) {
            int inside = x >= 5 && x < 20 && y >= 6 && y < 17, hollow = x >= 7 && x < 18 && y >= 8 && y < 15;
            wrong += memcmp(canvas.pixels + 3 * (y * 40 + x), inside && !hollow ? red : black, 3) != 0;
        }
    }
    check(wrong == 0, "a drawn box: %d wrong pixels", wrong);
    double places[6] = {NAN, -1e300, 1e300, -5, 39.9, 12};
    for (int i = 0; i < 36; i++) {  // a sanitizer sees what is drawn outside
        image_draw_box(&canvas, places[i % 6], places[i / 6], places[i / 6], places[i % 6], red, 1 + i);
        image_draw_label(&canvas, places[i % 6], places[i / 6], "caf\xC3\xA9 \xFF 0.99 and on and on", red, i % 5);
    }
    image_free(&canvas);
    canvas = image_new(120, 40);
    image_draw_label(&canvas, -7, 3, "\xC3\xA9I", yellow, 2);  // two characters
    int plate = 0, ink = 0;
    for (int y = 0; y < 24; y++) {
        for (int x = 0; x < 30; x++) {
            int is_plate = memcmp(canvas.pixels + 3 * (y * 120 + x), yellow, 3) == 0;
            plate += is_plate, ink += memcmp(canvas.pixels + 3 * (y * 120 + x), black, 3) == 0;
        }
    }
    check(
        plate + ink == 24 * 30 && ink == 4 * (11 + 20) && canvas.pixels[3 * (24 * 120)] == 0 && canvas.pixels[90] == 0,
        "a label of two characters at scale 2, moved into the picture: %d dots of ink", ink);
    image_free(&canvas);
    int distinct = 1;
    for (int i = 0; i < 90; i++) {
        for (int j = 0; j < i; j++) {
            unsigned char a[3], b[3];
            class_colour(i, a);
            class_colour(j, b);
            distinct = distinct && memcmp(a, b, 3) != 0;
        }
    }
    check(distinct, "90 classes have 90 colours");
}

// ---------------------------------------------------------------------------------------------------------------------
// The loader, on pictures that are dark but for one white rectangle: a box is right if it fits the rectangle.

enum { TEST_IMAGES = 7 };

typedef struct {
    Dataset set;
    DatasetImage images[TEST_IMAGES];
    Annotation annotations[5 * TEST_IMAGES];
} TestSet;

static void test_set_make(TestSet *test, const char *folder) {
    memset(test, 0, sizeof *test);
    test->set.images = test->images;
    test->set.num_images = TEST_IMAGES;
    test->set.annotations = test->annotations;
    test->set.num_annotations = 5 * TEST_IMAGES;
    for (int i = 0; i < TEST_IMAGES; i++) {
        int width = 90 + 20 * i, height = 170 - 21 * i, x = 20 + 3 * i, y = 12 + i, w = 40 + 2 * i, h = 20 + i;
        Image image = image_new(width, height);
        const unsigned char white[3] = {255, 255, 255};
        image_fill(&image, x, y, x + w, y + h, white);
        DatasetImage *entry = &test->images[i];
        entry->path = format_string("%s/%d.png", folder, i);
        entry->name = entry->path;
        entry->width = width;
        entry->height = height;
        entry->first_annotation = 5 * i;
        entry->num_annotations = 5;
        Error error;
        check(image_write(entry->path, &image, &error) == 0, "writes %s", entry->path);
        image_free(&image);
        for (int j = 0; j < 5; j++) {  // a crowd, a difficult, a skipped one, the rectangle, and one outside
            Annotation *box = &test->annotations[5 * i + j];
            box->class_index = 10 + j;
            box->x = j == 4 ? width : x, box->y = y, box->width = w, box->height = h;
            box->crowd = j == 0, box->ignore = j == 1, box->skipped = j == 2;
        }
    }
}

// How far, in pixels, the box is from the edges of the white rectangle in the sample's picture.
static double test_box_error(const Sample *sample) {
    const Image *image = &sample->image;
    int x0 = image->width, y0 = image->height, x1 = 0, y1 = 0;
    for (int y = 0; y < image->height; y++) {
        for (int x = 0; x < image->width; x++) {
            if (image->pixels[3 * (y * image->width + x)] < 128) continue;
            if (x < x0) x0 = x;
            if (y < y0) y0 = y;
            if (x + 1 > x1) x1 = x + 1;
            if (y + 1 > y1) y1 = y + 1;
        }
    }
    const double *box = sample->boxes;
    double worst = fabs((box[0] - box[2] / 2) * image->width - x0);
    worst = fmax(worst, fabs((box[0] + box[2] / 2) * image->width - x1));
    worst = fmax(worst, fabs((box[1] - box[3] / 2) * image->height - y0));
    return fmax(worst, fabs((box[1] + box[3] / 2) * image->height - y1));
}

static uint64_t test_sample_hash(const Sample *sample, uint64_t hash) {
    hash = test_hash(&sample->index, sizeof sample->index, hash);
    if (!sample->image.pixels) return hash;
    hash = test_hash(sample->image.pixels, 3 * (size_t)sample->image.width * (size_t)sample->image.height, hash);
    hash = test_hash(sample->boxes, 4 * (size_t)sample->num_boxes * sizeof(double), hash);
    return test_hash(sample->classes, (size_t)sample->num_boxes * sizeof(int), hash);
}

// A crop that loses the first of two boxes: the second keeps its class and is cut off at the right and lower edge.
static void test_crop_boxes(void) {
    double boxes[8] = {0, 0, 10, 10, 30, 20, 50, 60};
    int classes[2] = {3, 7};
    Sample sample;
    memset(&sample, 0, sizeof sample);
    sample.num_boxes = 2, sample.boxes = boxes, sample.classes = classes;
    sample_crop_boxes(&sample, 20, 10, 25, 30);
    check(sample.num_boxes == 1 && classes[0] == 7 && boxes[0] == 10 && boxes[1] == 10 && boxes[2] == 25 &&
              boxes[3] == 30,
          "a crop: %d boxes, the first of class %d at %g %g %g %g", sample.num_boxes, classes[0], boxes[0], boxes[1],
          boxes[2], boxes[3]);
}

static void test_samples(const TestSet *test, const LoaderSettings *settings) {
    LoaderSettings plain = *settings;
    plain.augment = AUGMENT_NOTHING;
    plain.short_side = 50, plain.originals = 1;
    Sample sample;
    Image read;
    Error error;
    sample_make(&sample, &test->set, &plain, 3, 2);  // 130 x 128; the box is 26 14 44 22
    check(sample.image.width == 50 && sample.image.height == 50 && sample.original_width == 130, "only resized");
    check(image_read(test->set.images[2].path, &read, &error) == 0 && sample.original.width == 130 &&
              memcmp(sample.original.pixels, read.pixels, (size_t)(3 * 130 * 128)) == 0,
          "beside it the picture as it was read");
    image_free(&read);
    check(sample.num_boxes == 1 && sample.classes[0] == 13, "no crowd, difficult, skipped or outside box is a target");
    check(fabs(sample.boxes[0] - 48 / 130.0) < 1e-15 && fabs(sample.boxes[1] - 25 / 128.0) < 1e-15 &&
              fabs(sample.boxes[2] - 44 / 130.0) < 1e-15 && fabs(sample.boxes[3] - 22 / 128.0) < 1e-15,
          "cx cy w h of an only resized picture");
    sample_free(&sample);

    int worst_height, worst_width, flipped = 0, without = 0, shapes = 0, previous = 0;
    double worst = 0;
    loader_worst_size(&test->set, settings, &worst_height, &worst_width);
    for (int epoch = 0; epoch < 40; epoch++) {
        for (int i = 0; i < TEST_IMAGES; i++) {
            sample_make(&sample, &test->set, settings, epoch, i);
            if (sample.num_boxes == 0)
                without++;
            else
                worst = fmax(worst, test_box_error(&sample));
            if (sample.num_boxes) flipped += sample.boxes[0] > 0.5;
            shapes += sample.image.width != previous;
            previous = sample.image.width;
            check((int64_t)sample.image.width * sample.image.height <= (int64_t)worst_width * worst_height,
                  "%d x %d is within the worst size", sample.image.width, sample.image.height);
            sample_free(&sample);
        }
    }
    // the resized edge of the rectangle is a ramp, half bright up to half an input pixel away from the box
    check(worst < 1.6, "boxes follow the pixels through flips, crops and scales: at most %g pixels off", worst);
    check(flipped > 60 && flipped < 200 && without < 40 && shapes > 200, "%d flipped, %d without a box, %d widths",
          flipped, without, shapes);
}

// Mirrored in both directions and along the diagonal, each half of the time by itself; every size in the range, the
// long side with the short.
static void test_jitter(const TestSet *test, const LoaderSettings *settings) {
    LoaderSettings jitter = *settings;
    jitter.augment = AUGMENT_JITTER, jitter.scales = 0.25, jitter.vflip = jitter.transpose = 1;
    Sample sample;
    int worst_height, worst_width, lies[8] = {0}, smallest = INT32_MAX, largest = 0;
    double worst = 0, longest = 0;
    loader_worst_size(&test->set, &jitter, &worst_height, &worst_width);
    for (int epoch = 0; epoch < 60; epoch++) {
        for (int i = 0; i < TEST_IMAGES; i++) {
            const int width = test->images[i].width, height = test->images[i].height;
            sample_make(&sample, &test->set, &jitter, epoch, i);
            const int out_width = sample.image.width, out_height = sample.image.height;
            const int side = out_width < out_height ? out_width : out_height;
            const Annotation *box = &test->annotations[5 * i + 3];
            const double x = (box->x + box->width / 2) / width, y = (box->y + box->height / 2) / height;
            const int turned = fabs(fabs(sample.boxes[0] - 0.5) - fabs(x - 0.5)) > 1e-12;
            const int right = fabs(sample.boxes[turned] - x) > 1e-12, lower = fabs(sample.boxes[!turned] - y) > 1e-12;
            lies[4 * turned + 2 * lower + right]++;
            const double shape = turned ? (double)height / width : (double)width / height;
            const double ratio = (double)out_width / out_height / shape;
            check(sample.num_boxes == 1 && fabs(ratio - 1) < 0.02, "no crop: 1 is %d, the shape's ratio %g",
                  sample.num_boxes, ratio);
            check((int64_t)out_width * out_height <= (int64_t)worst_width * worst_height,
                  "%d x %d is within the worst size", out_width, out_height);
            worst = fmax(worst, test_box_error(&sample));
            longest = fmax(longest, fmax(out_width, out_height));
            if (i == 2 && side < smallest) smallest = side;  // nearly square: no limit for its long side
            if (i == 2 && side > largest) largest = side;
            sample_free(&sample);
        }
    }
    check(worst < 1.6, "boxes follow the pixels through all flips and scales: at most %g pixels off", worst);
    for (int i = 0; i < 8; i++) check(abs(lies[i] - 52) < 25, "the way a picture lies, %d: %d of 420", i, lies[i]);
    check(smallest >= 120 && smallest < 125 && largest > 195 && largest <= 200, "short sides from %d to %d", smallest,
          largest);
    check(longest > 1.2 * settings->max_size, "the long side's limit grows too: %g", longest);
}

// Every side that the picture has on its way counts; one that a crop never makes does not.
static void test_longest_side(void) {
    for (int longest = 0; longest < 6; longest++) {
        int sides[6] = {1, 2, 3, 4, 5, 6};
        sides[longest] = 7;
        ImageChange change = {0, 0, 0, 2, {{99, 99, 9, 9, sides[2], sides[3]}, {99, 99, 9, 9, sides[4], sides[5]}}};
        for (int resizes = 2; resizes >= 0; resizes--) {
            const int expected = longest < 2 * resizes + 2 ? 7 : 2 * resizes + 2;
            change.num_resizes = resizes;
            check(change_longest_side(&change, sides[0], sides[1]) == expected, "the longest of %d sides is %d, at %d",
                  2 * resizes + 2, expected, longest);
        }
    }
}

// Deferred, and then done by the caller, is the same; what has a longer side on its way comes done.
static void test_deferred(const TestSet *test, const LoaderSettings *settings) {
    enum { SIDE = 200 };
    LoaderSettings now = *settings;
    now.vflip = now.transpose = 1;
    LoaderSettings later = now;
    later.defer_side = SIDE;
    int deferred = 0, done = 0, wrong = 0;
    for (int epoch = 0; epoch < 20; epoch++) {
        for (int i = 0; i < TEST_IMAGES; i++) {
            Sample a, b;
            sample_make(&a, &test->set, &now, epoch, i);
            sample_make(&b, &test->set, &later, epoch, i);
            const int longest = change_longest_side(&b.change, b.image.width, b.image.height);
            const int original = b.original_width > b.original_height ? b.original_width : b.original_height;
            const int is_deferred = b.change.num_resizes > 0;
            deferred += is_deferred, done += !is_deferred;
            wrong += a.change.num_resizes > 0 || a.width != a.image.width || a.height != a.image.height;
            wrong += is_deferred ? longest > SIDE || b.image.width != b.original_width
                                 : original <= SIDE && a.width <= SIDE && a.height <= SIDE;
            image_change(&b.image, &b.change);
            wrong += b.width != a.width || b.height != a.height || test_sample_hash(&a, 1) != test_sample_hash(&b, 1);
            sample_free(&a);
            sample_free(&b);
        }
    }
    check(wrong == 0 && deferred > 20 && done > 20, "deferred: %d are not the same; %d deferred, %d done", wrong,
          deferred, done);
}

// Without a limit for the long side the data set's pictures say how long it can be, and the most stretched crop.
static void test_unlimited(const TestSet *test) {
    static const int sizes[][2] = {{100, 90}, {90, 700}, {900, 80}, {0, 0}, {50, 5000}};
    static const Augment augments[3] = {AUGMENT_NOTHING, AUGMENT_CROP, AUGMENT_JITTER};
    for (int a = 0; a < 3; a++) {
        LoaderSettings settings = {5, 160, 0, augments[a], 1, 2, 0, 0, 0, 0, 0, 0, 0, 0};
        if (augments[a] == AUGMENT_JITTER) settings.scales = 0.25;
        DatasetImage images[5];
        Dataset set = test->set;
        memset(images, 0, sizeof images);
        for (int i = 0; i < 5; i++) images[i].width = sizes[i][0], images[i].height = sizes[i][1];
        set.images = images, set.num_images = 4;
        const int side = augments[a] == AUGMENT_JITTER ? 200 : 160, longest = (int)(side * 900.0 / 80);
        int height, width;
        loader_worst_size(&set, &settings, &height, &width);
        check(height == side && width == longest, "a long side without limit: %d x %d, not %d", height, width, longest);
        set.num_images = 1;
        loader_worst_size(&set, &settings, &height, &width);
        const int least = augments[a] == AUGMENT_CROP ? (160 * 120 + 76) / 77 : (int)(side * 100.0 / 90);
        check(width == least, "a long side of a picture, or its crop: %d, not %d", width, least);
        set.images = images + 4;
        loader_worst_size(&set, &settings, &height, &width);
        check(width == side * 100, "a tall picture's long side: %d", width);
    }
}

static void test_loader(const char *folder) {
    TestSet *test = (TestSet *)allocate(sizeof *test);
    test_set_make(test, folder);
    LoaderSettings settings = {5, 160, 260, AUGMENT_CROP, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0};
    test_crop_boxes();
    test_longest_side();
    test_samples(test, &settings);
    test_jitter(test, &settings);
    test_deferred(test, &settings);

    int order[100], seen[100] = {0}, first[100], moved = 0, twice = 0;
    epoch_order(first, 100, &settings, 0);
    epoch_order(order, 100, &settings, 1);
    for (int i = 0; i < 100; i++) moved += order[i] != first[i], twice += seen[order[i]]++;
    check(twice == 0 && moved > 90, "each epoch goes through all pictures once, in its own order");
    settings.shuffle = 0;
    epoch_order(order, 100, &settings, 1);
    check(order[0] == 0 && order[99] == 99, "without shuffling the order is the file's");
    settings.shuffle = 1;

    remove(test->images[4].path);  // from here on one picture is missing
    Sample sample;
    sample_make(&sample, &test->set, &settings, 0, 4);
    check(!sample.image.pixels && strstr(sample.error.text, test->images[4].path), "a missing picture is named");
    sample_free(&sample);

    uint64_t expected[11];  // 3 steps an epoch
    for (int step = 0; step < 11; step++) {
        expected[step] = 1;
        epoch_order(order, TEST_IMAGES, &settings, step / 3);
        for (int i = 0; i < 2; i++) {
            sample_make(&sample, &test->set, &settings, step / 3, order[step % 3 * 2 + i]);
            expected[step] = test_sample_hash(&sample, expected[step]);
            sample_free(&sample);
        }
    }
    for (int workers = 0; workers <= 4; workers++) {
        for (int prefetch = 0; prefetch <= 3; prefetch += 1 + workers % 2) {
            int begin = workers * 2 % 5, wrong = 0;
            settings.workers = workers;
            settings.prefetch = prefetch;
            settings.kept = prefetch / 2;
            Sample *before = NULL;
            Loader *loader = loader_start(&test->set, &settings, begin);
            for (int step = begin; step < 11; step++) {
                Sample *batch = loader_next_batch(loader);
                wrong += test_sample_hash(&batch[1], test_sample_hash(&batch[0], 1)) != expected[step];
                if (settings.kept && before)
                    wrong += test_sample_hash(&before[1], test_sample_hash(&before[0], 1)) != expected[step - 1];
                before = batch;
            }
            check(wrong == 0 && loader_wait_seconds(loader) > 0, "%d workers, %d batches ahead, from step %d", workers,
                  prefetch, begin);
            loader_stop(loader);
        }
    }

    static const int limits[][2] = {{800, 1333}, {160, 260}, {33, 40}, {1, 1}, {64, 32}, {20, 300}};
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        settings.short_side = limits[i][0];
        settings.max_size = limits[i][1];
        int height, width, most_height, most_width, beyond = 0;
        loader_worst_size(NULL, &settings, &most_height, &most_width);
        for (uint32_t j = 0; j < 20000; j++) {
            int small = 1 + (int)random_below(4, RANDOM_TEST, 0, j, 0, 0, 400);
            int large = small + (int)random_below(4, RANDOM_TEST, 0, j, 1, 0, j % 2 ? 3000 : 500);
            int scale = augment_length(augment_scales[j % 11], settings.short_side);
            resized_size(large, small, scale, settings.max_size, &width, &height);
            for (int stride = 1; stride <= 32; stride *= 2)
                beyond += (int64_t)((height + stride - 1) / stride) * ((width + stride - 1) / stride) >
                          (int64_t)((most_height + stride - 1) / stride) * ((most_width + stride - 1) / stride);
        }
        check(beyond == 0 && most_width <= 2 * settings.max_size + 32, "nothing passes the worst size %d x %d",
              most_height, most_width);
    }
    test_unlimited(test);
    for (int i = 0; i < TEST_IMAGES; i++) {
        remove(test->images[i].path);
        free(test->images[i].path);
    }
    free(test);
}

static void test_image(void) {
    char folder[] = "/tmp/test_image_XXXXXX";
    if (!mkdtemp(folder)) {
        check(0, "a temporary folder can be made under /tmp");
        return;
    }
    test_jpeg_kinds();
    test_exif_orientations(folder);
    test_png_kinds();
    test_damage();
    test_resize();
    test_write_draw(folder);
    test_loader(folder);
    static const char *const left[3] = {"exif.jpg", "a.png", "a.JPG"};
    for (int i = 0; i < 3; i++) {
        char *path = format_string("%s/%s", folder, left[i]);
        remove(path);
        free(path);
    }
    check(rmdir(folder) == 0, "the temporary folder is empty at the end");
}

#endif
