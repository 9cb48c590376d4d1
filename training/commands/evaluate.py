"""`cascade evaluate`: samples held-out captions with a bundle and measures the pictures.

    OUTPUT/result.json      every figure with its interval, and the protocol
    OUTPUT/influences.npz   the contribution of each picture, for `action=compare`
    OUTPUT/report.md        the figures as tables
    OUTPUT/report.html      a self-contained page with figures, pictures and protocol
    OUTPUT/shown.npz        some pictures of each category, for the page over all checkpoints
    OUTPUT/samples.png      samples with their captions next to their reference pictures; with evaluation.kind=shapes,
                            wrong ones are marked, and come first if not all fit
    OUTPUT/parts/           features of the pictures drawn so far; repeating the command resumes from them

shapes    an oracle reads background, colour, size, shape (and relation) from the samples and, as a check, from the real
          drawings; PSNR of each super-resolution stage against bicubic; feature-based figures
pictures  feature-based figures only, for data that no oracle can read

The processes of a job share the parts; the one that finishes last writes the result.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.progress import progress
from training.cascade.bundle import checkpoint_dir, refuse_bundle
from training.cascade.cascade import Cascade
from training.cascade.records import record
from training.checkpoint.store import CheckpointStore
from training.commands.measuring import PART, Evaluation
from training.commands.sample import open_cascade, place_cascade
from training.commands.shapes import ShapesEvaluation
from training.config.commands import EvaluateCommand
from training.config.experiment import Experiment, RunConfig
from training.evaluation import comparison, page, report
from training.evaluation.extractors.answers import open_answerer
from training.evaluation.extractors.base import open_extractors
from training.evaluation.parts import spilled
from training.evaluation.references import RULE, SUFFIX, ReferenceFile, References
from training.processes.devices import own_device
from training.processes.ranks import Ranks, read_ranks
from training.run.directory import RunDir, leaving_nothing_empty, replace_file, try_to_write
from training.run.reporting.tracking import log_picture

REFERENCE_FILE = f"reference{SUFFIX}"


def main(config: EvaluateCommand) -> dict[str, Any]:
    """Evaluate the bundle `bundle.dir`, or run another `action`; return the content of result.json (or that action's
    result)."""
    with leaving_nothing_empty(Path(config.evaluation.output)):
        return _do(config)


def _do(config: EvaluateCommand) -> dict[str, Any]:
    if config.action != "compare":
        refuse_bundle(Path(config.evaluation.output), "evaluation.output")
    if config.action == "compare":
        differences = comparison.compare_results(config.results)
        print(comparison.as_text(differences))
        return differences
    if config.action == "pareto":
        from training.evaluation.pareto import draw_curve

        curve = draw_curve(config.results, Path(config.evaluation.output))
        log_curve(curve, Path(config.evaluation.output))
        if config.record:
            best = min((curve["points"][place] for place in curve["front"]), key=lambda point: point["y"]["value"])
            record(config.bundle.dir, comparison.read_result(best["path"]).result, samplers=True)
            print(f"{config.bundle.dir}: its sampler settings are now {best['settings']} ({best['path']})")
        return curve
    if config.watch or config.action == "bisect":
        from training.commands.bisect import bisect
        from training.commands.watch import one_checkpoint, watch

        follow = watch if config.watch else bisect
        return follow(
            config,
            lambda given, runs, output: evaluate_cascade(
                one_checkpoint(given, output), place_cascade(given, Cascade.from_runs(runs))
            ),
        )
    if config.action == "reference":
        try_to_write(Path(config.evaluation.output), "evaluation.output")
        return make_reference(config, Path(config.evaluation.output))
    return evaluate_cascade(config)


def evaluate_cascade(config: EvaluateCommand, opened: tuple[Cascade, list[str]] | None = None) -> dict[str, Any]:
    """Evaluate one cascade, with results in `evaluation.output`; return the content of result.json.

    If other processes are still drawing, only `rank` and `waits` are returned: the last process writes the result.

    Args:
        opened: a cascade and the devices to draw on; None: the bundle `bundle.dir`.
    """
    began = time.monotonic()
    output = Path(config.evaluation.output)
    try_to_write(output, "evaluation.output")
    networks, device = config.evaluation.extractors, _device(config)
    extractors, answerer = open_extractors(networks, device), open_answerer(networks, device)
    cascade, devices = opened or open_cascade(config)
    kind = ShapesEvaluation if config.evaluation.kind == "shapes" else Evaluation
    evaluation = kind(config, cascade, devices, extractors, answerer)
    ranks = read_ranks()
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    evaluation.draw(rank, world_size)
    done, count = evaluation.parts.done_count(), evaluation.parts.count
    if done < count:
        print(
            f"{output}: {done} of {count} parts are done; the process that finishes last writes the result. If no "
            "other is running, repeat the command"
        )
        return {"rank": rank, "waits": "the last process to finish writes the result"}
    result = evaluation.result()
    result["seconds"] = round(time.monotonic() - began, 3)
    replace_file(output / "report.md", report.markdown(result))
    replace_file(output / "report.html", page.html(result, evaluation.sections))
    replace_file(output / comparison.RESULT, json.dumps(result, indent=1, ensure_ascii=False))
    evaluation.parts.forget_others()
    if config.record:
        record(config.bundle.dir, result)
        print(f"{config.bundle.dir}: the figures were added to its model card")
    print(report.summary(result))
    print(f"{output / 'report.html'}: the report (report.md as text); samples in {output / 'samples.png'}")
    return result


def log_curve(curve: dict[str, Any], output: Path) -> None:
    """Log the plot of the curve to the W&B run of the last stage, if that run's directory is on this machine."""
    stage = comparison.read_result(curve["points"][0]["path"]).result["protocol"]["stages"][-1]
    place = Path(str(stage.get("run")))
    store = CheckpointStore(checkpoint_dir(str(place))) if place.is_dir() else None
    if store is not None and (step := store.newest_whole()) >= 0:
        run = RunDir(Experiment(run=RunConfig(dir=str(place))))
        if log_picture(run, store.open(step).meta, "pareto", output / "pareto.png"):
            print(f"{place}: the curve was logged to W&B as `pareto`")


def make_reference(config: EvaluateCommand, output: Path) -> dict[str, Any]:
    """Compute the features of `evaluation.reference` and write them to a file, with the preprocessing rule; return its
    path, its number of pictures and these facts."""
    settings = config.evaluation
    if not settings.reference:
        raise ConfigError("evaluation.reference: set it to held-out shards, for example data/heldout")
    extractors = open_extractors(settings.extractors, _device(config))
    size = _last_size(config)
    references = References(settings.reference, config.data, size, config.seed)
    most = settings.reference_samples or references.count
    captions: list[str] = []
    file = output / REFERENCE_FILE
    with spilled(output, {extractor.name: extractor.width for extractor in extractors}) as features:
        with progress(unit="picture", desc="reference", total=min(most, references.count)) as bar:
            for real in references.chunks(PART, most):
                for extractor in extractors:
                    features.add(extractor.name, extractor.pictures(real.pictures))
                captions += real.captions
                bar.update(len(real.captions))
        facts = {
            "rule": RULE,
            "size": size,
            "extractors": {extractor.name: extractor.describe() for extractor in extractors},
            "fingerprint": f"{references.fingerprint}:{len(captions)}:{config.seed}",
            "shards": str(settings.reference),
            "broken": references.broken,
        }
        ReferenceFile(features.rows(), captions, facts).write(file)
    print(
        f"{file}: {len(captions)} pictures at {size} px, {references.broken} skipped; use evaluation.reference={file}"
    )
    return {"reference": str(file), "n": len(captions), **facts}


def _last_size(config: EvaluateCommand) -> int:
    """Return the side of the pictures that the bundle generates, pixels."""
    from training.cascade import bundle

    return bundle.read(config.bundle.dir).stages[-1].config.image_size


def _device(config: EvaluateCommand) -> str:
    """Return the device for extractors: this process's GPU, or the CPU."""
    ranks = read_ranks() or Ranks()
    return own_device(config.cluster, ranks.rank, ranks.local_rank)
