#!/usr/bin/env python3
"""
Nothing breaks it (make test-inputs): what users feed a trainer, made from data/bccd's pictures, and what must happen.

    annotations    COCO, Pascal VOC and YOLO: damaged, contradictory, hostile, or odd but good
    pictures       cut off, flipped bytes, of another kind than their names say, sizes that no file can hold
    checkpoints    weights with flipped or cut bytes, nonsense in config.json, trainer_state.json, ...
    results, flags

A data set goes through `check` and through three steps of `train`, whose status must be the same; a checkpoint through
`predict`, `eval` or `train --resume`. For each: it ends by itself, with the status that is expected here, within 5 seconds
of processor time and --memory MiB; if the status is not 0, with one line that begins with "error: "; and what it prints
names the file and the place. In the seeded parts, where bytes are flipped at random, the status may be 0 or 1.

    dev/bad_inputs.py [--program ./train_detr] [--only TEXT] [--slow N] [--memory MIB]

For a build with sanitizers: --slow 10 --memory 100000. Needs Python's standard library only, and about a minute of one
core. Ends with "N passed, N failed".
"""
import argparse
import collections
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
BCCD, OUT = ROOT / "data" / "bccd", ROOT / "build" / "bad_inputs"
NETWORK = """--backbone tiny --enc_layers 1 --dec_layers 1 --dim_feedforward 64 --hidden_dim 32 --nheads 4 --num_queries 20
             --short_side 64 --max_size 96 --batch_size 1 --num_workers 1 --prefetch 1""".split()
JPEGS = [(BCCD / "JPEGImages" / f"BloodImage_0000{i}.jpg").read_bytes() for i in range(4)]
passed = failed = 0
inputs = collections.Counter()


# ----------------------------------------------------------------------------------------------------------------------
# Running

def run(arguments):
    """Returns (status, what it printed, last line of stderr); status is a text where it did not end as a program should."""
    with open(OUT / "said", "w+b") as said, open(OUT / "errors", "w+b") as errors:
        process = subprocess.Popen([program, *map(str, arguments)], stdout=said, stderr=errors, stdin=subprocess.DEVNULL,
                                   env=dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive"))
        seconds = 5 * options.slow
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (seconds, seconds))
        begin = time.monotonic()
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - begin > 120 * options.slow:
                process.kill()
                process.wait()
                return "hangs", "", ""
            time.sleep(0.002)
        process.returncode = status = os.waitstatus_to_exitcode(status)
        said.seek(0), errors.seek(0)
        printed, lines = said.read().decode(errors="replace"), errors.read().decode(errors="replace")
    if status < 0 or "Sanitizer" in lines or "runtime error" in lines:
        return f"crashes ({status})", printed + lines, lines
    if usage.ru_maxrss > options.memory * 1024:
        return f"takes {usage.ru_maxrss // 1024} MiB", printed + lines, lines
    error_lines = [line for line in lines.splitlines() if line.startswith("error: ")]
    if (status != 0) != (len(error_lines) == 1 and lines.endswith("\n")):
        return f"status {status} with {len(error_lines)} lines that say why", printed + lines, lines
    return status, printed + lines, lines


def expect(name, arguments, statuses, says):
    """One run. says: parts of what it must print."""
    global passed, failed
    status, said, lines = run(arguments)
    missing = [part for part in says if part not in said]
    good = status in statuses and not missing
    passed, failed = passed + good, failed + (not good)
    if not good:
        why = f"prints no {missing[0]!r}" if status in statuses else f"status {status}, not {statuses}"
        print(f"FAILED  {name}: {why}: {lines.strip()[-300:]}", flush=True)
        if options.only:
            print(program, *arguments)


def folder_for(name):
    inputs[name.split(":")[0]] += 1
    folder = OUT / "input"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def data_case(name, build, status=0, *says):
    """A data set: build(folder) writes it."""
    if options.only not in name:
        return
    folder = folder_for(name)
    build(folder)
    statuses = status if isinstance(status, tuple) else (status,)
    shutil.rmtree(OUT / "run", ignore_errors=True)
    expect(name + ": check", ["check", "--data", folder, *NETWORK], statuses, says)
    expect(name + ": train", ["train", "--data", folder, "--output_dir", OUT / "run", "--steps", 3, *NETWORK, "--num_workers", 0], statuses, says[:1])


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

def png(width, height, rows=None, kind=2, depth=8, more=b"", level=1):
    """A PNG; rows: its pixels with a filter byte before each row, compressed here, or bytes as they are."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    if rows is None:
        rows = (b"\0" + b"\x55" * ((width * channels * depth + 7) // 8)) * height
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)) + more
            + (chunk(b"PLTE", bytes(range(48))) if kind == 3 else b"") + chunk(b"IDAT", zlib.compress(rows, level)) + chunk(b"IEND", b""))


def exif(orientation, big=True, kind=3):
    order = ">" if big else "<"
    tiff = (b"MM" if big else b"II") + struct.pack(order + "HIHHHI", 42, 8, 1, 0x0112, kind, 1)
    return b"Exif\0\0" + tiff + struct.pack(order + "HH", orientation, 0) + bytes(4)


def with_exif(jpeg, content):
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def jpeg_size(jpeg, width, height):
    at = jpeg.index(b"\xff\xc0")
    return jpeg[:at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9:]


def progressive(width, height, passes):
    """A gray JPEG whose passes after the first are a few bytes each, and go over the whole picture."""
    def segment(mark, content):
        return b"\xff" + bytes([mark]) + struct.pack(">H", len(content) + 2) + content
    def scan(first, last, bits):
        bits += "1" * (-len(bits) % 8)
        data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
        return segment(0xda, bytes([1, 1, 0, first, last, 0])) + data
    blocks = (width // 8) * (height // 8)
    one_code = bytes([1] + [0] * 15)
    return (b"\xff\xd8" + segment(0xdb, bytes([0] + [1] * 64)) + segment(0xc2, struct.pack(">BHHBBBB", 8, height, width, 1, 1, 0x11, 0))
            + segment(0xc4, b"\0" + one_code + b"\0") + segment(0xc4, b"\x10" + one_code + b"\xe0") + scan(0, 0, "0" * blocks)
            + scan(1, 63, ("0" + "1" * 14) * (blocks // 32767 + 1)) * passes + b"\xff\xd9")


def flipped(content, seed, count, first=0):
    content, chooser = bytearray(content), random.Random(seed)
    for _ in range(count):
        content[chooser.randrange(first, len(content))] ^= 1 << chooser.randrange(8)
    return bytes(content)


# ----------------------------------------------------------------------------------------------------------------------
# COCO

CLASSES = [{"id": 1, "name": "cell"}, {"id": 2, "name": "plate"}]
IMAGES = [{"id": i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(2)]
BOXES = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 100, 50], "area": 5000, "iscrowd": 0},
         {"id": 2, "image_id": 2, "category_id": 2, "bbox": [200, 20, 30.5, 50], "area": 1525, "iscrowd": 0}]


def coco(train, pictures=None, val=None):
    """Builds a COCO folder. train, val: what the annotation files hold; pictures: by name, beside 0.jpg and 1.jpg."""
    def build(folder):
        for split, content in (("train", train), ("val", val)):
            if content is not None:
                text = content if isinstance(content, (str, bytes)) else json.dumps(content)
                write(folder / "annotations" / f"instances_{split}.json", text)
        for name, content in {"0.jpg": JPEGS[0], "1.jpg": JPEGS[1], **(pictures or {})}.items():
            if callable(content):
                (folder / "train").mkdir(exist_ok=True)
                content(folder / "train" / name)
            elif content is not None:
                write(folder / "train" / name, content)
        if val is not None:
            (folder / "val").symlink_to("train")
    return build


def coco_file(images=IMAGES, annotations=BOXES, categories=CLASSES, **more):
    return {"images": images, "annotations": annotations, "categories": categories, **more}


def with_box(**members):
    """The good boxes, and one that is different; None: without that member."""
    box = {"id": 3, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0, **members}
    return coco_file(annotations=BOXES + [{key: value for key, value in box.items() if value != "none"}])


def with_image(picture=None, **members):
    image = {"id": 3, "file_name": "3.jpg", "width": 640, "height": 480, **members}
    image = {key: value for key, value in image.items() if value != "none"}
    return coco(coco_file(images=IMAGES + [image], annotations=BOXES + [{**BOXES[0], "id": 9, "image_id": image.get("id")}]),
                {"3.jpg": JPEGS[2] if picture is None else picture})


def renumbered(ids, as_text=False):
    change = (lambda number: str(number)) if as_text else (lambda number: number)
    images = [{**image, "id": change(image["id"])} for image in IMAGES]
    boxes = [{**BOXES[i % 2], "id": change(i), "image_id": change(i % 2 + 1), "category_id": change(ids[i])} for i in range(len(ids))]
    return coco_file(images, boxes, [{"id": change(i), "name": f"class {i}"} for i in ids])


def coco_cases():
    good = json.dumps(coco_file())
    data_case("coco: good", coco(coco_file()), 0, "2 to train on", "training can start")
    data_case("coco: val beside train", coco(coco_file(), val=coco_file(images=IMAGES[:1], annotations=BOXES[:1])), 0, "evaluation split val")

    # The file as a whole
    name = "instances_train.json"
    for title, content in {"empty": "", "a brace": "{", "a list": "[]", "a number": "7", "null": "null", "true": "true", "a text": '"x"',
                           "an empty object": "{}", "a JPEG": JPEGS[0], "half": good[:len(good) // 2], "cut at its end": good[:-1],
                           "text behind": good + "x", "a second object": good + good, "single quotes": good.replace('"', "'"),
                           "a comment": "// boxes\n" + good, "UTF-16": good.encode("utf-16"), "zero bytes": bytes(1000),
                           "deep": '{"images":' + "[" * 100000, "deep objects": '{"x":' * 100000,
                           "deep, unknown": '{"info":' + "[" * 100000 + "]" * 100000 + "}", "a 404 page": "<html><body>Not found</body></html>",
                           "Git LFS": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}.items():
        data_case(f"coco: the file is {title}", coco(content), 1, name)
    for key in ("images", "annotations", "categories"):
        data_case(f"coco: no {key}", coco({k: v for k, v in coco_file().items() if k != key}), 1, name, f'no list "{key}"')
        for value in ({}, None, 7, "x"):
            data_case(f"coco: {key} is {value}", coco(coco_file(**{key: value})), 1, name, f'"{key}"')
    data_case("coco: a byte order mark", coco(b"\xef\xbb\xbf" + good.encode()), 0)
    data_case("coco: line ends of Windows", coco(json.dumps(coco_file(), indent=1).replace("\n", "\r\n")), 0)
    data_case("coco: entries of other kinds", coco(coco_file(annotations=BOXES + [None, 7, "x", [1]])), 0, "annotations[5]: is a list")
    data_case("coco: images of other kinds", coco(coco_file(images=IMAGES + [None, 7])), 0, "images[3]: is a number")
    data_case("coco: 1e999 and NaN beside", coco(coco_file(info=[float("inf"), float("nan")])), 0)
    data_case("coco: no pictures listed", coco(coco_file(images=[])), 1, name, "no usable pictures")
    data_case("coco: no classes", coco(coco_file(categories=[], annotations=[])), 1, name, "no classes")

    # Ids
    for title, ids in {"{0, 1}": [0, 1], "{1 .. 90}": list(range(1, 91)), "{1, 23, 56}": [1, 23, 56], "{5}": [5]}.items():
        data_case(f"coco: class ids {title}", coco(renumbered(ids)), 0, f"classes    {len(ids)}")
        data_case(f"coco: ids {title} as text", coco(renumbered(ids, True)), 0, f"{len(ids)} to train on")
    data_case("coco: negative ids", coco(renumbered([-3, 7])), 0, "2 to train on", "its id -3 is negative")
    data_case("coco: ids of 63 bits", coco(renumbered([2**63 - 1, 2**53 + 1])), 0, "9223372036854775807")
    data_case("coco: ids of 64 bits", coco(renumbered([2**64, 3])), 0, "is not a whole number")
    data_case("coco: ids with a point", coco(renumbered([1.0, 2.0])), 0, "2 to train on")
    data_case("coco: half an id", coco(renumbered([1.5, 2])), 0, "category_id 1.5 is not a whole number")
    data_case("coco: no class has a good id", coco(coco_file(categories=[{"id": "cell", "name": "cell"}])), 1, name, "no classes")
    data_case("coco: an image id twice", coco(coco_file(images=IMAGES + IMAGES[:1])), 1, name, "image id 1 is there twice")
    data_case("coco: a class id twice", coco(coco_file(categories=CLASSES + CLASSES[:1])), 1, name, "category id 1 is there twice")
    data_case("coco: all lists twice", coco(good[:-1] + "," + good[1:]), 1, name, "twice")
    data_case("coco: an annotation id twice", coco(with_box(id=1)), 0, "3 to train on", "annotation id 1")
    data_case("coco: a picture under two ids", coco(coco_file(images=IMAGES + [{**IMAGES[0], "id": 7}])), 0, "3, 1 of them", "(id 1) and 0.jpg (id 7)")
    data_case("coco: ids of images are names", coco(coco_file(images=[{**image, "id": image["file_name"]} for image in IMAGES])), 1, name, "id is text")
    for member in ("id", "image_id", "category_id"):
        for value in ("x", None, [1], {}, True, 1e400, "1e2", ""):
            data_case(f"coco: {member} of a box is {value!r}", coco(with_box(**{member: value})), 0, f"annotations[2]: {member}")
    data_case("coco: an unknown image", coco(with_box(image_id=99)), 0, "image id 99 is not in the file")
    data_case("coco: an unknown class", coco(with_box(category_id=0)), 0, "category id 0 is not in the file")

    # Classes
    for title, entry in {"without a name": {"id": 3}, "null": {"id": 3, "name": None}, "a number": {"id": 3, "name": 3}}.items():
        data_case(f"coco: a class {title}", coco(coco_file(categories=CLASSES + [entry])), 0, "categories[2]")
    data_case("coco: a class under two spellings", coco(coco_file(categories=CLASSES + [{"id": 3, "name": "Cell "}])), 0, "classes    3", "one class or two?")
    data_case("coco: a class name twice", coco(coco_file(categories=CLASSES + [{"id": 3, "name": "cell"}])), 0, "classes    3", "one class or two?")
    data_case("coco: a class with control characters", coco(coco_file(categories=CLASSES + [{"id": 3, "name": "a\n\x1b[2J%s%n"}])), 0, "classes    3")
    data_case("coco: a class with a long name", coco(coco_file(categories=CLASSES + [{"id": 3, "name": "x" * 100000}])), 0, "classes    3")
    data_case("coco: 20000 classes", coco(coco_file(categories=[{"id": i, "name": f"c{i}"} for i in range(20000)])), 0, "classes    20000")

    # Boxes
    for title, box, says in (("empty", [1, 2, 0, 0], "is empty"), ("flat", [1, 2, 30, 0], "is empty"), ("inverted", [100, 100, -50, -50], "is empty"),
                             ("to the right", [641, 2, 3, 4], "is outside"), ("above", [1, -20, 30, 10], "is outside"),
                             ("NaN", [1, float("nan"), 3, 4], "not finite"), ("infinite", [1, 2, float("inf"), 4], "not finite"),
                             ("3 numbers", [1, 2, 3], "bbox has 3"), ("5 numbers", [1, 2, 3, 4, 5], "bbox has 5"), ("no numbers", [], "bbox has 0"),
                             ("text", "1 2 3 4", "bbox is text"), ("texts", ["1", "2", "3", "4"], "bbox holds text"), ("null", None, "bbox is null"),
                             ("an object", {"x": 1}, "bbox is"), ("lists", [[1, 2], [3, 4]], "bbox holds"), ("missing", "none", "has no bbox")):
        data_case(f"coco: a box is {title}", coco(with_box(bbox=box)), 0, "annotations[2]", says)
    for title, box in (("too wide", [600, 400, 100, 200]), ("huge", [-1e300, -1e300, 1e301, 1e301]), ("left of it", [-30, 10, 60, 20])):
        data_case(f"coco: a box is {title}", coco(with_box(bbox=box)), 0, "3 to train on", "reaches out of the picture")
    data_case("coco: a box is thin", coco(with_box(bbox=[1, 2, 1e-9, 5])), 0, "3 to train on", "less than a pixel")
    data_case("coco: a box is a point past double", coco(with_box(bbox=[1e17, 2, 1, 5])), 0, "annotations[2]")
    data_case("coco: a box is there twice", coco(coco_file(annotations=BOXES + [{**BOXES[0], "id": 3}])), 0, "3 to train on", "there twice, with the same class")
    data_case("coco: 3000 boxes", coco(coco_file(annotations=[{**BOXES[0], "id": i, "bbox": [i % 500, i // 500, 20, 20]} for i in range(3000)])), 0,
              "more boxes than the 20 queries", "3000 boxes, 20 queries")
    data_case("coco: area is text", coco(with_box(area="x")), 0, "annotations[2]: area is text")
    data_case("coco: area is NaN", coco(with_box(area=float("nan"))), 0, "area is not finite")
    data_case("coco: iscrowd is text", coco(with_box(iscrowd="no")), 0, "iscrowd is text")
    data_case("coco: a crowd", coco(with_box(iscrowd=1, segmentation={"counts": [1, 2], "size": [480, 640]})), 0, "1 crowds")
    data_case("coco: crowds only", coco(coco_file(annotations=[{**BOXES[0], "iscrowd": 1}])), 0, "1 crowds", "no box to train on")
    data_case("coco: a picture without a box", coco(coco_file(annotations=BOXES[:1])), 0, "2, 1 of them without boxes", "without a box")
    data_case("coco: no boxes at all", coco(coco_file(annotations=[])), 0, "no box to train on")
    data_case("coco: only bad boxes", coco(coco_file(annotations=[{**BOXES[0], "bbox": [1, 1, 0, 0]}])), 0, "no box to train on")

    # Pictures of the list
    for title, members, says in (("missing", {"file_name": "absent.jpg"}, "picture is missing"), ("a folder", {"file_name": "."}, "picture is missing"),
                                 ("above", {"file_name": "../../annotations/instances_train.json"}, "leaves the picture folder"),
                                 ("absolute", {"file_name": str(BCCD / "JPEGImages" / "BloodImage_00000.jpg")}, "leaves the picture folder"),
                                 ("above, later", {"file_name": "a/../../0.jpg"}, "leaves the picture folder"),
                                 ("empty", {"file_name": ""}, "file_name is empty"), ("zero byte", {"file_name": "0.jpg\0"}, "zero byte"),
                                 ("long", {"file_name": "x" * 5000}, "picture is missing"), ("a number", {"file_name": 3}, "file_name is a number"),
                                 ("nameless", {"file_name": "none"}, "has no file_name"), ("without an id", {"id": "none"}, "has no id"),
                                 ("0 wide", {"width": 0}, "not a size"), ("-1 high", {"height": -1}, "not a size"),
                                 ("2^31 wide", {"width": 2**31}, "not a size"), ("text wide", {"width": "640"}, "width is text")):
        data_case(f"coco: a picture's entry is {title}", with_image(**members), 0, says)
    data_case("coco: the size is missing", with_image(width="none", height="none"), 0, "3 to train on")
    data_case("coco: the size is another", with_image(width=100, height=5000), 0, "3 to train on", "its annotations say 100 x 5000")
    data_case("coco: all pictures are missing", coco(coco_file(), {"0.jpg": None, "1.jpg": None}), 1, name, "no usable pictures")
    odd = "a b'\"%s%n\u00e4\U0001f600.jpg"
    data_case("coco: a picture with an odd name", coco(coco_file(images=[{**IMAGES[0], "file_name": odd}], annotations=BOXES[:1]), {odd: JPEGS[3]}), 0, "1 to train on")

    # The split that is evaluated on
    data_case("coco: val is damaged", coco(coco_file(), val="{"), 1, "instances_val.json")
    data_case("coco: val has another class", coco(coco_file(), val=coco_file(categories=[{"id": 1, "name": "dog"}], annotations=[])), 1, "instances_val.json", "dog")
    data_case("coco: val has no pictures", coco(coco_file(), val=coco_file(images=[])), 1, "instances_val.json", "no usable pictures")
    data_case("coco: val is train", coco(coco_file(), val=coco_file()), 0, "evaluation split val", "the same as")
    data_case("coco: two files fit", lambda folder: (coco(coco_file())(folder), write(folder / "annotations" / "instances_train2017.json", good),
                                                     write(folder / "annotations" / "instances_train2014.json", good),
                                                     (folder / "annotations" / "instances_train.json").unlink()), 1, "fits more than one")


# ----------------------------------------------------------------------------------------------------------------------
# Pascal VOC

def voc_object(name="<name>cell</name>", xmin="10", ymin="20", xmax="100", ymax="200", more=""):
    return (f"<object>{name}<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>{more}</object>")


def voc_xml(objects, size="<size><width>640</width><height>480</height></size>", before=""):
    return f"{before}<annotation>{size}{objects}</annotation>"


def voc(second, names="a\nb\n", **files):
    """Builds a VOC folder of two pictures, the first good; second: the other's XML, None: it is missing."""
    def build(folder):
        write(folder / "JPEGImages" / "a.jpg", JPEGS[0])
        write(folder / "JPEGImages" / "b.jpg", JPEGS[1])
        write(folder / "Annotations" / "a.xml", voc_xml(voc_object()))
        if second is not None:
            write(folder / "Annotations" / "b.xml", second)
        if names is not None:
            write(folder / "ImageSets" / "Main" / "train.txt", names)
        for name, content in files.items():
            write(folder / name.replace("__", "/"), content)
    return build


def voc_cases():
    data_case("voc: good", voc(voc_xml(voc_object())), 0, "2 to train on")
    lol = "".join(f'<!ENTITY l{i} "{"&l%d;" % (i - 1) * 10}">' for i in range(1, 10))
    for title, xml, says in (
            ("empty", "", "not valid XML"), ("no XML", "boxes", "not valid XML"), ("a JPEG", JPEGS[0], "not valid XML"), ("cut off", voc_xml(voc_object())[:60], "not valid XML"),
            ("another root", "<html/>", "its root"), ("two roots", voc_xml("") * 2, "not valid XML"),
            ("a billion laughs", voc_xml("&l9;", before=f'<!DOCTYPE a [<!ENTITY l0 "lol">{lol}]>'), "declares entities"),
            ("an entity of a file", voc_xml("&e;", before='<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]>'), "declares entities"),
            ("a parameter entity", voc_xml("", before='<!DOCTYPE a [<!ENTITY % e SYSTEM "file:///etc/passwd"> %e;]>'), "declares entities"),
            ("an unknown entity", voc_xml("&nbsp;"), "not valid XML"), ("deep", "<annotation>" + "<a>" * 100000, "nested too deep"),
            ("an unknown encoding", '<?xml version="1.0" encoding="x-none"?>' + voc_xml(""), "not valid XML"), ("missing", None, "cannot be opened")):
        data_case(f"voc: the file is {title}", voc(xml), 0, "b.xml", says)
    for title, objects, says in (
            ("empty", voc_object(xmax="10"), "is empty"), ("inverted", voc_object(xmin="100", xmax="10"), "is empty"), ("outside", voc_object(xmin="640", xmax="650"), "is outside"),
            ("NaN", voc_object(ymin="nan"), 'ymin "nan"'), ("infinite", voc_object(ymax="inf"), 'ymax "inf"'), ("text", voc_object(xmin="left"), 'xmin "left"'),
            ("no numbers", voc_object(xmin=""), 'xmin ""'), ("two numbers", voc_object(xmin="1 2"), 'xmin "1 2"'), ("a comma", voc_object(xmin="1,5"), 'xmin "1,5"'),
            ("nameless", voc_object(name=""), "has no <name>"), ("named nothing", voc_object(name="<name> </name>"), "has no <name>"),
            ("without a box", "<object><name>cell</name></object>", "no complete <bndbox>"),
            ("a polygon", "<object><name>cell</name><polygon><x1>1</x1></polygon></object>", "no complete <bndbox>")):
        data_case(f"voc: a box is {title}", voc(voc_xml(voc_object() + objects)), 0, "b.xml: object 2", says)
    for title, xml in (("no size", voc_xml(voc_object(), size="")), ("a size of 0", voc_xml(voc_object(), size="<size><width>0</width><height>0</height></size>")),
                       ("a size of text", voc_xml(voc_object(), size="<size><width>x</width><height>-4</height></size>")),
                       ("comments and CDATA", voc_xml("<!-- x -->" + voc_object(name="<name><![CDATA[cell]]></name>"))),
                       ("a byte order mark", b"\xef\xbb\xbf" + voc_xml(voc_object()).encode()), ("UTF-16", voc_xml(voc_object()).encode("utf-16")),
                       ("Latin 1", '<?xml version="1.0" encoding="ISO-8859-1"?>'.encode() + voc_xml(voc_object(more="<note>\u00e4</note>")).encode("latin-1")),
                       ("parts", voc_xml(voc_object(more="<part><name>head</name><bndbox><xmin>x</xmin></bndbox></part>"))),
                       ("difficult yes", voc_xml(voc_object(more="<difficult>yes</difficult>"))),
                       ("1 MB of text", voc_xml(voc_object() + "<note>" + "x" * 1000000 + "</note>"))):
        data_case(f"voc: {title}", voc(xml), 0, "2 to train on")
    data_case("voc: another size", voc(voc_xml(voc_object(), size="<size><width>480</width><height>640</height></size>")), 0, "2 to train on", "its annotations say 480 x 640")
    data_case("voc: difficult", voc(voc_xml(voc_object(more="<difficult>1</difficult>"))), 0, "1 difficult")
    data_case("voc: no objects in one", voc(voc_xml("")), 0, "2, 1 of them without boxes")
    data_case("voc: a long name", voc(voc_xml(voc_object(name=f"<name>{'x' * 100000}</name>"))), 0, "2 to train on")
    data_case("voc: 5000 classes", voc(voc_xml("".join(voc_object(name=f"<name>c{i}</name>") for i in range(5000)))), 0, "classes    5001")
    data_case("voc: no objects in any", lambda folder: (voc(voc_xml(""))(folder), write(folder / "Annotations" / "a.xml", voc_xml(""))), 1, "train.txt", "no classes")
    for title, names, status, says in (("empty", "", 1, "no usable pictures"), ("blank lines", "\n \n\t\n", 1, "no usable pictures"), ("missing", None, 1, "without split"),
                                       ("of Windows", "a\r\nb\r\n", 0, "2 to train on"), ("marked", b"\xef\xbb\xbfa\nb\n", 0, "2 to train on"), ("with flags", "a 1\nb -1\n", 0, "2 to train on"),
                                       ("absent names", "a\nzzz\n", 0, "no picture JPEGImages/zzz"), ("above", "a\n../a\n", 0, "leaves the picture folder"),
                                       ("absolute", "a\n/etc/passwd\n", 0, "leaves the picture folder"), ("a name twice", "a\na\n", 0, "2, 0 of them"),
                                       ("binary", bytes(range(256)) * 20, 1, "no usable pictures"), ("long", "x" * 1000000, 1, "no usable pictures")):
        data_case(f"voc: the list is {title}", voc(voc_xml(voc_object()), names), status, "" if title == "missing" and not says else says)
    data_case("voc: no folder of annotations", lambda folder: (voc(None)(folder), shutil.rmtree(folder / "Annotations")), 1, "no classes")
    data_case("voc: no folder of pictures", lambda folder: (voc(None)(folder), shutil.rmtree(folder / "JPEGImages")), 1, "no usable pictures")


# ----------------------------------------------------------------------------------------------------------------------
# YOLO

YAML = "names: [cell, plate]\n"


def yolo(labels, yaml=YAML, pictures=None):
    """Builds a YOLO folder of a.jpg with a good label and b.jpg with `labels`; None: no file."""
    def build(folder):
        for name, content in {"a.jpg": JPEGS[0], "b.jpg": JPEGS[1], **(pictures or {})}.items():
            write(folder / "images" / "train" / name, content)
        write(folder / "labels" / "train" / "a.txt", "0 0.5 0.5 0.2 0.3\n")
        if labels is not None:
            write(folder / "labels" / "train" / "b.txt", labels)
        if yaml is not None:
            write(folder / "data.yaml", yaml)
    return build


def yolo_cases():
    good = "1 0.5 0.5 0.2 0.3\n"
    data_case("yolo: good", yolo(good), 0, "2 to train on")
    for title, yaml in (("missing", None), ("empty", ""), ("without names", "nc: 2\n"), ("names are a text", "names: cell\n"), ("names are empty", "names: []\n"),
                        ("not closed", "names: [cell, plate\n"), ("a quote not closed", "names: ['cell, plate]\n"), ("ids that are names", "names:\n  cell: 0\n"),
                        ("an id twice", "names: {0: cell, 0: plate}\n"), ("binary", JPEGS[0]), ("a long name", f"names: [{'x' * 100000}]\n"), ("brackets", "names: " + "[" * 100000)):
        data_case(f"yolo: data.yaml is {title}", yolo(good, yaml), 1, "data.yaml")
    for title, yaml in (("a map", "names:\n  0: cell\n  1: plate\n"), ("items", "names:\n- cell\n- plate\n"), ("gaps", "names: {0: cell, 1: plate, 56: rest}\n"),
                        ("another nc", "nc: 80\nnames: [cell, plate]\n"), ("Windows", "names:\r\n- cell\r\n- plate\r\n"), ("marked", "\ufeffnames: [cell, plate]\n"),
                        ("a path that leaves", "path: /etc\ntrain: ../../x\nnames: [cell, plate]\n")):
        data_case(f"yolo: data.yaml with {title}", yolo(good, yaml), 0, "2 to train on")
    for title, line, says in (
            ("4 numbers", "0 .5 .5 .1", "4 numbers"), ("a polygon", "0 .1 .1 .5 .5 .9 .1", "7 numbers"), ("text", "cell .5 .5 .1 .1", "is not a number"), ("commas", "0,.5,.5,.1,.1", "is not a number"),
            ("NaN", "0 nan .5 .1 .1", "not finite"), ("infinite", "0 .5 .5 inf .1", "not finite"), ("class -1", "-1 .5 .5 .1 .1", "class -1"), ("class 2", "2 .5 .5 .1 .1", "class 2"),
            ("class 0.5", "0.5 .5 .5 .1 .1", "class 0.5"), ("class 1e300", "1e300 .5 .5 .1 .1", "class 1e+300"), ("empty", "0 .5 .5 0 0", "is empty"), ("inverted", "0 .5 .5 -.1 -.1", "is empty"),
            ("pixels", "0 320 240 50 60", "is outside"), ("half outside", "0 1.2 .5 .1 .1", "is outside"), ("binary", JPEGS[0][:3000].replace(b"\n", b""), "line 2"), ("1 MB long", "1 " * 500000, "500000 numbers")):
        data_case(f"yolo: a label is {title}", yolo(good.encode() + (line if isinstance(line, bytes) else line.encode())), 0, "b.txt: line 2", says)
    for title, labels, boxes in (("missing", None, 1), ("empty", "", 1), ("blank", "\n \n\r\n", 1), ("Windows", "1 .5 .5 .1 .1\r\n0 .5 .5 .1 .1\r\n", 3), ("tabs", "1\t.5\t.5\t.1\t.1", 2),
                                 ("a byte order mark", "\ufeff1 .5 .5 .1 .1", 2), ("classes with a point", "1.0 .5 .5 .1 .1", 2)):
        data_case(f"yolo: labels: {title}", yolo(labels), 0, f"{boxes} to train on")
    data_case("yolo: no labels at all", lambda folder: (yolo(None)(folder), shutil.rmtree(folder / "labels")), 0, "2, 2 of them without boxes")
    data_case("yolo: the label is a folder", lambda folder: (yolo(None)(folder), (folder / "labels" / "train" / "b.txt").mkdir()), 0, "2, 1 of them without boxes")
    data_case("yolo: other files beside", yolo(good, pictures={"notes.txt": "x", "c.webp": "RIFF0000WEBP", ".hidden.jpg": "x", "Thumbs.db": "x"}), 0, "c.webp: not JPEG or PNG")
    data_case("yolo: one label for two", yolo(good, pictures={"b.png": png(40, 30)}), 0, "3 to train on", "b.jpg (id 1) and b.png (id 2)")
    data_case("yolo: no pictures", lambda folder: (yolo(good)(folder), [path.unlink() for path in (folder / "images" / "train").iterdir()]), 1, "no usable pictures")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

def picture_cases():
    jpeg, small = JPEGS[2], png(40, 30)
    bad = {"empty": b"", "one byte": b"\xff", "a mark only": b"\xff\xd8\xff", "zeros": bytes(5000), "text": b"hello", "a 404 page": b"<!DOCTYPE html><html></html>",
           "Git LFS": b"version https://git-lfs.github.com/spec/v1\n", "a GIF": b"GIF89a" + bytes(50), "a BMP": b"BM" + bytes(50), "a WebP": b"RIFF\0\0\0\0WEBPVP8 ",
           "a TIFF": b"II*\0" + bytes(50), "HEIC": b"\0\0\0\x18ftypheic" + bytes(50), "a JPEG's header": jpeg[:300], "a JPEG's tenth": jpeg[:len(jpeg) // 10],
           "half a JPEG": jpeg[:len(jpeg) // 2], "a JPEG without tables": jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0"):], "a JPEG of 65500 x 65500": jpeg_size(jpeg, 65500, 65500),
           "a JPEG of 2000 passes": progressive(800, 800, 2000), "a large JPEG of 400 passes": progressive(6400, 6400, 400),
           "a JPEG of 20000 x 13000": jpeg_size(jpeg, 20000, 13000), "a JPEG of 0 x 0": jpeg_size(jpeg, 0, 0),
           "a PNG's mark": small[:8], "a PNG's header": small[:33], "half a PNG": small[:len(small) // 2], "a PNG of 2^31 - 1": png(2**31 - 1, 2**31 - 1, b""),
           "a PNG of 16000 x 16000": png(16000, 16000, b"\0"), "a PNG of 0 x 0": png(0, 0, b""), "a PNG with few rows": png(40, 30, (b"\0" + bytes(120)) * 3),
           "a PNG with bad filters": png(40, 30, (b"\x09" + bytes(120)) * 30), "a PNG with a bad sum": small[:-20] + b"\0\0\0\0" + small[-16:], "a PNG with a huge chunk": small[:33] + b"\x7f\xff\xff\xff" + small[37:]}
    for title, content in bad.items():
        data_case(f"picture: {title}", with_image(content), 0, "3.jpg", "cannot be decoded")
        data_case(f"picture: {title}, without a size", with_image(content, width="none", height="none"), 0, "3.jpg")
    data_case("picture: all are bad", coco(coco_file(), {"0.jpg": jpeg[:5000], "1.jpg": b""}), 1, "none of 2 training pictures can be read")
    for title, make in {"a folder": lambda path: path.mkdir(), "a pipe": os.mkfifo, "a link to nothing": lambda path: path.symlink_to("nothing"),
                        "a link to itself": lambda path: path.symlink_to(path.name)}.items():
        data_case(f"picture: {title}", with_image(make), 0, "3.jpg", "picture is missing")
        data_case(f"yolo: a picture is {title}", lambda folder: (yolo("")(folder), make(folder / "images" / "train" / "c.jpg")), 0, "c.jpg")
    data_case("picture: 3 GB of nothing", with_image(lambda path: (path.touch(), os.truncate(path, 3 << 30))), 0, "3.jpg", "cannot be decoded")
    for orientation in range(1, 9):
        data_case(f"picture: EXIF {orientation}", with_image(with_exif(jpeg, exif(orientation, orientation % 2 == 0))), 0, "3 to train on",
                  *([f"orientation {orientation}"] if orientation > 1 else []))
    odd = {"EXIF 0": with_exif(jpeg, exif(0)), "EXIF 99": with_exif(jpeg, exif(99)), "EXIF of another type": with_exif(jpeg, exif(6, kind=2)), "EXIF cut off": with_exif(jpeg, exif(6)[:20]),
           "EXIF that points out": with_exif(jpeg, b"Exif\0\0MM\0*\xff\xff\xff\xf0" + bytes(20)), "EXIF with 65535 entries": with_exif(jpeg, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20)),
           "a JPEG with 320 kB of preview": functools.reduce(with_exif, [bytes(65000)] * 5, jpeg), "text behind a JPEG": jpeg + b"x" * 1000, "a JPEG of 15 passes": progressive(640, 640, 15), "a JPEG without its end": jpeg[:-2], "a JPEG of 1300 x 900": jpeg_size(jpeg, 1300, 900), "a PNG named .jpg": small, "1 x 1": png(1, 1), "1 x 3000": png(1, 3000), "3000 x 1": png(3000, 1),
           "gray": png(40, 30, kind=0), "1 bit": png(40, 30, kind=0, depth=1), "16 bits": png(40, 30, depth=16), "a palette": png(40, 30, kind=3, depth=4), "gray and alpha": png(40, 30, kind=4),
           "alpha": png(40, 30, kind=6), "a PNG with EXIF": png(40, 30, more=struct.pack(">I", len(exif(6)) - 6) + b"eXIf" + exif(6)[6:] + struct.pack(">I", zlib.crc32(b"eXIf" + exif(6)[6:])))}
    for title, content in odd.items():
        data_case(f"picture: {title}", with_image(content, width="none", height="none"), 0, "images     3")
    data_case("picture: 30 x 20 beside 1333 x 1333", coco(coco_file(images=[{"id": 1, "file_name": "2.png"}, {"id": 2, "file_name": "3.png"}],
              annotations=[{**BOXES[0], "bbox": [1, 2, 10, 10]}, {**BOXES[1], "bbox": [100, 100, 900, 1000]}]), {"2.png": png(30, 20), "3.png": png(1333, 1333)}), 0, "2 to train on")
    data_case("picture: a JPEG named .png", coco(coco_file(images=IMAGES + [{"id": 3, "file_name": "3.png"}]), {"3.png": jpeg}), 0, "images     3", "3.png: is a JPEG")
    data_case("picture: a stray byte", with_image(jpeg[:-20000] + b"\xff\xd1" + jpeg[-20000:]), 0, "3 to train on", "Corrupt JPEG data")
    for seed in range(12):
        data_case(f"picture: JPEG flipped, seed {seed}", with_image(flipped(jpeg, seed, 1 + seed % 4 * 30)), 0, "images     3")
        data_case(f"picture: JPEG header flipped, seed {seed}", with_image(flipped(jpeg[:620], seed, 3, 2) + jpeg[620:]), 0, "images     3")
        data_case(f"picture: PNG flipped, seed {seed}", with_image(flipped(png(40, 30, level=9), seed, 1 + seed % 3)), 0, "images     3")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

def make_checkpoint():
    """A run of one step on two pictures, OUT/good, and its data, OUT/data."""
    shutil.rmtree(OUT / "data", ignore_errors=True)
    coco(coco_file(), val=coco_file())(OUT / "data")
    shutil.rmtree(OUT / "good", ignore_errors=True)
    expect("a checkpoint", ["train", "--data", OUT / "data", "--output_dir", OUT / "good", "--steps", 1, "--eval_every", 1, *NETWORK], (0,), ["done: 1 steps"])


def checkpoint_case(name, changes, command, status, *says):
    """changes: {file: content, or a function of its content, None: it is removed}; command: predict, eval or train."""
    if options.only not in name:
        return
    folder = folder_for(name)
    for path in (OUT / "good").iterdir():
        if path.is_file() and path.name != "SHA256SUMS":  # as from somebody else: it is the content that is looked at
            shutil.copy(path, folder)
    for file, change in changes.items():
        path = folder / file
        content = change(path.read_bytes()) if callable(change) else change
        if content is None:
            path.unlink()
        else:
            write(path, content)
    arguments = {"predict": ["predict", "--resume", folder, "--num_workers", 0, OUT / "data" / "train" / "0.jpg"],
                 "eval": ["eval", "--data", OUT / "data", "--resume", folder, "--num_workers", 0],
                 "train": ["train", "--resume", folder, "--steps", 2, "--num_workers", 0]}[command]
    expect(f"{name}: {command}", arguments, status if isinstance(status, tuple) else (status,), says)


def json_edit(**members):
    """A change of a JSON object's members; "none" takes one away."""
    def change(content):
        tree = json.loads(content)
        tree.update(members)
        return json.dumps({key: value for key, value in tree.items() if value != "none"})
    return change


def nested_edit(name, **members):
    """The same of the object that is the member `name`."""
    return lambda content: json_edit(**{name: {**json.loads(content)[name], **members}})(content)


def safe_header(content):
    """A safetensors file's header, as an object, and the bytes before its data."""
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:size]), size


def safe_edit(change):
    """A change of a safetensors file's header, as an object."""
    def edit(content):
        header, size = safe_header(content)
        text = json.dumps(change(header) or header).encode()
        return struct.pack("<Q", len(text)) + text + content[size:]
    return edit


def filled(name, value):
    """A change of a safetensors file: all numbers of the tensor are value."""
    def change(content):
        header, size = safe_header(content)
        first, last = (size + offset for offset in header[name]["data_offsets"])
        return content[:first] + struct.pack("<f", value) * ((last - first) // 4) + content[last:]
    return change


def checkpoint_cases():
    first = lambda header: header[sorted(key for key in header if key != "__metadata__")[0]]
    weights, moments = "model.safetensors", "optimizer.safetensors"
    broken = {"missing": None, "empty": b"", "7 bytes": b"1234567", "half": lambda c: c[:len(c) // 2], "a byte short": lambda c: c[:-1], "a byte long": lambda c: c + b"x",
              "a huge header": lambda c: b"\xff" * 7 + b"\x7f" + c[8:], "a header of 90 MB": lambda c: struct.pack("<Q", 90000000) + c[8:], "an empty header": lambda c: bytes(8) + c[8:], "zeros": bytes(5000),
              "a JPEG": JPEGS[0], "a pickle": b"\x80\x02}q\0." + bytes(100), "a deep header": struct.pack("<Q", 100000) + b"[" * 100000,
              "a shape of 2^62": safe_edit(lambda h: first(h).update(shape=[2**62, 4])), "a negative shape": safe_edit(lambda h: first(h).update(shape=[-1])),
              "another type": safe_edit(lambda h: first(h).update(dtype="I32")), "an unknown type": safe_edit(lambda h: first(h).update(dtype="F3")),
              "offsets past the end": safe_edit(lambda h: first(h).update(data_offsets=[0, 2**60])), "offsets backwards": safe_edit(lambda h: first(h).update(data_offsets=[8, 0])),
              "no type": safe_edit(lambda h: first(h).pop("dtype") and None), "no tensors": safe_edit(lambda h: {"__metadata__": {}}), "a header that is a list": safe_edit(lambda h: [1])}
    for file, command in ((weights, "predict"), (moments, "train")):
        for title, change in broken.items():
            checkpoint_case(f"checkpoint: {file} is {title}", {file: change}, command, 1, file)
        checkpoint_case(f"checkpoint: {file} holds NaN", {file: lambda c: c[:-40] + struct.pack("<f", float("nan")) * 10}, command, 1, file, "not finite")
    variance = "model.backbone.conv_encoder.model.embedder.embedder.normalization.running_var"
    checkpoint_case("checkpoint: a negative variance", {weights: filled(variance, -1)}, "predict", 1, variance, "is negative")
    checkpoint_case("checkpoint: a tensor of no network", {weights: safe_edit(lambda h: h.update(other={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}))},
                    "predict", 0, "not part of the network: other")
    checkpoint_case("checkpoint: a loss that is not finite", {weights: filled("bbox_predictor.layers.0.weight", 3e38)}, "train", 1, "not finite", "images: ", "1.jpg")
    for seed in range(8):
        checkpoint_case(f"checkpoint: header flipped, seed {seed}", {weights: lambda c: flipped(c[:2000], seed, 2) + c[2000:]}, "predict", (0, 1))
        checkpoint_case(f"checkpoint: weights flipped, seed {seed}", {weights: lambda c: c[:-5000] + flipped(c[-5000:], seed, 3)}, "eval", (0, 1))

    for file, command in (("config.json", "predict"), ("preprocessor_config.json", "eval"), ("trainer_state.json", "train")):
        for title, change in {"empty": b"", "a brace": b"{", "a list": b"[]", "a number": b"7", "binary": JPEGS[0], "half": lambda c: c[:len(c) // 2],
                              "deep": b'{"x":' * 100000, "text behind": lambda c: c + b"x", "zeros": bytes(100)}.items():
            checkpoint_case(f"checkpoint: {file} is {title}", {file: change}, command, 1, file)
        for seed in range(6):
            checkpoint_case(f"checkpoint: {file} flipped, seed {seed}", {file: lambda c: flipped(c, seed, 2)}, command, (0, 1, 2))
    checkpoint_case("checkpoint: no config.json", {"config.json": None}, "predict", 1, "config.json")
    checkpoint_case("checkpoint: no preprocessor_config.json", {"preprocessor_config.json": None}, "predict", 0, "preprocessor_config.json is missing")
    checkpoint_case("checkpoint: no trainer_state.json, predict", {"trainer_state.json": None}, "predict", 0)
    checkpoint_case("checkpoint: no trainer_state.json", {"trainer_state.json": None}, "train", 1, "trainer_state.json")
    for key, values in {"d_model": (0, -1, 30, 4096, 10**9, "32", None, [], 1.5), "encoder_layers": (-1, 2, 10**9), "decoder_layers": (0, 2, 10**9), "num_queries": (0, 10000, 10**9),
                        "encoder_attention_heads": (0, 3, 2**31), "encoder_ffn_dim": (0, 128), "dropout": (-1, 1, "x"), "model_type": ("bert", 7, None, "none"), "activation_function": ("gelu",),
                        "id2label": ({"1": "x"}, {"0": 7}, {"x": "y"}, {"0": "a", "1": "b", "2": "c"}, {str(i): "x" for i in range(5000)}), "backbone_config": (7, [])}.items():
        for value in values:
            checkpoint_case(f"checkpoint: {key} is {str(value)[:40]}", {"config.json": json_edit(**{key: value})}, "predict", 1,)
    for members in ({"depths": [1, 1]}, {"depths": [1, 1, 1, 0]}, {"hidden_sizes": []}, {"out_indices": [1, 2]}, {"layer_type": "other"}, {"num_channels": 4}):
        checkpoint_case(f"checkpoint: backbone with {members}", {"config.json": nested_edit("backbone_config", **members)}, "predict", 1, "config.json", f'"{[*members][0]}"')
    timm = {"use_timm_backbone": True, "backbone_config": None, "backbone": "resnet50"}
    for title, members in {"vgg": {"backbone": "vgg16"}, "three layers": {"backbone_kwargs": {"layers": [3, 4, 6]}}, "a dilation that is text": {"dilation": "yes"}}.items():
        checkpoint_case(f"checkpoint: timm's backbone, {title}", {"config.json": json_edit(**{**timm, **members})}, "predict", 1, "config.json")
    checkpoint_case("checkpoint: an unknown decoder", {"config.json": json_edit(model_type="train_detr", decoder="x")}, "predict", 1, "plain or anchor")
    checkpoint_case("checkpoint: another mean of the pixels", {"preprocessor_config.json": json_edit(image_mean=[0.0, 0.0, 0.0])}, "predict", 1, "image_mean")
    checkpoint_case("checkpoint: a class without a number", {"trainer_state.json": json_edit(classes=[{"id": "x", "label": 0, "name": "cell"}])}, "predict", 1, "trainer_state.json")
    for value in (0, -5, 10**6, "x", None, {"shortest_edge": 0, "longest_edge": 96}, {"shortest_edge": 10**9, "longest_edge": 10**9}, {"shortest_edge": 64, "longest_edge": -1}):
        checkpoint_case(f"checkpoint: size is {value}", {"preprocessor_config.json": json_edit(size=value)}, "predict", 0 if value is None else 1)
    for key, values in {"step": (-1, "x", None, 1.5, 2**62), "epochs_logged": (-1, "x", 2**62), "steps_per_epoch": (), "num_images": (0, 99, "x"), "classes": ([], {}, [{"id": 1, "label": 99, "name": "cell"}] * 2, "x"),
                        "sums": ([], "x", [1], None), "flags": ([], "none", 7), "best": ({"epoch": "x"}, {"epoch": 0, "ap": "x"}), "planned_steps": ("x",)}.items():
        for value in values:
            checkpoint_case(f"checkpoint: {key} is {value}", {"trainer_state.json": json_edit(**{key: value})}, "train", 1, "trainer_state.json")
    for key, value in {"batch_size": 0, "lr": "x", "lr ": 1, "short_side": 10**9, "num_queries": -1, "dropout": 2, "data": None, "precision": "fp99", "seed": -1, "epochs": 1e300}.items():
        checkpoint_case(f"checkpoint: flag {key} is {value}", {"trainer_state.json": nested_edit("flags", **{key: value})}, "train", 0 if key == "lr " else (1, 2))
    checkpoint_case("checkpoint: no flags", {"trainer_state.json": json_edit(flags={})}, "train", 2, "--data")
    checkpoint_case("checkpoint: the data are gone", {"trainer_state.json": nested_edit("flags", data="/absent")}, "train", 1, "/absent")
    checkpoint_case("checkpoint: no log", {"log.txt": None}, "train", 1, "log.txt")
    checkpoint_case("checkpoint: a binary log", {"log.txt": JPEGS[0]}, "train", 0)
    checkpoint_case("checkpoint: half a commit", {".commit/config.json": b"{"}, "predict", 1, ".commit/config.json")


# ----------------------------------------------------------------------------------------------------------------------
# Results, pictures on the command line, flags

def command_case(name, arguments, status, *says):
    if options.only not in name:
        return
    inputs[name.split(":")[0]] += 1
    expect(name, arguments, status if isinstance(status, tuple) else (status,), says)


def command_cases():
    annotations, results = OUT / "data" / "annotations" / "instances_train.json", OUT / "results.json"
    good = {"image_id": 1, "category_id": 1, "bbox": [10, 20, 100, 50], "score": 0.5}
    for title, content, status in (
            ("good", [good], 0), ("empty list", [], 0), ("empty", "", 1), ("an object", {}, 1), ("half", '[{"image_id": 1', 1), ("a number inside", [7], 1), ("true inside", [True], 1), ("a list inside", [[good]], 1),
            ("an unknown image", [{**good, "image_id": 9}], 1), ("an unknown class", [{**good, "category_id": 9}], 0), ("NaN", [{**good, "score": float("nan")}], 1),
            ("a text score", [{**good, "score": "1"}], 1), ("3 numbers", [{**good, "bbox": [1, 2, 3]}], 1), ("5 numbers", [{**good, "bbox": [1, 2, 3, 4, 5]}], 1), ("no box", [{"image_id": 1}], 1),
            ("infinite", [{**good, "bbox": [1, 2, float("inf"), 4]}], 1), ("deep", "[" * 100000, 1), ("1e308 wide", [{**good, "bbox": [1, 2, 1e308, 1e308]}], 0), ("binary", JPEGS[0], 1),
            ("negative", [{**good, "bbox": [10, 20, -5, -5]}], (0, 1)), ("half an id", [{**good, "image_id": 1.5}], 1)):
        if options.only in f"results: {title}":
            write(results, content if isinstance(content, (str, bytes)) else json.dumps(content))
            command_case(f"results: {title}", ["score", "--annotations", annotations, "--results", results], status, *(["results.json"] if status == 1 else []))
    command_case("results: missing", ["score", "--annotations", annotations, "--results", OUT / "absent"], 1, "absent")
    command_case("results: no annotations", ["score", "--annotations", OUT / "absent", "--results", results], 1, "absent")

    write(OUT / "pictures" / "bad.jpg", JPEGS[0][:5000])
    write(OUT / "pictures" / "good.jpg", JPEGS[1])
    write(OUT / "pictures" / "notes.txt", "x")
    (OUT / "empty").mkdir(exist_ok=True)
    if not (OUT / "pipe.jpg").exists():
        os.mkfifo(OUT / "pipe.jpg")
    predict = ["predict", "--resume", OUT / "good"]
    command_case("predict: a folder", [*predict, OUT / "pictures"], 1, "bad.jpg", "notes.txt", "1 of 2 pictures could not be read")
    command_case("predict: drawn over", [*predict, "--draw", OUT / "pictures", OUT / "pictures" / "good.jpg"], 1, "would overwrite it")
    command_case("predict: two of one name", [*predict, "--draw", OUT / "drawn", OUT / "pictures" / "good.jpg", OUT / "pictures" / "good.jpg"], 0)
    command_case("eval: by decoder layers", ["eval", "--data", OUT / "data", "--resume", OUT / "good", "--sweep_dec_layers"], 0, "layers")
    command_case("predict: all that it writes", [*predict, "--threshold", 0, "--draw", OUT / "drawn", "--json", OUT / "boxes.json", "--dump", OUT / "dump.safetensors", OUT / "pictures" / "good.jpg"], 0)
    command_case("predict: missing", [*predict, OUT / "absent.jpg"], 1, "absent.jpg")
    command_case("predict: an empty folder", [*predict, OUT / "empty"], 0, "0 pictures")
    command_case("predict: a pipe", [*predict, OUT / "pipe.jpg"], 1, "pipe.jpg")
    command_case("predict: text", [*predict, OUT / "pictures" / "notes.txt"], 1, "notes.txt")
    command_case("predict: nothing", predict, 2)
    command_case("predict: JSON into nowhere", [*predict, "--json", "/absent/x", OUT / "pictures"], 1, "/absent/x")
    command_case("predict: JSON into a full disk", [*predict, "--json", "/dev/full", OUT / "pictures" / "good.jpg"], 1, "/dev/full")
    command_case("predict: drawn into a file", [*predict, "--draw", results, OUT / "pictures" / "good.jpg"], 1, "results.json")
    command_case("predict: no checkpoint", ["predict", "--resume", OUT / "empty", OUT / "pictures"], 1, "config.json")
    command_case("predict: no folder", ["predict", "--resume", OUT / "absent", OUT / "pictures"], 1, "absent")
    command_case("predict: more layers", [*predict, "--use_dec_layers", 2, OUT / "pictures"], 2, "--use_dec_layers")

    evaluate = ["eval", "--resume", OUT / "good", "--data"]
    command_case("eval: results", [*evaluate, OUT / "data", "--results", OUT / "found.json"], 0)
    others = coco_file(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
    for title, build in {"one class": coco(coco_file(), val=coco_file(categories=[CLASSES[0], {"id": 2, "name": "other"}])), "no class": coco(others, val=others),
                         "half a picture": coco(coco_file(), {"0.jpg": JPEGS[0][:5000]}, coco_file())}.items():
        build(OUT / title)
    command_case("eval: a class that the network has not", [*evaluate, OUT / "one class"], 0, '"other"', "not in id2label")
    command_case("eval: no class that the network has", [*evaluate, OUT / "no class"], 1, "none of its 2 classes")
    command_case("eval: half a picture", [*evaluate, OUT / "half a picture"], 0, "0.jpg", "skipped")

    run = lambda name, *flags: ["train", "--data", OUT / "data", "--output_dir", OUT / name, *NETWORK, "--eval_every", 1, *flags]
    resumed = lambda name, *flags: ["train", "--resume", OUT / name, *flags]
    command_case("train: the own decoder, in bf16", run("anchor", "--steps", 1, "--decoder", "anchor", "--class_loss", "focal", "--precision", "bf16", "--norm_init", "calibrate"), 0, "done: 1 steps")
    command_case("train: a cosine", run("cosine", "--steps", 1, "--lr_schedule", "cosine", "--warmup_steps", 0, "--ema", 0.9), 0, "done: 1 steps")
    command_case("train: a longer cosine", resumed("cosine", "--steps", 2), 0, "the cosine now runs over 2 steps")
    command_case("predict: averaged weights", ["predict", "--resume", OUT / "cosine", OUT / "pictures" / "good.jpg"], 0, "averaged by --ema")
    command_case("train: patience", run("patient", "--epochs", 99, "--lr", 0.01, "--patience", 1), 0, "a larger --patience goes on")
    command_case("train: patience that is over", resumed("patient"), 0, "nothing to do: no better AP")
    coco(coco_file())(OUT / "no val")
    command_case("train: patience without a split", ["train", "--data", OUT / "no val", "--output_dir", OUT / "other", *NETWORK, "--patience", 1], 1, "whose AP --patience would wait for")
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        write(OUT / "lacking" / name, (OUT / "good" / name).read_bytes())
    write(OUT / "lacking" / name, safe_edit(lambda h: h.update(other=h.pop("model.encoder.layers.0.fc1.weight")))((OUT / "lacking" / name).read_bytes()))
    start = ["train", "--data", OUT / "no class", "--output_dir", OUT / "afresh", "--steps", 1, "--pretrained"]
    command_case("train: other classes, the head frozen", [*start, OUT / "good", "--freeze", "class_labels_classifier"], 2, "so it must be trained")
    command_case("train: pretrained without a config.json", [*start, OUT / "data"], 1, "config.json")
    command_case("train: a frozen tensor is missing", [*start, OUT / "lacking", "--freeze", "encoder"], 1, "which --freeze would leave at random numbers")
    command_case("train: other classes", [*start, OUT / "good"], 0, "class head starts afresh")
    for precision in ("fp32", "bf16"):
        command_case(f"bench: {precision}", ["bench", *NETWORK[:12], "--size", "64x96", "--profile", "--precision", precision, "--json", OUT / "bench.json"], 0, "of peak")

    check = ["check", "--data", OUT / "data"]
    command_case("check: JSON into nowhere", [*check, *NETWORK, "--json", "/absent/x"], 1, "/absent/x")
    command_case("check: JSON", [*check, *NETWORK, "--json", OUT / "check.json"], 0)
    command_case("check: no memory", [*check, *NETWORK, "--short_side", 16384, "--max_size", 32768], 1, "out of memory: the plan needs")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 300 << 30:
        command_case("check: a network of 320 GiB", [*check, "--hidden_dim", 8192, "--dim_feedforward", 65536, "--enc_layers", 64], 1, "out of memory", "take a smaller network")
    command_case("check: a batch of 3", [*check, *NETWORK, "--batch_size", 3], 1, "--batch_size 2 at most")
    command_case("check: JSON of what cannot start", [*check, *NETWORK, "--split", "test", "--json", OUT / "check.json"], 1, 'without split "test"')
    command_case("check: a folder without a name", ["check", "--data", ""], 2, "must not be empty")
    command_case("check: no such split", [*check, *NETWORK, "--split", "test"], 1, 'without split "test"')
    command_case("check: no such training split", [*check, *NETWORK, "--train_split", "x"], 1, 'without split "x"')
    command_case("check: a folder without data", ["check", "--data", OUT / "empty"], 1, "no data set found")
    command_case("check: no folder", ["check", "--data", OUT / "absent"], 1, "absent")
    command_case("check: a file", ["check", "--data", results], 1, "is not a folder")
    command_case("check: no data", ["check"], 2, "--data is missing")
    command_case("check: resume", [*check, "--resume", OUT / "good"], 2, "--resume")
    train = ["train", "--data", OUT / "data", "--output_dir", OUT / "other", *NETWORK]
    for flag, values in {"lr": ("x", "-1", "nan", "inf", "1e999", ""), "batch_size": ("0", "-1", "1.5", "1e3", "99999999999999999999", "0x10", "2x"), "dropout": ("1", "-0.1"), "hidden_dim": ("0", "30", "999999999"),
                         "nheads": ("0", "5"), "backbone": ("resnet99", "", "RESNET50"), "num_queries": ("0", "10001"), "steps": ("0", "-1"), "seed": ("-1", "x"), "precision": ("fp16", "x"), "decoder": ("x",),
                         "preset": ("large",), "epochs": ("0", "1e300"), "short_side": ("0", "99999"), "num_workers": ("-1", "1000")}.items():
        for value in values:
            command_case(f"flags: --{flag} {value!r}", [*train, f"--{flag}", value], 2, f"--{flag}")
    for title, arguments in {"unknown": ["--learning_rate", "1"], "without a value": ["--lr"], "a switch with a value": ["--dilation=yes"], "a word": ["extra"], "of another command": ["--draw", "x"], "short": ["-x"],
                             "vflip and no_augment": ["--vflip", "--no_augment"], "resume and pretrained": ["--resume", OUT / "good", "--pretrained", OUT / "good"], "freeze alone": ["--freeze", "backbone"],
                             "freeze nonsense": ["--pretrained", OUT / "good", "--freeze", "nonsense"], "another shape": ["--pretrained", OUT / "good", "--hidden_dim", "64"]}.items():
        command_case(f"flags: {title}", [*train, *arguments], 2)
    for size in ("64", "64x", "0x64", "64x96x3", "4294967360x64", "64x16385"):
        command_case(f"flags: --size {size}", ["bench", "--size", size], 2, "--size")
    start, resume = [*train[:5], "--pretrained", OUT / "good"], ["train", "--resume", OUT / "good"]
    for title, arguments, says in (("dropout of pretrained", [*start, "--dropout", "0.3"], "--dropout"), ("decoder of pretrained", [*start, "--decoder", "anchor"], "--decoder"),
                                   ("dilation of pretrained", [*start, "--dilation"], "--dilation"), ("backbone of pretrained", [*start, "--backbone", "resnet18"], "--backbone"),
                                   ("norm_init of pretrained", [*start, "--norm_init", "calibrate"], "--norm_init"), ("a plain decoder with dilation", [*train, "--dilation"], "--dilation"),
                                   ("lr_drop of a cosine", [*train, "--lr_schedule", "cosine", "--lr_drop", "9"], "--lr_drop"), ("a GPU's tf32", [*train, "--tf32"], "--tf32"), ("a GPU's recompute", [*train, "--recompute"], "--recompute"),
                                   ("another lr", [*resume, "--lr", "1"], "--lr"), ("another switch", [*resume, "--vflip"], "--vflip"), ("another folder", [*resume, "--output_dir", OUT / "empty"], "--output_dir")):
        command_case(f"flags: {title}", arguments, 2, says)
    command_case("flags: a run that is over", [*resume, "--data", OUT / "data"], 0, "nothing to do")
    command_case("flags: resumed nowhere", ["train", "--resume", OUT / "absent"], 1, "absent")
    command_case("flags: no command", [], 2)
    command_case("flags: an unknown command", ["fit"], 2, "fit")
    command_case("flags: output into a file", ["train", "--data", OUT / "data", "--output_dir", OUT / "pictures" / "notes.txt", *NETWORK], 1, "notes.txt")
    command_case("flags: output where a run is", ["train", "--data", OUT / "data", "--output_dir", OUT / "good", *NETWORK], 1, "is there already")
    command_case("flags: pretrained is missing", [*train, "--pretrained", OUT / "absent"], 1, "absent")
    command_case("flags: pretrained is a JPEG", [*train, "--pretrained", OUT / "pictures" / "good.jpg"], 1, "good.jpg")
    command_case("flags: pretrained is a pipe", [*train, "--pretrained", OUT / "pipe.jpg"], 1, "pipe.jpg")


def main():
    global program, options
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(ROOT / "train_detr"))
    parser.add_argument("--only", default="", help="only inputs whose names contain this text")
    parser.add_argument("--slow", type=int, default=1, help="allow so many times 5 seconds")
    parser.add_argument("--memory", type=int, default=600, help="allow so many MiB")
    options = parser.parse_args()
    program = str(pathlib.Path(options.program).resolve())
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    make_checkpoint()
    for cases in (coco_cases, voc_cases, yolo_cases, picture_cases, checkpoint_cases, command_cases):
        cases()
    print(f"{sum(inputs.values())} inputs, {passed + failed} runs:", ", ".join(f"{name} {count}" for name, count in inputs.items()))
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
