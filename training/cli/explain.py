"""Turns errors of Hydra and OmegaConf about a wrong setting into one sentence with the key and the valid values.

Both raise the same few exception classes for many different mistakes, so only their messages tell what was wrong.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator

from training.cli.fields import Key, keys_of, type_words
from training.cli.overrides import groups
from training.config.commands import COMMANDS, LaunchCommand

SYNONYMS = {
    "batch_size": "data.global_batch",
    "train_batch_size": "data.global_batch",
    "per_device_train_batch_size": "data.micro_batch",
    "micro_batch_size": "data.micro_batch",
    "learning_rate": "optimizer.lr",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "num_steps": "train.steps",
    "epochs": "train.steps (epochs x samples / data.global_batch)",
    "num_epochs": "train.steps (epochs x samples / data.global_batch)",
    "num_train_epochs": "train.steps (epochs x samples / data.global_batch)",
    "gradient_accumulation_steps": "data.micro_batch (the rest of a rank's share is accumulated)",
    "mixed_precision": "precision=bf16",
    "fp16": "precision=bf16",
    "bf16": "precision=bf16",
    "resolution": "stage (stage=base64; the size is stage.image_size)",
    "image_size": "stage.image_size",
    "output_dir": "run.dir",
    "train_data_dir": "data.shards (cascade prepare makes shards of a folder)",
    "dataset": "data.shards",
    "workers": "data.threads",
    "num_workers": "data.threads",
    "gpus": "cluster.processes",
    "num_gpus": "cluster.processes",
    "nproc_per_node": "cluster.processes",
    "nnodes": "cluster.nodes",
    "resume": "the same command again, which resumes automatically",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg": "guidance",
    "negative_prompt": "negative_prompts",
    "num_images_per_prompt": "num_images",
    "checkpoint_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "logging_steps": "train.log_every",
    "ema_decay": "ema.decays",
    "model": "stage",
    "config": "experiment",
}
"""Names of settings in other programs -> ours, with a remark if the meaning differs."""


PLUGINS = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher=ray": "hydra-ray-launcher",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
    "hydra/sweeper=nevergrad": "hydra-nevergrad-sweeper",
}
"""Hydra launchers and sweepers -> the package that provides them."""


def explain(error: BaseException, root: type) -> str:
    """Return one sentence about a composition or validation error; `root` is the verb's config class."""
    text = "\n".join(_messages(error))
    for rule in (_ambiguous, _unknown_option, _unknown_key, _not_optional, _wrong_type, _interpolation):
        sentence = rule(text, root)
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


def _ambiguous(text: str, root: type) -> str:
    word = _search(r"Ambiguous value for argument '(.*?)'\n", text)
    if not word:
        return ""
    key, _, value = word.partition("=")
    key, keys = key.lstrip("+"), keys_of(root)
    known = keys.get(key)
    inside = any(one.is_open and key.startswith(f"{name}.") for name, one in keys.items())
    if known is None and key not in groups() and not inside:
        return _no_such_key(key, root)
    if known is not None and known.is_text:
        one = f"'{key}=\"{value}\"'"
        return f"{word}: several values; write {one} for a text with a comma, or add --multirun for one run per value"
    number = known is not None and known.type in (int, float, bool)
    how = "" if number else f"write {key}=[{value}] for a list, or "
    return f"{word}: several values; {how}add --multirun for one run per value"


def _unknown_option(text: str, root: type) -> str:
    group, _, option = _search(r"Could not (?:find|load) '([^']+)'", text).rpartition("/")
    if not group:
        return ""
    options = re.findall(r"^\t(\S+)$", text, re.MULTILINE) or groups().get(group, [])
    if (group, option) == ("hydra/sweeper", "ax"):  # its dataclasses have mutable defaults
        return "hydra/sweeper=ax: its plugin, hydra-ax-sweeper, cannot be imported by Python 3.11 or later; use optuna"
    if package := PLUGINS.get(f"{group}={option}"):
        return f"{group}={option}: its plugin is not installed; pip install {package}"
    near = difflib.get_close_matches(option, options, n=1) or [o for o in options if o.endswith(option)][:1]
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={option}: no such option; {hint}the options are {', '.join(options)}"


def _unknown_key(text: str, root: type) -> str:
    if not re.search(r"Key '.*' (is )?not in ", text):
        return ""
    full = _search(r"full_key: (\S+)", text)
    typed = _search(r"Could not override '(\S+)'", text)
    full = typed if typed.startswith(full + ".") else full
    if root is LaunchCommand:
        owners = [name for name, verb in COMMANDS.items() if full in keys_of(verb.config)]
        if owners:
            return (
                f"{full}: only a key of {', '.join(owners)}; write it after the command's name, verb='NAME {full}=...'"
            )
    return _no_such_key(full, root)


def _no_such_key(full: str, root: type) -> str:
    keys = keys_of(root)
    if near := meant(full, keys) or " or ".join(suggest(full, keys) or suggest(full.lower(), keys)):
        return f"{full}: no such key; did you mean {near}?"
    section = full.rpartition(".")[0]
    while section and section not in keys:
        section = section.rpartition(".")[0]
    inside = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section]
    return f"{full}: no such key; {section or 'the top level'} has {', '.join(inside)}"


def meant(full: str, keys: dict[str, Key]) -> str:
    """Return our name of a setting that other programs call so, if the command has it, or a similarly named group;
    otherwise an empty string."""
    name = SYNONYMS.get(full.rpartition(".")[2].replace("-", "_"), "")
    if name and (re.split(r"[\s=]", name)[0] in {*keys, *groups(), "the"}):
        return name
    return "" if "." in full else next(iter(difflib.get_close_matches(full, groups(), n=1, cutoff=0.75)), "")


def flag(words: str, root: type) -> str:
    """Return the sentence for options with dashes, such as `--experiment demo`, that are settings here."""
    first, _, rest = words.partition(" ")
    name, equals, value = first.lstrip("-").partition("=")
    value = value if equals else ("" if rest.startswith("-") else rest.partition(" ")[0])
    key = name if name in groups() or name in keys_of(root) else name.replace("-", "_")
    candidates = [key]
    if key not in groups() and key not in keys_of(root):
        words = meant(key, keys_of(root))
        if words.startswith("the "):
            return f"{first}: no such option; it is {words}; options are listed by --help"
        near = re.split(r"[\s=]", words)[0]
        candidates = [near] if near else suggest(key, keys_of(root))
    how = "; write " + " or ".join(f"{key}={value or '...'}" for key in candidates) if candidates else ""
    return f"{first}: no such option{how}; settings are key=value, options are listed by --help"


def suggest(full: str, keys: dict[str, Key]) -> list[str]:
    """Return up to two known keys that a mistyped one may stand for: similar as a whole, or with the same last part."""
    last = full.rpartition(".")[2]
    same = [k for k in keys if k.rpartition(".")[2] == last]
    if same:
        closest = difflib.get_close_matches(full, same, n=1, cutoff=0.85)
        return closest or same[:2]
    section = full.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(full, siblings, n=1, cutoff=0.75)
    others = [k for k in keys if not full.startswith(k + ".")]
    return near or difflib.get_close_matches(full, others, n=1, cutoff=0.7)


def _expected(key: str, root: type) -> str:
    keys, name = keys_of(root), re.sub(r"\[\d+\]$", "", key)
    if name in keys:
        return type_words(keys[name].type)
    mapping = keys[name.rpartition(".")[0]]
    return type_words(typing.get_args(mapping.type)[1])


def _not_optional(text: str, root: type) -> str:
    key = _search(r"field '(\S+)' is not Optional", text)
    return f"{key}=null: it must be {_expected(key, root)}" if key else ""


def _wrong_type(text: str, root: type) -> str:
    marks = (
        "could not be converted",
        "is not a valid",
        "Invalid type assigned",
        "Invalid value assigned",
        "Cannot merge",
    )
    if not any(mark in text for mark in marks):
        return ""
    key = _search(r"full_key: (\S+)", text)
    value = _search(r"Error merging override [^=\n]*=(.*)", text) or _search(r"Value '(.*?)' ", text)
    stated = f"{key}={value}" if value else key
    return f"{stated}: it must be {_expected(key, root)}"


def _interpolation(text: str, root: type) -> str:
    gone = _search(r"Could not delete from config. '(.*?)' does not exist", text)
    if gone:
        return f"~{gone}: no such key"
    name = _search(r"Interpolation key '(.*?)' not found", text)
    key = _search(r"full_key: (\S+)", text)
    where = f"{key}: " if key else ""
    return f"{where}${{{name}}} refers to a key that does not exist" if name else ""
