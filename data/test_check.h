/*
What test_detr.c and test_detr.cu have in common: how a check is counted, and how the tests on the command line are run.
*/
#ifndef DETR_TEST_CHECK_H
#define DETR_TEST_CHECK_H

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common.h"

static int num_passed, num_failed;

// Counts a check; a failed one is printed with its name.
__attribute__((format(printf, 2, 3))) static void check(int condition, const char *format, ...) {
    condition ? num_passed++ : num_failed++;
    if (condition) return;
    va_list arguments;
    va_start(arguments, format);
    printf("  FAILED: ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

typedef struct {
    const char *name;
    void (*run)(void);
} Test;

// Calls run(test) for all tests, or for those whose name begins with one of the words; a word with a minus leaves those
// out. Prints a line for each, at the end "N passed, N failed", and returns the program's exit status.
static int run_tests(const Test *tests, int num_tests, void (*run)(const Test *), int argc, char **argv) {
    for (int i = 0; i < num_tests; i++) {
        int wanted = argc < 2 || argv[1][0] == '-';
        for (int a = 1; a < argc; a++) {
            const char *name = argv[a] + (*argv[a] == '-');
            if (strncmp(tests[i].name, name, strlen(name)) == 0) wanted = *argv[a] != '-';
        }
        if (!wanted) continue;
        const int passed = num_passed, failed = num_failed;
        const double start = seconds_now();
        run(&tests[i]);
        printf("%-12s %5d passed, %d failed, %.1f s\n", tests[i].name, num_passed - passed, num_failed - failed,
               seconds_now() - start);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", num_passed, num_failed);
    return num_failed > 0;
}

#endif
