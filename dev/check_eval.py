"""COCOeval for boxes: `train_detr score` against pycocotools on random cases made to be awkward."""

import contextlib
import io
import json
import os
import random
import subprocess
import tempfile

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def random_case(case):
    """A small COCO annotation file and results for it, as Python objects. `case` is the seed."""
    rng = random.Random(case)
    kinds = {
        "whole": lambda low, high: float(rng.randint(int(low), int(high))),  # whole pixels: many exact ties in IoU
        "real": rng.uniform,
    }
    number = kinds[rng.choice(list(kinds))]
    num_images = rng.choice([1, 3, 10, 30])
    num_categories = rng.choice([1, 2, 5, 12])
    image_ids = rng.sample(range(1, 10**rng.choice([3, 12])), num_images)  # in no order, far beyond 32 bits at times
    category_ids = rng.sample(range(0, 200), num_categories)
    # Scores: few values (ties within and across images), many, or whole numbers.
    draw_score = rng.choice(
        [lambda: rng.random(), lambda: rng.choice([0.1, 0.5, 0.9]), lambda: round(rng.random(), 1), lambda: 1,
         lambda: rng.choice([-1, 0, 3])])
    side = rng.choice([40, 120, 640])

    def random_box():
        # One box in six has a side of exactly 32 or 96 pixels, one in fifteen no width or height.
        width, height = number(1, side), number(1, side)
        dice = rng.random()
        if dice < 0.15:
            width, height = rng.choice([(32, 32), (96, 96), (16, 64), (64, 144), (1024, 1), (32.0, 32.000000001)])
        elif dice < 0.22:
            width, height = rng.choice([(0, height), (width, 0), (0, 0)])
        return [number(-5, side), number(-5, side), width, height]

    annotations, results = [], []
    first_id = rng.choice([0, 1, 1, 1, 1000])  # pycocotools takes a match with annotation 0 for none: so do we
    for image_id in image_ids:
        if rng.random() < 0.15:
            continue  # an image without truth
        for category_id in category_ids[: max(1, num_categories - num_categories // 4)]:  # some classes stay empty
            for _ in range(rng.choice([0, 0, 1, 2, 6, 20])):
                box = random_box()
                crowd = int(rng.random() < 0.12)
                area = box[2] * box[3]
                if rng.random() < 0.3:
                    area = rng.choice([area * 0.6, 1024, 9216, 1023.9999999, 0, 1e10, 2e10])
                annotations.append({"image_id": image_id, "category_id": category_id, "bbox": box, "area": area,
                                    "iscrowd": crowd})
    rng.shuffle(annotations)
    for place, annotation in enumerate(annotations):
        annotation["id"] = first_id + place

    def random_result(image_id, category_id):
        box = random_box()
        near = [a for a in annotations if a["image_id"] == image_id and a["category_id"] == category_id]
        if near and rng.random() < 0.7:  # a detection of something: the truth, moved a little or not at all
            box = list(rng.choice(near)["bbox"])
            if rng.random() < 0.8:
                box = [b + number(-0.1 * max(box[2], 10), 0.1 * max(box[2], 10)) for b in box]
        if rng.random() < 0.02:
            box[rng.choice([2, 3])] *= -1
        return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": draw_score()}

    for image_id in image_ids:
        if rng.random() < 0.15:
            continue  # an image without detections
        for category_id in category_ids + [777]:  # 777 is no category
            for _ in range(rng.choice([0, 1, 3, 10, 30])):
                results.append(random_result(image_id, category_id))
    if case % 4 == 0:  # more than 100 detections of one class in one image
        results += [random_result(image_ids[0], category_ids[0]) for _ in range(230)]
    rng.shuffle(results)
    if case % 13 == 5:
        results = []
    if case % 17 == 7:
        annotations = []
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": side * 2, "height": side * 2} for i in image_ids],
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
        "annotations": annotations,
    }
    return truth, results


def pycocotools_scores(annotations_path, results_path):
    """The twelve numbers, {category id: AP}, and the twelve lines as text."""
    text = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations_path)
        with open(results_path) as file:
            results = json.load(file)
        if results:
            found = truth.loadRes(results_path)
        else:  # loadRes cannot read an empty list
            found = COCO()
            found.dataset = dict(truth.dataset, annotations=[])
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(text):
        evaluation.summarize()
    per_class = {}
    for k, category_id in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, k, 0, 2]
        precision = precision[precision > -1]
        per_class[category_id] = float(np.mean(precision)) if precision.size else -1.0
    return evaluation.stats, per_class, text.getvalue()


def check_eval(program="./train_detr", cases=60, limit=1e-9):
    """Runs `program score` on random cases; returns the largest difference to pycocotools; raises beyond `limit`."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        annotations_path, results_path, scores_path = (os.path.join(folder, f"{n}.json") for n in "ARF")
        for case in range(cases):
            truth, results = random_case(case)
            for path, content in ((annotations_path, truth), (results_path, results)):
                with open(path, "w") as file:
                    json.dump(content, file)
            stats, per_class, text = pycocotools_scores(annotations_path, results_path)
            run = subprocess.run(
                [program, "score", "--annotations", annotations_path, "--results", results_path, "--json", scores_path],
                capture_output=True, text=True, timeout=600)
            assert run.returncode == 0, f"case {case}: status {run.returncode}: {run.stderr}"
            with open(scores_path) as file:
                scores = json.load(file)
            assert len(scores["stats"]) == 12, f"case {case}: {len(scores['stats'])} numbers"
            ours = {entry["category_id"]: entry["AP"] for entry in scores["per_class"]}
            assert ours.keys() == per_class.keys(), f"case {case}: classes {sorted(ours)}, not {sorted(per_class)}"
            pairs = [(f"stats[{i}]", a, b) for i, (a, b) in enumerate(zip(scores["stats"], stats))]
            pairs += [(f"AP of category {c}", ours[c], per_class[c]) for c in ours]
            for name, mine, theirs in pairs:
                assert abs(mine - theirs) <= limit, f"case {case}: {name}: {mine!r}, pycocotools {theirs!r}"
                worst = max(worst, abs(mine - theirs))
            lines = [line for line in run.stdout.splitlines() if line.startswith(" Average")]
            assert lines == text.splitlines(), f"case {case}: printed lines differ:\n{run.stdout}\n{text}"
    return worst


if __name__ == "__main__":
    import sys

    program = sys.argv[1] if len(sys.argv) > 1 else "./train_detr"
    cases = int(sys.argv[2]) if len(sys.argv) > 2 else 60
    print(f"COCOeval: {cases} random cases, largest difference to pycocotools {check_eval(program, cases):.1e}")
