#!/bin/sh
# What `make demo` does once ./train_detr is built: trains the small model of --preset demo on data/bccd, evaluates it
# on the validation pictures and draws its boxes on some of them. `make demo-shapes` does the same with other DATA, in
# COCO's layout, and another PRESET.
#
#   [DATA=data/bccd] [PRESET=demo] dev/demo.sh OUT [more flags for train]
#
# A demo that is already in OUT goes on where it stopped (a finished one is only evaluated and drawn again). Anything
# else that lies there is left alone: the script stops and says so.
set -eu

out=$1
shift
data=${DATA:-data/bccd}
preset=${PRESET:-demo}
split=val

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
    if ! ./train_detr train --resume "$out" --data "$data" "$@"; then
        echo "demo: to start afresh instead, move it away: mv $out $out.before" >&2
        exit 1
    fi
else
    ./train_detr train --preset "$preset" --data "$data" --output_dir "$out" "$@"
fi

echo
./train_detr eval --data "$data" --resume "$out" --split $split --json "$out/eval.json"

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
echo "    $out/pictures/          validation pictures with the boxes the model found"
echo "    $out/report.html        loss and AP over the epochs, in a browser"
echo "    $out/eval.json          the twelve COCO figures and AP by class"
echo "    $out/predictions.json   the same boxes as numbers"
echo "    $out/model.safetensors  the weights; DetrForObjectDetection.from_pretrained(\"$out\") opens the folder"
echo "Your own pictures:  ./train_detr predict --resume $out --draw out/mine PICTURE..."
