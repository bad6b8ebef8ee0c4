/*
Flags of a program with several commands, from one table: what a flag is called, what it may be, its default, which
commands know it. From it are made parsing (getopt_long), checking, --help, saving into a JSON file, and the comparison
with what a run that goes on has saved. Values stay text until they are used.

A wrong call (unknown flag, impossible value) ends the program here, with one line that names the flag and status 2.

Compiles as C11 and as C++17.
*/
#ifndef DETR_FLAGS_H
#define DETR_FLAGS_H

#include <getopt.h>
#include <unistd.h>

#include "json.h"

typedef enum { SWITCH, INTEGER, NUMBER, CHOICE, TEXT, PATH } FlagKind;

enum { MAX_FLAGS = 128, MAY_CHANGE = 1 << 30 };  // MAY_CHANGE: a run that goes on may be given another value

typedef struct {
    const char *name;
    FlagKind kind;
    const char *value;          // what help calls its value; of a CHOICE the possible ones, with | between them
    const char *default_value;  // NULL: unset
    double low, high;           // of numbers, both allowed
    int commands;               // bits of the commands that know it, and MAY_CHANGE
    const char *help;
} Flag;

// Other defaults under one name. A flag that the user gives counts before them.
typedef struct {
    const char *name, *help;
    const char *values[MAX_FLAGS][2];  // flag, value
} Preset;

typedef enum { FROM_DEFAULT, FROM_PRESET, FROM_SAVED, FROM_USER } FlagSource;

typedef struct {
    const Flag *flags;
    int num_flags;
    const Preset *presets;  // chosen by the flag "preset"
    int num_presets;
    const char *program, *command_name;
    const char *command_line;     // as it was typed; or NULL
    int command;                  // its bit
    const char *text[MAX_FLAGS];  // the values; NULL: unset; a switch that is on: "1"
    FlagSource source[MAX_FLAGS];
    char **arguments;  // what is no flag
    int num_arguments;
} Settings;

// Ends the program with one line and status 2.
__attribute__((noreturn, format(printf, 1, 2))) static inline void usage_error(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("error: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Values

static inline int flag_index(const Settings *settings, const char *name) {
    for (int i = 0; i < settings->num_flags; i++)
        if (strcmp(settings->flags[i].name, name) == 0) return i;
    usage_error("--%s is missing in the table of flags", name);
}

static inline const char *flag_text(const Settings *settings, const char *name) {
    return settings->text[flag_index(settings, name)];
}

// Unset numbers are 0.
static inline double flag_number(const Settings *settings, const char *name) {
    const char *text = flag_text(settings, name);
    return text ? strtod(text, NULL) : 0;
}

static inline int64_t flag_int64(const Settings *settings, const char *name) {
    const char *text = flag_text(settings, name);
    return text ? strtoll(text, NULL, 10) : 0;
}

static inline int flag_int(const Settings *settings, const char *name) { return (int)flag_int64(settings, name); }

// 1 for a switch that is on, or a flag that has a value.
static inline int flag_on(const Settings *settings, const char *name) { return flag_text(settings, name) != NULL; }

// 1 if the user gave the flag.
static inline int flag_given(const Settings *settings, const char *name) {
    return settings->source[flag_index(settings, name)] == FROM_USER;
}

// Sets a value, unless there is one of a higher rank.
static inline void flag_set(Settings *settings, const char *name, const char *text, FlagSource source) {
    int i = flag_index(settings, name);
    if (settings->source[i] > source) return;
    settings->text[i] = text;
    settings->source[i] = source;
}

// Ends the program if the flag has no value.
static inline void flag_require(const Settings *settings, const char *name) {
    if (!flag_on(settings, name))
        usage_error("--%s is missing: see %s %s --help", name, settings->program, settings->command_name);
}

// 1 if `text` is one of the words in "a|b|c".
static inline int is_choice(const char *choices, const char *text) {
    for (const char *at = choices; at; at = strchr(at, '|') ? strchr(at, '|') + 1 : NULL)
        if (strcspn(at, "|") == strlen(text) && strncmp(at, text, strlen(text)) == 0) return 1;
    return 0;
}

// 1 if `text` is a possible value of the flag.
static inline int flag_possible(const Flag *flag, const char *text) {
    char *end = NULL;
    errno = 0;
    if (flag->kind == INTEGER) {
        long long value = strtoll(text, &end, 10);
        return end != text && !*end && !errno && (double)value >= flag->low && (double)value <= flag->high;
    }
    if (flag->kind == NUMBER) {
        double value = strtod(text, &end);
        return end != text && !*end && value >= flag->low && value <= flag->high;
    }
    return flag->kind == CHOICE ? is_choice(flag->value, text) : text[0] != 0;
}

// Ends the program unless `text` is a possible value of the flag.
static inline void flag_check(const Flag *flag, const char *text) {
    if (flag_possible(flag, text)) return;
    if (flag->kind == INTEGER)
        usage_error("--%s must be a whole number from %.15g to %.15g, not \"%s\"", flag->name, flag->low, flag->high,
                    text);
    if (flag->kind == NUMBER)
        usage_error("--%s must be a number from %g to %g, not \"%s\"", flag->name, flag->low, flag->high, text);
    if (flag->kind == CHOICE) usage_error("--%s must be one of %s, not \"%s\"", flag->name, flag->value, text);
    usage_error("--%s must not be empty", flag->name);
}

// 1 if both paths name the same file or folder.
static inline int same_path(const char *a, const char *b) {
    char *real_a = realpath(a, NULL), *real_b = realpath(b, NULL);
    int same = strcmp(a, b) == 0 || (real_a && real_b && strcmp(real_a, real_b) == 0);
    free(real_a);
    free(real_b);
    return same;
}

// 1 if both values of the flag (NULL: unset) mean the same.
static inline int flag_same(const Flag *flag, const char *a, const char *b) {
    if (!a || !b) return a == b;
    if (flag->kind == INTEGER) return strtoll(a, NULL, 10) == strtoll(b, NULL, 10);
    if (flag->kind == NUMBER) return strtod(a, NULL) == strtod(b, NULL);
    return flag->kind == PATH ? same_path(a, b) : strcmp(a, b) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// From and to the user

// The words of a command as they are typed into a shell; the caller frees it.
static inline char *shell_command(int argc, char **argv) {
    char *line = NULL;
    size_t size;
    FILE *file = open_memstream(&line, &size);
    for (int i = 0; i < argc && file; i++) {
        const int plain = *argv[i] && argv[i][strspn(argv[i],
                                                     "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                                     "0123456789_-+=./:,@%")] == 0;
        if (i) fputc(' ', file);
        if (!plain) fputc('\'', file);
        for (const char *at = argv[i]; *at; at++) {
            if (*at == '\'')
                fputs("'\\''", file);
            else
                fputc(*at, file);
        }
        if (!plain) fputc('\'', file);
    }
    if (file) fclose(file);
    return line;
}

// Reads the flags of settings->command; argv[0] is the command's name. Flags and other words may come in any order.
static inline void settings_parse(Settings *settings, int argc, char **argv) {
    struct option options[MAX_FLAGS + 1];
    memset(options, 0, sizeof options);
    for (int i = 0, count = 0; i < settings->num_flags; i++) {
        settings->text[i] = settings->flags[i].default_value;
        if (!(settings->flags[i].commands & settings->command)) continue;
        options[count].name = settings->flags[i].name;
        options[count].has_arg = settings->flags[i].kind == SWITCH ? optional_argument : required_argument;
        options[count++].val = 256 + i;
    }
    opterr = 0;
    for (int code; (code = getopt_long(argc, argv, ":", options, NULL)) != -1;) {
        const char *word = argv[optind - 1], *program = settings->program, *command = settings->command_name;
        if (code == ':') usage_error("%s needs a value: see %s %s --help", word, program, command);
        if (code == '?' && optopt) usage_error("unknown flag -%c: see %s %s --help", optopt, program, command);
        if (code == '?') usage_error("unknown flag %s for %s: see %s %s --help", word, command, program, command);
        const Flag *flag = &settings->flags[code - 256];
        if (flag->kind != SWITCH)
            flag_check(flag, optarg);
        else if (optarg && strcmp(optarg, "off") != 0)  // =off: whatever the preset says
            usage_error("--%s takes no value but off: \"%s\"", flag->name, word);
        flag_set(settings, flag->name, flag->kind != SWITCH ? optarg : optarg ? NULL : "1", FROM_USER);
    }
    settings->arguments = argv + optind;
    settings->num_arguments = argc - optind;
    for (int p = 0; p < settings->num_presets && flag_on(settings, "preset"); p++) {
        const Preset *preset = &settings->presets[p];
        if (strcmp(preset->name, flag_text(settings, "preset")) != 0) continue;
        for (int i = 0; preset->values[i][0]; i++)
            flag_set(settings, preset->values[i][0], preset->values[i][1], FROM_PRESET);
    }
}

// The flags of the commands in the bits `commands`, one a line, with defaults.
static inline void settings_print_help(const Settings *settings, int commands) {
    for (int i = 0; i < settings->num_flags; i++) {
        const Flag *flag = &settings->flags[i];
        if (!(flag->commands & commands)) continue;
        char left[96];
        snprintf(left, sizeof left, "--%s %s", flag->name, flag->value ? flag->value : "");
        printf("  %-26s %s%s", left, strlen(left) > 26 ? "\n                             " : "", flag->help);
        if (flag->default_value || flag->kind == SWITCH)
            printf(" [%s]", flag->default_value ? flag->default_value : "off");
        printf("\n");
    }
}

static inline void settings_print_presets(const Settings *settings) {
    for (int p = 0; p < settings->num_presets; p++) {
        printf("  --preset %-8s %s:\n      ", settings->presets[p].name, settings->presets[p].help);
        for (int i = 0; settings->presets[p].values[i][0]; i++) {
            const char *const *given = settings->presets[p].values[i];
            const int is_switch = settings->flags[flag_index(settings, given[0])].kind == SWITCH;
            printf(" --%s%s%s", given[0], is_switch ? "" : " ", is_switch ? "" : given[1]);
        }
        printf("\n");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// From and to a file

// The command's flags as an object: {"lr": 0.0001, "dilation": false, "pretrained": null, ...}; without "resume".
static inline void settings_write(FILE *file, const Settings *settings) {
    const char *before = "{";
    for (int i = 0; i < settings->num_flags; i++) {
        const Flag *flag = &settings->flags[i];
        const char *text = settings->text[i];
        if (!(flag->commands & settings->command) || strcmp(flag->name, "resume") == 0) continue;
        fprintf(file, "%s\"%s\": ", before, flag->name);
        before = ", ";
        if (flag->kind == SWITCH)
            fputs(text ? "true" : "false", file);
        else if (!text)
            fputs("null", file);
        else if (flag->kind == INTEGER)
            fprintf(file, "%lld", strtoll(text, NULL, 10));
        else if (flag->kind == NUMBER)
            json_print_number(file, strtod(text, NULL));
        else
            json_print_string(file, text);
    }
    fputc('}', file);
}

// Takes over the flags that settings_write saved; the tree must outlive the settings. Ends the program if the user gave
// one of them another value that may not change. A file or folder that is not where it was may be named anew. 0; -1 if
// what was saved cannot be: `path` is the file it comes from.
static inline int settings_resume(Settings *settings, yajl_val saved, const char *path, Error *error) {
    if (!YAJL_IS_OBJECT(saved)) return fail(error, "%s: is damaged: it holds no flags", path);
    for (int i = 0; i < settings->num_flags; i++) {
        const Flag *flag = &settings->flags[i];
        yajl_val value = json_member(saved, flag->name);
        if (!value || !(flag->commands & settings->command)) continue;
        const char *given = settings->text[i], *text = YAJL_IS_TRUE(value) ? "1" : NULL;
        if (YAJL_IS_NUMBER(value)) text = value->u.number.r;
        if (YAJL_IS_STRING(value)) text = value->u.string;
        if (flag->kind != SWITCH && (text ? !flag_possible(flag, text) : flag->default_value != NULL))
            return fail(error, "%s: is damaged: \"%s\" is \"%.40s\"", path, flag->name, text ? text : "null");
        int free_to_change = (flag->commands & MAY_CHANGE) || (flag->kind == PATH && text && access(text, F_OK) != 0);
        if (settings->source[i] == FROM_USER && !free_to_change && !flag_same(flag, given, text))
            usage_error("--%s%s%s contradicts the run that goes on, where it is %s: leave it out", flag->name,
                        flag->kind == SWITCH ? "" : " ", flag->kind == SWITCH ? (given ? "" : "=off") : given,
                        text                   ? text
                        : flag->kind == SWITCH ? "off"
                                               : "unset");
        flag_set(settings, flag->name, text, FROM_SAVED);
    }
    return 0;
}

#endif
