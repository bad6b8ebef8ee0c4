#!/bin/bash
# Same command, same bytes: trains a small model on data/bccd in many ways that must not matter and compares the
# checkpoint's tensors byte for byte: a second run, 1 and 2 threads, micro-batches, worker threads, and runs that
# SIGKILL stops at a random moment and that are resumed.
#
#   dev/determinism.sh [number of kills, default 10]
#
# Prints one line a check and ends with "N passed, N failed"; exit status 1 when one failed. Run from the top folder
# after `make train_detr`. PROGRAM names another binary; SEED another sequence of moments (default: the clock).
set -u

kills=${1:-10}
program=${PROGRAM:-./train_detr}
out=build/determinism
RANDOM=${SEED:-$$}
passed=0
failed=0

rm -rf "$out"
mkdir -p "$out"

# Everything that matters for the bytes; steps, sizes and layers are small to be quick. Dropout and augmentation are on.
settings=(--data data/bccd --backbone tiny --enc_layers 1 --dec_layers 2 --dim_feedforward 64 --hidden_dim 32
    --nheads 4 --num_queries 20 --short_side 96 --max_size 160 --batch_size 4 --norm_init calibrate --steps 8)

train() { # train NAME FLAGS...: a run from the start
    "$program" train --output_dir "$out/$1" "${settings[@]}" "${@:2}" >"$out/$1.log" 2>&1
}

compare() { # compare NAME WHAT: are its tensors those of the first run?
    local file
    for file in model.safetensors optimizer.safetensors; do
        if ! cmp -s "$out/base/$file" "$out/$1/$file"; then
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

start=$(date +%s%N)
if ! OMP_NUM_THREADS=2 train base; then
    cat "$out/base.log"
    echo "0 passed, 1 failed"
    exit 1
fi
milliseconds=$((($(date +%s%N) - start) / 1000000))

OMP_NUM_THREADS=2 train again
compare again "a second run"
OMP_NUM_THREADS=1 train thread1
compare thread1 "1 thread"
OMP_NUM_THREADS=3 train thread3
compare thread3 "3 threads"
for micro in 1 2 4; do
    train "micro$micro" --micro_batch "$micro"
    compare "micro$micro" "--micro_batch $micro"
done
train workers0 --num_workers 0
compare workers0 "--num_workers 0"
train workers3 --num_workers 3 --prefetch 1
compare workers3 "--num_workers 3 --prefetch 1"

# A checkpoint each step, so that a kill falls into the writing of one as often as into a step. A run that was killed
# before its first checkpoint starts again; a run may be killed several times.
train saved --save_steps 1
compare saved "--save_steps 1"
for kill in $(seq "$kills"); do
    name=kill$kill
    mkdir -p "$out/$name"
    attempts=0
    while :; do
        if [ -e "$out/$name/trainer_state.json" ] || [ -e "$out/$name/.commit/trainer_state.json" ]; then
            command=("$program" train --data data/bccd --resume "$out/$name")
        else
            command=("$program" train --output_dir "$out/$name" "${settings[@]}" --save_steps 1)
        fi
        attempts=$((attempts + 1))
        "${command[@]}" >"$out/$name.log" 2>&1 &
        process=$!
        if [ "$attempts" -le 2 ]; then # two kills a run, then it may finish
            wait_ms=$((RANDOM * 32768 % (milliseconds * 11 / 10 + 1) + RANDOM % 50))
            sleep "$(printf '%d.%03d' $((wait_ms / 1000)) $((wait_ms % 1000)))"
            kill -9 "$process" 2>/dev/null
        fi
        wait "$process" 2>/dev/null
        status=$?
        [ "$status" = 0 ] && break
        if [ "$status" != 137 ]; then break; fi # an error of its own: the comparison reports it
    done
    if [ -e "$out/$name/.next" ] || [ -e "$out/$name/.commit" ]; then
        failed=$((failed + 1))
        echo "FAILED: $out/$name: a finished run left half-written files behind"
    fi
    compare "$name" "killed at random moments, $attempts starts"
done

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
