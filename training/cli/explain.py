"""Turns errors of Hydra and OmegaConf about a wrong setting into one sentence with the key and the valid values.

Both raise the same few exception classes for many different mistakes, so only their messages tell what was wrong.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import typing
from collections.abc import Iterator, Sequence

from training.cli.fields import Key, keys_of, type_words
from training.cli.overrides import PLACES, groups, section_of
from training.config.commands import COMMANDS
from training.config.reads import may_read

EPOCHS = "train.steps (epochs x samples / data.global_batch)"
RESUME = "the same command again, which resumes automatically"
OUTPUT = ("output", "prepare.output", "evaluation.output", "run.dir", "bundle.dir")
SYNONYMS: dict[str, str | tuple[str, ...]] = {
    "batch_size": "data.global_batch",
    "train_batch_size": "data.global_batch",
    "per_device_train_batch_size": "data.micro_batch",
    "micro_batch_size": "data.micro_batch",
    "accumulate_grad_batches": "data.micro_batch (the rest of a rank's share is accumulated)",
    "gradient_accumulation_steps": "data.micro_batch (the rest of a rank's share is accumulated)",
    "learning_rate": "optimizer.lr",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "lr_scheduler": "optimizer.decay",
    "max_grad_norm": "optimizer.clip_norm",
    "gradient_clip_val": "optimizer.clip_norm",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "num_steps": "train.steps",
    "epochs": EPOCHS,
    "num_epochs": EPOCHS,
    "max_epochs": EPOCHS,
    "num_train_epochs": EPOCHS,
    "mixed_precision": "precision (precision=bf16 or fp32)",
    "fp16": "precision (precision=bf16 or fp32)",
    "bf16": "precision (precision=bf16 or fp32)",
    "resolution": ("size", "stage (stage=base64; the size is stage.image_size)"),
    "image_size": ("size", "stage.image_size"),
    "width": "size",
    "height": "size",
    **dict.fromkeys(("output", "output_dir", "out", "outdir", "output_path"), OUTPUT),
    "logging_dir": "run.dir",
    "run_name": "run.name",
    "exp_name": "run.name",
    "experiment_name": "run.name",
    "train_data_dir": "data.shards (cascade prepare makes shards of a folder)",
    "dataset": "data.shards",
    "workers": "data.threads",
    "num_workers": "data.threads",
    "dataloader_num_workers": "data.threads",
    "random_flip": "data.flip",
    "gpus": "cluster.processes",
    "num_gpus": "cluster.processes",
    "num_processes": "cluster.processes",
    "devices": "cluster.processes",
    "nproc_per_node": "cluster.processes",
    "nnodes": "cluster.nodes",
    "num_nodes": "cluster.nodes",
    "num_machines": "cluster.nodes",
    "accelerator": "cluster.gpus",
    "device": "cluster.gpus",
    "qos": "cluster.sbatch (cluster.sbatch.qos=...)",
    "gres": "cluster.sbatch (cluster.sbatch.gres=...)",
    "constraint": "cluster.sbatch (cluster.sbatch.constraint=...)",
    "deepspeed": "zero (zero=zero2; the engine's settings follow from zero, optimizer and precision)",
    "zero_stage": "zero.stage",
    "resume": RESUME,
    "resume_from": RESUME,
    "resume_from_checkpoint": RESUME,
    "ckpt_path": ("from_bundle", RESUME),
    "ckpt": ("from_bundle", RESUME),
    "pretrained_model_name_or_path": ("from_bundle", "train.init_from"),
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "scheduler": ("sampler", "stage.sampler.name"),
    "negative": "negative_prompts",
    "negative_prompt": "negative_prompts",
    "prompt": ("prompts", "train.sample_prompts"),
    "prompts": "train.sample_prompts",
    "validation_prompt": "train.sample_prompts",
    "validation_prompts": "train.sample_prompts",
    "num_images_per_prompt": "num_images",
    "num_samples": "num_images",
    "n_samples": "num_images",
    "n": "num_images",
    "validation_steps": "validation.every",
    "checkpoint_every": "checkpoint.every",
    "checkpointing_steps": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep_last",
    "save_total_limit": "checkpoint.keep_last",
    "logging_steps": "train.log_every",
    "use_wandb": "tracking (tracking=online, offline or disabled)",
    "report_to": "tracking (tracking=online, offline or disabled)",
    "logger": "tracking (tracking=online, offline or disabled)",
    "wandb_project": "wandb.project",
    "ema_decay": "ema.decays",
    "snr_gamma": "ingredient (ingredient=[min_snr])",
    "model": ("from_bundle", "stage"),
    "config": "experiment",
}
"""Names of settings in other programs -> ours, with a remark if the meaning differs; of several, the first that the
command has."""
OPTIONS = {
    "config": "write experiment=NAME, or --config-dir DIR --config-name NAME for a file of your own (conf/README.md)",
    "local_rank": "cascade starts its own processes (cluster.processes=N); other launchers set RANK, LOCAL_RANK and "
    "WORLD_SIZE (docs/cluster.md)",
}
"""Options of other programs that no single setting replaces, and what to do instead."""
CHOICES = {
    "tracking": dict.fromkeys(("off", "none", "no", "false", "disable", "0"), "disabled"),
    "precision": {"float32": "fp32", "32": "fp32", "bfloat16": "bf16", "mixed": "bf16"},
}
"""Options of groups by other names -> ours."""
SEVERAL_OPTIONS = {"ingredient", "extractor"}
"""Groups of which several options can be chosen."""
PLUGINS = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher=ray": "hydra-ray-launcher",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
    "hydra/sweeper=nevergrad": "hydra-nevergrad-sweeper",
}
"""Hydra launchers and sweepers -> the package that provides them."""


def explain(error: BaseException, verb: str) -> str:
    """Return one sentence about a composition or validation error of the command."""
    text = "\n".join(_messages(error))
    for rule in (
        _primary,
        _usage,
        _ambiguous,
        _unknown_option,
        _unknown_key,
        _not_optional,
        _wrong_type,
        _interpolation,
    ):
        sentence = rule(text, verb)
        if sentence:
            return sentence
    return " ".join(str(error).split()) or type(error).__name__


def _messages(error: BaseException) -> Iterator[str]:
    """Yield the messages of an error and its causes; messages alone, so that OmegaConf's `full_key` lines stay
    whole."""
    current: BaseException | None = error
    while current is not None:
        yield str(current)
        current = current.__cause__ or current.__context__


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _primary(text: str, verb: str) -> str:
    name = _search(r"Cannot find primary config '(.*?)'", text)
    if not name:
        return ""
    if name in groups()["experiment"]:
        return f"--config-name={name}: {name} is an experiment; write experiment={name}"
    return f"--config-name={name}: there is no {name}.yaml; name the directory that contains it with --config-dir DIR"


def _usage(text: str, verb: str) -> str:
    if place := _search(r"provider=hydra.searchpath in .*, path=(.*) is not available", text):
        return f"hydra.searchpath: there is no directory {place}; write file://DIR, or use --config-dir DIR"
    if words := _search(r"Sweep parameters '(.*?)' requires? --multirun", text):
        return f"{words}: several values; add --multirun for one run per value"
    if "does not support sweep type : INTERVAL_SWEEP" in text:
        return "interval(...): only a sweeper that searches uses it; add hydra/sweeper=optuna, or list the values"
    if "Only one of --run, --multirun, --cfg" in text:
        return "--multirun, --cfg and --info cannot be combined; --cfg shows one composition, without the sweep"
    return ""


def _ambiguous(text: str, verb: str) -> str:
    word = _search(r"Ambiguous value for argument '(.*?)'\n", text)
    if not word:
        return ""
    key, _, value = word.partition("=")
    key, keys = key.lstrip("+"), _keys(verb)
    known = keys.get(key)
    inside = any(one.is_open and key.startswith(f"{name}.") for name, one in keys.items())
    if known is None and key not in groups() and not inside:
        return _no_such_key(key, verb)
    if known is not None and known.is_text:
        one = f"'{key}=\"{value}\"'"
        return f"{word}: several values; write {one} for a text with a comma, or add --multirun for one run per value"
    if re.fullmatch(r"\d{1,3}(,\d{3})+", value) and known is not None and known.type is int:
        return f"{word}: several values; write {key}={value.replace(',', '')} for one number"
    single = (known is not None and known.type in (int, float, bool)) or key in {*groups()} - SEVERAL_OPTIONS
    how = "" if single else f"write {key}=[{value}] for a list, or "
    return f"{word}: several values; {how}add --multirun for one run per value"


def _unknown_option(text: str, verb: str) -> str:
    path = _search(r"Could not (?:find|load) '([^']+)'", text)
    group, _, option = path.partition("/") if path.partition("/")[0] in groups() else path.rpartition("/")
    if not group:
        return ""
    name = option.rpartition("/")[2].removesuffix(".yaml")
    options = re.findall(r"^\t(\S+)$", text, re.MULTILINE) or groups().get(group, [])
    if (group, option) == ("hydra/sweeper", "ax"):  # its dataclasses have mutable defaults
        return "hydra/sweeper=ax: its plugin, hydra-ax-sweeper, cannot be imported by Python 3.11 or later; use optuna"
    if package := PLUGINS.get(f"{group}={option}"):
        return f"{group}={option}: its plugin is not installed; pip install {package}"
    near = [CHOICES.get(group, {}).get(name.lower(), "")] if name.lower() in CHOICES.get(group, {}) else []
    near = near or [key.partition("=")[2] for key in PLUGINS if key.startswith(f"{group}={name}_")]
    near = near or difflib.get_close_matches(name, options, n=1) or [o for o in options if o.endswith(name)][:1]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    if name != option:
        hint += f"a file of your own is found as DIR/{group}/{name}.yaml with --config-dir DIR; "
    return f"{group}={option}: no such option; {hint}the options are {', '.join(options)}"


def _unknown_key(text: str, verb: str) -> str:
    if not re.search(r"Key '.*' (is )?not in ", text):
        return ""
    full = _search(r"full_key: (\S+)", text)
    typed = _search(r"Could not override '(\S+)'", text)
    full = typed if typed.startswith(full + ".") else full
    if verb == "launch":
        owners = [name for name in COMMANDS if full in _keys(name)]
        if owners:
            return (
                f"{full}: only a key of {', '.join(owners)}; write it after the command's name, verb='NAME {full}=...'"
            )
    return _no_such_key(full, verb)


def _no_such_key(full: str, verb: str) -> str:
    if full.startswith(("hydra.sweeper.", "hydra.launcher.")):
        group = full.split(".")[1]
        return f"{full}: no such setting; choose the {group} that has it with hydra/{group}=NAME"
    if full.startswith("hydra."):
        return f"{full}: Hydra has no such setting; cascade COMMAND --cfg hydra lists them"
    if near := meant(full, verb) or " or ".join(_same_ending(full, verb)):
        return f"{full}: no such key; did you mean {near}?"
    if owners := _owners(full):
        return f"{full}: cascade {verb} has no such key; it is a setting of {', '.join(owners)}"
    if near := " or ".join(suggest(full, verb) or suggest(full.lower(), verb)):
        return f"{full}: no such key; did you mean {near}?"
    keys = _useful(verb)
    section = full.rpartition(".")[0]
    while section and section not in keys:
        section = section.rpartition(".")[0]
    inside = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section]
    return f"{full}: no such key; {section or 'the top level'} has {', '.join(inside)}"


def _keys(verb: str) -> dict[str, Key]:
    return keys_of(COMMANDS[verb].config)


def _useful(verb: str) -> list[str]:
    """Return the keys that the command has and can use; those of other commands in shared sections would be refused."""
    return [key for key in _keys(verb) if may_read(verb, key)]


def _owners(full: str) -> list[str]:
    """Return the commands that have and can use this key."""
    return [name for name in COMMANDS if full in _keys(name) and may_read(name, full)]


def meant(full: str, verb: str) -> str:
    """Return our name of a setting that other programs call so, if the command uses it, or a similarly named group;
    otherwise an empty string."""
    useful = {*_useful(verb), *(group for group in groups() if may_read(verb, section_of(group)))}
    names = SYNONYMS.get(full.rpartition(".")[2].replace("-", "_").lower(), ())
    for name in (names,) if isinstance(names, str) else names:
        if name.split()[0] in {*useful, "the"}:
            return name
    near = difflib.get_close_matches(full.lower(), useful & {*groups()}, n=1, cutoff=0.75)
    return "" if "." in full else next(iter(near), "")


def flag(words: Sequence[str], verb: str) -> str:
    """Return the sentence for options with dashes, such as `--experiment demo`, that are settings here.

    Args:
        words: the first unknown option, and what was typed after it.
    """
    first = words[0]
    if "=" in first and "WANDB_SWEEP_ID" in os.environ:
        return (
            f"{first}: settings have no dashes; in the command of the sweep, write ${{args_no_hyphens}} for ${{args}}"
        )
    name, equals, value = first.lstrip("-").partition("=")
    if not equals and words[1:] and "=" not in words[1] and not words[1].startswith("-"):
        value = words[1]
    value = shlex.quote(value) if value else "..."
    known = {*groups(), *_keys(verb)}
    key = name if name in known else name.replace("-", "_")
    if key in OPTIONS:
        return f"{first}: no such option; {OPTIONS[key]}"
    candidates = [key]
    if key not in known:
        other = meant(key, verb)
        if other.startswith("the "):
            return f"{first}: no such option; it is {other}; options are listed by --help"
        if not other and not _same_ending(key, verb) and (owners := _owners(key)):
            return f"{first}: no such option; {key}=... is a setting of {', '.join(owners)}"
        near = re.split(r"[\s=]", other)[0]
        candidates = [near] if near else suggest(key, verb)
    how = "; write " + " or ".join(f"{key}={value}" for key in candidates) if candidates else ""
    return f"{first}: no such option{how}; settings are key=value, options are listed by --help"


def _same_ending(full: str, verb: str) -> list[str]:
    """Return up to two keys that the command can use and whose last part is that of `full`."""
    last = full.rpartition(".")[2]
    same = [key for key in _useful(verb) if key.rpartition(".")[2] == last]
    return difflib.get_close_matches(full, same, n=1, cutoff=0.85) or same[:2]


def suggest(full: str, verb: str) -> list[str]:
    """Return up to two keys that the command can use and that a mistyped one may stand for: similar as a whole, or with
    the same last part."""
    if same := _same_ending(full, verb):
        return same
    keys = _useful(verb)
    section = full.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(full, siblings, n=1, cutoff=0.75)
    others = [k for k in keys if not full.startswith(k + ".")]
    return near or difflib.get_close_matches(full, others, n=1, cutoff=0.7)


def _expected(key: str, verb: str) -> str:
    keys, name = _keys(verb), re.sub(r"\[\d+\]$", "", key)
    if name in keys:
        return type_words(keys[name].type)
    if name.rpartition(".")[0] not in keys:
        return "a value that Hydra accepts; cascade COMMAND --cfg hydra lists its settings"
    mapping = keys[name.rpartition(".")[0]]
    return type_words(typing.get_args(mapping.type)[1])


def _not_optional(text: str, verb: str) -> str:
    key = _search(r"field '(\S+)' is not Optional", text)
    return f"{key}=null: it must be {_expected(key, verb)}" if key else ""


def _wrong_type(text: str, verb: str) -> str:
    marks = (
        "could not be converted",
        "is not a valid",
        "Invalid type assigned",
        "Invalid value assigned",
        "Cannot merge",
        "Cannot assign",
        "Cannot convert",
    )
    if not any(mark in text for mark in marks):
        return ""
    key = _search(r"full_key: (\S+)", text)
    if key == "wandb":
        return "wandb: it is a section; to turn W&B off or on, write tracking=disabled, offline or online"
    value = _search(r"Error merging override [^=\n]*=(.*)", text) or _search(r"Value '(.*?)' ", text)
    stated, place = f"{key}={value}" if value else key, PLACES.get(verb, "")
    if value and key in place and place != key:  # bundle=DIR, data=DIR
        return f"{stated}: {key} is a section; did you mean {place}={value}?"
    return f"{stated}: it must be {_expected(key, verb)}"


def _interpolation(text: str, verb: str) -> str:
    gone = _search(r"Could not delete from config. '(.*?)' does not exist", text)
    if gone:
        return f"~{gone}: no such key"
    name = _search(r"Interpolation key '(.*?)' not found", text)
    key = _search(r"full_key: (\S+)", text)
    where = f"{key}: " if key else ""
    if variable := _search(r"Environment variable '(.*?)' not found", text):
        return f"{where}the environment variable {variable} is not set; set it, or write ${{oc.env:{variable},DEFAULT}}"
    if kind := _search(r"Unsupported interpolation type (\S+)", text):
        return (
            f"{where}${{{kind}:...}} is not a reference; ${{KEY}} refers to a setting, ${{oc.env:NAME}} to a variable"
        )
    if "Recursive interpolation" in text:
        return f"{where}it refers to itself; give it a value"
    if broken := _search(r"no viable alternative at input '(.*)'", text):
        return f"{where}'{broken}' is an incomplete reference; write ${{KEY}}, or \\${{ for the characters themselves"
    return f"{where}${{{name}}} refers to a key that does not exist" if name else ""
