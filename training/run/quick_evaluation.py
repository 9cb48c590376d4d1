"""Feature-based figures during training: every evaluation.every steps the averaged weights draw held-out captions.

All ranks draw. A picture's noise depends on (seed, caption, number of earlier occurrences of the caption), so figures
are the same on any number of ranks, and only differ between steps because of the weights. A super-resolution stage
starts from true low-res pictures, so that it is measured separately from the base stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from data_pipeline.content.images import box_average
from training.cascade.requests import picture_seed, to_uint8
from training.config.experiment import Experiment
from training.diffusion.sampler import sample_stage
from training.evaluation import measure
from training.evaluation.extractors.base import open_extractors
from training.evaluation.references import References
from training.processes.collectives import RankTeam, each, gather_objects, gather_rows, together
from training.processes.ranks import Ranks

CHUNK = 64
"""Number of reference pictures to decode before computing their features."""
Encode = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]


class QuickEvaluation:
    """Keeps the reference's features, and this rank's share of the captions and low-res pictures, in host memory.

    Args:
        encode: encodes captions as embeddings (B, T, D) and mask (B, T).

    Raises:
        ConfigError, DataError: the reference has no pictures, or an extractor's file is missing.
    """

    def __init__(self, config: Experiment, ranks: Ranks, encode: Encode) -> None:
        self.config, self.ranks, self._encode = config, ranks, encode
        settings, stage = config.evaluation, config.stage
        self.extractors = each(lambda: open_extractors(settings.extractors, ranks.device), ranks)
        self._clip = next((e.name for e in self.extractors if e.texts is not None), "")
        reference = References(settings.reference, config.data, stage.image_size, config.seed, team=RankTeam(ranks))
        captions, low, features = each(lambda: self._read(reference), ranks)
        self.count = len(captions)
        self._reference = self._in_turn(features)
        counts: Counter[str] = Counter()
        seeds = []
        for caption in captions:
            seeds.append(picture_seed(config.seed, caption, counts[caption]))
            counts[caption] += 1
        share = -(-self.count // ranks.world_size)
        # the last rank repeats pictures, since with ZeRO 3 all ranks must call the module equally often
        mine = [min(ranks.rank * share + i, self.count - 1) for i in range(share)]
        self._captions = [captions[i] for i in mine]
        self._seeds = torch.tensor([seeds[i] for i in mine], dtype=torch.int64)
        self._low = torch.from_numpy(np.stack([low[i] for i in mine])).permute(0, 3, 1, 2) if low else None

    def _read(self, reference: References) -> tuple[list[str], list[np.ndarray], dict[str, list[np.ndarray]]]:
        """Return all captions and low-res pictures of the reference, and the features of this rank's chunks of it."""
        stage, ranks = self.config.stage, self.ranks
        captions: list[str] = []
        low: list[np.ndarray] = []
        features: dict[str, list[np.ndarray]] = {e.name: [] for e in self.extractors}
        for number, real in enumerate(reference.chunks(CHUNK, self.config.evaluation.samples)):
            captions += real.captions
            if number % ranks.world_size == ranks.rank:
                for extractor in self.extractors:
                    features[extractor.name].append(extractor.pictures(real.pictures))
            if stage.is_super_resolution:
                low += [box_average(picture, stage.image_size // stage.low_res_size) for picture in real.pictures]
        return captions, low, features

    def _in_turn(self, features: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        """Gather the chunks of all ranks in the order of the pictures. Pickles them, as shares differ in size, so use
        it only at the start of a run."""
        gathered = gather_objects(features, self.ranks)
        most = max(len(parts) for given in gathered for parts in given.values())
        return {
            name: np.concatenate(
                [given[name][turn] for turn in range(most) for given in gathered if turn < len(given[name])]
            )
            for name in features
        }

    def measure(self, module: torch.nn.Module, beat: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return figures of the stage's pictures, `evaluation/METRIC/FEATURES`, each with half the width of its 95 %
        interval as `.../plus_minus`. Collective.

        Args:
            beat: called after every batch, to report progress to the watchdog.
        """
        size = self.config.evaluation.batch
        pictures: dict[str, list[np.ndarray]] = {e.name: [] for e in self.extractors}
        texts: list[np.ndarray] = []
        for at in range(0, len(self._captions), size):
            rows = slice(at, at + size)
            drawn = self._draw(module, rows).permute(0, 2, 3, 1).contiguous().cpu().numpy()
            for extractor in self.extractors:
                pictures[extractor.name].append(extractor.pictures(drawn))
                if extractor.texts is not None:
                    texts.append(extractor.texts(self._captions[rows]))
            beat()
        own = {name: np.concatenate(parts) for name, parts in pictures.items()}
        if texts:
            own["text"] = np.concatenate(texts)
        whole = {
            name: gather_rows(torch.from_numpy(rows), self.ranks).numpy()[: self.count] for name, rows in own.items()
        }
        return together(lambda: self._figures(whole), self.ranks)

    def _draw(self, module: torch.nn.Module, rows: slice) -> torch.Tensor:
        """Draw one batch, uint8 (B, 3, H, W)."""
        config, device = self.config, self.ranks.device
        text, mask = self._encode(self._captions[rows])
        with torch.no_grad():
            drawn = sample_stage(
                module,
                text.to(device),
                mask.to(device),
                config=config.stage.diffusion,
                sampler=config.stage.sampler,
                image_size=config.stage.image_size,
                seeds=self._seeds[rows],
                low_res=None if self._low is None else self._low[rows].to(device),
            )
        return to_uint8(drawn)

    def _figures(self, samples: dict[str, np.ndarray]) -> dict[str, float]:
        texts = samples.pop("text", None)
        places = np.arange(self.count)
        figures = measure.against_reference(samples, self._reference, self._clip)
        figures |= measure.of_samples(samples, places, texts, self._clip)
        found = {}
        for metric, group in figures.items():
            for name, figure in group.items():
                found[f"evaluation/{metric}/{name}"] = float(figure.value)
                found[f"evaluation/{metric}/{name}/plus_minus"] = figure.plus_minus()
        return found
