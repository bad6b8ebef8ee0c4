#!/usr/bin/env python3
"""Speed of the data side: loading pictures beside DETR's own transforms, average precision beside pycocotools, opening
an annotation file of COCO's size. One thread, the programs taking turns.

    python dev/bench_data.py [--data data/bccd] [--rounds 5] [--program build/float/bench_data] [--markdown FILE]

Loading is all between a file and the network's input: decode, mirror, resize or resize-crop-resize as in training,
normalise. Python's side is datasets/transforms.py of facebookresearch/detr as its paper's training composes it, with
Pillow and torchvision. Scoring counts reading both files as well as evaluating.
"""
import argparse
import contextlib
import glob
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

SCALES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]


# ----------------------------------------------------------------------------------------------------------------------
# Loading in Python: functions of (PIL image, boxes x0 y0 x1 y1 as a tensor, labels)


def resized_size(width, height, short, longest):
    small, large = min(width, height), max(width, height)
    if longest is not None and large / small * short > longest:
        short = int(round(longest * small / large))
    if small == short:
        return width, height
    return (short, int(short * height / width)) if width < height else (int(short * width / height), short)


def load(path, boxes, labels):
    """One sample as in training: pixels (3, height, width), normalised, and boxes cx cy w h in 0..1."""
    import torch
    import torchvision.transforms.functional as F
    from PIL import Image

    def resize(image, boxes, short, longest):
        width, height = resized_size(*image.size, short, longest)
        ratios = torch.as_tensor([width / image.width, height / image.height] * 2)
        return F.resize(image, (height, width)), boxes * ratios

    def random_crop(image, boxes, labels, low, high):
        width = random.randint(min(low, image.width), min(image.width, high))
        height = random.randint(min(low, image.height), min(image.height, high))
        left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
        boxes = boxes - torch.as_tensor([left, top, left, top])
        boxes = torch.min(boxes.reshape(-1, 2, 2), torch.as_tensor([width, height])).clamp(min=0)
        keep = torch.all(boxes[:, 1] > boxes[:, 0], dim=1)
        return F.crop(image, top, left, height, width), boxes.reshape(-1, 4)[keep], labels[keep]

    image = Image.open(path).convert("RGB")
    boxes, labels = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.as_tensor(labels)
    if random.random() < 0.5:
        image = F.hflip(image)
        boxes = boxes[:, [2, 1, 0, 3]] * torch.as_tensor([-1, 1, -1, 1]) + torch.as_tensor([image.width, 0] * 2)
    if random.random() < 0.5:
        image, boxes = resize(image, boxes, random.choice([400, 500, 600]), None)
        image, boxes, labels = random_crop(image, boxes, labels, 384, 600)
    image, boxes = resize(image, boxes, random.choice(SCALES), 1333)
    pixels = F.normalize(F.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    boxes = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1)
    return pixels, boxes / torch.tensor([image.width, image.height] * 2, dtype=torch.float32), labels


def load_all(folder):
    """[Seconds a picture], over the list in the folder."""
    import torch

    torch.set_num_threads(1)
    with open(os.path.join(folder, "pictures.json")) as file:
        pictures = json.load(file)
    for name in pictures[:5]:
        load(name, [[1, 2, 30, 40]] * 7, [1] * 7)
    start = time.process_time()
    for name in pictures:
        load(name, [[1, 2, 30, 40]] * 7, [1] * 7)
    return [(time.process_time() - start) / len(pictures)]


# ----------------------------------------------------------------------------------------------------------------------
# Average precision in Python


def score_all(folder):
    """Seconds to read, seconds to evaluate, average precision."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(os.path.join(folder, "truth.json"))
        found = truth.loadRes(os.path.join(folder, "found.json"))
        read = time.process_time()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return read - start, time.process_time() - read, evaluation.stats[0]


def open_all(folder):
    """Seconds to open, peak memory in bytes."""
    from pycocotools.coco import COCO

    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        COCO(os.path.join(folder, "instances.json"))
    return time.process_time() - start, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ----------------------------------------------------------------------------------------------------------------------
# Files to read


def write_results(folder, images=1000, detections=100, classes=80):
    """truth.json and found.json: 7 boxes an image, found more or less well, and much that is not there."""
    rng = random.Random(1)
    truth, found = [], []
    for image in range(1, images + 1):
        for _ in range(7):
            size = [rng.uniform(8, 300), rng.uniform(8, 300)]
            box = [rng.uniform(0, 640 - size[0]), rng.uniform(0, 480 - size[1]), *size]
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": rng.randint(1, classes), "bbox": box,
                          "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.01)})
        for _ in range(detections):
            near = rng.choice(truth[-7:])
            moved = [b + rng.gauss(0, 0.1) * near["bbox"][2 + i % 2] for i, b in enumerate(near["bbox"])]
            label = near["category_id"] if rng.random() < 0.5 else rng.randint(1, classes)
            found.append({"image_id": image, "category_id": label, "bbox": moved[:2] + [abs(b) for b in moved[2:]],
                          "score": rng.random()})
    names = [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)]
    files = [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in range(1, images + 1)]
    for name, content in ("truth", {"images": files, "annotations": truth, "categories": names}), ("found", found):
        with open(os.path.join(folder, name + ".json"), "w") as file:
            json.dump(content, file)


def write_annotations(folder, images=118287, boxes=860001):
    """instances.json as large as COCO's instances_train2017.json, with polygons."""
    rng = random.Random(2)
    polygons = [[[round(rng.uniform(0, 640), 2) for _ in range(rng.randint(16, 90))]] for _ in range(500)]
    with open(os.path.join(folder, "instances.json"), "w") as file:
        file.write('{"info": {"year": 2017}, "images": [')
        for i in range(images):
            file.write(("," if i else "") + json.dumps(
                {"license": 3, "file_name": f"{i:012}.jpg", "coco_url": f"http://images.cocodataset.org/{i:012}.jpg",
                 "height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": i + 1}))
        file.write('], "annotations": [')
        for i in range(boxes):
            box = [round(rng.uniform(0, 300), 2) for _ in range(4)]
            file.write(("," if i else "") + json.dumps(
                {"segmentation": polygons[i % 500], "area": round(box[2] * box[3], 4), "iscrowd": 0,
                 "image_id": rng.randint(1, images), "bbox": box, "category_id": rng.randint(1, 80), "id": i + 1}))
        file.write('], "categories": ' + json.dumps([{"id": i, "name": f"class {i}"} for i in range(1, 81)]) + "}")


# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/bccd", help="a data set whose train split is loaded")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program in loading and scoring")
    parser.add_argument("--program", default="build/float/bench_data", help="dev/bench_data.c, compiled")
    parser.add_argument("--markdown", help="write the table here as well")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)  # what to do, folder
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.peer:
        return print(*globals()[options.peer[0]](options.peer[1]))

    def ask(*command):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: status {done.returncode}")
        return [float(number) for number in done.stdout.split()]

    def theirs(what, folder):
        return ask(sys.executable, __file__, "--peer", what, folder)

    load_times, score_times = ([], []), ([], [])
    with tempfile.TemporaryDirectory() as folder:
        write_results(folder)
        pictures = sorted(glob.glob(os.path.join(options.data, "JPEGImages", "*.jpg"))
                          or glob.glob(os.path.join(options.data, "train*", "*.jpg")))
        with open(os.path.join(folder, "pictures.json"), "w") as file:
            json.dump(pictures, file)
        for _ in range(options.rounds):
            count, seconds = ask(options.program, "load", options.data, "train", "2")
            load_times[0].append(seconds / count)
            load_times[1].extend(theirs("load_all", folder))
            ours = ask(options.program, "score", os.path.join(folder, "truth.json"), os.path.join(folder, "found.json"))
            python = theirs("score_all", folder)
            if ours[2] != python[2]:
                sys.exit(f"average precision: {ours[2]}, pycocotools says {python[2]}")
            score_times[0].append(ours[:2])
            score_times[1].append(python[:2])
        write_annotations(folder)
        size = os.path.getsize(os.path.join(folder, "instances.json"))
        opened = [ask(options.program, "open", os.path.join(folder, "instances.json"))[2:],
                  theirs("open_all", folder)]

    rows = []
    speeds = [1 / statistics.median(times) for times in load_times]
    rows.append([f"pictures of {os.path.basename(options.data)} loaded and augmented, a second and core",
                 *[f"{speed:.0f}" for speed in speeds], speeds[0] / speeds[1]])
    for name, part in ("reading the two files", 0), ("evaluating", 1), ("both", None):
        ours, python = ([sum(t) if part is None else t[part] for t in times] for times in score_times)
        ours, python = statistics.median(ours), statistics.median(python)
        rows.append([f"average precision, 1,000 images with 100 detections: {name}", f"{ours:.3f} s", f"{python:.3f} s",
                     python / ours])
    for name, text, part in (("seconds", "{:.2f} s", 0), ("memory", "{:.0f} MiB", 1)):
        scale = 2**20 if part else 1
        rows.append([f"opening {size / 1e6:.0f} MB of annotations, {name}",
                     *[text.format(values[part] / scale) for values in opened], opened[1][part] / opened[0][part]])
    table = "| | ours | Python | ratio |\n| --- | ---: | ---: | ---: |\n"
    table += "".join(f"| {name} | {ours} | {python} | {ratio:.1f} |\n" for name, ours, python, ratio in rows)
    print(table, end="")
    if options.markdown:
        with open(options.markdown, "w") as file:
            file.write(table)


if __name__ == "__main__":
    main()
