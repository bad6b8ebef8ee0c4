#!/usr/bin/env python3
"""
The executable specification of the trainer's numbers: what two training steps of DETR compute, in double precision.

    python dev/oracle.py OUTDIR          writes config.json, model.safetensors (the start) and truth.safetensors
                                         under OUTDIR/NAME for each of the cases, and OUTDIR/options
    python dev/oracle.py --compare A B   compares two such folders; status 1 when they differ by more than rounding

The network is transformers' DetrForObjectDetection, and `TrainDetr` what --decoder anchor and --class_loss focal make of
it: TrainDetr.from_pretrained(OUT) opens such a checkpoint. Loss, matching, clipping, parameter groups and dropout are those
of facebookresearch/detr. Read it in order: cases, random numbers, network, criterion, training steps, dumps, options,
comparison.

Where transformers departs from DETR, or from double precision, the departure is undone here:
  - its sine positions are computed in float32 even for a double model:              `sine_positions`
  - it applies dropout to the encoder's input, which DETR does not do:               `open_model`
  - dropout on attention weights and after the ReLU of the FFN is off by default:    `config_of`
  - with auxiliary_loss it feeds the normed state to the following decoder layer:    `run_image` norms a copy instead
  - it freezes all of a native backbone, or trains all of the norms' affines never:  `trained_parameters`

A truth is only a truth if rounding cannot flip a decision: `Margins` measures how far every ReLU, matching, class and box
comparison is from a tie, and `first_step_margin` how far every gradient is from zero, where Adam's first step turns its
direction. A case that comes too near is refused.

How far a float32 program may be from the truth is measured on PyTorch itself, whose float32 runs are draws from a
distribution: `float32_runs` draws twelve of them. Its autocast to bf16 is the measure of --precision bf16: `bf16_errors`.
"""
import argparse
import json
import math
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
warnings.filterwarnings("ignore", category=FutureWarning)  # torch warns of itself on import
warnings.filterwarnings("ignore", message="TF32")
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from safetensors.numpy import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch.optim.swa_utils import AveragedModel
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig, get_cosine_schedule_with_warmup
from transformers.models.detr import modeling_detr

# ---------------------------------------------------------------------------------------------------------------------
# The nine cases. `sizes` are (height, width) of the three images of each of the two steps; of these images the first
# has more boxes than there are queries, the second a crowd among its boxes, the third none (`SHARES` turns them round
# in the second step). Weights other than DETR's own, so that a factor that is mixed up or left out shows.
#
# A GPU takes the last two: heads of 16 or 32 channels, channels that are multiples of 8, pictures of bytes. There the
# matches are its own in 16 bits too: in the first step they are 0.06 and 0.12 from a tie. With `projection` the
# transformer's input is of size 1 to 2, as a norm's output is; where it is 10, the scores of a query are so far apart that
# its gradients are rounding for the greater part.

DEFAULTS = dict(lr=1e-3, lr_backbone=3e-4, weight_decay=0.05, clip_max_norm=0.1, eos_coef=0.1, dropout=0.0, seed=42,
                train_norms=0, train_all=0, cost_class=1, cost_bbox=5, cost_giou=2, bbox_loss_coef=5, giou_loss_coef=2)

CASES = dict(
    basic=dict(
        numpy_seed=123, settings=dict(),
        backbone=dict(layer_type="basic", embedding_size=8, hidden_sizes=[8, 10, 12, 16], depths=[1, 1, 2, 1]),
        detr=dict(d_model=20, heads=5, ffn=24, encoder_layers=2, decoder_layers=3, num_queries=7), num_classes=5,
        sizes=[[(61, 75), (47, 90), (72, 52)], [(50, 64), (97, 41), (65, 66)]]),
    bottleneck=dict(
        numpy_seed=104, settings=dict(dropout=0.1, eos_coef=0.3, clip_max_norm=1000.0, cost_class=2, cost_bbox=3,
                                    cost_giou=1.5, bbox_loss_coef=4, giou_loss_coef=1.25, seed=0x123456789),
        backbone=dict(layer_type="bottleneck", embedding_size=8, hidden_sizes=[16, 20, 24, 32], depths=[1, 2, 1, 2]),
        detr=dict(d_model=32, heads=2, ffn=40, encoder_layers=1, decoder_layers=2, num_queries=6), num_classes=3,
        sizes=[[(64, 96), (55, 71), (81, 43)], [(58, 83), (40, 99), (66, 45)]]),
    dc5=dict(
        numpy_seed=139, settings=dict(weight_decay=1e-4),
        timm=dict(backbone="resnet50", layers=[1, 1, 1, 2], channels=[4, 4, 5, 6]),
        detr=dict(d_model=16, heads=4, ffn=24, encoder_layers=2, decoder_layers=2, num_queries=9), num_classes=4,
        sizes=[[(57, 70), (83, 50), (48, 48)], [(49, 79), (44, 67), (75, 60)]]),
    odd=dict(
        numpy_seed=104, settings=dict(dropout=0.25, train_norms=1, train_all=1, eos_coef=0.2),
        backbone=dict(layer_type="bottleneck", embedding_size=7, hidden_sizes=[18, 22, 26, 31], depths=[1, 1, 2, 1]),
        detr=dict(d_model=36, heads=3, ffn=37, encoder_layers=1, decoder_layers=2, num_queries=5), num_classes=2,
        sizes=[[(37, 211), (101, 40), (33, 65)], [(150, 33), (35, 139), (43, 43)]]),
    even=dict(
        numpy_seed=105, settings=dict(dropout=0.1, train_norms=1, train_all=1),
        timm=dict(backbone="resnet50", layers=[1, 1, 2, 1], channels=[4, 4, 6, 8]),
        detr=dict(d_model=24, heads=4, ffn=32, encoder_layers=1, decoder_layers=2, num_queries=6), num_classes=3,
        sizes=[[(57, 70), (83, 50), (48, 48)], [(49, 79), (44, 67), (75, 60)]]),
    anchor=dict(
        numpy_seed=104, settings=dict(dropout=0.1, cost_class=2, class_loss_coef=1.5, aux_matches=2), decoder="anchor", class_loss="focal",
        backbone=dict(layer_type="basic", embedding_size=8, hidden_sizes=[8, 10, 12, 16], depths=[1, 1, 1, 1]),
        detr=dict(d_model=32, heads=8, ffn=24, encoder_layers=1, decoder_layers=3, num_queries=7), num_classes=4,
        sizes=[[(61, 139), (101, 58), (72, 52)], [(50, 64), (97, 41), (65, 120)]]),
    dense=dict(
        numpy_seed=105, settings=dict(train_norms=1, train_all=1, class_loss_coef=1, aux_matches=1), decoder="anchor", class_loss="focal", dilation=True,
        backbone=dict(layer_type="basic", embedding_size=8, hidden_sizes=[8, 10, 12], depths=[1, 1, 2]),
        detr=dict(d_model=16, heads=4, ffn=24, encoder_layers=0, decoder_layers=2, num_queries=6), num_classes=3,
        sizes=[[(57, 70), (83, 50), (48, 48)], [(49, 79), (44, 67), (75, 60)]]),
    gpu=dict(
        numpy_seed=87, settings=dict(dropout=0.1, train_norms=1, train_all=1), bytes=True, projection=0.2,
        backbone=dict(layer_type="bottleneck", embedding_size=8, hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 2, 1]),
        detr=dict(d_model=32, heads=1, ffn=40, encoder_layers=1, decoder_layers=3, num_queries=6), num_classes=3,
        sizes=[[(64, 96), (55, 71), (81, 43)], [(58, 83), (40, 99), (66, 45)]]),
    gpu_anchor=dict(
        numpy_seed=118, settings=dict(dropout=0.1, train_norms=1, train_all=1, cost_class=2, class_loss_coef=1.5, aux_matches=2),
        bytes=True, projection=0.2, decoder="anchor", class_loss="focal",
        backbone=dict(layer_type="basic", embedding_size=8, hidden_sizes=[8, 16, 24, 24], depths=[1, 1, 1, 1]),
        detr=dict(d_model=32, heads=2, ffn=24, encoder_layers=1, decoder_layers=3, num_queries=7), num_classes=4,
        sizes=[[(61, 99), (81, 58), (72, 52)], [(50, 64), (97, 41), (65, 80)]]),
)

SHARES = [["many", "crowd", "none"], ["none", "many", "crowd"]]  # what boxes image i of step s has
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of a byte's 0..1, in a case with `bytes`


def settings_of(case):
    return {**DEFAULTS, **case["settings"]}


def config_of(case):
    """The configuration of a case. DC5 has no ResNetConfig: it is a timm backbone, sized by timm's own arguments."""
    detr, settings = case["detr"], settings_of(case)
    if "timm" in case:
        arguments = dict(case["timm"])
        backbone = dict(use_timm_backbone=True, use_pretrained_backbone=False, backbone=arguments.pop("backbone"),
                        dilation=True, backbone_kwargs=dict(out_indices=[1, 2, 3, 4], in_chans=3, output_stride=16, **arguments))
    else:
        backbone = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                        backbone_config=ResNetConfig(out_features=[f"stage{len(case['backbone']['depths'])}"], **case["backbone"]))
    names = {index: f"class {index}" for index in range(case["num_classes"])}
    departs = {key: case[key] for key in ("decoder", "class_loss", "dilation") if key in case}
    return (TrainDetrConfig if departs else DetrConfig)(
        d_model=detr["d_model"], encoder_layers=detr["encoder_layers"], decoder_layers=detr["decoder_layers"],
        encoder_attention_heads=detr["heads"], decoder_attention_heads=detr["heads"], encoder_ffn_dim=detr["ffn"],
        decoder_ffn_dim=detr["ffn"], num_queries=detr["num_queries"], auxiliary_loss=False, dropout=settings["dropout"],
        attention_dropout=settings["dropout"], activation_dropout=settings["dropout"],
        id2label=names, label2id={name: index for index, name in names.items()}, **backbone, **departs)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers. Weights, pictures and boxes: numpy's generator, rounded to float32, the same on every machine.
# Dropout: Philox4x32-10 as data/common.h specifies it.

RANDOM_DROPOUT = 4


def random_words(seed, purpose, site, step, image, count):
    """The first `count` words of data/common.h's random_word(seed, purpose, site, step, image, element)."""
    groups = (count + 3) // 4
    fixed = (purpose | site << 8, step, image)
    counter = [np.arange(groups, dtype=np.uint64)] + [np.full(groups, word, np.uint64) for word in fixed]
    key0, key1, low = seed & 0xFFFFFFFF, seed >> 32, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [(product1 >> np.uint64(32)) ^ counter[1] ^ np.uint64(key0), product1 & low,
                   (product0 >> np.uint64(32)) ^ counter[3] ^ np.uint64(key1), product0 & low]
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(counter, axis=1).reshape(-1)[:count]


class Dropout:
    """
    Stands in for torch.nn.functional.dropout. The n-th call within the forward pass of one image is site n, which gives
    each encoder layer 4 sites and each decoder layer 6; the element is the index into the flattened (1, rows, channels),
    or (heads, queries, keys). `begin` starts an image.
    """

    def begin(self, seed, step, image):
        self.seed, self.step, self.image, self.site = seed, step, image, 0

    def __call__(self, input, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return input
        words = random_words(self.seed, RANDOM_DROPOUT, self.site, self.step, self.image, input.numel())
        self.site += 1
        kept = torch.from_numpy(words >= int(p * 4294967296.0)).reshape(input.shape)
        return input * kept.to(input.dtype) * (1 / (1 - p))


def fill(model, generator, projection=1.0):
    """
    Random weights of a size that lets every gradient be seen, and frozen norms that are far from the identity.
    projection: how large the weights are that bring the feature map to the transformer's channels.
    """
    def normal(tensor, mean, deviation):
        tensor.copy_(torch.from_numpy((mean + deviation * generator.standard_normal(tuple(tensor.shape))).astype(np.float32)))

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, modeling_detr.DetrFrozenBatchNorm2d):
                normal(module.weight, 1, 0.2)
                normal(module.bias, 0, 0.3)
                normal(module.running_mean, 0, 0.3)
                variance = generator.uniform(0.5, 2, tuple(module.running_var.shape))
                module.running_var.copy_(torch.from_numpy(variance.astype(np.float32)))
            elif isinstance(module, torch.nn.LayerNorm):
                normal(module.weight, 1, 0.2)
                normal(module.bias, 0, 0.1)
            elif isinstance(module, torch.nn.Embedding):
                normal(module.weight, 0, 1)
            elif isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                fan_in = module.weight[0].numel()
                gain = 2.0 if isinstance(module, torch.nn.Conv2d) else 1.0
                size = projection if name.endswith("input_projection") else 1
                normal(module.weight, 0, size * (gain / fan_in) ** 0.5)
                if module.bias is not None:
                    normal(module.bias, 0, 0.2)


def draw_images(case, step, generator):
    """The three images of one step: pixel_values (H, W, 3), boxes (n, 4) cxcywh, labels (n), iscrowd (n)."""
    images = []
    for (height, width), share in zip(case["sizes"][step], SHARES[step]):
        count = {"none": 0, "crowd": 4, "many": case["detr"]["num_queries"] + 3}[share]
        size = generator.uniform(0.1, 0.6, (count, 2))
        centre = size / 2 + generator.uniform(0, 1, (count, 2)) * (1 - size)
        iscrowd = np.zeros(count, np.int64)
        if share == "crowd":
            iscrowd[1] = 1  # not the last one: a crowd that is dropped moves the boxes after it
        if case.get("bytes"):
            pixels = ((generator.integers(0, 256, (height, width, 3)) / 255.0 - PIXEL_MEAN) / PIXEL_STD).astype(np.float32)
        else:
            pixels = generator.standard_normal((height, width, 3)).astype(np.float32)
        images.append(dict(
            pixel_values=pixels.astype(np.float64), iscrowd=iscrowd,
            boxes=np.concatenate([centre, size], axis=1).astype(np.float32).astype(np.float64),
            labels=generator.integers(0, case["num_classes"], count)))
    return images


# ---------------------------------------------------------------------------------------------------------------------
# The network

float32_positions = modeling_detr.DetrSinePositionEmbedding.forward  # transformers' own


def sine_positions(self, pixel_values, pixel_mask):
    """DETR's sine positions of an unpadded image (1, H, W), in double: (1, 2 * embedding_dim, H, W), y before x."""
    _, height, width = pixel_mask.shape
    assert bool(pixel_mask.all()) and self.normalize
    row = torch.arange(1, height + 1, dtype=torch.float64) / (height + 1e-6) * self.scale
    column = torch.arange(1, width + 1, dtype=torch.float64) / (width + 1e-6) * self.scale
    channel = torch.arange(self.embedding_dim, dtype=torch.float64)
    wavelength = self.temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / self.embedding_dim)

    def wave(place):  # (n) -> (n, embedding_dim): sine in even channels, cosine in odd ones
        angle = place[:, None] / wavelength
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos())

    y = wave(row)[:, None, :].expand(height, width, -1)
    x = wave(column)[None, :, :].expand(height, width, -1)
    positions = torch.cat([y, x], dim=2).permute(2, 0, 1)[None]
    assert (positions - float32_positions(self, pixel_values, pixel_mask)).abs().max() < 1e-4
    return positions


class TrainDetrConfig(DetrConfig):
    """A DetrConfig with `decoder`, "plain" or "anchor", and `class_loss`, "softmax" or "focal"; any backbone dilates."""
    model_type = "train_detr"

    def __init__(self, decoder="plain", class_loss="softmax", dilation=False, **rest):
        self.decoder, self.class_loss = decoder, class_loss
        super().__init__(dilation=dilation, **rest)
        self.dilation = dilation  # which a DetrConfig keeps only beside a backbone of timm's


# Where head h of the anchor decoder's cross-attention looks, by h modulo 8: the Gaussian's middle (x, y) from the box's
# centre and its deviation, in halves of the box's width and height.
HEADS = [(-1, 0, 0.25), (1, 0, 0.25), (0, -1, 0.25), (0, 1, 0.25), (0, 0, 1), (0, 0, 2), (0, 0, 0.5), (0, 0, 4)]


def spatial_prior(boxes, height, width, heads):
    """
    boxes (queries, 4) -> (heads, queries, height * width), the logarithms of Gaussians around the boxes: what is added to
    the scores. A deviation is at least half a cell. (Gao et al. 2021, "Fast convergence of DETR with spatially modulated
    co-attention", where the network chooses each head's middle.)
    """
    offset_x, offset_y, spread = (boxes.new_tensor([HEADS[h % 8][i] for h in range(heads)])[:, None] for i in range(3))

    def along(cells, centre, size, offset):  # (heads, queries, cells)
        place = (torch.arange(cells, dtype=boxes.dtype) + 0.5) / cells
        deviation = (spread * size / 2).clamp(min=0.5 / cells)
        return -((place - (centre + offset * size / 2)[..., None]) / deviation[..., None]) ** 2 / 2

    x, y, w, h = boxes.unbind(-1)
    return (along(height, y, h, offset_y)[..., :, None] + along(width, x, w, offset_x)[..., None, :]).flatten(-2)


def sine_features(boxes, channels):
    """boxes (queries, 4) -> (queries, 4 * channels): cx, cy, w and h as DETR's sine positions have a place in 0..1."""
    channel = torch.arange(channels, dtype=boxes.dtype)
    wavelength = 10000 ** (2 * torch.div(channel, 2, rounding_mode="floor") / channels)
    angle = 2 * math.pi * boxes[..., None] / wavelength
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).flatten(-2)


def attend(attention, queries, keys, values, prior=0.0):
    """DETR's attention of (1, queries, C), (1, keys, C), (1, keys, C), with a term that is added to the scores."""
    split = lambda rows: rows[0].unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)  # (heads, rows, C / heads)
    q, k, v = split(attention.q_proj(queries)), split(attention.k_proj(keys)), split(attention.v_proj(values))
    weights = F.softmax(q @ k.transpose(1, 2) * attention.scaling + prior, -1)
    out = F.dropout(weights, attention.dropout, attention.training) @ v
    return attention.out_proj(out.transpose(0, 1).flatten(1))[None]


class TrainDetr(DetrForObjectDetection):
    """
    DETR with --decoder anchor, --class_loss focal, and --dilation of a native backbone, each if the configuration says so;
    for one picture at a time.

    focal: the class head has no channel "no object"; a class's score is the sigmoid of its logit.
    anchor: a query is a learned state and a learned box, in logits. Its position in a decoder layer is a function of its
    box there (DAB-DETR: Liu et al. 2022), its cross-attention looks where the box is (`spatial_prior`), and each layer
    moves the box (Deformable DETR: Zhu et al. 2021). A box that a layer receives is a constant to it.
    """
    config_class = TrainDetrConfig

    def __init__(self, config):
        super().__init__(config)
        channels, model = config.d_model, self.model
        if config.dilation and not config.use_timm_backbone:  # as timm does it
            for module in model.backbone.conv_encoder.model.encoder.stages[-1].modules():
                if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2):
                    module.stride = (1, 1)
                elif isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                    module.dilation = module.padding = (2, 2)
        if config.class_loss == "focal":
            self.class_labels_classifier = torch.nn.Linear(channels, config.num_labels)
        if config.decoder == "anchor":
            model.query_position_embeddings = torch.nn.Embedding(config.num_queries, 4)
            model.query_content_embeddings = torch.nn.Embedding(config.num_queries, channels)
            model.decoder.query_position_head = modeling_detr.DetrMLPPredictionHead(2 * channels, channels, channels, 2)

    def anchor_decoder(self, memory, positions, height, width):
        """
        memory, positions (1, height * width, C) -> logits (layers, queries, classes), boxes (layers, queries, 4). Its
        dropouts are DETR's, in DETR's order.
        """
        decoder, logits, boxes = self.model.decoder, [], []
        state, reference = self.model.query_content_embeddings.weight[None], self.model.query_position_embeddings.weight
        for layer in decoder.layers:
            drop = lambda x, p=layer.dropout: F.dropout(x, p, self.training)
            box = reference.detach().sigmoid()
            place = decoder.query_position_head(sine_features(box, self.config.d_model // 2))[None]
            x = state + place
            state = layer.self_attn_layer_norm(state + drop(attend(layer.self_attn, x, x, state)))
            prior = spatial_prior(box, height, width, layer.encoder_attn.num_heads)
            x = attend(layer.encoder_attn, state + place, memory + positions, memory, prior)
            state = layer.encoder_attn_layer_norm(state + drop(x))
            x = drop(layer.activation_fn(layer.fc1(state)), layer.activation_dropout)
            state = layer.final_layer_norm(state + drop(layer.fc2(x)))
            normed = decoder.layernorm(state)[0]
            moved = reference + self.bbox_predictor(normed)
            logits.append(self.class_labels_classifier(normed))
            boxes.append(moved.sigmoid())
            reference = moved.detach()
        return torch.stack(logits), torch.stack(boxes)

    def layers(self, pixel_values):
        """(1, 3, H, W) -> logits (layers, queries, classes), boxes (layers, queries, 4) of every decoder layer."""
        if self.config.decoder == "plain":
            return plain_layers(self, pixel_values)
        features, places = self.model.backbone(pixel_values, torch.ones_like(pixel_values[:, 0]))
        grid = self.model.input_projection(features[-1][0])
        tokens, positions = (x.flatten(2).transpose(1, 2) for x in (grid, places[-1]))
        memory = self.model.encoder(inputs_embeds=tokens, object_queries=positions)[0]
        return self.anchor_decoder(memory, positions, *grid.shape[2:])


def open_model(folder, dtype):
    with open(Path(folder) / "config.json") as file:
        kind = TrainDetr if json.load(file)["model_type"] == "train_detr" else DetrForObjectDetection
    model = kind.from_pretrained(folder, dtype=torch.float32).to(dtype).train()
    model.model.encoder.dropout = 0.0  # the one on the encoder's input; each layer has its own value
    positions = sine_positions if dtype == torch.float64 else float32_positions
    modeling_detr.DetrSinePositionEmbedding.forward = positions
    return model


def trained_parameters(model, settings):
    """
    Decides what is trained, as DETR does: all but the backbone's stem, its first stage, and its norms. With train_all
    the stem and the first stage too, with train_norms the scale and bias of the norms (never mean and variance).
    Returns {name: parameter}.
    """
    if settings["train_norms"]:
        for module in model.modules():
            if isinstance(module, modeling_detr.DetrFrozenBatchNorm2d):
                for name in ("weight", "bias"):
                    module.register_parameter(name, torch.nn.Parameter(module._buffers.pop(name)))
    late = ("stages.1.", "stages.2.", "stages.3.", "layer2.", "layer3.", "layer4.")
    for name, parameter in model.named_parameters():
        frozen = "backbone" in name and not any(stage in name for stage in late)
        parameter.requires_grad_(bool(settings["train_all"]) or not frozen)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain_layers(model, pixel_values):
    """
    transformers' DETR: (1, 3, H, W) -> logits (layers, queries, classes) and boxes (layers, queries, 4) of every decoder
    layer.
    """
    states = []
    hooks = [layer.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
             for layer in model.model.decoder.layers]
    final = model(pixel_values)
    normed = model.model.decoder.layernorm(torch.cat(states))
    logits, pred_boxes = model.class_labels_classifier(normed), model.bbox_predictor(normed).sigmoid()
    for hook in hooks:
        hook.remove()
    for ours, theirs in ((logits, final.logits), (pred_boxes, final.pred_boxes)):
        assert torch.allclose(ours[-1:], theirs, atol=0.05 if torch.is_autocast_enabled("cpu") else 1e-5)
    return logits, pred_boxes


def run_image(model, pixel_values, autocast=False):
    """`layers` of the model, in the type of pixel_values. With autocast to bf16 on the way."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        run = model.layers if isinstance(model, TrainDetr) else lambda pixels: plain_layers(model, pixels)
        return [output.to(pixel_values.dtype) for output in run(pixel_values)]


# ---------------------------------------------------------------------------------------------------------------------
# The criterion (models/detr.py SetCriterion, models/matcher.py, util/box_ops.py)

def corners(boxes):
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def generalized_iou(boxes, others):
    """cxcywh boxes (n, 4), (m, 4) -> (n, m)."""
    a, b = corners(boxes)[:, None], corners(others)[None]
    area = lambda low, high: (high - low).clamp(min=0).prod(-1)
    overlap = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - overlap
    return overlap / union - (hull - union) / hull


def focal_losses(logits, positive):
    """
    Lin et al. 2017, alpha 0.25, gamma 2: of each logit, as one that should say yes or no. -log(p) is softplus(-logit) and
    -log(1 - p) is softplus(logit), so that no logarithm needs the 1e-8 that Deformable DETR's matcher adds.
    """
    p = logits.sigmoid()
    return 0.25 * (1 - p) ** 2 * F.softplus(-logits) if positive else 0.75 * p**2 * F.softplus(logits)


@torch.no_grad()
def match(logits, pred_boxes, labels, boxes, settings, margins, focal, times=1):
    """
    One image, one layer: pairs (query, target), sorted by query, min(queries, times * targets) of them. focal: the class's cost is
    by how much the loss is larger if the query should say yes (Deformable DETR's matcher).
    """
    if len(labels) == 0:
        return torch.zeros(0, 2, dtype=torch.int64)
    num_targets, labels, boxes = len(labels), labels.repeat(times), boxes.repeat(times, 1)
    of_class = focal_losses(logits, True) - focal_losses(logits, False) if focal else -logits.softmax(-1)
    cost = (settings["cost_class"] * of_class[:, labels]
            + settings["cost_bbox"] * (pred_boxes[:, None] - boxes[None]).abs().sum(-1)
            - settings["cost_giou"] * generalized_iou(pred_boxes, boxes)).double().numpy()
    rows, columns = linear_sum_assignment(cost)
    if margins:  # by how much the best assignment without one of these pairs costs more
        for row, column in zip(rows, columns):
            other = cost.copy()
            other[row, column % num_targets::num_targets] = 1e6
            margins.add("matching", other[linear_sum_assignment(other)].sum() - cost[rows, columns].sum())
    return torch.from_numpy(np.array(sorted(zip(rows, columns % num_targets)), np.int64))


def classes_loss(logits, wanted, num_boxes, settings, focal):
    """
    logits (images, queries, classes), wanted (images, queries): the class of each query, the number of labels for "no
    object", which is softmax's last class. focal: the sum over queries and classes per box (Deformable DETR).
    """
    if focal:
        yes = F.one_hot(wanted, logits.shape[-1] + 1)[..., :-1].bool()
        return torch.where(yes, focal_losses(logits, True), focal_losses(logits, False)).sum() / num_boxes
    class_weights = torch.ones(logits.shape[-1], dtype=logits.dtype)
    class_weights[-1] = settings["eos_coef"]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), class_weights)


def criterion(logits, pred_boxes, targets, settings, margins, given=None, focal=False):
    """
    logits (images, layers, queries, classes), pred_boxes (images, layers, queries, 4), targets: (labels, boxes) of each
    image without crowds; given[image][layer]: the pairs, where they are not to be looked for. Returns the loss that is
    minimised, everything that is logged, matches[image][layer].
    """
    images, layers, queries, classes = logits.shape
    num_labels = classes if focal else classes - 1
    log, total, matches = {}, 0, [[] for _ in targets]
    for layer in [layers - 1, *range(layers - 1)]:  # the final layer first, then the auxiliary ones, as DETR does
        suffix = "" if layer == layers - 1 else f"_{layer}"
        times = settings.get("aux_matches", 1) if layer < layers // 2 else 1
        num_boxes = max(1, times * sum(len(labels) for labels, _ in targets))
        wanted = torch.full((images, queries), num_labels)
        l1 = giou = correct = cardinality_error = 0
        for image, (labels, boxes) in enumerate(targets):
            pairs = (given[image][layer] if given else
                     match(logits[image, layer], pred_boxes[image, layer], labels, boxes, settings, margins, focal, times))
            pairs = pairs[pairs[:, 0] >= 0]
            matches[image].append(pairs)
            query, target = pairs[:, 0], pairs[:, 1]
            wanted[image, query] = labels[target]
            predicted, true = pred_boxes[image, layer][query], boxes[target].to(logits.dtype)
            l1 = l1 + (predicted - true).abs().sum()
            giou = giou + (1 - generalized_iou(predicted, true).diagonal()).sum()
            best = logits[image, layer].argmax(-1)
            correct += int((best[query] == labels[target]).sum())
            says_object = logits[image, layer].amax(-1) > 0 if focal else best != num_labels
            cardinality_error += abs(int(says_object.sum()) - len(labels))
            if margins:
                ranked = logits[image, layer].detach().sort(-1).values
                margins.add("class", (ranked[:, -1] - ranked[:, -2]).min())
                if focal:
                    margins.add("class", ranked[:, -1].abs().min())
                if len(pairs):
                    margins.add("box", (predicted - true).detach().abs().min())
                    edges, true_edges = corners(predicted.detach()), corners(true)
                    for against in (true_edges, true_edges.roll(2, -1)):  # left with left, left with right, ...
                        margins.add("edge", (edges - against).abs().min())
        terms = dict(loss_ce=classes_loss(logits[:, layer], wanted, num_boxes, settings, focal),
                     loss_bbox=l1 / num_boxes, loss_giou=giou / num_boxes)
        total = (total + settings.get("class_loss_coef", 1) * terms["loss_ce"] + settings["bbox_loss_coef"] * terms["loss_bbox"]
                 + settings["giou_loss_coef"] * terms["loss_giou"])
        log.update({name + suffix: value.item() for name, value in terms.items()})
        log["cardinality_error" + suffix] = cardinality_error / images
        if layer == layers - 1:
            matched = int((wanted != num_labels).sum())
            log["class_error"] = 100 - 100 * correct / max(1, matched)
    return total, {"loss": total.item(), **log}, [layers[1:] + layers[:1] for layers in matches]


class Margins:
    """The smallest distance from a tie, by kind; `relu` is relative to the root mean square of the layer's input."""

    def __init__(self):
        self.smallest = {}

    def add(self, kind, value):
        self.smallest[kind] = min(self.smallest.get(kind, float("inf")), float(value))

    def relu(self, input, inplace=False):
        values = input.detach()
        self.add("relu", values.abs().min() / values.square().mean().sqrt())
        return torch.relu(input)


# float32 rounding moves values by some 1e-6 of their size; a decision nearer to a tie could fall either way.
# `first step` is in units of PyTorch's own float32 error, of which a program under test may make 4.
NEEDED_MARGINS = {"matching": 1e-4, "class": 1e-4, "box": 1e-4, "edge": 1e-5, "relu": 1e-6, "first step": 4}

# ---------------------------------------------------------------------------------------------------------------------
# Two training steps

def disturb(values, generator, units=1):
    """
    Moves each float32 in the array up or down by `units` in its last place, each with probability 1/24. That is one
    rounding more: to the nearest it is uniform within half a unit, of variance 1/12. A bf16's last unit is 2^16 of
    a float32's.
    """
    draws, values = generator.random(values.shape), values.astype(np.float32)
    unit = np.spacing(np.abs(values)) * np.float32(units)
    return values + unit * (draws < 1 / 24) - unit * (draws > 23 / 24)


def train(case, folder, batches, dtype, channels_last=False, margins=None, generator=None, autocast=None):
    """
    Returns {entry of the dump: array}, all that depends on the arithmetic (inputs and settings are not in it). With a
    generator the start weights and the pixels are disturbed by one rounding. autocast: the truth, whose matches are used
    while the network runs under autocast to bf16; what is disturbed then is what autocast rounds, by such a rounding.
    """
    settings = settings_of(case)
    model = open_model(folder, dtype)
    units = 2**16 if autocast else 1
    if generator:
        products = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
        with torch.no_grad():
            for module in products if autocast else [model]:
                for tensor in module.state_dict().values():
                    tensor.copy_(torch.from_numpy(disturb(tensor.numpy(), generator, units)))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    trained = trained_parameters(model, settings)
    optimizer = torch.optim.AdamW(
        [dict(params=[p for name, p in trained.items() if "backbone" not in name]),
         dict(params=[p for name, p in trained.items() if "backbone" in name], lr=settings["lr_backbone"])],
        lr=settings["lr"], weight_decay=settings["weight_decay"], foreach=False)
    detr, dropout, out = case["detr"], Dropout(), {}
    kept_dropout, kept_relu = F.dropout, F.relu
    F.dropout, F.relu = dropout, margins.relu if margins else kept_relu
    for step, images in enumerate(batches):
        outputs, targets = [], []
        for index, image in enumerate(images):
            dropout.begin(settings["seed"], step, index)
            pixels = disturb(image["pixel_values"], generator, units) if generator else image["pixel_values"]
            pixels = torch.from_numpy(pixels).to(dtype).permute(2, 0, 1)[None]
            pixels = pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            outputs.append(run_image(model, pixels, autocast is not None))
            sites = 4 * detr["encoder_layers"] + 6 * detr["decoder_layers"] if settings["dropout"] else 0
            assert dropout.site == sites, f"{dropout.site} dropout sites, {sites} expected"
            target = image["iscrowd"] == 0
            targets.append((torch.from_numpy(image["labels"][target]), torch.from_numpy(image["boxes"][target]).to(dtype)))
        logits, pred_boxes = (torch.stack(each) for each in zip(*outputs))
        given = autocast and [torch.from_numpy(autocast[f"s{step}.i{index}.matches"]) for index in range(len(images))]
        focal = case.get("class_loss") == "focal"
        loss, log, matches = criterion(logits, pred_boxes, targets, settings, margins, given, focal)
        optimizer.zero_grad()
        loss.backward()
        for index in range(len(images)):
            out[f"s{step}.i{index}.logits"] = logits[index].detach().double().numpy()
            out[f"s{step}.i{index}.pred_boxes"] = pred_boxes[index].detach().double().numpy()
            out[f"s{step}.i{index}.matches"] = pad_sequence(matches[index], True, -1).numpy()
        out.update({f"s{step}.{name}": np.array([value]) for name, value in log.items()})
        for name, parameter in trained.items():
            out[f"s{step}.grad.{name}"] = parameter.grad.double().contiguous().numpy().copy()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), settings["clip_max_norm"], foreach=False)
        out[f"s{step}.grad_norm"] = np.array([float(norm)])
        optimizer.step()
    out.update({f"after.{name}": p.detach().double().contiguous().numpy().copy() for name, p in trained.items()})
    F.dropout, F.relu = kept_dropout, kept_relu
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Dumps

ROUNDOFF32, ROUNDOFF64 = 2.0**-24, 2.0**-53
ZERO = 1e-12  # a gradient whose norm is below this share of the whole gradient's is zero but for rounding


def norm(array):
    return float(np.linalg.norm(array.ravel()))


def whole_gradient(entries, step):
    return sum(norm(value) ** 2 for name, value in entries.items() if name.startswith(f"s{step}.grad.")) ** 0.5


def relative_error(truth, other, name):
    """|other - truth| / |truth|; over the whole gradient's norm for a gradient that is zero, over 1 for any other zero."""
    scale = norm(truth[name])
    if ".grad." in name and scale < ZERO * whole_gradient(truth, name[1]):
        scale = whole_gradient(truth, name[1])
    return norm(other[name] - truth[name]) / (scale or 1.0)


def float32_runs(case, folder, batches, autocast=None):
    """
    Twelve runs in float32 (autocast: of train()): two implementations of the convolutions times two layouts in memory, which add in different
    orders, each once as it is and twice from a start that is disturbed by one rounding. One run would be one draw from
    the distribution of rounding errors, and four that start from the same numbers share much of theirs; a program that
    adds in yet another order is another draw, which may well lie outside so few. One tail no such number of runs
    covers: Adam's first step is lr times the gradient's sign, so that an element whose gradient is within rounding of
    zero may move either way, and all that follows with it. `first_step_margin` keeps such elements out of the cases.
    """
    runs = []
    for draw in range(3):
        generator = np.random.default_rng(draw) if draw else None
        for mkldnn in (True, False):
            with torch.backends.mkldnn.flags(enabled=mkldnn):
                runs += [train(case, folder, batches, torch.float32, channels_last, None, generator, autocast)
                         for channels_last in (False, True)]
    return runs


def first_step_margin(truth, runs, settings):
    """
    Adam's first step is lr * g / (|g| + 1e-8), g being the clipped gradient. How many times larger |g| + 1e-8 is than
    the largest error of g in the runs, for the worst element of all gradients that are not zero but for rounding.
    """
    whole, margin = whole_gradient(truth, 0), float("inf")
    clip = min(1, settings["clip_max_norm"] / (whole + 1e-6))
    for name, value in truth.items():
        if name.startswith("s0.grad.") and norm(value) >= ZERO * whole:
            error = clip * np.max([np.abs(run[name] - value) for run in runs], axis=0)
            margin = min(margin, float(((clip * np.abs(value) + 1e-8) / np.maximum(error, 1e-300)).min()))
    return margin


def errors_of(truth, runs, names):
    """
    {name: the relative error that the runs' arithmetic makes in this entry}: the largest of the runs, at least float32's
    unit roundoff. One number can be right by luck, so the losses of a step share the largest error among them, the
    gradient's norm has the error of the gradient as a vector, and parameters whose gradient is nothing but rounding,
    which Adam blows up, share theirs.
    """
    errors = {name: max([ROUNDOFF32] + [relative_error(truth, run, name) for run in runs]) for name in names}
    noise = [name for name in errors if name.startswith("after.") and any(
        norm(truth[f"s{s}.grad.{name[6:]}"]) < ZERO * whole_gradient(truth, s) for s in (0, 1))]
    groups = [noise]
    for step in (0, 1):
        gradients = [name for name in errors if name.startswith(f"s{step}.grad.")]
        if not gradients:
            continue
        off = max(sum(norm(run[name] - truth[name]) ** 2 for name in gradients) ** 0.5 for run in runs)
        errors[f"s{step}.grad_norm"] = off / whole_gradient(truth, step)
        logged = tuple(f"s{step}.{kind}" for kind in ("loss", "class_error", "cardinality_error"))
        groups.append([name for name in errors if name.startswith(logged)])
    for group in groups:
        worst = max((errors[name] for name in group), default=0)
        errors.update({name: worst for name in group})
    return errors


def float32_errors(truth, runs):
    """{entry of the dump: error}, for each that is a result."""
    return {f"float32_error.{name}": error for name, error in errors_of(
        truth, runs, [name for name, value in truth.items() if value.dtype == np.float64]).items()}


def bf16_errors(case, folder, batches, truth):
    """
    {entry of the dump: error} of PyTorch's autocast to bf16, for what varies smoothly. It rounds to 8 bits, which may
    well change a match, so the truth's matches are used; class and cardinality error count decisions too and are left
    out. After the first step there is no truth to compare with: Adam's step is lr times the gradient's sign, and
    gradients are too far off for the sign of every element.
    """
    runs = float32_runs(case, folder, batches[:1], autocast=truth)
    names = [name for name, value in truth.items() if value.dtype == np.float64 and name.startswith("s0.")
             and not name.startswith(("s0.class_error", "s0.cardinality_error"))]
    return {f"bf16_error.{name}": error for name, error in errors_of(truth, runs, names).items()}


def write_case(name, case, outdir):
    folder = Path(outdir) / name
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(case["numpy_seed"])
    config = config_of(case)
    model = (TrainDetr if isinstance(config, TrainDetrConfig) else DetrForObjectDetection)(config)
    fill(model, generator, case.get("projection", 1))
    model.save_pretrained(folder, safe_serialization=True)
    batches = [draw_images(case, step, generator) for step in (0, 1)]

    margins = Margins()
    truth = train(case, folder, batches, torch.float64, margins=margins)
    runs = float32_runs(case, folder, batches)
    margins.add("first step", first_step_margin(truth, runs, settings_of(case)))
    near = {kind: value for kind, value in margins.smallest.items() if value < NEEDED_MARGINS[kind]}
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, margins "
          + ", ".join(f"{kind} {value:.1e}" for kind, value in sorted(margins.smallest.items())))
    if near:
        raise SystemExit(f"{name}: too near to a tie: {near}; choose another numpy_seed")
    for run in runs:
        assert all(np.array_equal(run[n], truth[n]) for n in truth if n.endswith("matches"))
    entries = dict(truth)
    errors = {**float32_errors(truth, runs), **bf16_errors(case, folder, batches, truth)}
    entries.update({key: np.array([error]) for key, error in errors.items()})
    entries.update({f"settings.{key}": np.array([float(value)]) for key, value in settings_of(case).items()})
    for step, images in enumerate(batches):
        for index, image in enumerate(images):
            entries.update({f"s{step}.i{index}.{key}": value for key, value in image.items()})
    save_file({key: np.ascontiguousarray(value) for key, value in entries.items()}, folder / "truth.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)


# ---------------------------------------------------------------------------------------------------------------------
# Options: what does not need the network. Twenty steps of two small tensors with given gradients under each schedule,
# and what is told about the boxes of one picture.

OPTIONS = dict(lr=0.01, lr_backbone=0.003, weight_decay=0.05, clip_max_norm=3.0, ema_decay=0.6)
SCHEDULES = dict(  # drop: steps; a cosine with drop 0
    drop=dict(warmup=0, drop=6), warm=dict(warmup=4, drop=9), cosine=dict(warmup=0, drop=0), both=dict(warmup=5, drop=0))


def scheduler_of(optimizer, warmup, drop, steps):
    if not drop:
        return get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    if not warmup:
        return torch.optim.lr_scheduler.StepLR(optimizer, drop)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / warmup) * 0.1 ** (step // drop))


def train_options(schedule, start, gradients):
    """
    start: the values of the transformer's tensor and of the backbone's; gradients[step]: theirs. Returns the rate of the
    transformer in each step over the full one, the values and their average after the last.
    """
    model = torch.nn.ParameterList([torch.from_numpy(values).clone() for values in start])
    optimizer = torch.optim.AdamW([dict(params=[model[0]]), dict(params=[model[1]], lr=OPTIONS["lr_backbone"])],
                                  lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    scheduler = scheduler_of(optimizer, steps=len(gradients), **schedule)

    def average(old, value, averaged):  # averaged: how many steps are in it; the first is copied
        decay = min(OPTIONS["ema_decay"], float(averaged / (averaged + 9)))
        return decay * old + (1 - decay) * value

    averages, factors = AveragedModel(model, avg_fn=average), []
    for step in gradients:
        for parameter, gradient in zip(model, step):
            parameter.grad = torch.from_numpy(gradient).clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS["clip_max_norm"])
        factors.append(optimizer.param_groups[0]["lr"] / OPTIONS["lr"])
        optimizer.step()
        scheduler.step()
        averages.update_parameters(model)
    flat = lambda parameters: np.concatenate([p.detach().numpy() for p in parameters])
    return dict(factors=np.array(factors), values=flat(model), ema=flat(averages.module))


def told_of(boxes, targets, matches):
    """The mean IoU of the pairs, and the root of the mean squared distance of the boxes' centres from their mean."""
    a, b = corners(boxes[matches[:, 0]]), corners(targets[matches[:, 1]])
    area = lambda low, high: (high - low).clamp(min=0).prod(-1)
    overlap = area(torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:]))
    iou = overlap / (area(a[:, :2], a[:, 2:]) + area(b[:, :2], b[:, 2:]) - overlap)
    return dict(matched_iou=iou.mean(), query_spread=boxes[:, :2].var(0, correction=0).sum().sqrt())


def options_of(start, gradients, boxes, targets, matches):
    """All results, in the type of the arrays."""
    told = told_of(torch.from_numpy(boxes), torch.from_numpy(targets), torch.from_numpy(matches))
    return {**{key: np.array([float(value)]) for key, value in told.items()},
            **{f"{name}.{key}": value.astype(np.float64) for name, schedule in SCHEDULES.items()
               for key, value in train_options(schedule, start, gradients).items()}}


def write_options(outdir):
    folder = Path(outdir) / "options"
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(7)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)
    uniform = lambda count: generator.uniform(0.2, 0.8, (count, 4)).astype(np.float32)
    start, gradients = [draw(7), draw(5)], [[draw(7), draw(5)] for _ in range(20)]
    boxes, targets, matches = uniform(6), uniform(3), np.array([[0, 2], [3, 0], [5, 1]])

    def run(change):
        changed = [[change(values) for values in step] for step in gradients]
        return options_of([change(values) for values in start], changed, change(boxes), change(targets), matches)

    truth = run(lambda values: values.astype(np.float64))
    runs = [run(lambda values: disturb(values, generator)) for _ in range(12)]
    entries = dict(start=np.concatenate(start), gradients=np.stack([np.concatenate(step) for step in gradients]),
                   boxes=boxes, targets=targets, matches=matches, **truth)
    entries.update({key: np.array([error]) for key, error in float32_errors(truth, runs).items()})
    entries.update({f"settings.{key}": np.array([value]) for key, value in OPTIONS.items()})
    for name, schedule in SCHEDULES.items():
        entries.update({f"{name}.{key}": np.array([float(value)]) for key, value in schedule.items()})
    save_file({key: np.ascontiguousarray(value) for key, value in entries.items()}, folder / "truth.safetensors")
    (folder / "truth.safetensors").chmod(0o644)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison

def compare(a, b):
    """
    Lists what differs. Start weights, inputs, settings and matches must be equal. A result in double may differ by what
    rounding makes: float32 makes the error e (kept in the dump) with a unit roundoff of 2^-24; the same arithmetic with
    2^-53 makes 2^-29 e; two runs that add in different orders are allowed 16 times that, each being one draw from
    the distribution of which e is another. The errors of float32 and bf16 are such draws themselves: within a factor of
    16. (Another processor adds in other orders, and may round where this one does not: without instructions for bf16
    PyTorch computes parts of autocast by other ways.)
    """
    problems, largest = [], 0.0
    for name in [*CASES, "options"]:
        for file in ("config.json", "model.safetensors") if name in CASES else ():
            if (Path(a) / name / file).read_bytes() != (Path(b) / name / file).read_bytes():
                problems.append(f"{name}/{file}: not the same bytes")
        one, two = (load_file(Path(folder) / name / "truth.safetensors") for folder in (a, b))
        if one.keys() != two.keys():
            problems.append(f"{name}: entries in one only: {sorted(one.keys() ^ two.keys())[:5]}")
            continue
        for key, value in one.items():
            other = two[key]
            if value.shape != other.shape or value.dtype != other.dtype:
                problems.append(f"{name}: {key}: shape or type")
            elif key.startswith(("float32_error.", "bf16_error.")):
                ratio = float(value[0] / other[0])
                if not 1 / 16 < ratio < 16:
                    problems.append(f"{name}: {key}: {value[0]:.3g} and {other[0]:.3g}")
            elif "float32_error." + key in one:
                error = relative_error(one, two, key)
                rounding = float(one["float32_error." + key][0]) * ROUNDOFF64 / ROUNDOFF32
                largest = max(largest, error / rounding)
                if not error <= 16 * rounding:
                    problems.append(f"{name}: {key}: relative difference {error:.3g}, rounding makes {rounding:.3g}")
            elif not np.array_equal(value, other):
                problems.append(f"{name}: {key}: not equal")
    print("\n".join(problems) or f"{a} and {b} agree: the largest difference is {largest:.2g} times rounding (limit 16)")
    return 1 if problems else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("outdir", nargs="?", help="where to write the dumps")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two folders of dumps")
    parser.add_argument("--only", help="write this case only")
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare)
    if not arguments.outdir:
        parser.error("OUTDIR or --compare A B is needed")
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if arguments.only in (None, name):
            write_case(name, case, arguments.outdir)
    if arguments.only in (None, "options"):
        write_options(arguments.outdir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
