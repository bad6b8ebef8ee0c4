/*
Pictures that a user names: which files those are, and where drawn copies of them go.

Compiles as C11 and as C++17.
*/
#ifndef DETR_PICTURE_FILES_H
#define DETR_PICTURE_FILES_H

#include "dataset.h"

typedef struct {
    char **paths;
    int count;
} PictureFiles;

static inline void picture_files_free(PictureFiles *files) { free_names(files->paths, files->count); }

// Takes over `path`.
static inline void picture_files_add(PictureFiles *files, char *path) {
    files->paths = (char **)grow(files->paths, (size_t)files->count, sizeof(char *));
    files->paths[files->count++] = path;
}

// Adds a file as it is, or what a folder holds in byte order; there, what is no picture by its name is listed on
// stderr.
static inline void picture_files_find(PictureFiles *files, const char *file_or_folder) {
    if (!is_directory(file_or_folder)) {
        picture_files_add(files, format_string("%s", file_or_folder));
        return;
    }
    int count;
    char **names = folder_names(file_or_folder, &count);
    const char *slash = ends_with(file_or_folder, "/") ? "" : "/";
    for (int i = 0; i < count; i++) {
        if (is_picture_name(names[i]))
            picture_files_add(files, format_string("%s%s%s", file_or_folder, slash, names[i]));
        else
            fprintf(stderr, "%s%s%s: not a JPEG or PNG by its name: skipped\n", file_or_folder, slash, names[i]);
    }
    free_names(names, count);
}

// The place in `folder` for a copy of `picture`: its own name, with a number where a path in `taken` has that name;
// .png where the name says neither JPEG nor PNG. Adds it to `taken`, which keeps it. NULL if it is the picture itself.
static inline const char *picture_copy_path(PictureFiles *taken, const char *folder, const char *picture,
                                            Error *error) {
    const char *name = strrchr(picture, '/') ? strrchr(picture, '/') + 1 : picture, *dot = strrchr(name, '.');
    if (!ends_with(name, ".jpg") && !ends_with(name, ".jpeg") && !ends_with(name, ".png")) dot = NULL;
    int stem = (int)(dot ? (size_t)(dot - name) : strlen(name));
    char *path = format_string("%s/%.*s%s", folder, stem, name, dot ? dot : ".png");
    for (int i = 0, number = 2; i < taken->count; i++) {
        if (strcmp(taken->paths[i], path) != 0) continue;
        free(path);
        path = format_string("%s/%.*s-%d%s", folder, stem, name, number++, dot ? dot : ".png");
        i = -1;  // compare with all of them again
    }
    picture_files_add(taken, path);
    struct stat from, to;
    if (stat(picture, &from) != 0 || stat(path, &to) != 0 || from.st_ino != to.st_ino || from.st_dev != to.st_dev)
        return path;
    fail(error, "%s: its drawn copy in %s would overwrite it: give another folder", picture, folder);
    return NULL;
}

#endif
