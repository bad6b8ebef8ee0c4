#!/usr/bin/env python3
"""
Fine-tuning from end to end, on data/bccd (make finetune): a network is trained on one half of the pictures and
fine-tuned on the other half, with other classes. What doc/fine-tuning.md promises is checked:

    fewer classes     that the network knows: its class head is kept, and labels are found by name
    other classes     the class head starts afresh, and the program says so
    frozen parts      are the same bytes afterwards, and everything else is not
    a head start      after one epoch the loss is lower than that of a network that starts from random weights

    dev/finetune.py [--program ./train_detr]

Needs Python's standard library only, and some twenty seconds of one core. Ends with "N passed, N failed".
"""
import argparse
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BCCD, OUT = ROOT / "data" / "bccd", ROOT / "build" / "finetune"
NETWORK = """--backbone tiny --enc_layers 1 --dec_layers 2 --dim_feedforward 128 --hidden_dim 64 --nheads 4 --num_queries 32
             --dropout 0 --decoder anchor --class_loss focal""".split()
RUN = "--short_side 96 --max_size 128 --scales 0 --lr 1e-3 --lr_backbone 1e-3 --num_workers 1".split()
passed = failed = 0


def check(what, ok):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok      ' if ok else 'FAILED  '}{what}", flush=True)


def data_set(name, train, val, classes):
    """A Pascal VOC folder with these pictures; classes: what each class of data/bccd is called here, None to leave it out."""
    folder = OUT / name
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "JPEGImages").symlink_to(BCCD / "JPEGImages")
    for split, pictures in (("train", train), ("val", val)):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(pictures) + "\n")
        for picture in pictures:
            def rename(found):
                called = classes[found.group(2)]
                return called and found.group(1) + called + found.group(3)
            text = (BCCD / "Annotations" / f"{picture}.xml").read_text()
            text = re.sub(r"(<object>\s*<name>)(\w+)(</name>.*?</object>)", lambda found: rename(found) or "", text, flags=re.S)
            (folder / "Annotations" / f"{picture}.xml").write_text(text)
    return folder


def train(name, data, *flags):
    """Trains into OUT/name. Returns what it printed."""
    command = [program, "train", "--data", data, "--output_dir", OUT / name, *RUN, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{name}: status {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout


def tensors(name):
    """{name: bytes} of a checkpoint's weights."""
    data = (OUT / name / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return {key: data[8 + size + entry["data_offsets"][0]:8 + size + entry["data_offsets"][1]]
            for key, entry in json.loads(data[8:8 + size]).items() if key != "__metadata__"}


def test_loss(name):
    return json.loads((OUT / name / "log.txt").read_text().splitlines()[-1])["test_loss"]


def check_frozen(name, parts):
    """Are exactly the tensors that belong to these parts, and what pretrained backbones never train, as they were?"""
    before, after = tensors("first"), tensors(name)
    always = re.compile(r"running_|normalization|embedder|stages\.0\.")
    wrong = []
    for key in before.keys() & after.keys():
        inner = key.removeprefix("model.")
        frozen = any(inner.startswith(part + ".") for part in parts) or ("backbone" in key and always.search(key))
        if "class_labels_classifier" not in key and (before[key] == after[key]) != bool(frozen):
            wrong.append(key)
    check(f"{name}: frozen tensors ({', '.join(parts) or 'none'}) are the same bytes, others are not {wrong[:3] or ''}",
          len(before) == len(after) and not wrong)


def main():
    global program
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", default=ROOT / "train_detr", type=pathlib.Path)
    program = parser.parse_args().program.resolve()
    shutil.rmtree(OUT, ignore_errors=True)
    lists = {split: (BCCD / "ImageSets" / "Main" / f"{split}.txt").read_text().split() for split in ("train", "val")}
    half, val = len(lists["train"]) // 2, lists["val"][:40]
    known = dict(RBC="RBC", WBC="WBC", Platelets="Platelets")
    first = data_set("data-first", lists["train"][:half], val, known)
    fewer = data_set("data-fewer", lists["train"][half:], val, dict(known, Platelets=None))
    other = data_set("data-other", lists["train"][half:], val, dict(RBC="red", WBC="not red", Platelets="not red"))

    train("first", first, *NETWORK, "--batch_size", 4, "--epochs", 6, "--eval_every", 6)
    start = ["--pretrained", OUT / "first", "--batch_size", 8, "--epochs", 1]

    said = train("fewer", fewer, *start, "--freeze", "backbone,input_projection,encoder")
    check("fewer: the class head is kept", "class head is kept: all 2 classes are in" in said)
    classes = json.loads((OUT / "fewer" / "trainer_state.json").read_text())["classes"]
    check("fewer: classes are found by name", [(c["name"], c["label"]) for c in classes] == [("RBC", 1), ("WBC", 2)])
    check_frozen("fewer", ["backbone", "input_projection", "encoder"])
    train("fewer-scratch", fewer, *NETWORK, "--batch_size", 8, "--epochs", 1)
    losses = test_loss("fewer"), test_loss("fewer-scratch")
    check("fewer: loss %.2f, from random weights %.2f" % losses, losses[0] < 0.9 * losses[1])

    said = train("other", other, *start)
    check("other: the class head starts afresh", "class head starts afresh: 2 of 2 classes are not in" in said)
    check_frozen("other", [])
    train("other-scratch", other, *NETWORK, "--batch_size", 8, "--epochs", 1)
    losses = test_loss("other"), test_loss("other-scratch")
    check("other: loss %.2f, from random weights %.2f" % losses, losses[0] < 0.9 * losses[1])

    train("heads", fewer, *start, "--freeze", "model")
    check_frozen("heads", ["backbone", "input_projection", "query_position_embeddings", "query_content_embeddings", "encoder",
                           "decoder"])
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
