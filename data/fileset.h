/*
A set of files in one folder that changes as a whole. A checkpoint is several files that belong to one step, and a
rename puts only one file in place at once; a kill between two renames must not leave half of each. So:

    1. fileset_begin makes an empty FOLDER/.next; the caller writes every file of the set there, flushed to the disk.
    2. fileset_commit adds SHA256SUMS, the checksums of all of them in the form that sha256sum -c reads, and, where the
       set that is replaced shall be kept, links its files into FOLDER/.old.
    3. It renames .next to .commit. This one rename is the moment at which the set is the valid one: from here on a file
       in FOLDER/.commit counts before the one of the same name in FOLDER.
    4. It renames .old to previous, moves the files of .commit one by one into FOLDER and removes the empty .commit.

A kill before 3 leaves the old set, and a .next and .old that fileset_settle deletes; a kill after it leaves a .commit
with which fileset_settle does step 4. Readers use fileset_path, which looks into .commit first and changes nothing, so
that they may read beside a program that writes. A lock keeps two writers apart; it ends with its process, however that
ends.

fileset_check compares files with their checksums. A folder without SHA256SUMS is one that somebody else wrote, and all
of it is believed.

Compiles as C11 and as C++17.
*/
#ifndef DETR_FILESET_H
#define DETR_FILESET_H

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "common.h"
#include "sha256.h"

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

// Makes FOLDER/.old the set before the present one, instead of the one that is there. 0, or -1.
static inline int fileset_replace_previous(const char *folder, Error *error) {
    char *old = format_string("%s/.old", folder), *previous = format_string("%s/previous", folder);
    int status = 0;
    if (is_directory(old)) {
        status = fileset_empty(folder, "previous", 0, error);
        if (status == 0 && rename(old, previous) != 0)
            status = fail(error, "%s: cannot be renamed to %s: %s", old, previous, strerror(errno));
    }
    free(old);
    free(previous);
    return status;
}

// Brings to an end what a killed writer left. 0, or -1.
static inline int fileset_settle(const char *folder, Error *error) {
    char *commit = format_string("%s/.commit", folder);
    int status =
        is_directory(commit) ? fileset_replace_previous(folder, error) : fileset_empty(folder, ".old", 0, error);
    if (status == 0) status = fileset_empty(folder, ".commit", 1, error);
    if (status == 0) status = fileset_empty(folder, ".next", 0, error);
    free(commit);
    return status;
}

// Becomes the folder's one writer and settles it. Who that is stands in FOLDER/.lock; the lock itself is the system's,
// on that file, so one that a killed process has left locks nothing. Returns a descriptor to be kept open (closing it
// ends the lock), or -1: another process has the lock, or the folder cannot be written to.
static inline int fileset_lock(const char *folder, Error *error) {
    char *path = format_string("%s/.lock", folder), holder[128] = "", host[64] = "";
    int descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (descriptor < 0) {
        fail(error, "%s: cannot be written to: %s", folder, strerror(errno));
    } else if (flock(descriptor, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        ssize_t got = read(descriptor, holder, sizeof holder - 1);
        holder[got > 0 ? strcspn(holder, "\n") : 0] = 0;
        fail(error, "%s: another run is writing there (%s): wait for its end, or stop it", folder,
             *holder ? holder : "it has not said which");
        close(descriptor);
        descriptor = -1;
    } else if (fileset_settle(folder, error) != 0) {
        close(descriptor);
        descriptor = -1;
    } else {
        gethostname(host, sizeof host - 1);
        int length = snprintf(holder, sizeof holder, "process %ld on %s\n", (long)getpid(), host);
        int named = ftruncate(descriptor, 0) == 0 && pwrite(descriptor, holder, (size_t)length, 0) == length;
        (void)named;  // where the disk is full, the lock holds without
    }
    free(path);
    return descriptor;
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

#define FILESET_SUMS "SHA256SUMS"

static inline int fileset_is_visible(const struct dirent *entry) { return entry->d_name[0] != '.'; }

// Writes FOLDER/.next/SHA256SUMS, a line for each of the files. 0, or -1.
static inline int fileset_sum(const char *folder, struct dirent *const *files, int count, Error *error) {
    FILE *sums = fileset_create(folder, FILESET_SUMS);
    int status = 0;
    for (int i = 0; i < count && sums && status == 0; i++) {
        char *path = format_string("%s/.next/%s", folder, files[i]->d_name), sum[SHA256_HEX + 1];
        status = sha256_file(path, sum, error);
        if (status == 0) fprintf(sums, "%s  %s\n", sum, files[i]->d_name);
        free(path);
    }
    if (status == 0) return fileset_close(sums, folder, FILESET_SUMS, error);
    fclose(sums);
    return status;
}

// Links the present files of the set into FOLDER/.old. Where a file system has no links nothing is kept, and that is no
// error: the folder works without.
static inline void fileset_keep(const char *folder, struct dirent *const *files, int count) {
    char *old = format_string("%s/.old", folder);
    int good = mkdir(old, 0777) == 0, found = 0;
    for (int i = 0; i <= count && good; i++) {
        const char *name = i < count ? files[i]->d_name : FILESET_SUMS;
        char *from = format_string("%s/%s", folder, name), *to = format_string("%s/%s", old, name);
        const int linked = link(from, to) == 0;
        good = linked || errno == ENOENT;
        found += linked;
        free(from);
        free(to);
    }
    Error unused;
    if (!good || !found) fileset_empty(folder, ".old", 0, &unused);
    free(old);
}

// Puts the files in FOLDER/.next in place, all or none, with their checksums. keep: what they replace becomes
// FOLDER/previous. 0; or -1, and then the set is whole nevertheless: the old one, or the other if only moving its files
// failed.
static inline int fileset_commit(const char *folder, int keep, Error *error) {
    char *next = format_string("%s/.next", folder), *commit = format_string("%s/.commit", folder);
    struct dirent **files = NULL;
    int count = scandir(next, &files, fileset_is_visible, alphasort), status;
    status = count < 0 ? fail(error, "%s: cannot be read: %s", next, strerror(errno))
                       : fileset_sum(folder, files, count, error);
    if (status == 0) status = folder_sync(next, error);
    if (status == 0 && keep) fileset_keep(folder, files, count);
    if (status == 0 && rename(next, commit) != 0)
        status = fail(error, "%s: cannot be renamed to %s: %s", next, commit, strerror(errno));
    if (status == 0) status = fileset_settle(folder, error);
    for (int i = 0; i < count; i++) free(files[i]);
    free(files);
    free(next);
    free(commit);
    return status;
}

// Where a file of the set is to be read; the caller frees the path. A writer may move a file out of .commit between
// this and its opening, and then the path is the other one: a reader that fails there tries once more.
static inline char *fileset_path(const char *folder, const char *name) {
    char *path = format_string("%s/.commit/%s", folder, name);
    if (is_file(path)) return path;
    free(path);
    return format_string("%s/%s", folder, name);
}

// 1 if the set has that file. A file that is being moved is found in one place or in the other.
static inline int fileset_has(const char *folder, const char *name) {
    char *path = format_string("%s/.commit/%s", folder, name), *moved = format_string("%s/%s", folder, name);
    const int found = is_file(path) || is_file(moved);
    free(path);
    free(moved);
    return found;
}

// fileset_check at one moment.
static inline int fileset_check_once(const char *folder, const char *const *names, int count, Error *error) {
    char *sums_path = fileset_path(folder, FILESET_SUMS), *sums = NULL;
    size_t size;
    int status = fileset_has(folder, FILESET_SUMS) ? read_file(sums_path, &sums, &size, error) : 0, line = 1;
    for (const char *at = sums; status == 0 && at && *at; at += strcspn(at, "\n") + 1, line++)
        if (strspn(at, "0123456789abcdef") != SHA256_HEX || strncmp(at + SHA256_HEX, "  ", 2) != 0 || !strchr(at, '\n'))
            status = fail(error, "%s: is damaged: line %d is no checksum and name", sums_path, line);
    for (int i = 0; i < count && sums && status == 0; i++) {
        char *path = fileset_path(folder, names[i]), *rest = format_string("  %s\n", names[i]), sum[SHA256_HEX + 1];
        const char *found = strstr(sums, rest);
        const int there = fileset_has(folder, names[i]);
        if (!found && there)
            status = fail(error, "%s: is damaged: it has no line for %s", sums_path, names[i]);
        else if (found && !there)
            status = fail(error, "%s: is missing, but %s has its checksum", path, sums_path);
        else if (found && (status = sha256_file(path, sum, error)) == 0 &&
                 memcmp(sum, found - SHA256_HEX, SHA256_HEX) != 0)
            status = fail(error, "%s: is damaged, or was changed: its checksum is not the one in %s", path, sums_path);
        free(path);
        free(rest);
    }
    free(sums_path);
    free(sums);
    return status;
}

// Compares files of a set, those of `names` that are there, with SHA256SUMS. 0, also where there is no such file; or -1
// with the first file that is not what was written. Beside a writer, which may put another set in place between two
// looks, only the third time counts.
static inline int fileset_check(const char *folder, const char *const *names, int count, Error *error) {
    int status = -1;
    for (int attempt = 0; attempt < 3 && status != 0; attempt++)
        status = fileset_check_once(folder, names, count, error);
    return status;
}

#endif
