# train_detr: a DETR trainer in C. GNU make; a bare `make` lists the targets.
#
# Variables:
#   REAL=float|double   the type of every number in the network (float); `make test` runs both unless it is given
#   PORTABLE=1          one binary for every processor of this architecture. Without it the compiler may use everything
#                       that this very processor has (-march=native), and the binary may not run on another. On x86-64
#                       a portable one holds the program five times and picks what fits when it starts
#                       (program/portable.c); elsewhere it is compiled for the compiler's own baseline
#   SANITIZE=1          with AddressSanitizer and UndefinedBehaviorSanitizer
#   WERROR=1            warnings are errors
#   CC, CPPFLAGS, CFLAGS, LDFLAGS as usual; CFLAGS comes last, so it wins
SHELL = /bin/sh
REAL_ORIGIN := $(origin REAL)  # who chose it: decides what `make test` runs
REAL ?= float
PYTHON ?= python3
CFLAGS ?=

ifeq ($(filter $(REAL),float double),)
$(error REAL=$(REAL): must be float or double)
endif

comma := ,
# -fno-math-errno lets sqrtf become an instruction; -ffast-math would break the checks for NaN and infinity.
OPTIMIZE := $(if $(SANITIZE),-O1,-O3)
accepted = $(shell $(CC) -Werror $(1) -E -x c /dev/null >/dev/null 2>&1 && echo $(1))
NATIVE := $(if $(PORTABLE)$(SANITIZE),,$(firstword $(call accepted,-march=native) $(call accepted,-mcpu=native)))
# gcc for ARM would load numbers so early that they push the tile out of its registers (for x86-64 it does not anyway).
SCHEDULE := $(call accepted,-fno-schedule-insns)
FLAGS := -std=gnu11 $(OPTIMIZE) -g $(NATIVE) $(SCHEDULE) -ffp-contract=fast -fno-math-errno \
         -fopenmp -pthread -Wall -Wextra $(if $(WERROR),-Werror) -DREAL=$(REAL) \
         $(if $(SANITIZE),-fsanitize=address$(comma)undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
LIBS := -ljpeg -lpng -lyajl -lexpat -lm
ifeq ($(shell uname -s),Darwin)
BREW := $(shell brew --prefix 2>/dev/null)
CPPFLAGS += -I$(BREW)/include
LDFLAGS += -L$(BREW)/lib
endif

# What a portable x86-64 program holds, and the instructions of each; program/portable.c asks for exactly these.
LEVELS := $(if $(PORTABLE),$(if $(filter x86_64-%,$(shell $(CC) -dumpmachine)),sse2 avx2 avx512 avx512bf16 amx))
FLAGS_sse2 :=
FLAGS_avx2 := -mavx2 -mfma
FLAGS_avx512 := $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl
FLAGS_avx512bf16 := $(FLAGS_avx512) -mavx512bf16
FLAGS_amx := $(FLAGS_avx512bf16) -mamx-tile -mamx-bf16

# One folder for each way to build, so that float and double never mix.
VARIANT := $(REAL)$(if $(PORTABLE),-portable)$(if $(SANITIZE),-sanitize)
B := build/$(VARIANT)
HEADERS := $(wildcard data/*.h program/*.h) data/report.html
VENV := build/venv
EXPORTED := CC='$(CC)' CPPFLAGS='$(CPPFLAGS)' LDFLAGS='$(LDFLAGS)'

# Names of tests, to run only those: make test TESTS="matmul dumps"; with a minus, to leave those out: TESTS=-heart
TESTS ?=

.DELETE_ON_ERROR:
.PHONY: help test test-levels test-asan test-tsan test-valgrind fuzz test-fuzz lint coverage mutants determinism survive soak finetune \
        test-inputs dumps check-python check-report bench bench-data ladder emu-test emu-nvcc emu-check cuda-ladder \
        cuda-headers cuda-nvcc sass demo \
        demo-shapes install-deps format check-format clean FORCE

help:
	@echo "make demo           install what is missing, build, train a small model on data/bccd, draw its boxes: out/demo"
	@echo "make demo-shapes    the same on generated pictures, coloured shapes before one another: out/demo-shapes"
	@echo "make test           every check of numbers, in float and in double (REAL=float or REAL=double: only that one)"
	@echo "make train_detr     the trainer, for this machine's processor; PORTABLE=1: one binary for others as well"
	@echo "make test_detr      the tests, not run"
	@echo "make make_shapes    the generator of those pictures: ./make_shapes --help"
	@echo "make test-levels    the tests with each of the kernels in a portable binary that this machine can run"
	@echo "make test-asan      the tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make test-tsan      the loader's threads under ThreadSanitizer"
	@echo "make test-valgrind  one tiny training step under valgrind"
	@echo "make mutants        plant one error after the other: the tests must catch every one; in kernels too where CUDA's headers are: hours"
	@echo "make determinism    same bytes for 1 to 4 threads, micro-batches, workers"
	@echo "make survive        100 kills, full disks, damaged checkpoints: each run ends with the same bytes (python3, strace)"
	@echo "make soak           a training of two hours: memory, descriptors and speed over time (python3, matplotlib)"
	@echo "make finetune       fine-tuning from end to end, with frozen parts and other classes (python3)"
	@echo "make test-inputs    hundreds of bad and odd data sets, pictures, checkpoints and flags: nothing breaks it (python3)"
	@echo "make fuzz           look for files that break a reader, a minute for each of eleven (clang); FUZZ=NAME FUZZ_SECONDS=N"
	@echo "make test-fuzz      what the search begins with and what it ever found, each once"
	@echo "make lint           warnings beyond a build's, cppcheck and clang-tidy"
	@echo "make coverage       which lines of the trainer no test runs, and why (python3, gcov)"
	@echo "make dumps          PyTorch's truth made again and compared with dev/dumps (python3, downloads PyTorch);"
	@echo "                    DUMPS=dev/dumps replaces the files there"
	@echo "make check-python   transformers, Pillow and pycocotools against train_detr (python3, downloads PyTorch)"
	@echo "make check-report   report.html of tiny runs in headless Chromium (python3, chromium)"
	@echo "make bench          training and inference beside PyTorch, OpenVINO and ONNX Runtime (python3, downloads them)"
	@echo "make bench-data     loading pictures, average precision, opening annotations beside Python (python3, same)"
	@echo "make ladder         the way from three loops to the trainer's kernels: every step checked and timed, in a minute or two"
	@echo "make emu-test       CUDA kernels run on this processor and checked: the emulator's own tests (needs CUDA's headers)"
	@echo "make emu-nvcc       the same file compiled by nvcc, a warning is an error; not run (needs nvcc)"
	@echo "make train_detr_cu  the trainer for an NVIDIA GPU, SM=80 and newer (needs nvcc and cuBLASLt)"
	@echo "make train_detr_emu the CUDA trainer with its kernels emulated (needs CUDA's headers with cublasLt.h)"
	@echo "make emu-check      the trainer's CUDA kernels, emulated, against the CPU's functions (needs CUDA's headers)"
	@echo "make test_detr_cu   the same checks for a GPU, SM=80 and newer: ./test_detr_cu; test_detr_emu: emulated, without the checker"
	@echo "make cuda-ladder    the way from naive kernels to those: every version checked, and what it asks of memory counted"
	@echo "make cuda-headers   CUDA's headers from PyPI, 6 MB, for a machine without the toolkit; CUBLAS=1: cublasLt.h as well, 400 MB"
	@echo "make cuda-nvcc      those kernels compiled by nvcc for SM=80, a warning is an error; not run (needs nvcc)"
	@echo "make sass           what nvcc made of each: registers, spills, warps, instructions (needs nvcc and cuobjdump)"
	@echo "make install-deps   compiler and libraries: apt where no password is needed, else the command to type"
	@echo "make format         clang-format on every C file; make check-format only looks"
	@echo "make clean          remove build/ and the programs; out/ stays"
	$(if $(CUDA),,@echo "Left out here, CUDA's headers are missing: emu-test emu-check cuda-ladder (make cuda-headers gets them)")
	$(if $(NVCC),,@echo "Left out here, there is no nvcc: emu-nvcc cuda-nvcc sass")

# ----------------------------------------------------------------------------------------------------------------------
# Programs

# The libraries are looked for before the first compilation, so that a missing one is named with the command that
# installs it instead of a compiler's error.
build/libraries: dev/install.sh
	@mkdir -p build
	@$(EXPORTED) dev/install.sh --check
	@touch $@

# Changes when the compiler or its flags do.
$(B)/flags: FORCE
	@mkdir -p $(B)
	@echo '$(CC) $(CPPFLAGS) $(FLAGS) $(CFLAGS) $(LDFLAGS) $(LIBS)' | cmp -s - $@ || \
	    echo '$(CC) $(CPPFLAGS) $(FLAGS) $(CFLAGS) $(LDFLAGS) $(LIBS)' > $@

# The tests leave out main, and with it the one caller of some functions.
FLAGS_train_detr :=
FLAGS_test_detr := -Wno-unused-function
SOURCES := train_detr.c $(HEADERS) $(B)/flags

# What a build for this very machine is, in a line.
ANNOUNCE = @echo "train_detr: for this processor only ($(NATIVE): $$($@ --help | sed -n 's/^Kernel: \([^.]*\).*/\1/p'));" \
           "PORTABLE=1 makes one for others as well"

ifeq ($(LEVELS),)
$(B)/train_detr $(B)/test_detr: $(B)/%: %.c $(SOURCES) | build/libraries
	$(CC) $(CPPFLAGS) $(FLAGS) $(FLAGS_$*) $(CFLAGS) $< -o $@ $(LDFLAGS) $(LIBS)
	$(if $(NATIVE),$(if $(filter train_detr,$*),$(ANNOUNCE)))
else
define LEVEL
$(B)/train_detr-$(1).o $(B)/test_detr-$(1).o: $(B)/%-$(1).o: %.c $(SOURCES) | build/libraries
	$$(CC) $$(CPPFLAGS) $$(FLAGS) $(FLAGS_$(1)) $$(FLAGS_$$*) -DMAIN=main_$(1) $$(CFLAGS) -c $$< -o $$@
endef
$(foreach level,$(LEVELS),$(eval $(call LEVEL,$(level))))

$(B)/train_detr $(B)/test_detr: $(B)/%: program/portable.c $(foreach level,$(LEVELS),$(B)/%-$(level).o)
	$(CC) $(CPPFLAGS) $(FLAGS) $(CFLAGS) $^ -o $@ $(LDFLAGS) $(LIBS)
endif

$(if $(LEVELS),$(foreach level,$(LEVELS),$(B)/test_detr-$(level).o),$(B)/test_detr): data/make_shapes.c dev/dump.h

# Contractions would give other processors other pictures.
$(B)/make_shapes: data/make_shapes.c $(HEADERS) $(B)/flags | build/libraries
	$(CC) $(CPPFLAGS) $(FLAGS) -ffp-contract=off $(CFLAGS) $< -o $@ $(LDFLAGS) $(LIBS)

# The programs at the top are copies of the variant that was asked for last.
train_detr test_detr make_shapes: %: $(B)/% FORCE
	@cmp -s $< $@ || cp -f $< $@

# ----------------------------------------------------------------------------------------------------------------------
# Checks

ifneq ($(filter command environment,$(REAL_ORIGIN)),)
test: test_detr
	./test_detr $(TESTS)
else
test:
	@$(MAKE) --no-print-directory REAL=double test
	@$(MAKE) --no-print-directory REAL=float test
endif

# Kernels that the processor lacks end with status 2 and are left out.
ifeq ($(PORTABLE),)
test-levels:
	@$(MAKE) --no-print-directory PORTABLE=1 test-levels
else
test-levels: $(B)/test_detr
	@for level in $(or $(LEVELS),baseline); do \
	    TRAIN_DETR_CPU=$$level $(B)/test_detr $(TESTS) || [ $$? = 2 ] || exit 1; \
	done
endif

# LeakSanitizer watches too. The sanitized programs stay under build/. With OMP_WAIT_POLICY set the programs do not start
# themselves a second time, which a tool that follows one process would have to follow.
test-asan:
	@$(MAKE) --no-print-directory SANITIZE=1 REAL=$(REAL) build/$(REAL)-sanitize/test_detr
	OMP_WAIT_POLICY=passive build/$(REAL)-sanitize/test_detr $(TESTS)

# The loader's threads under ThreadSanitizer: its tests, and a training that waits for three of them, evaluates and saves.
# Without OpenMP, whose library tells it nothing. It wants addresses where they are without randomisation.
THREADS := build/float-threads
test-tsan:
	@$(MAKE) --no-print-directory REAL=float PORTABLE= SANITIZE= B=$(THREADS) LDFLAGS="$(LDFLAGS) -lgomp" \
	    CFLAGS="-O1 -fno-openmp -Wno-unknown-pragmas -Wno-unused-function -fsanitize=thread" $(THREADS)/train_detr $(THREADS)/test_detr
	@rm -rf build/threads
	export OMP_WAIT_POLICY=passive; calm=$$(setarch -R true 2>/dev/null && echo setarch -R); \
	    $$calm $(THREADS)/test_detr image && \
	    $$calm $(THREADS)/train_detr train --data data/bccd --train_split test --split test --output_dir build/threads $(TINY) \
	        --short_side 32 --max_size 48 --norm_init identity --batch_size 24 --num_workers 3 --steps 3 --save_steps 1

# Searches for inputs that break a reader of files, for FUZZ_SECONDS each; corpus, log and finds are under FUZZ_OUT. A
# find goes into dev/fuzz/seeds/NAME, once it is mended. Inputs are timed by the program itself, so not by libFuzzer;
# not reduced, since what the libraries make of them is not seen. FUZZ=NAME: that reader alone.
CLANG ?= clang
FUZZ := jpeg png coco voc yolo yaml results safetensors config preprocessor state
FUZZ_SECONDS ?= 60
FUZZ_OUT ?= build/fuzz
fuzz: build/fuzz/fuzz
	@for name in $(FUZZ); do \
	    mkdir -p $(FUZZ_OUT)/$$name $(FUZZ_OUT)/finds; \
	    echo "$$name"; \
	    FUZZ=$$name build/fuzz/fuzz -max_total_time=$(FUZZ_SECONDS) -timeout=86400 -report_slow_units=86400 -reduce_inputs=0 -rss_limit_mb=1500 \
	        -close_fd_mask=3 -print_final_stats=1 -artifact_prefix=$(FUZZ_OUT)/finds/$$name- \
	        $(FUZZ_OUT)/$$name dev/fuzz/seeds/$$name 2>$(FUZZ_OUT)/$$name.log; \
	    status=$$?; \
	    grep -E '^stat::number|^SUMMARY|Test unit' $(FUZZ_OUT)/$$name.log; \
	    [ $$status = 0 ] || exit 1; \
	done

# float-cast-overflow: numbers in files are of any size. Without OpenMP: a search has one thread.
FUZZ_FLAGS := -Wno-unused-function -fsanitize=float-cast-overflow -I.
build/fuzz/fuzz: dev/fuzz/fuzz.c data/test_check.h train_detr.c $(HEADERS) | build/libraries
	@command -v $(CLANG) >/dev/null || { echo "clang is missing: apt-get install clang" >&2; exit 1; }
	@mkdir -p build/fuzz
	$(CLANG) $(CPPFLAGS) -std=gnu11 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Wno-unknown-pragmas -DLIBFUZZER \
	    $(FUZZ_FLAGS) -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $< -o $@ $(LDFLAGS) $(LIBS) -lz -lgomp

test-fuzz:
	@$(MAKE) --no-print-directory SANITIZE=1 REAL=float build/float-sanitize/fuzz
	OMP_WAIT_POLICY=passive build/float-sanitize/fuzz dev/fuzz/seeds/*/*

$(B)/fuzz: dev/fuzz/fuzz.c $(SOURCES) | build/libraries
	$(CC) $(CPPFLAGS) $(FLAGS) $(FUZZ_FLAGS) $(CFLAGS) $< -o $@ $(LDFLAGS) $(LIBS)

# gcc's and clang's own warnings beyond those of a build; cppcheck, whose exceptions are in dev/cppcheck.txt; clang-tidy,
# whose are in .clang-tidy. Without -Wsign-conversion: counts are int, sizes size_t, and the casts between them would bury the sums.
LINT := -std=gnu11 -fsyntax-only -Wall -Wextra -Wpedantic -Wconversion -Wno-sign-conversion -Werror
lint:
	$(CC) $(CPPFLAGS) $(LINT) -fopenmp train_detr.c
	$(CC) $(CPPFLAGS) -std=gnu11 -fsyntax-only -fopenmp -Wall -Wextra -Wno-unused-function -Werror dev/bench_data.c
	$(CLANG) $(CPPFLAGS) -std=gnu11 -fsyntax-only -Wall -Wextra -Werror -Wno-unknown-pragmas -DLIBFUZZER $(FUZZ_FLAGS) dev/fuzz/fuzz.c
	cppcheck --quiet --error-exitcode=1 --std=c11 --enable=warning,portability,performance \
	    --suppressions-list=dev/cppcheck.txt --suppress=missingIncludeSystem -D__x86_64__ -DREAL=float train_detr.c
	clang-tidy --quiet train_detr.c -- $(CPPFLAGS) -std=gnu11 -Wno-unknown-pragmas -DREAL=float

# Which lines of the trainer the tests run, those on the command line included, as this processor has it compiled;
# dev/coverage.txt has a reason for each other one.
COVERAGE := build/coverage
coverage:
	@mkdir -p $(COVERAGE)
	@rm -f $(COVERAGE)/*.gcda
	@$(MAKE) --no-print-directory REAL=float PORTABLE= SANITIZE= B=$(COVERAGE) CFLAGS="-Og --coverage" \
	    $(COVERAGE)/train_detr $(COVERAGE)/test_detr
	@export OMP_WAIT_POLICY=passive; for run in \
	    "$(COVERAGE)/test_detr $(or $(TESTS),-heart)" \
	    "$(PYTHON) dev/bad_inputs.py --slow 10 --program $(COVERAGE)/train_detr" \
	    "$(PYTHON) dev/survive.py --quick --program $(COVERAGE)/train_detr" \
	    "$(PYTHON) dev/finetune.py --program $(COVERAGE)/train_detr" \
	    "env PROGRAM=$(COVERAGE)/train_detr dev/determinism.sh"; do \
	    echo "$$run" | tee -a $(COVERAGE)/log; \
	    $$run >>$(COVERAGE)/log 2>&1 || { tail -n 20 $(COVERAGE)/log; exit 1; }; \
	done
	@$(PYTHON) dev/coverage.py $(COVERAGE)

# valgrind knows no AVX-512: a build of its own, with AVX2 where that is a choice.
VALGRIND := build/float-valgrind
test-valgrind:
	@command -v valgrind >/dev/null || { echo "valgrind is missing: apt-get install valgrind" >&2; exit 1; }
	@$(MAKE) --no-print-directory PORTABLE=1 LEVELS= REAL=float B=$(VALGRIND) \
	    CFLAGS="-O1 $(call accepted,-march=x86-64-v3)" $(VALGRIND)/train_detr
	@rm -rf build/valgrind
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive valgrind -q --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=definite \
	    $(VALGRIND)/train_detr train --data data/bccd --output_dir build/valgrind $(TINY) --steps 1

# The smallest model that has every kind of layer.
TINY := --backbone tiny --enc_layers 1 --dec_layers 1 --dim_feedforward 64 --hidden_dim 32 --nheads 4 \
        --num_queries 20 --short_side 64 --max_size 96 --batch_size 2 --num_workers 1

mutants:
	@$(EXPORTED) $(PYTHON) dev/mutants.py
	$(if $(CUDA),@$(EXPORTED) $(PYTHON) dev/mutants.py --cuda)

determinism: train_detr
	@dev/determinism.sh

# SURVIVE_FLAGS=--quick: a sample, in a minute or two.
survive: train_detr
	@$(PYTHON) dev/survive.py $(SURVIVE_FLAGS)

SOAK ?= out/soak
soak: train_detr
	@$(PYTHON) dev/soak.py $(SOAK)

finetune: train_detr
	@$(PYTHON) dev/finetune.py

test-inputs: train_detr
	@$(PYTHON) dev/bad_inputs.py

$(VENV)/ready: dev/requirements.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv: apt-get install python3-venv" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r dev/requirements.txt
	@touch $@

DUMPS ?= build/dumps
dumps: $(VENV)/ready
	$(VENV)/bin/python dev/oracle.py $(DUMPS)
	$(VENV)/bin/python dev/oracle.py --compare $(DUMPS) dev/dumps

check-python: $(VENV)/ready train_detr
	$(VENV)/bin/python dev/check.py

check-report: train_detr
	$(PYTHON) dev/check_report.py

$(VENV)/bench-ready: dev/requirements-bench.txt $(VENV)/ready
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r dev/requirements-bench.txt
	@touch $@

bench: $(VENV)/bench-ready train_detr
	$(VENV)/bin/python dev/bench.py $(BENCH_FLAGS)

$(B)/bench_data: dev/bench_data.c $(SOURCES) | build/libraries
	$(CC) $(CPPFLAGS) $(FLAGS) -Wno-unused-function $(CFLAGS) $< -o $@ $(LDFLAGS) $(LIBS)

bench-data: $(VENV)/ready $(B)/bench_data
	$(VENV)/bin/python dev/bench_data.py --program $(B)/bench_data $(BENCH_FLAGS)

# Always float, for this processor, on one thread. LADDER=--quick only checks.
LADDER ?=
ladder:
	@$(MAKE) --no-print-directory REAL=float PORTABLE= SANITIZE= build/float/ladder
	build/float/ladder $(LADDER)

$(B)/ladder: dev/cpu/ladder.c dev/cpu/trainer.c train_detr.c $(HEADERS) $(B)/flags | build/libraries
	$(CC) $(CPPFLAGS) $(FLAGS) -Wno-unused-function $(CFLAGS) dev/cpu/ladder.c dev/cpu/trainer.c -o $@ $(LDFLAGS) $(LIBS)

# ----------------------------------------------------------------------------------------------------------------------
# CUDA kernels without a GPU (doc/9). From NAME.cu, build/emu/NAME runs it and build/emu/NAME-checked also watches every
# access. For gdb: make EMU_OPTIMIZE=-O0 ...

# The toolkit's place, or that of its headers alone: CUDA=/path
CUDA ?= $(firstword $(patsubst %/include/cuda_runtime.h,%,$(wildcard /usr/local/cuda/include/cuda_runtime.h \
          build/cuda-headers/nvidia/cu13/include/cuda_runtime.h /opt/cuda/include/cuda_runtime.h /usr/include/cuda_runtime.h)))
NVCC ?= $(firstword $(wildcard $(CUDA)/bin/nvcc) $(shell command -v nvcc 2>/dev/null))
EMU_OPTIMIZE ?= -O2
# Frame pointers for the reports; no aliasing rules, as in nvcc; no fused products; addresses below 4 GB for the checker.
EMU_FLAGS := -std=c++17 $(EMU_OPTIMIZE) -g -fno-omit-frame-pointer -fno-strict-aliasing -ffp-contract=off -no-pie -fno-pie \
             -Wall -Wextra $(if $(WERROR),-Werror) -isystem $(CUDA)/include
EMU_KERNELS := -Wno-unknown-pragmas -iquote . -include dev/emu/emu.h -fsanitize=alignment
EMU_CHECKED := -fsanitize=thread --param tsan-instrument-func-entry-exit=0
EMU_PARTS := build/emu/emu.o build/emu/cublaslt.o
vpath %.cu . dev/emu dev/cuda

# The trainer has no pragmas of OpenMP here: a process of the emulator has one thread.
EMU_LIBS := -lgomp $(LIBS)
build/emu/train_detr.cu: train_detr.cu build/emu/rewrite
	build/emu/rewrite $< > $@

EMU_TRAINER := build/emu/train_detr.cu train_detr.c $(HEADERS)
build/emu/test_detr-kernels.o build/emu/test_detr-checked.o build/emu/ladder-checked.o: $(EMU_TRAINER)
build/emu/test_detr-kernels.o build/emu/test_detr-checked.o: dev/cuda/reference.h dev/dump.h
build/emu/test_detr build/emu/test_detr-checked: build/emu/truth.o
build/emu/truth.o: dev/cuda/truth.c dev/cuda/reference.h train_detr.c $(HEADERS)
	@mkdir -p build/emu
	$(CC) $(CPPFLAGS) $(FLAGS) -Wno-unused-function -iquote . -UREAL -DREAL=double -c $< -o $@
build/emu/test_detr build/emu/test_detr-checked build/emu/ladder-checked build/emu/ladder-counted: LDLIBS = $(EMU_LIBS)
build/emu/test_detr-kernels.o build/emu/test_detr-checked.o build/emu/ladder-checked.o: EMU_KERNELS += -Wno-unused-function

train_detr_emu test_detr_emu: %_emu: build/emu/% FORCE
	@cmp -s $< $@ || cp -f $< $@

# emu-test: the emulator's own tests. emu-check: the kernels of train_detr.cu against train_detr.c. Both plain and
# with the checker.
# cuda-ladder: the way from naive kernels to the trainer's, every version checked, then counted. LADDER=--quick: small.
ifeq ($(CUDA),)
emu-test emu-check cuda-ladder:
	@echo "$@: left out: CUDA's headers are missing. A GPU is not needed. Install the toolkit (Debian, Ubuntu:" >&2
	@echo "nvidia-cuda-dev), name its place with CUDA=/path, or take the headers alone from PyPI (6 MB): make cuda-headers" >&2
	@exit 1
else
emu-test: build/emu/self_test build/emu/self_test-checked
emu-check: build/emu/test_detr build/emu/test_detr-checked
emu-test emu-check:
	@$(word 1,$^) >build/emu/$@.txt; $(word 2,$^) >build/emu/$@-checked.txt; \
	    sed '/ passed, /d' build/emu/$@.txt build/emu/$@-checked.txt; \
	    sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed$$/\1 \2/p' build/emu/$@.txt build/emu/$@-checked.txt | \
	    awk '{ p += $$1; f += $$2 } END { if (NR < 2) f++; print p + 0 " passed, " f " failed"; exit f > 0 }'

cuda-ladder: build/emu/ladder-checked build/emu/ladder-counted
	build/emu/ladder-checked --quick
	build/emu/ladder-counted $(LADDER)
endif

# cublasLt.h comes with the library only, 400 MB, of which the header stays: CUBLAS=1. Without it the tests of linear
# layers and of the network are left out.
CUBLAS ?=
cuda-headers: $(if $(CUDA),,build/cuda-headers/ready)
build/cuda-headers/ready:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv: apt-get install python3-venv" >&2; exit 1; }
	rm -rf build/cuda-headers
	$(PYTHON) -m venv build/cuda-headers/venv
	build/cuda-headers/venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target build/cuda-headers \
	    'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
	    $(if $(CUBLAS),'nvidia-cublas==13.0.*')
	rm -rf build/cuda-headers/nvidia/cu13/lib
	@touch $@

build/emu/rewrite: dev/emu/rewrite.c
	@mkdir -p build/emu
	$(CC) -std=gnu11 -O1 -Wall -Wextra $(if $(WERROR),-Werror) $< -o $@

build/emu/%.o: dev/emu/%.cpp dev/emu/emu.h
	@mkdir -p build/emu
	$(CXX) $(EMU_FLAGS) -c $< -o $@

build/emu/%.cpp: %.cu build/emu/rewrite
	build/emu/rewrite $< > $@

build/emu/%-kernels.o: build/emu/%.cpp dev/emu/emu.h program/ptx.h
	$(CXX) $(EMU_FLAGS) $(EMU_KERNELS) -c $< -o $@

build/emu/%-checked.o: build/emu/%.cpp dev/emu/emu.h program/ptx.h
	$(CXX) $(EMU_FLAGS) $(EMU_KERNELS) $(EMU_CHECKED) -c $< -o $@
	objcopy --redefine-sym memcpy=emu_memcpy --redefine-sym memmove=emu_memmove --redefine-sym memset=emu_memset $@

build/emu/%-checked: build/emu/%-checked.o build/emu/check.o build/emu/atomics.o $(EMU_PARTS)
	$(CXX) -no-pie $^ -o $@ $(LDLIBS)

build/emu/%-counted: build/emu/%-checked.o build/emu/count.o build/emu/atomics.o $(EMU_PARTS)
	$(CXX) -no-pie $^ -o $@ $(LDLIBS)

build/emu/train_detr: LDLIBS = $(EMU_LIBS)
build/emu/train_detr-kernels.o: $(EMU_TRAINER)
build/emu/train_detr-kernels.o: EMU_KERNELS += -Wno-unused-function
build/emu/self_test build/emu/test_detr build/emu/train_detr: build/emu/%: build/emu/%-kernels.o $(EMU_PARTS)
	$(CXX) -no-pie $^ -o $@ $(LDLIBS)

.PRECIOUS: build/emu/%.cpp build/emu/%.o

NVCC_FLAGS := -std=c++17 -Werror all-warnings -Xcompiler -Wall,-Wextra
emu-nvcc:
	@[ -n "$(NVCC)" ] || { echo "emu-nvcc: left out: no nvcc; name it with NVCC=/path/nvcc" >&2; exit 1; }
	@mkdir -p build/emu
	for sm in 80 90; do \
	    $(NVCC) $(NVCC_FLAGS) -arch=sm_$$sm -I. -c dev/emu/self_test.cu -o build/emu/self_test-sm_$$sm.o || exit 1; \
	done

# Through nvcc for SM, any warning an error; not run.
SM ?= 80
TEST_CU := build/cuda/test_detr-sm_$(SM)
$(TEST_CU).o: test_detr.cu train_detr.cu train_detr.c dev/cuda/reference.h dev/dump.h $(HEADERS)
	@[ -n "$(NVCC)" ] || { echo "$@: left out: no nvcc; name it with NVCC=/path/nvcc" >&2; exit 1; }
	@mkdir -p build/cuda
	@$(NVCC) $(NVCC_FLAGS),-Wno-unused-function,-fopenmp -arch=sm_$(SM) -O3 -Xptxas -v -I. -c $< -o $@ 2>$(TEST_CU).txt || \
	    { cat $(TEST_CU).txt >&2; exit 1; }
cuda-nvcc: $(TEST_CU).o
	@echo "$<: compiled without a warning by $$($(NVCC) --version | sed -n 's/.*release/nvcc/p')"

# The tests on a GPU of SM and newer.
test_detr_cu: $(TEST_CU).o build/emu/truth.o
	$(NVCC) -arch=sm_$(SM) $^ -o $@ $(LIBS) -lgomp -lcublasLt

# For a GPU of SM and newer. 177: a function that is not called, of which train_detr.c has some.
train_detr_cu: train_detr.cu train_detr.c $(HEADERS)
	@[ -n "$(NVCC)" ] || { echo "$@: left out: no nvcc; name it with NVCC=/path/nvcc" >&2; exit 1; }
	$(NVCC) $(NVCC_FLAGS),-Wno-unused-function,-fopenmp -diag-suppress 177 -arch=sm_$(SM) -O3 -I. $< -o $@ $(LIBS) -lgomp -lcublasLt

# For a GPU; prints times.
build/cuda/ladder: dev/cuda/ladder.cu train_detr.cu train_detr.c $(HEADERS)
	@[ -n "$(NVCC)" ] || { echo "$@: left out: no nvcc; name it with NVCC=/path/nvcc" >&2; exit 1; }
	@mkdir -p build/cuda
	$(NVCC) $(NVCC_FLAGS),-Wno-unused-function,-fopenmp -diag-suppress 177 -arch=sm_$(SM) -O3 -I. $< -o $@ $(LIBS) -lgomp

# The toolkit's, or the one that comes with PyTorch.
CUOBJDUMP ?= $(firstword $(wildcard $(dir $(NVCC))cuobjdump) $(shell command -v cuobjdump 2>/dev/null) \
               $(wildcard $(VENV)/lib/python3*/site-packages/triton/backends/nvidia/bin/cuobjdump))
sass: cuda-nvcc
	@[ -n "$(CUOBJDUMP)" ] || { echo "sass: left out: no cuobjdump; it is in the toolkit and on PyPI (nvidia-cuda-cuobjdump):" \
	    "CUOBJDUMP=/path/cuobjdump" >&2; exit 1; }
	@$(PYTHON) dev/sass.py $(SM) $(TEST_CU).txt $(TEST_CU).o $(CUOBJDUMP)

# ----------------------------------------------------------------------------------------------------------------------
# The demo. A run that is there already goes on where it stopped; nothing there is ever removed.

DEMO ?= out/demo
DEMO_FLAGS ?=

demo: install-deps
	@$(MAKE) --no-print-directory train_detr
	@dev/demo.sh $(DEMO) data/bccd trainval test --vflip --transpose --epochs 40 \
		--eval_every 10 $(DEMO_FLAGS)

# The annotations come last: where they are, the pictures are whole.
DEMO_SHAPES ?= out/demo-shapes
SHAPES ?= out/shapes

demo-shapes: install-deps
	@$(MAKE) --no-print-directory train_detr make_shapes
	@[ -d $(SHAPES)/annotations ] || ./make_shapes $(SHAPES)
	@dev/demo.sh $(DEMO_SHAPES) $(SHAPES) train val --vflip --scales 0 --short_side 192 --max_size 192 \
		--num_queries 50 --epochs 9 --eval_every 3 $(DEMO_FLAGS)

install-deps:
	@$(EXPORTED) dev/install.sh

# ----------------------------------------------------------------------------------------------------------------------
# House-keeping

EMU_SOURCES := $(wildcard *.cu dev/emu/*.c dev/emu/*.cpp dev/emu/*.h dev/emu/*.cu dev/cuda/*.cu)

format:
	clang-format -i *.c data/*.[ch] program/*.[ch] dev/*.[ch] dev/cpu/*.c dev/cuda/*.[ch] dev/fuzz/*.c $(EMU_SOURCES)

check-format:
	clang-format --dry-run -Werror *.c data/*.[ch] program/*.[ch] dev/*.[ch] dev/cpu/*.c dev/cuda/*.[ch] dev/fuzz/*.c $(EMU_SOURCES)

clean:
	rm -rf build train_detr train_detr_cu train_detr_emu test_detr test_detr_cu test_detr_emu make_shapes

FORCE:
