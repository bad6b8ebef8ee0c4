/*
A set of files in one folder that changes as a whole. A checkpoint is several files that belong to one step, and a
rename puts only one file in place at once; a kill between two renames must not leave half of each. So:

    1. fileset_begin makes an empty FOLDER/.next; the caller writes every file of the set there, flushed to the disk.
    2. fileset_commit renames .next to .commit. This one rename is the moment at which the set is the valid one:
       from here on a file in FOLDER/.commit counts before the one of the same name in FOLDER.
    3. It then moves the files one by one into FOLDER and removes the empty .commit.

A kill before 2 leaves the old set and a .next that fileset_settle deletes; a kill after it leaves a .commit that
fileset_settle moves to the end. Readers use fileset_path, which looks into .commit first and changes nothing, so that
they may read beside a program that writes. A lock keeps two writers apart; it ends with its process, however that ends.

Compiles as C11 and as C++17.
*/
#ifndef DETR_FILESET_H
#define DETR_FILESET_H

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "common.h"

// Flushes a folder's own entries (names) to the disk. 0, or -1.
static inline int folder_sync(const char *folder, Error *error) {
    int descriptor = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int good = descriptor >= 0 && (fsync(descriptor) == 0 || errno == EINVAL);  // some file systems cannot
    if (!good) fail(error, "%s: cannot be flushed to the disk: %s", folder, strerror(errno));
    if (descriptor >= 0) close(descriptor);
    return good ? 0 : -1;
}

// Takes every file out of FOLDER/sub: into FOLDER, or deleted; then removes FOLDER/sub. Nothing to do if it is missing.
static inline int fileset_empty(const char *folder, const char *sub, int keep, Error *error) {
    char *from_folder = format_string("%s/%s", folder, sub);
    DIR *directory = opendir(from_folder);
    int status = 0;
    for (struct dirent *entry; directory && status == 0 && (entry = readdir(directory)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        char *from = format_string("%s/%s", from_folder, entry->d_name);
        char *to = format_string("%s/%s", folder, entry->d_name);
        if ((keep ? rename(from, to) : unlink(from)) != 0)
            status = fail(error, "%s: cannot be %s: %s", from, keep ? "put in place" : "deleted", strerror(errno));
        free(from);
        free(to);
    }
    if (directory) {
        closedir(directory);
        if (status == 0 && keep) status = folder_sync(folder, error);
        if (status == 0 && rmdir(from_folder) != 0)
            status = fail(error, "%s: cannot be removed: %s", from_folder, strerror(errno));
    } else if (errno != ENOENT) {
        status = fail(error, "%s: cannot be read: %s", from_folder, strerror(errno));
    }
    free(from_folder);
    return status;
}

// Brings to an end what a killed writer left. 0, or -1.
static inline int fileset_settle(const char *folder, Error *error) {
    if (fileset_empty(folder, ".commit", 1, error) != 0) return -1;
    return fileset_empty(folder, ".next", 0, error);
}

// Becomes the folder's one writer and settles it. Returns a descriptor to be kept open (closing it ends the lock), or
// -1: another process has the lock, or the folder cannot be used.
static inline int fileset_lock(const char *folder, Error *error) {
    int descriptor = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return fail(error, "%s: cannot be opened: %s", folder, strerror(errno));
    if (flock(descriptor, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        close(descriptor);
        return fail(error, "%s: another run is writing there: wait for its end, or stop it", folder);
    }
    if (fileset_settle(folder, error) == 0) return descriptor;
    close(descriptor);
    return -1;
}

// Makes the empty folder for the next set's files. 0, or -1.
static inline int fileset_begin(const char *folder, Error *error) {
    if (fileset_settle(folder, error) != 0) return -1;
    char *next = format_string("%s/.next", folder);
    int status = mkdir(next, 0777) == 0 ? 0 : fail(error, "%s: cannot be created: %s", next, strerror(errno));
    free(next);
    return status;
}

// Opens FOLDER/.next/name for writing; NULL, which fileset_close reports, if it cannot be.
static inline FILE *fileset_create(const char *folder, const char *name) {
    char *path = format_string("%s/.next/%s", folder, name);
    FILE *file = fopen(path, "w");
    free(path);
    return file;
}

// Flushes such a file to the disk and closes it. 0, or -1 if anything of its writing failed.
static inline int fileset_close(FILE *file, const char *folder, const char *name, Error *error) {
    int good = file && fflush(file) == 0 && !ferror(file) && (fsync(fileno(file)) == 0 || errno == EINVAL);
    int why = errno;
    if (file && fclose(file) != 0 && good) good = 0, why = errno;
    return good ? 0 : fail(error, "%s/%s: cannot be written: %s", folder, name, strerror(why));
}

// Puts the files in FOLDER/.next in place, all or none. 0; or -1, and then the set is whole nevertheless: the old one,
// or the other if only moving its files failed.
static inline int fileset_commit(const char *folder, Error *error) {
    char *next = format_string("%s/.next", folder), *commit = format_string("%s/.commit", folder);
    int status = folder_sync(next, error);
    if (status == 0 && rename(next, commit) != 0)
        status = fail(error, "%s: cannot be renamed to %s: %s", next, commit, strerror(errno));
    if (status == 0) status = fileset_settle(folder, error);
    free(next);
    free(commit);
    return status;
}

// Where a file of the set is to be read; the caller frees the path.
static inline char *fileset_path(const char *folder, const char *name) {
    char *path = format_string("%s/.commit/%s", folder, name);
    if (is_file(path)) return path;
    free(path);
    return format_string("%s/%s", folder, name);
}

#endif
