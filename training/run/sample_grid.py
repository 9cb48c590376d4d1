"""Sample grids: fixed prompts drawn with fixed seeds by the averaged weights, every train.sample_every steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from data_pipeline.reading.loader import Loader
from training.cascade.requests import to_uint8
from training.config.experiment import Experiment, StageConfig
from training.diffusion.sampler import sample_stage
from training.pictures import sheets as grid
from training.processes.collectives import from_main, gather_rows, together
from training.processes.ranks import Ranks

log = logging.getLogger("cascade")

MOST = 8
"""Number of captions to take from the data."""
Inputs = tuple[list[str], torch.Tensor | None]
"""Captions, and for super-resolution the true low-res pictures (B, 3, h, w) uint8."""


def choose(prompts: list[str], stage: StageConfig, open_loader: Callable[[], Loader], ranks: Ranks) -> Inputs:
    """Return the configured prompts or, without any and for super-resolution, which needs true low-res pictures, the
    first captions of the data, which rank 0 reads. Collective."""
    if prompts and not stage.is_super_resolution:
        return list(prompts), None
    low_res: torch.Tensor | None = None

    def read() -> list[str]:
        nonlocal low_res
        with closing(open_loader()) as loader:
            batch = next(loader)[0]
        low_res = None if batch.low_res is None else batch.low_res[:MOST].contiguous()
        return list(batch.captions[:MOST])

    captions, side = together(read, ranks), stage.low_res_size
    if not side:
        return captions, None
    if low_res is None:
        low_res = torch.empty(len(captions), 3, side, side, dtype=torch.uint8)
    return captions, from_main(low_res, ranks)


def draw(
    module: torch.nn.Module,
    inputs: Inputs,
    encode: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]],
    config: Experiment,
    ranks: Ranks,
) -> torch.Tensor:
    """Draw all pictures, uint8 (B, 3, H, W). Collective: every rank draws the same number, because with ZeRO 3 all must
    call the module equally often."""
    captions, low_res = inputs
    each = -(-len(captions) // ranks.world_size)
    mine = [min(ranks.rank * each + i, len(captions) - 1) for i in range(each)]
    text, mask = encode([captions[i] for i in mine])
    with torch.no_grad():
        pictures = sample_stage(
            module,
            text.to(ranks.device),
            mask.to(ranks.device),
            config=config.stage.diffusion,
            sampler=config.stage.sampler,
            image_size=config.stage.image_size,
            seeds=mine,
            low_res=None if low_res is None else low_res[mine].to(ranks.device),
        )
    return gather_rows(to_uint8(pictures).cpu(), ranks)[: len(captions)]


def write_samples(pictures: torch.Tensor, inputs: Inputs, path: Path, title: str) -> bool:
    """Write a PNG with captions below the pictures (super-resolution: input and output side by side); return whether
    that succeeded."""
    captions, low_res = inputs
    cells = []
    for i, caption in enumerate(captions):
        shown, labels = [to_image(pictures[i])], []
        if low_res is not None:
            shown.insert(0, to_image(low_res[i]))
            labels = [f"{picture.width} px" for picture in shown]
        cells.append(grid.Cell(shown, caption, labels))
    try:
        grid.save(grid.sheet(cells, columns=4, title=title), path)
    except OSError as error:
        log.warning("%s: the samples were not written (%s); training continues", path, error)
        return False
    return True


def to_image(picture: torch.Tensor) -> Image.Image:
    """Convert uint8 (3, H, W) to PIL."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())
