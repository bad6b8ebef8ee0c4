#!/usr/bin/env python3
"""Speed beside PyTorch: one training step and one inference of DETR at a real size, both programs in turn.

    python dev/bench.py [--backbone resnet50] [--size 800x1066] [--batch_size 1] [--rounds 5] [--threads N]
                        [--precision fp32] [--program ./train_detr] [--json FILE]

Prints medians, the ratio, peak memory and the share of the machine's measured multiply-add peak.

PyTorch's side is the official DETR, written here as it would be for speed on a CPU: channels_last, frozen batch norm as
one native kernel, attention without returning its weights, fused AdamW, no padding masks (all pictures have one size).
A step is what `train_detr bench` times: from decoded pixels to updated weights (normalise, forward with dropout, a
matching for each decoder layer, loss, backward, clipping, AdamW), on random pictures with 7 boxes each.

The rounds alternate between the programs, because a machine's speed drifts; PyTorch lives in a process of its own,
which sleeps while the other is timed, so that peak memory is each program's own.
"""
import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

BOXES, CLASSES, QUERIES, WIDTH, HEADS, LAYERS, FEEDFORWARD, DROPOUT, EOS = 7, 91, 100, 256, 8, 6, 2048, 0.1, 0.1
BACKBONES = {"resnet18": (0, (2, 2, 2, 2)), "resnet34": (0, (3, 4, 6, 3)), "resnet50": (1, (3, 4, 6, 3)),
             "resnet101": (1, (3, 4, 23, 3))}


def build_model(backbone):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class FrozenNorm(nn.Module):
        def __init__(self, channels):
            super().__init__()
            for name, value in ("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0):
                self.register_buffer(name, torch.full((channels,), value))

        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)

    def conv(inputs, outputs, kernel, stride=1):
        return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), FrozenNorm(outputs))

    class Block(nn.Module):
        def __init__(self, inputs, width, outputs, stride, bottleneck):
            super().__init__()
            if bottleneck:
                convs = [conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, outputs, 1)]
            else:
                convs = [conv(inputs, width, 3, stride), conv(width, outputs, 3)]
            self.convs = nn.ModuleList(convs)
            self.shortcut = conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()

        def forward(self, x):
            y = x
            for layer in self.convs[:-1]:
                y = F.relu(layer(y), inplace=True)
            return F.relu(self.convs[-1](y) + self.shortcut(x), inplace=True)

    class Attention(nn.Module):  # with residual, dropout and norm
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=DROPOUT, batch_first=True)
            self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(DROPOUT)

        def forward(self, x, query, key, value):
            return self.norm(x + self.dropout(self.attention(query, key, value, need_weights=False)[0]))

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, FEEDFORWARD), nn.Linear(FEEDFORWARD, WIDTH)
            self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(DROPOUT)

        def forward(self, x):
            return self.norm(x + self.dropout(self.down(self.dropout(F.relu(self.up(x))))))

    def sine_positions(height, width):
        def waves(size):
            at = torch.arange(1, size + 1, dtype=torch.float32) / (size + 1e-6) * 2 * math.pi
            at = at[:, None] / 10000 ** (2 * (torch.arange(WIDTH // 2) // 2) / (WIDTH // 2))
            return torch.stack((at[:, 0::2].sin(), at[:, 1::2].cos()), 2).flatten(1)

        y, x = waves(height)[:, None].expand(-1, width, -1), waves(width)[None].expand(height, -1, -1)
        return torch.cat((y, x), 2).flatten(0, 1)[None]

    class Detr(nn.Module):
        def __init__(self):
            super().__init__()
            bottleneck, depths = BACKBONES[backbone]
            self.stem, stages, inputs = conv(3, 64, 7, 2), [], 64
            for stage, depth in enumerate(depths):
                width = 64 << stage
                outputs = width * 4 if bottleneck else width
                stages.append(nn.Sequential(*[Block(inputs if i == 0 else outputs, width, outputs,
                                                    2 if stage and i == 0 else 1, bottleneck) for i in range(depth)]))
                inputs = outputs
            self.stages, self.projection = nn.ModuleList(stages), nn.Conv2d(inputs, WIDTH, 1)
            self.queries = nn.Embedding(QUERIES, WIDTH)
            encoder = [nn.ModuleList([Attention(), FeedForward()]) for _ in range(LAYERS)]
            decoder = [nn.ModuleList([Attention(), Attention(), FeedForward()]) for _ in range(LAYERS)]
            self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
            self.norm, self.classes = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES + 1)
            self.boxes = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
                                       nn.Linear(WIDTH, 4))
            for module in (self.stem, self.stages[0]):
                module.requires_grad_(False)
            for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 3, 2, 1)
            for stage in self.stages:
                x = stage(x)
            positions = sine_positions(*x.shape[2:])
            memory = self.projection(x).flatten(2).transpose(1, 2)
            for attention, feed_forward in self.encoder:
                query = memory + positions
                memory = feed_forward(attention(memory, query, query, memory))
            key, queries = memory + positions, self.queries.weight[None].expand(len(x), -1, -1)
            state, states = torch.zeros_like(queries), []
            for own, cross, feed_forward in self.decoder:
                query = state + queries
                state = own(state, query, query, state)
                state = feed_forward(cross(state, state + queries, key, memory))
                states.append(self.norm(state))
            states = torch.stack(states) if self.training else states[-1][None]
            return self.classes(states), self.boxes(states).sigmoid()

    return Detr().to(memory_format=torch.channels_last)


def set_loss(logits, boxes, target_classes, target_boxes):
    """DETR's SetCriterion: logits (layers, images, queries, classes + 1), boxes (layers, images, queries, 4)."""
    import torch
    from scipy.optimize import linear_sum_assignment
    from torch.nn import functional as F

    def corners(box):
        center, size = box[..., :2], box[..., 2:]
        return torch.cat((center - size / 2, center + size / 2), -1)

    def area(box):
        return (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])

    def giou(a, b):
        inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
        hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
        union = area(a) + area(b) - inside
        return inside / union - (hull - union) / hull

    num_boxes, loss = max(1, target_classes.numel()), 0
    weights = torch.ones(CLASSES + 1)
    weights[-1] = EOS
    for layer_logits, layer_boxes in zip(logits.float(), boxes.float()):
        wanted = torch.full(layer_logits.shape[:2], CLASSES)
        for image in range(len(layer_logits)):
            with torch.no_grad():
                truth = target_boxes[image]
                cost = 5 * torch.cdist(layer_boxes[image], truth, p=1)
                cost -= layer_logits[image].softmax(-1)[:, target_classes[image]]
                cost -= 2 * giou(corners(layer_boxes[image])[:, None], corners(truth)[None])
                query, target = map(torch.as_tensor, linear_sum_assignment(cost))
            wanted[image, query] = target_classes[image, target]
            chosen, truth = layer_boxes[image, query], truth[target]
            loss = loss + 5 * F.l1_loss(chosen, truth, reduction="sum") / num_boxes
            loss = loss + 2 * (1 - giou(corners(chosen), corners(truth))).sum() / num_boxes
        loss = loss + F.cross_entropy(layer_logits.flatten(0, 1), wanted.flatten(), weights)
    return loss


def worker(options):
    """Reads `train` or `infer` a line and answers with seconds and its own peak memory."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(42)
    height, width = map(int, options.size.split("x"))
    model = build_model(options.backbone)
    backbone = [p for n, p in model.named_parameters() if n.startswith("stages") and p.requires_grad]
    rest = [p for n, p in model.named_parameters() if not n.startswith(("stages", "stem"))]
    groups = [{"params": rest}, {"params": backbone, "lr": 1e-5}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4, fused=True)
    pixels = torch.randint(0, 256, (options.batch_size, height, width, 3), dtype=torch.uint8)
    classes = torch.randint(0, CLASSES, (options.batch_size, BOXES))
    boxes = torch.rand(options.batch_size, BOXES, 4) * 0.4 + 0.1
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "bf16")

    def normalised(count):  # (images, 3, height, width), channels_last as a view of (images, height, width, 3)
        return ((pixels[:count].float() / 255 - mean) / deviation).permute(0, 3, 1, 2)

    def train():
        model.train()
        with cast:
            logits, predicted = model(normalised(options.batch_size))
        set_loss(logits, predicted, classes, boxes).backward()
        torch.nn.utils.clip_grad_norm_(backbone + rest, 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer():
        model.eval()
        with torch.inference_mode(), cast:
            logits, predicted = model(normalised(1))
            logits.softmax(-1)

    for line in sys.stdin:
        start = time.perf_counter()
        {"train": train, "infer": infer}[line.strip()]()
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]), flush=True)


def run_ours(options):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bench.json")
        command = [options.program, "bench", "--backbone", options.backbone, "--size", options.size, "--batch_size",
                   str(options.batch_size), "--precision", options.precision, "--json", path]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: status {done.returncode}: {done.stdout.strip()[-500:]}")
        with open(path) as file:
            return json.load(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="resnet50", choices=BACKBONES)
    parser.add_argument("--size", default="800x1066", help="height x width in pixels")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures in a training step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--steps", type=int, default=3, help="PyTorch's training steps and inferences a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--program", default="./train_detr")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.worker:
        return worker(options)

    import torch

    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the machine is busy (load average {load:.1f}): wait until it is idle for figures to trust",
              file=sys.stderr)
    theirs = subprocess.Popen([sys.executable, __file__, "--worker", *sys.argv[1:]], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)

    def pytorch(what):
        theirs.stdin.write(what + "\n")
        theirs.stdin.flush()
        line = theirs.stdout.readline()
        if not line:
            sys.exit("the PyTorch process ended early: see its message above")
        return json.loads(line)

    for what in ("infer", "train", "train"):  # compiles kernels, touches memory: not timed
        pytorch(what)
    ours, train, infer, memory = [], [], [], 0
    for turn in range(options.rounds):
        time.sleep(0.5)  # PyTorch's threads stop spinning
        ours.append(run_ours(options))
        for _ in range(options.steps):
            train.append(pytorch("train")[0])
        for _ in range(options.steps):
            seconds, memory = pytorch("infer")
            infer.append(seconds)
        print(f"round {turn + 1} of {options.rounds}: training step {ours[-1]['train_step_s']:.3f} s, PyTorch "
              f"{statistics.median(train[-options.steps:]):.3f} s; inference {ours[-1]['infer_s']:.3f} s, PyTorch "
              f"{statistics.median(infer[-options.steps:]):.3f} s", file=sys.stderr)
    theirs.stdin.close()
    theirs.wait()

    mine = {key: statistics.median(run[key] for run in ours) for key in ours[0]}
    peak = mine["peak_gflops_measured"]
    gflop = {"train": mine["gflops_train"] * mine["train_step_s"], "infer": mine["gflops_infer"] * mine["infer_s"]}
    result = {"backbone": options.backbone, "size": options.size, "batch_size": options.batch_size,
              "precision": options.precision, "threads": options.threads, "torch": torch.__version__,
              "peak_gflops_measured": peak, "train_step_s": mine["train_step_s"], "infer_s": mine["infer_s"],
              "peak_rss_bytes": mine["peak_rss_bytes"], "pytorch_train_step_s": statistics.median(train),
              "pytorch_infer_s": statistics.median(infer), "pytorch_peak_rss_bytes": memory}
    print(f"{options.backbone}, {options.size}, {options.batch_size} in a step, {options.precision}, {options.threads} "
          f"threads; peak measured {peak:.0f} GFLOP/s; PyTorch {torch.__version__}; medians of {options.rounds} rounds")
    print(f"{'':16} {'ours':>10} {'PyTorch':>10} {'ratio':>7} {'% of peak':>10} {'PyTorch':>8}")
    for name, key, work in ("training step", "train_step_s", "train"), ("inference", "infer_s", "infer"):
        us, them = result[key], result["pytorch_" + key]
        print(f"{name:16} {us:8.3f} s {them:8.3f} s {them / us:7.2f} {100 * gflop[work] / us / peak:9.0f}% "
              f"{100 * gflop[work] / them / peak:7.0f}%")
    us, them = result["peak_rss_bytes"] / 2**20, memory / 2**20
    print(f"{'peak memory':16} {us:6.0f} MiB {them:6.0f} MiB {them / us:7.2f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
