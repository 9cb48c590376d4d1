"""From features to figures: the metrics to compute in each feature space.

Shapes: N samples, M reference pictures, d features; features are arrays or `FeatureRows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from training.evaluation.metrics.answers import arithmetic_mean, geometric_mean
from training.evaluation.metrics.features import pair_distances
from training.evaluation.metrics.figure import Figure
from training.evaluation.metrics.frechet import frechet_figure
from training.evaluation.metrics.kernels import cmmd, kid
from training.evaluation.metrics.neighbours import DENSITY_NEIGHBOURS, fidelity_and_variety
from training.evaluation.metrics.rows import FeatureRows, blocks

LOWER_IS_BETTER = ("frechet", "kid", "cmmd", "dino_mmd", "copies")
LEAST_FRECHET = 10_000
"""Number of pictures below which the bias of the Frechet distance, about 1/N, is large compared with differences of
interest."""
Figures = dict[str, dict[str, Figure]]
"""Figures by metric and feature space."""


def against_reference(
    samples: Mapping[str, FeatureRows],
    reference: Mapping[str, FeatureRows],
    clip: str = "",
    dino: str = "",
    prompts: np.ndarray | None = None,
) -> Figures:
    """Compute all figures that need a reference, in every feature space.

    Args:
        samples, reference: features (N, d) and (M, d) by extractor.
        clip: the extractor whose features are CLIP embeddings, for CMMD; empty: none.
        dino: the extractor whose features are DINOv2's, for the same discrepancy; empty: none.
        prompts: int (N,): the prompt of each sample, by number; None: every sample has its own.
    """
    figures: Figures = {}
    for name in samples:
        x, y = samples[name], reference[name]
        figures.setdefault("frechet", {})[name] = frechet_figure(x, y)
        figures.setdefault("kid", {})[name] = kid(x, y)
        if min(len(x), len(y)) > DENSITY_NEIGHBOURS:
            for metric, figure in fidelity_and_variety(x, y, prompts).items():
                figures.setdefault(metric, {})[name] = figure
    if clip:
        figures["cmmd"] = {clip: cmmd(samples[clip], reference[clip])}
    if dino:
        figures["dino_mmd"] = {dino: cmmd(samples[dino], reference[dino])}
    return figures


def of_samples(
    samples: Mapping[str, FeatureRows], prompts: np.ndarray, texts: FeatureRows | None = None, clip: str = ""
) -> Figures:
    """Compute the figures that need no reference: how well pictures match their captions, and how much pictures of one
    prompt differ.

    Args:
        prompts: int (N,): the prompt of each sample, by number.
        texts: (N, d): the embedding of each sample's caption, in the space of `clip`.
    """
    figures: Figures = {}
    if texts is not None and clip:
        figures["clip_score"] = {clip: Figure.mean(cosines(samples[clip], texts))}
    if len(np.unique(prompts)) < len(prompts):
        figures["diversity"] = {name: diversity_figure(x, prompts) for name, x in samples.items()}
    return figures


def of_answers(arrays: Mapping[str, np.ndarray], lines: Sequence[Mapping[str, Any]]) -> Figures:
    """Compute VQAScore and, with questions, Soft-TIFA of every stage's pictures; by skill and by number of atoms only
    for the last stage.

    Args:
        arrays: `answers/vqa/STAGE` (N,) and `answers/tifa/STAGE` (N, K), stages in order.
        lines: for each sample, its fields in the prompt file: `skills`, one per question, and `atom_count`.
    """
    figures: Figures = {}
    for name, chances in arrays.items():
        _, score, stage = name.split("/", 2) if name.startswith("answers/") else ("", "", "")
        if score == "vqa":
            figures.setdefault("vqa_score", {})[stage] = Figure.mean(chances)
        elif score == "tifa":
            figures.setdefault("soft_tifa_am", {})[stage] = Figure.mean(arithmetic_mean(chances))
            figures.setdefault("soft_tifa_gm", {})[stage] = Figure.mean(whole := geometric_mean(chances))
            skills = np.array(
                [[*line.get("skills", []), *[""] * chances.shape[1]][: chances.shape[1]] for line in lines]
            )
            figures["soft_tifa_skill"] = {
                str(skill): mean_where(chances, skills == skill) for skill in np.unique(skills) if skill
            }
            atoms = np.array([str(line.get("atom_count", "")) for line in lines])
            figures["soft_tifa_atoms"] = {
                count: mean_where(whole[:, None], (atoms == count)[:, None])
                for count in sorted(set(atoms) - {""}, key=lambda count: (len(count), count))
            }
    return {metric: group for metric, group in figures.items() if group}


def mean_where(values: np.ndarray, chosen: np.ndarray) -> Figure:
    """Return the mean of the chosen values among (N, K), each row a sample. It is a ratio of two means, to which rows
    without chosen values contribute zeros."""
    sums, counts = np.where(chosen, values, 0.0).sum(axis=1), chosen.sum(axis=1)
    mean = float(sums.sum() / counts.sum())
    return Figure(mean, (sums - mean * counts) * len(values) / counts.sum())


def cosines(pictures: FeatureRows, texts: FeatureRows) -> np.ndarray:
    """Return the cosine similarity of each picture's embedding with its caption's, (N,), -1 to 1 (Hessel et al. 2021,
    without the factor)."""
    found = np.zeros(len(pictures))
    for (where, x), (_, y) in zip(blocks(pictures), blocks(texts), strict=True):
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        found[where] = (x * y).sum(axis=1) / norms.clip(min=1e-12)
    return found


def diversity_figure(features: FeatureRows, prompts: np.ndarray) -> Figure:
    """Return the mean distance between two pictures of the same prompt, over prompts with at least two."""
    order = np.argsort(prompts, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1)
    several = [group for group in groups if len(group) > 1]
    per_prompt = np.array([pair_distances(features[group]).mean() for group in several])
    influences = np.zeros(len(features))
    for group, value in zip(several, per_prompt, strict=True):
        influences[group] = (value - per_prompt.mean()) * len(features) / (len(per_prompt) * len(group))
    return Figure(float(per_prompt.mean()), influences, least=0.0)


def flattened(result: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted name, figure as a dict) of every figure in a result."""
    for name, value in result.items():
        if isinstance(value, dict) and "interval" in value:
            yield above + name, value
        elif isinstance(value, dict) and name != "protocol":
            yield from flattened(value, f"{above}{name}.")


def measurement_remarks(samples: int, reference: int, widths: Mapping[str, int]) -> list[str]:
    """Return remarks on how far to trust the Frechet distances."""
    found = []
    least = min(samples, reference)
    if wide := [f"{name} ({width})" for name, width in widths.items() if width >= least]:
        found.append(
            f"{least} pictures are too few for the number of features of {', '.join(wide)}: their covariance is "
            "singular, so trust KID instead of the Frechet distance"
        )
    if least < LEAST_FRECHET:
        found.append(
            f"the Frechet distance of N={least} pictures is biased upwards by about 1/N: compare only figures of equal "
            "N"
        )
    return found
