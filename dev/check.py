#!/usr/bin/env python3
"""
What the trainer promises about other people's software, checked against that software (make check-python):

    checkpoints   transformers opens a folder that ./train_detr wrote, and ./train_detr one that transformers wrote:
                  same logits, same boxes, same detections; what is no DETR to it (--decoder anchor, --class_loss
                  focal) it refuses, and dev/oracle.py's TrainDetr opens
    pixels        pictures of every kind are decoded and resized to Pillow's bytes
    scores        `score` prints what pycocotools prints (dev/check_eval.py)

    python dev/check.py [--program ./train_detr] [--only checkpoints|pixels|scores]

Works with transformers 4.57 and with 5.x, whichever the interpreter has. Ends with "N passed, N failed".
"""
import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
warnings.filterwarnings("ignore", category=FutureWarning)  # torch warns of itself on import
import numpy as np
import PIL
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForObjectDetection, DetrConfig, DetrForObjectDetection

import check_eval
import oracle

ROOT = Path(__file__).resolve().parent.parent
FIVE = int(transformers.__version__.split(".")[0]) >= 5
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
LIMIT = 1e-4  # largest difference of a logit or a box, float32 against float32
program = ROOT / "train_detr"


def run(*arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}: status {done.returncode}: {done.stderr[-500:]}"
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def content(generator, width, height, channels):
    """Smooth colours with some noise, (height, width, channels) uint8."""
    coarse = generator.integers(0, 256, (1 + height // 12, 1 + width // 12, channels), np.uint8)
    planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC) for c in range(channels)]
    noise = generator.integers(-20, 21, (height, width, channels))
    return np.clip(np.stack([np.asarray(p) for p in planes], axis=-1) + noise, 0, 255).astype(np.uint8)


def write_png16(path, values):
    """(height, width, 3) uint16 as a 16-bit RGB PNG, which Pillow reads but cannot write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


KINDS = ["jpeg", "jpeg gray", "jpeg cmyk", "jpeg progressive", "jpeg rotated", "jpeg restart", "png", "png gray", "png alpha",
         "png gray alpha", "png palette", "png palette transparent", "png 4 colours", "png bilevel", "png gray 16", "png 16",
         "png rotated"]


def write_picture(path, kind, generator, width, height):
    """Writes a picture of that kind; the name gets its ending here. Returns the path."""
    draw = lambda channels: content(generator, width, height, channels)
    path = path.with_suffix(".jpg" if kind.startswith("jpeg") else ".png")
    exif = Image.Exif()
    exif[0x0112] = int(generator.integers(1, 9))
    if kind.startswith("jpeg"):
        options = dict(quality=int(generator.integers(30, 98)), subsampling=int(generator.integers(0, 3)))
        image = Image.fromarray(draw(3))
        if kind == "jpeg gray":
            image = Image.fromarray(draw(1)[..., 0])
            del options["subsampling"]
        if kind == "jpeg cmyk":
            image = Image.fromarray(draw(4), "CMYK")
        if kind == "jpeg progressive":
            options["progressive"] = True
        if kind == "jpeg rotated":
            options["exif"] = exif
        if kind == "jpeg restart":
            options["restart_marker_rows"] = 1
        image.save(path, **options)
    elif kind == "png 16":
        write_png16(path, draw(3).astype(np.uint16) * 256 + generator.integers(0, 256, (height, width, 3), np.uint16))
    elif kind == "png gray 16":
        values = draw(1)[..., 0].astype(np.uint16) * 256 + generator.integers(0, 256, (height, width), np.uint16)
        Image.fromarray(values).save(path)
    else:
        options = {}
        if kind in ("png", "png rotated"):
            image = Image.fromarray(draw(3))
            options = dict(exif=exif) if kind == "png rotated" else {}
        elif kind == "png gray":
            image = Image.fromarray(draw(1)[..., 0])
        elif kind == "png alpha":
            image = Image.fromarray(draw(4), "RGBA")
        elif kind == "png gray alpha":
            image = Image.fromarray(draw(2), "LA")
        elif kind == "png bilevel":
            image = Image.fromarray(draw(1)[..., 0]).convert("1")
        else:
            image = Image.fromarray(draw(3)).quantize(4 if kind == "png 4 colours" else 200)
            options = dict(transparency=1) if kind == "png palette transparent" else {}
        image.save(path, **options)
    return path


def read_picture(path):
    """The picture as shown, RGB, of 16 bits the high byte."""
    image = Image.open(path)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return ImageOps.exif_transpose(image).convert("RGB")


def target_size(width, height, short_side, max_size):
    """DETR's rule (datasets/transforms.py): width and height after resizing."""
    low, high = min(width, height), max(width, height)
    if max_size and high / low * short_side > max_size:
        short_side = int(round(max_size * low / high))
    if low == short_side:
        return width, height
    if width < height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def write_preprocessor(folder, short_side, max_size):
    with open(folder / "preprocessor_config.json", "w") as file:
        json.dump({"do_normalize": True, "do_resize": True, "image_processor_type": "DetrImageProcessor",
                   "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
                   "size": {"shortest_edge": short_side, "longest_edge": max_size}}, file)


def check_pixels(folder):
    """200 pictures of all kinds and sizes, five rules of resizing."""
    generator = np.random.default_rng(7)
    model = native_model(folder / "model", "basic")
    wrong, count, largest = [], 0, 0.0
    for group, (short_side, max_size) in enumerate([(60, 100), (97, 131), (33, 400), (128, 213), (75, 76)]):
        pictures = folder / f"pictures{group}"
        pictures.mkdir()
        write_preprocessor(model, short_side, max_size)
        kinds = [KINDS[(group * 40 + place) % len(KINDS)] for place in range(40)]
        paths = []
        for place, kind in enumerate(kinds):
            width, height = (int(side) for side in generator.integers(12, 260, 2))
            if place % 10 == 3:
                width = short_side  # a size that stays as it is, or one pass of the resize only
            paths.append(write_picture(pictures / f"{place:03d}", kind, generator, width, height))
        run("predict", "--resume", model, "--dump", folder / "dump.safetensors", *([pictures] if group == 0 else paths))
        dump = load_file(folder / "dump.safetensors")
        for place, (path, kind) in enumerate(zip(paths, kinds)):
            image = read_picture(path)
            size = target_size(*image.size, short_side, max_size)
            bytes_ = np.asarray(image.resize(size, Image.BILINEAR))
            ours = dump[f"{place}.pixel_values"]
            count += 1
            if ours.shape != bytes_.shape:
                wrong.append(f"{kind} {image.size}: {ours.shape}, Pillow {bytes_.shape}")
                continue
            off = np.abs(np.rint((ours * STD + MEAN) * 255).astype(int) - bytes_).max()
            largest = max(largest, float(np.abs(ours - (np.float32(bytes_) / np.float32(255) - MEAN) / STD).max()))
            if off:
                wrong.append(f"{kind} {image.size} to {size}: off by {off} of 255")
    assert not wrong, f"{len(wrong)} of {count} pictures differ: " + "; ".join(wrong[:8])
    assert largest < 1e-6, f"normalised values differ by {largest:.1e}"
    return f"{count} pictures equal to Pillow's, normalised values within {largest:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

TINY = ["--enc_layers", 1, "--dec_layers", 2, "--dim_feedforward", 64, "--hidden_dim", 32, "--nheads", 4, "--num_queries", 12,
        "--short_side", 64, "--max_size", 96, "--batch_size", 2]


def save(model, folder, seed, deep=False):
    """Random weights and norms, then save_pretrained. `deep` keeps a network of many blocks from growing too large."""
    oracle.fill(model, np.random.default_rng(seed))
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if deep and name.endswith("weight"):
                tensor.mul_(0.6)
    model.save_pretrained(folder)
    write_preprocessor(folder, 90, 150)
    return folder


def native_model(folder, case):
    return save(DetrForObjectDetection(oracle.config_of(oracle.CASES[case])), folder, 3)


def timm_model(folder, backbone, dilation):
    config = DetrConfig(use_timm_backbone=True, use_pretrained_backbone=False, backbone=backbone, dilation=dilation, d_model=32,
                        encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4,
                        decoder_attention_heads=4, num_queries=11, num_labels=5)
    return save(DetrForObjectDetection(config), folder, 4, deep=True)


def edit_config(folder, edit):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config, indent=2))


def edit_stride(folder, dilation, output_stride):
    def edit(config):
        config["dilation"] = dilation
        config["backbone_config"]["output_stride"] = output_stride

    edit_config(folder, edit)
    return folder


def published_model(folder):
    """Random weights in the layout of facebook/detr-resnet-50: timm names, counters of the norms, 91 labels, old keys."""
    config = DetrConfig(use_timm_backbone=True, use_pretrained_backbone=False, backbone="resnet50", num_labels=91)
    save(DetrForObjectDetection(config), folder, 5, deep=True)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("running_var")]:
        tensors[name.replace("running_var", "num_batches_tracked")] = np.array(0, np.int64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    labels = {str(index): "N/A" if index % 9 == 0 else f"thing {index}" for index in range(91)}

    def edit(config):
        for key in ("use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs", "backbone_config", "dtype"):
            config.pop(key, None)
        config.update(backbone="resnet50", dilation=False, id2label=labels, label2id={v: int(k) for k, v in labels.items()},
                      classifier_dropout=0.0, max_position_embeddings=1024, scale_embedding=False)

    edit_config(folder, edit)
    with open(folder / "preprocessor_config.json", "w") as file:
        json.dump({"do_normalize": True, "do_resize": True, "feature_extractor_type": "DetrFeatureExtractor",
                   "format": "coco_detection", "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
                   "max_size": 150, "size": 90}, file)
    return folder


def open_checkpoint(folder):
    """The folder in PyTorch; nothing in it may be missing or left over."""
    kind = oracle.TrainDetr if own_kind(folder) else DetrForObjectDetection
    # Old configurations leave use_pretrained_backbone out, for which 4.57 would fetch weights that are replaced at once.
    offline = json.loads((folder / "config.json").read_text()).get("use_timm_backbone", True) and not FIVE
    options = dict(use_pretrained_backbone=False) if offline else {}
    model, information = kind.from_pretrained(folder, output_loading_info=True, **options)
    wrong = {key: sorted(names)[:3] for key, names in information.items()
             if names and not all("num_batches_tracked" in str(name) for name in names)}
    assert not wrong, f"transformers finds {wrong}"
    return model.eval()


def own_kind(folder):
    return json.loads((folder / "config.json").read_text())["model_type"] == "train_detr"


def agree(folder, scratch):
    """`predict` and PyTorch on three pictures: logits, boxes, detections. Returns the figure to print."""
    generator = np.random.default_rng(11)
    paths = [write_picture(scratch / f"{width}x{height}", "jpeg", generator, width, height)
             for width, height in ((130, 97), (75, 140), (210, 64))]
    run("predict", "--resume", folder, "--dump", scratch / "dump.safetensors", "--json", scratch / "found.json",
        "--threshold", 0, *paths)
    dump, found = load_file(scratch / "dump.safetensors"), json.loads((scratch / "found.json").read_text())
    model = open_checkpoint(folder)
    focal = own_kind(folder) and model.config.class_loss == "focal"
    worst, scale = 0.0, 0.0
    assert len(found) == len(paths)
    for place, (path, entry) in enumerate(zip(paths, found)):
        pixels = torch.from_numpy(dump[f"{place}.pixel_values"]).permute(2, 0, 1)[None].contiguous()
        with torch.no_grad():
            logits, boxes = (layers[-1].numpy() for layers in oracle.run_image(model, pixels))
        for name, theirs in (("logits", logits), ("pred_boxes", boxes)):
            ours = dump[f"{place}.{name}"]
            assert ours.shape == theirs.shape, f"{name}: {ours.shape}, transformers {theirs.shape}"
            difference = float(np.abs(ours - theirs).max())
            assert difference <= LIMIT, f"picture {place}: {name} differ by {difference:.2g}"
            worst = max(worst, difference)
        scale = max(scale, float(logits.std()))
        check_detections(entry, path, logits, boxes, model.config.id2label, focal)
    assert scale > 0.05, "these logits are too small for the comparison to mean anything"
    return f"largest difference {worst:.1e} (logits spread {scale:.2g})"


def check_detections(entry, path, logits, boxes, id2label, focal):
    """
    The entry of --json at threshold 0 against DETR's PostProcess on the logits, with focal loss against Deformable DETR's,
    clipped to the picture.
    """
    width, height = Image.open(path).size
    assert (entry["width"], entry["height"]) == (width, height)
    if focal:
        scores, pairs = torch.from_numpy(logits).sigmoid().flatten().topk(len(logits))
        scores, labels, boxes = scores.numpy(), pairs.numpy() % logits.shape[1], boxes[pairs.numpy() // logits.shape[1]]
        probabilities = scores[:, None]
    else:
        probabilities = torch.from_numpy(logits).softmax(-1).numpy()[:, :-1]
        scores, labels = probabilities.max(-1), probabilities.argmax(-1)
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    corners = np.concatenate([centre - half, centre + half], axis=1) * [width, height, width, height]
    corners = np.clip(corners, 0, [width, height, width, height])
    order = np.argsort(-scores, kind="stable")
    detections = entry["detections"]
    assert len(detections) == len(scores), f"{len(detections)} detections at threshold 0, {len(scores)} queries"
    for rank, (detection, query) in enumerate(zip(detections, order)):
        assert abs(detection["score"] - scores[query]) < LIMIT, f"rank {rank}: score {detection['score']}, {scores[query]}"
        near = np.abs(scores - scores[query]) < LIMIT  # the order of almost equal scores is open
        second = np.sort(probabilities[query])[-2] if probabilities.shape[1] > 1 else 0
        if near.sum() == 1 and scores[query] - second > LIMIT:
            assert detection["label"] == id2label[int(labels[query])], f"rank {rank}: label {detection['label']}"
            assert np.abs(np.array(detection["box"]) - corners[query]).max() < LIMIT * max(width, height), f"rank {rank}: box"


def trained_own(folder, *flags):
    """A checkpoint that is no DETR to transformers, which must say so."""
    run("train", "--data", "data/bccd", "--output_dir", folder, "--steps", 2, "--backbone", "resnet18", *TINY, *flags)
    for kind in (AutoModelForObjectDetection, DetrForObjectDetection):
        try:
            kind.from_pretrained(folder)
        except (ValueError, RuntimeError):
            continue
        raise AssertionError(f"{kind.__name__} opens what it does not know")
    return folder


def trained(folder, *flags):
    run("train", "--data", "data/bccd", "--output_dir", folder, "--steps", 2, *flags)
    config = DetrConfig.from_pretrained(folder)
    weights = (config.class_cost, config.bbox_cost, config.giou_cost, config.bbox_loss_coefficient,
               config.giou_loss_coefficient, config.eos_coefficient)
    assert weights == (1, 5, 2, 5, 2, 0.1), f"config.json: weights of the loss {weights}"
    return folder


def check_checkpoints():
    """(name, function of a scratch folder) of every kind of folder that one side writes and the other reads."""
    yield "trained, resnet18", lambda at: agree(trained(at / "out", "--backbone", "resnet18", *TINY), at)
    yield "trained, resnet50", lambda at: agree(trained(at / "out", "--backbone", "resnet50", *TINY), at)
    yield "trained, resnet18 DC5", lambda at: agree(trained(at / "out", "--backbone", "resnet18", "--dilation", *TINY), at)
    for flags in (["--decoder", "anchor", "--class_loss", "focal"], ["--decoder", "anchor"], ["--class_loss", "focal"],
                  ["--decoder", "anchor", "--dilation", "--backbone", "tiny", "--enc_layers", "0"]):
        yield f"trained, {' '.join(flags)}", lambda at, flags=flags: agree(trained_own(at / "out", *flags), at)
    yield "trained from save_pretrained", lambda at: agree(
        trained(at / "out", "--pretrained", native_model(at / "start", "odd"), "--short_side", 64, "--max_size", 96), at)
    yield "fine-tuned from the published layout", lambda at: agree(
        trained(at / "out", "--pretrained", published_model(at / "start"), "--short_side", 64, "--max_size", 96,
                "--freeze", "backbone,encoder"), at)
    yield "saved, native basic", lambda at: agree(native_model(at / "model", "basic"), at)
    yield "saved, native bottleneck", lambda at: agree(native_model(at / "model", "bottleneck"), at)
    yield "saved, native odd widths", lambda at: agree(native_model(at / "model", "odd"), at)
    yield "saved, timm", lambda at: agree(timm_model(at / "model", "resnet18", False), at)
    yield "saved, timm DC5", lambda at: agree(timm_model(at / "model", "resnet18", True), at)
    if FIVE:  # output_stride is in backbone_config, beside which `dilation` says nothing
        for said, stride in ((False, 16), (True, None)):
            yield f"saved, timm, dilation {said}, output_stride {stride}", lambda at, said=said, stride=stride: agree(
                edit_stride(timm_model(at / "model", "resnet18", True), said, stride), at)
    else:  # 5.x sends a name with arguments to the hub
        yield "saved, timm DC5 with its own widths", lambda at: agree(native_model(at / "model", "dc5"), at)
        yield "saved, the older form", lambda at: agree(older_model(at / "model"), at)
    yield "published layout", lambda at: agree(published_model(at / "model"), at)


def older_model(folder):
    """`backbone: "resnet50"` and nothing else about it, as configurations were before backbone_config."""
    timm_model(folder, "resnet50", False)

    def edit(config):
        for key in ("backbone_kwargs", "backbone_config", "use_pretrained_backbone", "use_timm_backbone"):
            config.pop(key, None)

    edit_config(folder, edit)
    return folder


def main():
    global program
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", default=program, type=Path, help="the trainer to check")
    parser.add_argument("--only", choices=["checkpoints", "pixels", "scores"])
    arguments = parser.parse_args()
    program = arguments.program.resolve()
    torch.set_num_threads(2)
    checks = [("checkpoints", name, check) for name, check in check_checkpoints()]
    checks += [("pixels", "decoding and resizing", check_pixels),
               ("scores", "COCOeval", lambda at: f"50 cases, largest difference {check_eval.check_eval(str(program), 50):.1e}")]
    passed = failed = 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}, {program}")
    for kind, name, check in checks:
        if arguments.only not in (None, kind):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"ok      {kind}: {name}: {check(Path(folder))}", flush=True)
                passed += 1
            except Exception as problem:  # each check stands for itself; the next one runs
                print(f"FAILED  {kind}: {name}: {type(problem).__name__}: {problem}", flush=True)
                failed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
