"""The official DETR and one training step of it in PyTorch, for dev/bench.py: written as it would be for speed on a CPU
(channels_last, frozen batch norm as one native kernel, attention without returning its weights, fused AdamW, no padding
masks, autocast for bf16), and on a GPU as it is told. A `case` says backbone, layers, height, width, batch and precision.
"""
import math
import os
import warnings

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

BOXES, CLASSES, QUERIES, WIDTH, HEADS, FEEDFORWARD, DROPOUT, EOS = 7, 91, 100, 256, 8, 2048, 0.1, 0.1
BACKBONES = {"resnet18": (0, (2, 2, 2, 2)), "resnet50": (1, (3, 4, 6, 3))}


def build_model(case, layout):
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

    def sine_positions(height, width, device):
        def waves(size):
            at = torch.arange(1, size + 1, dtype=torch.float32, device=device) / (size + 1e-6) * 2 * math.pi
            at = at[:, None] / 10000 ** (2 * (torch.arange(WIDTH // 2, device=device) // 2) / (WIDTH // 2))
            return torch.stack((at[:, 0::2].sin(), at[:, 1::2].cos()), 2).flatten(1)

        y, x = waves(height)[:, None].expand(-1, width, -1), waves(width)[None].expand(height, -1, -1)
        return torch.cat((y, x), 2).flatten(0, 1)[None]

    class Detr(nn.Module):
        def __init__(self):
            super().__init__()
            bottleneck, depths = BACKBONES[case.backbone]
            self.stem, stages, inputs = conv(3, 64, 7, 2), [], 64
            for stage, depth in enumerate(depths):
                width = 64 << stage
                outputs = width * 4 if bottleneck else width
                stages.append(nn.Sequential(*[Block(inputs if i == 0 else outputs, width, outputs,
                                                    2 if stage and i == 0 else 1, bottleneck) for i in range(depth)]))
                inputs = outputs
            self.stages, self.projection = nn.ModuleList(stages), nn.Conv2d(inputs, WIDTH, 1)
            self.queries = nn.Embedding(QUERIES, WIDTH)
            encoder = [nn.ModuleList([Attention(), FeedForward()]) for _ in range(case.layers)]
            decoder = [nn.ModuleList([Attention(), Attention(), FeedForward()]) for _ in range(case.layers)]
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
            positions = sine_positions(*x.shape[2:], x.device)
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

    return Detr().to(memory_format=layout)


def set_loss(logits, boxes, target_classes, target_boxes):
    """DETR's SetCriterion: logits (layers, images, queries, classes + 1), boxes (layers, images, queries, 4)."""
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
    weights = torch.ones(CLASSES + 1, device=logits.device)
    weights[-1] = EOS
    for layer_logits, layer_boxes in zip(logits.float(), boxes.float()):
        with torch.no_grad():
            cost = 5 * torch.cdist(layer_boxes, target_boxes, p=1)
            cost -= layer_logits.softmax(-1).gather(2, target_classes[:, None].expand(-1, QUERIES, -1))
            cost -= 2 * giou(corners(layer_boxes)[:, :, None], corners(target_boxes)[:, None])
            pairs = numpy.array([linear_sum_assignment(of_image) for of_image in cost.cpu()])
            query, target = torch.as_tensor(pairs, device=logits.device).unbind(1)  # (images, boxes)
            image = torch.arange(len(query), device=logits.device)[:, None]
        wanted = torch.full(layer_logits.shape[:2], CLASSES, device=logits.device)
        wanted[image, query] = target_classes[image, target]
        chosen, truth = layer_boxes[image, query], target_boxes[image, target]
        loss = loss + 5 * F.l1_loss(chosen, truth, reduction="sum") / num_boxes
        loss = loss + 2 * (1 - giou(corners(chosen), corners(truth))).sum() / num_boxes
        loss = loss + F.cross_entropy(layer_logits.flatten(0, 1), wanted.flatten(), weights)
    return loss


class Network:
    """The network and one training step of it. The numbers are the same on every device."""

    def __init__(self, case, device="cpu", layout=torch.channels_last):
        torch.manual_seed(42)
        self.model = build_model(case, layout).to(device)
        self.pixels = torch.randint(0, 256, (case.batch, case.height, case.width, 3), dtype=torch.uint8)
        self.classes = torch.randint(0, CLASSES, (case.batch, BOXES))
        self.boxes = torch.rand(case.batch, BOXES, 4) * 0.4 + 0.1
        self.mean, self.deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.pixels, self.classes, self.boxes, self.mean, self.deviation = (
            tensor.to(device) for tensor in (self.pixels, self.classes, self.boxes, self.mean, self.deviation))
        self.layout, self.cast = layout, torch.autocast(device, dtype=torch.bfloat16, enabled=case.precision == "bf16")
        backbone = [p for n, p in self.model.named_parameters() if n.startswith("stages") and p.requires_grad]
        rest = [p for n, p in self.model.named_parameters() if not n.startswith(("stages", "stem"))]
        self.parameters = backbone + rest
        groups = [{"params": rest}, {"params": backbone, "lr": 1e-5}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4, fused=True)

    def normalise(self, pixels):  # (images, 3, height, width), channels_last as a view of (images, height, width, 3)
        pixels = ((pixels.float() / 255 - self.mean) / self.deviation).permute(0, 3, 1, 2)
        return pixels.contiguous() if self.layout == torch.contiguous_format else pixels

    def train(self):
        self.model.train()
        with self.cast:
            logits, boxes = self.model(self.normalise(self.pixels))
        set_loss(logits, boxes, self.classes, self.boxes).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def infer(self):  # class probabilities and boxes of the first picture
        self.model.eval()
        with torch.inference_mode(), self.cast:
            logits, boxes = self.model(self.normalise(self.pixels[:1]))
            return logits.float().softmax(-1).cpu(), boxes.float().cpu()

    def example(self, folder):
        """Writes a picture, its probabilities and its boxes."""
        arrays = [tensor.numpy() for tensor in (self.pixels[:1], *self.infer())]
        numpy.savez(os.path.join(folder, "example.npz"), *arrays)

    def export(self, folder):
        """Writes the network from pixels to probabilities and boxes as ONNX."""
        class Detector(torch.nn.Module):
            def __init__(self, network):
                super().__init__()
                self.network, self.model = network, network.model

            def forward(self, pixels):
                logits, boxes = self.model(self.network.normalise(pixels))
                return logits.softmax(-1), boxes

        warnings.simplefilter("ignore")  # the shapes are constant, as the tracer says
        torch.onnx.export(Detector(self).eval(), (self.pixels[:1],), os.path.join(folder, "detr.onnx"), dynamo=False,
                          input_names=["pixels"], output_names=["probabilities", "boxes"], opset_version=17)
