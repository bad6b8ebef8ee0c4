/*
portable.c: main() of what make PORTABLE=1 builds on x86-64. Such a program holds train_detr.c (or test_detr.c) several
times, compiled for more and more instructions, each with a main() of another name: this one asks the processor what it
has and calls the best of them, or the one that the environment variable TRAIN_DETR_CPU names.
*/
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main_sse2(int argc, char **argv);
int main_avx2(int argc, char **argv);
int main_avx512(int argc, char **argv);
int main_avx512bf16(int argc, char **argv);
int main_amx(int argc, char **argv);

// Each level asks for exactly what the Makefile compiles it for. __builtin_cpu_supports() says no as well where the
// operating system does not save the wider registers.
int main(int argc, char **argv) {
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const int avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const int amx = avx512bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
    const struct {
        const char *name;
        int supported, (*run)(int, char **);
    } levels[] = {{"amx", amx, main_amx},
                  {"avx512bf16", avx512bf16, main_avx512bf16},
                  {"avx512", avx512, main_avx512},
                  {"avx2", avx2, main_avx2},
                  {"sse2", 1, main_sse2}};
    const int count = sizeof levels / sizeof *levels;
    const char *wanted = getenv("TRAIN_DETR_CPU");
    for (int i = 0; i < count; i++)
        if (levels[i].supported && (!wanted || strcmp(wanted, levels[i].name) == 0)) return levels[i].run(argc, argv);
    fprintf(stderr, "error: TRAIN_DETR_CPU=%s: must be one of", wanted);
    for (int i = 0; i < count; i++)
        if (levels[i].supported) fprintf(stderr, " %s", levels[i].name);
    fprintf(stderr, " on this processor\n");
    return 2;
}
