#!/bin/sh
# What `make demo` does once ./train_detr is built: trains --preset small from random weights on data/bccd's trainval
# pictures, evaluates it on the test pictures, which it has not seen, and draws its boxes on some of them. Cells have no
# up: --vflip.
#
#   dev/demo.sh OUT [more flags for train]
#
# A demo that is already in OUT goes on where it stopped (a finished one is only evaluated and drawn again). Anything
# else that lies there is left alone: the script stops and says so.
set -eu

out=$1
shift
data=data/bccd
split="test"

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
    if ! ./train_detr train --resume "$out" --data $data "$@"; then
        echo "demo: to start afresh instead, move it away: mv $out $out.before" >&2
        exit 1
    fi
else
    ./train_detr train --preset small --vflip --data $data --train_split trainval --split $split --eval_every 5 \
        --output_dir "$out" "$@"
fi

echo
./train_detr eval --data $data --resume "$out" --split $split --json "$out/eval.json"

echo
pictures=
for name in $(head -n 8 $data/ImageSets/Main/$split.txt); do
    pictures="$pictures $data/JPEGImages/$name.jpg"
done
# shellcheck disable=SC2086 # a list of words
./train_detr predict --resume "$out" --json "$out/predictions.json" --draw "$out/pictures" $pictures

echo
echo "Look at:"
echo "    $out/pictures/          test pictures with the boxes the model found"
echo "    $out/report.html        loss and AP over the epochs, in a browser"
echo "    $out/eval.json          the twelve COCO figures and AP by class"
echo "    $out/predictions.json   the same boxes as numbers"
echo "    $out/model.safetensors  the weights; dev/oracle.py's TrainDetr.from_pretrained(\"$out\") opens the folder in Python"
echo "Your own pictures:  ./train_detr predict --resume $out --draw out/mine PICTURE..."
