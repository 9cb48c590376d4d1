"""Trains a small picture encoder on the words of drawn scenes, as a stand-in where there is no DINOv2 file.

    python benchmarks/scene_encoder.py OUTPUT [steps=1500] [size=16] [patch=2] [width=64] [layers=4] [seed=1000]

OUTPUT is a directory for `dino.path` (of `ingredient=repa` and `perceptual`), or for benchmarks/ladder.py with
`dino=OUTPUT dino_side=16`: a model with DINOv2's architecture, but **not DINOv2**. It learns from labels: for each
patch, the shape, colour and size of the object that covers it, or none, and the picture's background. It sees scenes of
one and two objects, only combinations of the training split, with Gaussian noise of up to NOISE. What `repa` and
`perceptual` gain with it, they gain from features made for these very pictures; DINOv2's may give more or less.

It prints how often each word is right on held-out combinations, for patches with an object.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline.content.synthetic import BACKGROUNDS, COLOURS, SHAPES, SIZES, ShapeSpec, render, spec_at
from data_pipeline.order.chance import hash_bits
from training.model.dinov2 import prepared

OPTIONS = {"steps": 1500, "size": 16, "patch": 2, "width": 64, "layers": 4, "seed": 1000}
PICTURES, HELDOUT, BATCH = 3000, 256, 64
NOISE = 0.3
"""Largest standard deviation of the noise on pictures in [-1, 1]: the perceptual loss shows it blurred estimates."""
WORDS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
HEADS = {"background": len(BACKGROUNDS), **{name: len(words) + 1 for name, words in WORDS.items()}}
"""Question -> number of answers for each patch; for words of an object, the last answer is "no object"."""


def covered(spec: ShapeSpec, place: int, number: int, size: int) -> np.ndarray:
    """Return how much of each pixel, 0 to 1, object `number` covers, fp64 (size, size): where the picture changes if
    the object has another colour."""

    def recoloured(colour: str) -> np.ndarray:
        things = [dataclasses.replace(one, colour=colour) if i == number else one for i, one in enumerate(spec.objects)]
        return render(dataclasses.replace(spec, objects=tuple(things)), size, place).astype(float)

    red, cyan = COLOURS["red"], COLOURS["cyan"]
    return np.abs(recoloured("red") - recoloured("cyan")).sum(-1) / np.abs(np.subtract(red, cyan)).sum()


def answers(spec: ShapeSpec, place: int, size: int, patch: int) -> dict[str, np.ndarray]:
    """Return the right answers to each of HEADS, int64 (patches,) row by row: the words of the object that covers at
    least half of the patch."""
    grid = size // patch
    found = {name: np.full((grid, grid), len(words)) for name, words in WORDS.items()}
    for number, thing in enumerate(spec.objects):
        share = covered(spec, place, number, size).reshape(grid, patch, grid, patch).mean((1, 3))
        for name, words in WORDS.items():
            found[name][share >= 0.5] = words.index(getattr(thing, name))
    background = np.full((grid, grid), list(BACKGROUNDS).index(spec.background))
    return {name: each.reshape(-1) for name, each in ({"background": background} | found).items()}


def examples(count: int, options: dict[str, int], heldout: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return pictures (count, 3, size, size) in [-1, 1], scenes of one and two objects in turns, and their answers
    (count, patches)."""
    size, seed, made, right = options["size"], options["seed"], [], []
    for index in range(count):
        spec = spec_at(index // 2, seed, heldout, 1 + index % 2)
        place = hash_bits(seed, index, f"scene encoder {heldout}")
        made.append(render(spec, size, place))
        right.append(answers(spec, place, size, options["patch"]))
    pictures = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2) / 127.5 - 1
    return pictures, {name: torch.from_numpy(np.stack([one[name] for one in right])) for name in HEADS}


class Encoder(nn.Module):
    """DINOv2's architecture with one linear head per question, of which only the former is kept."""

    def __init__(self, options: dict[str, int]) -> None:
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        width = options["width"]
        self.model = Dinov2Model(
            Dinov2Config(
                hidden_size=width,
                num_hidden_layers=options["layers"],
                num_attention_heads=max(1, width // 16),
                image_size=options["size"],
                patch_size=options["patch"],
            )
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in HEADS.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] -> scores (B, patches, answers) of each question."""
        seen = prepared(pictures, pictures.shape[-2], pictures.shape[-1])
        patches = self.model(pixel_values=seen).last_hidden_state[:, 1:]
        return {name: head(patches) for name, head in self.heads.items()}


def lost(scores: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum over questions of the cross-entropy; patches without an object, most of them, count less."""
    total = torch.zeros(())
    for name, given in scores.items():
        weight = torch.ones(given.shape[-1])
        if name in WORDS:
            weight[-1] = 0.2
        total = total + F.cross_entropy(given.flatten(0, 1), right[name].flatten(), weight=weight)
    return total


@torch.no_grad()
def accuracy(encoder: Encoder, pictures: torch.Tensor, right: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the share of right answers to each question, for patches with an object."""
    scores = encoder.eval()(pictures)
    there = right["shape"] < len(SHAPES)
    return {name: (scores[name].argmax(-1) == right[name])[there].float().mean().item() for name in HEADS}


def main(words: list[str]) -> dict[str, float]:
    """Train the encoder, save it, and return its accuracy on held-out combinations."""
    given = dict(word.partition("=")[::2] for word in words[1:])
    if unknown := {*given} - {*OPTIONS}:
        raise SystemExit(f"{', '.join(sorted(unknown))}: not known; options are {', '.join(OPTIONS)}")
    options = OPTIONS | {name: int(value) for name, value in given.items()}
    if options["size"] % options["patch"]:
        raise SystemExit(f"size={options['size']}: it must be a multiple of patch={options['patch']}")
    torch.manual_seed(options["seed"])
    encoder = Encoder(options)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options["steps"])
    pictures, right = examples(PICTURES, options, False)
    for step in range(options["steps"]):
        rows = torch.randint(len(pictures), (BATCH,))
        noise = NOISE * torch.rand(BATCH, 1, 1, 1) * torch.randn(BATCH, *pictures.shape[1:])
        loss = lost(encoder(pictures[rows] + noise), {name: each[rows] for name, each in right.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {options['steps']}: loss {loss.item():.3f}", flush=True)
    Path(words[0]).mkdir(parents=True, exist_ok=True)
    encoder.model.save_pretrained(words[0])
    found = accuracy(encoder, *examples(HELDOUT, options, True))
    print(json.dumps({name: round(share, 3) for name, share in found.items()}))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
