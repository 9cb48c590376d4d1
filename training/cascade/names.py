"""What users of diffusers type: their names of arguments and methods, and ours."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from data_pipeline.common.errors import ConfigError

CALL = {
    "prompts": "prompt",
    "negative_prompts": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_images": "num_images_per_prompt",
    "mask": "mask_image",
}
"""Arguments of `generate` -> their names in a call, `cascade(...)`, which are those of diffusers."""
SCHEDULER = "give `sampler` (ddpm, ddim, heun or dpmpp_2m) and `spacing`"
EMBEDS = "give the text; the cascade encodes it"
ELSEWHERE = {
    "cfg": "it is `guidance_scale`",
    "cfg_scale": "it is `guidance_scale`",
    "cond_scale": "it is `guidance_scale`",
    "true_cfg_scale": "it is `guidance_scale`",
    "num_steps": "it is `num_inference_steps`",
    "num_images_per_prompts": "it is `num_images_per_prompt`",
    "batch_size": "it is `batch`, pictures per forward pass",
    "callback_on_step_end": "give `callback`, which is called as callback(stage, step, steps)",
    "callback_steps": "`callback` is called at every step, as callback(stage, step, steps)",
    "latents": "the cascade works in pixel space and has no latents; `seed` determines the noise",
    "prompt_embeds": EMBEDS,
    "negative_prompt_embeds": EMBEDS,
    "scheduler": SCHEDULER,
    "timesteps": SCHEDULER,
    "sigmas": SCHEDULER,
    "eta": "`sampler` decides: ddim adds no noise, ddpm does",
    "max_sequence_length": "the bundle's text encoder decides how many tokens it reads",
    "stop_at_unet_number": "give `stages`, how many to run",
    "return_all_unet_outputs": "use draw(...), which returns the picture of every stage",
    "return_pil_images": "the pictures are PIL images; leave it out",
    "start_image_or_video": "give `image` to redraw it, or `low_res` to enlarge it with stages=['sr...']",
    "inpaint_images": "give `image` and a mask",
    "guidance_rescale": "give `threshold`, which keeps strong guidance in range",
}
"""Other arguments of diffusers and similar programs -> what to give instead."""
OFFLOADED = "`to('cuda')` keeps one stage at a time on the GPU; leave it out"
SLICED = "set `batch` when you draw, to draw fewer pictures at once; leave it out"
METHODS = {
    "save_pretrained": "use save(DIRECTORY)",
    "cuda": "use to('cuda')",
    "cpu": "use to('cpu')",
    "half": "use to(torch.float16)",
    "float": "use to(torch.float32)",
    "bfloat16": "use to(torch.bfloat16)",
    "eval": "a cascade is always ready to draw; leave it out",
    "enable_model_cpu_offload": OFFLOADED,
    "enable_sequential_cpu_offload": OFFLOADED,
    "enable_attention_slicing": SLICED,
    "enable_vae_slicing": SLICED,
    "enable_vae_tiling": SLICED,
    "enable_xformers_memory_efficient_attention": "torch chooses the fastest attention; leave it out",
    "set_progress_bar_config": "no progress bar is shown; `callback` reports progress",
    "scheduler": f"{SCHEDULER} when you draw",
    "unet": "each of its `stages` has a `unet`",
    "text_encoder": "it is `encoder`",
    "tokenizer": "`encoder` takes text",
    "vae": "it works in pixel space",
    "sample": "use generate(PROMPTS)",
    "dtype": "`stages[0].unet` has weights of one; `to` sets it",
    "load_lora_weights": "train with lora.rank, and `cascade bundle` merges the adapters into the weights",
}
"""Methods and attributes of a pipeline of diffusers -> what to use instead."""
LOADING = {
    "torch_dtype": "load it, then use to(torch.bfloat16)",
    "dtype": "load it, then use to(torch.bfloat16)",
    "device": "load it, then use to('cuda')",
    "device_map": "load it, then use to('cuda')",
    "revision": "fetch it with hf download --revision, and give the directory",
    "cache_dir": "give the directory of the bundle, or set HF_HUB_CACHE",
    "subfolder": "give the directory of the bundle itself",
    "use_safetensors": "weights are always safetensors; leave it out",
    "local_files_only": "nothing is ever downloaded; leave it out",
    "safety_checker": "there is none; leave it out",
}
"""Arguments of `from_pretrained` elsewhere -> what to do instead."""


def refuse_call(options: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for the first option that a call, `cascade(...)`, does not have.

    Args:
        known: the arguments of a call.
    """
    theirs = {ours: f"in a call it is `{name}`; `generate` takes `{ours}`" for ours, name in CALL.items()} | ELSEWHERE
    _refuse("", options, known, theirs)


def refuse_generate(options: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for the first option that `generate` does not have.

    Args:
        known: the arguments of `generate`.
    """
    ours = {name: f"`generate` takes `{own}`; a call, cascade(...), takes `{name}`" for own, name in CALL.items()}
    sized = dict.fromkeys(("width", "height"), "`generate` takes `size`, (WIDTH, HEIGHT)")
    _refuse("", options, known, ELSEWHERE | ours | sized | {"generator": "`generate` takes `seed`"})


def refuse_loading(options: Iterable[str]) -> None:
    """Raise ConfigError for the first option, none of which `from_pretrained` has."""
    _refuse("from_pretrained: ", options, ("path", "text_path"), LOADING)


def _refuse(where: str, options: Iterable[str], known: Iterable[str], hints: Mapping[str, str]) -> None:
    known = list(dict.fromkeys(known))
    for name in options:
        if name in known:
            continue
        if name in hints:
            raise ConfigError(f"{where}{name}: {hints[name]}")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"the arguments are {', '.join(known)}"
        raise ConfigError(f"{where}{name}: no such argument; {hint}")


@contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors that begin with one of our names begin with the name that was typed."""
    try:
        yield
    except ConfigError as error:
        said = re.sub(r"^\w+(?=[=:])", lambda match: names.get(match[0], match[0]), str(error))
        raise ConfigError(said) from error


def size_of(height: int | None, width: int | None, size: Any) -> Any:
    """Return the `size` that height and width stand for, or `size` itself without them.

    Raises:
        ConfigError: only one of them, or both and a size.
    """
    if height is None and width is None:
        return size
    if size is not None:
        raise ConfigError("size: give it, or height and width, not both")
    if height is None or width is None:
        missing, given = ("height", "width") if height is None else ("width", "height")
        raise ConfigError(f"{given}={height if width is None else width}: give {missing} as well, in pixels")
    return (width, height)
