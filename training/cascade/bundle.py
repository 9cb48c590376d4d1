"""`cascade bundle`: collects the stages' averaged weights in one directory, and defines the format of that directory.

    BUNDLE/                      a directory or an s3:// prefix
        bundle.json              the stages in order with their settings, the text encoder, the origin of all weights
        STAGE.safetensors        fp32 weights of one U-Net by parameter name
        README.md                the model card

`bundle.json` is removed first and written last: a directory without it is not a bundle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.folder import in_cache, open_folder
from data_pipeline.storage.retry import PATIENCE, persist
from data_pipeline.storage.store import is_remote
from training.checkpoint.provenance import code_version
from training.checkpoint.safetensors import Digest, chunks, open_tensors
from training.checkpoint.store import MANIFEST, STEP_NAME, Checkpoint, CheckpointStore, checksum
from training.cli.typed import command_for, experiment_of
from training.config.diffusion import TAUGHT
from training.config.experiment import Experiment, StageConfig, TextConfig
from training.config.plain import from_plain
from training.config.unet import UNetConfig, for_stage
from training.model.alignment import BESIDE
from training.model.lora import merged, weights_sha256
from training.model.unet import UNet
from training.optim.averages import state_name

INDEX, CARD = "bundle.json", "README.md"
FORMAT = 1
PLAIN_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
"""Valid name of a weights file: one in the bundle's own directory."""
HOW_TO = 'from cascade_t2i import Cascade; images = Cascade.from_pretrained("{path}").generate(["a caption"], seed=0)'
T = TypeVar("T")


@dataclass
class StageWeights:
    """One stage: its settings, its origin and its weights, which are read on demand."""

    config: StageConfig
    unet: UNetConfig
    tensors: Callable[[], dict[str, Tensor]]
    origin: dict[str, Any] = field(default_factory=dict)
    """`run`, `checkpoint`, `step`, `position`, `ema_decay`, `code`, ...: JSON values."""
    sha256: str = ""
    """SHA-256 of the weights file in a bundle; empty if the weights come from a run."""


@dataclass
class Bundle:
    """A finished cascade: its text encoder and its stages, base first."""

    text: TextConfig
    stages: list[StageWeights]
    figures: dict[str, Any] | None = None
    """What `cascade evaluate record=true` recorded of these weights (training/cascade/records.py)."""


def main(config: Experiment) -> dict[str, Any]:
    """Bundle the newest valid checkpoint of every run in `bundle.runs`, base first; return the bundle's path and a
    summary of its stages."""
    bundle = collect(config.bundle.runs, experiment=experiment_of(config))
    _keep_bases(config.bundle.dir, bundle)
    written = write(config.bundle.dir, bundle)
    for stage in written["stages"]:
        print(f"{stage['name']}: {stage['parameters'] / 1e6:.1f}M parameters of step {stage['origin']['step']}")
    print(f"{config.bundle.dir}: bundle of {len(bundle.stages)} stages")
    print(f"next: {command_for('sample', config)}")
    brief = ("name", "file", "bytes", "sha256", "parameters", "origin")
    return {"bundle": config.bundle.dir, "stages": [{key: stage[key] for key in brief} for stage in written["stages"]]}


def _keep_bases(path: str, bundle: Bundle) -> None:
    """Raise ConfigError if the bundle would replace weights that some of its adapters (lora) are added to."""
    place = path.rstrip("/") if is_remote(path) else os.path.abspath(path)
    for stage in bundle.stages:
        if stage.origin.get("lora", {}).get("path") == place:
            raise ConfigError(
                f"bundle.dir={path}: the adapters (lora) of {stage.config.name} are added to the weights in this "
                "bundle, which their run needs; name another directory"
            )


# ------------------------------------------------------------------------------------------------ from runs


def collect(runs: Sequence[str], experiment: str = "EXPERIMENT") -> Bundle:
    """Return the averaged weights (first EMA) of the newest valid checkpoint of each run, base first.

    Args:
        runs: run directories, directories (or s3:// prefixes) of checkpoints, or single checkpoints.
        experiment: the experiment to name in the error if a run has no checkpoint.

    Raises:
        ConfigError: no runs are given, or the stages do not form a cascade.
        DataError: a run has no valid checkpoint.
    """
    if not runs:
        raise ConfigError("bundle.runs: list the run directories of the stages, base first")
    found = [_open_run(run, experiment) for run in runs]
    texts = [from_dict(TextConfig, _settings(checkpoint, "text"), str(checkpoint.folder)) for checkpoint in found]
    stages = [_stage_of(run, checkpoint) for run, checkpoint in zip(runs, found, strict=True)]
    _check_texts(runs, texts)
    if problem := _check_chain(stages):
        raise ConfigError(f"bundle.runs: {problem}")
    return Bundle(texts[0], stages)


class NoCheckpoint(DataError):
    """There is no run, or it has not saved a checkpoint yet."""


def _open_run(run: str, experiment: str) -> Checkpoint:
    name = run.rstrip("/").rsplit("/", 1)[-1]
    if STEP_NAME.fullmatch(name):
        return CheckpointStore(run.rstrip("/")[: -len(name)]).open(int(name.removeprefix("step-")))
    checkpoint = CheckpointStore(checkpoint_dir(run)).newest()
    if checkpoint is None:
        known = "" if experiment == "default" else f" experiment={experiment} stage={'...' if is_remote(run) else name}"
        command = f"cascade train{known} {'checkpoint' if is_remote(run) else 'run'}.dir={run}"
        raise NoCheckpoint(f"bundle.runs: {run} has no checkpoint yet; make one with: {command}")
    return checkpoint


def checkpoint_dir(run: str) -> str:
    """Return the checkpoint directory of a run; a directory that is not a run is taken as a checkpoint directory
    itself."""
    return run if "://" in run else persist(run, partial(_checkpoint_dir, run), PATIENCE)


def _checkpoint_dir(run: str) -> str:
    from omegaconf import OmegaConf

    settings = Path(run) / "config.yaml"
    if not settings.exists():
        inside = Path(run) / "checkpoints"
        return str(inside) if inside.is_dir() or not Path(run).is_dir() else run
    return OmegaConf.select(OmegaConf.load(settings), "checkpoint.dir") or str(Path(run) / "checkpoints")


def _settings(checkpoint: Checkpoint, section: str) -> dict[str, Any]:
    """Return a section of the settings that the run was trained with.

    Raises:
        DataError: the checkpoint does not contain it.
    """
    config = checkpoint.recorded("config")
    if not (isinstance(config, dict) and isinstance(config.get(section), dict)):
        raise DataError(f"{checkpoint.folder}: it does not contain the settings ({section}) that it was trained with")
    return config[section]


def _stage_of(run: str, checkpoint: Checkpoint) -> StageWeights:
    meta, where = checkpoint.meta, str(checkpoint.folder)
    config = from_dict(StageConfig, _settings(checkpoint, "stage"), where)
    text, decays = _settings(checkpoint, "text"), _settings(checkpoint, "ema").get("decays") or [None]
    prefix = f"{state_name(0)}/"
    names = {name.removeprefix(prefix): name for name in checkpoint.names(prefix)}
    names = {short: name for short, name in names.items() if not short.startswith(BESIDE)}
    unet = for_stage(config, text.get("dim", 0))
    tensors: Callable[[], dict[str, Tensor]]
    if base := meta.get("lora"):
        tensors = _Merged(checkpoint, names, base, config.name)
    else:
        _check_names(unet, {short: checkpoint.shape(name) for short, name in names.items()}, where)
        tensors = _Averages(checkpoint, names)
    origin = {
        "run": run,
        "checkpoint": where,
        "step": checkpoint.step,
        "position": meta.get("position"),
        "ema_decay": decays[0],
        "code": meta.get("code", {}).get("commit"),
        "text": text.get("sha"),
        **({"lora": base} if base else {}),
        **({"distilled": {**taught, **_lesson(checkpoint)}} if (taught := meta.get("teacher")) else {}),
        **({"data": data["fingerprint"]} if (data := meta.get("data") or {}).get("fingerprint") else {}),
        **({"licences": data["licences"]} if data.get("licences") else {}),
    }
    return StageWeights(config, unet, tensors, origin)


def _lesson(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a distilled stage was trained for: the student's steps, and the teacher's steps, solver and
    guidance."""
    settings = _settings(checkpoint, "distill")
    return {key: settings[key] for key in TAUGHT}


@dataclass
class _Averages:
    """Reads tensors of a checkpoint, under shorter names, as copies: if a file were truncated while mapped, reading the
    mapping would kill the process (SIGBUS)."""

    checkpoint: Checkpoint
    names: dict[str, str]

    def __call__(self) -> dict[str, Tensor]:
        return {short: self.checkpoint.read(name).clone() for short, name in self.names.items()}


@dataclass
class _Merged(_Averages):
    """Reads the adapters of a checkpoint and adds them to the weights they were trained with."""

    base: dict[str, Any]
    stage: str

    def __call__(self) -> dict[str, Tensor]:
        try:
            plain = stage_weights(self.base["path"], self.stage).tensors()
        except (DataError, ConfigError) as error:
            raise DataError(
                f"{self.checkpoint.folder}: the weights that its adapters (lora) were trained with are no longer in "
                f"{self.base['path']}; restore them, or resume the run with train.init_from=PLACE ({error})"
            ) from error
        check_base(plain, self.base)
        return merged(plain, super().__call__(), self.base["scale"])


def stage_weights(path: str, stage: str, key: str = "train.init_from") -> StageWeights:
    """Open one stage of a bundle, of a run, or of a single checkpoint.

    Args:
        key: the setting to name in an error.

    Raises:
        ConfigError: the bundle has no such stage.
        DataError: there is neither a bundle nor a checkpoint, or it is damaged.
    """
    try:
        opened = read(path) if open_folder(in_cache(path, INDEX)).size(INDEX) is not None else collect([path])
    except NoCheckpoint as error:
        raise DataError(f"{key}={path}: this is neither a bundle nor a run with a checkpoint") from error
    found = [weights for weights in opened.stages if len(opened.stages) == 1 or weights.config.name == stage]
    if not found:
        names = ", ".join(weights.config.name for weights in opened.stages)
        raise ConfigError(f"{key}={path}: it has no stage {stage}, only {names}")
    return found[0]


def check_base(plain: dict[str, Tensor], base: dict[str, Any]) -> None:
    """Raise DataError unless `plain` are exactly the weights that the adapters were trained with."""
    if weights_sha256(plain) != base["sha256"]:
        raise DataError(
            f"{base['path']}: these are not the weights that the LoRA adapters were trained with; restore the "
            "original ones"
        )


def _check_names(unet: UNetConfig, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in UNet(unet).state_dict().items()}
    wrong = sorted(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name))
    if wrong:
        raise DataError(
            f"{where}: {len(wrong)} weights do not fit the U-Net of this version of the code (first: {wrong[0]}); "
            f"bundle it with the version that trained it"
        )


def _check_texts(runs: Sequence[str], texts: Sequence[TextConfig]) -> None:
    for run, text in zip(runs, texts, strict=True):
        for key in ("kind", "sha", "dim", "max_tokens"):
            here, first = getattr(text, key), getattr(texts[0], key)
            if here != first and None not in (here, first):
                raise ConfigError(f"bundle.runs: {run} was trained with text.{key}={here} but {runs[0]} with {first}")


def _check_chain(stages: Sequence[StageWeights]) -> str:
    """Return why the stages do not form a cascade; empty if they do."""
    names = [stage.config.name for stage in stages]
    if not names:
        return "it has no stages"
    if len(set(names)) < len(names):
        return f"two stages have the same name ({', '.join(names)})"
    for before, after in pairwise(stages):
        if not after.config.low_res_size:
            return (
                f"{after.config.name} draws from text alone, but {before.config.name} comes before it; list the stages "
                "base first"
            )
        if after.config.low_res_size != before.config.image_size:
            return (
                f"{after.config.name} starts from {after.config.low_res_size} px pictures but {before.config.name} "
                f"generates {before.config.image_size} px; list the stages base first"
            )
    return ""


def from_dict(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Build a settings dataclass from its JSON form.

    Raises:
        DataError: keys or values that this version does not know; the message names `where`.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        return from_plain(kind, values)
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{where}: made by another version of this project ({reason})") from error


# ------------------------------------------------------------------------------------------------- on disk


def refuse_bundle(folder: Path, key: str) -> None:
    """Raise ConfigError if the results of a command would go among the files of a bundle.

    Args:
        key: the setting that names the folder.
    """
    if (folder / INDEX).exists():
        raise ConfigError(
            f"{key}={folder}: this is the bundle itself; choose another directory, for example {key}={folder}-results"
        )


def write(path: str, bundle: Bundle, address: str | None = None) -> dict[str, Any]:
    """Write a bundle directory or s3:// prefix; return the content of its `bundle.json`.

    Args:
        address: where it will be opened from, for its card; None: `path`.

    Recorded figures are kept only if all weights are those that were evaluated.

    Raises:
        ConfigError: the stages do not form a cascade.
    """
    if problem := _check_chain(bundle.stages):
        raise ConfigError(f"{path}: {problem}")
    address = address or path
    folder = open_folder(path)
    ready = {s.config.name: s.tensors() for s in bundle.stages if "lora" in s.origin}  # fails if the base is gone
    folder.remove(INDEX)
    stages = []
    for stage in bundle.stages:
        name = f"{stage.config.name}.safetensors"
        tensors = ready.pop(stage.config.name, None) or stage.tensors()
        digest = Digest(chunks({key: tensor.detach().cpu().float() for key, tensor in tensors.items()}))
        folder.write(name, digest)
        stages.append(
            {
                "name": stage.config.name,
                "file": name,
                "bytes": digest.size,
                "sha256": digest.sha256,
                "parameters": sum(tensor.numel() for tensor in tensors.values()),
                "config": asdict(stage.config),
                "unet": asdict(stage.unet),
                "origin": stage.origin,
            }
        )
    content = {
        "format": FORMAT,
        "index": _readme(address, stages),
        "text": asdict(bundle.text),
        "stages": stages,
        "code": code_version(),
    }
    if bundle.figures and [stage["sha256"] for stage in stages] == [stage.sha256 for stage in bundle.stages]:
        content["figures"] = bundle.figures
    folder.write(CARD, [model_card(address, content).encode()])
    folder.write(INDEX, [json.dumps(content, indent=1, ensure_ascii=False).encode()])
    return content


def model_card(path: str, content: dict[str, Any]) -> str:
    """Return the README.md of a bundle, with the front matter that the Hugging Face Hub reads."""
    code, text = content["code"], content["text"]
    lines = [
        "---",
        "pipeline_tag: text-to-image",
        "library_name: cascade-t2i",
        "tags: [text-to-image, diffusion, cascade]",
        "---",
        "",
        "# Text-to-image cascade",
        "",
        "```python",
        *HOW_TO.format(path=path).split("; "),
        "```",
        "",
        f"Text encoder: {text['kind']} {text.get('path') or ''} ({text['dim']} wide, SHA {text.get('sha')}).",
        "",
        "| stage | pictures | weights | step | trained in | data | code |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in content["stages"]:
        config, origin = stage["config"], stage["origin"]
        start = f"{config['low_res_size']} -> " if config["low_res_size"] else ""
        lines.append(
            f"| {stage['name']} | {start}{config['image_size']} px | {stage['parameters']:,} | {origin.get('step')} "
            f"| {origin.get('run')} | {origin.get('data', 'not recorded')} | {origin.get('code')} |"
        )
    lines += [
        "",
        *(line for stage in content["stages"] for line in _made_from(stage["name"], stage["origin"])),
        "Data sets are identified by the fingerprint of their index.",
        "",
        *_licences({stage["name"]: stage["origin"] for stage in content["stages"]}),
        "",
        f"Bundled by commit {code['commit']}.",
        *_figures(content.get("figures")),
    ]
    return "\n".join(lines) + "\n"


def _made_from(name: str, origin: dict[str, Any]) -> list[str]:
    """Return the card's lines on the other weights that a stage was made from."""
    lines = []
    if taught := origin.get("distilled"):
        lines.append(
            f"{name} is distilled to {taught['steps']} steps with guidance {taught['guidance']:g} in its weights, from "
            f"weights with SHA-256 {taught['sha256']}."
        )
    if lora := origin.get("lora"):
        lines.append(f"{name} has adapters (LoRA) merged into weights with SHA-256 {lora['sha256']}.")
    return [part for line in lines for part in (line, "")]


def _licences(origins: dict[str, dict[str, Any]]) -> list[str]:
    """Return the card's section on the licences of the pictures that each stage was trained on."""
    counted = {name: origin.get("licences") or {} for name, origin in origins.items()}
    lines = ["## Licences of the training pictures", ""]
    if without := [name for name, counts in counted.items() if not counts]:
        lines += [f"Not recorded for {', '.join(without)}: state them here before you publish the weights.", ""]
    licences = dict.fromkeys(licence for counts in counted.values() for licence in counts)
    if not licences:
        return lines[:-1]
    stages = [name for name, counts in counted.items() if counts]
    cell = "| {} |".format
    lines += [cell(" | ".join(["licence", *stages])), "|---" * (len(stages) + 1) + "|"]
    for licence in licences:
        counts = [f"{counted[stage].get(licence, 0):,}" for stage in stages]
        lines.append(cell(" | ".join([licence.replace("|", "\\|"), *counts])))
    return [
        *lines,
        "",
        "Number of pictures by the licence in their `.json`, from the index of the shards; `unknown`: it names none. "
        "If a training started from other weights, the data of those weights are not counted here.",
    ]


def _figures(figures: dict[str, Any] | None) -> list[str]:
    """Return the card's section on the evaluation recorded in the bundle."""
    if not figures:
        return ["", "Figures: `cascade evaluate record=true` writes them here with their protocol."]
    n, protocol = figures["n"], figures["protocol"]
    rows = [
        f"| {name} | {entry['value']:.4g} | {entry['interval'][0]:.4g} to {entry['interval'][1]:.4g} | {entry['n']} |"
        for name, entry in figures["values"].items()
    ]
    told = [f"* {key}: {value}" for key, value in protocol.items() if key not in ("extractors", "samplers")]
    told += [
        f"* features {name}: {', '.join(f'{key} {value}' for key, value in facts.items() if value)}"
        for name, facts in protocol["extractors"].items()
    ]
    told += [
        f"* sampler of {name}: {', '.join(f'{key} {value}' for key, value in sampler.items())}"
        for name, sampler in protocol["samplers"].items()
    ]
    return [
        "",
        "## Figures",
        "",
        f"{n['samples']} samples of {n['prompts']} prompts against {n['reference']} reference pictures.",
        "",
        "| figure | value | 95 % interval | n |",
        "|---|---|---|---|",
        *rows,
        "",
        *told,
    ]


def _readme(path: str, stages: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a description of each file, for people who open bundle.json."""
    lines = {"use": HOW_TO.format(path=path)}
    for stage in stages:
        size, origin = stage["config"]["image_size"], stage["origin"]
        start = stage["config"]["low_res_size"]
        kind = f"{start} -> {size} px" if start else f"{size} px from text"
        taught = origin.get("distilled")
        few = f"distilled to {taught['steps']} steps with guidance {taught['guidance']:g}, " if taught else ""
        lines[stage["file"]] = (
            f"{kind}, {few}{stage['parameters']:,} weights, averaged with decay {origin.get('ema_decay')}, "
            f"step {origin.get('step')} of {origin.get('run')}, code {origin.get('code')}"
        )
    return lines


def read(path: str) -> Bundle:
    """Open a bundle: a directory, an s3:// prefix, or a name in the Hugging Face cache. Weights are read on demand.

    Raises:
        DataError: there is no bundle, it is damaged, or another version of this project wrote it.
    """
    folder = open_folder(in_cache(path, INDEX))
    try:
        content = json.loads(folder.read(INDEX))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if path.rstrip("/").endswith(f"/{INDEX}") and Path(path).is_file():
            raise DataError(f"{path}: give the directory that contains it: {Path(path).parent}") from error
        if (Path(path) / "bundle" / INDEX).is_file():
            raise DataError(f"{path}: not a bundle (no {INDEX}); there is one in {path}/bundle") from error
        make = f"'bundle.runs=[{path}]' bundle.dir=NEW" if _is_run(path) else "and the same experiment=..."
        fetch = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).parent.exists():  # perhaps a name on the Hub
            fetch = f", or fetch one from the Hugging Face Hub with: hf download {path}"
        raise DataError(f"{path}: not a bundle (no {INDEX}); make one with: cascade bundle {make}{fetch}") from error
    except ValueError as error:
        raise DataError(f"{path}/{INDEX}: not valid JSON ({error})") from error
    where = f"{path}/{INDEX}"
    if not isinstance(content, dict):
        raise DataError(f"{where}: not the index of a bundle")
    if content.get("format") != FORMAT:
        words = f"format {content.get('format')} is not {FORMAT}, the one this version reads"
        raise DataError(f"{where}: {words}; use the version that wrote it, or a newer one")
    stages = []
    try:
        for entry in content["stages"]:
            if not PLAIN_NAME.fullmatch(entry["file"]):
                raise DataError(f"{where}: {entry['file']!r} is not a file in this directory; bundle or copy it again")
            size = folder.size(entry["file"])
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
                raise DataError(f"{path}/{entry['file']}: {found}; bundle or copy it again")
            structure: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["unet"].items()}
            unet, config = UNetConfig(**structure), from_dict(StageConfig, entry["config"], where)
            unet.check()
            weights = _Reader(folder, entry["file"], entry["sha256"])
            stages.append(StageWeights(config, unet, weights, entry["origin"], entry["sha256"]))
        if problem := _check_chain(stages):
            raise DataError(f"{where}: {problem}")
        return Bundle(from_dict(TextConfig, content["text"], where), stages, content.get("figures"))
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: made by another version of this project, or changed ({error})") from error


def load_unet(weights: StageWeights) -> UNet:
    """Return the network of a stage with its weights loaded, frozen, in eval mode, on the CPU.

    Raises:
        DataError: the weights do not fit the network.
    """
    with torch.device("meta"):
        unet = UNet(weights.unet)
    try:
        unet.load_state_dict(weights.tensors(), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{weights.config.name}: the weights do not fit its U-Net ({reason[:200]})") from error
    for module in unet.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # not saved: the constant zero token that represents no text
                module.register_buffer(name, torch.zeros(buffer.shape, dtype=torch.float32), persistent=False)
    return unet.eval().requires_grad_(False)


@dataclass
class _Reader:
    folder: Any
    name: str
    sha256: str

    def __call__(self) -> dict[str, Tensor]:
        from safetensors import SafetensorError

        where = f"{self.folder}/{self.name}"
        try:
            return persist(where, self._read, PATIENCE)
        except SafetensorError as error:
            raise DataError(f"{where}: damaged ({error}); bundle or copy it again") from error

    def _read(self) -> dict[str, Tensor]:
        file = self.folder.fetch(self.name)
        if checksum(file, "sha256") != self.sha256:
            raise DataError(f"{self.folder}/{self.name}: does not match its SHA-256; bundle or copy it again")
        content = open_tensors(file)
        return {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118


def _is_run(path: str) -> bool:
    places = (f"step-*/{MANIFEST}", f"checkpoints/step-*/{MANIFEST}")
    return "://" not in path and any(found for place in places for found in Path(path).glob(place))
