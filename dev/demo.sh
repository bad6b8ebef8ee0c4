#!/bin/sh
# What `make demo` and `make demo-shapes` do once ./train_detr is built: train --preset small from random weights on a data
# set's TRAIN_SPLIT, evaluate it on SPLIT, which it has not seen, and draw its boxes on some of SPLIT's pictures.
#
#   dev/demo.sh OUT DATA TRAIN_SPLIT SPLIT [more flags for train]
#
# A demo that is already in OUT goes on where it stopped (a finished one is only evaluated and drawn again). Anything
# else that lies there is left alone: the script stops and says so.
set -eu

out=$1
data=$2
train_split=$3
split=$4
shift 4

# Where the processor multiplies bf16 training takes two thirds of the time, and AP is the same (doc/7-recipes.md).
case $(./train_detr --help | sed -n 's/^Kernel: \([^.]*\).*/\1/p') in
*bf16*) precision=bf16 ;;
*) precision=fp32 ;;
esac

# .demo marks the folder as ours, also before there is a checkpoint.
if [ -e "$out" ] && [ ! -e "$out/.demo" ] && { [ ! -d "$out" ] || [ -n "$(ls -A "$out")" ]; }; then
    echo "demo: $out holds something that is not a run of this demo; move it away: mv $out $out.before" >&2
    exit 1
fi
mkdir -p "$out"
: >"$out/.demo"

# The second is where a run that was killed while it wrote a checkpoint has it (data/fileset.h).
if [ -e "$out/trainer_state.json" ] || [ -e "$out/.commit/trainer_state.json" ]; then
    echo "demo: $out holds a run: going on with it"
    if ! ./train_detr train --resume "$out" --data "$data" --precision "$precision" "$@"; then
        echo "demo: to start afresh instead, move it away: mv $out $out.before" >&2
        exit 1
    fi
else
    ./train_detr train --preset small --data "$data" --train_split "$train_split" --split "$split" \
        --output_dir "$out" --precision "$precision" "$@"
fi

echo
./train_detr eval --data "$data" --resume "$out" --split "$split" --json "$out/eval.json"

echo
if [ -d "$data/JPEGImages" ]; then
    pictures=$(head -n 8 "$data/ImageSets/Main/$split.txt" | sed "s|.*|$data/JPEGImages/&.jpg|")
else
    pictures=$(find "$data/$split" -type f | sort | head -n 8)
fi
# shellcheck disable=SC2086 # a list of words
./train_detr predict --resume "$out" --json "$out/predictions.json" --draw "$out/pictures" $pictures

echo
echo "Look at:"
echo "    $out/pictures/          pictures it has not seen, with the boxes it found"
echo "    $out/report.html        how it learned, what it finds and misses and where it looks, in a browser"
echo "    $out/eval.json          the twelve COCO figures and AP by class"
echo "    $out/predictions.json   the same boxes as numbers"
echo "    $out/model.safetensors  the weights; dev/oracle.py's TrainDetr.from_pretrained(\"$out\") opens the folder in Python"
echo "Your own pictures:  ./train_detr predict --resume $out --draw out/mine PICTURE..."
