#!/bin/bash
# Same command, same bytes: trains a small model on data/bccd in many ways that must not matter and compares the
# checkpoint's tensors and log byte for byte: a second run, other numbers of threads, pictures side by side (as many as
# there are threads, in the plain run too) and one at a time (with --micro_batch 1), worker threads, checkpoints after
# each step, and another number of threads with every option that keeps something from step to step or from epoch to
# epoch. Runs that are killed and go on are dev/survive.py's.
#
# Prints one line a check and ends with "N passed, N failed"; exit status 1 when one failed. Run from the top folder
# after `make train_detr`. PROGRAM names another binary.
set -u

program=${PROGRAM:-./train_detr}
out=build/determinism
passed=0
failed=0

rm -rf "$out"
mkdir -p "$out"

# Everything that matters for the bytes; steps, sizes and layers are small to be quick. Dropout and augmentation are on.
settings=(--data data/bccd --backbone tiny --enc_layers 1 --dec_layers 2 --dim_feedforward 64 --hidden_dim 32
    --nheads 4 --num_queries 20 --short_side 96 --max_size 160 --batch_size 4 --norm_init calibrate --steps 8)

# Over some epochs, with evaluations: what schedule, average, best checkpoint, augmentation and norms that follow the
# pictures (from the ninth step on) keep or do.
options=("${settings[@]}" --train_split test --split test --batch_size 24 --steps 10 --lr_schedule cosine --warmup_steps 3
    --ema 0.9 --patience 3 --scales 0.3 --vflip --transpose --norm_init track)

train() { # train NAME FLAGS...: a run from the start
    "$program" train --output_dir "$out/$1" "${@:2}" >"$out/$1.log" 2>&1
}

content() { # content FILE: without the seconds that a log's epochs took
    if [[ $1 == *log.txt ]]; then sed 's/, "seconds": [0-9.]*}$/}/' "$1"; else cat "$1"; fi
}

compare() { # compare NAME WHAT BASE: are its tensors and its log those of the run BASE?
    local file
    for file in $(cd "$out/$3" && find . -name '*.safetensors' -o -name log.txt); do
        if ! cmp -s <(content "$out/$3/$file") <(content "$out/$1/$file"); then
            failed=$((failed + 1))
            echo "FAILED: $2: $file differs from the plain run's ($out/$1; its output: $out/$1.log)"
            tail -n 3 "$out/$1.log"
            return
        fi
    done
    passed=$((passed + 1))
    echo "ok: $2"
    rm -rf "${out:?}/$1" "$out/$1.log"
}

base() { # base NAME FLAGS...: the run that others are compared with
    if ! OMP_NUM_THREADS=2 train "$@"; then
        cat "$out/$1.log"
        echo "$passed passed, $((failed + 1)) failed"
        exit 1
    fi
}

base plain "${settings[@]}"
if grep -q ', 2 in flight$' "$out/plain.log"; then
    passed=$((passed + 1))
    echo "ok: two pictures run side by side"
else
    failed=$((failed + 1))
    echo "FAILED: two pictures do not run side by side: $out/plain.log"
fi
OMP_NUM_THREADS=2 train again "${settings[@]}"
compare again "a second run" plain
OMP_NUM_THREADS=1 train thread1 "${settings[@]}"
compare thread1 "1 thread" plain
for threads in 3 4; do
    OMP_NUM_THREADS=$threads train "thread$threads" "${settings[@]}"
    compare "thread$threads" "$threads threads" plain
done
for micro in 1 2 4; do
    OMP_NUM_THREADS=2 train "micro$micro" "${settings[@]}" --micro_batch "$micro"
    compare "micro$micro" "--micro_batch $micro" plain
done
train workers0 "${settings[@]}" --num_workers 0
compare workers0 "--num_workers 0" plain
train workers3 "${settings[@]}" --num_workers 3 --prefetch 1
compare workers3 "--num_workers 3 --prefetch 1" plain
train saved "${settings[@]}" --save_steps 1
compare saved "--save_steps 1" plain

base options "${options[@]}"
OMP_NUM_THREADS=3 train thread3 "${options[@]}"
compare thread3 "options: 3 threads" options

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
