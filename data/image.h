/*
Pictures: JPEG and PNG files into 8-bit RGB and back, EXIF rotation, Pillow's resize, boxes and labels drawn on top.
Decoding is the work of libjpeg-turbo and libpng; what is here decides what becomes of the odd kinds (palette, CMYK,
16 bit, damaged, absurd). Resizing and drawing are done by hand. Nothing here knows of data sets or models.

Order to read in: Memory, EXIF, JPEG, PNG, Reading, Geometry (crop, flip, resize), Writing, Drawing.

Files are treated as hostile: every length is checked, no size in a header is believed that the file cannot hold, and
a damaged file gives an error, never a crash. Compiles as C11 and as C++17. Every function may run in many threads.
*/
#ifndef DETR_IMAGE_H
#define DETR_IMAGE_H

#include "common.h"
#include <strings.h>  // strcasecmp
#include <setjmp.h>   // the way back out of libjpeg and libpng on an error
#include <jpeglib.h>  // JPEG
#include <png.h>      // PNG

// ---------------------------------------------------------------------------------------------------------------------
// Memory

typedef struct {
    int width, height;
    unsigned char *pixels;  // (height, width, 3): red, green, blue, row after row, no gaps
} Image;

enum {
    IMAGE_MAX_PIXELS = 1 << 28,
    IMAGE_MAX_SIDE = 1000000,
    JPEG_MAX_SCANS = 500,
    JPEG_MAX_SCANNED = 1 << 30,  // pixels of a picture times its scans, from the 21st on
    JPEG_QUALITY = 92,
    IMAGE_HEADER_BYTES = 1 << 18,
    IMAGE_SPARE_BYTES = 64  // behind the last pixel, so that vectors can be read and written whole
};

// What a file says besides its pixels.
typedef struct {
    int orientation;               // from EXIF, 1 to 8; 1: upright
    char damage[JMSG_LENGTH_MAX];  // the first that a JPEG's decoder passed over, or ""
} ImageNotes;

// A picture whose pixels are not set, for who sets them all; image_free releases it.
static inline Image image_unset(int width, int height) {
    Image image;
    image.width = width;
    image.height = height;
    image.pixels = (unsigned char *)reallocate(NULL, (size_t)width * (size_t)height * 3 + IMAGE_SPARE_BYTES);
    return image;
}

// A black picture; image_free releases it.
static inline Image image_new(int width, int height) {
    Image image = image_unset(width, height);
    memset(image.pixels, 0, (size_t)width * (size_t)height * 3 + IMAGE_SPARE_BYTES);
    return image;
}

// Also fine for a picture that was never read (pixels NULL).
static inline void image_free(Image *image) {
    free(image->pixels);
    memset(image, 0, sizeof *image);
}

static inline void image_replace(Image *image, Image other) {
    free(image->pixels);
    *image = other;
}

// ---------------------------------------------------------------------------------------------------------------------
// EXIF: cameras store the picture as the sensor sees it and note in tag 0x0112 how to turn it for display.

static inline uint32_t exif_number(const unsigned char *bytes, int count, int big_endian) {
    uint32_t value = 0;
    for (int i = 0; i < count; i++) value = value << 8 | bytes[big_endian ? i : count - 1 - i];
    return value;
}

// The orientation, 1 to 8, in `size` bytes of EXIF data (a small TIFF file); 1, upright, when there is none.
static inline int exif_orientation(const unsigned char *bytes, size_t size) {
    if (size >= 6 && memcmp(bytes, "Exif\0\0", 6) == 0) bytes += 6, size -= 6;
    if (size < 14 || (memcmp(bytes, "MM\0*", 4) != 0 && memcmp(bytes, "II*\0", 4) != 0)) return 1;
    int big = bytes[0] == 'M';
    size_t at = exif_number(bytes + 4, 4, big);  // the first directory
    if (at > size - 2) return 1;
    uint32_t count = exif_number(bytes + at, 2, big);
    at += 2;
    for (uint32_t entry = 0; entry < count && size >= 12 && at <= size - 12; entry++, at += 12) {
        if (exif_number(bytes + at, 2, big) != 0x0112) continue;
        uint32_t type = exif_number(bytes + at + 2, 2, big);
        int length = type == 3 ? 2 : type == 4 ? 4 : 0;  // SHORT, LONG
        uint32_t value = length ? exif_number(bytes + at + 8, length, big) : 1;
        return value >= 1 && value <= 8 ? (int)value : 1;
    }
    return 1;
}

// Turns a picture upright, as Pillow's ImageOps.exif_transpose: 2 mirrored, 3 upside down, 4 flipped top to bottom,
// 5 transposed, 6 needs a quarter turn clockwise, 7 transposed along the other diagonal, 8 a quarter turn back.
static inline void image_orient(Image *image, int orientation) {
    if (orientation < 2 || orientation > 8) return;
    int swap = orientation >= 5;
    int from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    int from_bottom = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    ptrdiff_t width = image->width, height = image->height;
    ptrdiff_t step_column = from_right ? -3 : 3, step_row = (from_bottom ? -3 : 3) * width;
    const unsigned char *first =
        image->pixels + 3 * ((from_bottom ? height - 1 : 0) * width + (from_right ? width - 1 : 0));
    Image turned = swap ? image_unset(image->height, image->width) : image_unset(image->width, image->height);
    unsigned char *to = turned.pixels;
    for (ptrdiff_t y = 0; y < turned.height; y++) {
        const unsigned char *from = first + y * (swap ? step_column : step_row);
        for (ptrdiff_t x = 0; x < turned.width; x++, to += 3) {
            const unsigned char *pixel = from + x * (swap ? step_row : step_column);
            to[0] = pixel[0], to[1] = pixel[1], to[2] = pixel[2];
        }
    }
    image_replace(image, turned);
}

// Refuses sizes that no real picture has, before memory is asked for them. 0, or -1.
static inline int image_check_size(const char *name, uint64_t width, uint64_t height, Error *error) {
    const uint64_t side = IMAGE_MAX_SIDE;
    if (width >= 1 && height >= 1 && width <= side && height <= side && width * height <= IMAGE_MAX_PIXELS) return 0;
    return fail(error, "%s: the header says %llu x %llu pixels; the limits are 1 to %d a side and %d in all", name,
                (unsigned long long)width, (unsigned long long)height, (int)IMAGE_MAX_SIDE, (int)IMAGE_MAX_PIXELS);
}

// ---------------------------------------------------------------------------------------------------------------------
// JPEG. libjpeg reports an error by calling error_exit, which must not return: it jumps back to where decoding started.
// Its warnings (a stray byte between markers, say) are passed over as Pillow does. A file that ends too early is an
// error: the source below has all bytes there are, so being asked for more means that some are missing.

typedef struct {
    struct jpeg_error_mgr errors;  // first, so that libjpeg's pointer to it is a pointer to this
    jmp_buf jump;
    char message[JMSG_LENGTH_MAX];
    struct jpeg_decompress_struct decoder;
    struct jpeg_source_mgr source;
    struct jpeg_progress_mgr progress;
    Image image;  // as stored, before it is turned
    ImageNotes *notes;
    unsigned char *row;  // one row of CMYK
} JpegReader;

static inline void jpeg_on_error(j_common_ptr codec) {
    JpegReader *reader = (JpegReader *)codec->err;
    codec->err->format_message(codec, reader->message);
    longjmp(reader->jump, 1);
}

static inline void jpeg_on_message(j_common_ptr codec, int level) {
    JpegReader *reader = (JpegReader *)codec->err;
    if (level < 0 && codec->err->num_warnings++ == 0) codec->err->format_message(codec, reader->notes->damage);
}

// A progressive file of a few bytes can ask for thousands of passes over a huge picture. Real ones have about ten.
static inline void jpeg_on_progress(j_common_ptr codec) {
    JpegReader *reader = (JpegReader *)codec->err;
    if (!codec->is_decompressor) return;
    const int64_t scans = reader->decoder.input_scan_number,
                  pixels = reader->image.width * (int64_t)reader->image.height;
    if (scans <= 20 || (scans <= JPEG_MAX_SCANS && scans * pixels <= JPEG_MAX_SCANNED)) return;
    snprintf(reader->message, sizeof reader->message, "%lld scans are too many", (long long)scans);
    longjmp(reader->jump, 1);
}

static inline void jpeg_source_nothing(j_decompress_ptr decoder) { (void)decoder; }
static inline boolean jpeg_source_no_more(j_decompress_ptr decoder) { return (void)decoder, FALSE; }
static inline void jpeg_source_skip(j_decompress_ptr decoder, long count) {
    size_t left = decoder->src->bytes_in_buffer, skipped = count < 0 ? 0 : (size_t)count;
    if (skipped > left) skipped = left;
    decoder->src->next_input_byte += skipped;
    decoder->src->bytes_in_buffer -= skipped;
}

// One row of CMYK as it lies in the file (Adobe's way: 255 is no ink) to RGB, by Pillow's integer formula.
static inline void cmyk_to_rgb(const unsigned char *cmyk, unsigned char *rgb, int width) {
    for (int x = 0; x < width; x++, cmyk += 4, rgb += 3) {
        int white = cmyk[3];
        for (int c = 0; c < 3; c++) {
            int product = (255 - cmyk[c]) * white + 128;  // next line: product / 255, rounded
            int value = white - (((product >> 8) + product) >> 8);
            rgb[c] = (unsigned char)(value < 0 ? 0 : value);
        }
    }
}

static inline int jpeg_truncated(const char *name, size_t size, Error *error) {
    return fail(error, "%s: the JPEG is cut off after %zu bytes", name, size);
}

// The body of jpeg_decode: everything that libjpeg can jump out of. The caller cleans up. 0, or -1.
static inline int jpeg_decode_body(JpegReader *reader, const unsigned char *bytes, size_t size, const char *name,
                                   int header_only, Error *error) {
    struct jpeg_decompress_struct *decoder = &reader->decoder;
    if (setjmp(reader->jump)) return fail(error, "%s: damaged JPEG: %s", name, reader->message);
    jpeg_create_decompress(decoder);
    reader->source.next_input_byte = bytes;
    reader->source.bytes_in_buffer = size;
    reader->source.init_source = jpeg_source_nothing;
    reader->source.fill_input_buffer = jpeg_source_no_more;
    reader->source.skip_input_data = jpeg_source_skip;
    reader->source.resync_to_restart = jpeg_resync_to_restart;
    reader->source.term_source = jpeg_source_nothing;
    decoder->src = &reader->source;
    reader->progress.progress_monitor = jpeg_on_progress;
    decoder->progress = &reader->progress;
    jpeg_save_markers(decoder, JPEG_APP0 + 1, 0xFFFF);
    if (jpeg_read_header(decoder, TRUE) != JPEG_HEADER_OK) return jpeg_truncated(name, size, error);

    for (jpeg_saved_marker_ptr marker = decoder->marker_list; marker; marker = marker->next) {
        if (marker->data_length < 6 || memcmp(marker->data, "Exif\0\0", 6) != 0) continue;
        reader->notes->orientation = exif_orientation(marker->data, marker->data_length);
        break;
    }
    uint64_t width = decoder->image_width, height = decoder->image_height;
    reader->image.width = (int)width;
    reader->image.height = (int)height;
    if (image_check_size(name, width, height, error) != 0) return -1;
    if (header_only) return 0;
    // Huffman coding spends a bit at least on each block, and a block never covers more than 32 x 32 pixels. Arithmetic
    // coding may spend less, but only on pictures of one colour.
    if (width * height / (32 * 32) > 8 * (uint64_t)size)
        return fail(error, "%s: the JPEG header says %d x %d pixels, more than its %zu bytes can hold", name,
                    (int)width, (int)height, size);

    int components = decoder->num_components;
    if (components != 1 && components != 3 && components != 4)
        return fail(error, "%s: a JPEG with %d components; gray, RGB and CMYK can be read", name, components);
    decoder->out_color_space = components == 4 ? JCS_CMYK : JCS_RGB;
    if (!jpeg_start_decompress(decoder)) return jpeg_truncated(name, size, error);
    reader->image = image_unset((int)width, (int)height);
    if (components == 4) reader->row = (unsigned char *)allocate(4 * (size_t)width);
    while (decoder->output_scanline < decoder->output_height) {
        unsigned char *to = reader->image.pixels + 3 * (size_t)width * decoder->output_scanline;
        JSAMPROW row = reader->row ? reader->row : to;
        if (jpeg_read_scanlines(decoder, &row, 1) != 1) return jpeg_truncated(name, size, error);
        if (reader->row) cmyk_to_rgb(reader->row, to, (int)width);
    }
    jpeg_finish_decompress(decoder);  // all pixels are there: that the end marker is missing is no error, damage is
    return 0;
}

// Reads a JPEG. *image gets the pixels as stored (none with header_only, only the size), and *notes is set. 0, or -1.
static inline int jpeg_decode(const unsigned char *bytes, size_t size, const char *name, int header_only, Image *image,
                              ImageNotes *notes, Error *error) {
    JpegReader *reader = (JpegReader *)allocate(sizeof *reader);
    reader->decoder.err = jpeg_std_error(&reader->errors);
    reader->errors.error_exit = jpeg_on_error;
    reader->errors.emit_message = jpeg_on_message;
    reader->notes = notes;
    notes->orientation = 1;
    notes->damage[0] = 0;
    int status = jpeg_decode_body(reader, bytes, size, name, header_only, error);
    jpeg_destroy_decompress(&reader->decoder);
    free(reader->row);
    if (status != 0) image_free(&reader->image);
    *image = reader->image;
    free(reader);
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// PNG

static const unsigned char png_signature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};

typedef struct {
    const unsigned char *bytes;
    size_t size, at;
    char message[256];
    Image image;
    unsigned char **rows;
} PngReader;

static inline void png_on_error(png_structp codec, png_const_charp message) {
    PngReader *reader = (PngReader *)png_get_error_ptr(codec);
    snprintf(reader->message, sizeof reader->message, "%s", message);
    png_longjmp(codec, 1);
}

static inline void png_on_warning(png_structp codec, png_const_charp message) { (void)codec, (void)message; }

static inline void png_on_read(png_structp codec, png_bytep to, size_t count) {
    PngReader *reader = (PngReader *)png_get_io_ptr(codec);
    if (count > reader->size - reader->at) png_error(codec, "the file is cut off");
    memcpy(to, reader->bytes + reader->at, count);
    reader->at += count;
}

// Size from the header and orientation from the eXIf chunk, found by walking over the chunks; a file is only read where
// that is needed. 0, or -1.
static inline int png_scan(FILE *file, const char *name, Image *image, ImageNotes *notes, Error *error) {
    unsigned char head[8], header[13];
    notes->orientation = 1;
    notes->damage[0] = 0;
    if (fread(head, 1, 8, file) != 8 || memcmp(head, png_signature, 8) != 0 || fread(head, 1, 8, file) != 8 ||
        memcmp(head, "\0\0\0\15IHDR", 8) != 0 || fread(header, 1, 13, file) != 13)
        return fail(error, "%s: damaged PNG: no header", name);
    uint32_t width = exif_number(header, 4, 1), height = exif_number(header + 4, 4, 1);
    if (image_check_size(name, width, height, error) != 0) return -1;
    image->width = (int)width;
    image->height = (int)height;
    fseek(file, 4, SEEK_CUR);  // every chunk ends with a checksum
    while (fread(head, 1, 8, file) == 8 && memcmp(head + 4, "IEND", 4) != 0) {
        uint32_t length = exif_number(head, 4, 1);
        if (memcmp(head + 4, "eXIf", 4) == 0) {
            unsigned char exif[4096];  // more than the first directory of any camera takes
            size_t got = fread(exif, 1, length < sizeof exif ? length : sizeof exif, file);
            notes->orientation = exif_orientation(exif, got);
            break;
        }
        if (length > 0x7FFFFFFF || fseek(file, (long)length + 4, SEEK_CUR) != 0) break;
    }
    return 0;
}

// The body of png_decode: everything that libpng can jump out of. The caller cleans up. 0, or -1.
static inline int png_decode_body(PngReader *reader, png_structp decoder, png_infop info, const char *name,
                                  Error *error) {
    if (setjmp(png_jmpbuf(decoder))) return fail(error, "%s: damaged PNG: %s", name, reader->message);
    png_set_read_fn(decoder, reader, png_on_read);
    png_set_user_limits(decoder, IMAGE_MAX_SIDE, IMAGE_MAX_SIDE);
    // No optional chunk is needed, and libpng would take as much memory as the length of one says.
    png_set_keep_unknown_chunks(decoder, PNG_HANDLE_CHUNK_NEVER, NULL, -1);
    png_read_info(decoder, info);
    uint64_t width = png_get_image_width(decoder, info), height = png_get_image_height(decoder, info);
    if (image_check_size(name, width, height, error) != 0) return -1;
    if (height * png_get_rowbytes(decoder, info) > 1032 * (uint64_t)reader->size + 1024)  // deflate packs 1032 : 1
        return fail(error, "%s: the PNG header says %d x %d pixels, more than its %zu bytes can hold", name, (int)width,
                    (int)height, reader->size);
    // Everything becomes 8-bit RGB: 1 to 4 bits widened, of 16 bits the high byte, alpha and transparency dropped.
    int colour = png_get_color_type(decoder, info);
    if (colour == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(decoder);
    if (!(colour & PNG_COLOR_MASK_COLOR)) png_set_gray_to_rgb(decoder);  // widens 1 to 4 bits as well
    png_set_strip_16(decoder);
    png_set_strip_alpha(decoder);
    png_set_interlace_handling(decoder);
    png_read_update_info(decoder, info);
    if (png_get_rowbytes(decoder, info) != 3 * width) png_error(decoder, "unknown kind of pixels");
    reader->image = image_unset((int)width, (int)height);
    reader->rows = (unsigned char **)allocate(height * sizeof *reader->rows);
    for (uint64_t y = 0; y < height; y++) reader->rows[y] = reader->image.pixels + 3 * width * y;
    png_read_image(decoder, reader->rows);
    return 0;  // all pixels are there: whether an end chunk follows does not matter
}

// Reads a PNG. *image gets the pixels as stored, and *notes is set. 0, or -1.
static inline int png_decode(const unsigned char *bytes, size_t size, const char *name, Image *image, ImageNotes *notes,
                             Error *error) {
    FILE *file = fmemopen((void *)(uintptr_t)bytes, size, "rb");
    if (!file) return fail(error, "%s: out of memory", name);
    int status = png_scan(file, name, image, notes, error);
    fclose(file);
    if (status != 0) return -1;

    PngReader reader;
    memset(&reader, 0, sizeof reader);
    reader.bytes = bytes;
    reader.size = size;
    png_structp decoder = png_create_read_struct(PNG_LIBPNG_VER_STRING, &reader, png_on_error, png_on_warning);
    png_infop info = decoder ? png_create_info_struct(decoder) : NULL;
    status = info ? png_decode_body(&reader, decoder, info, name, error) : fail(error, "%s: out of memory", name);
    png_destroy_read_struct(&decoder, &info, NULL);
    free(reader.rows);
    if (status != 0) image_free(&reader.image);
    *image = reader.image;
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading

static inline int image_unknown(const unsigned char *bytes, size_t size, const char *name, Error *error) {
    static const struct {
        int at;
        const char *bytes, *name;
    } kinds[] = {{0, "GIF8", "a GIF"},  {0, "BM", "a BMP"},
                 {8, "WEBP", "a WebP"}, {0, "II*", "a TIFF"},
                 {0, "MM", "a TIFF"},   {4, "ftyp", "a HEIC or AVIF"},
                 {0, "<", "a text"},    {0, "version https", "a Git LFS"}};
    const char *kind = "another kind of";
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        size_t length = strlen(kinds[i].bytes), at = (size_t)kinds[i].at;
        if (size >= at + length && memcmp(bytes + at, kinds[i].bytes, length) == 0) kind = kinds[i].name;
    }
    if (size == 0) return fail(error, "%s: the file is empty", name);
    return fail(error, "%s: is %s file; convert it to JPEG or PNG", name, kind);
}

static inline int is_jpeg(const unsigned char *bytes, size_t size) {
    return size >= 3 && memcmp(bytes, "\xFF\xD8\xFF", 3) == 0;
}

static inline int is_png(const unsigned char *bytes, size_t size) {
    return size >= 8 && memcmp(bytes, png_signature, 8) == 0;
}

// Decodes `size` bytes of a JPEG or PNG file, whichever the first bytes say, as the picture is stored; *notes is set.
// `name` is for error messages. *image is new memory (image_free), or empty on -1: another kind
// of file, damage, an early end, a size that cannot be. The pixels are those that Pillow's Image.open().convert("RGB")
// gives, except that 16-bit gray keeps its high byte.
static inline int image_decode_stored(const unsigned char *bytes, size_t size, const char *name, Image *image,
                                      ImageNotes *notes, Error *error) {
    memset(notes, 0, sizeof *notes);
    memset(image, 0, sizeof *image);
    int status = is_jpeg(bytes, size)  ? jpeg_decode(bytes, size, name, 0, image, notes, error)
                 : is_png(bytes, size) ? png_decode(bytes, size, name, image, notes, error)
                                       : image_unknown(bytes, size, name, error);
    if (status != 0) memset(image, 0, sizeof *image);
    return status;
}

// The same, turned as EXIF says.
static inline int image_decode(const unsigned char *bytes, size_t size, const char *name, Image *image, Error *error) {
    ImageNotes notes;
    int status = image_decode_stored(bytes, size, name, image, &notes, error);
    if (status == 0) image_orient(image, notes.orientation);
    return status;
}

// The same for a file.
static inline int image_read(const char *path, Image *image, Error *error) {
    char *bytes = NULL;
    size_t size = 0;
    memset(image, 0, sizeof *image);
    if (read_file(path, &bytes, &size, error) != 0) return -1;
    int status = image_decode((const unsigned char *)bytes, size, path, image, error);
    free(bytes);
    return status;
}

// Width and height of the picture as image_read gives it, from the file's header alone. 0, or -1.
static inline int image_read_size(const char *path, int *width, int *height, Error *error) {
    FILE *file = open_file(path, error);
    if (!file) return -1;
    char *bytes = (char *)allocate(IMAGE_HEADER_BYTES);
    size_t size = fread(bytes, 1, IMAGE_HEADER_BYTES, file);
    Image image = {0, 0, NULL};
    ImageNotes notes = {1, ""};
    int status = -1;
    if (is_png((unsigned char *)bytes, size)) {
        rewind(file);
        status = png_scan(file, path, &image, &notes, error);
    } else if (!is_jpeg((unsigned char *)bytes, size)) {
        status = image_unknown((unsigned char *)bytes, size, path, error);
    } else {
        status = jpeg_decode((unsigned char *)bytes, size, path, 1, &image, &notes, error);
        if (status != 0 && size == IMAGE_HEADER_BYTES) {  // a long preview or colour profile stands before the size
            free(bytes);
            bytes = NULL;
            status = read_file(path, &bytes, &size, error);
            if (status == 0) status = jpeg_decode((unsigned char *)bytes, size, path, 1, &image, &notes, error);
        }
    }
    free(bytes);
    fclose(file);
    *width = notes.orientation >= 5 ? image.height : image.width;
    *height = notes.orientation >= 5 ? image.width : image.height;
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Geometry

// Keeps the rectangle whose top left pixel is (x, y), which must lie inside the picture. In place.
static inline void image_crop(Image *image, int x, int y, int width, int height) {
    for (int row = 0; row < height; row++)
        memmove(image->pixels + 3 * (size_t)row * (size_t)width,
                image->pixels + 3 * ((size_t)(y + row) * (size_t)image->width + (size_t)x), 3 * (size_t)width);
    image->width = width;
    image->height = height;
}

// Mirrors left and right. In place. Pixels move as 4 bytes, of which the fourth lands where the next one comes.
static inline void image_flip(Image *image) {
    size_t last = (size_t)image->width - 1, row_bytes = 3 * (size_t)image->width;
    unsigned char *copy = (unsigned char *)reallocate(NULL, row_bytes + 1);
    for (int y = 0; y < image->height; y++) {
        unsigned char *row = image->pixels + (size_t)y * row_bytes;
        memcpy(copy, row, row_bytes);
        for (size_t x = 0; x < last; x++) memcpy(row + 3 * x, copy + 3 * (last - x), 4);
        memcpy(row + 3 * last, copy, 3);
    }
    free(copy);
}

// Mirrors top and bottom. In place.
static inline void image_flip_vertical(Image *image) {
    size_t row_bytes = 3 * (size_t)image->width;
    unsigned char *copy = (unsigned char *)reallocate(NULL, row_bytes);
    for (int y = 0; y < image->height / 2; y++) {
        unsigned char *upper = image->pixels + (size_t)y * row_bytes,
                      *lower = image->pixels + (size_t)(image->height - 1 - y) * row_bytes;
        memcpy(copy, upper, row_bytes);
        memcpy(upper, lower, row_bytes);
        memcpy(lower, copy, row_bytes);
    }
    free(copy);
}

// The size DETR resizes a width x height picture to (datasets/transforms.py, get_size_with_aspect_ratio): the short
// side becomes short_side, unless the long side would then pass max_size (0: no limit); its rounding can pass max_size
// by a little, and does so here as well. Both results are at least 1.
static inline void resized_size(int width, int height, int short_side, int max_size, int *out_width, int *out_height) {
    int small = width < height ? width : height, large = width < height ? height : width;
    int size = short_side;
    int64_t other;
    if (max_size > 0 && (double)large / (double)small * size > max_size)
        size = (int)rint((double)max_size * small / large);  // half to even, as Python rounds
    if (size < 1) {
        size = 1;  // so long and thin that DETR's own rule gives zero
        other = max_size;
    } else {
        other = small == size ? large : (int64_t)size * large / small;
    }
    if (other > INT32_MAX) other = INT32_MAX;
    *out_width = width < height ? size : (int)other;
    *out_height = width < height ? (int)other : size;
}

// Pillow's resize (src/libImaging/Resample.c) is separable: each output pixel is a weighted mean of `counts` input
// pixels from `starts` on. Its bilinear weights are a triangle whose half width is max(1, scale), so that shrinking
// averages over all pixels; they are rounded to 22 bits after the point, and each pass rounds to 8 bits.
enum { RESIZE_BITS = 22, RESIZE_PART_BITS = 7 };

// A weight cut into its bits from 14 on, 7 to 13 and 0 to 6: products with a byte fit in 16 bits, which is how wide the
// sums are. Each part is there twice, in both halves of 32 bits, for processors spread those over a vector more easily.
typedef struct {
    uint32_t high, middle, low;
} ResizeWeight;

typedef struct {
    int *starts, *counts;   // per output place
    ResizeWeight *weights;  // (outputs, taps)
    int taps;
} ResizeTable;

static inline ResizeWeight resize_weight(uint32_t weight) {
    const uint32_t twice = 0x10001, part = (1 << RESIZE_PART_BITS) - 1;
    ResizeWeight parts = {(weight >> 2 * RESIZE_PART_BITS) * twice, (weight >> RESIZE_PART_BITS & part) * twice,
                          (weight & part) * twice};
    return parts;
}

// The weight that resize_weight() has cut.
static inline uint32_t resize_whole_weight(ResizeWeight parts) {
    return (parts.high & 0xFFFF) << 2 * RESIZE_PART_BITS | (parts.middle & 0xFFFF) << RESIZE_PART_BITS |
           (parts.low & 0xFFFF);
}

// The table for output places first .. first + outputs - 1 of `out_size` in all.
static inline ResizeTable resize_table(int in_size, int out_size, int first, int outputs) {
    double scale = (double)in_size / out_size, support = scale < 1 ? 1 : scale, inverse = 1 / support;
    ResizeTable table;
    table.taps = (int)ceil(support) * 2 + 1;
    table.starts = (int *)allocate((size_t)outputs * sizeof(int));
    table.counts = (int *)allocate((size_t)outputs * sizeof(int));
    table.weights = (ResizeWeight *)allocate((size_t)outputs * (size_t)table.taps * sizeof(ResizeWeight));
    double *exact = (double *)allocate((size_t)table.taps * sizeof(double));
    for (int i = 0; i < outputs; i++) {
        double center = (first + i + 0.5) * scale, total = 0;
        int start = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
        if (start < 0) start = 0;
        if (end > in_size) end = in_size;
        for (int t = 0; t < end - start; t++) {
            // volatile: were the product fused with the subtraction below, the last bit would differ from Pillow's
            volatile double distance = (t + start - center + 0.5) * inverse;
            double weight = 1 - fabs(distance);
            exact[t] = weight > 0 ? weight : 0;
            total += exact[t];
        }
        table.starts[i] = start;
        table.counts[i] = end - start;
        for (int t = 0; t < end - start; t++) {
            double weight = total != 0 ? exact[t] / total : exact[t];
            table.weights[(size_t)i * (size_t)table.taps + (size_t)t] =
                resize_weight((uint32_t)(0.5 + weight * (1 << RESIZE_BITS)));
        }
    }
    free(exact);
    return table;
}

static inline void resize_table_free(ResizeTable *table) {
    free(table->starts);
    free(table->counts);
    free(table->weights);
}

// Both passes sum a vector of bytes at a time, those in even and those in odd places apart. A vector is as long as the
// processor's: compilers take longer ones to pieces at a price.
#if defined __AVX512BW__
enum { RESIZE_BYTES = 64 };
#elif defined __AVX2__
enum { RESIZE_BYTES = 32 };
#else
enum { RESIZE_BYTES = 16 };
#endif
typedef unsigned short ResizeSums __attribute__((vector_size(RESIZE_BYTES)));
typedef unsigned int ResizeWords __attribute__((vector_size(RESIZE_BYTES)));

typedef struct {
    ResizeSums high, middle, low;
} ResizeParts;

static inline void resize_add(ResizeParts *sums, const ResizeSums *pixels, const ResizeWeight *weight) {
    const ResizeWords zero = {0};
    sums->high += *pixels * (ResizeSums)(zero + weight->high);
    sums->middle += *pixels * (ResizeSums)(zero + weight->middle);
    sums->low += *pixels * (ResizeSums)(zero + weight->low);
}

// After each two products the two lower sums pass on what is above their 7 bits: 127 + 2 * 255 * 127, and what comes
// from below, is less than 2^16. So is the highest sum, 255.5 * 2^8, unless ten thousands of weights were rounded up:
// then it stays at the top.
static inline void resize_carry(ResizeParts *sums) {
    const unsigned short bits = RESIZE_PART_BITS, part = (1 << RESIZE_PART_BITS) - 1;
    sums->middle += sums->low >> bits;
    sums->low &= part;
    ResizeSums carry = sums->middle >> bits;
    sums->middle &= part;
    sums->high += carry;
    sums->high |= (ResizeSums)(sums->high < carry);
}

// RESIZE_BYTES weighted means of `count` bytes that lie `step` apart, rounded.
static inline void resize_sum(unsigned char *to, const unsigned char *from, size_t step, int count,
                              const ResizeWeight *weights) {
    const unsigned short byte = 255, above = RESIZE_BITS - 2 * RESIZE_PART_BITS, half = 1 << (above - 1);
    ResizeParts even, odd;
    memset(&even, 0, sizeof even);
    even.high += half;
    odd = even;
    for (int t = 0; t < count; t++, from += step) {
        ResizeSums both, pixels;
        memcpy(&both, from, sizeof both);
        pixels = both & byte;
        resize_add(&even, &pixels, weights + t);
        pixels = both >> 8;
        resize_add(&odd, &pixels, weights + t);
        if (t % 2) resize_carry(&even), resize_carry(&odd);
    }
    if (count % 2) resize_carry(&even), resize_carry(&odd);
    even.high = even.high >> above | odd.high >> above << 8;
    memcpy(to, &even.high, sizeof even.high);
}

// Rows `first_row` .. `first_row + rows - 1` of `from`, resized along x to `width` places: (rows, width, 3). Several
// rows go together: a vector holds one pixel of each, as red, green, blue and a fourth number that nobody uses.
static inline Image resize_along_x(const Image *from, const ResizeTable *table, int width, int first_row, int rows) {
    enum { ROWS = RESIZE_BYTES / 4 };
    Image to = image_unset(width, rows);
    int begin = table->starts[0], end = table->starts[width - 1] + table->counts[width - 1];
    void *memory = reallocate(NULL, (size_t)(end - begin + 1) * RESIZE_BYTES);
    unsigned char *columns = (unsigned char *)(((uintptr_t)memory + RESIZE_BYTES - 1) & ~(RESIZE_BYTES - 1));
    for (int y = 0; y < rows; y += ROWS) {
        const unsigned char *in[ROWS];
        unsigned char *out[ROWS];
        for (int r = 0; r < ROWS; r++) {
            size_t row = (size_t)(y + r < rows ? y + r : rows - 1);  // the last row again, where there are fewer
            in[r] = from->pixels + 3 * (((size_t)first_row + row) * (size_t)from->width + (size_t)begin);
            out[r] = to.pixels + 3 * row * (size_t)width;
        }
        for (size_t x = 0; x < (size_t)(end - begin); x++)
            for (int r = 0; r < ROWS; r++) memcpy(columns + RESIZE_BYTES * x + 4 * r, in[r] + 3 * x, 4);
        for (int x = 0; x < width; x++) {
            unsigned char pixels[RESIZE_BYTES];
            resize_sum(pixels, columns + (size_t)(table->starts[x] - begin) * RESIZE_BYTES, RESIZE_BYTES,
                       table->counts[x], table->weights + (size_t)x * (size_t)table->taps);
            if (x + 1 < width)
                for (int r = 0; r < ROWS; r++) memcpy(out[r] + 3 * (size_t)x, pixels + 4 * r, 4);
            else
                for (int r = 0; r < ROWS; r++) memcpy(out[r] + 3 * (size_t)x, pixels + 4 * r, 3);
        }
    }
    free(memory);
    return to;
}

// Columns `first_column` .. of `from`, resized along y: (height, width, 3); row 0 of `from` is row `first_row` of the
// picture that the table was made for. The last vector of a row reaches into the next row, which is written after it,
// or into the picture's spare bytes.
static inline Image resize_along_y(const Image *from, const ResizeTable *table, int first_column, int width, int height,
                                   int first_row) {
    Image to = image_unset(width, height);
    size_t row_bytes = 3 * (size_t)width, stride = 3 * (size_t)from->width;
    for (int y = 0; y < height; y++) {
        const unsigned char *rows =
            from->pixels + (size_t)(table->starts[y] - first_row) * stride + 3 * (size_t)first_column;
        for (size_t at = 0; at < row_bytes; at += RESIZE_BYTES)
            resize_sum(to.pixels + (size_t)y * row_bytes + at, rows + at, stride, table->counts[y],
                       table->weights + (size_t)y * (size_t)table->taps);
    }
    return to;
}

// Each pass rounds, so the order shows in the last bit. Pillow 13 takes y first where the height loses more than twice
// as many pixels as the width does; up to Pillow 12 it always took x first.
static inline int resize_y_first(int width, int height, int to_width, int to_height) {
    return to_width != width && to_height < height && height - to_height > 2 * (width - to_width);
}

// image_resize to full_width x full_height followed by image_crop to (x, y, width, height), bit for bit, without
// computing what the crop throws away. In place.
static inline void image_resize_crop(Image *image, int full_width, int full_height, int x, int y, int width,
                                     int height) {
    int along_x = full_width != image->width, along_y = full_height != image->height;
    ResizeTable columns, rows = {NULL, NULL, NULL, 0};
    int first_row = y, num_rows = height;  // of the picture, that the result depends on
    if (along_y) {
        rows = resize_table(image->height, full_height, y, height);
        first_row = rows.starts[0];
        num_rows = rows.starts[height - 1] + rows.counts[height - 1] - first_row;
    }
    const int y_first = resize_y_first(image->width, image->height, full_width, full_height);
    if (y_first) {
        image_replace(image, resize_along_y(image, &rows, 0, image->width, height, 0));
        first_row = 0;
        num_rows = height;
    }
    if (along_x) {
        columns = resize_table(image->width, full_width, x, width);
        image_replace(image, resize_along_x(image, &columns, width, first_row, num_rows));
        resize_table_free(&columns);
    }
    if (along_y && !y_first)
        image_replace(image, resize_along_y(image, &rows, along_x ? 0 : x, width, height, along_x ? first_row : 0));
    if (along_y) resize_table_free(&rows);
    if (!along_x && !along_y) image_crop(image, x, y, width, height);
}

// Pillow's Image.resize((width, height), BILINEAR), bit for bit, as of Pillow 13.0.0. In place.
static inline void image_resize(Image *image, int width, int height) {
    image_resize_crop(image, width, height, 0, 0, width, height);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

typedef struct {
    struct jpeg_error_mgr errors;
    jmp_buf jump;
    char message[JMSG_LENGTH_MAX];
    struct jpeg_compress_struct encoder;
} JpegWriter;

static inline void jpeg_on_write_error(j_common_ptr codec) {
    JpegWriter *writer = (JpegWriter *)codec->err;
    codec->err->format_message(codec, writer->message);
    longjmp(writer->jump, 1);
}

static inline int jpeg_write_body(JpegWriter *writer, FILE *file, const char *path, const Image *image, Error *error) {
    struct jpeg_compress_struct *encoder = &writer->encoder;
    if (setjmp(writer->jump)) return fail(error, "%s: cannot be written: %s", path, writer->message);
    jpeg_create_compress(encoder);
    jpeg_stdio_dest(encoder, file);
    encoder->image_width = (JDIMENSION)image->width;
    encoder->image_height = (JDIMENSION)image->height;
    encoder->input_components = 3;
    encoder->in_color_space = JCS_RGB;
    jpeg_set_defaults(encoder);
    jpeg_set_quality(encoder, JPEG_QUALITY, TRUE);
    encoder->comp_info[0].h_samp_factor = encoder->comp_info[0].v_samp_factor = 1;  // thin lines keep their colour
    jpeg_start_compress(encoder, TRUE);
    while (encoder->next_scanline < encoder->image_height) {
        JSAMPROW row = image->pixels + 3 * (size_t)image->width * encoder->next_scanline;
        jpeg_write_scanlines(encoder, &row, 1);
    }
    jpeg_finish_compress(encoder);
    return 0;
}

// Writes a JPEG (quality 92) into an open file, which `path` names in errors. 0, or -1.
static inline int jpeg_write_file(FILE *file, const char *path, const Image *image, Error *error) {
    JpegWriter *writer = (JpegWriter *)allocate(sizeof *writer);
    writer->encoder.err = jpeg_std_error(&writer->errors);
    writer->errors.error_exit = jpeg_on_write_error;
    int status = jpeg_write_body(writer, file, path, image, error);
    jpeg_destroy_compress(&writer->encoder);
    free(writer);
    return status;
}

static inline int png_write_file(FILE *file, const char *path, const Image *image, Error *error) {
    png_image writer;
    memset(&writer, 0, sizeof writer);
    writer.version = PNG_IMAGE_VERSION;
    writer.width = (png_uint_32)image->width;
    writer.height = (png_uint_32)image->height;
    writer.format = PNG_FORMAT_RGB;
    if (png_image_write_to_stdio(&writer, file, 0, image->pixels, 0, NULL)) return 0;
    return fail(error, "%s: cannot be written: %s", path, writer.message);
}

// Writes a picture as the end of the path says: .png, or .jpg and .jpeg (quality 92). 0, or -1; what a failed attempt
// has left half-written is removed.
static inline int image_write(const char *path, const Image *image, Error *error) {
    const char *dot = strrchr(path, '.');
    int jpeg = dot && (strcasecmp(dot, ".jpg") == 0 || strcasecmp(dot, ".jpeg") == 0);
    if (!jpeg && !(dot && strcasecmp(dot, ".png") == 0))
        return fail(error, "%s: a picture's name must end in .jpg or .png", path);
    FILE *file = fopen(path, "wb");
    if (!file) return fail(error, "%s: cannot be written: %s", path, strerror(errno));
    int status = jpeg ? jpeg_write_file(file, path, image, error) : png_write_file(file, path, image, error);
    int failed = ferror(file), closed = fclose(file);
    if (status == 0 && (failed || closed != 0))
        status = fail(error, "%s: cannot be written: %s", path, strerror(errno));
    if (status != 0) remove(path);
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing

// A colour for each class: hues a golden section apart stay distinct however many classes there are.
static inline void class_colour(int class_index, unsigned char rgb[3]) {
    double hue = fmod(0.05 + 0.61803398874989485 * class_index, 1.0) * 6;
    double value = class_index % 3 == 2 ? 205 : 255, saturation = class_index % 2 ? 0.65 : 0.9;
    for (int c = 0; c < 3; c++) {
        double ramp = fabs(fmod(hue + (c == 0 ? 0 : c == 1 ? 4 : 2), 6.0) - 3) - 1;
        ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
        rgb[c] = (unsigned char)lrint(value * (1 - saturation * (1 - ramp)));
    }
}

// The nearest whole number from low to high; low for NaN.
static inline int clamp_round(double value, int low, int high) {
    return !(value > low) ? low : value >= high ? high : (int)lrint(value);
}

// Fills the pixels x0 <= x < x1, y0 <= y < y1 as far as they lie in the picture.
static inline void image_fill(Image *image, int x0, int y0, int x1, int y1, const unsigned char rgb[3]) {
    if (x0 < 0) x0 = 0;
    if (y0 < 0) y0 = 0;
    if (x1 > image->width) x1 = image->width;
    if (y1 > image->height) y1 = image->height;
    for (int y = y0; y < y1; y++) {
        unsigned char *pixel = image->pixels + 3 * ((size_t)y * (size_t)image->width + (size_t)x0);
        for (int x = x0; x < x1; x++, pixel += 3) pixel[0] = rgb[0], pixel[1] = rgb[1], pixel[2] = rgb[2];
    }
}

// The outline of a box in pixels, `thickness` pixels wide, inwards. What lies outside the picture is moved to its edge.
static inline void image_draw_box(Image *image, double x0, double y0, double x1, double y1, const unsigned char rgb[3],
                                  int thickness) {
    int left = clamp_round(x0, 0, image->width - 1), top = clamp_round(y0, 0, image->height - 1);
    int right = clamp_round(x1, left + 1, image->width), bottom = clamp_round(y1, top + 1, image->height);
    int across = thickness < right - left ? thickness : right - left;
    int down = thickness < bottom - top ? thickness : bottom - top;
    image_fill(image, left, top, right, top + down, rgb);
    image_fill(image, left, bottom - down, right, bottom, rgb);
    image_fill(image, left, top, left + across, bottom, rgb);
    image_fill(image, right - across, top, right, bottom, rgb);
}

// Glyphs of 5 x 9 dots (7 above the base line, 2 below), for ASCII 32 to 126 and, last, a box for everything else.
// Row after row from the top left; bit 44 is the first dot.
enum { FONT_WIDTH = 5, FONT_HEIGHT = 9, FONT_ADVANCE = 6 };
static const uint64_t font_glyphs[96] = {
    0x000000000000ull, 0x042108401000ull, 0x0a5280000000ull, 0x0a57d5f52800ull, 0x047d1c5f1000ull, 0x19c88889cc00ull,
    0x0c9511593400ull, 0x042100000000ull, 0x022210820800ull, 0x082084222000ull, 0x00abbeea8000ull, 0x00213e420000ull,
    0x000000031888ull, 0x00003e000000ull, 0x000000063000ull, 0x011088844000ull, 0x0e8ceb98b800ull, 0x046508427c00ull,
    0x0e884c887c00ull, 0x0e884c18b800ull, 0x0232a5f10800ull, 0x1f878218b800ull, 0x06443d18b800ull, 0x1f0884421000ull,
    0x0e8c5d18b800ull, 0x0e8c5e113000ull, 0x000318063000ull, 0x00018c031888ull, 0x022220820800ull, 0x0007c1f00000ull,
    0x082082222000ull, 0x0e884c401000ull, 0x0e8deb783c00ull, 0x0e8c7f18c400ull, 0x1e8c7d18f800ull, 0x0e8c2108b800ull,
    0x1e8c6318f800ull, 0x1f843d087c00ull, 0x1f843d084000ull, 0x0e8c2f18bc00ull, 0x118c7f18c400ull, 0x0e2108423800ull,
    0x071084293000ull, 0x119531494400ull, 0x108421087c00ull, 0x11dd6b18c400ull, 0x11ce6b39c400ull, 0x0e8c6318b800ull,
    0x1e8c7d084000ull, 0x0e8c6359bc00ull, 0x1e8c7d494400ull, 0x0f841c10f800ull, 0x1f2108421000ull, 0x118c6318b800ull,
    0x118c62a51000ull, 0x118c6b5dc400ull, 0x118a88a8c400ull, 0x118a88421000ull, 0x1f0888887c00ull, 0x0e4210843800ull,
    0x104208210400ull, 0x0e1084213800ull, 0x045440000000ull, 0x0000000003e0ull, 0x082000000000ull, 0x000382f8bc00ull,
    0x1087a318f800ull, 0x0003e1083c00ull, 0x010be318bc00ull, 0x0003a3f83800ull, 0x064790842000ull, 0x0003e318bc2eull,
    0x1087a318c400ull, 0x040308423800ull, 0x020184210a4cull, 0x1084a98a4800ull, 0x0c2108423800ull, 0x0006ab5ad400ull,
    0x0007a318c400ull, 0x0003a318b800ull, 0x0007a318fa10ull, 0x0003e318bc21ull, 0x0005b1084000ull, 0x0003e0e0f800ull,
    0x084790841800ull, 0x00046318bc00ull, 0x000462a51000ull, 0x0004635aa800ull, 0x000454454400ull, 0x00046318bc2eull,
    0x0007c4447c00ull, 0x032110420c00ull, 0x042108421000ull, 0x182104426000ull, 0x000011510000ull, 0x1f8c6318fc00ull,
};

// A scale at which labels are readable when the whole picture is looked at: letters of about a sixtieth of its long
// side.
static inline int image_label_scale(const Image *image) {
    int longer = image->width > image->height ? image->width : image->height;
    return longer < 640 ? 1 : (longer + 160) / 400;
}

// Text (UTF-8) on a plate of the given colour, black or white by how bright that is. The plate's lower left corner is
// at (x, y), in pixels; it is moved so that it lies in the picture, and drawn smaller where it would be wider.
static inline void image_draw_label(Image *image, double x, double y, const char *text, const unsigned char rgb[3],
                                    int scale) {
    int length = 0;
    for (const char *c = text; *c; c++) length += (*c & 0xC0) != 0x80;  // the bytes that begin a character
    if (length > 4096) length = 4096;
    while (scale > 1 && (FONT_ADVANCE * length + 3) * scale > image->width) scale--;
    if (scale < 1) scale = 1;
    int width = (FONT_ADVANCE * length + 3) * scale, height = (FONT_HEIGHT + 3) * scale;
    int left = width < image->width ? clamp_round(x, 0, image->width - width) : 0;
    int top = height < image->height ? clamp_round(y - height, 0, image->height - height) : 0;
    image_fill(image, left, top, left + width, top + height, rgb);

    int bright = 299 * rgb[0] + 587 * rgb[1] + 114 * rgb[2] > 128000;
    unsigned char ink[3];
    memset(ink, bright ? 0 : 255, 3);
    int cursor = left + 2 * scale;
    for (const char *c = text; *c && length > 0; c++) {
        if ((*c & 0xC0) == 0x80) continue;
        uint64_t glyph = font_glyphs[*c >= 32 && *c < 127 ? *c - 32 : 95];
        for (int dot = 0; dot < FONT_WIDTH * FONT_HEIGHT; dot++) {
            if (!(glyph >> (FONT_WIDTH * FONT_HEIGHT - 1 - dot) & 1)) continue;
            int dot_x = cursor + dot % FONT_WIDTH * scale, dot_y = top + (2 + dot / FONT_WIDTH) * scale;
            image_fill(image, dot_x, dot_y, dot_x + scale, dot_y + scale, ink);
        }
        cursor += FONT_ADVANCE * scale;
        length--;
    }
}

#endif
